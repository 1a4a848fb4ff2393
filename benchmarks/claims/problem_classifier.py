"""A classifier that learned from a teacher, who has moved since: the problem of claims about frozen directions of W."""

import torch
from contest import Problem, Split
from torch import Tensor, nn

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


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


def moved_teacher() -> Problem:
    """A pre-trained model and its new task; random numbers come from torch's seed. The score is the accuracy."""
    teacher = classifier()
    weights = [p for p in teacher.parameters() if p.dim() == 2]
    with torch.no_grad():
        for p in weights:
            p *= 2.5  # else the labels are nearly linear in the inputs
    base = _pretrained(*_labelled(teacher, 20_000))
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


def _pretrained(x: Tensor, y: Tensor) -> nn.Module:
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=1000)
    for _ in range(1000):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        scheduler.step()
    return model
