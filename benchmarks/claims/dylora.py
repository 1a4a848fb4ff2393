"""DyLoRA, cut to ranks below its own, against LoRA trained at each of them."""

from functools import partial

import peft
import torch
from contest import Problem, evaluated, tuned
from ledger import Close, Order
from problem_layers import NOISE, WIDTH, regression
from torch import Tensor, nn

import weft
from weft.adapters.dylora import set_rank

STEPS = 300
SINGULAR = (2.0, 1.4, 1.0, 0.7)
RANKS = (1, 2, 4, 8)
KINDS = {"DyLoRA": True, "DyLoRA full": False}  # whether only the last of the components in force is trained
CLAIM = "One run serves every rank: cut to any, it is close to LoRA trained at that rank, and far above a cut LoRA."
SETTING = (
    f"Regress two layers of width {WIDTH} with a tanh between them onto themselves with a rank-4 update in each "
    f"(singular values {', '.join(f'{s:g}' for s in SINGULAR)}); 512 rows, label noise of {100 * NOISE:g} % of the "
    f"error to remove, {STEPS} full-batch steps of AdamW for every run. Scores are noiseless test errors, 1 without an "
    "adapter. DyLoRA (the last component in force is trained) or DyLoRA full (all in force are), and LoRA, of rank 8, "
    "are cut to their first components; DyLoRA's one learning rate is the best for the four ranks' mean."
)
NOT_HERE = "GLUE, text generation, and time."
EXPECTED = [
    *(Order(f"DyLoRA at {rank}", f"LoRA cut to {rank}", ratio=True) for rank in RANKS[:-1]),
    *(Close(f"{kind} at {rank}", f"LoRA of rank {rank}") for kind in KINDS for rank in RANKS),
]


class EveryRank(nn.Module):
    """In evaluation, one output for each rank."""

    def __init__(self, base: nn.Module, frozen: bool) -> None:
        super().__init__()
        config = weft.DyloraConfig(r=8, lora_alpha=16, frozen=frozen, target_modules=["0", "2"])
        self.model = peft.get_peft_model(base, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.training else torch.stack([self.at(x, rank) for rank in RANKS])

    def at(self, x: Tensor, rank: int) -> Tensor:
        set_rank(self.model, rank)
        return self.model(x)


@torch.no_grad()
def cut(model: nn.Module, rank: int) -> nn.Module:
    """LoRA without all but its first components; the scale stays."""
    for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        layer.lora_B["default"].weight[:, rank:] = 0
    return model


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    problem = two_layers_move()
    x, y = problem.test
    figures = {}
    for rank in RANKS:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])
        lora = tuned(problem, config, steps=STEPS, seed=seed)
        figures[f"LoRA of rank {rank}"] = lora.score
    for rank in RANKS[-2::-1]:
        figures[f"LoRA cut to {rank}"] = evaluated(cut(lora.model, rank), problem.test, problem.loss)
    for kind, frozen in KINDS.items():
        model = tuned(problem, partial(EveryRank, frozen=frozen), steps=STEPS, seed=seed).model
        with torch.no_grad():
            figures |= {f"{kind} at {rank}": float(problem.loss(model.at(x, rank), y)) for rank in RANKS}
    return figures


def two_layers_move() -> Problem:
    base, wanted = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))
        for _ in range(2)
    )
    wanted.load_state_dict(base.state_dict())
    with torch.no_grad():
        for i in (0, 2):
            u, v = (torch.linalg.qr(torch.randn(WIDTH, len(SINGULAR))).Q for _ in range(2))
            wanted[i].weight += u * torch.tensor(SINGULAR) @ v.mT
    return regression(base, wanted, 512)
