"""Factorised layers beside a dense one: the time of a step at several widths, and what a step keeps in memory.

    python benchmarks/factorised.py            → benchmarks/results/factorised/steps.json, docs/assets/factorised.svg
    python benchmarks/factorised.py --draw     the picture alone, from the file (`pip install weft[plots]`)
    python benchmarks/factorised.py --memory   → benchmarks/results/factorised/memory.json

A step is forward, backward and AdamW on one layer of width d with 2048 vectors, r = d/4. It takes turns with a dense
layer's, and the medians are divided.

--memory: forward and backward through eight layers of width 1024 with 256 vectors, each in a fresh process: a dense
model, SLTrain's, and SLTrain's with W written as plain torch operations, which keep it for the backward pass. What is
counted is the peak above the model and its inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch
from torch import Tensor, nn

import weft

RESULTS = Path(__file__).parent / "results" / "factorised"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "factorised.svg"
WIDTHS = (256, 512, 1024, 2048)
TOKENS = 2048
EXACT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed is given back


def options(method: str, width: int) -> dict[str, Any]:
    """Of one method at one width."""
    return {"rank": width // 4} | ({"lora_alpha": width // 16} if method == "sltrain" else {})


class Stack(nn.Module):
    """Layers of one width in a row."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=False)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(nn.Module):
    """SLTrain's layer in plain torch operations."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.up, self.down, self.values = layer.up.weight, layer.down.weight, layer.values
        self.scale = layer.scale
        self.register_buffer("places", layer.places.long())

    def forward(self, x: Tensor) -> Tensor:
        w = self.scale * self.up @ self.down
        return x @ w.flatten().scatter_add(0, self.places, self.values).view_as(w).mT


def made(method: str, width: int, count: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Stack(width, count)
    if method == "dense":
        return model
    weft.reparametrise(model, method.partition(",")[0], **options(method.partition(",")[0], width))
    if method == "sltrain, plain":
        for block in model.layers:  # type: ignore[union-attr]
            block[0] = Plain(block[0])  # type: ignore[index]
    return model


def step(method: str, width: int) -> Callable[[], None]:
    model = made(method, width, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(TOKENS, width, requires_grad=True)

    def run() -> None:
        optimizer.zero_grad()
        x.grad = None
        model(x).square().mean().backward()
        optimizer.step()

    return run


def race(method: str, width: int, repeats: int) -> dict[str, float]:
    """Seconds of a step, and its ratio to a dense layer's, the two taking turns."""
    sides = {name: step(name, width) for name in ("dense", method)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 2):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                found[name].append(time.perf_counter() - start)
    dense, ours = (statistics.median(found[name]) for name in ("dense", method))
    return {"seconds": ours, "ratio": ours / dense}


def peak(method: str) -> int:
    """Bytes above the model and its inputs that a forward and backward pass need, gradients of parameters included."""
    from weft.run.measure import measuring_memory

    model = made(method, 1024, 8)
    x = torch.randn(256, 1024)
    model(x[:1]).sum().backward()  # what is made once
    for p in model.parameters():
        p.grad = None
    with measuring_memory() as seen:
        model(x).square().mean().backward()
    return seen.peak_bytes or 0


def memory() -> dict[str, Any]:
    rows = {}
    for method in ("dense", "sltrain", "sltrain, plain"):
        command = [sys.executable, __file__, "--peak-of", method]
        rows[method] = int(subprocess.run(command, capture_output=True, text=True, check=True, env=EXACT).stdout)
        print(f"{method:16s} {rows[method] / 2**20:8.1f} MiB", flush=True)
    ratios = {f"sltrain / {other}": rows["sltrain"] / rows[other] for other in ("dense", "sltrain, plain")}
    print(ratios)
    return {"bytes": rows, "ratios": ratios}


def steps(repeats: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for method, card in sorted(weft.cards("pretrain").items()):
        if "dense" in card.reasons:
            continue  # its step is a dense layer's, but for an SVD now and then
        for width in WIDTHS:
            found = rows.setdefault(method, {})[str(width)] = race(method, width, repeats)
            print(f"{method:10s} {width:5d}  {found['ratio']:5.2f} of a dense layer's step", flush=True)
    return {"rows": rows, "settings": {"tokens": TOKENS, "rank": "width / 4"}}


def draw(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "weft", "font.family": "sans-serif", "font.size": 9}
    from matplotlib import pyplot as plt

    figure, cell = plt.subplots(figsize=(6, 3.4))
    cell.axhline(1, color="#bbb", linewidth=0.8)
    for (method, points), marker in zip(rows.items(), "os^Dv<>p"):
        widths = [int(width) for width in points]
        cell.plot(widths, [p["ratio"] for p in points.values()], marker=marker, markersize=4, linewidth=1.5)
        cell.annotate(method, (widths[-1], points[str(widths[-1])]["ratio"]), (7, -3), textcoords="offset points")
    cell.set_xscale("log", base=2)
    cell.set_xticks(WIDTHS, [str(w) for w in WIDTHS])
    cell.set_xlim(right=WIDTHS[-1] * 1.5)
    cell.set_ylim(bottom=0)
    cell.spines[["top", "right"]].set_visible(False)
    cell.set_xlabel("width of the layer")
    cell.set_ylabel("step time / a dense layer's")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step instead of its time")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.peak_of:
        print(peak(args.peak_of))
        return
    out = RESULTS / ("memory.json" if args.memory else "steps.json")
    if not args.draw:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        document = {
            "command": shlex.join(["python", *sys.argv]),
            "device": adapters.processor(),
            "threads": torch.get_num_threads(),
            "commit": commit,
            **(memory() if args.memory else steps(args.repeats)),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
    if not args.memory:
        draw(json.loads(out.read_text())["rows"])


if __name__ == "__main__":
    main()
