"""MoDeGPT against its closed forms written out in float64, and narrow models against the stock ones they stand for."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from families import every_family, family_model, padded
from models import batches, gpt2, llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import weft
from weft.compress._calibration import Corpus, calibrate
from weft.compress._factoriser import factoriser
from weft.compress.modegpt import leverage_order
from weft.errors import UsageError
from weft.linear._narrow import Narrow
from weft.linear._transformers import save_compressed, to_dense


def narrow(family, keep=0.6, dtype=torch.float64, **options):
    model = family_model(family, dtype)
    weft.compress(model, "modegpt", keep=keep, data=batches(model), **options)
    return model


def seen(model, name, data):
    """What a module receives on the tokens that count, rows × in."""
    rows = []

    def hook(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        rows.append(x.detach().double().reshape(-1, x.shape[-1])[mask])

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    for batch in data:
        mask = batch["attention_mask"].bool().flatten()
        with torch.no_grad():
            model(**batch)
    handle.remove()
    return torch.cat(rows)


# --- the closed forms -------------------------------------------------------------------------------------------------


@every_family
def test_at_the_full_size_nothing_changes(family):
    """Invariant 1."""
    model, before = family_model(family), family_model(family)
    data = batches(model)
    maker = factoriser("modegpt", weft.ModegptConfig())
    pairs = maker.units(model)
    parts = [part for pair in pairs for part in pair.parts]
    statistics = calibrate(model, [Corpus(data)], parts, {part.name: maker.needs(part) for part in parts})
    for pair in pairs:
        tensors = maker.decompose(pair, {part.name: statistics[part.name] for part in pair.parts}, None)
        assert tensors["errors"][-1] < 1e-12 and len(tensors["errors"]) == len(maker.sizes(pair))
        assert maker.bits(pair, pair.shape[0]) == pair.bits
        maker.replace(model, pair, tensors, pair.shape[0])
    assert sum(isinstance(m, Narrow) for m in model.modules()) == 4
    with torch.no_grad():
        expected, found = before(**data[0]).logits, model(**data[0]).logits
    assert float((found - expected).abs().max()) < 1e-10


def test_units_stay_by_their_leverage_and_the_rest_is_least_squares():
    """Invariant 3 as well: slices of the same units err more."""
    model, ridge = llama(), 0.03
    data = batches(model)
    stock = copy.deepcopy(model)
    report = weft.compress(model, "modegpt", keep=0.6, include="mlp", data=data, nystrom_ridge=ridge)
    for row in report.rows:
        z = seen(stock, f"{row.name}.down_proj", data)
        c = z.T @ z / len(z)
        lam = ridge * c.diagonal().mean()
        leverage = (c @ torch.linalg.inv(c + lam * torch.eye(len(c), dtype=torch.float64))).diagonal()
        kept = leverage.argsort(descending=True)[: row.size].sort().values
        dense, found = (m.get_submodule(row.name) for m in (stock, model))
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(getattr(found, name).weight, getattr(dense, name).weight[kept])
        y = z @ dense.down_proj.weight.detach().T
        best = torch.linalg.lstsq(z[:, kept], y).solution
        assert torch.allclose(found.down_proj.weight.T, best, atol=1e-9)
        error = (z[:, kept] @ best - y).square().sum() / y.square().sum()
        sliced = (z[:, kept] @ dense.down_proj.weight.detach().T[kept] - y).square().sum() / y.square().sum()
        assert row.error == pytest.approx(float(error), rel=1e-8) and error < 0.9 * sliced


def test_a_unit_and_its_double_need_one_place():
    """Invariant 4."""
    model = llama()
    for layer in model.model.layers:
        mlp = layer.mlp
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                getattr(mlp, name).weight[20] = getattr(mlp, name).weight[5]
    before, data = copy.deepcopy(model), batches(model)
    report = weft.compress(model, "modegpt", keep=36.1 / 37, include="mlp", allocate="uniform", data=data)
    assert [row.size for row in report.rows] == [36, 36] and all(row.error < 1e-8 for row in report.rows)
    with torch.no_grad():
        expected, found = before(**data[0]).logits, model(**data[0]).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_values_and_outputs_err_by_the_dropped_singular_values():
    """Invariant 2, by the two decompositions of the paper, with C^½."""
    model, ridge = llama(), 0.01
    stock, data = copy.deepcopy(model), batches(model)
    report = weft.compress(model, "modegpt", keep=0.6, include="vo", data=data, ridge_vo=ridge)
    for row in report.rows:
        name = row.name.removesuffix(".vo")
        x = seen(stock, name, data)
        c = x.T @ x / len(x)
        c += ridge * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(c)
        half = (vectors * values.sqrt()) @ vectors.T
        dense, found = (m.get_submodule(name) for m in (stock, model))
        k, h, left, dropped, whole = row.size, 8, 0.0, 0.0, 0.0
        for group in range(2):
            wv = dense.v_proj.weight.detach()[h * group : h * group + h].T
            wo = dense.o_proj.weight.detach()[:, 2 * h * group : 2 * h * (group + 1)]
            wo = torch.cat([wo[:, :h].T, wo[:, h:].T], 1)  # h × 2·d
            u, s, vh = torch.linalg.svd(half @ wv, full_matrices=False)
            s2 = torch.linalg.svdvals(s[:, None] * vh @ wo)
            dropped, whole = dropped + s2[k:].square().sum(), whole + s2.square().sum()
            new_v = found.v_proj.weight.detach()[k * group : k * group + k].T
            new_o = found.o_proj.weight.detach()[:, 2 * k * group : 2 * k * (group + 1)]
            new_o = torch.cat([new_o[:, :k].T, new_o[:, k:].T], 1)
            left += (half @ (wv @ wo - new_v @ new_o)).square().sum()
        assert float(left) == pytest.approx(float(dropped), rel=1e-9)
        assert row.error == pytest.approx(float(dropped / whole), rel=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_are_those_without_the_dropped_pairs_at_every_position(family):
    """Invariant 6; which pairs stay is computed again."""
    model = family_model(family)
    stock, data = copy.deepcopy(model), batches(model)
    model.set_attn_implementation("eager")
    report = weft.compress(model, "modegpt", keep=0.6, include="qk", data=data)
    ids = padded()["input_ids"]
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    positions = torch.arange(11)[None].expand(16, -1)
    cos, sin = stock.model.rotary_emb(hidden[0], positions)
    for i, row in enumerate(report.rows):
        layer = stock.model.layers[i]
        x = seen(stock, f"model.layers.{i}.self_attn", data)
        parts = (layer.self_attn.q_proj, layer.self_attn.k_proj)
        q2, k2 = ((x @ p.weight.T + p.bias).square().mean(0).view(-1, 8) for p in parts)
        s2 = (q2[[0, 2]] + q2[[1, 3]]) * k2
        s2 = s2[:, :4] + s2[:, 4:]
        kept = s2.argsort(1, descending=True)[:, : row.size // 2]
        mask = torch.zeros(2, 4, dtype=torch.float64).scatter(1, kept, 1.0).repeat(1, 2)  # groups × h
        with torch.no_grad():
            y = model.model.layers[i].input_layernorm(hidden[i])
            q, k = (p(y).unflatten(-1, (-1, 8)).transpose(1, 2) for p in parts)
            q, k = apply_rotary_pos_emb(q * mask.repeat_interleave(2, 0)[:, None], k * mask[:, None], cos, sin)
            scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
        expected = scores.masked_fill(~torch.ones(11, 11).tril().bool(), float("-inf")).softmax(-1)
        assert torch.allclose(weights[i], expected, atol=1e-6)


def test_a_norm_is_right_on_average_over_heads():
    """Qwen3: E[q²] behind the norm decides, and what stays keeps its size."""
    model = family_model("qwen3")
    stock, data = copy.deepcopy(model), batches(model)
    weft.compress(model, "modegpt", keep=0.6, include="qk", data=data)
    for i in range(2):
        dense, found = (m.model.layers[i].self_attn for m in (stock, model))
        x = seen(stock, f"model.layers.{i}.self_attn", data)
        raw_q, raw_k = ((x @ p.weight.T).unflatten(1, (-1, 12)) for p in (dense.q_proj, dense.k_proj))
        share_q, share_k = (raw.square() / raw.square().sum(-1, keepdim=True) for raw in (raw_q, raw_k))
        q2 = (12 * share_q.mean(0) * dense.q_norm.weight.square()).view(2, 2, 12).sum(1)
        s2 = q2 * 12 * share_k.mean(0) * dense.k_norm.weight.square()
        pairs = (s2[:, :6] + s2[:, 6:]).argsort(1, descending=True)[:, : found.qk // 2].sort(1).values
        assert torch.equal(found.pairs.long(), pairs)
        at = torch.cat([pairs, pairs + 6], 1)
        kept_q = share_q.mean(0).gather(1, at.repeat_interleave(2, 0)).sum(1).mean()
        kept_k = share_k.mean(0).gather(1, at).sum(1).mean()
        assert torch.allclose(found.q_norm.weight, dense.q_norm.weight * kept_q.sqrt(), rtol=1e-4)
        assert torch.allclose(found.k_norm.weight, dense.k_norm.weight * kept_k.sqrt(), rtol=1e-4)


# --- who gets how much ------------------------------------------------------------------------------------------------


def test_a_block_that_changes_more_keeps_more():
    """Invariant 5."""
    model = family_model("llama")
    with torch.no_grad():
        for p in model.model.layers[1].parameters():
            p *= 0.7
    data = batches(model)
    kept = {}
    for smoothing in (0.3, 1e6):
        made = copy.deepcopy(model)
        report = weft.compress(made, "modegpt", keep=0.6, sparsity_smoothing=smoothing, data=data)
        blocks = [report.rows[:3], report.rows[3:]]
        kept[smoothing] = [sum(r.bits for r in rows) / sum(r.dense for r in rows) for rows in blocks]
        assert 0.57 < sum(kept[smoothing]) / 2 <= 0.6
        for share, rows in zip(kept[smoothing], blocks):  # one ratio for all three, to a step
            assert all(abs(r.bits / r.dense - share) < 0.26 for r in rows)
    assert kept[0.3][0] > kept[0.3][1] + 0.1
    assert abs(kept[1e6][0] - kept[1e6][1]) < 0.05


@pytest.mark.parametrize(
    "options, said",
    [
        ({"allocate": "threshold"}, "allocate='threshold' needs singular values of one matrix"),
        ({"sparsity_smoothing": 0}, "sparsity_smoothing=0 must be above 0"),
        ({"nystrom_ridge": 0}, "nystrom_ridge=0 must be above 0"),
        ({"ridge_vo": -1}, "ridge_vo=-1 must be 0 or more"),
        ({"max_sparsity": 0}, "max_sparsity=0: a share above 0"),
        ({"include": "q_proj"}, "include='q_proj', exclude=None leave nothing; there are: mlp, qk, vo"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        weft.compress(llama(), "modegpt", data=batches(llama()), **options)


def test_another_attention_is_refused_by_name():
    with pytest.raises(UsageError, match="Llama, Qwen2, Qwen3 and OPT, and GPT2LMHeadModel has GPT2Attention"):
        weft.compress(gpt2(), "modegpt", data=batches(gpt2()))


@every_family
def test_padding_does_not_count(family):
    """OPT's MLP receives all tokens of a batch as one dimension."""
    model = family_model(family)
    data = batches(model)
    parts = [part for pair in factoriser("modegpt", weft.ModegptConfig()).units(model) for part in pair.parts]
    down = next(part for part in parts if part.name.endswith(("down_proj", "fc2")))
    z = seen(model, down.name, data)
    moments = calibrate(model, [Corpus(data)], [down], {down.name: ("input",)})[down.name].input
    assert moments.n == len(z) == sum(int(batch["attention_mask"].sum()) for batch in data)
    assert torch.allclose(moments.second_moment, z.T @ z / len(z), rtol=1e-9)


def test_dead_units_go_first():
    c = torch.diag(torch.tensor([3.0, 0.0, 1.0, 0.0, 2.0], dtype=torch.float64))
    assert leverage_order(c, 0.01).tolist() == [0, 4, 2, 1, 3]


# --- a narrow model is an ordinary model ------------------------------------------------------------------------------


@every_family
def test_what_is_stored_is_what_is_reported(family):
    model = family_model(family, torch.float32)
    stock = copy.deepcopy(model)
    report = weft.compress(model, "modegpt", keep=0.6, data=batches(model))

    def bits(m):
        new = dict(m.named_parameters()) | {n: b for n, b in m.named_buffers() if n.endswith(".pairs")}
        matrices = [t for n, t in new.items() if ".layers." in n and t.dim() == 2]
        return 8 * sum(t.numel() * t.element_size() for t in matrices)

    added = 2 * 32 * 32 if family == "qwen2" else 0  # an output bias a block
    assert bits(stock) == sum(row.dense for row in report.rows)
    assert bits(model) + added == sum(row.bits for row in report.rows)
    assert 0.57 < report.keep <= 0.6



@every_family
def test_zeros_make_the_stock_model_of_it(family):
    model = narrow(family)
    stock = family_model(family)
    dense = to_dense(copy.deepcopy(model))
    assert [(n, type(m)) for n, m in dense.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (stock, dense)]
    assert shapes[0] == shapes[1]
    batch = padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected, found = (m(**batch).logits[real] for m in (dense, model))
        original = stock(**batch).logits[real]
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert 1e-3 < float((found - original).norm() / original.norm()) < 1


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sizes", ["qk", "vo", None])
def test_it_generates_what_the_stock_model_does(family, attention, sizes):
    """Left padding, batch 16, both caches; heads narrower in keys, in values, in both."""
    model = narrow(family, keep=0.5, dtype=torch.float32, include=sizes)
    model.set_attn_implementation(attention)
    dense = to_dense(copy.deepcopy(model))
    batch = padded()
    wanted = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    expected = dense.generate(**batch, **wanted)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(**batch, **wanted, cache_implementation=cache), expected)
    with torch.no_grad():
        past = model(**batch, use_cache=True).past_key_values
    attention = next(m for m in model.modules() if hasattr(m, "qk"))
    assert past.layers[0].keys.shape[-1] == attention.qk and past.layers[0].values.shape[-1] == attention.v
    assert attention.qk + attention.v < 2 * attention.head_dim


@every_family
def test_attentions_are_recorded_and_checkpointing_gives_the_same_gradients(family):
    model = narrow(family, dtype=torch.float32)
    model.set_attn_implementation("eager")
    batch = padded()
    found = model(**batch, output_attentions=True).attentions
    assert len(found) == 2 and found[0].shape == (16, 4, 11, 11)
    grads = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train()
        if checkpointing:
            copied.gradient_checkpointing_enable()
        copied(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in copied.named_parameters()})
    assert all(torch.allclose(g, grads[1][n], atol=1e-6) for n, g in grads[0].items())
    assert all(g is not None and bool(g.any()) for n, g in grads[0].items() if "proj" in n and "bias" not in n)


def test_flash_gets_heads_that_it_takes():
    """It pads values up to the keys; what it cannot do is narrower keys."""
    model = narrow("llama", keep=0.5, dtype=torch.float32, include="qk")
    met = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        met.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )

    transformers.AttentionInterface.register("stand_in_flash", flash)
    transformers.AttentionMaskInterface.register("stand_in_flash", transformers.masking_utils.sdpa_mask)
    with torch.no_grad():
        expected = model(**padded()).logits
        model.config._attn_implementation = "stand_in_flash"  # transformers accepts no such name from outside
        found = model(**padded()).logits
    assert torch.allclose(found, expected, atol=1e-5) and set(met) == {(8, 8, 8)}


@every_family
@pytest.mark.parametrize("sizes", ["qk", "vo", "mlp", None])
def test_it_loads_with_weft_and_not_without(family, sizes, tmp_path, monkeypatch):
    model = narrow(family, keep=0.7, dtype=torch.float32, include=sizes)
    save_compressed(model, tmp_path / "out")
    batch = padded()
    loaders = [transformers.AutoModelForCausalLM, type(model), transformers.AutoModel]
    with torch.no_grad():
        expected = model(**batch).logits
        for loader in loaders[:2]:
            again = loader.from_pretrained(tmp_path / "out")
            assert torch.equal(again(**batch).logits, expected)
        hidden = model.base_model(**batch).last_hidden_state
        assert torch.equal(loaders[2].from_pretrained(tmp_path / "out")(**batch).last_hidden_state, hidden)
        again.save_pretrained(tmp_path / "again")
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert told[0] == told[1]
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, "weft")
    for loader in loaders:
        with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
            loader.from_pretrained(tmp_path / "out")


def test_a_missing_tensor_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    save_compressed(narrow("llama", dtype=torch.float32), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.1.self_attn.pairs"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(weft.WeftError, match=r"misses model\.layers\.1\.self_attn\.pairs"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_its_layers_can_be_compressed_again_and_adapted(family, tmp_path):
    import peft

    model = narrow(family, dtype=torch.float32)
    ends = ["q_proj", "fc1", "gate_proj"]
    report = weft.compress(model, "svd", keep=0.5, include=ends)
    assert report.replaced == 4
    save_compressed(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(again(**batch).logits, expected)
        dense = to_dense(copy.deepcopy(again))
        assert torch.allclose(dense(**batch).logits[real], expected[real], atol=1e-4)
    adapted = peft.get_peft_model(again, peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj", "fc2", "down_proj"]))
    assert len(adapted.targeted_module_names) == 6
    with pytest.raises(UsageError, match="has no dense form: .* inside is a peft"):
        to_dense(again)


def test_sizes_suit_kernels():
    model = family_model("qwen3", torch.float32)
    report = weft.compress(model, "modegpt", keep=0.7, data=batches(model), round_to=4)
    assert {row.size % 4 for row in report.rows} == {0}
    maker = factoriser("modegpt", weft.ModegptConfig(round_to=24))
    qk, vo, mlp = (list(maker.sizes(pair)) for pair in maker.units(family_model("llama"))[:3])
    assert qk == vo == [8] and mlp == [24]
    maker = factoriser("modegpt", weft.ModegptConfig(round_to=3))
    qk, vo, _ = (list(maker.sizes(pair)) for pair in maker.units(family_model("llama"))[:3])
    assert qk == [2, 4, 6, 8] and vo == [1, 2, 3, 4, 5, 6, 7, 8]


def test_adapters_of_weft_find_its_layers():
    import peft

    model = narrow("llama", dtype=torch.float32)
    before = model(**padded()).logits
    adapted = peft.get_peft_model(model, weft.SoraConfig(r=2, target_modules="all-linear"))
    assert len(adapted.targeted_module_names) == 14
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(**padded()).logits, before, atol=1e-5)


def test_a_second_call_finds_nothing_left():
    model = narrow("llama", include="qk")
    with pytest.raises(UsageError, match="leave nothing; there are: mlp"):
        weft.compress(model, "modegpt", include="qk", data=batches(model))
