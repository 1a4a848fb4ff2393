"""Streams of tasks: the matrix by hand, heads that come back, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import streaming
from streaming import write_tasks

from weft.errors import UsageError, WeftError
from weft.run import adapt, stream

QUICK = {"max_steps": 4, "batch_size": 6, "learning_rate": 0.01, "eval_steps": 0, "save_steps": 0}
CODYRA = {"method": "codyra", "max_steps": 30, "r": 4, "lambda_num": 2, "max_kappa": 0.03, "codyra_seed": 4}


def given(model: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "method": "peft:lora", "output": str(output), **QUICK, **more}


def run(options: dict[str, Any], tasks: str) -> tuple[stream.Stream, dict[str, Any]]:
    asked = stream.request(options, tasks)
    stream.settle_output(asked, None)
    return asked, stream.run_stream(asked, lambda text: None)


# --- numbers ----------------------------------------------------------------------------------------------------------

MATRIX = [[0.5, 0.2, 0.1], [0.9, 0.3, 0.1], [0.95, 0.8, 0.4], [0.6, 0.7, 1.0]]


def test_the_summary_of_accuracies_by_hand():
    found = stream.summary(MATRIX, higher=True)
    expected = {
        "learned": (0.9 + 0.8 + 1.0) / 3,
        "last": (0.6 + 0.7 + 1.0) / 3,
        "average": (0.9 + (0.95 + 0.8) / 2 + (0.6 + 0.7 + 1.0) / 3) / 3,
        "forgetting": ((0.95 - 0.6) + (0.8 - 0.7)) / 2,
        "backward_transfer": ((0.6 - 0.9) + (0.7 - 0.8)) / 2,
        "forward_transfer": ((0.3 - 0.2) + (0.4 - 0.1)) / 2,
        "forgotten": [0.95 - 0.6, 0.8 - 0.7],
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_a_loss_that_falls_is_a_gain():
    found = stream.summary([[3.0, 5.0], [1.0, 4.0], [1.5, 2.0]], higher=False)
    assert found["learned"] == 1.5 and found["last"] == 1.75 and found["average"] == (1.0 + 1.75) / 2
    assert found["forgetting"] == 0.5 and found["backward_transfer"] == -0.5 and found["forward_transfer"] == 1.0


@pytest.fixture(scope="module")
def finished(bert, tmp_path_factory):
    """CoDyRA over three tasks: the stream, what it found, and its folder."""
    folder = tmp_path_factory.mktemp("stream")
    asked, found = run(given(bert, folder / "out", **CODYRA), streaming.labelled(folder))
    return asked, found, folder


def by_hand(bert: Path, folder: Path, trained: int, name: str) -> float:
    """Accuracy on a task by W₀ + Σ B·diag(g)·A of the saved adapters, in float64, with that task's saved head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = streaming.WORDS[name]
    runs = sorted((folder / "out" / "tasks").iterdir())
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=len(words)).double().eval()
    state = model.state_dict()
    for place in runs[:trained]:
        file = load_file(place / "adapter_model.safetensors")
        saved = {k.removeprefix("base_model.model."): t.double() for k, t in file.items()}
        for key in [k for k in saved if k.endswith(".A")]:
            root = key.removesuffix(".weft_codyra_delta.A")
            delta = f"{root}.weft_codyra_delta"
            state[f"{root}.weight"] += saved[f"{delta}.B"] @ torch.diag(saved[f"{delta}.g"]) @ saved[f"{delta}.A"]
    own = load_file(next(r for r in runs if r.name.endswith(f"-{name}")) / "adapter_model.safetensors")
    for part in ("weight", "bias"):
        state[f"classifier.{part}"].copy_(own[f"base_model.model.classifier.{part}"])
    model.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = [json.loads(line) for line in (folder / name / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        right = [
            sorted(words)[int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())] == row["label"]
            for row in rows
        ]
    return sum(right) / len(right)


def test_a_stream_of_images(tmp_path):
    """vit knows the one and learns the other; a head of its own is put back for each."""
    names = {"turned": "builtin:digits-shifted", "upright": "builtin:digits"}
    tasks = write_tasks(tmp_path / "tasks.yaml", [{"name": name, "data": data} for name, data in names.items()])
    asked, found = run({**given(Path("builtin:vit"), tmp_path / "out"), "max_steps": 40, "learning_rate": 0.02}, tasks)
    assert asked.metric == found["metric"] == "accuracy"
    assert found["matrix"][0][0] < 0.3 < 0.9 < found["matrix"][0][1]
    assert found["matrix"][1][0] > 0.1 + found["matrix"][0][0]
    assert stream.load_model(tmp_path / "out", "turned").model.config.num_labels == 10


def test_the_matrix_is_what_the_merged_weights_and_the_heads_give(bert, finished):
    _, found, folder = finished
    assert found["tasks"] == ["a", "b", "c"] and found["metric"] == "accuracy" and found["splits"] == ["test"] * 3
    names = found["tasks"]
    expected = {(i, j): by_hand(bert, folder, i, names[j]) for i in range(1, 4) for j in range(i)}
    assert {place: found["matrix"][place[0]][place[1]] for place in expected} == pytest.approx(expected)
    assert sum(found["matrix"][j + 1][j] > found["matrix"][0][j] for j in range(3)) >= 2  # heads and bodies matter
    assert found["matrix"] == json.loads((folder / "out" / "stream.json").read_text())["matrix"]
    summary = stream.summary(found["matrix"], higher=True)
    assert {name: found[name] for name in summary} == summary


def test_a_task_has_its_own_head_back(finished):
    _, found, folder = finished
    last = found["matrix"][-1]
    for number, name in enumerate(found["tasks"], 1):
        base = stream.load_model(folder / "out", name)
        own = load_file(folder / "out" / "tasks" / f"{number}-{name}" / "adapter_model.safetensors")
        assert torch.equal(base.model.classifier.weight, own["base_model.model.classifier.weight"])
        labels = [base.model.config.id2label[i] for i in range(base.model.config.num_labels)]
        assert labels == sorted(streaming.WORDS[name])
        rows = [json.loads(line) for line in (folder / name / "test.jsonl").read_text().splitlines()]
        batch = base.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            said = base.model.eval()(**batch).logits.argmax(-1).tolist()
        right = [labels[k] == row["label"] for k, row in zip(said, rows)]
        assert sum(right) / len(right) == pytest.approx(last[number - 1])
    with pytest.raises(UsageError, match="has no task 'd'"):
        stream.load_model(folder / "out", "d")


def test_seeds_go_up_and_only_the_newest_model_stays(finished):
    asked, found, folder = finished
    assert [task.run.settings.seed for task in asked.tasks] == [0, 1, 2]
    runs = sorted((folder / "out" / "tasks").iterdir())
    assert [(place / "merged").exists() for place in runs] == [False, False, True]
    assert not [path for path in (folder / "out").rglob("*") if "partial" in path.name or "checkpoint" in path.name]
    assert json.loads((runs[2] / "merged" / "config.json").read_text())["weft_tasks"] == 3
    config = json.loads((runs[1] / "adapter_config.json").read_text())
    assert config["merged_tasks"] == 1 and config["seed"] == 4
    assert found["runs"]["b"]["steps"] == 30


@pytest.mark.parametrize("method", ["peft:lora", "full"])
def test_language_models_have_losses(llama, tmp_path, method):
    from weft.run import data, models
    from weft.run.evaluate import evaluate

    tasks = []
    for n in range(2):
        path = tiny.write_jsonl(tmp_path / f"{n}.jsonl", [{"text": text} for text in tiny.sentences(20, seed=n)])
        tasks.append({"name": f"t{n}", "data": str(path), "max_length": 32})
    asked, found = run(given(llama, tmp_path / "out", method=method), write_tasks(tmp_path / "t.yaml", tasks))
    assert found["metric"] == "loss" and found["splits"] == ["validation", "validation"]
    base = models.load_base(str(llama), "causal-lm")
    after = stream.load_model(tmp_path / "out", "t0")
    for model, row in ((base.model, found["matrix"][0]), (after.model, found["matrix"][2])):
        for task, loss in zip(asked.tasks, row):
            splits = data.load_splits("rows", "auto", base.tokenizer, max_length=32, rows=task.rows)
            assert evaluate(model, splits.validation, "causal-lm", 6)["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["matrix"][1][0] < found["matrix"][0][0]
    assert not list((tmp_path / "out" / "tasks").glob("*/model*.safetensors"))


def test_each_task_computes_attention_as_the_config_of_the_model_says(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    data = str(tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in tiny.sentences(20, seed=1)]))
    tasks = write_tasks(tmp_path / "t.yaml", [{"name": name, "data": data} for name in "ab"])
    run(given(model, tmp_path / "out"), tasks)
    assert stream.load_model(tmp_path / "out", "b").model.config._attn_implementation == "eager"


# --- killed -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code catches, as a killed process leaves it."""


@pytest.fixture(scope="module")
def whole(bert, tmp_path_factory):
    """What an undisturbed stream of two tasks found, and the file of its tasks."""
    folder = tmp_path_factory.mktemp("whole")
    tasks = streaming.labelled(folder, "ab")
    return run(given(bert, folder / "out"), tasks)[1], tasks


@pytest.mark.parametrize("where", ["_merge", "_score_all", "_write_json"])
def test_killed_anywhere_it_goes_on_and_trains_no_task_twice(bert, whole, tmp_path, monkeypatch, where):
    """Before and after a part of the stream's first call and of a later one."""
    wanted, tasks = whole
    trained = []
    train = adapt.run_adapt
    monkeypatch.setattr(adapt, "run_adapt", lambda run, *rest: trained.append(run.options.output) or train(run, *rest))
    part, calls = getattr(stream, where), []

    def dying(*args):
        calls.append(args)
        if len(calls) in (1, 4):
            raise Killed
        done = part(*args)
        if len(calls) in (2, 5):
            raise Killed
        return done

    monkeypatch.setattr(stream, where, dying)
    kills = 0
    while not (tmp_path / "out" / "stream.json").exists():
        try:
            run(given(bert, tmp_path / "out"), tasks)
        except Killed:
            kills += 1
    found = json.loads((tmp_path / "out" / "stream.json").read_text())
    assert kills >= 3 and found["scores"] == wanted["scores"]
    assert [Path(place).name for place in trained] == ["1-a", "2-b"]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(bert, tmp_path):
    """A file of tasks, and options, that must be refused with these words before anything is written."""
    places = {name: str(streaming.classes(tmp_path, name)) for name in ("a", "b")}

    def call(says: str, text: str | None = None, second: dict[str, Any] | None = None, **more: Any) -> None:
        tasks = [{"name": "a", "data": places["a"]}, {"name": "b", "data": places["b"], **(second or {})}]
        path = write_tasks(tmp_path / "tasks.yaml", tasks)
        if text is not None:
            Path(path).write_text(text)
        with pytest.raises(UsageError, match=says) as refused:
            run({**given(bert, tmp_path / "out"), **more}, path)
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()

    return call


def test_files_that_are_no_streams(bad):
    bad("has the key 'task': it holds tasks", text="task: []")
    bad("holds tasks, a list with a name", text="tasks: {a: 1}")
    bad("has 1 tasks, and a stream takes two", text="tasks: [{name: a, data: x}]")
    bad("is not YAML", text="tasks: [")
    bad("must be a mapping", text="- a")


def test_tasks_that_are_none(bad):
    bad("has two tasks of the name 'a'", second={"name": "a"})
    bad("task 2, has the name None", second={"name": None})
    bad("task 2, has the name 'a/b'", second={"name": "a/b"})
    bad("has the unknown key 'colums': did you mean 'columns'", second={"colums": {}})
    bad("unknown key 'r'.*options of the method are given beside", second={"r": 4})
    bad("method is one for all tasks", second={"method": "sora"})
    bad("task 'b': data is missing", second={"data": None})
    bad("task 'b': data .*nowhere", second={"data": "/nowhere.jsonl"})
    bad("task 'b': the data has no column 'words'", second={"columns": {"text": "words"}})
    bad("task 'b': max_steps must be at least 1", second={"max_steps": 0})
    bad("task 'b' is causal-lm and task 'a' classification", second={"task": "causal-lm"})


def test_streams_that_cannot_be(bad):
    bad("--data does not go with --stream", data="x")
    bad("--test-data does not go with --stream", test_data="x")
    bad("^unknown method 'sorra'", method="sorra")
    bad("^unknown option 'q' for method peft:lora", q=1)
    bad("method base trains nothing", method="base")
    bad("in another form", method="sltrain")
    bad("history keeps tasks beside", method="codyra", history=True)


def test_one_process_only(bad, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    bad("runs in one process")


def test_another_stream_in_the_folder_is_refused(bert, finished, tmp_path):
    asked, _, folder = finished
    options = given(bert, folder / "out", **CODYRA)
    tasks = str(folder / "tasks.yaml")
    with pytest.raises(UsageError, match="holds this stream, finished"):
        stream.settle_output(stream.request(options, tasks), None)
    with pytest.raises(UsageError, match="holds a stream with r=4, not 8"):
        stream.settle_output(stream.request({**options, "r": 8}, tasks), None)
    with pytest.raises(UsageError, match="task 'a' with max_steps=30, not 7"):
        stream.settle_output(stream.request({**options, "max_steps": 7}, tasks), None)
    entries = [{"name": n, "data": str(folder / n)} for n in "acb"]
    with pytest.raises(UsageError, match="of the tasks a, b, c, not a, c, b"):
        stream.settle_output(stream.request(options, write_tasks(tmp_path / "other.yaml", entries)), None)
    files = [str(folder / "out" / name) for name in ("run.yaml", "tasks.yaml")]
    again = {k: v for k, v in adapt.read_run_file(files[0]).items() if v is not None}
    assert stream.request(again, files[1]).resolved() == asked.resolved()  # the two files repeat the stream


def test_a_head_of_another_model_is_an_error(bert, finished, tmp_path):
    from safetensors.torch import save_file

    save_file({"score.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    with pytest.raises(WeftError, match="does not hold the head of a BertForSequenceClassification"):
        stream._assembled(str(bert), "classification", head=tmp_path / "head.safetensors", num_labels=2)
