"""Greenformers: every linear layer as an encoder and a decoder, every convolution as two; or sums over the sequence.

Samuel Cahyawijaya, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank
Approximation", arXiv 2108.10808. Linformer: Sinong Wang et al., arXiv 2006.04768.

    LED   linear        y = D·(E·x) + b                        E: r × in,  D: out × r
    CED   convolution   one of r channels, then one of 1 × 1   W seen as out × (in·kh·kw)
    LRT   the low-rank transformer: query, key, value, output and both layers of every MLP as LEDs

`solver` finds the factors:

    svd      the nearest D·E to W: U_r·Σ_r·V_rᵀ
    snmf     semi-NMF: the nearest there is with D ≥ 0, about
    nmf      with D ≥ 0 and E ≥ 0, about; of layers with W ≥ 0 alone
    random   as torch starts two layers in a row, drawn by `seed` and the layer's name, whatever W is: a small model
             "by design", to be trained

All of them keep the bias. `split="first"`, the thesis's, puts singular values into E, so that D has columns of length
one; "even" shares them, which suits training: neither factor's gradients are then much larger than the other's. The
factors of snmf and nmf are scaled likewise. Semi-NMF begins no farther from W than the nearest matrix of one rank less,
where random starts leave it far away after the thesis's ten updates, `num_iter`; NMF gains from hundreds.

The thesis's rank is a share of the break-even in·out/(in + out), and so is what `keep` makes of it: keep·in·out numbers
are r·(in + out), rounded down, and what rounding leaves goes to the layers that have least. For a convolution `keep`
counts its kernel, in·kh·kw for in, which the thesis leaves out of its limit. Where no rank saves a bit the layer stays.
Layers directly under the model are factorised as any others. Heads, tied weights, factors of a compressed layer,
convolutions of several groups, and what nn.MultiheadAttention and nn.TransformerEncoderLayer read by themselves stay.

It is trained on the task afterwards, as any model. `linformer` puts the other idea of low rank into an encoder: few
sums over the sequence in place of its keys and values. It saves scores, n·k for n², and no weights, and so serves where
sequences are long; LEDs serve where linear layers are most of the work. A model can have both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weft.algebra.nonnegative import nmf, semi_nmf
from weft.algebra.random import generator
from weft.algebra.svd import weighted_svd
from weft.compress._calibration import Statistics
from weft.compress._config import LowRankConfig
from weft.compress._factoriser import LowRankFactoriser, Tensors, left_over
from weft.compress._layers import LINEAR, Layer, targets
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.linear._transformers import attach_format
from weft.linear.linformer_attention import LinformerAttention
from weft.linear.low_rank_conv import LowRankConv
from weft.registry import Card

CARD = Card(
    title="Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
    arxiv="2108.10808",
    year=2021,
    summary="linear layers and convolutions as two thin ones, by SVD, (semi-)NMF or at random, to be trained",
    knob="keep",
    limitations="It is made to be trained afterwards. Without training, and by its default solver, it is svd, of "
    "convolutions as well.",
)


M = TypeVar("M", bound=nn.Module)


@dataclass
class GreenformersConfig(LowRankConfig):
    """Options of Greenformers."""

    solver: Literal["svd", "snmf", "nmf", "random"] = field(
        default="svd", metadata={"help": "what finds the factors: SVD, semi-NMF, NMF (of W ≥ 0), or random draws"}
    )
    split: Literal["first", "even"] = field(
        default="first", metadata={"help": "where singular values go: all into the first factor, or shared by both"}
    )
    num_iter: int = field(default=10, metadata={"help": "updates of snmf and nmf"})
    seed: int = field(default=0, metadata={"help": "draws the factors of random"})

    def validate(self) -> None:
        super().validate()
        if self.solver not in ("svd", "snmf", "nmf", "random"):
            raise UsageError(f"solver={self.solver!r}: svd, snmf, nmf or random")
        if self.split not in ("first", "even"):
            raise UsageError(f"split={self.split!r}: first or even")
        if isinstance(self.num_iter, bool) or not isinstance(self.num_iter, int) or self.num_iter < 0:
            raise UsageError(f"num_iter={self.num_iter!r} must be a whole number, 0 or more")
        if self.solver != "svd" and self.allocate in ("energy", "water", "sweep"):
            raise UsageError(
                f"allocate={self.allocate!r} needs the error of every size, which solver={self.solver!r} finds for one "
                "only: use uniform, threshold or block_influence"
            )


class GreenformersFactoriser(LowRankFactoriser[GreenformersConfig]):
    """‖W − D·E‖_F."""

    kinds = ("low_rank", "low_rank_conv")

    def __init__(self, config: GreenformersConfig) -> None:
        super().__init__(config)
        self.nested = config.solver == "svd"

    def units(self, model: nn.Module) -> Sequence[Layer]:
        layers = targets(model, self.config.include, self.config.exclude, (*LINEAR, nn.Conv2d))
        for layer in layers if self.config.solver == "nmf" else ():
            if not layer.weight.is_meta and bool((layer.weight < 0).any()):
                raise UsageError(f"solver='nmf' needs weights of at least 0, and {layer.name} has others: use snmf")
        return layers

    def kind_of(self, layer: Layer) -> str:
        return self.kinds[isinstance(layer.module, nn.Conv2d)]

    def operations(self, layer: Layer) -> tuple[float, float] | None:
        if self.config.solver == "svd":
            return super().operations(layer)
        if self.config.solver == "random":
            return 0.0, 0.0
        rank = self.config.keep * layer.out * layer.in_ / (layer.out + layer.in_)
        whole = min(layer.shape)  # the singular vectors that it begins at
        return (4 * rank * (self.config.num_iter + 1) + whole) * layer.out * layer.in_, 9.0 * whole**3

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None = None) -> Tensors:
        w, solver = layer.wide, self.config.solver
        if solver == "svd":
            ranks = self.sizes(layer)
            found = weighted_svd(w, rank=ranks[-1])
            up, down = found.factors(ranks[-1], split="right" if self.config.split == "first" else "even")
            return {"up": up, "down": down, "errors": left_over(found.spectrum, ranks, found.rest)}
        assert size is not None
        if solver == "random":
            up, down = drawn(layer.shape, size, generator(self.config.seed, layer.name))
            return {"up": up.to(w), "down": down.to(w)}
        up, down = (nmf if solver == "nmf" else semi_nmf)(w, size, iterations=self.config.num_iter)
        error = (w - up @ down).double().square().sum() / w.double().square().sum().clamp(min=1e-300)
        up, down = scaled(up, down, even=self.config.split == "even")
        return {"up": up, "down": down, "errors": error}

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        if not isinstance(layer.module, nn.Conv2d):
            return super().build(layer, tensors, size)
        factors = tensors["up"][:, :size], tensors["down"][:size]
        return LowRankConv.from_factors(*factors, layer.bias, layer.weight.dtype, like=layer.module)


def drawn(shape: tuple[int, int], rank: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """D (out × r) and E (r × in), uniform as torch starts layers of r and of `in` inputs."""
    out, in_ = shape
    down, up = ((2 * torch.rand(a, b, generator=draw) - 1) / b**0.5 for a, b in ((rank, in_), (out, rank)))
    return up, down


def scaled(up: Tensor, down: Tensor, *, even: bool) -> tuple[Tensor, Tensor]:
    """The same product with columns of `up` of length one or, where even, as long as the rows of `down`."""
    left, right = (lengths.clamp(min=torch.finfo(up.dtype).tiny) for lengths in (up.norm(dim=0), down.norm(dim=1)))
    by = (right / left).sqrt() if even else 1 / left
    return up * by, down / by[:, None]


@torch.no_grad()
def linformer(
    model: M, k: int = 128, n: int | None = None, *, start: Literal["random", "means"] = "random", seed: int = 0
) -> M:
    """Put sums over the sequence in place of the keys and values of every attention, in place; the model.

    A transformers model is then saved and loaded as usual, with weft imported.

    Args:
        model: an encoder whose attention is BERT's, compressed or not.
        k: sums in each layer, for keys and for values.
        n: the longest sequence that the model will take; as many as it has positions, if not given.
        start: E and F as 𝒩(0, 1/n), for a model that is trained from the start; or means of n/k tokens each, which
            change a trained one less: with k = n nothing.
        seed: of the draws.

    Raises:
        UsageError: the model is causal, or has no such attention; k or n cannot be. The model is as it was.
    """
    if start not in ("random", "means"):
        raise UsageError(f"start={start!r}: random or means")
    if any(getattr(module, "is_causal", False) for module in model.modules()):
        raise UsageError(f"{type(model).__name__} is causal, and a sum over the sequence holds tokens that come later")
    found = {name: module for name, module in model.named_modules() if LinformerAttention.form(module) is not None}
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no attention that can be Linformer's: there are "
            f"{', '.join(LinformerAttention.stocks)}"
        )
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    n = most if n is None else n
    if n is None or (most is not None and n > most):
        raise UsageError(f"n={n}: the longest sequence that {type(model).__name__} will take, at most {most}")
    made = {name: LinformerAttention.of(module, k=k, n=n) for name, module in found.items()}
    for name, attention in made.items():
        for side in ("key", "value"):
            along = getattr(attention, side).along
            along.copy_(means(k, n) if start == "means" else normal(k, n, generator(seed, name, side)))
        model.set_submodule(name, attention)
    return attach_format(model) if isinstance(model, PreTrainedModel) else model


def normal(k: int, n: int, draw: torch.Generator) -> Tensor:
    """k × n draws with which a sum of n tokens is as large as one of them."""
    return torch.randn(k, n, generator=draw) / n**0.5


def means(k: int, n: int) -> Tensor:
    """k × n: means of consecutive tokens, as many in each as can be; of k = n the identity."""
    share = nn.functional.one_hot(torch.arange(n) * k // n, k).mT.double()
    return share / share.sum(1, keepdim=True)
