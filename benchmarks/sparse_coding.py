"""Time and error of `weft.algebra.sparse_coding` beside textbook loops, and of the layer made from it, in one run.

    python benchmarks/sparse_coding.py               the tables below; benchmarks/results/sparse_coding.json
    python benchmarks/sparse_coding.py --only race   or forward, or choices

race: one round of K-SVD, pursuit and sweep, from the same atoms for the same signals. The textbook pursuit fits the
atoms taken so far by least squares, signal by signal and atom by atom; the textbook sweep takes a singular value
decomposition for every atom. With scikit-learn, its pursuit among inner products (orthogonal_mp_gram) as well. Errors
are ‖Y − S·A‖², over the opponent's. Machines are noisy, so only ratios count.

forward: ways to multiply by codes, z = x·D before included, over the product x·Wᵀ of the dense layer that keep = 0.7
replaces. "layer" takes the sparse product or the tiles by the number of rows.

choices: what is left of the output of pycode's q_proj and down_proj at keep = 0.7, on its own kind of text, by the
start, the number of power iterations and the ratio k/s; beside it the low-rank optimum of as many bits.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapters import processor
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

import weft
import weft.builtin
from weft.algebra.gram import root, times_root
from weft.algebra.random import generator
from weft.algebra.sparse_coding import ksvd, omp, spread, starting_atoms, sweep
from weft.linear.dictionary import Dictionary, _Codes, _sparse
from weft.run.compare import commit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "algebra"))

import textbook_ksvd

RESULTS = Path(__file__).parent / "results" / "sparse_coding.json"


def least(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The least seconds of some runs, and what the last returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


# --- race -------------------------------------------------------------------------------------------------------------


def textbook_omp(y: Tensor, atoms: Tensor, s: int) -> Tensor:
    """S (n × k), a signal at a time."""
    codes = y.new_zeros(len(y), len(atoms))
    for signal, code in zip(y, codes):
        taken, amounts = textbook_ksvd.omp(signal, atoms, s)
        code[taken] = amounts
    return codes


def race(n: int, d: int, k: int, s: int) -> dict[str, Any]:
    y = torch.randn(n, d, generator=generator("y")) * torch.logspace(0, -1.5, d)
    atoms = starting_atoms(y, k, "data", generator("start"))
    pursuing, (index, values) = least(lambda: omp(atoms @ atoms.mT, y @ atoms.mT, s), 3)
    loop, codes = least(lambda: textbook_omp(y, atoms, s), 1)
    sweeping, (new, amounts) = least(lambda: sweep(y, atoms, index, values), 3)
    decomposing, (theirs, their_codes) = least(lambda: textbook_ksvd.sweep(y, atoms, codes), 1)

    def left(a: Tensor, c: Tensor) -> float:
        return float((y - c @ a).double().square().sum())

    ours = left(atoms, spread(index, values, k)), left(new, spread(index, amounts, k))
    other = left(atoms, codes), left(theirs, their_codes)
    row = {
        "opponent": "textbook loop",
        "wanted_ratio": 1 / 3,
        "pursuit": {"time_ratio": pursuing / loop, "error_ratio": ours[0] / other[0], "seconds": [pursuing, loop]},
        "sweep": {
            "time_ratio": sweeping / decomposing,
            "error_ratio": ours[1] / other[1],
            "seconds": [sweeping, decomposing],
        },
        "round": {"time_ratio": (pursuing + sweeping) / (loop + decomposing), "error_ratio": ours[1] / other[1]},
    }
    try:
        from sklearn.linear_model import orthogonal_mp_gram
    except ImportError:
        return row
    gram, products = (atoms @ atoms.mT).double().numpy(), (atoms @ y.mT).double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known, found = least(lambda: orthogonal_mp_gram(gram, products, n_nonzero_coefs=s), 1)
    error = ours[0] / left(atoms, torch.from_numpy(found.T).float())
    row["pursuit beside scikit-learn"] = {
        "time_ratio": pursuing / known,
        "error_ratio": error,
        "seconds": [pursuing, known],
    }
    return row


# --- forward ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(in_: int, out: int, k: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Ways to multiply → rows of x → time over that of the dense product."""
    s = k // 2
    places = torch.rand(out, k, generator=generator("places")).argsort(1)[:, :s].sort(1).values
    layer = Dictionary.from_codes(torch.randn(k, in_), places, torch.randn(out, s), dtype=dtype)
    w, d, v, short = torch.randn(out, in_).to(dtype), layer.atoms.weight, layer.values, places.int()

    def gather(z: Tensor) -> Tensor:
        return torch.cat([(z[:, i] * c).sum(2) for i, c in zip(places.split(64), v.split(64))], 1)

    def embedded(z: Tensor) -> Tensor:
        return embedding_bag(short, z.mT.contiguous(), per_sample_weights=v, mode="sum").mT

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": layer,
        "tiles": lambda x: _Codes.apply(linear(x, d), v, None, layer.places),
        "sparse": lambda x: _sparse(linear(x, d), v, None, layer.places),
        "gather": lambda x: gather(linear(x, d)),
        "embedding_bag": lambda x: embedded(linear(x, d)),
    }
    found: dict[str, dict[str, Any]] = {name: {"opponent": "dense", "wanted_ratio": None} for name in ways}
    for rows in (1, 16, 256):
        x = torch.randn(rows, in_).to(dtype)
        dense, _ = least(lambda x=x: linear(x, w), 25)
        for name, way in ways.items():
            if name != "gather" or rows < 100:
                found[name][f"{rows} rows"] = {"time_ratio": least(lambda x=x, way=way: way(x), 25)[0] / dense}
    return found


# --- choices ----------------------------------------------------------------------------------------------------------


def calibrated() -> dict[str, tuple[Tensor, Tensor]]:
    """Two layers of pycode: W, and E[xxᵀ] on 24 windows of code that it never saw."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from weft.compress._calibration import Corpus, calibrate
    from weft.compress._layers import targets

    folder = weft.builtin.model_path("pycode")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(row["text"] for row in weft.builtin.texts("stdlib", "train"))[:60000]
    windows = torch.tensor(tokenizer(text)["input_ids"][: 24 * 256]).view(-1, 256)
    layers = targets(model, r"model\.layers\.1\..*(q_proj|down_proj)", None)
    data = Corpus([{"input_ids": ids} for ids in windows.split(8)])
    found = calibrate(model, [data], layers, {layer.name: ("input",) for layer in layers})
    return {layer.name: (layer.wide, found[layer.name].input.second_moment) for layer in layers}  # type: ignore[union-attr]


def choices(keep: float = 0.7) -> dict[str, Any]:
    """Layer → setting → share of the output's squares that is left."""
    table: dict[str, Any] = {}
    for name, (w, g) in calibrated().items():
        (out, in_), y = w.shape, times_root(w.double().mT, root(g)).mT.float()
        whole = float(y.double().square().sum())
        low = torch.linalg.svdvals(y.double())[int(keep * out * in_ / (out + in_)) :].square().sum()
        table[name] = row = {"low rank": {"left": float(low) / whole}}
        base = {"start": "svd", "power": 2, "rho": 2.0, "rounds": 60, "tolerance": 0.01}
        for change in (
            {},
            *({"start": "data", "rounds": r, "tolerance": 0.0} for r in (15, 60)),
            {"start": "random"},
            *({"power": p} for p in (1, 8)),
            *({"rho": rho} for rho in (1.3, 1.6, 3.0)),
            *({"tolerance": t} for t in (0.03, 0.003)),
        ):
            options = base | change
            rho = options.pop("rho")
            k = int(keep * out * in_ / (in_ + out / rho + out / 16))  # sixteen bits a value, one a place
            started = time.perf_counter()
            found = ksvd(y, k, int(k / rho), generator=generator(0), **options)
            seconds, rounds = time.perf_counter() - started, len(found.errors) - 1
            label = ", ".join(f"{key} {value}" for key, value in change.items()) or "the default"
            row[label] = {"left": found.errors[-1] / whole, "rounds": rounds, "seconds": seconds}
            print(f"{name:30s} {label:42s} {row[label]['left']:.5f}  {rounds:3d} rounds {seconds:6.1f} s", flush=True)
        print(f"{name:30s} {'low rank of as many bits':42s} {row['low rank']['left']:.5f}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("race", "forward", "choices"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    if args.only in (None, "race"):
        for n, d, k, s in ((256, 256, 96, 48), (128, 128, 48, 24)):
            rows[f"K-SVD {n}x{d}, k={k}, s={s}"] = race(n, d, k, s)
    if args.only in (None, "forward"):
        for in_, out, k in ((512, 512, 220), (1024, 2816, 580)):
            for dtype in (torch.float32, torch.bfloat16):
                for way, row in forward(in_, out, k, dtype).items():
                    rows[f"{way} {out}x{in_}, k={k}, {str(dtype)[6:]}"] = row
    for case, row in rows.items():
        shown = {kind: figures for kind, figures in row.items() if isinstance(figures, dict)}
        print(f"{case:45s}", "  ".join(f"{kind} {figures['time_ratio']:.3f}x" for kind, figures in shown.items()))
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
        "commit": commit(),
        "rows": rows,
        "choices": choices() if args.only in (None, "choices") else {},
    }
    if args.out.exists():  # the other parts stay as they were measured, under the same conditions
        before = json.loads(args.out.read_text())
        if all(before[key] == document[key] for key in ("device", "threads", "versions")):
            document["rows"] = before["rows"] | document["rows"]
            document["choices"] = before["choices"] | document["choices"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
