"""Law 18. Two adapters, disable, delete, gradient checkpointing, grouped queries, odd shapes, and the count."""

from __future__ import annotations

import pickle

import harness
import pytest
import specimens
import torch
from peft import PeftModel, get_peft_model

import weft

CELLS = [specimens.BY_NAME[name] for name in ("Linear", "Conv1D", "fused qkv")]
LINEAR = specimens.BY_NAME["Linear"]


@pytest.mark.parametrize("cell", [*CELLS, specimens.SMALL], ids=lambda c: c.name)
def test_two_adapters_add_up(slug, cell):
    model = harness.attach_two(slug, cell, torch.float64)
    for one in harness.watch_forward(model):
        assert harness.relative(one.output, harness.reference(one, ("default", "second"))) <= 1e-10


@pytest.mark.parametrize("cell", [specimens.SMALL, LINEAR], ids=lambda c: c.name)
def test_each_alone_is_itself(slug, cell):
    model = harness.attach_two(slug, cell)
    model.set_adapter("default")
    first = harness.outputs(model)
    model.set_adapter("second")
    second = harness.outputs(model)
    assert not torch.equal(first, second)
    assert torch.equal(first, harness.outputs(harness.randomise(harness.attach(slug, cell), scale=0.1)))
    for one in harness.watch_forward(model):
        assert harness.relative(one.output, harness.reference(one, ("second",))) <= 1e-5


@pytest.mark.parametrize("cell", [specimens.SMALL, LINEAR], ids=lambda c: c.name)
def test_disabled_is_the_base_bit_for_bit(slug, cell):
    model = harness.attach_two(slug, cell)
    expected, adapted = harness.outputs(specimens.base(cell)), harness.outputs(model)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(harness.outputs(model), expected)
    assert torch.equal(harness.outputs(model), adapted)
    assert torch.equal(harness.outputs(model.unload()), expected)


@pytest.mark.parametrize("cell", [specimens.SMALL, LINEAR], ids=lambda c: c.name)
def test_deleting_one_leaves_the_other(slug, cell):
    model = harness.attach_two(slug, cell)
    model.set_adapter("second")
    expected = harness.outputs(model)
    model.delete_adapter("default")
    assert torch.equal(harness.outputs(model), expected)
    assert all(set(layer.deltas) == {"second"} == set(layer.controllers) for _, layer in harness.layers(model))
    assert not any(".default." in name for name in model.state_dict())


def test_the_second_is_saved_by_itself(slug, tmp_path):
    model = harness.attach_two(slug, LINEAR)
    model.set_adapter("second")
    expected = harness.outputs(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    again = PeftModel.from_pretrained(specimens.base(LINEAR), str(tmp_path / "second"))
    assert torch.equal(harness.outputs(again), expected)


def test_each_trains_alone(slug, tmp_path):
    """What is not active keeps its bits, and its controller hears nothing."""
    model = harness.attach_two(slug, LINEAR, short=True)
    model.set_adapter("second")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 3)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".second" in n for n in changed)
    for _, layer in harness.layers(model):
        assert layer.controllers["default"].step == 0 and layer.controllers["second"].step == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(slug, reentrant):
    given = {"dropout": 0.2} if "dropout" in harness.fields(slug) else {}
    found = []
    for checkpointing in (False, True):
        model = harness.randomise(harness.attach(slug, LINEAR, short=True, **given))
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(3)
        for part in (0, 1):
            model(**specimens.batch(part)).loss.backward()
        found.append({n: p.grad for n, p in harness.trainable(model).items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, g in found[0].items():
        if reentrant:  # its first forward records no gradients, and small products then have other bits
            assert harness.relative(found[1][name], g) <= 1e-5, name
        else:
            assert torch.equal(found[1][name], g), name


def test_the_tiny_models_are_what_the_law_asks_for():
    llama = specimens.base(LINEAR)
    assert llama.config.num_key_value_heads < llama.config.num_attention_heads
    shapes = {tuple(m.weight.shape) for m in llama.modules() if isinstance(m, torch.nn.Linear)}
    assert (37, 32) in shapes and (32, 37) in shapes and (16, 32) in shapes  # prime sides, tall, wide, shared heads


@pytest.mark.parametrize("cell", specimens.CELLS, ids=lambda c: c.name)
def test_counts_equal_the_formula(slug, cell):
    if cell.kind in weft.card(slug).refuses:
        return
    for r in (1, 3) if "r" in harness.fields(slug) else (None,):
        model = harness.attach(slug, cell, **({} if r is None else {"r": r}))
        numbers = sum(p.numel() for p in {id(p): p for p in harness.trainable(model).values()}.values())
        assert sum(d.count() for d in harness.deltas(model)) == numbers
        if not weft.card(slug).needs:  # and on a skeleton, where nothing has values
            with torch.device("meta"):
                skeleton = cell.build()
            config = weft.config_class(slug)(
                **harness.options(slug, **{**cell.target, **({} if r is None else {"r": r})})
            )
            bare = get_peft_model(skeleton, config)
            assert sum(p.numel() for p in bare.parameters() if p.requires_grad) == numbers


@pytest.mark.parametrize("cell", [specimens.SMALL, specimens.BY_NAME["3-D expert"]], ids=lambda c: c.name)
def test_a_whole_model_can_be_pickled_by_its_owner(slug, cell):
    """As torch.save does with a module, though weft's own files hold no pickle."""
    if cell.kind in weft.card(slug).refuses:
        return
    model = harness.randomise(harness.attach(slug, cell))
    assert torch.equal(harness.outputs(pickle.loads(pickle.dumps(model))), harness.outputs(model))
