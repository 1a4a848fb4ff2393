"""Few shots with a dual encoder: new alphabets of Omniglot, by adapters, by full training and by a linear probe.

    python benchmarks/omniglot.py --data-dir DIR     results/omniglot/few_shot.jsonl, and the table; killed, it goes on
    python benchmarks/omniglot.py --table            the table alone, from the file

DIR holds omniglot_small: handwritten characters, twenty drawers each. A CLIP is made from its config and trained here,
contrastively, on the five alphabets of background_small1 (136 characters, 52 × 52 scaled to 28 × 28, turned and moved a
little), with names like "Greek, character 7" as texts: small enough to train in minutes, and no stand-in for what web
data gives. It is kept in the work folder. Characters of an alphabet that it has never seen cannot be known from such a
name, so what it knows before any training is next to nothing, and all that is measured is adaptation.

The task is to tell apart the 106 characters of the three alphabets of background_small2 that are not in small1 too
(Greek and Latin are, drawing by drawing), from 1, 2, 4, 8 or 16 drawings each. A seed draws the order of the drawers:
two are for validation, the next ones are the shots, and all others the test. Adapters go on every linear layer of both
sides, scaled alike (s = 2, but CoDyRA's own 1); 160 steps of AdamW without decay, batches of 32, a cosine after a
warm-up of a twentieth; rates around 3e-3, chosen on the validation drawers' loss after 80 steps. The probe is a new
head on the frozen vision side. The intervals are of a paired bootstrap over test drawings and seeds. About 40 minutes
of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
from adapters import processor
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate

import weft
from weft.files import whole_folder
from weft.run import data, models, sources
from weft.run.compare import commit
from weft.run.evaluate import measure_rows
from weft.run.methods import resolve
from weft.run.settings import TrainSettings
from weft.run.train import train

TASK, TEMPLATE = "image-classification", "{}"
SIDE, WIDTH, PATCH = 28, 64, 7
MEAN, DEVIATION = 0.08, 0.2  # of the ink
SHOTS, DRAWERS, VALIDATION = (1, 2, 4, 8, 16), 20, 2
STEPS, BATCH, RATE = 160, 32, 3e-3
PRETRAINING = {"steps": 1500, "learning_rate": 1e-3}
WORK = Path(__file__).parents[1] / "build" / "omniglot"
OUT = arms.RESULTS / "omniglot" / "few_shot.jsonl"

# arm → method and its options; equal r, equal parameters and equal rank of ΔW beside Block-LoRA
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-shot": ("base", {}),
    "Block-LoRA r=4, n=2": ("block_lora", {"r": 4, "n_blocks": 2, "lora_alpha": 8}),
    "LoRA r=4": ("peft:lora", {"r": 4, "lora_alpha": 8}),
    "LoRA r=3": ("peft:lora", {"r": 3, "lora_alpha": 6}),
    "LoRA r=2": ("peft:lora", {"r": 2, "lora_alpha": 4}),
    "CoDyRA r=4": ("codyra", {"r": 4}),
    "full": ("full", {}),
    "linear probe": ("head", {}),
}
BLOCK, EQUAL_R, EQUAL_SIZE, EQUAL_RANK = list(ARMS)[1:5]

# --- the data ---------------------------------------------------------------------------------------------------------


def drawings(folder: Path, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Drawings (52 × 52, 255 where there is ink), the number of each one's character, its drawer, and all names."""
    with np.load(folder / "omniglot_small" / f"background_small{part}.npz") as file:
        stored = dict(file)
    ink = np.unpackbits(stored["x_packed"], axis=-1)[..., :52] * np.uint8(255)
    firsts = {a: stored["char"][stored["alphabet"] == a].min() for a in np.unique(stored["alphabet"])}
    owner = dict(zip(stored["char"].tolist(), stored["alphabet"].tolist()))
    plain = [str(name).replace("_(", " ").replace("_", " ").rstrip(")") for name in stored["alphabet_names"]]
    names = [f"{plain[a]}, character {c - firsts[a] + 1}" for c, a in sorted(owner.items())]
    return ink, stored["char"].astype(np.int64), stored["drawer"], names


def task(folder: Path, shots: int, seed: int) -> sources.Rows:
    """The rows of a run: characters of the alphabets that the model was not trained on, split by drawers."""
    known = {name.partition(",")[0] for name in drawings(folder, 1)[3]}
    ink, character, drawer, names = drawings(folder, 2)
    new = [number for number, name in enumerate(names) if name.partition(",")[0] not in known]
    place = {number: label for label, number in enumerate(new)}
    order = np.random.default_rng([seed, 1]).permutation(DRAWERS)
    parts = np.split(order, (VALIDATION, VALIDATION + shots))

    def rows(drawers: np.ndarray) -> list[sources.Row]:
        chosen = [i for i in range(len(ink)) if drawer[i] in drawers and character[i] in place]
        return [{"image": ink[i], "label": place[character[i]]} for i in chosen]

    validation, training, test = map(rows, parts)
    return sources.Rows(training, validation, test, "image", labels=[names[number] for number in new])


# --- the model --------------------------------------------------------------------------------------------------------


def tokenizer(names: Sequence[str]) -> Any:
    """Words and numbers of all names."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in names for word, _ in split.pre_tokenize_str(text)})
    known = ["<pad>", "<unk>", "<s>", "</s>", *words]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = split
    ends = [("<s>", 2), ("</s>", 3)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def pretrained(folder: Path, work: Path, steps: int) -> Path:
    """Where the CLIP lies that was trained on background_small1; trained now, where it is not there."""
    from transformers import CLIPConfig, CLIPModel, ViTImageProcessorPil

    out = work / f"clip-{steps}"
    if out.exists():
        return out
    ink, character, _, names = drawings(folder, 1)
    words = tokenizer([*names, *drawings(folder, 2)[3]])
    side = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = {**side, "num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 20}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**side, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": PATCH, "num_channels": 1}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).train()
    read = words([TEMPLATE.replace("{}", name) for name in names], return_tensors="pt", padding=True)
    # a batch has one drawing of each character, so that no text fits two of its images
    places = torch.stack([torch.from_numpy(np.flatnonzero(character == c)) for c in range(len(names))])
    ink = interpolate(torch.from_numpy(ink)[:, None].float(), SIDE, mode="bilinear", antialias=True) / 255
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAINING["learning_rate"], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAINING["learning_rate"], steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(0)
    target = torch.arange(len(names))
    started = time.perf_counter()
    for step in range(steps):
        chosen = places.gather(1, torch.randint(places.shape[1], (len(names), 1), generator=draw))[:, 0]
        pixels = (moved(ink[chosen], draw) - MEAN) / DEVIATION
        logits = model(**read, pixel_values=pixels).logits_per_image
        loss = (cross_entropy(logits, target) + cross_entropy(logits.mT, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"CLIP, step {step + 1}: {loss:.3f} nats, {time.perf_counter() - started:.0f} s", flush=True)
    shape = {"height": SIDE, "width": SIDE}
    with whole_folder(out) as partial:
        model.eval().save_pretrained(partial)
        words.save_pretrained(partial)
        ViTImageProcessorPil(size=shape, image_mean=[MEAN], image_std=[DEVIATION]).save_pretrained(partial)
    return out


def moved(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images turned by up to 15 degrees, scaled by up to a tenth and moved by up to a tenth of their side."""
    angle, size, right, down = (torch.rand(4, len(images), generator=draw) * 2 - 1) * torch.tensor(
        [[0.26], [0.1], [0.2], [0.2]]
    )
    cos, sin = angle.cos() * (1 + size), angle.sin() * (1 + size)
    turns = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = affine_grid(turns, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


# --- a run and the figures --------------------------------------------------------------------------------------------


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    rows = task(Path(context["data_dir"]), int(job["problem"].split()[0]), job["seed"])
    name, options = ARMS[job["arm"]]
    reader = data.load_reader(context["model"], rows)
    splits = data.load_splits("omniglot", TASK, reader, rows=rows)
    prompts = [] if name == "head" else [TEMPLATE]
    base = models.load_base(
        context["model"], TASK, labels=rows.labels, seed=job["seed"], tokenizer=reader, prompts=prompts
    )
    settings = TrainSettings(
        max_steps=job["steps"], batch_size=BATCH, eval_batch_size=256, learning_rate=job["rate"], seed=job["seed"],
        weight_decay=0.0, warmup_ratio=0.05, lr_scheduler_type="cosine", eval_steps=0, save_steps=0,
    )  # fmt: skip
    result = train(base, splits, resolve(name, options), settings, None, progress=False)
    row = {"validation": arms.finite(result.validation["loss"]), "trained": result.trainable}
    if job["phase"] == "test":
        measured = measure_rows(result.model, splits.test, 256, range(len(splits.test)))
        right = np.array([predicted == true for *_, predicted, true in measured])
        draws = arms.counts(len(right), job["seed"])
        score = lambda counts: float(counts @ right / counts.sum())  # noqa: E731 — a score of counts, as arms wants it
        row["scores"] = {"accuracy": score(np.ones(len(right)))}
        row["draws"] = {"accuracy": arms.drawn(score, draws)}
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


def study_of(
    shots: Sequence[int] = SHOTS, seeds: int = 3, steps: int = STEPS, chosen: Sequence[str] = tuple(ARMS),
    out: Path = OUT,
) -> arms.Study:  # fmt: skip
    problems = [f"{each} shots" for each in shots]
    return arms.Study(out, problems, chosen, seeds, RATE, {"rate": steps // 2, "test": steps}, still=("zero-shot",))


def report(study: arms.Study) -> Iterator[str]:
    """Accuracy of every arm by shots, and the claims."""
    tested = study.tested()
    there = [problem for problem in study.problems if any((problem, arm) in tested for arm in study.arms)]

    def runs(arm: str, problem: str) -> list[arms.Row]:
        return tested.get((problem, arm), [])

    def cell(arm: str, problem: str) -> str:
        mine = runs(arm, problem)
        return f"{100 * np.mean([row['scores']['accuracy'] for row in mine]):.1f}" if mine else "·"

    sizes = {arm: next((f"{row['trained']:,}" for p in there for row in runs(arm, p)), "·") for arm in study.arms}
    rows = ([arm, sizes[arm], *(cell(arm, problem) for problem in there)] for arm in study.arms)
    most = max((len(runs(arm, problem)) for arm in study.arms for problem in there), default=0)
    yield f"Accuracy in % on 106 new characters, mean of {most} seeds"
    yield from ("", *arms.table(["arm", "trained", *there], rows), "")
    for problem, title, word, shown in claims(tested):
        yield f"- {problem}: {title}: {shown}, {word}"
    r, n = 4, 2
    yield (
        f"- Block-LoRA multiplies {r // n} · (in + out) times a token beside the frozen layer, as LoRA of rank "
        f"{r // n} does; LoRA of the same r {r} · (in + out) times"
    )


def claims(tested: dict[tuple[str, str], list[arms.Row]]) -> Iterator[tuple[str, str, str, str]]:
    """A problem, what is claimed, the word for it, and the difference in accuracy."""
    for title, other, near in (
        ("Block-LoRA reaches LoRA of the same r, with a quarter fewer parameters", EQUAL_R, True),
        ("Block-LoRA is above LoRA of as many parameters", EQUAL_SIZE, False),
        ("Block-LoRA is above LoRA of the same rank of ΔW", EQUAL_RANK, False),
        ("Block-LoRA is above a linear probe", "linear probe", False),
        ("Block-LoRA reaches full training", "full", True),
        ("Block-LoRA reaches CoDyRA", "CoDyRA r=4", True),
    ):
        for problem, *_, word, shown in arms.orders(tested, [(BLOCK, other)], "accuracy"):
            if near:
                word, apart = arms.close(tested[problem, BLOCK], tested[problem, other], "accuracy")
                shown = f"{shown}; {apart}"
            yield problem, title, word, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--shots", type=lambda text: [int(each) for each in text.split(",")], default=list(SHOTS))
    parser.add_argument("--only", default="", help="arms between semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING["steps"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=WORK, help="where the CLIP is kept")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    chosen = [each.strip() for each in args.only.split(";")] if args.only else list(ARMS)
    asked = study_of(args.shots, args.seeds, args.steps, chosen, args.out)
    if not args.table:
        if args.data_dir is None:
            parser.error("--data-dir is where omniglot_small/ lies; or --table")
        torch.set_num_threads(args.workers)
        model = pretrained(args.data_dir, args.work, args.pretraining_steps)
        versions = {"torch": torch.__version__, "weft": weft.__version__}
        made_by = {"device": processor(), "commit": commit(), "versions": versions}
        made_by["pretraining"] = args.pretraining_steps
        asked.run(measure, {"data_dir": str(args.data_dir), "model": str(model), "made_by": made_by}, args.workers)
    print("\n".join(report(asked)))


if __name__ == "__main__":
    main()
