"""SLTrain: the specification's invariants, each against a float64 computation written out here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import weft
from weft.errors import UsageError
from weft.linear import low_rank_plus_scattered as kind
from weft.linear.low_rank_plus_scattered import LowRankPlusScattered


class Blocks(nn.Module):
    def __init__(self, out: int, in_: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(in_, out, bias, dtype=dtype)) for _ in range(2))


def layer_of(out: int, in_: int, *, bias: bool = True, dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    model = Blocks(out, in_, bias, dtype)
    weft.reparametrise(model, "sltrain", **{"rank": min(3, out, in_), "sp_ratio": 0.2, **options})
    return model.layers[0][0]


def written_out(layer: LowRankPlusScattered, c: float) -> torch.Tensor:
    """W = c·B·A + S, entry by entry."""
    w = c * layer.up.weight @ layer.down.weight
    sparse = torch.zeros_like(w).flatten()
    for place, value in zip(layer.places.tolist(), layer.values, strict=True):
        sparse[place] = value
    return w + sparse.view_as(w)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 23), st.integers(2, 23), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_at_the_start_the_weight_is_its_sparse_part(out, in_, share, bias, seed):
    layer = layer_of(out, in_, sp_ratio=share, bias=bias, seed=seed)
    k, places = math.floor(share * out * in_), layer.places.long()
    assert len(layer.values) == len(places) == k
    assert (places.diff() > 0).all() and (k == 0 or 0 <= places[0] <= places[-1] < out * in_)
    bound = 1 / math.sqrt(in_)
    for drawn in (layer.values, layer.down.weight):
        assert (drawn.abs() <= bound).all()
    dense = layer.dense()
    assert not layer.up.weight.any() and int((dense != 0).sum()) == k
    assert torch.equal(dense.flatten()[places], layer.values.detach())
    trained = sum(p.numel() for p in layer.parameters())
    assert trained == layer.rank * (out + in_) + k + (out if bias else 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 23), st.integers(2, 23), st.integers(1, 30), st.sampled_from([kind.TILE, 40, 7]), st.booleans())
def test_forward_and_gradients_are_those_of_the_written_out_weight(out, in_, rows, tile, trained_scale):
    whole, kind.TILE = kind.TILE, tile  # W in one piece, in a few, in its rows
    try:
        layer = layer_of(out, in_, lora_alpha=5, trainable_scaling=trained_scale)
        with torch.no_grad():
            layer.up.weight.normal_()
        x = torch.randn(rows, in_, dtype=torch.float64, requires_grad=True)
        weigh = torch.randn(rows, out, dtype=torch.float64)
        inputs = [x, *layer.parameters()]
        y = layer(x)
        ours = torch.autograd.grad((y * weigh).sum(), inputs)
        c = layer.gate.tanh() if trained_scale else 5 / layer.rank
        expected = x @ written_out(layer, c).mT + layer.bias
        theirs = torch.autograd.grad((expected * weigh).sum(), inputs, materialize_grads=True)  # S may be empty
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        for mine, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected.detach(), rtol=1e-10, atol=1e-12)  # by factors, if few
    finally:
        kind.TILE = whole


def test_layers_have_places_of_their_own_and_keep_them():
    model = Blocks(9, 11, True, torch.float32)
    weft.reparametrise(model, "sltrain", rank=2, sp_ratio=0.3)
    first, second = (block[0] for block in model.layers)
    assert not torch.equal(first.places, second.places)
    before = first.places.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        first(torch.randn(4, 11)).square().sum().backward()
        optimizer.step()
    assert torch.equal(first.places, before)
    with torch.no_grad():  # each value acts on one output alone
        x, y = torch.randn(3, 11), None
        y = first(x)
        first.values[4] += 1
        moved = (first(x) - y).abs().amax(0) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [int(before[4]) // 11]


def test_a_factor_with_an_adapter_of_its_own_multiplies_by_itself():
    layer = layer_of(9, 7, lora_alpha=5)
    with torch.no_grad():
        layer.up.weight.normal_()
    x = torch.randn(20, 7, dtype=torch.float64)
    before = layer(x)

    class Twice(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    low = 5 / 3 * x @ layer.down.weight.mT @ layer.up.weight.mT
    layer.down = Twice(layer.down)
    torch.testing.assert_close(layer(x), before + low)


def test_the_whole_rank_is_in_reach_of_a_thin_product():
    layer = layer_of(12, 12, sp_ratio=0.5)
    with torch.no_grad():
        layer.up.weight.normal_()
    low = layer.up.weight @ layer.down.weight
    assert torch.linalg.matrix_rank(low) == 3 and torch.linalg.matrix_rank(layer.dense()) == 12


@pytest.mark.parametrize("share", [0.02, 0.5])  # places as numbers, and as bits
def test_a_state_dict_brings_the_places(share):
    first, second = layer_of(17, 13, sp_ratio=share, seed=1), layer_of(17, 13, sp_ratio=share, seed=2)
    assert not torch.equal(first.places, second.places)
    second.load_state_dict(first.state_dict())
    x = torch.randn(20, 13, dtype=torch.float64)
    assert torch.equal(first.places, second.places) and torch.equal(first(x), second(x))


def test_trained_weights_can_be_the_start():
    torch.manual_seed(0)
    model = Blocks(10, 8, True, torch.float64)
    w, b = model.layers[0][0].weight.detach().clone(), model.layers[0][0].bias.detach().clone()
    weft.reparametrise(model, "sltrain", rank=3, sp_ratio=0.25, lora_alpha=6, start="weights")
    layer = model.layers[0][0]
    u, s, vh = torch.linalg.svd(w)
    near = u[:, :3] * s[:3] @ vh[:3]
    torch.testing.assert_close(2 * layer.up.weight @ layer.down.weight, near)
    rest = (w - layer.dense()).flatten()
    assert rest[layer.places.long()].abs().max() < 1e-12 and torch.equal(layer.bias, b)


@pytest.mark.parametrize(
    "options, said",
    [({"sp_ratio": 1.5}, "sp_ratio=1.5"), ({"lora_alpha": 0}, "lora_alpha=0"), ({"start": "zero"}, "start='zero'")],
)
def test_odd_values_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        weft.SltrainConfig(**options)
