"""Weights that torchao quantised, in a checkpoint: plain tensors there, and in config.json how they belong together.

    "quantised": {"layers.0.mlp.up_proj.up.weight": {"torchao": "…", "tensors": {"qdata": {"shape": …, "dtype": …}}}}

What a tensor is made of, and the words for it, are torchao's own (`torchao.prototype.safetensors`). They stay a string:
transformers rewrites what looks like a dtype in a config.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import UsageError, WeftError

Described = dict[str, dict[str, Any]]


def is_quantised(t: Any) -> bool:
    """Whether it is one of torchao's tensors, or a parameter of such."""
    return type(t).__module__.startswith("torchao")


def quantised(model: nn.Module) -> dict[str, Tensor]:
    """The quantised tensors of a model by name."""
    return {name: t for name, t in model.state_dict().items() if is_quantised(t)}


def flat(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Described]:
    """The plain tensors that quantised ones consist of, and what each was, by its name.

    Raises UsageError for a kind of tensor that torchao cannot write.
    """
    parts: dict[str, Tensor] = {}
    described: Described = {}
    for name, t in tensors.items():
        try:
            own, words = _torchao().flatten_tensor_state_dict({name: t})
        except ValueError as error:
            raise UsageError(f"{name} is quantised in a form that torchao cannot save ({type(t).__name__})") from error
        inner = {key.removeprefix(_prefix(name)): part for key, part in own.items()}
        shapes = {key: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for key, t in inner.items()}
        described[name] = {"torchao": words[name], "tensors": shapes}
        parts |= own
    return parts, described


def make_room(module: nn.Module, name: str, described: dict[str, Any]) -> None:
    """Let a layer have, in place of one of its tensors, the empty plain tensors that a quantised one is made of."""
    device = getattr(module, name).device
    delattr(module, name)
    for key, each in described["tensors"].items():
        empty = torch.empty(each["shape"], dtype=getattr(torch, each["dtype"]), device=device)
        module.register_buffer(f"_{name}_{key}", empty)
    module._is_hf_initialized = True  # type: ignore[assignment]  # else transformers draws values for the tensor


def put_together(module: nn.Module, name: str, described: dict[str, Any]) -> None:
    """The inverse of `make_room`, once the plain tensors have values. Raises WeftError where one was not loaded."""
    buffers = {f"_{name}_{key}": module.get_buffer(f"_{name}_{key}") for key in described["tensors"]}
    for key, t in buffers.items():
        if t.is_meta or not getattr(t, "_is_hf_initialized", False):
            raise WeftError(f"the checkpoint misses a part of a quantised tensor: {key}")
        delattr(module, key)
    metadata = {f"layer.{name}": described["torchao"], "tensor_names": json.dumps([f"layer.{name}"])}
    made, _ = _torchao().unflatten_tensor_state_dict({f"layer.{key}": t for key, t in buffers.items()}, metadata)
    module.register_parameter(name, nn.Parameter(made[f"layer.{name}"], requires_grad=False))


def _prefix(name: str) -> str:
    """What torchao puts before the name of a part."""
    layer, _, tensor = name.rpartition(".")
    return f"{layer}._{tensor}_"


def _torchao() -> Any:
    try:
        from torchao.prototype.safetensors import safetensors_support
    except ImportError as error:
        raise UsageError("the model has quantised weights: pip install 'weft[quantised]'") from error
    return safetensors_support
