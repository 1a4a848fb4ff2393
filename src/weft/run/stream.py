"""Tasks trained one after another with one method: `weft adapt --stream` without the command line.

Each task is a run of `weft adapt` in a folder of its own, on the model in whose weights all tasks before it are:

    run.yaml, tasks.yaml    everything that was asked for; the two repeat the stream
    start.json              every task's scores before any training
    tasks/1-NAME/           the run of the first task: its adapter, metrics and result, and when it has ended
        head.safetensors    the task's own head, for classification
        merged/             the model with this task in its weights, without a head; only the newest is kept
        scores.json         every task's scores after this one
    stream.json             the matrix of scores and what follows from it

A file that is there is whole, and what it tells of is not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError, nearest
from weft.files import whole_file, whole_folder, write_text
from weft.run import adapt

if TYPE_CHECKING:
    from weft.run.adapt import Request
    from weft.run.data import Splits
    from weft.run.models import Base
    from weft.run.sources import Rows

TASKS_FILE = "tasks.yaml"
START_FILE = "start.json"
SCORES_FILE = "scores.json"
HEAD_FILE = "head.safetensors"
MERGED = "merged"
RESULT_FILE = "stream.json"

# Options of weft adapt that are the stream's: one model, taken on by one method.
_OF_THE_STREAM = frozenset(("model", "method", "optimizer", "output", "bf16"))
# Where a task's rows are; without an entry's own, those of another task would be taken for them.
_ROWS = frozenset(("data", "validation_data", "test_data"))

Say = Callable[[str], None]
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """One task: its name, and the run that trains it on the model from before the stream."""

    name: str
    run: Request
    rows: Rows

    @property
    def folder(self) -> Path:
        """Where its run is written."""
        return Path(str(self.run.options.output))

    @property
    def split(self) -> str:
        """The split that it is scored on."""
        return "test" if self.rows.test else "validation"


@dataclass(frozen=True)
class Stream:
    """Tasks in their order, checked against everything but the model's weights."""

    tasks: tuple[Task, ...]
    output: Path

    @property
    def first(self) -> Request:
        """The first task's run, which has what all have in common."""
        return self.tasks[0].run

    @property
    def kind(self) -> str:
        """What all tasks are: causal-lm or classification."""
        return self.tasks[0].rows.task

    @property
    def metric(self) -> str:
        """What the matrix holds."""
        return "loss" if self.kind == "causal-lm" else "accuracy"

    def resolved(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The keys of the run file, and those of each task, with their values; defaults and the recipe included."""
        each = [task.run.resolved() for task in self.tasks]
        own = _task_keys()
        common = {key: value for key, value in each[0].items() if key not in own}
        entries = [
            {"name": task.name, **{key: value for key, value in run.items() if key in own and value is not None}}
            for task, run in zip(self.tasks, each)
        ]
        return {**common, "output": str(self.output)}, entries


def _task_keys() -> list[str]:
    """The options of weft adapt that a task can have for itself."""
    return [option.name for option in adapt.run_options() if option.name not in _OF_THE_STREAM]


# --- what was asked for -----------------------------------------------------------------------------------------------


def read_tasks(path: str) -> list[dict[str, Any]]:
    """The entries of a file of tasks, each with its name. Raises UsageError for what is no such file."""
    keys = adapt.read_run_file(path)
    for key in keys:
        if key != "tasks":
            raise UsageError(f"stream {path!r} has the key {key!r}: it holds tasks, a list, and nothing beside it")
    entries = keys.get("tasks")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"stream {path!r} holds tasks, a list with a name and the options of each")
    if len(entries) < 2:
        raise UsageError(f"stream {path!r} has {len(entries)} tasks, and a stream takes two at least: see weft adapt")
    known = ["name", *_task_keys()]
    names: set[str] = set()
    for number, entry in enumerate(entries, 1):
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(
                f"stream {path!r}, task {number}, has the name {name!r}: use letters, digits, _, - and ."
            )
        if name in names:
            raise UsageError(f"stream {path!r} has two tasks of the name {name!r}")
        names.add(name)
        for key in entry:
            if key in _OF_THE_STREAM:
                raise UsageError(f"stream {path!r}, task {name!r}: {key} is one for all tasks; give it beside --stream")
            if key not in known:
                raise UsageError(
                    f"stream {path!r}, task {name!r}, has the unknown key {key!r}: {nearest(str(key), known)}; options "
                    "of the method are given beside --stream"
                )
        if not entry.get("data"):
            raise UsageError(f"stream {path!r}, task {name!r}: data is missing")
    return entries


def request(given: dict[str, Any], path: str) -> Stream:
    """Check a stream before any work: options by key of a run file, and the file of its tasks.

    What an entry does not say is as `given`. Task n is trained with the seed of the first plus n − 1, so that fresh
    adapters differ. Reads all rows, and matches modules on a model without weights.

    Raises UsageError for whatever is wrong with any task, by its name.
    """
    for key in sorted(_ROWS):
        if given.get(key):
            raise UsageError(f"--{key.replace('_', '-')} does not go with --stream: each task names its own")
    entries = read_tasks(path)
    _check_method(adapt.request({**given, "data": entries[0]["data"]}))
    output = Path(str(given.get("output") or ""))
    tasks = []
    for number, entry in enumerate(entries):
        name = entry["name"]
        own = {key: value for key, value in entry.items() if key != "name" and value is not None}
        folder = output / "tasks" / f"{number + 1}-{name}"
        try:
            run = adapt.request({**given, **own, "output": str(folder)})
            if "seed" not in own:
                seed = run.settings.seed + number
                run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, seed=seed))
            rows = adapt.read_rows(run.options)
        except UsageError as error:
            raise UsageError(f"task {name!r}: {error}") from error
        if rows.kind == "captioned":
            raise UsageError(f"task {name!r} is text-to-image, and the tasks of a stream are text or classification")
        if not rows.test and not rows.validation:
            raise UsageError(f"task {name!r} has neither a test nor a validation split to be scored on")
        if rows.task in ("segmentation", "verification"):
            raise UsageError(f"task {name!r} is {rows.task}, of which there are no streams: use weft adapt for each")
        if tasks and rows.task != tasks[0].rows.task:
            raise UsageError(
                f"task {name!r} is {rows.task} and task {tasks[0].name!r} {tasks[0].rows.task}: the tasks of a stream "
                "are of one kind; task: causal-lm trains on the text of data that have labels"
            )
        tasks.append(Task(name, run, rows))
    return Stream(tuple(tasks), output)


def _check_method(run: Request) -> None:
    """Raise UsageError where a method has nothing to hand on to the next task."""
    name = run.method.name
    if run.method.trains == "base":
        raise UsageError("method base trains nothing, so no task would leave a trace: use an adapter, full or head")
    if run.method.weights is not None:
        raise UsageError(
            f"method {name} trains the weights in another form, on which no next task starts: use an adapter or full"
        )
    if getattr(run.method.config, "history", False):
        raise UsageError("history keeps tasks beside the weights, and a stream merges them: see weft.next_task")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a stream runs in one process: launch it without accelerate")


# --- where it is written ----------------------------------------------------------------------------------------------


def settle_output(stream: Stream, resume: bool | None) -> None:
    """Go on from what lies in the output folder, or start over, as `adapt.settle_output` does; write the two files.

    Raises UsageError where the folder holds something else, or this stream, finished.
    """
    import yaml

    output = stream.output
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {str(output)!r} is a file, not a folder")
    now = _as_written(stream)
    before = {name: output / name for name in (adapt.RUN_FILE, TASKS_FILE)}
    if resume is False:
        shutil.rmtree(output / "tasks", ignore_errors=True)
        for name in (START_FILE, RESULT_FILE):
            (output / name).unlink(missing_ok=True)
    elif all(path.exists() for path in before.values()):
        then = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in before.items()}
        _check_same(output, then, now)
        if resume is None and (output / RESULT_FILE).exists():
            raise UsageError(
                f"output folder {str(output)!r} holds this stream, finished; name a new folder, or start over with "
                "--no-resume"
            )
    elif output.is_dir() and [path for path in output.iterdir() if path.name != adapt.RUN_FILE and path.name[0] != "."]:
        raise UsageError(f"output folder {str(output)!r} holds other files; name a new one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULT_FILE).unlink(missing_ok=True)
        for name, content in now.items():
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            write_text(output / name, text)
    except OSError as error:
        raise WeftError(f"output folder {str(output)!r} cannot be written: {error.strerror or error}") from error


def _as_written(stream: Stream) -> dict[str, Any]:
    run, tasks = stream.resolved()
    return {adapt.RUN_FILE: run, TASKS_FILE: {"tasks": tasks}}


def _check_same(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError that names the first difference between two streams, of those that change what comes out."""
    then_tasks, now_tasks = before[TASKS_FILE]["tasks"], now[TASKS_FILE]["tasks"]
    names = [[task["name"] for task in tasks] for tasks in (then_tasks, now_tasks)]
    if names[0] != names[1]:
        raise UsageError(
            f"output folder {str(output)!r} holds a stream of the tasks {', '.join(names[0])}, not "
            f"{', '.join(names[1])}; name a new folder, or start over with --no-resume"
        )
    pairs = [("", before[adapt.RUN_FILE], now[adapt.RUN_FILE])]
    pairs += [(f"task {name!r} with ", *both) for name, *both in zip(names[0], then_tasks, now_tasks)]
    for of, then, wanted in pairs:
        for key in [*wanted, *then]:
            if key not in adapt.WITHOUT_CONSEQUENCE and then.get(key) != wanted.get(key):
                raise UsageError(
                    f"output folder {str(output)!r} holds a stream with {of}{key}={then.get(key)!r}, not "
                    f"{wanted.get(key)!r}; name a new folder, or start over with --no-resume"
                )


# --- the stream itself ------------------------------------------------------------------------------------------------


def run_stream(stream: Stream, say: Say) -> dict[str, Any]:
    """Train, merge and score task after task, from wherever the output folder stands; what stream.json says."""
    tokens = _Tokens(stream)
    started = stream.output / START_FILE
    if not started.exists():
        say(f"scores of {len(stream.tasks)} tasks before any training")
        _write_json(started, _score_all(stream, 0, tokens, say))
    for number, task in enumerate(stream.tasks, 1):
        done = (task.folder / SCORES_FILE).exists()
        say(f"task {number} of {len(stream.tasks)}, {task.name}" + (": done" if done else ""))
        if not done:
            options = dataclasses.replace(task.run.options, model=_model_after(stream, number - 1))
            adapt.settled(dataclasses.replace(task.run, options=options), task.rows, say)
            _merge(stream, number)
            _write_json(task.folder / SCORES_FILE, _score_all(stream, number, tokens, say))
        _tidy(stream, number)
    found = _result(stream)
    _write_json(stream.output / RESULT_FILE, found)
    return found


def _model_after(stream: Stream, number: int) -> str:
    """The model with the first `number` tasks in its weights."""
    return str(stream.tasks[number - 1].folder / MERGED) if number else str(stream.first.options.model)


def _merge(stream: Stream, number: int) -> None:
    """Write the model with one task more in its weights, in float32, and that task's head; whole, or not at all."""
    from weft.adapters._tasks import merge_task
    from weft.run import models
    from weft.run.predict import load_adapted

    task = stream.tasks[number - 1]
    if (task.folder / MERGED).exists():
        return
    trained = load_adapted(_model_after(stream, number - 1), task.folder)
    model = merge_task(trained.model) if stream.first.method.config is not None else trained.model
    base, body = str(stream.first.options.model), model
    if stream.kind != "causal-lm":
        body = _body(model)
        if body is not model:
            _write_head(model, task.folder / HEAD_FILE)
        else:  # the templates are the task's, and the next one has its own, or those of the model
            model.config.weft_prompts = getattr(models.load_config(base), "weft_prompts", None)
    with whole_folder(task.folder / MERGED) as folder:
        body.save_pretrained(str(folder))
        trained.tokenizer.save_pretrained(str(folder))
        models.keep_attention(base, folder)


def _tidy(stream: Stream, number: int) -> None:
    """Remove what nothing needs once a task has its scores: checkpoints, and models that a newer one has followed."""
    from weft.run import checkpoints

    folder = stream.tasks[number - 1].folder
    checkpoints.drop_all(folder)
    if stream.first.method.config is None:  # the run's whole model, whose weights are those in merged
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
    for before in stream.tasks[: number - 1]:
        checkpoints.remove(before.folder / MERGED)


def _body(model: Any) -> Any:
    """A classifier without its head; all of a model that goes by the names of classes."""
    from weft.run.dual import DualEncoder

    return model if isinstance(model, DualEncoder) else getattr(model, model.base_model_prefix)


def _head(model: Any) -> dict[str, Any]:
    """What a classifier has beside its body, by name: nothing of it is in the merged model."""
    if _body(model) is model:
        return {}
    return {k: t for k, t in model.state_dict().items() if not k.startswith(f"{model.base_model_prefix}.")}


def _write_head(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        save_file({k: t.contiguous().cpu() for k, t in _head(model).items()}, str(partial), metadata={"format": "pt"})


def load_model(output: str | Path, task: str) -> Base:
    """The model that a stream has come to, for one of its tasks, with the head that this task was trained with.

    Args:
        output: the stream's folder.
        task: a task's name; it has been trained.

    Raises UsageError where the folder holds no stream, or no such task yet.
    """
    folder = Path(output)
    if not (folder / adapt.RUN_FILE).exists() or not (folder / TASKS_FILE).exists():
        raise UsageError(f"{str(folder)!r} holds no stream: {TASKS_FILE} is not there")
    names = [entry["name"] for entry in read_tasks(str(folder / TASKS_FILE))]
    places = [folder / "tasks" / f"{number}-{name}" for number, name in enumerate(names, 1)]
    merged = [place for place in places if (place / MERGED).exists()]
    if task not in names:
        raise UsageError(f"the stream in {str(folder)!r} has no task {task!r}: {nearest(task, names)}")
    own = places[names.index(task)]
    if not merged or places.index(merged[-1]) < places.index(own):
        raise UsageError(f"the stream in {str(folder)!r} has not come to task {task!r} yet")
    kind = json.loads((folder / START_FILE).read_text(encoding="utf-8"))["kind"]
    facts = {file: _read_json(own / file) for file in (adapt.LABELS_FILE, adapt.PROMPTS_FILE) if (own / file).exists()}
    told = {"labels": facts.get(adapt.LABELS_FILE), "prompts": facts.get(adapt.PROMPTS_FILE)}
    return _assembled(str(merged[-1] / MERGED), kind, head=own / HEAD_FILE, **told)


def _assembled(spec: str, kind: str, *, head: Path | None, **loading: Any) -> Base:
    """A model for a task: body and, of classifiers, its own head; without one, the fresh head of a seed."""
    from safetensors.torch import load_file

    from weft.run import models

    base = models.load_base(spec, kind, **loading)
    if kind != "causal-lm" and head is not None and (own := _head(base.model)):
        tensors = load_file(str(head))
        if tensors.keys() != own.keys():
            raise WeftError(f"{head} does not hold the head of a {type(base.model).__name__}")
        base.model.load_state_dict(tensors, strict=False)
    return base


# --- scores -----------------------------------------------------------------------------------------------------------


class _Tokens:
    """The tokenizer or image processor, and each task's rows as it prepares them: they stay the same all through."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    @functools.cached_property
    def tokenizer(self) -> Any:
        from weft.run import data

        return data.load_reader(str(self.stream.first.options.model), self.stream.tasks[0].rows)

    @functools.cached_property
    def splits(self) -> dict[str, Splits]:
        from weft.run import data

        return {
            task.name: data.load_splits(
                str(task.run.options.data), self.stream.kind, self.tokenizer, rows=task.rows,
                max_length=adapt.window_of(task.run, task.rows, lambda text: None),
            )
            for task in self.stream.tasks
        }  # fmt: skip


def _score_all(stream: Stream, number: int, tokens: _Tokens, say: Say) -> dict[str, Any]:
    """Every task's scores by the model with `number` tasks in its weights.

    A task that was trained has its head; one that was not has the head that its training will start from.
    """
    import torch

    from weft.run import models
    from weft.run.evaluate import evaluate

    spec, found = _model_after(stream, number), {}
    settings = stream.first.settings
    low = settings.bf16 and stream.first.method.config is not None
    loading: dict[str, Any] = {"dtype": torch.bfloat16 if low else torch.float32, "tokenizer": tokens.tokenizer}
    base = None
    for place, task in enumerate(stream.tasks):
        if base is None or stream.kind != "causal-lm":
            head = task.folder / HEAD_FILE if place < number else None
            labelled = {"labels": task.rows.labels, "seed": task.run.settings.seed, "prompts": task.run.options.prompts}
            base = _assembled(spec, stream.kind, head=head, **labelled, **loading)
            base.model.to(models.device())
        splits = tokens.splits[task.name]
        size = task.run.settings.eval_batch_size or task.run.settings.batch_size
        metrics = evaluate(
            base.model, getattr(splits, task.split), stream.kind, size,
            pad_token_id=splits.pad_token_id, bf16=settings.bf16,
        )  # fmt: skip
        if not math.isfinite(metrics["loss"]):
            raise WeftError(f"the loss on task {task.name!r} is {metrics['loss']} after {number} tasks")
        found[task.name] = {k: v for k, v in metrics.items() if k != "per_document"}
    say(f"  {stream.metric}: " + ", ".join(f"{name} {each[stream.metric]:.4f}" for name, each in found.items()))
    return {"kind": stream.kind, "scores": found}


def _result(stream: Stream) -> dict[str, Any]:
    files = [stream.output / START_FILE, *(task.folder / SCORES_FILE for task in stream.tasks)]
    rows = [_read_json(file)["scores"] for file in files]
    names = [task.name for task in stream.tasks]
    matrix = [[row[name][stream.metric] for name in names] for row in rows]
    facts = {task.name: _read_json(task.folder / adapt.RESULT_FILE) for task in stream.tasks}
    kept = ("trainable", "steps", "seconds", "file_bytes", "ranks")
    return {
        "method": stream.first.method.name,
        "model": stream.first.options.model,
        "kind": stream.kind,
        "metric": stream.metric,
        "tasks": names,
        "splits": [task.split for task in stream.tasks],
        "matrix": matrix,
        **summary(matrix, higher=stream.metric == "accuracy"),
        "scores": rows,
        "runs": {name: {key: each[key] for key in kept} for name, each in facts.items()},
    }


def summary(matrix: Sequence[Sequence[float]], higher: bool) -> dict[str, Any]:
    """What a matrix of scores says: row 0 is before any training, row i after task i, column j is task j.

    `higher` says whether more is better. Scores stay scores; transfers count what was gained, forgetting what was lost,
    whichever way the scores run:

        learned            mean over j of R[j][j]
        last               mean over j of R[T][j]
        average            mean over i ≥ 1 of the mean over j ≤ i of R[i][j]
        forgetting         mean over j < T of the best R[i][j], j ≤ i < T, less R[T][j]; by task in `forgotten`
        backward_transfer  mean over j < T of R[T][j] − R[j][j]
        forward_transfer   mean over j ≥ 2 of R[j−1][j] − R[0][j]

    >>> found = summary([[0.5, 0.5], [0.9, 0.6], [0.7, 0.8]], higher=True)
    >>> [f"{found[name]:.2f}" for name in ("learned", "last", "forgetting", "forward_transfer")]
    ['0.85', '0.75', '0.20', '0.10']
    """
    sign = 1.0 if higher else -1.0
    gain = [[sign * score for score in row] for row in matrix]  # more is better
    last, count = len(gain) - 1, len(gain[0])
    forgotten = [max(gain[i][j] for i in range(j + 1, last)) - gain[last][j] for j in range(count - 1)]
    return {
        "learned": _mean([matrix[j + 1][j] for j in range(count)]),
        "last": _mean(matrix[last]),
        "average": _mean([_mean(matrix[i][:i]) for i in range(1, last + 1)]),
        "forgetting": _mean(forgotten),
        "backward_transfer": _mean([gain[last][j] - gain[j + 1][j] for j in range(count - 1)]),
        "forward_transfer": _mean([gain[j][j] - gain[0][j] for j in range(1, count)]),
        "forgotten": forgotten,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeftError(f"{path} cannot be read: {error}; start over with --no-resume") from error


def _write_json(path: Path, value: Any) -> None:

    write_text(path, json.dumps(value, indent=1) + "\n")
