"""Find out which method to use: train each at equal budgets, and rank them by measurement."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._study import StudyBar, conclude
from weft.errors import UsageError, WeftError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from weft.run.study import Plan, Row, Study, Task

VARIANTS = (["--pillar", "compress"],)  # words with which the verb has other options

_NEEDED = "What to compare"
_RUNS = "How the runs are made"
_WHERE = "Where they run"


def build(argv: list[str]) -> Callable[..., None]:
    """The command for these words: each pillar has its own, and refuses the options of the other by name."""
    from weft.cli import _compare_compress, _flags

    sides: dict[str, Callable[..., None]] = {"adapters": command, "compress": _compare_compress.command}
    pillar = _flags.value(argv, "--pillar") or "adapters"
    if pillar not in sides:
        raise UsageError(f"--pillar {pillar!r} cannot be compared: {nearest(pillar, sides)}")
    mine = _flags.flags_of(sides[pillar])
    for other, function in sides.items():
        strange = _flags.flags_of(function) - mine
        for flag in (word.partition("=")[0] for word in argv):
            if flag in strange:
                raise UsageError(f"{flag} is an option of --pillar {other}, and this compares {pillar}")
    return sides[pillar]


def command(
    model: Annotated[str, typer.Option(help="Base model: hub id, folder, or builtin:pycode.", rich_help_panel=_NEEDED)],
    data: Annotated[
        str,
        typer.Option(help="Files, a folder, a hub dataset, or builtin:pydocs|stdlib.", rich_help_panel=_NEEDED),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Names between commas: sora,dylora,peft:lora,peft:dora, ...; more than a comparison in --output has "
            "are added to it.",
            rich_help_panel=_NEEDED,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and report.html.", rich_help_panel=_NEEDED)],
    budget: Annotated[
        str,
        typer.Option(
            help="What each method gets: params=50k (its knob is turned to that count), steps=300, minutes=5 (of one "
            "run's training); any of them between commas.",
            rich_help_panel=_NEEDED,
        ),
    ] = "steps=300",
    pillar: Annotated[
        str,
        typer.Option(
            metavar="adapters|compress",
            help="What is compared; `--pillar compress --help` shows the other's options.",
            rich_help_panel=_NEEDED,
        ),
    ] = "adapters",
    seeds: Annotated[int, typer.Option(help="Final runs a method, each with a seed of its own.")] = 3,
    task: Annotated[str, typer.Option(help="As of weft adapt; auto reads it off the data.")] = "auto",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="An option of one method; may be repeated."),
    ] = None,
    target_modules: Annotated[str, typer.Option(help="The modules that every method adapts.")] = "all-linear",
    references: Annotated[str, typer.Option(help="Reference rows: base,head,full, some of them, or none.")] = (
        "base,head,full"
    ),
    batch_size: Annotated[int, typer.Option(help="Rows a micro-batch.", rich_help_panel=_RUNS)] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Micro-batches a step.", rich_help_panel=_RUNS)] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens a row.", rich_help_panel=_RUNS)] = 256,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.", rich_help_panel=_RUNS)] = False,
    seed: Annotated[
        int, typer.Option(help="Of splits and grids; final runs use the following ones.", rich_help_panel=_RUNS)
    ] = 0,
    validation_data: Annotated[
        str | None, typer.Option(help="Where the validation rows are, if not in the data.", rich_help_panel=_RUNS)
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(help="Where the test rows are, if not in the data.", rich_help_panel=_RUNS)
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Held out for validation where the data has no such split.", rich_help_panel=_RUNS)
    ] = 0.1,
    test_fraction: Annotated[
        float, typer.Option(help="Held out for the test where the data has no such split.", rich_help_panel=_RUNS)
    ] = 0.1,
    columns: Annotated[
        str | None,
        typer.Option(help="Where columns have other names: text=sentence,label=polarity", rich_help_panel=_RUNS),
    ] = None,
    forget_data: Annotated[
        str | None,
        typer.Option(
            help="Text to measure forgetting on; without it, text that the base model samples; none: not measured.",
            rich_help_panel=_RUNS,
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Final runs and the base model complete the first N distinct prompts of the test split too, scored by "
            "BLEU and ROUGE-L (weft[generation]).",
            rich_help_panel=_RUNS,
        ),
    ] = None,
    grid_points: Annotated[
        int, typer.Option(help="Learning rates tried, around each method's own.", rich_help_panel=_RUNS)
    ] = 3,
    grid_factor: Annotated[float, typer.Option(help="From one rate to the next.", rich_help_panel=_RUNS)] = 3.0,
    grid_extend: Annotated[
        int, typer.Option(help="Further rates at most, while the best is at the edge.", rich_help_panel=_RUNS)
    ] = 3,
    grid_steps: Annotated[
        int | None,
        typer.Option(help="Steps of a grid's runs; as many as final runs have by default.", rich_help_panel=_RUNS),
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Points of a validation curve.", rich_help_panel=_RUNS)] = 5,
    measure_steps: Annotated[int, typer.Option(help="Steps of a timing run.", rich_help_panel=_RUNS)] = 10,
    measure_repeats: Annotated[int, typer.Option(help="Timing runs a method.", rich_help_panel=_RUNS)] = 3,
    threads: Annotated[
        int, typer.Option(help="CPU threads of each run; their number changes the last bits.", rich_help_panel=_WHERE)
    ] = 1,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time; as many as the machine holds.", rich_help_panel=_WHERE)
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster (weft[ray]).", rich_help_panel=_WHERE)
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Train every method at equal budgets and rank them: a table here, and OUTPUT/report.html.

    Each finished run is a line of OUTPUT/results.jsonl; the same command goes on after an interruption.
    """
    from weft.run.budget import parse_budget
    from weft.run.study import Study

    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    named = tuple(name.strip() for name in methods.split(",") if name.strip())
    reading: dict[str, Any] = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    reading |= {name: value for name, value in (("validation", validation_data), ("test", test_data)) if value}
    if columns:
        reading["columns"] = dict(pair(each, "--columns") for each in columns.split(","))
    study = Study(
        model=model,
        data=data,
        methods=named,
        task=task,
        budget=parse_budget(budget),
        seeds=seeds,
        seed=seed,
        options=settings_of(setting or [], named),
        target_modules=target_modules if "," not in target_modules else target_modules.split(","),
        references=_references(references),
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        max_length=max_length,
        bf16=bf16,
        data_options=reading,
        grid_points=grid_points,
        grid_factor=grid_factor,
        grid_extend=grid_extend,
        grid_steps=grid_steps,
        measure_steps=measure_steps,
        measure_repeats=measure_repeats,
        evaluations=evaluations,
        forget_data=forget_data,
        generate=generate,
        threads=threads,
    )
    if dry_run:
        show_plan(study)
        return
    run_study(study, output, workers=workers, ray=ray, retry_failed=retry_failed)


def pair(text: str, option: str) -> tuple[str, str]:
    """NAME=VALUE in two."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"{option} {text!r} is not NAME=VALUE")
    return name.strip(), value.strip()


def settings_of(settings: list[str], methods: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`sora.r=8` → {"sora": {"r": "8"}}; the method's config reads the text as its field's type."""
    options: dict[str, dict[str, Any]] = {}
    for each in settings:
        name, value = pair(each, "--set")
        method, dot, field = name.rpartition(".")
        if not dot or not method:
            raise UsageError(f"--set {each!r} names no method; write for example --set {methods[0]}.{name}={value}")
        options.setdefault(method, {})[field] = value
    return options


def _references(text: str) -> tuple[str, ...]:
    from weft.run.ranking import REFERENCES

    names = [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in REFERENCES:
            raise UsageError(f"--references: unknown reference {name!r}: {nearest(name, REFERENCES)}")
    return tuple(name for name in REFERENCES if name in names)


def study_command(study: Study, output: Path | str) -> str:
    """The command that makes a study, without what it would do by itself."""
    words = ["weft", "compare", "--model", study.model, "--data", study.data, "--methods", ",".join(study.methods)]
    budget = study.budget.as_dict()
    if budget:
        parts = (f"{name}={value:g}" if name == "minutes" else f"{name}={value}" for name, value in budget.items())
        words += ["--budget", ",".join(parts)]
    words += ["--seeds", str(study.seeds)]
    for method, options in study.options.items():
        for name, value in options.items():
            words += ["--set", f"{method}.{name}={value}"]
    if isinstance(study.target_modules, list):
        words += ["--target-modules", ",".join(study.target_modules)]
    elif study.target_modules != "all-linear":
        words += ["--target-modules", study.target_modules]
    plain = [
        "task",
        "seed",
        "batch_size",
        "gradient_accumulation",
        "max_length",
        "grid_points",
        "grid_factor",
        "grid_extend",
        "grid_steps",
        "evaluations",
    ]
    plain += ["measure_steps", "measure_repeats", "forget_data", "generate", "threads"]
    defaults = {field.name: field.default for field in fields(study) if field.default is not MISSING}
    for name in plain:
        value = getattr(study, name)
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    if study.references != defaults["references"]:
        words += ["--references", ",".join(study.references) or "none"]
    if study.bf16:
        words.append("--bf16")
    for name, value in study.data_options.items():
        if name == "columns":
            words += ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in value.items())]
        elif name in ("validation", "test"):
            words += [f"--{name}-data", str(value)]
        elif value != 0.1:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--output", str(output)])


def show_plan(study: Study) -> None:
    """Print what a study would do."""
    from rich.console import Console

    from weft.run.planning import plan_study, total_steps
    from weft.run.study import expected_runs

    plan = plan_study(study)
    console = Console()
    console.print(plan_table(plan))
    for note in plan.notes:
        console.print(note, highlight=False)
    runs, steps = expected_runs(plan, []), total_steps(plan, [])
    console.print(f"{runs} runs of {plan.steps} steps: {steps:,} optimiser steps, more where a grid is extended.")


def plan_table(plan: Plan) -> Table:
    """One line a method: its knob, its parameters, its recipe, its learning rates."""
    from rich.table import Table

    from weft.run.budget import first_offsets, learning_rate

    table = Table(title=f"{plan.study.model} on {plan.study.data}", title_justify="left")
    for heading in ("method", "knob", "trainable", "learning rates", "recipe"):
        table.add_column(heading, justify="right" if heading == "trainable" else "left")
    for entry in plan.entries:
        knob = ""
        if entry.knob:
            knob = f"{entry.knob['name']} = {entry.knob['value']}" if entry.knob["name"] else "none"
            knob += ", unreachable" if entry.knob["unreachable"] else ""
        recipe = dict(entry.recipe)
        centre = recipe.pop("learning_rate", None)
        rates = ""
        if centre is not None and entry.method != "base":
            offsets = first_offsets(plan.study.grid_points)
            rates = ", ".join(f"{learning_rate(centre, plan.study.grid_factor, offset):g}" for offset in offsets)
        table.add_row(entry.method, knob, f"{entry.trainable:,}", rates, _recipe(recipe))
    return table


def _recipe(recipe: dict[str, Any]) -> str:
    words = {"weight_decay": "decay", "warmup_ratio": "warm-up", "max_grad_norm": "clip", "lr_scheduler_type": ""}
    return ", ".join(f"{words.get(name, name.replace('_', ' '))} {value}".strip() for name, value in recipe.items())


def run_study(
    study: Study,
    output: Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    retry_failed: bool = False,
    header: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    again: str | None = None,
) -> list[Row]:
    """Run a study with a progress bar, then write its report and print its table.

    Args:
        header, notes: further fields and sentences for the results' first line.
        again: the command that goes on after an interruption; the study's own by default.
    """
    from weft.run.compare import Extras, compare

    command = study_command(study, output)
    with Progress() as progress:
        try:
            rows = compare(
                study,
                output,
                workers=workers,
                ray=ray,
                extras=Extras(again or command, notes, header or {}),
                retry_failed=retry_failed,
                observer=progress,
                debug="--debug" in sys.argv,
            )
        except KeyboardInterrupt:
            progress.stop()
            when = f"after {progress.done} of {progress.total} runs" if progress.total else "before the first run"
            raise WeftError(f"interrupted {when}; go on with: {again or command}") from None
    conclude(rows, output, "runs")
    return rows


class Progress(StudyBar):
    """One bar over the whole study on a terminal; elsewhere a line for each run."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        text = TextColumn("steps  {task.fields[text]}")
        super().__init__(BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())

    def planned(self, plan: Plan, header: Row) -> None:
        """Show the plan above the bar."""
        self.console.print(plan_table(plan))
        for note in plan.notes:
            self.console.print(note, highlight=False, markup=False)

    def progressed(self, plan: Plan, rows: list[Row], running: list[Task]) -> None:
        """Move the bar by the steps that were taken."""
        from weft.run.planning import total_steps
        from weft.run.study import expected_runs

        finished = [row for row in rows if row.get("kind") == "run"]
        self.done, self.total = len(finished), expected_runs(plan, rows)
        if self.bar is None:
            return
        now = ", ".join(dict.fromkeys(_words(task, bool(plan.study.generate)) for task in running))
        steps = sum(row["steps"] for row in finished)
        total = max(total_steps(plan, rows), steps)
        self.bar.update(self.task, completed=steps, total=total, text=f"run {self.done} of {self.total}  {now}")

    def finished(self, row: Row) -> None:
        """A line for those who have no bar, and for what failed."""
        self.done += 1
        if row["status"] == "failed":
            self.console.print(f"{_label(row)} failed: {row['error']}", highlight=False, markup=False)
        elif self.bar is None:
            self.console.print(f"{self.done}/{max(self.total, self.done)} {_label(row)}{_score(row)}", highlight=False)


def _words(task: Task, generates: bool) -> str:
    kind = {"grid": "learning rates of", "final": "training", "measure": "timing", "reference": "testing"}
    if generates:
        kind |= {"final": "training and generating with", "reference": "testing and generating with"}
    return f"{kind.get(task.phase, task.phase)} {task.method}"


def _label(row: Row) -> str:
    rate = f" at {row['learning_rate']:g}" if row["phase"] == "grid" else ""
    seed = f" seed {row['seed']}" if row["phase"] == "final" else ""
    return f"{row['method']} {row['phase']}{rate}{seed}"


def _score(row: Row) -> str:
    if row["phase"] == "measure":
        return f": {row['step_seconds']:.3g} s a step" if row["step_seconds"] else ""
    from weft.report.study import headline

    metrics = row["test"] or row["validation"] or {}
    name = headline([metrics]).key
    shown = f": {'test' if row['test'] else 'validation'} {name} {metrics[name]:.4g}" if name in metrics else ""
    if row.get("generation"):
        shown += ", BLEU {bleu:.1f}, ROUGE-L {rouge_l:.1f}".format_map(row["generation"])
    return shown
