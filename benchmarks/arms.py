"""Arms of a study beside one another: each with its own learning rate, over seeds, one row of a file for every run.

A run is one arm on one problem at one rate with one seed. Rates are centre·FACTOR^k. Each arm tries k = −1, 0, 1 with
the first seed and, where the best lies at an edge, one beyond it, EXTENSIONS times at most; the best on validation data
is then run with every seed, and these are tested. What is in the file is not run again: a study that was killed goes on
where it stopped.

A tested run's row has its scores and, of each, DRAWS values under a bootstrap over its test rows. The rows drawn follow
from the seed alone, so that draws of two arms are paired; a draw of their difference is a draw of seeds as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from weft.files import write_text
from weft.run.spread import Function, processes

Row = dict[str, Any]

FACTOR, EXTENSIONS = math.sqrt(10), 3
DRAWS = 500
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        path: the file of rows.
        problems, arms: their names; every arm runs on every problem.
        seeds: how many.
        centre: the learning rate in the middle of the grid.
        steps: of a run that tries a rate, and of one that is tested: "rate", "test". Rows of other lengths are of
            another study.
        still: arms that learn nothing, for which no rate is tried.
    """

    path: Path
    problems: Sequence[str]
    arms: Sequence[str]
    seeds: int
    centre: float
    steps: Mapping[str, int]
    still: Collection[str] = ()

    def rows(self) -> list[Row]:
        """The runs in the file that are of this study."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [row for row in map(json.loads, lines) if row["steps"] == self.steps[row["phase"]]]

    def due(self, rows: Iterable[Row]) -> list[Row]:
        """The runs that can be made now."""
        rows, jobs = list(rows), []
        for problem, arm in product(self.problems, self.arms):
            mine = [row for row in rows if (row["problem"], row["arm"]) == (problem, arm)]
            tried = {row["power"]: row["validation"] for row in mine if row["phase"] == "rate"}
            done = {row["seed"] for row in mine if row["phase"] == "test"}
            still = arm in self.still
            missing = [] if still else untried(tried)
            runs = [("rate", power, 0) for power in missing]
            if not missing:
                runs = [("test", 0 if still else best(tried), seed) for seed in range(self.seeds) if seed not in done]
            for phase, power, seed in runs:
                rate = float(f"{self.centre * FACTOR**power:.4g}")
                job = {"problem": problem, "arm": arm, "phase": phase, "power": power, "rate": rate, "seed": seed}
                jobs.append({**job, "steps": self.steps[phase]})
        return jobs

    def run(self, measure: Function, context: Row, workers: int) -> None:
        """Make every run that is not in the file, in processes of one thread each."""
        rows, running = self.rows(), []
        with processes(measure, context, workers, threads=1) as pool:
            while True:
                waiting = [job for job in self.due(rows) if job not in running]
                for job in waiting[: pool.free()]:
                    pool.submit(job)
                    running.append(job)
                if not running:
                    return
                job, row = pool.next()
                running.remove(job)
                name = f"{job['problem']}: {job['arm']}, {job['phase']}, {job['rate']:g}, seed {job['seed']}"
                if row is None:
                    raise SystemExit(f"{name}: its process ended; the same command goes on")
                rows.append({**job, **row})
                self.write(rows)
                shown = ", ".join(f"{key} {value:.4g}" for key, value in row.get("scores", {}).items())
                print(f"{name}: validation {row['validation']}, {shown or 'no test'}, {row['seconds']} s", flush=True)

    def write(self, rows: Iterable[Row]) -> None:
        """All rows of this study and what else the file holds, whole or not at all."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        others = [row for row in map(json.loads, lines) if row["steps"] != self.steps[row["phase"]]]
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (*others, *rows)))

    def tested(self) -> dict[tuple[str, str], list[Row]]:
        """The tested runs of every problem and arm, by seed."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows(), key=lambda row: row["seed"]):
            if row["phase"] == "test":
                found.setdefault((row["problem"], row["arm"]), []).append(row)
        return found


def best(tried: Mapping[int, float | None]) -> int:
    """The power with the lowest validation loss; None is one that is not finite."""
    return min(tried, key=lambda power: math.inf if tried[power] is None else tried[power])


def untried(tried: Mapping[int, float | None]) -> list[int]:
    """The powers that must be tried before one is best."""
    missing = [power for power in (-1, 0, 1) if power not in tried]
    if missing or len(tried) == 3 + EXTENSIONS:
        return missing
    return {min(tried): [min(tried) - 1], max(tried): [max(tried) + 1]}.get(best(tried), [])


def counts(rows: int, seed: int) -> np.ndarray:
    """How often each of the test rows is in each draw: DRAWS × rows."""
    picked = np.random.default_rng([rows, seed]).integers(rows, size=(DRAWS, rows))
    return np.stack([np.bincount(each, minlength=rows) for each in picked])


def drawn(score: Callable[[np.ndarray], float], draws: np.ndarray) -> list[float]:
    """A score, a function of how often each row counts, in every draw."""
    return [float(f"{score(each):.5g}") for each in draws]


def finite(value: float) -> float | None:
    """What a row says of a loss."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# --- verdicts ---------------------------------------------------------------------------------------------------------


def gap(one: Sequence[Row], other: Sequence[Row], score: str) -> tuple[float, float, float]:
    """How far one arm is above another in a score, on the seeds that both have, and the interval of 95 %."""
    pairs = [(a, b) for a in one for b in other if a["seed"] == b["seed"]]
    each = np.array([np.subtract(a["draws"][score], b["draws"][score]) for a, b in pairs])
    picked = np.random.default_rng(0).integers(len(each), size=each.shape)
    low, high = np.quantile(each[picked, np.arange(DRAWS)].mean(0), (0.025, 0.975))
    return float(np.mean([a["scores"][score] - b["scores"][score] for a, b in pairs])), float(low), float(high)


def told(middle: float, low: float, high: float) -> str:
    """A difference with its interval."""
    return f"{middle:+.3g} ({low:+.3g} to {high:+.3g})".replace("-", "−")


def order(one: Sequence[Row], other: Sequence[Row], score: str, higher: bool = True) -> tuple[str, str]:
    """Whether the first is better: holds, reversed or tie; and the difference with its interval."""
    middle, low, high = gap(one, other, score)
    shown = told(middle, low, high)
    if not math.isfinite(low + high):
        return "collapsed", shown
    ends = (low, high) if higher else (-high, -low)
    return "holds" if ends[0] > 0 else "reversed" if ends[1] < 0 else "tie", shown


def orders(
    tested: Mapping[tuple[str, str], Sequence[Row]], pairs: Collection[tuple[str, str]], score: str
) -> Iterator[tuple[str, str, str, str, str]]:
    """Of each problem and pair of arms that are tested on it: both, and which is better; higher scores are."""
    for problem in dict.fromkeys(problem for problem, _ in tested):
        for one, other in pairs:
            if (problem, one) in tested and (problem, other) in tested:
                yield problem, one, other, *order(tested[problem, one], tested[problem, other], score)


def within(one: Sequence[Row], other: Sequence[Row], score: str, margin: float = 0.01) -> tuple[str, str]:
    """Whether the first is at most `margin` below the other; and the difference with its interval."""
    middle, low, high = gap(one, other, score)
    word = "holds" if low > -margin else "reversed" if high < -margin else "tie"
    return word, told(middle, low, high)


def close(one: Sequence[Row], other: Sequence[Row], score: str, higher: bool = True) -> tuple[str, str]:
    """Whether the first reaches the second, to two deviations over its seeds or 1 %: holds or reversed; and the gap."""
    a, b = (np.array([row["scores"][score] for row in rows]) for rows in (one, other))
    behind = (b.mean() - a.mean()) * (1 if higher else -1)
    allowed = max(2 * b.std(ddof=1) if len(b) > 1 else 0, 0.01 * abs(b.mean()))
    word = "holds" if behind <= allowed else "reversed"
    return word, f"{behind:+.3g} behind, {allowed:.3g} allowed".replace("-", "−")


def collapsed(mine: Mapping[str, Sequence[Row]], arm: str, whole: str, score: str) -> bool:
    """Whether an arm has twice the whole model's perplexity, a loss of ln 2 more; not where that is not there."""
    if whole not in mine:
        return False
    loss, reference = (np.mean([row["scores"][score] for row in mine[name]]) for name in (arm, whole))
    return bool(loss > reference + math.log(2))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    for cells in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(cells)} |"


def mean(rows: Sequence[Row], score: str, digits: int) -> str:
    """A score over seeds: its mean and deviation."""
    values = np.array([row["scores"][score] for row in rows])
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"
