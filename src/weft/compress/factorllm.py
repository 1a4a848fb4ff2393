"""FactorLLM: an MLP's units are split into experts, of which each token meets a few; a router learns which.

Zhongyu Zhao, Menghang Dong, Rongyu Zhang, Wenzhao Zheng, Yunpeng Zhang, Huanrui Yang, Dalong Du, Kurt Keutzer,
Shanghang Zhang, "FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models", arXiv 2408.11855.

    E_j(x) = Wd_j·(act(Wg_j·x) ∘ (Wu_j·x))                 Σ_j E_j is the MLP, whatever the units of the N experts
    y = (N // k)·Σ_j m_j·E_j(x)                            m: the k largest of r(x) = Wr·x + br, as ones and zeros

No weight changes by the split. The router has N·(d + 1) numbers a layer, drawn as nn.Linear's are; the paper writes
1R4E2K for one router, N = 4 and k = 2. Units are as evenly many as can be: where N does not divide them, the first
experts have one more. With `partition="kmeans"` alike units are together: those of near rows of Wg and Wu and columns
of Wd, each of length one and side by side; clusters that were of each matrix apart would tear units.

What it saves is reading and multiplying, k of N experts for a token: all is stored, and the router beside, so `keep`
does not apply. Without training much is lost. `weft compress --train` and `weft.distiller` train experts and routers,
the rest is frozen:

    loss = task + route_weight·Σ_layers L_PA + balance_weight·Σ_layers L_bal
    L_PA  = KL(softmax(r(t)) ‖ softmax(ℓ)),   ℓ: 1 for the k least ‖E_j(t) − T(t) / (N // k)‖², 0 for the others
    L_bal = Σ_j m_j·softmax(r(t))_j / N,      m: the k largest of r(t)

each a mean over the tokens that count, in float32. T is the dense MLP of the model from before, and t the prior, a
constant: what that MLP receives in that model (`prior_input="teacher"`), what the experts receive ("student", for which
only the MLPs of that model are run), or T of the layer before with nothing between ("chain", as in the authors' code;
the first t is what the first experts receive). m is a constant to the task, so routers learn by the prior alone, and
experts by the task.

To trip over: N // k is 1 for k > N/2, and less comes out than went in. softmax(ℓ) is soft, 0.366 and 0.134 for N = 4
and k = 2. The k least single errors are not the best k together. L_bal pushes down the shares of what is chosen; it
does not balance the experts' loads. The released training step returns the task's loss alone, with which routers stay
as they were drawn. The authors train 10,000 steps of 1,024 tokens, with betas of 0.9 and 0.95.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.algebra.kmeans import balanced_kmeans
from weft.algebra.random import generator
from weft.compress._allocate import Menus, Sizes
from weft.compress._config import CompressConfig
from weft.compress._distil import Objective, Seen
from weft.compress._factoriser import Factoriser, Tensors
from weft.compress._layers import Group, Layer, mlp, picked, targets
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.linear.routed_mlp import Expert, Experts, RoutedMlp, shares
from weft.registry import Card

CARD = Card(
    title="FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models",
    arxiv="2408.11855",
    year=2024,
    summary="an MLP's units in experts, of which a token meets a few, by a router that learns from the dense MLP",
    knob="target_sparsity",
    recipe={
        "learning_rate": 4e-5,
        "weight_decay": 1e-5,
        "max_grad_norm": 1.0,
        "warmup_ratio": 0.05,
        "lr_scheduler_type": "cosine",
    },
    limitations="Llama, Qwen2, Qwen3 and OPT only. The model is stored whole, with routers beside; for a token less of "
    "it is read. It is to be trained, beside a frozen copy of the dense model.",
    reasons={
        "keep": "it saves what is read of the weights for a token and not what is stored: all experts stay",
        "fixed_point": "a token meets a whole number of experts: the share that is read is the nearest below",
        "non_monotone": "a layer has one size, and what it loses is for the router to learn",
        "groups": "the matrices of an MLP share its units, and it knows them by their models",
        "leaves": "attention has no units to split",
    },
)


@dataclass
class FactorllmConfig(CompressConfig):
    """Options of FactorLLM."""

    keep: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "does not apply, as all weights stay: active or target_sparsity take its place"}
    )
    include: list[str] | str | None = field(
        default=None, metadata={"help": "what to split: name endings of MLPs or one regex; none takes all"}
    )
    allocate: Literal["uniform"] = field(
        default="uniform", metadata={"help": "every layer reads the same share of its weights"}
    )
    guard: bool = field(default=True, metadata={"help": "leave an MLP as it is where all experts would be active"})
    experts: int = field(default=4, metadata={"help": "N, the experts of a layer, 2 or more"})
    active: int | None = field(
        default=None, metadata={"help": "k, the experts that a token meets; none is as target_sparsity says"}
    )
    target_sparsity: float | None = field(
        default=None,
        metadata={"help": "share of the units that a token does not meet, up to a whole expert; none is a half"},
    )
    partition: Literal["contiguous", "random", "kmeans"] = field(
        default="contiguous", metadata={"help": "which units are together: as they lie, any, or alike ones"}
    )
    seed: int = field(default=0, metadata={"help": "draws routers, random partitions and the starts of k-means"})
    route_weight: float = field(default=0.05, metadata={"help": "weight of L_PA in training, at least 0"})
    balance_weight: float = field(default=0.01, metadata={"help": "weight of L_bal in training, at least 0"})
    prior_input: Literal["teacher", "student", "chain"] = field(
        default="teacher",
        metadata={"help": "what routers learn on: inputs of the dense model's MLPs, of the experts, or MLPs in a row"},
    )

    def validate(self) -> None:
        # not the checks of `keep`, which is all that methods share
        if self.keep is not None:
            raise UsageError(
                f"keep={self.keep!r} does not apply: factorllm stores all weights and saves reading them, so give "
                "active, or target_sparsity, the share that is not read"
            )
        if self.allocate != "uniform":
            raise UsageError(
                f"allocate={self.allocate!r} needs layers of many sizes, and here each reads the same share of its "
                "weights"
            )
        if isinstance(self.experts, bool) or not isinstance(self.experts, int) or self.experts < 2:
            raise UsageError(f"experts={self.experts!r} must be a whole number of at least 2")
        if self.active is not None:
            whole = isinstance(self.active, int) and not isinstance(self.active, bool)
            if not (whole and 1 <= self.active <= self.experts):
                raise UsageError(f"active={self.active!r}: of {self.experts} experts a token meets 1 to {self.experts}")
            share = 1 - self.active / self.experts
            if self.target_sparsity not in (None, share):
                raise UsageError(
                    f"target_sparsity={self.target_sparsity!r} and active={self.active} say different things: "
                    f"{self.active} of {self.experts} is {share:g}; give one of them"
                )
            self.target_sparsity = share
        if self.target_sparsity is None:
            self.target_sparsity = 0.5
        if not 0 <= self.target_sparsity < 1:
            raise UsageError(f"target_sparsity={self.target_sparsity!r}: a share of the units, at least 0, below 1")
        for name, known in (("partition", PARTITIONS), ("prior_input", PRIORS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        for name in ("route_weight", "balance_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a number of at least 0")

    @property
    def k(self) -> int:
        """How many experts a token meets."""
        assert self.target_sparsity is not None
        return self.active or max(int(self.experts * (1 - self.target_sparsity) + 1e-9), 1)


PARTITIONS = ("contiguous", "random", "kmeans")
PRIORS = ("teacher", "student", "chain")
_STEPS = 30  # of k-means


# --- the split --------------------------------------------------------------------------------------------------------


def unit_vectors(layers: Sequence[Layer]) -> Tensor:
    """A vector for each unit of an MLP: its row or column of every matrix, each of length one, side by side."""
    *into, out = (layer.wide for layer in layers)
    return torch.cat([nn.functional.normalize(w, dim=1) for w in (*into, out.mT)], dim=1)


class FactorllmFactoriser(Factoriser[FactorllmConfig]):
    """Units in the order of their experts, and a router's first values."""

    kind = "routed_mlp"
    nested = False

    @property
    def linear(self) -> bool:
        return self.config.k == self.config.experts

    def units(self, model: nn.Module) -> Sequence[Group]:
        free = {layer.name: layer for layer in targets(model, None, None)}
        found = [group for name, module in model.named_modules() if (group := mlp(name, module, free)) is not None]
        knows = "factorllm knows the MLPs of Llama, Qwen2, Qwen3 and OPT"
        groups = picked(found, knows, "mlp", model, self.config.include, self.config.exclude)
        few = next((group for group in groups if group.shape[0] < self.config.experts), None)
        if few is not None:
            raise UsageError(
                f"experts={self.config.experts}: {few.name} has {few.shape[0]} units, and an expert has one at least"
            )
        return groups

    def allocate(self, menus: Menus) -> Sizes:
        return {name: 0 if menu.sizes else None for name, menu in menus.items()}

    def sizes(self, layer: Group) -> Sequence[int]:
        return [] if self.linear and self.config.guard else [self.config.k]

    def bits(self, layer: Group, size: int) -> int:
        return layer.bits + self._router(layer)

    def reads(self, layer: Group, size: int) -> int:
        met = sum(shares(layer.shape[0], self.config.experts)[:size])  # of the largest experts
        return layer.bits // layer.shape[0] * met + self._router(layer)

    def _router(self, layer: Group) -> int:
        """Bits of a layer's router."""
        return self.config.experts * (layer.shape[1] + 1) * layer.parts[0].weight.element_size() * 8

    def operations(self, layer: Group) -> tuple[float, float]:
        numbers = sum(part.out * part.in_ for part in layer.parts)
        return (4.0 * _STEPS * self.config.experts * numbers if self.config.partition == "kmeans" else 0.0), 0.0

    def decompose(self, layer: Group, statistics: Any, size: int | None) -> Tensors:
        (units, width), config = layer.shape, self.config
        draw = generator("factorllm", config.seed, layer.name)
        order = torch.arange(units)
        if config.partition == "random":
            order = torch.randperm(units, generator=draw)
        if config.partition == "kmeans":
            found = balanced_kmeans(unit_vectors(layer.parts), shares(units, config.experts), draw, _STEPS)
            order = found.sort(stable=True).indices
        most = width**-0.5
        router = torch.empty(config.experts, width + 1, dtype=torch.float64).uniform_(-most, most, generator=draw)
        return {"order": order.int(), "router": router[:, :-1], "bias": router[:, -1]}

    def build(self, layer: Group, tensors: Tensors, size: int) -> Structured:
        raise NotImplementedError(f"{layer.name} is no layer of its own: replace() makes its module another")

    def replace(self, model: nn.Module, layer: Group, tensors: Tensors, size: int) -> str:
        name = layer.parts[0].name.rpartition(".")[0]
        module = model.get_submodule(name)
        made = RoutedMlp.of(module, experts=self.config.experts, active=size)
        model.set_submodule(name, made.fill(module, tensors["order"].long(), tensors["router"], tensors["bias"]))
        return made.kind


# --- the training -----------------------------------------------------------------------------------------------------


class FactorllmObjective(Objective[FactorllmConfig]):
    """L_PA and L_bal. Experts and routers train, and nothing else; routers that no weight teaches do not."""

    def __init__(self, config: FactorllmConfig, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, student, teacher)
        routed = {name: m for name, m in student.named_modules() if isinstance(m, RoutedMlp)}
        if not routed:
            raise UsageError("factorllm trains experts, and the student has none: compress it with factorllm first")
        self.experts = [module.inner for module in routed.values()]
        self.whole = [Expert.whole(teacher.get_submodule(name)) for name in routed]
        self.taught = config.route_weight > 0 or config.balance_weight > 0
        self.reads_teacher = self.taught and config.prior_input == "teacher"
        student.requires_grad_(False)
        for inner in self.experts:
            inner.requires_grad_(True)
            inner.router.requires_grad_(self.taught)

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        if not self.taught:
            return ()
        if model is self.student:
            return () if self.reads_teacher else self.experts
        return [getattr(dense, name) for dense in self.whole for name in (dense.into[0], dense.out)]

    def terms(self, student: Seen, teacher: Seen) -> list[Tensor]:
        if not self.taught:
            return []
        found = [learnt(inner, t, y) for inner, (t, y) in zip(self.experts, self._prior(student, teacher), strict=True)]
        route, balance = (sum(each).view(len(student.logits), -1) for each in zip(*found))  # type: ignore[union-attr]
        return [self.config.route_weight * route, self.config.balance_weight * balance]

    @torch.no_grad()
    def _prior(self, student: Seen, teacher: Seen) -> Iterator[tuple[Tensor, Tensor]]:
        """t and T(t) of each layer, tokens × d."""
        if self.reads_teacher:
            pairs = zip(teacher.parts[::2], teacher.parts[1::2])
            yield from ((_rows(t), _rows(y)) for (t, _), (_, y) in pairs)
            return
        t = _rows(student.parts[0][0])
        for dense, (received, _) in zip(self.whole, student.parts):
            t = _rows(received) if self.config.prior_input == "student" else t
            y = dense(t)
            yield t, y
            t = y


def _rows(x: Tensor) -> Tensor:
    """x (… × d) without a graph, tokens × d."""
    return x.detach().reshape(-1, x.shape[-1])


def label(inner: Experts, t: Tensor, y: Tensor) -> Tensor:
    """ℓ (tokens × N) for inputs t of which the dense MLP makes y: 1 for the k experts nearest to their share."""
    share = (y if inner.bias is None else y - inner.bias) / inner.scale
    wide = torch.promote_types(y.dtype, torch.float32)
    errors = torch.stack([(expert(t).to(wide) - share.to(wide)).square().mean(-1) for expert in inner.experts], -1)
    return torch.zeros_like(errors).scatter(-1, errors.topk(inner.active, largest=False).indices, 1.0)


def learnt(inner: Experts, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """L_PA and L_bal of each token, for inputs t (tokens × d) of which the dense MLP makes y."""
    t = t.to(inner.router.weight.dtype)
    with torch.no_grad():
        wanted = label(inner, t, y)
    logits = inner.router(t)
    own, theirs = logits.to(wanted.dtype).log_softmax(-1), wanted.log_softmax(-1)
    shares = own.exp()
    chosen = torch.zeros_like(shares).scatter(-1, inner.chosen(logits.detach()), 1.0)
    return (shares * (own - theirs)).sum(-1), (shares * chosen).mean(-1)
