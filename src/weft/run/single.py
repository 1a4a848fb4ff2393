"""One run of a comparison: a function of its task and of the study alone.

It loads the base model anew, seeds everything from the task's seed, and trains with the number of threads that the
study fixes, so that it does not matter where it runs, nor what the same process ran before.
"""

from __future__ import annotations

import gc
import math
import shlex
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError
from weft.run.study import Entry, Plan, Row, Study, Task, plan_from, plan_json, request_of, study_from

if TYPE_CHECKING:
    from torch import nn

    from weft.run import sources
    from weft.run.data import Splits
    from weft.run.generate import Exam
    from weft.run.methods import Method


def context_of(plan: Plan, forgetting: Row | None = None, debug: bool = False) -> Row:
    """What every run of a study is told, as JSON."""
    return {"request": request_of(plan.study, {}), "plan": plan_json(plan), "forgetting": forgetting, "debug": debug}


def _reading(study: Study) -> dict[str, Any]:
    """How the data is read: unlike `weft adapt`, a comparison always needs a test split."""
    return {"test_fraction": 0.1, **study.data_options}


def load_data(study: Study) -> tuple[Splits, Any, Exam | None]:
    """The splits that all methods share, the tokenizer (or image processor), and what is to be generated, if anything.

    Raises UsageError for data that cannot be read or, where generation is asked for, have no prompts.
    """
    from weft.run import sources
    from weft.run.data import load_reader, load_splits
    from weft.run.models import classes_of

    rows = sources.read(
        study.data, study.task, seed=study.seed, classes=classes_of(study.model), **_reading(study)
    )
    if rows.task == "verification":
        raise UsageError("weft compare ranks by what adds up over rows, and pairs of images do not: use weft adapt")
    tokenizer = load_reader(study.model, rows)
    exam = _exam(study, rows, tokenizer) if study.generate else None
    splits = load_splits(study.data, study.task, tokenizer, max_length=study.max_length, seed=study.seed, rows=rows)
    return splits, tokenizer, exam


def _exam(study: Study, rows: sources.Rows, tokenizer: Any) -> Exam:
    """The first prompts of the test split that a training row of this length could hold."""
    from weft.run.generate import exam_of
    from weft.run.models import position_limit

    if rows.kind not in ("completion", "chat"):
        raise UsageError(
            f"--generate needs data with prompts and completions, or chats, and {study.data!r} holds "
            + {"text": "plain text", "classification": "texts with labels"}.get(rows.kind, "images")
        )
    exam = exam_of(
        rows.test,
        tokenizer,
        limit=study.generate,
        longest_prompt=study.max_length - 1,
        positions=position_limit(study.model),
    )
    if not exam.prompts:
        raise UsageError(
            f"--generate: no test row of data {study.data!r} has a prompt of fewer than {study.max_length} tokens "
            "and a completion"
        )
    return exam


_loaded: dict[str, tuple[Splits, Any, Exam | None]] = {}  # of this process: data do not change from run to run


def _data_of(study: Study) -> tuple[Splits, Any, Exam | None]:
    reading = (study.model, study.data, study.task, study.max_length, study.seed, sorted(study.data_options.items()))
    key = repr((*reading, study.generate))
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_data(study)
    return _loaded[key]


def run_task(context: Row, task_fields: Row) -> Row:
    """One run, as a row. Whatever goes wrong is the row's error: the study goes on."""
    study = study_from(context["request"])
    plan = plan_from(context, study)
    task = Task(**task_fields)
    row = empty_row(plan, task)
    try:
        if task.phase == "forgetting":
            return _sample_forgetting(plan)
        row |= _measured(plan, task) if task.phase == "measure" else _trained(plan, task, context["forgetting"])
        row["status"] = "ok"
    except Exception as error:
        if context["debug"]:
            traceback.print_exc()
        row["error"] = sentence(error)
    gc.collect()
    return without_nan(row)


def sentence(
    error: BaseException, thrift: str = "a smaller --batch-size with more --gradient-accumulation needs less"
) -> str:
    """An error as one line that a table can show; `thrift` says what needs less memory."""
    text = " ".join(str(error).split())
    if isinstance(error, WeftError) and text:
        return text
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return f"out of memory; {thrift}"
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def without_nan(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return value


def empty_row(plan: Plan, task: Task) -> Row:
    """A run's row before it has run: failed unless told otherwise."""
    entry = plan.entry(task.method) if task.phase != "forgetting" else Entry("base", {}, {}, None, 0)
    return {
        "kind": "run",
        "phase": task.phase,
        "method": task.method,
        "seed": task.seed,
        "learning_rate": task.learning_rate,
        "grid_offset": task.offset,
        "status": "failed",
        "error": None,
        "options": entry.options,
        "knob": entry.knob,
        "recipe": entry.recipe,
        "trainable": entry.trainable,
        "steps": task.steps,
        "curve": [],
        "validation": None,
        "test": None,
        "ranks": None,
        "forgetting": None,
        "generation": None,
        "step_seconds": None,
        "peak_bytes": None,
        "file_bytes": None,
        "optimizer_bytes": None,
        "command": command_of(plan, task),
    }


def _method_of(plan: Plan, task: Task) -> Method:
    from weft.run import methods

    options = plan.entry(task.method).options
    return methods.resolve(task.method, options, from_scratch=plan.study.from_scratch)


def _settings(plan: Plan, task: Task, eval_steps: int) -> Any:
    """What train() is told; decay, warm-up, clipping and schedule are left to the method's recipe."""
    from weft.run.settings import TrainSettings

    study = plan.study
    return TrainSettings(
        max_steps=task.steps,
        batch_size=study.batch_size,
        gradient_accumulation=study.gradient_accumulation,
        learning_rate=task.learning_rate,
        seed=task.seed,
        bf16=study.bf16,
        max_length=study.max_length,
        eval_steps=eval_steps,
        save_steps=0,
        logging_steps=max(1, task.steps // 50),
    )


def _base_model(plan: Plan, seed: int, splits: Splits, tokenizer: Any) -> Any:
    from transformers import set_seed

    from weft.run.models import load_base

    set_seed(seed)
    return load_base(plan.study.model, plan.task, labels=splits.labels, seed=seed, tokenizer=tokenizer)


def _trained(plan: Plan, task: Task, forgetting: Row | None) -> Row:
    """Train one method once; the test split is looked at in final runs only."""
    from weft.run.evaluate import evaluate
    from weft.run.train import train

    study = plan.study
    splits, tokenizer, exam = _data_of(study)
    base = _base_model(plan, task.seed, splits, tokenizer)

    def generation(model: nn.Module) -> Row | None:
        from weft.run.generate import examine

        return examine(model, tokenizer, exam, study.batch_size, bf16=study.bf16) if exam else None

    def score(model: nn.Module, rows: Any) -> Row:
        return evaluate(model, rows, plan.task, study.batch_size, pad_token_id=splits.pad_token_id, bf16=study.bf16)

    if task.method == "base":
        model = base.model.to(_device()).requires_grad_(False)
        row: Row = {"validation": _brief(score(model, splits.validation)), "test": score(model, splits.test)}
        return {**row, "generation": generation(model)}
    method = _method_of(plan, task)
    apart = 0  # optimiser steps between two evaluations on the validation split
    if task.phase == "final" and study.evaluations:
        apart = max(1, task.steps // study.evaluations)
    result = train(base, splits, method, _settings(plan, task, apart), None, progress=False)
    row = {
        "trainable": result.trainable,
        "steps": result.steps,
        "curve": result.curve,
        "validation": _brief(result.validation),
        "ranks": result.ranks or None,
        "file_bytes": result.file_bytes,
        "optimizer_bytes": result.optimizer_bytes,
    }
    if task.phase == "grid":
        return row
    row["test"] = score(result.model, splits.test)
    if forgetting:
        after = score(result.model, _forgetting_rows(forgetting))["loss"]
        row["forgetting"] = {"before": forgetting["before"], "after": after}
    row["generation"] = generation(result.model)  # last, as it may merge the adapter
    return row


def _device() -> str:
    """Where Trainer puts a model."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _brief(metrics: Row) -> Row:
    """Metrics without each document's share, which only the test split's bootstrap needs."""
    return {name: value for name, value in metrics.items() if name != "per_document"}


def _measured(plan: Plan, task: Task) -> Row:
    """Time and memory of a few steps; this process should be alone on the machine."""
    from weft.run.measure import measuring, restart_peak
    from weft.run.train import train

    splits, tokenizer, _ = _data_of(plan.study)
    splits = replace(splits, validation=splits.validation.select(range(0)))  # only the steps are of interest
    with measuring() as seen:
        base = _base_model(plan, plan.study.seed, splits, tokenizer)
        restart_peak()
        result = train(base, splits, _method_of(plan, task), _settings(plan, task, 0), None, progress=False)
    return {
        "trainable": result.trainable,
        "steps": len(seen.moments),
        "step_seconds": seen.step_seconds,
        "peak_bytes": seen.peak_bytes,
    }


# --- forgetting -------------------------------------------------------------------------------------------------------

_SAMPLES, _SAMPLE_TOKENS = 48, 128


def _sample_forgetting(plan: Plan) -> Row:
    """Text that the adapted model should still know, tokenised, and the base model's loss on it."""
    from weft.run.evaluate import evaluate

    study = plan.study
    splits, tokenizer, _ = _data_of(study)
    model = _base_model(plan, study.seed, splits, tokenizer).model.to(_device())
    rows = _given_text(study, tokenizer) if study.forget_data else _sampled_text(model, tokenizer, study)
    forgetting = {"rows": rows, "before": None, "source": study.forget_data or "sampled from the base model"}
    data = _forgetting_rows(forgetting)
    measured = evaluate(model, data, plan.task, study.batch_size, pad_token_id=splits.pad_token_id, bf16=study.bf16)
    return {**forgetting, "before": measured["loss"]}


def _given_text(study: Study, tokenizer: Any) -> list[list[int]]:
    from weft.run.data import load_splits

    splits = load_splits(
        str(study.forget_data), "causal-lm", tokenizer, max_length=study.max_length, seed=study.seed, test_fraction=0.1
    )
    return [list(row) for row in splits.test["input_ids"]]


def _sampled_text(model: nn.Module, tokenizer: Any, study: Study) -> list[list[int]]:
    """What the base model says by itself: ancestral sampling from its start token, cut at its end token."""
    import torch

    start = next(
        (
            token
            for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
            if token is not None
        ),
        0,
    )
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(study.seed)
    tokens = torch.full((_SAMPLES, 1), start, device=device)
    length = min(_SAMPLE_TOKENS, study.max_length)
    cache = None
    with torch.inference_mode():
        for _ in range(length - 1):
            output = model(input_ids=tokens if cache is None else tokens[:, -1:], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = output.logits[:, -1].float().softmax(-1).cpu()
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator).to(device)], 1)
    rows = []
    for row in tokens.tolist():
        ends = [place for place, token in enumerate(row) if place and token == tokenizer.eos_token_id]
        rows.append(row[: ends[0] + 1] if ends else row)
    return [row for row in rows if len(row) > 1]


def _forgetting_rows(forgetting: Row) -> Any:
    from datasets import Dataset

    rows = forgetting["rows"]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "document": list(range(len(rows)))})


# --- the same run by hand ---------------------------------------------------------------------------------------------


_EVERY_LINEAR = ("target_modules", "all-linear")  # what `weft adapt` does by itself


def command_of(plan: Plan, task: Task) -> str:
    """The `weft adapt` command that makes the same adapter; none for what trains nothing."""
    study = plan.study
    if task.method == "base" or task.learning_rate is None:
        return ""
    from weft.run.adapt import method_keys_of

    entry, keys = plan.entry(task.method), method_keys_of(task.method)
    given: dict[str, Any] = {"model": study.model, "data": study.data, "task": plan.task}
    given["method"] = task.method.partition("#")[0]  # what is behind it tells entries of a comparison apart
    given |= {keys[name]: value for name, value in entry.options.items() if (name, value) != _EVERY_LINEAR}
    given |= {"max_steps": task.steps, "learning_rate": task.learning_rate, "seed": task.seed}
    given |= {"batch_size": study.batch_size, "gradient_accumulation": study.gradient_accumulation}
    given |= {"max_length": study.max_length, "split_seed": study.seed, "bf16": study.bf16}
    reading = {"validation": "validation_data", "test": "test_data"}
    given |= {reading.get(name, name): value for name, value in _reading(study).items()}
    given["output"] = f"{task.method.replace(':', '-')}-{task.seed}"
    words = ["weft", "adapt"]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, dict):
            words += [flag, ",".join(f"{key}={each}" for key, each in value.items())]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)
