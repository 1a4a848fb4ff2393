"""LoLDU against its specification, computed here in float64 from LAPACK's own P, L and U."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import weft
from weft.adapters._delta import leaves
from weft.adapters.loldu import LolduDelta, ldu

SIDES = st.integers(1, 12)


class Net(nn.Module):
    """A tall, a square and a wide linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tall = nn.Linear(7, 13)
        self.square = nn.Linear(13, 13, bias=False)
        self.wide = nn.Linear(13, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.square(torch.tanh(self.tall(x)))))


NAMES = ("tall", "square", "wide")


def attach(net: nn.Module, **options: object) -> tuple[PeftModel, list[LolduDelta]]:
    model = get_peft_model(net, weft.LolduConfig(**{"target_modules": list(NAMES), **options}))
    deltas = [d for m in model.modules() if hasattr(m, "deltas") for d in leaves(m.deltas["default"])]
    return model, deltas


def inputs(n: int = 6) -> Tensor:
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(2))


def move(deltas: list[LolduDelta]) -> None:
    generator = torch.Generator().manual_seed(3)
    for d in deltas:
        d.z.data += 0.3 * torch.randn(d.z.shape, generator=generator).to(d.z)


def lapack(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P·L, D and U with a unit diagonal."""
    p, lower, upper = torch.linalg.lu(w.detach().double())
    d = upper.diagonal()
    return p @ lower, d, upper / d[:, None]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(out=SIDES, in_=SIDES, seed=st.integers(0, 99), data=st.data())
def test_the_factors_are_the_first_of_a_pivoted_ldu(out: int, in_: int, seed: int, data: st.DataObject) -> None:
    k = min(out, in_)
    w = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    b, d, u = ldu(w, k)
    torch.testing.assert_close((b * d) @ u, w, rtol=0, atol=1e-9)
    # rows of B in the pivots' order are unit lower triangular with entries of at most 1; U is unit upper triangular
    p, lower, _ = torch.linalg.lu(w)
    torch.testing.assert_close(p.mT @ b, lower, rtol=1e-9, atol=1e-9)
    lower = p.mT @ b
    assert torch.equal(lower.triu(1), torch.zeros_like(lower)) and torch.equal(lower.diagonal(), torch.ones_like(d))
    assert b.abs().max() <= 1 + 1e-12
    assert torch.equal(u.tril(-1), torch.zeros_like(u)) and torch.equal(u.diagonal(), torch.ones_like(d))
    # fewer pivots are the first of all of them
    r = data.draw(st.integers(1, k))
    for part, whole in zip(ldu(w, r), (b[:, :r], d[:r], u[:r]), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(out=SIDES, in_=SIDES, rank=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_singular_weight_has_finite_factors(out: int, in_: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, rank, generator=generator) @ torch.randn(rank, in_, generator=generator)
    b, d, u = ldu(w, min(out, in_))
    assert b.isfinite().all() and u.isfinite().all() and b.abs().max() <= 1
    assert int((d != 0).sum()) <= rank
    assert torch.equal(u.diagonal(), torch.ones_like(d)) and torch.equal(u.tril(-1), torch.zeros_like(u))
    assert torch.equal(u[d == 0], torch.eye(*u.shape, dtype=u.dtype)[d == 0])


def test_a_component_without_a_pivot_learns_from_zero() -> None:
    net = Net()
    net.square.weight.data[:, 4] = 0
    net.square.weight.data[2] = 0
    plain = {name: p.detach().clone() for name, p in net.named_parameters()}
    model, (_, d, _) = attach(net)
    assert d.z[4] == 0 and torch.equal(d.A[4], torch.eye(13)[4])
    base = Net()
    base.load_state_dict(plain)
    assert torch.equal(model(inputs()), base(inputs()))
    model(inputs()).square().sum().backward()
    assert d.z.grad.isfinite().all() and d.z.grad[4] != 0


def test_it_starts_as_the_base_model_to_the_last_bit() -> None:
    for options in ({}, {"r": 3}, {"lora_alpha": 7.0}):
        model, deltas = attach(Net(), **options)
        assert torch.equal(model(inputs()), Net()(inputs()))
        assert all(torch.equal(d.z, d.D) for d in deltas)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(r=st.integers(1, 5), alpha=st.sampled_from([1.0, 4.0]), n=st.sampled_from([1, 3, 60]))
def test_delta_and_gradient_are_those_of_the_paper(r: int, alpha: float, n: int) -> None:
    net = Net()
    factors = {name: lapack(getattr(net, name).weight) for name in NAMES}
    model, deltas = attach(net, r=r, lora_alpha=alpha)
    move(deltas)
    x = inputs(n)
    y = model(x)
    y.square().sum().backward()
    plain, s = Net().double(), alpha / r
    for name, d in zip(NAMES, deltas, strict=True):
        b, pivots, u = factors[name]
        # the residual and the trained part, as the paper has them
        weight = getattr(plain, name).weight.data
        weight -= s * b[:, :r] @ torch.diag(pivots[:r]) @ u[:r]
        weight += s * b[:, :r] @ torch.diag(d.z.detach().double()) @ u[:r]
        moved = weight - getattr(Net(), name).weight.detach().double()
        torch.testing.assert_close(d.delta().double(), moved, rtol=0, atol=1e-4)
        assert torch.linalg.matrix_rank(d.delta(), tol=1e-4) <= r
    wanted = plain(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    wanted.square().sum().backward()
    for name, d in zip(NAMES, deltas, strict=True):
        b, _, u = factors[name]
        g = getattr(plain, name).weight.grad
        expected = s * torch.stack([b[:, i] @ g @ u[i] for i in range(r)])
        torch.testing.assert_close(d.z.grad.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))
        assert d.count() == r == sum(p.numel() for p in d.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".z")] == []


def test_without_a_diagonal_nothing_is_left() -> None:
    """r = k, s = 1 and z = 0: the weight itself is zero."""
    for name in NAMES:
        net = Net()
        w = getattr(net, name).weight.detach().clone()
        _, (d,) = attach(net, target_modules=[name], lora_alpha=float(min(w.shape)))
        d.z.data.zero_()
        torch.testing.assert_close(w + d.delta(), torch.zeros_like(w), rtol=0, atol=1e-5)


def test_a_convolution_is_factorised_as_a_matrix() -> None:
    net = nn.Sequential()
    torch.manual_seed(2)
    net.add_module("conv", nn.Conv2d(3, 5, (3, 2), stride=2))
    w = net.conv.weight.detach().clone()
    model, (d,) = attach(net, target_modules=["conv"])
    move([d])
    b, pivots, u = lapack(w.flatten(1))
    delta = b @ torch.diag(d.z.detach().double() - pivots) @ u / 5
    x = torch.randn(2, 3, 8, 7)
    wanted = (w.flatten(1).double() + delta) @ nn.functional.unfold(x.double(), (3, 2), stride=2)
    wanted = wanted + net.conv.base_layer.bias.detach().double()[:, None]
    torch.testing.assert_close(model(x).flatten(2).double(), wanted, rtol=1e-4, atol=1e-5)


def test_folding_and_two_thin_products_agree() -> None:
    for rank, folds in ((1, False), (5, True)):
        model, deltas = attach(Net(), r=rank)
        move(deltas)
        x = inputs(4000)
        assert deltas[0].folds(x) is folds
        layer = model.base_model.model.tall
        torch.testing.assert_close(layer(x), layer.base_layer(x) + deltas[0](x), rtol=1e-5, atol=1e-5)


def test_merged_is_unmerged_and_the_export_is_exact(tmp_path) -> None:
    model, deltas = attach(Net(), r=4, lora_alpha=4.0)
    move(deltas)
    x = inputs()
    expected = model(x)
    weft.export(model, tmp_path / "lora", to="lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
    again = PeftModel.from_pretrained(Net(), str(tmp_path / "lora"))
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_base_has_the_factors_of_its_float32_copy() -> None:
    narrow, wide = Net().bfloat16(), Net()
    wide.load_state_dict(narrow.state_dict())
    for a, b in zip(attach(narrow)[1], attach(wide)[1], strict=True):
        for name in ("A", "B", "D", "z"):
            assert getattr(a, name).dtype == torch.float32
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("options", [{}, {"r": 3}])
def test_the_diagonal_alone_is_enough_on_the_same_weights(tmp_path, options: dict) -> None:
    x = inputs()
    model, deltas = attach(Net(), store_factors=False, **options)
    move(deltas)
    model.save_pretrained(tmp_path)
    size = sum(4 * d.count() for d in deltas)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < size + 3 * 256
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))
    other = Net()
    other.square.weight.data[5, 2] += 1e-6
    with pytest.raises(weft.UsageError, match="store_factors=False, and square is not the weight"):
        PeftModel.from_pretrained(other, tmp_path)


def test_stored_factors_are_not_computed_again(tmp_path, monkeypatch) -> None:
    x = inputs()
    model, deltas = attach(Net())
    move(deltas)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("weft.adapters.loldu.ldu", lambda *a: pytest.fail("a factorisation while loading"))
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))


def test_only_the_diagonal_is_ever_trained() -> None:
    model, deltas = attach(Net(), r=2)
    model.requires_grad_(True)
    assert [n for d in deltas for n, _ in d.named_parameters()] == ["z"] * 3
    assert not any(b.requires_grad for d in deltas for b in d.buffers())


def test_a_skeleton_is_counted_without_weights() -> None:
    with torch.device("meta"):
        net = Net()
    _, deltas = attach(net)
    assert [d.count() for d in deltas] == [7, 13, 5] and deltas[0].z.is_meta


def test_decay_of_the_diagonal_is_refused() -> None:
    model, deltas = attach(Net(), r=2)
    model(inputs()).sum().backward()
    with pytest.raises(weft.UsageError, match=r"'z'.*weight_decay=0"):
        torch.optim.AdamW([d.z for d in deltas], weight_decay=0.01).step()


def test_ranks_that_cannot_work_are_refused() -> None:
    with pytest.raises(weft.UsageError, match="r=0"):
        weft.LolduConfig(r=0)
    with pytest.raises(weft.UsageError, match=r"r=6.*wide"):
        attach(Net(), r=6)


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))


def labelled(teacher: nn.Module, n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, teacher(x).argmax(1)


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, rows: int) -> nn.Module:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        i = torch.randint(len(x), (rows,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
    return model


@pytest.mark.slow
def test_factors_of_the_weight_serve_better_than_random_ones_of_their_size() -> None:
    """A trained classifier follows a teacher whose weights moved; both sides train the same 170 numbers."""
    torch.manual_seed(5)
    teacher = classifier()
    for p in teacher.parameters():
        p.data *= 2.5 if p.dim() == 2 else 1.0
    torch.manual_seed(0)
    base = fit(classifier(), *labelled(teacher, 20000, 1), steps=1000, lr=3e-3, rows=128)
    torch.manual_seed(9)
    for p in teacher.parameters():
        if p.dim() == 2:
            p.data += 0.5 * p.data.std() * torch.randn_like(p)
    x, y = labelled(teacher, 8000, 3)

    def accuracy(random: bool, lr: float, seed: int) -> float:
        model = get_peft_model(copy.deepcopy(base), weft.LolduConfig(target_modules=["0", "2", "4"]))
        torch.manual_seed(seed)
        for d in (d for d in model.modules() if random and isinstance(d, LolduDelta)):
            for factor, dim in ((d.B, 0), (d.A, 1)):
                size = factor.norm(dim=dim, keepdim=True)
                factor.normal_()
                factor *= size / factor.norm(dim=dim, keepdim=True)
        fit(model, *labelled(teacher, 2000, 20 + seed), steps=300, lr=lr, rows=64)
        with torch.no_grad():
            return float((model(x).argmax(1) == y).float().mean())

    for seed in range(2):
        ours, drawn = (max(accuracy(random, lr, seed) for lr in (0.3, 1.0)) for random in (False, True))
        assert ours > drawn + 0.01
