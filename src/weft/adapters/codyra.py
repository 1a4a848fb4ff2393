"""CoDyRA: a gated LoRA for each task of a stream, pruned while it trains and merged before the next task.

Haodong Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models
with Dynamic Rank-Selective LoRA", 2024, arXiv 2412.01004.

    task t     y = x·W'ᵀ + ((x·Aᵀ) ∘ g)·Bᵀ,  W' = W_{t−1}      A: r × in,  B: out × r,  g: r; no factor α / r
    its end    W_t = W_{t−1} + B·diag(g)·A over g ≠ 0

A is Kaiming-uniform, B zero, g standard normal, drawn from (seed, task, module), so ΔW = 0 at the start of each task.
All three are stepped by the run's optimiser together; then, for a task of T steps of which the share d is dense,

    g ← sign(g)·max(|g| − κ_i, 0)  after step i > d·T

κ rises through `lambda_num` evenly spaced levels from 0 to `max_kappa`, one level every ⌊(T − d·T) / lambda_num⌋ steps
from step d·T on. Where that is 0, because the task is short, κ never rises, nothing is pruned, and a warning says so.
Over the task a gate that no gradient holds loses the sum of all κ, 0.6 at the defaults with T = 500: tune `max_kappa`
to T. The paper writes this as a penalty λ·Σ|g|; like the authors' code there is none in the loss here, as the prox is
that penalty. `prox="reference"` is the operator of that code: entries between κ and 2κ become zero too.

`model = weft.next_task(model)` ends a task: it adds what survived to the weight in float32, rounds once to the weight's
dtype, and attaches a fresh adapter of full rank, for which a fresh optimiser is built. With `history` the weight stays
as it was, and what survived stays beside it, frozen, saved and exported with the rest: one LoRA whose rank is the sum
of all tasks', which rounds nothing and merges once, in the end. It costs its rank in every forward pass until then.

The authors step with AdamW at β = (0.9, 0.9999), which is `adam_beta2` of TrainingArguments, and train every linear
layer of both of CLIP's encoders; the loss here is the task's own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Site
from weft.adapters._gated import PrunedDelta
from weft.algebra.prox import levels
from weft.algebra.random import generator
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title=(
        "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with "
        "Dynamic Rank-Selective LoRA"
    ),
    arxiv="2412.01004",
    year=2024,
    summary="for tasks in sequence: a gated LoRA that loses rank while it trains and is merged before the next task",
    recipe={"learning_rate": 5e-4, "weight_decay": 0.0, "warmup_ratio": 0.0, "lr_scheduler_type": "cosine"},
    limitations=(
        "How much is pruned hangs on the number of steps: the thresholds add up over a task, and a short one prunes "
        "little. A merged task cannot be taken out again."
    ),
    reasons={"file": "With a history, A_old and B_old: what finished tasks have left is nowhere else."},
)

UNKNOWN_LENGTH = 500  # steps, as in the authors' launcher
logger = logging.getLogger("weft")


@dataclass
class CodyraConfig(AdapterConfig):
    """Options of CoDyRA."""

    r: int = field(default=16, metadata={"help": "components a layer starts every task with"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    max_kappa: float = field(default=5e-3, metadata={"help": "κ of the last level", "short": 0.1})
    lambda_num: int = field(default=50, metadata={"help": "levels of κ, the first of which is 0", "short": 3})
    dense_iters: float = field(default=0.5, metadata={"help": "d, the share of a task's steps before the first prox"})
    prox: str = field(default="soft", metadata={"help": "soft (the paper's operator) or reference (the authors' code)"})
    total_steps: int | None = field(
        default=None, metadata={"help": "T, steps of a task, where weft's optimiser does not know them", "short": 10}
    )
    history: bool = field(
        default=False, metadata={"help": "at a task's end, keep what survived beside the weight and merge nothing"}
    )
    seed: int = field(default=0, metadata={"help": "draws the gates, with the task and the module"})
    # by module, the rank that finished tasks have left beside its weight
    history_ranks: dict[str, int] = field(default_factory=dict, metadata={"stored": True})

    def validate(self) -> None:
        super().validate()
        if self.prox not in ("soft", "reference"):
            raise UsageError(f"prox={self.prox!r}: use soft or reference")
        if not 0 <= self.max_kappa < math.inf:
            raise UsageError(f"max_kappa={self.max_kappa} must be 0, which prunes nothing, or above")
        if self.lambda_num < 2:
            raise UsageError(f"lambda_num={self.lambda_num} must be at least 2: the first level is 0")
        if not 0 <= self.dense_iters < 1:
            raise UsageError(f"dense_iters={self.dense_iters} is not a share of at least 0 and below 1")
        if self.total_steps is not None and self.total_steps < 1:
            raise UsageError(f"total_steps={self.total_steps} must be at least 1")

    def dense(self, total: int) -> float:
        """d·T, unmoved by rounding errors of the product."""
        return round(self.dense_iters * total, 6)

    def interval(self, total: int) -> int:
        """Steps from one level to the next; 0: the first level stays."""
        return math.floor((total - self.dense(total)) / self.lambda_num)

    def kappa(self, step: int, total: int) -> float:
        """κ at a step, counted from 0, of a task of `total` steps.

        >>> [CodyraConfig(max_kappa=0.2, lambda_num=3).kappa(step, 8) for step in range(8)]
        [0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.2, 0.2]
        """
        interval = self.interval(total)
        if interval == 0 or step < self.dense(total):
            return 0.0
        raised = step // interval - math.ceil(self.dense(total) / interval) + 1  # multiples of interval since d·T
        return levels(0.0, self.max_kappa, self.lambda_num, "linear")[min(raised, self.lambda_num - 1)]


class CodyraDelta(PrunedDelta):
    """ΔW = B·diag(g)·A, and B_old·A_old of finished tasks beside it where there is a history."""

    A_old: Tensor | None
    B_old: Tensor | None
    config: CodyraConfig

    def __init__(self, config: CodyraConfig, site: Site) -> None:
        super().__init__(config, site)
        drawn = torch.randn(self.r, generator=generator(config.seed, "codyra", config.finished_tasks(), site.name))
        self.g = nn.Parameter(site.empty(self.r).copy_(drawn))
        old = config.history_ranks.get(site.name) if site.stored else None
        # None is no tensor in the file
        self.register_buffer("A_old", None if old is None else site.empty(old, site.in_))
        self.register_buffer("B_old", None if old is None else site.empty(site.out, old))

    def factors(self) -> tuple[Tensor, Tensor]:
        b, a = super().factors()
        if self.A_old is None or self.B_old is None:
            return b, a
        return torch.cat([self.B_old, b], dim=1), torch.cat([self.A_old, a])

    @torch.no_grad()
    def legacy(self) -> dict[str, Tensor] | None:
        if not self.config.history:
            return None
        b, a = self.factors()
        return {"A": a.clone(), "B": b.clone()}

    def inherit(self, legacy: Mapping[str, Tensor]) -> None:
        self.A_old, self.B_old = legacy["A"], legacy["B"]
        self.config.history_ranks[self.name] = len(legacy["A"])

    def controller_class(self) -> type[Controller]:
        return CodyraController


class CodyraController(Controller):
    """Applies the prox after each step behind the dense ones."""

    events = True

    def length(self) -> int:
        """T."""
        return self.config.total_steps or self.total_steps or UNKNOWN_LENGTH

    def after_step(self) -> None:
        total = self.length()
        if self.step == 0:
            self._warn(total)
        if self.step > self.config.dense(total):
            kappa = self.config.kappa(self.step, total)
            for d in self.deltas:
                d.shrink(kappa, self.config.prox)

    def _warn(self, total: int) -> None:
        """Say what the length of the task does to its pruning, where that is not what was meant."""
        if not (self.config.total_steps or self.total_steps):
            logger.warning(
                "codyra does not know the length of the task and takes %d steps: set total_steps, or build the "
                "optimiser with weft.optimizer_and_scheduler", UNKNOWN_LENGTH,
            )  # fmt: skip
        if self.config.interval(total) == 0:
            logger.warning(
                "codyra prunes nothing: %d steps, %.0f of them dense, are too few for lambda_num=%d levels; lower "
                "lambda_num or dense_iters", total, self.config.dense(total), self.config.lambda_num,
            )  # fmt: skip
