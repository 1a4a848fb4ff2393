"""Processes that are new to weft but not to the libraries: forked from one that has imported these, and nothing else.

Importing torch, transformers and peft takes six seconds of a core, most of what a short process costs. What is asked
of such a process in a test is what weft does in it, from its own import on. Where the libraries' import is what is
tried, or what a user's command says on standard error while they load, the process is started as any other; where
the same thing is done many times over, weft is among what it begins with.

    with forked.popen(["-m", "weft", "methods"], env=...) as process: ...     the words that would follow `python`
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TORCH = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "scipy.optimize")
TORCH += ("torchao", "accelerate", "sklearn.metrics", "huggingface_hub.hf_api", "tokenizers", "regex", "jinja2")
ALL = (*TORCH, "transformers.trainer", "peft", "datasets")
WEFT = (*ALL, "weft.run.train", "weft.run.compress", "weft.adapters", "weft.compress._engine")


class Process:
    """What tests use of subprocess.Popen. Standard output is a pipe, standard error a file, both of text."""

    def __init__(self, words: Sequence[str], pid: int, told: Any, stdout: Any, stderr: Any) -> None:
        self.args, self.pid, self.stdout, self.stderr = words, pid, stdout, stderr
        self.returncode: int | None = None
        self._told = told

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.kill()
        self.wait()
        for stream in (self.stdout, self.stderr, self._told):
            stream.close()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; a negative one is the signal that it died of. After `timeout` seconds it is killed."""
        if self.returncode is None:
            with self._killed_after(timeout):
                self.returncode = int(self._told.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for it; what is left of standard output, and standard error."""
        with self._killed_after(timeout):
            out = self.stdout.read()
            self.wait()
        self.stderr.seek(0)
        return out, self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @contextlib.contextmanager
    def _killed_after(self, seconds: float | None):
        if seconds is None:
            yield
            return
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def popen(
    words: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    start_new_session: bool = False,
    libraries: tuple[str, ...] = ALL,
) -> Process | subprocess.Popen:
    """Start `python WORDS`. The environment is set before weft is imported, but after the libraries were."""
    words, env = [str(word) for word in words], dict(os.environ if env is None else env)
    if not hasattr(os, "fork"):
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *words], env=env, cwd=cwd, **pipes)
    request = {"words": words, "env": env, "cwd": str(cwd or Path.cwd()), "session": start_new_session}
    told, tells = socket.socketpair()
    readable, writable = os.pipe()
    stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
    with tells:
        _ask(_server(libraries), request, [writable, stderr.fileno(), tells.fileno()])
    os.close(writable)
    answers = told.makefile("r")
    told.close()
    pid = answers.readline()
    assert pid, f"the process that has imported {', '.join(libraries)} is gone"
    return Process(words, int(pid), answers, os.fdopen(readable), stderr)


def run(words: Sequence[object], timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess:
    """Run `python WORDS` to its end; after `timeout` seconds it is killed."""
    with popen(words, **options) as process:
        texts = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, *texts)


def together(several: Sequence[Sequence[object]], timeout: float, **options: Any) -> None:
    """Run several at the same time, all of which must end well.

    Where one does not, or after `timeout` seconds, the others are stopped, and what each wrote is told, with where it
    was at that time: one that waits for another says nothing of its own.
    """
    last = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(popen(words, **options)) for words in several]
        while None in (codes := [process.poll() for process in started]):
            if any(codes) or time.monotonic() > last:
                for process in started:
                    process.send_signal(signal.SIGUSR1)
                break
            time.sleep(0.05)
        told = [process.communicate()[1] for process in started]
    wrong = [f"{p.args} ended with {p.returncode}:\n{text}" for p, text in zip(started, told, strict=True)]
    assert not any(process.returncode for process in started), "\n".join(wrong)


_started: list[subprocess.Popen] = []


@functools.cache
def _server(libraries: tuple[str, ...]) -> socket.socket:
    """To the process with the libraries, which ends when this one does; forked from the one with most of them."""
    ours, theirs = socket.socketpair()
    fewer = max((some for some in (TORCH, ALL) if set(some) < set(libraries)), key=len, default=None)
    with theirs:
        if fewer:
            _ask(_server(fewer), {"libraries": libraries}, [theirs.fileno()])
        else:
            command = [sys.executable, __file__, str(theirs.fileno()), *libraries]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            _started.append(subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], **streams))
    return ours


def _ask(server: socket.socket, request: dict[str, Any], files: list[int]) -> None:
    server.sendall(json.dumps(request).encode() + b"\n")
    socket.send_fds(server, [b"!"], files)


def _load(libraries: Sequence[str]) -> None:
    for library in libraries:
        with contextlib.suppress(ImportError):  # what is not installed is not missed
            importlib.import_module(library)
    if "transformers" in sys.modules:
        with contextlib.suppress(ImportError):  # a process's first model makes it compile a thousand expressions
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping

            get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()  # else each collection, and trainers make one after every run, looks at all that was imported


def _serve(requests: socket.socket, libraries: Sequence[str]) -> list[str]:
    """Fork for every request, until there are no more; returns in each forked process, with its words."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _load(libraries)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for a process are not waited for themselves
    lines = requests.makefile("rb", buffering=0)
    while line := lines.readline():
        _, files, *_ = socket.recv_fds(requests, 1, 3)
        request = json.loads(line)
        if os.fork() == 0:
            os.close(requests.detach())
            if "libraries" in request:
                return _serve(socket.socket(fileno=files[0]), request["libraries"])
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            out, err, tells = files
            pid = os.fork()
            if pid == 0:
                os.close(tells)
                return _become(request, out, err)
            os.close(out)
            os.close(err)
            os.write(tells, f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(tells, f"{code}\n".encode())
            os._exit(0)
        for file in files:
            os.close(file)
    sys.exit()


def _become(request: dict[str, Any], out: int, err: int) -> list[str]:
    """Take on what a new process is given."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    for file, number in ((out, 1), (err, 2)):
        os.dup2(file, number)
        os.close(file)
    faulthandler.register(signal.SIGUSR1, chain=True)  # says where it is, and ends
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request["words"]


def _run(words: list[str]) -> None:
    """What `python WORDS` does."""
    found = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = words
    if first == "-m":
        sys.path[:0], sys.argv = [os.getcwd(), *found], rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[:0], sys.argv = ["", *found], ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[:0], sys.argv = [str(Path(first).parent), *found], words
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))
    _run(_serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]))
