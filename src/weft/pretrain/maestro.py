"""Maestro: factors of full width whose components are trained in order, so that they can be cut where they are.

Samuel Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv 2308.14929.

    W = U·V         V: m × in, `down`;  U: out × m, `up`;  m = min(out, in);  at the start V = √S·V_sᵀ,  U = U_s·√S
    W_b = U[:, :b]·V[:b]                what a layer is in a training step that draws the width b for it
    objective = loss + λ · Σ_layers Σ_b ( ‖V[b:]‖ + ‖U[:, b:]‖ ),       b from 0, norms of Frobenius
    after every `shrink_steps` steps:   keep the b whose ‖V[b:]‖·‖U[:, b:]‖ ≥ importance_threshold

A convolution, seen as a matrix of out × (in·kh·kw), is one of its own kernel to m channels and one of 1 × 1 from there.
What takes part in every draw must be worth most: for a linear model this finds the SVD of the map, or PCA, in order.

sampler="per_layer" (the paper's): every pair of a layer and one of its widths, shuffled; each step takes the next pair,
    and all other layers are whole. "uniform": each layer draws a width of its own. A draw is a function of (seed, step)
    and of when the widths last changed. In evaluation all layers are whole.
hierarchical=False: norms of single components in place of the suffixes', in both formulas. What is kept need not be a
    prefix then, and b counts those kept.
λ is absolute: it fits the loss that it stands beside, and is searched from small to large. The authors' scripts have
    1e-6, their class 5e-3; the threshold is 1e-7 in the paper, 1e-5 in the code.

What the paper leaves open is decided so. A component that shrinking drops becomes exactly 0 in both factors and stays:
it has no gradient, decay or momentum. So the parameters keep their shapes while they are trained, and whatever is saved
meanwhile is the shrunk model. `shrink` afterwards leaves the zeros out. The pairs are shuffled anew when a width has
changed, and after all of them were taken. A component that a step leaves out has no gradient of the loss in that step;
the penalty's gradient, decay and momentum it has. A weight of 0 begins with U = 0 and orthonormal V, else no
component could learn. The pass of the whole model beside each sampled one, with distillation, is left out: the paper
trains without. Of a transformers model the linear layers of the blocks are factorised, and all convolutions.

Trained: m·(in + out) numbers a layer, more than the dense ones until they are cut. A linear map: `shrink` and
`weft export --to dense` both give stock layers where these are smaller. At the end of `weft pretrain` and `weft adapt`
`shrink` is called, and what is saved is the small model; without (shrink=False) it can still be cut by `truncate`.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from weft.algebra.random import generator
from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear.low_rank import LowRank
from weft.linear.low_rank_conv import LowRankConv
from weft.pretrain._config import PretrainConfig
from weft.pretrain._cut import Cut, Layer, recalibrate, shrink, truncate
from weft.registry import Card
from weft.steps import Controller

__all__ = ["Cut", "MaestroConfig", "MaestroController", "draw", "importance", "recalibrate", "shrink", "truncate"]

LOGGER = logging.getLogger(__name__)
EPS = 1e-16  # under the penalty's roots, whose gradient at 0 is NaN without

CARD = Card(
    title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    arxiv="2308.14929",
    year=2024,
    summary="full-width factors trained so that their components are in order, and dropped where they matter least",
    knob="rank",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="It trains more numbers than the dense model until it shrinks, and how far that goes hangs on λ, which "
    "must be searched. The paper trains by SGD (rate 0.1, LeNet's 0.01, momentum 0.9, decay 1e-4); the recipe is plain "
    "low rank's, unconfirmed. AdamW scales the lasso's gradient, so that components come under a small threshold only "
    "as the rate decays.",
)


@dataclass
class MaestroConfig(PretrainConfig):
    """Options of Maestro."""

    convolutions: ClassVar[bool] = True

    rank: int | None = field(default=None, metadata={"help": "cap on m, the width at the start; none is full"})
    gp_lambda: float = field(default=1e-6, metadata={"help": "λ, the weight of the group lasso (absolute)"})
    importance_threshold: float = field(default=1e-5, metadata={"help": "components below it are dropped"})
    shrink_steps: int = field(default=500, metadata={"help": "optimiser steps between drops (the paper: an epoch)"})
    sampler: Literal["per_layer", "uniform"] = field(
        default="per_layer", metadata={"help": "cut one layer a step, or each by a width of its own"}
    )
    hierarchical: bool = field(default=True, metadata={"help": "norms of suffixes, or of single components"})
    ignore_first: int = field(default=0, metadata={"help": "leave so many layers dense, from the first on"})
    ignore_last: bool = field(default=False, metadata={"help": "leave the last layer dense"})
    shrink: bool = field(default=True, metadata={"help": "leave out what was dropped, at the end of a run"})

    def validate(self) -> None:
        if self.rank is not None:
            super().validate()
        for name, least in (("gp_lambda", 0), ("importance_threshold", 0), ("shrink_steps", 1), ("ignore_first", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} must be at least {least}")
        if self.sampler not in ("per_layer", "uniform"):
            raise UsageError(f"sampler={self.sampler!r} must be per_layer or uniform")

    def choose(self, layers: dict[str, Any]) -> list[str]:
        names = list(layers)
        chosen = names[self.ignore_first : len(names) - self.ignore_last]
        if names and not chosen:
            raise UsageError(
                f"ignore_first={self.ignore_first} and ignore_last={self.ignore_last} leave none of {len(names)} layers"
            )
        return chosen


def spec(config: MaestroConfig, out: int, in_: int, kernel: tuple[int, int] | None = None) -> dict[str, Any]:
    """What config.json says of a layer of this size; of a convolution's, `in_` is in·kh·kw."""
    return {"kind": (LowRankConv if kernel else LowRank).kind, "rank": config.rank or min(out, in_)}


def start(config: MaestroConfig, layer: Layer, weight: Tensor, source: torch.Generator) -> None:
    """Begin at the weight itself, the singular values shared evenly."""
    u, s, vh = svd_top(weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32)), layer.rank)
    root = s.sqrt()
    rows = root if s[0] > 0 else torch.ones_like(root)
    layer.down.weight.copy_((rows[:, None] * vh).view_as(layer.down.weight))
    layer.up.weight.copy_((u * root).view_as(layer.up.weight))


# --- while it trains ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _order(pairs: int, *key: object) -> Tensor:
    return torch.randperm(pairs, generator=generator(*key))


def draw(config: MaestroConfig, names: list[str], widths: list[int], step: int, since: int = 0) -> list[int]:
    """b of every layer in an optimiser step; `since` is the first step of these widths."""
    if config.sampler == "uniform":
        sources = (generator(config.seed, "maestro", step, name) for name in names)
        return [int(torch.randint(max(w, 1), (), generator=g)) + 1 for w, g in zip(widths, sources)]
    drawn, pairs = list(widths), sum(widths)
    if pairs:
        round_, at = divmod(step - since, pairs)
        left = int(_order(pairs, config.seed, "maestro", since, round_)[at])
        for i, width in enumerate(widths):
            if left < width:
                drawn[i] = left + 1
                break
            left -= width
    return drawn


def norms(layer: Layer, hierarchical: bool, eps: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """‖V[b:]‖ and ‖U[:, b:]‖, or ‖V[b]‖ and ‖U[:, b]‖, for every b: 2 × m, in float32 or wider."""
    v, u = (t.to(torch.promote_types(t.dtype, dtype)) for t in (layer.down.weight, layer.up.weight))
    squares = torch.stack([v.flatten(1).square().sum(1), u.flatten(1).square().sum(0)])
    # of two rows, where that of one need not be the same in every run on a GPU
    return ((squares.flip(1).cumsum(1).flip(1) if hierarchical else squares) + eps).sqrt()


@torch.no_grad()
def importance(layer: Layer, hierarchical: bool = True) -> Tensor:
    """What stands or falls with each component, (m,) in float64 on the CPU; it never rises where hierarchical."""
    return norms(layer, hierarchical, dtype=torch.float64).cpu().prod(0)


def _sampled(up: Any, inputs: tuple[Tensor]) -> Tensor | None:
    return inputs[0].masked_fill(~up.open, 0) if up.training else None


class MaestroController(Controller):
    """Draws widths at the start of every step, adds the lasso, and drops components."""

    events = True

    def __init__(self, config: MaestroConfig, parts: list[Any]) -> None:
        self.widths, self.since = [layer.rank for layer in parts], 0
        for layer in parts:
            up = layer.up
            shape = (layer.rank, 1, 1) if isinstance(layer, LowRankConv) else (layer.rank,)
            for name in ("kept", "open"):  # what was not dropped, and what this step's training forward has of it
                up.register_buffer(name, up.weight.new_ones(shape, dtype=torch.bool), persistent=False)
            up.register_forward_pre_hook(_sampled)
        super().__init__(config, parts)

    def begin(self) -> None:
        drawn = draw(self.config, [layer.name for layer in self.parts], self.widths, self.step, self.since)
        for layer, b in zip(self.parts, drawn):
            kept = layer.up.kept
            layer.up.open.copy_(kept & (kept.cumsum(0) <= b))

    def penalised(self) -> bool:
        return self.config.gp_lambda > 0

    def penalty(self) -> Tensor:
        each = [norms(layer, self.config.hierarchical, EPS).sum() for layer in self.parts]
        return self.config.gp_lambda * torch.stack([value.to(each[0].device) for value in each]).sum()

    def kept(self) -> dict[Tensor, Tensor]:
        """Which entries of the factors belong to a component that was not dropped; of the layers that lost some."""
        masks = {}
        for layer, width in zip(self.parts, self.widths):
            if width < layer.rank:
                kept = layer.up.kept
                masks[layer.down.weight], masks[layer.up.weight] = kept[:, None], kept  # m × 1 × …, and m × 1 × 1 or m
        return masks

    def update_scales(self) -> dict[Tensor, Tensor]:
        return {p: kept.to(p.dtype) for p, kept in self.kept().items()}

    def after_step(self) -> None:
        if (self.step + 1) % self.config.shrink_steps == 0:
            self.drop()
        for p, kept in self.kept().items():  # in each step: an optimiser outside of torch knows no scales
            p.masked_fill_(~kept, 0)

    def drop(self) -> None:
        """Give up the components that matter less than the threshold."""
        before = list(self.widths)
        for i, layer in enumerate(self.parts):
            little = importance(layer, self.config.hierarchical) < self.config.importance_threshold
            kept = layer.up.kept
            kept &= ~little.to(kept.device).view_as(kept)
            self.widths[i] = int(kept.sum())
        if self.widths != before:
            self.since = self.step + 1
            LOGGER.info("maestro: step %d leaves %d of %d components", self.since, sum(self.widths), sum(before))

    def state(self) -> dict[str, Tensor]:
        kept = {f"kept.{layer.name}": layer.up.kept.flatten().cpu() for layer in self.parts}
        return {"since": torch.tensor(self.since), **kept}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.since = int(state["since"])
        for i, layer in enumerate(self.parts):
            kept = state[f"kept.{layer.name}"]
            layer.up.kept.copy_(kept.view_as(layer.up.kept))
            self.widths[i] = int(kept.sum())


# --- afterwards -----------------------------------------------------------------------------------------------------


def finish(config: MaestroConfig, model: nn.Module) -> bool:
    """What becomes of the model at the end of a run; whether it is another one then."""
    if config.shrink:
        shrink(model)
    return config.shrink
