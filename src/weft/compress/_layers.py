"""Which layers of a model are compressed, each seen as a matrix, and the blocks that they lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.anatomy import blocks, heads
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.linear.narrow_mlp import NarrowMlp
from weft.patterns import selection

LINEAR = (nn.Linear, Conv1D)
Types = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Layer:
    """One layer of a model, seen as W (out × in).

    W is the matrix of an nn.Linear or of transformers' Conv1D; an nn.Conv2d's from the numbers under its kernel to one
    position's channels, out × (in·kh·kw); an nn.Embedding's table transposed, d × n, for which ids are unit vectors.
    """

    name: str
    module: nn.Module
    block: str  # the name of the block that holds it, "" where the model has none
    norm: nn.Module | None = None  # right behind it, of each head: what comes out of that is the layer's output

    @property
    def parts(self) -> tuple[Layer, ...]:
        """The layers of this unit: itself."""
        return (self,)

    @property
    def weight(self) -> Tensor:
        """W, out × in, in the model's dtype."""
        w = self.module.weight.detach()  # type: ignore[union-attr,operator]
        return w.mT if isinstance(self.module, Conv1D | nn.Embedding) else w.flatten(1)

    @property
    def wide(self) -> Tensor:
        """W in float32 at least, to compute with."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    def features(self, y: Tensor) -> Tensor:
        """What the layer gave, out last."""
        return y.movedim(-3, -1) if isinstance(self.module, nn.Conv2d) else y

    @property
    def out(self) -> int:
        return self.weight.shape[0]

    @property
    def in_(self) -> int:
        return self.weight.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """out, in."""
        return self.out, self.in_

    @property
    def bits(self) -> int:
        """What W takes as it is stored."""
        return self.weight.numel() * self.weight.element_size() * 8


@dataclass(frozen=True)
class Group:
    """Layers that a method takes apart together, at one size: the matrices of an MLP, the queries and the keys.

    Attributes:
        name: its own, unlike that of any layer.
        block: of all parts, or of the first.
        shape: of the matrix that the size is measured on.
    """

    name: str
    parts: tuple[Layer, ...]
    block: str
    shape: tuple[int, int]

    @property
    def bits(self) -> int:
        """What all of them take as they are stored."""
        return sum(part.bits for part in self.parts)


Unit = Layer | Group  # what a method takes apart at one size
G = TypeVar("G", bound=Group)


def type_of(name: str) -> str:
    """What layers in the same place of every block have in common: the name without numbers."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def targets(
    model: nn.Module, include: list[str] | str | None, exclude: list[str] | str | None, types: Types = LINEAR
) -> list[Layer]:
    """The layers of these types to compress, in the model's order.

    Left out by themselves: output heads, weights that several modules share, quantised ones, and factors of layers that
    are compressed already; convolutions of many groups, and embeddings that do more than look up; what a module of
    torch reads by itself, without calling the layer. Raises UsageError, with a list of what there is, where nothing is
    left.
    """
    shared: dict[int, int] = {}
    for parameter in (p for _, p in model.named_parameters(remove_duplicate=False)):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    apart = {id(part) for part in heads(model)}
    structured = (layer for layer in model.modules() if isinstance(layer, Structured) and layer.opaque)
    apart |= {id(part) for layer in structured for part in layer.modules()}
    whole = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    apart |= {id(part) for module in whole for part in module.children()}  # in evaluation it is one call for all of it
    places = blocks(model)
    chosen = selection(include, exclude)
    found, there = [], []
    noun = "linear layer" if types == LINEAR else "layer"
    for name, module in model.named_modules():
        if type(module) not in types or not name or not _is_a_matrix(module):
            continue
        weight: Any = module.weight
        if id(module) in apart or shared.get(id(weight), 0) > 1 or not weight.is_floating_point():
            continue
        there.append(name)
        if chosen(name):
            block = next((b for b in places if name.startswith(f"{b}.")), "")
            found.append(Layer(name, module, block))
    if not there:
        raise UsageError(f"{type(model).__name__} has no {noun} to compress")
    if not found:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
        raise UsageError(f"include={include!r}, exclude={exclude!r} leave no {noun}; there are: {names}")
    return found


def picked(
    found: Sequence[G],
    knows: str,
    like: str,
    model: nn.Module,
    include: list[str] | str | None,
    exclude: list[str] | str | None,
) -> list[G]:
    """Of the groups that a method found in a model, those to compress.

    Raises UsageError where there are none, with what the method `knows` and the model's classes named `like` them, or
    where nothing is left.
    """
    if not found:
        odd = sorted({type(m).__name__ for m in model.modules() if like in type(m).__name__.lower()})
        raise UsageError(f"{knows}, and {type(model).__name__} has {', '.join(odd) if odd else 'none of them'}")
    chosen = selection(include, exclude)
    groups = [group for group in found if chosen(group.name)]
    if not groups:
        names = ", ".join(sorted({group.name.rpartition(".")[2] for group in found}))
        raise UsageError(f"include={include!r}, exclude={exclude!r} leave nothing; there are: {names}")
    return groups


def mlp(name: str, module: nn.Module, free: Mapping[str, Layer]) -> Group | None:
    """The layers of a stock MLP, the one that closes it last; its shape is that of the units' outputs, units × d.

    None of any other module, and where one of the layers is not among those that can be compressed, by name.
    """
    form = NarrowMlp.form(module)
    parts = [] if form is None else [free.get(f"{name}.{part}") for part in (*form[0], form[1])]
    if not parts or None in parts:
        return None
    layers = cast(tuple[Layer, ...], tuple(parts))
    called = name if name.rpartition(".")[2] == "mlp" else f"{name}.mlp"
    return Group(called, layers, layers[0].block, (layers[-1].in_, layers[-1].out))


def _is_a_matrix(module: Any) -> bool:
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return not isinstance(module, nn.Conv2d) or module.groups == 1
