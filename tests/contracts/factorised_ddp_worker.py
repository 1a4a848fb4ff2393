"""Run as two processes: every parametrisation takes the steps of one process, with half of each step's rows each.

    python factorised_ddp_worker.py RANK WORLD FOLDER

What the model stores after the last step goes to `FOLDER/METHOD.RANK.safetensors`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import factorised_specimens as specimens
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for method in specimens.METHODS:
        model = specimens.made(method, specimens.llama().double())
        specimens.train(DistributedDataParallel(model), range(4), rank=rank, world=world)
        stored = {name: t.contiguous() for name, t in model.state_dict().items() if "lm_head" not in name}
        save_file(stored, str(folder / f"{method}.{rank}.safetensors"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
