"""Convolutions of a trained network at 0.9, 0.8, 0.7 and 0.5 of their bits: mimicked features beside singular values.

    python benchmarks/compress_convolutions.py --data-dir DIR                   results/convolutions/resnet20.json
    python benchmarks/compress_convolutions.py --data-dir DIR --model resnet56  or resnet32, mobilefacenet

DIR holds models/resnet_cifar10 and cifar10_subset: 2000 training images calibrate, 1000 test images are classified. Or
models/mobilefacenet and orl_faces: 200 photographs of 20 people calibrate, and of 20 others each is named after the
nearest of their first ones. Beside each accuracy of features stands what it has more than singular values, with the
95 % bootstrap interval over images. Nothing is tuned afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import cifar
import faces
import torch
from adapters import processor
from claims.ledger import interval

import weft
from weft.files import write_text
from weft.run.compare import commit

KEEPS = (0.9, 0.8, 0.7, 0.5)
SHARES = ("uniform", "water")  # how keep is shared out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="resnet20", choices=[*cifar.DEPTH, "mobilefacenet"])
    args = parser.parse_args()
    of: Any = faces if args.model == "mobilefacenet" else cifar
    (calibration, _), (x, y) = of.splits(args.data_dir)
    calibration = calibration.split(250)
    model = of.trained(args.data_dir, args.model)
    dense, rows = of.right(model, x, y), []
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
                    found[basis] = of.right(small, x, y)
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
    write_text(out, json.dumps(document))


if __name__ == "__main__":
    main()
