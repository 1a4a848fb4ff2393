"""The report of a compression study: what its tables say, and the page in a browser at a desk and on a phone."""

from __future__ import annotations

import io
import json
import math
import re

import browser
import numpy as np
import pytest
from browser import MEASURE, assert_sound
from rich.console import Console

import weft.report
from weft.report.study import parse
from weft.report.tradeoffs import digest
from weft.run.tradeoffs import Point, empty_row

METHODS = ("svd", "fwsvd", "svd_llm", "lord", "welore", "cospadi", "armor", "r_sparse")
KEEPS = (0.9, 0.7, 0.5)
CORPORA = ("wiki.txt", "/some/where/c4.jsonl")
LOSS, DENSE_BITS = 3.0, 8_000_000.0
HARM = dict(zip(METHODS, (0.5, 0.3, 0.1, 0.1, 0.45, 0.2, 0.05, 0.02), strict=True))  # nats a token at keep 0.5


def documents(loss: float) -> list[list[float]]:
    draw = np.random.default_rng(0)
    return [[float(loss * 50 + each), 50] for each in draw.normal(0, 5, 40)]


def corpus_entry(name: str, loss: float | None, **more) -> dict:
    if loss is None:
        return {"data": name, "loss": None, "perplexity": None, "per_document": [], **more}
    table = documents(loss)
    mean = sum(nats for nats, _ in table) / (50 * len(table))
    return {"data": name, "loss": mean, "perplexity": math.exp(mean), "per_document": table, **more}


def point(method: str, keep: float, **changes) -> dict:
    harm = HARM[method] * (1 - keep) / 0.5
    apart = {"kl": harm, "agreement": 1 - harm / 2}
    kept = {"armor": max(keep, 0.63), "r_sparse": 1.05}.get(method, keep)
    layers = [
        {"name": f"model.layers.{n}.{kind}", "shape": [64, 64], "kind": "low_rank", "size": 9 + n, "bits": kept * 100}
        | {"dense": 100, "error": harm / (n + 1), "reads": 1}
        for n in range(3)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    ]
    row = empty_row(Point("quality", method, keep)) | {"status": "ok", "kept": kept, "bits": kept * DENSE_BITS}
    row |= {"dense_bits": DENSE_BITS, "reads": min(kept, keep) * DENSE_BITS, "file_bytes": 1e6, "layers": layers}
    row["corpora"] = [corpus_entry(name, LOSS + n + harm * (1 + n), **apart) for n, name in enumerate(CORPORA)]
    return row | {"command": f"weft compress --method {method}", **changes}


def speed(method: str, keep: float) -> dict:
    def of(rate):
        return {"prefill": {"1": 1000 * rate, "16": 2000 * rate}, "decode": {"1": 50 * rate, "16": None}}

    row = empty_row(Point("speed", method, keep)) | {"status": "ok", "speed": of(1 / keep), "dense_speed": of(1)}
    return row


def header(**changes) -> dict:
    facts = [{"data": name, "split": "test", "rows": 40, "documents": 40, "notes": []} for name in CORPORA]
    plan = {"matrices": 6, "dense_bits": DENSE_BITS, "corpora": facts, "notes": ["armor is <large>."]}
    plan["calibration"] = {CORPORA[0]: {"sequences": 8, "tokens": 800}}
    head = {"kind": "study", "pillar": "compress", "model": "/models/tiny", "data": CORPORA[0], "plan": plan}
    head |= {"methods": list(METHODS), "keeps": list(KEEPS), "command": "weft compare --pillar compress"}
    return head | {
        "versions": {},
        "request": {"speed": True, "samples": 8},
        "started": "2025-01-02T03:04:05+00:00",
        **changes,
    }


def dense() -> dict:
    row = empty_row(Point("dense", "dense", None)) | {"status": "ok", "kept": 1.0, "bits": DENSE_BITS}
    row |= {"dense_bits": DENSE_BITS, "reads": DENSE_BITS, "file_bytes": 2e6}
    return row | {"corpora": [corpus_entry(name, LOSS + n) for n, name in enumerate(CORPORA)]}


def all_rows() -> list[dict]:
    rows = [dense(), *(point(method, keep) for method in METHODS for keep in KEEPS)]
    return rows + [speed(method, keep) for method in METHODS for keep in KEEPS]


def write(folder, rows, **changes):
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in [header(**changes), *rows]]
    (folder / "results.jsonl").write_text("".join(lines))
    weft.report.html(folder, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tradeoffs"), all_rows())


def text_of(report) -> str:
    body = report.read_text(encoding="utf-8").partition("<main>")[2].partition("</main>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_tables_say_what_was_measured(finished):
    text = text_of(finished)
    study = digest(*parse(finished.parent))
    at = {entry.name: entry for entry in study.tables[0.5]}
    svd = math.exp(at["svd"].row["corpora"][0]["loss"])
    assert f"{svd:.2f}" in text and "not finite" not in text and "armor is &lt;large&gt;." in text
    # who stores too much for a share has no place in its ranking; who saves reading is ranked by that
    assert at["armor"].standings == [None, None] and at["r_sparse"].standings[0].rank == 1 and "stores more" in text
    assert at["svd_llm"].standings[0].rank == at["lord"].standings[0].rank == 2
    gap = at["svd"].gaps[0]
    assert gap.difference == pytest.approx(0.48) and "+0.480" in text
    assert study.verdict(0.5).startswith("r_sparse ranks first, with a perplexity of")
    assert "r_sparse" in text and "8 sequences" in text and "2025-01-02 03:04" in text and "49 of 49 rows" in text
    assert "100 " in text and "2.00k" in text  # tokens a second at keep 0.5, and the dense model's


def test_a_wreck_has_no_rank(tmp_path):
    wreck, broken = point("svd", 0.5), point("lord", 0.5)
    apart = {"kl": 1.0, "agreement": 0.1}
    wreck["corpora"] = [corpus_entry(name, LOSS + 1 + n, **apart) for n, name in enumerate(CORPORA)]
    broken["corpora"] = [corpus_entry(name, None, kl=None, agreement=0.0) for name in CORPORA]
    rows = [dense(), wreck, broken, point("svd_llm", 0.5)]
    report = write(tmp_path, rows, methods=["svd", "lord", "svd_llm"], keeps=[0.5])
    study = digest(*parse(tmp_path))
    assert [entry.name for entry in study.tables[0.5]] == ["svd_llm", "svd", "lord"]
    assert [entry.collapsed for entry in study.tables[0.5]] == [False, True, True]
    assert "not finite" in text_of(report) and study.verdict(0.5).startswith("svd_llm ranks first")
    study = digest(header(methods=["svd"], keeps=[0.5]), [dense(), wreck], [])
    assert study.verdict(0.5).startswith("no method can be recommended")


def test_a_tie_is_said_and_what_the_second_corpus_says_otherwise(tmp_path):
    draw = np.random.default_rng(1)
    rows = [dense(), point("svd", 0.5), point("lord", 0.5)]
    table = rows[1]["corpora"][0]["per_document"]
    noisy = [[nats + each, tokens] for (nats, tokens), each in zip(table, draw.normal(0, 3, 40), strict=True)]
    rows[2]["corpora"][0]["per_document"] = noisy
    study = digest(header(methods=["svd", "lord"], keeps=[0.5]), rows, [])
    assert "tie for first" in study.verdict(0.5) and study.verdict(0.5).endswith("on c4.jsonl lord ranks first")


def test_eight_methods_fit_in_80_columns(finished):
    console = Console(file=io.StringIO(), width=80)
    console.print(weft.report.terminal_table(finished.parent))
    text = console.file.getvalue()
    assert "…" not in text and text.count("r_sparse") >= 3 and "stores more" in text and "tokens/s" in text
    assert "0.5: r_sparse ranks first" in text.replace("\n", " ")


# --- in a browser -----------------------------------------------------------------------------------------------------

STATES = {
    "nothing yet": [],
    "only the dense model": [dense()],
    "everything failed": [empty_row(Point("quality", "svd", 0.5)) | {"error": "too <small>"}],
    "one point": [dense(), point("lord", 0.7)],
    "a wreck": [
        dense(),
        point("svd", 0.5, corpora=[corpus_entry(name, 300.0, kl=1.0, agreement=0.1) for name in CORPORA]),
        point("lord", 0.5),
    ],
}


@pytest.mark.parametrize("state", STATES)
def test_any_state_can_be_shown(tmp_path, state):
    report = write(tmp_path, STATES[state])
    Console(file=io.StringIO(), width=80).print(weft.report.terminal_table(tmp_path))
    assert "Ranking at each share" in text_of(report) and "None" not in text_of(report)
    if browser.PROGRAM is not None:
        assert_sound(browser.show(report, width=390, height=844, script=MEASURE))


@browser.needs_chromium
@pytest.mark.parametrize("width", [400, 1200])
def test_every_figure_is_drawn_at_every_width(finished, width):
    page = browser.show(finished, width=width, script=MEASURE)
    assert_sound(page)
    # two corpora twice, three speeds (nothing was decoded at batch 16), two maps
    assert page.root["data-figures"] == "9"
    for cost in ("bytes", "read_bytes", "decode1", "prefill16"):
        marks = page.marks("points", cost=cost, corpus="0")
        assert sorted(mark.attributes["data-m"] for mark in marks) == sorted(METHODS * len(KEEPS))
        assert {mark.attributes["data-m"] for mark in page.marks("line", cost=cost, corpus="0")} == set(METHODS)
        assert len(page.marks("dense", cost=cost, corpus="0")) == 1
    drawn = page.marks("points", cost="bytes", corpus="0")
    assert len({(mark.attributes["fill"], mark.attributes["d"]) for mark in drawn}) == len(METHODS)
    assert len(page.marks("cells", figure="sizes")) == len(page.marks("cells", figure="errors")) == 6 * len(METHODS)
    legend = [each for each in page.elements if each.tag == "button" and each.attributes.get("value") in METHODS]
    assert len(legend) == len(METHODS)


@browser.needs_chromium
def test_the_maps_show_the_share_that_is_chosen(finished):
    script = """
    const first = () => document.querySelector("[data-figure=errors] .small").textContent;
    document.documentElement.dataset.before = first();
    document.querySelector('#keeps button[value="0.5"]').click();
    document.documentElement.dataset.after = first();
    const pressed = [...document.querySelectorAll("#keeps [aria-pressed=true]")];
    document.documentElement.dataset.pressed = pressed.map((button) => button.value);
    """
    root = browser.show(finished, script=script).root
    assert root["data-before"] == "svd 0.1 to 0.3" and root["data-after"] == "svd 0.17 to 0.5"
    assert root["data-pressed"] == "0.5"
