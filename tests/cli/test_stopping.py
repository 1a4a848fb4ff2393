"""Ctrl-C, kill -9, a full disk: what is left, what is said, and how it goes on."""

import json
import re
import shlex
import signal
import sys
from pathlib import Path

import forked
import pytest
from tiny import environment, result


def wait_for(process, pattern: str) -> str:
    """Read the process's standard output up to a line that matches."""
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"the process ended before {pattern!r}: {process.stderr.read()}")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(spawn, weft, adapt_words, tmp_path):
    output = tmp_path / "out"
    words = adapt_words(output, "--save-steps", 0, steps=2000)
    process = spawn(*words, whole=True)
    wait_for(process, r"^step \d+/2000")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "interrupted after step" in err
    step = int(re.search(r"after step (\d+)", err)[1])
    assert (output / f"checkpoint-{step}" / "complete.json").exists()
    assert "Traceback" not in out + err

    command = err.split("go on with: ")[1].split()
    assert command[:2] == ["weft", "adapt"]
    resumed = spawn(*shlex.split(err.split("go on with: ")[1])[1:])
    first = int(re.search(r"step (\d+)/2000", wait_for(resumed, r"^step \d+/2000"))[1])
    assert first > step
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=120)
    assert resumed.returncode == 1


@pytest.mark.slow
def test_killed_and_the_same_command_again(spawn, weft, adapt_words, tmp_path):
    """kill -9 in the middle, then the very same command: it goes on, and ends where it would have ended."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    steps = 60
    assert weft(*adapt_words(whole, "--save-steps", 5, "--lora-dropout", 0.1, steps=steps))[0] == 0
    words = adapt_words(output, "--save-steps", 5, "--lora-dropout", 0.1, steps=steps)
    process = spawn(*words)
    wait_for(process, r"^step (9|1\d|2\d)/")
    process.kill()
    process.communicate()
    assert not (output / "result.json").exists()
    again = spawn(*words)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert not re.search(r"^step 3/", out, re.MULTILINE)
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert result(output)["validation"] == result(whole)["validation"]


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from weft.run import checkpoints
ordinary = checkpoints.save
def save(output, step, fill, facts):
    if step > 2:  # from the second checkpoint on, no file may grow beyond a kilobyte: a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    try:
        return ordinary(output, step, fill, facts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save = save
from weft.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_stays(adapt_words, tmp_path):
    output = tmp_path / "out"
    words = adapt_words(output, "--save-steps", 2)
    done = forked.run(["-c", LIMITED, *words], env=environment())
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "disk is full" in done.stderr and "step 4" in done.stderr
    assert f"{output / 'checkpoint-2'} is intact" in done.stderr
    assert json.loads((output / "checkpoint-2" / "complete.json").read_text())["step"] == 2
    assert not [path for path in output.iterdir() if "checkpoint-4" in path.name]


def test_starting_again_is_refused_where_it_would_mix_runs(weft, refuse, adapt_words, tmp_path):
    output = tmp_path / "out"
    assert weft(*adapt_words(output))[0] == 0
    refuse(2, *adapt_words(output), says=("finished", "--no-resume"))
    refuse(2, *adapt_words(output, "--r", 2), says=("r=8, not 2", "--no-resume"))
    before = (output / "adapter_model.safetensors").read_bytes()
    assert weft(*adapt_words(output, "--r", 2, "--no-resume"))[0] == 0
    assert (output / "adapter_model.safetensors").read_bytes() != before


def test_what_a_kill_left_of_the_first_file_is_no_obstacle(weft, adapt_words, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / ".run.yaml.partial").write_text("model:")
    assert weft(*adapt_words(output, steps=1))[0] == 0


def test_going_on_with_another_number_of_processes_is_refused(weft, refuse, adapt_words, tmp_path):
    output = tmp_path / "out"
    assert weft(*adapt_words(output))[0] == 0
    marker = output / "checkpoint-6" / "complete.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "processes": 2}))
    refuse(2, *adapt_words(output, "--resume"), says=("written by 2 processes", "not 1"))


def test_resuming_a_finished_run_changes_nothing(weft, adapt_words, tmp_path):
    output = tmp_path / "out"
    assert weft(*adapt_words(output))[0] == 0
    name = "adapter_model.safetensors"
    before, metrics = (output / name).read_bytes(), result(output)["validation"]
    assert weft(*adapt_words(output, "--resume"))[0] == 0
    assert (output / name).read_bytes() == before
    assert result(output)["validation"] == metrics


@pytest.mark.slow
@pytest.mark.parametrize("method", ["peft:lora", "sora"])
def test_two_processes_by_accelerate(method, adapt_words, tmp_path):
    """One process of batch 4 and two of batch 2 learn the same; the first alone prints and writes."""
    one, two = tmp_path / "one", tmp_path / "two"
    env = environment(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    alone = ["-m", "weft", *adapt_words(one, "--batch-size", 4, method=method)]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    both = [*launch, "-m", "weft", *adapt_words(two, "--batch-size", 2, method=method)]
    for command in (alone, both):
        done = forked.run(command, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved to") == 1
        assert len(re.findall(r"^step 6/6", done.stdout, re.MULTILINE)) == 1
    steps = [json.loads(line)["step"] for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len((one / "metrics.jsonl").read_text().splitlines())

    from safetensors.torch import load_file

    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    moved = max(tensor.abs().max() for name, tensor in first.items() if "lora_B" in name or name.endswith(".B"))
    assert moved > 1e-3
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 2e-4, name
    assert abs(result(one)["validation"]["loss"] - result(two)["validation"]["loss"]) < 1e-4


@pytest.mark.slow
def test_accelerate_that_starts_one_process_is_noticed(adapt_words, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "weft"]
    words = adapt_words(tmp_path / "out", steps=1)
    done = forked.run([*launch, *words], env=environment())
    assert done.returncode == 0, done.stderr
    assert "accelerate started one process only" in done.stdout


def test_the_folder_holds_what_is_promised(weft, adapt_words, tmp_path):
    output = tmp_path / "out"
    code, out, err = weft(*adapt_words(output))
    assert code == 0 and err == ""
    assert "validation: loss" in out and "trainable parameters" in out and f"saved to {output}" in out
    names = {path.name for path in Path(output).iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "run.yaml", "result.json"}
    assert not [name for name in names if "partial" in name]
