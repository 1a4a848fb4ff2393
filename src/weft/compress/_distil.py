"""Training what a compression made, beside the model that it was made from.

A method that learns is a one-shot method first: its `Factoriser` makes the start. What it learns by it says in an
`Objective`, called as its class is: `pela` → `PelaObjective`. The loop is HF's Trainer:

    trainer = weft.distiller(student, teacher, "pela", args=TrainingArguments(…), train_dataset=rows)
    trainer.train()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer

from weft import registry
from weft.anatomy import blocks
from weft.compress._config import CompressConfig
from weft.errors import UsageError

C = TypeVar("C", bound=CompressConfig)


@dataclass
class Seen:
    """What a model made of a batch.

    Attributes:
        logits: … × classes, or batch × tokens × vocabulary.
        blocks: what each of its blocks passes on, batch × tokens × d, for an objective that reads them.
        parts: what each of the modules received and gave that the objective names.
    """

    logits: Tensor
    blocks: list[Tensor] = field(default_factory=list)
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Objective(Generic[C]):
    """What a method learns by: the loss of the task and what it adds. The teacher is frozen, and in evaluation.

    All of the student is trained. A method that trains a part of it asks no gradient of the rest when it is made.
    """

    task_weight = 1.0  # of the task's own loss; with 0 it is not computed, and rows need no labels
    reads_blocks = False  # what `Seen.blocks` holds
    reads_teacher = True  # whether the teacher is run beside the student

    def __init__(self, config: C, student: nn.Module, teacher: nn.Module) -> None:
        self.config, self.student, self.teacher = config, student, teacher

    def on_step(self, step: int, steps: int) -> None:
        """A step of so many begins, the first of which is 0; each of its micro-batches tells it again."""

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """The modules of the student or of the teacher of which `Seen.parts` tells, each run once in a pass."""
        return ()

    def terms(self, student: Seen, teacher: Seen) -> list[Tensor]:
        """What is added for each token (batch × tokens) or, of logits without tokens, for each row (batch)."""
        return []

    def penalty(self) -> Tensor | None:
        """What is added for the weights alone."""
        return None

    def finish(self) -> None:
        """What is left to do with the student after the last step."""


def objective(method: str, config: Any, student: nn.Module, teacher: nn.Module) -> Objective[Any]:
    """What a method learns by; one that says nothing of it learns by the task alone."""
    kind = getattr(registry.load(method), registry.class_name(method, "Objective"), None)
    return PlainObjective(config, student, teacher) if kind is None else kind(config, student, teacher)


class PlainObjective(Objective[Any]):
    """The task's loss alone: fine-tuning."""

    reads_teacher = False


class Distilling:
    """What a Trainer is given to learn by an objective; stands before it among a class's bases."""

    objective: Objective[Any] | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = super()
        ours = self.objective
        if ours is None or not model.training:
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        state: Any = self.state  # type: ignore[attr-defined]
        ours.on_step(state.global_step, state.max_steps)
        with watched(ours.student, ours.reads_blocks) as own, met(ours.parts(ours.student)) as parts:
            if ours.task_weight:
                loss, outputs = trainer.compute_loss(model, inputs, True, num_items_in_batch)
                loss = ours.task_weight * loss
            else:
                loss, outputs = 0.0, model(**without_labels(inputs))
        whole = num_items_in_batch is not None and self.model_accepts_loss_kwargs  # type: ignore[attr-defined]
        args: Any = self.args  # type: ignore[attr-defined]
        for term in ours.terms(Seen(outputs["logits"], own, parts), _taught(ours, inputs)):
            mask, term = counted(term, labels, inputs.get("attention_mask"))
            total = (term * mask).sum()
            if whole:  # as the task's own loss: over all micro-batches, and all processes that are averaged afterwards
                spread = args.world_size if args.average_tokens_across_devices else 1
                loss = loss + total / num_items_in_batch * spread
            else:
                loss = loss + total / mask.sum().clamp(min=1)
        weights = ours.penalty()
        if weights is not None:
            loss = loss + weights / (self.current_gradient_accumulation_steps if whole else 1)  # type: ignore[attr-defined]
        return (loss, outputs) if return_outputs else loss


def counted(term: Tensor, labels: Tensor | None, attention: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens count (1, else 0), and what is added for them: those that predict a label, or all but padding."""
    if term.dim() == 2 and labels is not None and labels.shape == term.shape:
        return labels[:, 1:].ne(-100).to(term), term[:, :-1]
    if term.dim() == 2 and attention is not None:
        return attention.to(term), term
    return torch.ones_like(term), term


@torch.no_grad()
def _taught(ours: Objective[Any], inputs: dict[str, Any]) -> Seen:
    """What the teacher makes of a batch; nothing where the objective does not read it."""
    if not ours.reads_teacher:
        return Seen(torch.empty(0))
    with watched(ours.teacher, ours.reads_blocks) as seen, met(ours.parts(ours.teacher)) as parts:
        return Seen(ours.teacher(**without_labels(inputs)).logits, seen, parts)


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with where its own loss is of no use."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def apart(own: Tensor, other: Tensor, loss: str = "kl") -> Tensor:
    """How far logits (… × classes) are from a teacher's (…): a sum over the classes, of mse a mean."""
    wide = torch.promote_types(own.dtype, torch.float32)
    own, other = own.to(wide), other.to(wide)
    if loss == "mse":
        return (own - other).square().mean(-1)
    ours, theirs = log_softmax(own, -1), log_softmax(other, -1)
    if loss == "kl":
        return kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    return -(theirs.exp() * ours).sum(-1)


@contextmanager
def watched(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """A list that fills with what the model's blocks pass on, in order."""
    seen: list[Tensor] = []

    def note(block: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in blocks(model).values()] if wanted else []
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def met(modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that fills with what each of these modules receives and gives, in their order when it is left."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    found: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[id(module)] = (inputs[0], output)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
        found.extend(seen[id(module)] for module in modules)
    finally:
        for handle in handles:
            handle.remove()


class Distiller(Distilling, Trainer):  # type: ignore[misc]  # Trainer leaves its attributes untyped
    """HF's Trainer with an objective. Call `finish` after the last step; `train` does."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        done = super().train(*args, **kwargs)
        if self.objective is not None:
            self.objective.finish()
        return done


def distiller(
    student: Any, teacher: Any, method: str, *, options: dict[str, Any] | None = None, **how: Any
) -> Distiller:
    """A Trainer that teaches a compressed model what its method learns by.

    Args:
        student: what `weft.compress(model, method, …)` made; all of it is trained that requires gradients, or what the
            method says.
        teacher: the model from before. It is frozen, and put into evaluation.
        method: a name of `weft methods --pillar compress`; one that does not learn is fine-tuned on the task.
        options: fields of the method's config.
        how: what `transformers.Trainer` takes: args, train_dataset, data_collator, …

    Raises UsageError where the teacher is no model that the student was made from.
    """
    card = registry.card(method, "compress")
    config: Any = registry.config_class(card.slug).from_options(options or {})  # type: ignore[attr-defined]
    made = objective(card.slug, config, student, frozen(teacher, student))
    trainer = Distiller(model=student, **how)
    trainer.objective = made
    return trainer


def frozen(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """The teacher without gradients and in evaluation, on the student's device."""
    if teacher is student:
        raise UsageError("the teacher is the student itself: give a copy of the model from before its compression")
    if len(blocks(teacher)) != len(blocks(student)):
        raise UsageError(f"the teacher has {len(blocks(teacher))} blocks and the student {len(blocks(student))}")
    return teacher.requires_grad_(False).eval().to(next(student.parameters()).device)
