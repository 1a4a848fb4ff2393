"""Law 9. A method declares its parameter groups, weft's optimiser honours them, any other is refused."""

from __future__ import annotations

import harness
import pytest
import specimens
import torch

import weft
from weft.adapters._delta import Group

LR, DECAY = 0.02, 0.05


def declared(model) -> dict[int, Group]:
    """What the method asks for, by the parameter's id."""
    return {
        id(p): group
        for d in harness.deltas(model)
        for name, group in d.groups(d.config).items()
        for n, p in d.named_parameters()
        if n == name
    }


def plain(model, **settings):
    """One group for everything, as torch users write it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, **settings)


def one_step(model, optimizer) -> None:
    model.train()
    model(**specimens.batch(0)).loss.backward()
    optimizer.step()


def contradicts(model, settings: dict[str, float]) -> bool:
    """Whether one group with these settings denies what some tensor asks for."""
    groups = declared(model).values()
    others = len(declared(model)) < len(harness.trainable(model))
    return any(
        (g.weight_decay is not None and g.weight_decay != settings["weight_decay"])
        or (g.eps is not None and g.eps != settings["eps"])
        or (g.lr is not None and g.lr != LR)
        or (g.lr_factor != 1.0 and others)
        for g in groups
    )


@pytest.mark.parametrize("short", [False, True])
def test_the_optimiser_has_every_parameter_once_with_what_it_asks_for(slug, short, tmp_path):
    model = harness.attach(slug, specimens.BY_NAME["Linear"], short=short)
    optimizer, scheduler = harness.optimizer_for(model, tmp_path, lr=LR, weight_decay=DECAY)
    wanted = declared(model)
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in harness.trainable(model).values())
    for group in optimizer.param_groups:
        for p in group["params"]:
            ask = wanted.get(id(p), Group())
            base = LR if ask.lr is None else ask.lr
            assert group["initial_lr"] == pytest.approx(base * ask.lr_factor, rel=1e-12)
            assert group["weight_decay"] == (DECAY if ask.weight_decay is None else ask.weight_decay)
            assert group["eps"] == (1e-8 if ask.eps is None else ask.eps)
    one_step(model, optimizer)
    scheduler.step()


SETTINGS = [{"weight_decay": DECAY, "eps": 1e-8}, {"weight_decay": 0.0, "eps": 1e-8}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["decay", "no decay"])
def test_an_optimiser_without_the_groups_is_refused(slug, settings):
    model = harness.attach(slug)
    optimizer = plain(model, **settings)
    if not contradicts(model, settings):
        one_step(model, optimizer)
        return
    before = {n: p.detach().clone() for n, p in harness.trainable(model).items()}
    with pytest.raises(weft.UsageError, match=r"weft\.optimizer_and_scheduler.*require_groups=False"):
        one_step(model, optimizer)
    assert all(torch.equal(p, before[n]) for n, p in harness.trainable(model).items())


def test_unless_told_otherwise(slug):
    model = harness.attach(slug, require_groups=False)
    one_step(model, plain(model, weight_decay=DECAY))
    assert all(c.step == 1 for c in harness.controllers(model))


def test_nothing_is_ever_frozen_by_requires_grad(slug, tmp_path):
    """Freezing for a while masks gradient and update; PEFT's disable_adapter() would undo a flag."""
    interrupted, straight = (harness.attach(slug, short=True) for _ in range(2))
    everything = {n for n, p in interrupted.named_parameters() if p.requires_grad}
    for model in (interrupted, straight):
        optimizer, _ = harness.optimizer_for(model, tmp_path)
        for i in range(12):
            harness.train(model, optimizer, 1, first=i)
            assert {n for n, p in model.named_parameters() if p.requires_grad} == everything
            if model is interrupted:
                with model.disable_adapter():
                    harness.outputs(model)
                model.train()
    for (name, a), b in zip(harness.trainable(interrupted).items(), harness.trainable(straight).values(), strict=True):
        assert torch.equal(a, b), name
