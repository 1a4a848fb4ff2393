"""SVD: Eckart and Young's theorem."""

import pytest
import torch
from reference import One

from weft.compress._engine import compress


@pytest.mark.parametrize("in_, out", [(23, 31), (31, 23), (24, 24)])
def test_the_error_is_the_root_of_the_dropped_squares(in_, out):
    model = One(in_, out)
    w, bias = model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    (row,) = compress(model, "svd", keep=0.5).rows
    s = torch.linalg.svdvals(w)
    error = (model.layer.dense() - w).square().sum()
    torch.testing.assert_close(error, s[row.size :].square().sum(), rtol=1e-10, atol=0)
    assert row.error == pytest.approx(float(error / s.square().sum()), rel=1e-10)
    assert torch.equal(model.layer.bias, bias)
    assert row.size == int(0.5 * in_ * out) // (in_ + out)


def test_ranks_can_be_multiples():
    (row,) = compress(One(64, 64), "svd", keep=0.7, round_to=8).rows
    assert row.size == 16  # 22 fit
