"""SNELLA against kernels, thresholds and importances written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

import weft
from weft.adapters._delta import leaves
from weft.adapters.snella import SnellaController, SnellaDelta, Update, allocated, kernel, scheduled, threshold

HOW = ["weighted", "hard", "soft"]


def chain(*sides: int, bias: bool = True) -> nn.Sequential:
    layers = [nn.Linear(a, b, bias=bias) for a, b in zip(sides, sides[1:])]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())])


def attach(*sides: int, dtype: torch.dtype = torch.float64, bias: bool = True, **options):
    """A chain of adapted linear layers in training mode, its controller and its deltas."""
    torch.manual_seed(0)
    net = chain(*sides, bias=bias).to(dtype)
    names = [str(i) for i in range(0, 2 * (len(sides) - 1), 2)]
    model = get_peft_model(net, weft.SnellaConfig(**{"q_dim": 8, "target_modules": names, **options}))
    model = (model.double() if dtype == torch.float64 else model).train()
    layers = [model.base_model.model[int(name)] for name in names]
    controller: SnellaController = layers[0].controllers["default"]
    return model, controller, [d for layer in layers for d in leaves(layer.deltas["default"])]


def move(deltas: list[SnellaDelta], scale: float = 0.3) -> None:
    source = torch.Generator().manual_seed(3)
    for d in deltas:
        for p in d.parameters():
            p.data += scale * torch.randn(p.shape, generator=source).to(p.dtype)
        d.keep(int(d.kept))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    x = torch.randn(6, model.base_model.model[0].base_layer.in_features, generator=source).to(p.dtype)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def written_out(d: SnellaDelta, tau: float | None = None) -> tuple[Tensor, Tensor]:
    """ΔW and K from differences of vectors, with autograd's own gradients."""
    p, q = d.P.double(), d.Q.double()
    far = [(q[h][:, None] - p[h][None]).square().sum(-1).sqrt() for h in (0, 1)]
    distance = 0.1 * far[0] - 0.1 * far[1]
    e = torch.exp(distance / d.g)
    k = distance + d.a * e / e.sum(0) + d.b
    t = float(d.tau) if tau is None else tau
    kept = (k.abs() > t).double().detach()
    made = {
        "weighted": k * k.abs().detach() * kept,
        "hard": k * kept,
        "soft": torch.where(k > 0, k - t, k + t) * kept,
    }[d.config.sparsify]
    return made, k


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    how=st.sampled_from(HOW),
    bias=st.booleans(),
)
def test_forward_and_gradients_are_what_is_written_out(out: int, in_: int, share: float, how: str, bias: bool) -> None:
    model, _, (d,) = attach(in_, out, init_thres=share, target_ratio=0.95, sparsify=how, bias=bias)
    move([d])
    x = torch.randn(2, 3, in_, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    layer = model.base_model.model[0]
    update, _ = written_out(d)
    torch.testing.assert_close(d.delta(), update, rtol=1e-9, atol=1e-12)
    expected = torch.nn.functional.linear(x, layer.base_layer.weight.detach() + update, layer.base_layer.bias)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *d.parameters()], retain_graph=True)
    for y in (layer(x), d.add(layer.base_layer(x), x)):  # folded into one product, and beside the base's
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
        found = torch.autograd.grad(y.square().sum(), [x, *d.parameters()])
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)
    g = torch.randn(out, in_, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad((d.delta() * g).sum(), list(d.parameters()))
    wanted = torch.autograd.grad((update * g).sum(), list(d.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_dropped_entries_have_no_gradient_and_the_weight_of_others_is_no_path() -> None:
    """∂ΔW/∂b, which reaches every entry alike, is Σ |K| over what is kept; twice that without the detaching."""
    _, _, (d,) = attach(9, 7, init_thres=0.4)
    move([d])
    d.delta().sum().backward()
    k = written_out(d)[1].detach()
    kept = k.abs() > d.tau
    assert kept.sum() == round(0.6 * 63)
    torch.testing.assert_close(d.b.grad, (k.abs() * kept).sum().reshape(1), rtol=1e-10, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 60), kept=st.integers(0, 70), seed=st.integers(0, 5))
def test_as_many_entries_are_kept_as_asked(size: int, kept: int, seed: int) -> None:
    k = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tau = threshold(k, kept)
    above = k.abs() > tau
    assert above.sum() == min(kept, size)
    assert (
        not above.any()
        or above.all()
        or k.abs()[above].min() - tau > 0.49 * (k.abs()[above].min() - k.abs()[~above].max())
    )


def test_nothing_is_dropped_where_all_are_wanted_and_ties_fall_together() -> None:
    assert threshold(torch.tensor([3.0, -1.0, 2.0]), 3) == 0
    tied = torch.tensor([1.0, -1.0, 1.0, 2.0])
    assert (tied.abs() > threshold(tied, 2)).sum() == 1


def test_the_kernel_has_full_rank() -> None:
    _, _, (d,) = attach(30, 20, q_dim=4)
    move([d], 1.0)
    k = kernel(d.P, d.Q, d.a, d.g, d.b)[0]
    assert torch.linalg.matrix_rank(k, rtol=1e-6) == 20
    flat = d.Q.movedim(0, 1).flatten(1) @ d.P.movedim(0, 1).flatten(1).mT
    assert torch.linalg.matrix_rank(flat, rtol=1e-6) == 4
    assert torch.linalg.matrix_rank(d.delta(), rtol=1e-6) == 20


def test_equal_vectors_have_no_distance_and_no_infinite_gradient() -> None:
    _, _, (d,) = attach(4, 3)
    with torch.no_grad():
        d.Q[:, 1] = d.P[:, 2]
    d.delta().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in d.parameters())


# --- budget -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(total=st.integers(1, 200), first=st.integers(0, 50), last=st.integers(0, 50), v1=st.integers(0, 999))
def test_the_budget_falls_from_one_end_to_the_other(total: int, first: int, last: int, v1: int) -> None:
    found = [scheduled(t, total, first, last, 1000, v1) for t in range(total + 1)]
    assert found[0] == 1000 and found[-1] == (1000 if first >= total else v1)
    assert all(a >= b for a, b in zip(found, found[1:]))
    if first + last < total and (total - first - last) % 2 == 0:
        middle = first + (total - first - last) // 2
        assert found[middle] == int(v1 + (1000 - v1) / 8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 7.0]), st.integers(1, 1000)), min_size=1, max_size=8
    ),
    share=st.floats(0, 1.2),
)
def test_the_budget_is_spent_to_the_last_entry(layers: list[tuple[float, int]], share: float) -> None:
    scores, sizes = [s for s, _ in layers], [n for _, n in layers]
    budget = int(share * sum(sizes))
    counts = allocated(budget, scores, sizes)
    assert sum(counts) == min(budget, sum(sizes))
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))
    open_ = [i for i in range(len(counts)) if counts[i] < sizes[i] - 1 and scores[i] > 0]
    for i in open_:  # what is not capped is in proportion
        for j in open_:
            assert abs(counts[i] * scores[j] - counts[j] * scores[i]) <= 1.01 * (scores[i] + scores[j])


def test_importance_is_that_of_new_weights_and_old_gradients() -> None:
    model, controller, deltas = attach(6, 5, 4, total_steps=50, beta1=0.7, beta2=0.6)
    optimizer = torch.optim.AdamW([p for d in deltas for p in d.parameters()], lr=0.05)
    mean = [torch.zeros_like(p) for d in deltas for p in (d.P, d.Q)]
    spread = [torch.zeros_like(m) for m in mean]
    for seed in range(4):
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        model(x).square().sum().backward()
        optimizer.step()
        for i, p in enumerate(p for d in deltas for p in (d.P, d.Q)):
            importance = (p * p.grad).abs().detach()
            mean[i] = 0.7 * mean[i] + 0.3 * importance
            spread[i] = 0.6 * spread[i] + 0.4 * (importance - mean[i]).abs()
        optimizer.zero_grad()
    torch.testing.assert_close(controller.mean, mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(controller.spread, spread, rtol=1e-10, atol=0)
    products = [(m * s).mean().item() for m, s in zip(mean, spread, strict=True)]
    assert controller.scores() == pytest.approx([products[0] + products[1], products[2] + products[3]], rel=1e-10)


def test_layers_compete_and_masks_follow_the_weights() -> None:
    options = {"total_steps": 12, "mask_interval": 3, "init_warmup": 2, "final_warmup": 2, "target_ratio": 0.75}
    model, controller, deltas = attach(9, 8, 7, 6, **options)
    optimizer = torch.optim.AdamW([p for d in deltas for p in d.parameters()], lr=0.02)
    sizes = [72, 56, 42]
    before = [int(d.kept) for d in deltas]
    assert before == sizes
    for t in range(1, 13):
        step(model, optimizer, t)
        now = [int(d.kept) for d in deltas]
        if t % 3 and t <= 10:
            assert now == before
        elif t > 2:
            budget = scheduled(t, 12, 2, 2, 170, 42)
            assert now == allocated(budget, controller.scores(), sizes) and sum(now) == budget
        for d in deltas:  # every step, as the weights have moved
            assert (written_out(d)[1].abs() > d.tau).sum() == int(d.kept)
        before = now
    assert sum(before) == 42 and len({n / size for n, size in zip(before, sizes, strict=True)}) == 3


def test_the_plan_follows_the_length_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    model, controller, deltas = attach(4, 3)
    assert controller.plan() == (1000, 10)
    step(model, torch.optim.SGD(deltas[0].parameters(), lr=0.1), 0)
    assert "does not know the length of the run" in caplog.text
    args = TrainingArguments(output_dir="unused", max_steps=300, report_to="none", use_cpu=True)
    weft.optimizer_and_scheduler(model, args)
    assert controller.plan() == (300, 3)
    controller.config.total_steps, controller.config.mask_interval = 50, 7
    assert controller.plan() == (50, 7)


# --- memory, and what follows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_dense_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    model, _, deltas = attach(64, 48, 64, dtype=dtype, init_thres=0.2)
    kept: list[Tensor] = []
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    own = {layer.base_layer.weight.data_ptr() for layer in (model.base_model.model[0], model.base_model.model[2])}
    extra = {t.data_ptr(): t for t in kept if t.data_ptr() not in own}
    assert max(t.numel() for t in extra.values()) <= 8 * 64  # no more than a factor: weights have 64·48
    y.float().sum().backward()
    assert all(p.grad.any() for d in deltas for p in d.parameters())


def test_the_optimiser_and_the_controller_see_thin_factors_only() -> None:
    model, controller, deltas = attach(64, 48, total_steps=4)
    (d,) = deltas
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for t in range(3):
        step(model, optimizer, t)
    held = [v for state in optimizer.state.values() for v in state.values()] + list(controller.state().values())
    assert sum(v.numel() for v in held) <= 4 * d.count() and max(v.numel() for v in held) <= 64 * 8
    assert d.count() == 8 * (64 + 48) + 3


def test_a_step_costs_what_the_page_says() -> None:
    """Three products with the input, and two of q_dim in the kernel's backward pass (its distances are not counted)."""
    model, _, _ = attach(64, 48, bias=False)
    x = torch.ones(100, 64, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.base_model.model[0](x).sum().backward()
    assert counter.get_total_flops() == 2 * (3 * 100 + 2 * 8) * 64 * 48


def test_a_frozen_base_gets_no_gradient_and_a_trained_one_gets_its_own() -> None:
    model, _, (d,) = attach(5, 4)
    layer, x = model.base_model.model[0], torch.ones(3, 5, dtype=torch.float64)
    layer.base_layer.weight.requires_grad_()
    layer.base_layer.bias.requires_grad_()
    layer(x).square().sum().backward()
    w = (layer.base_layer.weight + d.delta()).detach().requires_grad_()
    bias = layer.base_layer.bias.detach().clone().requires_grad_()
    (x @ w.mT + bias).square().sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, w.grad)
    torch.testing.assert_close(layer.base_layer.bias.grad, bias.grad)


def test_it_starts_small_but_not_at_zero() -> None:
    for out in (16, 64):
        _, _, (d,) = attach(48, out)
        assert d.delta().abs().mean().item() == pytest.approx(1 / out**2, rel=0.5)
        assert d.P.abs().max() <= 1 / math.sqrt(48 * 4) and d.Q.abs().max() <= 1 / math.sqrt(out * 4)


def test_dropout_leaves_whole_samples_out() -> None:
    model, _, (d,) = attach(5, 4, dropout=0.5)
    layer, x = model.base_model.model[0], torch.randn(64, 3, 5, dtype=torch.float64)
    base, moved = layer.base_layer(x), x @ d.delta().mT
    found = layer(x) - base
    left_out = (found == 0).all(-1).all(-1)
    assert 16 < left_out.sum() < 48
    torch.testing.assert_close(found[~left_out], 2 * moved[~left_out], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(model.eval().base_model.model[0](x) - base, moved, rtol=1e-6, atol=1e-9)


def test_autocast_computes_the_same_mask() -> None:
    model, _, (d,) = attach(32, 24, dtype=torch.float32, init_thres=0.5, target_ratio=0.5)
    x = torch.randn(6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(Update.apply(*d._arguments()), d.delta())
        assert d.delta().dtype == torch.float32
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.02)
    assert d.delta().count_nonzero() == 32 * 24 // 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"q_dim": 5}, "q_dim=5 must be even"),
        ({"target_ratio": 1.0}, "target_ratio=1.0"),
        ({"init_thres": 0.6}, "init_thres=0.6 is not within 0..0.5"),
        ({"sparsify": "top"}, "sparsify='top': use weighted, hard or soft"),
        ({"mask_interval": 0}, "mask_interval=0 must be at least 1"),
        ({"final_warmup": -1}, "final_warmup=-1 must be at least 0"),
        ({"beta2": 1.0}, "beta2=1.0"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        weft.SnellaConfig(**options)
