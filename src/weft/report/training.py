"""The report of one training run: what came out, what it cost, and how it went.

Everything is read from the run's folder, which may hold a run that is still under way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from weft.errors import UsageError
from weft.files import write_text
from weft.report import quantities
from weft.report.page import curve
from weft.report.quantities import NOTHING, finite
from weft.report.study import Row, headline
from weft.report.template import page, plain, short
from weft.run.adapt import RESULT_FILE, RUN_FILE
from weft.run.compare import commit, hardware, versions
from weft.run.loop import METRICS
from weft.run.models import from_scratch

_DRAWN = ("loss", "learning_rate")  # columns of metrics.jsonl, beside the speed


def html(folder: Path, out: Path, command: str) -> None:
    """Write the report of a run.

    Args:
        folder: the run's output folder.
        out: the HTML file; written whole or not at all.
        command: that repeats the run.

    Raises UsageError where the folder holds no run.
    """
    try:
        run = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{str(folder)!r} holds no run: {RUN_FILE} cannot be read") from error
    result = _json(folder / RESULT_FILE)
    rows = _rows(folder / METRICS)
    unit = _unit(rows)
    text = page(
        "training.html.j2",
        "training.js",
        {"figures": {key: _lines(rows, key) for key in (*_DRAWN, f"{unit}_per_second")}},
        unit=unit,
        verb="pretrain" if from_scratch(str(run["model"])) else "adapt",
        title=f"{_method(run)} on {short(run['data'])}",
        verdict=_verdict(run, result, rows),
        facts=_facts(run, result, rows),
        data_report=result.get("data", {}).get("notes", []),
        command=command,
        run=yaml.safe_dump(run, sort_keys=False, allow_unicode=True),
        head={"versions": versions(), "hardware": hardware(), "commit": commit()},
    )
    write_text(out, text)


def _json(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _rows(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _unit(rows: list[Row]) -> str:
    """What the run's speed counts."""
    return "images" if any("images_per_second" in row for row in rows) else "tokens"


def _method(run: Row) -> str:
    return f"{run['method']}@{run['optimizer']}" if run.get("optimizer") else str(run["method"])


def _verdict(run: Row, result: Row, rows: list[Row]) -> str:
    """What came out, in one sentence."""
    metric = headline([{name.removeprefix("eval_"): value for name, value in row.items()} for row in rows])
    steps = result.get("steps") or max((row["step"] for row in rows), default=0)
    scores = {"validation": result.get("validation") or {}, "test": result.get("test") or {}}
    shown = []
    for split, score in scores.items():
        value = finite(score.get(metric.key))
        if value is not None:
            unit = "" if metric.unit in ("%", "") else f" {metric.unit}"
            also = f", perplexity {score['perplexity']:.4g}" if finite(score.get("perplexity")) else ""
            shown.append(f"{metric.show(value)}{unit} on the {split} split{also}")
    if not shown:
        return f"{_method(run)} is at step {steps}."
    return f"After {quantities.plural(steps, 'step')}: {metric.name.split()[1]} " + "; ".join(shown) + "."


def _facts(run: Row, result: Row, rows: list[Row]) -> list[tuple[str, str]]:
    newest: Row = {}
    for row in rows:
        newest |= {key: value for key, value in row.items() if value is not None}
    unit = _unit(rows)
    speed = finite(newest.get(f"{unit}_per_second"))
    facts = {
        "Model": plain(run["model"]),
        "Data": plain(run["data"]),
        "Trained": f"{quantities.count(result.get('trainable'))} parameters" if result else NOTHING,
        "Optimiser's state": quantities.size(result.get("optimizer_bytes")),
        "Result": quantities.size(result.get("file_bytes")),
        f"{unit.capitalize()} a second": quantities.count(speed),
        "Memory": quantities.size(newest.get("memory_bytes")),
        "Time": quantities.duration(result.get("seconds")),
    }
    return [(term, text) for term, text in facts.items() if text != NOTHING]


def _lines(rows: list[Row], key: str) -> list[dict[str, Any]]:
    """The lines of one figure: what training saw, and for the loss what the validation split gave."""
    named = {"training": key, "validation": "eval_loss"} if key == "loss" else {"": key}
    return [{"name": name, "points": points} for name, column in named.items() if (points := curve(rows, column))]
