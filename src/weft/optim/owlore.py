"""OwLore: a few blocks are trained at a time, drawn by their share of outliers, with GaLore's state for those alone.

Pengxiang Li et al., "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM
Fine-tuning", arXiv 2405.18380; since its third version "Outlier-weighed Layerwise Sampling", Findings of ACL 2025.

    once, for each block l     A = |W|·√c,   c_j = Σ x_j² over calibration tokens, of every linear layer of the block
                               D_l = 100 · share of the block's A above M · their mean,   p_l = D_l / Σ D
    every T_s taken steps      γ blocks by p, one after the other without replacement; the others are frozen
    every step                 GaLore's on the linear layers of what is trained, its inner rule as it is on the rest

M is `outlier_multiple`, γ `activated_layers`, T_s `sampling_interval`. Embeddings, head and final norm belong to no
block and are always trained. Other `sampling`s: "uniform" (LISA's), "increase" and "decrease" (p linear in depth),
"owl_reverse" (max p − p), and "norm" (p by the Frobenius norm of the block's linear layers together: the authors read
theirs from a file that they do not describe). Where no block has an outlier, blocks are drawn uniformly.

Frozen is requires_grad=False: such a block has no gradient, none is computed for it, and its weights keep their bits.
The first draw is made with the optimiser, each later one at the end of a step, so that a forward pass finds its blocks.
A draw is a function of (seed, its number), and p and the number of steps lie in the parameter groups: a resumed run
draws what the uninterrupted one does, whatever it was calibrated on. A step that is not taken does not count.

State: GaLore's, for γ blocks and what belongs to none. A block that is frozen loses its moments and bases and starts
anew when it is drawn again; `keep_states` keeps them as the authors do, stale and in the end those of all blocks.

Afterwards `model.requires_grad_(True)` frees all blocks. Several processes: DistributedDataParallel must count on every
parameter, so there the first draw waits for the first forward pass in training, which must be that of the wrapped
model; with find_unused_parameters=True, and without static_graph. p is the first process's.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft import anatomy
from weft.algebra.random import generator
from weft.errors import UsageError, nearest
from weft.optim._basis import Basis, BasisConfig, basis, check_basis
from weft.optim._groups import param_groups
from weft.optim._optimizer import Group, State
from weft.optim._outliers import linear_layers, outlier_ratios
from weft.optim._projected import Projected, Projector
from weft.registry import Card

CARD = Card(
    title="OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM Fine-tuning",
    arxiv="2405.18380",
    year=2024,
    summary="GaLore on a few blocks at a time, drawn by how many outliers they have; the others rest",
    knob="rank",
    recipe={"learning_rate": 3e-4, "weight_decay": 0.0},
    needs=("batches",),
    limitations="A compiled model is compiled anew for each choice of blocks. Small models may have no outlier above "
    "13 times the mean; outlier_multiple=5 finds some.",
)

LOGGER = logging.getLogger(__name__)
SAMPLINGS = ("owl", "owl_reverse", "uniform", "increase", "decrease", "norm")


@dataclass
class OwloreConfig(BasisConfig):
    """Options of OwLore."""

    rank: int = field(default=256, metadata={"help": "r, directions of each gradient in which moments are kept"})
    update_proj_gap: int = field(default=100, metadata={"help": "steps between two choices of the directions"})
    activated_layers: int = field(default=5, metadata={"help": "γ, blocks that are trained at a time"})
    sampling_interval: int = field(default=50, metadata={"help": "T_s, steps between two draws of them"})
    sampling: Literal["owl", "owl_reverse", "uniform", "increase", "decrease", "norm"] = field(
        default="owl", metadata={"help": "what makes a block likely: many outliers, few, nothing, depth, its norm"}
    )
    outlier_multiple: float = field(
        default=13.0, metadata={"help": "M, how many times the block's mean an outlier exceeds; 5 suits small models"}
    )
    outliers: list[float] | None = field(
        default=None, metadata={"help": "each block's D, of an earlier run, say; none counts them on batches"}
    )
    keep_states: bool = field(default=False, metadata={"help": "keep the moments of frozen blocks, as the authors do"})
    seed: int = field(default=0, metadata={"help": "of the draws"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling not in SAMPLINGS:
            raise UsageError(f"unknown sampling {self.sampling!r}: {nearest(str(self.sampling), SAMPLINGS)}")
        if not 0 < self.outlier_multiple < math.inf:
            raise UsageError(f"outlier_multiple={self.outlier_multiple!r} must be above 0")
        if self.outliers is not None and not self.sampling.startswith("owl"):
            raise UsageError(f"sampling={self.sampling!r} does not go by outliers: leave out one of the two")


class Owlore(Projected):
    """GaLore's rules on what is trained, and every `sampling_interval` steps a draw of the blocks that are.

    A frozen block's gradients are None, not zero: by zeros, decay and momentum would move it. Under
    `weft.optim.update_in_backward`, `step()` is called as always: it counts, and draws.
    """

    freezes = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        blocks: Sequence[nn.Module],
        probabilities: Sequence[float] | None = None,
        activated_layers: int = 5,
        sampling_interval: int = 50,
        seed: int = 0,
        keep_states: bool = False,
        rank: int | None = None,
        update_proj_gap: int = 100,
        scale: float = 1.0,
        proj_type: str = "std",
        svd: str = "warm",
        inner: str = "adamw",
        compile: bool = False,
    ) -> None:
        """
        Args:
            params: groups as GaLore's, with all that is ever to be trained.
            blocks: what is drawn from; parameters outside of them are always trained.
            probabilities: p, in any scale; none draws uniformly.
            keep_states: of blocks that are frozen.
            inner, compile: see `Projected`.

        Raises UsageError for values that cannot work, and for a block without a parameter that is trained.
        """
        self.blocks, self.seed, self.keep_states = list(blocks), seed, keep_states
        self.activated_layers, self.sampling_interval = activated_layers, sampling_interval
        p = _first_process(_normalised([1.0] * len(self.blocks) if probabilities is None else probabilities))
        self._check_draws(p)
        self._moved = False  # whether any parameter has taken the step that is under way
        self._waiting: list[Any] = []  # handles of what waits for the first forward pass
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        defaults |= {"update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, "svd": svd}
        super().__init__(params, {**defaults, "taken": 0, "probabilities": p}, inner=inner, compile=compile)
        for place, block in enumerate(self.blocks):
            if not any(w.requires_grad for w in self._of(block)):
                raise UsageError(
                    f"Owlore: block {place} of {len(self.blocks)} has no parameter that is trained: call "
                    "model.requires_grad_(True) first, or draw among other blocks by Owlore(groups, blocks=...)"
                )
        if not _alone():
            self._waiting = [block.register_forward_pre_hook(self._begin) for block in self.blocks]
        self._activate()

    def _check_draws(self, p: list[float]) -> None:
        """Refuse what nothing can be drawn by."""
        for key in ("activated_layers", "sampling_interval"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"Owlore: {key}={value!r} must be a whole number of at least 1")
        count, possible = self.activated_layers, sum(each > 0 for each in p)
        if len(p) != len(self.blocks):
            raise UsageError(f"Owlore: {len(p)} probabilities do not fit {len(self.blocks)} blocks: give one for each")
        if count > len(p):
            raise UsageError(f"Owlore: activated_layers={count} is above the number of blocks, {len(p)}")
        if count > possible:
            raise UsageError(
                f"Owlore: activated_layers={count} cannot be drawn where {possible} of {len(p)} blocks have a "
                "probability above 0: take fewer, or a smaller outlier_multiple, which finds outliers in more blocks"
            )

    def check(self, group: Group) -> None:
        super().check(group)
        check_basis("Owlore", group)
        for p in group["params"]:
            if isinstance(p, DTensor):
                raise UsageError(
                    f"Owlore: a parameter of shape {tuple(p.shape)} is a DTensor, and shards are not frozen and freed "
                    "block by block: use DistributedDataParallel, or galore, which knows shards"
                )

    def projector(self, group: Group, p: Tensor) -> Basis:
        return basis(group["proj_type"], group["rank"], group["svd"], p.shape)

    @property
    def drawn(self) -> list[int]:
        """The blocks that are trained, in ascending order."""
        group = self.param_groups[0]
        number = group["taken"] // self.sampling_interval
        return draw(group["probabilities"], self.activated_layers, self.seed, number)

    def follow(self, projector: Projector, group: Group, state: State, p: Tensor, r: Tensor) -> None:
        super().follow(projector, group, state, p, r)
        self._moved = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, or none where a gradient is not finite, and make a draw that is due; what the closure gave."""
        loss = super().step(closure)
        if self._moved:
            self._moved = False
            for group in self.param_groups:
                group["taken"] += 1
            if self.param_groups[0]["taken"] % self.sampling_interval == 0:
                self._activate()
        return loss

    def _of(self, block: nn.Module) -> list[nn.Parameter]:
        """The parameters of a block that the optimiser holds."""
        held = {id(p) for group in self.param_groups for p in group["params"]}
        return [p for p in block.parameters() if id(p) in held]

    def _activate(self) -> None:
        """Let the blocks that are drawn, and no others, be trained."""
        if self._waiting:
            return
        active = {id(p) for place in self.drawn for p in self._of(self.blocks[place])}  # blocks may share some
        for block in self.blocks:
            for p in self._of(block):
                p.requires_grad_(id(p) in active)
                if id(p) not in active:
                    p.grad = None
                    if not self.keep_states:
                        self.state.pop(p, None)

    def _begin(self, block: nn.Module, args: Any) -> None:
        """Before a forward pass: what waits for the first one in training is done."""
        if block.training and torch.is_grad_enabled():
            for handle in self._waiting:
                handle.remove()
            self._waiting = []
            self._activate()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the blocks that were trained are again, and p is that of the saved run."""
        p = state_dict["param_groups"][0].get("probabilities", ())
        if len(p) != len(self.blocks):
            raise UsageError(f"Owlore: the state to load, another's, is of {len(p)} blocks, not {len(self.blocks)}")
        super().load_state_dict(state_dict)
        self._activate()


def draw(p: Sequence[float], count: int, *key: object) -> list[int]:
    """`count` distinct places, ascending, drawn by p one after the other; the same for the same key everywhere."""
    left, found = list(p), []
    for u in torch.rand(count, generator=generator(*key), dtype=torch.float64).tolist():
        ends = list(accumulate(left))
        found.append(bisect_right(ends, u * ends[-1]))  # a block of no length is never hit, as u < 1
        left[found[-1]] = 0.0
    return sorted(found)


def probabilities(sampling: str, scores: Sequence[float]) -> list[float]:
    """p of each block by its score: D for "owl" and "owl_reverse", its norm for "norm"; other ways only count them.

    Uniform where that leaves nothing to go by. Raises UsageError for a score below 0.

    >>> probabilities("owl_reverse", [3.0, 1.0, 2.0])
    [0.0, 0.6666666666666666, 0.3333333333333333]
    """
    count, most = len(scores), max(scores)
    return _normalised(
        {
            "uniform": [1.0] * count,
            "increase": range(1, count + 1),
            "decrease": range(count, 0, -1),
            "owl_reverse": [most - each for each in scores],
        }.get(sampling, scores)
    )


def _normalised(p: Iterable[float]) -> list[float]:
    """p with a sum of 1, uniform where it is 0."""
    p = [float(each) for each in p]
    if not all(0 <= each < math.inf for each in p):
        raise UsageError(f"Owlore: the numbers that blocks are drawn by, {p}, must not be below 0")
    total = math.fsum(p)
    return [each / total for each in p] if total else [1 / len(p) for _ in p]


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def _first_process(p: list[float]) -> list[float]:
    """p of the first process, on all: they must draw the same blocks, whatever rows each was given."""
    box = [p]
    if not _alone():
        dist.broadcast_object_list(box)
    return box[0]


def arguments(
    config: OwloreConfig, model: nn.Module, weight_decay: float, batches: Iterable[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """What `Owlore` takes for this model. Batches are for outliers that nobody gave, and otherwise left alone."""
    chosen = {name: getattr(config, name) for name in ("rank", "update_proj_gap", "scale", "proj_type", "svd")}
    groups = param_groups(model, target_modules=config.target_modules, weight_decay=weight_decay, **chosen)
    names = ("betas", "eps", "inner", "activated_layers", "sampling_interval", "keep_states", "seed")
    rest = {name: getattr(config, name) for name in names}
    rest["blocks"] = list(anatomy.blocks(model).values())
    rest["probabilities"] = probabilities(config.sampling, _scores(config, model, rest["blocks"], batches))
    return {"params": groups, "weight_decay": weight_decay, **rest}


def _scores(
    config: OwloreConfig, model: nn.Module, blocks: list[nn.Module], batches: Iterable[dict[str, Any]] | None
) -> list[float]:
    """What the blocks are drawn by; on the meta device, where there are no numbers, they are all alike."""
    found = config.outliers
    if not blocks:
        raise UsageError(f"owlore draws blocks, and {type(model).__name__} has no list of modules: use galore")
    if found is not None and len(found) != len(blocks):
        raise UsageError(f"outliers={found!r} must be one number for each of {len(blocks)} blocks")
    if config.sampling not in ("owl", "owl_reverse", "norm") or any(p.is_meta for p in model.parameters()):
        return [1.0] * len(blocks)
    if config.sampling == "norm":
        norms = [[float(layer.weight.detach().double().norm()) for layer in linear_layers(block)] for block in blocks]
        return [math.hypot(*each) for each in norms]
    if found is None:
        if batches is None:
            raise UsageError(
                f"sampling={config.sampling!r} counts outliers on calibration data: give batches=..., dicts of what "
                "the model takes, or the outliers=[...] that weft.optim.outlier_ratios found"
            )
        found = outlier_ratios(model, batches, config.outlier_multiple)
        LOGGER.info("percent of outliers, block by block: " + ", ".join(f"{each:.3g}" for each in found))
    if not any(found):
        LOGGER.warning(
            f"no block has an outlier above {config.outlier_multiple:g} times the mean, so blocks are drawn uniformly: "
            "outlier_multiple=5 works on small models"
        )
    return found
