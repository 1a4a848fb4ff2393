"""Law 2. |ΔW| relative to |W| starts in the interval that the card states, tested from both sides."""

from __future__ import annotations

import harness
import pytest
import specimens
import torch

import weft


@pytest.mark.parametrize(
    "cell", [specimens.SMALL, specimens.BY_NAME["Linear"], specimens.BY_NAME["Conv1D"]], ids=lambda c: c.name
)
def test_drift_lies_in_the_stated_interval(slug, cell):
    low, high = weft.card(slug).init_drift
    for seed in range(3):
        model = harness.attach(slug, cell, start=seed)
        for _, layer in harness.layers(model):
            weight = layer.get_base_layer().weight.detach().double()
            drift = float(harness.delta_weight(layer).double().norm() / weight.norm())
            assert low <= drift <= high, f"{layer.module_name}: |ΔW|/|W| = {drift:.3e}"


def test_a_departure_from_zero_has_its_reason_and_a_lower_end(slug):
    card = weft.card(slug)
    low, high = card.init_drift
    assert 0 <= low <= high
    if high > 0:
        assert low > 0, "an interval that holds zero says nothing from below"
        assert "init_drift" in card.reasons


def test_no_drift_leaves_outputs_alone(slug):
    if weft.card(slug).init_drift != (0.0, 0.0):
        return  # outputs of such a method move with ΔW, whose size the law above bounds
    model = harness.attach(slug, specimens.BY_NAME["Linear"])
    assert torch.equal(harness.outputs(model), harness.outputs(specimens.base(specimens.BY_NAME["Linear"])))
