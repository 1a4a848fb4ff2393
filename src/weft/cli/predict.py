"""Let an adapted model answer: continue prompts, or give the probability of each label; JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.errors import UsageError


def command(
    adapter: Annotated[Path, typer.Option(help="Folder that weft adapt (or PEFT) saved.")],
    model: Annotated[str | None, typer.Option(help="Base model; by default the one it was trained on.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue or to classify; may be repeated.")] = None,
    data: Annotated[str | None, typer.Option(help="Data to answer: what weft adapt takes as --data.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the data: train, validation or test.")] = "test",
    columns: Annotated[str | None, typer.Option(help="Where columns have other names: text=sentence.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the JSON lines; by default standard output.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer the first rows only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a continuation at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Draws the continuations.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a text to classify at most.")] = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="Keep the model in bfloat16.")] = False,
) -> None:
    """Let an adapted model answer.

    [bold]weft predict --adapter OUT --prompt "def add(" --prompt "class Stack"[/bold]

    One JSON object a line: prompt and completion, or text, label and probabilities.
    """
    if bool(prompt) == bool(data):
        raise UsageError("give either --prompt or --data")
    from weft.run import predict as _predict

    sampling = _predict.Sampling(max_new_tokens, temperature, top_p, seed)
    facts = _predict.adapter_facts(adapter)
    rows = [{"text": text} for text in prompt or []]
    if data:
        rows = _rows(data, split, columns)
    rows = rows[:limit]
    base = _predict.load_adapted(model, adapter, bf16=bf16)
    if facts["task"] == "classification":
        answers = _labelled(_predict.classify(base, rows, max_length, batch_size), rows)
    else:
        asked = _predict.prompts_of(rows, base.tokenizer)
        made = _predict.complete(base, [text for text, _ in asked], sampling, batch_size)
        answers = (
            {"prompt": text, "completion": answer, **({} if expected is None else {"expected": expected})}
            for (text, expected), answer in zip(asked, made, strict=True)
        )
    _write(answers, output)


def _rows(data: str, split: str, columns: str | None) -> list[dict[str, Any]]:
    from weft.run import sources
    from weft.run.options import coerce

    try:
        renamed = coerce(columns, dict[str, str]) if columns else None
    except (TypeError, ValueError):
        raise UsageError(f"--columns must be pairs like text=sentence, not {columns!r}") from None
    return sources.read_unlabelled(data, split, renamed)


def _labelled(probabilities: Any, rows: list[dict[str, Any]]) -> Any:
    for row, chances in zip(rows, probabilities, strict=True):
        yield {
            **{name: row[name] for name in ("text", "text1", "text2") if name in row},
            "label": max(chances, key=chances.get),
            "probabilities": {name: round(chance, 6) for name, chance in chances.items()},
            **({"expected": row["label"]} if "label" in row else {}),
        }


def _write(answers: Any, output: Path | None) -> None:
    if output is None:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
        return
    from weft.run.checkpoints import write_text

    write_text(output, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    print(f"saved to {output}", file=sys.stderr)
