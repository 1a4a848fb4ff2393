"""Run as two processes: optimisers on a model sharded by FSDP2 whose rows do not divide evenly.

    python fsdp_worker.py RANK WORLD FOLDER

The whole parameters after the last step go to `FOLDER/CASE.safetensors`; state must have been sharded.
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

GAP = 3
CASES = {
    "std": ("galore", {"update_proj_gap": GAP}),
    "reverse_std": ("galore", {"update_proj_gap": GAP, "proj_type": "reverse_std"}),
    "full": ("galore", {"update_proj_gap": GAP, "proj_type": "full"}),
    "adafactor": ("galore", {"update_proj_gap": GAP, "inner": "adafactor"}),
    "adafactor_reverse": ("galore", {"update_proj_gap": GAP, "inner": "adafactor", "proj_type": "reverse_std"}),
    "dct": ("dct_projection", {"rotate_subspace": True}),
    "fft": ("dct_projection", {"selection": "fft", "update_proj_gap": GAP}),
    "feedback": ("dct_projection", {"use_ef": True, "update_proj_gap": GAP}),
    "trion": ("dct_projection", {"form": "trion"}),
}
REFUSED = {
    "q_ef=8 cannot be sharded, but q_ef=0": ("dct_projection", {"use_ef": True, "q_ef": 8}),
    "but those of 'adamw' and 'adafactor' can": ("galore", {"inner": "adamw8bit"}),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.Linear(21, 7)).double()


def train(made: nn.Module, slug: str, options: dict) -> torch.optim.Optimizer:
    optimizer = weft.optim.optimizer(slug, made, rank=3, weight_decay=0.1, **options)
    for step in range(2 * GAP):
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        made(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def alone(case: str) -> dict[str, torch.Tensor]:
    """The parameters after the same steps in one process."""
    made = model()
    train(made, *CASES[case])
    return {name: p.detach() for name, p in made.named_parameters()}


def main(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for case, (slug, options) in CASES.items():
        made = fully_shard(model(), mesh=mesh)
        optimizer = train(made, slug, options)
        for p in made.parameters():
            state = optimizer.state[p]
            kept = [state[key] for key in ("exp_avg", "exp_avg_sq", "error", "momentum") if key in state]
            if case != "full" or p.dim() == 1:  # r x r moments of both sides are whole on every process
                assert all(isinstance(m, DTensor) and m.to_local().numel() < m.numel() for m in kept)
            assert kept or "adafactor" in case
        whole = {name: p.full_tensor().detach() for name, p in made.named_parameters()}
        if rank == 0:
            save_file(whole, str(folder / f"{case}.safetensors"))
        dist.barrier()
    for words, (slug, options) in REFUSED.items():
        try:
            weft.optim.optimizer(slug, fully_shard(model(), mesh=mesh), rank=3, **options)
        except UsageError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{slug} with {options} on shards was not refused")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
