"""Run as two processes: every optimiser takes the steps of one process, with half of each step's rows each.

    python optim_ddp_worker.py RANK WORLD FOLDER

Parameters and state after the last step go to `FOLDER/CASE.RANK.safetensors`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import optim_specimens as specimens
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel


def steps(case: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Parameters and state after the last step.

    The wrapped model must die before the process group: its reducer would take the group with it, waiting with the
    GIL for a thread of gloo's that waits for the GIL.
    """
    model, optimizer = specimens.build(case)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(2 * specimens.GAP):
        optimizer.zero_grad()
        rows = specimens.tokens(step).chunk(world)[rank]
        wrapped(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    found = {f"p.{name}": p for name, p in specimens.trained(model).items()}
    for place, state in optimizer.state_dict()["state"].items():
        found |= {f"s.{place}.{k}": t.contiguous() for k, t in state.items() if isinstance(t, torch.Tensor)}
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for case in specimens.CASES:
        save_file(steps(case, rank, world), str(folder / f"{case}.{rank}.safetensors"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
