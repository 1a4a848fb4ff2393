"""The ranking as a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from weft.report import quantities, tradeoffs
from weft.report.study import Line, Study, parse, read


def terminal_table(results: Path) -> Table:
    """The ranking, then the reference rows, with the verdict beneath; 80 columns are enough for it.

    Where the runs generated text, BLEU and ROUGE-L take the place of memory, time and file size, which the report has.
    Where methods name their optimisers, the state of those takes the file's.

    Args:
        results: `results.jsonl`, or the folder that holds it; the study may still be running.

    Raises:
        UsageError: there are no results to show.
    """
    head, rows, remarks = parse(Path(results))
    if head.get("pillar") == "compress":
        return tradeoffs.terminal_table(tradeoffs.digest(head, rows, remarks))
    study = read(Path(results))
    lines = [*study.lines, *study.references]
    forgetting = any(line.forgetting for line in lines)
    notes = [study.verdict, *study.notes]
    if any((line.knob or {}).get("unreachable") for line in lines):
        notes.append("* No value of the knob meets the budget; this is the nearest.")
    if study.failures:
        notes.append(f"{quantities.plural(len(study.failures), 'run')} failed; the report says why.")
    demo = "Demo: the runs are too few and too short to choose a method by" if study.head.get("demo") else None
    table = Table(
        title=demo, title_justify="left", caption=escape("\n".join(notes)), caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    generation = any(line.generation for line in lines)
    last = "state" if study.stepped else "file"
    knobs = any((line.knob or {}).get("name") for line in lines)
    measured = ["params", *(["knob"] if knobs else [])]
    measured = ["bleu", "rouge-l", *measured] if generation else [*measured, "memory", "step", last]
    for name in [study.metric.name.lower(), *measured]:
        table.add_column(name, justify="right", no_wrap=True)
    if forgetting:
        table.add_column("elsewhere" if study.from_scratch else "forgot", justify="right", no_wrap=True)
    for group in (study.lines, study.references):
        for line in group:
            cells = _cells(line, study, generation, knobs) + ([study.other_text(line)] if forgetting else [])
            table.add_row(*map(escape, cells), style="dim" if line.collapsed else None)
        table.add_section()
    return table


def _cells(line: Line, study: Study, generation: bool, knobs: bool) -> list[str]:
    knob = line.knob or {}
    shown = f"{knob['name']}={knob.get('value')}" if knob.get("name") else quantities.NOTHING
    score = study.metric.show(line.mean, line.spread)
    last = line.optimizer_bytes if study.stepped else line.file_bytes
    costs = [quantities.size(line.peak_bytes), quantities.duration(line.step_seconds), quantities.size(last)]
    return [
        str(line.rank or ""),
        line.name,
        score if line.mean is not None else line.state,
        *([line.bleu, line.rouge_l] if generation else []),
        quantities.short_count(line.trainable),
        *([shown + ("*" if knob.get("unreachable") else "")] if knobs else []),
        *([] if generation else costs),
    ]
