"""Lorentz layers against their formula written out in float64, dense and with W in SST's form."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weft
from weft.linear.spectral_plus_frozen import SpectralPlusFrozen
from weft.pretrain._lorentz import lifted

SST = {"rank": 2, "iteration_steps": 2, "iterations": 2, "restart_warmup": 1}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(x: Tensor, w: Tensor, b: Tensor | None, s: float) -> Tensor:
    """The formula, row by row; ‖z_1…‖² above 1e-8."""
    rows = []
    for row in x.reshape(-1, w.shape[1]).tolist():
        z = [sum(a * c for a, c in zip(weights, row)) for weights in w.tolist()]
        z = z if b is None else [a + c for a, c in zip(z, b.tolist())]
        t = math.exp(s) / (1 + math.exp(-z[0])) + 1.1
        size = sum(a * a for a in z[1:])
        assert size > 1e-8
        rows.append([t, *(a * math.sqrt((t * t - 1) / size) for a in z[1:])])
    return torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:-1], len(w))


def off(y: Tensor) -> float:
    """The largest |−y_0² + ‖y_1…‖² + 1|, over y_0²."""
    y = y.detach().double()
    return float((((y[..., 1:] ** 2).sum(-1) - y[..., 0] ** 2 + 1).abs() / y[..., 0] ** 2).max())


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(weft.LorentzLinear(7, 6, dtype=dtype), weft.LorentzLinear(6, 5, bias=False, dtype=dtype))
    with torch.no_grad():
        made[0].linear.bias.normal_()
        made[0].s.add_(0.3)
    return made


def points(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    space = random(count, 6)
    return torch.cat([(1 + space.square().sum(-1, keepdim=True)).sqrt(), space], -1).to(dtype)


def written_out_network(model: Any, x: Tensor) -> Tensor:
    for layer in model:
        inner = layer.linear
        w = inner.dense() if isinstance(inner, SpectralPlusFrozen) else inner.weight
        x = written_out(x, w.detach(), None if inner.bias is None else inner.bias.detach(), float(layer.s))
    return x


@settings(max_examples=30, deadline=None)
@given(
    in_=st.integers(2, 9),
    out=st.integers(2, 9),
    batch=st.sampled_from([(), (0,), (3,), (2, 0), (2, 3)]),
    bias=st.booleans(),
    scale=st.floats(0.1, 20),
)
def test_the_output_is_the_formulas(in_, out, batch, bias, scale) -> None:
    layer = weft.LorentzLinear(in_, out, bias=bias, scale=scale, dtype=torch.float64)
    with torch.no_grad():
        layer.linear.weight.copy_(random(out, in_, seed=1))
        if bias:
            layer.linear.bias.copy_(random(out, seed=2))
    x = random(*batch, in_)
    y = layer(x)
    expected = written_out(x, layer.linear.weight.detach(), layer.linear.bias if bias else None, math.log(scale))
    torch.testing.assert_close(y.detach(), expected, rtol=1e-10, atol=1e-12)
    assert not x.numel() or (off(y) < 1e-12 and (y[..., 0] <= 1.1 + scale * (1 + 1e-12)).all())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-6)]
)
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4, 1.0, 1e4])
def test_every_output_is_on_the_hyperboloid(dtype: torch.dtype, tolerance: float, size: float) -> None:
    """Even of what has no direction, where the formula as it stands would leave it."""
    z = torch.cat([8 * random(50, 1), size * random(50, 4, seed=1)], -1).to(dtype)
    y = lifted(z, torch.tensor(10.0, dtype=dtype).log())
    assert y.dtype == dtype and off(y) < tolerance and (y[..., 0] >= 1).all()
    if not size:
        assert torch.equal(y, torch.eye(5, dtype=dtype)[:1].expand(50, 5))


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0])
def test_gradients_are_those_of_the_values(size: float) -> None:
    z = torch.cat([random(3, 1), size * random(3, 4, seed=1)], -1).requires_grad_()
    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lifted, (z, s), eps=1e-9 if size < 1e-4 else 1e-6, atol=1e-3)


def test_it_starts_as_it_says() -> None:
    torch.manual_seed(0)
    layer = weft.LorentzLinear(40, 25)
    w = layer.linear.weight.detach()
    assert not w[:, 0].any() and not layer.linear.bias.any() and 0.19 < float(w.abs().max()) <= 0.2
    assert abs(float(w[:, 1:].mean())) < 0.01 and math.isclose(float(layer.s), math.log(10), rel_tol=1e-6)
    assert not hasattr(layer, "weight")


def test_sst_changes_nothing_but_how_w_is_held() -> None:
    dense, x = network(), points(9)
    model = weft.reparametrise(copy.deepcopy(dense), "sst", **SST)
    assert [name for name, m in model.named_modules() if isinstance(m, SpectralPlusFrozen)] == ["0.linear", "1.linear"]
    assert all(type(layer) is weft.LorentzLinear for layer in model)
    grad = random(9, 5, seed=3)
    for each in (dense, model):
        each(x).backward(grad)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-12)
    for one, other in zip(model, dense):
        assert torch.equal(one.s, other.s)
        torch.testing.assert_close(one.s.grad, other.s.grad, rtol=1e-8, atol=1e-10)
        u, _, vh = one.linear.components()
        sigma = ((u.mT @ other.linear.weight.grad) * vh).sum(1)  # u_iᵀ·G·v_i, with G of the dense layer
        torch.testing.assert_close(one.linear.values.grad, sigma.detach(), rtol=1e-8, atol=1e-10)
    assert torch.equal(model[0].linear.bias, dense[0].linear.bias)


def test_a_trained_one_is_still_the_formula_with_its_w() -> None:
    model, x, aim = weft.reparametrise(network(), "sst", **SST), points(9), random(9, 5, seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(9):  # past a decomposition and four draws
        losses.append((model(x) - aim).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    y = model(x).detach()
    torch.testing.assert_close(y, written_out_network(model, x), rtol=1e-9, atol=1e-10)
    assert off(y) < 1e-12 and losses[-1] < losses[0]
    assert model(x[:0]).shape == (0, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_dtypes_under_sst(dtype: torch.dtype, tolerance: float) -> None:
    model = weft.reparametrise(network(dtype), "sst", **SST)
    y = model(points(20, dtype))
    assert y.dtype == dtype and off(y) < tolerance
    y.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_under_autocast_it_is_computed_wide() -> None:
    model, x = weft.reparametrise(network(torch.float32), "sst", **SST), points(20, torch.float32)
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(x)
    assert narrow.dtype == torch.bfloat16 and off(narrow) < 2**-6
    assert (narrow - plain).norm() < 0.05 * plain.norm()


def test_geoopt_finds_its_outputs_where_they_should_be() -> None:
    geoopt = pytest.importorskip("geoopt")
    y = network()(points(9))
    space = geoopt.Lorentz().double()
    space.assert_check_point_on_manifold(y)
    torch.testing.assert_close(space.expmap0(space.logmap0(y)), y)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"in_features": 1}, "in_features=1 must be at least 2: a time, and a space of one dimension"),
        ({"out_features": 1}, "out_features=1 must be at least 2"),
        ({"scale": 0.0}, "scale=0.0 must be a number above 0"),
        ({"scale": math.inf}, "scale=inf must be a number above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(weft.UsageError, match=said):
        weft.LorentzLinear(**{"in_features": 4, "out_features": 3, **options})
