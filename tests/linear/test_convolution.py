"""Low-rank convolutions against a matrix that multiplies patches, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft import UsageError
from weft.linear._structured import stored_bits
from weft.linear.decoupled_conv import DecoupledConv
from weft.linear.low_rank_conv import LowRankConv
from weft.linear.vertical_horizontal_conv import VerticalHorizontalConv

# of each kind: the sides of its factors, (n ×) a × r and (n ×) r × b, and the weight that they make
KINDS = {
    LowRankConv: (lambda o, i, h, w, r: ((o, r), (r, i * h * w)), "ok,kiyx->oiyx"),
    VerticalHorizontalConv: (lambda o, i, h, w, r: ((i * h, r), (r, o * w)), "iyk,kox->oiyx"),
    DecoupledConv: (lambda o, i, h, w, r: ((o, i, r), (o, r, h * w)), "oik,okyx->oiyx"),
}
few = st.integers(1, 3)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(kind: type, left: torch.Tensor, right: torch.Tensor, o: int, i: int, h: int, w: int) -> torch.Tensor:
    """The weight, index by index."""
    letters = dict(zip("oiyxk", (o, i, h, w, right.shape[-2])))
    terms, result = KINDS[kind][1].split("->")
    one, other = (t.reshape([letters[c] for c in term]) for t, term in zip((left, right), terms.split(",")))
    return torch.einsum(f"{terms}->{result}", one, other)


def most(kind: type, o: int, i: int, h: int, w: int) -> int:
    """The largest rank."""
    left, right = KINDS[kind][0](o, i, h, w, 1)
    return min(left[-2], right[-1])


def written_out(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, like: nn.Conv2d) -> torch.Tensor:
    """W (out × in·kh·kw) times each patch, one place of the output after the other."""
    if like.padding == "same":
        total = [d * (k - 1) for d, k in zip(like.dilation, like.kernel_size)]
        sides = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        (ph, pw) = like.padding
        sides = (pw, pw, ph, ph)
    mode = "constant" if like.padding_mode == "zeros" else like.padding_mode
    x = nn.functional.pad(x, sides, mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = like.kernel_size, like.stride, like.dilation
    reach_h, reach_w = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    rows = []
    for top in range(0, x.shape[2] - reach_h + 1, sh):
        row = []
        for left in range(0, x.shape[3] - reach_w + 1, sw):
            patch = x[:, :, top : top + reach_h : dh, left : left + reach_w : dw]
            row.append(torch.einsum("oi,bi->bo", w, patch.flatten(1)))
        rows.append(torch.stack(row, -1))
    y = torch.stack(rows, -2)
    return y if b is None else y + b[:, None, None]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 5)),
    kernel=st.tuples(few, few),
    stride=st.tuples(few, few),
    dilation=st.tuples(few, few),
    padding=st.one_of(st.just("same"), st.tuples(few, few)),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    rank=st.integers(1, 9),
    bias=st.booleans(),
)
def test_forward_is_the_matrix_at_every_patch(kind, sides, kernel, stride, dilation, padding, mode, rank, bias):
    (out, in_), stride = sides, (1, 1) if padding == "same" else stride
    shape = (out, in_, *kernel)
    rank = min(rank, most(kind, *shape))
    like = nn.Conv2d(in_, out, kernel, stride, padding, dilation, padding_mode=mode)
    left, right = (drawn(*sides, seed=seed) for seed, sides in enumerate(KINDS[kind][0](*shape, rank)))
    b, x = drawn(out, seed=2) if bias else None, drawn(2, in_, 8, 7, seed=3)
    layer = kind.from_factors(left, right, b, like=like)
    w = product(kind, left, right, *shape)
    assert torch.allclose(layer(x), written_out(x, w.flatten(1), b, like), rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer(x[0]), layer(x)[0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer.dense(), w, rtol=1e-10, atol=1e-10)
    assert layer.rank == rank
    assert stored_bits(layer) == 64 * (left.numel() + right.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_from_dense_leaves_the_tails_of_the_spectra(kind, rank):
    shape = (7, 4, 3, 2)
    rank = rank or most(kind, *shape)
    w, like = drawn(*shape), nn.Conv2d(4, 7, (3, 2))
    layer = kind.from_dense(w, rank=rank, like=like)
    if kind is LowRankConv:
        matrices = [w.reshape(7, 24)]
    elif kind is VerticalHorizontalConv:  # the row of (i, y), the column of (o, x)
        rows = [[[w[o, i, y, x] for o in range(7) for x in range(2)] for y in range(3)] for i in range(4)]
        matrices = [torch.tensor(rows, dtype=w.dtype).view(12, 14)]
    else:
        matrices = [w[o].reshape(4, 6) for o in range(7)]
    tail = torch.stack([torch.linalg.svdvals(m)[rank:].norm() for m in matrices]).norm()
    assert torch.allclose((layer.dense() - w).norm(), tail, atol=1e-10)
    left, right = layer.factors()
    if kind is VerticalHorizontalConv:
        assert torch.allclose(left.mT @ left, torch.eye(rank, dtype=w.dtype)), "all singular values are on the right"
    else:
        assert torch.allclose(left.norm(dim=-2), right.norm(dim=-1)), "its factors are evenly large"


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_the_layer_that_it_stands_for_are_not_read(kind):
    like = nn.Conv2d(3, 4, 2, device="meta")
    left, right = (torch.ones(sides) for sides in KINDS[kind][0](4, 3, 2, 2, 2))
    layer = kind.from_factors(left, right, torch.ones(4), torch.bfloat16, like=like)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.bfloat16, "cpu")}


class Standardised(nn.Conv2d):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "stock, said",
    [
        (lambda: nn.Conv2d(6, 6, 3, groups=6), "a Conv2d with groups=6 has no {} form: leave it dense"),
        (lambda: nn.Conv1d(6, 6, 3), "stands for a Conv2d, but it is a Conv1d"),
        (lambda: Standardised(6, 6, 3), "but it is a Standardised"),
    ],
)
def test_another_convolution_is_refused(kind, stock, said):
    like = stock()
    with pytest.raises(UsageError, match=said.format(kind.kind)):
        kind.from_dense(like.weight.detach(), rank=1, like=like)


@pytest.mark.parametrize(
    "kind, has", [(LowRankConv, "5 × 8 has 1 to 5"), (VerticalHorizontalConv, "4 × 10 has 1 to 4"),
                  (DecoupledConv, "2 × 4 has 1 to 2")]
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_the_weight_cannot_have_is_refused(kind, has, rank):
    with pytest.raises(UsageError, match=f"rank={rank}: a matrix of {has}"):
        kind.from_dense(drawn(5, 2, 2, 2), rank=rank, like=nn.Conv2d(2, 5, 2))
