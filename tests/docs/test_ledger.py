"""The ledger is what its figures say, and every adapter has a claim in it."""

from __future__ import annotations

import importlib.util
import sys

import fences
import forked
import pytest

import weft

CLAIMS = fences.ROOT / "benchmarks" / "claims"


@pytest.fixture(scope="module")
def ledger():
    spec = importlib.util.spec_from_file_location("ledger_of_claims", CLAIMS / "ledger.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_adapter_has_a_measured_claim():
    measured = {path.stem for path in (fences.ROOT / "benchmarks" / "results" / "claims").glob("*.jsonl")}
    written = {path.stem for path in CLAIMS.glob("*.py")}
    assert set(weft.cards("adapters")) <= measured & written


@pytest.mark.slow
def test_the_page_is_what_the_figures_say(tmp_path):
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1])\n"
        "print(runpy.run_path(sys.argv[1] + '/__main__.py')['page'](), end='')"
    )
    done = forked.run(["-c", code, CLAIMS])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (fences.ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")


def rows(a, b):
    return [{"ours": x, "theirs": y} for x, y in zip(a, b)]


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([1.0, 1.1, 1.2, 1.3], [2.0, 2.2, 2.1, 2.4], "holds"),
        ([2.0, 2.2, 2.1, 2.4], [1.0, 1.1, 1.2, 1.3], "reversed"),
        ([1.0, 2.0, 1.0, 2.0], [2.0, 1.0, 2.0, 1.0], "tie"),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], "tie"),
    ],
)
@pytest.mark.parametrize("ratio", [False, True])
def test_an_order_needs_an_interval_without_zero(ledger, a, b, word, ratio):
    assert ledger.judge(ledger.Order("ours", "theirs", ratio=ratio), rows(a, b)).word == word
    opposite = {"holds": "reversed", "reversed": "holds", "tie": "tie"}[word]
    assert ledger.judge(ledger.Order("ours", "theirs", higher=True, ratio=ratio), rows(a, b)).word == opposite


def test_an_order_against_a_constant(ledger):
    verdict = ledger.judge(ledger.Order("ours", 1.5), rows([1.0, 1.1, 1.2], [0, 0, 0]))
    assert verdict.word == "holds" and verdict.words.startswith("ours 1.1 against 1.5: −0.4 (−0.5 to −0.3)")


@pytest.mark.parametrize(
    ("a", "word"),
    [
        ([1.0, 1.1, 0.9, 1.0], "holds"),
        ([1.005, 1.004, 1.006, 1.005], "holds"),  # surely behind, by half a per cent
        ([1.2, 1.21, 1.19, 1.2], "reversed"),
    ],
)
def test_close_is_not_surely_behind_or_within_one_per_cent(ledger, a, word):
    assert ledger.judge(ledger.Close("ours", "theirs"), rows(a, [1.0] * 4)).word == word
    flipped = [2 - x for x in a]
    assert ledger.judge(ledger.Close("ours", "theirs", higher=True), rows(flipped, [1.0] * 4)).word == word
