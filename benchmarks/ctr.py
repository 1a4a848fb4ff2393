"""Click-through models 3 and 5 times smaller: mimicked features beside cut singular values and a random start.

    python benchmarks/ctr.py --data-dir DIR                              everything: results/ctr/*.jsonl, and the tables
    python benchmarks/ctr.py --data-dir DIR --data criteo --seeds 1      one data set, fewer seeds
    python benchmarks/ctr.py --tables                                    the tables alone, from the files

DIR holds movielens_100k (a click is a rating of 4 or 5; the official ua split, ten ratings a user to test) and
criteo_sample (its three files together; the seed says which fifth tests). A tenth of what trains validates. DeepFM, DCN
and xDeepFM, with embeddings of 16 numbers and three layers of 200, are trained until validation AUC no longer rises.
Then tables and MLP are compressed until the whole model is 3 and 5 times smaller (what is not compressed, the wide
part's numbers for one, counts on both sides), calibrated on the training rows, and tuned for one epoch. Beside it stand

    weights     singular values of tables and weights in place of features, the same share kept, tuned alike
    random      the same small model drawn anew: tuned for one epoch, and trained as the original was ("whole")
    original    tuned for one epoch more

The rate of an epoch of tuning is one of RATES, chosen on the validation rows; the test rows are read once. A job is one
model and seed, a row of the file; what is in the file is not measured again. Differences of AUC have 95 % intervals of
a paired bootstrap over test rows, averaged over seeds. About a quarter of a core-hour a data set, most of it xDeepFM's.

The models are DeepCTR-Torch's (`pip install --no-deps deepctr-torch`, which wants tqdm, requests and scikit-learn, and
asks the package index for its newest version when it is imported). It has all three, made of one nn.Embedding a field
and of nn.Linear, called with one tensor; it depends on little, and its 0.3 of 2026 is for current torch. Beside it:
FuxiCTR 2.3 (kept up; models run from configuration files, and it brings ray, polars, pyarrow and h5py),
torch-rechub 0.9 (kept up and light; no xDeepFM), RecBole 1.2 (of 2025; pins ray below 2.7 and colorlog; one table for
all fields), torchrec 1.9 (kept up; tables are sharded collections of fbgemm-gpu, not nn.Embedding), torchfm 0.7 (not
kept up).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import processor
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

import weft
from weft.linear.factored_embedding import FactoredEmbedding
from weft.run.compare import commit

MODELS = ("DeepFM", "DCN", "xDeepFM")
SEEDS = {"movielens": 3, "criteo": 5}
SMALLER = (3, 5)
WIDTH, HIDDEN, MAPS = 16, (200, 200, 200), (16, 16)  # of embeddings, of the MLP, of xDeepFM's interactions
EPOCHS, PATIENCE = 20, 1
RATE, RATES = 1e-3, (1e-4, 3e-4, 1e-3, 3e-3)
DRAWS = 300
OUT = Path(__file__).parent / "results" / "ctr"

# --- the data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Ids of every field (rows × fields, as the models take them: float32), and clicks (rows)."""

    x: Tensor
    y: Tensor

    def __getitem__(self, rows: Any) -> Rows:
        return Rows(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Split:
    sizes: list[int]  # of each field's vocabulary
    train: Rows
    validation: Rows
    test: Rows


@dataclass(frozen=True)
class Recipe:
    """Attributes: batch: rows. decay: of embeddings, Adam's own, chosen on validation rows."""

    batch: int
    decay: float


RECIPES = {"movielens": Recipe(1024, 1e-4), "criteo": Recipe(256, 1e-3)}


def movielens(data: Path, seed: int) -> Split:
    folder = data / "movielens_100k"
    users, films = {}, {}
    for user, age, gender, job, place in fields(folder / "u.user.txt.gz", "|"):
        users[user] = (user, str(int(age) // 10), gender, job, place[:2])
    for film, _, day, _, _, *genres in fields(folder / "u.item.txt.gz", "|"):
        films[film] = (film, day[-4:], "".join(genres))

    def read(name: str) -> tuple[list[tuple[str, ...]], list[int]]:
        found = list(fields(folder / name, "\t"))
        return [users[user] + films[film] for user, film, *_ in found], [int(float(row[2]) >= 4) for row in found]

    rest, test = read("ua.base.tsv.gz"), read("ua.test.tsv.gz")
    count = len(rest[0])
    return encoded([*rest[0], *test[0]], [*rest[1], *test[1]], np.arange(count, count + len(test[0])), seed)


def criteo(data: Path, seed: int) -> Split:
    paths = [data / "criteo_sample" / f"{name}.tsv.gz" for name in ("train", "dev", "test")]
    found = [row for path in paths for row in fields(path, "\t")]
    rows = [tuple(scale(value) for value in row[1:14]) + tuple(row[14:]) for row in found]
    fold = np.array_split(np.random.default_rng(0).permutation(len(rows)), SEEDS["criteo"])[seed]
    return encoded(rows, [int(row[0]) for row in found], fold, seed, least=2)


def scale(count: str) -> str:
    """A count as a category: the square of its logarithm, where it is large."""
    return count if not count or int(count) <= 2 else f"log {int(math.log(int(count)) ** 2)}"


def fields(path: Path, separator: str) -> Iterator[list[str]]:
    with gzip.open(path, "rt", encoding="latin-1") as lines:
        for line in lines:
            yield line.rstrip("\n").split(separator)


def encoded(rows: Sequence[tuple[str, ...]], clicks: list[int], test: np.ndarray, seed: int, least: int = 1) -> Split:
    """Numbers for values seen `least` times in training; 0 for others."""
    rest = np.random.default_rng([1, seed]).permutation(np.setdiff1d(np.arange(len(rows)), test))
    validation, train = rest[: len(rest) // 10], rest[len(rest) // 10 :]
    columns, sizes = [], []
    for values in zip(*rows):
        counts = Counter(values[i] for i in train)
        known = {value: i for i, value in enumerate(sorted(v for v, n in counts.items() if n >= least), 1)}
        columns.append([known.get(value, 0) for value in values])
        sizes.append(len(known) + 1)
    whole = Rows(torch.tensor(columns, dtype=torch.float32).mT.contiguous(), torch.tensor(clicks, dtype=torch.float32))
    return Split(sizes, *(whole[torch.from_numpy(part)] for part in (train, validation, test)))


LOAD: dict[str, Callable[[Path, int], Split]] = {"movielens": movielens, "criteo": criteo}

# --- the models -------------------------------------------------------------------------------------------------------


def built(name: str, sizes: list[int], seed: int) -> nn.Module:
    try:
        from deepctr_torch import models
        from deepctr_torch.inputs import SparseFeat
    except ImportError:
        sys.exit("pip install --no-deps deepctr-torch first")
    columns = [SparseFeat(f"field{i}", size, WIDTH) for i, size in enumerate(sizes)]
    options: dict[str, Any] = {"cin_layer_size": MAPS} if name == "xDeepFM" else {}
    return getattr(models, name)(columns, columns, dnn_hidden_units=HIDDEN, init_std=0.01, seed=seed, **options)


def epoch(model: nn.Module, rows: Rows, optimiser: torch.optim.Optimizer, size: int, order: torch.Generator) -> None:
    model.train()
    for batch in torch.randperm(len(rows.y), generator=order).split(size):
        optimiser.zero_grad()
        binary_cross_entropy(model(rows.x[batch]).squeeze(1), rows.y[batch]).backward()
        optimiser.step()


def optimiser_of(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay}, {"params": []}]
    for name, p in model.named_parameters():
        groups["embedding_dict" not in name]["params"].append(p)
    return torch.optim.Adam(groups, lr=rate)


def train(model: nn.Module, split: Split, recipe: Recipe, seed: int) -> int:
    """Until validation AUC has not risen for PATIENCE epochs; the model is its best then. Epochs up to there."""
    optimiser, order = optimiser_of(model, RATE, recipe.decay), torch.Generator().manual_seed(seed)
    best, at, kept = -1.0, 0, model.state_dict()
    for number in range(1, EPOCHS + 1):
        epoch(model, split.train, optimiser, recipe.batch, order)
        found = auc(split.validation.y.numpy(), predicted(model, split.validation))
        if found > best:
            best, at, kept = found, number, copy.deepcopy(model.state_dict())
        elif number - at >= PATIENCE:
            break
    model.load_state_dict(kept)
    return at


def tuned(model: nn.Module, split: Split, recipe: Recipe, seed: int) -> tuple[nn.Module, float]:
    """After one epoch at the rate that does best on the validation rows; and that rate.

    The two in the middle of RATES are tried, and that beyond the better one.
    """
    found: dict[float, tuple[float, nn.Module]] = {}

    def tried(rate: float) -> None:
        each, order = copy.deepcopy(model), torch.Generator().manual_seed(seed + 1)
        epoch(each, split.train, optimiser_of(each, rate, recipe.decay), recipe.batch, order)
        found[rate] = auc(split.validation.y.numpy(), predicted(each, split.validation)), each

    least, low, high, most = RATES
    tried(low)
    tried(high)
    tried(least if found[low][0] >= found[high][0] else most)
    best = max(found, key=lambda rate: found[rate][0])
    return found[best][1], best


def smaller(model: nn.Module, basis: str, times: float, batches: Sequence[Tensor]) -> nn.Module:
    """A copy whose parameters are so many times fewer."""
    small, method = copy.deepcopy(model), "atomic_feature_mimicking"
    served = sum(row.dense for row in weft.compress(small, method, keep=1, data=batches).rows) / 32
    keep = (parameters(model) / times - (parameters(model) - served)) / served
    weft.compress(small, method, keep=keep, basis=basis, data=batches)
    return small


def redrawn(small: nn.Module, fresh: nn.Module) -> nn.Module:
    """The same shapes drawn anew; what is not compressed, as in a fresh model."""
    made = copy.deepcopy(small)
    for module in made.modules():
        if isinstance(module, FactoredEmbedding):
            nn.init.normal_(module.table.weight, std=0.01)
            nn.init.normal_(module.up, std=module.rank**-0.5)
            nn.init.zeros_(module.mean)
        elif isinstance(module, nn.Linear) and module.weight.numel():
            module.reset_parameters()
    shapes = {name: t.shape for name, t in made.state_dict().items()}
    same = {name: t for name, t in fresh.state_dict().items() if shapes.get(name) == t.shape}
    made.load_state_dict(same, strict=False)
    return made


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def predicted(model: nn.Module, rows: Rows) -> np.ndarray:
    model.eval()
    return torch.cat([model(x).squeeze(1) for x in rows.x.split(4096)]).double().numpy()


# --- the figures ------------------------------------------------------------------------------------------------------


def auc(clicks: np.ndarray, scores: np.ndarray, counts: np.ndarray | None = None) -> float:
    """How often a click scores above what is none, a tie counting half; row i stands for counts[i] rows."""
    weight = np.ones(len(scores)) if counts is None else counts
    _, place = np.unique(scores, return_inverse=True)
    yes, no = np.bincount(place, weight * clicks), np.bincount(place, weight * (1 - clicks))
    return float(((no.cumsum() - no / 2) * yes).sum() / (yes.sum() * no.sum()))


def logloss(clicks: np.ndarray, scores: np.ndarray) -> float:
    p = scores.clip(1e-7, 1 - 1e-7)
    return float(-(clicks * np.log(p) + (1 - clicks) * np.log1p(-p)).mean())


def pairs(times: int) -> list[tuple[str, str]]:
    """What is compared: arms less other arms."""
    untuned = f"{times}× features"
    others = ("original", "original, tuned", f"{times}× weights, tuned", f"{times}× random, whole")
    return [
        *((untuned, other) for other in ("original", f"{times}× weights")),
        *((f"{untuned}, tuned", other) for other in others),
    ]


def measure(data: str, split: Split, name: str, seed: int) -> dict[str, Any]:
    started, recipe, clicks = time.perf_counter(), RECIPES[data], split.test.y.numpy()
    batches = split.train.x.split(4096)
    arms: dict[str, dict[str, Any]] = {}
    scores: dict[str, np.ndarray] = {}

    def note(arm: str, model: nn.Module, **more: Any) -> None:
        scores[arm] = predicted(model, split.test)
        found = {"auc": auc(clicks, scores[arm]), "logloss": logloss(clicks, scores[arm])}
        arms[arm] = {"parameters": parameters(model), **found, **more}

    def note_tuned(arm: str, model: nn.Module) -> None:
        found, rate = tuned(model, split, recipe, seed)
        note(f"{arm}, tuned", found, rate=rate)

    model = built(name, split.sizes, seed)
    epochs = train(model, split, recipe, seed)
    note("original", model, epochs=epochs)
    note_tuned("original", model)
    for times in SMALLER:
        small = {basis: smaller(model, basis, times, batches) for basis in ("features", "weights")}
        for basis, each in small.items():
            note(f"{times}× {basis}", each)
            note_tuned(f"{times}× {basis}", each)
        drawn = redrawn(small["features"], built(name, split.sizes, seed + 100))
        note_tuned(f"{times}× random", drawn)
        epochs = train(drawn, split, recipe, seed)
        note(f"{times}× random, whole", drawn, epochs=epochs)
    # MovieLens' seeds test the same rows, so their draws are the same; Criteo's test others each
    draws = np.random.default_rng([2, seed if data == "criteo" else 0])
    counts = [np.bincount(draws.integers(0, len(clicks), len(clicks)), minlength=len(clicks)) for _ in range(DRAWS)]
    used = {arm for times in SMALLER for pair in pairs(times) for arm in pair}
    drawn_auc = {arm: np.array([auc(clicks, scores[arm], each) for each in counts]) for arm in used}
    return {
        **{"data": data, "model": name, "seed": seed, "fields": len(split.sizes), "ids": sum(split.sizes)},
        **{"rows": [len(part.y) for part in (split.train, split.validation, split.test)], "arms": arms},
        "draws": {
            f"{a} − {b}": (drawn_auc[a] - drawn_auc[b]).round(5).tolist() for times in SMALLER for a, b in pairs(times)
        },
        **{"seconds": round(time.perf_counter() - started, 1), "device": processor(), "commit": commit()},
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
    }


def measured(data: str | None = None) -> list[dict[str, Any]]:
    """The rows that were measured, of one data set or both."""
    paths = (OUT / f"{name}.jsonl" for name in ([data] if data else SEEDS))
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text("utf-8").splitlines()]


def of_each(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Data set, model, and their rows by seed."""
    for data, name in product(SEEDS, MODELS):
        mine = [row for row in rows if (row["data"], row["model"]) == (data, name)]
        if mine:
            yield data, name, mine


def above(rows: Sequence[dict[str, Any]], one: str, other: str) -> tuple[float, float, float]:
    """How far one arm's AUC is above another's, and the interval."""
    low, high = np.percentile(np.mean([row["draws"][f"{one} − {other}"] for row in rows], axis=0), (2.5, 97.5))
    return float(np.mean([row["arms"][one]["auc"] - row["arms"][other]["auc"] for row in rows])), low, high


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for data, name, mine in of_each(rows):
        yield from (f"{name} on {data}, {len(mine)} seeds", "")
        yield "| arm | parameters | AUC | LogLoss |"
        yield "| --- | --- | --- | --- |"
        for arm in mine[0]["arms"]:
            each = [row["arms"][arm] for row in mine]
            count, one, two = (np.array([e[key] for e in each]) for key in ("parameters", "auc", "logloss"))
            figures = (f"{each.mean():.4f} ± {each.std():.4f}" for each in (one, two))
            yield f"| {arm} | {count.mean():,.0f} | {' | '.join(figures)} |"
        yield ""
        for pair in mine[0]["draws"]:
            mean, low, high = above(mine, *pair.split(" − "))
            verdict = "above" if low > 0 else "below" if high < 0 else "tie"
            yield f"- {pair}: {mean:+.4f} ({low:+.4f} to {high:+.4f}), {verdict}".replace("-0", "−0")
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--data", choices=[*SEEDS], help="one of the two")
    parser.add_argument("--model", choices=MODELS, help="one of the three")
    parser.add_argument("--seeds", type=int, help="so many of 3 on MovieLens and 5 on Criteo")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.tables and args.data_dir is None:
        parser.error("--data-dir is where movielens_100k and criteo_sample lie; or --tables")
    OUT.mkdir(parents=True, exist_ok=True)
    for data in [args.data] if args.data else SEEDS:
        done = {(row["model"], row["seed"]) for row in measured(data)}
        for seed in range(0 if args.tables else min(args.seeds or SEEDS[data], SEEDS[data])):
            split = None
            for name in [args.model] if args.model else MODELS:
                if (name, seed) in done:
                    continue
                split = split or LOAD[data](args.data_dir, seed)
                row = measure(data, split, name, seed)
                with (OUT / f"{data}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                print(f"{name} on {data}, seed {seed}: {row['seconds']} s", flush=True)
    print("\n".join(tables(measured(args.data))))


if __name__ == "__main__":
    main()
