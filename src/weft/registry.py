"""The catalogue of methods: every file of a pillar's folder whose name has no leading underscore.

A method's file name is its name everywhere. Each file holds one `CARD = Card(...)` of plain literals, which is read
from the source without importing it, so that listing sixty methods costs neither torch nor peft.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

from weft.errors import UsageError, nearest

PILLARS = ("adapters", "optim", "compress", "pretrain", "compose", "analyse", "tasks")


@dataclass(frozen=True)
class Card:
    """What the rest of weft must know of a method without running it. Literals only.

    Attributes:
        title, arxiv, year: the paper. `arxiv` is the number alone, "2311.11696".
        summary: one line for tables and --help.
        knob: the config field that `weft compare` solves to meet a parameter budget.
        recipe: the training recipe the paper or its code uses: keys of TrainingArguments (`learning_rate`,
            `weight_decay`, `warmup_ratio`, `max_grad_norm`, `lr_scheduler_type`).
        pretraining: the recipe is for training from random weights, not for fine-tuning.
        exports: "exact" (a plain LoRA gives the same outputs), "bounded" (the error is printed) or "refused".
        needs: what `weft.prepare` must be given before attaching: "batches", "held_out", "original_weights", …
        init_drift: interval in which |ΔW| lies at step 0, relative to |W|.
        warm_steps: optimiser steps until every trainable element has had a gradient; above 2 only with a reason.
        refuses: kinds of module that the method cannot serve, each with its reason.
        limitations: what a user should know before choosing it.
        reasons: the argument for each property that departs from the default; under "file" it names the frozen tensors
            that a saved adapter carries because they cannot be derived.
    """

    title: str
    arxiv: str
    year: int
    summary: str
    knob: str = "r"
    recipe: dict[str, Any] = field(default_factory=dict)
    pretraining: bool = False
    exports: str = "exact"
    needs: tuple[str, ...] = ()
    init_drift: tuple[float, float] = (0.0, 0.0)
    warm_steps: int = 2
    refuses: dict[str, str] = field(default_factory=dict)
    limitations: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    slug: str = ""  # set by the registry, from the file's name
    pillar: str = ""  # set by the registry, from the folder's name


def _read_card(path: Path) -> dict[str, Any] | None:
    """The keyword literals of the module's `CARD = Card(...)`, or None where there is none."""
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "CARD" and isinstance(node.value, ast.Call):  # type: ignore[attr-defined]
            return {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords if keyword.arg}  # type: ignore[attr-defined]
    return None


@functools.cache
def _discover(paths: tuple[str, ...]) -> dict[str, Card]:
    found: dict[str, Card] = {}
    for pillar in PILLARS:
        folders = [str(Path(path) / pillar) for path in paths]
        for info in pkgutil.iter_modules(folders):
            if info.name.startswith("_"):
                continue
            path = Path(info.module_finder.path) / f"{info.name}.py"  # type: ignore[union-attr]
            fields = _read_card(path) if path.exists() else None
            if fields is None:
                raise ImportError(f"{path}: a method file needs a literal `CARD = Card(...)`")
            if info.name in found:
                raise ImportError(f"two methods are called {info.name!r}: {found[info.name].pillar} and {pillar}")
            found[info.name] = Card(**fields, slug=info.name, pillar=pillar)
    return found


def cards(pillar: str | None = None) -> dict[str, Card]:
    """All methods by name, or those of one pillar. Raises UsageError for an unknown pillar."""
    import weft

    if pillar is not None and pillar not in PILLARS:
        raise UsageError(f"unknown pillar {pillar!r}: {nearest(pillar, PILLARS)}")
    found = _discover(tuple(weft.__path__))
    return {slug: card for slug, card in found.items() if pillar in (None, card.pillar)}


def card(slug: str, pillar: str | None = None) -> Card:
    """The card of one method. Raises UsageError that suggests the nearest name."""
    known = cards(pillar)
    if slug not in known:
        raise UsageError(f"unknown method {slug!r}: {nearest(slug, known)}")
    return known[slug]


def load(slug: str) -> ModuleType:
    """Import the method's module."""
    return importlib.import_module(f"weft.{card(slug).pillar}.{slug}")


def class_name(slug: str, suffix: str) -> str:
    """The class a method file must define: `sora` → `SoraConfig`, `lora_sb` → `LoraSbConfig`."""
    return "".join(part.capitalize() for part in slug.split("_")) + suffix


def config_class(slug: str) -> type:
    """The method's typed config: what CLI flags, YAML keys and validation come from."""
    return getattr(load(slug), class_name(slug, "Config"))


class MethodConfig:
    """What the configs of all methods have in common. It has no fields: a pillar's base class brings those.

    Attributes:
        common: stands in a class whose fields all methods of a pillar have; what inherits from it brings its own.
    """

    common: ClassVar[bool] = False

    @classmethod
    def slug(cls) -> str:
        """The method's name, which is its file's name."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def own_fields(cls) -> list[dataclasses.Field[Any]]:
        """The fields a user sets: the method's own first, then what the methods of its pillar share."""
        bases = [base for base in cls.__mro__ if vars(base).get("common") and dataclasses.is_dataclass(base)]
        shared = {f.name for base in bases for f in dataclasses.fields(base)}
        return sorted(dataclasses.fields(cls), key=lambda f: f.name in shared)  # type: ignore[arg-type]

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Build from user-given options; an unknown key raises UsageError with the nearest name."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in options:
            if key not in known:
                names = [f.name for f in cls.own_fields()]
                raise UsageError(f"{cls.slug()} has no option {key!r}: {nearest(key, names)}")
        return cls(**options)
