"""A layer of low rank plus sparse beside the dense layer of 2048 × 2048, with no gradient asked for.

    python benchmarks/low_rank_plus_sparse.py    ratios of medians, and results/low_rank_plus_sparse.json

The two take turns. The low rank is 64, and S is full to a hundredth, a twentieth and a tenth.
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

from weft.linear.low_rank_plus_sparse import LowRankPlusSparse
from weft.run.compare import commit

SIDE, RANK, DENSITIES, ROWS = 2048, 64, (0.01, 0.05, 0.1), (1, 8, 64, 512)


def layer(density: float, dtype: torch.dtype) -> LowRankPlusSparse:
    """Random numbers cost what right ones do."""
    nonzeros = round(density * SIDE)
    index = torch.rand(SIDE, SIDE).topk(nonzeros, dim=1).indices.sort(1).values
    factors = torch.randn(SIDE, RANK), torch.randn(RANK, SIDE)
    return LowRankPlusSparse.from_factors(*factors, index, torch.randn(SIDE, nonzeros), dtype=dtype)


@torch.inference_mode()
def ratio(dense: nn.Module, sparse: nn.Module, rows: int, dtype: torch.dtype, steps: int) -> float:
    """How many times as fast as the dense layer the sparse one is."""
    seconds: dict[nn.Module, list[float]] = {dense: [], sparse: []}
    for _ in range(steps + 3):  # three to warm up
        x = torch.randn(rows, SIDE).to(dtype)
        for each, times in seconds.items():
            started = time.perf_counter()
            each(x)
            times.append(time.perf_counter() - started)
    return round(statistics.median(seconds[dense][3:]) / statistics.median(seconds[sparse][3:]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "low_rank_plus_sparse.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        dense = nn.Linear(SIDE, SIDE, bias=False, dtype=dtype)
        for density in DENSITIES:
            sparse = layer(density, dtype)
            faster = {rows: ratio(dense, sparse, rows, dtype, options.steps) for rows in ROWS}
            setting = {"dtype": str(dtype).removeprefix("torch."), "density": density}
            found.append({**setting, "times_as_fast": faster})
            print(setting, faster, flush=True)
    about = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__}
    report = {**about, "commit": commit(), "threads": options.threads, "side": SIDE, "rank": RANK, "rows": found}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
