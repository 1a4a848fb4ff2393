"""A kind is one file: dropped into the folder, it is found, saved and loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import compressed
import pytest
import torch
import transformers

import weft.linear
from weft.linear._structured import kinds, stored_bits
from weft.linear._transformers import save_compressed, to_dense

# whole numbers in a buffer, a scale that is trained, and a buffer that is not stored
TOY = '''"""Rounded rows: whole numbers of eight bits and a scale for each row."""

from __future__ import annotations

import torch
from torch import nn

from weft.linear._structured import StructuredLinear


class RoundedRows(StructuredLinear):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kind_in_one_file(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rounded_rows.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setattr(weft.linear, "__path__", [*weft.linear.__path__, str(tmp_path / "more")])  # as if it lay there
    monkeypatch.delitem(sys.modules, "weft.linear.rounded_rows", raising=False)
    assert {"low_rank", "rounded_rows"} <= set(kinds())
    model = compressed.make("bert", dtype)
    before = compressed.logits(model)
    compressed.compress(model, ["query", "dense"], "rounded_rows", lambda *sides: {"steps": 100})
    expected = compressed.logits(model)
    assert 0 < (expected - before).norm() < 0.2 * before.norm()
    layer = model.bert.encoder.layer[0].output.dense
    assert stored_bits(layer) == 18 * 29 * 8 + 18 * 8 * layer.scale.element_size()
    save_compressed(model, tmp_path / "out")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    layer = again.bert.encoder.layer[0].output.dense
    assert layer.spec() == {"kind": "rounded_rows", "version": 1, "steps": 100, "bias": True}
    assert layer.codes.dtype == torch.int8 and layer.scale.dtype == layer.weight.dtype == dtype
    assert torch.equal(compressed.logits(again), expected)
    assert torch.allclose(compressed.logits(to_dense(again)), expected)
