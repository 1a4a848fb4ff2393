"""Block-LoRA against PEFT's LoRA with the shared blocks written out, in float64."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weft
from weft.adapters.block_lora import BlockLoraConfig, BlockLoraDelta


def attach(in_: int, out: int, **options: object) -> tuple[nn.Module, BlockLoraDelta]:
    torch.manual_seed(1)
    config = BlockLoraConfig(target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(in_, out)), config).double()
    (delta,) = (d for d in model.modules() if isinstance(d, BlockLoraDelta))
    return model, delta


def lora(in_: int, out: int, **options: object) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
    """The same base weights (both draw them first) with PEFT's LoRA: model, A, B."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(in_, out)), config).double()
    layer = model.base_model.model[0]
    return model, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def data(in_: int, out: int, step: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    return tuple(torch.randn(9, side, generator=source, dtype=torch.float64) for side in (in_, out))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    base = model.base_model.model[0].base_layer
    for step in range(steps):
        x, y = data(base.in_features, base.out_features, step)
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(in_=st.integers(1, 13), out=st.integers(1, 13), n=st.integers(1, 4), q=st.integers(1, 3))
def test_it_is_a_lora_of_the_nominal_rank_with_a_repeated_a(in_: int, out: int, n: int, q: int) -> None:
    if n * q > min(in_, out):
        return
    model, d = attach(in_, out, r=n * q, n_blocks=n, lora_alpha=3.0)
    plain, a, b = lora(in_, out, r=n * q, lora_alpha=3)
    with torch.no_grad():
        d.B.normal_()
        a.copy_(torch.cat([d.A] * n))  # A_s stacked n times; the arms side by side
        b.copy_(d.B)
    x, _ = data(in_, out)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-12)
    assert torch.linalg.matrix_rank(d.delta()) <= q
    assert d.count() == d.A.numel() + d.B.numel() == q * in_ + n * q * out


@pytest.mark.parametrize(("r", "n", "q"), [(3, 2, 2), (5, 4, 2), (1, 2, 1), (2, 8, 1), (7, 3, 3)])
def test_blocks_that_do_not_divide_the_rank(r: int, n: int, q: int) -> None:
    _, d = attach(11, 8, r=r, n_blocks=n, lora_alpha=2.0)
    nn.init.normal_(d.B)
    assert d.A.shape == (q, 11)
    expected = sum(torch.outer(d.B[:, i], d.A[i % q]) for i in range(r)) * 2.0 / r
    torch.testing.assert_close(d.delta(), expected, rtol=1e-12, atol=1e-14)
    assert d.count() == d.A.numel() + d.B.numel() == q * 11 + r * 8


def test_one_block_is_lora_gradients_included() -> None:
    model, d = attach(7, 6, r=3, n_blocks=1)
    plain, a, b = lora(7, 6, r=3, lora_alpha=16)
    with torch.no_grad():
        d.B.normal_()
        a.copy_(d.A)
        b.copy_(d.B)
    x, y = data(7, 6)
    for m in (model, plain):
        (m(x) - y).pow(2).mean().backward()
    torch.testing.assert_close((d.A.grad, d.B.grad), (a.grad, b.grad), rtol=1e-10, atol=1e-14)


def test_arms_stay_bit_identical() -> None:
    model, d = attach(7, 6, r=6, n_blocks=3, dropout=0.3)
    assert not d.B.any()
    optimizer = torch.optim.AdamW([d.A, d.B], lr=0.02, weight_decay=0.1)
    for _ in range(5):
        train(model.train(), optimizer, 1)
        for first, *others in (d.B.grad.split(2, dim=1), d.B.detach().split(2, dim=1)):
            assert first.any() and all(torch.equal(first, other) for other in others)


def test_the_gradient_of_an_arm_does_not_know_its_value() -> None:
    """Why arms that start apart would stay a re-parameterisation of their sum."""
    model, d = attach(7, 6, r=4, n_blocks=2)
    nn.init.normal_(d.B)
    x, y = data(7, 6)
    (model(x) - y).pow(2).mean().backward()
    one, other = d.B.grad.split(2, dim=1)
    assert torch.equal(one, other) and not torch.equal(*d.B.split(2, dim=1))


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_the_sum_moves_as_lora_of_the_smaller_rank_with_a_faster_b(make: type, decay: float) -> None:
    n, lr = 4, 0.05
    model, d = attach(9, 7, r=4, n_blocks=n, lora_alpha=8.0)
    plain, a, b = lora(9, 7, r=1, lora_alpha=2)  # the same scale, 2
    a.data.copy_(d.A)
    train(model, make([d.A, d.B], lr=lr, weight_decay=decay), 8)
    groups = [{"params": [a], "weight_decay": decay}, {"params": [b], "lr": n * lr, "weight_decay": decay / n}]
    train(plain, make(groups, lr=lr), 8)
    torch.testing.assert_close(d.A, a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d.B.sum(1, keepdim=True), b, rtol=1e-9, atol=1e-12)
    assert float(b.norm()) > 0.1


@pytest.mark.parametrize(("in_", "n"), [(12, 3), (11, 3), (7, 2), (5, 1)])
def test_a_partitioned_input_adds_its_slices(in_: int, n: int) -> None:
    model, d = attach(in_, 6, r=4, n_blocks=n, lora_alpha=2.0, partition="input")
    piece = -(-in_ // n)
    assert d.A.shape == (4, piece) and float(d.A.detach().abs().max()) <= in_**-0.5
    x, y = data(in_, 6)
    assert torch.equal(model(x), model.base_model.model[0].base_layer(x))
    nn.init.normal_(d.B)
    slices = torch.cat([x, torch.zeros(9, n * piece - in_, dtype=x.dtype)], dim=1).split(piece, dim=1)
    expected = 0.5 * sum(slices) @ d.A.T @ d.B.T
    torch.testing.assert_close(d(x), expected, rtol=1e-10, atol=1e-12)
    (model(x) - y).pow(2).mean().backward()
    g = 2 / y.numel() * (model(x) - y).detach() @ d.B.detach() * 0.5
    torch.testing.assert_close(d.A.grad, g.T @ sum(slices), rtol=1e-9, atol=1e-12)
    assert d.count() == d.A.numel() + d.B.numel() == 4 * (piece + 6)
    assert torch.linalg.matrix_rank(d.delta()) == min(4, piece)


def test_one_mask_for_all_arms() -> None:
    model, d = attach(7, 6, r=4, n_blocks=2, dropout=0.5)
    nn.init.normal_(d.B)
    x = torch.ones(1, 7, dtype=torch.float64)
    torch.manual_seed(5)
    y = model.train()(x) - model.base_model.model[0].base_layer(x)
    torch.manual_seed(5)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, kept @ d.delta().T, rtol=1e-10, atol=1e-12)


def test_a_layer_as_in_the_paper_has_a_quarter_less() -> None:
    _, d = attach(768, 768, r=4, n_blocks=2)
    assert d.count() == 4608 and 4 * (768 + 768) == 6144


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_blocks": 0}, "n_blocks=0 must be at least 1"),
        ({"partition": "output"}, "partition='output'"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        BlockLoraConfig(**options)
