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
    "small_dense_semi_sparse": {"block_size": 5, "atoms": 6, "nonzeros": 2},
    "rank_aware_sparse": {"rank": 5, "tau": 0.1, "prefill_ratio": 0.999},  # sequences as short as here all run sparse
    "low_rank_plus_sparse": {"rank": 2, "density": 0.25},
    "low_rank_plus_scattered": {"rank": 2, "density": 0.25},
    "low_rank_plus_channels": {"rank": 3, "channels": 2, "gamma": 0.7},
    "dense_plus_low_rank": {"rank": 3},
    "quantised_plus_low_rank": {"bits": 3, "group_size": 5, "rank": 3},
    "spectral": {"rank": 3},
    "spectral_plus_frozen": {"rank": 3},
    "factored_embedding": {"rank": 3, "mean": True},
    "low_rank_conv": {"rank": 3},
    "vertical_horizontal_conv": {"rank": 3},
    "decoupled_conv": {"rank": 3},
}
FULL: dict[str, Callable[..., dict[str, Any]]] = {
    "low_rank": lambda out, in_: {"rank": min(out, in_)},
    "dictionary": lambda out, in_: {"atoms": min(out, in_), "nonzeros": min(out, in_)},
    "block_semi_sparse": lambda out, in_: {"block_out": out, "block_in": in_, "kept": 4},
    "small_dense_semi_sparse": lambda out, in_: {"block_size": min(3, in_), "atoms": 4, "nonzeros": 3},
    "rank_aware_sparse": lambda out, in_: {"rank": min(out, in_), "tau": 0.1, "prefill_ratio": 0.999},
    "low_rank_plus_sparse": lambda out, in_: {"rank": min(out, in_), "density": 1 / in_},
    "low_rank_plus_scattered": lambda out, in_: {"rank": min(out, in_), "density": 1 / in_},
    "low_rank_plus_channels": lambda out, in_: {"rank": min(out, in_), "channels": 1, "gamma": 0.7},
    "dense_plus_low_rank": lambda out, in_: {"rank": min(out, in_)},
    "quantised_plus_low_rank": lambda out, in_: {"bits": 2, "group_size": 8, "rank": min(out, in_)},
    "spectral": lambda out, in_: {"rank": min(out, in_)},
    "spectral_plus_frozen": lambda out, in_: {"rank": min(out, in_)},
    "factored_embedding": lambda out, in_: {"rank": min(out, in_)},
    "low_rank_conv": lambda out, in_, kh, kw: {"rank": min(out, in_ * kh * kw)},
    "vertical_horizontal_conv": lambda out, in_, kh, kw: {"rank": min(in_ * kh, out * kw)},
    "decoupled_conv": lambda out, in_, kh, kw: {"rank": min(in_, kh * kw)},
}


def structure(
    layer: nn.Module, kind: str, options: dict[str, Any] | Callable[..., dict[str, Any]]
) -> Structured:
    """The layer of a kind that stands for a stock one; options may depend on the sides of its weight."""
    weight: Any = layer.weight.detach()
    weight = weight.mT if isinstance(layer, Conv1D) else weight
    options = options(*weight.shape) if callable(options) else options
    if isinstance(layer, nn.Embedding):
        return kinds()[kind].from_dense(weight, padding_idx=layer.padding_idx, **options)
    if isinstance(layer, nn.Conv2d):
        return kinds()[kind].from_dense(weight, layer.bias, like=layer, **options)
    return kinds()[kind].from_dense(weight, layer.bias, **options)


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


def resnet() -> nn.Module:
    """Convolutions of several sizes and strides, without biases."""
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic", num_labels=5, return_dict=True
        )
    )


# by name: what makes it, and the endings of what is compressed, the first of them such that nothing is lost
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama": (llama, ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")),
    "gpt2": (gpt2, ("c_attn", "c_proj")),
    "bert": (bert, ("query", "key", "dense", "classifier")),
    "bert_words": (bert, ("position_embeddings", "word_embeddings")),
    "resnet": (resnet, ("shortcut.convolution", "layer.1.convolution", "embedder.convolution")),
}
AUTO = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "bert_words": "AutoModelForSequenceClassification",
    "resnet": "AutoModelForImageClassification",
}
# what stands for a layer; what holds layers, and makes them narrow, is tried in tests/compress
KINDS = sorted(name for name, kind in kinds().items() if kind.opaque)
# Every kind in a model, and every model with a kind: what one brings with it is nothing to the other.
CASES = [
    ("llama", "low_rank"),
    ("gpt2", "dictionary"),
    ("llama", "block_semi_sparse"),
    ("bert", "small_dense_semi_sparse"),
    ("bert", "rank_aware_sparse"),
    ("gpt2", "low_rank_plus_sparse"),
    ("llama", "low_rank_plus_scattered"),
    ("bert", "low_rank_plus_channels"),
    ("llama", "spectral"),
    ("gpt2", "spectral_plus_frozen"),
    ("bert", "dense_plus_low_rank"),
    ("gpt2", "quantised_plus_low_rank"),
    ("bert_words", "factored_embedding"),
    ("resnet", "low_rank_conv"),
    ("resnet", "vertical_horizontal_conv"),
    ("resnet", "decoupled_conv"),
]
# One kind in all its models, for what has to do with both.
MORE_CASES = [*CASES, ("gpt2", "low_rank"), ("bert", "low_rank")]


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, dense, whose biases and norms are not what a fresh model has; buffers that are not stored stay wide."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for t in filter(torch.is_floating_point, model.state_dict(keep_vars=True).values()):
            t.data = t.data.to(dtype)
    return model.eval()


def compress(model: Any, endings: Iterable[str], kind: str, options: Any) -> Any:
    """Put structured layers of a kind in place of the layers with these names, and make the model save them."""
    for name, layer in list(model.named_modules()):
        if name.endswith(tuple(f".{e}" for e in endings)) or name in endings:
            model.set_submodule(name, structure(layer, kind, options))
    return attach_format(model).eval()


def compressed(name: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of each family with small structured layers, and others whose factors are as large as W or larger."""
    model, (first, *others) = make(name, dtype), MODELS[name][1]
    return compress(compress(model, others, kind, SMALL[kind]), [first], kind, FULL[kind])


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Two sequences, or two images."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16).to(model.dtype)}
    tokens = torch.arange(14).reshape(2, 7) * 5 % 31
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Outputs for two fixed inputs; of a base model its hidden states."""
    found = model(**inputs(model))
    return found["logits"] if "logits" in found else found["last_hidden_state"]


def structured(model: nn.Module) -> dict[str, Structured]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Structured)}
