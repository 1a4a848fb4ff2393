"""What a user sees while training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as _Bar

_LINES = 20  # where there is no terminal, about this many lines a run


class Progress:
    """Loss, tokens (or images) a second, memory and time left, on standard output."""

    def __init__(self, unit: str = "tokens") -> None:
        self.unit = unit
        self.console = Console(file=sys.stdout, soft_wrap=True)
        self.bar: _Bar | None = None
        self.units = 0
        self.started = time.perf_counter()
        self.first_step = self.total = self.step = 0
        self.paused = 0.0  # seconds spent beside the steps

    def start(self, step: int, total: int) -> None:
        self.started, self.first_step, self.step, self.total = time.perf_counter(), step, step, total
        if self.console.is_terminal:
            self.bar = _Bar(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task("train", total=total, completed=step, text="")

    def count(self, units: int) -> None:
        """Tokens, or images, of a batch that was drawn."""
        self.units += units

    def measures(self) -> dict[str, Any]:
        """Tokens (or images) a second since the start of this process, and memory in bytes."""
        seconds = max(self._seconds(), 1e-9)
        return {f"{self.unit}_per_second": round(self.units / seconds, 1), "memory_bytes": memory_bytes()}

    def advance(self, step: int, loss: float | None) -> None:
        self.step = step
        every = max(1, self.total // _LINES)
        if self.bar is None and step % every and step != self.total:
            return
        now = self.measures()
        text = f"loss {loss:.4f}" if loss is not None else ""
        text += f"  {now[f'{self.unit}_per_second']:,.0f} {self.unit}/s  {now['memory_bytes'] / 2**20:,.0f} MiB"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
            return
        done = max(step - self.first_step, 1)
        left = self._seconds() / done * (self.total - step)
        self.console.print(f"step {step}/{self.total}  {text}  {left:,.0f} s left", highlight=False)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused

    def pause(self, seconds: float) -> None:
        """Leave these seconds out of the speed: they were not spent on steps."""
        self.paused += seconds

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def memory_bytes() -> int:
    """Memory in use: the peak on an accelerator, else what this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
