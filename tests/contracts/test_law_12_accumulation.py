"""Law 12. Accumulated = large batch = two processes, to 1e-9 after twenty steps of AdamW that include a rank event."""

from __future__ import annotations

import json
from pathlib import Path

import ddp_worker
import forked
import harness
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


def run_two_processes(folder: Path) -> None:
    forked.together([[ddp_worker.__file__, rank, 2, folder] for rank in (0, 1)], harness.TIME_LIMIT)


@pytest.fixture(scope="module")
def two(once) -> Path:
    return once("two-processes", run_two_processes)


def agree(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == torch.float64
        assert harness.relative(b[name], t) <= 1e-9, f"{name}: {harness.relative(b[name], t):.1e}"


@pytest.fixture
def one(slug, tmp_path) -> dict[str, Tensor]:
    found, changed = ddp_worker.run(slug, tmp_path, 1)
    model = harness.attach(slug)
    if any(d.compact(d.state_dict())[1] is not None for d in harness.deltas(model)):
        assert changed, "no rank event happened: a field of the config needs a `short` value"
    return found


def test_accumulation_is_a_large_batch(slug, one, tmp_path):
    for accumulation in (2, 4):
        agree(one, ddp_worker.run(slug, tmp_path, accumulation)[0])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes_are_one(slug, accumulation, one, two):
    for rank in (0, 1):
        differ = json.loads((two / f"differ.{rank}.json").read_text())
        assert f"{slug}-{accumulation}" not in differ, differ[f"{slug}-{accumulation}"]
    agree(one, load_file(two / f"{slug}-{accumulation}.safetensors"))
