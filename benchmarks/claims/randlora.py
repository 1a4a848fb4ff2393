"""RandLoRA on updates whose singular values are many, or few."""

import peft
import torch
from contest import Problem, Split, tuned
from ledger import Order
from torch import Tensor, nn

import weft

N = 64
STEPS = 300
NOISE = 0.05  # variance of the labels' noise; the update's output has variance 1
UPDATES = ("flat", "Gaussian", "rank 2")
CLAIM = "At LoRA's number of parameters a full-rank update reaches what low rank cannot."
SETTING = (
    f"Regress one {N} × {N} layer onto W + ΔW, ΔW of one Frobenius norm: orthogonal (a flat spectrum), Gaussian (full "
    "rank, unequal singular values), or of rank 2, where LoRA should win. 512 rows, label noise of "
    f"{100 * NOISE:g} % of the error to remove, {STEPS} full-batch steps of AdamW. RandLoRA (r = 13) trains 385 "
    "numbers, LoRA (r = 3) 384. Scores are noiseless test errors, 1 without an adapter."
)
NOT_HERE = "images, language and their combination."
EXPECTED = [
    Order("RandLoRA, flat", "LoRA, flat", ratio=True),
    Order("RandLoRA, Gaussian", "LoRA, Gaussian", ratio=True),
    Order("LoRA, rank 2", "RandLoRA, rank 2", ratio=True),
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(N, N, bias=False))
    updates = {
        "flat": torch.linalg.qr(torch.randn(N, N)).Q,
        "Gaussian": torch.randn(N, N),
        "rank 2": torch.randn(N, 2) @ torch.randn(2, N),
    }
    figures = {}
    for kind in UPDATES:
        update = updates[kind] / updates[kind].norm() * N**0.5  # its output has variance 1
        problem = regression(base, base[0].weight.detach() + update)
        contenders = {
            "LoRA": peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"]),
            "RandLoRA": weft.RandloraConfig(r=13, seed=seed, target_modules=["0"]),
        }
        for name, config in contenders.items():
            figures[f"{name}, {kind}"] = tuned(problem, config, steps=STEPS, seed=seed).score
    return figures


def regression(base: nn.Module, weight: Tensor) -> Problem:
    def split(rows: int, noise: float) -> Split:
        x = torch.randn(rows, N)
        y = x @ weight.mT
        return x, y + noise**0.5 * torch.randn_like(y)

    return Problem(base, split(512, NOISE), split(512, NOISE), split(2048, 0.0))
