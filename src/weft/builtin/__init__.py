"""Models and data that come with weft, so that everything in it runs with no network.

    model = AutoModelForCausalLM.from_pretrained(weft.builtin.model_path("pycode"))
    rows = weft.builtin.texts("pydocs", "train")            # [{"text": ..., "name": ...}, ...]
    pixels, labels = weft.builtin.images("digits", "test")  # n x 1 x 8 x 8 in [-1, 1], n

The two models are trained by `train_pycode.py` and `train_vit.py` beside this file. Texts are read from the running
Python and images from scikit-learn, so neither is copied into weft; splits never depend on a seed.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from weft.builtin import _corpus
from weft.errors import UsageError, WeftError, nearest

if TYPE_CHECKING:
    import numpy as np

MODELS: dict[str, str] = {
    "pycode": "causal language model of Python code, 2.3 M parameters, Llama architecture with grouped-query attention",
    "vit": "vision transformer for 8 x 8 scans of handwritten digits, 35 k parameters",
}

DATASETS: dict[str, str] = {
    "stdlib": "source of standard-library modules that pycode never saw: more of what it knows",
    "pydocs": "English help topics of pydoc: the shift from code to prose that pycode is to be adapted to",
    "digits": "scikit-learn's 8 x 8 scans of handwritten digits, on which vit was trained",
    "digits-shifted": "the same scans turned by a quarter and inverted, on which vit fails until it is adapted",
}

_TEXTS = {"stdlib": _corpus.stdlib_rows, "pydocs": _corpus.pydocs_rows}
IMAGES = ("digits", "digits-shifted")

__all__ = ["DATASETS", "MODELS", "dataset", "images", "model_path", "texts"]


def model_path(name: str) -> Path:
    """Folder of a built-in model, to be given to `from_pretrained`; `name` is "pycode" or "builtin:pycode", say."""
    return Path(__file__).parent / _known(name, MODELS, "model")


def dataset(name: str) -> str:
    """The bare name of built-in data, texts or images; UsageError, with those that there are, for any other."""
    return _known(name, DATASETS, "data")


def texts(name: str, split: str) -> list[dict[str, str]]:
    """Documents of a built-in text in one split ("train", "validation", "test"): rows of `text` and `name`."""
    name = _known(name, _TEXTS, "text")
    return _TEXTS[name](_known(split, _corpus.SPLITS, "split"))


def images(name: str, split: str) -> "tuple[np.ndarray, np.ndarray]":
    """Scans of a built-in image set in one split: pixels, float32 n x 1 x 8 x 8 in [-1, 1], and labels, int64 n."""
    name = _known(name, IMAGES, "image set")
    split = _known(split, _corpus.SPLITS, "split")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise WeftError(f'builtin:{name} needs scikit-learn; install it with pip install "weft[vision]".') from error
    import numpy as np

    scans = load_digits()
    chosen = [_corpus.split_of(f"digit {index}") == split for index in range(len(scans.target))]
    pixels = scans.images[chosen, None] / 8 - 1  # ink is counted from 0 to 16
    if name == "digits-shifted":
        pixels = -np.rot90(pixels, axes=(2, 3))
    return np.ascontiguousarray(pixels, dtype=np.float32), scans.target[chosen].astype(np.int64)


def _known(name: str, known: Iterable[str], kind: str) -> str:
    """`name` without its "builtin:", or an error that names what there is."""
    bare = name.removeprefix("builtin:")
    if bare in known:
        return bare
    raise UsageError(f"weft.builtin has no {kind} {name!r}; {nearest(bare, known)}")
