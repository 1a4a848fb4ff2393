"""CoSpaDi: what is learned in weighted coordinates is what the layer's output loses."""

import pytest
import torch
from reference import One, rank_one_sums, rows_of

import weft
from weft.compress._engine import compress
from weft.compress._factoriser import factoriser
from weft.compress._layers import targets
from weft.errors import UsageError
from weft.linear._structured import stored_bits


def learned(in_=23, out=61, x=None, **options):
    """The compressed layer and what became of it, the matrix before, and the calibration data."""
    model = One(in_, out)
    w = model.layer.weight.detach().clone()
    x = rows_of(model.layer) if x is None else x
    (row,) = compress(model, "cospadi", **{"keep": 0.6, "data": list(x.split(50)), **options}).rows
    return model.layer, row, w, x


def lost(x, w, new):
    """The share of the output that a matrix loses, in float64."""
    return float((x @ (new - w).mT).square().sum() / (x @ w.mT).square().sum())


def upper(x):
    """L, with LᵀL = E[xxᵀ], by another way than the code's."""
    r = torch.linalg.qr(x / len(x) ** 0.5).R
    return r * r.diagonal().sign()[:, None]


@pytest.mark.parametrize("in_, out", [(23, 61), (61, 23)])
@pytest.mark.parametrize("start", ["svd", "data", "random"])
def test_the_error_is_that_of_the_output(in_, out, start):
    layer, row, w, x = learned(in_, out, start=start)
    assert row.kind == "dictionary" and 0 < row.error < 1
    assert row.error == pytest.approx(lost(x, w, layer.dense()), rel=1e-8)
    l, atoms = upper(x), layer.atoms.weight.detach()
    codes = torch.zeros(out, row.size, dtype=w.dtype).scatter(1, layer.places.long(), layer.values.detach())
    left = (l @ w.mT - l @ atoms.mT @ codes.mT).square().sum() / (l @ w.mT).square().sum()  # ‖Y − D_L·S‖²
    assert row.error == pytest.approx(float(left), rel=1e-8)
    torch.testing.assert_close((l @ atoms.mT).norm(dim=0), torch.ones(row.size, dtype=w.dtype), rtol=1e-8, atol=0)
    assert int((codes != 0).sum(1).max()) <= row.size // 2


def test_it_comes_nearer_than_low_rank_of_the_same_bits_and_than_without_data():
    layer, row, w, x = learned()
    rank = row.bits // (64 * (23 + 61))
    svd_llm = rank_one_sums(x @ w.mT, rank)
    error = float((svd_llm - x @ w.mT).square().sum() / (x @ w.mT).square().sum())
    blind = learned(shrink=1.0)[0]  # L = I
    assert row.error < 0.8 * error < error < 0.8 * lost(x, w, blind.dense())


def test_with_one_subspace_for_all_outputs_it_becomes_svd_llm():
    for start, slack in (("svd", 1e-9), ("data", 1e-3)):
        layer, row, w, x = learned(rho=1, start=start, iterations=400, tolerance=0)
        assert layer.nonzeros == row.size
        best = rank_one_sums(x @ w.mT, row.size)
        error = float((best - x @ w.mT).square().sum() / (x @ w.mT).square().sum())
        assert error * (1 - 1e-9) <= row.error < error * (1 + slack)


def test_more_rounds_come_nearer():
    errors = [learned(start="data", iterations=n, tolerance=0)[1].error for n in (0, 1, 5, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * errors[0]


def test_the_seed_draws_the_start():
    one, same, other = (learned(start="data", seed=seed)[0].dense() for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(learned(seed=0)[0].dense(), learned(seed=1)[0].dense())  # singular vectors are not drawn


def test_an_input_that_is_never_seen_does_no_harm():
    x = rows_of(torch.nn.Linear(23, 61))
    x[:, 5] = 0
    layer, row, w, x = learned(x=x)
    assert torch.isfinite(layer.dense()).all()
    alive = torch.arange(23) != 5
    assert row.error == pytest.approx(lost(x, w, layer.dense()), rel=1e-5)
    assert lost(x[:, alive], w[:, alive], layer.dense()[:, alive]) < 0.5


@pytest.mark.parametrize("rho, support", [(2, 1 / 16), (1.5, 1 / 16), (40, 1 / 80)])  # a bit each, or a byte each taken
def test_all_that_is_stored_counts(rho, support):
    model = One(160, 320).bfloat16()
    data = [rows_of(model.layer).bfloat16()]
    (row,) = compress(model, "cospadi", keep=0.5, rho=rho, iterations=0, data=data).rows
    assert stored_bits(model.layer) == row.bits
    k = 0.5 * 160 * 320 / (160 + 320 / rho + 320 * support)  # in numbers of sixteen bits
    assert abs(row.size - k) <= 8 and model.layer.nonzeros == int(row.size / rho)


@pytest.mark.parametrize("rho", [1, 1.15, 1.7, 2, 3.3])
def test_the_full_setting_takes_as_many_atoms_as_there_are_dimensions(rho):
    for in_, out in ((23, 31), (31, 23), (20, 20)):
        (layer,) = targets(One(in_, out), None, None)
        maker = factoriser("cospadi", weft.config_class("cospadi")(rho=rho, guard=False))
        counts = [maker.nonzeros(k) for k in maker.sizes(layer)]
        assert counts[-1] == max(counts) == min(in_, out)
        bits = [maker.bits(layer, k) for k in maker.sizes(layer)]
        assert bits == sorted(set(bits))
        guarded = factoriser("cospadi", weft.config_class("cospadi")(rho=rho))
        assert {k for k, cost in zip(maker.sizes(layer), bits) if cost < layer.bits} <= set(guarded.sizes(layer))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rho": 0.5}, "rho=0.5"),
        ({"rho": float("inf")}, "rho=inf"),
        ({"iterations": -1}, "iterations=-1"),
        ({"iterations": True}, "iterations=True"),
        ({"tolerance": 1}, "tolerance=1"),
        ({"start": "columns"}, "start='columns': svd, data or random"),
        ({"allocate": "water"}, "allocate='water' needs the error of every size"),
        ({"shrink": 2}, "shrink=2"),
    ],
)
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        compress(One(5, 7), "cospadi", data=[torch.randn(9, 5)], **options)
