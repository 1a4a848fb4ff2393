"""RankAwareSparse against its two sums, written out over columns in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft import UsageError
from weft.linear import rank_aware_sparse
from weft.linear._structured import empty, stored_bits
from weft.linear.rank_aware_sparse import RankAwareSparse

sides = st.integers(1, 23)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, rank: int, tau: float) -> torch.Tensor:
    """All tokens sparse: a column at a time, whole or of the nearest matrix of that rank."""
    w, x = w.double(), x.double()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    near = (u[:, :rank] * s[:rank]) @ vh[:rank]
    norms = [float((w[:, j] ** 2).sum() ** 0.5) if rank else 1.0 for j in range(w.shape[1])]
    rows = x.reshape(-1, x.shape[-1])
    y = torch.zeros(len(rows), len(w), dtype=torch.float64)
    for t, row in enumerate(rows):
        for j, value in enumerate(row):
            y[t] += value * (w[:, j] if abs(float(value)) * norms[j] > tau else near[:, j])
    return (y if b is None else y + b.double()).reshape(*x.shape[:-1], len(w))


@pytest.fixture
def gathering(monkeypatch):
    """Small layers gather as large ones do; how often."""
    monkeypatch.setattr(rank_aware_sparse, "_NUMBERS", 0)
    monkeypatch.setattr(rank_aware_sparse, "_SHARE", 1.0)
    found = []
    plain = RankAwareSparse._gathered

    def counted(self, x, active):
        y = plain(self, x, active)
        found.append(y is not None)
        return y

    monkeypatch.setattr(RankAwareSparse, "_gathered", counted)
    return found


# --- the forward ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(out=sides, in_=sides, rank=st.integers(0, 23), bias=st.booleans(), tau=st.floats(0, 6), seed=st.integers(0, 9))
def test_forward_is_the_two_sums(out, in_, rank, bias, tau, seed):
    rank = min(rank, out, in_)
    w, x = drawn(out, in_, seed=seed), drawn(2, 3, in_, seed=seed + 1)
    b = drawn(out, seed=seed + 2) if bias else None
    layer = RankAwareSparse.from_dense(w, b, rank=rank, tau=tau, prefill_ratio=0.999)
    assert torch.allclose(layer(x), written_out(x, w, b, rank, tau), rtol=1e-9, atol=1e-9)
    assert (layer.in_features, layer.out_features, layer.rank) == (in_, out, rank)
    assert stored_bits(layer) == 64 * (out * in_ + rank * (in_ + out)) + 32 * (in_ + 1)


@pytest.mark.parametrize("shape", [(13,), (1, 13), (1, 1, 13)], ids=str)
@pytest.mark.parametrize("tau", [-1.0, 0.4, 3.0, torch.inf])
@pytest.mark.parametrize("rank", [0, 4])
def test_gathered_rows_give_the_masked_product(gathering, rank, tau, shape):
    w, b, x = drawn(17, 13), drawn(17, seed=1), drawn(*shape, seed=2)
    layer = RankAwareSparse.from_dense(w, b, rank=rank, tau=tau)
    with torch.no_grad():
        y = layer(x)
    assert gathering == [True] and y.shape == (*shape[:-1], 17)
    assert torch.allclose(y, written_out(x, w, b, rank, tau), rtol=1e-10, atol=1e-10)
    layer(x)  # a gradient may be asked for
    with torch.no_grad():
        layer(drawn(2, 1, 13))  # two tokens
    assert gathering == [True]


def test_where_nearly_all_is_active_nothing_is_gathered(monkeypatch):
    monkeypatch.setattr(rank_aware_sparse, "_NUMBERS", 0)
    w, x = drawn(17, 13).float(), drawn(1, 13).float()
    layer = RankAwareSparse.from_dense(w, rank=3, tau=-1)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.up(layer.down(0 * x)) + nn.functional.linear(x, layer.columns.mT))


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("tau", [0.0, 4.0])
def test_bfloat16_errs_at_most_twice_as_much_as_the_dense_product(gathering, gathers, tau):
    w, b = drawn(24, 18), drawn(24, seed=1)
    wide = RankAwareSparse.from_dense(w, b, rank=5, tau=tau)
    layer = empty(wide.spec(), nn.Linear(18, 24, dtype=torch.bfloat16))
    layer.load_state_dict(wide.state_dict())
    x = drawn(200, 1, 18, seed=2).bfloat16()
    with torch.no_grad():
        y = torch.cat([layer(row[None]) for row in x]) if gathers else layer(x)
    near = nn.functional.linear(x, w.bfloat16(), b.bfloat16()).double() - (x.double() @ w.mT + b)
    assert y.dtype == torch.bfloat16 and any(gathering) == gathers
    assert (y.double() - written_out(x, w, b, 5, tau)).norm() <= 2 * near.norm()


# --- the settings that are something else -----------------------------------------------------------------------------


def test_with_all_active_it_is_the_dense_layer_bit_for_bit():
    w, b, x = drawn(17, 13).float(), drawn(17).float(), drawn(4, 1, 13).float()
    x[0, 0, 3] = 0
    layer = RankAwareSparse.from_dense(w, b, rank=4, tau=-1)
    assert bool(layer.active(x).all())
    assert torch.equal(layer(x), nn.functional.linear(x, layer.columns.mT, b))


@pytest.mark.parametrize("tau", [0.0, 1.0, 5.0, torch.inf])
def test_at_full_rank_any_mask_gives_the_dense_layer(tau):
    w, x = drawn(17, 13), drawn(4, 1, 13)
    layer = RankAwareSparse.from_dense(w, rank=13, tau=tau)
    assert torch.allclose(layer(x), x @ w.mT, rtol=1e-10, atol=1e-10)


def test_with_nothing_active_only_the_low_rank_part_is_left():
    w, b, x = drawn(17, 13), drawn(17, seed=1), drawn(4, 1, 13)
    u, s, vh = torch.linalg.svd(w)
    layer = RankAwareSparse.from_dense(w, b, rank=3, tau=torch.inf)
    assert torch.allclose(layer(x), x @ ((u[:, :3] * s[:3]) @ vh[:3]).mT + b, rtol=1e-10, atol=1e-10)


def test_without_a_rank_small_magnitudes_are_dropped_whatever_their_columns():
    w, x = drawn(17, 13) * torch.linspace(0.01, 100, 13, dtype=torch.float64), drawn(4, 1, 13)
    layer = RankAwareSparse.from_dense(w, rank=0, tau=0.7)
    assert torch.allclose(layer(x), torch.where(x.abs() > 0.7, x, 0) @ w.mT, rtol=1e-10, atol=1e-10)


def test_what_lies_on_the_threshold_is_inactive():
    third = 1 / 3  # above its float32 neighbour below, and rounded up
    layer = RankAwareSparse.from_dense(torch.eye(2).double(), rank=0, tau=third)
    assert layer.active(torch.tensor([third, 0.34], dtype=torch.float64)).tolist() == [False, True]


def test_column_norms_are_those_of_the_decomposition():
    w = drawn(17, 13)
    _, s, vh = torch.linalg.svd(w, full_matrices=False)
    layer = RankAwareSparse.from_dense(w, rank=2, tau=1)
    assert torch.allclose(layer.scale.double(), (vh.mT * s).norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_not_a_number_stays_one(rank):
    layer = RankAwareSparse.from_dense(drawn(7, 5), rank=rank, tau=1)
    x = torch.zeros(1, 5, dtype=torch.float64)
    x[0, 2] = torch.nan
    assert bool(layer(x).isnan().all())


# --- which tokens run sparse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, length, dense", [(1, 6, 6), (1, 1, 0), (0.5, 6, 3), (0.5, 5, 2), (0.5, 1, 0), (0, 6, 6)]
)
def test_the_first_tokens_of_a_sequence_run_dense(ratio, length, dense):
    w, b, x = drawn(17, 13), drawn(17, seed=1), drawn(2, length, 13)
    y = RankAwareSparse.from_dense(w, b, rank=3, tau=2.5, prefill_ratio=ratio)(x)
    whole, sparse = x @ w.mT + b, written_out(x, w, b, 3, 2.5)
    assert not torch.allclose(whole, sparse)
    assert torch.allclose(y[:, :dense], whole[:, :dense]) and torch.allclose(y[:, dense:], sparse[:, dense:])


def test_every_token_of_a_batch_has_its_own_mask_and_its_own_reads():
    w = drawn(17, 13)
    layer = RankAwareSparse.from_dense(w, rank=3, tau=3)
    x = torch.cat([0.01 * drawn(1, 1, 13), drawn(1, 1, 13), 100 * drawn(1, 1, 13)])
    counts = [(row[0].abs() * w.norm(dim=0) > 3).sum() for row in x]
    assert counts[0] == 0 and 0 < counts[1] < 13 and counts[2] == 13
    assert layer.reads(x).flatten().tolist() == [17 * int(n) + 3 * (17 + 13) for n in counts]
    assert torch.allclose(layer(x), written_out(x, w, None, 3, 3))


# --- gradients, casts, refusals ---------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_two_sums_under_a_constant_mask():
    w, b = drawn(7, 5), drawn(7, seed=1)
    layer = RankAwareSparse.from_dense(w, b, rank=2, tau=2, prefill_ratio=0.999)
    x = drawn(4, 5, seed=2).requires_grad_()
    target = drawn(4, 7, seed=3)
    (layer(x) * target).sum().backward()
    mask = (x.detach().abs() * w.norm(dim=0) > 2).double()
    assert 0 < mask.mean() < 1
    up, down = layer.up.weight.detach(), layer.down.weight.detach()
    through = mask * (target @ w) + (1 - mask) * (target @ up @ down)
    kept, rest = mask * x.detach(), (1 - mask) * x.detach()
    expected = [through, kept.mT @ target, target.mT @ (rest @ down.mT), up.mT @ target.mT @ rest, target.sum(0)]
    found = [x.grad, layer.columns.grad, layer.up.weight.grad, layer.down.weight.grad, layer.bias.grad]
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_cast_moves_no_threshold():
    layer = RankAwareSparse.from_dense(drawn(17, 13), rank=3, tau=1 / 3)
    scale, tau = layer.scale.clone(), layer.tau.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.columns.dtype == layer.weight.dtype == dtype
        assert torch.equal(layer.scale, scale) and torch.equal(layer.tau, tau) and tau.dtype == torch.float32


def test_it_computes_under_autocast(gathering):
    layer = RankAwareSparse.from_dense(drawn(17, 13).float(), rank=3, tau=2)
    x = drawn(1, 1, 13).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), layer(x), atol=0.1)


@pytest.mark.parametrize(
    "option, said",
    [
        ({"rank": 8}, "rank=8: a matrix of 9 × 7 has 0 to 7"),
        ({"rank": 1, "prefill_ratio": 1.5}, "prefill_ratio=1.5: a share"),
    ],
)
def test_what_it_cannot_be_is_refused(option, said):
    with pytest.raises(UsageError, match=said):
        RankAwareSparse(7, 9, **option)


def test_it_has_no_dense_weight():
    with pytest.raises(UsageError, match="rank_aware_sparse is no linear map"):
        RankAwareSparse.from_dense(drawn(9, 7), rank=1, tau=1).dense()
