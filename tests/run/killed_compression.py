"""A compression that dies by SIGKILL at a chosen instant, in a process forked from one that has everything imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path


def run(words: list[str], log: Path, die_at: str, count: int) -> None:
    """One command line; at the `count`-th instant of the kind `die_at` the process dies. Finished layers are logged."""
    import torch

    torch.set_num_threads(1)
    from transformers import PreTrainedModel

    from weft.cli.main import run as weft
    from weft.compress import _engine
    from weft.compress._store import Store

    left = count

    def dies(kind: str, function, after: bool = False):
        def call(*args, **kwargs):
            nonlocal left
            given = function(*args, **kwargs) if after else None
            left -= kind == die_at
            if kind == die_at and left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return given if after else function(*args, **kwargs)

        return call

    put = Store.put

    def logged(self, layer, tensors) -> None:
        put(self, layer, tensors)
        with log.open("a") as file:
            file.write(layer + "\n")

    Store.put = dies("put", logged, after=True)
    _engine.calibrate = dies("calibrate", _engine.calibrate)
    PreTrainedModel.save_pretrained = dies("save", PreTrainedModel.save_pretrained, after=True)
    replace, rmtree = os.replace, shutil.rmtree
    output = words[words.index("--output") + 1]
    of_output = dies("rename", replace)
    os.replace = lambda a, b: (of_output if str(b) == output else replace)(a, b)
    of_work = dies("clean", rmtree)
    shutil.rmtree = lambda path, *a, **k: (of_work if str(path) == output + ".work" else rmtree)(path, *a, **k)
    raise SystemExit(weft(words))


def spawn(*args) -> int:
    """`run` in a process of its own; its exit code."""
    import forked

    done = forked.run([__file__, json.dumps(args, default=str)], libraries=forked.WEFT)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    words, log, *more = json.loads(sys.argv[1])
    run(words, Path(log), *more)
