"""What a claim file says, and how its figures are judged: paired intervals over seeds, and a line of the ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Order:
    """That one figure of `measure` is below another (or above it, where `higher`), seed by seed.

    Attributes:
        better: the figure that the claim favours.
        other: the one it is compared with, or a constant.
        higher: whether more is better.
        ratio: compare by the ratio of the two and not by their difference; for losses.
    """

    better: str
    other: str | float
    higher: bool = False
    ratio: bool = False


@dataclass(frozen=True)
class Close:
    """That one figure reaches another: it is not surely behind, or by at most 1 %."""

    figure: str
    other: str
    higher: bool = False


@dataclass(frozen=True)
class Verdict:
    """A word (holds, reversed, tie) and the words that carry the figures."""

    word: str
    words: str


def judge(claim: Order | Close, rows: Sequence[Scores]) -> Verdict:
    """The verdict over the seeds' figures."""
    return _order(claim, rows) if isinstance(claim, Order) else _close(claim, rows)


def _order(claim: Order, rows: Sequence[Scores]) -> Verdict:
    a = np.array([row[claim.better] for row in rows])
    b = np.array([row[claim.other] if isinstance(claim.other, str) else claim.other for row in rows])
    gap = np.log(a) - np.log(b) if claim.ratio else a - b
    low, high = interval(gap)
    sign = -1 if claim.higher else 1
    surely = {(True, False): "holds", (False, True): "reversed"}
    word = surely.get((max(sign * low, sign * high) < 0, min(sign * low, sign * high) > 0), "tie")
    if claim.ratio:
        middle, low, high = (math.exp(value) for value in (gap.mean(), low, high))
        shown = f"{middle:.3g}× ({low:.3g} to {high:.3g})"
    else:
        shown = f"{_signed(gap.mean())} ({_signed(low)} to {_signed(high)})"
    other = f"{claim.other} {_mean(b)}" if isinstance(claim.other, str) else f"{claim.other:g}"
    return Verdict(word, f"{claim.better} {_mean(a)} against {other}: {shown}")


def _close(claim: Close, rows: Sequence[Scores]) -> Verdict:
    a, b = (np.array([row[name] for row in rows]) for name in (claim.figure, claim.other))
    behind = (b - a) * (1 if claim.higher else -1)
    low, high = interval(behind)
    word = "holds" if low <= 0 or behind.mean() <= 0.01 * abs(b.mean()) else "reversed"
    shown = f"{_signed(behind.mean())} ({_signed(low)} to {_signed(high)}) behind"
    return Verdict(word, f"{claim.figure} {_mean(a)} beside {claim.other} {_mean(b)}: {shown}")


def interval(values: np.ndarray) -> tuple[float, float]:
    """The bootstrap 95 % interval of the mean."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.4g}"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")
