"""Kinds of weight: how an out × in matrix acts on what the module receives.

A method thinks in matrices W (out × in) and inputs x (… × in). A kind translates: the weight's own layout to and
from the matrix, and products with thin or full matrices to the module's native operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.adapters._quantised import backend_of
from weft.errors import UsageError
from weft.linear._structured import Structured


@dataclass(frozen=True)
class Linear:
    """nn.Linear: the weight is the matrix."""

    name = "Linear"
    channel_dim = -1  # where the output features of the module's result lie

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as out × in."""
        return weight

    def native(self, matrix: Tensor) -> Tensor:
        """An out × in matrix in the weight's layout."""
        return matrix

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """x·Aᵀ for A (r × in)."""
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        """h·Bᵀ for B (out × r), added onto a tensor of the result's shape in the same pass where one is given."""
        if onto is None:
            return F.linear(h, b)
        flat = torch.addmm(onto.reshape(-1, onto.shape[-1]), h.reshape(-1, h.shape[-1]), b.mT)
        return flat.view(onto.shape)

    def dense(self, x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·Mᵀ + bias for M (out × in)."""
        return F.linear(x, m, bias)

    def tokens(self, x: Tensor) -> int:
        """How many input vectors x holds."""
        return x.numel() // x.shape[-1]

    def drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        return F.dropout(x, p, training)


@dataclass(frozen=True)
class TransposedLinear(Linear):
    """transformers' Conv1D: a linear layer whose weight is in × out."""

    name = "Conv1D"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def native(self, matrix: Tensor) -> Tensor:
        return matrix.mT


@dataclass(frozen=True)
class QuantisedLinear(Linear):
    """A linear layer whose weight a quantisation library keeps; the matrix is what the library gives back."""

    name = "quantised Linear"


@dataclass(frozen=True)
class Embedding(Linear):
    """nn.Embedding: W is dim × vocabulary, x a one-hot vector given by its index."""

    name = "Embedding"
    scale: float | None = None  # some models multiply embeddings by a constant

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def native(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        h = F.embedding(x, a.mT)
        return h if self.scale is None else h * self.scale

    def dense(self, x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.down(x, m)

    def tokens(self, x: Tensor) -> int:
        return x.numel()

    def drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        return x  # indices; refused with dropout above 0 when attaching


@dataclass(frozen=True)
class Conv(Linear):
    """nn.Conv1d/2d/3d: W is out × (in/groups · kernel), and each group of outputs sees its own inputs."""

    name = "Conv"
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    pad: tuple[int, ...] | None = None  # explicit padding (reversed, repeated twice) for modes other than zeros
    mode: str = "zeros"

    @property
    def channel_dim(self) -> int:  # type: ignore[override]
        return -len(self.kernel) - 1

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def native(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, *self.kernel)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        padding = self.padding
        if self.pad is not None:
            x, padding = F.pad(x, self.pad, mode=self.mode), 0  # type: ignore[assignment]
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        # every group of inputs meets the whole of A: groups · r channels, group by group
        return self._conv(x, self.native(a).repeat(self.groups, *[1] * (len(self.kernel) + 1)))

    def up(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        ones = [1] * len(self.kernel)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        y = convolve(h, b.reshape(*b.shape, *ones), groups=self.groups)
        return y if onto is None else onto + y

    def dense(self, x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._conv(x, self.native(m), bias)

    def tokens(self, x: Tensor) -> int:
        return x.shape[0] * x[0, 0].numel() if x.dim() > len(self.kernel) + 1 else x[0].numel()


SUPPORTED = "Linear, Conv1D (transformers), Conv1d, Conv2d, Conv3d, Embedding"


def kind_of(layer: nn.Module, name: str) -> Linear:
    """The kind of a module. Raises UsageError that names what can be adapted."""
    if backend_of(layer) is not None:
        return QuantisedLinear()
    if isinstance(layer, Structured):
        raise UsageError(f"{name} is stored as {layer.kind}, which no adapter of weft's serves: leave it out")
    weight = getattr(layer, "weight", None)
    foreign = type(weight).__module__.startswith("torchao")
    if isinstance(weight, Tensor) and (foreign or not weight.is_floating_point() or weight.element_size() == 1):
        how = type(weight).__name__ if foreign else weight.dtype
        raise UsageError(f"{name} is quantised ({how}) in a way that PEFT does not serve, so no adapter fits it")
    if isinstance(layer, nn.Linear):
        return Linear()
    if isinstance(layer, Conv1D):
        return TransposedLinear()
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise UsageError(f"{name} renormalises its rows (max_norm={layer.max_norm}); no fixed ΔW describes that")
        scale = getattr(layer, "embed_scale", None)
        return Embedding(scale=None if scale is None else float(scale))
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Conv(
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),  # type: ignore[arg-type]
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            pad=None if layer.padding_mode == "zeros" else tuple(layer._reversed_padding_repeated_twice),
            mode=layer.padding_mode,
        )
    raise UsageError(f"{name} is a {type(layer).__name__}, which no adapter serves; there are: {SUPPORTED}")


FUSED_NAMES = ("c_attn", "qkv_proj", "qkv", "Wqkv", "W_pack", "in_proj")


def qkv_sizes(layer_name: str, out: int, model_config: object) -> Sequence[int] | None:
    """Rows of query, key and value in a fused projection, or None where the name is not one.

    Raises UsageError where the name is a fused projection whose split cannot be told.
    """
    if layer_name.rpartition(".")[2] not in FUSED_NAMES:
        return None
    heads = getattr(model_config, "num_attention_heads", None)
    shared = getattr(model_config, "num_key_value_heads", None) or heads
    width = getattr(model_config, "hidden_size", None)
    head = getattr(model_config, "head_dim", None) or (width // heads if width and heads else None)
    if heads and shared and head and (heads + 2 * shared) * head == out:
        return [heads * head, shared * head, shared * head]
    if out % 3 == 0:
        return [out // 3] * 3
    raise UsageError(f"{layer_name} has {out} rows, which is no query, key and value of one size; set split_qkv=False")
