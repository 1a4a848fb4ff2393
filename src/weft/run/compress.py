"""One compression from its options to a model folder: `weft compress` without the command line.

The fields of `CompressOptions` and the method's own options, side by side, are the keys of a run file. Finished layers
go to a work folder beside the output, which is gone once the output is whole.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft import registry
from weft.errors import UsageError, WeftError, nearest
from weft.files import PARTIAL, whole_folder, write_text
from weft.run import distil, recover
from weft.run import options as _options
from weft.run.adapt import RUN_FILE
from weft.run.card import REPORT_FILE, report_of, write_words

if TYPE_CHECKING:
    import torch

    from weft.compress._config import CompressConfig
    from weft.compress._engine import Observer
    from weft.compress._engine import Row as LayerRow
    from weft.compress._factoriser import Factoriser
    from weft.compress._layers import Unit
    from weft.run.sources import Rows

# Beside the weights and the tokenizer, what a model's folder may hold and needs to be used.
_BESIDE = ("labels.json", "preprocessor_config.json", "processor_config.json")


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class CompressOptions:
    """What to compress, on what data, and where to put it."""

    model: str | None = _option(None, "a model on the hub, a folder, or builtin:pycode")
    method: str | None = _option(None, "a name of `weft methods --pillar compress`")
    output: str | None = _option(None, "new folder for the compressed model")
    data: str | None = _option(
        None,
        "calibration data: a .txt .jsonl .csv .tsv .parquet file (also .gz), a folder, a hub data set, or "
        "builtin:stdlib|pydocs; its training split alone is read",
    )
    mix: dict[str, float] | None = _option(
        None, "further calibration data and what each counts beside the data's 1: builtin:pydocs=0.5"
    )
    columns: dict[str, str] | None = _option(None, "where columns have other names: text=sentence,label=polarity")
    validation_fraction: float = _option(0.1, "share of the training rows left out where there is no validation split")
    test_fraction: float = _option(0.0, "share of the training rows left out where there is no test split")
    split_seed: int = _option(0, "draws the rows that are left out")
    samples: int = _option(128, "calibration sequences, of each data set")
    max_length: int = _option(512, "tokens a sequence at most")
    batch_size: int = _option(8, "sequences at once")
    seed: int = _option(0, "draws the sequences")
    bf16: bool = _option(False, "load and store the model in bfloat16; otherwise in the dtype that it has")
    dense: bool = _option(False, "write the result as a stock model that needs no weft, as large as before")
    train: str | None = _option(
        None,
        "train all of it afterwards: steps=300,learning_rate=1e-4 or minutes=5, and other options of weft adapt; "
        f"by default methods that learn take {distil.DEFAULT}, which {distil.NONE} leaves out",
    )
    then: str | None = _option(
        None,
        "recover afterwards: adapt:METHOD, and options of weft adapt, as adapt:lora_sb,max_steps=200; trains on the "
        "data, and goes into the factors",
    )
    threads: int | None = _option(None, "CPU threads; their number changes the last bits")

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if self.max_length < 2:
            raise UsageError(f"max_length must be at least 2 tokens, not {self.max_length}")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name, weight in (self.mix or {}).items():
            if not weight > 0:
                raise UsageError(f"mix: {name} must count more than 0, not {weight:g}")
            if name == self.data:
                raise UsageError(f"mix: {name} is the data itself, which counts 1")
        if self.mix and not self.data:
            raise UsageError("mix says what further data counts beside the data: give --data as well")

    @property
    def corpora(self) -> dict[str, float]:
        """Every calibration source with its weight."""
        return {self.data: 1.0, **(self.mix or {})} if self.data else {}


@dataclass(frozen=True)
class Request:
    """Everything a compression was asked to do, checked against everything but the model and the data."""

    options: CompressOptions
    method: str
    config: CompressConfig

    @property
    def settings(self) -> dict[str, Any]:
        """The method's options by name."""
        return {entry.name: getattr(self.config, entry.name) for entry in dataclasses.fields(self.config)}

    def resolved(self) -> dict[str, Any]:
        """Every key of the run file with its value, defaults included."""
        keys = method_keys_of(self.method)
        run = {**vars(self.options), **{keys[name]: value for name, value in self.settings.items()}}
        return json.loads(json.dumps(run))  # tuples as lists: what YAML writes and reads back as it is

    @property
    def train(self) -> str | None:
        """How the result is trained; None where it is not."""
        asked = self.options.train or (distil.DEFAULT if distil.learns(self.method) else distil.NONE)
        return None if asked == distil.NONE else asked

    @property
    def output(self) -> Path:
        return Path(self.options.output or "")

    @property
    def work(self) -> Path:
        """The folder of finished layers."""
        return self.output.parent / f"{self.output.name}.work"  # a plan has no output

    def file(self) -> str:
        """The run file's text."""
        import yaml

        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def command(self) -> str:
        """The command that makes this, without what it would do by itself."""
        keys = method_keys_of(self.method)
        defaults = {option.name: option.default for option in run_options()}
        defaults |= {keys[option.name]: option.default for option in _options.from_config(type(self.config))}
        words = ["weft", "compress"]
        for key, value in self.resolved().items():
            if value == json.loads(json.dumps(defaults[key])):
                continue
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", _word(value)]
        return shlex.join(words)


def _word(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, dict):
        return ",".join(
            f"{name}={each:g}" if isinstance(each, float) else f"{name}={each}" for name, each in value.items()
        )
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def run_options() -> list[_options.Option]:
    """The options of every compression, whatever the method."""
    return _options.from_config(CompressOptions)


def method_keys_of(method: str) -> dict[str, str]:
    """Method option → its key in run files; where a run has an option of that name, the method's name goes before."""
    taken = {option.name for option in run_options()}
    names = [entry.name for entry in dataclasses.fields(registry.config_class(_known(method)))]
    return {name: f"{method}_{name}" if name in taken else name for name in names}


def method_options(method: str) -> list[_options.Option]:
    """The options of one method, its own first."""
    return _options.from_config(registry.config_class(_known(method)))


def _known(method: str) -> str:
    """The name, if it is a method of compression."""
    card = registry.cards().get(method)
    if card is not None and card.pillar != "compress":
        raise UsageError(
            f"{method} is a method of the pillar {card.pillar}, not of compression: "
            f"there are {', '.join(sorted(registry.cards('compress')))}"
        )
    return registry.card(method, "compress").slug


def request(given: dict[str, Any]) -> Request:
    """Check everything that was given, by key of a run file, before anything is loaded.

    Raises UsageError for unknown keys, wrong types, values out of range, and what is missing.
    """
    common = run_options()
    for key in ("model", "method"):
        if not given.get(key):
            help_text = next(option.help for option in common if option.name == key)
            raise UsageError(f"--{key} is missing: {help_text}")
    method = given["method"]
    if not isinstance(method, str):
        raise UsageError(f"method must be a name, not {method!r}")
    own = {key: option for option, key in method_keys_of(method).items()}
    names = [option.name for option in common]
    for key in given:
        if key not in names and key not in own:
            raise UsageError(f"unknown option {key!r} for method {method}: {nearest(key, [*names, *own])}")
    options = CompressOptions(**_options.check("weft compress", common, {k: v for k, v in given.items() if k in names}))
    settings = {own[key]: value for key, value in given.items() if key not in names}
    config: Any = registry.config_class(method).from_options(  # type: ignore[attr-defined]
        _options.check(method, method_options(method), settings)
    )
    if not options.data and ("data" in registry.card(method).needs or config.runs_the_model):
        who = method if "data" in registry.card(method).needs else f"allocate={config.allocate}"
        raise UsageError(f"--data is missing: {who} needs calibration data, builtin:stdlib say")
    run = Request(options, method, config)
    if run.train is not None:  # both refuse what cannot work
        distil.request(options, method, run.train, run.work)
    if options.then is not None:
        recover.request(options, run.work)
    return run


# --- before the weights -----------------------------------------------------------------------------------------------


def skeleton(run: Request) -> Any:
    """The model without its weights. Raises UsageError for one that no method can compress."""
    from weft.run import models

    spec = run.options.model or ""
    if (Path(spec).expanduser() / "adapter_config.json").exists():
        raise UsageError(
            f"model {spec!r} is an adapter: make a model of it first, with weft export {spec} NEW --to merged"
        )
    model = models.load_as_saved(spec, bf16=run.options.bf16, weights=False)
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None:
        by = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        word = "compressed" if by == "weft" else "quantised"
        raise UsageError(f"model {spec!r} is {word} by {getattr(by, 'value', by)} already: give the dense model")
    return model


@dataclass(frozen=True)
class Outline:
    """What a compression will touch, known from shapes alone.

    Attributes:
        layers: the targeted ones.
        rows: what each becomes; None where sizes depend on what is yet to be computed.
        needs: the statistics that the method asks for, of any layer.
        left: other weights of two dimensions or more, which stay as they are: embeddings, heads, experts, convolutions.
    """

    layers: Sequence[Unit]
    rows: list[LayerRow] | None
    needs: frozenset[str]
    left: dict[str, torch.Size]
    maker: Factoriser[Any]

    @property
    def reads_data(self) -> bool:
        """Whether calibration data has any influence."""
        return bool(self.needs) or self.maker.config.runs_the_model

    @property
    def reads_loss(self) -> bool:
        """Whether it is the model's own loss that counts, so that rows need labels."""
        return "fisher" in self.needs or self.maker.config.allocate == "sweep"


def outline(run: Request, model: Any) -> Outline:
    """Match layers and choose sizes on a model without weights.

    Raises UsageError where the method does not fit the model, or its result cannot be written as it was asked for.
    """
    from weft.compress._engine import plan
    from weft.compress._factoriser import factoriser

    maker = factoriser(run.method, run.config)
    layers = maker.units(model)
    if run.options.dense and not maker.linear:
        raise UsageError(f"--dense: {run.method} makes layers that are no linear maps, which no stock model can hold")
    odd = next((layer.name for layer in layers if maker.adds_bias(layer)), None)
    if run.options.dense and odd is not None:
        raise UsageError(
            f"--dense: {run.method} gives {odd} a bias, for which {type(model).__name__} has no place; "
            "an option of the method may leave it out (lord: --no-center)"
        )
    parts = [part for layer in layers for part in layer.parts]
    named = {f"{part.name}.weight" for part in parts}
    return Outline(
        layers,
        plan(model, run.method, **run.settings),
        frozenset(need for part in parts for need in maker.needs(part)),
        {name: p.shape for name, p in model.named_parameters() if p.dim() >= 2 and name not in named},
        maker,
    )


@dataclass(frozen=True)
class Calibration:
    """One calibration source, tokenised.

    Attributes:
        batches: what the model is called with.
        tokens: those that are no padding.
        weight: what the source counts beside others.
    """

    batches: list[dict[str, torch.Tensor]]
    sequences: int
    tokens: int
    weight: float


def calibration(run: Request, model: Any, shape: Outline, say: Callable[[str], None]) -> dict[str, Calibration]:
    """Sequences drawn from the training split of every calibration source; nothing where the method reads no data.

    Raises UsageError for data that cannot be read, does not fit the model, or is less than one sequence.
    """
    from weft.run import models

    if not shape.reads_data:
        if run.options.data and run.train is None and run.options.then is None:
            say(f"{run.method} reads no data, so {', '.join(run.options.corpora)} changes nothing")
        return {}
    spec = run.options.model or ""
    if models.task_of(model.config) in models.IMAGE_TASKS:
        raise UsageError(
            f"{run.method} reads data, and {spec!r} classifies images or their pixels, on which weft does not "
            "calibrate: take a method that reads none, such as svd"
        )
    tokenizer = models.load_tokenizer(spec)
    limit = models.position_limit(spec)
    length = min(run.options.max_length, limit or run.options.max_length)
    if length < run.options.max_length:
        say(f"max_length is {length}, which is all that the model can see, not {run.options.max_length}")
    return {
        source: _calibration(run, source, weight, model, shape.reads_loss, tokenizer, length)
        for source, weight in run.options.corpora.items()
    }


def _calibration(
    run: Request, source: str, weight: float, model: Any, graded: bool, tokenizer: Any, length: int
) -> Calibration:
    from weft.run import data, sources

    options = run.options
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    rows = sources.read(
        source,
        "auto" if classifier else "causal-lm",
        columns=options.columns,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        seed=options.split_seed,
    )
    labelled = rows.kind == "classification" or (hasattr(model, "generate") and not classifier)
    if graded and not labelled:
        raise UsageError(
            f"{run.method} needs the model's loss, and {source!r} has no labels for a {type(model).__name__}: "
            "give rows with the columns text and label"
        )
    if rows.kind == "classification":
        _number_as_model(rows, model.config, source)
    found = data.draw(rows, tokenizer, max_length=length, count=options.samples, seed=options.seed)
    tokens = sum(len(row["input_ids"]) for row in found)
    if not found or (rows.kind == "text" and tokens < length and len(found) < options.samples):
        raise UsageError(
            f"calibration data {source!r} has {tokens} tokens to train on, which is less than one sequence of "
            f"{length}: give more text, or a smaller --max-length"
        )
    if not graded and not model.config.is_encoder_decoder:
        for row in found:
            del row["labels"]
    found.sort(key=lambda row: len(row["input_ids"]))  # rows of like length together: little padding
    chunks = [found[start : start + options.batch_size] for start in range(0, len(found), options.batch_size)]
    batches = [data.collate(chunk, tokenizer.pad_token_id or 0) for chunk in chunks]
    return Calibration(batches, len(found), tokens, weight)


def _number_as_model(rows: Rows, config: Any, source: str) -> None:
    """Give the training rows the model's own numbers for their labels, by name."""
    known = {str(name): int(number) for number, name in config.id2label.items()}
    ours = rows.labels or []
    if not set(ours) <= set(known) and all(name.startswith("LABEL_") for name in known):  # a model without names
        known = {name: number for number, name in enumerate(ours)} if len(ours) == len(known) else {}
    if not set(ours) <= set(known):
        raise UsageError(
            f"data {source!r} has the labels {', '.join(ours)}, and the model tells apart "
            f"{', '.join(map(str, config.id2label.values()))}"
        )
    for row in rows.train:
        row["label"] = known[ours[row["label"]]]


# --- where it is written ----------------------------------------------------------------------------------------------


def settle_output(run: Request, resume: bool | None) -> Literal["fresh", "resumed", "finished"]:
    """What the output and its work folder hold of this run; an unfinished one of it goes on.

    Args:
        resume: True insists on going on, False starts over, None goes on exactly if the same run is unfinished.

    Raises UsageError where one of the folders holds something else.
    """
    if not run.options.output:
        raise UsageError("--output is missing: a new folder for the compressed model")
    out, work = run.output, run.work
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {str(out)!r} is a file, not a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / REPORT_FILE).exists():
            raise UsageError(f"output folder {str(out)!r} holds other files; name a new one")
        if work.exists() and _differs(run, out) is None:
            shutil.rmtree(work)  # killed between the last file and here
            return "finished"
        raise UsageError(f"output folder {str(out)!r} holds a compressed model already; name a new one")
    if work.exists() and not work.is_dir():
        raise UsageError(f"{str(work)!r}, the place for unfinished work, is a file")
    if not (work / RUN_FILE).exists():
        if work.is_dir() and any(not path.name.endswith(PARTIAL) for path in work.iterdir()):
            raise UsageError(f"{str(work)!r}, the folder for unfinished work, holds other files; name another output")
        if resume:
            raise UsageError(f"there is no unfinished work in {str(work)!r} to go on with")
        return "fresh"
    if resume is False:
        shutil.rmtree(work)
        return "fresh"
    other = _differs(run, work)
    if other is not None:
        raise UsageError(
            f"{str(work)!r} holds unfinished work with {other}; give the same command again, or start over with "
            "--no-resume"
        )
    return "resumed"


def _differs(run: Request, folder: Path) -> str | None:
    """The first option in which a folder's run is another, in words; finished layers serve any keep and allocation."""
    import yaml

    without_consequence = {"output"}
    if not any((path / REPORT_FILE).exists() for path in (distil.start(folder), recover.compressed(folder))):
        without_consequence |= {"dense", "train", "then"}
        if not run.config.sequential:
            without_consequence |= {"keep", "allocate"}
    elsewhere = folder == run.output  # a finished model: everything counts
    there = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8")) or {}
    here = run.resolved()
    for key in [*here, *there]:
        if there.get(key) != here.get(key) and (key not in without_consequence or (elsewhere and key != "output")):
            return f"{key}={there.get(key)!r}, not {here.get(key)!r}"
    return None


def finished_layers(run: Request) -> int:
    """Layers in the work folder, which no further run computes again."""
    return len(list((run.work / "layers").glob("*.safetensors")))


# --- the run itself ---------------------------------------------------------------------------------------------------


def run_compress(run: Request, shape: Outline, found: dict[str, Calibration], observer: Observer) -> dict[str, Any]:
    """Compress, and write the model's folder, where more follows into the work folder; what its report says.

    Raises WeftError where files cannot be read or written; finished layers stay in the work folder.
    """
    from weft.compress._engine import compress
    from weft.linear._transformers import to_dense
    from weft.run import models

    started = time.monotonic()
    done = finished_layers(run)
    with _kept_work(run):
        model = models.load_as_saved(run.options.model or "", bf16=run.options.bf16).to(models.device())
        made = compress(
            model, run.method, data=batches_of(found), work=run.work / "layers", observer=observer, **run.settings
        )
        more = run.train is not None or run.options.then is not None
        if run.options.dense and not more:
            to_dense(model)
        with whole_folder(distil.start(run.work) if run.train else _before_then(run)) as partial:
            model.save_pretrained(partial)
            _save_tokenizer(run.options.model or "", partial)
            report = report_of(run, shape, made, found, partial, time.monotonic() - started, done)
            write_words(run, report, partial, type(model).__name__)
    if not more:
        shutil.rmtree(run.work)
    return report


def waits(run: Request) -> bool:
    """Whether the layers are all finished, and what follows them is left."""
    return distil.waits(run) or recover.waits(run)


def run_after(run: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, recover, or both, from wherever an earlier run came to; what the report says."""
    if run.train is not None and not recover.waits(run):
        report = distil.train(run, _before_then(run), say)
        if not run.options.then:
            shutil.rmtree(run.work)
            return report
    return recover.recover(run, say)


def _before_then(run: Request) -> Path:
    """Where the model lies when it is whole but for a recovery."""
    return recover.compressed(run.work) if run.options.then else run.output


def batches_of(found: dict[str, Calibration]) -> dict[str, tuple[list[dict[str, torch.Tensor]], float]] | None:
    """Calibration as `weft.compress` takes it, where models do their work; None where there is none."""
    from weft.run import models

    def placed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(models.device()) for name, tensor in batch.items()}

    return {source: ([placed(batch) for batch in each.batches], each.weight) for source, each in found.items()} or None


@contextmanager
def _kept_work(run: Request) -> Iterator[None]:
    """The work folder, ready; gone again if it comes to an end before the first layer is finished."""
    from weft.run.checkpoints import is_disk_full

    try:
        try:
            run.work.mkdir(parents=True, exist_ok=True)
            write_text(run.work / RUN_FILE, run.file())
        except OSError as error:
            raise WeftError(f"{str(run.work)!r} cannot be written: {error.strerror or error}") from error
        yield
    except BaseException as error:
        kept = finished_layers(run)
        if not kept:
            shutil.rmtree(run.work, ignore_errors=True)
        if is_disk_full(error):
            raise WeftError(
                f"the disk is full: {run.output} could not be written; {kept} finished layers are in {run.work}, and "
                "the same command goes on from there"
            ) from error
        raise


def write_dense(folder: str, out: Path) -> str:
    """A compressed model as a stock one that needs no weft, with its tokenizer; what was written, in words.

    Raises UsageError for a folder that holds no compressed model, or layers that no matrix describes.
    """
    from weft.linear._transformers import structured_layers, to_dense
    from weft.run import models

    model = models.load_as_saved(folder)
    many = len(structured_layers(model))
    if not many:
        raise UsageError(f"{folder!r} holds no compressed layer, so it is a stock model already")
    with whole_folder(out) as partial:
        to_dense(model).save_pretrained(partial)
        models.keep_attention(folder, partial)
        _save_tokenizer(folder, partial)
    return f"{out}: a stock {type(model).__name__}, {many} compressed layers written out as matrices"


def _save_tokenizer(spec: str, folder: Path) -> None:
    """The tokenizer with its chat template, and what else the model's folder holds to use it."""
    from transformers import AutoTokenizer

    from weft.run.models import folder_of, locate

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(locate(spec))
    except (OSError, ValueError, KeyError):  # a model of something other than text
        tokenizer = None
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name in _BESIDE:
        source = folder_of(spec) / name
        if source.exists():
            shutil.copyfile(source, folder / name)
