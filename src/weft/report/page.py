"""The self-contained report: everything a reader needs is inside one HTML file.

The table and the sentences are written here, so that they are there without JavaScript, in print and for a screen
reader; `page.js` draws the figures from the same numbers, which travel as JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.files import write_text
from weft.report import quantities, tradeoffs
from weft.report.quantities import NOTHING, finite
from weft.report.study import Line, Study, parse, read
from weft.report.template import page, plain, rank_strip, short

_SHOWN = ("score", "trainable", "peak", "step", "file", "state_bytes", "forgotten", "rate", "knob")
CURVE_POINTS = 120  # a curve is drawn on at most a few hundred pixels


def html(results: Path, out: Path) -> None:
    """Write the report of a study.

    Args:
        results: `results.jsonl`, or the folder that holds it; the study may still be running.
        out: the HTML file; written whole or not at all.

    Raises:
        UsageError: there are no results to report.
        WeftError: the library that draws the figures is not installed.
    """
    path = Path(results)
    head, rows, notes = parse(path)
    compression = head.get("pillar") == "compress"
    write_text(Path(out), tradeoffs.render(tradeoffs.digest(head, rows, notes)) if compression else render(read(path)))


def render(study: Study) -> str:
    """The page's text."""
    rows = [_row(line, study) for line in study.lines]
    reference_rows = [_row(line, study) for line in study.references]
    return page(
        "page.html.j2",
        "page.js",
        _figures(study),
        study=study,
        head=study.head,
        title=f"{short(study.head.get('model'))} on {short(study.head.get('data'))}",
        facts=_facts(study),
        rows=rows,
        reference_rows=reference_rows,
        recipes=sorted({row["recipe"] for row in [*rows, *reference_rows]} - {NOTHING}),
        pairs=_pairs(study),
        answers=_answers(study),
        phases=_phases(study),
    )


def _facts(study: Study) -> list[tuple[str, str]]:
    head = study.head
    shown = head.get("budget")
    if isinstance(shown, dict):
        shown = ", ".join(f"{key} = {plain(value)}" for key, value in shown.items())
    runs = quantities.plural(sum(1 for row in study.runs if row.get("status", "ok") == "ok"), "run")
    if study.failures:
        runs += f", {len(study.failures)} failed"
    if study.finished < study.expected:
        runs += f"; {study.finished} of {study.expected} final runs so far"
    facts = {
        "Model": plain(head.get("model")),
        "Data": plain(head.get("data")),
        "Task": plain(head.get("task")),
        "Budget": plain(shown),
        "Seeds": plain(head.get("seeds")),
        "Runs": runs,
        "Started": quantities.minute(head.get("started")),
    }
    for each in head.get("added") or ():
        facts[f"Added {quantities.minute(each['started'])}"] = ", ".join(each["methods"])
    return [(term, text) for term, text in facts.items() if text != NOTHING]


def _recipe(line: Line) -> str:
    """The training recipe in the words of a table; the learning rate has a column of its own."""
    recipe = dict(line.recipe)
    recipe.pop("learning_rate", None)
    words = {"weight_decay": "decay", "warmup_ratio": "warm-up", "max_grad_norm": "clip", "lr_scheduler_type": ""}
    parts = []
    for key in [*words, *(key for key in recipe if key not in words)]:
        if recipe.get(key) is not None:
            value = recipe[key]
            shown = f"{100 * value:.3g} %" if key == "warmup_ratio" and finite(value) is not None else plain(value)
            parts.append(f"{words.get(key, key.replace('_', ' '))} {shown}".strip())
    return ", ".join(parts) or NOTHING


def _knob(line: Line) -> tuple[str, bool]:
    knob = line.knob or {}
    if knob.get("name") is None:
        return NOTHING, False
    return f"{knob['name']} = {plain(knob.get('value'))}", bool(knob.get("unreachable"))


def _row(line: Line, study: Study) -> dict[str, Any]:
    """One line of the results table, every cell as text."""
    knob, unreachable = _knob(line)
    return {
        "line": line,
        "score": study.metric.show(line.mean, line.spread),
        "perplexity": quantities.number(line.perplexity),
        "trainable": quantities.count(line.trainable),
        "knob": knob,
        "unreachable": unreachable,
        "peak": quantities.size(line.peak_bytes),
        "step": quantities.duration(line.step_seconds),
        "file": quantities.size(line.file_bytes),
        "state_bytes": quantities.size(line.optimizer_bytes),
        "forgotten": study.other_text(line),
        "rate": quantities.number(line.learning_rate, 3),
        "recipe": _recipe(line),
        "state": None if line.mean is not None else line.state,
    }


def _pairs(study: Study) -> list[dict[str, Any]]:
    """The differences between every two ranked methods, as rows of a square."""
    names = [standing.method for standing in study.ranking.standings]
    square = []
    for a in names if len(names) > 1 else []:
        cells: list[dict[str, Any] | None] = []
        for b in names:
            if a == b:
                cells.append(None)
                continue
            pair = study.ranking.pair(a, b)
            factor, digits = study.metric.factor, study.metric.digits
            known = finite(pair.low) is not None and finite(pair.high) is not None
            low, high = (quantities.change(value * factor, digits) for value in (pair.low, pair.high))
            cells.append(
                {
                    "difference": quantities.change(pair.difference * factor, digits),
                    "interval": f"{low} to {high}" if known else "no seed in common",
                    "verdict": "tie" if pair.better is None else "better" if pair.better == a else "worse",
                }
            )
        square.append({"name": a, "cells": cells})
    return square


def _answers(study: Study) -> list[dict[str, Any]]:
    """For each prompt that the runs show: its reference, and what each line's run of the lowest seed wrote."""
    shown: dict[str, dict[str, Any]] = {}
    for line in [*study.lines, *study.references]:
        runs = [row for row in study.runs if row["method"] == line.name and row.get("generation")]
        for row in sorted(runs, key=lambda row: row.get("seed") or 0)[:1]:
            for example in row["generation"].get("examples") or []:
                prompt, reference, made = (str(example.get(key)) for key in ("prompt", "reference", "answer"))
                known = shown.setdefault(prompt, {"prompt": prompt, "reference": reference, "answers": []})
                known["answers"].append((line.name, made))
    return list(shown.values())


def _phases(study: Study) -> list[tuple[str, list[dict[str, Any]]]]:
    """The runs' commands under the phase they belong to."""
    known = {
        "grid": "Learning-rate grid",
        "final": "Final runs, fresh seeds, read on the test split",
        "measure": "Serial pass for step time and memory",
        "reference": "Reference rows",
    }
    phases = dict.fromkeys([*known, *(str(row.get("phase")) for row in study.runs)])
    found = []
    for phase in phases:
        runs = [row for row in study.runs if str(row.get("phase")) == phase and row.get("command")]
        if runs:
            found.append((known.get(phase, phase), runs))
    return found


def _figures(study: Study) -> dict[str, Any]:
    """The numbers behind the figures. Values are in the metric's unit; null is what was not measured."""
    metric = study.metric
    return {
        "metric": {
            "name": metric.name,
            "unit": metric.unit,
            "digits": metric.digits,
            "higher": metric.higher_is_better,
        },
        "methods": [_drawn(line, study) for line in [*study.lines, *study.references]],
    }


def _drawn(line: Line, study: Study) -> dict[str, Any]:
    factor = study.metric.factor
    row = _row(line, study)

    def scaled(value: float | None) -> float | None:
        return None if finite(value) is None or value is None else _round(value * factor)

    return {
        "name": line.name,
        "reference": line.reference,
        "index": line.index,
        "rank": line.rank,
        "mean": scaled(line.mean),
        "spread": scaled(line.spread),
        "seeds": len(line.values),
        "gap": _gap(line, study),
        "trainable": finite(line.trainable),
        "peak_bytes": finite(line.peak_bytes),
        "step_seconds": finite(line.step_seconds),
        "file_bytes": finite(line.file_bytes),
        "optimizer_bytes": finite(line.optimizer_bytes) if study.stepped else None,
        "text": {key: row[key] for key in _SHOWN},
        "forgetting": [[seed, _round(after - before)] for seed, (before, after) in sorted(line.forgetting.items())],
        "forgotten": None if line.forgotten is None or study.from_scratch else _round(line.forgotten),
        "rate": line.learning_rate,
        "grid": [[rate, seed, scaled(score)] for rate, seed, score in line.grid],
        "curves": [
            {"seed": seed, "train": curve(points, "loss"), "eval": curve(points, "eval_loss")}
            for seed, points in sorted(line.curves.items())
        ],
        "ranks": rank_strip(line.ranks),
    }


def _gap(line: Line, study: Study) -> dict[str, Any] | None:
    """What separates a line from the best one, with the paired interval where it was ranked, and seed by seed."""
    best = next((each for each in study.lines if each.rank is not None), None)
    if best is None or best.mean is None or line.mean is None or not (line.reference or line.rank):
        return None
    factor = study.metric.factor
    gap: dict[str, Any] = {"mean": _round((line.mean - best.mean) * factor), "low": None, "high": None, "apart": False}
    if line.rank is not None and line is not best:
        pair = study.ranking.pair(line.name, best.name)
        gap["mean"] = _round(pair.difference * factor)
        gap["apart"] = pair.better is not None
        if finite(pair.low) is not None and finite(pair.high) is not None:
            gap |= {"low": _round(pair.low * factor), "high": _round(pair.high * factor)}
    common = sorted(set(line.values) & set(best.values)) if line is not best else []
    gap["seeds"] = [[seed, _round((line.values[seed] - best.values[seed]) * factor)] for seed in common]
    gap["text"] = quantities.change(gap["mean"], study.metric.digits)
    return gap


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def curve(points: list[dict[str, Any]], key: str) -> list[list[float]]:
    """[step, value] pairs; of a long curve the means of equal stretches, so that noise is averaged, not sampled."""
    pairs = [(float(point["step"]), value) for point in points if (value := finite(point.get(key))) is not None]
    if len(pairs) > CURVE_POINTS:
        edges = [round(index * len(pairs) / CURVE_POINTS) for index in range(CURVE_POINTS + 1)]
        parts = [pairs[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
        pairs = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
    return [[step, _round(value)] for step, value in pairs]
