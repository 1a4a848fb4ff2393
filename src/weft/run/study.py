"""What a comparison consists of, what is left of it to run, and the file that its results go to line by line.

The state of a study is its `results.jsonl` and nothing else: `pending` reads off the finished rows what can run next,
so that going on after a crash and going on after a finished run are the same thing. No torch in here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import UsageError, WeftError
from weft.files import write_text
from weft.run.budget import Budget, best_offset, extension, first_offsets, learning_rate
from weft.run.ranking import REFERENCES

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Everything that decides the numbers of a comparison; where and how fast it runs is not part of it.

    Attributes:
        options: method → values of its config's fields.
        target_modules: the same for all methods; "all-linear" or names.
        seed: of the splits and the learning-rate grid; final runs use seed + 1 ... seed + `seeds`.
        grid_points, grid_factor: the learning rates tried, around each card's own.
        grid_steps: optimiser steps of a grid's runs; None: as many as final runs have. Fewer cost less and favour high
            learning rates.
        grid_extend: how often a grid may grow when its best point lies on the edge.
        measure_steps, measure_repeats: optimiser steps of a timing run, and how many of them each method gets.
        evaluations: of the validation split in the course of a final run, for its learning curve.
        forget_data: text to measure forgetting on; None: text sampled from the base model, unless that is random;
            "none": not measured.
        generate: prompts of the test split that final runs and the base model answer, for BLEU and ROUGE-L; None: none.
        threads: CPU threads of each run, since their number changes the last bits of a sum.
    """

    model: str
    data: str
    methods: tuple[str, ...]
    task: str = "auto"
    budget: Budget = field(default_factory=Budget)
    seeds: int = 3
    seed: int = 0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    target_modules: str | list[str] = "all-linear"
    references: tuple[str, ...] = REFERENCES
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 256
    bf16: bool = False
    data_options: dict[str, Any] = field(default_factory=dict)
    grid_points: int = 3
    grid_factor: float = 3.0
    grid_extend: int = 3
    grid_steps: int | None = None
    measure_steps: int = 10
    measure_repeats: int = 3
    evaluations: int = 5
    forget_data: str | None = None
    generate: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what no run could serve, in one sentence."""
        if not self.methods:
            raise UsageError("--methods is empty; give for example --methods peft:lora,sora")
        twice = sorted({name for name in self.methods if self.methods.count(name) > 1})
        if twice:
            raise UsageError(f"--methods names {twice[0]!r} twice")
        for name, least in (
            ("seeds", 1),
            ("grid_points", 1),
            ("grid_extend", 0),
            ("measure_repeats", 0),
            ("evaluations", 0),
            ("measure_steps", 2),
            ("batch_size", 1),
            ("gradient_accumulation", 1),
            ("max_length", 2),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for name in ("grid_steps", "generate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if not (self.grid_factor > 1 and math.isfinite(self.grid_factor)):
            raise UsageError(f"--grid-factor must be above 1, not {self.grid_factor:g}")
        strangers = [name for name in self.options if name not in self.methods]
        if strangers:
            raise UsageError(f"--set names {strangers[0]!r}, which is not among --methods {','.join(self.methods)}")

    @property
    def from_scratch(self) -> bool:
        """Whether the base model has random weights."""
        from weft.run.models import from_scratch

        return from_scratch(self.model)

    @property
    def final_seeds(self) -> list[int]:
        """The seeds of the runs that see the test split, none of them the grid's."""
        return [self.seed + 1 + index for index in range(self.seeds)]


@dataclass(frozen=True)
class Entry:
    """One method as it will run: its options with the knob set, its recipe, its number of trainable parameters."""

    method: str
    options: dict[str, Any]
    recipe: dict[str, Any]
    knob: dict[str, Any] | None
    trainable: int


@dataclass(frozen=True)
class Plan:
    """A study made concrete: every method's entry and the steps of each run.

    Attributes:
        steps: optimiser steps of each run.
        task: settled ("auto" was looked up in the data).
        parameters: of the base model.
        notes: sentences for the reader: what was left out, and why.
    """

    study: Study
    entries: tuple[Entry, ...]
    steps: int
    task: str
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def grid_steps(self) -> int:
        """Optimiser steps of a grid's runs."""
        return min(self.study.grid_steps or self.steps, self.steps)

    def entry(self, method: str) -> Entry:
        """The entry of one method."""
        return next(entry for entry in self.entries if entry.method == method)


@dataclass(frozen=True)
class Task:
    """One run. `seed` is the repeat for a timing run; `offset` the place in the learning-rate grid."""

    phase: str
    method: str
    seed: int
    learning_rate: float | None
    steps: int
    offset: int | None = None

    @property
    def key(self) -> tuple[str, str, int, float | None]:
        """What tells its row from the others."""
        return (self.phase, self.method, self.seed, self.learning_rate)


def key_of(row: Mapping[str, Any]) -> tuple[str, str, int, float | None]:
    """The key of the task that a row is the result of."""
    return (row["phase"], row["method"], row["seed"], row["learning_rate"])


def validation_loss(row: Mapping[str, Any]) -> float | None:
    """What the learning rate is chosen by; None for a run that failed. Accuracy has few values, so it is the loss."""
    if row["status"] != "ok" or not row.get("validation"):
        return None
    loss = row["validation"].get("loss")
    return float(loss) if loss is not None and math.isfinite(loss) else None


def grid_of(rows: Iterable[Mapping[str, Any]], method: str) -> dict[int, float | None]:
    """The finished part of a method's learning-rate grid: offset → validation loss (None: failed)."""
    return {
        row["grid_offset"]: validation_loss(row) for row in rows if row["phase"] == "grid" and row["method"] == method
    }


def pending(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> list[Task]:
    """The runs that can start now, given the finished ones: grids, then final runs at the rate that the grid chose.

    Timing runs are not among them (see `timing`), as they must be alone on the machine.
    """
    study, finished = plan.study, [row for row in rows if row.get("kind") == "run"]
    done = {key_of(row) for row in finished}
    tasks: list[Task] = []
    for entry in plan.entries:
        if entry.method == "base":
            tasks.append(Task("reference", "base", study.seed, None, 0))
            continue
        centre = float(entry.recipe["learning_rate"])

        def point(offset: int, method: str = entry.method, centre: float = centre) -> Task:
            rate = learning_rate(centre, study.grid_factor, offset)
            return Task("grid", method, study.seed, rate, plan.grid_steps, offset)

        grid = grid_of(finished, entry.method)
        first = first_offsets(study.grid_points)
        if study.grid_points == 1:
            rate = point(0).learning_rate
            tasks += [Task("final", entry.method, seed, rate, plan.steps) for seed in study.final_seeds]
        elif any(offset not in grid for offset in first):
            tasks += [point(offset) for offset in first]
        elif (further := extension(grid, len(grid) - len(first), study.grid_extend)) is not None:
            tasks.append(point(further))
        else:
            best = best_offset(grid)
            rate = None if best is None else point(best).learning_rate
            tasks += [Task("final", entry.method, seed, rate, plan.steps) for seed in study.final_seeds]
    return [task for task in tasks if task.key not in done]


def timing(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> list[Task]:
    """The timing runs that are left, interleaved (every method once, then every method again)."""
    done = {key_of(row) for row in rows if row.get("kind") == "run"}
    tasks = [
        Task("measure", entry.method, repeat, float(entry.recipe["learning_rate"]), plan.study.measure_steps)
        for repeat in range(plan.study.measure_repeats)
        for entry in plan.entries
        if entry.method != "base"
    ]
    return [task for task in tasks if task.key not in done]


def grid_runs(plan: Plan, rows: Iterable[Mapping[str, Any]], method: str) -> int:
    """How many runs a method's grid has, if it is not extended further."""
    points = plan.study.grid_points
    finished = [row for row in rows if row.get("kind") == "run"]
    return 0 if points == 1 else max(points, len(grid_of(finished, method)))


def expected_runs(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> int:
    """How many runs the study has if no further grid is extended: for progress bars."""
    study, rows = plan.study, list(rows)
    each = study.seeds + study.measure_repeats
    return sum(1 if entry.method == "base" else grid_runs(plan, rows, entry.method) + each for entry in plan.entries)


class Results:
    """The rows of a study, on disk and in memory. One process writes; each row is on disk before the next starts."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path = path
        self.rows = rows
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        _lock(self._file, path)

    @property
    def header(self) -> Row | None:
        """The first line, which says what the study is."""
        return self.rows[0] if self.rows else None

    @property
    def runs(self) -> list[Row]:
        """The finished runs."""
        return [row for row in self.rows if row.get("kind") == "run"]

    def append(self, row: Row) -> None:
        """Write one row and wait until it is on the disk."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            raise WeftError(
                f"could not write {self.path}: {error.strerror}; the finished runs are kept, "
                "and the same command goes on from there"
            ) from error
        self.rows.append(row)

    def replaced(self, rows: list[Row]) -> Results:
        """The same file with other rows, whole or not at all; this one is closed."""
        write_text(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        self.close()
        return Results(self.path, rows)

    def close(self) -> None:
        """Let another process write."""
        os.close(self._file)


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise UsageError(f"another weft compare is writing {path} now; wait for it or give another --output") from None


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of a results file, and the bytes that they take; a last line that a crash has torn does not count."""
    if not path.exists():
        return [], 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows: list[Row] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "kind" not in row:
            raise UsageError(f"{path}, line {number} is not a row of weft compare; give another --output")
        rows.append(row)
    if len(whole) < len(content) and not content[len(whole) :].startswith(b"{"):
        raise UsageError(f"{path} does not end in a row of weft compare; give another --output")
    return rows, len(whole)


def open_results(folder: Path, request: Row, *, retry_failed: bool = False, grows: bool = False) -> Results:
    """The results file of a study in its folder, new or to be continued.

    Args:
        folder: made where missing.
        request: what was asked for and what it runs on; must equal that of the rows which are there.
        retry_failed: drop the rows of failed runs, so that they run again.
        grows: let the request have more methods than the rows that are there.

    Raises:
        UsageError: the folder holds another study, or is not a folder.
    """
    path = folder / "results.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows, length = read_rows(path)
        if rows:
            _same(path.parent, rows[0].get("request") or {}, json.loads(json.dumps(request)), grows)
        results = Results(path, rows)
        if length < path.stat().st_size:
            os.truncate(path, length)
    except OSError as error:
        raise UsageError(f"--output {str(folder)!r} cannot be used: {error.strerror}") from error
    if retry_failed and any(row.get("status") == "failed" for row in rows):
        results = results.replaced([row for row in rows if row.get("status") != "failed"])
    return results


def more_methods(there: Row, asked: Row) -> list[str]:
    """The methods that a request has beyond those of the one that is there; none if it lacks one of these."""
    old, now = (list(request.get("methods") or ()) for request in (there, asked))
    return [name for name in now if name not in old] if set(old) <= set(now) else []


def _same(folder: Path, there: Row, asked: Row, grows: bool) -> None:
    if grows and (more := more_methods(there, asked)):
        options = {name: each for name, each in asked["options"].items() if name not in more}
        asked = {**asked, "methods": there["methods"], "options": options}
    for name in [*there, *(name for name in asked if name not in there)]:
        if there.get(name) != asked.get(name):
            raise UsageError(
                f"{folder} holds a study with {name} {json.dumps(there.get(name))}, and this command has "
                f"{json.dumps(asked.get(name))}; give the same command again or another --output"
            )


def request_of(study: Study, versions: Mapping[str, str]) -> Row:
    """What a continued study must have in common with the first part of it, as JSON."""
    request = json.loads(json.dumps(asdict(study)))
    request["versions"] = dict(versions)
    return dict(request)


def plan_from(header: Row, study: Study) -> Plan:
    """The plan that a results file was started with."""
    plan = header["plan"]
    entries = tuple(Entry(**entry) for entry in plan["entries"])
    return Plan(study, entries, plan["steps"], plan["task"], plan["parameters"], tuple(plan["notes"]))


def plan_json(plan: Plan) -> Row:
    """The plan as `plan_from` reads it."""
    return {
        "entries": [asdict(entry) for entry in plan.entries],
        "steps": plan.steps,
        "task": plan.task,
        "parameters": plan.parameters,
        "notes": list(plan.notes),
    }


def study_from(request: Row) -> Study:
    """The study that `request_of` described."""
    fields = {name: value for name, value in request.items() if name != "versions"}
    fields["budget"] = Budget(**fields["budget"])
    fields["methods"], fields["references"] = tuple(fields["methods"]), tuple(fields["references"])
    return Study(**fields)
