"""The report of a stream of tasks: the matrix of scores as a heat map, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.markup import escape
from rich.table import Table

from weft.errors import UsageError
from weft.files import write_text
from weft.report import quantities
from weft.report.quantities import NOTHING
from weft.report.study import ACCURACY, LOSS, Metric, Row
from weft.report.template import page, plain, short
from weft.run.adapt import RUN_FILE
from weft.run.compare import commit, hardware, versions
from weft.run.stream import RESULT_FILE, TASKS_FILE

# What summary() found, by its key: what it is called here, what it means, and whether it is a change.
SUMMARY = {
    "last": ("in the end", "mean over tasks after the last one", False),
    "average": ("on average", "mean over what was learned so far, over all tasks", False),
    "learned": ("when learned", "mean over tasks, each right after its own training", False),
    "forgetting": ("forgetting", "what earlier tasks have lost since their best", True),
    "backward_transfer": ("backward transfer", "what earlier tasks have gained since they were learned", True),
    "forward_transfer": ("forward transfer", "what a task has gained before it was trained", True),
}


def read(folder: Path) -> Row:
    """What stream.json says. Raises UsageError where it cannot be read."""
    try:
        return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(folder)!r} holds no finished stream: {RESULT_FILE} cannot be read") from error


def terminal_table(folder: Path) -> Table:
    """The matrix, a row for each state of the model and a column for each task, with the summary beneath.

    Args:
        folder: the stream's output folder.

    Raises:
        UsageError: it holds no finished stream.
    """
    found = read(folder)
    metric = _metric(found)
    notes = [f"{name}: {text}" for name, text, _ in _summary(found)]
    table = Table(
        title=f"{metric.key} after each task (rows) on each task (columns)", title_justify="left",
        caption=escape("\n".join(notes)), caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("after", no_wrap=True)
    for name in found["tasks"]:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for number, (name, row) in enumerate(zip(_states(found), found["matrix"], strict=True)):
        cells = [metric.show(score) for score in row]
        shown = [cell if place < number else f"[dim]{cell}[/dim]" for place, cell in enumerate(cells)]
        table.add_row(escape(name), *shown)
    return table


def html(folder: Path, out: Path, command: str) -> None:
    """Write the report of a finished stream.

    Args:
        folder: the stream's output folder.
        out: the HTML file; written whole or not at all.
        command: that repeats the stream.

    Raises UsageError where the folder holds no finished stream.
    """
    found = read(folder)
    metric = _metric(found)
    run, tasks = ((folder / name).read_text(encoding="utf-8") for name in (RUN_FILE, TASKS_FILE))
    text = page(
        "stream.html.j2",
        "stream.js",
        {
            "tasks": found["tasks"],
            "states": _states(found),
            "matrix": found["matrix"],
            "shown": [[metric.show(score) for score in row] for row in found["matrix"]],
            "better": "higher" if metric is ACCURACY else "lower",
        },
        verb="adapt",
        title=f"{found['method']} on {quantities.plural(len(found['tasks']), 'task')} in a row",
        verdict=_verdict(found, metric),
        metric=metric,
        facts=_facts(found),
        summary=_summary(found),
        states=_states(found),
        rows=[[metric.show(score) for score in row] for row in found["matrix"]],
        tasks=_tasks(found, metric, yaml.safe_load(tasks)["tasks"]),
        command=command,
        run=run,
        tasks_file=tasks,
        head={"versions": versions(), "hardware": hardware(), "commit": commit()},
    )
    write_text(out, text)


def _metric(found: Row) -> Metric:
    return ACCURACY if found["metric"] == "accuracy" else LOSS


def _states(found: Row) -> list[str]:
    """What the rows of the matrix are called."""
    return ["the start", *found["tasks"]]


def _change(metric: Metric, value: float) -> str:
    scaled = value * 100 if metric is ACCURACY else value
    return quantities.change(scaled, 1 if metric is ACCURACY else 3) + (" points" if metric is ACCURACY else " nats")


def _summary(found: Row) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each number of the summary."""
    metric = _metric(found)
    return [
        (name, _change(metric, found[key]) if is_change else metric.show(found[key]), meaning)
        for key, (name, meaning, is_change) in SUMMARY.items()
    ]


def _verdict(found: Row, metric: Metric) -> str:
    """What came out, in one sentence."""
    lost = _change(metric, found["forgetting"]).lstrip("+−")
    word = "lost" if found["forgetting"] >= 0 else "gained"
    return (
        f"After {quantities.plural(len(found['tasks']), 'task')} the mean {metric.key} is "
        f"{metric.show(found['last'])}; the tasks before the last have {word} {lost} since their best."
    )


def _facts(found: Row) -> list[tuple[str, str]]:
    runs = list(found["runs"].values())
    facts = {
        "Model": plain(short(found["model"])),
        "Trained": f"{quantities.count(runs[0]['trainable'])} parameters a task",
        "Steps": quantities.count(sum(run["steps"] for run in runs)),
        "Time to train": quantities.duration(sum(run["seconds"] for run in runs)),
    }
    return [(term, text) for term, text in facts.items() if text != NOTHING]


def _tasks(found: Row, metric: Metric, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of the table of tasks each."""
    matrix, rows = found["matrix"], []
    for place, (name, split, entry) in enumerate(zip(found["tasks"], found["splits"], entries, strict=True)):
        lost = found["forgotten"][place] if place < len(found["forgotten"]) else None
        ranks = list(found["runs"][name]["ranks"].values())
        rows.append(
            {
                "name": name,
                "data": short(entry["data"]),
                "split": split,
                "start": metric.show(matrix[0][place]),
                "learned": metric.show(matrix[place + 1][place]),
                "last": metric.show(matrix[-1][place]),
                "lost": NOTHING if lost is None else _change(metric, lost),
                "rank": quantities.number(sum(ranks) / len(ranks), 3) if ranks else NOTHING,
                "steps": quantities.count(found["runs"][name]["steps"]),
            }
        )
    return rows
