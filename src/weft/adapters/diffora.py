"""DiffoRA: gates trained on held-out rows choose the modules that get a LoRA of their own.

T. Jiang, H. Wang and C. Yuan, "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix
Adaptation", 2025, arXiv 2502.08905.

    search       y = x·Wᵀ + f(a_lm)·s·(x·Aᵀ)·Bᵀ                s = α / r;  A: r × in,  B: out × r
    fine-tune    y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ where Γ_lm = 1, and s·(x·A_sᵀ)·B_sᵀ elsewhere;  Γ is 0 or 1

a (layers × modules of a layer) is zero and f the sigmoid, or with relaxation="softmax_row" the softmax over a layer. A
is Kaiming-uniform, B zero, so ΔW = 0 at the start. Every step of the search moves A and B on the training batch, then a
on a held-out batch, with the optimiser of DARTS: Adam with `arch_lr`, β = (0.5, 0.999) and a small decay. This is the
first-order form of min over a of L_val(w*(a), a): the weights at hand stand for w*. Weights move first, because at
B = 0 the gradient of a is zero. After `search_steps` each layer keeps its K = ⌈ρ·M⌉ modules of largest a (ties: the
first), selection="global" the ⌈ρ·all⌉ of the model.

`weft.prepare(model, config, held_out=...)` takes the held-out batches, which training should not see: on the training
rows a would only learn that every gate helps. (`weft adapt` and `weft compare` hold out one training row in ten, 256 at
most, for the whole run.) Each step of the search takes the next batch, and costs one forward and backward pass more;
then a step costs what LoRA's does. The pass leaves no trace but in a: running statistics are put back, dropout has a
stream of its own, and .grad is not touched. The gate multiplies B, so that its gradient is ⟨∂L/∂B, B⟩ / f. a is no
Parameter: the run's optimiser would train it on the training rows.

A layer is what shares the first number in the module's name, and a module's type is its name without that number. The
unselected modules of one type and shape share one pair A_s, B_s: a single Parameter each, held and saved by the first
module of the type, closed until the search ends (no gradient, decay or momentum) like the pairs of unselected modules
afterwards, which files leave out. A type that occurs once shares with nobody and has no such pair.

Decided where the paper is silent: selected pairs start anew after the search, A drawn from (seed, step, module), and
what the optimiser remembers of them is cleared; restart=False keeps them, B multiplied by its gate so that outputs do
not jump. Where all modules of each layer are kept, as for ρ = 1, there is nothing to search: it is LoRA from the start.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._core import on_meta
from weft.adapters._delta import LowRankDelta, Site
from weft.algebra.random import generator
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
    arxiv="2502.08905",
    year=2025,
    summary="gates trained on held-out rows choose the modules that get a LoRA; the others share one pair a type",
    recipe={"learning_rate": 5e-4, "weight_decay": 0.0, "warmup_ratio": 0.06, "lr_scheduler_type": "linear"},
    needs=("held_out",),
    limitations=(
        "The search trains a LoRA on every module, with twice the passes, and what it learned is dropped unless "
        "restart=False. Gates move by arch_lr a step and only their order counts. Gradient checkpointing must be the "
        "non-reentrant kind. Γ is fixed after the search; the saved adapter is small, the training memory is not."
    ),
)

SEARCHED, OWN, SHARED, UNUSED = range(4)  # how a module's pair is used
ARCH_BETAS, ARCH_EPS = (0.5, 0.999), 1e-8
logger = logging.getLogger("weft")


@dataclass
class DifforaConfig(AdapterConfig):
    """Options of DiffoRA."""

    r: int = field(default=8, metadata={"help": "rank of every pair"})
    lora_alpha: float = field(default=16.0, metadata={"help": "α; ΔW is scaled by α / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    rho: float = field(default=0.5, metadata={"help": "ρ, the share of a layer's modules that is kept"})
    search_steps: int | None = field(
        default=None,
        metadata={"help": "optimiser steps of the search; a tenth of the run, but 10, if not given", "short": 3},
    )
    arch_lr: float = field(default=3e-4, metadata={"help": "learning rate of the gates a", "short": 0.05})
    arch_weight_decay: float = field(default=1e-3, metadata={"help": "decay of a, added to its gradient"})
    relaxation: Literal["sigmoid", "softmax_row"] = field(
        default="sigmoid", metadata={"help": "f: sigmoid, or softmax_row over the modules of a layer"}
    )
    selection: Literal["row", "global"] = field(
        default="row", metadata={"help": "keep the best of each layer (row) or of the model (global)"}
    )
    weight_sharing: Literal["shared_pair", "none"] = field(
        default="shared_pair", metadata={"help": "what unselected modules get: shared_pair (one a type) or none"}
    )
    restart: bool = field(default=True, metadata={"help": "start the selected pairs anew after the search"})
    seed: int = field(default=0, metadata={"help": "draws the pairs that start anew"})

    def validate(self) -> None:
        super().validate()
        if not 0 < self.rho <= 1:
            raise UsageError(f"rho={self.rho}: the share of modules to keep is above 0 and at most 1")
        if self.search_steps is not None and self.search_steps < 1:
            raise UsageError(f"search_steps={self.search_steps} must be at least 1")
        if not (self.arch_lr > 0 and math.isfinite(self.arch_lr)):
            raise UsageError(f"arch_lr={self.arch_lr} must be above 0")
        if not 0 <= self.arch_weight_decay < math.inf:
            raise UsageError(f"arch_weight_decay={self.arch_weight_decay} must not be below 0")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r}: use {' or '.join(known)}")


_CHOICES = {
    "relaxation": ("sigmoid", "softmax_row"),
    "selection": ("row", "global"),
    "weight_sharing": ("shared_pair", "none"),
}


def place(name: str) -> tuple[str, str]:
    """The layer that a module belongs to, and its type.

    >>> place("model.layers.3.mlp.up_proj")
    ('model.layers.3', 'model.layers.*.mlp.up_proj')
    """
    number = re.search(r"(?:^|\.)(\d+)(?=\.|#|$)", name)
    if number is None:
        return "", name
    return name[: number.end()], f"{name[: number.start(1)]}*{name[number.end() :]}"


def kept(rho: float, count: int) -> int:
    """⌈ρ·count⌉, unmoved by rounding errors of the product.

    >>> kept(0.1, 30), kept(0.5, 7)
    (3, 4)
    """
    return math.ceil(rho * count - 1e-9)


class DifforaDelta(LowRankDelta):
    """ΔW = s·f·B·A, or s·B_s·A_s; which of them is a tensor, so that a compiled forward is one graph for both."""

    use: Tensor
    gate: Tensor

    def __init__(self, config: DifforaConfig, site: Site) -> None:
        super().__init__(config, site)
        if not (site.stored or on_meta(site) or hasattr(config, "prepared")):
            raise UsageError(
                f"diffora chooses by held-out rows whether {site.name} gets a LoRA: call weft.prepare(model, config, "
                "held_out=...) on this model, each time before attaching"
            )
        r = site.check_rank(config.r)
        self.scale = config.lora_alpha / r
        self.r = r if site.rank is None else site.rank  # 0: the file left the pair out
        self.owner: tuple[DifforaDelta, ...] = ()  # whose A_s and B_s stand in; a tuple, so that it is no submodule
        self.A = nn.Parameter(site.empty(self.r, site.in_))
        self.B = nn.Parameter(torch.zeros_like(site.empty(site.out, self.r)))
        self.A_s = nn.Parameter(site.empty(r, site.in_))
        self.B_s = nn.Parameter(torch.zeros_like(site.empty(site.out, r)))
        for a in (self.A, self.A_s):
            if len(a):
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.register_buffer("use", torch.tensor(SEARCHED, dtype=torch.uint8, device=site.device))
        self.register_buffer("gate", torch.ones_like(site.empty()))

    @classmethod
    def finish(cls, config: DifforaConfig, deltas: list[Any]) -> None:
        types: dict[Any, list[DifforaDelta]] = {}
        for d in deltas:
            types.setdefault((place(d.name)[1], d.out, d.in_), []).append(d)
        for members in types.values():
            sharing = config.weight_sharing == "shared_pair" and config.rho < 1 and len(members) > 1
            for d in members:
                if sharing:
                    d.owner = (members[0],)
                if not sharing or d is not members[0]:
                    del d.A_s, d.B_s

    @property
    def owns(self) -> bool:
        """Whether the pair that its type shares is here."""
        return bool(self.owner) and self.owner[0] is self

    def factors(self) -> tuple[Tensor, Tensor]:
        a: Tensor = self.A
        b: Tensor = self.B
        if self.owner:
            shared_a, shared_b = (p.to(a.device) for p in (self.owner[0].A_s, self.owner[0].B_s))
            if self.r == 0:
                a, b = shared_a, shared_b
            else:
                shared = self.use == SHARED
                a, b = torch.where(shared, shared_a, a), torch.where(shared, shared_b, b)
        elif not (self.training or torch.compiler.is_compiling()) and int(self.use) == UNUSED:
            return b[:, :0], a[:0]
        return b * (self.scale * self.gate), a

    @torch.no_grad()
    def settle(self, use: int, gate: float) -> None:
        """How the pair is used from now on, and what it is multiplied by."""
        self.use.fill_(use)
        self.gate.fill_(gate)

    @torch.no_grad()
    def restart(self, step: int) -> None:
        """A fresh start, a function of (seed, step, module)."""
        source = generator(self.config.seed, "diffora", step, self.name)  # type: ignore[attr-defined]
        drawn = torch.rand(self.A.shape, generator=source, dtype=torch.float64)
        self.A.copy_((2 * drawn - 1) / math.sqrt(self.in_))
        self.B.zero_()

    def compact(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
        if int(tensors["use"]) in (SEARCHED, OWN):
            return tensors, None
        return {**tensors, "A": tensors["A"][:0], "B": tensors["B"][:, :0]}, 0

    def expand(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        here = self.state_dict()
        return {name: here[name].clone() if t.numel() == 0 else t for name, t in tensors.items()}

    def count(self) -> int:
        return self.r * (self.in_ + self.out) + self.spare()

    def spare(self) -> int:
        # a shared pair is open only when other pairs have closed
        return len(self.A_s) * (self.in_ + self.out) if self.owns else 0

    def controller_class(self) -> type[Controller]:
        return DifforaController


class DifforaController(Controller):
    """Trains a on held-out batches, makes Γ of it, and opens what Γ asks for."""

    events = True

    def __init__(self, config: Any, deltas: list[Any]) -> None:
        self.held: tuple[nn.Module, list[Any]] | None = config.__dict__.pop("prepared", None)
        self.rows = _rows(config, deltas)
        self.a = torch.zeros(len(deltas), dtype=torch.float64)
        self.m, self.v = torch.zeros_like(self.a), torch.zeros_like(self.a)  # of Adam
        self.chosen = -1  # the first step with Γ
        super().__init__(config, deltas)
        if config.is_stored:
            return
        if all(kept(config.rho, len(row)) == len(row) for row in self.rows):
            if config.rho < 1:
                logger.warning(
                    "diffora keeps every module: no layer has enough of them to leave one out at rho=%g; "
                    "selection=global chooses among all", config.rho,
                )  # fmt: skip
            for d in deltas:
                d.settle(OWN, 1.0)
            self.held = None
        else:
            self._publish()

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        self._uses: list[int] | None = None

    def uses(self) -> list[int]:
        """How each module's pair is used; read from the device once after a change."""
        if self._uses is None:
            self._uses = [int(d.use) for d in self.deltas]
        return self._uses

    def forget(self, delta: Any) -> None:
        super().forget(delta)
        self._uses = None

    @property
    def searching(self) -> bool:
        return self.held is not None and SEARCHED in self.uses()

    def search_length(self) -> int:
        """Optimiser steps of the search."""
        if self.config.search_steps or self.total_steps is None:
            return self.config.search_steps or 100
        return max(1, min(max(10, self.total_steps // 10), self.total_steps // 2))

    # --- search -------------------------------------------------------------------------------------------------

    def relaxed(self, a: Tensor) -> Tensor:
        """f(a), module by module."""
        if self.config.relaxation == "sigmoid":
            return torch.sigmoid(a)
        return torch.cat([torch.softmax(a[row], 0) for row in self.rows])[_inverse(self.rows)]

    def _publish(self) -> None:
        for d, gate in zip(self.deltas, self.relaxed(self.a).tolist()):
            d.settle(SEARCHED, gate)

    def after_step(self) -> None:
        if not self.searching:
            return
        self._versions.clear()  # the weights have moved, and this is the event that says so
        with torch.enable_grad():
            a = self.a.clone().requires_grad_()
            gates = self.relaxed(a)
            (gradient,) = torch.autograd.grad(gates, a, self._gradient(gates.detach()))
        gradient = gradient + self.config.arch_weight_decay * self.a
        b1, b2 = ARCH_BETAS
        t = self.step + 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        self.a = self.a - self.config.arch_lr * (self.m / (1 - b1**t)) / ((self.v / (1 - b2**t)).sqrt() + ARCH_EPS)
        if t >= self.search_length():
            self._choose()
        else:
            self._publish()

    def _gradient(self, gates: Tensor) -> Tensor:
        """∂L/∂f of the next held-out batch, module by module, equal in all processes."""
        assert self.held is not None
        model, batches = self.held
        lead = self.deltas[0].B
        batch = send_to_device(dict(batches[self.step % len(batches)]), lead.device)
        statistics = [(b, b.clone()) for b in model.buffers()]
        devices = sorted({d.B.device.index for d in self.deltas if d.B.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(generator(self.config.seed, "diffora", self.step).initial_seed())
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise UsageError("the model returned no loss for a held-out batch: batches must carry labels")
            found = torch.autograd.grad(loss, [d.B for d in self.deltas], allow_unused=True)
        with torch.no_grad():
            for b, before in statistics:
                b.copy_(before)
        if all(g is None for g in found):
            raise UsageError("diffora was prepared on another model than it adapts: call weft.prepare on this one")
        with torch.no_grad():
            products = [d.B.new_zeros(()) if g is None else (g * d.B).sum() for g, d in zip(found, self.deltas)]
            gradient = torch.stack([p.to(lead.device) for p in products])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(gradient, 0)  # a choice must not hang on the last bits
        return gradient.to(gates) / gates

    # --- the choice ---------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Γ, and what follows from it for every pair."""
        a, gates = self.a.tolist(), self.relaxed(self.a).tolist()
        best = (sorted(row, key=lambda i: (-a[i], i))[: kept(self.config.rho, len(row))] for row in self.rows)
        chosen = {i for row in best for i in row}
        for i, d in enumerate(self.deltas):
            if i not in chosen:
                d.settle(SHARED if d.owner else UNUSED, 1.0 if d.owner else 0.0)
                continue
            d.settle(OWN, 1.0)
            if self.config.restart:
                d.restart(self.step)
            else:
                d.B.mul_(gates[i])
        self._uses = None
        self.chosen = self.step + 1
        self.held = None  # the held-out rows, and the model, are needed no more

    def update_scales(self) -> dict[Tensor, Tensor]:
        uses = self.uses()
        shared = {id(d.owner[0]) for d, use in zip(self.deltas, uses) if use == SHARED}
        closed: list[Tensor] = []
        for d, use in zip(self.deltas, uses):
            closed += [d.A, d.B] if use in (SHARED, UNUSED) else []
            closed += [d.A_s, d.B_s] if d.owns and id(d) not in shared else []
        return {p: p.new_zeros(()) for p in closed}

    # --- time ---------------------------------------------------------------------------------------------------

    def started(self, optimizer: Optimizer) -> None:
        if self.step == 0 and self.searching and (self.total_steps or math.inf) <= self.search_length():
            logger.warning(
                "diffora searches for %d steps of %s: none is left to train the chosen modules; lower search_steps",
                self.search_length(), self.total_steps,
            )  # fmt: skip
        if self.step == self.chosen:
            self._clear(optimizer)
        super().started(optimizer)

    def _clear(self, optimizer: Optimizer) -> None:
        """Pairs that start now do so without momentum, and count their own steps."""
        closed = self.update_scales()
        for d in self.deltas:
            fresh = [d.A, d.B] if self.config.restart else []
            fresh += [d.A_s, d.B_s] if d.owns else []
            for p in [p for p in fresh if p not in closed]:
                for value in optimizer.state.get(p, {}).values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def state(self) -> dict[str, Tensor]:
        return {"a": self.a, "m": self.m, "v": self.v, "chosen": torch.tensor(self.chosen)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.a, self.m, self.v = (state[name].cpu().clone() for name in ("a", "m", "v"))
        self.chosen = int(state["chosen"])
        self._uses = None
        if SEARCHED not in self.uses():
            self.held = None


def _rows(config: Any, deltas: list[Any]) -> list[list[int]]:
    """Indices of the modules that compete with each other: those of a layer, or all."""
    rows: dict[str, list[int]] = {}
    for i, d in enumerate(deltas):
        rows.setdefault("" if config.selection == "global" else place(d.name)[0], []).append(i)
    return list(rows.values())


def _inverse(rows: list[list[int]]) -> list[int]:
    """Where each module stands once the rows are laid end to end."""
    order = [i for row in rows for i in row]
    return sorted(range(len(order)), key=order.__getitem__)


def prepare(model: nn.Module, config: DifforaConfig, *, held_out: Iterable[Any]) -> None:
    """Keep the held-out batches, and the model to run them through, for the next attachment of `config`.

    Args:
        model: the model that will be adapted; its forward returns an output with `loss`.
        config: what is kept on it is handed over when attaching, and not saved with it.
        held_out: keyword arguments of the model's forward, labels included; one dictionary is one batch.
    """
    batches = [held_out] if isinstance(held_out, dict) else list(held_out)
    if not batches:
        raise UsageError("held_out holds no batch: diffora needs rows that training does not see")
    config.prepared = (model, batches)  # type: ignore[attr-defined]
