"""Which method is better, and is it sure? Paired bootstrap over documents and seeds.

A score of one run is a ratio of sums over the test documents: nats per token (Σ nll / Σ tokens), or the share of right
answers (Σ right / Σ 1). Two runs of one seed saw the same documents and the same batches, so that their difference is
taken document by document and seed by seed: each bootstrap draw picks documents and seeds once, for all methods alike.

A method is surely better than another where the 95 % interval of their difference excludes zero, and a method's rank is
one more than the number of methods that are surely better than it. So a surely worse method never shares a rank, let
alone leads, and methods of one rank are tied with each other. A tie is a statement about two methods, not about a
group: a noisy method can be tied with the first while a third, with a better mean, is surely behind the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weft.errors import WeftError

LEVEL = 0.95
DRAWS = 2000
REFERENCES = ("base", "head", "full")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """How method `a` differs from `b`: score of `a` minus score of `b`.

    Attributes:
        difference: of the means over the seeds that both have.
        low, high: the bootstrap interval of the difference.
        better: the name of the surely better one, or None for a tie.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    better: str | None


@dataclass(frozen=True)
class Standing:
    """One line of the ranking.

    Attributes:
        rank: 1 + the number of methods surely better than this one (1, 1, 3).
        mean: over seeds, of the score on the whole test split.
        spread: standard deviation over seeds (n - 1), 0 for a single seed.
        low, high: the bootstrap interval of the mean.
        seeds: how many runs count.
        tied: the others whose difference from this one has an interval that holds zero, best first, of any rank.
        collapsed: a perplexity of twice the base model's or more: it has no place in an ordering, whatever its rank.
    """

    method: str
    rank: int
    mean: float
    spread: float
    low: float
    high: float
    seeds: int
    tied: tuple[str, ...] = ()
    collapsed: bool = False


@dataclass(frozen=True)
class Ranking:
    """The standings by rank, then by mean, and every pair behind them."""

    standings: tuple[Standing, ...]
    pairs: tuple[Pair, ...]

    def pair(self, a: str, b: str) -> Pair:
        """The comparison of two methods, as `a` minus `b`."""
        for pair in self.pairs:
            if (pair.a, pair.b) == (a, b):
                return pair
            if (pair.a, pair.b) == (b, a):
                return Pair(a, b, -pair.difference, -pair.high, -pair.low, pair.better)
        raise KeyError(f"no comparison of {a!r} with {b!r}")


def _document_draws(tables: Sequence[Array], weights: Array, draws: int, seed: int) -> list[Array]:
    """The score of each table (documents,) in each bootstrap draw of documents: (draws,) per table."""
    documents = len(weights)
    columns = np.stack([*tables, weights], axis=1)
    generator = np.random.default_rng([seed, documents])
    chunk = max(1, min(draws, 4_000_000 // documents))  # 32 MB of counts at a time, however large the test split
    sums = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        picked = generator.integers(documents, size=(size, documents)) + np.arange(size)[:, None] * documents
        counts = np.bincount(picked.ravel(), minlength=size * documents).reshape(size, documents)
        sums.append(counts @ columns)
    total = np.concatenate(sums)
    return [total[:, column] / total[:, -1] for column in range(len(tables))]


def _seed_draws(scores: Array, seed: int) -> Array:
    """Scores (seeds, draws) → the mean over a bootstrap draw of seeds: (draws,)."""
    seeds, draws = scores.shape
    picked = np.random.default_rng([seed, 1, seeds]).integers(seeds, size=(draws, seeds))
    return np.asarray(scores[picked.T, np.arange(draws)].mean(axis=0))


def _interval(values: Array) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def rank(
    results: Mapping[str, Mapping[int, ArrayLike]],
    *,
    higher_is_better: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Ranking:
    """Rank methods by their scores on the same test documents.

    Args:
        results: method → seed → (documents, 2) array of [sum, weight], the documents in one order throughout.
        higher_is_better: True for accuracies, False for losses.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Raises:
        WeftError: the runs were not scored on the same documents.
    """
    tables: dict[tuple[str, int], Array] = {}
    weights: Array | None = None
    for method, runs in results.items():
        for run, per_document in runs.items():
            table = np.asarray(per_document, dtype=np.float64).reshape(-1, 2)
            if weights is None:
                weights = table[:, 1]
            if len(weights) != len(table) or not np.array_equal(weights, table[:, 1]):
                raise WeftError(f"{method!r} with seed {run} was not scored on the same test documents as the others")
            tables[method, run] = table[:, 0]
    if weights is None:
        return Ranking((), ())
    counted = weights > 0  # a document without a scored token says nothing, and could empty a draw
    if not counted.any():
        raise WeftError("the test documents hold no scored token, so nothing can be ranked")
    weights = weights[counted]
    tables = {key: table[counted] for key, table in tables.items()}
    drawn = dict(zip(tables, _document_draws(list(tables.values()), weights, draws, seed), strict=True))
    exact = {key: float(table.sum() / weights.sum()) for key, table in tables.items()}

    def mean(method: str, runs: Sequence[int]) -> float:
        return float(np.mean([exact[method, run] for run in runs]))

    names = [method for method, runs in results.items() if runs]
    sign = -1.0 if higher_is_better else 1.0
    names.sort(key=lambda name: (sign * mean(name, sorted(results[name])), name))
    pairs: dict[tuple[str, str], Pair] = {}
    for index, a in enumerate(names):
        for b in names[index + 1 :]:
            common = sorted(set(results[a]) & set(results[b]))
            if not common:
                apart_means = mean(a, sorted(results[a])) - mean(b, sorted(results[b]))
                pairs[a, b] = Pair(a, b, apart_means, -np.inf, np.inf, None)
                continue
            apart = _seed_draws(np.stack([drawn[a, run] - drawn[b, run] for run in common]), seed)
            low, high = _interval(apart)
            better = None
            if len(weights) > 1 and not low <= 0 <= high:  # one document has no spread to be sure from
                better = a if sign * low < 0 and sign * high < 0 else b
            pairs[a, b] = Pair(a, b, mean(a, common) - mean(b, common), low, high, better)

    above = _above(names, pairs.values())
    names.sort(key=lambda name: len(above[name]))  # stable: by mean within a rank
    tied: dict[str, list[str]] = {name: [] for name in names}
    for name, other in permutations(names, 2):
        if pairs[(name, other) if (name, other) in pairs else (other, name)].better is None:
            tied[name].append(other)
    standings = [
        _standing(name, 1 + len(above[name]), results[name], exact, drawn, tuple(tied[name]), seed) for name in names
    ]
    return Ranking(tuple(standings), tuple(pairs.values()))


def _above(names: Sequence[str], pairs: Iterable[Pair]) -> dict[str, set[str]]:
    """For each method those that are surely better, themselves or by way of a third.

    The detour matters only where runs failed: "a" may beat "b" on one seed and "b" beat "c" on another while "a" and
    "c" have none in common. Without it "c" could stand level with "b", or above it.
    """
    above: dict[str, set[str]] = {name: set() for name in names}
    for pair in pairs:
        if pair.better is not None:
            above[pair.a if pair.better == pair.b else pair.b].add(pair.better)
    for third in names:
        for others in above.values():
            if third in others:
                others |= above[third]
    return {name: others - {name} for name, others in above.items()}


def _standing(
    name: str,
    place: int,
    runs: Mapping[int, ArrayLike],
    exact: Mapping[tuple[str, int], float],
    drawn: Mapping[tuple[str, int], Array],
    tied: tuple[str, ...],
    seed: int,
) -> Standing:
    order = sorted(runs)
    scores = np.array([exact[name, run] for run in order])
    low, high = _interval(_seed_draws(np.stack([drawn[name, run] for run in order]), seed))
    spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
    return Standing(name, place, float(scores.mean()), spread, low, high, len(order), tied)


def rank_rows(rows: Sequence[Mapping[str, Any]], *, draws: int = DRAWS, seed: int = 0) -> Ranking:
    """Rank the methods of a `results.jsonl` (its parsed lines) by their final runs on the test split.

    The references base, head-only and full fine-tuning are not ranked, only used to tell what collapsed.
    """
    results: dict[str, dict[int, Any]] = {}
    base_loss: float | None = None
    accuracy = False
    for row in rows:
        test = row.get("test")
        if row.get("kind") != "run" or row.get("status") != "ok" or not test:
            continue
        accuracy = accuracy or "accuracy" in test
        if row["method"] == "base":
            base_loss = test.get("loss")
        if row["method"] not in REFERENCES and row["phase"] == "final" and test.get("per_document"):
            table = np.asarray(test["per_document"], dtype=np.float64)
            if "accuracy" in test:  # documents count their errors; the ranking shows accuracies
                table = np.stack([table[:, 1] - table[:, 0], table[:, 1]], axis=1)
            results.setdefault(row["method"], {})[row["seed"]] = table
    ranking = rank(results, higher_is_better=accuracy, draws=draws, seed=seed)
    if accuracy or base_loss is None:
        return ranking
    limit = base_loss + float(np.log(2))
    standings = tuple(replace(each, collapsed=not each.mean < limit) for each in ranking.standings)
    return Ranking(standings, ranking.pairs)
