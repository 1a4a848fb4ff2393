"""IncreLoRA against scores, masks and steps written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SixLayers, fit_two_of_six, llama
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import TrainingArguments

import weft
from weft.adapters.increlora import RESERVE, IncreloraConfig, IncreloraController, IncreloraDelta, start_anew

SOON = {"init_warmup": 1, "incre_interval": 2, "warmup_steps": 2}


def chain(*sides: int) -> nn.Sequential:
    """Linear layers with tanh between them, from sides[0] to sides[-1] features."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(sides, sides[1:]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def attach(base: nn.Module, **options: object) -> tuple[nn.Module, IncreloraController]:
    """A float64 model in training mode, and its controller."""
    options = {"target_modules": [n for n, m in base.named_modules() if hasattr(m, "weight")], **options}
    model = peft.get_peft_model(base, IncreloraConfig(**options)).double().train()
    (controller,) = {m.controllers["default"] for m in model.modules() if hasattr(m, "controllers")}
    return model, controller


def ranks(controller: IncreloraController) -> list[int]:
    return [d.active for d in controller.deltas]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, parts: int = 1) -> None:
    """Regression on fixed random data, in `parts` equal micro-batches a step."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    for step in range(first, first + steps):
        source = torch.Generator().manual_seed(step)
        x = torch.randn(8, weights[0].shape[1], generator=source, dtype=torch.float64)
        y = torch.randn(8, weights[-1].shape[0], generator=source, dtype=torch.float64)
        for a, b in zip(x.chunk(parts), y.chunk(parts)):
            ((model(a) - b).pow(2).mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


def update(d: IncreloraDelta, reserves: bool) -> Tensor:
    """ΔW as the paper writes it: a sum of pieces over the active rank, and those in reserve."""
    n = d.active
    pieces = [d.E[j] * torch.outer(d.B[:, j], d.A[j]) for j in range(n)]
    pieces += [RESERVE * torch.outer(d.B[:, j], d.A[j]) for j in range(n, d.open)] if reserves else []
    return 16 / (n + 1e-5) * sum(pieces)


def test_no_update_at_the_start_but_for_the_reserves() -> None:
    model, controller = attach(chain(7, 9, 5), target_rank=4)
    assert ranks(controller) == [1, 1] and [d.open for d in controller.deltas] == [3, 3]
    for d in controller.deltas:
        assert 0 < d.delta().abs().max() <= 1e-4
        assert d.eval().delta().abs().max() == 0
    _, controller = attach(chain(7, 9, 5), target_rank=4, advance_learning=False)
    assert all(d.delta().abs().max() == 0 and d.open == d.active for d in controller.deltas)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(n=st.integers(1, 4), k=st.integers(1, 3), out=st.integers(6, 9), in_=st.integers(6, 9))
def test_the_forward_is_the_sum_of_pieces(n: int, k: int, out: int, in_: int) -> None:
    model, controller = attach(chain(in_, out), target_rank=6, r=n, k=k)
    (d,) = controller.deltas
    with torch.no_grad():
        d.E.normal_()
    base = model.base_model.model[0].base_layer
    x = torch.randn(3, in_, dtype=torch.float64)
    for reserves in (True, False):
        model.train(reserves)
        expected = base(x) + x @ update(d, reserves).T
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(d.delta(), update(d, reserves), rtol=1e-10, atol=1e-12)


def scored(layer: nn.Module, feed: Callable[[int], Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """S of one layer after two micro-batches, found by the controller and by dense autograd."""
    model, controller = attach(nn.Sequential(layer), target_rank=4, r=2, **options)
    (d,) = controller.deltas
    with torch.no_grad():
        d.E.normal_()
    losses = []
    moved = update(d, reserves=True).detach().requires_grad_()
    base = model.base_model.model[0].base_layer
    kind = model.base_model.model[0].kind
    for part in range(2):
        x = feed(part)
        model(x).pow(3).sum().backward()
        weight = base.weight + kind.native(moved)
        losses.append(torch.func.functional_call(base, {"weight": weight}, x).pow(3).sum())
    sum(losses).backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    expected = (moved * moved.grad).abs().sum() / moved.numel() ** 0.5
    return controller.sens / (1 - d.config.beta1), expected.detach()[None]


def test_the_score_is_the_dense_one_summed_over_micro_batches() -> None:
    def normal(*shape: int) -> Callable[[int], Tensor]:
        return lambda part: torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(part))

    cases = {
        "Linear": (nn.Linear(7, 6), normal(3, 7)),
        "Conv2d": (nn.Conv2d(4, 6, 3, padding=1), normal(2, 4, 5, 5)),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2), normal(2, 4, 5, 5)),
        "Embedding": (nn.Embedding(9, 6), lambda part: torch.tensor([[part, 3, 3], [8, 0, 5]])),
    }
    for name, (layer, feed) in cases.items():
        found, expected = scored(layer, feed)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0, msg=name)


def test_importance_is_smoothed_score_times_uncertainty() -> None:
    model, controller = attach(chain(7, 9, 6), target_rank=4, r=2, init_warmup=100, beta1=0.7, beta2=0.6)
    optimizer = adamw(model)
    base = [m.base_layer for m in model.modules() if hasattr(m, "deltas")]
    sens, unc = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        source = torch.Generator().manual_seed(step)
        x = torch.randn(8, 7, generator=source, dtype=torch.float64)
        y = torch.randn(8, 6, generator=source, dtype=torch.float64)
        moved = [update(d, reserves=True).detach().requires_grad_() for d in controller.deltas]
        hidden = torch.tanh(x @ (base[0].weight + moved[0]).T + base[0].bias)
        (hidden @ (base[1].weight + moved[1]).T + base[1].bias - y).pow(2).mean().backward()
        s = torch.stack([(m * m.grad).abs().sum() / m.numel() ** 0.5 for m in moved]).detach()
        sens = 0.7 * sens + 0.3 * s
        unc = 0.6 * unc + 0.4 * (s - sens).abs()
        train(model, optimizer, 1, first=step)
        torch.testing.assert_close((controller.sens, controller.unc), (sens, unc), rtol=1e-9, atol=0)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    sides=st.lists(st.integers(6, 12), min_size=2, max_size=5),
    target=st.integers(1, 6),
    k=st.integers(1, 4),
    top_h=st.integers(1, 3),
    cap=st.one_of(st.none(), st.integers(6, 9)),
)
def test_the_budget_is_met_and_never_exceeded(
    sides: list[int], target: int, k: int, top_h: int, cap: int | None
) -> None:
    model, controller = attach(
        chain(*sides), target_rank=target, k=k, top_h=top_h, r_cap=cap, **SOON | {"incre_interval": 1}
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    modules = len(sides) - 1
    events = controller._events()
    parameters = [(id(p), p.shape) for p in model.parameters()]
    for step in range(modules * target + 3):
        before = ranks(controller)
        train(model, optimizer, 1, first=step)
        grown = [b - a for a, b in zip(before, ranks(controller))]
        assert sum(g > 0 for g in grown) <= top_h and all(0 <= g <= k for g in grown)
        assert sum(ranks(controller)) <= target * modules
        assert all(d.active <= (cap or 3 * target) and d.active <= min(d.out, d.in_) for d in controller.deltas)
    assert sum(ranks(controller)) == target * modules and events <= modules * target
    assert [(id(p), p.shape) for p in model.parameters()] == parameters


def test_ties_go_to_the_first_modules_and_no_further() -> None:
    model, controller = attach(chain(6, 6, 6, 6, 6), target_rank=3, k=2, top_h=2, **SOON | {"incre_interval": 3})
    for d in controller.deltas:
        nn.init.zeros_(d.B)  # ΔW is zero, and so is every score
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    train(model, optimizer, 4)
    assert not controller.sens.any() and ranks(controller) == [3, 3, 1, 1]
    train(model, optimizer, 3, first=4)
    assert ranks(controller) == [5, 5, 1, 1]  # 12 in all


def test_growth_takes_the_most_important_modules() -> None:
    model, controller = attach(chain(7, 9, 8, 6), target_rank=4, r=2, k=2, top_h=1, **SOON | {"init_warmup": 5})
    optimizer = adamw(model)
    train(model, optimizer, 6)
    assert ranks(controller) == [2, 2, 2]
    controller.sens, controller.unc = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    controller.config.beta1 = controller.config.beta2 = 1 - 1e-9
    before = [{name: p.detach().clone() for name, p in d.named_parameters()} for d in controller.deltas]
    train(model, optimizer, 1, first=6)
    assert ranks(controller) == [2, 4, 2]
    _, d, _ = controller.deltas
    assert torch.equal(d.E[2:4], torch.full((2,), RESERVE, dtype=torch.float64))  # active from the next step on
    train(model, optimizer, 1, first=7)
    moved = [d.E.detach() != old["E"] for d, old in zip(controller.deltas, before)]
    assert [m.sum().item() for m in moved] == [2, 4, 2]


def test_reserves_learn_a_direction_but_not_their_size() -> None:
    model, controller = attach(chain(7, 6), target_rank=4, r=1, k=2, **SOON | {"init_warmup": 100})
    (d,) = controller.deltas
    start = {name: p.detach().clone() for name, p in d.named_parameters()}
    optimizer = adamw(model)
    train(model, optimizer, 1)
    for _ in range(2):
        model(torch.randn(4, 7, dtype=torch.float64)).pow(2).sum().backward()
        assert d.E.grad[0] != 0 and not d.E.grad[1:].any()
        optimizer.step()
        optimizer.zero_grad()
    assert (d.A[:3] != start["A"][:3]).any(1).all() and (d.B[:, :3] != start["B"][:, :3]).any(0).all()
    assert torch.equal(d.E[1:], start["E"][1:])


def test_closed_components_see_no_decay_momentum_or_step() -> None:
    model, controller = attach(chain(7, 8, 6), target_rank=4, k=1, **SOON)
    start = [{name: p.detach().clone() for name, p in d.named_parameters()} for d in controller.deltas]
    optimizer = adamw(model)
    for step in range(8):
        opened = [d.open for d in controller.deltas]
        train(model, optimizer, 1, first=step)
        for d, old, n in zip(controller.deltas, start, opened):
            assert torch.equal(d.A[n:], old["A"][n:]) and torch.equal(d.B[:, n:], old["B"][:, n:])
            for key in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[d.A][key][n:].any() and not optimizer.state[d.B][key][:, n:].any()
            assert (optimizer.state[d.A]["exp_avg_sq"][:n] != 0).any(1).all()
    assert sum(ranks(controller)) > 2


def test_at_the_target_nothing_is_left_in_reserve() -> None:
    model, controller = attach(chain(7, 9, 6), target_rank=3, r=1, k=1, **SOON)
    optimizer = adamw(model)
    train(model, optimizer, 14)
    assert sum(ranks(controller)) == 6 and not controller.growing
    x = torch.randn(4, 7, dtype=torch.float64)
    for d in controller.deltas:
        assert d.open == d.active and not d.E[d.active :].any() and d.probe is None
    y = model(x)
    with torch.no_grad():
        for d in controller.deltas:
            d.A[d.active :] = d.B[:, d.active :] = float("nan")  # deleted
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=0)
        torch.testing.assert_close(model.eval()(x), y, rtol=1e-12, atol=0)


@pytest.mark.parametrize("preserve", [True, False])
def test_growth_shrinks_the_update_unless_it_is_preserved(preserve: bool) -> None:
    options = {"target_rank": 6, "r": 2, "k": 2, "preserve": preserve, **SOON | {"init_warmup": 4}}
    model, controller = attach(chain(7, 6), **options)
    (d,) = controller.deltas
    train(model, adamw(model), 5)
    with torch.no_grad():
        d.E[:2].normal_()
    old = update(d, reserves=False).detach()
    train(model, torch.optim.SGD(d.parameters(), lr=0.0), 2, first=5)
    assert d.active == 4
    with torch.no_grad():
        d.E[2:4] = 0
    factor = 1.0 if preserve else (2 + 1e-5) / (4 + 1e-5)
    torch.testing.assert_close(update(d, reserves=False), factor * old, rtol=1e-9, atol=1e-12)


def test_micro_batches_are_one_batch() -> None:
    found = []
    for parts in (1, 4):
        model, controller = attach(chain(7, 9, 6), target_rank=4, k=2, **SOON)
        train(model, adamw(model), 12, parts=parts)
        found.append(([p.detach() for p in model.parameters() if p.requires_grad], ranks(controller)))
    assert found[0][1] == found[1][1] and sum(found[0][1]) == 8
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(birth=st.integers(1, 30), warmup=st.integers(1, 6))
def test_a_component_opened_late_steps_like_a_new_optimiser_with_its_own_warmup(birth: int, warmup: int) -> None:
    torch.manual_seed(birth)
    gradients = torch.randn(8, 3, dtype=torch.float64)
    old, new = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    running, fresh = (torch.optim.Adam([p], lr=0.1, eps=1e-30) for p in (old, new))
    old.grad = torch.zeros(3, dtype=torch.float64)
    for _ in range(birth):  # moments stay zero, the step counter runs
        running.step()
    born = torch.tensor([birth])
    assert start_anew(born, birth - 1, warmup, (0.9, 0.999)).item() == 0
    for age, g in enumerate(gradients, start=1):
        before = old.detach().clone(), new.detach().clone()
        old.grad, new.grad = g.clone(), g.clone()
        running.step()
        fresh.step()
        factor = start_anew(born, birth + age - 1, warmup, (0.9, 0.999)).item()
        ramp = min(1, age / warmup)
        torch.testing.assert_close(factor * (old - before[0]), ramp * (new - before[1]), rtol=1e-9, atol=0)
    always = start_anew(torch.tensor([0, -1]), birth, warmup, (0.9, 0.999))
    assert always.tolist() == [1.0, 0.0]


def test_the_penalty_enters_once_a_step_with_its_coefficient() -> None:
    found = {}
    for coefficient in (0.0, 0.3):
        model, controller = attach(chain(7, 9, 6), target_rank=4, r=2, k=1, reg_orth_coef=coefficient)
        for part in (0, 1):
            source = torch.Generator().manual_seed(part)
            model(torch.randn(4, 7, generator=source, dtype=torch.float64)).pow(2).sum().backward()
        found[coefficient] = [p.grad for d in controller.deltas for p in (d.A, d.B)]
    factors = [f for d in controller.deltas for f in (d.A[:3], d.B[:, :3].T)]  # two active and one in reserve
    value = 0.3 * sum(torch.linalg.norm(f @ f.T - torch.eye(3)) for f in factors) / 4
    expected = torch.autograd.grad(value, [p for d in controller.deltas for p in (d.A, d.B)])
    torch.testing.assert_close([b - a for a, b in zip(*found.values())], list(expected), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(controller.last_penalty, value.detach(), rtol=1e-10, atol=0)


def test_merged_is_unmerged_while_growing_and_after() -> None:
    model, controller = attach(chain(7, 9, 6), target_rank=3, k=1, **SOON)
    optimizer = adamw(model)
    x = torch.randn(4, 7, dtype=torch.float64)
    for first in (0, 7):
        train(model, optimizer, 7, first=first)
        plain = model.eval()(x)
        model.train()
        model.merge_adapter()  # whatever the mode, what is merged is what evaluation computes
        torch.testing.assert_close(model.eval()(x), plain, rtol=1e-10, atol=1e-12)
        model.unmerge_adapter()
        model.train()
    assert not controller.growing


def test_the_file_is_compact_and_exact(tmp_path) -> None:
    config = IncreloraConfig(target_rank=3, k=2, target_modules=["q_proj", "v_proj", "down_proj"], **SOON)
    model = peft.get_peft_model(llama(), config).train()
    x = torch.arange(24).reshape(2, 12)
    optimizer = adamw(model)
    for _ in range(6):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    deltas = [d for d in model.modules() if isinstance(d, IncreloraDelta)]
    assert 6 < sum(d.active for d in deltas) < 18  # in the middle of growing
    expected = model.eval()(input_ids=x).logits
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
        held = [d for d in loaded.modules() if isinstance(d, IncreloraDelta)]
        assert [d.capacity for d in held] == [d.active for d in deltas]
        assert torch.equal(loaded.eval()(input_ids=x).logits, expected)
        assert all(d.probe is None for d in held)  # what is loaded keeps its ranks
    back = peft.get_peft_model(llama(), config).eval()  # into a model with room
    peft.set_peft_model_state_dict(back, peft.get_peft_model_state_dict(model))
    assert torch.equal(back(input_ids=x).logits, expected)
    assert [d.active for d in back.modules() if isinstance(d, IncreloraDelta)] == [d.active for d in deltas]


@pytest.mark.parametrize("cut", [3, 8, 11])
def test_resumed_is_uninterrupted_bit_for_bit(cut: int, tmp_path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=14, report_to="none", use_cpu=True, learning_rate=0.01)

    def fresh() -> tuple[nn.Module, IncreloraController, torch.optim.Optimizer]:
        model, controller = attach(chain(7, 9, 6), target_rank=4, k=1, top_h=1)
        optimizer, _ = weft.optimizer_and_scheduler(model, args)
        return model, controller, optimizer

    model, controller, optimizer = fresh()
    train(model, optimizer, cut)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    middle = ranks(controller)
    train(model, optimizer, 14 - cut, first=cut)
    again, other, restarted = fresh()
    again.load_state_dict(weights)
    restarted.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert ranks(other) == middle and other.step == cut
    train(again, restarted, 14 - cut, first=cut)
    assert ranks(other) == ranks(controller) and sum(middle) <= sum(ranks(controller)) == 8
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_two_graphs_for_all_ranks() -> None:
    found = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model, controller = attach(chain(7, 6), target_rank=4, k=1, **SOON)
        layer = model.base_model.model[0]
        if compiled:
            model.base_model.model[0] = torch.compile(layer, backend=counter)
        train(model, adamw(model), 12)
        found.append([p.detach() for p in layer.parameters()])
        assert not controller.growing and ranks(controller) == [4]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert counter.frame_count == 2  # scoring, and thin


def test_the_plan_follows_the_length_of_the_run() -> None:
    _, controller = attach(chain(9, 9, 9, 9), target_rank=4, k=2, top_h=1)
    assert controller._events() == 5  # 9 components, two at a time
    assert controller.plan() == (100, 100, 100)
    controller.total_steps = 200
    assert controller.plan() == (20, 16, 20)  # 20 + 5 · 16 = 100
    controller.config.init_warmup, controller.config.incre_interval = 30, 7
    assert controller.plan() == (30, 7, 30)


def test_a_run_too_short_to_grow_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    model, controller = attach(chain(9, 9, 9), target_rank=4, k=1, top_h=1, init_warmup=3, incre_interval=2)
    controller.total_steps = 8
    train(model, adamw(model), 1)
    assert "grows 2 times in 8 steps and would need 6 to reach target_rank=4" in caplog.text


def test_count_is_the_formula() -> None:
    model = peft.get_peft_model(llama(), IncreloraConfig(target_rank=2, target_modules=["k_proj", "down_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 6 * ((32 + 16 + 1) + (37 + 32 + 1))
    deltas = [d for d in model.modules() if isinstance(d, IncreloraDelta)]
    assert sum(d.count() for d in deltas) == 2 * 6 * ((32 + 16 + 1) + (37 + 32 + 1))
    assert sum(d.spare() for d in deltas) == 2 * 4 * ((32 + 16 + 1) + (37 + 32 + 1))  # a budget counts the target alone


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 9}, "r=9 is larger than target_rank=8"),
        ({"r_cap": 7}, "r_cap=7 is below target_rank=8"),
        ({"top_h": 0}, "top_h=0 must be at least 1"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"init_warmup": -1}, "init_warmup=-1"),
        ({"beta1": 1.0}, "beta1=1.0"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        IncreloraConfig(**options)


def test_what_the_sides_cannot_hold_is_refused() -> None:
    with pytest.raises(weft.UsageError, match="r=5 is larger than 0 allows"):
        attach(chain(9, 4), r=5, target_rank=8)
    with pytest.raises(weft.UsageError, match="asks for 16 components over 2 modules, whose sides .* room for 8"):
        attach(chain(9, 4, 9), target_rank=8)


@pytest.mark.slow
def test_layers_that_need_rank_get_it_and_uniform_lora_is_beaten() -> None:
    # the objective's penalty is made for losses around 1, and these end a thousand times lower
    config = IncreloraConfig(target_rank=2, reg_orth_coef=0.0, target_modules=SixLayers.names)
    ours, model = fit_two_of_six(config, seed=0, steps=400)
    lora = peft.LoraConfig(r=2, lora_alpha=16, target_modules=SixLayers.names)
    uniform, _ = fit_two_of_six(lora, seed=0, steps=400)
    assert [d.active for d in model.modules() if isinstance(d, IncreloraDelta)] == [1, 4, 1, 1, 4, 1]
    assert ours < 0.1 * uniform
