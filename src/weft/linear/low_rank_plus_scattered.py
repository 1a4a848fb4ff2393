"""Low rank plus scattered: a product of two thin matrices, and single entries at places that never change.

    y = x·Wᵀ + b        W = c·B·A + S       A: r × in, `down`;  B: out × r, `up`;  b: out, in `up`
                                            S: out × in, k entries, `values`, anywhere; c: `scale`, or tanh of `gate`

r·(in + out) + k numbers in place of in·out, and where the k are: a bit for each entry of W, or a whole number for each
of them, whichever is shorter.

Made for training. W is written out for some of its rows at a time, each time it is needed, and so is its gradient:
neither is kept from the forward pass to the backward pass, as autograd alone would keep W. That costs 2·r·in·out
operations more in each, whatever the batch. A few rows without gradients (text that is generated) go through the
factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.algebra.bits import unpack
from weft.algebra.matmul import times
from weft.algebra.random import generator
from weft.algebra.svd import svd_top
from weft.errors import UsageError, WeftError
from weft.linear._codes import as_bits, smallest_int, stored
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank, computed_in, plain

TILE = 2**20  # entries of W that are written out at a time
FEW = 16  # rows of x up to which the factors are faster


class LowRankPlusScattered(StructuredLinear):
    """W = c·B·A + S."""

    values: nn.Parameter
    support: Tensor
    places: Tensor  # k, ascending, in the rows of W one behind the other; not stored

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        nonzeros: int,
        scale: float | None = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            nonzeros: k, 0 to out·in.
            scale: c; None for one that is trained.
        """
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.rank, self.scale = check_rank(rank, out_features, in_features), scale
        size = out_features * in_features
        if not 0 <= nonzeros <= size:
            raise UsageError(f"nonzeros={nonzeros}: the sparse part of {out_features} × {in_features} stores 0 to all")
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)
        self.values = nn.Parameter(torch.empty(nonzeros, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if scale is None else None
        first = torch.arange(nonzeros, device=device)
        self.register_buffer("support", stored(first[None], size)[0])
        self.register_buffer("places", first.to(smallest_int(size)), persistent=False)
        starts = range(0, out_features, self._tile)
        self._ends = [*(min(row * in_features, nonzeros) for row in starts), nonzeros]
        self.register_load_state_dict_post_hook(_derived)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, *, rank: int, density: float, seed: int = 0
    ) -> LowRankPlusScattered:
        """B·A the nearest of that rank to a weight, and what is left of it at random places, by `seed`; c = 1."""
        out, in_ = weight.shape
        options: Any = {"rank": rank, "nonzeros": int(density * weight.numel()), "bias": bias is not None}
        layer = cls(in_, out, **options, device=weight.device, dtype=weight.dtype)
        layer.draw_places(generator(seed))
        layer.fit(weight)
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def draw_places(self, source: torch.Generator) -> None:
        """Choose the places of S, each set of k as likely as any other."""
        size = self.out_features * self.in_features
        places = torch.randperm(size, generator=source)[: len(self.values)].sort().values
        self.support.copy_(stored(places[None], size)[0])
        self.derive()

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Come near to a weight (out × in): c·B·A the nearest of this rank, and S what is left of it at its places."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = svd_top(wide, self.rank)
        root = s.sqrt()
        if self.gate is not None:
            self.gate.fill_(1)
        self.up.weight.copy_(u * root / self.c)
        self.down.weight.copy_(root[:, None] * vh)
        rest = wide - (self.c * self.up.weight.to(wide)) @ self.down.weight.to(wide)
        self.values.copy_(rest.flatten()[self.places.long()])

    @property
    def c(self) -> Any:
        """The factor on B·A: a number, or a tensor without dimensions, which changes no other's dtype."""
        return self.scale if self.gate is None else self.gate.tanh()

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    @property
    def nonzeros(self) -> int:
        """k."""
        return len(self.values)

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "nonzeros": self.nonzeros, "scale": self.scale}

    def derive(self) -> None:
        size = self.out_features * self.in_features
        if not as_bits(size, self.nonzeros):
            self.places = self.support.clone()
        else:
            places = unpack(self.support[None], size)[0].nonzero()[:, 0]
            if len(places) != self.nonzeros:
                raise WeftError(f"this layer has {self.nonzeros} scattered entries, and its support {len(places)}")
            self.places = places.to(smallest_int(size))
        starts = torch.arange(0, self.out_features, self._tile, device=self.places.device) * self.in_features
        self._ends = [*torch.searchsorted(self.places.long(), starts).tolist(), self.nonzeros]

    @property
    def _tile(self) -> int:
        """Rows of W that are written out at a time."""
        return max(1, TILE // self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        dtype, own = computed_in(x), plain(self.down, self.up)
        up: Tensor = self.up.weight * self.c if own else x.new_empty(self.out_features, 0)
        down: Tensor = self.down.weight if own else x.new_empty(0, self.in_features)
        bias: Tensor | None = self.bias if own else None
        flat, values = x.to(dtype).reshape(-1, self.in_features), self.values.to(dtype)
        up, down, bias = up.to(dtype), down.to(dtype), None if bias is None else bias.to(dtype)
        if len(flat) <= FEW and not torch.is_grad_enabled():
            y = self._by_factors(flat, up, down, values, bias)
        else:
            y = _Product.apply(flat, up, down, values, bias, self.places, self._ends, self._tile)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if own else y + self.up(self.c * self.down(x))

    def _by_factors(self, x: Tensor, up: Tensor, down: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        y = times(times(x, down), up, bias)
        places = self.places.long()
        return y.index_add_(1, places // self.in_features, x[:, places % self.in_features] * values)

    def dense(self) -> Tensor:
        up = self.up.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        whole = (self.c * up.to(wide)) @ self.down.weight.to(wide)
        return _scatter_(whole, self.places, self.values.to(wide), 0).to(up.dtype)


def _scatter_(rows: Tensor, places: Tensor, values: Tensor, start: int) -> Tensor:
    """Add S's values to rows of W, of which the first is row `start`, in place."""
    rows.view(-1).index_add_(0, places.long() - start * rows.shape[1], values)
    return rows


class _Product(torch.autograd.Function):
    """x·(B·A + S)ᵀ + b (n × out) of x (n × in)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        values: Tensor,
        bias: Tensor | None,
        places: Tensor,
        ends: list[int],
        tile: int,
    ) -> Tensor:
        ctx.save_for_backward(x, up, down, values, places)
        ctx.ends, ctx.tile = ends, tile
        parts = []
        for rows, mine in _tiles(len(up), ends, tile):
            w = _scatter_(up[rows] @ down, places[mine], values[mine], rows.start)
            parts.append(times(x, w, None if bias is None else bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, values, places = ctx.saved_tensors
        wants_x, wants_up, wants_down, wants_values, wants_bias, *_ = ctx.needs_input_grad
        of_up, of_values = torch.empty_like(up), torch.empty_like(values)
        wide = torch.promote_types(x.dtype, torch.float32)
        of_x = torch.zeros_like(x, dtype=wide) if wants_x else None
        of_down = torch.zeros_like(down, dtype=wide)
        for rows, mine in _tiles(len(up), ctx.ends, ctx.tile):
            g = grad[:, rows]
            if wants_up or wants_down or wants_values:
                of_w = g.mT @ x
                of_up[rows] = of_w @ down.mT
                of_down += up[rows].mT @ of_w
                of_values[mine] = of_w.flatten()[places[mine].long() - rows.start * x.shape[1]]
            if of_x is not None:
                of_x += g @ _scatter_(up[rows] @ down, places[mine], values[mine], rows.start)
        found = (of_x if of_x is None else of_x.to(x.dtype), of_up, of_down.to(down.dtype), of_values)
        return *found, grad.sum(0) if wants_bias else None, None, None, None


def _tiles(out: int, ends: list[int], tile: int) -> list[tuple[slice, slice]]:
    """Rows of W, and which of S's entries lie in them."""
    starts = range(0, out, tile)
    return [(slice(a, min(a + tile, out)), slice(b, c)) for a, b, c in zip(starts, ends, ends[1:], strict=False)]


def _derived(layer: LowRankPlusScattered, keys: Any) -> None:
    """After loading by torch alone."""
    layer.derive()
