"""Tiny models with what trips compression: grouped queries, Conv1D, biases, prime widths, tied embeddings."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=20, n_layer=2, n_head=2, n_inner=23, **ends)
    model = GPT2LMHeadModel(config).to(dtype).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(std=0.3)
    return model


class Plain(nn.Module):
    """No transformers model at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(11, 17), nn.Linear(17, 13, bias=False)])
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.layers[1](torch.tanh(self.layers[0](x)))
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


class Shop(nn.Module):
    """Words about a picture, and the picture: what is no linear layer beside what is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, 12, padding_idx=0)
        self.picture = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.layers = nn.ModuleList([nn.Linear(22, 17), nn.Linear(17, 13)])
        self.double()

    def forward(self, ids: Tensor, image: Tensor, labels: Tensor) -> SimpleNamespace:
        seen = torch.cat([self.words(ids).mean(1), torch.tanh(self.picture(image)).mean((2, 3))], dim=1)
        logits = self.layers[1](torch.tanh(self.layers[0](seen)))
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def tokens(rows: int = 24, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(model: nn.Module, size: int = 8) -> list[dict[str, Tensor]]:
    """Calibration data that the model takes, enough for every second moment to have full rank."""
    if isinstance(model, Plain):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(160, 11, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 13, (160,), generator=generator)
        return [{"x": rows, "labels": wanted} for rows, wanted in zip(x.split(size), labels.split(size))]
    if isinstance(model, Shop):
        generator = torch.Generator().manual_seed(1)
        ids, labels = tokens(96, 5), torch.randint(0, 13, (96,), generator=generator)
        image = torch.randn(96, 3, 7, 6, generator=generator, dtype=torch.float64)
        parts = zip(ids.split(size), image.split(size), labels.split(size))
        return [{"ids": i, "image": x, "labels": wanted} for i, x, wanted in parts]
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[::3, 6:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(size), mask.split(size))]


MODELS = {"llama": llama, "gpt2": gpt2, "plain": Plain, "shop": Shop}
