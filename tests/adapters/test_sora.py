"""SoRA against its operators and gradients written out in float64."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SixLayers, fit_two_of_six, llama
from torch import Tensor, nn
from transformers import TrainingArguments

import weft
from weft.adapters.sora import SoraConfig, SoraController, SoraDelta
from weft.algebra.prox import levels, reference_prox, soft_threshold


def attach(base: nn.Module, **options: object) -> tuple[nn.Module, SoraController, list[SoraDelta]]:
    """A float64 model in training mode with random B, its controller and its deltas."""
    torch.manual_seed(1)
    options = {"target_modules": [n for n, m in base.named_modules() if isinstance(m, nn.Linear)], **options}
    model = peft.get_peft_model(base, SoraConfig(**options)).double().train()
    deltas = [d for d in model.modules() if isinstance(d, SoraDelta)]
    for d in deltas:
        nn.init.normal_(d.B)
    return model, deltas[0].controller, deltas  # type: ignore[return-value]


def two_linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))


def run_args(tmp_path: object, **options: object) -> TrainingArguments:
    options = {"max_steps": 20, "learning_rate": 1e-2, **options}
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def test_no_update_at_the_start_though_the_gates_are_random() -> None:
    model = peft.get_peft_model(llama(), SoraConfig(r=4)).eval()
    deltas = [d for d in model.modules() if isinstance(d, SoraDelta)]
    gates = torch.cat([d.g for d in deltas])
    assert gates.abs().min() > 0 and 0.6 < gates.std() < 1.4
    assert all(d.delta().abs().max() == 0 for d in deltas)
    assert all(d.A.abs().max() <= 1 / math.sqrt(d.in_) for d in deltas)  # Kaiming-uniform with a = √5


def test_prox_of_known_values() -> None:
    v = torch.tensor([0.3, -0.3, 0.05, 0.15, 0.1], dtype=torch.float64)
    expected = torch.tensor([0.2, -0.2, 0.0, 0.05, 0.0], dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(v, 0.1), expected, rtol=1e-12, atol=1e-12)
    # the authors' operator also zeroes what the subtraction brings below t, and leaves |v| = t alone
    expected = torch.tensor([0.2, -0.2, 0.0, 0.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(reference_prox(v, 0.1), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, derandomize=True)
@given(v=st.floats(-3, 3), t=st.floats(0, 1))
def test_the_prox_minimises_its_objective(v: float, t: float) -> None:
    def objective(u: float) -> float:
        return 0.5 * (u - v) ** 2 + t * abs(u)

    found = soft_threshold(torch.tensor(v, dtype=torch.float64), t).item()
    others = [0.0, v, *(found + step for step in (-1e-3, 1e-3, -0.3, 0.3))]
    assert all(objective(found) <= objective(u) + 1e-12 for u in others)


@pytest.mark.parametrize("spacing", ["linear", "log_linear", "exp_linear"])
@pytest.mark.parametrize("count", [2, 7])
def test_level_lists_have_their_length_and_exact_ends(spacing: str, count: int) -> None:
    found = SoraConfig(
        sparse_lambda_2=1e-4, max_lambda=7e-4, threshold_levels=count, stage_steps=5, level_spacing=spacing
    ).thresholds()
    assert len(found) == count and found[0] == 1e-4 and found[-1] == 7e-4 and found == sorted(found)
    middle = levels(1.0, 4.0, 3, spacing)[1]
    expected = {"linear": 2.5, "log_linear": math.log((math.e + math.e**4) / 2), "exp_linear": 2.0}
    assert math.isclose(middle, expected[spacing], rel_tol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(out=st.integers(1, 9), in_=st.integers(1, 9), data=st.data())
def test_pruned_is_gated(out: int, in_: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(out, in_)))
    kept = data.draw(st.lists(st.booleans(), min_size=r, max_size=r))
    model, _, (d,) = attach(nn.Sequential(nn.Linear(in_, out)), r=r, lora_alpha=5.0)
    with torch.no_grad():
        d.g.mul_(torch.tensor(kept))
    base = model.base_model.model[0].base_layer
    x = torch.randn(4, in_, dtype=torch.float64)
    gated = base(x) + 5.0 / r * ((x @ d.A.T) * d.g) @ d.B.T
    torch.testing.assert_close(model(x), gated, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.eval()(x), gated, rtol=1e-10, atol=1e-12)
    compact, rank = d.compact(dict(d.state_dict()))
    assert rank == sum(kept) and compact["A"].shape == (rank, in_) and compact["B"].shape == (out, rank)
    pruned = 5.0 / r * (compact["B"] * compact["g"]) @ compact["A"]  # s is still divided by r_max
    torch.testing.assert_close(x @ pruned.T + base(x), gated, rtol=1e-10, atol=1e-12)


def test_behind_a_zero_gate_nothing_learns_but_the_gate() -> None:
    model, _, (d,) = attach(nn.Sequential(nn.Linear(7, 6)), r=4)
    with torch.no_grad():
        d.g[[0, 2]] = 0
    model(torch.randn(5, 7, dtype=torch.float64)).pow(2).sum().backward()
    for p, dim in ((d.A, 1), (d.B, 0)):
        assert not p.grad.index_select(1 - dim, torch.tensor([0, 2])).any()
        assert p.grad.index_select(1 - dim, torch.tensor([1, 3])).abs().min() > 0
    assert d.g.grad.abs().min() > 0  # so that it can revive


@pytest.mark.parametrize("prox", ["soft", "reference"])
def test_without_gradient_every_step_is_one_prox(prox: str) -> None:
    model, _, deltas = attach(
        two_linears(), r=4, sparse_lambda_2=0.03, prox=prox, sparse_lambda=0.0, require_groups=False
    )
    start = [d.g.detach().clone() for d in deltas]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(5):
        optimizer.step()
    for d, g in zip(deltas, start):
        for _ in range(5):
            g = soft_threshold(g, 0.03) if prox == "soft" else reference_prox(g, 0.03)
        assert torch.equal(d.g, g)
    if prox == "soft":
        total = [soft_threshold(g, 5 * 0.03) for g in start]
        torch.testing.assert_close([d.g.detach() for d in deltas], total, rtol=1e-12, atol=1e-12)


def test_the_penalty_is_the_mean_of_the_models_gates() -> None:
    found = {}
    for coefficient in (0.0, 0.7):
        model, controller, deltas = attach(two_linears(), r=4, sparse_lambda=coefficient)
        for part in range(3):  # micro-batches of one step
            source = torch.Generator().manual_seed(part)
            model(torch.randn(4, 7, generator=source, dtype=torch.float64)).pow(2).sum().backward()
        found[coefficient] = [p.grad for d in deltas for p in (d.g, d.A, d.B)]
    expected: list[Tensor] = []
    for d in deltas:
        expected += [0.7 * d.g.detach().sign() / 8, torch.zeros_like(d.A), torch.zeros_like(d.B)]
    torch.testing.assert_close([b - a for a, b in zip(*found.values())], expected, rtol=1e-9, atol=1e-12)
    mean = torch.cat([d.g.detach() for d in deltas]).abs().mean()
    torch.testing.assert_close(controller.last_penalty, 0.7 * mean)


def test_gates_are_stepped_by_proximal_adam_without_decay(tmp_path) -> None:
    """Two steps of training against Adam (eps outside the root) and the prox written out."""
    model, _, (d,) = attach(
        nn.Sequential(nn.Linear(7, 6)), r=4, sparse_lr=0.05, sparse_lambda=0.1, sparse_lambda_2=0.01
    )
    args = run_args(tmp_path, weight_decay=0.5, lr_scheduler_type="constant")
    optimizer, _ = weft.optimizer_and_scheduler(model, args)
    g, m, v = d.g.detach().clone(), torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    x = torch.randn(5, 7, dtype=torch.float64)
    for t in (1, 2):
        model(x).pow(2).sum().backward()
        gradient = d.g.grad.clone()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        g = g - 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6)
        g = g.sign() * (g.abs() - 0.01).clamp(min=0)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(d.g.detach(), g, rtol=1e-9, atol=1e-12)


def test_gates_outside_their_group_are_refused() -> None:
    model, _, _ = attach(two_linears(), r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    model(torch.randn(5, 7, dtype=torch.float64)).sum().backward()
    with pytest.raises(weft.UsageError, match="sora needs 'g' in a group with"):
        optimizer.step()


@pytest.mark.parametrize("steps", [15, 18])
def test_stages_raise_the_threshold_and_restart_the_schedule(steps: int, tmp_path) -> None:
    model, controller, _ = attach(
        two_linears(), r=4, sparse_lambda_2=0.0, max_lambda=4e-3, threshold_levels=3, stage_steps=5
    )
    args = run_args(tmp_path, max_steps=steps, lr_scheduler_type="linear")
    optimizer, scheduler = weft.optimizer_and_scheduler(model, args)
    seen = []
    for _ in range(steps):
        seen.append((controller.threshold(), optimizer.param_groups[0]["lr"]))
        model(torch.randn(5, 7, dtype=torch.float64)).sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    thresholds, rates = zip(*seen)
    assert thresholds == (0.0,) * 5 + (2e-3,) * 5 + (4e-3,) * (steps - 10)  # the last value stays
    assert rates[:5] == rates[5:10] == rates[10:15] and rates[0] == 1e-2 > rates[4] > 0


def test_stages_need_a_schedule_that_is_a_function_of_the_step(tmp_path) -> None:
    model, _, _ = attach(two_linears(), r=4, threshold_levels=3, stage_steps=5)
    args = run_args(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=5)
    with pytest.raises(weft.UsageError, match="cannot start anew in a new stage"):
        weft.optimizer_and_scheduler(model, args)


def test_gates_stay_float32_on_a_bfloat16_base() -> None:
    model = peft.get_peft_model(llama().bfloat16(), SoraConfig(r=4)).to(torch.bfloat16)
    assert {p.dtype for d in model.modules() if isinstance(d, SoraDelta) for p in d.parameters()} == {torch.float32}


def test_the_file_holds_what_survived_and_keeps_the_scale(tmp_path) -> None:
    model = peft.get_peft_model(llama(), SoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    deltas = [d for d in model.modules() if isinstance(d, SoraDelta)]
    with torch.no_grad():
        for i, d in enumerate(deltas):
            d.B.normal_()
            d.g[: i + 1] = 0  # the last module loses everything
    x = torch.arange(12).reshape(2, 6)
    expected = model.eval()(input_ids=x).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(input_ids=x).logits, expected)
    assert [len(d.g) for d in loaded.modules() if isinstance(d, SoraDelta)] == [3, 2, 1, 0]
    assert list(loaded.peft_config["default"].rank_pattern.values()) == [3, 2, 1, 0]


def test_count_is_the_formula() -> None:
    model = peft.get_peft_model(llama(), SoraConfig(r=3, target_modules=["k_proj", "down_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * ((32 + 16 + 1) + (37 + 32 + 1))
    assert sum(d.count() for d in model.modules() if isinstance(d, SoraDelta)) == 2 * 3 * (
        (32 + 16 + 1) + (37 + 32 + 1)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prox": "hard"}, "use soft or reference"),
        ({"threshold_levels": 3}, "needs stage_steps"),
        ({"threshold_levels": 0}, "needs stage_steps"),
        ({"threshold_levels": 2, "stage_steps": 5, "level_spacing": "cubic"}, "unknown spacing 'cubic'"),
        (
            {"threshold_levels": 2, "stage_steps": 5, "level_spacing": "exp_linear", "sparse_lambda_2": 0.0},
            "need a start above 0",
        ),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        SoraConfig(**options)


@pytest.mark.slow
def test_it_finds_the_layers_that_need_rank_and_beats_a_lora_of_its_final_size() -> None:
    config = SoraConfig(r=8, sparse_lambda_2=3e-3, target_modules=SixLayers.names)
    ours, model = fit_two_of_six(config, seed=1, steps=800)
    kept = [int((d.g != 0).sum()) for d in model.modules() if isinstance(d, SoraDelta)]
    assert [k > 0 for k in kept] == [i in (1, 4) for i in range(6)] and sum(kept) <= 12
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=SixLayers.names)  # 12 components as well
    uniform, _ = fit_two_of_six(lora, seed=1, steps=800)
    assert ours < 0.5 * uniform
