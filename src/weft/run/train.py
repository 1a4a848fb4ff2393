"""Training one method on one base model: attach, run the steps, evaluate, keep the result."""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainingArguments

from weft.errors import UsageError, WeftError
from weft.run import checkpoints
from weft.run import methods as _methods
from weft.run.data import Splits, collate
from weft.run.evaluate import evaluate
from weft.run.loop import (
    METRICS,
    AdaLora,
    Interrupted,
    StepTrainer,
    StopOnSignal,
    Watch,
    collate_counting,
    shared_evaluation,
)
from weft.run.methods import Method
from weft.run.models import Base
from weft.run.progress import Progress
from weft.run.settings import TrainSettings, training_arguments

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Interrupted", "TrainResult", "TrainSettings", "evaluate", "save_result", "total_steps", "train"]


@dataclass
class TrainResult:
    """What a run gave.

    Attributes:
        trainable: trained parameters, each counted once.
        steps: optimiser steps taken over the whole run, resumed parts included.
        curve: rows of step, loss (mean since the last row, nats), learning_rate, and eval_loss where evaluated.
        validation: the metrics of `evaluate` at the end.
        seconds: wall time of this process's part, set-up and evaluation included.
        file_bytes: bytes of the tensors that a user would pass on.
        ranks: the rank of each adapted module, for methods that have one.
    """

    model: nn.Module
    trainable: int
    steps: int
    curve: list[dict[str, Any]]
    validation: dict[str, Any]
    seconds: float
    file_bytes: int | None
    ranks: dict[str, int] = field(default_factory=dict)


class _Batches:
    """Training batches in a seeded order, as often as they are asked for, on one device."""

    def __init__(self, splits: Splits, batch_size: int, seed: int, device: torch.device) -> None:
        self.splits, self.batch_size, self.seed, self.device = splits, batch_size, seed, device

    def __len__(self) -> int:
        return -(-len(self.splits.train) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(self.splits.train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        for start in range(0, len(order), self.batch_size):
            rows = [self.splits.train[row] for row in order[start : start + self.batch_size]]
            batch = collate(rows, self.splits.pad_token_id)
            yield {name: value.to(self.device) for name, value in batch.items()}


def train(
    base: Base,
    splits: Splits,
    method: Method,
    settings: TrainSettings,
    output: Path | None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train one method on one base model, which is changed in place.

    Args:
        output: folder for checkpoints, metrics and the result; None keeps everything in memory.
        resume: go on from the newest complete checkpoint in `output`; without one, start at step 0.
        progress: show a progress bar (in the first process).

    Raises WeftError where the loss stops being a number or the disk is full, `Interrupted` after Ctrl-C.
    """
    started = time.perf_counter()
    settings = settings.with_recipe(method)
    args = training_arguments(settings, output)
    output = Path(output) if output is not None else None
    torch.manual_seed(settings.seed)
    base.model.to(args.device)
    model = _methods.attach(method, base.model, _Batches(splits, settings.batch_size, settings.seed, args.device))
    trainable = _count(model)
    checkpoint = checkpoints.newest(output) if resume and output is not None else None
    facts = (checkpoints.facts(checkpoint) if checkpoint else None) or {}
    curve: list[dict[str, Any]] = []
    steps, validation = 0, {}
    if trainable:
        bar = Progress() if progress and args.process_index == 0 else None
        watch = Watch(splits, settings, output, bar, facts)
        if output is not None and args.process_index == 0:
            output.mkdir(parents=True, exist_ok=True)
            _trim_metrics(output / METRICS, facts.get("step", 0))
        steps = _run(model, splits, method, args, watch, checkpoint)
        curve = watch.curve
        if watch.evaluated[0] == steps:
            validation = watch.evaluated[1]
    validation = validation or shared_evaluation(model, splits.validation, splits, settings)
    return TrainResult(
        model=model,
        trainable=trainable,
        steps=steps,
        curve=curve,
        validation=validation,
        seconds=time.perf_counter() - started,
        file_bytes=_file_bytes(model, method),
        ranks=module_ranks(model),
    )


def _run(
    model: nn.Module, splits: Splits, method: Method, args: TrainingArguments, watch: Watch, checkpoint: Path | None
) -> int:
    """Run Trainer's loop with `watch` beside it; the steps taken."""
    collator = functools.partial(collate_counting, watch=watch, pad_token_id=splits.pad_token_id)
    extra: dict[str, Any] = {}
    if method.config is not None and not method.name.startswith("peft:"):
        import weft

        extra["optimizers"] = weft.optimizer_and_scheduler(model, args, total_steps(splits, args))
    trainer = StepTrainer(
        model=model, args=args, train_dataset=splits.train, data_collator=collator, callbacks=[watch], **extra
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UsageError("weft adapt runs several processes by DDP: launch it without FSDP and DeepSpeed")
    watch.trainer = trainer
    adalora = AdaLora.of(model, total_steps(splits, args))
    if adalora is not None:
        trainer.add_callback(adalora)
    with StopOnSignal(watch):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if watch.progress:
                watch.progress.stop()
    if watch.interrupted:
        raise Interrupted(trainer.state.global_step, checkpoints.newest(watch.output) if watch.output else None)
    return trainer.state.global_step


def total_steps(splits: Splits, args: TrainingArguments) -> int:
    """Optimiser steps of a run, as Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = -(-len(splits.train) // (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(1, -(-batches // args.gradient_accumulation_steps)))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _trim_metrics(path: Path, step: int) -> None:
    """Forget the rows after `step`: the run that wrote them was killed before it saved what they tell of."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line under way when the process was killed
            continue
        if row.get("step", 0) <= step:
            kept.append(line + "\n")
    checkpoints.write_text(path, "".join(kept))


def save_result(model: nn.Module, tokenizer: Any, output: Path) -> None:
    """Put the adapter (or, for full and head-only training, the model and tokenizer) into `output`, file by file whole.

    Raises WeftError where the disk is full.
    """
    partial = output / ".result.partial"
    try:
        _remake(partial)
        model.save_pretrained(str(partial))
        if not hasattr(model, "peft_config"):
            tokenizer.save_pretrained(str(partial))
        checkpoints.install(partial, output)
    except Exception as error:
        checkpoints.remove(partial)
        if not checkpoints.is_disk_full(error):
            raise
        kept = checkpoints.newest(output)
        where = f"the checkpoint {kept} is intact" if kept else "nothing was kept"
        raise WeftError(f"the disk is full: the result could not be written to {output}; {where}") from error


def _remake(folder: Path) -> None:
    checkpoints.remove(folder)
    folder.mkdir(parents=True)


def _file_bytes(model: nn.Module, method: Method) -> int | None:
    """Bytes of the tensors that would be passed on: the adapter's file, or the whole model's tensors."""
    if method.name == "base":
        return None
    if method.config is None:
        unique = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


def module_ranks(model: nn.Module) -> dict[str, int]:
    """The rank of the active adapter on each adapted module, where the method has one."""
    adapter = getattr(model, "active_adapter", None)
    if not isinstance(adapter, str):
        return {}
    ranks = {}
    for name, module in model.named_modules():
        held = getattr(module, "r", None)
        if isinstance(held, dict) and isinstance(held.get(adapter), int):
            ranks[name.removeprefix("base_model.model.")] = held[adapter]
    return ranks
