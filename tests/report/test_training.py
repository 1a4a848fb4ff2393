"""The report of one run, from the files that the run leaves."""

import json

import browser
import pytest
import yaml
from browser import MEASURE, assert_sound

from weft.errors import UsageError
from weft.report import training

RUN = {"model": "config:org/model", "data": "some/where.txt", "method": "full", "optimizer": "galore"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    rows = [
        {"step": s, "loss": 7 - s / 100, "learning_rate": 1e-3 * s, "tokens_per_second": 100.0} for s in range(1, 301)
    ]
    rows += [{"step": s, "eval_loss": 7.1 - s / 100} for s in (100, 200, 300)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 301, "lo')
    return tmp_path


def test_a_finished_run_says_what_came_out_and_what_it_cost(folder):
    score = {"loss": 4.1234, "perplexity": 61.77}
    cost = {"trainable": 1234, "optimizer_bytes": 5_000_000, "seconds": 90.0}
    (folder / "result.json").write_text(json.dumps({"steps": 300, "validation": score, "test": {}, **cost}))
    training.html(folder, folder / "out.html", "weft <pretrain>")
    text = (folder / "out.html").read_text()
    assert "After 300 steps: loss 4.123 nats per token on the validation split, perplexity 61.77." in text
    assert "full@galore on where.txt" not in text and "full@galore on some/where.txt" in text
    for fact in ("5.00 MB", "1,234 parameters", "1.50 min"):
        assert fact in text
    assert "weft &lt;pretrain&gt;" in text


def test_a_run_under_way_has_a_report_too(folder):
    training.html(folder, folder / "out.html", "weft pretrain")
    assert "full@galore is at step 300." in (folder / "out.html").read_text()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        training.html(tmp_path, tmp_path / "out.html", "")


@browser.needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn_without_a_complaint(folder, width):
    training.html(folder, folder / "out.html", "weft pretrain")
    page = browser.show(folder / "out.html", script=MEASURE, width=width)
    assert_sound(page)
    assert page.root["data-figures"] == "3"
    assert len(page.marks("curve", key="loss")) == 2 and len(page.marks("curve", key="learning_rate")) == 1
