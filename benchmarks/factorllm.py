"""FactorLLM on a small trained Llama: what a router that learns from the dense MLPs is worth, and the time it saves.

    python benchmarks/factorllm.py --data-dir DIR      trains, times, and prints the tables
    python benchmarks/factorllm.py --tables            measures nothing

DIR holds models/prose7m_llama, wikitext2 and c4_sample. Of N = 4 experts a token meets k = 2. Arms: units as they lie
or by k-means; with the router's loss (PA), with the task's alone, whose routers stay as they were drawn, and without
training. They train on windows of 256 tokens of wikitext2's validation text, four a step, but for its last 32, which
choose the learning rate; the test windows are those of compression.py. Each arm has a rate of its own, from a grid
about the card's (arms.py). What is in results/factorllm/ is not measured again: killed, the same command goes on.

A claim is an order of nats a token, with the 95 % interval over test windows and seeds; who loses more than ln 2 on the
dense model has collapsed. Times are of one thread, one model after the other in turns: ratios of medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
from adapters import processor
from compression import LENGTH, corpora, losses, text
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PrinterCallback, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils import logging

import weft
from weft.files import write_text
from weft.linear.routed_mlp import RoutedMlp
from weft.run.compare import commit

PARTITIONS = ("contiguous", "kmeans")
FORMS: dict[str, dict[str, float] | None] = {
    "PA": {},
    "task alone": {"route_weight": 0.0, "balance_weight": 0.0},
    "untrained": None,
}
ARMS = ["dense", *(f"{partition}, {form}" for form in FORMS for partition in PARTITIONS)]
PAIRS = [
    *(("dense", f"{partition}, PA") for partition in PARTITIONS),
    *((f"{partition}, PA", f"{partition}, task alone") for partition in PARTITIONS),
    *((f"{partition}, task alone", f"{partition}, untrained") for partition in PARTITIONS),
    *((f"kmeans, {form}", f"contiguous, {form}") for form in FORMS),
]
PROBLEM, CORPORA, HELD_OUT, BATCH = "prose7m_llama", ("wikitext2", "c4"), 32, 4
RECIPE = weft.card("factorllm").recipe
OUT = arms.RESULTS / "factorllm"


def model_of(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def built(arm: str, path: Path, rows: list[dict[str, Any]], rate: float, steps: int, seed: int) -> Any:
    """An arm's model, trained where it is."""
    model = model_of(path)
    if arm == "dense":
        return model
    partition, form = arm.split(", ")
    weft.compress(model, "factorllm", partition=partition, seed=seed)
    options = FORMS[form]
    if options is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, warmup_steps=steps // 20,
            weight_decay=RECIPE["weight_decay"], max_grad_norm=RECIPE["max_grad_norm"], lr_scheduler_type="cosine",
            adam_beta2=0.95, seed=seed, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = weft.distiller(model, model_of(path), "factorllm", options=options, args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """A run of an arm: what it loses on held-out windows, or on those of the test."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started, data = time.perf_counter(), Path(context["data_dir"])
    path = data / "models" / PROBLEM
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text(data / "wikitext2" / "valid.txt.gz"))["input_ids"]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    rows = [{"input_ids": row, "labels": row} for row in windows[:-HELD_OUT]]
    model = built(job["arm"], path, rows, job["rate"], job["steps"], job["seed"])
    row: dict[str, Any] = {"validation": arms.finite(float(np.mean(losses(model, windows[-HELD_OUT:]))))}
    if job["phase"] == "test":
        test = corpora(data, tokenizer)
        found = {name: np.array(losses(model, test[name])) for name in CORPORA}
        row["scores"] = {name: float(each.mean()) for name, each in found.items()}
        draws = {name: arms.counts(len(each), job["seed"]) @ each / len(each) for name, each in found.items()}
        row["draws"] = {name: [float(f"{value:.6g}") for value in each] for name, each in draws.items()}
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


# --- time -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def ratio(one: Any, other: Any, x: Any, repeats: int) -> float:
    """How many times as long one takes as the other, in turns."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(2 * repeats + 2):
        started = time.perf_counter()
        (one, other)[turn % 2](x)
        seconds[turn % 2].append(time.perf_counter() - started)
    return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])


def timed(path: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """The time of two of four experts, as a share of the dense MLP's and of the dense model's."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    for width, units in ((256, 704), (2048, 5632)):
        mlp = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=units)).eval()
        router = torch.randn(4, width + 1, generator=draw) * width**-0.5
        made = RoutedMlp.of(mlp, experts=4, active=2).fill(mlp, torch.arange(units), router[:, :-1], router[:, -1])
        for tokens in (1, 16, 256, 2048 if width == 256 else 512):
            x = torch.randn(tokens, width, generator=draw)
            yield {"what": f"MLP, {width} × {units}", "tokens": tokens, "ratio": ratio(made, mlp, x, repeats)}
    dense = model_of(path)
    routed = copy.deepcopy(dense)
    weft.compress(routed, "factorllm")
    for tokens in (1, 256, 2048):
        ids = torch.randint(5, 4096, (max(tokens // LENGTH, 1), min(tokens, LENGTH)), generator=draw)
        yield {"what": PROBLEM, "tokens": tokens, "ratio": ratio(routed, dense, ids, repeats)}


def study_of(seeds: int = 3, steps: int = 100, out: Path = OUT) -> arms.Study:
    still = ["dense", *(arm for arm in ARMS if arm.endswith("untrained"))]
    lengths = {"rate": steps // 4, "test": steps}
    return arms.Study(out / "runs.jsonl", [PROBLEM], ARMS, seeds, RECIPE["learning_rate"], lengths, still)


def tested_arms(study: arms.Study) -> dict[str, list[arms.Row]]:
    tested = {arm: rows for (_, arm), rows in study.tested().items()}
    return {arm: tested[arm] for arm in ARMS if arm in tested}


def verdicts(mine: dict[str, list[arms.Row]]) -> Iterator[tuple[str, str, str, str, str]]:
    """Who is said to lose less than whom on which corpus, the word for it, and the difference."""
    for one, other in PAIRS:
        for corpus in CORPORA if one in mine and other in mine else ():
            word, shown = arms.order(mine[one], mine[other], corpus, higher=False)
            yield one, other, corpus, "collapsed" if arms.collapsed(mine, one, "dense", corpus) else word, shown


def report(study: arms.Study, times: Path) -> Iterator[str]:
    mine = tested_arms(study)

    def cell(arm: str, corpus: str) -> str:
        word = " collapsed" if arms.collapsed(mine, arm, "dense", corpus) else ""
        loss = float(np.mean([row["scores"][corpus] for row in mine[arm]]))
        return f"{arms.mean(mine[arm], corpus, 3)}, perplexity {math.exp(loss):.1f}{word}"

    rows = ([arm, f"{runs[0]['rate']:g}", *(cell(arm, corpus) for corpus in CORPORA)] for arm, runs in mine.items())
    yield from arms.table(["arm", "rate", *CORPORA], rows)
    yield ""
    for one, other, corpus, word, shown in verdicts(mine):
        yield f"- {one} below {other} on {corpus}: {shown}, {word}"
    if times.exists():
        found = json.loads(times.read_text(encoding="utf-8"))["times"]
        cells = ([each["what"], f"{each['tokens']:,}", f"{each['ratio']:.2f}"] for each in found)
        yield from ("", *arms.table(["time of", "tokens", "of the dense one's"], cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of a tested run; a quarter of them try a rate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="of each time")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    logging.disable_progress_bar()
    study = study_of(args.seeds, args.steps, args.out)
    times = args.out / "times.json"
    if not args.tables:
        if args.data_dir is None:
            parser.error("--data-dir is where the model and the texts lie; or --tables")
        versions = {"torch": torch.__version__, "weft": weft.__version__}
        made_by = {"device": processor(), "commit": commit(), "versions": versions}
        study.run(measure, {"data_dir": str(args.data_dir), "made_by": made_by}, args.workers)
        if not times.exists():
            found = list(timed(args.data_dir / "models" / PROBLEM, args.repeats))
            write_text(times, json.dumps({**made_by, "times": found}, indent=1) + "\n")
    print("\n".join(report(study, times)))


if __name__ == "__main__":
    main()
