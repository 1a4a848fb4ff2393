"""The laws of compression, tried on every method of the registry."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # models.py

from models import MODELS, Plain, batches, llama, tokens

import weft
from weft.compress import _engine
from weft.compress._allocate import READS
from weft.compress._calibration import Corpus, calibrate
from weft.compress._engine import compress
from weft.compress._factoriser import factoriser
from weft.compress._layers import Group, targets
from weft.errors import UsageError
from weft.linear._structured import Structured, stored_bits

METHODS = sorted(weft.cards("compress"))
every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", MODELS)


def logits(model, data):
    with torch.no_grad():
        return model(**data[0]).logits


def units(maker, method, model):
    """What a method takes apart: layers, or groups of them in models that it knows; it refuses all others by name."""
    try:
        return maker.units(model)
    except UsageError as refused:
        assert "groups" in weft.card(method).reasons and f"and {type(model).__name__} has" in str(refused)
        return []


def parts(method, model, data, **options):
    """The method, its units, and the statistics of each, without the engine."""
    maker = factoriser(method, weft.config_class(method)(**options))
    found = units(maker, method, model)
    layers = [part for unit in found for part in unit.parts]
    statistics = calibrate(model, [Corpus(data)], layers, {layer.name: maker.needs(layer) for layer in layers})
    return maker, found, {
        unit.name: {part.name: statistics[part.name] for part in unit.parts}
        if isinstance(unit, Group)
        else statistics[unit.name]
        for unit in found
    }


def inputs(layer, dtype):
    """What the layer takes: rows, images, or every id."""
    if isinstance(layer.module, torch.nn.Embedding):
        return torch.arange(layer.in_)
    shape = (4, layer.module.in_channels, 9, 8) if isinstance(layer.module, torch.nn.Conv2d) else (40, layer.in_)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


# settings at which a method loses nothing, where that is not its largest size
FULL = {
    "r_sparse": {"target_sparsity": 0, "sparse_ratio": 1, "prefill_ratio": 0.999},
    "int21": {"rank": 99, "start": "svd"},
    "factorllm": {"target_sparsity": 0},
}


def keeping(method, share):
    """The option for this share of the stored bits; of the bits read for a token, for a method that stores all.

    A method with a fixed point gets a share that it can reach on these models, half of whose layers it cannot serve.
    """
    card = weft.card(method)
    share = max(share, 0.95) if "fixed_point" in card.reasons and "keep" not in card.reasons else share
    option = {card.knob: round(1 - share, 9)} if "keep" in card.reasons else {"keep": share}
    own = weft.config_class(method).own_fields()
    return option | {f.name: f.metadata["short"] for f in own if "short" in f.metadata}


def offered(method):
    """The allocators that a method's config has; where each size is work of its own, none that compares errors."""
    return get_args(get_type_hints(weft.config_class(method))["allocate"])


# 1. keep = stored bits after / before


@every_method
@every_model
@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_what_is_stored_is_what_was_promised(method, name, keep):
    model = MODELS[name]()
    maker = factoriser(method, weft.config_class(method)())
    before = {unit.name: unit for unit in units(maker, method, model)}
    options = keeping(method, keep)
    if not before:
        with pytest.raises(UsageError, match=f"and {type(model).__name__} has"):
            compress(model, method, **options, data=batches(model))
        return
    biased = {part.name for unit in before.values() for part in unit.parts if part.bias is not None}
    if "groups" in weft.card(method).reasons:  # which leave nothing out, but what the card says
        grouped = [part.name for unit in before.values() for part in unit.parts]
        there = {layer.name for layer in targets(model, None, None)}
        assert len(set(grouped)) == len(grouped) and set(grouped) <= there
        assert (set(grouped) < there) == ("leaves" in weft.card(method).reasons)
    dense, whole = sum(unit.bits for unit in before.values()), stored_bits(model, bias=True)
    keep = options.get("keep", keep)
    if not any(len(maker.sizes(unit)) for unit in before.values()):
        with pytest.raises(UsageError, match="below the smallest form of this method, which stores 1 of"):
            compress(model, method, **options, data=batches(model))
        return
    report = compress(model, method, **options, data=batches(model))
    traffic = "keep" in weft.card(method).reasons  # that is what it saves, and not storage
    stored = 0
    for row in report.rows:
        if isinstance(before[row.name], Group):  # what belongs to it is seen below, on all of the model
            assert row.size is None or traffic or row.bits < row.dense
            stored += row.bits
            continue
        layer = model.get_submodule(row.name)
        if row.size is None:
            assert not isinstance(layer, Structured)
            stored += row.dense
        else:
            own = stored_bits(layer, bias=row.name not in biased)  # a bias that the method brought along counts
            assert own == row.bits and (traffic or row.bits < row.dense)
            stored += own
    assert report.keep == pytest.approx(stored / dense)
    if any(isinstance(unit, Group) for unit in before.values()):
        assert not biased and whole - stored_bits(model, bias=True) == dense - stored
    if traffic:
        _reads_what_was_promised(method, report, keep, before)
        return
    assert stored <= keep * dense
    steps = [_next_step(method, options, before[row.name], row) for row in report.rows if row.size is not None]
    assert stored + min(steps) > keep * dense


def _reads_what_was_promised(method, report, keep, layers):
    """To one rank a layer, and more only where one rank is the least that it can have.

    A method with fixed points takes the nearest below, in parts that are alike up to one unit, and what says which.
    """
    assert report.reads == pytest.approx(sum(row.reads for row in report.rows) / sum(row.dense for row in report.rows))
    for row in report.rows:
        if "fixed_point" in weft.card(method).reasons:
            router, unit = row.bits - row.dense, row.dense / row.shape[0]
            each = (row.reads - router) / row.size
            assert row.size * (each - unit) < keep * row.dense < (row.size + 1) * each and router < 0.05 * row.dense
            continue
        rank = sum(row.shape) * layers[row.name].weight.element_size() * 8
        assert keep * row.dense - rank < row.reads <= keep * row.dense + rank * (row.size == 1)


def _next_step(method, options, layer, row):
    maker = factoriser(method, weft.config_class(method)(**options))
    larger = [size for size in maker.sizes(layer) if size > row.size and maker.bits(layer, size) < row.dense]
    if not larger and "fixed_point" in weft.card(method).reasons:
        return float("inf")  # it stops at its largest size, whatever is left over
    return (maker.bits(layer, larger[0]) if larger else row.dense) - row.bits


# memory: the model, one block's statistics, one batch's activations, and the workspace that the method states


def most_bytes(work):
    """The most bytes that the tensors of some work held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def tensors_of(statistics):
    """The tensors of one layer's statistics; layers that receive the same share some."""
    for part in vars(statistics).values():
        inner = part if isinstance(part, tuple) else getattr(part, "__dict__", {}).values()
        yield from (t for t in inner if isinstance(t, torch.Tensor))


@every_method
def test_a_model_of_many_blocks_is_compressed_in_little_more_than_its_own_memory(method, tmp_path):
    torch.manual_seed(0)
    width, inner, blocks = 32, 48, 6
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 100, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    data = [{"input_ids": tokens(2, 8, seed)} for seed in range(2)]
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    maker = factoriser(method, weft.config_class(method)(**keeping(method, 0.5)))
    graded = any("fisher" in maker.needs(part) for unit in maker.units(model) for part in unit.parts)

    def a_pass():
        row = {"input_ids": data[0]["input_ids"][:1]}
        model(**row, labels=row["input_ids"]).loss.backward() if graded else None
        with torch.no_grad():
            model(**data[0], use_cache=False)

    activations = most_bytes(a_pass)
    model.zero_grad()
    first = [part for unit in maker.units(model) for part in unit.parts if unit.block == "model.layers.0"]
    seen = calibrate(model, [Corpus(data)], first, {part.name: maker.needs(part) for part in first})
    statistics = sum({id(t): t.numel() * t.element_size() for each in seen.values() for t in tensors_of(each)}.values())
    given = copy.deepcopy(model), {**keeping(method, 0.5), "data": data, "work": tmp_path}
    done = []

    def work():
        mine = copy.deepcopy(given[0])
        done.append(compress(mine, method, **given[1]))

    most = most_bytes(work)
    grown = max(sum(row.bits - row.dense for row in done[0].rows) // 8, 0)  # by a method that saves traffic alone
    allowed = own + grown + statistics + activations + maker.workspace(maker.units(model))
    assert own < most <= 1.05 * allowed


# 2. keep = 1 replaces nothing; the full setting is the layer


@every_method
def test_keeping_all_replaces_nothing(method):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    report = compress(model, method, **keeping(method, 1), data=batches(model))
    assert report.replaced == 0 and report.keep == 1
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@every_method
@every_model
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_full_setting_is_the_layer(method, name, dtype, tolerance):
    model = MODELS[name]().to(dtype)
    data = [{key: t.to(dtype) if t.is_floating_point() else t for key, t in batch.items()} for batch in batches(model)]
    maker, layers, statistics = parts(method, model, data, guard=False, **FULL.get(method, {}))
    for layer in layers:
        if not len(maker.sizes(layer)):  # which stays dense
            continue
        size = maker.sizes(layer)[-1]
        if isinstance(layer, Group):
            expected = logits(model, data)
            maker.replace(model, layer, maker.decompose(layer, statistics[layer.name], size), size)
            found = logits(model, data)
            assert found.dtype == dtype and float((found - expected).norm() / expected.norm()) < tolerance
            continue
        full = maker.build(layer, maker.decompose(layer, statistics[layer.name], size), size)
        x = inputs(layer, dtype)
        with torch.no_grad():
            expected, found = layer.module(x), full(x)
        assert found.dtype == dtype
        assert float((found - expected).norm() / expected.norm()) < tolerance


# 3. the objective never rises with size, and is what the rows say


@every_method
@every_model
def test_errors_fall_with_size(method, name):
    if "non_monotone" in weft.card(method).reasons:
        pytest.skip(weft.card(method).reasons["non_monotone"])
    model = MODELS[name]()
    maker, layers, statistics = parts(method, model, batches(model), guard=False)
    for layer in layers:
        errors = maker.decompose(layer, statistics[layer.name], None)["errors"]
        assert len(errors) == len(maker.sizes(layer))
        assert bool((errors[1:] <= errors[:-1]).all()) and float(errors[0]) < 1 and abs(float(errors[-1])) < 1e-12


# 4. from identical statistics, identical bits


@every_method
def test_the_same_call_gives_the_same_bits(method):
    states = []
    for _ in range(2):
        model = llama(torch.float32)
        compress(model, method, **keeping(method, 0.5), data=batches(model))
        states.append(model.state_dict())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


# 8. no finished layer is computed again


class Killed(BaseException):
    pass


@every_method
@pytest.mark.parametrize("sequential", [False, True])
def test_an_interrupted_call_goes_on_where_it_was(method, sequential, tmp_path, monkeypatch):
    options = {**keeping(method, 0.5), "sequential": sequential}
    whole = llama(torch.float32)
    report = compress(whole, method, data=batches(whole), **options)
    count = sum(row.size is not None for row in report.rows)  # of layers, or of groups of them

    done: list[str] = []
    maker_class = type(factoriser(method, weft.config_class(method)()))
    decompose = maker_class.decompose

    def counted(self, layer, statistics, size):
        if len(done) == 2 * count // 3 and not resumed:
            raise Killed
        done.append(layer.name)
        return decompose(self, layer, statistics, size)

    resumed = False
    monkeypatch.setattr(maker_class, "decompose", counted)
    model = llama(torch.float32)
    with pytest.raises(Killed):
        compress(model, method, data=batches(model), work=tmp_path / "work", **options)
    resumed = True
    model = llama(torch.float32)
    compress(model, method, data=batches(model), work=tmp_path / "work", **options)
    assert sorted(done) == sorted(set(done)) and len(done) == count
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in model.state_dict().items())
    with pytest.raises(UsageError, match="unfinished work"):
        other = llama(torch.float32)
        compress(other, method, data=batches(other)[:1], work=tmp_path / "work", **options)


# 9. odd shapes, Conv1D, biases, bf16, tied embeddings: MODELS above have them


@every_method
def test_a_bfloat16_model_stays_one(method):
    model = llama(torch.bfloat16)
    reference = llama(torch.bfloat16)
    compress(model, method, **keeping(method, 0.7), data=batches(model))
    layers = [m for m in model.modules() if isinstance(m, Structured)]
    assert layers and all(p.dtype == torch.bfloat16 for layer in layers for p in layer.parameters())
    assert torch.isfinite(logits(model, batches(model))).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)


# the engine beside the laws


@every_method
def test_what_a_method_needs_is_asked_for(method):
    model = llama()
    if weft.card(method).needs:
        with pytest.raises(UsageError, match=f"{method} needs calibration data"):
            compress(model, method, **keeping(method, 0.5))
    else:
        assert compress(model, method, **keeping(method, 0.5)).replaced


@every_method
@pytest.mark.parametrize("allocate", ["energy", "water", "threshold", "block_influence", "sweep"])
def test_every_allocator_serves_every_method(method, allocate):
    model = llama(torch.float32)
    if allocate not in offered(method):
        with pytest.raises(UsageError, match=f"allocate='{allocate}' needs"):
            compress(model, method, **keeping(method, 0.6), allocate=allocate, data=batches(model))
        return
    options = keeping(method, 0.6)
    report = compress(model, method, **options, allocate=allocate, data=batches(model))
    share = options.get("keep", 0.6)
    assert share - 0.05 < report.keep <= share
    assert torch.isfinite(logits(model, batches(model))).all()


def test_a_sweep_cuts_one_type_at_a_time(tmp_path):
    """The rise of the loss by hand: both up projections at two fifths of their bits, nothing else."""
    model = llama()
    data = batches(model)
    before = copy.deepcopy(model)
    compress(model, "svd", keep=0.6, allocate="sweep", data=data, work=tmp_path)
    found = load_file(tmp_path / "sweep.tensors")
    assert len(found) == 7 and all(rises.shape == (4,) for rises in found.values())

    def loss(model):
        with torch.no_grad():
            labels = [b["input_ids"].masked_fill(b["attention_mask"] == 0, -100) for b in data]
            return sum(float(model(**b, labels=wanted).loss) for b, wanted in zip(data, labels)) / len(data)

    whole = loss(before)
    for block in before.model.layers:
        w = block.mlp.up_proj.weight.data  # 37 × 32, so that six of its values take two fifths of it
        u, s, vh = torch.linalg.svd(w)
        block.mlp.up_proj.weight.data = u[:, :6] @ torch.diag(s[:6]) @ vh[:6]
    assert float(found["model.layers.mlp.up_proj"][1]) == pytest.approx(loss(before) - whole, rel=1e-6)


@every_method
def test_a_plan_is_what_comes_out(method):
    model = llama(torch.float32)
    options = keeping(method, 0.5)
    if READS.get(weft.config_class(method)().allocate) == "influence":  # which only data shows
        options["allocate"] = "uniform"
    planned = _engine.plan(model, method, **options)
    assert planned is not None
    report = compress(model, method, **options, data=batches(model))
    assert [replace(row, error=None) for row in report.rows] == [replace(row, error=None) for row in planned]
    if "water" in offered(method):
        assert _engine.plan(llama(), method, keep=0.5, allocate="water") is None


def test_sequential_statistics_come_from_the_compressed_blocks():
    reports = {}
    for sequential in (False, True):
        model = llama(torch.float64)
        compress(model, "svd_llm", keep=0.4, sequential=sequential, data=batches(model))
        reports[sequential] = model
    first, second = (
        [reports[s].get_submodule(f"model.layers.{i}.mlp.down_proj").dense() for s in (False, True)] for i in (0, 1)
    )
    assert torch.equal(*first) and not torch.equal(*second)


def test_sequential_calibration_cannot_compare_errors():
    with pytest.raises(UsageError, match="sequential=False"):
        compress(llama(), "svd_llm", sequential=True, allocate="water", data=batches(llama()))


def test_a_compressed_model_can_be_compressed_further():
    model = llama()
    first = compress(model, "svd", keep=0.5, include="up_proj")
    second = compress(model, "lord", keep=0.5, data=batches(model))
    assert {row.name for row in first.rows}.isdisjoint(row.name for row in second.rows)
    assert len(first.rows) + len(second.rows) == 14
    assert torch.isfinite(logits(model, batches(model))).all()


def test_include_and_exclude():
    model = llama()
    report = compress(model, "svd", keep=0.5, include=["mlp.up_proj", "q_proj"], exclude=r"model\.layers\.0\..*")
    assert [row.name for row in report.rows] == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(UsageError, match="there are: down_proj, gate_proj"):
        compress(llama(), "svd", include="up_prj")


@every_method
def test_weights_that_are_not_finite_are_named(method):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.inf
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj has weights that are not finite"):
        compress(model, method, data=batches(model))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UsageError, match="no linear layer"):
        compress(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), "svd")


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "half"])
def test_keep_is_a_share(keep):
    with pytest.raises(UsageError, match="keep="):
        compress(Plain(), "svd", keep=keep)
