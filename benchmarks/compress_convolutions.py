"""A trained ResNet's convolutions at 0.9, 0.7 and 0.5 of their bits: mimicked features beside cut singular values.

    python benchmarks/compress_convolutions.py --data-dir DIR                   results/convolutions/resnet20.json
    python benchmarks/compress_convolutions.py --data-dir DIR --model resnet56

DIR holds models/resnet_cifar10 and cifar10_subset. 2000 training images calibrate, 1000 test images are classified.
Beside each accuracy of features stands what it has more than singular values, with the 95 % bootstrap interval over
images. Nothing is tuned afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from adapters import processor
from claims.ledger import interval
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad, relu

import weft
from weft.run.compare import commit

KEEPS = (0.9, 0.7, 0.5)
SHARES = ("uniform", "water")  # how keep is shared out
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="resnet20", choices=[*DEPTH])
    args = parser.parse_args()
    data = np.load(args.data_dir / "cifar10_subset" / "cifar10_lossless_2k_1k.npz")
    calibration, x, y = images(data["x_train"]).split(250), images(data["x_test"]), torch.from_numpy(data["y_test"])
    model = ResNet(DEPTH[args.model])
    weights = load_file(args.data_dir / "models" / "resnet_cifar10" / f"{args.model}.safetensors")
    model.load_state_dict(weights, strict=False)  # counters of the batch norms are left out
    dense, rows = right(model.eval(), x, y), []
    print(f"{args.model}: {dense.mean():.1%} right\n\n| shared out | keep | weights | features | features − weights |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:  # a basis is found once, and cut to every share
        for how in SHARES:
            for keep in KEEPS:
                found = {}
                for basis in ("weights", "features"):
                    small, work = copy.deepcopy(model), Path(folder) / basis
                    options = {"basis": basis, "keep": keep, "allocate": how, "data": calibration, "work": work}
                    weft.compress(small, "atomic_feature_mimicking", **options)
                    found[basis] = right(small, x, y)
                apart = found["features"] - found["weights"]
                low, high = interval(apart)
                rows.append({"allocate": how, "keep": keep, **{b: float(r.mean()) for b, r in found.items()}})
                rows[-1] |= {"apart": float(apart.mean()), "interval": [low, high]}
                one, two = (f"{found[basis].mean():.1%}" for basis in ("weights", "features"))
                more = f"{apart.mean():+.1%} ({low:+.1%} to {high:+.1%})".replace("-", "−")
                print(f"| {how} | {keep} | {one} | {two} | {more} |", flush=True)
    document = {
        "command": f"python benchmarks/compress_convolutions.py --data-dir DIR --model {args.model}",
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
        **{"device": processor(), "commit": commit(), "dense": float(dense.mean()), "rows": rows},
    }
    out = Path(__file__).parent / "results" / "convolutions" / f"{args.model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".part")
    draft.write_text(json.dumps(document), encoding="utf-8")
    draft.replace(out)


if __name__ == "__main__":
    main()
