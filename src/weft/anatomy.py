"""What a model consists of: its config, its blocks, its output heads."""

from __future__ import annotations

from typing import Any

from torch import nn


def auto_config(path: str, **fields: Any) -> Any:
    """The config of a model, as transformers' AutoConfig reads it, ready to make one of."""
    from transformers import AutoConfig

    from weft import unet

    config: Any = unet.config_of(path, **fields) or AutoConfig.from_pretrained(path, **fields)
    if config.model_type == "timm_wrapper":
        # timm writes all that it was called with; transformers calls it with that and its own number of classes
        (config.model_args or {}).pop("num_classes", None)
    return config


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, in order: the entries of the module list that holds most of its weights."""
    best: dict[str, nn.Module] = {}
    most = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module):
            size = sum(p.numel() for p in module.parameters())
            inner = [m for m in module.modules() if m is not module and isinstance(m, nn.ModuleList)]
            if size > most and not any(sum(p.numel() for p in m.parameters()) == size for m in inner):
                most = size
                best = {f"{name}.{i}" if name else str(i): child for i, child in enumerate(module)}
    return best


def all_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of both sides of an encoder-decoder; of any other model its blocks."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return blocks(model)
    sides: Any = [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(side)]}.{name}": block for side in sides for name, block in blocks(side).items()}


def heads(model: nn.Module) -> list[nn.Module]:
    """The modules of a model's output head, whatever it is called; none where it has none."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    named = [getattr(model, name) for name in ("score", "classifier", "lm_head") if hasattr(model, name)]
    return [m for part in [head, *named] if isinstance(part, nn.Module) for m in part.modules()]
