"""SST in graph networks, Euclidean and hyperbolic: links and classes of nodes, beside full training.

    python benchmarks/sst_graphs.py --data-dir DIR      results/sst/graphs.jsonl, and the tables; killed, it goes on
    python benchmarks/sst_graphs.py --tables            the tables alone, from the file

DIR holds graphs/ with disease_lp.npz, airport.npz and cora.npz. Two layers of width 64 (and a time, in the hyperbolic
network), each a linear map and the mean over a node and its neighbours: with a ReLU between them, or Lorentz layers
with the Lorentzian centroid for a mean. SST has r = 8, an eighth, in both layers. 300 full-batch steps of AdamW without
decay, a tenth of them warm-up, then a cosine; rates around 1e-2, chosen on the validation loss. Seeds draw splits
(Cora's labels have the customary one), weights, and pairs that are no links.

    links   85 % of the edges train, 5 % validate, 10 % test, beside as many pairs that are none; probabilities are
            sigmoid(2 − d²) of the nodes' distance d; AUC
    nodes   30, 10 and 60 % of disease_lp's nodes, 70, 15 and 15 % of airport's; a linear head, or one Lorentzian
            distance a class; accuracy and macro F1

Airport's features have its degree (of the edges that train) added to them, as is usual. Distances, exponential maps and
inner products are geoopt's (`pip install weft[hyperbolic]`). The intervals are of a paired bootstrap over test rows and
seeds. About 20 minutes of two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
from adapters import processor
from ctr import auc
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, relu
from transformers import TrainingArguments

import weft
from weft.run.compare import commit

WIDTH, RANK = 64, 8
STEPS, RATE = 300, 1e-2
OUT = arms.RESULTS / "sst" / "graphs.jsonl"
SST = {"rank": RANK, "iteration_steps": 20, "restart_warmup": 4}
PARTS = ("train", "validation", "test")
SHARES = {"disease_lp": (0.3, 0.1), "airport": (0.7, 0.15)}  # of nodes: train, validation
PROBLEMS = [f"{data} {task}" for data in ("disease_lp", "airport", "cora") for task in ("links", "nodes")]
ARMS = [f"{space} {form}" for space in ("Euclidean", "hyperbolic") for form in ("full", "sst")]
PAIRS = [
    ("Euclidean sst", "Euclidean full"),
    ("hyperbolic sst", "hyperbolic full"),
    ("hyperbolic full", "Euclidean full"),
    ("hyperbolic sst", "Euclidean sst"),
]

# --- the data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A graph and what is asked of it.

    Attributes:
        features: nodes × features.
        neighbours: nodes × nodes, sparse: the mean over a node and its neighbours.
        classes: how many; 0 where links are asked for.
        items, targets: of "train", "validation" and "test": pairs of nodes (n × 2) and 1 where they are linked, or
            nodes (n) and their classes. Links train on pairs that are linked alone; others are drawn every step.
    """

    features: Tensor
    neighbours: Tensor
    classes: int
    items: dict[str, Tensor]
    targets: dict[str, Tensor]


def load(folder: Path, name: str, seed: int) -> Problem:
    data, task = name.split()
    with np.load(folder / "graphs" / f"{data}.npz") as file:
        stored = dict(file)
    edges, labels = torch.from_numpy(stored["edges"]).long(), torch.from_numpy(stored["labels"]).long()
    draw = np.random.default_rng([seed, 1])
    if task == "links":
        parts = split(len(edges), (0.85, 0.05), draw)
        items, targets = {}, {}
        for part, chosen in parts.items():
            linked = edges[chosen]
            others = unlinked(edges, len(labels), 0 if part == "train" else len(linked), draw)
            items[part] = torch.cat([linked, others])
            targets[part] = torch.cat([torch.ones(len(linked)), torch.zeros(len(others))])
        edges = items["train"]
    else:
        if data == "cora":
            names = zip(PARTS, ("idx_train", "idx_val", "idx_test"))
            items = {part: torch.from_numpy(stored[name]) for part, name in names}
        else:
            items = split(len(labels), SHARES[data], draw)
        targets = {part: labels[chosen] for part, chosen in items.items()}
    classes = 0 if task == "links" else int(labels.max()) + 1
    return Problem(features_of(data, stored, edges), means(edges, len(labels)), classes, items, targets)


def split(count: int, shares: tuple[float, float], draw: np.random.Generator) -> dict[str, Tensor]:
    first, second = round(shares[0] * count), round(sum(shares) * count)
    return dict(zip(PARTS, map(torch.from_numpy, np.split(draw.permutation(count), (first, second)))))


def unlinked(edges: Tensor, nodes: int, count: int, draw: np.random.Generator) -> Tensor:
    """Distinct pairs without an edge."""
    known = {frozenset(pair) for pair in edges.tolist()}
    found: list[tuple[int, int]] = []
    while len(found) < count:
        pair = tuple(draw.integers(nodes, size=2).tolist())
        if pair[0] != pair[1] and frozenset(pair) not in known:
            known.add(frozenset(pair))
            found.append(pair)
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def features_of(data: str, stored: dict[str, np.ndarray], edges: Tensor) -> Tensor:
    if data == "cora":  # which words occur; a row sums to 1
        words = torch.zeros(int(stored["n_nodes"]), int(stored["n_feats"]))
        words[torch.from_numpy(stored["feat_row"]).long(), torch.from_numpy(stored["feat_col"]).long()] = 1
        return words / words.sum(1, keepdim=True)
    found = torch.from_numpy(stored["features"])
    if data == "airport":
        degree = torch.bincount(edges.flatten(), minlength=len(found)).clamp(max=5)
        found = torch.cat([found, nn.functional.one_hot(degree, 6), torch.ones(len(found), 1)], 1)
    return found


def means(edges: Tensor, nodes: int) -> Tensor:
    itself = torch.arange(nodes).expand(2, -1)
    places = torch.cat([edges.mT, edges.mT.flip(0), itself], 1)
    share = 1 / torch.bincount(places[0], minlength=nodes)[places[0]].float()
    return torch.sparse_coo_tensor(places, share, (nodes, nodes)).coalesce().to_sparse_csr()


# --- the networks -----------------------------------------------------------------------------------------------------


class Euclidean(nn.Module):
    """Linear maps and means."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b)) for a, b in pairwise((features, WIDTH, WIDTH)))
        self.head = nn.Linear(WIDTH, classes) if classes else None

    def forward(self, problem: Problem) -> Tensor:
        """What is known of every node."""
        first, second = self.layers
        h = relu(problem.neighbours @ first(problem.features))
        return problem.neighbours @ second(h)

    def logits(self, h: Tensor, nodes: Tensor) -> Tensor:
        return self.head(h[nodes])

    def squared(self, h: Tensor, pairs: Tensor) -> Tensor:
        """Squared distances."""
        return (h[pairs[:, 0]] - h[pairs[:, 1]]).square().sum(-1)


class Hyperbolic(nn.Module):
    """Lorentz layers and centroids; the Lorentz layer is a nonlinear map by itself."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.space = geometry()
        sizes = (features + 1, WIDTH + 1, WIDTH + 1)
        self.layers = nn.ModuleList(weft.LorentzLinear(a, b) for a, b in pairwise(sizes))
        if classes:  # a point a class, by where a tangent at the origin leads
            self.classes = nn.Parameter(torch.randn(classes, WIDTH) / WIDTH**0.5)
            self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, problem: Problem) -> Tensor:
        h = self.point(problem.features)
        for layer in self.layers:
            h = problem.neighbours @ layer(h)
            h = h / (-self.space.inner(None, h, keepdim=True)).sqrt()
        return h

    def point(self, tangent: Tensor) -> Tensor:
        return self.space.expmap0(nn.functional.pad(tangent, (1, 0)))

    def logits(self, h: Tensor, nodes: Tensor) -> Tensor:
        """Less the squared Lorentzian distances, ‖x − c‖² = −2 − 2·⟨x, c⟩."""
        return 2 + 2 * self.space.inner(None, h[nodes, None], self.point(self.classes)) + self.bias

    def squared(self, h: Tensor, pairs: Tensor) -> Tensor:
        return self.space.dist(h[pairs[:, 0]], h[pairs[:, 1]]).square()


def geometry() -> Any:
    try:
        import geoopt
    except ImportError:
        sys.exit("benchmarks/sst_graphs.py needs the extra `weft[hyperbolic]`: pip install 'weft[hyperbolic]'")
    return geoopt.Lorentz()


def built(arm: str, problem: Problem, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    kind, form = arm.split()
    make = Euclidean if kind == "Euclidean" else Hyperbolic
    model = make(problem.features.shape[1], problem.classes)
    return weft.reparametrise(model, "sst", seed=seed, **SST) if form == "sst" else model


def outputs(model: Any, problem: Problem, items: Tensor) -> Tensor:
    h = model(problem)
    return model.logits(h, items) if problem.classes else 2 - model.squared(h, items)


def loss(found: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(found, targets) if found.dim() > 1 else binary_cross_entropy_with_logits(found, targets)


def train(model: nn.Module, problem: Problem, rate: float, steps: int, seed: int) -> None:
    args = TrainingArguments(
        output_dir="unused", report_to="none", use_cpu=True, learning_rate=rate, weight_decay=0.0, max_steps=steps,
        warmup_steps=steps // 10, lr_scheduler_type="cosine",
    )  # fmt: skip
    optimizer, scheduler = weft.optimizer_and_scheduler(model.train(), args)
    draw = torch.Generator().manual_seed(seed)
    items, targets = problem.items["train"], problem.targets["train"]
    for _ in range(steps):
        if not problem.classes:
            others = torch.randint(len(problem.features), problem.items["train"].shape, generator=draw)
            items = torch.cat([problem.items["train"], others])
            targets = torch.cat([problem.targets["train"], torch.zeros(len(others))])
        optimizer.zero_grad()
        loss(outputs(model, problem, items), targets).backward()
        optimizer.step()
        scheduler.step()


# --- a run and the figures --------------------------------------------------------------------------------------------


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    problem = load(Path(context["data_dir"]), job["problem"], job["seed"])
    model = built(job["arm"], problem, job["seed"])
    train(model, problem, job["rate"], job["steps"], job["seed"])
    with torch.no_grad():
        found = {part: outputs(model.eval(), problem, problem.items[part]) for part in PARTS}
    row = {
        "validation": arms.finite(float(loss(found["validation"], problem.targets["validation"]))),
        "trained": sum(p.numel() for p in model.parameters()),
    }
    if job["phase"] == "test":
        scores = scored(found["test"].double().numpy(), problem.targets["test"].numpy())
        draws = arms.counts(len(problem.targets["test"]), job["seed"])
        row["scores"] = {name: score(np.ones(draws.shape[1])) for name, score in scores.items()}
        row["draws"] = {name: arms.drawn(score, draws) for name, score in scores.items()}
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


def scored(found: np.ndarray, targets: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
    """Scores as functions of how often each row counts."""
    if found.ndim == 1:
        return {"AUC": lambda counts: auc(targets, found, counts)}
    classes, chosen = found.shape[1], found.argmax(1)

    def f1(counts: np.ndarray) -> float:
        cells = np.bincount(targets * classes + chosen, counts, classes**2).reshape(classes, classes)
        both = cells.sum(0) + cells.sum(1)
        return float((2 * cells.diagonal() / both.clip(min=1)).mean())

    return {"accuracy": lambda counts: float(counts @ (targets == chosen) / counts.sum()), "F1": f1}


def study_of(
    problems: Sequence[str] = PROBLEMS, seeds: int = 3, steps: int = STEPS, out: Path = OUT
) -> arms.Study:
    return arms.Study(out, problems, ARMS, seeds, RATE, {"rate": steps, "test": steps})


def report(study: arms.Study) -> Iterator[str]:
    tested = study.tested()
    for problem in study.problems:
        mine = {arm: tested[problem, arm] for arm in study.arms if (problem, arm) in tested}
        if not mine:
            continue
        scores = list(next(iter(mine.values()))[0]["scores"])
        yield from ("", f"{problem}, {max(map(len, mine.values()))} seeds")
        rows = (
            [arm, f"{runs[0]['trained']:,}", f"{runs[0]['rate']:g}", *(arms.mean(runs, name, 4) for name in scores)]
            for arm, runs in mine.items()
        )
        yield from ("", *arms.table(["arm", "trained", "rate", *scores], rows), "")
        for one, other in PAIRS:
            if one in mine and other in mine:
                word, shown = arms.order(mine[one], mine[other], scores[0])
                near, apart = arms.close(mine[one], mine[other], scores[0])
                yield f"- {one} above {other} in {scores[0]}: {shown}, {word}; close: {apart}, {near}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", default=",".join(PROBLEMS), help="problems between commas, as 'cora links'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    asked = study_of(args.only.split(","), args.seeds, args.steps, args.out)
    if not args.tables:
        if args.data_dir is None:
            parser.error("--data-dir is where graphs/ lies; or --tables")
        geometry()
        versions = {"torch": torch.__version__, "weft": weft.__version__}
        made_by = {"device": processor(), "commit": commit(), "versions": versions}
        asked.run(measure, {"data_dir": str(args.data_dir), "made_by": made_by}, args.workers)
    print("\n".join(report(asked)))


if __name__ == "__main__":
    main()
