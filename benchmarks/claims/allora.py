"""ALLoRA under plain gradient descent, where its scaling of gradients counts."""

import peft
import torch
from contest import tuned
from ledger import Order
from problem_language import LENGTH, LINEARS, VOCABULARY, WIDTH, another_language

import weft

ROWS = 32
STEPS = {"short": 100, "long": 250}
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
CLAIM = "Without dropout and scale, and with larger steps where ΔW is small, short runs end better than LoRA's."
SETTING = (
    f"A one-layer decoder of width {WIDTH}, pre-trained on a random language of {VOCABULARY} tokens in which the last "
    f"two decide, learns another that shares half of its tables' variance, from {ROWS} texts of {LENGTH} tokens in "
    f"{STEPS['short']} (short) or {STEPS['long']} (long) full-batch steps of SGD, rates of {RATES[0]:g} to "
    f"{RATES[-1]:g} and beyond where the best lies at an end. All four linear layers, rank 8; LoRA has α = 16 and "
    "dropout 0.05. Scores are divergences from the true language."
)
NOT_HERE = "large models, and AdamW, which divides most of the scaling out again."
EXPECTED = [
    *(Order(f"ALLoRA, {kind}", f"LoRA, {kind}", ratio=True) for kind in STEPS),
    Order("ALLoRA ÷ LoRA, short", "ALLoRA ÷ LoRA, long", ratio=True),
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    problem = another_language(ROWS)
    contenders = {
        "LoRA": peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=LINEARS),
        "ALLoRA": weft.AlloraConfig(r=8, target_modules=LINEARS),
    }
    figures = {}
    for kind, steps in STEPS.items():
        for name, config in contenders.items():
            outcome = tuned(problem, config, rates=RATES, steps=steps, seed=seed, optim="sgd")
            figures[f"{name}, {kind}"] = outcome.score
        figures[f"ALLoRA ÷ LoRA, {kind}"] = figures[f"ALLoRA, {kind}"] / figures[f"LoRA, {kind}"]
    return figures
