"""One point of a compression study: a method at one share, made and measured in a process of its own.

Only JSON goes in and out. What all points of a process share is read once: test corpora, calibration, the dense model.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft import registry
from weft.errors import UsageError, nearest
from weft.files import whole_folder
from weft.run import compress, costs, distil, evaluate, fidelity, models, sources
from weft.run.single import sentence, without_nan
from weft.run.study import Row
from weft.run.tradeoffs import (
    DENSE,
    PILLAR,
    TRAINED,
    Point,
    Study,
    empty_row,
    is_trained,
    saves_reading,
    slug_of,
    study_from,
)

if TYPE_CHECKING:
    from weft.compress._engine import Compression

TASK = "causal-lm"
_THRIFT = "a smaller --batch-size or --max-length needs less"


# --- what a point is asked to be --------------------------------------------------------------------------------------


def request(study: Study, method: str, keep: float) -> compress.Request:
    """The compression that `weft compress` would make for a point.

    Raises UsageError for options that the method does not have or cannot take.
    """
    name, method = method, slug_of(method)
    keys = compress.method_keys_of(method)
    knob = registry.card(method, PILLAR).knob
    settings = dict(study.options.get(method, {}))
    for key in settings:
        if key not in keys:
            raise UsageError(f"--set {method}.{key}: {method} has no option {key!r}: {nearest(key, keys)}")
        if key in ("keep", knob, "include", "exclude"):
            flag = key if key in ("include", "exclude") else "keep"
            raise UsageError(f"--set {method}.{key}: --{flag} says that for all methods")
    settings |= {name: value for name in ("include", "exclude") if (value := getattr(study, name)) is not None}
    settings[knob] = keep if knob == "keep" else round(1 - keep, 12)
    common = ("model", "data", "columns", "split_seed", "samples", "max_length", "batch_size", "seed", "bf16")
    given = {name: getattr(study, name) for name in common}
    given |= {"method": method, "threads": study.threads, "output": f"{name}-{keep:g}"}
    given |= {"test_fraction": 0.0 if study.test_data else study.test_fraction}
    if not study.trains:  # else its default, for all points, so that they calibrate on the same rows
        given |= {"validation_fraction": 0.0}
    if is_trained(name):
        given |= {"train": study.train or distil.DEFAULT}
        if distil.parse(given["train"])[1] is not None:
            raise UsageError(f"--train {study.train}: give steps, as many for every method, and not minutes")
    elif distil.learns(method):
        given |= {"train": distil.NONE}
    given |= {keys[name]: value for name, value in settings.items()}
    return compress.request({name: value for name, value in given.items() if value is not None})


def placed(run: compress.Request, model: Any) -> compress.Request:
    """The request itself, or at its smallest form where that of a method with fixed points is larger than its share."""
    from weft.compress._factoriser import factoriser

    if "fixed_point" not in registry.card(run.method).reasons:
        return run
    maker = factoriser(run.method, run.config)
    layers = maker.units(model)
    least = sum(min([layer.bits, *(maker.bits(layer, size) for size in maker.sizes(layer)[:1])]) for layer in layers)
    share = math.ceil(1e4 * least / sum(layer.bits for layer in layers)) / 1e4
    if run.config.keep >= share:
        return run
    return dataclasses.replace(run, config=dataclasses.replace(run.config, keep=min(share, 1.0)))


def facts(study: Study, tell: Callable[[str], None]) -> Row:
    """Everything that can be known and checked before any work, as JSON: what is compressed, calibrates and tests.

    Raises UsageError for methods, options, models and data that do not fit together.
    """
    from weft.compress._layers import targets

    runs = [request(study, method, keep) for method in study.methods for keep in study.keeps]
    tell("looking at the model")
    model = compress.skeleton(runs[0])
    if not getattr(model, "can_generate", bool)() or model.config.is_encoder_decoder:
        raise UsageError(
            f"model {study.model!r} is a {type(model).__name__}, and this comparison ranks language models by their "
            "perplexity: use weft compress and weft evaluate"
        )
    layers = targets(model, runs[0].config.include, runs[0].config.exclude)
    tell("reading the data")
    tokenizer = models.load_tokenizer(study.model)
    notes: list[str] = []
    corpora = test_corpora(study, tokenizer)
    calibration: dict[str, compress.Calibration] = {}
    for run in runs:
        shape = _outline(run, model)
        if shape.reads_data and not calibration:
            calibration = compress.calibration(run, model, shape, notes.append)
    for method in study.methods:
        notes += _remarks(method, study, model)
    if study.trains:
        how = study.train or distil.DEFAULT
        notes.append(f"Names with {TRAINED} are trained after they are made, on the calibration data: {how}.")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "matrices": len(layers),
        "dense_bits": sum(layer.bits for layer in layers),
        "calibration": {
            name: {"sequences": each.sequences, "tokens": each.tokens} for name, each in calibration.items()
        },
        "corpora": [corpus.facts for corpus in corpora],
        "notes": notes,
    }


def _outline(run: compress.Request, model: Any) -> compress.Outline:
    """As much of `compress.outline` as calibration needs; sizes are chosen with weights, and may be refused there."""
    from weft.compress._factoriser import factoriser

    maker = factoriser(run.method, run.config)
    layers = maker.units(model)
    needs = frozenset(need for layer in layers for part in layer.parts for need in maker.needs(part))
    return compress.Outline(layers, None, needs, {}, maker)


def _remarks(method: str, study: Study, model: Any) -> list[str]:
    """What a reader must know of the shares of a method that has no free choice of them."""
    if saves_reading(method):
        return [
            f"{method} stores more than before and reads less of it for a token: its share is of what is read, and its "
            "losses are with every token read so, as in generation."
        ]
    missed = [(keep, placed(run, model).config.keep) for keep in study.keeps if (run := request(study, method, keep))]
    missed = [(keep, share) for keep, share in missed if share > keep]
    if not missed:
        return []
    asked = ", ".join(f"{keep:g}" for keep, _ in missed)
    return [
        f"{method} cannot store less than {missed[0][1]:g}: in place of {asked} it stands there, outside their "
        f"rankings (--keep {missed[0][1]:g} compares all methods at its size)."
    ]


def test_corpora(study: Study, tokenizer: Any) -> list[fidelity.Corpus]:
    """The text that points are measured on, none of which calibrates.

    Raises UsageError for what cannot be read, or leaves nothing to test on.
    """
    limit = models.position_limit(study.model)
    window = min(study.max_length, limit or study.max_length)

    def read(spec: str, split: str, fraction: float) -> fidelity.Corpus:
        asked = fidelity.Request(
            study.model,
            (spec,),
            split=split,
            max_length=study.max_length,
            batch_size=study.batch_size,
            rows=study.rows,
            columns=study.columns,
            test_fraction=fraction,
            split_seed=study.split_seed,
        )
        return fidelity.read_corpus(asked, spec, TASK, window, {"model": tokenizer}, None)

    def split_of(spec: str) -> str:
        found = sources.read(spec, TASK, columns=study.columns, validation_fraction=0)
        return "test" if found.test else "train"

    further = [spec for spec in (study.test_data, study.data2) if spec]
    first = [] if study.test_data else [read(study.data, "test", study.test_fraction)]
    return first + [read(spec, split_of(spec), 0.0) for spec in further]


# --- the work ---------------------------------------------------------------------------------------------------------


class Bench:
    """What the points of one process share."""

    def __init__(self, study: Study, output: Path) -> None:
        self.study, self.output = study, output
        self.tokenizer = models.load_tokenizer(study.model)
        self.calibrations: dict[bool, dict[str, compress.Calibration]] = {}

    @functools.cached_property
    def corpora(self) -> list[fidelity.Corpus]:
        return test_corpora(self.study, self.tokenizer)

    @functools.cached_property
    def dense(self) -> models.Base:
        return costs.loaded(self.study.model, TASK, self.study.bf16, self.tokenizer)

    def calibration(
        self, run: compress.Request, shape: compress.Outline, model: Any
    ) -> dict[str, compress.Calibration]:
        """Read once for the methods that want labels, and once for the others."""
        if not shape.reads_data:
            return {}
        if shape.reads_loss not in self.calibrations:
            self.calibrations[shape.reads_loss] = compress.calibration(run, model, shape, lambda text: None)
        return self.calibrations[shape.reads_loss]

    def compressed(self, point: Point, known: Sequence[Row] = ()) -> tuple[compress.Request, Any, Compression | float]:
        """The request of a point, the model, and what was done to it; in place of that the share of an equal point.

        Raises UsageError where the method cannot serve the share.
        """
        from weft.compress._engine import compress as work_on
        from weft.compress._engine import plan

        assert point.keep is not None
        run = request(self.study, point.method, point.keep)
        model = models.load_as_saved(self.study.model, bf16=self.study.bf16).to(models.device())
        run = placed(run, model)
        shape = _outline(run, model)
        if known and not saves_reading(run.method):
            rows = plan(model, run.method, **run.settings) or []
            same = [each["keep"] for each in known if each["sizes"] == [row.size for row in rows]]
            if same:
                return run, model, same[0]
        folder = self.output / "work" / point.method
        if not shape.maker.nested or run.config.sequential:  # what is found serves this share alone
            folder = folder / f"{point.keep:g}"
        data = compress.batches_of(self.calibration(run, shape, model))
        return run, model, work_on(model, run.method, data=data, work=folder, **run.settings)

    def quality(self, point: Point, known: Sequence[Row]) -> Row:
        """What a point stores, reads and loses."""
        run, model, made = self.compressed(point, known)
        row: Row = {"options": self.study.options.get(run.method, {}), "command": run.command()}
        if isinstance(made, float):
            return row | {"same_as": made}
        row |= {
            "kept": made.keep,
            "bits": sum(layer.bits for layer in made.rows),
            "dense_bits": sum(layer.dense for layer in made.rows),
            "reads": sum(layer.reads for layer in made.rows),
            "file_bytes": self.file_bytes(model, point),
            "seconds": round(made.seconds, 3),
            "layers": [dataclasses.asdict(layer) for layer in made.rows],
        }
        if run.train is not None:
            model, row["train_seconds"] = self.trained(run, model, point)
        for module in model.modules():
            if getattr(module, "prefill_ratio", None) == 1:  # whole sequences would run dense, unlike generation
                module.prefill_ratio = math.nextafter(1.0, 0.0)
        return row | {"corpora": self.measured(self.ready(model))}

    def trained(self, run: compress.Request, model: Any, point: Point) -> tuple[Any, float]:
        """The model after its training, and how many seconds that took; killed, it goes on from its checkpoint."""
        to = str(self.output / "work" / f"{point.method}-{point.keep:g}")
        run = dataclasses.replace(run, options=dataclasses.replace(run.options, output=to))
        if not distil.start(run.work).exists():
            with whole_folder(distil.start(run.work)) as partial:
                model.save_pretrained(partial)
                models.keep_attention(run.options.model or "", partial)
                self.tokenizer.save_pretrained(partial)
        model, found = distil.taught(run, lambda text: None, progress=False)
        shutil.rmtree(run.work)
        return model, found["seconds"]

    def file_bytes(self, model: Any, point: Point) -> int:
        """Of the weight files that the model takes, written and removed again."""
        folder = self.output / "work" / f"{point.method}.model"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            model.save_pretrained(folder)
            return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def ready(self, model: Any) -> Any:
        """In the dtype that models are measured in."""
        return (model if self.study.bf16 else model.float()).eval()

    def measured(self, model: Any) -> list[Row]:
        """One entry a test corpus: loss, perplexity, each document's share, and how far it is from the dense model."""
        entries = []
        for corpus in self.corpora:
            against = None if model is self.dense.model else self.dense.model
            (mine, *_), apart = fidelity.measured(model, against, corpus, self.study.batch_size)
            entries.append({"data": corpus.name, **evaluate.summarise(mine, TASK), **apart})
            if not math.isfinite(entries[-1]["loss"]):
                entries[-1]["perplexity"] = math.inf
        return entries

    def original(self) -> Row:
        """The dense model's row."""
        from weft.compress._layers import targets

        model = self.dense.model
        saved = compress.skeleton(request(self.study, self.study.methods[0], self.study.keeps[0]))
        bits = sum(layer.bits for layer in targets(saved, self.study.include, self.study.exclude))
        files = sum(file.stat().st_size for file in costs.weight_files(self.study.model))
        row = {"kept": 1.0, "bits": bits, "dense_bits": bits, "reads": bits, "file_bytes": files or None}
        return row | {"corpora": self.measured(model)}

    def speed(self, point: Point) -> Row:
        """Tokens a second, and those of the dense model, which takes turns with it."""
        run, model, _ = self.compressed(point)
        base = models.Base(self.ready(model), self.tokenizer, self.study.model, TASK)
        found = costs.speeds({DENSE: self.dense, point.method: base})
        return {"command": run.command(), "speed": found[point.method], "dense_speed": found[DENSE]}


@functools.lru_cache(maxsize=1)
def _bench(context: str) -> Bench:
    asked = json.loads(context)
    return Bench(study_from(asked["study"]), Path(asked["output"]))


def run_point(context: Row, task: Row) -> Row:
    """The row of one point; what it raises is in the row."""
    point = Point(task["phase"], task["method"], task["keep"])
    row = empty_row(point)
    try:
        bench = _bench(json.dumps(context))
        if point.phase == "dense":
            row |= bench.original()
        else:
            row |= bench.quality(point, task["known"]) if point.phase == "quality" else bench.speed(point)
        row["status"] = "ok"
    except Exception as error:
        if context["debug"]:
            traceback.print_exc()
        row["error"] = sentence(error, _THRIFT)
    gc.collect()
    return without_nan(row)
