"""Inner rules: what becomes of a gradient, projected or not, before it moves a weight.

A rule turns a gradient R into a direction N and a number, such that W moves by −number·lift(N). It knows nothing of
projections: the same rule serves the parameters that are not projected. Moments are float32 at least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.errors import UsageError, nearest
from weft.optim._optimizer import Group, State

Number = float | Tensor  # a tensor where the step is compiled, so that a new value is no new graph


class Rule(Protocol):
    """One inner rule."""

    def start(self, r: Tensor, group: Group) -> State:
        """The state before the first step, for a gradient like r."""

    def numbers(self, group: Group, step: int) -> tuple[float, ...]:
        """What changes from step to step; steps count from 1."""

    def direction(
        self, state: State, r: Tensor, group: Group, numbers: Sequence[Number]
    ) -> tuple[Tensor, Number]:
        """N and the number that it is to be multiplied by; the state moves on. Of the group: its constants."""


class AdamW:
    """Adam; `eps` is added to √v as it is, before v is corrected for its start at zero."""

    def start(self, r: Tensor, group: Group) -> State:
        return {"exp_avg": torch.zeros_like(r), "exp_avg_sq": torch.zeros_like(r)}

    def numbers(self, group: Group, step: int) -> tuple[float, ...]:
        b1, b2 = group["betas"]
        return (group["lr"] * math.sqrt(1 - b2**step) / (1 - b1**step),)

    def direction(
        self, state: State, r: Tensor, group: Group, numbers: Sequence[Number]
    ) -> tuple[Tensor, Number]:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        return _adam(m, v, r, group), numbers[0]


def _adam(m: Tensor, v: Tensor, r: Tensor, group: Group) -> Tensor:
    """m / (√v + eps) of the moments, which are moved on in place: in one pass where torch has a kernel for that."""
    b1, b2 = group["betas"]
    alike = r.is_contiguous() and m.is_contiguous() and not isinstance(r, DTensor)  # the kernel looks at no strides
    if alike and r.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        n = torch.zeros_like(r)  # AdamW's step from 0, backwards, so late that nothing is corrected for the start
        torch._fused_adamw_(
            [n], [r], [m], [v], [], [_late(r.device)], lr=-1.0, beta1=b1, beta2=b2, weight_decay=0.0,
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        return n
    m.lerp_(r, 1 - b1)
    v.mul_(b2).addcmul_(r, r, value=1 - b2)
    return m / v.sqrt().add_(group["eps"])


@functools.lru_cache(maxsize=8)
def _late(device: torch.device) -> Tensor:
    return torch.tensor(math.inf, device=device)


class Sgd:
    """The gradient itself."""

    def start(self, r: Tensor, group: Group) -> State:
        return {}

    def numbers(self, group: Group, step: int) -> tuple[float, ...]:
        return (group["lr"],)

    def direction(
        self, state: State, r: Tensor, group: Group, numbers: Sequence[Number]
    ) -> tuple[Tensor, Number]:
        return r, numbers[0]


class Adafactor:
    """Hugging Face's Adafactor with the learning rate that is given and no first moment: row and column means of R².

    β₂ₜ = 1 − t^−0.8; the direction's root mean square is clipped at 1.
    """

    _TINY, _CLIP, _DECAY = 1e-30, 1.0, -0.8

    def start(self, r: Tensor, group: Group) -> State:
        if r.dim() < 2:
            return {"exp_avg_sq": torch.zeros_like(r)}
        return {
            "exp_avg_sq_row": r.new_zeros(r.shape[:-1]),
            "exp_avg_sq_col": r.new_zeros(r.shape[:-2] + r.shape[-1:]),
        }

    def numbers(self, group: Group, step: int) -> tuple[float, ...]:
        return group["lr"], 1 - step**self._DECAY

    def direction(
        self, state: State, r: Tensor, group: Group, numbers: Sequence[Number]
    ) -> tuple[Tensor, Number]:
        lr, b2 = numbers
        square = r.square().add_(self._TINY)
        if r.dim() < 2:
            v = state["exp_avg_sq"]
            v.lerp_(square, torch.as_tensor(1 - b2, dtype=v.dtype))
            n = r * v.rsqrt()
        else:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            weight = torch.as_tensor(1 - b2, dtype=row.dtype)
            row.lerp_(square.mean(-1), weight)
            col.lerp_(square.mean(-2), weight)
            n = r * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
        rms = torch.linalg.vector_norm(n) / math.sqrt(n.numel())
        return n / (rms / self._CLIP).clamp(min=1.0), lr


class AdamW8bit:
    """AdamW whose moments are one byte each: blocks of 256 numbers with one scale and a dynamic 8-bit code.

    Codes and scales are torchao's. A tensor of fewer than 4096 numbers keeps float32 moments.
    """

    _BLOCK, _LEAST = 256, 4096

    def start(self, r: Tensor, group: Group) -> State:
        if r.numel() < self._LEAST:
            return AdamW().start(r, group)
        blocks = -(-r.numel() // self._BLOCK)
        zero = {"exp_avg": _code(True).index(0.0), "exp_avg_sq": _code(False).index(0.0)}
        state: State = {}
        for name, code in zero.items():
            state[f"{name}_codes"] = torch.full((blocks, self._BLOCK), code, dtype=torch.uint8, device=r.device)
            state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=r.device)
        return state

    numbers = AdamW.numbers

    def direction(
        self, state: State, r: Tensor, group: Group, numbers: Sequence[Number]
    ) -> tuple[Tensor, Number]:
        if "exp_avg" in state:
            return AdamW().direction(state, r, group, numbers)
        m, v = self._read(state, "exp_avg", True).to(r.dtype), self._read(state, "exp_avg_sq", False).to(r.dtype)
        flat = torch.nn.functional.pad(r.flatten(), (0, m.numel() - r.numel())).view_as(m)
        n = _adam(m, v, flat, group)
        self._write(state, "exp_avg", True, m)
        self._write(state, "exp_avg_sq", False, v)
        return n.flatten()[: r.numel()].view_as(r), numbers[0]

    def _read(self, state: State, name: str, signed: bool) -> Tensor:
        codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
        return _map(signed, codes.device).index_select(0, codes.flatten().int()).view(codes.shape) * scale[:, None]

    def _write(self, state: State, name: str, signed: bool, x: Tensor) -> None:
        scale = x.abs().amax(1).clamp(min=1e-12).float()
        unit = x.float() / scale[:, None]
        state[f"{name}_scale"].copy_(scale)
        state[f"{name}_codes"].copy_(_nearest_codes(unit, signed))


@functools.cache
def _code(signed: bool) -> list[float]:
    """The 256 values that a byte stands for, ascending, in −1…1 or 0…1: dense near zero, coarse near one."""
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError as error:
        raise UsageError("8-bit moments need torchao: pip install 'weft[quantised]'") from error
    return create_dynamic_map(signed)


@functools.lru_cache(maxsize=8)
def _map(signed: bool, device: torch.device) -> Tensor:
    return torch.tensor(_code(signed), dtype=torch.float32, device=device)


def _nearest_codes(unit: Tensor, signed: bool) -> Tensor:
    """The place in the code of what is nearest to each entry, exactly, by two look-ups.

    Floats that share their upper 16 bits lie in an interval that at most one middle of two values divides. This was
    faster than torchao's kernel, compiled too, and than bitsandbytes' (`benchmarks/optimisers.py --eight-bit`), whose
    least value is 1.6e-5 on a processor, where the code goes down to 3e-7.
    """
    first, middles = _intervals(signed, unit.device)
    bits = (unit.contiguous().view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    place = first.index_select(0, bits.flatten())
    place += unit.flatten() > middles.index_select(0, place)
    return place.to(torch.uint8).view_as(unit)


@functools.lru_cache(maxsize=8)
def _intervals(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each interval of floats the place of its least one, and the middles between a code's values."""
    code = _map(signed, torch.device("cpu"))
    middles = (code[1:] + code[:-1]) / 2
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    first = torch.bucketize(ends.amin(0).nan_to_num(0.0), middles, out_int32=True)
    return first.to(device), torch.cat([middles, middles.new_tensor([torch.inf])]).to(device)


RULES: dict[str, type[Rule]] = {"adamw": AdamW, "adamw8bit": AdamW8bit, "adafactor": Adafactor, "sgd": Sgd}


def rule(name: str) -> Rule:
    """The inner rule of this name. Raises UsageError that suggests the nearest."""
    if name not in RULES:
        raise UsageError(f"unknown inner rule {name!r}: {nearest(name, RULES)}")
    return RULES[name]()
