"""LoCA against dense cosine matrices and finite differences written out in float64."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama
from torch import Tensor, nn

import weft
from weft.adapters._training import parameter_groups
from weft.adapters.loca import LocaConfig, LocaDelta, Product


def cosine(n: int) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    c = math.sqrt(2 / n) * torch.cos((2 * j + 1) * i * math.pi / (2 * n))
    c[0] /= math.sqrt(2)
    return c


def one_linear(out: int = 9, in_: int = 14, k: int = 20, **options: object) -> tuple[nn.Module, nn.Linear, LocaDelta]:
    """A float64 model of one adapted linear layer with random coefficients: (model, its base layer, its delta)."""
    torch.manual_seed(1)
    config = LocaConfig(n_frequency=k, target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(in_, out)), config).double().train()
    (delta,) = (d for d in model.modules() if isinstance(d, LocaDelta))
    with torch.no_grad():
        delta.a.normal_()
    return model, model.base_model.model[0].base_layer, delta


def expected(d: LocaDelta) -> Tensor:
    """α·C_outᵀ·F·C_in, from the definitions."""
    f = torch.zeros(d.out, d.in_, dtype=torch.float64)
    for a, l0, l1 in zip(d.a.tolist(), *d.l.tolist()):
        row = round(min(max(l0, 0), 0.999) * (d.out - 1))
        column = round(min(max(l1, 0), 0.999) * (d.in_ - 1))
        f[row, column] += a
    return d.config.alpha * cosine(d.out).T @ f @ cosine(d.in_)


def test_the_start_is_the_base_model_and_only_coefficients_have_a_gradient() -> None:
    model, base, d = one_linear()
    with torch.no_grad():
        d.a.zero_()
    x = torch.randn(5, 14, dtype=torch.float64)
    assert torch.equal(model(x), base(x))
    d.locating = True
    model(x).square().sum().backward()
    assert not d.l.grad.any()
    d.locating = False
    model(x).square().sum().backward()
    assert d.a.grad.abs().min() > 0


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 12), in_=st.integers(1, 12), data=st.data(), bent=st.booleans())
def test_every_way_to_multiply_is_the_definition(out: int, in_: int, data: st.DataObject, bent: bool) -> None:
    k = data.draw(st.integers(1, out * in_))
    model, base, d = one_linear(out, in_, k, alpha=data.draw(st.sampled_from([0.5, 1.0, 3.0])))
    with torch.no_grad():
        d.l.mul_(1.2)  # some beyond the end
    want = expected(d)
    assert torch.allclose(d.delta(), want, atol=1e-12)
    x = torch.randn(3, in_, dtype=torch.float64)
    d._samples = lambda _: bent  # type: ignore[method-assign]
    assert torch.allclose(model(x), base(x) + x @ want.T, atol=1e-11)
    assert torch.allclose(d(x), x @ want.T, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from([(9, 14), (5, 5), (1, 7), (16, 8)]), tokens=st.sampled_from([1, 7, Product.ROWS + 44]))
def test_gradients_are_the_spectrum_of_the_dense_gradient(shape: tuple[int, int], tokens: int) -> None:
    """By the dense route and by transformed inputs, for coefficients and for places, edges included."""
    out, in_ = shape
    model, base, d = one_linear(out, in_, min(20, out * in_), alpha=2.0)
    x = torch.randn(tokens, in_, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(tokens, out, dtype=torch.float64)
    w = (base.weight.detach() + expected(d)).requires_grad_()
    y = torch.nn.functional.linear(x, w, base.bias)
    dense, d_x = torch.autograd.grad((y - goal).square().sum(), [w, x])
    k = cosine(out) @ (d.config.alpha * dense) @ cosine(in_).T
    rows, columns = d.cells().tolist()
    slopes = torch.zeros_like(d.l)
    for i, (a, row, column) in enumerate(zip(d.a.tolist(), rows, columns)):
        down = float(k[min(row + 1, out - 1), column] - k[max(row - 1, 0), column])
        right = float(k[row, min(column + 1, in_ - 1)] - k[row, max(column - 1, 0)])
        slopes[:, i] = 0.5 * a * torch.tensor([down * (out - 1), right * (in_ - 1)])
    slopes[d.l > 0.999] = 0
    for sampled in (False, True):
        d._samples = lambda _, sampled=sampled: sampled  # type: ignore[method-assign]
        for d.locating in (False, True):
            d.a.grad = d.l.grad = x.grad = None
            (model(x) - goal).square().sum().backward()
            assert torch.allclose(x.grad, d_x, atol=1e-10)
            if d.locating:
                assert not d.a.grad.any()
                assert torch.allclose(d.l.grad, slopes, atol=1e-9)
            else:
                assert torch.allclose(d.a.grad, k[rows, columns], atol=1e-10) and not d.l.grad.any()


def test_energy_is_that_of_the_coefficients() -> None:
    _, _, d = one_linear(8, 8, 4, alpha=3.0)
    with torch.no_grad():
        d.l.copy_(torch.tensor([[0.0, 0.3, 0.6, 0.9], [0.1, 0.4, 0.7, 0.95]]))
    assert math.isclose(float(d.delta().norm()), 3 * float(d.a.norm()), rel_tol=1e-12)


def test_the_lowest_coefficient_is_a_constant() -> None:
    _, _, d = one_linear(6, 10, 1, alpha=2.0)
    with torch.no_grad():
        d.l.zero_()
        d.a.fill_(1.5)
    assert torch.allclose(d.delta(), torch.full((6, 10), 2.0 * 1.5 / math.sqrt(60), dtype=torch.float64))


def test_turns_follow_optimiser_steps_and_what_rests_keeps_still() -> None:
    model, _, d = one_linear(learn_location_iter=70, coefficient_steps=10, location_steps=20)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.1))
    turns = []
    for _ in range(80):
        before = d.a.detach().clone(), d.l.detach().clone()
        for _ in range(2):  # micro-batches are no steps
            model(torch.randn(4, 14, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        moved = not torch.equal(d.a, before[0]), not torch.equal(d.l, before[1])
        assert moved in ((True, False), (False, True))
        turns.append("l" if moved[1] else "a")
    assert "".join(turns) == "a" * 10 + "l" * 20 + "a" * 10 + "l" * 20 + "a" * 20


def test_the_slope_of_a_place_is_clamped_once_a_step() -> None:
    model, _, d = one_linear(coefficient_steps=1, learn_location_iter=99)
    optimizer = torch.optim.SGD([{"params": [d.a]}, {"params": [d.l], "lr": 1e-4, "weight_decay": 0.0}], lr=0.0)
    d.config.require_groups = False
    optimizer.step()
    before = d.l.detach().clone()
    model(100 * torch.randn(50, 14, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    inside = (before >= 0) & (before <= 0.999)
    steps = ((d.l - before).abs() / 1e-4 / torch.tensor([[8.0], [13.0]]))[inside]
    assert float(steps.max()) <= 1 + 1e-6 and float(steps.max()) > 0.99


def test_a_tenth_of_a_run_moves_places(tmp_path) -> None:
    model, _, d = one_linear()
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), max_steps=400, report_to="none", use_cpu=True)
    weft.optimizer_and_scheduler(model, args)
    turns = []
    for d.controller.step in (0, 9, 10, 29, 30, 39, 40, 70):
        turns.append(d.controller.locating())
    assert turns == [False, False, True, True, False, False, False, False]


def test_counts() -> None:
    model = peft.get_peft_model(llama(), LocaConfig(n_frequency=30, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 3 * 30


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"n_frequency": 0}, "n_frequency=0 must be at least 1"), ({"learn_location_iter": -1}, "learn_location_iter=-1")],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        LocaConfig(**options)


def test_more_coefficients_than_numbers_are_refused() -> None:
    with pytest.raises(weft.UsageError, match="n_frequency=127 is more than 0 has numbers: its weight is 9 × 14"):
        one_linear(k=127)


@pytest.mark.slow
def test_learned_places_beat_fixed_ones_on_a_dense_target() -> None:
    """Regression of a random matrix with 2·r·64 numbers, r = 2; every place in reach has a coefficient of its own."""

    def loss(end: int, seed: int) -> float:
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(64, 64, bias=False))
        nn.init.zeros_(base[0].weight)
        goal = torch.randn(64, 64)
        config = LocaConfig(n_frequency=256, target_modules=["0"], location_lr=5e-3, learn_location_iter=end)
        model = peft.get_peft_model(base, config).train()
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=5e-2, weight_decay=0.0))
        for _ in range(600):
            optimizer.zero_grad()
            value = (model(torch.eye(64)) - goal.T).square().mean()
            value.backward()
            optimizer.step()
        return value.item()

    for seed in range(3):
        assert loss(500, seed) < loss(0, seed)
