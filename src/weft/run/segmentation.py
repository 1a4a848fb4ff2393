"""Segmentation: which class each pixel of an image is of. Rows with masks, their loss and figures, masks as answers.

A row's `mask` is a file, an array (height × width) or, in tables, the bytes of a file, of the size of its image; its
levels are class numbers, and 255 is no class. In data whose masks have two levels, as 0 and 255, these are classes 0
and 1. The model's scores are brought to a mask's size bilinearly before anything is made of them.
"""

from __future__ import annotations

import colorsys
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.errors import UsageError
from weft.run import images, sources
from weft.run.data import IGNORED
from weft.run.evaluate import over_batches

if TYPE_CHECKING:
    import torch
    from torch import nn

    from weft.run.models import Base

NO_CLASS = 255  # the level of a pixel that neither loss nor figures count
CLASSES_FILE = "classes.txt"
_PADDED = -1  # what fills a batch of masks of unequal sizes; a class is 0 or more
_LOSSY = (".jpg", ".jpeg")
_MODES = ("1", "L", "P")  # Pillow's names for images of one level a pixel

Measured = list[tuple[int, int, float, Any, int]]


# --- rows -------------------------------------------------------------------------------------------------------------


def is_folder(folder: Path) -> bool:
    """Whether a folder, or one in it, has images/ and masks/."""
    return any((part / "images").is_dir() and (part / "masks").is_dir() for part in (folder, *images._folders(folder)))


def read_folder(folder: Path) -> dict[str, list[sources.Row]]:
    """The rows of images/ and masks/, whose files have equal names but for their ends, by split.

    Splits are folders that have the two; without one all is the training split. A split without masks/ has images
    alone. `classes.txt` names the classes, one a line, from 0 on. Raises UsageError that names what is in the way.
    """
    names = _names(folder / CLASSES_FILE)
    if (folder / "images").is_dir():
        return {"train": _pairs(folder, names)}
    splits: dict[str, list[sources.Row]] = {}
    for part in images._folders(folder):
        split = sources.split_of(Path(part.name))
        if split is None or split in splits or not (part / "images").is_dir():
            continue
        splits[split] = _pairs(part, names)
    if not splits:
        raise UsageError(
            f"folder {str(folder)!r} holds no images to segment: put them into images/ and their masks into masks/, "
            "here or inside of train/, validation/ and test/"
        )
    return splits


def _names(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as names of classes, one a line") from error
    return {"classes": tuple(line.strip() for line in lines if line.strip())}


def _pairs(folder: Path, names: dict[str, Any]) -> list[sources.Row]:
    pictures = _by_stem(folder / "images")
    if not (folder / "masks").is_dir():
        return [{"image": path} for path in pictures.values()]
    masks = _by_stem(folder / "masks")
    for stem in sorted(pictures.keys() ^ masks.keys()):
        there, other = (pictures, "mask") if stem in pictures else (masks, "image")
        raise UsageError(f"{str(there[stem])!r} has no {other}: its name but for the end is to be in both folders")
    return [{"image": path, "mask": masks[stem], **names} for stem, path in pictures.items()]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if images._unseen(path):
            continue
        if not images.is_image(path):
            raise UsageError(f"{str(path)!r} is no image: there may be {', '.join(images.SUFFIXES)}")
        if path.stem in found:
            raise UsageError(f"{str(found[path.stem])!r} and {str(path)!r} have one name but for the end")
        found[path.stem] = images.checked(path)
    return found


def array_rows(where: str, pictures: Any, masks: tuple[str, Any], names: Any) -> list[sources.Row]:
    """The rows of arrays: images, and masks of images × height × width under their name."""
    name, levels = masks
    levels = levels[..., 0] if levels.ndim == 4 and levels.shape[-1] == 1 else levels
    if levels.shape != pictures.shape[:3]:
        sizes = " x ".join(map(str, levels.shape)), " x ".join(map(str, pictures.shape[:3]))
        raise UsageError(f"{where}: {name} has {sizes[0]} masks, and the images are {sizes[1]}")
    if levels.dtype.kind not in "iub" or (levels.size and not 0 <= levels.min() <= levels.max() <= NO_CLASS):
        raise UsageError(f"{where}: {name} must hold class numbers from 0 to {NO_CLASS}, not {levels.dtype}")
    more = {} if names is None else {"classes": tuple(map(str, names))}
    return [{"image": picture, "mask": mask, **more} for picture, mask in zip(pictures, levels, strict=True)]


def number_classes(rows: sources.Rows, spec: str, classes: Sequence[str] = ()) -> None:
    """Look at every mask, let its row know its size and whether it has two levels, and name the classes.

    They are named by the data, else as the model's `classes` if these are as many, else by their numbers.

    Raises UsageError for a mask of another size than its image, a class without a name, and one that only validation
    or test rows have.
    """
    seen: dict[str, set[int]] = {}
    for name in sources.SPLITS:
        looks = [look(row, f"data {spec!r}, {name} row {n}") for n, row in enumerate(getattr(rows, name), 1)]
        seen[name] = set().union(*looks)
    levels = settle_levels([row for name in sources.SPLITS for row in getattr(rows, name)], seen.values())
    held = {name: {levels[level] for level in found if level in levels} for name, found in seen.items()}
    drawn = [name for name in sources.SPLITS if any(line.startswith(f"{name}:") for line in rows.held_out)]
    known = held["train"].union(*(held[name] for name in drawn))  # a rare class may have been held out with its images
    count = max(known, default=0) + 1
    names = next((row["classes"] for row in rows.train if "classes" in row), None)
    if names is None and count < 2:
        raise UsageError(f"data {spec!r} has masks of one class alone: nothing to tell apart")
    if names is not None and len(names) < count:
        raise UsageError(f"data {spec!r}: masks hold class {count - 1}, and {len(names)} classes have names")
    for name in ("validation", "test"):
        if strange := held[name] - known:
            raise UsageError(f"data {spec!r}: class {min(strange)} of {name} never occurs in train")
    if absent := sorted(set(range(count)) - held["train"]):
        rows.notes.append(f"no training mask holds the classes {', '.join(map(str, absent))}")
    named = len(classes) == count and classes[0] != "LABEL_0"  # as transformers calls what nobody named
    rows.labels = list(names or (classes if named else map(str, range(count))))


def settle_levels(rows: Sequence[sources.Row], seen: Iterable[set[int]]) -> dict[int, int]:
    """The class of each level that masks were seen to have; where these are two, other than 0 and 1, rows know them."""
    found = sorted(set().union(*seen))
    if len(found) != 2:
        return {level: level for level in found if level != NO_CLASS}
    for row in rows if found != [0, 1] else ():
        row["levels"] = tuple(found)
    return {found[0]: 0, found[1]: 1}


def look(row: sources.Row, where: str) -> set[int]:
    """The levels of a row's mask; its `size` is put into the row."""
    mask, size = _levels(row["mask"], where), _size(row["image"], where)
    if mask.shape != size:
        sizes = [" x ".join(map(str, each)) for each in (mask.shape, size)]
        raise UsageError(f"{_called(row['mask'], where)} is {sizes[0]}, and its image is {sizes[1]}")
    row["size"] = size
    found = set(np.unique(mask).tolist())
    if found == {NO_CLASS}:
        raise UsageError(f"{_called(row['mask'], where)} is of level {NO_CLASS}, no class, in every pixel")
    return found


def _called(mask: Any, where: str) -> str:
    return f"mask {str(mask)!r}" if isinstance(mask, Path) else f"{where}: the mask"


def _levels(mask: Any, where: str = "") -> np.ndarray:
    """The levels of a mask, uint8, height × width."""
    if not isinstance(mask, Path | dict):
        return np.asarray(mask).astype(np.uint8)
    if isinstance(mask, Path) and mask.suffix.lower() in _LOSSY:
        raise UsageError(f"mask {str(mask)!r} is a JPEG, which does not keep class numbers: give a PNG")
    try:
        with images._pillow().open(mask if isinstance(mask, Path) else io.BytesIO(mask["bytes"])) as file:
            mode, found = file.mode, np.asarray(file)
    except Exception as error:  # every format's reader raises its own
        raise UsageError(f"{_called(mask, where)} cannot be read: {images._reason(error)}") from error
    if mode not in _MODES:
        raise UsageError(
            f"{_called(mask, where)} is of mode {mode}: give a grey or a palette image whose levels are class numbers"
        )
    return found.astype(np.uint8)


def _size(image: Any, where: str = "") -> tuple[int, ...]:
    """Height and width of a row's image, upright, from the beginning of its file."""
    if not isinstance(image, Path | dict):
        return image.shape[:2]
    try:
        with images._pillow().open(image if isinstance(image, Path) else io.BytesIO(image["bytes"])) as file:
            width, height = file.size
            return (width, height) if file.getexif().get(0x0112, 1) > 4 else (height, width)
    except Exception as error:  # every format's reader raises its own
        called = f"image {str(image)!r}" if isinstance(image, Path) else f"{where}: the image"
        raise UsageError(f"{called} cannot be read: {images._reason(error)}") from error


def class_numbers(row: sources.Row) -> np.ndarray:
    """The class of each pixel, int64, height × width; `IGNORED` where it has none."""
    mask = _levels(row["mask"])
    if "levels" in row:
        return (mask == row["levels"][1]).astype(np.int64)
    return np.where(mask == NO_CLASS, IGNORED, mask.astype(np.int64))


# --- what a model takes -----------------------------------------------------------------------------------------------


def load_processor(spec: str, rows: Sequence[sources.Row] = ()) -> Any:
    """The image processor of a model, made to bring every image to one size, whole, without cutting anything off.

    That is the model's own size where it has one, else the commonest of the rows'.
    """
    sizes = Counter(row["size"] for row in rows if "size" in row)
    processor = images.load_processor(spec, sizes.most_common(1)[0][0] if sizes else None)
    for name in ("do_center_crop", "do_pad", "keep_aspect_ratio", "do_reduce_labels"):
        if getattr(processor, name, None):
            setattr(processor, name, False)
    if "height" not in processor.size:
        side = processor.size["shortest_edge"]
        cut = getattr(processor, "crop_size", None) or {"height": side, "width": side}
        processor.size = type(processor.size)(height=cut["height"], width=cut["width"])
    return processor


def enlarged(scores: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A model's scores, rows × classes × height × width, at another height and width, in float32."""
    from torch.nn.functional import interpolate

    scores = scores.float()
    return scores if scores.shape[2:] == tuple(size) else interpolate(scores, size=tuple(size), mode="bilinear")


def pixel_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Nats a pixel that has a class, over all micro-batches of a step; the masks are of one size."""
    from torch.nn.functional import cross_entropy

    scores = enlarged(outputs["logits"], labels.shape[1:])
    total = cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


@dataclass(frozen=True)
class Masks(images.Images):
    """A split as Trainer and `evaluate` read it; `labels` is int64, height × width.

    `whole` masks are as large as the data has them, others as large as the model sees their images, by nearest pixel.
    """

    whole: bool = False
    loss = staticmethod(pixel_loss)

    def measure(self, model: nn.Module, batch_size: int, rows: Sequence[int], bf16: bool = False) -> Measured:
        batches = over_batches(measure, [model], self, batch_size, rows, bf16=bf16)
        return sorted(itertools.chain.from_iterable(batches))

    def summarise(self, measured: Measured) -> dict[str, Any]:
        return summarise(measured)

    def __getitem__(self, place: int) -> dict[str, Any]:
        import torch
        from torch.nn.functional import interpolate

        row = self.rows[place]
        pixels = self.pixels(place)
        mask = torch.from_numpy(class_numbers(row))
        if not self.whole:
            mask = interpolate(mask[None, None].float(), pixels.shape[1:], mode="nearest-exact")[0, 0].long()
        return {"pixel_values": pixels, "labels": mask, "document": self.documents[place]}


def splits(rows: sources.Rows, processor: Any) -> dict[str, Masks]:
    """Each split of the rows, an image a document."""
    prepare = images.preparer(processor)
    parts = {name: getattr(rows, name) for name in sources.SPLITS}
    return {name: Masks(part, prepare, range(len(part)), whole=name != "train") for name, part in parts.items()}


def stack(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Masks as a batch, rows × height × width of the largest; what is beyond one's own size is `_PADDED`."""
    import torch

    sides = torch.tensor([mask.shape for mask in masks]).amax(0).tolist()
    batch = torch.full((len(masks), *sides), _PADDED)
    for row, mask in zip(batch, masks, strict=True):
        row[: mask.shape[0], : mask.shape[1]] = mask
    return batch


# --- loss and figures -------------------------------------------------------------------------------------------------


def tally(truth: torch.Tensor, answer: torch.Tensor, classes: int) -> list[tuple[int, int, int]]:
    """For each class how many pixels are of it in both, in the answer, and in truth; those without a class in none.

    >>> import torch
    >>> tally(torch.tensor([0, 0, 1, -100]), torch.tensor([0, 1, 1, 1]), 2)
    [(1, 1, 2), (1, 2, 1)]
    """
    import torch

    known = truth != IGNORED
    truth, answer = truth[known], answer[known]
    counts = [torch.bincount(each, minlength=classes) for each in (truth[truth == answer], answer, truth)]
    return [tuple(each) for each in torch.stack(counts, 1).tolist()]


def measure(rows: Sequence[int], documents: Sequence[int], labels: torch.Tensor, logits: torch.Tensor) -> Measured:
    """One entry an image: (row, document, sum of nats, tallies of the classes, -1), at the mask's own size."""
    from torch.nn.functional import cross_entropy

    found: Measured = []
    for row, document, mask, scores in zip(rows, documents, labels, logits, strict=True):
        mask = mask[mask[:, 0] != _PADDED][:, mask[0] != _PADDED]
        scores = enlarged(scores[None], mask.shape)
        nats = cross_entropy(scores, mask[None], ignore_index=IGNORED, reduction="sum")
        found.append((row, document, float(nats), tally(mask, scores[0].argmax(0), scores.shape[1]), -1))
    return found


def dice(tallies: Any) -> Any:
    """Dice of each class, … × classes, from tallies, … × classes × 3; NaN for a class neither in truth nor answer."""
    both, answer, truth = np.moveaxis(np.asarray(tallies, dtype=np.float64), -1, 0)
    return np.divide(2 * both, answer + truth, out=np.full_like(both, np.nan), where=answer + truth > 0)


def summarise(measured: Measured) -> dict[str, Any]:
    """The metrics of `evaluate` from what `measure` found.

    `loss` (nats a pixel), `dice` (mean over the classes of an image or of its answer, then over images), `iou` (of each
    class over all images, then the mean over classes), `accuracy` (share of pixels), `rows`, and `per_document`:
    [1 − Dice, 1] of each image.
    """
    tallies = np.array([each[3] for each in measured], dtype=np.float64)
    each = np.nanmean(dice(tallies), axis=1)
    both, answer, truth = tallies.sum(0).T
    either = answer + truth - both
    return {
        "loss": math.fsum(nats for _, _, nats, _, _ in measured) / truth.sum(),
        "dice": float(each.mean()),
        "iou": float((both[either > 0] / either[either > 0]).mean()),
        "accuracy": float(both.sum() / truth.sum()),
        "rows": len(measured),
        "per_document": [[1 - float(one), 1] for one in each],
    }


# --- answers ----------------------------------------------------------------------------------------------------------


def answers(base: Base, rows: Sequence[sources.Row], batch_size: int) -> Iterator[np.ndarray]:
    """The class of each pixel of each image, uint8, at the image's own size."""
    import torch

    model: Any = base.model
    device = next(model.parameters()).device
    prepare = images.preparer(base.tokenizer)
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        with torch.inference_mode():
            pixels = torch.stack([prepare(row["image"]) for row in some]).to(device)
            for row, scores in zip(some, model(pixel_values=pixels).logits, strict=True):
                yield enlarged(scores[None], _size(row["image"]))[0].argmax(0).to(torch.uint8).cpu().numpy()


def check(rows: Sequence[sources.Row], classes: Sequence[str] | None) -> None:
    """Make rows that are to be answered ready, before a model is loaded; `classes` are the model's, where known.

    Raises UsageError for two images whose masks would be one file, and for a mask that does not fit image or model.
    """
    _stems(rows)
    seen = [look(row, f"row {number}") if "mask" in row else set() for number, row in enumerate(rows, 1)]
    levels = settle_levels([row for row in rows if "mask" in row], seen)
    for number, (row, found) in enumerate(zip(rows, seen, strict=True), 1):
        most = max((levels[level] for level in found if level in levels), default=0)
        if classes is not None and most >= len(classes):
            called = _called(row["mask"], f"row {number}")
            raise UsageError(f"{called} holds class {most}, and the model has {len(classes)}, counted from 0")


def predict(base: Base, rows: list[sources.Row], folder: Path | None, batch_size: int) -> Iterator[dict[str, Any]]:
    """For each checked image the shares of the classes, their Dice where the row has a mask; masks go into `folder`."""
    import torch

    names = [str(base.model.config.id2label[number]) for number in range(base.model.config.num_labels)]
    for row, stem, mask in zip(rows, _stems(rows), answers(base, rows, batch_size), strict=True):
        shares = np.bincount(mask.ravel(), minlength=len(names)) / mask.size
        said: dict[str, Any] = {"image": str(row["image"]) if isinstance(row["image"], Path) else int(stem)}
        if folder is not None:
            _picture(mask).save(folder / f"{stem}.png")
            said["mask"] = f"{stem}.png"
        said["shares"] = {name: round(float(share), 6) for name, share in zip(names, shares, strict=True)}
        if "mask" in row:
            counts = tally(torch.from_numpy(class_numbers(row)), torch.from_numpy(mask).long(), len(names))
            found = zip(names, dice(counts).tolist(), strict=True)
            said["dice"] = {name: round(one, 6) for name, one in found if not math.isnan(one)}
        yield said


def _stems(rows: Sequence[sources.Row]) -> list[str]:
    """What each row's mask is called: as its image, or by its number."""
    stems = [row["image"].stem if isinstance(row["image"], Path) else f"{n:06}" for n, row in enumerate(rows)]
    if twice := [stem for stem, count in Counter(stems).items() if count > 1]:
        raise UsageError(f"two images are called {twice[0]!r} but for folder and end, and so would be their masks")
    return stems


def _picture(mask: np.ndarray) -> Any:
    """A palette image whose levels are class numbers: 0 is black, the others have colours far apart."""
    made = images._pillow().fromarray(mask)
    hues = [colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 1.0) for number in range(NO_CLASS)]
    made.putpalette([0, 0, 0, *(round(255 * part) for hue in hues for part in hue)])
    return made
