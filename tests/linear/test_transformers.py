"""Law 6 and its neighbours: a model with structured layers is an ordinary transformers model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import compressed
import forked
import pytest
import tiny
import torch
import transformers
from compressed import AUTO, CASES, KINDS, MODELS, MORE_CASES, inputs, logits, make, structured
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from weft.linear._structured import DENSE, StructuredLinear, stored_bits
from weft.linear._transformers import attach_format, save_compressed, to_dense, to_linears
from weft.linear.factored_embedding import FactoredEmbedding
from weft.linear.low_rank import LowRank
from weft.linear.low_rank_conv import LowRankConv

WORKER = Path(__file__).with_name("reload_worker.py")


def loaders(name: str) -> tuple[str, str, str]:
    return "AutoModel", AUTO[name], type(MODELS[name][0]()).__name__


def load(folder: Path, name: str, **kwargs):
    return getattr(transformers, AUTO[name]).from_pretrained(folder, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Every case, saved."""
    folders = {}
    for name, kind in MORE_CASES:
        folder = folders[name, kind] = tmp_path_factory.mktemp("saved") / f"{name}-{kind}"
        model = compressed.compressed(name, kind)
        save_compressed(model, folder)
        expected = {"logits": logits(model), "last_hidden_state": logits(model.base_model)}
        save_file(expected, folder / "expected.st")
    return folders


@pytest.fixture(scope="module")
def resaved(saved, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """The same, loaded and saved again."""
    folders = {}
    for (name, kind), folder in saved.items():
        again = folders[name, kind] = tmp_path_factory.mktemp("resaved") / f"{name}-{kind}"
        load(folder, name).save_pretrained(again)
        shutil.copy(folder / "expected.st", again)
    return folders


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


more = pytest.mark.parametrize("case", MORE_CASES, ids="-".join)


def test_every_kind_and_every_model_is_among_the_cases():
    assert {kind for _, kind in CASES} == set(KINDS) and {name for name, _ in CASES} == set(MODELS)


@pytest.mark.slow
def test_a_new_process_loads_it_by_every_class_bit_for_bit_and_without_weft_by_none(saved):
    jobs = [(str(saved[case]), loader) for case in CASES for loader in loaders(case[0])]
    done = forked.run([WORKER, json.dumps(jobs)], env=tiny.environment(), libraries=forked.TORCH)
    assert done.returncode == 0, done.stderr[-3000:]
    without, told = json.loads(done.stdout.splitlines()[-1])
    assert len(without) == len(told) == len(jobs)
    assert all(value.startswith("RuntimeError") for value in without.values()), without
    assert set(told.values()) == {"equal"}, told


@more
def test_the_second_save_is_the_first(saved, resaved, case):
    first, second = saved[case], resaved[case]
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())
    tensors = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][key]) for key, t in tensors[0].items())


@more
def test_the_config_names_modules_as_the_base_model_does(saved, case):
    name, kind = case
    told = json.loads((saved[case] / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "weft" and told["format"] == 1
    model = make(name)
    whole, base = dict(model.named_modules()), dict(model.base_model.named_modules())
    assert set(told["modules"]) <= set(base) | {"classifier"} and told["modules"]
    assert {spec["kind"] for spec in told["modules"].values()} == {kind}
    assert {spec.get("bias", False) for spec in told["modules"].values()} == {name in ("gpt2", "bert")}
    assert ("classifier" in told["modules"]) == (name == "bert") and "classifier" in (set(whole) | {"classifier"})


def test_shards(saved, case, tmp_path):
    name, _ = case
    model = load(saved[case], name)
    save_compressed(model, tmp_path / "out", max_shard_size="2KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "out", name)), logits(model))


def test_another_head_leaves_the_first_head_out(saved):
    """A head's structured layer is nothing to a model with another head; the body is found all the same."""
    model = transformers.BertForTokenClassification.from_pretrained(saved["bert", "low_rank"])
    assert torch.equal(logits(model.bert), load_file(saved["bert", "low_rank"] / "expected.st")["last_hidden_state"])
    again = transformers.BertForMaskedLM.from_pretrained(saved["bert", "low_rank"])  # without pooler and classifier
    expected = load_file(saved["bert", "low_rank"] / "expected.st")["last_hidden_state"]
    assert torch.equal(logits(again.bert), expected) and len(structured(again)) == len(structured(model)) - 1


@pytest.mark.parametrize("of", ["factor", "bias", "marker"])
def test_a_missing_tensor_is_an_error(saved, case, of, tmp_path):
    folder = shutil.copytree(saved[case], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name, layer = next(iter(structured(load(folder, case[0])).items()))
    own = {key for key, t in layer.state_dict(keep_vars=True).items() if (t is layer.bias) == (of == "bias")}
    own = {key for key in own if of == "bias" or (key == "weight") == (of == "marker")}
    if not own:
        assert of == "bias" and case[0] in ("llama", "bert_words", "resnet")
        return
    del tensors[f"{name}.{min(own)}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(weft.WeftError, match=rf"the checkpoint misses .*{name.rpartition('.')[2]}.{min(own)}"):
        load(folder, case[0])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.update(format=2), "format 2, and this weft reads up to 1"),
        (lambda c: c.update(grain="fine"), "has a field 'grain'"),
        (lambda c: c["modules"]["layers.0.mlp.up_proj"].update(kind="low_rang"), "layers.0.mlp.up_proj: unknown kind"),
        (lambda c: c["modules"]["layers.0.mlp.up_proj"].update(version=9), "version 9 here, and this weft reads up to"),
        (lambda c: c["modules"].update({"layers.7.mlp.up_proj": {}}), "layers.7.mlp.up_proj, which LlamaFor"),
        (lambda c: c["modules"].update({"norm": {"kind": "low_rank"}}), "norm: a low.*, but it is a LlamaRMSNorm"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(saved, change, said, tmp_path):
    folder = shutil.copytree(saved["llama", "low_rank"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(weft.UsageError, match=said):
        load(folder, "llama")


def test_a_dense_checkpoint_is_not_loaded_into_structured_layers(tmp_path):
    from weft.linear._transformers import WeftFormat

    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path, "llama", quantization_config=WeftFormat({}))


def test_it_is_cast_like_any_model(saved, case):
    name, _ = case
    model = load(saved[case], name)
    wide = logits(model)
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.bfloat16)):
        cast()
        assert {t.dtype for layer in structured(model).values() for t in layer.parameters()} == {model.dtype}
        assert {layer.weight.dtype for layer in structured(model).values()} == {model.dtype}
    assert (logits(model).float() - wide).norm() < 0.1 * wide.norm()
    assert logits(model.float()).dtype == torch.float32
    narrow = load(saved[case], name, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert (logits(narrow).float() - wide).norm() < 0.1 * wide.norm()


def test_bfloat16_comes_back_as_bfloat16(case, tmp_path):
    name, kind = case
    model = compressed.compressed(name, kind, torch.bfloat16)
    save_compressed(model, tmp_path / "out")
    again = load(tmp_path / "out", name)
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))


def test_trainer_trains_every_weight_and_saves_it(saved, case, tmp_path):
    name, _ = case
    model = load(saved[case], name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    rows = [{key: t[0] for key, t in inputs(model).items()}, {key: t[1] for key, t in inputs(model).items()}]
    for at, row in enumerate(rows):
        row["labels"] = row["input_ids"] if name in ("llama", "gpt2") else torch.tensor(at)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[]
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    resumed = transformers.Trainer(load(saved[case], name), arguments, train_dataset=rows)
    resumed.args.max_steps = 3
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    inner = {f"{n}.{key}" for n, layer in structured(model).items() for key, _ in layer.named_parameters()}
    assert inner and inner - moved <= {f"{n}.bias" for n in inner}, sorted(inner - moved)
    trainer.save_model(tmp_path / "trained")
    for folder in (tmp_path / "trained", tmp_path / "checkpoint-2"):
        assert torch.equal(logits(load(folder, name)), logits(model.eval()))


def test_it_generates(saved):
    model = load(saved["llama", "low_rank"], "llama")
    tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 8)


def test_it_is_copied_and_compiled(saved, case):
    model = load(saved[case], case[0])
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    layer = next(iter(structured(model).values()))
    if case[0] == "resnet":
        x = inputs(model)["pixel_values"]
    else:
        x = torch.arange(6) if case[0] == "bert_words" else torch.randn(3, layer.in_features)
    assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x), atol=1e-6)


def test_layers_may_lie_on_disk(saved, tmp_path):
    """Layers that accelerate fetches when needed come without an alarm about tensors that are not there yet."""
    folder = saved["llama", "low_rank"]
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = load(folder, "llama", device_map=places, offload_folder=tmp_path)
    assert torch.equal(logits(model), load_file(folder / "expected.st")["logits"])


# --- adapters on top --------------------------------------------------------------------------------------------------


def adapted(model, config, seed: int = 0):
    import peft

    model = peft.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model.eval()


LORA = [case for case in CASES if not case[1].endswith("_conv")]  # PEFT refuses these


def configs(name: str) -> list:
    import peft

    targets = {
        "llama": ["q_proj", "down_proj"],
        "gpt2": ["c_attn"],
        "bert": ["query", "output.dense"],
        "bert_words": ["word_embeddings"],
        "resnet": ["layer.1.convolution"],
    }[name]
    lora = peft.LoraConfig(r=2, target_modules=targets)
    return [lora, weft.SoraConfig(r=2, target_modules=targets), weft.SvfitConfig(target_modules=targets)]


@pytest.mark.parametrize("which", ["lora", "sora", "svfit"])
def test_adapters_on_whole_structured_layers(saved, case, which, tmp_path):
    import peft

    name, kind = case
    config = configs(name)[["lora", "sora", "svfit"].index(which)]
    layer = next(iter(structured(load(saved[case], name)).values()))
    if kind.endswith("_conv") and which == "lora":
        with pytest.raises(ValueError, match=rf"(?s)Target module {type(layer).__name__}.* is not supported"):
            adapted(load(saved[case], name), config)
        return
    if (which == "svfit" and not layer.linear) or (which != "lora" and not isinstance(layer, StructuredLinear)):
        with pytest.raises(weft.UsageError, match=kind):
            adapted(load(saved[case], name), config)
        return
    model = adapted(load(saved[case], name), config)
    base = load(saved[case], name)
    assert (logits(model) - logits(base)).norm() > 1e-3 * logits(base).norm()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model(**inputs(model))[0].sum().backward()
    assert not any(p.grad is not None for key, p in model.named_parameters() if ".base_layer." in key)
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("case", LORA, ids="-".join)
def test_transformers_own_adapters(saved, case, tmp_path):
    name, _ = case
    model, config = load(saved[case], name), configs(name)[0]
    model.add_adapter(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=draw))
    expected = logits(model.eval())
    for refused in (attach_format, to_dense):
        with pytest.raises(weft.UsageError, match="has an adapter on it"):
            refused(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "config.json").exists()
    again = load(saved[case], name)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("case", LORA, ids="-".join)
def test_an_adapter_is_the_dense_update(saved, case):
    """y = structured(x) + s·x·Aᵀ·Bᵀ, written out; of an embedding, x has a one for each id."""
    name, _ = case
    model = adapted(load(saved[case], name), configs(name)[0])
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer"))
    draw = torch.Generator().manual_seed(0)
    if name == "bert_words":
        x = torch.arange(31)
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        update = torch.eye(31).double() @ a.double().T @ b.double().T
    else:
        x = torch.randn(3, layer.in_features, generator=draw)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = x.double() @ a.double().T @ b.double().T
    base = layer.base_layer(x).double()
    expected = base + layer.scaling["default"] * update.view(base.shape)
    assert torch.allclose(layer(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", LORA, ids="-".join)
def test_merging_into_a_structured_layer_is_refused(saved, case):
    name, kind = case
    if isinstance(next(iter(structured(load(saved[case], name)).values())), StructuredLinear):
        model = adapted(load(saved[case], name), configs(name)[1])
        before = logits(model)
        with pytest.raises(weft.UsageError, match=f"is stored as {kind}, which cannot take"):
            model.merge_adapter()
        assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError):  # PEFT's own finds no matrix to add to
        adapted(load(saved[case], name), configs(name)[0]).merge_and_unload()


@pytest.mark.parametrize("which", ["lora", "sora"])
def test_all_linear_layers_are_the_structured_ones_and_not_their_factors(saved, which, tmp_path):
    import peft

    folder = saved["llama", "low_rank"]
    config = {
        # PEFT's own would take the factors as well, inside layers that are wrapped already, and stumble
        "lora": peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*\.(up|down)"),
        "sora": weft.SoraConfig(r=2, target_modules="all-linear"),
    }[which]
    model = adapted(load(folder, "llama"), config)
    linear = [n for n, m in make("llama").named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert sorted(n.removeprefix("base_model.model.") for n in model.targeted_module_names) == sorted(linear)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder, "llama"), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_lora_on_the_factors_inside(saved):
    import peft

    model = adapted(load(saved["llama", "low_rank"], "llama"), peft.LoraConfig(r=2, target_modules=["up", "down"]))
    inner = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(inner, LowRank) and hasattr(inner.up, "lora_A") and inner.bias is None
    merged = model.merge_and_unload()
    assert set(structured(merged)) == set(structured(load(saved["llama", "low_rank"], "llama")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_torchao_quantises_the_factors_inside(saved, name, dtype, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = load(saved[name, "low_rank"], name, dtype=dtype)
    before = logits(model).float()
    untied = [n for n, m in model.named_modules() if type(m) in DENSE and n != "lm_head"]
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, where: where in untied)
    layer = next(iter(structured(model).values()))
    assert type(layer.up.weight).__module__.startswith("torchao") and type(layer.weight) is torch.Tensor
    assert 0 < (logits(model).float() - before).norm() < 0.1 * before.norm()
    if dtype is torch.float32:
        numbers = layer.up.weight.numel() + layer.down.weight.numel()
        assert 8 * numbers < stored_bits(layer) < 12 * numbers, "codes, and what each row has besides"
    with pytest.raises(weft.UsageError, match=r"has no dense form while (up|down).weight is quantised"):
        to_dense(model)
    for folder in (tmp_path / "once", tmp_path / "twice"):  # what was loaded is saved as it was
        model.save_pretrained(folder)
        again = load(folder, name, dtype=dtype)
        assert torch.equal(logits(again), logits(model))
        types = [[(n, type(t)) for n, t in each.state_dict().items()] for each in (again, model)]
        assert sorted(types[0], key=str) == sorted(types[1], key=str)
        model = again
    base = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
    assert torch.equal(logits(base), logits(model.base_model))


def test_a_quantised_tensor_is_whole_and_not_tied(saved, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = load(saved["llama", "low_rank"], "llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, where: where.endswith(".up"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in tensors if key.endswith("_weight_qdata"))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(weft.WeftError, match="misses a part of a quantised tensor: _weight_qdata"):
        load(tmp_path, "llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, where: where == "lm_head")
    with pytest.raises(weft.UsageError, match=r"lm_head.weight is quantised and tied to model.embed_tokens.weight"):
        model.save_pretrained(tmp_path / "tied")


# --- dense again ------------------------------------------------------------------------------------------------------


@more
def test_dense_export_is_the_stock_model(saved, case, tmp_path):
    name, _ = case
    model = load(saved[case], name)
    before = logits(model)
    if not all(layer.linear for layer in structured(model).values()):
        with pytest.raises(weft.UsageError, match="no linear map"):
            to_dense(model)
        assert torch.equal(logits(model), before)
        return
    stock = make(name)
    dense = to_dense(copy.deepcopy(model))
    assert [(n, type(m)) for n, m in dense.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert (logits(dense) - before).norm() <= 1e-5 * before.norm()
    assert not dense.training and {p.requires_grad for p in dense.parameters()} == {True}
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path, name)), logits(dense))
    assert torch.equal(logits(load(saved[case], name).dequantize()), logits(dense)), "transformers' own word for it"


@more
def test_stock_layers_in_a_row_are_the_same_model(saved, case, tmp_path):
    name, kind = case
    model = load(saved[case], name)
    before, layers = logits(model), structured(model)
    if not all(layer.linear for layer in layers.values()):
        with pytest.raises(weft.UsageError, match="no linear map"):
            to_linears(model)
        return
    size = sum(p.numel() for p in model.parameters())
    assert to_linears(model) is model and not structured(model)
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()
    row = any(isinstance(model.get_submodule(name), nn.Sequential) for name in layers)
    assert row == (kind in ("low_rank", "spectral", "factored_embedding") or kind.endswith("_conv"))
    if row:
        assert sum(p.numel() for p in model.parameters()) <= size
        with pytest.raises(weft.UsageError, match="layers in a row: save a state_dict"):
            model.save_pretrained(tmp_path)


def test_a_plain_module_has_both_forms():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect")
    flat = nn.Linear(9, 30)
    first = LowRankConv.from_dense(conv.weight, conv.bias, rank=2, like=conv)
    small = nn.ModuleList([first, LowRank.from_dense(flat.weight, rank=9)])
    x, z = torch.randn(2, 4, 7, 5), torch.randn(3, 9)
    expected = [small[0](x), small[1](z)]
    row, dense = (form(copy.deepcopy(small)) for form in (to_linears, to_dense))
    assert [type(m) for m in dense] == [nn.Conv2d, nn.Linear]
    assert [type(m) for m in row] == [nn.Sequential, nn.Linear], "full rank has more numbers than the dense layer"
    for model in (row, dense):
        torch.testing.assert_close([model[0](x), model[1](z)], expected)


def test_a_bias_that_the_stock_layer_lacks_has_no_dense_form():
    model = make("llama")
    layer = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = LowRank.from_dense(layer.weight, torch.ones(37), rank=3)
    before = logits(attach_format(model))
    with pytest.raises(weft.UsageError, match="up_proj has no dense form: the stock layer has no place"):
        to_dense(model)
    assert torch.equal(logits(model), before)


# --- what is left alone, and what is refused --------------------------------------------------------------------------


def test_tied_embeddings_stay_tied(saved):
    model = load(saved["llama", "low_rank"], "llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(saved["llama", "low_rank"] / "model.safetensors")


def test_a_tied_head_must_stay_dense():
    model = make("llama")
    model.lm_head = LowRank.from_dense(model.lm_head.weight, rank=3)
    with pytest.raises(weft.UsageError, match="lm_head is tied to model.embed_tokens.weight"):
        attach_format(model)


def test_an_embedding_that_is_tied_to_a_head_must_stay_dense():
    model = make("llama")
    model.model.embed_tokens = FactoredEmbedding.from_dense(model.model.embed_tokens.weight, rank=3)
    with pytest.raises(weft.UsageError, match="embed_tokens is tied to lm_head.weight"):
        attach_format(model)


def test_a_model_that_keeps_all_its_layers_stays_a_stock_one(tmp_path):
    model = make("bert")
    save_compressed(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "out", "bert")), logits(model))


def test_a_change_after_attaching_is_saved_as_it_is(tmp_path):
    model = compressed.compressed("llama", "low_rank")
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, LowRank)
    model.model.layers[1].mlp.up_proj = LowRank.from_dense(layer.dense(), rank=2)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, "llama")
    assert again.model.layers[1].mlp.up_proj.rank == 2 and torch.equal(logits(again), logits(model))


def test_a_quantised_model_is_refused():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = make("llama")
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model.hf_quantizer = transformers.quantizers.AutoHfQuantizer.from_config(config)
    with pytest.raises(weft.UsageError, match="quantised by torchao"):
        attach_format(model)


# --- written whole or not at all --------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(weft.UsageError, match="exists already"):
        save_compressed(compressed.compressed("bert", "low_rank"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --- weft's own verbs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sora", "peft:lora"])
def test_weft_adapt_takes_whole_structured_layers(saved, name):
    from weft.run import methods

    model = load(saved["llama", "low_rank"], "llama")
    method = methods.resolve(name, {"r": 2})
    linear = [n for n, m in make("llama").named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert methods.check_fits(method, model) == linear
    attached = methods.attach(method, model)
    assert sorted(n.removeprefix("base_model.model.") for n in attached.targeted_module_names) == sorted(linear)
