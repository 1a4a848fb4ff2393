"""What is written is there whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from weft import UsageError
from weft.files import partial_of, whole_file, whole_folder, write_text

# write a file, and die before a call, by number, that reaches the disk
DEADLY = """
import os, pathlib, signal, sys
from weft.files import write_text

left = int(sys.argv[2])

def deadly(function):
    def counted(*args):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*args)
    return counted

os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
write_text(pathlib.Path(sys.argv[1]), "new")
"""


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_replaces_the_one_of_its_name_and_its_folder_is_made(tmp_path):
    for text in ("old", "new"):
        write_text(tmp_path / "a" / "b.txt", text)
        assert (tmp_path / "a" / "b.txt").read_text() == text
    assert names(tmp_path) == ["a", "a/b.txt"]


def test_a_failure_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(OSError), whole_file(tmp_path / "a") as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("call", range(3))
def test_a_killed_process_leaves_the_old_file_or_the_new_one(call, tmp_path):
    """It dies before its first, second or third call that reaches the disk: flush, rename, flush of the names."""
    write_text(tmp_path / "a", "old")
    done = subprocess.run([sys.executable, "-c", DEADLY, str(tmp_path / "a"), str(call)])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == ("new" if call == 2 else "old")
    write_text(tmp_path / "a", "newer")
    assert names(tmp_path) == ["a"]


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"), whole_folder(tmp_path):
        pass
    assert names(tmp_path) == ["notes.txt"] and not partial_of(tmp_path).exists()


def test_a_failure_leaves_no_folder(tmp_path):
    with pytest.raises(OSError), whole_folder(tmp_path / "a" / "out") as partial:
        (partial / "half").write_text("…")
        raise OSError("disk full")
    assert names(tmp_path) == ["a"]


def test_a_folder_takes_the_place_of_an_empty_one_and_of_what_a_killed_process_left(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("…")
    assert names(tmp_path) == ["out", "out/whole"]
