"""Dense layers replaced by factorised ones that are trained in their place.

A method file defines two functions: `spec(config, out, in_)`, what config.json will say of a layer of that size, and
`start(config, layer, weight, source)`, which gives the layer its first values, from a weight or from a generator. What
acts in time is a `weft.steps.Controller` that the file may define besides: `relora` → `ReloraController`. Its parts are
the layers that were made. A config whose `convolutions` is true has Conv2d served as well; `spec` is then given their
kernel's size besides, with in·kh·kw as the width.

A file without those two functions leaves the layers what they are, and only its controller acts on them. Where a file
has `finish(config, model)`, that is what becomes of the model once it is trained: `weft pretrain` and `weft adapt` call
it before they save. It says whether the model is another one then.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft import registry
from weft.algebra.random import generator
from weft.anatomy import all_blocks
from weft.errors import UsageError
from weft.linear._structured import Structured, bare_linear, empty
from weft.linear._transformers import attach_format
from weft.patterns import selection
from weft.pretrain._config import PretrainConfig
from weft.steps import Controller

LOGGER = logging.getLogger(__name__)


def reparametrise(model: nn.Module, method: str, **options: Any) -> nn.Module:
    """Put trainable factorised layers in place of a model's layers; the model, which is changed in place.

    Args:
        model: any torch module. A transformers model is then saved and loaded as usual, with weft imported.
        method: a name of `weft methods --pillar pretrain`.
        options: fields of the method's config: `rank`, `target_modules`, …

    Everything else of the model stays as it is, and all of it is trained. Raises UsageError for an unknown method or
    option, and where nothing matches or a layer cannot be served; the model is then as it was.
    """
    card = registry.card(method, "pretrain")
    config: Any = registry.config_class(card.slug).from_options(options)  # type: ignore[attr-defined]
    maker = registry.load(card.slug)
    layers = targets(model, config)
    if isinstance(model, PreTrainedModel):
        attach_format(model)  # which refuses a quantised model, before any work
    made = {}
    for name, layer in layers.items():
        try:
            if getattr(layer, "controllers", None):
                raise UsageError(f"it is trained as {', '.join(layer.controllers)} already")
            made[name] = _made(maker, config, name, layer) if hasattr(maker, "spec") else layer
        except UsageError as error:
            raise UsageError(f"{card.slug}: {name}: {error}") from error
    before = sum(p.numel() for p in model.parameters())
    for name, layer in made.items():
        model.set_submodule(name, layer)
    controller: Any = getattr(maker, registry.class_name(card.slug, "Controller"), None)
    if controller is not None:
        _hang(controller, config, made)
    if isinstance(model, PreTrainedModel):
        attach_format(model)
    after = sum(p.numel() for p in model.parameters())
    LOGGER.info(f"{len(made)} layers are trained as {card.slug}: {after:,} parameters in place of {before:,}")
    return model


def targets(model: nn.Module, config: PretrainConfig) -> dict[str, Any]:
    """The layers to factorise, by name: linear ones inside of the model's blocks, or of a model without blocks.

    Where the method serves convolutions: those, wherever they are, and all linear layers of a model that has some in
    its blocks. One of several groups stays as it is, unless `target_modules` names it; `reparametrise` refuses it then.

    Raises UsageError, with a list of what there is, where nothing matches.
    """
    inside = all_blocks(model)
    anywhere = not inside or (config.convolutions and any(map(_convolutional, inside.values())))
    chosen = selection(config.target_modules, None)
    found, there = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, Structured):
            raise UsageError(f"{name} is of kind {module.kind} already")
        if isinstance(module, nn.Conv2d):
            served = config.convolutions and (module.groups == 1 or config.target_modules is not None)
        else:
            within = anywhere or any(f"{name}.".startswith(f"{block}.") for block in inside)
            served = isinstance(module, nn.Linear | Conv1D) and within
        if not (served and name):
            continue
        there.add(name.rpartition(".")[2])
        if chosen(name):
            found[name] = module
    found = {name: found[name] for name in config.choose(found)}
    if not found:
        names = ", ".join(sorted(there)) or "none that it serves"
        raise UsageError(f"target_modules={config.target_modules!r} match nothing to factorise: there are {names}")
    return found


def _convolutional(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in block.modules())


def _made(maker: Any, config: PretrainConfig, name: str, layer: Any) -> Structured:
    """The factorised layer for the place of a dense one; without values where that one has none."""
    weight = layer.weight.detach().mT if isinstance(layer, Conv1D) else layer.weight.detach()
    out, in_ = len(weight), weight[0].numel()
    kernel = [layer.kernel_size] if isinstance(layer, nn.Conv2d) else []
    bias = getattr(layer, "bias", None)
    spec = {**maker.spec(config, out, in_, *kernel), "bias": bias is not None}
    place = layer if kernel else bare_linear(in_, out, bias is not None, weight.device, weight.dtype)
    made = empty(spec, place).train(layer.training)
    if not weight.is_meta:
        with torch.no_grad():
            maker.start(config, made, weight, generator(config.seed, name))
            if bias is not None:
                made.bias.copy_(bias)  # type: ignore[union-attr]
    return made


def _hang(kind: type[Controller], config: PretrainConfig, layers: dict[str, Any]) -> None:
    """Make the controller of these layers, and let each tell it of what happens to the layer."""
    for name, layer in layers.items():
        layer.name = name
    controller = kind(config, list(layers.values()))
    for layer in layers.values():
        layer.controllers = {config.slug(): controller}
        layer.register_forward_pre_hook(_watch)
        layer.register_load_state_dict_post_hook(_forget)


def release(model: nn.Module) -> None:
    """Let no controller act on the model's layers any more. Their parameters are new ones, as hooks hang on the old."""
    for module in model.modules():
        if getattr(module, "controllers", None):
            module.controllers = {}  # type: ignore[assignment]
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(p.detach(), p.requires_grad))


def _watch(layer: Any, inputs: Any) -> None:
    if layer.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for controller in layer.controllers.values():
            controller.watch(layer)


def _forget(layer: Any, keys: Any) -> None:
    for controller in layer.controllers.values():
        controller.forget(layer)
