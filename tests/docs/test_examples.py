"""Every Python block of the documentation runs, every command line is one that weft takes."""

from __future__ import annotations

import doctest
import re
import shlex

import fences
import pytest
import yaml

import weft

_WITH_PYTHON = [page for page in fences.PAGES if fences.blocks(page, "python") and page.name != "CONTRIBUTING.md"]
_WITH_COMMANDS = [page for page in fences.PAGES if fences.commands(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", _WITH_PYTHON, ids=fences.name)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in fences.blocks(page, "python"):
        exec(compile(block, fences.name(page), "exec"), names)


@pytest.mark.parametrize("slug", sorted(weft.cards("adapters")))
def test_what_a_method_page_says_attaches_it(slug):
    import generate
    import torch
    from transformers import AutoModelForCausalLM

    from weft.builtin import model_path

    usage = generate._usage(slug, weft.card(slug))
    code = usage.partition("```python\n")[2].partition("```")[0]
    ids = torch.arange(2, 34)[None]
    known = {
        "model": AutoModelForCausalLM.from_pretrained(model_path("pycode")),
        "batches": [{"input_ids": ids, "labels": ids}],
        "held_out": [{"input_ids": ids, "labels": ids}],
    }
    known["original_weights"] = known["model"]
    known["quality"] = 0.5
    exec(code, known)
    adapted = [name for name, _ in known["model"].named_modules() if name.endswith(f"weft_{slug}_delta")]
    assert adapted and any(p.requires_grad for p in known["model"].parameters())
    command = usage.partition("```sh\n")[2].partition("```")[0].replace("\\\n", " ").split()
    _parse(command[1:])


def test_the_readme_has_its_example_in_twelve_lines():
    (example,) = fences.blocks(fences.ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) == 12
    assert "weft.SoraConfig" in example and "optimizers=weft.optimizer_and_scheduler" in example


@pytest.mark.parametrize("page", _WITH_COMMANDS, ids=fences.name)
def test_command_lines_are_taken(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in fences.blocks(page, "yaml"):  # the run file that a command of the page names
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    for words in fences.commands(page):
        _parse(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in fences.PAGES if fences.blocks(page, "console")], ids=fences.name)
def test_shown_outputs_are_what_the_commands_print(page, tmp_path, monkeypatch, capfd):
    from weft.cli.main import run

    monkeypatch.chdir(tmp_path)
    shown = [part for block in fences.blocks(page, "console") for part in re.split(r"^\$ weft ", block, flags=re.M)[1:]]
    for part in shown:
        command, _, wanted = part.partition("\n")
        run(shlex.split(command))
        got = capfd.readouterr()
        same = doctest.OutputChecker().check_output(wanted, got.out + got.err, doctest.ELLIPSIS)
        assert same, f"weft {command} printed:\n{got.out}{got.err}"


def test_an_option_that_is_not_there_is_found():
    with pytest.raises(Exception, match="sparse"):
        _parse(["adapt", "--model", "m", "--data", "d", "--method", "sora", "--output", "o", "--sparse-lamda", "1"])
    with pytest.raises(Exception, match="rank"):
        _parse(["adapt", "--model", "m", "--data", "d", "--method", "sora", "--output", "o", "--r", "0"])


def test_the_run_file_in_the_documentation_is_one():
    from weft.run.adapt import request

    (text,) = fences.blocks(fences.ROOT / "docs" / "howto" / "data.md", "yaml")
    assert request(yaml.safe_load(text)).method.config.r == 16


def test_the_tasks_in_the_documentation_are_a_stream(tmp_path):
    from weft.run.stream import read_tasks

    (text,) = fences.blocks(fences.ROOT / "docs" / "howto" / "streams.md", "yaml")
    (tmp_path / "tasks.yaml").write_text(text)
    assert [task["name"] for task in read_tasks(str(tmp_path / "tasks.yaml"))] == ["news", "questions", "reviews"]
    assert len(read_tasks(str(fences.ROOT / "benchmarks" / "streams" / "tasks.yaml"))) == 5


def _parse(words: list[str]) -> None:
    """What weft does with a command line before it does anything: parse it, and check a run's options."""
    import typer.main

    from weft.cli.main import application
    from weft.run.adapt import request

    group = typer.main.get_command(application(words))
    context = group.make_context("weft", list(words))
    name, verb, rest = group.resolve_command(context, list(words))
    given = verb.make_context(name, list(rest), parent=context).params
    if name == "adapt" and not given["config"]:
        own = {key: value for key, value in given.items() if key not in ("config", "dry_run", "resume", "stream")}
        rows = {"data": "each task's own"} if given["stream"] else {}
        request({key: value for key, value in own.items() if value is not None} | rows)
    if name == "compress" and not given["config"]:
        from weft.run import compress

        own = {key: value for key, value in given.items() if key not in ("config", "plan", "resume")}
        compress.request({key: value for key, value in own.items() if value is not None})
    if name == "compare" and given["pillar"] == "compress":
        from weft.run.tradeoffs import Study

        Study(given["model"], given["data"], tuple(given["methods"].split(",")), (0.5,), data2=given["data2"])
    elif name == "compare":
        from weft.run.budget import parse_budget
        from weft.run.methods import resolve

        parse_budget(given["budget"])
        for method in given["methods"].split(","):
            prefix = f"{method}."
            settings = [text.removeprefix(prefix) for text in given["setting"] or () if text.startswith(prefix)]
            resolve(method, dict(text.split("=", 1) for text in settings))
