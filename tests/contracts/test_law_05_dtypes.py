"""Law 5. Dtypes are declared per tensor: on a bfloat16 base, and through casts, an adapter keeps its bits."""

from __future__ import annotations

import copy
import itertools

import harness
import pytest
import specimens
import torch
from peft import get_peft_model
from torch import Tensor, nn

CELLS = [specimens.SMALL, specimens.BY_NAME["Linear"], specimens.BY_NAME["fused qkv, Conv1D"]]
CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "cast_adapter_dtype": lambda m: m.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True) or m,
}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the adapter, frozen ones included."""
    return {
        f"{i}.{name}": t
        for i, delta in enumerate(harness.deltas(model))
        for name, t in itertools.chain(delta.named_parameters(), delta.named_buffers())
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype, f"{name}: {t.dtype} and {b[name].dtype}"
        assert torch.equal(t, b[name]), name


def shared(model: nn.Module) -> list[list[str]]:
    """Which entries are one and the same Parameter."""
    found: dict[int, list[str]] = {}
    for name, t in state(model).items():
        if isinstance(t, nn.Parameter):
            found.setdefault(id(t), []).append(name)
    return list(found.values())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_a_bfloat16_base_gets_the_bits_of_its_float32_copy(slug, cell, autocast):
    narrow = specimens.base(cell, torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    config = harness.configure(slug, wide, cell)
    models = []
    for model, own in ((narrow, copy.deepcopy(config)), (wide, config)):
        torch.manual_seed(7)
        models.append(get_peft_model(model, own, autocast_adapter_dtype=autocast))
    same(state(models[0]), state(models[1]))
    for name, t in state(models[0]).items():
        assert not t.is_floating_point() or t.dtype == torch.float32, f"{name} is {t.dtype}"
    assert harness.outputs(models[0]).dtype == torch.bfloat16


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_adapter_alone(slug, cast):
    model = harness.randomise(harness.attach(slug, specimens.BY_NAME["Linear"]))
    before, together = {k: v.clone() for k, v in state(model).items()}, shared(model)
    CASTS[cast](model)
    same(before, state(model))
    assert shared(model) == together


@pytest.mark.parametrize("cast", ["bfloat16()", "to(bfloat16)"])
def test_a_cast_model_trains(slug, cast, tmp_path):
    model = CASTS[cast](harness.attach(slug, specimens.BY_NAME["Linear"], short=True))
    before = {k: v.detach().clone() for k, v in harness.trainable(model).items()}
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 3)
    after = harness.trainable(model)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in after.values())
    assert any(not torch.equal(t, before[k]) for k, t in after.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_trains_under_autocast(slug, dtype):
    """Gradients in bfloat16 point where those in float32 do, through layers on top of adapted ones as well.

    On weights that are rounded themselves, factors that come from a decomposition of them may be others.
    """
    found = []
    for enabled in (True, False):
        model = harness.attach(slug, specimens.BY_NAME["Linear"], dtype if enabled else torch.float32)
        model = harness.randomise(model).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**specimens.batch(0)).loss
        loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in harness.trainable(model).values()]))
    assert torch.isfinite(found[0]).all()
    assert dtype is torch.bfloat16 or torch.cosine_similarity(*found, dim=0) > 0.9
