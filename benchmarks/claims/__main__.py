"""The papers' claims, each tried on a problem small enough for a laptop. One file a method; the ledger is their sum.

    python benchmarks/claims                          every claim; benchmarks/results/claims and docs/ledger.md
    python benchmarks/claims --only sora,nola         some of them
    python benchmarks/claims --seeds 5 --workers 2    other seeds; what is measured already is kept
    python benchmarks/claims --ledger                 only write docs/ledger.md anew

A claim file has CLAIM (the paper's words in short), SETTING (what is tried here), NOT_HERE (what of the claim is not),
EXPECTED (orders between figures) and measure(seed), which returns the figures of one seed. A seed draws problem, model
and data anew. The verdict is over the seeds: holds or reversed where the 95 % interval says so, else tie.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core

import studies
from ledger import judge

import weft
from weft.files import write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "claims"
PAGE = ROOT / "docs" / "ledger.md"


def slugs() -> list[str]:
    """The methods that have a claim file."""
    return [slug for slug in sorted(weft.cards()) if Path(__file__).with_name(f"{slug}.py").exists()]


def read(slug: str) -> dict[int, dict[str, float]]:
    """The figures measured so far, by seed; a line that a kill cut short is none."""
    path = RESULTS / f"{slug}.jsonl"
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["seed"]] = row["figures"]
    return rows


def write(slug: str, rows: dict[int, dict[str, float]]) -> None:
    """All figures of a claim, whole or not at all."""
    lines = [json.dumps({"seed": seed, "figures": rows[seed]}) + "\n" for seed in sorted(rows)]
    write_text(RESULTS / f"{slug}.jsonl", "".join(lines))


def measure(slug: str, seed: int) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in importlib.import_module(slug).measure(seed).items()}


def run(wanted: list[str], seeds: int, workers: int) -> None:
    todo = [(slug, seed) for slug in wanted for seed in range(seeds) if seed not in read(slug)]
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(measure, *job): job for job in todo}
        for count, job in enumerate(as_completed(jobs), start=1):
            slug, seed = jobs[job]
            figures = job.result()
            write(slug, read(slug) | {seed: figures})
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"{count}/{len(todo)} {slug} seed {seed}: {shown}", flush=True)


def page() -> str:
    lines = [
        "# Ledger of claims",
        "",
        "What the papers claim, tried on problems small enough for a laptop. A small problem neither proves nor",
        "refutes a paper; it tells whether the mechanism does what it is said to do. Figures are means over seeds,",
        "each with a problem, a model and data of its own, followed by the 95 % bootstrap interval of the paired",
        "difference or ratio; learning rates are chosen on validation data, for every contender alike. `python",
        "benchmarks/claims` measures them all and writes this page; `--only <method>` measures one. What studies on",
        "[real models](#on-real-models-and-data) found stands at the end.",
    ]
    sections, summary, on_real_data = [], [], list(studies.page())
    for slug in slugs():
        rows = list(read(slug).values())
        if not rows:
            continue
        module = importlib.import_module(slug)
        verdicts = [judge(claim, rows) for claim in module.EXPECTED]
        counts = Counter(verdict.word for verdict in verdicts)
        shown = ", ".join(f"{counts[word]} {word}" for word in ("holds", "tie", "reversed") if counts[word])
        summary.append(f"| [`{slug}`](#{slug}) | {module.CLAIM} | {shown} |")
        sections += ["", f"## {slug}", "", f"*Claimed:* {module.CLAIM}", "", f"*Tried:* {module.SETTING}", ""]
        sections += [f"| {len(rows)} seeds | verdict |", "| --- | --- |"]
        sections += [f"| {verdict.words} | **{verdict.word}** |" for verdict in verdicts]
        sections += ["", f"*Not testable here:* {module.NOT_HERE}"]
        if any(line.startswith(f"| `{slug}` |") for line in on_real_data):
            sections += ["", "More of it was tried [on real data](#on-real-models-and-data)."]
        sections += ["", f"`python benchmarks/claims --only {slug}`"]
    lines += ["", "| method | claim | what was tried of it |", "| --- | --- | --- |", *summary, *sections]
    lines += ["", *on_real_data]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(slugs()))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ledger", action="store_true", help="measure nothing, write the page")
    args = parser.parse_args()
    wanted = args.only.split(",")
    unknown = sorted(set(wanted) - set(slugs()))
    if unknown:
        sys.exit(f"no claim file for {', '.join(unknown)}; there are: {', '.join(slugs())}")
    if not args.ledger:
        run(wanted, args.seeds, args.workers)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
