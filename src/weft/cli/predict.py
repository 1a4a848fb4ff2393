"""Let an adapted model answer: text or images for prompts, labels, masks, or whose an image is; JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.errors import UsageError
from weft.files import whole_folder, write_text

# Options that answer one task
_TASKS = {"masks": "segmentation", "gallery": "verification", "steps": "text-to-image", "guidance": "text-to-image"}


def command(
    adapter: Annotated[Path, typer.Option(help="Folder that weft adapt (or PEFT) saved.")],
    model: Annotated[str | None, typer.Option(help="Base model; by default the one it was trained on.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue, to classify or to draw; may be repeated.")
    ] = None,
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
            help="File for the JSON lines, by default standard output; of images drawn a new folder, and for "
            "verification .npz keeps embeddings."
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="New folder for a PNG mask of each image, whose levels are class numbers: of models of segmentation."
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
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of an image: 50 by default.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Weight of a prompt in its image, 1 for no guidance: 7.5 by default.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the continuations or the first image; the second has the next.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a text to classify at most.")] = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="Keep the model in bfloat16.")] = False,
) -> None:
    """Let an adapted model answer.

    [bold]weft predict --adapter OUT --prompt "def add(" --prompt "class Stack"[/bold]

    One JSON object a line: prompt and completion, or text or image, label and probabilities; prompt, image and seed of
    images drawn; of segmentation the share of each class in the image, and its Dice where the data has masks; of
    verification image, identity and cosine. With --score the last line has the scores.
    """
    if bool(prompt) == bool(data):
        raise UsageError("give either --prompt or --data")
    from weft.run import predict as _predict
    from weft.run.models import IMAGE_TASKS

    sampling = _predict.Sampling(64 if max_new_tokens is None else max_new_tokens, temperature, top_p, seed)
    if score:
        _check_score(data)
    facts = _predict.adapter_facts(adapter)
    for name, value in {"masks": masks, "gallery": gallery, "steps": steps, "guidance": guidance}.items():
        if value is not None and facts["task"] != _TASKS[name]:
            raise UsageError(f"--{name} is for {_TASKS[name]}, and {str(adapter)!r} is for {facts['task']}")
    if facts["task"] == "text-to-image":
        if score or output is None:
            missing = "--output is missing: a new folder for the images"
            raise UsageError(f"--score is for text, and {str(adapter)!r} draws images" if score else missing)
        given = {"steps": steps, "guidance": guidance, "seed": seed}
        prompts = prompt or _captions(_rows(str(data), split, columns), str(data))
        _draw(model, adapter, prompts[:limit], given, batch_size, output, bf16)
        return
    if score and facts["task"] != "causal-lm":
        raise UsageError(f"--score is for text, and {str(adapter)!r} classifies")
    rows = [{"text": text} for text in prompt or []]
    if data:
        rows = _rows(data, split, columns)
    of_images = facts["task"] in IMAGE_TASKS
    if prompt and of_images:
        raise UsageError(f"--prompt is for text, and {str(adapter)!r} answers images: give --data")
    if rows and of_images != ("image" in rows[0]):
        kind = "images" if of_images else "text"
        raise UsageError(f"{str(adapter)!r} answers {kind}, and data {data!r} has {', '.join(map(str, rows[0]))}")
    known = _gallery(gallery, output, adapter, columns) if facts["task"] == "verification" else None
    if score and data:
        _check_references(rows, data)
        base = _predict.load_adapted(model, adapter, bf16=bf16)
        _write(_scored(base, rows, limit, sampling, batch_size, derive=max_new_tokens is None), output)
        return
    rows = rows[:limit]
    if facts["task"] == "segmentation":
        _segment(adapter, model, rows, facts["labels"], masks, output, bf16=bf16, batch_size=batch_size)
        return
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


def _captions(rows: list[dict[str, Any]], data: str) -> list[str]:
    missing = next((number for number, row in enumerate(rows, 1) if not isinstance(row.get("text"), str)), None)
    if missing is not None:
        raise UsageError(f"data {data!r}, row {missing}, has no text to draw; name its column with --columns text=...")
    return [row["text"] for row in rows]


def _draw(
    model: str | None,
    adapter: Path,
    prompts: list[str],
    given: dict[str, Any],
    batch_size: int,
    output: Path,
    bf16: bool,
) -> None:
    from weft.run import text_to_image

    how = text_to_image.Drawing(**{name: value for name, value in given.items() if value is not None})
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists already; name a new folder")
    pipe = text_to_image.load_pipeline(model, adapter, bf16=bf16)
    _write(text_to_image.write_images(pipe, prompts, how, batch_size, output), None)


def _segment(
    adapter: Path,
    model: str | None,
    rows: list[dict[str, Any]],
    classes: list[str] | None,
    masks: Path | None,
    output: Path | None,
    *,
    bf16: bool,
    batch_size: int,
) -> None:
    from contextlib import nullcontext

    from weft.run import segmentation
    from weft.run.predict import load_adapted

    segmentation.check(rows, classes)
    with nullcontext() if masks is None else whole_folder(masks) as folder:
        _write(segmentation.predict(load_adapted(model, adapter, bf16=bf16), rows, folder, batch_size), output)
    if masks is not None:
        print(f"masks: {masks}", file=sys.stderr)


def _rows(data: str, split: str, columns: str | None) -> list[dict[str, Any]]:
    from weft.run import sources
    from weft.run.options import coerce

    try:
        renamed = coerce(columns, dict[str, str]) if columns else None
    except (TypeError, ValueError):
        raise UsageError(f"--columns must be pairs like text=sentence, not {columns!r}") from None
    return sources.read_unlabelled(data, split, renamed)


def _gallery(
    gallery: str | None, output: Path | None, adapter: Path, columns: str | None
) -> list[dict[str, Any]] | None:
    """The known images, each with its identity; None where embeddings are asked for."""
    embeds = output is not None and output.suffix == ".npz"
    if bool(gallery) == embeds:
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
    write_text(output, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    print(f"saved to {output}", file=sys.stderr)
