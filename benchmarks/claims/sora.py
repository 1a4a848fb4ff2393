"""SoRA where half of the layers need a small update and the others none."""

import peft
import torch
from contest import Outcome, tuned
from ledger import Close, Order
from problem_layers import LAYERS, NAMES, NOISE, WIDTH, some_layers_move

import weft
from weft.adapters.sora import SoraDelta

STEPS = 200
SHRINK = (0.6, 1.2, 2.4)  # what a gate without gradient loses over the run; gates start standard normal
CLAIM = "Gates driven to zero leave 70 % of the parameters or fewer, at no loss against LoRA of the full rank."
SETTING = (
    f"Regress {LAYERS} residual tanh layers of width {WIDTH} onto themselves with a rank-2 update in three, drawn by "
    f"the seed; 256 rows, label noise of {100 * NOISE:g} % of the error to remove, {STEPS} full-batch steps of AdamW. "
    "Scores are noiseless test errors, 1 without an adapter. SoRA has r = 8 and thresholds of "
    f"{', '.join(f'{s / STEPS:g}' for s in SHRINK)} a step, which in {STEPS} steps take "
    f"{', '.join(f'{s:g}' for s in SHRINK)} off a gate that no gradient holds; LoRA of its size has as many components "
    "as SoRA is left with, spread evenly."
)
NOT_HERE = "GLUE, other adapters than LoRA, and training time."
EXPECTED = [
    claim
    for shrink in SHRINK
    for claim in (
        Order(f"components a layer, {shrink:g} off", 0.7 * 8),
        Close(f"SoRA, {shrink:g} off", "LoRA r = 8"),
        Order(f"SoRA, {shrink:g} off", f"LoRA of its size, {shrink:g} off", ratio=True),
    )
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    problem, _ = some_layers_move(3, rank=2, rows=256)

    def outcome(config: peft.PeftConfig) -> Outcome:
        return tuned(problem, config, steps=STEPS, seed=seed)

    figures = {"LoRA r = 8": outcome(lora(8 * LAYERS)).score}
    for shrink in SHRINK:
        sora = outcome(weft.SoraConfig(r=8, sparse_lambda_2=shrink / STEPS, target_modules=NAMES))
        kept = sum(int((d.g != 0).sum()) for d in sora.model.modules() if isinstance(d, SoraDelta))
        figures[f"SoRA, {shrink:g} off"] = sora.score
        figures[f"components a layer, {shrink:g} off"] = kept / LAYERS
        figures[f"LoRA of its size, {shrink:g} off"] = outcome(lora(max(1, kept))).score
    return figures


def lora(components: int) -> peft.LoraConfig:
    """LoRA of so many components in all, with SoRA's scale in every layer."""
    rank, more = divmod(components, LAYERS)
    ranks = {name: rank + (i < more) for i, name in enumerate(NAMES)}
    ranks = {name: r for name, r in ranks.items() if r}
    return peft.LoraConfig(
        r=1, rank_pattern=ranks, alpha_pattern={name: 2 * r for name, r in ranks.items()}, target_modules=list(ranks)
    )
