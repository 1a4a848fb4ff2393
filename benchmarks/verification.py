"""PETALface on faces: a network that others trained, adapted to images of low resolution without forgetting good ones.

    python benchmarks/verification.py --data-dir DIR     results/verification/faces.jsonl, a line a run; resumes
    python benchmarks/verification.py --table            prints the table and the verdicts of what is there

DIR holds models/mobilefacenet and orl_faces (see faces.py). People 0 to 15 train, 16 to 19 choose the learning rate, 20
to 39 test. Each photograph is there twice: as it is, "clean", and "low": reduced to 16 × 14 pixels and enlarged again,
bilinearly. Training sees both, half and half, mirrored or not.

    base                    the network as it came. To train a head alone leaves the embedding as it is: the same row
    full                    all of it, the statistics of its batch norms too
    lora                    PEFT's LoRA of rank 8 on all convolutions of 1 × 1
    petalface, sharpness    two of rank 4 on the same, as many parameters, weighed by weft's sharpness score
    petalface, brisque      by BRISQUE, where piq is installed

All that is trained takes the same steps on the same images, by CosFace over the training people; the centres start as
the means of the base's embeddings, so that the few steps are not spent on finding them. Of four learning rates that
with the least loss on the validation people counts (weft's own: see weft.run.verification), chosen with seed 0; then
three seeds. Scored are pairs of two clean photographs, of two low ones, and of a clean and a low one that are not the
same photograph: TAR at FAR 1e-2, AUC, and rank-1 identification by the first photograph of each person. Intervals are
of 95 %, by bootstrap over the test people, the same draws for all, of means over seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faces
import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from trp import Rows

import weft
from weft.adapters.petalface import brisque, sharpness
from weft.run.verification import MarginHead, margin_loss, pairs, rates

OUT = Path(__file__).parent / "results" / "verification" / "faces.jsonl"
KINDS = ("clean-clean", "low-low", "clean-low")
SCORES = ("tar", "auc", "rank1")
FAR = 1e-2
BASE, FULL, LORA, SHARP, BRISQUE = "base", "full", "lora", "petalface, sharpness", "petalface, brisque"
RATES = {FULL: (1e-4, 3e-4, 1e-3, 3e-3), **dict.fromkeys((LORA, SHARP, BRISQUE), (1e-3, 3e-3, 1e-2, 3e-2))}
JUDGES = {SHARP: sharpness, BRISQUE: lambda x: brisque(x, 127.5 / 255, 128 / 255)}
RANK = 8  # of the one LoRA; each branch of petalface has half


# --- data -------------------------------------------------------------------------------------------------------------


def low(x: Tensor) -> Tensor:
    """What is left of photographs after 16 × 14 pixels."""
    small = interpolate(x, (16, 14), mode="bilinear", antialias=True)
    return interpolate(small, x.shape[2:], mode="bilinear")


class Faces:
    """Photographs, clean and low, of people to train on, to choose by and to test on."""

    def __init__(self, folder: Path) -> None:
        (x, y), test = faces.splits(folder)
        self.train, self.choose, self.test = (x[y < 16], y[y < 16]), (x[y >= 16], y[y >= 16]), test


def batches(x: Tensor, y: Tensor, steps: int, size: int, seed: int) -> Any:
    """Clean and low photographs in a drawn order, mirrored or not: of (seed, step) alone."""
    draw = torch.Generator().manual_seed(seed)
    both, whose = torch.cat([x, low(x)]), torch.cat([y, y])
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(both), generator=draw)])
        rows, order = order[:size], order[size:]
        mirrored = (torch.rand(size, generator=draw) < 0.5)[:, None, None, None]
        yield torch.where(mirrored, both[rows].flip(3), both[rows]), whose[rows]


# --- training ---------------------------------------------------------------------------------------------------------


def adapted(arm: str, base: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """The network as an arm trains it."""
    torch.manual_seed(seed)
    if arm == FULL:
        return base.train().requires_grad_(True)
    modules = [name for name, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    if arm == LORA:
        return peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules)).eval()
    judge = JUDGES[arm]
    found = torch.cat([judge(part) for part in torch.cat([x, low(x)]).split(64)])
    ends = [float(found.quantile(share)) for share in (0.05, 0.95)]  # as `weft adapt --quality` takes them
    worst, best = ends if arm == SHARP else ends[::-1]
    config = weft.PetalfaceConfig(r=RANK // 2, target_modules=modules, best=best, worst=worst)
    return peft.get_peft_model(base, weft.prepare(base, config, quality=judge)).eval()


def train(arm: str, folder: Path, data: Faces, rate: float, seed: int, settings: dict[str, Any]) -> nn.Module:
    """The network, in evaluation."""
    base = faces.trained(folder).to(memory_format=torch.channels_last)
    x, y = data.train
    means = embed(base, x) + embed(base, low(x))
    head = MarginHead(means.shape[1], 16).train()
    head.scale, head.margin = settings["scale"], settings["margin"]
    with torch.no_grad():
        head.centres.copy_(normalize(torch.stack([means[y == person].mean(0) for person in range(16)])) * 0.1)
    model = adapted(arm, base, x, seed)
    learned = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer, steps = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0), settings["steps"]
    warm = max(1, steps // 10)
    for step, (images, people) in enumerate(batches(x, y, steps, settings["batch_size"], seed)):
        share = min((step + 1) / warm, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.zero_grad()
        features = model(images.contiguous(memory_format=torch.channels_last))
        margin_loss(head, {"logits": head(features)}, people).backward()
        nn.utils.clip_grad_norm_(learned, 5.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def embed(model: nn.Module, x: Tensor) -> Tensor:
    """Embeddings of length 1: images × 128."""
    return torch.cat([normalize(model(part.contiguous(memory_format=torch.channels_last))) for part in x.split(50)])


# --- scores -----------------------------------------------------------------------------------------------------------


class Pairs:
    """The scores of two lots of the same photographs, most alike first, to be weighed person by person."""

    def __init__(self, gallery: np.ndarray, probes: np.ndarray, y: np.ndarray, ordered: bool) -> None:
        self.y, self.cosines = y, gallery @ probes.T
        rows, columns = np.nonzero(~np.eye(len(y), dtype=bool) if ordered else np.triu(np.ones((len(y),) * 2), 1))
        order = np.argsort(-self.cosines[rows, columns], kind="stable")
        self.scores = self.cosines[rows, columns][order]
        self.one, self.other = y[rows][order], y[columns][order]
        self.genuine = self.one == self.other
        self.first = np.unique(y, return_index=True)[1]

    def weighed(self, weights: np.ndarray) -> tuple[float, float, float]:
        """TAR, AUC and rank-1 where each person counts so often; copies of a person are no impostors of each other."""
        pair = np.where(self.genuine, weights[self.one], weights[self.one] * weights[self.other])
        own, others = (np.cumsum(pair * mask) for mask in (self.genuine, ~self.genuine))
        own, others = own / own[-1], others / others[-1]
        tar = own[others <= FAR].max(initial=0.0)
        area = float((own * np.diff(others, prepend=0.0)).sum())
        here = self.first[weights > 0]
        probes = np.setdiff1d(np.arange(len(self.y)), self.first)
        right = self.y[here][self.cosines[np.ix_(here, probes)].argmax(0)] == self.y[probes]
        share = weights[self.y[probes]]
        return float(tar), area, float((right * share).sum() / share.sum())


def scored(model: nn.Module, data: Faces, draws: int) -> dict[str, Any]:
    """What a run's row holds: the loss on validation people, scores on test people, and the same of every draw."""
    x, y = data.choose
    both = torch.cat([embed(model, x), embed(model, low(x))]).numpy()
    loss = rates(*pairs(both, torch.cat([y, y]).numpy()))["loss"]
    clean, poor = (embed(model, part).numpy() for part in (data.test[0], low(data.test[0])))
    people = data.test[1].numpy() - int(data.test[1].min())
    count = int(people.max()) + 1
    picked = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=draws)
    found: dict[str, Any] = {"validation": loss, "draws": {}}
    for kind, (one, other) in zip(KINDS, ((clean, clean), (poor, poor), (clean, poor)), strict=True):
        lots = Pairs(one, other, people, ordered=kind == "clean-low")
        found[kind] = dict(zip(SCORES, lots.weighed(np.ones(count)), strict=True))
        known = rates(lots.scores, lots.genuine)
        for name, score in (("auc", "auc"), ("tar_at_far_0.01", "tar")):  # as scikit-learn's curve has them
            assert abs(known[name] - found[kind][score]) < 1e-4, (kind, name)
        found[kind]["eer"] = known["eer"]
        found["draws"][kind] = np.round([lots.weighed(each.astype(float)) for each in picked], 4).T.tolist()
    return found


# --- the study --------------------------------------------------------------------------------------------------------


def arms() -> list[str]:
    return [FULL, LORA, SHARP] + [BRISQUE] * (importlib.util.find_spec("piq") is not None)


def study(args: argparse.Namespace, rows: Rows) -> None:
    """Take the runs that are not there yet."""
    data = Faces(args.data_dir)

    def run(arm: str, rate: float, seed: int) -> dict[str, Any]:
        print(f"{arm}, learning rate {rate:g}, seed {seed}", flush=True)
        if arm == BASE:
            return scored(faces.trained(args.data_dir), data, args.draws) | {"trained": 0}
        model = train(arm, args.data_dir, data, rate, seed, rows.settings)
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return scored(model, data, args.draws) | {"trained": counted}

    rows.row(run, arm=BASE, rate=0.0, seed=0)
    for arm in arms():
        tried = {rate: rows.row(run, arm=arm, rate=rate, seed=0)["validation"] for rate in RATES[arm]}
        best = min(tried, key=lambda rate: tried[rate])
        for seed in range(1, args.seeds):
            rows.row(run, arm=arm, rate=best, seed=seed)


def chosen(rows: Rows, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of every arm at its best learning rate, for arms that are finished."""
    mine = [row for row in rows.rows if row["settings"] == rows.settings]
    found = {BASE: [row for row in mine if row["arm"] == BASE]}
    for arm, tried in RATES.items():
        first = {row["rate"]: row for row in mine if row["arm"] == arm and row["seed"] == 0}
        if set(first) >= set(tried):
            best = min(tried, key=lambda rate: first[rate]["validation"])
            found[arm] = [row for row in mine if (row["arm"], row["rate"]) == (arm, best) and row["seed"] < seeds]
    return {arm: part for arm, part in found.items() if part}


def gap(one: list[dict[str, Any]], other: list[dict[str, Any]], kind: str, score: str) -> tuple[float, float, float]:
    """By how much one arm scores more, and the 95 % interval of that."""

    def draws(part: list[dict[str, Any]]) -> np.ndarray:
        return np.mean([row["draws"][kind][SCORES.index(score)] for row in part], 0)

    apart = np.mean([row[kind][score] for row in one]) - np.mean([row[kind][score] for row in other])
    low_end, high_end = np.quantile(draws(one) - draws(other), (0.025, 0.975))
    return float(apart), float(low_end), float(high_end)


def claims(found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str, tuple[float, float, float]]]:
    """What the paper says of finished arms: a claim, the word for it, and by how much the first scores more."""
    judged = [arm for arm in (SHARP, BRISQUE) if arm in found]
    pairs = [(arm, LORA, "clean-low") for arm in judged]
    pairs += [(arm, FULL, "clean-clean") for arm in (LORA, *judged)]
    for one, other, kind in pairs:
        if one not in found or other not in found:
            continue
        for score, name in (("tar", "TAR"), ("auc", "AUC")):
            apart = gap(found[one], found[other], kind, score)
            word = "holds" if apart[1] > 0 else "reversed" if apart[2] < 0 else "tie"
            yield f"{one} above {other} on {kind} pairs, {name}", word, apart


def table(rows: Rows, seeds: int) -> None:
    """Every arm's scores, and what became of the claims."""
    found = chosen(rows, seeds)
    heads = [f"{kind}: {name}" for kind in KINDS for name in ("TAR", "AUC", "rank-1")]
    print("| | trained | rate | seeds | " + " | ".join(heads) + " |\n| --- " + "| --- " * 12 + "|")
    for arm, part in found.items():
        cells = [f"{np.mean([row[kind][score] for row in part]):.3f}" for kind in KINDS for score in SCORES]
        print(f"| {arm} | {part[0]['trained']:,} | {part[0]['rate']:g} | {len(part)} | " + " | ".join(cells) + " |")
    print()
    for claim, word, (apart, low_end, high_end) in claims(found):
        print(f"- {claim}: {apart:+.3f} ({low_end:+.3f} to {high_end:+.3f}): {word}".replace("-0.", "−0."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the folder of weights and photographs")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scale", type=float, default=16.0)
    parser.add_argument("--margin", type=float, default=0.4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of rows")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "scale", "margin", "draws")}
    rows = Rows(args.out, {**settings, "loss": "cosface", "rank": RANK})
    if not args.table:
        if args.data_dir is None:
            parser.error("--data-dir is missing")
        study(args, rows)
    table(rows, args.seeds)


if __name__ == "__main__":
    main()
