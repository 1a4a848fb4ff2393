"""Truncated SVDs against LAPACK in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.algebra.random import generator
from weft.algebra.svd import canonical_signs, rank_for_energy, svd_sketch, svd_top


def matrix(out: int, in_: int, seed: int = 0, values: Tensor | None = None) -> Tensor:
    """A float64 matrix, with the given singular values where there are any."""
    w = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if values is None:
        return w
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    k = len(values)
    return (u[:, :k] * values) @ vh[:k]


def identity_error(m: Tensor) -> float:
    """How far the columns are from orthonormal."""
    return float((m.mT @ m - torch.eye(m.shape[1], dtype=m.dtype)).abs().max())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 23), st.integers(1, 23), st.data())
def test_the_triplets_are_those_of_lapack(out, in_, data):
    r = data.draw(st.integers(1, min(out, in_)))
    w = matrix(out, in_, seed=out * 31 + in_)
    u, s, vh = svd_top(w, r)
    full_u, full_s, full_vh = torch.linalg.svd(w, full_matrices=False)
    assert u.shape == (out, r) and s.shape == (r,) and vh.shape == (r, in_)
    torch.testing.assert_close(s, full_s[:r], rtol=1e-11, atol=1e-12)
    best = (full_u[:, :r] * full_s[:r]) @ full_vh[:r]
    torch.testing.assert_close((u * s) @ vh, best, rtol=1e-9, atol=1e-9)
    assert identity_error(u) < 1e-11 and identity_error(vh.mT) < 1e-11
    assert (vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(17, 11), (11, 17), (13, 13)])
@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-9, 0.0])
def test_small_and_zero_singular_values_keep_the_precision(dtype, error, shape, smallest):
    values = torch.logspace(0, -1, 11, dtype=torch.float64)
    values[6:] *= smallest
    w = matrix(*shape, seed=3, values=values)
    u, s, vh = svd_top(w.to(dtype))
    assert identity_error(u.double()) < error and identity_error(vh.mT.double()) < error
    assert float(((u.double() * s.double()) @ vh.double() - w).norm()) < error
    assert float((s[:11].double() - values).abs().max()) < error
    assert (s.diff() <= 0).all()


def test_a_zero_matrix_has_orthonormal_vectors():
    u, s, vh = svd_top(torch.zeros(5, 3), 2)
    assert not s.any() and identity_error(u) == 0 and identity_error(vh.mT) == 0


def test_energy_picks_the_fewest_triplets():
    w = matrix(9, 6, values=torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert svd_top(w, energy=0.98)[1].numel() == 2  # 101 / 103 = 0.981
    assert svd_top(w, energy=0.99)[1].numel() == 3
    assert svd_top(w)[1].numel() == 6
    assert rank_for_energy(torch.tensor([3.0, 4.0]).flip(0), 0.64) == 1


def test_a_rank_outside_the_matrix_is_refused():
    for r in (0, 4):
        with pytest.raises(ValueError, match="3 × 5"):
            svd_top(torch.ones(3, 5), r)


def test_signs_do_not_depend_on_those_of_the_factors():
    u, _, vh = torch.linalg.svd(matrix(7, 5), full_matrices=False)
    flips = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    one, two = canonical_signs(u, vh), canonical_signs(u * flips, vh * flips[:, None])
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("shape", [(48, 31), (31, 48)])
def test_a_sketch_holds_almost_all_the_energy_and_all_of_a_low_rank_matrix(shape):
    values = torch.linspace(1, 0.6, 31, dtype=torch.float64)  # flat: the hard case
    w = matrix(*shape, values=values)
    u, s, vh = svd_sketch(w, 6, oversample=8, power=2, generator=generator("t"))
    assert identity_error(u) < 1e-12 and identity_error(vh.mT) < 1e-12
    captured = (u.mT @ w @ vh.mT).diagonal().square().sum()
    assert captured > 0.95 * values[:6].square().sum()
    low = matrix(*shape, values=values[:4])
    u, s, vh = svd_sketch(low, 4, oversample=2, power=1, generator=generator("t"))
    torch.testing.assert_close((u * s) @ vh, low, rtol=1e-10, atol=1e-10)
    again = svd_sketch(low, 4, oversample=2, power=1, generator=generator("t"))
    assert torch.equal(u, again[0])
