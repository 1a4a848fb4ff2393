"""Run as two processes: DCT projection on a model sharded by FSDP2 whose rows do not divide evenly.

    python dct_projection_worker.py RANK WORLD FOLDER

The whole parameters after the last step go to `FOLDER/KIND.safetensors`; state must have been sharded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import weft.optim
from weft.errors import UsageError

KINDS = {
    "adamw": {"rotate_subspace": True},
    "fft": {"selection": "fft", "update_proj_gap": 3},
    "feedback": {"use_ef": True, "update_proj_gap": 3},
    "trion": {"form": "trion"},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.Linear(21, 7)).double()


def train(made: nn.Module, kind: str, **options) -> torch.optim.Optimizer:
    optimizer = weft.optim.optimizer("dct_projection", made, rank=3, weight_decay=0.1, **KINDS[kind], **options)
    for step in range(6):
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        made(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def main(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for kind in KINDS:
        made = fully_shard(model(), mesh=mesh)
        optimizer = train(made, kind)
        for p in made.parameters():
            state = optimizer.state[p]
            kept = [state[key] for key in ("exp_avg", "exp_avg_sq", "error", "momentum") if key in state]
            assert kept and all(isinstance(m, DTensor) and m.to_local().numel() < m.numel() for m in kept)
        whole = {name: p.full_tensor().detach() for name, p in made.named_parameters()}
        if rank == 0:
            save_file(whole, str(folder / f"{kind}.safetensors"))
        dist.barrier()
    try:
        train(fully_shard(model(), mesh=mesh), "feedback", q_ef=8)
    except UsageError as error:
        assert "cannot be sharded" in str(error)
    else:
        raise AssertionError("quantised error feedback on shards was not refused")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
