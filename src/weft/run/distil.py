"""Training after a compression: what its method learns by, beside the model from before.

    weft compress --method pela … --train steps=300,learning_rate=1e-4

Other words after --train are options of `weft adapt`. The compressed model and its training run lie in the work folder,
each whole or able to go on. A method that has nothing to learn by is fine-tuned on the task.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft import registry
from weft.errors import UsageError, nearest
from weft.files import whole_folder, write_text
from weft.run import adapt as _adapt
from weft.run.budget import Budget, steps_of
from weft.run.card import REPORT_FILE, write_words

if TYPE_CHECKING:
    from weft.compress._distil import Objective
    from weft.run.compress import CompressOptions, Request
    from weft.run.sources import Rows
    from weft.run.train import Teach

DEFAULT = "steps=300"
NONE = "steps=0"
# of a method that has nothing to learn by: larger steps than fine-tuning takes, since there is something to repair
RECIPE = {"learning_rate": 1e-4, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"}
PROBE_STEPS = 5  # to turn minutes into steps

_TOLD = ("trainable", "steps", "seconds", "validation", "test")
_SHARED = ("data", "columns", "validation_fraction", "test_fraction", "split_seed", "bf16")


def learns(method: str) -> bool:
    """Whether a method of compression says what it learns by."""
    return hasattr(registry.load(method), registry.class_name(method, "Objective"))


def parse(train: str) -> tuple[dict[str, Any], float | None]:
    """Options of `weft adapt`, and minutes, in `steps=300,learning_rate=1e-4` or `minutes=5`."""
    settings: dict[str, Any] = {}
    for word in train.split(","):
        key, equals, value = (part.strip() for part in word.partition("="))
        key = {"steps": "max_steps"}.get(key, key.replace("-", "_"))
        if not (key and equals and value):
            raise UsageError(f"train={train!r}: write name=value between commas, steps=300,learning_rate=1e-4 say")
        if key in settings:
            raise UsageError(f"train={train!r}: {word.strip()!r} is given twice")
        settings[key] = value
    minutes = settings.pop("minutes", None)
    try:
        found = None if minutes is None else float(minutes)
    except ValueError:
        found = -1.0
    if found is not None and not 0 < found < float("inf"):
        raise UsageError(f"train={train!r}: minutes={minutes} is no positive number")
    return settings, found


def request(options: CompressOptions, method: str, train: str, work: Path) -> _adapt.Request:
    """The training run, checked against everything but the model and the data."""
    settings, minutes = parse(train)
    if not options.data:
        raise UsageError("--data is missing: the training rows")
    fixed = {name: getattr(options, name) for name in _SHARED}
    fixed |= {"model": str(start(work)), "output": str(work / "trained"), "method": "full"}
    own = [key for key in (*fixed, "optimizer") if key in settings]
    if own:
        raise UsageError(f"train={train!r}: {own[0]} is the compression's own")
    known = {option.name for option in _adapt.run_options()} | set(_adapt.method_keys_of("full").values())
    unknown = [key for key in settings if key not in known]
    if unknown:
        there = known - {*fixed, "optimizer", "max_steps"} | {"steps", "minutes"}
        raise UsageError(f"train={train!r}: unknown option {unknown[0]!r}: {nearest(unknown[0], there)}")
    if minutes is not None and "epochs" in settings:
        raise UsageError(f"train={train!r}: minutes or epochs, not both")
    recipe = registry.card(method).recipe or RECIPE
    shared = {"seed": options.seed, "max_length": options.max_length, "batch_size": options.batch_size}
    given = {**recipe, **shared, **settings, **fixed}
    if minutes is None and not {"epochs", "max_steps"} & set(settings):
        given["max_steps"] = parse(DEFAULT)[0]["max_steps"]
    return _adapt.request({key: value for key, value in given.items() if value is not None})


def start(work: Path) -> Path:
    """Where the compressed model waits for its training."""
    return work / "start"


def waits(run: Request) -> bool:
    """Whether the model is compressed already, and its training is left."""
    return run.train is not None and (start(run.work) / REPORT_FILE).exists()


def taught(run: Request, say: Callable[[str], None], *, progress: bool = True) -> tuple[Any, dict[str, Any]]:
    """Train what lies in `start`; the model, as it is to be stored, and what was found. What is finished already is not
    done again."""
    from weft.run import models

    assert run.train is not None
    job = request(run.options, run.method, run.train, run.work)
    rows = _adapt.read_rows(job.options)
    teach = _teacher(run, rows)
    job = _with_steps(run, job, rows, teach)
    result = _adapt.settled(job, rows, say, teach, progress=progress)
    stored = models.load_as_saved(str(start(run.work)), weights=False).dtype
    return models.load_as_saved(str(job.options.output)).to(stored), result


def train(run: Request, to: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, and write the model's folder; its report."""
    from weft.linear._transformers import to_dense

    begun = start(run.work)
    report = json.loads((begun / REPORT_FILE).read_text(encoding="utf-8"))
    model, result = taught(run, say)
    if run.options.dense and not run.options.then:
        to_dense(model)
    report |= {"training": {"train": run.train, **{key: result[key] for key in _TOLD}}}
    with whole_folder(to) as partial:
        model.save_pretrained(partial)
        for file in begun.iterdir():  # the tokenizer, and what else belongs to the model
            if not ((partial / file.name).exists() or file.name.startswith("model")):
                shutil.copyfile(file, partial / file.name)
        write_words(run, report, partial, type(model).__name__)
    return report


def _teacher(run: Request, rows: Rows) -> Teach:
    """What makes the method's objective of a student; the teacher is loaded when it is asked for."""
    from weft.compress._distil import frozen, objective
    from weft.run import models

    def teach(student: Any) -> Objective[Any]:
        if not learns(run.method):
            return objective(run.method, run.config, student, student)
        whole = models.load_base(run.options.model or "", rows.task, labels=rows.labels).model
        return objective(run.method, run.config, student, frozen(whole, student))

    return teach


def _with_steps(run: Request, job: _adapt.Request, rows: Rows, teach: Teach) -> _adapt.Request:
    """The run with as many steps as its minutes allow, of which a killed run keeps count."""
    from weft.run.measure import measuring
    from weft.run.train import train as steps

    minutes = parse(run.train or "")[1]
    if minutes is None:
        return job
    file = run.work / "steps.json"
    if not file.exists():
        base, splits = _adapt.load(job, rows, lambda text: None)
        probe = replace(job.settings, max_steps=PROBE_STEPS, eval_steps=0, save_steps=0)
        with measuring() as seen:
            steps(base, splits, job.method, probe, None, progress=False, teach=teach)
        found = steps_of(Budget(steps=job.settings.max_steps, minutes=minutes), seen.step_seconds)
        write_text(file, json.dumps(found))
    return replace(job, settings=replace(job.settings, max_steps=json.loads(file.read_text(encoding="utf-8"))))
