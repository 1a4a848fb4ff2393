"""Law 5 and what every kind owes: its description, its size, its dense weight."""

from __future__ import annotations

import json

import compressed
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft import UsageError
from weft.linear._structured import Structured, StructuredLinear, empty, stored_bits

KINDS = compressed.KINDS
SHAPES = [(24, 18), (7, 13), (17, 5), (1, 3)]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def stock(kind: str, out: int, in_: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The layer that a kind stands for, with weight and bias drawn in float64."""
    if kind == "factored_embedding":
        layer: nn.Module = nn.Embedding(out, in_, padding_idx=0)
    elif kind.endswith("_conv"):
        layer = nn.Conv2d(in_, out, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=bias)
    else:
        layer = nn.Linear(in_, out, bias=bias)
    draw = torch.Generator().manual_seed(out)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(dtype)
    return layer


def inputs(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """As many as show all of its weight; the same ones for the same shape."""
    draw = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)[None]
    shape = (4, 13, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 7, 6)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


def reference(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The stock layer with another weight and bias."""
    return functional_call(layer, {"weight": weight} | ({} if bias is None else {"bias": bias}), (x,))


def made(kind: str, out: int, in_: int, **of_stock) -> tuple[Structured, nn.Module]:
    """A small one, where the matrix is large enough for it, and the layer that it stands for."""
    layer = stock(kind, out, in_, **of_stock)
    options = compressed.SMALL[kind] if min(out, in_) > 4 else compressed.FULL[kind]
    return compressed.structure(layer, kind, options), layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_that_of_the_dense_weight(kind, shape, bias):
    layer, dense = made(kind, *shape, bias=bias)
    if not layer.linear:
        with pytest.raises(UsageError, match=kind):
            layer.dense()
        return
    w, x = layer.dense(), inputs(dense)
    assert w.shape == dense.weight.shape and w.dtype == torch.float64
    assert torch.allclose(layer(x), reference(dense, x, w, layer.bias), rtol=1e-10, atol=1e-10)
    assert (layer.bias is None) == (getattr(dense, "bias", None) is None)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_its_full_setting_it_is_the_layer(kind, shape, dtype, tolerance):
    dense = stock(kind, *shape, dtype=dtype)
    layer = compressed.structure(dense, kind, compressed.FULL[kind])
    x = inputs(dense, dtype)
    found = layer(x).double()
    expected = dense.double()(x if x.dtype == torch.long else x.double())
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_bfloat16_errs_at_most_twice_as_much_as_the_dense_product(kind):
    wide, dense = made(kind, 24, 18)
    if not wide.linear:
        pytest.skip(f"the tests of {kind} write its own forward out")
    layer = empty(wide.spec(), dense.bfloat16())
    layer.load_state_dict(wide.state_dict())
    x, w, b = inputs(dense, torch.bfloat16), wide.dense(), wide.bias
    near = reference(dense, x, w.bfloat16(), None if b is None else b.bfloat16()).double()
    expected = reference(dense, x if x.dtype == torch.long else x.double(), w, b)
    assert (layer(x).double() - expected).norm() <= 2 * (near - expected).norm()
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_its_spec_is_json_and_makes_it_again(kind, device):
    layer, dense = made(kind, 17, 11, dtype=torch.float32)
    spec = json.loads(json.dumps(layer.spec()))
    assert spec["kind"] == kind == layer.kind and 1 <= spec["version"] <= layer.version
    assert spec.get("bias", False) is hasattr(dense, "bias")
    place = dense.to(device)
    before = torch.get_rng_state()
    again = empty(spec, place)
    assert torch.equal(torch.get_rng_state(), before), "no random numbers are drawn"
    assert type(again) is type(layer) and again.spec() == spec
    shapes = [{key: (t.shape, t.dtype) for key, t in one.state_dict().items()} for one in (layer, again)]
    assert shapes[0] == shapes[1]
    assert {t.device.type for t in again.state_dict().values()} == {device}
    if device == "cpu":
        again.load_state_dict(layer.state_dict())
        again.derive()
        x = inputs(dense, torch.float32)
        assert torch.equal(again(x), layer(x))


def test_what_others_see_is_the_stock_layer_without_its_weight(kind):
    layer, dense = made(kind, 17, 11, dtype=torch.bfloat16)
    assert layer.weight.shape == (0,) and layer.weight.dtype == torch.bfloat16 and "weight" in layer.state_dict()
    assert not any(name == "weight" for name, _ in layer.named_parameters())
    if not kind.endswith("_conv"):  # these say why
        assert isinstance(layer, type(dense)) and dense.extra_repr() in repr(layer)
        shown = {name: value for name, value in vars(dense).items() if name not in vars(nn.Module())}
        assert {name: getattr(layer, name) for name in shown} == shown
    with pytest.raises(RuntimeError):  # what takes it for the weight fails
        layer.weight.data += torch.zeros(dense.weight.shape)
    with pytest.raises(RuntimeError):
        reference(dense, inputs(dense, torch.bfloat16), layer.weight, None)


def test_stored_bits_are_those_of_the_file(kind):
    layer, _ = made(kind, 24, 18, dtype=torch.bfloat16)
    file = sum(t.numel() * t.element_size() * 8 for t in layer.state_dict().values())
    assert stored_bits(layer, bias=True) == file == stored_bits(layer) + (0 if layer.bias is None else 24 * 16)
    assert stored_bits(nn.Linear(5, 7)) == 32 * 35 and stored_bits(nn.Linear(5, 7), bias=True) == 32 * 42


def test_everything_learns(kind):
    layer, dense = made(kind, 7, 5, dtype=torch.float32)
    layer(inputs(dense, torch.float32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_it_stands_for_one_sort_of_layer(kind):
    own = type(stock(kind, 7, 5))
    for other in (nn.Linear(5, 7), nn.Embedding(5, 7), nn.Conv2d(5, 7, 3), nn.LayerNorm(5)):
        if type(other) is not own:
            with pytest.raises(UsageError, match=f"a {kind} layer stands for a.*, but it is a {type(other).__name__}"):
                empty({"kind": kind, **compressed.SMALL[kind]}, other)


def test_weft_adapters_serve_linear_ones(kind):
    from weft.adapters._kinds import kind_of

    layer, _ = made(kind, 17, 11)
    if isinstance(layer, StructuredLinear):
        assert kind_of(layer, "here").name == "quantised Linear"
    else:
        with pytest.raises(UsageError, match=f"here is stored as {kind}, which no adapter"):
            kind_of(layer, "here")


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
        empty(spec, nn.Linear(5, 7))
