"""LowRank against matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import UsageError
from weft.linear._structured import stored_bits
from weft.linear.low_rank import LowRank

sides = st.integers(1, 23)


@settings(max_examples=40, deadline=None)
@given(out=sides, in_=sides, rank=st.integers(0, 23), bias=st.booleans(), seed=st.integers(0, 9))
def test_forward_is_the_product_of_the_factors(out, in_, rank, bias, seed):
    rank = min(rank, out, in_)
    draw = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=draw, dtype=torch.float64)
    down = torch.randn(rank, in_, generator=draw, dtype=torch.float64)
    b = torch.randn(out, generator=draw, dtype=torch.float64) if bias else None
    x = torch.randn(2, 3, in_, generator=draw, dtype=torch.float64)
    expected = torch.einsum("bsi,ri,or->bso", x, down, up) + (0 if b is None else b)
    layer = LowRank.from_factors(up, down, b)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer.dense(), torch.einsum("or,ri->oi", up, down), rtol=1e-10, atol=1e-10)
    assert (layer.in_features, layer.out_features, layer.rank) == (in_, out, rank)
    assert stored_bits(layer) == 64 * rank * (in_ + out)
    assert stored_bits(layer, bias=True) == 64 * (rank * (in_ + out) + bias * out)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_from_dense_leaves_the_tail_of_the_spectrum(rank):
    w = torch.randn(17, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = (LowRank.from_dense(w, rank=rank).dense() - w).norm()
    assert torch.allclose(left, torch.linalg.svdvals(w)[rank:].norm(), atol=1e-10)


def test_its_factors_are_evenly_large():
    w = torch.randn(17, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = LowRank.from_dense(w, rank=5)
    assert torch.allclose(layer.up.weight.norm(dim=0), layer.down.weight.norm(dim=1))


def test_it_shares_nothing_with_what_it_was_made_from():
    up, down, b = torch.ones(3, 2), torch.ones(2, 4), torch.ones(3)
    layer = LowRank.from_factors(up, down, b)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert up.sum() == 6 and down.sum() == 8 and b.sum() == 3


def test_factors_can_be_rounded_to_another_dtype():
    layer = LowRank.from_factors(torch.ones(3, 2).double(), torch.ones(2, 4).double(), dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} and layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank):
    with pytest.raises(UsageError, match=f"rank={rank}: a matrix of 7 × 3 has 0 to 3"):
        LowRank(3, 7, rank=rank)


def test_rank_zero_learns_its_bias():
    layer = LowRank.from_dense(torch.ones(3, 2), torch.tensor([1.0, 2.0, 3.0]), rank=0)
    y = layer(torch.ones(5, 2))
    assert torch.equal(y, torch.tensor([1.0, 2.0, 3.0]).expand(5, 3))
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 5.0))
