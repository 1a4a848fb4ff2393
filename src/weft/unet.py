"""A U-Net that tells what each pixel is: diffusers' UNet2DModel at time step 0, as transformers' models are.

config.json holds the fields of UNet2DModel beside `"model_type": "weft_unet"`. A folder that diffusers itself saved is
read as well: its last convolution, which makes an image, is replaced by a new one that makes a score a class. After
`import weft.unet`, transformers' AutoModelForSemanticSegmentation loads the one, and `from_pretrained` here both.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from weft.errors import UsageError, WeftError

_WEIGHTS = "diffusion_pytorch_model.safetensors"  # what diffusers calls them


class UNetConfig(PreTrainedConfig):
    """The fields of diffusers' UNet2DModel, all that it has; by default it has four levels without attention."""

    model_type = "weft_unet"
    attribute_map = {"num_channels": "in_channels", "image_size": "sample_size"}

    sample_size: int | list[int] | tuple[int, ...] | None = None  # pixels a side; None takes what comes
    in_channels: int = 3
    block_out_channels: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    layers_per_block: int = 2
    norm_num_groups: int = 8
    add_attention: bool = False
    down_block_types: list[str] | tuple[str, ...] | None = None  # None: without attention
    up_block_types: list[str] | tuple[str, ...] | None = None


class UNetForSemanticSegmentation(PreTrainedModel):
    """Images, rows × channels × height × width, to scores, rows × classes × height × width."""

    config_class = UNetConfig
    base_model_prefix = "unet"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise WeftError('a U-Net is one of diffusers; install it with pip install "weft[diffusers]"') from error
        names = inspect.signature(UNet2DModel).parameters
        known = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if known.get("time_embedding_type") == "fourier" or any("Skip" in each for each in config.up_block_types or ()):
            raise UsageError("a U-Net with Fourier time steps or skip blocks has no answer at time step 0")
        levels = len(config.block_out_channels)
        known["down_block_types"] = config.down_block_types or ["DownBlock2D"] * levels
        known["up_block_types"] = config.up_block_types or ["UpBlock2D"] * levels
        try:
            self.unet: Any = UNet2DModel(**known)
        except ValueError as error:
            raise UsageError(f"diffusers makes no U-Net of these fields: {' '.join(str(error).split())}") from error
        self.unet.conv_out = nn.Identity()  # type: ignore[attr-defined]
        self.classifier = nn.Conv2d(config.block_out_channels[0], config.num_labels, 3, padding=1)
        self.multiple = 2 ** (levels - 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
            module.reset_parameters()  # torch's own, as diffusers has it

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        height, width = pixel_values.shape[2:]
        beyond = (0, -width % self.multiple, 0, -height % self.multiple)
        features = self.unet(pad(pixel_values, beyond, mode="replicate"), 0).sample
        return SemanticSegmenterOutput(logits=self.classifier(features)[..., :height, :width])

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **options: Any
    ) -> Any:
        path = pretrained_model_name_or_path
        file = Path(str(path)) / _WEIGHTS
        if not file.is_file():
            return super().from_pretrained(path, *model_args, config=config, **options)
        from safetensors.torch import load_file

        weights = {f"unet.{name}": t for name, t in load_file(file).items() if not name.startswith("conv_out.")}
        config = config or config_of(str(path))
        return super().from_pretrained(None, *model_args, config=config, state_dict=weights, **options)


def config_of(path: str, **fields: Any) -> UNetConfig | None:
    """The config of a U-Net that diffusers saved, of a folder or a config.json alone; None for any other model."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(saved, dict) or saved.get("_class_name") != "UNet2DModel":
        return None
    return UNetConfig(**{name: value for name, value in saved.items() if not name.startswith("_")} | fields)


AutoConfig.register("weft_unet", UNetConfig)
AutoModelForSemanticSegmentation.register(UNetConfig, UNetForSemanticSegmentation)
