"""What is read off `results.jsonl`, in every state that the file can be in."""

import json

import pytest
import synthetic

from weft.errors import UsageError
from weft.report.study import read


def digest(folder, rows, **head):
    return read(synthetic.write(folder, synthetic.study(**head), rows))


def line_of(study, name):
    return next(line for line in [*study.lines, *study.references] if line.name == name)


def test_the_best_method_comes_first_and_references_stand_apart(tmp_path):
    study = digest(tmp_path, synthetic.rows())
    assert [line.mean for line in study.lines] == sorted(line.mean for line in study.lines)
    assert [line.name for line in study.references] == ["base", "head", "full"]
    assert study.references[2].mean < study.lines[0].mean and study.references[2].rank is None
    assert study.lines[0].name in study.verdict and study.lines[-1].name not in study.verdict


def test_accuracy_ranks_upwards(tmp_path):
    rows = [synthetic.accurate(row) for row in synthetic.rows()]
    study = digest(tmp_path, rows, task="classification")
    means = [line.mean for line in study.lines]
    assert study.metric.key == "accuracy" and means == sorted(means, reverse=True)
    assert f"{100 * means[0]:.1f} %" in study.verdict


def test_a_clear_winner_and_a_tie_are_told_apart(tmp_path):
    apart = [synthetic.run("sora", seed, level=3.0) for seed in (0, 1)]
    apart += [synthetic.run("nola", seed, level=3.6) for seed in (0, 1)]
    assert "sora ranks first" in digest(tmp_path, apart, methods=("sora", "nola"), seeds=(0, 1)).verdict
    same = [{**row, "method": name} for row in apart[:2] for name in ("sora", "nola")]
    assert "nola and sora tie for first" in digest(tmp_path, same, methods=("sora", "nola"), seeds=(0, 1)).verdict


def test_a_chain_of_ties_does_not_put_its_far_end_first(tmp_path):
    """a ties with b and b with c, but a is surely better than c: the verdict does not name c."""
    documents = 400
    noise = [0.3 * (1 if document % 2 else -1) for document in range(documents)]
    rows = []
    for name, mean, sign in (("sora", 3.0, 0), ("nola", 3.02, 1), ("svfit", 3.04, 0)):
        table = [[10 * (mean + sign * noise[document]), 10] for document in range(documents)]
        row = synthetic.run(name, 0)
        rows.append({**row, "test": {"loss": mean, "per_document": table}})
    study = digest(tmp_path, rows, methods=("sora", "nola", "svfit"), seeds=(0,))
    assert study.ranking.pair("sora", "svfit").better == "sora"
    assert [(line.name, line.rank) for line in study.lines] == [("sora", 1), ("nola", 1), ("svfit", 2)]
    assert "sora and nola tie for first" in study.verdict and "svfit" not in study.verdict


def test_a_collapsed_method_is_never_recommended(tmp_path):
    base = synthetic.run("base", 0, "reference", level=2.0)
    rows = [base, *(synthetic.run(name, 0, level=3.0) for name in ("sora", "nola"))]
    study = digest(tmp_path, rows, methods=("sora", "nola"), seeds=(0,))
    assert all(line.collapsed for line in study.lines)
    assert study.verdict.startswith("No method can be recommended")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no run has ended"),
        ([synthetic.run("sora", 0, "grid")], "1 run finished, none of them a final run"),
        ([synthetic.run("sora", 0, "grid", status="failed", error="NaN")], "the only run so far failed"),
        ([synthetic.run(name, 0, "grid", status="failed", error="NaN") for name in ("sora", "nola")], "all 2 runs"),
    ],
)
def test_without_a_final_run_there_is_no_ranking(tmp_path, rows, said):
    study = digest(tmp_path, rows)
    assert study.verdict.startswith("No ranking yet") and said in study.verdict
    assert len(study.lines) == len(synthetic.METHODS)


def test_an_unfinished_study_says_how_far_it_is(tmp_path):
    study = digest(tmp_path, [row for row in synthetic.rows() if row["seed"] != 2])
    assert study.finished == 24 and study.expected == 36
    assert "24 of 36 final runs" in study.verdict


def test_one_seed_is_remarked_upon(tmp_path):
    study = digest(tmp_path, synthetic.rows(seeds=(0,)), seeds=(0,))
    assert any("One seed" in note for note in study.notes)
    assert not any("One seed" in note for note in digest(tmp_path, synthetic.rows()).notes)


def test_a_run_that_was_tried_again_counts_once(tmp_path):
    failed = synthetic.run("sora", 0, status="failed", error="disk full", test=None)
    study = digest(tmp_path, [failed, synthetic.run("sora", 0)])
    assert not study.failures and len(study.runs) == 1 and line_of(study, "sora").mean is not None


def test_costs_come_from_the_serial_pass(tmp_path):
    final = synthetic.run("sora", 0, step_seconds=9.0, peak_bytes=9e9)
    passes = [synthetic.run("sora", repeat, "measure", step_seconds=0.2 + repeat, peak_bytes=1e6) for repeat in (0, 1)]
    line = line_of(digest(tmp_path, [final, *passes]), "sora")
    assert line.step_seconds == pytest.approx(0.7) and line.peak_bytes == 1e6
    assert line_of(digest(tmp_path, [final]), "sora").step_seconds == 9.0


def test_the_chosen_learning_rate_and_its_edge(tmp_path):
    grid = [
        synthetic.run("sora", 9, "grid", rate=rate, level=level)
        for rate, level in ((1e-4, 3.5), (1e-3, 3.2), (1e-2, 3.1))
    ]
    line = line_of(digest(tmp_path, grid), "sora")
    assert line.learning_rate == 1e-2 and line.at_edge
    line = line_of(digest(tmp_path, [*grid, synthetic.run("sora", 0, rate=1e-3)]), "sora")
    assert line.learning_rate == 1e-3 and not line.at_edge


def test_a_plan_shows_what_no_run_has_said_yet(tmp_path):
    entry = {
        "method": "sora",
        "options": {},
        "recipe": {"weight_decay": 0.1},
        "knob": {"name": "r", "value": 3},
        "trainable": 77,
    }
    plan = {"entries": [entry], "notes": ["2 documents were too long."]}
    study = digest(tmp_path, [], plan=plan)
    line = line_of(study, "sora")
    assert (line.trainable, line.knob["value"], line.recipe) == (77, 3, {"weight_decay": 0.1})
    assert "2 documents were too long." in study.notes


def test_not_a_number_is_missing_and_a_torn_line_is_told(tmp_path):
    row = synthetic.run("sora", 0, peak_bytes=float("nan"), trainable=float("inf"))
    row["test"] = {"loss": float("nan"), "per_document": []}
    path = synthetic.write(tmp_path, synthetic.study(), [row])
    path.write_text(path.read_text() + json.dumps(synthetic.run("nola", 0))[:500])
    study = read(path)
    line = line_of(study, "sora")
    assert line.mean is None and line.peak_bytes is None and line.trainable is None
    assert line_of(study, "nola").done == 0
    assert any("1 line" in note for note in study.notes)


def test_runs_on_different_documents_are_shown_but_not_ranked(tmp_path):
    rows = [synthetic.run("sora", 0), synthetic.run("nola", 0)]
    rows[1]["test"]["per_document"] = rows[1]["test"]["per_document"][:-1]
    study = digest(tmp_path, rows)
    assert line_of(study, "sora").mean is not None and line_of(study, "sora").rank is None
    assert any("could not be ranked" in note and "same test documents" in note for note in study.notes)


def test_what_is_no_study_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="cannot read the results"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds no comparison"):
        read(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(b"\x80\x81 not a study\n")
    with pytest.raises(UsageError, match="holds no comparison"):
        read(tmp_path)
