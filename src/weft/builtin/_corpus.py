"""The texts of `weft.builtin`, read from the running Python: nothing is copied into the package, nothing is downloaded.

Every split is fixed by name, never by position, so a Python that adds a module or a topic moves no other one.
"""

import hashlib
import re
import sysconfig
import tokenize
from pathlib import Path

from weft.errors import WeftError

SPLITS = ("train", "validation", "test")

# Modules that `builtin:pycode` never saw: single files that exist, under these names, in Python 3.11 to 3.14.
_HELD_OUT_LINES = {
    "train": """
        base64 bdb bisect calendar cmd codeop colorsys configparser copy csv difflib filecmp fnmatch ftplib getopt
        getpass gettext graphlib heapq hmac linecache mimetypes optparse poplib pprint quopri reprlib sched selectors
        shelve statistics tempfile timeit webbrowser zipapp
    """,
    "validation": "fileinput gzip netrc queue random shlex symtable",
    "test": "fractions plistlib pstats secrets socketserver textwrap trace wave weakref",
}
HELD_OUT = {split: lines.split() for split, lines in _HELD_OUT_LINES.items()}

# Not code worth learning: test suites, other people's packages, generated tables; and `pydoc_data`, the other task.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "ensurepip", "encodings"}
_SKIPPED_FOLDERS |= {"msilib", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
_SKIPPED_FILES = {"html/entities.py", "locale.py", "stringprep.py", "this.py"}
_SEEN_TOPICS = {"debugger"}  # the manual of pdb, which that module's own docstrings repeat
_LONG_PARAGRAPH = 60  # characters; shorter ones, such as a line of syntax, may occur anywhere
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # what the build of this one interpreter left behind


def library_folder() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_source(path: Path) -> str:
    """Source text of one Python file, decoded as the file itself declares."""
    with tokenize.open(path) as file:
        return file.read()


def _is_code_to_learn(relative: Path) -> bool:
    held_out = {f"{name}.py" for names in HELD_OUT.values() for name in names}
    name = relative.as_posix()
    return not (
        name in held_out
        or name in _SKIPPED_FILES
        or _SKIPPED_FOLDERS.intersection(relative.parts)
        or relative.parts[0].startswith(_SKIPPED_PREFIXES)
    )


def training_rows() -> list[dict[str, str]]:
    """The modules that `builtin:pycode` learns from, sorted by name: rows of `text` and `name`."""
    folder = library_folder()
    relatives = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    rows = [
        {"text": read_source(folder / relative), "name": relative.as_posix()}
        for relative in relatives
        if _is_code_to_learn(relative)
    ]
    return [row for row in rows if row["text"].strip()]


def stdlib_rows(split: str) -> list[dict[str, str]]:
    """Held-out modules of one split, in the order of `HELD_OUT`: rows of `text` and `name`."""
    folder = library_folder()
    missing = [name for name in HELD_OUT[split] if not (folder / f"{name}.py").is_file()]
    if missing:
        raise WeftError(
            f"builtin:stdlib reads the source of Python's standard library, and {folder} lacks {missing[0]}.py; "
            "use a Python that ships its library as source files."
        )
    return [{"text": read_source(folder / f"{name}.py"), "name": name} for name in HELD_OUT[split]]


def split_of(name: str) -> str:
    """Split of one named thing, a function of its name alone: about 70 % train, 15 % validation, 15 % test."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.7 else "validation" if share < 0.85 else "test"


def topic_groups(topics: dict[str, str]) -> dict[str, str]:
    """First name of the group of each topic: topics that share a paragraph, directly or through others, are one group.

    Some topics of pydoc are chapters that repeat others in full (`specialnames` holds `customization`), so a split by
    topic alone would test on text that was trained on.
    """
    owners: dict[str, set[str]] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if len(words := " ".join(paragraph.split())) >= _LONG_PARAGRAPH:
                owners.setdefault(words, set()).add(name)
    group = {name: name for name in topics}
    for names in owners.values():
        joined = {group[name] for name in names}
        if len(joined) > 1:
            group = {name: min(joined) if first in joined else first for name, first in group.items()}
    return group


def pydocs_rows(split: str) -> list[dict[str, str]]:
    """English help topics of `pydoc` in one split, sorted by topic: rows of `text` and `name`."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise WeftError(
            "builtin:pydocs reads the help topics of pydoc, and this Python comes without pydoc_data; "
            "install the full standard library."
        ) from error
    group = topic_groups({name: text for name, text in topics.items() if name not in _SEEN_TOPICS})
    return [{"text": topics[name], "name": name} for name in sorted(group) if split_of(group[name]) == split]
