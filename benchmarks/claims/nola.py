"""NOLA with half of the numbers of the smallest LoRA."""

from collections.abc import Callable

import peft
import torch
from contest import Attach, tuned
from ledger import Close, Order
from problem_language import LENGTH, LINEARS, VOCABULARY, WIDTH, another_language
from torch import nn

import weft

ROWS = 64
STEPS = 120
TRAINED = 192  # numbers: half of a rank-1 LoRA's
CLAIM = "With half of rank-1 LoRA's parameters, mixtures of random matrices lose nothing against it."
SETTING = (
    f"A one-layer decoder of width {WIDTH}, pre-trained on a random language of {VOCABULARY} tokens in which the last "
    f"two decide, learns another that shares half of its tables' variance, from {ROWS} texts of {LENGTH} tokens in "
    f"{STEPS} full-batch steps of AdamW. All four linear layers: NOLA (rank 8, k = 24) trains {TRAINED} numbers, "
    f"rank-1 LoRA {2 * TRAINED}; beside them, {TRAINED} random entries of a LoRA of rank 8 or 1. Scores are "
    "divergences from the true language."
)
NOT_HERE = "models whose rank-1 LoRA is large, where the saving matters, and quantised coefficients."
EXPECTED = [
    Close("NOLA", "LoRA of rank 1"),
    Order("NOLA", "entries of rank 8", ratio=True),
    Order("NOLA", "entries of rank 1", ratio=True),
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    problem = another_language(ROWS)
    contenders: dict[str, Attach] = {
        "NOLA": weft.NolaConfig(num_basis=24, r=8, seed=seed, target_modules=LINEARS),
        "LoRA of rank 1": lora(1),
        "entries of rank 8": some_entries(8, seed),
        "entries of rank 1": some_entries(1, seed),
    }
    return {name: tuned(problem, c, steps=STEPS, seed=seed).score for name, c in contenders.items()}


def lora(rank: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS)


def some_entries(rank: int, seed: int) -> Callable[[nn.Module], nn.Module]:
    """LoRA of which only TRAINED entries, drawn over all factors alike, have a gradient."""

    def attach(base: nn.Module) -> nn.Module:
        model = peft.get_peft_model(base, lora(rank))
        factors = [p for p in model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in factors]
        chosen = torch.zeros(sum(sizes))
        chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:TRAINED]] = 1
        for p, mask in zip(factors, chosen.split(sizes), strict=True):
            p.register_hook(mask.view_as(p).mul)
        return model

    return attach
