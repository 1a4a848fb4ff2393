"""From typed options to the parameters that typer reads, so that flags, help and run files have one source."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from weft.run.options import Option


def parameter(option: Option, panel: str, key: str | None = None) -> inspect.Parameter:
    """One keyword parameter for typer; None means that the flag was not given.

    `key` is the flag's name where it differs from the option's.
    """
    name = key or option.name
    flag = f"--{name.replace('_', '-')}"
    shown = option.default
    default = "" if shown is None or shown == () else f" [dim]\\[default: {_shown(shown)}][/dim]"
    text = (option.help or "").replace("[", "\\[") + default
    if option.type is bool:
        info = typer.Option(
            f"{flag}/--no-{name.replace('_', '-')}", help=text, rich_help_panel=panel, show_default=False
        )
        kind: Any = bool | None
    else:
        metavar = option.type_name.replace(" or none", "").upper()
        metavar = metavar if len(metavar) <= 24 else "VALUE"
        if metavar == "VALUE":
            text += f" [dim]({option.type_name.replace('[', chr(92) + '[')})[/dim]"
        info = typer.Option(flag, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)
        kind = str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])


def own(name: str, kind: Any, help_text: str, *flags: str) -> inspect.Parameter:
    """A keyword parameter that is no typed option: what the verb itself is told."""
    info = typer.Option(*flags, help=help_text, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])


def resume() -> inspect.Parameter:
    """The flag of verbs that train, which says what becomes of an unfinished run."""
    return own(
        "resume",
        bool | None,
        "Go on from the newest complete checkpoint, or start over; by default the same unfinished run goes on.",
        "--resume/--no-resume",
    )


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)
    return text.replace("[", "\\[")


def function(body: Callable[..., None], parameters: list[inspect.Parameter], doc: str) -> Callable[..., None]:
    """A function with exactly these parameters, as typer sees it, that hands them to `body` by name."""

    def command(**values: Any) -> None:
        body(**values)

    command.__doc__ = doc
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return command


def flags_of(command: Callable[..., Any]) -> set[str]:
    """The flags of a typer function."""
    found: set[str] = set()
    for name, entry in inspect.signature(command, eval_str=True).parameters.items():
        info = next(each for each in entry.annotation.__metadata__ if hasattr(each, "param_decls"))
        found.update(info.param_decls or [f"--{name.replace('_', '-')}"])
    return found


def method_of(argv: list[str]) -> str | None:
    """The method that words which are not parsed yet name, in a flag or in their run file; its optimiser after an @."""
    from weft.run.adapt import read_run_file, with_optimizer

    path = value(argv, "--config")
    file = read_run_file(path) if path else {}
    method = value(argv, "--method") or file.get("method")
    optimizer = value(argv, "--optimizer") or file.get("optimizer")
    return with_optimizer(method, optimizer) if isinstance(method, str) else None


def value(argv: list[str], flag: str) -> str | None:
    """The value of a flag; the last one counts."""
    found = None
    for position, word in enumerate(argv):
        if word == flag and position + 1 < len(argv):
            found = argv[position + 1]
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return found
