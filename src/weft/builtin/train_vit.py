"""Train and judge `builtin:vit`, a vision transformer for 8 x 8 scans of digits.

    python -m weft.builtin.train_vit --out DIR     # train on builtin:digits (some seconds), then write the folder
    python -m weft.builtin.train_vit --evaluate    # print the figures of the model card
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from weft import builtin

EPOCHS = 40
BATCH = 64
PEAK_RATE = 4e-3
WEIGHT_DECAY = 0.05


def new_model(seed: int) -> ViTForImageClassification:
    """A fresh float32 model: 16 patches of 2 x 2 pixels, four layers of width 32."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    return ViTForImageClassification(config)


def train(seed: int) -> ViTForImageClassification:
    """Train on the clean training split: AdamW, one cycle of the learning rate."""
    pixels, labels = map(torch.from_numpy, builtin.images("digits", "train"))
    model = new_model(seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels))
        for first in range(0, len(labels) - BATCH + 1, BATCH):
            chosen = order[first : first + BATCH]
            logits = model(pixels[chosen]).logits
            F.cross_entropy(logits, labels[chosen], label_smoothing=0.05).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, name: str, split: str) -> float:
    """Share of right answers on one split of one image set."""
    pixels, labels = map(torch.from_numpy, builtin.images(name, split))
    return (model(pixels).logits.argmax(-1) == labels).float().mean().item()


def evaluate(folder: Path) -> dict[str, float]:
    """The figures of the model card: size, and accuracy on clean and on shifted scans."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    figures = {"parameters": model.num_parameters()}
    for name in ("digits", "digits-shifted"):
        for split in ("train", "validation", "test"):
            figures[f"accuracy on {name}, {split}"] = round(accuracy(model, name, split), 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weft.builtin.train_vit", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=builtin.model_path("vit"), help="the model's folder")
    parser.add_argument("--evaluate", action="store_true", help="print the figures of the folder, train nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.evaluate:
        train(options.seed).save_pretrained(options.out)
    print(json.dumps(evaluate(options.out), indent=2))


if __name__ == "__main__":
    main()
