"""See a whole comparison in minutes: four adapters on the embedded model. A demo, not evidence.

Everything it needs comes with weft and with Python itself: no network, no GPU, at most 500 optimiser steps.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weft.run.study import Study

MODEL, DATA = "builtin:pycode", "builtin:pydocs"
METHODS = ("peft:lora", "sora", "dylora", "svfit")
STEPS = 500  # optimiser steps at most, of all runs together
SEEDS = 2
GRID_POINTS, GRID_EXTEND, GRID_STEPS, MEASURE_STEPS = 3, 2, 8, 6


def command(
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and report.html.")] = Path("demo"),
    workers: Annotated[int | None, typer.Option(help="Runs at a time; by default one a core.")] = None,
) -> None:
    """Compare LoRA, SoRA, DyLoRA and SVFit on the embedded model in a few minutes, and write a report.

    The model knows Python code; the text is Python's own documentation, which is prose.
    """
    from weft.cli.compare import run_study, study_command
    from weft.report.study import read
    from weft.run.budget import Budget, share_steps

    grid = (GRID_POINTS + GRID_EXTEND) * GRID_STEPS
    steps = share_steps(STEPS, len(METHODS), SEEDS, grid, MEASURE_STEPS)
    study = demo_study(Budget(steps=steps))
    total = len(METHODS) * (grid + SEEDS * steps + MEASURE_STEPS)
    note = (
        f"At most {total} of the demo's {STEPS} optimiser steps were planned: each of the {len(METHODS)} methods takes "
        f"{SEEDS} final runs of {steps} steps, {GRID_POINTS} to {GRID_POINTS + GRID_EXTEND} trial runs of {GRID_STEPS} "
        f"steps to find its learning rate, and {MEASURE_STEPS} steps to measure time and memory."
    )
    full = study_command(full_study(), "runs/pydocs")
    again = shlex.join(["weft", "demo", "--output", str(output)])
    header = {"demo": True, "full_command": full}
    run_study(study, output, workers=workers, header=header, notes=(note,), again=again)
    for line in closing_lines(read(output).against_base, full):
        print(line)


def demo_study(budget: Any) -> Study:
    """Four methods, few steps, the base model as reference."""
    from weft.run.study import Study

    return Study(
        model=MODEL,
        data=DATA,
        methods=METHODS,
        budget=budget,
        seeds=SEEDS,
        references=("base",),
        batch_size=8,
        max_length=128,
        grid_points=GRID_POINTS,
        grid_factor=5.0,
        grid_extend=GRID_EXTEND,
        grid_steps=GRID_STEPS,
        measure_steps=MEASURE_STEPS,
        measure_repeats=1,
        evaluations=3,
    )


def full_study() -> Study:
    """The comparison that the demo is a glimpse of: every adapter of weft and PEFT's nearest, three seeds."""
    from weft import registry
    from weft.run.budget import Budget
    from weft.run.study import Study

    peft = ("peft:lora", "peft:dora", "peft:pissa", "peft:adalora", "peft:vera", "peft:randlora")
    # but for those that ask for the quality of images
    own = [slug for slug, card in sorted(registry.cards("adapters").items()) if "quality" not in card.needs]
    methods = (*own, *peft)
    return Study(model=MODEL, data=DATA, methods=methods, budget=Budget(params=50_000, steps=300), seeds=3)


def closing_lines(gain: str | None, full: str) -> list[str]:
    """By what factor adapting cut the perplexity, and what to run for real."""
    return [*filter(None, [gain]), "This was a demo, too short to choose a method by. The full study:", f"  {full}"]
