"""Bayesian-LoRA: stochastic gates learn how many components a layer keeps and how many bits each factor needs.

Cristian Meo et al., "Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization levels and
Rank Values trough Differentiable Bayesian Gates", 2024, arXiv 2406.13046.

    y = x·Wᵀ + (α / r)·((x·Q(A)ᵀ) ∘ g ∘ Q(E))·Q(B)ᵀ             A: r × in,  E: r,  B: out × r
    Q(x) = x₂ + z₄·(x₄ + z₈·(x₈ + z₁₆·x₁₆))                      x_b: what rounding to b bits adds to fewer bits
         = Σ_b w_b·s_b·round(x / s_b),  s_b = 2β / (2^b − 1)     w = (1 − z₄, z₄·(1 − z₈), z₄·z₈·(1 − z₁₆), z₄·z₈·z₁₆)
    g = round(1, p₁, p₁·p₂, …)                                   a closed gate closes all later components

Every step size is an odd multiple of the next, so the residual roundings of the paper, taken before gating, add up to
plain roundings: each is made from x itself, and gates of 1, …, 1, 0, … give just the rounding to that many bits. x is
clipped to ±β; rounding passes gradients straight through, so ∂Q/∂x = 1 within the range and ∂Q/∂ln β = Q − x (Q where
clipped). A and B are normal with deviation 0.02, E is zero, so ΔW = 0 at the start.

A gate (z for bits, p for components) has one parameter φ, which starts at 6:
    training     clamp(1.2·σ((ln u − ln(1 − u) + φ) / (2/3)) − 0.1, 0, 1),  u uniform, of (seed, step, module)
    evaluation   1 if P(φ) > 0.66, else 0;  P(φ) = σ(φ + (2/3)·ln 11) is the probability of a sample above 0
A level of bits with φ ≤ −2 is skipped, and with it all finer ones. The objective carries, for every module,
    λ_q·Σ over A, E, B of (q₄ + q₄·q₈ + q₄·q₈·q₁₆) + λ_r·mean P(φ of p),      q = P(φ); E's sum is times that mean.
Sums over modules and not means, so that a gate's share does not shrink with the model. At φ = 6 samples are saturated:
at first only this penalty moves a gate, by `gates_lr` a step under Adam, and the task speaks once samples leave 1; from
6 to closed it takes some 700 steps at the default rate. Gates and ranges have parameter groups without decay, which
would reopen gates.

Decided where the paper is silent. Ranges are symmetric, and trained as β = e^ρ·max|x| over the components that
evaluation keeps, from ρ = 0: E starts at zero and outgrows any range that moves by a learning rate, and a closed
component must not widen the grid of those that are saved. Bits end at 16: float32 cannot hold finer steps. Base weights
and activations are not quantised.

Merging, saving and exporting mean the gates of evaluation: closed components are dropped, and a plain LoRA has the
rounded values, with E folded into B. `precision(model)` tells ranks and bits, `bit_operations(model)` what they cost.
Beside LoRA's products a training forward takes 4 roundings of A and B each and its backward pass 4 again, some
60·r·(in + out) operations a step whatever the number of tokens n, against LoRA's 6·n·r·(in + out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Group, Site, leaves
from weft.adapters._gated import GatedDelta
from weft.algebra.random import generator
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title=(
        "Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization levels and Rank Values "
        "trough Differentiable Bayesian Gates"
    ),
    arxiv="2406.13046",
    year=2024,
    summary="stochastic gates learn each layer's rank and the bits of each of its factors",
    recipe={"learning_rate": 1e-3, "weight_decay": 1e-3, "lr_scheduler_type": "linear"},
    limitations=(
        "Gates start open and fall by their own learning rate: in a run of a few hundred steps raise gates_lr, or "
        "lower phi_init, or none will close. Files hold full-precision factors of the learned rank; the bits are "
        "learned and counted, not packed."
    ),
)

TEMPERATURE = 2 / 3  # of the hard concrete distribution, which is stretched to (-0.1, 1.1)
LOW, HIGH = -0.1, 1.1
SHIFT = TEMPERATURE * math.log(HIGH / -LOW)  # P(φ) = σ(φ + SHIFT)
CERTAIN = 0.66  # the probability of being open above which evaluation opens a gate
SKIPPED = -2.0  # φ at which training leaves a level of bits out
CLOSED = -6.0  # φ of gates that a file left out
INIT_STD = 0.02
WIDTHS = (2, 4, 8, 16)


@dataclass
class BayesianLoraConfig(AdapterConfig):
    """Options of Bayesian-LoRA."""

    r: int = field(default=8, metadata={"help": "components a layer starts with"})
    lora_alpha: float = field(default=16.0, metadata={"help": "α; ΔW is scaled by α / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    lambda_q: float = field(default=1e-3, metadata={"help": "λ_q, coefficient of the expected levels of bits"})
    lambda_r: float = field(
        default=1e-3, metadata={"help": "λ_r, coefficient of the expected share of components", "short": 0.05}
    )
    gates_lr: float = field(default=0.01, metadata={"help": "learning rate of the gates", "short": 0.2})
    scales_lr: float = field(default=0.01, metadata={"help": "learning rate of the ranges"})
    phi_init: float = field(
        default=6.0, metadata={"help": "φ of every gate at the start; 6 is open almost surely", "short": 0.5}
    )
    n_bits: int = field(default=16, metadata={"help": "bits that a factor has at most: 2, 4, 8 or 16"})
    rank_gates: bool = field(default=True, metadata={"help": "learn the rank too; without, bits alone are learned"})
    seed: int = field(default=0, metadata={"help": "draws the gates, with the number of the step"})

    def validate(self) -> None:
        super().validate()
        if self.n_bits not in WIDTHS:
            raise UsageError(f"n_bits={self.n_bits}: use 2, 4, 8 or 16; float32 factors cannot hold finer steps")
        for name in ("lambda_q", "lambda_r", "gates_lr", "scales_lr"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UsageError(f"{name}={getattr(self, name)} must not be below 0")


# --- quantiser and gates, on plain tensors ------------------------------------------------------------------------


def open_probability(phi: Tensor) -> Tensor:
    """P(φ), the probability that a sampled gate is above 0.

    >>> open_probability(torch.tensor([0.0, 6.0]))
    tensor([0.8318, 0.9995])
    """
    return torch.sigmoid(phi + SHIFT)


def is_open(phi: Tensor) -> Tensor:
    """Which gates evaluation opens.

    >>> is_open(torch.tensor([-1.0, -0.5]))
    tensor([False,  True])
    """
    return open_probability(phi) > CERTAIN


def sample(phi: Tensor, noise: Tensor) -> Tensor:
    """Gates in [0, 1] for noise = ln u − ln(1 − u)."""
    return ((HIGH - LOW) * torch.sigmoid((noise + phi) / TEMPERATURE) + LOW).clamp(0, 1)


def shares(gates: Tensor) -> Tensor:
    """w (… × levels) from the gates of all levels but the first (… × levels − 1): how much each width counts.

    >>> shares(torch.tensor([1.0, 0.25, 0.0]))
    tensor([0.0000, 0.7500, 0.2500, 0.0000])
    """
    one = gates.new_ones(*gates.shape[:-1], 1)
    reached = torch.cat([one, gates.cumprod(-1)], -1)
    return reached - torch.cat([reached[..., 1:], 0 * one], -1)


class Rounded(torch.autograd.Function):
    """Q(x) = Σ_b w_b·s_b·round(x / s_b) for x clipped to ±β, β = e^ρ·top and s_b = 2β / levels_b; keeps x alone.

    Gradients pass straight through the rounding to x, ρ (a scalar) and w; `top` counts as a constant.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rho: Tensor, top: Tensor, w: Tensor, levels: Tensor) -> Tensor:
        beta = (rho.exp() * top).clamp(min=1e-30)  # a tensor of zeros stays one
        ctx.save_for_backward(x, beta, w, levels)
        # no matrix product: autocast would compute it in bfloat16, which has not the bits of the finer roundings
        return roundings(x, beta, levels).mul_(w.view(-1, *[1] * x.dim())).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None]:
        x, beta, w, levels = ctx.saved_tensors
        d_w = (roundings(x, beta, levels) * grads[0]).flatten(1).sum(1)
        d_x = grads[0] * (x.abs() <= beta)
        return d_x, (w * d_w).sum() - (d_x * x).sum(), None, d_w, None


def roundings(x: Tensor, beta: Tensor, levels: Tensor) -> Tensor:
    """s_b·round(x / s_b) for every width (widths × …); a rounding to b bits has at most levels_b = 2^b − 1 values."""
    edge = beta * (1 - max(1e-7, 4 * torch.finfo(x.dtype).eps))  # short of where rounding would reach past the range
    steps = (2 * beta / levels).view(-1, *[1] * x.dim())
    return (x.clamp(-edge, edge) / steps).round_() * steps


class BayesianLoraDelta(GatedDelta):
    """ΔW = (α / r)·Q(B)·diag(g ∘ Q(E))·Q(A)."""

    config: BayesianLoraConfig
    noise: Tensor
    levels: Tensor

    def __init__(self, config: BayesianLoraConfig, site: Site) -> None:
        super().__init__(config, site)
        nn.init.normal_(self.A, std=INIT_STD)
        nn.init.normal_(self.B, std=INIT_STD)
        self.scale = config.lora_alpha / config.r
        widths = [b for b in WIDTHS if b <= config.n_bits]
        gates = self.r - 1 if config.rank_gates else 0
        self.E = nn.Parameter(torch.zeros_like(site.empty(self.r)))
        self.phi = nn.Parameter(torch.full_like(site.empty(3, len(widths) - 1), config.phi_init))  # of A, E and B
        self.phi_r = nn.Parameter(torch.full_like(site.empty(gates), config.phi_init))
        self.rho = nn.Parameter(torch.zeros_like(site.empty(3)))
        self.register_buffer("noise", torch.zeros_like(site.empty(self.phi.numel() + gates)), persistent=False)
        values = torch.tensor([2.0**b - 1 for b in widths], device=site.device)
        self.register_buffer("levels", values, persistent=False)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """The noise of one optimiser step."""
        source = generator(self.config.seed, "bayesian_lora", step, self.name)
        u = torch.rand(self.noise.shape, generator=source, dtype=torch.float64)
        self.noise.copy_(torch.logit(u, eps=1e-7))

    def shares(self) -> Tensor:
        """w of A, E and B (3 × levels): one width each in evaluation."""
        if not self.training:
            return shares(is_open(self.phi).to(self.phi.dtype))
        gates = sample(self.phi, self.noise[: self.phi.numel()].view_as(self.phi))
        return shares(gates * (self.phi > SKIPPED))

    def kept(self) -> Tensor:
        """(r,) bool: the components that evaluation keeps."""
        return _kept(self.phi_r, self.r)

    def gate(self) -> Tensor:
        """g (r,): 0 or 1."""
        if not self.training:
            return self.kept().to(self.E.dtype)
        p = sample(self.phi_r, self.noise[self.phi.numel() :]).cumprod(0)
        p = p + (p.round() - p).detach()
        return torch.cat([torch.ones_like(self.E[: self.r - len(p)]), p])

    def quantised(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q(A), Q(E) and Q(B); on the way to evaluation without the components that it drops."""
        a: Tensor = self.A
        e: Tensor = self.E
        b: Tensor = self.B
        kept, w, levels = self.kept(), self.shares(), self.levels.to(self.E.dtype)
        if not (self.training or torch.compiler.is_compiling()):
            k = int(kept.sum())
            a, e, b, kept = a[:k], e[:k], b[:, :k], kept[:k]
        found = []
        for i, (x, dim) in enumerate(((a, 1), (e, None), (b, 0))):
            largest = x.detach().abs() if dim is None else torch.linalg.vector_norm(x.detach(), math.inf, dim=dim)
            top = torch.where(kept, largest, torch.zeros_like(largest)).max()
            if self.training:
                found.append(Rounded.apply(x, self.rho[i], top, w[i], levels))
            else:  # w names one width, so one rounding gives the sum
                found.append(Rounded.apply(x, self.rho[i], top, torch.ones_like(w[i, :1]), (w[i] * levels).sum()[None]))
        return tuple(found)  # type: ignore[return-value]

    def factors(self) -> tuple[Tensor, Tensor]:
        a, e, b = self.quantised()
        return b * (self.scale * self.gate()[: len(e)] * e), a

    def compact(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
        if not self.config.rank_gates:
            return tensors, None
        k = int(_kept(tensors["phi_r"], len(tensors["E"])).sum())
        if k == len(tensors["E"]):
            return tensors, k
        cut = {"A": tensors["A"][:k], "E": tensors["E"][:k], "B": tensors["B"][:, :k]}
        return {**tensors, **cut, "phi_r": tensors["phi_r"][: k - 1]}, k

    def expand(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        full = {name: torch.zeros_like(t) for name, t in self.state_dict().items()}
        k = len(tensors["E"])
        full["A"][:k], full["E"][:k], full["B"][:, :k] = tensors["A"], tensors["E"], tensors["B"]
        full["phi_r"][:] = CLOSED
        full["phi_r"][: k - 1] = tensors["phi_r"]
        return {**full, "phi": tensors["phi"], "rho": tensors["rho"]}

    def precision(self) -> Precision:
        """Rank and bits of evaluation."""
        a, e, b = (WIDTHS[n] for n in is_open(self.phi).long().cumprod(1).sum(1).tolist())
        return Precision(int(self.kept().sum()), a, e, b, self.in_, self.out)

    def count(self) -> int:
        gates = self.r - 1 if self.config.rank_gates else 0
        return self.r * (self.in_ + self.out + 1) + 3 * (len(self.levels) - 1) + gates + 3

    def controller_class(self) -> type[Controller]:
        return BayesianLoraController

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        gates = Group(lr=config.gates_lr, weight_decay=0.0)
        return {"phi": gates, "phi_r": gates, "rho": Group(lr=config.scales_lr, weight_decay=0.0)}


class BayesianLoraController(Controller):
    """Draws the noise of every step and adds the penalty on open gates."""

    events = True

    def begin(self) -> None:
        for d in self.deltas:
            d.draw(self.step)

    def penalty(self) -> Tensor | None:
        c, home = self.config, self.deltas[0].phi.device
        if not (c.lambda_q or c.lambda_r):
            return None
        ranks = self._rank_probabilities()
        levels = open_probability(torch.stack([d.phi.to(home) for d in self.deltas])).cumprod(-1).sum(-1)  # modules × 3
        bits = levels[:, 0] + levels[:, 1] * ranks + levels[:, 2]
        gated = c.rank_gates and self.deltas[0].phi_r.numel() > 0
        return c.lambda_q * bits.sum() + (c.lambda_r * ranks.sum() if gated else 0)

    def _rank_probabilities(self) -> Tensor:
        """Mean P(φ) over the gates of every module's components (modules,); 1 where there are none."""
        home = self.deltas[0].phi_r.device
        counts = torch.tensor([d.phi_r.numel() for d in self.deltas], device=home)
        every = open_probability(torch.cat([d.phi_r.to(home) for d in self.deltas]))
        owner = torch.repeat_interleave(torch.arange(len(counts), device=home), counts)
        sums = every.new_zeros(len(counts)).index_add(0, owner, every)
        return torch.where(counts > 0, sums / counts.clamp(min=1), 1.0)


def _kept(phi_r: Tensor, r: int) -> Tensor:
    """(r,) bool: components before the first closed gate; those ahead of all gates are always on."""
    free = torch.ones(r - len(phi_r), dtype=torch.bool, device=phi_r.device)
    return torch.cat([free, is_open(phi_r).long().cumprod(0).bool()])


# --- what was learned ---------------------------------------------------------------------------------------------


class Precision(NamedTuple):
    """What evaluation uses of one module: its rank, the bits of A, E and B, and its sides."""

    rank: int
    bits_a: int
    bits_e: int
    bits_b: int
    in_: int
    out: int

    def bits(self) -> int:
        """Bits that hold the factors: rank · (in·bits(A) + bits(E) + out·bits(B))."""
        return self.rank * (self.in_ * self.bits_a + self.bits_e + self.out * self.bits_b)


def precision(model: nn.Module, adapter_name: str = "default") -> dict[str, Precision]:
    """Rank and bits of every adapted matrix, by its module's name."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    found = [d for m in layers if adapter_name in getattr(m, "deltas", ()) for d in leaves(m.deltas[adapter_name])]
    named = {d.name: d.precision() for d in found if isinstance(d, BayesianLoraDelta)}
    if not named:
        raise UsageError(f"the model has no Bayesian-LoRA adapter called {adapter_name!r}")
    return named


def bit_operations(model: nn.Module, activation_bits: int = 32, adapter_name: str = "default") -> int:
    """Bit operations of the adapter for one input vector: multiplications · bits of weight · bits of activation.

    Activations are not quantised: `activation_bits` is the width that the machine gives them.
    """
    return activation_bits * sum(p.bits() for p in precision(model, adapter_name).values())
