"""Matrices in codes of few bits: grids for groups of a row's entries, codes on them, and codes packed into bytes.

    w ≈ (q − z)·s      q: codes, 0 to 2^bits − 1;  s, `step`, and z, `zero`, itself a code: one for each group

0 is on every grid, as the code z, and no entry of a group is further than half a step from it. Steps are numbers of
float16, rounded up, whatever the dtype that they are computed with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

WIDTHS = (2, 3, 4, 8)  # bits a code
LARGEST = float(torch.finfo(torch.float16).max)  # a step
BLOCK = 128  # columns whose errors are passed on to those right of them at once


def grouped(w: Tensor, group: int) -> Tensor:
    """Rows (n × k) in groups, n × ⌈k/group⌉ × group: the last one is filled with zeros, which every grid has."""
    return pad(w, (0, -w.shape[1] % group)).unflatten(1, (-1, group))


def grid(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero of each group (… × g), in its dtype. Raises ValueError where float16 has no such step."""
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    exact = (high - low) / (2**bits - 1)
    if bool((exact > LARGEST).any()):
        raise ValueError(f"weights up to {float(w.abs().max()):.3g} cannot be quantised: steps are float16")
    exact = torch.where(exact > 0, exact, 1)  # a group of zeros
    near = exact.half()
    up = (near.view(torch.int16) + (near.to(w) < exact)).to(torch.int16)  # the next number has the next bits
    step = up.view(torch.float16).to(w)
    return step, (-low / step).round_()


def encode(w: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, uint8, of what has one grid or broadcasts with it."""
    return ((w / step).round_() + zero).clamp_(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, step: Tensor, zero: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """(q − z)·s, n × k, of codes n × k, rounded once; computed in float32 at least. `step` and `zero`: n × groups."""
    wide = torch.promote_types(dtype, torch.float32)
    found = grouped(codes, group).to(wide)
    found = found.sub_(zero.to(wide)[..., None]).mul_(step.to(wide)[..., None])
    return found.flatten(1)[:, : codes.shape[1]].to(dtype)


def nearest(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n × k), steps and zeros (n × groups) of a matrix, each entry at the nearest point of its grid."""
    parts = grouped(w, group)
    step, zero = grid(parts, bits)
    codes = encode(parts, step[..., None], zero[..., None], bits)
    return codes.flatten(1)[:, : w.shape[1]].contiguous(), step, zero


def gptq(w: Tensor, moment: Tensor, bits: int, group: int, damping: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """The same, column after column, where what is lost in one is made up for by all to its right.

    Less is lost of ‖(W − Wq)·x‖² for x of this second moment (k × k), whose diagonal is raised by a share of its mean.
    After Elias Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arXiv 2210.17323: columns in their order, a group's grid from what has become of it when its turn comes.
    """
    columns, n = w.shape[1], w.shape[0]
    upper = _inverse_root(moment, damping).to(w)
    rest = w.mT.clone(memory_format=torch.contiguous_format)  # a column is a row here, and lies together
    codes = torch.empty(columns, n, dtype=torch.uint8, device=w.device)
    steps, zeros = [], []
    for first in range(0, columns, group):
        last = min(first + group, columns)
        step, zero = grid(rest[first:last].mT, bits)
        steps.append(step)
        zeros.append(zero)
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            lost = rest.new_empty(stop - start, n)
            for j in range(start, stop):  # each depends on the one before it; all rows of W at once
                codes[j] = encode(rest[j], step, zero, bits)
                error = lost[j - start] = (rest[j] - (codes[j].to(w) - zero) * step) / upper[j, j]
                rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            rest[stop:].addmm_(upper[start:stop, stop:].mT, lost, alpha=-1)
    return codes.mT.contiguous(), torch.stack(steps, 1), torch.stack(zeros, 1)


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """The upper U with UᵀU = H⁻¹ of the damped H: row j holds what of column j's loss those behind it make up for."""
    h = moment.double().clone()
    mean = h.diagonal().mean()
    h.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes (n × k, uint8) one behind the other, the lowest bits first: uint8, n × ⌈k·bits/8⌉."""
    (n, k), (many, size) = codes.shape, _word(bits)
    words = pad(codes, (0, -k % many)).view(n, -1, many).int()
    words = (words << _shifts(many, bits, words)).sum(2, dtype=torch.int32)
    parts = words[..., None] >> _shifts(size, 8, words) & 255
    return parts.to(torch.uint8).flatten(1)[:, : packed_size(k, bits)].contiguous()


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """Codes (n × k, uint8) from `pack`."""
    many, size = _word(bits)
    words = pad(packed, (0, -packed.shape[1] % size)).view(len(packed), -1, size)
    if size > 1:
        words = (words.int() << _shifts(size, 8, words.int())).sum(2, keepdim=True, dtype=torch.int32)
    codes = words >> _shifts(many, bits, words) & 2**bits - 1
    return codes.to(torch.uint8).flatten(1)[:, :k]


def packed_size(k: int, bits: int) -> int:
    """Bytes of k codes."""
    return -(-k * bits // 8)


def _word(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def _shifts(many: int, bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, many * bits, bits, dtype=like.dtype, device=like.device)
