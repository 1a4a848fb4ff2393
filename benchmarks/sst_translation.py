"""SST in a translator from random weights: Multi30k, German to English, beside full training and three of low rank.

    python benchmarks/sst_translation.py --data-dir DIR     results/sst/translation.jsonl, and the tables
    python benchmarks/sst_translation.py --tables           the tables alone, from the file

DIR holds multi30k_de_en/. A Marian transformer of width 128 (two layers each side, MLPs of 512, four heads, one table
of 4,000 tokens for both languages, a byte-level BPE of the training split) is trained by Seq2SeqTrainer: batches of 64
sentences of about one length, in bfloat16, AdamW without decay, a tenth of the steps warm-up, then a cosine. In all
arms but the first the linear layers of both sides have r = 16, an eighth of the width; all else is trained in every
arm.

    full      every weight
    lowrank   W = B·A
    relora    W, at rest, and B·A, which is added to it four times
    sst       all singular values of W, and r pairs of its vectors at a time, drawn anew every 40 steps
    lora      PEFT's: W, random and at rest, and B·A

Rates are around 1e-3, chosen on the validation split after 300 steps; the others take 1,200, with three seeds, which
draw weights and batches. The test split is read by these alone: nats a token of the reference, and sacrebleu's BLEU of
greedy answers. The intervals are of a paired bootstrap over test sentences and seeds; an arm whose perplexity is twice
full training's has collapsed, and is better than none. Killed, the same command goes on. About an hour of two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
import transformers as hf
from adapters import processor
from peft import LoraConfig, get_peft_model
from sanity import open_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import weft
from weft.files import whole_file
from weft.run.compare import commit

OUT = arms.RESULTS / "sst" / "translation.jsonl"
WIDTH, RANK, VOCABULARY = 128, 16, 4000
BATCH, LONGEST = 64, 60  # sentences; tokens of an answer
STEPS, RATE = {"rate": 300, "test": 1200}, 1e-3
PAD, END = 0, 1
LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FORMS: dict[str, dict[str, Any]] = {
    "lowrank": {},
    "relora": {"lora_alpha": RANK, "relora_steps": 240, "restart_warmup": 20},
    "sst": {"iteration_steps": 40, "restart_warmup": 5},
}
ARMS = ["full", *FORMS, "lora"]
PAIRS = [("sst", "lora"), ("sst", "relora"), ("sst", "lowrank"), ("sst", "full")]
HIGHER = {"BLEU": True, "loss": False}

# --- the data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Token ids, each with the end, and what they should say."""

    source: list[int]
    target: list[int]
    reference: str


def read(data: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in open_text(data / "multi30k_de_en" / f"{split}.jsonl").splitlines()]


def tokenizer(data: Path, path: Path) -> Path:
    """Where the tokenizer lies, which is made of the training split where there is none."""
    if not path.exists():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator((text for row in read(data, "train") for text in row.values()), trainer)
        with whole_file(path) as partial:
            made.save(str(partial))
    return path


@functools.cache
def pairs(data: Path, split: str, tokenizer: Path) -> list[Pair]:
    rows, bpe = read(data, split), Tokenizer.from_file(str(tokenizer))
    source, target = ([[*e.ids, END] for e in bpe.encode_batch([row[side] for row in rows])] for side in ("de", "en"))
    return [Pair(a, b, row["en"]) for a, b, row in zip(source, target, rows)]


def in_order(rows: Sequence[Pair], steps: int, seed: int) -> list[Pair]:
    """The rows of so many batches, one after the other; a batch has sentences of about one length."""
    draw, lengths = np.random.default_rng([2, seed]), np.array([len(row.source) + len(row.target) for row in rows])
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        shuffled = draw.permutation(len(rows))
        sorted_ = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        batches += list(draw.permutation(sorted_[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)))
    return [rows[i] for batch in batches[:steps] for i in batch]


def batch(rows: Sequence[Pair]) -> dict[str, Tensor]:
    source, labels = (
        pad_sequence([torch.tensor(getattr(row, side)) for row in rows], batch_first=True, padding_value=value)
        for side, value in (("source", PAD), ("target", -100))
    )
    return {"input_ids": source, "attention_mask": (source != PAD).long(), "labels": labels}


# --- the arms ---------------------------------------------------------------------------------------------------------


def built(arm: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 4 * WIDTH, "decoder_ffn_dim": 4 * WIDTH}
    config = hf.MarianConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, **heads, **layers, max_position_embeddings=256, init_std=WIDTH**-0.5,
        dropout=0.1, scale_embedding=True, pad_token_id=PAD, eos_token_id=END, forced_eos_token_id=None,
        decoder_start_token_id=PAD, attn_implementation="eager",
    )  # fmt: skip
    model = hf.MarianMTModel(config)
    if arm == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR))
        for name, p in model.named_parameters():  # what is no W is trained, as in the other arms
            p.requires_grad_("base_layer.weight" not in name and "embed_positions" not in name)
    elif arm != "full":
        weft.reparametrise(model, arm, rank=RANK, seed=seed, target_modules=LINEAR, **FORMS[arm])
    return model


def train(model: nn.Module, rows: Sequence[Pair], rate: float, steps: int, seed: int, folder: str) -> None:
    args = hf.Seq2SeqTrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, weight_decay=0.0,
        warmup_steps=steps // 10, lr_scheduler_type="cosine", seed=seed, train_sampling_strategy="sequential",
        remove_unused_columns=False, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, bf16=True,
    )  # fmt: skip
    optimizers = weft.optimizer_and_scheduler(model, args)
    ordered = in_order(rows, steps, seed)
    trainer = hf.Seq2SeqTrainer(model, args, train_dataset=ordered, data_collator=batch, optimizers=optimizers)
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train()


@torch.no_grad()
def nats(model: nn.Module, rows: Sequence[Pair]) -> np.ndarray:
    """Sum and count over each target's tokens: rows × 2."""
    found = []
    for start in range(0, len(rows), 100):
        each = batch(rows[start : start + 100])
        logits, labels = model(**each).logits, each["labels"]
        found.append(cross_entropy(logits.mT, labels, reduction="none").sum(1))
    return np.stack([torch.cat(found).double().numpy(), [len(row.target) for row in rows]], 1)


@torch.no_grad()
def answers(model: Any, rows: Sequence[Pair], bpe: Tokenizer) -> list[str]:
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].source))
    said: dict[int, str] = {}
    for start in range(0, len(rows), 100):
        chosen = by_length[start : start + 100]
        each = batch([rows[i] for i in chosen])
        ids = model.generate(
            input_ids=each["input_ids"], attention_mask=each["attention_mask"], max_new_tokens=LONGEST,
            do_sample=False, num_beams=1,
        )  # fmt: skip
        texts = bpe.decode_batch(ids.tolist(), skip_special_tokens=True)
        said |= {i: text.strip() for i, text in zip(chosen, texts)}
    return [said[i] for i in range(len(rows))]


# --- a run and the figures --------------------------------------------------------------------------------------------


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    data, bpe = Path(context["data_dir"]), Path(context["tokenizer"])
    model = built(job["arm"], job["seed"])
    train(model, pairs(data, "train", bpe), job["rate"], job["steps"], job["seed"], context["folder"])
    model.eval()
    sums = nats(model, pairs(data, "val", bpe)).sum(0)
    row: dict[str, Any] = {
        "validation": arms.finite(sums[0] / sums[1]),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if job["phase"] == "test":
        test = pairs(data, "test_2016_flickr", bpe)[: context["sentences"]]
        said = answers(model, test, Tokenizer.from_file(str(bpe)))
        scores = {"loss": ratio(nats(model, test)), "BLEU": bleu(said, [each.reference for each in test])}
        draws = arms.counts(len(test), job["seed"])
        row["scores"] = {name: score(np.ones(len(test))) for name, score in scores.items()}
        row["draws"] = {name: arms.drawn(score, draws) for name, score in scores.items()}
        row["examples"] = said[:3]
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


def ratio(sums: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda counts: float(np.divide(*(counts @ sums)))


def bleu(said: Sequence[str], references: Sequence[str]) -> Callable[[np.ndarray], float]:
    """BLEU of a corpus in which each sentence is as often as is said."""
    from sacrebleu.metrics import BLEU

    each = [BLEU(effective_order=True).sentence_score(a, [b]) for a, b in zip(said, references)]
    found = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in each], dtype=np.int64)

    def score(counts: np.ndarray) -> float:
        sums = [int(value) for value in counts.astype(np.int64) @ found]
        return float(BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score)

    return score


Tested = dict[str, list[dict[str, Any]]]  # by arm


def losses(tested: Tested) -> dict[str, float]:
    return {arm: float(np.mean([run["scores"]["loss"] for run in runs])) for arm, runs in tested.items()}


def verdicts(tested: Tested) -> Iterator[tuple[str, str, str, str, str]]:
    """Of each pair of arms and score: both, the score, which is better, and by how much."""
    each = losses(tested)
    wreckage = {arm for arm, loss in each.items() if not loss < each.get("full", math.inf) + math.log(2)}
    for one, other in PAIRS:
        for score, higher in HIGHER.items() if {one, other} <= set(tested) else ():
            word, shown = arms.order(tested[one], tested[other], score, higher)
            better = {"holds": one, "reversed": other}.get(word)
            yield one, other, score, "collapsed" if better in wreckage else word, shown


def report(study: arms.Study) -> Iterator[str]:
    mine = {arm: runs for (_, arm), runs in study.tested().items()}
    if not mine:
        return
    each = losses(mine)
    yield from ("", f"multi30k, {max(map(len, mine.values()))} seeds", "")
    rows = (
        [
            arm, f"{mine[arm][0]['trained']:,}", f"{mine[arm][0]['rate']:g}", arms.mean(mine[arm], "loss", 4),
            f"{math.exp(each[arm]):.2f}", arms.mean(mine[arm], "BLEU", 2),
        ]
        for arm in study.arms if arm in mine
    )  # fmt: skip
    yield from arms.table(["arm", "trained", "rate", "loss, nats a token", "perplexity", "BLEU"], rows)
    yield ""
    for one, other, score, word, shown in verdicts(mine):
        near, apart = arms.close(mine[one], mine[other], score, HIGHER[score])
        yield f"- {one} better than {other} in {score}: {shown}, {word}; close: {apart}, {near}"
    if {"full", "sst", "lora"} <= set(mine):
        for score, higher in HIGHER.items():
            full, sst, lora = (np.mean([run["scores"][score] for run in mine[arm]]) for arm in ("full", "sst", "lora"))
            if (lora < full) == higher:
                yield f"- of lora's distance to full in {score}, sst leaves {(full - sst) / (full - lora):.0%}"


def study_of(only: Sequence[str] = ARMS, seeds: int = 3, steps: dict[str, int] = STEPS, out: Path = OUT) -> arms.Study:
    return arms.Study(out, ["multi30k"], only, seeds, RATE, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", default=",".join(ARMS), help="arms between commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=[*STEPS.values()], metavar=("RATE", "TEST"))
    parser.add_argument("--sentences", type=int, default=1000, help="of the test split")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    study = study_of(args.only.split(","), args.seeds, dict(zip(STEPS, args.steps)), args.out)
    if not args.tables:
        if args.data_dir is None:
            parser.error("--data-dir is where multi30k_de_en/ lies; or --tables")
        folder = Path("build") / "studies" / "sst_translation"
        versions = {"torch": torch.__version__, "transformers": hf.__version__, "weft": weft.__version__}
        context = {
            "data_dir": str(args.data_dir),
            "tokenizer": str(tokenizer(args.data_dir, folder / "tokenizer.json")),
            "folder": str(folder),
            "sentences": args.sentences,
            "made_by": {"device": processor(), "commit": commit(), "versions": versions},
        }
        study.run(measure, context, args.workers)
    print("\n".join(report(study)))


if __name__ == "__main__":
    main()
