"""ARMOR: its steps against brute force, and the whole against the paper's own loop over blocks."""

from itertools import combinations

import plain_armor
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import One, rows_of

import weft
from weft.algebra.random import generator
from weft.compress import armor
from weft.compress._calibration import Corpus, calibrate
from weft.compress._engine import compress
from weft.compress._factoriser import factoriser
from weft.compress._layers import targets
from weft.compress.armor import ArmorConfig, Descent, importance, normalised
from weft.errors import UsageError
from weft.linear._structured import stored_bits


def problem(out, in_, seed=0, dtype=torch.float64):
    """A normalised weight and what its inputs weigh."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(out, in_, generator=draw, dtype=torch.float64)
    h = torch.rand(in_, generator=draw, dtype=torch.float64) + 0.1
    return normalised(w)[0].to(dtype), (h / h.mean()).to(dtype)


def wandering(out, in_, b_out, b_in, seed=0, dtype=torch.float64):
    """A state as it may be on the way, nothing of it an identity."""
    wn, h = problem(out, in_, seed, dtype)
    at = Descent(wn, h, b_out, b_in)
    draw = torch.Generator().manual_seed(seed + 1)
    for part in (at.a, at.b, at.c):
        part += 0.1 * torch.randn(part.shape, generator=draw, dtype=torch.float64).to(dtype)
    at.evaluate()
    return at, wn, h


def product(at):
    return torch.block_diag(*at.a) @ (at.c * at.mask) @ torch.block_diag(*at.b)


shapes = st.tuples(*[st.sampled_from([(4, 4), (8, 4), (12, 4), (8, 8), (24, 12)])] * 2)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 99))
def test_it_starts_at_the_loss_of_plain_pruning(shapes, seed):
    (out, b_out), (in_, b_in) = shapes
    wn, h = problem(out, in_, seed)
    expected = plain_armor.proxy_loss(wn * plain_armor.pruned(wn, h), wn, h)
    at = Descent(wn, h, b_out, b_in)
    assert at.loss == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(product(at), wn * plain_armor.pruned(wn, h))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 99))
def test_a_core_step_is_the_best_of_six_least_squares(shapes, seed):
    (out, b_out), (in_, b_in) = shapes
    at, wn, h = wandering(out, in_, b_out, b_in, seed)
    loss, core, before = at.loss, at.s.clone(), at.mask.clone()
    uniform = torch.rand(at.pairs, generator=generator("draw", seed))
    chosen = at.draw(uniform)
    at.core_step(uniform)
    assert at.loss <= loss
    assert bool((at.mask.view(out, -1, 4).sum(-1) == 2).all())
    touched = torch.zeros_like(before).bool()
    for p, q, row, group in zip(*(each.tolist() for each in chosen)):
        i, columns = p * b_out + row, slice(q * b_in + 4 * group, q * b_in + 4 * group + 4)
        touched[i, columns] = True
        rest = core[p * b_out : (p + 1) * b_out, q * b_in : (q + 1) * b_in].clone()
        rest[row, 4 * group : 4 * group + 4] = 0
        block = slice(q * b_in, (q + 1) * b_in)
        target = (wn[p * b_out : (p + 1) * b_out, block] - at.a[p] @ rest @ at.b[q]) * h[block].sqrt()
        entries = [torch.outer(at.a[p][:, row], at.b[q][4 * group + j] * h[block].sqrt()).flatten() for j in range(4)]
        tried = {}
        for pair in combinations(range(4), 2):
            design = torch.stack([entries[j] for j in pair], 1)
            values = torch.linalg.lstsq(design, target.flatten()[:, None]).solution[:, 0]
            tried[float((design @ values - target.flatten()).square().sum())] = pair, values
        pair, values = tried[min(tried)]
        expected = torch.zeros(4, dtype=torch.float64)
        expected[list(pair)] = values
        torch.testing.assert_close(at.s[i, columns], expected, rtol=1e-6, atol=1e-7)
        assert at.mask[i, columns].nonzero()[:, 0].tolist() == list(pair)
    assert torch.equal(at.s[~touched], core[~touched])


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 99))
def test_what_it_carries_along_follows_from_the_state(shapes, seed):
    (out, b_out), (in_, b_in) = shapes
    at, wn, h = wandering(out, in_, b_out, b_in, seed)
    at.core_step(torch.rand(at.pairs, generator=generator("draw", seed)))
    assert at.loss == pytest.approx(float(plain_armor.proxy_loss(product(at), wn, h)), rel=1e-10)
    parts = [t.clone().requires_grad_(True) for t in (at.a, at.b, at.c)]
    what = torch.block_diag(*parts[0]) @ (parts[2] * at.mask) @ torch.block_diag(*parts[1])
    plain_armor.proxy_loss(what, wn, h).backward()
    at.gradients()
    for mine, part in zip((at.a, at.b, at.c), parts):
        torch.testing.assert_close(mine.grad, part.grad, rtol=1e-9, atol=1e-12)


def test_groups_are_drawn_in_proportion_to_their_gradient():
    at, wn, h = wandering(8, 8, 4, 8)
    core = (at.c * at.mask).requires_grad_(True)
    what = torch.block_diag(*at.a) @ core @ torch.block_diag(*at.b)
    plain_armor.proxy_loss(what, wn, h).backward()
    for p in range(2):
        norms = core.grad[4 * p : 4 * p + 4].view(4, 2, 4).abs().sum(-1).flatten()
        edges = norms.cumsum(0) / norms.sum()
        for i in range(8):
            for u in (edges[i] - norms[i] / norms.sum() + 1e-6, edges[i] - 1e-6):
                _, _, row, group = at.draw(u.expand(at.pairs))
                assert (int(row[p]), int(group[p])) == (i // 2, i % 2)


@pytest.mark.parametrize("blocks", [(8, 4), (4, 12)])
def test_it_goes_where_the_loop_over_blocks_goes(blocks):
    wn, h = problem(16, 24)
    options = {"iterations": 25, "lr": 0.02}
    found = armor.fit(wn, h, *blocks, **options, patience=100, draws=generator("same"))
    loss, what = plain_armor.fit(wn, h, *blocks, **options, draws=generator("same"))
    start = plain_armor.proxy_loss(wn * plain_armor.pruned(wn, h), wn, h)
    assert found.loss == pytest.approx(loss, rel=1e-8) and loss < 0.5 * float(start)
    mine = torch.block_diag(*found.left) @ found.core @ torch.block_diag(*found.right)
    torch.testing.assert_close(mine, what, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lr", [0.05, 3.0])  # a step that overshoots at times, and one that never helps
def test_what_is_kept_is_the_best_state(lr, monkeypatch):
    wn, h = problem(8, 16)
    seen = []
    core_step = Descent.core_step

    def watched(self, uniform):
        core_step(self, uniform)
        seen.append(float(plain_armor.proxy_loss(product(self), wn, h)))
        assert bool((self.mask.view(8, -1, 4).sum(-1) == 2).all())

    monkeypatch.setattr(Descent, "core_step", watched)
    start = float(plain_armor.proxy_loss(wn * plain_armor.pruned(wn, h), wn, h))
    found = armor.fit(wn, h, 4, 8, iterations=60, lr=lr, patience=100, draws=generator(1))
    assert found.loss == pytest.approx(min([start, *seen]), rel=1e-10) and seen[-1] > found.loss
    mine = torch.block_diag(*found.left) @ found.core @ torch.block_diag(*found.right)
    assert found.loss == pytest.approx(float(plain_armor.proxy_loss(mine, wn, h)), rel=1e-10)


def test_it_stops_when_nothing_is_gained(monkeypatch):
    wn, h = problem(8, 8)
    steps = []
    core_step = Descent.core_step
    monkeypatch.setattr(Descent, "core_step", lambda self, u: (steps.append(1), core_step(self, u)))
    armor.fit(wn, h, 4, 4, iterations=500, lr=1e3, patience=7, draws=generator(1))
    assert len(steps) == 7
    sparse = wn * plain_armor.pruned(wn, h)  # which is in the form already
    steps.clear()
    assert armor.fit(sparse, h, 4, 4, iterations=500, lr=0.1, patience=7, draws=generator(1)).loss == 0
    assert not steps


def test_nearly_parallel_rows_do_no_harm_in_float32():
    at, _, _ = wandering(8, 16, 4, 8, dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    at.b[:] = 1 + 1e-7 * torch.randn(at.b.shape, generator=draw)
    at.b[0, 2] = 0
    at.evaluate()
    for _ in range(30):
        before = at.loss
        at.core_step(torch.rand(at.pairs, generator=draw))
        assert at.loss <= before * (1 + 1e-6)
    assert bool(torch.isfinite(at.s).all())


def test_the_normaliser_takes_columns_first_and_is_undone():
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[:, 3] = 0
    wn, rows, columns = normalised(w)
    for j in range(8):
        assert float(columns[j]) == pytest.approx(sum(float(v) ** 2 for v in w[:, j]) ** 0.5 + 1e-5, rel=1e-12)
    for i in range(5):
        length = sum(float(w[i, j] / columns[j]) ** 2 for j in range(8)) ** 0.5
        assert float(rows[i]) == pytest.approx(length + 1e-5, rel=1e-12)
    torch.testing.assert_close(rows[:, None] * wn * columns, w, rtol=1e-14, atol=0)


def test_inputs_that_are_never_seen_count_as_the_mean_of_the_others():
    h = importance(torch.tensor([1.0, 0.0, 3.0, float("inf"), float("nan")]))
    torch.testing.assert_close(h, torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0]) / 2)
    assert torch.equal(importance(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_product_without_the_normaliser(bias):
    model = One(24, 32, bias)
    w, x = model.layer.weight.detach().clone(), rows_of(model.layer)
    (row,) = compress(model, "armor", keep=0.9, iterations=30, lr=0.01, data=list(x.split(50))).rows
    wn, rows, columns = normalised(w)
    h = x.square().mean(0)
    left = plain_armor.proxy_loss(model.layer.dense() / columns / rows[:, None], wn, h)
    assert row.error == pytest.approx(float(left), rel=1e-9)
    assert row.error < 0.9 * float(plain_armor.proxy_loss(wn * plain_armor.pruned(wn, h), wn, h))
    assert row.size == 4 and (model.layer.block_out, model.layer.block_in) == (4, 4)
    assert row.bits == stored_bits(model.layer) == 64 * (32 * 24 // 2 + 4 * (32 + 24)) + 32 * 24
    expected = x @ model.layer.dense().mT + (model.layer.bias if bias else 0)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_only_squares_of_the_inputs_are_collected():
    model = One(24, 32)
    x = rows_of(model.layer)
    (layer,) = targets(model, None, None)
    needs = {layer.name: factoriser("armor", ArmorConfig()).needs(layer)}
    for data in ([x], list(x.split(7))):
        seen = calibrate(model, [Corpus(data)], [layer], needs)[layer.name].input
        torch.testing.assert_close(seen.square, x.square().sum(0) / len(x), rtol=1e-10, atol=0)
        assert set(seen.sums) == {"rows", "squares"}


def sizes(out, in_, **options):
    model = torch.nn.Sequential(torch.nn.Linear(in_, out, bias=False))
    (layer,) = targets(model, None, None)
    return list(factoriser("armor", ArmorConfig(**options)).sizes(layer)), layer


def test_its_sizes_are_the_sides_of_blocks():
    assert sizes(96, 64, guard=False)[0] == [4, 8, 12, 16, 96 * 64]
    assert sizes(96, 64)[0] == [4, 8, 12, 16]  # with blocks of 24, and 16 along the side of 64, it would grow
    assert sizes(96, 64, block_size=12)[0] == [4, 8, 12]
    assert sizes(96, 62)[0] == sizes(95, 64)[0] == []
    made = factoriser("armor", ArmorConfig())
    _, layer = sizes(96, 64)
    assert made.bits(layer, 12) == 32 * (96 * 64 // 2 + 12 * 96 + 8 * 64) + 96 * 64


def model_of(*widths):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:])))


def test_a_keep_that_it_cannot_reach_is_refused():
    data = [torch.randn(20, 32)]
    with pytest.raises(UsageError, match="keep=0.6 is below the smallest form of this method, which stores 0.7"):
        compress(model_of(32, 64, 32), "armor", keep=0.6, data=data)


def test_layers_that_it_can_serve_are_not_left_dense_to_use_up_the_bits():
    data = [torch.randn(20, 32)]
    report = compress(model_of(32, 64, 32, 31), "armor", keep=0.99, block_size=4, iterations=2, data=data)
    assert [row.kind for row in report.rows] == ["block_semi_sparse", "block_semi_sparse", "dense"]
    assert [row.size for row in report.rows] == [4, 4, None] and report.keep < 0.85


def test_another_seed_draws_other_groups():
    found = []
    for seed in (0, 0, 1):
        model = One(24, 32)
        compress(model, "armor", keep=0.9, iterations=5, seed=seed, data=[rows_of(model.layer)])
        found.append(model.layer.dense())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"block_size": 6}, "block_size=6 must be a multiple of 4"),
        ({"block_size": 0}, "block_size=0"),
        ({"iterations": 0}, "iterations=0"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"allocate": "water"}, "allocate='water'.*uniform or block_influence"),
    ],
)
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        weft.config_class("armor")(**options)
