"""Grids, codes and their packing, against loops over single numbers in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.algebra.quantise import WIDTHS, decode, gptq, nearest, pack, packed_size, unpack

widths = st.sampled_from(WIDTHS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cells(w: torch.Tensor, group: int) -> list[tuple[int, int, torch.Tensor]]:
    """Row, group and entries of each group."""
    starts = range(0, w.shape[1], group)
    return [(i, g, w[i, start : start + group]) for i in range(len(w)) for g, start in enumerate(starts)]


@settings(max_examples=60, deadline=None)
@given(widths, st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_codes_are_packed_without_gaps_and_come_back(bits, k, n, seed):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (n, packed_size(k, bits)) and packed.dtype == torch.uint8
    assert 8 * packed.shape[1] - bits * k < 8
    for row, stored in zip(codes.tolist(), packed.tolist()):
        number = sum(code << bits * i for i, code in enumerate(row))
        assert number == int.from_bytes(bytes(stored), "little")
    assert torch.equal(unpack(packed, bits, k), codes)


@settings(max_examples=60, deadline=None)
@given(widths, st.integers(1, 30), st.integers(1, 35), st.floats(-3, 3), st.sampled_from([1e-4, 1.0, 300.0]))
def test_no_entry_is_further_than_half_a_step_from_a_grid_that_holds_0(bits, k, group, shift, size):
    w = (drawn(3, k) + shift) * size
    w[0] = 0
    codes, step, zero = nearest(w, bits, group)
    found = decode(codes, step, zero, group, torch.float64)
    assert codes.shape == w.shape and step.shape == zero.shape == (3, -(-k // group))
    assert torch.equal(step, step.half().double()), "a number of float16"
    assert torch.equal(found[0], w[0])
    for i, g, entries in cells(w, group):
        s, z = float(step[i, g]), float(zero[i, g])
        assert z == int(z) and 0 <= z < 2**bits
        points = [(q - z) * s for q in range(2**bits)]
        spread = max(float(entries.max()), 0) - min(float(entries.min()), 0)
        if spread:
            assert spread / (2**bits - 1) <= s <= spread / (2**bits - 1) * (1 + 2**-9) + 2**-24
        for j, entry in enumerate(entries.tolist(), start=g * group):
            assert float(found[i, j]) == points[int(codes[i, j])]
            assert abs(found[i, j] - entry) <= s / 2 * (1 + 1e-9)
            assert abs(found[i, j] - entry) <= min(abs(p - entry) for p in points) + 1e-9 * s


def test_what_float16_has_no_step_for_is_refused():
    with pytest.raises(ValueError, match="weights up to 1e\\+06 cannot be quantised"):
        nearest(torch.full((1, 4), 1e6), 2, 4)


def one_by_one(w: torch.Tensor, h: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """GPTQ as it is derived: after each column all others move to where the error is least, by an inverse of their
    own moment."""
    w, out, k = w.clone(), torch.zeros_like(w), w.shape[1]
    for j in range(k):
        if j % group == 0:
            part = w[:, j : j + group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            exact = (high - low) / (2**bits - 1)
            near = exact.half().numpy()
            above = np.nextafter(near, np.float16(np.inf))
            step = torch.from_numpy(np.where(near < exact.numpy(), above, near)).double()
            zero = (-low / step).round()
        out[:, j] = (((w[:, j] / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= ((w[:, j] - out[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("bits, group", [(2, 4), (3, 20), (4, 7), (2, 64)])
def test_gptq_is_the_best_that_the_columns_to_the_right_can_do(bits, group, monkeypatch):
    from weft.algebra import quantise

    monkeypatch.setattr(quantise, "BLOCK", 3)  # so that errors go through blocks and groups
    w, x = drawn(6, 20), drawn(50, 20, seed=1) @ drawn(20, 20, seed=2)
    h = x.mT @ x / 50
    codes, step, zero = gptq(w, h, bits, group, damping=0.05)
    found = decode(codes, step, zero, group, torch.float64)
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(found, one_by_one(w, damped, bits, group), rtol=1e-9, atol=1e-9)

    plain = decode(*nearest(w, bits, group), group, torch.float64)
    losses = [float(((w - q) @ x.mT).square().sum()) for q in (found, plain)]
    assert losses[0] < 0.8 * losses[1]


def test_gptq_of_inputs_that_were_never_seen_is_the_nearest():
    w = drawn(4, 10)
    assert all(map(torch.equal, gptq(w, torch.zeros(10, 10), 3, 5), nearest(w, 3, 5)))
