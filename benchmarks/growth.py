"""How the step time of each adapter grows with the width, beside the growth that its formula says.

    python benchmarks/growth.py            → benchmarks/results/growth/growth.json and docs/assets/growth.svg
    python benchmarks/growth.py --draw     the picture alone, from the file (`pip install weft[plots]`)

A step is forward, backward and AdamW on two linear layers in a row, all adapted, on 1024 input vectors. It takes turns
with a step of PEFT's LoRA of rank 8, and the medians are divided: the dots. The lines are multiplications, counted by
the formula of each adapter's page, divided by LoRA's. An adapter that multiplies once by W + ΔW is charged for the
gradient of ΔW; an operation of a fast transform counts as sixteen multiplications, which is what it takes in time.
What passes over the entries of ΔW one by one (SNELLA's kernel and threshold, roundings) is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch

import weft

RESULTS = Path(__file__).parent / "results" / "growth" / "growth.json"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "growth.svg"
WIDTHS = (256, 512, 1024, 2048, 4096)
TOKENS = 1024
R = adapters.R
FAST = 16  # multiplications that take as long as one operation of a fast transform


def thin(r: float, n: int, d: int) -> float:
    """Two thin products of rank r, the gradients of both factors and of x."""
    return 6 * n * r * d


def frozen(r: float, n: int, d: int) -> float:
    """Two thin products whose factors are not trained."""
    return 4 * n * r * d


def transformed(n: int, d: int) -> float:
    """Both sides of n vectors through a fast transform, or all entries of a product where that is cheaper."""
    return min(FAST * 5 * n * d * math.log2(d), n * d * d)


def salt(n: int, d: int) -> float:
    r, rest = d // 10, weft.SaltConfig().r_lora
    apart = 2 * n * d * (2 * r + 3 * rest) + 4 * rest * (d - r) * d
    return min(apart, 2 * d * d * (r + 2 * rest) + n * d * d)


# multiplications of a step over n vectors in a layer of d × d, beside the layer's own 2·n·d²
FORMULAS: dict[str, Callable[[int, int], float]] = {
    "allora": lambda n, d: thin(R, n, d),
    "bayesian_lora": lambda n, d: thin(weft.BayesianLoraConfig().r, n, d) + 120 * weft.BayesianLoraConfig().r * d,
    "block_lora": lambda n, d: thin(weft.BlockLoraConfig().r / weft.BlockLoraConfig().n_blocks, n, d),
    "diffora": lambda n, d: thin(R, n, d),
    "dylora": lambda n, d: thin((R + 1) / 2, n, d),
    "hydra": lambda n, d: thin(2 * weft.HydraConfig().r, n, d) + 2 * weft.HydraConfig().r * d * d,
    "increlora": lambda n, d: thin(R, n, d),
    "loca": lambda n, d: transformed(n, d) + transformed(d, d),
    "loldu": lambda n, d: min(4 * n * d * d, 2 * d**3 + n * d * d),
    "lora_sb": lambda n, d: frozen(R, n, d) + 3 * n * R * R,
    "nola": lambda n, d: thin(R, n, d) + 4 * weft.NolaConfig().num_basis * R * d,
    "qwha": lambda n, d: min(transformed(n, d) / 2 + 2 * n * R * d, n * d * d) + transformed(d, d),
    "randlora": lambda n, d: min(3 * d**3 + n * d * d, 6 * n * d * d),
    "salt": salt,
    "snella": lambda n, d: n * d * d + 5 * weft.SnellaConfig().q_dim * d * d,
    "sora": lambda n, d: thin(R, n, d),
    "svfit": lambda n, d: frozen(R, n, d),
    "tlora": lambda n, d: 6 * n * d * math.sqrt(d) + thin(weft.TloraConfig().r, n, d),
    "wara": lambda n, d: thin(2 * R, n, d),
}


def expected(slug: str, n: int, d: int) -> float:
    """The step over LoRA's step by counted multiplications."""
    layer = 2 * n * d * d
    return (layer + FORMULAS[slug](n, d)) / (layer + thin(R, n, d))


def makers(width: int) -> dict[str, Callable[[], Any]]:
    """Each adapter as `adapters.py` measures it at this width."""
    ours = adapters.cases(argparse.Namespace(width=width))
    named = {"svfit": "svfit r=8", "increlora": "increlora target reached", "nola": "nola stored"}
    named |= {"loca": "loca beside LoRA", "diffora": "diffora search over"}
    return {slug: ours[named.get(slug, slug)][0] for slug in FORMULAS}


def measure(slug: str, width: int, repeats: int) -> dict[str, float]:
    args = argparse.Namespace(width=width, tokens=TOKENS, repeats=repeats, device="cpu", dtype=torch.float32)
    found = adapters.race(makers(width)[slug], adapters.lora, adapters.block, args)
    return {"seconds": found["seconds"][0], "ratio": found["time_ratio"]}


def draw(rows: dict[str, dict[str, dict[str, float]]], out: Path) -> None:
    """Small multiples, one an adapter: dots measured, line counted."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "weft", "font.family": "sans-serif", "font.size": 9}
    from matplotlib import pyplot as plt

    columns = 5
    figure, grid = plt.subplots(math.ceil(len(rows) / columns), columns, figsize=(11, 8.4), sharex=True, sharey=True)
    cells = iter(grid.flat)
    for slug, points in rows.items():
        cell = next(cells)
        widths = [int(width) for width in points]
        cell.axhline(1, color="#bbb", linewidth=0.8)
        cell.plot(widths, [expected(slug, TOKENS, width) for width in widths], color="#888", linewidth=1.5)
        cell.plot(widths, [p["ratio"] for p in points.values()], "o", color="#2a5db0", markersize=4)
        cell.set_title(slug, fontsize=9, loc="left")
        cell.set_xscale("log", base=2)
        cell.set_yscale("log", base=2)
        cell.set_yticks([0.5, 1, 2, 4, 8], ["½", "1", "2", "4", "8"], fontsize=7)
        cell.minorticks_off()
        cell.set_xticks(WIDTHS, [str(w) for w in WIDTHS], fontsize=7)
        cell.spines[["top", "right"]].set_visible(False)
    for cell in cells:
        cell.set_visible(False)
    figure.supxlabel("width of the layers", fontsize=9)
    figure.supylabel("step time / LoRA's (r = 8): dots measured, lines counted", fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--only", default="", help="adapters between commas; the file keeps the others")
    parser.add_argument("--widths", type=lambda text: [int(w) for w in text.split(",")], default=list(WIDTHS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    adapters.LAYERS = 2
    there = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    rows: dict[str, Any] = {slug: there["rows"].get(slug, {}) for slug in FORMULAS}
    if not args.draw:
        for width in args.widths:
            for slug in filter(None, args.only.split(",")) if args.only else FORMULAS:
                found = rows[slug][str(width)] = measure(slug, width, args.repeats if width < 4096 else 3)
                counted = expected(slug, TOKENS, width)
                print(f"{slug:14s} {width:5d}  {found['ratio']:6.2f}x of LoRA, counted {counted:.2f}", flush=True)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        document = {
            "command": shlex.join(["python", *sys.argv]),
            "settings": {"tokens": TOKENS, "layers": adapters.LAYERS, "r": R},
            "device": adapters.processor(),
            "threads": torch.get_num_threads(),
            "commit": commit,
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1))
    draw({slug: points for slug, points in rows.items() if points}, PICTURE)


if __name__ == "__main__":
    main()
