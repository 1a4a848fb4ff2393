"""Images with captions: rows from folders, where texts lie beside the images or a table names them."""

from __future__ import annotations

from pathlib import Path

from weft.errors import UsageError
from weft.run import images, sources

METADATA = ("metadata.jsonl", "metadata.csv")  # where a folder of images keeps their captions


def holds_captions(folder: Path) -> bool:
    """Whether the images below a folder have captions: files of text beside them, or a table of `file_name`s."""
    there = [path for path in folder.rglob("*") if images.is_image(path)]
    for part in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())):
        if there and any((part / name).exists() for name in METADATA):
            row = sources.read_file(_metadata(part))[0]
            return "file_name" in row and "label" not in row
    texts = set(folder.rglob("*.txt"))
    return sum(path.with_suffix(".txt") in texts for path in there) > max(len(there), len(texts)) / 2


def read_folder(folder: Path) -> dict[str, list[sources.Row]]:
    """The images below a folder with their captions, by split: in train/, validation/ and test/ or without them.

    A table lies in the folder, and its names may lead into the splits' folders, or in each of those. Raises UsageError
    that names an image without caption and a caption without image.
    """
    if not any((folder / name).exists() for name in METADATA):
        return images.read_folder(folder, _captioned)
    rows = _captioned(folder)
    named = [sources.split_of(row["image"].relative_to(folder).parent) for row in rows]
    if "train" not in named:
        return {"train": rows}
    splits: dict[str, list[sources.Row]] = {}
    for split, row in zip(named, rows, strict=True):
        splits.setdefault(split or "train", []).append(row)
    return splits


def _metadata(folder: Path) -> Path:
    found = [folder / name for name in METADATA if (folder / name).exists()]
    if len(found) > 1:
        raise UsageError(f"folder {str(folder)!r} has both {METADATA[0]} and {METADATA[1]}: keep one")
    return found[0]


def _captioned(folder: Path) -> list[sources.Row]:
    there = sorted(path for path in folder.rglob("*") if images.is_image(path) and not path.name.startswith("."))
    if not there:
        raise UsageError(f"folder {str(folder)!r} holds no images")
    if any((folder / name).exists() for name in METADATA):
        return _listed(folder, _metadata(folder), there)
    texts = {path for path in folder.rglob("*.txt") if not path.name.startswith(".")}
    rows = []
    for path in there:
        caption = path.with_suffix(".txt")
        if caption not in texts:
            raise UsageError(f"image {str(path)!r} has no caption: put it into {caption.name} beside it")
        rows.append({"image": images.checked(path), "text": _read(caption)})
    if stray := texts - {path.with_suffix(".txt") for path in there}:
        raise UsageError(f"text {str(min(stray))!r} is the caption of no image: there is none of its name beside it")
    return rows


def _read(caption: Path) -> str:
    try:
        return caption.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"caption {str(caption)!r} cannot be read as UTF-8 text: {error}") from error


def _listed(folder: Path, table: Path, there: list[Path]) -> list[sources.Row]:
    """The rows of a table, each with the image that it names."""
    rows, seen = [], set()
    for number, row in enumerate(sources.read_file(table), 1):
        name = row.pop("file_name", None)
        if not isinstance(name, str) or not (folder / name).is_file():
            raise UsageError(f"{str(table)!r}, row {number}: file_name {name!r} is no file in {str(folder)!r}")
        seen.add((folder / name).resolve())
        rows.append({**row, "image": images.checked(folder / name)})
    if missing := [path for path in there if path.resolve() not in seen]:
        raise UsageError(f"image {str(missing[0])!r} has no caption: {table.name} does not name it")
    return rows
