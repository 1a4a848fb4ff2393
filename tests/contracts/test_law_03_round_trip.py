"""Law 3. A saved adapter gives the same bits in a new process, however it is loaded, with one thread and with two."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import harness
import pytest
import reload_worker
import specimens
import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import weft

THREADS = (1, 2)
CELLS = [specimens.BY_NAME[n] for n in ("Linear", "fused qkv, Conv1D", "grouped Conv2d", "3-D expert")] + [
    specimens.WIDE
]


def save_trained(slug: str, cell: specimens.Cell, folder: Path) -> torch.nn.Module:
    """An adapter in the middle of its life: trained past an event, every tensor moved."""
    model = harness.randomise(harness.attach(slug, cell, short=True), scale=0.05)
    optimizer, _ = harness.optimizer_for(model, folder)
    harness.train(model, optimizer, 5, rows=4)
    model.eval().save_pretrained(str(folder))
    return model


def write_verdicts(root: Path) -> None:
    """One process a number of threads, for all methods at once."""
    for slug in harness.SLUGS:
        for i, cell in enumerate(CELLS):
            if cell.kind in weft.card(slug).refuses:
                continue
            folder = root / f"{slug}-{i}"
            model = save_trained(slug, cell, folder)
            for threads in THREADS:
                torch.set_num_threads(threads)
                save_file({"logits": harness.outputs(model)}, folder / f"expected.{threads}.safetensors")
            torch.set_num_threads(1)
            (folder / "case.json").write_text(json.dumps({"slug": slug, "cell": cell.name}))
    forked.together([[reload_worker.__file__, root, n] for n in THREADS], harness.TIME_LIMIT)


@pytest.fixture(scope="module")
def verdicts(once) -> dict[int, dict[str, str]]:
    root = once("round-trip", write_verdicts)
    return {n: json.loads((root / f"verdicts.{n}.json").read_text()) for n in THREADS}


@pytest.mark.slow
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_a_new_process_gives_the_same_bits(slug, cell, threads, verdicts):
    own = {k: v for k, v in verdicts[threads].items() if k.startswith(f"{slug}|{cell.name}|")}
    if cell.kind in weft.card(slug).refuses:
        assert not own
        return
    assert len(own) == len(list(reload_worker.ways(cell)))
    assert not any(own.values()), "\n".join(f"{k}: {v}" for k, v in own.items() if v)


LINEAR = specimens.BY_NAME["Linear"]


def load_state_dict(folder: Path, cell: specimens.Cell) -> torch.nn.Module:
    model = specimens.base(cell)
    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), model)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


LOADERS = {
    "peft": reload_worker.peft,
    "peft, low memory": reload_worker.peft_low_memory,
    "load_adapter": reload_worker.load_adapter,
    "inject": reload_worker.inject,
    "set_peft_model_state_dict": load_state_dict,
}


@pytest.fixture
def saved(slug, once) -> Path:
    return once(f"whole-{slug}", lambda folder: save_trained(slug, LINEAR, folder))


def copied(source: Path, target: Path, change) -> Path:
    target.mkdir(exist_ok=True)
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("loader", LOADERS)
def test_a_missing_key_raises(slug, loader, saved, tmp_path):
    """Every tensor of one module, each in its turn: parameters, factors and counters alike."""
    keys = sorted(load_file(saved / "adapter_model.safetensors"))
    first = keys[0].rpartition(".")[0]
    for i, key in enumerate(k for k in keys if k.rpartition(".")[0] == first):
        folder = copied(saved, tmp_path / str(i), lambda tensors, key=key: tensors.pop(key))
        with pytest.raises(Exception, match=rf"misses .*{key.rpartition('.')[2]}\b"):
            harness.outputs(LOADERS[loader](folder, LINEAR))  # transformers' loader only warns; then the forward raises


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("where", ["tensor", "module"])
def test_an_unexpected_key_raises(slug, loader, where, saved, tmp_path):
    key = sorted(load_file(saved / "adapter_model.safetensors"))[0]
    name = f"{key}_more" if where == "tensor" else key.replace("layers.0", "layers.7")
    folder = copied(saved, tmp_path, lambda tensors: tensors.update({name: tensors[key].clone()}))
    if where == "module" and loader in ("load_adapter", "inject"):
        # loaders that weft has no say in drop the tensor; but the config, too, knows on what it was trained
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        module = key.removeprefix("base_model.model.").partition(".weft_")[0]
        config["base_sketch"][module.replace("layers.0", "layers.7")] = config["base_sketch"][module]
        path.write_text(json.dumps(config))
    if where == "tensor" and loader == "load_adapter":
        # transformers reads the file itself, keeps to the keys it knows, warns of the rest and returns them
        info = specimens.base(LINEAR).load_adapter(str(folder))
        assert any(found.endswith("_more") for found in info.unexpected_keys)
        return
    with pytest.raises(Exception, match=r"_more|layers\.7"):
        LOADERS[loader](folder, LINEAR)


def test_a_truncated_file_raises(slug, saved, tmp_path):
    folder = copied(saved, tmp_path, lambda tensors: None)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header"):
        reload_worker.peft(folder, LINEAR)


def test_another_base_is_found_out(slug, saved):
    other = specimens.base(LINEAR)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(weft.UsageError, match=r"another base model: .*layers\.1\.mlp\.up_proj"):
        PeftModel.from_pretrained(other, str(saved))
    wider = specimens.llama(intermediate_size=41)
    same = {k: v for k, v in specimens.base(LINEAR).state_dict().items() if v.shape == wider.state_dict()[k].shape}
    wider.load_state_dict(same, strict=False)
    with pytest.raises(weft.UsageError, match=r"another base model: .*was \(37, 32\) and is \(41, 32\)"):
        PeftModel.from_pretrained(wider, str(saved))


def test_a_trainable_reload_trains(slug, saved, tmp_path):
    model = PeftModel.from_pretrained(specimens.base(LINEAR), str(saved), is_trainable=True)
    before = {n: p.detach().clone() for n, p in harness.trainable(model).items()}
    assert before
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.train(model, optimizer, 2)
    assert any(not torch.equal(p, before[n]) for n, p in harness.trainable(model).items())


def test_the_readme_says_import_weft(slug, saved):
    assert "import weft" in (saved / "README.md").read_text()


def test_what_is_drawn_or_computed_again_carries_a_checksum(slug, saved, tmp_path):
    """A file that relies on seeds says what they drew; another draw is found out."""
    config = json.loads((saved / "adapter_config.json").read_text())
    model = harness.attach(slug, LINEAR)
    derived = {n for d in harness.deltas(model) for n, b in d.named_buffers() if b.is_floating_point() and b.dim() == 2}
    held = {n for d in harness.deltas(model) for n in d.state_dict()}
    if derived - held:
        assert config["checksums"], f"{sorted(derived - held)} are in no file, so something must tell them by"
    for name in sorted(config["checksums"])[:2]:
        folder = copied(saved, tmp_path, lambda tensors: None)
        wrong = {**config["checksums"], name: "0" * 16}
        (folder / "adapter_config.json").write_text(json.dumps({**config, "checksums": wrong}))
        with pytest.raises(weft.UsageError, match=r"trained (on|with)"):
            reload_worker.peft(folder, LINEAR)


def test_factors_that_are_not_stored_need_the_very_weight(slug, tmp_path):
    if "store_factors" not in harness.fields(slug):
        return
    assert harness.fields(slug)["store_factors"].default is True
    sizes = {}
    for stored in (True, False):
        folder = tmp_path / str(stored)
        model = harness.randomise(harness.attach(slug, LINEAR, store_factors=stored))
        model.save_pretrained(str(folder))
        sizes[stored] = (folder / "adapter_model.safetensors").stat().st_size
        assert torch.equal(harness.outputs(reload_worker.peft(folder, LINEAR)), harness.outputs(model))
    assert sizes[False] < sizes[True] / 2
    other = specimens.base(LINEAR)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6  # too little for a sketch of eight numbers
    with pytest.raises(weft.UsageError, match=r"layers\.0\.mlp\.up_proj"):
        PeftModel.from_pretrained(other, str(tmp_path / "False"))
