"""SmallDenseSemiSparse against sums written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft import UsageError
from weft.algebra.sparse_coding import SparseCode
from weft.linear import _codes
from weft.linear._structured import empty, stored_bits
from weft.linear.small_dense_semi_sparse import SmallDenseSemiSparse

sides = st.integers(1, 19)


def coded(rows: int, side: int, m: int, k: int, s: int) -> SparseCode:
    """Atoms and codes that are drawn; the last block is as wide as the others, and its rest is of no account."""
    draw, blocks = torch.Generator().manual_seed(0), -(-side // m)
    index = torch.rand(blocks, rows, k, generator=draw).argsort(-1)[..., :s].sort(-1).values
    values = torch.randn(blocks, rows, s, generator=draw, dtype=torch.float64)
    return SparseCode(torch.randn(blocks, k, m, generator=draw, dtype=torch.float64), index, values, [])


def made(out: int, in_: int, m: int, k: int, s: int, axis: str = "in", **how) -> SmallDenseSemiSparse:
    rows, side = (out, in_) if axis == "in" else (in_, out)
    b = torch.randn(out, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return SmallDenseSemiSparse.from_codes(coded(rows, side, m, k, s), in_, out, b, axis=axis, **how)


def written_out(found: SparseCode, side: int) -> Tensor:
    """[S₁·D₁ …] (rows × side), a row and a block after the other."""
    blocks = [
        torch.stack([sum(v * atoms[i] for i, v in zip(*row)) for row in zip(index.tolist(), values)])
        for atoms, index, values in zip(found.atoms, found.index, found.values)
    ]
    return torch.cat(blocks, 1)[:, :side]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sides, sides, st.integers(1, 9), st.sampled_from(["in", "out"]), st.data())
def test_forward_is_the_sum_over_blocks_of_what_a_row_takes(out, in_, k, axis, data):
    rows, side = (out, in_) if axis == "in" else (in_, out)
    m, s = data.draw(st.integers(1, side)), data.draw(st.integers(1, k))
    layer = made(out, in_, m, k, s, axis)
    v = written_out(coded(rows, side, m, k, s), side)
    w = v if axis == "in" else v.mT
    x = torch.randn(2, 3, in_, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.einsum("bsi,oi->bso", x, w) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # where few rows go another way
        torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1], rtol=1e-10, atol=1e-10)
        assert layer(x[:0]).shape == (0, 3, out)
    torch.testing.assert_close(layer.dense(), w, rtol=1e-10, atol=1e-10)
    assert layer(x[0, 0]).shape == (out,)
    (index, values), given = layer.codes(), coded(rows, side, m, k, s)
    assert torch.equal(index, given.index) and torch.equal(values, given.values)
    told = {"block_size": m, "atoms": k, "nonzeros": s, "axis": axis, "bias": True}
    assert layer.spec() == {"kind": "small_dense_semi_sparse", "version": 1, **told}


@pytest.mark.parametrize("axis", ["in", "out"])
def test_gradients_are_those_of_the_dense_formula(axis, monkeypatch):
    monkeypatch.setattr(_codes, "TILE", 5)  # several tiles, the last one narrower
    layer = made(12, 7, 3, 4, 2, axis)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    inputs = (x, layer.atoms, layer.values, layer.shift)
    wanted = torch.randn(4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * wanted).sum(), inputs)
    expected = torch.autograd.grad(((x @ layer.dense().mT + layer.shift) * wanted).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "k, s, bits",
    [
        (8, 4, 24),  # a bit an atom, of three blocks
        (24, 3, 72),  # as many either way
        (24, 2, 48),  # bytes, that count within a block
        (200, 2, 48),
        (257, 2, 96),
    ],
)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_places_are_stored_in_what_is_shorter(k, s, bits, axis):
    layer = made(14, 14, 5, k, s, axis)  # blocks of five, five and four
    assert layer.support.numel() * layer.support.element_size() * 8 == 14 * bits
    assert stored_bits(layer) == 64 * (14 * k + 14 * 3 * s) + 14 * bits
    again = empty(layer.spec(), torch.nn.Linear(14, 14, dtype=torch.float64))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.places, layer.places) and torch.equal(again.dense(), layer.dense())


def test_low_rank_is_a_case_of_it():
    w = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = SmallDenseSemiSparse.from_dense(w, block_size=12, atoms=3, nonzeros=3)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(layer.dense(), u[:, :3] * s[:3] @ vh[:3], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"block_size": 13, "atoms": 3, "nonzeros": 1}, "block_size=13: a block has from 1 to 12 of the inputs"),
        ({"block_size": 21, "atoms": 3, "nonzeros": 1, "axis": "out"}, "block_size=21: a block has from 1 to 20"),
        ({"block_size": 4, "atoms": 3, "nonzeros": 4}, "nonzeros=4, atoms=3: a row takes from 1 to all"),
        ({"block_size": 4, "atoms": 3, "nonzeros": 1, "axis": "both"}, "axis='both': in or out"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        SmallDenseSemiSparse(12, 20, **options)
