"""Base weights that are not kept as a matrix: read as dense, quantised ones merged into by quantising anew.

PEFT knows the libraries (torchao, bitsandbytes, HQQ, GPTQ, AWQ and more) and how each gives a weight back and takes a
new one. None of them is imported unless a model brings such a layer. The structured layers of a model that weft
compressed are read the same way, and never written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from weft.errors import UsageError
from weft.linear._structured import StructuredLinear


def is_plain(tensor: Any) -> bool:
    """Whether a parameter holds numbers that can be computed with as they are."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and tensor.element_size() > 1


class StructuredBackend(QuantizationBackend):
    """A structured layer in PEFT's terms: it gives a dense weight where one describes it, and takes none."""

    layer_type = "linear"
    backend_name = "weft"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        return base_layer.dense()


def backend_of(layer: nn.Module, requantise: Callable[[], Any] | None = None) -> QuantizationBackend | None:
    """PEFT's backend for a quantised layer, weft's for a structured one, None for any other layer.

    `requantise` gives torchao's configuration, which a model that transformers loaded remembers. Where it is not known,
    the weight can be read and not written.
    """
    if isinstance(layer, StructuredLinear):
        return StructuredBackend()
    if not hasattr(layer, "in_features") or (isinstance(layer, nn.Linear) and is_plain(layer.weight)):
        return None
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=requantise or (lambda: None))
    if backend is not None and backend.backend_name == "torchao" and requantise is None:
        backend.supports_merge = False
    return backend


def shape_of(layer: Any) -> tuple[int, int]:
    """out × in of a quantised linear layer, whose packed weight may have another shape."""
    return layer.out_features, layer.in_features


def dequantised(layer: nn.Module, backend: QuantizationBackend, name: str) -> Tensor:
    """The dense weight, out × in. Raises UsageError where the library cannot give it back."""
    if backend.backend_name == "bnb 4bit":
        layer.state_dict()  # evaluating on a CPU packs the weight in a form that only saving undoes
    try:
        return backend.get_base_weight(layer).detach()
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    except (TypeError, NotImplementedError) as error:
        raise UsageError(
            f"{name} is quantised by {backend.backend_name}, which does not give the dense weight back that this needs"
        ) from error


def requantised(layer: nn.Module, backend: QuantizationBackend, weight: Tensor) -> nn.Module:
    """A copy of the layer with `weight` quantised as the layer's own was; the layer keeps its bits."""
    own = SimpleNamespace(base_layer=copy.deepcopy(layer))
    own.get_base_layer = lambda: own.base_layer
    backend.set_base_weight(own, weight)
    return own.base_layer.requires_grad_(False)


def check_merge(layer: nn.Module, backend: QuantizationBackend, name: str) -> None:
    """Raise UsageError where the library cannot take a new weight."""
    if backend.supports_merge:
        return
    if isinstance(layer, StructuredLinear):
        raise UsageError(f"{name} is stored as {layer.kind}, which cannot take another weight: keep the adapter apart")
    how = (
        "the model does not say how: load it with transformers' TorchAoConfig"
        if backend.backend_name == "torchao"
        else f"{backend.backend_name} cannot take a new weight"
    )
    raise UsageError(f"{name} is quantised and {how}; or merge into the model in full precision")


def keeps_dense(layer: nn.Module, backend: QuantizationBackend, name: str) -> bool:
    """Whether the layer's own forward leaves the dense weight lying for the backward pass, as torchao's int4 does.

    Seen from a forward of one vector; False as well where the layer does not simply multiply by the dense weight.
    """
    try:
        w = dequantised(layer, backend, name)
    except UsageError:
        return False
    kept = []

    def look(t: Tensor) -> Tensor:
        kept.append(type(t) is Tensor and t.is_floating_point() and t.numel() == w.numel() > w.shape[1])
        return t

    x = torch.linspace(-1, 1, w.shape[1], dtype=w.dtype, device=w.device)[None].requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(look, lambda t: t):
        y = layer(x)
    with torch.no_grad():
        expected = nn.functional.linear(x, w, getattr(layer, "bias", None))
        return any(kept) and torch.allclose(y, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


class _Times(torch.autograd.Function):
    """x·Wᵀ for a frozen W that is read again in the backward pass, so that no dense copy waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[], Tensor]) -> Tensor:
        ctx.read = read
        return x @ read().to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.read().to(grads[0].dtype), None


def times(x: Tensor, read: Callable[[], Tensor]) -> Tensor:
    """x·Wᵀ (… × out), with W (out × in) from `read`, once now and once for the gradient."""
    return _Times.apply(x, read)
