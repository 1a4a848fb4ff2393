"""Statistics of row vectors that arrive in batches: moments, and order statistics of scaled magnitudes.

Both are accumulators: `add` takes a batch, `+` joins two, and how the rows were split makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from weft.algebra.gram import add_gram, mirrored

KINDS = ("products", "fourth", "magnitudes", "squares")

_ROWS = 4096  # of one product in float32; their sum is float64


class Moments:
    """Sums over rows x (d), of which only those that were asked for are kept.

    The number of rows and their sum are always kept. keep: "products" (Σxxᵀ, d × d, for `covariance` and
    `second_moment`), "fourth" (Σ‖x‖⁴ and Σ‖x‖²x, d + 1 numbers, for `fourth`; implies products), "magnitudes"
    (Σ|x|, d), "squares" (Σx², d).

    Products are taken in x's precision (float32 at least) of rows less a shift, the mean of the first batch, and summed
    in float64: a covariance keeps its digits where the mean is far larger than the deviation. Results are float64.
    """

    def __init__(self, keep: Iterable[str] = ("products",)) -> None:
        self.keep = frozenset(keep)
        if unknown := sorted(self.keep.difference(KINDS)):
            raise ValueError(f"keep={unknown[0]!r} is not one of {', '.join(KINDS)}")
        if "fourth" in self.keep:
            self.keep |= {"products"}
        self.n = 0.0  # a sum of weights after `mix`
        self.shift = torch.zeros(0)  # float32 values, so that float32 rows are shifted by the same as float64 ones
        self.sums: dict[str, Tensor] = {}  # float64; "rows", "products", "cubes" and "fourth" are of x − shift

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count the rows of x (… × d), or those where the boolean mask (…) is true."""
        y = _rows(x, mask)
        if not len(y):
            return
        total = y.sum(0, dtype=torch.float64)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"a batch of {len(y)} rows has entries that are not finite")
        if not self.sums:
            self._start(y)
        if y.shape[1] != len(self.shift):
            raise ValueError(f"rows of {y.shape[1]} numbers were added to statistics of rows of {len(self.shift)}")
        self.n += len(y)
        self.sums["rows"] += total - len(y) * self.shift.double()
        if "magnitudes" in self.keep:
            self.sums["magnitudes"] += y.abs().sum(0, dtype=torch.float64)
        if "squares" in self.keep:
            self.sums["squares"] += y.square().sum(0, dtype=torch.float64)
        for part in y.split(_ROWS):
            part = part - self.shift.to(part)
            if "products" in self.keep:
                add_gram(self.sums["products"], part)
            if "fourth" in self.keep:
                size = part.square().sum(1)
                self.sums["cubes"] += (size @ part).double()
                self.sums["fourth"] += size.square().sum(dtype=torch.float64)

    def _start(self, y: Tensor) -> None:
        d = y.shape[1]
        shapes = {"rows": (d,), "products": (d, d), "cubes": (d,), "fourth": (), "magnitudes": (d,), "squares": (d,)}
        kept = {"rows", *self.keep} | ({"cubes"} if "fourth" in self.keep else set())
        self.shift = y.mean(0).float()
        self.sums = {
            kind: torch.zeros(shape, dtype=torch.float64, device=y.device)
            for kind, shape in shapes.items()
            if kind in kept
        }

    @property
    def mean(self) -> Tensor:
        """Σx / n (d)."""
        return self.shift.double() + self._sum("rows") / self.n

    @property
    def magnitude(self) -> Tensor:
        """Σ|x| / n (d)."""
        return self._sum("magnitudes") / self.n

    @property
    def square(self) -> Tensor:
        """Σx² / n (d)."""
        return self._sum("squares") / self.n

    @property
    def covariance(self) -> Tensor:
        """Σ(x − mean)(x − mean)ᵀ / n (d × d)."""
        return self._products(self.mean) / self.n

    @property
    def second_moment(self) -> Tensor:
        """Σxxᵀ / n (d × d)."""
        return self._products(torch.zeros_like(self.mean)) / self.n

    def fourth(self, *, centred: bool) -> float:
        """Σ‖x‖⁴ / n, or Σ‖x − mean‖⁴ / n."""
        self._sum("fourth")
        return float(self._about(self.mean if centred else torch.zeros_like(self.mean))["fourth"] / self.n)

    def _sum(self, kind: str) -> Tensor:
        if not self.n:
            raise ValueError("no row was added to these statistics")
        if kind not in self.sums:
            raise ValueError(f"these statistics keep no {kind!r}, only {', '.join(sorted(self.sums))}")
        return self.sums[kind]

    def _products(self, point: Tensor) -> Tensor:
        """Σ(x − point)(x − point)ᵀ."""
        delta = self.shift.double() - point
        cross = torch.outer(self._sum("rows") + self.n / 2 * delta, delta)
        return mirrored(self._sum("products")) + cross + cross.mT

    def _about(self, point: Tensor) -> dict[str, Tensor]:
        """The sums, of x − point in place of x − shift: with δ = shift − point, powers of y + δ written out."""
        n, sums, delta = self.n, dict(self.sums), self.shift.double() - point
        rows, length = sums["rows"], delta @ delta
        sums["rows"] = rows + n * delta
        if "products" in sums:
            sums["products"] = self._products(point)
        if "fourth" in sums:
            products, cubes = mirrored(self.sums["products"]), sums["cubes"]
            trace, turned, along = products.trace(), products @ delta, rows @ delta
            sums["cubes"] = cubes + 2 * turned + length * rows + (trace + 2 * along + n * length) * delta
            sums["fourth"] = (
                sums["fourth"]
                + 4 * (turned @ delta + cubes @ delta)
                + 2 * length * (trace + 2 * along)
                + n * length.square()
            )
        return sums

    def __add__(self, other: Moments) -> Moments:
        """The statistics of the rows of both."""
        return _joined([self, other], [1.0, 1.0])


def mix(parts: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """The statistics of a mixture in which part i has the share weights[i] / Σ weights, however many rows it has.

    Its n is the number of equally weighted rows that would leave the same variance in a mean: 1 / Σ share² / n_i.
    """
    if len(parts) != len(weights) or any(w < 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(f"weights={list(weights)} are not {len(parts)} shares, none negative and some positive")
    used = [(part, w / sum(weights)) for part, w in zip(parts, weights) if w]
    if empty := [i for i, (part, w) in enumerate(zip(parts, weights)) if w and not part.n]:
        raise ValueError(f"part {empty[0]} of the mixture has a weight and no rows")
    n = 1 / sum(share**2 / part.n for part, share in used)
    return _joined([part for part, _ in used], [n * share / part.n for part, share in used])


def _joined(parts: Sequence[Moments], factors: Sequence[float]) -> Moments:
    """The sums of all parts about the first one's shift, each multiplied by its factor."""
    joined = Moments(parts[0].keep)
    for part, factor in zip(parts, factors):
        if part.keep != joined.keep:
            raise ValueError(f"statistics of {sorted(part.keep)} do not add to statistics of {sorted(joined.keep)}")
        if not part.n:
            continue
        if not joined.sums:
            joined.shift = part.shift
        if part.shift.shape != joined.shift.shape:
            raise ValueError(f"rows of {len(part.shift)} numbers do not add to rows of {len(joined.shift)}")
        moved = part._about(joined.shift.double())
        joined.n += factor * part.n
        joined.sums = {kind: factor * s + joined.sums.get(kind, 0.0) for kind, s in moved.items()}
    return joined


_BITS = 12  # of a float32's mantissa that a bin leaves out: 2¹⁹ bins, each 2⁻¹¹ of its value wide


class Magnitudes:
    """Order statistics of |x·scale| over all entries of rows x (d): exact up to `capacity` values, then a histogram.

    scale (d) multiplies each column; None is 1. The bins of the histogram are float32 numbers that agree in the leading
    11 bits of the mantissa, so that `at` is at most 2⁻¹¹ (0.05 %) above the exact value, in 4 MiB whatever the count.
    """

    def __init__(self, scale: Tensor | None = None, *, capacity: int = 1 << 22) -> None:
        self.scale = scale
        self.capacity = capacity
        self.count = 0
        self.values: list[Tensor] = []  # all of them, or none
        self.bins: Tensor | None = None  # int64

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count the entries of the rows of x (… × d), or of those where the boolean mask (…) is true."""
        y = _rows(x, mask)
        values = (y if self.scale is None else y * self.scale.to(y)).abs().flatten()
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"a batch of {len(y)} rows has entries that are not finite")
        self._take([values] if len(values) else [], None)

    def __add__(self, other: Magnitudes) -> Magnitudes:
        """The order statistics of the entries of both; both are scaled already."""
        joined = Magnitudes(self.scale, capacity=min(self.capacity, other.capacity))
        for part in (self, other):
            joined._take(part.values, part.bins)
        return joined

    def at(self, share: float) -> float:
        """The k-th smallest value, k = int(share·count): as many entries are at or below it (ties aside).

        −1.0 for k = 0: no magnitude is below it.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is not within 0..1")
        if not self.count:
            raise ValueError("no value was added, so none is the smallest")
        k = int(share * self.count)
        if k == 0:
            return -1.0
        if self.bins is None:
            return float(torch.cat(self.values).kthvalue(k).values)
        found = int(torch.searchsorted(self.bins.cumsum(0), k))
        last = torch.tensor(((found + 1) << _BITS) - 1, dtype=torch.int32)
        return float(last.view(torch.float32))

    def _take(self, values: list[Tensor], bins: Tensor | None) -> None:
        self.count += sum(map(len, values)) + (0 if bins is None else int(bins.sum()))
        self.values = [*self.values, *values]
        if bins is not None:
            self.bins = bins if self.bins is None else self.bins + bins
        if self.count > self.capacity or self.bins is not None:
            for part in self.values:
                counted = torch.bincount(part.float().view(torch.int32) >> _BITS, minlength=1 << (31 - _BITS))
                self.bins = counted if self.bins is None else self.bins + counted
            self.values = []


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of x that count (n × d), in float32 at least, without a gradient."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(
            f"a mask of {tuple(mask.shape)} {mask.dtype} does not choose rows of {tuple(x.shape)}: "
            f"it must be {tuple(x.shape[:-1])} and boolean"
        )
    rows = x.detach().reshape(-1, x.shape[-1]) if mask is None else x.detach()[mask]
    return rows.to(torch.promote_types(x.dtype, torch.float32))
