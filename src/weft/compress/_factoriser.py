"""What a method says of one layer: how it is taken apart once, and put together at any size.

Most methods take a model apart layer by layer. One that works on several layers at once says so in `units`; wherever
the others are given a layer, it is given one of those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from weft.algebra.shrink import shrink
from weft.algebra.statistics import Moments
from weft.algebra.svd import svd_operations, weighted_svd
from weft.compress._allocate import Menus, Sizes, allocate
from weft.compress._calibration import Corpus, Statistics
from weft.compress._config import CompressConfig, LowRankConfig
from weft.compress._layers import Layer, Unit, targets
from weft.errors import UsageError
from weft.linear._structured import Structured, kinds
from weft.linear.low_rank import LowRank

C = TypeVar("C", bound=CompressConfig)
Tensors = dict[str, Tensor]
Weight = Tensor | None  # None: unweighted; a vector: diagonal; a matrix: a second moment


class Factoriser(ABC, Generic[C]):
    """One method. `decompose` is the work, done once a layer and kept on disk; `build` makes the layer from it."""

    kind: ClassVar[str]  # of structured layer that it makes; where there are several, `kinds` and `kind_of` tell
    nested: bool = True  # whether every size is cut from one decomposition; else each is work of its own

    def __init__(self, config: C) -> None:
        self.config = config
        self.prepared: Tensors = {}  # what `prepare` found

    @property
    def prepares(self) -> bool:
        """Whether `prepare` has work to do."""
        return False

    def prepare(self, model: nn.Module, data: Sequence[Corpus], layers: Sequence[Any]) -> Tensors:
        """What takes the whole model to find: once, before everything else, and kept on disk beside finished layers."""
        raise NotImplementedError(f"{type(self).__name__} prepares and must define prepare()")

    def units(self, model: nn.Module) -> Sequence[Unit]:
        """What is taken apart, each at a size of its own. Raises UsageError where the model has nothing of it."""
        return targets(model, self.config.include, self.config.exclude)

    def needs(self, layer: Layer) -> tuple[str, ...]:
        """The statistics to collect of a layer, the part of a unit: the words of `_calibration.NEEDS`."""
        return ()

    def allocate(self, menus: Menus) -> Sizes:
        """A size for each layer; a method with a rule of its own says it here."""
        return allocate(self.config.allocate, menus, self.config.keep, guard=self.config.guard)

    def values(self, layer: Any) -> Tensor:
        """The singular values of the untouched weight, descending, for an allocation that reads them."""
        if not isinstance(layer, Layer):
            raise UsageError(f"allocate={self.config.allocate!r} reads singular values, and {layer.name} is no matrix")
        return torch.linalg.svdvals(layer.wide)

    @abstractmethod
    def sizes(self, layer: Any) -> Sequence[int]:
        """The sizes that a layer can have, ascending."""

    @abstractmethod
    def bits(self, layer: Any, size: int) -> int:
        """What the layer's matrix takes at one size, and whatever else the method stores for it."""

    def reads(self, layer: Any, size: int) -> int:
        """How many bits of them are read for one token."""
        return self.bits(layer, size)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that layers become."""
        return (self.kind,)

    @property
    def linear(self) -> bool:
        """Whether a stock model can hold what layers become."""
        known = kinds()
        return all(known[kind].linear for kind in self.kinds)

    def kind_of(self, layer: Any) -> str:
        """What a layer becomes."""
        return self.kind

    def adds_bias(self, layer: Any) -> bool:
        """Whether the replacement has a bias that the layer lacks: a stock model then has no place for it."""
        return False

    def operations(self, layer: Any) -> tuple[float, float] | None:
        """What `decompose` takes: operations in matrix products, and in eigenvectors; None where nobody has counted.

        Eigenvectors of d × d count 9·d³. They run at a fraction of the speed of products.
        """
        return None

    def workspace(self, layers: Sequence[Any]) -> float:
        """Bytes held at most beside the model, a block's statistics and a batch's activations."""
        side = max(max(part.shape) for layer in layers for part in layer.parts)
        return 8 * 8 * side**2  # eight matrices in float64: a moment, its root, W weighted, singular vectors, …

    @abstractmethod
    def decompose(self, layer: Any, statistics: Any, size: int | None) -> Tensors:
        """The tensors of one layer; `size` is None for a nested method, which keeps what any size is cut from.

        `statistics` are the layer's; of a group, its parts' by name.
        `errors` is the share of the objective that is left: one number a size where nested, one number else.
        """

    @abstractmethod
    def build(self, layer: Any, tensors: Tensors, size: int) -> Structured:
        """The layer's replacement, in the layer's dtype."""

    def replace(self, model: nn.Module, layer: Any, tensors: Tensors, size: int) -> str:
        """Put the replacement in the layer's place; the kind that it is. For groups a method says how."""
        made = self.build(layer, tensors, size)
        model.set_submodule(layer.name, made.train(layer.module.training))
        return made.kind


L = TypeVar("L", bound=LowRankConfig)


class LowRankFactoriser(Factoriser[L]):
    """y = B(Ax) + b from one singular value decomposition of L·W·R; a method says what L and R are."""

    kind = "low_rank"

    def weights(self, layer: Layer, statistics: Statistics) -> tuple[Weight, Weight]:
        """The left (out) and right (in) weights of the error."""
        return None, None

    def sizes(self, layer: Layer) -> Sequence[int]:
        whole = min(layer.out, layer.in_)
        # of a matrix that is nearly square, no rank above the break-even can be wanted: keep no factors for it
        most = min(whole, (layer.out * layer.in_ - 1) // (layer.out + layer.in_)) if self.config.guard else whole
        return range(self.config.round_to, most + 1, self.config.round_to)

    def bits(self, layer: Layer, size: int) -> int:
        return size * (layer.out + layer.in_) * layer.weight.element_size() * 8

    def operations(self, layer: Layer) -> tuple[float, float] | None:
        ranks = self.sizes(layer)
        if not len(ranks):
            return 0.0, 0.0
        products, eigen = svd_operations(layer.out, layer.in_, ranks[-1])
        if {"input", "output"} & set(self.needs(layer)):  # the root of a moment, and its product with W
            side = layer.in_ if "input" in self.needs(layer) else layer.out
            products += side**3 / 3 + 2 * side * layer.out * layer.in_
        return products + 2 * layer.out * layer.in_ * ranks[-1], eigen

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None = None) -> Tensors:
        left, right = self.weights(layer, statistics)
        ranks = self.sizes(layer)
        found = weighted_svd(layer.wide, left=left, right=right, rank=ranks[-1])
        up, down = found.factors(ranks[-1], split="even")
        return {"up": up, "down": down, "errors": left_over(found.spectrum, ranks, found.rest)}

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        return LowRank.from_factors(tensors["up"][:, :size], tensors["down"][:size], layer.bias, layer.weight.dtype)


def left_over(spectrum: Tensor, ranks: Sequence[int], rest: float = 0.0) -> Tensor:
    """Σ_{j>r} σ_j² / Σ σ² for each rank: what a cut leaves of the objective. `rest` is Σσ² beyond the spectrum."""
    squares = spectrum.double().square()
    tails = torch.cat([squares, squares.new_tensor([rest])])  # summed from the small end, where little would drown
    tails = tails.flip(0).cumsum(0).flip(0)
    return tails[list(ranks)] / tails[0].clamp(min=torch.finfo(torch.float64).tiny)


def moment(moments: Moments | None, shrinkage: float | Literal["auto"], *, centred: bool = False) -> Tensor:
    """E[xxᵀ], or the covariance, moved towards a multiple of the identity."""
    assert moments is not None
    s = moments.covariance if centred else moments.second_moment
    return shrink(s, shrinkage, n=moments.n, fourth=moments.fourth(centred=centred))


def factoriser(slug: str, config: Any) -> Factoriser[Any]:
    """The method called `slug`."""
    from weft import registry

    return getattr(registry.load(slug), registry.class_name(slug, "Factoriser"))(config)
