"""Calibrate, take apart, allocate, replace: what every compression method shares.

    weft.compress(model, "svd_llm", keep=0.75, data=batches)

A method takes each layer apart once; sizes are chosen afterwards, by any allocator, from what each size would cost
and leave, and cut from what is stored. So one decomposition serves every `keep`, and a killed run goes on with the
next layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weft import registry
from weft.algebra.random import checksum
from weft.anatomy import blocks
from weft.compress._allocate import READS, TRIED, Menu, Sizes, tried
from weft.compress._calibration import Corpus, calibrate, corpora, fingerprint, influences, mean_loss
from weft.compress._config import CompressConfig
from weft.compress._factoriser import Factoriser, factoriser
from weft.compress._layers import Layer, Unit, type_of
from weft.compress._store import Store
from weft.errors import UsageError
from weft.linear._transformers import attach_format

Observer = Callable[[str, int, int, "Row | None"], None]  # stage, layers done, of how many, the layer just finished


@dataclass(frozen=True)
class Row:
    """One layer as it came out, or several that were taken apart together.

    Attributes:
        kind: of structured layer; "dense" where it stays as it was.
        size: its rank, or what the method counts; None where it stays.
        bits, dense: stored bits after and before.
        error: the share of the layer's objective that is lost; None where the method has no such number.
        reads: bits of the weights that are read for one token: those stored, unless the method reads them in part.
        parts: the layers' names: its own, or those of several.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    size: int | None
    bits: int
    dense: int
    error: float | None = None
    reads: int = 0
    parts: tuple[str, ...] = ()


@dataclass
class Compression:
    """What was done to a model."""

    method: str
    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def keep(self) -> float:
        """The share of the targeted matrices' bits that is stored now."""
        return sum(row.bits for row in self.rows) / max(sum(row.dense for row in self.rows), 1)

    @property
    def reads(self) -> float:
        """The share of the targeted matrices' bits that is read for one token now."""
        return sum(row.reads for row in self.rows) / max(sum(row.dense for row in self.rows), 1)

    @property
    def replaced(self) -> int:
        """Layers that have another form now."""
        return sum(len(row.parts) for row in self.rows if row.size is not None)


def compress(
    model: nn.Module,
    method: str,
    *,
    data: Iterable[Any] | Mapping[str, tuple[Iterable[Any], float]] | None = None,
    work: Path | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Compression:
    """Replace layers of a model by smaller ones, in place: its linear layers, unless the method serves others too.

    Args:
        model: any torch module; a transformers model can then be saved and loaded as usual, with weft imported.
        method: a name of `weft methods --pillar compress`.
        data: calibration batches, each what the model is called with: a dict of tensors (an `attention_mask` tells
            padding), a tuple, or a tensor. Several corpora: {name: (batches, weight)}.
        work: a folder for finished layers, so that an interrupted call goes on; none keeps them in memory.
        options: fields of the method's config: keep, include, exclude, allocate, …

    Returns:
        What became of each layer. With keep=1 nothing is replaced.

    Raises:
        UsageError: an option or the data cannot be served; the model is as it was.
    """
    started = time.monotonic()
    method, maker, layers = _settled(model, method, options)
    config = maker.config
    if isinstance(model, PreTrainedModel):
        attach_format(model)  # which refuses a quantised model, before any work
    data = corpora(data)
    needs = _needs(maker, layers)
    if not data and (any(needs.values()) or config.runs_the_model):
        raise UsageError(f"{method} needs calibration data: give data, batches of what the model is called with")
    _check_finite(layers)
    if config.sequential and READS.get(config.allocate) in ("errors", "losses") and any(needs.values()):
        raise UsageError(
            f"allocate={config.allocate!r} compares what all layers lose, which sequential calibration finds one "
            "after the other: use uniform, threshold or block_influence, or sequential=False"
        )
    store = Store(work, _request(method, config, maker.nested, layers, data) if work else {})
    say = observer or _silent
    if maker.prepares:
        say("preparing", 0, len(layers), None)
        maker.prepared = store.once("prepared", lambda: maker.prepare(model, data, layers))
        needs = _needs(maker, layers)
    job = _Job(model, maker, layers, needs, data, store, say)
    report = Compression(method, options)
    if config.keep == 1 and config.guard:
        report.rows = [job.row(layer, None) for layer in layers]
        return report
    if config.sequential and any(needs.values()):
        report.rows = job.block_by_block()
    else:
        report.rows = job.at_once()
    if isinstance(model, PreTrainedModel):
        attach_format(model)
    report.seconds = time.monotonic() - started
    return report


def plan(model: nn.Module, method: str, **options: Any) -> list[Row] | None:
    """What `compress` would make of each layer, before any work; the model may lie on the meta device.

    None where sizes depend on what is yet to be computed: on the errors of layers, on data, or on weights not loaded.
    Raises UsageError as `compress` does.
    """
    _, maker, layers = _settled(model, method, options)
    reads = READS.get(maker.config.allocate)
    if maker.prepares or reads == "errors" or maker.config.runs_the_model:
        return None
    if reads == "values" and any(part.weight.is_meta for layer in layers for part in layer.parts):
        return None
    job = _Job(model, maker, layers, {}, [], Store(None, {}), _silent)
    sizes = job.choose()
    return [job.row(layer, sizes[layer.name], maker.kind_of(layer)) for layer in layers]


def _settled(model: nn.Module, method: str, options: dict[str, Any]) -> tuple[str, Factoriser[Any], list[Unit]]:
    card = registry.card(method, "compress")
    config: Any = registry.config_class(card.slug).from_options(options)  # type: ignore[attr-defined]
    maker = factoriser(card.slug, config)
    return card.slug, maker, list(maker.units(model))


def _check_finite(layers: Sequence[Unit]) -> None:
    for part in (part for layer in layers for part in layer.parts):
        if not bool(torch.isfinite(part.weight).all()):
            raise UsageError(
                f"{part.name} has weights that are not finite; leave it out with exclude, or mend the model"
            )


def _needs(maker: Factoriser[Any], layers: Sequence[Unit]) -> dict[str, tuple[str, ...]]:
    return {part.name: maker.needs(part) for layer in layers for part in layer.parts}


def _silent(stage: str, done: int, of: int, row: Row | None) -> None:
    """An observer that looks away."""


def _request(
    method: str, config: CompressConfig, nested: bool, layers: Sequence[Unit], data: Sequence[Corpus]
) -> dict[str, Any]:
    """What finished layers depend on, so that another request does not go on with them."""
    options = asdict(config)
    for late in ("keep", "allocate") if nested and not config.sequential else ():
        del options[late]
    return {
        "method": method,
        "options": options,
        "layers": {part.name: checksum(part.weight) for layer in layers for part in layer.parts},
        "data": [[corpus.weight, *map(fingerprint, corpus.batches)] for corpus in data],
    }


@dataclass
class _Job:
    """One call of `compress` at work.

    `layers` holds what is not replaced yet and, by its modules, the dense weights: a replaced layer's are freed.
    """

    model: nn.Module
    maker: Factoriser[Any]
    layers: list[Unit]
    needs: Mapping[str, Sequence[str]]
    data: Sequence[Corpus]
    store: Store
    say: Observer

    # --- the two orders of work -------------------------------------------------------------------------------------

    def at_once(self) -> list[Row]:
        """All layers are taken apart by what the dense model shows; then they are replaced."""
        if self.maker.nested:
            self.decompose(self.layers, None)
        sizes = self.choose()
        if not self.maker.nested:
            self.decompose(self.layers, sizes)
        rows = []
        while self.layers:
            rows.append(self.replaced(self.layers.pop(0), sizes))
        return rows

    def block_by_block(self) -> list[Row]:
        """Sizes first; then each block by what the compressed blocks before it pass on."""
        sizes = self.choose()
        rows = []
        while self.layers:
            many = len(_groups(self.layers)[0])
            self.decompose(self.layers[:many], sizes)
            rows += [self.replaced(self.layers.pop(0), sizes) for _ in range(many)]
        return rows

    # --- the steps --------------------------------------------------------------------------------------------------

    def decompose(self, layers: Sequence[Unit], sizes: Sizes | None) -> None:
        """Take apart what is not in the store yet, a block's statistics in memory at a time."""
        wanted = [
            layer
            for layer in layers
            if len(self.maker.sizes(layer)) and (sizes is None or sizes[layer.name] is not None)
        ]
        left = [layer for layer in wanted if layer.name not in self.store]
        done = len(wanted) - len(left)
        for group in _groups(left):
            self.say("calibrating", done, len(wanted), None)
            parts = [part for layer in group for part in layer.parts]
            statistics = calibrate(self.model, self.data, parts, self.needs)
            for layer in group:
                size = None if self.maker.nested or sizes is None else sizes[layer.name]
                seen = {part.name: statistics.pop(part.name) for part in layer.parts}
                mine = seen[layer.name] if isinstance(layer, Layer) else seen
                self.store.put(layer.name, self.maker.decompose(layer, mine, size))
                done += 1
                self.say("factorising", done, len(wanted), None)

    def reads(self, what: str) -> bool:
        """Whether the allocation needs this of the layers."""
        return READS.get(self.maker.config.allocate) == what

    def choose(self) -> Sizes:
        """A size for each layer; None where it stays."""
        influence = influences(self.model, self.data, blocks(self.model)) if self.reads("influence") else {}
        menus = {}
        for layer in self.layers:
            menus[layer.name] = Menu(
                bits=[self.maker.bits(layer, size) for size in self.maker.sizes(layer)],
                sizes=self.maker.sizes(layer),
                dense=layer.bits,
                errors=self.errors(layer) if self.reads("errors") and self.maker.nested else None,
                values=self.maker.values(layer) if self.reads("values") else None,
                influence=_mean([influence[p.block] for p in layer.parts if p.block in influence]),
                type=type_of(layer.name),
            )
        if self.reads("losses") and self.maker.nested:
            found = self.store.once("sweep", lambda: self.sweep(menus))
            menus = {name: replace(menu, losses=found[menu.type]) for name, menu in menus.items()}
        places = self.maker.allocate(menus)
        return {
            layer.name: None if places[layer.name] is None else self.maker.sizes(layer)[places[layer.name]]  # type: ignore[index]
            for layer in self.layers
        }

    def sweep(self, menus: Mapping[str, Menu]) -> dict[str, Tensor]:
        """For each type of layer, how much the loss on the data rises where all of it, and nothing else, is cut."""
        before = mean_loss(self.model, self.data)
        types: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise UsageError(f"allocate='sweep' tries one type of layer at a time, and {layer.name} is several")
            types.setdefault(menus[layer.name].type, []).append(layer)
        rises = {name: torch.zeros(len(TRIED), dtype=torch.float64) for name in types}
        for number, (name, layers) in enumerate(types.items()):
            self.say("trying types of layers", number, len(types), None)
            for i, share in enumerate(TRIED):
                for layer in layers:
                    size = tried(menus[layer.name], share)
                    if size is None:
                        self.model.set_submodule(layer.name, layer.module)
                    else:
                        self.put(layer, self.maker.sizes(layer)[size])
                rises[name][i] = mean_loss(self.model, self.data) - before
            for layer in layers:
                self.model.set_submodule(layer.name, layer.module)
        return rises

    def put(self, layer: Unit, size: int) -> tuple[str, dict[str, Tensor]]:
        """Put a layer's form of this size in its place; the kind, and the tensors that it was made from."""
        device = layer.parts[0].weight.device
        tensors = {name: t.to(device) for name, t in self.store.get(layer.name).items()}
        return self.maker.replace(self.model, layer, tensors, size), tensors

    def errors(self, layer: Unit) -> Tensor | None:
        """What each size of a layer leaves, where the method knows; nothing for a layer that has no size."""
        return self.store.get(layer.name).get("errors") if layer.name in self.store else torch.zeros(0)

    def replaced(self, layer: Unit, sizes: Sizes) -> Row:
        """The layer's row, after its replacement by its size."""
        size = sizes[layer.name]
        if size is None:
            row = self.row(layer, None)
        else:
            kind, tensors = self.put(layer, size)
            errors = tensors.get("errors")
            place = list(self.maker.sizes(layer)).index(size) if self.maker.nested else ...
            error = None if errors is None else float(errors[place])
            row = self.row(layer, size, kind, error)
        self.say("replacing", 0, 0, row)
        return row

    def row(self, layer: Unit, size: int | None, kind: str | None = None, error: float | None = None) -> Row:
        """What the report says of a layer."""
        shape, parts = layer.shape, tuple(part.name for part in layer.parts)
        if kind is None or size is None:
            return Row(layer.name, shape, "dense", None, layer.bits, layer.bits, 0.0, layer.bits, parts)
        bits, reads = self.maker.bits(layer, size), self.maker.reads(layer, size)
        return Row(layer.name, shape, kind, size, bits, layer.bits, error, reads, parts)


def _mean(found: Sequence[float]) -> float | None:
    return sum(found) / len(found) if found else None


def _groups(layers: Sequence[Unit]) -> list[list[Unit]]:
    """Layers of one block together, in order."""
    return [list(group) for _, group in groupby(layers, key=lambda layer: layer.block)]
