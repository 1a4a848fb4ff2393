"""The schedule of a comparison and its results file, without training anything."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import UsageError
from weft.run.budget import Budget
from weft.run.study import (
    Entry,
    Plan,
    Study,
    expected_runs,
    open_results,
    pending,
    plan_from,
    plan_json,
    read_rows,
    request_of,
    study_from,
    timing,
)


def _plan(methods=("a", "b"), **changes) -> Plan:
    study = Study("model", "data", tuple(methods), **{"seeds": 2, "references": ("base",), **changes})
    entries = [Entry("base", {}, {}, None, 0)]
    entries += [Entry(name, {}, {"learning_rate": 1e-3}, None, 100) for name in methods]
    return Plan(study, tuple(entries), 50, "causal-lm", 1000)


def _row(task, loss, status="ok"):
    return {
        "kind": "run",
        "phase": task.phase,
        "method": task.method,
        "seed": task.seed,
        "learning_rate": task.learning_rate,
        "grid_offset": task.offset,
        "status": status,
        "validation": {"loss": loss},
    }


def _play(plan, loss, pick=lambda tasks: tasks[0]):
    """Run a whole study against a made-up loss(method, learning rate); returns its rows."""
    rows = []
    while tasks := pending(plan, rows):
        task = pick(tasks)
        value = loss(task.method, task.learning_rate)
        rows.append(_row(task, value, "ok" if value is not None else "failed"))
        assert len(rows) < 200
    return rows


def test_grid_is_chosen_on_the_grid_seed_and_final_runs_use_fresh_ones():
    rows = _play(_plan(), lambda method, rate: abs((rate or 0) - 1e-3))
    grid = [row for row in rows if row["phase"] == "grid"]
    assert sorted({row["learning_rate"] for row in grid}) == [0.000333333, 0.001, 0.003]
    assert {row["seed"] for row in grid} == {0}
    final = [row for row in rows if row["phase"] == "final"]
    assert sorted((row["method"], row["seed"], row["learning_rate"]) for row in final) == [
        (method, seed, 0.001) for method in "ab" for seed in (1, 2)
    ]
    assert [row["method"] for row in rows if row["phase"] == "reference"] == ["base"]


def test_best_at_edge_extends_up_to_the_bound():
    rows = _play(_plan(["a"]), lambda method, rate: -(rate or 0))  # the larger the better, without end
    rates = sorted(row["learning_rate"] for row in rows if row["phase"] == "grid")
    assert rates == [0.000333333, 0.001, 0.003, 0.009, 0.027, 0.081]
    assert {row["learning_rate"] for row in rows if row["phase"] == "final"} == {0.081}


def test_failed_rates_are_passed_over_and_a_method_without_any_still_gets_its_rows():
    rows = _play(_plan(), lambda method, rate: None if method == "b" or (rate or 0) > 1e-3 else 1 / (rate or 1))
    final = {row["method"]: row["learning_rate"] for row in rows if row["phase"] == "final"}
    assert final == {"a": 0.001, "b": None}


def test_grid_runs_may_be_shorter_than_final_ones():
    tasks = pending(_plan(["a"], grid_steps=8), [])
    assert {(task.phase, task.steps) for task in tasks} == {("reference", 0), ("grid", 8)}
    assert {task.steps for task in pending(_plan(["a"], grid_steps=80), []) if task.phase == "grid"} == {50}


def test_one_grid_point_goes_straight_to_the_final_runs():
    rows = _play(_plan(["a"], grid_points=1), lambda method, rate: 1.0)
    assert [(row["phase"], row["learning_rate"]) for row in rows] == [
        ("reference", None),
        ("final", 0.001),
        ("final", 0.001),
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_any_order_of_finishing_ends_in_the_same_rows(seed, points, seeds, extend):
    """Workers finish as they like: the rows of the study are the same set."""
    import random

    plan = _plan(["a", "b", "c"], grid_points=points, seeds=seeds, grid_extend=extend)

    def loss(method, rate):
        noise = random.Random(f"{seed} {method} {rate}").random()
        return None if noise < 0.15 else noise

    first = _play(plan, loss)
    shuffled = random.Random(seed)
    second = _play(plan, loss, shuffled.choice)
    as_set = [sorted(json.dumps(row, sort_keys=True) for row in rows) for rows in (first, second)]
    assert as_set[0] == as_set[1]
    assert expected_runs(plan, first) == len(first) + len(timing(plan, first))


def test_timing_runs_are_interleaved_and_resume():
    plan = _plan(measure_repeats=2)
    tasks = timing(plan, [])
    assert [(task.method, task.seed) for task in tasks] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert timing(plan, [_row(tasks[0], 1.0)]) == tasks[1:]


def test_results_survive_a_torn_line(tmp_path):
    request = request_of(_plan().study, {"torch": "2"})
    results = open_results(tmp_path, request)
    results.append({"kind": "study", "request": request})
    results.append({"kind": "run", "number": 1})
    results.close()
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "run", "numb')
    results = open_results(tmp_path, request)
    assert [row.get("number") for row in results.rows] == [None, 1]
    results.append({"kind": "run", "number": 2})
    results.close()
    assert path.read_bytes() == whole + b'{"kind": "run", "number": 2}\n'


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_file_cut_anywhere_can_be_continued(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "study", "request": {}}\n{"kind": "run", "number": 1}\n')
    os.truncate(path, cut)
    rows, length = read_rows(path)
    assert len(rows) == path.read_bytes().count(b"\n") and length <= cut


def test_a_changed_command_is_refused(tmp_path):
    study = _plan().study
    results = open_results(tmp_path, request_of(study, {}))
    results.append({"kind": "study", "request": request_of(study, {})})
    results.close()
    changed = Study("model", "data", ("a", "b"), seeds=3, references=("base",))
    with pytest.raises(UsageError, match="holds a study with seeds 2, and this command has 3"):
        open_results(tmp_path, request_of(changed, {}))
    with pytest.raises(UsageError, match="versions"):
        open_results(tmp_path, request_of(study, {"torch": "3"}))


def test_two_writers_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    results = open_results(tmp_path, {})
    with pytest.raises(UsageError, match="another weft compare is writing"):
        open_results(tmp_path, {})
    results.close()
    open_results(tmp_path, {}).close()


def test_foreign_files_are_left_alone(tmp_path):
    for text, sentence in (("hello\n", "line 1 is not a row"), ("hello", "does not end in a row")):
        (tmp_path / "results.jsonl").write_text(text)
        with pytest.raises(UsageError, match=sentence):
            open_results(tmp_path, {})
        assert (tmp_path / "results.jsonl").read_text() == text
    with pytest.raises(UsageError, match="cannot be used"):
        open_results(tmp_path / "results.jsonl", {})


def test_failed_runs_can_be_tried_again(tmp_path):
    results = open_results(tmp_path, {})
    for row in ({"kind": "study", "request": {}}, {"kind": "run", "status": "failed"}, {"kind": "run", "status": "ok"}):
        results.append(row)
    results.close()
    results = open_results(tmp_path, {}, retry_failed=True)
    assert [row.get("status") for row in results.rows] == [None, "ok"]
    results.close()
    assert len(read_rows(tmp_path / "results.jsonl")[0]) == 2


def test_plan_and_study_travel_as_json():
    plan = _plan(["a"], budget=Budget(params=50_000), options={"a": {"r": 4}})
    header = json.loads(json.dumps({"plan": plan_json(plan), "request": request_of(plan.study, {"torch": "2"})}))
    study = study_from(header["request"])
    assert study == plan.study and plan_from(header, study) == plan


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ()}, "--methods is empty"),
        ({"methods": ("a", "b", "a")}, "--methods names 'a' twice"),
        ({"seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"grid_factor": 1.0}, "--grid-factor must be above 1"),
        ({"grid_steps": 0}, "--grid-steps must be at least 1, not 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"options": {"c": {"r": 1}}}, "--set names 'c', which is not among --methods a,b"),
    ],
)
def test_bad_requests_are_one_sentence(changes, sentence):
    with pytest.raises(UsageError) as caught:
        Study(**{"model": "m", "data": "d", "methods": ("a", "b"), **changes})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
