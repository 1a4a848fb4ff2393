"""Budgets: their syntax, knobs solved against written-out searches, learning-rate grids."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weft.errors import UsageError
from weft.run.budget import (
    Budget,
    best_offset,
    extension,
    first_offsets,
    learning_rate,
    parse_budget,
    share_steps,
    solve_knob,
    steps_of,
    unturnable,
)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("params=50k", Budget(params=50_000)),
        ("steps=300", Budget(steps=300)),
        ("minutes=0.5", Budget(minutes=0.5)),
        (" params = 1.5M , steps=1_000", Budget(params=1_500_000, steps=1000)),
        ("minutes=5,params=50k,steps=300", Budget(50_000, 300, 5.0)),
    ],
)
def test_syntax(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' is not NAME=NUMBER"),
        ("300", "'300' is not NAME=NUMBER"),
        ("step=300", "unknown part 'step': did you mean 'steps'"),
        ("steps=0", "'steps=0' is not a positive number"),
        ("steps=-3", "not a positive number"),
        ("steps=many", "'steps=many' is not a positive number"),
        ("steps=nan", "not a positive number"),
        ("params=inf", "not a positive number"),
        ("steps=2.5", "'steps=2.5' is not a whole number of steps"),
        ("steps=3,steps=4", "'steps' is given twice"),
        ("params=k", "'params=k' is not a positive number"),
    ],
)
def test_bad_syntax_is_one_sentence(text, sentence):
    with pytest.raises(UsageError, match="--budget") as caught:
        parse_budget(text)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_minutes_become_steps():
    assert steps_of(Budget(minutes=5), 0.5) == 600
    assert steps_of(Budget(minutes=5, steps=100), 0.5) == 100
    assert steps_of(Budget(minutes=5, steps=1000), 0.5) == 600
    assert steps_of(Budget(), None) == 300
    with pytest.raises(UsageError, match="less than one step"):
        steps_of(Budget(minutes=0.1), 10.0)


def _exhaustive(counts: dict[int, int], budget: int) -> int:
    """Nearest from below, else the smallest count of all."""
    within = [count for count in counts.values() if count <= budget]
    return max(within) if within else min(counts.values())


@given(
    slope=st.integers(1, 5000),
    offset=st.integers(0, 5000),
    last=st.integers(1, 3000),
    budget=st.integers(1, 2_000_000),
    power=st.sampled_from([1, 2]),
)
def test_rising_counts(slope, offset, last, budget, power):
    """Whatever the budget: as good as trying every allowed value."""

    def count(value: int) -> int:
        if value > last:
            raise UsageError("larger than the matrix")
        return offset + slope * value**power

    knob = solve_knob("r", count, budget)
    counts = {value: count(value) for value in range(1, last + 1)}
    assert knob.count == _exhaustive(counts, budget) == counts[knob.value]
    if min(counts.values()) <= budget < max(counts.values()):
        assert not knob.unreachable
    if max(counts.values()) < 0.9 * budget or min(counts.values()) > 1.1 * budget:
        assert knob.unreachable


@given(budget=st.integers(1, 3_000_000), total=st.integers(1000, 2_000_000), last=st.integers(2, 2000))
def test_falling_counts(budget, total, last):
    """RandLoRA's: the larger the basis rank, the fewer parameters."""
    assume(total >= last)

    def count(value: int) -> int:
        if value > last:
            raise UsageError("larger than the matrix")
        return total // value

    knob = solve_knob("r", count, budget)
    assert knob.count == _exhaustive({value: count(value) for value in range(1, last + 1)}, budget)


def test_even_values_only():
    def count(value: int) -> int:
        if value % 2:
            raise UsageError("even values only")
        return 100 * value

    knob = solve_knob("r", count, 1450)
    assert (knob.value, knob.count, knob.unreachable) == (14, 1400, False)


def test_counting_is_cheap():
    """A count attaches a method to the whole skeleton: two dozen of them, not two thousand."""
    asked = []

    def count(value: int) -> int:
        asked.append(value)
        return 7 * value

    assert solve_knob("n_frequency", count, 50_000).value == 7142
    assert len(asked) == len(set(asked)) < 32


def test_large_values_are_not_tried_in_vain():
    """Counting VeRA at r = 16 million would draw its bases."""
    asked = []

    def count(value: int) -> int:
        asked.append(value)
        return 1000 + 7 * value

    knob = solve_knob("r", count, 500)
    assert (knob.value, knob.unreachable) == (1, True) and max(asked) <= 4

    def constant(value: int) -> int:
        asked.append(value)
        return 1000

    assert solve_knob("r", constant, 5000).unreachable and max(asked) <= 4


def test_nothing_allowed_says_why():
    def count(value: int) -> int:
        raise UsageError("target modules match nothing")

    with pytest.raises(UsageError, match="match nothing"):
        solve_knob("r", count, 100)


def test_no_knob():
    assert not unturnable(105, 100).unreachable
    assert unturnable(200, 100).unreachable and unturnable(200, 100).value is None


def test_grid():
    assert first_offsets(1) == [0] and first_offsets(3) == [-1, 0, 1] and first_offsets(4) == [-2, -1, 0, 1]
    assert [learning_rate(1e-3, 3, offset) for offset in first_offsets(3)] == [0.000333333, 0.001, 0.003]


def test_best_at_edge_is_extended_within_bounds():
    assert extension({-1: 3.0, 0: 2.0, 1: 2.5}, 0, 3) is None
    assert extension({-1: 3.0, 0: 2.0, 1: 1.5}, 0, 3) == 2
    assert extension({-1: 1.0, 0: 2.0, 1: 1.5}, 2, 3) == -2
    assert extension({-1: 1.0, 0: 2.0, 1: 1.5}, 3, 3) is None
    # A failed point counts as the worst: it is neither chosen nor does it hide the edge from its neighbour.
    assert extension({-1: 2.0, 0: 1.0, 1: None}, 0, 3) is None
    assert extension({-1: None, 0: None, 1: None}, 0, 3) is None
    assert best_offset({-1: float("nan"), 0: 2.0, 1: 2.0}) == 0
    assert best_offset({-1: None}) is None


@given(st.integers(1, 2000), st.integers(1, 9), st.integers(1, 4), st.integers(0, 90), st.integers(0, 20))
def test_shared_steps_use_the_limit_and_never_exceed_it(total, methods, seeds, grid, measured):
    def all_steps(steps):
        return methods * (grid + measured + seeds * steps)

    try:
        steps = share_steps(total, methods, seeds, grid, measured)
    except UsageError:
        assert total < all_steps(1)
        return
    assert steps >= 1 and all_steps(steps) <= total < all_steps(steps + 1)
