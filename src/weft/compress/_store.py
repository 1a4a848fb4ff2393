"""Finished work on disk: what one layer was taken apart into, one file a layer, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.errors import UsageError
from weft.files import whole_file, write_text


class Store:
    """A folder of finished layers that belongs to one request; without a folder, finished layers stay in memory.

    Raises UsageError where the folder holds the work of another request.
    """

    def __init__(self, folder: Path | None, request: dict[str, Any]) -> None:
        self.folder = folder
        self._kept: dict[str, dict[str, Tensor]] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        stamp = folder / "request.json"
        wanted = json.loads(json.dumps(request))
        if stamp.exists():
            there = json.loads(stamp.read_text(encoding="utf-8"))
            for name in [*there, *(n for n in wanted if n not in there)]:
                if there.get(name) != wanted.get(name):
                    raise UsageError(
                        f"{folder} holds unfinished work with {_other(name, there.get(name), wanted.get(name))}; give "
                        "the same command again, or remove the folder"
                    )
            return
        write_text(stamp, json.dumps(wanted, indent=1))

    def _path(self, layer: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{layer}.safetensors"

    def __contains__(self, layer: str) -> bool:
        return layer in self._kept if self.folder is None else self._path(layer).exists()

    def put(self, layer: str, tensors: dict[str, Tensor]) -> None:
        """Keep a finished layer; it is on the disk when this returns."""
        if self.folder is None:
            self._kept[layer] = _bare(tensors)
        else:
            _save(tensors, self._path(layer))

    def get(self, layer: str) -> dict[str, Tensor]:
        """A finished layer's tensors."""
        return self._kept[layer] if self.folder is None else _read(self._path(layer))

    def once(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, made once and kept apart from the layers."""
        if self.folder is None:
            return make()
        path = self.folder / f"{what}.tensors"
        if not path.exists():
            _save(make(), path)
        return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    """A file's tensors, each in memory of its own: on some processors a product's last bits depend on where its factors
    begin, which in a file may be anywhere."""
    return {name: t.clone() for name, t in load_file(str(path)).items()}


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files hold them: contiguous, on the CPU, without a graph."""
    return {name: t.detach().contiguous().cpu() for name, t in tensors.items()}


def _other(name: str, there: Any, wanted: Any) -> str:
    """What differs, by its value where that is short, by its key in a table of many."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        key = next(k for k in [*there, *wanted] if there.get(k) != wanted.get(k))
        return f"{name}: {_other(key, there.get(key), wanted.get(key))}"
    short = all(isinstance(value, str | int | float | None) for value in (there, wanted))
    return f"{name} {there!r}, and this has {wanted!r}" if short else f"other {name}"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with whole_file(path) as partial:
        save_file(_bare(tensors), str(partial))
