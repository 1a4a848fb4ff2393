"""Law 8, events. Torch's own hooks tell a method of each optimiser step; a missed step is an error with a remedy."""

from __future__ import annotations

import copy
import gc

import harness
import pytest
import specimens
import torch
from transformers import Trainer, TrainingArguments

import weft


def steps(model) -> list[int]:
    return [c.step for c in harness.controllers(model)]


def one_backward(model, seed: int = 0) -> None:
    model.train()
    model(**specimens.batch(seed)).loss.backward()


def test_each_step_is_one_event_whatever_the_accumulation(slug, tmp_path):
    for accumulation in (1, 4):
        model = harness.attach(slug, short=True)
        optimizer, _ = harness.optimizer_for(model, tmp_path)
        harness.train(model, optimizer, 3, accumulation)
        assert steps(model) == [3]


def test_weft_step_after_torchs_hooks_changes_nothing(slug, tmp_path):
    models = [harness.attach(slug, short=True) for _ in range(2)]
    for model in models:
        optimizer, _ = harness.optimizer_for(model, tmp_path)
        for i in range(4):
            one_backward(model, i)
            optimizer.step()
            if model is models[0]:
                weft.step(model)
                weft.step(model)
            optimizer.zero_grad()
    assert steps(models[0]) == [4]
    for (name, a), b in zip(harness.trainable(models[0]).items(), harness.trainable(models[1]).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_strange_optimiser_is_no_event(slug, tmp_path):
    model, other = harness.attach(slug, short=True), torch.nn.Linear(3, 3)
    strange = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(3)).sum().backward()
    strange.step()
    assert steps(model) == [0]


def test_an_optimiser_from_outside_torch_equals_torchs_own(slug):
    """Hand-written SGD with `weft.step` behind it, against torch.optim.SGD."""
    ours, theirs = (harness.attach(slug, short=True, require_groups=False) for _ in range(2))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    scaled = any(c.update_scales() for c in harness.controllers(ours))
    for i in range(5):
        one_backward(ours, i)
        one_backward(theirs, i)
        with torch.no_grad():
            for p in harness.trainable(ours).values():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.05)
        weft.step(ours)
        optimizer.step()
        ours.zero_grad()
        theirs.zero_grad()
        assert steps(ours) == steps(theirs) == [i + 1]
    if scaled:
        return  # a method that holds entries still can do so only where it is told before the step
    for (name, a), b in zip(harness.trainable(ours).items(), harness.trainable(theirs).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_missed_step_raises_and_names_the_missing_line(slug):
    model = harness.attach(slug, short=True)
    one_backward(model)
    with torch.no_grad():
        for p in harness.trainable(model).values():
            p.add_(0.01)
    if not harness.has_events(model):
        one_backward(model)  # nothing happens at steps, so nothing was missed
        return
    with pytest.raises(weft.WeftError, match=r"weft\.step\(model\)"):
        one_backward(model)


def test_the_order_step_after_clearing_gradients_is_told_apart(slug, tmp_path):
    """The event may come late, before the next forward, and is still one event."""
    model = harness.attach(slug, short=True)
    one_backward(model)
    with torch.no_grad():
        for p in harness.trainable(model).values():
            p.add_(0.01)
    weft.step(model)
    one_backward(model)
    assert steps(model) == [1]


@pytest.mark.parametrize("callback", [False, True])
def test_trainer_gives_one_event_a_step(slug, callback, tmp_path):
    model = harness.attach(slug, specimens.BY_NAME["Linear"], short=True)
    rows = [{k: v[0] for k, v in specimens.batch(i, 1).items()} for i in range(12)]
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    extra = [weft.StepCallback()] if callback else []
    Trainer(
        model, args, train_dataset=rows, optimizers=weft.optimizer_and_scheduler(model, args), callbacks=extra
    ).train()
    assert steps(model) == [3]


def test_controllers_hang_on_the_layers(slug, tmp_path):
    """transformers' add_adapter throws the tuner away; events must arrive all the same."""
    cell = specimens.BY_NAME["Linear"]
    torch.manual_seed(0)
    reference = harness.attach(slug, cell, short=True)
    torch.manual_seed(0)
    model = specimens.base(cell)
    model.add_adapter(harness.configure(slug, model, cell, short=True))
    gc.collect()
    for one in (reference, model):
        optimizer, _ = harness.optimizer_for(one, tmp_path)
        harness.train(one, optimizer, 4)
    assert steps(model) == [4]
    for a, b in zip(harness.trainable(model).values(), harness.trainable(reference).values(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_has_a_controller_of_its_own(slug, tmp_path):
    model = harness.attach(slug, short=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    other, _ = harness.optimizer_for(twin, tmp_path)
    before = {n: p.detach().clone() for n, p in harness.trainable(model).items()}
    harness.train(twin, other, 3)
    assert steps(twin) == [5] and steps(model) == [2]
    assert all(torch.equal(p, before[n]) for n, p in harness.trainable(model).items())
