"""Spectral plus frozen: a matrix by all of its singular values and vectors, of which only some vectors are trained.

    y = ((x·V) ∘ σ)·Uᵀ + b          V: in × m,  σ: m,  U: out × m,  m = min(out, in)

σ is trained, `values`. Of U and V the r active columns are, `up` (out × r, which has b) and `down` (r × in); the others
rest, `frozen_up` (out × (m − r)) and `frozen_down` ((m − r) × in). `order` (m) says which component each column is of,
the active ones first: component i, of value σ_i, is the same for as long as nobody decomposes W anew.

Made for training. It stores m·(in + out + 1) numbers, more than the dense layer, and trains r·(in + out) + m of them.
For N rows of x a pass forward takes 2·N·m·(in + out) operations, two thin products (a dense one takes 2·N·in·out), and
a pass back as many again, plus 2·N·r·(in + out) for the gradients of U and V. Kept between them are x, as in a dense
layer, and x·V, N·m numbers.

`enhanced` takes σ out of the gradients of U and V: with G that of W, they are G·v_i and Gᵀ·u_i in place of σ_i·G·v_i
and σ_i·Gᵀ·u_i, which vanish with σ_i. Nothing is divided by σ, and G is never formed. All other gradients are those of
the product as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from weft.algebra.matmul import times
from weft.algebra.svd import svd_top
from weft.linear._structured import Factor, StructuredLinear, bare, check_rank, plain


class SpectralPlusFrozen(StructuredLinear):
    """W = U·diag(σ)·Vᵀ with r trained columns of U and V."""

    frozen_up: Tensor
    frozen_down: Tensor
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        enhanced: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.rank, self.enhanced = check_rank(rank, out_features, in_features, 1), enhanced
        components = min(out_features, in_features)
        self.down = bare(Factor, in_features, rank, bias=False, device=device, dtype=dtype)
        self.values = nn.Parameter(torch.empty(components, device=device, dtype=dtype))
        self.up = bare(Factor, rank, out_features, bias=bias, device=device, dtype=dtype)
        rest = components - rank
        self.register_buffer("frozen_up", torch.empty(out_features, rest, device=device, dtype=dtype))
        self.register_buffer("frozen_down", torch.empty(rest, in_features, device=device, dtype=dtype))
        self.register_buffer("order", torch.arange(components, device=device, dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, *, rank: int, enhanced: bool = True
    ) -> SpectralPlusFrozen:
        """All of a weight, σ descending; active are the components with the largest."""
        (out, in_), dtype = weight.shape, weight.dtype
        layer = cls(in_, out, rank=rank, enhanced=enhanced, bias=bias is not None, device=weight.device, dtype=dtype)
        layer.decompose(weight)
        if bias is not None:
            layer.up.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """Take the SVD of a weight (out × in), computed in float64."""
        self._hold(*svd_top(weight.double()), self.order.sort().values)

    @torch.no_grad()
    def decompose_anew(self) -> None:
        """Take the SVD of W as it is, computed in float64: the same map, σ descending and the columns orthonormal.

        Where σ_i = 0, W says nothing of u_i and v_i: they come last and stay what they are, but for what overlaps with
        the others. (LAPACK would put there whatever the rounding of W happens to favour.)
        """
        u, s, vh = (t.double() for t in self.components())
        live = s != 0
        count = int(live.sum())
        found_u, found_s, found_vh = svd_top((u[:, live] * s[live]) @ vh[live], max(count, 1))
        s = torch.cat([found_s[:count], s[~live]])
        u = _completed(found_u[:, :count], u[:, ~live])
        self._hold(u, s, _completed(found_vh[:count].mT, vh[~live].mT).mT, self.order.sort().values)

    @torch.no_grad()
    def activate(self, chosen: Tensor) -> None:
        """Let the columns of these r components be the active ones, exactly as they are; the same map."""
        chosen = chosen.to(self.order)
        others = torch.ones_like(self.order, dtype=torch.bool).index_fill(0, chosen.long(), False)
        self._hold(*self.components(), torch.cat([chosen, others.nonzero()[:, 0].to(chosen)]))

    @torch.no_grad()
    def project(self) -> None:
        """σ ← max(σ, 0), and each active column becomes of norm 1."""
        self.values.clamp_(min=0)
        for p, dim in ((self.up.weight, 0), (self.down.weight, 1)):
            p.copy_(normalize(p.to(torch.promote_types(p.dtype, torch.float32)), dim=dim))

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out × m), σ (m) and Vᵀ (m × in), by component."""
        place = self.order.argsort()
        u = torch.cat([self.up.weight, self.frozen_up], 1)[:, place]
        return u, self.values, torch.cat([self.down.weight, self.frozen_down])[place]

    def _hold(self, u: Tensor, s: Tensor, vh: Tensor, order: Tensor) -> None:
        """Store components, the first r of `order` as the active ones."""
        self.order.copy_(order)
        self.values.copy_(s)
        active, rest = order.long().split([self.rank, len(order) - self.rank])
        self.up.weight.copy_(u[:, active])
        self.frozen_up.copy_(u[:, rest])
        self.down.weight.copy_(vh[active])
        self.frozen_down.copy_(vh[rest])

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.up.bias

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "enhanced": self.enhanced}

    def forward(self, x: Tensor) -> Tensor:
        own = plain(self.down, self.up)
        z = times(x, self.frozen_down)
        values = self.values[self.order].to(z.dtype)
        active, rest = values.split([self.rank, len(values) - self.rank])
        y = times(z * rest, self.frozen_up, self.up.bias.to(z.dtype) if own and self.up.bias is not None else None)
        if not own:
            return y + self.up(self.down(x) * active)
        down, up = self.down.weight.to(z.dtype), self.up.weight.to(z.dtype)
        flat = x.to(z.dtype).reshape(-1, self.in_features)
        product = _Product.apply(y.reshape(-1, self.out_features), flat, down, active, up, self.enhanced)
        return product.view_as(y)

    def dense(self) -> Tensor:
        u, s, vh = self.components()
        wide = torch.promote_types(u.dtype, torch.float32)
        return ((u.to(wide) * s.to(wide)) @ vh.to(wide)).to(u.dtype)


def _completed(q: Tensor, more: Tensor) -> Tensor:
    """Orthonormal columns q, and as many others that are, each the nearest to its own of `more` and those before it."""
    whole, triangle = torch.linalg.qr(torch.cat([q, more], 1))  # Householder: orthonormal whatever the rank
    sign = torch.where(triangle.diagonal()[q.shape[1] :] < 0, -1.0, 1.0).to(q)
    return torch.cat([q, whole[:, q.shape[1] :] * sign], 1)


class _Product(torch.autograd.Function):
    """rest + ((x·V) ∘ σ)·Uᵀ (n × out) of x (n × in), for the active columns V (r × in) and U (out × r)."""

    @staticmethod
    def forward(
        ctx: Any, rest: Tensor, x: Tensor, down: Tensor, values: Tensor, up: Tensor, enhanced: bool
    ) -> Tensor:
        z = x @ down.mT
        ctx.save_for_backward(x, z, down, values, up)
        ctx.enhanced = enhanced
        return torch.addmm(rest, z * values, up.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, down, values, up = ctx.saved_tensors
        _, wants_x, wants_down, _, wants_up, _ = ctx.needs_input_grad
        of_z = grad @ up  # without σ
        scaled = of_z * values
        of_x = scaled @ down if wants_x else None
        of_down = (of_z if ctx.enhanced else scaled).mT @ x if wants_down else None
        of_up = grad.mT @ (z if ctx.enhanced else z * values) if wants_up else None
        return grad, of_x, of_down, (of_z * z).sum(0), of_up, None
