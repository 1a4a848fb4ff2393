"""SVFit against its specification, computed here in float64, and against PEFT's PSOFT without its extras."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PsoftConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.adapters._delta import leaves
from weft.adapters.svfit import SvfitDelta


class Net(nn.Module):
    """A wide and a tall linear layer."""

    def __init__(self, sides: tuple[int, int, int] = (7, 13, 5)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(sides[0], sides[1])
        self.second = nn.Linear(sides[1], sides[2], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def attach(net: nn.Module, **options) -> tuple[PeftModel, list[SvfitDelta]]:
    options = {"target_modules": ["first", "second"], **options}
    model = get_peft_model(net, weft.SvfitConfig(**options))
    deltas = [d for m in model.modules() if hasattr(m, "deltas") for d in leaves(m.deltas["default"])]
    return model, deltas


def inputs(n: int = 6, width: int = 7) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(2))


def move(deltas: list[SvfitDelta]) -> None:
    generator = torch.Generator().manual_seed(3)
    for d in deltas:
        d.sigma.data += 0.3 * torch.randn(d.sigma.shape, generator=generator)


def expected_delta(d: SvfitDelta, w: Tensor) -> Tensor:
    """B·diag(σ − S)·A from LAPACK's SVD of W, in float64; the signs of the vectors cancel."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    r = len(d.sigma)
    return u[:, :r] @ torch.diag(d.sigma.double() - s[:r]) @ vh[:r]


def test_it_starts_as_the_base_model_to_the_last_bit():
    x = inputs()
    model, _ = attach(Net())
    assert torch.equal(model(x), Net()(x))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.sampled_from([1, 3, 50]))
def test_delta_and_gradient_are_those_of_the_paper(r, n):
    net = Net()
    weights = {"first": net.first.weight.detach().clone(), "second": net.second.weight.detach().clone()}
    model, deltas = attach(net, r=r)
    move(deltas)
    x = inputs(n)
    model(x).square().sum().backward()
    # G: the gradient on a weight into which ΔW was folded, by autograd in float64
    plain = Net().double()
    for name, d in zip(weights, deltas, strict=True):
        getattr(plain, name).weight.data += expected_delta(d, weights[name]).detach()
    y = plain(x.double())
    torch.testing.assert_close(model(x).double(), y, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    for name, d in zip(weights, deltas, strict=True):
        torch.testing.assert_close(d.delta().double(), expected_delta(d, weights[name]), rtol=0, atol=1e-5)
        u, _, vh = torch.linalg.svd(weights[name].double(), full_matrices=False)
        g = getattr(plain, name).weight.grad
        torch.testing.assert_close(
            d.sigma.grad.double(), (u[:, :r].mT @ g @ vh[:r].mT).diagonal(), rtol=1e-4, atol=1e-4 * float(g.norm())
        )
        assert torch.linalg.matrix_rank(d.delta(), tol=1e-5) <= r
    assert [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("sigma")] == []


def test_doubling_every_singular_value_doubles_the_weight():
    net = Net()
    w = net.first.weight.detach().clone()
    model, (first, _) = attach(net, energy=1.0)
    assert first.count() == 7
    first.sigma.data *= 2
    torch.testing.assert_close(w + first.delta(), 2 * w)


def test_signs_of_the_singular_vectors_do_not_matter():
    x, found = inputs(), []
    for flip in (False, True):
        model, deltas = attach(Net(), r=4)
        move(deltas)
        for d in deltas if flip else []:
            signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
            d.B *= signs
            d.A *= signs[:, None]
        y = model(x)
        y.sum().backward()
        found.append((y.detach(), [d.sigma.grad for d in deltas]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_energy_picks_the_fewest_values():
    net = Net((4, 9, 5))
    u, _, vh = torch.linalg.svd(net.first.weight.detach(), full_matrices=False)
    net.first.weight.data = (u * torch.tensor([10.0, 1.0, 1.0, 1.0])) @ vh  # two hold 101 / 103 = 0.981
    for energy, r in ((0.98, 2), (0.99, 3), (1.0, 4)):
        _, deltas = attach(copy.deepcopy(net), target_modules=["first"], energy=energy)
        assert [d.count() for d in deltas] == [r] == [d.sigma.numel() for d in deltas]


def test_psoft_with_a_diagonal_core_is_the_same_adapter():
    x = inputs()
    model, deltas = attach(Net(), r=4)
    move(deltas)
    extras = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False, "psoft_alpha": 4}
    config = PsoftConfig(r=4, target_modules=["first", "second"], ab_svd_init="psoft_init", **extras)
    oracle = get_peft_model(Net(), config)
    for name, d in zip(("first", "second"), deltas, strict=True):
        (core,) = getattr(oracle.base_model.model, name).psoft_R["default"].parameters()
        core.data.copy_(torch.diag(d.sigma / d.S))
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-5, atol=1e-6)
    assert float((oracle(x) - Net()(x)).norm()) > 0.01


def test_folding_and_two_thin_products_agree():
    for rank, folds in ((1, False), (5, True)):
        model, deltas = attach(Net(), r=rank)
        move(deltas)
        x = inputs(4000)
        assert deltas[0].folds(x) is folds
        layer = model.base_model.model.first
        apart = layer.base_layer(x) + deltas[0](x)
        torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-5)


def test_the_blocks_of_a_fused_projection_are_decomposed_each_for_itself():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.c_attn = Conv1D(15, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_attn(x)

    net = Attention()
    w = net.c_attn.weight.detach().T  # 15 × 6: rows of query, key, value
    _, deltas = attach(net, target_modules=["c_attn"], r=2)
    assert len(deltas) == 3
    for d, block in zip(deltas, w.split(5), strict=True):
        torch.testing.assert_close(d.S, torch.linalg.svdvals(block)[:2])
    _, deltas = attach(Attention(), target_modules=["c_attn"], r=2, split_qkv=False)
    assert len(deltas) == 1
    torch.testing.assert_close(deltas[0].S, torch.linalg.svdvals(w)[:2])


def test_a_bfloat16_base_has_the_factors_of_its_float32_copy():
    narrow = Net().bfloat16()
    wide = Net()
    wide.load_state_dict(narrow.state_dict())
    (a, *_), (b, *_) = attach(narrow, r=3)[1], attach(wide, r=3)[1]
    for name in ("A", "B", "S", "sigma"):
        assert getattr(a, name).dtype == torch.float32
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("options", [{}, {"r": 3}, {"r": 3, "svd": "sketch"}])
def test_singular_values_alone_are_enough_on_the_same_weights(tmp_path, options):
    x = inputs()
    model, deltas = attach(Net(), store_factors=False, **options)
    move(deltas)
    model.save_pretrained(tmp_path)
    size = sum(4 * d.count() for d in deltas)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < size + 2 * 256
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(again(x), model(x))
    other = Net()
    other.first.weight.data[5, 2] += 1e-6  # not one of the entries that the sketch of every adapter compares
    with pytest.raises(weft.UsageError, match="first is not the weight"):
        PeftModel.from_pretrained(other, tmp_path)


def test_stored_factors_are_not_computed_again(tmp_path, monkeypatch):
    x = inputs()
    model, deltas = attach(Net())
    move(deltas)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("weft.adapters.svfit.svd_top", lambda *a, **k: pytest.fail("an SVD while loading"))
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))


def test_a_skeleton_is_counted_without_weights():
    with torch.device("meta"):
        net = Net()
    _, deltas = attach(net, r=3)
    assert [d.count() for d in deltas] == [3, 3] and deltas[0].sigma.is_meta


def test_decay_on_singular_values_is_refused():
    model, deltas = attach(Net(), r=2)
    model(inputs()).sum().backward()
    with pytest.raises(weft.UsageError, match="'sigma'.*weight_decay=0"):
        torch.optim.AdamW([d.sigma for d in deltas], weight_decay=0.01).step()
    torch.optim.AdamW([d.sigma for d in deltas], weight_decay=0.0).step()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"r": 0}, "r=0"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"svd": "fast", "r": 2}, "svd='fast'"),
        ({"svd": "sketch"}, "set r"),
    ],
)
def test_values_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(weft.UsageError, match=sentence):
        weft.SvfitConfig(**options)


def test_a_rank_above_a_side_is_refused():
    with pytest.raises(weft.UsageError, match="r=6.*second"):
        attach(Net(), r=6)
