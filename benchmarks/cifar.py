"""CIFAR-10's residual networks, the weights that were trained for them, and the images they are tried on.

DIR holds models/resnet_cifar10 and cifar10_subset: 2000 training and 1000 test images, and as many that went through
JPEG.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad, relu

DEPTH = {"resnet20": 3, "resnet32": 5, "resnet56": 9}  # blocks a stage


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters, which gives new channels zeros."""

    def __init__(self, in_: int, out: int) -> None:
        super().__init__()
        self.stride, self.more = out // in_, (out - in_) // 2
        self.conv1 = nn.Conv2d(in_, out, 3, self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more)))


class ResNet(nn.Module):
    """Of CIFAR-10: 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(depth)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(depth - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(depth - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def images(x: np.ndarray) -> Tensor:
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(x) / 255 - mean) / deviation).movedim(-1, 1).contiguous()


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """1 for each image that is classified right, else 0."""
    found = torch.cat([model(part).argmax(1) for part in x.split(250)])
    return (found == y).double().numpy()


def trained(folder: Path, name: str) -> ResNet:
    """A network of DIR, in evaluation."""
    model = ResNet(DEPTH[name])
    weights = load_file(folder / "models" / "resnet_cifar10" / f"{name}.safetensors")
    model.load_state_dict(weights, strict=False)  # counters of the batch norms are left out
    return model.eval()


def splits(folder: Path, kind: str = "lossless") -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and classes of DIR, to train on and to test on; `kind` is lossless or jpeg."""
    data = np.load(folder / "cifar10_subset" / f"cifar10_{kind}_2k_1k.npz")
    train, test = ((images(data[f"x_{part}"]), torch.from_numpy(data[f"y_{part}"])) for part in ("train", "test"))
    return train, test
