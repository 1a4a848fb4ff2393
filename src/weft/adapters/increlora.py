"""IncreLoRA: rank grows where a module's update matters most, until a budget is spent.

Feiyu Zhang et al., "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", 2023,
arXiv 2308.12043.

    ΔW = α / (n + 1e-5)·Σ_j B_j·E_j·A_j          A_j: 1 × in,  E_j: 1 × 1,  B_j: out × 1;  n components are active

A and B are normal with deviation 0.02, E is zero, so ΔW = 0 at the start. Advance learning: beside its n active
components a module carries k in reserve, whose E stays 1e-5 while their A and B train, so that they have a direction
when activated. Reserves act in training forwards only (|ΔW| of 1e-7 or so at the start); evaluation, merging and files
leave them out.

While the total rank is below target_rank · modules, every step scores, with final gradients and before the optimiser
moves,
    S = Σ|ΔW ∘ ∂L/∂ΔW| / √(out·in)      s ← β₁·s + (1 − β₁)·S      u ← β₂·u + (1 − β₂)·|S − s|      I = s·u
and when step > init_warmup and step mod incre_interval = 0 the top_h modules of largest I (ties: the first in the
model) get k components each, clamped to r_cap and to what the budget leaves; the authors' code may overshoot. At the
target the reserves are closed, and E of what is not active becomes zero. Where the length of the run is known and the
two intervals are not given, init_warmup is a tenth of the run and growth ends by its half; else both are 100.

The score is exact: ∂L/∂ΔW is dense and summed over micro-batches (4·out·in bytes a module, while ranks grow), and over
processes by one all-reduce of the same size a step. Scoring forwards fold ΔW into W where the layer allows it, for the
price of one more dense product; then the thin form takes over. Gradients dropped without a step count towards the next.

The objective carries reg_orth_coef · mean over factors of ‖P·Pᵀ − I‖_F, P being a module's stacked A or Bᵀ, reserves
included. Growth shrinks the existing update by n / (n + k), as in the authors' code; `preserve` scales E up to keep it.

Capacity for r_cap components (three times target_rank, at most a side of W) is allocated once and opened by a mask;
what is closed sees no decay, momentum or step, and no budget counts it: that is target_rank · Σ (in + out + 1), which a
run whose growth favours no size of module releases. The warm-up restarts for each component: at age a, counted from
the step in which it was opened (A, B: as reserve; E: as active), its step is multiplied by min(1, a / warmup_steps),
beside the run's own schedule, and for Adam and AdamW at step t by (1 − β₁ᵗ) / (1 − β₁ᵃ) · √((1 − β₂ᵃ) / (1 − β₂ᵗ)): its
own bias correction.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Delta, LowRankDelta, Site
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
    arxiv="2308.12043",
    year=2023,
    summary="rank grows component by component where a module's update matters most, until a budget is spent",
    knob="target_rank",
    recipe={"learning_rate": 8e-4, "lr_scheduler_type": "linear"},
    limitations=(
        "While ranks grow, each module costs one more dense product and a dense gradient (4·out·in bytes). Growth "
        "needs ceil((target_rank − r)·modules / (k·top_h)) events: raise top_h where the run is too short for them. "
        "The orthogonality penalty is made for losses near 1: lower reg_orth_coef for losses far below."
    ),
)

RESERVE = 1e-5  # E of a component in reserve
STABLE = 1e-5  # beside n in the divisor, as in the authors' code
INIT_STD = 0.02
logger = logging.getLogger("weft")


@dataclass
class IncreloraConfig(AdapterConfig):
    """Options of IncreLoRA."""

    target_rank: int = field(default=8, metadata={"help": "average rank of a module when growth ends"})
    r: int = field(default=1, metadata={"help": "rank that every module starts with"})
    r_cap: int | None = field(
        default=None, metadata={"help": "largest rank of a module; 3 · target_rank, at most a side of W, if not given"}
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "α; ΔW is scaled by α / n, with n the active rank"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    k: int | None = field(
        default=None, metadata={"help": "components a grown module gets; half of target_rank if not given"}
    )
    top_h: int = field(default=2, metadata={"help": "modules grown at once"})
    init_warmup: int | None = field(
        default=None, metadata={"help": "steps before the first growth; a tenth of the run if not given", "short": 2}
    )
    incre_interval: int | None = field(
        default=None,
        metadata={"help": "steps between growths; so that half of the run suffices if not given", "short": 1},
    )
    warmup_steps: int | None = field(
        default=None, metadata={"help": "warm-up of a new component; as init_warmup if not given", "short": 3}
    )
    beta1: float = field(default=0.85, metadata={"help": "β₁, memory of the average score"})
    beta2: float = field(default=0.85, metadata={"help": "β₂, memory of the score's uncertainty"})
    reg_orth_coef: float = field(default=0.1, metadata={"help": "coefficient of the orthogonality penalty"})
    advance_learning: bool = field(
        default=True, metadata={"help": "let the next components learn a direction in reserve"}
    )
    preserve: bool = field(default=False, metadata={"help": "keep the existing update's size when a module grows"})

    def validate(self) -> None:
        super().validate()
        if self.target_rank < self.r:
            raise UsageError(
                f"r={self.r} is larger than target_rank={self.target_rank}, the average rank to grow to: "
                "raise target_rank or lower r"
            )
        if self.r_cap is not None and self.r_cap < self.target_rank:
            raise UsageError(
                f"r_cap={self.r_cap} is below target_rank={self.target_rank}, which it must let modules reach"
            )
        for name in ("k", "top_h", "incre_interval", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        if self.init_warmup is not None and self.init_warmup < 0:
            raise UsageError(f"init_warmup={self.init_warmup} must not be below 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not a memory between 0 and 1")

    @property
    def step_size(self) -> int:
        """k: 1, 2, 3, 4 for a target rank of 2, 4, 6, 8."""
        return self.k or max(1, self.target_rank // 2)


class IncreloraDelta(LowRankDelta):
    """ΔW = α / (n + 1e-5)·B·diag(E)·A over the n active components, and those in reserve while training.

    Components are opened from the first to the last, so that two numbers describe the masks: how many are active, and
    how many are active or in reserve. Each exists as a tensor, for compiled forwards, and as a number, for everything
    that need not wait for the device.
    """

    config: IncreloraConfig
    n: Tensor
    opened: Tensor
    index: Tensor

    def __init__(self, config: IncreloraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.alpha = config.lora_alpha
        if site.rank is None:
            self.active = site.check_rank(config.r)
            self.capacity = min(config.r_cap or 3 * config.target_rank, site.out, site.in_)
        else:  # from a file: nothing is left to grow
            self.active = self.capacity = site.rank
        self.open = self.active
        self.probe: Tensor | None = None  # zeros that receive ∂L/∂ΔW; present while ranks grow
        self.A = nn.Parameter(site.empty(self.capacity, site.in_))
        self.B = nn.Parameter(site.empty(site.out, self.capacity))
        self.E = nn.Parameter(torch.zeros_like(site.empty(self.capacity)))
        nn.init.normal_(self.A, std=INIT_STD)
        nn.init.normal_(self.B, std=INIT_STD)
        self.register_buffer("n", torch.tensor(self.active, dtype=torch.int32, device=site.device))
        self.register_buffer("opened", self.n.clone(), persistent=False)
        self.register_buffer("index", torch.arange(self.capacity, device=site.device), persistent=False)

    def arrange(self, active: int, reserve: int, growing: bool) -> None:
        """Let `active` components count and as many more as there is room for, up to `reserve`, learn beside them."""
        self.active, self.open = active, min(active + reserve, self.capacity)
        self.n.fill_(self.active)
        self.opened.fill_(self.open)
        self.probe = self._zeros() if growing else None

    def _zeros(self) -> Tensor:
        # a leaf of four bytes: autograd adds up its gradient, whatever the number of micro-batches
        zero = torch.zeros((), dtype=self.A.dtype, device=self.A.device)
        return zero.expand(self.out, self.in_).requires_grad_()

    def _apply(self, fn: Any, recurse: bool = True) -> Delta:
        super()._apply(fn, recurse)
        if self.probe is not None:
            self.probe = self._zeros()
        return self

    def _scores(self) -> bool:
        return self.training and self.probe is not None and torch.is_grad_enabled()

    def gate(self, reserves: bool) -> Tensor:
        """(capacity,): E if active, RESERVE if in reserve, 0 if closed, times α / (n + 1e-5)."""
        zero = torch.zeros_like(self.E)
        other = torch.where(self.index < self.opened, RESERVE, zero) if reserves else zero
        return torch.where(self.index < self.n, self.E, other) * (self.alpha / (self.n.to(self.E.dtype) + STABLE))

    def factors(self) -> tuple[Tensor, Tensor]:
        growing = self.training and self.probe is not None
        gate = self.gate(reserves=growing)
        if growing or torch.compiler.is_compiling():
            return self.B * gate, self.A
        return self.B[:, : self.active] * gate[: self.active], self.A[: self.active]

    def delta(self) -> Tensor:
        b, a = self.factors()
        if self.probe is None or not self._scores():
            return b @ a
        return torch.addmm(self.probe, b, a)

    @torch.no_grad()
    def score(self, gradient: Tensor) -> Tensor:
        """S for ∂L/∂ΔW (out × in), reserves included."""
        update = (self.B * self.gate(reserves=True)) @ self.A
        return update.mul_(gradient).abs_().sum() / (self.out * self.in_) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return Delta.forward(self, x) if self._scores() else super().forward(x)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        return Delta.add(self, y, x) if self._scores() else super().add(y, x)

    def folds(self, x: Tensor) -> bool:
        return self._scores() and not self.dropout  # dropout acts on the adapter's input alone

    def compact(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
        n = int(tensors["n"])
        return {"A": tensors["A"][:n], "B": tensors["B"][:, :n], "E": tensors["E"][:n], "n": tensors["n"]}, n

    def expand(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        full = {name: t.detach().clone() for name, t in self.state_dict().items()}
        n = len(tensors["E"])
        if n > self.capacity:
            raise UsageError(f"{self.name} has rank {n} in the file and room for {self.capacity} here: raise r_cap")
        full["A"][:n], full["B"][:, :n], full["E"][:n] = tensors["A"], tensors["B"], tensors["E"]
        return {**full, "n": tensors["n"]}

    def count(self) -> int:
        return self.capacity * (self.in_ + self.out + 1)

    def spare(self) -> int:
        unused = 0 if self.config.is_stored else max(0, self.capacity - self.config.target_rank)
        return unused * (self.in_ + self.out + 1)

    def controller_class(self) -> type[Controller]:
        return IncreloraController


class IncreloraController(Controller):
    """Scores modules, gives them components, and lets every component start anew."""

    events = True

    def __init__(self, config: Any, deltas: list[Any]) -> None:
        super().__init__(config, deltas)
        room = sum(d.capacity for d in deltas)
        self.target = config.target_rank * len(deltas)
        if room < self.target and not config.is_stored:
            raise UsageError(
                f"target_rank={config.target_rank} asks for {self.target} components over {len(deltas)} modules, whose "
                f"sides (and r_cap) leave room for {room}"
            )
        self.target = min(self.target, room)
        size = len(deltas), max(d.capacity for d in deltas)
        self.sens = torch.zeros(len(deltas))  # s and u of every module
        self.unc = torch.zeros(len(deltas))
        self.born = torch.full(size, -1)  # the step in which A and B of a component took their first step; -1: closed
        self.activated = torch.full(size, -1)  # the same for E
        self.betas: tuple[float, float] | None = None
        self._arrange(first=0)
        self._close()

    @property
    def growing(self) -> bool:
        return sum(d.active for d in self.deltas) < self.target

    def _arrange(self, first: int) -> None:
        """Bring masks and births in line with the active ranks; what opens now takes its first step in step `first`."""
        growing = self.growing
        reserve = self.config.step_size if growing and self.config.advance_learning else 0
        for i, d in enumerate(self.deltas):
            d.arrange(d.active, reserve, growing)
            for births, end in ((self.born, d.open), (self.activated, d.active)):
                fresh = births[i, :end]
                fresh[fresh < 0] = first

    def _close(self) -> None:
        """At the target: nothing is left in reserve."""
        if not self.growing:
            with torch.no_grad():
                for d in self.deltas:
                    d.E[d.active :] = 0

    def plan(self) -> tuple[int, int, int]:
        """init_warmup, incre_interval and warmup_steps in force."""
        c, total = self.config, self.total_steps
        start = c.init_warmup if c.init_warmup is not None else 100 if total is None else total // 10
        known = 100 if total is None else max(1, (total // 2 - start) // max(1, self._events()))
        return start, c.incre_interval or known, c.warmup_steps or max(1, start)

    def _events(self) -> int:
        """Growths that it takes from the first rank to the target."""
        return -(-(self.target - self.config.r * len(self.deltas)) // (self.config.step_size * self.config.top_h))

    # --- growth -------------------------------------------------------------------------------------------------

    def started(self, optimizer: Optimizer) -> None:
        lead = self.lead()
        group = next(g for g in optimizer.param_groups if any(p is lead for p in g["params"]))
        self.betas = tuple(map(float, group["betas"])) if isinstance(optimizer, Adam) else None  # type: ignore[assignment]
        if self.step == 0 and self.growing:
            self._warn_if_short()
        super().started(optimizer)

    def _warn_if_short(self) -> None:
        if self.total_steps is None:
            return
        start, interval, _ = self.plan()
        events = sum(step > start and step % interval == 0 for step in range(self.total_steps))
        if events < self._events():
            logger.warning(
                "increlora grows %d times in %d steps and would need %d to reach target_rank=%d: "
                "raise top_h or k, or lower init_warmup or incre_interval",
                events, self.total_steps, self._events(), self.config.target_rank,
            )  # fmt: skip

    def before_step(self) -> None:
        if not self.growing:
            return
        gradients = self._gradients()
        if gradients is None:
            return
        lead = self.deltas[0].A
        scores = torch.stack([d.score(g).to(lead.device) for d, g in zip(self.deltas, gradients)])
        b1, b2 = self.config.beta1, self.config.beta2
        self.sens = b1 * self.sens.to(scores) + (1 - b1) * scores
        self.unc = b2 * self.unc.to(scores) + (1 - b2) * (scores - self.sens).abs()
        start, interval, _ = self.plan()
        if self.step > start and self.step % interval == 0:
            self._grow()

    def _gradients(self) -> list[Tensor] | None:
        """∂L/∂ΔW of every module, averaged over processes as DDP averages; None where no backward pass was seen."""
        found = [d.probe.grad for d in self.deltas]
        processes = torch.distributed.get_world_size() if _distributed() else 1
        if processes == 1 and all(g is None for g in found):
            return None
        gradients = [torch.zeros_like(d.probe).contiguous() if g is None else g for d, g in zip(self.deltas, found)]
        for d, g in zip(self.deltas, gradients):
            if processes > 1:
                torch.distributed.all_reduce(g)
                g /= processes
            d.probe.grad = None
        return gradients

    def _grow(self) -> None:
        importance = (self.sens * self.unc).tolist()
        open_ = [i for i, d in enumerate(self.deltas) if d.active < d.capacity]
        left = self.target - sum(d.active for d in self.deltas)
        for i in sorted(open_, key=lambda i: (-importance[i], i))[: self.config.top_h]:
            d = self.deltas[i]
            before = d.active
            d.active += min(self.config.step_size, d.capacity - before, left)
            left -= d.active - before
            d.E[before : d.active] = RESERVE if self.config.advance_learning else 0
            if self.config.preserve:
                d.E[: d.active] *= (d.active + STABLE) / (before + STABLE)
        self._arrange(first=self.step + 1)  # this step's gradients do not know the new components
        self._close()

    # --- every component in its own time ------------------------------------------------------------------------

    def update_scales(self) -> dict[Tensor, Tensor]:
        births = torch.stack([self.born, self.activated])  # 2 × modules × components
        factors = start_anew(births, self.step, self.plan()[2], self.betas)
        moved = factors.to(self.deltas[0].A)
        scales = {}
        for i, d in enumerate(self.deltas):
            if not bool((factors[:, i, : d.capacity] == 1).all()):
                ab, e = moved[:, i, : d.capacity].to(d.A)
                scales[d.A], scales[d.B], scales[d.E] = ab[:, None], ab, e
        return scales

    # --- what ties modules together, and time -------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        if not self.config.reg_orth_coef:
            return None
        stacks: dict[Any, list[tuple[Tensor, int]]] = {}
        for d in self.deltas:
            for p in (d.A, d.B.mT):
                stacks.setdefault((p.shape, p.device), []).append((p, d.open))
        distances = []
        for stack in stacks.values():
            p = torch.stack([t for t, _ in stack])  # modules × components × side
            ends = torch.tensor([end for _, end in stack], device=p.device)
            mask = (torch.arange(p.shape[1], device=p.device) < ends[:, None]).to(p.dtype)
            p = p * mask[:, :, None]
            distances.append(torch.linalg.norm(p @ p.mT - torch.diag_embed(mask), dim=(1, 2)))
        home = distances[0].device
        return self.config.reg_orth_coef * torch.cat([v.to(home) for v in distances]).mean()

    def forget(self, delta: Any) -> None:
        super().forget(delta)
        if not delta.n.is_meta:
            delta.active = int(delta.n)
            self._arrange(first=self.step)

    def state(self) -> dict[str, Tensor]:
        return {"sens": self.sens, "unc": self.unc, "born": self.born, "activated": self.activated}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.sens, self.unc = state["sens"].clone(), state["unc"].clone()
        self.born, self.activated = state["born"].cpu().clone(), state["activated"].cpu().clone()


def start_anew(births: Tensor, step: int, warmup: int, betas: tuple[float, float] | None) -> Tensor:
    """Factors on the steps of components, float64, from the steps in which they were born (-1: closed).

    0 before birth, then the restarted warm-up and Adam's bias correction for the component's age. Those born in step 0
    follow the run's schedule alone.
    """
    age = (step - births + 1).double()
    factor = torch.where(births == 0, 1.0, (age / warmup).clamp(max=1))
    if betas is not None:
        b1, b2 = betas
        t = step + 1
        own = age.clamp(min=1)
        correction = (1 - b1**t) / (1 - b1**own) * ((1 - b2**own) / (1 - b2**t)).sqrt()
        factor = torch.where(births == 0, 1.0, factor * correction)
    return torch.where((births < 0) | (age < 1), 0.0, factor)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
