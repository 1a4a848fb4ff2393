"""The built-in vision transformer knows clean digits and fails on the shifted ones, which is what makes them a task."""

import torch
from transformers import AutoModelForImageClassification

from weft import builtin
from weft.builtin import train_vit


def test_folder_is_small_and_figures_hold():
    folder = builtin.model_path("vit")
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 200_000
    figures = train_vit.evaluate(folder)
    assert figures["accuracy on digits, test"] > 0.95
    assert figures["accuracy on digits-shifted, test"] < 0.4
    assert f"{figures['parameters']:,}" in (folder / "README.md").read_text()


def test_the_shifted_task_can_be_learnt():
    """Some steps of full training lift accuracy far above guessing, so a poor adapter cannot blame the task."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(builtin.model_path("vit")).train()
    pixels, labels = map(torch.from_numpy, builtin.images("digits-shifted", "train"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        chosen = torch.randint(len(labels), (64,))
        torch.nn.functional.cross_entropy(model(pixels[chosen]).logits, labels[chosen]).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert train_vit.accuracy(model.eval(), "digits-shifted", "test") > 0.75
