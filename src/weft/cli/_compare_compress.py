"""`weft compare --pillar compress`: which compression method to use, at which share of the bits, by measurement."""

from __future__ import annotations

import shlex
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli._study import StudyBar, conclude
from weft.errors import UsageError, WeftError

if TYPE_CHECKING:
    from weft.run.study import Row
    from weft.run.tradeoffs import Point, Study

_NEEDED = "What to compare"
_MEASURED = "How it is measured"
_WHERE = "Where it runs"


def command(
    model: Annotated[str, typer.Option(help="A dense model: hub id, folder, builtin:pycode.", rich_help_panel=_NEEDED)],
    data: Annotated[
        str,
        typer.Option(
            help="Calibration text, of which the training split is read: files, a folder, a hub dataset, or "
            "builtin:pydocs|stdlib.",
            rich_help_panel=_NEEDED,
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Names between commas: svd,svd_llm,lord, ...; a name with +train behind it (pela+train, svd+train) is "
            "trained after it is made.",
            rich_help_panel=_NEEDED,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and report.html.", rich_help_panel=_NEEDED)],
    keep: Annotated[
        str,
        typer.Option(
            help="Shares of the matrices' stored bits, between commas; for r_sparse, of the bits read for a token.",
            rich_help_panel=_NEEDED,
        ),
    ] = "0.9,0.8,0.7,0.5",
    pillar: Annotated[
        str,
        typer.Option(
            metavar="adapters|compress",
            help="What is compared: adapters by default, with options of their own.",
            show_default=False,
            rich_help_panel=_NEEDED,
        ),
    ] = "compress",
    train: Annotated[
        str | None,
        typer.Option(
            help="How those are trained: steps=300,learning_rate=1e-4, and other options of weft adapt.",
            rich_help_panel=_NEEDED,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="An option of one method; may be repeated."),
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Matrices to compress: name endings between commas, or one regex.")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Matrices to leave as they are: name endings between commas, or one regex.")
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(help="Text for the perplexity, if not the data's own test split.", rich_help_panel=_MEASURED),
    ] = None,
    test_fraction: Annotated[
        float, typer.Option(help="Held out for it where the data has no test split.", rich_help_panel=_MEASURED)
    ] = 0.1,
    data2: Annotated[
        str | None,
        typer.Option(
            help="A second corpus for the perplexity; should be given: a model looks best on text such as it was "
            "compressed with.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Only as many rows of each test corpus, at even distances.", rich_help_panel=_MEASURED),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", rich_help_panel=_MEASURED)] = 128,
    max_length: Annotated[
        int, typer.Option(help="Tokens a calibration sequence or test row.", rich_help_panel=_MEASURED)
    ] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows at once.", rich_help_panel=_MEASURED)] = 8,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Store and run all models in bfloat16.", rich_help_panel=_MEASURED)
    ] = False,
    no_speed: Annotated[
        bool, typer.Option("--no-speed", help="Measure no tokens a second.", rich_help_panel=_MEASURED)
    ] = False,
    columns: Annotated[
        str | None, typer.Option(help="Where columns have other names: text=sentence", rich_help_panel=_MEASURED)
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the calibration sequences.", rich_help_panel=_MEASURED)] = 0,
    split_seed: Annotated[int, typer.Option(help="Draws the rows that are held out.", rich_help_panel=_MEASURED)] = 0,
    threads: Annotated[
        int, typer.Option(help="CPU threads of each process; they change the last bits.", rich_help_panel=_WHERE)
    ] = 1,
    workers: Annotated[
        int | None,
        typer.Option(help="Methods at a time; as many as the machine holds. Speeds are alone.", rich_help_panel=_WHERE),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure again what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be measured and stop.")] = False,
) -> None:
    """Compress a model by every method to every share, and rank the methods: a table here, and OUTPUT/report.html.

    [bold]weft compare --pillar compress --model builtin:pycode --data builtin:stdlib --data2 builtin:pydocs
    --methods svd,svd_llm --output runs/shares[/bold]

    Each finished point is a line of OUTPUT/results.jsonl; the same command goes on after an interruption.
    """
    from weft.cli.compare import pair, settings_of
    from weft.run.tradeoffs import Study, slug_of

    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    named = tuple(name.strip() for name in methods.split(",") if name.strip())
    study = Study(
        model=model,
        data=data,
        methods=named,
        keeps=_shares(keep),
        test_data=test_data,
        test_fraction=test_fraction,
        data2=data2,
        columns=dict(pair(each, "--columns") for each in columns.split(",")) if columns else None,
        options=settings_of(setting or [], tuple(map(slug_of, named))),
        train=train,
        include=include,
        exclude=exclude,
        samples=samples,
        max_length=max_length,
        batch_size=batch_size,
        rows=rows,
        seed=seed,
        split_seed=split_seed,
        bf16=bf16,
        speed=not no_speed,
        threads=threads,
    )
    if dry_run:
        show_plan(study)
    else:
        run_study(study, output, workers=workers, retry_failed=retry_failed)


def _shares(text: str) -> tuple[float, ...]:
    """ "0.9,0.5" as numbers, the largest first."""
    found = []
    for word in (part.strip() for part in text.split(",")):
        try:
            found += [float(word)] if word else []
        except ValueError:
            raise UsageError(f"--keep {word!r} is not a number; give shares of the bits such as 0.9,0.7,0.5") from None
    return tuple(sorted(found, reverse=True))


def study_command(study: Study, output: Path | str) -> str:
    """The command that makes a study, without what it would do by itself."""
    words = ["weft", "compare", "--pillar", "compress", "--model", study.model, "--data", study.data]
    words += ["--methods", ",".join(study.methods), "--keep", ",".join(f"{keep:g}" for keep in study.keeps)]
    for method, options in study.options.items():
        words += [word for name, value in options.items() for word in ("--set", f"{method}.{name}={value}")]
    defaults = {field.name: field.default for field in fields(study) if field.default is not MISSING}
    for name, default in defaults.items():
        value = getattr(study, name)
        if value == default or name in ("bf16", "speed"):
            continue
        if name == "columns":
            value = ",".join(f"{ours}={theirs}" for ours, theirs in value.items())
        words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--bf16"] * study.bf16 + ["--no-speed"] * (not study.speed)
    return shlex.join([*words, "--output", str(output)])


def show_plan(study: Study) -> None:
    """Print what a study would measure."""
    from rich.console import Console

    from weft.run.point import facts
    from weft.run.tradeoffs import expected

    console = Console()
    for line in plan_lines(study, facts(study, lambda text: None)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{expected(study)} rows", highlight=False)


def plan_lines(study: Study, found: Row) -> list[str]:
    """What is compressed, what calibrates and what tests, in words."""
    from weft.report.quantities import plural, size

    shares = ", ".join(f"{keep:g}" for keep in study.keeps)
    lines = [
        f"{', '.join(study.methods)} on {study.model}: {size(found['dense_bits'] / 8)} in {found['matrices']:,} "
        f"{'matrix' if found['matrices'] == 1 else 'matrices'}, to {shares} of the bits"
    ]
    for name, each in found["calibration"].items():
        lines.append(f"calibration: {plural(each['sequences'], 'sequence')} of {name}, {each['tokens']:,} tokens")
    for corpus in found["corpora"]:
        held = "".join(f"; {note}" for note in corpus["notes"])
        counts = f"{plural(corpus['rows'], 'row')} of {plural(corpus['documents'], 'text')}"
        split = ", test split" if corpus["split"] == "test" else ""
        lines.append(f"test: {counts} of {corpus['data']}{split}{held}")
    if len(found["corpora"]) == 1:
        lines.append("one test corpus: --data2 names another, unlike the calibration text, which says more")
    return [*lines, *found["notes"]]


def run_study(study: Study, output: Path, *, workers: int | None = None, retry_failed: bool = False) -> list[Row]:
    """Run a study with a progress bar, then write its report and print its table."""
    from weft.run.tradeoffs import trade_off

    again = study_command(study, output)
    with Progress(study) as progress:
        try:
            rows = trade_off(
                study,
                output,
                workers=workers,
                command=again,
                retry_failed=retry_failed,
                observer=progress,
                debug="--debug" in sys.argv,
            )
        except KeyboardInterrupt:
            progress.stop()
            done = f"after {progress.done} of {progress.total} rows"
            raise WeftError(f"interrupted {done}; go on with: {again}") from None
    conclude(rows, output, "points")
    return rows


class Progress(StudyBar):
    """One bar over the whole study on a terminal; elsewhere a line for each row."""

    def __init__(self, study: Study) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        from weft.run.tradeoffs import expected

        text = TextColumn("{task.fields[text]}")
        super().__init__(BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn(), total=expected(study))
        self.study = study

    def planned(self, header: Row) -> None:
        """Say above the bar what will be measured."""
        for line in plan_lines(self.study, header["plan"]):
            self.console.print(line, highlight=False, markup=False)

    def progressed(self, rows: list[Row], running: list[Point]) -> None:
        """Move the bar by the rows that are there."""
        self.done = sum(row.get("kind") == "run" for row in rows)
        if self.bar is not None:
            now = ", ".join(map(_label, running))
            self.bar.update(self.task, completed=self.done, text=now)

    def finished(self, row: Row) -> None:
        """A line for those who have no bar, and for what failed."""
        from weft.run.tradeoffs import Point

        self.done += 1
        label = _label(Point(row["phase"], row["method"], row["keep"]))
        if row["status"] == "failed":
            self.console.print(f"{label} failed: {row['error']}", highlight=False, markup=False)
        elif self.bar is None:
            self.console.print(f"{self.done}/{self.total} {label}{_score(row)}", highlight=False, markup=False)


def _label(point: Point) -> str:
    share = "" if point.keep is None else f" {point.keep:g}"
    return f"{point.method}{share}" + (" speed" if point.phase == "speed" else "")


def _score(row: Row) -> str:
    if row["phase"] == "speed":
        decode = row["speed"]["decode"].get("1")
        return f": {decode:,.0f} tokens/s written" if decode else ""
    first = row["corpora"][0]["perplexity"]
    return f": perplexity {first:.2f}" if first is not None else ": no finite perplexity"
