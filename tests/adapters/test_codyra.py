"""CoDyRA against its schedule and its merges written out in float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama
from torch import Tensor, nn
from transformers import TrainingArguments

import weft
from weft.adapters.codyra import CodyraConfig, CodyraDelta
from weft.algebra.prox import reference_prox, soft_threshold

T = 10  # steps of a task in these tests: five dense, then κ of 0.05 once and 0.1 from then on
SHORT = {"r": 4, "total_steps": T, "lambda_num": 3, "max_kappa": 0.1, "target_modules": ["0", "2"]}


def two_linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))


def attach(base: nn.Module | None = None, **options: object) -> peft.PeftModel:
    return peft.get_peft_model(base or two_linears(), CodyraConfig(**{**SHORT, **options})).double().train()


def deltas(model: nn.Module) -> list[CodyraDelta]:
    return [m for m in model.modules() if isinstance(m, CodyraDelta)]


def weights(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach().clone() for m in model.modules() if type(m) is nn.Linear]


def optimizer_of(model: nn.Module, rate: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def learn(model: nn.Module, task: int, steps: int = T) -> torch.optim.Optimizer:
    optimizer = optimizer_of(model)
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(task), dtype=torch.float64)
    for _ in range(steps):
        (model.train()(x) - task).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def updates(model: nn.Module) -> list[Tensor]:
    """Σ over components with a gate other than zero, one outer product after the other."""
    found = []
    for d in deltas(model):
        terms = [d.g[i] * torch.outer(d.B[:, i], d.A[i]) for i in range(len(d.g)) if d.g[i] != 0]
        found.append(sum(terms, torch.zeros(d.out, d.in_, dtype=torch.float64)).detach())
    return found


def nonzero(model: nn.Module) -> list[int]:
    return [int((d.g != 0).sum()) for d in deltas(model)]


# --- one task ---------------------------------------------------------------------------------------------------------


def kappas(total: int, dense: float, count: int, largest: float) -> list[float]:
    """κ of every step, as the authors' loop counts it."""
    every, index, found = int((total - dense * total) // count), 0, []
    for i in range(total):
        if every > 0 and i >= dense * total and i % every == 0:
            index = min(index + 1, count - 1)
        found.append(index * largest / (count - 1))
    return found


def test_the_schedule_of_the_authors_launcher() -> None:
    config = CodyraConfig()
    found = [config.kappa(i, 500) for i in range(500)]
    assert found[:250] == [0.0] * 250 and found[250] == pytest.approx(0.005 / 49)
    assert found[489] < 0.005 and found[490:] == [0.005] * 10
    torch.testing.assert_close(found, kappas(500, 0.5, 50, 0.005), rtol=1e-12, atol=0)
    assert 0.6 < sum(found) < 0.65  # what a gate that no gradient holds loses over the task


@settings(deadline=None, derandomize=True)
@given(total=st.integers(1, 300), dense=st.sampled_from([0.0, 0.25, 0.5, 0.75]), count=st.integers(2, 60))
def test_any_schedule_is_that_of_the_loop(total: int, dense: float, count: int) -> None:
    config = CodyraConfig(dense_iters=dense, lambda_num=count, max_kappa=0.3)
    found = [config.kappa(i, total) for i in range(total)]
    torch.testing.assert_close(found, kappas(total, dense, count, 0.3), rtol=1e-12, atol=1e-15)


def test_prox_of_known_values() -> None:
    v = torch.tensor([0.3, 0.15], dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(v, 0.1), torch.tensor([0.2, 0.05], dtype=torch.float64))
    torch.testing.assert_close(reference_prox(v, 0.1), torch.tensor([0.2, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("prox", ["soft", "reference"])
def test_without_gradient_a_gate_moves_by_the_prox_alone_and_only_behind_the_dense_steps(prox: str) -> None:
    model = attach(prox=prox)
    expected = [d.g.detach().clone() for d in deltas(model)]
    optimizer = optimizer_of(model, rate=0.0)
    for i, kappa in enumerate(kappas(T, 0.5, 3, 0.1)):
        optimizer.step()
        if i > 5:
            operator = soft_threshold if prox == "soft" else reference_prox
            expected = [operator(g, kappa) for g in expected]
        assert all(torch.equal(d.g, g) for d, g in zip(deltas(model), expected)), i
    assert 0 < sum(nonzero(model)) < 8


def test_the_length_of_the_task_comes_from_wefts_optimiser(tmp_path) -> None:
    model = attach(total_steps=None)
    args = TrainingArguments(str(tmp_path), max_steps=40, report_to="none", use_cpu=True)
    weft.optimizer_and_scheduler(model, args)
    assert deltas(model)[0].controller.length() == 40


def test_a_task_that_is_too_short_to_prune_says_so(caplog) -> None:
    model = attach(lambda_num=6)  # five steps are left for six levels
    learn(model, 0)
    assert nonzero(model) == [4, 4] and "prunes nothing: 10 steps, 5 of them dense" in caplog.text


def test_gates_are_drawn_by_seed_task_and_module() -> None:
    def gates(model: nn.Module) -> Tensor:
        return torch.cat([d.g.detach() for d in deltas(model)])

    first = attach()
    torch.manual_seed(5)
    assert torch.equal(gates(attach(copy.deepcopy(two_linears()))), gates(first))
    assert not torch.equal(gates(attach(seed=1)), gates(first))
    assert not torch.equal(deltas(first)[0].g, deltas(first)[1].g)
    assert not torch.equal(gates(weft.next_task(first)), gates(attach()))
    many = torch.cat([d.g for d in deltas(peft.get_peft_model(llama(), CodyraConfig()))])
    assert abs(many.mean()) < 0.2 and 0.85 < many.std() < 1.15


# --- several tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [False, True])
def test_tasks_add_up(history: bool) -> None:
    """W_t = W_0 + ΣB·diag(g)·A, ΔW = 0 at each start, and the output stays when a task ends."""
    model = attach(history=history)
    total = weights(model)
    ranks = [0, 0]
    x = torch.randn(5, 7, dtype=torch.float64)
    for task in range(1, 4):
        if not history:
            assert all(d.delta().abs().max() == 0 for d in deltas(model))
        learn(model, task)
        total = [w + u for w, u in zip(total, updates(model))]
        ranks = [r + k for r, k in zip(ranks, nonzero(model))]
        before = model.eval()(x)
        model = weft.next_task(model).double()
        torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=1e-6)
        assert nonzero(model) == [4, 4]  # full rank again
        assert deltas(model)[0].config.finished_tasks() == task
    assert 0 < sum(ranks) < 3 * 8
    inputs = [x, torch.tanh(x @ total[0].T + model.get_submodule("base_model.model.0").get_base_layer().bias)]
    if history:
        assert list(model.peft_config["default"].history_ranks.values()) == ranks
        assert all(torch.equal(w, w0) for w, w0 in zip(weights(model), weights(two_linears().double())))
    for name, w, given_ in zip(("0", "2"), total, inputs):
        layer = model.get_submodule(f"base_model.model.{name}")
        expected = given_ @ w.T + layer.get_base_layer().bias
        torch.testing.assert_close(layer(given_), expected, rtol=1e-5, atol=1e-5)


def test_closed_gates_leave_the_weight_bit_for_bit() -> None:
    model = attach(two_linears())
    for d in deltas(model):
        nn.init.normal_(d.B)
        nn.init.zeros_(d.g)
    before = weights(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(weft.next_task(model)), before))


def test_a_bfloat16_weight_is_rounded_once() -> None:
    model = peft.get_peft_model(two_linears().bfloat16(), CodyraConfig(**SHORT))
    expected = []
    for d, w in zip(deltas(model), weights(model)):
        nn.init.normal_(d.B, std=1e-2)
        expected.append((w.float() + ((d.B * d.g) @ d.A).detach()).bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(weights(weft.next_task(model)), expected))


def test_the_history_is_one_lora_of_the_accumulated_rank(tmp_path) -> None:
    config = {"r": 4, "total_steps": T, "lambda_num": 3, "max_kappa": 0.1, "target_modules": ["q_proj", "v_proj"]}
    model = peft.get_peft_model(llama(), CodyraConfig(**config, history=True))
    x = torch.arange(12).reshape(2, 6)
    kept = [0] * 4
    for task in range(2):
        optimizer = optimizer_of(model)
        for _ in range(T):
            model.train()(input_ids=x, labels=(x + task) % 61).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = [a + b for a, b in zip(kept, nonzero(model))]
        if task == 0:
            model = weft.next_task(model)
    expected = model.eval()(input_ids=x).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=x).logits, expected)
    assert [len(d.A_old) + len(d.A) for d in deltas(loaded)] == kept
    weft.export(loaded, tmp_path / "lora", "lora", compact=True)
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert list(plain.peft_config["default"].rank_pattern.values()) == kept
    torch.testing.assert_close(plain(input_ids=x).logits, expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=x).logits, expected, rtol=1e-5, atol=1e-5)


def test_count_is_the_formula() -> None:
    model = peft.get_peft_model(llama(), CodyraConfig(r=3, target_modules=["k_proj", "down_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * ((32 + 16 + 1) + (37 + 32 + 1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prox": "hard"}, "use soft or reference"),
        ({"max_kappa": -0.1}, "max_kappa=-0.1 must be 0"),
        ({"lambda_num": 1}, "lambda_num=1 must be at least 2"),
        ({"dense_iters": 1.0}, "dense_iters=1.0 is not a share"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        CodyraConfig(**options)
