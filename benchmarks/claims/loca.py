"""LoCA against fixed places, against Fourier coefficients and against LoRA, on an update that is dense noise."""

import peft
import torch
from contest import Problem, tuned
from ledger import Order
from torch import nn

import weft

N, COUNT, RANK, STEPS, MOVING, ROWS = 64, 256, 2, 200, 150, 512

CLAIM = (
    "Cosine coefficients at learned places fit an update better than ones at fixed places, than FourierFT and, where "
    "the update is dense, than LoRA."
)
SETTING = (
    f"Regress one {N} × {N} layer onto W + ΔW, ΔW of independent normal numbers, on {ROWS} rows, {STEPS} steps; test "
    f"loss, 1 without an adapter. {COUNT} coefficients against LoRA of rank {RANK} (as many numbers). LoCA's places, "
    f"{2 * COUNT} numbers more, move in the first {MOVING} steps, at location_lr = 5e-3."
)
NOT_HERE = "GLUE, instruction tuning and images, and a thousand coefficients against LoRA of far more numbers."
EXPECTED = [
    Order("LoCA", "fixed places", ratio=True),
    Order("LoCA", "FourierFT", ratio=True),
    Order("LoCA", "LoRA", ratio=True),
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(N, N, bias=False))
    weight = base[0].weight.detach() + torch.randn(N, N) / N**0.5

    def split() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(ROWS, N)
        return x, x @ weight.mT

    problem = Problem(base, split(), split(), split())

    def loca(moving: int) -> weft.LocaConfig:
        return weft.LocaConfig(n_frequency=COUNT, location_lr=5e-3, learn_location_iter=moving, target_modules=["0"])

    contenders = {
        "LoCA": loca(MOVING),
        "fixed places": loca(0),
        # scaled so that a coefficient moves W as far as one of LoCA's
        "FourierFT": peft.FourierFTConfig(
            n_frequency=COUNT, scaling=N * 2**0.5, init_weights=True, random_loc_seed=seed, target_modules=["0"]
        ),
        "LoRA": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]),
    }
    return {name: tuned(problem, config, steps=STEPS, seed=seed).score for name, config in contenders.items()}
