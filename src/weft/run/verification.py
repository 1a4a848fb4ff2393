"""Verification: are two images of the same person, or of the same thing?

The model is an image classifier without its classes. What the classifier would read is an image's embedding; two images
are compared by the cosine of theirs. To train it, the training identities are told apart by their own centres, under a
margin: CosFace (arXiv 1801.09414) or ArcFace (arXiv 1801.07698). Validation and test are of identities that training
need not have seen, and the centres are no part of the result.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from weft.errors import UsageError, WeftError
from weft.files import whole_file
from weft.run import images, models, sources

if TYPE_CHECKING:
    from weft.run.adapt import AdaptOptions

TASK = "verification"
MARGINS = {"cosface": 0.4, "arcface": 0.5}  # by loss: of the cosine, and of the angle in radians
SCALE = 64.0
FALSE_ACCEPTS = (1e-1, 1e-2, 1e-3)  # at which true accepts are counted, given ten times the impostors that one is
_IMPOSTORS = 4_000_000  # pairs; of more, every so manieth counts
_BLOCK = 1024  # images whose pairs are in memory at a time


# --- options ----------------------------------------------------------------------------------------------------------


def check(options: AdaptOptions, method: str) -> None:
    """Raise UsageError for options of a margin that are none, or that are given for another task."""
    given = {name: getattr(options, name) for name in ("margin_loss", "margin", "margin_scale")}
    given["mirror"] = options.mirror or None
    if options.task != TASK:
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name}={value!r} is for --task {TASK}, not for {options.task}")
        return
    if method == "head":
        raise UsageError("method head would train the identities' centres alone, and leave the embedding: use base")
    loss = options.margin_loss or "cosface"
    if loss not in MARGINS:
        raise UsageError(f"margin_loss={loss!r}: use {' or '.join(MARGINS)}")
    limit = 1.0 if loss == "cosface" else math.pi / 2
    if options.margin is not None and not 0 <= options.margin < limit:
        raise UsageError(f"margin={options.margin} must be at least 0 and below {limit:.3g} for {loss}")
    if options.margin_scale is not None and options.margin_scale <= 0:
        raise UsageError(f"margin_scale must be above 0, not {options.margin_scale}")


def settle(model: nn.Module, options: AdaptOptions) -> None:
    """Tell the head of a model what the run was asked for."""
    head = head_of(model)
    if head is None:
        return
    head.mirror = options.mirror
    if isinstance(head, MarginHead):
        head.loss = options.margin_loss or "cosface"
        head.margin = MARGINS[head.loss] if options.margin is None else options.margin
        head.scale = SCALE if options.margin_scale is None else options.margin_scale


# --- rows -------------------------------------------------------------------------------------------------------------


def hold_out(rows: sources.Rows, name: str, fraction: float, seed: int, spec: str) -> None:
    """Move a share of the training identities, drawn by seed, to the split `name`: those with two images or more."""
    counts: dict[str, int] = {}
    for row in rows.train:
        counts[_name(row)] = counts.get(_name(row), 0) + 1
    several = sorted(each for each, count in counts.items() if count > 1)
    count = max(2, round(fraction * len(counts)))
    if len(several) < count or len(counts) < count + 2:
        raise UsageError(
            f"data {spec!r} has {len(counts)} identities in train, {len(several)} of them with two images or more: too "
            f"few to hold out {count} for {name} and train on two"
        )
    drawn = set(random.Random(f"{seed}/{name}").sample(several, count))
    setattr(rows, name, [row for row in rows.train if _name(row) in drawn])
    rows.train = [row for row in rows.train if _name(row) not in drawn]
    rows.held_out.append(f"{name}: {count} of {len(counts)} identities, drawn with seed {seed}")


def number(rows: sources.Rows, spec: str) -> None:
    """Turn labels into numbers: 0, 1, … for the identities of train, further ones for those of other splits alone.

    Raises UsageError where train has no two identities, or another split no two, or none with two images.
    """
    named = {split: [_name(row) for row in getattr(rows, split)] for split in sources.SPLITS}
    known = sources.ordered(set(named["train"]))
    if len(known) < 2:
        raise UsageError(f"data {spec!r} has only the identity {known[0]!r} in train: nothing to tell apart")
    others = sources.ordered({*named["validation"], *named["test"]} - {*known})
    numbers = {name: place for place, name in enumerate([*known, *others])}
    for split, names in named.items():
        for row, name in zip(getattr(rows, split), names, strict=True):
            row["label"] = numbers[name]
        if split == "train" or not names:
            continue
        there = set(names)
        if len(there) < 2 or len(there) == len(names):
            raise UsageError(
                f"data {spec!r} has {len(names)} images of {len(there)} identities in {split}: to verify takes two "
                "identities, and two images of one of them"
            )
        rows.notes.append(f"{split}: {len(there)} identities, {len(there & {*known})} of them trained on")
    rows.notes.append(f"train: {len(known)} identities")
    rows.labels, rows.purpose = known, TASK


def _name(row: sources.Row) -> str:
    return sources.label_name(row["label"])


# --- the head ---------------------------------------------------------------------------------------------------------


class Bare(nn.Identity):
    """In place of a classifier: a model's `logits` are what the classifier would read, the embedding."""

    mirror = False  # whether an image's embedding is averaged with that of its mirror image


class MarginHead(nn.Module):
    """Scaled cosines between features (images × features) and the centre of each identity (identities × features).

    That is in training. In evaluation it hands on the features, as `Bare` does.
    """

    mirror = False
    loss, margin, scale = "cosface", MARGINS["cosface"], SCALE

    def __init__(self, features: int, identities: int, device: Any = None) -> None:
        super().__init__()
        drawn = torch.randn(identities, features, device=device)  # in float32, whatever the model is in
        self.centres = nn.Parameter(drawn * 0.01)  # their length sets how fast steps of one size turn them

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has three digits, and a margin of 0.4 is fine
            return self.scale * linear(normalize(x.float()), normalize(self.centres.float()))


def with_margin(head: MarginHead, logits: Tensor, labels: Tensor) -> Tensor:
    """Scaled cosines (images × identities), the one with each image's own centre made harder by the margin."""
    own = logits.gather(1, labels[:, None]) / head.scale
    if head.loss == "cosface":
        moved = own - head.margin
    else:
        sine = (1 - own.square()).clamp_min(1e-9).sqrt()  # whose slope has no end at 0
        moved = own * math.cos(head.margin) - sine * math.sin(head.margin)
        # beyond an angle of π − margin the cosine would rise again
        past = own - head.margin * math.sin(head.margin)
        moved = torch.where(own > -math.cos(head.margin), moved, past)
    return logits.scatter(1, labels[:, None], head.scale * moved)


def margin_loss(head: MarginHead, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Nats an image, over all micro-batches of a step."""
    total = cross_entropy(with_margin(head, outputs["logits"].float(), labels), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def head_of(model: nn.Module) -> MarginHead | Bare | None:
    """What stands in place of a model's classifier; None for a classifier that is one."""
    return next((module for module in model.modules() if isinstance(module, MarginHead | Bare)), None)


def train_beside(model: nn.Module) -> nn.Module:
    """The model, whose centres are trained, whatever else is; they are not saved with an adapter."""
    head = head_of(model)
    if isinstance(head, MarginHead):
        head.requires_grad_(True)
    return model


def without_head(model: Any) -> None:
    """Take the training identities out of a model, in place: a stock model without classes is left."""
    head = head_of(model)
    if head is None:
        return
    bare = Bare()
    bare.mirror = head.mirror
    bare.train(model.training)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is head:
                setattr(parent, name, bare)


def load(spec: str, identities: Sequence[str] | None, **loading: Any) -> models.Base:
    """`models.load_base` for verification, with a centre for each identity, or with none.

    Raises UsageError for a model whose classifier is not one linear layer.
    """
    # what its own classifier was does not matter, and a model without classes gets the place of one back
    base = models.load_base(spec, "image-classification", labels=["none"], prompts=[], **loading)
    within = f"{models.classifier_name(base.model)}."
    found = [
        name for name, m in base.model.named_modules() if f"{name}.".startswith(within) and isinstance(m, nn.Linear)
    ]
    if len(found) != 1:
        raise UsageError(f"model {spec!r} has a classifier of {len(found)} linear layers: --task {TASK} replaces one")
    last: Any = base.model.get_submodule(found[0])
    head: nn.Module = Bare()
    if identities:
        torch.manual_seed(loading.get("seed", 0))
        head = MarginHead(last.in_features, len(identities), last.weight.device)
    base.model.set_submodule(found[0], head.train(last.training))
    base.model.config.num_labels = 0
    return replace(base, task=TASK)


# --- embeddings and what they are worth -------------------------------------------------------------------------------


class Embedder(nn.Module):
    """A model whose `logits` are embeddings of length 1 (images × features), float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, head = model, head_of(model)
        self.mirror = head is not None and head.mirror
        self.train(model.training)

    def forward(self, pixel_values: Tensor) -> Any:
        found = normalize(self.model(pixel_values=pixel_values).logits.float().flatten(1))
        if self.mirror:
            other = self.model(pixel_values=pixel_values.flip(-1)).logits.float().flatten(1)
            found = normalize(found + normalize(other))
        return SimpleNamespace(logits=found)


def measure_rows(model: nn.Module, dataset: Any, batch_size: int, rows: Sequence[int], bf16: bool = False) -> list[Any]:
    """One entry a row: (row, document, embedding, identity)."""
    from weft.run.evaluate import over_batches

    def measure(numbers: Sequence[int], documents: list[int], labels: Tensor, found: Tensor) -> list[Any]:
        return list(zip(numbers, documents, found.cpu().numpy(), labels.tolist(), strict=True))

    made = over_batches(measure, [Embedder(model)], dataset, batch_size, rows, bf16=bf16)
    return [entry for batch in made for entry in batch]


@dataclass(frozen=True)
class Identities(images.Images):
    """A split as Trainer and `evaluate` read it: a model is measured on it by the pairs of its images."""

    def measure(self, model: nn.Module, batch_size: int, rows: Sequence[int], bf16: bool = False) -> list[Any]:
        return measure_rows(model, self, batch_size, rows, bf16)

    def summarise(self, measured: list[Any]) -> dict[str, Any]:
        return summarise(measured)


def summarise(measured: list[Any]) -> dict[str, Any]:
    """The metrics of what `measure_rows` found.

    Returns:
        `loss`, `auc`, `eer` and `tar_at_far_…`: see `rates`, over all pairs of images. `rank1`: see `rank_one`.
        `images`, `identities`, `genuine_pairs`, `impostor_pairs`: how many.
    """
    embeddings, labels = np.stack([entry[2] for entry in measured]), np.array([entry[3] for entry in measured])
    scores, genuine = pairs(embeddings, labels)
    return {
        **rates(scores, genuine),
        "rank1": float(rank_one(embeddings, labels).mean()),
        "images": len(labels),
        "identities": len(np.unique(labels)),
        "genuine_pairs": int(genuine.sum()),
        "impostor_pairs": int((~genuine).sum()),
    }


def pairs(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of every two images, and whether they are of one identity.

    Of more than four million impostors every so manieth counts.
    """
    together = int(sum(n * (n - 1) // 2 for n in np.unique(labels, return_counts=True)[1]))
    apart = len(labels) * (len(labels) - 1) // 2 - together
    stride, begin, scores, genuine = -(-apart // _IMPOSTORS) or 1, 0, [], []
    for start in range(0, len(labels), _BLOCK):
        rows = slice(start, start + _BLOCK)
        later = np.arange(len(labels))[None] > np.arange(len(labels))[rows, None]
        cosines, same = embeddings[rows] @ embeddings.T, labels[rows, None] == labels[None]
        own, others = cosines[later & same], cosines[later & ~same]
        kept = others[begin::stride]
        begin = (begin - len(others)) % stride
        scores += [own, kept]
        genuine += [np.ones(len(own), bool), np.zeros(len(kept), bool)]
    return np.concatenate(scores), np.concatenate(genuine)


def rates(scores: np.ndarray, genuine: np.ndarray) -> dict[str, float]:
    """How well scores tell genuine pairs from impostors.

    Returns:
        `loss`: nats a pair, of the logistic function of the score that suits these pairs best, genuine ones and
        impostors weighing as much in all; 0.693 is to know nothing. Neither a factor of all scores nor a constant
        matters to it. `auc`: the area under the ROC curve. `eer`: the error where false accepts are as frequent as
        false rejects. `tar_at_far_F`: the share of genuine pairs accepted where at most the share F of impostors is;
        left out where F of them are fewer than ten.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import auc, log_loss, roc_curve
    except ImportError as error:
        raise WeftError('verification needs scikit-learn; install it with pip install "weft[vision]"') from error
    x = ((scores - scores.mean()) / max(scores.std(), 1e-12))[:, None].astype(np.float64)
    judge = LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-8).fit(x, genuine)
    enough = (~genuine).sum()
    weights = np.where(genuine, 0.5 / genuine.sum(), 0.5 / enough)
    far, tar, _ = roc_curve(genuine, scores, drop_intermediate=False)
    found = {
        "loss": float(log_loss(genuine, judge.predict_proba(x)[:, 1], sample_weight=weights)),
        "auc": float(auc(far, tar)),
        "eer": float(np.interp(0.0, far + tar - 1, far)),
    }
    return found | {
        f"tar_at_far_{f:g}": float(tar[far <= f].max()) for f in FALSE_ACCEPTS if enough * f > 10 - 1e-9
    }


def rank_one(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each image but the first of its identity is nearest to that, among the first ones of all (boolean)."""
    _, first = np.unique(labels, return_index=True)
    probes = np.setdiff1d(np.arange(len(labels)), first)
    nearest = (embeddings[probes] @ embeddings[first].T).argmax(1)
    return labels[first][nearest] == labels[probes]


# --- answers ----------------------------------------------------------------------------------------------------------


def embed(base: models.Base, rows: Sequence[sources.Row], batch_size: int = 8) -> np.ndarray:
    """The embedding of each row's image: rows × features, float32, of length 1."""
    prepare, model = images.preparer(base.tokenizer), Embedder(base.model).eval()
    device, made = next(model.parameters()).device, []
    for start in range(0, len(rows), batch_size):
        pixels = torch.stack([prepare(row["image"]) for row in rows[start : start + batch_size]])
        with torch.inference_mode():
            made.append(model(pixels.to(device)).logits.cpu().numpy())
    return np.concatenate(made)


def answers(
    base: models.Base, rows: Sequence[sources.Row], gallery: Sequence[sources.Row], batch_size: int = 8
) -> Iterator[dict[str, Any]]:
    """For each image the identity of the nearest one in a gallery, and the cosine of the two."""
    names = [_name(row) for row in gallery]
    cosines = embed(base, rows, batch_size) @ embed(base, gallery, batch_size).T
    for place, (row, mine) in enumerate(zip(rows, cosines, strict=True)):
        nearest = int(mine.argmax())
        expected = {"expected": _name(row)} if "label" in row else {}
        found = {"identity": names[nearest], "cosine": round(float(mine[nearest]), 6)}
        yield {"image": shown(row, place), **found, **expected}


def shown(row: sources.Row, place: int) -> str | int:
    """An image's file, or its number."""
    return str(row["image"]) if isinstance(row["image"], Path) else place


def write_embeddings(base: models.Base, rows: Sequence[sources.Row], output: Path, batch_size: int = 8) -> None:
    """Write a .npz of `embeddings`, `images` (files, or their numbers) and, where all have one, `labels`; whole."""
    arrays = {"embeddings": embed(base, rows, batch_size)}
    arrays["images"] = np.array([shown(row, place) for place, row in enumerate(rows)])
    if all("label" in row for row in rows):
        arrays["labels"] = np.array([_name(row) for row in rows])
    with whole_file(output) as partial, partial.open("wb") as file:  # of a path, numpy would change the name
        np.savez(file, **arrays)
