"""Optimisers on a model sharded by FSDP2 take the steps that they take alone."""

from __future__ import annotations

import forked
import fsdp_worker
import pytest
import tiny
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_sharded_parameters_take_the_same_steps(tmp_path):
    """Two gloo processes with uneven shards: both sides of the projection, every kind of state."""
    commands = [[fsdp_worker.__file__, rank, 2, tmp_path] for rank in range(2)]
    forked.together(commands, 240, env=tiny.environment())
    for case in fsdp_worker.CASES:
        found = load_file(tmp_path / f"{case}.safetensors")
        for name, p in fsdp_worker.alone(case).items():
            torch.testing.assert_close(found[name], p, rtol=1e-6, atol=1e-9, msg=f"{case} {name}")
