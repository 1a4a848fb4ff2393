"""Law 10. Training creates, resizes and removes no Parameter; what is closed keeps still; files hold what is open."""

from __future__ import annotations

import json

import harness
import specimens
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from weft.adapters._delta import Delta, named_leaves

STEPS = 30


def inventory(model) -> dict[str, tuple[int, tuple[int, ...], bool]]:
    return {n: (id(p), tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()}


def ranks(model) -> list[int | None]:
    """What the method would write as each delta's rank now."""
    return [d.compact(d.state_dict())[1] for d in harness.deltas(model)]


def snapshot(optimizer, parameters: list[Tensor]) -> dict[tuple[int, str], Tensor]:
    found = {(i, ""): p.detach().clone() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        state = optimizer.state.get(p, {})
        found |= {(i, k): v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}
    return found


def test_nothing_is_created_resized_or_removed(slug, tmp_path):
    model = harness.attach(slug, specimens.BY_NAME["Linear"], short=True)
    optimizer, scheduler = harness.optimizer_for(model, tmp_path, steps=STEPS)
    before, start = inventory(model), ranks(model)
    groups = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    seen = [start]
    for i in range(STEPS):
        harness.train(model, optimizer, 1, first=i)
        scheduler.step()
        assert inventory(model) == before
        assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == groups
        seen.append(ranks(model))
    if any(r is not None for r in start):
        assert any(now != start for now in seen), "no rank event happened: a field of the config needs a `short` value"


def test_closed_entries_see_no_decay_momentum_or_step(slug, tmp_path, monkeypatch):
    """What is closed before a step and after it keeps its bits in between, the optimiser's state too."""
    switches = [name for name, f in harness.fields(slug).items() if isinstance(f.default, bool)]
    for given in [{}, *({name: not harness.fields(slug)[name].default} for name in switches)]:
        with monkeypatch.context() as patch:
            keeps_still(harness.attach(slug, short=True, **given), tmp_path, patch)


def keeps_still(model, tmp_path, monkeypatch) -> None:
    optimizer, _ = harness.optimizer_for(model, tmp_path, steps=STEPS, weight_decay=0.1)
    asked: list[dict[Tensor, Tensor]] = []
    for c in harness.controllers(model):
        inner = c.update_scales

        def recorded(inner=inner):
            asked.append({p: s.clone() for p, s in inner().items()})
            return asked[-1]

        monkeypatch.setattr(c, "update_scales", recorded)
    parameters = list(harness.trainable(model).values())
    for i in range(STEPS):
        old = snapshot(optimizer, parameters)
        harness.train(model, optimizer, 1, first=i)
        new = snapshot(optimizer, parameters)
        then = {id(p): s == 0 for p, s in asked[-1].items()}
        now = {id(p): s == 0 for c in harness.controllers(model) for p, s in c.update_scales().items()}
        closed = {key: mask & now[key] for key, mask in then.items() if key in now}
        for (j, key), value in new.items():
            mask = closed.get(id(parameters[j]))
            if mask is not None:
                was = old.get((j, key), torch.zeros_like(value))
                mask = mask.expand_as(value)
                assert torch.equal(value[mask], was[mask]), f"step {i}, tensor {j} {key}"


def test_saving_compacts_to_active_ranks(slug, tmp_path):
    cell = specimens.BY_NAME["Linear"]
    model = harness.attach(slug, cell, short=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path, steps=STEPS)
    harness.train(model, optimizer, 20)
    expected = harness.outputs(model)
    model.save_pretrained(str(tmp_path))
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    for name, layer in harness.layers(model):
        for i, (prefix, delta) in enumerate(named_leaves(layer.deltas["default"]).items()):
            assert isinstance(delta, Delta)
            compacted, rank = delta.compact(delta.state_dict())
            assert pattern.get(layer.module_name + (f"#{i}" if prefix else "")) == rank
            root = f"{name}.weft_{slug}_delta.{prefix}"
            assert {k: tuple(t.shape) for k, t in compacted.items()} == {
                k.removeprefix(root): s for k, s in shapes.items() if k.startswith(root)
            }
    again = PeftModel.from_pretrained(specimens.base(cell), str(tmp_path))
    assert torch.equal(harness.outputs(again), expected)
