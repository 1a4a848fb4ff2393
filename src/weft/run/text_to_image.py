"""Images by words: the UNet of a diffusion pipeline, adapted to images with captions.

What is frozen is run once. The VAE's posterior of each image and the text encoder's states of each caption are computed
before training and read from a file without a name, so that neither network is in memory while the UNet trains. A
training step draws the latents from the posterior, a timestep and the noise, each as a function of (seed, step, row):
a resumed run sees the same, whatever the batches are cut into. Evaluation takes the posterior's mean, the same noise of
each row every time, and a ladder of timesteps, so that losses of two methods differ by the methods alone.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, WeftError
from weft.files import whole_folder
from weft.run import captions, images, models, sources

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from weft.run.data import Splits

INDEX = "model_index.json"  # where diffusers keeps what a pipeline consists of
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what an adapter goes on by itself
RUNGS = 8  # timesteps at which an image is evaluated
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


# --- the pipeline -----------------------------------------------------------------------------------------------------


def is_pipeline(spec: str) -> bool:
    """Whether a model is a pipeline of diffusers, by its folder or on the hub."""
    if Path(spec).expanduser().is_dir():
        return (Path(spec).expanduser() / INDEX).exists()
    from transformers.utils import cached_file

    try:
        return cached_file(spec, INDEX, _raise_exceptions_for_missing_entries=False) is not None
    except (OSError, ValueError):
        return False


def library() -> Any:
    """diffusers, silent about what it loads and warns of, for the rest of the process."""
    from weft.adapters import _diffusers

    found = _diffusers.library()
    found.utils.logging.set_verbosity_error()
    found.utils.logging.disable_progress_bar()
    return found


def locate(spec: str) -> str:
    """What diffusers' `from_pretrained` takes for a pipeline given by the user. Raises UsageError for what is none."""
    path = Path(spec).expanduser()
    if models.from_scratch(spec) or spec.startswith("builtin:"):
        raise UsageError(f"model {spec!r} is no pipeline of diffusers, which text-to-image adapts")
    if path.is_dir() and not (path / INDEX).exists():
        raise UsageError(f"{spec} is a folder without {INDEX}, so it is no pipeline of diffusers")
    # PEFT looks on the hub for what might be a name there, which a whole path is not
    return str(path.absolute()) if path.is_dir() else models.locate(spec)


@dataclass(frozen=True)
class Pipeline:
    """What a run knows of a pipeline before any weights: it stands where other tasks have a tokenizer.

    Attributes:
        path: what diffusers loads it from.
        height, width: of its images, in pixels.
        latent: channels × height × width of its latents.
        tokens: of a caption, padding included; `states`: of each token.
    """

    path: str
    height: int
    width: int
    latent: tuple[int, int, int]
    tokens: int
    states: int
    model_input_names: tuple[str, ...] = ()

    def save_whole(self, unet: Any, folder: Path) -> None:
        """Write the pipeline with this UNet in it."""
        _loaded(self.path, unet=unet).save_pretrained(folder)


def pipeline(spec: str) -> Pipeline:
    """Look at a pipeline's configs. Raises UsageError where it is none, or none of those that are served."""
    from transformers import AutoTokenizer

    diffusers, path = library(), locate(spec)
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
        name = index.get("_class_name")
        if name != "StableDiffusionPipeline":
            parts = [f" with a {index[part][1]}" for part in ("unet", "transformer", "prior") if index.get(part)]
            raise UsageError(
                f"model {spec!r} is a {name}{''.join(parts)}: text-to-image adapts the UNet2DConditionModel of a "
                "StableDiffusionPipeline"
            )
        unet = diffusers.UNet2DConditionModel.load_config(path, subfolder="unet")
        vae = diffusers.AutoencoderKL.load_config(path, subfolder="vae")
        noise = diffusers.DDPMScheduler.load_config(path, subfolder="scheduler")
        tokens = AutoTokenizer.from_pretrained(path, subfolder="tokenizer").model_max_length
    except (OSError, ValueError) as error:
        raise UsageError(f"model {spec!r} is not a whole pipeline, here or on the hub: {_reason(error)}") from error
    if noise.get("prediction_type", "epsilon") not in _PREDICTIONS:
        raise UsageError(
            f"model {spec!r}: its scheduler's prediction_type is {noise['prediction_type']!r}, and there are "
            + ", ".join(_PREDICTIONS)
        )
    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    latent = (vae["latent_channels"], height, width)
    return Pipeline(path, height * factor, width * factor, latent, tokens, unet["cross_attention_dim"])


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__


def _loaded(path: str, **parts: Any) -> Any:
    """The pipeline in float32, with these parts in place of its own. Raises WeftError for files that cannot be read."""
    import torch

    for folder in sorted(Path(path).iterdir()) if Path(path).is_dir() else []:
        if folder.name not in parts:
            models.check_safetensors(folder)
    try:
        found = library().StableDiffusionPipeline.from_pretrained(path, use_safetensors=True, **parts)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeftError(f"cannot load the pipeline {path!r}: {_reason(error)}") from error
    return found.to(dtype=torch.float32)


@functools.cache
def _denoiser() -> Any:
    """UNet2DConditionModel as Trainer and methods meet a model: with labels its output has a loss."""
    kind = library().UNet2DConditionModel

    class Denoiser(kind):  # type: ignore[misc,valid-type]
        supports_gradient_checkpointing = True

        def forward(
            self,
            sample: torch.Tensor,
            timestep: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            labels: torch.Tensor | None = None,
        ) -> Any:
            made = super().forward(sample.to(self.dtype), timestep, encoder_hidden_states.to(self.dtype))
            if labels is not None:
                made["loss"] = loss(made, labels)
            return made

        def activation_checkpointing_enable(self, **_: Any) -> None:
            self.enable_gradient_checkpointing()

        gradient_checkpointing_enable = activation_checkpointing_enable

    # its files, and PEFT's, are those of the class that diffusers knows
    Denoiser.__name__, Denoiser.__qualname__, Denoiser.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Denoiser


def load_base(spec: str, dtype: torch.dtype, known: Pipeline | None, *, weights: bool = True) -> models.Base:
    """A pipeline's UNet; without weights on the meta device. Raises WeftError for files that cannot be read."""
    from accelerate import init_empty_weights

    known = known if known is not None else pipeline(spec)
    kind = _denoiser()
    try:
        if weights:
            models.check_safetensors(Path(known.path) / "unet")
            unet = kind.from_pretrained(known.path, subfolder="unet", use_safetensors=True).to(dtype)
        else:
            with init_empty_weights(include_buffers=True):
                unet = kind.from_config(kind.load_config(known.path, subfolder="unet")).to(dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeftError(f"cannot load the UNet of {spec!r}: {_reason(error)}") from error
    unet.name_or_path = known.path  # from which PEFT takes what the adapter is for
    return models.Base(unet, known, spec, "text-to-image")


def settle(config: Any) -> None:
    """Let the config adapt the linear layers of the UNet's attention where it names no targets.

    What PEFT would look up by a model's type, which a UNet does not have: IA3's feed-forward layers, of which attention
    has none.
    """
    if config.target_modules == "all-linear":
        config.target_modules = list(ATTENTION)
    if getattr(config, "feedforward_modules", ()) is None:
        config.feedforward_modules = []


# --- what is computed once --------------------------------------------------------------------------------------------


def splits(rows: sources.Rows, known: Pipeline) -> Splits:
    """Rows as splits ready for the UNet: what its pipeline's frozen parts make of them, computed here."""
    import torch
    from numpy import ndarray

    from weft.run.data import SplitReport, Splits

    device = models.device()
    pipe = _loaded(known.path, unet=None, safety_checker=None, requires_safety_checker=False).to(device)
    noise = Noise(library().DDPMScheduler.from_config(pipe.scheduler.config), pipe.vae.config.scaling_factor)
    every = {name: getattr(rows, name) for name in sources.SPLITS}
    texts = {row["text"]: None for part in every.values() for row in part}
    places = {caption: place for place, caption in enumerate(texts)}
    longest = {text: len(pipe.tokenizer(text, verbose=False)["input_ids"]) for text in texts}

    def states() -> Iterator[torch.Tensor]:
        for caption in _watched(texts, "captions"):
            yield pipe.encode_prompt(caption, device, 1, do_classifier_free_guidance=False)[0][0]

    def posteriors(part: list[sources.Row], name: str) -> Iterator[torch.Tensor]:
        # one at a time, so that an image's numbers do not depend on its neighbours, nor memory on their count
        for row in _watched(part, f"images of {name}"):
            pixels = _pixels(row["image"], known).to(device)
            yield pipe.vae.encode(pixels[None]).latent_dist.parameters[0]

    channels, height, width = known.latent
    with torch.inference_mode():
        prompts = _stored(states(), (len(texts), known.tokens, known.states))
        made, held = {}, prompts.nbytes
        for name, part in every.items():
            found: ndarray[Any, Any] = _stored(posteriors(part, name), (len(part), 2 * channels, height, width))
            held += found.nbytes
            made[name] = Noised(found, prompts, [places[row["text"]] for row in part], range(len(part)), noise)
    notes = [*(f"held out for {line}" for line in rows.held_out), *rows.notes]
    notes.append(
        f"images reach the VAE as 3 x {known.height} x {known.width} numbers; it and the text encoder are frozen and "
        f"ran once: {held / 2**20:,.1f} MiB of latents and captions in a file"
    )
    report: dict[str, Any] = {"kind": rows.kind}
    for name, part in every.items():
        cut = sum(longest[row["text"]] > known.tokens for row in part)
        report[name] = vars(SplitReport(rows=len(part), loss_tokens=len(part), truncated_rows=cut))
        if cut:
            notes.append(f"{name}: {cut:,} captions longer than {known.tokens} tokens were cut")
    report["notes"] = notes
    return Splits(**made, task=rows.task, report=report)


def _watched(items: Iterable[Any], what: str) -> Iterable[Any]:
    """The items, with a bar on a terminal while they are gone through."""
    from rich.console import Console
    from rich.progress import track

    items = list(items)
    return track(items, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _pixels(image: Any, known: Pipeline) -> torch.Tensor:
    """3 × height × width, from −1 to 1: the largest part of the pipeline's shape from the image's middle, resized."""
    import numpy
    import torch
    from PIL import Image, ImageOps

    found = ImageOps.fit(images.opened(image, grey=False), (known.width, known.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(found)).permute(2, 0, 1).float() / 127.5 - 1


def _stored(tensors: Iterator[torch.Tensor], shape: tuple[int, ...]) -> Any:
    """Tensors that come one after another, as an array of float32 that reads them from a file.

    The file has no name, so that it is gone with the process, however that ends. Raises WeftError on a full disk.
    """
    import numpy

    from weft.run.checkpoints import is_disk_full

    if not shape[0]:
        return numpy.zeros(shape, numpy.float32)
    file = tempfile.TemporaryFile()  # noqa: SIM115 — the array maps it
    try:
        for tensor in tensors:
            file.write(tensor.float().cpu().numpy().tobytes())
        file.flush()
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise WeftError(
            f"the disk is full: latents and captions did not fit into {tempfile.gettempdir()}; TMPDIR names another"
        ) from error
    return numpy.memmap(file, numpy.float32, "r", shape=shape)


# --- noise and loss ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """How a pipeline mixes latents with noise: its scheduler's settings, and the factor that its VAE's latents take."""

    scheduler: Any
    scaling: float

    def latents(self, posterior: torch.Tensor, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Latents of posteriors (rows × 2·channels × …: means and log variances), for a normal draw; else the mean."""
        mean, spread = posterior.chunk(2, 1)
        return self.scaling * (mean if drawn is None else mean + (spread.clamp(-30, 20) / 2).exp() * drawn)

    def mixed(
        self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the UNet gets of latents and noise (rows × channels × …) at a timestep a row; what it is to say."""
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timestep)
        else:
            target = noise if kind == "epsilon" else latents
        sample = self.scheduler.add_noise(latents, noise, timestep)
        return {"sample": sample, "timestep": timestep, "encoder_hidden_states": states, "labels": target}

    @property
    def steps(self) -> int:
        return self.scheduler.config.num_train_timesteps


def squares(made: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean square of the error of each row."""
    return (made.float() - target.float()).square().flatten(1).mean(1)


def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The mean square a row, over all micro-batches of a step."""
    each = squares(outputs["sample"], labels)
    return each.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@dataclass(frozen=True)
class Noised:
    """A split as Trainer and `evaluate` read it; a row holds no noise, which comes with the step.

    Attributes:
        posteriors: images × 2·channels × height × width, and `prompts`, captions × tokens × states, in files.
        captions: the caption of each image.
        numbers: the images that are in the split.
    """

    posteriors: Any
    prompts: Any
    captions: Sequence[int]
    numbers: Sequence[int]
    noise: Noise
    column_names: tuple[str, ...] = ("posterior", "prompt", "labels", "document")
    loss = staticmethod(loss)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        import numpy
        import torch

        number = self.numbers[place]
        posterior = torch.from_numpy(numpy.array(self.posteriors[number]))
        prompt = torch.from_numpy(numpy.array(self.prompts[self.captions[number]]))
        # its number stands where a label does: Trainer counts rows by it, and noise is drawn for it
        return {"posterior": posterior, "prompt": prompt, "labels": number, "document": number}

    def select(self, places: Sequence[int]) -> Noised:
        numbers = [self.numbers[place] for place in places]
        return Noised(self.posteriors, self.prompts, self.captions, numbers, self.noise)

    def noised(self, batch: dict[str, torch.Tensor], seed: int, step: int) -> dict[str, torch.Tensor]:
        """What the UNet gets of a collated batch in an optimiser step, and what it is to say."""
        import torch

        from weft.algebra.random import generator

        posterior = batch["posterior"]
        dice = [generator(seed, step, number, "diffusion") for number in batch["labels"].tolist()]
        normal = torch.stack([torch.randn(2, *self._latent(), generator=each) for each in dice], 1)
        timestep = torch.stack([torch.randint(self.noise.steps, (), generator=each) for each in dice])
        of_posterior, noise = normal.to(posterior.device)
        latents = self.noise.latents(posterior, of_posterior)
        return self.noise.mixed(latents, noise, timestep.to(posterior.device), batch["prompt"])

    def measure(
        self, model: Any, batch_size: int, rows: Sequence[int], bf16: bool = False
    ) -> list[tuple[int, int, float, int, int]]:
        """One entry a row, as `evaluate.measure_rows` has them: (row, its number, mean square over rungs, 1, −1)."""
        import torch

        from weft.algebra.random import generator
        from weft.run.evaluate import autocast

        device, was_training = next(model.parameters()).device, model.training
        found = []
        try:
            model.eval()
            for start in range(0, len(rows), batch_size):
                places = rows[start : start + batch_size]
                batch = collate([self[place] for place in places])
                numbers = batch["labels"].tolist()
                latents, states = self.noise.latents(batch["posterior"]).to(device), batch["prompt"].to(device)
                errors = torch.zeros(len(numbers), dtype=torch.float64)
                for rung in range(RUNGS):
                    dice = [generator("validation", number, rung) for number in numbers]
                    noise = torch.stack([torch.randn(self._latent(), generator=each) for each in dice])
                    timestep = torch.full((len(numbers),), (2 * rung + 1) * self.noise.steps // (2 * RUNGS))
                    inputs = self.noise.mixed(latents, noise.to(device), timestep.to(device), states)
                    target = inputs.pop("labels")
                    with torch.inference_mode(), autocast(device, bf16):
                        errors += squares(model(**inputs)["sample"], target).double().cpu() / RUNGS
                found += [(place, number, each, 1, -1) for place, number, each in zip(places, numbers, errors.tolist())]
        finally:
            model.train(was_training)
        return sorted(found)

    def summarise(self, measured: list[tuple[int, int, float, int, int]]) -> dict[str, Any]:
        """`loss`: mean square of the error over rows and timesteps; `rows`; `per_document`: [that of the row, 1]."""
        errors = [error for _, _, error, _, _ in measured]
        return {"loss": sum(errors) / len(errors), "rows": len(errors), "per_document": [[each, 1] for each in errors]}

    def _latent(self) -> tuple[int, ...]:
        channels, *sides = self.posteriors.shape[1:]
        return channels // 2, *sides


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of rows of `Noised`: posteriors, prompts, and numbers as labels."""
    import torch

    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("posterior", "prompt")}
    return stacked | {"labels": torch.tensor([row["labels"] for row in rows])}


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: denoising steps, how much the prompt weighs (1: no guidance), and the first one's seed."""

    steps: int = 50
    guidance: float = 7.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, not {self.steps}")
        if self.guidance < 0:
            raise UsageError(f"guidance must not be below 0, not {self.guidance}")


def load_pipeline(model: str | None, adapter: Path, *, bf16: bool = False) -> Any:
    """The pipeline that an adapter was made for (or `model`) with the adapter on its UNet; or the folder's own."""
    import torch

    from weft.run.predict import adapter_facts, attach_saved

    facts = adapter_facts(adapter)
    spec = facts["base"] if facts["kind"] == "model" else model or facts["base"]
    if not spec:
        raise UsageError(f"adapter {str(adapter)!r} does not say which model it is for: give --model")
    pipe = _loaded(pipeline(spec).path).to(models.device(), torch.bfloat16 if bf16 else torch.float32)
    if facts["kind"] == "adapter":  # whose own tensors stay as they are
        models.check_safetensors(adapter)
        attach_saved(pipe.unet, adapter, spec).to(models.device()).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompts: Sequence[str], how: Drawing, batch_size: int) -> Iterator[tuple[Image, int, bool]]:
    """The image of each prompt, its seed, and whether the pipeline's own safety checker has blackened it.

    The seeds follow one another, so that an image does not depend on the others.
    """
    import torch

    for start in range(0, len(prompts), batch_size):
        some = list(prompts[start : start + batch_size])
        seeds = [how.seed + start + place for place in range(len(some))]
        made = pipe(
            some,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        yield from zip(made.images, seeds, made.nsfw_content_detected or [False] * len(some), strict=True)


def write_images(
    pipe: Any, prompts: Sequence[str], how: Drawing, batch_size: int, output: Path
) -> Iterator[dict[str, Any]]:
    """Draw each prompt into a folder that appears whole, and say what is where.

    The folder is one of images with captions, which `weft adapt` reads.
    """

    rows = []
    with whole_folder(output) as folder:
        for number, (image, seed, withheld) in enumerate(draw(pipe, prompts, how, batch_size)):
            name = f"{number:04}.png"
            image.save(folder / name)
            extra = {"withheld": True} if withheld else {}
            rows.append({"file_name": name, "text": prompts[number], "seed": seed, **extra})
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / captions.METADATA[0]).write_text("".join(lines), encoding="utf-8")
    for row in rows:
        yield {"prompt": row.pop("text"), "image": str(output / row.pop("file_name")), **row}
