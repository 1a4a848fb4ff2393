"""Resumed is uninterrupted, bit for bit, wherever the process died."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import crashing

from weft.run import checkpoints

METHODS = {
    "peft:lora": {"r": 4, "lora_dropout": 0.2},
    "peft:adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "sora": {"r": 4},
    "dylora": {"r": 4},
    "full": {},
}


def outcome(output: Path) -> dict[str, bytes]:
    last = checkpoints.newest(output)
    assert last is not None and last.name == f"checkpoint-{crashing.STEPS}"
    return {
        "weights": next(output.glob("*model.safetensors")).read_bytes(),
        "state": (last / checkpoints.STATE).read_bytes(),
        "curve": json.dumps(checkpoints.facts(last)["curve"]).encode(),
    }


@pytest.fixture(scope="module", params=METHODS)
def uninterrupted(request, llama, corpus, tmp_path_factory):
    """An undisturbed run: the method, what came out, and how many instants there were to die at."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert crashing.spawn(llama, corpus, output, request.param, METHODS[request.param], None, False) == 0
    instants = int(output.with_name("out.events").read_text())
    return request.param, outcome(output), instants


@pytest.mark.slow
def test_killed_anywhere_and_resumed(uninterrupted, llama, corpus, tmp_path):
    method, wanted, instants = uninterrupted
    assert instants > 50  # steps, and every flush, rename and write of three checkpoints and the result
    draws = 8 if method == "sora" else 3
    for die_at in sorted(random.Random(method).sample(range(1, instants + 1), draws)):
        output = tmp_path / f"{die_at}"
        code = crashing.spawn(llama, corpus, output, method, METHODS[method], die_at, False)
        assert code == -9, die_at
        assert crashing.spawn(llama, corpus, output, method, METHODS[method], None, True) == 0
        assert outcome(output) == wanted, f"died at {die_at} of {instants}"
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == sorted(set(steps)), "a row twice"


@pytest.mark.slow
def test_killed_again_and_again(uninterrupted, llama, corpus, tmp_path):
    """A process that dies in every attempt still gets there, as long as one checkpoint is finished each time."""
    method, wanted, instants = uninterrupted
    if method not in ("sora", "full"):
        pytest.skip("one adapter and full training stand for the others")
    output = tmp_path / "out"
    attempts = 0
    while crashing.spawn(llama, corpus, output, method, METHODS[method], instants // 2, attempts > 0) != 0:
        attempts += 1
        assert attempts < 10
    assert attempts >= 1
    assert outcome(output) == wanted


def fill(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"x" * 100)


def test_a_checkpoint_without_marker_does_not_count(tmp_path):
    checkpoints.save(tmp_path, 2, fill, {})
    checkpoints.save(tmp_path, 4, fill, {})
    (tmp_path / "checkpoint-4" / checkpoints.MARKER).unlink()
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-2"


def test_a_checkpoint_with_a_short_file_does_not_count(tmp_path):
    checkpoints.save(tmp_path, 2, fill, {})
    checkpoints.save(tmp_path, 4, fill, {})
    (tmp_path / "checkpoint-4" / "a.bin").write_bytes(b"x" * 99)
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-2"


def test_the_newest_by_number_not_by_name(tmp_path):
    for step in (9, 10):
        checkpoints.save(tmp_path, step, fill, {})
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-10"


def test_only_two_stay(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, step, fill, {})
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    import errno

    from weft.errors import WeftError

    checkpoints.save(tmp_path, 2, fill, {})

    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WeftError, match=r"disk is full.*step 4.*checkpoint-2 is intact"):
        checkpoints.save(tmp_path, 4, full, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
