"""Three papers' claims of compression on a small trained Llama, each beside what it is held against there.

    python benchmarks/compression_claims.py --data-dir DIR      the tables, and results/compression/claims/NAME.json

    armor      below 2:4 pruning by magnitude, and by Wanda's |w|·‖x‖
    welore     below svd at equal bits, and with fewer bits at an equal error Σ‖W − BA‖² / Σ‖W‖²
    r_sparse   close to the dense model where a token reads half of the weights: 1 % of its loss

DIR holds models/prose7m_llama, wikitext2 and c4_sample; calibration and test windows are those of compression.py, and
all linear layers of all blocks are compressed. Differences are nats a token, with the 95 % bootstrap interval over
windows.
Of 2:4 pruning half the numbers and two bits for each of these are stored, so its share is that of the dtype; ARMOR has
its wrappers besides. R-Sparse's evaluation runs sparse too, with and without the search, which sees eight
of the windows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import processor
from claims.ledger import interval
from compression import corpora, losses
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import weft
from weft.compress._calibration import Corpus, calibrate
from weft.compress._layers import targets
from weft.compress.r_sparse import search
from weft.files import write_text
from weft.run.compare import commit

KEEPS = (0.9, 0.8, 0.7, 0.5)
CORPORA = ("wikitext2", "c4")
SPARSE = math.nextafter(1.0, 0.0)  # of a sequence; with 1 a whole one would run dense, as a prompt does
Loader = Callable[[], Any]
Losses = dict[str, list[float]]


def two_of_four(score: Tensor) -> Tensor:
    """1 where a score (out × in) is one of the two largest of its four neighbours in a row."""
    fours = score.unflatten(1, (-1, 4))
    return torch.zeros_like(fours).scatter_(2, fours.topk(2, dim=2).indices, 1.0).flatten(1)


@torch.no_grad()
def prune(model: Any, batches: list[dict[str, Tensor]], wanda: bool) -> None:
    """2:4 pruning of every targeted matrix, by |w| or by |w|·‖x‖, x being what the dense model gives it."""
    layers = targets(model, None, None)
    found = calibrate(model, [Corpus(batches)], layers, {layer.name: ("input",) for layer in layers}) if wanda else {}
    for layer in layers:
        score = layer.wide.abs()
        if wanda:
            moments = found[layer.name].input
            assert moments is not None
            score = score * moments.second_moment.diagonal().sqrt()
        layer.module.weight.mul_(two_of_four(score).to(layer.module.weight))


def tested(model: Any, windows: dict[str, Tensor]) -> Losses:
    return {corpus: losses(model.eval(), windows[corpus]) for corpus in CORPORA}


def armor(fresh: Loader, windows: dict[str, Tensor], batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    model = fresh()
    report = weft.compress(model, "armor", data=batches)
    found: dict[str, Any] = {"armor": {"keep": report.keep, **tested(model, windows)}}
    for name, wanda in (("Wanda", True), ("magnitude", False)):
        prune(model := fresh(), batches, wanda)
        found[name] = {"keep": 0.5 + 2 * 0.5 / 32, **tested(model, windows)}
    return found


@torch.no_grad()
def squared(dense: nn.Module, model: nn.Module) -> float:
    """Σ‖W − Ŵ‖² / Σ‖W‖² over the targeted matrices."""
    lost = whole = 0.0
    for layer in targets(dense, None, None):
        now: Any = model.get_submodule(layer.name)
        w = layer.wide.double()
        lost += float((w - (now.dense() if hasattr(now, "dense") else now.weight).double()).square().sum())
        whole += float(w.square().sum())
    return lost / whole


def welore(fresh: Loader, windows: dict[str, Tensor], batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    dense = fresh()

    def cut(method: str, keep: float, **options: Any) -> tuple[Any, float, float]:
        model = fresh()
        report = weft.compress(model, method, keep=keep, **options)
        return model, report.keep, squared(dense, model)

    for keep in KEEPS:
        for method in ("welore", "svd"):
            model, bits, error = cut(method, keep)
            found[f"{method}, keep {keep}"] = {"keep": bits, "error": error, **tested(model, windows)}
        low, high = 0.05, 1.0  # the share at which svd makes welore's error
        error = found[f"welore, keep {keep}"]["error"]
        for _ in range(9):
            middle = (low + high) / 2
            low, high = (middle, high) if cut("svd", middle)[2] > error else (low, middle)
        model, bits, reached = cut("svd", high)
        found[f"svd, welore's error at {keep}"] = {"keep": bits, "error": reached, **tested(model, windows)}
    return found


def r_sparse(fresh: Loader, windows: dict[str, Tensor], batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    recipe = search(fresh(), batches[:1], target_sparsity=0.5)
    settings = {"r_sparse": {}, "r_sparse, searched": {"recipe": recipe}, "columns alone": {"sparse_ratio": 1.0}}
    found: dict[str, Any] = {}
    for name, options in settings.items():
        model = fresh()
        report = weft.compress(model, "r_sparse", data=batches, target_sparsity=0.5, prefill_ratio=SPARSE, **options)
        found[name] = {"keep": report.reads, **tested(model, windows)}
    return found


# --- what they say ----------------------------------------------------------------------------------------------------


def order(better: np.ndarray, other: np.ndarray, dense: np.ndarray) -> str:
    """holds, reversed, tie or collapsed, and the difference with its interval."""
    low, high = interval(better - other)
    word = "holds" if high < 0 else "reversed" if low > 0 else "tie"
    if word != "tie" and min(better.mean(), other.mean()) > dense.mean() + math.log(2):
        word = "collapsed"
    return f"{word}, {(better - other).mean():+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")


def findings(document: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Method, claim, corpus, and what was found of it: a word, and a difference with its interval."""
    dense = {corpus: np.array(document["dense"][corpus]) for corpus in CORPORA}
    for name, rows in document["claims"].items():
        for better, other in pairs(name):
            for corpus in CORPORA:
                found = order(np.array(rows[better][corpus]), np.array(rows[other][corpus]), dense[corpus])
                yield name, f"{better} below {other}", corpus, f"{found} nats"
        for label in rows if name == "r_sparse" else ():
            for corpus in CORPORA:
                share = (np.array(rows[label][corpus]) - dense[corpus]) / dense[corpus].mean()
                low, high = interval(share)
                word = "holds" if share.mean() <= 0.01 else "reversed"
                found = f"{word}, {share.mean():+.2%} ({low:+.2%} to {high:+.2%})".replace("-", "−")
                yield name, f"{label} within 1 % of the dense loss", corpus, found


def tables(document: dict[str, Any]) -> Iterator[str]:
    for name, rows in document["claims"].items():
        yield f"\n{name}: " + ", ".join(f"dense {np.mean(document['dense'][c]):.3f} on {c}" for c in CORPORA) + "\n"
        yield "| | share | error | " + " | ".join(CORPORA) + " |\n| --- | --- | --- | --- | --- |"
        for label, row in rows.items():
            error = f"{row['error']:.4f}" if "error" in row else ""
            cells = [label, f"{row['keep']:.3f}", error, *(f"{np.mean(row[c]):.3f}" for c in CORPORA)]
            yield f"| {' | '.join(cells)} |"
        yield ""
        for slug, claim, corpus, found in findings(document):
            if slug == name:
                yield f"- {claim}: {corpus} {found}"
        for keep in KEEPS if name == "welore" else ():
            own, plain = rows[f"welore, keep {keep}"]["keep"], rows[f"svd, welore's error at {keep}"]["keep"]
            yield f"- at welore's error at keep {keep}: {own:.3f} of the bits, and svd {plain:.3f}"


def out(model: str) -> Path:
    """Where a model's figures lie."""
    return Path(__file__).parent / "results" / "compression" / "claims" / f"{model}.json"


def pairs(name: str) -> list[tuple[str, str]]:
    if name == "armor":
        return [("armor", other) for other in ("Wanda", "magnitude")]
    if name == "welore":
        each = [(f"welore, keep {k}", f"svd, keep {k}") for k in KEEPS]
        return each + [(f"welore, keep {k}", f"svd, welore's error at {k}") for k in KEEPS]
    return [("r_sparse", "columns alone")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="prose7m_llama")
    parser.add_argument("--only", choices=("armor", "welore", "r_sparse"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    path = args.data_dir / "models" / args.model
    file = out(args.model)
    windows = corpora(args.data_dir, AutoTokenizer.from_pretrained(path))
    batches = [{"input_ids": ids} for ids in windows["calibration"].split(8)]

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    before = json.loads(file.read_text(encoding="utf-8"))["claims"] if file.exists() else {}
    document = {
        "command": "python benchmarks/compression_claims.py --data-dir DIR",
        "device": processor(),
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
        "commit": commit(),
        "dense": tested(fresh(), windows),
        "claims": before,
    }
    for run in (armor, welore, r_sparse):
        name = run.__name__
        if args.only not in (None, name) or (name in before and args.only is None):
            continue
        document["claims"][name] = run(fresh, windows, batches)
        write_text(file, json.dumps(document))
    print("\n".join(tables(document)))


if __name__ == "__main__":
    main()
