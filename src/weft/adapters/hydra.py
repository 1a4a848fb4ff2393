"""Hydra: a parallel low-rank branch on the layer's input and a sequential one on its output, both linear.

Sanghyeon Kim, Hyunmo Yang, Younghyun Kim, Youngjoon Hong and Eunbyung Park, "Hydra: Multi-head Low-rank Adaptation for
Parameter Efficient Fine-tuning", 2023, arXiv 2309.06922.

    y = x·Wᵀ + b + s·(x·A_pᵀ + a_p)·B_pᵀ + s·(h₀·A_sᵀ + a_s)·B_sᵀ + s·c
        parallel      A_p: r_p × in,  B_p: out × r_p
        sequential    A_s: r_s × out, B_s: out × r_s      h₀ = x·Wᵀ + b, or x·Wᵀ without base_bias
        a_p: r_p,  a_s: r_s,  c: out                      only with branch_bias

    ΔW = s·[B_p B_s]·[A_p ; A_s·W]                        of rank up to r_p + r_s
    Δb = s·(B_p·a_p + B_s·(A_s·b + a_s) + c)              A_s·b only with base_bias

The up-projections and the biases are zero, so ΔW = 0 at the start. W and b are the original ones, whatever else is
active or merged. Dropout acts between the down- and the up-projections.

The bias that is part of h₀ moves by s·B_s·A_s·b, which many re-implementations forget; in a model without biases there
is no such term. Merging is exact, and the exported LoRA has biases (PEFT's lora_bias, which vLLM does not read);
`base_bias=False` keeps the bias out of the branch, so that ΔW is all that moves. `branch_bias=True` needs a bias in the
module to merge. Both branches' output biases enter as their sum: one c is trained in place of two.

The sequential branch is computed as x·(A_s·W)ᵀ, with A_s·W made anew in every forward, and not from the layer's result:
that holds other adapters already, and h₀ (tokens × out) would be kept for the backward pass. Multiplications of a
training step over n tokens:
    as x·(A_s·W)ᵀ    3·n·(r_p + r_s)·(in + out) + 2·r_s·in·out        those of LoRA, and A_s·W with its gradient
    through h₀       3·n·(r_p·(in + out) + 2·r_s·out)
For in = out = 1024, r_p = r_s and n = 4096 the first is 4 % above the second, which is LoRA's of rank r_p + r_s there.
Token by token A_s·W costs more than the layer itself: merge before generating.

A rank costs in + out trained numbers in the parallel branch and 2·out in the sequential one, whose ΔW stays within the
row space of W. At equal numbers a LoRA has the larger rank unless in > out, as in an MLP's second layer, which is where
the authors put it (target_modules=["down_proj"]), with the attention's output projection for ViT.

Query, key and value in one weight have branches of their own (`split_qkv`), or the sequential one would mix them. The
groups of a convolution cannot see one another: there ΔW is as above, with W the out × (in / groups · kernel) matrix,
and the branch sees what all rows of W would make of the group's own inputs. Of experts no bias is seen.

`init` draws the down-projections: kaiming (uniform, a = √5; the authors' choice for RoBERTa), xavier (uniform; for ViT)
or normal (standard deviation 0.02; for CLIP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import LowRankDelta, Site
from weft.adapters._kinds import Conv
from weft.adapters._quantised import times
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
    arxiv="2309.06922",
    year=2023,
    summary="a low-rank branch on the layer's input and another on its output, which re-mixes pre-trained features",
    recipe={"learning_rate": 8e-4, "weight_decay": 0.2, "warmup_ratio": 0.06},
    limitations=(
        "Every forward multiplies A_s by W: merge before generating token by token. Where a module has a bias it moves "
        "too, and the exported LoRA needs PEFT's lora_bias: for vLLM merge, or train with base_bias=False."
    ),
)


@dataclass
class HydraConfig(AdapterConfig):
    """Options of Hydra."""

    r: int = field(default=4, metadata={"help": "rank of each branch"})
    r_p: int | None = field(default=None, metadata={"help": "rank of the parallel branch, where not r; 0: none"})
    r_s: int | None = field(default=None, metadata={"help": "rank of the sequential branch, where not r; 0: none"})
    scale: float = field(default=1.0, metadata={"help": "s, the factor of both branches"})
    base_bias: bool = field(
        default=True, metadata={"help": "let the module's bias pass through the sequential branch, as it is in h₀"}
    )
    branch_bias: bool = field(default=False, metadata={"help": "train biases in the branches"})
    dropout: float = field(default=0.0, metadata={"help": "dropout between down- and up-projections"})
    init: Literal["kaiming", "xavier", "normal"] = field(
        default="kaiming", metadata={"help": "draw of the down-projections: kaiming, xavier or normal"}
    )
    split_qkv: bool = field(
        default=True, metadata={"help": "give query, key and value of a fused projection branches of their own"}
    )

    def validate(self) -> None:
        super().validate()
        if min(self.ranks()) < 0 or not any(self.ranks()):
            raise UsageError(f"r_p={self.r_p!r} and r_s={self.r_s!r}: ranks are 0 or more, and not both 0")
        if self.init not in INITS:
            raise UsageError(f"init={self.init!r}: use {', '.join(INITS)}")

    def ranks(self) -> tuple[int, int]:
        """r_p and r_s."""
        return self.r if self.r_p is None else self.r_p, self.r if self.r_s is None else self.r_s


INITS = {
    "kaiming": lambda a: nn.init.kaiming_uniform_(a, a=math.sqrt(5)),
    "xavier": nn.init.xavier_uniform_,
    "normal": lambda a: nn.init.normal_(a, std=0.02),
}


class HydraDelta(LowRankDelta):
    """ΔW = s·[B_p B_s]·[A_p ; A_s·W], and Δbias."""

    a: Tensor | None
    c: Tensor | None

    def __init__(self, config: HydraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r_p, self.r_s = config.ranks()
        site.check_rank(max(self.r_p, self.r_s))
        self.scale, self.unmerged, self.bias = config.scale, site.unmerged, site.bias
        self.sees_bias = config.base_bias and self.r_s > 0
        self.A_p = nn.Parameter(site.empty(self.r_p, site.in_))
        self.A_s = nn.Parameter(site.empty(self.r_s, site.out))
        self.B_p = nn.Parameter(torch.zeros_like(site.empty(site.out, self.r_p)))
        self.B_s = nn.Parameter(torch.zeros_like(site.empty(site.out, self.r_s)))
        for down in (self.A_p, self.A_s):
            if down.numel():
                INITS[config.init](down)
        biased = config.branch_bias
        self.a = nn.Parameter(torch.zeros_like(site.empty(self.r_p + self.r_s))) if biased else None
        self.c = nn.Parameter(torch.zeros_like(site.empty(site.out))) if biased else None

    def factors(self) -> tuple[Tensor, Tensor]:
        a = torch.cat([self.A_p, times(self.A_s, lambda: self.unmerged().mT)]) if self.r_s else self.A_p
        return self.scale * torch.cat([self.B_p, self.B_s], dim=1), a

    def hidden_bias(self) -> Tensor | None:
        """[a_p ; A_s·b + a_s], what the hidden features hold where x is zero; (r_p + r_s,)."""
        b = self.bias() if self.sees_bias else None
        if b is None:
            return self.a
        # not A_s @ b: the bits of a matrix times a vector depend on where in memory a file's tensors were put
        moved = nn.functional.pad((self.A_s * b.to(self.A_s.dtype)).sum(1), (self.r_p, 0))
        return moved if self.a is None else moved + self.a

    def bias_delta(self) -> Tensor | None:
        hidden = self.hidden_bias()
        if hidden is None:
            return None
        shift = torch.cat([self.B_p, self.B_s], dim=1) @ hidden
        return self.scale * (shift if self.c is None else shift + self.c)

    def up(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        hidden = self.hidden_bias()
        if hidden is not None:
            h = h + self._channels(hidden.repeat(self.kind.groups if isinstance(self.kind, Conv) else 1)).to(h.dtype)
        h = nn.functional.dropout(h, self.dropout, self.training)
        y = self.kind.up(h, b, onto)
        return y if self.c is None else y + self._channels(self.scale * self.c).to(y.dtype)

    def _channels(self, t: Tensor) -> Tensor:
        """One number a channel, in the shape that adds to the module's result."""
        return t.view(-1, *[1] * (-self.kind.channel_dim - 1))

    def _drop(self, x: Tensor) -> Tensor:
        return x  # dropout comes after the down-projections

    def count(self) -> int:
        weights = self.r_p * (self.in_ + self.out) + 2 * self.r_s * self.out
        return weights + (self.r_p + self.r_s + self.out if self.a is not None else 0)
