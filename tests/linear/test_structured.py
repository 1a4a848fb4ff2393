"""Law 5 and what every kind owes: its description, its size, its dense weight."""

from __future__ import annotations

import json

import compressed
import pytest
import torch
from torch import nn

from weft import UsageError
from weft.linear._structured import Structured, empty, kinds, stored_bits

KINDS = sorted(kinds())
SHAPES = [(24, 18), (7, 13), (17, 5), (1, 3)]


def options(kind: str, out: int, in_: int) -> dict:
    """Small ones, where the matrix is large enough for them."""
    return compressed.SMALL[kind] if min(out, in_) > 4 else compressed.FULL[kind](out, in_)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def made(kind: str, out: int, in_: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> Structured:
    draw = torch.Generator().manual_seed(out)
    w = torch.randn(out, in_, generator=draw, dtype=torch.float64).to(dtype)
    b = torch.randn(out, generator=draw, dtype=torch.float64).to(dtype) if bias else None
    return kinds()[kind].from_dense(w, b, **options(kind, out, in_))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_dense_matrix(kind, shape, bias):
    layer = made(kind, *shape, bias=bias)
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if not layer.linear:
        with pytest.raises(UsageError, match=kind):
            layer.dense()
        return
    w = layer.dense()
    assert w.shape == shape and w.dtype == torch.float64
    expected = torch.einsum("bsi,oi->bso", x, w) + (layer.bias if bias else 0)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert (layer.bias is not None) == bias


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_its_full_setting_it_is_the_layer(kind, shape, dtype, tolerance):
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(*shape, generator=draw, dtype=dtype), torch.randn(5, shape[1], generator=draw, dtype=dtype)
    layer = kinds()[kind].from_dense(w, **compressed.FULL[kind](*shape))
    expected = x.double() @ w.double().T
    assert (layer(x).double() - expected).norm() <= tolerance * expected.norm()


def test_bfloat16_errs_at_most_twice_as_much_as_the_dense_product(kind):
    wide = made(kind, 24, 18)
    if not wide.linear:
        pytest.skip(f"the tests of {kind} write its own forward out")
    layer = empty(wide.spec(), 18, 24, dtype=torch.bfloat16)
    layer.load_state_dict(wide.state_dict())
    x = torch.randn(50, 18, generator=torch.Generator().manual_seed(1)).bfloat16()
    w = wide.dense()
    expected = x.double() @ w.T + wide.bias
    dense = nn.functional.linear(x, w.bfloat16(), wide.bias.bfloat16())
    assert (layer(x).double() - expected).norm() <= 2 * (dense.double() - expected).norm()
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_its_spec_is_json_and_makes_it_again(kind, device):
    layer = made(kind, 17, 11, dtype=torch.float32)
    spec = json.loads(json.dumps(layer.spec()))
    assert spec["kind"] == kind == layer.kind and spec["version"] == layer.version and spec["bias"] is True
    before = torch.get_rng_state()
    again = empty(spec, 11, 17, device, torch.float32)
    assert torch.equal(torch.get_rng_state(), before), "no random numbers are drawn"
    assert type(again) is type(layer) and again.spec() == spec
    shapes = [{key: (t.shape, t.dtype) for key, t in one.state_dict().items()} for one in (layer, again)]
    assert shapes[0] == shapes[1]
    assert {t.device.type for t in again.state_dict().values()} == {device}
    if device == "cpu":
        again.load_state_dict(layer.state_dict())
        again.derive()
        x = torch.randn(3, 11)
        assert torch.equal(again(x), layer(x))


def test_what_others_see_is_a_linear_layer_without_a_matrix(kind):
    layer = made(kind, 17, 11, dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (11, 17)
    assert layer.weight.shape == (0,) and layer.weight.dtype == torch.bfloat16 and "weight" in layer.state_dict()
    assert not any(name == "weight" for name, _ in layer.named_parameters())
    with pytest.raises(RuntimeError):  # what takes it for the matrix fails
        layer.weight.data += torch.zeros(17, 11)
    with pytest.raises(RuntimeError):
        nn.functional.linear(torch.zeros(2, 11), layer.weight)
    assert "in_features=11, out_features=17, bias=True" in repr(layer)


def test_stored_bits_are_those_of_the_file(kind):
    layer = made(kind, 24, 18, dtype=torch.bfloat16)
    file = sum(t.numel() * t.element_size() * 8 for t in layer.state_dict().values())
    assert stored_bits(layer, bias=True) == file == stored_bits(layer) + 24 * 16
    assert stored_bits(nn.Linear(5, 7)) == 32 * 35 and stored_bits(nn.Linear(5, 7), bias=True) == 32 * 42


def test_everything_learns(kind):
    layer = made(kind, 7, 5, dtype=torch.float32)
    layer(torch.randn(20, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize(
    "spec, said",
    [
        ({"kind": "low_rang", "rank": 2}, "unknown kind of layer 'low_rang': did you mean 'low_rank'"),
        ({"rank": 2}, "unknown kind of layer None"),
        ({"kind": "_structured"}, "unknown kind"),
        (
            {"kind": "low_rank", "version": 2, "rank": 2},
            "low_rank has version 2 here, and this weft reads up to 1: upgrade",
        ),
        ({"kind": "low_rank", "version": 1, "rank": 2, "lanes": 3}, "low_rank: got an unexpected keyword.*lanes"),
        ({"kind": "low_rank", "version": 1}, "low_rank: missing a required.*rank"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_is_not_known_is_refused_by_name(spec, said):
    with pytest.raises(UsageError, match=said):
        empty(spec, 5, 7)
