"""Training one method on one base model: attach, run the steps, evaluate, keep the result."""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, TrainingArguments

from weft.errors import UsageError, WeftError
from weft.files import partial_of, write_text
from weft.linear._structured import Structured
from weft.run import checkpoints, verification
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
    shared_evaluation,
)
from weft.run.measure import state_bytes
from weft.run.methods import Method
from weft.run.models import Base
from weft.run.progress import Progress
from weft.run.settings import TrainSettings, training_arguments
from weft.steps import controllers

if TYPE_CHECKING:
    from torch import nn

    from weft.compress._distil import Objective

Teach = Callable[[Any], "Objective[Any]"]

__all__ = ["Interrupted", "TrainResult", "TrainSettings", "evaluate", "save_result", "total_steps", "train"]


@dataclass
class TrainResult:
    """What a run gave.

    Attributes:
        trainable: trained parameters, without what is only allocated to grow into.
        steps: optimiser steps taken over the whole run, resumed parts included.
        curve: rows of step, loss (mean since the last row, nats), learning_rate, and eval_loss where evaluated.
        validation: the metrics of `evaluate` at the end.
        seconds: wall time of this process's part, set-up and evaluation included.
        file_bytes: bytes of the tensors that a user would pass on.
        optimizer_bytes: bytes of the optimiser's state after the last step.
        ranks: the rank of each adapted module, or of each layer that is of low rank in the end, where there is one.
    """

    model: nn.Module
    trainable: int
    steps: int
    curve: list[dict[str, Any]]
    validation: dict[str, Any]
    seconds: float
    file_bytes: int | None
    optimizer_bytes: int = 0
    ranks: dict[str, int] = field(default_factory=dict)


# Rows that a method which looks at gradients before it attaches gets to see; LoRA-SB's authors use 50 to 170.
_PREPARING_ROWS = 64

# Rows that a method which learns on held-out rows gets instead of training on them: one in ten, up to so many.
_HELD_OUT_ONE_IN, _HELD_OUT_ROWS = 10, 256


class _Batches:
    """The first of some rows in a seeded order, in batches, as often as they are asked for, on one device."""

    def __init__(self, rows: Any, most: int, splits: Splits, settings: TrainSettings, device: torch.device) -> None:
        self.rows, self.count, self.pad_token_id = rows, min(most, len(rows)), splits.pad_token_id
        self.batch_size, self.seed, self.device = settings.batch_size, settings.seed, device

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = _order(len(self.rows), self.seed)
        for start in range(0, self.count, self.batch_size):
            rows = [self.rows[row] for row in order[start : min(start + self.batch_size, self.count)]]
            batch = collate(rows, self.pad_token_id)
            if hasattr(self.rows, "noised"):
                batch = self.rows.noised(batch, self.seed, 0)
            yield {name: value.to(self.device) for name, value in batch.items()}


def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def hold_out(splits: Splits, method: Method, seed: int) -> tuple[Splits, Any]:
    """The splits without the training rows that the method wants held out of training, and those rows.

    The validation rows stay what they are to every method: what its learning rate is chosen on.
    """
    if "held_out" not in _methods.needs(method):
        return splits, []
    count = min(_HELD_OUT_ROWS, len(splits.train) // _HELD_OUT_ONE_IN)
    if not count:
        raise UsageError(
            f"{method.name} holds one in {_HELD_OUT_ONE_IN} training rows out of training, and there are "
            f"{len(splits.train)}: give more rows"
        )
    order = _order(len(splits.train), seed)
    held_out, rest = sorted(order[:count]), sorted(order[count:])
    return replace(splits, train=splits.train.select(rest)), splits.train.select(held_out)


def train(
    base: Base,
    splits: Splits,
    method: Method,
    settings: TrainSettings,
    output: Path | None,
    *,
    resume: bool = False,
    progress: bool = True,
    teach: Teach | None = None,
) -> TrainResult:
    """Train one method on one base model, which is changed in place.

    Args:
        output: folder for checkpoints, metrics and the result; None keeps everything in memory.
        resume: go on from the newest complete checkpoint in `output`; without one, start at step 0.
        progress: show a progress bar (in the first process).
        teach: what else than the task the model learns by, once it is there.

    Raises WeftError where the loss stops being a number or the disk is full, `Interrupted` after Ctrl-C.
    """
    started = time.perf_counter()
    settings = settings.with_recipe(method)
    args = training_arguments(settings, output, method)
    output = Path(output) if output is not None else None
    torch.manual_seed(settings.seed)
    base.model.to(args.device)
    splits, held_out = hold_out(splits, method, settings.seed)
    method = _methods.following(method, {**vars(settings), "total_steps": total_steps(splits, args)})
    model = _methods.attach(
        method,
        base.model,
        batches=_Batches(splits.train, _PREPARING_ROWS, splits, settings, args.device),
        held_out=_Batches(held_out, _HELD_OUT_ROWS, splits, settings, args.device),
        processor=base.tokenizer,
    )
    trainable = _methods.trainable(model)
    checkpoint = checkpoints.newest(output) if resume and output is not None else None
    facts = (checkpoints.facts(checkpoint) if checkpoint else None) or {}
    processes = int(facts.get("processes", args.world_size))
    if processes != args.world_size:
        raise UsageError(
            f"checkpoint {checkpoint} was written by {processes} processes, each with its own rows; "
            f"go on with as many, not {args.world_size}"
        )
    curve: list[dict[str, Any]] = []
    steps, optimizer_bytes, validation = 0, 0, {}
    if trainable:
        unit = "tokens" if "input_ids" in splits.train.column_names else "images"
        bar = Progress(unit) if progress and args.process_index == 0 else None
        watch = Watch(splits, settings, output, bar, facts)
        if output is not None and args.process_index == 0:
            output.mkdir(parents=True, exist_ok=True)
            _trim_metrics(output / METRICS, facts.get("step", 0))
        trainer = _run(model, splits, method, settings, args, watch, checkpoint, teach)
        if trainer.objective is not None:
            trainable = _methods.trainable(model)  # of which the objective may have taken a part
            trainer.objective.finish()
        steps, optimizer_bytes = trainer.state.global_step, state_bytes(trainer.optimizer)
        curve = watch.curve
        if watch.evaluated[0] == steps:
            validation = watch.evaluated[1]
    finished = _methods.finish(method, model)
    if finished or not validation:
        validation = shared_evaluation(model, splits.validation, splits, settings)
    verification.without_head(model)
    file_bytes, ranks = _released(model, method)
    if finished:
        ranks = {name: module.rank for name, module in model.named_modules() if isinstance(module, Structured)}
    return TrainResult(
        model=model,
        trainable=trainable,
        steps=steps,
        curve=curve,
        validation=validation,
        seconds=time.perf_counter() - started,
        file_bytes=file_bytes,
        optimizer_bytes=optimizer_bytes,
        ranks=ranks,
    )


def _run(
    model: nn.Module,
    splits: Splits,
    method: Method,
    settings: TrainSettings,
    args: TrainingArguments,
    watch: Watch,
    checkpoint: Path | None,
    teach: Teach | None = None,
) -> StepTrainer:
    """Run Trainer's loop with `watch` beside it; the trainer after its last step."""
    collator = functools.partial(collate, pad_token_id=splits.pad_token_id)
    extra: dict[str, Any] = {}
    if splits.task != "causal-lm":
        head = verification.head_of(model)  # whose margin is in the loss
        margin = isinstance(head, verification.MarginHead)
        extra["compute_loss_func"] = (
            functools.partial(verification.margin_loss, head) if margin else getattr(splits.train, "loss", class_loss)
        )
    if method.optimizer is not None:
        if not method.optimizer[0].startswith("hf:"):
            batches = _Batches(splits.train, _PREPARING_ROWS, splits, settings, args.device)
            extra["optimizers"] = _own_optimizer(model, method, args, batches), None
    elif next(controllers(model), None) is not None:
        import weft

        extra["optimizers"] = weft.optimizer_and_scheduler(model, args, total_steps(splits, args))
    if splits.task == "segmentation":
        args.ddp_find_unused_parameters = True  # BEiT and DPT have layers that nothing is asked of
    trainer = StepTrainer(
        model=model, args=args, train_dataset=splits.train, data_collator=collator, callbacks=[watch], **extra
    )
    trainer.remove_callback(PrinterCallback)
    trainer.noised = getattr(splits.train, "noised", None)
    if settings.group_by_length and "input_ids" in splits.train.column_names:
        trainer.lengths = list(map(len, splits.train.with_format(None)["input_ids"]))
    trainer.objective = teach(model) if teach is not None else None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UsageError("weft adapt runs several processes by DDP: launch it without FSDP and DeepSpeed")
    watch.trainer, trainer.count = trainer, watch.count
    trainer.adalora = AdaLora.of(model, total_steps(splits, args))
    if trainer.adalora is not None:
        trainer.add_callback(trainer.adalora)
    if checkpoint is not None and int(watch.facts["step"]) >= total_steps(splits, args):
        _restore_finished(trainer, checkpoint, int(watch.facts["step"]))
        return trainer
    with StopOnSignal(watch):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except WeftError as error:  # one of a loader's process comes with that process's traceback around it
            _, wrapped, sentence = str(error).rpartition("weft.errors.WeftError: ")
            if not wrapped:
                raise
            raise WeftError(sentence.strip()) from error
        finally:
            if watch.progress:
                watch.progress.stop()
    if watch.interrupted:
        raise Interrupted(trainer.state.global_step, checkpoints.newest(watch.output) if watch.output else None)
    return trainer


def class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Nats a row, over all micro-batches of a step: some models' own losses know their micro-batch alone."""
    total = cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _own_optimizer(
    model: nn.Module, method: Method, args: TrainingArguments, batches: _Batches
) -> torch.optim.Optimizer:
    """The optimiser of weft that the method names. Raises UsageError where it does not fit the model."""
    from weft import registry
    from weft.optim import optimizer

    assert method.optimizer is not None
    name, options = method.optimizer
    served = {"batches": batches} if "batches" in registry.card(name).needs else {}
    made = optimizer(name, model, lr=args.learning_rate, weight_decay=args.weight_decay, **options, **served)
    args.ddp_find_unused_parameters = made.freezes
    return made


def _restore_finished(trainer: StepTrainer, checkpoint: Path, step: int) -> None:
    """Put back a run that had taken its last step when it ended; Trainer would take one more."""
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.create_optimizer_and_scheduler(step)
    state = torch.load(checkpoint / "optimizer.pt", map_location=trainer.args.device, weights_only=True)
    trainer.optimizer.load_state_dict(state)  # the methods' own state travels in it
    trainer.state.global_step = step


def total_steps(splits: Splits, args: TrainingArguments) -> int:
    """Optimiser steps of a run, as Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = -(-len(splits.train) // (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(1, -(-batches // args.gradient_accumulation_steps)))


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
    write_text(path, "".join(kept))


def save_result(model: Any, tokenizer: Any, output: Path) -> None:
    """Put the adapter (or, for full and head-only training, the model and tokenizer) into `output`, file by file whole.

    An image processor goes beside an adapter too: its base model may have none.

    Raises WeftError where the disk is full.
    """
    partial = partial_of(output / "result")
    try:
        _remake(partial)
        whole = not hasattr(model, "peft_config")
        if whole and hasattr(tokenizer, "save_whole"):  # a pipeline, of which the model is a part
            tokenizer.save_whole(model, partial)
        else:
            model.save_pretrained(str(partial))
            if whole or "pixel_values" in tokenizer.model_input_names:
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


def _released(model: Any, method: Method) -> tuple[int | None, dict[str, int]]:
    """Bytes of the tensors that would be passed on (the adapter's, or the whole model's), and each module's rank."""
    if method.name == "base":
        return None, {}
    if method.config is None:
        unique = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values()), {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        saved = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return size, _module_ranks(model, saved)


def _module_ranks(model: Any, saved: dict[str, Any]) -> dict[str, int]:
    """The rank of the adapter on each adapted module, as the saved config tells it; empty for methods without rank."""
    if not isinstance(saved.get("r"), int):
        return {}
    pattern = saved.get("rank_pattern") or {}
    adapter = model.active_adapter
    ranks = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        own = name.removeprefix("base_model.model.")
        held = getattr(module, "r", None)  # PEFT's own layers know it themselves
        known = held.get(adapter) if isinstance(held, dict) else None
        ranks[own] = pattern.get(own, known if isinstance(known, int) else saved["r"])
    return ranks
