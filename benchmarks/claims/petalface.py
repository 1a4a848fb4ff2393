"""PETALface against one LoRA of its size, and with the same weight for every image, on digits of which half are bad."""

import numpy as np
import peft
import torch
from contest import Problem, Split, accuracy, evaluated, pretrained, tuned
from ledger import Order
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

import weft
from weft.builtin import images

SIDE, HIDDEN = 8, 64
RANK, ROWS, STEPS = 2, 300, 150
LAYERS = ["0", "2"]

CLAIM = (
    "Two LoRAs, weighed by each image's quality, do better than one on good and bad images, and keep what full "
    "fine-tuning loses."
)
SETTING = (
    f"An MLP {SIDE**2}-{HIDDEN}-{HIDDEN}-10 that knows sharp scans of digits learns from {ROWS} others, half of them "
    f"blurred and halved in resolution: two layers adapted for {STEPS} full-batch steps, rank {RANK} a branch against "
    f"a LoRA of rank {2 * RANK}. Quality is the sharpness between neighbours, in the range that it has over the "
    "training scans; τ lies between the medians of the bad and the good. Accuracies on unseen scans, half of them bad, "
    "and on the same, all sharp."
)
NOT_HERE = "a Swin transformer, learned judges of quality, and faces by the thousand."
EXPECTED = [
    Order("PETALface", "LoRA", higher=True),
    Order("PETALface", "one weight for all", higher=True),
    Order("PETALface, sharp", "full, sharp", higher=True),
]


def spoil(pixels: Tensor) -> Tensor:
    """Blurred by 3 × 3, averaged to half the side, and blown up again."""
    blurred = avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    return interpolate(avg_pool2d(blurred, 2), scale_factor=2, mode="bilinear")


def sharpness(x: Tensor) -> Tensor:
    """How much neighbouring pixels differ, of how much all do: (images,) from images × 64 pixels."""
    x = x.view(-1, SIDE, SIDE)
    differing = x.diff(dim=1).square().mean((1, 2)) + x.diff(dim=2).square().mean((1, 2))
    return differing / (2 * x.var((1, 2))).clamp_min(1e-6)


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    scans = [images("digits", split) for split in ("train", "validation", "test")]
    x, y = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*scans))
    order = torch.randperm(len(x))
    source, train, validation, test = order[:700], order[700 : 700 + ROWS], order[1000:1300], order[1300:]

    def sharp(rows: Tensor) -> Split:
        return x[rows].flatten(1), y[rows]

    def mixed(rows: Tensor) -> Split:
        half = len(rows) // 2
        return torch.cat([spoil(x[rows[:half]]), x[rows[half:]]]).flatten(1), y[rows]

    layers = nn.Linear(SIDE**2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
    net = pretrained(nn.Sequential(*layers), cross_entropy, sharp(source), rate=1e-2, steps=300, batch_size=64)
    problem = Problem(net, mixed(train), mixed(validation), mixed(test), cross_entropy, accuracy)
    scores = sharpness(problem.train[0])
    worst, best = float(scores.min()), float(scores.max())
    between = sum(float(half.median()) for half in scores.chunk(2)) / 2
    judged = {"worst": worst, "best": best, "tau": (between - worst) / (best - worst)}

    def petalface(base: nn.Module) -> nn.Module:
        config = weft.PetalfaceConfig(r=RANK, target_modules=LAYERS, **judged)
        return peft.get_peft_model(base, weft.prepare(base, config, quality=sharpness))

    contenders = {
        "PETALface": petalface,
        "LoRA": peft.LoraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=LAYERS),
        "one weight for all": weft.PetalfaceConfig(r=RANK, quality=0.5, target_modules=LAYERS),
        "full": lambda base: base.requires_grad_(True),
    }
    splits = {"": problem.test, ", sharp": sharp(test)}
    found = {f"no adapter{which}": evaluated(net, split, accuracy) for which, split in splits.items()}
    for name, attach in contenders.items():
        model = tuned(problem, attach, steps=STEPS, seed=seed).model
        found |= {f"{name}{which}": evaluated(model, split, accuracy) for which, split in splits.items()}
    return found
