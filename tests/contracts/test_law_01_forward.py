"""Law 1. Forward is the matrix: in eval mode, layer(x) = base(x) + x·ΔWᵀ + Δb, whatever the config says."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import harness
import pytest
import specimens
import torch

import weft


def numeric_fields(slug: str) -> dict[str, dataclasses.Field[Any]]:
    """Own fields whose type holds a number or a truth value; where to attach is another law's subject."""
    hints = typing.get_type_hints(weft.config_class(slug))
    found = {}
    for name, field in harness.fields(slug).items():
        kinds = {hints[name], *typing.get_args(hints[name])}
        if kinds & {int, float, bool} and name not in ("split_qkv", "require_groups", "layers_to_transform"):
            found[name] = field
    return found


def values(field: dataclasses.Field[Any], hint: Any) -> list[Any]:
    """Settings around the default, and small ones where there is none."""
    default, kinds = field.default, {hint, *typing.get_args(hint)}
    if bool in kinds:
        return [True, False]
    if int in kinds:
        near = [default - 1, default + 1, 2 * default] if isinstance(default, int) else []
        return sorted({1, 2, 5, 13, *[v for v in near if v > 0]})
    return [0.03, 0.5, 1.0, 3.0] + ([0.5 * default, 2.0 * default] if isinstance(default, float) and default else [])


def is_the_matrix(model: torch.nn.Module, tolerance: float) -> None:
    seen = harness.watch_forward(harness.randomise(model))
    assert seen
    for one in seen:
        assert harness.relative(one.output, harness.reference(one)) <= tolerance, one.layer.module_name


def test_every_numeric_field(slug):
    hints = typing.get_type_hints(weft.config_class(slug))
    for name, field in numeric_fields(slug).items():
        accepted = []
        for value in values(field, hints[name]):
            try:
                model = harness.attach(slug, dtype=torch.float64, short=True, **{name: value})
            except weft.UsageError:
                continue  # a value that the method refuses by name; which ones is for its own tests
            is_the_matrix(model, 1e-10)
            accepted.append(value)
        assert any(value != field.default for value in accepted) or bool in {hints[name]}, (
            f"{slug}: no other value of {name} could be tried"
        )


def test_a_scale_that_the_config_has_is_in_the_maths(slug):
    """No field for show: where there is an α, ΔW is proportional to it."""
    for name in harness.fields(slug):
        if name.endswith("alpha"):
            once, thrice = (
                [
                    harness.delta_weight(layer)
                    for _, layer in harness.layers(
                        harness.randomise(harness.attach(slug, dtype=torch.float64, **{name: alpha}))
                    )
                ]
                for alpha in (2.0, 6.0)
            )
            for a, b in zip(once, thrice, strict=True):
                assert harness.relative(b, 3 * a) <= 1e-10 and a.norm() > 0


@pytest.mark.parametrize(
    "cell", [specimens.BY_NAME["Linear"], specimens.BY_NAME["Conv1D"], specimens.SMALL], ids=lambda c: c.name
)
def test_float64(slug, cell):
    is_the_matrix(harness.attach(slug, cell, torch.float64), 1e-10)


@pytest.mark.parametrize(
    "cell", [specimens.BY_NAME["Linear"], specimens.BY_NAME["Conv1D"], specimens.WIDE], ids=lambda c: c.name
)
def test_float32(slug, cell):
    is_the_matrix(harness.attach(slug, cell), 1e-5)


@pytest.mark.parametrize(
    "cell", [specimens.BY_NAME["Linear"], specimens.BY_NAME["Conv1D"], specimens.WIDE], ids=lambda c: c.name
)
def test_bfloat16_errs_at_most_twice_as_much_as_the_dense_product(slug, cell):
    model = harness.randomise(harness.attach(slug, cell, torch.bfloat16))
    ours = dense = 0.0  # squared errors over all layers, so that one lucky layer decides nothing
    for one in harness.watch_forward(model):
        exact = harness.reference(one)
        assert one.output.dtype == torch.bfloat16
        ours += float((one.output.double() - exact).square().sum())
        dense += float((harness.reference(one, dtype=torch.bfloat16).double() - exact).square().sum())
    assert ours <= 4 * dense


def test_trained_state(slug, tmp_path):
    """Not only around the start: after steps with the method's events, at the rank that is then in force."""
    model = harness.attach(slug, dtype=torch.float64, short=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 12)
    model.eval()
    for one in harness.watch_forward(model):
        assert harness.relative(one.output, harness.reference(one)) <= 1e-10
