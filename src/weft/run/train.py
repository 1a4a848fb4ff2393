"""Training: HF's Trainer with our optimiser, our checkpoints and our bookkeeping.

What Trainer leaves open is settled here: randomness is a function of (seed, step, micro-batch, process), so that a
resumed run is the uninterrupted one; a loss that is not a number stops the run before the optimiser steps.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from weft.errors import UsageError, WeftError
from weft.run import checkpoints
from weft.run import evaluate as _evaluate
from weft.run import methods as _methods
from weft.run.data import Splits, collate
from weft.run.methods import Method
from weft.run.models import Base
from weft.run.progress import Progress

if TYPE_CHECKING:
    from torch import nn

evaluate = _evaluate.evaluate

METRICS = "metrics.jsonl"


class Interrupted(WeftError):
    """The user or the system asked to stop; a checkpoint was written where there is an output folder."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        self.step, self.checkpoint = step, checkpoint
        where = f"; checkpoint {checkpoint} written" if checkpoint else ""
        super().__init__(f"interrupted after step {step}{where}")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. What is None comes from the method's recipe.

    Attributes:
        max_steps: optimiser steps; None trains for `epochs` passes.
        batch_size: rows a process and micro-batch.
        warmup_ratio: share of the steps in which the learning rate rises.
        bf16: run in bfloat16 autocast.
        eval_steps, save_steps: optimiser steps between two; 0 for never, None for a tenth of the run.
        report_to: what HF's `report_to` takes: "none", "tensorboard", "wandb", ...
    """

    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_ratio: float | None = None
    max_grad_norm: float | None = None
    lr_scheduler_type: str | None = None
    seed: int = 0
    bf16: bool = False
    max_length: int = 512
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int = 10
    eval_batch_size: int | None = None
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()

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
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"warmup_ratio must be at least 0 and below 1, not {self.warmup_ratio}")
        if self.max_length < 2:
            raise UsageError(f"max_length must be at least 2 tokens, not {self.max_length}")
        if self.lr_scheduler_type is not None:
            from transformers import SchedulerType

            from weft.errors import nearest

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


def seed_of(seed: int, step: int, micro: int, rank: int) -> int:
    """The seed of one micro-batch's randomness: a pure function, so that it survives any restart."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}/{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class _Trainer(Trainer):
    """HF's Trainer with randomness by step and the true loss kept.

    `step_loss` is the loss of the optimiser step under way, on the device, summed over its micro-batches.
    """

    step_loss: torch.Tensor | None = None
    window: list[float]
    _micro = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        torch.manual_seed(seed_of(self.args.seed, self.state.global_step, self._micro, self.args.process_index))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = loss if self._micro == 0 else self.step_loss + loss
        self._micro += 1
        return loss

    def end_step(self) -> None:
        self._micro = 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_tensors(model or self.model, Path(resume_from_checkpoint) / checkpoints.STATE)


class _Watch(TrainerCallback):
    """Everything that happens beside the steps: checks, metrics, evaluation, checkpoints, stopping."""

    def __init__(
        self,
        splits: Splits,
        settings: TrainSettings,
        output: Path | None,
        progress: Progress | None,
        resumed: dict[str, Any],
    ) -> None:
        self.splits, self.settings, self.output, self.progress = splits, settings, output, progress
        self.trainer: _Trainer
        self.curve: list[dict[str, Any]] = list(resumed.get("curve", []))
        self.window: list[float] = list(resumed.get("window", []))  # losses since the last logged row
        self.tokens = int(resumed.get("tokens", 0))
        self.stop_asked = False
        self.interrupted = False
        self.stop_seen = False
        self.eval_steps = self.save_steps = 0

    # --- Trainer's events, in the order of a step ---

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        tenth = max(1, state.max_steps // 10)
        self.eval_steps = tenth if self.settings.eval_steps is None else self.settings.eval_steps
        self.save_steps = tenth if self.settings.save_steps is None else self.settings.save_steps
        if self.progress:
            self.progress.start(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        assert trainer.step_loss is not None
        facts = torch.stack([trainer.step_loss.float(), torch.tensor(float(self.stop_asked), device=args.device)])
        if args.world_size > 1:  # one small reduction a step, so that all processes stop together
            torch.distributed.all_reduce(facts)
            facts[0] /= args.world_size
        loss, stops = facts.tolist()
        self.stop_seen = stops > 0
        if not torch.isfinite(facts[0]):
            raise WeftError(self._not_a_number(state.global_step + 1, "loss", loss))
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        if gradients:
            norm = torch.stack([g.norm() for g in torch._foreach_norm(gradients)]).norm()
            if not torch.isfinite(norm):
                raise WeftError(self._not_a_number(state.global_step + 1, "gradient's norm", float(norm)))
        self.window.append(loss)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.end_step()
        last = step >= state.max_steps
        if step % self.settings.logging_steps == 0 or last:
            self._log(step)
        if self.eval_steps and (step % self.eval_steps == 0 or last) and len(self.splits.validation):
            self._evaluate(step)
        if self.progress:
            self.progress.advance(step, self.window[-1] if self.window else self.curve[-1].get("loss"))
        if self.stop_seen and not last:
            self.interrupted = control.should_training_stop = True
        if self.output is not None and (
            (self.save_steps and (step % self.save_steps == 0 or last)) or self.interrupted
        ):
            self._save(step)

    # --- what they do ---

    def _not_a_number(self, step: int, what: str, value: float) -> str:
        kept = checkpoints.newest(self.output) if self.output else None
        advice = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return (
            f"the {what} became {value} at step {step}, before the optimiser stepped; {advice}; "
            "a lower --learning-rate or a smaller --max-grad-norm may help"
        )

    def _log(self, step: int) -> None:
        loss = sum(self.window) / len(self.window)
        row = {"step": step, "loss": loss, "learning_rate": self.trainer._get_learning_rate()}
        self.window = []
        self.curve.append(row)
        extra = self.progress.measures() if self.progress else {}
        self.trainer.log({name: value for name, value in {**row, **extra}.items() if name != "step"})
        self._write({**row, **extra})

    def _evaluate(self, step: int) -> None:
        metrics = shared_evaluation(self.trainer.model, self.splits.validation, self.splits, self.settings)
        row = {f"eval_{name}": value for name, value in metrics.items() if name != "per_document"}
        if self.curve and self.curve[-1]["step"] == step:
            self.curve[-1] |= row
        else:
            self.curve.append({"step": step, **row})
        self.trainer.log(dict(row))
        self._write({"step": step, **row})
        if self.progress:
            self.progress.note(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def _write(self, row: dict[str, Any]) -> None:
        if self.output is None or not self.trainer.is_world_process_zero():
            return
        with (self.output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _save(self, step: int) -> None:
        trainer = self.trainer
        accelerator = trainer.accelerator
        error: BaseException | None = None
        if trainer.is_world_process_zero():
            facts = {"curve": self.curve, "window": self.window, "processes": trainer.args.world_size}
            try:
                checkpoints.save(self.output, step, functools.partial(_fill_checkpoint, trainer), facts)
            except Exception as raised:  # told to the other processes first, then raised
                error = raised
        if trainer.args.world_size > 1:
            failed = torch.tensor(float(error is not None), device=trainer.args.device)
            torch.distributed.all_reduce(failed)
            if failed.item() and error is None:
                raise WeftError(f"the first process could not write the checkpoint of step {step}")
            accelerator.wait_for_everyone()
        if error is not None:
            raise error


def _fill_checkpoint(trainer: _Trainer, folder: Path) -> None:
    model = trainer.model
    checkpoints.save_tensors(model, folder / checkpoints.STATE)
    torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    if hasattr(model, "peft_config"):
        model.save_pretrained(str(folder))


def shared_evaluation(model: nn.Module, dataset: Any, splits: Splits, settings: TrainSettings) -> dict[str, Any]:
    """`evaluate`, each process doing its share of the rows; all get the whole answer."""
    batch_size = settings.eval_batch_size or settings.batch_size
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    own = _evaluate.measure_rows(
        model, dataset, batch_size, range(rank, len(dataset), world), splits.pad_token_id, settings.bf16
    )
    if world > 1:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, own)
        own = sorted(row for part in parts for row in part)
    return _evaluate.summarise(own, splits.task)


def training_arguments(settings: TrainSettings, output: Path | None) -> TrainingArguments:
    """Trainer's own arguments for settings without gaps; logging, saving and evaluation are ours."""
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(output) if output else tempfile.gettempdir(),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=settings.lr_scheduler_type,
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
        **{recompute: settings.gradient_checkpointing},
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        log_level="error",
    )


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
    steps = 0
    if trainable:
        bar = Progress() if progress and args.process_index == 0 else None
        watch = _Watch(splits, settings, output, bar, facts)
        if output is not None and args.process_index == 0:
            output.mkdir(parents=True, exist_ok=True)
            _trim_metrics(output / METRICS, facts.get("step", 0))
        steps = _run(model, splits, method, args, watch, checkpoint)
        curve = watch.curve
    validation = shared_evaluation(model, splits.validation, splits, settings)
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
    model: nn.Module, splits: Splits, method: Method, args: TrainingArguments, watch: _Watch, checkpoint: Path | None
) -> int:
    """Run Trainer's loop with `watch` beside it; the steps taken."""
    collator = functools.partial(_collate_counting, watch=watch, pad_token_id=splits.pad_token_id)
    extra: dict[str, Any] = {}
    if method.config is not None and not method.name.startswith("peft:"):
        import weft

        extra["optimizers"] = weft.optimizer_and_scheduler(model, args, _total_steps(splits, args))
    trainer = _Trainer(
        model=model, args=args, train_dataset=splits.train, data_collator=collator, callbacks=[watch], **extra
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UsageError("weft adapt runs several processes by DDP: launch it without FSDP and DeepSpeed")
    watch.trainer = trainer
    adalora = _AdaLora.of(model, _total_steps(splits, args))
    if adalora is not None:
        trainer.add_callback(adalora)
    with _stop_on_signal(watch):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if watch.progress:
                watch.progress.stop()
    if watch.interrupted:
        raise Interrupted(trainer.state.global_step, checkpoints.newest(watch.output) if watch.output else None)
    return trainer.state.global_step


def _collate_counting(rows: list[dict[str, Any]], watch: _Watch, pad_token_id: int) -> dict[str, torch.Tensor]:
    batch = collate(rows, pad_token_id)
    if watch.progress:
        watch.progress.count(int(batch["attention_mask"].sum()) * watch.trainer.args.world_size)
    return batch


def _total_steps(splits: Splits, args: TrainingArguments) -> int:
    if args.max_steps > 0:
        return args.max_steps
    rows = args.per_device_train_batch_size * args.world_size
    batches = -(-len(splits.train) // rows)
    return max(1, -(-int(args.num_train_epochs * -(-batches // args.gradient_accumulation_steps) * 1000) // 1000))


class _stop_on_signal:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop after the step under way; the second one stops at once."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.watch.stop_asked:
            raise KeyboardInterrupt
        self.watch.stop_asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _AdaLora(TrainerCallback):
    """The rank allocation that PEFT's AdaLoRA leaves to the training loop."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def of(cls, model: nn.Module, total_steps: int) -> _AdaLora | None:
        config = getattr(model, "peft_config", {}).get("default")
        if config is None or str(getattr(config.peft_type, "value", config.peft_type)) != "ADALORA":
            return None
        if config.tinit + config.tfinal >= total_steps:
            raise UsageError(
                f"peft:adalora: tinit + tfinal = {config.tinit + config.tfinal} must be below the {total_steps} steps"
            )
        config.total_step = total_steps
        model.base_model.rankallocator.set_total_step(total_steps)  # type: ignore[operator,union-attr]
        return cls(model)

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step)  # type: ignore[operator,union-attr]


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
