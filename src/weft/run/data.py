"""From raw rows to what a model takes: cutting, templates, which tokens carry the loss, and what truncation cost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError
from weft.run import sources

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from weft.run.images import Images
    from weft.run.text_to_image import Noised

IGNORED = -100  # the label of a token that carries no loss
_BATCH = 1000  # rows tokenised at a time


@dataclass
class SplitReport:
    """What became of the rows of one split.

    Attributes:
        rows: sequences that are used; texts longer than the window are cut into several and lose nothing.
        tokens: tokens in them; loss_tokens: those that carry loss.
        truncated_rows, lost_tokens: rows longer than the window, and their tokens beyond it.
        dropped_rows: rows that had nothing left to learn from.
    """

    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated_rows: int = 0
    lost_tokens: int = 0
    dropped_rows: int = 0


@dataclass
class Splits:
    """Splits ready for a model; a row holds `input_ids`, or `pixel_values` where it is an image, `labels` (a list for
    language models, a number for classes) and `document`, the number of the text that it belongs to."""

    train: Dataset | Images | Noised
    validation: Dataset | Images | Noised
    test: Dataset | Images | Noised
    task: str
    report: dict[str, Any]
    labels: list[str] | None = None
    pad_token_id: int = 0

    def lines(self) -> list[str]:
        """The report in words, one line a split and one for everything worth knowing."""
        lines = []
        for name in sources.SPLITS:
            split = self.report[name]
            if not split["rows"]:
                continue
            if self.report["kind"] in sources.OF_IMAGES:
                lines.append(f"{name}: {split['rows']:,} images")
                continue
            line = f"{name}: {split['rows']:,} rows, {split['tokens']:,} tokens"
            if split["truncated_rows"]:
                line += (
                    f"; {split['truncated_rows']:,} rows longer than {self.report['max_length']} tokens were cut, "
                    f"{split['lost_tokens']:,} tokens lost"
                )
            if split["dropped_rows"]:
                line += f"; {split['dropped_rows']:,} rows with nothing to learn from left out"
            lines.append(line)
        return lines + self.report["notes"]


@dataclass
class _Encoder:
    """Turns rows of one kind into token rows and counts what was lost."""

    tokenizer: Any  # HF's tokenizer; its own annotations do not say what a call returns
    kind: str
    max_length: int
    notes: list[str] = field(default_factory=list)
    report: SplitReport = field(default_factory=SplitReport)

    def encode(self, rows: list[sources.Row], first_document: int) -> list[dict[str, Any]]:
        encode_row = getattr(self, f"_{self.kind}")
        encoded = []
        for number, row in enumerate(rows, first_document):
            for ids, labels, *types in encode_row(row):
                piece = {"input_ids": ids, "labels": labels, "document": number}
                if types:
                    piece["token_type_ids"] = types[0]
                carried = 1 if isinstance(labels, int) else sum(label != IGNORED for label in labels[1:])
                if not carried:
                    self.report.dropped_rows += 1
                    continue
                self.report.rows += 1
                self.report.tokens += len(ids)
                self.report.loss_tokens += carried
                encoded.append(piece)
        return encoded

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) > self.max_length:
            self.report.truncated_rows += 1
            self.report.lost_tokens += len(ids) - self.max_length
        return ids[: self.max_length]

    def _text(self, row: sources.Row) -> Iterator[tuple[list[int], list[int]]]:
        """Windows that overlap by one token, so that every token but the text's first is predicted exactly once."""
        ids = self.tokenizer(row["text"], verbose=False)["input_ids"]
        if self.tokenizer.eos_token_id is not None and ids and ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        for start in range(0, max(len(ids) - 1, 1), self.max_length - 1):
            window = ids[start : start + self.max_length]
            yield window, list(window)

    def _completion(self, row: sources.Row) -> Iterator[tuple[list[int], list[int]]]:
        prompt = self.tokenizer(row["prompt"])["input_ids"]
        ids = self.tokenizer(row["prompt"] + row["completion"], verbose=False)["input_ids"]
        if ids[: len(prompt)] != prompt:  # the tokenizer melts the two at the seam; keep the prompt as predict sees it
            ids = prompt + self.tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        if self.tokenizer.eos_token_id is not None and ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        yield self._cut(ids), labels[: self.max_length]

    def _chat(self, row: sources.Row) -> Iterator[tuple[list[int], list[int]]]:
        ids, mask = _chat_ids(self.tokenizer, row["messages"])
        if mask is None:
            note = "chat: the template does not tell the assistant's turns apart, so the loss is on whole conversations"
            if note not in self.notes:
                self.notes.append(note)
            mask = [1] * len(ids)
        labels = [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]
        yield self._cut(ids), labels[: self.max_length]

    def _classification(self, row: sources.Row) -> Iterator[tuple[Any, ...]]:
        pair = (row["text1"], row["text2"]) if "text1" in row else (row["text"],)
        self._cut(self.tokenizer(*pair, verbose=False)["input_ids"])
        encoded = encode_pair(self.tokenizer, row, self.max_length)
        types = [encoded["token_type_ids"]] if "token_type_ids" in encoded else []
        yield encoded["input_ids"], row["label"], *types


def encode_pair(tokenizer: Any, row: sources.Row, max_length: int) -> dict[str, Any]:
    """Token ids of a row to classify, cut to `max_length`, with token types where the tokenizer makes them."""
    pair = (row["text1"], row["text2"]) if "text1" in row else (row["text"],)
    encoded = tokenizer(*pair, truncation=True, max_length=max_length)
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def _chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int] | None]:
    """Token ids of a conversation, and which of them the assistant said; None where the template hides that."""
    template = tokenizer.get_chat_template()
    if "{% generation %}" in template or "{%- generation" in template:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])
    ids = _template_ids(tokenizer, messages)
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template_ids(tokenizer, messages[:turn], add_generation_prompt=True) if turn else []
        after = _template_ids(tokenizer, messages[: turn + 1])
        if ids[: len(before)] != before or ids[: len(after)] != after or len(after) <= len(before):
            return ids, None
        mask[len(before) : len(after)] = [1] * (len(after) - len(before))
    return ids, mask


def _template_ids(tokenizer: Any, messages: list[dict[str, str]], **extra: Any) -> list[int]:
    import jinja2

    try:
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **extra)
    except jinja2.TemplateError as error:
        raise UsageError(f"the model's chat template refuses a conversation: {error}") from error
    return list(encoded["input_ids"])


def load_reader(spec: str, rows: sources.Rows) -> Any:
    """What makes of rows what the model takes: its tokenizer or, for images, its image processor."""
    from weft.run import images, models, segmentation, text_to_image

    if rows.kind == "captioned":
        return text_to_image.pipeline(spec)
    if rows.kind in sources.OF_IMAGES:
        models.check_task(spec, rows.task)
        if rows.kind == "mask":
            return segmentation.load_processor(spec, rows.train)
        return images.load_processor(spec, images.size_of(rows.train))
    return models.load_tokenizer(spec)


def load_splits(
    spec: str,
    task: str,
    tokenizer: Any,
    *,
    max_length: int = 512,
    seed: int = 0,
    rows: sources.Rows | None = None,
    **reading: Any,
) -> Splits:
    """Read and tokenise a data source; images are prepared when they are asked for.

    Args:
        tokenizer: what `load_reader` gives.
        max_length: tokens a row at most. Plain texts are cut into windows of that length and lose nothing; other rows
            lose their ends, which the report counts.
        seed: draws the held-out rows where the source has no split of its own.
        rows: rows that `sources.read` has read already, so that the source is read once.
        reading: further arguments of `sources.read`.
    """
    if max_length < 2:
        raise UsageError(f"max_length must be at least 2 tokens, not {max_length}")
    rows = rows if rows is not None else sources.read(spec, task, seed=seed, **reading)
    if rows.kind == "captioned":
        from weft.run import text_to_image

        return text_to_image.splits(rows, tokenizer)
    if rows.kind in sources.OF_IMAGES:
        return _image_splits(rows, tokenizer)
    if rows.kind == "chat" and not tokenizer.chat_template:
        raise UsageError(
            f"data {spec!r} holds chat messages, but the model's tokenizer has no chat template; give prompt and "
            "completion columns, or a model made for chat"
        )
    notes: list[str] = [f"held out for {line}" for line in rows.held_out]
    report: dict[str, Any] = {"max_length": max_length, "kind": rows.kind, "notes": notes}
    datasets = {}
    for name in sources.SPLITS:
        encoder = _Encoder(tokenizer, rows.kind, max_length, notes)
        datasets[name] = _dataset(encoder, getattr(rows, name))
        report[name] = vars(encoder.report)
    if not len(datasets["train"]):
        raise UsageError(f"data {spec!r} leaves nothing to learn from at max_length={max_length}")
    pad = tokenizer.pad_token_id
    return Splits(**datasets, task=rows.task, report=report, labels=rows.labels, pad_token_id=0 if pad is None else pad)


def _image_splits(rows: sources.Rows, processor: Any) -> Splits:
    from weft.run import images, segmentation, verification

    if rows.kind == "mask":
        made: dict[str, Any] = segmentation.splits(rows, processor)
    else:
        kind = verification.Identities if rows.task == "verification" else images.Images
        made = {name: images.images(getattr(rows, name), processor, kind) for name in sources.SPLITS}
    shape = " x ".join(map(str, made["train"][0]["pixel_values"].shape))
    notes = [*(f"held out for {line}" for line in rows.held_out), *rows.notes]
    notes.append(f"images reach the model as {shape} numbers")
    if rows.kind == "mask":
        notes.append(f"each pixel is one of {len(rows.labels or [])} classes: {', '.join(rows.labels or [])}")
    report: dict[str, Any] = {"kind": rows.kind, "notes": notes}
    report |= {name: vars(SplitReport(rows=len(split), loss_tokens=len(split))) for name, split in made.items()}
    return Splits(**made, task=rows.task, report=report, labels=rows.labels)


def _dataset(encoder: _Encoder, rows: list[sources.Row]) -> Dataset:
    """The encoded rows as one Arrow table; a batch of rows is in memory as Python numbers at a time."""
    import pyarrow
    from datasets import Dataset

    numbers = pyarrow.list_(pyarrow.int32())
    columns = {"input_ids": numbers, "labels": numbers, "document": pyarrow.int64()}
    if encoder.kind == "classification":
        columns["labels"] = pyarrow.int64()
        if "token_type_ids" in encoder.tokenizer.model_input_names:
            columns["token_type_ids"] = numbers
    schema = pyarrow.schema(columns)
    batches = [
        pyarrow.RecordBatch.from_pylist(encoder.encode(rows[start : start + _BATCH], start), schema=schema)
        for start in range(0, len(rows), _BATCH)
    ]
    return Dataset(pyarrow.Table.from_batches(batches, schema=schema))


def draw(
    rows: sources.Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, count: int, seed: int
) -> list[dict[str, Any]]:
    """Tokenised sequences of the training rows, drawn by seed: one of each text, then further ones of each in turn.

    `count` at most; no more rows are tokenised than that takes.
    """
    dice = random.Random(f"{seed}/calibration")
    encoder = _Encoder(tokenizer, rows.kind, max_length)
    first: list[dict[str, Any]] = []
    later: list[list[dict[str, Any]]] = []
    for place in dice.sample(range(len(rows.train)), len(rows.train)):
        pieces = encoder.encode([rows.train[place]], place)
        dice.shuffle(pieces)
        first += pieces[:1]
        later.append(pieces[1:])
        if len(first) == count:
            return first
    further = itertools.chain.from_iterable(itertools.zip_longest(*later))
    return [*first, *(piece for piece in further if piece is not None)][:count]


def collate(rows: list[dict[str, Any]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch padded on the right to its longest row: input_ids, attention_mask, labels, each (rows, longest).

    Of images pixel_values, (rows, channels, height, width), and labels; masks are as `segmentation.stack` makes them,
    captioned images as `text_to_image.collate` does.
    """
    import torch

    if "posterior" in rows[0]:
        from weft.run import text_to_image

        return text_to_image.collate(rows)
    if "pixel_values" in rows[0]:
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if hasattr(rows[0].get("labels"), "shape"):
            from weft.run import segmentation

            return batch | {"labels": segmentation.stack([row["labels"] for row in rows])}
        return batch | ({"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {})
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(column: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[column], *[filler] * (longest - len(row[column]))] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": (torch.arange(longest)[None, :] < lengths[:, None]).long(),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    if "labels" in rows[0]:
        classes = not hasattr(rows[0]["labels"], "__len__")
        batch["labels"] = torch.tensor([row["labels"] for row in rows]) if classes else padded("labels", IGNORED)
    return batch
