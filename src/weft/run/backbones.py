"""Of an image classifier: what an adapter goes on, what is trained beside it, and what stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft import registry
from weft.errors import UsageError
from weft.run import models

if TYPE_CHECKING:
    from torch import nn

    from weft.run.methods import Method

# PEFT's own methods that adapt nn.Conv2d.
_PEFT_CONVOLUTIONS = ("boft", "dora", "hra", "ia3", "loha", "lokr", "lora", "oft", "rslora")


def settle(method: Method, config: Any, model: Any) -> None:
    """Let the config train the classifier beside the adapter and, where it names no targets, adapt the backbone.

    A dual encoder has no classifier, and two backbones. Adapted is every linear layer and, where the method serves
    them, every convolution but those that read the pixels (as an embedding reads tokens) and those in several groups,
    whose matrices have next to no rank to spare. Torch's own attention is left alone: it takes the weight of its layer
    and does not call it.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from weft.run import dual

    untouched = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if not isinstance(model, dual.DualEncoder):
        head = models.classifier_name(model)
        if not hasattr(config, "modules_to_save"):
            raise UsageError(f"{method.name} cannot train a classifier beside itself, which image classification needs")
        config.modules_to_save = sorted({*(config.modules_to_save or ()), head})
        untouched.append(head)
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

    They would go on counting, in buffers that no adapter's file holds.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_rest)


def _rest(norm: nn.Module, _: Any) -> None:
    norm.training = False
