"""WaRA on updates that are multi-scale, and on updates that are not."""

import peft
import torch
from contest import Problem, tuned
from ledger import Order
from torch import nn

import weft

N, RANK, ROWS, STEPS = 64, 4, 512, 200

CLAIM = "A low-rank update of wavelet coefficients does better than a low-rank update of the weight."
SETTING = (
    f"Regress one {N} × {N} layer onto W + ΔW, on {ROWS} rows, {STEPS} steps; {2 * N * RANK} parameters each; test "
    f"loss, 1 without an adapter. ΔW is constant in blocks of 8 × 8 with 12 sharp details (multi-scale), or one "
    f"product of rank {2 * RANK} (global)."
)
NOT_HERE = "image generation and segmentation, and classification by large models."
EXPECTED = [
    Order("shared pair, multi-scale", "LoRA, multi-scale", ratio=True),
    Order("pair a band, multi-scale", "LoRA, multi-scale", ratio=True),
    Order("LoRA, global", "shared pair, global", ratio=True),
]


def multi_scale() -> torch.Tensor:
    update = torch.kron(torch.randn(N // 8, N // 8), torch.ones(8, 8))
    for row, column in (2 * torch.randint(N // 2, (12, 2))).tolist():
        update[row : row + 2, column : column + 2] += 4 * torch.randn(()) * torch.tensor([[1, -1], [-1, 1]])
    return update


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    updates = {"multi-scale": multi_scale(), "global": torch.randn(N, 2 * RANK) @ torch.randn(2 * RANK, N)}
    figures = {}
    for kind, update in updates.items():
        base = nn.Sequential(nn.Linear(N, N, bias=False))
        weight = base[0].weight.detach() + update * N**0.5 / update.norm()

        def split(weight: torch.Tensor = weight) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(ROWS, N)
            return x, x @ weight.mT

        problem = Problem(base, split(), split(), split())
        contenders = {
            "LoRA": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]),
            "shared pair": weft.WaraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=["0"]),
            "pair a band": weft.WaraConfig(r=RANK, lora_alpha=RANK, bands="per_feature_band", target_modules=["0"]),
        }
        for name, config in contenders.items():
            figures[f"{name}, {kind}"] = tuned(problem, config, steps=STEPS, seed=seed).score
    return figures
