"""LowRankConv against a matrix that multiplies patches, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft import UsageError
from weft.linear._structured import stored_bits
from weft.linear.low_rank_conv import LowRankConv

few = st.integers(1, 3)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
def test_forward_is_the_matrix_at_every_patch(sides, kernel, stride, dilation, padding, mode, rank, bias):
    (out, in_), stride = sides, (1, 1) if padding == "same" else stride
    rank = min(rank, out, in_ * kernel[0] * kernel[1])
    like = nn.Conv2d(in_, out, kernel, stride, padding, dilation, padding_mode=mode)
    up, down = drawn(out, rank), drawn(rank, in_ * kernel[0] * kernel[1], seed=1)
    b, x = drawn(out, seed=2) if bias else None, drawn(2, in_, 8, 7, seed=3)
    layer = LowRankConv.from_factors(up, down, b, like=like)
    w = torch.einsum("or,ri->oi", up, down)
    assert torch.allclose(layer(x), written_out(x, w, b, like), rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer(x[0]), layer(x)[0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer.dense(), w.view(out, in_, *kernel), rtol=1e-10, atol=1e-10)
    assert layer.rank == rank
    assert stored_bits(layer) == 64 * rank * (in_ * kernel[0] * kernel[1] + out)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_from_dense_leaves_the_tail_of_the_spectrum(rank):
    w, like = drawn(7, 4, 3, 2), nn.Conv2d(4, 7, (3, 2))
    layer = LowRankConv.from_dense(w, rank=rank, like=like)
    tail = torch.linalg.svdvals(w.view(7, -1))[rank:].norm()
    assert torch.allclose((layer.dense() - w).norm(), tail, atol=1e-10)
    sizes = [layer.up.weight.flatten(1).norm(dim=0), layer.down.weight.flatten(1).norm(dim=1)]
    assert torch.allclose(*sizes), "its factors are evenly large"


def test_values_of_the_layer_that_it_stands_for_are_not_read():
    like = nn.Conv2d(3, 4, 2, device="meta")
    layer = LowRankConv.from_factors(torch.ones(4, 2), torch.ones(2, 12), torch.ones(4), torch.bfloat16, like=like)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.bfloat16, "cpu")}


class Standardised(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "stock, said",
    [
        (lambda: nn.Conv2d(6, 6, 3, groups=6), "a Conv2d with groups=6 has no low_rank_conv form: leave it dense"),
        (lambda: nn.Conv1d(6, 6, 3), "stands for a Conv2d, but it is a Conv1d"),
        (lambda: Standardised(6, 6, 3), "but it is a Standardised"),
    ],
)
def test_another_convolution_is_refused(stock, said):
    like = stock()
    with pytest.raises(UsageError, match=said):
        LowRankConv.from_dense(like.weight.detach(), rank=1, like=like)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_the_weight_cannot_have_is_refused(rank):
    with pytest.raises(UsageError, match=f"rank={rank}: a matrix of 5 × 8 has 1 to 5"):
        LowRankConv.from_dense(drawn(5, 2, 2, 2), rank=rank, like=nn.Conv2d(2, 5, 2))
