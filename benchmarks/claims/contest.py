"""Contests on small problems: every contender with its own best learning rate, chosen on validation data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

import weft

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EXTENSIONS = 3  # how often the grid grows where the best rate lies at its edge

Split = tuple[Tensor, Tensor]
Attach = PeftConfig | Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Problem:
    """A model and a task for it.

    Attributes:
        model: the pre-trained model, y = model(x); every contender starts from a copy.
        train, validation, test: inputs and targets.
        loss: of outputs and targets; trained on, and validated with.
        score: of outputs and targets, on the test split; the loss where nothing else is said.
    """

    model: nn.Module
    train: Split
    validation: Split
    test: Split
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss
    score: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a contender reached: its test score, its trained numbers, its rate, and the trained model."""

    score: float
    trainable: int
    rate: float
    model: nn.Module


def tuned(problem: Problem, attach: Attach, *, rates: Sequence[float] = RATES, **training: Any) -> Outcome:
    """The contender trained once a rate (`training` as in `trained`) and scored where the validation loss is lowest.

    `attach` is a config of weft's or PEFT's, or a function that puts the contender on the model it is given. The grid
    grows by its own factor where the best rate lies at an edge. A rate that diverges has lost.
    """
    factor = rates[1] / rates[0]
    tried: dict[float, tuple[float, nn.Module]] = {}
    for attempt in range(EXTENSIONS + 1):
        if attempt:
            best = min(tried, key=lambda rate: tried[rate][0])
            if min(tried) < best < max(tried):
                break
            rates = [best * factor if best == max(tried) else best / factor]
        for rate in rates:
            model = trained(problem, attach, rate, **training)
            loss = evaluated(model, problem.validation, problem.loss)
            tried[rate] = (loss if math.isfinite(loss) else math.inf, model)
    best = min(tried, key=lambda rate: tried[rate][0])
    model = tried[best][1]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Outcome(evaluated(model, problem.test, problem.score or problem.loss), trainable, best, model)


def trained(
    problem: Problem,
    attach: Attach,
    rate: float,
    *,
    steps: int,
    seed: int,
    batch_size: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """A copy of the model with the contender on it, after `steps` optimiser steps; full batches where no size is given.

    AdamW without weight decay and a linear decay of the rate, where the arguments (of TrainingArguments) say nothing
    else.
    """
    torch.manual_seed(~seed)  # other numbers than those that the problem of this seed was drawn with
    base = copy.deepcopy(problem.model)
    model = get_peft_model(base, copy.deepcopy(attach)) if isinstance(attach, PeftConfig) else attach(base)
    args = TrainingArguments(
        output_dir="unused", report_to="none", use_cpu=True, max_steps=steps, learning_rate=rate, **arguments
    )
    optimizer, scheduler = weft.optimizer_and_scheduler(model.train(), args)
    assert scheduler is not None
    x, y = problem.train
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = slice(None) if batch_size is None else torch.randint(len(x), (batch_size,), generator=order)
        optimizer.zero_grad()
        problem.loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        scheduler.step()
    return model


def pretrained(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: Split, rate: float, steps: int, batch_size: int
) -> nn.Module:
    """The model after one cycle of AdamW on rows drawn from the global stream: what contenders start from."""
    x, y = data
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,))
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        scheduler.step()
    return model


@torch.no_grad()
def evaluated(model: nn.Module, split: Split, score: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The score of a split in eval mode."""
    return float(score(model.eval()(split[0]), split[1]))


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of right classes."""
    return (logits.argmax(-1) == labels).float().mean()
