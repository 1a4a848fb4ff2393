"""Small models with structured layers in them, made on the fly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.linear._structured import Structured, kinds
from weft.linear._transformers import attach_format

# options of every kind for a 24 × 18 matrix or so: a small layer, and one that loses nothing
SMALL: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 3},
    "dictionary": {"atoms": 9, "nonzeros": 4},
    "block_semi_sparse": {"block_out": 1, "block_in": 1},  # which divide every side
    "rank_aware_sparse": {"rank": 5, "tau": 0.1, "prefill_ratio": 0.999},  # sequences as short as here all run sparse
}
FULL: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "low_rank": lambda out, in_: {"rank": min(out, in_)},
    "dictionary": lambda out, in_: {"atoms": min(out, in_), "nonzeros": min(out, in_)},
    "block_semi_sparse": lambda out, in_: {"block_out": out, "block_in": in_, "kept": 4},
    "rank_aware_sparse": lambda out, in_: {"rank": min(out, in_), "tau": 0.1, "prefill_ratio": 0.999},
}


def llama() -> nn.Module:
    """Grouped queries, tied embeddings, odd widths."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=24,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2() -> nn.Module:
    """Conv1D, fused queries, keys and values, biases."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=31, n_positions=32, n_embd=18, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2
        )
    )


def bert() -> nn.Module:
    """A classifier with biases, whose head is compressed too."""
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=31,
            hidden_size=18,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=29,
            max_position_embeddings=32,
            num_labels=5,
        )
    )


MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama": (llama, ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")),
    "gpt2": (gpt2, ("c_attn", "c_proj")),
    "bert": (bert, ("query", "key", "dense", "classifier")),
}
AUTO = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, dense, whose biases and norms are not what a fresh model has; buffers stay wide, as loaded."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            p.data = (p + 0.1 * torch.randn_like(p)).to(dtype)
    return model.eval()


def compress(model: Any, endings: Iterable[str], kind: str, **options: Any) -> Any:
    """Put structured layers of a kind in place of the linear layers with these names, and make the model save them."""
    for name, layer in list(model.named_modules()):
        if name.endswith(tuple(f".{e}" for e in endings)) or name in endings:
            weight = layer.weight.detach()
            made = kinds()[kind].from_dense(weight.mT if isinstance(layer, Conv1D) else weight, layer.bias, **options)
            model.set_submodule(name, made)
    return attach_format(model).eval()


def compressed(name: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of each family with small structured layers, and square ones whose factors are as large as W."""
    model, (first, *others) = make(name, dtype), MODELS[name][1]
    width = model.config.hidden_size
    return compress(compress(model, others, kind, **SMALL[kind]), [first], kind, **FULL[kind](width, width))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Outputs for two fixed sequences; of a base model its hidden states."""
    tokens = torch.arange(14).reshape(2, 7) * 5 % 31
    found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return found["logits"] if "logits" in found else found["last_hidden_state"]


def structured(model: nn.Module) -> dict[str, Structured]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Structured)}
