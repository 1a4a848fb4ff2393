"""TLoRA's transform and residual against LoRA, and against OFT's rotation and a LoRA, on weights that have turned."""

import peft
import torch
from contest import Problem, tuned
from ledger import Order
from torch import Tensor, nn

import weft

CLAIM = "Where W has been turned and then changed, a tensor-ring transform of W leaves little to the low-rank residual."
N, STEPS = 64, 200
ANGLE, RANK = 0.5, 6
SETTING = (
    f"Regress one {N} × {N} layer onto W·Q + P, P of rank {RANK} and the change by each of equal norm, in {STEPS} "
    f"full-batch steps. Q moves a vector by about {ANGLE} of its length and is a rotation drawn evenly (any) or a "
    "Kronecker product of two of side 8 (Kronecker). TLoRA with R = 2 and r = 4 and LoRA with r = 8: 1024 parameters "
    "each; PEFT's OFT in blocks of 16 beside a LoRA with r = 4: 992."
)
NOT_HERE = "image generation."
EXPECTED = [
    Order("TLoRA, any", "LoRA, any", ratio=True),
    Order("TLoRA, any", "OFT + LoRA, any", ratio=True),
    Order("TLoRA, Kronecker", "LoRA, Kronecker", ratio=True),
    Order("TLoRA, Kronecker", "OFT + LoRA, Kronecker", ratio=True),
]


def rotation(generator: Tensor) -> Tensor:
    """The rotation that a skew matrix generates, as far along as moves vectors by ANGLE on average."""
    # ‖exp(G) − I‖ is ‖G‖ in the first order, and a little less; a mean move of ANGLE has norm ANGLE·√N
    return torch.matrix_exp(generator * ANGLE * N**0.5 / generator.norm())


def skew(n: int) -> Tensor:
    g = torch.randn(n, n)
    return g - g.mT


def oft_and_lora(base: nn.Module) -> nn.Module:
    model = peft.get_peft_model(base, peft.OFTConfig(oft_block_size=16, target_modules=["0"]), "turn", mixed=True)
    model.add_adapter("residual", peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    model.set_adapter(["turn", "residual"])  # y = W·R·x + B·A·x, both trained
    return model


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    side = round(N**0.5)
    eye = torch.eye(side)
    turns = {
        "any": rotation(skew(N)),
        "Kronecker": rotation(torch.kron(skew(side), eye) + torch.kron(eye, skew(side))),
    }
    figures = {}
    for kind, turn in turns.items():
        base = nn.Sequential(nn.Linear(N, N, bias=False))
        weight = base[0].weight.detach()
        turned = weight @ turn
        change = torch.randn(N, RANK) @ torch.randn(RANK, N)
        wanted = turned + change / change.norm() * (turned - weight).norm()

        def split(rows: int, wanted: Tensor = wanted) -> tuple[Tensor, Tensor]:
            x = torch.randn(rows, N)
            return x, x @ wanted.mT

        problem = Problem(base, split(512), split(256), split(512))
        contenders = {
            "TLoRA": weft.TloraConfig(r=4, transform_rank=2, target_modules=["0"]),
            "LoRA": peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"]),
            "OFT + LoRA": oft_and_lora,
        }
        for name, config in contenders.items():
            figures[f"{name}, {kind}"] = tuned(problem, config, steps=STEPS, seed=seed).score
    return figures
