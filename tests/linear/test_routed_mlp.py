"""RoutedMlp against the experts written out in float64, token by token."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu
from transformers import LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from weft import UsageError
from weft.linear._structured import empty
from weft.linear.routed_mlp import RoutedMlp, shares


def drawn(module, dtype=torch.float64, seed=0):
    """A module whose values are all normal draws."""
    draw = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = (0.5 * torch.randn(p.shape, generator=draw, dtype=torch.float64)).to(dtype)
    return module.eval()


def llama(units=22, width=10, bias=True, dtype=torch.float64):
    config = LlamaConfig(hidden_size=width, intermediate_size=units, num_attention_heads=1, mlp_bias=bias)
    return drawn(LlamaMLP(config), dtype)


def opt(units=22, width=10):
    config = OPTConfig(hidden_size=width, ffn_dim=units, num_attention_heads=1, word_embed_proj_dim=width, dropout=0.0)
    return drawn(OPTDecoderLayer(config, 0))


def routed(module, experts, active, seed=1):
    """A routed form, whose units and router are drawn, and the units' order."""
    draw = torch.Generator().manual_seed(seed)
    last = getattr(module, "down_proj", None) or module.fc2
    order = torch.randperm(last.in_features, generator=draw)
    r = torch.randn(experts, last.out_features + 1, generator=draw, dtype=torch.float64)
    made = RoutedMlp.of(module, experts=experts, active=active)
    return made.fill(module, order, r[:, :-1], r[:, -1]), order


def written_out(module, made, order, x):
    """(N // k)·Σ m_j·E_j(x) + b, of the stock module's own weights in the order of the experts."""
    inner, (n, k) = made.inner, (len(made.inner.experts), made.inner.active)
    rows = []
    for token in x.double():
        scores = (inner.router.weight.double() @ token + inner.router.bias.double()).tolist()
        best = sorted(range(n), key=lambda j: -scores[j])[:k]
        y, start = torch.zeros_like(token), 0
        for j, size in enumerate(shares(len(order), n)):
            units = order[start : start + size]
            start += size
            if j in best:
                gate, up, down = (getattr(module, f"{of}_proj").weight.double() for of in ("gate", "up", "down"))
                g, u = gate[units] @ token, up[units] @ token
                if module.gate_proj.bias is not None:
                    g, u = g + module.gate_proj.bias[units].double(), u + module.up_proj.bias[units].double()
                y = y + down[:, units] @ (silu(g) * u)
        rows.append((n // k) * y + (0 if module.down_proj.bias is None else module.down_proj.bias.double()))
    return torch.stack(rows)


def test_all_have_the_same_number_of_units_or_one_more():
    assert shares(12, 4) == [3, 3, 3, 3] and shares(14, 4) == [4, 4, 3, 3] and shares(4, 4) == [1, 1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(1, 6),
    active=st.integers(1, 6),
    units=st.integers(6, 20),
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    wide=st.booleans(),
)
def test_dispatched_and_masked_are_the_experts_written_out(experts, active, units, tokens, bias, wide):
    active = min(active, experts)
    module = llama(units, 6, bias, torch.float64 if wide else torch.float32)
    made, order = routed(module, experts, active)
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    x = x if wide else x.float()
    expected = written_out(module, made, order, x)
    with torch.no_grad():
        found = [made.eval()(x), made.train()(x), made(x.view(1, tokens, 1, 6)).view(tokens, 6)]
    for each in found:
        assert each.dtype == x.dtype
        assert (each.double() - expected).norm() <= (1e-12 if wide else 1e-6) * (1 + expected.norm())


@pytest.mark.parametrize("make", [llama, opt])
def test_the_experts_one_after_the_other_are_the_stock_layers_bit_for_bit(make):
    module = make()
    made, order = routed(module, 4, 2)
    into, out = made.stocks[type(module).__name__]
    back = order.argsort()
    experts = made.inner.experts
    assert [getattr(expert, out).in_features for expert in experts] == [6, 6, 5, 5]
    for name in into:
        stock = getattr(module, name)
        assert torch.equal(torch.cat([getattr(expert, name).weight for expert in experts])[back], stock.weight)
        assert torch.equal(torch.cat([getattr(expert, name).bias for expert in experts])[back], stock.bias)
    stock = getattr(module, out)
    assert torch.equal(torch.cat([getattr(expert, out).weight for expert in experts], 1)[:, back], stock.weight)
    assert torch.equal(made.inner.bias, stock.bias)
    assert made.inner.router.weight.numel() + made.inner.router.bias.numel() == 4 * (10 + 1)


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.parametrize("experts", [1, 3, 4])
def test_all_experts_are_the_stock_module_and_become_it(make, experts):
    module = make()
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made, _ = routed(module, experts, experts)
    assert torch.allclose(made(x), module(x), rtol=1e-12, atol=1e-12)
    made.check_dense(module)
    stock = made.restored(module)
    assert type(stock) is type(module) and torch.allclose(stock(x), module(x), rtol=1e-12, atol=1e-12)
    shapes = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (stock, module)]
    assert shapes[0] == shapes[1] and {n: type(m) for n, m in stock.named_modules()} == {
        n: type(m) for n, m in module.named_modules()
    }
    assert type(made) is not type(module), "the routed form stays"


def test_the_scale_is_a_whole_number():
    scales = {(n, k): routed(llama(), n, k)[0].inner.scale for n, k in [(4, 1), (4, 2), (4, 3), (4, 4), (5, 2)]}
    assert scales == {(4, 1): 4, (4, 2): 2, (4, 3): 1, (4, 4): 1, (5, 2): 2}


def test_out_of_training_an_expert_meets_its_own_tokens_only():
    made, _ = routed(llama(), 4, 2)
    x = torch.randn(3, 9, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    met = []
    for expert in made.inner.experts:
        expert.register_forward_hook(lambda module, inputs, output: met.append(len(inputs[0])))
    chosen = made.inner.chosen(made.inner.router(x))
    made.eval()(x)
    assert met == [n for n in chosen.flatten().bincount(minlength=4).tolist() if n] and sum(met) == 2 * 27
    met.clear()
    made(x[0, 0])
    assert met == [1, 1]
    met.clear()
    made.train()(x)
    assert met == [27] * 4


def test_gradients_are_the_same_either_way_and_none_reaches_the_router():
    one, _ = routed(llama(), 4, 2)
    other = copy.deepcopy(one).train()
    x = torch.randn(11, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for made, each in ((one.eval(), inputs[0]), (other, inputs[1])):
        made(each).square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(one.named_parameters(), other.parameters()):
        if "router" in name:
            assert p.grad is None and q.grad is None
        else:
            assert q.grad.any() and torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-10), name


def test_in_training_an_expert_without_a_token_has_a_gradient_of_zero():
    made, _ = routed(llama(), 4, 1)
    with torch.no_grad():
        made.inner.router.bias.copy_(torch.tensor([1e3, 0, 0, 0]))
    made.train()(torch.ones(3, 10, dtype=torch.float64)).sum().backward()
    some = [all(bool(p.grad.any()) for p in expert.parameters()) for expert in made.inner.experts]
    assert some == [True, False, False, False]
    assert all(p.grad is not None for expert in made.inner.experts for p in expert.parameters())


def test_it_compiles_to_one_graph_and_takes_no_tokens_at_all():
    made, _ = routed(llama(dtype=torch.float32), 4, 2)
    x = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(torch.compile(made, backend="eager", fullgraph=True)(x), made(x), atol=1e-6)
    assert made(x[:0]).shape == (0, 5, 10)


@pytest.mark.parametrize("make", [llama, opt])
def test_its_spec_makes_it_again(make):
    module = make()
    made, _ = routed(module, 4, 2)
    spec = json.loads(json.dumps(made.spec()))
    assert spec == {"kind": "routed_mlp", "version": 1, "experts": 4, "active": 2}
    before = torch.get_rng_state()
    again = empty(spec, module)
    assert torch.equal(torch.get_rng_state(), before), "no random numbers are drawn"
    again.load_state_dict(made.state_dict())
    x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(again(x), made(x)) and not again.training
    assert {t.device.type for t in empty(spec, copy.deepcopy(module).to("meta")).state_dict().values()} == {"meta"}


def test_casting_casts_all_of_it():
    made, order = routed(llama(), 4, 2)
    x = torch.randn(9, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low = copy.deepcopy(made).bfloat16()
    assert {t.dtype for t in low.state_dict().values()} == {torch.bfloat16}
    same = (low.inner.chosen(low.inner.router(x.bfloat16())) == made.inner.chosen(made.inner.router(x))).all(1)
    assert same.sum() > 5 and torch.allclose(low(x.bfloat16()).double()[same], made(x)[same], rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"experts": 0, "active": 1}, "experts=0: an MLP of 22 units has 1 to 22"),
        ({"experts": 23, "active": 1}, "experts=23: an MLP of 22 units has 1 to 22"),
        ({"experts": 4, "active": 5}, "active=5: of 4 experts 1 to 4 are active"),
        ({"experts": 4, "active": 0}, "active=0: of 4 experts 1 to 4 are active"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        RoutedMlp.of(llama(), **options)


def test_k_of_n_are_no_stock_module_and_others_have_no_such_form():
    made, _ = routed(llama(), 4, 2)
    with pytest.raises(UsageError, match="a token meets 2 of 4 experts, and no stock MLP routes"):
        made.check_dense(llama())
    with pytest.raises(UsageError, match="routed_mlp is no linear map"):
        made.dense()
    with pytest.raises(UsageError, match="Linear has no routed_mlp form: there are LlamaMLP, "):
        empty({"kind": "routed_mlp", "experts": 2, "active": 1}, torch.nn.Linear(3, 3))
