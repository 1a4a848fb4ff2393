"""Windows of Python text for the built-in language model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoTokenizer

from weft import builtin


def windows(split: str, rows: int, length: int, seed: int) -> Tensor:
    """Token ids (rows × length) from random places of the library's own modules."""
    tokenizer = AutoTokenizer.from_pretrained(builtin.model_path("pycode"))
    text = "\n".join(row["text"] for row in builtin.texts("stdlib", split))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.randint(len(ids) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + length] for start in starts.tolist()])
