"""Low-rank layers cut to fewer components after training, in any model that has them; and batch norms set right again.

What is cut are the last components, or those that are 0 in both factors. Where training has ordered them, as Maestro
does, one model holds all smaller ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from weft.errors import UsageError, WeftError
from weft.linear._transformers import attach_format, stock_places
from weft.linear.low_rank import LowRank
from weft.linear.low_rank_conv import LowRankConv

Layer = LowRank | LowRankConv


def factorised(model: nn.Module) -> dict[str, Layer]:
    """The layers that can be cut, by name. Raises UsageError where there are none."""
    found: dict[str, Layer] = {n: m for n, m in model.named_modules() if isinstance(m, LowRank | LowRankConv)}
    if not found:
        raise UsageError("the model has no low-rank layers: there is nothing to cut")
    return found


def components(layer: Layer) -> Tensor:
    """The places of the components that are not 0, in order."""
    down, up = layer.down.weight.detach().flatten(1), layer.up.weight.detach().flatten(1)
    return (down.any(1) | up.any(0)).nonzero().flatten()


def sides(layer: Layer) -> tuple[int, int]:
    """The sizes of the weight as a matrix: out, in; of a convolution, in·kh·kw."""
    return len(layer.up.weight), math.prod(layer.down.weight.shape[1:])


@torch.no_grad()
def shrink(model: nn.Module, widths: dict[str, int] | None = None) -> nn.Module:
    """Leave out the components that are 0, and those from `widths` on; the model, which is changed in place.

    A layer becomes low rank of its width or, where a stock layer has no more numbers, that; of width 0 only the bias is
    left (a convolution keeps one component of zeros). It works on any model with low-rank layers, one that was loaded
    too. New parameters take the place of the old: only after training. Raises UsageError, the model being as it was,
    for a layer or a width that is not there.
    """
    layers = factorised(model)
    kept = {name: components(layer) for name, layer in layers.items()}
    for name, width in (widths or {}).items():
        if name not in layers or not 0 <= width <= len(kept[name]):
            there = f"0 to {len(kept[name])}" if name in layers else "no such low-rank layer"
            raise UsageError(f"widths: {name} cannot have width {width}: {there}")
        kept[name] = kept[name][:width]
    places = stock_places(model, layers)
    for name, layer in layers.items():
        out, in_ = sides(layer)
        small: nn.Module = _narrowed(layer, kept[name]).train(layer.training)
        if (out + in_) * len(kept[name]) >= out * in_:
            small = small.restored(places[name])  # type: ignore[operator]
        model.set_submodule(name, small)
    if isinstance(model, PreTrainedModel):
        attach_format(model)
    return model


def _narrowed(layer: Layer, kept: Tensor) -> Layer:
    down, up = layer.down.weight.flatten(1), layer.up.weight.flatten(1)
    if isinstance(layer, LowRank):
        return LowRank.from_factors(up[:, kept], down[kept], layer.bias)
    if not len(kept):
        return LowRankConv.from_factors(0 * up[:, :1], 0 * down[:1], layer.bias, like=layer.stock_place())
    return LowRankConv.from_factors(up[:, kept], down[kept], layer.bias, like=layer.stock_place())


@dataclass(frozen=True)
class Cut:
    """A truncated model.

    Attributes:
        macs: multiplications of its low-rank layers, as a share of what they would take dense.
        loss: what `evaluate` said.
        widths: of each layer, for `shrink`.
    """

    macs: float
    loss: float
    widths: dict[str, int]


@torch.no_grad()
def truncate(
    model: nn.Module,
    budget: float,
    evaluate: Callable[[nn.Module], float],
    *,
    step: float = 0.05,
    lazy: bool = False,
) -> list[Cut]:
    """Cut layers greedily, without training, until they take `budget` of their dense multiplications.

    Args:
        budget, step: shares of what the layers would take dense: in the end, and saved by one cut.
        evaluate: the loss of the model, which it may recalibrate; called for each layer and cut.
        lazy: take what a layer's cut cost when it was last tried for the least that it can cost, and try again those
            alone that may be the best. The same cuts wherever one costs no less after others, several times faster.

    Each cut saves as much, or all that the layer has, in the layer whose cut leaves the least loss: with a `step` above
    the share that a layer has of all, whole layers go at once. Returns the models from the whole one to the smallest,
    each nested in the one before; `shrink(model, cuts[-1].widths)` makes one. The model's factors are as they were in
    the end. Raises UsageError where the budget cannot be met, and WeftError where the whole model has no finite loss.
    """
    if not 0 <= budget <= 1 or not 0 < step <= 1:
        raise UsageError(f"budget={budget!r} and step={step!r} must be shares, 0 to 1, and step not 0")
    trial = _Trial(factorised(model))

    def loss() -> float:
        value = float(evaluate(model))
        return value if math.isfinite(value) else math.inf

    with _evaluating(model), trial:
        widths = {name: len(kept) for name, kept in trial.kept.items()}
        with trial.counting():
            first = loss()
        if first == math.inf:
            raise WeftError("the loss of the whole model is not finite: there is nothing to compare cuts by")
        cuts = [Cut(trial.macs(widths), first, widths)]
        cost = dict.fromkeys(widths, -math.inf)  # at least
        while cuts[-1].macs > budget:
            saving = min(step, cuts[-1].macs - budget)
            tried: list[tuple[float, str, int]] = []
            for name in sorted(widths, key=lambda name: cost[name]):
                if tried and min(tried)[0] <= cuts[-1].loss + cost[name]:
                    break
                smaller = trial.smaller(name, widths[name], saving)
                if smaller < widths[name]:
                    trial.narrow(name, smaller)
                    tried.append((loss(), name, smaller))
                    trial.narrow(name, widths[name])
                    if lazy:
                        cost[name] = tried[-1][0] - cuts[-1].loss
            if not tried:
                raise UsageError(f"budget={budget!r} cannot be met: the least is {cuts[-1].macs:.3g}")
            least, name, smaller = min(tried, key=lambda found: found[0])
            trial.narrow(name, smaller)
            widths = {**widths, name: smaller}
            cuts.append(Cut(trial.macs(widths), least, widths))
    return cuts


class _Trial:
    """Layers whose last components can be left out; all are there again at the end of its `with`."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self.kept = {name: components(layer) for name, layer in layers.items()}
        self.whole = {name: (layer.down.weight.data, layer.up.weight.data) for name, layer in layers.items()}
        self.places = dict.fromkeys(layers, 0)  # at how many each layer is applied

    def __enter__(self) -> None:
        for name, kept in self.kept.items():
            self.narrow(name, len(kept))

    def __exit__(self, *error: object) -> None:
        for name, layer in self.layers.items():
            layer.down.weight.data, layer.up.weight.data = self.whole[name]

    def narrow(self, name: str, width: int) -> None:
        """Compute with the layer's first `width` components only: a trial takes no longer than the model it tries."""
        down, up = self.whole[name]
        kept = self.kept[name][:width]
        self.layers[name].down.weight.data, self.layers[name].up.weight.data = down[kept], up[:, kept]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count at how many places each layer is applied meanwhile. Raises UsageError where none is at all."""

        def counter(name: str) -> Callable[..., None]:
            def count(up: nn.Module, inputs: Any, y: Tensor) -> None:
                self.places[name] += y.numel() // sides(self.layers[name])[0]

            return count

        handles = [layer.up.register_forward_hook(counter(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not any(self.places.values()):
            raise UsageError("evaluate runs none of the model's low-rank layers, so there is nothing to save")

    def dense(self) -> int:
        """Multiplications of all the layers, were they dense."""
        return sum(self.places[name] * math.prod(sides(layer)) for name, layer in self.layers.items())

    def macs(self, widths: dict[str, int]) -> float:
        """Multiplications of layers of these widths, as a share of the dense ones, which none exceeds."""
        each = [(self.places[n], *sides(self.layers[n]), width) for n, width in widths.items()]
        return sum(places * min((out + in_) * width, out * in_) for places, out, in_, width in each) / self.dense()

    def smaller(self, name: str, width: int, saving: float) -> int:
        """The largest width of a layer that saves so much; its least where none does, or `width` itself there."""
        layer, places = self.layers[name], self.places[name]
        out, in_ = sides(layer)
        least = min(int(isinstance(layer, LowRankConv)), width)  # as `shrink` has it
        if not places:
            return width
        left = min((out + in_) * width, out * in_) - saving * self.dense() / places
        return max(min(math.floor(left / (out + in_)), width - 1), least)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Compute the running statistics of the model's batch norms anew, as means over the batches; the model.

    A batch is what the model takes: a tensor, a tuple of arguments, or a mapping of keywords. All else is in evaluation
    meanwhile, so that layers are whole. Raises UsageError where there are no batch norms, or no batches.
    """
    found = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not found:
        raise UsageError("the model has no batch norms with running statistics")
    momenta = [norm.momentum for norm in found]
    seen = 0
    with _evaluating(model):
        try:
            for batch in batches:
                for norm in found if not seen else ():
                    norm.reset_running_stats()
                    norm.train().momentum = None  # the plain mean over batches
                seen += 1
                if isinstance(batch, tuple | list):
                    model(*batch)
                elif isinstance(batch, Tensor):
                    model(batch)
                else:
                    model(**batch)
        finally:
            for norm, momentum in zip(found, momenta):
                norm.momentum = momentum
    if not seen:
        raise UsageError("batches is empty: the batch norms are as they were")
    return model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation for a while; every module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
