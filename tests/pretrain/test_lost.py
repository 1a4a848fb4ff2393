"""LOST: what it makes of a weight, against an SVD in float64, and models that are trained with it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import weft
from weft.algebra.random import generator
from weft.linear._structured import empty
from weft.linear.low_rank_plus_channels import LowRankPlusChannels
from weft.pretrain.lost import LostConfig, spec, start


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(w: torch.Tensor, **options) -> LowRankPlusChannels:
    """The layer in place of one with this weight."""
    config = LostConfig(**options)
    out, in_ = w.shape
    layer = empty(spec(config, out, in_), nn.Linear(in_, out, bias=False, dtype=w.dtype))
    with torch.no_grad():
        start(config, layer, w, generator(0))
    return layer


def llama(*, hidden: int = 24, dtype=torch.float32) -> transformers.LlamaForCausalLM:
    """Grouped queries and odd widths."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=hidden,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


TOKENS = torch.arange(48).reshape(4, 12) * 7 % 31
SMALL = {"rank": 6, "density": 0.1}


def layers_of(model) -> dict[str, LowRankPlusChannels]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankPlusChannels)}


def train(model, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


# --- the start --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    out=st.integers(2, 20),
    in_=st.integers(2, 20),
    rank=st.integers(1, 20),
    density=st.floats(0, 1),
    score=st.sampled_from(["l2", "l1"]),
    sparse_source=st.sampled_from(["weight", "residual"]),
    seed=st.integers(0, 5),
)
def test_the_start_is_the_specification(out, in_, rank, density, score, sparse_source, seed):
    rank, w = min(rank, out, in_), drawn(out, in_, seed=seed)
    layer = started(w, rank=rank, density=density, score=score, sparse_source=sparse_source)
    up, down, index = layer.up.weight, layer.down.weight, layer.index.tolist()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    comp = sum((s[i] * torch.outer(u[:, i], vh[i]) for i in range(rank, len(s))), torch.zeros_like(w))
    assert torch.allclose(up @ down + comp, w, atol=1e-6)
    left = (w - up @ down).norm() ** 2
    assert torch.allclose(left, (s[rank:] ** 2).sum(), atol=1e-10), "as much as the singular values left out"
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1)) and torch.allclose(up.norm(dim=0) ** 2, s[:rank])
    assert all(row[row.abs().argmax()] > 0 for row in down), "signs are canonical"

    k = round(density * in_)
    scores = comp.abs().sum(0) if score == "l1" else (comp**2).sum(0).sqrt()
    assert len(index) == len(set(index)) == k and index == sorted(index)
    others = [j for j in range(in_) if j not in index]
    assert not index or not others or scores[index].min() >= scores[others].max() - 1e-9
    source = w if sparse_source == "weight" else comp
    assert torch.allclose(layer.columns.weight, source[:, index], atol=1e-9)
    assert sum(p.numel() for p in layer.parameters()) == rank * (out + in_) + k * out


def test_without_an_activation_it_begins_at_the_mixed_matrix_and_not_at_the_weight():
    w = drawn(12, 10)
    layer = started(w, rank=3, density=0.2, gamma=0.7, activation="none")
    u, s, vh = torch.linalg.svd(w)
    near = 0.7 * (u[:, :3] * s[:3]) @ vh[:3]
    index = layer.index.long()
    near[:, index] += 0.3 * w[:, index]
    assert torch.allclose(layer.dense(), near, atol=1e-10) and not torch.allclose(near, w, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_weights_are_decomposed_in_float32(dtype):
    w = drawn(20, 16).to(dtype)
    layer, wide = started(w, rank=4, density=0.25), started(w.float(), rank=4, density=0.25)
    assert torch.equal(layer.index, wide.index) and layer.up.weight.dtype == dtype
    for one, other in zip(layer.parameters(), wide.parameters(), strict=True):
        assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("gamma, sizes", [(1.0, (3, 0)), (0.5, (3, 3)), (0.0, (0, 3))])
def test_a_part_without_weight_is_not_stored(gamma, sizes):
    w = drawn(12, 10)
    layer, both = (started(w, rank=3, density=0.3, gamma=g, activation="silu") for g in (gamma, 0.5))
    x = drawn(5, 10, seed=1)
    h = x @ both.down.weight.mT
    low = (h / (1 + torch.exp(-h))) @ both.up.weight.mT
    sparse = x[:, both.index.long()] @ both.columns.weight.mT
    assert (layer.rank, layer.channels) == sizes
    assert torch.allclose(layer(x), gamma * low + (1 - gamma) * sparse, atol=1e-12)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_every_projection_is_replaced_and_counted(activation):
    dense, model = llama(), llama()
    assert weft.reparametrise(model, "lost", activation=activation, **SMALL) is model
    layers = layers_of(model)
    assert sorted(layers) == sorted(n for n, m in dense.named_modules() if n.endswith("_proj"))
    expected = sum(p.numel() for p in dense.parameters())
    for name in layers:
        out, in_ = dense.get_submodule(name).weight.shape
        expected += 6 * (out + in_) + round(0.1 * in_) * out - out * in_
    assert sum(p.numel() for p in model.parameters()) == expected
    assert all(p.requires_grad for p in model.parameters())
    for key, p in model.named_parameters():
        if "_proj" not in key:
            assert torch.equal(p, dense.get_parameter(key))


def test_conv1d_and_biases():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=18, n_layer=1, n_head=3)
    dense = transformers.GPT2LMHeadModel(config)
    dense.transformer.h[0].mlp.c_fc.bias.data.normal_()
    model = weft.reparametrise(copy.deepcopy(dense), "lost", rank=4, density=0.2, target_modules=["c_fc"])
    ((name, layer),) = layers_of(model).items()
    old = dense.get_submodule(name)
    again = started(old.weight.detach().mT, rank=4, density=0.2)
    assert torch.equal(layer.bias, old.bias) and torch.equal(layer.index, again.index)
    assert torch.equal(layer.up.weight, again.up.weight) and torch.equal(layer.columns.weight, again.columns.weight)


def test_a_few_steps_lower_the_loss_and_move_all_but_the_channels():
    model = weft.reparametrise(llama(), "lost", **SMALL)
    before = copy.deepcopy(model.state_dict())
    losses = train(model, 12)
    assert losses[-1] < 0.7 * losses[0]
    for key, t in model.state_dict().items():
        moved = not torch.equal(t, before[key])
        assert moved == (t.is_floating_point() and t.numel() > 0), key


def test_a_trained_model_goes_on_from_what_it_learned():
    dense = llama()
    train(dense, 25)
    options = {"rank": 12, "density": 0.5, "gamma": 0.5, "activation": "none", "target_modules": ["up_proj", "q_proj"]}
    model = weft.reparametrise(copy.deepcopy(dense), "lost", **options)
    random = weft.reparametrise(llama(), "lost", **options)
    for name, layer in layers_of(model).items():
        again = started(dense.get_submodule(name).weight.detach(), **{k: options[k] for k in ("rank", "density")})
        assert torch.equal(layer.up.weight, again.up.weight) and torch.equal(layer.index, again.index)
    with torch.no_grad():
        assert model(TOKENS, labels=TOKENS).loss < random(TOKENS, labels=TOKENS).loss
    losses = train(model, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_saved_and_loaded_it_is_the_same_bit_for_bit(activation, tmp_path):
    model = weft.reparametrise(llama(), "lost", activation=activation, **SMALL)
    train(model, 2)
    model.eval().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
        assert torch.equal(base(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())
    assert all(layer.index.dtype == torch.uint8 for layer in layers_of(again).values())
    assert train(again.train(), 2) == train(model.train(), 2), "and is trained the same"


def test_dense_again_without_an_activation():
    model = weft.reparametrise(llama(dtype=torch.float64), "lost", activation="none", **SMALL)
    train(model, 2)
    with torch.no_grad():
        before = model.eval()(TOKENS).logits
        dense = weft.to_dense(model)
        assert not layers_of(dense) and type(dense.model.layers[0].mlp.up_proj) is nn.Linear
        assert torch.allclose(dense(TOKENS).logits, before, rtol=1e-9, atol=1e-9)


def test_what_has_an_activation_is_not_made_dense_nor_merged_into():
    import peft

    model = weft.reparametrise(llama(), "lost", **SMALL).eval()
    with torch.no_grad():
        before = model(TOKENS).logits
        with pytest.raises(weft.UsageError, match=r"q_proj has no dense form: low_rank_plus_channels is no linear map"):
            weft.to_dense(model)
        assert torch.equal(model(TOKENS).logits, before)
    with pytest.raises(weft.UsageError, match="kind low_rank_plus_channels is no linear map"):
        peft.get_peft_model(copy.deepcopy(model), weft.SvfitConfig(target_modules=["q_proj"]))
    adapted = peft.get_peft_model(model, weft.SoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(weft.UsageError, match="is stored as low_rank_plus_channels, which cannot take"):
        adapted.merge_adapter()


def test_a_model_without_weights_gets_layers_without_values():
    with torch.device("meta"):
        model = weft.reparametrise(llama(), "lost", **SMALL)
    assert layers_of(model) and {t.device.type for t in model.state_dict().values()} == {"meta"}


def test_convolutions_are_not_among_what_it_takes():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3)))
    with pytest.raises(weft.UsageError, match="match nothing to factorise"):
        weft.reparametrise(model, "lost", rank=2)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 200}, "lost: model.layers.0.self_attn.q_proj: rank=200: a matrix of 24 × 24 has 0 to 24"),
        ({"gamma": 1.2}, "gamma=1.2 must be a share, 0 to 1"),
        ({"density": -0.1}, "density=-0.1 must be a share, 0 to 1"),
        ({"activation": "swish"}, "activation='swish' must be one of silu, gelu, relu, none"),
        ({"sparse_source": "rest"}, "sparse_source='rest' must be one of weight, residual"),
        ({"score": "l3"}, "score='l3' must be one of l2, l1"),
        ({"gamma": 0, "density": 0.01, "rank": 2}, "gamma=0 and density=0.01 leave nothing of a matrix of 24 × 24"),
        ({"alpha": 2}, "lost has no option 'alpha'"),
    ],
)
def test_what_cannot_work_is_refused_and_the_model_left_as_it_was(options, said):
    model = llama()
    with pytest.raises(weft.UsageError, match=said):
        weft.reparametrise(model, "lost", **options)
    assert not layers_of(model)
