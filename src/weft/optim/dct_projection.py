"""DCT projection: moments live in the few cosine frequencies that hold most of each gradient; no SVD, no stored basis.

Ionut-Vlad Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
arXiv 2505.17967; later versions, named after FFT-based dynamic subspace selection, add Trion.

    C: n × n, C[i, j] = √(2/n)·cos((2j + 1)·i·π / 2n), row 0 divided by √2;    n = min(out, in)
    S = G·Cᵀ   (out × n)   or, where out < in,   S = C·G   (n × in)
    at t = 1 and where T divides t      idx = the r columns (rows) of S that are largest, C_r = C[idx]   (r × n)
    a = S[:, idx] = G·C_rᵀ              m, v: Adam's moments of a;   u = m / (√v + eps·√(1 − β₂ᵗ))
    W ← (1 − lr·λ)·W − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · u·C_r      (C_rᵀ·u on the left)

Frequencies are the rows of C, for both sides and both ways of finding S: `selection="matmul"`, one product with C, kept
once for each n, dtype and device; "fft", `weft.algebra.transforms.dct`, in O(n log n) a row, with no n × n matrix. (The
authors' two ways choose from two different bases.) Frequencies are scored by the l1 norm of their column of S, or l2
(`ell_norm=2`); −1 and −2 multiply by the same norm of the basis vector. Of equal scores the lower frequency wins, and
indices ascend. a is read off S where that is there, else it is a product with the r rows alone, as the lift is.

`use_ef`: what the projection loses is added to the next gradient, A = G + E, E ← A − a·C_r; float32, or 4 or 8 bits
(`q_ef`) between the least and the largest entry of each row. `rotate_subspace`: moments follow their frequency to its
new slot, and start at zero where one is new. That is the product with C_old·C_newᵀ, a matrix of zeros and ones, done as
a copy: in floating point the product would leak, and √v of a new direction would begin at that noise.

form="trion" has momentum instead of Adam:

    M ← M + G,  a and idx from M,  M ← M − (1 − μ)·a·C_r,  W ← (1 − lr·λ)·W − lr·s·NewtonSchulz(a)·C_r

with s by `scaling`: "kj" √max(1, out/in), "none" 1, "kimi" 0.2·√max(out, in), "dion" √(out/in). Its learning rate is
0.02. Parameters that are not projected take AdamW: groups without a rank, which say `lr`, `betas`, `eps` themselves.
Where they do not, lr is `rest_lr`, 3e-4 in this form, and betas and eps are the optimiser's, (0.9, 0.95) and 1e-10.

Matrices with a side of `max_shape` or more take the whole AdamW. State of one projected matrix: r integers of two bytes
(four where n > 32768) and 2·r·max(out, in) moments, float32 at least; E, or M instead of moments, is out × in. Under
FSDP2 moments, E and M are sharded as W is; G, or what it is added to, is gathered where frequencies are chosen, and
Trion's a in every step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from weft.algebra.transforms import dct
from weft.errors import UsageError, nearest
from weft.optim._config import ProjectedConfig
from weft.optim._groups import param_groups
from weft.optim._optimizer import Group, State, whole
from weft.optim._projected import WHOLE, Projected, Projector
from weft.optim._rules import AdamW, Number, Rule
from weft.optim._sides import down, lift_
from weft.registry import Card

CARD = Card(
    title="SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
    arxiv="2505.17967",
    year=2025,
    summary="full-parameter training with moments in the strongest cosine frequencies of each gradient, without SVD",
    knob="rank",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations=(
        "The basis is fixed: a gradient whose energy is spread over the frequencies loses more than by an SVD. Without "
        "rotate_subspace a frequency that is newly chosen begins with another's moments, which slows convergence."
    ),
)

SELECTIONS = ("matmul", "fft")
NORMS = (1, 2, -1, -2)
SCALINGS = ("kj", "none", "kimi", "dion")
_FORMS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "rest_lr": None, "betas": (0.9, 0.999), "eps": 1e-8},
    "trion": {"lr": 0.02, "rest_lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10},
}
_ONLY: dict[str, dict[str, Any]] = {  # options of one form, and the defaults that the other leaves them at
    "adamw": {"use_ef": False, "q_ef": 0, "rotate_subspace": False},
    "trion": {"momentum": 0.95, "scaling": "kj"},
}


@dataclass
class DctProjectionConfig(ProjectedConfig):
    """Options of DCT-AdamW and Trion."""

    form: Literal["adamw", "trion"] = field(
        default="adamw", metadata={"help": "Adam's moments in the subspace, or orthogonalised momentum"}
    )
    update_proj_gap: int = field(default=1, metadata={"help": "steps between two choices of the frequencies"})
    selection: Literal["matmul", "fft"] = field(
        default="matmul", metadata={"help": "how coefficients are found: a product with the basis, or an FFT"}
    )
    ell_norm: int = field(
        default=1, metadata={"help": "norm that scores a frequency, 1 or 2; negative: times the basis vector's own"}
    )
    use_ef: bool = field(default=False, metadata={"help": "add what the projection lost to the next gradient"})
    q_ef: int = field(default=0, metadata={"help": "bits that what was lost is kept in: 4, 8, or 0 for float32"})
    rotate_subspace: bool = field(default=False, metadata={"help": "let moments follow their frequency at a refresh"})
    momentum: float = field(default=0.95, metadata={"help": "μ of Trion"})
    scaling: Literal["kj", "none", "kimi", "dion"] = field(
        default="kj", metadata={"help": "Trion's factor by shape: √max(1, out/in), 1, 0.2·√max(out, in), √(out/in)"}
    )
    max_shape: int = field(default=32000, metadata={"help": "matrices with so long a side are not projected"})
    rest_lr: float | None = field(
        default=None, metadata={"help": "learning rate of what is not projected; none: the same, or 3e-4 with Trion"}
    )
    betas: tuple[float, float] | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "decay of the two moments; none: (0.9, 0.999), or (0.9, 0.95) with Trion"}
    )
    eps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "added to √v, v corrected; none: 1e-8, or 1e-10 with Trion"}
    )


class DctProjection(Projected):
    """DCT-AdamW or Trion; groups without `rank` take AdamW."""

    decay_first = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        form: str = "adamw",
        rest_lr: float | None = None,
        rank: int | None = None,
        update_proj_gap: int = 1,
        selection: str = "matmul",
        ell_norm: int = 1,
        use_ef: bool = False,
        q_ef: int = 0,
        rotate_subspace: bool = False,
        momentum: float = 0.95,
        scaling: str = "kj",
        max_shape: int = 32000,
        compile: bool = False,
    ) -> None:
        """
        Args:
            params: groups as in `{"params": ..., "rank": 128, "use_ef": True}`, beside groups without a rank;
                `weft.optim.param_groups` makes both.
            lr, betas, eps: by default the form's own.
            form: "adamw" or "trion".
            rest_lr: learning rate of groups that have neither a rank nor an lr.
            compile: see `Projected`.
        """
        own = _form(form)
        self.form = form
        self.rest_lr = own["rest_lr"] if rest_lr is None else rest_lr
        defaults = {
            "lr": own["lr"] if lr is None else lr,
            "betas": own["betas"] if betas is None else betas,
            "eps": own["eps"] if eps is None else eps,
        }
        defaults |= {"weight_decay": weight_decay, "rank": rank, "update_proj_gap": update_proj_gap}
        defaults |= {"selection": selection, "ell_norm": ell_norm, "use_ef": use_ef, "q_ef": q_ef}
        defaults |= {"rotate_subspace": rotate_subspace, "momentum": momentum, "scaling": scaling}
        super().__init__(params, {**defaults, "max_shape": max_shape}, compile=compile)
        self.rule = Adam()

    def add_param_group(self, param_group: Group) -> None:
        if param_group.get("rank", self.defaults["rank"]) is None and self.rest_lr is not None:
            param_group = {"lr": self.rest_lr, **param_group}
        super().add_param_group(param_group)

    def check(self, group: Group) -> None:
        super().check(group)
        for key, known in (("selection", SELECTIONS), ("scaling", SCALINGS)):
            if group[key] not in known:
                raise UsageError(f"DctProjection: unknown {key} {group[key]!r}: {nearest(str(group[key]), known)}")
        for key, values in (("ell_norm", NORMS), ("q_ef", (0, 4, 8))):
            if group[key] not in values or isinstance(group[key], bool):
                raise UsageError(f"DctProjection: {key}={group[key]!r} must be one of {', '.join(map(str, values))}")
        if group["q_ef"] and not group["use_ef"]:
            raise UsageError(f"DctProjection: q_ef={group['q_ef']} is how error feedback is kept: it wants use_ef=True")
        if group["q_ef"] and any(isinstance(p, DTensor) for p in group["params"]):
            raise UsageError(f"DctProjection: q_ef={group['q_ef']} cannot be sharded, but q_ef=0, float32, can")
        if not 0 <= group["momentum"] < 1:
            raise UsageError(f"DctProjection: momentum={group['momentum']!r} must be at least 0 and below 1")
        if not isinstance(group["max_shape"], int) or group["max_shape"] < 1:
            raise UsageError(f"DctProjection: max_shape={group['max_shape']!r} must be a whole number of at least 1")
        for form, options in _ONLY.items():
            for key, default in options.items():
                if form != self.form and group[key] != default:
                    raise UsageError(f"DctProjection: {key}={group[key]!r} is an option of form={form!r} alone")
        for p in group["params"]:
            if group["rank"] is not None and self.form == "trion" and max(p.shape) >= group["max_shape"]:
                raise UsageError(
                    f"DctProjection: a {p.shape[0]} × {p.shape[1]} matrix has a side of max_shape={group['max_shape']} "
                    "or more, so it takes AdamW and wants its learning rate: put it into a group without a rank"
                )

    def rule_of(self, group: Group) -> Rule:
        return _ORTHOGONAL if self.form == "trion" and group["rank"] is not None else self.rule

    def wants_whole(self, group: Group) -> bool:
        return super().wants_whole(group) or group["use_ef"] or self.form == "trion"

    def projector(self, group: Group, p: Tensor) -> Projector:
        out, in_ = p.shape
        if max(out, in_) >= group["max_shape"]:
            return WHOLE
        trion = self.form == "trion"
        kept = "momentum" if trion else "error" if group["use_ef"] else None
        return _frequencies(
            n=min(out, in_), right=out >= in_, rank=group["rank"], selection=group["selection"],
            ell_norm=group["ell_norm"], turns=group["rotate_subspace"], kept=kept, bits=group["q_ef"],
            leaves=1 - group["momentum"] if trion else 1.0,
            factor=_factor(group["scaling"], out, in_) if trion else 1.0,
        )  # fmt: skip

    def move(self, group: Group, name: str, p: Tensor, g: Tensor) -> None:
        if group["rank"] is not None:
            projector = self.projector(group, p)
            if isinstance(projector, Frequencies):
                g = projector.gathered(self.state[p], g)
        super().move(group, name, p, g)

    def follow(self, projector: Projector, group: Group, state: State, p: Tensor, r: Tensor) -> None:
        if isinstance(projector, Frequencies):
            state["rows"] = projector.rows(state, p.dtype)  # here, as a compiled step would make them from all of C
        super().follow(projector, group, state, p, r)
        state.pop("rows", None)

    def fit(self, projector: Projector, group: Group, state: State, g: Tensor, name: str) -> None:
        """As the engine's; the step after is that which T divides, counted from 1: 1, T, 2·T, …"""
        super().fit(projector, group, state, g, name)
        gap = group["update_proj_gap"]
        state["next_fit"] = ((state["step"] + 1) // gap + 1) * gap - 1


def _form(form: str) -> dict[str, Any]:
    """The defaults of a form. Raises UsageError for an unknown one."""
    if form not in _FORMS:
        raise UsageError(f"DctProjection: unknown form {form!r}: {nearest(str(form), _FORMS)}")
    return _FORMS[form]


def _factor(scaling: str, out: int, in_: int) -> float:
    """Trion's s."""
    return {
        "kj": math.sqrt(max(1, out / in_)),
        "none": 1.0,
        "kimi": 0.2 * math.sqrt(max(out, in_)),
        "dion": math.sqrt(out / in_),
    }[scaling]


# --- rules ------------------------------------------------------------------------------------------------------------


class Adam(AdamW):
    """AdamW whose eps is added to √v after v is corrected for its start at zero: u = m / (√v + eps·√(1 − β₂ᵗ))."""

    def numbers(self, group: Group, step: int) -> tuple[float, ...]:
        return *super().numbers(group, step), math.sqrt(1 - group["betas"][1] ** step)

    def direction(self, state: State, r: Tensor, group: Group, numbers: Sequence[Number]) -> tuple[Tensor, Number]:
        return super().direction(state, r, {**group, "eps": group["eps"] * numbers[1]}, numbers)


class Orthogonal:
    """The nearest matrix with equal singular values, about; nothing is kept."""

    def start(self, r: Tensor, group: Group) -> State:
        return {}

    def numbers(self, group: Group, step: int) -> tuple[float, ...]:
        return (group["lr"],)

    def direction(self, state: State, r: Tensor, group: Group, numbers: Sequence[Number]) -> tuple[Tensor, Number]:
        n = newton_schulz(whole(r))
        if isinstance(r, DTensor):
            n = distribute_tensor(n, r.device_mesh, r.placements, src_data_rank=None)
        return n, numbers[0]


_ORTHOGONAL = Orthogonal()
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """U·Vᵀ of x = U·Σ·Vᵀ, singular values about 0.7 to 1.2: x ← a·x + (b·A + c·A²)·x with A = x·xᵀ, from x / ‖x‖."""
    a, b, c = _COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


# --- projection -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frequencies:
    """The r strongest frequencies of a gradient's shorter side; state has their `index`.

    Attributes:
        n: length of that side.
        right: whether it is the rows' (G·C_rᵀ), not the columns' (C_r·G).
        turns: whether moments follow their frequency.
        kept: where the state has what is added to each gradient: "error", "momentum", or None for nothing.
        bits: what it is kept in; 0 for floating point.
        leaves: the part of what was projected that is taken out of it.
        factor: multiplies the lifted update.
    """

    n: int
    right: bool
    rank: int
    selection: str
    ell_norm: int
    turns: bool
    kept: str | None
    bits: int
    leaves: float
    factor: float

    def gathered(self, state: State, g: Tensor) -> Tensor:
        """g and what is kept of the gradients before it, float32 at least; g itself where nothing is kept."""
        if self.kept is None:
            return g
        if self.kept in state:
            return state[self.kept].add_(g)
        g = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
        if f"{self.kept}_codes" not in state:
            return g
        codes, low, unit = (state[f"{self.kept}_{part}"] for part in ("codes", "low", "unit"))
        return g.add_(dequantise(codes, low, unit, self.bits, g.shape[1]))

    def fit(self, state: State, g: Tensor, like: Tensor, key: tuple[object, ...]) -> None:
        old = state.get("index")
        g = g if self.right else g.mT
        if self.selection == "fft":
            s = dct(self.n).forward(g)
        else:
            s = g @ basis(self.n, g.dtype, g.device).mT
        new = strongest(s, self.rank, self.ell_norm)
        if old is not None:
            new = torch.where(g.any(), new, old.long())  # zeros choose nothing
        state["index"] = new.to(torch.int16 if self.n <= torch.iinfo(torch.int16).max + 1 else torch.int32)
        if not isinstance(like, DTensor):
            small = s.index_select(1, new)
            state["coefficients"] = small if self.right else small.mT.contiguous()  # until `down`, which comes next
        if self.turns and old is not None:
            for moment in ("exp_avg", "exp_avg_sq"):
                m = state[moment]
                turn_(m.to_local() if isinstance(m, DTensor) else m, old, new, 1 if self.right else 0)

    def down(self, state: State, g: Tensor) -> Tensor:
        r = state.pop("coefficients", None)
        if r is not None and self.kept is None:
            return r
        sides = self._sides(state, g)
        r = down(g, *sides) if r is None else r
        if self.kept is not None:
            lift_(g, r, *sides, -self.leaves, 1.0)
            if self.bits:
                for part, value in zip(("codes", "low", "unit"), quantise(g, self.bits)):
                    state[f"{self.kept}_{part}"] = value
            else:
                state[self.kept] = g
        return r

    def lift_(self, state: State, w: Tensor, n: Tensor, alpha: Number, beta: Number) -> None:
        lift_(w, n, *self._sides(state, w), alpha * self.factor, beta)

    def rows(self, state: State, dtype: torch.dtype) -> Tensor:
        """C_r (r × n)."""
        index = state["index"].long()
        if self.selection == "fft":
            return frequencies(index, self.n, dtype)
        return basis(self.n, dtype, index.device).index_select(0, index)

    def _sides(self, state: State, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """C_rᵀ on the left (sharded as `like` is) or C_r on the right: made when wanted, as only indices are kept."""
        rows = state["rows"] if "rows" in state else self.rows(state, like.dtype)
        if self.right:
            return None, rows
        left = rows.mT
        if isinstance(like, DTensor):
            left = distribute_tensor(left.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
        return left, None


@functools.lru_cache(maxsize=256)
def _frequencies(**fields: Any) -> Frequencies:
    return Frequencies(**fields)


def strongest(s: Tensor, r: int, ell_norm: int) -> Tensor:
    """The r columns of s (m × n) of the largest norm, ascending; of equals, the first ones."""
    wide = torch.promote_types(s.dtype, torch.float32)
    score = s.new_zeros(s.shape[1], dtype=wide)
    for rows in s.split(256):  # a cache's worth: torch's vector_norm down the columns takes fifteen times as long
        score += rows.to(wide).square().sum(0) if abs(ell_norm) == 2 else rows.abs().sum(0, dtype=wide)
    score = score.sqrt() if abs(ell_norm) == 2 else score
    if ell_norm < 0:
        score = score * _norms(s.shape[1], -ell_norm, wide, s.device)
    return torch.sort(score, descending=True, stable=True).indices[:r].sort().values


def turn_(m: Tensor, old: Tensor, new: Tensor, dim: int) -> None:
    """Let slots of m follow their frequencies from `old` to `new`, both ascending, along `dim`; new ones are zero."""
    old = old.long()
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    stays = old[place] == new
    m.copy_(torch.where(stays if dim else stays[:, None], m.index_select(dim, place), 0))


def frequencies(index: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Rows `index` (r, int64) of C, r × n: looked up in one period of the cosine, so exact to rounding for any n."""
    angle = index[:, None] * (2 * torch.arange(n, device=index.device) + 1) % (4 * n)
    rows = _wave(n, dtype, index.device)[angle]
    return torch.where(index[:, None] == 0, math.sqrt(1 / n), rows)


@functools.lru_cache(maxsize=64)
def _wave(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√(2/n)·cos(k·π / 2n) for k = 0 … 4n − 1."""
    angle = torch.arange(4 * n, dtype=torch.float64) * (math.pi / (2 * n))
    return (math.sqrt(2 / n) * angle.cos()).to(device, dtype)


@functools.lru_cache(maxsize=64)
def basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """C, n × n; one for all matrices with a side of n."""
    return frequencies(torch.arange(n, device=device), n, dtype)


@functools.lru_cache(maxsize=64)
def _norms(n: int, p: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The p-norm of each row of C."""
    parts = [frequencies(part, n, torch.float64).norm(p, 1) for part in torch.arange(n).split(1024)]
    return torch.cat(parts).to(device, dtype)


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x (m × k) in 2^bits − 1 equal steps from their least to their largest entry.

    Returns the codes (uint8, m × k, or m × ⌈k/2⌉ with the even column in the low half of a byte), and for each row its
    least entry and its step (m × 1).
    """
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    unit = (high - low) / (2**bits - 1)
    codes = ((x - low) / torch.where(unit > 0, unit, 1)).round_().to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes, low, unit


def dequantise(codes: Tensor, low: Tensor, unit: Tensor, bits: int, k: int) -> Tensor:
    """x (m × k) from `quantise`."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :k]
    return codes.to(unit.dtype).mul_(unit).add_(low)


def arguments(config: DctProjectionConfig, model: nn.Module, weight_decay: float) -> dict[str, Any]:
    """What `DctProjection` takes for this model."""
    names = ["rank", "update_proj_gap", "selection", "ell_norm", "max_shape", *_ONLY["adamw"], *_ONLY["trion"]]
    chosen = {name: getattr(config, name) for name in names}
    groups = param_groups(model, target_modules=config.target_modules, weight_decay=weight_decay, **chosen)
    matrices = groups[0]["params"]
    wide = [(name, p) for name, p in matrices if max(p.shape) >= config.max_shape]
    if len(wide) == len(matrices):
        raise UsageError(f"max_shape={config.max_shape} leaves nothing to project: every matrix has a side as long")
    if wide:
        groups[0]["params"] = [(name, p) for name, p in matrices if max(p.shape) < config.max_shape]
        groups.append({"params": wide, "weight_decay": weight_decay})
    rest = {name: getattr(config, name) for name in ("form", "rest_lr", "betas", "eps")}
    return {"params": groups, "lr": _form(config.form)["lr"], "weight_decay": weight_decay, **rest}
