"""BlockSemiSparse against matrices in float64, and what it unpacks against what it stores."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import UsageError
from weft.linear._structured import stored_bits
from weft.linear.block_semi_sparse import BlockSemiSparse, largest, packed, unpacked

sides = st.sampled_from([(1, 1), (3, 1), (4, 4), (6, 2), (6, 3), (7, 7), (12, 4), (13, 1), (24, 8)])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def first_of_each_four(out, in_, kept):
    mask = torch.zeros(out, in_, dtype=torch.bool)
    for i in range(out):
        for c in range(0, in_, 4):
            there = list(range(c, min(c + 4, in_)))
            for k in range(min(kept, len(there))):
                mask[i, there[(i + c + k) % len(there)]] = True
    return mask


def made(out=24, in_=16, b_out=8, b_in=4, kept=2, bias=True, dtype=torch.float64):
    left, right = randn(out // b_out, b_out, b_out), randn(in_ // b_in, b_in, b_in, seed=1)
    core, mask = randn(out, in_, seed=2), first_of_each_four(out, in_, kept)
    b = randn(out, seed=3).to(dtype) if bias else None
    parts = (each.to(dtype) for each in (left, core))
    layer = BlockSemiSparse.from_parts(*parts, mask, right.to(dtype), b, kept=kept)
    return layer, torch.block_diag(*left) @ (core * mask) @ torch.block_diag(*right)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 4), st.booleans())
def test_forward_is_the_product_of_the_three(rows, columns, kept, bias):
    (out, b_out), (in_, b_in) = rows, columns
    layer, w = made(out, in_, b_out, b_in, kept, bias)
    torch.testing.assert_close(layer.dense(), w, rtol=1e-10, atol=1e-10)
    x = randn(2, 3, in_, seed=4)
    expected = x @ w.mT + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    of_a_row = sum(min(kept, in_ - c, 4) for c in range(0, in_, 4))
    marks = 0 if kept == 4 else (out * in_ + 7) // 8 * 8
    assert stored_bits(layer) == 64 * (out * of_a_row + b_out * out + b_in * in_) + marks
    assert (layer.block_out, layer.block_in, layer.kept) == (b_out, b_in, kept)


def test_with_blocks_of_one_the_wrappers_are_scales():
    layer, _ = made(12, 8, 1, 1)
    rows, columns = layer.left.flatten(), layer.right.flatten()
    core = layer._unpack()
    torch.testing.assert_close(layer.dense(), rows[:, None] * core * columns, rtol=1e-12, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 13), st.integers(0, 99))
def test_bits_lie_in_reading_order(out, in_, seed):
    mask = torch.rand(out, in_, generator=torch.Generator().manual_seed(seed)) < 0.5
    flat = mask.flatten().tolist()
    expected = [sum(bit << i for i, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]
    assert packed(mask).tolist() == expected and packed(mask).dtype == torch.uint8
    assert torch.equal(unpacked(packed(mask), out, in_), mask)


def test_from_dense_keeps_the_largest_of_each_four():
    w = randn(5, 11)
    w[0, :4] = 1.0  # where all tie, the first ones
    expected = torch.zeros_like(w)
    for i in range(5):
        for c in range(0, 11, 4):
            for j in sorted(range(c, min(c + 4, 11)), key=lambda j: -abs(float(w[i, j])))[:2]:
                expected[i, j] = w[i, j]
    layer = BlockSemiSparse.from_dense(w, block_out=5, block_in=11)
    assert torch.equal(layer.dense(), expected)
    assert torch.equal(largest(w.abs(), 2), expected != 0)


def test_gradients_are_those_of_the_product():
    layer, _ = made()
    x, y = randn(10, 16, seed=5), randn(10, 24, seed=6)
    (layer(x) * y).sum().backward()
    left, right, core = (t.detach().clone().requires_grad_(True) for t in (layer.left, layer.right, layer._unpack()))
    w = torch.block_diag(*left) @ core @ torch.block_diag(*right)
    ((x @ w.mT + layer.bias.detach()) * y).sum().backward()
    torch.testing.assert_close(layer.left.grad, left.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.right.grad, right.grad, rtol=1e-10, atol=1e-10)
    mask = first_of_each_four(24, 16, 2)
    torch.testing.assert_close(layer.values.grad, core.grad[mask].view(24, 8), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bias.grad, y.sum(0), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def changed(how, layer):
    other = randn(24, 8, seed=9)
    if how == "in place":
        layer.values.copy_(other)
    elif how == "loaded":
        layer.load_state_dict({**layer.state_dict(), "values": other})
    elif how == "assigned":
        layer.load_state_dict({**layer.state_dict(), "values": other}, assign=True)
    elif how == "replaced":
        layer.values = torch.nn.Parameter(other)
    elif how == "positions":
        other = layer.values.clone()
        layer.bits.copy_(layer.bits.bitwise_not())  # the other two of each four
    elif how == "data":
        layer.values.data.copy_(other)
        layer.derive()
    elif how == "cast":
        layer.float()
        other = layer.values
    return other


@pytest.mark.parametrize("how", ["in place", "loaded", "assigned", "replaced", "positions", "data", "cast"])
def test_what_was_unpacked_follows_the_values(how):
    layer, _ = made()
    x = randn(3, 16, seed=7)
    with torch.no_grad():
        layer(x)
        values = changed(how, layer)
        mask = first_of_each_four(24, 16, 2)
        core = torch.zeros(24, 16, dtype=torch.float64)
        core[~mask if how == "positions" else mask] = values.double().flatten()
        w = torch.block_diag(*layer.left.double()) @ core @ torch.block_diag(*layer.right.double())
        x = x.to(layer.values.dtype)
        tolerance = 1e-4 if how == "cast" else 1e-10
        expected = x.double() @ w.mT + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_it_is_unpacked_once_where_values_are_not_trained():
    layer, _ = made()
    x = randn(3, 16, seed=7)
    layer(x)
    assert layer._unpacked is None  # training: gradients must reach the values
    with torch.no_grad():
        layer(x)
    first = layer._unpacked[1]
    layer.requires_grad_(False)
    adapted = x.clone().requires_grad_(True)
    layer(adapted).sum().backward()
    assert layer._unpacked[1] is first
    torch.testing.assert_close(adapted.grad, layer.dense().sum(0).expand(3, 16), rtol=1e-10, atol=1e-10)


def test_after_inference_mode_it_can_be_trained_through():
    layer, _ = made()
    layer.requires_grad_(False)
    x = randn(3, 16, seed=7)
    with torch.inference_mode():
        expected = layer(x)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer(x), expected.clone()) and x.grad is not None


def test_copies_and_pickles_carry_what_is_stored():
    layer, w = made()
    with torch.no_grad():
        layer(randn(1, 16))
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert again._unpacked is None
            again.values.zero_()
        torch.testing.assert_close(layer.dense(), w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"block_out": 5, "block_in": 4}, "block_out=5: blocks must divide the side of 24"),
        ({"block_out": 4, "block_in": 0}, "block_in=0"),
        ({"block_out": 4, "block_in": 4, "kept": 5}, "kept=5: of four entries 1 to 4"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        BlockSemiSparse(16, 24, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse tensor cores are on GPUs")
def test_a_gpu_multiplies_the_compressed_core():
    w, x = randn(128, 256).bfloat16().cuda(), randn(32, 256, seed=1).bfloat16().cuda()
    layer = BlockSemiSparse.from_dense(w, block_out=32, block_in=32).cuda()
    with torch.no_grad():
        found = layer(x)
    assert layer._unpacked[2] is not None
    torch.testing.assert_close(found, x @ layer.dense().mT, rtol=2e-2, atol=2e-1)
