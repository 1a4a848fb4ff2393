"""Tiny real models, built on the fly from a seed, one for every kind of weight that an adapter may meet.

Sides are odd or prime where the architecture lets them. Every model takes keyword tensors and returns an output with
`loss` and `logits`, so that one loop trains them all.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

VOCAB = 61
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def llama(**changes: Any) -> LlamaForCausalLM:
    """Grouped-query attention (4 heads, 2 shared), intermediate side 37, untied head."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **SPECIAL, **changes,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Conv1D everywhere, a fused c_attn with biases, sides 27 and 41."""
    settings = {
        "vocab_size": VOCAB, "n_embd": 27, "n_layer": 2, "n_head": 3, "n_inner": 41, "n_positions": 32,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SPECIAL, **changes,
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**settings))


def phi3() -> Phi3ForCausalLM:
    """A fused qkv_proj whose blocks differ in size (grouped-query attention)."""
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **SPECIAL,
        )  # fmt: skip
    )


def mixtral() -> MixtralForCausalLM:
    """Experts as experts × out × in."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=19, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False, **SPECIAL,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


def gpt_oss() -> GptOssForCausalLM:
    """Experts as experts × in × out (`is_transposed`)."""
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=19, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False, **SPECIAL,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return GptOssForCausalLM(config)


class Mlp(nn.Module):
    """Two linears of odd sides, one without a bias unless asked for, over mean-pooled embeddings."""

    def __init__(self, width: int = 24, hidden: int = 13, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.first = nn.Linear(width, hidden, bias=bias)
        self.second = nn.Linear(hidden, 7)

    def features(self, input_ids: Tensor) -> Tensor:
        return torch.tanh(self.first(self.embed(input_ids).mean(1)))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.second(self.features(input_ids))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels[:, -1] % 7), logits=logits)


class ConvNet(nn.Module):
    """Convolutions (strided, reflecting, plain, dilated, grouped) over an image of embeddings, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 15)  # every token is 3 channels of five pixels
        self.conv = nn.Conv2d(3, 10, (3, 2), stride=(2, 1), padding=1, padding_mode="reflect")
        self.plain = nn.Conv2d(10, 10, (1, 3), padding=(0, 1))
        self.grouped = nn.Conv2d(10, 15, 3, padding=2, dilation=2, groups=5, bias=False)
        self.head = nn.Linear(15, 7)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        image = self.embed(input_ids).unflatten(-1, (3, 5)).transpose(1, 2)  # batch × 3 × tokens × 5
        hidden = torch.tanh(self.grouped(torch.tanh(self.plain(torch.tanh(self.conv(image))))))
        logits = self.head(hidden.flatten(2).mean(-1))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels[:, -1] % 7), logits=logits)


@dataclass(frozen=True)
class Cell:
    """One column of the table of what works where: a model, and what to adapt in it."""

    name: str
    kind: str  # the name under which a card refuses it
    build: Callable[[], nn.Module]
    target: dict[str, Any] = field(default_factory=dict)

    @property
    def is_hf(self) -> bool:
        return isinstance(_model(self.build), PreTrainedModel)


def wide() -> Mlp:
    """Large enough that a factorisation gives other bits with another number of threads."""
    return Mlp(width=192, hidden=160)


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CELLS = [
    Cell("Linear", "Linear", llama, {"target_modules": "all-linear"}),
    Cell("Conv1D", "Conv1D", gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "split_qkv": False}),
    Cell("Conv2d", "Conv", ConvNet, {"target_modules": ["conv"]}),
    Cell("grouped Conv2d", "Conv", ConvNet, {"target_modules": ["grouped"]}),
    Cell("Embedding", "Embedding", Mlp, {"target_modules": ["embed"]}),
    Cell("3-D expert", "3-D expert", mixtral, EXPERTS),
    Cell("3-D expert, transposed", "3-D expert", gpt_oss, EXPERTS),
    Cell("fused qkv", "Linear", phi3, {"target_modules": ["qkv_proj"], "split_qkv": True}),
    Cell("fused qkv, Conv1D", "Conv1D", gpt2, {"target_modules": ["c_attn"], "split_qkv": True}),
]
BY_NAME = {cell.name: cell for cell in CELLS}
PLAIN_CONV = Cell("plain Conv2d", "Conv", ConvNet, {"target_modules": ["plain"]})
SMALL = Cell("Mlp", "Linear", Mlp, {"target_modules": ["first", "second"]})
WIDE = Cell("wide Mlp", "Linear", wide, {"target_modules": ["first", "second"]})


@functools.cache
def _model(build: Callable[[], nn.Module]) -> nn.Module:
    generator = torch.random.get_rng_state()
    torch.manual_seed(20)
    model = build()
    torch.random.set_rng_state(generator)
    with torch.no_grad():  # initial biases of zero would hide what is done to them
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(torch.linspace(-0.3, 0.4, p.numel()).reshape(p.shape))
    return model.eval()


def base(cell: Cell, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of the cell's model, the same weights every time, in eval mode, frozen as a base is."""
    return copy.deepcopy(_model(cell.build)).to(dtype)


def batch(seed: int = 0, rows: int = 4, length: int = 16) -> dict[str, Tensor]:
    """Token ids with labels; every token of the vocabulary appears where rows · length allows."""
    generator = torch.Generator().manual_seed(1000 + seed)
    count = rows * length
    ids = torch.cat([torch.randperm(VOCAB, generator=generator) for _ in range(-(-count // VOCAB))])[:count]
    ids = ids.reshape(rows, length)
    return {"input_ids": ids, "labels": ids.clone()}
