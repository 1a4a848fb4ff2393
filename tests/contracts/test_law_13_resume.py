"""Law 13. Resumed = uninterrupted, bit for bit, dropout included, through HF Trainer's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import harness
import pytest
import specimens
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import weft

STEPS = 8
CELL = specimens.BY_NAME["Linear"]
ROWS = [{k: v[0] for k, v in specimens.batch(i, 1).items()} for i in range(24)]


def trainer(slug: str, folder: Path, **changes) -> Trainer:
    given = {"dropout": 0.3} if "dropout" in harness.fields(slug) else {}
    model = harness.attach(slug, CELL, short=True, **given)
    settings = {
        "max_steps": STEPS, "save_steps": 3, "save_strategy": "steps", "logging_steps": 1, "learning_rate": 0.01,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 2, "weight_decay": 0.01,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 11,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **(settings | changes))
    return Trainer(model, args, train_dataset=ROWS, optimizers=weft.optimizer_and_scheduler(model, args))


def everything(run: Trainer) -> dict[str, Tensor]:
    """Adapter, optimiser and controllers at the end of a run."""
    found = {f"model/{n}": p.detach() for n, p in harness.trainable(run.model).items()}
    for i, d in enumerate(harness.deltas(run.model)):
        found |= {f"buffer/{i}/{n}": b for n, b in d.named_buffers()}
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    for i, p in enumerate(p for g in inner.param_groups for p in g["params"]):
        found |= {f"optimizer/{i}/{k}": v for k, v in inner.state[p].items() if isinstance(v, Tensor)}
    for c in harness.controllers(run.model):
        found |= {f"controller/{k}": v for k, v in c.checkpoint().items()}
    return found


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.fixture
def uninterrupted(slug, tmp_path) -> Trainer:
    run = trainer(slug, tmp_path / "whole")
    run.train()
    return run


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_is_uninterrupted(slug, step, uninterrupted, tmp_path):
    """From both checkpoints, into another model, another optimiser, other global generators."""
    torch.manual_seed(12345)
    again = trainer(slug, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    expected, found = everything(uninterrupted), everything(again)
    assert expected.keys() == found.keys()
    for name, t in expected.items():
        assert t.dtype == found[name].dtype and torch.equal(t, found[name]), name
    assert losses(again) == losses(uninterrupted)
    assert torch.equal(harness.outputs(again.model), harness.outputs(uninterrupted.model))


def test_checkpoints_are_safetensors_json_and_plain_tensors(slug, uninterrupted, tmp_path):
    """Nothing of weft's needs a pickle; Trainer's own files load with weights_only=True."""
    folder = tmp_path / "whole" / "checkpoint-3"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    controllers = harness.controllers(uninterrupted.model)
    assert set(state["weft"]) == {c.key() for c in controllers}
    assert all(isinstance(v, Tensor) for kept in state["weft"].values() for v in kept.values())
    assert int(state["weft"][controllers[0].key()]["step"]) == 3
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names and "pytorch_model.bin" not in names
    json.loads((folder / "adapter_config.json").read_text())


def test_an_optimiser_that_lost_the_methods_state_is_refused(slug, uninterrupted, tmp_path):
    """A restored optimiser without the controllers' state would go on from step 0 unnoticed."""
    state = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    del state["weft"]
    fresh = trainer(slug, tmp_path / "lost")
    fresh.optimizer.load_state_dict(state)
    fresh.model.train()
    fresh.model(**specimens.batch(0)).loss.backward()
    if not harness.has_events(fresh.model):
        fresh.optimizer.step()
        return
    with pytest.raises(weft.WeftError, match=r"weft\.optimizer_and_scheduler"):
        fresh.optimizer.step()


def test_interrupted_twice_is_uninterrupted(slug, uninterrupted, tmp_path):
    run = trainer(slug, tmp_path / "third")
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    again = trainer(slug, tmp_path / "fourth")
    again.train(resume_from_checkpoint=str(tmp_path / "third" / "checkpoint-6"))
    expected, found = everything(uninterrupted), everything(again)
    assert all(torch.equal(t, found[name]) for name, t in expected.items())
