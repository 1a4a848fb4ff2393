"""Numbers as a reader wants them: few digits, a unit, and a dash where nothing was measured."""

from __future__ import annotations

import math
import re
from typing import Any

NOTHING = "–"


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, not a number or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: float | None, digits: int = 4) -> str:
    """At most `digits` significant digits: 0.0003, 12.5, 1.2e-05.

    >>> number(0.0003), number(3.14159), number(None)
    ('0.0003', '3.142', '–')
    """
    return NOTHING if value is None else f"{value:.{digits}g}"


def count(value: float | None) -> str:
    """A count with thousands separated: 49,152."""
    return NOTHING if value is None else f"{round(value):,}"


def short_count(value: float | None) -> str:
    """A count in three digits, for narrow tables: 49.2k.

    >>> short_count(49_152), short_count(12)
    ('49.2k', '12')
    """
    if value is None or value < 1000:
        return count(value)
    return _scaled(value, ((1e9, "B"), (1e6, "M"), (1e3, "k"))).replace(" ", "")


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    fitting = (step for step in steps if abs(value) >= step[0] * 0.9995)
    size, unit = next(fitting, steps[-1])
    scaled = value / size
    digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f} {unit}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 199 kB, 1.25 GB.

    >>> size(1_250_000_000), size(12)
    ('1.25 GB', '12.0 B')
    """
    return NOTHING if value is None else _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them: 412 ms, 3.20 s."""
    return NOTHING if seconds is None else _scaled(seconds, ((60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def spread(mean: float | None, deviation: float | None, digits: int, unit: str = "") -> str:
    """A mean and its standard deviation over seeds: 3.124 ± 0.008; without a deviation the mean alone."""
    if mean is None:
        return NOTHING
    shown = f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")
    return f"{shown} {unit}".strip()


def change(value: float | None, digits: int) -> str:
    """A signed difference, with a true minus sign."""
    return NOTHING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def listing(words: list[str]) -> str:
    """Words as a sentence lists them: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(amount: int, word: str) -> str:
    """The amount and its noun: 1 run, 2 runs."""
    return f"{amount:,} {word}" + ("" if amount == 1 else "s")


def minute(moment: str | None) -> str:
    """A moment of ISO 8601 to the minute.

    >>> minute("2026-01-05T10:11:12+00:00")
    '2026-01-05 10:11'
    """
    return re.sub(r"(T|\d\d:\d\d)(\d\d:\d\d).*", r" \2", moment or NOTHING)
