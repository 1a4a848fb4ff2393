"""What a compressed model's folder says of itself: compression.json for programs, README.md for readers."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft import registry
from weft.run import models
from weft.run.adapt import RUN_FILE

if TYPE_CHECKING:
    from weft.compress._engine import Compression
    from weft.run.compress import Calibration, Outline, Request

REPORT_FILE = "compression.json"
CARD_FILE = "README.md"


def report_of(
    run: Request,
    shape: Outline,
    made: Compression,
    found: dict[str, Calibration],
    folder: Path,
    seconds: float,
    done: int,
) -> dict[str, Any]:
    """The report, as JSON: every layer, sizes before and after, what it was calibrated on, versions, seconds.

    `folder` holds the weights already; `done` layers were finished by an earlier run.
    """
    import torch
    import transformers

    import weft
    from weft.run.models import folder_of

    return {
        "method": run.method,
        "model": run.options.model,
        "command": run.command(),
        "keep": {"promised": run.config.keep, "measured": made.keep},
        "reads": made.reads,
        "bits": {"before": sum(row.dense for row in made.rows), "after": sum(row.bits for row in made.rows)},
        "file_bytes": {"before": _weights(folder_of(run.options.model or "")), "after": _weights(folder)},
        "dense": run.options.dense,
        "layers": [dataclasses.asdict(row) for row in made.rows],
        "left": {name: list(size) for name, size in shape.left.items()},
        "calibration": {
            name: {"weight": each.weight, "sequences": each.sequences, "tokens": each.tokens}
            for name, each in found.items()
        },
        "seconds": round(seconds, 3),
        "layers_found_finished": done,
        "versions": {
            "weft": weft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def write_words(run: Request, report: dict[str, Any], folder: Path, model_class: str) -> None:
    """What a folder says beside its weights: how attention is computed, the report, the run file and the card."""
    models.keep_attention(run.options.model or "", folder)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / RUN_FILE).write_text(run.file(), encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(run, report, model_class), encoding="utf-8")


def _weights(folder: Path) -> int:
    """Bytes of a model's weight files."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def model_card(run: Request, report: dict[str, Any], model_class: str) -> str:
    """README.md: what the model is, what it weighs, how it was made and how to load it."""
    card = registry.card(run.method)
    spec = run.options.model or ""
    paper = f", arXiv {card.arxiv}" if card.arxiv else f" ({card.year})"
    targeted = sum(len(layer["parts"]) for layer in report["layers"])
    replaced = sum(len(layer["parts"]) for layer in report["layers"] if layer["size"] is not None)
    kept, bits, files = report["keep"], report["bits"], report["file_bytes"]
    base = "" if spec.startswith("builtin:") or Path(spec).expanduser().exists() else f"base_model: {spec}\n"
    share = f"{kept['measured']:.4f} of the targeted matrices' stored bits are kept"
    if kept["promised"] is None:
        share += f", and {report['reads']:.4f} read for a token"
    else:
        share += f"; {kept['promised']:g} were asked for"
    lines = [
        f"---\nlibrary_name: transformers\n{base}tags: [weft, compressed, {run.method}]\n---",
        f"# {run.output.name}",
        f"`{spec}`, compressed by weft with `{run.method}`, after *{card.title}*{paper}."
        if replaced
        else f"A copy of `{spec}`: `{card.knob}={getattr(run.config, card.knob):g}` leaves nothing to replace.",
        "| bytes | before | after |\n| --- | ---: | ---: |\n"
        f"| the {targeted} targeted matrices | {bits['before'] // 8:,} | {bits['after'] // 8:,} |\n"
        f"| weight files | {files['before']:,} | {files['after']:,} |",
        f"{replaced} matrices were replaced. {share}. "
        f"`{REPORT_FILE}` has every layer, and what else was left as it is.",
    ]
    if report["dense"]:
        lines.append(
            "The matrices are written out as dense ones, for programs that do not know weft. The files are as large as "
            "the original's; the figures of the matrices are those of their factors."
        )
    for name, each in report["calibration"].items():
        weight = f", weight {each['weight']:g}" if len(report["calibration"]) > 1 else ""
        lines.append(f"Calibrated on {each['sequences']} sequences of `{name}`, {each['tokens']:,} tokens{weight}.")
    if "training" in report:
        lines.append(_trained(run.method, report["training"]))
    if "recovery" in report:
        lines.append(_recovered(report["recovery"]))
    load = f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained("{run.output}")'
    if replaced and not report["dense"]:
        load = f"import weft  # lets transformers know the compressed layers\n{load}"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        f"## Load it\n\n```python\n{load}\n```",
        f"## Make it again\n\n```sh\n{report['command']}\n```",
        f"It took {report['seconds']:.1f} s with {versions}.",
    ]
    return "\n\n".join(lines) + "\n"


def _trained(method: str, training: dict[str, Any]) -> str:
    loss = training["validation"].get("loss")
    end = "" if loss is None else f"; its validation loss was {loss:.4f} in the end"
    return (
        f"Then it was trained for {training['steps']:,} steps of `{method}` (`--train {training['train']}`: "
        f"{training['trainable']:,} parameters, {training['seconds']:.1f} s){end}."
    )


def _recovered(recovery: dict[str, Any]) -> str:
    loss = recovery["validation"].get("loss")
    end = "" if loss is None else f"; its validation loss was {loss:.4f} in the end"
    return (
        f"Then `{recovery['method']}` was trained for {recovery['steps']:,} steps on the factors and merged into them "
        f"({recovery['trainable']:,} parameters, {recovery['seconds']:.1f} s){end}."
    )
