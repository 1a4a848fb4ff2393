"""Run as two processes: GaLore on a model sharded by FSDP2 whose rows do not divide evenly.

    python fsdp_worker.py RANK WORLD FOLDER

The whole parameters after the last step go to `FOLDER/KIND.safetensors`; moments must have been sharded.
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

GAP = 3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.Linear(21, 7)).double()


def train(made: nn.Module, kind: str) -> torch.optim.Optimizer:
    optimizer = weft.optim.optimizer("galore", made, rank=3, update_proj_gap=GAP, proj_type=kind, weight_decay=0.1)
    for step in range(2 * GAP):
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
    for kind in ("std", "reverse_std", "full"):
        made = fully_shard(model(), mesh=mesh)
        optimizer = train(made, kind)
        for p in made.parameters():
            m = optimizer.state[p]["exp_avg"]
            assert kind == "full" or p.dim() == 1 or (isinstance(m, DTensor) and m.to_local().numel() < m.numel())
        whole = {name: p.full_tensor().detach() for name, p in made.named_parameters()}
        if rank == 0:
            save_file(whole, str(folder / f"{kind}.safetensors"))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
