"""Dual encoders as classifiers: CLIP, SigLIP and their kin tell images apart by what their classes are called.

    logits = s·v·uᵀ (+ b)     v: embeddings of images, of length one;  s, b: the model's own scale and bias
    u = mean over templates of the embeddings, of length one, of "a photo of a NAME.";  of length one again

There is no head: what a class is called takes its place, so a model knows classes that it has never been trained on.
The model stays what transformers loads, module by module, so that an adapter's folder fits `CLIPModel` itself; only its
class learns to answer images alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers.modeling_outputs import ImageClassifierOutput

from weft.errors import UsageError
from weft.run import models

TEMPLATE = "a photo of a {}."
_BETWEEN = "|"  # templates of an option; a comma may be part of one
_AT_ONCE = 256  # texts that are embedded together


# --- what is asked for ------------------------------------------------------------------------------------------------


def prompts_of(text: str | None) -> list[str] | None:
    """The templates of an option; none are the empty list. Raises UsageError for one without a place for the name.

    >>> prompts_of("a photo of a {}.|a drawing of a {}, in ink."), prompts_of("")
    (['a photo of a {}.', 'a drawing of a {}, in ink.'], [])
    """
    if text is None:
        return None
    found = [each.strip() for each in text.split(_BETWEEN)] if text.strip() else []
    for each in found:
        if "{}" not in each:
            raise UsageError(f"prompt_template {each!r} has no {{}} for the name of a class: {TEMPLATE!r} has")
    return found


def settle(spec: str, config: Any, given: Sequence[str] | None, names: Sequence[str] | None) -> bool:
    """Whether a model of images goes by the names of its classes; if so, the templates are in its config afterwards.

    A dual encoder does, unless it was saved as a classifier with a head, or `given` is empty: then its vision side gets
    a head. Classes without `names` are those that the config was saved with.

    Raises UsageError for templates where there is no text side, for a head where none fits, and where classes have no
    names, or numbers in the template made for words.
    """
    import transformers

    if config.model_type not in models.DUAL_ENCODERS:
        if given:
            raise UsageError(
                f"prompt_template is for dual encoders ({', '.join(models.DUAL_ENCODERS)}), and {spec!r} is a "
                f"{config.model_type} model: leave it out"
            )
        return False
    headed = str((config.architectures or [""])[0]).endswith("ForImageClassification")
    known = getattr(config, "weft_prompts", None)
    chosen = given if given is not None else known or ([] if headed else [TEMPLATE])
    config.weft_prompts = list(chosen) or None
    if not chosen:
        if type(config) not in transformers.AutoModelForImageClassification._model_mapping:
            raise UsageError(
                f"{spec!r} is a {config.model_type} model, on whose vision side transformers puts no head: give it a "
                "prompt_template"
            )
        return False
    if not names and not known:
        raise UsageError(f"{spec!r} is a dual encoder, which tells classes apart by their names, and there are none")
    if given is None and not known and all(str(name).lstrip("-").isdecimal() for name in names or ()):
        raise UsageError(
            f"the classes are numbers ({', '.join(list(names or ())[:3])}, ...), and {spec!r} is a dual encoder, which "
            "tells them apart by their names: name them by folders or by `classes` in the .npz, or give a "
            "prompt_template made for numbers, such as 'a photo of the number {}.'"
        )
    return True


# --- the classifier ---------------------------------------------------------------------------------------------------


class DualEncoder(nn.Module):
    """The part of a dual encoder's class that answers images alone; `classifier` makes one."""

    tokenizer: Any
    text_inputs: tuple[str, ...]
    _kept: Tensor | None = None

    def forward(self: Any, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """`logits`, rows × classes in float32, of images (rows × channels × height × width); `loss` with labels."""
        images, classes = self.image_embeddings(pixel_values), self.class_embeddings()
        with torch.autocast(pixel_values.device.type, enabled=False):  # at a scale of 100 a rounding would show
            logits = images @ classes.mT * self.logit_scale.exp() + getattr(self, "logit_bias", 0.0)
        return ImageClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)

    def image_embeddings(self: Any, pixel_values: Tensor) -> Tensor:
        """rows × dimensions, each of length one."""
        return _unit(self.get_image_features(pixel_values).pooler_output)

    def class_embeddings(self: Any) -> Tensor:
        """classes × dimensions, each of length one: in the graph where the text side is trained, else computed once.

        Once is until the model is next put into evaluation, or from there into training.
        """
        trained = any(p.requires_grad for name, p in self.named_parameters() if name.startswith("text_"))
        if trained and (self.training or torch.is_grad_enabled()):
            return self._embedded()
        if self._kept is None or self._kept.device != self.device:
            text_side = [child for name, child in self.named_children() if name.startswith("text_")]
            for child in text_side:
                child.train(False)
            with torch.inference_mode(False), torch.no_grad():
                self._kept = self._embedded()
            for child in text_side:
                child.train(self.training)
        return self._kept

    def train(self: Any, mode: bool = True) -> Any:
        if not (mode and self.training):  # Trainer says so before every step
            self._kept = None
        return super().train(mode)

    def save_pretrained(self: Any, save_directory: str | Path, **more: Any) -> None:
        """With the tokenizer: without it the classes could not be read."""
        super().save_pretrained(save_directory, **more)  # type: ignore[misc]
        self.tokenizer.save_pretrained(save_directory)

    def _embedded(self: Any) -> Tensor:
        inputs = {name: getattr(self, f"class_{name}") for name in self.text_inputs}
        if self.device.type == "meta":  # whose masks cannot be looked at; shapes do not hang on them
            inputs.pop("attention_mask", None)
        batches = zip(*(each.split(_AT_ONCE) for each in inputs.values()))
        found = [self.get_text_features(**dict(zip(inputs, some))).pooler_output for some in batches]
        return _unit(_unit(torch.cat(found)).unflatten(0, (-1, len(self.config.weft_prompts))).mean(1))


def classifier(model: Any, tokenizer: Any, spec: str) -> Any:
    """The same model, changed in place to classify images by the names and templates that its config holds.

    Raises UsageError for a text that is longer than the model can see.
    """
    config, text = model.config, model.config.text_config
    names = [str(name).replace("_", " ") for _, name in sorted(config.id2label.items())]
    texts = [template.replace("{}", name) for name in names for template in config.weft_prompts]
    limit = getattr(text, "max_position_embeddings", None)
    whole = {"padding": "max_length", "max_length": limit} if config.model_type == "siglip" else {"padding": True}
    encoded = tokenizer(texts, return_tensors="pt", verbose=False, **whole)
    if limit is not None and encoded["input_ids"].shape[1] > limit:
        long = max(texts, key=lambda text: len(tokenizer(text, verbose=False)["input_ids"]))
        raise UsageError(f"the text {long!r} is longer than the {limit} tokens that {spec!r} can see")
    model.__class__ = _answering(type(model))
    model.tokenizer, model.text_inputs = tokenizer, tuple(encoded)
    for name, tensor in encoded.items():
        model.register_buffer(f"class_{name}", tensor.to(model.device), persistent=False)
    return model


def sentence(model: Any) -> str | None:
    """By what a model tells classes apart, in words; None for one that has a head."""
    if not isinstance(model, DualEncoder):
        return None
    templates = model.config.weft_prompts  # type: ignore[union-attr]
    first = templates[0].replace("{}", str(model.config.id2label[0]).replace("_", " "))  # type: ignore[union-attr]
    more = f", in the mean of {len(templates)} templates" if len(templates) > 1 else ""
    return f"classes are told apart by their names, the first one as {first!r}{more}"


@functools.cache
def _answering(kind: type) -> type:
    """A class of transformers that answers images alone, by the same name: what is saved names that class."""
    return type(kind.__name__, (DualEncoder, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one, in float32 or better."""
    return normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
