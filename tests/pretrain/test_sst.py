"""SST against its rounds written out in float64."""

from __future__ import annotations

import copy
import logging
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import cut
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, TrainingArguments

import weft
from weft.algebra.random import generator
from weft.linear.spectral_plus_frozen import SpectralPlusFrozen
from weft.pretrain.sst import SstConfig, chances, drawn
from weft.run import data, methods
from weft.run.models import load_base
from weft.run.settings import TrainSettings
from weft.run.train import train

SHAPES = {"0.0": (6, 7), "1.0": (5, 6)}
ROUND = {"rank": 2, "iteration_steps": 3, "iterations": 2, "restart_warmup": 3, "seed": 5}
LR = 0.01


def blocks(dtype: torch.dtype = torch.float64, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    made = [nn.Linear(7, 6, bias=bias, dtype=dtype), nn.Linear(6, 5, bias=bias, dtype=dtype)]
    return nn.Sequential(nn.Sequential(made[0], nn.Tanh()), nn.Sequential(made[1]))


def sst(dtype: torch.dtype = torch.float64, bias: bool = False, **changes: Any) -> Any:
    return weft.reparametrise(blocks(dtype, bias), "sst", **{**ROUND, **changes}).train()


def rows(step: int, count: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step."""
    draw = torch.Generator().manual_seed(100 + step)
    return tuple(torch.randn(count, n, generator=draw, dtype=torch.float64) for n in (7, 5))  # type: ignore[return-value]


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, micro: int = 1) -> None:
    x, y = rows(step)
    dtype = next(model.parameters()).dtype
    for a, b in zip(x.to(dtype).chunk(micro), y.chunk(micro)):
        ((model(a) - b).square().mean() / micro).backward()
    optimizer.step()
    optimizer.zero_grad()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SpectralPlusFrozen)}


def layer_of(weight: Tensor, rank: int, bias: Tensor | None = None, **options: Any) -> SpectralPlusFrozen:
    """A layer whose active columns are some in the middle, and whose columns are no longer orthogonal."""
    layer = SpectralPlusFrozen.from_dense(weight, bias, rank=rank, **options)
    components = len(layer.values)
    layer.activate(torch.randperm(components, generator=generator("active", rank))[:rank].sort().values)
    with torch.no_grad():
        for p in (layer.up.weight, layer.down.weight):
            p += 0.2 * random(*p.shape, seed=1).to(p)
    return layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(columns: Tensor) -> Tensor:
    return columns.mT @ columns


# --- the layer --------------------------------------------------------------------------------------------------------

sides = st.integers(1, 13)


@settings(max_examples=30, deadline=None)
@given(out=sides, in_=sides, rank=sides, bias=st.booleans(), enhanced=st.booleans(), dead=st.booleans())
def test_output_and_gradients_are_those_of_the_formulas(out, in_, rank, bias, enhanced, dead) -> None:
    m = min(out, in_)
    rank = min(rank, m)
    layer = layer_of(random(out, in_), rank, random(out) if bias else None, enhanced=enhanced)
    if dead:
        with torch.no_grad():
            layer.values[int(layer.order[0])] = 0
    u, s, vh = (t.detach().clone() for t in layer.components())
    x, grad = random(2, 3, in_, seed=2).requires_grad_(), random(2, 3, out, seed=3)
    y = layer(x)
    y.backward(grad)
    w = sum(s[i] * torch.outer(u[:, i], vh[i]) for i in range(m))
    expected = torch.einsum("abi,oi->abo", x, w) + (layer.bias if bias else 0)
    g = torch.einsum("abo,abi->oi", grad, x.detach())
    active = layer.order[:rank].tolist()
    factor = torch.ones(rank).double() if enhanced else s[active]
    found = [y, layer.dense(), x.grad, layer.values.grad, layer.up.weight.grad, layer.down.weight.grad]
    wanted = [expected, w, torch.einsum("abo,oi->abi", grad, w), torch.stack([u[:, i] @ g @ vh[i] for i in range(m)])]
    wanted.append(torch.stack([f * (g @ vh[i]) for i, f in zip(active, factor)], 1))
    wanted.append(torch.stack([f * (g.mT @ u[:, i]) for i, f in zip(active, factor)]))
    if bias:
        found.append(layer.bias.grad)
        wanted.append(grad.sum((0, 1)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == rank * (out + in_) + m + bias * out
    stored = sum(t.numel() for name, t in layer.state_dict().items() if name != "order")
    assert stored == m * (out + in_ + 1) + bias * out


def test_enhanced_gradients_are_autograds_over_sigma() -> None:
    layer, x, grad = layer_of(random(6, 8), 3), random(9, 8), random(9, 6)
    u, s, vh = (t.detach().clone().requires_grad_() for t in layer.components())
    (x @ vh.mT @ s.diag() @ u.mT).backward(grad)
    layer(x).backward(grad)
    active = layer.order[:3].tolist()
    assert (s[active] > 0).all()
    torch.testing.assert_close(layer.up.weight.grad, (u.grad / s)[:, active])
    torch.testing.assert_close(layer.down.weight.grad, (vh.grad / s[:, None])[active])
    torch.testing.assert_close(layer.values.grad, s.grad)


def test_operations_and_what_is_kept_are_as_few_as_it_says() -> None:
    n, out, in_, m, r = 40, 11, 17, 11, 3
    layer, x = layer_of(random(out, in_), r, random(out)), random(n, in_).requires_grad_()
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        with FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as back:
            y.sum().backward()
    assert forward.get_total_flops() == 2 * n * m * (in_ + out)
    assert back.get_total_flops() == 2 * n * (m + r) * (in_ + out)
    assert sum(size for size in kept.values() if size % n == 0) == n * (in_ + m)


def test_under_autocast_and_with_factors_of_another_class() -> None:
    class Own(nn.Linear):
        pass

    layer, x = layer_of(random(6, 8).float(), 3, random(6).float()), random(9, 8).float()
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    narrow.sum().backward()
    assert narrow.dtype == torch.bfloat16 and all(p.grad is not None for p in layer.parameters())
    assert (narrow - plain).norm() < 0.02 * plain.norm()
    layer.up.__class__ = Own
    torch.testing.assert_close(layer(x), plain)


@settings(max_examples=20, deadline=None)
@given(out=sides, in_=sides, dead=st.integers(0, 4), whole=st.booleans())
def test_a_decomposition_keeps_the_map_and_what_it_says_nothing_of(out, in_, dead, whole) -> None:
    m = min(out, in_)
    dead = m if whole else min(dead, m)
    layer = layer_of(random(out, in_), max(1, m // 2))
    with torch.no_grad():
        layer.values[torch.randperm(m, generator=generator(m))[:dead]] = 0
    before, (u, s, vh) = layer.dense(), (t.detach().clone() for t in layer.components())
    layer.decompose_anew()
    torch.testing.assert_close(layer.dense(), before, rtol=1e-10, atol=1e-12)
    new_u, new_s, new_vh = layer.components()
    for columns in (new_u, new_vh.mT):
        torch.testing.assert_close(gram(columns), torch.eye(m).double(), rtol=0, atol=1e-10)
    live = m - dead
    assert (new_s[:live].diff() <= 0).all() and (new_s[:live] > 0).all() and not new_s[live:].any()
    torch.testing.assert_close(new_s.detach(), torch.linalg.svdvals(before), rtol=1e-8, atol=1e-10)
    for found, old in ((new_u, u), (new_vh.mT, vh.mT)):
        for at, i in enumerate((s == 0).nonzero()[:, 0].tolist(), start=live):
            left = old[:, i] - found[:, :at] @ (found[:, :at].mT @ old[:, i])  # Gram-Schmidt
            if left.norm() > 1e-6:
                torch.testing.assert_close(found[:, at], left / left.norm(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_it_starts_at_the_models_weight(dtype: torch.dtype, tolerance: float) -> None:
    dense, model = blocks(dtype, bias=True), sst(dtype, bias=True)
    for name, layer in layers(model).items():
        weight = dense.get_submodule(name).weight.detach().double()
        u, s, vh = (t.detach().double() for t in layer.components())
        assert ((u * s) @ vh - weight).norm() <= tolerance * weight.norm()
        assert torch.equal(layer.bias, dense.get_submodule(name).bias)
        for columns in (u, vh.mT):
            assert (gram(columns) - torch.eye(len(s))).abs().max() <= tolerance
        assert torch.allclose(s, torch.linalg.svdvals(weight), rtol=10 * tolerance)


# --- draws ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=20))
def test_chances_sum_to_one_and_leave_none_out(values) -> None:
    p = chances(torch.tensor(values), 0.5)
    assert abs(float(p.sum()) - 1) < 1e-12 and (p >= 1 / (2 * len(values)) * (1 - 1e-12)).all()
    if sum(values) > 1e-3:
        expected = [0.5 * (1 / len(values) + s / sum(values)) for s in values]
        torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-8)
    equal = chances(torch.full((len(values),), 3.0), 0.5)
    torch.testing.assert_close(equal, torch.full_like(equal, 1 / len(values)))


def test_draws_are_distinct_and_as_frequent_as_their_chances() -> None:
    values, count = torch.tensor([4.0, 0.0, 1.0, 3.0]), 4000
    config = SstConfig(rank=2)
    sets = [drawn(values, config, generator(i)).tolist() for i in range(count)]
    assert all(len(set(s)) == 2 and s == sorted(s) for s in sets)
    p = [0.5 * (0.25 + s / 8) for s in values.tolist()]
    for i in range(4):
        expected = p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i)
        assert abs(sum(i in s for s in sets) / count - expected) < 0.03


# --- training ---------------------------------------------------------------------------------------------------------


def svd(w: Tensor) -> list[Tensor]:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    sign = torch.stack([row[row.abs().argmax()].sign() for row in vh])
    return [u * sign, s, vh * sign[:, None]]


def written_out(steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """U, σ, Vᵀ and S of both layers after so many steps of AdamW without decay.

    And the moments (m, v, count) of U_S, σ and V_S. No σ of these becomes 0.
    """
    w = {name: blocks().get_parameter(f"{name}.weight").detach() for name in SHAPES}
    parts = {name: svd(w[name]) for name in SHAPES}

    def draw(name: str, *key: object) -> list[int]:
        s = parts[name][1]
        p = 0.5 * (1 / len(s) + s / s.sum())
        return sorted(torch.multinomial(p, 2, generator=generator(5, *key, name)).tolist())

    chosen = {name: draw(name) for name in SHAPES}
    fresh = (0.0, 0.0, 0)
    moments: dict[str, list[Any]] = {name: [fresh] * 3 for name in SHAPES}
    for step in range(steps):
        x, y = rows(step)
        dense = [((u * s) @ vh).requires_grad_() for u, s, vh in parts.values()]
        loss = ((x @ dense[0].mT).tanh() @ dense[1].mT - y).square().mean()
        iteration, before = divmod(step, 3)
        slow = (before + 1) / 3 if iteration else 1
        for name, g in zip(SHAPES, torch.autograd.grad(loss, dense)):
            (u, s, vh), at = parts[name], chosen[name]
            gradients = [g @ vh[at].mT, ((u.mT @ g) * vh).sum(1), u[:, at].mT @ g]
            rates = [LR * slow, LR * (slow if iteration and iteration % 2 == 0 else 1), LR * slow]
            moved = []
            for k, (p, grad) in enumerate(zip((u[:, at], s, vh[at]), gradients)):
                m, v, count = moments[name][k]
                m, v, count = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2, count + 1
                moments[name][k] = (m, v, count)
                moved.append(p - rates[k] * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8))
            u[:, at] = moved[0] / moved[0].norm(dim=0)
            vh[at] = moved[2] / moved[2].norm(dim=1, keepdim=True)
            parts[name][1] = moved[1].clamp(min=0)
            assert (parts[name][1] > 0).all()
            if before == 2:
                if (iteration + 1) % 2 == 0:
                    u, s, vh = parts[name] = svd((u * parts[name][1]) @ vh)
                    moments[name][1] = fresh
                moments[name][0] = moments[name][2] = fresh
                chosen[name] = draw(name, step + 1)
    return {name: [*parts[name], chosen[name]] for name in SHAPES}, moments


def test_two_rounds_are_those_written_out() -> None:
    """At every step: components, which are active, and moments."""
    model = sst()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    for step in range(14):
        take(model, optimizer, step)
        parts, moments = written_out(step + 1)
        for name, layer in layers(model).items():
            *expected, active = parts[name]
            assert layer.order[:2].tolist() == active
            for one, other in zip(layer.components(), expected, strict=True):
                torch.testing.assert_close(one.detach(), other, rtol=1e-8, atol=1e-10)
            for p, (m, v, count) in zip((layer.up.weight, layer.values, layer.down.weight), moments[name]):
                state = optimizer.state[p]
                assert int(state["step"]) == count
                for one, other in ((state["exp_avg"], m), (state["exp_avg_sq"], v)):
                    torch.testing.assert_close(one, torch.zeros_like(p) + other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_columns_rest_and_active_ones_stay_of_norm_one(dtype: torch.dtype) -> None:
    """Bit for bit, within an iteration and, for what is in neither of two draws, beyond it."""
    model = sst(dtype, iterations=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(9):
        before = {n: [*map(torch.clone, layer.components()), layer.order.clone()] for n, layer in layers(model).items()}
        take(model, optimizer, step)
        for name, layer in layers(model).items():
            (u, _, vh), (old_u, _, old_vh, order) = layer.components(), before[name]
            active, rest = order[:2].long(), order[2:].long()
            assert torch.equal(u[:, rest], old_u[:, rest]) and torch.equal(vh[rest], old_vh[rest])
            assert not torch.equal(u[:, active], old_u[:, active])
            assert ((step + 1) % 3 == 0) or torch.equal(layer.order, order)
            norms = torch.cat([u.double().norm(dim=0), vh.double().norm(dim=1)])
            assert (norms - 1).abs().max() < 4 * torch.finfo(dtype).eps
            assert (layer.values >= 0).all()


def test_a_singular_value_stops_at_zero() -> None:
    model = sst()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = layers(model)["0.0"]
    with torch.no_grad():
        layer.values[1:3] = torch.tensor([0.02, 0.32])
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p is layer.values else torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.values[1:3].tolist(), [0.0, 0.22])


def test_each_layers_rounds_are_as_long_as_its_columns_last() -> None:
    model = sst(rank=5, iterations=None)
    (controller,) = {c for layer in layers(model).values() for c in layer.controllers.values()}
    assert [[layer.name for layer in controller.decomposed(k)] for k in range(4)] == [
        [], ["1.0"], ["0.0", "1.0"], ["1.0"]
    ]  # fmt: skip


def test_in_time_every_column_is_trained() -> None:
    model = sst(iterations=99)
    start = {name: layer.components()[0].detach().clone() for name, layer in layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(45):
        take(model, optimizer, step)
    for name, layer in layers(model).items():
        assert ((layer.components()[0] - start[name]).norm(dim=0) > 0).all()


def test_draws_are_by_seed_step_and_layer() -> None:
    def after(seed: int) -> list[list[int]]:
        model = sst(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        found = []
        for step in range(12):
            take(model, optimizer, step)
            found += [layer.order[:2].tolist() for layer in layers(model).values()]
        return found

    one, again, other = after(5), after(5), after(6)
    assert one == again != other and one[::2] != one[1::2]


@pytest.mark.parametrize("at", range(1, 14))
def test_resumed_is_uninterrupted_at_every_phase(at: int) -> None:
    def build() -> tuple[Any, torch.optim.Optimizer]:
        model = sst(torch.float32, bias=True)
        args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, learning_rate=LR, max_steps=12)
        return model, weft.optimizer_and_scheduler(model, args)[0]

    (_, optimizer), (_, other) = cut(build, take, 14, at)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("lr", [LR, 0.3])
def test_four_small_batches_are_a_large_one(lr: float) -> None:
    """With the larger rate several of σ become 0 at a time, and W says nothing of their columns."""
    found = []
    for micro in (1, 4):
        model = sst()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for step in range(14):
            take(model, optimizer, step, micro)
        found.append(model.state_dict())
    for name, t in found[0].items():
        torch.testing.assert_close(found[1][name], t, rtol=1e-7, atol=1e-9)


def test_a_copy_goes_its_own_way() -> None:
    model = sst()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=LR)
    for step in range(7):
        take(twin, optimizer, step)
    (mine,), (its,) = ({c for m in layers(one).values() for c in m.controllers.values()} for one in (model, twin))
    assert (mine.step, its.step) == (0, 7)
    assert all(torch.equal(t, sst().state_dict()[name]) for name, t in model.state_dict().items())


def test_what_cannot_be_reset_is_refused_at_once() -> None:
    model = sst(torch.float32)
    with pytest.raises(weft.UsageError, match="sst cannot reset (exp_avg_sq_row|row_var) of Adafactor"):
        take(model, torch.optim.Adafactor(model.parameters()), 0)
    model = sst()
    with torch.no_grad():
        for p in model.parameters():
            p += LR
    with pytest.raises(weft.UsageError, match="sst resets moments of torch.optim.Optimizers alone: use one$"):
        weft.step(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iteration_steps": 0}, "iteration_steps=0 must be at least 1"),
        ({"iterations": 0}, "iterations=0 must be at least 1, or none"),
        ({"restart_warmup": 4}, "restart_warmup=4 must lie in 0 to iteration_steps=3"),
        ({"uniform_share": 0}, "uniform_share=0 must be a share above 0"),
        ({"rank": 6}, "sst: 1.0: rank=6: a matrix of 5 × 6 has 1 to 5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(weft.UsageError, match=said):
        sst(**options)


def test_a_run_without_a_second_draw_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = sst()
    args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, max_steps=3)
    optimizer, _ = weft.optimizer_and_scheduler(model, args)
    with caplog.at_level(logging.WARNING):
        take(model, optimizer, 0)
    assert "iteration_steps=3 in a run of 3 steps" in caplog.text


# --- in a model, in a run ---------------------------------------------------------------------------------------------

SHORT = {"rank": 4, "iteration_steps": 3, "iterations": 2, "restart_warmup": 2}


def run(llama: Any, corpus: Any, output: Any, resume: bool = False, **given: Any) -> Any:
    base = load_base(str(llama), "causal-lm")
    splits = data.load_splits(str(corpus), "causal-lm", base.tokenizer, max_length=32)
    options = {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "eval_steps": 0, "logging_steps": 4, **given}
    chosen = methods.resolve("sst", SHORT)
    return train(base, splits, chosen, TrainSettings(**options), output, resume=resume, progress=False)


def test_a_llama_learns_and_is_saved_as_what_it_is_and_dense(llama, corpus, tmp_path) -> None:
    result = run(llama, corpus, None, max_steps=20, logging_steps=10)
    losses = [row["loss"] for row in result.curve if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    model = result.model.eval()
    assert {type(m).__name__ for m in layers(model).values()} == {"SpectralPlusFrozen"} and len(layers(model)) == 14
    model.save_pretrained(tmp_path)
    tokens = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected)
        dense = weft.to_dense(model)
        assert not layers(dense)
        torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_killed_run_goes_on_where_it_was(llama, corpus, tmp_path) -> None:
    whole = run(llama, corpus, tmp_path / "whole", save_steps=4)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    again = run(llama, corpus, tmp_path / "killed", resume=True, save_steps=4)
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.model.state_dict().items())
    (controller,) = {c for m in layers(again.model).values() for c in m.controllers.values()}
    assert controller.step == controller.total_steps == 8
