"""DCT-AdamW and Trion against their own equations in float64, written with whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weft.optim
from weft.errors import UsageError
from weft.optim._projected import update_in_backward
from weft.optim.dct_projection import (
    DctProjection,
    DctProjectionConfig,
    basis,
    dequantise,
    newton_schulz,
    quantise,
    strongest,
    turn_,
)

B1, B2, EPS, LR, DECAY, MU = 0.9, 0.999, 1e-3, 0.01, 0.1, 0.9  # so large an eps that its place matters
SHAPES = [(12, 7), (7, 12), (9, 9)]


def matrix(out: int, in_: int, seed: int) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(n: int) -> Tensor:
    """C by its definition, an entry at a time."""
    rows = [[math.sqrt(2 / n) * math.cos(math.pi * i * (2 * j + 1) / (2 * n)) for j in range(n)] for i in range(n)]
    rows[0] = [entry * math.sqrt(1 / 2) for entry in rows[0]]
    return torch.tensor(rows, dtype=torch.float64)


def chosen(a: Tensor, r: int, p: int) -> list[int]:
    """The r frequencies of the shorter side with the largest norm."""
    out, in_ = a.shape
    c = cosines(min(out, in_))
    s = a @ c.mT if out >= in_ else (c @ a).mT
    scores = [sum(abs(x) ** abs(p) for x in column) ** (1 / abs(p)) for column in s.mT.tolist()]
    if p < 0:
        scores = [score * sum(abs(x) ** -p for x in row) ** (1 / -p) for score, row in zip(scores, c.tolist())]
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:r])


def squeezed(e: Tensor, bits: int) -> Tensor:
    """Each row rounded to 2^bits values from its least to its largest, one entry at a time."""
    rows = []
    for row in e.tolist():
        low, unit = min(row), (max(row) - min(row)) / (2**bits - 1)
        rows.append([low + unit * round((x - low) / unit) for x in row])
    return torch.tensor(rows, dtype=torch.float64)


def adam(w: Tensor, gradients: list[Tensor], r: int, gap: int = 1, p: int = 1, turns=False, ef=False, bits=0):
    """W and E after DCT-AdamW, with whole selection matrices."""
    w, (out, in_) = w.clone(), w.shape
    c, e = cosines(min(out, in_)), torch.zeros_like(w)
    old = c[:r]
    for t, g in enumerate(gradients, 1):
        w = w - LR * DECAY * w
        a = g + e
        if t == 1 or t % gap == 0:
            new = c[chosen(a, r, p)]
            if t == 1:
                m = v = torch.zeros((out, r) if out >= in_ else (r, in_), dtype=torch.float64)
            elif turns:
                rotation = (old @ new.mT).round()
                m, v = (m @ rotation, v @ rotation) if out >= in_ else (rotation.mT @ m, rotation.mT @ v)
            old = new
        small = a @ old.mT if out >= in_ else old @ a
        if ef:
            e = a - (small @ old if out >= in_ else old.mT @ small)
            e = squeezed(e, bits) if bits else e
        m = B1 * m + (1 - B1) * small
        v = B2 * v + (1 - B2) * small**2
        u = m / (v.sqrt() + EPS * math.sqrt(1 - B2**t))
        w = w - LR * math.sqrt(1 - B2**t) / (1 - B1**t) * (u @ old if out >= in_ else old.mT @ u)
    return w, e


def run(w: Tensor, gradients: list[Tensor], **options) -> tuple[Tensor, dict]:
    p = nn.Parameter(w.clone())
    optimizer = DctProjection([p], lr=LR, weight_decay=DECAY, **options)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("selection", ["matmul", "fft"])
@pytest.mark.parametrize("gap", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_adam_is_the_written_out_loop(shape, gap, selection):
    w, gradients = matrix(*shape, 0), [matrix(*shape, 1 + k) for k in range(9)]
    options = {"betas": (B1, B2), "eps": EPS, "rank": 3, "update_proj_gap": gap, "selection": selection}
    for p in (1, 2, -1, -2):
        found, _ = run(w, gradients, ell_norm=p, **options)
        torch.testing.assert_close(found, adam(w, gradients, 3, gap, p)[0], rtol=1e-9, atol=1e-9)
    found, _ = run(w, gradients, rotate_subspace=True, **options)
    torch.testing.assert_close(found, adam(w, gradients, 3, gap, turns=True)[0], rtol=1e-9, atol=1e-9)
    found, state = run(w, gradients, use_ef=True, rotate_subspace=True, **options)
    expected, lost = adam(w, gradients, 3, gap, turns=True, ef=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["error"], lost, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_error_feedback_is_the_written_out_loop(shape, bits):
    w, gradients = matrix(*shape, 0), [matrix(*shape, 1 + k) for k in range(5)]
    found, state = run(w, gradients, betas=(B1, B2), eps=EPS, rank=3, use_ef=True, q_ef=bits)
    torch.testing.assert_close(found, adam(w, gradients, 3, ef=True, bits=bits)[0], rtol=1e-9, atol=1e-9)
    assert state["error_codes"].dtype == torch.uint8
    assert state["error_codes"].shape == (shape[0], shape[1] if bits == 8 else -(-shape[1] // 2))
    assert "error" not in state


@pytest.mark.parametrize("scaling", ["kj", "none", "kimi", "dion"])
@pytest.mark.parametrize("shape", SHAPES)
def test_trion_is_the_written_out_loop(shape, scaling):
    (out, in_), gradients = shape, [matrix(*shape, 1 + k) for k in range(6)]
    found, state = run(matrix(*shape, 0), gradients, form="trion", rank=3, momentum=MU, scaling=scaling)
    factor = {"kj": max(1, out / in_) ** 0.5, "none": 1, "kimi": 0.2 * max(out, in_) ** 0.5, "dion": (out / in_) ** 0.5}
    w, kept, c = matrix(*shape, 0), torch.zeros(shape, dtype=torch.float64), cosines(min(shape))
    for g in gradients:
        before = kept + g
        rows = c[chosen(before, 3, 1)]
        small = before @ rows.mT if out >= in_ else rows @ before
        kept = before - (1 - MU) * (small @ rows if out >= in_ else rows.mT @ small)
        x = small / (small.norm() + 1e-7)
        for _ in range(5):
            x = 3.4445 * x - 4.775 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
        w = w * (1 - LR * DECAY) - LR * factor[scaling] * (x @ rows if out >= in_ else rows.mT @ x)
    torch.testing.assert_close(state["momentum"], kept, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, w, rtol=1e-8, atol=1e-8)
    assert "exp_avg" not in state


def test_newton_schulz_brings_singular_values_near_one():
    values = torch.linalg.svdvals(newton_schulz(matrix(20, 5, 0)))
    assert values.min() > 0.6 and values.max() < 1.3


@given(n=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_the_basis_is_the_orthonormal_cosine_transform(n):
    c = basis(n, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(c, cosines(n), rtol=0, atol=1e-12)
    torch.testing.assert_close(c @ c.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(weft.algebra.transforms.dct(n).forward(matrix(3, n, 0)), matrix(3, n, 0) @ c.mT)


@given(out=st.integers(1, 20), in_=st.integers(1, 20), data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_lost_is_at_most_its_share_and_nothing_else_is(out, in_, data):
    n = min(out, in_)
    r, g, before = data.draw(st.integers(1, n)), matrix(out, in_, 0), matrix(out, in_, 1)
    p = nn.Parameter(torch.zeros(out, in_, dtype=torch.float64))
    optimizer = DctProjection([p], rank=r, ell_norm=2, use_ef=True)
    p.grad = g.clone()
    optimizer.step()
    lost = optimizer.state[p]["error"].clone()
    assert lost.square().sum() <= (1 - r / n) * g.square().sum() + 1e-12
    p.grad = before.clone()
    optimizer.step()
    c = cosines(n)[optimizer.state[p]["index"].long()]
    up = (before + lost) @ c.mT @ c if out >= in_ else c.mT @ c @ (before + lost)
    torch.testing.assert_close(up + optimizer.state[p]["error"], before + lost, rtol=0, atol=1e-12)


@given(n=st.integers(1, 12), data=st.data(), dim=st.sampled_from([0, 1]))
@settings(max_examples=40, deadline=None)
def test_moments_follow_as_by_a_partial_permutation(n, data, dim):
    r = data.draw(st.integers(1, n))
    old, new = (torch.tensor(sorted(data.draw(st.permutations(range(n)))[:r])) for _ in range(2))
    rotation = cosines(n)[old] @ cosines(n)[new].mT
    torch.testing.assert_close(rotation, (old[:, None] == new).double(), rtol=0, atol=1e-12)
    m = matrix(*((5, r) if dim else (r, 5)), 0)
    expected = m @ rotation.round() if dim else rotation.round().mT @ m
    turn_(m, old.to(torch.int16), new, dim)
    assert torch.equal(m, expected)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_at_full_rank_it_is_adam_on_the_turned_weight_with_torchs_eps(shape):
    w, gradients, c = matrix(*shape, 0), [matrix(*shape, 1 + k) for k in range(5)], cosines(5)
    found, _ = run(w, gradients, rank=5, eps=EPS)
    turned = nn.Parameter(w @ c.mT if shape[0] > shape[1] else c @ w)
    theirs = torch.optim.AdamW([turned], lr=LR, eps=EPS, weight_decay=DECAY)
    for g in gradients:
        turned.grad = g @ c.mT if shape[0] > shape[1] else c @ g
        theirs.step()
    back = turned.detach() @ c if shape[0] > shape[1] else c.mT @ turned.detach()
    torch.testing.assert_close(found, back, rtol=1e-9, atol=1e-9)


def test_what_is_not_projected_takes_torchs_adamw():
    params = {"vector": matrix(1, 6, 0)[0], "matrix": matrix(6, 9, 1)}
    for name, value in params.items():
        ours, theirs = nn.Parameter(value.clone()), nn.Parameter(value.clone())
        wide = {"rank": 2, "max_shape": 9} if name == "matrix" else {}
        first = DctProjection([{"params": [ours], **wide}], lr=LR, weight_decay=DECAY, eps=EPS)
        second = torch.optim.AdamW([theirs], lr=LR, weight_decay=DECAY, eps=EPS)
        for k in range(3):
            ours.grad = matrix(*value.shape, k) if value.dim() == 2 else matrix(1, 6, k)[0]
            theirs.grad = ours.grad.clone()
            first.step()
            second.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_trions_other_parameters_have_a_learning_rate_of_their_own():
    matrices, vector, other = (nn.Parameter(t) for t in (matrix(6, 4, 0), matrix(1, 4, 0)[0], torch.ones(2)))
    groups = [{"params": [matrices], "rank": 2}, {"params": [vector]}, {"params": [other], "lr": 0.1, "eps": 1e-5}]
    optimizer = DctProjection(groups, form="trion")
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 3e-4, 0.1]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 3
    assert [group["eps"] for group in optimizer.param_groups] == [1e-10, 1e-10, 1e-5]
    theirs = nn.Parameter(vector.detach().clone())
    reference = torch.optim.AdamW([theirs], lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for k in range(3):
        vector.grad = matrix(1, 4, k)[0]
        theirs.grad = vector.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(vector, theirs, rtol=1e-12, atol=1e-12)


def test_the_choice_knows_no_scale_and_ties_go_to_the_lower_frequency():
    s = matrix(9, 6, 0)
    assert torch.equal(strongest(s, 3, 1), strongest(1e-6 * s, 3, 1))
    assert strongest(torch.ones(4, 7), 3, 1).tolist() == [0, 1, 2]
    s = torch.tensor([[1.0, -3, 2, 3, -2]])
    assert strongest(s, 3, 2).tolist() == [1, 2, 3]


@pytest.mark.parametrize("selection", ["matmul", "fft"])
def test_every_norm_counts_in_both_selections(selection):
    s = torch.zeros(30, 20, dtype=torch.float64)
    s[:, 0], s[0, 3], s[:, 7] = 0.195, 4.0, 0.2  # flat, with a long basis vector by l1; a peak; flat
    g = s @ cosines(20)
    for p, best in ((1, 7), (2, 3), (-1, 0), (-2, 3)):
        assert run(g, [g], rank=1, selection=selection, ell_norm=p)[1]["index"].tolist() == [best] == chosen(g, 1, p)


def test_a_gradient_of_zeros_keeps_the_frequencies():
    g = torch.outer(matrix(1, 9, 1)[0], cosines(6)[2] + 2 * cosines(6)[5])
    zero = torch.zeros_like(g)
    found, state = run(g, [g, zero], rank=2)
    assert state["index"].tolist() == [2, 5]
    assert torch.isfinite(found).all()
    assert run(g, [zero], rank=2)[1]["index"].tolist() == [0, 1]


@given(out=st.integers(1, 6), in_=st.integers(1, 9), bits=st.sampled_from([4, 8]))
@settings(max_examples=25, deadline=None)
def test_codes_are_within_half_a_step_and_equal_rows_are_exact(out, in_, bits):
    x = matrix(out, in_, 5)
    x[0] = 0.3
    codes, low, unit = quantise(x, bits)
    back = dequantise(codes, low, unit, bits, in_)
    assert ((back - x).abs() <= 0.5 * (x.amax(1) - x.amin(1))[:, None] / (2**bits - 1) + 1e-12).all()
    assert (back[0] == 0.3).all()
    whole_range = torch.arange(2.0**bits, dtype=torch.float64)[None]
    torch.testing.assert_close(dequantise(*quantise(whole_range, bits), bits, 2**bits), whole_range, rtol=0, atol=1e-9)


# --- as an optimiser --------------------------------------------------------------------------------------------------

KINDS = {
    "adamw": {},
    "fft": {"selection": "fft", "update_proj_gap": 3, "rotate_subspace": True},
    "feedback": {"use_ef": True, "update_proj_gap": 3},
    "four bits": {"use_ef": True, "q_ef": 4, "rotate_subspace": True},
    "trion": {"form": "trion", "momentum": MU},
}


def small_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).to(dtype)


def train(model: nn.Module, optimizer, steps: range, parts: int = 1, clear: bool = True) -> None:
    for step in steps:
        for part in matrix(8, 12, step).to(model[0].weight.dtype).chunk(parts):
            (model(part).square().mean() / parts).backward()
        optimizer.step()
        if clear:
            optimizer.zero_grad()


def build(kind: str, dtype: torch.dtype = torch.float64):
    model = small_model(dtype)
    return model, weft.optim.optimizer("dct_projection", model, lr=LR, weight_decay=DECAY, rank=3, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_with_its_dtypes(kind, tmp_path):
    for stop in (1, 2, 3, 4):
        model, optimizer = build(kind, torch.bfloat16)
        train(model, optimizer, range(stop))
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
        again, other = build(kind, torch.bfloat16)
        weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
        again.load_state_dict(weights)
        other.load_state_dict(state)
        for a, b in zip(optimizer.state.values(), other.state.values()):
            assert {k: getattr(v, "dtype", int) for k, v in a.items()} == {
                k: getattr(v, "dtype", int) for k, v in b.items()
            }
        assert other.state[again[0].weight]["index"].dtype == torch.int16
        train(model, optimizer, range(stop, stop + 4))
        train(again, other, range(stop, stop + 4))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_four_micro_batches_are_one_batch_in_step_and_in_the_backward_pass(kind):
    one, optimizer = build(kind)
    train(one, optimizer, range(7))
    for inside in (False, True):
        four, other = build(kind)
        if inside:
            update_in_backward(other, accumulation=4)
        train(four, other, range(7), parts=4, clear=not inside)
        for a, b in zip(one.parameters(), four.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_skips_the_whole_step(kind):
    model, optimizer = build(kind)
    train(model, optimizer, range(3))
    weights = [p.detach().clone() for p in model.parameters()]
    kept = [{k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()} for s in optimizer.state.values()]
    model(matrix(8, 12, 9)).square().mean().backward()
    model[2].bias.grad[0] = math.nan
    with pytest.warns(UserWarning, match="is not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    for before, after in zip(kept, optimizer.state.values()):
        assert before.keys() == after.keys()
        assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_as_large_as_the_formula_says(kind):
    model, optimizer = build(kind, torch.bfloat16)
    train(model, optimizer, range(2))
    for p, state in optimizer.state.items():
        stored = sum(t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t))
        if p.dim() == 1:
            assert stored == 8 * p.numel()
            continue
        kept = {"feedback": 4 * p.numel(), "trion": 4 * p.numel(), "four bits": p.numel() // 2 + 8 * len(p)}
        moments = 0 if kind == "trion" else 4 * 2 * 3 * max(p.shape)
        assert stored == moments + 3 * 2 + kept.get(kind, 0)


def test_indices_are_four_bytes_where_two_are_too_few():
    p = nn.Parameter(torch.zeros(32769, 32769, device="meta"))
    projector = DctProjection([{"params": [p], "rank": 1, "selection": "fft", "max_shape": 40000}]).projector
    group = {"rank": 1, "selection": "fft", "ell_norm": 1, "use_ef": False, "q_ef": 0, "rotate_subspace": False}
    state: dict = {}
    made = projector({**group, "momentum": 0.95, "scaling": "kj", "max_shape": 40000}, p)
    g = torch.linspace(0, math.pi, 32769)[None].mul(32768).cos()
    made.fit(state, g, g, ())
    assert state["index"].dtype == torch.int32


def test_a_quadratic_is_solved_where_moments_follow_their_frequencies():
    target = matrix(10, 8, 1)
    options = {
        "adamw": {"rotate_subspace": True},
        "feedback": {"use_ef": True, "rotate_subspace": True},
        "trion": {"form": "trion"},
        "stay": {},  # moments of one frequency serve another: the card says so
    }
    ends = {}
    for kind, chosen in options.items():
        p = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64))
        optimizer = DctProjection([p], lr=0.05, rank=4, **chosen)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
        for _ in range(800):
            p.grad = 2 * (p.detach() - target)
            optimizer.step()
            schedule.step()
        ends[kind] = ((p - target).square().sum() / target.square().sum()).item()
    stay = ends.pop("stay")
    assert max(ends.values()) < 1e-6 < stay < 1, (ends, stay)


def test_bad_values_are_refused_before_a_step():
    p = nn.Parameter(torch.zeros(6, 4))
    for options, words in (
        ({"rank": 5}, "rank=5 is above the shorter side of a 6 × 4 matrix"),
        ({"rank": 2, "form": "trionn"}, "did you mean 'trion'"),
        ({"rank": 2, "selection": "makhoul"}, "unknown selection 'makhoul'"),
        ({"rank": 2, "ell_norm": 3}, "ell_norm=3 must be one of 1, 2, -1, -2"),
        ({"rank": 2, "use_ef": True, "q_ef": 2}, "q_ef=2 must be one of 0, 4, 8"),
        ({"rank": 2, "q_ef": 4}, "wants use_ef=True"),
        ({"rank": 2, "form": "trion", "rotate_subspace": True}, "is an option of form='adamw' alone"),
        ({"rank": 2, "momentum": 0.5}, "is an option of form='trion' alone"),
        ({"rank": 2, "form": "trion", "momentum": 1.0}, "momentum=1.0"),
        ({"rank": 2, "form": "trion", "scaling": "muon"}, "unknown scaling 'muon'"),
        ({"rank": 2, "form": "trion", "max_shape": 6}, "put it into a group without a rank"),
        ({"rank": 2, "max_shape": 0}, "max_shape=0"),
    ):
        with pytest.raises(UsageError, match=words):
            DctProjection([p], **options)
    with pytest.raises(UsageError, match="unknown key 'selectoin' in a parameter group"):
        DctProjection([{"params": [p], "rank": 2, "selectoin": "fft"}])
    with pytest.raises(UsageError, match="has no option 'ell_nrom'"):
        weft.optim.for_trainer("dct_projection", small_model(), ell_nrom=2)
    with pytest.raises(UsageError, match="max_shape=12 leaves nothing to project"):
        weft.optim.optimizer("dct_projection", small_model(), rank=3, max_shape=12)


def test_wide_matrices_of_a_model_are_left_out_of_the_projection():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 40))
    optimizer = weft.optim.optimizer("dct_projection", model, rank=3, max_shape=40, form="trion", weight_decay=DECAY)
    ranks = {group["param_names"][0]: (group["rank"], group["lr"]) for group in optimizer.param_groups}
    assert ranks == {"0.weight": (3, 0.02), "0.bias": (None, 3e-4), "1.weight": (None, 3e-4)}


@pytest.mark.parametrize("kind", ["adamw", "trion"])
def test_trainer_takes_it(kind, tmp_path):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    made = weft.optim.for_trainer("dct_projection", model, rank=4, **KINDS[kind])
    assert made[1]["lr"] == (0.02 if kind == "trion" else 1e-3)
    assert weft.optim.for_trainer("dct_projection", model, rank=4, lr=0.5, **KINDS[kind])[1]["lr"] == 0.5
    ids = torch.randint(40, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model, args, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}), optimizer_cls_and_kwargs=made
    )
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, DctProjection) and not optimizer.skipped
    assert optimizer.param_groups[0]["rank"] == 4
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_config_has_the_defaults_of_the_specification():
    config = DctProjectionConfig()
    assert (config.update_proj_gap, config.use_ef, config.q_ef, config.rotate_subspace) == (1, False, 0, False)
    assert (config.selection, config.ell_norm, config.max_shape, config.momentum) == ("matmul", 1, 32000, 0.95)
    group = DctProjection([nn.Parameter(torch.zeros(2))]).param_groups[0]
    assert (group["betas"], group["eps"], group["momentum"]) == ((0.9, 0.999), 1e-8, config.momentum)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fft", "feedback", "trion"])
def test_a_compiled_step_is_the_eager_one_with_one_graph_a_shape(kind):
    import torch._dynamo

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = small_model(torch.float32), small_model(torch.float32)
    options = {"rank": 3, **KINDS[kind]}
    first = weft.optim.optimizer("dct_projection", eager, **options)
    arguments = weft.optim.for_trainer("dct_projection", compiled, **options)[1]
    second = DctProjection(arguments.pop("params"), compile=True, **arguments)
    for step in range(50):
        for model, optimizer in ((eager, first), (compiled, second)):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            train(model, optimizer, range(step, step + 1))
    for a, b in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2 * 4  # two matrices, two biases
    assert not counters["graph_break"]
