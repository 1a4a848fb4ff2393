"""A small model for each optimiser, with what makes its events fall within a few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
import weft.optim

GAP = 3  # steps between refreshes, where a method has any
_RANK = {"rank": 4, "update_proj_gap": GAP}
_OWLORE = {**_RANK, "activated_layers": 1, "sampling_interval": 2, "lr": 1e-2}
_CALIBRATION = torch.arange(40).view(4, 10)
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # what is tried: a method, and options by which its events fall early
    "galore": ("galore", {**_RANK, "scale": 1.0, "lr": 1e-2}),
    "galore-staggered": ("galore", {**_RANK, "scale": 1.0, "lr": 1e-2, "stagger": True, "proj_type": "full"}),
    "dct_projection": ("dct_projection", {**_RANK, "lr": 1e-2, "use_ef": True, "rotate_subspace": True}),
    "dct_projection-trion": (
        "dct_projection",
        {**_RANK, "form": "trion", "selection": "fft", "lr": 2e-2, "rest_lr": 1e-2},
    ),
    "lora_pro": ("lora_pro", {"lr": 2e-2}),
    "lora_pro-efficient": ("lora_pro", {"variant": "efficient", "lr": 2e-2}),
    "sara": ("sara", {"share": 0.7, "progressive_iter": GAP, "lr": 1e-2}),
    "owlore": ("owlore", {**_OWLORE, "outlier_multiple": 2.5, "batches": [{"input_ids": _CALIBRATION}]}),
}
CASES |= {slug: (slug, {}) for slug in weft.cards("optim") if slug not in CASES}


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


def build(case: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, Any]:
    """A model that the method trains, and its optimiser."""
    model = model_for(case, dtype)
    slug, chosen = CASES[case]
    return model, weft.optim.optimizer(slug, model, **{**chosen, **options})


def model_for(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The Llama, under a LoRA for the method that adjusts one."""
    model: nn.Module = llama(dtype)
    if CASES[case][0] != "lora_pro":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]


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
