"""Time and loss of ARMOR's descent beside the paper's loop over blocks, in one run.

    python benchmarks/compress_armor.py                          256 × 256, blocks of 32, 50 iterations
    python benchmarks/compress_armor.py --side 512 --block 64

Both draw the same groups from the same numbers, so they go the same way, up to rounding in float32. The opponent
(tests/compress/plain_armor.py) multiplies whole matrices, takes its gradients from autograd and goes through the blocks
in Python. Machines are noisy, so only the ratio counts: both take turns, and the medians of their processor times are
divided.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from weft.algebra.random import generator
from weft.compress import armor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "compress"))

import plain_armor


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """Seconds of processor time, and what was returned."""
    start = time.process_time()
    loss = run()
    return time.process_time() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = generator("benchmark")
    wn = armor.normalised(torch.randn(args.side, args.side, generator=made))[0]
    h = armor.importance(torch.rand(args.side, generator=made) + 0.1)
    shared = {"iterations": args.iterations, "lr": args.lr}

    def ours() -> float:
        return armor.fit(wn, h, args.block, args.block, **shared, patience=1000, draws=generator("draws")).loss

    def theirs() -> float:
        return plain_armor.fit(wn, h, args.block, args.block, **shared, draws=generator("draws"))[0]

    turns = [(timed(ours), timed(theirs)) for _ in range(args.repeats)]
    seconds = [statistics.median(turn[who][0] for turn in turns) for who in (0, 1)]
    start = armor.Descent(wn, h, args.block, args.block).loss
    print(f"loss {start:.6f} at the start, {turns[0][0][1]:.6f} here, {turns[0][1][1]:.6f} by the loop over blocks")
    print(f"seconds {seconds[0]:.2f} and {seconds[1]:.2f}: {seconds[1] / seconds[0]:.1f} times as fast")


if __name__ == "__main__":
    main()
