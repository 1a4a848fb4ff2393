"""Models that tests of single methods share, and the small training behind claims of rank allocation."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import weft

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> LlamaForCausalLM:
    """Two seeded layers with grouped queries and a prime width."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))


class SixLayers(nn.Module):
    """Six layers side by side, 16 → 12."""

    names = [f"layers.{i}" for i in range(6)]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 12, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(layer(x)) for layer in self.layers])


def fit_two_of_six(config: peft.PeftConfig, seed: int, steps: int) -> tuple[float, nn.Module]:
    """Train an adapter on six layers of which the second and the fifth must move by an update of rank 4.

    Returns the loss at the end and the model.
    """
    torch.manual_seed(seed)
    base, x = SixLayers(), torch.randn(256, 16)
    wanted = SixLayers()
    with torch.no_grad():
        for i, (moved, layer) in enumerate(zip(wanted.layers, base.layers)):
            u, v = torch.linalg.qr(torch.randn(12, 4)).Q, torch.linalg.qr(torch.randn(16, 4)).Q
            moved.weight.copy_(layer.weight + (u @ v.T if i in (1, 4) else 0))
        y = wanted(x) + 0.02 * torch.randn(6, 256, 12)
    model = peft.get_peft_model(base, config).train()
    args = TrainingArguments(output_dir="unused", max_steps=steps, report_to="none", use_cpu=True, learning_rate=1e-2)
    optimizer, scheduler = weft.optimizer_and_scheduler(model, args)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item(), model
