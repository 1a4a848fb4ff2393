"""The linear layer of hyperbolic networks, whose matrix is an nn.Linear that any method may hold in a form of its own.

Weize Chen et al., "Fully Hyperbolic Neural Networks", ACL 2022, arXiv 2105.14686.

    z = W·x + b                     x: n + 1 numbers, of which x_0 is "time" and the others "space"
    t = e^s·sigmoid(z_0) + 1.1      s: trained, e^s = 10 at the start
    y = (t, λ·z_1, λ·z_2, …)        λ² = (t² − 1)/max(‖z_1…‖², 1e-8)

so that −y_0² + ‖y_1…‖² = −1, y_0 > 0: whatever W is, y lies on the hyperboloid of curvature −1. Where the maximum is
1e-8, z has no direction to speak of and no such y has the time t; the time is then that of λ·z_1… as it comes out. So
z_1… = 0 gives the origin (1, 0, …).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from weft.errors import UsageError

LEAST = 1e-8  # of ‖z_1…‖², as the authors have it


def lifted(z: Tensor, s: Tensor) -> Tensor:
    """y on the hyperboloid for z (… × (n + 1)) and s (a scalar), computed in float32 at least, in the dtype of z.

    >>> y = lifted(torch.tensor([0.0, 3.0, -4.0]), torch.tensor(10.0).log())
    >>> y, -y[0] ** 2 + y[1] ** 2 + y[2] ** 2
    (tensor([ 6.1000,  3.6105, -4.8140]), tensor(-1.))
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    time, space = wide[..., :1], wide[..., 1:]
    t = s.to(wide).exp() * time.sigmoid() + 1.1
    space = space * ((t.square() - 1) / space.square().sum(-1, keepdim=True).clamp(min=LEAST)).sqrt()
    return torch.cat([(1 + space.square().sum(-1, keepdim=True)).sqrt(), space], -1).to(z.dtype)


class LorentzLinear(nn.Module):
    """A layer between hyperboloids: `linear`, an nn.Linear, and what brings its output back onto the hyperboloid.

        z = linear(x),  t = e^s·sigmoid(z_0) + 1.1,  y = (t, λ·z_1, λ·z_2, …) with −y_0² + ‖y_1…‖² = −1

    `weft.reparametrise(model, "sst", …)` holds the matrix of `linear` in a form of its own, as any other method does,
    and leaves all else as it is. The layer is no linear map, so it has no `weight`: `linear` has. It starts as its
    authors' does, the matrix uniform in ±1/√out_features, nothing of it for the time, the bias 0.

    Args:
        in_features, out_features: numbers of a point, its time, which comes first, among them; at least 2.
        bias: whether z has one.
        scale: e^s at the start, above 0; y_0 lies in 1.1 to 1.1 + e^s.

    Raises UsageError for sizes or a scale that no hyperboloid has.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        scale: float = 10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 2:
                raise UsageError(f"{name}={size!r} must be at least 2: a time, and a space of one dimension")
        if not 0 < scale < math.inf:
            raise UsageError(f"scale={scale!r} must be a number above 0")
        self.linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self.s = nn.Parameter(torch.tensor(math.log(scale), device=device, dtype=dtype or torch.get_default_dtype()))
        with torch.no_grad():
            self.linear.weight.uniform_(-(out_features**-0.5), out_features**-0.5)
            self.linear.weight[:, 0] = 0
            if bias:
                self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """y (… × out_features) of x (… × in_features)."""
        return lifted(self.linear(x), self.s)
