"""weft compare --pillar compress: its table and report, how it goes on, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import shlex

import pytest
import tiny

from weft.run import costs, point, spread


@pytest.fixture
def here(monkeypatch):
    """Points are measured in this process, and their speeds in no time."""

    class Pool:
        def __init__(self, function, context, workers, threads):
            self.function, self.context, self.made = function, context, []

        def free(self):
            return 1 - len(self.made)

        def submit(self, task):
            self.made.append((task, self.function(self.context, task)))

        def next(self):
            return self.made.pop()

    speed = {"prefill": {"1": 2000.0, "16": 3000.0}, "decode": {"1": 30.0, "16": None}}
    monkeypatch.setattr(costs, "speeds", lambda bases: dict.fromkeys(bases, speed))
    monkeypatch.setattr(spread, "processes", lambda *given: contextlib.nullcontext(Pool(*given)))
    point._bench.cache_clear()


def words_of(llama, corpus, output, *more, methods="svd,svd_llm", keep="0.6,0.8"):
    words = ["compare", "--pillar", "compress", "--model", llama, "--data", corpus, "--methods", methods]
    return [*words, "--keep", keep, "--samples", 8, "--max-length", 24, "--output", output, *more]


def test_a_table_and_a_report(weft, llama, corpus, here, tmp_path):
    other = tiny.write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in tiny.sentences(5, seed=1)])
    words = words_of(llama, corpus, tmp_path / "out", "--data2", other)
    code, out, err = weft(*words)
    assert (code, err) == (0, ""), err
    assert "1/9 dense: perplexity" in out and "9/9 svd_llm 0.6 speed: 30 tokens/s written" in out
    table = out.partition("perplexity    ")[2]
    assert table.index("0.8") < table.index("0.6") and "0.8: " in out and "test: 5 rows of 5 texts" in out
    assert all(len(line) <= 80 for line in table.splitlines() if line.startswith(("0.", "   ")))
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and rows[0]["pillar"] == "compress" and all(row["status"] == "ok" for row in rows[1:])
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Ranking at each share" in report and "other.jsonl" in report and "keep 0.8" in report
    # the command in the report is this study
    code, out, _ = weft(*shlex.split(rows[0]["command"])[1:])
    assert code == 0 and "perplexity" in out and (tmp_path / "out" / "results.jsonl").read_text().count("\n") == 10
    err = weft(*words, "--samples", 9)[2]
    assert "holds a study with samples 8" in err and err.count("\n") == 1


def test_what_is_trained_stands_beside_what_is_made_at_once(weft, llama, corpus, here, tmp_path):
    """Trained points cost what untrained ones do, but for time, and a method that learns has both."""
    words = words_of(
        *(llama, corpus, tmp_path / "out", "--train", "steps=6,learning_rate=0.003", "--set", "pela.gamma=0.5"),
        *("--test-fraction", 0.2), methods="svd,svd+train,pela,pela+train", keep="0.6",
    )  # fmt: skip
    code, out, err = weft(*words)
    assert (code, err) == (0, ""), err
    assert "Names with +train are trained after they are made, on the calibration data: steps=6" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()][1:]
    assert all(row["status"] == "ok" for row in rows), rows
    found = {row["method"]: row for row in rows if row["phase"] == "quality"}
    assert list(found) == ["svd", "svd+train", "pela", "pela+train"]
    losses = {name: row["corpora"][0]["loss"] for name, row in found.items()}
    assert losses["svd"] == losses["pela"] and len(set(losses.values())) == 3  # untrained, they are one
    assert max(losses["svd+train"], losses["pela+train"]) < losses["svd"]
    assert len({row["bits"] for row in found.values()}) == 1
    assert {name for name, row in found.items() if row["train_seconds"] is not None} == {"svd+train", "pela+train"}
    assert "--train steps=6,learning_rate=0.003" in found["pela+train"]["command"]
    assert "--train steps=0" in found["pela"]["command"] and "--gamma 0.5" in found["pela"]["command"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "results.jsonl"]
    assert "Made in,<br>trained in" in (tmp_path / "out" / "report.html").read_text()


def test_the_command_of_a_study_is_that_study(monkeypatch, llama):
    from weft.cli import _compare_compress
    from weft.cli.main import run
    from weft.run.tradeoffs import Study

    made = []
    monkeypatch.setattr(_compare_compress, "run_study", lambda study, output, **more: made.append((study, str(output))))
    study = Study(
        **{"model": str(llama), "data": "a b.txt", "methods": ("lord", "pela+train"), "keeps": (0.9, 0.5), "rows": 7},
        **{"test_data": "t.txt", "test_fraction": 0.25, "data2": "d.txt", "columns": {"text": "body"}, "bf16": True},
        **{"options": {"lord": {"center": "false"}}, "include": "q_proj,k_proj", "exclude": "o_proj", "speed": False},
        **{"samples": 3, "max_length": 9, "batch_size": 2, "seed": 4, "split_seed": 5, "threads": 2},
        **{"train": "steps=9"},
    )
    command = _compare_compress.study_command(study, "out")
    assert run(shlex.split(command)[1:]) == 0 and made == [(study, "out")]


def test_a_dry_run_measures_nothing(weft, llama, corpus, tmp_path):
    words = words_of(llama, corpus, tmp_path / "out", "--dry-run", methods="svd,armor,r_sparse", keep="0.3")
    code, out, err = weft(*words)
    assert (code, err) == (0, "") and not (tmp_path / "out").exists()
    for part in ("14 matrices", "calibration: 8 sequences", "--data2", "armor cannot store less", "7 rows"):
        assert part in out, part


def test_each_pillar_refuses_the_others_options(refuse, llama, corpus, tmp_path):
    words = words_of(llama, corpus, tmp_path / "out")
    refuse(2, *words, "--budget", "steps=3", says=("--budget is an option of --pillar adapters",))
    refuse(2, *words, "--seeds=3", says=("--seeds is an option of --pillar adapters",))
    adapters = ["compare", "--model", llama, "--data", corpus, "--methods", "sora", "--output", tmp_path / "out"]
    refuse(2, *adapters, "--keep", "0.5", says=("--keep is an option of --pillar compress",))
    refuse(2, *adapters, "--pillar=compres", says=("'compres'", "did you mean 'compress'"))
    refuse(2, *words, "--kep", "0.5", says=("--kep", "--keep"))


def test_what_cannot_be_compared(refuse, llama, corpus, tmp_path):
    def bad(*more, says, model=llama, data=corpus, **changes):
        refuse(2, *words_of(model, data, tmp_path / "out", *more, **changes), says=says)
        assert not (tmp_path / "out").exists()

    bad(methods="svd,svdd", says=("'svdd'", "did you mean 'svd'"))
    bad(methods="svd,pela+trian", says=("'pela+trian'", "did you mean 'pela'"))
    bad("--train", "steps=3", says=("--train is for methods that are trained", "+train"))
    bad("--train", "minutes=1", methods="pela+train", says=("--train minutes=1", "give steps"))
    bad("--train", "rate=1", methods="pela+train", says=("'rate'",))
    bad("--set", "pela.alpa=1", methods="pela+train", says=("pela has no option 'alpa'", "alpha"))
    bad(keep="0.5,lots", says=("--keep 'lots' is not a number",))
    bad(keep="0", says=("--keep 0",))
    bad(model=tmp_path / "none", says=("none", "neither a folder"))
    bad(data=tmp_path / "none.jsonl", says=("none.jsonl", "does not exist"))
    bad("--data2", tmp_path / "none.txt", says=("none.txt", "does not exist"))
    bad("--test-data", corpus, says=("--test-data", "calibration data itself"))
    bad("--test-fraction", 0, says=("no test split", "--test-fraction"))
    bad("--set", "svd.ron=1", says=("svd has no option 'ron'", "round_to"))
    bad("--set", "lord.center=false", says=("'lord'", "not among --methods"))
    bad("--set", "round_to=2", says=("--set svd.round_to=2",))
    bad("--include", "q_prj", says=("q_prj", "q_proj"))
    bad("--columns", "text=body", says=("'body'",))
    bad("--workers", 0, says=("--workers must be at least 1",))


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(spawn, llama, corpus, tmp_path):
    """Killed in the middle of the points; a torn line and half a work folder are left."""
    words = words_of(llama, corpus, tmp_path / "out", "--no-speed", "--workers", 1, methods="svd,svd_llm,armor")
    words += ["--set", "armor.iterations=5"]
    process = spawn(*words)
    for line in process.stdout:
        if line.startswith("3/7"):
            break
    process.kill()
    process.communicate()
    path = tmp_path / "out" / "results.jsonl"
    kept = path.read_text().splitlines()
    assert 4 <= len(kept) < 8
    again = spawn(*words)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and err == "", err
    rows = path.read_text().splitlines()
    assert rows[: len(kept)] == kept and len(rows) == 8 and f"{len(kept)}/7" in out
    keys = {(row["phase"], row["method"], row["keep"]) for row in map(json.loads, rows[1:])}
    assert len(keys) == 7 and not (tmp_path / "out" / "work").exists()
