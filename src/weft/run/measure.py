"""Step time and peak memory of training, measured from outside the training loop; peak memory of anything.

Meant for a fresh process that is alone on the machine: an optimiser step is seen through torch's own step hook, so that
what is timed is the loop which users run, data loading and all.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that fill caches and optimiser states, not counted where enough others remain


@dataclass
class Measurement:
    """What `measuring` saw.

    Attributes:
        moments: seconds on a clock at which each optimiser step ended.
        peak_bytes: memory at its highest, above what was held at the start: bytes on the GPU if there is one, else
            resident memory of the process. None where the system does not tell.
    """

    moments: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def step_seconds(self) -> float | None:
        """The median time from one optimiser step to the next; None for fewer than two steps."""
        apart = [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]
        return statistics.median(apart[WARM_UP:] or apart) if apart else None


@contextmanager
def measuring() -> Iterator[Measurement]:
    """Watch the optimiser steps taken inside; start it before the model is loaded, so that its weights count."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    on_gpu = torch.cuda.is_available()
    gc.collect()
    before = _start_memory(on_gpu)
    seen = Measurement()
    stepping: list[int] = []  # the one optimiser that is counted: a method may have a second one

    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        stepping[:] = stepping or [id(optimizer)]
        if id(optimizer) != stepping[0]:
            return
        if on_gpu:
            torch.cuda.synchronize()
        seen.moments.append(time.perf_counter())
        peak = _peak_memory(on_gpu)
        seen.peak_bytes = None if peak is None or before is None else max(0, peak - before)

    handle = register_optimizer_step_post_hook(stepped)
    log = logging.getLogger("weft")
    level = log.level
    log.setLevel(logging.ERROR)  # the steps are few on purpose, whatever a method says of short runs
    try:
        yield seen
    finally:
        log.setLevel(level)
        handle.remove()


@contextmanager
def measuring_memory() -> Iterator[Measurement]:
    """Watch the memory of whatever is done inside; `peak_bytes` is there at the end."""
    import torch

    on_gpu = torch.cuda.is_available()
    gc.collect()
    before = _start_memory(on_gpu)
    seen = Measurement()
    yield seen
    peak = _peak_memory(on_gpu)
    seen.peak_bytes = None if peak is None or before is None else max(0, peak - before)


def state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors that an optimiser keeps between steps, in whatever its state holds them."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    seen: set[int] = set()

    def size(value: Any) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if is_traceable_wrapper_subclass(value):  # torchao's codes and scales, say
                return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(size(each) for each in value.values())
        if isinstance(value, list | tuple):
            return sum(size(each) for each in value)
        return sum(size(each) for each in vars(value).values()) if hasattr(value, "__dict__") else 0

    return size(dict(getattr(optimizer, "optimizer", optimizer).state))


def expected_state_bytes(method: str, model: Any, **options: Any) -> int | None:
    """What an optimiser of weft will keep beside a model, whose weights need not be there.

    Measured on one parameter of every shape, so in as long as a few refreshes take. None of a method whose state
    depends on more than shapes.
    """
    import torch

    from weft import registry
    from weft.optim import for_trainer
    from weft.optim._projected import Projected

    kind = getattr(registry.load(method), registry.class_name(method, ""))
    if not issubclass(kind, Projected) or kind.freezes:
        return None
    _, arguments = for_trainer(method, model, **options)
    total = 0
    for group in arguments.pop("params"):
        for (shape, dtype), count in Counter((p.shape, p.dtype) for _, p in group["params"]).items():
            one = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
            one.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            made = kind([{**group, "params": [("one", one)]}], **arguments)
            made.step()
            total += count * state_bytes(made)
    return total


def restart_peak() -> None:
    """Forget the peak so far, for what is not to count (reading a checkpoint needs more than training from it may)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _restart_resident_peak()


def _start_memory(on_gpu: bool) -> int | None:
    import torch

    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    _restart_resident_peak()
    return _status("VmRSS") or _peak_memory(False)


def _peak_memory(on_gpu: bool) -> int | None:
    import torch

    if on_gpu:
        return int(torch.cuda.max_memory_allocated())
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _status(name: str) -> int | None:
    """A field of Linux's /proc/self/status in bytes; None on other systems."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _restart_resident_peak() -> None:
    """On Linux, 5 written to clear_refs sets the peak back to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
