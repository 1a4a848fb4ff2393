"""Bayesian-LoRA's quantiser, gates and penalty against the paper's nested form, written out in float64."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama
from torch import Tensor, nn
from transformers import TrainingArguments

import weft
from weft.adapters.bayesian_lora import (
    BayesianLoraConfig,
    BayesianLoraController,
    BayesianLoraDelta,
    Rounded,
    bit_operations,
    is_open,
    open_probability,
    precision,
    sample,
    shares,
)

CLOSED, OPEN = -1.0, 9.0
LEVELS = torch.tensor([3.0, 15.0, 255.0, 65535.0, 2.0**32 - 1], dtype=torch.float64)  # of 2 to 32 bits
widths = st.integers(0, 4)


def nested(x: Tensor, beta: float, z: list[float]) -> Tensor:
    """The paper's quantiser: every finer level rounds what the ungated coarser ones left."""
    x = x.clamp(-(1 - 1e-7) * beta, (1 - 1e-7) * beta)
    step, left, reach, total = 2 * beta / 3, x, 1.0, torch.zeros_like(x)
    for gate, finer in zip([1.0, *z], [5, 17, 257, 65537, 1]):
        part = step * torch.round(left / step)
        reach *= gate
        total, left, step = total + reach * part, left - part, step / finer
    return total


def rounded(x: Tensor, beta: float | Tensor, z: list[float] | Tensor) -> Tensor:
    w = shares(torch.as_tensor(z, dtype=torch.float64))
    rho = torch.zeros((), dtype=torch.float64)
    return Rounded.apply(x, rho, torch.as_tensor(beta, dtype=torch.float64), w, LEVELS[: len(w)])


def attach(base: nn.Module, **options: object) -> tuple[nn.Module, BayesianLoraController, list[BayesianLoraDelta]]:
    """A float64 model in training mode with random E, its controller and its deltas."""
    torch.manual_seed(1)
    options = {"target_modules": [n for n, m in base.named_modules() if isinstance(m, nn.Linear)], **options}
    model = peft.get_peft_model(base, BayesianLoraConfig(**options)).double().train()
    deltas = [d for d in model.modules() if isinstance(d, BayesianLoraDelta)]
    for d in deltas:
        nn.init.normal_(d.E)
    return model, deltas[0].controller, deltas  # type: ignore[return-value]


def two_linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))


def set_gates(d: BayesianLoraDelta, rank: int, levels: tuple[int, int, int]) -> None:
    """Gates far from any doubt: `rank` components, and so many open levels of A, E and B."""
    with torch.no_grad():
        d.phi_r.copy_(torch.where(torch.arange(len(d.phi_r)) < rank - 1, OPEN, -OPEN))
        d.phi.copy_(torch.where(torch.arange(d.phi.shape[1]) < torch.tensor(levels)[:, None], OPEN, -OPEN))


# --- the quantiser ------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(x=st.lists(st.floats(-3, 3), min_size=1), beta=st.floats(1e-3, 2), z=st.lists(st.floats(0, 1), max_size=4))
def test_weighted_plain_roundings_are_the_papers_nested_sum(x, beta, z) -> None:
    values = torch.tensor(x, dtype=torch.float64)
    torch.testing.assert_close(rounded(values, beta, z), nested(values, beta, z), rtol=0, atol=1e-12 * max(beta, 1))


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), beta=st.floats(1e-3, 10), n=widths)
def test_open_levels_round_to_that_many_bits(seed, beta, n) -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    x = x * beta * (1 - 1e-7)
    found = rounded(x, beta, [1.0] * n + [0.0] * (4 - n))
    step = 2 * beta / (2.0 ** (2 << n) - 1)
    torch.testing.assert_close(found, step * torch.round(x / step), rtol=0, atol=1e-12 * max(beta, 1))
    assert (found - x).abs().max() <= step / 2 * (1 + 1e-6)
    # behind a closed gate nothing counts
    assert torch.equal(found, rounded(x, beta, ([1.0] * n + [0.0] + [0.7] * 4)[:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [3.0, 15.0, 255.0, 65535.0])
def test_ends_of_the_range_stay_within_it(dtype, levels) -> None:
    """Half a step beyond the last value lies the clipping bound; rounding must not reach past it."""
    source = torch.Generator().manual_seed(3)
    for beta in torch.rand(200, generator=source, dtype=dtype) + 1e-3:
        one, zero = torch.ones(1, dtype=dtype), torch.zeros((), dtype=dtype)
        ends = Rounded.apply(torch.stack([-2 * beta, -beta, beta, 2 * beta]), zero, beta, one, levels * one)
        steps = ends / (2 * beta / levels)
        torch.testing.assert_close(steps, (levels - 1) / 2 * torch.tensor([-1, -1, 1, 1], dtype=dtype))


def test_gradients_pass_straight_through() -> None:
    """Against autograd of the nested form with rounding replaced by the identity's gradient."""
    source = torch.Generator().manual_seed(0)
    x = (torch.rand(40, generator=source, dtype=torch.float64) * 3 - 1.5).requires_grad_()
    rho = torch.tensor(-0.1, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.9, 0.4, 0.7], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, generator=source, dtype=torch.float64)
    top = torch.tensor(1.3, dtype=torch.float64)
    found = torch.autograd.grad((weight * Rounded.apply(x, rho, top, shares(z), LEVELS[:4])).sum(), [x, rho, z])

    def straight(t: Tensor) -> Tensor:
        return t + (t.round() - t).detach()

    beta = rho.exp() * top
    edge = beta * (1 - 1e-7)
    clipped = torch.where(x.abs() <= edge, x, edge * x.sign())
    step, left, reach, total = 2 * beta / 3, clipped, 1.0, torch.zeros(40, dtype=torch.float64)
    for gate, finer in zip([1.0, *z], [5, 17, 257, 1]):
        part = step * straight(left / step)
        reach = reach * gate
        total, left, step = total + reach * part, left - part, step / finer
    expected = torch.autograd.grad((weight * total).sum(), [x, rho, z])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert (found[0][x.abs() > beta] == 0).all() and (found[0][x.abs() < edge] != 0).all()


def test_a_tensor_of_zeros_stays_one_and_learns() -> None:
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    y = rounded(x, 0.0, [1.0, 1.0])
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(x.grad, torch.ones_like(x))


# --- gates --------------------------------------------------------------------------------------------------------


def test_probabilities_of_known_values() -> None:
    phi = torch.linspace(-9, 9, 500, dtype=torch.float64)
    p = open_probability(phi)
    assert (p.diff() > 0).all()
    torch.testing.assert_close(p, 1 / (1 + torch.exp(-(phi - 2 / 3 * math.log(0.1 / 1.1)))), rtol=1e-12, atol=0)
    assert open_probability(torch.zeros(())).item() == pytest.approx(0.8318, abs=5e-5)
    assert is_open(torch.tensor([-1.0, -0.94, -0.93, -0.5])).tolist() == [False, False, True, True]
    assert torch.equal(is_open(phi), 1 - p < 0.34)


def test_samples_are_open_as_often_as_the_probability_says() -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for phi in (-2.0, 0.0, 1.5):
        z = sample(torch.tensor(phi, dtype=torch.float64), torch.logit(u))
        expected = (1.2 * torch.sigmoid((u.log() - (1 - u).log() + phi) / (2 / 3)) - 0.1).clamp(0, 1)
        torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-12)
        share = (z > 0).double().mean().item()
        assert share == pytest.approx(open_probability(torch.tensor(phi)).item(), abs=5e-3)
        assert 0 < (z == 1).double().mean() < share  # both ends have mass
    phi = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    z = sample(phi, torch.zeros((), dtype=torch.float64))
    z.backward()
    assert z == 1 and phi.grad == 0  # saturated: the task is silent


def test_evaluation_is_binary_and_a_closed_gate_closes_the_rest() -> None:
    model, _, (d,) = attach(nn.Sequential(nn.Linear(9, 8)), r=5)
    with torch.no_grad():
        d.phi_r.copy_(torch.tensor([OPEN, CLOSED, OPEN, OPEN]))
        d.phi[0].copy_(torch.tensor([OPEN, CLOSED, OPEN]))
    model.eval()
    assert d.gate().tolist() == [1, 1, 0, 0, 0] and d.shares()[0].tolist() == [0, 1, 0, 0]
    with torch.no_grad():
        d.phi_r.fill_(-50.0)
    assert d.gate().tolist() == [1, 0, 0, 0, 0]  # the first is always on
    model.train()
    assert d.gate().tolist() == [1, 0, 0, 0, 0]
    with torch.no_grad():
        d.phi_r.fill_(0.3)
    for step in range(30):
        d.draw(step)
        g = d.gate()
        assert g[0] == 1 and (g.diff() <= 0).all() and set(g.tolist()) <= {0.0, 1.0}


def test_a_level_far_below_is_skipped_in_training() -> None:
    _, _, (d,) = attach(nn.Sequential(nn.Linear(9, 8)), r=3)
    with torch.no_grad():
        d.phi.copy_(torch.tensor([[OPEN, -2.0, OPEN], [OPEN, -1.99, OPEN], [OPEN, OPEN, OPEN]]))
        d.noise.fill_(6.0)  # a draw that would open all of them
    assert d.shares().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


# --- the layer ----------------------------------------------------------------------------------------------------


def test_no_update_at_the_start() -> None:
    model = peft.get_peft_model(llama(), BayesianLoraConfig(r=4)).eval()
    deltas = [d for d in model.modules() if isinstance(d, BayesianLoraDelta)]
    assert all(d.delta().abs().max() == 0 and (d.E == 0).all() for d in deltas)
    for name in "AB":
        assert torch.cat([getattr(d, name).flatten() for d in deltas]).std().item() == pytest.approx(0.02, rel=0.05)
    assert all(p.rank == 4 and (p.bits_a, p.bits_e, p.bits_b) == (16, 16, 16) for p in precision(model).values())


@settings(deadline=None, derandomize=True, max_examples=25)
@given(out=st.integers(1, 9), in_=st.integers(1, 9), data=st.data())
def test_evaluation_and_its_pruned_file_are_the_formula(out: int, in_: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(out, in_)))
    rank = data.draw(st.integers(1, r))
    levels = data.draw(st.tuples(*[st.integers(0, 3)] * 3))
    model, _, (d,) = attach(nn.Sequential(nn.Linear(in_, out)), r=r, lora_alpha=5.0)
    set_gates(d, rank, levels)
    with torch.no_grad():
        d.rho.copy_(torch.tensor([-0.3, 0.2, 0.0]))
    factors = [t.detach()[:rank] for t in (d.A, d.E, d.B.T)]
    found = []
    for t, rho, n in zip(factors, d.rho.exp().tolist(), levels):
        found.append(nested(t, rho * t.abs().max().item(), [1.0] * n + [0.0] * (3 - n)))
    a, e, b = found
    expected = 5.0 / r * (b.T * e) @ a
    model.eval()
    torch.testing.assert_close(d.delta().detach(), expected, rtol=1e-9, atol=1e-12)
    x = torch.randn(4, in_, dtype=torch.float64)
    torch.testing.assert_close(model(x), model.base_model.model[0].base_layer(x) + x @ expected.T)
    compact, kept = d.compact(dict(d.state_dict()))
    assert kept == rank and compact["A"].shape == (rank, in_) and compact["phi_r"].shape == (rank - 1,)
    _, _, (other,) = attach(nn.Sequential(nn.Linear(in_, out)), r=r, lora_alpha=5.0)
    other.load_state_dict(other.expand(compact))
    assert torch.equal(other.eval().delta(), d.delta())
    used = precision(model)["0"]
    assert used[:4] == (rank, *(2 << n for n in levels))
    assert bit_operations(model, activation_bits=8) == 8 * rank * (in_ * used[1] + used[2] + out * used[3])


def test_training_is_the_formula_for_the_draw_in_force() -> None:
    model, _, (d,) = attach(nn.Sequential(nn.Linear(7, 6)), r=4, phi_init=0.5, lora_alpha=3.0, seed=4)
    x = torch.randn(5, 7, dtype=torch.float64)
    for step in range(4):
        d.draw(step)
        z = (1.2 * torch.sigmoid((d.noise + 0.5) * 1.5) - 0.1).clamp(0, 1).tolist()
        g = torch.tensor([1.0, z[9], z[9] * z[10], z[9] * z[10] * z[11]], dtype=torch.float64).round()
        a, e, b = (
            nested(t.detach(), t.abs().max().item(), z[3 * i : 3 * i + 3]) for i, t in enumerate((d.A, d.E, d.B))
        )
        expected = model.base_model.model[0].base_layer(x) + 3.0 / 4 * ((x @ a.T) * g * e) @ b.T
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-12)


def test_gates_hear_the_penalty_and_the_task() -> None:
    found = {}
    for weight in (0.0, 1.0):
        for coefficient in (0.0, 0.1):
            model, _, (d,) = attach(
                nn.Sequential(nn.Linear(7, 6)), r=4, phi_init=0.5, lambda_q=coefficient, lambda_r=2 * coefficient
            )
            with torch.no_grad():
                d.noise.fill_(0.1)
            for part in range(3):  # micro-batches of one step
                source = torch.Generator().manual_seed(part)
                (weight * model(torch.randn(4, 7, generator=source, dtype=torch.float64)).pow(2).sum()).backward()
            found[weight, coefficient] = torch.cat([d.phi.grad.flatten(), d.phi_r.grad])
    assert found[1.0, 0.0].abs().min() > 0 and found[0.0, 0.1].abs().min() > 0
    torch.testing.assert_close(found[1.0, 0.1] - found[1.0, 0.0], found[0.0, 0.1], rtol=1e-9, atol=1e-12)


def test_the_penalty_is_the_expected_number_of_open_levels() -> None:
    model, controller, deltas = attach(two_linears(), r=4, lambda_q=0.3, lambda_r=0.7)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for d in deltas:
            for p in (d.phi, d.phi_r):
                p.copy_(torch.randn(p.shape, generator=source))
    expected = 0.0
    for d in deltas:
        q = 1 / (1 + torch.exp(-(d.phi.detach() + 2 / 3 * math.log(11))))
        ranks = (1 / (1 + torch.exp(-(d.phi_r.detach() + 2 / 3 * math.log(11))))).mean()
        for i, factor in enumerate((1, ranks, 1)):
            expected += 0.3 * factor * (q[i, 0] + q[i, 0] * q[i, 1] + q[i, 0] * q[i, 1] * q[i, 2])
        expected += 0.7 * ranks
    torch.testing.assert_close(controller.penalty().detach(), torch.as_tensor(expected), rtol=1e-12, atol=0)


def test_quantising_alone_has_no_gates_of_rank() -> None:
    model, controller, deltas = attach(two_linears(), r=4, rank_gates=False, lambda_q=1.0)
    q = 1 / (1 + math.exp(-(6 + 2 / 3 * math.log(11))))
    assert controller.penalty().item() == pytest.approx(2 * 3 * (q + q**2 + q**3))
    for d in deltas:
        assert len(d.phi_r) == 0 and d.gate().tolist() == [1] * 4 and d.compact(d.state_dict())[1] is None


def test_modules_of_different_rank_share_a_penalty(tmp_path) -> None:
    model = peft.get_peft_model(llama(), BayesianLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    deltas = [d for d in model.modules() if isinstance(d, BayesianLoraDelta)]
    for i, d in enumerate(deltas):
        nn.init.normal_(d.E)
        set_gates(d, i + 1, (1, 2, 3))
    x = torch.arange(12).reshape(2, 6)
    expected = model.eval()(input_ids=x).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(loaded.eval()(input_ids=x).logits, expected)
    assert [p.rank for p in precision(loaded).values()] == [1, 2, 3, 4]
    controller = next(d for d in loaded.modules() if isinstance(d, BayesianLoraDelta)).controller
    ranks = controller._rank_probabilities()
    p = open_probability(torch.tensor(OPEN))
    torch.testing.assert_close(ranks.detach(), torch.stack([torch.tensor(1.0), p, p, p]))


def test_gates_and_ranges_have_groups_of_their_own(tmp_path) -> None:
    model, _, deltas = attach(two_linears(), r=4, gates_lr=0.3, scales_lr=0.2)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=5, weight_decay=0.5)
    optimizer, _ = weft.optimizer_and_scheduler(model, args)
    rates = {id(p): (g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for d in deltas:
        assert rates[id(d.phi)] == rates[id(d.phi_r)] == (0.3, 0.0) and rates[id(d.rho)] == (0.2, 0.0)
        assert rates[id(d.A)] == rates[id(d.E)] == (args.learning_rate, 0.5)
    with pytest.raises(weft.UsageError, match="bayesian_lora needs 'phi' in a group with"):
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()


def test_count_is_the_formula() -> None:
    model = peft.get_peft_model(llama(), BayesianLoraConfig(r=3, n_bits=8, target_modules=["k_proj", "down_proj"]))
    each = [3 * (32 + 16 + 1) + 3 * 2 + 2 + 3, 3 * (37 + 32 + 1) + 3 * 2 + 2 + 3]
    assert model.get_nb_trainable_parameters()[0] == 2 * sum(each)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_bits": 32}, "n_bits=32: use 2, 4, 8 or 16"),
        ({"lambda_q": -1.0}, "lambda_q=-1.0 must not be below 0"),
        ({"gates_lr": float("nan")}, "gates_lr=nan"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        BayesianLoraConfig(**options)


def test_precision_wants_an_adapter_of_this_method() -> None:
    with pytest.raises(weft.UsageError, match="no Bayesian-LoRA adapter called 'default'"):
        precision(two_linears())


def fit_a_teacher(coefficient: float, steps: int = 400) -> tuple[float, nn.Module]:
    """Match a transformer whose six of these weights moved by rank 2; the share of the change that is left, and the
    model."""
    base, teacher = llama(), llama()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, m in teacher.named_modules():
            if name.endswith(("q_proj", "v_proj", "up_proj")):
                u, v = (torch.linalg.qr(torch.randn(side, 2)).Q for side in m.weight.shape)
                m.weight += u @ v.T
    config = BayesianLoraConfig(
        lambda_q=coefficient, lambda_r=coefficient, gates_lr=0.04, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    test = torch.randint(0, 61, (64, 12))
    with torch.no_grad():
        start = (base.model(input_ids=test)[0] - teacher.model(input_ids=test)[0]).pow(2).mean()
    model = peft.get_peft_model(base, config).train()
    args = TrainingArguments("unused", max_steps=steps, report_to="none", use_cpu=True, learning_rate=5e-3)
    optimizer, scheduler = weft.optimizer_and_scheduler(model, args)

    def error(ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher.model(input_ids=ids)[0]
        return (model.base_model.model.model(input_ids=ids)[0] - wanted).pow(2).mean() / start

    for i in range(steps):
        error(torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(i))).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float(error(test)), model


@pytest.mark.slow
def test_it_learns_with_a_quarter_of_the_bit_operations() -> None:
    free, whole = fit_a_teacher(0.0)
    assert all(p[:4] == (8, 16, 16, 16) for p in precision(whole).values())  # nothing closes without the penalty
    left, learned = fit_a_teacher(1e-3)
    assert bit_operations(learned) < 0.3 * bit_operations(whole)
    assert sum(p.rank for p in precision(learned).values()) < 48
    assert free < left < 0.01
