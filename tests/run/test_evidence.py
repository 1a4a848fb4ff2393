"""weft adapt --method auto: the method that follows from what was measured."""

import pytest
import yaml

from weft import registry
from weft.errors import UsageError
from weft.run import evidence, methods
from weft.run.evidence import Found, Study


def study(name, kind, **found):
    rows = {method: Found(0.5, None, beaten, time=time) for method, (beaten, time) in found.items()}
    return Study(name, kind, "accuracy", "", "", 3, None, None, rows, {})


STUDIES = (
    study("one", "classification", a=(0.0, 1.2), b=(0.0, 0.8), c=(0.5, 0.5), d=(0.0, 0.1)),
    study("two", "classification", a=(0.25, 1.0), b=(0.25, 1.8), c=(1.0, 0.5)),
    study("three", "stream", b=(0.0, None), c=(0.0, None), a=(1.0, None)),
)


def test_the_least_beaten_comes_first_and_among_equals_the_fastest():
    found = evidence.candidates("classification", STUDIES)
    assert [each.name for each in found] == ["a", "b", "c"]  # d is not in every study; a takes 1.095, b 1.2
    assert [each.beaten for each in found] == pytest.approx([0.125, 0.125, 0.75])
    assert [each.time for each in found] == pytest.approx([(1.2 * 1.0) ** 0.5, (0.8 * 1.8) ** 0.5, 0.5])
    assert found[0].studies == ("one", "two")
    assert [each.name for each in evidence.candidates("stream", STUDIES)] == ["c", "b", "a"]  # times of the others


def test_the_reason_names_the_studies_and_what_was_passed_over(monkeypatch):
    monkeypatch.setattr(evidence, "studies", lambda: STUDIES)
    name, why = evidence.choose("classification", lambda name: "no convolutions" if name == "a" else None)
    assert name == "b"
    assert why[0].startswith("auto: b: on average over 2 studies of classification (one, two)") and "12%" in why[0]
    assert why[1:] == ["  passed over a: no convolutions"]
    name, why = evidence.choose("stream", lambda _: None)
    assert name == "c" and "no other of 3 methods is surely better in 1 study of stream (three)" in why[0]


def test_what_was_never_measured_is_refused(monkeypatch):
    monkeypatch.setattr(evidence, "studies", lambda: STUDIES)
    with pytest.raises(UsageError, match="no measurements for causal-lm, only for classification, stream"):
        evidence.choose("causal-lm", lambda _: None)
    with pytest.raises(UsageError, match="a: not here, and so on for all 3"):
        evidence.choose("classification", lambda _: "not here")


def test_every_method_of_the_evidence_is_one():
    for each in evidence.studies():
        assert evidence.OPPONENT in each.methods and 0.0 in {found.beaten for found in each.methods.values()}
        for name in each.methods:
            assert name in registry.cards("adapters") or methods.resolve(name), name


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    (tmp_path / "evidence.json").write_text(evidence.written(STUDIES), encoding="utf-8")
    monkeypatch.setattr(evidence, "FILE", tmp_path / "evidence.json")
    evidence.studies.cache_clear()
    try:
        assert evidence.studies() == STUDIES
    finally:
        evidence.studies.cache_clear()


def test_options_of_one_method_do_not_go_with_auto():
    given = {"model": "builtin:pycode", "data": "builtin:pydocs", "method": "auto"}
    with pytest.raises(UsageError, match="option 'r' is one of a method, and --method auto names none"):
        evidence.settled({**given, "r": 8}, None, None)
    with pytest.raises(UsageError, match="has its own optimizer"):
        evidence.settled({**given, "optimizer": "galore"}, None, None)


def test_a_run_that_has_begun_keeps_its_method(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"method": "nola"}), encoding="utf-8")
    given = {"model": "builtin:pycode", "data": "builtin:pydocs", "method": "auto", "output": str(tmp_path)}
    settled, why = evidence.settled(given, None, None)
    assert settled == {**given, "method": "nola"} and "as the run in" in why[0]
    other = {**given, "method": "sora"}
    assert evidence.settled(other, None, None) == (other, [])
