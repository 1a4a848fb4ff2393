"""LoRA-Pro: LoRA's two gradients are adjusted until the step that they make together is nearest to full fine-tuning's.

Zhengbo Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025, arXiv 2407.18242.

    W = W₀ + s·B·A,   G = ∂L/∂W (out × in) is never formed:   a₀ = ∂L/∂A = s·Bᵀ·G,   b₀ = ∂L/∂B = s·G·Aᵀ
    g_A = (BᵀB)⁻¹·a₀/s² + X·A            g_B = (I − B·(BᵀB)⁻¹·Bᵀ)·b₀·(AAᵀ)⁻¹/s² − B·X
    BᵀB·X + X·AAᵀ = −(BᵀB)⁻¹·a₀·Aᵀ/s²     E = s·B·g_A + s·g_B·A = P_B·G + (I − P_B)·G·P_A

To first order W moves along E, the nearest to G that two factors can follow; X leaves E as it is and brings (g_A, g_B)
nearest to (a₀, b₀). At B = 0, where LoRA starts, this is g_A = 0, g_B = b₀·(AAᵀ)⁻¹/s². Both Gram matrices get a ridge
`delta`, and directions without weight in float32 (r·1e-7 of the largest eigenvalue) are left out, as `pinv` does. What
is r × r is float64, all else float32 at least.

variant="full", the paper's:    m ← β₁m + (1 − β₁)E,  v ← β₂v + (1 − β₂)E²,  D = m̂ / (√v̂ + eps),  and the step is
    along the closed form with G = D. m and v have W's shape, as in full fine-tuning: 8·out·in bytes a matrix. E and D
    exist a few rows at a time, the steps count from 1 (the authors' code corrects for one too many).
variant="efficient", not the paper's but ours: (g_A, g_B) first, then Adam on each of them; memory is LoRA's.
variant="sgd":    A ← A − lr·g_A,  B ← B − lr·g_B.

Decay is decoupled and acts on A and B. Parameters of groups without `scaling` take plain AdamW, whatever the variant.
Clip the raw gradients, before the step, as loops do: nothing is left to do here. (The authors measure the norm of the
raw gradients and scale the adjusted ones.) Averages over micro-batches and processes come before the step as well.
While B is tiny g_A is large: in "full" the second step can turn much of A over, whatever the learning rate, as B is
as small as the first step left it. `delta` bounds that, and a warm-up does not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from weft.algebra.random import generator
from weft.errors import UsageError, nearest
from weft.optim._config import OptimConfig
from weft.optim._optimizer import Group, Optimizer, State, named
from weft.registry import Card

CARD = Card(
    title="LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
    arxiv="2407.18242",
    year=2025,
    summary="LoRA whose two gradients are adjusted so that their step is nearest to full fine-tuning's",
    knob="",
    needs=("a LoRA on the model",),
    recipe={"learning_rate": 2e-5, "weight_decay": 0.0, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine"},
    limitations="The paper's variant keeps two moments of the full weight's shape; `efficient` keeps LoRA's.",
    reasons={"knob": "the adapter has the rank; the optimiser has none"},
)

VARIANTS = ("full", "efficient", "sgd")
_TOGETHER = 1 << 22  # numbers of A and B that are adjusted at once, in a dozen temporaries of this size
_TILE = {"cpu": 1 << 18}  # numbers of E that exist at once: with those of D, m and v they stay in cache
_TILE_ELSEWHERE = 1 << 22  # an accelerator wants work for all of its cores

LOGGER = logging.getLogger(__name__)


@dataclass
class LoraProConfig(OptimConfig):
    """Options of LoRA-Pro."""

    variant: Literal["full", "efficient", "sgd"] = field(
        default="full",
        metadata={"help": "moments of W's shape (full, the paper's), of A and B (efficient), or none (sgd)"},
    )
    delta: float = field(default=1e-8, metadata={"help": "ridge on BᵀB and AAᵀ where they are inverted"})


class LoraPro(Optimizer):
    """LoRA-Pro for pairs of factors; groups without `scaling` take AdamW."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scaling: float | list[float] | None = None,
        variant: str = "full",
        delta: float = 1e-8,
    ) -> None:
        """
        Args:
            params: groups of pairs, `{"params": [A₁, B₁, A₂, B₂, …], "scaling": [s₁, s₂, …]}` with A (r × in) and B
                (out × r), beside groups without `scaling`; `weft.optim.lora_pro.groups` makes both of a model.
            scaling: s, one for every pair or a list with one each; None in a group whose parameters are no pairs.
            variant: "full", "efficient" or "sgd".
            delta: ridge on BᵀB and AAᵀ where they are inverted.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"scaling": scaling, "variant": variant, "delta": delta})

    def check(self, group: Group) -> None:
        if group["variant"] not in VARIANTS:
            known = nearest(str(group["variant"]), VARIANTS)
            raise UsageError(f"LoraPro: unknown variant {group['variant']!r}: {known}")
        if not 0 <= group["delta"] < math.inf:
            raise UsageError(f"LoraPro: delta={group['delta']!r} must not be below 0")
        if group["scaling"] is None:
            return
        params = group["params"]
        if len(params) % 2:
            raise UsageError(f"LoraPro: a group of {len(params)} parameters is not one of pairs A, B, A, B, …")
        if not isinstance(group["scaling"], (list, tuple)):
            group["scaling"] = [group["scaling"]] * (len(params) // 2)
        if len(group["scaling"]) != len(params) // 2 or not all(0 < abs(s) < math.inf for s in group["scaling"]):
            raise UsageError(f"LoraPro: scaling must be {len(params) // 2} finite numbers but 0, one for every pair")
        for a, b in zip(params[::2], params[1::2]):
            if isinstance(a, DTensor) or isinstance(b, DTensor):
                raise UsageError(
                    "LoraPro: sharded factors cannot be adjusted, which takes whole ones: use DDP, or leave the "
                    "adapter out of FSDP with ignored_params"
                )
            if a.dim() < 2 or b.dim() < 2 or len(a) != b[0].numel():
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise UsageError(f"LoraPro: shapes {shapes} are not those of A (r × in) and B (out × r)")

    def take(self) -> None:
        for place, group in enumerate(self.param_groups):
            names = list(named(group, place)) if group["scaling"] is not None else []
            for pair in zip(names[::2], names[1::2]):
                trained = [name for name, p in pair if p.grad is not None]
                if len(trained) == 1:
                    raise UsageError(
                        f"LoraPro: {trained[0]} has a gradient and the other factor of its pair has none; nothing moved"
                    )
        super().take()

    def update(self, group: Group, parameters: list[tuple[str, Tensor]]) -> None:
        if group["scaling"] is None:
            self._adam(group, [(p, _wide(p.grad)) for _, p in parameters])
            return
        alike: dict[tuple[object, ...], list[Pair]] = {}
        for a, b, s in zip(group["params"][::2], group["params"][1::2], group["scaling"]):
            if a.grad is not None:
                alike.setdefault((a.shape, b.shape, a.dtype, b.dtype, a.device), []).append(Pair(a, b, s))
        for same in alike.values():
            count = max(1, _TOGETHER // (same[0].a.numel() + same[0].b.numel()))
            for first in range(0, len(same), count):
                self._move(group, same[first : first + count])

    def _move(self, group: Group, pairs: list[Pair]) -> None:
        """Take the step of pairs of one shape."""
        form = ClosedForm(pairs, group["delta"])
        a0 = torch.stack([_matrix(pair.a.grad) for pair in pairs])
        b0 = torch.stack([_matrix(pair.b.grad) for pair in pairs])
        if group["variant"] == "full":
            left, right = form.equivalent(a0, b0)
            a_t = form.a.mT.contiguous()  # every tile reads it, and faster this way
            for i, pair in enumerate(pairs):
                state = self._state(pair.b, (left.shape[1], right.shape[2]), left)
                project(state, left[i], right[i], form.b[i], a_t[i], group, a0[i], b0[i])
                a0[i] *= pair.scaling
                b0[i] *= pair.scaling
        adjusted = zip(pairs, *form.nearest(a0, b0))
        moves = [(p, g.view_as(p)) for pair, *both in adjusted for p, g in zip((pair.a, pair.b), both)]
        if group["variant"] == "efficient":
            self._adam(group, moves)
            return
        for p, g in moves:
            wide = p.to(g.dtype)  # p itself where it is as wide
            _keep(p, wide.mul_(1 - group["lr"] * group["weight_decay"]).sub_(g, alpha=group["lr"]))

    def _state(self, p: Tensor, shape: Sequence[int], like: Tensor) -> State:
        """A parameter's state with its step counted; the first time, zero moments of this shape."""
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=like.new_zeros(shape), exp_avg_sq=like.new_zeros(shape))
        state["step"] += 1
        return state

    def _adam(self, group: Group, moves: list[tuple[Tensor, Tensor]]) -> None:
        """AdamW's step of parameters along gradients."""
        states = [self._state(p, g.shape, g) for p, g in moves]
        wide = [p.to(g.dtype) for p, g in moves]
        m, v, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        adam_(wide, [g for _, g in moves], m, v, steps, group, group["lr"], group["weight_decay"])
        for (p, _), moved in zip(moves, wide):
            _keep(p, moved)


class Pair(NamedTuple):
    """The trained factors of one weight: ΔW = scaling·B·A, where both are seen as matrices, A r × in and B out × r."""

    a: nn.Parameter | Tensor
    b: nn.Parameter | Tensor
    scaling: float


class ClosedForm:
    """The adjusted gradients of k pairs of one shape, all at once.

    Attributes:
        a, b: k × r × in and k × out × r, float32 at least.
    """

    def __init__(self, pairs: list[Pair], delta: float) -> None:
        self.a = torch.stack([_matrix(pair.a) for pair in pairs])
        self.b = torch.stack([_matrix(pair.b) for pair in pairs])
        scalings = [pair.scaling for pair in pairs]
        self._s = torch.tensor(scalings, dtype=torch.float64, device=self.a.device)[:, None, None]
        self._cut = self.a.shape[1] * torch.finfo(self.a.dtype).eps  # relative; pinv's
        a, b = self.a.double(), self.b.double()
        values, vectors = torch.linalg.eigh(torch.stack([b.mT @ b, a @ a.mT]))
        (self._p, self._q), (self._u, self._v) = values.clamp_(min=0), vectors
        self._inverse_b, self._inverse_a = (vectors * self._reciprocal(values + delta)[..., None, :]) @ vectors.mT

    def _reciprocal(self, x: Tensor) -> Tensor:
        """1/x, and 0 where x (≥ 0) is nothing beside the largest of the last dimension."""
        kept = x > self._cut * x.amax(-1, keepdim=True)
        return torch.where(kept, x, 1).reciprocal() * kept

    def _plain(self, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
        """g_A and g_B for X = 0."""
        inverse_b = (self._inverse_b / self._s**2).to(a0.dtype)
        inverse_a = (self._inverse_a / self._s**2).to(b0.dtype)
        projected = self.b @ (self._inverse_b.to(b0.dtype) @ (self.b.mT @ b0))
        return inverse_b @ a0, (b0 - projected) @ inverse_a

    def nearest(self, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
        """g_A (k × r × in) and g_B (k × out × r) for LoRA's gradients a₀ and b₀."""
        g_a, g_b = self._plain(a0, b0)
        c = self._u.mT @ (g_a @ self.a.mT).double() @ self._v
        sums = self._p[..., :, None] + self._q[..., None, :]
        x = -self._u @ (c * self._reciprocal(sums.flatten(1)).view_as(sums)) @ self._v.mT
        x = x.to(a0.dtype)
        return g_a + x @ self.a, g_b - self.b @ x

    def equivalent(self, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
        """Left (k × out × 2r) and right (k × 2r × in) factors of E, the gradient that W sees."""
        g_a, g_b = self._plain(a0, b0)
        return torch.cat([self.b, g_b], 2) * self._s.to(b0.dtype), torch.cat([g_a, self.a], 1)


def project(
    state: State, left: Tensor, right: Tensor, b: Tensor, a_t: Tensor, group: Group, onto_b: Tensor, onto_a: Tensor
) -> None:
    """Move W's moments on by E = left·right, and write Bᵀ·D (r × in) and D·Aᵀ (out × r) of D = m̂/(√v̂ + eps).

    b is B (out × r), a_t is Aᵀ (in × r), and onto_b, onto_a are what is written.
    E and D exist a few rows at a time, which are in cache with the moments' rows when those are needed.
    """
    m, v = state["exp_avg"], state["exp_avg_sq"]
    out, in_ = m.shape
    # Bᵀ·D is read and written with every tile: let that be little beside the tile itself
    rows = min(out, max(4 * a_t.shape[1], _TILE.get(m.device.type, _TILE_ELSEWHERE) // in_))
    e, minus_d = m.new_empty(rows, in_), m.new_empty(rows, in_)
    onto_b.zero_()
    for top in range(0, out, rows):
        part = slice(top, min(out, top + rows))
        e_, d_ = e[: part.stop - top], minus_d[: part.stop - top]
        torch.mm(left[part], right, out=e_)
        adam_([d_.zero_()], [e_], [m[part]], [v[part]], [state["step"]], group)  # a step of length 1 from 0
        onto_b.addmm_(b[part].mT, d_, alpha=-1)
        torch.mm(d_, a_t, out=onto_a[part]).neg_()


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    steps: list[int],
    group: Group,
    lr: float = 1.0,
    decay: float = 0.0,
) -> None:
    """torch's AdamW, in one pass over each tensor where torch has a kernel for that; steps count from 1."""
    one_pass = all(p.device.type in ("cpu", "cuda") and not isinstance(p, DTensor) for p in params)
    before = [torch.full((), step - 1.0, device=p.device) for p, step in zip(params, steps)]
    b1, b2 = group["betas"]
    adamw(
        params, grads, m, v, [], before, foreach=False, fused=one_pass, amsgrad=False, maximize=False,
        beta1=b1, beta2=b2, lr=lr, weight_decay=decay, eps=group["eps"],
    )


def _wide(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _matrix(t: Tensor | None) -> Tensor:
    """A factor as a matrix, float32 at least; that of a convolution has its kernel flattened."""
    return _wide(t).flatten(1)


def _keep(p: Tensor, wide: Tensor) -> None:
    """p ← wide, rounded once; nothing where they are one."""
    if wide is not p:
        p.copy_(wide)


# --- pairs of a model -------------------------------------------------------------------------------------------------


def pairs(model: nn.Module) -> dict[str, Pair]:
    """The trained two-factor adapters of a model, by the name of the module that holds them.

    PEFT's LoRA (also of embeddings and convolutions, whose ΔW is a matrix all the same), and deltas of weft that have
    nothing but A and B in training, unbent. Scalings are read now: after changing one, make a new optimiser.

    Raises UsageError for an adapter whose ΔW is not s·B·A: DoRA and other variants, trained gates, experts and grouped
    convolutions, dropout, one factor frozen; where two share a weight or a factor; and where there is none.
    """
    found: dict[str, Pair] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            pair = _of_peft(name, module)
        elif hasattr(module, "factors") and all(isinstance(getattr(module, f, None), nn.Parameter) for f in "AB"):
            pair = _of_weft(name, module)
        else:
            continue
        if pair is None:
            continue
        for p in (pair.a, pair.b):
            if owners.setdefault(id(p), name) != name:
                raise _refused(name, f"shares a factor with {owners[id(p)]}")
        found[name] = pair
    if not found:
        raise UsageError(
            f"lora_pro needs a two-factor adapter, and {type(model).__name__} has none in training: attach one first, "
            "for instance peft.get_peft_model(model, LoraConfig(...))"
        )
    return found


def groups(model: nn.Module, *, weight_decay: float = 0.0) -> list[Group]:
    """The trained parameters of a model in groups, by name: pairs, and the rest with and without decay."""
    found = pairs(model)
    names = {id(p): name for name, p in model.named_parameters()}
    factors = [(names[id(p)], p) for pair in found.values() for p in (pair.a, pair.b)]
    inside = {id(p) for _, p in factors}
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    LOGGER.info(f"{len(found)} pairs are adjusted; AdamW for {sum(p.numel() for _, p in rest):,} other parameters")
    made: list[Group] = [
        {"params": factors, "scaling": [pair.scaling for pair in found.values()], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in rest if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in made if group["params"]]


def _refused(name: str, why: str) -> UsageError:
    return UsageError(f"lora_pro cannot serve {name}: it {why}")


def _of_peft(name: str, module: Any) -> Pair | None:
    """The trained pair of a LoRA layer, if it has one."""
    trained = {}
    for downs, ups in ((module.lora_A, module.lora_B), _embedded(module)):
        for adapter in downs:
            a, b = (getattr(half[adapter], "weight", half[adapter]) for half in (downs, ups))
            if a.requires_grad or b.requires_grad:
                trained[adapter] = (a, b)
    if not trained:
        return None
    if len(trained) > 1:
        raise _refused(name, f"trains {len(trained)} adapters at once ({', '.join(trained)}); train one at a time")
    ((adapter, (a, b)),) = trained.items()
    variant = getattr(module, "lora_variant", {}).get(adapter)
    dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
    if getattr(module, "use_dora", {}).get(adapter):
        raise _refused(name, "is a DoRA, whose magnitudes make ΔW more than s·B·A; use a LoRA")
    if variant is not None or hasattr(module, "lora_E"):
        kind = type(module if variant is None else variant).__name__
        raise _refused(name, f"is a {kind}, whose ΔW is not s·B·A; use a plain LoRA")
    if dropout:
        raise _refused(name, f"has dropout {dropout:g}, and its gradients would not be those of one W; use 0")
    if a.requires_grad != b.requires_grad:
        raise _refused(name, f"trains {'A' if a.requires_grad else 'B'} only; both factors must be trained")
    if getattr(module, "num_experts", 1) != 1 or a.flatten(1).shape[0] != b.flatten(1).shape[1]:
        raise _refused(name, "has several ΔW in one pair of tensors (experts, or a grouped convolution)")
    return Pair(a, b, float(module.scaling[adapter]))


def _embedded(module: Any) -> tuple[Any, Any]:
    return getattr(module, "lora_embedding_A", {}), getattr(module, "lora_embedding_B", {})


def _of_weft(name: str, delta: Any) -> Pair | None:
    """The pair of a delta of weft with trained factors, if it is trained."""
    trained = {own for own, p in delta.named_parameters() if p.requires_grad}
    if not trained:
        return None
    if trained != {"A", "B"}:
        found = ", ".join(sorted(trained))
        raise _refused(name, f"trains {found}; what can be adjusted are A and B, both and nothing else")
    if getattr(delta, "dropout", 0.0):
        raise _refused(name, f"has dropout {delta.dropout:g}, and its gradients would not be those of one W; use 0")
    if getattr(delta.controller, "events", False):
        raise _refused(name, "changes its factors or gradients from step to step by a rule of its own")
    scaling = _constant_scaling(name, delta)
    if scaling is None:
        raise _refused(name, "does not use A and B as they are: its ΔW is not s·B·A")
    return Pair(delta.A, delta.B, scaling)


def _constant_scaling(name: str, delta: Any) -> float | None:
    """s, where factors() and its gradient are those of (s·B, A) for random A and B; None where they are not."""
    source = generator("lora_pro", name)
    a, b, to_a, to_b = (torch.randn(p.shape, generator=source).to(p) for p in (delta.A, delta.B) * 2)
    a.requires_grad_(), b.requires_grad_()
    with torch.enable_grad():
        made_b, made_a = torch.func.functional_call(_Factors(delta), {"delta.A": a, "delta.B": b}, ())
        if made_a.shape != a.shape or made_b.shape != b.shape or not (made_a.requires_grad and made_b.requires_grad):
            return None
        grad_a, grad_b = torch.autograd.grad((made_a * to_a).sum() + (made_b * to_b).sum(), (a, b))
    scaling = float((made_b.double() * b).sum() / b.double().square().sum())
    expected = ((made_a, a), (made_b, scaling * b), (grad_a, to_a), (grad_b, scaling * to_b))
    as_expected = all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in expected)
    return scaling if scaling and as_expected else None


class _Factors(nn.Module):
    """`factors()` of a delta as a forward, which is what `functional_call` calls."""

    def __init__(self, delta: nn.Module) -> None:
        super().__init__()
        self.delta = delta

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.delta.factors()  # type: ignore[operator]


def arguments(config: LoraProConfig, model: nn.Module, weight_decay: float) -> dict[str, Any]:
    """What `LoraPro` takes for this model."""
    rest = {name: getattr(config, name) for name in ("betas", "eps", "variant", "delta")}
    return {"params": groups(model, weight_decay=weight_decay), "weight_decay": weight_decay, **rest}
