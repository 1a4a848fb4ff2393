"""Law 8, penalties. Their gradient enters exactly once per optimiser step, before clipping, and never the loss."""

from __future__ import annotations

import harness
import pytest
import specimens
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import weft

STEP = 1e-6  # of the central differences


def penalty(model: nn.Module) -> float:
    return sum(float(p) for c in harness.controllers(model) if (p := c.penalty()) is not None)


def slopes(model: nn.Module, directions: dict[str, Tensor]) -> dict[str, float]:
    """Directional derivatives of the penalty by central differences, one parameter at a time."""
    found = {}
    with torch.no_grad():
        for name, p in harness.trainable(model).items():
            ends, here = [], p.detach().clone()
            for sign in (1, -1):
                p.data.copy_(here + sign * STEP * directions[name])
                ends.append(penalty(model))
            p.data.copy_(here)
            found[name] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def along(model: nn.Module, directions: dict[str, Tensor]) -> dict[str, float]:
    """The gradients that are there, in the same directions."""
    return {
        name: 0.0 if p.grad is None else float((p.grad * directions[name]).sum())
        for name, p in harness.trainable(model).items()
    }


def random_directions(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in harness.trainable(model).items()
    }


def backward(model: nn.Module, accumulation: int, weight: float = 1.0) -> None:
    model.train()
    whole = specimens.batch(1, 8)
    for part in range(accumulation):
        piece = {k: v.chunk(accumulation)[part] for k, v in whole.items()}
        (weight * model(**piece).loss / accumulation).backward()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_with_a_task_of_zero_the_gradient_is_the_penaltys(slug, accumulation, tmp_path):
    model = harness.randomise(harness.attach(slug, dtype=torch.float64, short=True))
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    directions = random_directions(model)
    for _ in range(3):  # in the first step and in later ones
        expected = slopes(model, directions)
        backward(model, accumulation, weight=0.0)
        for name, found in along(model, directions).items():
            assert found == pytest.approx(expected[name], rel=1e-5, abs=1e-8), name
        optimizer.step()
        optimizer.zero_grad()


def test_accumulation_and_the_losss_scale_leave_the_penalty_alone(slug):
    """gradient(c·task) = c·gradient(task) + penalty, in one batch or in four."""

    def fresh() -> nn.Module:
        return harness.randomise(harness.attach(slug, dtype=torch.float64, short=True))

    def of(accumulation: int, weight: float) -> dict[str, Tensor]:
        model = fresh()
        backward(model, accumulation, weight)
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in harness.trainable(model).items()
        }

    only, once, twice, split = of(1, 0.0), of(1, 1.0), of(1, 2.0), of(4, 1.0)
    for name in only:
        scale = once[name].abs().max() + 1e-12
        assert ((twice[name] - once[name]) - (once[name] - only[name])).abs().max() <= 1e-10 * scale, name
        assert (split[name] - once[name]).abs().max() <= 1e-10 * scale, name


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        data = specimens.batch(2, count)
        self.rows = [{k: v[i] for k, v in data.items()} for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


class Gradients(TrainerCallback):
    """Total norm of what is about to be clipped, and what is there after clipping."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.clipped = {n: p.grad.clone() for n, p in harness.trainable(model).items() if p.grad is not None}


def trainer_run(model, tmp_path, accumulation, **extra):
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, disable_tqdm=True,
        learning_rate=1e-3, weight_decay=0.0, max_grad_norm=0.25, lr_scheduler_type="constant",
    )  # fmt: skip
    caught = Gradients()
    pair = weft.optimizer_and_scheduler(model, args)
    trainer = Trainer(model, args, train_dataset=Rows(8), optimizers=pair, callbacks=[caught], **extra)
    trainer._get_train_sampler = lambda *a, **k: torch.utils.data.SequentialSampler(Rows(8))
    trainer.train()
    return trainer.state.log_history[0], caught.clipped


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_clips_with_the_penalty_and_reports_without(slug, accumulation, tmp_path):
    cell = specimens.BY_NAME["Linear"]
    plain = harness.randomise(harness.attach(slug, cell, torch.float64, short=True))
    plain.train()
    loss = plain(**specimens.batch(2, 8)).loss
    loss.backward()
    expected = {n: p.grad.clone() for n, p in harness.trainable(plain).items() if p.grad is not None}
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())

    model = harness.randomise(harness.attach(slug, cell, torch.float64, short=True))
    log, clipped = trainer_run(model, tmp_path, accumulation)
    assert log["loss"] == pytest.approx(float(loss), rel=1e-4)  # Trainer rounds it
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    factor = min(1.0, 0.25 / (norm + 1e-6))
    for name, g in clipped.items():
        assert harness.relative(g, factor * expected[name]) <= 1e-5, name


def test_a_loss_function_of_the_users_keeps_the_penalty(slug, tmp_path):
    cell = specimens.BY_NAME["Linear"]
    model = harness.randomise(harness.attach(slug, cell, torch.float64, short=True))
    directions = random_directions(model)
    expected = slopes(model, directions)
    log, clipped = trainer_run(model, tmp_path, 4, compute_loss_func=lambda out, labels, **_: 0.0 * out.logits.sum())
    assert log["loss"] == 0.0
    factor = min(1.0, 0.25 / (log["grad_norm"] + 1e-6))
    for name, g in clipped.items():
        found = float((g * directions[name]).sum())
        assert found == pytest.approx(factor * expected[name], rel=1e-4, abs=1e-8), name


def test_it_is_logged_apart(slug):
    model = harness.randomise(harness.attach(slug, dtype=torch.float64, short=True))
    backward(model, 1)
    for c in harness.controllers(model):
        value = c.penalty()
        assert (value is None) == (c.last_penalty is None)
        if value is not None:
            assert float(c.last_penalty) == pytest.approx(float(value), rel=1e-12)
