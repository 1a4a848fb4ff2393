"""Spectral against matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import UsageError
from weft.linear._structured import stored_bits
from weft.linear.spectral import Spectral

sides = st.integers(1, 23)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(out=sides, in_=sides, rank=sides, bias=st.booleans(), seed=st.integers(0, 9))
def test_forward_is_the_product_of_the_three(out, in_, rank, bias, seed):
    rank = min(rank, out, in_)
    u, s, vh = drawn(out, rank, seed=seed), drawn(rank, seed=seed + 1), drawn(rank, in_, seed=seed + 2)
    b, x = drawn(out, seed=seed + 3) if bias else None, drawn(2, 3, in_, seed=seed + 4)
    layer = Spectral.from_factors(u, s, vh, b)
    w = torch.einsum("or,r,ri->oi", u, s, vh)
    expected = torch.einsum("bsi,oi->bso", x, w) + (0 if b is None else b)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer.dense(), w, rtol=1e-10, atol=1e-10)
    assert stored_bits(layer) == 64 * rank * (in_ + out + 1)
    assert stored_bits(layer, bias=True) == 64 * (rank * (in_ + out + 1) + bias * out)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_from_dense_are_the_largest_singular_triplets(rank):
    w = drawn(17, 11)
    layer, spectrum = Spectral.from_dense(w, rank=rank), torch.linalg.svdvals(w)
    assert torch.allclose(layer.values, spectrum[:rank])
    assert torch.allclose((layer.dense() - w).norm(), spectrum[rank:].norm(), atol=1e-10)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(layer.up.weight.mT @ layer.up.weight, eye, atol=1e-10)
    assert torch.allclose(layer.down.weight @ layer.down.weight.mT, eye, atol=1e-10)


def test_the_gradient_of_a_singular_value_is_that_of_its_component():
    w, x, y = drawn(7, 5), drawn(9, 5, seed=1), drawn(9, 7, seed=2)
    layer = Spectral.from_dense(w, rank=3)
    (layer(x) * y).sum().backward()
    u, vh = layer.up.weight.detach(), layer.down.weight.detach()
    expected = torch.stack([(y * torch.outer(x @ vh[i], u[:, i])).sum() for i in range(3)])
    assert torch.allclose(layer.values.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank):
    with pytest.raises(UsageError, match=f"rank={rank}: a matrix of 7 × 3 has 1 to 3"):
        Spectral.from_dense(drawn(7, 3), rank=rank)
