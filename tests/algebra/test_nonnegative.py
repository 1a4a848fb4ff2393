"""Semi-NMF and NMF against their updates entry by entry, and against what bounds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import NMF
from torch import Tensor

from weft.algebra.nonnegative import REPEATS, nmf, semi_nmf

sides = st.tuples(st.integers(1, 9), st.integers(1, 8))


def drawn(out: int, in_: int, seed: int = 0) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(w: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    return float((w - factors[0] @ factors[1]).square().sum())


def tail(w: Tensor, r: int) -> float:
    """What the nearest matrix of rank r leaves."""
    return float(torch.linalg.svdvals(w)[r:].square().sum())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sides, st.data())
def test_semi_nmf_is_between_the_nearest_of_its_rank_and_of_one_less(shape, data):
    w, r = drawn(*shape, seed=sum(shape)), data.draw(st.integers(1, min(shape)))
    errors = []
    for iterations in (0, 1, 2, 5, 20):
        u, v = semi_nmf(w, r, iterations=iterations)
        assert u.shape == (shape[0], r) and v.shape == (r, shape[1]) and bool((u >= 0).all())
        torch.testing.assert_close(v, torch.linalg.pinv(u) @ w, rtol=1e-5, atol=1e-6)
        errors.append(error(w, (u, v)))
    slack = 1e-9 * float(w.square().sum())
    assert tail(w, r) - slack <= errors[-1] and errors[0] <= tail(w, r - 1) + slack
    assert all(later <= earlier + slack for earlier, later in zip(errors, errors[1:]))


def test_an_update_of_semi_nmf_is_the_paper_s():
    w, r = drawn(6, 7), 3
    u, v = semi_nmf(w, r, iterations=0)
    expected = u.clone()
    for i in range(6):
        for k in range(r):
            wanted = sum(w[i, j] * v[k, j] for j in range(7))
            grams = [sum(v[k, j] * v[l, j] for j in range(7)) for l in range(r)]
            more = max(wanted, 0) + sum(u[i, l] * max(-g, 0) for l, g in enumerate(grams))
            less = max(-wanted, 0) + sum(u[i, l] * max(g, 0) for l, g in enumerate(grams))
            expected[i, k] = u[i, k] * (more / less) ** 0.5
    torch.testing.assert_close(semi_nmf(w, r, iterations=1)[0], expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sides, st.data())
def test_nmf_never_goes_away_from_w(shape, data):
    w, r = drawn(*shape, seed=sum(shape)).abs(), data.draw(st.integers(1, min(shape)))
    errors = []
    for iterations in (0, 1, 2, 5, 20):
        u, v = nmf(w, r, iterations=iterations)
        assert u.shape == (shape[0], r) and v.shape == (r, shape[1]) and bool((u >= 0).all() and (v >= 0).all())
        errors.append(error(w, (u, v)))
    slack = 1e-9 * float(w.square().sum())
    assert all(later <= earlier + slack for earlier, later in zip(errors, errors[1:]))
    assert tail(w, r) <= errors[-1] + slack
    if r == 1:  # the first singular pair of such a matrix has no negative entry
        assert errors[-1] <= tail(w, 1) + 1e-6 * float(w.square().sum())


def test_an_update_of_nmf_is_lee_s_and_seung_s_repeated():
    w, r = drawn(5, 6).abs(), 2
    u, v = nmf(w, r, iterations=0)
    for _ in range(REPEATS):
        v = torch.stack([torch.stack([v[k, j] * (u[:, k] @ w[:, j]) / (u[:, k] @ u @ v[:, j]) for j in range(6)])
                         for k in range(r)])  # fmt: skip
    for _ in range(REPEATS):
        u = torch.stack([torch.stack([u[i, k] * (w[i] @ v[k]) / (u[i] @ v @ v[k]) for k in range(r)])
                         for i in range(5)])  # fmt: skip
    for found, expected in zip(nmf(w, r, iterations=1), (u, v)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_nmf_begins_at_the_larger_side_of_each_singular_pair():
    w, r = drawn(7, 5).abs(), 3
    full_u, s, vh = torch.linalg.svd(w)
    u, v = nmf(w, r, iterations=0)
    for k in range(r):
        a, b, left, right = u[:, k], v[k], full_u[:, k], vh[k]
        plus, minus = (float((x * left).clamp(min=0).norm() * (x * right).clamp(min=0).norm()) for x in (1, -1))
        sign = 1 if plus >= minus else -1
        for found, whole in ((a, left), (b, right)):
            kept = sign * whole * s[k].sqrt() > found.min()
            torch.testing.assert_close(found[kept], (sign * whole * s[k].sqrt())[kept], rtol=1e-8, atol=1e-10)
            assert float(found.min()) > 0


@pytest.mark.parametrize("iterations", [10, 100])
def test_nmf_comes_nearer_than_scikit_learn_s_by_as_many_products(iterations):
    w = drawn(40, 6).abs() @ drawn(6, 30, seed=1).abs() + 0.1 * drawn(40, 30, seed=2).abs()
    other = NMF(6, init="nndsvda", solver="mu", max_iter=iterations, tol=0).fit(w.numpy())
    assert error(w, nmf(w, 6, iterations=iterations)) < other.reconstruction_err_**2


@pytest.mark.parametrize("find", [semi_nmf, nmf])
@pytest.mark.parametrize("w", [torch.zeros(5, 4), torch.ones(4, 5), torch.eye(4)], ids=["zero", "ones", "identity"])
def test_odd_matrices_have_finite_factors(find, w):
    u, v = find(w, 2, iterations=4)
    assert u.dtype == torch.float32 and torch.isfinite(u).all() and torch.isfinite(v).all()
    assert error(w, (u, v)) <= float(w.square().sum())


def test_a_negative_entry_is_no_part_of_an_nmf():
    with pytest.raises(ValueError, match="negative entries"):
        nmf(torch.tensor([[1.0, -1e-9]]), 1, iterations=1)
