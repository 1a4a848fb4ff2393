"""weft compare --pillar compress without its command line: every number against one written out here in float64."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from weft import registry
from weft.errors import UsageError
from weft.run import compress, costs, distil, point, sources, spread, tradeoffs
from weft.run.models import load_base
from weft.run.ranking import LEVEL
from weft.run.tradeoffs import Silent, Study, pending, rank_points, trade_off

F64 = torch.float64


class Here:
    """A pool that works in this process, one task at a time, and notes the tasks."""

    tasks: list[dict] = []

    def __init__(self, function, context, workers, threads):
        self.function, self.context, self.made = function, context, []

    def free(self):
        return 1 - len(self.made)

    def submit(self, task):
        Here.tasks.append(task)  # first: a test looks at it while it is done
        self.made.append((task, json.loads(json.dumps(self.function(self.context, task), allow_nan=False))))

    def next(self):
        return self.made.pop()

    def close(self):
        pass


@pytest.fixture(autouse=True)
def here(monkeypatch):
    Here.tasks = []
    monkeypatch.setattr(spread, "processes", lambda *given: contextlib.nullcontext(Here(*given)))
    point._bench.cache_clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty texts without splits, and other texts beside."""
    folder = tmp_path_factory.mktemp("texts")
    tiny.write_jsonl(folder / "texts.jsonl", [{"text": f"{n} {text}"} for n, text in enumerate(tiny.sentences(40))])
    tiny.write_jsonl(folder / "other.jsonl", [{"text": text} for text in tiny.sentences(5, seed=3)])
    return folder


@pytest.fixture
def study(llama, data):
    def make(*methods, keeps=(0.8, 0.6), **changes) -> Study:
        quick = {"samples": 8, "max_length": 24, "batch_size": 4, "speed": False, "test_fraction": 0.2}
        return Study(str(llama), str(data / "texts.jsonl"), methods, keeps, **{**quick, **changes})

    return make


def quality(rows, method, keep):
    (row,) = [r for r in rows if r.get("phase") == "quality" and (r["method"], r["keep"]) == (method, keep)]
    return row


def held_out(study) -> list[str]:
    found = sources.read(study.data, "causal-lm", validation_fraction=0, test_fraction=study.test_fraction)
    return [row["text"] for row in found.test]


def logits_of(model, texts, tokenizer, length):
    """(logits of every next token, the tokens) of each text, in float64."""
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:length]])
        yield model(input_ids=ids).logits[0, :-1].to(F64), ids[0, 1:]


@torch.no_grad()
def measured(model, dense, texts, tokenizer, length):
    nats, tokens, kl, same = [], 0, 0.0, 0
    both = [list(logits_of(each, texts, tokenizer, length)) for each in (model, dense)]
    for (mine, ids), (theirs, _) in zip(*both, strict=True):
        q, p = mine.log_softmax(-1), theirs.log_softmax(-1)
        nats.append(float(-q.gather(1, ids[:, None]).sum()))
        kl += float((p.exp() * (p - q)).sum())
        same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(ids)
    return {"nats": nats, "loss": math.fsum(nats) / tokens, "kl": kl / tokens, "agreement": same / tokens}


# --- what is measured -------------------------------------------------------------------------------------------------


def test_a_point_is_what_it_says(study, data, tmp_path):
    asked = study("svd", data2=str(data / "other.jsonl"))
    rows = trade_off(asked, tmp_path / "out", command="weft compare ...")
    row, base = quality(rows, "svd", 0.6), load_base(asked.model, "causal-lm")
    dense = load_base(asked.model, "causal-lm").model.eval()
    made = {}
    for name, module in base.model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            u, s, vt = torch.linalg.svd(module.weight.detach().to(F64), full_matrices=False)
            layer = next(each for each in row["layers"] if each["name"] == f"model.{name}")
            r = layer["size"]
            module.weight.data = ((u[:, :r] * s[:r]) @ vt[:r]).float() if r else module.weight.data
            assert layer["bits"] == (32 * r * sum(module.weight.shape) if r else 32 * module.weight.numel())
            made[name] = layer["bits"]
    assert row["bits"] == row["reads"] == sum(made.values()) and row["dense_bits"] == 32 * 2 * (3072 + 3 * 2048)
    assert row["kept"] == row["bits"] / row["dense_bits"] and 0.58 < row["kept"] <= 0.6
    other = [json.loads(line)["text"] for line in (data / "other.jsonl").read_text().splitlines()]
    for found, texts in zip(row["corpora"], (held_out(asked), other), strict=True):
        own = measured(base.model.eval(), dense, texts, base.tokenizer, 24)
        assert found["loss"] == pytest.approx(own["loss"], rel=1e-5)
        assert found["kl"] == pytest.approx(own["kl"], rel=1e-3)
        assert found["perplexity"] == pytest.approx(math.exp(own["loss"]), rel=1e-4)
        assert found["agreement"] == pytest.approx(own["agreement"], abs=1e-9)
        assert [nats for nats, _ in found["per_document"]] == pytest.approx(own["nats"], rel=1e-4)
    original = next(each for each in rows if each.get("phase") == "dense")
    own = measured(dense, dense, held_out(asked), base.tokenizer, 24)
    assert original["corpora"][0]["loss"] == pytest.approx(own["loss"], rel=1e-5)
    files = sum(path.stat().st_size for path in Path(asked.model).glob("*.safetensors"))
    assert original["file_bytes"] == files and 0 < files - row["file_bytes"] < files / 2
    assert not (tmp_path / "out" / "work").exists() and rows[0]["command"] == "weft compare ..."


def test_the_command_of_a_row_makes_that_model(study, tmp_path):
    import shlex

    from weft.cli.main import run

    asked = study("svd_llm", keeps=(0.6,))
    row = quality(trade_off(asked, tmp_path / "out"), "svd_llm", 0.6)
    words = shlex.split(row["command"])[1:]
    words[words.index("--output") + 1] = str(tmp_path / "made")
    assert run(words) == 0
    report = json.loads((tmp_path / "made" / "compression.json").read_text())
    assert report["layers"] == row["layers"] and report["file_bytes"]["after"] == row["file_bytes"]
    assert report["keep"]["measured"] == row["kept"]


def test_no_row_that_calibrates_is_tested_on(study, data):
    asked = study("svd_llm")
    model = compress.skeleton(point.request(asked, "svd_llm", 0.6))
    run = point.request(asked, "svd_llm", 0.6)
    everything = point.request(study("svd_llm", samples=1000), "svd_llm", 0.6)
    tokenizer = load_base(asked.model, "causal-lm").tokenizer
    (source,) = compress.calibration(everything, model, compress.outline(run, model), lambda text: None).values()
    seen = {tuple(row[row != 0].tolist()) for batch in source.batches for row in batch["input_ids"]}
    tested = {tuple(row) for row in point.test_corpora(asked, tokenizer)[0].rows["input_ids"]}
    assert len(seen) == 32 and len(tested) == 8 and not seen & tested
    # a corpus of its own: then all rows calibrate
    apart = study("svd_llm", samples=1000, test_data=str(data / "other.jsonl"))
    run = point.request(apart, "svd_llm", 0.6)
    (source,) = compress.calibration(run, model, compress.outline(run, model), lambda text: None).values()
    assert source.sequences == 40
    assert [corpus.facts["rows"] for corpus in point.test_corpora(apart, tokenizer)] == [5]


def test_r_sparse_is_measured_as_it_generates(study, tmp_path):
    from weft.linear.rank_aware_sparse import RankAwareSparse

    asked = study("r_sparse", keeps=(0.6,))
    rows = trade_off(asked, tmp_path / "out")
    row = quality(rows, "r_sparse", 0.6)
    assert row["status"] == "ok" and row["kept"] > 1 and "--target-sparsity 0.4" in row["command"]
    assert row["reads"] / row["dense_bits"] == pytest.approx(0.6, abs=0.03) and tradeoffs.within(row)
    bench = point.Bench(asked, tmp_path / "again")
    _, model, _ = bench.compressed(tradeoffs.Point("quality", "r_sparse", 0.6))
    layers = [module for module in model.modules() if isinstance(module, RankAwareSparse)]
    assert len(layers) == 14
    with torch.no_grad():
        for layer in layers:  # token by token: as generation runs it

            def alone(x, layer=layer):
                tokens = [layer.__class__.forward(layer, x[:, n : n + 1]) for n in range(x.shape[1])]
                return torch.cat(tokens, 1)

            layer.forward = alone
        own = measured(model, bench.dense.model, held_out(asked), bench.tokenizer, 24)
    assert row["corpora"][0]["loss"] == pytest.approx(own["loss"], rel=1e-5)
    assert own["kl"] > 1e-6 and row["corpora"][0]["kl"] == pytest.approx(own["kl"], rel=1e-2, abs=1e-7)
    assert "stores more than before" in " ".join(rows[0]["plan"]["notes"])


def test_fixed_points_are_taken_once_and_at_their_nearest(study, tmp_path, monkeypatch):
    counted = []
    measure = point.Bench.measured
    monkeypatch.setattr(point.Bench, "measured", lambda self, model: counted.append(1) or measure(self, model))
    asked = study("armor", keeps=(0.98, 0.97, 0.1), options={"armor": {"iterations": "2"}})
    rows = trade_off(asked, tmp_path / "out")
    high, same, low = (quality(rows, "armor", keep) for keep in asked.keeps)
    assert [row["status"] for row in (high, same, low)] == ["ok"] * 3
    assert (high["same_as"], same["same_as"], low["same_as"]) == (None, 0.98, None) and len(counted) == 3  # and dense
    assert same["layers"] == high["layers"] and same["corpora"] == high["corpora"] and "--keep 0.97" in same["command"]
    # half of the values, one bit an entry, and blocks of four on both sides, of float32
    least = sum(32 * (n * m // 2 + 4 * (n + m)) + n * m for n, m in [each["shape"] for each in low["layers"]])
    assert low["bits"] == least and not tradeoffs.within(low) and tradeoffs.within(high)
    assert rank_points(rows, 0.1).standings == () and rank_points(rows, 0.98).standings[0].method == "armor"
    assert "cannot store less than" in rows[0]["plan"]["notes"][0]


def test_a_point_that_cannot_be_had_is_a_row(study, tmp_path):
    rows = trade_off(study("svd", "welore", keeps=(0.6, 0.001)), tmp_path / "out")
    failed = [row for row in rows if row.get("status") == "failed"]
    assert {(row["method"], row["keep"]) for row in failed} == {("svd", 0.001), ("welore", 0.001)}
    assert all("below the smallest form" in row["error"] for row in failed)
    assert quality(rows, "svd", 0.6)["status"] == quality(rows, "welore", 0.6)["status"] == "ok"
    before = len(Here.tasks)
    assert trade_off(study("svd", "welore", keeps=(0.6, 0.001)), tmp_path / "out") == rows and len(Here.tasks) == before
    trade_off(study("svd", "welore", keeps=(0.6, 0.001)), tmp_path / "out", retry_failed=True)
    assert len(Here.tasks) == before + 2


def test_losses_that_are_not_finite_have_no_place_in_a_ranking(study, tmp_path, monkeypatch):
    from weft.run import fidelity

    asked = study("svd", "welore", keeps=(0.6,))
    real = fidelity.measured

    def wrecked(model, against, corpus, batch_size):
        rows, apart = real(model, against, corpus, batch_size)
        if against is not None and Here.tasks[-1]["method"] == "svd":
            rows[0] = [(row, document, math.nan, tokens, true) for row, document, _, tokens, true in rows[0]]
        return rows, apart

    monkeypatch.setattr(fidelity, "measured", wrecked)
    rows = trade_off(asked, tmp_path / "out")
    assert quality(rows, "svd", 0.6)["corpora"][0]["loss"] is None
    assert [each.method for each in rank_points(rows, 0.6).standings] == ["welore"]


# --- the ranking ------------------------------------------------------------------------------------------------------


def synthetic(method, keep, nats, **changes):
    entry = {"data": "d", "loss": float(np.mean(nats)), "per_document": [[float(each), 1] for each in nats]}
    row = tradeoffs.empty_row(tradeoffs.Point("quality", method, keep))
    return row | {"status": "ok", "kept": keep, "reads": keep, "dense_bits": 1.0, "corpora": [entry]} | changes


def test_the_ranking_is_a_bootstrap_over_documents():
    draw = np.random.default_rng(0)
    common = draw.normal(3.0, 1.0, 200)
    a, b, c = common, common + draw.normal(0.05, 0.1, 200), common + draw.normal(0.0, 0.1, 200)
    wreck = common + 0.8
    rows = [synthetic(name, 0.7, nats) for name, nats in zip(("svd", "lord", "fwsvd", "welore"), (a, b, c, wreck))]
    rows.append({**synthetic("dense", None, a), "phase": "dense"})
    rows.append(synthetic("svd_llm", 0.7, a - 1, kept=0.71))  # more than it may store
    rows.append(synthetic("cospadi", 0.5, a - 1))
    ranking = rank_points(rows, 0.7)
    places = {each.method: (each.rank, each.collapsed) for each in ranking.standings}
    assert places == {"svd": (1, False), "fwsvd": (1, False), "lord": (3, False), "welore": (4, True)}
    picked = draw.integers(200, size=(4000, 200))
    low, high = np.quantile((b - a)[picked].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    pair = ranking.pair("lord", "svd")
    assert pair.low == pytest.approx(low, abs=0.002) and pair.high == pytest.approx(high, abs=0.002) and low > 0


# --- going on ---------------------------------------------------------------------------------------------------------


class Stop(Silent):
    """Ctrl-C after some rows."""

    def __init__(self, after):
        self.left = after

    def finished(self, row):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def timeless(rows):
    return [{name: value for name, value in row.items() if name not in ("seconds", "started")} for row in rows]


def test_interrupted_and_the_same_again(study, tmp_path, monkeypatch):
    from weft.compress.svd_llm import SvdLlmFactoriser

    taken = []
    decompose = SvdLlmFactoriser.decompose

    def counted(self, layer, *more):
        taken.append(layer.name)
        return decompose(self, layer, *more)

    monkeypatch.setattr(SvdLlmFactoriser, "decompose", counted)
    asked = study("svd_llm", "svd")
    whole = trade_off(asked, tmp_path / "whole")
    assert len(taken) == len(set(taken)) == 14  # one decomposition for both shares
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        trade_off(asked, tmp_path / "out", observer=Stop(2))
    path = tmp_path / "out" / "results.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "run", "pha')
    point._bench.cache_clear()  # as in another process
    assert timeless(trade_off(asked, tmp_path / "out")) == timeless(whole)
    assert len(taken) == 14 and not (tmp_path / "out" / "work").exists()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["study"] + ["run"] * 5


def test_another_request_is_refused(study, tmp_path):
    trade_off(study("svd", keeps=(0.6,)), tmp_path / "out")
    for other in (study("svd", keeps=(0.5,)), study("welore", keeps=(0.6,)), study("svd", keeps=(0.6,), samples=9)):
        with pytest.raises(UsageError, match="holds a study with (keeps|methods|samples)"):
            trade_off(other, tmp_path / "out")


def test_speeds_come_last_and_equal_points_share_them(study, tmp_path, monkeypatch):
    asked = []

    def speeds(bases):
        asked.append(list(bases))
        return {name: {"prefill": {"1": 10.0 * len(asked)}, "decode": {"1": 1.0}} for name in bases}

    monkeypatch.setattr(costs, "speeds", speeds)
    options = {"armor": {"iterations": "2"}}
    rows = trade_off(study("armor", "svd", keeps=(0.98, 0.97), speed=True, options=options), tmp_path / "out")
    phases = [row["phase"] for row in rows[1:]]
    assert phases == ["dense"] + ["quality"] * 4 + ["speed"] * 4
    assert asked == [["dense", "armor"], ["dense", "svd"], ["dense", "svd"]]
    found = {(row["method"], row["keep"]): row["speed"]["prefill"]["1"] for row in rows if row.get("phase") == "speed"}
    assert found == {("armor", 0.98): 10.0, ("armor", 0.97): 10.0, ("svd", 0.98): 20.0, ("svd", 0.97): 30.0}


def test_a_process_that_died_is_a_row(study, tmp_path, monkeypatch):
    monkeypatch.setattr(Here, "submit", lambda self, task: self.made.append((task, None)))
    rows = trade_off(study("svd", keeps=(0.6,)), tmp_path / "out")
    assert all("was killed" in row["error"] for row in rows[1:]) and len(rows) == 3


def test_points_of_a_method_wait_for_one_another(study):
    asked = study("svd", "svd_llm", keeps=(0.8, 0.6))
    running: list[list[str]] = []

    class Two:
        def __init__(self):
            self.now = []

        def free(self):
            return 2 - len(self.now)

        def submit(self, task):
            self.now.append(task)
            running.append([each["method"] for each in self.now])

        def next(self):
            task = self.now.pop(0)
            return task, {**tradeoffs.empty_row(tradeoffs.Point(task["phase"], task["method"], task["keep"]))}

    class Kept:
        rows: list = []

        def append(self, row):
            self.rows.append(row)

    tradeoffs._measure(asked, Kept(), Two(), Silent())
    assert all(len(methods) == len(set(methods)) for methods in running) and max(map(len, running)) == 2
    assert pending(asked, Kept.rows) == []


# --- what is refused --------------------------------------------------------------------------------------------------


def test_every_method_can_be_asked_for_trained_or_not(study):
    for method in registry.cards("compress"):
        for name, train in ((method, None), (f"{method}+train", distil.DEFAULT)):
            run = point.request(study(name), name, 0.6)
            assert run.method == method and (run.config.keep == 0.6 or run.config.target_sparsity == 0.4)
            assert run.train == train


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"methods": ("svdd",)}, "no compression method 'svdd': did you mean 'svd'"),
        ({"methods": ("sora",)}, "no compression method 'sora'"),
        ({"methods": ()}, "--methods is empty"),
        ({"methods": ("svd", "svd")}, "names 'svd' twice"),
        ({"keeps": ()}, "--keep is empty"),
        ({"keeps": (1.5,)}, "--keep 1.5"),
        ({"keeps": (0.5, 0.5)}, "--keep names 0.5 twice"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"rows": 0}, "--rows must be at least 1"),
        ({"max_length": 1}, "--max-length must be at least 2"),
        ({"test_fraction": 1.0}, "--test-fraction"),
        ({"data2": "d"}, "--data2 d is the calibration data itself"),
        ({"options": {"lord": {"center": "false"}}}, "--set names 'lord'"),
    ],
)
def test_a_study_that_makes_no_sense(changes, says):
    with pytest.raises(UsageError, match=says):
        Study(**{"model": "m", "data": "d", "methods": ("svd",), "keeps": (0.5,), **changes})


@pytest.mark.parametrize(
    "method, option, says",
    [
        ("svd", "kep", "no option 'kep': did you mean 'keep'"),
        ("svd", "keep", "--keep says that for all"),
        ("r_sparse", "target_sparsity", "--keep says"),
        ("svd", "include", "--include says"),
        ("svd", "round_to", "round_to must be int"),
    ],
)
def test_options_of_a_method_are_checked_before_any_work(study, tmp_path, method, option, says):
    with pytest.raises(UsageError, match=says):
        trade_off(study(method, options={method: {option: "x"}}), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not Here.tasks


def test_models_without_a_perplexity_are_refused(bert, study, tmp_path):
    from dataclasses import replace

    with pytest.raises(UsageError, match="BertModel"):
        trade_off(replace(study("svd"), model=str(bert)), tmp_path / "out")
