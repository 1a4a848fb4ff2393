"""NOLA: LoRA whose two factors are mixtures of seeded random matrices; only the mixing coefficients are trained.

Soroush Abbasi Koohpayegani, Navaneet K. L. et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis",
ICLR 2024, arXiv 2310.02556.

    A = A₀ + Σ_i a_i·P_i / √k           P_i: r × in,   A₀ Kaiming-uniform       a: k, trained
    B =      Σ_j b_j·Q_j / √k           Q_j: out × r                            b: k, trained
    y = x·Wᵀ + s·x·Aᵀ·Bᵀ,  s = α / r    entries of P, Q uniform in (−1, 1)

The number of trained values, 2k a weight, depends neither on the rank nor on the weight's shape. `init="zero"` starts
with a = b = 0, so ΔW = 0 and a learns from the second step on; `init="mean"` has no A₀ and starts with a = b = 1/k,
where ΔW is not zero.

P_i, Q_j and A₀ are pure functions of (seed, shape, number; A₀ of the module's name), drawn on the CPU by generators of
their own, so a saved adapter holds the coefficients alone. Layers of one shape share their bases unless
`share_basis=False`. `basis="stored"` keeps them in memory, once a model; `basis="regenerate"` draws them again, `chunk`
at a time, in every forward and backward pass: the same numbers to the last bit, less memory, more time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._bases import SharedBasis, fingerprint, shared_basis, verify
from weft.adapters._config import AdapterConfig
from weft.adapters._core import on_meta
from weft.adapters._delta import Group, LowRankDelta, Site
from weft.algebra.random import generator
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="NOLA: Compressing LoRA using Linear Combination of Random Basis",
    arxiv="2310.02556",
    year=2024,
    summary="LoRA factors as mixtures of seeded random matrices: 2k trained numbers a weight, whatever its shape",
    knob="num_basis",
    recipe={"learning_rate": 1e-2, "weight_decay": 0.0, "warmup_ratio": 0.06, "lr_scheduler_type": "linear"},
    limitations=(
        "Coefficients need a far larger learning rate than LoRA. Every forward mixes the bases anew: for inference, "
        "merge or export to LoRA (exact)."
    ),
)


@dataclass
class NolaConfig(AdapterConfig):
    """Options of NOLA."""

    num_basis: int = field(default=1024, metadata={"help": "k, random matrices mixed into each of the two factors"})
    r: int = field(default=8, metadata={"help": "rank of ΔW; it costs no trained parameters"})
    lora_alpha: float = field(default=2.0, metadata={"help": "α; ΔW is scaled by α / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    init: str = field(default="zero", metadata={"help": "zero (ΔW = 0), or mean (a = b = 1/k, without A₀)"})
    seed: int = field(default=0, metadata={"help": "seed of the random matrices"})
    share_basis: bool = field(default=True, metadata={"help": "one basis for all weights of a shape"})
    basis: str = field(
        default="stored", metadata={"help": "stored (faster), or regenerate (less memory; same numbers)"}
    )
    chunk: int = field(default=64, metadata={"help": "random matrices that are held at a time with basis=regenerate"})

    def validate(self) -> None:
        super().validate()
        for name in ("num_basis", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.init not in ("zero", "mean"):
            raise UsageError(f"init={self.init!r}: use zero or mean")
        if self.basis not in ("stored", "regenerate"):
            raise UsageError(f"basis={self.basis!r}: use stored or regenerate")


class NolaDelta(LowRankDelta):
    """ΔW = s·B·A."""

    config: NolaConfig
    A0: Tensor

    def __init__(self, config: NolaConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r = site.check_rank(config.r)
        self.scale = config.lora_alpha / config.r
        owner = "" if config.share_basis else site.name
        self.p = Mixture(f"{config.seed}/{owner}/P", config, self.r, site.in_)
        self.q = Mixture(f"{config.seed}/{owner}/Q", config, site.out, self.r)
        start = 1 / config.num_basis if config.init == "mean" else 0.0
        self.a = nn.Parameter(torch.full_like(site.empty(config.num_basis), start))
        self.b = nn.Parameter(torch.full_like(site.empty(config.num_basis), start))
        a0 = torch.zeros(self.r, site.in_)
        if config.init == "zero" and not on_meta(site):
            nn.init.kaiming_uniform_(a0, a=math.sqrt(5), generator=generator("nola", config.seed, site.name, "A0"))
        self.register_buffer("A0", a0.to(site.device), persistent=False)
        if site.stored and not on_meta(site):
            verify(site.name, self._fingerprint(), config)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.q(self.b), self.A0 + self.p(self.a)

    def _fingerprint(self) -> str:
        return fingerprint(self.A0, *(draw(m.key, m.rows, m.cols, 0, 1) for m in (self.p, self.q)))

    def checksums(self) -> dict[str, str]:
        return {self.name: self._fingerprint()}

    def count(self) -> int:
        return 2 * self.config.num_basis

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        return {"a": Group(weight_decay=0.0), "b": Group(weight_decay=0.0)}


def draw(key: str, rows: int, cols: int, start: int, stop: int) -> Tensor:
    """Random matrices number start … stop − 1, (stop − start) × rows × cols, uniform in (−1, 1).

    Each has a generator of its own, so that any piece can be drawn by itself.
    """
    made = torch.empty(stop - start, rows, cols)
    for i, matrix in enumerate(made, start):
        matrix.uniform_(-1, 1, generator=generator("nola", key, rows, cols, i))
    return made


class Mixture:
    """c ↦ Σ_i c_i·P_i / √k, from stored or from regenerated matrices P_i (rows × cols)."""

    def __init__(self, key: str, config: NolaConfig, rows: int, cols: int) -> None:
        self.key, self.rows, self.cols = key, rows, cols
        self.chunk, self.stored = config.chunk, config.basis == "stored"
        # drawn on first use; the layers that hold a piece keep it in memory
        self.pieces = list(_pieces(key, rows, cols, config.num_basis, config.chunk)) if self.stored else []

    def __call__(self, c: Tensor) -> Tensor:
        return mix(c / math.sqrt(len(c)), self.key, self.rows, self.cols, self.chunk, self.stored)

    def stored_bytes(self) -> int:
        """Bytes of the random matrices in memory; layers that share them hold them once."""
        return sum(piece.stored_bytes() for piece in self.pieces)


def _pieces(key: str, rows: int, cols: int, k: int, chunk: int) -> Iterator[SharedBasis]:
    for start in range(0, k, chunk):
        yield shared_basis(draw, key, rows, cols, start, min(start + chunk, k))


def _flat(piece: SharedBasis, like: Tensor, stored: bool) -> Tensor:
    p = piece.tensor(like.device) if stored else piece.draw(*piece.key)
    return p.to(like).flatten(1)


# Operators of their own, opaque to autograd and torch.compile: neither keeps nor traces what is drawn. Stored or not,
# the same pieces are multiplied in the same order, each in memory of its own: equal to the last bit.
@torch.library.custom_op("weft::nola_mix", mutates_args=())
def mix(c: Tensor, key: str, rows: int, cols: int, chunk: int, stored: bool) -> Tensor:
    """Σ_i c_i·P_i, `chunk` matrices at a time."""
    total: Any = 0
    for part, piece in zip(c.split(chunk), _pieces(key, rows, cols, len(c), chunk)):
        total = total + part @ _flat(piece, c, stored)
    return total.view(rows, cols)


@torch.library.custom_op("weft::nola_inner", mutates_args=())
def inner(g: Tensor, key: str, k: int, chunk: int, stored: bool) -> Tensor:
    """⟨g, P_i⟩ for every i: the gradient of c."""
    rows, cols = g.shape
    return torch.cat([_flat(piece, g, stored).mv(g.flatten()) for piece in _pieces(key, rows, cols, k, chunk)])


@mix.register_fake
def _(c: Tensor, key: str, rows: int, cols: int, chunk: int, stored: bool) -> Tensor:
    return c.new_empty(rows, cols)


@inner.register_fake
def _(g: Tensor, key: str, k: int, chunk: int, stored: bool) -> Tensor:
    return g.new_empty(k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    c, ctx.key, _, _, ctx.chunk, ctx.stored = inputs
    ctx.k = len(c)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    return inner(g, ctx.key, ctx.k, ctx.chunk, ctx.stored), None, None, None, None, None


mix.register_autograd(_backward, setup_context=_setup)
