"""Ctrl-C and kill -9 in the middle of a comparison: what is kept, what is said, and how it goes on."""

import json
import os
import shlex
import signal

import pytest


def _words(llama, corpus, output):
    words = ["compare", "--model", llama, "--data", corpus, "--methods", "peft:lora,sora", "--references", "base"]
    words += ["--budget", "steps=8", "--seeds", 1, "--grid-points", 2, "--grid-extend", 0, "--batch-size", 4]
    return [*words, "--max-length", 32, "--measure-repeats", 1, "--measure-steps", 2, "--output", output]


def _rows(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def _wait_for_a_run(process):
    for line in process.stdout:
        if line.startswith("2/"):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(spawn, llama, corpus, tmp_path):
    output = tmp_path / "out"
    process = spawn(*_words(llama, corpus, output), "--workers", 2, start_new_session=True)
    _wait_for_a_run(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group hears it
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.count("\n") == 1 and "interrupted after" in err, err
    kept = _rows(output)
    assert 3 <= len(kept) < 10 and all(row.get("status", "ok") == "ok" for row in kept)
    command = shlex.split(err.split("go on with: ")[1])
    assert command[:2] == ["weft", "compare"]
    resumed = spawn(*command[1:])
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    rows = _rows(output)
    assert rows[: len(kept)] == kept and len(rows) == 1 + 1 + 2 * (2 + 1 + 1)
    assert (output / "report.html").exists() and "peft:lora" in out


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(spawn, llama, corpus, tmp_path):
    output = tmp_path / "out"
    process = spawn(*_words(llama, corpus, output))
    _wait_for_a_run(process)
    process.kill()
    process.communicate()
    kept = _rows(output)
    again = spawn(*_words(llama, corpus, output), whole=True)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0 and err == "", err
    rows = _rows(output)
    assert rows[: len(kept)] == kept
    assert (
        len({(row["phase"], row["method"], row["seed"], row["learning_rate"]) for row in rows[1:]})
        == len(rows[1:])
        == 9
    )
