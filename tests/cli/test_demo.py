"""The demo's promises that need no training: its steps, its words, the command of the full study."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from weft import registry
from weft.cli import compare as verb
from weft.cli.main import run
from weft.run.planning import total_steps
from weft.run.study import Entry, Plan, Task, pending


@pytest.fixture
def started(monkeypatch, capsys):
    """What `weft demo` would run: (study, output, keywords) without running it, and what it prints."""
    calls = []
    monkeypatch.setattr(verb, "run_study", lambda study, output, **more: calls.append((study, output, more)))
    monkeypatch.setattr("weft.report.study.read", lambda path: type("Read", (), {"against_base": "It got better."}))
    assert run(["demo", "--output", "some where"]) == 0
    return *calls[0], capsys.readouterr().out


def _rows(plan: Plan) -> list[dict]:
    """All rows of a study in which every grid is extended as often as it may be."""
    rows: list[dict] = []
    while tasks := pending(plan, rows):
        task: Task = tasks[0]
        loss = -(task.learning_rate or 0)
        rows.append(
            {"kind": "run", "status": "ok", "validation": {"loss": loss}, "grid_offset": task.offset, **vars(task)}
        )
    return rows


def test_at_most_five_hundred_steps_whatever_the_grids_find(started):
    study, _, more, _ = started
    assert study.methods == ("peft:lora", "sora", "dylora", "svfit") and study.seeds == 2
    assert set(study.references) == {"base"}  # a reference that trains would cost steps
    entries = [Entry("base", {}, {}, None, 0)]
    entries += [Entry(name, {}, {"learning_rate": 1e-3}, None, 1) for name in study.methods]
    plan = Plan(study, tuple(entries), study.budget.steps, "causal-lm", 1)
    rows = _rows(plan)
    spent = sum(row["steps"] for row in rows) + 4 * study.measure_repeats * study.measure_steps
    assert spent == total_steps(plan, rows)
    assert 480 <= spent <= 500 and f"At most {spent} of the demo's 500" in more["notes"][0]


def test_it_is_labelled_a_demo_and_names_the_full_study(started, monkeypatch):
    _, output, more, shown = started
    assert output == Path("some where")
    assert more["header"]["demo"] is True and more["again"] == "weft demo --output 'some where'"
    assert "It got better." in shown and "This was a demo" in shown and more["header"]["full_command"] in shown
    full = []
    monkeypatch.setattr(verb, "run_study", lambda study, output, **_: full.append(study))
    assert run(shlex.split(more["header"]["full_command"])[1:]) == 0
    own = {slug for slug, card in registry.cards("adapters").items() if "quality" not in card.needs}
    assert own < set(full[0].methods) and full[0].seeds == 3
