"""What a model lost beside another, and what both cost: on the same tokens, in one report.

For each corpus: nats a token and perplexity (accuracy and loss of a classifier) of both models; how often their
likeliest answers are the same; KL(against ‖ model), how far the model's predictions are from those of the model that it
is held against; and an interval of the difference of losses, by a bootstrap that draws documents once for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError, nearest
from weft.run import costs, evaluate, models, ranking, sources
from weft.run.data import IGNORED, load_splits
from weft.run.images import Images, load_processor
from weft.run.models import Base, lacks_names, load_config, load_tokenizer, position_limit, task_of

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn

Json = dict[str, Any]

COLLAPSED = math.log(2)  # nats a token: twice the perplexity of the model that it is held against


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        model, against: hub ids, folders, or builtin:pycode; without `against` nothing is compared.
        data: corpora, as `sources.read` takes them.
        split: the one that is read.
        test_fraction: held out with `split_seed` where a corpus has no test split; 0 refuses such a corpus.
        max_length: tokens a row.
        rows: of each corpus only as many, at even distances; None for all.
        bf16: weights and arithmetic in bfloat16 instead of float32.
        costs: whether memory and speed are measured.
        tasks: of lm-eval, for language models.
    """

    model: str
    data: Sequence[str]
    against: str | None = None
    split: str = "test"
    max_length: int = 256
    batch_size: int = 8
    rows: int | None = None
    bf16: bool = False
    columns: dict[str, str] | None = None
    test_fraction: float = 0.0
    split_seed: int = 0
    costs: bool = True
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.data and not self.tasks:
            raise UsageError("nothing to evaluate on: give --data, a corpus, as often as you like")
        if self.split not in sources.SPLITS:
            raise UsageError(f"unknown split {self.split!r}: {nearest(self.split, sources.SPLITS)}")
        for name, least in (("max_length", 2), ("batch_size", 1), ("rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        if not 0 <= self.test_fraction < 1:
            raise UsageError(f"test_fraction must be at least 0 and below 1, not {self.test_fraction}")

    @property
    def models(self) -> dict[str, str]:
        """The models by their part in the report, "model" and "against"."""
        return {"model": self.model} | ({} if self.against is None else {"against": self.against})


def run(asked: Request, tell: Callable[[str], None] = lambda text: None) -> Json:
    """Everything that is asked for, as JSON has it; `tell` hears what is being done.

    Raises UsageError, before any weight is loaded, for models, data or options that do not fit together.
    """
    configs = {name: load_config(spec) for name, spec in asked.models.items()}
    task = _shared_task(asked, configs)
    lm_eval = _lm_eval(task) if asked.tasks else None
    tell("reading the data")
    of_images = task == "image-classification"
    read = load_processor if of_images else load_tokenizer
    tokenizers = {name: read(spec) for name, spec in asked.models.items()}
    labels = _shared_labels(asked, configs) if task != "causal-lm" else None
    loading = {name: _given_classes(config, configs, labels) for name, config in configs.items()}
    limits = [limit for spec in asked.models.values() if (limit := position_limit(spec)) is not None]
    window = min([asked.max_length, *([] if of_images else limits)])
    corpora = [read_corpus(asked, spec, task, window, tokenizers, labels) for spec in asked.data]
    report: Json = {
        "task": task,
        "settings": _settings(asked, window),
        "models": {
            name: {
                "name": spec,
                **costs.at_rest(spec, task, tokenizers[name], **loading[name]),
                "peak_bytes": None,
                "speed": None,
            }
            for name, spec in asked.models.items()
        },
        "corpora": [],
        "tasks": {},
    }
    if asked.costs and not of_images:
        import torch

        pass_ = {"task": task, "bf16": asked.bf16, "batch_size": asked.batch_size, "max_length": window}
        for name, spec in asked.models.items():
            tell(f"measuring the memory of {spec}")
            peak = costs.forward_peak({"model": spec, **pass_}, torch.get_num_threads())
            report["models"][name]["peak_bytes"] = peak
    bases = {
        name: costs.loaded(spec, task, asked.bf16, tokenizers[name], **loading[name])
        for name, spec in asked.models.items()
    }
    for corpus in corpora:
        tell(f"evaluating on {corpus.name}")
        against = bases["against"].model if "against" in bases else None
        found = compare(bases["model"].model, against, corpus, task, asked.batch_size)
        report["corpora"].append({**corpus.facts, **found})
    if asked.costs and of_images:
        report["corpora"][0]["notes"].append("memory and speed are measured of models of text alone")
    elif asked.costs:
        tell("timing")
        for name, speed in costs.speeds(bases).items():
            report["models"][name]["speed"] = speed
    if lm_eval is not None:
        for name, base in bases.items():
            tell(f"lm-eval on {base.name}")
            report["tasks"][name] = lm_eval(base, asked.tasks, asked.batch_size)
    return report


def _settings(asked: Request, window: int) -> Json:
    import torch
    import transformers

    import weft

    return {
        "split": asked.split,
        "max_length": window,
        "batch_size": asked.batch_size,
        "rows": asked.rows,
        "dtype": "bfloat16" if asked.bf16 else "float32",
        "device": models.device(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (weft, torch, transformers)},
    }


# --- what must fit together -------------------------------------------------------------------------------------------


def _shared_task(asked: Request, configs: Json) -> str:
    """What both models are for."""
    tasks = {name: task_of(config) for name, config in configs.items()}
    if len(set(tasks.values())) > 1:
        raise UsageError(
            f"{asked.model!r} is for {tasks['model']} and {asked.against!r} for {tasks['against']}: "
            "their predictions cannot be compared"
        )
    if tasks["model"] == "segmentation":
        raise UsageError(f"{asked.model!r} segments images: weft predict says its Dice on data with masks")
    if any(tasks[name] == "image-classification" and not config.num_labels for name, config in configs.items()):
        raise UsageError(f"{asked.model!r} has no classes, and embeds images: weft predict says whose each is")
    return tasks["model"]


def _shared_labels(asked: Request, configs: Json) -> list[str]:
    """The names of the classes, in the models' order; a dual encoder without classes takes those of the other."""
    named = {
        name: [str(each) for _, each in sorted(config.id2label.items())]
        for name, config in configs.items()
        if not lacks_names(config)
    }
    if not named:
        raise UsageError(
            f"{asked.model!r} is a dual encoder without classes: weft adapt --method base scores it on the data's, or "
            "hold it against a model that was adapted to them"
        )
    if len(named) > 1 and named["model"] != named["against"]:
        raise UsageError(
            f"{asked.model!r} tells apart {', '.join(named['model'])} and {asked.against!r} "
            f"{', '.join(named['against'])}: their predictions cannot be compared"
        )
    return next(iter(named.values()))


def _given_classes(config: Any, configs: Json, labels: list[str] | None) -> Json:
    """What a dual encoder without classes is loaded with: the classes, and what the other model reads of them."""
    if not lacks_names(config):
        return {}
    prompts = [found for each in configs.values() if (found := getattr(each, "weft_prompts", None))]
    return {"labels": labels, "prompts": next(iter(prompts), None)}


@dataclass(frozen=True)
class Corpus:
    """Token rows to evaluate on, with what the report says of them."""

    name: str
    rows: Dataset
    pad_token_id: int
    facts: Json = field(default_factory=dict)


def read_corpus(
    asked: Request, spec: str, task: str, window: int, tokenizers: dict[str, Any], labels: list[str] | None
) -> Corpus:
    """One corpus as the model's tokenizer cuts it.

    Raises UsageError where it lacks the split, or the tokenizer of the model that is held against cuts it otherwise.
    """
    found = sources.read(
        spec,
        task,
        columns=asked.columns,
        validation_fraction=0,
        test_fraction=asked.test_fraction,
        seed=asked.split_seed,
    )
    chosen = getattr(found, asked.split)
    if not chosen:
        there = ", ".join(name for name in sources.SPLITS if getattr(found, name))
        remedy = ", and --test-fraction 0.1 holds some of it out" if asked.split == "test" else ""
        raise UsageError(f"data {spec!r} has no {asked.split} split: there is {there}; --split names it{remedy}")
    if labels is not None:
        _number(chosen, found.labels or [], labels, spec)
    # as if it were all there is: the rows of other splits need no tokenising
    only = sources.Rows(chosen, [], [], found.kind, labels=found.labels)
    cut = {
        name: load_splits(spec, task, tokenizer, max_length=window, rows=only) for name, tokenizer in tokenizers.items()
    }
    mine = cut["model"]
    if "against" in cut:
        _check_same(asked, tokenizers, mine.train, cut["against"].train)
    rows = mine.train
    if asked.rows is not None and asked.rows < len(rows):
        rows = rows.select([number * len(rows) // asked.rows for number in range(asked.rows)])
    report = mine.report["train"]
    notes = [f"held out for {line}" for line in found.held_out] + mine.report["notes"]
    if report["truncated_rows"]:
        notes.append(f"{report['truncated_rows']:,} rows were cut, {report['lost_tokens']:,} tokens lost")
    if report["dropped_rows"]:
        notes.append(f"{report['dropped_rows']:,} rows with nothing to predict left out")
    if window < asked.max_length:
        notes.append(f"rows of {window} tokens, which is all that the model can see, not {asked.max_length}")
    facts = {
        "data": spec,
        "split": asked.split,
        "rows": len(rows),
        "of_rows": len(mine.train),
        "documents": len(set(rows.documents if isinstance(rows, Images) else rows["document"])),
        "notes": notes,
    }
    return Corpus(spec, rows, mine.pad_token_id, facts)


def _number(rows: list[sources.Row], ours: list[str], theirs: list[str], spec: str) -> None:
    """Give each row the model's number of its label, by the label's name or, where it is a number, by itself."""
    numbers = {name: number for number, name in enumerate(theirs)}
    numbers |= {str(number): number for number in range(len(theirs)) if str(number) not in numbers}
    for name in ours:
        if name not in numbers:
            raise UsageError(f"data {spec!r} has the label {name!r}, which the model does not know: it knows {theirs}")
    for row in rows:
        row["label"] = numbers[ours[row["label"]]]


def _check_same(asked: Request, tokenizers: dict[str, Any], mine: Dataset, theirs: Dataset) -> None:
    """Refuse two models that do not predict the same tokens."""
    if "pixel_values" in mine.column_names:
        pixels = [rows[0]["pixel_values"] for rows in (mine, theirs)]
        if pixels[0].shape == pixels[1].shape and bool((pixels[0] == pixels[1]).all()):
            return
        raise UsageError(
            f"{asked.model!r} and {asked.against!r} prepare images in different ways, so their predictions are of "
            "different images: give --against a model with the same image processor"
        )
    same_words = tokenizers["model"].get_vocab() == tokenizers["against"].get_vocab()
    if same_words and mine.data.table.equals(theirs.data.table):
        return
    raise UsageError(
        f"{asked.model!r} and {asked.against!r} have different tokenizers, so a token of one is not a token of the "
        "other: give --against a model with the same tokenizer"
    )


# --- what was lost ----------------------------------------------------------------------------------------------------


def compare(model: nn.Module, against: nn.Module | None, corpus: Corpus, task: str, batch_size: int) -> Json:
    """Metrics of a model on a corpus and, where there is one, of the model that it is held against.

    Returns:
        `model` and `against`: what `evaluate` finds, without the documents. And of the comparison: `agreement`, the
        share of tokens (rows, for classes) with the same likeliest answer; `kl`, KL(against ‖ model) in nats, their
        mean; `difference` of "loss", and "accuracy" where there is one, with its interval; `collapsed`, whether the
        perplexity is twice as large or more.
    """
    rows, apart = measured(model, against, corpus, batch_size)
    metrics = [evaluate.summarise(each, task) for each in rows]
    found: Json = {"model": _brief(metrics[0])}
    if against is None:
        return found
    mine, theirs = metrics
    tables = [mine["per_document"], theirs["per_document"]]
    difference = {}
    if task != "causal-lm":
        right = [[[1 - wrong, 1] for wrong, _ in table] for table in tables]
        difference["accuracy"] = _difference(right[0], right[1], higher_is_better=True)
        tables = [[[nats, 1] for _, _, nats, _, _ in each] for each in rows]
    difference["loss"] = _difference(tables[0], tables[1])
    return found | {
        "against": _brief(theirs),
        **apart,
        "difference": difference,
        "collapsed": task == "causal-lm" and not mine["loss"] < theirs["loss"] + COLLAPSED,  # NaN is
    }


def measured(
    model: nn.Module, against: nn.Module | None, corpus: Corpus, batch_size: int
) -> tuple[list[list[tuple[int, int, float, int, int]]], Json]:
    """Each model's rows as `evaluate.summarise` takes them, and, where there are two models, `agreement` and `kl`."""
    both = [model] if against is None else [model, against]
    batches = evaluate.over_batches(
        measure_batch, both, corpus.rows, batch_size, range(len(corpus.rows)), corpus.pad_token_id
    )
    found: list[list[tuple[int, int, float, int, int]]] = [[] for _ in both]
    apart: list[tuple[int, int, int, float]] = []
    for rows, far in batches:
        for all_rows, some in zip(found, rows, strict=True):
            all_rows += some
        apart += far
    found = [sorted(each) for each in found]
    if against is None:
        return found, {}
    positions = sum(each[1] for each in apart)
    agreement = sum(each[2] for each in apart) / positions
    return found, {"agreement": agreement, "kl": _finite(math.fsum(each[3] for each in sorted(apart)) / positions)}


def measure_batch(
    rows: Sequence[int], documents: list[int], labels: torch.Tensor, *logits: torch.Tensor
) -> tuple[list[list[tuple[int, int, float, int, int]]], list[tuple[int, int, int, float]]]:
    """Of one batch: what `evaluate` measures, for each model, and (row, tokens, agreed, Σ nats) of the two."""
    if len(logits) == 2 and logits[0].shape != logits[1].shape:
        sizes = [each.shape[-1] for each in logits]
        raise UsageError(
            f"the model predicts one of {sizes[0]} tokens and the one that it is held against one of {sizes[1]}: "
            "their predictions cannot be compared"
        )
    each = [evaluate.measure_batch(rows, documents, labels, one) for one in logits]
    apart = []
    for place, row in enumerate(rows if len(logits) == 2 else ()):  # a row at a time: float32 copies stay small
        if labels.dim() == 1:  # classes
            model, against = (one[place, None] for one in logits)
        else:
            counted = labels[place, 1:] != IGNORED
            model, against = (one[place, :-1][counted] for one in logits)
        apart.append((row, len(model), *divergence(against, model)))
    return each, apart


def divergence(against: torch.Tensor, model: torch.Tensor) -> tuple[int, float]:
    """Of logits (positions, words): how often the likeliest word is the same, and Σ KL(against ‖ model) in nats."""
    import torch

    agreed = int((against.argmax(-1) == model.argmax(-1)).sum())
    p, q = (logits.float().log_softmax(-1) for logits in (against, model))
    share = p.exp()
    each = torch.where(share == 0, 0.0, share * (p - q)).sum(-1)
    return agreed, float(each.double().sum())


def _brief(metrics: Json) -> Json:
    """Metrics without each document's share."""
    return {name: _finite(value) for name, value in metrics.items() if name != "per_document"}


def _finite(value: float) -> float | None:
    """None for what JSON does not know, such as a wreck's loss."""
    return value if math.isfinite(value) else None


def _difference(mine: list[list[float]], theirs: list[list[float]], higher_is_better: bool = False) -> Json | None:
    """The model's score less that of the other, with its interval; None where either is not finite."""
    if not all(math.isfinite(total) for total, _ in (*mine, *theirs)):
        return None
    runs = {"model": {0: mine}, "against": {0: theirs}}
    pair = ranking.rank(runs, higher_is_better=higher_is_better).pair("model", "against")
    alone = len(mine) < 2  # one document has no spread
    return {
        "value": pair.difference,
        "low": None if alone else pair.low,
        "high": None if alone else pair.high,
        "better": pair.better,
        "level": ranking.LEVEL,
        "units": len(mine),
    }


# --- other people's benchmarks ----------------------------------------------------------------------------------------


def _lm_eval(task: str) -> Callable[[Base, Sequence[str], int], Json]:
    """lm-eval as a function: (base, tasks, batch size) → task → metric → number."""
    if task != "causal-lm":
        raise UsageError("--tasks are for language models, and this model is a classifier")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise WeftError('--tasks needs lm-eval; install it with pip install "weft[evaluation]"') from error

    def measure(base: Base, tasks: Sequence[str], batch_size: int) -> Json:
        model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(model=model, tasks=list(tasks))["results"]
        return {
            task: {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
            for task, found in results.items()
        }

    return measure
