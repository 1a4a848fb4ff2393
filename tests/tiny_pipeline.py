"""A Stable Diffusion of some thousand weights, and captioned images to adapt it to."""

import json
import tempfile
from pathlib import Path

import numpy as np

CAPTIONS = ("a red ball", "a blue ball", "a red cube", "a blue cube")


def save_pipeline(folder: Path, prediction: str = "epsilon") -> Path:
    """16 × 16 pixels, latents of 4 × 8 × 8, captions of 12 tokens; weights are random, of a fixed seed."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    tokenizer = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    noise = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "scheduler": noise}
    pipe = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return folder


def _tokenizer():
    """CLIP's tokenizer with letters for words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: place for place, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=12)


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Coloured discs and squares on noise, 20 × 24 pixels, which CAPTIONS tell in turn."""
    dice = np.random.default_rng(seed)
    rows, columns = np.mgrid[:20, :24]
    made = []
    for place in range(count):
        picture = dice.integers(0, 60, (20, 24, 3), dtype=np.uint8)
        square = (abs(rows - 10) < 6) & (abs(columns - 12) < 6)
        disc = (rows - 10) ** 2 + (columns - 12) ** 2 < 36
        picture[square if "cube" in CAPTIONS[place % 4] else disc] = (220, 30, 30) if place % 2 == 0 else (30, 30, 220)
        made.append(picture)
    return made


def save_captioned(folder: Path, count: int = 8, table: bool = False, seed: int = 0) -> Path:
    """Images with a text beside each, or with a table of all."""
    from PIL import Image

    folder.mkdir(parents=True)
    rows = []
    for place, picture in enumerate(pictures(count, seed)):
        name, caption = f"{place:02}.png", CAPTIONS[place % 4]
        Image.fromarray(picture).save(folder / name)
        rows.append({"file_name": name, "text": caption})
        if not table:
            (folder / name).with_suffix(".txt").write_text(caption + "\n")
    if table:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
