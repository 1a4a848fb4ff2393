"""Let an adapted model answer: continue prompts, classify text or images, or say whose an image is; JSON lines."""

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
    data: Annotated[
        str | None, typer.Option(help="Data to answer: what weft adapt takes as --data, or images without labels.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of the data: train, validation or test.")] = "test",
    columns: Annotated[str | None, typer.Option(help="Where columns have other names: text=sentence.")] = None,
    gallery: Annotated[
        str | None,
        typer.Option(help="For verification, known images, a folder an identity: each answer names the nearest."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for the JSON lines, by default standard output; for verification, .npz keeps embeddings."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Answer the first rows only; with --score, the first distinct prompts.")
    ] = None,
    score: Annotated[
        bool,
        typer.Option(
            "--score",
            help="BLEU and ROUGE-L of the answers against the data's own (weft[generation]); rows that share a prompt "
            "are answered once and are references of one another.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens a continuation at most: 64 by default, with --score those of the longest reference.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Draws the continuations.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a text to classify at most.")] = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="Keep the model in bfloat16.")] = False,
) -> None:
    """Let an adapted model answer.

    [bold]weft predict --adapter OUT --prompt "def add(" --prompt "class Stack"[/bold]

    One JSON object a line: prompt and completion, or text or image, label and probabilities, or image, identity and
    cosine. With --score the last line has the scores.
    """
    if bool(prompt) == bool(data):
        raise UsageError("give either --prompt or --data")
    from weft.run import predict as _predict

    sampling = _predict.Sampling(64 if max_new_tokens is None else max_new_tokens, temperature, top_p, seed)
    if score:
        _check_score(data)
    facts = _predict.adapter_facts(adapter)
    if score and facts["task"] != "causal-lm":
        raise UsageError(f"--score is for text, and {str(adapter)!r} classifies")
    rows = [{"text": text} for text in prompt or []]
    if data:
        rows = _rows(data, split, columns)
    of_images = facts["task"] in ("image-classification", "verification")
    if prompt and of_images:
        raise UsageError(f"--prompt is for text, and {str(adapter)!r} answers images: give --data")
    if rows and of_images != ("image" in rows[0]):
        kind = "images" if of_images else "text"
        raise UsageError(f"{str(adapter)!r} answers {kind}, and data {data!r} has {', '.join(map(str, rows[0]))}")
    known = _gallery(facts["task"], gallery, output, adapter, columns)
    if score and data:
        _check_references(rows, data)
        base = _predict.load_adapted(model, adapter, bf16=bf16)
        _write(_scored(base, rows, limit, sampling, batch_size, derive=max_new_tokens is None), output)
        return
    rows = rows[:limit]
    base = _predict.load_adapted(model, adapter, bf16=bf16)
    answers: Any
    if facts["task"] == "verification":
        from weft.run import verification

        if known is None and output is not None:
            verification.write_embeddings(base, rows, output, batch_size)
            print(f"saved to {output}", file=sys.stderr)
            return
        answers = verification.answers(base, rows, known or [], batch_size)
    elif facts["task"] != "causal-lm":
        answers = _labelled(_predict.classify(base, rows, max_length, batch_size), rows)
    else:
        asked = _predict.prompts_of(rows, base.tokenizer)
        templated = any("messages" in row for row in rows)
        made = _predict.complete(base, [text for text, _ in asked], sampling, batch_size, templated=templated)
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


def _gallery(
    task: str, gallery: str | None, output: Path | None, adapter: Path, columns: str | None
) -> list[dict[str, Any]] | None:
    """The known images, each with its identity; None where embeddings are asked for, or other answers."""
    if gallery and task != "verification":
        raise UsageError(f"--gallery is for verification, and {str(adapter)!r} is for {task}")
    embeds = output is not None and output.suffix == ".npz"
    if task == "verification" and bool(gallery) == embeds:
        raise UsageError(
            f"{str(adapter)!r} embeds images: give --gallery, a folder an identity, to name each image's nearest, or "
            "--output FILE.npz to keep the embeddings"
        )
    if not gallery:
        return None
    known = _rows(gallery, "train", columns)
    if not all("image" in row and "label" in row for row in known):
        raise UsageError(f"--gallery {gallery!r} does not say whose its images are: give each identity a folder")
    return known


def _check_score(data: str | None) -> None:
    from weft.run.generate import check_installed

    if not data:
        raise UsageError("--score needs --data with prompts and completions to score the answers against")
    check_installed("--score")


def _check_references(rows: list[dict[str, Any]], data: str) -> None:
    from weft.run.generate import has_reference

    missing = sum(not has_reference(row) for row in rows)
    if missing:
        raise UsageError(
            f"--score needs a completion to score each answer against, and {missing:,} of {len(rows):,} rows of data "
            f"{data!r} have none"
        )


def _scored(
    base: Any, rows: list[dict[str, Any]], limit: int | None, sampling: Any, batch_size: int, *, derive: bool
) -> Any:
    from dataclasses import replace

    from weft.run.generate import answer, exam_of, score
    from weft.run.models import position_limit

    most = None if derive else sampling.max_new_tokens
    exam = exam_of(rows, base.tokenizer, limit=limit, positions=position_limit(base.name), max_new_tokens=most)
    if not exam.prompts:
        raise UsageError("--score: every prompt is too long for the model to answer")
    print(f"scoring {exam.sentence()}", file=sys.stderr)
    sampling = replace(sampling, max_new_tokens=exam.max_new_tokens)
    answers = answer(base.model, base.tokenizer, exam, batch_size, sampling=sampling)
    for prompt, made, references in zip(exam.prompts, answers, exam.references, strict=True):
        yield {"prompt": prompt, "completion": made, "references": references}
    scores = score(answers, exam.references)
    print("BLEU {bleu:.2f}, ROUGE-L {rouge_l:.2f}".format_map(scores), file=sys.stderr)
    yield {**scores, "prompts": len(answers)}


def _labelled(probabilities: Any, rows: list[dict[str, Any]]) -> Any:
    for number, (row, chances) in enumerate(zip(rows, probabilities, strict=True)):
        yield {
            **{name: row[name] for name in ("text", "text1", "text2") if name in row},
            **({"image": str(row["image"]) if isinstance(row["image"], Path) else number} if "image" in row else {}),
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
