"""Errors that a user can act on: one sentence each, no traceback unless asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WeftError(Exception):
    """Something failed while working; the command line prints the sentence and exits with 1."""

    exit_code = 1


class UsageError(WeftError, ValueError):
    """The request itself is wrong, found before any work started; the command line exits with 2."""

    exit_code = 2


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to put behind "unknown ...": the nearest known name, and what there is.

    >>> nearest("sorra", ["sora", "nola"])
    "did you mean 'sora'? There are: nola, sora"
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}There are: {', '.join(known) or 'none'}"
