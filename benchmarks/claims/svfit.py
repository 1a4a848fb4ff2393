"""SVFit against LoRA of more parameters, and against random directions in the place of W's singular vectors."""

import peft
import torch
from contest import tuned
from ledger import Order
from problem_classifier import BATCH, CLASSES, HIDDEN, INPUTS, LAYERS, PROBLEM, STEPS, moved_teacher
from torch import nn

import weft
from weft.adapters.svfit import SvfitDelta

SIDES = [(HIDDEN, INPUTS), (HIDDEN, HIDDEN), (CLASSES, HIDDEN)]
COUNT = sum(min(sides) for sides in SIDES)
LORA = {rank: rank * sum(map(sum, SIDES)) for rank in (1, 5)}

CLAIM = "Training only the singular values of W does better than LoRA with 16 times as many parameters."
SETTING = (
    f"{PROBLEM}; accuracy. SVFit trains all {COUNT} singular values, LoRA {LORA[1]} (r = 1) or {LORA[5]} (r = 5) "
    f"numbers; random: as SVFit, but {COUNT} pairs of random orthonormal directions."
)
NOT_HERE = "GLUE, DreamBooth and image classification with pre-trained transformers."
EXPECTED = [
    Order("SVFit", "LoRA, r = 5", higher=True),
    Order("SVFit", "LoRA, r = 1", higher=True),
    Order("SVFit", "random", higher=True),
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    problem = moved_teacher()
    ours = weft.SvfitConfig(energy=1.0, target_modules=LAYERS)

    @torch.no_grad()
    def random(base: nn.Module) -> nn.Module:
        model = peft.get_peft_model(base, ours)
        for delta in (m for m in model.modules() if isinstance(m, SvfitDelta)):
            nn.init.orthogonal_(delta.A)
            nn.init.orthogonal_(delta.B)
        return model

    contenders = {
        "SVFit": ours,
        "LoRA, r = 5": peft.LoraConfig(r=5, lora_alpha=5, target_modules=LAYERS),
        "LoRA, r = 1": peft.LoraConfig(r=1, lora_alpha=1, target_modules=LAYERS),
        "random": random,
    }
    return {
        name: tuned(problem, attach, steps=STEPS, batch_size=BATCH, seed=seed).score
        for name, attach in contenders.items()
    }
