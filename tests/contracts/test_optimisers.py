"""The laws of optimisers, tried on every method of the pillar."""

from __future__ import annotations

import warnings
from pathlib import Path

import forked
import optim_specimens as specimens
import pytest
import tiny
import torch
from optim_specimens import CASES, GAP, backward, build, train, trained
from safetensors.torch import load_file
from torch import Tensor

import weft.optim
from weft.errors import UsageError


@pytest.fixture(params=CASES)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def tensors(value: object) -> list[Tensor]:
    """Every tensor in a nested state, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in parts for t in tensors(part)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop", range(1, 2 * GAP + 1))
def test_a_resumed_run_is_the_uninterrupted_one_at_every_phase_of_a_refresh(method, stop, tmp_path):
    """bfloat16 parameters, float32 and integer state, through a file that is read with weights_only=True."""
    model, optimizer = build(method, torch.bfloat16)
    train(model, optimizer, range(stop))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    kept = trained(model)
    before = [t.clone() for t in tensors(optimizer.state_dict()["state"])]
    train(model, optimizer, range(stop, stop + GAP + 1))
    again, other = build(method, torch.bfloat16)
    again.load_state_dict(kept, strict=False)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    after = tensors(other.state_dict()["state"])
    assert [t.dtype for t in after] == [t.dtype for t in before]
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    assert any(t.dtype == torch.float32 for t in after)
    train(again, other, range(stop, stop + GAP + 1))
    assert same(trained(again), trained(model))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(method, odd):
    model, optimizer = build(method)
    train(model, optimizer, range(2))
    kept, state = trained(model), [t.clone() for t in tensors(optimizer.state_dict()["state"])]
    optimizer.zero_grad()
    backward(model, 2)
    worst = [p for p in model.parameters() if p.grad is not None][-1]
    worst.grad.view(-1)[0] = odd
    with pytest.warns(UserWarning, match="is not finite: this step is skipped, the 1st so far"):
        optimizer.step()
    assert optimizer.skipped == 1
    assert same(trained(model), kept)
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer.state_dict()["state"]), state))


def test_gradients_of_zero_move_on_without_a_word_of_nan(method):
    model, optimizer = build(method)
    for step in range(2 * GAP):
        optimizer.zero_grad()
        backward(model, step)
        if step % 2 == 0:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.zero_()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.isfinite(t).all() for t in tensors(optimizer.state_dict()["state"]) if t.is_floating_point())


def test_four_micro_batches_are_one_batch(method):
    one, first = build(method)
    four, second = build(method)
    train(one, first, range(2 * GAP))
    train(four, second, range(2 * GAP), parts=4)
    for name, p in trained(one).items():
        torch.testing.assert_close(trained(four)[name], p, rtol=1e-8, atol=1e-8, msg=name)


def test_a_small_language_model_learns_as_much_as_with_adamw(method):
    """The law: within 5 % of AdamW's drop of the loss, on the same parameters and rows."""
    drops = []
    adamw = specimens.model_for(method, torch.float32)
    trained = [p for p in adamw.parameters() if p.requires_grad]
    for model, optimizer in (build(method, torch.float32), (adamw, torch.optim.AdamW(trained, lr=1e-2))):
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            losses.append(backward(model, 0))
            optimizer.step()
        drops.append(losses[0] - losses[-1])
    assert drops[0] > 0.95 * drops[1] > 0


def test_a_key_that_a_group_cannot_have_is_refused(method):
    model, optimizer = build(method)
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match="unknown key 'momentun' in a parameter group"):
        optimizer.add_param_group({"params": [p], "momentun": 0.9})
    with pytest.raises(UsageError, match="has no option 'rnak'"):
        build(method, rnak=3)
    with pytest.raises(UsageError, match="lr=-1"):
        build(method, lr=-1)


def test_trainer_logs_the_rates_that_were_used_and_resumes_bit_for_bit(method, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    slug, options = CASES[method]
    ids = specimens.tokens(0, 32).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})

    def trainer(folder: Path) -> Trainer:
        model = specimens.model_for(method, torch.float32)
        made = weft.optim.for_trainer(slug, model, **options)
        args = TrainingArguments(
            str(folder), max_steps=6, learning_rate=0.5, lr_scheduler_type="linear", logging_steps=1, save_steps=4,
            use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4, max_grad_norm=0.0,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=made)

    whole = trainer(tmp_path)
    whole.train()
    rates = [row["learning_rate"] for row in whole.state.log_history if "loss" in row]
    peak = options["lr"]
    assert rates == pytest.approx([peak * (6 - step) / 6 for step in range(6)], rel=1e-6)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(trained(resumed.model), trained(whole.model))


def test_two_processes_take_the_step_of_one(method, once):
    """DDP over gloo in float64; what the processes keep is the same, bit for bit."""

    def make(folder: Path) -> None:
        worker = Path(__file__).with_name("optim_ddp_worker.py")
        environment = tiny.environment(GLOO_SOCKET_IFNAME="lo")
        forked.together([[worker, rank, 2, folder] for rank in range(2)], 240, env=environment)

    folder = once("optim-ddp", make)
    found = [load_file(folder / f"{method}.{rank}.safetensors") for rank in range(2)]
    assert same(*found)
    model, optimizer = build(method)
    train(model, optimizer, range(2 * GAP))
    for name, p in trained(model).items():
        torch.testing.assert_close(found[0][f"p.{name}"], p, rtol=1e-6, atol=1e-9, msg=name)


def test_state_is_tensors_and_numbers(method):
    model, optimizer = build(method)
    train(model, optimizer, range(GAP + 1))
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, Tensor | int | float) for value in state.values())


def test_nothing_is_warned_of(method):
    model, optimizer = build(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(2))


