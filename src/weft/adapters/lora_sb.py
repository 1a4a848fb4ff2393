"""LoRA-SB: an r × r core between frozen factors that are taken from the first step of full fine-tuning.

Kaustubh Ponkshe, Raghav Singhal et al., "Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning", 2024, arXiv 2411.19557.

    y = x·Wᵀ + x·Aᵀ·Rᵀ·Bᵀ               A: r × in, B: out × r frozen, orthonormal;  R: r × r trained, scale 1
    D = −η·sign(Σ ∂L/∂W)                the first AdamW step of full fine-tuning, on a few samples
    D ≈ U_r·diag(S_r)·V_rᵀ              B = U_r,  A = V_rᵀ,  R = diag(S_r)

W is not touched, and ΔW is not zero at the start: it is the best rank-r approximation of that step. With orthonormal
factors and scale 1 the gradient of R is the best r × r stand-in for the full gradient, so there is no lora_alpha.

`weft.prepare(model, config, batches=...)` runs the samples through the whole model in training mode and keeps the
factors alone, for one attachment; every targeted weight's gradient is summed in main memory and freed at once. The sign
is taken before the SVD and makes the spectrum flat, so the SVD is exact by default; `svd="sketch"` is randomised with
twice the columns. η is the learning rate of the first warm-up step, learning_rate / (warmup_ratio · total_steps),
unless it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._core import CoreDelta, on_meta
from weft.adapters._delta import Site, leaves
from weft.adapters._plugin import AdaptedModule, ParamWrapper
from weft.adapters._quantised import is_plain
from weft.algebra.random import generator
from weft.algebra.svd import svd_sketch, svd_top
from weft.errors import UsageError, WeftError
from weft.registry import Card

CARD = Card(
    title=("Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning"),
    arxiv="2411.19557",
    year=2024,
    summary="trains an r × r core between factors of the first full fine-tuning step, found from a few samples",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.06, "lr_scheduler_type": "linear"},
    needs=("batches",),
    init_drift=(1e-6, 1e-2),
    limitations=(
        "The frozen factors depend on data and are saved with the adapter. Weight decay pulls towards the base model, "
        "not towards the start."
    ),
    reasons={
        "init_drift": (
            "ΔW starts as the best rank-r approximation of −η·sign(gradient): |ΔW| ≤ η·√(out·in), and not zero where "
            "there is a gradient"
        ),
        "file": "A and B: they come from gradients of the user's data",
    },
)


@dataclass
class LoraSbConfig(AdapterConfig):
    """Options of LoRA-SB."""

    r: int = field(default=32, metadata={"help": "side of the trained core"})
    eta: float | None = field(
        default=None,
        metadata={
            "help": "size η of the simulated first step; learning_rate / (warmup_ratio · total_steps) if not given"
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of the run, for η"})
    warmup_ratio: float = field(default=0.06, metadata={"help": "share of the run that warms up, for η"})
    total_steps: int = field(default=500, metadata={"help": "optimiser steps of the run, for η"})
    svd: str = field(default="exact", metadata={"help": "exact, or sketch (randomised; faster where r is small)"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})

    def validate(self) -> None:
        super().validate()
        for name in ("eta", "learning_rate", "total_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name}={value!r} must be above 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise UsageError(f"warmup_ratio={self.warmup_ratio!r} is not a share of the run")
        if self.svd not in ("exact", "sketch"):
            raise UsageError(f"svd={self.svd!r}: use exact or sketch")

    def step_size(self) -> float:
        """η."""
        return self.eta or self.learning_rate / max(1.0, self.warmup_ratio * self.total_steps)


class LoraSbDelta(CoreDelta):
    """ΔW = B·R·A."""

    def __init__(self, config: LoraSbConfig, site: Site) -> None:
        super().__init__(config, site)
        r = self.r = site.check_rank(config.r)
        if on_meta(site) or site.stored:
            factors = site.empty(site.out, r), site.empty(r, r), site.empty(r, site.in_)
        else:
            factors = _consume(config, site)
        b, core, a = factors
        self.freeze_factors(b, a)
        self.R = nn.Parameter(core)

    def core(self) -> Tensor:
        return self.R

    def count(self) -> int:
        return self.r**2


def _consume(config: LoraSbConfig, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """What `prepare` found for this weight, handed over so that no second adapter shares its memory."""
    found = getattr(config, "prepared", {}).pop(site.name, None)
    if found is None:
        raise UsageError(
            f"lora_sb starts {site.name} from gradients of your data: call weft.prepare(model, config, batches=...) on "
            "this model, each time before attaching"
        )
    b, core, a = (t.to(site.device) for t in found)
    if core.shape[0] != config.r or b.shape[0] != site.out or a.shape[1] != site.in_:
        raise UsageError(f"{site.name} was prepared for another r or another model: call weft.prepare again")
    return b, core, a


def prepare(model: nn.Module, config: LoraSbConfig, *, batches: Iterable[Any]) -> None:
    """Find B, R and A of every weight that the config targets from the gradients of `batches`, for `config.prepared`.

    Args:
        model: a model whose forward returns an output with `loss`; it is left exactly as it was.
        config: read by the deltas when they attach; what is kept on it is not saved with it.
        batches: keyword arguments of the model's forward, labels included; one dictionary is one batch.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = _targets(inner, config)
    sums = _gradient_sums(model, {name: own for name, (_, own) in layers.items()}, batches)
    config.prepared = {}  # type: ignore[attr-defined]
    for name, (layer, own) in layers.items():
        total = sums.pop(name, None)
        if total is None:
            raise UsageError(f"no gradient reached {name}: the model's loss does not depend on it; leave it out")
        if not torch.isfinite(total).all():
            raise WeftError(f"the gradient of {name} on the given batches is not finite, so no first step can be taken")
        device = own.device if isinstance(own, nn.Parameter) else layer.device
        deltas = leaves(layer.deltas[_NAME])
        if isinstance(layer, ParamWrapper):
            matrices = layer.to_native(total).unbind()
        else:
            matrices = layer.kind.matrix(total).split([d.out for d in deltas])
        for delta, g in zip(deltas, matrices, strict=True):
            found = first_step(g.to(device), config.step_size(), config.r, config.svd)
            config.prepared[delta.name] = found  # type: ignore[attr-defined]


def first_step(g: Tensor, eta: float, r: int, svd: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """B (out × r), R (r × r) and A (r × in): the best rank-r approximation of −η·sign(g), orthonormal but for R."""
    sign = -torch.sign(g)
    if svd == "sketch" and 2 * r < min(g.shape):
        b, s, a = svd_sketch(sign, r, oversample=r, power=2, generator=generator("lora_sb", tuple(g.shape)))
    else:
        b, s, a = svd_top(sign, r)
    return b, torch.diag(eta * s), a


_NAME = "prepare"  # of the adapter that is attached to a model without weights, to see where it goes


def _targets(model: nn.Module, config: LoraSbConfig) -> dict[str, tuple[Any, nn.Parameter | nn.Module]]:
    """What the config adapts: by name, the layer as it would be made, and the model's own parameter.

    Of a quantised layer it is the layer itself: its weight can have no gradient.
    """
    memo: dict[int, Any] = {}
    own: dict[int, nn.Parameter] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) if is_plain(p) else p
        own[id(memo[id(p)])] = p
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    unread = copy.copy(config)
    unread.base_sketch = {}  # as if tensors came from a file: nothing is computed
    skeleton = inject_adapter_in_model(unread, copy.deepcopy(model, memo), adapter_name=_NAME)
    layers = [m for m in skeleton.modules() if isinstance(m, AdaptedModule | ParamWrapper) and _NAME in m.deltas]
    return {
        layer.module_name: (
            layer,
            own[id(layer.original())] if layer.backend is None else model.get_submodule(layer.module_name),
        )
        for layer in layers
    }


def _gradient_sums(
    model: nn.Module, wanted: dict[str, nn.Parameter | nn.Module], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Σ ∂L/∂W over the batches, float32 in main memory; at any time at most a layer's gradient is on the device."""
    sums: dict[str, Tensor] = {}

    def add(name: str, g: Tensor) -> None:
        g = g.to("cpu", torch.float32)
        sums[name] = sums[name].add_(g) if name in sums else g

    def keep(name: str, p: Tensor) -> None:
        assert p.grad is not None
        add(name, p.grad.to_dense() if p.grad.is_sparse else p.grad)
        p.grad = None

    def product(name: str, x: Tensor, y: Tensor) -> Tensor:
        """The result of a quantised layer, whose gradient g will give ∂L/∂W = gᵀ·x."""
        y = y if y.requires_grad else y.detach().requires_grad_()
        x = x.detach().flatten(0, -2)
        y.register_hook(lambda g: add(name, g.flatten(0, -2).mT @ x.to(g.dtype)))
        return y

    with _only(model, [p for p in wanted.values() if isinstance(p, nn.Parameter)]):
        hooks = [
            own.register_post_accumulate_grad_hook(lambda p, name=name: keep(name, p))  # type: ignore[misc]
            if isinstance(own, nn.Parameter)
            else own.register_forward_hook(lambda _, args, y, name=name: product(name, args[0], y))  # type: ignore[misc]
            for name, own in wanted.items()
        ]
        try:
            for batch in [batches] if isinstance(batches, dict) else batches:
                batch = send_to_device(dict(batch), next(model.parameters()).device)
                loss = getattr(model(**batch), "loss", None)
                if loss is None:
                    raise UsageError("the model returned no loss for a batch: batches must carry labels")
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return sums


@contextmanager
def _only(model: nn.Module, wanted: list[nn.Parameter]) -> Iterator[None]:
    """Training mode with gradients for `wanted` alone and random numbers of its own; all of it undone at the end."""
    training = {m: m.training for m in model.modules()}
    params = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    buffers = {b: b.clone() for b in model.buffers()}  # training mode moves running statistics
    devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
    try:
        for p in params:
            p.requires_grad_(False)
            p.grad = None
        for p in wanted:
            p.requires_grad_(True)
        model.train()
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        for m, was in training.items():
            m.training = was
        for p, (required, grad) in params.items():
            p.requires_grad_(required)
            p.grad = grad
        for b, was_b in buffers.items():
            b.copy_(was_b)
