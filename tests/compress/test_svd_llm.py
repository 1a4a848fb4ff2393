"""SVD-LLM: the least change of the layer's output, and the same as projecting the output."""

import pytest
import torch
from reference import One, rank_one_sums, rows_of

from weft.compress._engine import compress


@pytest.mark.parametrize("in_, out", [(23, 31), (31, 23)])
def test_the_output_changes_least(in_, out):
    model = One(in_, out)
    w, x = model.layer.weight.detach().clone(), rows_of(model.layer)
    (row,) = compress(model, "svd_llm", keep=0.4, shrink=0, data=list(x.split(50))).rows
    left = (x @ (model.layer.dense() - w).mT).square().sum()
    best = rank_one_sums(x @ w.mT, row.size)  # of all matrices of this rank, W or not
    torch.testing.assert_close(left, (best - x @ w.mT).square().sum(), rtol=1e-9, atol=0)
    plain = rank_one_sums(w, row.size)
    assert left < 0.9 * (x @ (plain - w).mT).square().sum()
    assert row.error == pytest.approx(float(left / (x @ w.mT).square().sum()), rel=1e-9)


def test_the_factors_project_the_output():
    model = One(23, 31)
    w, x = model.layer.weight.detach().clone(), rows_of(model.layer)
    (row,) = compress(model, "svd_llm", keep=0.4, shrink=0, data=[x]).rows
    u = torch.linalg.svd((x @ w.mT).mT, full_matrices=False).U[:, : row.size]
    torch.testing.assert_close(model.layer.dense(), u @ u.mT @ w, rtol=1e-8, atol=1e-10)


def test_full_shrinkage_is_plain_svd():
    shrunk, plain = One(23, 31), One(23, 31)
    compress(shrunk, "svd_llm", keep=0.4, shrink=1.0, data=[rows_of(shrunk.layer)])
    compress(plain, "svd", keep=0.4)
    torch.testing.assert_close(shrunk.layer.dense(), plain.layer.dense(), rtol=1e-8, atol=1e-10)


def test_a_feature_that_is_never_seen_costs_nothing():
    model = One(23, 31)
    x = rows_of(model.layer)
    x[:, 5] = 0
    before = model(x).detach()
    (row,) = compress(model, "svd_llm", keep=0.4, shrink=0, data=[x]).rows
    after = model(x)
    assert torch.isfinite(model.layer.dense()).all()
    best = rank_one_sums(before - model.layer.bias, row.size) + model.layer.bias
    torch.testing.assert_close((after - before).norm(), (best - before).norm(), rtol=1e-6, atol=0)
