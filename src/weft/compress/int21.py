"""INT2.1: codes of two bits that rest, and factors of low rank that learn to make up for them from the whole model.

Yuji Chai, John Gkountouras, Glenn G. Ko, David Brooks, Gu-Yeon Wei, "INT2.1: Towards Fine-Tunable Quantized Large
Language Models with Error Correction through Low-Rank Adaptation", arXiv 2306.08162.

    y = Wq·x + c·B·(A·x) + b      Wq = (Q − z)·s, codes Q of `bits` bits, a step s and a zero z for `group_size` inputs;
                                  A: r × in, B: out × r, with r = `rank` and c = `scale`
    loss = KL(softmax(t) ‖ softmax(y)) over the vocabulary, a mean over tokens; t: the whole model's logits, y: ours

Training moves A and B of all layers together, and nothing else: later factors correct what earlier codes did. No label
is read, only text; the loss is of the outputs (`loss`: kl, cross_entropy with the teacher's probabilities, which has
the same gradients, or mse of the logits), computed in float32, at temperature 1. Which of these the paper takes, its
rate and its data are not known here; the recipe is weft's.

The start has B = 0: it is the quantised model, whatever A, which is drawn by `seed`. `start="svd"` has for B·A the
nearest product to W − Wq instead. `quantiser="gptq"` lets columns make up for what others lost on calibration
data, whose second moment is raised by `damping` of its mean; "nearest" rounds each weight alone, and needs none. Grids
are asymmetric, hold 0, and reach a group's least and largest weight.

A layer stores bits·out·in bits of codes, r·(in + out) numbers of the model's, and 16 + bits bits a group. The 2.1 bits
of the paper's name are those of LLaMA-7B at rank 16, without the groups: 0.099 bits a weight for the factors. Groups of
128 add 0.14, of 32 0.56; narrow layers pay more for a rank. So `bits`, `group_size` and `rank` say what is kept, and
`keep` is a bound: where it is less than that, ranks are smaller, down to 1, and where it is more, the rest is not used.

A pass writes a tile of Wq out, multiplies by it and frees it, and so does the backward pass, anew. What training holds
are codes and activations, and A and B with their gradients and moments; while errors are corrected, the teacher as
well. The same holds of a task that is learnt afterwards, with `weft adapt` or HF's Trainer on A and B.

A and B cannot be merged into the codes. `--dense` and `to_dense` write Wq + c·B·A out as a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from weft.algebra.quantise import decode, gptq, nearest
from weft.algebra.random import generator
from weft.algebra.svd import svd_operations
from weft.compress._allocate import Menus, Sizes, allocate
from weft.compress._calibration import Statistics
from weft.compress._config import CompressConfig
from weft.compress._distil import Objective, Seen, apart
from weft.compress._factoriser import Factoriser, Tensors, moment
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.linear.quantised_plus_low_rank import QuantisedPlusLowRank, check_grid, coded_bits, nearest_factors
from weft.registry import Card

CARD = Card(
    title="INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank "
    "Adaptation",
    arxiv="2306.08162",
    year=2023,
    summary="codes of 2 to 8 bits, and low-rank factors trained until the outputs are the whole model's again",
    knob="keep",
    needs=("data",),
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.05, "lr_scheduler_type": "cosine"},
    limitations="Its training holds the whole model beside it. The factors cannot be merged into the codes; beside "
    "narrow layers they take more bits than the codes.",
    reasons={
        "fixed_point": "bits, group_size and rank say what is kept of a layer: more it does not store, and less only "
        "by smaller ranks",
        "non_monotone": "ranks are there to be trained, and before that B = 0 leaves the same whatever the rank",
    },
)


@dataclass
class Int21Config(CompressConfig):
    """Options of INT2.1."""

    allocate: Literal["uniform", "block_influence"] = field(  # type: ignore[assignment]
        default="uniform", metadata={"help": "who gets how much: the same share everywhere, or by a block's influence"}
    )
    bits: int = field(default=2, metadata={"help": "of a code: 2, 3, 4 or 8"})
    group_size: int = field(default=128, metadata={"help": "weights of a row that share a grid"})
    rank: int = field(default=16, metadata={"help": "r, of the factors, at most; 0 leaves the codes alone"})
    scale: float = field(default=1.0, metadata={"help": "c, the factor on B·A (LoRA's alpha/r)"})
    quantiser: Literal["gptq", "nearest"] = field(
        default="gptq", metadata={"help": "columns make up for one another on calibration data, or each weight alone"}
    )
    damping: float = field(
        default=0.01, metadata={"help": "gptq: share of the inputs' mean square that is added to each one's"}
    )
    start: Literal["zero", "svd"] = field(
        default="zero", metadata={"help": "of B·A: nothing (A random), or the nearest to what quantising lost"}
    )
    seed: int = field(default=0, metadata={"help": "draws A"})
    loss: Literal["kl", "cross_entropy", "mse"] = field(
        default="kl", metadata={"help": "what is learnt by: the teacher's probabilities (kl, cross_entropy) or logits"}
    )

    def validate(self) -> None:
        super().validate()
        if self.allocate not in ("uniform", "block_influence"):
            raise UsageError(
                f"allocate={self.allocate!r} needs an error or a rank of each size that says what the size is worth, "
                "which training decides here: use uniform or block_influence"
            )
        check_grid(self.bits, self.group_size)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise UsageError(f"rank={self.rank!r} must be a whole number of at least 0")
        if not 0 < self.scale < math.inf:
            raise UsageError(f"scale={self.scale!r} must be a number above 0")
        if not 0 < self.damping < math.inf:
            raise UsageError(f"damping={self.damping!r} must be a number above 0")
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r}: one of {', '.join(known)}")


_WORDS = {"quantiser": ("gptq", "nearest"), "start": ("zero", "svd"), "loss": ("kl", "cross_entropy", "mse")}


class Int21Factoriser(Factoriser[Int21Config]):
    """Codes, and B·A beside them; a size is a rank."""

    kind = "quantised_plus_low_rank"

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("input",) if self.config.quantiser == "gptq" else ()

    def allocate(self, menus: Menus) -> Sizes:
        # the menus are without what costs more than the dense layer; the guard would also leave layers dense to use
        # up what the largest rank leaves
        return allocate(self.config.allocate, menus, self.config.keep, guard=False)

    def sizes(self, layer: Layer) -> Sequence[int]:
        most = min(self.config.rank, layer.out, layer.in_)
        ranks = range(min(1, most), most + 1)
        return [r for r in ranks if self.bits(layer, r) < layer.bits] if self.config.guard else ranks

    def bits(self, layer: Layer, size: int) -> int:
        coded = coded_bits(layer.out, layer.in_, self.config.bits, self.config.group_size)
        return coded + size * (layer.out + layer.in_) * layer.weight.element_size() * 8

    def operations(self, layer: Layer) -> tuple[float, float] | None:
        if not len(self.sizes(layer)):
            return 0.0, 0.0
        products, eigen = 0.0, 0.0
        if self.config.start == "svd":
            products, eigen = svd_operations(layer.out, layer.in_, self.sizes(layer)[-1])
        if self.config.quantiser == "gptq":  # two roots and an inverse of the moment, and errors passed on
            products += 4 / 3 * layer.in_**3 + layer.out * layer.in_**2
        return products, eigen

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None = None) -> Tensors:
        w, bits, group = layer.wide, self.config.bits, self.config.group_size
        rank = self.sizes(layer)[-1]
        try:
            if self.config.quantiser == "gptq":
                h = moment(statistics.input, 0.0)
                coded = gptq(w, h, bits, group, self.config.damping)
            else:
                h = None
                coded = nearest(w, bits, group)
        except ValueError as error:
            raise UsageError(f"{layer.name}: {error}") from error
        lost = w - decode(*coded, group, w.dtype)
        if self.config.start == "svd":
            up, down = nearest_factors(lost, rank)
        else:
            up, down = lost.new_zeros(layer.out, rank), self._drawn(layer, rank).to(w)
        left = remaining(lost, up, down, h) / weighted(w, h).sum().clamp(min=torch.finfo(torch.float64).tiny)
        found = dict(zip(("codes", "step", "zero"), coded))
        return {**found, "up": up / self.config.scale, "down": down, "errors": left[list(self.sizes(layer))]}

    def _drawn(self, layer: Layer, rank: int) -> Tensor:
        """A as LoRA's: uniform within ±1/√in."""
        uniform = torch.rand(rank, layer.in_, generator=generator("int21", self.config.seed, layer.name))
        return (2 * uniform - 1) / math.sqrt(layer.in_)

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        return QuantisedPlusLowRank.from_parts(
            (tensors["codes"], tensors["step"], tensors["zero"]),
            tensors["up"][:, :size],
            tensors["down"][:size],
            layer.bias,
            bits=self.config.bits,
            group_size=self.config.group_size,
            scale=self.config.scale,
            dtype=layer.weight.dtype,
        )


def weighted(w: Tensor, h: Tensor | None) -> Tensor:
    """Of each row w_i of a matrix (n × k): w_i·H·w_iᵀ, in float64; H is the identity where there is none."""
    w = w.double()
    return (w * (w if h is None else w @ h.double())).sum(1)


def remaining(lost: Tensor, up: Tensor, down: Tensor, h: Tensor | None) -> Tensor:
    """tr(E·H·Eᵀ) (r + 1) of E, what was lost, less the first 0, 1, … r products of a column of up and a row of down.

    up and down are a truncated SVD of it, or up is zero: E·downᵀ = up·diag(|down_j|²), and what one product takes from
    the trace is then |up_j|²·down_j·H·down_jᵀ.
    """
    taken = up.double().square().sum(0) * weighted(down, h)
    return weighted(lost, h).sum() - torch.cat([taken.new_zeros(1), taken]).cumsum(0)


class Int21Objective(Objective[Int21Config]):
    """How far the outputs are from the teacher's. A and B are trained, and the task's loss is not looked at."""

    task_weight = 0.0

    def __init__(self, config: Int21Config, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, student, teacher)
        factors = [
            factor.weight
            for layer in student.modules()
            if isinstance(layer, QuantisedPlusLowRank)
            for factor in (layer.up, layer.down)
        ]
        if not sum(t.numel() for t in factors):
            raise UsageError("int21 trains factors beside codes, and the student has none: compress with rank above 0")
        student.requires_grad_(False)
        for t in factors:
            t.requires_grad_(True)

    def terms(self, student: Seen, teacher: Seen) -> list[Tensor]:
        return [apart(student.logits, teacher.logits, self.config.loss)]
