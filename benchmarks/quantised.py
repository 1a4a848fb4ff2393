"""Repairing a quantised language model: QWHA beside LoRA of as many parameters, before and after training.

    python benchmarks/quantised.py                   the table below, and results/quantised/pycode.jsonl
    python benchmarks/quantised.py --seeds 1         fewer seeds; what is measured already is kept

builtin:pycode, every linear layer kept by torchao in 4 or 2 bits, groups of 64. Distance is KL(full ‖ adapted) in nats
a token on windows of unseen modules, loss the nats a token there. Starts: LoRA's own (ΔW = 0), LoftQ (quantiser and
rank-r factors in turn, five rounds), QWHA at random places (ΔW = 0), and QWHA's own, found on 32 windows. Training:
60 steps of AdamW on the training modules, at the rate with the lowest validation loss of a grid that grows at its ends.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core

import numpy as np
import peft
import torch
from claims.contest import Problem, evaluated, tuned
from claims.ledger import interval
from claims.problem_pycode import windows
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

import weft
from weft import builtin
from weft.algebra.svd import svd_top
from weft.files import write_text

RESULTS = Path(__file__).parent / "results" / "quantised" / "pycode.jsonl"
DTYPES = {4: torch.int4, 2: torch.int2}
GROUP, R, LENGTH, ROUNDS = 64, 8, 256, 5
STEPS, BATCH, RATES = 60, 8, (3e-4, 1e-3, 3e-3)
CONTENDERS = ("LoRA", "LoRA by LoftQ", "QWHA at random places", "QWHA")


@cache
def full() -> Any:
    return AutoModelForCausalLM.from_pretrained(builtin.model_path("pycode"), dtype=torch.float32).eval()


def targets() -> list[str]:
    return [name for name, m in full().named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def quantised(model: nn.Module, bits: int, weights: dict[str, Tensor]) -> nn.Module:
    """The model with these weights in the named layers, kept by torchao."""
    made: Any = copy.deepcopy(model)
    for name, weight in weights.items():
        made.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    how = IntxWeightOnlyConfig(DTYPES[bits], PerGroup(GROUP))
    quantize_(made, how, lambda _, name: name in weights)
    made.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(how))  # as if transformers had loaded it
    return made.requires_grad_(False)


def loftq(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What to quantise (out × in), and B (out × r) and A (r × in) that bring it back to W.

    Yixiao Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659.
    """
    b, a = w.new_zeros(len(w), R), w.new_zeros(R, w.shape[1])
    for _ in range(ROUNDS):
        rest = w - b @ a
        layer = nn.Sequential(nn.Linear(w.shape[1], len(w), bias=False))
        q: Any = quantised(layer, bits, {"0": rest})
        u, s, vh = svd_top(w - q[0].weight.dequantize(), R)
        b, a = u * s.sqrt(), s.sqrt()[:, None] * vh
    return rest, b, a


@torch.no_grad()
def contender(name: str, bits: int, seen: Tensor) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """The quantised base, and what attaches the contender to it."""
    weights = {n: full().get_submodule(n).weight.detach().clone() for n in targets()}
    lora = peft.LoraConfig(r=R, lora_alpha=R, target_modules=targets())
    if name == "LoRA":
        return quantised(full(), bits, weights), partial(peft.get_peft_model, peft_config=lora)
    if name == "LoRA by LoftQ":
        found = {n: loftq(w, bits) for n, w in weights.items()}

        def attach(base: nn.Module) -> nn.Module:
            model: Any = peft.get_peft_model(base, copy.deepcopy(lora))
            for n, (_, b, a) in found.items():
                layer = model.base_model.model.get_submodule(n)
                layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.clone(), b.clone()
            return model

        return quantised(full(), bits, {n: rest for n, (rest, _, _) in found.items()}), attach
    allocation = "random" if name == "QWHA at random places" else "adaalloc"

    def attach(base: nn.Module) -> nn.Module:
        config = weft.QwhaConfig(r=R, target_modules=targets(), allocation=allocation)
        if allocation == "adaalloc":
            weft.prepare(base, config, original_weights=full(), batches=[{"input_ids": seen}])
        return peft.get_peft_model(base, config)

    return quantised(full(), bits, weights), attach


def next_token(output: Any, ids: Tensor) -> Tensor:
    """Nats a token."""
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def measure(name: str, bits: int, seed: int) -> dict[str, Any]:
    splits = {"train": 256, "validation": 16, "test": 32}
    data = {split: (ids := windows(split, rows, LENGTH, seed), ids) for split, rows in splits.items()}
    with torch.no_grad():
        wanted = full()(data["test"][0]).logits.log_softmax(-1)

    def distances(output: Any) -> Tensor:
        return (wanted.exp() * (wanted - output.logits.log_softmax(-1))).sum(-1).mean(-1)

    def distance(output: Any, ids: Tensor) -> Tensor:
        return distances(output).mean()

    base, attach = contender(name, bits, data["train"][0][:32])
    problem = Problem(base, **data, loss=next_token, score=distance)
    judged = data["test"], next_token
    torch.manual_seed(~seed)
    fresh = attach(copy.deepcopy(base))
    best = tuned(problem, attach, rates=RATES, steps=STEPS, seed=seed, batch_size=BATCH)
    with torch.no_grad():
        apart = distances(best.model(data["test"][0]))
    return {
        "contender": name,
        "bits": bits,
        "seed": seed,
        "trainable": best.trainable,
        "rate": best.rate,
        "before": {"distance": evaluated(fresh, data["test"], distance), "loss": evaluated(fresh, *judged)},
        "after": {"distance": best.score, "loss": evaluated(best.model, *judged), "windows": apart.tolist()},
        "full": float(next_token(SimpleNamespace(logits=wanted), data["test"][1])),
    }


def read() -> dict[tuple[str, int, int], dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["contender"], row["bits"], row["seed"]): row for row in rows}


def write(rows: dict[tuple[str, int, int], dict[str, Any]]) -> None:
    """All rows, whole or not at all."""
    write_text(RESULTS, "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))


def table(rows: dict[tuple[str, int, int], dict[str, Any]]) -> str:
    lines = [
        "| bits | start | parameters | distance before | after | loss before | after | distance after − LoftQ's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for bits in DTYPES:
        for name in CONTENDERS:
            own = {key[2]: row for key, row in rows.items() if key[:2] == (name, bits)}
            rival = {key[2]: row for key, row in rows.items() if key[:2] == ("LoRA by LoftQ", bits)}
            if not own:
                continue
            cells = [
                f"{np.mean([row[when][what] for row in own.values()]):.4f}"
                for what in ("distance", "loss")
                for when in ("before", "after")
            ]
            gaps = [
                mine - theirs
                for seed, row in own.items()
                if seed in rival
                for mine, theirs in zip(row["after"]["windows"], rival[seed]["after"]["windows"], strict=True)
            ]
            low, high = interval(np.array(gaps)) if gaps else (np.nan, np.nan)
            beside = f"{np.mean(gaps):+.4f} ({low:+.4f} to {high:+.4f})" if gaps and name != "LoRA by LoftQ" else "–"
            trainable = next(iter(own.values()))["trainable"]
            lines.append(f"| {bits} | {name} | {trainable:,} | {' | '.join(cells)} | {beside.replace('-', '−')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    todo = [(name, bits, seed) for seed in range(args.seeds) for bits in DTYPES for name in CONTENDERS]
    todo = [key for key in todo if key not in read()]
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = {pool.submit(measure, *key): key for key in todo}
        for count, job in enumerate(as_completed(jobs), start=1):
            row = job.result()
            write(read() | {jobs[job]: row})
            before, after = row["before"]["distance"], row["after"]["distance"]
            print(
                f"{count}/{len(todo)} {jobs[job]}: distance {before:.4f} → {after:.4f}, rate {row['rate']:g}",
                flush=True,
            )
    print(table(read()))


if __name__ == "__main__":
    main()
