"""Low-rank optimisers: plain `torch.optim.Optimizer`s with adapter-sized state.

A file with a leading underscore is the engine; every other file is a method, and its name is the method's.

Names are loaded when they are first used: `weft.optim.Galore`, `param_groups`, `for_trainer`, `optimizer`.
"""

from __future__ import annotations

import importlib
from typing import Any

from weft.registry import cards, class_name

_NAMES = {
    "for_trainer": "_groups",
    "optimizer": "_groups",
    "outlier_ratios": "_outliers",
    "param_groups": "_groups",
    "sparse_gradients": "sara",
    "update_in_backward": "_projected",
}


def _names() -> dict[str, str]:
    return _NAMES | {class_name(slug, ""): slug for slug in cards("optim")}


def __getattr__(name: str) -> Any:
    module = _names().get(name)
    if module is None:
        raise AttributeError(f"module 'weft.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"weft.optim.{module}"), name)


def __dir__() -> list[str]:
    return sorted(_names())
