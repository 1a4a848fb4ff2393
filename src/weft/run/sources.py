"""Raw rows from wherever the user's data lies: files, folders, the hub, or what is built in."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import UsageError, WeftError, nearest

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "validation", "test")

# Words in a file's name that say which split it holds.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "heldout", "held_out"),
}
# Fewer texts than this are split inside each text, not between texts.
_FEW_TEXTS = 20

OF_IMAGES = ("image", "mask", "captioned")  # kinds of rows that hold images

# Tasks whose data is read as that of another one.
_READ_AS = {"few-shot": "image-classification", "verification": "image-classification"}

SHOTS = 5  # training images a class for few-shot, where nobody says

Row = dict[str, Any]


@dataclass
class Rows:
    """The rows of each split as the user wrote them; `held_out` says how a missing split was made, `notes` the rest.

    `purpose` is the task where the columns alone do not say it.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    kind: str
    held_out: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    purpose: str | None = None

    @property
    def task(self) -> str:
        """The task that the columns speak of."""
        of_kind = {
            "classification": "classification",
            "image": "image-classification",
            "mask": "segmentation",
            "captioned": "text-to-image",
        }
        return self.purpose or of_kind.get(self.kind, "causal-lm")


def read(
    spec: str,
    task: str = "auto",
    *,
    columns: dict[str, str] | None = None,
    validation: str | None = None,
    test: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    classes: Sequence[str] = (),
    shots: int | None = None,
) -> Rows:
    """Read every row of a data source and settle what it is for.

    Args:
        spec: a file (.txt .jsonl .json .csv .tsv .parquet, each also .gz), a folder of them, a data set on the hub
            ("name" or "name:configuration"), or "builtin:stdlib", "builtin:pydocs"; images as `run.images` reads them,
            or "builtin:digits", "builtin:digits-shifted".
        task: "causal-lm", "classification", "image-classification", "few-shot" (of it), "verification" (of images
            whose labels are identities, which may differ from split to split), "segmentation", "text-to-image", or
            "auto": by what the rows hold, classification where there is a `label` column, segmentation where a `mask`,
            text-to-image where an image has text.
        columns: our name → the source's name, for sources that call their columns otherwise.
        validation, test: further sources that hold these splits.
        validation_fraction, test_fraction: what is held out of train where a split is missing; 0 for none.
        seed: draws the held-out rows and the shots.
        shots: training images a class for few-shot; None takes 5.
        classes: the labels in the model's order, which is kept where they are the data's.

    Raises UsageError, in one sentence, for whatever cannot be read or is not usable.
    """
    asked, task = task, _READ_AS.get(task, task)
    splits = _split_rows(spec, task)
    for name, other in (("validation", validation), ("test", test)):
        if other is not None:
            given = _split_rows(other, task)
            splits[name] = given.get(name) or given.get("train") or next(iter(given.values()))
    for name in SPLITS:
        splits[name] = [_renamed(row, columns or {}) for row in splits.get(name, [])]
    if not splits["train"]:
        raise UsageError(f"data {spec!r} holds no rows to train on")
    kind = _kind(spec, splits["train"][0], task)
    for name in SPLITS:
        checked = [_checked(row, kind, f"{name} row {number}", spec) for number, row in enumerate(splits[name], 1)]
        splits[name] = [row for row in checked if row]
    if not splits["train"]:
        raise UsageError(f"data {spec!r} holds only empty texts")
    rows = Rows(splits["train"], splits["validation"], splits["test"], kind)
    hold_out = _hold_out
    if asked == "verification":
        from weft.run import verification

        hold_out = verification.hold_out
    for name, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if not getattr(rows, name) and fraction > 0:
            hold_out(rows, name, fraction, seed, spec)
    if asked == "verification":
        verification.number(rows, spec)
    elif kind in ("classification", "image"):
        _number_labels(rows, spec, classes)
    if kind == "mask":
        from weft.run import segmentation

        segmentation.number_classes(rows, spec, classes)
    if asked == "few-shot":
        _draw_shots(rows, SHOTS if shots is None else shots, seed, spec)
    return rows


def read_unlabelled(spec: str, split: str, columns: dict[str, str] | None = None) -> list[Row]:
    """The rows of one split to be answered, labels and completions where there are any.

    A source without splits is taken whole, be it a file or a folder of images. Raises UsageError for a split that is
    not there.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}: {nearest(split, SPLITS)}")
    splits = {name: rows for name, rows in _split_rows(spec).items() if rows}
    if split not in splits:
        of_images = any("image" in row for row in splits.get("train", []))
        folder = Path(spec).expanduser().is_dir() and not of_images
        if set(splits) != {"train"} or folder:
            raise UsageError(f"data {spec!r} has no {split} split: there are {', '.join(splits) or 'none'}")
        split = "train"
    rows = [_renamed(row, columns or {}) for row in splits[split]]
    wanted = (("messages",), ("prompt",), ("text1", "text2"), ("text",))
    for number, row in enumerate(rows, 1):
        if "image" not in row and not any(all(row.get(name) for name in names) for names in wanted):
            raise UsageError(
                f"data {spec!r}, row {number}, has none of the columns text, prompt, messages, or text1 and text2: it "
                f"has {', '.join(map(str, row))}; name them with --columns text=..."
            )
    return rows


# --- where rows come from ---------------------------------------------------------------------------------------------


def _split_rows(spec: str, task: str = "auto") -> dict[str, list[Row]]:
    from weft.run import images

    if spec.startswith("builtin:"):
        return _builtin_rows(spec.removeprefix("builtin:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder_rows(path, task)
    if path.exists():
        if _suffix(path) == ".npz":
            return images.read_npz(path)
        return {"train": [{"image": images.checked(path)}] if images.is_image(path) else read_file(path)}
    if spec.startswith((".", "/", "~")) or _suffix(path) in (*SUFFIXES, ".npz", *images.SUFFIXES):
        raise UsageError(f"data file {spec!r} does not exist")
    return _hub_rows(spec)


def _builtin_rows(name: str) -> dict[str, list[Row]]:
    from weft import builtin

    if builtin.dataset(name) in builtin.IMAGES:
        return {split: _builtin_images(name, split) for split in SPLITS}
    try:
        return {split: list(builtin.texts(name, split)) for split in SPLITS}
    except OSError as error:
        raise WeftError(f"builtin:{name} cannot be read: {error}") from error


def _builtin_images(name: str, split: str) -> list[Row]:
    """Built-in scans as the grey levels that an image file would hold."""
    from weft import builtin

    pixels, labels = builtin.images(name, split)
    grey = ((pixels[:, 0] + 1) * 127.5).round().astype("uint8")
    return [{"image": image, "label": int(label)} for image, label in zip(grey, labels, strict=True)]


def _folder_rows(folder: Path, task: str) -> dict[str, list[Row]]:
    from weft.run import captions, images, segmentation

    if task == "segmentation" or (task == "auto" and segmentation.is_folder(folder)):
        return segmentation.read_folder(folder)
    if task in ("auto", "text-to-image") and captions.holds_captions(folder):
        return captions.read_folder(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
    looks = not files or task == "auto"
    if task == "image-classification" or (looks and images.count_within(folder) > len(files)):
        return images.read_folder(folder)
    if not files:
        raise UsageError(
            f"folder {str(folder)!r} holds no data file: there may be {', '.join(SUFFIXES)}, also .gz, or images"
        )
    named: dict[str, list[Path]] = {}
    for file in files:
        split = split_of(file.relative_to(folder))
        if split is not None:
            named.setdefault(split, []).append(file)
    chosen = named if "train" in named else {"train": files}
    return {split: [row for file in paths for row in read_file(file)] for split, paths in chosen.items()}


def split_of(relative: Path) -> str | None:
    """The split that a path speaks of: its words, from the file's name up to the folder's."""
    for part in reversed(relative.parts):
        words = part.lower().split(".", 1)[0].replace("-", "_").split("_")
        for split, known in _SPLIT_WORDS.items():
            if any(word in known for word in words):
                return split
    return None


def _hub_rows(spec: str) -> dict[str, list[Row]]:
    import datasets

    name, _, configuration = spec.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the hub's client raises its own, the network's and the operating system's errors
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
        raise UsageError(f"data {spec!r} is no file or folder here and cannot be had from the hub: {reason}") from error
    splits: dict[str, list[Row]] = {}
    for split in found:
        ours = split_of(Path(str(split)))
        if ours is not None and ours not in splits:
            splits[ours] = found[split].to_list()
    if "train" not in splits:
        raise UsageError(f"data {spec!r} has no train split: there are {', '.join(map(str, found))}")
    return splits


# --- files ------------------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(path: Path) -> list[Row]:
    """Every row of one file; a .txt is one row. Raises UsageError that names the file and, where it can, the line."""
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise UsageError(f"data file {str(path)!r} is of no known kind: {nearest(suffix, SUFFIXES)}, also .gz")
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"data file {str(path)!r} cannot be read: {reason}") from error
    if not content.strip():
        raise UsageError(f"data file {str(path)!r} is empty")
    if suffix == ".parquet":
        return _parquet_rows(path, content)
    text = _decoded(path, content)
    if suffix == ".txt":
        return [{"text": text}]
    rows = list({".jsonl": _jsonl_rows, ".json": _json_rows}.get(suffix, _table_rows)(path, text))
    if not rows:
        raise UsageError(f"data file {str(path)!r} holds no rows")
    return rows


def _decoded(path: Path, content: bytes) -> str:
    if b"\0" in content[: 1 << 16]:
        raise UsageError(f"data file {str(path)!r} is binary, not text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"data file {str(path)!r} is not UTF-8 text: bad byte at position {error.start}") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"data file {str(path)!r}, line {number}, is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UsageError(f"data file {str(path)!r}, line {number}, is not a JSON object")
        yield row


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        yield from _jsonl_rows(path, text)
        return
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"data file {str(path)!r} is not a list of JSON objects")
    yield from rows


def _table_rows(path: Path, text: str) -> Iterator[Row]:
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise UsageError(f"data file {str(path)!r}, line {reader.line_num}, does not have {columns} columns")
            yield dict(row)
    except csv.Error as error:
        raise UsageError(f"data file {str(path)!r}, line {reader.line_num}, is not a table: {error}") from error


def _parquet_rows(path: Path, content: bytes) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UsageError(f"data file {str(path)!r} is not readable as parquet: {reason}") from error


# --- what rows hold ---------------------------------------------------------------------------------------------------


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UsageError(
                f"the data has no column {theirs!r} to take {ours!r} from: {nearest(theirs, map(str, row))}"
            )
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _kind(spec: str, row: Row, task: str) -> str:
    """What a row is: chat, completion, classification, text, image, mask or captioned (an image with text)."""
    if task == "segmentation" or (task == "auto" and "image" in row and "mask" in row):
        if lacks := [column for column in ("image", "mask") if column not in row]:
            raise UsageError(
                f"data {spec!r} has no {lacks[0]} to learn from: it has {', '.join(map(str, row))}; put files into "
                "images/ and masks/, or name columns with --columns image=...,mask=..."
            )
        return "mask"
    captioned = _is_image(row.get("image")) and "text" in row and "label" not in row
    if task == "text-to-image" or (task == "auto" and captioned):
        if lacks := [column for column in ("image", "text") if column not in row]:
            raise UsageError(
                f"data {spec!r} has no {lacks[0]} to learn from: it has {', '.join(map(str, row))}; put each image's "
                "caption into a .txt of its name or into metadata.jsonl, or name columns with "
                "--columns image=...,text=..."
            )
        return "captioned"
    if task == "image-classification" or (task == "auto" and "image" in row and "text" not in row):
        for column, remedy in (("image", "--task says what else it is for"), ("label", "give each class a folder")):
            if column not in row:
                raise UsageError(
                    f"data {spec!r} has no {column} to learn from: it has {', '.join(map(str, row))}; {remedy}, or "
                    "name columns with --columns image=...,label=..."
                )
        return "image"
    if isinstance(row.get("image"), Path) or hasattr(row.get("image"), "shape"):
        raise UsageError(f"data {spec!r} holds images, which --task {task} cannot use: it is for text")
    labelled = "label" in row and ("text" in row or ("text1" in row and "text2" in row))
    if task == "classification":
        if not labelled:
            raise UsageError(
                f"data {spec!r} needs the columns text (or text1 and text2) and label to classify: it has "
                f"{', '.join(map(str, row))}; name them with --columns text=...,label=..."
            )
        return "classification"
    if "messages" in row:
        return "chat"
    if "prompt" in row and "completion" in row:
        return "completion"
    if task == "auto" and labelled:
        return "classification"
    if "text" in row:
        return "text"
    raise UsageError(
        f"data {spec!r} has none of the columns text, prompt and completion, messages, or text and label: it has "
        f"{', '.join(map(str, row))}; name them with --columns text=..."
    )


def _checked(row: Row, kind: str, where: str, spec: str) -> Row | None:
    """The columns that the kind uses; None for a row without any text."""
    if kind == "chat":
        return {"messages": _checked_messages(row.get("messages"), f"data {spec!r}, {where}")}
    wanted = {
        "text": ("text",),
        "completion": ("prompt", "completion"),
        "classification": ("text1", "text2", "label") if "text1" in row else ("text", "label"),
        "image": ("image", "label"),
        "mask": ("image", "mask", "classes") if "classes" in row else ("image", "mask"),
        "captioned": ("image", "text"),
    }[kind]
    kept = {}
    for column in wanted:
        value = row.get(column)
        if column == "label":
            if value is None or isinstance(value, (dict, list)):
                raise UsageError(f"data {spec!r}, {where}: label must be a word or a number, not {value!r}")
        elif column in ("image", "mask"):
            if not _is_image(value):
                raise UsageError(f"data {spec!r}, {where}: {column} must hold the bytes of one, not {value!r:.60}")
        elif column != "classes" and not isinstance(value, str):
            raise UsageError(f"data {spec!r}, {where}: {column} must be text, not {value!r}")
        kept[column] = value
    if kind not in OF_IMAGES and not any(kept[column].strip() for column in wanted if column != "label"):
        return None
    return kept


def _is_image(value: Any) -> bool:
    """Whether a value is a file, an array, or the bytes of an image."""
    stored = isinstance(value, dict) and value.get("bytes")
    return bool(stored) or isinstance(value, Path) or hasattr(value, "shape")


def _checked_messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: messages must be a list of objects with role and content")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: each message needs a role, not {message!r}")
        if not isinstance(message.get("content"), str):
            raise UsageError(f"{where}: the content of a {message['role']} message must be text")
    return messages


def _number_labels(rows: Rows, spec: str, classes: Sequence[str]) -> None:
    """Turn labels into numbers 0, 1, ... in sorted order of their names (as numbers where all are).

    Where they are the model's own `classes`, its order is kept, so that its head still says what it said.
    """
    named = {label_name(row["label"]) for row in rows.train}
    names = ordered(named)
    if len(names) < 2:
        raise UsageError(f"data {spec!r} has only the label {names[0]!r} in train: nothing to tell apart")
    names = list(classes) if sorted(classes) == sorted(names) else names
    numbers = {name: number for number, name in enumerate(names)}
    for split in SPLITS:
        for row in getattr(rows, split):
            name = label_name(row["label"])
            if name not in numbers:
                aim = "; identities that training does not see are for --task verification" * (rows.kind == "image")
                raise UsageError(f"data {spec!r}: label {name!r} of {split} never occurs in train{aim}")
            row["label"] = numbers[name]
    rows.labels = names


def _draw_shots(rows: Rows, shots: int, seed: int, spec: str) -> None:
    """Leave `shots` training rows of each class, drawn by seed, in their order."""
    dice, kept = random.Random(f"{seed}/shots"), []
    for number, name in enumerate(rows.labels or []):
        places = [place for place, row in enumerate(rows.train) if row["label"] == number]
        if len(places) < shots:
            raise UsageError(f"data {spec!r} has {len(places)} of {name!r} to train on, fewer than shots={shots}")
        kept += dice.sample(places, shots)
    rows.train = [rows.train[place] for place in sorted(kept)]
    classes = len(rows.labels or [])
    rows.notes.append(f"few-shot: {shots} of each of {classes} classes to train on, drawn with seed {seed}")


def ordered(names: set[str]) -> list[str]:
    """Names of labels in order: as numbers where all are."""
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def label_name(label: Any) -> str:
    """A label as it is shown and saved."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label)


# --- splits that are not given ----------------------------------------------------------------------------------------


def _hold_out(rows: Rows, name: str, fraction: float, seed: int, spec: str) -> None:
    """Move a share of train to the split `name`: whole rows drawn by seed, or the ends of few long texts."""
    if rows.kind == "text" and len(rows.train) < _FEW_TEXTS:
        pieces = [_cut_text(row["text"], fraction) for row in rows.train]
        rows.train = [{"text": head} for head, _ in pieces if head.strip()]
        setattr(rows, name, [{"text": tail} for _, tail in pieces if tail.strip()])
        rows.held_out.append(f"{name}: the last {fraction:.0%} of each of {len(pieces)} texts")
    else:
        count = min(max(1, round(fraction * len(rows.train))), len(rows.train) - 1)
        drawn = set(random.Random(f"{seed}/{name}").sample(range(len(rows.train)), count))
        setattr(rows, name, [row for index, row in enumerate(rows.train) if index in drawn])
        rows.train = [row for index, row in enumerate(rows.train) if index not in drawn]
        rows.held_out.append(f"{name}: {count} of {count + len(rows.train)} rows, drawn with seed {seed}")
    if not rows.train or not getattr(rows, name):
        raise UsageError(f"data {spec!r} is too little to hold out {fraction:.0%} for {name}")


def _cut_text(text: str, fraction: float) -> tuple[str, str]:
    """Head and tail of a text, cut at the end of a line where one is near."""
    cut = round(len(text) * (1 - fraction))
    line_end = text.rfind("\n", 0, cut)
    if line_end > cut - len(text) * fraction / 2:
        cut = line_end + 1
    return text[:cut], text[cut:]
