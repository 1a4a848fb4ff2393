"""Every factorised parametrisation on tiny models, with options of their size."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import weft

OPTIONS: dict[str, dict[str, Any]] = {  # of methods whose defaults are for large matrices
    "sltrain": {"rank": 3, "lora_alpha": 3.0, "sp_ratio": 0.2},
    "lowrank": {"rank": 3},
    "lost": {"rank": 3, "density": 0.25},
    "relora": {"rank": 3, "lora_alpha": 3.0, "relora_steps": 4, "restart_warmup": 2},
    "sst": {"rank": 3, "iteration_steps": 2, "iterations": 2, "restart_warmup": 2},
    "maestro": {"gp_lambda": 1e-4, "importance_threshold": 0.02, "shrink_steps": 3},
    "trp": {"period": 2, "nuclear_lambda": 1e-3},
}
# of methods that change gradients by design: the options by which they do not (their own tests have the change)
PLAIN: dict[str, dict[str, Any]] = {"sst": {"enhanced": False}}
DRAWN = ("relora", "sltrain", "sst")  # those that start at something random
METHODS = sorted(weft.cards("pretrain"))


def llama(seed: int = 0) -> nn.Module:
    """Grouped queries, tied embeddings, odd widths, random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=12, intermediate_size=19, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Conv1D and biases."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=32, n_embd=12, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def made(method: str, model: nn.Module | None = None, **more: Any) -> nn.Module:
    """A tiny model whose weights have the method's form."""
    return weft.reparametrise(llama() if model is None else model, method, **{**OPTIONS[method], **more})


def tokens(step: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(3, 31, (rows, 9), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, steps: range, *, lr: float = 0.01, micro: int = 1, rank: int = 0, world: int = 1) -> float:
    """Steps of AdamW; the last loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loss = 0.0
    for step in steps:
        optimizer.zero_grad()
        for rows in tokens(step).chunk(world)[rank].chunk(micro):
            part = model(input_ids=rows, labels=rows).loss / micro
            part.backward()
            loss = float(part) * micro
        optimizer.step()
    return loss
