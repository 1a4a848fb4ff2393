"""Methods by name: weft's own, PEFT's own (`peft:lora`), and the references `base`, `head` and `full`.

weft's own are adapters, which PEFT puts on a model, and factorised weights, in whose form the model itself is trained.
What has no parameter groups of its own, all but weft's adapters, can name its optimiser after an @: one of weft's
(`full@galore`, `sltrain@galore`, `peft:lora@lora_pro`) or of HF Trainer's (`full@hf:adafactor`). What stands behind a #
only tells two entries of a comparison apart: `full@galore` and `full@galore#8bit`.

`resolve` checks a name and its options without loading any model; `attach` puts the method on a model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weft import registry
from weft.errors import UsageError, WeftError, nearest
from weft.run import backbones, models, text_to_image
from weft.run import options as _options

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from weft.pretrain._config import PretrainConfig

REFERENCES = ("base", "head", "full")

# What PEFT offers under one config class by setting a field.
_PEFT_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LORA", {"use_dora": True}),
    "rslora": ("LORA", {"use_rslora": True}),
    "pissa": ("LORA", {"init_lora_weights": "pissa"}),
    "olora": ("LORA", {"init_lora_weights": "olora"}),
}

# The field that sets the number of trainable parameters, where it is not `r`.
_PEFT_KNOBS = {
    "ADALORA": "init_r",  # what it starts with; training prunes to target_r
    "BOFT": "boft_block_size",
    "C3A": "block_size",
    "FOURIERFT": "n_frequency",
    "OFT": "oft_block_size",
    "WAVEFT": "n_frequency",
}

# Learning rates that the papers or their code use for AdamW; methods that are not named here take LoRA's.
_PEFT_LEARNING_RATES = {
    "ADALORA": 1e-3,
    "C3A": 1e-1,
    "FOURIERFT": 3e-2,
    "IA3": 3e-3,
    "VBLORA": 1e-3,
    "VERA": 4e-3,
    "WAVEFT": 2e-2,
}
_LORA_LEARNING_RATE = 3e-4
_REFERENCE_LEARNING_RATES = {"base": 0.0, "head": 1e-3, "full": 2e-5}
_COMMON_RECIPE = {"weight_decay": 0.0, "warmup_ratio": 0.05, "max_grad_norm": 1.0, "lr_scheduler_type": "linear"}
# AdamW's for small Llamas from random weights, in GaLore's and later papers
_PRETRAINING = {"learning_rate": 1e-3, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"}

# What HF Trainer takes beside an optimiser's name, in its own words and with its own names for them.
_HF_OPTIONS = (
    _options.Option("optim_args", str | None, None, "the optimiser's arguments: rank=128,update_proj_gap=200"),
    _options.Option("optim_target_modules", list[str] | str | None, None, "layers that galore_* and apollo_* project"),
)

# Fields of PEFT's configs that describe a saved adapter or the machine, not a choice of the user.
_INTERNAL = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "megatron_config", "megatron_core", "total_step"),
    )
)

# Configs in which `r` is the rank of a factorisation of each weight, so that it cannot exceed the weight's sides.
_RANK_FIELDS = {"LORA": "r", "ADALORA": "init_r", "HRA": "r", "DELORA": "r", "PSOFT": "r"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its options settled.

    Attributes:
        name: as the user wrote it: "sora", "peft:lora", "base", "head", "full".
        config: the PEFT config; None for the references.
        recipe: the method's own training recipe, keys of TrainingArguments.
        knob: the config field that sets the number of trainable parameters; None where there is none.
        options: what the user set, by field name.
        optimizer: the name after an @, with its options; None for AdamW.
        weights: the config of the factorised form in which the model's weights are trained; None for their own.
    """

    name: str
    config: PeftConfig | None
    recipe: dict[str, Any]
    knob: str | None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: tuple[str, dict[str, Any]] | None = None
    weights: PretrainConfig | None = None

    @property
    def trains(self) -> str:
        """The name without the optimiser's: what is put on the model."""
        return parts(self.name)[0]


def _peft_kinds() -> dict[str, tuple[str, dict[str, Any]]]:
    """PEFT's own methods that change layers: name after `peft:` → (PEFT type, fields that make the variant)."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import PeftType

    kinds: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in PeftType:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
        changes_layers = isinstance(tuner, type) and issubclass(tuner, BaseTuner)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
        if kind.value.startswith("WEFT_") or not changes_layers or config_class is None:
            continue
        if any(field.name == "target_modules" for field in dataclasses.fields(config_class)):
            kinds[kind.value.lower()] = (kind.value, {})
    return kinds | _PEFT_VARIANTS


def names() -> list[str]:
    """Every name that `resolve` takes."""
    own = [*sorted(registry.cards("adapters")), *sorted(registry.cards("pretrain"))]
    return own + [f"peft:{name}" for name in sorted(_peft_kinds())] + list(REFERENCES)


@functools.cache
def _config_class(name: str) -> type | None:
    """The config class behind a name; None for the references. Raises UsageError that suggests the nearest name."""
    if name in REFERENCES:
        return None
    if name.startswith("peft:"):
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType

        kinds = _peft_kinds()
        kind = name.removeprefix("peft:")
        if kind not in kinds:
            raise UsageError(f"unknown PEFT method {name!r}: {nearest(kind, kinds)}")
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kinds[kind][0])]
    known = registry.cards("adapters") | registry.cards("pretrain")
    if name not in known:
        elsewhere = registry.cards()
        if name in elsewhere:
            raise UsageError(
                f"{name!r} is a method of {elsewhere[name].pillar}, and trains nothing by itself: {nearest('', known)}"
            )
        raise UsageError(
            f"unknown method {name!r}: {nearest(name, [*known, 'peft:lora', *REFERENCES])} "
            "(PEFT's own are called peft:lora, peft:dora, peft:vera, ...)"
        )
    import weft  # noqa: F401 — makes the adapters known to PEFT

    return registry.config_class(name)


def optimizer_options(name: str) -> list[_options.Option]:
    """The options of an optimiser. Raises UsageError for an unknown name, and where the name is of nothing like it."""
    if not name.startswith("hf:"):
        registry.card(name, "optim")
        return _options.from_config(registry.config_class(name))
    from transformers.training_args import OptimizerNames

    known = [f"hf:{each.value}" for each in OptimizerNames]
    if name not in known:
        raise UsageError(f"unknown optimizer {name!r}: {nearest(name, known)}")
    return list(_HF_OPTIONS)


def parts(name: str) -> tuple[str, str | None]:
    """A method's name and its optimiser's. Raises UsageError where the two do not go together."""
    trains, at, optimizer = name.partition("#")[0].partition("@")
    if not at:
        return trains, None
    if trains != "full" and not trains.startswith("peft:") and trains not in registry.cards("pretrain"):
        raise UsageError(
            f"optimizer={optimizer!r} does not go with method {trains}: weft's adapters declare parameter groups of "
            "their own for AdamW; use full, PEFT's own as peft:lora, or one of `weft methods --pillar pretrain`"
        )
    return trains, optimizer


def _optimizer_keys(trains: str, optimizer: str) -> dict[str, str]:
    """Option of the optimiser → what it is called beside the method's: its name first where both have one so called."""
    taken = {option.name for option in method_options(trains)}
    names = [option.name for option in optimizer_options(optimizer)]
    return {name: f"{optimizer}_{name}" if name in taken else name for name in names}


def optimizer_values(method: Method) -> dict[str, Any]:
    """The value of each option of its optimiser, given or default, by what it is called beside the method's."""
    if method.optimizer is None:
        return {}
    name, given = method.optimizer
    values = {option.name: option.default for option in optimizer_options(name)} | given
    return {key: values[own] for own, key in _optimizer_keys(method.trains, name).items()}


def method_options(name: str) -> list[_options.Option]:
    """The options of a method, in the order of its config's fields, then its optimiser's.

    Raises UsageError for an unknown name.
    """
    name, optimizer = parts(name)
    if optimizer is not None:
        keys = _optimizer_keys(name, optimizer)
        theirs = [dataclasses.replace(each, name=keys[each.name]) for each in optimizer_options(optimizer)]
        return [*method_options(name), *theirs]
    config_class = _config_class(name)
    if config_class is None:
        return []
    hidden = set(_INTERNAL)
    if name.startswith("peft:"):
        hidden |= set(_peft_kinds()[name.removeprefix("peft:")][1])
    return _options.from_config(config_class, frozenset(hidden))


def resolve(name: str, options: dict[str, Any] | None = None, *, from_scratch: bool = False) -> Method:
    """The method called `name` with the given options, all checked; no model is loaded.

    Target modules that are not given are every linear layer but the head (PEFT's "all-linear").

    Args:
        from_scratch: the model starts from random weights, which changes the recipe of `full` and of its optimisers.

    Raises UsageError for an unknown method or option, a wrong type, or a value that the method refuses.
    """
    trains, optimizer = parts(name)
    if optimizer is not None:
        return _with_optimizer(name, trains, optimizer, dict(options or {}), from_scratch)
    config_class = _config_class(trains)
    given = _options.check(name, method_options(name), dict(options or {}))
    if config_class is None:
        recipe = {"learning_rate": _REFERENCE_LEARNING_RATES[trains], **_COMMON_RECIPE}
        recipe |= _PRETRAINING if from_scratch and trains == "full" else {}
        return Method(name, None, recipe, None, {})
    if trains in registry.cards("pretrain"):
        card = registry.card(trains)
        recipe = resolve("full", from_scratch=from_scratch).recipe | _own_recipe(card, from_scratch)
        weights = config_class.from_options(given)  # type: ignore[attr-defined]
        return Method(name, None, recipe, card.knob or None, given, weights=weights)
    fields = dict(given)
    if trains.startswith("peft:"):
        kind, variant = _peft_kinds()[trains.removeprefix("peft:")]
        recipe = {"learning_rate": _PEFT_LEARNING_RATES.get(kind, _LORA_LEARNING_RATE), **_COMMON_RECIPE}
        known = {field.name for field in dataclasses.fields(config_class)}
        knob: str | None = _PEFT_KNOBS.get(kind, "r")
        knob = knob if knob in known else None
        fields |= variant
        if kind == "ADALORA":
            # the real number is known, and set, when the run starts
            fields["total_step"] = fields.get("tinit", 0) + fields.get("tfinal", 0) + 1
            if "init_r" in fields and "target_r" not in fields:
                fields["target_r"] = max(1, fields["init_r"] * 2 // 3)  # as in PEFT's defaults, 12 to 8
    else:
        card = registry.card(trains)
        recipe, knob = {"learning_rate": _LORA_LEARNING_RATE, **_COMMON_RECIPE, **card.recipe}, card.knob
    targets = ("target_modules", "target_parameters")
    if not any(fields.get(field) for field in targets) and kind_takes_linear_targets(config_class):
        fields["target_modules"] = "all-linear"
    try:
        config = config_class(**fields)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{name}: {_one_sentence(error)}") from error
    _check_positive_rank(name, config)
    return Method(name, config, recipe, knob, given)


def _with_optimizer(name: str, trains: str, optimizer: str, given: dict[str, Any], from_scratch: bool) -> Method:
    """A method that steps by another optimiser than AdamW."""
    keys = {key: option for option, key in _optimizer_keys(trains, optimizer).items()}
    given = _options.check(name, method_options(name), given)
    method = resolve(trains, {k: v for k, v in given.items() if k not in keys}, from_scratch=from_scratch)
    theirs = {keys[key]: value for key, value in given.items() if key in keys}
    recipe = dict(method.recipe)
    if not optimizer.startswith("hf:"):
        card = registry.card(optimizer, "optim")
        registry.config_class(optimizer).from_options(theirs)  # type: ignore[attr-defined]
        recipe |= dict(card.recipe) if trains.startswith("peft:") else _own_recipe(card, from_scratch)
    return dataclasses.replace(method, name=name, recipe=recipe, options=given, optimizer=(optimizer, theirs))


def _own_recipe(card: registry.Card, from_scratch: bool) -> dict[str, Any]:
    """The recipe of a card, which is for pretraining or for fine-tuning, for one of the two.

    In the other one its learning rate is to AdamW's as it is in its own, and the schedule is AdamW's.
    """
    if card.pretraining == from_scratch:
        return dict(card.recipe)
    ratio = _PRETRAINING["learning_rate"] / _REFERENCE_LEARNING_RATES["full"]  # type: ignore[operator]
    rate = card.recipe["learning_rate"] * (ratio if from_scratch else 1 / ratio)
    return {"learning_rate": float(f"{rate:.3g}"), "weight_decay": card.recipe.get("weight_decay", 0.0)}


def kind_takes_linear_targets(config_class: type) -> bool:
    """Whether "all-linear" makes sense for the config: not for methods that act on norms or on embeddings."""
    return config_class.__name__ not in ("LNTuningConfig", "TrainableTokensConfig", "BeftConfig")


def _check_positive_rank(name: str, config: PeftConfig) -> None:
    field = "init_r" if hasattr(config, "init_r") else "r"
    rank = getattr(config, field, None)
    if isinstance(rank, int) and not isinstance(rank, bool) and rank <= 0 and not name.startswith("peft:oft"):
        raise UsageError(f"{name}: {field} must be at least 1, not {rank}")


def _one_sentence(error: BaseException) -> str:
    """The first sentence of someone else's error message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type of a transformers model, from its class; None where PEFT's plain wrapper serves."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_CLS" if name.endswith("ForSequenceClassification") else None


def config_for(method: Method, model: nn.Module) -> Any:
    """A copy of the method's config that fits the model's task, ready to be attached."""
    config = copy.deepcopy(method.config)
    if config is None:
        raise WeftError(f"{method.name} has no adapter to configure")
    config.task_type = task_type(model)
    factors, excluded = _factors(model), getattr(config, "exclude_modules", "")  # "": the config has no such field
    if factors and config.target_modules == "all-linear" and not isinstance(excluded, str):
        # PEFT would find the layers of a compressed model, and once more the factors in them
        config.exclude_modules = sorted({*(excluded or ()), *factors})
    if models.task_of_class(type(model).__name__) in models.IMAGE_TASKS:
        backbones.settle(method, config, model)
    elif models.task_of_class(type(model).__name__) == "text-to-image":
        text_to_image.settle(config)
    return config


def _factors(model: nn.Module) -> set[str]:
    """What the modules inside of a compressed model's structured layers are called."""
    from weft.linear._structured import Structured

    structured = (layer for layer in model.modules() if isinstance(layer, Structured) and layer.opaque)
    return {name for layer in structured for name, _ in layer.named_children()}


# Fields of a method's config that speak of the run: where they are not given, they follow it.
OF_THE_RUN = ("learning_rate", "warmup_ratio", "total_steps", "seed")


def following(method: Method, run: dict[str, Any]) -> Method:
    """The method with those fields of its config that speak of the run set to the run's own values.

    What the user set for the method stays. Raises UsageError where the method refuses a value.
    """
    known = {option.name for option in method_options(method.name)}
    values = {name: run[name] for name in OF_THE_RUN if name in run and name in known - method.options.keys()}
    if not values or (method.config is None and method.optimizer is None and method.weights is None):
        return method
    return resolve_with(method, values)


def resolve_with(method: Method, values: dict[str, Any]) -> Method:
    """The method with further options, and the same record of what the user set."""
    turned = resolve(method.name, {**method.options, **values})
    return dataclasses.replace(turned, options=method.options, recipe=method.recipe)


def check_fits(method: Method, model: nn.Module) -> list[str]:
    """The names of the modules that the method will change; works on a model without weights.

    Raises UsageError where nothing matches (listing what there is) or a rank exceeds a matched weight's shorter side.
    """
    if method.weights is not None:
        from weft.pretrain._engine import targets

        _check_optimizer(method, attach(method, copy.deepcopy(model)))
        return list(targets(model, method.weights))
    if method.config is None:
        _check_optimizer(method, model)
        return []
    import torch

    config: Any = method.config
    if "quality" in needs(method):
        backbones.check_quality(method, model)
    modules = {name: module for name, module in model.named_modules() if name}
    if getattr(config, "target_parameters", None) and not config.target_modules:
        return list(config.target_parameters)
    matched = matched_modules(method, model)
    if not matched:
        kinds = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in modules.items()
                if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() >= 2
            }
        )
        raise UsageError(
            f"target_modules {_shown(config.target_modules)} match nothing in {type(model).__name__}: "
            f"there are {', '.join(kinds)}"
        )
    field = _RANK_FIELDS.get(str(getattr(config.peft_type, "value", config.peft_type)))
    if field is not None:
        for name in matched:
            weight = getattr(modules[name], "weight", None)
            if weight is None or weight.dim() < 2:
                continue
            side = min(weight.shape[0], weight[0].numel())
            rank = _rank_of(config, name, field)
            if rank > side:
                raise UsageError(
                    f"{method.name}: {field}={rank} is larger than the shorter side {side} of {name} "
                    f"({' x '.join(map(str, weight.shape))}); use at most {side}"
                )
    return matched


def _check_optimizer(method: Method, model: nn.Module) -> None:
    """Raise UsageError where the optimiser cannot step the model, which is without weights."""
    if method.optimizer is None:
        return
    name, options = method.optimizer
    if not name.startswith("hf:"):
        from weft.optim import optimizer

        optimizer(name, copy.deepcopy(model), lr=method.recipe["learning_rate"], **options)  # it may freeze some
        return
    from transformers import Trainer, TrainingArguments

    asked = TrainingArguments(output_dir=tempfile.gettempdir(), optim=name.removeprefix("hf:"), **options, use_cpu=True)
    try:
        Trainer.get_optimizer_cls_and_kwargs(asked, model)  # type: ignore[arg-type]
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{name}: {_one_sentence(error)}") from error


def _rank_of(config: PeftConfig, name: str, field: str) -> int:
    """The rank that a module gets: PEFT's rank_pattern holds name endings or regular expressions."""
    for pattern, rank in (getattr(config, "rank_pattern", None) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return getattr(config, field)


def _shown(targets: Any) -> str:
    return repr(sorted(targets)) if isinstance(targets, (set, list, tuple)) else repr(targets)


def matched_modules(method: Method, model: nn.Module) -> list[str]:
    """The names of the modules that `target_modules` selects, in the model's order; PEFT's own rules."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    config: Any = _maybe_include_all_linear_layers(config_for(method, model), model)
    if config.target_modules is None:
        return []
    if isinstance(config.target_modules, list):
        config.target_modules = set(config.target_modules)
    names = [name for name, _ in model.named_modules() if name]
    heads = ("score", "classifier") if config.task_type == "SEQ_CLS" else ()
    return [
        name
        for name in names
        if check_target_module_exists(config, name) and not any(part in heads for part in name.split("."))
    ]


def needs(method: Method) -> tuple[str, ...]:
    """What the method must be given before it attaches, by the names that `weft.prepare` takes."""
    own = method.config is not None and not method.trains.startswith("peft:")
    return registry.card(method.trains).needs if own else ()


def attach(
    method: Method,
    model: nn.Module,
    batches: Iterable[dict[str, Any]] | None = None,
    held_out: Iterable[dict[str, Any]] | None = None,
    processor: Any = None,
) -> nn.Module:
    """The model with the method on it, ready to train; the given model is changed in place.

    Args:
        batches: training batches on the model's device, for methods whose card says that they need some.
        held_out: batches of rows that training does not see, likewise.
        processor: what prepares images, for methods that judge them.
    """
    import weft

    if method.trains == "full":
        return model.requires_grad_(True)
    if method.weights is None:
        backbones.keep_statistics(model)
    if method.trains == "base":
        return model.requires_grad_(False)
    if method.trains == "head":
        return _train_head_only(model)
    if method.weights is not None:
        options = {entry.name: getattr(method.weights, entry.name) for entry in dataclasses.fields(method.weights)}
        return weft.reparametrise(model, method.trains, **options).requires_grad_(True)
    from peft import get_peft_model

    from weft.run import verification

    check_fits(method, model)
    config = config_for(method, model)
    try:
        if not method.trains.startswith("peft:"):
            # what a run loads has no other original
            served = {"batches": batches, "held_out": held_out, "original_weights": model}
            if "quality" in needs(method):
                served["quality"] = backbones.judged_by(method, config, batches or (), processor)
            weft.prepare(model, config, **{need: served[need] for need in needs(method) if need in served})
        return verification.train_beside(get_peft_model(model, config))
    except WeftError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"{method.name}: {_one_sentence(error)}") from error


def finish(method: Method, model: nn.Module) -> bool:
    """Do with the trained model what the method does in the end, in place; whether it is another one then."""
    ending = getattr(registry.load(method.trains), "finish", None) if method.weights is not None else None
    return ending is not None and ending(method.weights, model)


def _train_head_only(model: Any) -> nn.Module:
    """Freeze all but the output head; a head tied to the input embedding gets a copy of its own first."""
    import torch

    model.requires_grad_(False)
    if models.task_of_class(type(model).__name__) in models.IMAGE_TASKS:
        for name in models.head_names(model):
            model.get_submodule(name).requires_grad_(True)
        return model
    head: Any = _head(model)
    embedding = model.get_input_embeddings()
    if getattr(head, "weight", None) is getattr(embedding, "weight", None):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    head.requires_grad_(True)
    return model


def _head(model: Any) -> nn.Module:
    for name in ("score", "classifier"):
        if hasattr(model, name):
            return getattr(model, name)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise UsageError(f"{type(model).__name__} has no output head, so method 'head' cannot train it")
    return head


def count_trainable(method: Method, model_skeleton: nn.Module) -> int:
    """`trainable` before attaching; the model may lie on the meta device and stays as it was."""
    from peft import get_peft_model

    from weft.run import verification

    model = copy.deepcopy(model_skeleton)
    if method.config is None:
        attach(method, model)
    else:
        config = config_for(method, model)
        if isinstance(getattr(config, "init_lora_weights", None), str):
            config.init_lora_weights = True  # initialisations that factorise the weight do not change the count
        model = verification.train_beside(get_peft_model(model, config, low_cpu_mem_usage=True))
    return trainable(model)


def trainable(model: nn.Module) -> int:
    """How many parameters the model trains, without what an adapter only allocates to grow into."""
    from weft.adapters._delta import Delta

    trained = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".ranknum." not in name  # AdaLoRA's counters, frozen except on the meta device
    )
    return trained - sum(module.spare() for module in model.modules() if isinstance(module, Delta))
