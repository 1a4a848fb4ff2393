"""The end of a task: what an adapter has learned goes into the weights, and a fresh one takes its place."""

from __future__ import annotations

import copy
from typing import Any

from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig

from weft.adapters._config import AdapterConfig, tasks_of
from weft.adapters._delta import Delta
from weft.adapters._training import check_served, prepare
from weft.errors import UsageError
from weft.registry import card
from weft.steps import retire


def next_task(model: PeftModel, **served: Any) -> PeftModel:
    """End a task: merge the adapter into the weights and attach a fresh one like it, for the next task.

    Args:
        model: with one adapter, weft's or PEFT's own. It is spent: go on with what is returned.
        served: what `weft.prepare` needs for the next task's adapter, but for original weights: the merged ones are.

    The optimiser is spent too, and a step of it an error: build one for the returned model. weft's adapters are added
    to the weights in float32, rounded once. The model's config counts the tasks in its weights, as an adapter does that
    is saved on it; the two must agree, so that no task is merged twice. CoDyRA with `history` merges nothing: what its
    tasks have learned stays beside the weights, in one adapter.

    Raises UsageError where the model has not exactly one adapter, where that cannot be merged, and where the method
    needs what is not served.
    """
    name = _only_adapter(model)
    config = model.peft_config[name]
    if "original_weights" in served:
        raise UsageError("original_weights: after a merge they are the model's own, so next_task takes none")
    if isinstance(config, AdapterConfig):
        check_served(config, {**served, "original_weights": model}, "weft.next_task(model, {}=...)")
    spent, training = [p for p in model.parameters() if p.requires_grad], model.training
    deltas = {m.name: m.eval() for m in model.modules() if isinstance(m, Delta)}
    kept = {place: left for place, delta in deltas.items() if (left := delta.legacy()) is not None}
    base = _unload(model) if kept else merge_task(model)
    following = _fresh(config)
    if isinstance(following, AdapterConfig):
        following.kept_tasks += bool(kept)
        needs = card(following.slug()).needs
        prepare(base, following, **{**served, **({"original_weights": base} if "original_weights" in needs else {})})
    made = get_peft_model(base, following, adapter_name=name)
    for delta in [m for m in made.modules() if isinstance(m, Delta)]:
        if delta.name in kept:
            delta.inherit(kept[delta.name])
    going_on = {id(p) for p in made.parameters()}
    retire([p for p in spent if id(p) not in going_on])
    return made.train(training)


def merge_task(model: PeftModel) -> Any:
    """The plain model, with what the adapter has learned in its weights; its config counts one task more.

    Raises UsageError where the model has not exactly one adapter, and where that cannot be merged.
    """
    config = model.peft_config[_only_adapter(model)]
    done = tasks_of(model.get_base_model())
    try:
        base: Any = model.merge_and_unload(safe_merge=True)
    except NotImplementedError as error:
        raise UsageError(f"{config.peft_type} cannot be merged into the weights, so no task can follow it") from error
    holder = base.config if isinstance(getattr(base, "config", None), PretrainedConfig) else base
    holder.weft_tasks = done + 1
    return base


def _only_adapter(model: Any) -> str:
    if not isinstance(model, PeftModel):
        raise UsageError(f"a task ends on a PeftModel, as get_peft_model returns it, not on a {type(model).__name__}")
    names = list(model.peft_config)
    if len(names) != 1 or model.active_adapters != names:
        raise UsageError(
            f"a task ends by merging the model's one adapter, and this model has {', '.join(names)}, of which "
            f"{', '.join(model.active_adapters) or 'none'} is active: delete or merge the others first"
        )
    return names[0]


def _unload(model: PeftModel) -> Any:
    """The plain model, its weights as they were before the adapter."""
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
        model.unmerge_adapter()
    return model.unload()


def _fresh(config: PeftConfig) -> PeftConfig:
    """The config of an adapter to be trained, from that of one that was, or that came from a file."""
    following = copy.deepcopy(config)
    following.inference_mode = False
    if isinstance(following, AdapterConfig):
        following.rank_pattern, following.base_sketch, following.checksums = {}, None, {}
    elif isinstance(following, AdaLoraConfig):
        following.rank_pattern = None  # what its budget left of the last task
    return following
