"""`results.jsonl` → what the tables and figures show of it: one `Line` a method, best first.

Nothing here needs the study to be finished: every field of a row may be missing or null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from weft.errors import UsageError, WeftError
from weft.report import quantities
from weft.report.quantities import finite, listing, plural, spread
from weft.run.models import from_scratch
from weft.run.ranking import REFERENCES, Ranking, rank_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """What the test split measures.

    Attributes:
        key: of the `test` and `validation` entries, "loss", "accuracy", "dice" or "auc".
        name: as a heading writes it.
        unit, factor, digits: how a value is written: value · factor, with so many decimals.
        higher_is_better: the direction.
    """

    key: str
    name: str
    unit: str
    factor: float
    digits: int
    higher_is_better: bool

    def show(self, mean: float | None, deviation: float | None = None) -> str:
        """A value, with its deviation over seeds if there is one, and its unit."""
        scale = self.factor
        return spread(
            None if mean is None else mean * scale,
            None if deviation is None else deviation * scale,
            self.digits,
            self.unit if self.unit == "%" else "",
        )


LOSS = Metric("loss", "Test loss", "nats per token", 1.0, 3, False)
ACCURACY = Metric("accuracy", "Test accuracy", "%", 100.0, 1, True)
AUC = Metric("auc", "Test AUC", "", 1.0, 4, True)
DICE = Metric("dice", "Test Dice", "%", 100.0, 1, True)
ERROR = Metric("loss", "Test error", "mean square", 1.0, 4, False)


def headline(found: Iterable[Row]) -> Metric:
    """What is shown of metrics: Dice, AUC or accuracy where they have it, else the loss, of images drawn or tokens."""
    keys = set().union(*found)
    loss = ERROR if "rows" in keys else LOSS
    return next((metric for metric in (DICE, AUC, ACCURACY) if metric.key in keys), loss)


@dataclass
class Line:
    """Everything measured of one method.

    Attributes:
        name: the method; `reference` is True for base, head and full.
        index: its place in the study, from which colour and marker follow.
        rank, tied, collapsed, low, high: from the ranking; None or empty where it was not ranked.
        mean, spread: of the test metric over seeds.
        values: seed → test metric.
        perplexity: mean over seeds.
        trainable, step_seconds, peak_bytes, file_bytes, optimizer_bytes: the costs; means over the runs that measured
            them.
        knob, recipe, options: as its runs recorded them.
        learning_rate: chosen for the final runs, or the best so far; `at_edge` if the grid ended there.
        forgetting: seed → (before, after).
        generation: seed → (BLEU, ROUGE-L), both 0 to 100, of the runs that generated.
        curves: seed → the points of the training curve.
        grid: (learning rate, seed, validation loss or None where the run failed).
        ranks: module → rank.
        done, failed: finished and failed runs, of any phase.
    """

    name: str
    reference: bool
    index: int
    rank: int | None = None
    tied: tuple[str, ...] = ()
    collapsed: bool = False
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    spread: float | None = None
    values: dict[int, float] = field(default_factory=dict)
    perplexity: float | None = None
    trainable: float | None = None
    step_seconds: float | None = None
    peak_bytes: float | None = None
    file_bytes: float | None = None
    optimizer_bytes: float | None = None
    knob: Row | None = None
    recipe: Row = field(default_factory=dict)
    options: Row = field(default_factory=dict)
    learning_rate: float | None = None
    at_edge: bool = False
    forgetting: dict[int, tuple[float, float]] = field(default_factory=dict)
    generation: dict[int, tuple[float, float]] = field(default_factory=dict)
    curves: dict[int, list[Row]] = field(default_factory=dict)
    grid: list[tuple[float, int, float | None]] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    done: int = 0
    failed: int = 0

    @property
    def forgotten(self) -> float | None:
        """Mean over seeds of the loss on the forgetting text, after minus before."""
        return _mean(after - before for before, after in self.forgetting.values())

    @property
    def elsewhere(self) -> float | None:
        """Mean over seeds of the loss on the forgetting text after training."""
        return _mean(after for _, after in self.forgetting.values())

    @property
    def bleu(self) -> str:
        """BLEU of what it wrote, mean ± deviation over seeds."""
        return self._written(0)

    @property
    def rouge_l(self) -> str:
        """ROUGE-L of what it wrote, mean ± deviation over seeds."""
        return self._written(1)

    def _written(self, place: int) -> str:
        values = [scores[place] for scores in self.generation.values()]
        return spread(_mean(values), stdev(values) if len(values) > 1 else None, 1)

    @property
    def state(self) -> str:
        """How far it is, for a method without a test score."""
        return "no final run yet" if self.done else "failed" if self.failed else "not started"


@dataclass
class Study:
    """A comparison as far as it got.

    Attributes:
        head: the study row itself.
        metric: what the test split measures.
        lines: the methods, best first; then `references`.
        failures: the failed runs' rows.
        runs: every run's row, in the order of the file.
        ranking: with its pairs.
        expected: the number of final runs that the study wants; `finished` of them ended, well or not.
        notes: what a reader must know of the file itself, one sentence each.
    """

    head: Row
    metric: Metric
    lines: list[Line]
    references: list[Line]
    failures: list[Row]
    runs: list[Row]
    ranking: Ranking
    expected: int
    finished: int
    notes: list[str]

    @property
    def from_scratch(self) -> bool:
        """Whether training began at random weights, which have nothing to forget."""
        return from_scratch(str(self.head.get("model")))

    def other_text(self, line: Line) -> str:
        """A line on the forgetting text: how its loss changed, or the loss where there was nothing to forget."""
        return quantities.number(line.elsewhere) if self.from_scratch else quantities.change(line.forgotten, 3)

    @property
    def stepped(self) -> bool:
        """Whether methods name their optimisers, so that the state of those is of interest."""
        return any("@" in line.name and line.optimizer_bytes for line in self.lines)

    @property
    def verdict(self) -> str:
        """Who won, in one sentence."""
        standings = [each for each in self.ranking.standings if not each.collapsed]
        show = self.metric.show
        what = f"a {self.metric.name.lower()} of"
        unit = "" if self.metric.unit == "%" else f" {self.metric.unit}"
        if not self.ranking.standings:
            return f"No ranking yet: {_progress(self)}."
        if not standings:
            return "No method can be recommended: each of them at least doubled the base model's perplexity."
        best = standings[0]
        reached = f"{show(best.mean, best.spread)}{unit}"
        if len(self.ranking.standings) == 1:
            return f"{best.method} reached {what} {reached}; no other method has finished to rank it against."
        so_far = f", with {self.finished} of {self.expected} final runs in" if self.finished < self.expected else ""
        tied = [each for each in standings if each.rank == best.rank]  # one rank: tied with each other
        if len(tied) == 1:
            return f"{best.method} ranks first{so_far}: {what} {reached}."
        who = [each.method for each in tied]
        named = f"{len(who)} methods, {best.method} with the best mean," if len(who) > 4 else listing(who)
        return f"{named} tie for first{so_far}: {show(best.mean)} to {show(tied[-1].mean)}{unit}."

    @property
    def against_base(self) -> str | None:
        """What adapting brought, by the best method and over the base model."""
        base = next((line for line in self.references if line.name == "base"), None)
        best = next((line for line in self.lines if line.rank is not None and not line.collapsed), None)
        if base is None or best is None or base.mean is None or best.mean is None:
            return None
        if base.perplexity and best.perplexity:
            ratio = base.perplexity / best.perplexity
            if self.from_scratch:
                return None
            return (
                f"The base model's perplexity of {base.perplexity:.4g} became {best.perplexity:.4g} with {best.name}: "
                f"lower by a factor of {ratio:.2f}."
            )
        return f"The base model, not adapted, is at {self.metric.show(base.mean)}."


def read(results: Path) -> Study:
    """Read and digest a study.

    Args:
        results: `results.jsonl`, or the folder that holds it.

    Raises:
        UsageError: there is no such file, or it is no study.
    """
    return _digest(*parse(results))


def parse(results: Path) -> tuple[Row, list[Row], list[str]]:
    """The study row of a results file, its runs' rows, and what a reader must know of the file.

    Raises UsageError where there is no such file, or it is no study.
    """
    path = results / "results.jsonl" if results.is_dir() else results
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"cannot read the results {str(path)!r}: {error.strerror or error}") from error
    head, runs, notes = _parse(text)
    if head is None:
        raise UsageError(f"{str(path)!r} holds no comparison: the line with kind 'study' is missing")
    return head, runs, notes


def _parse(text: str) -> tuple[Row | None, list[Row], list[str]]:
    head: Row | None = None
    runs: list[Row] = []
    broken = 0
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            broken += 1
        elif row.get("kind") == "study":
            head = row  # a resumed study may write its row again: the latest describes what is running
        elif row.get("kind") == "run" and row.get("method"):
            runs.append(row)
    notes = [f"{plural(broken, 'line')} of the results could not be read and was left out."] if broken else []
    return head, runs, notes


def _latest(runs: list[Row]) -> list[Row]:
    """One row a run: a resumed study may try again what failed, and the later row counts."""
    latest: dict[tuple[Any, ...], Row] = {}
    for row in runs:
        latest[row.get("phase"), row["method"], row.get("seed"), row.get("learning_rate")] = row
    return list(latest.values())


def _digest(head: Row, runs: list[Row], notes: list[str]) -> Study:
    runs = _latest(runs)
    plan = head.get("plan") or {}
    notes = [*map(str, plan.get("notes") or []), *notes]
    planned = {entry.get("method"): entry for entry in plan.get("entries") or []}
    sound = [row for row in runs if _ok(row)]
    metric = headline(row.get("test") or row.get("validation") or {} for row in sound)
    seeds = head.get("seeds") or []
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    names = [each if isinstance(each, str) else str(each.get("name")) for each in head.get("methods") or []]
    names += [row["method"] for row in runs]
    names = list(dict.fromkeys(names))
    ranked = [row for row in sound if finite((row.get("test") or {}).get(metric.key)) is not None]
    try:
        ranking = rank_rows(ranked)
    except WeftError as error:
        ranking = Ranking((), ())
        notes.append(f"The methods could not be ranked: {error}.")
    if len(seeds) == 1 or (ranking.standings and all(each.seeds == 1 for each in ranking.standings)):
        notes.append("One seed: what another seed would change is not in these numbers.")

    methods = [name for name in names if name not in REFERENCES]
    lines = [_line(name, index, runs, metric, planned.get(name)) for index, name in enumerate(methods)]
    present = [name for name in REFERENCES if name in names]
    references = [_line(name, index, runs, metric, planned.get(name)) for index, name in enumerate(present)]
    by_name = {line.name: line for line in lines}
    for standing in ranking.standings:
        line = by_name[standing.method]
        line.rank, line.tied, line.collapsed = standing.rank, standing.tied, standing.collapsed
        line.mean, line.spread, line.low, line.high = standing.mean, standing.spread, standing.low, standing.high
    order = {standing.method: place for place, standing in enumerate(ranking.standings)}
    sign = -1 if metric.higher_is_better else 1
    lines.sort(key=lambda line: (order.get(line.name, len(order)), line.mean is None, sign * (line.mean or 0)))

    finals = {(row["method"], row.get("seed")) for row in runs if row.get("phase") == "final"}
    finished = sum(1 for name, _ in finals if name not in REFERENCES)
    expected = max(len(methods) * len(seeds), finished)
    return Study(
        head=head,
        metric=metric,
        lines=lines,
        references=references,
        failures=[row for row in runs if row.get("status") == "failed"],
        runs=runs,
        ranking=ranking,
        expected=expected,
        finished=finished,
        notes=notes,
    )


def _ok(row: Row) -> bool:
    return row.get("status", "ok") == "ok"


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in map(finite, values) if value is not None]
    return fmean(known) if known else None


def _line(name: str, index: int, runs: list[Row], metric: Metric, planned: Row | None) -> Line:
    rows = [row for row in runs if row["method"] == name]
    sound = [row for row in rows if _ok(row)]
    grid = [row for row in rows if row.get("phase") == "grid"]
    measured = [row for row in sound if row.get("phase") == "measure"] or sound  # the serial pass, where there was one
    tested = [row for row in sound if finite((row.get("test") or {}).get(metric.key)) is not None]
    # the final runs say best what was done; before there are any, whichever row knows
    known = [row for row in sound if row.get("phase") in ("final", "reference")] + sound[::-1] + rows[::-1]
    known += [planned] if planned else []

    def first(key: str) -> Any:
        return next((row[key] for row in known if row.get(key)), None)

    line = Line(
        name=name,
        reference=name in REFERENCES,
        index=index,
        values={_seed(row): float(row["test"][metric.key]) for row in tested},
        perplexity=_mean((row["test"] or {}).get("perplexity") for row in tested),
        trainable=finite(next((row["trainable"] for row in known if row.get("trainable") is not None), None)),
        step_seconds=_mean(row.get("step_seconds") for row in measured),
        peak_bytes=_mean(row.get("peak_bytes") for row in measured),
        file_bytes=_mean(row.get("file_bytes") for row in sound),
        optimizer_bytes=_mean(row.get("optimizer_bytes") for row in sound),
        knob=first("knob"),
        recipe=first("recipe") or {},
        options=first("options") or {},
        ranks={str(module): rank for module, rank in (first("ranks") or {}).items() if finite(rank) is not None},
        done=len(sound),
        failed=len(rows) - len(sound),
    )
    line.mean = _mean(line.values.values())
    line.spread = stdev(line.values.values()) if len(line.values) > 1 else None
    for row in sound:
        before, after = (finite((row.get("forgetting") or {}).get(key)) for key in ("before", "after"))
        if before is not None and after is not None:
            line.forgetting[_seed(row)] = (before, after)
        bleu, rouge_l = (finite((row.get("generation") or {}).get(key)) for key in ("bleu", "rouge_l"))
        if bleu is not None and rouge_l is not None:
            line.generation[_seed(row)] = (bleu, rouge_l)
        if row.get("phase") in ("final", "reference") and row.get("curve"):
            line.curves[_seed(row)] = [point for point in row["curve"] if finite(point.get("step")) is not None]
    for row in grid:
        rate = finite(row.get("learning_rate"))
        if rate is not None and rate > 0:
            score = finite((row.get("validation") or {}).get("loss")) if _ok(row) else None
            line.grid.append((rate, _seed(row), score))
    line.grid.sort(key=lambda each: each[:2])
    _choose(line, tested)
    return line


def _seed(row: Row) -> int:
    seed = row.get("seed")
    return seed if isinstance(seed, int) else 0


def _choose(line: Line, tested: list[Row]) -> None:
    """The learning rate of the final runs, else the one of the lowest validation loss so far."""
    finals = [finite(row.get("learning_rate")) for row in tested if row.get("phase") in ("final", "reference")]
    rates = sorted({rate for rate, _, _ in line.grid})
    scores = {rate: _mean(score for each, _, score in line.grid if each == rate) for rate in rates}
    known = {rate: score for rate, score in scores.items() if score is not None}
    if finals and finals[0]:
        line.learning_rate = finals[0]
    elif known:
        line.learning_rate = min(known, key=lambda rate: known[rate])
    line.at_edge = len(rates) > 1 and line.learning_rate in (rates[0], rates[-1])


def _progress(study: Study) -> str:
    done = sum(1 for row in study.runs if _ok(row))
    failed = len(study.failures)
    if not study.runs:
        return "no run has ended"
    if not done:
        return f"all {failed} runs so far failed" if failed > 1 else "the only run so far failed"
    said = f"{plural(done, 'run')} finished" + (f" and {failed} failed" if failed else "")
    return f"{said}, none of them a final run with its test score"
