"""GaLore against its own equations in float64, and what its engine promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weft.optim
from weft.algebra.random import generator
from weft.errors import UsageError
from weft.optim._projected import update_in_backward
from weft.optim._rules import _map, _nearest_codes
from weft.optim.galore import Galore

B1, B2, EPS, LR, GAP = 0.9, 0.999, 1e-6, 0.01, 4
SHAPES = [(12, 7), (7, 12), (9, 9)]


def matrix(out: int, in_: int, seed: int) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(g: Tensor, r: int, kind: str) -> tuple[Tensor | None, Tensor | None]:
    """Q (out × r) and P (r × in) by a whole SVD; the largest-magnitude entry of each row of P is positive."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    pivot = vh.gather(1, vh.abs().argmax(1, keepdim=True)).squeeze(1)
    u, vh = u * pivot.sign(), vh * pivot.sign()[:, None]
    std = kind == "right" or (kind in ("std", "reverse_std") and (g.shape[0] >= g.shape[1]) == (kind == "std"))
    if kind == "full":
        return u[:, :r], vh[:r]
    return (None, vh[:r]) if std else (u[:, :r], None)


def reference(w: Tensor, gradients: list[Tensor], r: int, kind: str, scale: float, decay: float) -> Tensor:
    """The paper's loop, written out; decay comes after the update."""
    w = w.clone()
    for k, g in enumerate(gradients):
        if k % GAP == 0:
            q, p = bases(g, r, kind)
        small = g if q is None else q.mT @ g
        small = small if p is None else small @ p.mT
        if k == 0:
            m, v = torch.zeros_like(small), torch.zeros_like(small)
        m = B1 * m + (1 - B1) * small
        v = B2 * v + (1 - B2) * small**2
        n = m / (v.sqrt() + EPS)
        n = n if q is None else q @ n
        n = n if p is None else n @ p
        w = w - LR * math.sqrt(1 - B2 ** (k + 1)) / (1 - B1 ** (k + 1)) * scale * n
        w = w - LR * decay * w
    return w


def run(w: Tensor, gradients: list[Tensor], **options) -> tuple[Tensor, Galore]:
    p = nn.Parameter(w.clone())
    optimizer = Galore([p], lr=LR, eps=EPS, update_proj_gap=GAP, **options)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("kind", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_refreshes_are_the_written_out_loop(shape, kind):
    w, gradients = matrix(*shape, 0), [matrix(*shape, 1 + k) for k in range(2 * GAP + 1)]
    found, _ = run(w, gradients, rank=3, proj_type=kind, scale=0.7, weight_decay=0.1, svd="exact")
    torch.testing.assert_close(found, reference(w, gradients, 3, kind, 0.7, 0.1), rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(out=st.integers(2, 20), in_=st.integers(2, 20), data=st.data())
def test_moments_are_r_by_the_longer_side_and_the_basis_is_orthonormal(out, in_, data):
    r = data.draw(st.integers(1, min(out, in_)))
    _, optimizer = run(matrix(out, in_, 0), [matrix(out, in_, 1)], rank=r)
    (state,) = optimizer.state.values()
    assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == r * max(out, in_)
    basis = state["right"].mT if "right" in state else state["left"]
    assert basis.shape == (min(out, in_), r)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("svd", ["warm", "exact"])
def test_at_full_rank_plain_descent_is_the_whole_gradient(svd):
    w, g = matrix(8, 5, 0), matrix(8, 5, 1)
    found, _ = run(w, [g], rank=5, inner="sgd", scale=1.0, svd=svd)
    torch.testing.assert_close(found, w - LR * g, rtol=1e-10, atol=1e-12)


def test_at_full_rank_adam_is_adam_on_the_rotated_weight():
    w, gradients = matrix(8, 5, 0), [matrix(8, 5, 1 + k) for k in range(GAP)]
    found, optimizer = run(w, gradients, rank=5, scale=1.0)
    (state,) = optimizer.state.values()
    p = state["right"]
    rotated = w @ p.mT
    m = v = torch.zeros_like(rotated)
    for k, g in enumerate(gradients):
        m, v = B1 * m + (1 - B1) * g @ p.mT, B2 * v + (1 - B2) * (g @ p.mT) ** 2
        rotated = rotated - LR * math.sqrt(1 - B2 ** (k + 1)) / (1 - B1 ** (k + 1)) * m / (v.sqrt() + EPS)
    torch.testing.assert_close(found, rotated @ p, rtol=1e-9, atol=1e-9)


def test_what_moves_between_two_refreshes_lies_in_the_basis_whatever_its_signs():
    w, gradients = matrix(12, 7, 0), [matrix(12, 7, 1 + k) for k in range(GAP)]
    p = nn.Parameter(w.clone())
    optimizer = Galore([p], lr=LR, rank=3, update_proj_gap=GAP)
    flipped = nn.Parameter(w.clone())
    other = Galore([flipped], lr=LR, rank=3, update_proj_gap=GAP)
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    for k, g in enumerate(gradients):
        p.grad, flipped.grad = g.clone(), g.clone()
        optimizer.step()
        other.step()
        if k == 0:  # what was in the moments turns with the basis
            other.state[flipped]["right"].mul_(sign)
            other.state[flipped]["exp_avg"].mul_(sign.mT)
    change = p.detach() - w
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == 3
    basis = optimizer.state[p]["right"]
    torch.testing.assert_close(change @ basis.mT @ basis, change, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flipped, p, rtol=1e-9, atol=1e-12)


def test_adafactor_is_hugging_faces_on_the_small_gradient():
    transformers_adafactor = pytest.importorskip("transformers.optimization").Adafactor
    gradients = [matrix(9, 6, 1 + k).float() for k in range(3)]
    p = nn.Parameter(torch.zeros(9, 6))
    optimizer = Galore([p], lr=LR, rank=2, scale=0.5, inner="adafactor")
    small = nn.Parameter(torch.zeros(9, 2))
    theirs = transformers_adafactor([small], lr=LR, relative_step=False, scale_parameter=False, warmup_init=False)
    for g in gradients:
        p.grad = g
        optimizer.step()
        small.grad = g @ optimizer.state[p]["right"].mT
        theirs.step()
    torch.testing.assert_close(p.detach(), 0.5 * small.detach() @ optimizer.state[p]["right"], rtol=1e-5, atol=1e-7)


def test_eight_bit_moments_are_bytes_and_follow_float32_ones():
    g = matrix(80, 64, 1).float()
    found = {}
    for inner in ("adamw", "adamw8bit"):
        p = nn.Parameter(torch.zeros(80, 64))
        optimizer = Galore([p], lr=LR, rank=60, inner=inner, scale=1.0, svd="exact")
        for _ in range(5):
            p.grad = g.clone()
            optimizer.step()
        found[inner] = p.detach()
    state = optimizer.state[p]
    assert state["exp_avg_codes"].dtype == state["exp_avg_sq_codes"].dtype == torch.uint8
    stored = sum(t.numel() * t.element_size() for name, t in state.items() if name.startswith("exp_avg"))
    assert stored == 2 * (-(-60 * 80 // 256)) * (256 + 4)
    off = (found["adamw8bit"] - found["adamw"]).norm() / found["adamw"].norm()
    assert 0 < off < 0.05
    small = Galore([nn.Parameter(torch.zeros(20, 20))], rank=4, inner="adamw8bit")
    small.param_groups[0]["params"][0].grad = matrix(20, 20, 0).float()
    small.step()
    assert "exp_avg" in next(iter(small.state.values()))  # too small to be worth it


@pytest.mark.parametrize("signed", [True, False])
def test_a_byte_is_the_nearest_value_of_the_code(signed):
    code = _map(signed, torch.device("cpu")).double()
    assert torch.equal(_nearest_codes(code.float()[None], signed)[0], torch.arange(256).byte())
    middles = (code[1:] + code[:-1]) / 2
    draw = generator("bytes")
    spread = torch.randn(20_000, generator=draw) * torch.logspace(-9, 0.5, 20_000)  # beyond both ends of the code
    near = middles * (1 + 1e-6 * torch.randn(255, generator=draw))  # and where two values are almost as near
    x = torch.cat([spread, near.float(), torch.zeros(1)])
    x = (x if signed else x.abs())[None]
    off = (code[_nearest_codes(x, signed)[0].long()] - x[0].double()).abs()
    least = (code - x[0].double()[:, None]).abs().amin(1)
    assert bool((off <= least + 1e-7 * x[0].abs()).all())  # middles are rounded


@pytest.mark.parametrize("rank", [4, 16, 48])
def test_warm_refreshes_hold_99_percent_of_what_the_exact_ones_hold_on_a_language_models_gradients(rank):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=172, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = weft.optim.optimizer("galore", model, rank=rank, update_proj_gap=1)
    for step in range(3):
        ids = torch.randint(64, (4, 32), generator=generator("batch", step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for name, p in model.named_parameters():
            if "right" in optimizer.state[p] or "left" in optimizer.state[p]:
                state = optimizer.state[p]
                held = p.grad @ state["right"].mT if "right" in state else state["left"].mT @ p.grad
                exact = torch.linalg.svdvals(p.grad)[:rank].square().sum()
                assert held.square().sum() > 0.99 * exact, (step, name)


def test_a_gradient_of_small_rank_gets_a_whole_basis_and_the_update_proceeds():
    g = torch.outer(matrix(9, 1, 0)[:, 0], matrix(6, 1, 1)[:, 0])
    found, optimizer = run(torch.zeros(9, 6, dtype=torch.float64), [g], rank=4)
    basis = next(iter(optimizer.state.values()))["right"]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)
    assert torch.isfinite(found).all() and found.norm() > 0


def test_a_gradient_of_zeros_leaves_the_basis_as_it_was():
    w, zero = matrix(9, 6, 0), torch.zeros(9, 6, dtype=torch.float64)
    _, first = run(w, [matrix(9, 6, 1)] * GAP, rank=3)
    _, then = run(w, [*[matrix(9, 6, 1)] * GAP, zero], rank=3)
    assert torch.equal(*(next(iter(o.state.values()))["right"] for o in (first, then)))
    (state,) = run(w, [zero], rank=3)[1].state.values()
    assert all(torch.isfinite(t).all() for t in state.values() if torch.is_tensor(t))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).double()


def losses(model: nn.Module, optimizer: Galore, steps: int, accumulation: int = 1, clear: bool = True) -> list[float]:
    found = []
    for step in range(steps):
        for part in matrix(8, 12, step).chunk(accumulation):
            loss = model(part).square().mean() / accumulation
            loss.backward()
        found.append(loss.item())
        optimizer.step()
        if clear:
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("stagger", [False, True])
def test_updates_in_the_backward_pass_are_those_of_the_ordinary_loop(stagger):
    ordinary, inside = small_model(), small_model()
    options = {"rank": 3, "update_proj_gap": GAP, "stagger": stagger, "weight_decay": 0.1}
    losses(ordinary, weft.optim.optimizer("galore", ordinary, **options), 2 * GAP + 1)
    optimizer = weft.optim.optimizer("galore", inside, **options)
    handles = update_in_backward(optimizer)
    losses(inside, optimizer, 2 * GAP + 1, clear=False)
    assert all(p.grad is None for p in inside.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), inside.parameters()))
    for handle in handles:
        handle.remove()
    inside(matrix(2, 12, 0)).sum().backward()
    assert all(p.grad is not None for p in inside.parameters())


def test_updates_in_the_backward_pass_add_up_micro_batches():
    whole, parts = small_model(), small_model()
    losses(whole, weft.optim.optimizer("galore", whole, rank=3, update_proj_gap=GAP), 2 * GAP + 1)
    optimizer = weft.optim.optimizer("galore", parts, rank=3, update_proj_gap=GAP)
    update_in_backward(optimizer, accumulation=4)
    losses(parts, optimizer, 2 * GAP + 1, accumulation=4, clear=False)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_staggered_refreshes_fall_on_different_steps_and_come_every_gap():
    model = small_model()
    optimizer = weft.optim.optimizer("galore", model, rank=3, update_proj_gap=GAP, stagger=True)
    seen: dict[int, list[int]] = {}
    before = {}
    for step in range(3 * GAP):
        losses(model, optimizer, 1)
        for place, (p, state) in enumerate(optimizer.state.items()):
            if p.dim() == 2 and (place not in before or state["next_fit"] != before[place]):
                seen.setdefault(place, []).append(step)
                before[place] = state["next_fit"]
    first, second = seen.values()
    assert first[0] == second[0] == 0
    assert set(first[1:]).isdisjoint(second[1:])
    assert all(b - a == GAP for each in (first[1:], second[1:]) for a, b in zip(each, each[1:]))


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one_with_one_graph_a_shape():
    import torch._dynamo

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = small_model().float(), small_model().float()
    first = weft.optim.optimizer("galore", eager, rank=3, update_proj_gap=20)
    arguments = weft.optim.for_trainer("galore", compiled, rank=3, update_proj_gap=20)[1]
    second = Galore(arguments.pop("params"), compile=True, **arguments)
    for step in range(50):
        for model, optimizer in ((eager, first), (compiled, second)):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            model(matrix(8, 12, step).float()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2 * 4  # two matrices, two biases
    assert not counters["graph_break"]


def test_a_quadratic_is_solved():
    target = matrix(10, 4, 1) @ matrix(4, 8, 2)  # the paper's case: gradients of small rank
    p = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64))
    optimizer = Galore([p], lr=0.2, rank=4, update_proj_gap=20, scale=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    start = (p - target).square().sum().item()
    for _ in range(800):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert (p - target).square().sum().item() < 1e-6 * start


def test_state_is_as_large_as_the_formula_says():
    model = small_model().bfloat16()
    optimizer = weft.optim.optimizer("galore", model, rank=3)
    (model(matrix(8, 12, 0).bfloat16()).square().mean()).backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    stored = sum(t.numel() * t.element_size() for t in tensors)
    formula = sum(2 * 3 * min(s) + 4 * 2 * 3 * max(s) for s in ((20, 12), (8, 20))) + 4 * 2 * (20 + 8)
    assert stored == formula


def test_bad_values_are_refused_before_a_step():
    p = nn.Parameter(torch.zeros(6, 4))
    for options, words in (
        ({"rank": 5}, "rank=5 is above the shorter side of a 6 × 4 matrix"),
        ({"rank": 0}, "rank=0 must be a whole number"),
        ({"rank": 2, "update_proj_gap": 0}, "update_proj_gap=0"),
        ({"rank": 2, "proj_type": "lefft"}, "did you mean 'left'"),
        ({"rank": 2, "svd": "fast"}, "unknown svd 'fast'"),
        ({"rank": 2, "inner": "adam"}, "did you mean 'adamw'"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ):
        with pytest.raises(UsageError, match=words):
            Galore([p], **options)
    with pytest.raises(UsageError, match="no matrix"):
        Galore([nn.Parameter(torch.zeros(4))], rank=2)
    with pytest.raises(UsageError, match="have a side of at most rank=64"):
        weft.optim.param_groups(small_model(), rank=64)
    with pytest.raises(UsageError, match="there are: 0, 2"):
        weft.optim.param_groups(small_model(), rank=2, target_modules="up_proj")


def test_groups_leave_out_embeddings_heads_and_norms_and_decay_no_vectors(llama, caplog):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    with caplog.at_level("INFO"):
        groups = weft.optim.param_groups(model, rank=4, weight_decay=0.1, scale=0.5)
    names = [{name for name, _ in group["params"]} for group in groups]
    assert all("layers" in name and name.endswith("proj.weight") for name in names[0])
    assert "model.embed_tokens.weight" in names[1]
    assert all(p.dim() == 1 for _, p in groups[2]["params"])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert {name for each in names for name in each} == {name for name, _ in model.named_parameters()}
    assert f"in {len(names[0])} matrices are projected to rank 4" in caplog.text
