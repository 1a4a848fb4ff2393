"""Linformer attention against its formula written out in float64, and against the attention that it stands for."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import weft
from weft.compress.greenformers import linformer, means
from weft.linear._structured import Structured
from weft.linear._transformers import save_compressed, to_dense, to_linears
from weft.linear.linformer_attention import LinformerAttention

LONGEST = 24
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
PLACES = {"max_position_embeddings": LONGEST + 2, "pad_token_id": 0}  # RoBERTa's begin at 2
FAMILIES = {
    "Bert": (hf.BertConfig, {}),
    "Camembert": (hf.CamembertConfig, {}),
    "Data2VecText": (hf.Data2VecTextConfig, {}),
    "Electra": (hf.ElectraConfig, {"embedding_size": 16}),
    "Ernie": (hf.ErnieConfig, {}),
    "RoCBert": (hf.RoCBertConfig, {"enable_pronunciation": False, "enable_shape": False}),
    "Roberta": (hf.RobertaConfig, {}),
    "RobertaPreLayerNorm": (hf.RobertaPreLayerNormConfig, {}),
    "XLMRoberta": (hf.XLMRobertaConfig, {}),
    "XLMRobertaXL": (hf.XLMRobertaXLConfig, {}),
    "Xmod": (hf.XmodConfig, {"default_language": "en_XX", "languages": ["en_XX"]}),
}
both = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def encoder(family: str = "Bert", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A classifier whose biases and attention are not what a fresh one has."""
    config, more = FAMILIES[family]
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(config(**{**SIZES, **PLACES, **more, **options}))
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    return model.to(dtype).eval()


def batch(*lengths: int, left: bool = False) -> dict[str, Tensor]:
    """Sequences of these lengths with padding on one side."""
    ids = torch.randint(3, 31, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    counts = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    counts = counts.flip(1) if left else counts
    return {"input_ids": torch.where(counts, ids, 0), "attention_mask": counts.long()}


def attentions(model: nn.Module) -> list[LinformerAttention]:
    return [m for m in model.modules() if isinstance(m, LinformerAttention)]


def written_out(attention: Any, x: Tensor, counts: Tensor) -> Tensor:
    """One sequence (L × d), head by head; E and F of what counts alone."""
    d, h = x.shape[1], attention.attention_head_size
    summed = [side.along[:, : len(x)][:, counts] @ x[counts] for side in (attention.key, attention.value)]
    layers = attention.query, attention.key.linear, attention.value.linear
    q, k, v = (each @ layer.weight.mT + layer.bias for each, layer in zip((x, *summed), layers))
    heads = []
    for at in range(0, d, h):
        scores = q[:, at : at + h] @ k[:, at : at + h].mT / h**0.5
        heads.append(scores.softmax(1) @ v[:, at : at + h])
    return torch.cat(heads, dim=1)


# --- the formula ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("k", [1, 5, LONGEST])
def test_it_is_the_formula(k, left, attention):
    model = encoder()
    model.set_attn_implementation(attention)
    layer = attentions(linformer(model, k=k))[0]
    data, seen = batch(17, 9, 1, left=left), []
    layer.register_forward_hook(lambda module, args, kwargs, y: seen.append((args[0], y[0])), with_kwargs=True)
    model(**data)
    ((x, y),) = seen
    assert y.shape == x.shape == (3, 17, 16)
    for row, found, counts in zip(x, y, data["attention_mask"].bool()):
        torch.testing.assert_close(found, written_out(layer, row, counts), rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_identity_it_is_the_stock_attention(family, attention):
    stock = encoder(family)
    stock.set_attn_implementation(attention)
    model = linformer(copy.deepcopy(stock), k=LONGEST, n=LONGEST, start="means")
    assert len(attentions(model)) == 2 and all(
        torch.equal(side.along, torch.eye(LONGEST).double()) for m in attentions(model) for side in (m.key, m.value)
    )
    for data in (batch(LONGEST), batch(LONGEST, 5, 11), batch(7, 1), batch(7, 3, left=True)):
        counts = data["attention_mask"].bool()
        found, expected = (m.base_model(**data).last_hidden_state[counts] for m in (model, stock))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found, expected = (m(input_ids=batch(9)["input_ids"]).logits for m in (model, stock))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_all_families_are_tried():
    assert [f"{name}SelfAttention" for name in FAMILIES] == list(LinformerAttention.stocks)


@both
def test_padding_and_what_stands_beside_change_nothing(attention):
    for start in ("random", "means"):
        model = encoder()
        model.set_attn_implementation(attention)
        linformer(model, k=6, start=start)
        data = batch(9, 20, 2)
        together = model(**data).logits
        for i, length in enumerate((9, 20, 2)):
            alone = model(input_ids=data["input_ids"][i : i + 1, :length]).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_means_are_of_consecutive_tokens():
    assert means(3, 7).tolist() == [[1 / 3] * 3 + [0] * 4, [0] * 3 + [0.5] * 2 + [0] * 2, [0] * 5 + [0.5] * 2]
    torch.testing.assert_close(means(5, 12).sum(1), torch.ones(5).double())
    assert torch.equal(means(4, 4), torch.eye(4).double())


def test_random_sums_of_a_full_sequence_are_as_large_as_a_token():
    layers = attentions(linformer(encoder(dtype=torch.float32, max_position_embeddings=400), k=200))
    drawn = [side.along for m in layers for side in (m.key, m.value)]
    assert all(float(t.square().sum(1).mean()) == pytest.approx(1, rel=0.05) for t in drawn)
    assert len({float(t.sum()) for t in drawn}) == 4
    again = attentions(linformer(encoder(dtype=torch.float32, max_position_embeddings=400), k=200))
    other = attentions(linformer(encoder(dtype=torch.float32, max_position_embeddings=400), k=200, seed=1))
    assert torch.equal(again[0].key.along, drawn[0]) and not torch.equal(other[0].key.along, drawn[0])


def test_everything_learns_and_what_is_added_is_two_projections_a_layer():
    stock = encoder()
    model = linformer(copy.deepcopy(stock), k=5, n=20)
    grown = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in stock.parameters())
    assert grown == 2 * 2 * 5 * 20
    grads = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train()
        for m in copied.modules():
            m.p = 0.0 if isinstance(m, nn.Dropout) else getattr(m, "p", None)
        if checkpointing:
            copied.gradient_checkpointing_enable()
        copied(**batch(12, 7), labels=torch.tensor([0, 1])).loss.backward()
        grads.append({name: p.grad for name, p in copied.named_parameters()})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-9, atol=1e-12)
    for name in ("key.along", "value.along"):
        found = grads[0][f"bert.encoder.layer.0.attention.self.{name}"]
        assert bool(found[:, :12].all()) and not found[:, 12:].any()  # the longest has 12 tokens


def test_the_weights_are_recorded_over_sums():
    model = encoder()
    model.set_attn_implementation("eager")
    found = linformer(model, k=5)(**batch(9, 4), output_attentions=True).attentions
    assert [each.shape for each in found] == [(2, 2, 9, 5)] * 2
    torch.testing.assert_close(found[0].sum(-1), torch.ones(2, 2, 9).double())


def test_bfloat16_stays_so():
    model = linformer(encoder(dtype=torch.bfloat16), k=5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    wide = copy.deepcopy(model).double()
    for attention in ("eager", "sdpa"):
        for each in (model, wide):
            each.set_attn_implementation(attention)
        torch.testing.assert_close(model(**batch(9, 4)).logits.double(), wide(**batch(9, 4)).logits, rtol=0.1, atol=0.1)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_causal_models_are_refused():
    decoder = hf.BertLMHeadModel(hf.BertConfig(**SIZES, **PLACES, is_decoder=True))
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2))
    for model in (decoder, llama):
        with pytest.raises(weft.UsageError, match=f"{type(model).__name__} is causal, and a sum over the sequence"):
            linformer(model, k=4)
        assert not attentions(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "k=0: of n=26 tokens there are 1 to 26 sums"),
        ({"k": 9, "n": 8}, "k=9: of n=8 tokens there are 1 to 8 sums"),
        ({"k": 4, "n": 27}, "n=27: the longest sequence that BertForSequenceClassification will take, at most 26"),
        ({"k": 4, "start": "zero"}, "start='zero': random or means"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, said):
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(weft.UsageError, match=said):
        linformer(model, **options)
    assert not attentions(model) and model.state_dict().keys() == before.keys()


def test_other_models_are_refused_by_name():
    for model in (nn.Sequential(nn.Linear(4, 4)), hf.ViTModel(hf.ViTConfig(**{**SIZES, "vocab_size": None}))):
        with pytest.raises(weft.UsageError, match=f"{type(model).__name__} has no attention that can be Lin.*BertSelf"):
            linformer(model, k=4, n=8)
    with pytest.raises(weft.UsageError, match="has no attention that can be Linformer's"):
        linformer(linformer(encoder(), k=4), k=4)
    with pytest.raises(weft.UsageError, match="n=None: the longest sequence that BertLayer will take"):
        linformer(encoder().bert.encoder.layer[0], k=4)


def test_a_longer_sequence_is_refused():
    model = linformer(encoder(), k=4, n=8)
    assert model(**batch(8)).logits.shape == (1, 2)
    with pytest.raises(weft.UsageError, match="a sequence of 9 tokens: this Linformer's projections are made for 8"):
        model(**batch(9, 4))


@both
def test_a_mask_of_each_query_is_refused(attention):
    model = encoder()
    model.set_attn_implementation(attention)
    linformer(model, k=4)
    ids = batch(6)["input_ids"]
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()[None, None]
    padded = (torch.arange(6) < 4).expand(1, 1, 6, 6)
    for mask, served in ((packed, False), (padded, True), (torch.ones(6, 6).tril().bool()[None, None], False)):
        for form in (mask, torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(torch.float64).min)):
            if served:
                expected = model(input_ids=ids, attention_mask=mask[0, :, 0].long()).logits
                torch.testing.assert_close(model(input_ids=ids, attention_mask=form).logits, expected)
                continue
            with pytest.raises(weft.UsageError, match="its attention_mask can tell padding, no more"):
                model(input_ids=ids, attention_mask=form)


def test_other_attention_functions_are_refused():
    model = linformer(encoder(), k=4)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(weft.UsageError, match="attn_implementation='flex_attention': .* has eager and sdpa"):
        attentions(model)[0](torch.ones(1, 6, 16).double())
    model.config._attn_implementation = "sdpa"
    with pytest.raises(weft.UsageError, match="keeps no keys and values"):
        attentions(model)[0](torch.ones(1, 6, 16).double(), past_key_values=hf.DynamicCache())


def test_it_has_no_stock_form():
    for convert in (to_dense, to_linears):
        model = linformer(encoder(), k=LONGEST, start="means")
        with pytest.raises(weft.UsageError, match=r"layer\.0\.attention\.self has no dense form: .* to sums"):
            convert(model)
        assert len(attentions(model)) == 2


# --- a model as any other ---------------------------------------------------------------------------------------------


def both_ideas(order: str) -> Any:
    model = encoder(dtype=torch.float32)
    for step in order.split():
        if step == "sums":
            linformer(model, k=5, n=20)
        else:
            ends = ["query", "key", "value", "key.linear", "value.linear", "intermediate.dense"]
            weft.compress(model, "greenformers", keep=0.5, include=ends)
    return model.eval()


@pytest.mark.parametrize("order", ["sums", "sums factors", "factors sums"])
def test_it_loads_with_weft_and_not_without(order, tmp_path, monkeypatch):
    model, data = both_ideas(order), batch(12, 7)
    save_compressed(model, tmp_path / "out")
    loaders = [hf.AutoModelForSequenceClassification, hf.BertForSequenceClassification, hf.AutoModel]
    with torch.no_grad():
        expected, hidden = model(**data).logits, model.bert(**data).last_hidden_state
        for loader in loaders:
            again = loader.from_pretrained(tmp_path / "out")
            made = [type(m).__name__ for m in again.modules() if isinstance(m, Structured)]
            assert made.count("LinformerBertSelfAttention") == 2
            assert made.count("LowRank") == 8 * ("factors" in order)
            if loader is hf.AutoModel:
                assert torch.equal(again(**data).last_hidden_state, hidden)
            else:
                assert torch.equal(again(**data).logits, expected)
                again.save_pretrained(tmp_path / "again", safe_serialization=True)
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert told[0] == told[1] and tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, "weft")
    for loader in loaders:
        with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
            loader.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("lost", ["key.along", "value.linear.bias", "query.weight", "key.weight"])
def test_a_missing_tensor_is_an_error(lost, tmp_path):
    save_compressed(both_ideas("sums"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors[f"bert.encoder.layer.1.attention.self.{lost}"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(weft.WeftError, match=rf"misses bert\.encoder\.layer\.1\.attention\.self\.{lost}"):
        hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_both_orders_are_one_model():
    found = [both_ideas(order) for order in ("sums factors", "factors sums")]
    a, b = (m(**batch(12, 7)).logits for m in found)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_adapters_find_its_layers():
    model, data = both_ideas("sums"), batch(12, 7)
    before = model(**data).logits
    ends = ["query", "key.linear", "value.linear"]
    config = peft.LoraConfig(r=2, target_modules=ends, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    assert len(adapted.targeted_module_names) == 6
    changed = adapted(**data).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(**data).logits, changed, rtol=1e-3, atol=1e-4)
    ours = peft.get_peft_model(both_ideas("sums"), weft.SoraConfig(r=2, target_modules="all-linear")).eval()
    served = {name.rpartition(".")[2] for name in ours.targeted_module_names}
    assert served == {"query", "linear", "dense", "classifier"}
    torch.testing.assert_close(ours(**data).logits, before, rtol=1e-4, atol=1e-5)


def test_calibrated_methods_see_its_layers():
    model = linformer(encoder(), k=5, n=20)
    data = [batch(12, 7), batch(9, 9)]
    report = weft.compress(model, "svd_llm", keep=0.5, include=["key.linear", "query"], data=data)
    assert report.replaced == 4 and torch.isfinite(model(**batch(12, 7)).logits).all()


def test_trainer_saves_and_resumes_it(tmp_path):
    def trained(folder: str, steps: int, resume: bool = False) -> dict[str, Tensor]:
        model = linformer(encoder(dtype=torch.float32), k=5, n=20)
        args = hf.TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=4, report_to="none", use_cpu=True,
            seed=0, save_steps=2, logging_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        rows = [{"input_ids": [3 + i % 20, 3, 4], "labels": i % 2} for i in range(24)]
        trainer = hf.Trainer(model, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = trained("whole", 4)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4").state_dict()
    assert all(torch.equal(t, again[name]) for name, t in whole.items())
    trained("halves", 2)
    resumed = trained("halves", 4, resume=True)
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())
