"""INT2.1 on a small trained Llama: what codes of two bits cost, and what factors beside them bring back.

    python benchmarks/int21.py --data-dir DIR               results/int21/prose7m_llama.json, and the table
    python benchmarks/int21.py --data-dir DIR --only corr   settings whose names begin so; the file keeps the others
    python benchmarks/int21.py --memory                     results/int21/memory.json

DIR holds models/prose7m_llama, wikitext2 and c4_sample. Test windows, and those that calibrate, are the ones of
compression.py. What is trained learns from windows of 256 tokens of other text: Wikipedia articles, and C4 documents
that are not tested. Bits are those of the checkpoint in bfloat16: codes, steps, zeros and factors, for each weight of
the blocks' linear layers; "of it groups" are steps and zeros. A model is tested as it is stored. A finished setting is
not measured again, unless its steps or its rate are others.

--memory: a training step (forward, backward, AdamW) of one block of LLaMA-7B's shapes with 256 tokens in float32, each
in a fresh process: ours, and with the codes written out by plain torch operations, which keep them for the backward
pass. What is counted is the peak above the model and its inputs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import processor
from claims.ledger import interval
from compression import LENGTH, corpora, losses, text
from factorised import EXACT
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

import weft
from weft.files import write_text
from weft.linear.quantised_plus_low_rank import QuantisedPlusLowRank, coded_bits
from weft.run.compare import commit

RESULTS = Path(__file__).parent / "results" / "int21"
BATCH, STEPS, TOKENS = 4, 200, 256
RECIPE = weft.card("int21").recipe
PLAIN: dict[str, Any] = {"quantiser": "nearest", "group_size": 32}
# options, and whether it is trained; a rank is worth 0.10 bits a weight of this model
SETTINGS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "float": (None, False),
    "nearest, 2 bits, groups of 64": ({**PLAIN, "group_size": 64, "rank": 0}, False),
    "nearest, 2 bits": ({**PLAIN, "rank": 0}, False),
    "gptq, 2 bits": ({**PLAIN, "quantiser": "gptq", "rank": 0}, False),
    "nearest, 4 bits": ({**PLAIN, "bits": 4, "rank": 0}, False),
    "svd of the error, 2 bits, rank 16": ({**PLAIN, "start": "svd"}, False),
    "corrected, 2 bits, rank 16": (PLAIN, True),
    "corrected, 2 bits, rank 2": ({**PLAIN, "rank": 2}, True),
    "corrected from svd, 2 bits, rank 16": ({**PLAIN, "start": "svd"}, True),
    "corrected from gptq, 2 bits, rank 16": ({**PLAIN, "quantiser": "gptq"}, True),
    "corrected, 4 bits, rank 16": ({**PLAIN, "bits": 4}, True),
}


def lessons(data: Path, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Windows to learn from."""
    documents = [json.loads(line)["text"] for line in text(data / "c4_sample" / "c4_300.jsonl.gz").splitlines()]
    words = text(data / "wikitext2" / "wiki_articles_demo.txt.gz") + "\n".join(documents[:240])
    ids = torch.tensor(tokenizer(words)["input_ids"])
    return [{"input_ids": window} for window in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)]


def trained(student: Any, teacher: Any, rows: list[dict[str, Tensor]], steps: int, rate: float) -> None:
    """By the method's own objective, and the schedule that its card recommends."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=BATCH,
            warmup_steps=int(RECIPE["warmup_ratio"] * steps),
            lr_scheduler_type=RECIPE["lr_scheduler_type"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        weft.distiller(student.train(), teacher, "int21", args=args, train_dataset=rows).train()
    student.eval()


def stored(model: nn.Module) -> dict[str, float]:
    """Bits for each weight of the blocks' matrices: in all, and of them steps and zeros."""
    weights = bits = groups = 0
    for layer in model.modules():
        if isinstance(layer, QuantisedPlusLowRank):
            out, in_ = layer.out_features, layer.in_features
            coded = coded_bits(out, in_, layer.bits, layer.group_size)
            weights += out * in_
            groups += coded - layer.bits * out * in_
            bits += coded + 16 * layer.rank * (out + in_)
    return {"bits": bits / weights, "groups": groups / weights} if weights else {"bits": 16.0, "groups": 0.0}


def measure(name: str, path: Path, windows: dict[str, Tensor], rows: Any, how: dict[str, Any]) -> dict[str, Any]:
    options, trains = SETTINGS[name]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    started = time.perf_counter()
    if options is not None:
        calibration = [{"input_ids": ids} for ids in windows["calibration"].split(8)]
        weft.compress(model, "int21", data=calibration if options["quantiser"] == "gptq" else None, **options)
        if trains:
            teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            trained(model, teacher, rows, **how)
    took = time.perf_counter() - started
    model.bfloat16().float()  # as it is stored
    found = {corpus: losses(model, windows[corpus]) for corpus in ("wikitext2", "c4")}
    return {**stored(model), **(how if trains else {}), "seconds": took, **found}


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Perplexities; beside what was trained, the difference in nats from the same without training."""
    yield "| setting | bits a weight | of it groups | steps | wikitext2 | c4 |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name, row in rows.items():
        start = _untrained(name)
        cells = []
        for corpus in ("wikitext2", "c4"):
            own = np.array(row[corpus])
            cell = f"{np.exp(own.mean()):.1f}"
            if start in rows:
                low, high = interval(own - np.array(rows[start][corpus]))
                cell += f" ({low:+.2f} to {high:+.2f})".replace("-", "−")
            cells.append(cell)
        steps = row.get("steps", "–")
        yield f"| {name} | {row['bits']:.3f} | {row['groups']:.3f} | {steps} | " + " | ".join(cells) + " |"


def _untrained(name: str) -> str | None:
    """The setting that a trained one started from."""
    options, trains = SETTINGS[name]
    if not trains or options is None:
        return None
    zero = options.get("start") != "svd"
    wanted = {**options, "rank": 0} if zero else options  # B = 0 is the codes alone
    return next(other for other, (own, learns) in SETTINGS.items() if own == wanted and not learns)


def compare(data: Path, only: tuple[str, ...], steps: int, rate: float) -> None:
    logging.disable_progress_bar()
    path, out = data / "models" / "prose7m_llama", RESULTS / "prose7m_llama.json"
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows, rows = corpora(data, tokenizer), lessons(data, tokenizer)
    how = {"steps": steps, "rate": rate}
    finished = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else {}
    for name, (_, trains) in SETTINGS.items():
        done = name in finished and (not trains or all(finished[name][key] == value for key, value in how.items()))
        if done or (only and not name.startswith(only)):
            continue
        finished[name] = measure(name, path, windows, rows, how)
        finished = {each: finished[each] for each in SETTINGS if each in finished}
        _write(out, {"rows": finished})
        shown = {corpus: round(float(np.exp(np.mean(finished[name][corpus]))), 1) for corpus in ("wikitext2", "c4")}
        print(f"{name}: {finished[name]['bits']:.3f} bits, {finished[name]['seconds']:.0f} s, {shown}", flush=True)
    print("\n".join(table(finished)))


# --- memory -----------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The layer in plain torch operations."""

    def __init__(self, layer: QuantisedPlusLowRank) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        factors = self.layer.up(self.layer.scale * self.layer.down(x))
        return linear(x, self.layer.quantised(x.dtype)) + factors


def drawn(stock: nn.Linear) -> QuantisedPlusLowRank:
    """Some codes of two bits in groups of 128, and factors of rank 16."""
    out, in_ = stock.out_features, stock.in_features
    layer = QuantisedPlusLowRank(in_, out, bits=2, group_size=128, rank=16)
    for codes in (layer.codes, layer.zeros):
        codes.random_(0, 256)
    layer.steps.copy_(torch.full(layer.steps.shape, in_**-0.5, dtype=torch.float16).view(torch.int16))
    nn.init.normal_(layer.down.weight, std=in_**-0.5)
    nn.init.zeros_(layer.up.weight)
    return layer


def block(plain: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A block, and its forward pass on inputs that want a gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, num_hidden_layers=1)  # else LLaMA-7B's own
    with torch.device("meta"):
        made = LlamaModel(config).layers[0]
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear):
            made.set_submodule(name, Plain(drawn(module)) if plain else drawn(module))
        elif hasattr(module, "weight"):
            module.weight = nn.Parameter(torch.ones(config.hidden_size), requires_grad=False)
    x = torch.randn(1, TOKENS, config.hidden_size, requires_grad=True)
    places = LlamaRotaryEmbedding(config)(x, torch.arange(TOKENS)[None])

    def forward() -> Tensor:
        found = made(x, position_embeddings=places)
        return (found[0] if isinstance(found, tuple) else found).square().mean()

    return made, forward


def peak(plain: bool) -> dict[str, float]:
    """Bytes above the model that a training step needs, the model's own, and the second step's time."""
    from weft.run.measure import measuring_memory

    made, forward = block(plain)
    own = sum(t.numel() * t.element_size() for t in made.state_dict().values())
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        started = time.perf_counter()
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    with measuring_memory() as seen:
        step()
    return {"peak_bytes": seen.peak_bytes or 0, "model_bytes": own, "step_seconds": step()}


def memory() -> None:
    rows = {}
    for name in ("ours", "plain"):
        command = [sys.executable, __file__, "--peak-of", name]
        rows[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=EXACT).stdout)
        shown = {key: round(rows[name][key] / 2**20, 1) for key in ("model_bytes", "peak_bytes")}
        print(f"{name:6s} MiB: {shown}, {rows[name]['step_seconds']:.1f} s a step", flush=True)
    ratios = {key: rows["ours"][key] / rows["plain"][key] for key in ("peak_bytes", "step_seconds")}
    print({"ours / plain": ratios})
    _write(RESULTS / "memory.json", {"rows": rows, "ratios": ratios})


def _write(path: Path, found: dict[str, Any]) -> None:
    """The file whole or not at all, with what it was made by."""
    document = {
        "command": shlex.join(["python", "benchmarks/int21.py", *(["--memory"] if path.stem == "memory" else [])]),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
        "commit": commit(),
        **found,
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of settings' names")
    parser.add_argument("--steps", type=int, default=STEPS, help="of what is trained")
    parser.add_argument("--rate", type=float, default=RECIPE["learning_rate"], help="its learning rate")
    parser.add_argument("--memory", action="store_true", help="peak memory of a training step instead")
    parser.add_argument("--peak-of", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak(args.peak_of == "plain")))
    elif args.memory:
        memory()
    elif args.data_dir is None:
        parser.error("--data-dir is missing, or --memory")
    else:
        compare(args.data_dir, tuple(args.only), args.steps, args.rate)


if __name__ == "__main__":
    sys.exit(main())
