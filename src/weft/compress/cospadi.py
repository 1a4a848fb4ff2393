"""CoSpaDi: each output takes a few atoms of a dictionary that all outputs share, and so has a subspace of its own.

Dmitriy Shopkhoev, Denis Makhov, Magauiya Zhussip, Ammar Ali, Stamatios Lefkimmiatis, "COSPADI: Compressing LLMs via
Calibration-Guided Sparse Dictionary Learning", arXiv 2509.22075.

    E[x·xᵀ] = LᵀL (in × in),    Y = L·Wᵀ ≈ D_L·S    →    y = (x·D)·S + b,    D = L⁻¹·D_L

D is in × k; each column of S (k × out) has s values. E‖Wx − (DS)ᵀx‖² is ‖Y − D_L·S‖², which K-SVD makes small: rounds
of orthogonal matching pursuit, which gives every column its s atoms, and of a sweep that improves one atom after the
other. With s = k all outputs share one subspace, and the best there is is SVD-LLM's.

A layer's size is k, with s = k/ρ for the given `rho`. Counted is all that is stored: k·in + s·out numbers, and k bits
for each output that say where its values are (or their places as whole numbers, once ρ is so large that those are
shorter). The budget in public code of the authors counts the numbers only.

`start` is where D_L begins: the first singular vectors of Y, and columns of it where there are not enough; k columns of
Y; or random directions. The paper's choice is not known here. Of two trained layers, singular vectors leave a query
projection much nearer than columns do, and a down projection about as near (benchmarks/sparse_coding.py, which compares
the other choices too). D_L has columns of length one; those of D are as long as L⁻¹ makes them, in float64.

A column of Y keeps the atoms it had where a new pursuit finds worse ones, so that the error never rises. It ends after
`iterations` rounds, or when one takes off less than `tolerance` of the error. A sweep takes two power iterations an
atom, from where the atom is; more come out at the same error.

With `group_size` = n, layers of one type and one shape in n consecutive blocks share D, which is stored once; where n
does not divide their number, the last are fewer:

    Σ_g E[x_g·x_gᵀ] = LᵀL,    L·[W₁ᵀ … W_nᵀ] ≈ D_L·[S₁ … S_n]

The error is that of every layer on the inputs of all. A group has one size, for k·in + s·n·out numbers; statistics of n
blocks are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.algebra.gram import over_root, root, times_root
from weft.algebra.random import generator
from weft.algebra.sparse_coding import ksvd
from weft.compress._calibration import Statistics
from weft.compress._config import AnewConfig, CalibratedConfig
from weft.compress._factoriser import Factoriser, Tensors, moment
from weft.compress._layers import Group, Layer, Unit, type_of
from weft.errors import UsageError
from weft.linear._codes import smallest_int, support_bits
from weft.linear.dictionary import Dictionary
from weft.registry import Card

CARD = Card(
    title="COSPADI: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning",
    arxiv="2509.22075",
    year=2025,
    summary="a dictionary learned on calibration data, of which every output takes its own few atoms",
    knob="keep",
    needs=("data",),
    limitations="saves memory, not time; on a CPU, layers of thousands of inputs take hours; groups of layers "
    "(group_size) share a dictionary only within one type, and not with sequential",
    reasons={"non_monotone": "each size is learned anew, and alternating steps end in different local optima"},
)


@dataclass
class CospadiConfig(AnewConfig, CalibratedConfig):
    """Options of CoSpaDi."""

    rho: float = field(default=2.0, metadata={"help": "atoms in the dictionary for each one that an output takes, k/s"})
    iterations: int = field(default=60, metadata={"help": "rounds of pursuit and K-SVD, at most", "short": 3})
    tolerance: float = field(
        default=0.01, metadata={"help": "it stops when a round takes off less than this share of the error"}
    )
    start: Literal["svd", "data", "random"] = field(
        default="svd", metadata={"help": "first atoms: singular vectors of Y, columns of Y, or random directions"}
    )
    group_size: int = field(
        default=1, metadata={"help": "layers of one type that share a dictionary, in so many consecutive blocks"}
    )
    seed: int = field(default=0, metadata={"help": "draws columns and random directions"})

    def validate(self) -> None:
        super().validate()
        if not (isinstance(self.rho, int | float) and 1 <= self.rho < math.inf):
            raise UsageError(f"rho={self.rho!r}: a number of at least 1, atoms for each one that an output takes")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0:
            raise UsageError(f"iterations={self.iterations!r} must be a whole number, 0 or more")
        if not (isinstance(self.tolerance, int | float) and 0 <= self.tolerance < 1):
            raise UsageError(f"tolerance={self.tolerance!r}: a share of the error, at least 0 and below 1")
        if self.start not in ("svd", "data", "random"):
            raise UsageError(f"start={self.start!r}: svd, data or random")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise UsageError(f"group_size={self.group_size!r} must be a whole number, 1 or more")
        if self.sequential and self.group_size > 1:
            raise UsageError(
                f"sequential calibrates one block after the other, and group_size={self.group_size} takes several at "
                "once: use one of them"
            )


class CospadiFactoriser(Factoriser[CospadiConfig]):
    """E‖Wx − (DS)ᵀx‖²; of a group, W is its layers' matrices one below the other."""

    kind = "dictionary"
    nested = False

    def units(self, model: nn.Module) -> Sequence[Unit]:
        layers = [part for unit in super().units(model) for part in unit.parts]
        alike: dict[Any, list[Layer]] = {}
        for layer in layers:
            alike.setdefault(_likeness(layer), []).append(layer)
        many = self.config.group_size
        groups = [same[start : start + many] for same in alike.values() for start in range(0, len(same), many)]
        return [_unit(group) for group in sorted(groups, key=lambda group: layers.index(group[0]))]

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("input",)

    def nonzeros(self, k: int) -> int:
        """s."""
        return max(int(k / self.config.rho + 1e-9), 1)

    def values(self, layer: Unit) -> Tensor:
        return torch.linalg.svdvals(_wide(layer))

    def sizes(self, layer: Unit) -> Sequence[int]:
        # as many values as W has rank reproduce it, whatever they cost
        out, in_ = layer.shape
        whole = math.ceil(self.config.rho * min(out, in_))
        if not self.config.guard:
            return range(1, whole + 1)
        below = (out * in_ - 1) / (in_ + out / self.config.rho)  # of which none saves bits
        return range(1, min(whole, int(below) + 1) + 1)

    def bits(self, layer: Unit, size: int) -> int:
        s, (out, in_) = self.nonzeros(size), layer.shape
        numbers = size * in_ + s * out
        return numbers * layer.parts[0].weight.element_size() * 8 + out * support_bits(size, s)

    def reads(self, layer: Unit, size: int) -> int:
        again = (len(layer.parts) - 1) * size * layer.shape[1]  # every layer of a group multiplies by D
        return self.bits(layer, size) + again * layer.parts[0].weight.element_size() * 8

    def workspace(self, layers: Sequence[Unit]) -> float:
        return super().workspace(layers) * max(len(layer.parts) for layer in layers)

    def decompose(self, layer: Unit, statistics: Any, size: int | None) -> Tensors:
        assert size is not None
        w, config, s = _wide(layer), self.config, self.nonzeros(size)
        seen: list[Statistics] = [statistics] if isinstance(layer, Layer) else list(statistics.values())
        exact = s >= min(layer.shape)  # whatever the weights
        c = None if exact else root(reduce(torch.add, (moment(each.input, config.shrink) for each in seen)))  # Lᵀ
        y = times_root(w.double().mT, c).mT.to(w.dtype)  # columns of Y as rows
        found = ksvd(
            y,
            size,
            s,
            generator=generator("cospadi", config.seed, layer.name),
            start=config.start,
            rounds=config.iterations,
            tolerance=config.tolerance,
        )
        left = (y - found.product()).double().square().sum()
        return {
            "atoms": over_root(found.atoms.double().mT, c).mT.to(w.dtype),
            "places": found.index.to(smallest_int(size)),
            "values": found.values,
            "errors": left / y.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny),
        }

    def build(self, layer: Layer, tensors: Tensors, size: int, leader: Dictionary | None = None) -> Dictionary:
        places, values = tensors["places"].long(), tensors["values"]
        return Dictionary.from_codes(tensors["atoms"], places, values, layer.bias, layer.weight.dtype, leader)

    def replace(self, model: nn.Module, layer: Unit, tensors: Tensors, size: int) -> str:
        leader = None
        rows = [part.out for part in layer.parts]
        for part, places, values in zip(layer.parts, tensors["places"].split(rows), tensors["values"].split(rows)):
            made = self.build(part, {**tensors, "places": places, "values": values}, size, leader)
            model.set_submodule(part.name, made.train(part.module.training))
            leader = leader or made
        return self.kind


def _likeness(layer: Layer) -> tuple[Any, ...]:
    """What layers that can share a dictionary have in common: their place in a block, and how W is stored."""
    place = layer.name.removeprefix(layer.block) if layer.block else type_of(layer.name)
    return place, layer.shape, layer.weight.dtype, layer.weight.device


def _unit(group: Sequence[Layer]) -> Unit:
    first = group[0]
    if len(group) == 1:
        return first
    name = f"{first.name}+{len(group) - 1}"  # of its first, and how many more
    return Group(name, tuple(group), first.block, (sum(layer.out for layer in group), first.in_))


def _wide(layer: Unit) -> Tensor:
    """W, of a group one below the other."""
    return torch.cat([part.wide for part in layer.parts])
