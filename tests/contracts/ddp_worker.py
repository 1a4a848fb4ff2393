"""Run as two processes: the same twenty steps as one process takes, with half of every batch each.

    python ddp_worker.py RANK WORLD FOLDER

Parameters after the last step go to `FOLDER/SLUG-ACCUMULATION.safetensors`, written by rank 0; what the ranks disagree
on, and what failed, goes to `FOLDER/differ.RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness
import specimens
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS, ROWS = 20, 8
CELL = specimens.SMALL


def run(slug: str, folder: Path, accumulation: int, rank: int = 0, world: int = 1) -> tuple[dict[str, Tensor], bool]:
    """Parameters after STEPS steps of AdamW in float64, and whether the rank of a module changed on the way."""
    model = harness.attach(slug, CELL, torch.float64, short=True)
    optimizer, _ = harness.optimizer_for(model, folder, steps=STEPS)
    wrapped: nn.Module = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    wrapped.train()

    def ranks() -> list[int | None]:
        return [d.compact(d.state_dict())[1] for d in harness.deltas(model)]

    start, changed = ranks(), False
    for step in range(STEPS):
        mine = {k: v.chunk(world)[rank] for k, v in specimens.batch(step, ROWS).items()}
        for part in range(accumulation):
            piece = {k: v.chunk(accumulation)[part] for k, v in mine.items()}
            if world > 1:
                wrapped.require_backward_grad_sync = part == accumulation - 1
            (wrapped(**piece).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = changed or ranks() != start
    return {n: p.detach().clone() for n, p in harness.trainable(model).items()}, changed


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    differ = {}
    for slug in harness.SLUGS:
        for accumulation in (1, 4):
            try:
                found, _ = run(slug, folder, accumulation, rank, world)
            except Exception as error:  # the other rank fails alike, or the run ends with its time limit
                differ[f"{slug}-{accumulation}"] = f"{type(error).__name__}: {error}"
                continue
            for name, t in found.items():
                there = t.clone()
                dist.broadcast(there, 0)
                if not torch.equal(there, t):
                    differ[f"{slug}-{accumulation}"] = name
            if rank == 0:
                save_file(found, folder / f"{slug}-{accumulation}.safetensors")
    (folder / f"differ.{rank}.json").write_text(json.dumps(differ))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
