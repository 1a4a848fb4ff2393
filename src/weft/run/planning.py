"""A request made concrete before anything runs: methods checked, knobs turned, minutes converted to steps.

Parameters are counted on the model's skeleton, which has shapes and no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

from weft import registry
from weft.errors import UsageError, WeftError
from weft.run import budget as budgets
from weft.run import spread
from weft.run.generate import check_installed
from weft.run.single import context_of, load_data, run_task, sentence
from weft.run.study import Entry, Plan, Row, Study, Task, grid_runs

if TYPE_CHECKING:
    from torch import nn

    from weft.run.methods import Method

PROBE_STEPS = 5  # of each method, to turn minutes into steps


class Observer(Protocol):
    """What is told of a study's progress; the command line's progress bar is one."""

    def stage(self, text: str) -> None:
        """Something starts that has no runs to count."""

    def planned(self, plan: Plan, header: Row) -> None:
        """The plan is settled; nothing has run yet."""

    def progressed(self, plan: Plan, rows: list[Row], running: list[Task]) -> None:
        """Runs have started or ended."""

    def finished(self, row: Row) -> None:
        """A run has ended, well or not."""


class Silent:
    """An observer that looks away."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def planned(self, plan: Plan, header: Row) -> None:
        """Nothing."""

    def progressed(self, plan: Plan, rows: list[Row], running: list[Task]) -> None:
        """Nothing."""

    def finished(self, row: Row) -> None:
        """Nothing."""


def method_options(study: Study, name: str) -> dict[str, Any]:
    """The options of one method: the study's targets, and what was set for it alone."""
    from weft.run.methods import method_options as options_of
    from weft.run.methods import parts

    options = dict(study.options.get(name, {}))
    trains = parts(name)[0]
    takes = {option.name for option in options_of(trains)}
    everything = study.target_modules == "all-linear" and trains in registry.cards("pretrain")  # as by themselves
    if "target_modules" in takes and "target_parameters" not in options and not everything:
        options.setdefault("target_modules", study.target_modules)
    return options


def _counter(study: Study, name: str, skeleton: nn.Module) -> Callable[[dict[str, Any]], tuple[Method, int]]:
    """Options → the method and the number of parameters it trains; UsageError for what it refuses."""
    from weft.run import methods

    def count(options: dict[str, Any]) -> tuple[Method, int]:
        method = methods.resolve(name, {**method_options(study, name), **options}, from_scratch=study.from_scratch)
        methods.check_fits(method, skeleton)
        try:
            return method, methods.count_trainable(method, skeleton)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, WeftError):
                raise
            raise UsageError(f"{name}: {sentence(error)}") from error

    return count


def plan_study(study: Study, observer: Observer | None = None) -> Plan:
    """Check everything, turn every knob, convert minutes to steps. Loads no weights, but for a budget in minutes.

    Raises:
        UsageError: something in the request cannot be served; nothing has run.
    """
    from weft.run import methods

    observer = observer or Silent()
    if study.generate:
        check_installed("--generate")
    for name in study.methods:
        methods.resolve(name, method_options(study, name))
    observer.stage("reading the data")
    splits, tokenizer, exam = load_data(study)
    notes = [f"Data: {line}." for line in splits.report.get("notes", [])]
    notes += [f"Generation: {exam.sentence()}."] if exam else []
    if not len(splits.test):
        raise UsageError(f"data {study.data!r} has no test split; give --test-fraction above 0 or --test-data")
    if not len(splits.validation):
        raise UsageError(
            f"data {study.data!r} has no validation split; give --validation-fraction above 0 or --validation-data"
        )
    from weft.run.models import load_base

    skeleton = load_base(study.model, splits.task, labels=splits.labels, weights=False, tokenizer=tokenizer).model
    observer.stage("counting parameters")
    entries = [_reference("base", skeleton)] if "base" in study.references or "base" in study.methods else []
    for name in dict.fromkeys([*study.methods, *study.references]):
        if name == "base":
            continue
        if name in methods.REFERENCES:
            entries.append(_reference(name, skeleton, study.from_scratch))
        else:
            entries.append(_entry(study, name, skeleton, notes))
    shared = study.budget.params
    turned = [entry for entry in entries if entry.knob is not None]
    if shared and turned and all(entry.knob["unreachable"] for entry in turned if entry.knob):
        reached = ", ".join(f"{entry.method} {entry.trainable:,}" for entry in turned)
        raise UsageError(f"--budget: no method can meet params={shared:,}; the nearest are {reached}")
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    plan = Plan(study, tuple(entries), budgets.steps_of(study.budget, None), splits.task, parameters, tuple(notes))
    if study.budget.minutes is not None:
        plan = _with_measured_steps(plan, observer)
    return plan


def _reference(name: str, skeleton: nn.Module, from_scratch: bool = False) -> Entry:
    from weft.run import methods

    method = methods.resolve(name, {}, from_scratch=from_scratch)
    recipe = {} if name == "base" else dict(method.recipe)
    return Entry(name, {}, recipe, None, methods.count_trainable(method, skeleton))


def _entry(study: Study, name: str, skeleton: nn.Module, notes: list[str]) -> Entry:
    from weft.run import methods

    count = _counter(study, name, skeleton)
    given, wanted = study.options.get(name, {}), study.budget.params
    turned = methods.resolve(name, method_options(study, name)).knob
    knob: budgets.Knob | None = None
    if methods.parts(name)[0] in methods.REFERENCES:  # all of the model, whatever it is stepped by
        wanted = None
    if wanted is not None and turned is not None and turned not in given:
        knob = budgets.solve_knob(turned, lambda value: count({turned: value})[1], wanted)
        method, trainable = count({turned: knob.value})
    else:
        method, trainable = count({})
        value = getattr(method.config, turned or "", None)
        if wanted is not None:
            knob = budgets.Knob(turned, value, trainable, budgets.unturnable(trainable, wanted).unreachable)
        elif value is not None:
            knob = budgets.Knob(turned, value, trainable, unreachable=False)
    if wanted is not None and knob is not None and knob.unreachable:
        notes.append(f"{name} cannot have {wanted:,} trainable parameters; it runs with {trainable:,}.")
    shown = None if knob is None else {"name": knob.name, "value": knob.value, "unreachable": knob.unreachable}
    return Entry(name, dict(method.options), dict(method.recipe), shown, trainable)


def _with_measured_steps(plan: Plan, observer: Observer) -> Plan:
    """The plan with as many steps as the slowest method can take in the budget's minutes."""
    slowest, slow, failures = 0.0, "", []
    for entry in plan.entries:
        if entry.method == "base":
            continue
        observer.stage(f"timing {entry.method}, to turn minutes into steps")
        task = Task("measure", entry.method, 0, float(entry.recipe["learning_rate"]), PROBE_STEPS)
        row = spread.alone(run_task, context_of(plan), asdict(task), plan.study.threads) or {}
        if row.get("step_seconds"):
            slowest, slow = max((slowest, slow), (row["step_seconds"], entry.method))
        else:
            failures.append(row.get("error") or f"the run of {entry.method} was killed")
    if not slowest:
        raise WeftError(f"no method could be timed: {failures[0]}")
    steps = budgets.steps_of(plan.study.budget, slowest)
    minutes = f"minutes={plan.study.budget.minutes:g}"
    note = f"{minutes} became {steps} steps a run: {slow}, the slowest, took {slowest:.3g} s a step."
    return replace(plan, steps=steps, notes=(*plan.notes, note))


def total_steps(plan: Plan, rows: list[Row]) -> int:
    """Optimiser steps of a whole study, if no further grid is extended."""
    study = plan.study
    total = 0
    for entry in plan.entries:
        if entry.method != "base":
            grid = grid_runs(plan, rows, entry.method) * plan.grid_steps
            total += grid + study.seeds * plan.steps + study.measure_repeats * study.measure_steps
    return total
