"""A run that is cut at some step, and goes on from what was saved there."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

Run = tuple[Any, torch.optim.Optimizer]


def cut(build: Callable[[], Run], take: Callable[..., Any], steps: int, at: int) -> tuple[Run, Run]:
    """The run that went through and the one that went on at step `at`, whose models are the same bit for bit."""
    model, optimizer = build()
    file = io.BytesIO()
    for step in range(steps):
        if step == at:
            torch.save([model.state_dict(), optimizer.state_dict()], file)
        take(model, optimizer, step)
    again, other = build()
    file.seek(0)
    tensors, state = torch.load(file, weights_only=True)
    again.load_state_dict(tensors)
    other.load_state_dict(state)
    for step in range(at, steps):
        take(again, other, step)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    return (model, optimizer), (again, other)
