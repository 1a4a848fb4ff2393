"""LoRD: principal components of the output, and its mean."""

import pytest
import torch
from reference import One, rank_one_sums, rows_of

import weft
from weft.compress._calibration import Corpus, calibrate
from weft.compress._engine import compress
from weft.compress._factoriser import factoriser
from weft.compress._layers import targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_, out", [(23, 31), (31, 23)])  # the covariance of the input, or of the output
def test_the_error_is_the_sum_of_the_dropped_eigenvalues(in_, out, bias):
    model = One(in_, out, bias)
    x = rows_of(model.layer)
    y = model(x).detach()
    (row,) = compress(model, "lord", keep=0.5, data=list(x.split(50))).rows
    new = model(x)
    centred = y - y.mean(0)
    values = torch.linalg.eigvalsh(centred.mT @ centred / len(y)).flip(0)
    torch.testing.assert_close((new - y).square().sum(1).mean(), values[row.size :].sum(), rtol=1e-8, atol=0)
    torch.testing.assert_close(new.mean(0), y.mean(0), rtol=1e-9, atol=1e-11)
    u = model.layer.up.weight
    torch.testing.assert_close(u.mT @ u, torch.eye(row.size, dtype=u.dtype), rtol=0, atol=1e-9)
    assert row.error == pytest.approx(float(values[row.size :].sum() / values.sum()), rel=1e-8)


def test_no_weight_svd_comes_as_near():
    model = One(23, 31)
    x, w, b = rows_of(model.layer), model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    y = model(x).detach()
    (row,) = compress(model, "lord", keep=0.5, data=[x]).rows
    assert (model(x) - y).norm() < 0.9 * (x @ rank_one_sums(w, row.size).mT + b - y).norm()


def test_an_output_that_lies_in_a_plane_is_kept_whole():
    model = One(23, 31)
    generator = torch.Generator().manual_seed(8)
    plane = torch.randn(4, 23, generator=generator, dtype=torch.float64)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64) @ plane + 1
    y = model(x).detach()
    (row,) = compress(model, "lord", keep=0.6, data=[x]).rows
    assert row.size >= 4
    torch.testing.assert_close(model(x), y, rtol=1e-7, atol=1e-8)


def test_without_a_mean_it_is_svd_llm():
    lord, llm = One(23, 31), One(23, 31)
    x = rows_of(lord.layer)
    compress(lord, "lord", keep=0.5, center=False, data=[x])
    compress(llm, "svd_llm", keep=0.5, shrink=0, data=[x])
    torch.testing.assert_close(lord.layer.dense(), llm.layer.dense(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(lord.layer.bias, llm.layer.bias)


def test_the_bias_that_it_adds_is_counted():
    for bias in (True, False):
        model = One(23, 31, bias)
        (layer,) = targets(model, None, None)
        maker = factoriser("lord", weft.config_class("lord")())
        statistics = calibrate(model, [Corpus([rows_of(model.layer)])], [layer], {layer.name: maker.needs(layer)})
        made = maker.build(layer, maker.decompose(layer, statistics[layer.name]), 5)
        assert made.bias is not None
        assert maker.bits(layer, 5) == 64 * (5 * (23 + 31) + (0 if bias else 31))
