"""The transforms against dense matrices written out from their definitions."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor

from weft.algebra import hadamard
from weft.algebra.transforms import Transform, _wht_sizes, dct, dwt, wht


def dense(t: Transform) -> Tensor:
    """C, from what it does to the unit vectors."""
    return t.forward(torch.eye(t.n, dtype=torch.float64)).mT


SIZES = st.integers(1, 70)


@settings(max_examples=60, deadline=None)
@given(n=SIZES, kind=st.sampled_from([dct, wht]), seed=st.integers(0, 9))
def test_orthonormal_and_undone_by_the_inverse(n: int, kind, seed: int) -> None:
    t = kind(n)
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(t.inverse(t.forward(x)), x, atol=1e-12)
    assert torch.allclose(t.forward(t.inverse(x)), x, atol=1e-12)
    c = dense(t)
    assert torch.allclose(c @ c.mT, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(t.forward(x), x @ c.mT, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13, 36, 37, 64])
def test_cosine_is_its_definition(n: int) -> None:
    exact = torch.tensor(
        [[math.cos((2 * j + 1) * i * math.pi / (2 * n)) for j in range(n)] for i in range(n)], dtype=torch.float64
    ) * math.sqrt(2 / n)
    exact[0] /= math.sqrt(2)
    assert torch.allclose(dense(dct(n)), exact, atol=1e-13)


@pytest.mark.parametrize("n", [2, 16, 128, 1024])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    assert torch.allclose(dense(wht(n)) * math.sqrt(n), torch.from_numpy(scipy_hadamard(n)).double(), atol=1e-10)


@pytest.mark.parametrize("order", [4 * odd for odd in range(3, 46, 2)])
def test_every_order_up_to_180_that_is_four_times_odd(order: int) -> None:
    h = hadamard.matrix(order)
    assert h is not None and set(h.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(h @ h.mT, order * torch.eye(order))
    assert hadamard.split(order * 8) == (order, 3)


def test_orders_without_a_matrix() -> None:
    assert [hadamard.matrix(n) for n in (3, 6, 37, 188)] == [None] * 4
    assert hadamard.split(11008) == (172, 6) and hadamard.split(188) == (47, 2)


@pytest.mark.parametrize("n", [12, 24, 40, 11008])
def test_a_hadamard_transform_has_entries_of_one_size(n: int) -> None:
    unit = torch.zeros(1, n, dtype=torch.float64)
    unit[0, n // 3] = 1.0
    row = wht(n).inverse(unit)
    assert torch.allclose(row.abs() * math.sqrt(n), torch.ones(1, n, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("n", [37, 1021, 2 * 509, 4 * 1021, 11008])
def test_large_odd_factors_are_fast_and_orthonormal(n: int) -> None:
    t = wht(n)
    block, parts = _wht_sizes(n)
    assert block * math.prod(parts) == n and max(parts, default=1) <= hadamard.LARGEST  # nothing dense is large
    assert (block > 1) == (n not in (37, 11008))
    x, y = torch.randn(2, 3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    for apply, transpose in ((t.forward, t.inverse), (t.inverse, t.forward)):
        assert apply(x).shape == x.shape
        assert torch.allclose(transpose(apply(x)), x, atol=1e-11)
        assert torch.allclose(apply(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12)
        assert torch.allclose((apply(x) * y).sum(), (x * transpose(y)).sum(), atol=1e-9)
    assert torch.allclose(t.forward(x.float()).double(), t.forward(x), atol=1e-5)


def test_a_large_odd_factor_is_a_cosine_transform() -> None:
    n, k = 4 * 191, 191
    signs = torch.from_numpy(scipy_hadamard(4)).double() / 2
    assert torch.allclose(dense(wht(n)), torch.kron(dense(dct(k)).contiguous(), signs), atol=1e-12)


@pytest.mark.parametrize(("wavelet", "levels", "n"), [("haar", 1, 6), ("haar", 3, 24), ("db2", 1, 10), ("db3", 2, 12)])
def test_wavelets_are_pywavelets(wavelet: str, levels: int, n: int) -> None:
    import pywt

    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = dwt(n, wavelet, levels)
    c = dense(t)
    assert torch.allclose(c @ c.mT, torch.eye(n, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(t.inverse(t.forward(x)), x, atol=1e-10)
    theirs = pywt.wavedec(x.numpy(), wavelet, mode="periodization", level=levels)
    if wavelet == "haar":  # longer filters start at another place there
        assert torch.allclose(t.forward(x), torch.from_numpy(numpy.concatenate(theirs)), atol=1e-12)


def test_refused_wavelets() -> None:
    with pytest.raises(ValueError, match="'bior2.2' is not orthogonal"):
        dwt(8, "bior2.2")
    with pytest.raises(ValueError, match=r"size 6 is not divisible by 2\^2"):
        dwt(6, "haar", 2)


@pytest.mark.parametrize("t", [dct(12), dct(7), wht(12), wht(7), dwt(12, "db2")], ids=lambda t: f"{t.name}{t.n}")
def test_gradients_to_the_second_order(t: Transform) -> None:
    x = torch.randn(2, t.n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(t.forward, x) and torch.autograd.gradgradcheck(t.inverse, x)


def test_bfloat16_is_one_rounding_of_float32() -> None:
    x = torch.randn(4, 48).bfloat16()
    for t in (dct(48), wht(48), dwt(48)):
        assert torch.equal(t.forward(x), t.forward(x.float()).bfloat16())
