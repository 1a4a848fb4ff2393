"""`weft compare` on a tiny model that is made on the spot: same numbers however it is run, nothing lost on the way."""

from __future__ import annotations

import json
import math
import os
import select
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from weft.cli.compare import study_command
from weft.cli.main import run
from weft.errors import UsageError, WeftError
from weft.run import spread
from weft.run.budget import parse_budget
from weft.run.compare import compare
from weft.run.planning import Silent, plan_study, total_steps
from weft.run.single import context_of, run_task
from weft.run.study import Study, Task, pending, read_rows

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "a",
    "mat",
    "log",
    "and",
    "then",
    "it",
    "was",
    "happy",
    "sad",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a Llama of 5,000 parameters and thirty short texts."""
    folder = tmp_path_factory.mktemp("compare")
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder / "model")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    texts = [
        " ".join(WORDS[(start * 7 + step * (1 + start % 3)) % len(WORDS)] for step in range(12)) for start in range(30)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def _study(place: Path, **changes) -> Study:
    settings = {
        "methods": ("peft:lora", "peft:vera"),
        "budget": parse_budget("steps=4"),
        "seeds": 2,
        "batch_size": 4,
        "max_length": 16,
        "grid_points": 2,
        "grid_extend": 1,
        "measure_steps": 3,
        "measure_repeats": 1,
        "evaluations": 1,
    }
    return Study(str(place / "model"), str(place / "data.jsonl"), **{**settings, **changes})


def _numbers(rows):
    """What must not depend on how a study was run: every row without its times and memory, in one order."""
    timeless = [
        {name: value for name, value in row.items() if name not in ("step_seconds", "peak_bytes")}
        for row in rows
        if row["kind"] == "run"
    ]
    return sorted(json.dumps(row, sort_keys=True) for row in timeless)


def test_parameters_are_solved_on_the_skeleton(place):
    plan = plan_study(_study(place, budget=parse_budget("params=1000,steps=4"), methods=("peft:lora", "peft:vera")))
    lora, vera = plan.entry("peft:lora"), plan.entry("peft:vera")
    # per layer: q and o 16 + 16, k and v 16 + 8, gate, up and down 16 + 24 parameters a rank
    assert lora.knob == {"name": "r", "value": 2, "unreachable": False}
    assert lora.trainable == 2 * 2 * (2 * 32 + 2 * 24 + 3 * 40)
    assert vera.knob["name"] == "r" and 900 <= vera.trainable <= 1000
    assert plan.entry("base").trainable == 0
    assert plan.entry("full").trainable == plan.parameters


def test_adalora_is_sized_by_the_rank_it_starts_with(place):
    plan = plan_study(_study(place, budget=parse_budget("params=1000,steps=4"), methods=("peft:adalora",)))
    entry = plan.entry("peft:adalora")
    # a rank has one parameter more than LoRA's in each of 14 modules: its singular value
    assert entry.knob == {"name": "init_r", "value": 2, "unreachable": False}
    assert entry.trainable == 2 * (464 + 14)


def test_what_cannot_meet_the_budget_is_marked_and_runs_as_near_as_it_can(place):
    plan = plan_study(_study(place, budget=parse_budget("params=240,steps=4")))
    assert plan.entry("peft:lora").knob == {"name": "r", "value": 1, "unreachable": True}
    assert not plan.entry("peft:vera").knob["unreachable"]
    assert any("peft:lora cannot have 240 trainable parameters; it runs with 464" in note for note in plan.notes)
    with pytest.raises(UsageError, match="no method can meet params=240; the nearest are peft:lora 464"):
        plan_study(_study(place, budget=parse_budget("params=240,steps=4"), methods=("peft:lora",)))


def test_a_run_is_a_function_of_its_task(place):
    """The same bits whatever the process ran before; another seed gives others; only final runs see the test split."""
    plan = plan_study(_study(place))
    context = context_of(plan)
    task = asdict(Task("final", "peft:lora", 1, 1e-2, plan.steps))
    first = run_task(context, task)
    assert first["status"] == "ok", first["error"]
    other = run_task(context, {**task, "seed": 2})
    run_task(context, {**task, "method": "peft:vera"})
    assert run_task(context, task) == first
    assert other["test"] != first["test"] and first["trainable"] == 8 * 464
    losses = [point["loss"] for point in first["curve"]]
    assert len(losses) == plan.steps and first["test"]["loss"] == pytest.approx(
        math.fsum(nats for nats, _ in first["test"]["per_document"])
        / sum(tokens for _, tokens in first["test"]["per_document"])
    )
    grid = run_task(context, {**task, "phase": "grid", "seed": 0})
    assert grid["test"] is None and "per_document" not in grid["validation"]
    assert "--seed 1" in first["command"] and "--learning-rate 0.01" in first["command"]


def test_methods_share_their_batches(place):
    """With a learning rate of zero nothing is learned, so that all methods see the same losses step by step."""
    plan = plan_study(_study(place))
    curves = []
    for method in ("peft:lora", "peft:vera", "full"):
        row = run_task(context_of(plan), asdict(Task("grid", method, 0, 0.0, plan.steps)))
        assert row["status"] == "ok", row["error"]
        curves.append([point["loss"] for point in row["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[0] == pytest.approx(curves[2], rel=1e-5)


def test_recipes_apply(place, monkeypatch):
    """Decay, warm-up, clipping and schedule reach Trainer as the method's recipe has them."""
    from weft.run import methods, train

    seen = {}
    arguments = train.training_arguments

    def spy(settings, output, method):
        seen[method.name] = settings
        return arguments(settings, output, method)

    monkeypatch.setattr(train, "training_arguments", spy)
    plan = plan_study(_study(place, methods=("sora", "peft:lora")))
    for name in ("sora", "peft:lora"):
        method = methods.resolve(name, {})
        run_task(context_of(plan), asdict(Task("grid", name, 0, 1e-3, 2)))
        for key, value in method.recipe.items():
            if key != "learning_rate":
                assert getattr(seen[name], key) == value, (name, key)
        assert plan.entry(name).recipe == method.recipe
    assert seen["sora"].max_grad_norm != seen["peft:lora"].max_grad_norm


def test_forgetting_is_measured_on_text_that_the_base_model_sampled(place):
    plan = plan_study(_study(place))
    made = run_task(context_of(plan), asdict(Task("forgetting", "base", 0, None, 0)))
    assert made == run_task(context_of(plan), asdict(Task("forgetting", "base", 0, None, 0)))
    assert len(made["rows"]) > 20 and all(row[0] == 0 for row in made["rows"])
    context = context_of(plan, made)
    still = run_task(context, asdict(Task("final", "peft:lora", 1, 0.0, plan.steps)))
    moved = run_task(context, asdict(Task("final", "full", 1, 0.1, plan.steps)))
    assert still["forgetting"]["before"] == pytest.approx(still["forgetting"]["after"], rel=1e-5)
    assert moved["forgetting"]["after"] > moved["forgetting"]["before"] + 0.1


def test_forget_data_is_taken_instead(place):
    (place / "other.txt").write_text(" ".join(WORDS * 20))
    plan = plan_study(_study(place, forget_data=str(place / "other.txt")))
    made = run_task(context_of(plan), asdict(Task("forgetting", "base", 0, None, 0)))
    assert made["source"] == str(place / "other.txt") and made["before"] > 0


def test_what_a_run_raises_is_its_row(place):
    plan = plan_study(_study(place))
    row = run_task(context_of(plan), asdict(Task("final", "peft:lora", 1, 1e30, plan.steps)))
    assert row["status"] == "failed" and "at step" in row["error"] and "\n" not in row["error"]
    json.dumps(row, allow_nan=False)


def test_a_timing_run_counts_steps_and_memory(place):
    plan = plan_study(_study(place))
    row = run_task(context_of(plan), asdict(Task("measure", "full", 0, 1e-3, 4)))
    assert row["status"] == "ok" and row["steps"] == 4 and row["step_seconds"] > 0 and row["test"] is None


class _Stop(Silent):
    """Ctrl-C after some runs."""

    def __init__(self, after: int) -> None:
        self.left = after

    def finished(self, row):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_workers_interruptions_and_failures_leave_no_trace(place, tmp_path):
    """One worker, or two with an interruption and a torn line between: the same rows. What fails stops nothing."""
    failing = {"peft:rslora": {"init_lora_weights": "corda"}}  # needs statistics that nobody gathered
    study = _study(place, methods=("peft:lora", "peft:rslora"), options=failing, references=("base", "full"))
    whole = compare(study, tmp_path / "one", workers=1)
    with pytest.raises(KeyboardInterrupt):
        compare(study, tmp_path / "two", workers=2, observer=_Stop(5))
    path = tmp_path / "two" / "results.jsonl"
    kept = read_rows(path)[0]
    assert len(kept) == 6
    path.write_bytes(path.read_bytes() + b'{"kind": "run", "phase": "fin')
    rest = compare(study, tmp_path / "two", workers=2)
    assert rest[:6] == kept
    assert _numbers(rest) == _numbers(whole)
    assert not pending(plan_study(study), whole)
    failed = [row for row in whole if row.get("status") == "failed"]
    assert {row["method"] for row in failed} == {"peft:rslora"}
    assert all("corda" in row["error"].lower() for row in failed)
    assert {row["seed"] for row in failed if row["phase"] == "final"} == {1, 2}
    measured = [row for row in whole if row.get("phase") == "measure" and row["status"] == "ok"]
    assert {row["method"] for row in measured} == {"peft:lora", "full"}
    assert all(row["step_seconds"] > 0 and row["peak_bytes"] > 0 for row in measured)
    before = path.read_bytes()
    assert compare(study, tmp_path / "two") == rest and path.read_bytes() == before  # nothing is left to do
    with pytest.raises(UsageError, match="holds a study with seeds 2, and this command has 3"):
        compare(replace(study, seeds=3), tmp_path / "two")
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_study_is_given_more_methods(place, tmp_path):
    """Rows stay, what is added runs as it would have from the start, and times are taken anew, of all in turns."""
    study = _study(place, methods=("peft:lora",), references=("base",), seeds=1)
    more = replace(study, methods=("peft:dora", "peft:lora"), options={"peft:dora": {"r": 2}})
    whole, first = compare(more, tmp_path / "whole"), compare(study, tmp_path / "grown")
    grown = compare(more, tmp_path / "grown")
    trained = [row for row in first[1:] if row["phase"] != "measure"]
    assert grown[1 : 1 + len(trained)] == trained and _numbers(grown) == _numbers(whole)
    timed = [row["method"] for row in grown[1:] if row["phase"] == "measure"]
    assert timed == [row["method"] for row in whole[1:] if row["phase"] == "measure"] and "peft:dora" in timed
    header, other = grown[0], whole[0]
    assert [each["methods"] for each in header["added"]] == [["peft:dora"]]
    assert header["started"] == first[0]["started"]
    for name in ("plan", "methods", "request"):
        assert header[name] == other[name]
    path = tmp_path / "grown" / "results.jsonl"
    before = path.read_bytes()
    assert compare(more, tmp_path / "grown") == grown
    with pytest.raises(UsageError, match="holds a study with methods"):
        compare(study, tmp_path / "grown")
    assert path.read_bytes() == before
    changed = json.loads(json.dumps(first[0]))
    changed["plan"]["entries"][1]["recipe"]["weight_decay"] = 0.5
    path.write_text(json.dumps(changed) + "\n")
    with pytest.raises(UsageError, match="peft:lora ran with recipe .*0.5.* and would now have"):
        compare(more, tmp_path / "grown")


@pytest.mark.slow
def test_minutes_become_steps_before_the_first_run(place, tmp_path):
    study = _study(place, methods=("peft:lora",), references=(), budget=parse_budget("minutes=99,steps=3"), seeds=1)
    rows = compare(study, tmp_path, workers=1)
    assert rows[0]["plan"]["steps"] == 3 and rows[0]["budget"] == {"minutes": 99.0, "steps": 3}
    assert {row["steps"] for row in rows[1:] if row["phase"] in ("grid", "final")} == {3}
    assert any("minutes=99 became 3 steps a run: peft:lora" in note for note in rows[0]["plan"]["notes"])
    short = replace(study, budget=parse_budget("minutes=0.0000001"))
    with pytest.raises(UsageError, match="minutes=1e-07 is less than one step of the slowest method"):
        plan_study(short)


@pytest.mark.slow
def test_a_worker_that_dies_takes_its_own_run_only(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(
        "import os\n\ndef work(context, task):\n    return os._exit(1) if task['die'] else {**context, **task}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import dying

    pool = spread.Processes(dying.work, {"shared": 1}, workers=2, threads=1)
    try:
        finished = {}
        for number in range(5):
            if not pool.free():
                task, row = pool.next()
                finished[task["number"]] = row
            pool.submit({"number": number, "die": number == 2})
        while len(finished) < 5:
            task, row = pool.next()
            finished[task["number"]] = row
    finally:
        pool.close()
    assert finished.pop(2) is None
    assert all(row == {"shared": 1, "number": number, "die": False} for number, row in finished.items())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_workers_end_with_the_first_process_in_the_middle_of_a_run(tmp_path):
    told = tmp_path / "told"
    os.mkfifo(told)
    (tmp_path / "sleeping.py").write_text(
        "import time\n\ndef work(context, task):\n"
        "    with open(task['told'], 'wb', buffering=0) as file:\n        file.write(b'.')\n        time.sleep(300)\n"
    )
    script = "import sys, sleeping\nfrom weft.run.spread import Processes\nif __name__ == '__main__':\n"
    script += "    pool = Processes(sleeping.work, {}, workers=1, threads=1)\n"
    script += "    pool.submit({'told': sys.argv[1]})\n    pool.next()\n"
    (tmp_path / "first.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "first.py"), str(told)]) as first, told.open("rb", 0) as file:
        assert file.read(1) == b"."  # it runs
        first.kill()
        assert select.select([file], [], [], 60)[0] and file.read() == b""  # nobody holds the other end any more


def test_ray_is_an_extra(place, monkeypatch):
    monkeypatch.setattr(spread.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--ray needs the extra `weft\[ray\]`"):
        compare(_study(place), place / "nowhere", ray="auto")
    assert not (place / "nowhere").exists()


def test_a_ray_cluster_that_is_not_there(place, monkeypatch):
    import socket

    monkeypatch.setattr(spread.importlib.util, "find_spec", lambda name: name)
    with socket.socket() as taken:  # a port that is bound and listens to nobody
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(WeftError, match=f"no Ray cluster answers at --ray '{address}'"):
            compare(_study(place), place / "nowhere", ray=address)
    with pytest.raises(UsageError, match="--ray 'everywhere' is not an address; give HOST:PORT"):
        compare(_study(place), place / "nowhere", ray="everywhere")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "peft:lora,sorra"], "unknown method 'sorra': did you mean 'sora'?"),
        (["--methods", "peft:lra"], "unknown PEFT method 'peft:lra': did you mean 'lora'?"),
        (["--methods", ","], "--methods is empty"),
        (["--budget", "param=3"], "--budget: unknown part 'param': did you mean 'params'?"),
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
        (["--set", "r=8"], "--set 'r=8' names no method; write for example --set peft:lora.r=8"),
        (["--set", "peft:lora.rr=8"], "peft:lora has no option 'rr': did you mean 'r'?"),
        (["--set", "peft:lora.r=many"], "peft:lora: r must be int, not 'many'"),
        (["--set", "sora.r=8"], "--set names 'sora', which is not among --methods peft:lora"),
        (["--set", "peft:lora.r=17"], "r=17 is larger than the shorter side"),
        (["--references", "bse"], "--references: unknown reference 'bse': did you mean 'base'?"),
        (["--target-modules", "qproj"], "target_modules ['qproj'] match nothing"),
        (["--test-fraction", "0"], "has no test split; give --test-fraction above 0 or --test-data"),
        (["--data", "nothing.txt"], "data file 'nothing.txt' does not exist"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(place, tmp_path, capsys, words, sentence):
    given = {
        "--model": str(place / "model"),
        "--data": str(place / "data.jsonl"),
        "--methods": "peft:lora",
        "--output": str(tmp_path / "out"),
    }
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert run(["compare", *(word for pair in given.items() for word in pair)]) == 2
    captured = capsys.readouterr().err.strip()
    assert sentence in captured and captured.count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_the_plan(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["compare", "--model", str(place / "model"), "--data", str(place / "data.jsonl"), "--methods", "peft:lora"]
    words += ["--budget", "params=1000,steps=4", "--output", str(tmp_path / "out"), "--dry-run"]
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert "r = 2" in shown and "928" in shown and "0.0001, 0.0003, 0.0009" in shown
    study = Study(
        str(place / "model"), str(place / "data.jsonl"), ("peft:lora",), budget=parse_budget("params=1000,steps=4")
    )
    steps = total_steps(plan_study(study), [])
    assert steps == 3 * (3 + 3) * 4 + 3 * 3 * 10 and f"{steps:,} optimiser steps" in shown
    assert not (tmp_path / "out").exists()


def test_the_command_of_a_study_makes_that_study(place, monkeypatch):
    """What the report prints is read back as the same study."""
    from weft.cli import compare as verb

    study = _study(
        place,
        methods=("sora", "peft:lora"),
        options={"sora": {"r": "4"}},
        budget=parse_budget("params=1k,minutes=0.5"),
        target_modules=["q_proj", "v_proj"],
        references=("base",),
        data_options={"validation_fraction": 0.2, "test_fraction": 0.1, "columns": {"text": "text"}},
        bf16=True,
        grid_factor=2.5,
        grid_steps=3,
        generate=7,
    )
    made = []
    monkeypatch.setattr(verb, "run_study", lambda study, output, **_: made.append((study, output)))
    assert run(shlex.split(study_command(study, "some where"))[1:]) == 0
    assert made == [(study, Path("some where"))]


@pytest.mark.parametrize("method", ["peft:dora", "sora", "full@galore"])
def test_the_command_of_a_run_makes_the_same_model(place, tmp_path, monkeypatch, method):
    """`weft adapt` as the row has it: same data, same seeds, same losses."""
    options = {"rank" if "@" in method else "r": "4"}
    plan = plan_study(_study(place, methods=(method,), options={method: options}))
    row = run_task(context_of(plan), asdict(Task("final", method, 1, 1e-2, plan.steps)))
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(row["command"])[1:]) == 0
    result = json.loads((tmp_path / f"{method.replace(':', '-')}-1" / "result.json").read_text())
    for split in ("validation", "test"):
        assert result[split]["loss"] == pytest.approx(row[split]["loss"], rel=1e-6)
    assert result["trainable"] == row["trainable"]


def test_one_method_under_two_settings_is_two_entries(place):
    options = {"sora": {"r": "2"}, "sora#wide": {"r": "4"}, "full@galore#8bit": {"rank": "4", "inner": "adamw8bit"}}
    plan = plan_study(_study(place, methods=tuple(options), options=options))
    assert plan.entry("sora#wide").trainable > plan.entry("sora").trainable
    assert plan.entry("full@galore#8bit").options["inner"] == "adamw8bit"
    row = run_task(context_of(plan), asdict(Task("final", "sora#wide", 1, 1e-3, plan.steps)))
    assert row["status"] == "ok" and row["method"] == "sora#wide" and "--method sora " in row["command"]


def test_optimisers_are_compared_from_random_weights(place):
    methods = ("full@galore", "full@hf:adafactor", "peft:lora@lora_pro")
    study = _study(place, methods=methods, options={"full@galore": {"rank": "4"}}, forget_data="none")
    study = replace(study, model=f"config:{study.model}", budget=parse_budget("params=1k,steps=4"))
    plan = plan_study(study)
    galore, adafactor = plan.entry("full@galore"), plan.entry("full@hf:adafactor")
    assert galore.trainable == adafactor.trainable == plan.entry("full").trainable  # no knob, and no budget to miss
    assert not any("full@" in note for note in plan.notes)
    assert (galore.recipe["learning_rate"], plan.entry("full").recipe["learning_rate"]) == (1e-2, 1e-3)
    rows = {
        (name, seed): run_task(context_of(plan), asdict(Task("final", name, seed, 1e-3, plan.steps)))
        for name, seed in [("full@galore", 1), ("full@galore", 2), ("full@hf:adafactor", 1), ("peft:lora@lora_pro", 1)]
    }
    assert all(row["status"] == "ok" for row in rows.values()), [row["error"] for row in rows.values()]
    sizes = [rows[name, 1]["optimizer_bytes"] for name in ("full@hf:adafactor", "full@galore")]
    assert 0 < sizes[0] < sizes[1] < 8 * galore.trainable
    first = {key: row["curve"][0]["loss"] for key, row in rows.items()}
    assert first["full@galore", 1] == first["full@hf:adafactor", 1] != first["full@galore", 2]  # seeds draw the weights


def test_factorised_weights_are_compared_at_equal_parameters(place):
    plan = plan_study(_study(place, methods=("sltrain", "lowrank"), budget=parse_budget("params=3k,steps=2")))
    sltrain, lowrank = plan.entry("sltrain"), plan.entry("lowrank")
    assert sltrain.knob["name"] == lowrank.knob["name"] == "rank"
    assert sltrain.knob["value"] >= 1 and sltrain.trainable <= 3000 and lowrank.trainable <= 3000
    row = run_task(context_of(plan), asdict(Task("final", "sltrain", 1, 1e-3, plan.steps)))
    assert row["status"] == "ok" and row["trainable"] == sltrain.trainable


def test_classification(place):
    """Accuracy on rows, a fresh head that is the same for all methods, no forgetting."""
    rows = [{"text": " ".join(WORDS[start : start + 4]), "label": start % 2} for start in range(12)] * 4
    (place / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plan_study(replace(_study(place), data=str(place / "labelled.jsonl"), data_options={"test_fraction": 0.25}))
    assert plan.task == "classification"
    base = run_task(context_of(plan), asdict(Task("reference", "base", 0, None, 0)))
    rows = {
        method: run_task(context_of(plan), asdict(Task("final", method, 1, 1e-2, plan.steps)))
        for method in ("peft:lora", "head", "full")
    }
    for row in (base, *rows.values()):
        assert row["status"] == "ok", row["error"]
        assert 0 <= row["test"]["accuracy"] <= 1 and len(row["test"]["per_document"]) == 12
    assert rows["head"]["trainable"] == 16 * 2 < rows["peft:lora"]["trainable"] < rows["full"]["trainable"]
    losses = [rows[method]["curve"][0]["loss"] for method in rows]  # before the first step, all are the base model
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == pytest.approx(losses[2], rel=1e-5)
