"""A task ends alike for every adapter, weft's and PEFT's: what it learned stays, and nothing of it comes in twice."""

from __future__ import annotations

import copy

import harness
import peft
import pytest
import specimens
import torch
from test_law_06_merge import BIASED

import weft
from weft.adapters._config import tasks_of

PEERS = {
    "lora": peft.LoraConfig(r=4),
    "dora": peft.LoraConfig(r=4, use_dora=True),
    "vera": peft.VeraConfig(r=4),
    "oft": peft.OFTConfig(oft_block_size=0, r=1),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=1, tfinal=1),
}


def next_task(slug: str, model: peft.PeftModel) -> peft.PeftModel:
    served = harness.served(slug, model)
    return weft.next_task(model, **{need: what for need, what in served.items() if need != "original_weights"})


def test_outputs_stay_and_a_fresh_adapter_begins(slug, tmp_path):
    model = harness.randomise(harness.attach(slug, BIASED), scale=0.05)
    before, old = harness.outputs(model), harness.trainable(model)
    drift = weft.card(slug).init_drift
    for done in (1, 2):
        model = next_task(slug, model)
        assert tasks_of(model.get_base_model()) == model.peft_config["default"].merged_tasks == done
        assert harness.relative(harness.outputs(model), before) <= 1e-5 + 2 * drift[1], done
    fresh = harness.trainable(model)
    assert fresh and not {id(p) for p in fresh.values()} & {id(p) for p in old.values()}
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 1)


@pytest.mark.parametrize("name", PEERS)
def test_pefts_own_serve_a_stream_too(name):
    config = copy.deepcopy(PEERS[name])
    config.target_modules = ["first", "second"]
    model = peft.get_peft_model(specimens.base(BIASED), config)
    with torch.no_grad():
        for i, p in enumerate(harness.trainable(model).values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    before, spent = harness.outputs(model), torch.optim.SGD(harness.trainable(model).values(), lr=0.1)
    model = weft.next_task(model)
    assert harness.relative(harness.outputs(model), before) <= 1e-5
    assert harness.trainable(model) and tasks_of(model.get_base_model()) == 1
    with pytest.raises(weft.WeftError, match="adapter of a finished task"):
        spent.step()


def test_the_spent_optimiser_is_refused(tmp_path):
    model = harness.attach("codyra", short=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 2)
    model = weft.next_task(model)
    with pytest.raises(weft.WeftError, match="build one for the model that weft.next_task returned"):
        harness.train(model, optimizer, 1)
    harness.train(model, harness.optimizer_for(model, tmp_path)[0], 1)


def test_a_saved_task_is_not_merged_twice(tmp_path):
    """Neither on the model that has it already, nor after that was saved and loaded, nor on one that lacks others."""
    cell = specimens.CELLS[0]
    model = harness.randomise(harness.attach("sora", cell))
    before = harness.outputs(model)
    model.save_pretrained(tmp_path / "first")
    model = weft.next_task(model)
    model.save_pretrained(tmp_path / "second")
    merged = model.unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(harness.outputs(again), harness.outputs(merged)) and tasks_of(again) == 1
    assert harness.relative(harness.outputs(again), before) <= 1e-5
    for base in (merged, again):
        with pytest.raises(weft.UsageError, match="held 0 finished tasks, and those of this model hold 1"):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first")
    with pytest.raises(weft.UsageError, match="held 1 finished tasks, and those of this model hold 0"):
        peft.PeftModel.from_pretrained(specimens.base(cell), tmp_path / "second")
    peft.PeftModel.from_pretrained(again, tmp_path / "second")


@pytest.mark.parametrize("history", [False, True])
def test_the_training_state_of_a_finished_task_is_refused(history, tmp_path):
    model = harness.attach("codyra", short=True, history=history)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 10)
    state = optimizer.state_dict()
    model = weft.next_task(model)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    with pytest.raises(weft.WeftError, match="before which 0 tasks were finished, and before this one there were 1"):
        optimizer.load_state_dict(state)
    harness.train(model, optimizer, 10)
    harness.optimizer_for(model, tmp_path)[0].load_state_dict(optimizer.state_dict())


def test_modules_trained_in_full_stay():
    for given in ({}, {"history": True}):
        model = harness.attach("codyra", modules_to_save=["second"], target_modules=["first"], **given)
        with torch.no_grad():
            for p in harness.trainable(model).values():
                p.add_(0.1)
        before = harness.outputs(model)
        assert harness.relative(harness.outputs(weft.next_task(model)), before) <= 1e-5


def test_what_cannot_end_is_refused():
    with pytest.raises(weft.UsageError, match="not on a Mlp"):
        weft.next_task(specimens.base(specimens.SMALL))
    with pytest.raises(weft.UsageError, match="has default, second, of which default, second is active"):
        weft.next_task(harness.attach_two("sora"))
    with pytest.raises(weft.UsageError, match="next_task takes none"):
        weft.next_task(harness.attach("qwha"), original_weights=specimens.base(specimens.SMALL))
    model = harness.attach("diffora")
    with pytest.raises(weft.UsageError, match=r"held_out: weft.next_task\(model, held_out=...\)"):
        weft.next_task(model)
    assert tasks_of(model.get_base_model()) == 0  # nothing was done
