"""CoDyRA on three tasks in a row, against LoRA that is merged after each."""

import dataclasses
from typing import Any

import peft
import torch
from contest import Problem, evaluated, tuned
from ledger import Close, Order
from problem_layers import LAYERS, NAMES, NOISE, WIDTH, Network
from torch import Tensor, nn

import weft

STEPS = 150
TASKS = 3
RANK = 16
RATES = (3e-3, 1e-2, 3e-2)
SHRINK = (0.17, 0.6)  # what a gate without gradient loses over a task: in the authors' code, and as they launch it
CLAIM = "Rank that is pruned in each task leaves weights nearer to where they were, and forgets less, than merged LoRA."
SETTING = (
    f"Regress {LAYERS} residual tanh layers of width {WIDTH} onto themselves with a rank-2 update in three, drawn by "
    f"the seed, {TASKS} times in a row: each task has an update of its own, inputs in {WIDTH // TASKS} directions of "
    f"its own, and 256 rows with label noise of {100 * NOISE:g} % of the error to remove. {STEPS} full-batch steps of "
    "AdamW a task, at the rate that is best on the task's validation rows; then the adapter is merged. Scores are "
    f"noiseless test errors, 1 without an adapter. CoDyRA and LoRA have r = {RANK} and the scale 1; over a task, "
    f"CoDyRA's thresholds take {' or '.join(f'{s:g}' for s in SHRINK)} off a gate that no gradient holds, as in the "
    "authors' code and as they launch it. Forgetting is how much the error of the first two tasks has risen in the "
    "end; drift is the norm of what all tasks have added to the weights."
)
NOT_HERE = "CLIP and its eleven data sets, zero-shot accuracy, and other methods for continual learning."
EXPECTED = [
    claim
    for shrink in SHRINK
    for claim in (
        Order(f"drift of CoDyRA, {shrink:g} off", "drift of LoRA", ratio=True),
        Order(f"forgetting of CoDyRA, {shrink:g} off", "forgetting of LoRA"),
        Close(f"error of CoDyRA on the new task, {shrink:g} off", "error of LoRA on the new task"),
    )
]


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    base = Network()
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q.chunk(TASKS, dim=1)
    problems = [task(base, each) for each in directions]
    figures = {}
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES)
    contenders: dict[str, tuple[str, Any]] = {"": ("LoRA", lora)}
    for shrink in SHRINK:
        # in half of the steps, half of max_kappa on average
        config = weft.CodyraConfig(r=RANK, max_kappa=4 * shrink / STEPS, target_modules=NAMES)
        contenders[f", {shrink:g} off"] = ("CoDyRA", config)
    for suffix, (name, config) in contenders.items():
        drift, forgetting, learned = stream(base, problems, config, seed)
        figures[f"drift of {name}{suffix}"] = drift
        figures[f"forgetting of {name}{suffix}"] = forgetting
        figures[f"error of {name} on the new task{suffix}"] = learned
    return figures


@torch.no_grad()
def task(base: nn.Module, directions: Tensor) -> Problem:
    """Inputs within `directions` (WIDTH × k), and a network with three layers moved; from the global stream."""
    wanted = Network()
    wanted.load_state_dict(base.state_dict())
    for i in torch.randperm(LAYERS)[:3].tolist():
        u, v = (torch.linalg.qr(torch.randn(WIDTH, 2)).Q for _ in range(2))
        wanted.layers[i].weight += u @ v.mT
    k = directions.shape[1]
    x = torch.randn(4096, k) @ directions.mT
    unit = (wanted(x) - base(x)).square().mean()

    def split(rows: int, noise: float) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, k) @ directions.mT
        y = wanted(x)
        return x, y + (noise * unit).sqrt() * torch.randn_like(y)

    def loss(found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).square().mean() / unit

    return Problem(base, split(256, NOISE), split(512, NOISE), split(2048, 0.0), loss)


def stream(base: nn.Module, problems: list[Problem], config: peft.PeftConfig, seed: int) -> tuple[float, float, float]:
    """Drift, forgetting, and the mean error of a task right after it, once all were trained in their order."""
    model, after = base, []
    for problem in problems:
        outcome = tuned(dataclasses.replace(problem, model=model), config, rates=RATES, steps=STEPS, seed=seed)
        model = outcome.model.merge_and_unload()
        after.append(evaluated(model, problem.test, problem.loss))
    risen = [evaluated(model, p.test, p.loss) - then for p, then in zip(problems[:-1], after)]
    moved = [(model.get_submodule(name).weight - base.get_submodule(name).weight).detach() for name in NAMES]
    drift = float(torch.stack(moved).norm())
    return drift, sum(risen) / len(risen), sum(after) / len(after)
