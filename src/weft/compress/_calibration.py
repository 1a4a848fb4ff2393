"""What layers receive and give back on calibration data, summed up as it streams by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.algebra.random import checksum
from weft.algebra.statistics import Magnitudes, Moments, mix
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.linear.rank_aware_sparse import column_norms

Batch = Any  # what the model is called with: a dict of tensors, a tuple, or a tensor


@dataclass(frozen=True)
class Corpus:
    """Calibration batches and how much they count beside other corpora."""

    batches: Sequence[Batch]
    weight: float = 1.0


@dataclass
class Statistics:
    """Of one layer: what its method asked for, None otherwise.

    Attributes:
        input, output: moments of what the layer receives and gives, bias and norm included, over the tokens that count,
            or all positions of a convolution. An embedding has only an output, and a convolution's input is not served.
            Only Σx and Σx² where the method asked for "squares" or "output_squares" alone.
        fisher: Σ over samples of the squared gradient of W, summed over its rows (in) and over its columns (out).
        magnitudes, scaled_magnitudes: order statistics of all |x_j|, and of all |x_j|·‖W_:j‖.
    """

    input: Moments | None = None
    output: Moments | None = None
    fisher: tuple[Tensor, Tensor] | None = None
    magnitudes: Magnitudes | None = None
    scaled_magnitudes: Magnitudes | None = None


def corpora(data: Iterable[Batch] | Mapping[str, tuple[Iterable[Batch], float]] | None) -> list[Corpus]:
    """The data as `compress` takes it, read once."""
    if data is None:
        return []
    found = (
        [Corpus(list(batches), weight) for batches, weight in data.values()]
        if isinstance(data, Mapping)
        else [Corpus(list(data))]
    )
    if not found or not all(corpus.batches for corpus in found):
        raise UsageError("the calibration data holds no batch")
    if not all(corpus.weight > 0 for corpus in found):
        raise UsageError("each calibration corpus needs a weight above 0")
    return found


def fingerprint(batch: Batch) -> str:
    """What tells a batch from others."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return "".join(checksum(part)[:8] for part in parts)


def mask_of(batch: Batch) -> Tensor | None:
    """Which tokens count, (batch, length), where the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.dim() != 2 else mask.bool()


def call(model: nn.Module, batch: Batch) -> Any:
    """The model on one batch; a cache of keys and values would only cost memory."""
    if isinstance(batch, Mapping):
        extra = {"use_cache": False} if hasattr(model, "generate") else {}
        return model(**extra, **batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


KINDS = ("products", "fourth")  # of moments; the fourth is one more pass over x beside a product, and serves `shrink`


class _Enough(Exception):
    """Raised in a forward pass once the last layer of interest has been seen."""


NEEDS = ("input", "squares", "output", "output_squares", "fisher", "magnitudes", "scaled_magnitudes")
GIVEN = frozenset({"output", "output_squares"})  # what a layer's output shows
FORWARD = frozenset(NEEDS) - {"fisher"}  # what forward passes show
Needs = Mapping[str, Sequence[str]]  # layer → of NEEDS


def calibrate(
    model: nn.Module, data: Sequence[Corpus], layers: Sequence[Layer], needs: Needs
) -> dict[str, Statistics]:
    """Statistics of some layers, by name, from forward passes (and backward ones for "fisher") over the data.

    Layers that receive the same tensor share one sum. A pass ends at the last layer of interest.
    Raises UsageError where a layer receives numbers that are not finite.
    """
    if not data:
        return {layer.name: Statistics() for layer in layers}
    if len(data) > 1 and any(word.endswith("magnitudes") for layer in layers for word in needs[layer.name]):
        raise UsageError("thresholds on magnitudes count every token alike: give one corpus of calibration data")
    with evaluating(model):
        found = [_one_corpus(model, corpus.batches, layers, needs) for corpus in data]
    if len(found) == 1:
        return found[0]
    weights = [corpus.weight / sum(c.weight for c in data) for corpus in data]
    return {layer.name: _mixed([each[layer.name] for each in found], weights) for layer in layers}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _mixed(parts: Sequence[Statistics], weights: Sequence[float]) -> Statistics:
    def moments(each: Sequence[Moments | None]) -> Moments | None:
        return None if each[0] is None else mix([m for m in each if m is not None], weights)

    def fisher(side: int) -> Tensor:
        shares = [p.fisher[side] / p.fisher[side].sum() for p in parts if p.fisher is not None]
        return torch.stack([w * share for w, share in zip(weights, shares)]).sum(0)

    return Statistics(
        input=moments([p.input for p in parts]),
        output=moments([p.output for p in parts]),
        fisher=None if parts[0].fisher is None else (fisher(0), fisher(1)),
    )


def _one_corpus(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[Layer], needs: Needs
) -> dict[str, Statistics]:
    found = {layer.name: Statistics() for layer in layers}
    watched = [layer for layer in layers if FORWARD & set(needs[layer.name])]
    if watched:
        _watch(model, batches, watched, needs, found)
    graded = [layer for layer in layers if "fisher" in needs[layer.name]]
    if graded:
        _square_gradients(model, batches, graded, found)
    return found


def _watch(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[Layer],
    needs: Needs,
    found: dict[str, Statistics],
) -> None:
    watch = _Watch(layers, needs, found)
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for layer in layers:
            for module, hook in watch.of(layer):
                hooks.callback(module.register_forward_hook(hook).remove)
        for batch in batches:
            watch.begin(mask_of(batch))
            with contextlib.suppress(_Enough):
                call(model, batch)
            watch.end()


class _Watch:
    """Forward hooks that feed statistics; the state of one pass."""

    def __init__(self, layers: Sequence[Layer], needs: Needs, found: dict[str, Statistics]) -> None:
        self.needs, self.found = needs, found
        self.sides = [
            (layer.name, side)
            for layer in layers
            for side, words in (("receives", FORWARD - GIVEN), ("gives", GIVEN))
            if words & set(needs[layer.name])
        ]
        self.mask: Tensor | None = None
        self.waiting: set[tuple[str, str]] = set()
        self.seen: list[tuple[Tensor, str]] = []  # inputs of this pass, held so that no other takes their place

    def begin(self, mask: Tensor | None) -> None:
        self.mask, self.waiting, self.seen = mask, set(self.sides), []

    def end(self) -> None:
        """After a pass: every layer must have been met."""
        self.seen = []
        if self.waiting:
            name, _ = min(self.waiting)
            raise UsageError(f"the calibration data never reaches {name}; leave it out with exclude")

    def of(self, layer: Layer) -> Iterator[tuple[nn.Module, Any]]:
        """The modules to watch for one layer, each with its hook."""
        mine = self.found[layer.name]

        def receives(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0]
            rows = self.rows(x)
            if {"input", "squares"} & set(self.needs[layer.name]):
                self._input(layer, mine, x, rows)
            if "magnitudes" in self.needs[layer.name]:
                mine.magnitudes = mine.magnitudes or Magnitudes()
                _add(mine.magnitudes, x, rows, f"{layer.name} receives")
            if "scaled_magnitudes" in self.needs[layer.name]:
                mine.scaled_magnitudes = mine.scaled_magnitudes or Magnitudes(column_norms(layer.weight))
                _add(mine.scaled_magnitudes, x, rows, f"{layer.name} receives")
            self.met(layer.name, "receives")

        def gives(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            y = layer.features(y) if layer.norm is None else y.flatten(-2)  # heads side by side
            mine.output = mine.output or Moments(KINDS if "output" in self.needs[layer.name] else ("squares",))
            _add(mine.output, y, self.rows(y), f"{layer.name} gives")
            self.met(layer.name, "gives")

        if (layer.name, "receives") in self.sides:
            yield layer.module, receives
        if (layer.name, "gives") in self.sides:
            yield layer.norm or layer.module, gives

    def rows(self, x: Tensor) -> Tensor | None:
        """Which rows of x count, where the mask says it of rows like these; OPT's MLP has a batch's rows in one."""
        if self.mask is None:
            return None
        flat = self.mask.flatten()
        return next((mask for mask in (self.mask, flat) if x.shape[:-1] == mask.shape), None)

    def met(self, name: str, side: str) -> None:
        self.waiting.discard((name, side))
        if not self.waiting:
            raise _Enough

    def _input(self, layer: Layer, mine: Statistics, x: Tensor, rows: Tensor | None) -> None:
        whole = "input" in self.needs[layer.name]
        alike = (name for tensor, name in self.seen if tensor is x and ("input" in self.needs[name]) == whole)
        twin = next(alike, None)
        if twin is not None and mine.input in (None, self.found[twin].input):
            mine.input = self.found[twin].input
            return
        self.seen.append((x, layer.name))
        mine.input = mine.input or Moments(KINDS if whole else ("squares",))
        _add(mine.input, x, rows, f"{layer.name} receives")


def _add(moments: Moments | Magnitudes, x: Tensor, rows: Tensor | None, who: str) -> None:
    try:
        moments.add(x, rows)
    except ValueError as error:
        raise UsageError(f"{who} numbers that are not finite on the calibration data") from error


def _square_gradients(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[Layer], found: dict[str, Statistics]
) -> None:
    """Fill in `fisher`, a sample at a time: the squared gradient of a batch is not the sum of its samples' squares."""
    weights = {layer.name: layer.module.weight for layer in layers}
    transposed = {layer.name for layer in layers if isinstance(layer.module, Conv1D)}

    def squares(name: str) -> Any:
        def hook(weight: nn.Parameter) -> None:
            assert weight.grad is not None
            square = weight.grad.double().square()
            square = square.mT if name in transposed else square
            before = found[name].fisher
            mine = (square.sum(0), square.sum(1))
            found[name].fisher = mine if before is None else (before[0] + mine[0], before[1] + mine[1])
            weight.grad = None  # one layer's gradient at a time is in memory

        return hook

    others = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in others:
        p.requires_grad_(False)
    try:
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for name, weight in weights.items():
                weight.requires_grad_(True)  # type: ignore[operator,union-attr]
                hooks.callback(weight.register_post_accumulate_grad_hook(squares(name)).remove)  # type: ignore[operator,union-attr]
            for batch in batches:
                for sample in samples(batch):
                    loss_of(model, sample).backward()
    finally:
        for p, wanted in others:
            p.requires_grad_(wanted)
    for name in weights:
        fisher = found[name].fisher
        if fisher is None or not bool(torch.isfinite(fisher[0]).all()):
            raise UsageError(f"{name} has no finite gradient on the calibration data")


def samples(batch: Batch) -> Iterator[Batch]:
    """The rows of a batch, each as a batch of one."""
    if isinstance(batch, Mapping):
        count = len(next(iter(batch.values())))
        for i in range(count):
            yield {name: value[i : i + 1] for name, value in batch.items()}
    elif isinstance(batch, tuple | list):
        for i in range(len(batch[0])):
            yield tuple(value[i : i + 1] for value in batch)
    else:
        yield from batch.split(1)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The task's own loss; a language model without labels predicts its input."""
    if isinstance(batch, Mapping) and "labels" not in batch and hasattr(model, "generate"):
        mask, ids = mask_of(batch), batch["input_ids"]
        batch = {**batch, "labels": ids if mask is None else ids.masked_fill(~mask, -100)}
    output = call(model, batch)
    loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.dim():
        raise UsageError("the calibration batches give no loss: add labels to each")
    return loss


def mean_loss(model: nn.Module, data: Sequence[Corpus]) -> float:
    """The task's loss, a mean over batches and a weighted one over corpora."""
    with torch.inference_mode(), evaluating(model):
        losses = [sum(float(loss_of(model, batch)) for batch in c.batches) / len(c.batches) for c in data]
    weight = sum(corpus.weight for corpus in data)
    return sum(corpus.weight / weight * loss for corpus, loss in zip(data, losses))


def influences(model: nn.Module, data: Sequence[Corpus], blocks: Mapping[str, nn.Module]) -> dict[str, float]:
    """For each block, the mean over tokens of 1 − cos(what enters, what leaves)."""
    sums = dict.fromkeys(blocks, 0.0)
    counts = dict.fromkeys(blocks, 0.0)

    def hook(name: str, weight: float, mask: Tensor | None) -> Any:
        def measure(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            apart = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)
            apart = apart[mask] if mask is not None and mask.shape == apart.shape else apart
            sums[name] += weight * float(apart.sum())
            counts[name] += weight * apart.numel()

        return measure

    with torch.inference_mode(), evaluating(model):
        for corpus in data:
            for batch in corpus.batches:
                with contextlib.ExitStack() as hooks:
                    for name, block in blocks.items():
                        measure = hook(name, corpus.weight, mask_of(batch))
                        hooks.callback(block.register_forward_hook(measure, with_kwargs=True).remove)
                    call(model, batch)
    return {name: value / max(counts[name], 1.0) for name, value in sums.items()}
