"""SALT against its specification, computed here in float64."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import weft
from weft.adapters._delta import leaves
from weft.adapters.salt import SaltDelta, product_norm


class Net(nn.Module):
    """A wide and a tall linear layer."""

    def __init__(self, sides: tuple[int, int, int] = (9, 17, 7)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(sides[0], sides[1])
        self.second = nn.Linear(sides[1], sides[2], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Conv(nn.Module):
    """One convolution with a stride, or one in groups."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Lookup(nn.Module):
    """An embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Embedding(23, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def attach(net: nn.Module, **options: object) -> tuple[PeftModel, list[SaltDelta]]:
    names = [name for name in ("first", "second") if hasattr(net, name)]
    model = get_peft_model(net, weft.SaltConfig(**{"target_modules": names, **options}))
    deltas = [d for m in model.modules() if hasattr(m, "deltas") for d in leaves(m.deltas["default"])]
    return model, deltas


def inputs(n: int = 6, width: int = 9) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(2))


def move(deltas: list[SaltDelta], scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in (p for d in deltas for p in d.parameters()):
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def svd(d: SaltDelta) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ in the delta's own basis, on which X and Y depend, in float64."""
    return torch.cat([d.B, d.B_rest], 1).double(), d.S.double(), torch.cat([d.A, d.A_rest]).double()


def expected_delta(d: SaltDelta, relu: str) -> Tensor:
    """U·M·Vᵀ − U·diag(S)·Vᵀ with M written out as the paper has it."""
    u, s, vh = svd(d)
    a, b, x, y = (p.detach().double() for p in (d.a, d.b, d.X, d.Y))
    top = torch.diag(a * s[: d.r] + b)
    if relu == "diag":
        top = top.relu()
    m = torch.block_diag(top, torch.diag(s[d.r :]) + x @ y)
    return u @ ((m.relu() if relu == "all" else m) - torch.diag(s)) @ vh


def test_the_factors_are_a_decomposition_of_the_weight() -> None:
    net = Net()
    weights = net.first.weight.detach().double(), net.second.weight.detach().double()
    _, deltas = attach(net, r=3)
    for d, w in zip(deltas, weights, strict=True):
        u, s, vh = svd(d)
        torch.testing.assert_close(s, torch.linalg.svdvals(w), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close((u * s) @ vh, w, rtol=0, atol=1e-6)
        torch.testing.assert_close(u.mT @ u, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(vh @ vh.mT, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("relu", ["diag", "all", "none"])
def test_it_starts_as_the_base_model_to_the_last_bit_without_a_penalty(relu: str) -> None:
    x = inputs()
    model, deltas = attach(Net(), relu=relu, reg_multiplier=1.0)
    assert torch.equal(model(x), Net()(x))
    assert [float(d.penalty()) for d in deltas] == [0.0, 0.0]
    for d in deltas:
        bound = math.sqrt(6 / (21 * d.rank))  # of a Kaiming-uniform draw with a = √20
        assert 0.6 * bound < d.X.abs().max() <= bound and not d.Y.any()
        (gradient,) = torch.autograd.grad(d.penalty(), d.X)
        assert not gradient.any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    relu=st.sampled_from(["diag", "all", "none"]),
    r=st.integers(1, 7),
    l=st.integers(1, 9),
    n=st.sampled_from([1, 3, 60]),
)
def test_delta_and_gradients_are_those_of_the_paper(relu: str, r: int, l: int, n: int) -> None:
    net = Net()
    model, deltas = attach(net, r=r, r_lora=l, relu=relu)
    move(deltas)
    x = inputs(n)
    y = model(x)
    y.square().sum().backward()
    # G: the gradient on a weight into which ΔW was folded, by autograd in float64
    plain = Net().double()
    for name, d in zip(("first", "second"), deltas, strict=True):
        getattr(plain, name).weight.data += expected_delta(d, relu)
    wanted = plain(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    wanted.square().sum().backward()
    for name, d in zip(("first", "second"), deltas, strict=True):
        torch.testing.assert_close(d.delta().double(), expected_delta(d, relu), rtol=0, atol=1e-5)
        b, a = d.factors()
        torch.testing.assert_close(b @ a, d.delta(), rtol=0, atol=1e-5)
        u, s, vh = svd(d)
        g = u.mT @ getattr(plain, name).weight.grad @ vh.mT
        entries = d.a.detach().double() * s[:r] + d.b.detach().double()
        open_ = torch.ones_like(entries) if relu == "none" else (entries > 0).double()
        diagonal = g.diagonal()[:r] * open_
        rest, x_, y_ = g[r:, r:], d.X.detach().double(), d.Y.detach().double()
        if relu == "all":
            rest = rest * (torch.diag(s[r:]) + x_ @ y_ > 0)
        expected = {"a": s[:r] * diagonal, "b": diagonal, "X": rest @ y_.mT, "Y": x_.mT @ rest}
        for key, value in expected.items():
            found = getattr(d, key).grad
            torch.testing.assert_close(found.double(), value, rtol=1e-3, atol=1e-4 * float(g.norm()), msg=key)
        rank = min(r + min(l, len(s) - r), len(s))
        assert d.count() == 2 * r + 2 * min(l, len(s) - r) * (len(s) - r) == sum(p.numel() for p in d.parameters())
        if relu != "all":
            assert b.shape[1] == rank and torch.linalg.matrix_rank(d.delta(), tol=1e-4) <= rank


def test_a_clipped_value_removes_exactly_its_component() -> None:
    net = Net()
    w = net.first.weight.detach().clone()
    for relu in ("diag", "all"):
        _, (d, _) = attach(Net(), r=4, relu=relu)
        d.b.data[2] = -d.S[2] - 1
        u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
        torch.testing.assert_close(
            (w + d.delta()).double(), w.double() - s[2] * torch.outer(u[:, 2], vh[2]), rtol=0, atol=1e-5
        )
    _, (d, _) = attach(Net(), r=4, relu="none")
    d.b.data[2] = -d.S[2] - 1  # without the cut it changes sign
    torch.testing.assert_close(
        (w + d.delta()).double(), w.double() - (s[2] + 1) * torch.outer(u[:, 2], vh[2]), rtol=0, atol=1e-5
    )


def test_the_authors_relu_starts_with_a_diagonal_gradient() -> None:
    """Y learns from the diagonal of the residual block alone, and X·Y never falls below zero beside it."""
    found = {}
    for relu in ("diag", "all"):
        torch.manual_seed(0)
        model, (d, _) = attach(Net(), r=2, r_lora=3, relu=relu)
        model(inputs(40)).square().sum().backward()
        found[relu] = d.X.detach(), d.Y.grad
    (x, whole), (same, cut) = found["diag"], found["all"]
    assert torch.equal(x, same)
    # Xᵀ·(G ∘ I): every column is a multiple of a row of X
    scale = (cut * x.mT).sum(0) / x.square().sum(1)
    torch.testing.assert_close(cut, x.mT * scale, rtol=1e-4, atol=1e-4 * float(cut.norm()))
    assert float((whole - x.mT * ((whole * x.mT).sum(0) / x.square().sum(1))).norm()) > 0.1 * float(whole.norm())
    model, (d, _) = attach(Net(), r=2, relu="all")
    move([d])
    m = (d.B_rest.mT @ (d.delta() + Net().first.weight) @ d.A_rest.mT).detach()
    assert m.min() > -1e-5 and (d.X @ d.Y).min() < -0.1


def test_a_value_that_is_zero_from_the_start_can_learn() -> None:
    net = Net()
    net.first.weight.data.zero_()
    model, (d, _) = attach(net, r=3)
    model(inputs()).sum().backward()
    assert d.b.grad.abs().min() > 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("relu", ["diag", "all", "none"])
def test_a_convolution_is_a_linear_layer_on_patches(relu: str, groups: int) -> None:
    model, (d,) = attach(Conv(groups), r=3, r_lora=2, relu=relu)
    model = model.double()
    move([d])
    x = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = Conv(groups).double()
    w = net.first.weight.detach().flatten(1) + expected_delta(d, relu)
    parts = nn.functional.unfold(x, (3, 2), padding=1, stride=(2, 1)).chunk(groups, 1)
    patches = [rows @ part for rows, part in zip(w.chunk(groups), parts, strict=True)]
    wanted = torch.cat(patches, 1) + net.first.bias.detach()[:, None]
    torch.testing.assert_close(model(x).flatten(2), wanted, rtol=1e-9, atol=1e-9)
    layer = model.base_model.model.first
    torch.testing.assert_close(layer.base_layer(x) + d(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", ["diag", "all", "none"])
def test_an_embedding_looks_up_rows_of_the_sum(relu: str) -> None:
    model, (d,) = attach(Lookup(), r=2, r_lora=3, relu=relu)
    model = model.double()
    move([d])
    x = torch.tensor([[3, 22], [0, 3]])
    wanted = (Lookup().first.weight.detach().double() + expected_delta(d, relu).mT)[x]
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", ["diag", "all"])
def test_a_bfloat16_model_is_served(relu: str) -> None:
    model, deltas = attach(Net().bfloat16(), r=3, relu=relu)
    copies = Net()
    copies.load_state_dict(Net().bfloat16().state_dict())
    _, same = attach(copies, r=3, relu=relu)
    for d, e in zip(deltas, same, strict=True):
        for name in ("A", "B", "S", "A_rest", "B_rest", "a", "b"):
            assert getattr(d, name).dtype == torch.float32 and torch.equal(getattr(d, name), getattr(e, name)), name
    move(deltas)
    x = inputs()
    plain = Net().bfloat16().double()
    for name, d in zip(("first", "second"), deltas, strict=True):
        getattr(plain, name).weight.data += expected_delta(d, relu)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), plain(x.bfloat16().double()), rtol=0.05, atol=0.1)


def test_folding_and_thin_products_agree() -> None:
    for r, l, folds in ((1, 1, False), (5, 2, True)):
        model, deltas = attach(Net(), r=r, r_lora=l)
        move(deltas)
        x = inputs(4000)
        assert deltas[0].folds(x) is folds
        layer = model.base_model.model.first
        torch.testing.assert_close(layer(x), layer.base_layer(x) + deltas[0](x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("relu", ["diag", "all"])
def test_the_penalty_is_two_norms_a_layer(relu: str) -> None:
    found = {}
    for coefficient in (0.0, 0.7):
        model, deltas = attach(Net(), r=2, r_lora=3, relu=relu, reg_multiplier=coefficient)
        model = model.double()
        torch.manual_seed(0)
        for d in deltas:
            nn.init.normal_(d.X)
        move(deltas)
        model(inputs().double()).square().sum().backward()
        found[coefficient] = [p.grad for d in deltas for p in (d.a, d.b, d.X, d.Y)]
    expected: list[Tensor] = []
    for d in deltas:
        a, b, x, y = (p.detach().clone().requires_grad_() for p in (d.a, d.b, d.X, d.Y))
        s = d.S[:2]
        value = 0.7 * (torch.diag(a * s + b - s).norm() + (x @ y).norm())
        torch.testing.assert_close(d.penalty(), value)
        expected += torch.autograd.grad(value, [a, b, x, y])
    difference = [b - a for a, b in zip(*found.values(), strict=True)]
    torch.testing.assert_close(difference, expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(m=st.integers(0, 9), l=st.integers(0, 9), seed=st.integers(0, 99))
def test_the_norm_of_a_product_needs_no_product(m: int, l: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, l, generator=generator, requires_grad=True)
    y = torch.randn(l, m, generator=generator, requires_grad=True)
    found = torch.autograd.grad(product_norm(x, y), [x, y])
    wide = [x.detach().double().requires_grad_(), y.detach().double().requires_grad_()]
    value = (wide[0] @ wide[1]).norm()
    expected = torch.autograd.grad(value, wide)
    torch.testing.assert_close(product_norm(x, y).double(), value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close([g.double() for g in found], list(expected), rtol=1e-5, atol=1e-5)


def test_a_tenth_of_the_values_and_never_none() -> None:
    _, deltas = attach(Net((40, 30, 5)))
    assert [d.r for d in deltas] == [3, 1]
    assert [d.rank for d in deltas] == [8, 4]  # k − r leaves no more than four
    _, deltas = attach(Net((40, 30, 5)), ratio=1.0)
    assert [(d.r, d.rank, d.count()) for d in deltas] == [(30, 0, 60), (5, 0, 10)]


def test_all_values_alone_train_save_and_load(tmp_path) -> None:
    """r = k leaves no rest: X and Y are empty."""
    model, deltas = attach(Net(), ratio=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    assert all(float(d.delta().detach().norm()) > 0.1 for d in deltas)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(inputs()), model(inputs()))
    weft.export(model, tmp_path / "lora", to="lora")


@pytest.mark.parametrize(("relu", "rank"), [("diag", 2 + 3), ("none", 2 + 3), ("all", 9)])
def test_the_export_is_exact_whatever_is_cut(tmp_path, relu: str, rank: int) -> None:
    model, deltas = attach(Net(), r=2, r_lora=3, relu=relu)
    move(deltas)
    weft.export(model, tmp_path / "lora", to="lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == rank
    again = PeftModel.from_pretrained(Net(), str(tmp_path / "lora"))
    torch.testing.assert_close(again(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)


def test_what_was_trained_is_enough_on_the_same_weights(tmp_path) -> None:
    x = inputs()
    model, deltas = attach(Net(), store_factors=False)
    move(deltas)
    model.save_pretrained(tmp_path)
    size = sum(4 * d.count() for d in deltas)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < size + 8 * 256
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))
    other = Net()
    other.first.weight.data[5, 2] += 1e-6
    with pytest.raises(weft.UsageError, match="store_factors=False, and first is not the weight"):
        PeftModel.from_pretrained(other, tmp_path)


def test_stored_factors_are_not_computed_again(tmp_path, monkeypatch) -> None:
    x = inputs()
    model, deltas = attach(Net())
    move(deltas)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("weft.adapters.salt.svd_top", lambda *a, **k: pytest.fail("an SVD while loading"))
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))


def test_attaching_leaves_the_weight_and_the_trained_state_alone() -> None:
    """Buffers move with the model, and copies keep what was trained."""
    model, deltas = attach(Net(), r=2)
    move(deltas)
    assert {n for n, _ in deltas[0].named_buffers()} == {"A", "B", "A_rest", "B_rest", "S"}
    assert torch.equal(copy.deepcopy(model)(inputs()), model(inputs()))
    assert torch.equal(model.base_model.model.first.base_layer.weight, Net().first.weight)


def test_a_skeleton_is_counted_without_weights() -> None:
    with torch.device("meta"):
        net = Net()
    _, deltas = attach(net, r=3, r_lora=2)
    assert [d.count() for d in deltas] == [6 + 4 * 6, 6 + 4 * 4] and deltas[0].X.is_meta


def test_decay_of_the_scales_is_refused() -> None:
    model, deltas = attach(Net(), r=2)
    model(inputs()).sum().backward()
    with pytest.raises(weft.UsageError, match=r"'a'.*weight_decay=0"):
        torch.optim.AdamW(deltas[0].parameters(), weight_decay=0.01).step()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "r=0"),
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"ratio": 1.1}, "ratio=1.1"),
        ({"r_lora": 0}, "r_lora=0"),
        ({"relu": "some"}, "relu='some': use diag, all or none"),
        ({"reg_multiplier": -0.1}, "reg_multiplier=-0.1"),
    ],
)
def test_values_that_cannot_work_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        weft.SaltConfig(**options)


def test_a_number_of_values_above_a_side_is_refused() -> None:
    with pytest.raises(weft.UsageError, match=r"r=8.*second"):
        attach(Net(), r=8)
