"""Runs spread over processes of this machine, or over a Ray cluster.

Both take JSON in and give JSON out, and run the same function with the same number of threads, so that where a run took
place leaves no trace in its numbers. A worker that dies takes its one run with it and is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from weft.errors import UsageError, WeftError

Json = dict[str, Any]
Function = Callable[[Json, Json], Json]  # (context, task) -> row; a module-level function


class Pool(Protocol):
    """Somewhere that runs tasks."""

    def free(self) -> int:
        """How many tasks could start at once."""

    def submit(self, task: Json) -> None:
        """Start a task on a free place."""

    def next(self) -> tuple[Json, Json | None]:
        """Wait for the next finished task: (task, row), or (task, None) where its process died."""

    def close(self) -> None:
        """Stop everything, finished or not."""


def name_of(function: Function) -> str:
    """How another process finds a function: "module:name"."""
    return f"{function.__module__}:{function.__qualname__}"


def _find(name: str) -> Function:
    module, _, attribute = name.partition(":")
    found: Function = getattr(importlib.import_module(module), attribute)
    return found


def _settle(threads: int) -> None:
    """One number of threads for every library, before the first sum: it decides the last bits. And silence."""
    import gc
    import warnings

    import torch
    from tqdm import tqdm
    from transformers.utils import logging

    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process would leave behind
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    gc.freeze()  # else each collection, and there are some in every run, looks at all that was imported


def _end_with_the_first() -> None:
    """End this process with the first one, killed or not, in the middle of a run: nobody waits for it."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _serve(pipe: Connection, function: str, context: str, threads: int) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches a whole group: only the first process is to hear it
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    _settle(threads)
    run, shared = _find(function), json.loads(context)
    while True:
        try:
            task = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            pipe.send_bytes(json.dumps(run(shared, task)).encode())
        except OSError:  # whoever asked has gone
            return


def _processes() -> Any:
    """Processes that import torch once and are then forked from a clean copy; started afresh where there is no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weft.run.quiet", "torch", "peft", "datasets", "weft.run.train"])
    return context


class Processes:
    """A pool of processes on this machine.

    Args:
        function: runs one task.
        context: what every task shares.
        workers: processes at a time, at least 1.
        threads: CPU threads of each.
    """

    def __init__(self, function: Function, context: Json, workers: int, threads: int) -> None:
        self._arguments = (name_of(function), json.dumps(context), threads)
        self._workers = workers
        self._idle: list[tuple[Any, Connection]] = []
        self._busy: dict[Connection, tuple[Any, Json]] = {}

    def free(self) -> int:
        """How many tasks could start at once."""
        return self._workers - len(self._busy)

    def submit(self, task: Json) -> None:
        """Start a task on a free place."""
        process, pipe = self._idle.pop() if self._idle else self._start()
        self._busy[pipe] = (process, task)
        with contextlib.suppress(OSError):  # died while idle: `next` finds its pipe closed and says so
            pipe.send_bytes(json.dumps(task).encode())

    def _start(self) -> tuple[Any, Connection]:
        processes = _processes()
        ours, theirs = processes.Pipe()
        process = processes.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        with _threads_in_environment(self._arguments[2]):
            process.start()
        theirs.close()
        return process, ours

    def next(self) -> tuple[Json, Json | None]:
        """Wait for the next finished task: (task, row), or (task, None) where its process died."""
        pipe = wait(list(self._busy))[0]
        assert isinstance(pipe, Connection)
        process, task = self._busy.pop(pipe)
        try:
            row = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join()
            pipe.close()
            return task, None
        self._idle.append((process, pipe))
        return task, row

    def close(self) -> None:
        """Stop everything, finished or not."""
        for process, _ in self._busy.values():
            process.kill()  # it holds nothing that is worth an orderly end
        for _, pipe in self._idle:
            pipe.close()  # which an idle process takes as its end
        everything = [process for process, _ in (*self._idle, *self._busy.values())]
        self._idle, self._busy = [], {}
        for process in everything:
            process.join(timeout=10)
            process.kill()
            process.join()


@contextlib.contextmanager
def processes(function: Function, context: Json, workers: int, threads: int) -> Iterator[Processes]:
    """A pool of processes that ends with the block."""
    pool = Processes(function, context, workers, threads)
    try:
        yield pool
    finally:
        pool.close()


@contextlib.contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """Libraries that read their number of threads when they are loaded find ours, in the process that starts now."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def alone(function: Function, context: Json, task: Json, threads: int) -> Json | None:
    """One task in a fresh process of its own; None where it died."""
    pool = Processes(function, context, 1, threads)
    try:
        pool.submit(task)
        return pool.next()[1]
    finally:
        pool.close()


def check_ray(address: str) -> None:
    """Refuse before any work where Ray is not installed, or nobody listens (Ray itself tries for minutes)."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs the extra `weft[ray]`: pip install 'weft[ray]'")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise WeftError(f"no Ray cluster answers at --ray {address!r}: {error}") from error
    elif address not in ("auto", "local"):
        raise UsageError(f"--ray {address!r} is not an address; give HOST:PORT, ray://HOST:PORT, auto or local")


class Ray:
    """A pool on a Ray cluster; every node needs weft, the model and the data at the same paths.

    Args:
        address: of the cluster, "auto" for the one that this machine belongs to, "local" to start one here.
    """

    def __init__(self, address: str, function: Function, context: Json, threads: int) -> None:
        check_ray(address)
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
                raise WeftError(f"no Ray cluster answers at --ray {address!r}: {reason}") from error
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._places = max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1) / (1 if gpus else threads)))
        self._remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_once)
        self._arguments = (name_of(function), json.dumps(context), threads)
        self._busy: dict[Any, Json] = {}

    def free(self) -> int:
        """How many tasks could start at once."""
        return self._places - len(self._busy)

    def submit(self, task: Json) -> None:
        """Start a task on a free place."""
        self._busy[self._remote.remote(*self._arguments, json.dumps(task))] = task

    def next(self) -> tuple[Json, Json | None]:
        """Wait for the next finished task: (task, row), or (task, None) where its process died."""
        (finished,), _ = self._ray.wait(list(self._busy), num_returns=1)
        task = self._busy.pop(finished)
        try:
            return task, json.loads(self._ray.get(finished))
        except self._ray.exceptions.RayError:
            return task, None

    def close(self) -> None:
        """Stop everything, finished or not."""
        for running in self._busy:
            self._ray.cancel(running, force=True)
        self._busy = {}
        if self._started:
            self._ray.shutdown()


def _once(function: str, context: str, threads: int, task: str) -> str:
    """One task in a Ray worker."""
    _settle(threads)
    return json.dumps(_find(function)(json.loads(context), json.loads(task)))
