"""x·Wᵀ + b by the faster of a processor's two libraries.

torch asks MKL for products in float32, which on AMD's processors uses half of the width that AVX-512 has; oneDNN, which
torch brings along, uses all of it. There it takes half to two thirds of the time, but where W is small, or near to the
processor and x is one row. benchmarks/inference.py measures both. On other processors the product stays torch's.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

LARGE = 2**18  # numbers in W above which what a call of oneDNN costs besides no longer matters
LARGE_FOR_ONE = 2**20  # numbers in W above which it is faster for one row of x
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # what compiled models call; torch need not have it


def _is_faster() -> bool:
    """Whether torch has both libraries, on a processor of AMD's with AVX-512."""
    linux = Path("/proc/cpuinfo")
    if linux.exists():
        with linux.open() as file:
            about = file.read(256)  # the first of many
    else:
        about = platform.processor()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return ONEDNN is not None and torch.backends.mkl.is_available() and wide and "AuthenticAMD" in about


FASTER = _is_faster()

if ONEDNN is not None:

    @register_flop_formula(ONEDNN)  # type: ignore[untyped-decorator]
    def _flops(x: tuple[int, ...], w: tuple[int, ...], *_: object, **__: object) -> int:
        return 2 * torch.Size(x).numel() * w[0]


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b (… × out) of x (… × in), in its dtype."""
    if not (FASTER and eager(x) and _plain(x) and _plain(weight) and _pays(x, weight)):
        return linear(x, weight, bias)
    return ONEDNN(x, weight, bias, "none", [], "")  # type: ignore[misc]


def _plain(tensor: Tensor) -> bool:
    """Whether it is float32, and holds its values itself: one that is quantised, say, does not."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32


def _pays(x: Tensor, weight: Tensor) -> bool:
    return x.numel() > 0 and weight.numel() > (LARGE if x.numel() > weight.shape[1] else LARGE_FOR_ONE)


def eager(x: Tensor) -> bool:
    """Whether x is on a processor, and neither gradients, autocast nor a compiler need to see what is done with it."""
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and not (seen or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
