"""A classifier that learned from a teacher, who has moved since: the problem of claims about frozen directions of W."""

import torch
from contest import Problem, Split, accuracy, pretrained
from torch import nn

INPUTS, HIDDEN, CLASSES = 32, 128, 10
LAYERS = ["0", "2", "4"]
ROWS, STEPS, BATCH = 2000, 200, 64
PROBLEM = (
    f"An MLP {INPUTS}-{HIDDEN}-{HIDDEN}-{CLASSES} has learned the labels of a random teacher of its shape; then the "
    "teacher's weights move by noise of half their deviation, and the MLP follows on "
    f"{ROWS} labels, {STEPS} steps of {BATCH}"
)


def classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CLASSES)
    )


def moved_teacher() -> Problem:
    """A pre-trained model and its new task; random numbers come from torch's seed. The score is the accuracy."""
    teacher = classifier()
    weights = [p for p in teacher.parameters() if p.dim() == 2]
    with torch.no_grad():
        for p in weights:
            p *= 2.5  # else the labels are nearly linear in the inputs
    data = _labelled(teacher, 20_000)
    base = pretrained(classifier(), nn.functional.cross_entropy, data, rate=3e-3, steps=1000, batch_size=128)
    with torch.no_grad():
        for p in weights:
            p += 0.5 * p.std() * torch.randn_like(p)
    return Problem(
        base,
        _labelled(teacher, ROWS),
        _labelled(teacher, 2000),
        _labelled(teacher, 8000),
        loss=nn.functional.cross_entropy,
        score=accuracy,
    )


@torch.no_grad()
def _labelled(teacher: nn.Module, rows: int) -> Split:
    x = torch.randn(rows, INPUTS)
    return x, teacher(x).argmax(1)
