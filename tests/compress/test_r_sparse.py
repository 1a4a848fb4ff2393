"""R-Sparse: its budget, its thresholds, the search, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, batches, llama, tokens
from reference import One, rows_of

import weft
from weft.algebra.random import generator
from weft.compress import r_sparse
from weft.compress._calibration import Corpus, calibrate
from weft.compress._engine import compress, plan
from weft.compress._layers import targets
from weft.compress.r_sparse import budget, evolve, search
from weft.errors import UsageError
from weft.linear.rank_aware_sparse import RankAwareSparse

SPARSE = 0.999  # as prefill_ratio: every token of a short sequence


def collected(model, data):
    """The rows that each layer of a dense model receives, padding left out."""
    rows = {name: [] for name, m in model.named_modules() if name.endswith("_proj")}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, y, found=found: found.append(args[0][mask.bool()].double())
        )
        for name, found in rows.items()
    ]
    for batch in data:
        mask = batch["attention_mask"]
        with torch.no_grad():
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


# --- budget and threshold ---------------------------------------------------------------------------------------------


@given(st.integers(1, 4096), st.integers(1, 4096), st.floats(0.0, 0.95), st.floats(0.0, 1.0))
def test_a_token_reads_no_more_than_the_budget(out, in_, sparsity, ratio):
    channels, rank = budget(out, in_, sparsity, ratio)
    allowed = in_ * out * (1 - sparsity)
    spent = channels * out + rank * (in_ + out)
    floors = (channels == 1) * out + (rank == 1) * (in_ + out)  # one of each at least
    assert spent <= allowed + floors and (rank == 0) == (ratio == 1)
    if ratio < 1:
        assert spent + in_ + out > allowed


def test_grouped_queries_get_what_their_own_shapes_allow():
    assert budget(4096, 4096, 0.5, 0.95) == (1945, 51)
    assert budget(1024, 4096, 0.5, 0.95) == (1945, 20)  # 51 would be half as much again


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity, ratio", [(0.5, 0.95), (0.7, 0.4), (0.5, 1), (0.2, 1)])
def test_on_calibration_inputs_the_promised_share_is_inactive(sparsity, ratio, dtype):
    model, data = llama(dtype), batches(llama())
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    rows = collected(model, data)
    report = compress(model, "r_sparse", target_sparsity=sparsity, sparse_ratio=ratio, data=data)
    for row in report.rows:
        layer, x, w = model.get_submodule(row.name), rows[row.name], weights[f"{row.name}.weight"]
        scores = x.abs() * w.square().sum(0).sqrt() if ratio < 1 else x.abs()
        share = 1 - (1 - sparsity) * ratio
        expected = scores.flatten().sort().values[int(scores.numel() * share) - 1]
        assert float(layer.tau) == pytest.approx(float(expected), rel=1e-6)
        ties = int((scores == expected).sum())  # bfloat16 has many
        inactive = float((~layer.active(x.to(dtype))).double().mean())
        assert abs(inactive - share) <= max(ties, 1) / scores.numel()
        assert float(layer.tau.double()) >= float(expected) * (1 - 1e-7)


def test_with_nothing_to_save_below_the_threshold_all_is_active():
    model = One(23, 31)
    compress(model, "r_sparse", target_sparsity=0.001, sparse_ratio=1, data=[rows_of(model.layer, 8)], guard=False)
    assert float(model.layer.tau) == -1  # int(numel·t) is 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("ratio", [0, 0.5, 0.95, 1])
def test_a_layer_answers_as_the_paper_writes_it(name, ratio):
    model = MODELS[name]()
    before = {layer.name: (layer.weight.double(), layer.bias) for layer in targets(model, None, None)}
    report = compress(
        model, "r_sparse", target_sparsity=0.5, sparse_ratio=ratio, prefill_ratio=SPARSE, data=batches(model)
    )
    for row in report.rows:
        layer, (w, b) = model.get_submodule(row.name), before[row.name]
        (out, in_), x = w.shape, torch.randn(30, w.shape[1], generator=generator(ratio), dtype=torch.float64)
        x = x * 3 * float(layer.tau.clamp(max=1)) / float(layer.scale.mean())  # about the threshold
        channels = max(int(in_ * 0.5 * ratio), 1)
        rank = 0 if ratio == 1 else max(int((in_ * out * 0.5 - channels * out) / (in_ + out)), 1)
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        score = x.abs() * (w.norm(dim=0) if ratio < 1 else 1)
        mask = (score > layer.tau).double() if ratio else torch.zeros_like(x)
        expected = (mask * x) @ w.mT + ((1 - mask) * x) @ ((u[:, :rank] * s[:rank]) @ vh[:rank]).mT
        expected = expected if b is None else expected + b
        assert isinstance(layer, RankAwareSparse) and row.size == layer.rank == rank
        assert 0 < mask.mean() < 1 or ratio == 0
        assert torch.allclose(layer(x), expected, rtol=1e-8, atol=1e-8)
        assert row.reads == 64 * (channels * out + rank * (in_ + out))


def test_prompts_run_dense_and_single_tokens_sparse():
    model, dense, ids = llama(torch.float32), llama(torch.float32), tokens(2)
    compress(model, "r_sparse", data=batches(model))
    with torch.no_grad():
        found, expected = (m(input_ids=ids, use_cache=True) for m in (model, dense))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        steps = [
            m(input_ids=ids[:, :1], past_key_values=o.past_key_values).logits
            for m, o in ((model, found), (dense, expected))
        ]
    assert 1e-4 < float((steps[0] - steps[1]).norm() / steps[1].norm()) < 1


# --- one ρ a layer ----------------------------------------------------------------------------------------------------


def test_a_recipe_is_for_the_layers_that_it_names():
    recipe = {"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.self_attn.q_proj": 1.0}
    model = llama()
    ranks = {row.name: row.size for row in compress(model, "r_sparse", recipe=recipe, data=batches(model)).rows}
    assert ranks["model.layers.0.mlp.up_proj"] == budget(37, 32, 0.5, 0.5)[1] > 1
    assert ranks["model.layers.1.self_attn.q_proj"] == 0
    assert ranks["model.layers.1.mlp.up_proj"] == budget(37, 32, 0.5, 0.95)[1]
    with pytest.raises(UsageError, match="recipe: there is no layer 'model.layers.0.mlp.up_prj'.*up_proj"):
        compress(llama(), "r_sparse", recipe={"model.layers.0.mlp.up_prj": 0.5}, data=batches(model))


def test_evolution_finds_what_is_best_and_loses_nothing_on_the_way():
    wanted = torch.linspace(0.6, 1.0, 12, dtype=torch.float64)
    seen = []

    def loss(genes):
        assert bool(((genes >= 0) & (genes <= 1)).all())
        seen.append(float((genes - wanted).square().sum()))
        return seen[-1]

    best = evolve(loss, 12, 16, 10, generator("a test"))
    assert len(seen) == 16 + 10 * 12 and float((best - wanted).square().sum()) == min(seen) < seen[0] / 2
    assert seen[0] == pytest.approx(float((0.95 - wanted).square().sum()))
    assert torch.equal(best, evolve(loss, 12, 16, 10, generator("a test")))
    assert not torch.equal(best, evolve(loss, 12, 16, 10, generator("another")))


def losses_of(model, data):
    with torch.no_grad():
        return sum(
            float(model(**b, labels=b["input_ids"].masked_fill(b["attention_mask"] == 0, -100), use_cache=False).loss)
            for b in data
        ) / len(data)


@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.95, 1.0])
def test_a_trial_is_the_compressed_model(ratio):
    model, data = llama(), batches(llama())
    layers = targets(model, None, None)
    trials = r_sparse._Trials(model, [Corpus(data)], layers, 0.5, 0.5)
    before = losses_of(model, data)
    found = trials.loss(torch.full((len(layers),), ratio, dtype=torch.float64))
    assert losses_of(model, data) == before, "the model is as it was"
    compress(model, "r_sparse", sparse_ratio=ratio, prefill_ratio=0.5, data=data)
    assert found == pytest.approx(losses_of(model, data), rel=1e-9) and found != before


def test_the_search_beats_the_uniform_recipe_and_is_a_function_of_its_seed():
    model, data = llama(), batches(llama())[:1]
    small = {"population": 6, "generations": 2}
    recipe = search(model, data, **small)
    assert list(recipe) == [layer.name for layer in targets(model, None, None)]
    assert search(model, data, **small) == recipe != search(model, data, **small, seed=1)
    losses = {}
    for name, option in {"uniform": {}, "searched": {"recipe": recipe}}.items():
        model = llama()
        compress(model, "r_sparse", prefill_ratio=0.5, data=data, **option)
        losses[name] = losses_of(model, data)
    assert losses["searched"] < losses["uniform"]
    with pytest.raises(UsageError, match="prefill_ratio=1: the search needs whole sequences"):
        search(model, data, prefill_ratio=1)


def test_the_option_searches_once(monkeypatch, tmp_path):
    model, data = llama(), batches(llama())[:1]
    expected = search(model, data, population=4, generations=1)
    calls = []
    real = r_sparse._search

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs, population=4, generations=1)

    monkeypatch.setattr(r_sparse, "_search", counted)
    assert plan(model, "r_sparse", search=True) is None
    states = []
    for _ in range(2):  # the second goes on with the finished work of the first
        model = llama()
        report = compress(model, "r_sparse", search=True, data=data, work=tmp_path / "work")
        states.append(model.state_dict())
    assert len(calls) == 1 and calls[0]["prefill_ratio"] == 0.5
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    for row in report.rows:
        assert row.size == budget(*row.shape, 0.5, expected[row.name])[1]


# --- what it refuses, and what is too small ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"keep": 0.5}, "keep=0.5 does not apply.*target_sparsity"),
        ({"target_sparsity": 1}, "target_sparsity=1: a share"),
        ({"sparse_ratio": 1.2}, "sparse_ratio=1.2: a share"),
        ({"recipe": {"a": -1.0}}, "a=-1.0: a share"),
        ({"prefill_ratio": 2}, "prefill_ratio=2: a share"),
        ({"search": True, "recipe": {"a": 0.5}}, "search finds a recipe, and one is given"),
    ],
)
def test_values_that_cannot_be_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        weft.config_class("r_sparse")(**options)


def test_several_corpora_are_refused_before_any_pass():
    data = {"one": (batches(llama()), 1.0), "two": (batches(llama()), 2.0)}
    with pytest.raises(UsageError, match="one corpus"):
        compress(llama(), "r_sparse", data=data)


def test_a_matrix_too_small_to_be_read_in_part_stays():
    model = One(2, 2)
    (row,) = compress(model, "r_sparse", data=[rows_of(model.layer)]).rows
    assert row.size is None and row.reads == row.dense == row.bits


def test_a_dense_export_is_refused_before_any_work():
    from weft.run import compress as run

    given = {"model": "builtin:pycode", "method": "r_sparse", "output": "o", "data": "builtin:stdlib", "dense": True}
    request = run.request(given)
    with pytest.raises(UsageError, match="r_sparse makes layers that are no linear maps"):
        run.outline(request, llama(torch.float32))


def test_order_statistics_are_of_what_counts():
    model, data = llama(), batches(llama())
    layers = targets(model, None, None)
    words = ("magnitudes", "scaled_magnitudes", "input")
    found = calibrate(model, [Corpus(data)], layers, {layer.name: words for layer in layers})
    for name, x in collected(model, data).items():
        norms = model.get_submodule(name).weight.norm(dim=0)
        for seen, scores in ((found[name].magnitudes, x.abs()), (found[name].scaled_magnitudes, x.abs() * norms)):
            assert seen.count == x.numel() and found[name].input.n == len(x)
            assert seen.at(0.3) == pytest.approx(float(scores.flatten().kthvalue(int(0.3 * x.numel())).values))
