"""FactoredEmbedding against tables in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft import UsageError
from weft.linear._structured import stored_bits
from weft.linear.factored_embedding import FactoredEmbedding

sides = st.integers(1, 23)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(n=sides, d=sides, rank=sides, mean=st.booleans(), seed=st.integers(0, 9))
def test_forward_is_a_row_of_the_product(n, d, rank, mean, seed):
    rank = min(rank, n, d)
    table, up, mu = drawn(n, rank, seed=seed), drawn(d, rank, seed=seed + 1), drawn(d, seed=seed + 2) if mean else None
    ids = torch.randint(n, (2, 3), generator=torch.Generator().manual_seed(seed))
    layer = FactoredEmbedding.from_factors(table, up, mu)
    dense = torch.einsum("nh,dh->nd", table, up) + (mu if mean else 0)
    assert torch.allclose(layer.dense(), dense, rtol=1e-10, atol=1e-10)
    found = layer(ids)
    assert found.shape == (2, 3, d)
    for row in range(2):
        for column in range(3):
            assert torch.allclose(found[row, column], dense[ids[row, column]], rtol=1e-10, atol=1e-10)
    assert (layer.num_embeddings, layer.embedding_dim, layer.rank) == (n, d, rank)
    assert stored_bits(layer) == 64 * (n * rank + d * rank + mean * d)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_from_dense_leaves_the_tail_of_the_spectrum(rank, mean):
    e = drawn(17, 11) + 3
    layer = FactoredEmbedding.from_dense(e, rank=rank, mean=mean)
    spectrum = torch.linalg.svdvals(e - e.mean(0) if mean else e)
    assert torch.allclose((layer.dense() - e).norm(), spectrum[rank:].norm(), atol=1e-10)
    assert torch.allclose(layer.up.mT @ layer.up, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    if mean:
        assert torch.allclose(layer.mean, e.mean(0)) and torch.allclose(layer.dense().mean(0), e.mean(0))


def test_the_row_of_padding_is_what_it_stands_for_and_is_not_trained():
    e = drawn(9, 5)
    layer = FactoredEmbedding.from_dense(e, rank=5, mean=True, padding_idx=3)
    assert torch.allclose(layer(torch.tensor([3]))[0], e[3]) and layer.padding_idx == 3
    layer(torch.arange(9)).square().sum().backward()
    assert layer.table.weight.grad[3].abs().sum() == 0
    assert (layer.table.weight.grad.abs().sum(1) > 0).sum() == 8


def test_it_shares_nothing_with_what_it_was_made_from():
    table, up, mean = torch.ones(4, 2), torch.ones(3, 2), torch.ones(3)
    layer = FactoredEmbedding.from_factors(table, up, mean)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert table.sum() == 8 and up.sum() == 6 and mean.sum() == 3


class Scaled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "stock, said",
    [
        (lambda: nn.Embedding(5, 3, max_norm=1.0), "an Embedding with max_norm=1.0 has no factored_embedding form"),
        (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
        (lambda: nn.Embedding(5, 3, sparse=True), "sparse=True"),
        (lambda: Scaled(5, 3), "stands for an Embedding, but it is a Scaled"),
    ],
)
def test_an_embedding_that_does_more_is_refused(stock, said):
    with pytest.raises(UsageError, match=said):
        FactoredEmbedding.geometry(stock())


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_the_table_cannot_have_is_refused(rank):
    with pytest.raises(UsageError, match=f"rank={rank}: a matrix of 7 × 3 has 1 to 3"):
        FactoredEmbedding.from_dense(drawn(7, 3), rank=rank)
