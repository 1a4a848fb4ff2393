"""Base models by name: a hub id, a folder, or `builtin:pycode`; with their weights, or only their shapes.

`config:NAME` is a model of that config with random weights. After a question mark it takes the tokenizer's name and
fields of the config that are to be other than saved: `config:llama.json?tokenizer=gpt2&hidden_size=256`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode

from weft.errors import UsageError, WeftError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Task → the class of transformers that loads its models
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "segmentation": "AutoModelForSemanticSegmentation",
    "verification": "AutoModelForImageClassification",
}
IMAGE_TASKS = ("image-classification", "segmentation", "verification")  # of which the image processor is the tokenizer
_BY_NAMES = "AutoModelForZeroShotImageClassification"
_SCRATCH = "config:"

# Type of a dual encoder, of an image and a text side → the class of transformers that has both
DUAL_ENCODERS = {
    "altclip": "AltCLIPModel",
    "blip": "BlipModel",
    "chinese_clip": "ChineseCLIPModel",
    "clip": "CLIPModel",
    "clipseg": "CLIPSegModel",
    "metaclip_2": "MetaClip2Model",
    "siglip": "SiglipModel",
}

# Fields that configs work out by themselves where they are not given: those they follow from.
_DERIVED = {"head_dim": ("hidden_size", "num_attention_heads"), "layer_types": ("num_hidden_layers",)}


@dataclass
class Base:
    """A base model before anything is attached; `model` is on the meta device if it was asked for without weights.

    `tokenizer` is the image processor where the task is about images, and the `Pipeline` of text-to-image.
    """

    model: Any  # a transformers model, and in time what PEFT makes of it
    tokenizer: Any
    name: str
    task: str = "causal-lm"


def from_scratch(spec: str) -> bool:
    """Whether the model starts from random weights."""
    return spec.startswith(_SCRATCH)


def scratch_spec(config: str, tokenizer: str | None, fields: dict[str, str]) -> str:
    """The name of a model with random weights.

    >>> scratch_spec("llama.json", "gpt2", {"hidden_size": "256"})
    'config:llama.json?tokenizer=gpt2&hidden_size=256'
    """
    query = urlencode(({"tokenizer": tokenizer} if tokenizer else {}) | fields, safe="/:[], ", quote_via=quote)
    return _SCRATCH + config + (f"?{query}" if query else "")


def _scratch(spec: str) -> tuple[str, str | None, dict[str, str]]:
    """`scratch_spec`'s arguments. Raises UsageError where there is no NAME=VALUE."""
    config, _, query = spec.removeprefix(_SCRATCH).partition("?")
    try:
        fields = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise UsageError(f"model {spec!r}: {query!r} must be tokenizer=NAME and FIELD=VALUE between &") from None
    return config, fields.pop("tokenizer", None), fields


def changed_fields(spec: str) -> set[str]:
    """The fields of the config that the name of a model from random weights sets; none for any other."""
    return set(_scratch(spec)[2]) if from_scratch(spec) else set()


def locate(spec: str) -> str:
    """What `from_pretrained` takes for a model given by the user. Raises UsageError for a folder that is no model."""
    if from_scratch(spec):
        config, _, _ = _scratch(spec)
        return config if Path(config).is_file() else locate(config)
    if spec.startswith("builtin:"):
        from weft import builtin

        try:
            folder = builtin.model_path(spec.removeprefix("builtin:"))
        except KeyError as error:
            there = " and ".join(f"builtin:{name}" for name in builtin.MODELS)
            raise UsageError(f"unknown built-in model {spec!r}: there are {there}") from error
        if not (folder / "config.json").exists():
            raise WeftError(f"{spec} is not part of this installation: {folder} holds no model")
        return str(folder)
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"{spec} is a folder without config.json, so it is not a saved model")
        return str(path)
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UsageError(f"model {spec!r} is neither a folder with a saved model nor the name of one on the hub")
    return spec


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, able to pad."""
    from transformers import AutoTokenizer

    path = locate(spec)
    if from_scratch(spec):
        config, tokenizer_name, _ = _scratch(spec)
        if tokenizer_name is not None and not tokenizer_name.startswith("builtin:"):
            path = tokenizer_name  # a folder need not hold a model
        elif tokenizer_name is not None:
            path = locate(tokenizer_name)
        elif Path(config).is_file():
            raise UsageError(f"model {spec!r}: --tokenizer is missing, as {config} is a config alone")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise WeftError(f"cannot load the tokenizer of {spec!r}: {_reason(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_base(
    spec: str,
    task: str,
    *,
    dtype: torch.dtype | None = None,
    num_labels: int | None = None,
    labels: list[str] | None = None,
    weights: bool = True,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[str] | None = None,
) -> Base:
    """Load a base model for a task.

    Args:
        dtype: the weights' dtype; float32 by default.
        labels: the names of the classes, for classification, or of the identities that are to be told apart, for
            verification; `num_labels` where classes have no names.
        weights: False builds the model on the meta device from its config alone: shapes, no numbers.
        seed: draws the new classification head, so that equal seeds give equal models. A head of images for another
            number of classes is replaced by one, layer by layer where it has several.
        tokenizer: where it is loaded already; for images it is not loaded here.
        prompts: templates for the names of a dual encoder's classes; none at all put a head on its vision side, and
            None leaves it to the model (`dual.settle`).

    Raises UsageError for a name that is no model, WeftError for files that cannot be read.
    """
    import torch
    import transformers

    if task == "text-to-image":
        from weft.run import text_to_image

        return text_to_image.load_base(spec, dtype or torch.float32, tokenizer, weights=weights)
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}: there are {', '.join(TASKS)}")
    if task == "verification":
        from weft.run import verification

        return verification.load(spec, labels, dtype=dtype, weights=weights, seed=seed, tokenizer=tokenizer)
    path = locate(spec)
    config = _load_config(spec, path, num_labels, labels)
    _check_task(spec, config, task)
    of_images = task in IMAGE_TASKS
    by_names = _goes_by_names(spec, config, task, prompts, labels)
    auto: Any = getattr(transformers, _BY_NAMES if by_names else TASKS[task])
    words = load_tokenizer(spec) if by_names else None
    if by_names and from_scratch(spec):
        _fit_vocabulary(spec, config, words)
    if getattr(config, "use_auxiliary_head", False) and task == "segmentation":
        config.use_auxiliary_head = False  # it only helps a loss of transformers' own
    if not of_images:
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(spec)
        if from_scratch(spec):
            _fit_vocabulary(spec, config, tokenizer)
        if task == "classification" and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    dtype = dtype or torch.float32
    if not weights:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=True):
            model = auto.from_config(config, dtype=dtype)
        model.tie_weights()
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "weft":
            from transformers.quantizers.auto import AutoHfQuantizer

            AutoHfQuantizer.from_config(config.quantization_config).preprocess_model(model)
        return Base(_named(model, words, spec), tokenizer, spec, task)
    torch.manual_seed(seed)
    if from_scratch(spec):
        return Base(_named(auto.from_config(config, dtype=dtype), words, spec), tokenizer, spec, task)
    check_safetensors(Path(path))
    try:
        model, found = auto.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=of_images,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeftError(f"cannot load the weights of {spec!r}: {_reason(error)}") from error
    if of_images:  # whatever does not fit was drawn anew, which is meant for the head alone
        drawn = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        heads = () if by_names else tuple(f"{name}." for name in head_names(model))
        strange = sorted(key for key in drawn if not key.startswith(heads))
        if strange:
            raise WeftError(f"the weights of {spec!r} lack {strange[0]}, or hold it in another shape than its config")
    return Base(_named(model, words, spec), tokenizer, spec, task)


def _goes_by_names(
    spec: str, config: Any, task: str, prompts: Sequence[str] | None, labels: list[str] | None
) -> bool:
    """Whether a model for a task tells classes apart by their names. Raises UsageError where it cannot."""
    if task == "image-classification":
        from weft.run import dual

        return dual.settle(spec, config, prompts, labels)
    if prompts:
        raise UsageError(f"prompt_template is for the names of classes of images, and {spec!r} is asked for {task}")
    return False


def _named(model: Any, tokenizer: Any, spec: str) -> Any:
    """The model, ready to go by the names of its classes where there is a tokenizer that reads them."""
    if tokenizer is None:
        return model
    from weft.run import dual

    return dual.classifier(model, tokenizer, spec)


def check_task(spec: str, task: str) -> None:
    """Raise UsageError where a model, by its config, is for something else than the task."""
    _check_task(spec, load_config(spec), task)


def _check_task(spec: str, config: Any, task: str) -> None:
    import transformers

    if task == "image-classification" and config.model_type in DUAL_ENCODERS:
        return
    if type(config) not in getattr(transformers, TASKS[task])._model_mapping:
        raise UsageError(f"{spec!r} is a {config.model_type} model, which transformers has no {task} class for")


def load_as_saved(spec: str, *, bf16: bool = False, weights: bool = True) -> Any:
    """A model as the class, and in the dtype, in which it was saved: not for a task, but for what it is.

    Args:
        bf16: in bfloat16 instead.
        weights: False builds it on the meta device from its config alone.

    Raises UsageError for a name that is no model or of no class in transformers, WeftError for files that cannot be
    read or lack a tensor.
    """
    import torch
    import transformers

    if from_scratch(spec):
        raise UsageError(f"model {spec!r} has random weights; give one that was trained")
    path = locate(spec)
    config = _load_config(spec, path, None, None)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UsageError(f"model {spec!r} names no class of transformers as its architecture in config.json: {name!r}")
    if not weights:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=True):
            model = kind(config)
        model.tie_weights()
        return model.to(torch.bfloat16 if bf16 else config.dtype or torch.float32)
    check_safetensors(Path(path))
    try:
        model, found = kind.from_pretrained(
            path,
            config=config,
            dtype=torch.bfloat16 if bf16 else "auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeftError(f"cannot load the weights of {spec!r}: {_reason(error)}") from error
    if found["missing_keys"]:
        raise WeftError(f"model {spec!r} lacks the tensor {min(found['missing_keys'])} of a {name}")
    return model.eval()


def device() -> str:
    """Where a model does its work: on an accelerator if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def folder_of(spec: str) -> Path:
    """Where a model's files are on this disk; it has been loaded from there."""
    from transformers.utils import cached_file

    path = locate(spec)
    return Path(path) if Path(path).is_dir() else Path(str(cached_file(path, "config.json"))).parent


def _load_config(spec: str, path: str, num_labels: int | None, labels: list[str] | None) -> Any:
    from weft.anatomy import auto_config

    extra: dict[str, Any] = {}
    if labels:
        extra = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
        extra["num_labels"] = len(labels)  # timm's configs take their own number else
    elif num_labels is not None:
        extra = {"num_labels": num_labels}
    try:
        config = auto_config(path, **extra)
        if config.model_type == "timm_wrapper":
            import timm  # noqa: F401 — which its classes ask for in many more words
    except ImportError as error:
        raise WeftError(f'model {spec!r} is one of timm; install it with pip install "weft[timm]"') from error
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"model {spec!r} is not on this disk and cannot be had from the hub: {_reason(error)}"
        ) from error
    return _changed(spec, config) if from_scratch(spec) else config


def _changed(spec: str, config: Any) -> Any:
    """The config with the fields that the name of a model from random weights gives."""
    import yaml
    from huggingface_hub.errors import StrictDataclassError

    if getattr(config, "quantization_config", None):
        raise UsageError(f"model {spec!r}: the config is of a compressed or quantised model, which starts from weights")
    fields = _scratch(spec)[2]
    saved = config.to_dict()
    for name in fields:
        if name not in saved:
            raise UsageError(f"model {spec!r}: its config has no field {name!r}: {nearest(name, saved)}")
    for name, sources in _DERIVED.items():
        if name not in fields and any(source in fields for source in sources):
            saved.pop(name, None)
    try:
        given = {name: yaml.safe_load(value) for name, value in fields.items()}
        return type(config).from_dict(saved | given, attn_implementation=config._attn_implementation)
    except (ValueError, TypeError, StrictDataclassError, yaml.YAMLError) as error:  # what a config checks itself
        raise UsageError(f"model {spec!r}: {_reason(error.__cause__ or error)}") from error


def _fit_vocabulary(spec: str, config: Any, tokenizer: Any) -> None:
    """Let a config take the vocabulary and special tokens of a tokenizer that is not its own."""
    _, named, fields = _scratch(spec)
    text = config.get_text_config()
    if named is not None and "vocab_size" not in fields:
        text.vocab_size = len(tokenizer)
    if len(tokenizer) > text.vocab_size:
        raise UsageError(
            f"model {spec!r}: vocab_size={text.vocab_size} is smaller than the tokenizer's {len(tokenizer):,} tokens"
        )
    if named is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, getattr(tokenizer, name))


def check_safetensors(folder: Path) -> None:
    """Open the header of every safetensors file in a folder. Raises WeftError that names a truncated or damaged one."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise WeftError(
                f"{file} is truncated or damaged ({file.stat().st_size} bytes: {_reason(error)}); fetch it again"
            ) from error


def _reason(error: BaseException) -> str:
    """The first sentence of an error of transformers or the hub, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")


def load_config(spec: str) -> Any:
    """A model's config as it was saved."""
    return _load_config(spec, locate(spec), None, None)


def keep_attention(spec: str, folder: Path) -> None:
    """Let a model that was saved to `folder` ask for the attention that `spec` asks for, which transformers drops."""
    asked = load_config(spec)._attn_implementation
    file = folder / "config.json"
    if asked is not None and file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**saved, "attn_implementation": asked}, indent=2), encoding="utf-8")


def task_of(config: Any) -> str:
    """What a saved model is for, by the class that its config names."""
    return task_of_class((config.architectures or [""])[0])


def task_of_class(name: str) -> str:
    """What a class of transformers, or of diffusers, is for, by its name."""
    if name.endswith("ForImageClassification") or name in DUAL_ENCODERS.values():
        return "image-classification"
    if name == "UNet2DConditionModel":
        return "text-to-image"
    if name.endswith("ForSemanticSegmentation"):
        return "segmentation"
    return "classification" if name.endswith("ForSequenceClassification") else "causal-lm"


def classifier_name(model: Any) -> str:
    """The name of the module of an image classifier that makes scores of features. Raises UsageError without one."""
    inner = getattr(model, "timm_model", None)
    head = inner.get_classifier() if inner is not None else getattr(model, "classifier", None)
    found = [name for name, module in model.named_modules() if module is head]
    if not found and type(model).__name__ in DUAL_ENCODERS.values():
        raise UsageError(
            f"{type(model).__name__} has no head, but the names of classes: --prompt-template '' puts a head on its "
            "vision side"
        )
    if not found:
        raise UsageError(f"{type(model).__name__} has no classifier that could be trained beside an adapter")
    return found[0]


def head_names(model: Any) -> list[str]:
    """The modules of a model of images that make its answer of what the backbone found, trained beside an adapter.

    Of an image classifier the classifier; of a model of segmentation every layer outside of its backbone.
    """
    if task_of_class(type(model).__name__) != "segmentation":
        return [classifier_name(model)]
    backbone = ("backbone", model.base_model_prefix)
    return [
        name
        for name, module in model.named_modules()
        if name.partition(".")[0] not in ("", *backbone) and next(module.parameters(recurse=False), None) is not None
    ]


def classes_of(spec: str) -> list[str]:
    """The names of the classes that a model of images tells apart, in its order; none for any other model."""
    try:
        config = load_config(spec)
    except UsageError:
        from weft.run import text_to_image

        if text_to_image.is_pipeline(spec):  # which has a config for each of its parts
            return []
        raise
    known = task_of(config) in IMAGE_TASKS and not lacks_names(config)
    return [str(name) for _, name in sorted(config.id2label.items())] if known else []


def lacks_names(config: Any) -> bool:
    """Whether a saved model is a dual encoder that was given no classes yet, so that it can be given any."""
    headed = str((config.architectures or [""])[0]).endswith("ForImageClassification")
    return config.model_type in DUAL_ENCODERS and not headed and not getattr(config, "weft_prompts", None)


def position_limit(spec: str) -> int | None:
    """How many tokens the model can see at once, where its config says so."""
    config = load_config(spec)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 1:
            # RoBERTa's family counts positions from behind the padding index
            return limit - 2 if "roberta" in config.model_type else limit
    return None
