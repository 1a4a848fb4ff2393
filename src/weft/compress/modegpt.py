"""MoDeGPT: the hidden sizes inside each block shrink, by one closed form for each pair of matrices that share one.

Chi-Heng Lin, Shangqian Gao, James Seale Smith, Abhishek Patel, Shikhar Tuli, Yilin Shen, Hongxia Jin, Yen-Chang Hsu,
"MoDeGPT: Modular Decomposition for Large Language Model Compression", arXiv 2408.09632.

A block has three pairs. What remains is a dense, smaller nn.Linear in each place, and a cache of keys and values that
is as much smaller:

    MLP     y = Wd·z, z the units' outputs, C = E[z·zᵀ]. Units K stay by their ridge leverage, the diagonal of
            C·(C + λI)⁻¹, and Wd becomes Wd·C_:K·C_KK⁻¹ (Nyström): no other matrix on those units errs less.
    Q, K    of each head the coordinates stay whose s_i² = E[q_i²]·E[k_i²] is largest (CR). Rotary positions turn i with
            i + h/2, so those are one choice, by the sum of both s².
    V, O    of each head, ‖C^½·(Wvᵀ·Woᵀ − A·B)‖_F is least for the A (d × k) and B (k × d) of a singular value
            decomposition, C = E[x·xᵀ] + ridge.

Heads that share keys and values share one choice: s² is summed over their queries, and their Wo stand side by side.

Everything is cut from one decomposition for any size. With units in their order, C = L·Lᵀ: C_KK⁻¹·C_K: is in the first
columns of L for every k, and the error in the rows of Lᵀ·Wdᵀ beyond k. Of V and O no root of C is inverted: A·B is
Wvᵀ·Woᵀ, projected onto the right singular vectors that stay. The errors that are reported are shares of E‖y‖² for an
MLP, of ΣS² for V and O, and of Σs² for Q and K.

One share of all three goes to each block, by its influence (`allocate="block_influence"`): its sparsity is
L·φ·softmax(−influence / sparsity_smoothing), at most `max_sparsity` as long as `keep` can be met so. The other
allocators choose pair by pair.

λ and the ridge of V and O are relative to C's mean diagonal, so that they mean the same at any scale of activations;
public code adds them as they are to C per token. Its ridge of Q and K has no use here: only diagonals are read.

Biases of units and of q and k go with their rows. A bias of v adds Wo·bv whatever the attention, and becomes o's.
Qwen3 has norms between q, k and their scores; E[q_i²] is taken behind them, and the mean square of what stays is less
than that of all. As a stock norm's weights are shared by all heads, they are multiplied by the root of the mean share
that stays: right on average over heads, and the model can still be written dense.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from weft.algebra.gram import root, times_root
from weft.algebra.statistics import Moments
from weft.compress._allocate import Menus, Sizes, allocate, block_influence
from weft.compress._calibration import Statistics
from weft.compress._config import CompressConfig
from weft.compress._factoriser import Factoriser, Tensors, left_over, moment
from weft.compress._layers import Group, Layer, mlp, picked, targets
from weft.errors import UsageError
from weft.linear._codes import smallest_int
from weft.linear._narrow import Narrow, filled
from weft.linear._structured import Structured
from weft.linear.narrow_attention import NarrowAttention
from weft.linear.narrow_mlp import NarrowMlp
from weft.registry import Card

CARD = Card(
    title="MoDeGPT: Modular Decomposition for Large Language Model Compression",
    arxiv="2408.09632",
    year=2024,
    summary="fewer MLP units and narrower heads, each pair of matrices by its closed form: dense and faster",
    knob="keep",
    needs=("data",),
    limitations="Llama, Qwen2, Qwen3 and OPT only",
    reasons={"groups": "it takes matrices apart in pairs that share a hidden size, and knows them by their models"},
)

NEEDS = {
    "down_proj": ("input",),
    "fc2": ("input",),
    "q_proj": ("output_squares",),
    "k_proj": ("output_squares",),
    "v_proj": ("input",),
}
ALLOCATE = ("block_influence", "uniform", "energy", "water")


@dataclass
class ModegptConfig(CompressConfig):
    """Options of MoDeGPT."""

    include: list[str] | str | None = field(
        default=None,
        metadata={"help": "what to compress: name endings (mlp, qk, vo) or one regex; none takes all of each block"},
    )
    allocate: Literal["block_influence", "uniform", "energy", "water"] = field(  # type: ignore[assignment]
        default="block_influence",
        metadata={
            "help": "who gets how much: each block by its influence, the same share everywhere, the same explained "
            "share, or the least sum of errors"
        },
    )
    sparsity_smoothing: float = field(
        default=0.15, metadata={"help": "how alike the blocks are treated by influence, above 0; large is uniform"}
    )
    max_sparsity: float = field(
        default=0.8, metadata={"help": "share of a block that goes at most, where keep allows it"}
    )
    nystrom_ridge: float = field(
        default=1e-2, metadata={"help": "λ of the units' leverage, relative to their mean square"}
    )
    ridge_vo: float = field(
        default=1e-4, metadata={"help": "ridge of V and O's inputs, relative to their mean square"}
    )

    round_to: int = field(
        default=1,
        metadata={"help": "units are multiples of this (128 suits GPUs), heads of what it has in common with 8"},
    )

    def validate(self) -> None:
        super().validate()
        if self.allocate not in ALLOCATE:
            raise UsageError(
                f"allocate={self.allocate!r} needs singular values of one matrix, and MoDeGPT takes pairs apart: use "
                f"{', '.join(ALLOCATE)}"
            )
        for name in ("sparsity_smoothing", "nystrom_ridge"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)!r} must be above 0")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise UsageError(f"round_to={self.round_to!r} must be a whole number of at least 1")
        if not self.ridge_vo >= 0:
            raise UsageError(f"ridge_vo={self.ridge_vo!r} must be 0 or more")
        if not 0 < self.max_sparsity <= 1:
            raise UsageError(f"max_sparsity={self.max_sparsity!r}: a share above 0, at most 1")


# --- the mathematics --------------------------------------------------------------------------------------------------


def leverage_order(c: Tensor, ridge: float) -> Tensor:
    """Units by their ridge leverage, the diagonal of C·(C + λI)⁻¹, largest first; λ is ridge · mean diag C.

    That is 1 − λ·diag (C + λI)⁻¹. Equal ones stay in their order.
    """
    lifted = c.double().clone()
    scale = float(lifted.diagonal().mean())
    lifted.diagonal().add_(ridge * (scale or 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(lifted)).diagonal()
    return torch.sort(inverse, stable=True).indices


def nystrom(lower: Tensor, down: Tensor, k: int) -> Tensor:
    """Wd·C_:K·C_KK⁻¹ (d × k) for K the first k units of C = L·Lᵀ and of Wd (d × f), in float64."""
    lower, down = lower.double(), down.double()
    share = down[:, k:] @ lower[k:, :k]
    return down[:, :k] + torch.linalg.solve_triangular(lower[:k, :k], share, upper=False, left=False)


def pair_scores(queries: Tensor, keys: Tensor, rotary: bool) -> Tensor:
    """s² (G × h, or G × h/2 of rotary pairs) from E[q_i²] (H × h) and E[k_i²] (G × h)."""
    squares = queries.view(len(keys), -1, keys.shape[1]).sum(1) * keys
    return squares.unflatten(1, (2, -1)).sum(1) if rotary else squares


def turned_heads(wv: Tensor, wo: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R (G × h × h), Wo·R⁻¹ (G × n × h) and S² (G × h), descending, of heads Wv (G × h × d) and Wo (G × n × h).

    All float64. The first k rows of R·Wv and the first k columns of Wo·R⁻¹ have the best product of rank k for inputs
    whose second moment is C (d × d), and err by the sum of the other S². With Wo = Q·T and T·E[v·vᵀ]·Tᵀ = P·S²·Pᵀ, R is
    Pᵀ·T, and Wo·R⁻¹ is Q·P, for which T need not be inverted.
    """
    wv, wo, c = wv.double(), wo.double(), c.double()
    q, t = torch.linalg.qr(wo)
    met = t @ wv
    squares, p = torch.linalg.eigh((met @ c) @ met.mT)
    p = p.flip(-1)
    return p.mT @ t, q @ p, squares.flip(-1).clamp(min=0)


# --- the three pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(Group):
    """Matrices of one module that share a hidden size."""

    module: str  # whose form changes

    def sizes(self, round_to: int) -> range:
        """Units, or coordinates of each head."""
        return range(round_to, self.shape[0] + 1, round_to)

    def stored(self, size: int) -> int:
        """Bits at one size."""
        return self.bits * size // self.shape[0]

    def operations(self) -> tuple[float, float]:
        """In products, and in eigenvectors."""
        return 0.0, 0.0

    def decompose(self, seen: Mapping[str, Statistics], config: ModegptConfig) -> Tensors:
        """What every size is cut from."""
        raise NotImplementedError(f"{type(self).__name__} must define decompose()")

    def narrowed(self, module: nn.Module, tensors: Tensors, size: int) -> Narrow:
        """The module at that size."""
        raise NotImplementedError(f"{type(self).__name__} must define narrowed()")


class Mlp(Pair):
    """The layers into the units, and last the one that takes them."""

    def operations(self) -> tuple[float, float]:
        f, d = self.shape
        return 4 / 3 * f**3 + f**2 * d, 0.0

    def decompose(self, seen: Mapping[str, Statistics], config: ModegptConfig) -> Tensors:
        down = self.parts[-1]
        c = moment(seen[down.name].input, 0.0)
        order = leverage_order(c, config.nystrom_ridge)
        lower = root(c[order[:, None], order])
        left = times_root(down.wide[:, order].mT, lower)
        errors = left_over(left.double().norm(dim=1), self.sizes(config.round_to))
        return {"order": order.int(), "lower": lower.to(down.wide.dtype), "errors": errors}

    def narrowed(self, module: nn.Module, tensors: Tensors, size: int) -> Narrow:
        made, order = NarrowMlp.of(module, size=size), tensors["order"].long()
        kept, by_place = order[:size].sort()
        *into, down = self.parts
        for part in into:
            bias = None if part.bias is None else part.bias[kept]
            filled(getattr(made, _last(part)), part.weight[kept], bias)
        weight = nystrom(tensors["lower"], down.wide[:, order], size)
        filled(getattr(made, _last(down)), weight[:, by_place], down.bias)
        return made


@dataclass(frozen=True)
class Heads(Pair):
    """Matrices of an attention."""

    groups: int  # heads of keys and values
    rotary: bool

    @property
    def h(self) -> int:
        """Coordinates of a head."""
        return self.shape[0]

    def sizes(self, round_to: int) -> range:
        return super().sizes(math.gcd(round_to, 8))


class QueriesKeys(Heads):
    """q_proj and k_proj."""

    def sizes(self, round_to: int) -> range:
        return super().sizes(round_to * 2 if self.rotary and round_to % 2 else round_to)

    def stored(self, size: int) -> int:
        index = smallest_int(self.h // 2).itemsize * 8 * self.groups * size // 2
        return super().stored(size) + (index if self.rotary and size < self.h else 0)

    def decompose(self, seen: Mapping[str, Statistics], config: ModegptConfig) -> Tensors:
        moments = [seen[part.name].output for part in self.parts]
        squares = [cast(Moments, each).square.view(-1, self.h) for each in moments]
        scores, order = pair_scores(squares[0], squares[1], self.rotary).sort(dim=1, descending=True, stable=True)
        kept = [size // 2 if self.rotary else size for size in self.sizes(config.round_to)]
        tensors = {"order": order.int(), "errors": left_over(scores.sum(0).sqrt(), kept)}
        if self.parts[0].norm is not None:
            tensors["kept"] = torch.stack([self._kept(part, s, order) for part, s in zip(self.parts, squares)])
        return tensors

    def _kept(self, part: Layer, squares: Tensor, order: Tensor) -> Tensor:
        """Of the square of what the norm receives, the share in the first of the order, as a mean over heads."""
        weight = cast(Any, part.norm).weight.detach().double()
        before = torch.where(weight == 0, 0.0, squares / weight.square())  # up to a factor for each token
        if self.rotary:
            before = before.unflatten(1, (2, -1)).sum(1)
        ordered = before.gather(1, order.repeat_interleave(len(before) // len(order), 0))
        return (ordered.cumsum(1) / ordered.sum(1, keepdim=True)).mean(0)

    def narrowed(self, module: nn.Module, tensors: Tensors, size: int) -> Narrow:
        made, order = NarrowAttention.of(module, qk=size), tensors["order"].long()
        kept = order[:, : size // 2 if self.rotary else size].sort(1).values
        if made.pairs is not None:
            made.pairs.copy_(kept)
        places = torch.cat([kept, kept + self.h // 2], 1) if self.rotary else kept
        for i, part in enumerate(self.parts):
            heads = part.out // self.h
            rows = places.repeat_interleave(heads // self.groups, 0)
            rows = (rows + self.h * torch.arange(heads, device=rows.device)[:, None]).flatten()
            filled(getattr(made, _last(part)), part.weight[rows], None if part.bias is None else part.bias[rows])
            if part.norm is not None:
                name = _last(part).replace("proj", "norm")
                norm: Any = copy.deepcopy(getattr(made, name))
                norm.weight.data *= tensors["kept"][i, kept.shape[1] - 1].sqrt()
                setattr(made, name, norm)
        return made


class ValuesOutput(Heads):
    """v_proj, and the layer that takes all heads."""

    @property
    def lends_bias(self) -> bool:
        """Whether v has a bias and the output none, which it then needs."""
        return self.parts[0].bias is not None and self.parts[1].bias is None

    def stored(self, size: int) -> int:
        added = self.parts[1].out * self.parts[1].weight.element_size() * 8
        return super().stored(size) + (added if self.lends_bias and size < self.h else 0)

    def operations(self) -> tuple[float, float]:
        values, output = self.parts
        return 2.0 * values.out * values.in_**2 + 6.0 * self.h * (values.out * values.in_ + output.out * output.in_), (
            9.0 * self.groups * self.h**3
        )

    def decompose(self, seen: Mapping[str, Statistics], config: ModegptConfig) -> Tensors:
        values, output = self.parts
        c = moment(seen[values.name].input, 0.0)
        c.diagonal().add_(config.ridge_vo * c.diagonal().mean())
        wv, wo = values.wide.double().unflatten(0, (self.groups, self.h)), output.wide.double()
        wo = wo.unflatten(1, (self.groups, -1, self.h)).permute(1, 2, 0, 3)  # G × heads of it × d × h
        turn, back, squares = turned_heads(wv, wo.flatten(1, 2), c)
        back = back.unflatten(1, wo.shape[1:3]).permute(2, 0, 1, 3)  # d × G × heads of it × h
        tensors = {
            "values": (turn @ wv).to(values.wide.dtype),
            "output": back.flatten(1, 2).to(values.wide.dtype),
            "errors": left_over(squares.sum(0).sqrt(), self.sizes(config.round_to)),
        }
        if values.bias is not None:
            bv = values.bias.double().view(self.groups, self.h, 1)
            shift = (wo @ bv[:, None]).sum((0, 1))[:, 0]
            tensors["moved"] = shift if output.bias is None else shift + output.bias.double()
            tensors["turned"] = (turn @ bv)[..., 0]
        return tensors

    def narrowed(self, module: nn.Module, tensors: Tensors, size: int) -> Narrow:
        made = NarrowAttention.of(module, v=size)
        values, output = self.parts
        whole = size == self.h  # then v keeps its bias
        turned = tensors["turned"].flatten() if whole and values.bias is not None else None
        bias = output.bias if whole or values.bias is None else tensors["moved"]
        filled(getattr(made, _last(values)), tensors["values"][:, :size].flatten(0, 1), turned)
        filled(getattr(made, _last(output)), tensors["output"][..., :size].flatten(1), bias)
        return made


def _last(part: Layer) -> str:
    return part.name.rpartition(".")[2]


# --- the method -------------------------------------------------------------------------------------------------------


class ModegptFactoriser(Factoriser[ModegptConfig]):
    """Three pairs a block."""

    kinds = ("narrow_attention", "narrow_mlp")

    def kind_of(self, layer: Pair) -> str:
        return self.kinds[isinstance(layer, Mlp)]

    def units(self, model: nn.Module) -> Sequence[Pair]:
        knows = "modegpt knows the pairs of Llama, Qwen2, Qwen3 and OPT"
        return picked(list(_pairs(model)), knows, "attention", model, self.config.include, self.config.exclude)

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return NEEDS.get(_last(layer), ())

    def allocate(self, menus: Menus) -> Sizes:
        config = self.config
        rule = functools.partial(block_influence, smoothing=config.sparsity_smoothing, most=config.max_sparsity)
        how = rule if config.allocate == "block_influence" else config.allocate
        return allocate(how, menus, config.keep, guard=config.guard)

    def sizes(self, layer: Pair) -> Sequence[int]:
        return layer.sizes(self.config.round_to)

    def bits(self, layer: Pair, size: int) -> int:
        return layer.stored(size)

    def operations(self, layer: Pair) -> tuple[float, float] | None:
        return layer.operations()

    def decompose(self, layer: Pair, statistics: Mapping[str, Statistics], size: int | None) -> Tensors:
        return layer.decompose(statistics, self.config)

    def build(self, layer: Pair, tensors: Tensors, size: int) -> Structured:
        raise NotImplementedError(f"{layer.name} is no layer of its own: replace() makes its module another")

    def replace(self, model: nn.Module, layer: Pair, tensors: Tensors, size: int) -> str:
        made = layer.narrowed(model.get_submodule(layer.module), tensors, size)
        model.set_submodule(layer.module, made)
        return made.kind


def _pairs(model: nn.Module) -> Iterator[Pair]:
    """All pairs of known modules whose matrices can be compressed."""
    free = {layer.name: layer for layer in targets(model, None, None)}
    for name, module in model.named_modules():
        attention, units = NarrowAttention.form(module), mlp(name, module, free)
        if attention is not None:
            rotary, last = attention
            for kind, end, names in ((QueriesKeys, "qk", ("q_proj", "k_proj")), (ValuesOutput, "vo", ("v_proj", last))):
                parts = [free.get(f"{name}.{part}") for part in names]
                if all(part is not None for part in parts):
                    q, k = cast(list[Layer], parts)
                    if hasattr(module, "q_norm") and end == "qk":
                        q, k = replace(q, norm=module.q_norm), replace(k, norm=module.k_norm)
                    h: Any = module.head_dim
                    groups = module.k_proj.out_features // h  # type: ignore[union-attr,operator]
                    yield kind(f"{name}.{end}", (q, k), q.block, (h, q.in_), name, groups, rotary)
        if units is not None:
            yield Mlp(units.name, units.parts, units.block, units.shape, name)
