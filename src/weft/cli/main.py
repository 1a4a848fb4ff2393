"""`weft`: finds the verbs, runs one, and turns errors into one sentence.

A verb is a file of this folder without a leading underscore. It holds `command`, a typer function, or `build(argv)`,
which makes that function from the words that follow the verb. Only the verb that is run is imported.
"""

from __future__ import annotations

import ast
import errno
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import weft.cli
from weft.errors import WeftError, nearest

# typer's own base class of what is wrong with a command line, which it does not export
_ClickError = typer.BadParameter.__mro__[2]


def verbs() -> list[str]:
    """The verbs there are, by name."""
    return sorted(
        info.name for info in pkgutil.iter_modules(weft.cli.__path__) if info.name != "main" and info.name[0] != "_"
    )


def _help_line(verb: str) -> str:
    """The first line of the verb's docstring, read without importing it."""
    for folder in weft.cli.__path__:
        path = Path(folder) / f"{verb}.py"
        if path.exists():
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            return docstring.split("\n", 1)[0]
    return ""


def _stub() -> None:
    """Stands for a verb that is listed but not run."""


def _function(verb: str, argv: list[str]) -> Callable[..., Any]:
    module = importlib.import_module(f"weft.cli.{verb}")
    build = getattr(module, "build", None)
    return build(argv) if build is not None else module.command


def _version(wanted: bool) -> None:
    if wanted:
        print(f"weft {weft.__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show weft's version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, after any verb too.")] = False,
) -> None:
    """Low-rank methods for neural networks: adapt a model, compare methods by measurement."""


def application(argv: list[str]) -> typer.Typer:
    """The typer application for one command line: the verb in it is real, the others are only listed."""
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
    )
    app.callback()(_common)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    known = verbs()
    if wanted is not None and wanted not in known:
        raise typer.BadParameter(f"there is no verb {wanted!r}: {nearest(wanted, known)}")
    for verb in known:
        function = _function(verb, argv[argv.index(verb) + 1 :]) if verb == wanted else _stub
        app.command(verb, help=_help_line(verb) if verb != wanted else None)(function)
    return app


def _quiet() -> None:
    """Keep libraries off the terminal: what matters reaches the user as weft's own words."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    importlib.import_module("weft.run.quiet")


def _sentence(error: BaseException) -> str:
    """What to tell the user of an error, on one line."""
    if isinstance(error, _ClickError):
        possible = getattr(error, "possibilities", None)
        name = getattr(error, "option_name", None)
        if name is not None:
            return f"unknown option {name}" + (f": did you mean {list(possible)[0]}?" if possible else "")
        text = error.format_message()  # type: ignore[attr-defined]
    elif isinstance(error, WeftError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text = f"the disk is full: {error.filename or 'a file'} could not be written"
    elif type(error).__name__ == "OutOfMemoryError":
        text = "the accelerator's memory is full; a smaller --batch-size with --gradient-accumulation may help"
    else:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    return " ".join(text.split())


def run(argv: list[str]) -> int:
    """Run one command line; the exit code. One sentence on standard error where something is wrong."""
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not debug:
        _quiet()
    try:
        code = application(argv)(argv, prog_name="weft", standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            raise WeftError("interrupted; nothing was saved")
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _tell(WeftError("interrupted; nothing was saved"), debug)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _tell(error, debug)


def _tell(error: BaseException, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    # with several processes, what weft itself noticed is known to all of them: one tells
    elif not isinstance(error, WeftError) or os.environ.get("RANK", "0") == "0":
        print(f"weft: {_sentence(error)}", file=sys.stderr)
    return int(getattr(error, "exit_code", 1))


def main() -> NoReturn:
    """The `weft` command."""
    sys.exit(run(sys.argv[1:]))
