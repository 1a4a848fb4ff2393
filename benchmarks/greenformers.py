"""Two low-rank transformers by the length of their input: thin factors (LRT) and sums over the sequence (Linformer).

    python benchmarks/greenformers.py                       time and memory, docs/assets/greenformers.svg
    python benchmarks/greenformers.py --draw                the tables and the picture alone, from the file
    python benchmarks/greenformers.py --accuracy --data-dir DIR     a small classifier from random weights

Rows go to benchmarks/results/greenformers, a line each; killed, the same command goes on. About a quarter of an hour of
two idle cores in all (`pip install weft[plots]` for the picture).

Time and memory: an encoder layer of BERT's, 256 wide (four heads, MLP of 1024), and a model of four of them, on 2048
tokens in sequences of n = 64 to 2048.

    dense            BERT's, eager attention or torch's own (sdpa), which never holds all scores
    lrt              all linear layers factorised, ranks a quarter of the break-even
    linformer 128    keys and values of 128 sums over the sequence, made for 2048 tokens
    linformer 256    of 256

Sides take turns, medians are divided by the dense one's. Memory is the peak above the model and its inputs, each side
in a process of its own. The crossover is the length from which Linformer needs less than LRT, between two lengths on a
log scale.

--accuracy: SST-2 (DIR/glue), two layers 128 wide on the 8000 most frequent words, AdamW, rates around 1e-3 chosen on
2000 rows of the training split; three seeds, the development split read once for each. LRT's factors are drawn at
random, a quarter of the break-even rank again; Linformer has 16 sums for 64 words at most. The interval of the
difference to full is a paired bootstrap's over rows and seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
import transformers as hf
from adapters import processor
from factorised import EXACT
from sanity import open_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.models.bert.modeling_bert import BertLayer
from trp import Rows

import weft
from weft.compress.greenformers import linformer
from weft.run.compare import commit

RESULTS = arms.RESULTS / "greenformers"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "greenformers.svg"
KEEP, LONGEST, TOKENS = 0.25, 2048, 2048
SIDES = ("dense", "lrt", "linformer 128", "linformer 256")
WAYS = ("forward", "forward and backward")
CASES = (("layer", "sdpa"), ("layer", "eager"), ("model", "sdpa"))

# --- time and memory --------------------------------------------------------------------------------------------------


def built(of: str, attention: str, side: str) -> nn.Module:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=LONGEST, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )  # fmt: skip
    model: nn.Module = BertLayer(config) if of == "layer" else hf.BertModel(config, add_pooling_layer=False)
    if side == "lrt":
        weft.compress(model, "greenformers", keep=KEEP, solver="random")
    elif side != "dense":
        linformer(model, k=int(side.split()[1]), n=LONGEST)
    return model


def work(of: str, attention: str, side: str, way: str, n: int) -> Callable[[], None]:
    """One pass over all tokens, in sequences of n."""
    model = built(of, attention, side)
    shape = (max(TOKENS // n, 1), n)
    x = torch.randn(*shape, 256, requires_grad=True) if of == "layer" else torch.randint(1000, shape)

    def forward() -> Tensor:
        y = model(x)
        return y if isinstance(y, Tensor) else y.last_hidden_state

    def once() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        forward().square().mean().backward()
        model.zero_grad()
        x.grad = None

    return once if way == "forward" else both


def seconds(of: str, attention: str, way: str, n: int, repeats: int) -> dict[str, float]:
    """Of each side, medians of turns."""
    passes = {side: work(of, attention, side, way, n) for side in SIDES}
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(repeats + 1):
        for side, run in passes.items():
            start = time.perf_counter()
            run()
            if turn:
                found[side].append(time.perf_counter() - start)
    return {side: statistics.median(each) for side, each in found.items()}


def peaks(of: str, attention: str, side: str, lengths: list[int]) -> dict[str, dict[str, int]]:
    """Bytes of each way and length, in this process, the longest last."""
    from weft.run.measure import measuring_memory

    found: dict[str, dict[str, int]] = {way: {} for way in WAYS}
    for n in lengths:
        for way in WAYS:
            work(of, attention, side, way, 64)()  # what is made once
            run = work(of, attention, side, way, n)
            with measuring_memory() as seen:
                run()
            found[way][str(n)] = seen.peak_bytes or 0
    return found


def measured(path: Path | None = None) -> Rows:
    """The rows of times and memory that are there."""
    return Rows(path or RESULTS / "lengths.jsonl", {"tokens": TOKENS, "keep": KEEP, "longest": LONGEST})


def lengths_study(args: argparse.Namespace) -> None:
    lengths = [n for n in (64, 128, 256, 512, 1024, 2048) if n <= args.longest]
    rows = measured(args.out)

    def time_of(measure: str, of: str, attention: str, way: str, n: int) -> dict[str, Any]:
        print(f"{of}, {attention}, {way}, n = {n}", flush=True)
        threads = torch.get_num_threads()
        return {"seconds": seconds(of, attention, way, n, args.repeats), "repeats": args.repeats, "threads": threads}

    def memory_of(measure: str, of: str, attention: str, side: str, lengths: list[int]) -> dict[str, Any]:
        print(f"{of}, {attention}, memory of {side}", flush=True)
        asked = json.dumps([of, attention, side, lengths])
        command = [sys.executable, __file__, "--peaks-of", asked]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=EXACT)
        return {"bytes": json.loads(done.stdout.splitlines()[-1])}

    if not args.draw:
        for of, attention in CASES:
            for way in WAYS:
                for n in lengths:
                    rows.row(time_of, measure="time", of=of, attention=attention, way=way, n=n)
            for side in SIDES:
                rows.row(memory_of, measure="memory", of=of, attention=attention, side=side, lengths=lengths)
    found = ratios(rows)
    print("\n".join(tables(found)))
    if args.longest == LONGEST:
        draw(found)


Ratios = dict[tuple[str, str, str, str], dict[str, dict[int, float]]]  # measure, of, attention, way → side → n → ratio


def ratios(rows: Rows) -> Ratios:
    """Everything in times of the dense side's."""
    found: Ratios = {}
    held: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for row in rows.rows if row["settings"] == rows.settings):
        if row["measure"] == "memory":
            held.setdefault((row["of"], row["attention"]), {})[row["side"]] = row["bytes"]
            continue
        here = found.setdefault(("time", row["of"], row["attention"], row["way"]), {side: {} for side in SIDES})
        for side in SIDES:
            here[side][row["n"]] = row["seconds"][side] / row["seconds"]["dense"]
    for (of, attention), bytes_of in held.items():
        for way in WAYS if set(bytes_of) == set(SIDES) else ():
            dense = bytes_of["dense"][way]
            found["memory", of, attention, way] = {
                side: {int(n): bytes_of[side][way][n] / dense[n] for n in dense} for side in SIDES
            }
    return found


def crossover(one: dict[int, float], other: dict[int, float]) -> str:
    """From which length on the second is below the first."""
    apart = {n: math.log(one[n] / other[n]) for n in sorted(one)}  # above 0 where the second is lower
    lengths = list(apart)
    last = next((n for n in reversed(lengths) if apart[n] <= 0), None)  # the longest at which the first is as good
    if last is None:
        return f"below {lengths[0]}"
    if last == lengths[-1]:
        return f"above {last}"
    after = lengths[lengths.index(last) + 1]
    share = apart[last] / (apart[last] - apart[after])
    return f"about {round(math.exp((1 - share) * math.log(last) + share * math.log(after)), -1):.0f}"


def tables(found: Ratios) -> Iterator[str]:
    for (measure, of, attention, way), sides in found.items():
        lengths = sorted(sides["dense"])
        yield f"\n{measure} of a {of}, {attention}, {way}, in times of the dense one's\n"
        shown = ([side, *(f"{sides[side][n]:.2f}" for n in lengths)] for side in SIDES[1:])
        yield from arms.table(["", *(f"n = {n}" for n in lengths)], shown)
        yield ""
        for side in SIDES[2:]:
            yield f"- {side} needs less than lrt from n = {crossover(sides['lrt'], sides[side])} on"


def turns(found: Ratios) -> Iterator[tuple[str, str, str]]:
    """Of a layer's training step: which Linformer in what, from which length on it needs less than LRT, and whether
    that is as the thesis says, which has LRT up to 512 and Linformer from there on."""
    for (measure, of, attention, way), sides in found.items():
        if (of, way) != ("layer", WAYS[1]) or not {256, 1024} <= set(sides["lrt"]):
            continue
        for side in SIDES[2:]:
            low, high = (sides["lrt"][n] < sides[side][n] for n in (256, 1024))
            word = "holds" if low and not high else "reversed"
            yield f"{side}, {measure}, {attention} attention", crossover(sides["lrt"], sides[side]), word


def draw(found: Ratios) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "weft", "font.family": "sans-serif", "font.size": 9}
    from matplotlib import pyplot as plt

    cells = [(measure, attention) for measure in ("time", "memory") for attention in ("sdpa", "eager")]
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.2), sharex=True, sharey="row")
    for cell, (measure, attention) in zip(axes.flat, cells):
        sides = found.get((measure, "layer", attention, WAYS[1]))
        if sides is None:
            continue
        lengths = sorted(sides["dense"])
        cell.axhline(1, color="#bbb", linewidth=0.8)
        for side, marker in zip(SIDES[1:], "os^"):
            values = [sides[side][n] for n in lengths]
            cell.plot(lengths, values, marker=marker, markersize=4, linewidth=1.5, label=side)
        cell.set_xscale("log", base=2)
        cell.set_xticks(lengths, [str(n) for n in lengths])
        cell.set_ylim(bottom=0)
        cell.spines[["top", "right"]].set_visible(False)
        cell.set_title(f"{measure}, {attention} attention", fontsize=9)
    for cell in axes[1]:
        cell.set_xlabel("tokens in a sequence")
    for cell in axes[:, 0]:
        cell.set_ylabel("a dense layer's = 1")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


# --- accuracy ---------------------------------------------------------------------------------------------------------

WORDS, PLACES, BATCH, HELD_OUT = 8000, 64, 64, 2000
STEPS, RATE = {"rate": 300, "test": 800}, 1e-3
ARMS = ("full", "lrt", "linformer")
Split = list[tuple[Tensor, int]]


@functools.cache
def splits(data: Path) -> dict[str, Split]:
    """Ids of words, and the label; the last rows of the training split are for validation."""
    read = {split: [json.loads(line) for line in open_text(data / "glue" / f"sst2_{split}.jsonl").splitlines()]
            for split in ("train", "dev")}  # fmt: skip
    order = torch.randperm(len(read["train"]), generator=torch.Generator().manual_seed(0)).tolist()
    train = [read["train"][i] for i in order]
    counts = Counter(word for row in train[:-HELD_OUT] for word in row["text"].split())
    ids = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(WORDS - 2))}  # 0 is padding, 1 any other word

    def rows(found: list[dict[str, Any]]) -> Split:
        words = [[ids.get(word, 1) for word in row["text"].split()][:PLACES] for row in found]
        return [(torch.tensor(each), row["label"]) for each, row in zip(words, found)]

    return {"train": rows(train[:-HELD_OUT]), "validation": rows(train[-HELD_OUT:]), "test": rows(read["dev"])}


def together(rows: Split) -> dict[str, Tensor]:
    ids = pad_sequence([row for row, _ in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": torch.tensor([label for _, label in rows])}


def classifier(arm: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = hf.BertConfig(
        vocab_size=WORDS, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=PLACES, num_labels=2,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config)
    if arm == "lrt":
        weft.compress(model, "greenformers", keep=KEEP, solver="random", seed=seed, include=r".*encoder\..*")
    elif arm == "linformer":
        linformer(model, k=16, n=PLACES, seed=seed)
    return model


def train(model: Any, rows: Split, rate: float, steps: int, seed: int) -> None:
    """Batches of about one length, in an order that the seed draws."""
    draw = np.random.default_rng([3, seed])
    lengths = np.array([len(row) for row, _ in rows])
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        shuffled = draw.permutation(len(rows))
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        batches += list(draw.permutation(by_length[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = hf.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for chosen in batches[:steps]:
        optimizer.zero_grad()
        model(**together([rows[i] for i in chosen])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def logits(model: Any, rows: Split) -> Tensor:
    return torch.cat([model(**together(rows[i : i + 200])).logits for i in range(0, len(rows), 200)])


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    started, rows = time.perf_counter(), splits(Path(context["data_dir"]))
    model = classifier(job["arm"], job["seed"])
    train(model, rows["train"], job["rate"], job["steps"], job["seed"])
    labels = torch.tensor([label for _, label in rows["validation"]])
    row: dict[str, Any] = {
        "validation": arms.finite(float(cross_entropy(logits(model, rows["validation"]), labels))),
        "encoder": sum(p.numel() for p in model.bert.encoder.parameters()),
    }
    if job["phase"] == "test":
        right = (logits(model, rows["test"]).argmax(1) == torch.tensor([label for _, label in rows["test"]])).numpy()

        def accuracy(counts: np.ndarray) -> float:
            return float(counts @ right / counts.sum())

        row["scores"] = {"accuracy": accuracy(np.ones(len(right)))}
        row["draws"] = {"accuracy": arms.drawn(accuracy, arms.counts(len(right), job["seed"]))}
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


def verdict(study: arms.Study) -> Iterator[str]:
    mine = {arm: runs for (_, arm), runs in study.tested().items()}
    shown = ([arm, f"{runs[0]['encoder']:,}", f"{runs[0]['rate']:g}", arms.mean(runs, "accuracy", 4)]
             for arm, runs in mine.items())  # fmt: skip
    yield from arms.table(["arm", "numbers in the encoder", "rate", "accuracy"], shown)
    for arm, apart, word in near(study):
        yield f"\n- {arm} within a point of full: {apart}, {word}"


def near(study: arms.Study) -> Iterator[tuple[str, str, str]]:
    """Arms, how far they are from full, and the word for whether that is within a point."""
    mine = {arm: runs for (_, arm), runs in study.tested().items()}
    for arm in [arm for arm in ARMS[1:] if {arm, "full"} <= set(mine)]:
        word, shown = arms.within(mine[arm], mine["full"], "accuracy")
        yield arm, shown, word


def study_of(
    steps: Mapping[str, int] = STEPS, only: Sequence[str] = ARMS, seeds: int = 3, out: Path | None = None
) -> arms.Study:
    return arms.Study(out or RESULTS / "sst2.jsonl", ["sst2"], only, seeds, RATE, steps)


def accuracy_study(args: argparse.Namespace) -> None:
    study = study_of(dict(zip(STEPS, args.steps)), args.only.split(","), args.seeds, args.out)
    if not args.draw:
        versions = {"torch": torch.__version__, "transformers": hf.__version__, "weft": weft.__version__}
        made_by = {"device": processor(), "commit": commit(), "versions": versions}
        study.run(measure, {"data_dir": str(args.data_dir), "made_by": made_by}, args.workers)
    print("\n".join(verdict(study)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--accuracy", action="store_true", help="the classifier instead")
    parser.add_argument("--data-dir", type=Path, help="where glue/ lies")
    parser.add_argument("--repeats", type=int, default=5, help="of a pass that is timed")
    parser.add_argument("--longest", type=int, default=LONGEST, help="sequence that is tried")
    parser.add_argument("--only", default=",".join(ARMS), help="arms between commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=[*STEPS.values()], metavar=("RATE", "TEST"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the file of rows")
    parser.add_argument("--peaks-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peaks_of:
        print(json.dumps(peaks(*json.loads(args.peaks_of))))
    elif not args.accuracy:
        lengths_study(args)
    elif args.data_dir is None and not args.draw:
        parser.error("--data-dir is where glue/ lies")
    else:
        accuracy_study(args)


if __name__ == "__main__":
    main()
