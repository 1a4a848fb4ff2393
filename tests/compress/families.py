"""Small models of every family whose modules are known by name, and sequences with padding on the left."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import VOCABULARY

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 37}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, attention_bias=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=12)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=37, word_embed_proj_dim=32, dropout=0.0)
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def family_model(family, dtype=torch.float64):
    """A model whose biases, norms and scores are not what a fresh one has."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.3 if p.dim() == 1 else 0.15) * torch.randn_like(p))
    return model.to(dtype).eval()


def padded():
    """Sixteen sequences with padding on the left."""
    ids = torch.randint(3, VOCABULARY, (16, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(16):
        mask[row, : row % 5] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
