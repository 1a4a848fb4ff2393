"""Make a model smaller: weft compress --model M --method svd_llm --keep 0.75 --data D --output OUT

A method's own options appear in `weft compress --method svd_llm --help`. Every option is also a key of a YAML run file.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weft import registry
from weft.cli import _flags
from weft.errors import WeftError
from weft.run import compress as _compress
from weft.run.adapt import RUN_FILE, read_run_file

if TYPE_CHECKING:
    from rich.console import Console

    from weft.compress._engine import Row

_DOC = """Make a model smaller.

[bold]weft compress --model builtin:pycode --method svd_llm --keep 0.75 --data builtin:stdlib --output OUT[/bold]

Its linear layers are replaced by structured ones that store less; OUT is a model as any other, to be loaded with weft
imported. Every option is also a key of a YAML run file (--config); OUT/run.yaml repeats the run. A run that was killed
goes on when the same command is started again."""

_LINES = 20  # where there is no terminal, about this many lines a run
_SHOWN = 10  # layers in the table at the end
_NAMED = 4  # of the weights that stay


def build(argv: list[str]) -> Callable[..., None]:
    """The command for these words: with the options of the method that they name, in a flag or in their run file."""
    parameters = [
        _flags.own("config", str | None, "YAML run file; flags override it.", "--config"),
        _flags.own("plan", bool | None, "Show each layer's size and the time to expect; load no weights.", "--plan"),
        _flags.own(
            "resume",
            bool | None,
            "Go on from the layers that are finished, or start over; by default the same unfinished run goes on.",
            "--resume/--no-resume",
        ),
    ]
    parameters += [_flags.parameter(option, "What") for option in _compress.run_options()]
    method, doc = _flags.method_of(argv), _DOC
    if method is None:
        doc += "\n\nA method's own options: [bold]weft compress --method NAME --help[/bold]"
    else:
        keys = _compress.method_keys_of(method)
        parameters += [
            _flags.parameter(option, f"Options of {method}", keys[option.name])
            for option in _compress.method_options(method)
        ]
    return _flags.function(_run, parameters, doc)


def _run(config: str | None, plan: bool | None, resume: bool | None, **flags: Any) -> None:
    given = {**(read_run_file(config) if config else {})}
    given |= {key: value for key, value in flags.items() if value is not None}
    run = _compress.request({key: value for key, value in given.items() if value is not None})
    state = "fresh" if plan else _compress.settle_output(run, resume)
    console = _console()
    if state == "finished":
        report = json.loads((run.output / _compress.REPORT_FILE).read_text(encoding="utf-8"))
        console.print(last_line(run, report), highlight=False, soft_wrap=True)
        return
    if run.options.threads:
        import torch

        torch.set_num_threads(run.options.threads)
    if _compress.waits(run) and not plan:
        console.print(last_line(run, finished(run, console)), highlight=False, soft_wrap=True)
        return
    display = None
    try:
        model = _compress.skeleton(run)
        shape = _compress.outline(run, model)
        found = _compress.calibration(run, model, shape, lambda text: console.print(text, highlight=False))
        for line in outline_lines(run, model, shape, found):
            console.print(line, highlight=False, soft_wrap=True)
        if plan:
            console.print(plan_table(run, shape))
            return
        with Progress(console, len(shape.layers)) as display:
            report = _compress.run_compress(run, shape, found, display)
    except KeyboardInterrupt:
        done = _compress.finished_layers(run)
        if plan or display is None or not done:
            raise WeftError("interrupted before the first layer; the same command starts again") from None
        raise WeftError(
            f"interrupted with {done} of {display.total} layers finished; go on with: {resume_command(run)}"
        ) from None
    console.print(end_table(report))
    if run.train or run.options.then:
        report = finished(run, console)
    console.print(last_line(run, report), highlight=False, soft_wrap=True)


def finished(run: _compress.Request, console: Console) -> dict[str, Any]:
    """The report after training and recovery; interrupted, it says how to go on."""
    from weft.run.loop import Interrupted

    try:
        return _compress.run_after(run, lambda text: console.print(text, highlight=False, soft_wrap=True))
    except Interrupted as stopped:
        raise Interrupted(stopped.step, stopped.checkpoint, resume_command(run)) from None
    except KeyboardInterrupt:
        raise WeftError(f"interrupted; the compressed model is kept; go on with: {resume_command(run)}") from None


def _console() -> Console:
    """Standard output; where that is no terminal, wide enough for a table's lines to stay whole."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def resume_command(run: _compress.Request) -> str:
    """The line that goes on with an interrupted run."""
    import shlex

    return f"weft compress --config {shlex.quote(str(run.work / RUN_FILE))}"


def outline_lines(run: _compress.Request, model: Any, shape: _compress.Outline, found: dict[str, Any]) -> list[str]:
    """What a run will touch, on what data, and how long it may take."""
    from weft.report.quantities import duration, size
    from weft.run.operations import operations, seconds_of

    many, bits = sum(len(layer.parts) for layer in shape.layers), sum(layer.bits for layer in shape.layers)
    knob = registry.card(run.method).knob
    lines = [
        f"{run.method} on {run.options.model}: {many:,} {'matrix' if many == 1 else 'matrices'} of {size(bits / 8)} in "
        f"all, {knob} {getattr(run.config, knob):g}"
    ]
    if shape.left:
        first = [name.removesuffix(".weight") for name in shape.left][:_NAMED]
        rest = f" and {len(shape.left) - _NAMED} more" if len(shape.left) > _NAMED else ""
        lines.append(f"left as they are: {', '.join(first)}{rest}")
    for name, each in found.items():
        weight = f", weight {each.weight:g}" if len(found) > 1 else ""
        lines.append(f"calibration: {each.sequences} sequences of {name}, {each.tokens:,} tokens{weight}")
    count = operations(shape, model, found)
    least = duration(seconds_of(count, next(model.parameters()).dtype))
    what = (
        "products and eigenvectors" if count.eigen is not None else f"products, without what {run.method} itself does"
    )
    lines.append(f"expected: at least {least}, of {what}, by the speed of small ones on this machine")
    return lines


def plan_table(run: _compress.Request, shape: _compress.Outline) -> Any:
    """One line a layer: what it is, and what it will be where that is known before any work."""
    from rich.table import Table

    from weft.report.quantities import NOTHING, size

    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "shape", "kind", "size", "bytes", "kept"):
        table.add_column(heading, justify="left" if heading in ("layer", "kind") else "right", no_wrap=True)
    if shape.rows is None:
        table.caption = f"allocate={run.config.allocate}: sizes follow from what is computed on the way"
        for layer in shape.layers:
            before = size(layer.bits / 8)
            table.add_row(layer.name, f"{layer.shape[0]} × {layer.shape[1]}", NOTHING, NOTHING, before, NOTHING)
        return table
    for row in shape.rows:
        change = f"{size(row.dense / 8)} → {size(row.bits / 8)}"
        kept = f"{row.bits / row.dense:.3f}"
        rank = NOTHING if row.size is None else str(row.size)
        table.add_row(row.name, f"{row.shape[0]} × {row.shape[1]}", row.kind, rank, change, kept)
    before, after = (sum(getattr(row, name) for row in shape.rows) for name in ("dense", "bits"))
    table.add_row("all", "", "", "", f"{size(before / 8)} → {size(after / 8)}", f"{after / before:.3f}")
    return table


def end_table(report: dict[str, Any]) -> Any:
    """The layers that lost most; those that stay have nothing to lose."""
    from rich.table import Table

    from weft.report.quantities import number

    replaced = [row for row in report["layers"] if row["size"] is not None]
    worst = heapq.nlargest(_SHOWN, replaced, key=lambda row: -1.0 if row["error"] is None else row["error"])
    table = Table(box=None, pad_edge=False)
    first = f"{len(worst)} of {len(replaced)} layers, largest errors"
    for heading in (first, "shape", "kind", "size", "kept", "error"):
        table.add_column(heading, justify="left" if heading in (first, "kind") else "right")
    for row in worst:
        out, in_ = row["shape"]
        kept = f"{row['bits'] / row['dense']:.3f}"
        table.add_row(row["name"], f"{out} × {in_}", row["kind"], str(row["size"]), kept, number(row["error"], 3))
    return table


def last_line(run: _compress.Request, report: dict[str, Any]) -> str:
    """Share kept, bytes before and after, seconds, where it is."""
    from weft.report.quantities import duration, size

    kept, files = report["keep"], report["file_bytes"]
    replaced = any(layer["size"] is not None for layer in report["layers"])
    share = f"kept {kept['measured']:.4f} of the matrices' bits"
    if kept["promised"] is None:
        share += f", {report['reads']:.4f} of them read for a token"
    else:
        share += f" ({kept['promised']:g} asked)"
    if not replaced:
        share = "nothing replaced"
    if "training" in report:
        loss = report["training"]["validation"].get("loss")
        share += f"; trained for {report['training']['steps']:,} steps"
        share += "" if loss is None else f", validation loss {loss:.4f}"
    return (
        f"{share}; weight files {size(files['before'])} → {size(files['after'])}; {duration(report['seconds'])}; "
        f"saved to {run.output}"
    )


class Progress:
    """A bar over all layers on a terminal, a line now and then elsewhere; what `weft.compress` calls as observer."""

    def __init__(self, console: Console, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console, self.total = console, total
        self.done = self.rows = 0
        self.first: tuple[int, float] | None = None  # layers that were there at the start, and when that was
        self.last = ""
        self.bar: Bar | None = None
        if console.is_terminal:
            columns = (TextColumn("layers"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
            self.task = self.bar.add_task("layers", total=total, text="loading the model")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, stage: str, done: int, of: int, row: Row | None) -> None:
        """One step of the engine: it counts the layers of what it does at once, all of the model's or a block's."""
        if row is not None:
            self.rows += 1
            error = "" if row.error is None or row.size is None else f", error {row.error:.3g}"
            name = row.name if self.bar is None else ".".join(row.name.split(".")[-2:])
            self.last = f"  {name}: {row.bits / max(row.dense, 1):.3f} of its bits{error}"
        else:
            self.done = self.rows + done
            self.first = self.first or (self.done, time.perf_counter())
        if self.bar is not None:
            self.bar.update(self.task, completed=max(self.done, self.rows), text=f"{stage}{self.last}")
        elif stage == "factorising" and (self.done % max(1, self.total // _LINES) == 0 or self.done == self.total):
            line = f"layer {self.done}/{self.total}  {self._left():,.0f} s left{self.last}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def _left(self) -> float:
        assert self.first is not None
        before, started = self.first
        return (time.perf_counter() - started) / max(self.done - before, 1) * (self.total - self.done)
