"""`weft compare`: plan a study, run what is left of it, one row a run.

First the plan: every knob and the number of steps. Then grids and final runs, spread over workers; then timing runs,
one at a time on an otherwise idle machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weft.errors import UsageError, WeftError
from weft.files import write_text
from weft.run import generate, spread
from weft.run.budget import Budget
from weft.run.planning import Observer, Silent, plan_study
from weft.run.single import context_of, empty_row, run_task
from weft.run.study import (
    Plan,
    Results,
    Row,
    Study,
    Task,
    more_methods,
    open_results,
    pending,
    plan_from,
    plan_json,
    read_rows,
    request_of,
    timing,
)

PACKAGES = ("weft", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Extras:
    """What a study's header says for the reader, beside what decides the numbers.

    Attributes:
        command: that goes on with the study.
        notes: sentences to join the plan's.
        fields: further fields of the header.
    """

    command: str = ""
    notes: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


# --- the study --------------------------------------------------------------------------------------------------------


def versions(*further: str) -> dict[str, str]:
    """What the numbers depend on; `further` packages beside the usual ones."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *further):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def hardware() -> dict[str, Any]:
    """The machine, in words."""
    import torch

    described: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if names:
            described["processor"] = names[0].partition(":")[2].strip()
    with contextlib.suppress(ImportError):
        import psutil

        described["memory"] = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def commit() -> str | None:
    """The commit of weft's own source tree, where it runs from one."""
    import subprocess

    import weft

    root = Path(weft.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        return head.stdout.strip()
    return None


def compare(
    study: Study,
    output: Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    extras: Extras | None = None,
    retry_failed: bool = False,
    observer: Observer | None = None,
    debug: bool = False,
) -> list[Row]:
    """Run what is left of a study; returns all its rows, which are in `output`/results.jsonl too.

    A study with more methods than the one that lies in `output`, and otherwise the same, adds them to it.

    Args:
        workers: processes at a time on this machine; no number depends on it. None: as many as it has room for.
        ray: address of a Ray cluster to run on instead.
        extras: what the header says beside the plan.
        retry_failed: run again what failed before.
        observer: told of progress.
        debug: print tracebacks of failed runs to stderr.

    Raises:
        UsageError: the request cannot be served, or `output` holds another study.
    """
    observer, extras = observer or Silent(), extras or Extras()
    output = Path(output)
    if study.generate:
        generate.check_installed("--generate")
    request = request_of(study, versions(*(generate.PACKAGES if study.generate else ())))
    if ray is not None:
        spread.check_ray(ray)
    if not read_rows(output / "results.jsonl")[0]:  # else the plan is in the file, and a changed request refused
        plan = plan_study(study, observer)
    results = open_results(output, request, retry_failed=retry_failed, grows=True)
    try:
        if results.header is None:
            plan = replace(plan, notes=(*plan.notes, *extras.notes))
            results.append(_header(plan, request, extras))
        elif more := more_methods(results.header["request"], request):
            header = _grown(results.header, more, study, request, extras, observer)
            # times are taken in turns, so that all have the same noise: once more, of all
            kept = [row for row in results.runs if row["phase"] != "measure"]
            results = results.replaced([header, *kept])
        header = results.header
        assert header is not None
        plan = plan_from(header, study)
        observer.planned(plan, header)
        forgetting = _forgetting(plan, output, observer, debug)
        context = context_of(plan, forgetting, debug)
        with _pool(context, study, workers or default_workers(plan.parameters, study.threads), ray) as pool:
            _train_all(plan, results, pool, observer)
        for task in timing(plan, results.rows):
            observer.progressed(plan, results.rows, [task])
            row = spread.alone(run_task, context, asdict(task), study.threads)
            _record(results, plan, task, row, observer)
        observer.progressed(plan, results.rows, [])
    finally:
        results.close()
    return results.rows


def _header(plan: Plan, request: Row, extras: Extras) -> Row:
    study = plan.study
    steps = {} if study.budget.minutes is None else {"steps": plan.steps}
    return {
        "kind": "study",
        "model": study.model,
        "data": study.data,
        "task": plan.task,
        "budget": {**study.budget.as_dict(), **steps} or {"steps": plan.steps},
        "seeds": study.final_seeds,
        "methods": [entry.method for entry in plan.entries],
        "command": extras.command,
        "versions": request["versions"],
        "hardware": hardware(),
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": request,
        "plan": plan_json(plan),
        **extras.fields,
    }


def _grown(header: Row, more: list[str], study: Study, request: Row, extras: Extras, observer: Observer) -> Row:
    """The header of a study with methods added to it."""
    there = plan_from(header, study)
    plan = plan_study(replace(study, budget=Budget(study.budget.params, there.steps)), observer)
    planned = {entry.method: json.loads(json.dumps(asdict(entry))) for entry in plan.entries}
    for entry in there.entries:
        for name, value in asdict(entry).items():
            if planned[entry.method][name] != value:
                raise UsageError(
                    f"{entry.method} ran with {name} {json.dumps(value)} in this study and would now have "
                    f"{json.dumps(planned[entry.method][name])}; give another --output"
                )
    notes = dict.fromkeys((*there.notes, *plan.notes, *extras.notes))
    plan = replace(plan, study=study, notes=tuple(notes))
    now = _header(plan, request, extras)
    added = {"methods": more, "commit": now["commit"], "started": now["started"]}
    kept = {name: header[name] for name in ("commit", "started", "hardware")}
    return {**header, **now, **kept, "added": [*header.get("added", []), added]}


def _forgetting(plan: Plan, output: Path, observer: Observer, debug: bool) -> Row | None:
    """The text that forgetting is measured on, made once a study and kept beside its results."""
    study = plan.study
    if plan.task != "causal-lm" or study.forget_data == "none" or (study.from_scratch and study.forget_data is None):
        return None
    path = output / "forgetting.json"
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    observer.stage("sampling text from the base model" if plan.study.forget_data is None else "reading --forget-data")
    task = Task("forgetting", "base", plan.study.seed, None, 0)
    made = spread.alone(run_task, context_of(plan, None, debug), asdict(task), plan.study.threads)
    if made is None or "rows" not in made:
        reason = made["error"] if made else "the process was killed; most often the machine ran out of memory"
        raise WeftError(
            f"the text to measure forgetting on could not be made: {reason} (--forget-data none leaves it out)"
        )
    write_text(path, json.dumps(made))
    return made


@contextlib.contextmanager
def _pool(context: Row, study: Study, workers: int, ray: str | None) -> Iterator[spread.Pool]:
    pool: spread.Pool
    if ray is not None:
        pool = spread.Ray(ray, run_task, context, study.threads)
    else:
        pool = spread.Processes(run_task, context, workers, study.threads)
    try:
        yield pool
    finally:
        pool.close()


def _train_all(plan: Plan, results: Results, pool: spread.Pool, observer: Observer) -> None:
    running: dict[tuple[Any, ...], Task] = {}
    while True:
        for task in pending(plan, results.rows):
            if task.key in running:
                continue
            if task.learning_rate is None and task.method != "base":
                _record(results, plan, task, _without_rate(plan, task, results.rows), observer)
            elif pool.free() > 0:
                running[task.key] = task
                pool.submit(asdict(task))
        observer.progressed(plan, results.rows, list(running.values()))
        if not running:
            return
        fields, row = pool.next()
        task = running.pop(Task(**fields).key)
        _record(results, plan, task, row, observer)


def _without_rate(plan: Plan, task: Task, rows: list[Row]) -> Row:
    errors = [row["error"] for row in rows if row.get("phase") == "grid" and row["method"] == task.method]
    reason = next((error for error in errors if error), "the validation loss was not finite")
    return {**empty_row(plan, task), "error": f"every learning rate of the grid failed; the first: {reason}"}


def _record(results: Results, plan: Plan, task: Task, row: Row | None, observer: Observer) -> None:
    if row is None:
        killed = "the run's process was killed; most often the machine ran out of memory"
        row = {**empty_row(plan, task), "error": killed}
    results.append(row)
    observer.finished(row)


def default_workers(parameters: int, threads: int) -> int:
    """One process a core, as far as memory goes, where there is no GPU; a GPU is not shared."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = 16 * parameters + 1e9  # weights, gradients and two moments in float32; libraries and activations
    return max(1, min(cores // threads, int(psutil.virtual_memory().available / each)))
