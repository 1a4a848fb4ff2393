"""Orthogonal matching pursuit and K-SVD against textbook loops in float64."""

from __future__ import annotations

import pytest
import textbook_ksvd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.algebra import sparse_coding
from weft.algebra.bits import pack, unpack
from weft.algebra.random import generator
from weft.algebra.sparse_coding import (
    best_atoms,
    fitted,
    ksvd,
    omp,
    optimal_directions,
    reseeded,
    spread,
    starting_atoms,
    sweep,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def pursue(y: Tensor, atoms: Tensor, s: int) -> tuple[Tensor, Tensor]:
    return omp(atoms @ atoms.mT, y @ atoms.mT, s)


def error(y: Tensor, atoms: Tensor, index: Tensor, values: Tensor) -> float:
    return float((y - spread(index, values, len(atoms)) @ atoms).square().sum())


# --- pursuit ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 14), st.data())
def test_all_signals_at_once_are_the_textbook_loop(n, d, k, data):
    s = data.draw(st.integers(1, min(d, k)))
    y, atoms = drawn(n, d, seed=n), unit(drawn(k, d, seed=n + 1))
    index, values = pursue(y, atoms, s)
    for row in range(n):
        taken, amounts = textbook_ksvd.omp(y[row], atoms, s)
        assert index[row].tolist() == taken
        torch.testing.assert_close(values[row], amounts, rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 14), st.data())
def test_what_is_left_is_orthogonal_to_the_atoms_taken_and_falls_with_each(n, d, k, data):
    s = data.draw(st.integers(1, min(d, k)))
    y, atoms = drawn(n, d, seed=n), unit(drawn(k, d, seed=d))
    lengths = [y.norm(dim=1)]
    for t in range(1, s + 1):
        index, values = pursue(y, atoms, t)
        assert all(len(set(row)) == t for row in index.tolist())
        rest = y - spread(index, values, k) @ atoms
        assert float((rest[:, None] @ atoms[index].mT).abs().max()) < 1e-9
        lengths.append(rest.norm(dim=1))
        assert bool((lengths[-1] <= lengths[-2] + 1e-9).all())


def test_sparse_signals_are_recovered_exactly():
    """An orthonormal basis and its Hadamard transform: coherence 1/8, so up to 4 atoms are found for certain."""
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    atoms = torch.cat([torch.eye(64, dtype=torch.float64), sylvester / 8])
    order = torch.rand(200, 128, generator=generator("order")).argsort(1)[:, :4]
    planted = spread(order, drawn(200, 4).sign() * (1 + drawn(200, 4, seed=1).abs()), 128)
    index, values = pursue(planted @ atoms, atoms, 4)
    torch.testing.assert_close(spread(index, values, 128), planted, rtol=1e-10, atol=1e-11)
    index, values = pursue(planted @ atoms, atoms, 9)  # more than there are: the rest is zero, not noise
    torch.testing.assert_close(spread(index, values, 128), planted, rtol=1e-10, atol=1e-11)
    assert int((values != 0).sum(1).max()) == 4 and all(len(set(row)) == 9 for row in index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_taken_twice_from_equal_atoms_or_for_nothing(dtype):
    atoms = unit(drawn(3, 5)).to(dtype).repeat(4, 1)  # 12 atoms of rank 3
    y = torch.cat([drawn(6, 5, seed=1).to(dtype), torch.zeros(1, 5, dtype=dtype)])
    index, values = pursue(y, atoms, 8)
    assert all(len(set(row)) == 8 for row in index.tolist())
    assert torch.isfinite(values).all() and not values[-1].any()
    assert int((values != 0).sum(1).max()) == 3
    best = y - y @ torch.linalg.pinv(atoms[:3]) @ atoms[:3]
    torch.testing.assert_close(y - spread(index, values, 12) @ atoms, best, rtol=0, atol=1e-5)


def test_blocks_of_signals_change_nothing(monkeypatch):
    y, atoms = drawn(50, 9), unit(drawn(12, 9, seed=1))
    whole = pursue(y, atoms, 5)
    monkeypatch.setattr(sparse_coding, "BLOCK", 1)
    parts = pursue(y, atoms, 5)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("s", [0, 4])
def test_a_count_that_the_atoms_do_not_allow_is_refused(s):
    with pytest.raises(ValueError, match=f"nonzeros={s}: 3 atoms allow 1 to 3"):
        pursue(drawn(2, 5), unit(drawn(3, 5)), s)


# --- dictionaries -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(2, 9), st.integers(1, 12), st.integers(1, 4), st.data())
def test_a_sweep_never_raises_the_error_and_keeps_the_places(n, d, k, power, data):
    s = data.draw(st.integers(1, min(d, k)))
    y, atoms = drawn(n, d, seed=n), unit(drawn(k, d, seed=d))
    index, values = pursue(y, atoms, s)
    before = error(y, atoms, index, values)
    kept = atoms.clone(), values.clone()
    for _ in range(3):
        atoms, values = sweep(y, atoms, index, values, power=power)
        after = error(y, atoms, index, values)
        assert after <= before * (1 + 1e-12) + 1e-20
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(k, dtype=y.dtype))
        before = after
    again = pursue(y, kept[0], s)
    assert torch.equal(again[0], index) and torch.equal(again[1], kept[1]), "its arguments are as they were"


def test_with_many_power_iterations_it_is_the_textbook_sweep():
    y, atoms = drawn(40, 7), unit(drawn(9, 7, seed=1))
    index, values = pursue(y, atoms, 3)
    found, values = sweep(y, atoms, index, values, power=1000)
    expected, codes = textbook_ksvd.sweep(y, atoms, spread(index, pursue(y, atoms, 3)[1], 9))
    signs = (found * expected).sum(1).sign()  # of singular pairs
    torch.testing.assert_close(found, signs[:, None] * expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(spread(index, values, 9), signs * codes, rtol=1e-7, atol=1e-8)


def test_one_power_iteration_does_most_of_it():
    y, atoms = drawn(40, 7), unit(drawn(9, 7, seed=1))
    index, values = pursue(y, atoms, 3)
    start = error(y, atoms, index, values)
    one, many = (error(y, a, index, v) for a, v in (sweep(y, atoms, index, values, power=p) for p in (1, 1000)))
    assert start - one > 0.5 * (start - many) > 0


def test_an_atom_that_nobody_takes_becomes_the_signal_that_lacks_most():
    y = torch.cat([drawn(30, 6), 50 * drawn(1, 6, seed=2), 0 * drawn(1, 6)])
    atoms = unit(drawn(5, 6, seed=1))
    index = torch.tensor([[0, 1]]).expand(32, 2)  # atoms 2, 3 and 4 are idle
    values = torch.linalg.lstsq(atoms[:2].mT, y.mT).solution.mT
    found, new = sweep(y, atoms, index, values)
    lacks = (y - new @ found[:2]).norm(dim=1)
    torch.testing.assert_close(found[2:], unit(y[lacks.topk(3).indices]))
    assert lacks.argmax() != y.norm(dim=1).argmax()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 16), st.integers(1, 9), st.integers(1, 20), st.sampled_from(["svd", "data", "random"]), st.data())
def test_rounds_of_ksvd(n, d, k, start, data):
    s = data.draw(st.integers(1, k))
    y = drawn(n, d, seed=n)
    found = ksvd(y, k, s, generator=generator("t"), start=start, rounds=4, tolerance=0)
    assert found.atoms.shape == (k, d) and found.index.shape == found.values.shape == (n, s)
    assert bool((found.index.diff(dim=1) > 0).all()) and int(found.index.max()) < k
    torch.testing.assert_close(found.atoms.norm(dim=1), torch.ones(k, dtype=y.dtype))
    left = float((y - spread(found.index, found.values, k) @ found.atoms).square().sum())
    assert left == pytest.approx(found.errors[-1], rel=1e-9, abs=1e-18)
    assert all(b <= a * (1 + 1e-12) + 1e-20 for a, b in zip(found.errors, found.errors[1:], strict=False))
    if s >= min(n, d):
        assert left < 1e-20
    again = ksvd(y, k, s, generator=generator("t"), start=start, rounds=4, tolerance=0)
    assert torch.equal(found.product(), again.product())


def test_it_learns_more_than_it_starts_with_and_stops_when_little_is_gained():
    y = drawn(80, 12) * torch.logspace(0, -1, 12, dtype=torch.float64)
    runs = {t: ksvd(y, 8, 4, generator=generator(0), start="data", rounds=200, tolerance=t) for t in (0.1, 0.01)}
    assert len(runs[0.1].errors) < len(runs[0.01].errors) < 200
    for tolerance, found in runs.items():
        gains = [1 - b / a for a, b in zip(found.errors, found.errors[1:], strict=False)]
        assert all(gain > tolerance for gain in gains[:-1]) and gains[-1] <= tolerance
    assert runs[0.01].errors[-1] < 0.7 * runs[0.01].errors[0]


def test_with_as_many_values_as_atoms_it_becomes_the_truncated_svd():
    y = drawn(30, 10) * torch.logspace(0, -1, 10, dtype=torch.float64)
    best = float(torch.linalg.svdvals(y)[4:].square().sum())
    found = ksvd(y, 4, 4, generator=generator(0), start="data", rounds=300, tolerance=0)
    assert found.errors[0] > 1.1 * best and found.errors[-1] == pytest.approx(best, rel=1e-6)
    assert ksvd(y, 4, 4, generator=generator(0), rounds=0).errors == pytest.approx([best])


@pytest.mark.parametrize("shape, k", [((6, 9), 15), ((9, 6), 15), ((9, 6), 4)])
def test_first_atoms(shape, k):
    y = drawn(*shape)
    y[2] = 0
    vh = torch.linalg.svd(y, full_matrices=False).Vh
    atoms = {start: starting_atoms(y, k, start, generator(1)) for start in ("svd", "data", "random")}
    for found in atoms.values():
        assert found.shape == (k, shape[1])
        torch.testing.assert_close(found.norm(dim=1), torch.ones(k, dtype=y.dtype))
    many = min(*shape, k)
    overlap = (atoms["svd"][:many] * vh[:many]).sum(1).abs()
    assert float(overlap[: many - 1].min()) > 1 - 1e-9  # the last singular value is 0 where rows are the fewer
    near = (atoms["data"] @ unit(y[torch.arange(len(y)) != 2]).mT).max(1).values
    assert int((near > 1 - 1e-9).sum()) >= min(k, shape[0]) - 1
    assert not torch.equal(atoms["random"], starting_atoms(y, k, "random", generator(2)))


# --- bits -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(1, 40))
def test_bits_come_back(n, k):
    mask = torch.rand(n, k, generator=generator(n, k)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (n, -(-k // 8))
    assert torch.equal(unpack(packed, k), mask)
    assert packed.tolist() == [
        [sum(2**b for b, bit in enumerate(row[i : i + 8]) if bit) for i in range(0, k, 8)] for row in mask.tolist()
    ]


# --- many dictionaries at once ----------------------------------------------------------------------------------------


def test_many_dictionaries_are_coded_as_each_alone():
    atoms = torch.nn.functional.normalize(drawn(3, 6, 5), dim=-1)
    y = drawn(3, 11, 5, seed=1)
    index, values = omp(atoms @ atoms.mT, y @ atoms.mT, 3)
    for a, own, found, v in zip(atoms, y, index, values):
        alone, fit = omp(a @ a.mT, own @ a.mT, 3)
        assert torch.equal(found, alone)
        torch.testing.assert_close(v, fit)


def test_values_at_given_places_are_least_squares():
    atoms = torch.nn.functional.normalize(drawn(2, 6, 5), dim=-1)
    y, index = drawn(2, 7, 5, seed=1), torch.rand(2, 7, 6).argsort(-1)[..., :3]
    values = fitted(atoms @ atoms.mT, y @ atoms.mT, index)
    for b in range(2):
        for row in range(7):
            basis = atoms[b, index[b, row]].mT
            expected = torch.linalg.lstsq(basis, y[b, row, :, None]).solution[:, 0]
            torch.testing.assert_close(values[b, row], expected, rtol=1e-8, atol=1e-8)


def test_the_best_atoms_for_given_codes_leave_nothing_that_codes_could_take():
    y, start = drawn(2, 30, 5), torch.nn.functional.normalize(drawn(2, 4, 5, seed=1), dim=-1)
    index, values = omp(start @ start.mT, y @ start.mT, 2)
    before = (y - spread(index, values, 4) @ start).square().sum()
    atoms, values = best_atoms(y, start, index, values)
    codes = spread(index, values, 4)
    left = y - codes @ atoms
    assert float(left.square().sum()) < float(before)
    assert float((codes.mT @ left).abs().max()) < 1e-8
    torch.testing.assert_close(atoms.norm(dim=-1), torch.ones(2, 4, dtype=torch.float64))


def test_an_atom_that_nothing_takes_becomes_what_is_worst():
    y = torch.eye(4, dtype=torch.float64)[None] * torch.tensor([1.0, 2.0, 5.0, 3.0], dtype=torch.float64)[:, None]
    atoms = torch.eye(4, dtype=torch.float64)[None, :3].clone()
    index = torch.tensor([[[0], [0], [0], [0]]])
    values = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]], dtype=torch.float64)
    idle = torch.tensor([[False, True, True]])
    expected = torch.eye(4, dtype=torch.float64)[[0, 2, 3]]
    torch.testing.assert_close(reseeded(y, atoms, index, values, idle)[0], expected)


@pytest.mark.parametrize("k", [3, 7])  # fewer than directions, and more
def test_rounds_never_come_farther_and_find_what_was_hidden(k):
    y = drawn(2, 60, 5)
    found = optimal_directions(y, k, 2, generator=torch.Generator().manual_seed(0), rounds=30, tolerance=0)
    assert found.errors == sorted(found.errors, reverse=True) and found.errors[-1] < 0.97 * found.errors[0]
    assert found.errors[-1] == pytest.approx(float((y - found.product()).square().sum()))
    assert bool((found.index.diff(dim=-1) > 0).all())
    exact = optimal_directions(y, k, 5, generator=torch.Generator()) if k >= 5 else None
    assert exact is None or torch.equal(exact.product(), y)
    hidden = torch.nn.functional.normalize(drawn(1, 4, 8, seed=3), dim=-1)
    taken, size = torch.randint(0, 4, (1, 200), generator=torch.Generator().manual_seed(4)), drawn(1, 200, 1, seed=5)
    signals = size * hidden[0][taken]
    again = optimal_directions(signals, 4, 1, generator=torch.Generator(), rounds=100, tolerance=0)
    assert again.errors[-1] < 1e-9 * float(signals.square().sum())
