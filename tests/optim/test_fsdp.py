"""Optimisers on a model sharded by FSDP2 take the steps that they take alone."""

from __future__ import annotations

import subprocess
import sys

import fsdp_worker
import pytest
import tiny
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_sharded_parameters_take_the_same_steps(tmp_path):
    """Two gloo processes with uneven shards: both sides of the projection, every kind of state."""
    jobs = [
        subprocess.Popen([sys.executable, fsdp_worker.__file__, str(rank), "2", str(tmp_path)], env=tiny.environment())
        for rank in range(2)
    ]
    assert [job.wait(timeout=240) for job in jobs] == [0, 0]
    for case in fsdp_worker.CASES:
        found = load_file(tmp_path / f"{case}.safetensors")
        for name, p in fsdp_worker.alone(case).items():
            torch.testing.assert_close(found[name], p, rtol=1e-6, atol=1e-9, msg=f"{case} {name}")
