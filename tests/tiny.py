"""Tiny models and data, made on the fly: shapes of real ones, nothing downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

WORDS = [
    "the",
    "weft",
    "goes",
    "over",
    "and",
    "under",
    "warp",
    "holds",
    "while",
    "loom",
    "beats",
    "time",
    "a",
    "thread",
]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def environment(**extra: str) -> dict[str, str]:
    """What a process of its own needs to find weft and stay off the network."""
    source = str(Path(__file__).parents[1] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def result(output: Path) -> dict:
    """What a finished run says of itself."""
    return json.loads((output / "result.json").read_text(encoding="utf-8"))


def answers(out: str) -> list[dict]:
    """The JSON lines that `weft predict` wrote."""
    return [json.loads(line) for line in out.splitlines()]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of the loom, drawn by seed."""
    import random

    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) + "." for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer():
    """A byte-level BPE of 300 tokens with <s>, </s> and <pad>, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(sentences(50), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT
    return fast


def save_llama(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """A Llama with grouped-query attention, 2 layers wide enough to learn, saved with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """A BERT of one layer with token types, saved with a word-level tokenizer that makes them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(WORDS))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


CLASSES = ("circle", "line", "square")


def pictures(count: int, size: int = 10, seed: int = 0):
    """Coloured pictures, uint8 count × size × size × 3, and their labels: class k is bright in channel k."""
    import numpy as np

    draw = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    made = draw.integers(0, 100, (count, size, size, 3), dtype=np.uint8)
    made[np.arange(count), :, :, labels] += 120
    return made, labels


def save_images(folder: Path, count: int = 12, splits: tuple[str, ...] = ("",)) -> Path:
    """Pictures as files, in a folder a class, of each split."""
    from PIL import Image

    for number, split in enumerate(splits):
        for place, (picture, label) in enumerate(zip(*pictures(count, seed=number), strict=True)):
            path = folder / split / CLASSES[label] / f"{place:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return folder


def save_resnet(folder: Path) -> Path:
    """A ResNet of two blocks and five classes whose batch norms have seen images, saved without an image processor."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config)
    model(torch.randn(8, 3, 16, 16) + 1)
    model.save_pretrained(folder)
    return folder


def save_masks(folder: Path, count: int = 6, splits: tuple[str, ...] = ("",), size: int = 12, level: int = 255) -> Path:
    """Images with a bright square on dark noise, and masks that are `level` there and 0 elsewhere, of each split."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for split in splits:
        for place in range(count):
            image = draw.integers(0, 100, (size, size), dtype=np.uint8)
            mask = np.zeros((size, size), np.uint8)
            top, left = draw.integers(0, size // 2, 2)
            mask[top : top + size // 2, left : left + size // 2] = level
            image[mask > 0] += 130
            for part, pixels in (("images", image), ("masks", mask)):
                path = folder / split / part / f"{place:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


def save_unet(folder: Path, classes: int = 2) -> Path:
    """A U-Net of two levels for grey images."""
    import torch

    from weft.unet import UNetConfig, UNetForSemanticSegmentation

    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=1, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, num_labels=classes
    )
    UNetForSemanticSegmentation(config).save_pretrained(folder)
    return folder


def save_segformer(folder: Path, classes: int = 3) -> Path:
    """A SegFormer of two stages, saved without an image processor."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=classes,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return folder


def save_clip(folder: Path, *, kind: str = "clip", size: int = 16) -> Path:
    """A CLIP (or SigLIP) of two layers a side, saved with a word-level tokenizer and an image processor."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = ["<pad>", "<unk>", "<s>", "</s>", "a", "photo", "of", "drawing", ".", *CLASSES, "weft", "warp", "thread"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**side, "vocab_size": len(known), "max_position_embeddings": 12}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "projection_size": 16}
    config_class, model_class = {
        "clip": (hf.CLIPConfig, hf.CLIPModel), "siglip": (hf.SiglipConfig, hf.SiglipModel)
    }[kind]  # fmt: skip
    sides = {"text_config": text, "vision_config": {**side, "image_size": size, "patch_size": 8}}
    torch.manual_seed(0)
    model_class(config_class(**sides, projection_dim=16)).save_pretrained(folder)
    words.save_pretrained(folder)
    halves = [0.5] * 3
    shape = {"height": size, "width": size}
    hf.ViTImageProcessorPil(size=shape, image_mean=halves, image_std=halves).save_pretrained(folder)
    return folder
