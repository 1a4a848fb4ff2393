"""Clusters of given sizes, against all that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.algebra.kmeans import assigned, balanced_kmeans
from weft.algebra.random import generator


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator("kmeans", seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 99))
def test_of_two_clusters_no_assignment_is_cheaper(first: int, second: int, seed: int) -> None:
    distances = draws(first + second, 2, seed=seed).square()
    labels = assigned(distances, [first, second])
    assert torch.bincount(labels, minlength=2).tolist() == [first, second]
    costs = [
        sum(float(distances[row, 0 if row in those else 1]) for row in range(first + second))
        for those in itertools.combinations(range(first + second), first)
    ]
    assert float(distances.gather(1, labels[:, None]).sum()) == pytest.approx(min(costs), abs=1e-12)


@pytest.mark.parametrize("sizes", [[5, 5, 5], [6, 5, 5], [1, 9, 2, 4], [7]])
def test_sizes_are_exact_and_where_all_have_room_each_row_is_with_its_nearest(sizes: list[int]) -> None:
    distances = draws(sum(sizes), len(sizes)).square()
    assert torch.bincount(assigned(distances, sizes), minlength=len(sizes)).tolist() == sizes
    wanted = distances.argmin(1)
    assert torch.equal(assigned(distances, torch.bincount(wanted, minlength=len(sizes)).tolist()), wanted)


def test_clouds_that_lie_apart_are_found() -> None:
    order = torch.randperm(60, generator=generator("order"))
    x = torch.cat([10 * draws(1, 8, seed=j) + 0.1 * draws(20, 8, seed=10 + j) for j in range(3)])[order]
    labels = balanced_kmeans(x, [20, 20, 20], generator(0))
    truth = torch.arange(3).repeat_interleave(20)[order]
    assert all(len(truth[labels == j].unique()) == 1 for j in range(3))


def test_it_is_better_than_chance_and_repeats_itself() -> None:
    x, sizes = draws(120, 6), [30] * 4

    def inertia(labels: torch.Tensor) -> float:
        return sum(float((x[labels == j] - x[labels == j].mean(0)).square().sum()) for j in range(4))

    labels = balanced_kmeans(x, sizes, generator(1))
    assert torch.equal(labels, balanced_kmeans(x, sizes, generator(1)))
    chance = [inertia(torch.arange(4).repeat(30)[torch.randperm(120, generator=generator(i))]) for i in range(20)]
    assert inertia(labels) < 0.9 * min(chance)


def test_rows_that_are_all_alike_and_sizes_that_do_not_fit() -> None:
    labels = balanced_kmeans(torch.ones(6, 3), [2, 2, 2], generator(0))
    assert torch.bincount(labels).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="clusters of 5 rows in all were asked of 6"):
        balanced_kmeans(torch.ones(6, 3), [2, 3], generator(0))
