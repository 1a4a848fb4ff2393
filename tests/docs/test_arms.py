"""What a study of arms runs next, how it goes on, and what its verdicts mean."""

from __future__ import annotations

import importlib.util
import sys

import fences
import numpy as np
import pytest

from weft.files import partial_of


@pytest.fixture(scope="module")
def arms():
    spec = importlib.util.spec_from_file_location("arms_of_studies", fences.ROOT / "benchmarks" / "arms.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def study(arms, tmp_path, names=("one",), steps=(5, 20)):
    return arms.Study(tmp_path / "rows.jsonl", ["p"], names, 2, 1e-3, dict(zip(("rate", "test"), steps)))


@pytest.mark.parametrize(
    ("tried", "missing"),
    [
        ({}, [-1, 0, 1]),
        ({-1: 3.0, 1: 2.0}, [0]),
        ({-1: 3.0, 0: 1.0, 1: 2.0}, []),
        ({-1: 1.0, 0: 2.0, 1: 3.0}, [-2]),
        ({-1: 3.0, 0: 2.0, 1: 1.0}, [2]),
        ({-1: 3.0, 0: 2.0, 1: 1.0, 2: None}, []),
        ({-1: 9.0, 0: 8.0, 1: 7.0, 2: 6.0, 3: 5.0, 4: 4.0}, []),
    ],
)
def test_a_grid_grows_where_its_best_lies_at_an_edge(arms, tried, missing):
    assert arms.untried(tried) == missing


def test_runs_follow_from_the_rows_and_survive_a_kill(arms, tmp_path):
    """Losses are least at the power 1; after each run the study is begun anew, half a draft lying about."""
    count = 0
    while jobs := study(arms, tmp_path).due(study(arms, tmp_path).rows()):
        job = jobs[0]
        begun = study(arms, tmp_path)
        begun.write([*begun.rows(), {**job, "validation": (job["power"] - 1.0) ** 2}])
        partial_of(begun.path).write_text('{"problem": "p", "ar')
        count += 1
    rows = study(arms, tmp_path).rows()
    assert [row["power"] for row in rows if row["phase"] == "rate"] == [-1, 0, 1, 2]
    assert [(row["seed"], row["rate"]) for row in rows if row["phase"] == "test"] == [(0, 0.003162), (1, 0.003162)]
    assert count == len(rows) == 6
    other = study(arms, tmp_path, steps=(5, 40))  # a longer one keeps what the two have in common, and all else
    other.write([*other.rows(), {**other.due(other.rows())[0], "validation": 0.0}])
    assert len(study(arms, tmp_path).rows()) == 6 and len(other.rows()) == 5


def runs(scores, noise=0.0):
    draw = np.random.default_rng(3)
    return [
        {"seed": seed, "scores": {"s": score}, "draws": {"s": (score + noise * draw.standard_normal(500)).tolist()}}
        for seed, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        ([3.0, 3.1, 3.2], [2.0, 2.1, 2.2], "holds"),
        ([2.0, 2.1, 2.2], [3.0, 3.1, 3.2], "reversed"),
        ([2.0, 3.0, 2.0], [3.0, 2.0, 2.5], "tie"),
        ([2.0, 2.0], [2.0, 2.0], "tie"),
        ([2.0, float("nan")], [1.0, 1.0], "collapsed"),
    ],
)
def test_an_order_needs_an_interval_without_zero(arms, one, other, word):
    assert arms.order(runs(one), runs(other), "s")[0] == word
    opposite = {"holds": "reversed", "reversed": "holds"}.get(word, word)
    assert arms.order(runs(one), runs(other), "s", higher=False)[0] == opposite


def test_draws_are_paired_by_seed(arms):
    """Noise that both share cancels; noise of one's own does not; a seed that one lacks is left out."""
    one, other = runs([2.1, 2.1], 1.0), runs([2.0, 2.0], 1.0)
    assert arms.order(one, other, "s")[0] == "holds"
    assert arms.order(one, [{**row, "draws": {"s": row["draws"]["s"][::-1]}} for row in other], "s")[0] == "tie"
    middle, low, high = arms.gap(one, [*other[:1], {**other[1], "seed": 7}], "s")
    assert middle == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [([9.95], [10.0], "holds"), ([9.8], [10.0], "reversed"), ([9.0], [9.0, 11.0], "holds"), ([11.0], [10.0], "holds")],
)
def test_close_is_two_deviations_or_one_percent(arms, one, other, word):
    assert arms.close(runs(one), runs(other), "s")[0] == word


def test_draws_follow_from_the_seed_and_hold_every_row_as_often_as_it_is_drawn(arms):
    first, second = arms.counts(30, 1), arms.counts(30, 1)
    assert np.array_equal(first, second) and not np.array_equal(first, arms.counts(30, 2))
    assert (first.sum(1) == 30).all() and abs(first.mean(0) - 1).max() < 0.3
