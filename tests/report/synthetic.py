"""Results that no one measured: a seeded stand-in for `results.jsonl`, in every state a study can be in."""

import json
import math
import random
from pathlib import Path
from typing import Any

METHODS = (
    "sora", "dylora", "increlora", "allora", "randlora", "nola", "lora_sb", "svfit",
    "peft:lora", "peft:dora", "peft:vera", "peft:adalora",
)  # fmt: skip
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def study(
    methods: tuple[str, ...] = METHODS, seeds: tuple[int, ...] | None = (0, 1, 2), **extra: Any
) -> dict[str, Any]:
    """The first line of a study."""
    return {
        "kind": "study",
        "model": "builtin:pycode",
        "data": "builtin:pydocs",
        "task": "causal_lm",
        "budget": {"params": 50_000, "steps": 300},
        "seeds": seeds,
        "methods": list(methods),
        "command": f"weft compare --model builtin:pycode --data builtin:pydocs --methods {','.join(methods)} "
        "--budget params=50k --budget steps=300 --seeds 3 --output runs/synthetic",
        "versions": {
            "weft": "0.0.0",
            "torch": "2.13.0",
            "peft": "0.21.2",
            "transformers": "5.23.0",
            "python": "3.11.2",
        },
        "hardware": {"cpu": "a synthetic processor", "cores": 2, "memory_gb": 8.0, "gpu": None},
        "commit": "0" * 40,
        "started": "2026-01-02T03:04:05+00:00",
        **extra,
    }


def run(method: str, seed: int, phase: str = "final", *, level: float = 3.2, rate: float = 1e-3, **extra: Any) -> dict:
    """One run that went well, at about `level` nats per token."""
    random_ = random.Random(f"{method}/{seed}/{phase}/{rate}")
    place = METHODS.index(method) if method in METHODS else {"base": 0, "head": 3, "full": 6}.get(method, 1)
    shift = random_.gauss(0, 0.012)
    documents = []
    for document in range(40):
        tokens = 60 + 7 * (document % 11)
        noise = random.Random(document).gauss(0, 0.25) + random_.gauss(0, 0.03)
        documents.append([tokens * (level + shift + noise), tokens])
    loss = sum(nll for nll, _ in documents) / sum(tokens for _, tokens in documents)
    trainable = 12_000 + 11_000 * place if method != "full" else 1_800_000
    curve = []
    for step in range(10, 301, 10):
        value = loss + 1.9 * math.exp(-step / (40 + 8 * place))
        point = {"step": step, "loss": value + random_.gauss(0.02, 0.05)}
        if step % 30 == 0:
            point["eval_loss"] = value + random_.gauss(0, 0.006)
        curve.append(point)
    row = {
        "kind": "run", "phase": phase, "method": method, "seed": seed, "learning_rate": rate,
        "status": "ok", "error": None,
        "options": {"target_modules": "all-linear"},
        "knob": {"name": "r", "value": 2 + place, "unreachable": method == "peft:vera"},
        "recipe": {"learning_rate": rate, "weight_decay": 0.01, "warmup_ratio": 0.06, "max_grad_norm": 1.0,
                   "lr_scheduler_type": "linear"},
        "trainable": trainable, "steps": 300, "curve": curve, "validation": {"loss": loss + random_.gauss(0, 0.01)},
        "test": None, "ranks": None, "forgetting": None, "step_seconds": None, "peak_bytes": None, "file_bytes": None,
        "command": f"weft adapt --model builtin:pycode --data builtin:pydocs --method {method} "
        f"--learning-rate {rate} --seed {seed}",
    }  # fmt: skip
    if phase in ("final", "reference"):
        row["test"] = {"loss": loss, "perplexity": math.exp(loss), "per_document": documents}
        row["file_bytes"] = 4 * trainable + 2_000 if method != "base" else None
        before = 2.0
        row["forgetting"] = {"before": before, "after": before + abs(random_.gauss(0.1 + 0.03 * place, 0.02))}
        row["ranks"] = ranks(method, place)
    if phase == "measure":
        row |= {
            "step_seconds": 0.21 + 0.013 * ((place * 5) % 12),
            "peak_bytes": 310e6 + 9e6 * ((place * 7) % 12),
            "curve": [],
        }
    return {**row, **extra}


def ranks(method: str, place: int, layers: int = 6) -> dict[str, int] | None:
    """Ranks that vary by layer for the methods that allocate, one rank for the rest."""
    if method in ("base", "head", "full", "randlora", "nola"):
        return None
    adaptive = method in ("sora", "increlora", "peft:adalora")
    return {
        f"model.layers.{layer}.{module}": 2 + (layer * 3 + index * 5) % 9 if adaptive else 2 + place
        for layer in range(layers)
        for index, module in enumerate(MODULES)
    }


LEVELS = (3.11, 3.115, 3.16, 3.2, 3.24, 3.33, 3.13, 3.21, 3.17, 3.165, 3.42, 3.19)


def rows(methods: tuple[str, ...] = METHODS, seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """All runs of a finished study; the highest rate of two methods diverges."""
    found = []
    for method in methods:
        level = LEVELS[METHODS.index(method)]
        rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
        for rate in rates:
            if rate == 1e-2 and method in ("sora", "peft:dora"):
                error = "The loss became NaN at step 41; the last good checkpoint is step 40."
                found.append(run(method, 100, "grid", rate=rate, status="failed", error=error, validation=None))
            else:
                away = 0.07 * (math.log10(rate) + 3 - 0.1 * METHODS.index(method) / 3) ** 2 * (6 if rate > 5e-3 else 1)
                found.append(run(method, 100, "grid", rate=rate, level=level + away))
        found += [run(method, seed, level=level) for seed in seeds]
        found.append(run(method, 0, "measure", level=level))
    found.append(
        run("base", 0, "reference", level=5.1, rate=0.0, knob=None, recipe={}, curve=[], trainable=0, forgetting=None)
    )
    found += [
        run(name, seed, "final", level=level, knob=None)
        for name, level in (("head", 3.9), ("full", 3.08))
        for seed in seeds
    ]
    found += [run(name, 0, "measure", level=3, knob=None) for name in ("head", "full")]
    return found


def write(folder: Path, head: dict[str, Any], runs: list[dict[str, Any]]) -> Path:
    """The file; NaN is written as Python's json writes it."""
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [head, *runs]), encoding="utf-8")
    return path


def accurate(row: dict[str, Any]) -> dict[str, Any]:
    """The same run as a classification: a document is one example, counted wrong (1) or right (0)."""
    if not row.get("test"):
        return row
    draw = random.Random(f"{row['method']}/{row['seed']}")
    share = (row["test"]["loss"] - 2.9) / 2
    wrong = [[float(draw.random() < share), 1.0] for _ in range(200)]
    right = 1 - sum(errors for errors, _ in wrong) / len(wrong)
    return {**row, "test": {"loss": row["test"]["loss"], "accuracy": right, "per_document": wrong}}


def written(row: dict[str, Any], prompt: str = "name : weft") -> dict[str, Any]:
    """The same run with text that it generated, if it is one that does: BLEU 20 + seed, ROUGE-L twice that."""
    if row["phase"] not in ("final", "reference") or row["status"] != "ok":
        return row
    bleu = 20.0 + row["seed"]
    answer = f"written by {row['method']} at {row['seed']}"
    examples = [{"prompt": prompt, "answer": answer, "reference": "a reference"}]
    return {**row, "generation": {"bleu": bleu, "rouge_l": 2 * bleu, "prompts": 1, "examples": examples}}
