"""Time and error of `weft.algebra.svd.weighted_svd` beside torch.linalg.svd, in one run.

    python benchmarks/algebra.py                       1024 × 2816 and 2048 × 5504; benchmarks/results/algebra.json
    python benchmarks/algebra.py --small               a quick look: 256 × 704 and 512 × 1408
    python benchmarks/algebra.py --shapes 4096x11008 --unweighted --repeats 1
    python benchmarks/algebra.py --model DIR           the largest matrix of a checkpoint as well

Machines are noisy, so only ratios count: both take turns, and the medians are divided. "keep" is the decomposition and
the factors of one rank, for keep 0.5, 0.7 and 0.9 (rank = keep·out·in / (out + in)), beside a thin torch.linalg.svd;
"d/16" and "d/32" are those ranks of the shorter side d. Weighted cases have a Gram matrix of inputs of very unequal
scales on the right; the opponent factors W·R, with R by Cholesky, and both spend much of their time on these two.
Errors are ‖(W − BA)·R‖_F in float64, divided by that of the best factors of the same rank. The matrices have
σ_i ∝ i^-0.5 and noise of a hundredth of the first.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import weft
from weft.algebra.gram import gram
from weft.algebra.svd import weighted_svd

RESULTS = Path(__file__).parent / "results" / "algebra.json"
KEEPS = (0.5, 0.7, 0.9)
WANTED = {"keep": 1 / 4, "d/16": 1 / 10, "d/32": 1 / 10}  # of the opponent's time, without weights


def decaying(out: int, in_: int) -> Tensor:
    """A float32 matrix with the spectrum of a trained one: a power law and a floor of noise."""
    made = torch.Generator().manual_seed(0)
    d = min(out, in_)
    u = torch.linalg.qr(torch.randn(out, d, generator=made)).Q
    v = torch.linalg.qr(torch.randn(in_, d, generator=made)).Q
    values = torch.arange(1, d + 1) ** -0.5
    noise = torch.randn(out, in_, generator=made) * 0.01 / (math.sqrt(out) + math.sqrt(in_))
    return (u * values) @ v.mT + noise


def largest(folder: Path) -> tuple[str, Tensor]:
    """The largest matrix of a checkpoint that is neither an embedding nor a head, in float32."""
    found: tuple[int, str, Path] = (0, "", folder)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and not any(word in name for word in ("embed", "lm_head", "wte", "wpe")):
                    found = max(found, (math.prod(shape), name, file))
    with safe_open(found[2], framework="pt") as tensors:
        return found[1], tensors.get_tensor(found[1]).float()


def inputs(in_: int) -> Tensor:
    """The Gram matrix (float64) of 2·in inputs that share directions and differ in scale by a thousand."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(2 * in_, in_ // 4, generator=made) @ torch.randn(in_ // 4, in_, generator=made) / math.sqrt(in_)
    x += 0.1 * torch.randn(x.shape, generator=made)
    return gram(x * torch.logspace(-1.5, 1.5, in_)).double()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def opponent(w: Tensor, g: Tensor | None) -> Tensor:
    """Singular values of W·R by torch.linalg.svd; the same work gives the vectors."""
    m = w if g is None else w @ torch.linalg.cholesky(g).to(w)
    return torch.linalg.svd(m, full_matrices=False)[1]


def race(w: Tensor, g: Tensor | None, cases: dict[str, list[int]], repeats: int) -> dict[str, dict[str, Any]]:
    """Interleaved runs; per case and rank the median times, their ratio, and our error over the best possible."""
    ours: dict[int, list[float]] = {r: [] for ranks in cases.values() for r in ranks}
    theirs: list[float] = []
    factors = {}
    for _ in range(repeats):
        for ranks in cases.values():
            once, decomposed = timed(lambda ranks=ranks: weighted_svd(w, right=g, rank=max(ranks)))
            for r in ranks:
                cut, factors[r] = timed(lambda d=decomposed, r=r: d.factors(r))
                ours[r].append(once + cut)
        whole, spectrum = timed(lambda: opponent(w, g))
        theirs.append(whole)
    best = spectrum.double().square().flip(0).cumsum(0).flip(0).sqrt()
    other = statistics.median(theirs)
    return {
        case: {
            "ranks": ranks,
            "seconds": [[statistics.median(ours[r]) for r in ranks], other],
            "time_ratio": [statistics.median(ours[r]) / other for r in ranks],
            "error_ratio": [error(w, g, *factors[r]) / float(best[r]) for r in ranks],
        }
        for case, ranks in cases.items()
    }


def error(w: Tensor, g: Tensor | None, b: Tensor, a: Tensor) -> float:
    """‖(W − BA)·R‖_F in float64."""
    rest = w.double() - b.double() @ a.double()
    return float(rest.norm() if g is None else ((rest @ g) * rest).sum().sqrt())


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shapes", default="", help="comma-separated, each out×in written as 1024x2816")
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint in safetensors")
    parser.add_argument("--unweighted", action="store_true", help="leave out the cases with a Gram matrix")
    parser.add_argument("--threads", type=int, help="of both sides; one where other work shares the processor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    asked = args.shapes or ("256x704,512x1408" if args.small else "1024x2816,2048x5504")
    matrices = {f"decaying {shape}": decaying(*map(int, shape.split("x"))) for shape in asked.split(",")}
    if args.model:
        name, w = largest(args.model)
        matrices[f"{args.model.name} {name} {w.shape[0]}x{w.shape[1]}"] = w
    command = shlex.join(["python", *sys.argv])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: dict[str, Any] = {}
    for name, w in matrices.items():
        d, size = min(w.shape), w.numel() / sum(w.shape)
        cases = {"keep": [int(keep * size) for keep in KEEPS], "d/16": [d // 16], "d/32": [d // 32]}
        for label in ("",) if args.unweighted else ("", " weighted"):
            g = inputs(w.shape[1]) if label else None
            for case, row in race(w, g, cases, args.repeats).items():
                wanted = 1.0 if label else WANTED[case]
                rows[f"{name}{label} {case}"] = {
                    "opponent": "torch.linalg.svd",
                    "wanted_ratio": wanted,
                    **row,
                    # of the ranks that were tried: what a table shows
                    "worst rank": {key: max(row[key]) for key in ("time_ratio", "error_ratio")},
                    "command": command,
                    "commit": commit,
                }
                ratios = "  ".join(f"{t:.3f}x (error {e:.5f})" for t, e in zip(row["time_ratio"], row["error_ratio"]))
                print(
                    f"{name + label:34s} {case:5s} {row['seconds'][0][-1]:7.2f} s  {ratios}   wanted ≤ {wanted:.2f}x",
                    flush=True,
                )
    document = {
        "command": command,
        "commit": commit,
        "settings": {"dtype": "torch.float32", "keep": list(KEEPS)},
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
        "rows": rows,
    }
    if args.out.exists():  # other matrices stay as they were measured, under the same conditions
        before = json.loads(args.out.read_text())
        if all(before[key] == document[key] for key in ("settings", "device", "threads", "versions")):
            document["rows"] = before["rows"] | rows
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
