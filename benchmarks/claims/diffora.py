"""DiffoRA's choice of modules against a random choice and against a LoRA on every module."""

import copy
from types import SimpleNamespace

import peft
import torch
from contest import Problem, Split, tuned
from ledger import Order
from torch import Tensor, nn

import weft
from weft.adapters.diffora import OWN, DifforaDelta

CLAIM = "Gates trained on held-out rows find the modules that need a LoRA, and that does better than a LoRA on all."
N, RANK, NOISE, STEPS = 32, 8, 0.1, 200
SETTING = (
    f"An MLP of six {N} × {N} layers, two of which, drawn anew each seed, move by an orthogonal update of rank {RANK}; "
    f"256 rows with noise, {STEPS} full-batch steps. DiffoRA with r = 4 and ρ = 1/3 over the whole model, its held-out "
    f"rows those that also choose the rates, and a search of {STEPS // 10} steps; the same with two modules drawn; and "
    f"LoRA with r = 2 on all six, whose parameters are as many as two pairs and the shared one, {24 * N}. Losses; and "
    "how often DiffoRA's two modules are the two that moved."
)
NOT_HERE = "GLUE and SQuAD, and the other baselines."
EXPECTED = [
    Order("both found", 0.5, higher=True),
    Order("DiffoRA", "random choice", ratio=True),
    Order("DiffoRA", "LoRA", ratio=True),
]


class Net(nn.Module):
    """An MLP that tells its loss where it gets labels, as the search wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(N, N) for _ in range(6))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | SimpleNamespace:
        for layer in self.layers[:-1]:
            x = nn.functional.gelu(layer(x))
        y = self.layers[-1](x)
        return y if labels is None else SimpleNamespace(loss=nn.functional.mse_loss(y, labels))


def diffora(held_out: Split, drawn: bool = False):
    """Attaches DiffoRA, or DiffoRA whose gates have a drawn order that the search does not change."""

    def attach(base: nn.Module) -> nn.Module:
        names = [f"layers.{i}" for i in range(6)]
        still = {"arch_lr": 1e-30} if drawn else {}
        config = weft.DifforaConfig(r=4, rho=1 / 3, selection="global", target_modules=names, **still)
        batch = dict(zip(("x", "labels"), held_out))
        model = peft.get_peft_model(base, weft.prepare(base, config, held_out=[batch]))
        if drawn:
            next(deltas(model)).controller.a = 1e-6 * torch.randperm(6).double()
        return model

    return attach


def deltas(model: nn.Module):
    return (d for d in model.modules() if isinstance(d, DifforaDelta))


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    base = Net()
    wanted = copy.deepcopy(base).requires_grad_(False)
    moved = set(torch.randperm(6)[:2].tolist())
    for i in moved:
        u, v = (torch.linalg.qr(torch.randn(N, RANK)).Q for _ in range(2))
        wanted.layers[i].weight += u @ v.mT

    def split(rows: int, noise: float = NOISE) -> Split:
        x = torch.randn(rows, N)
        return x, wanted(x) + noise * torch.randn(rows, N)

    problem = Problem(base, split(256), split(256), split(512, 0.0))
    contenders = {
        "DiffoRA": diffora(problem.validation),
        "random choice": diffora(problem.validation, drawn=True),
        "LoRA": peft.LoraConfig(r=2, lora_alpha=4, target_modules=[f"layers.{i}" for i in range(6)]),
    }
    outcomes = {name: tuned(problem, attach, steps=STEPS, seed=seed) for name, attach in contenders.items()}
    found = {i for i, d in enumerate(deltas(outcomes["DiffoRA"].model)) if int(d.use) == OWN}
    return {"both found": float(found == moved), **{name: outcome.score for name, outcome in outcomes.items()}}
