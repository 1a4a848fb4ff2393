"""What a model costs: parameters, bytes on the disk, memory of a forward pass, tokens a second."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.run import models
from weft.run.models import Base, load_base, load_config, position_limit

if TYPE_CHECKING:
    import torch
    from torch import nn

Json = dict[str, Any]

BATCHES = (1, 16)
REPEATS = 5
PROMPT, NEW = 128, 32  # tokens of a timed prompt, and of what is written behind it, where the model can see as many


# --- at rest ----------------------------------------------------------------------------------------------------------


def at_rest(spec: str, task: str, tokenizer: Any = None, **loading: Any) -> Json:
    """`parameters`, `linear_bits` and `file_bytes` of a saved model, from its config and files alone.

    `linear_bits` is None for a model that another library has quantised, `file_bytes` where there are no safetensors.
    """
    import torch

    config = load_config(spec)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = load_base(spec, task, dtype=dtype, weights=False, tokenizer=tokenizer, **loading).model
    foreign = (getattr(config, "quantization_config", None) or {"quant_method": "weft"})["quant_method"] != "weft"
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "linear_bits": None if foreign else linear_bits(model),
        "file_bytes": sum(file.stat().st_size for file in weight_files(spec)) or None,
    }


def linear_bits(model: nn.Module) -> int:
    """Bits of the matrices in a model's linear layers, dense or structured, without the head on top of it.

    Biases do not count.
    """
    from weft.linear._structured import stored_bits

    return sum(stored_bits(layer) for layer in set(_linear_layers(getattr(model, "base_model", model))))


def _linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers inside, each whole: the factors of a structured one are its own."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        yield module
    else:
        for child in module.children():
            yield from _linear_layers(child)


def weight_files(spec: str) -> list[Path]:
    """The safetensors files that hold a model's weights, here or in the hub's cache."""
    folder = models.folder_of(spec)
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


# --- in memory --------------------------------------------------------------------------------------------------------


def forward_peak(asked: Json, threads: int) -> int | None:
    """Bytes that a model and its forward pass need at most, measured in a fresh process; None where no system tells.

    Args:
        asked: `model`, `task`, `bf16`, `batch_size` rows and `max_length` tokens of the pass.
    """
    from weft.run.spread import Processes

    pool = Processes(_forward, {}, workers=1, threads=threads)
    try:
        pool.submit(asked)
        _, row = pool.next()
    finally:
        pool.close()
    if row is None:
        raise WeftError(f"the process that measured the memory of {asked['model']!r} was killed: is it out of memory?")
    if "error" in row:
        raise WeftError(f"the memory of {asked['model']!r} cannot be measured: {row['error']}")
    return row["peak_bytes"]


def _forward(_: Json, asked: Json) -> Json:
    """What the fresh process does."""
    import gc

    import torch

    from weft.run.measure import measuring_memory, restart_peak
    from weft.run.single import sentence

    try:
        # code and vocabulary do not count, weights do
        tokenizer = load_base(asked["model"], asked["task"], weights=False).tokenizer
        with measuring_memory() as seen:
            base = loaded(asked["model"], asked["task"], asked["bf16"], tokenizer)
            gc.collect()
            restart_peak()  # reading the files may need more
            ids = _random_ids(base.model, asked["batch_size"], asked["max_length"])
            with torch.inference_mode():
                base.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        return {"error": sentence(error)}
    return {"peak_bytes": seen.peak_bytes}


def loaded(spec: str, task: str, bf16: bool, tokenizer: Any, **loading: Any) -> Base:
    """A model ready to be evaluated, where models are run."""
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    base = load_base(spec, task, dtype=dtype, tokenizer=tokenizer, **loading)
    base.model.to(models.device()).eval()
    return base


def _random_ids(model: Any, rows: int, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    words = model.config.get_text_config().vocab_size
    return torch.randint(words, (rows, length), generator=generator).to(next(model.parameters()).device)


# --- in time ----------------------------------------------------------------------------------------------------------


def speeds(bases: Mapping[str, Base], batches: Sequence[int] = BATCHES, repeats: int = REPEATS) -> dict[str, Json]:
    """Tokens a second of each model: `prefill` and `decode`, each by batch size.

    Every model runs once before the clock does, and then in turns, so that whatever else the machine is doing meets
    all alike; medians over the repeats. Decoding is greedy, with a cache of keys and values, and its time is that of
    whole answers less that of the first token. None where the clock saw no difference, and for classifiers, which
    decode nothing.
    """
    prompt, new = _lengths(bases)
    found: dict[str, Json] = {
        name: {"prompt_tokens": prompt, "new_tokens": new, "repeats": repeats, "prefill": {}, "decode": {}}
        for name in bases
    }
    for batch in batches:
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in bases}
        for repeat in range(repeats + 1):
            for name in list(bases)[:: -1 if repeat % 2 else 1]:
                first = _seconds(bases[name], batch, prompt, 1)
                whole = _seconds(bases[name], batch, prompt, 1 + new) if new else first
                if repeat:
                    seen[name].append((first, whole - first))
        for name, times in seen.items():
            reading, writing = (statistics.median(each) for each in zip(*times, strict=True))
            found[name]["prefill"][str(batch)] = batch * prompt / reading
            found[name]["decode"][str(batch)] = batch * new / writing if new and writing > 0 else None
    return found


def _lengths(bases: Mapping[str, Base]) -> tuple[int, int]:
    """Tokens of a prompt and behind it, the same for all models."""
    limits = [limit for base in bases.values() if (limit := position_limit(base.name)) is not None]
    prompt = min([PROMPT, *(limit // 2 for limit in limits)])
    if any(base.task == "classification" for base in bases.values()):
        return prompt, 0
    return prompt, min([NEW, *(limit - prompt - 1 for limit in limits)])


def _seconds(base: Base, batch: int, prompt: int, new: int) -> float:
    """What it takes to read the prompts and write `new` tokens behind each."""
    import torch

    model = base.model
    ids = _random_ids(model, batch, prompt)
    mask = torch.ones_like(ids)
    _wait(ids.device)
    start = time.perf_counter()
    with torch.inference_mode():
        if base.task == "classification":
            model(input_ids=ids, attention_mask=mask)
        else:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=base.tokenizer.pad_token_id or 0,
            )
    _wait(ids.device)
    return time.perf_counter() - start


def _wait(where: torch.device) -> None:
    """Until the accelerator has done what it was told."""
    import torch

    if where.type == "cuda":
        torch.cuda.synchronize(where)
