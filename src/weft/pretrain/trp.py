"""TRP: dense weights that are cut to a low rank again and again while they train, so that a last cut costs little.

Yuhui Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020, arXiv 2004.14566; before
that "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 1812.02402.

    in every optimiser step t with t mod `period` = 0, the first included, before its forward pass
        W ← U·S·Vᵀ          its SVD, of which the first k stay: the least with Σ_{i≤k} s_i² ≥ energy·Σ s_i²
        ∇W ← ∇W + λ·U·Vᵀ    after the backward pass, λ = `nuclear_lambda`: a sub-gradient of λ·Σs
    in all other steps W, which no cut holds to that rank, trains freely
    after training          W ← its factors, k = the first s_i < threshold, or the least for `final_energy`

The gradient is taken at the cut weight, and the step starts there. What a linear layer's SVD is of is its weight, out ×
in; a convolution's is seen in one of three ways, `form`, which also say what it becomes:

    nc  out × (in·kh·kw)            kh × kw to k channels, then 1 × 1               k·(in·kh·kw + out) numbers
    vh  (in·kh) × (out·kw)          kh × 1 to k channels, then 1 × kw               k·(in·kh + out·kw)
    nd  in × (kh·kw), each output   1 × 1 to k for each output, then kh × kw, summed    k·out·(in + kh·kw)

With nd all outputs have the k of the one that needs the most. Of convolutions those larger than 1 × 1 take part, but
for the model's first; nc and vh leave strided ones dense in the end, as the authors do. `target_modules`, where given,
overrules all that.

Cuts add up. What training does not bring back is cut again, as long as the least value holds no more than 1 − energy of
what was left: as steps become small, fewer than 1/(1 − energy) values stay. Those are ten of 0.9, the authors' for
kernels of few channels; wide layers want an energy nearer to 1.

The sub-gradient is that of what is kept; `full_gradient` takes all singular vectors, of the weight before the cut,
which presses on what is cut too, as a separate script of the authors does. It enters once an optimiser step, into the
sum over its micro-batches and before clipping, as any penalty does here. Of a singular value of 0 it has nothing.

What the paper leaves open is decided so. The cut is made in the first training forward of its step, and not at the end
of the step before: what is evaluated, saved or returned in between is as the optimiser left it, and the state of a run
is its weights and the count of its steps. A layer in evaluation, or whose weight is not trained, is not cut. Moments
stay as they are. SVDs are of float32, under bfloat16 weights too. A weight that keeps all its rank keeps its bits. The
authors' code cuts in every step if nothing is said, and their script in every fifth.

`decompose` is the last cut, of any model with such weights, trained or loaded. No layer grows by it, in numbers or in
multiplications: one that would stays dense, as it is. At the end of `weft pretrain` and `weft adapt` it is called, and
what is saved is the small model. In Python, after training: `weft.pretrain.trp.decompose(model, "nc", threshold=0.05)`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.algebra.svd import rank_for_energy, singular_values, svd_stack
from weft.errors import UsageError, WeftError
from weft.linear._convolution import LowRankConvolution
from weft.linear._structured import check_rank
from weft.linear._transformers import attach_format
from weft.linear.decoupled_conv import DecoupledConv
from weft.linear.low_rank import LowRank
from weft.linear.low_rank_conv import LowRankConv
from weft.linear.vertical_horizontal_conv import VerticalHorizontalConv
from weft.pretrain._config import PretrainConfig
from weft.pretrain._engine import release, targets
from weft.registry import Card
from weft.steps import Controller

LOGGER = logging.getLogger(__name__)

Form = Literal["nc", "vh", "nd"]
FORMS: dict[str, type[LowRankConvolution]] = {"nc": LowRankConv, "vh": VerticalHorizontalConv, "nd": DecoupledConv}
THRESHOLD, FINAL_ENERGY = 0.05, 0.85  # the authors', on values, and with nd

CARD = Card(
    title="TRP: Trained Rank Pruning for Efficient Deep Neural Networks",
    arxiv="2004.14566",
    year=2020,
    summary="dense weights, cut to a low rank every few steps while they train, then decomposed",
    knob="",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="Training takes the memory of dense training, a second gradient in a step with a cut, and the time of "
    "the SVDs; only the result is smaller. The paper trains convolutional networks by SGD (rate 0.1, momentum 0.9, "
    "decay 1e-4); the recipe is plain low rank's, unconfirmed. AdamW scales the nuclear term with the gradient, and "
    "the threshold of 0.05 is absolute. In a long run the default energy leaves fewer than ten singular values.",
    reasons={"dense": "weights are factorised after training, and are matrices while it lasts"},
)


@dataclass
class TrpConfig(PretrainConfig):
    """Options of TRP."""

    convolutions: ClassVar[bool] = True

    form: Form = field(default="nc", metadata={"help": "as what a convolution is seen and decomposed: nc, vh or nd"})
    energy: float = field(default=0.9, metadata={"help": "share of Σs² that a cut keeps; 1 cuts nothing"})
    rank: int | None = field(default=None, metadata={"help": "cap on k, in training and after it; none is no cap"})
    period: int = field(default=20, metadata={"help": "optimiser steps from one cut to the next"})
    nuclear_lambda: float = field(default=3e-4, metadata={"help": "λ, the weight of the nuclear norm; 0 is without"})
    full_gradient: bool = field(default=False, metadata={"help": "take its sub-gradient of all singular vectors"})
    truncation: bool = field(default=True, metadata={"help": "cut the weights; else the nuclear norm acts alone"})
    decompose: bool = field(default=True, metadata={"help": "factors in place of weights at the end of a run"})
    threshold: float | None = field(
        default=None, metadata={"help": "in the end, leave out singular values below it; none is 0.05, but for nd"}
    )
    final_energy: float | None = field(
        default=None, metadata={"help": "in the end, keep this share of Σs² instead; none is 0.85 for nd"}
    )

    def validate(self) -> None:
        if self.rank is not None:
            super().validate()
        if self.form not in FORMS:
            raise UsageError(f"form={self.form!r} must be nc, vh or nd")
        if self.period < 1:
            raise UsageError(f"period={self.period!r} must be at least 1")
        for name in ("energy", "final_energy"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"{name}={share!r} must be a share above 0, up to 1")
        for name in ("nuclear_lambda", "threshold"):
            size = getattr(self, name)
            if size is not None and not 0 <= size < math.inf:
                raise UsageError(f"{name}={size!r} must be at least 0")
        if self.threshold is not None and self.final_energy is not None:
            raise UsageError(f"threshold={self.threshold} and final_energy={self.final_energy} say both what is left")

    def choose(self, layers: dict[str, Any]) -> list[str]:
        if self.target_modules is not None:
            return list(layers)
        convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
        wide = [name for name, layer in convolutions.items() if layer.kernel_size != (1, 1)]
        return [name for name in layers if name not in convolutions or name in wide[1:]]


# --- a weight and its rank ------------------------------------------------------------------------------------------


def turned(layer: nn.Module, weight: Tensor) -> Tensor:
    """out × in of the in × out that a Conv1D has, and back; any other layer's weight as it is."""
    return weight.mT if isinstance(layer, Conv1D) else weight


def kind_of(layer: nn.Module, form: str) -> type[LowRankConvolution]:
    """The kind that says as what matrices a layer's weight is seen; of a linear layer it is one as it stands."""
    return FORMS[form] if isinstance(layer, nn.Conv2d) else LowRankConv


def matrices(layer: Any, form: str) -> Tensor:
    """A layer's weight as the matrices whose rank counts: n × a × b, in float32 or wider."""
    weight = turned(layer, layer.weight)
    return kind_of(layer, form).matrices(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def rank_for(s: Tensor, *, energy: float = 1.0, threshold: float | None = None, cap: int | None = None) -> int:
    """k of matrices with these singular values (n × m, each descending): at least 1, at most `cap`, if that is given.

    It is what the one that needs the most keeps: all from `threshold` on or, without, the fewest that hold `energy` of
    its Σs².

    >>> s = torch.tensor([[3.0, 2.0, 1.0]])
    >>> rank_for(s, energy=0.9), rank_for(s, energy=0.93), rank_for(s, threshold=1.5)
    (2, 3, 2)
    """
    each = [rank_for_energy(row, energy) if threshold is None else int((row >= threshold).sum()) for row in s]
    k = max(*each, 1)
    return k if cap is None else min(k, cap)


def check(layer: Any, config: TrpConfig) -> None:
    """Raise UsageError where a layer has no such form, or a weight of it no such rank."""
    if isinstance(layer, nn.Conv2d):
        kind_of(layer, config.form).geometry(layer)
    if config.rank is not None:
        _, a, b = matrices(layer, config.form).shape
        check_rank(config.rank, a, b, 1)


def finite(found: Tensor, name: str) -> Tensor:
    """The matrices of the layer called so. Raises WeftError where an entry is no number."""
    if not bool(torch.isfinite(found).all()):
        raise WeftError(f"trp: {name} has weights that are not finite, and so no singular values")
    return found


# --- while it trains ------------------------------------------------------------------------------------------------


@torch.no_grad()
def cut(layer: Any, config: TrpConfig) -> tuple[Tensor, Tensor]:
    """Cut a layer's weight, in place; U (n × a × k) and Vᵀ (n × k × b) of its nuclear norm's sub-gradient U·Vᵀ."""
    whole = finite(matrices(layer, config.form), layer.name)
    u, s, vh = svd_stack(whole, energy=1.0 if config.full_gradient else config.energy)
    k = rank_for(s, energy=config.energy if config.full_gradient else 1.0, cap=config.rank)
    if config.truncation and k < min(whole.shape[1:]):
        best = (u[..., :k] * s[:, None, :k]) @ vh[:, :k]
        weight = kind_of(layer, config.form).folded(best, turned(layer, layer.weight).shape)
        layer.weight.copy_(turned(layer, weight))
    if not config.full_gradient:
        u, s, vh = u[..., :k], s[:, :k], vh[:, :k]
    return u * (s > 0)[:, None], vh


def _before_forward(layer: Any, inputs: Any) -> None:
    if layer.training:
        for controller in layer.controllers.values():
            controller.cut()


class TrpController(Controller):
    """Cuts the weights of a step that is due in its first training forward, and adds the nuclear norm's sub-gradient.

    Attributes:
        factors: what `cut` gave of each layer that was cut in the step under way, by its name.
    """

    events = True

    def __init__(self, config: TrpConfig, parts: list[Any]) -> None:
        for layer in parts:
            try:
                check(layer, config)
            except UsageError as error:
                raise UsageError(f"trp: {layer.name}: {error}") from error
        # the decision is no part of a compiled graph, so that a compiled model is cut too
        hook = torch.compiler.disable(_before_forward)
        for layer in parts:
            layer.register_forward_pre_hook(hook)
        super().__init__(config, parts)

    def check(self, optimizer: Optimizer) -> None:
        if self.total_steps is not None and self.total_steps <= self.config.period:
            LOGGER.warning(
                "period=%d in a run of %d steps: weights are cut once, before the first step",
                self.config.period, self.total_steps,
            )  # fmt: skip

    def begin(self) -> None:
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def forget(self, part: Any) -> None:
        super().forget(part)
        self.factors.pop(part.name, None)  # other weights, not cut yet

    def cut(self) -> None:
        """Cut what is due in the step under way, once."""
        idle = not (self.config.truncation or self.config.nuclear_lambda)
        if idle or self.step % self.config.period:
            return
        for layer in self.parts:
            if layer.name not in self.factors and layer.training and layer.weight.requires_grad:
                self.factors[layer.name] = cut(layer, self.config)

    def penalised(self) -> bool:
        return self.config.nuclear_lambda > 0

    def penalty(self) -> Tensor | None:
        """λ·Σ⟨U·Vᵀ, W⟩: of the kept vectors λ times the sum of what was kept, and its gradient λ·U·Vᵀ."""
        terms = []
        for layer in self.parts:
            if layer.name in self.factors:
                u, vh = self.factors[layer.name]
                terms.append((u * (matrices(layer, self.config.form) @ vh.mT)).sum())
        if not terms:
            return None
        return self.config.nuclear_lambda * torch.stack([term.to(terms[0]) for term in terms]).sum()


# --- afterwards -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def decompose(
    model: nn.Module,
    form: Form = "nc",
    *,
    threshold: float | None = None,
    final_energy: float | None = None,
    rank: int | None = None,
    target_modules: list[str] | str | None = None,
) -> nn.Module:
    """Put factors in place of weights of low rank; the model, which is changed in place.

    Args:
        form: what a convolution becomes.
        threshold: singular values below it are left out; without it and `final_energy`, 0.05, and of nd's
            convolutions, whose values are of single outputs, 0.15 of their Σs².
        final_energy: in place of that, the share of Σs² that is kept.
        rank: cap on what is kept of a weight.
        target_modules: which layers; by default all that the method trains, without strided ones of nc and vh.

    A layer that would have no fewer numbers or no fewer multiplications stays as it is. It works on any model with
    dense layers, one that was loaded too; no controller acts on the result, and new parameters take the place of the
    old: only after training. Raises UsageError, the model being as it was, for what cannot be decomposed.
    """
    config = TrpConfig(target_modules, form=form, threshold=threshold, final_energy=final_energy, rank=rank)
    layers, made = targets(model, config), {}
    if isinstance(model, PreTrainedModel):
        attach_format(model)  # which refuses a quantised model, before any work
    for name, layer in layers.items():
        try:
            check(layer, config)
            small = smaller(name, layer, config)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        if small is not None:
            made[name] = small
    before = sum(p.numel() for p in model.parameters())
    for name, small in made.items():
        model.set_submodule(name, small)
    release(model)
    if isinstance(model, PreTrainedModel):
        attach_format(model)
    after = sum(p.numel() for p in model.parameters())
    LOGGER.info(f"trp: {len(made)} of {len(layers)} layers are of low rank: {after:,} parameters of {before:,}")
    return model


def smaller(name: str, layer: Any, config: TrpConfig) -> Any:
    """The layer that stands for a dense one, or None where that is to stay."""
    convolution = isinstance(layer, nn.Conv2d)
    if convolution and config.target_modules is None and config.form != "nd" and layer.stride != (1, 1):
        return None
    s = singular_values(finite(matrices(layer, config.form), name))
    if config.final_energy is not None or (config.threshold is None and convolution and config.form == "nd"):
        k = rank_for(s, energy=config.final_energy or FINAL_ENERGY, cap=config.rank)
    else:
        k = rank_for(s, threshold=THRESHOLD if config.threshold is None else config.threshold, cap=config.rank)
    bias = getattr(layer, "bias", None)
    if convolution:
        small: Any = FORMS[config.form].from_dense(layer.weight, bias, rank=k, like=layer)
    else:
        small = LowRank.from_dense(turned(layer, layer.weight), bias, rank=k)
    return small.train(layer.training) if multiplications(small) < layer.weight.numel() else None


def multiplications(small: Any) -> int:
    """What a layer of two takes for each place of its output; no fewer than it has numbers.

    The first layer runs at more places where the second has a stride.
    """
    finer = math.prod(getattr(small.up, "stride", ()))
    return small.down.weight.numel() * finer + small.up.weight.numel()


def finish(config: TrpConfig, model: nn.Module) -> bool:
    """What becomes of the model at the end of a run; whether it is another one then."""
    if config.decompose:
        how: Any = {name: getattr(config, name) for name in ("threshold", "final_energy", "rank", "target_modules")}
        decompose(model, config.form, **how)
    return config.decompose
