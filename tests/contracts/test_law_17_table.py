"""Law 17. Where a method works is a table; every cell is tried, or refused by name."""

from __future__ import annotations

import harness
import pytest
import specimens
import torch
from peft import get_peft_model
from torch import nn

import weft
from weft.adapters._delta import Delta


@pytest.fixture(params=specimens.CELLS, ids=lambda c: c.name)
def cell(request):
    return request.param


def attached(slug, cell, **given):
    """The model, or None where the card refuses this kind; a refusal names method, module and reason."""
    refused = weft.card(slug).refuses.get(cell.kind)
    if refused is None:
        return harness.attach(slug, cell, torch.float64, **given)
    targets = cell.target.get("target_modules") or cell.target["target_parameters"]
    with pytest.raises(weft.UsageError) as caught:
        harness.attach(slug, cell)
    assert slug in str(caught.value) and refused in str(caught.value) and cell.kind in str(caught.value)
    assert any(t.rpartition(".")[2] in str(caught.value) for t in targets)
    return None


def test_forward_is_the_matrix(slug, cell):
    if (model := attached(slug, cell)) is None:
        return
    seen = harness.watch_forward(harness.randomise(model))
    assert seen
    for one in seen:
        assert harness.relative(one.output, harness.reference(one)) <= 1e-10, one.layer.module_name
        plain = one.layer.get_base_layer()
        args = [harness.to(torch.float64, a) for a in one.args]
        assert harness.relative(plain(*args, **one.kwargs).detach(), one.output) > 1e-6  # ΔW does something


def test_merged_is_unmerged(slug, cell):
    if (model := attached(slug, cell)) is None:
        return
    expected = harness.outputs(harness.randomise(model))
    if not harness.merges(model):
        return
    assert harness.relative(harness.outputs(model), expected) <= 1e-10
    model.unmerge_adapter()
    assert torch.equal(harness.outputs(model), expected)


def test_it_learns(slug, cell, tmp_path):
    if (model := attached(slug, cell)) is None:
        return
    optimizer, _ = harness.optimizer_for(model, tmp_path, lr=weft.card(slug).recipe.get("learning_rate", 1e-3) * 3)
    data = specimens.batch(3, 8)

    def loss() -> torch.Tensor:
        return model(**data).loss

    with torch.no_grad():
        before = float(loss())
    model.train()
    for _ in range(20):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert float(loss()) < before


def test_an_expert_is_made_dense_once_a_forward(slug, monkeypatch):
    for cell in specimens.CELLS:
        if cell.kind != "3-D expert" or cell.kind in weft.card(slug).refuses:
            continue
        model = harness.attach(slug, cell)
        calls: dict[int, int] = {}
        for delta in harness.deltas(model):
            inner = delta.delta

            def counted(delta=delta, inner=inner, calls=calls):
                calls[id(delta)] = calls.get(id(delta), 0) + 1
                return inner()

            monkeypatch.setattr(delta, "delta", counted)
        harness.outputs(model)
        assert len(calls) == len(harness.deltas(model)) and set(calls.values()) == {1}


def test_a_weight_quantised_in_an_unknown_way_is_refused_by_name(slug):
    model = specimens.base(specimens.SMALL)
    config = harness.configure(slug, model, specimens.SMALL)
    model.first.weight = nn.Parameter(model.first.weight.mul(40).to(torch.int8), requires_grad=False)
    with pytest.raises(weft.UsageError, match=r"first is quantised"):
        get_peft_model(model, config)


def test_a_tied_weight_is_refused_with_the_remedy(slug):
    for target in ("lm_head", "embed_tokens"):
        cell = specimens.Cell(
            "tied", "Linear", lambda: specimens.llama(tie_word_embeddings=True), {"target_modules": [target]}
        )
        if "Embedding" in weft.card(slug).refuses and target == "embed_tokens":
            continue
        with pytest.raises(weft.UsageError, match=f"{target}.*tie_word_embeddings=False"):
            harness.attach(slug, cell)


def test_a_rank_above_a_side_is_refused(slug):
    if "r" not in harness.fields(slug):
        pytest.skip("the method has no rank of its own")
    with pytest.raises(weft.UsageError, match=r"r=8.*second.*7 × 13"):
        harness.attach(slug, r=8)


@pytest.mark.parametrize("r", [0, -1, 2.5, True])
def test_a_rank_that_is_none_is_refused(slug, r):
    if "r" not in harness.fields(slug):
        pytest.skip("the method has no rank of its own")
    with pytest.raises(weft.UsageError, match="r="):
        weft.config_class(slug)(r=r)


def test_unknown_keys_raise(slug):
    config = weft.config_class(slug)
    own = next(iter(harness.fields(slug)))
    with pytest.raises(weft.UsageError, match=rf"{slug}.*{own}x.*{own!r}"):
        config.from_options({f"{own}x": 1})
    with pytest.raises(TypeError, match=f"{own}x"):
        config(**{f"{own}x": 1})


def test_targets_that_match_nothing_are_refused_with_what_there_is(slug):
    cell = specimens.Cell("none", "Linear", specimens.Mlp, {"target_modules": ["third"]})
    with pytest.raises(weft.UsageError, match=r"third.*first.*second"):
        harness.attach(slug, cell)


def test_every_delta_is_reached(slug):
    """What the table tried are the method's own deltas, one a matrix: blocks and experts have one each."""
    expected = {"Linear": 14, "Conv1D": 8, "3-D expert": 6, "fused qkv": 3, "fused qkv, Conv1D": 6}
    for name, count in expected.items():
        cell = specimens.BY_NAME[name]
        if cell.kind not in weft.card(slug).refuses:
            found = harness.deltas(harness.attach(slug, cell))
            assert len(found) == count and all(isinstance(d, Delta) for d in found), name
