"""SST: a weight by its singular values, all of them trained, and its singular vectors, of which a few at a time are.

Jialin Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
arXiv 2405.15481.

    W = U·diag(σ)·Vᵀ        U: out × m,  σ: m,  V: in × m,  m = min(out, in)
    in every optimiser step     σ is trained, and the columns i ∈ S of U and V, |S| = r; the others rest
        ∇u_i = G·v_i,  ∇v_i = Gᵀ·u_i,  ∇σ_i = u_iᵀ·G·v_i        G: the gradient of W, which is never formed
        after it        σ ← max(σ, 0),  u_i ← u_i/‖u_i‖,  v_i ← v_i/‖v_i‖  (i ∈ S)
    after `iteration_steps` steps, T3, an iteration ends: another S is drawn
        p_i = a/m + (1 − a)·σ_i/Σσ,  a = `uniform_share`, r distinct ones, one after the other
    after `iterations` of them, T2, a round ends: before that,  [U, σ, V] ← SVD(U·diag(σ)·Vᵀ)

It begins at the weight that the model has, random or trained, and every column is trained in time, so that what is
learnt has no low rank. S is drawn for each layer by (seed, step, its name), and so the same in all processes. In a
hyperbolic network W is the matrix of a `weft.LorentzLinear`, and nothing else of that layer changes.

∇u_i is without its factor σ_i, "enhanced", and so directions are learnt at a speed of their own, those of dead
components too (σ_i = 0, which may come alive again). enhanced=False is W's true gradient. σ's gradient is with the
columns as they are; these leave orthogonality between the decompositions, and the map is always the actual product.

With a new S the moments of U's and V's active columns become zero, since they were of other columns, and with an SVD
also σ's, whose components are others then (of σ's the paper is not known to say so). Adam's count of their steps starts
anew too, so that its first steps are of the usual size. What starts anew warms up: its steps are min(1, k /
restart_warmup) of the run's on the k-th after that. In the first iteration nothing does, as the run's own schedule has
a warm-up. An optimiser is refused whose moments are not of the parameter's shape.

The paper's T2 is d/r. Here it is ⌈m/r⌉ for each layer if not given, so that a round draws as many columns as there are;
the layers of narrow heads are so decomposed more often than the others. Drawing again what is active is allowed.

Decoupled weight decay (AdamW's) changes the length of a column alone, which the projection undoes: the step is longer
by 1/(1 − lr·decay), nothing else. weft's optimisers have no decay for vectors, so none for σ.

Trained: r·(in + out) + m numbers a layer, with Adam's two moments of those alone; m·(in + out + 1) are stored, and a
pass takes about twice the dense operations where W is square: see `weft.linear.spectral_plus_frozen`. An SVD takes W in
float64, at every round's end. A linear map: `weft export --to dense` writes the stock model. One that was saved and
loaded trains on with the same columns, without projections: make it dense and reparametrise it again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.algebra.random import generator
from weft.errors import UsageError
from weft.linear.spectral_plus_frozen import SpectralPlusFrozen
from weft.pretrain._config import PretrainConfig
from weft.pretrain._moments import moments_of, restart
from weft.registry import Card
from weft.steps import Controller

LOGGER = logging.getLogger(__name__)

CARD = Card(
    title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
    arxiv="2405.15481",
    year=2025,
    summary="all singular values are trained, and a few singular vectors at a time, drawn anew again and again",
    knob="rank",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="It stores more numbers than the dense weight, and a pass takes up to twice its operations. The paper "
    "tunes the learning rate for each task; the recipe is that of plain low rank.",
    reasons={"gradients": "those of U and V are without their factor σ, as the paper has it; enhanced=False has it"},
)


@dataclass
class SstConfig(PretrainConfig):
    """Options of SST."""

    rank: int = field(default=64, metadata={"help": "r, singular vectors of each weight that are trained at a time"})
    iteration_steps: int = field(default=200, metadata={"help": "T3, optimiser steps until others are drawn"})
    iterations: int | None = field(
        default=None, metadata={"help": "T2, such draws until W is decomposed anew; none takes min(in, out)/r of each"}
    )
    restart_warmup: int = field(default=20, metadata={"help": "steps in which what is drawn warms up"})
    uniform_share: float = field(default=0.5, metadata={"help": "a: share of chance that does not follow σ"})
    enhanced: bool = field(default=True, metadata={"help": "gradients of singular vectors without their factor σ"})

    def validate(self) -> None:
        super().validate()
        if self.iteration_steps < 1:
            raise UsageError(f"iteration_steps={self.iteration_steps!r} must be at least 1")
        if self.iterations is not None and self.iterations < 1:
            raise UsageError(f"iterations={self.iterations!r} must be at least 1, or none")
        if not 0 <= self.restart_warmup <= self.iteration_steps:
            raise UsageError(
                f"restart_warmup={self.restart_warmup!r} must lie in 0 to iteration_steps={self.iteration_steps}, "
                "so that it ends before the next draw"
            )
        if not 0 < self.uniform_share <= 1:
            raise UsageError(
                f"uniform_share={self.uniform_share!r} must be a share above 0, up to 1, so that a σ of 0 has a chance"
            )


def spec(config: SstConfig, out: int, in_: int) -> dict[str, Any]:
    """What config.json says of a layer of this size."""
    return {"kind": SpectralPlusFrozen.kind, "rank": config.rank, "enhanced": config.enhanced}


def start(config: SstConfig, layer: SpectralPlusFrozen, weight: Tensor, source: torch.Generator) -> None:
    """Begin at the weight itself, with a first draw."""
    layer.decompose(weight)
    layer.activate(drawn(layer.values, config, source))


def chances(values: Tensor, uniform_share: float) -> Tensor:
    """p (m, float64, on the CPU) of σ (m, none below 0); they sum to 1.

    >>> chances(torch.tensor([3.0, 0.0, 1.0, 0.0]), 0.5)
    tensor([0.5000, 0.1250, 0.2500, 0.1250], dtype=torch.float64)
    """
    s = values.detach().double().cpu()
    total = s.sum()
    by_size = s / total if total > 0 else torch.full_like(s, 1 / len(s))
    return uniform_share / len(s) + (1 - uniform_share) * by_size


def drawn(values: Tensor, config: SstConfig, source: torch.Generator) -> Tensor:
    """S: r distinct components, ascending, drawn by their chances one after the other."""
    p = chances(values, config.uniform_share)
    return torch.multinomial(p, config.rank, generator=source).sort().values


class SstController(Controller):
    """Keeps σ and the active columns where they belong, draws at an iteration's end and decomposes at a round's."""

    events = True

    def check(self, optimizer: Optimizer) -> None:
        if self.total_steps is not None and self.total_steps <= self.config.iteration_steps:
            LOGGER.warning(
                "iteration_steps=%d in a run of %d steps: of the singular vectors only the first %d drawn are trained",
                self.config.iteration_steps, self.total_steps, self.config.rank,
            )  # fmt: skip

    def factors(self) -> list[Tensor]:
        """The active columns of all layers."""
        return [p for layer in self.parts for p in (layer.up.weight, layer.down.weight)]

    def decomposed(self, iteration: int) -> list[Any]:
        """Layers for which a round, but the first, starts with this iteration."""
        rounds = {layer.name: self.config.iterations or -(-len(layer.values) // layer.rank) for layer in self.parts}
        return [layer for layer in self.parts if iteration and iteration % rounds[layer.name] == 0]

    def started_anew(self, iteration: int) -> list[Tensor]:
        """Parameters that are others from this iteration on than they were before."""
        return [*self.factors(), *(layer.values for layer in self.decomposed(iteration))] if iteration else []

    def update_scales(self) -> dict[Tensor, Tensor]:
        iteration, before = divmod(self.step, self.config.iteration_steps)
        if before + 1 >= self.config.restart_warmup:
            return {}
        return {p: p.new_tensor((before + 1) / self.config.restart_warmup) for p in self.started_anew(iteration)}

    def after_step(self) -> None:
        for layer in self.parts:
            layer.project()
        iteration, left = divmod(self.step + 1, self.config.iteration_steps)
        if left:
            return
        for layer in self.decomposed(iteration):
            layer.decompose_anew()
        for layer in self.parts:
            layer.activate(drawn(layer.values, self.config, generator(self.config.seed, self.step + 1, layer.name)))

    def finished(self, optimizer: Optimizer | None) -> None:
        super().finished(optimizer)
        if self.step == 1:  # what cannot be reset is told in the first step
            for p in (*self.factors(), *(layer.values for layer in self.parts)):
                moments_of(optimizer, p, "sst")
        iteration, left = divmod(self.step, self.config.iteration_steps)
        for p in () if left else self.started_anew(iteration):
            restart(optimizer, p, "sst")
