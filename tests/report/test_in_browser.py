"""The report as a reader meets it: opened in headless Chromium, at a desk and on a phone."""

import browser
import pytest
import synthetic
from browser import MEASURE, assert_sound

import weft.report

pytestmark = browser.needs_chromium


@pytest.fixture(scope="module")
def opened(finished):
    return browser.show(finished, script=MEASURE)


def test_every_figure_is_drawn_without_a_complaint(opened):
    assert_sound(opened)
    # gaps, four costs, two curves, forgetting, rates, ranks
    assert opened.root["data-figures"] == "10"
    assert not [each for each in opened.elements if "data-section" in each.attributes and "hidden" in each.attributes]


@pytest.mark.parametrize("cost", ["trainable", "peak_bytes", "step_seconds", "file_bytes"])
def test_a_pareto_plot_has_one_mark_a_method_and_a_front(opened, cost):
    marks = opened.marks("points", cost=cost)
    assert sorted(mark.attributes["data-m"] for mark in marks) == sorted(synthetic.METHODS)
    assert len({(mark.attributes["fill"], mark.attributes["d"]) for mark in marks}) == len(synthetic.METHODS)
    assert len(opened.marks("front", cost=cost)) == 1


def test_the_other_figures_have_a_mark_for_each_measurement(opened):
    assert len(opened.marks("means", figure="gaps")) == 13  # twelve methods, and full fine-tuning, which is near
    assert len(opened.marks("intervals", figure="gaps")) == 11  # the first has none from itself
    for curve in ("eval", "train"):
        assert {mark.attributes["data-m"] for mark in opened.marks("curve", curve=curve)} == set(synthetic.METHODS)
    assert len(opened.marks("bars", figure="forgetting")) == 14
    assert len(opened.marks("picked", figure="rates")) == 12
    lost = len(opened.marks("lost", figure="rates"))
    assert lost >= 2 and lost + len(opened.marks("tried", figure="rates")) == 60
    assert len(opened.marks("cells", figure="ranks")) == 3 * 36


def test_the_front_holds_what_is_not_beaten(finished):
    """The drawn corners against a front computed here, from the numbers in the page."""
    script = """
    const plotted = document.querySelectorAll("[data-cost=step_seconds] .front path")[0].getAttribute("d");
    document.documentElement.dataset.path = plotted;
    const { methods } = JSON.parse(document.getElementById("study-data").textContent);
    const own = methods.filter((m) => !m.reference);
    const better = (a, b) => a !== b && a.mean <= b.mean && a.step_seconds <= b.step_seconds;
    document.documentElement.dataset.front = own.filter((m) => !own.some((n) => better(n, m))).map((m) => m.name);
    """
    page = browser.show(finished, script=script)
    front = page.root["data-front"].split(",")
    assert 1 < len(front) < 12
    # from the first method: across and down to each further one, then on to the edge
    assert page.root["data-path"].count("L") == 2 * len(front)


@pytest.mark.parametrize("width", [390, 820])
def test_on_a_phone_nothing_sticks_out(finished, width):
    page = browser.show(finished, width=width, height=844, script=MEASURE)
    assert page.root["data-width"] == str(width)
    assert_sound(page)
    assert page.root["data-figures"] == "10"
    assert len(page.marks("points", cost="trainable")) == len(synthetic.METHODS)


def test_tables_scroll_inside_their_box(finished):
    script = (
        MEASURE
        + """
    const box = document.querySelector(".results").parentNode;
    document.documentElement.dataset.scrolls = box.scrollWidth > box.clientWidth + 100;
    box.scrollLeft = 150;
    const left = (node) => node.getBoundingClientRect().left;
    document.documentElement.dataset.stuck = Math.round(left(box.querySelector("tbody th")) - left(box));
    """
    )
    page = browser.show(finished, width=390, height=844, script=script)
    assert (page.root["data-scrolls"], page.root["data-stuck"]) == ("true", "0")


def test_a_method_can_be_picked_out_in_every_figure(finished):
    script = """
    document.querySelector("#legend button[value=nola]").click();
    const marks = [...document.querySelectorAll("[data-m]")];
    const lit = marks.filter((m) => !m.classList.contains("dim")).map((m) => m.dataset.m);
    document.documentElement.dataset.lit = [...new Set(lit)];
    document.documentElement.dataset.pressed = document.querySelectorAll("#legend [aria-pressed=true]").length;
    document.querySelector("#legend button[value=nola]").click();
    document.documentElement.dataset.dim = document.querySelectorAll(".dim").length;
    """
    page = browser.show(finished, script=script)
    assert (page.root["data-lit"], page.root["data-pressed"], page.root["data-dim"]) == ("nola", "1", "0")


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_a_mark_tells_its_values_when_pointed_at(finished, pointer):
    """With a finger the values stay when it is lifted, until something else is touched."""
    script = """
    const figure = document.querySelector("[data-cost=trainable]");
    const svg = figure.querySelector("svg");
    const mark = figure.querySelector(".points [data-m=nola]").getBoundingClientRect();
    const [clientX, clientY] = [mark.x + mark.width / 2, mark.y + mark.height / 2];
    const at = { pointerType: "POINTER", clientX, clientY, bubbles: true };
    for (const kind of ["pointerenter", "pointermove"]) svg.dispatchEvent(new PointerEvent(kind, at));
    const read = () => svg.querySelector("[aria-label=tip]").textContent;
    document.documentElement.dataset.tip = read();
    svg.dispatchEvent(new PointerEvent("pointerleave", at));
    document.documentElement.dataset.left = read();
    document.body.dispatchEvent(new PointerEvent("pointerdown", { pointerType: "POINTER", bubbles: true }));
    document.documentElement.dataset.after = read();
    """.replace("POINTER", pointer)
    page = browser.show(finished, script=script)
    assert "nola" in page.root["data-tip"] and "67,000" in page.root["data-tip"] and "±" in page.root["data-tip"]
    assert ("nola" in page.root["data-left"]) == (pointer == "touch")
    assert "nola" not in page.root["data-after"]


def test_the_dark_scheme_is_followed(finished):
    script = """
    const of = (node) => getComputedStyle(node);
    document.documentElement.dataset.dark = matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.paper = of(document.body).backgroundColor;
    document.documentElement.dataset.mark = of(document.querySelector(".points [data-m=sora]")).fill;
    """
    light = browser.show(finished, script=script).root
    dark = browser.show(finished, script=script, flags=("--blink-settings=preferredColorScheme=0",)).root
    assert (light["data-dark"], dark["data-dark"]) == ("false", "true")
    assert light["data-paper"] == "rgb(255, 254, 251)" and dark["data-paper"] == "rgb(21, 23, 27)"
    assert light["data-mark"] == "rgb(0, 105, 180)" and dark["data-mark"] == "rgb(68, 151, 220)"


def test_on_paper_the_figures_are_drawn_for_the_paper(finished):
    script = """
    const widths = () => ["gaps", "pareto"].map((name) => {
      return document.querySelector(`[data-figure=${name}] svg`).getAttribute("width");
    });
    document.documentElement.dataset.screen = widths();
    dispatchEvent(new Event("beforeprint"));
    document.documentElement.dataset.paper = widths();
    dispatchEvent(new Event("afterprint"));
    document.documentElement.dataset.again = widths();
    """
    root = browser.show(finished, script=script).root
    assert root["data-paper"] == "690,325"
    assert root["data-screen"] == root["data-again"] != root["data-paper"]


STATES = {
    "nothing yet": ({}, []),
    "only failed runs": (
        {},
        [synthetic.run(m, 0, "grid", status="failed", error="NaN", validation=None) for m in ("sora", "nola")],
    ),
    "interrupted": ({}, synthetic.rows()[:20]),
    "one method": ({"methods": ("sora",)}, synthetic.rows(("sora",))),
    "one seed": ({"seeds": (0,)}, synthetic.rows(seeds=(0,))),
    "bare rows": (
        {"budget": None, "seeds": None, "versions": None},
        [{"kind": "run", "method": m} for m in ("sora", "base")],
    ),
    "nulls": ({}, [{**dict.fromkeys(synthetic.run("sora", 0)), "kind": "run", "method": "sora", "status": "ok"}]),
    "accuracy": ({"task": "classification"}, [synthetic.accurate(row) for row in synthetic.rows()]),
    "twins": ({"methods": ("sora", "nola")}, [{**synthetic.run("sora", 0), "method": m} for m in ("sora", "nola")]),
    "a long name": ({"methods": ("sora" * 30,), "model": "/a/path/" + "x" * 90}, [synthetic.run("sora" * 30, 0)]),
}


@pytest.mark.parametrize("state", STATES)
def test_any_state_of_a_study_can_be_shown_on_a_phone(tmp_path, state):
    head, rows = STATES[state]
    synthetic.write(tmp_path, synthetic.study(**head), rows)
    weft.report.html(tmp_path, tmp_path / "report.html")
    page = browser.show(tmp_path / "report.html", width=390, height=844, script=MEASURE)
    assert_sound(page)
    visible = [each for each in page.elements if "data-figure" in each.attributes and "hidden" not in each.attributes]
    assert len(visible) == int(page.root["data-figures"])


def test_a_name_cannot_run_as_a_script(tmp_path):
    hostile = '"><img src=x onerror="wasHacked=1"></script><script>wasHacked=1</script>'
    rows = [
        synthetic.run(name, seed, ranks={f"h.0.{hostile}": 1, "h.1.b": 2})
        for name in (hostile, "sora")
        for seed in (0, 1)
    ]
    synthetic.write(tmp_path, synthetic.study((hostile, "sora"), (0, 1), model=hostile), rows)
    weft.report.html(tmp_path, tmp_path / "report.html")
    page = browser.show(tmp_path / "report.html", script=MEASURE)
    assert_sound(page)
    assert page.root["data-hacked"] == "no"
    assert hostile in {mark.attributes["data-m"] for mark in page.marks("points", cost="trainable")}
