"""Compressed models as ordinary transformers models: saved by `save_pretrained`, loaded by `from_pretrained`.

config.json describes every structured layer, by its name in the base model, so that the base class, every head class
and the Auto classes find it:

    "quantization_config": {"quant_method": "weft", "format": 1,
                            "modules": {"layers.0.mlp.up_proj": {"kind": "low_rank", "version": 1, "rank": 64, …}}}

A layer that uses what another stores names that one as its `leader`. Weights that torchao quantised, of factors or of
layers that stayed dense, are described under "quantised" (`_quantised.py`).

transformers calls whatever replaces modules before loading a quantizer. Importing this file makes weft's known to it.
Without weft, loading raises: the checkpoint's `….up_proj.weight` has no elements and fits no matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from weft.errors import UsageError, WeftError
from weft.files import whole_folder
from weft.linear._quantised import Described, flat, is_quantised, make_room, put_together, quantised
from weft.linear._structured import Structured, bare_linear, empty

FORMAT = 1
Specs = dict[str, dict[str, Any]]


@register_quantization_config("weft")
class WeftFormat(QuantizationConfigMixin):
    """What config.json says of the structured layers of a model."""

    def __init__(
        self,
        modules: Specs,
        format: int = FORMAT,
        quant_method: str = "weft",
        quantised: Described | None = None,
        **unknown: Any,
    ) -> None:
        if format > FORMAT:
            raise UsageError(f"the model has weft's format {format}, and this weft reads up to {FORMAT}: upgrade weft")
        if unknown:
            raise UsageError(f"the model's quantization_config has a field {min(unknown)!r}, which weft does not know")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own are members of an enum
        self.format, self.modules = format, modules
        if quantised:
            self.quantised = quantised


@register_quantizer("weft")
class WeftQuantizer(HfQuantizer):
    """Puts empty structured layers into a model before its weights are loaded, and describes them when it is saved."""

    quantization_config: WeftFormat
    requires_calibration = True  # a dense checkpoint cannot be loaded into structured layers
    is_trainable = True
    is_qat_trainable = True  # every parameter of a structured layer can be trained
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        whole = type(model).__name__ in (model.config.architectures or ())
        for name, spec in sorted(self.quantization_config.modules.items(), key=lambda item: "leader" in item[1]):
            found = _resolve(model, name)
            if found is None:
                if whole:
                    raise UsageError(f"config.json describes {name}, which {type(model).__name__} does not have")
                continue  # a head's, and the model has another head or none
            old = model.get_submodule(found)
            try:
                layer = empty(spec, _plain(old), _leader(model, spec))
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from error
            # else transformers draws values for the weight that it has not
            layer._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(found, layer.train(old.training))
        for module, tensor, described in self._quantised(model):
            make_room(module, tensor, described)

    def _quantised(self, model: Any) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
        """The layers of the model whose tensor, of that name, is quantised in the checkpoint."""
        for name, described in getattr(self.quantization_config, "quantised", {}).items():
            layer, _, tensor = name.rpartition(".")
            found = _resolve(model, layer)
            if found is not None:
                yield model.get_submodule(found), tensor, described

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for module, tensor, described in self._quantised(model):
            put_together(module, tensor, described)
        for name, layer in structured_layers(model).items():
            # transformers marks what it loaded, only warns of what it did not, and leaves on meta what lies on disk
            stored = {key: t for key, t in layer.state_dict(keep_vars=True).items() if not is_quantised(t)}
            missing = [k for k, t in stored.items() if not (t.is_meta or getattr(t, "_is_hf_initialized", False))]
            if missing:
                raise WeftError(f"the checkpoint misses {name}.{missing[0]}")
            layer.derive()
        model.is_quantized = False  # it may be cast and trained as any other

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Called first by `save_pretrained`: what is written describes the model as it is now."""
        if getattr(model, "_hf_peft_config_loaded", False):  # then only the adapter is written
            return None, {}
        coded = quantised(model)
        tied = next((name for name in coded if name in _tied(model)), None)
        if tied is not None:
            raise UsageError(f"{tied} is quantised and tied to {_tied(model)[tied]}: leave it out when you quantise")
        parts, described = flat(coded)
        form = WeftFormat(_describe(model), quantised={_base_name(model, name): d for name, d in described.items()})
        model.config.quantization_config = self.quantization_config = form
        if not coded:
            return None, {}
        return {name: t for name, t in model.state_dict().items() if name not in coded} | parts, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return to_dense(model)


def structured_layers(model: nn.Module) -> dict[str, Structured]:
    """The structured layers of a model by name. Raises UsageError where an adapter lies on one."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Structured)}
    for name in layers:
        if name.endswith(".base_layer"):
            raise UsageError(f"{name.removesuffix('.base_layer')} has an adapter on it: save that apart, and unload it")
    return layers


def _describe(model: Any) -> Specs:
    """The spec of every structured layer, by its name in the base model; a head's by its name in the model."""
    names = {id(module): name for name, module in model.base_model.named_modules()}
    layers = structured_layers(model)
    names |= {id(layer): names.get(id(layer), name) for name, layer in layers.items()}
    specs = {}
    for name, layer in layers.items():
        spec = specs[names[id(layer)]] = layer.spec()
        if layer.leader is not None:
            if id(layer.leader) not in names:
                raise UsageError(f"{name} uses what another layer stores, which is no longer in the model")
            spec["leader"] = names[id(layer.leader)]
    return specs


def _base_name(model: Any, name: str) -> str:
    """The name in the base model of a tensor of the model; a head's stays."""
    return name if model.base_model is model else name.removeprefix(f"{model.base_model_prefix}.")


def _tied(model: Any) -> dict[str, str]:
    """Tensors that the model ties, and to which."""
    return {**model.all_tied_weights_keys, **{b: a for a, b in model.all_tied_weights_keys.items()}}


def _leader(model: Any, spec: dict[str, Any]) -> Structured | None:
    """The layer that a spec names as its leader, which is in its place already."""
    if "leader" not in spec:
        return None
    found = _resolve(model, spec["leader"])
    layer = model.get_submodule(found) if found is not None else None
    if not isinstance(layer, Structured):
        raise UsageError(f"its leader {spec['leader']} is no structured layer of {type(model).__name__}")
    return layer


def _resolve(model: Any, name: str) -> str | None:
    """The name in the model of what `_describe` called `name`, or None where the model lacks it."""
    for full in (name if model.base_model is model else f"{model.base_model_prefix}.{name}", name):
        try:
            model.get_submodule(full)
        except AttributeError:
            continue
        return full
    return None


def _plain(layer: nn.Module) -> nn.Module:
    """torch's word for a stock layer: a Conv1D is a linear layer whose weight lies the other way."""
    if not isinstance(layer, Conv1D):
        return layer
    in_, out = layer.weight.shape
    return bare_linear(in_, out, True, layer.weight.device, layer.weight.dtype)


def attach_format(model: Any) -> Any:
    """Make a transformers model whose layers were replaced by structured ones save itself as what it is; returns it.

    `model.save_pretrained(folder)`, and so Trainer, writes a checkpoint that loads wherever weft was imported. A model
    without structured layers stays a stock one.

    Raises UsageError where a weight that the model ties to another was replaced, or the model is quantised.
    """
    layers = structured_layers(model)
    other = getattr(model, "hf_quantizer", None)
    if other is not None and not isinstance(other, WeftQuantizer):
        method = other.quantization_config.quant_method
        raise UsageError(f"the model is quantised by {getattr(method, 'value', method)}: compress it first")
    tied = _tied(model)
    for name in layers:
        if f"{name}.weight" in tied:
            raise UsageError(f"{name} is tied to {tied[f'{name}.weight']}, so it must stay dense")
    if layers:
        model.hf_quantizer = WeftQuantizer(WeftFormat(_describe(model)))
        model.config.quantization_config = model.hf_quantizer.quantization_config
        model.config._is_quantized = True  # by which some models keep their hands off weights; set after loading too
    elif other is not None:
        other.remove_quantization_config(model)
    return model


def save_compressed(model: Any, folder: str | Path, **options: Any) -> None:
    """Save a model with structured layers, whole or not at all; `options` are those of `save_pretrained`.

    Raises UsageError where the folder holds something already.
    """
    with whole_folder(Path(folder)) as partial:
        attach_format(model).save_pretrained(partial, **options)


def stock_places(model: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """The layers that the model has by those names before any is replaced, without values.

    What is part of another structured layer has no name there, and gives its own form.

    Raises UsageError where a model that is not of transformers has one of which that is not known.
    """
    from transformers import PreTrainedModel  # when this file is imported, transformers may not be whole yet

    if not isinstance(model, PreTrainedModel):
        return {name: layer.stock_place() for name, layer in layers.items()}
    with torch.device("meta"):
        stock = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    return {name: stock[name] if name in stock else layer.stock_place() for name, layer in layers.items()}


@torch.no_grad()
def to_dense(model: Any) -> Any:
    """Put the stock layer with the same values in place of every structured one; returns the model, now a stock one.

    Raises UsageError, the model being as it was, where a layer is no linear map or has a bias that the stock one lacks.
    """
    layers = structured_layers(model)
    places = _dense_places(model, layers)
    for name, layer in reversed(layers.items()):  # what lies inside of another first
        model.set_submodule(name, layer.restored(places[name]))
    _stock_again(model)
    return model


@torch.no_grad()
def to_linears(model: Any) -> Any:
    """Put stock layers in place of every structured one, for a graph or a state dict that needs no weft; the model.

    A layer that is a product of dense factors becomes these, one after the other in an nn.Sequential, where they have
    fewer numbers than the dense layer; any other becomes that. `torch.export`, ONNX and `load_state_dict` take what
    comes of it. `from_pretrained` knows no such names, so `save_pretrained` refuses: weft's own form reloads.

    Raises UsageError, the model being as it was, where a layer is no linear map or has a bias that the stock one lacks.
    """
    layers = structured_layers(model)
    dense = _dense_places(model, layers)
    rows = {name: nn.Sequential(*layer.linears()).train(layer.training) for name, layer in layers.items()}
    rows = {name: row for name, row in rows.items() if len(row) and _numbers(row) < _numbers(dense[name])}
    for name, layer in reversed(layers.items()):
        model.set_submodule(name, rows.get(name) or layer.restored(dense[name]))
    _stock_again(model)
    if rows and hasattr(model, "save_pretrained"):
        model.hf_quantizer = _InARow(WeftFormat({}))
    return model


class _InARow(WeftQuantizer):
    """Of a model whose layers are several stock ones in a row."""

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        raise UsageError("no transformers class has such layers in a row: save a state_dict, or save before to_linears")


def _dense_places(model: Any, layers: dict[str, Structured]) -> dict[str, Any]:
    """Stock layers without values that can have those of the structured ones.

    Raises UsageError, which names the layer, where one cannot.
    """
    places = stock_places(model, layers)
    for name, layer in layers.items():
        coded = next(iter(quantised(layer)), None)
        if coded is not None:
            raise UsageError(f"{name} has no dense form while {coded} is quantised: load the model before that")
        try:
            layer.check_dense(places[name])
        except UsageError as error:
            raise UsageError(f"{name} has no dense form: {error}") from error
    return places


def _stock_again(model: Any) -> None:
    if isinstance(getattr(model, "hf_quantizer", None), WeftQuantizer):
        model.hf_quantizer.remove_quantization_config(model)


def _numbers(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())
