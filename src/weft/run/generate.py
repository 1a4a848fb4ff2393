"""How well a model writes: greedy answers to the prompts of a split, scored against what the split answers itself.

Rows that share a prompt are references of one another. BLEU is sacrebleu's, of the whole corpus against all references;
ROUGE-L is rouge-score's F of the reference that is nearest to the answer, averaged over prompts. Both are 0 to 100.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError
from weft.run.evaluate import autocast
from weft.run.models import Base
from weft.run.predict import Sampling, complete, prompt_ids, prompts_of

if TYPE_CHECKING:
    from weft.run import sources

PACKAGES = ("sacrebleu", "rouge-score")  # of the extra `generation`
EXAMPLES = 3  # answers that a result shows

# An answer needs no gradients, so that more rows fit than in training; beyond so many, a core gains little.
_TIMES_TRAINED, _ROWS = 8, 64
# Float32 rounds a merged weight by 1e-7 of itself; what moves logits by more than this is not the same function.
_SAME = 1e-3


@dataclass(frozen=True)
class Exam:
    """Prompts to complete, and what is expected.

    Attributes:
        prompts: distinct, in the data's order.
        references: of each prompt, every completion that the data has for it; at least one.
        max_new_tokens: of an answer.
        templated: the prompts are conversations in the tokenizer's template, which wrote all special tokens.
        too_long: prompts that were left out, as they leave no room for an answer.
    """

    prompts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    max_new_tokens: int
    templated: bool = False
    too_long: int = 0

    def sentence(self) -> str:
        """What is asked, for a reader."""
        count = sum(map(len, self.references))
        text = (
            f"{len(self.prompts):,} prompts with {count:,} references, answers of at most {self.max_new_tokens} tokens"
        )
        return text + (f"; left out, as they leave no room for an answer: {self.too_long:,}" if self.too_long else "")


def check_installed(flag: str) -> None:
    """Refuse what `flag` asks for where the extra is missing; imports nothing."""
    if any(importlib.util.find_spec(package.replace("-", "_")) is None for package in PACKAGES):
        raise UsageError(f"{flag} needs the extra `weft[generation]`: pip install 'weft[generation]'")


def has_reference(row: sources.Row) -> bool:
    """Whether a row says what follows its prompt, in more than white space."""
    last = row["messages"][-1] if row.get("messages") else {}
    said = last.get("content") if last.get("role") == "assistant" else row.get("completion")
    return isinstance(said, str) and bool(said.strip()) and ("messages" in row or "prompt" in row)


def exam_of(
    rows: list[sources.Row],
    tokenizer: Any,
    *,
    limit: int | None = None,
    longest_prompt: int | None = None,
    positions: int | None = None,
    max_new_tokens: int | None = None,
) -> Exam:
    """The exam that rows of prompts and completions, or of chats that end with the assistant, make; it may be empty.

    Args:
        limit: prompts at most, the first ones.
        longest_prompt: tokens of a prompt at most.
        positions: tokens that the model can see at once; an answer gets half of them at most.
        max_new_tokens: of an answer; as many as the longest reference of all rows by default.
    """
    grouped: dict[str, list[str]] = {}
    answerable = [row for row in rows if has_reference(row)]
    for prompt, expected in prompts_of(answerable, tokenizer):
        if expected is not None:
            grouped.setdefault(prompt, []).append(expected.strip())
    if max_new_tokens is None:
        expected = [reference for references in grouped.values() for reference in references]
        lengths = map(len, tokenizer(expected, add_special_tokens=False)["input_ids"]) if expected else [1]
        max_new_tokens = max(lengths) + 1  # the end token
    max_new_tokens = min(max_new_tokens, longest_prompt or max_new_tokens, (positions or 2 * max_new_tokens) // 2)
    templated = any("messages" in row for row in rows)
    most = min(longest_prompt or 1 << 60, (positions or 1 << 60) - max_new_tokens)
    fitting: list[str] = []
    too_long = 0
    for prompt in grouped:
        if len(fitting) == limit:
            break
        fits = len(prompt_ids(tokenizer, prompt, templated)) <= most
        fitting += [prompt] if fits else []
        too_long += not fits
    references = tuple(tuple(grouped[prompt]) for prompt in fitting)
    return Exam(tuple(fitting), references, max_new_tokens, templated, too_long)


def examine(model: Any, tokenizer: Any, exam: Exam, batch_size: int, *, bf16: bool = False) -> dict[str, Any]:
    """Let a trained model take an exam: bleu, rouge_l, prompts, and the first answers as examples.

    An adapter is merged first, if merging changes nothing: the model is not good for more training afterwards.

    Args:
        batch_size: of training; answers need less memory, and take more rows at once.
    """
    rows = max(batch_size, min(_TIMES_TRAINED * batch_size, _ROWS))
    answers = answer(model, tokenizer, exam, rows, bf16=bf16)
    shown = zip(exam.prompts, answers, exam.references, strict=True)
    examples = [
        {"prompt": prompt, "answer": made, "reference": references[0]}
        for _, (prompt, made, references) in zip(range(EXAMPLES), shown, strict=False)
    ]
    return {**score(answers, exam.references), "prompts": len(answers), "examples": examples}


def answer(
    model: Any,
    tokenizer: Any,
    exam: Exam,
    rows: int,
    *,
    sampling: Sampling | None = None,
    bf16: bool = False,
) -> list[str]:
    """The model's answer to each prompt, `rows` at a time; greedy, unless `sampling` says otherwise."""
    device = next(model.parameters()).device
    lengths = [len(prompt_ids(tokenizer, prompt, exam.templated)) for prompt in exam.prompts]
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))  # little padding
    prompts = [exam.prompts[place] for place in order]
    was_training = model.training
    model.eval()
    try:
        merge_if_same(model, tokenizer, prompts[0], exam.templated)
        with autocast(device, bf16):
            base = Base(model, tokenizer, "")
            made = complete(base, prompts, sampling or Sampling(exam.max_new_tokens), rows, templated=exam.templated)
            answers = dict(zip(order, made, strict=True))
    finally:
        model.train(was_training)
    return [answers[place].strip() for place in range(len(order))]


def merge_if_same(model: Any, tokenizer: Any, prompt: str, templated: bool = False) -> bool:
    """Merge the adapter of a PEFT model into its weights, which makes a token cheaper; whether that was done.

    Not done where weights are quantised or narrower than float32, where the method refuses, and where the logits move.
    """
    import torch

    wide = all(weight.dtype == torch.float32 for weight in model.parameters() if weight.is_floating_point())
    if not hasattr(model, "merge_adapter") or getattr(model.config, "quantization_config", None) or not wide:
        return False
    ids = torch.tensor([prompt_ids(tokenizer, prompt, templated)], device=next(model.parameters()).device)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    with contextlib.suppress(Exception), torch.no_grad(), _unsaid():  # each method refuses in its own words
        model.merge_adapter()
        after = model(input_ids=ids).logits
        if (after - before).abs().max() <= _SAME * before.abs().max():
            return True
    model.unmerge_adapter()
    return False


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Without what weft tells of a merge that its user has asked for: here it is a means."""
    logger = logging.getLogger("weft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L (both 0 to 100) of one answer a prompt against all references of that prompt."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    streams = [list(stream) for stream in zip_longest(*references)]  # the n-th reference of each prompt, or None
    scorer = RougeScorer(["rougeL"])
    nearest = [scorer.score_multi(own, made)["rougeL"].fmeasure for own, made in zip(references, answers, strict=True)]
    return {"bleu": sacrebleu.corpus_bleu(list(answers), streams).score, "rouge_l": 100 * fmean(nearest)}
