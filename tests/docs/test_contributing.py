"""The worked example of CONTRIBUTING.md is a whole method: one file, and everything knows it."""

from __future__ import annotations

import json
import os
import shutil

import fences
import forked
import pytest

import weft

_SLUG = "unit_lora"

# What a user would do with the new method, on a copy of the package that has its file and nothing else.
_USE = """
import json, sys, torch, weft, transformers
from peft import PeftModel, get_peft_model
from torch import nn

sys.path.insert(0, DOCS)
import generate

def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
                                      initializer_range=0.2)
    return transformers.LlamaForCausalLM(config)

model = get_peft_model(base(), weft.UnitLoraConfig(r=2))
ids = torch.arange(30).reshape(2, 15)
frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
assert torch.equal(model.eval()(ids).logits, base().eval()(ids).logits)
args = transformers.TrainingArguments("out", max_steps=30, learning_rate=5e-2, weight_decay=0.1, use_cpu=True)
optimizer, schedule = weft.optimizer_and_scheduler(model, args)
decays = {round(group["weight_decay"], 3) for group in optimizer.param_groups}
losses = []
for _ in range(30):
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
model.save_pretrained("adapter")
trained = model.eval()(ids).logits
loaded = PeftModel.from_pretrained(base(), "adapter").eval()(ids).logits
report = weft.export(model, "lora", "lora")
merged = model.merge_and_unload()(ids).logits
page = generate.method_page("unit_lora")
print(json.dumps({
    "losses": losses, "decays": sorted(decays), "same": torch.equal(trained, loaded), "report": report,
    "moved": float((trained - merged).abs().max()), "size": float(trained.abs().max()), "page": page,
    "undocumented": generate.undocumented(), "where": generate.attachments("unit_lora"),
    "targets": json.load(open("lora/adapter_config.json"))["peft_type"],
}))
"""


def _example() -> str:
    return fences.blocks(fences.ROOT / "CONTRIBUTING.md", "python")[0]


def test_the_example_is_short():
    assert len(_example().splitlines()) < 60


@pytest.mark.slow
def test_one_file_makes_a_method(tmp_path):
    package = tmp_path / "package" / "weft"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(os.path.dirname(weft.__file__), package, ignore=ignored)
    (package / "adapters" / f"{_SLUG}.py").write_text(_example(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "160"}

    def run(*words: str) -> str:
        done = forked.run(words, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    listed = {card["slug"]: card for card in json.loads(run("-m", "weft", "methods", "--json"))}
    assert listed[_SLUG]["arxiv"] == "2106.09685" and set(weft.cards()) < set(listed)
    told = run("-m", "weft", "adapt", "--method", _SLUG, "--help")
    assert "Options of unit_lora" in told and "components a layer" in told

    found = json.loads(run("-c", _USE.replace("DOCS", repr(str(fences.ROOT / "docs")))).splitlines()[-1])
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert found["decays"] == [0.0, 0.1]
    assert found["same"] and found["moved"] < 1e-4 * found["size"]
    assert found["targets"] == "LORA" and "plain LoRA" in found["report"]
    assert (
        found["page"].startswith("# Unit LoRA")
        and "| `r`<br><small>int</small> | `8` | components a layer |" in found["page"]
    )
    assert found["undocumented"] == [] and found["where"]["Linear"] == "yes"
