"""WeLore: the threshold rule on given spectra, and what it trains."""

import pytest
import torch
from models import batches, llama
from torch import nn

from weft.compress._engine import compress
from weft.compress.welore import train_low_rank
from weft.errors import UsageError
from weft.linear.low_rank import LowRank


class Spectra(nn.Module):
    """Square weights with the singular values that are asked for."""

    def __init__(self, *spectra: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleList(nn.Linear(len(s), len(s), bias=False, dtype=torch.float64) for s in spectra)
        for layer, s in zip(self.layers, spectra):
            u, v = (torch.linalg.qr(torch.randn(len(s), len(s), dtype=torch.float64)).Q for _ in range(2))
            layer.weight.data = (u * s) @ v.mT


STEEP = torch.cat([torch.linspace(10, 8, 5), torch.linspace(0.5, 0.1, 35)]).double()
FLAT = torch.linspace(3, 1, 40).double()


def test_heavy_tails_lose_their_rank_and_flat_spectra_stay_dense():
    model = Spectra(STEEP, FLAT)
    flat = model.layers[1].weight.detach().clone()
    steep, other = compress(model, "welore", err=0.6).rows
    z = torch.cat([(s - s[-1]) / (s[0] - s[-1]) for s in (STEEP, FLAT)]).sort().values
    cut = z[int(0.6 * 80)]
    expected = int(((STEEP - STEEP[-1]) / (STEEP[0] - STEEP[-1]) >= cut).sum())
    assert steep.size == expected == 5 and other.size is None
    assert torch.equal(model.layers[1].weight, flat)
    error = (model.layers[0].dense() - Spectra(STEEP, FLAT).layers[0].weight).square().sum()
    torch.testing.assert_close(error, STEEP[5:].square().sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("err", [0.2, 0.37, 0.5, 0.61])
def test_the_rank_reduction_is_met_to_one_singular_value(err):
    drawn = torch.rand(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Spectra(*drawn.sort(dim=1, descending=True).values)
    report = compress(model, "welore", err=err, guard=False, min_ratio=0.0)
    cut = sum(30 - row.size for row in report.rows)
    assert cut == int(err * 120)


def test_a_scaled_weight_is_cut_alike():
    plain, scaled = (compress(Spectra(STEEP, c * STEEP), "welore", err=0.5).rows for c in (1.0, 100.0))
    assert [row.size for row in plain] == [row.size for row in scaled]


def test_exactly_half_is_low_rank_under_the_default_and_not_under_a_half():
    half = torch.cat([torch.full((20,), 5.0), torch.full((20,), 1.0)]).double()
    half[0], half[-1] = 5.5, 0.5
    assert compress(Spectra(half), "welore", err=0.5, guard=False).rows[0].size == 20
    with pytest.raises(UsageError, match="min_ratio"):
        compress(Spectra(half), "welore", min_ratio=1.0)


def test_only_low_rank_components_and_gains_are_trained():
    model = llama(torch.float32)
    compress(model, "welore", keep=0.6)
    assert any(isinstance(m, LowRank) for m in model.modules())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in train_low_rank(model).parameters() if p.requires_grad), lr=1e-2)
    ids = batches(model)[0]["input_ids"]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".up.weight" in name or ".down.weight" in name or "norm" in name}


def test_err_is_a_rule_of_the_threshold():
    with pytest.raises(UsageError, match="threshold"):
        compress(llama(), "welore", err=0.5, allocate="uniform")
