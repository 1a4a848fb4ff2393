"""TRP beside what it is to beat, at equal operations: a trained ResNet-20 on CIFAR-10, and digits from the start.

    python benchmarks/trp.py --data-dir DIR     results/trp/resnet20.jsonl, a line a run; what is there is not run again
    python benchmarks/trp.py --digits           results/trp/digits.jsonl

DIR holds models/resnet_cifar10 and cifar10_subset. ResNet-20, which others trained, is trained further on 2000 of its
own training images, shifted and mirrored, and decomposed to half of its multiplications in each of the three forms:

    cut                 without any training
    cut, then trained   decomposed first; then its factors are trained
    trained, then cut   plain training, then decomposed
    nuclear, then cut   with the nuclear norm's sub-gradient in every fifth step
    trp, then cut       and with cuts in the same steps

All that are trained take the same steps on the same images: SGD with momentum, the rate falling to 0 by a cosine. The
last cut keeps one share of the energy of every layer, the largest at which half of the multiplications suffice, and
nothing is trained or computed anew after it. What TRP's own cuts keep, --energy, is a guess at what brings the model to
about half as well. 1000 test images are classified; intervals are of 95 %, by bootstrap over images of the difference
to "cut, then trained", each image's outcomes averaged over three seeds.

--digits: scikit-learn's digits, an MLP of two hidden layers of 64 from random weights, 30 epochs of AdamW, then both
cut to one rank: plain, nuclear and trp, five seeds each. Nothing is tuned afterwards.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import processor
from claims.ledger import interval
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import weft
from weft.files import write_text
from weft.linear._structured import Structured
from weft.pretrain.trp import decompose
from weft.run.compare import commit

RESULTS = Path(__file__).parent / "results" / "trp"
FORMS = ("nc", "vh", "nd")
AFTER = ("trained, then cut", "nuclear, then cut", "trp, then cut")
BASELINE = "cut, then trained"
BLOCKS = r"layer\d\.\d\.conv\d"  # all convolutions but the first
UNSTRIDED = r"layer1\..*conv\d|layer\d\.[12]\.conv\d|layer\d\.0\.conv2"  # what nc and vh decompose
PERIOD, LAMBDA = 5, 3e-4


class Rows:
    """The lines of a file, each of one run with its settings; a run that is there is not taken again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        self.rows = [json.loads(line) for line in lines if line.endswith("\n")]  # not one under way when it was killed

    def row(self, run: Callable[..., dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The row of a run, which is taken, by `run(**key)`, where it is not there."""
        wanted = {**key, "settings": self.settings}
        for row in self.rows:
            if wanted.items() <= row.items():
                return row
        made = {"device": processor(), "commit": commit(), "versions": {"torch": torch.__version__}}
        self.rows.append({**wanted, **run(**key), **made})
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        return self.rows[-1]


# --- ResNet-20 --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def operations(model: nn.Module) -> int:
    """Multiplications of the convolutions and linear layers, for one image."""
    total = 0

    def count(layer: Any, inputs: Any, y: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * (y[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1)

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and not isinstance(m, Structured)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    training = model.training
    model.eval()(torch.zeros(1, 3, 32, 32))
    model.train(training)
    for handle in handles:
        handle.remove()
    return total


def modules(form: str) -> str:
    """What is decomposed."""
    return BLOCKS if form == "nd" else UNSTRIDED


def halved(model: nn.Module, form: Any, most: float) -> tuple[nn.Module, float]:
    """The model, decomposed by the largest share of energy that leaves so many multiplications at most; the share."""
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(12):
        share = (low + high) / 2
        small = decompose(copy.deepcopy(model), form, final_energy=share, target_modules=modules(form))
        low, high = (share, high) if operations(small) <= most else (low, share)
        best = small if low == share else best
    if best is None:
        raise SystemExit(f"{form}: no cut leaves {most:.0f} multiplications")
    return best, low


def batches(x: Tensor, y: Tensor, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in a drawn order, each image shifted by up to 4 places and mirrored or not: of (seed, step) alone."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(x), generator=draw)])
        rows, order = order[:size], order[size:]
        shifts = torch.randint(0, 9, (size, 2), generator=draw).tolist()
        mirrored = (torch.rand(size, generator=draw) < 0.5)[:, None, None, None]
        wide = pad(x[rows], (4, 4, 4, 4))
        found = torch.stack([image[:, i : i + 32, j : j + 32] for image, (i, j) in zip(wide, shifts)])
        yield torch.where(mirrored, found.flip(3), found), y[rows].long()


def train(model: nn.Module, data: tuple[Tensor, Tensor], seed: int, settings: dict[str, Any]) -> nn.Module:
    """Train all of a model; the model, in evaluation."""
    steps, rate = settings["steps"], settings["learning_rate"]
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    for step, (x, y) in enumerate(batches(*data, steps, settings["batch_size"], seed)):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def ruled(arm: str, model: nn.Module, form: str, energy: float) -> nn.Module:
    """A model on which TRP acts, or its nuclear norm alone."""
    options: dict[str, Any] = {"form": form, "period": PERIOD, "nuclear_lambda": LAMBDA, "energy": energy}
    return weft.reparametrise(model, "trp", truncation=arm.startswith("trp"), target_modules=BLOCKS, **options)


def resnet(args: argparse.Namespace) -> None:
    import cifar

    data, test = cifar.splits(args.data_dir)
    if args.images:
        data, test = (tuple(t[: args.images] for t in part) for part in (data, test))
    dense = cifar.trained(args.data_dir, "resnet20")
    whole = operations(dense)
    settings = {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    settings |= {"energy": args.energy, "period": PERIOD, "lambda": LAMBDA, "images": len(test[0])}
    rows = Rows(args.out or RESULTS / "resnet20.jsonl", settings)

    def outcome(model: nn.Module, share: float | None = None) -> dict[str, Any]:
        found = cifar.right(model, *test)
        made = {"accuracy": float(found.mean()), "wrong": np.flatnonzero(found == 0).tolist(), "energy": share}
        print(f"  {found.mean():.1%}", flush=True)
        return {**made, "operations": operations(model) / whole}

    @functools.cache
    def plainly(seed: int) -> nn.Module:  # the same for all forms
        return train(copy.deepcopy(dense), data, seed, settings)

    def run(form: str, arm: str, seed: int) -> dict[str, Any]:
        print(f"{form} {arm}, seed {seed}", flush=True)
        if arm == "dense":
            return outcome(dense)
        if arm == BASELINE:
            small, share = halved(dense, form, whole / 2)
            return outcome(train(small, data, seed, settings), share)
        if arm == "cut":
            model = dense
        elif arm == "trained, then cut":
            model = plainly(seed)
        else:
            model = train(ruled(arm, copy.deepcopy(dense), form, args.energy), data, seed, settings)
        low = decompose(copy.deepcopy(model), form, final_energy=0.999, target_modules=modules(form))
        return outcome(*halved(model, form, whole / 2)) | {"operations_at_0.999": operations(low) / whole}

    rows.row(run, form="", arm="dense", seed=0)
    for seed in range(args.seeds):
        for form in FORMS:
            for arm in ("cut", BASELINE, *AFTER) if seed == 0 else (BASELINE, *AFTER):
                rows.row(run, form=form, arm=arm, seed=seed)
    table(rows, args.seeds)


def outcomes(rows: list[dict[str, Any]], form: str, arm: str) -> np.ndarray:
    """Whether each test image is classified right, of every seed: seeds × images."""
    mine = [row for row in rows if (row["form"], row["arm"]) == (form, arm)]
    return np.array([~np.isin(np.arange(row["settings"]["images"]), row["wrong"]) for row in mine], float)


def table(rows: Rows, seeds: int) -> None:
    """Accuracies, and what each arm has more than the model that was decomposed first."""
    mine = [row for row in rows.rows if row["settings"] == rows.settings and row["seed"] < seeds]
    print(f"\ndense: {outcomes(mine, '', 'dense').mean():.1%}\n")
    print("| form | | right | of each seed | operations | more than decomposed first |\n| --- " + "| --- " * 5 + "|")
    for form in FORMS:
        other = outcomes(mine, form, BASELINE).mean(0)
        for arm in ("cut", BASELINE, *AFTER):
            found = outcomes(mine, form, arm)
            apart = found.mean(0) - other
            low, high = interval(apart)
            more = "" if arm == BASELINE else f"{apart.mean():+.1%} ({low:+.1%} to {high:+.1%})".replace("-", "−")
            each = ", ".join(f"{seed:.1%}" for seed in found.mean(1))
            taken = np.mean([row["operations"] for row in mine if (row["form"], row["arm"]) == (form, arm)])
            print(f"| {form} | {arm} | {found.mean():.1%} | {each} | {taken:.2f} | {more} |")


# --- digits -----------------------------------------------------------------------------------------------------------


def digits(args: argparse.Namespace) -> None:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(each) for each in load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, rest = order[:500], order[500:]
    settings = {"epochs": args.epochs, "learning_rate": 3e-3, "batch_size": 64, "energy": 0.9}
    settings |= {"period": PERIOD, "lambda": LAMBDA}
    rows = Rows(args.out or RESULTS / "digits.jsonl", settings)
    ranks, inner = (4, 6, 8, 12), ["0.0", "1.0"]

    def run(arm: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        hidden = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)]
        model = nn.Sequential(*hidden, nn.Sequential(nn.Linear(64, 10)))
        if arm != "plain":
            options = {"period": PERIOD, "nuclear_lambda": LAMBDA, "energy": settings["energy"]}
            weft.reparametrise(model, "trp", truncation=arm == "trp", target_modules=inner, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"])
        draw = torch.Generator().manual_seed(seed)
        for _ in range(args.epochs):
            for part in rest[torch.randperm(len(rest), generator=draw)].split(settings["batch_size"]):
                optimizer.zero_grad()
                cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()

        def right(of: nn.Module) -> float:
            return float((of.eval()(x[test]).argmax(1) == y[test]).float().mean())

        limits: dict[str, Any] = {"threshold": 0.0, "target_modules": inner}
        cuts = {str(rank): right(decompose(copy.deepcopy(model), rank=rank, **limits)) for rank in ranks}
        return {"whole": right(model), **cuts}

    arms, found = ("plain", "nuclear", "trp"), {}
    for arm in arms:
        made = [rows.row(run, arm=arm, seed=seed) for seed in range(args.seeds)]
        found[arm] = {key: np.array([row[key] for row in made]) for key in ("whole", *map(str, ranks))}
    print("| rank | " + " | ".join(arms) + " | trp − nuclear | nuclear − plain |\n| --- " + "| --- " * 5 + "|")
    for key in ("whole", *map(str, ranks)):
        gaps = [found[one][key] - found[other][key] for one, other in (("trp", "nuclear"), ("nuclear", "plain"))]
        said = [f"{gap.mean():+.1%} ({low:+.1%} to {high:+.1%})" for gap in gaps for low, high in [interval(gap)]]
        cells = [f"{found[arm][key].mean():.1%}" for arm in arms] + said
        print(f"| {key} | " + " | ".join(cells).replace("-", "−") + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the folder of weights and images")
    parser.add_argument("--digits", action="store_true", help="the MLP on digits instead")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--energy", type=float, default=0.95, help="what a cut of TRP keeps while ResNet-20 trains")
    parser.add_argument("--epochs", type=int, default=30, help="of the digits")
    parser.add_argument("--seeds", type=int, help="3, and 5 of the digits")
    parser.add_argument("--images", type=int, help="of each split; all if not given")
    parser.add_argument("--out", type=Path, help="the file of rows")
    args = parser.parse_args()
    args.seeds = args.seeds or (5 if args.digits else 3)
    if args.digits:
        digits(args)
    elif args.data_dir is None:
        parser.error("--data-dir is missing")
    else:
        resnet(args)


if __name__ == "__main__":
    main()
