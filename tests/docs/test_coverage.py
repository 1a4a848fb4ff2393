"""What is public is documented: names, methods, options; and every page can be found."""

from __future__ import annotations

import docstrings
import fences
import generate
import pytest
import yaml

import weft

ROOT = fences.ROOT


def test_nothing_public_is_undocumented():
    assert generate.undocumented() == []


def test_every_public_name_is_in_the_reference(pages):
    for name in dir(weft):
        if not name.startswith("__"):
            assert f"{{ #weft.{name} }}" in pages["reference/python.md"], name


def test_every_verb_and_option_is_in_the_reference(pages):
    for verb in docstrings.verbs():
        section = pages["reference/cli.md"].partition(f"## weft {verb}\n")[2].partition("\n## ")[0]
        for words in docstrings.variants(verb):
            assert not words or f"\n### weft {verb} {' '.join(words)}\n" in section
            for _, flags, *_ in docstrings.options(docstrings.verb_function(verb, words)):
                assert all(f"`{flag}`" in section for part in flags.split() for flag in part.split("/")), (verb, flags)


@pytest.mark.parametrize("slug", sorted(weft.cards()))
def test_every_method_has_its_page_with_all_of_its_options(slug, pages):
    page = pages[f"methods/{slug}.md"]
    card = weft.card(slug)
    assert card.arxiv in page and f"`{slug}`" in page and f"({slug}.md)" in pages["methods/index.md"]
    for option in weft.config_class(slug).own_fields():
        assert f"| `{option.name}`<br>" in page, option.name


@pytest.mark.parametrize("slug", sorted(weft.cards("adapters")))
def test_a_page_tells_what_each_kind_of_weight_gets(slug, pages):
    for kind, answer in generate.attachments(slug).items():
        assert f"| {kind} | {answer} |" in pages[f"methods/{slug}.md"]
        assert answer == "yes" or len(answer) > len("no: ")


def test_the_readme_table_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert generate.readme(text) == text
    assert generate.readme(text.replace("`sora`", "`other`")) == text
    for slug in weft.cards():
        assert f"[`{slug}`]" in text


def test_the_evidence_of_auto_is_current(pages):
    """What `weft adapt --method auto` goes by is what the guide shows: both follow from the committed results."""
    studies = generate.guide.studies()
    assert generate.evidence.written(studies) == generate.evidence.FILE.read_text(encoding="utf-8")
    for study in studies:
        for name in study.methods:
            assert f"`{name}`" in pages["guide.md"], name


def test_the_navigation_has_every_page_once_and_no_other(pages):
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed (make docs installs it)")
    import hooks

    hand_written = {path.relative_to(ROOT / "docs").as_posix() for path in fences.PAGES if "docs" in path.parts}
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    hooks.complete(nav, [name.removeprefix("methods/") for name in pages if name.startswith("methods/")])
    found = list(hooks.targets(nav))
    assert sorted(found) == sorted(hand_written | set(pages))


def test_an_undocumented_option_or_name_is_found(monkeypatch):
    class Bare:
        pass

    monkeypatch.setattr(docstrings, "public", lambda: {"Bare": Bare})
    assert "weft.Bare has no docstring" in generate.undocumented()


def test_a_dataclass_signature_is_no_docstring():
    import dataclasses

    bare = dataclasses.make_dataclass("Bare", ["x"])
    assert bare.__doc__ and not docstrings.has_docstring(bare)
    assert docstrings.has_docstring(weft.Card)


def test_docstrings_become_markdown():
    text = "Adds *two* numbers.\n\n    x + y\n\nArgs:\n    x: one,\n        long.\n    y, z: others.\n\n>>> 1 + 1\n2"
    assert docstrings.markdown(text).split("\n\n") == [
        "Adds &#42;two&#42; numbers.",
        "```{ .text .no-copy }\nx + y\n```",
        "**Args**",
        "- `x`: one, long.\n- `y`, `z`: others.",
        "```pycon\n>>> 1 + 1\n2\n```",
    ]
