"""HF's Trainer as weft runs it.

What Trainer leaves open is settled here: randomness is a function of (seed, step, micro-batch, process), so that a
resumed run is the uninterrupted one; a loss that is not a number stops the run before the optimiser steps; metrics,
evaluation and checkpoints are written beside the steps.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from weft.compress._distil import Distilling
from weft.errors import UsageError, WeftError
from weft.run import checkpoints, evaluate
from weft.run.data import Splits
from weft.run.progress import Progress
from weft.run.settings import TrainSettings
from weft.steps import adopt_state, controllers

if TYPE_CHECKING:
    from torch import nn

METRICS = "metrics.jsonl"


class Interrupted(WeftError):
    """The user or the system asked to stop; a checkpoint was written where there is an output folder."""

    def __init__(self, step: int, checkpoint: Path | None, command: str | None = None) -> None:
        self.step, self.checkpoint = step, checkpoint
        saved = f", checkpoint {checkpoint} written" if checkpoint else ", nothing saved"
        super().__init__(f"interrupted after step {step}{saved}" + (f"; go on with: {command}" if command else ""))


def seed_of(seed: int, step: int, micro: int, rank: int) -> int:
    """The seed of one micro-batch's randomness: a pure function, so that it survives any restart."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}/{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class ByLength(Sampler[int]):
    """Rows in an order of which each `batch` in a row are about as long; drawn anew in each epoch, from the seed.

    Of so many random rows as make POOL batches, the longest make one, the next longest another; then all batches are
    shuffled.
    """

    POOL = 50

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch, 0, 0))
        rows = torch.randperm(len(self), generator=generator).tolist()
        last = [rows.pop() for _ in range(len(rows) % self.batch)]  # the batch that is not full
        size = self.POOL * self.batch
        pools = (rows[start : start + size] for start in range(0, len(rows), size))
        sorted_rows = [row for pool in pools for row in sorted(pool, key=self.lengths.__getitem__)]
        batches = [sorted_rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from last


class StepTrainer(Distilling, Trainer):
    """HF's Trainer with randomness by step and the true loss kept; with an objective, that is the loss.

    `step_loss` is the loss of the optimiser step under way, on the device, summed over its micro-batches.
    """

    step_loss: torch.Tensor
    model: Any  # Trainer says that each of these may be None, which they are not while it trains
    optimizer: Any
    lr_scheduler: Any
    adalora: AdaLora | None = None
    noised: Callable[[dict[str, Any], int, int], dict[str, Any]] | None = None  # what a step's rows come to
    count: Callable[[dict[str, Any]], None]  # is told of each micro-batch
    lengths: Sequence[int] | None = None  # of the rows, where they are to be grouped by it
    _micro = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Trainer's own groups are in an order that a resumed run does not find again, long rows before short ones."""
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return ByLength(self.lengths, step, args.data_seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        torch.manual_seed(seed_of(self.args.seed, self.state.global_step, self._micro, self.args.process_index))
        self.count(inputs)
        if self.noised is not None:
            inputs = self.noised(inputs, self.args.seed, self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = loss if self._micro == 0 else self.step_loss + loss
        self._micro += 1
        return loss

    def end_step(self) -> None:
        self._micro = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        if next(controllers(self.model), None) is not None:
            adopt_state(made)  # before a checkpoint is read, whoever made the optimiser
        return made

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = Path(resume_from_checkpoint) / checkpoints.STATE
        checkpoints.load_tensors(model or self.model, state, self.optimizer)
        if self.adalora is not None:
            self.adalora.load(Path(resume_from_checkpoint))


class Watch(TrainerCallback):
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
        self.facts = resumed  # what the checkpoint that the run goes on from knows
        self.trainer: StepTrainer
        self.curve: list[dict[str, Any]] = list(resumed.get("curve", []))
        self.window: list[float] = list(resumed.get("window", []))  # losses since the last logged row
        self.tokens = int(resumed.get("tokens", 0))
        self.evaluated: tuple[int, dict[str, Any]] = (-1, {})  # the newest evaluation and its step
        self.stop_asked = False
        self.interrupted = False
        self.stop_seen = False
        self.eval_steps = self.save_steps = 0

    # --- Trainer's events, in the order of a step ---

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        tenth = max(1, state.max_steps // 10)
        self.eval_steps = max(tenth, self._worth()) if self.settings.eval_steps is None else self.settings.eval_steps
        self.save_steps = tenth if self.settings.save_steps is None else self.settings.save_steps
        if self.progress:
            self.progress.start(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
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
            self._save(self.output, step)

    # --- what they do ---

    def count(self, batch: dict[str, Any]) -> None:
        """Take note of the tokens, or images, of a micro-batch, for the speed that is shown."""
        if self.progress:
            counted = batch["attention_mask"].sum() if "attention_mask" in batch else len(batch["labels"])
            self.progress.count(int(counted) * self.trainer.args.world_size)

    def _worth(self) -> int:
        """Steps that go through as many rows as one evaluation."""
        s, args = self.settings, self.trainer.args
        return -(-len(self.splits.validation) // (s.batch_size * s.gradient_accumulation * args.world_size))

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
        penalty = _penalty(self.trainer.model)
        if penalty is not None:
            row["penalty"] = penalty
        self.window = []
        self.curve.append(row)
        extra = self.progress.measures() if self.progress else {}
        self.trainer.log({name: value for name, value in {**row, **extra}.items() if name != "step"})
        self._write({**row, **extra})

    def _evaluate(self, step: int) -> None:
        began = time.perf_counter()
        metrics = shared_evaluation(self.trainer.model, self.splits.validation, self.splits, self.settings)
        self.evaluated = (step, metrics)
        row = {f"eval_{name}": value for name, value in metrics.items() if name != "per_document"}
        if self.curve and self.curve[-1]["step"] == step:
            self.curve[-1] |= row
        else:
            self.curve.append({"step": step, **row})
        self.trainer.log(dict(row))
        self._write({"step": step, **row})
        if self.progress:
            self.progress.pause(time.perf_counter() - began)
            shown = [name for name in ("loss", "perplexity", "dice", "accuracy", "auc") if name in metrics]
            self.progress.note(f"step {step}: validation " + ", ".join(f"{name} {metrics[name]:.4f}" for name in shown))

    def _write(self, row: dict[str, Any]) -> None:
        if self.output is None or not self.trainer.is_world_process_zero():
            return
        with (self.output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _save(self, output: Path, step: int) -> None:
        trainer = self.trainer
        error: BaseException | None = None
        if trainer.is_world_process_zero():
            facts = {"curve": self.curve, "window": self.window, "processes": trainer.args.world_size}
            try:
                checkpoints.save(output, step, functools.partial(_fill_checkpoint, trainer), facts)
            except Exception as raised:  # told to the other processes first, then raised
                error = raised
        if trainer.args.world_size > 1:
            failed = torch.tensor(float(error is not None), device=trainer.args.device)
            torch.distributed.all_reduce(failed)
            if failed.item() and error is None:
                raise WeftError(f"the first process could not write the checkpoint of step {step}")
            trainer.accelerator.wait_for_everyone()
        if error is not None:
            raise error


def _penalty(model: nn.Module) -> float | None:
    """What the methods on the model added to the objective in the last step, beside the task's loss."""
    terms = [controller.last_penalty for controller in controllers(model) if controller.last_penalty is not None]
    return float(torch.stack([term.detach().float() for term in terms]).sum()) if terms else None


def _fill_checkpoint(trainer: StepTrainer, folder: Path) -> None:
    model = trainer.model
    checkpoints.save_tensors(model, folder / checkpoints.STATE, trainer.optimizer)
    torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    if trainer.adalora is not None:
        trainer.adalora.save(folder)
    if hasattr(model, "peft_config"):
        model.save_pretrained(str(folder))


def shared_evaluation(model: nn.Module, dataset: Any, splits: Splits, settings: TrainSettings) -> dict[str, Any]:
    """`evaluate`, each process doing its share of the rows; all get the whole answer."""
    batch_size = settings.eval_batch_size or settings.batch_size
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    share = range(rank, len(dataset), world)
    own = evaluate.measure_rows(model, dataset, batch_size, share, splits.pad_token_id, settings.bf16)
    if world > 1:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, own)
        own = sorted(row for part in parts for row in part)
    return evaluate.metrics(dataset, own, splits.task)


class StopOnSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop after this step; the second one stops at once."""

    def __init__(self, watch: Watch) -> None:
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


class AdaLora(TrainerCallback):
    """The rank allocation that PEFT's AdaLoRA leaves to the training loop."""

    _SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
    _SCORES_FILE, _MASKS_FILE = "adalora.safetensors", "adalora.json"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def of(cls, model: nn.Module, total_steps: int) -> AdaLora | None:
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

    def save(self, folder: Path) -> None:
        """Write the allocator's scores and masks, which PEFT saves nowhere."""
        allocator = self.model.base_model.rankallocator  # type: ignore[union-attr]
        tensors = {
            f"{kind}/{name}": tensor.cpu().contiguous()
            for kind in self._SCORES
            for name, tensor in getattr(allocator, kind).items()
        }
        save_file(tensors, str(folder / self._SCORES_FILE))
        pattern = self.model.peft_config["default"].rank_pattern  # type: ignore[index,union-attr]
        (folder / self._MASKS_FILE).write_text(json.dumps(pattern), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """The inverse of `save`."""
        allocator = self.model.base_model.rankallocator  # type: ignore[union-attr]
        device = next(self.model.parameters()).device
        for key, tensor in load_file(str(folder / self._SCORES_FILE)).items():
            kind, _, name = key.partition("/")
            getattr(allocator, kind)[name] = tensor.to(device)
        pattern = json.loads((folder / self._MASKS_FILE).read_text(encoding="utf-8"))
        self.model.peft_config["default"].rank_pattern = pattern  # type: ignore[index,union-attr]

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step)  # type: ignore[operator,union-attr]
