"""Hadamard matrices: ±1, H·Hᵀ = n·I. Sylvester's for powers of two, Paley's and Williamson's for what is left of n.

n = K·2^m with K = 1 or K = 4·odd up to 180, for each of which there is a matrix here: widths of language models such as
11008 = 172·64, 13824 = 108·128, 14336 = 28·512 among them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

# Symmetric ±1 sequences a, b, c, d with A² + B² + C² + D² = 4n·I for their circulant matrices, for the orders that
# Paley's constructions miss: entries 0 … (n − 1)/2, most significant bit first, 1 for +1.
_WILLIAMSON = {
    13: (0x7A, 0x45, 0x62, 0x62),
    23: (0xC45, 0xB67, 0xE35, 0xEE8),
    25: (0x1EA9, 0x192F, 0x1C9E, 0x14E7),
    29: (0x7194, 0x5197, 0x7B47, 0x64BB),
    39: (0xE504C, 0xE68A4, 0xF130A, 0x8D41D),
    43: (0x31E930, 0x3ACAF4, 0x37E14D, 0x233D76),
}


LARGEST = 180  # orders that are multiples of 4 have a matrix here up to this one; dense products stay small


def split(n: int) -> tuple[int, int]:
    """K and m of n = K·2^m: K is 1, 4·odd where n allows and that is at most LARGEST, else odd.

    >>> split(1024), split(11008), split(37), split(74), split(4 * 1021)
    ((1, 10), (172, 6), (37, 0), (37, 1), (1021, 2))
    """
    bits = (n & -n).bit_length() - 1
    odd = n >> bits
    if odd > 1 and bits >= 2 and 4 * odd <= LARGEST:
        return 4 * odd, bits - 2
    return odd, bits


def matrix(n: int) -> Tensor | None:
    """A Hadamard matrix of order n (float32), not always symmetric; None where none exists or is known here."""
    build = _construction(n)
    return None if build is None else build()


def sylvester(n: int) -> Tensor:
    """H_2 ⊗ … ⊗ H_2 (n × n), n a power of two; symmetric."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _construction(n: int) -> Callable[[], Tensor] | None:
    """What builds a matrix of order n, None where nothing here does."""
    if n & (n - 1) == 0:
        return partial(sylvester, n)
    if n % 4:
        return None
    if n // 4 in _WILLIAMSON:
        return partial(_williamson, n // 4)
    if _prime(n - 1):
        return partial(_paley_one, n - 1)
    if _prime(n // 2 - 1) and n % 8 == 4:
        return partial(_paley_two, n // 2 - 1)
    return None


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = χ(j − i) over the integers modulo the prime q; χ is 1 on squares, −1 elsewhere, 0 at 0."""
    chi = torch.full((q,), -1.0)
    chi[torch.arange(1, q).square() % q] = 1.0
    chi[0] = 0.0
    i = torch.arange(q)
    return chi[(i[None] - i[:, None]) % q]


def _bordered(q: int, corner: float) -> Tensor:
    """Q with a border: 0 in the corner, ones along the row, `corner` down the column."""
    s = torch.zeros(q + 1, q + 1)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1.0, corner, _jacobsthal(q)
    return s


def _paley_one(q: int) -> Tensor:
    """Order q + 1, q ≡ 3 mod 4: I + S with S skew."""
    return torch.eye(q + 1) + _bordered(q, -1.0)


def _paley_two(q: int) -> Tensor:
    """Order 2(q + 1), q ≡ 1 mod 4: S ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] with S symmetric."""
    s = _bordered(q, 1.0)
    return torch.kron(s, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(
        torch.eye(q + 1), torch.tensor([[1.0, -1], [-1, -1]])
    )


def _williamson(n: int) -> Tensor:
    """Order 4n from four symmetric circulant matrices."""
    half = (n + 1) // 2
    i = torch.arange(n)
    place = (i[None] - i[:, None]) % n
    place = torch.minimum(place, n - place)  # the sequences read the same backwards
    a, b, c, d = (
        torch.tensor([1.0 if bits >> (half - 1 - j) & 1 else -1.0 for j in range(half)])[place]
        for bits in _WILLIAMSON[n]
    )
    rows = ([a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a])
    return torch.cat([torch.cat(row, 1) for row in rows])
