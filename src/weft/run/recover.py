"""Recovery after a compression: an adapter is trained on the factors of the compressed layers, and merged into them.

    weft compress … --then adapt:lora_sb,max_steps=200

The compressed model and the adapter's run lie in the work folder, each whole or able to go on; the output is the merged
model, as small as the compressed one. The words after the method are options of `weft adapt`; it trains on the training
split of the calibration data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError
from weft.run import adapt as _adapt
from weft.run.card import REPORT_FILE, write_words

if TYPE_CHECKING:
    from weft.run.compress import CompressOptions, Request

_TOLD = ("method", "trainable", "steps", "seconds", "validation", "test")
_SHARED = ("data", "columns", "validation_fraction", "test_fraction", "split_seed", "bf16")


def parse(then: str) -> tuple[str, dict[str, Any]]:
    """The adapter's name and the options in `adapt:METHOD,option=value,…`."""
    verb, _, words = then.partition(":")
    method, *settings = words.split(",")
    if verb != "adapt" or not method.partition("=")[0] or "=" in method:
        raise UsageError(f"then={then!r}: write adapt:METHOD or adapt:METHOD,option=value,…")
    pairs = [word.partition("=") for word in settings]
    if not all(key and equals for key, equals, _ in pairs):
        raise UsageError(f"then={then!r}: what follows the method are options, name=value between commas")
    return method, {key.replace("-", "_"): value for key, _, value in pairs}


def request(options: CompressOptions, work: Path, targets: list[str] | None = None) -> _adapt.Request:
    """The adapter's run, checked against everything but the model and the data."""
    method, given = parse(options.then or "")
    if method in ("base", "head", "full"):
        raise UsageError(f"then={options.then!r}: an adapter's name; {method} has nothing to merge")
    if not options.data:
        raise UsageError("--data is missing: a recovery trains on it")
    fixed = {name: getattr(options, name) for name in _SHARED}
    fixed |= {"model": str(compressed(work)), "output": str(work / "adapter"), "target_modules": targets}
    own = [key for key in ("model", "data", "output", "target_modules") if key in given]
    if own:
        raise UsageError(f"then={options.then!r}: {own[0]} is the compression's own")
    settings = {"seed": options.seed, "max_length": options.max_length, "batch_size": options.batch_size} | given
    return _adapt.request({key: v for key, v in {**settings, **fixed, "method": method}.items() if v is not None})


def compressed(work: Path) -> Path:
    """Where the compressed model waits for its recovery."""
    return work / "compressed"


def waits(run: Request) -> bool:
    """Whether the model is compressed already, and only the recovery is left."""
    return run.options.then is not None and (compressed(run.work) / REPORT_FILE).exists()


def factors(model: Any, report: dict[str, Any]) -> list[str]:
    """The dense matrices that an adapter can be merged into: factors of compressed layers, and layers that stayed."""
    from weft.linear._structured import DENSE, Structured

    stayed = {name for layer in report["layers"] if layer["size"] is None for name in layer["parts"]}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Structured):
            found += [f"{name}.{inner}" for inner, m in module.named_modules() if type(m) in DENSE]
        elif name in stayed:
            found.append(name)
    return found


def recover(run: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and merge, and write the output; its report. What is finished already is not done again."""
    from weft.adapters._export import export
    from weft.linear._transformers import to_dense
    from weft.run import models

    start, merged = compressed(run.work), run.work / "merged"
    report = json.loads((start / REPORT_FILE).read_text(encoding="utf-8"))
    rows = _adapt.read_rows(request(run.options, run.work).options)
    skeleton = models.load_base(str(start), rows.task, labels=rows.labels, weights=False).model
    targets = factors(skeleton, report)
    if not targets:
        start.replace(run.output)
        shutil.rmtree(run.work)
        raise WeftError(
            f"{run.method} makes layers without dense factors, into which no adapter can be merged: {run.output} is "
            f"the compressed model, and weft adapt --model {run.output} trains an adapter beside it"
        )
    job = request(run.options, run.work, targets)
    result = _adapt.settled(job, rows, say)
    shutil.rmtree(merged, ignore_errors=True)
    export(str(job.options.output), merged, "merged", model=str(start))
    for file in start.iterdir():  # the processors, and what else belongs to the model
        if not (merged / file.name).exists() and not file.name.startswith("model"):
            shutil.copyfile(file, merged / file.name)
    if run.options.dense:
        model = to_dense(models.load_as_saved(str(merged)))
        for file in merged.glob("model*"):
            file.unlink()
        model.save_pretrained(merged)
    report |= {"recovery": {"then": run.options.then, **{key: result[key] for key in _TOLD}}}
    write_words(run, report, merged, type(skeleton).__name__)
    merged.replace(run.output)
    shutil.rmtree(run.work)
    return report
