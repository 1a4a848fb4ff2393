"""The report of a stream, from the files that it leaves."""

import io
import json

import browser
import pytest
import yaml
from browser import MEASURE, assert_sound

from weft.errors import UsageError
from weft.report import stream
from weft.run.stream import summary

NAMES = ["news", "questions", "a_rather_long_name_of_a_task"]
MATRIX = [[0.25, 0.2, 0.5], [0.9, 0.25, 0.5], [0.8, 0.95, 0.55], [0.7, 0.85, 0.75]]


def write(folder, metric="accuracy", matrix=MATRIX):
    run = {"trainable": 1234, "steps": 100, "seconds": 30.0, "file_bytes": 1, "ranks": {"a": 3, "b": 4}}
    found = {
        "method": "codyra", "model": "org/model", "kind": "classification", "metric": metric, "tasks": NAMES,
        "splits": ["test", "test", "validation"], "matrix": matrix, **summary(matrix, higher=metric == "accuracy"),
        "runs": dict.fromkeys(NAMES, run),
    }  # fmt: skip
    (folder / "stream.json").write_text(json.dumps(found))
    (folder / "run.yaml").write_text("model: org/model\n")
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": [{"name": n, "data": f"data/{n}"} for n in NAMES]}))
    return folder


def text_of(folder):
    stream.html(folder, folder / "out.html", "weft adapt --stream <tasks>")
    return (folder / "out.html").read_text()


def test_it_says_what_came_out(tmp_path):
    text = text_of(write(tmp_path))
    assert "After 3 tasks the mean accuracy is 76.7 %; the tasks before the last have lost 15.0 points" in text
    for figure in ("codyra on 3 tasks in a row", "+15.0 points", "300", "1.50 min", "3.5", "weft adapt --stream &lt;"):
        assert figure in text, figure
    assert "<td>90.0 %</td><td>25.0 %</td>" in text  # the matrix, for readers without JavaScript


def test_losses_have_nats(tmp_path):
    text = text_of(write(tmp_path, "loss", [[3.0, 4.0, 5.0], [1.0, 3.5, 5.0], [1.5, 2.0, 4.0], [0.5, 2.5, 3.0]]))
    assert "the mean loss is 2.000; the tasks before the last have lost 0.000 nats" in text
    assert "−0.500 nats" in text  # the first is better than ever


def test_the_table_for_the_terminal(tmp_path):
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(stream.terminal_table(write(tmp_path)))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if line.startswith("questions"))
    assert row.split()[1::2] == ["80.0", "95.0", "55.0"]
    assert any(line.startswith("forgetting: +15.0 points") for line in lines)


def test_a_folder_without_a_finished_stream_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no finished stream"):
        stream.html(tmp_path, tmp_path / "out.html", "")
    assert not (tmp_path / "out.html").exists()


@browser.needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_the_heat_map_has_a_cell_for_each_score(tmp_path, width):
    text_of(write(tmp_path))
    page = browser.show(tmp_path / "out.html", script=MEASURE, width=width)
    assert_sound(page)
    assert page.root["data-figures"] == "1"
    assert len(page.marks("cells", figure="heat")) == 12 and len(page.marks("own", figure="heat")) == 3
