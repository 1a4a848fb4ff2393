"""How well a model does on rows: nats a token and perplexity, accuracy, or Dice; each document's share kept."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from weft.run.data import IGNORED, collate

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn

T = TypeVar("T")


def evaluate(
    model: nn.Module, dataset: Dataset, task: str, batch_size: int, *, pad_token_id: int = 0, bf16: bool = False
) -> dict[str, Any]:
    """Metrics of a model on one split; every process computes all of them.

    Returns:
        For a language model `loss` (nats a token over all tokens that carry loss), `perplexity`, `tokens` and
        `per_document`: [sum of nats, tokens] of each document. For classification `loss` (nats a row), `accuracy`,
        `matthews`, `rows` and `per_document`: [1 if wrong else 0, 1] of each row. Less is better in both, and a
        document's two numbers add up over documents. Of other tasks what their splits say: masks, identities, noise.
    """
    found = measure_rows(model, dataset, batch_size, range(len(dataset)), pad_token_id, bf16)
    return metrics(dataset, found, task)


def measure_rows(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    rows: Sequence[int],
    pad_token_id: int = 0,
    bf16: bool = False,
) -> list[tuple[int, int, float, int, int]]:
    """One entry a row: (row, document, sum of nats, tokens or predicted class, true class or -1).

    A split that says itself how a model is measured on it is asked; its entries begin with the row too.
    """
    if hasattr(dataset, "measure"):
        return dataset.measure(model, batch_size, rows, bf16)
    batches = over_batches(measure_batch, [model], dataset, batch_size, rows, pad_token_id, bf16)
    return sorted(itertools.chain.from_iterable(batches))


def metrics(dataset: Any, measured: list[Any], task: str) -> dict[str, Any]:
    """What `measure_rows` found on a split, as its own metrics or those of text and classes; nothing of nothing."""
    if measured and hasattr(dataset, "summarise"):
        return dataset.summarise(measured)
    return summarise(measured, task)


def over_batches(
    measure: Callable[..., T],
    models: Sequence[nn.Module],
    dataset: Dataset,
    batch_size: int,
    rows: Sequence[int],
    pad_token_id: int = 0,
    bf16: bool = False,
) -> Iterator[T]:
    """What `measure` finds in each batch, given its rows' numbers, their documents, labels, and each model's logits.

    Logits of one batch are in memory at a time. Models are evaluated as such and left as they were.
    """
    import torch

    device = next(models[0].parameters()).device
    were_training = [model.training for model in models]
    by_length = list(rows)
    if "input_ids" in dataset.column_names:  # images are all of one size
        lengths = dataset.with_format(None)["input_ids"]
        by_length.sort(key=lambda row: (len(lengths[row]), row))  # little padding, the same batches every time
    try:
        for model in models:
            model.eval()
        for start in range(0, len(by_length), batch_size):
            numbers = by_length[start : start + batch_size]
            batch = [dataset[row] for row in numbers]
            documents = [row["document"] for row in batch]
            with torch.inference_mode(), autocast(device, bf16):
                tensors = {name: value.to(device) for name, value in collate(batch, pad_token_id).items()}
                labels = tensors.pop("labels")
                found = measure(numbers, documents, labels, *[model(**tensors).logits for model in models])
            yield found
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast, or nothing."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def measure_batch(
    rows: Sequence[int], documents: list[int], labels: torch.Tensor, logits: torch.Tensor
) -> list[tuple[int, int, float, int, int]]:
    """The entries of `measure_rows` for one batch."""
    from torch.nn.functional import cross_entropy

    if labels.dim() == 1:  # classes: logits (rows, classes), labels (rows,)
        nats = cross_entropy(logits.float(), labels, reduction="none").tolist()
        predicted = logits.argmax(-1).tolist()
        return list(zip(rows, documents, nats, predicted, labels.tolist(), strict=True))
    targets = labels[:, 1:]  # logits (rows, tokens, vocabulary)
    each = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    counts = (targets != IGNORED).sum(1).tolist()
    return list(zip(rows, documents, each.double().sum(1).tolist(), counts, [-1] * len(rows), strict=True))


def summarise(measured: list[tuple[int, int, float, int, int]], task: str) -> dict[str, Any]:
    """The metrics of text or classes from what `measure_rows` found; an empty split gives an empty answer."""
    if not measured:
        return {}
    if task != "causal-lm":
        pairs = [(predicted, true) for _, _, _, predicted, true in measured]
        wrong = [int(predicted != true) for predicted, true in pairs]
        return {
            "loss": math.fsum(nats for _, _, nats, _, _ in measured) / len(measured),
            "accuracy": 1 - sum(wrong) / len(wrong),
            "matthews": matthews(pairs),
            "rows": len(measured),
            "per_document": [[error, 1] for error in wrong],
        }
    documents: dict[int, list[Any]] = {}
    for _, document, nats, tokens, _ in measured:
        entry = documents.setdefault(document, [0.0, 0])
        entry[0] += nats
        entry[1] += tokens
    per_document = [documents[number] for number in sorted(documents)]
    if len(per_document) == 1:  # one long text: its windows are the units that a bootstrap can draw
        per_document = [[nats, tokens] for _, _, nats, tokens, _ in measured]
    tokens = sum(count for _, count in per_document)
    loss = math.fsum(nats for nats, _ in per_document) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": tokens,
        "per_document": per_document,
    }


def matthews(pairs: list[tuple[int, int]]) -> float:
    """Matthews correlation of (predicted, true) classes, for any number of classes; 0 where it is undefined.

    >>> matthews([(0, 0), (1, 1), (1, 1), (0, 0)])
    1.0
    """
    total = len(pairs)
    correct = sum(predicted == true for predicted, true in pairs)
    classes = {value for pair in pairs for value in pair}
    predictions = {label: sum(predicted == label for predicted, _ in pairs) for label in classes}
    truths = {label: sum(true == label for _, true in pairs) for label in classes}
    covariance = correct * total - sum(predictions[label] * truths[label] for label in classes)
    spread = math.sqrt(
        (total**2 - sum(count**2 for count in predictions.values()))
        * (total**2 - sum(count**2 for count in truths.values()))
    )
    return covariance / spread if spread else 0.0
