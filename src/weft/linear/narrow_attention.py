"""Narrow attention: the stock attention with heads of fewer coordinates, those of values apart from those of keys.

    q = Wq·x + bq (H heads × c),   k = Wk·x + bk (G heads × c),   v = Wv·x + bv (G heads × e)
    o = Wo·(softmax(q·kᵀ / √h)·v) + bo          h: the stock size of a head, c: `qk`, e: `v`

The cache of keys and values holds c + e numbers a head and token. Of the stock h coordinates that rotary positions turn
in pairs (i, i + h/2), c/2 pairs are left; `pairs` (G × c/2) says which, so that each is turned by its own angle. Heads
of queries follow the head of keys that they meet.

Where queries and keys have a norm of their own (Qwen3), its weights stay the stock h, and the mean square is taken over
h as if the missing coordinates were zero. That is what a stock module computes whose missing rows are zero.

In a stock module v may have a bias and o none (Qwen2). As softmax sums to one, Wo·bv is a bias of o, which is what
narrow heads have; zeros and a coordinate that no head used make a stock module of it again.

Llama's, Qwen2's, Qwen3's and OPT's attention, through transformers' attention functions: eager, sdpa, flash, flex.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from weft.errors import UsageError
from weft.linear._codes import smallest_int
from weft.linear._narrow import Narrow, filled, resized


class NarrowAttention(Narrow):
    """A stock attention with heads of `qk` and `v` coordinates."""

    # whether positions turn pairs of coordinates, and the name of the last layer
    stocks = {
        "LlamaAttention": (True, "o_proj"),
        "Qwen2Attention": (True, "o_proj"),
        "Qwen3Attention": (True, "o_proj"),
        "OPTAttention": (False, "out_proj"),
    }
    config: Any
    head_dim: int  # the stock h
    layer_idx: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    eager: Callable[..., tuple[Tensor, Tensor | None]]  # the stock module's own function
    qk: int
    v: int
    biases: tuple[bool, bool]  # whether the stock module's v and o have one
    pairs: Tensor | None  # G × qk/2; None where no pair is missing, or there are none

    @classmethod
    def of(cls, module: Any, *, qk: int | None = None, v: int | None = None) -> Self:
        """A stock or narrow attention with heads of other sizes; the layers of those that are given have no values."""
        made = cls.like(module)
        rotary, last = cls.stocks[made.stock.__name__]
        whole = made.head_dim
        heads, groups = (layer.out_features // getattr(module, "qk", whole) for layer in (module.q_proj, module.k_proj))
        if not hasattr(module, "qk"):
            made.qk, made.v = whole, whole
            made.biases = (module.v_proj.bias is not None, getattr(module, last).bias is not None)
            made.eager = sys.modules[made.stock.__module__].eager_attention_forward  # type: ignore[attr-defined]
            made.register_buffer("pairs", None)
        for name, size in (("qk", qk), ("v", v)):
            step = 2 if name == "qk" and rotary else 1
            if size is not None and (not step <= size <= whole or size % step):
                raise UsageError(f"{name}={size}: a head of {whole} has {step} to {whole}, in steps of {step}")
        if qk is not None:
            made.qk = qk
            made.q_proj = resized(module.q_proj, out=heads * qk)
            made.k_proj = resized(module.k_proj, out=groups * qk)
            kept = torch.empty(groups, qk // 2, dtype=smallest_int(whole // 2), device=module.q_proj.weight.device)
            made.register_buffer("pairs", kept if rotary and qk < whole else None)
        if v is not None:
            made.v = v
            values, out = module.v_proj, getattr(module, last)
            stays = values.bias is not None and v == whole
            made.v_proj = resized(values, out=groups * v, bias=stays)
            bias = out.bias is not None or (values.bias is not None and not stays)
            setattr(made, last, resized(out, in_=heads * v, bias=bias))
        return made

    def options(self) -> dict[str, Any]:
        return {"qk": self.qk, "v": self.v}

    @property
    def places(self) -> Tensor:
        """Which of the stock coordinates the heads of queries and keys have (G × qk)."""
        if self.pairs is not None:
            first = self.pairs.long()
            return torch.cat([first, first + self.head_dim // 2], dim=1)
        groups = self.k_proj.out_features // self.qk
        return torch.arange(self.qk, device=self.k_proj.weight.device).expand(groups, -1)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock module's: what attention adds to each token, and the weights where they are known."""
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, size)).transpose(1, 2)  # batch × heads × tokens × size
            for layer, size in ((self.q_proj, self.qk), (self.k_proj, self.qk), (self.v_proj, self.v))
        )
        if hasattr(self, "q_norm"):
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        if position_embeddings is not None:
            cos, sin = (self._angles(each) for each in position_embeddings)
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        name = self.config._attn_implementation
        if "flash" in name and self.v > self.qk:  # it takes values that are narrower than keys, and not wider ones
            q, k = (pad(each, (0, self.v - self.qk)) for each in (q, k))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )
        return getattr(self, self.stocks[self.stock.__name__][1])(out.flatten(2)), weights

    def restored(self, place: nn.Module) -> nn.Module:
        made, last, h = self.as_stock(), self.stocks[self.stock.__name__][1], self.head_dim
        if self.qk < h:
            for name in ("q_proj", "k_proj"):
                old = getattr(self, name)
                heads = old.out_features // self.qk
                places = self.places.repeat_interleave(heads // len(self.places), 0)
                rows = (places + h * torch.arange(heads, device=places.device)[:, None]).flatten()
                weight = old.weight.new_zeros(heads * h, old.in_features).index_copy(0, rows, old.weight)
                bias = None if old.bias is None else old.bias.new_zeros(heads * h).index_copy(0, rows, old.bias)
                setattr(made, name, filled(resized(old, out=heads * h), weight, bias))
        if self.v < h:
            values, out = self.v_proj, getattr(self, last)
            heads, groups = out.in_features // self.v, values.out_features // self.v
            rows = pad(values.weight.unflatten(0, (groups, self.v)), (0, 0, 0, h - self.v)).flatten(0, 1)
            columns = pad(out.weight.unflatten(1, (heads, self.v)), (0, h - self.v)).flatten(1)
            shift = rows.new_zeros(len(rows)) if self.biases[0] else None
            if shift is not None and not self.biases[1]:  # a coordinate that is always 1, for one head to read
                shift[self.v] = 1.0
                columns[:, self.v] = out.bias
            made.v_proj = filled(resized(values, out=groups * h, bias=self.biases[0]), rows, shift)
            setattr(made, last, filled(resized(out, in_=heads * h, bias=self.biases[1]), columns, out.bias))
        del made._buffers["pairs"], made.qk, made.v, made.biases, made.eager
        return made

    def _angles(self, table: Tensor) -> Tensor:
        """cos or sin (batch × tokens × h) of the pairs that are left: batch × G or 1 × tokens × qk/2."""
        half = table[..., : self.head_dim // 2]  # the other half is equal
        return half[:, None] if self.pairs is None else half[..., self.pairs.long()].transpose(1, 2)

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        """A stock norm of heads (batch × heads × tokens × qk) whose missing coordinates are zero."""
        if self.qk == self.head_dim:
            return norm(x)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.head_dim + norm.variance_epsilon)
        weight = norm.weight[self.places].repeat_interleave(x.shape[1] // len(self.places), 0)  # heads × qk
        return weight[:, None] * wide.to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (batch × heads × tokens × qk) turned by the angles of their group, pair by pair."""
    if cos.shape[1] > 1:
        cos, sin = (each.repeat_interleave(x.shape[1] // cos.shape[1], 1) for each in (cos, sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
