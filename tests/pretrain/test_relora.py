"""ReLoRA against its cycle written out in float64."""

from __future__ import annotations

import copy
import logging
import shutil
from typing import Any

import pytest
import torch
from resuming import cut
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

import weft
from weft.algebra.random import generator
from weft.linear.dense_plus_low_rank import DensePlusLowRank
from weft.pretrain.relora import prune
from weft.run import data, methods
from weft.run.models import load_base
from weft.run.settings import TrainSettings
from weft.run.train import train

SHAPES = {"0.0": (6, 7), "1.0": (5, 6)}
CYCLE = {"rank": 2, "lora_alpha": 3.0, "relora_steps": 4, "restart_warmup": 3, "reset_share": 0.7, "seed": 5}
LR = 0.02


def blocks(dtype: torch.dtype = torch.float64, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    made = [nn.Linear(7, 6, bias=bias, dtype=dtype), nn.Linear(6, 5, bias=bias, dtype=dtype)]
    return nn.Sequential(nn.Sequential(made[0], nn.Tanh()), nn.Sequential(made[1]))


def relora(dtype: torch.dtype = torch.float64, bias: bool = False, **changes: Any) -> Any:
    return weft.reparametrise(blocks(dtype, bias), "relora", **{**CYCLE, **changes}).train()


def rows(step: int, count: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step."""
    draw = torch.Generator().manual_seed(100 + step)
    return tuple(torch.randn(count, n, generator=draw, dtype=torch.float64) for n in (7, 5))  # type: ignore[return-value]


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, micro: int = 1) -> None:
    x, y = rows(step)
    for a, b in zip(x.chunk(micro), y.chunk(micro)):
        ((model(a.to(next(model.parameters()).dtype)) - b).square().mean() / micro).backward()
    optimizer.step()
    optimizer.zero_grad()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, DensePlusLowRank)}


def written_out(steps: int) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """W, A and B of both layers after so many steps of AdamW without decay, and the moments (m and v of A, then B)."""
    start = dict(blocks().named_parameters())
    w = {name: start[f"{name}.weight"].detach().clone() for name in SHAPES}
    r, c = CYCLE["rank"], CYCLE["lora_alpha"] / CYCLE["rank"]

    def drawn(name: str, *key: object) -> Tensor:
        side = SHAPES[name][1]
        return torch.empty(r, side).uniform_(-(side**-0.5), side**-0.5, generator=generator(5, *key, name)).double()

    ab = {name: [drawn(name), torch.zeros(out, r).double()] for name, (out, _) in SHAPES.items()}
    moments = {name: [torch.zeros_like(p) for p in ab[name] for _ in "mv"] for name in SHAPES}
    for step in range(steps):
        free = [p.requires_grad_() for name in SHAPES for p in ab[name]]
        x, y = rows(step)
        first, second = (w[name] + c * ab[name][1] @ ab[name][0] for name in SHAPES)
        gradients = torch.autograd.grad(((x @ first.T).tanh() @ second.T - y).square().mean(), free)
        of = dict(zip(SHAPES, (gradients[:2], gradients[2:])))
        since = step % 4
        rate = LR * (min(1, (since + 1) / 3) if step >= 4 else 1)
        for name in SHAPES:
            for i, g in enumerate(of[name]):
                m, v = (moments[name][2 * i + k] for k in (0, 1))
                m = 0.9 * m + 0.1 * g
                v = 0.999 * v + 0.001 * g**2
                unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                ab[name][i] = ab[name][i].detach() - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
                if since == 3:
                    n = m.numel()
                    ranks = [t.abs().flatten().argsort().argsort().view(t.shape) for t in (m, v)]
                    kept = (ranks[0] >= round(0.7 * n)) & (ranks[1] >= round(0.7 * n))
                    m, v = m * kept, v * kept
                moments[name][2 * i : 2 * i + 2] = m, v
            if since == 3:
                w[name] = w[name] + c * ab[name][1] @ ab[name][0]
                ab[name] = [drawn(name, step + 1), torch.zeros_like(ab[name][1])]
    return {name: [w[name], *(p.detach() for p in ab[name])] for name in SHAPES}, moments


def test_three_cycles_are_those_written_out() -> None:
    """At every step: weights, factors and moments."""
    model = relora()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    for step in range(13):
        take(model, optimizer, step)
        tensors, moments = written_out(step + 1)
        for name, layer in layers(model).items():
            found = [layer.base, layer.down.weight, layer.up.weight]
            state = [optimizer.state[p][k] for p in found[1:] for k in ("exp_avg", "exp_avg_sq")]
            for one, other in zip(found + state, tensors[name] + moments[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_a_merge_keeps_the_map(dtype: torch.dtype, tolerance: float) -> None:
    layer = layers(relora(dtype, bias=True))["0.0"]
    with torch.no_grad():
        layer.up.weight.normal_(generator=generator(1))
    before = layer.base.double() + 1.5 * layer.up.weight.double() @ layer.down.weight.double()
    bias = layer.bias.detach().clone()
    layer.absorb()
    assert not layer.up.weight.any() and torch.equal(layer.bias, bias)
    assert (layer.base.double() - before).norm() <= tolerance * before.norm()


def test_the_map_at_the_start_is_the_models() -> None:
    x = rows(0)[0]
    assert torch.equal(relora(bias=True)(x), blocks(bias=True)(x))


def test_the_sum_of_the_updates_has_a_higher_rank() -> None:
    model = relora()
    start = {name: layer.dense() for name, layer in layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    ranks = []
    for step in range(9):
        take(model, optimizer, step)
        if step % 4 in (0, 3):
            moved = {n: torch.linalg.svdvals(layer.dense() - start[n]) for n, layer in layers(model).items()}
            ranks.append({n: int((s > 1e-9 * s[0]).sum()) for n, s in moved.items()})
    assert [r["0.0"] for r in ranks] == [2, 2, 4, 4, 6] and [r["1.0"] for r in ranks] == [2, 2, 4, 4, 5]


def test_an_entry_keeps_all_of_its_moments_or_none() -> None:
    m = torch.tensor([[5.0, -4.0], [0.5, 3.0], [2.0, 1.0]])
    v = torch.tensor([[6.0, 1.0], [5.0, 4.0], [2.0, 3.0]])
    prune([m, v], 0.5)
    assert m.tolist() == [[5, 0], [0, 3], [0, 0]] and v.tolist() == [[6, 0], [0, 4], [0, 0]]
    prune([m], 1)
    prune([v], 0)
    assert not m.any() and v.sum() == 10
    large = torch.randn(100, 7, generator=generator(2))
    largest = large.flatten()[large.flatten().abs().topk(7).indices]
    prune([large], 0.99)
    assert set(large[large != 0].tolist()) == set(largest.tolist())


def test_what_is_drawn_depends_on_seed_step_and_name_alone() -> None:
    def after(seed: int) -> list[Tensor]:
        model = relora(seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        torch.manual_seed(int(torch.randint(10**6, ())))
        drawn = [layer.down.weight.detach().clone() for layer in layers(model).values()]
        for step in range(4):
            take(model, optimizer, step)
        return [*drawn, *(layer.down.weight.detach().clone() for layer in layers(model).values())]

    one, again, other = after(5), after(5), after(6)
    assert all(map(torch.equal, one, again)) and not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[2])


@pytest.mark.parametrize("at", range(1, 9))
def test_resumed_is_uninterrupted_at_every_phase(at: int) -> None:
    def build() -> tuple[Any, torch.optim.Optimizer]:
        model = relora(torch.float32)
        args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, learning_rate=LR, max_steps=12)
        return model, weft.optimizer_and_scheduler(model, args)[0]

    (_, optimizer), (_, other) = cut(build, take, 10, at)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_four_small_batches_are_a_large_one() -> None:
    found = []
    for micro in (1, 4):
        model = relora()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        for step in range(10):
            take(model, optimizer, step, micro)
        found.append(model.state_dict())
    for name, t in found[0].items():
        torch.testing.assert_close(found[1][name], t, rtol=1e-9, atol=1e-12)


def test_a_copy_goes_its_own_way() -> None:
    model = relora()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=LR)
    for step in range(5):
        take(twin, optimizer, step)
    (mine,), (its,) = ({c for m in layers(one).values() for c in m.controllers.values()} for one in (model, twin))
    assert (mine.step, its.step) == (0, 5)
    assert all(torch.equal(t, relora().state_dict()[name]) for name, t in model.state_dict().items())


def test_steps_outside_of_torch_must_be_told() -> None:
    def descend(model: nn.Module, step: int) -> None:
        x, y = rows(step)
        (model(x) - y).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
        model.zero_grad()

    model = relora(reset_share=0)
    for step in range(4):
        before = model(rows(9)[0])
        descend(model, step)
        after = model.eval()(rows(9)[0])
        weft.step(model.train())
        weft.step(model)
        torch.testing.assert_close(model(rows(9)[0]), after)
        assert not torch.equal(before, after)
    assert not any(layer.up.weight.any() for layer in layers(model).values())
    descend(model, 4)
    with pytest.raises(weft.WeftError, match=r"0.0 changed but no optimiser step was seen; call weft.step\(model\)"):
        model(rows(0)[0])
    other = relora()
    descend(other, 0)
    with pytest.raises(weft.UsageError, match="reset_share=0"):
        weft.step(other)


def test_what_cannot_be_reset_is_refused_at_once() -> None:
    model = relora(torch.float32)
    with pytest.raises(weft.UsageError, match="exp_avg_sq_row of Adafactor|row_var of Adafactor"):
        take(model, torch.optim.Adafactor(model.parameters()), 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"relora_steps": 0}, "relora_steps=0 must be at least 1"),
        ({"restart_warmup": 5}, "restart_warmup=5 must lie in 0 to relora_steps=4"),
        ({"reset_share": 1.5}, "reset_share=1.5 must be a share"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be above 0"),
        ({"rank": 6}, "relora: 1.0: rank=6: a matrix of 5 × 6 has 0 to 5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(weft.UsageError, match=said):
        relora(**options)


def test_a_run_without_a_merge_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = relora()
    args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, max_steps=4)
    optimizer, _ = weft.optimizer_and_scheduler(model, args)
    with caplog.at_level(logging.WARNING):
        take(model, optimizer, 0)
    assert "relora_steps=4 in a run of 4 steps" in caplog.text


# --- in a model, in a run ---------------------------------------------------------------------------------------------

SHORT = {"rank": 4, "relora_steps": 3, "restart_warmup": 2}


def run(llama: Any, corpus: Any, output: Any, resume: bool = False, method: str = "relora", **settings: Any) -> Any:
    base = load_base(str(llama), "causal-lm")
    splits = data.load_splits(str(corpus), "causal-lm", base.tokenizer, max_length=32)
    given = {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "eval_steps": 0, "logging_steps": 4, **settings}
    chosen = methods.resolve(method, SHORT)
    return train(base, splits, chosen, TrainSettings(**given), output, resume=resume, progress=False)


def test_a_llama_learns_and_is_saved_as_what_it_is_and_dense(llama, corpus, tmp_path) -> None:
    result = run(llama, corpus, None, max_steps=20, logging_steps=10)
    losses = [row["loss"] for row in result.curve if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    model = result.model.eval()
    assert {type(m).__name__ for m in layers(model).values()} == {"DensePlusLowRank"} and len(layers(model)) == 14
    model.save_pretrained(tmp_path)
    tokens = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected)
        dense = weft.to_dense(model)
        assert not layers(dense)
        torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["relora", "relora@hf:sgd"])
def test_a_killed_run_goes_on_where_it_was(llama, corpus, tmp_path, method) -> None:
    whole = run(llama, corpus, tmp_path / "whole", method=method, save_steps=4)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    again = run(llama, corpus, tmp_path / "killed", resume=True, method=method, save_steps=4)
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.model.state_dict().items())
    (controller,) = {c for m in layers(again.model).values() for c in m.controllers.values()}
    assert controller.step == 8 and controller.total_steps == (8 if method == "relora" else None)
