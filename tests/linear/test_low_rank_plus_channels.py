"""LowRankPlusChannels against its two parts, written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from weft import UsageError
from weft.linear._structured import empty, stored_bits
from weft.linear.low_rank_plus_channels import LowRankPlusChannels, heaviest

sides = st.integers(1, 23)
ACTIVATIONS = {
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "relu": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "none": lambda h: h,
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(out=17, in_=13, *, rank=3, channels=4, gamma=0.7, activation="silu", bias=True, seed=0) -> LowRankPlusChannels:
    """One with values of its own, none of which come from a matrix, in float64."""
    options = {"rank": rank, "channels": channels, "gamma": gamma, "activation": activation, "bias": bias}
    layer = LowRankPlusChannels(in_, out, **options, dtype=torch.float64)
    index = drawn(in_, seed=seed).argsort()[:channels].sort().values
    parts = drawn(out, rank, seed=seed + 1), drawn(rank, in_, seed=seed + 2), index, drawn(out, channels, seed=seed + 3)
    layer.set_parts(*parts)
    if bias:
        layer.up.bias.data.copy_(drawn(out, seed=seed + 4))
    return layer


def written_out(x, up, down, columns, bias, index: list[int], gamma: float, activation: str) -> torch.Tensor:
    """The formula, an einsum for the bottleneck and a channel at a time."""
    y = gamma * torch.einsum("or,...r->...o", up, ACTIVATIONS[activation](torch.einsum("ri,...i->...r", down, x)))
    for at, channel in enumerate(index):
        y = y + (1 - gamma) * x[..., channel, None] * columns[:, at]
    return y if bias is None else y + bias


def expected(layer: LowRankPlusChannels, x: torch.Tensor) -> torch.Tensor:
    weights = layer.up.weight, layer.down.weight, layer.columns.weight, layer.bias
    return written_out(x, *weights, layer.index.tolist(), layer.gamma, layer.activation)


shares = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    out=sides,
    in_=sides,
    rank=st.integers(0, 23),
    channels=st.integers(0, 23),
    gamma=shares,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    shape=st.sampled_from([(), (4,), (2, 3), (2, 0)]),
)
def test_forward_is_the_sum_of_the_two(out, in_, rank, channels, gamma, activation, bias, shape):
    rank, channels = min(rank, out, in_), min(channels, in_)
    layer = made(out, in_, rank=rank, channels=channels, gamma=gamma, activation=activation, bias=bias)
    x = drawn(*shape, in_, seed=9)
    found = layer(x)
    assert found.shape == (*shape, out)
    assert torch.allclose(found, expected(layer, x), rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in layer.parameters()) == rank * (in_ + out) + channels * out + (out if bias else 0)
    assert stored_bits(layer) == 64 * (rank * (in_ + out) + channels * out) + 8 * channels


@settings(max_examples=40, deadline=None)
@given(
    out=sides,
    in_=sides,
    rank=st.integers(0, 9),
    channels=st.integers(0, 9),
    gamma=shares,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
)
def test_gradients_are_those_of_the_formula(out, in_, rank, channels, gamma, activation, bias):
    rank, channels = min(rank, out, in_), min(channels, in_)
    layer = made(out, in_, rank=rank, channels=channels, gamma=gamma, activation=activation, bias=bias)
    x, wanted = drawn(2, 3, in_, seed=8).requires_grad_(), drawn(2, 3, out, seed=9)
    inputs = [x, *layer.parameters()]
    assert len(inputs) == 4 + bias
    found = torch.autograd.grad((layer(x) * wanted).sum(), inputs)
    of = (expected(layer, x) * wanted).sum()
    for one, other in zip(found, torch.autograd.grad(of, inputs, materialize_grads=True), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_only_what_is_asked_for_gets_a_gradient():
    layer = made()
    layer.up.weight.requires_grad_(False)
    layer.columns.weight.requires_grad_(False)
    x = drawn(5, 13, seed=8)  # of which none is asked for
    layer(x).square().sum().backward()
    assert layer.up.weight.grad is None and layer.columns.weight.grad is None
    found = layer.down.weight.grad.clone()
    assert torch.allclose(found, torch.autograd.grad(expected(layer, x).square().sum(), layer.down.weight)[0])


def test_each_channel_gets_the_gradient_of_its_parts():
    layer = made(channels=4)
    index = layer.index.long()
    others = [j for j in range(13) if j not in index.tolist()]
    x, wanted = drawn(6, 13, seed=8).requires_grad_(), drawn(6, 17, seed=9)
    (whole,) = torch.autograd.grad((layer(x) * wanted).sum(), x)
    low = 0.7 * ACTIVATIONS["silu"](x @ layer.down.weight.mT) @ layer.up.weight.mT
    (of_low,) = torch.autograd.grad((low * wanted).sum(), x)
    assert torch.allclose(whole[:, others], of_low[:, others], atol=1e-12), "none from the sparse part"
    of_sparse = 0.3 * wanted @ layer.columns.weight
    assert torch.allclose(whole[:, index], of_low[:, index] + of_sparse, atol=1e-12)
    assert (of_sparse.abs() > 0).all()


def test_a_share_of_all_is_one_part_alone():
    x = drawn(5, 13, seed=9)
    low = made(gamma=1.0, bias=False)
    bottleneck = ACTIVATIONS["silu"](x @ low.down.weight.mT) @ low.up.weight.mT
    assert torch.allclose(low(x), bottleneck, atol=1e-12)
    sparse = made(gamma=0.0, bias=False)
    assert torch.allclose(sparse(x), x[:, sparse.index.long()] @ sparse.columns.weight.mT, atol=1e-12)


def test_what_is_kept_for_the_gradient_is_x_and_the_bottleneck():
    layer, x, kept = made(), drawn(50, 13).requires_grad_(), {}
    own = {t.data_ptr() for t in layer.state_dict().values()}

    def keep(t):
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    assert sorted(kept.values()) == [50 * 3, 50 * 13]


def test_multiplications_are_as_many_as_there_are_numbers():
    added = {torch.ops.aten.addmm_: lambda y, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=added) as counted:
        made(channels=4, rank=3)(drawn(7, 13))
    assert counted.get_total_flops() == 2 * 7 * (3 * (13 + 17) + 4 * 17)


# --- with and without an activation -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(out=sides, in_=sides, rank=st.integers(0, 9), channels=st.integers(0, 9), gamma=shares)
def test_without_an_activation_it_is_a_matrix(out, in_, rank, channels, gamma):
    rank, channels = min(rank, out, in_), min(channels, in_)
    layer = made(out, in_, rank=rank, channels=channels, gamma=gamma, activation="none", bias=False)
    w = gamma * torch.einsum("or,ri->oi", layer.up.weight, layer.down.weight)
    for at, channel in enumerate(layer.index.tolist()):
        w[:, channel] += (1 - gamma) * layer.columns.weight[:, at]
    assert layer.linear and torch.allclose(layer.dense(), w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_with_one_it_is_none_and_says_so(activation):
    layer = made(activation=activation)
    with pytest.raises(UsageError, match="kind low_rank_plus_channels is no linear map"):
        layer.dense()
    with pytest.raises(UsageError, match="low_rank_plus_channels is no linear map"):
        layer.check_dense(nn.Linear(13, 17))
    made(activation="none").check_dense(nn.Linear(13, 17))
    assert LowRankPlusChannels.linear, "of the kind, which can be linear"


# --- from a matrix ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(out=sides, in_=sides, rank=st.integers(0, 23), channels=st.integers(0, 23), gamma=shares)
def test_from_a_matrix_it_is_the_nearest_of_its_rank_and_exact_where_most_is_left(out, in_, rank, channels, gamma):
    rank, channels = min(rank, out, in_), min(channels, in_)
    w = drawn(out, in_) * drawn(out, in_, seed=1).abs()
    layer = LowRankPlusChannels.from_dense(w, rank=rank, channels=channels, gamma=gamma)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ vh[:rank] if gamma else torch.zeros_like(w)
    sizes, index = (w - low).norm(dim=0), layer.index.tolist()
    assert len(set(index)) == channels and index == sorted(index)
    left = [j for j in range(in_) if j not in index]
    assert not index or not left or sizes[index].min() >= sizes[left].max() - 1e-9
    near = low.clone()
    if gamma < 1:
        near[:, index] = w[:, index]
    assert torch.allclose(layer.dense(), near, atol=1e-9)


def test_of_equal_columns_the_first_are_taken():
    w = torch.ones(3, 6)
    w[:, 4] = 2
    assert heaviest(w, 3).tolist() == [0, 1, 4]
    w[:, 2] = torch.tensor([0.0, 0.0, 2.9])  # Σ|w| = 2.9 < 3, √Σw² = 2.9 > √3
    assert heaviest(w, 2).tolist() == [2, 4] and heaviest(w, 2, norm=1).tolist() == [0, 4]


@pytest.mark.parametrize(
    "in_, dtype", [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)], ids=str
)
def test_places_take_the_smallest_whole_numbers(in_, dtype):
    layer = LowRankPlusChannels(in_, 2, rank=1, channels=2, gamma=0.5)
    layer.set_parts(torch.ones(2, 1), torch.zeros(1, in_), torch.tensor([0, in_ - 1]), torch.eye(2))
    assert layer.index.dtype == dtype == layer.to(torch.bfloat16).index.dtype
    assert layer.state_dict()["index"].tolist() == [0, in_ - 1]
    x = torch.arange(float(in_)).bfloat16()
    assert torch.equal(layer(x), 0.5 * x[[0, -1]])


# --- what else a layer goes through -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bfloat16_errs_at_most_twice_as_much_as_two_dense_products(activation):
    wide = made(96, 64, rank=16, channels=6, activation=activation)
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(p.bfloat16())
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    x = drawn(200, 64, seed=9).bfloat16()
    h = (x @ narrow.down.weight.mT).float()
    stock = 0.7 * (ACTIVATIONS[activation](h).bfloat16() @ narrow.up.weight.mT)
    stock = stock + 0.3 * (x[:, narrow.index.long()] @ narrow.columns.weight.mT) + narrow.bias
    exact = expected(wide, x.double())
    assert narrow(x).dtype == torch.bfloat16
    assert (narrow(x).double() - exact).norm() <= 2 * (stock.double() - exact).norm()
    narrow(x).float().square().sum().backward()
    wide(x.double()).square().sum().backward()
    for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert one.grad.dtype == torch.bfloat16 and (one.grad - other.grad).norm() < 0.03 * other.grad.norm()


def test_it_computes_under_autocast():
    layer = made().float()
    x = drawn(40, 13, seed=1).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and (y.float() - layer(x)).norm() < 0.02 * y.float().norm()
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}


def test_a_layer_inside_that_is_no_longer_plain_multiplies_itself():
    """As with an adapter on a factor, or a quantised one."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = made(bias=False), drawn(2, 5, 13, seed=8).requires_grad_()
    for name in ("down", "up", "columns"):
        twice = copy.deepcopy(layer)
        getattr(twice, name).__class__ = Doubled
        getattr(layer, name).weight.data *= 2
        inputs = x, *twice.parameters()
        assert torch.allclose(twice(x), expected(layer, x), atol=1e-10)
        found = torch.autograd.grad(twice(x).square().sum(), inputs)
        assert torch.allclose(found[0], torch.autograd.grad(expected(layer, x).square().sum(), x)[0], atol=1e-9)
        getattr(layer, name).weight.data /= 2


def test_it_is_copied_described_and_loaded():
    layer, x = made(bias=False), drawn(3, 13, seed=9)
    for again in (copy.deepcopy(layer), empty(layer.spec(), nn.Linear(13, 17, bias=False, dtype=torch.float64))):
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x)) and torch.equal(again.index, layer.index) and not again.linear
    bare = empty(layer.spec(), nn.Linear(13, 17, device="meta"))
    assert {t.device.type for t in bare.state_dict().values()} == {"meta"} and bare.spec() == layer.spec()
    assert bare(torch.empty(2, 5, 13, device="meta")).shape == (2, 5, 17)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 14}, "rank=14: a matrix of 17 × 13 has 0 to 13"),
        ({"channels": 14}, "channels=14: an input of 13 has 0 to 13"),
        ({"channels": -1}, "channels=-1: an input of 13"),
        ({"gamma": 1.5}, "gamma=1.5: the low-rank part's share of the output is 0 to 1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"activation": "swish"}, "activation='swish' must be one of silu, gelu, relu, none"),
    ],
)
def test_what_it_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        LowRankPlusChannels(13, 17, **{"rank": 3, "channels": 2, "gamma": 0.5, **options})
