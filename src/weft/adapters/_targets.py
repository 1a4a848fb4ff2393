"""Which modules of a model an adapter can be put on, and what to say where it cannot."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from weft.adapters._kinds import SUPPORTED, kind_of
from weft.errors import UsageError


def check_targets(model: nn.Module, config: Any, prefix: str) -> None:
    """Raise UsageError, with a list of what there is, where `target_modules` matches nothing."""
    targets = config.target_modules
    if targets is None or targets == "all-linear" or (isinstance(targets, list) and not targets):
        return
    inside = re.compile(rf"\.({prefix}delta|base_layer)(\.|$)")  # of modules that are adapted already
    names = [name for name, _ in model.named_modules() if name and not inside.search(name)]
    if not any(check_target_module_exists(config, name) for name in names):
        there = ", ".join(suffixes(model))
        raise UsageError(f"target_modules={targets!r} matches nothing in {type(model).__name__}; there are: {there}")


def suffixes(model: nn.Module) -> list[str]:
    """Last names of modules that can be adapted."""
    names = set()
    for name, module in model.named_modules():
        try:
            kind_of(module, name)
        except UsageError:
            continue
        names.add(name.rpartition(".")[2])
    return sorted(names) or [f"no module of a supported kind ({SUPPORTED})"]


def tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of parameters that several modules share, by the parameter's id."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}
