"""Tensor rings against traces written out entry by entry in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from weft.algebra.tensor_ring import balanced, chain, deviation, gram, identity_cores, products, turned

SIZES = st.sampled_from([(5,), (2, 3), (4, 4), (3, 5), (2, 3, 2), (2, 2, 3), (1, 2), (2, 1, 3, 2)])


def short(index: int, sizes: tuple[int, ...]) -> list[int]:
    """The short indices of a long one, the first the fastest."""
    found = []
    for size in sizes:
        index, digit = divmod(index, size)
        found.append(digit)
    return found


def dense(cores: list[Tensor]) -> Tensor:
    """T, one trace an entry."""
    sizes = tuple(len(core) for core in cores)
    n = math.prod(sizes)
    made = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            product = torch.eye(cores[0].shape[-1], dtype=torch.float64)
            for core, a, b in zip(cores, short(i, sizes), short(j, sizes), strict=True):
                product = product @ core[a, b].double()
            made[i, j] = product.trace()
    return made


def drawn(sizes: tuple[int, ...], rank: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Deviations E^d, and T of I / R + E^d."""
    source = torch.Generator().manual_seed(seed)
    e = [0.4 * torch.randn(s, s, rank, rank, generator=source, dtype=torch.float64) for s in sizes]
    eyes = [torch.eye(s, dtype=torch.float64)[:, :, None, None] / rank for s in sizes]
    return e, dense([a + b for a, b in zip(eyes, e, strict=True)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=SIZES, rank=st.integers(1, 3), batch=st.sampled_from([(), (1,), (4,), (2, 3)]))
def test_contracted_is_dense(sizes: tuple[int, ...], rank: int, batch: tuple[int, ...]) -> None:
    e, t = drawn(sizes, rank)
    x = torch.randn(*batch, len(t), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(turned(x, e), x @ t.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(deviation(x, e), x @ (t - torch.eye(len(t))).mT, rtol=1e-12, atol=1e-12)
    transposed = [core.transpose(0, 1) for core in e]
    torch.testing.assert_close(turned(x, transposed), x @ t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 2)])
def test_the_identity(sizes: tuple[int, ...], rank: int) -> None:
    t = dense(identity_cores(sizes, rank))
    torch.testing.assert_close(t, torch.eye(len(t), dtype=torch.float64), rtol=0, atol=1e-6)
    x = torch.randn(5, len(t), generator=torch.Generator().manual_seed(0))
    zeros = [torch.zeros(s, s, rank, rank) for s in sizes]
    assert not deviation(x, zeros).any() and torch.equal(turned(x, zeros), x)


def test_small_deviations_survive_narrow_types() -> None:
    """In bfloat16 1 + 0.001 is 1; its deviation from 1 is not."""
    e = [torch.full((4, 4, 1, 1), 1e-3, dtype=torch.bfloat16), torch.zeros(4, 4, 1, 1, dtype=torch.bfloat16)]
    assert deviation(torch.ones(1, 16, dtype=torch.bfloat16), e).float().mean() == pytest.approx(4e-3, rel=0.01)


def test_one_mode_is_a_free_matrix_and_two_are_a_kronecker_product() -> None:
    (one,), t = drawn((5,), 1)
    torch.testing.assert_close(t, torch.eye(5, dtype=torch.float64) + one[:, :, 0, 0])
    (first, second), t = drawn((2, 3), 1)
    a1, a2 = torch.eye(2) + first[:, :, 0, 0], torch.eye(3) + second[:, :, 0, 0]
    torch.testing.assert_close(t, torch.kron(a2, a1))


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (2, 3, 2)])
def test_the_product_of_two_rings_is_the_ring_of_kronecker_cores(sizes: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(3)
    cores = [torch.randn(s, s, 2, 2, generator=source, dtype=torch.float64) for s in sizes]
    torch.testing.assert_close(dense([gram(core) for core in cores]), dense(cores) @ dense(cores).mT)
    made = gram(cores[0])
    by_hand = sum(torch.kron(cores[0][1, l].contiguous(), cores[0][0, l].contiguous()) for l in range(sizes[0]))
    torch.testing.assert_close(made[1, 0], by_hand)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=SIZES, rank=st.integers(1, 3))
def test_a_chain_is_the_product_of_its_slices(sizes: tuple[int, ...], rank: int) -> None:
    source = torch.Generator().manual_seed(4)
    cores = [torch.randn(s, rank, rank, generator=source, dtype=torch.float64) for s in sizes]
    made = chain(cores)
    assert made.shape == (math.prod(sizes), rank, rank)
    for k in range(len(made)):
        expected = torch.eye(rank, dtype=torch.float64)
        for core, digit in zip(cores, short(k, sizes), strict=True):
            expected = expected @ core[digit]
        torch.testing.assert_close(made[k], expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(n=st.integers(1, 60000), modes=st.integers(1, 4))
def test_sizes_are_balanced_and_pad_little(n: int, modes: int) -> None:
    sizes = balanced(n, modes)
    padded = math.prod(sizes)
    assert len(sizes) == modes and list(sizes) == sorted(sizes) and sizes[-1] <= 2 * max(1, sizes[0])
    assert n <= padded and padded - padded // sizes[-1] < n  # the last value of the slowest index meets a real one
    assert modes > 1 or padded == n
    assert n < 1000 or padded <= 1.1 * n


def test_sizes_without_padding_where_there_are_any() -> None:
    for n in (768, 1024, 3072, 4096, 11008, 14336):
        assert math.prod(balanced(n, 2)) == n
    assert balanced(37, 2) == (5, 8) and balanced(13, 2) == (3, 5)  # primes


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(6,), (4, 5), (2, 3, 4), (2, 2, 2, 3)])
def test_the_count_is_what_is_multiplied(sizes: tuple[int, ...], rank: int) -> None:
    e, _ = drawn(sizes, rank)
    x = torch.ones(7, math.prod(sizes), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        deviation(x, e)
    assert counter.get_total_flops() == 2 * 7 * products(sizes, rank)
