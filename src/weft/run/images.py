"""Images: rows from folders and arrays, and the pixels that a model takes of them.

A row's `image` is a file, an array of uint8 (height × width, or × 3) or, in tables, the bytes of a file. It is decoded
and prepared when it is asked for, and not kept, so that a folder may be larger than memory.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError
from weft.run import models, sources

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PROCESSOR = "preprocessor_config.json"  # where transformers keeps how images are prepared
_WITH_TEXT = "processor_config.json"  # or here, where a model takes texts too
_KEPT = 2**28  # bytes of prepared images that a split keeps at most
_SIDE = 224  # pixels, where neither the model nor the data says how large images are

_IMAGE_WORDS, _LABEL_WORDS = ("x", "image", "images"), ("y", "label", "labels")
_CLASS_KEYS = ("classes", "class_names", "label_names")
_FILE_MANAGERS = ("thumbs.db", "desktop.ini")  # which leave these wherever somebody looked


# --- from folders and files to rows -----------------------------------------------------------------------------------


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def count_within(folder: Path) -> int:
    """How many images there are anywhere below a folder."""
    return sum(is_image(path) for path in folder.rglob("*"))


def read_folder(
    folder: Path, read: Callable[[Path], list[sources.Row]] | None = None
) -> dict[str, list[sources.Row]]:
    """The images below a folder by split: one folder a class, in train/, validation/ and test/ or without them.

    A folder of images alone has no classes, and its rows no labels. `read`, where given, reads a split's folder. Raises
    UsageError that names what is in the way: an empty class, a file that is no image, images beside the folders of
    classes.
    """
    read = read or _labelled
    parts = _folders(folder)
    named = {part: sources.split_of(Path(part.name)) for part in parts}
    if not parts or None in named.values():
        return {"train": read(folder)}
    splits: dict[str, list[sources.Row]] = {}
    for part, split in named.items():
        if split in splits:
            raise UsageError(f"folder {str(folder)!r} has two folders for {split}: {part.name!r} is one of them")
        splits[str(split)] = read(part)
    if loose := [path for path in folder.iterdir() if is_image(path)]:
        raise UsageError(f"image {str(min(loose))!r} lies beside the folders of the splits: put it into one")
    return splits


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _labelled(folder: Path) -> list[sources.Row]:
    """The images of each class below a folder, or of a folder without classes."""
    loose, classes = sorted(path for path in folder.iterdir() if is_image(path)), _folders(folder)
    if not classes and not loose:
        raise UsageError(f"folder {str(folder)!r} holds neither images nor a folder a class: {_suffixes()}")
    if classes and loose:
        raise UsageError(f"image {str(loose[0])!r} lies beside the folders of the classes: put it into one")
    rows: list[sources.Row] = [{"image": checked(path)} for path in loose]
    for each in classes:
        files = [path for path in sorted(each.iterdir()) if not _unseen(path)]
        if not files:
            raise UsageError(f"class folder {str(each)!r} is empty: put its images there, or remove it")
        for path in files:
            if path.is_dir() or not is_image(path):
                kind = "a folder" if path.is_dir() else "no image"
                raise UsageError(f"class folder {str(each)!r} holds {path.name!r}, which is {kind}: {_suffixes()}")
            rows.append({"image": checked(path), "label": each.name})
    return rows


def _unseen(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _FILE_MANAGERS


def _suffixes() -> str:
    return f"images are {', '.join(SUFFIXES)}"


def checked(path: Path) -> Path:
    """The path of a file that begins as an image does. Raises UsageError for any other, which it names.

    What lies behind a sound beginning is seen when the image is decoded.
    """
    try:
        with _pillow().open(path) as image:
            image.verify()
    except Exception as error:  # every format's reader raises its own
        raise UsageError(f"image {str(path)!r} cannot be read: {_reason(error)}") from error
    return path


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise WeftError('reading images needs Pillow; install it with pip install "weft[vision]"') from error
    return Image


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return "it is no image that Pillow knows" if "cannot identify" in text else text or type(error).__name__


# --- from arrays to rows ----------------------------------------------------------------------------------------------


def read_npz(path: Path) -> dict[str, list[sources.Row]]:
    """The rows of a .npz file by split.

    A key is "x", "image" or "images" for images and "y", "label" or "labels" for labels, with a split's name before or
    behind it: x_train, test_labels; without one, it is the training split. `classes`, where there is one, names the
    labels. Labels of images x height x width are masks. Further arrays are not read.

    Raises UsageError, which names the array, where images and labels do not fit together.
    """
    import numpy as np

    arrays: dict[tuple[str, str], tuple[str, Any]] = {}
    names = None
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                if key in _CLASS_KEYS:
                    names = file[key]
                elif (part := _part_of(key)) is not None:
                    if part in arrays:
                        both = f"{arrays[part][0]}, {key}"
                        raise UsageError(f"data file {str(path)!r} has two arrays for one part: {both}")
                    arrays[part] = key, file[key]
            there = ", ".join(file.files)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
        raise UsageError(f"data file {str(path)!r} is not readable as .npz: {reason}") from error
    splits: dict[str, list[sources.Row]] = {}
    for (split, what), (key, found) in arrays.items():
        if what == "images":
            labels = arrays.get((split, "labels"))
            splits[split] = _array_rows(path, key, found, labels, names)
        elif (split, "images") not in arrays:
            raise UsageError(f"data file {str(path)!r} has {key} without images: it holds {there}")
    if not splits:
        raise UsageError(
            f"data file {str(path)!r} has no images: it holds {there}, not x_train and y_train, or images and labels"
        )
    return splits


def _part_of(key: str) -> tuple[str, str] | None:
    """The split of an array and whether it has "images" or "labels", by its name; None for any other."""
    words = key.lower().split("_")
    split = sources.split_of(Path(key)) if len(words) == 2 else "train"
    if split is None or len(words) > 2:
        return None
    for what, known in (("images", _IMAGE_WORDS), ("labels", _LABEL_WORDS)):
        if any(word in known for word in words):
            return split, what
    return None


def _array_rows(path: Path, key: str, images: Any, labels: tuple[str, Any] | None, names: Any) -> list[sources.Row]:
    where = f"data file {str(path)!r}"
    if images.dtype.name != "uint8":
        raise UsageError(f"{where}: {key} must be uint8, from 0 to 255 and not normalised, not {images.dtype}")
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)) or 0 in images.shape[1:]:
        shape = " x ".join(map(str, images.shape))
        raise UsageError(f"{where}: {key} must be images x height x width, or that x 3 colours, not {shape}")
    if labels is None:
        return [{"image": image} for image in images]
    name, values = labels
    if values.ndim > 2:
        from weft.run import segmentation

        return segmentation.array_rows(where, images, labels, names)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iuUSb":
        found = f"{values.dtype} {values.shape}"
        raise UsageError(f"{where}: {name} must be one whole number or name an image, not {found}")
    if len(values) != len(images):
        raise UsageError(f"{where}: {key} has {len(images)} images and {name} {len(values)} labels")
    given = [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
    if names is not None and values.dtype.kind in "iub":
        if given and not 0 <= min(given) <= max(given) < len(names):
            span = f"from {min(given)} to {max(given)}"
            raise UsageError(f"{where}: {name} goes {span}, and {len(names)} classes have names")
        given = [str(names[int(value)]) for value in given]
    return [{"image": image, "label": label} for image, label in zip(images, given, strict=True)]


# --- from rows to pixels ----------------------------------------------------------------------------------------------


def opened(image: Any, grey: bool) -> Image:
    """A row's image, upright, in grey or RGB. Raises WeftError that names a damaged file."""
    from PIL import ImageOps

    pillow = _pillow()
    name = str(image) if isinstance(image, str | Path) else "in the data"
    try:
        if isinstance(image, str | Path):
            with pillow.open(image) as file:
                found = ImageOps.exif_transpose(file)
        elif isinstance(image, dict):
            with pillow.open(io.BytesIO(image["bytes"])) as file:
                found = ImageOps.exif_transpose(file)
        else:
            found = pillow.fromarray(image)
        if found.mode.startswith(("I", "F")):
            raise WeftError(f"image {name!r} has more than 8 bits a colour ({found.mode}): save it with 8")
        return found.convert("L" if grey else "RGB")
    except WeftError:
        raise
    except Exception as error:  # every format's reader raises its own
        raise WeftError(f"image {name!r} is damaged: {_reason(error)}") from error


def size_of(rows: Sequence[sources.Row]) -> tuple[int, int] | None:
    """Height and width of rows that are arrays, which are all of one size; None for files."""
    shape = getattr(rows[0]["image"], "shape", None) if rows else None
    return None if shape is None else (shape[0], shape[1])


def load_processor(spec: str, size: tuple[int, int] | None = None) -> Any:
    """The image processor of a model, or in a folder, on Pillow, so that pixels do not depend on what is installed.

    A model without one gets one that makes images as large as its config's `image_size` says, or `size`, or 224 × 224,
    and scales their colours from 0..255 to -1..1. A config whose `image_size` or `num_channels` was changed
    (config:NAME?image_size=32) has none.

    Raises WeftError where it cannot be had.
    """
    from transformers import AutoImageProcessor, ViTImageProcessorPil
    from transformers.utils import cached_file

    _pillow()
    if (Path(spec) / PROCESSOR).exists():
        return AutoImageProcessor.from_pretrained(spec, backend="pil")
    config = models.load_config(spec)
    path, changed = models.locate(spec), models.changed_fields(spec)
    try:
        own = not Path(path).is_file() and not changed & {"image_size", "num_channels"}
        if own and (
            config.model_type == "timm_wrapper"
            or any(
                cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None
                for name in (PROCESSOR, _WITH_TEXT)
            )
        ):
            return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise WeftError(f"the image processor of {spec!r} cannot be had: {reason}") from error
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None)
    height, width = (side, side) if isinstance(side, int) else side or size or (_SIDE, _SIDE)
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise UsageError(f"model {spec!r} takes images of {channels} channels, and there are those of 1 and of 3")
    halves = [0.5] * channels
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=halves, image_std=halves)


def preparer(processor: Any) -> Callable[[Any], Any]:
    """From a row's image to `pixel_values`, channels × height × width, as the processor makes them.

    A processor that scales one colour, by `image_mean`, gets grey images, any other RGB.
    """
    mean = getattr(processor, "image_mean", None)
    grey = isinstance(mean, Sequence) and len(mean) == 1

    def prepare(image: Any) -> Any:
        return processor(opened(image, grey), return_tensors="pt")["pixel_values"][0]

    return prepare


@dataclass(frozen=True)
class Images:
    """A split as Trainer and `evaluate` read it: rows are prepared when asked for, and kept while there is room."""

    rows: Sequence[sources.Row]
    prepare: Callable[[Any], Any]
    documents: Sequence[int]
    column_names: tuple[str, ...] = ("pixel_values", "labels", "document")
    kept: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        label = {"labels": row["label"]} if "label" in row else {}
        return {"pixel_values": self.pixels(place), **label, "document": self.documents[place]}

    def pixels(self, place: int) -> Any:
        """A row's image as the model takes it, channels × height × width."""
        found = self.kept.get(place)
        if found is None:
            found = self.prepare(self.rows[place]["image"])
            if (len(self.kept) + 1) * found.nbytes <= _KEPT:
                self.kept[place] = found
        return found

    def select(self, places: Sequence[int]) -> Images:
        rows, documents = [self.rows[place] for place in places], [self.documents[place] for place in places]
        return replace(self, rows=rows, documents=documents, kept={})


def images(rows: Sequence[sources.Row], processor: Any, kind: type[Images] = Images) -> Images:
    """Rows as a split of a kind, each a document of its own."""
    return kind(rows, preparer(processor), range(len(rows)))
