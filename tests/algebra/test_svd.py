"""Truncated SVDs, weighted ones too, against LAPACK in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.algebra import gram
from weft.algebra.gram import over_root, root, times_root
from weft.algebra.random import generator
from weft.algebra.svd import (
    canonical_signs,
    leading_vectors,
    rank_for_energy,
    singular_values,
    svd_sketch,
    svd_stack,
    svd_top,
    weighted_svd,
)


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


@pytest.mark.parametrize("sides", [(7, 4), (4, 7)])
@pytest.mark.parametrize("count", [1, 5])
def test_a_stack_is_cut_to_what_one_of_its_matrices_needs(count, sides):
    spectra = torch.tensor([[3.0, 2.0, 1.0, 0.0], [5.0, 0.5, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    w = torch.stack([matrix(*sides, seed=i, values=spectra[i % 3]) for i in range(count)])
    torch.testing.assert_close(singular_values(w), spectra[torch.arange(count) % 3], rtol=1e-7, atol=1e-7)
    for energy, of_one, of_all in ((0.6, 1, 3), (0.9, 2, 4), (0.93, 3, 4), (1.0, 4, 4)):
        u, s, vh = svd_stack(w, energy=energy)
        k = of_one if count == 1 else of_all
        assert u.shape == (count, sides[0], k) and s.shape == (count, k) and vh.shape == (count, k, sides[1])
        for i in range(count):
            left, values, right = torch.linalg.svd(w[i], full_matrices=False)
            best = (left[:, :k] * values[:k]) @ right[:k]
            torch.testing.assert_close((u[i] * s[i]) @ vh[i], best, rtol=1e-9, atol=1e-9)
            assert identity_error(u[i]) < 1e-11 and identity_error(vh[i].mT) < 1e-11
            assert (vh[i].gather(1, vh[i].abs().argmax(1, keepdim=True)) > 0).all()
    assert svd_stack(w, 2)[1].shape == (count, 2)


def test_a_rank_outside_the_matrix_is_refused():
    for r in (0, 4):
        with pytest.raises(ValueError, match="3 × 5"):
            svd_top(torch.ones(3, 5), r)
        with pytest.raises(ValueError, match="3 × 5"):
            svd_stack(torch.ones(2, 3, 5), r)


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


# --- weighted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(80, 60), (60, 80), (300, 60)])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-6, 0.0])
@pytest.mark.parametrize("size", [1.0, 1e-10])
def test_power_steps_hold_the_energy_in_orthonormal_columns(dtype, error, shape, smallest, size):
    """Also of matrices whose small directions float32 cannot tell from rounding."""
    values = size * (torch.linspace(1, 0, 60) if not smallest else torch.logspace(0, math.log10(smallest), 60)).double()
    values = values * (values > 0.9 * size) if not smallest else values  # six directions, fewer than are wanted
    w = matrix(*shape, values=values)
    r = 12
    far = matrix(shape[1], r, seed=1)
    near = torch.linalg.svd(w).Vh[:r].mT + 0.1 * far
    for start in (None, *(torch.linalg.qr(x).Q.to(dtype) for x in (far, near))):
        found = leading_vectors(w.to(dtype), r, start=start, generator=generator(0)).double()
        assert identity_error(found) < error
        assert (w @ found).square().sum() > 0.99 * values[:r].square().sum()


def weight(kind: str, d: int, seed: int) -> Tensor | None:
    """None, positive weights, or a Gram matrix of rows whose scales differ by up to a hundred."""
    if kind == "none":
        return None
    scales = torch.logspace(-1, 1, d, dtype=torch.float64)
    if kind == "vector":
        return scales.square()
    x = matrix(2 * d, d, seed) * scales
    return x.mT @ x


def dense_root(g: Tensor | None, d: int) -> Tensor:
    """The symmetric root of a weight (d × d): another one than the code's."""
    if g is None:
        return torch.eye(d, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(g if g.dim() == 2 else g.diag())
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def objective(w: Tensor, b: Tensor, a: Tensor, left: Tensor | None, right: Tensor | None) -> float:
    return float((dense_root(left, len(w)) @ (w - b @ a) @ dense_root(right, w.shape[1])).norm())


KINDS = st.sampled_from(["none", "vector", "matrix"])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 14), st.integers(1, 14), KINDS, KINDS, st.sampled_from(["left", "right", "even"]), st.data())
def test_weighted_factors_are_the_best_of_their_rank(out, in_, left_kind, right_kind, split, data):
    r = data.draw(st.integers(0, min(out, in_)))
    w, left, right = matrix(out, in_, 5), weight(left_kind, out, 1), weight(right_kind, in_, 2)
    decomposed = weighted_svd(w, left=left, right=right)
    b, a = decomposed.factors(r, split=split)
    assert b.shape == (out, r) and a.shape == (r, in_)
    s = torch.linalg.svdvals(dense_root(left, out) @ w @ dense_root(right, in_))
    torch.testing.assert_close(decomposed.spectrum, s, rtol=1e-9, atol=1e-10)
    best = float(s[r:].square().sum().sqrt())
    assert objective(w, b, a, left, right) == pytest.approx(best, rel=1e-7, abs=1e-8)
    assert decomposed.error(r) == pytest.approx(best, rel=1e-7, abs=1e-8)
    if r == min(out, in_):  # the layer itself, whatever the weights
        assert float((b @ a - w).norm()) < 1e-10 * float(w.norm())


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (9, 9)])
@pytest.mark.parametrize("kinds", itertools.product(["none", "vector", "matrix"], repeat=2))
def test_the_split_says_where_the_singular_values_are(shape, kinds):
    w, left, right = matrix(*shape, 1), weight(kinds[0], shape[0], 1), weight(kinds[1], shape[1], 2)
    decomposed = weighted_svd(w, left=left, right=right)
    s = decomposed.spectrum[:4]
    products = []
    for split, in_b, in_a in (("left", s.square(), s**0), ("right", s**0, s.square()), ("even", s, s)):
        b, a = decomposed.factors(4, split=split)
        b, a = dense_root(left, shape[0]) @ b, a @ dense_root(right, shape[1])
        torch.testing.assert_close(b.mT @ b, in_b.diag(), rtol=1e-8, atol=1e-9 * float(in_b[0]))
        torch.testing.assert_close(a @ a.mT, in_a.diag(), rtol=1e-8, atol=1e-8 * float(in_a[0]))
        products.append(b @ a)
    torch.testing.assert_close(products[0], products[1], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(products[0], products[2], rtol=1e-12, atol=1e-10)


def test_a_vector_is_a_diagonal_matrix_and_the_scale_of_a_weight_is_nothing():
    w, f = matrix(6, 9), torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, a = weighted_svd(w, right=f).factors(3)
    for same in (f.diag(), 1e-9 * f):
        other_b, other_a = weighted_svd(w, right=same).factors(3)
        torch.testing.assert_close(other_b @ other_a, b @ a, rtol=1e-9, atol=1e-9)
    b, a = weighted_svd(w, right=torch.full((9,), 0.3)).factors(3)
    u, s, vh = torch.linalg.svd(w)
    torch.testing.assert_close(b @ a, (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-9, atol=1e-9)


def test_the_transposed_problem_has_the_transposed_factors():
    w, left, right = matrix(6, 9), weight("matrix", 6, 1), weight("vector", 9, 2)
    b, a = weighted_svd(w, left=left, right=right).factors(2, split="left")
    other_b, other_a = weighted_svd(w.mT, left=right, right=left).factors(2, split="right")
    torch.testing.assert_close(other_a.mT, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other_b.mT, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", [(8, 13), (13, 8), (8, 8)])
@pytest.mark.parametrize("form", ["dead vector", "dead matrix", "few rows", "zero"])
@pytest.mark.parametrize("split", ["left", "right", "even"])
def test_weights_that_are_singular(dtype, error, shape, form, split):
    """At full rank the layer itself, below it no error where the weight sees none."""
    w, d = matrix(*shape, 4).to(dtype), shape[1]
    x = matrix(3 if form == "few rows" else 4 * d, d, 6)
    if "dead" in form:
        x[:, ::2] = 0
    if form == "zero":
        x = torch.zeros(1, d, dtype=torch.float64)
    right = x.square().sum(0) if form == "dead vector" else x.mT @ x
    decomposed = weighted_svd(w, right=right)
    b, a = decomposed.factors(min(shape), split=split)
    assert float((b @ a - w).norm()) < error * float(w.norm())
    if form != "zero":
        live = int((right if form == "dead vector" else torch.linalg.eigvalsh(right)).gt(1e-9).sum())
        b, a = decomposed.factors(min(live, *shape), split=split)
        assert torch.isfinite(b).all() and torch.isfinite(a).all()
        seen = torch.diag(right.sqrt()) if form == "dead vector" else x.mT
        assert float(((b @ a - w).double() @ seen).norm()) < 1e-4 * float((w.double() @ seen).norm())


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(17, 11), (11, 17), (13, 13)])
@pytest.mark.parametrize("smallest", [1.0, 1e-5, 1e-9, 0.0])
def test_a_matrix_of_deficient_rank_is_cut_exactly(dtype, error, shape, smallest):
    values = torch.cat([torch.logspace(0, -1, 4, dtype=torch.float64), torch.full((3,), 0.05 * smallest)])
    w = matrix(*shape, seed=3, values=values)
    decomposed = weighted_svd(w.to(dtype))
    for r, split in itertools.product((4, 7, 11), ("left", "right", "even")):
        b, a = decomposed.factors(r, split=split)
        assert b.dtype == a.dtype == dtype
        best = float(values[r:].square().sum().sqrt())
        assert float((b.double() @ a.double() - w).norm()) < best * 1.001 + error


def test_a_half_precision_matrix_has_factors_of_its_precision():
    w = matrix(12, 20).to(torch.bfloat16)
    narrow, wide = weighted_svd(w).factors(5), weighted_svd(w.float()).factors(5)
    assert all(torch.equal(one, other.to(torch.bfloat16)) for one, other in zip(narrow, wide))


def test_a_zero_matrix_has_zero_factors():
    for shape in ((3, 5), (5, 3)):
        decomposed = weighted_svd(torch.zeros(shape), right=torch.ones(shape[1]))
        b, a = decomposed.factors(2)
        assert not decomposed.spectrum.any() and torch.equal(b @ a, torch.zeros(shape))
        assert torch.isfinite(b).all() and torch.isfinite(a).all()


@pytest.mark.parametrize("shape", [(160, 300), (300, 160)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_small_rank_comes_from_a_sketch_that_is_almost_the_best(shape, weighted):
    values = torch.arange(1, 161, dtype=torch.float64) ** -0.5 + 0.05
    w = matrix(*shape, 7, values).float()
    right = weight("matrix", shape[1], 2) if weighted else None
    exact, sketched = weighted_svd(w, right=right), weighted_svd(w, right=right, rank=8)
    assert len(exact.spectrum) == 160 and len(sketched.spectrum) == 8
    for r in (0, 3, 8):
        b, a = sketched.factors(r)
        found = objective(w.double(), b.double(), a.double(), None, right)
        assert found <= 1.02 * exact.error(r) and sketched.error(r) == pytest.approx(found, rel=1e-4)
    again = weighted_svd(w, right=right, rank=8).factors(8)
    assert torch.equal(again[0], sketched.factors(8)[0]) and torch.equal(again[1], sketched.factors(8)[1])


@pytest.mark.parametrize("smallest", [-1.0, -2.5, -4.0, -5.0])
@pytest.mark.parametrize("rank", [None, 40])
def test_what_float32_rounds_away_is_found_in_float64(smallest, rank):
    """From spectra that float32 holds when squared to those that it does not."""
    values = torch.logspace(0, smallest, 60, dtype=torch.float64)
    w = matrix(60, 90, 8, values).float()
    decomposed, s = weighted_svd(w, rank=rank), torch.linalg.svdvals(w.double())
    for r in (20, 40, 59)[: 3 if rank is None else 2]:
        u = decomposed.factors(r, split="right")[0].double()
        rest = w.double() - u @ (u.mT @ w.double())
        best = float(s[r:].square().sum().sqrt())
        assert float(rest.norm()) <= 1.001 * best
        assert decomposed.error(r) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("rank", [None, 4])
def test_threads_change_nothing_but_the_rounding(rank):
    w, found, threads = matrix(96, 150, 2).float(), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(weighted_svd(w, right=weight("matrix", 150, 1), rank=rank).factors(4))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 4}, "3 × 5"),
        ({"right": torch.ones(3)}, r"right of \(3,\)"),
        ({"left": torch.ones(3, 5)}, r"left of \(3, 5\)"),
        ({"left": torch.tensor([1.0, -1.0, 1.0])}, "semi-definite"),
        ({"left": torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])}, "semi-definite"),
        ({"left": torch.tensor([1.0, float("nan"), 1.0])}, "finite"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        weighted_svd(matrix(3, 5), **bad)


def test_a_matrix_that_is_not_finite_and_ranks_that_were_not_computed_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        weighted_svd(torch.full((2, 3), float("inf")))
    decomposed = weighted_svd(matrix(3, 5), rank=2)
    for bad in (lambda: decomposed.factors(3), lambda: decomposed.error(-1), lambda: decomposed.error(4)):
        with pytest.raises(ValueError, match=r"is not within 0\.\.[23]"):
            bad()
    with pytest.raises(ValueError, match="split='both'"):
        decomposed.factors(1, split="both")


def test_the_smallest_ridge_that_succeeds():
    g = weight("matrix", 5, 1)
    assert g is not None
    torch.testing.assert_close(root(g), torch.linalg.cholesky(g), rtol=0, atol=0)
    almost = torch.diag(torch.tensor([1.0, 1e-13]).double())  # it has a factor, whose inverse would be rounding
    for singular in (g.new_ones(5, 5), torch.diag(torch.tensor([1.0, 0.0]).double()), torch.zeros(3, 3), almost):
        c = root(singular)
        ridge = 1e-10 * (singular.diagonal() + (singular.diagonal().mean() if singular.any() else 1.0))
        torch.testing.assert_close(c @ c.mT, singular.double() + ridge.diag(), rtol=0, atol=1e-14)
    torch.testing.assert_close(root(torch.tensor([4.0, 9.0])), torch.tensor([2.0, 3.0]).double(), rtol=0, atol=0)


@pytest.mark.parametrize("block", [2, 3, 512])
@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
def test_products_with_a_root_and_back(monkeypatch, block, kind):
    monkeypatch.setattr(gram, "BLOCK", block)
    x, g = matrix(7, 4, 1), weight(kind, 7, 2)
    c = None if g is None else root(g)
    y = times_root(x, c)
    dense = torch.eye(7, dtype=torch.float64) if g is None else (g if g.dim() == 2 else g.diag())
    torch.testing.assert_close(y.mT @ y, x.mT @ dense @ x, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(over_root(y, c), x, rtol=1e-9, atol=1e-9)
