"""R-Sparse: large inputs meet the whole weight, the others a low-rank part, so that a token reads half of the weights.

Zhenyu Zhang, Zechun Liu, Yuandong Tian, Harshit Khaitan, Zhangyang Wang, Steven Li, "R-Sparse: Rank-Aware Activation
Sparsity for Efficient LLM Inference", arXiv 2504.19449.

    W ≈ U_r·S_r·V_rᵀ,    c_j = ‖W_:j‖,    m_j = |x_j|·c_j > τ
    y = W·(m∘x) + U_r·S_r·V_rᵀ·((1 − m)∘x) + b

Of in·out weights a token shall read the share 1 − s, of which ρ goes to whole columns and the rest to U_r·S_r and V_r:

    channels = max(⌊in·(1 − s)·ρ⌋, 1),    r = max(⌊(in·out·(1 − s) − channels·out) / (in + out)⌋, 1)
    τ = the ⌊n·t⌋-th smallest of all n calibration inputs |x_j|·c_j,  t = 1 − (1 − s)·ρ

τ is one number a layer, so how many columns a token reads varies about that share. With ρ = 1 there is no low-rank
part, and magnitudes are compared without c; with ρ = 0 only the low-rank part is read. Shapes are the layer's own, also
where keys and values have fewer outputs than queries. Up to 2²² inputs of a layer τ is exact; beyond, it is read from a
histogram and at most 0.05 % larger.

W stays, so the model grows: `keep` does not apply, and `target_sparsity` is s. Only generation gets faster (the layer's
page says where): a prompt runs dense, and so does any evaluation on whole sequences, unless `prefill_ratio` is below 1.

One ρ for all layers is `sparse_ratio`; one for each is a `recipe`. `search` finds one by evolution (Algorithm 1; sizes
and rates are weft's), from the loss of the sparsified model on some batches:

    recipe = search(model, batches, target_sparsity=0.5)
    weft.compress(model, "r_sparse", target_sparsity=0.5, recipe=recipe, data=batches)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.algebra.random import generator
from weft.algebra.svd import svd_operations, weighted_svd
from weft.compress._allocate import Menus, Sizes
from weft.compress._calibration import Corpus, Statistics, calibrate, corpora, evaluating, loss_of
from weft.compress._config import CompressConfig
from weft.compress._factoriser import Factoriser, Tensors
from weft.compress._layers import Layer, targets
from weft.errors import UsageError, nearest
from weft.linear._structured import Structured
from weft.linear.rank_aware_sparse import RankAwareSparse, column_norms, dense_tokens, reads
from weft.registry import Card

CARD = Card(
    title="R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference",
    arxiv="2504.19449",
    year=2025,
    summary="large inputs meet the whole weight, the rest a low-rank part: half the weights read per token",
    knob="target_sparsity",
    needs=("data",),
    limitations="The model is stored larger than before, and only generation reads less, token by token; losses on "
    "whole sequences are the dense model's unless prefill_ratio is below 1.",
    reasons={
        "keep": "it saves what is read of the weights for a token and not what is stored: the whole weight stays",
        "non_monotone": "a layer has one size, and its threshold is a quantile of inputs, not the least of an error",
    },
)

_START = 0.95  # the ρ of all layers that the paper's grid search found, and where the search starts


@dataclass
class RSparseConfig(CompressConfig):
    """Options of R-Sparse."""

    keep: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "does not apply, as all weights stay: target_sparsity takes its place"}
    )
    allocate: Literal["uniform"] = field(
        default="uniform", metadata={"help": "every layer reads the same share of its weights"}
    )
    guard: bool = field(
        default=True, metadata={"help": "leave a layer as it is where it is too small to be read in part"}
    )
    target_sparsity: float = field(
        default=0.5, metadata={"help": "share of the weights that a token does not read, at least 0, below 1"}
    )
    sparse_ratio: float = field(
        default=_START, metadata={"help": "share of what is read that goes to whole columns; the rest is low-rank"}
    )
    recipe: dict[str, float] | None = field(
        default=None, metadata={"help": "another sparse_ratio for layers by name: model.layers.0.mlp.up_proj=0.9"}
    )
    search: bool = field(
        default=False,
        metadata={"help": "find a recipe by evolution on the calibration data: 160 evaluations of the whole model"},
    )
    prefill_ratio: float = field(
        default=1.0,
        metadata={
            "help": "share of a sequence's tokens, its last, that run sparse; 1 is generation: prompts dense, single "
            "tokens sparse"
        },
    )

    def validate(self) -> None:
        # not the checks of `keep`, which is all that methods share
        if self.keep is not None:
            raise UsageError(
                f"keep={self.keep!r} does not apply: r_sparse stores all weights and saves reading them, so give "
                "target_sparsity, the share that is not read"
            )
        if self.allocate != "uniform":
            raise UsageError(
                f"allocate={self.allocate!r} needs layers of many sizes, and here each reads the same share of its "
                "weights, which recipe and search divide"
            )
        if not 0 <= self.target_sparsity < 1:
            raise UsageError(f"target_sparsity={self.target_sparsity!r}: a share of the weights, at least 0, below 1")
        for name, share in {"sparse_ratio": self.sparse_ratio, **(self.recipe or {})}.items():
            if not 0 <= share <= 1:
                raise UsageError(f"{name}={share!r}: a share of what is read, 0 to 1")
        if not 0 <= self.prefill_ratio <= 1:
            raise UsageError(f"prefill_ratio={self.prefill_ratio!r}: a share of a sequence's tokens, 0 to 1")
        if self.search and self.recipe:
            raise UsageError("search finds a recipe, and one is given: give recipe or search")


def budget(out: int, in_: int, sparsity: float, ratio: float) -> tuple[int, int]:
    """Whole columns and rank that a token may read, of a weight out × in; no rank where ratio (ρ) is 1."""
    channels = max(int(in_ * (1 - sparsity) * ratio), 1)
    if ratio == 1:
        return channels, 0
    return channels, max(int((in_ * out * (1 - sparsity) - channels * out) / (in_ + out)), 1)


def threshold(seen: Statistics, sparsity: float, ratio: float) -> float:
    """τ. Infinite where nothing but the low-rank part is read."""
    if ratio == 0:
        return torch.inf
    magnitudes = seen.magnitudes if ratio == 1 else seen.scaled_magnitudes
    assert magnitudes is not None
    return magnitudes.at(1 - (1 - sparsity) * ratio)


class RSparseFactoriser(Factoriser[RSparseConfig]):
    """The nearest low-rank part of each weight, and a threshold from calibration inputs."""

    kind = "rank_aware_sparse"
    nested = False

    @property
    def prepares(self) -> bool:
        return self.config.search and self.config.target_sparsity > 0

    def prepare(self, model: nn.Module, data: Sequence[Corpus], layers: Sequence[Layer]) -> Tensors:
        given = self.config.prefill_ratio
        sequences = given if 0 < given < 1 else 0.5  # else whole sequences would run dense, and all recipes be equal
        recipe = _search(model, data, layers, self.config.target_sparsity, prefill_ratio=sequences)
        return {name: torch.tensor(ratio, dtype=torch.float64) for name, ratio in recipe.items()}

    def ratio(self, layer: Layer) -> float:
        """ρ of a layer."""
        if layer.name in self.prepared:
            return float(self.prepared[layer.name])
        return (self.config.recipe or {}).get(layer.name, self.config.sparse_ratio)

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("magnitudes",) if self.ratio(layer) == 1 else ("scaled_magnitudes",)

    def allocate(self, menus: Menus) -> Sizes:
        for name in self.config.recipe or {}:
            if name not in menus:
                raise UsageError(f"recipe: there is no layer {name!r} to sparsify: {nearest(name, menus)}")
        # where floors of one column and one rank read as much as the dense layer does, it stays
        return {name: 0 if self.config.target_sparsity and menu.sizes else None for name, menu in menus.items()}

    def sizes(self, layer: Layer) -> Sequence[int]:
        channels, rank = budget(layer.out, layer.in_, self.config.target_sparsity, self.ratio(layer))
        worth = reads(layer.out, layer.in_, channels, rank) < layer.out * layer.in_
        return [rank] if worth or not self.config.guard else []

    def bits(self, layer: Layer, size: int) -> int:
        numbers = layer.out * layer.in_ + size * (layer.out + layer.in_)
        return numbers * layer.weight.element_size() * 8 + 32 * (layer.in_ + 1)

    def reads(self, layer: Layer, size: int) -> int:
        channels, _ = budget(layer.out, layer.in_, self.config.target_sparsity, self.ratio(layer))
        return reads(layer.out, layer.in_, channels, size) * layer.weight.element_size() * 8

    def operations(self, layer: Layer) -> tuple[float, float] | None:
        return svd_operations(layer.out, layer.in_, (*self.sizes(layer), 0)[0])

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None) -> Tensors:
        assert size is not None
        up, down, scale = _parts(layer, size)
        tau = threshold(statistics, self.config.target_sparsity, self.ratio(layer))
        return {"up": up, "down": down, "scale": scale, "tau": torch.tensor(tau, dtype=torch.float64)}

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        return RankAwareSparse.from_factors(
            layer.weight,
            tensors["up"],
            tensors["down"],
            tensors["scale"],
            tensors["tau"],
            layer.bias,
            prefill_ratio=self.config.prefill_ratio,
        )


def _parts(layer: Layer, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U·S (out × rank), Vᵀ (rank × in) and c; with no rank, c is 1."""
    w = layer.wide
    if rank == 0:
        return w[:, :0], w[:0], torch.ones_like(w[0], dtype=torch.float32)
    up, down = weighted_svd(w, rank=rank).factors(rank, split="left")
    return up, down, column_norms(layer.weight)


# --- the search for a recipe ------------------------------------------------------------------------------------------


def search(
    model: nn.Module,
    batches: Any,
    *,
    target_sparsity: float = 0.5,
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    prefill_ratio: float = 0.5,
    population: int = 16,
    generations: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """A ρ for every layer, by name, with which the sparsified model has a low loss on the batches.

    The model stays as it is; in between, its layers give what sparse ones would give. The uniform ρ = 0.95 is among the
    first population, and the best of each survives, so that the loss on the batches is no higher than with that.

    Args:
        batches: each what the model is called with; language models need no labels. They calibrate, and are the test.
        include, exclude: the layers, as `weft.compress` takes them.
        prefill_ratio: the last share of each sequence that runs sparse; below 1, as all else would run dense.
        population, generations: recipes that live at once, and how often they are bred; a quarter survives each time.

    Raises:
        UsageError: a number is out of range, or the batches give no loss.
    """
    if not 0 < prefill_ratio < 1:
        raise UsageError(f"prefill_ratio={prefill_ratio!r}: the search needs whole sequences, above 0 and below 1")
    if not 0 < target_sparsity < 1:
        raise UsageError(f"target_sparsity={target_sparsity!r}: a share of the weights, above 0 and below 1")
    if population < 4 or generations < 0:
        raise UsageError(f"population={population}, generations={generations}: at least 4, and at least 0")
    return _search(
        model,
        corpora(batches),
        targets(model, include, exclude),
        target_sparsity,
        prefill_ratio=prefill_ratio,
        population=population,
        generations=generations,
        seed=seed,
    )


def _search(
    model: nn.Module,
    data: Sequence[Corpus],
    layers: Sequence[Layer],
    sparsity: float,
    *,
    prefill_ratio: float,
    population: int = 16,
    generations: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    trials = _Trials(model, data, layers, sparsity, prefill_ratio)
    best = evolve(trials.loss, len(layers), population, generations, generator("r_sparse", seed))
    return {layer.name: ratio for layer, ratio in zip(layers, best.tolist())}


def evolve(
    loss: Callable[[Tensor], float], count: int, population: int, generations: int, draw: torch.Generator
) -> Tensor:
    """The best ρ (count, float64, within 0..1) of some generations; the first has 0.95 everywhere and variants of it.

    The better quarter survives. A child takes each ρ from one of two parents of the better half; one in ten moves by a
    normal step of 0.1, and at least one does.
    """

    def mutated(genes: Tensor, rate: float) -> Tensor:
        chosen = torch.rand(count, generator=draw, dtype=torch.float64) < rate
        chosen[int(torch.randint(count, (1,), generator=draw))] = True
        step = 0.1 * torch.randn(count, generator=draw, dtype=torch.float64)
        return torch.where(chosen, genes + step, genes).clamp(0, 1)

    start = torch.full((count,), _START, dtype=torch.float64)
    living = [start, *(mutated(start, 0.5) for _ in range(population - 1))]
    ranked = sorted(((loss(genes), i, genes) for i, genes in enumerate(living)), key=lambda each: each[:2])
    for _ in range(generations):
        elite, parents = ranked[: population // 4], ranked[: population // 2]
        children = []
        for i in range(population - len(elite)):
            a, b = (parents[int(k)][2] for k in torch.randperm(len(parents), generator=draw)[:2])
            mixed = torch.where(torch.rand(count, generator=draw, dtype=torch.float64) < 0.5, a, b)
            child = mutated(mixed, 0.1)
            children.append((loss(child), len(elite) + i, child))
        survivors = [(value, i, genes) for i, (value, _, genes) in enumerate(elite)]
        ranked = sorted([*survivors, *children], key=lambda each: each[:2])
    return ranked[0][2]


class _Trials:
    """A model whose layers answer as sparse ones would, for one recipe after the other; no module is replaced."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Corpus],
        layers: Sequence[Layer],
        sparsity: float,
        prefill_ratio: float,
    ) -> None:
        self.model, self.data, self.layers = model, data, layers
        self.sparsity, self.prefill_ratio = sparsity, prefill_ratio
        needs = {layer.name: ("magnitudes", "scaled_magnitudes") for layer in layers}
        self.seen = calibrate(model, data, layers, needs)
        # nothing but the low-rank part is the most rank that any ρ asks for
        self.parts = [_parts(layer, budget(layer.out, layer.in_, sparsity, 0.0)[1]) for layer in layers]

    def loss(self, ratios: Tensor) -> float:
        """The mean loss of all batches with these ρ (one a layer)."""
        with evaluating(self.model), self._sparse(ratios.tolist()), torch.no_grad():
            losses = [float(loss_of(self.model, batch)) for corpus in self.data for batch in corpus.batches]
        return sum(losses) / len(losses)

    @contextlib.contextmanager
    def _sparse(self, ratios: Sequence[float]) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for layer, parts, ratio in zip(self.layers, self.parts, ratios):
                hook = self._hook(layer, parts, ratio)
                hooks.callback(layer.module.register_forward_hook(hook).remove)
            yield

    def _hook(self, layer: Layer, parts: tuple[Tensor, Tensor, Tensor], ratio: float) -> Any:
        _, rank = budget(layer.out, layer.in_, self.sparsity, ratio)
        tau = threshold(self.seen[layer.name], self.sparsity, ratio)
        w, (up, down, scale) = layer.weight, parts
        up, down = up[:, :rank].to(w.dtype), down[:rank].to(w.dtype)
        scale = torch.ones_like(scale) if rank == 0 else scale

        def answer(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0]
            length = x.shape[-2] if x.dim() > 1 else 1
            whole = torch.atleast_2d(x.abs() * scale > tau)
            whole[..., : dense_tokens(length, self.prefill_ratio), :] = True
            rest = x.masked_fill(whole, 0)
            return y - functional.linear(rest, w) + functional.linear(functional.linear(rest, down), up)

        return answer
