"""weft: every low-rank method for neural networks, native to the Hugging Face stack.

Importing weft costs almost nothing: public names are loaded when they are first used. Its adapters become PEFT methods
at once where peft is loaded already, and right after peft loads otherwise.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from weft.errors import UsageError, WeftError
from weft.registry import Card, card, cards, class_name, config_class

__version__ = "0.1.0"

# Public names that live in heavy modules: name -> module. Each method's config joins them by discovery.
_LAZY = {
    "prepare": "weft.adapters._training",
    "optimizer_and_scheduler": "weft.adapters._training",
    "step": "weft.adapters._training",
    "StepCallback": "weft.adapters._training",
    "export": "weft.adapters._export",
}
_EAGER = ("Card", "UsageError", "WeftError", "card", "cards", "config_class")


def _config_names() -> dict[str, str]:
    return {class_name(slug, "Config"): f"weft.adapters.{slug}" for slug in cards("adapters")}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name) or (_config_names().get(name) if name.endswith("Config") else None)
    if module is None:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*_EAGER, *_LAZY, *_config_names(), "__version__"])


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Lets peft load as usual, then registers weft's adapters with it and removes itself.

    It stays for as long as peft is only looked for: transformers asks whether peft is there without importing it.
    """

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            load(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    importlib.import_module("weft.adapters._plugin").register()


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterPeft())
