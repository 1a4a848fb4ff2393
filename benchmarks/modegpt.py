"""MoDeGPT beside what it must beat, on a small trained Llama at one share of the bits.

    python benchmarks/modegpt.py --data-dir DIR [--keep 0.75]

DIR holds models/prose7m_llama, wikitext2 and c4_sample; calibration and test windows are those of compression.py. The
sliced models have the sizes that MoDeGPT chose, pair by pair: the same choice without new weights (`slices`), the
largest rows and columns (`magnitude`), or any (`random`). The factored ones have the same number of bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression import corpora, losses
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import weft
from weft.algebra.random import generator
from weft.compress._calibration import Corpus, calibrate
from weft.compress._factoriser import factoriser
from weft.compress.modegpt import Mlp, QueriesKeys

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "modegpt, uniform": ("modegpt", {"allocate": "uniform"}),
    "modegpt, water": ("modegpt", {"allocate": "water"}),
    "svd": ("svd", {}),
    "svd_llm": ("svd_llm", {}),
    "svd_llm, shrink 0": ("svd_llm", {"shrink": 0.0}),
}


def importance(pair: Any, how: str, name: str) -> Tensor:
    """How much each unit (f) or coordinate of a head (G × h) matters: the product of its rows' and columns' squares."""
    heads = 1 if isinstance(pair, Mlp) else pair.groups
    if how == "random":
        return torch.rand(heads, pair.shape[0], generator=generator("random", name), dtype=torch.float64)
    score = torch.ones(heads, pair.shape[0], dtype=torch.float64)
    for i, part in enumerate(pair.parts):
        inner = part.wide.double().mT if i and not isinstance(pair, QueriesKeys) else part.wide.double()
        if isinstance(pair, Mlp) and part is not pair.parts[-1]:
            inner = part.wide.double()
        score *= inner.square().sum(1).view(heads, -1, pair.shape[0]).sum(1)
    return score


def decomposed(maker: Any, model: Any, batches: Sequence[Any]) -> dict[str, dict[str, Tensor]]:
    """What MoDeGPT finds of every pair."""
    parts = [part for pair in maker.units(model) for part in pair.parts]
    seen = calibrate(model, [Corpus(batches)], parts, {part.name: maker.needs(part) for part in parts})
    return {pair.name: maker.decompose(pair, seen, None) for pair in maker.units(model)}


def slices(maker: Any, model: Any, found: dict[str, dict[str, Tensor]], sizes: dict[str, int], how: str) -> None:
    """Keep rows and columns of each pair as they are."""
    for pair in maker.units(model):
        tensors = dict(found[pair.name])
        score = importance(pair, how, pair.name) if how != "slices" else None
        if isinstance(pair, Mlp):
            if score is not None:
                tensors["order"] = score[0].argsort(descending=True)
            tensors["lower"] = torch.eye(pair.shape[0])  # units that share nothing: none makes up for another
        elif isinstance(pair, QueriesKeys):
            if score is not None:
                score = score.unflatten(1, (2, -1)).sum(1)
                tensors["order"] = score.argsort(1, descending=True)
        elif score is not None:
            order, (g, h) = score.argsort(1, descending=True), score.shape
            values, output = (part.wide for part in pair.parts)
            tensors["values"] = values.view(g, h, -1).gather(1, order[..., None].expand(-1, -1, values.shape[1]))
            heads = output.view(len(output), -1, h)
            at = order.repeat_interleave(heads.shape[1] // g, 0).expand(len(output), -1, -1)
            tensors["output"] = heads.gather(2, at)
        maker.replace(model, pair, tensors, sizes[pair.name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.75)
    given = parser.parse_args()
    logging.disable_progress_bar()
    path = given.data_dir / "models" / "prose7m_llama"
    windows = corpora(given.data_dir, AutoTokenizer.from_pretrained(path))
    batches = [{"input_ids": ids} for ids in windows["calibration"].split(8)]

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def tell(name: str, model: Any, keep: float) -> None:
        perplexities = [float(np.exp(np.mean(losses(model, windows[c])))) for c in ("wikitext2", "c4")]
        print(f"| {name} | {keep:.4f} | {perplexities[0]:.2f} | {perplexities[1]:.2f} |", flush=True)

    print("| | keep | wikitext2 | c4 |\n| --- | --- | --- | --- |")
    tell("dense", fresh(), 1.0)
    model = fresh()
    report = weft.compress(model, "modegpt", keep=given.keep, data=batches)
    tell("modegpt", model, report.keep)
    maker = factoriser("modegpt", weft.config_class("modegpt")())
    found = decomposed(maker, fresh(), batches)
    sizes = {row.name: row.size or row.shape[0] for row in report.rows}
    for how in ("slices", "magnitude", "random"):
        model = fresh()
        slices(maker, model, found, sizes, how)
        tell(how, model, report.keep)
    for name, (method, options) in OTHERS.items():
        model = fresh()
        report = weft.compress(model, method, keep=given.keep, data=batches, **options)
        tell(name, model, report.keep)


if __name__ == "__main__":
    main()
