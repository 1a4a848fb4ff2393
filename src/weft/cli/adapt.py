"""Train an adapter on your data: weft adapt --model M --data D --method sora --output OUT

A method's own options appear in `weft adapt --method sora --help`. Every option is also a key of a YAML run file.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weft.cli import _flags
from weft.errors import UsageError, WeftError
from weft.run import adapt as _adapt
from weft.run.evidence import AUTO, settled
from weft.run.options import Option

_DOC = """Train an adapter on your data.

[bold]weft adapt --model builtin:pycode --data builtin:pydocs --method sora --output OUT[/bold]

Every option is also a key of a YAML run file (--config); OUT/run.yaml repeats the run. A run that was killed goes on
when the same command is started again."""


def build(argv: list[str]) -> Callable[..., None]:
    """The command for these words: with the options of the method that they name, in a flag or in their run file."""
    parameters = [
        _flags.own("config", str | None, "YAML run file; flags override it.", "--config"),
        _flags.own("dry_run", bool | None, "Show modules, parameters and memory; load no weights.", "--dry-run"),
        _flags.resume(),
        _flags.own("stream", str | None, "YAML file of tasks, to be trained one after another.", "--stream"),
    ]
    common = _adapt.run_options()
    parameters += [_flags.parameter(option, panel(option)) for option in common]
    method = _flags.method_of(argv)
    doc = _DOC
    if method in (None, AUTO):
        doc += "\n\nA method's own options: [bold]weft adapt --method NAME --help[/bold]"
    else:
        parameters += method_parameters(method, f"Options of {method}")
    return _flags.function(_run, parameters, doc)


def method_parameters(method: str, heading: str) -> list[inspect.Parameter]:
    """What typer reads of a method's own options."""
    from weft.run.methods import method_options

    keys = _adapt.method_keys_of(method)
    return [_flags.parameter(option, heading, keys[option.name]) for option in method_options(method)]


def panel(option: Option) -> str:
    """Under which heading the help lists an option of every run."""
    return "What" if option.name in _adapt.AdaptOptions.__dataclass_fields__ else "Training"


def _run(config: str | None, dry_run: bool | None, resume: bool | None, stream: str | None, **flags: Any) -> None:
    given = {**(_adapt.read_run_file(config) if config else {})}
    given |= {key: value for key, value in flags.items() if value is not None}
    given = {key: value for key, value in given.items() if value is not None}
    given, why = settled(given, stream, resume)
    for line in why if int(os.environ.get("RANK", "0")) == 0 else ():
        print(line, flush=True)
    if stream is not None:
        go_through(given, stream, bool(dry_run), resume)
    else:
        go(given, bool(dry_run), resume, "adapt --config")


def go(given: dict[str, Any], dry_run: bool, resume: bool | None, verb: str) -> None:
    """Do a run, given by the keys of a run file; `verb` is what a run file is given to, to go on with it."""
    request = _adapt.request(given)
    if not dry_run and not request.options.output:
        raise UsageError("--output is missing: a folder for the adapter, checkpoints, metrics and the run file")
    going_on = False if dry_run else _adapt.settle_output(request, resume)
    first = int(os.environ.get("RANK", "0")) == 0
    say = (lambda text: print(text, flush=True)) if first else (lambda text: None)
    if _launched_alone(os.environ):
        say(
            "accelerate started one process only: with --cpu it starts several under mpirun alone; "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N starts N by torchrun"
        )
    rows = _adapt.read_rows(request.options)
    outline = _adapt.outline(request, rows)
    for line in outline_lines(request, outline, whole=dry_run):
        say(line)
    if dry_run:
        return
    from weft.run.loop import Interrupted

    try:
        result = _adapt.run_adapt(request, rows, going_on, say)
    except Interrupted as stopped:
        raise Interrupted(stopped.step, stopped.checkpoint, resume_command(request, verb)) from None
    except KeyboardInterrupt:  # beside the steps: while loading, or while the result is evaluated and written
        raise _interrupted_beside(request, verb) from None
    for split in ("validation", "test"):
        if result[split]:
            say(f"{split}: " + ", ".join(f"{name} {_figure(value)}" for name, value in result[split].items()))
    say(f"saved to {request.options.output}")
    if first:
        from weft.report import training

        output = Path(str(request.options.output))
        training.html(output, output / "report.html", f"weft {verb} {shlex.quote(f'{output}/{_adapt.RUN_FILE}')}")
        say(f"report: {output / 'report.html'}")


def go_through(given: dict[str, Any], tasks: str, dry_run: bool, resume: bool | None) -> None:
    """Do a stream: a run's options by key of a run file, and the file of its tasks."""
    from weft.run import stream as _stream

    if not dry_run and not given.get("output"):
        raise UsageError("--output is missing: a folder for the tasks, their scores and the report")
    stream = _stream.request(given, tasks)
    first = stream.tasks[0]
    for line in outline_lines(first.run, _adapt.outline(first.run, first.rows), whole=dry_run):
        print(line, flush=True)
    if dry_run:
        for task in stream.tasks:
            scored = len(getattr(task.rows, task.split))
            print(f"task {task.name}: {len(task.rows.train):,} rows to train on, {scored:,} of {task.split}")
        return
    _stream.settle_output(stream, resume)
    files = [shlex.quote(str(stream.output / name)) for name in (_adapt.RUN_FILE, _stream.TASKS_FILE)]
    again = f"weft adapt --config {files[0]} --stream {files[1]}"
    from weft.run.loop import Interrupted

    try:
        _stream.run_stream(stream, lambda text: print(text, flush=True))
    except Interrupted as stopped:
        raise Interrupted(stopped.step, stopped.checkpoint, again) from None
    except KeyboardInterrupt:  # beside the steps of a task
        raise WeftError(f"interrupted; go on with: {again}") from None
    import rich

    from weft.report import stream as report

    rich.print(report.terminal_table(stream.output))
    report.html(stream.output, stream.output / "report.html", again)
    print(f"report: {stream.output / 'report.html'}")


def _interrupted_beside(request: _adapt.Request, verb: str) -> WeftError:
    from weft.run import checkpoints
    from weft.run.loop import Interrupted

    newest = checkpoints.newest(Path(str(request.options.output)))
    if newest is None:
        return WeftError("interrupted before the first checkpoint; the same command starts again")
    return Interrupted(int(newest.name.rpartition("-")[2]), newest, resume_command(request, verb))


def _launched_alone(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu` was asked for several processes and, without a word, started one.

    It then names a meeting point for them, but nothing that tells the processes apart.
    """
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    asked = environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in environment
    return asked and not any(name in environment for name in ranks)


def resume_command(request: _adapt.Request, verb: str) -> str:
    """The line that goes on with an interrupted run."""
    file = shlex.quote(f"{request.options.output}/{_adapt.RUN_FILE}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    again = f" (launched with {processes} processes again)" if processes > 1 else ""
    return f"weft {verb} {file} --resume{again}"


def outline_lines(request: _adapt.Request, outline: _adapt.Outline, whole: bool) -> list[str]:
    """What a run will touch, in words; `whole` names every module and the parts of the memory."""
    share = outline.trainable / max(outline.total, 1)
    lines = [
        f"{request.method.name} on {request.options.model}: {outline.trainable:,} trainable parameters beside "
        f"{outline.total:,} ({share:.2%}), {len(outline.modules)} modules"
    ]
    if whole:
        lines += [f"  {name}" for name in outline.modules]
        if request.method.options:
            lines.append("options: " + json.dumps(request.method.options, default=str))
        lines.append(f"estimated memory: {_bytes(sum(outline.memory.values()))} a process")
        lines += [f"  {name}: {_bytes(size)}" for name, size in outline.memory.items()]
    return lines


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
