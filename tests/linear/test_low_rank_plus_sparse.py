"""LowRankPlusSparse against matrices in float64, and how it divides one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import UsageError
from weft.linear import _codes
from weft.linear._structured import stored_bits
from weft.linear.low_rank_plus_sparse import LowRankPlusSparse

sides = st.integers(1, 23)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(out: int, in_: int, s: int, seed: int = 0) -> torch.Tensor:
    return drawn(out, in_, seed=seed).argsort(1)[:, :s].sort(1).values


@settings(max_examples=40, deadline=None)
@given(out=sides, in_=sides, rank=st.integers(0, 23), bias=st.booleans(), data=st.data())
def test_forward_is_the_sum_of_the_two(out, in_, rank, bias, data):
    rank, s = min(rank, out, in_), data.draw(st.integers(1, in_))
    up, down, values, index = drawn(out, rank), drawn(rank, in_, seed=1), drawn(out, s, seed=2), places(out, in_, s)
    b, x = drawn(out, seed=3) if bias else None, drawn(2, 3, in_, seed=4)
    w = torch.einsum("or,ri->oi", up, down)
    for o in range(out):
        for j in range(s):
            w[o, index[o, j]] += values[o, j]
    layer = LowRankPlusSparse.from_factors(up, down, index, values, b)
    expected = torch.einsum("bsi,oi->bso", x, w) + (0 if b is None else b)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # where a processor goes another way
        assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(layer(x[0, 0]), expected[0, 0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer.dense(), w, rtol=1e-10, atol=1e-10)
    assert (layer.rank, layer.nonzeros) == (rank, s)
    assert stored_bits(layer) == 64 * (rank * (in_ + out) + out * s) + 8 * out * min(-(-in_ // 8), s)


@pytest.mark.parametrize("rows", [63, 64, 65, 200])
@pytest.mark.parametrize("gradient", [False, True])
def test_many_rows_take_parts(rows, gradient, monkeypatch):
    """A thin S is multiplied by as a sparse matrix, some rows of x at a time; for a gradient it is written out."""
    ways = []
    sparse = _codes._sparse
    monkeypatch.setattr(_codes, "_sparse", lambda *parts: ways.append(len(parts[0])) or sparse(*parts))
    layer = LowRankPlusSparse.from_dense(drawn(40, 32), drawn(40), rank=2, density=0.1)
    x = drawn(rows, 32, seed=1)
    with torch.set_grad_enabled(gradient):
        found = layer(x)
    assert torch.allclose(found, x @ layer.dense().mT + layer.bias, rtol=1e-10, atol=1e-10)
    assert ways == ([] if gradient or not _codes.SPARSE else [rows])


def test_gradients_are_those_of_the_dense_formula(monkeypatch):
    monkeypatch.setattr(_codes, "TILE", 5)  # several tiles, the last one narrower
    layer = LowRankPlusSparse.from_dense(drawn(12, 7), drawn(12, seed=1), rank=2, density=0.3)
    x = drawn(4, 7, seed=2).requires_grad_()
    wanted = drawn(4, 12, seed=3)
    inputs = (x, layer.down.weight, layer.up.weight, layer.values, layer.bias)
    found = torch.autograd.grad((layer(x) * wanted).sum(), inputs)
    s = torch.zeros(12, 7, dtype=torch.float64).scatter(1, layer.places.long(), layer.values)
    w = layer.up.weight @ layer.down.weight + s
    expected = torch.autograd.grad(((x @ w.mT + layer.bias) * wanted).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank, density", [(0, 0.2), (3, 0.1), (5, 0.5)])
def test_what_is_left_never_grows_from_round_to_round(rank, density):
    w = drawn(30, 20) * drawn(30, 20, seed=1).abs()
    left = [
        float((LowRankPlusSparse.from_dense(w, rank=rank, density=density, rounds=n).dense() - w).norm())
        for n in range(1, 12)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in zip(left, left[1:])), left
    if rank:
        assert left[-1] < 0.99 * left[0]
        assert left[0] < float(torch.linalg.svdvals(w)[rank:].norm()), "S takes some of what a low rank leaves"


def test_without_a_rank_it_is_the_largest_entries_of_each_row():
    w = drawn(6, 10)
    expected = torch.zeros_like(w)
    for row in range(6):
        for j in sorted(range(10), key=lambda j: -abs(float(w[row, j])))[:3]:
            expected[row, j] = w[row, j]
    assert torch.equal(LowRankPlusSparse.from_dense(w, rank=0, density=0.3).dense(), expected)


def test_a_sum_of_the_two_is_found_again():
    low = drawn(60, 2) @ drawn(2, 40, seed=1)
    w = low.scatter_add(1, places(60, 40, 2, seed=2), 20 * drawn(60, 2, seed=3).sign())
    layer = LowRankPlusSparse.from_dense(w, rank=2, density=2 / 40, rounds=50)
    assert (layer.up.weight @ layer.down.weight - low).norm() < 1e-2 * low.norm()
    assert torch.equal(layer.places.long(), places(60, 40, 2, seed=2))


def test_it_computes_under_autocast():
    layer = LowRankPlusSparse.from_dense(drawn(17, 13).float(), rank=3, density=0.2)
    x = drawn(4, 13, seed=1).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), layer(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 4, "density": 0.5}, "rank=4: a matrix of 7 × 3 has 0 to 3"),
        ({"rank": 1, "density": 0.0}, "nonzeros=0: of a row's 3 entries the sparse part stores 1 to all"),
        ({"rank": 1, "density": 1.5}, "nonzeros=4"),
    ],
)
def test_what_it_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        LowRankPlusSparse.from_dense(drawn(7, 3), **options)
