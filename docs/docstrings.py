"""From docstrings and typed signatures to the Markdown of the reference pages."""

from __future__ import annotations

import dataclasses
import html
import importlib
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer.models

import weft

# Beyond what `import weft` offers: modules of plain functions, and the classes that a method's file builds on.
MODULES = ("weft.builtin", "weft.report")
ENGINE = {
    "weft.adapters._config": ("AdapterConfig",),
    "weft.adapters._delta": ("Site", "Group", "Delta", "LowRankDelta"),
    "weft.adapters._gated": ("GatedDelta",),
    "weft.adapters._core": ("CoreDelta",),
    "weft.steps": ("Controller",),
    "weft.adapters._bases": ("SharedBasis", "shared_basis"),
}
_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Raises|Yields):$")
_ENTRY = re.compile(r"^([\w*.][\w*., ]*): (.*)$")


def has_docstring(thing: Any) -> bool:
    """Whether a class or function says what it is in words of its own; a dataclass's generated signature is none."""
    text = thing.__dict__.get("__doc__") if inspect.isclass(thing) else inspect.getdoc(thing)
    return bool(text) and not (inspect.isclass(thing) and text.startswith(f"{thing.__name__}("))


# --- docstrings -------------------------------------------------------------------------------------------------------


def markdown(docstring: str) -> str:
    """A docstring as Markdown: prose, indented formulas, doctests as fenced code, `Args:` and the like as lists.

    >>> print(markdown("One line.\\n\\nArgs:\\n    x: a tensor,\\n        out × in."))
    One line.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - `x`: a tensor, out × in.
    """
    return "\n\n".join(_block(lines) for lines in _blocks(inspect.cleandoc(docstring)))


def _blocks(text: str) -> Iterator[list[str]]:
    """Paragraphs; a section's indented paragraphs stay with its heading."""
    block: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _block(lines: list[str]) -> str:
    heading = _SECTION.match(lines[0])
    if heading:
        return f"**{heading[1]}**\n\n" + "\n".join(_entries(lines[1:]))
    if lines[0].lstrip().startswith(">>>"):
        return "```pycon\n" + inspect.cleandoc("\n".join(lines)) + "\n```"
    if all(line.startswith("    ") for line in lines):
        return "```{ .text .no-copy }\n" + inspect.cleandoc("\n".join(lines)) + "\n```"
    return prose(_joined(lines))


def _joined(lines: list[str]) -> str:
    """One paragraph; formulas that follow its first lines directly keep their own lines."""
    for start, line in enumerate(lines):
        if start and line.startswith("    "):
            tail = "\n".join(lines[start:])
            return "\n".join(lines[:start]) + "\n\n```{ .text .no-copy }\n" + inspect.cleandoc(tail) + "\n```"
    return "\n".join(lines)


def _entries(lines: list[str]) -> Iterator[str]:
    entries: list[list[str]] = []
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    for line in lines:
        fresh = len(line) - len(line.lstrip()) == indent
        if fresh or not entries:
            entries.append([line.strip()])
        else:
            entries[-1].append(line.strip())
    for words in entries:
        text = " ".join(words)
        named = _ENTRY.match(text)
        if named:
            names = ", ".join(f"`{name.strip()}`" for name in named[1].split(","))
            yield f"- {names}: {prose(named[2])}"
        else:
            yield f"- {prose(text)}"


def prose(text: str) -> str:
    """Text in which nothing but `code` is markup."""
    parts = re.split(r"(```.*?```|`[^`\n]+`)", text, flags=re.DOTALL)
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"([*<>\[\]]|(?<!\w)_|_(?!\w))", lambda m: f"&#{ord(m[1])};", parts[place])
    return "".join(parts)


# --- Python -----------------------------------------------------------------------------------------------------------


def public() -> dict[str, Any]:
    """Every public name of weft with what it stands for, as `dir(weft)` lists them."""
    return {name: getattr(weft, name) for name in dir(weft) if not name.startswith("__")}


def python_page() -> str:
    """The reference of `import weft`."""
    names = public()
    configs = {name: thing for name, thing in names.items() if name.endswith("Config")}
    parts = [
        "# Python",
        "What `import weft` offers. Importing it loads neither torch, transformers nor PEFT: each name is looked up "
        "when it is first used, and the adapters become PEFT methods when PEFT is loaded.",
    ]
    parts += [_entry(f"weft.{name}", thing) for name, thing in names.items() if name not in configs]
    parts.append("## Configs of the adapters")
    parts.append("Each is a PEFT config; its page has every option.\n")
    rows = []
    for name, config in configs.items():
        slug = config.slug()
        rows.append(f"| [`weft.{name}`](../methods/{slug}.md) {{ #weft.{name} }} | {prose(weft.card(slug).summary)} |")
    parts.append("\n".join(["| config | method |", "| --- | --- |", *rows]))
    for path in MODULES:
        module = importlib.import_module(path)
        parts += [f"## {path} {{ #{path} }}", markdown(module.__doc__ or "")]
        parts += [_entry(f"{path}.{name}", getattr(module, name), 3) for name in module.__all__]
    return "\n\n".join(parts) + "\n"


def engine_page() -> str:
    """The reference of what a method's file builds on."""
    parts = [
        "# The adapter engine",
        "What a method's file builds on; [add a method](../contributing.md) shows it at work and "
        "[the architecture](../architecture.md) says why it is so.",
    ]
    for path, names in ENGINE.items():
        module = importlib.import_module(path)
        parts.append(f"## {path}")
        for name in names:
            thing = getattr(module, name)
            parts.append(_entry(f"{path}.{name}", thing, 3))
            parts += [_entry(f"{name}.{method}", member, 4) for method, member in _methods(thing)]
    return "\n\n".join(parts) + "\n"


def _methods(thing: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods that the class itself defines and describes."""
    if not inspect.isclass(thing):
        return
    for name, member in vars(thing).items():
        member = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(member) and member.__doc__:
            yield name, member


def _entry(path: str, thing: Any, level: int = 2) -> str:
    name = path.rpartition(".")[2]
    heading = f"{'#' * level} {name if level > 2 else path} {{ #{path} }}"
    if not (callable(thing) or inspect.isclass(thing)):
        shown = f"```python\n{path} = {thing!r}\n```" if isinstance(thing, dict) else ""
        return "\n\n".join(part for part in (heading, shown) if part)
    return "\n\n".join(part for part in (heading, _signature(name, thing), markdown(_own_docstring(thing))) if part)


def _own_docstring(thing: Any) -> str:
    return (thing.__doc__ or "") if has_docstring(thing) else ""


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or issubclass(thing, Exception)):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        head = f"class {name}({bases})" if bases else f"class {name}"
        fields = _field_lines(thing) if dataclasses.is_dataclass(thing) and not bases else []
        return "```python\n" + "\n".join([head + ":" * bool(fields), *fields]) + "\n```"
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    listed: list[str] = []
    for p in signature.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not any(word.startswith("*") for word in listed):
            listed.append("*")
        listed.append(_parameter(p))
    returns = signature.return_annotation
    arrow = "" if inspect.isclass(thing) or returns is signature.empty else f" -> {_annotation(returns)}"
    line = f"{name}({', '.join(listed)}){arrow}"
    if len(line) > 90 and listed:
        line = f"{name}(\n    " + ",\n    ".join(listed) + f",\n){arrow}"
    return f"```python\n{line}\n```"


def _field_lines(thing: type) -> list[str]:
    """A dataclass's fields as its source has them, with their comments."""
    lines = inspect.getsource(thing).split("\n")
    first = next(i for i, line in enumerate(lines) if re.match(r"    \w+: ", line) and '"""' not in line)
    documented = "".join(lines[:first]).count('"""') == 2  # past the docstring, whose lists of attributes look alike
    while not documented:
        first += 1
        documented = "".join(lines[:first]).count('"""') == 2 and bool(re.match(r"    \w+: ", lines[first]))
    return list(itertools.takewhile(lambda line: re.match(r"    (\w+: |#)", line), lines[first:]))


def _parameter(p: inspect.Parameter) -> str:
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    text = stars + p.name
    if p.annotation is not p.empty:
        text += f": {_annotation(p.annotation)}"
    if p.default is not p.empty:
        text += f" = {p.default!r}" if p.annotation is not p.empty else f"={p.default!r}"
    return text


def _annotation(annotation: Any) -> str:
    """An annotation without the paths of modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = text.strip("'\"") if text[:1] in "'\"" else text
    return re.sub(r"(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)


# --- command line -----------------------------------------------------------------------------------------------------


def verbs() -> list[str]:
    """The verbs of `weft`."""
    from weft.cli import main

    return main.verbs()


def verb_function(verb: str, words: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that typer reads for a verb, where these words follow it."""
    from weft.cli import main

    return main._function(verb, list(words))


def variants(verb: str) -> list[list[str]]:
    """Words with which a verb has other options; none are the first."""
    return [[], *getattr(importlib.import_module(f"weft.cli.{verb}"), "VARIANTS", ())]


def cli_page() -> str:
    """The reference of the command line, read off the functions that typer reads."""
    parts = [
        "# Command line",
        "Every verb answers `--help`. Behind any verb, `--debug` shows the traceback of an error. Errors are one "
        "sentence on standard error; the exit code is 2 where the request itself was wrong, 1 where something failed.",
    ]
    for verb in verbs():
        for words in variants(verb):
            function = verb_function(verb, words)
            parts += [" ".join(["###" if words else "##", "weft", verb, *words]), _help(function)]
            parts += _options(function)
    return "\n\n".join(parts) + "\n"


def _help(function: Callable[..., Any]) -> str:
    text = inspect.cleandoc(function.__doc__ or "")
    paragraphs = []
    for paragraph in text.split("\n\n"):
        command = re.fullmatch(r"\[bold\](weft .*?)\[/bold\]", paragraph, flags=re.DOTALL)
        if command:
            paragraphs.append(f"```sh\n{command[1]}\n```")
        else:
            words = re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", paragraph)
            paragraphs.append(prose(re.sub(r"(?<![`\w])(--[a-z-]+)(?!.*`$)", r"`\1`", words)))
    return "\n\n".join(paragraphs)


def options(function: Callable[..., Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Panel, flag, type, default and help of every parameter of a verb."""
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind, info = typing.get_args(hints.get(parameter.name, parameter.annotation))[:2]
        # inside Annotated, typer takes the first name for a default until it reads it
        first = [info.default] if isinstance(info.default, str) and info.default.startswith("-") else []
        flags = first + list(info.param_decls or ())
        if isinstance(info, typer.models.ArgumentInfo):
            flags = [parameter.name.upper()]
        elif not flags:
            flags = [f"--{parameter.name.replace('_', '-')}"]
        text, default = _plain(info.help or ""), parameter.default
        found = re.search(r"\s*\[default: (.*)\]", text)  # weft adapt writes defaults into the help itself
        shown = found[1] if found else "" if default in (None, False, parameter.empty, True) else str(default)
        shown = "" if shown == "False" else shown
        text = text.replace(found[0], "") if found else text
        if parameter.default is parameter.empty:
            shown = "*required*"
        members = [member for member in typing.get_args(kind) or (kind,) if member is not type(None)]
        name = (info.metavar or "").lower() or ("" if bool in members else _type_name(members[0]))
        yield info.rich_help_panel or "", " ".join(flags), name, shown, text


def _type_name(kind: Any) -> str:
    if inspect.isclass(kind) and hasattr(kind, "__members__"):
        return "|".join(member.value for member in kind)
    return {"Path": "path", "str": "text"}.get(getattr(kind, "__name__", ""), getattr(kind, "__name__", "text"))


def _plain(text: str) -> str:
    from rich.text import Text

    return " ".join(Text.from_markup(text).plain.split())


def _options(function: Callable[..., Any]) -> Iterator[str]:
    panels: dict[str, list[str]] = {}
    for panel, flags, kind, default, text in options(function):
        name = "<br>".join(f"`{flag}`" for part in flags.split() for flag in part.split("/"))
        value = f"<br><small>{html.escape(kind)}</small>" if kind else ""
        end = f"; {default}" if default == "*required*" else f"; default `{default}`" if default else ""
        cells = [name + value, prose(text.rstrip(".")) + end]
        panels.setdefault(panel, []).append("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |")
    for panel, rows in panels.items():
        title = f"**{panel}**\n\n" if panel else ""
        yield title + "\n".join(["| option | |", "| --- | --- |", *rows])
