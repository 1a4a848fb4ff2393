"""What the laws are tried on: methods from the registry on tiny models, with nothing known but card and config."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import specimens
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

import weft
from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Delta

SLUGS = sorted(weft.cards("adapters"))
TIME_LIMIT = 30 * len(SLUGS)  # seconds for processes that try all methods


def fields(slug: str) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in weft.config_class(slug).own_fields()}


def options(slug: str, short: bool = False, **given: Any) -> dict[str, Any]:
    """Given options over a rank and a size that fit tiny models.

    `short` adds the values with which a run of twenty steps meets the method's events: a field whose default is meant
    for thousands of steps says so itself, `metadata={"help": ..., "short": 3}`.
    """
    own = fields(slug)
    chosen: dict[str, Any] = {}
    knob = weft.card(slug).knob  # what sets the number of parameters, made small
    if isinstance(own[knob].default, int):
        chosen[knob] = min(own[knob].default, 8)
    if "r" in own:
        default = own["r"].default
        chosen["r"] = min(default, 4) if isinstance(default, int) else 4
    if short:
        chosen |= {name: f.metadata["short"] for name, f in own.items() if "short" in f.metadata}
    return chosen | given


def served(slug: str, model: nn.Module) -> dict[str, Any]:
    """What the card needs, by name; batches are drawn, other needs are not known to these tests."""
    known = {
        "batches": [specimens.batch(90), specimens.batch(91)],
        "held_out": [specimens.batch(92), specimens.batch(93), specimens.batch(94)],
        "original_weights": model,  # nothing was lost to quantisation
        "quality": 0.7,  # of all images alike: what varies from one to the next is no one matrix
    }
    return {need: known[need] for need in weft.card(slug).needs}


def configure(slug: str, model: nn.Module, cell: specimens.Cell, short: bool = False, **given: Any) -> AdapterConfig:
    """A config, prepared on the model, ready for `get_peft_model`."""
    config = weft.config_class(slug)(**options(slug, short, **{**cell.target, **given}))
    return weft.prepare(model, config, **served(slug, model))


def attach(
    slug: str,
    cell: specimens.Cell = specimens.SMALL,
    dtype: torch.dtype = torch.float32,
    start: int = 0,
    short: bool = False,
    **given: Any,
) -> nn.Module:
    """The method on a fresh copy of the cell's model; in float64 every tensor of the adapter is float64 as well.

    `start` seeds the global generator for what is drawn while attaching.
    """
    torch.manual_seed(start)
    model = specimens.base(cell, dtype)
    model = get_peft_model(model, configure(slug, model, cell, short, **given))
    return (model.double() if dtype == torch.float64 else model).eval()


def attach_two(
    slug: str, cell: specimens.Cell = specimens.SMALL, dtype: torch.dtype = torch.float32, **given: Any
) -> nn.Module:
    """Adapters "default" and "second", both active, both randomised, each prepared on the untouched base."""
    torch.manual_seed(0)
    base = specimens.base(cell, dtype)
    first, second = (configure(slug, base, cell, **given) for _ in range(2))
    model = get_peft_model(base, first)
    model.add_adapter("second", second)
    model = (model.double() if dtype == torch.float64 else model).eval()
    randomise(model, "default", 0.1)
    randomise(model, "second", -0.07)
    model.base_model.set_adapter(["default", "second"])
    return model


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted modules and parameters, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def deltas(model: nn.Module, adapter: str = "default") -> list[Delta]:
    """Every delta of one adapter."""
    return [d for _, layer in layers(model) for d in layer.deltas[adapter].modules() if isinstance(d, Delta)]


def controllers(model: nn.Module) -> list[Controller]:
    found: dict[int, Controller] = {}
    for _, layer in layers(model):
        for controller in layer.controllers.values():
            found.setdefault(id(controller), controller)
    return list(found.values())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomise(model: nn.Module, adapter: str = "default", scale: float = 0.1) -> nn.Module:
    """Move every trainable tensor of an adapter by numbers that depend only on its place, alike in all dtypes."""
    done: set[int] = set()
    for i, delta in enumerate(deltas(model, adapter)):
        for j, p in enumerate(delta.parameters()):
            if id(p) not in done:
                done.add(id(p))
                generator = torch.Generator().manual_seed(1 + 97 * i + j)
                noise = scale * torch.randn(p.shape, generator=generator)
                with torch.no_grad():
                    p.add_(noise.to(p.dtype))
    return model


def randomise_open(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """`randomise`, but what a method holds at zero stays there: a rank that was learned is kept."""
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    randomise(model, scale=scale)
    with torch.no_grad():
        for name, p in trainable(model).items():
            if not bool((before[name] == 0).all()):
                p.mul_(before[name] != 0)
    return model


def native(layer: Any, matrix: Tensor) -> Tensor:
    """ΔW (out × in) in the layout of the wrapped parameter; worked out here and not by the engine."""
    inner = layer.get_base_layer()
    if hasattr(layer, "parameter_name"):
        return matrix.transpose(1, 2) if getattr(inner, "is_transposed", False) else matrix
    if type(inner).__name__ in ("Conv1D", "Embedding"):
        return matrix.T
    return matrix.reshape(inner.weight.shape)


def parameter_name(layer: Any) -> str:
    return getattr(layer, "parameter_name", "weight")


@torch.no_grad()  # small products have other bits while gradients are recorded
def delta_weight(layer: Any, adapter: str = "default") -> Tensor:
    """ΔW in the parameter's layout, from the method's own `delta`."""
    entry = layer.deltas[adapter]
    parts = [d.delta() for d in entry.modules() if isinstance(d, Delta)]
    if hasattr(layer, "parameter_name"):
        return native(layer, torch.stack(parts))
    return native(layer, torch.cat(parts))


def delta_bias(layer: Any, adapter: str = "default") -> Tensor | None:
    parts = [d.bias_delta() for d in layer.deltas[adapter].modules() if isinstance(d, Delta)]
    return None if any(p is None for p in parts) else torch.cat([p.detach() for p in parts])


def merges(model: nn.Module, **kwargs: Any) -> bool:
    """Merge the active adapters; False where that is rightly refused, by name: Δb and a module without a bias."""
    homeless = [
        layer.module_name
        for _, layer in layers(model)
        if getattr(layer.get_base_layer(), "bias", None) is None
        and any(delta_bias(layer, adapter) is not None for adapter in layer.deltas)
    ]
    if not homeless:
        model.merge_adapter(**kwargs)
        return True
    import pytest  # here alone: the documentation's generator uses this file where no pytest is installed

    with pytest.raises(weft.UsageError, match=f"{re.escape(homeless[0])} has no bias"):
        model.merge_adapter(**kwargs)
    return False


def chain(layer: Any) -> Iterator[Any]:
    """A layer and, where several parameters of one module are adapted, the layers wrapped inside it."""
    while isinstance(layer, BaseTunerLayer):
        yield layer
        layer = layer.base_layer


def folded(layer: Any, adapters: tuple[str, ...] = ("default",), dtype: torch.dtype = torch.float64) -> nn.Module:
    """The plain module with float64 W + ΣΔW (and bias) put in its place, rounded once to `dtype`."""
    inner = copy.deepcopy(layer.get_base_layer()).double()
    with torch.no_grad():
        for part in chain(layer):
            for adapter in adapters:
                getattr(inner, parameter_name(part)).add_(delta_weight(part, adapter).double())
                shift = delta_bias(part, adapter)
                if shift is not None:
                    old = inner.bias if inner.bias is not None else torch.zeros_like(shift, dtype=torch.float64)
                    inner.bias = nn.Parameter(old.detach() + shift.double())
    return inner.to(dtype)


def reference(seen: Seen, adapters: tuple[str, ...] = ("default",), dtype: torch.dtype = torch.float64) -> Tensor:
    """What `folded` returns for what the layer received."""
    args = [to(dtype, a) for a in seen.args]
    with torch.no_grad():
        return folded(seen.layer, adapters, dtype)(*args, **{k: to(dtype, v) for k, v in seen.kwargs.items()})


@dataclasses.dataclass
class Seen:
    """What one adapted layer received and returned."""

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def watch_forward(model: nn.Module, data: dict[str, Tensor] | None = None) -> list[Seen]:
    """Run the model once and record every outermost adapted layer's input and output."""
    seen: list[Seen] = []
    inner = {id(layer.base_layer) for _, layer in layers(model)}

    def record(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(Seen(layer, args, kwargs, output.detach().clone()))

    handles = [
        layer.register_forward_hook(record, with_kwargs=True) for _, layer in layers(model) if id(layer) not in inner
    ]
    with torch.no_grad():
        model(**(data or specimens.batch()))
    for handle in handles:
        handle.remove()
    return seen


def to(dtype: torch.dtype, value: Any) -> Any:
    """Floating tensors in another dtype, everything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def optimizer_for(
    model: nn.Module, tmp: Any, steps: int = 20, lr: float = 0.01, **changes: Any
) -> tuple[Optimizer, Any]:
    """What weft itself hands to Trainer, with a constant schedule unless told otherwise."""
    settings = {"lr_scheduler_type": "constant", "weight_decay": 0.01, "learning_rate": lr, "max_steps": steps}
    args = TrainingArguments(output_dir=str(tmp), use_cpu=True, report_to="none", **(settings | changes))
    return weft.optimizer_and_scheduler(model, args)


def train(
    model: nn.Module, optimizer: Optimizer, steps: int, accumulation: int = 1, rows: int = 8, first: int = 0
) -> None:
    """Plain loop: the same `rows` a step, in one batch or in `accumulation` equal ones."""
    model.train()
    for i in range(first, first + steps):
        whole = specimens.batch(i, rows)
        for part in range(accumulation):
            piece = {k: v.chunk(accumulation)[part] for k, v in whole.items()}
            (model(**piece).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs(model: nn.Module, data: dict[str, Tensor] | None = None) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**(data or specimens.batch(50))).logits


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-300))


def overrides(obj: Any, base: type, *names: str) -> bool:
    """Whether the class of `obj` replaces one of the named methods of `base`."""
    return any(getattr(type(obj), name) is not getattr(base, name) for name in names)


def has_events(model: nn.Module) -> bool:
    """Whether something of the method happens at optimiser steps."""
    return any(
        overrides(c, Controller, "begin", "before_step", "after_step", "update_scales") for c in controllers(model)
    )
