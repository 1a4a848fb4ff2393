"""Law 4. A released adapter holds what was trained, what its card says cannot be derived, and nothing else."""

from __future__ import annotations

import re

import harness
import pytest
import specimens
import torch
from safetensors.torch import load_file

import weft

CELLS = [
    specimens.BY_NAME["Linear"],
    specimens.BY_NAME["fused qkv, Conv1D"],
    specimens.BY_NAME["3-D expert"],
    specimens.WIDE,
]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def released(slug, cell, tmp_path, **given):
    model = harness.randomise(harness.attach(slug, cell, **given))
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 2)
    model.save_pretrained(str(tmp_path))
    return model, load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_bytes_are_trained_or_listed(slug, cell, tmp_path):
    card = weft.card(slug)
    if cell.kind in card.refuses:
        return
    model, tensors = released(slug, cell, tmp_path)
    trained = sum(p.numel() * p.element_size() for p in {id(p): p for p in harness.trainable(model).values()}.values())
    listed = 0
    for delta in harness.deltas(model):
        kept = delta.state_dict()
        for name, b in delta.named_buffers():
            if name in kept and re.search(rf"\b{name}\b", card.reasons.get("file", "")):
                listed += b.numel() * b.element_size()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size <= 1.1 * (trained + listed) + 256 * len(tensors)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= size + 256 * len(tensors) + 1024


def test_only_the_methods_own_tensors_are_in_the_file(slug, tmp_path):
    """No base weight, no optimiser or controller state."""
    model, tensors = released(slug, specimens.BY_NAME["Linear"], tmp_path, short=True)
    known = {name for d in harness.deltas(model) for name in d.state_dict()}
    for key in tensors:
        assert f".weft_{slug}_delta." in key and key.rpartition(".")[2] in known, key


def test_indices_are_small_and_nothing_is_there_twice(slug, tmp_path):
    _, tensors = released(slug, specimens.BY_NAME["Linear"], tmp_path)
    for key, t in tensors.items():
        if not t.is_floating_point() and t.dim() > 0:
            low, high = int(t.min()), int(t.max())
            fits = next(d for d in INTEGERS if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)
            assert t.element_size() <= torch.empty(0, dtype=fits).element_size(), key
    large = [(k, t) for k, t in tensors.items() if t.numel() > 8]
    for i, (key, t) in enumerate(large):
        for other, u in large[:i]:
            assert t.shape != u.shape or not torch.equal(t, u), f"{key} and {other} are one tensor"
