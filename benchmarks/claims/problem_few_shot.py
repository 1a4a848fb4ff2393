"""A classifier trained on ten classes, and a few rows of the same classes whose inputs have turned."""

import torch
from contest import Problem, accuracy
from torch import Tensor, nn

CLASSES, SIDE, TURNED = 10, 64, 32  # of the SIDE inputs' space, TURNED dimensions turn
SHOTS, SPREAD = 16, 1.0
FEW_SHOT = (
    f"{CLASSES} Gaussian classes in {SIDE} dimensions, of which {TURNED} turn after pre-training; {SHOTS} shots a class"
)


def few_shot(net: nn.Module, steps: int = 200) -> Problem:
    """`net` (SIDE inputs, CLASSES outputs) pre-trained in place, and the task after the turn; score: accuracy."""
    centres = 0.4 * torch.randn(CLASSES, SIDE)
    plane = torch.linalg.qr(torch.randn(SIDE, TURNED)).Q
    turn = torch.eye(SIDE) + plane @ (torch.linalg.qr(torch.randn(TURNED, TURNED)).Q - torch.eye(TURNED)) @ plane.mT

    def split(shots: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(CLASSES).repeat_interleave(shots)
        return centres[y] + SPREAD * torch.randn(len(y), SIDE), y

    def turned(shots: int) -> tuple[Tensor, Tensor]:
        x, y = split(shots)
        return x @ turn, y

    x, y = split(200)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return Problem(net, turned(SHOTS), turned(50), turned(200), nn.functional.cross_entropy, accuracy)
