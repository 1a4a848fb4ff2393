"""One adaptation from its options to its result: `weft adapt` without the command line.

The fields of `AdaptOptions` and `TrainSettings` and the method's own options, side by side, are the keys of a run file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError, nearest
from weft.files import PARTIAL, write_text
from weft.run import options as _options
from weft.run.settings import TrainSettings

if TYPE_CHECKING:
    from weft.run.methods import Method
    from weft.run.models import Base
    from weft.run.sources import Rows
    from weft.run.train import Teach

_TASKS = (
    *("auto", "causal-lm", "classification", "image-classification", "few-shot"),
    *("segmentation", "verification", "text-to-image"),
)
RUN_FILE = "run.yaml"
RESULT_FILE = "result.json"
LABELS_FILE = "labels.json"
PROMPTS_FILE = "prompts.json"  # the templates of a dual encoder's classes

# Settings that change what is shown or written along the way, not what comes out: a resumed run may change them.
WITHOUT_CONSEQUENCE = frozenset(
    ("output", "logging_steps", "eval_steps", "save_steps", "eval_batch_size", "report_to", "loader_workers")
)


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class AdaptOptions:
    """What to adapt to what."""

    model: str | None = _option(
        None, "a model on the hub, a folder, or builtin:pycode|vit; config:NAME for its config with random weights"
    )
    data: str | None = _option(
        None,
        "a .txt .jsonl .csv .tsv .parquet file (also .gz), a folder, a hub data set, or builtin:stdlib|pydocs; for "
        "images a folder of them, a .npz file, or builtin:digits|digits-shifted; for segmentation images/ and masks/",
    )
    method: str | None = _option(
        None, "a method of `weft methods`, PEFT's own as peft:lora, or base, head, full; auto: what measured best"
    )
    optimizer: str | None = _option(
        None,
        "steps full training or PEFT's own method: a name of `weft methods --pillar optim`, or HF Trainer's as "
        "hf:adafactor; none takes AdamW",
    )
    output: str | None = _option(None, "folder for the adapter, checkpoints, metrics and the run file")
    task: str = _option(
        "auto",
        "causal-lm, classification, image-classification, few-shot (of images), segmentation, verification (are two "
        "images of one person?), text-to-image, or auto: by what the data holds",
    )
    shots: int | None = _option(None, "training images a class, for few-shot; none takes 5")
    margin_loss: str | None = _option(
        None, "for verification, how training identities are kept apart: cosface or arcface; none takes cosface"
    )
    margin: float | None = _option(
        None, "by how much: of the cosine for cosface, none takes 0.4; of the angle for arcface, none takes 0.5 radians"
    )
    margin_scale: float | None = _option(
        None, "factor of the cosines in the loss; none takes 64, and few images want less, 16 say"
    )
    mirror: bool = _option(False, "for verification, average each embedding with that of the mirror image")
    columns: dict[str, str] | None = _option(None, "where columns have other names: text=sentence,label=polarity")
    validation_data: str | None = _option(None, "where the validation rows are, if not in the data")
    test_data: str | None = _option(None, "where the test rows are, if not in the data")
    validation_fraction: float = _option(0.1, "share of the training rows held out where there is no validation split")
    test_fraction: float = _option(0.0, "share of the training rows held out where there is no test split; 0: none")
    split_seed: int = _option(0, "draws the held-out rows, and the shots")
    prompt_template: str | None = _option(
        None,
        "what a dual encoder such as CLIP reads of a class, 'a photo of a {}.' by default, several between |; '' puts "
        "a head on its vision side instead",
    )

    @property
    def prompts(self) -> list[str] | None:
        """The templates, one by one; none at all for a head, None where nobody says."""
        from weft.run import dual

        return dual.prompts_of(self.prompt_template)


@dataclass(frozen=True)
class Request:
    """Everything a run was asked to do, checked against everything but the model and the data."""

    options: AdaptOptions
    settings: TrainSettings
    method: Method

    def resolved(self) -> dict[str, Any]:
        """Every key of the run file with its value, defaults and the method's recipe included."""
        run = {**vars(self.options), **vars(self.settings.with_recipe(self.method))}
        names = method_keys_of(self.method.name)
        return _plain({**run, **{names[own]: value for own, value in _method_values(self.method).items()}})


def run_options() -> list[_options.Option]:
    """The options of every run, whatever the method."""
    return _options.from_config(AdaptOptions) + _options.from_config(TrainSettings)


def method_keys_of(name: str) -> dict[str, str]:
    """Method option → its key in run files; where a run has an option of that name, the method's name goes before."""
    from weft.run.methods import method_options, parts

    taken = {option.name for option in run_options()}
    trains, optimizer = parts(name)
    own = {option.name for option in method_options(trains)}
    names = [option.name for option in method_options(name)]
    whose = {each: trains.removeprefix("peft:") if each in own else optimizer for each in names}
    return {each: f"{whose[each]}_{each}" if each in taken else each for each in names}


def _method_values(method: Method) -> dict[str, Any]:
    """The value of each of the method's options: what was given, or what the config settled on."""
    from weft.run.methods import OF_THE_RUN, method_options, optimizer_values

    names = [option.name for option in method_options(method.name)]
    config = method.config or method.weights
    settled = {name: getattr(config, name, None) for name in names} | optimizer_values(method)
    return {name: value for name, value in settled.items() if name not in OF_THE_RUN or name in method.options}


def _plain(value: Any) -> Any:
    """A value that YAML writes and reads back as it is: sets and tuples as lists, configs as mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))


def read_run_file(path: str) -> dict[str, Any]:
    """The keys and values of a YAML run file. Raises UsageError where it cannot be read or is no mapping."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"run file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        keys = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"run file {path!r}{where}, is not YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise UsageError(f"run file {path!r} must be a mapping of options to values")
    return keys


def request(given: dict[str, Any]) -> Request:
    """Check everything that was given, by key of a run file, before anything is loaded.

    Raises UsageError for unknown keys, wrong types, values out of range, and what is missing.
    """
    from weft.run import models, verification
    from weft.run.methods import parts, resolve

    for key in ("model", "data", "method"):
        if not given.get(key):
            raise UsageError(f"--{key} is missing: {_help_of(key)}")
    name = given["method"]
    if not isinstance(name, str):
        raise UsageError(f"method must be a name, not {name!r}")
    name = with_optimizer(name, given.get("optimizer"))
    common = {option.name: option for option in run_options()}
    own = {key: option for option, key in method_keys_of(name).items()}
    for key in given:
        if key not in common and key not in own:
            raise UsageError(f"unknown option {key!r} for method {name}: {nearest(key, [*common, *own])}")
    checked = _options.check("weft adapt", list(common.values()), {k: v for k, v in given.items() if k in common})
    checked |= dict(zip(("method", "optimizer"), parts(name)))
    from_scratch = models.from_scratch(str(given["model"]))
    method = resolve(name, {own[key]: value for key, value in given.items() if key in own}, from_scratch=from_scratch)
    settings_names = {entry.name for entry in dataclasses.fields(TrainSettings)}
    settings = TrainSettings(**{key: value for key, value in checked.items() if key in settings_names})
    options = AdaptOptions(**{key: value for key, value in checked.items() if key not in settings_names})
    if options.task not in _TASKS:
        raise UsageError(
            f"unknown task {options.task!r}: {nearest(options.task, _TASKS)}"
        )
    if options.shots is not None and (options.task != "few-shot" or options.shots < 1):
        raise UsageError(f"shots must be at least 1, with --task few-shot, not {options.shots} with {options.task}")
    verification.check(options, name)
    if not 0 < options.validation_fraction < 1:
        raise UsageError(f"validation_fraction must be above 0 and below 1, not {options.validation_fraction}")
    if not 0 <= options.test_fraction < 1:
        raise UsageError(f"test_fraction must be at least 0 and below 1, not {options.test_fraction}")
    _check_reporters(settings.report_to)
    if options.prompt_template is not None:
        from weft.run import dual

        dual.prompts_of(options.prompt_template)
    return Request(options, settings, method)


def with_optimizer(method: str, optimizer: str | None) -> str:
    """One name of a method and its optimiser, which may be given apart."""
    if optimizer is None:
        return method
    if "@" in method:
        raise UsageError(f"method {method!r} names an optimiser, and optimizer={optimizer!r} another one")
    return f"{method}@{optimizer}"


def _help_of(key: str) -> str:
    return next(option.help for option in run_options() if option.name == key)


def _check_reporters(names: tuple[str, ...]) -> None:
    if not names or names == ("none",):
        return
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise UsageError(f"unknown report_to {name!r}: {nearest(name, known)}")
        available = getattr(integration_utils, f"is_{name}_available", None)
        if available is not None and not available():
            raise UsageError(f"report_to {name!r} needs a package that is not installed: pip install {name}")


# --- before the weights -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outline:
    """What a run will touch, known from shapes alone."""

    modules: list[str]
    trainable: int
    total: int
    estimate: Callable[[], dict[str, int]]

    @functools.cached_property
    def memory(self) -> dict[str, int]:
        """Bytes by part, for one process; estimated when it is asked for, since an optimiser's state takes a step."""
        return self.estimate()


def read_rows(options: AdaptOptions) -> Rows:
    """The rows of the data source as the options describe it."""
    from weft.run import models, sources

    return sources.read(
        options.data or "",
        options.task,
        columns=options.columns,
        validation=options.validation_data,
        test=options.test_data,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        seed=options.split_seed,
        classes=models.classes_of(options.model or ""),
        shots=options.shots,
    )


def outline(run: Request, rows: Rows) -> Outline:
    """Match modules and count parameters on a model without weights.

    Raises UsageError where the method does not fit the model: no target, a rank above a matrix's side, a wrong task;
    and where the model does not take such images.
    """
    from weft.run import data, images, methods, models, sources

    skeleton = models.load_base(
        run.options.model or "", rows.task, labels=rows.labels, weights=False, prompts=run.options.prompts
    ).model
    if run.settings.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        kind = type(skeleton).__name__
        raise UsageError(f"gradient_checkpointing is on, and a {kind} cannot recompute activations: leave it out")
    modules = methods.check_fits(run.method, skeleton)
    trainable = methods.count_trainable(run.method, skeleton)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    kept, once = None, 0
    spec = run.options.model or ""
    if rows.kind == "captioned":
        known = data.load_reader(spec, rows)
        kept = _kept_of_image(known.path, skeleton, known.latent, (), (known.tokens, known.states))
    elif rows.kind in sources.OF_IMAGES:
        shape = images.preparer(data.load_reader(spec, rows))(rows.train[0]["image"]).shape
        kept = _kept_of_image(spec, skeleton, shape)
        if rows.kind == "mask":  # scores at the mask's size, and their softmax
            kept += 2 * len(rows.labels or ()) * shape[1] * shape[2]
        read = getattr(skeleton, "class_embeddings", None)
        if read is not None and (run.method.trains == "full" or any(name.startswith("text_") for name in modules)):
            once = _kept(skeleton, read)
    estimate = functools.partial(_memory, run, skeleton, total, trainable, kept, once)
    return Outline(modules, trainable, total, estimate)


def _kept_of_image(spec: str, skeleton: Any, shape: Sequence[int], *others: Sequence[int]) -> int:
    """How many numbers a model keeps of one image for the backward pass; 0 where that needs more than shapes.

    Other inputs than the image, of which `shape` is, go by the shapes of `others`.
    """
    import torch

    see = getattr(skeleton.eval(), "image_embeddings", skeleton)  # of a dual encoder, without the texts
    try:
        return _kept(skeleton, lambda: see(*(torch.empty(1, *each, device="meta") for each in (shape, *others))))
    except NotImplementedError:
        return 0
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise UsageError(
            f"model {spec!r} does not take images of {' x '.join(map(str, shape))} numbers: {reason}"
        ) from error


def _kept(skeleton: Any, forward: Callable[[], Any]) -> int:
    """How many numbers a forward pass keeps for the backward pass, beside the model's own."""
    import torch

    own = {each.untyped_storage()._cdata for each in (*skeleton.parameters(), *skeleton.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def _memory(run: Request, skeleton: Any, total: int, trainable: int, kept: int | None, once: int) -> dict[str, int]:
    """Bytes of weights, training state and activations.

    `kept` is how many numbers a model of images keeps of one, `once` of what it reads of the classes.

    Activations of one decoder layer are about tokens · hidden · 34 bytes at two bytes a number plus what attention
    keeps (Korthikanti et al. 2022, eq. 2, without the score matrix, which fused attention does not store).
    """
    from weft.run.measure import expected_state_bytes

    settings, config = run.settings, skeleton.config
    base_bytes = 2 if settings.bf16 and run.method.config is not None else 4
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(config, "hidden_size", 0)
    layers = getattr(config, "num_hidden_layers", 0)
    tokens = settings.batch_size * settings.max_length
    number = 2 if settings.bf16 else 4
    kept_layers = 1 if settings.gradient_checkpointing else layers
    activations = tokens * hidden * 17 * number * kept_layers
    logits = tokens * getattr(config, "vocab_size", 0) * (4 + number)
    if run.method.optimizer is None:
        training = {"trained weights, gradients and Adam's moments": trainable * 16}
    else:
        name, options = run.method.optimizer
        state = None if name.startswith("hf:") else expected_state_bytes(name, skeleton, **options)
        if state is None:
            training = {f"trained weights and gradients, without the state of {name}": trainable * 8}
        else:
            training = {"trained weights and gradients": trainable * 8, f"state of {name}": state}
    held = {"base weights": total * base_bytes, **training}
    if kept is not None:
        held |= {"activations": kept * settings.batch_size * number}
        return held | ({"activations of the classes' texts": once * number} if once else {})
    return held | {"activations": activations, "logits": logits}


# --- where it is written ----------------------------------------------------------------------------------------------


def settle_output(run: Request, resume: bool | None) -> bool:
    """Whether to go on from what lies in the output folder.

    Args:
        resume: True goes on, False starts over, None goes on exactly if the folder holds the same run, unfinished.

    Raises UsageError where the folder holds something else.
    """
    import yaml

    output = Path(run.options.output or "")
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {str(output)!r} is a file, not a folder")
    run_file = output / RUN_FILE
    if resume is False:
        return False
    others = [path for path in output.iterdir() if not path.name.endswith(PARTIAL)] if output.is_dir() else []
    if others in ([], [run_file]):
        return False  # a run that ended with a refusal left nothing else: any run may begin here
    if run_file not in others:
        if not resume:
            raise UsageError(f"output folder {str(output)!r} holds other files; name a new one")
        return False
    before = yaml.safe_load(run_file.read_text(encoding="utf-8")) or {}
    now = run.resolved()
    for key in [*now, *before]:
        if key not in WITHOUT_CONSEQUENCE and before.get(key) != now.get(key):
            raise UsageError(
                f"output folder {str(output)!r} holds a run with {key}={before.get(key)!r}, not {now.get(key)!r}; "
                "name a new folder, or start over with --no-resume"
            )
    if resume is None and (output / RESULT_FILE).exists():
        raise UsageError(
            f"output folder {str(output)!r} holds this run, finished; name a new folder, or start over with --no-resume"
        )
    return True


def start_output(run: Request, going_on: bool) -> None:
    """Make the folder ready: an old run's files out of the way, the run file in place."""
    import yaml

    from weft.run import checkpoints
    from weft.run.loop import METRICS

    output = Path(run.options.output or "")
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULT_FILE).unlink(missing_ok=True)
    if not going_on:
        checkpoints.drop_all(output)
        (output / METRICS).unlink(missing_ok=True)
    text = yaml.safe_dump(run.resolved(), sort_keys=False, allow_unicode=True)
    write_text(output / RUN_FILE, text)


# --- the run itself ---------------------------------------------------------------------------------------------------


def load(run: Request, rows: Rows, say: Callable[[str], None]) -> tuple[Base, Any]:
    """Make of the rows what the model takes, say what became of them, and load the base model with its weights."""
    import torch

    from weft.run import data, dual, models, verification

    tokenizer = data.load_reader(run.options.model or "", rows)
    window = window_of(run, rows, say)
    splits = data.load_splits(run.options.data or "", rows.task, tokenizer, max_length=window, rows=rows)
    for line in splits.lines():
        say(line)
    low = run.settings.bf16 and run.method.config is not None
    base = models.load_base(
        run.options.model or "",
        rows.task,
        dtype=torch.bfloat16 if low else torch.float32,
        labels=rows.labels,
        seed=run.settings.seed,
        tokenizer=tokenizer,
        prompts=run.options.prompts,
    )
    verification.settle(base.model, run.options)
    if (line := dual.sentence(base.model)) is not None:
        say(line)
    return base, splits


def window_of(run: Request, rows: Rows, say: Callable[[str], None]) -> int:
    """max_length, or the model's own limit where that is smaller; images have no such length."""
    from weft.run.models import position_limit
    from weft.run.sources import OF_IMAGES

    limit = None if rows.kind in OF_IMAGES else position_limit(run.options.model or "")
    if limit is not None and limit < run.settings.max_length:
        say(f"max_length is {limit}, which is all that the model can see, not {run.settings.max_length}")
        return limit
    return run.settings.max_length


def run_adapt(
    run: Request,
    rows: Rows,
    going_on: bool,
    say: Callable[[str], None],
    teach: Teach | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, save the adapter and the final evaluation into the output folder; what the result file says."""
    from weft.run.train import save_result, shared_evaluation, train

    output = Path(run.options.output or "")
    first = int(os.environ.get("RANK", "0")) == 0
    base, splits = load(run, rows, say)
    if first:
        try:
            start_output(run, going_on)
        except OSError as error:
            raise WeftError(f"output folder {str(output)!r} cannot be written: {error.strerror or error}") from error
    progress = progress and first
    result = train(base, splits, run.method, run.settings, output, resume=going_on, progress=progress, teach=teach)
    test = {}
    if len(splits.test):
        test = shared_evaluation(result.model, splits.test, splits, run.settings)
    facts = {
        "method": run.method.name,
        "trainable": result.trainable,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "validation": _short(result.validation),
        "test": _short(test),
        "file_bytes": result.file_bytes,
        "optimizer_bytes": result.optimizer_bytes,
        "ranks": result.ranks,
        "data": splits.report,
    }
    if first:
        if run.method.name != "base":
            save_result(result.model, base.tokenizer, output)
        if splits.labels:
            # identities that were trained on are nothing to tell others by
            classes = [] if splits.task == "verification" else splits.labels
            write_text(output / LABELS_FILE, json.dumps(classes, ensure_ascii=False) + "\n")
        if prompts := getattr(base.model.config, "weft_prompts", None):
            write_text(output / PROMPTS_FILE, json.dumps(prompts, ensure_ascii=False) + "\n")
        write_text(output / RESULT_FILE, json.dumps(facts, indent=1) + "\n")
    return facts


def settled(
    run: Request, rows: Rows, say: Callable[[str], None], teach: Teach | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """What a run found, from its beginning, its newest checkpoint, or its end."""
    done = Path(str(run.options.output)) / RESULT_FILE
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    return run_adapt(run, rows, settle_output(run, None), say, teach, progress)


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "per_document"}
