"""Which modules a user means: endings of names, or one regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable

from weft.errors import UsageError

Pattern = list[str] | str
_REGEX = re.compile(r"[*+?()\[\]|\\^$]")


def is_regex(pattern: str) -> bool:
    """A string with a letter that only regular expressions have is one; any other is one or more name endings."""
    return _REGEX.search(pattern) is not None


def matches(pattern: Pattern) -> Callable[[str], bool]:
    """A test of module names: endings between dots ("mlp.up_proj"), or one regular expression of the whole name."""
    if isinstance(pattern, str) and is_regex(pattern):
        try:
            whole = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}") from error
        return lambda name: whole.fullmatch(name) is not None
    endings = pattern.split(",") if isinstance(pattern, str) else pattern
    return lambda name: any(name == ending or name.endswith(f".{ending}") for ending in endings)


def selection(include: Pattern | None, exclude: Pattern | None) -> Callable[[str], bool]:
    """A test of module names: those that `include` matches (None: all), without those that `exclude` does."""
    included = matches(include) if include is not None else lambda name: True
    excluded = matches(exclude) if exclude is not None else lambda name: False
    return lambda name: included(name) and not excluded(name)
