"""Of a model of images: what an adapter goes on, what is trained beside it, what stays, and what judges images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from weft import registry
from weft.errors import UsageError, WeftError
from weft.run import models

if TYPE_CHECKING:
    from torch import nn

    from weft.run.methods import Method

# PEFT's own methods that adapt nn.Conv2d.
_PEFT_CONVOLUTIONS = ("boft", "dora", "hra", "ia3", "loha", "lokr", "lora", "oft", "rslora")


def settle(method: Method, config: Any, model: Any) -> None:
    """Let the config train the model's head beside the adapter and, where it names no targets, adapt the backbone.

    A dual encoder has no classifier, and two backbones. Adapted is every linear layer and, where the method serves
    them, every convolution but those that read the pixels (as an embedding reads tokens) and those in several groups,
    whose matrices have next to no rank to spare. Torch's own attention is left alone: it takes the weight of its layer
    and does not call it.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from weft.run import dual, verification

    untouched = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if not isinstance(model, dual.DualEncoder):
        heads = models.head_names(model)
        untouched += heads
        if verification.head_of(model) is None:  # centres of identities are no part of what is saved
            if not hasattr(config, "modules_to_save"):
                raise UsageError(
                    f"{method.name} cannot train a classifier beside itself, which a model of images needs"
                )
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads})
    if config.target_modules != "all-linear":
        return
    pixels = getattr(getattr(model.config, "vision_config", model.config), "num_channels", 3)
    config.target_modules = [
        name
        for name, module in model.named_modules()
        if not f"{name}.".startswith(tuple(f"{each}." for each in untouched))
        and (
            isinstance(module, nn.Linear | Conv1D)
            or (
                isinstance(module, nn.Conv2d)
                and module.groups == 1
                and module.in_channels != pixels
                and serves_convolutions(method)
            )
        )
    ]


def serves_convolutions(method: Method) -> bool:
    """Whether the method adapts nn.Conv2d."""
    if method.trains.startswith("peft:"):
        return method.trains.removeprefix("peft:") in _PEFT_CONVOLUTIONS
    return "Conv" not in registry.card(method.trains).refuses


def keep_statistics(model: nn.Module) -> None:
    """Let batch norms of a frozen model use the statistics that they have, whatever mode the model is put in.

    They would go on counting, in buffers that no adapter's file holds; those of a head that is trained are in it.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    trained = models.head_names(model) if models.task_of_class(type(model).__name__) == "segmentation" else ()
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and name not in trained:
            module.register_forward_pre_hook(_rest)


def _rest(norm: nn.Module, _: Any) -> None:
    norm.training = False


# --- what images are judged by ----------------------------------------------------------------------------------------


def check_quality(method: Method, model: Any) -> None:
    """Raise UsageError where petalface is not told what to judge by, or there are no images; WeftError without piq."""
    from importlib.util import find_spec

    quality = getattr(method.config, "quality", None)
    if quality is None:
        raise UsageError(f"{method.name} must know how good each image is: --quality sharpness, brisque, or one number")
    if isinstance(quality, str) and models.task_of_class(type(model).__name__) != "image-classification":
        raise UsageError(f"quality={quality!r} judges images, which a {type(model).__name__} does not take")
    if quality == "brisque" and find_spec("piq") is None:
        raise WeftError('quality=\'brisque\' needs piq; install it with pip install "weft[quality]"')


def judged_by(method: Method, config: Any, batches: Iterable[dict[str, Any]], processor: Any) -> Any:
    """What `weft.prepare` takes as quality: one number for all images, or the judge whose name the config has.

    Where neither best nor worst was given, they are the scores between which nine in ten of the batches' images lie.

    Raises UsageError where these are the same.
    """
    import torch

    if not isinstance(config.quality, str):
        return config.quality
    judge = _judge(config.quality, processor)
    if not {"best", "worst"} & method.options.keys():
        with torch.no_grad():
            scores = torch.cat([judge(batch["pixel_values"]) for batch in batches]).float()
        low, high = (round(float(scores.quantile(share)), 4) for share in (0.05, 0.95))
        if low == high:
            raise UsageError(f"quality={config.quality!r} finds all images alike, at {low}: give best and worst")
        config.best, config.worst = (low, high) if config.quality == "brisque" else (high, low)
    return judge


def judge_again(model: Any, processor: Any) -> None:
    """Let an adapter that was loaded judge images by what they were judged by when it was trained."""
    from weft.adapters.petalface import score_by

    for config in model.peft_config.values():
        if isinstance(getattr(config, "quality", None), str):
            score_by(model.get_base_model(), _judge(config.quality, processor))


def _judge(name: str, processor: Any) -> Callable[..., Any]:
    """The judge of that name, who is told how the processor scales colours."""
    from weft.adapters.petalface import judge

    scaled = getattr(processor, "data_config", None)  # timm's
    if scaled is not None:
        return judge(name, scaled["mean"], scaled["std"])
    if not getattr(processor, "do_normalize", True):
        return judge(name, 0.0, 1.0)
    return judge(name, processor.image_mean, processor.image_std)
