"""Training with adapters: what happens before attaching, the optimiser and its groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from weft.adapters._config import AdapterConfig, tasks_of
from weft.adapters._delta import Delta, Group
from weft.errors import UsageError
from weft.registry import card, load
from weft.steps import adopt_state, controllers, step


def prepare(model: nn.Module, config: AdapterConfig, **served: Any) -> AdapterConfig:
    """Serve what a method needs to see before it attaches, and return the config, ready for `get_peft_model`.

    Args:
        model: the base model, not yet adapted.
        config: the method's config.
        served: what the card's `needs` name: `batches`, an iterable of model inputs with labels; `held_out`, the same
            of rows that training does not see; `original_weights`, the model before it was quantised; …

    A method without needs returns at once. Raises UsageError where a need is not served. Nothing is needed to reload.
    """
    check_served(config, served, "weft.prepare(model, config, {}=...)")
    config.merged_tasks = tasks_of(model)
    needs = card(config.slug()).needs
    if needs:
        load(config.slug()).prepare(model, config, **{name: served[name] for name in needs})
    return config


def check_served(config: AdapterConfig, served: Mapping[str, Any], call: str) -> None:
    """Raise UsageError where a need of the method is not served; `call` serves it, with {} for its name."""
    missing = [name for name in card(config.slug()).needs if served.get(name) is None]
    if missing:
        raise UsageError(f"{config.slug()} needs {', '.join(missing)}: {call.format(missing[0])}")


class StepCallback(TrainerCallback):
    """`step` for HF Trainer with an optimiser from outside torch."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step(kwargs["model"])


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in groups: each method's own groups as declared, the rest with and without decay."""
    declared: dict[int, Group] = {}
    adapter: set[int] = set()
    for module in model.modules():
        if isinstance(module, Delta):
            named = dict(module.named_parameters())
            adapter.update(map(id, named.values()))
            declared.update({id(named[name]): group for name, group in module.groups(module.config).items()})
    buckets: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        group = declared.get(id(p), Group())
        # vectors outside adapters are biases and norms, which by custom do not decay
        decay = weight_decay if id(p) in adapter or p.dim() > 1 else 0.0
        settings: dict[str, Any] = {
            "lr": (group.lr if group.lr is not None else lr) * group.lr_factor,
            "weight_decay": decay if group.weight_decay is None else group.weight_decay,
        }
        if group.eps is not None:
            settings["eps"] = group.eps
        key = tuple(sorted(settings.items()))
        buckets.setdefault(key, {"params": [], **settings})["params"].append(p)
    return list(buckets.values())


def optimizer_and_scheduler(
    model: nn.Module, args: TrainingArguments, num_training_steps: int | None = None
) -> tuple[Optimizer, LRScheduler | None]:
    """The optimiser and schedule of `args` with the parameter groups that the model's methods declare.

    Pass the pair to `Trainer(optimizers=...)`. The methods' state travels in the optimiser's state dict, so that
    `Trainer.train(resume_from_checkpoint=...)` goes on as if never interrupted. The schedule needs the number of steps:
    `num_training_steps` or `args.max_steps`; without either it is None and Trainer makes its own.
    """
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    kwargs = {k: v for k, v in kwargs.items() if k != "lr"}
    optimizer = optimizer_class(
        parameter_groups(model, args.learning_rate, args.weight_decay), lr=args.learning_rate, **kwargs
    )
    adopt_state(optimizer)
    total = num_training_steps or (args.max_steps if args.max_steps > 0 else None)
    for controller in controllers(model):
        controller.total_steps = total
    stage = max((d.stage_steps(d.config) or 0 for d in model.modules() if isinstance(d, Delta)), default=0)
    length = stage or total
    if length is None:
        return optimizer, None
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(length),
        length,
        getattr(args, "lr_scheduler_kwargs", None),
    )
    if stage:
        if not isinstance(scheduler, LambdaLR):
            raise UsageError(f"lr_scheduler_type={args.lr_scheduler_type} cannot start anew in a new stage: use linear")
        inner = scheduler.lr_lambdas[0]  # the same for all groups
        scheduler.lr_lambdas = [lambda now: inner(now % length)] * len(scheduler.lr_lambdas)
    return optimizer, scheduler
