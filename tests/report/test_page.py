"""The report as a file: whole, self-contained, escaped, legible."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import browser
import pytest
import synthetic

import weft.report
from weft.errors import WeftError
from weft.report.library import inline, library
from weft.report.page import curve, rank_strip

HOSTILE = '"><img src=x onerror="hacked()"></script><script>hacked()</script>{{ 7*7 }}'


def page(folder, rows, **head) -> str:
    synthetic.write(folder, synthetic.study(**head), rows)
    weft.report.html(folder, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def numbers(text: str) -> dict:
    return json.loads(re.search(r'id="study-data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_report_is_small_and_loads_nothing(finished):
    text = finished.read_text(encoding="utf-8")
    assert 100_000 < len(text.encode()) < 2_000_000
    found = browser.elements(text)
    assert not [each for each in found if each.attributes.get("src")]
    assert {each.attributes["href"] for each in found if "href" in each.attributes} == {"data:,"}
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    policy = next(each for each in found if each.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'")
    assert "http" not in policy.attributes["content"]


def test_the_library_travels_along_with_its_licence(finished):
    text = finished.read_text(encoding="utf-8")
    modules = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    assert len(modules) == 2  # what draws comes after what it draws with
    assert "window.Plot = " in modules[0] and "window.d3 = " in modules[0]
    assert 'getElementById("study-data")' in modules[1]
    assert "Permission is hereby granted, free of charge" in modules[0]
    footer = re.search(r"<footer>(.*?)</footer>", text, re.DOTALL)[1]
    assert f"pyobsplot {version('pyobsplot')} (MIT licence)" in footer and "ISC licence" in footer


def test_the_library_is_read_not_imported():
    """It is a package for notebooks; importing it takes seconds and a dozen others."""
    code = "import sys; from weft.report.library import library; library(); print('pyobsplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("missing", ["the package", "the file"])
def test_without_the_library_one_sentence_says_what_to_install(tmp_path, monkeypatch, missing):
    if missing == "the package":
        monkeypatch.setattr("weft.report.library.PACKAGE", "no-such-package")
    else:
        monkeypatch.setattr("weft.report.library.FILE", "static/no-such-file.js")
    library.cache_clear()
    with pytest.raises(WeftError, match="pip install '(pyobsplot|no-such-package)>=0.5.4'") as raised:
        page(tmp_path, [])
    assert "\n" not in str(raised.value) and not (tmp_path / "report.html").exists()


def test_no_text_of_the_library_ends_its_element():
    code = """const a = "</script><p>", b = '<!-- <SCRIPT>', c = `</Script >`;"""
    text = f"<script>{inline(code)}</script><b></b>"
    assert [each.tag for each in browser.elements(text)] == ["script", "b"]
    assert "<!--" not in text
    assert inline(code).replace("<\\", "<") == code  # nothing but backslashes was put in


def test_everything_a_study_says_is_escaped(tmp_path):
    runs = [
        synthetic.run(HOSTILE, 0, knob={"name": HOSTILE, "value": HOSTILE}, recipe={HOSTILE: HOSTILE}, command=HOSTILE)
    ]
    runs[0]["ranks"] = {f"layers.0.{HOSTILE}": 2, "layers.1.a": 3}
    runs.append(synthetic.run("sora", 0, "grid", status="failed", error=HOSTILE))
    everything = dict.fromkeys(("model", "data", "task", "command", "commit", "started", "full_command"), HOSTILE)
    head = {
        "methods": (HOSTILE,),
        "seeds": (0,),
        "demo": True,
        "added": [{"methods": [HOSTILE], "started": HOSTILE}],
        "versions": {HOSTILE: HOSTILE},
        "hardware": HOSTILE,
        **everything,
    }
    text = page(tmp_path, runs, **head)
    assert "<img" not in text and 'onerror="' not in text
    assert text.count("hacked()") > 10  # it is all there, as text
    found = browser.elements(text)
    assert len([each for each in found if each.tag == "script"]) == 3  # the numbers, the library and the page's own
    assert numbers(text)["methods"][0]["name"] == HOSTILE
    assert "{{ 7*7 }}" in text  # and no template of its own


def test_methods_that_came_later_are_named_with_their_time(tmp_path):
    added = [{"methods": ["sora", "nola"], "started": "2026-01-05T10:11:12+00:00"}]
    text = page(tmp_path, synthetic.rows(), added=added)
    assert re.search(r"Added 2026-01-05 10:11<.*?sora, nola", text, re.DOTALL)


def test_no_number_in_the_page_is_not_a_number(tmp_path):
    rows = synthetic.rows()
    for row in rows[::3]:
        row |= {
            "peak_bytes": float("nan"),
            "step_seconds": float("inf"),
            "file_bytes": float("-inf"),
            "trainable": float("nan"),
        }
        row["curve"] = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0, "eval_loss": float("inf")}]
        row["forgetting"] = {"before": float("nan"), "after": 1.0}
        row["validation"] = {"loss": float("nan")}
    text = page(tmp_path, rows)
    json.loads(
        re.search(r'id="study-data">(.*?)</script>', text, re.DOTALL)[1],
        parse_constant=lambda name: pytest.fail(f"{name} in the page's JSON"),
    )
    assert not re.search(r">\s*(nan|inf|-inf|None)\s*<", text)


def test_the_table_holds_what_was_measured(finished):
    text = finished.read_text(encoding="utf-8")
    table = re.search(r'<table class="results">(.*?)</table>', text, re.DOTALL)[1]
    for name in (*synthetic.METHODS, "base", "head", "full"):
        assert f'<span class="name">{name}</span>' in table
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    vera = next(row for row in rows if "peft:vera" in row)
    assert "unreachable" in vera and "122,000" in vera and "400 MB" in vera and "r = 12" in vera
    assert table.index("For reference") > table.index("peft:vera")
    assert table.count("unreachable") == 1
    widths = {row.count("<td") + row.count("<th") for row in rows if "colspan" not in row}
    assert len(widths) == 1 and f'colspan="{widths.pop()}"' in table


def test_generation_has_columns_and_shows_what_was_written(tmp_path):
    assert "BLEU" not in page(tmp_path, synthetic.rows(("sora", "nola")))
    rows = [synthetic.written(row, HOSTILE) for row in synthetic.rows(("sora", "nola"))]
    text = page(tmp_path, rows)
    table = re.search(r'<table class="results">(.*?)</table>', text, re.DOTALL)[1]
    assert "<td>21.0 ± 1.0</td>" in table and "<td>42.0 ± 2.0</td>" in table
    cells = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    widths = {row.count("<td") + row.count("<th") for row in cells if "colspan" not in row}
    assert len(widths) == 1 and f'colspan="{widths.pop()}"' in table
    answers = re.search(r'<dl class="answers">(.*?)</dl>', text, re.DOTALL)[1]
    assert "written by nola at 0" in answers and "written by base at 0" in answers and "<img" not in answers
    assert "at 1" not in answers  # one seed is enough to see


def test_recipes_that_differ_have_a_column(tmp_path):
    rows = synthetic.rows(("sora", "nola"))
    assert "decay 0.01, warm-up 6 %, clip 1, linear" in page(tmp_path, rows)
    for row in rows:
        if row["method"] == "nola":
            row["recipe"] = {"learning_rate": 0.01, "weight_decay": 0.0}
    text = page(tmp_path, rows)
    assert ">decay 0<" in text and ">decay 0.01, warm-up 6 %, clip 1, linear<" in text


def test_a_demo_is_labelled_and_names_the_full_study(tmp_path):
    command = "weft compare --seeds 3 --output runs/all"
    text = page(tmp_path, synthetic.rows(("sora",)), demo=True, full_command=command)
    assert "This is a demo." in text and command in text
    assert "This is a demo." not in page(tmp_path, synthetic.rows(("sora",)))


def test_failed_runs_are_listed_with_their_sentence(finished):
    text = finished.read_text(encoding="utf-8")
    listed = re.search(r'<ul class="failures">(.*?)</ul>', text, re.DOTALL)[1]
    assert listed.count("<li>") == 2
    assert "The loss became NaN at step 41" in listed and "rate 0.01" in listed and "peft:dora" in listed


def test_the_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    page(tmp_path, [])
    before = (tmp_path / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        page(tmp_path, synthetic.rows(("sora",)))
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.jsonl"]


def test_a_long_curve_is_averaged_not_sampled():
    points = [{"step": step, "loss": float(step % 2)} for step in range(1, 2401)]
    drawn = curve(points, "loss")
    assert len(drawn) == 120 and drawn[-1][0] == 2400
    assert {value for _, value in drawn} == {0.5}
    assert curve(points[:3], "loss") == [[1, 1], [2, 0], [3, 1]]


def test_module_names_become_layers_and_kinds():
    strip = rank_strip(
        {"model.layers.0.attn.q": 2, "model.layers.11.attn.q": 3, "model.layers.2.mlp.up": 4, "lm_head": 5}
    )
    assert strip["kinds"] == ["q", "up", "lm_head"] and strip["layers"] == [0, 2, 11, None]
    assert ["q", 11, 3] in strip["cells"] and ["lm_head", None, 5] in strip["cells"]
    twins = rank_strip({"h.0.self.q": 1, "h.0.cross.q": 2})
    assert twins["kinds"] == ["self.q", "cross.q"]
    assert rank_strip({}) is None


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_meet_the_contrast_that_wcag_asks_for():
    """4.5 for text and 3 for marks, in the light, the dark and the printed scheme."""
    style = (files("weft.report") / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6}|#[0-9a-f]{3})\b", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 3
    for scheme in schemes:
        full = {
            name: "#" + "".join(sign * 2 for sign in code[1:]) if len(code) == 4 else code
            for name, code in scheme.items()
        }
        for name in ("ink", "soft", "warn"):
            assert _contrast(full[name], full["paper"]) >= 4.5
        assert _contrast(full["warn"], full["warn-wash"]) >= 4.5
        for name in ("reference", *(f"c{index}" for index in range(8))):
            assert _contrast(full[name], full["paper"]) >= 3, (name, full[name])
        assert len({full[f"c{index}"] for index in range(8)}) == 8
