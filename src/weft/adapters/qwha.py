"""QWHA: a few Walsh-Hadamard coefficients a channel, started so that they cancel the error of quantisation.

Hyesung Jeon, Seojune Lee, Beomseok Kang, Yulhwa Kim and Jae-Joon Kim, "QWHA: Quantization-Aware Walsh-Hadamard
Adaptation for Parameter-Efficient Fine-Tuning on Large Language Models", 2025, arXiv 2509.17428.

    ΔW = s·F·H       H: in × in, the Walsh-Hadamard transform;  F: out × in, zero but for c at p frozen places

Trained is c (p,), p = r·(in + out) but at most in·out: as many numbers as LoRA of rank r, in a ΔW of any rank. H is
orthonormal here: the paper's F divided by √in, and its authors' `scale` divided by √(in·out), so that their 4000 is 1
at a width of 4000. Where in is no multiple of 4, or its odd factor is above 45, cosines stand in for the ±1 of that
factor. Adam moves c by the learning rate and ΔW by s times that; another s leaves the start where it is.

The start, for every weight W of a full-precision model and W_Q of the quantised one, with E = W − W_Q and G = Σ x·xᵀ
over what the layer receives for `batches` in the full-precision model (padding left out, ε·mean(diag G) added to the
diagonal):

    ‖(E − ΔW)·G^½‖²      is to be small: the error of the layer's output
    p_i ∝ q_i^t          coefficients of channel i, p in all, at most in each; q_i is ‖E_i·G^½‖, the paper's, or ‖E_i‖,
                         the authors' code's (`allocate_by`)
    S_i                  the p_i places whose coefficient in E_i·Hᵀ is largest, as it is (the paper), or times the size
                         of what the layer receives along that row of H (the code) (`choose_by`)
    c_i = argmin         of ‖(E_i − c·H_S)·G^½‖, p_i × p_i equations; E_i·Hᵀ itself would be best for white inputs only

In the coordinates F all of it is Ĝ = H·G·Hᵀ, two fast transforms; G^½ is never made, nor an eigendecomposition.
`allocation="magnitude"` takes the p largest scores of the whole weight, `"random"` draws equally many places a channel.

`weft.prepare(model, config, original_weights=full_precision_model, batches=...)` does it. Where nothing is lost (E = 0:
the same model, or a layer that is not quantised) places are drawn, equally many a channel, and c = 0; without any other
layer no batch is run. Random places need no `prepare` and then start from zero. Experts that share a parameter keep
their inputs to themselves: their own error is made small, G = I, as that of a layer that no batch reaches. Calibrate on
training text. G takes in² float64 numbers a layer, so the batches are run again whenever CALIBRATED_BYTES are full.

Dense products with H would cost 2·out·in² for ΔW alone; the fast ones cost a few times 64·out·in. A layer multiplies
once by W + ΔW where it may fold: a step over n inputs then takes n·out·in multiplications beside the layer's own two
times n·out·in, for the gradient of ΔW, or on a CPU n·p and the transform of x, because c needs p of its entries alone.
LoRA takes 3·n·r·(in + out) = 3·n·p. Beside narrow or quantised weights a product with ΔW costs n·out·in each way as
well; few inputs are transformed themselves instead, and multiplied by the p numbers. No ΔW is kept for the backward
pass; it is made twice.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from weft.adapters._config import AdapterConfig
from weft.adapters._core import on_meta
from weft.adapters._delta import Delta, Site
from weft.adapters._kinds import QuantisedLinear
from weft.algebra.random import generator
from weft.algebra.transforms import Transform, wht
from weft.errors import UsageError, WeftError
from weft.registry import Card

logger = logging.getLogger("weft")

CARD = Card(
    title=(
        "QWHA: Quantization-Aware Walsh-Hadamard Adaptation for Parameter-Efficient Fine-Tuning on Large Language "
        "Models"
    ),
    arxiv="2509.17428",
    year=2025,
    summary="sparse Walsh-Hadamard coefficients of full rank that start by cancelling quantisation error",
    recipe={"learning_rate": 2e-4, "weight_decay": 0.1, "warmup_ratio": 0.06, "lr_scheduler_type": "cosine"},
    exports="bounded",
    needs=("original_weights", "batches"),
    refuses={
        "Embedding": "a Walsh transform along the vocabulary mixes words that have nothing in common",
        "Conv": "what it receives are overlapping patches, which are not calibrated on here",
    },
    limitations=(
        "Made for models in 2 to 4 bits. Weight decay pulls towards the quantised weights. ΔW has full rank: merge it "
        "into dequantised weights, or export a LoRA of a smaller rank and see the error."
    ),
    reasons={
        "exports": "ΔW's rank is as large as a side of the weight",
        "init_drift": (
            "It is zero where nothing was lost to quantisation, or without prepare; else ΔW starts as the part of the "
            "error W − W_Q that it cancels"
        ),
        "file": "places: where the coefficients lie in F, found from the quantisation error or drawn",
    },
)

CALIBRATED_BYTES = 4 << 30  # of G's that are summed in one run over the batches
_SOLVED_AT_ONCE = 1 << 23  # numbers in a batch of equations


@dataclass
class QwhaConfig(AdapterConfig):
    """Options of QWHA."""

    r: int = field(
        default=8, metadata={"help": "budget: as many coefficients as LoRA of this rank trains (the paper: 64)"}
    )
    scale: float = field(default=1.0, metadata={"help": "s, the factor on ΔW; scales the learning rate, not the start"})
    allocation: Literal["adaalloc", "magnitude", "random"] = field(
        default="adaalloc",
        metadata={"help": "places: by the error of channels (adaalloc), the largest of all (magnitude) or random"},
    )
    allocate_by: Literal["activation", "weight"] = field(
        default="activation", metadata={"help": "error of a channel: of its output, or of its weights alone"}
    )
    choose_by: Literal["activation", "weight"] = field(
        default="activation", metadata={"help": "worth of a coefficient: in the layer's output, or in the weight alone"}
    )
    temperature: float = field(default=1.0, metadata={"help": "t; 0 gives every channel as many coefficients"})
    refine: bool = field(default=True, metadata={"help": "fit the chosen coefficients to the layer's output together"})
    damping: float = field(default=1e-4, metadata={"help": "ε, white input added to what calibration sees"})
    seed: int = field(default=0, metadata={"help": "seed of places that are drawn"})

    def validate(self) -> None:
        super().validate()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r}: use {', '.join(known[:-1])} or {known[-1]}")
        for name in ("scale", "damping"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)!r} must be above 0")
        if not self.temperature >= 0:
            raise UsageError(f"temperature={self.temperature!r} must not be below 0")


_CHOICES = {
    "allocation": ("adaalloc", "magnitude", "random"),
    "allocate_by": ("activation", "weight"),
    "choose_by": ("activation", "weight"),
}


# --- the product ------------------------------------------------------------------------------------------------------


class QwhaDelta(Delta):
    """ΔW = s·F·H. `places` says how many entries each row of F has (out,), then the column of each, row by row (p,)."""

    config: QwhaConfig
    places: Tensor

    def __init__(self, config: QwhaConfig, site: Site) -> None:
        super().__init__(config, site)
        self.p = budget(site.check_rank(config.r), site)
        self.transform = wht(site.in_)
        if (asked := getattr(config, "asked", None)) is not None:
            asked.append(site)
        blank = on_meta(site) or site.stored or asked is not None
        found = Start.blank(self.p, site) if blank else _consume(config, site, self.p)
        self.c = nn.Parameter(found.values.to(site.device) / config.scale)
        narrow = next(t for t in (torch.uint8, torch.int16, torch.int32) if torch.iinfo(t).max >= site.in_)
        self.register_buffer("places", torch.cat([found.counts, found.columns]).to(site.device, narrow))

    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and column in F of every entry (p,)."""
        counts, columns = self.places.long().split([self.out, self.p])
        every = torch.arange(self.p, device=counts.device)
        return torch.searchsorted(counts.cumsum(0), every, right=True), columns

    def _flat(self) -> Tensor:
        rows, columns = self.cells()
        return rows * self.in_ + columns

    def delta(self) -> Tensor:
        return synthesis(self.config.scale * self.c, self._flat(), self.out, self.transform)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return self._sparse(x) if self._few(x) else self._product(x.to(narrow), None, None)

    def _few(self, x: Tensor) -> bool:
        """Whether products with the p entries alone make fewer numbers than ΔW has."""
        return self.kind.tokens(x) * self.p <= self.out * self.in_

    def _sparse(self, x: Tensor) -> Tensor:
        rows, columns = self.cells()
        h = self.transform.forward(x.to(self.c.dtype)).index_select(-1, columns) * (self.config.scale * self.c)
        y = h.new_zeros(*x.shape[:-1], self.out).index_add(-1, rows, h)
        return y.to(x.dtype)

    def folds(self, x: Tensor) -> bool:
        return not self._few(x)

    def fold(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return self._product(x, w, bias)

    def _product(self, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        return Product.apply(x, w, bias, self.c, self._flat(), self.out, self.config.scale, self.transform)

    def count(self) -> int:
        return self.p


def budget(r: int, site: Site) -> int:
    """p: what LoRA of rank r trains, at most all of the weight."""
    return min(r * (site.in_ + site.out), site.in_ * site.out)


def synthesis(c: Tensor, places: Tensor, out: int, transform: Transform) -> Tensor:
    """F·H (out × in)."""
    f = torch.zeros(out * transform.n, dtype=c.dtype, device=c.device).scatter_(0, places, c)
    return transform.inverse(f.view(out, transform.n))


class Product(torch.autograd.Function):
    """x·(W + ΔW)ᵀ + bias, or x·ΔWᵀ without a W; ΔW is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, bias: Tensor | None,
        c: Tensor, places: Tensor, out: int, scale: float, transform: Transform,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, w, c, places)
        ctx.rest = out, scale, transform
        return linear(x, _onto(w, synthesis(scale * c, places, out, transform), x), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, c, places = ctx.saved_tensors
        out, scale, transform = ctx.rest
        (g,) = grads
        d_x = g @ _onto(w, synthesis(scale * c, places, out, transform), x) if ctx.needs_input_grad[0] else None
        g, x = g.reshape(-1, out), x.reshape(-1, transform.n)
        d_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        if sampling_is_cheaper(len(c), out, transform.n, x) and not ctx.needs_input_grad[1]:
            return d_x, None, d_bias, sampled(g, x, c, places, transform) * scale, None, None, None, None
        d_w = g.mT @ x
        d_c = transform.forward(d_w.to(c.dtype)).flatten().index_select(0, places) * scale
        return d_x, d_w if ctx.needs_input_grad[1] else None, d_bias, d_c, None, None, None, None


def sampling_is_cheaper(p: int, out: int, in_: int, x: Tensor) -> bool:
    """Whether p products of columns and the transform of x take less than a dense product, per input.

    One multiplication of theirs takes about 16 and 4 times as long as one of a dense product, on a CPU.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return 16 * p + 4 * 64 * in_ < out * in_


def sampled(g: Tensor, x: Tensor, c: Tensor, places: Tensor, transform: Transform) -> Tensor:
    """The entries of gᵀ·x·Hᵀ at the places (p,), in blocks of inputs that stay in a processor's cache."""
    rows, columns = places // transform.n, places % transform.n
    starts = torch.searchsorted(rows, torch.arange(g.shape[1] + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR")  # that they are new
        total = torch.sparse_csr_tensor(starts, columns, torch.zeros_like(c), (g.shape[1], transform.n))
    for gs, xs in zip(g.split(256), x.split(256)):
        total = torch.sparse.sampled_addmm(total, gs.mT.to(c.dtype), transform.forward(xs.to(c.dtype)))
    return total.values()


def _onto(w: Tensor | None, update: Tensor, x: Tensor) -> Tensor:
    return update.to(x.dtype) if w is None else update.to(w.dtype).add_(w)


# --- the start --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Values of F (p,), their columns row by row (p,), and how many each row has (out,)."""

    values: Tensor
    columns: Tensor
    counts: Tensor

    @classmethod
    def blank(cls, p: int, site: Site) -> Start:
        """To be filled from a file."""
        return cls(*(torch.zeros(n, device=site.device) for n in (p, p, site.out)))


def prepare(model: nn.Module, config: QwhaConfig, *, original_weights: nn.Module, batches: Iterable[Any]) -> None:
    """Find places and values that cancel the error of every quantised weight that the config targets.

    Args:
        model: the model to adapt; it is left exactly as it was.
        config: read by the deltas when they attach; what is kept on it is not saved with it.
        original_weights: the same model in full precision, run on the batches; or `model` itself where it is.
        batches: keyword arguments of the model's forward; one dictionary is one batch. Not read where nothing is lost.
    """
    config.prepared = {}  # type: ignore[attr-defined]
    adapted, original = (m.get_base_model() if isinstance(m, PeftModel) else m for m in (model, original_weights))
    sites = _sites(adapted, config)
    if original is adapted and any(isinstance(site.kind, QuantisedLinear) for site in sites):
        logger.warning("qwha was given no weights from before quantisation, so it starts from zero at random places")
    whole = {} if original is adapted else {site.name: site for site in _sites(original, config)}
    lossy = []
    for site in sites:
        if whole and bool(_error(site, whole).any()):
            lossy.append(site)
        else:
            config.prepared[site.name] = drawn(budget(config.r, site), site, config.seed)  # type: ignore[attr-defined]
    batches = [batches] if isinstance(batches, dict) else list(batches) if lossy else []
    for group in _groups(lossy):
        moments = calibrated(original, {_module(site) for site in group}, batches)
        for site in group:
            g = moments.get(_module(site))
            config.prepared[site.name] = cancelled(_error(site, whole), g, site, config)  # type: ignore[attr-defined]


def _consume(config: QwhaConfig, site: Site, p: int) -> Start:
    """What `prepare` found for this weight, handed over once; random places need no preparing."""
    found: Start | None = getattr(config, "prepared", {}).pop(site.name, None)
    if found is None and config.allocation == "random":
        return drawn(p, site, config.seed)
    if found is None:
        raise UsageError(
            f"qwha starts {site.name} from the error of its quantisation: call weft.prepare(model, config, "
            "original_weights=..., batches=...) on this model, each time before attaching, or set allocation='random'"
        )
    if len(found.values) != p or len(found.counts) != site.out:
        raise UsageError(f"{site.name} was prepared for another r or another model: call weft.prepare again")
    return found


def _sites(model: nn.Module, config: QwhaConfig) -> list[Site]:
    """Where the config attaches: asked of an adapter on a copy of the modules that shares the model's tensors."""
    asking = copy.copy(config)
    asking.asked = []  # type: ignore[attr-defined]
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        inject_adapter_in_model(asking, copy.deepcopy(model, shared), adapter_name="asking")
    finally:
        for p, required in trained:
            p.requires_grad_(required)
    return asking.asked  # type: ignore[attr-defined]


def _module(site: Site) -> str:
    return site.name.partition("#")[0]


def _error(site: Site, whole: dict[str, Site]) -> Tensor:
    """E (out × in), float64."""
    original = whole.get(site.name)
    if original is None or (original.out, original.in_) != (site.out, site.in_):
        raise UsageError(
            f"original_weights has no {site.name} of {site.out} × {site.in_}: give the model that was quantised"
        )
    return original.weight().detach().to(site.device, torch.float64) - site.weight().detach().double()


def _groups(sites: list[Site]) -> Iterator[list[Site]]:
    """The sites, in order, in parts whose G's fit into memory together."""
    group: list[Site] = []
    for site in sites:
        size = sum({_module(s): 8 * s.in_**2 for s in (*group, site)}.values())
        if group and size > CALIBRATED_BYTES:
            yield group
            group = []
        group.append(site)
    if group:
        yield group


@torch.no_grad()
def calibrated(model: nn.Module, names: set[str], batches: list[Any]) -> dict[str, Tensor]:
    """G = Σ x·xᵀ (in × in, float64) of what the named modules receive; those that receive nothing have none."""
    sums: dict[str, Tensor] = {}
    kept: list[Tensor | None] = [None]

    def add(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if kept[0] is not None and kept[0].numel() == len(rows):
            rows = rows[kept[0].flatten().to(rows.device)]
        for block in rows.to(torch.promote_types(x.dtype, torch.float32)).split(4096):
            g = (block.mT @ block).double()
            sums[name] = sums[name].add_(g) if name in sums else g

    if not batches:
        raise UsageError("batches holds none: qwha weighs the error of quantisation by what layers receive")
    modules = {name: module for name, module in model.named_modules() if name in names}
    with _evaluating(model):
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))  # type: ignore[misc]
            for name, module in modules.items()
        ]
        try:
            for batch in batches:
                batch = send_to_device(dict(batch), next(model.parameters()).device)
                mask = batch.get("attention_mask")
                kept[0] = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
                model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
    for name, g in sums.items():
        if not torch.isfinite(g).all():
            raise WeftError(f"what {name} receives on the given batches is not finite, so its error cannot be weighed")
    return {name: g for name, g in sums.items() if g.any()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for m, was in training.items():
            m.training = was


def cancelled(e: Tensor, g: Tensor | None, site: Site, config: QwhaConfig) -> Start:
    """The start against an error E (out × in, float64), weighed by G (in × in), or by nothing."""
    h, p = wht(site.in_), budget(config.r, site)
    f = h.forward(e)
    if g is None:
        weighed, size = f, f.new_ones(site.in_)
    else:
        g = g.to(e.device)
        g = h.forward(h.forward(g + config.damping * g.diagonal().mean() * torch.eye(len(g)).to(g)).mT)
        weighed, size = f @ g, g.diagonal().sqrt()
    score = f.abs() * size if config.choose_by == "activation" else f.abs()
    if config.allocation == "adaalloc":
        q = (weighed * f).sum(1).clamp_min(0).sqrt() if config.allocate_by == "activation" else f.norm(dim=1)
        chosen = _largest_of_rows(score, allocated(q, p, site.in_, config.temperature))
    elif config.allocation == "magnitude":
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen.view(-1)[score.flatten().topk(p).indices] = True
    else:
        places = drawn(p, site, config.seed)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        rows = torch.arange(site.out).repeat_interleave(places.counts)
        chosen[rows.to(e.device), places.columns.to(e.device)] = True
    values = f if g is None or not config.refine else refined(chosen, f, weighed, g, config.damping)
    return Start(values[chosen].float().cpu(), chosen.nonzero()[:, 1].cpu(), chosen.sum(1).cpu())


def allocated(q: Tensor, p: int, most: int, t: float) -> Tensor:
    """p shared among channels in proportion to q^t, none above `most`; what is left goes to all that have room alike.

    >>> allocated(torch.tensor([3.0, 1.0, 0.0]), 8, 4, 1.0)
    tensor([4, 3, 1])
    """
    share = (q.double() / q.max().clamp_min(1e-300)) ** t
    if not bool(share.any()):
        share = torch.ones_like(share)
    counts = (p * share / share.sum()).floor().long().clamp(max=most)
    while (left := p - int(counts.sum())) and left >= (room := int((counts < most).sum())):
        counts = (counts + left // room).clamp(max=most)
    fewest = counts.masked_fill(counts == most, most + 1).argsort(stable=True)
    counts[fewest[:left]] += 1
    return counts


def _largest_of_rows(score: Tensor, counts: Tensor) -> Tensor:
    """Where the counts[i] largest entries of row i are."""
    places = score.topk(int(counts.max()), dim=1).indices
    wanted = torch.arange(places.shape[1], device=score.device) < counts[:, None]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, places, wanted)


def refined(chosen: Tensor, f: Tensor, weighed: Tensor, g: Tensor, damping: float) -> Tensor:
    """F (out × in) with the chosen entries of every row fitted together: c·Ĝ_SS = (F·Ĝ)_S.

    Rows of nearly equal numbers of places are solved at once, the shorter ones padded with equations 1·c = 0.
    """
    values, counts = f.clone(), chosen.sum(1)
    order = counts.argsort(descending=True)
    order = order[(counts[order] > 0) & (counts[order] < f.shape[1])]  # with all its places a row has E itself
    while len(order):
        k = int(counts[order[0]])
        rows, order = order.tensor_split([max(1, _SOLVED_AT_ONCE // k**2)])
        places = chosen[rows].byte().topk(k, dim=1).indices
        real = chosen[rows].gather(1, places)
        a = torch.where(real[:, :, None] & real[:, None], g[places[:, :, None], places[:, None]], torch.eye(k).to(g))
        b = weighed[rows].gather(1, places) * real
        try:
            c = torch.cholesky_solve(b[:, :, None], torch.linalg.cholesky(a))[:, :, 0]
        except torch.linalg.LinAlgError:
            raise UsageError(
                f"damping={damping!r} leaves the fit to the activations singular: use a larger one, such as 1e-4"
            ) from None
        values[rows] = values[rows].scatter(1, places, c)
    return values


def drawn(p: int, site: Site, seed: int) -> Start:
    """Equally many places a channel, different from each other, as the seed and the module's name say; all values 0."""
    source = generator("qwha", seed, site.name)
    k, more = -(-p // site.out), p % site.out
    if 4 * k > site.in_:
        columns = torch.rand(site.out, site.in_, generator=source).argsort(1)[:, :k].sort(1).values
    else:  # few of many: draw again what is there twice
        columns = torch.randint(site.in_, (site.out, k), generator=source).sort(1).values
        while bool((again := pad(columns[:, 1:] == columns[:, :-1], (1, 0))).any()):
            columns[again] = torch.randint(site.in_, (int(again.sum()),), generator=source)
            columns = columns.sort(1).values
    kept = torch.ones_like(columns, dtype=torch.bool)
    if more:  # the channels after the first `more` have one place less
        left_out = torch.randint(k, (site.out - more,), generator=source)
        kept[torch.arange(more, site.out), left_out] = False
    return Start(torch.zeros(p), columns[kept], kept.sum(1))
