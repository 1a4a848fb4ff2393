"""Block-LoRA against LoRA of its nominal rank, and of the rank that its update has."""

import peft
import torch
from contest import tuned
from ledger import Close, Order
from problem_few_shot import CLASSES, FEW_SHOT, SIDE, few_shot
from torch import nn

import weft

CLAIM = "Sharing the down-projection among LoRA's blocks saves parameters and keeps few-shot accuracy."
STEPS = 200
SETTING = (
    f"{FEW_SHOT}; two layers {SIDE} × {SIDE} of an MLP adapted for {STEPS} full-batch steps. Block-LoRA with r = 4 in "
    "two blocks has 75 % of the parameters of LoRA with r = 4 and the same scale; its update has rank 2, as LoRA's "
    "with r = 2, which has 50 %. Test accuracies."
)
NOT_HERE = "CLIP's benchmarks, and time and memory on a GPU."
EXPECTED = [
    Close("Block-LoRA", "LoRA r=4", higher=True),
    Order("Block-LoRA", "LoRA r=2", higher=True),
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    layers = nn.Linear(SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, CLASSES)
    problem = few_shot(nn.Sequential(*layers))
    targets = ["0", "2"]
    contenders = {
        "Block-LoRA": weft.BlockLoraConfig(r=4, n_blocks=2, lora_alpha=8, target_modules=targets),
        "LoRA r=4": peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets),
        "LoRA r=2": peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets),
    }
    return {name: tuned(problem, config, steps=STEPS, seed=seed).score for name, config in contenders.items()}
