"""MobileFaceNet, the weights that were trained for it, and the faces it is tried on.

DIR holds models/mobilefacenet and orl_faces: ten grey photographs each of 40 people, none of whom trained it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

# expansion, channels, repeats, stride of the first
STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class Unit(nn.Module):
    """A convolution, its norm and, unless it ends a block, PReLU."""

    def __init__(self, in_: int, out: int, kernel: tuple[int, int], stride: int, padding: int, groups: int, act: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_, out, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.prelu = nn.PReLU(out) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Wider, depthwise, narrower again; beside a shortcut where sizes agree."""

    def __init__(self, in_: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide, self.same = in_ * expansion, stride == 1 and in_ == out
        self.conv = nn.Sequential(
            nn.Conv2d(in_, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.PReLU(wide),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.PReLU(wide),
            nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


class MobileFaceNet(nn.Module):
    """112 × 96 to 128 features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Unit(3, 64, (3, 3), 2, 1, 1, True)
        self.dw_conv1 = Unit(64, 64, (3, 3), 1, 1, 64, True)
        made, width = [], 64
        for expansion, channels, repeats, stride in STAGES:
            for i in range(repeats):
                made.append(Bottleneck(width, channels, stride if i == 0 else 1, expansion))
                width = channels
        self.blocks = nn.Sequential(*made)
        self.conv2 = Unit(width, 512, (1, 1), 1, 0, 1, True)
        self.linear7 = Unit(512, 512, (7, 6), 1, 0, 512, False)
        self.linear1 = Unit(512, 128, (1, 1), 1, 0, 1, False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.dw_conv1(self.conv1(x))))
        return self.linear1(self.linear7(x)).flatten(1)


def trained(folder: Path, name: str = "mobilefacenet") -> MobileFaceNet:
    """The network of DIR, in evaluation."""
    model = MobileFaceNet()
    weights = load_file(folder / "models" / name / "mobilefacenet_112x96.safetensors")
    model.load_state_dict(weights, strict=False)  # counters of the batch norms are left out
    return model.eval()


def splits(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and people: of the first twenty, to calibrate on, and of the others, to test on."""
    data = np.load(folder / "orl_faces" / "orl_400.npz")
    order = np.lexsort((data["shot"], data["y"]))
    grey = pad((torch.from_numpy(data["x"][order]).float() - 127.5) / 128, (2, 2), value=-127.5 / 128)
    x, y = grey[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data["y"][order]).long()
    first = y < 20
    return (x[first], y[first]), (x[~first], y[~first])


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """1 for each photograph whose nearest among the first ones of all people is of its person, else 0."""
    found = torch.cat([torch.cat([model(part), model(part.flip(3))], 1) for part in x.split(100)])
    features = normalize(found, dim=1)
    first = torch.cat([torch.ones(1, dtype=torch.bool), y[1:] != y[:-1]])
    nearest = y[first][(features[~first] @ features[first].mT).argmax(1)]
    return (nearest == y[~first]).double().numpy()
