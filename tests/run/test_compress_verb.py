"""weft compress without its command line: options, what calibrates, what is expected, and a death at any instant."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import killed_compression

from weft import registry
from weft.errors import UsageError
from weft.run import compress, data, sources


@pytest.fixture
def given(llama, corpus, tmp_path):
    return {
        **{"model": str(llama), "data": str(corpus), "method": "svd_llm", "keep": 0.6, "output": str(tmp_path / "out")},
        **{"samples": 8, "max_length": 16, "batch_size": 3},
    }


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(registry.cards("compress")))
def test_every_methods_run_file_is_accepted(method, tmp_path):
    run = compress.request({"model": "m", "data": "d", "method": method, "output": "o", "mix": "a=0.5,b=2"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.resolved()))
    from weft.run.adapt import read_run_file

    again = compress.request({k: v for k, v in read_run_file(tmp_path / "run.yaml").items() if v is not None})
    assert again == run and again.resolved() == run.resolved()
    assert run.options.corpora == {"d": 1.0, "a": 0.5, "b": 2.0}


def test_the_command_of_a_run_is_that_run(given):
    import shlex

    from weft.cli.compress import build
    from weft.cli.main import application

    run = compress.request({**given, "mix": {"more text.txt": 0.5}, "exclude": ["o_proj"], "guard": False})
    words = shlex.split(run.command())
    assert "--no-guard" in words and "--seed" not in words and "more text.txt=0.5" in words
    import typer.main

    group = typer.main.get_command(application(words[1:]))
    context = group.make_context("weft", words[1:])
    name, verb, rest = group.resolve_command(context, words[1:])
    flags = verb.make_context(name, rest, parent=context).params
    for own in ("config", "plan", "resume"):
        del flags[own]
    assert compress.request({k: v for k, v in flags.items() if v is not None}) == run
    assert callable(build(words[2:]))


# --- what calibrates --------------------------------------------------------------------------------------------------


def test_sequences_come_from_every_text_before_a_second_of_any():
    words = tiny.tokenizer()
    texts = [" ".join(tiny.WORDS[n : n + 3]) * 20 for n in range(6)]
    rows = sources.Rows([{"text": text} for text in texts], [], [], "text")
    ids = [[*words(text)["input_ids"], words.eos_token_id] for text in texts]
    windows = {n: [each[i : i + 10] for i in range(0, len(each) - 1, 9)] for n, each in enumerate(ids)}
    found = data.draw(rows, words, max_length=10, count=9, seed=0)
    assert len(found) == 9 and all(row["input_ids"] in windows[row["document"]] for row in found)
    assert {row["document"] for row in found[:6]} == set(range(6))
    assert len({(row["document"], tuple(row["input_ids"])) for row in found}) == 9
    assert found == data.draw(rows, words, max_length=10, count=9, seed=0)
    assert found != data.draw(rows, words, max_length=10, count=9, seed=1)
    everything = data.draw(rows, words, max_length=10, count=10**6, seed=0)
    assert len(everything) == sum(map(len, windows.values()))


def test_only_the_training_split_calibrates(given, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, word in (("train", "weft"), ("validation", "warp"), ("test", "loom")):
        tiny.write_jsonl(folder / f"{split}.jsonl", [{"text": f"{word} " * 30}] * 3)
    words = tiny.tokenizer()
    (source,) = calibrated({**given, "data": str(folder)}).values()
    text = " ".join(words.decode(row, skip_special_tokens=True) for b in source.batches for row in b["input_ids"])
    assert "weft" in text and "warp" not in text and "loom" not in text


def calibrated(given: dict, say=lambda text: None) -> dict[str, compress.Calibration]:
    run = compress.request(given)
    model = compress.skeleton(run)
    return compress.calibration(run, model, compress.outline(run, model), say)


def test_padding_is_masked_and_counted_out(given):
    (source,) = calibrated(given).values()
    assert source.sequences == 8 and [len(batch["input_ids"]) for batch in source.batches] == [3, 3, 2]
    assert source.tokens == sum(int(batch["attention_mask"].sum()) for batch in source.batches)
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in source.batches)
    assert all((batch["input_ids"][batch["attention_mask"] == 0] == 0).all() for batch in source.batches)
    (graded,) = calibrated({**given, "method": "fwsvd"}).values()
    assert all((b["labels"][b["attention_mask"] == 0] == data.IGNORED).all() for b in graded.batches)


def test_the_window_is_bounded_by_the_model_and_unused_data_is_said(given):
    told: list[str] = []
    calibrated({**given, "max_length": 4096}, told.append)
    assert told == ["max_length is 128, which is all that the model can see, not 4096"]
    assert calibrated({**given, "method": "svd", "data": "nowhere.txt"}, told.append) == {}
    assert "svd reads no data" in told[-1] and "nowhere.txt" in told[-1]


def labelled(names: list[str]) -> sources.Rows:
    rows = sources.Rows([{"text": "a", "label": n} for n in range(len(names))], [], [], "classification")
    rows.labels = names
    return rows


def test_labels_get_the_models_own_numbers():
    rows = labelled(["bad", "good"])
    compress._number_as_model(rows, SimpleNamespace(id2label={0: "good", 1: "bad"}), "d")
    assert [row["label"] for row in rows.train] == [1, 0]
    rows = labelled(["bad", "good"])
    compress._number_as_model(rows, SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"}), "d")
    assert [row["label"] for row in rows.train] == [0, 1]
    for known in ({0: "good", 1: "poor"}, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}):
        with pytest.raises(UsageError, match="bad, good"):
            compress._number_as_model(labelled(["bad", "good"]), SimpleNamespace(id2label=known), "d")


# --- what to expect ---------------------------------------------------------------------------------------------------


def test_operations_are_counted(given):
    """Two blocks of a Llama, hidden 32, inner 64, keys and values 16 wide: products of the passes written out."""
    from weft.run.operations import operations, seconds_of

    run = compress.request(given)
    model = compress.skeleton(run)
    shape = compress.outline(run, model)
    source = compress.Calibration([], 10, 160, 1.0)
    count = operations(shape, model, {"d": source})
    block = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 64 * 32 * 3) + 4 * 16 * 32  # weights and attention at 16 tokens
    assert count.passes == 160 * (block + 2 * block)
    statistics = 160 * 2 * 2 * (6 * 32**2 + 64**2)
    assert count.products > statistics and count.eigen is not None and count.eigen > 0
    assert seconds_of(count, next(model.parameters()).dtype) > 0
    graded = compress.outline(compress.request({**given, "method": "fwsvd"}), model)
    head = 2 * len(tiny.tokenizer()) * 32
    weights = block - 4 * 16 * 32
    # forward and back to the block, and the block's own gradients; attention counts as part of what lies before
    expected = sum(2 * (2 * block + head) - (n * block + 4 * 16 * 32) + weights for n in (0, 1))
    assert operations(graded, model, {"d": source}).passes == 160 * expected


def test_another_requests_work_is_refused_in_few_words(tmp_path):
    from weft.compress._store import Store

    request = {"method": "svd", "layers": {f"layer.{n}": f"{n:016x}" for n in range(100)}, "data": [[1.0, "ab"]]}
    Store(tmp_path, request)
    Store(tmp_path, request)
    other = {**request, "layers": {**request["layers"], "layer.50": "0" * 16}}
    for wanted, says in ((other, "layers: layer.50"), ({**request, "data": []}, "other data")):
        with pytest.raises(UsageError, match=says) as refused:
            Store(tmp_path, wanted)
        assert len(str(refused.value)) < 300


# --- death and resumption ---------------------------------------------------------------------------------------------

LAYERS = 14
INSTANTS = [("calibrate", 1), ("put", 1), ("put", 9), ("calibrate", 2), ("put", LAYERS), ("save", 1), ("rename", 1)]


def words_of(given: dict, **changes) -> list[str]:
    flags = {**given, **changes}
    return ["compress", *(word for key, v in flags.items() for word in (f"--{key.replace('_', '-')}", str(v)))]


@pytest.fixture(scope="module")
def whole(llama, corpus, tmp_path_factory) -> bytes:
    """The weights of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    common = {"model": llama, "data": corpus, "method": "svd_llm", "keep": 0.6, "samples": 8, "max_length": 16}
    log = out.with_name("log")
    assert killed_compression.spawn(words_of({**common, "batch_size": 3, "output": out}), log, "never", 0) == 0
    assert len(log.read_text().split()) == LAYERS
    return (out / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", INSTANTS)
def test_killed_and_the_same_command_again(kind, count, given, whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    words = words_of(given)
    assert killed_compression.spawn(words, log, kind, count) == -signal.SIGKILL
    assert not out.exists()
    before = log.read_text().split() if log.exists() else []
    assert killed_compression.spawn(words, log, "never", 0) == 0
    computed = log.read_text().split()
    assert len(computed) == len(set(computed)) == LAYERS and computed[: len(before)] == before
    assert (out / "model.safetensors").read_bytes() == whole
    assert json.loads((out / "compression.json").read_text())["layers_found_finished"] == len(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.slow
def test_killed_when_all_is_written(given, whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    assert killed_compression.spawn(words_of(given), log, "clean", 1) == -signal.SIGKILL
    assert (out / "model.safetensors").read_bytes() == whole and (tmp_path / "out.work").exists()
    assert killed_compression.spawn(words_of(given), log, "never", 0) == 0
    assert not (tmp_path / "out.work").exists() and len(log.read_text().split()) == LAYERS
    assert killed_compression.spawn(words_of(given), log, "never", 0) == 2  # finished long ago


@pytest.mark.slow
def test_finished_layers_serve_another_size_and_no_other_request(given, tmp_path):
    log = tmp_path / "log"
    assert killed_compression.spawn(words_of(given), log, "save", 1) == -signal.SIGKILL
    assert killed_compression.spawn(words_of(given, samples=4), log, "never", 0) == 2
    assert killed_compression.spawn(words_of(given, keep=0.5), log, "never", 0) == 0
    assert len(log.read_text().split()) == LAYERS
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert 0.45 < report["keep"]["measured"] <= 0.5


@pytest.mark.slow
def test_block_by_block_goes_on_too(given, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    words = [*words_of(given), "--sequential"]
    assert killed_compression.spawn(words, log, "put", 9) == -signal.SIGKILL
    assert killed_compression.spawn(words, log, "never", 0) == 0
    computed = log.read_text().split()
    assert len(computed) == len(set(computed)) == LAYERS
    killed = (out / "model.safetensors").read_bytes()
    other = tmp_path / "other"
    assert killed_compression.spawn([*words_of(given, output=other), "--sequential"], log, "never", 0) == 0
    assert (other / "model.safetensors").read_bytes() == killed
