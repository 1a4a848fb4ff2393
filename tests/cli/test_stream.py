"""weft adapt --stream from its words to its files, and through a kill."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
sys.path.insert(0, str(Path(__file__).parent))

import streaming
from test_stopping import wait_for


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def words(bert, tmp_path):
    tasks = streaming.labelled(tmp_path, "ab")

    def call(output: Path, *more: object, method: str = "peft:lora") -> list[str]:
        basic = ["adapt", "--model", bert, "--stream", tasks, "--method", method, "--output", output]
        quick = ["--max-steps", 2, "--batch-size", 6, "--eval-steps", 0, "--learning-rate", "0.01"]
        return [str(word) for word in [*basic, *quick, *more]]

    return call


def test_the_folder_and_the_words_it_ends_with(weft, refuse, words, tmp_path):
    output = tmp_path / "out"
    code, out, err = weft(*words(output))
    assert code == 0 and err == ""
    assert "task 2 of 2, b" in out and "forgetting:" in out and f"report: {output / 'report.html'}" in out
    assert {path.name for path in output.iterdir()} == {
        "run.yaml", "tasks.yaml", "start.json", "tasks", "stream.json", "report.html"
    }  # fmt: skip
    found = json.loads((output / "stream.json").read_text())
    assert len(found["matrix"]) == 3 and "<script" in (output / "report.html").read_text()
    assert yaml.safe_load((output / "tasks.yaml").read_text())["tasks"][1]["seed"] == 1
    refuse(2, *words(output), says=("holds this stream, finished", "--no-resume"))
    refuse(2, *words(output, "--r", 2), says=("holds a stream with r=8, not 2",))
    before = (output / "stream.json").read_text()
    code, out, _ = weft(*words(output, "--resume"))  # nothing is trained, only the report is written anew
    assert code == 0 and "task 1 of 2, a: done" in out and (output / "stream.json").read_text() == before


def test_a_dry_run_writes_nothing(weft, words, tmp_path):
    code, out, _ = weft(*words(tmp_path / "out", "--dry-run"))
    assert code == 0 and "task b: 48 rows to train on, 12 of test" in out and not (tmp_path / "out").exists()


def test_what_is_wrong_is_one_sentence_before_any_work(refuse, words, bert, tmp_path):
    def wrong(*more, says, code=2):
        refuse(code, *words(tmp_path / "out", *more), says=says)
        assert not (tmp_path / "out").exists()

    wrong("--data", "x", says=("--data does not go with --stream",))
    wrong("--stream", tmp_path / "none.yaml", says=("none.yaml' cannot be read",))
    wrong("--r", "99", says=("r=99", "32"))
    other = streaming.write_tasks(tmp_path / "o.yaml", [{"name": "a", "data": str(tmp_path / "a"), "rank": 3}] * 2)
    wrong("--stream", other, says=("task 'a', has the unknown key 'rank'",))
    refuse(2, "adapt", "--model", bert, "--stream", other, "--method", "sora", says=("--output is missing",))


@pytest.mark.slow
def test_killed_and_the_same_command_again(spawn, weft, words, tmp_path):
    """kill -9 in the second task; then the very same command ends where it would have ended."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    more = ["--max-steps", 40, "--save-steps", 5, "--r", 4, "--lambda-num", 4, "--max-kappa", "0.05"]
    assert weft(*words(whole, *more, method="codyra"))[0] == 0
    process = spawn(*words(output, *more, method="codyra"))
    wait_for(process, "task 2 of 2, b")
    wait_for(process, r"^step (9|1\d|2\d)/")
    process.kill()
    process.communicate()
    assert not (output / "stream.json").exists()
    adapter = output / "tasks" / "1-a" / "adapter_model.safetensors"
    first = adapter.stat().st_mtime_ns
    again = spawn(*words(output, *more, method="codyra"))
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "task 1 of 2, a: done" in out and adapter.stat().st_mtime_ns == first and "step 3/" not in out
    found = [json.loads((folder / "stream.json").read_text()) for folder in (whole, output)]
    assert found[0]["scores"] == found[1]["scores"]


@pytest.mark.parametrize("when", ["training", "beside"])
def test_ctrl_c_says_how_to_go_on(refuse, words, tmp_path, monkeypatch, when):
    from weft.run import adapt, stream
    from weft.run.loop import Interrupted

    def stopped(*_):
        raise Interrupted(7, tmp_path / "checkpoint-7") if when == "training" else KeyboardInterrupt

    monkeypatch.setattr(stream, "_score_all", lambda *_: {})
    monkeypatch.setattr(adapt, "settled", stopped)
    output = tmp_path / "out"
    said = refuse(1, *words(output), says=("go on with: weft adapt --config",))
    assert f"{output}/run.yaml --stream {output}/tasks.yaml" in said and ("step 7" in said) == (when == "training")
