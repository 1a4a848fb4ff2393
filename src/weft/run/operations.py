"""How long a compression will take, before any of it: operations counted, and small ones timed for their speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.run.models import device

if TYPE_CHECKING:
    import torch

    from weft.run.compress import Calibration, Outline


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a compression, by the speed that they run at.

    Attributes:
        passes: forward and backward passes over the calibration data, in the model's dtype.
        products: matrix products in float32: statistics, and what the method counts.
        eigen: eigenvectors; None, as all of the method's own, where nobody has counted.
    """

    passes: float
    products: float
    eigen: float | None


def operations(shape: Outline, model: Any, found: dict[str, Calibration]) -> Operations:
    """Count what calibrating and factorising take.

    A pass per block runs up to the block's last layer, so that what the passes cost rises with the square of the depth.
    Counted are the weights' products, attention's at the sequences' mean length, and each layer's own statistics:
    layers that share an input share those, so there may be fewer.
    """
    from weft.compress._allocate import TRIED
    from weft.compress._calibration import FORWARD
    from weft.compress._layers import type_of

    tokens = sum(each.tokens for each in found.values())
    length = tokens / max(sum(each.sequences for each in found.values()), 1)
    at, before, whole = _reach(model, length)
    passes = products = 0.0
    served = [layer for layer in shape.layers if len(shape.maker.sizes(layer))]
    for block in dict.fromkeys(layer.block for layer in served):
        group = [part for layer in served if layer.block == block for part in layer.parts]
        needs = {layer.name: shape.maker.needs(layer) for layer in group}
        if any(FORWARD & set(each) for each in needs.values()):
            passes += tokens * max(at[layer.name] for layer in group)
        for layer in group:
            for need, side in (("input", layer.in_), ("output", layer.out)):
                products += 2.0 * tokens * side**2 * (need in needs[layer.name])
        graded = [layer for layer in group if "fisher" in needs[layer.name]]
        if graded:  # forward, back to the block, and the block's own gradients
            passes += tokens * (2 * whole - min(before[layer.name] for layer in graded))
            passes += tokens * sum(2.0 * layer.out * layer.in_ for layer in graded)
    if shape.maker.config.allocate == "block_influence":
        passes += tokens * whole
    if shape.maker.config.allocate == "sweep":
        passes += tokens * whole * (1 + len(TRIED) * len({type_of(layer.name) for layer in served}))
    counts = [shape.maker.operations(layer) for layer in served]
    known = [count for count in counts if count is not None]
    products += sum(count[0] for count in known)
    return Operations(passes, products, sum(count[1] for count in known) if len(known) == len(counts) else None)


def _reach(model: Any, length: float) -> tuple[dict[str, float], dict[str, float], float]:
    """Operations a token of a forward pass: up to and with each layer, before it, and of the whole model."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from weft.anatomy import blocks

    starts = {id(block) for block in blocks(model).values()}
    config = model.config.get_text_config()
    attention = 4.0 * length * getattr(config, "hidden_size", 0)
    at, before, total = {}, {}, 0.0
    for name, module in model.named_modules():
        if id(module) in starts:
            total += attention
        if isinstance(module, nn.Linear | Conv1D | nn.Conv2d | nn.Embedding):
            before[name] = total
            total += 0.0 if isinstance(module, nn.Embedding) else 2.0 * module.weight.numel()
            at[name] = total
    return at, before, total


def seconds_of(count: Operations, dtype: torch.dtype) -> float:
    """Seconds of what was counted, by the speed of small products and eigenvectors, which are timed now."""
    import torch

    from weft.algebra.random import generator

    side = 512
    a = torch.randn(side, side, generator=generator("operations")).to(device())
    low, symmetric = a.to(dtype), a + a.mT
    seconds = count.passes * _seconds(lambda: low @ low) / (2 * side**3)
    seconds += count.products * _seconds(lambda: a @ a) / (2 * side**3)
    if count.eigen:
        seconds += count.eigen * _seconds(lambda: torch.linalg.eigh(symmetric)) / (9 * side**3)
    return seconds


def _seconds(work: Callable[[], Any]) -> float:
    """The best of three."""
    import torch

    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
