"""How to train: the settings of a run, checked, and Trainer's own arguments made from them."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from weft.run.methods import Method


def _setting(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class TrainSettings:
    """How to train. What is None comes from the method's recipe, or follows from the length of the run."""

    max_steps: int | None = _setting(None, "optimiser steps; none trains for `epochs` passes")
    epochs: float = _setting(1.0, "passes over the training rows, where max_steps is not given")
    batch_size: int = _setting(8, "rows a process and micro-batch")
    gradient_accumulation: int = _setting(1, "micro-batches an optimiser step")
    learning_rate: float | None = _setting(None, "peak learning rate; none takes the method's own")
    weight_decay: float | None = _setting(None, "weight decay; none takes the method's own")
    warmup_ratio: float | None = _setting(None, "share of the steps in which the learning rate rises")
    max_grad_norm: float | None = _setting(None, "largest norm of the gradient, 0 for any; none takes the method's own")
    lr_scheduler_type: str | None = _setting(None, "HF's name of the schedule; none takes the method's own")
    seed: int = _setting(0, "draws the adapter's start, the order of rows and dropout")
    bf16: bool = _setting(False, "compute in bfloat16; an adapter's base weights are kept in it too")
    max_length: int = _setting(512, "tokens a row at most")
    group_by_length: bool = _setting(False, "batches of rows of about the same length, for less padding")
    eval_steps: int | None = _setting(
        None, "steps between evaluations, 0 for none; none takes a tenth of the run, and no fewer than one is worth"
    )
    save_steps: int | None = _setting(None, "steps between checkpoints, 0 for none; none takes a tenth of the run")
    logging_steps: int = _setting(10, "steps between rows of metrics.jsonl")
    eval_batch_size: int | None = _setting(None, "rows a batch of evaluation; none takes batch_size")
    gradient_checkpointing: bool = _setting(False, "recompute activations to save memory")
    loader_workers: int = _setting(0, "processes that prepare training rows beside the model; images may need some")
    report_to: tuple[str, ...] = _setting((), "HF's reporting integrations: tensorboard, wandb, ...")

    def __post_init__(self) -> None:
        positive = ("batch_size", "gradient_accumulation", "logging_steps", "epochs")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("max_steps", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} must not be below 0, not {value}")
        if self.loader_workers < 0:
            raise UsageError(f"loader_workers must not be below 0, not {self.loader_workers}")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"warmup_ratio must be at least 0 and below 1, not {self.warmup_ratio}")
        if self.max_length < 2:
            raise UsageError(f"max_length must be at least 2 tokens, not {self.max_length}")
        if self.lr_scheduler_type is not None:
            from transformers import SchedulerType

            known = [kind.value for kind in SchedulerType]
            if self.lr_scheduler_type not in known:
                raise UsageError(
                    f"unknown lr_scheduler_type {self.lr_scheduler_type!r}: {nearest(self.lr_scheduler_type, known)}"
                )

    def with_recipe(self, method: Method) -> TrainSettings:
        """The settings with every gap filled from the method's recipe."""
        gaps = {
            key: value
            for key, value in method.recipe.items()
            if key in {entry.name for entry in dataclasses.fields(self)} and getattr(self, key) is None
        }
        return dataclasses.replace(self, **gaps)


def training_arguments(settings: TrainSettings, output: Path | None, method: Method) -> TrainingArguments:
    """Trainer's own arguments for settings without gaps; logging, saving and evaluation are ours."""
    from transformers import TrainingArguments

    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    chosen: dict[str, Any] = {  # what a method's recipe has filled in by now
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "lr_scheduler_type": settings.lr_scheduler_type,
        recompute: settings.gradient_checkpointing,
    }
    if method.optimizer is not None and method.optimizer[0].startswith("hf:"):
        chosen |= {"optim": method.optimizer[0].removeprefix("hf:"), **method.optimizer[1]}
    try:
        arguments = _arguments(settings, output, chosen)
    except ValueError as error:  # what Trainer checks itself: bfloat16 on this machine, say
        raise UsageError(" ".join(str(error).split()).split(". ")[0].rstrip(".")) from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one accelerator; several are launched
    return arguments


def _arguments(settings: TrainSettings, output: Path | None, chosen: dict[str, Any]) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(output) if output else tempfile.gettempdir(),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        warmup_steps=settings.warmup_ratio or 0,
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.epochs,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **chosen,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=settings.loader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        log_level="error",
    )
