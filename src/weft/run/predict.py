"""Answers of an adapted model: text, label probabilities for classifiers of text or images, or whose an image is.

What a model of segmentation answers is in `segmentation.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError
from weft.run import sources
from weft.run.adapt import LABELS_FILE, PROMPTS_FILE, RUN_FILE
from weft.run.models import IMAGE_TASKS, Base, task_of_class
from weft.run.text_to_image import INDEX

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. Temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise UsageError(f"temperature must not be below 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def adapter_facts(adapter: Path) -> dict[str, Any]:
    """What an adapter's folder says of itself: kind ("adapter" or "model"), base model, task, labels, mirror, and
    `prompts`: the templates of a dual encoder's classes, or none at all where a head of its own tells them apart.

    Without classes, and with none in labels.json, an image classifier is one for verification.

    Raises UsageError for a folder that holds neither an adapter nor a model.
    """
    if not adapter.is_dir():
        raise UsageError(f"adapter {str(adapter)!r} is not a folder")
    labels, prompts = (
        _read_json(adapter / name) if (adapter / name).exists() else None for name in (LABELS_FILE, PROMPTS_FILE)
    )
    run: dict[str, Any] = {}
    if (adapter / RUN_FILE).exists():
        import yaml

        run = yaml.safe_load((adapter / RUN_FILE).read_text(encoding="utf-8")) or {}
    mirror = bool(run.get("mirror"))
    if (adapter / "adapter_config.json").exists():
        config = _read_json(adapter / "adapter_config.json")
        base = run.get("model") or config.get("base_model_name_or_path")
        # PEFT writes the class of the base model where it has no word of its own for the task
        named = (config.get("auto_mapping") or {}).get("base_model_class") or ""
        task = "classification" if config.get("task_type") == "SEQ_CLS" else task_of_class(named)
        task = "verification" if labels == [] else task
        prompts = [] if named.endswith("ForImageClassification") else prompts
        own = {"labels": labels, "mirror": mirror, "prompts": prompts}
        return {"kind": "adapter", "base": base, "task": task, **own}
    if (adapter / INDEX).exists():
        return {"kind": "model", "base": str(adapter), "task": "text-to-image", "labels": None}
    if (adapter / "config.json").exists():
        config = _read_json(adapter / "config.json")
        timm = "pretrained_cfg" in config  # whose configs are timm's own
        task = "image-classification" if timm else task_of_class((config.get("architectures") or [""])[0])
        task = "verification" if labels == [] or config.get("id2label") == {} else task
        own = {"labels": labels, "mirror": mirror, "prompts": prompts}
        return {"kind": "model", "base": str(adapter), "task": task, **own}
    unfinished = " (its run has not finished)" if (adapter / RUN_FILE).exists() else ""
    raise UsageError(f"{str(adapter)!r} holds no adapter_config.json, so it is not an adapter{unfinished}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeftError(f"{path} cannot be read: {error}") from error


def load_adapted(model: str | None, adapter: Path, *, bf16: bool = False) -> Base:
    """The base model with the adapter on it, ready to answer.

    Args:
        model: the base model; None takes the one that the adapter was trained on.

    Raises WeftError for damaged files, UsageError for an adapter that was made for another base model.
    """
    import peft  # noqa: F401 — before transformers, so that weft's adapters are known when the file names one
    import torch

    from weft.run import backbones, verification
    from weft.run.models import check_safetensors, load_base

    facts = adapter_facts(adapter)
    spec = facts["base"] if facts["kind"] == "model" else model or facts["base"]
    if not spec:
        raise UsageError(f"adapter {str(adapter)!r} does not say which model it is for: give --model")
    check_safetensors(adapter)
    labels, count = facts["labels"], None
    if facts["task"] != "causal-lm" and not labels:
        count = _count_labels(adapter)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = load_base(spec, facts["task"], dtype=dtype, labels=labels, num_labels=count, prompts=facts["prompts"])
    if facts["task"] in IMAGE_TASKS:
        from weft.run import images, segmentation

        read = segmentation.load_processor if facts["task"] == "segmentation" else images.load_processor
        base.tokenizer = read(str(adapter) if (adapter / images.PROCESSOR).exists() else spec)
    if facts["kind"] == "adapter":
        base.model = attach_saved(base.model, adapter, spec)
        backbones.judge_again(base.model, base.tokenizer)
    if facts["task"] == "verification":
        verification.head_of(base.model).mirror = facts["mirror"]  # type: ignore[union-attr]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base.model.to(device).eval()
    return base


def _count_labels(adapter: Path) -> int | None:
    """The number of classes of a saved classification head."""
    from safetensors import safe_open

    for file in adapter.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 — not a mapping
                if re.search(r"(score|classifier|out_proj)(\.\d+)?\.weight$", name):
                    return int(tensors.get_slice(name).get_shape()[0])
    return None


def attach_saved(model: nn.Module, adapter: Path, base_name: str) -> nn.Module:
    """The model with a saved adapter on it. Raises UsageError, in one sentence, where the two do not fit."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except WeftError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())
        mismatch = re.search(r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)", text)
        if mismatch:
            name, there, here = mismatch.groups()
            reason = f"{name.removeprefix('base_model.model.')} is {there} in the adapter and {here} in the model"
        else:
            reason = text.split(". ")[0].rstrip(".") or type(error).__name__
        raise UsageError(
            f"adapter {str(adapter)!r} was made for another base model than {base_name!r}: {reason}"
        ) from error


# --- answers ----------------------------------------------------------------------------------------------------------


def complete(
    base: Base, prompts: list[str], sampling: Sampling, batch_size: int = 8, *, templated: bool = False
) -> Iterator[str]:
    """The continuation of each prompt, in order; equal seeds and batch sizes give equal texts.

    Args:
        templated: the prompts are conversations in the tokenizer's template.
    """
    import torch

    tokenizer = base.tokenizer
    model: Any = base.model
    device = next(model.parameters()).device
    torch.manual_seed(sampling.seed)
    # a model's own generation config may punish repetition or search with beams: neither is the likeliest token
    drawn: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        drawn |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ends = _end_tokens(model, tokenizer)
    for start in range(0, len(prompts), batch_size):
        batch = [prompt_ids(tokenizer, prompt, templated) for prompt in prompts[start : start + batch_size]]
        longest = max(map(len, batch))
        # padding goes to the left, so that every prompt ends where its continuation begins
        ids = torch.tensor([[tokenizer.pad_token_id or 0] * (longest - len(row)) + row for row in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
                eos_token_id=ends or None,
                use_cache=True,
                **drawn,
            )
        for row in made[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            yield tokenizer.decode(row[:end], skip_special_tokens=True)


def prompt_ids(tokenizer: Any, prompt: str, templated: bool = False) -> list[int]:
    """Token ids of a prompt, at least one; a template has written the special tokens already."""
    ids = tokenizer(prompt, add_special_tokens=not templated, verbose=False)["input_ids"]
    filler = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id or 0
    return list(ids) or [filler]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends a text: for the model as it was published, and for the tokenizer, whose end token training adds."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    return sorted({token for token in (*known, tokenizer.eos_token_id) if token is not None})


def classify(base: Base, rows: list[sources.Row], max_length: int, batch_size: int = 8) -> Iterator[dict[str, float]]:
    """The probability of each label, by name, for each row of text (or text1 and text2), or image."""
    import torch

    from weft.run.data import collate, encode_pair
    from weft.run.images import preparer

    model: Any = base.model
    device = next(model.parameters()).device
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    of_images = base.task == "image-classification"
    prepare = preparer(base.tokenizer) if of_images else None
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        if prepare is not None:
            batch = collate([{"pixel_values": prepare(row["image"])} for row in some])
        else:
            encoded = [encode_pair(base.tokenizer, row, max_length) for row in some]
            batch = collate(encoded, base.tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        for probabilities in logits.float().softmax(-1).tolist():
            yield dict(zip(names, probabilities, strict=True))


def prompts_of(rows: list[sources.Row], tokenizer: Any) -> list[tuple[str, str | None]]:
    """For each row the prompt to continue and, where the row has it, the continuation that was expected."""
    made: list[tuple[str, str | None]] = []
    for row in rows:
        if "messages" in row:
            turns = row["messages"]
            expected = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
            turns = turns[:-1] if expected is not None else turns
            made.append((tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), expected))
        elif "prompt" in row:
            made.append((row["prompt"], row.get("completion")))
        else:
            made.append((row["text"], None))
    return made
