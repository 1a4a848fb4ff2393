"""One generation step of an R-Sparse layer beside the dense layer's, half of the weights read.

    python benchmarks/r_sparse.py                 ratios of medians, and results/r_sparse.json
    python benchmarks/r_sparse.py --threads 1 2   on an idle machine alone: waiting threads cost more

Dense and sparse layers of all sides take turns, so that no weight is more at home in the cache than in a model. Inputs
are normal and other ones each step; a token's active columns come to about 1/2·0.95 of all.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from adapters import processor
from torch import nn

from weft.compress.r_sparse import budget
from weft.linear.rank_aware_sparse import RankAwareSparse, column_norms
from weft.run.compare import commit

SIDES, SPARSITY, RATIO = (2048, 4096), 0.5, 0.95


def pair(side: int, dtype: torch.dtype) -> tuple[nn.Linear, RankAwareSparse]:
    """A dense layer and its sparse form; a low-rank part of random numbers costs what a right one does."""
    dense = nn.Linear(side, side, bias=False, dtype=dtype)
    weight = dense.weight.detach()
    _, rank = budget(side, side, SPARSITY, RATIO)
    norms = column_norms(weight)
    scores = (torch.randn(256, side) * norms).abs().flatten()
    tau = float(scores.kthvalue(int(len(scores) * (1 - (1 - SPARSITY) * RATIO))).values)
    up, down = torch.randn(side, rank), torch.randn(rank, side)
    return dense, RankAwareSparse.from_factors(weight, up, down, norms, tau)


@torch.inference_mode()
def ratios(dtype: torch.dtype, steps: int) -> dict[int, float]:
    """For each side, how many times as fast as the dense layer the sparse one is."""
    torch.manual_seed(0)
    pairs = {side: pair(side, dtype) for side in SIDES}
    seconds: dict[tuple[int, int], list[float]] = {(side, which): [] for side in SIDES for which in (0, 1)}
    for _ in range(steps + 3):  # three to warm up
        for (side, which), times in seconds.items():
            x = torch.randn(1, 1, side).to(dtype)
            started = time.perf_counter()
            pairs[side][which](x)
            times.append(time.perf_counter() - started)
    middle = {key: statistics.median(times[3:]) for key, times in seconds.items()}
    return {side: round(middle[side, 0] / middle[side, 1], 2) for side in SIDES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "r_sparse.json")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            found = ratios(dtype, options.steps)
            setting = {"threads": threads, "dtype": str(dtype).removeprefix("torch.")}
            rows += [{**setting, "side": side, "times_as_fast": ratio} for side, ratio in found.items()]
            print(setting, found, flush=True)
    about = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__}
    report = {**about, "commit": commit(), "target_sparsity": SPARSITY, "sparse_ratio": RATIO, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
