"""Find out what a compressed model lost beside another, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.errors import UsageError
from weft.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

Json = dict[str, Any]

_NEEDED = "What to evaluate"
_DATA = "How the data is read"


def command(
    model: Annotated[str, typer.Option(help="A folder, a hub id, or builtin:pycode.", rich_help_panel=_NEEDED)],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Files, a folder, a hub dataset, or builtin:pydocs|stdlib; may be repeated, and should be: a model "
            "looks best on the text that it was compressed with.",
            rich_help_panel=_NEEDED,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The model that it is held against, such as the original.", rich_help_panel=_NEEDED),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval between commas: arc_easy,... (weft[evaluation]).", rich_help_panel=_NEEDED),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File for everything that was measured, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output in place of the table.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Weights and arithmetic in bfloat16.")] = False,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Measure neither memory nor speed.")] = False,
    max_length: Annotated[int, typer.Option(help="Tokens a row.", rich_help_panel=_DATA)] = 256,
    rows: Annotated[
        int | None, typer.Option(help="Only as many rows of each corpus, at even distances.", rich_help_panel=_DATA)
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.", rich_help_panel=_DATA)] = "test",
    test_fraction: Annotated[
        float, typer.Option(help="Held out for the test where the data has no such split.", rich_help_panel=_DATA)
    ] = 0.0,
    split_seed: Annotated[int, typer.Option(help="Draws the rows that are held out.", rich_help_panel=_DATA)] = 0,
    columns: Annotated[
        str | None,
        typer.Option(help="Where columns have other names: text=sentence,label=polarity", rich_help_panel=_DATA),
    ] = None,
) -> None:
    """Find out what a compressed model lost beside another, and what it costs.

    [bold]weft evaluate --model OUT --against builtin:pycode --data builtin:stdlib --data builtin:pydocs[/bold]

    Losses, equal predictions, divergence, bytes, memory and tokens a second, on the same tokens.
    """
    from rich.console import Console

    from weft.run import fidelity

    asked = fidelity.Request(
        model=model,
        data=tuple(data or ()),
        against=against,
        split=split,
        max_length=max_length,
        batch_size=batch_size,
        rows=rows,
        bf16=bf16,
        columns=_columns(columns),
        test_fraction=test_fraction,
        split_seed=split_seed,
        costs=not no_speed,
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
    )
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UsageError(f"--output {str(output)!r} must be a file in a folder that exists")
    with Console(stderr=True).status("loading") as status:
        report = fidelity.run(asked, status.update)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if output is not None:
        write_text(output, text)
    if as_json:
        print(text, end="")
        return
    console = Console()
    console.print(table(report))
    for line in remarks(report):
        console.print(line, highlight=False, markup=False)
    if output is not None:
        console.print(f"report: {output}", highlight=False, soft_wrap=True)


def _columns(text: str | None) -> dict[str, str] | None:
    from weft.run.options import coerce

    try:
        return coerce(text, dict[str, str]) if text else None
    except (TypeError, ValueError):
        raise UsageError(f"--columns must be pairs like text=sentence, not {text!r}") from None


# --- the table --------------------------------------------------------------------------------------------------------


def table(report: Json) -> Table:
    """One line a quantity: the model's, the other's, and how they differ."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    names = [each["name"] for each in report["models"].values()]
    shown = Table(
        title=escape(" against ".join(names)), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False,
    )  # fmt: skip
    shown.add_column("")
    for part in report["models"]:
        shown.add_column(part, justify="right")
    if len(names) > 1:
        shown.add_column("difference")
    sections = [(f"{corpus['data']}, {corpus['split']}", _corpus_lines(corpus)) for corpus in report["corpora"]]
    sections += [("lm-eval", _task_lines(report["tasks"]))] if report["tasks"] else []
    for heading, lines in [*sections, ("costs", _cost_lines(report["models"]))]:
        shown.add_row(f"[bold]{escape(heading)}[/bold]")
        for label, *cells in lines:
            shown.add_row(f"  {label}", *map(escape, cells[: len(names) + (len(names) > 1)]))
        shown.add_section()
    return shown


def _corpus_lines(corpus: Json) -> list[list[str]]:
    from weft.report import quantities

    mine, theirs = corpus["model"], corpus.get("against")
    score = "accuracy" if "accuracy" in mine else "perplexity"
    loss = "nats a row" if "accuracy" in mine else "nats a token"
    found = corpus.get("difference", {})

    def line(label: str, name: str, digits: int, apart: str) -> list[str]:
        values = [mine[name]] + ([theirs[name]] if theirs else [])
        return [label, *[quantities.NOTHING if value is None else f"{value:,.{digits}f}" for value in values], apart]

    lines = [line(loss, "loss", 4, _interval(found.get("loss")))]
    if score == "accuracy":
        lines.append(line(score, score, 4, _interval(found.get(score))))
    else:
        ratio = _ratio(mine[score], theirs and theirs[score])
        lines.append(line(score, score, 2, "collapsed" if corpus.get("collapsed") else ratio))
    if theirs:
        answer = "same label" if score == "accuracy" else "same next token"
        kl = quantities.number(corpus["kl"], 3)
        lines += [[answer, f"{corpus['agreement']:.2%}", "", ""], ["KL(against ‖ model), nats", kl, "", ""]]
    return lines


def _interval(difference: Json | None) -> str:
    from weft.report.quantities import change

    if difference is None:
        return ""
    value = change(difference["value"], 4)
    if difference["low"] is None:
        return value
    return f"{value} [{change(difference['low'], 4)}, {change(difference['high'], 4)}]"


def _ratio(mine: float | None, theirs: float | None) -> str:
    return f"× {mine / theirs:.3f}" if mine is not None and theirs else ""


def _task_lines(tasks: Json) -> list[list[str]]:
    from weft.report.quantities import change, number

    lines = []
    for task, metrics in tasks["model"].items():
        for name, value in metrics.items():
            if "_stderr" in name:
                continue
            other = tasks.get("against", {}).get(task, {}).get(name)
            apart = change(None if other is None else value - other, 4)
            lines.append([f"{task}, {name.removesuffix(',none')}", number(value), number(other), apart])
    return lines


def _cost_lines(models: Json) -> list[list[str]]:
    from weft.report import quantities

    parts = list(models.values())

    def line(label: str, values: list[float | None], show: Any) -> list[str]:
        return [label, *map(show, values), _ratio(values[0], values[-1]) if len(values) > 1 else ""]

    bits = [each["linear_bits"] for each in parts]
    lines = [
        line("parameters", [each["parameters"] for each in parts], quantities.short_count),
        line("weight files", [each["file_bytes"] for each in parts], quantities.size),
        line("linear layers, as stored", [None if each is None else each / 8 for each in bits], quantities.size),
    ]
    if any(each["peak_bytes"] is not None for each in parts):
        lines.append(line("memory of a forward pass", [each["peak_bytes"] for each in parts], quantities.size))
    for stage in ("prefill", "decode"):
        for batch in (parts[0]["speed"] or {}).get(stage, ()):
            values = [each["speed"][stage][batch] for each in parts]
            if any(value is not None for value in values):
                lines.append(line(f"{stage}, batch {batch}, tokens/s", values, quantities.short_count))
    return lines


def remarks(report: Json) -> list[str]:
    """What a reader of the table should know."""
    from weft.report.quantities import listing, plural

    lines = []
    unit = "image" if report["task"] == "image-classification" else "text"
    for corpus in report["corpora"]:
        part = f"{corpus['rows']:,} of " if corpus["rows"] < corpus["of_rows"] else ""
        counts = f"{part}{plural(corpus['of_rows'], 'row')} of {plural(corpus['documents'], unit)}"
        lines += [f"{corpus['data']}: {note}" for note in (counts, *corpus["notes"])]
    wrecked = [corpus["data"] for corpus in report["corpora"] if corpus.get("collapsed")]
    if wrecked:
        lines.append(f"Collapsed on {listing(wrecked)}: a perplexity of twice the other's or more.")
    if len(report["corpora"]) == 1 and "against" in report["models"]:
        lines.append("One corpus: if the model was compressed with such text, another one says more.")
    return lines
