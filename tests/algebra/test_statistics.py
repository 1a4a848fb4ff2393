"""Streamed statistics and shrinkage against the formulas written out over all rows in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from torch import Tensor

from weft.algebra import gram
from weft.algebra.shrink import ledoit_wolf, shrink
from weft.algebra.statistics import KINDS, Magnitudes, Moments, mix


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Correlated rows, the mean far from zero."""
    made = torch.Generator().manual_seed(1000 * n + 10 * d + seed)
    mixing = torch.randn(d, d, generator=made, dtype=torch.float64)
    return torch.randn(n, d, generator=made, dtype=torch.float64) @ mixing + 30 * torch.randn(
        d, generator=made, dtype=torch.float64
    )


def streamed(x: Tensor, cuts: list[int]) -> Moments:
    kept = Moments(KINDS)
    for part in x.tensor_split(cuts):
        kept.add(part)
    return kept


def written_out(x: Tensor) -> dict[str, Tensor]:
    centred = x - x.mean(0)
    return {
        "mean": x.mean(0),
        "covariance": centred.mT @ centred / len(x),
        "second_moment": x.mT @ x / len(x),
        "magnitude": x.abs().mean(0),
        "square": x.square().mean(0),
        "fourth": x.square().sum(1).square().mean(),
        "centred_fourth": centred.square().sum(1).square().mean(),
    }


def assert_equal_to(kept: Moments, x: Tensor, rtol: float = 1e-10) -> None:
    assert kept.n == len(x)
    for name, exact in written_out(x).items():
        if "fourth" in name:
            found = torch.tensor(kept.fourth(centred=name == "centred_fourth"), dtype=torch.float64)
        else:
            found = getattr(kept, name)
        assert found.dtype == torch.float64
        assert float((found - exact).norm()) <= rtol * float(exact.norm()), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 9), st.data())
def test_any_split_into_batches_gives_the_same(n, d, data):
    x = rows(n, d)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))  # empty batches among them
    assert_equal_to(streamed(x, cuts), x)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 9), st.data())
def test_two_accumulators_add_up(n, d, data):
    x = rows(n, d)
    cut = data.draw(st.integers(0, n))
    one, two = streamed(x[:cut], [2]), streamed(x[cut:], [3])
    before = one.n, {kind: kept.clone() for kind, kept in one.sums.items()}
    assert_equal_to(one + two, x)
    assert one.n == before[0] and all(torch.equal(one.sums[kind], kept) for kind, kept in before[1].items())
    joined = one + two
    joined.add(x)
    assert_equal_to(joined, torch.cat([x, x]))


def test_more_columns_than_a_block_and_more_rows_than_one_product(monkeypatch):
    monkeypatch.setattr(gram, "BLOCK", 3)
    monkeypatch.setattr("weft.algebra.statistics._ROWS", 5)
    x = rows(23, 10)
    assert_equal_to(streamed(x, [9]), x)
    assert torch.equal(gram.gram(x), gram.gram(x).mT)
    torch.testing.assert_close(gram.gram(x), x.mT @ x, rtol=1e-13, atol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_a_mask_chooses_the_rows(batch, length, d, seed):
    x = rows(batch * length, d).reshape(batch, length, d)
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    kept = Moments(KINDS)
    kept.add(x, mask)
    kept.add(x)
    assert_equal_to(kept, torch.cat([x[mask], x.reshape(-1, d)]))


def test_a_mean_far_above_the_deviation_leaves_the_covariance_its_digits():
    noise = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (1e3 + noise).float()  # float32 products of x itself would be off by more than the covariance
    kept = Moments()
    for part in x.split(700):
        kept.add(part)
    exact = written_out(x.double())
    assert float((kept.covariance - exact["covariance"]).abs().max()) < 1e-5
    torch.testing.assert_close(kept.second_moment, exact["second_moment"], rtol=1e-9, atol=0)


def test_only_what_was_asked_for_is_kept():
    kept = Moments(["squares"])
    with pytest.raises(ValueError, match="no row"):
        _ = kept.mean
    kept.add(torch.ones(3, 2))
    assert set(kept.sums) == {"rows", "squares"}
    assert torch.equal(kept.mean, torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="keep no 'products', only rows, squares"):
        _ = kept.covariance
    with pytest.raises(ValueError, match="keep='cubes'"):
        Moments(["cubes"])


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(3, 4)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match=r"must be \(3, 4\) and boolean"):
        Moments().add(torch.ones(3, 4, 2), mask)


def test_what_does_not_add_up_is_refused():
    kept, other = Moments(), Moments(["squares"])
    with pytest.raises(ValueError, match="not finite"):
        kept.add(torch.full((2, 3), math.inf))
    kept.add(torch.ones(2, 3))
    other.add(torch.ones(2, 3))
    for bad, message in [
        (lambda: kept.add(torch.ones(2, 4)), "rows of 4"),
        (lambda: kept.add(torch.full((2, 3), math.nan)), "not finite"),
        (lambda: kept + other, "do not add"),
        (lambda: mix([kept], [1.0, 2.0]), "not 1 shares"),
        (lambda: mix([kept, Moments()], [1.0, 2.0]), "part 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
    assert kept.n == 2 and torch.equal(kept.covariance, torch.zeros(3, 3, dtype=torch.float64))


def test_a_mixture_weighs_its_parts_whatever_their_rows():
    one, two = rows(30, 4, seed=1), rows(7, 4, seed=2)
    mixed = mix([streamed(one, [5]), streamed(two, [2])], [3.0, 1.0])
    expected = {name: 0.75 * a + 0.25 * b for (name, a), b in zip(written_out(one).items(), written_out(two).values())}
    for name in ("mean", "second_moment", "magnitude", "square"):
        torch.testing.assert_close(getattr(mixed, name), expected[name], rtol=1e-10, atol=1e-12)
    centre = expected["mean"]
    covariance = 0.75 * (one - centre).mT @ (one - centre) / 30 + 0.25 * (two - centre).mT @ (two - centre) / 7
    torch.testing.assert_close(mixed.covariance, covariance, rtol=1e-10, atol=1e-10)
    assert mixed.n == pytest.approx(1 / (0.75**2 / 30 + 0.25**2 / 7))
    assert mix([streamed(one, []), streamed(two, [])], [30.0, 7.0]).n == pytest.approx(37)


# --- shrinkage --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 3))
def test_the_amount_for_a_covariance_is_scikit_learns(n, d, seed):
    x = rows(n, d, seed)
    kept = streamed(x, [n // 2])
    expected, amount = sklearn_ledoit_wolf(x.numpy())
    assert ledoit_wolf(kept.covariance, kept.n, kept.fourth(centred=True)) == pytest.approx(amount, rel=1e-7, abs=1e-9)
    shrunk = shrink(kept.covariance, "auto", n=kept.n, fourth=kept.fourth(centred=True))
    scale = float(abs(expected).max())
    torch.testing.assert_close(shrunk, torch.from_numpy(expected), rtol=1e-7, atol=1e-9 * scale)


def test_the_amount_for_a_second_moment_is_its_definition():
    x = rows(40, 5, seed=3) / 30
    kept = streamed(x, [7, 20])
    s = x.mT @ x / 40
    variance = torch.stack([(torch.outer(v, v) - s).square().sum() for v in x]).mean() / 40
    spread = (s - s.trace() / 5 * torch.eye(5)).square().sum()
    assert 0 < float(variance / spread) < 1
    assert ledoit_wolf(kept.second_moment, 40, kept.fourth(centred=False)) == pytest.approx(float(variance / spread))


def test_shrinkage_keeps_the_trace_and_draws_the_eigenvalues_together():
    s = Moments()
    s.add(rows(9, 4))
    before = torch.linalg.eigvalsh(s.covariance)
    for amount in (0.0, 0.3, 1.0):
        shrunk = shrink(s.covariance, amount)
        torch.testing.assert_close(
            torch.linalg.eigvalsh(shrunk), (1 - amount) * before + amount * before.mean(), rtol=1e-9, atol=1e-9
        )
    assert torch.equal(shrink(s.covariance, 0.0), s.covariance)
    assert ledoit_wolf(torch.eye(3), 10, 9.0) == 0.0
    for bad, message in [((1.5,), "amount=1.5"), (("auto",), "needs n and fourth")]:
        with pytest.raises(ValueError, match=message):
            shrink(s.covariance, *bad)


# --- magnitudes -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 40), st.floats(0, 1), st.booleans())
def test_the_share_below_the_quantile_is_the_asked_one(n, d, cut, share, exact):
    x, scale = rows(n, d), torch.rand(d, generator=torch.Generator().manual_seed(d), dtype=torch.float64) + 0.1
    one, two = (Magnitudes(scale, capacity=n * d if exact else 0) for _ in range(2))
    one.add(x[:cut])
    two.add(x[cut:])
    values, _ = (x * scale).abs().flatten().sort()
    k = int(share * n * d)
    found = (one + two).at(share)
    if k == 0:
        assert found == -1.0
    elif exact:
        assert found == values[k - 1] and int((values <= found).sum()) == k
    else:
        assert values[k - 1] <= found * (1 + 1e-7) and found <= values[k - 1] * (1 + 2**-11) * (1 + 1e-7)


def test_the_histogram_does_not_depend_on_the_batches():
    x = rows(50, 3).float()
    whole, parts = Magnitudes(capacity=20), Magnitudes(capacity=20)
    whole.add(x)
    for part in x.split(4):
        parts.add(part, torch.ones(len(part), dtype=torch.bool))
    assert whole.bins is not None and parts.bins is not None and torch.equal(whole.bins, parts.bins)
    assert not whole.values and not parts.values and whole.count == parts.count == 150


def test_zeros_ties_and_nothing():
    kept = Magnitudes()
    with pytest.raises(ValueError, match="no value"):
        kept.at(0.5)
    kept.add(torch.tensor([[0.0, 0.0, -2.0, 2.0]]))
    assert [kept.at(q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)] == [-1.0, 0.0, 0.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="not finite"):
        kept.add(torch.tensor([math.inf]).reshape(1, 1))
