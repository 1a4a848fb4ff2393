"""FWSVD: inputs weigh what the loss says."""

import pytest
import torch
from reference import rank_one_sums
from torch import nn

from weft.compress._engine import compress


class Regression(nn.Module):
    """One layer; its loss looks at outputs unequally, and its inputs are of unequal size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(19, 13, dtype=torch.float64)

    def forward(self, x, labels):
        weights = torch.linspace(0.1, 3, 13, dtype=torch.float64)
        return ((self.layer(x) - labels).square() * weights).sum(-1).mean()


def data(rows: int = 60):
    generator = torch.Generator().manual_seed(6)
    size = torch.linspace(0.1, 2, 19, dtype=torch.float64)
    x = torch.randn(rows, 19, generator=generator, dtype=torch.float64) * size
    return {"x": x, "labels": torch.randn(rows, 13, generator=generator, dtype=torch.float64)}


def fisher(model, batch):
    squares = torch.zeros(13, 19, dtype=torch.float64)
    for x, y in zip(batch["x"], batch["labels"]):
        loss = model(x[None], y[None])
        squares += torch.autograd.grad(loss, model.layer.weight)[0].square()
    return squares / len(batch["x"])


@pytest.mark.parametrize("axis", ["in", "out", "both"])
def test_the_weighted_error_is_least(axis):
    model, batch = Regression(), data()
    w, f = model.layer.weight.detach().clone(), fisher(model, batch)
    (row,) = compress(model, "fwsvd", keep=0.5, axis=axis, eps=0, data=[batch]).rows
    right = f.sum(0).sqrt() if axis != "out" else torch.ones(19, dtype=torch.float64)
    left = f.sum(1).sqrt() if axis != "in" else torch.ones(13, dtype=torch.float64)
    weigh = lambda m: left[:, None] * m * right  # noqa: E731
    expected = rank_one_sums(weigh(w), row.size) / left[:, None] / right
    torch.testing.assert_close(model.layer.dense(), expected, rtol=1e-8, atol=1e-10)
    dropped = torch.linalg.svdvals(weigh(w))[row.size :].square().sum()
    torch.testing.assert_close(weigh(model.layer.dense() - w).square().sum(), dropped, rtol=1e-9, atol=0)
    plain = rank_one_sums(w, row.size)
    assert weigh(plain - w).norm() > weigh(model.layer.dense() - w).norm()
    assert (plain - w).norm() < (model.layer.dense() - w).norm()


def test_how_the_loss_is_scaled_changes_nothing():
    class Scaled(Regression):
        def forward(self, x, labels):
            return 1e-9 * super().forward(x, labels)

    models = Regression(), Scaled()
    for model in models:
        compress(model, "fwsvd", keep=0.5, data=[data()])
    torch.testing.assert_close(*(m.layer.dense() for m in models), rtol=1e-8, atol=1e-10)


def test_equal_importance_is_plain_svd():
    fisher_blind, plain = Regression(), Regression()
    compress(fisher_blind, "fwsvd", keep=0.5, eps=1e9, data=[data()])
    compress(plain, "svd", keep=0.5)
    torch.testing.assert_close(fisher_blind.layer.dense(), plain.layer.dense(), rtol=1e-6, atol=1e-8)


def test_a_dead_input_does_no_harm():
    model, batch = Regression(), data()
    batch["x"][:, 3] = 0
    before = model.layer(batch["x"]).detach()
    compress(model, "fwsvd", keep=0.6, data=[batch])
    assert torch.isfinite(model.layer.dense()).all()
    assert (model.layer(batch["x"]) - before).norm() < before.norm()
