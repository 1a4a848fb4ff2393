"""Linformer attention: keys and values of k sums over the sequence, in place of one for every token.

Sinong Wang, Belinda Li, Madian Khabsa, Han Fang, Hao Ma, "Linformer: Self-Attention with Linear Complexity", arXiv
2006.04768.

    Q = X·Wqᵀ + bq (L × d)                       X: L × d, L ≤ n
    K = (E·X)·Wkᵀ + bk,  V = (F·X)·Wvᵀ + bv      E, F: k × n, the first L columns of them;  K, V: k × d
    softmax(Q·Kᵀ / √h)·V of each head            L × k scores in place of L × L

E·(X·Wkᵀ) is (E·X)·Wkᵀ, so that the linear layers have k rows to multiply, too. E and F are trained, the same for all
heads, and one of each in every layer.

Padding is zero in X. A sum that no token has a part in, as E's row is zero for all that count, is masked; so what a
sequence gives does not depend on its padding, and k = n with E = F = I is the stock attention at every length. There is
no causal form: a sum holds tokens that come later.

Its layers keep their stock names, `query`, `key.linear` and `value.linear`; E and F are `key.along` and `value.along`.
BERT's self-attention, and that of the models whose attention is BERT's, eager or through torch's own (sdpa).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from weft.errors import UsageError
from weft.linear._narrow import Narrow

SERVED = ("eager", "sdpa")  # others take no mask of sums


class Projected(nn.Module):
    """A linear layer of k sums over a sequence: batch × L × in → batch × k × out.

    Its `weight` has no elements, so that no stock model loads what it knows nothing of.
    """

    weight: Tensor

    def __init__(self, linear: Any, k: int, n: int) -> None:
        super().__init__()
        made = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.register_buffer("weight", torch.empty(0, **made))
        self.along = nn.Parameter(torch.empty(k, n, **made))
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        return self.linear(torch.bmm(self.along[:, :length].expand(rows, -1, -1), x))  # three times as fast as E @ x


class LinformerAttention(Narrow):
    """A stock self-attention whose keys and values are those of `k` sums over `n` tokens at most."""

    word = "Linformer"
    linear = False
    stocks = {
        f"{name}SelfAttention": ()
        for name in (
            *("Bert", "Camembert", "Data2VecText", "Electra", "Ernie", "RoCBert", "Roberta", "RobertaPreLayerNorm"),
            *("XLMRoberta", "XLMRobertaXL", "Xmod"),
        )
    }
    config: Any
    attention_head_size: int
    scaling: float
    query: nn.Module
    key: Projected
    value: Projected
    dropout: nn.Dropout
    eager: Callable[..., tuple[Tensor, Tensor | None]]  # the stock module's own function
    k: int
    n: int

    @classmethod
    def of(cls, module: Any, *, k: int, n: int) -> Self:
        """A stock self-attention's form, with its layers; E and F have no values."""
        made = cls.like(module)
        if module.is_decoder or module.is_causal:
            raise UsageError(f"a causal {type(module).__name__} has no {cls.kind} form: its sums hold later tokens")
        if not 1 <= k <= n:
            raise UsageError(f"k={k}: of n={n} tokens there are 1 to {n} sums")
        made.k, made.n = k, n
        made.eager = sys.modules[made.stock.__module__].eager_attention_forward  # type: ignore[attr-defined]
        made.key, made.value = (Projected(layer, k, n).train(layer.training) for layer in (module.key, module.value))
        return made

    def options(self) -> dict[str, Any]:
        return {"k": self.k, "n": self.n}

    def check_dense(self, place: nn.Module) -> None:
        raise UsageError(f"{self.kind} attends to sums over the sequence, and a stock attention to tokens")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock module's: each token's values, and the weights (… × k) where they are known."""
        name = self.config._attn_implementation
        if name not in SERVED:
            raise UsageError(f"attn_implementation={name!r}: Linformer attention has {' and '.join(SERVED)}")
        if past_key_values is not None:
            raise UsageError("Linformer attention keeps no keys and values: it has no causal form")
        x, counts = hidden_states, tokens_that_count(attention_mask)
        if x.shape[1] > self.n:
            raise UsageError(f"a sequence of {x.shape[1]} tokens: this Linformer's projections are made for {self.n}")
        if counts is not None:
            x = x.masked_fill(~counts[..., None], 0)
        q, k, v = (
            each.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)  # batch × heads × L or k × h
            for each in (self.query(hidden_states), self.key(x), self.value(x))
        )
        out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)(
            self,
            q,
            k,
            v,
            self._mask(x.shape[1], counts, None if name == "sdpa" else q.dtype),
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return out.flatten(2), weights

    def _mask(self, length: int, counts: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """Which sums hold a token that counts, batch or 1 × 1 × 1 × k: bools, or what is added to scores of a dtype."""
        parts = self.key.along.detach()[:, :length] != 0  # k × L
        some = parts.any(1)[None] if counts is None else counts.float() @ parts.mT.float() > 0
        mask = some[:, None, None]
        return mask if dtype is None else (~mask).to(dtype) * torch.finfo(dtype).min


def tokens_that_count(mask: Tensor | None) -> Tensor | None:
    """Of a stock attention's mask, batch × 1 × L × L, a bool or what is added to scores: batch × L; None is all.

    Raises UsageError where it is another one for another query.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or bool((mask != mask[:, :, :1]).any()):
        raise UsageError("a Linformer's keys are sums over the sequence: its attention_mask can tell padding, no more")
    row = mask[:, 0, 0]
    return row if row.dtype == torch.bool else row == 0
