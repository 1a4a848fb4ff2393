"""A compressed layer beside the dense one it stands for, forward alone: how many times as fast.

    python benchmarks/inference.py                 every kind; the table, and results/compression/inference.json
    python benchmarks/inference.py --only low_rank --threads 1 2

On an idle machine alone: waiting threads cost more. Layers of all kinds take turns with the dense one, so that no
weight is more at home in the cache than in a model; inputs are normal, and other ones each step. Low rank and
dictionary keep 0.7 of the bits. The rank-aware layer is made for single tokens and reads half of its weights there; a
token's active columns come to about 1/2·0.95 of all. ARMOR's blocks have 128 sides; a processor has no 2:4 product.
A factor of our layers takes the faster of two libraries (weft.algebra.matmul): `factor` is the dense matrix itself in
such a layer, so that what is the library's can be told from what is the form's.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from adapters import processor
from torch import nn

from weft.compress._layers import Layer
from weft.compress.cospadi import CospadiConfig, CospadiFactoriser
from weft.compress.r_sparse import budget
from weft.linear._structured import Factor, Structured, bare
from weft.linear.block_semi_sparse import BlockSemiSparse
from weft.linear.dictionary import Dictionary
from weft.linear.low_rank import LowRank
from weft.linear.rank_aware_sparse import RankAwareSparse, column_norms
from weft.run.compare import commit

RESULTS = Path(__file__).parent / "results" / "compression" / "inference.json"
SIDES, BATCHES = (1024, 2048, 4096), (1, 16)
KEEP, SPARSITY, RATIO, BLOCK = 0.7, 0.5, 0.95, 128


def factor(weight: torch.Tensor) -> Factor:
    layer = bare(Factor, *weight.mT.shape, bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def low_rank(weight: torch.Tensor) -> Structured:
    side, rank = len(weight), int(KEEP * len(weight) / 2)
    return LowRank.from_factors(torch.randn(side, rank), torch.randn(rank, side), dtype=weight.dtype)


def rank_aware_sparse(weight: torch.Tensor) -> Structured:
    side = len(weight)
    _, rank = budget(side, side, SPARSITY, RATIO)
    norms = column_norms(weight)
    scores = (torch.randn(256, side) * norms).abs().flatten()
    tau = float(scores.kthvalue(int(len(scores) * (1 - (1 - SPARSITY) * RATIO))).values)
    return RankAwareSparse.from_factors(weight, torch.randn(side, rank), torch.randn(rank, side), norms, tau)


def dictionary(weight: torch.Tensor) -> Structured:
    side = len(weight)
    layer = Layer("", nn.Linear(side, side, device="meta", dtype=weight.dtype), "")
    maker = CospadiFactoriser(CospadiConfig())
    k = max(size for size in maker.sizes(layer) if maker.bits(layer, size) <= KEEP * layer.bits)
    s = maker.nonzeros(k)
    places = torch.rand(side, k).topk(s).indices.sort().values
    return Dictionary.from_codes(torch.randn(k, side), places, torch.randn(side, s), dtype=weight.dtype)


def block_semi_sparse(weight: torch.Tensor) -> Structured:
    side = len(weight)
    blocks = torch.randn(side // BLOCK, BLOCK, BLOCK)
    mask = torch.rand(side, side // 4, 4).argsort() < 2
    return BlockSemiSparse.from_parts(blocks, weight.float(), mask.view(side, side), blocks, dtype=weight.dtype)


# kind → how to make it of random numbers, which cost what right ones do, and the rows of x that it is meant for
KINDS: dict[str, tuple[Callable[[torch.Tensor], nn.Module], tuple[int, ...]]] = {
    "factor": (factor, BATCHES),
    "low_rank": (low_rank, BATCHES),
    "dictionary": (dictionary, BATCHES),
    "rank_aware_sparse": (rank_aware_sparse, (1,)),
    "block_semi_sparse": (block_semi_sparse, BATCHES),
}


def times_as_fast(kinds: list[str], side: int, batch: int, dtype: torch.dtype, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    dense = nn.Linear(side, side, bias=False, dtype=dtype)
    layers: dict[str, nn.Module] = {"dense": dense}
    layers |= {kind: KINDS[kind][0](dense.weight.detach()) for kind in kinds if batch in KINDS[kind][1]}
    seconds: dict[str, list[float]] = {kind: [] for kind in layers}
    with torch.inference_mode():
        for _ in range(steps + 3):  # three to warm up
            for kind, layer in layers.items():
                x = torch.randn(batch, 1, side).to(dtype)
                started = time.perf_counter()
                layer(x)
                seconds[kind].append(time.perf_counter() - started)
    middle = {kind: statistics.median(each[3:]) for kind, each in seconds.items()}
    return {kind: round(middle["dense"] / middle[kind], 2) for kind in layers if kind != "dense"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds between commas")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for side in options.sides:
                for batch in BATCHES:
                    found = times_as_fast(options.only.split(","), side, batch, dtype, options.steps)
                    name = str(dtype).removeprefix("torch.")
                    setting = {"threads": threads, "dtype": name, "side": side, "batch": batch}
                    rows.append({**setting, "times_as_fast": found})
                    print(setting, found, flush=True)
    about = {"command": shlex.join(["python", *sys.argv]), "processor": processor(), "torch": torch.__version__}
    settings = {"keep": KEEP, "target_sparsity": SPARSITY, "sparse_ratio": RATIO, "block": BLOCK}
    report = {**about, "python": platform.python_version(), "commit": commit(), **settings, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
