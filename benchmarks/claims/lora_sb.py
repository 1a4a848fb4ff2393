"""LoRA-SB against LoRA-XS of the same count, and against LoRA of many times more parameters."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import peft
import torch
from contest import tuned
from ledger import Close, Order
from problem_classifier import BATCH, CLASSES, HIDDEN, INPUTS, LAYERS, PROBLEM, ROWS, STEPS, moved_teacher
from torch import Tensor, nn

import weft

RANK, FEWER, RATE = 9, 3, 1e-2
SAMPLES = 50, ROWS
SIDES = INPUTS + HIDDEN + HIDDEN + HIDDEN + HIDDEN + CLASSES

CLAIM = (
    "Factors from the first step of full fine-tuning make an r × r core better than LoRA-XS, and better than LoRA of a "
    "lower rank with many times more parameters."
)
SETTING = (
    f"{PROBLEM}; test loss. LoRA-SB and LoRA-XS (factors from the SVD of W) train cores of side {RANK}, "
    f"{3 * RANK**2} numbers; LoRA {FEWER * SIDES} (r = {FEWER}) or {RANK * SIDES} (r = {RANK}). LoRA-SB's first step "
    f"is found on {SAMPLES[0]} of the {ROWS} rows (the authors take as many, but of many tokens each) or on all, with "
    f"η of the rate {RATE}."
)
NOT_HERE = "arithmetic, commonsense and GLUE with large models, and ranks of 96."
EXPECTED = [
    *[Order(f"LoRA-SB, {rows} rows", "LoRA-XS", ratio=True) for rows in SAMPLES],
    *[Order(f"LoRA-SB, {rows} rows", f"LoRA, r = {FEWER}", ratio=True) for rows in SAMPLES],
    Close(f"LoRA-SB, {ROWS} rows", f"LoRA, r = {RANK}"),
]


class WithLoss(nn.Module):
    """A classifier that returns its loss where it is given labels, which is what `weft.prepare` asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        return logits if labels is None else SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels))


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    problem = replace(moved_teacher(), score=None)
    x, y = problem.train

    def lora_sb(base: nn.Module, rows: int) -> nn.Module:
        model = WithLoss(base)
        config = weft.LoraSbConfig(r=RANK, learning_rate=RATE, total_steps=STEPS, target_modules=LAYERS)
        weft.prepare(model, config, batches=[{"x": x[:rows], "labels": y[:rows]}])
        return peft.get_peft_model(model, config)

    contenders = {
        **{f"LoRA-SB, {rows} rows": partial(lora_sb, rows=rows) for rows in SAMPLES},
        "LoRA-XS": lora_xs,
        f"LoRA, r = {FEWER}": peft.LoraConfig(r=FEWER, lora_alpha=FEWER, target_modules=LAYERS),
        f"LoRA, r = {RANK}": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS),
    }
    return {
        name: tuned(problem, attach, steps=STEPS, batch_size=BATCH, seed=seed).score
        for name, attach in contenders.items()
    }


class Core(nn.Module):
    """A linear layer y = x·Wᵀ + b plus LoRA-XS: x·(U_r·diag(S_r)·R·V_rᵀ)ᵀ with R trained from zero."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.linear = linear.requires_grad_(False)
        self.up, self.down = u[:, :RANK] * s[:RANK], vh[:RANK]
        self.core = nn.Parameter(torch.zeros(RANK, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.mT @ self.core.mT @ self.up.mT


def lora_xs(base: nn.Module) -> nn.Module:
    for name in LAYERS:
        base.set_submodule(name, Core(base.get_submodule(name)))
    return base
