"""A method is one file: dropped into a copy of the package, it is found, documented, run and held to the laws."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import forked
import pytest
import yaml

import weft

ROOT = Path(__file__).resolve().parents[2]

# ΔW of rank one along a fixed direction, and a shift of the bias: what no built-in method has.
TOY = '''"""Toy: every row of the weight moves along one fixed direction, and the bias moves with it.

After Edward Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    y = x·Wᵀ + s·(x·v)·aᵀ + c          v: in, frozen, 1 / √in everywhere;  a, c: out, zero at the start
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import Delta, Group, Site
from weft.registry import Card

CARD = Card(
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    arxiv="2106.09685",
    year=2021,
    summary="one fixed direction a weight, and its bias",
    knob="toy_scale",
    recipe={"learning_rate": 1e-2, "weight_decay": 0.0},
    exports="refused",
    refuses={
        "Embedding": "an embedding has no bias to move",
        "3-D expert": "an expert has no bias to move",
    },
    reasons={"exports": "it moves biases, which a LoRA does not hold"},
)


@dataclass
class ToyConfig(AdapterConfig):
    """Options of the toy method."""

    toy_scale: float = field(default=2.0, metadata={"help": "how far one unit of a moves a row"})


class ToyDelta(Delta):
    """ΔW = s·a·vᵀ, Δb = c."""

    def __init__(self, config: ToyConfig, site: Site) -> None:
        super().__init__(config, site)
        self.scale = config.toy_scale
        self.a = nn.Parameter(torch.zeros_like(site.empty(site.out)))
        self.c = nn.Parameter(torch.zeros_like(site.empty(site.out)))

    def delta(self) -> Tensor:
        direction = self.a.new_full((self.in_,), self.in_**-0.5)
        return self.scale * torch.outer(self.a, direction)

    def bias_delta(self) -> Tensor:
        return self.c

    def count(self) -> int:
        return 2 * self.out

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        return {"c": Group(weight_decay=0.0)}
'''

ROUND_TRIP = """
import json, sys, torch, weft
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))

model = get_peft_model(base(), weft.ToyConfig(toy_scale=3.0, target_modules=["0", "2"]))
x = torch.randn(4, 7)
assert torch.equal(model(x), base()(x))
with torch.no_grad():
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.copy_(torch.linspace(-1, 1, p.numel()) * (i + 1))
model.eval().save_pretrained("adapter")
again = PeftModel.from_pretrained(base(), "adapter").eval()
config = PeftConfig.from_pretrained("adapter")
moved = model(x)
w = base()[0]
direction = torch.full((7,), 7 ** -0.5)
a, c = torch.linspace(-1, 1, 5), 2 * torch.linspace(-1, 1, 5)
first = x @ w.weight.T + w.bias + 3.0 * (x @ direction)[:, None] * a + c
assert torch.allclose(model.base_model.model[0](x), first, atol=1e-5)
assert torch.equal(again(x), moved) and not torch.equal(moved, base()(x))
assert torch.allclose(model.merge_and_unload()(x), moved, atol=1e-5)
print(json.dumps({"type": config.peft_type.value, "scale": config.toy_scale, "file": weft.adapters.toy.__file__}))
"""

PAGES = """
import json, sys
sys.path.insert(0, DOCS)
import generate
print(json.dumps({"page": generate.method_page("toy"), "undocumented": generate.undocumented(),
                  "index": generate.index_page()}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the package with the toy's file, and nothing else changed."""
    folder = tmp_path_factory.mktemp("copy")
    package = folder / "package" / "weft"
    shutil.copytree(Path(weft.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "adapters" / "toy.py").write_text(TOY, encoding="utf-8")
    return folder


def run(folder: Path, *words: str, ok: bool = True) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "package"), "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = forked.run(words, cwd=folder, env=environment)
    assert (done.returncode == 0) is ok, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout if ok else done.stderr


def test_it_is_found(folder):
    listed = {card["slug"]: card for card in json.loads(run(folder, "-m", "weft", "methods", "--json"))}
    assert set(listed) == {*weft.cards(), "toy"}
    assert listed["toy"]["pillar"] == "adapters" and listed["toy"]["arxiv"] == "2106.09685"
    assert listed["toy"]["summary"] == "one fixed direction a weight, and its bias"


def test_help_shows_its_options(folder):
    told = run(folder, "-m", "weft", "adapt", "--method", "toy", "--help")
    assert "Options of toy" in told and "--toy-scale" in told and "how far one unit of a moves a row" in told


def write_run_file(folder: Path, **changes) -> Path:
    (folder / "text.txt").write_text("the warp holds while the weft goes over and under\n" * 40)
    keys = {"model": "builtin:pycode", "data": str(folder / "text.txt"), "method": "toy", "toy_scale": 0.5}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(keys | changes))
    return file


def test_its_options_are_keys_of_run_files(folder):
    said = run(folder, "-m", "weft", "adapt", "--config", str(write_run_file(folder)), "--dry-run")
    assert "toy on builtin:pycode" in said and '"toy_scale": 0.5' in said
    wrong = write_run_file(folder, toy_scael=1.0)
    assert "toy_scale" in run(folder, "-m", "weft", "adapt", "--config", str(wrong), "--dry-run", ok=False)


def test_peft_saves_and_loads_it(folder):
    found = json.loads(run(folder, "-c", ROUND_TRIP).splitlines()[-1])
    assert found["type"] == "WEFT_TOY" and found["scale"] == 3.0
    assert found["file"] == str(folder / "package" / "weft" / "adapters" / "toy.py")


@pytest.mark.slow
def test_the_documentation_has_its_page(folder):
    found = json.loads(run(folder, "-c", PAGES.replace("DOCS", repr(str(ROOT / "docs")))).splitlines()[-1])
    assert found["page"].startswith("# Toy") and "`toy_scale`" in found["page"]
    assert "it moves biases, which a LoRA does not hold" in found["page"]
    assert "an embedding has no bias to move" in found["page"]
    assert "(toy.md)" in found["index"] and found["undocumented"] == []


@pytest.mark.slow
def test_the_laws_hold_for_it(folder):
    """The same files that try the built-in methods; what a subprocess does for all methods at once is left to them."""
    laws = str(ROOT / "tests" / "contracts")
    options = ["-n", "0", "-k", "toy", "-m", "not slow", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    told = run(folder, "-m", "pytest", laws, *options, "--rootdir", str(ROOT), "-rN")
    passed = int(told.split(" passed")[0].split()[-1])
    assert passed > 100 and " failed" not in told and " error" not in told, told[-2000:]
