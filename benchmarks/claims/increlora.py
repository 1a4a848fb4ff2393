"""IncreLoRA where two layers of six need all the rank."""

import peft
import torch
from contest import tuned
from ledger import Order
from problem_layers import LAYERS, NAMES, NOISE, WIDTH, some_layers_move

import weft
from weft.adapters.increlora import IncreloraDelta

STEPS = 200
ROWS = {"few rows": 64, "many rows": 512}
CLAIM = "Growing rank where it matters most beats LoRA of the same size, most where data are few."
SETTING = (
    f"Regress {LAYERS} residual tanh layers of width {WIDTH} onto themselves with a rank-4 update in two, drawn by the "
    f"seed; {ROWS['few rows']} or {ROWS['many rows']} rows, label noise of {100 * NOISE:g} % of the error to remove, "
    f"{STEPS} full-batch steps of AdamW. Scores are noiseless test errors, 1 without an adapter. IncreLoRA grows from "
    "1 to an average of 2 components in the first half of the run; LoRA has 2 everywhere."
)
NOT_HERE = "GLUE, and methods that prune instead, such as AdaLoRA."
EXPECTED = [
    *(Order(f"rank where needed, {rows}", f"rank elsewhere, {rows}", higher=True) for rows in ROWS),
    *(Order(f"IncreLoRA, {rows}", f"LoRA, {rows}", ratio=True) for rows in ROWS),
    Order("IncreLoRA ÷ LoRA, few rows", "IncreLoRA ÷ LoRA, many rows", ratio=True),
]


def measure(seed: int) -> dict[str, float]:
    figures = {}
    for kind, rows in ROWS.items():
        torch.manual_seed(seed)
        problem, moved = some_layers_move(2, rank=4, rows=rows)
        lora = tuned(problem, peft.LoraConfig(r=2, lora_alpha=16, target_modules=NAMES), steps=STEPS, seed=seed)
        ours = tuned(problem, weft.IncreloraConfig(target_rank=2, target_modules=NAMES), steps=STEPS, seed=seed)
        ranks = [d.active for d in ours.model.modules() if isinstance(d, IncreloraDelta)]
        needed = sum(ranks[i] for i in moved)
        figures |= {
            f"LoRA, {kind}": lora.score,
            f"IncreLoRA, {kind}": ours.score,
            f"IncreLoRA ÷ LoRA, {kind}": ours.score / lora.score,
            f"rank where needed, {kind}": needed / len(moved),
            f"rank elsewhere, {kind}": (sum(ranks) - needed) / (LAYERS - len(moved)),
        }
    return figures
