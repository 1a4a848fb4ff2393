"""Accuracy against multiplications of one trained model, cut again and again: Maestro's beside the dense model's SVD.

    python benchmarks/maestro.py --data-dir DIR     → benchmarks/results/maestro/runs.jsonl, docs/assets/maestro.svg
    python benchmarks/maestro.py --draw             tables and picture, from the file (`pip install weft[plots]`)

    digits   a perceptron of 784-256-256-10 from random weights; DIR/mnist_subset: 9,000 images train, 1,000 choose
    cifar    ResNet-20, trained already, for ten more epochs; DIR/cifar10_subset: 1,750 images train, 250 choose

Either model is trained dense, or as Maestro, by SGD for the same steps on the same batches. A dense one is then written
as factors by SVD. Both are cut by `truncate`, which looks at the loss on the images that choose, and no step is taken
after it; batch norms are computed anew. Learning rates, and Maestro's λ, come from grids of three at a quarter of the
steps, by the mean loss, on the images that choose, of cuts a fifth (digits) or a fiftieth apart; a best at the edge is
extended. Three seeds; the test images are classified once. Killed, it goes on after the last run that was written.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import right, splits
from cifar import trained as already
from claims.ledger import interval
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.modules.batchnorm import _BatchNorm

import weft
from weft.files import write_text
from weft.pretrain.maestro import Cut, recalibrate, shrink, truncate

ROWS = Path(__file__).parent / "results" / "maestro" / "runs.jsonl"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "maestro.svg"
LAMBDAS = (1e-5, 1e-4, 1e-3)
EXTENDED = 3  # times that a grid is, at most, at each of its edges
SEEDS = range(3)
BATCH = 125


@dataclass(frozen=True)
class Task:
    """A model to train, and images with their classes that train it, choose its settings, and judge it."""

    make: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    choose: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    rates: tuple[float, ...]
    shares: tuple[float, ...]  # of the multiplications of the dense layers, descending
    step: float  # share that one cut saves
    trial: float  # and when settings are chosen
    lazy: bool = False
    augment: bool = False

    def cuts(self, model: nn.Module, step: float) -> list[Cut]:
        return truncate(model, self.shares[-1], lambda of: judged(self, of), step=step, lazy=self.lazy)

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.train[0]) // BATCH)


def digits(folder: Path) -> Task:
    data = np.load(next((folder / "mnist_subset").glob("*.npz")))
    x, y, last, answers = (torch.from_numpy(data[name]) for name in ("x_train", "y_train", "x_test", "y_test"))
    x, last = ((grey.flatten(1) / 255 - 0.13) / 0.31 for grey in (x, last))

    def make() -> nn.Module:
        layers = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        return nn.Sequential(*layers)

    parts = (x[:9000], y[:9000].long()), (x[9000:], y[9000:].long()), (last, answers.long())
    shares = (1.0, 0.5, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03)
    return Task(make, *parts, epochs=15, rates=(0.01, 0.03, 0.1), shares=shares, step=0.01, trial=0.2)


def cifar(folder: Path) -> Task:
    (x, y), test = splits(folder)
    parts = (x[:1750], y[:1750]), (x[1750:], y[1750:]), test
    shares = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    rates = (1e-3, 3e-3, 1e-2)
    make = functools.partial(already, folder, "resnet20")
    steps = {"step": 0.02, "trial": 0.02}  # no layer has more than a sixteenth of the multiplications
    return Task(make, *parts, epochs=10, rates=rates, shares=shares, **steps, lazy=True, augment=True)


TASKS = {"digits": digits, "cifar": cifar}


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless, the same for every method: each epoch shuffled; pictures flipped and shifted by up to four pixels."""
    source = torch.Generator().manual_seed(seed)
    x, y = task.train
    while True:
        for places in torch.randperm(len(x), generator=source).split(BATCH)[: len(x) // BATCH]:
            batch = x[places]
            if task.augment:
                flipped = torch.rand(len(batch), generator=source) < 0.5
                batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
                top, left = torch.randint(9, (2,), generator=source).tolist()
                batch = pad(batch, (4, 4, 4, 4))[..., top : top + 32, left : left + 32]
            yield batch, y[places]


def trained(task: Task, method: str, seed: int, rate: float, gp_lambda: float, steps: int) -> nn.Module:
    """A model with factors in order, ready to be cut: trained so, or written so after it was trained dense."""
    torch.manual_seed(seed)
    model = task.make()
    if method == "maestro":
        options = {"gp_lambda": gp_lambda, "shrink_steps": task.steps // task.epochs, "seed": seed}
        weft.reparametrise(model, "maestro", **options)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in itertools.islice(batches(task, seed), steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model if method == "maestro" else weft.reparametrise(model, "maestro")


@torch.no_grad()
def judged(task: Task, model: nn.Module) -> float:
    """The loss on the images that choose; the batch norms, if any, computed anew of some that train."""
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        recalibrate(model, task.train[0][:500].split(250))
    x, y = task.choose
    return float(cross_entropy(model(x), y))


def tried(task: Task, **how: Any) -> dict[str, Any]:
    """A setting of the grid, by the mean loss of its cuts; none where training diverged."""
    model = trained(task, **how, steps=task.steps // 4)
    try:
        cuts = task.cuts(model, task.trial)
    except weft.WeftError:
        return {"loss": None}
    return {"loss": float(np.mean([cut.loss for cut in cuts]))}


def finished(task: Task, **how: Any) -> dict[str, Any]:
    """A whole run: at each share the width of every layer, and which test images are classified right."""
    model = trained(task, **how, steps=task.steps)
    cuts = task.cuts(model, task.step)
    left = cuts[0].macs  # of a Maestro that has shrunk while it was trained
    found = {}
    for share in task.shares:
        cut = next(cut for cut in cuts if cut.macs <= share + 1e-9)
        small = shrink(copy.deepcopy(model), cut.widths)
        judged(task, small.eval())
        bits = np.packbits(right(small, *task.test).astype(bool))
        found[str(share)] = {"macs": cut.macs, "right": bits.tobytes().hex(), "widths": cut.widths}
    return {"left": left, "cuts": found}


# --- the whole study ------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """Those written whole."""
    lines = ROWS.read_text(encoding="utf-8").splitlines(keepends=True) if ROWS.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def once(run: Callable[..., dict[str, Any]], name: str, make: Callable[[], Task], **how: Any) -> dict[str, Any]:
    """The row of one run, from the file if it is there."""
    asked = {"phase": run.__name__, "task": name, **how}
    for row in rows():
        if all(row.get(key) == value for key, value in asked.items()):
            return row
    row = {**asked, **run(make(), **how)}
    write_text(ROWS, "".join(json.dumps(known) + "\n" for known in [*rows(), row]))
    print(", ".join(f"{key}={value}" for key, value in row.items() if key != "cuts"), file=sys.stderr, flush=True)
    return row


def chosen(name: str, make: Callable[[], Task], method: str) -> tuple[float, float]:
    """The learning rate and λ of a method: the best of the grid, which goes on where the best is at its edge."""
    rates, lambdas = list(make().rates), list(LAMBDAS) if method == "maestro" else [0.0]
    for _ in range(2 * EXTENDED):
        losses = {}
        for rate, gp_lambda in itertools.product(rates, lambdas):
            row = once(tried, name, make, method=method, seed=0, rate=rate, gp_lambda=gp_lambda)
            losses[rate, gp_lambda] = math.inf if row["loss"] is None else row["loss"]
        best = min(losses, key=lambda at: losses[at])
        wider = [extended(rates, best[0], 3), extended(lambdas, best[1], 10)]
        if wider == [rates, lambdas]:
            break
        rates, lambdas = wider
    return best


def extended(grid: list[float], best: float, factor: int) -> list[float]:
    """The grid, with one more value beyond the edge at which the best one is."""
    if len(grid) == 1 or best not in (min(grid), max(grid)):
        return grid
    return sorted([*grid, float(f"{best / factor if best == min(grid) else best * factor:.3g}")])


def marks(row: dict[str, Any], share: str, count: int) -> np.ndarray:
    packed = np.frombuffer(bytes.fromhex(row["cuts"][share]["right"]), np.uint8)
    return np.unpackbits(packed)[:count].astype(float)


def accuracies() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """By task, share and way of training, how often each test image was classified right; of finished tasks."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, count in (("digits", 2000), ("cifar", 1000)):
        by = runs(name)
        if all(len(mine) == len(SEEDS) for mine in by.values()):
            found[name] = {
                share: {how: np.mean([marks(row, share, count) for row in mine], 0) for how, mine in by.items()}
                for share in by["dense"][0]["cuts"]
            }
    return found


def runs(name: str) -> dict[str, list[dict[str, Any]]]:
    """The whole runs of a task, by how they were trained."""
    mine = [row for row in rows() if row["phase"] == "finished" and row["task"] == name]
    return {how: [row for row in mine if row["method"] == how] for how in ("dense", "maestro")}


def table() -> Iterator[str]:
    for name, curves in accuracies().items():
        by = runs(name)
        left = ", ".join(f"{row['left']:.2f}" for row in by["maestro"])
        settings = "; ".join(f"{how} at rate {by[how][0]['rate']:g}" for how in by)
        yield f"\n{name}: {settings}, λ {by['maestro'][0]['gp_lambda']:g}; trained, Maestro is left with {left}\n"
        yield "| multiplications | dense, then SVD | Maestro | Maestro − SVD | |\n| --- | --- | --- | --- | --- |"
        for share, each in curves.items():
            low, high = interval(each["maestro"] - each["dense"])
            word = "Maestro" if low > 0 else "SVD" if high < 0 else "tie"
            shown = " | ".join(f"{each[how].mean():.1%}" for how in by)
            apart = f"{(each['maestro'] - each['dense']).mean():+.1%} ({low:+.1%} to {high:+.1%})".replace("-", "−")
            yield f"| {share} | {shown} | {apart} | {word} |"


def draw() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "weft", "font.family": "sans-serif", "font.size": 9}
    from matplotlib import pyplot as plt

    found = accuracies()
    figure, cells = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3), squeeze=False)
    looks = {"dense": ("trained dense, then SVD", "#8a8a8a", "s"), "maestro": ("Maestro", "#1f5f8b", "o")}
    for cell, (name, curves) in zip(cells[0], found.items()):
        for how, (label, colour, mark) in looks.items():
            means = [100 * each[how].mean() for each in curves.values()]
            cell.plot([float(share) for share in curves], means, marker=mark, ms=4, color=colour, label=label)
        cell.set(title=name, xlabel="multiplications, % of the dense layers'", xscale="log")
        cell.set_xticks([float(share) for share in curves], [f"{100 * float(share):g}" for share in curves])
        cell.minorticks_off()
        cell.spines[["top", "right"]].set_visible(False)
        cell.grid(alpha=0.25)
    cells[0][0].set_ylabel("test accuracy, %")
    cells[0][0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--task", choices=TASKS, help="one of the two alone")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if args.data_dir is None and not args.draw:
        parser.error("--data-dir says where the images are")
    for name in [args.task] if args.task else TASKS if not args.draw else ():
        kept: list[Task] = []

        def make(name: str = name, kept: list[Task] = kept) -> Task:
            kept[:] = kept or [TASKS[name](args.data_dir)]
            return kept[0]

        for method in ("dense", "maestro"):
            rate, gp_lambda = chosen(name, make, method)
            for seed in SEEDS:
                once(finished, name, make, method=method, seed=seed, rate=rate, gp_lambda=gp_lambda)
    print("\n".join(table()))
    if args.draw:
        draw()


if __name__ == "__main__":
    main()
