"""The ranking rule: properties that must hold for any scores, and a slow written-out bootstrap beside it."""

from __future__ import annotations

import itertools
from graphlib import CycleError, TopologicalSorter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weft.errors import WeftError
from weft.run.ranking import rank, rank_rows


def _runs(rng, documents=40, seeds=3, level=3.0, document_noise=0.5, seed_noise=0.01, weights=None):
    """seed → (documents, 2): nll sums around `level` nats a token."""
    weights = rng.integers(5, 50, documents) if weights is None else weights
    per_document = level + document_noise * rng.standard_normal(documents)
    return {
        seed: np.stack([(per_document + seed_noise * rng.standard_normal(documents)) * weights, weights], axis=1)
        for seed in range(1, seeds + 1)
    }


def _shifted(runs, by):
    return {seed: np.stack([table[:, 0] + by * table[:, 1], table[:, 1]], axis=1) for seed, table in runs.items()}


@st.composite
def studies(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    documents, seeds = draw(st.integers(2, 30)), draw(st.integers(1, 4))
    weights = rng.integers(1, 50, documents)
    return {
        f"m{index}": _runs(
            rng,
            documents,
            seeds,
            level=3 + draw(st.floats(0, 0.3)),
            document_noise=draw(st.sampled_from([0.0, 0.05, 0.3])),
            weights=weights,
        )
        for index in range(draw(st.integers(1, 5)))
    }


@st.composite
def patchy_studies(draw):
    """Studies in which runs failed: methods with different seeds, perhaps none in common."""
    study = draw(studies())
    kept = {name: {seed: table for seed, table in runs.items() if draw(st.booleans())} for name, runs in study.items()}
    return {name: runs or study[name] for name, runs in kept.items()}


def _better(ranking):
    """(a, b) for every a that is surely better than b, each pair asked for both ways."""
    names = [each.method for each in ranking.standings]
    return {(a, b) for a, b in itertools.permutations(names, 2) if ranking.pair(a, b).better == a}


def _circular(better):
    order = TopologicalSorter()
    for a, b in better:
        order.add(b, a)
    try:
        order.prepare()
    except CycleError:
        return True
    return False


@settings(max_examples=60, deadline=None)
@given(studies(), st.booleans())
def test_a_rank_counts_the_surely_better(study, higher):
    ranking = rank(study, higher_is_better=higher, draws=200)
    better = _better(ranking)
    # percentiles need not be transitive to the last draw; where they are not, a third one counts as well (see below)
    assume(all((a, c) in better for a, b in better for other, c in better if other == b))
    assert sorted(each.method for each in ranking.standings) == sorted(study)
    for each in ranking.standings:
        assert each.rank == 1 + sum((other, each.method) in better for other in study)
    for a, b in better:
        pair = ranking.pair(a, b)
        assert (pair.low > 0) if higher else (pair.high < 0)


@settings(max_examples=60, deadline=None)
@given(studies() | patchy_studies(), st.booleans())
def test_the_surely_worse_never_stand_level_and_ties_go_both_ways(study, higher):
    """Also where runs failed; it follows that methods of one rank are tied with each other."""
    ranking = rank(study, higher_is_better=higher, draws=200)
    standings = {each.method: each for each in ranking.standings}
    better = _better(ranking)
    # seeds that contradict each other can close a circle where no two methods have the same ones; nobody leads it
    assume(not _circular(better))
    for a, b in better:
        assert standings[a].rank < standings[b].rank
    for a, b in itertools.permutations(study, 2):
        assert (b in standings[a].tied) == ((a, b) not in better and (b, a) not in better)
        if standings[a].rank == standings[b].rank:
            assert b in standings[a].tied
    for each in ranking.standings:
        assert list(each.tied) == [other.method for other in ranking.standings if other.method in each.tied]


@settings(max_examples=60, deadline=None)
@given(studies(), st.booleans())
def test_standings_go_by_rank_then_by_mean_and_the_best_mean_leads(study, higher):
    ranking = rank(study, higher_is_better=higher, draws=200)
    sign = -1 if higher else 1
    order = [(each.rank, sign * each.mean) for each in ranking.standings]
    assert order == sorted(order)
    assert order[0] == (1, min(mean for _, mean in order))


@settings(max_examples=30, deadline=None)
@given(studies())
def test_pairs_are_antisymmetric_and_the_order_of_methods_does_not_matter(study):
    ranking = rank(study, draws=100)
    backwards = rank(dict(reversed(study.items())), draws=100)
    assert [(each.method, each.rank) for each in ranking.standings] == [
        (each.method, each.rank) for each in backwards.standings
    ]
    for pair in ranking.pairs:
        other = backwards.pair(pair.b, pair.a)
        assert other.low == pytest.approx(-pair.high, abs=1e-9) and other.high == pytest.approx(-pair.low, abs=1e-9)
        assert other.better == pair.better


@settings(max_examples=30, deadline=None)
@given(studies(), st.floats(0.001, 2.0))
def test_worse_on_every_document_is_worse_for_sure_and_equal_is_a_tie(study, by):
    first = study["m0"]
    ranking = rank({"a": first, "twin": first, "worse": _shifted(first, by)}, draws=100)
    ranks = {each.method: each.rank for each in ranking.standings}
    assert ranks == {"a": 1, "twin": 1, "worse": 3}
    assert ranking.pair("worse", "a").low == pytest.approx(by, rel=1e-6)


def test_bootstrap_equals_a_written_out_one():
    """Percentiles of 4,000 draws against a plain loop over documents and seeds with other random numbers."""
    rng = np.random.default_rng(5)
    weights = rng.integers(5, 50, 25)
    a = _runs(rng, 25, 3, level=3.0, document_noise=0.4, seed_noise=0.2, weights=weights)
    b = _runs(rng, 25, 3, level=3.1, document_noise=0.4, seed_noise=0.2, weights=weights)
    pair = rank({"a": a, "b": b}, draws=4000).pair("a", "b")
    differences = []
    for _ in range(4000):
        documents, seeds = rng.integers(25, size=25), rng.integers(1, 4, size=3)
        scores = [
            np.mean([runs[seed][documents, 0].sum() / runs[seed][documents, 1].sum() for seed in seeds])
            for runs in (a, b)
        ]
        differences.append(scores[0] - scores[1])
    low, high = np.quantile(differences, [0.025, 0.975])
    width = high - low
    assert abs(pair.low - low) < 0.08 * width and abs(pair.high - high) < 0.08 * width


def test_a_lucky_seed_does_not_decide():
    """Two seeds that disagree about the sign make a tie, however many documents agree within each."""
    rng = np.random.default_rng(0)
    a = _runs(rng, 200, 2, seed_noise=0.0)
    b = {1: _shifted(a, 0.1)[1], 2: _shifted(a, -0.08)[2]}
    assert {each.rank for each in rank({"a": a, "b": b}).standings} == {1}


def test_a_tie_does_not_carry_over_to_a_third():
    """a ~ b and b ~ c, though a is surely above c: b cannot be told from the first, c stands behind one method."""
    rng = np.random.default_rng(1)
    documents = 100
    weights = np.full(documents, 10.0)
    noise = rng.standard_normal(documents)
    noise -= noise.mean()

    def runs(level, scale):
        return {1: np.stack([(level + scale * noise) * weights, weights], axis=1)}

    study = {"a": runs(3.0, 0.0), "b": runs(3.01, 1.0), "c": runs(3.02, 0.0)}
    ranking = rank(study)
    assert ranking.pair("a", "c").better == "a"
    assert ranking.pair("a", "b").better is None and ranking.pair("b", "c").better is None
    assert [(each.method, each.rank, each.tied) for each in ranking.standings] == [
        ("a", 1, ("b",)),
        ("b", 1, ("a", "c")),
        ("c", 2, ("b",)),
    ]


def test_the_noisy_last_stands_before_what_is_surely_behind_the_first():
    """c has the worst mean, but only of b can it be said that the first is better."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(100)
    noise -= noise.mean()

    def runs(level, scale):
        return {1: np.stack([10 * (level + scale * noise), np.full(100, 10.0)], axis=1)}

    ranking = rank({"a": runs(3.0, 0.0), "b": runs(3.01, 0.0), "c": runs(3.02, 1.0)})
    assert [(each.method, each.rank) for each in ranking.standings] == [("a", 1), ("c", 1), ("b", 2)]


def test_better_by_way_of_a_third_counts_where_seeds_are_missing():
    """a beats b on seed 1, b beats c on seed 2, and a and c have no seed in common."""
    runs = _runs(np.random.default_rng(4), 30, 2)
    study = {"a": {1: runs[1]}, "b": _shifted(runs, 0.2), "c": {2: _shifted(runs, 0.4)[2]}}
    ranking = rank(study)
    assert ranking.pair("a", "c").better is None
    assert {each.method: each.rank for each in ranking.standings} == {"a": 1, "b": 2, "c": 3}


def test_one_document_and_one_seed_are_never_sure():
    study = {"a": {1: [[10.0, 5]]}, "b": {1: [[20.0, 5]]}}
    assert [each.rank for each in rank(study).standings] == [1, 1]


def test_missing_seeds_compare_on_the_common_ones():
    rng = np.random.default_rng(2)
    a = _runs(rng, 30, 3)
    b = {3: _shifted(a, 0.5)[3]}
    ranking = rank({"b": b, "a": a})
    assert [(each.method, each.rank, each.seeds) for each in ranking.standings] == [("a", 1, 3), ("b", 2, 1)]
    assert ranking.pair("b", "a").difference == pytest.approx(0.5)


def test_documents_without_tokens_are_left_out():
    table = [[10.0, 5], [0.0, 0], [8.0, 4]]
    assert rank({"a": {1: table}}).standings[0].mean == pytest.approx(2.0)


def test_other_documents_are_refused():
    with pytest.raises(WeftError, match="'b' with seed 1 was not scored on the same test documents"):
        rank({"a": {1: [[1.0, 5], [1.0, 5]]}, "b": {1: [[1.0, 5]]}})


def _row(method, seed, table, **test):
    test = {"loss": float(np.sum(table[:, 0]) / np.sum(table[:, 1])), "per_document": table.tolist()} | test
    phase = "reference" if method == "base" else "final"
    return {"kind": "run", "phase": phase, "method": method, "seed": seed, "status": "ok", "test": test}


def test_rows_of_a_study():
    """References are not ranked, failures are left out, wreckage (twice the base's perplexity) is marked."""
    rng = np.random.default_rng(3)
    good = _runs(rng, 30, 2)
    rows = [{"kind": "study"}, _row("base", 0, _shifted(good, 1.0)[1])]
    for seed in (1, 2):
        rows += [_row("good", seed, good[seed]), _row("wreck", seed, _shifted(good, 1.75)[seed])]
        rows += [_row("full", seed, _shifted(good, -1)[seed])]
        rows += [{"kind": "run", "phase": "final", "method": "broken", "seed": seed, "status": "failed", "test": None}]
    standings = rank_rows(rows).standings
    assert [(each.method, each.rank, each.collapsed) for each in standings] == [("good", 1, False), ("wreck", 2, True)]


def test_accuracy_ranks_upwards():
    """A document's entry counts its errors; the standing shows the accuracy, and the higher one wins."""
    weak, strong = np.array([[1.0, 1]] * 15 + [[0.0, 1]] * 5), np.array([[0.0, 1]] * 20)
    rows = [_row("weak", 1, weak, accuracy=0.25), _row("strong", 1, strong, accuracy=1.0)]
    assert [(each.method, each.mean) for each in rank_rows(rows).standings] == [("strong", 1.0), ("weak", 0.25)]
