"""SALT on a U-Net over electron-microscopy slices, beside LoRA of as many parameters, scaling alone, head and full.

    python benchmarks/segmentation.py --data-dir DIR    results/segmentation/membrane.jsonl, and the tables; killed, it
                                                        goes on
    python benchmarks/segmentation.py --table           the tables alone, from the file

DIR holds isbi2012_membrane: 30 slices of 512 × 512 with masks of cells and the membranes between them. A U-Net of four
levels (16 to 128 channels, 2.4 million parameters) learns to segment 16 slices as another instrument would have shown
them, and is adapted to six others as they are; two more choose the learning rate, and six test.

    stain   the source is inverted, as by another stain, and blurred (a Gaussian of two pixels)
    focus   the source is blurred likewise and noisy (a deviation of 30 of 255 levels)

Training is on pieces of 128 × 128, 96 of the six slices, four a step; validation and test on quarters of 256 × 256. All
arms take equal steps of AdamW on the cross-entropy of pixels: a tenth warm-up, then a cosine; the authors add Dice and
focal losses. The U-Net's last convolution, the head, is trained in every arm but base.

    salt      the largest tenth of the singular values scaled and shifted, the rest gets a low-rank update
    scaling   all singular values scaled and shifted, and nothing else
    lora      PEFT's, of rank 4; salt's r_lora is what gives as many parameters

Dice is the mean over an image's two classes, then over images. Intervals are of a paired bootstrap over the 24 test
quarters, which are of six slices, and over seeds; these draw the adapter's start and the order of pieces. About two
hours of one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
from adapters import processor
from PIL import Image, ImageFilter

import weft
from weft.files import whole_folder
from weft.run import methods, models, segmentation, sources
from weft.run.compare import commit
from weft.run.data import Splits
from weft.run.evaluate import evaluate, measure_rows
from weft.run.settings import TrainSettings
from weft.run.train import train
from weft.unet import UNetConfig, UNetForSemanticSegmentation

OUT = arms.RESULTS / "segmentation" / "membrane.jsonl"
PROBLEMS = ("stain", "focus")
ARMS = ("base", "head", "scaling", "lora", "salt", "full")
PAIRS = [("salt", other) for other in ("lora", "scaling", "head", "full")]
CLASSES = ["membrane", "cell"]
SOURCE, TRAIN, VALIDATION, TEST = range(16), range(16, 22), range(22, 24), range(24, 30)  # slices
PIECE, QUARTER = 128, 256  # pixels a side
STEPS, SOURCE_STEPS, BATCH = 80, 400, 4
CENTRE, SOURCE_RATE = 3e-3, 3e-3
RANK = 4  # LoRA's


# --- the data ---------------------------------------------------------------------------------------------------------


def slices(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks, uint8, 30 × 512 × 512; 1 is cell."""
    with np.load(folder / "isbi2012_membrane" / "membrane_30.npz") as file:
        return file["image"], np.unpackbits(file["mask"], axis=-1)


def degraded(image: np.ndarray, problem: str, seed: int) -> np.ndarray:
    """A slice as the source's instrument shows it."""
    shown = 255 - image if problem == "stain" else image
    blurred = np.asarray(Image.fromarray(shown).filter(ImageFilter.GaussianBlur(2)))
    if problem == "stain":
        return blurred
    noise = np.random.default_rng(seed).normal(0, 30, image.shape)
    return (blurred + noise).round().clip(0, 255).astype(np.uint8)


def pieces(image: np.ndarray, mask: np.ndarray, side: int) -> Iterator[sources.Row]:
    for top in range(0, len(image), side):
        for left in range(0, image.shape[1], side):
            place = slice(top, top + side), slice(left, left + side)
            yield {"image": image[place], "mask": mask[place]}


def splits(folder: Path, problem: str, source: bool) -> Splits:
    """The pieces to learn from, of the source or of the slices as they are, and quarters of the latter."""
    images, masks = slices(folder)

    def rows(chosen: Sequence[int], side: int, seen: bool) -> list[sources.Row]:
        shown = [degraded(images[n], problem, n) if seen else images[n] for n in chosen]
        return [row for image, n in zip(shown, chosen) for row in pieces(image, masks[n], side)]

    learned = rows(SOURCE if source else TRAIN, PIECE, source)
    found = sources.Rows(learned, rows(VALIDATION, QUARTER, source), rows(TEST, QUARTER, source), "mask")
    return Splits(**segmentation.splits(found, whole_images()), task=found.task, report={}, labels=CLASSES)


def whole_images() -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5])


# --- models and methods -----------------------------------------------------------------------------------------------


def settings(steps: int, rate: float, seed: int) -> TrainSettings:
    return TrainSettings(
        max_steps=steps, batch_size=BATCH, learning_rate=rate, seed=seed, weight_decay=0.01, warmup_ratio=0.1,
        max_grad_norm=1.0, lr_scheduler_type="cosine", eval_steps=0, save_steps=0,
    )  # fmt: skip


def learn_source(folder: Path, problem: str, steps: int, out: Path) -> None:
    """Train the U-Net on the source, and save it."""
    torch.manual_seed(0)
    config = UNetConfig(in_channels=1, block_out_channels=[16, 32, 64, 128], layers_per_block=1, num_labels=2)
    base = models.Base(UNetForSemanticSegmentation(config), whole_images(), problem, "segmentation")
    data = splits(folder, problem, source=True)
    result = train(base, data, methods.resolve("full"), settings(steps, SOURCE_RATE, 0), None, progress=False)
    found = evaluate(result.model, data.test, data.task, BATCH)
    print(f"{problem}: Dice {found['dice']:.3f} on the source's test slices, {result.seconds:.0f} s", flush=True)
    with whole_folder(out) as part:
        base.model.save_pretrained(part)


@cache
def alike(unet: str) -> int:
    """SALT's r_lora that gives the nearest number of parameters to LoRA's."""
    skeleton = models.load_base(unet, "segmentation", weights=False).model

    def count(name: str, options: dict[str, Any]) -> int:
        return methods.count_trainable(methods.resolve(name, options), skeleton)

    wanted = count("peft:lora", {"r": RANK})
    return min(range(1, 65), key=lambda rank: abs(count("salt", {"r_lora": rank}) - wanted))


def method(arm: str, unet: str) -> methods.Method:
    name, options = {
        "lora": lambda: ("peft:lora", {"r": RANK, "lora_alpha": RANK}),
        "salt": lambda: ("salt", {"r_lora": alike(unet)}),
        "scaling": lambda: ("salt", {"ratio": 1.0}),
    }.get(arm, lambda: (arm, {}))()
    return methods.resolve(name, options)


# --- a run and the figures --------------------------------------------------------------------------------------------


def measure(context: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    data = splits(Path(context["data_dir"]), job["problem"], source=False)
    unet = str(Path(context["unets"]) / job["problem"])
    base = models.load_base(unet, data.task, labels=CLASSES, seed=job["seed"], tokenizer=whole_images())
    plan = settings(job["steps"], job["rate"], job["seed"])
    result = train(base, data, method(job["arm"], unet), plan, None, progress=False)
    row: dict[str, Any] = {"validation": arms.finite(result.validation["loss"]), "trained": result.trainable}
    if job["phase"] == "test":
        measured = measure_rows(result.model, data.test, BATCH, range(len(data.test)))
        found = segmentation.dice([each[3] for each in measured])  # images × classes
        each = {"Dice": found.mean(1), "membrane": found[:, 0]}
        draws = arms.counts(len(found), job["seed"])
        row["scores"] = {name: float(values.mean()) for name, values in each.items()}
        row["draws"] = {
            name: arms.drawn(lambda counts, values=values: float(counts @ values / counts.sum()), draws)
            for name, values in each.items()
        }
    return {**row, "seconds": round(time.perf_counter() - started, 1), **context["made_by"]}


def report(study: arms.Study) -> Iterator[str]:
    tested = study.tested()
    for problem in study.problems:
        mine = {arm: tested[problem, arm] for arm in study.arms if (problem, arm) in tested}
        if not mine:
            continue
        rows = (
            [arm, f"{runs[0]['trained']:,}", "" if arm in study.still else f"{runs[0]['rate']:g}",
             arms.mean(runs, "Dice", 4), arms.mean(runs, "membrane", 4)]
            for arm, runs in mine.items()
        )  # fmt: skip
        yield from ("", f"{problem}, {max(map(len, mine.values()))} seeds, {study.steps['test']} steps", "")
        yield from arms.table(["arm", "trained", "rate", "Dice", "Dice of membranes"], rows)
    yield ""
    for problem, one, other, word, shown in arms.orders(tested, PAIRS, "Dice"):
        yield f"- {problem}: {one} above {other} in Dice: {shown}, {word}"


def study_of(
    problems: Sequence[str] = PROBLEMS, chosen: Sequence[str] = ARMS, seeds: int = 3, steps: int = STEPS,
    out: Path = OUT,
) -> arms.Study:  # fmt: skip
    return arms.Study(out, problems, chosen, seeds, CENTRE, {"rate": steps, "test": steps}, ("base",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", default=",".join(PROBLEMS), help="problems between commas")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms between commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--source-steps", type=int, default=SOURCE_STEPS)
    parser.add_argument("--unets", type=Path, help="folder for the U-Nets that learned the source; made where missing")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    asked = study_of(args.only.split(","), args.arms.split(","), args.seeds, args.steps, args.out)
    if not args.table:
        if args.data_dir is None:
            parser.error("--data-dir is where isbi2012_membrane lies; or --table")
        torch.set_num_threads(1)
        unets = args.unets or Path(tempfile.gettempdir()) / f"weft-unets-{args.source_steps}"
        for problem in asked.problems:
            if not (unets / problem).exists():
                unets.mkdir(parents=True, exist_ok=True)
                learn_source(args.data_dir, problem, args.source_steps, unets / problem)
        versions = {"torch": torch.__version__, "weft": weft.__version__}
        made_by = {"device": processor(), "commit": commit(), "versions": versions, "source_steps": args.source_steps}
        asked.run(measure, {"data_dir": str(args.data_dir), "unets": str(unets), "made_by": made_by}, args.workers)
    print("\n".join(report(asked)))


if __name__ == "__main__":
    main()
