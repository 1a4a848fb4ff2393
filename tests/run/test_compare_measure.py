"""Steps and memory seen from outside a training loop."""

from __future__ import annotations

import pytest
import torch

from weft.run.measure import Measurement, measuring, restart_peak, state_bytes


def _train(steps: int, size: int = 8) -> None:
    weight = torch.nn.Parameter(torch.ones(size))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    second = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    for _ in range(steps):
        (weight**2).sum().backward()
        optimizer.step()
        second.step()
        optimizer.zero_grad()


def test_every_step_of_the_first_optimiser_is_seen():
    with measuring() as seen:
        _train(5)
    assert len(seen.moments) == 5 and seen.step_seconds is not None and seen.step_seconds > 0
    _train(3)
    assert len(seen.moments) == 5  # the hook is gone


def test_median_leaves_the_first_steps_out():
    assert Measurement([0.0, 9.0, 13.0, 14.0, 15.0, 16.5]).step_seconds == 1.0
    assert Measurement([0.0, 9.0, 13.0]).step_seconds == 6.5
    assert Measurement([1.0]).step_seconds is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="resident memory is measured without a GPU only")
def test_peak_memory_counts_what_training_holds(trimmed):
    """64 MB of parameters and as many of gradients, above what the process held; and only until the last step."""
    size = 16 * 2**20
    with measuring() as small:
        _train(2)
    with measuring() as large:
        _train(2, size)
        torch.ones(8 * size)  # after the last step: not training
    assert small.peak_bytes is not None and large.peak_bytes is not None
    pages = 2**20  # that were there before, and are taken again
    assert 2 * 4 * size - pages < large.peak_bytes - small.peak_bytes < 8 * 4 * size


@pytest.mark.skipif(torch.cuda.is_available(), reason="resident memory is measured without a GPU only")
def test_what_came_before_a_restart_does_not_count():
    if not _linux():
        pytest.skip("the peak can be set back on Linux only")
    peaks = []
    for _ in range(3):  # on a busy machine the kernel now and then counts what was freed for a moment longer
        with measuring() as seen:
            torch.ones(64 * 2**20)
            restart_peak()
            _train(2)
        peaks.append(seen.peak_bytes)
    assert all(peak is not None for peak in peaks) and min(peaks) < 64 * 2**20


def _linux() -> bool:
    import sys

    return sys.platform == "linux"


def test_the_state_of_an_optimiser_is_counted_wherever_its_tensors_lie():
    from torchao.optim import AdamW8bit

    p = torch.nn.Parameter(torch.randn(64, 128))
    adam, eight = torch.optim.AdamW([p]), AdamW8bit([p])
    p.grad = torch.ones_like(p)
    adam.step(), eight.step()
    steps = sum(t.numel() * t.element_size() for t in (adam.state[p]["step"], eight.state[p]["step"]))
    assert state_bytes(adam) + state_bytes(eight) - steps == 2 * p.numel() * (4 + 1) + 2 * (p.numel() // 256 * 4 + 1024)

    class Projector:
        def __init__(self):
            self.basis = torch.zeros(3, 5, dtype=torch.bfloat16)
            self.again = self.basis  # counted once

    adam.state[p] = {"step": 3, "projector": Projector(), "moments": [torch.zeros(7)], "name": "p"}
    assert state_bytes(adam) == 2 * 15 + 4 * 7
