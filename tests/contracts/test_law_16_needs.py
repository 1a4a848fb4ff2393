"""Law 16. What a method must see before it attaches is declared, served by `weft.prepare`, and refused without."""

from __future__ import annotations

import harness
import pytest
import specimens
import torch
from peft import PeftModel, get_peft_model

import weft

KNOWN = {"batches", "held_out", "quality", "original_weights"}


def bare(slug: str):
    return weft.config_class(slug)(**harness.options(slug, **specimens.SMALL.target))


def test_needs_are_known_and_nothing_else_is_asked(slug):
    assert set(weft.card(slug).needs) <= KNOWN
    if not weft.card(slug).needs:
        model = specimens.base(specimens.SMALL)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        config = bare(slug)
        assert weft.prepare(model, config) is config
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_an_unserved_need_is_refused_by_name(slug):
    for need in weft.card(slug).needs:
        model = specimens.base(specimens.SMALL)
        others = {k: v for k, v in harness.served(slug, model).items() if k != need}
        with pytest.raises(weft.UsageError, match=need):
            weft.prepare(model, bare(slug), **others)
        with pytest.raises(weft.UsageError, match="weft.prepare"):
            get_peft_model(model, bare(slug))


def test_preparing_leaves_the_model_as_it_was(slug):
    model = specimens.base(specimens.SMALL).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    harness.configure(slug, model, specimens.SMALL)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad == flags[k] for k, p in model.named_parameters())
    assert not model.training


def test_reloading_needs_nothing(slug, tmp_path, monkeypatch):
    model = harness.randomise(harness.attach(slug))
    model.save_pretrained(str(tmp_path))
    expected = harness.outputs(model)
    monkeypatch.setattr("weft.adapters._training.prepare", lambda *a, **k: pytest.fail("reloading prepared"))
    again = PeftModel.from_pretrained(specimens.base(specimens.SMALL), str(tmp_path))
    assert torch.equal(harness.outputs(again), expected)
