"""SaRA: only the entries that pre-training left near zero are trained, with Adam's moments for those alone.

Teng Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
ICLR 2025, arXiv 2409.06633.

    M = |P₀| < τ, of every parameter P; θ = P[M]        r = G[M] + λ·(U·Vᵀ)[M],   U·Σ·Vᵀ = P∘M
    θ ← (1 − lr·wd)·θ                                   m ← β₁m + (1 − β₁)r,   v ← β₂v + (1 − β₂)r²
    θ ← θ − lr/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + eps)   P[M] ← θ

P stays the model's own parameter and outside of M the same bits for ever, decay included: what the large weights know
is not touched. τ is `threshold`, or chosen by `share`: at most this share of all the entries given, together, lie below
it. τ = ∞ with λ = 0 is AdamW. Without lr, lr = 10⁻³·exp(−350·τ).

The term in λ (`lambda_rank`) pulls at the nuclear norm of P∘M, so at the rank of what is trained: each step of one
matrix, drawn by (seed, step) among those whose shorter side is above 64 and that have more than 100 entries in M; a
convolution is no matrix. It costs that matrix's decomposition. After `progressive_iter` = K steps, M′ = M and |P| < τ:
the entries that outgrew τ stay as they are, and the others keep their moments.

State: two moments for each entry of M (M′ later), float32 at least, and where M is: a bit for each entry of P, or a
whole number of 8, 16 or 32 bits for each of M, whichever is shorter. At the shares that the paper trains, 10 to 20 %,
that is bits: an eighth of a byte for each entry of P, where numbers of 16 or 32 bits come to 0.2 to 0.8. Numbers are
for parameters nearly all of which is large. M′ is a bit for each entry of M.

`sparse_gradients` frees each dense gradient once its entries at M are gathered. A tuned model does not tell its masks,
as trained entries outgrow τ: `save_delta` writes M with its values, and `apply_delta` puts them on the original.
(In the authors' vector variant the sign of the entries is lost at the start and the nuclear term trains nothing.)
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.algebra.bits import pack, unpack
from weft.algebra.random import checksum, generator
from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.files import whole_file
from weft.linear._codes import as_bits, smallest_int
from weft.optim._config import OptimConfig
from weft.optim._optimizer import Group, Optimizer, State, named
from weft.registry import Card

CARD = Card(
    title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    arxiv="2409.06633",
    year=2024,
    summary="fine-tuning of nothing but the entries near zero, with state for those alone and a pull to low rank",
    knob="share",
    recipe={"learning_rate": 4.97e-4, "weight_decay": 0.01, "lr_scheduler_type": "cosine"},
    limitations="The threshold is absolute; models whose weights are of another scale than a diffusion model's want "
    "`share`. Backward still makes each dense gradient, one at a time at best.",
)

LOGGER = logging.getLogger(__name__)
THRESHOLD = 2e-3  # where neither threshold nor share is given
_SIDE, _ENTRIES = 64, 100  # a matrix with a nuclear term has a longer shorter side, and more entries in its mask


@dataclass
class SaraConfig(OptimConfig):
    """Options of SaRA."""

    threshold: float | None = field(
        default=None, metadata={"help": "τ: entries of smaller magnitude are trained; 0.002 where share is not given"}
    )
    share: float | None = field(
        default=None, metadata={"help": "in place of a threshold: the share of all entries, the smallest, to train"}
    )
    progressive_iter: int = field(
        default=-1, metadata={"help": "steps after which what outgrew τ is frozen, half of them, say; -1: never"}
    )
    lambda_rank: float = field(
        default=5e-4, metadata={"help": "λ of the nuclear norm; costs a decomposition of one matrix a step; 0: none"}
    )
    seed: int = field(default=0, metadata={"help": "of the draw of that matrix"})

    def __post_init__(self) -> None:
        _check(self.threshold, self.share, self.progressive_iter, self.lambda_rank)


def _check(threshold: float | None, share: float | None, progressive_iter: int, lambda_rank: float) -> None:
    if threshold is not None and share is not None:
        raise UsageError(f"threshold={threshold!r} and share={share!r} say the same thing: give one")
    if threshold is not None and not threshold > 0:
        raise UsageError(f"threshold={threshold!r} must be above 0")
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"share={share!r} must be above 0 and at most 1")
    if progressive_iter != -1 and progressive_iter < 1:
        raise UsageError(f"progressive_iter={progressive_iter!r} must be at least 1 step, or -1 for never")
    if not 0 <= lambda_rank < math.inf:
        raise UsageError(f"lambda_rank={lambda_rank!r} must not be below 0")


class Sara(Optimizer):
    """SaRA's AdamW on the entries below τ. Groups may have a `threshold` of their own."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        threshold: float | None = None,
        share: float | None = None,
        progressive_iter: int = -1,
        lambda_rank: float = 5e-4,
        seed: int = 0,
    ) -> None:
        """
        Args:
            params: parameters, or groups, whose masks are chosen by the values that they have now.
            lr: none takes 1e-3·exp(−350·τ).
            threshold, share: τ, or the share of the entries in all groups without a threshold that lie below it.
            progressive_iter: K; -1 is never.
            lambda_rank: λ; 0 is off.

        Raises UsageError for values that cannot work, and where no entry lies below τ.
        """
        _check(threshold, share, progressive_iter, lambda_rank)
        if share is not None:
            params = [_listed(each) for each in params]
            threshold = threshold_at(list(_without_threshold(params)), share)
        threshold = THRESHOLD if threshold is None else threshold
        self.progressive_iter, self.lambda_rank, self.seed = progressive_iter, lambda_rank, seed
        self._gathered: dict[Tensor, tuple[Tensor, Tensor]] = {}  # G[M] and max|G|, of gradients that are freed
        lr = default_lr(threshold) if lr is None else lr
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "threshold": threshold, "taken": 0})
        below = sum(state["entries"] for state in self.state.values())
        of = sum(p.numel() for p in self.state)
        if not below:
            raise UsageError(
                f"Sara: none of {of:,} entries is below threshold={threshold:g} in magnitude; share=0.1 would train "
                "the smallest tenth"
            )
        LOGGER.info(f"{below:,} of {of:,} entries are trained, those below {threshold:g} in magnitude")

    def check(self, group: Group) -> None:
        if not (isinstance(group["threshold"], int | float) and group["threshold"] > 0):
            raise UsageError(f"Sara: threshold={group['threshold']!r} must be above 0")
        for p in group["params"]:
            _refuse_parts(p)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, and choose their masks."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            self.state[p] = _start(p.detach(), group["threshold"])

    def index(self, p: Tensor) -> Tensor:
        """The places in the flattened p, ascending, that are trained now: M, later M′."""
        state = self.state[p]
        first = _places(state["places"], p.numel(), state["entries"])
        return first[unpack(state["live"][None], len(first))[0]] if "live" in state else first

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._gathered.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, or none where a gradient is not finite; what the closure returned."""
        loss = super().step(closure)
        self._gathered.clear()
        return loss

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """All that must be finite: of a gradient that is freed, the sum at M and the largest entry."""
        groups = enumerate(self.param_groups)
        names = [(name, p) for place, group in groups for name, p in named(group, place)]
        return super()._gradients() + [(name, t) for name, p in names for t in self._gathered.get(p, ()) if t.numel()]

    def take(self) -> None:
        taken = self.param_groups[0]["taken"]
        moved = [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if (p.grad is not None or p in self._gathered) and len(self.state[p]["exp_avg"])
        ]
        pulled = self._draw([p for _, p in moved], taken)
        for group, p in moved:
            index, state = self.index(p), self.state[p]
            theta, r = p.take(index).to(state["exp_avg"].dtype), self._small(p, index).to(state["exp_avg"].dtype)
            if pulled is not None and p is pulled:
                r = r + self.lambda_rank * nuclear_gradient(theta, index, p.shape)
            _adamw(theta, r, state, group)
            _put(p, index, theta.to(p.dtype))
        for group in self.param_groups:
            group["taken"] = taken + 1
        if taken + 1 == self.progressive_iter:  # and not before step K + 1, whose gradients may be gathered at M′
            for group in self.param_groups:
                for p in group["params"]:
                    self._narrow(p, group["threshold"])

    def _draw(self, moved: list[Tensor], taken: int) -> Tensor | None:
        """The matrix with a nuclear term in this step."""
        if not self.lambda_rank:
            return None
        fit = [p for p in moved if p.dim() == 2 and min(p.shape) > _SIDE and len(self.state[p]["exp_avg"]) > _ENTRIES]
        return fit[int(torch.randint(len(fit), (), generator=generator(self.seed, taken)))] if fit else None

    def _narrow(self, p: Tensor, threshold: float) -> None:
        """Go on with M′ = M and |P| < τ."""
        state = self.state[p]
        live = _below(p.take(_places(state["places"], p.numel(), state["entries"])), threshold)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key][live]
        state["live"] = pack(live[None])[0]

    def _small(self, p: Tensor, index: Tensor) -> Tensor:
        """G[M], of what was gathered and what is dense still."""
        gathered = self._gathered.get(p)
        if p.grad is None:
            assert gathered is not None
            return gathered[0]
        r = p.grad.take(index)
        return r if gathered is None else gathered[0] + r

    @torch.no_grad()
    def gather(self, p: Tensor) -> None:
        """Keep p's gradient at M, added to what is there, and free the dense one."""
        if p.grad is None:
            return
        largest = torch.linalg.vector_norm(p.grad, math.inf)
        if p in self._gathered:
            largest = torch.maximum(largest, self._gathered[p][1])
        self._gathered[p] = self._small(p, self.index(p)), largest
        p.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; masks are those that were saved."""
        masks, parameters = sum("places" in state for state in state_dict["state"].values()), len(self.state)
        if masks != parameters:
            raise UsageError(f"Sara: the state to load, another's, has masks for {masks} of {parameters} parameters")
        super().load_state_dict(state_dict)
        self._gathered.clear()


def sparse_gradients(optimizer: Sara) -> list[Any]:
    """Let backward keep of each gradient what is at M, and free the dense one at once: one exists at a time.

    Micro-batches add up in what is kept; steps are the same bit for bit. `step` uses up what is kept, and `zero_grad`
    of the optimiser forgets it. What looks at dense gradients between backward and the step finds none: clipping by
    their norm does nothing, and a GradScaler refuses. Returns handles whose `remove()` ends it. Raises UsageError in
    several processes, whose gradients are not summed yet when the hooks see them.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError("sparse_gradients sees one process's gradients only: with several processes leave them dense")
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return [p.register_post_accumulate_grad_hook(optimizer.gather) for p in parameters]


def delta(optimizer: Sara) -> dict[str, Tensor]:
    """What was trained, by name: `NAME.places`, the first M as the state has it, and `NAME.values`, P[M] as it is now.

    Raises UsageError where parameters have no names.
    """
    return {
        f"{name}.{key}": t
        for name, p, state in _trained(optimizer)
        for key, t in (
            ("places", state["places"].clone()),
            ("values", p.detach().take(_places(state["places"], p.numel(), state["entries"]))),
        )
    }


def save_delta(optimizer: Sara, path: str | Path) -> None:
    """Write `delta` to a safetensors file, whole or not at all, with what tells the original model from others."""
    base = {
        name: [*p.shape, _frozen(p, _places(state["places"], p.numel(), state["entries"]))]
        for name, p, state in _trained(optimizer)
    }
    tensors = {name: t.cpu().contiguous() for name, t in delta(optimizer).items()}
    with whole_file(path) as partial:
        save_file(tensors, str(partial), metadata={"format": "pt", "sara": json.dumps(base)})


@torch.no_grad()
def apply_delta(model: nn.Module, path: str | Path) -> None:
    """Put a file's values on the model that they were trained from, which then equals the tuned one bit for bit.

    Raises UsageError, with the model as it was, for a file of another kind and another model than that.
    """
    with safe_open(str(path), "pt") as file:
        base = (file.metadata() or {}).get("sara")
        if base is None:
            raise UsageError(f"{path} is no file of weft.optim.sara.save_delta")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = []
        for name, (*shape, frozen) in json.loads(base).items():
            p = parameters.get(name)
            values = file.get_tensor(f"{name}.values")
            if p is None or list(p.shape) != shape or p.dtype != values.dtype:
                there = "none" if p is None else f"{tuple(p.shape)}, {p.dtype}"
                raise UsageError(f"{path} has a {tuple(shape)}, {values.dtype} parameter {name}; the model has {there}")
            index = _places(file.get_tensor(f"{name}.places"), p.numel(), len(values)).to(p.device)
            if _frozen(p, index) != frozen:
                raise UsageError(f"{name} differs from the original of {path} where nothing was trained")
            found.append((p, index, values.to(p.device)))
    for p, index, values in found:
        _put(p, index, values)


def _trained(optimizer: Sara) -> Iterator[tuple[str, Tensor, State]]:
    """Parameters with entries below τ, and their state."""
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise UsageError("a delta goes by names: make Sara from (name, parameter) pairs")
        for name, p in zip(group["param_names"], group["params"]):
            if optimizer.state[p]["entries"]:
                yield name, p, optimizer.state[p]


def _frozen(p: Tensor, index: Tensor) -> str:
    """The checksum of what lies outside of M."""
    rest = p.detach().clone(memory_format=torch.contiguous_format)
    rest.view(-1).index_fill_(0, index, 0)
    return checksum(rest.view(-1))


def default_lr(threshold: float) -> float:
    """1e-3·exp(−350·τ). Raises UsageError where that is next to nothing.

    >>> round(default_lr(2e-3), 8)
    0.00049659
    """
    lr = 1e-3 * math.exp(-350 * threshold)
    if lr < 1e-8:
        raise UsageError(f"lr=None: 1e-3·exp(−350·τ) is {lr:.0e} at threshold={threshold:g}; give a learning rate")
    return lr


def threshold_at(tensors: list[Tensor], share: float) -> float:
    """The largest τ below which, in magnitude, lie at most `share` of all entries, as float32; ∞ where that is all.

    The bits of magnitudes, read as whole numbers, are in the magnitudes' order: two counts of 16 bits each find it.
    """
    rank = math.floor(share * sum(t.numel() for t in tensors))  # how many may lie below
    if any(t.is_meta for t in tensors):  # a model without weights, tried for its shapes
        return math.inf
    if rank >= sum(t.numel() for t in tensors):
        return math.inf
    high, before = _digit(tensors, lambda bits: bits >> 16, rank)
    low, _ = _digit(tensors, lambda bits: bits[bits >> 16 == high] & 0xFFFF, rank - before)
    return torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item()


def _digit(tensors: list[Tensor], digits: Callable[[Tensor], Tensor], rank: int) -> tuple[int, int]:
    """The digit at this rank (from 0) in ascending order, and how many are smaller."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for t in tensors:
        bits = t.detach().abs().float().contiguous().view(-1).view(torch.int32)
        counts += torch.bincount(digits(bits), minlength=1 << 16).cpu()
    upto = counts.cumsum(0)
    digit = int((upto <= rank).sum())
    return digit, int(upto[digit] - counts[digit])


def nuclear_gradient(theta: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """∂‖X‖∗/∂θ (nnz) of the matrix X of this shape that is θ at `index` and zero elsewhere: (U·Vᵀ)[M].

    Directions without a singular value, where the norm has a kink, count as zero.
    """
    x = theta.new_zeros(shape.numel()).index_copy_(0, index, theta).view(shape)
    u, s, vh = svd_top(x)
    u = u * (s > max(shape) * torch.finfo(s.dtype).eps * s[0])
    return (u @ vh).take(index)


def _adamw(theta: Tensor, r: Tensor, state: State, group: Group) -> None:
    """torch's AdamW, operation by operation, on θ in place."""
    m, v, lr = state["exp_avg"], state["exp_avg_sq"], group["lr"]
    b1, b2 = group["betas"]
    state["step"] += 1
    theta.mul_(1 - lr * group["weight_decay"])
    m.lerp_(r, 1 - b1)
    v.mul_(b2).addcmul_(r, r, value=1 - b2)
    root = (v.sqrt() / math.sqrt(1 - b2 ** state["step"])).add_(group["eps"])
    theta.addcdiv_(m, root, value=-lr / (1 - b1 ** state["step"]))


def _start(p: Tensor, threshold: float) -> State:
    """The state before the first step: M, and moments of zero."""
    mask = _below(p, threshold).flatten()
    n = p.numel()
    entries = n if p.is_meta else int(mask.sum())
    places = pack(mask[None])[0] if as_bits(n, entries) else mask.nonzero()[:, 0].to(smallest_int(n))
    zeros = torch.zeros(entries, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
    return {"step": 0, "entries": entries, "places": places, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _below(p: Tensor, threshold: float) -> Tensor:
    """|P| < τ, not rounding τ to fewer digits than float32's."""
    return p.abs().to(torch.promote_types(p.dtype, torch.float32)) < threshold


def _places(places: Tensor, n: int, entries: int) -> Tensor:
    """M's places among n, as int64, of what is stored."""
    return unpack(places[None], n)[0].nonzero()[:, 0] if as_bits(n, entries) else places.long()


def _put(p: Tensor, index: Tensor, values: Tensor) -> None:
    """P[M] ← values; the rest keeps its bits."""
    p = p.detach()
    if p.is_contiguous():
        p.view(-1).index_copy_(0, index, values)
    else:  # channels last, say
        p.copy_(p.flatten().index_copy_(0, index, values).view_as(p))


def _refuse_parts(p: Tensor) -> None:
    if isinstance(p, DTensor):
        raise UsageError(
            f"Sara: a parameter of shape {tuple(p.shape)} is a DTensor, of which each process has a part, but masks "
            "are of the whole: use DistributedDataParallel, or galore, which knows shards"
        )


def _listed(each: Any) -> Any:
    """A group whose parameters are a list; what is no group as it is."""
    if not isinstance(each, dict):
        return each
    return {**each, "params": [each["params"]] if isinstance(each["params"], Tensor) else list(each["params"])}


def _without_threshold(params: Iterable[Any]) -> Iterator[Tensor]:
    """The parameters of all groups that have no threshold of their own."""
    for each in params:
        if isinstance(each, dict):
            if "threshold" not in each:
                yield from _without_threshold(each["params"])
        else:
            p = each[1] if isinstance(each, tuple) else each
            _refuse_parts(p)
            yield p


def arguments(config: SaraConfig, model: nn.Module, weight_decay: float) -> dict[str, Any]:
    """What `Sara` takes for this model: all trained parameters, biases and norms without decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[Group] = [
        {"params": [(name, p) for name, p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    rest = ("betas", "eps", "threshold", "share", "progressive_iter", "lambda_rank", "seed")
    found = {name: getattr(config, name) for name in rest}
    return {"params": [g for g in groups if g["params"]], "lr": None, "weight_decay": weight_decay, **found}
