"""A small model for each optimiser, with what makes its events fall within a few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
import weft.optim

SLUGS = sorted(weft.cards("optim"))
GAP = 3  # steps between refreshes, where a method has any
OPTIONS: dict[str, dict[str, Any]] = {"galore": {"rank": 4, "update_proj_gap": GAP, "scale": 1.0}}
LR = {"galore": 1e-2}


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """A grouped-query Llama with matrices that are tall, wide and square."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def build(slug: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, Any]:
    """A model that the method trains, and its optimiser."""
    model: nn.Module = llama(dtype)
    chosen = {"lr": LR.get(slug, 1e-3), **OPTIONS.get(slug, {}), **options}
    return model, weft.optim.optimizer(slug, model, **chosen)


def tokens(step: int, rows: int = 4) -> Tensor:
    return torch.randint(40, (rows, 8), generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int, parts: int = 1, rows: int = 4) -> float:
    """The gradients of one step's rows in so many micro-batches; the loss."""
    total = 0.0
    for piece in tokens(step, rows).chunk(parts):
        loss = model(input_ids=piece, labels=piece).loss / parts
        loss.backward()
        total += loss.item()
    return total


def train(model: nn.Module, optimizer: Any, steps: range, parts: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, parts)
        optimizer.step()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
