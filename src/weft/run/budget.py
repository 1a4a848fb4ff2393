"""What a run may cost, and how it is met: parameters by a method's knob, steps, minutes, learning-rate grids.

Nothing here touches a model: counting is a function that the caller passes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from weft.errors import UsageError, nearest

DEFAULT_STEPS = 300
CLOSE = 0.1  # a count within 10 % of the budget has met it, though the knob may have no value above

_SUFFIXES = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


@dataclass(frozen=True)
class Budget:
    """What each method gets: trainable parameters, optimiser steps, minutes of training a run. None: not limited."""

    params: int | None = None
    steps: int | None = None
    minutes: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The parts that were given, for `results.jsonl`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _number(part: str, name: str, text: str) -> float:
    cleaned = text.strip().lower().replace("_", "")
    factor = _SUFFIXES.get(cleaned[-1:], 1)
    try:
        value = float(cleaned[:-1] if factor > 1 else cleaned) * factor
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"--budget: {part!r} is not a positive number; write {name}=300 or {name}=1.5k")
    return value


def parse_budget(text: str) -> Budget:
    """`params=50k,steps=300,minutes=5`, in any order and each at most once.

    >>> parse_budget("params=50k,steps=300")
    Budget(params=50000, steps=300, minutes=None)
    """
    names = ("params", "steps", "minutes")
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(f"--budget: {part.strip()!r} is not NAME=NUMBER; write for example params=50k,steps=300")
        if name not in names:
            raise UsageError(f"--budget: unknown part {name!r}: {nearest(name, names)}")
        if name in found:
            raise UsageError(f"--budget: {name!r} is given twice")
        found[name] = _number(part.strip(), name, value)
        if name != "minutes" and found[name] != int(found[name]):
            raise UsageError(f"--budget: {part.strip()!r} is not a whole number of {name}")
    params, steps = (int(found[name]) if name in found else None for name in ("params", "steps"))
    return Budget(params, steps, found.get("minutes"))


def steps_of(budget: Budget, seconds_per_step: float | None) -> int:
    """Optimiser steps of each run: as given, and no more than the minutes allow the slowest method.

    Args:
        budget: minutes are those of one run's training.
        seconds_per_step: of the slowest method, measured; needed for a budget in minutes only.
    """
    if budget.minutes is None or seconds_per_step is None:
        return budget.steps or DEFAULT_STEPS
    affordable = int(budget.minutes * 60 / seconds_per_step)
    if affordable < 1:
        raise UsageError(
            f"minutes={budget.minutes:g} is less than one step of the slowest method "
            f"({seconds_per_step:.3g} s); give more minutes or a smaller --batch-size"
        )
    return min(affordable, budget.steps) if budget.steps else affordable


@dataclass(frozen=True)
class Knob:
    """Where a method's knob was set. `value` None: the method has no knob that can be turned.

    Attributes:
        name: the config's field.
        count: trainable parameters at that value.
        unreachable: no value meets the budget; the nearest one is taken all the same.
    """

    name: str | None
    value: int | None
    count: int
    unreachable: bool


def solve_knob(name: str | None, count: Callable[[int], int], budget: int, *, limit: int = 1 << 24) -> Knob:
    """The knob value whose parameter count comes nearest to the budget from below.

    Counts may rise with the knob (a rank) or fall (RandLoRA's basis rank). The budget is met where neighbouring values
    lie on both sides of it, or the nearest count is within 10 %; else it is out of reach.

    Args:
        name: of the config field, for the result.
        count: trainable parameters at a knob value; raises UsageError where the value is not allowed.
        budget: parameters that the method may train.
        limit: largest knob value to try.

    Raises:
        UsageError: no value is allowed at all (the reason that `count` gave for the first).
    """
    known: dict[int, int | None] = {}
    refusal: list[UsageError] = []

    def at(value: int) -> int | None:
        if value not in known:
            try:
                known[value] = count(value)
            except UsageError as error:
                known[value] = None
                refusal.append(error)
        return known[value]

    def straddles(low: int, high: int) -> bool:
        a, b = at(low), at(high)
        return a is not None and b is not None and (a <= budget) != (b <= budget)

    def leads_away(probes: list[int]) -> bool:
        """Whether larger values can only be further from the budget, or change nothing."""
        counts = [known[value] or 0 for value in probes[-3:]]
        before, now = counts[-2:]
        return now > before > budget or now < before <= budget or (len(counts) == 3 and len(set(counts)) == 1)

    def near(low: int, high: int) -> int | None:
        """An allowed value strictly between, the middle one if possible (a knob may allow even values only)."""
        middle = (low + high) // 2
        for away in range(min(64, high - low)):
            for value in (middle - away, middle + away):
                if low < value < high and at(value) is not None:
                    return value
        return None

    # Powers of two until the budget lies between two of them, or nothing larger is allowed.
    probes: list[int] = []
    value, refused = 1, 0
    while value <= limit and refused < 3:
        if at(value) is None:
            refused += 1 if probes else 0
        else:
            refused = 0
            probes.append(value)
            if len(probes) > 1 and (straddles(probes[-2], probes[-1]) or leads_away(probes)):
                break
        value *= 2
    if not probes:
        raise refusal[0] if refusal else UsageError(f"no value of {name!r} is allowed")
    bracketed = len(probes) > 1 and straddles(probes[-2], probes[-1])
    if not bracketed and refused:  # the largest allowed value lies behind the last power of two
        low, high = probes[-1], probes[-1] * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if at(middle) is not None else (low, middle)
        probes.append(low)
        bracketed = low != probes[-2] and straddles(probes[-2], low)
    if bracketed:
        low, high = probes[-2], probes[-1]
        while (middle_value := near(low, high)) is not None:
            low, high = (low, middle_value) if straddles(low, middle_value) else (middle_value, high)
    allowed = {value: counted for value, counted in known.items() if counted is not None}
    within = {value: counted for value, counted in allowed.items() if counted <= budget}
    if within:
        best = min(within, key=lambda value: (-within[value], value))
    else:
        best = min(allowed, key=lambda value: (allowed[value], value))
    close = abs(allowed[best] - budget) <= CLOSE * budget
    return Knob(name, best, allowed[best], unreachable=not (bracketed or close))


def unturnable(count: int, budget: int) -> Knob:
    """The verdict on a method without a knob: it has the count that it has."""
    return Knob(None, None, count, unreachable=abs(count - budget) > CLOSE * budget)


def learning_rate(centre: float, factor: float, offset: int) -> float:
    """The point of a log-spaced grid `offset` places from its centre, rounded to six digits so that it prints whole."""
    return float(f"{centre * factor**offset:.6g}")


def first_offsets(points: int) -> list[int]:
    """The grid's first places around 0; an even number has its extra point below.

    >>> first_offsets(3), first_offsets(4)
    ([-1, 0, 1], [-2, -1, 0, 1])
    """
    return list(range(-(points // 2), points - points // 2))


def extension(losses: dict[int, float | None], extended: int, limit: int) -> int | None:
    """The next place of a grid whose best point lies on its edge, else None.

    Args:
        losses: offset → validation loss, None for a run that failed (it counts as the worst).
        extended: how often this grid has been extended.
        limit: how often it may be.
    """
    best = best_offset(losses)
    if best is None or extended >= limit:
        return None
    if best == max(losses):
        return best + 1
    return best - 1 if best == min(losses) else None


def best_offset(losses: dict[int, float | None]) -> int | None:
    """The place with the lowest loss, the one nearer to the card's rate (then the smaller) at equal loss."""
    finished = {offset: loss for offset, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finished, key=lambda offset: (finished[offset], abs(offset), offset)) if finished else None


def share_steps(total: int, methods: int, seeds: int, grid: int, measured: int) -> int:
    """The steps of a final run, from a limit on all optimiser steps of a study.

    Args:
        total: the limit.
        methods: how many methods share it.
        seeds: final runs of each.
        grid: steps that each method's learning-rate grid may take at most, extensions included.
        measured: steps of each method's timing runs.
    """
    if methods < 1 or seeds < 1:
        raise UsageError("no run to share steps between")
    left = total // methods - grid - measured
    if left < seeds:
        needed = methods * (grid + measured + seeds)
        raise UsageError(
            f"{total} steps are too few for {methods} methods with {seeds} runs each; {needed} is the least"
        )
    return left // seeds
