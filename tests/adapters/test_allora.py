"""ALLoRA against gradients written out in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SIZES, llama
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MixtralConfig, MixtralForCausalLM

import weft
from weft.adapters.allora import AlloraConfig, AlloraDelta, amplification, product_row_norms


def deltas(model: nn.Module) -> list[AlloraDelta]:
    return [d for d in model.modules() if isinstance(d, AlloraDelta)]


def one_layer(layer: nn.Module, **options: object) -> tuple[nn.Module, AlloraDelta]:
    """A float64 model of one adapted layer with random factors: (model, its delta)."""
    torch.manual_seed(1)
    model = peft.get_peft_model(nn.Sequential(layer), AlloraConfig(target_modules=["0"], **options)).double()
    (delta,) = deltas(model)
    with torch.no_grad():
        delta.B.normal_()
    return model.train(), delta


def c(norms: Tensor, eta: float) -> Tensor:
    """The paper's coefficient as it is printed."""
    return 1 / torch.sqrt(norms + 1 / eta**2)


def test_the_coefficient_at_known_norms() -> None:
    found = amplification(torch.tensor([0.0, 0.25, 0.75, 4.0], dtype=torch.float64), 2.0)
    expected = torch.tensor([2.0, math.sqrt(2), 1.0, 1 / math.sqrt(4.25)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    assert round(float(found[1]), 8) == 1.41421356 and round(float(found[3]), 8) == 0.48507125


@settings(deadline=None, derandomize=True)
@given(eta=st.floats(1e-3, 1e3))
def test_the_coefficient_is_eta_at_zero_exactly(eta: float) -> None:
    assert amplification(torch.zeros(1, dtype=torch.float64), eta).item() == eta


@settings(deadline=None, derandomize=True)
@given(out=st.integers(1, 40), in_=st.integers(1, 40), r=st.integers(1, 8), size=st.sampled_from([1e-4, 1.0, 1e3]))
def test_norms_by_the_gram_matrix_are_the_dense_norms(out: int, in_: int, r: int, size: float) -> None:
    torch.manual_seed(out + 41 * in_)
    b, a = size * torch.randn(out, r), torch.randn(r, in_)
    b[0] = 0
    dense = (b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(product_row_norms(b, a).double(), dense, rtol=1e-5, atol=1e-5 * float(dense.max()))
    torch.testing.assert_close(product_row_norms(b.double(), a.double()), dense, rtol=1e-9, atol=1e-12 * size)


@pytest.mark.parametrize("options", [{}, {"norm": "param_row"}, {"apply_to": "update"}])
def test_the_forward_is_lora_with_scale_one_bit_for_bit(options: dict) -> None:
    model = peft.get_peft_model(llama(), AlloraConfig(r=4, **options))
    plain = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    loras = {n: m for n, m in plain.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "deltas")}
    assert layers.keys() == loras.keys() and layers
    x = torch.arange(12).reshape(2, 6)
    for name, layer in layers.items():
        d, lora = layer.deltas["default"], loras[name]
        nn.init.normal_(d.B)
        lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = d.A.data, d.B.data
        z = torch.randn(3, 5, d.in_)
        fused = torch.addmm(layer.base_layer(z).flatten(0, 1), (z @ d.A.T).flatten(0, 1), d.B.T).view(3, 5, d.out)
        for mode in (True, False):
            assert torch.equal(layer.train(mode)(z), fused)
    expected = plain.eval()(input_ids=x).logits
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(input_ids=x).logits, expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(out=st.integers(1, 9), in_=st.integers(1, 9), eta=st.sampled_from([0.1, 2.0, 5.0]), data=st.data())
def test_delta_row_scales_what_the_adapter_learns(out: int, in_: int, eta: float, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(out, in_)))
    model, d = one_layer(nn.Linear(in_, out), r=r, eta=eta)
    base = model.base_model.model[0].base_layer
    x = torch.randn(2, 3, in_, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, out, dtype=torch.float64)
    model(x).backward(g)
    a, b = d.A.detach(), d.B.detach()
    scale = c((b @ a).norm(dim=1), eta)
    flat, gf = x.detach().flatten(0, 1), g.flatten(0, 1)
    torch.testing.assert_close(d.B.grad, scale[:, None] * (gf.T @ (flat @ a.T)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(d.A.grad, (gf * scale @ b).T @ flat, rtol=1e-10, atol=1e-12)
    through_adapter, through_base = g * scale @ b @ a, g @ base.weight.detach()
    torch.testing.assert_close(x.grad, through_base + through_adapter, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Conv1d(4, 6, 2, stride=2),
    ],
    ids=["Conv2d", "grouped", "Conv1d"],
)
def test_delta_row_on_convolutions(layer: nn.Module) -> None:
    model, d = one_layer(layer, r=3)
    x = torch.randn(2, 4, *[6] * (layer.weight.dim() - 2), dtype=torch.float64)
    y = model(x)
    g = torch.randn_like(y)
    y.backward(g)
    a, b = d.A.detach().requires_grad_(), d.B.detach().requires_grad_()
    moved = copy.deepcopy(layer).double()
    scale = c((b @ a).detach().norm(dim=1), 2.0).view(-1, *[1] * (layer.weight.dim() - 2))
    functional = torch.nn.functional.conv1d if layer.weight.dim() == 3 else torch.nn.functional.conv2d
    weight = (b @ a).reshape(moved.weight.shape)
    functional(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).backward(g * scale)
    torch.testing.assert_close((d.A.grad, d.B.grad), (a.grad, b.grad), rtol=1e-9, atol=1e-12)


def test_delta_row_on_embeddings() -> None:
    model, d = one_layer(nn.Embedding(9, 5), r=3)
    ids = torch.tensor([[1, 4, 4], [0, 8, 1]])
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    model(ids).backward(g)
    a, b = d.A.detach().requires_grad_(), d.B.detach().requires_grad_()
    scale = c((b @ a).detach().norm(dim=1), 2.0)
    ((b @ a).T[ids] * (g * scale)).sum().backward()
    torch.testing.assert_close((d.A.grad, d.B.grad), (a.grad, b.grad), rtol=1e-10, atol=1e-12)


def test_experts_scale_the_gradient_of_their_update() -> None:
    torch.manual_seed(0)
    settings_ = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    shape = MixtralConfig(**settings_)
    shape._experts_implementation = "eager"  # the grouped products have no float64
    base = MixtralForCausalLM(shape).double()
    config = AlloraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(base, config).double().train()
    for d in deltas(model):
        nn.init.normal_(d.B, std=0.1)
    x = torch.arange(24).reshape(2, 12)
    (wrapper,) = (m for m in model.modules() if hasattr(m, "parameter_name"))
    parameter = wrapper.original()
    model(input_ids=x, labels=x).loss.backward()
    found = [(d.A.grad.clone(), d.B.grad.clone()) for d in deltas(model)]
    merged = torch.stack([(d.B @ d.A).detach() for d in deltas(model)])
    with torch.no_grad():
        parameter.add_(merged)
    parameter.requires_grad_(True)
    with model.disable_adapter():
        model(input_ids=x, labels=x).loss.backward()
    for i, d in enumerate(deltas(model)):
        g = c(merged[i].norm(dim=1), 2.0)[:, None] * parameter.grad[i]
        torch.testing.assert_close(found[i], (d.B.T @ g, g @ d.A.T), rtol=1e-8, atol=1e-12)


def test_param_row_scales_the_rows_of_the_parameters_gradients() -> None:
    model, d = one_layer(nn.Linear(6, 5), r=3, norm="param_row", eta=3.0)
    base = model.base_model.model[0].base_layer
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 5, dtype=torch.float64)
    model(x).backward(g)
    a, b, z = d.A.detach(), d.B.detach(), x.detach()
    torch.testing.assert_close(d.B.grad, c(b.norm(dim=1), 3.0)[:, None] * (g.T @ (z @ a.T)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(d.A.grad, c(a.norm(dim=1), 3.0)[:, None] * ((g @ b).T @ z), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, g @ (base.weight.detach() + b @ a), rtol=1e-10, atol=1e-12)


def test_the_first_sgd_step_is_eta_times_loras() -> None:
    x = torch.arange(12).reshape(2, 6)
    for eta in (2.0, 3.0):
        model = peft.get_peft_model(llama(), AlloraConfig(r=4, eta=eta))
        plain = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
        loras = [m for m in plain.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert len(loras) == len(deltas(model))
        for d, lora in zip(deltas(model), loras):
            assert torch.equal(d.c_B, torch.full((d.out,), eta))
            lora.lora_A["default"].weight.data = d.A.data.clone()
        for m in (model.train(), plain.train()):
            optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
            m(input_ids=x, labels=x).loss.backward()
            optimizer.step()
        for d, lora in zip(deltas(model), loras):
            torch.testing.assert_close(d.B.detach(), eta * lora.lora_B["default"].weight.detach(), rtol=1e-4, atol=1e-7)
            assert not d.A.grad.any()


def test_a_tiny_eta_is_lora_with_rescaled_gradients() -> None:
    eta = 1e-3
    model, d = one_layer(nn.Linear(6, 5), r=3, eta=eta)
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    a, b = d.A.detach().requires_grad_(), d.B.detach().requires_grad_()
    base = model.base_model.model[0].base_layer
    (base(x).detach() + x @ a.T @ b.T).pow(2).sum().backward()
    torch.testing.assert_close(d.B.grad, eta * b.grad, rtol=1e-4, atol=0)
    torch.testing.assert_close(d.A.grad, eta * a.grad, rtol=1e-4, atol=1e-7)


def test_the_coefficient_follows_the_weights_once_a_step() -> None:
    model, d = one_layer(nn.Linear(6, 5), r=3)
    optimizer = torch.optim.SGD([d.A, d.B], lr=0.05)
    x = torch.randn(4, 6, dtype=torch.float64)
    seen = []
    for _ in range(3):
        for _ in range(2):
            model(x).pow(2).sum().backward()
            torch.testing.assert_close(d.c_B, c((d.B @ d.A).detach().norm(dim=1), 2.0), rtol=1e-10, atol=0)
            seen.append(d.c_B.clone())
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    loaded, other = one_layer(nn.Linear(6, 5), r=3)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(other.c_B, d.c_B) and other.c_B.dtype == torch.float64


def test_the_coefficient_stays_float32_on_a_bfloat16_base() -> None:
    model = peft.get_peft_model(llama().bfloat16(), AlloraConfig(r=4)).train()
    x = torch.arange(12).reshape(2, 6)
    model(input_ids=x, labels=x).loss.backward()
    assert {d.c_B.dtype for d in deltas(model)} == {d.B.grad.dtype for d in deltas(model)} == {torch.float32}


@pytest.mark.parametrize("norm", ["delta_row", "param_row"])
def test_update_scales_the_finished_step(norm: str) -> None:
    model, d = one_layer(nn.Linear(6, 5), r=3, norm=norm, apply_to="update")
    a, b = (p.detach().clone().requires_grad_() for p in (d.A, d.B))
    base = model.base_model.model[0].base_layer
    x = torch.randn(4, 6, dtype=torch.float64)
    ours = torch.optim.AdamW([d.A, d.B], lr=0.01, weight_decay=0.1)
    plain = torch.optim.AdamW([a, b], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        ours.zero_grad()
        plain.zero_grad()
        model(x).pow(2).sum().backward()
        (base(x).detach() + x @ a.T @ b.T).pow(2).sum().backward()
        torch.testing.assert_close((d.A.grad, d.B.grad), (a.grad, b.grad), rtol=1e-9, atol=1e-12)
        before = a.detach().clone(), b.detach().clone()
        rows = (c((b @ a).norm(dim=1), 2.0) if norm == "delta_row" else c(b.norm(dim=1), 2.0)).detach()[:, None]
        columns = torch.ones(3, 1) if norm == "delta_row" else c(a.norm(dim=1), 2.0).detach()[:, None]
        ours.step()
        plain.step()
        with torch.no_grad():  # the reference moves by the scaled step as well
            a.copy_(before[0] + columns * (a - before[0]))
            b.copy_(before[1] + rows * (b - before[1]))
        torch.testing.assert_close((d.A.detach(), d.B.detach()), (a.detach(), b.detach()), rtol=1e-9, atol=1e-12)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss().backward()
    return [p.grad.clone() for d in deltas(model) for p in (d.A, d.B)]


@pytest.mark.parametrize("norm", ["delta_row", "param_row"])
def test_compiled_gradients_are_the_same(norm: str) -> None:
    model, _ = one_layer(nn.Linear(6, 5), r=3, norm=norm)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        eager = gradients(model, lambda: model(x).pow(2).sum())
        torch.testing.assert_close(gradients(model, lambda: compiled(x).pow(2).sum()), eager, rtol=1e-10, atol=1e-12)
        optimizer.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_gradients_are_the_same(reentrant: bool) -> None:
    model = peft.get_peft_model(llama(), AlloraConfig(r=4)).train()
    for d in deltas(model):
        nn.init.normal_(d.B, std=0.1)
        d.refresh()
    x = torch.arange(12).reshape(2, 6)
    eager = gradients(model, lambda: model(input_ids=x, labels=x).loss)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, lambda: model(input_ids=x, labels=x).loss)
    torch.testing.assert_close(again, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("low", [False, True])
def test_a_loaded_adapter_goes_on_with_its_own_coefficient(low: bool, tmp_path) -> None:
    model = peft.get_peft_model(llama(), AlloraConfig(r=4))
    for d in deltas(model):
        nn.init.normal_(d.B)
        d.refresh()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    x = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded.train()(input_ids=x).logits, model.train()(input_ids=x).logits)
    for d, old in zip(deltas(loaded), deltas(model)):
        assert d.c_B.max() < 2
        torch.testing.assert_close(d.c_B, old.c_B)  # a product's last bits depend on where a file's tensors lie


def test_no_scale_and_no_dropout() -> None:
    names = {f.name for f in AlloraConfig.own_fields()}
    assert not names & {"lora_alpha", "dropout", "alpha"}
    with pytest.raises(weft.UsageError, match="no option 'lora_alpha'"):
        AlloraConfig.from_options({"lora_alpha": 16})


def test_count_is_the_formula() -> None:
    model = peft.get_peft_model(llama(), AlloraConfig(r=3, target_modules=["k_proj", "down_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * ((32 + 16) + (37 + 32))
    assert sum(d.count() for d in deltas(model)) == 2 * 3 * ((32 + 16) + (37 + 32))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eta": 0.0}, "eta=0.0 must be above 0"),
        ({"eta": math.inf}, "eta=inf must be above 0"),
        ({"norm": "column"}, "use delta_row or param_row"),
        ({"apply_to": "loss"}, "use grad or update"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        AlloraConfig(**options)
