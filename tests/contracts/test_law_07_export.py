"""Law 7. Exports: exact factors never pass through an SVD, and PEFT without weft gives the same outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import export_worker
import forked
import harness
import pytest
import specimens
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import weft
from weft.adapters._delta import LowRankDelta

LORA = ["Linear", "Conv1D", "fused qkv", "fused qkv, Conv1D", "Embedding", "plain Conv2d", "3-D expert", "Mlp"]
FORMS = {"lora": {"to": "lora"}, "compact": {"to": "lora", "compact": True}, "merged": {"to": "merged"}}
CASES = [(name, "lora") for name in LORA]
CASES += [("Linear", "compact"), ("Linear", "merged"), ("Conv1D", "merged"), ("3-D expert", "merged")]


def cell_of(name: str) -> specimens.Cell:
    return next(c for c in [*specimens.CELLS, specimens.SMALL, specimens.PLAIN_CONV] if c.name == name)


def trained(slug: str, cell: specimens.Cell, folder: Path, **given) -> torch.nn.Module:
    model = harness.attach(slug, cell, short=True, **given)
    optimizer, _ = harness.optimizer_for(model, folder)
    harness.train(model, optimizer, 12, rows=4)
    return harness.randomise_open(model).eval()


def is_served(slug: str, cell: specimens.Cell, form: str) -> bool:
    card = weft.card(slug)
    return cell.kind not in card.refuses and (form == "merged" or card.exports != "refused")


def export_all(root: Path) -> None:
    """Every case in a folder of its own, and one process that loads them all. An export leaves its model as it was."""
    for slug in harness.SLUGS:
        made: dict[str, tuple[torch.nn.Module, torch.Tensor]] = {}
        for i, (name, form) in enumerate(CASES):
            cell = cell_of(name)
            if not is_served(slug, cell, form):
                continue
            folder = root / f"{slug}-{i}"
            folder.mkdir()
            if name not in made:
                model = trained(slug, cell, folder)
                made[name] = model, harness.outputs(model)
            model, expected = made[name]
            save_file({"logits": expected}, folder / "expected.safetensors")
            try:
                report = weft.export(model, folder / "out", **FORMS[form])
            except Exception as error:
                (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
                continue
            (folder / "report.txt").write_text(report)
            (folder / "case.json").write_text(json.dumps({"cell": name, "form": form}))
    done = forked.run([export_worker.__file__, root])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(once) -> Path:
    return once("exported", export_all)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}-{form}" for name, form in CASES])
def test_it_gives_the_same_outputs_without_weft(slug, case, exported):
    name, form = CASES[case]
    if not is_served(slug, cell_of(name), form):
        return
    folder = exported / f"{slug}-{case}"
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    expected, found = (load_file(folder / f"{n}.safetensors")["logits"] for n in ("expected", "logits"))
    printed = float(re.search(r"error of a (?:ΔW|merged weight): ([0-9.e+-]+)", (folder / "report.txt").read_text())[1])
    if form == "merged" or weft.card(slug).exports == "exact":
        assert printed <= 1e-5 and harness.relative(found, expected) <= 1e-5
    else:
        assert harness.relative(found, expected) <= max(1e-5, 10 * printed)


@pytest.mark.slow
def test_the_default_form_is_what_vllm_reads(slug, exported):
    """One r, lora_alpha = r, no patterns, every factor of that rank, targets that are named and have a rank."""
    for i, (name, form) in enumerate(CASES):
        if form == "merged" or not is_served(slug, cell_of(name), form):
            continue
        config = json.loads((exported / f"{slug}-{i}" / "out" / "adapter_config.json").read_text())
        tensors = load_file(exported / f"{slug}-{i}" / "out" / "adapter_model.safetensors")
        assert config["peft_type"] == "LORA" and not config["use_rslora"] and not config["use_dora"]
        if form == "compact":
            assert config["rank_pattern"] == config["alpha_pattern"] != {}
            continue
        r = config["r"]
        assert config["lora_alpha"] == r and not config["rank_pattern"] and not config["alpha_pattern"]
        assert isinstance(config["target_modules"], list)
        assert config["lora_bias"] == any(key.endswith("lora_B.bias") for key in tensors)
        for key, t in tensors.items():
            if "expert" not in name and not key.endswith("lora_B.bias"):
                axis = 0 if "lora_A" in key or "embedding_A" in key else 1
                assert t.shape[axis] == r, key


def test_exact_factors_never_meet_an_svd(slug, tmp_path, monkeypatch):
    card = weft.card(slug)
    model = trained(slug, specimens.SMALL, tmp_path)
    if card.exports != "exact":
        assert "exports" in card.reasons
        return
    assert all(isinstance(d, LowRankDelta) for d in harness.deltas(model))
    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, lambda *a, **k: pytest.fail("an SVD"))
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a, **k: pytest.fail("an eigendecomposition"))
    weft.export(model, tmp_path / "out", to="lora")


def test_modules_of_rank_zero_are_left_out(slug, tmp_path):
    """As a rank that is learned may end: nothing is left of one module."""
    model = trained(slug, specimens.SMALL, tmp_path)
    first = harness.deltas(model)[0]
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    if first.compact(first.state_dict())[1] != 0:
        return  # the rank of such a method never falls
    expected = harness.outputs(model)
    weft.export(model, tmp_path / "out", to="lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["second"]
    again = PeftModel.from_pretrained(specimens.base(specimens.SMALL), str(tmp_path / "out"))
    assert harness.relative(harness.outputs(again), expected) <= 1e-5


@pytest.mark.parametrize("rank", [1, 2])
def test_a_smaller_rank_prints_what_it_costs(slug, rank, tmp_path):
    if weft.card(slug).exports == "refused":
        return
    model = trained(slug, specimens.SMALL, tmp_path)
    exact = {layer.module_name: harness.delta_weight(layer).double() for _, layer in harness.layers(model)}
    report = weft.export(model, tmp_path / "out", to="lora", rank=rank)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] <= rank
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    worst = 0.0
    for name, dense in exact.items():
        a, b = (tensors.get(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        made = torch.zeros_like(dense) if a is None or b is None else b.double() @ a.double()
        worst = max(worst, harness.relative(made, dense))
    assert f"{worst:.1e}" in report


def test_the_adapter_itself(slug, tmp_path):
    cell = specimens.BY_NAME["Linear"]
    model = trained(slug, cell, tmp_path)
    weft.export(model, tmp_path / "out", to="adapter")
    again = PeftModel.from_pretrained(specimens.base(cell), str(tmp_path / "out"))
    assert torch.equal(harness.outputs(again), harness.outputs(model))


def test_a_refusal_is_by_name_and_leaves_nothing_behind(slug, tmp_path):
    card = weft.card(slug)
    if card.exports == "refused":
        model = trained(slug, specimens.SMALL, tmp_path)
        with pytest.raises(weft.UsageError, match=rf"{slug} has no plain LoRA form"):
            weft.export(model, tmp_path / "out", to="lora")
    elif "Conv" not in card.refuses:
        reasons = {"grouped Conv2d": "grouped is a grouped convolution", "Conv2d": "conv is a convolution that pads"}
        for name, reason in reasons.items():  # PEFT's LoRA would compute something else, silently
            model = trained(slug, specimens.BY_NAME[name], tmp_path)
            with pytest.raises(weft.UsageError, match=f"{reason}.*merged"):
                weft.export(model, tmp_path / "out", to="lora")
    assert not list(tmp_path.glob("*out*"))
