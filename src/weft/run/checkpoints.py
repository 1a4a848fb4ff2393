"""Checkpoints that are whole or do not count.

A checkpoint is written into a folder of another name, flushed to the disk, renamed, and only then marked complete; a
process killed at any instant leaves either the old state or the new one. Tensors are safetensors, the rest is JSON,
except for the optimiser's and the scheduler's files, which Trainer reads with `weights_only=True`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.files import PARTIAL, flush, flush_names, partial_of, write_text

if TYPE_CHECKING:
    import torch
    from torch import nn

MARKER = "complete.json"
STATE = "training_state.safetensors"
KEEP = 2  # complete checkpoints that stay

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries that swallow the number of the error word a full disk (torch's zip writer, safetensors).
_FULL_WORDS = (
    *("no space left", "os error 28", "os error 27", "file too large", "quota exceeded"),
    *("pytorchstreamwriter", "unexpected pos"),
)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, means that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error).lower() for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def path_of(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def save(output: Path, step: int, fill: Callable[[Path], None], facts: dict[str, Any]) -> Path:
    """Write one checkpoint: `fill` puts the files into the folder that it is given.

    Raises WeftError, with earlier checkpoints intact, where the disk is full.
    """
    target = path_of(output, step)
    partial = partial_of(target)
    try:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        sizes = flush(partial)
        shutil.rmtree(target, ignore_errors=True)  # an incomplete one, or the same step of an earlier attempt
        os.replace(partial, target)
        flush_names(output)
        write_text(target / MARKER, json.dumps({"step": step, "files": sizes, **facts}, indent=1) + "\n")
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_disk_full(error):
            raise
        kept = newest(output)
        previous = f"the previous checkpoint {kept} is intact" if kept else "there is no earlier checkpoint"
        raise WeftError(
            f"the disk is full: checkpoint {target} at step {step} could not be written; {previous}"
        ) from error
    _drop_old(output)
    return target


def facts(checkpoint: Path) -> dict[str, Any] | None:
    """What the completion marker says; None for a checkpoint that is not complete."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        for name, size in marker["files"].items():
            if (checkpoint / name).stat().st_size != size:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return marker


def complete(output: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    found = []
    for path in output.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and facts(path) is not None:
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def newest(output: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = complete(output)
    return found[-1] if found else None


def _drop_old(output: Path) -> None:
    for path in complete(output)[:-KEEP]:
        (path / MARKER).unlink(missing_ok=True)  # first: a checkpoint half deleted must not count
        shutil.rmtree(path, ignore_errors=True)


def drop_all(output: Path) -> None:
    """Remove every checkpoint and what is left of unfinished ones."""
    for path in [*output.glob("checkpoint-*"), *output.glob(f".checkpoint-*{PARTIAL}")]:
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


# --- the model's part -------------------------------------------------------------------------------------------------


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """Every tensor that training may change, by name: what is trained, and the state beside adapters' weights.

    What the optimiser holds is trained, though it may rest at the moment. A frozen base weight is left out; a tensor
    known by two names appears once, under the first.
    """
    import torch

    held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    trained = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad or id(p) in held
    }
    base = getattr(model, "get_base_model", None)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        frozen_base = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        beside_adapter = base is not None and _in_adapter(model, name)
        buffer = not isinstance(tensor, torch.nn.Parameter) and base is None
        if name not in trained and not beside_adapter and not (buffer and not frozen_base):
            continue
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensors[name] = tensor.detach()
    return tensors


def _in_adapter(model: Any, name: str) -> bool:
    """Whether a state name belongs to an adapter: the part of the name that PEFT's prefix for the method marks."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = model.peft_config[model.active_adapter]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    return (prefix is not None and prefix in name) or ".modules_to_save." in name


def save_tensors(model: nn.Module, path: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write the model's training tensors, each contiguous and on the CPU, in its own dtype."""
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in training_tensors(model, optimizer).items()}
    save_file(tensors, str(path), metadata={"format": "pt"})


def load_tensors(model: nn.Module, path: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put saved training tensors back, bit for bit. Raises WeftError where names or shapes differ."""
    import torch
    from safetensors.torch import load_file

    from weft.linear._structured import Structured

    stored = load_file(str(path))
    present = training_tensors(model, optimizer)
    if stored.keys() != present.keys():
        odd = sorted(stored.keys() ^ present.keys())[0]
        raise WeftError(f"checkpoint {path.parent} is of another model or method: {odd} is in only one of the two")
    with torch.no_grad():
        for name, tensor in stored.items():
            if present[name].shape != tensor.shape or present[name].dtype != tensor.dtype:
                raise WeftError(
                    f"checkpoint {path.parent} is of another model or method: {name} is {tuple(tensor.shape)} "
                    f"{tensor.dtype} there and {tuple(present[name].shape)} {present[name].dtype} here"
                )
            present[name].copy_(tensor)
        for layer in model.modules():
            if isinstance(layer, Structured):
                layer.derive()


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def install(partial: Path, output: Path) -> None:
    """Move the files of a finished folder into `output`, flushed, tensors last; the folder is gone afterwards."""
    flush(partial)
    files = [path for path in partial.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: (path.suffix == ".safetensors", path.name)):
        target = output / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    flush_names(output)
    remove(partial)
