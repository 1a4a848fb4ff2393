"""What comparisons found of every adapter, and the choice that follows from it: `weft adapt --method auto`.

`evidence.json` is written by `python docs/generate.py --readme` from the results that lie in docs/results and
benchmarks/results. A study counts where it has most adapters in it, at equal parameters, with learning rates chosen for
each.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from weft.errors import UsageError
from weft.run import adapt

FILE = Path(__file__).with_name("evidence.json")
AUTO = "auto"
STREAM = "stream"
OPPONENT = "peft:lora"  # what times and memories are ratios to: seconds are the machine's


@dataclass(frozen=True)
class Found:
    """What one study found of one method.

    Attributes:
        score: mean over seeds, as the study's metric has it; `spread` their deviation.
        beaten: the share of the other methods that were surely better: 0 for a first place, alone or in a tie.
        trainable: parameters; file_bytes: of what is passed on.
        time, memory: of a training step, as ratios to PEFT's LoRA in the same study; None where not measured.
        forgotten: nats a token that text of the base model's own became less likely, or accuracy lost on earlier tasks.
    """

    score: float
    spread: float | None
    beaten: float
    trainable: int | None = None
    time: float | None = None
    memory: float | None = None
    file_bytes: int | None = None
    forgotten: float | None = None


@dataclass(frozen=True)
class Study:
    """One comparison: what was adapted to what, and what was found of each method, best first.

    Attributes:
        kind: the task as `weft adapt` has it, or "stream".
        metric: "loss" (nats a token), "accuracy".
        about: model and data in words.
    """

    name: str
    kind: str
    metric: str
    about: str
    command: str
    seeds: int
    steps: int | None
    params: int | None
    methods: dict[str, Found]
    references: dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """A method beside the others of its kind of task.

    Attributes:
        beaten, time: over the studies, the mean and the geometric mean.
    """

    name: str
    beaten: float
    time: float
    studies: tuple[str, ...]


@functools.cache
def studies() -> tuple[Study, ...]:
    """Every study that is known to this installation."""
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        Study(**{**each, "methods": {name: Found(**found) for name, found in each["methods"].items()}}) for each in raw
    )


def written(found: Sequence[Study]) -> str:
    """The text of `evidence.json`: a line a method."""
    parts = []
    for study in found:
        head = {key: value for key, value in asdict(study).items() if key != "methods"}
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(asdict(each))}" for name, each in study.methods.items())
        parts.append(json.dumps(head)[:-1] + ',\n  "methods": {\n' + lines + "\n  }}")
    return "[\n " + ",\n ".join(parts) + "\n]\n"


def candidates(kind: str, among: Sequence[Study] | None = None) -> list[Candidate]:
    """The methods that every study of a kind of task has, the one to take first before the others.

    First comes the one that the fewest others surely beat, on average over the studies; where that is equal, the one
    whose step takes the least time, in studies of other kinds where these have measured none.
    """
    every = studies() if among is None else among
    own = [study for study in every if study.kind == kind]
    everywhere = [name for name in own[0].methods if all(name in study.methods for study in own)] if own else []
    made = []
    for name in everywhere:
        found = [study.methods[name] for study in own]
        times = [each.time for each in found if each.time]
        times = times or [each.time for study in every if (each := study.methods.get(name)) and each.time]
        time = geometric_mean(times) if times else float("inf")
        made.append(Candidate(name, fmean(each.beaten for each in found), time, tuple(study.name for study in own)))
    return sorted(made, key=lambda each: (each.beaten, each.time, each.name))


def choose(kind: str, refusal: Callable[[str], str | None]) -> tuple[str, list[str]]:
    """The method to take for a kind of task, and the sentences that say why.

    Args:
        refusal: why a method cannot be taken here, or None.

    Raises UsageError where nothing was measured for such a task, or nothing that was can be taken.
    """
    found = candidates(kind)
    if not found:
        known = ", ".join(dict.fromkeys(study.kind for study in studies()))
        raise UsageError(f"--method auto has no measurements for {kind}, only for {known}; name a method: peft:lora")
    passed: list[str] = []
    for place, candidate in enumerate(found):
        reason = refusal(candidate.name)
        if reason is None:
            return candidate.name, [f"auto: {_why(candidate, found[place:], kind)}", *passed]
        passed.append(f"  passed over {candidate.name}: {reason}")
    raise UsageError(f"--method auto: {passed[0].strip()}, and so on for all {len(found)} that were measured")


def _why(chosen: Candidate, others: Sequence[Candidate], kind: str) -> str:
    level = [each.name for each in others if each.beaten == chosen.beaten]
    count = len(chosen.studies)
    where = f"{count} stud{'y' if count == 1 else 'ies'} of {kind} ({', '.join(chosen.studies)})"
    if not chosen.beaten:
        said = f"no other of {len(others)} methods is surely better in {where}"
    else:
        said = f"on average over {where}, the fewest others are surely better: {chosen.beaten:.0%} of them"
    if len(level) == 1:
        return f"{chosen.name}: {said}"
    takes = "" if chosen.time == float("inf") else f", its step taking {chosen.time:.2f} of {OPPONENT}'s time"
    return f"{chosen.name}: {said}; the fastest of {len(level)} of which that is so{takes}"


def settled(given: dict[str, Any], tasks: str | None, resume: bool | None) -> tuple[dict[str, Any], list[str]]:
    """What was given by key of a run file, with a method in the place of "auto", and the sentences that say why.

    A run or stream that has begun in the output folder keeps the method that it has. Reads the data, and matches
    modules on a model without weights.

    Args:
        tasks: the file of a stream's tasks, if it is one.
        resume: False for a run that starts over.
    """
    if given.get("method") != AUTO:
        return given, []
    common = {option.name for option in adapt.run_options()}
    for key in given:
        if key not in common:
            raise UsageError(f"option {key!r} is one of a method, and --method auto names none: choose the method too")
    if given.get("optimizer"):
        raise UsageError("--method auto chooses an adapter, which has its own optimizer: name the method to give one")
    begun = Path(str(given.get("output") or "")) / adapt.RUN_FILE
    if resume is not False and begun.is_file():
        name = adapt.read_run_file(str(begun)).get("method")
        return {**given, "method": name}, [f"auto: {name}, as the run in {begun.parent} has it"]
    run, rows = _first({**given, "method": OPPONENT}, tasks)

    def refusal(name: str) -> str | None:
        from weft.run.methods import resolve

        try:
            adapt.outline(replace(run, method=resolve(name)), rows)
        except UsageError as error:
            return str(error)
        return None

    name, why = choose(STREAM if tasks else rows.task, refusal)
    return {**given, "method": name}, why


def _first(given: dict[str, Any], tasks: str | None) -> tuple[adapt.Request, Any]:
    """The run that a method is chosen for, of a stream the first, and its rows."""
    from weft.run import stream

    if tasks is not None:
        first = stream.request(given, tasks).tasks[0]
        return first.run, first.rows
    run = adapt.request(given)
    return run, adapt.read_rows(run.options)
