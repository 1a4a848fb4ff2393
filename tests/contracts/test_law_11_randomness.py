"""Law 11. What a method draws is a function of (seed, optimiser step, module), and of nothing else."""

from __future__ import annotations

import harness
import specimens
import torch

STEPS = 8


def result(slug, tmp_path, disturb: bool, **given) -> dict[str, torch.Tensor]:
    """Parameters after some steps; `disturb` draws from torch's global generators in between and looks at the model."""
    model = harness.attach(slug, short=True, **given)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    for i in range(STEPS):
        if disturb:
            torch.manual_seed(1000 + i)
            torch.rand(3 + i)
            harness.outputs(model)
        harness.train(model, optimizer, 1, first=i)
    return {n: p.detach().clone() for n, p in harness.trainable(model).items()}


def test_the_global_generators_do_not_matter(slug, tmp_path):
    quiet, disturbed = result(slug, tmp_path, False), result(slug, tmp_path, True)
    for name, t in quiet.items():
        assert torch.equal(t, disturbed[name]), name


def test_training_draws_nothing_from_the_global_stream(slug, tmp_path):
    model = harness.attach(slug, short=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    before = torch.random.get_rng_state()
    harness.train(model, optimizer, STEPS)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_draw_holds_for_the_whole_step(slug, tmp_path):
    """Every micro-batch of a step meets the same draw, in training mode, at every step."""
    model = harness.attach(slug, dtype=torch.float64, short=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path)
    harness.randomise(model)
    for i in range(STEPS):
        model.train()
        with torch.no_grad():
            first = model(**specimens.batch(3)).logits
            model(**specimens.batch(4))
            assert torch.equal(model(**specimens.batch(3)).logits, first)
        harness.train(model, optimizer, 1, first=i)


def test_another_seed_draws_otherwise_and_the_same_seed_alike(slug, tmp_path):
    if "seed" not in harness.fields(slug):
        return  # nothing is drawn but the start, which the global generator gives
    runs = [result(slug, tmp_path, False, seed=s) for s in (1, 1, 2)]
    assert all(torch.equal(t, runs[1][n]) for n, t in runs[0].items())
    assert any(not torch.equal(t, runs[2][n]) for n, t in runs[0].items())
