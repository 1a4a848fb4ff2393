"""How many outliers each block of a model has, by its weights and what it receives: OWL's measure.

Lu Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv 2310.05175.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft import anatomy
from weft.algebra.statistics import Moments
from weft.errors import UsageError


def linear_layers(block: nn.Module) -> list[Any]:
    """The linear layers of a block."""
    return [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]


@torch.no_grad()
def outlier_ratios(
    model: nn.Module, batches: Iterable[dict[str, Any]], outlier_multiple: float = 13.0
) -> list[float]:
    """D of each block, in percent: how many of |W|·√c are above `outlier_multiple` times the block's mean of them.

    One forward pass over the batches, dicts of what the model takes, without dropout; tokens that an `attention_mask`
    leaves out do not count. Layers that no token reaches count for nothing, nor do experts stacked into one parameter.
    Raises UsageError where a block receives nothing, or numbers that are not finite.
    """
    layers = {name: linear_layers(block) for name, block in anatomy.blocks(model).items()}
    received = {layer: Moments(["squares"]) for mine in layers.values() for layer in mine}
    device, training = next(model.parameters()).device, model.training
    mask: Tensor | None = None

    def receives(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        try:
            received[layer].add(args[0], mask if mask is not None and mask.shape == args[0].shape[:-1] else None)
        except ValueError as error:
            raise UsageError("a layer receives numbers that are not finite on the calibration batches") from error

    with contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        for layer in received:
            stack.callback(layer.register_forward_pre_hook(receives).remove)
        model.eval()
        for batch in batches:
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            mask = batch["attention_mask"].bool() if isinstance(batch.get("attention_mask"), Tensor) else None
            model(**batch)
    ratios = []
    for name, mine in layers.items():
        reached = [(layer, received[layer].square) for layer in mine if received[layer].n]
        if not reached:
            raise UsageError(f"the calibration batches reach no linear layer of block {name}, so it has no outliers")
        ratios.append(_ratio(reached, outlier_multiple))
    return ratios


def _ratio(layers: list[tuple[Any, Tensor]], multiple: float) -> float:
    """D of the block of these layers, each with the mean square of what it receives (in); one matrix at a time."""

    def scores(layer: Any, square: Tensor) -> Tensor:
        w = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        return w.abs() * square.sqrt().to(w)

    entries = sum(layer.weight.numel() for layer, _ in layers)
    total = sum(float(scores(*each).sum(dtype=torch.float64)) for each in layers)
    above = sum(int((scores(*each) > multiple * total / entries).sum()) for each in layers)
    return 100 * above / entries
