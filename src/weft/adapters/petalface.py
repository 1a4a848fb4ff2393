"""PETALface: two LoRAs in every layer, mixed image by image, by how good the image is.

Kartik Narayan, Nithin Gopalakrishnan Nair, Jennifer Xu, Rama Chellappa and Vishal M. Patel, "PETALface: Parameter
Efficient Transfer Learning for Low-resolution Face Recognition", WACV 2025, arXiv 2412.07771.

    y = x·Wᵀ + b + s·Drop((1 − a)·x·A₁ᵀ·B₁ᵀ) + s·Drop(a·x·A₂ᵀ·B₂ᵀ)      A₁, A₂: r × in,  B₁, B₂: out × r
    a = 0.5 + (q − tau)      q = (score − worst) / (best − worst)         one a for each image of the batch

A is normal with standard deviation 1/r and B zero, so ΔW = 0 at the start, whatever a is. s is a plain factor, not
divided by r. Dropout acts on each branch's output (the authors train with 0.1); a multiplies the hidden features, which
is the same as the input. The second branch learns from good images, the first from bad ones.

The score comes from a frozen judge of single images, which gets no gradient. `best` and `worst` say what it gives to
the best and the worst image, so that q lies in [0, 1] and rises with quality: BRISQUE, which falls, has best=0 and
worst=100. A score outside makes one branch's weight negative; `clamp` keeps a in [0, 1], which the authors do not.

`weft.prepare(model, config, quality=...)` takes what there is to judge by:

    a function     called with whatever the model is called with, in every forward; returns one score an image.
                   It meets pixels as the model does, normalised; `brisque` undoes that.
    "name"         the input of that name holds the scores, which were computed before (in Trainer's arguments say
                   remove_unused_columns=False); the model does not see it
    a number       the score of all images, which is kept as `quality` in the config

The first two are hooked to the model and not saved. After loading an adapter `score_by(model, ...)` hooks them again,
and `with scores(model, q):` gives the scores by hand, in a loop of one's own or for a part of the model (all three are
in weft.adapters.petalface). Where no scores are in force, `quality` in the config counts for every image; without it a
forward is an error, in training and in evaluation, where no other weight would be right either.

No single ΔW has a varying a, so merging and exporting want `quality` as well; the result is a LoRA of rank 2r with
A = [A₁; A₂] and B = s·[(1 − a)·B₁, a·B₂].

On the command line `--quality` is `sharpness`, `brisque` or one number for all images. A judge is kept by name in the
config, so that `weft predict` asks the same; unless `best` or `worst` is given, both are the scores between which nine
in ten of 64 training images lie. In Python, such an adapter wants its judge hooked again once it is loaded:
`score_by(model, judge("sharpness"))`.

A layer that receives n times as many rows as there are scores takes them as n an image, those of an image in a row, as
windowed attention cuts them. With gradient checkpointing, what the backward pass computes again meets the scores of the
last forward pass, so that each forward pass must be followed by its own backward pass (an error says so): put two
batches into one. Under DistributedDataParallel every process scores its own images.

The authors adapt the fused query, key and value of a Swin transformer, put a single LoRA on its last feature layer, and
train a margin softmax over the new identities (`modules_to_save`), clipping gradients at 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft import steps
from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import LowRankDelta, Site
from weft.errors import UsageError, WeftError
from weft.registry import Card

CARD = Card(
    title="PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition",
    arxiv="2412.07771",
    year=2025,
    summary="two LoRAs in every layer, one for good images and one for bad, mixed by each image's quality",
    recipe={
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "warmup_ratio": 0.05,
        "max_grad_norm": 5.0,
        "lr_scheduler_type": "polynomial",
    },
    needs=("quality",),
    refuses={"3-D expert": "an expert gets the tokens of all images together, and a is each image's own"},
    limitations=(
        "Every forward pass needs the quality of its images. Merging and exporting fix it: they want one score for all "
        "images, quality=… in the config."
    ),
)


@dataclass
class PetalfaceConfig(AdapterConfig):
    """Options of PETALface."""

    r: int = field(default=8, metadata={"help": "rank of each of the two branches"})
    scale: float = field(default=1.0, metadata={"help": "s, the factor of both branches; not divided by r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the output of each branch"})
    tau: float = field(default=0.5, metadata={"help": "the quality, in [0, 1], at which both branches count alike"})
    best: float = field(default=1.0, metadata={"help": "the score of the best image; 0 for BRISQUE"})
    worst: float = field(default=0.0, metadata={"help": "the score of the worst image; 100 for BRISQUE"})
    clamp: bool = field(default=False, metadata={"help": "keep a in [0, 1] where scores leave their range"})
    quality: float | str | None = field(
        default=None,
        metadata={
            "help": "what images are judged by on the command line, sharpness or brisque; or the score of every image "
            "that has none, a number, which merging and exporting need"
        },
    )

    def validate(self) -> None:
        super().validate()
        if self.best == self.worst:
            raise UsageError(f"best={self.best!r} and worst={self.worst!r}: the scores of the two must differ")
        if isinstance(self.quality, str) and self.quality not in JUDGES:
            raise UsageError(f"quality={self.quality!r}: use {', '.join(JUDGES)}, or a number")

    def weights(self, score: Tensor) -> Tensor:
        """a of every score, in float32 at least and without a gradient."""
        score = score.detach().to(torch.promote_types(score.dtype, torch.float32))
        a = 0.5 + (score - self.worst) / (self.best - self.worst) - self.tau
        return a.clamp(0, 1) if self.clamp else a


class PetalfaceDelta(LowRankDelta):
    """ΔW = s·[(1 − a)·B₁, a·B₂]·[A₁; A₂], with another a for every image."""

    config: PetalfaceConfig
    controller: PetalfaceController | None

    def __init__(self, config: PetalfaceConfig, site: Site) -> None:
        super().__init__(config, site)
        if not site.stored and config.quality is None and not getattr(config, "is_scored", False):
            raise UsageError(
                f"petalface weighs {site.name} by the quality of each image: call weft.prepare(model, config, "
                "quality=...) before attaching"
            )
        self.r, self.scale = site.check_rank(config.r), config.scale
        self.A1, self.A2 = (nn.Parameter(torch.randn_like(site.empty(self.r, site.in_)) / self.r) for _ in "12")
        self.B1, self.B2 = (nn.Parameter(torch.zeros_like(site.empty(site.out, self.r))) for _ in "12")

    def factors(self) -> tuple[Tensor, Tensor]:
        a = self._fixed("a merged or exported layer has one a: set quality to a number in its config")
        return self.scale * torch.cat([(1 - a) * self.B1, a * self.B2], 1), torch.cat([self.A1, self.A2])

    def forward(self, x: Tensor) -> Tensor:
        return self._mixed(x)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        return self._mixed(x, y)

    def _mixed(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """What the branches make of x, each image with its own a, added onto y where that is given."""
        dtype, dim = self._compute_dtype(x, self.A1), self.kind.channel_dim
        h = self.kind.down(x, torch.cat([self.A1, self.A2]).to(dtype))
        h = h.unflatten(dim, (-1, 2, self.r))  # … groups × branches × r …
        h = h * self._gates(h).to(h.dtype)
        b = (self.scale * torch.cat([self.B1, self.B2], 1)).to(dtype)
        if not (self.dropout and self.training):
            h = h.flatten(dim - 2, dim)
            if onto is None or h.dtype == onto.dtype:
                return self.kind.up(h, b, onto)
            return onto + self.kind.up(h, b).to(onto.dtype)
        first, second = (
            nn.functional.dropout(self.kind.up(one.flatten(dim - 1, dim), up), self.dropout)
            for one, up in zip(h.unbind(dim - 1), b.split(self.r, 1))
        )
        y = first + second
        return y if onto is None else onto + y.to(onto.dtype)

    def _gates(self, h: Tensor) -> Tensor:
        """(1 − a, a) of every row of h (rows × … × groups × 2 × r × …), in the shape that multiplies it."""
        after = -self.kind.channel_dim  # dimensions from the features on
        a = None if self.controller is None else self.controller.in_force()
        if a is None:
            a = self._fixed(
                "nothing says how good these images are: hook a judge to the model (weft.prepare, petalface.score_by), "
                "give scores (petalface.scores), or set quality in the config"
            )[None]
        elif h.dim() - 2 <= after or len(h) % len(a):
            rows = "an input without a batch" if h.dim() - 2 <= after else f"{len(h)} rows"
            raise UsageError(f"{self.name} got {rows} and scores of {len(a)} images: give one score an image")
        if len(a) > 1:
            a = a.repeat_interleave(len(h) // len(a))  # rows of an image follow one another
        return torch.stack([1 - a, a], 1).view(len(a), *[1] * (h.dim() - 2 - after), 2, *[1] * after).to(h.device)

    def _fixed(self, why: str) -> Tensor:
        """a of the config's own score (a scalar), or UsageError."""
        if not isinstance(self.config.quality, int | float):
            raise UsageError(f"petalface weighs {self.name} by the quality of each image, and {why}")
        return self.config.weights(self.A1.new_full((), self.config.quality))

    def count(self) -> int:
        return 2 * self.r * (self.in_ + self.out)

    def controller_class(self) -> type[Controller]:
        return PetalfaceController


class PetalfaceController(Controller):
    """Holds a of the images that are passing through, and keeps it for what the backward pass computes again."""

    a: Tensor | None = None
    kept: Tensor | None = None
    passes = 0  # forward passes with gradients since the last backward pass that asked
    asked = False

    def meet(self, score: Tensor) -> None:
        """These images pass through the model now; score (images,)."""
        self.a = self.config.weights(score)
        if torch.is_grad_enabled():
            self.kept = self.a
            self.passes, self.asked = (1 if self.asked else self.passes + 1), False

    def leave(self) -> None:
        """They have passed."""
        self.a = None

    def in_force(self) -> Tensor | None:
        """a (images,), or None where no scores are in force."""
        if self.a is not None or self.kept is None or torch.compiler.is_compiling():
            return self.a
        if torch._C._current_graph_task_id() == -1:
            return None  # no backward pass is running
        self.asked = True
        if self.passes > 1:
            raise WeftError(
                f"petalface keeps the scores of one batch for gradient checkpointing, and {self.passes} forward passes "
                "came before this backward pass: put their images into one batch"
            )
        return self.kept


# --- where scores come from -------------------------------------------------------------------------------------------


def prepare(model: nn.Module, config: PetalfaceConfig, *, quality: Callable[..., Tensor] | str | float) -> None:
    """Hook what images are judged by to the model, or keep the one score of all of them in the config."""
    if callable(quality) or isinstance(quality, str):
        Scorer(model, quality)
        config.is_scored = True  # type: ignore[attr-defined]
    elif isinstance(quality, int | float):
        config.quality = float(quality)
    else:
        raise UsageError(f"quality={quality!r}: give a function, the name of an input, or the score of all images")


def score_by(model: nn.Module, quality: Callable[..., Tensor] | str) -> Scorer:
    """From now on every forward pass of `model` scores its images.

    Args:
        model: whose layers have the adapter, and which is called itself (hooks of its parts do not see a batch).
        quality: a function of the model's inputs that returns one score an image (images,), or the name of the input
            that holds them, which is then taken out of the model's inputs.

    Returns what `remove()` ends. It replaces what the same model was scored by before, and goes before what parts of it
    are scored by. Raises UsageError where the model has no petalface adapter.
    """
    _holders(model)
    return Scorer(model, quality)


@contextmanager
def scores(model: nn.Module, q: Tensor) -> Iterator[None]:
    """Within, the images of every forward pass have these scores (images,), and no hook is asked.

    Raises UsageError where the model has no petalface adapter, or q is not one score an image.
    """
    holders = _holders(model)
    before = [holder.a for holder in holders]
    _meet(holders, q)
    try:
        yield
    finally:
        for holder, a in zip(holders, before):
            holder.a = a


def sharpness(pixel_values: Tensor, **_: Any) -> Tensor:
    """How much of every image (images × colours × height × width) is fine detail, in decibels: from −60 up to 0.

    Detail is what differs from the mean of 3 × 3 pixels. It is compared with how much the image varies, so that it does
    not matter how pixels were normalised, if all colours were alike.
    """
    x = pixel_values.float()
    detail = x - nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    whole = (x - x.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    share = detail.square().mean((1, 2, 3)) / whole.clamp_min(1e-12)
    return 10 * share.clamp(1e-6, 1).log10()


def brisque(pixel_values: Tensor, mean: Any = 0.5, std: Any = 0.5, **_: Any) -> Tensor:
    """BRISQUE's score of every image (images × colours × height × width): 0 is best, about 100 worst; from `piq`.

    mean and std are those by which pixels in [0, 1] were normalised: numbers, or one a colour. For a model with others
    than these, `functools.partial(brisque, mean=…, std=…)`. The weights are downloaded by piq when first used.
    """
    try:
        import piq
    except ImportError as error:
        raise WeftError('BRISQUE needs piq; install it with pip install "weft[quality]"') from error
    mean, std = (torch.as_tensor(t, device=pixel_values.device).float().view(-1, 1, 1) for t in (mean, std))
    judged = piq.brisque((pixel_values.float() * std + mean).clamp(0, 1), data_range=1.0, reduction="none")
    return judged.flatten()  # images × 1


JUDGES = ("sharpness", "brisque")


def judge(name: str, mean: Any = 0.5, std: Any = 0.5) -> Callable[..., Tensor]:
    """The function that a config's `quality` names, for pixels that were normalised by mean and std; see `brisque`."""
    return functools.partial(brisque, mean=mean, std=std) if name == "brisque" else sharpness


class Scorer:
    """What is hooked to a model to score the images that it is about to see."""

    def __init__(self, model: nn.Module, quality: Callable[..., Tensor] | str) -> None:
        for other in [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]:
            if isinstance(other, Scorer):
                other.remove()
        self.quality = quality
        self.met: list[PetalfaceController] = []
        self.handles = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        )

    def remove(self) -> None:
        """Score no more."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if getattr(module, "_is_replica", False):
            raise UsageError("petalface cannot score under DataParallel, whose threads share it: start with torchrun")
        given = kwargs.pop(self.quality, None) if isinstance(self.quality, str) else None
        self.met = [holder for holder in _holders(module, none=True) if holder.a is None]
        if not self.met:
            return args, kwargs
        if isinstance(self.quality, str) and given is None:
            raise UsageError(f"the batch has no {self.quality!r}, which holds its images' scores: it has {[*kwargs]}")
        if not isinstance(self.quality, str):
            with torch.no_grad():
                given = self.quality(*args, **kwargs)
        _meet(self.met, given)
        return args, kwargs

    def after(self, *_: Any) -> None:
        for holder in self.met:
            holder.leave()
        self.met = []


def _holders(model: nn.Module, none: bool = False) -> list[PetalfaceController]:
    found = [c for c in steps.controllers(model) if isinstance(c, PetalfaceController)]
    if not found and not none:
        raise UsageError(f"this {type(model).__name__} has no petalface adapter to score for: attach one first")
    return found


def _meet(holders: list[PetalfaceController], score: Any) -> None:
    if not isinstance(score, Tensor) or score.dim() != 1:
        what = list(score.shape) if isinstance(score, Tensor) else repr(score)
        raise UsageError(f"quality {what} is not one score an image: give a tensor of shape (images,)")
    for holder in holders:
        holder.meet(score)
