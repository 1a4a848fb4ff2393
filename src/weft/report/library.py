"""Observable Plot and D3, as the installed package pyobsplot ships them.

pyobsplot draws in notebooks; of it the report uses one file, a JavaScript module that sets `window.d3` and
`window.Plot` (release 0.5.4: Plot 0.6.17 and D3 7.9, to go by what they export). The package itself is never
imported: that would bring IPython and polars into every command that writes a report.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from weft.errors import WeftError

PACKAGE = "pyobsplot"
FILE = "static/static-widget.js"


@dataclass(frozen=True)
class Library:
    """What the figures are drawn with.

    Attributes:
        version: of pyobsplot, which decides on those of Plot and D3.
        licence: the text that must go where the code goes; empty where the package came without.
        code: a JavaScript module, safe inside a script element.
    """

    version: str
    licence: str
    code: str


@functools.cache
def library() -> Library:
    """The plotting library of this installation.

    Raises:
        WeftError: it is missing.
    """
    try:
        package = distribution(PACKAGE)
        code = Path(str(package.locate_file(f"{PACKAGE}/{FILE}"))).read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError) as error:
        raise WeftError(
            f"the report's figures need {FILE} of the package {PACKAGE}, which is not installed here; "
            f"install it with: pip install '{PACKAGE}>=0.5.4'"
        ) from error
    licence = package.read_text("licenses/LICENSE") or package.read_text("LICENSE") or ""
    return Library(package.version, inline(licence.replace("*/", "* /").strip()), inline(code))


def inline(code: str) -> str:
    """JavaScript that cannot end the script element it stands in, nor hide that element's end.

    HTML looks for "</script" and "<!--" before JavaScript is read. Both stand in strings, patterns or comments only,
    where a backslash before a sign that needs none changes nothing.
    """
    return re.sub(r"<(?=/script|!--)", r"<\\", code, flags=re.IGNORECASE)
