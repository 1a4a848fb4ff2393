"""What a model lost beside another: every number against one written out in float64 from the models' logits."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import UsageError, WeftError
from weft.run import costs, fidelity
from weft.run.data import load_splits
from weft.run.models import load_base
from weft.run.sources import Rows

F64 = torch.float64


@pytest.fixture(scope="module")
def models(llama, tmp_path_factory):
    """Two Llamas of one tokenizer: one perturbed, and narrower in one layer."""
    from weft.linear._transformers import save_compressed
    from weft.linear.low_rank import LowRank

    base = load_base(str(llama), "causal-lm")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    up = base.model.model.layers[0].mlp.up_proj
    base.model.model.layers[0].mlp.up_proj = LowRank.from_dense(up.weight.detach(), rank=5)
    folder = tmp_path_factory.mktemp("compressed") / "model"
    save_compressed(base.model, folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder), str(llama)


def corpus_of(tokenizer, rows, kind="text", window=9):
    cut = load_splits("here", "causal-lm", tokenizer, max_length=window, rows=Rows(rows, [], [], kind))
    return fidelity.Corpus("here", cut.train, cut.pad_token_id)


def by_hand(model, against, corpus):
    """Row by row, without padding: (document, nats of each model, tokens, agreed, KL) in float64."""
    made = []
    for row in corpus.rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])[1:]
        places = [place for place, label in enumerate(labels.tolist()) if label != -100]
        with torch.no_grad():
            p, q = (one(input_ids=ids).logits[0, :-1].to(F64).log_softmax(-1)[places] for one in (against, model))
        target = labels[places]
        nats = [-float(each[range(len(places)), target].sum()) for each in (q, p)]
        kl = float((p.exp() * (p - q)).sum())
        made.append((row["document"], *nats, len(places), int((p.argmax(-1) == q.argmax(-1)).sum()), kl))
    return made


TEXTS = [{"text": text} for text in tiny.sentences(7, seed=3)]
PROMPTS = [{"prompt": one, "completion": other} for one, other in zip(tiny.sentences(6, 5), tiny.sentences(6, 6))]


@pytest.mark.parametrize("kind, rows, window", [("text", TEXTS, 9), ("completion", PROMPTS, 40)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_was_lost_is_what_the_logits_say(models, kind, rows, window, batch_size):
    """Documents of different lengths in several windows, or prompts that carry no loss, padded into batches."""
    model, against = (load_base(spec, "causal-lm") for spec in models)
    corpus = corpus_of(model.tokenizer, rows, kind, window)
    assert len(set(map(len, corpus.rows["input_ids"]))) > 1
    found = fidelity.compare(model.model, against.model, corpus, "causal-lm", batch_size)
    hand = by_hand(model.model, against.model, corpus)
    tokens = sum(each[3] for each in hand)
    for part, column in (("model", 1), ("against", 2)):
        loss = sum(each[column] for each in hand) / tokens
        assert found[part] == pytest.approx({"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}, rel=1e-5)
    assert 0 < sum(each[4] for each in hand) < tokens
    assert found["agreement"] == sum(each[4] for each in hand) / tokens
    assert found["kl"] == pytest.approx(sum(each[5] for each in hand) / tokens, rel=1e-4)

    documents = sorted({each[0] for each in hand})
    apart = np.array([sum(each[1] - each[2] for each in hand if each[0] == document) for document in documents])
    weights = np.array([sum(each[3] for each in hand if each[0] == document) for document in documents])
    difference = found["difference"]["loss"]
    assert difference["value"] == pytest.approx(apart.sum() / tokens, abs=1e-6) and difference["units"] == len(rows)
    draw = np.random.default_rng(9).integers(len(rows), size=(20_000, len(rows)))
    low, high = np.quantile(apart[draw].sum(1) / weights[draw].sum(1), [0.025, 0.975])
    width = high - low
    assert difference["low"] == pytest.approx(low, abs=0.1 * width)
    assert difference["high"] == pytest.approx(high, abs=0.1 * width)


def test_a_model_loses_nothing_beside_itself(models):
    base = load_base(models[0], "causal-lm")
    corpus = corpus_of(base.tokenizer, TEXTS)
    found = fidelity.compare(base.model, base.model, corpus, "causal-lm", 4)
    assert found["agreement"] == 1 and found["kl"] == 0 and not found["collapsed"]
    assert found["model"] == found["against"]
    assert {found["difference"]["loss"][name] for name in ("value", "low", "high")} == {0.0}
    alone = fidelity.compare(base.model, None, corpus, "causal-lm", 4)
    assert alone == {"model": found["model"]}


def test_windows_are_drawn_where_there_is_one_document(models):
    model, against = (load_base(spec, "causal-lm") for spec in models)
    corpus = corpus_of(model.tokenizer, [{"text": " ".join(tiny.sentences(5))}], window=16)
    found = fidelity.compare(model.model, against.model, corpus, "causal-lm", 2)
    assert found["difference"]["loss"]["units"] == len(corpus.rows) > 1
    single = fidelity.Corpus("here", corpus.rows.select([0]), 0)
    found = fidelity.compare(model.model, against.model, single, "causal-lm", 2)["difference"]["loss"]
    assert found["low"] is found["high"] is found["better"] is None  # nothing to be sure from


@pytest.mark.parametrize("scale, collapsed", [(1.0, False), (40.0, True), (float("nan"), True)])
def test_a_wreck_is_called_one(llama, scale, collapsed):
    """Twice the perplexity, or none at all; what JSON has no word for is None."""
    model, against = (load_base(str(llama), "causal-lm") for _ in range(2))
    with torch.no_grad():
        model.model.model.norm.weight.mul_(scale)
    found = fidelity.compare(model.model, against.model, corpus_of(model.tokenizer, TEXTS), "causal-lm", 4)
    assert found["collapsed"] is collapsed
    if math.isnan(scale):
        assert found["model"]["loss"] is found["model"]["perplexity"] is found["kl"] is None
        assert found["difference"]["loss"] is None
    else:
        assert (found["model"]["perplexity"] >= 2 * found["against"]["perplexity"]) is collapsed
    json.dumps(found, allow_nan=False)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 99), st.booleans())
def test_divergence(positions, words, seed, masked):
    draw = torch.Generator().manual_seed(seed)
    against, model = (3 * torch.randn(positions, words, generator=draw) for _ in range(2))
    if masked:  # a word that the first never says, and one that both never say
        against[:, 0] = -torch.inf
    p, q = (logits.to(F64).softmax(-1) for logits in (against, model))
    kl = sum(float(a * (a / b).log()) for a, b in zip(p.flatten(), q.flatten(), strict=True) if a > 0)
    agreed, nats = fidelity.divergence(against, model)
    assert agreed == sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True))
    assert nats == pytest.approx(kl, rel=1e-5, abs=1e-5)


def test_a_word_that_is_never_said_again_is_infinitely_far():
    against, model = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]])
    assert fidelity.divergence(against, model)[1] == math.inf
    assert fidelity.divergence(torch.full((1, 3), torch.nan), model)[1] != fidelity.divergence(against, model)[1]


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifiers(bert, tmp_path_factory):
    """Two classifiers whose labels are not in the order of the alphabet."""
    made = []
    for seed in (1, 2):
        base = load_base(str(bert), "classification", labels=["right", "left", "none"], seed=seed)
        with torch.no_grad():
            base.model.classifier.weight.mul_(20)
        folder = tmp_path_factory.mktemp("classifiers") / str(seed)
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        made.append(str(folder))
    return made


def sides(folder, names=("left", "none", "right")):
    folder.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        texts = tiny.sentences(9, seed)
        rows = [{"text": text, "label": names[len(text) % 3]} for text in texts] + [
            {"text": "the", "label": name} for name in names
        ]
        tiny.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.parametrize("names", [("left", "none", "right"), (1, 2, 0)])
def test_classifiers_are_compared_by_the_names_of_their_labels(classifiers, tmp_path, names):
    data = sides(tmp_path / "sides", names)
    asked = fidelity.Request(classifiers[0], [str(data)], classifiers[1], costs=False, batch_size=5)
    (found,) = fidelity.run(asked)["corpora"]
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    model, against = (load_base(spec, "classification") for spec in classifiers)
    order = {name: number for number, name in enumerate(["right", "left", "none"])}
    truth = torch.tensor([order.get(row["label"], row["label"]) for row in rows])
    log = []
    for base in (model, against):
        inputs = [base.tokenizer(row["text"], return_tensors="pt") for row in rows]
        with torch.no_grad():
            log.append(torch.cat([base.model.eval()(**each).logits for each in inputs]).to(F64).log_softmax(-1))
    right = [(each.argmax(-1) == truth).double().mean().item() for each in log]
    losses = [-each[range(len(rows)), truth].mean().item() for each in log]
    assert [found[part]["accuracy"] for part in ("model", "against")] == pytest.approx(right)
    assert [found[part]["loss"] for part in ("model", "against")] == pytest.approx(losses, rel=1e-5)
    assert found["agreement"] == pytest.approx((log[0].argmax(-1) == log[1].argmax(-1)).double().mean().item())
    kl = (log[1].exp() * (log[1] - log[0])).sum(-1).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-4) and not found["collapsed"]
    assert found["difference"]["loss"]["value"] == pytest.approx(losses[0] - losses[1], abs=1e-6)
    assert found["difference"]["accuracy"]["value"] == pytest.approx(right[0] - right[1], abs=1e-9)


def test_labels_that_the_model_does_not_know_are_refused(classifiers, tmp_path):
    data = sides(tmp_path / "sides", ("left", "up", "right"))
    with pytest.raises(UsageError, match="label 'up'"):
        fidelity.run(fidelity.Request(classifiers[0], [str(data)], costs=False))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_two_models_that_cannot_be_compared_are_refused(models, llama, classifiers, corpus, tmp_path):
    with pytest.raises(UsageError, match="for classification and .* for causal-lm"):
        fidelity.run(fidelity.Request(classifiers[0], [str(corpus)], str(llama)))
    base = load_base(str(llama), "causal-lm")
    base.tokenizer.add_tokens(["<new>"])
    base.model.save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="different tokenizers"):
        fidelity.run(fidelity.Request(models[0], [str(corpus)], str(tmp_path / "other"), test_fraction=0.5))
    with pytest.raises(UsageError, match="one of 5 tokens .* one of 6"):
        fidelity.measure_batch(
            [0], [0], torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, 5), torch.zeros(1, 3, 6)
        )


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"data": ()}, "--data"),
        ({"split": "tests"}, "did you mean 'test'"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"test_fraction": 1.0}, "test_fraction"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(wrong, says):
    with pytest.raises(UsageError, match=says):
        fidelity.Request(**{"model": "m", "data": ["d"], **wrong})


# --- rows -------------------------------------------------------------------------------------------------------------


def test_fewer_rows_are_taken_from_everywhere(models, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        tiny.write_jsonl(folder / f"{split}.jsonl", [{"text": text} for text in tiny.sentences(12, len(split))])
    asked = fidelity.Request(models[0], [str(folder)], models[1], rows=5, max_length=1000, costs=False)
    report = fidelity.run(asked)
    (found,) = report["corpora"]
    assert (found["rows"], found["of_rows"], found["documents"]) == (5, 12, 5)
    assert report["settings"]["max_length"] == 128  # all that the model can see, which is said
    assert any("128 tokens" in note for note in found["notes"])
    everything = fidelity.run(fidelity.Request(models[0], [str(folder)], rows=99, max_length=64, costs=False))
    assert everything["corpora"][0]["rows"] == 12 and "against" not in everything["corpora"][0]


# --- costs ------------------------------------------------------------------------------------------------------------


def test_costs_at_rest_are_those_of_the_files(models):
    from safetensors.torch import load_file

    for spec, kept in zip(models, (5 * (32 + 64), 32 * 64), strict=True):
        cost = costs.at_rest(spec, "causal-lm")
        attention, mlp = 32 * 32 * 2 + 16 * 32 * 2, 32 * 64 * 3
        matrices = 2 * (attention + mlp) - 32 * 64 + kept
        assert cost["linear_bits"] == 32 * matrices  # the tied head is none of them
        (file,) = costs.weight_files(spec)
        assert cost["file_bytes"] == file.stat().st_size
        assert cost["parameters"] == sum(tensor.numel() for tensor in load_file(file).values())


def test_bits_are_those_of_the_stored_dtype(llama, tmp_path):
    base = load_base(str(llama), "causal-lm", dtype=torch.bfloat16)
    base.model.save_pretrained(tmp_path / "low", max_shard_size="40kB")
    half, whole = (costs.at_rest(str(spec), "causal-lm", base.tokenizer) for spec in (tmp_path / "low", llama))
    assert 2 * half["linear_bits"] == whole["linear_bits"]
    files = costs.weight_files(str(tmp_path / "low"))
    assert len(files) > 1 and set(files) == set((tmp_path / "low").glob("*.safetensors"))


def test_speed_counts_the_tokens_of_all_rows(models, monkeypatch):
    """A clock that a forward pass moves by one second a token of the prompt, and two a token that is written."""
    bases = {name: load_base(spec, "causal-lm") for name, spec in zip(("model", "against"), models, strict=True)}
    assert costs._lengths(bases) == (64, 32)  # of the 128 that these can see
    monkeypatch.setattr(costs, "PROMPT", 8)
    monkeypatch.setattr(costs, "NEW", 3)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock.now)
    asked = []

    def watched(inner, slow):
        def generate(input_ids, max_new_tokens, **more):
            made = inner(input_ids=input_ids, max_new_tokens=max_new_tokens, **more)
            assert made.shape[1] == input_ids.shape[1] + max_new_tokens  # no early end
            asked.append(input_ids.shape[0])
            clock.now += slow * (input_ids.shape[1] + 2 * (max_new_tokens - 1))
            return made

        return generate

    for slow, base in enumerate(bases.values(), 1):
        base.model.generate = watched(base.model.generate, slow)
    found = costs.speeds(bases, batches=(1, 3), repeats=1)
    assert found["model"]["prompt_tokens"] == 8 and found["model"]["new_tokens"] == 3
    assert found["model"]["prefill"] == {"1": 1.0, "3": 3.0} and found["model"]["decode"] == {"1": 0.5, "3": 1.5}
    assert found["against"]["prefill"] == {"1": 0.5, "3": 1.5} and found["against"]["decode"] == {"1": 0.25, "3": 0.75}
    assert sorted(set(asked)) == [1, 3]


def test_classifiers_decode_nothing(classifiers):
    found = costs.speeds({"model": load_base(classifiers[0], "classification")}, batches=(2,), repeats=1)["model"]
    assert found["prefill"]["2"] > 0 and found["decode"] == {"2": None} and found["new_tokens"] == 0


@pytest.mark.slow
def test_the_memory_of_a_forward_pass_holds_its_logits(llama, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(llama, vocab_size=20_000, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    asked = {"model": str(tmp_path), "task": "causal-lm", "bf16": False, "batch_size": 8, "max_length": 64}
    logits = 8 * 64 * 20_000 * 4  # more than what allocators keep for later
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # where nothing was freed before
        found = fresh.submit(costs._forward, {}, asked).result()["peak_bytes"]
    assert found is None or logits < found < 10 * logits
    assert "neither a folder" in costs._forward({}, {**asked, "model": "./none"})["error"]


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch, llama):
    from weft.run import spread

    answers = [{"peak_bytes": 7}, {"error": "no room"}, None]

    class Pool:
        def __init__(self, function, context, workers, threads):
            assert spread._find(spread.name_of(function)) is costs._forward and (workers, threads) == (1, 2)

        def submit(self, task):
            self.task = task

        def next(self):
            return self.task, answers.pop(0)

        def close(self):
            pass

    monkeypatch.setattr(spread, "Processes", Pool)
    assert costs.forward_peak({"model": "m"}, 2) == 7
    for says in ("no room", "was killed"):
        with pytest.raises(WeftError, match=says):
            costs.forward_peak({"model": "m"}, 2)


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def test_tasks_are_handed_over_to_lm_eval(models, monkeypatch):
    handed = []

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def simple_evaluate(model, tasks):
        handed.append(model)
        return {"results": {task: {"alias": task, "acc,none": np.float64(0.25), "n": 4} for task in tasks}}

    made = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    made["lm_eval"].simple_evaluate = simple_evaluate
    made["lm_eval.models.huggingface"].HFLM = HFLM
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    report = fidelity.run(fidelity.Request(models[0], [], models[1], costs=False, tasks=["arc_easy"], batch_size=3))
    scores = {"arc_easy": {"acc,none": 0.25, "n": 4.0}}
    assert report["tasks"] == {"model": scores, "against": scores} and report["corpora"] == []
    assert [each.model.config.name_or_path for each in handed] == list(models)
    assert all(each.batch_size == 3 and len(each.tokenizer) == 300 for each in handed)
    json.dumps(report)


def test_tasks_without_lm_eval_name_the_extra(models, classifiers, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(WeftError, match=r"weft\[evaluation\]"):
        fidelity.run(fidelity.Request(models[0], [], tasks=["arc_easy"]))
    with pytest.raises(UsageError, match="classifier"):
        fidelity.run(fidelity.Request(classifiers[0], [], tasks=["arc_easy"]))
