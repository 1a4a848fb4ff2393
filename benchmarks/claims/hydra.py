"""Hydra's two branches against each alone, on an update of their own form and on a turned classification task."""

import peft
import torch
from contest import Problem, tuned
from ledger import Order
from problem_few_shot import CLASSES, FEW_SHOT, SIDE, few_shot
from torch import Tensor, nn

import weft

CLAIM = "A parallel and a sequential low-rank branch together do better than either alone."
IN, OUT = 96, 32  # as the second layer of an MLP; at IN = 3 · OUT, equal numbers are whole ranks
NOISE, STEPS = 0.1, 200
SETTING = (
    f"Regress one {IN} → {OUT} layer onto (I + S)·W + P, S and P of rank 2 and their changes of equal norm, from noisy "
    f"targets (layer; losses); {FEW_SHOT}, the second layer of an MLP, {3 * SIDE} → {SIDE}, adapted (few-shot; "
    f"accuracies). {STEPS} full-batch steps. Equal parameters: Hydra of ranks 2 and 2, a sequential branch of rank 6, "
    "LoRA of rank 3, which is the parallel branch alone."
)
NOT_HERE = "ViT, CLIP and RoBERTa on their benchmarks."
EXPECTED = [
    Order("Hydra, layer", "LoRA, layer", ratio=True),
    Order("Hydra, layer", "sequential, layer", ratio=True),
    Order("Hydra, few-shot", "LoRA, few-shot", higher=True),
    Order("Hydra, few-shot", "sequential, few-shot", higher=True),
]


def regression() -> tuple[Problem, str]:
    """The layer, and its module's name; the test targets are without noise."""
    base = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    weight = base[0].weight.detach()
    remix = torch.randn(OUT, 2) @ torch.randn(2, OUT) @ weight
    new = torch.randn(OUT, 2) @ torch.randn(2, IN)
    wanted = weight + 0.5 * weight.norm() * (remix / remix.norm() + new / new.norm())

    def split(rows: int, noise: float = NOISE) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, IN)
        return x, x @ wanted.mT + noise * torch.randn(rows, OUT)

    return Problem(base, split(512), split(256), split(512, 0.0)), "0"


def classification() -> tuple[Problem, str]:
    layers = nn.Linear(SIDE, 3 * SIDE), nn.ReLU(), nn.Linear(3 * SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, CLASSES)
    return few_shot(nn.Sequential(*layers)), "2"


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    figures = {}
    for kind, (problem, target) in {"layer": regression(), "few-shot": classification()}.items():
        contenders = {
            "Hydra": weft.HydraConfig(r=2, target_modules=[target]),
            "LoRA": peft.LoraConfig(r=3, lora_alpha=3, target_modules=[target]),
            "sequential": weft.HydraConfig(r_p=0, r_s=6, target_modules=[target]),
        }
        for name, config in contenders.items():
            figures[f"{name}, {kind}"] = tuned(problem, config, steps=STEPS, seed=seed).score
    return figures
