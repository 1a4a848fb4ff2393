"""The config that every adapter's config extends: where to attach, and what a saved adapter must remember."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils import PeftType

from weft.errors import UsageError
from weft.registry import MethodConfig

README_NOTE = (
    "\n## Loading\n\nThis adapter was made with weft. Importing it makes the method known to PEFT:\n\n"
    "```python\nimport weft\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, path)\n```\n"
)


def peft_type(slug: str) -> PeftType:
    """The member of PEFT's closed enum `PeftType` that stands for a method, added on first use: sora → WEFT_SORA.

    A plain string would break transformers' `load_adapter`, so a real (pseudo-)member is made. This is the one place
    where weft reaches into another library.
    """
    name = f"WEFT_{slug.upper()}"
    if name not in PeftType._member_map_:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType._member_map_[name]  # type: ignore[return-value]


def tasks_of(model: Any) -> int:
    """How many tasks `weft.next_task` has merged into a model's weights."""
    counts = (getattr(holder, "weft_tasks", None) for holder in (getattr(model, "config", None), model))
    return next((count for count in counts if isinstance(count, int)), 0)


@dataclass
class AdapterConfig(MethodConfig, PeftConfig):
    """Fields that all of weft's adapters share. A method adds its own, each with `metadata={"help": ...}`.
    Where the default is meant for thousands of steps, `metadata={"help": ..., "short": v}` names the value with which a
    run of twenty steps meets the method's events; tests and small demonstrations take it from there.

    Raises UsageError for values that no model could serve; what depends on the model is checked when attaching.
    """

    common: ClassVar[bool] = True

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules to adapt: names, one regex, or 'all-linear' (the default)"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules to leave out: names or one regex"}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "expert parameters (experts × a × b) to adapt, by name"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "adapt only these layer numbers"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list that holds the layers"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained in full and saved along"}
    )
    split_qkv: bool = field(
        default=False, metadata={"help": "give query, key and value of a fused projection one adapter each"}
    )
    require_groups: bool = field(
        default=True, metadata={"help": "refuse an optimiser without the parameter groups that the method declares"}
    )
    # Written when an adapter is saved; a config that carries them describes tensors to come from a file.
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"stored": True})
    base_sketch: dict[str, list[float]] | None = field(default=None, metadata={"stored": True})
    checksums: dict[str, str] = field(default_factory=dict, metadata={"stored": True})
    # tasks that weft.next_task ended before this one: in the weights, and beside them in the adapter
    merged_tasks: int = field(default=0, metadata={"stored": True})
    kept_tasks: int = field(default=0, metadata={"stored": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.slug())
        if isinstance(self.target_modules, tuple | set):
            self.target_modules = sorted(self.target_modules)
        if self.target_modules is None and not self.target_parameters:
            self.target_modules = "all-linear"
        self.validate()

    def validate(self) -> None:
        """Refuse values that cannot work. A method extends it for its own fields; `r` and dropout are checked here."""
        r = getattr(self, "r", None)
        if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
            raise UsageError(f"r={r!r}: the rank is a whole number of at least 1")
        dropout = getattr(self, "dropout", 0.0)
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout={dropout!r} is not a probability below 1")

    @classmethod
    def own_fields(cls) -> list[dataclasses.Field[Any]]:
        """The fields a user sets: the method's own first, then where to attach."""
        inherited = {f.name for f in dataclasses.fields(PeftConfig)}
        return [f for f in super().own_fields() if f.name not in inherited and not f.metadata.get("stored")]

    def finished_tasks(self) -> int:
        """Tasks that came before this adapter's own."""
        return self.merged_tasks + self.kept_tasks

    @property
    def is_stored(self) -> bool:
        """Whether the tensors come from a file, so that nothing is to be computed from the base model."""
        return self.base_sketch is not None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        # `release` is what the plugin found while collecting the tensors: active ranks and a sketch of each weight
        release = getattr(self, "release", None) or {}
        before = {name: getattr(self, name) for name in release}
        try:
            self.__dict__.update(release)
            super().save_pretrained(str(save_directory), **kwargs)
        finally:
            self.__dict__.update(before)
        readme = Path(save_directory) / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.exists() else ""
        if "import weft" not in text:
            readme.write_text(text + README_NOTE, encoding="utf-8")

    def __hash__(self) -> int:
        return id(self)
