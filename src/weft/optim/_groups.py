"""Parameter groups for a model, and optimisers made for one: what Trainer and the command line call."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft import registry
from weft.anatomy import heads
from weft.errors import UsageError
from weft.optim._config import OptimConfig
from weft.optim._optimizer import Group
from weft.patterns import Pattern, selection

LOGGER = logging.getLogger(__name__)


def projected(model: nn.Module, rank: int, target_modules: Pattern | None = None) -> dict[str, nn.Parameter]:
    """The matrices whose gradients are projected to `rank`, by name: trained weights of linear layers.

    Left out: output heads, weights tied to one or to an embedding, and matrices whose shorter side is at most `rank`,
    for which a projection saves nothing. Raises UsageError, with a list of what there is, where nothing is left.
    """
    apart = {id(p) for module in heads(model) for p in module.parameters(recurse=False)}
    apart |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = selection(target_modules, None)
    found: dict[str, nn.Parameter] = {}
    there, narrow = set(), 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or not module.weight.requires_grad or id(module.weight) in apart:
            continue
        there.add(name.rpartition(".")[2])
        if not chosen(name):
            continue
        if min(module.weight.shape) <= rank:
            narrow += 1
            continue
        apart.add(id(module.weight))  # a weight that two layers share is projected once
        found[f"{name}.weight"] = cast(nn.Parameter, module.weight)
    if not found:
        names = ", ".join(sorted(there)) or "no linear layers"
        why = f"the {narrow} that match have a side of at most rank={rank}" if narrow else f"there are: {names}"
        raise UsageError(f"nothing to project in {type(model).__name__}, target_modules={target_modules!r}: {why}")
    return found


def param_groups(
    model: nn.Module, *, rank: int, target_modules: Pattern | None = None, weight_decay: float = 0.0, **options: Any
) -> list[Group]:
    """The trained parameters of a model in groups, by name: projected matrices, the rest with and without decay.

    Args:
        rank: r of the projected group; see `projected` for what is in it.
        weight_decay: for all but biases and norms.
        options: further keys of the projected group: `update_proj_gap`, `scale`, `proj_type`, …
    """
    matrices = projected(model, rank, target_modules)
    inside = {id(p) for p in matrices.values()}
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    trained = sum(p.numel() for _, p in [*matrices.items(), *rest])
    share = sum(p.numel() for p in matrices.values())
    LOGGER.info(f"{share:,} of {trained:,} parameters in {len(matrices)} matrices are projected to rank {rank}")
    groups: list[Group] = [
        {"params": list(matrices.items()), "weight_decay": weight_decay, "rank": rank, **options},
        {"params": [(name, p) for name, p in rest if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def for_trainer(
    method: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    batches: Iterable[dict[str, Any]] | None = None,
    **options: Any,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: the optimiser's class and its arguments, groups included.

    Args:
        lr, weight_decay: by default the method's own; Trainer's arguments are not looked at.
        batches: dicts of what the model takes, for a method whose card says that it needs some.
        options: fields of the method's config: `rank`, `update_proj_gap`, `target_modules`, …

    Raises UsageError for an unknown method or option, and batches that the method has no use for.
    """
    card = registry.card(method, "optim")
    served = {"batches": batches} if "batches" in card.needs else {}
    if batches is not None and not served:
        raise UsageError(f"{card.slug} looks at no batches: leave them out")
    config: OptimConfig = registry.config_class(card.slug).from_options(options)  # type: ignore[attr-defined]
    module = registry.load(card.slug)
    weight_decay = card.recipe.get("weight_decay", 0.0) if weight_decay is None else weight_decay
    arguments = {"lr": card.recipe["learning_rate"], **module.arguments(config, model, weight_decay, **served)}
    if lr is not None:
        arguments["lr"] = lr
    return getattr(module, registry.class_name(card.slug, "")), arguments


def optimizer(method: str, model: nn.Module, **options: Any) -> Any:
    """The optimiser itself, for a training loop of one's own; arguments as of `for_trainer`."""
    kind, arguments = for_trainer(method, model, **options)
    return kind(arguments.pop("params"), **arguments)
