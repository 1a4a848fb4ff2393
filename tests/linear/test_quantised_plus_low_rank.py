"""QuantisedPlusLowRank against its matrix written out in float64, and what its passes keep."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from weft import UsageError
from weft.linear import quantised_plus_low_rank
from weft.linear._structured import stored_bits
from weft.linear.quantised_plus_low_rank import QuantisedPlusLowRank

sides = st.integers(1, 23)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(out: int, in_: int, bits: int, group: int):
    """Codes, steps and zeros as they come, and the matrix that they mean."""
    draw, groups = torch.Generator().manual_seed(out * in_), -(-in_ // group)
    codes = torch.randint(0, 2**bits, (out, in_), generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (out, groups), generator=draw, dtype=torch.uint8)
    step = (torch.rand(out, groups, generator=draw) + 0.1).half().double()
    w = torch.zeros(out, in_, dtype=torch.float64)
    for i in range(out):
        for j in range(in_):
            w[i, j] = (int(codes[i, j]) - int(zero[i, j // group])) * step[i, j // group]
    return (codes, step, zero), w


def made(out: int = 13, in_: int = 17, rank: int = 3, bias: bool = True, dtype=torch.float64, **form):
    form = {"bits": 2, "group_size": 5, "scale": 0.7} | form
    coded, w = parts(out, in_, form["bits"], form["group_size"])
    up, down, b = drawn(out, rank, seed=1), drawn(rank, in_, seed=2), drawn(out, seed=3) if bias else None
    return QuantisedPlusLowRank.from_parts(coded, up, down, b, **form, dtype=dtype), w


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.sampled_from([2, 3, 4, 8]), st.integers(1, 30), st.integers(0, 5), st.booleans())
def test_forward_is_codes_and_factors(out, in_, bits, group, rank, bias):
    rank = min(rank, out, in_)
    layer, w = made(out, in_, rank, bias, bits=bits, group_size=group)
    w = w + 0.7 * torch.einsum("or,ri->oi", layer.up.weight, layer.down.weight)
    x = drawn(2, 3, in_, seed=4)
    expected = torch.einsum("bsi,oi->bso", x, w) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.dense(), w, rtol=1e-10, atol=1e-10)
    groups = -(-in_ // group)
    coded = out * (-(-in_ * bits // 8) * 8 + 16 * groups + -(-groups * bits // 8) * 8)
    assert stored_bits(layer) == coded + 64 * rank * (in_ + out)


@pytest.mark.parametrize("tile", [1, 40, 2**20])
def test_gradients_are_those_of_the_graph_with_the_matrix_in_it(tile, monkeypatch):
    monkeypatch.setattr(quantised_plus_low_rank, "TILE", tile)
    layer, w = made()
    x = drawn(2, 6, 17, seed=5).requires_grad_()
    other = x.detach().clone().requires_grad_()
    up, down, b = (t.detach().clone().requires_grad_() for t in (layer.up.weight, layer.down.weight, layer.up.bias))
    expected = linear(other, w, b) + 0.7 * linear(linear(other, down), up)
    pull = drawn(2, 6, 13, seed=6)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (found * pull).sum().backward()
    (expected * pull).sum().backward()
    pairs = ((x, other), (layer.up.weight, up), (layer.down.weight, down), (layer.up.bias, b))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_where_b_is_zero_it_is_the_quantised_layer_bit_for_bit(bias, dtype):
    layer, _ = made(bias=bias, dtype=dtype)
    nn.init.zeros_(layer.up.weight)
    alone, _ = made(rank=0, bias=bias, dtype=dtype)
    x = drawn(4, 17).to(dtype)
    assert torch.equal(layer(x), alone(x)) and torch.equal(layer.dense(), alone.dense())


class Largest(TorchDispatchMode):
    """The most entries of a tensor of numbers that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        for t in found if isinstance(found, tuple | list) else (found,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.entries = max(self.entries, t.numel())
        return found


def test_nothing_as_large_as_the_matrix_waits_for_the_backward_pass():
    layer, w = made(out=64, in_=48, rank=2, dtype=torch.float32, bits=4, group_size=16)
    kept = []
    x = drawn(3, 48).float().requires_grad_()

    def large() -> bool:
        return any(t.is_floating_point() and t.numel() >= w.numel() for t in kept)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x)
        assert kept and not large()
        stored = {t.data_ptr() for t in (layer.codes, layer.steps, layer.zeros)}
        assert {t.data_ptr() for t in kept if not t.is_floating_point()} == stored, "what is there, and no copy"
        linear(x, layer.quantised(torch.float32))
        assert large(), "as a plain product would keep it"


def test_no_more_than_a_tile_is_written_out_in_either_pass(monkeypatch):
    monkeypatch.setattr(quantised_plus_low_rank, "TILE", 8 * 256)
    layer, w = made(out=64, in_=256, rank=2, bias=False, dtype=torch.float32, group_size=64)
    x = drawn(2, 256).float().requires_grad_()
    with Largest() as seen:
        layer(x).sum().backward()
    assert x.grad is not None and seen.entries == 8 * 256 < w.numel()


def test_codes_are_no_parameters_and_training_leaves_them_alone():
    layer, _ = made(dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    assert {name for name, _ in layer.named_parameters()} == {"up.weight", "up.bias", "down.weight"}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(drawn(5, 17).float()).square().sum().backward()
        optimizer.step()
    after = layer.state_dict()
    still = {name for name, t in before.items() if torch.equal(after[name], t)}
    assert still == {"codes", "steps", "zeros", "weight"}


def test_a_cast_changes_the_factors_and_not_the_codes():
    layer, w = made(dtype=torch.float32)
    assert torch.equal(layer.bfloat16().double().quantised(torch.float64), w)


def test_from_dense_takes_what_is_lost_into_the_factors():
    w = drawn(12, 20)
    layer = QuantisedPlusLowRank.from_dense(w, bits=3, group_size=10, rank=4)
    lost = w - layer.quantised(torch.float64)
    u, s, vh = torch.linalg.svd(lost)
    torch.testing.assert_close(layer.up.weight @ layer.down.weight, u[:, :4] * s[:4] @ vh[:4], rtol=1e-9, atol=1e-9)
    assert not layer.quantised(torch.float64).requires_grad


@pytest.mark.parametrize(
    "options, said",
    [({"bits": 5}, "bits=5: codes have 2, 3, 4 or 8"), ({"bits": True}, "bits=True"), ({"group_size": 0}, "size=0")],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        QuantisedPlusLowRank(8, 8, **{"bits": 2, "group_size": 4, "rank": 1, **options})
    with pytest.raises(UsageError, match="rank=9: a matrix of 8 × 8 has 0 to 8"):
        QuantisedPlusLowRank(8, 8, bits=2, group_size=4, rank=9)
