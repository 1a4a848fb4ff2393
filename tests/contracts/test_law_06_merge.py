"""Law 6. Merged = unmerged: one rounding of float32 W + ΣΔW, every ΔW from the original W; then the old bits back."""

from __future__ import annotations

import logging

import harness
import pytest
import specimens
import torch
from torch import nn

import weft
from weft.adapters._controller import Controller

DTYPES = [torch.float32, torch.bfloat16]
BIASED = specimens.Cell("Mlp with biases", "Linear", lambda: specimens.Mlp(bias=True), specimens.SMALL.target)
CELLS = [c for c in specimens.CELLS if c.name != "Conv2d"] + [specimens.SMALL]


def originals(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad and "_delta" not in n}


def tensor_of(layer) -> torch.Tensor:
    return getattr(layer.get_base_layer(), harness.parameter_name(layer)).detach()


def or_refused(slug: str, cell: specimens.Cell) -> None:
    if cell.kind in weft.card(slug).refuses:
        pytest.skip(f"refused by name: {weft.card(slug).refuses[cell.kind]}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_two_adapters_merge_by_one_rounding_and_come_out_again(slug, cell, dtype):
    or_refused(slug, cell)
    model = harness.attach_two(slug, cell, dtype)
    before = originals(model)
    expected = {}
    for name, layer in harness.layers(model):
        total = tensor_of(layer).float()
        for adapter in ("default", "second"):
            total = total + harness.delta_weight(layer, adapter).float()
        expected[name] = total.to(dtype)
    unmerged = harness.outputs(model)
    if not harness.merges(model, adapter_names=["default", "second"]):
        return
    for name, layer in harness.layers(model):
        assert torch.equal(tensor_of(layer), expected[name]), name
    merged = harness.outputs(model)
    if dtype == torch.float32:
        assert harness.relative(merged, unmerged) <= 1e-5
    model.unmerge_adapter()
    after = originals(model)
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    assert torch.equal(harness.outputs(model), unmerged)


def test_one_after_the_other_is_both_at_once(slug):
    model = harness.attach_two(slug, BIASED, dtype=torch.bfloat16)
    before = originals(model)
    model.merge_adapter(["default", "second"])
    together = [tensor_of(layer).clone() for _, layer in harness.layers(model)]
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    for (name, layer), expected in zip(harness.layers(model), together, strict=True):
        assert torch.equal(tensor_of(layer), expected), name
    model.unmerge_adapter()
    after = originals(model)
    assert all(torch.equal(t, after[k]) for k, t in before.items())


def test_a_delta_reads_the_original_weight_while_another_is_merged(slug):
    model = harness.attach_two(slug, BIASED)
    alone = [harness.delta_weight(layer, "second").clone() for _, layer in harness.layers(model)]
    model.merge_adapter(["default"])
    for (_, layer), expected in zip(harness.layers(model), alone, strict=True):
        assert torch.equal(harness.delta_weight(layer, "second"), expected)
    with pytest.raises(weft.UsageError, match="unmerge"):
        model.add_adapter("third", weft.config_class(slug)(**harness.options(slug, **BIASED.target)))


@pytest.mark.parametrize("cell", [specimens.BY_NAME["Linear"], specimens.BY_NAME["Conv1D"]], ids=lambda c: c.name)
def test_merge_and_unload_leaves_a_plain_model(slug, cell):
    model = harness.randomise(harness.attach(slug, cell))
    if not harness.merges(model):
        return
    merged = harness.outputs(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload(safe_merge=True)
    assert torch.equal(harness.outputs(plain), merged)
    assert plain.state_dict().keys() == specimens.base(cell).state_dict().keys()


def test_the_error_of_merging_is_printed(slug, caplog):
    model = harness.randomise(harness.attach(slug, BIASED, torch.bfloat16))
    worst = 0.0
    for _, layer in harness.layers(model):
        exact = tensor_of(layer).float() + harness.delta_weight(layer).float()
        worst = max(worst, harness.relative(exact.bfloat16(), exact))
    with caplog.at_level(logging.INFO, "weft"):
        model.merge_adapter()
    assert f"{worst:.1e}" in caplog.text


def test_nan_is_not_merged(slug):
    model = harness.attach(slug, BIASED)
    before = originals(model)
    with torch.no_grad():
        for p in harness.trainable(model).values():
            p.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    after = originals(model)
    assert all(torch.equal(t, after[k]) for k, t in before.items())


def test_a_bias_shift_needs_a_bias(slug):
    model = harness.randomise(harness.attach(slug))
    homeless = [
        name
        for name, layer in harness.layers(model)
        if harness.delta_bias(layer) is not None and layer.get_base_layer().bias is None
    ]
    if not homeless:
        model.merge_adapter()  # ΔW always finds its place, and so does what moves a bias that is there
        return
    before = originals(model)
    assert not harness.merges(model)
    after = originals(model)  # nothing was half done
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    assert not any(layer.merged for _, layer in harness.layers(model))


def test_training_goes_on_after_unmerging(slug, tmp_path):
    first, second = (harness.attach(slug, BIASED, short=True) for _ in range(2))
    for model in (first, second):
        optimizer, _ = harness.optimizer_for(model, tmp_path)
        harness.train(model, optimizer, 3)
        if model is first:
            model.merge_adapter()
            model.unmerge_adapter()
        harness.train(model, optimizer, 3, first=3)
    for (name, a), b in zip(harness.trainable(first).items(), harness.trainable(second).values(), strict=True):
        assert torch.equal(a, b), name
    assert all(isinstance(c, Controller) and c.step == 6 for c in harness.controllers(first))
