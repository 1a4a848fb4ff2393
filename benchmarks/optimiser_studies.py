"""Optimisers and forms of weights on real text: four studies, each one `weft compare`.

    python benchmarks/optimiser_studies.py --data-dir DIR                     all of them, one after the other
    python benchmarks/optimiser_studies.py --data-dir DIR --study pretraining one of the four below

    pretraining   a Llama of 1.8 M parameters beside its embeddings, from random weights, 2 M tokens of books read once
    larger        AdamW, GaLore and SLTrain on one of four times that size, one seed; both in bfloat16
    fine-tuning   stories260k → TinyShakespeare: every weight by each optimiser, LoRA, and LoRA-Pro
    wide          builtin:pycode → help topics: SaRA with and without its pull to low rank, which acts on sides above 64

The loss is on the last part of each book; "other text" is wikitext2's test split. DIR holds gutenberg_books/,
wikitext2/, tinyshakespeare/, models/stories260k_llama and the tokenizer of models/prose7m_llama. A study lies in
docs/results/STUDY; killed, it goes on where it stopped. Further options are those of `weft compare`. APOLLO is the
package apollo-torch, which imports bitsandbytes: `pip install --no-deps apollo-torch bitsandbytes`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sanity import configure, open_text, shakespeare
from studies import RESULTS, write_rows

PIECE = 8192  # characters of a book that count as one text
APOLLO = "rank=48,update_proj_gap=50,proj=random,scale=1,scale_type=channel"
PRETRAINED = {  # entry → its options, at a quarter of the width as GaLore's authors choose the rank
    "full@hf:adamw_torch": {},
    "full@galore": {"rank": 48, "update_proj_gap": 50},
    "full@galore#8bit": {"rank": 48, "update_proj_gap": 50, "inner": "adamw8bit"},
    "full@galore#unscaled": {"rank": 48, "update_proj_gap": 50, "scale": 1},  # one rate for embeddings and matrices
    "full@dct_projection": {"rank": 48},
    "full@dct_projection#trion": {"rank": 48, "form": "trion", "rest_lr": 0.003},  # the rest at AdamW's rate
    "full@hf:apollo_adamw": {"optim_args": APOLLO, "optim_target_modules": "self_attn,mlp"},
    "full@hf:adafactor": {},
    "lowrank": {"rank": 48},
    "sltrain": {"rank": 48, "lora_alpha": 12},
    "lost": {"rank": 48},
    "relora": {"rank": 48, "lora_alpha": 48, "relora_steps": 98, "restart_warmup": 10},
    "sst": {"rank": 48, "iteration_steps": 30, "restart_warmup": 5},
}
LARGER = {
    "full@hf:adamw_torch": {},
    "full@galore": {"rank": 96, "update_proj_gap": 50},
    "sltrain": {"rank": 96, "lora_alpha": 12},
}
BLOCKS = {"rank": 16, "update_proj_gap": 50, "activated_layers": 2, "sampling_interval": 10}  # of five
TUNED = {
    "peft:lora": {"r": 8},
    "peft:lora@lora_pro": {"r": 8},
    "full@hf:adamw_torch": {},
    "full@galore": {"rank": 16, "update_proj_gap": 50},
    "full@galore#small": {"rank": 2, "update_proj_gap": 50},  # about OwLore's and LoRA's state
    "full@owlore": {**BLOCKS, "outlier_multiple": 5},
    "full@owlore#uniform": {**BLOCKS, "sampling": "uniform"},
    "full@sara": {"share": 0.18},
}
WIDE = {  # as many trained numbers each
    "peft:lora": {"r": 16},
    "full@sara": {"share": 0.0856},
    "full@sara#alone": {"share": 0.0856, "lambda_rank": 0},
}
GRID = ("--grid-steps", "50", "--grid-extend", "6")  # recipes' rates are for models that are far larger
SIZES = {
    "pretraining": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4},
    "larger": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4},
}


def books(source: Path, folder: Path) -> None:
    """The books in pieces; of each the last twentieth is for validation and test."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in ("charlotte_bronte", "darwin", "war_and_peace"):
        text = open_text(source / "gutenberg_books" / f"{name}.txt")
        pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        held_out = max(len(pieces) // 20, 2)
        splits["train"] += pieces[:-held_out]
        splits["validation"] += pieces[-held_out : -(held_out // 2)]
        splits["test"] += pieces[-(held_out // 2) :]
    for name, pieces in splits.items():
        write_rows(folder / f"{name}.jsonl", ({"text": piece} for piece in pieces))


def config(source: Path, folder: Path, size: str) -> str:
    """The name of a Llama of this size with random weights; its config and tokenizer lie in a folder."""
    from transformers import LlamaConfig

    model = folder.parent / "model"
    model.mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / "models" / "prose7m_llama" / file, model / file)
    LlamaConfig(
        vocab_size=4096, num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, **SIZES[size],
    ).save_pretrained(model)  # fmt: skip
    configure(model)
    return f"config:{model}"


def prepared(study: str, source: Path, folder: Path) -> list[str]:
    """Write a study's data; the options of its comparison."""
    options = ["--data", str(folder)]
    if study == "fine-tuning":
        entries = TUNED
        options += [*shakespeare(source, folder), *GRID, "--forget-data", "none"]
    elif study == "wide":
        entries = WIDE
        options = ["--model", "builtin:pycode", "--data", "builtin:pydocs", "--forget-data", "builtin:stdlib", *GRID]
        options += ["--budget", "steps=150", "--batch-size", "16", "--max-length", "128"]
    else:
        books(source, folder)
        other = folder.parent / "wikitext2"
        other.mkdir(exist_ok=True)
        for name, split in (("valid", "train"), ("test", "test")):
            (other / f"{split}.txt").write_text(open_text(source / "wikitext2" / f"{name}.txt"), encoding="utf-8")
        entries = PRETRAINED if study == "pretraining" else LARGER
        options += ["--model", config(source, folder, study), "--budget", "steps=490", "--grid-steps", "122"]
        options += ["--batch-size", "16", "--max-length", "256", "--bf16", "--forget-data", str(other)]
        options += ["--references", "none"]
    for name, chosen in entries.items():
        options += [word for key, value in chosen.items() for word in ("--set", f"{name}.{key}={value}")]
    return ["--methods", ",".join(entries), "--seeds", "1" if study == "larger" else "3", *options]


def main() -> None:
    studies = ("pretraining", "larger", "fine-tuning", "wide")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--study", choices=studies, help="one study alone")
    args, passed = parser.parse_known_args()
    for study in [args.study] if args.study else studies:
        data = Path("build") / "studies" / study / "data"
        data.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "weft", "compare"]
        command += ["--output", os.path.relpath(RESULTS / study), *prepared(study, args.data_dir, data)]
        code = subprocess.run([*command, *passed]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
