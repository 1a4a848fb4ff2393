"""A run that dies by SIGKILL at a chosen instant, in a process forked from one that has everything imported."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

STEPS = 6


def settings(**changes):
    from weft.run.train import TrainSettings

    basic = {"max_steps": STEPS, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 0.01, "seed": 3}
    return TrainSettings(**{**basic, "max_length": 32, "save_steps": 2, "eval_steps": 3, "logging_steps": 4, **changes})


def run(model: Path, corpus: Path, output: Path, method: str, options: dict, die_at: int | None, resume: bool) -> None:
    """Train and save. `die_at` counts what is done to the disk and the steps taken; at that count the process dies."""
    import torch

    torch.set_num_threads(1)
    from weft.run import data, loop, methods, models
    from weft.run.train import save_result, train

    events = output.with_name(output.name + ".events")
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        events.write_text(str(count))
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*args, **kwargs):
            tick()
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    torch.save = counted(torch.save)
    Path.unlink = counted(Path.unlink)
    loop.StepTrainer.end_step = counted(loop.StepTrainer.end_step)

    base = models.load_base(str(model), "causal-lm")
    splits = data.load_splits(str(corpus), "auto", base.tokenizer, max_length=32)
    chosen = methods.resolve(method, options)
    result = train(base, splits, chosen, settings(), output, resume=resume, progress=False)
    save_result(result.model, base.tokenizer, output)


def spawn(*args) -> int:
    """`run` in a process of its own; its exit code."""
    import forked

    done = forked.run([__file__, json.dumps(args, default=str)], libraries=forked.WEFT)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    model, corpus, output, *more = json.loads(sys.argv[1])
    run(Path(model), Path(corpus), Path(output), *more)
