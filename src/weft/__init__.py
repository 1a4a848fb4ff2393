"""weft: every low-rank method for neural networks, native to the Hugging Face stack.

Importing weft costs almost nothing: public names are loaded when they are first used. Its adapters become PEFT methods,
and its compressed models transformers models, at once where peft and transformers' quantizers are loaded already, and
right after they load otherwise.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from weft.errors import UsageError, WeftError
from weft.registry import Card, card, cards, class_name, config_class

__version__ = "0.1.0"

# Public names that live in heavy modules: name -> module. Each method's config joins them by discovery.
_LAZY = {
    "prepare": "weft.adapters._training",
    "optimizer_and_scheduler": "weft.adapters._training",
    "step": "weft.steps",
    "next_task": "weft.adapters._tasks",
    "StepCallback": "weft.adapters._training",
    "export": "weft.adapters._export",
    "compress": "weft.compress._engine",
    "distiller": "weft.compress._distil",
    "reparametrise": "weft.pretrain._engine",
    "LorentzLinear": "weft.pretrain._lorentz",
    "to_dense": "weft.linear._transformers",
    "to_linears": "weft.linear._transformers",
}
_EAGER = ("Card", "UsageError", "WeftError", "card", "cards", "config_class")


def _config_names() -> dict[str, str]:
    return {
        class_name(slug, "Config"): f"weft.{pillar}.{slug}"
        for pillar in ("adapters", "compress", "optim", "pretrain")
        for slug in cards(pillar)
    }


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("weft.optim")
    module = _LAZY.get(name) or (_config_names().get(name) if name.endswith("Config") else None)
    if module is None:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*_EAGER, *_LAZY, *_config_names(), "optim", "__version__"])


class _Weft(ModuleType):
    """A module in which a public function and the subpackage that defines it can have one name.

    Python binds a subpackage to its name in the parent once it is loaded, so that `weft.compress`, the function, would
    be the package from the first `import weft.compress._engine` on. Here a lazy name stays what `__getattr__` says.
    `from weft.compress import svd` finds the package in any case: it asks sys.modules.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Weft


class _After(importlib.abc.MetaPathFinder):
    """Lets a module of another library load as usual, then registers what weft has for it, and removes itself.

    It stays for as long as the module is only looked for: transformers asks whether peft is there without importing it.
    """

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module, self.register, self.looking = module, register, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            load(module)
            self.register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_adapters() -> None:
    importlib.import_module("weft.adapters._plugin").register()


def _register_layers() -> None:
    importlib.import_module("weft.linear._transformers")


for _module, _register in (("peft", _register_adapters), ("transformers.quantizers.auto", _register_layers)):
    if _module in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _After(_module, _register))
