"""Hydra against its two branches computed one after the other, in float64."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.adapters.hydra import HydraConfig, HydraDelta

BOTH = {"base_bias": True, "branch_bias": True}


def deltas(model: nn.Module) -> list[HydraDelta]:
    return [d for d in model.modules() if isinstance(d, HydraDelta)]


def attach(layer: nn.Module, move: bool = True, **options: object) -> tuple[nn.Module, HydraDelta]:
    """A float64 model of one adapted layer, every trained tensor random: (model, its delta)."""
    torch.manual_seed(1)
    model = peft.get_peft_model(nn.Sequential(layer), HydraConfig(target_modules=["0"], **options)).double()
    (delta,) = deltas(model)
    if move:
        with torch.no_grad():
            for p in delta.parameters():
                p.normal_()
    return model, delta


def linear(in_: int, out: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(in_, out, bias)


def inputs(in_: int) -> Tensor:
    return torch.randn(3, 4, in_, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def branches(d: HydraDelta, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """y of the paper: h₀, then a parallel branch on x and a sequential one on h₀."""
    h0 = x @ w.T + (0 if b is None else b)
    seen = h0 if d.config.base_bias else x @ w.T
    a_p, a_s = (0, 0) if d.a is None else d.a.split([d.r_p, d.r_s])
    parallel = (x @ d.A_p.T + a_p) @ d.B_p.T
    sequential = (seen @ d.A_s.T + a_s) @ d.B_s.T
    return h0 + d.config.scale * (parallel + sequential + (0 if d.c is None else d.c))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    in_=st.integers(1, 9),
    out=st.integers(1, 9),
    r_p=st.integers(0, 3),
    r_s=st.integers(0, 3),
    scale=st.sampled_from([0.1, 1.0, 4.5]),
    bias=st.booleans(),
    base_bias=st.booleans(),
    branch_bias=st.booleans(),
)
def test_forward_and_merge_are_the_two_branches(in_, out, r_p, r_s, scale, bias, base_bias, branch_bias) -> None:
    if not 0 < max(r_p, r_s) <= min(in_, out):
        return
    layer = linear(in_, out, bias)
    w, b = layer.weight.detach().double(), layer.bias.detach().double() if bias else None
    model, d = attach(layer, r_p=r_p, r_s=r_s, scale=scale, base_bias=base_bias, branch_bias=branch_bias)
    x = inputs(in_)
    y = branches(d, x, w, b)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    moved = w + scale * (d.B_p @ d.A_p + d.B_s @ d.A_s @ w)
    stacked = torch.cat([d.B_p, d.B_s], 1) @ torch.cat([d.A_p, d.A_s @ w])
    torch.testing.assert_close(w + scale * stacked, moved, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(w + d.delta(), moved, rtol=1e-10, atol=1e-10)
    assert d.count() == sum(p.numel() for p in d.parameters())
    assert d.count() == r_p * (in_ + out) + 2 * r_s * out + branch_bias * (r_p + r_s + out)
    if branch_bias and not bias:
        with pytest.raises(weft.UsageError, match="0 has no bias"):
            model.merge_adapter()
        return
    model.merge_adapter()
    base = model.base_model.model[0].base_layer
    torch.testing.assert_close(base.weight, moved, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(base.weight, w) and (b is None or torch.equal(base.bias, b))


@pytest.mark.parametrize("init", ["kaiming", "xavier", "normal"])
def test_it_starts_as_the_base_model_to_the_last_bit(init: str) -> None:
    layer = linear(7, 6)
    x = inputs(7)
    expected = copy.deepcopy(layer).double()(x)
    model, d = attach(layer, move=False, r=3, init=init, **BOTH)
    assert torch.equal(model(x), expected)
    assert d.A_p.any() and d.A_s.any() and not any(p.any() for p in (d.B_p, d.B_s, d.a, d.c))
    bounds = {"kaiming": 7**-0.5, "xavier": (6 / (7 + 3)) ** 0.5, "normal": 0.1}
    assert bounds[init] / 4 < float(d.A_p.detach().abs().max()) <= bounds[init]


def test_without_the_sequential_branch_it_is_lora() -> None:
    model, d = attach(linear(7, 6), r_p=3, r_s=0, scale=2.0)
    plain = peft.get_peft_model(nn.Sequential(linear(7, 6)), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    lora = plain.double().base_model.model[0]
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = d.A_p.data, d.B_p.data
    torch.testing.assert_close(model(inputs(7)), plain(inputs(7)), rtol=1e-10, atol=1e-12)


def test_without_the_parallel_branch_it_multiplies_w_from_the_left() -> None:
    layer = linear(7, 6)
    w = layer.weight.detach().double()
    _, d = attach(layer, r_p=0, r_s=2, scale=0.7)
    expected = (torch.eye(6, dtype=torch.float64) + 0.7 * d.B_s @ d.A_s) @ w
    torch.testing.assert_close(w + d.delta(), expected, rtol=1e-10, atol=1e-12)
    assert torch.linalg.matrix_rank(torch.cat([w, d.delta()])) == 6  # its row space is inside W's


@pytest.mark.parametrize("options", [{}, BOTH])
def test_gradients_flow_through_the_frozen_weight(options: dict) -> None:
    model, d = attach(linear(5, 4), r=2, scale=0.5, **options)
    base = model.base_model.model[0].base_layer
    x = inputs(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *d.parameters()))
    model(x).pow(2).sum().backward()
    assert base.weight.grad is None and base.bias.grad is None
    assert all(p.grad is not None and p.grad.any() for p in d.parameters())


def test_every_delta_is_of_the_original_weight() -> None:
    layer = linear(7, 6)
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    model, first = attach(layer, r=2, base_bias=True)
    model.add_adapter("second", HydraConfig(target_modules=["0"], r=3, scale=2.0, base_bias=True))
    model = model.double()
    second = deltas(model)[1]
    nn.init.normal_(second.B_p)
    nn.init.normal_(second.B_s)
    model.base_model.set_adapter(["default", "second"])
    x = inputs(7)
    y = branches(first, x, w, b) + branches(second, x, w, b) - (x @ w.T + b)
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    model.merge_adapter(["default"])
    assert torch.equal(second.unmerged(), w) and torch.equal(second.bias(), b)
    model.merge_adapter(["second"])
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("layer", [nn.Linear(7, 9), Conv1D(9, 7)], ids=["Linear", "Conv1D"])
def test_a_copied_model_reads_its_own_weight(layer: nn.Module, copied) -> None:
    torch.manual_seed(1)
    config = HydraConfig(target_modules=["c_attn"], r=2, base_bias=True)
    model = peft.get_peft_model(nn.ModuleDict({"c_attn": copy.deepcopy(layer)}), config)  # three branches of 3 rows
    assert len(deltas(model)) == 3
    for p in (p for d in deltas(model) for p in d.parameters()):
        nn.init.normal_(p)
    apply = [m["c_attn"] for m in (model.base_model.model, copied(model.base_model.model))]
    x = inputs(7).float()
    y = apply[0](x)
    assert torch.equal(apply[1](x), y)
    with torch.no_grad():
        apply[1].base_layer.weight.zero_()
        apply[1].base_layer.bias.zero_()
    assert torch.equal(apply[0](x), y)
    parallel = torch.cat([x @ d.A_p.T @ d.B_p.T for d in apply[1].deltas["default"].leaves], dim=-1)
    torch.testing.assert_close(apply[1](x), parallel)


def test_query_key_and_value_are_not_mixed() -> None:
    found = []
    for split in (True, False):
        torch.manual_seed(1)
        net = nn.ModuleDict({"c_attn": Conv1D(9, 7)})
        model = peft.get_peft_model(net, HydraConfig(target_modules=["c_attn"], r_p=0, r_s=1, split_qkv=split))
        for d in deltas(model):
            nn.init.ones_(d.B_s)
        with torch.no_grad():
            layer = model.base_model.model["c_attn"]
            layer.base_layer.weight[:, 3:] = 0  # only the query is not zero
            found.append(layer(inputs(7).float())[..., 3:].abs().max())
    assert found[0] == 0 and found[1] > 0


@pytest.mark.parametrize("options", [{"base_bias": False}, BOTH], ids=["without biases", "with"])
def test_on_a_convolution_the_sequential_branch_sees_the_output_channels(options: dict) -> None:
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1)
    base = copy.deepcopy(layer).double()
    model, d = attach(layer, r=2, scale=0.5, **options)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    h0 = base(x)
    seen = h0 if d.config.base_bias else h0 - base.bias.view(-1, 1, 1)
    a_p, a_s = (torch.zeros(2, dtype=x.dtype),) * 2 if d.a is None else d.a.split(2)
    hidden = torch.einsum("rc,bchw->brhw", d.A_s, seen) + a_s.view(-1, 1, 1)
    parallel = nn.functional.conv2d(x, d.A_p.view(2, 3, 3, 2), a_p, stride=2, padding=1)
    branch = torch.einsum("or,brhw->bohw", d.B_s, hidden) + torch.einsum("or,brhw->bohw", d.B_p, parallel)
    shift = 0 if d.c is None else d.c.view(-1, 1, 1)
    torch.testing.assert_close(model(x), h0 + 0.5 * (branch + shift), rtol=1e-10, atol=1e-10)


def test_dropout_is_between_the_projections() -> None:
    layer = linear(7, 6)
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    model, d = attach(layer, r=2, dropout=0.5, scale=0.3, **BOTH)
    x = inputs(7)
    h0 = x @ w.T + b
    torch.manual_seed(5)
    y = model.train()(x)
    torch.manual_seed(5)
    kept = nn.functional.dropout(torch.cat([x @ d.A_p.T, h0 @ d.A_s.T], dim=-1) + d.a, 0.5)
    expected = h0 + 0.3 * (kept @ torch.cat([d.B_p, d.B_s], dim=1).T + d.c)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_no_copy_of_the_weight_waits_for_the_backward_pass() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(40, 30)).bfloat16(), HydraConfig(target_modules=["0"], r=2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(torch.randn(8, 40, dtype=torch.bfloat16))
    assert kept and all(t.numel() < 40 * 30 for t in kept)
    y.sum().backward()


def test_a_moved_bias_leaves_with_the_lora(tmp_path) -> None:
    """One module with a bias and one without: PEFT's LoRA then has a bias in both."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(7, 6), "out": nn.Linear(6, 5, bias=False)})

    model = peft.get_peft_model(net(), HydraConfig(target_modules=["fc", "out"], r=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    report = weft.export(model, tmp_path / "out", to="lora")
    assert "a plain LoRA of 2 modules" in report and "with biases (lora_bias)" in report
    lora = peft.PeftModel.from_pretrained(net(), tmp_path / "out")
    x = torch.randn(4, 7)

    def through(m: peft.PeftModel) -> Tensor:
        inner = m.base_model.model
        return inner["out"](torch.tanh(inner["fc"](x)))

    assert torch.allclose(through(lora), through(model), atol=1e-4)
    assert type(lora.base_model.model["fc"]).__module__.startswith("peft.")
    llama_model = peft.get_peft_model(llama(), HydraConfig())  # which has no biases
    report = weft.export(llama_model, tmp_path / "llama", to="lora")
    assert "a plain LoRA of 14 modules" in report and "lora_bias" not in report


def test_a_bias_beside_an_embedding_is_no_lora(tmp_path) -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(9, 7), "fc": nn.Linear(7, 6)})
    model = peft.get_peft_model(net, HydraConfig(target_modules=["embed", "fc"], r=2))
    with pytest.raises(weft.UsageError, match="hydra moves the bias of fc, and a LoRA that holds embed too cannot"):
        weft.export(model, tmp_path / "out", to="lora")


def test_an_embedding_has_no_place_for_a_bias() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(9, 5)})
    with pytest.raises(weft.UsageError, match="hydra moves biases, and embed has no place for one"):
        peft.get_peft_model(net, HydraConfig(target_modules=["embed"], r=2, branch_bias=True))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r_p": 0, "r_s": 0}, "r_p=0 and r_s=0: ranks are 0 or more, and not both 0"),
        ({"r_s": -1}, "r_s=-1"),
        ({"init": "zero"}, "init='zero': use kaiming, xavier, normal"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        HydraConfig(**options)


@pytest.mark.slow
def test_where_in_is_larger_than_out_both_branches_beat_either_at_equal_parameters() -> None:
    """W* = (I + rank 2)·W + rank 2 on a weight shaped like an MLP's second layer, 48 × 96."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    u, _, vh = torch.linalg.svd(normal(48, 96), full_matrices=False)
    w = 4 * (u * torch.exp(-torch.arange(48) / 10)) @ vh  # the spectrum decays, as it does after training
    wanted = w + normal(48, 2) @ normal(2, 48) @ w / 48 + normal(48, 2) @ normal(2, 96) / 136
    x = normal(1024, 96)
    y = x @ wanted.T + 0.01 * normal(1024, 48)

    def fit(config: peft.PeftConfig, lr: float) -> float:
        torch.manual_seed(0)
        layer = nn.Linear(96, 48, bias=False)
        layer.weight.data = w.clone()
        model = peft.get_peft_model(nn.Sequential(layer), config)
        assert model.get_nb_trainable_parameters()[0] <= 480
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for step in range(300):
            some = slice(64 * (step % 16), 64 * (step % 16) + 64)
            optimizer.zero_grad()
            (model(x[some]) - y[some]).pow(2).mean().backward()
            optimizer.step()
        return float((model.base_model.model[0].get_delta_weight("default") - (wanted - w)).norm())

    both, lora, sequential = (
        min(fit(config, lr) for lr in (3e-3, 1e-2, 3e-2))
        for config in (
            HydraConfig(r=2, target_modules=["0"]),
            peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"]),
            HydraConfig(r_p=0, r_s=5, target_modules=["0"]),
        )
    )
    assert both < 0.5 * min(lora, sequential)
