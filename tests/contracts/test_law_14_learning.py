"""Law 14. Everything learns: soon each row, column and gate has had a gradient, and nothing frozen ever has."""

from __future__ import annotations

import harness
import pytest
import specimens
import torch
from torch import Tensor, nn

import weft

CELLS = [specimens.SMALL, specimens.BY_NAME["Linear"], specimens.BY_NAME["fused qkv, Conv1D"]]


def open_entries(model: nn.Module) -> dict[int, Tensor]:
    """Where this step may move a parameter, for those that a method holds in part."""
    return {id(p): s != 0 for c in harness.controllers(model) for p, s in c.update_scales().items()}


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_every_group_of_elements_has_a_gradient_within_the_warm_steps(slug, cell, tmp_path):
    card = weft.card(slug)
    assert card.warm_steps <= 2 or "warm_steps" in card.reasons
    model = harness.attach(slug, cell)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    parameters = harness.trainable(model)
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    able = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    model.train()
    for i in range(card.warm_steps):
        model(**specimens.batch(i, 8)).loss.backward()
        may = open_entries(model)
        for name, p in parameters.items():
            able[name] |= may.get(id(p), torch.ones_like(p, dtype=torch.bool))
            if p.grad is not None:
                moved[name] |= p.grad != 0
        optimizer.step()
        optimizer.zero_grad()
    for name, mask in moved.items():
        for dim in range(mask.dim()):
            others = [d for d in range(mask.dim()) if d != dim]
            had = mask.any(dim=others) if others else mask  # by row, by column; a vector by element
            can = able[name].any(dim=others) if others else able[name]
            assert (had | ~can).all(), f"{name}: {int((~had & can).sum())} of {len(can)} along dimension {dim}"


def test_nothing_frozen_ever_has_a_gradient(slug, tmp_path):
    model = harness.attach(slug, specimens.BY_NAME["Linear"], short=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    held = {f"{i}.{n}": b for i, d in enumerate(harness.deltas(model)) for n, b in d.named_buffers()}
    factors = {n: b.clone() for n, b in held.items() if b.is_floating_point() and b.dim() == 2}
    model.train()
    for i in range(20):
        model(**specimens.batch(i, 4)).loss.backward()
        closed = {key: ~may for key, may in open_entries(model).items()}
        for name, p in model.named_parameters():
            if name in frozen:
                assert not p.requires_grad and p.grad is None, name
            elif p.grad is not None and id(p) in closed:
                assert not (p.grad[closed[id(p)].expand_as(p)] != 0).any(), f"{name}: a closed entry has a gradient"
        assert not any(b.requires_grad or b.grad is not None for b in held.values())
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(t, now[n]) for n, t in frozen.items())
    assert all(torch.equal(t, held[n]) for n, t in factors.items())
