"""weft evaluate: the table, the JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest
import tiny

from weft.run import costs


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the same tokenizer with other weights."""
    return tiny.save_llama(tmp_path_factory.mktemp("other") / "llama", seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loom")
    for split, seed in (("train", 0), ("test", 1)):
        tiny.write_jsonl(folder / f"{split}.jsonl", [{"text": text} for text in tiny.sentences(6, seed)])
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Costs that take no time to measure."""
    speed = {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1, "prefill": {"1": 2000.0}, "decode": {"1": 30.0}}
    monkeypatch.setattr(costs, "forward_peak", lambda asked, threads: 3_000_000)
    monkeypatch.setattr(costs, "speeds", lambda bases: dict.fromkeys(bases, speed))


def test_a_table_and_a_file(weft, llama, other, data, quick, tmp_path):
    words = ["evaluate", "--model", other, "--against", llama, "--data", data, "--data", "builtin:pydocs"]
    code, out, err = weft(*words, "--rows", 3, "--max-length", 16, "--output", tmp_path / "report.json")
    assert (code, err) == (0, "")
    for part in ("nats a token", "perplexity", "same next token", "builtin:pydocs", "memory", "3.00 MB", "2.00k"):
        assert part in out, part
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["data"] for each in report["corpora"]] == [str(data), "builtin:pydocs"]
    assert all(each["rows"] == 3 and each["kl"] > 0 and each["agreement"] < 1 for each in report["corpora"])
    assert {each["name"] for each in report["models"].values()} == {str(other), str(llama)}
    assert f"{report['corpora'][0]['kl']:.3g}" in out and f"{report['corpora'][1]['model']['loss']:.4f}" in out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_json_is_all_that_is_printed_and_the_same_again(weft, llama, data):
    words = ["evaluate", "--model", llama, "--data", data, "--max-length", 16, "--no-speed", "--json"]
    code, out, err = weft(*words)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["task"] == "causal-lm" and report["models"]["model"]["speed"] is None
    assert report["corpora"][0].keys() == {"data", "split", "rows", "of_rows", "documents", "notes", "model"}
    assert weft(*words)[1] == out


def test_bf16_and_a_wreck_are_said(weft, llama, data, tmp_path):
    from weft.run.models import load_base

    base = load_base(str(llama), "causal-lm")
    base.model.model.norm.weight.data.mul_(40)
    base.model.save_pretrained(tmp_path / "wreck")
    base.tokenizer.save_pretrained(tmp_path / "wreck")
    words = ["evaluate", "--model", tmp_path / "wreck", "--against", llama, "--data", data, "--max-length", 16]
    code, out, _ = weft(*words, "--no-speed", "--bf16")
    assert code == 0 and "collapsed" in out and "One corpus" in out


def test_what_cannot_be_evaluated(refuse, llama, data, corpus, tmp_path):
    def bad(*more, says, code=2, model=llama, where=data):
        refuse(code, "evaluate", "--model", model, "--data", where, "--no-speed", *more, says=says)

    bad(model=tmp_path / "none", says=("none", "neither a folder"))
    bad("--against", tmp_path, says=("without config.json",))
    bad(where=tmp_path / "none.jsonl", says=("none.jsonl", "does not exist"))
    bad(where=corpus, says=("has no test split", "--split", "--test-fraction 0.1"))
    bad("--split", "validation", says=("has no validation split", "there is train, test"))
    (tmp_path / "empty.txt").write_text("\n")
    bad(where=tmp_path / "empty.txt", says=("empty",))
    bad("--rows", 0, says=("rows must be at least 1",))
    bad("--columns", "text", says=("--columns", "text=sentence"))
    bad("--columns", "text=body", says=("'body'",))
    bad("--output", tmp_path / "no" / "report.json", says=("--output", "folder that exists"))
    refuse(2, "evaluate", "--model", llama, says=("--data",))
