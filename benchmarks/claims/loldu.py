"""LoLDU against LoRA of more parameters, and against random factors in the place of W's triangular ones."""

import peft
import torch
from contest import tuned
from ledger import Close, Order
from problem_classifier import BATCH, CLASSES, HIDDEN, INPUTS, LAYERS, PROBLEM, STEPS, moved_teacher
from torch import nn

import weft
from weft.adapters.loldu import LolduDelta

SIDES = [(HIDDEN, INPUTS), (HIDDEN, HIDDEN), (CLASSES, HIDDEN)]
COUNT, LORA = sum(min(sides) for sides in SIDES), sum(map(sum, SIDES))

RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # LoLDU's scale is one over the side of a layer

CLAIM = "Training only the pivots of W's LDU factorisation is as good as LoRA with far more parameters."
SETTING = (
    f"{PROBLEM}; accuracy. LoLDU trains all {COUNT} pivots, LoRA of rank 1 {LORA} numbers; random: as LoLDU, but "
    "between random factors whose columns and rows have the lengths of the triangular ones."
)
NOT_HERE = "instruction tuning and image generation, and the 2600-fold saving, which takes wide layers."
EXPECTED = [Close("LoLDU", "LoRA", higher=True), Order("LoLDU", "random", higher=True)]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    problem = moved_teacher()
    ours = weft.LolduConfig(target_modules=LAYERS)

    @torch.no_grad()
    def random(base: nn.Module) -> nn.Module:
        model = peft.get_peft_model(base, ours)
        for delta in (m for m in model.modules() if isinstance(m, LolduDelta)):
            for factor, dim in ((delta.B, 0), (delta.A, 1)):
                lengths = factor.norm(dim=dim, keepdim=True)
                factor.normal_()
                factor *= lengths / factor.norm(dim=dim, keepdim=True)
        return model

    contenders = {
        "LoLDU": ours,
        "LoRA": peft.LoraConfig(r=1, lora_alpha=1, target_modules=LAYERS),
        "random": random,
    }
    return {
        name: tuned(problem, attach, rates=RATES, steps=STEPS, batch_size=BATCH, seed=seed).score
        for name, attach in contenders.items()
    }
