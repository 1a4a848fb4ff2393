import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import tiny


@pytest.fixture
def weft(capsys):
    """Run one command line in this process: exit code, standard output, standard error."""
    from weft.cli.main import run

    def call(*words: object) -> tuple[int, str, str]:
        before = dict(os.environ)
        capsys.readouterr()
        try:
            code = run([str(word) for word in words])
        finally:
            os.environ.clear()
            os.environ.update(before)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refuse(weft):
    """Run a command line that must fail: with this code, one sentence on standard error, these words in it."""

    def call(code: int, *words: object, says: tuple[str, ...]) -> str:
        got, _, err = weft(*words)
        assert got == code, err
        assert err.count("\n") == 1 and err.startswith("weft: "), err
        for part in says:
            assert part in err, (part, err)
        return err

    return call


@pytest.fixture
def spawn():
    """Start weft in a process of its own; killed at the end of the test if it still runs.

    With `whole` it is `python -m weft` from the interpreter on, else forked from one that has the libraries.
    """
    with contextlib.ExitStack() as stack:

        def call(*words: object, whole: bool = False, **options) -> subprocess.Popen | forked.Process:
            command, env = ["-m", "weft", *[str(word) for word in words]], tiny.environment()
            if not whole:
                return stack.enter_context(forked.popen(command, env=env, **options))
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                # a shell's background job hands down that Ctrl-C is ignored; these are to hear it
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                **options,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield call


@pytest.fixture
def adapt_words(llama, corpus):
    """The words of a small, quick run."""

    def words(output: Path, *more: object, method: str = "peft:lora", steps: int = 6) -> list[str]:
        basic = ["adapt", "--model", llama, "--data", corpus, "--method", method, "--output", output]
        quick = ["--max-steps", steps, "--batch-size", 2, "--max-length", 32, "--learning-rate", "0.01"]
        return [str(word) for word in [*basic, *quick, *more]]

    return words


@pytest.fixture
def gone_on(weft, tmp_path, monkeypatch):
    """Run a command whole, and again with a stop behind its second checkpoint: both come to the same, bit for bit.

    It is given the command's words by output folder; the two folders come back.
    """

    def call(words: Callable[[Path], list]) -> tuple[Path, Path]:
        from weft.run import checkpoints

        whole, other = tmp_path / "whole", tmp_path / "out"
        assert weft(*words(whole))[0] == 0
        saved, real = [], checkpoints.save

        def dying(*given):
            made = real(*given)
            saved.append(made)
            if len(saved) == 2:
                raise KeyboardInterrupt
            return made

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "save", dying)
            assert weft(*words(other))[0] == 1
        assert not (other / "result.json").exists()
        assert weft(*words(other))[0] == 0
        (weights,) = whole.glob("*model.safetensors")
        assert weights.read_bytes() == (other / weights.name).read_bytes()
        short = [tiny.result(each) for each in (whole, other)]
        assert short[0]["validation"] == short[1]["validation"] and short[0]["test"] == short[1]["test"]
        return whole, other

    return call
