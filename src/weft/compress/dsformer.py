"""DSFormer: each block of a matrix is a small dense basis times coefficients, as few in every row, which are found anew
while the task is learnt.

Rahul Chand, Yashoteja Prabhu, Pratyush Kumar, "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse
Weight Factorization", arXiv 2312.13211.

    W = [W₁ … W_n],  W_b ≈ S_b·D_b       D_b: k × m;  S_b: out × k, with s entries in each row;  m of the inputs a block

    start: D_b by rounds of least squares and pursuit, S_b by orthogonal matching pursuit of the rows of W_b in D_b
    straight-through factoriser, of each step:
        S ← pursuit of W in D,  Ŵ = S·D;      G = ∂loss/∂Ŵ
        W ← as if ∂Ŵ/∂W were the identity: its gradient is G;      D_b: its gradient is S_bᵀ·G_b
    at last, from the share `stf` of the steps on: S once more, W is dropped, and D and the entries of S are trained

W, of full size, is there while it is trained, with moments of its own; D's rows are made of length one before each
pursuit, and a row that no output takes becomes what is represented worst. S is found anew every `refresh` steps; in
between, and before an evaluation, only its entries are fitted. Without training it is a compression of weights alone.

No code of the authors is known, and of the paper not more than its abstract and a review. So the following is weft's:
that inputs are cut (`axis="out"` cuts outputs), m = 32 with k = m, the schedule, that W starts as the dense weight, and
that `mu`·‖W − Ŵ‖² and `beta`·KL(teacher ‖ student), which the paper may have, are 0 by default. D takes k/out of what W
takes: where out is below 8·k, k is an eighth of it, or s if that is more.

Counted is all that is stored: k·in + n·out·s numbers, and where the entries are, which takes as much as 5 to 8 bits an
entry. A layer's size is s. There is no decay in the recipe: it would act on W, and on D besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from weft.algebra.blocks import column_blocks, joined
from weft.algebra.random import generator
from weft.algebra.sparse_coding import SparseCode, fitted, omp, optimal_directions, reseeded, spread
from weft.compress._config import AnewConfig
from weft.compress._distil import Objective, Seen, apart
from weft.compress._factoriser import Factoriser, Tensors
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.linear._codes import smallest_int, support_bits
from weft.linear._structured import Structured
from weft.linear.small_dense_semi_sparse import Axis, SmallDenseSemiSparse
from weft.registry import Card

CARD = Card(
    title="DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization",
    arxiv="2312.13211",
    year=2023,
    summary="blocks of a small basis times coefficients, as few a row, found anew while the task is learnt",
    knob="keep",
    recipe={"learning_rate": 1e-4, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "linear"},
    limitations="Saves memory, not time. Its training holds the whole weights beside the factors, and takes a pursuit "
    "every few steps.",
    reasons={"non_monotone": "each size has a basis of its own, and alternating steps end in different local optima"},
)


@dataclass
class DsformerConfig(AnewConfig):
    """Options of DSFormer."""

    block_size: int = field(default=32, metadata={"help": "m, of the inputs in a block, at most", "short": 4})
    atoms: float = field(default=1.0, metadata={"help": "k/m, rows of a block's basis for each of its columns"})
    axis: Axis = field(default="in", metadata={"help": "what is cut into blocks: the inputs (in) or outputs (out)"})
    rounds: int = field(default=20, metadata={"help": "of the start's least squares and pursuit, at most", "short": 3})
    seed: int = field(default=0, metadata={"help": "draws what the basis starts from where k is above m"})
    stf: float = field(
        default=0.8, metadata={"help": "share of the training steps in which places change; then they are fixed"}
    )
    refresh: int = field(default=10, metadata={"help": "T_f, steps from one pursuit to the next"})
    mu: float = field(default=0.0, metadata={"help": "µ, the weight of ‖W − Ŵ‖² in training"})
    beta: float = field(default=0.0, metadata={"help": "the weight of the divergence from the whole model's outputs"})

    def validate(self) -> None:
        super().validate()
        for name, least in (("block_size", 1), ("rounds", 0), ("refresh", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r} must be a whole number of at least {least}")
        if not 0 < self.atoms < math.inf:
            raise UsageError(f"atoms={self.atoms!r}: rows of the basis for each column of a block, above 0")
        if self.axis not in get_args(Axis):
            raise UsageError(f"axis={self.axis!r}: in or out, whichever is cut into blocks")
        if not 0 <= self.stf <= 1:
            raise UsageError(f"stf={self.stf!r}: a share of the steps, from 0 to 1")
        for name in ("mu", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a number of at least 0")


class DsformerFactoriser(Factoriser[DsformerConfig]):
    """‖W − [S₁·D₁ …]‖_F, unweighted; a size is s."""

    kind = "small_dense_semi_sparse"
    nested = False

    def sides(self, layer: Layer) -> tuple[int, int, int]:
        """rows, side and m: the side is cut into blocks of m."""
        rows, side = (layer.out, layer.in_) if self.config.axis == "in" else (layer.in_, layer.out)
        return rows, side, min(self.config.block_size, side)

    def atoms(self, layer: Layer, size: int) -> int:
        """k."""
        rows, _, m = self.sides(layer)
        return min(max(round(self.config.atoms * m), 1), max(rows // 8, size))

    def sizes(self, layer: Layer) -> Sequence[int]:
        _, _, m = self.sides(layer)
        sizes = range(1, min(self.atoms(layer, m), m) + 1)
        return [s for s in sizes if self.bits(layer, s) < layer.bits] if self.config.guard else sizes

    def bits(self, layer: Layer, size: int) -> int:
        (rows, side, m), k = self.sides(layer), self.atoms(layer, size)
        blocks = -(-side // m)
        numbers = k * side + rows * blocks * size
        return numbers * layer.weight.element_size() * 8 + rows * support_bits(k, size, blocks)

    def operations(self, layer: Layer) -> tuple[float, float]:
        rows, side, m = self.sides(layer)
        s = m // 3 + 1  # or so: the size is chosen later
        k = self.atoms(layer, s)
        pursuit = 2.0 * rows * side * k + rows * side / m * s * s * k
        return (self.config.rounds + 1) * (pursuit + 4.0 * rows * side / m * k * k), 9.0 * side * m * m

    def decompose(self, layer: Layer, statistics: Any, size: int | None) -> Tensors:
        assert size is not None
        (_, _, m), k = self.sides(layer), self.atoms(layer, size)
        y = column_blocks(layer.wide if self.config.axis == "in" else layer.wide.mT, m)
        draw = generator("dsformer", self.config.seed, layer.name)
        found = optimal_directions(y, k, size, generator=draw, rounds=self.config.rounds)
        left = (y - found.product()).double().square().sum()
        return {
            "atoms": found.atoms,
            "places": found.index.to(smallest_int(k)),
            "values": found.values,
            "errors": left / y.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny),
        }

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        found = SparseCode(tensors["atoms"], tensors["places"].long(), tensors["values"], [])
        options: Any = {"axis": self.config.axis, "dtype": layer.weight.dtype}
        return SmallDenseSemiSparse.from_codes(found, layer.in_, layer.out, layer.bias, **options)


# --- the training -----------------------------------------------------------------------------------------------------


class DsformerObjective(Objective[DsformerConfig]):
    """The task, through the straight-through factoriser; µ·‖W − Ŵ‖² and the divergence where they are asked for."""

    def __init__(self, config: DsformerConfig, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, student, teacher)
        self.reads_teacher = config.beta > 0
        self.layers = {
            name: StraightThrough(layer, Layer(name, teacher.get_submodule(name), "").wide)
            for name, layer in student.named_modules()
            if isinstance(layer, SmallDenseSemiSparse)
        }
        if not self.layers:
            raise UsageError("dsformer trains layers of its own, and the student has none: compress it with dsformer")
        for name, layer in self.layers.items():
            student.set_submodule(name, layer.train(student.training))
        self._step = -1

    def on_step(self, step: int, steps: int) -> None:
        if step == self._step:  # a later micro-batch
            return
        self._step = step
        last = step >= math.ceil(self.config.stf * steps)
        for layer in self.layers.values():
            if not layer.fixed:
                layer.renew(anew=last or step % self.config.refresh == 0)
                layer.fixed.fill_(last)

    def terms(self, student: Seen, teacher: Seen) -> list[Tensor]:
        return [self.config.beta * apart(student.logits, teacher.logits)] if self.config.beta else []

    def penalty(self) -> Tensor | None:
        free = [layer for layer in self.layers.values() if not layer.fixed]
        if not (self.config.mu and free):
            return None
        return self.config.mu * torch.stack([layer.distance() for layer in free]).sum()

    def finish(self) -> None:
        for name, layer in self.layers.items():
            if not layer.fixed:
                layer.code(anew=True)
            self.student.set_submodule(name, layer.layer.train(layer.training))


class StraightThrough(nn.Module):
    """A layer in training, with the whole weight W (out × in) of which S is found, until its places are `fixed`."""

    fixed: Tensor

    def __init__(self, layer: SmallDenseSemiSparse, w: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.whole = nn.Parameter(w.detach().to(layer.values, copy=True).contiguous())  # the teacher keeps its own
        self.register_buffer("fixed", torch.tensor(False, device=layer.values.device))
        self._coded: tuple[int, int] | None = None  # the versions of W and D that S was found of

    def forward(self, x: Tensor) -> Tensor:
        if not self.fixed and self._coded != self._versions():
            self.code(anew=False)
        if self.fixed or not self.training:
            return self.layer(x)
        return linear(x, _Through.apply(self.whole, self.layer.atoms, self.layer), self.layer.bias)

    def distance(self) -> Tensor:
        """‖W − Ŵ‖², of which Ŵ rests."""
        return (self.whole - self.layer.dense().detach()).square().sum()

    @torch.no_grad()
    def renew(self, *, anew: bool) -> None:
        """Before a step: D in rows of length one, S to go with it, and other rows of D for those in no use."""
        layer, d = self.layer, self.layer.dictionaries()
        layer.atoms.copy_(joined(d / lengths(d), layer.atoms.shape[1]))
        self.code(anew=anew)
        if not anew:
            return
        index, values = layer.codes()
        idle = ~spread(index, values, d.shape[1]).any(1)
        if bool(idle.any()):
            y = self._blocks()
            layer.atoms.copy_(joined(reseeded(y, self._unit(), index, values.to(y), idle), layer.atoms.shape[1]))
            self._coded = self._versions()  # they have no entries yet

    @torch.no_grad()
    def code(self, *, anew: bool) -> None:
        """S of W in D as it is: its places and entries, or, where they stay, its entries alone."""
        layer, length, d = self.layer, lengths(self.layer.dictionaries()), self._unit()
        gram, products = d @ d.mT, self._blocks() @ d.mT
        if anew:
            index, values = omp(gram, products, layer.nonzeros)
            order = index.argsort(-1)
            index, values = index.gather(-1, order), values.gather(-1, order)
        else:
            index, _ = layer.codes()
            values = fitted(gram, products, index)
        each = length[..., 0].to(values).gather(1, index.flatten(1)).view(index.shape)
        layer.set_codes(index, values / each)
        self._coded = self._versions()

    def _unit(self) -> Tensor:
        """D_b in rows of length one, n × k × m, in float32 at least."""
        d = self.layer.dictionaries(torch.promote_types(self.whole.dtype, torch.float32))
        return d / lengths(d)

    def _blocks(self) -> Tensor:
        """W_b, n × rows × m."""
        w = self.whole.to(torch.promote_types(self.whole.dtype, torch.float32))
        return column_blocks(w if self.layer.axis == "in" else w.mT, self.layer.block_size)

    def _versions(self) -> tuple[int, int]:
        return self.whole._version, self.layer.atoms._version


def lengths(d: Tensor) -> Tensor:
    """The lengths of rows (… × m → … × 1), 1 of those that are zero."""
    length = d.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, length, 1.0)


class _Through(torch.autograd.Function):
    """Ŵ = S·D, of which W takes the gradient as it comes, and D the true one."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, atoms: Tensor, layer: SmallDenseSemiSparse) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*layer.codes())
        return layer.dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, (index, values) = ctx.layer, ctx.saved_tensors
        g = column_blocks(grad if layer.axis == "in" else grad.mT, layer.block_size)
        of_atoms = spread(index, values.to(g.dtype), len(layer.atoms)).mT @ g
        return grad, joined(of_atoms, layer.atoms.shape[1]), None
