"""The terminal table: legible in 80 columns."""

import io

import pytest
import synthetic
from rich.console import Console

import weft.report
from weft.report import quantities


def printed(folder, rows, **head) -> str:
    synthetic.write(folder, synthetic.study(**head), rows)
    console = Console(file=io.StringIO(), width=80)
    console.print(weft.report.terminal_table(folder))
    return console.file.getvalue()


def test_twelve_methods_fit_in_80_columns(tmp_path):
    text = printed(tmp_path, synthetic.rows())
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    for name in (*synthetic.METHODS, "base", "head", "full"):
        assert sum(name in line for line in lines if "nats" not in line) == 1
    sora = next(line for line in lines if "sora" in line and "r=2" in line)
    assert "12.0k" in sora and "310" in sora and "±" in sora
    assert "tie for first" in text and "r=12*" in text and "2 runs failed" in text


def test_generation_has_columns_that_fit_in_80_too(tmp_path):
    text = printed(tmp_path, synthetic.rows())
    assert "bleu" not in text and "memory" in text
    text = printed(tmp_path, [synthetic.written(row) for row in synthetic.rows()])
    assert "…" not in text and "bleu" in text and "rouge-l" in text and "memory" not in text and "forgot" in text
    nola = next(line for line in text.splitlines() if " nola " in line)
    assert "21.0 ± 1.0" in nola and "42.0 ± 2.0" in nola  # 20, 21, 22 and 40, 42, 44
    base = next(line for line in text.splitlines() if " base " in line)
    assert " 20.0 " in base and " 40.0 " in base


def test_optimisers_show_their_state_in_place_of_the_file(tmp_path):
    rows = [
        row | {"method": f"full@{row['method']}", "knob": None, "optimizer_bytes": 7_530_000, "trainable": 12_345_678}
        for row in synthetic.rows(("peft:adalora", "peft:dora"))
        if row["method"] not in ("base", "head", "full")
    ]
    text = printed(tmp_path, rows, methods=("full@peft:adalora", "full@peft:dora"), model="config:some.json")
    assert "…" not in text and "7.53 MB" in text and "state" in text and "file" not in text and "knob" not in text
    assert "elsewhere" in text and "forgot" not in text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [synthetic.run("sora", 0, "grid", status="failed", error="NaN")],
        [{"kind": "run", "method": "sora"}],
        synthetic.rows(("sora",), (0,)),
    ],
)
def test_any_state_of_a_study_can_be_printed(tmp_path, rows):
    text = printed(tmp_path, rows, methods=("sora", "[bold]nola"))
    assert "sora" in text and "[bold]nola" in text and "None" not in text and "nan" not in text


def test_a_demo_is_labelled(tmp_path):
    assert "Demo" in printed(tmp_path, synthetic.rows(("sora",)), demo=True)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (quantities.size(999_600), "1.00 MB"),
        (quantities.size(0), "0.00 B"),
        (quantities.duration(0.0123), "12.3 ms"),
        (quantities.duration(90), "1.50 min"),
        (quantities.duration(2e-9), "0.00 µs"),
        (quantities.count(1234567.0), "1,234,567"),
        (quantities.short_count(49_152), "49.2k"),
        (quantities.short_count(999), "999"),
        (quantities.change(-0.5, 2), "−0.50"),
        (quantities.number(0.0003), "0.0003"),
        (quantities.spread(3.1234, 0.0, 3), "3.123"),
        (quantities.spread(81.25, 0.44, 1, "%"), "81.2 ± 0.4 %"),
        (quantities.listing(["a", "b", "c"]), "a, b and c"),
        (quantities.size(None), "–"),
    ],
)
def test_quantities(shown, wanted):
    assert shown == wanted
