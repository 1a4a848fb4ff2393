"""Fast orthonormal transforms of the last axis: cosine, Walsh-Hadamard, wavelet.

A transform of size n is an n × n orthonormal matrix C that is never formed: `forward` computes x·Cᵀ and `inverse` x·C,
in O(n log n) per row for any n, and each is the other's gradient. Both work in float32 or wider and return x's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.algebra import hadamard

Kernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transform:
    """An orthonormal matrix C (n × n) by what it does.

    Attributes:
        name: "dct", "wht" or "dwt".
        n: its size; the last axis of what it is given.
        analysis, synthesis: x·Cᵀ and x·C without a gradient; called through `forward` and `inverse`.
    """

    name: str
    n: int
    analysis: Kernel
    synthesis: Kernel

    def forward(self, x: Tensor) -> Tensor:
        """x·Cᵀ (… × n): the coefficients of each row."""
        return _Apply.apply(x, self.analysis, self.synthesis)

    def inverse(self, x: Tensor) -> Tensor:
        """x·C (… × n): the rows that have these coefficients."""
        return _Apply.apply(x, self.synthesis, self.analysis)


class _Apply(torch.autograd.Function):
    """A linear map whose transpose is known: nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Kernel, transpose: Kernel) -> Tensor:
        ctx.kernels = apply, transpose
        return _in_blocks(apply, x.reshape(-1, x.shape[-1])).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        apply, transpose = ctx.kernels
        return _Apply.apply(grads[0], transpose, apply), None, None


_BLOCK = 1 << 18  # numbers; the temporaries of so many stay in a processor's cache, which is worth a factor of two


def _in_blocks(apply: Kernel, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel() <= _BLOCK or x.device.type != "cpu":
        return apply(x.to(wide)).to(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = max(1, _BLOCK // x.shape[-1])
    for start in range(0, len(x), count):
        y[start : start + count] = apply(x[start : start + count].to(wide))
    return y


# --- cosine -----------------------------------------------------------------------------------------------------------


def dct(n: int) -> Transform:
    """The orthonormal DCT-II: C[i, j] = √(2/n)·cos((2j + 1)·i·π / 2n), row 0 divided by √2.

    By one real FFT of the same length: with v the even entries followed by the odd ones in reverse, coefficient k is
    the real part of e^(−iπk/2n)·FFT(v)_k, and coefficient n − k minus its imaginary part.
    """
    return Transform("dct", n, functools.partial(_dct, n), functools.partial(_idct, n))


def _dct(n: int, x: Tensor) -> Tensor:
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    z = torch.fft.rfft(v) * _twiddle(n, x.dtype, x.device)
    upper = z.imag[..., 1 : (n + 1) // 2].flip(-1).neg()
    return torch.cat([z.real, upper], dim=-1)


def _idct(n: int, x: Tensor) -> Tensor:
    half = n // 2 + 1
    imag = torch.nn.functional.pad(x[..., n - half + 1 :].flip(-1).neg(), (1, 0))
    z = torch.complex(x[..., :half].contiguous(), imag) / _twiddle(n, x.dtype, x.device)
    v = torch.fft.irfft(z, n)
    y = torch.empty_like(x)
    y[..., ::2] = v[..., : (n + 1) // 2]
    y[..., 1::2] = v[..., (n + 1) // 2 :].flip(-1)
    return y


@functools.lru_cache(maxsize=32)
def _twiddle(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Scale times e^(−iπk/2n) for k = 0 … n/2."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    scale = torch.full_like(k, math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    angle = -math.pi * k / (2 * n)
    return torch.complex((scale * angle.cos()).to(device, dtype), (scale * angle.sin()).to(device, dtype))


# --- Walsh-Hadamard ---------------------------------------------------------------------------------------------------

_RADIX_BITS = 6  # factors of a power of two: a product with one dense 64 × 64 matrix beats six passes of butterflies


def wht(n: int) -> Transform:
    """The Walsh-Hadamard transform H / √n, H = H_K ⊗ H_2 ⊗ … ⊗ H_2 with n = K·2^m (`hadamard.split`).

    Where no ±1 matrix of order K exists or is known here, that factor is the cosine transform: still orthonormal, and
    fast where K is large (a prime n, in the worst case, is a cosine transform and nothing else).
    """
    return Transform("wht", n, functools.partial(_kron, n, False), functools.partial(_kron, n, True))


def _kron(n: int, transpose: bool, x: Tensor) -> Tensor:
    """x·Hᵀ (or x·H) for H a Kronecker product, one factor at a time."""
    shape, right = x.shape, 1
    block, parts = _wht_sizes(n)
    for k in reversed(parts):
        h = _wht_factor(k, x.dtype, x.device)
        h = h if transpose else h.mT
        if right == 1:
            x = x.reshape(-1, k) @ h
        else:
            x = h.mT @ x.reshape(-1, k, right)
        right *= k
    if block > 1:
        x = (_idct if transpose else _dct)(block, x.reshape(-1, block, right).mT).mT
    return x.reshape(shape)


def _wht_sizes(n: int) -> tuple[int, list[int]]:
    """What n is the product of: the side of a fast cosine transform, or 1, and the sides of small dense matrices."""
    block, bits = hadamard.split(n)
    parts = [1 << part for part in _even_parts(bits, _RADIX_BITS)]
    if block > hadamard.LARGEST:
        return block, parts
    return 1, [block, *parts] if block > 1 else parts


@functools.lru_cache(maxsize=64)
def _wht_factor(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A dense factor of the transform (k × k), orthonormal."""
    core = hadamard.matrix(k)
    core = _dct(k, torch.eye(k, dtype=torch.float64)).mT if core is None else core.double() / math.sqrt(k)
    return core.to(device, dtype)


def _even_parts(total: int, most: int) -> list[int]:
    """`total` as a sum of as few and as equal parts of at most `most` as there are.

    >>> _even_parts(10, 6), _even_parts(13, 6), _even_parts(0, 6)
    ([5, 5], [5, 4, 4], [])
    """
    count = -(-total // most)
    return [total // count + (i < total % count) for i in range(count)]


# --- wavelets ---------------------------------------------------------------------------------------------------------


def dwt(n: int, wavelet: str = "haar", levels: int = 1) -> Transform:
    """The periodic wavelet transform: `levels` times, the low half is split again; [low | high, coarse to fine].

    Filters are PyWavelets'. The wavelet must be orthogonal and n divisible by 2^levels, or it would not be orthonormal.
    """
    import pywt

    found = pywt.Wavelet(wavelet)
    if not found.orthogonal:
        raise ValueError(f"wavelet {wavelet!r} is not orthogonal: its inverse is not its transpose")
    if n % (1 << levels):
        raise ValueError(f"size {n} is not divisible by 2^{levels}, so it has no {levels} levels")
    low, high = tuple(found.rec_lo), tuple(found.rec_hi)
    return Transform("dwt", n, functools.partial(_dwt, low, high, levels), functools.partial(_idwt, low, high, levels))


def _dwt(low: tuple[float, ...], high: tuple[float, ...], levels: int, x: Tensor) -> Tensor:
    details = []
    for _ in range(levels):
        details.append(_filtered(x, high))
        x = _filtered(x, low)
    return torch.cat([x, *reversed(details)], dim=-1)


def _filtered(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Σ_j taps[j]·x[2i + j], around the end: half as many."""
    even, odd = x[..., ::2], x[..., 1::2]
    return sum(tap * (odd if j % 2 else even).roll(-(j // 2), -1) for j, tap in enumerate(taps))  # type: ignore[return-value]


def _idwt(low: tuple[float, ...], high: tuple[float, ...], levels: int, x: Tensor) -> Tensor:
    n = x.shape[-1] >> levels
    y = x[..., :n]
    for _ in range(levels):
        detail = x[..., n : 2 * n]
        halves = [
            sum(
                lo * y.roll(j // 2, -1) + hi * detail.roll(j // 2, -1)
                for j, (lo, hi) in enumerate(zip(low, high))
                if j % 2 == parity
            )
            for parity in (0, 1)
        ]
        y, n = torch.stack(halves, dim=-1).flatten(-2), 2 * n  # type: ignore[arg-type]
    return y
