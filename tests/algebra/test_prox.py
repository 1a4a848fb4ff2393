"""Proximal operators against the minimisation they solve."""

import pytest
import torch

from weft.algebra.prox import levels, soft_threshold


def test_soft_threshold_minimises_its_objective():
    v = torch.linspace(-2, 2, 41, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)[:, None]
    t = 0.37
    objective = 0.5 * (grid - v).square() + t * grid.abs()
    best = grid[objective.argmin(0), 0]
    torch.testing.assert_close(soft_threshold(v, t), best, rtol=0, atol=1e-4)
    assert torch.equal(soft_threshold(torch.tensor([t, -t]), t), torch.zeros(2))


@pytest.mark.parametrize("spacing", ["linear", "log_linear", "exp_linear"])
def test_levels_keep_both_ends_and_rise(spacing):
    found = levels(3e-4, 7e-4, 5, spacing)
    assert found[0] == 3e-4 and found[-1] == 7e-4 and found == sorted(set(found))
    if spacing == "exp_linear":
        ratios = [b / a for a, b in zip(found, found[1:], strict=False)]
        assert max(ratios) - min(ratios) < 1e-12


def test_levels_refuse_what_they_cannot_do():
    assert levels(1.0, 2.0, 1, "linear") == [2.0]
    with pytest.raises(ValueError, match="above 0"):
        levels(0.0, 1.0, 3, "exp_linear")
    with pytest.raises(ValueError, match="cubic"):
        levels(0.1, 1.0, 3, "cubic")
