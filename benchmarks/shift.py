"""SNELLA and WaRA on residual networks of CIFAR-10 whose images go through JPEG, beside LoRA of as many parameters.

    python benchmarks/shift.py --data-dir DIR    results/shift/runs.jsonl, and the tables; killed, it goes on
    python benchmarks/shift.py --table           the tables alone, from the file

DIR holds models/resnet_cifar10 and cifar10_subset (see cifar.py). The networks learned from images as they were taken,
and lose eleven and twelve points of accuracy on others that JPEG has touched. They are adapted to those: 1600 images
train, mirrored or not and moved by up to four pixels, 400 choose the learning rate, 1000 test.

    head             the last layer alone
    norms            and the batch norms, with their statistics
    lora             PEFT's, of rank 4, on all convolutions of the blocks
    snella           q_dim = 4: LoRA's parameters and three a layer; half of the entries remain
    snella, uniform  the same with a budget in proportion to the layers' sizes
    wara             a pair of rank 8 that the bands share: LoRA's parameters
    wara, a band     a pair of rank 4 for each band: likewise
    full             everything, with the statistics of the batch norms

The last layer is trained in every arm but base; statistics of the batch norms stay as they are where not said
otherwise. All take equal steps of AdamW, of 64 images: a tenth warm-up, then a cosine. Intervals are of a paired
bootstrap over test images and seeds, which draw the adapter's start and the images' order. "Clean" is accuracy on 1000
other images without JPEG: what is forgotten.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import arms
import cifar
import peft
import torch
from adapters import processor
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import TrainingArguments

import weft
from weft.adapters.snella import SnellaDelta
from weft.run.compare import commit

OUT = arms.RESULTS / "shift" / "runs.jsonl"
PROBLEMS = ("resnet20", "resnet32")
RANK, SHIFT, BATCH = 4, 4, 64
CENTRE, STEPS = 3e-3, {"rate": 100, "test": 100}
WHERE: dict[str, Any] = {"target_modules": r"layer\d\.\d+\.conv\d", "modules_to_save": ["linear"]}
CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=RANK, lora_alpha=RANK, **WHERE),
    "snella": weft.SnellaConfig(q_dim=RANK, **WHERE),
    "snella, uniform": weft.SnellaConfig(q_dim=RANK, **WHERE),
    "wara": weft.WaraConfig(r=2 * RANK, lora_alpha=2 * RANK, **WHERE),
    "wara, a band": weft.WaraConfig(r=RANK, lora_alpha=RANK, bands="per_feature_band", **WHERE),
}
ARMS = ("base", "head", "norms", *CONFIGS, "full")
PAIRS = [
    *((arm, other) for arm in ("snella", "wara", "wara, a band") for other in ("lora", "full")),
    ("snella", "snella, uniform"),
]


@cache
def splits(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    (x, y), test = cifar.splits(folder, "jpeg")
    clean = cifar.splits(folder)[1]
    return {"train": (x[:1600], y[:1600]), "validation": (x[1600:], y[1600:]), "jpeg": test, "clean": clean}


def seen(x: Tensor, draw: torch.Generator) -> Tensor:
    """Images, each mirrored or not and moved by up to SHIFT pixels."""
    mirrored = torch.rand(len(x), generator=draw) < 0.5
    x = pad(torch.where(mirrored[:, None, None, None], x.flip(3), x), (SHIFT,) * 4)
    places = torch.randint(2 * SHIFT + 1, (len(x), 2), generator=draw).tolist()
    return torch.stack([image[:, top : top + 32, left : left + 32] for image, (top, left) in zip(x, places)])


def attached(arm: str, base: cifar.ResNet) -> nn.Module:
    """The network with what the arm trains, in training."""
    if arm in CONFIGS:
        model: nn.Module = peft.get_peft_model(base, CONFIGS[arm]).train()
        if arm == "snella, uniform":
            controller = next(m for m in model.modules() if isinstance(m, SnellaDelta)).controller
            controller.scores = lambda: controller.sizes
    else:
        model = base.train().requires_grad_(arm == "full")
        base.linear.requires_grad_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(arm in ("norms", "full")).requires_grad_(arm in ("norms", "full"))
    return model


def trained(base: cifar.ResNet, arm: str, data: tuple[Tensor, Tensor], job: dict[str, Any]) -> nn.Module:
    """The network after the arm's training, in evaluation."""
    torch.manual_seed(job["seed"])
    model, (x, y) = attached(arm, base), data
    args = TrainingArguments(
        output_dir="unused", report_to="none", use_cpu=True, max_steps=job["steps"], learning_rate=job["rate"],
        warmup_steps=job["steps"] // 10, lr_scheduler_type="cosine",
    )  # fmt: skip
    optimizer, scheduler = weft.optimizer_and_scheduler(model, args)
    assert scheduler is not None
    draw, order = torch.Generator().manual_seed(job["seed"]), torch.empty(0, dtype=torch.long)
    for _ in range(job["steps"]):
        if len(order) < BATCH:
            order = torch.randperm(len(x), generator=draw)
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        cross_entropy(model(seen(x[rows], draw)), y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


@torch.no_grad()
def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float(cross_entropy(model(data[0]), data[1]))


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    data, model = splits(Path(context["data_dir"])), cifar.trained(Path(context["data_dir"]), job["problem"])
    if job["arm"] != "base":
        model = trained(model, job["arm"], data["train"], job)
    learned = 0 if job["arm"] == "base" else sum(p.numel() for p in model.parameters() if p.requires_grad)
    row: dict[str, Any] = {"validation": arms.finite(loss(model, data["validation"])), "trained": learned}
    if job["phase"] == "test":
        each = {name: cifar.right(model, *data[name]) for name in ("jpeg", "clean")}
        draws = arms.counts(len(data["jpeg"][1]), job["seed"])
        row["scores"] = {name: float(right.mean()) for name, right in each.items()}
        row["draws"] = {
            name: arms.drawn(lambda counts, right=right: float(counts @ right / counts.sum()), draws)
            for name, right in each.items()
        }
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


def report(study: arms.Study) -> Iterator[str]:
    tested = study.tested()
    for problem in study.problems:
        mine = {arm: tested[problem, arm] for arm in study.arms if (problem, arm) in tested}
        rows = (
            [arm, f"{runs[0]['trained']:,}", "" if arm in study.still else f"{runs[0]['rate']:g}",
             *(arms.mean(runs, score, 3) for score in ("jpeg", "clean"))]
            for arm, runs in mine.items()
        )  # fmt: skip
        yield from ("", f"{problem}, {max(map(len, mine.values()), default=0)} seeds", "")
        yield from arms.table(["arm", "trained", "rate", "JPEG", "clean"], rows)
    yield ""
    for problem, one, other, word, shown in arms.orders(tested, PAIRS, "jpeg"):
        yield f"- {problem}: {one} above {other}: {shown}, {word}"


def study_of(problems: str = ",".join(PROBLEMS), seeds: int = 3) -> arms.Study:
    return arms.Study(OUT, problems.split(","), ARMS, seeds, CENTRE, STEPS, ("base",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", default=",".join(PROBLEMS), help="networks between commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    study = study_of(args.only, args.seeds)
    if not args.table:
        if args.data_dir is None:
            parser.error("--data-dir is where models and cifar10_subset lie; or --table")
        versions = {"torch": torch.__version__, "weft": weft.__version__}
        made_by = {"device": processor(), "commit": commit(), "versions": versions}
        study.run(measure, {"data_dir": str(args.data_dir), "made_by": made_by}, args.workers)
    print("\n".join(report(study)))


if __name__ == "__main__":
    main()
