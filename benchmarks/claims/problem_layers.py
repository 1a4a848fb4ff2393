"""Six layers in a row of which only some must move."""

from __future__ import annotations

import torch
from contest import Problem, Split
from torch import Tensor, nn

WIDTH = 24
LAYERS = 6
NOISE = 0.05  # variance of the labels' noise, in parts of the error without an adapter
NAMES = [f"layers.{i}" for i in range(LAYERS)]


class Network(nn.Module):
    """Residual layers of one width: x + tanh(W·x), one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def some_layers_move(count: int, rank: int, rows: int) -> tuple[Problem, list[int]]:
    """`regression` from a network onto itself with `count` layers moved by a rank-`rank` update, and which those are.

    The update's singular values are 1. Draws from the global stream.
    """
    base, wanted = Network(), Network()
    wanted.load_state_dict(base.state_dict())
    moved = sorted(torch.randperm(LAYERS)[:count].tolist())
    with torch.no_grad():
        for i in moved:
            u, v = (torch.linalg.qr(torch.randn(WIDTH, rank)).Q for _ in range(2))
            wanted.layers[i].weight += u @ v.mT
    return regression(base, wanted, rows), moved


@torch.no_grad()
def regression(base: nn.Module, wanted: nn.Module, rows: int) -> Problem:
    """From `base` onto `wanted`, both WIDTH wide, on `rows` rows of normal inputs.

    Losses and scores are relative to the base without an adapter, whose error is 1; training and validation labels are
    noisy, those of the test are not. Draws from the global stream.
    """
    x = torch.randn(4096, WIDTH)
    unit = (wanted(x) - base(x)).square().mean()

    def split(rows: int, noise: float) -> Split:
        x = torch.randn(rows, WIDTH)
        y = wanted(x)
        return x, y + (noise * unit).sqrt() * torch.randn_like(y)

    def loss(found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).square().mean() / unit

    return Problem(base, split(rows, NOISE), split(512, NOISE), split(2048, 0.0), loss)
