"""What diffusers reads of an adapted UNet: a LoRA for `load_lora_weights`, or a whole pipeline with a merged UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from weft.errors import UsageError, WeftError

DENOISER = "UNet2DConditionModel"


def library() -> Any:
    """diffusers. Raises WeftError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise WeftError('a pipeline needs diffusers; install it with pip install "weft[diffusers]"') from error
    return diffusers


def is_denoiser(model: PeftModel) -> bool:
    """Whether an adapter is on the UNet of a pipeline."""
    return type(model.get_base_model()).__name__ == DENOISER


def load_denoiser(pipeline: str) -> nn.Module:
    """The UNet of a pipeline in a folder or on the hub, in float32."""
    return library().UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", use_safetensors=True)


def write_own_lora(model: PeftModel, folder: Path) -> str | None:
    """Write the files of an adapter that is a LoRA of PEFT's own; None for any other adapter."""
    config = model.peft_config[model.active_adapters[0]]
    if not isinstance(config, LoraConfig):
        return None
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        start = config.init_lora_weights
        raise UsageError(f"init_lora_weights={start!r} moves the base weights as well: export to merged")
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return "PEFT's own LoRA"


def to_lora_weights(folder: Path) -> str:
    """Turn PEFT's files of a UNet's LoRA into the one that `pipe.load_lora_weights` reads; its name.

    Ranks and scales go along in the file's metadata, where diffusers looks before it infers them.
    """
    config = LoraConfig.from_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for file in folder.iterdir():
        file.unlink()
    library().StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=named, unet_lora_adapter_metadata=config.to_dict()
    )
    return "pytorch_lora_weights.safetensors, which pipe.load_lora_weights reads"


def write_pipeline(unet: nn.Module, pipeline: str | None, folder: Path) -> None:
    """Write a pipeline with another UNet in it. Raises UsageError where nothing says which pipeline."""
    if pipeline is None:
        raise UsageError("the UNet does not say which pipeline it is of: merge_and_unload() it and save the pipeline")
    kind = library().StableDiffusionPipeline
    kind.from_pretrained(pipeline, unet=unet, use_safetensors=True).save_pretrained(folder)
