"""A kind is one file: dropped into a copy of the package, it is found, saved and loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import weft

# whole numbers in a buffer, a scale that is trained, and a buffer that is not stored
TOY = '''"""Rounded rows: whole numbers of eight bits and a scale for each row."""

from __future__ import annotations

import torch
from torch import nn

from weft.linear._structured import Structured


class RoundedRows(Structured):
    """W = diag(s)·codes."""

    def __init__(self, in_features, out_features, *, steps=127, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.steps = steps
        self.scale = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("codes", torch.empty(out_features, in_features, device=device, dtype=torch.int8))
        self.register_buffer("order", torch.empty(in_features, device=device, dtype=torch.long), persistent=False)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight, bias=None, *, steps=127):
        out, in_ = weight.shape
        layer = cls(in_, out, steps=steps, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        layer.scale.copy_(weight.abs().amax(1) / steps)
        layer.codes.copy_((weight / layer.scale[:, None]).round())
        if bias is not None:
            layer.shift.copy_(bias)
        layer.derive()
        return layer

    @property
    def bias(self):
        return self.shift

    def options(self):
        return {"steps": self.steps}

    def derive(self):
        self.order = torch.arange(self.in_features, device=self.codes.device)

    def forward(self, x):
        return nn.functional.linear(x[..., self.order], self.dense(), self.bias)

    def dense(self):
        return self.scale[:, None] * self.codes
'''

CODE = """
import sys, torch
sys.path[:0] = TESTS
import compressed, transformers, weft
from weft.linear._structured import kinds, stored_bits
from weft.linear._transformers import save_compressed, to_dense
assert {"low_rank", "rounded_rows"} <= set(kinds()), kinds()
for dtype in (torch.float32, torch.bfloat16):
    model = compressed.make("bert", dtype)
    before = compressed.logits(model)
    compressed.compress(model, ["query", "dense"], "rounded_rows", steps=100)
    expected = compressed.logits(model)
    assert 0 < (expected - before).norm() < 0.2 * before.norm()
    layer = model.bert.encoder.layer[0].output.dense
    assert stored_bits(layer) == 18 * 29 * 8 + 18 * 8 * layer.scale.element_size()
    save_compressed(model, f"out-{dtype}")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(f"out-{dtype}")
    layer = again.bert.encoder.layer[0].output.dense
    assert layer.spec() == {"kind": "rounded_rows", "version": 1, "steps": 100, "bias": True}, layer.spec()
    assert layer.codes.dtype == torch.int8 and layer.scale.dtype == layer.weight.dtype == dtype
    assert torch.equal(compressed.logits(again), expected)
    assert torch.allclose(compressed.logits(to_dense(again)), expected)
print("done")
"""


@pytest.mark.slow
def test_a_kind_in_one_file(tmp_path: Path) -> None:
    package = tmp_path / "package" / "weft"
    shutil.copytree(Path(weft.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "linear" / "rounded_rows.py").write_text(TOY, encoding="utf-8")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CODE.replace("TESTS", repr([str(here), str(here.parent)]))],
        cwd=tmp_path,
        env=tiny.environment(PYTHONPATH=str(tmp_path / "package")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-3000:]
