"""Sizes for layers: within the budget, nothing more fits, and each rule by its own definition."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.compress._allocate import ALLOCATORS, Menu, allocate, cost, normalised, total
from weft.errors import UsageError


def menu(out: int, in_: int, decay: float, influence: float = 0.1, most: int | None = None) -> Menu:
    """A low-rank layer of 16-bit numbers whose singular values fall as i^-decay."""
    ranks = range(1, (most or min(out, in_)) + 1)
    values = torch.arange(1, min(out, in_) + 1, dtype=torch.float64) ** -decay
    energy = values.square()
    errors = torch.stack([energy[r:].sum() / energy.sum() for r in ranks])
    bits, losses = [16 * r * (out + in_) for r in ranks], decay * torch.tensor([0.9, 0.5, 0.2, 0.1])
    return Menu(bits, ranks, 16 * out * in_, errors, values, influence, f"{out}", losses)


SHAPES = [(24, 24), (24, 64), (64, 24), (12, 24), (7, 31)]
MENUS = {f"layer{i}": menu(*shape, 0.2 + 0.2 * i, 0.05 * (i + 1)) for i, shape in enumerate(SHAPES)}
DENSE = sum(m.dense for m in MENUS.values())


@pytest.mark.parametrize("how", ALLOCATORS)
@settings(max_examples=25, deadline=None)
@given(keep=st.floats(0.15, 0.99), seed=st.integers(0, 1000))
def test_budget_is_met_and_nothing_more_fits(how, keep, seed):
    shapes = torch.randint(5, 40, (4, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    menus = {str(i): menu(*shape, 0.3 * i, 0.1 * (i + 1)) for i, shape in enumerate(shapes)}
    dense = sum(m.dense for m in menus.values())
    try:
        sizes = allocate(how, menus, keep)
    except UsageError as refusal:
        assert "below the smallest form" in str(refusal)
        return
    spent = total(menus, sizes)
    assert spent <= keep * dense
    for name, size in sizes.items():
        if size is None:
            continue
        assert menus[name].bits[size] < menus[name].dense  # the guard
        affordable = [b for b in menus[name].bits if b < menus[name].dense]
        larger = affordable[size + 1] if size + 1 < len(affordable) else menus[name].dense
        assert spent - menus[name].bits[size] + larger > keep * dense


def test_without_the_guard_every_layer_is_replaced():
    sizes = allocate("uniform", MENUS, 0.99, guard=False)
    assert all(size is not None for size in sizes.values())


def test_uniform_gives_every_layer_its_share_to_within_a_step():
    sizes = allocate("uniform", MENUS, 0.6)
    for name, size in sizes.items():
        step = MENUS[name].bits[1] - MENUS[name].bits[0]
        assert abs(cost(MENUS[name], size) - 0.6 * MENUS[name].dense) < 2 * step


def test_energy_leaves_every_layer_about_the_same():
    sizes = ALLOCATORS["energy"](MENUS, 0.4)
    left = {name: 0.0 if size is None else float(MENUS[name].errors[size]) for name, size in sizes.items()}
    worst = max(left.values())
    for name, size in sizes.items():  # one size less would leave more than any layer does now
        if size is not None and size > 0:
            assert MENUS[name].errors[size - 1] > worst


def test_water_is_the_best_choice_by_brute_force():
    menus = {name: menu(6, 6, decay, most=2) for name, decay in (("a", 0.1), ("b", 0.5), ("c", 2.0))}
    budget = 0.7 * sum(m.dense for m in menus.values())
    choices = itertools.product([0, 1, None], repeat=3)
    every = [dict(zip(menus, choice)) for choice in choices]

    def left(sizes):
        return sum(0.0 if size is None else float(menus[name].errors[size]) for name, size in sizes.items())

    best = min(left(sizes) for sizes in every if total(menus, sizes) <= budget)
    assert left(allocate("water", menus, 0.7)) == pytest.approx(best)


def test_singular_values_are_moved_to_the_unit_interval():
    z = normalised(torch.tensor([10.0, 5.0, 2.0, 1.0]))
    torch.testing.assert_close(z, torch.tensor([1.0, 4 / 9, 1 / 9, 0.0]))
    assert int((z < 0.2).sum()) == 2
    assert bool((normalised(torch.full((3,), 2.0)) == 1).all())


def test_threshold_cuts_all_layers_at_one_height():
    sizes = ALLOCATORS["threshold"](MENUS, 0.5)
    kept, cut = [], []
    for name, size in sizes.items():
        z = normalised(MENUS[name].values)
        if size is not None:
            rank = MENUS[name].sizes[size]
            kept.append(float(z[rank - 1]))
            cut.append(float(z[rank]) if rank < len(z) else 0.0)
    assert min(kept) > max(cut)


def test_block_influence_follows_the_formula():
    menus = {str(i): menu(32, 32, 0.5, influence) for i, influence in enumerate((0.05, 0.1, 0.2, 0.3))}
    s = torch.tensor([0.05, 0.1, 0.2, 0.3], dtype=torch.float64)
    sparsity = 4 * 0.4 * torch.softmax(-s / 0.15, 0)
    assert sparsity.mean().item() == pytest.approx(0.4)
    sizes = ALLOCATORS["block_influence"](menus, 0.6)
    for (name, size), share in zip(sizes.items(), sparsity.tolist()):
        bits = menus[name].bits
        assert bits[size] <= (1 - share) * menus[name].dense < bits[size + 1]


def test_block_influence_leaves_the_average_to_what_no_block_holds():
    inside = {str(i): menu(32, 32, 0.5, influence) for i, influence in enumerate((0.05, 0.3))}
    outside = {"table": replace(menu(100, 20, 0.5), influence=None)}
    found = ALLOCATORS["block_influence"]({**outside, **inside}, 0.6)
    assert found == {**ALLOCATORS["block_influence"](inside, 0.6), **ALLOCATORS["uniform"](outside, 0.6)}


def test_block_influence_hands_on_what_a_clamped_block_cannot_give():
    menus = {str(i): menu(200, 200, 0.5, influence) for i, influence in enumerate((0.0, 1.0, 1.0, 1.0))}
    sizes = ALLOCATORS["block_influence"](menus, 0.6)
    kept = [cost(menus[name], size) / menus[name].dense for name, size in sizes.items()]
    assert kept[0] == pytest.approx(0.2, abs=0.011)
    assert sum(kept) / 4 == pytest.approx(0.6, abs=0.011)


def test_sweep_cuts_hardest_where_the_loss_rises_least():
    """Two types, four layers: one costs nothing until a fifth is left, the other rises by 1 for each fifth."""
    cheap, dear = torch.tensor([0.1, 0.0, 0.0, 0.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    menus = {
        f"{i}.{kind}": replace(menu(100, 100, 0.5), type=kind, losses=losses)
        for i in range(2)
        for kind, losses in (("cheap", cheap), ("dear", dear))
    }
    sizes = ALLOCATORS["sweep"](menus, 0.7)
    kept = {name: cost(menus[name], size) / menus[name].dense for name, size in sizes.items()}
    assert kept["0.cheap"] == kept["1.cheap"] == pytest.approx(0.4, abs=0.03)  # beyond it would cost, and save no rise
    assert kept["0.dear"] == kept["1.dear"] == pytest.approx(1, abs=0.03)
    noisy = {name: replace(m, losses=m.losses + torch.tensor([0.0, -0.2, 0.0, 0.0])) for name, m in menus.items()}
    assert ALLOCATORS["sweep"](noisy, 0.7)["0.cheap"] == sizes["0.cheap"]  # a loss that falls is a loss that stays
    assert total(menus, sizes) <= 0.7 * sum(m.dense for m in menus.values())


def test_refusals_say_what_would_work():
    with pytest.raises(UsageError, match="did you mean 'uniform'"):
        allocate("unifrom", MENUS, 0.5)
    with pytest.raises(UsageError, match="stores 0\\."):
        allocate("uniform", MENUS, 0.001)
    bare = {"a": Menu([16, 32], [1, 2], 64)}
    with pytest.raises(UsageError, match="needs losses"):
        allocate("sweep", bare, 0.5)
    with pytest.raises(UsageError, match="needs errors"):
        allocate("water", bare, 0.5)
    with pytest.raises(UsageError, match="calibration data"):
        allocate("block_influence", bare, 0.5)
