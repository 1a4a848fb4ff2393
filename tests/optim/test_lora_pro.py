"""LoRA-Pro: the closed form and its three variants against float64 written out; which adapters it serves."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import weft
from weft.errors import UsageError
from weft.optim import LoraPro, for_trainer, optimizer
from weft.optim.lora_pro import ClosedForm, Pair, pairs

OUT, IN, R, S = 13, 11, 3, 2.0


def _draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _problem(out=OUT, in_=IN, r=R, s=S):
    """A, B, G and LoRA's gradients a₀, b₀ of it, in float64."""
    a, b, g = _draw(r, in_, seed=1), _draw(out, r, seed=2), _draw(out, in_, seed=3)
    return a, b, g, s * b.mT @ g, s * g @ a.mT


def _adjusted(a, b, a0, b0, s=S, delta=0.0):
    g_a, g_b = ClosedForm([Pair(a, b, s)], delta).nearest(a0[None], b0[None])
    return g_a[0], g_b[0]


def _projector(columns):
    return columns @ torch.linalg.pinv(columns)


def _written_out(a, b, a0, b0, s, delta=0.0):
    """The specification's closed form, its X from the Sylvester equation as one Kronecker system."""
    r = len(a)
    eye = torch.eye(r, dtype=a.dtype)
    if not b.any():
        return a0, b0 @ torch.linalg.inv(a @ a.mT + delta * eye) / s**2
    inverse_b = torch.linalg.inv(b.mT @ b + delta * eye)
    inverse_a = torch.linalg.inv(a @ a.mT + delta * eye)
    system = torch.kron(b.mT @ b, eye) + torch.kron(eye, a @ a.mT)  # on vec(X) by rows
    x = torch.linalg.solve(system, (-inverse_b @ a0 @ a.mT / s**2).flatten()).view(r, r)
    g_a = inverse_b @ a0 / s**2 + x @ a
    return g_a, (b0 - b @ inverse_b @ b.mT @ b0) @ inverse_a / s**2 - b @ x


# --- the closed form --------------------------------------------------------------------------------------------------


def test_the_step_is_the_full_gradient_projected():
    a, b, g, a0, b0 = _problem()
    g_a, g_b = _adjusted(a, b, a0, b0)
    e = S * b @ g_a + S * g_b @ a
    eye = torch.eye(OUT, dtype=a.dtype)
    p_b, p_a = _projector(b), _projector(a.mT)
    torch.testing.assert_close(e, p_b @ g + (eye - p_b) @ g @ p_a, rtol=0, atol=1e-10)
    torch.testing.assert_close((g * e).sum(), e.square().sum(), rtol=1e-10, atol=0)  # a descent direction
    left, right = ClosedForm([Pair(a, b, S)], 0.0).equivalent(a0[None], b0[None])
    torch.testing.assert_close(left[0] @ right[0], e, rtol=0, atol=1e-10)  # that of X = 0 is the same


def test_no_other_pair_of_gradients_comes_nearer():
    a, b, g, a0, b0 = _problem()
    g_a, g_b = _adjusted(a, b, a0, b0)

    def distance(x, y):
        return (S * b @ x + S * y @ a - g).norm()

    best = distance(g_a, g_b)
    assert distance(a0, b0) > best
    for seed in range(20):
        moved = distance(g_a + 0.1 * _draw(*a.shape, seed=seed), g_b + 0.1 * _draw(*b.shape, seed=seed + 100))
        assert moved >= best - 1e-12


def test_x_solves_the_sylvester_equation_and_comes_nearest_to_loras_gradients():
    a, b, _, a0, b0 = _problem()
    g_a, g_b = _adjusted(a, b, a0, b0)
    inverse_b = torch.linalg.inv(b.mT @ b)
    x = (g_a - inverse_b @ a0 / S**2) @ torch.linalg.pinv(a)
    torch.testing.assert_close(b.mT @ b @ x + x @ a @ a.mT, -inverse_b @ a0 @ a.mT / S**2, rtol=0, atol=1e-9)
    torch.testing.assert_close((g_a, g_b), _written_out(a, b, a0, b0, S), rtol=0, atol=1e-10)

    def distance(x):
        return (g_a + x @ a - a0).square().sum() + (g_b - b @ x - b0).square().sum()

    least = distance(torch.zeros(R, R, dtype=a.dtype))
    assert all(distance(1e-3 * _draw(R, R, seed=seed)) > least for seed in range(9))


@pytest.mark.parametrize("delta", [0.0, 1e-8])
def test_at_zero_b_only_b_moves_and_along_the_rows_of_a(delta):
    a, _, g, _, b0 = _problem()
    b = torch.zeros(OUT, R, dtype=a.dtype)
    g_a, g_b = _adjusted(a, b, torch.zeros_like(a), b0, delta=delta)
    assert not g_a.any()
    torch.testing.assert_close(S * g_b @ a, g @ _projector(a.mT), rtol=0, atol=1e-7 if delta else 1e-10)


def test_full_rank_on_the_shorter_side_is_full_fine_tuning():
    a, b, g, a0, b0 = _problem(out=4, in_=9, r=4)
    g_a, g_b = _adjusted(a, b, a0, b0)
    torch.testing.assert_close(S * (b @ g_a + g_b @ a), g, rtol=0, atol=1e-9)


def test_twice_the_scaling_is_exactly_half_the_gradients_and_the_same_step():
    a, b, _, a0, b0 = _problem()
    g_a, g_b = _adjusted(a, b, a0, b0)
    half_a, half_b = _adjusted(a, b, 2 * a0, 2 * b0, s=2 * S)
    assert torch.equal(half_a, g_a / 2) and torch.equal(half_b, g_b / 2)


def test_a_direction_that_b_lacks_gets_nothing():
    a, b, g, _, b0 = (t.float() for t in _problem())
    b[:, 2] = b[:, 0]  # rounding leaves Bᵀ·G a trace of what is not there, which 1/delta would make the whole gradient
    g_a, g_b = _adjusted(a, b, S * b.mT @ g, b0, delta=1e-8)
    p_b, p_a = _projector(b.double()), _projector(a.double().mT)
    expected = p_b @ g.double() + (torch.eye(OUT, dtype=torch.float64) - p_b) @ g.double() @ p_a
    torch.testing.assert_close(S * (b @ g_a + g_b @ a).double(), expected, rtol=0, atol=1e-4)
    assert g_a.norm() < 10 * g.norm()


# --- the variants -----------------------------------------------------------------------------------------------------


class _Two(nn.Module):
    """Two pairs, one parameter beside them, and a loss in which all meet."""

    def __init__(self, dtype=torch.float64, b=0.3):
        super().__init__()
        self.a1, self.a2 = (nn.Parameter(_draw(R, IN, seed=s).to(dtype)) for s in (1, 2))
        self.b1, self.b2 = (nn.Parameter((b * _draw(OUT, R, seed=s)).to(dtype)) for s in (3, 4))
        self.bias = nn.Parameter(torch.zeros(OUT, dtype=dtype))

    def loss(self, step, rows=slice(None)):
        x, y = _draw(8, IN, seed=50 + step)[rows].to(self.a1), _draw(8, OUT, seed=90 + step)[rows].to(self.a1)
        made = x @ (S * self.b1 @ self.a1).mT + torch.tanh(x @ (3.0 * self.b2 @ self.a2).mT) + self.bias
        return (made - y).square().mean()

    def groups(self):
        found = dict(self.named_parameters())
        names = ["a1", "b1", "a2", "b2"]
        return [
            {"params": [(n, found[n]) for n in names], "scaling": [S, 3.0], "weight_decay": 0.1},
            {"params": [("bias", self.bias)]},
        ]


def _train(model, optim, steps, start=0):
    for step in range(start, start + steps):
        optim.zero_grad()
        model.loss(step).backward()
        optim.step()


def _adam(state, g, lr, betas=(0.9, 0.999), eps=1e-8):
    state["t"] = state.get("t", 0) + 1
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
    m, v = state["m"] / (1 - betas[0] ** state["t"]), state["v"] / (1 - betas[1] ** state["t"])
    return m / (v.sqrt() + eps)


@pytest.mark.parametrize("b", [0.3, 0.0])
@pytest.mark.parametrize("variant", ["full", "efficient", "sgd"])
def test_every_variant_equals_the_specification_written_out(variant, b, monkeypatch):
    monkeypatch.setitem(weft.optim.lora_pro._TILE, "cpu", 1)  # several tiles, the last one short
    monkeypatch.setattr(weft.optim.lora_pro, "_TOGETHER", 1 if b else 1 << 22)  # pair by pair, or both at once
    lr, decay = 1e-2, 0.1
    model, twin = _Two(b=b), _Two(b=b)
    optim = LoraPro(model.groups(), lr=lr, variant=variant)
    moments = {}
    for step in range(5):
        _train(model, optim, 1, start=step)
        grads = dict(zip(dict(twin.named_parameters()), torch.autograd.grad(twin.loss(step), list(twin.parameters()))))
        with torch.no_grad():
            for i, s in (("1", S), ("2", 3.0)):
                a, b_ = getattr(twin, "a" + i), getattr(twin, "b" + i)
                a0, b0 = grads["a" + i], grads["b" + i]
                if variant == "full":
                    eye = torch.eye(R, dtype=a.dtype)
                    inverse_b = torch.linalg.inv(b_.mT @ b_ + 1e-8 * eye)
                    g_a = inverse_b @ a0 / s**2
                    g_b = (b0 - b_ @ inverse_b @ b_.mT @ b0) @ torch.linalg.inv(a @ a.mT + 1e-8 * eye) / s**2
                    d = _adam(moments.setdefault(i, {}), s * b_ @ g_a + s * g_b @ a, lr)
                    a0, b0 = s * b_.mT @ d, s * d @ a.mT
                n_a, n_b = _written_out(a, b_, a0, b0, s, 1e-8)
                if variant == "efficient":
                    n_a = _adam(moments.setdefault("a" + i, {}), n_a, lr)
                    n_b = _adam(moments.setdefault("b" + i, {}), n_b, lr)
                a.mul_(1 - lr * decay).sub_(lr * n_a)
                b_.mul_(1 - lr * decay).sub_(lr * n_b)
            twin.bias.sub_(lr * _adam(moments.setdefault("bias", {}), grads["bias"], lr))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, dict(twin.named_parameters())[name], rtol=1e-8, atol=1e-8, msg=name)


def test_state_has_the_size_that_each_variant_says():
    for variant, expected in (("full", 2 * 2 * OUT * IN), ("efficient", 2 * 2 * R * (OUT + IN)), ("sgd", 0)):
        model = _Two()
        optim = LoraPro(model.groups(), variant=variant)
        _train(model, optim, 1)
        kept = sum(t.numel() for s in optim.state.values() for t in s.values() if isinstance(t, torch.Tensor))
        assert kept == expected + 2 * OUT  # the bias has AdamW's two


def test_a_teacher_is_reached_in_the_order_full_lora_pro_lora():
    start, shift, x = _draw(10, 8, seed=1), _draw(10, 8, seed=2), _draw(64, 8, seed=3)

    def after(kind, lr):
        w = start.clone().requires_grad_()
        a, b = _draw(2, 8, seed=4).div(8**0.5).requires_grad_(), torch.zeros(10, 2).double().requires_grad_()
        optim = {
            "full": lambda: torch.optim.SGD([w], lr=lr),
            "lora": lambda: torch.optim.SGD([a, b], lr=lr),
            "pro": lambda: LoraPro([{"params": [a, b], "scaling": 1.0}], lr=lr, variant="sgd"),
        }[kind]()
        for _ in range(12):
            moved = w if kind == "full" else start + b @ a
            loss = (x @ (moved - start - shift).mT).square().mean()
            optim.zero_grad()
            loss.backward()
            optim.step()
        return loss.item()

    best = {
        kind: min(v for lr in torch.logspace(-2, 1, 25) if math.isfinite(v := after(kind, float(lr))))
        for kind in ("full", "pro", "lora")
    }
    assert best["full"] < best["pro"] < best["lora"]


# --- the laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["full", "efficient", "sgd"])
def test_resumed_is_uninterrupted_bit_for_bit_in_bfloat16(variant, tmp_path):
    whole = _Two(torch.bfloat16)
    optim = LoraPro(whole.groups(), lr=1e-2, variant=variant)
    _train(whole, optim, 3)
    torch.save({"model": whole.state_dict(), "optim": optim.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = _Two(torch.bfloat16)
    resumed.load_state_dict(saved["model"])
    again = LoraPro(resumed.groups(), lr=1e-2, variant=variant)
    again.load_state_dict(saved["optim"])
    for old, new in zip(optim.state.values(), again.state.values()):
        assert all(not torch.is_tensor(t) or (t.dtype == torch.float32 == new[k].dtype) for k, t in old.items())
    _train(whole, optim, 3, start=3)
    _train(resumed, again, 3, start=3)
    for p, q, start in zip(whole.parameters(), resumed.parameters(), _Two(torch.bfloat16).parameters()):
        assert torch.equal(p, q) and not torch.equal(p, start)


@pytest.mark.parametrize("variant", ["full", "efficient", "sgd"])
def test_four_micro_batches_are_one_batch_of_four(variant):
    large, small = _Two(), _Two()
    one, four = (LoraPro(m.groups(), lr=1e-2, variant=variant) for m in (large, small))
    for step in range(4):
        _train(large, one, 1, start=step)
        four.zero_grad()
        for part in range(4):
            (small.loss(step, slice(2 * part, 2 * part + 2)) / 4).backward()
        four.step()
    for p, q in zip(large.parameters(), small.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was():
    model = _Two()
    optim = LoraPro(model.groups(), lr=1e-2)
    _train(model, optim, 2)
    before = [p.detach().clone() for p in model.parameters()]
    state = {k: {n: torch.as_tensor(t).clone() for n, t in s.items()} for k, s in optim.state_dict()["state"].items()}
    model.loss(2).backward()
    model.b2.grad[3, 1] = math.nan
    with pytest.warns(UserWarning, match="gradient of b2 is not finite"):
        optim.step()
    assert optim.skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    for place, own in optim.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(t), state[place][n]) for n, t in own.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scalings": 2.0}, "unknown key 'scalings'"),
        ({"scaling": [1.0]}, "scaling must be 2 finite numbers"),
        ({"scaling": 0.0}, "scaling must be 2 finite numbers"),
        ({"variant": "fast"}, "unknown variant 'fast'"),
        ({"delta": -1.0}, "delta=-1.0"),
        ({"params": [_draw(3, 4)], "scaling": 1.0}, "1 parameters is not one of pairs"),
        ({"params": [_draw(5, 3), _draw(3, 4)], "scaling": 1.0}, r"shapes \(5, 3\) and \(3, 4\) are not those of A"),
    ],
)
def test_groups_that_cannot_work_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        LoraPro([{**_Two().groups()[0], **change}])


def test_a_pair_with_one_gradient_is_refused_and_one_without_any_rests():
    model = _Two()
    pairs, rest = model.groups()
    apart = [{**pairs, "params": pairs["params"][at : at + 2], "scaling": S} for at in (0, 2)]
    optim = LoraPro([rest, *apart])
    model.loss(0).backward()
    model.a1.grad = model.b1.grad = None
    before = model.a1.detach().clone(), model.a2.detach().clone()
    optim.step()
    assert torch.equal(before[0], model.a1) and not torch.equal(before[1], model.a2)
    optim.zero_grad()
    model.loss(1).backward()
    model.a2.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    steps = {p: state["step"] for p, state in optim.state.items()}
    with pytest.raises(UsageError, match="b2 has a gradient and the other factor of its pair has none"):
        optim.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))  # nor what comes before it
    assert {p: state["step"] for p, state in optim.state.items()} == steps


def test_sharded_factors_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        a, b = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (_draw(R, IN), _draw(OUT, R)))
        assert isinstance(a, DTensor)
        with pytest.raises(UsageError, match="sharded factors cannot be adjusted.*use DDP"):
            LoraPro([{"params": [a, b], "scaling": 1.0}])
    finally:
        dist.destroy_process_group()


# --- models -----------------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv, self.grouped = nn.Embedding(9, 8), nn.Conv1d(8, 6, 3), nn.Conv1d(6, 6, 1, groups=2)
        self.fc, self.head = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, ids):
        x = self.grouped(self.conv(self.emb(ids).mT)).mT
        return self.head(torch.tanh(self.fc(x))).mean(1)


def _lora(targets=("fc",), **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(_Net(), LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), **options)).double()


def _loss(model):
    ids = torch.arange(24).view(4, 6) % 9
    return (model(ids) - _draw(4, 2, seed=5)).square().mean()


def test_pairs_are_found_by_module_with_their_own_scaling_and_the_rest_takes_adamw():
    model = _lora(["emb", "conv", "fc"], modules_to_save=["head"], rank_pattern={"fc": 3}, use_rslora=True, bias="all")
    found = pairs(model)
    assert {name.rpartition(".")[2]: pair.scaling for name, pair in found.items()} == pytest.approx(
        {"emb": 6 / 2**0.5, "conv": 6 / 2**0.5, "fc": 6 / 3**0.5}
    )
    optim = optimizer("lora_pro", model, lr=1e-2, weight_decay=0.1)
    inside = set(optim.param_groups[0]["param_names"])
    rest = {n for g in optim.param_groups[1:] for n in g["param_names"]}
    assert inside | rest == {n for n, p in model.named_parameters() if p.requires_grad} and not inside & rest
    assert any("head" in n for n in rest) and any(n.endswith("bias") for n in rest)
    head = model.get_parameter("base_model.model.head.modules_to_save.default.weight")
    bias = model.get_parameter("base_model.model.conv.base_layer.bias")
    twin = [head.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()]
    decayed, kept = {"params": twin[:1], "weight_decay": 0.1}, {"params": twin[1:], "weight_decay": 0.0}
    plain = torch.optim.AdamW([decayed, kept], lr=1e-2)
    for _ in range(3):
        optim.zero_grad()
        _loss(model).backward()
        twin[0].grad, twin[1].grad = head.grad.clone(), bias.grad.clone()
        optim.step(), plain.step()
    torch.testing.assert_close([head, bias], twin, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["emb", "conv", "fc"])
def test_a_step_on_every_kind_of_layer_moves_w_as_its_projected_gradient_says(target):
    model = _lora([target])
    ((_, pair),) = pairs(model).items()
    with torch.no_grad():
        for i, p in enumerate((pair.a, pair.b)):
            p.copy_(_draw(*p.shape, seed=i))
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    a, b = pair.a.detach().flatten(1).clone(), pair.b.detach().flatten(1).clone()
    merged = layer.get_base_layer()
    merged.weight.requires_grad_()
    _loss(model).backward()
    g = merged.weight.grad  # ∂L/∂W of the base weight is that of ΔW
    g = g.mT if target == "emb" else g.flatten(1)
    LoraPro([{"params": [pair.a, pair.b], "scaling": pair.scaling}], lr=1e-6, variant="sgd", delta=0.0).step()
    moved = pair.scaling * (pair.b.detach().flatten(1) @ pair.a.detach().flatten(1) - b @ a)
    p_b, p_a = _projector(b), _projector(a.mT)
    expected = -1e-6 * (p_b @ g + g @ p_a - p_b @ g @ p_a)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _lora(use_dora=True), "is a DoRA"),
        (lambda: _lora(lora_dropout=0.1), "has dropout 0.1"),
        (lambda: _adalora(), "is a SVDLinear"),
        (lambda: _lora(["grouped"]), "grouped convolution"),
        (lambda: _Net(), "has none in training"),
        (lambda: _frozen(_lora(), "lora_A"), "trains B only"),
        (lambda: _frozen(_lora(), "lora_"), "has none in training"),
        (lambda: _twice(_lora()), "trains 2 adapters at once"),
        (lambda: _shared(_lora(["fc", "head"])), "shares a factor"),
        (lambda: _weft(weft.SoraConfig(r=2, target_modules=["fc"])), "trains A, B, g"),
        (lambda: _weft(weft.AlloraConfig(r=2, target_modules=["fc"])), "by a rule of its own"),
        (lambda: _weft(weft.BlockLoraConfig(r=4, n_blocks=2, target_modules=["fc"])), "not use A and B as they are"),
    ],
)
def test_what_is_no_plain_pair_is_refused_by_name(make, message):
    with pytest.raises(UsageError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs(make())


def _adalora():
    from peft import AdaLoraConfig, get_peft_model

    return get_peft_model(_Net(), AdaLoraConfig(target_modules=["fc"], init_r=2, target_r=1, total_step=9))


def _frozen(model, part):
    for name, p in model.named_parameters():
        if part in name:
            p.requires_grad_(False)
    return model


def _twice(model):
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=2, target_modules=["fc"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def _shared(model):
    found = list(pairs(model).values())
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    layers[1].lora_A["default"].weight = found[0].a
    return model


def _weft(config):
    from peft import get_peft_model

    torch.manual_seed(0)
    return get_peft_model(_Net(), config)


def test_a_delta_of_weft_that_is_plain_is_a_pair():
    model = _weft(weft.BlockLoraConfig(r=3, lora_alpha=4, n_blocks=1, target_modules=["fc", "conv"]))
    found = pairs(model)
    assert [pair.scaling for pair in found.values()] == pytest.approx([4 / 3] * 2)
    assert [tuple(pair.a.shape) for pair in found.values()] == [(3, 24), (3, 6)]
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optim = optimizer("lora_pro", model, lr=1e-2)
    for _ in range(2):
        optim.zero_grad()
        (model(torch.arange(24).view(4, 6) % 9)).square().mean().backward()
        optim.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, (p for p in model.parameters() if p.requires_grad)))


@pytest.mark.parametrize("variant", ["full", "efficient"])
def test_trainer_takes_it(variant, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, max_position_embeddings=16, **shape))
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )
    made = for_trainer("lora_pro", model, lr=1e-3, variant=variant)
    trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=made)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, LoraPro)
    assert all(pair.b.any() for pair in pairs(model).values())
    after = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, after[n]) for n, p in model.named_parameters() if p.requires_grad)
