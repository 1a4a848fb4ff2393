"""`weft compare --pillar compress`: every method at every share of the bits, one row a point.

First the dense model, then the points, spread over workers; the points of one method follow one another, since they
share what the method found out about each layer. Then the speeds, one at a time on an otherwise idle machine. What is
left to do is read off the finished rows, as in the comparison of adapters. No torch in here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from weft import registry
from weft.errors import UsageError, nearest
from weft.run import spread
from weft.run.compare import commit, default_workers, hardware, versions
from weft.run.ranking import Ranking, rank
from weft.run.study import Results, Row, open_results, read_rows, request_of

PILLAR = "compress"
COLLAPSED = math.log(2)  # nats a token: twice the dense model's perplexity
TRAINED = "+train"  # behind a method's name: trained after it is made
DENSE = "dense"  # the original model, in rows and figures


@dataclass(frozen=True)
class Study:
    """Everything that decides the numbers; where and how fast it runs is not part of it.

    Attributes:
        data: its training split calibrates.
        methods: names; one that is followed by TRAINED learns by what the method learns by, or by the task alone.
        keeps: shares of the targeted matrices' bits, descending. What a method that has no `keep` shall read of them.
        test_data: text for the perplexity; None: the test split of `data`, or `test_fraction` of its rows, held out.
        data2: a second corpus for it, of which no row calibrates.
        options: method → values of its config's fields.
        train: how those are trained that are, as `weft compress --train` takes it; None: by the method's default.
        include, exclude: the matrices, for all methods alike.
        samples, max_length, batch_size: calibration sequences, tokens of these and of test rows, rows at once.
        rows: of each test corpus only as many, at even distances; None for all.
        seed, split_seed: draw the calibration sequences, and the rows that are held out.
        speed: whether the speeds are measured.
        threads: CPU threads of each process, since their number changes the last bits of a sum.
    """

    model: str
    data: str
    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    test_data: str | None = None
    test_fraction: float = 0.1
    data2: str | None = None
    columns: dict[str, str] | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: str | None = None
    include: str | None = None
    exclude: str | None = None
    samples: int = 128
    max_length: int = 256
    batch_size: int = 8
    rows: int | None = None
    seed: int = 0
    split_seed: int = 0
    bf16: bool = False
    speed: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what no point could serve, in one sentence."""
        known = registry.cards(PILLAR)
        if not self.methods:
            raise UsageError("--methods is empty; give for example --methods svd,svd_llm")
        for name in self.methods:
            if slug_of(name) not in known:
                raise UsageError(f"--methods: there is no compression method {name!r}: {nearest(name, known)}")
        if self.train is not None and not self.trains:
            raise UsageError(f"--train is for methods that are trained, and none of --methods ends in {TRAINED}")
        if not self.keeps:
            raise UsageError("--keep is empty; give for example --keep 0.9,0.7,0.5")
        for keep in self.keeps:
            if not 0 < keep <= 1:
                raise UsageError(f"--keep {keep:g}: a share of the stored bits is above 0 and at most 1")
        for name, each in (("--methods", self.methods), ("--keep", self.keeps)):
            twice = [value for value in each if each.count(value) > 1]
            if twice:
                raise UsageError(f"{name} names {twice[0]!r} twice")
        for name in ("samples", "batch_size", "rows", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.max_length < 2:
            raise UsageError(f"--max-length must be at least 2, not {self.max_length}")
        if not 0 <= self.test_fraction < 1:
            raise UsageError(f"--test-fraction must be at least 0 and below 1, not {self.test_fraction}")
        for name in ("test_data", "data2"):
            if getattr(self, name) == self.data:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {self.data} is the calibration data itself: give another corpus, or leave it")
        strangers = [name for name in self.options if name not in map(slug_of, self.methods)]
        if strangers:
            raise UsageError(f"--set names {strangers[0]!r}, which is not among --methods {','.join(self.methods)}")


    @property
    def trains(self) -> bool:
        """Whether any method is trained."""
        return any(map(is_trained, self.methods))


def slug_of(name: str) -> str:
    """The method of a name in a study."""
    return name.removesuffix(TRAINED)


def is_trained(name: str) -> bool:
    """Whether what a name in a study makes is trained then."""
    return name.endswith(TRAINED)


def study_from(request: Row) -> Study:
    """The study that `request_of` described."""
    fields = {name: value for name, value in request.items() if name not in ("pillar", "versions")}
    return Study(**{**fields, "methods": tuple(fields["methods"]), "keeps": tuple(fields["keeps"])})


@dataclass(frozen=True)
class Point:
    """One task: the dense model, a method at one share (`keep`), or its speed."""

    phase: str  # "dense", "quality" or "speed"
    method: str
    keep: float | None

    @property
    def key(self) -> tuple[str, str, float | None]:
        """What tells its row from the others."""
        return (self.phase, self.method, self.keep)


def key_of(row: Row) -> tuple[str, str, float | None]:
    """The key of the point that a row is the result of."""
    return (row["phase"], row["method"], row["keep"])


def empty_row(point: Point) -> Row:
    """A point's row before it was measured: failed unless told otherwise.

    Of a quality row: `kept` and `bits` are stored bits of the targeted matrices after compression, as a share and in
    all; `reads` those read for a token; `file_bytes` the weight files, whole; `seconds` is what it took to make, and
    `train_seconds` to train; `corpora` has an entry a test corpus.
    """
    return {
        **{"kind": "run", "phase": point.phase, "method": point.method, "keep": point.keep},
        **{"status": "failed", "error": None, "options": {}, "command": "", "same_as": None},
        **{"kept": None, "bits": None, "dense_bits": None, "reads": None, "file_bytes": None, "seconds": None},
        "train_seconds": None,
        **{"layers": [], "corpora": [], "speed": None, "dense_speed": None},
    }


def pending(study: Study, rows: Iterable[Row]) -> list[Point]:
    """What is left to measure but for speeds, which must be alone on the machine."""
    done = {key_of(row) for row in rows if row.get("kind") == "run"}
    points = [Point("dense", DENSE, None)]
    points += [Point("quality", method, keep) for method in study.methods for keep in study.keeps]
    return [point for point in points if point.key not in done]


def timing(study: Study, rows: Iterable[Row]) -> list[Point]:
    """The speeds that are left: of every point that came out, the methods in turns."""
    finished = [row for row in rows if row.get("kind") == "run"]
    done = {key_of(row) for row in finished}
    sound = {(row["method"], row["keep"]) for row in finished if row["phase"] == "quality" and row["status"] == "ok"}
    points = [Point("speed", method, keep) for keep in study.keeps for method in study.methods if study.speed]
    return [point for point in points if (point.method, point.keep) in sound and point.key not in done]


def expected(study: Study) -> int:
    """How many rows the study has, if no point fails."""
    return 1 + len(study.methods) * len(study.keeps) * (1 + study.speed)


class Observer(Protocol):
    """What is told of a study's progress; the command line's progress bar is one."""

    def stage(self, text: str) -> None:
        """Something starts that has no rows to count."""

    def planned(self, header: Row) -> None:
        """The plan is settled; nothing was measured yet."""

    def progressed(self, rows: list[Row], running: list[Point]) -> None:
        """Points have started or ended."""

    def finished(self, row: Row) -> None:
        """A point has ended, well or not."""


class Silent:
    """An observer that looks away."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def planned(self, header: Row) -> None:
        """Nothing."""

    def progressed(self, rows: list[Row], running: list[Point]) -> None:
        """Nothing."""

    def finished(self, row: Row) -> None:
        """Nothing."""


def trade_off(
    study: Study,
    output: Path,
    *,
    workers: int | None = None,
    command: str = "",
    retry_failed: bool = False,
    observer: Observer | None = None,
    debug: bool = False,
) -> list[Row]:
    """Measure what is left of a study; returns all its rows, which are in `output`/results.jsonl too.

    Args:
        workers: processes at a time; no number depends on it. None: as many as the machine has room for.
        command: that goes on with the study, for the reader.
        retry_failed: measure again what failed before.
        observer: told of progress.
        debug: print tracebacks of failed points to stderr.

    Raises:
        UsageError: the request cannot be served, or `output` holds another study.
    """
    from weft.run.point import facts, run_point

    observer, output = observer or Silent(), Path(output)
    request = {"pillar": PILLAR, **request_of(study, versions())}
    if not read_rows(output / "results.jsonl")[0]:  # else the facts are in the file, and a changed request refused
        found = facts(study, observer.stage)
    results = open_results(output, request, retry_failed=retry_failed)
    work = output / "work"
    try:
        if results.header is None:
            results.append(_header(study, request, found, command))
        header = results.header
        assert header is not None
        observer.planned(header)
        context = {"study": request, "output": str(output), "debug": debug}
        left = pending(study, results.rows)
        if left:
            most = min(workers or default_workers(header["plan"]["parameters"], study.threads), len(study.methods))
            with spread.processes(run_point, context, most, study.threads) as pool:
                _measure(study, results, pool, observer)
        if timing(study, results.rows):
            with spread.processes(run_point, context, 1, study.threads) as pool:
                for point in timing(study, results.rows):
                    observer.progressed(results.rows, [point])
                    _record(results, point, _twin(point, results.rows) or _alone(pool, point), observer)
        observer.progressed(results.rows, [])
        shutil.rmtree(work, ignore_errors=True)
    finally:
        results.close()
    return results.rows


def _header(study: Study, request: Row, found: Row, command: str) -> Row:
    return {
        "kind": "study",
        "pillar": PILLAR,
        "model": study.model,
        "data": study.data,
        "methods": list(study.methods),
        "keeps": list(study.keeps),
        "command": command,
        "versions": request["versions"],
        "hardware": hardware(),
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": request,
        "plan": found,
    }


def _measure(study: Study, results: Results, pool: spread.Pool, observer: Observer) -> None:
    running: dict[tuple[Any, ...], Point] = {}
    while True:
        for point in pending(study, results.rows):
            busy = {each.method for each in running.values()}  # the points of a method share a work folder
            if point.method not in busy and pool.free() > 0:
                running[point.key] = point
                pool.submit({**asdict(point), "known": _known(point, results.rows)})
        observer.progressed(results.rows, list(running.values()))
        if not running:
            return
        task, row = pool.next()
        point = running.pop(Point(task["phase"], task["method"], task["keep"]).key)
        _record(results, point, row, observer)


def _known(point: Point, rows: Iterable[Row]) -> list[Row]:
    """The sizes that the method's finished points have, layer by layer."""
    same = [row for row in rows if row.get("phase") == "quality" and row["method"] == point.method]
    return [
        {"keep": row["keep"], "sizes": [layer["size"] for layer in row["layers"]]}
        for row in same
        if row["status"] == "ok" and row["same_as"] is None
    ]


def _alone(pool: spread.Pool, point: Point) -> Row | None:
    pool.submit({**asdict(point), "known": []})
    return pool.next()[1]


def _twin(point: Point, rows: Sequence[Row]) -> Row | None:
    """The speed of the point whose layers are the same, where there is one."""
    quality = next(row for row in rows if row.get("kind") == "run" and key_of(row)[1:] == point.key[1:])
    if quality["same_as"] is None:
        return None
    wanted = ("speed", point.method, quality["same_as"])
    found = next((row for row in rows if row.get("kind") == "run" and key_of(row) == wanted), None)
    return found and {**found, "keep": point.keep, "same_as": quality["same_as"]}


def _record(results: Results, point: Point, row: Row | None, observer: Observer) -> None:
    if row is None:
        row = {**empty_row(point), "error": "the process was killed; most often the machine ran out of memory"}
    if row["same_as"] is not None and point.phase == "quality":
        original = next(each for each in results.runs if key_of(each) == ("quality", point.method, row["same_as"]))
        row = {**original, "keep": point.keep, "same_as": row["same_as"], "command": row["command"]}
    results.append(row)
    observer.finished(row)


# --- the ranking ------------------------------------------------------------------------------------------------------


def rank_points(rows: Sequence[Row], keep: float, corpus: int = 0) -> Ranking:
    """Rank the methods at one share by their loss on a test corpus, as `rank` does: by a bootstrap over its documents.

    Only those are ranked that store, or where they save reading alone read, no more than the share. Whoever at least
    doubles the dense model's perplexity is marked as collapsed.
    """
    points = [row for row in rows if row.get("phase") == "quality" and row["keep"] == keep and within(row)]
    tables = {row["method"]: {0: row["corpora"][corpus]["per_document"]} for row in points if finite_loss(row, corpus)}
    ranking = rank(tables)
    dense = dense_loss(rows, corpus)
    if dense is None:
        return ranking
    standings = (replace(each, collapsed=not each.mean < dense + COLLAPSED) for each in ranking.standings)
    return Ranking(tuple(standings), ranking.pairs)


def dense_loss(rows: Iterable[Row], corpus: int) -> float | None:
    """Nats a token of the dense model; None before it was measured."""
    row = next((row for row in rows if row.get("phase") == "dense" and row["status"] == "ok"), None)
    return None if row is None else row["corpora"][corpus]["loss"]


def finite_loss(row: Row, corpus: int) -> bool:
    """Whether a point has a loss that can be compared."""
    return row["status"] == "ok" and row["corpora"][corpus]["loss"] is not None


def within(row: Row) -> bool:
    """Whether a point keeps to its share: of what is stored, or for a method that stores everything, of what is read.

    What is read may be a twentieth more: a target, which the floors of one column and one rank miss in small layers.
    """
    if row["status"] != "ok":
        return False
    if saves_reading(row["method"]):
        return bool(row["reads"] <= 1.05 * row["keep"] * row["dense_bits"])
    return bool(row["kept"] <= row["keep"] + 1e-9)


def saves_reading(method: str) -> bool:
    """Whether a method saves what is read for a token, and not what is stored."""
    return "keep" in registry.card(slug_of(method), PILLAR).reasons
