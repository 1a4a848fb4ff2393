"""Images with captions from folders to what a UNet gets of them, against the formulas written out in float64."""

import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_pipeline
import torch
from PIL import Image
from tiny_pipeline import CAPTIONS, pictures

from weft.errors import UsageError, WeftError
from weft.run import data, methods, models, sources

pytest.importorskip("diffusers")
TASK = "text-to-image"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def pipe(once):
    return once("pipeline", tiny_pipeline.save_pipeline)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return tiny_pipeline.save_captioned(tmp_path_factory.mktemp("data") / "d", 4)


def splits_of(pipe, folder, **reading):
    rows = sources.read(str(folder), TASK, validation=str(folder), **reading)
    return data.load_splits(str(folder), TASK, data.load_reader(str(pipe), rows), rows=rows)


@pytest.fixture(scope="module")
def splits(pipe, captioned):
    return splits_of(pipe, captioned)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_text_beside_each_image_and_a_table_of_all_give_the_same_rows(tmp_path):
    texts = sources.read(str(tiny_pipeline.save_captioned(tmp_path / "a", 8)), validation_fraction=0.25)
    table = sources.read(str(tiny_pipeline.save_captioned(tmp_path / "b", 8, table=True)), validation_fraction=0.25)
    assert (texts.kind, texts.task) == ("captioned", TASK) and len(texts.train) == 6 and len(texts.validation) == 2
    for split in ("train", "validation"):
        pairs = zip(getattr(texts, split), getattr(table, split), strict=True)
        assert all(a["image"].name == b["image"].name and a["text"] == b["text"] for a, b in pairs)
    assert all(row["text"] == CAPTIONS[int(row["image"].stem) % 4] for row in texts.train)


def test_splits_are_folders_or_what_a_table_leads_into(tmp_path):
    for split in ("train", "val"):
        tiny_pipeline.save_captioned(tmp_path / "a" / split, 4)
    rows = sources.read(str(tmp_path / "a"))
    assert [len(rows.train), len(rows.validation), rows.held_out] == [4, 4, []]
    for text in (tmp_path / "a").rglob("*.txt"):
        text.unlink()
    names = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.png"))
    table = "file_name,caption\n" + "".join(f'{name},"{name}, drawn"\n' for name in names)
    (tmp_path / "a" / "metadata.csv").write_text(table)
    rows = sources.read(str(tmp_path / "a"), columns={"text": "caption"})
    assert [row["text"] for row in rows.validation] == [f"{name}, drawn" for name in names if name.startswith("val")]
    assert len(rows.train) == 4


def test_a_table_of_bytes_has_columns_of_any_name_and_captions_may_be_empty(tmp_path):
    folder = tiny_pipeline.save_captioned(tmp_path / "d", 2)
    stored = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.glob("*.png"))]
    rows = [{"img": each, "words": words} for each, words in zip(stored, ("a ball", ""), strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = sources.read(str(tmp_path / "d.parquet"), columns={"image": "img", "text": "words"}, validation_fraction=0)
    assert found.task == TASK and [row["text"] for row in found.train] == ["a ball", ""]


def test_folders_of_classes_and_of_text_stay_what_they_are(tmp_path):
    import tiny

    tiny.save_images(tmp_path / "classes")
    (tmp_path / "classes" / "metadata.csv").write_text("name,licence\na,free\n")
    assert sources.read(str(tmp_path / "classes")).task == "image-classification"
    text = tmp_path / "text"
    text.mkdir()
    for place in range(3):
        (text / f"{place}.txt").write_text("the weft goes over " * 40)
    Image.fromarray(pictures(1)[0]).save(text / "0.png")
    assert sources.read(str(text)).task == "causal-lm"


def break_(folder, name):
    if name == "no caption":
        (folder / "02.txt").unlink()
    elif name == "no image":
        (folder / "notes.txt").write_text("read me")
    elif name == "no picture":
        (folder / "01.png").write_text("this is no picture")
    elif name == "no text":
        (folder / "01.txt").write_bytes(b"\xff\xfe")
    elif name == "two tables":
        (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "x"}\n')
        (folder / "metadata.csv").write_text("file_name,text\n00.png,x\n")
    elif name == "missing":
        (folder / "metadata.csv").write_text("file_name,text\n00.png,x\n09.png,y\n")
    elif name == "unnamed":
        (folder / "metadata.csv").write_text("file_name,text\n00.png,x\n")


@pytest.mark.parametrize(
    "name, says",
    [
        ("no caption", ("02.png", "has no caption", "02.txt")),
        ("no image", ("notes.txt", "caption of no image")),
        ("no picture", ("01.png", "cannot be read")),
        ("no text", ("01.txt", "UTF-8")),
        ("two tables", ("both metadata.jsonl and metadata.csv",)),
        ("missing", ("metadata.csv", "row 2", "'09.png' is no file")),
        ("unnamed", ("01.png", "metadata.csv does not name it")),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_by_name(name, says, tmp_path):
    break_(tiny_pipeline.save_captioned(tmp_path / "d", 4), name)
    with pytest.raises(UsageError) as caught:
        sources.read(str(tmp_path / "d"), TASK)
    assert all(part in str(caught.value) for part in says), caught.value
    assert "\n" not in str(caught.value)


def test_images_without_captions_are_refused(tmp_path):
    import tiny

    with pytest.raises(UsageError, match="has no text to learn from: it has image, label; put each image's caption"):
        sources.read(str(tiny.save_images(tmp_path / "d")), TASK)


# --- what is computed once --------------------------------------------------------------------------------------------


def test_latents_and_captions_are_the_pipelines_own(pipe, splits):
    """Of 20 × 24 pixels the middle 20 × 20, made 16 × 16; the rest by the pipeline's own networks."""
    from diffusers import StableDiffusionPipeline

    own = StableDiffusionPipeline.from_pretrained(pipe, safety_checker=None, requires_safety_checker=False)
    for place, picture in enumerate(pictures(4)):
        square = Image.fromarray(picture).resize((16, 16), Image.Resampling.LANCZOS, box=(2, 0, 22, 20))
        pixels = torch.tensor(np.asarray(square, dtype=np.float64) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)
        with torch.no_grad():
            posterior = own.vae.encode(pixels[None]).latent_dist
            ids = own.tokenizer(CAPTIONS[place], padding="max_length", max_length=12, truncation=True).input_ids
            states = own.text_encoder(torch.tensor([ids]))[0][0]
        row = splits.train[place]
        mean, spread = row["posterior"].chunk(2)
        assert row["posterior"].dtype == torch.float32 and row["labels"] == place
        torch.testing.assert_close(mean, posterior.mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((spread / 2).exp(), posterior.std[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(row["prompt"], states, atol=1e-5, rtol=1e-5)


def test_they_lie_in_files_without_names_and_equal_captions_once(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = splits_of(pipe, tiny_pipeline.save_captioned(tmp_path / "d", 8)).train
    assert isinstance(found.posteriors, np.memmap) and isinstance(found.prompts, np.memmap)
    assert found.posteriors.shape == (8, 8, 8, 8) and found.prompts.shape == (4, 12, 16)
    assert not list((tmp_path / "temporary").iterdir())
    first, second, sixth = (found[place]["prompt"] for place in (1, 2, 5))
    assert torch.equal(first, sixth) and not torch.equal(first, second)
    some = found.select([6, 1])
    assert len(some) == 2 and some[0]["labels"] == 6 and torch.equal(some[0]["posterior"], found[6]["posterior"])


def test_a_full_disk_is_said_in_a_sentence(pipe, captioned, monkeypatch):
    import errno
    import tempfile

    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(WeftError, match="the disk is full: latents and captions did not fit.*TMPDIR"):
        splits_of(pipe, captioned)


def test_captions_that_are_cut_are_counted(pipe, tmp_path):
    folder = tiny_pipeline.save_captioned(tmp_path / "d", 4)
    (folder / "00.txt").write_text("a very long caption of a red ball")
    found = splits_of(pipe, folder)
    assert found.report["train"]["truncated_rows"] == 1
    assert "train: 1 captions longer than 12 tokens were cut" in found.lines()


# --- noise and loss ---------------------------------------------------------------------------------------------------


def draws(seed, step, number):
    """The posterior's and the noise's normal draws, and the timestep, as they are documented to be drawn."""
    from weft.algebra.random import generator

    dice = generator(seed, step, number, "diffusion")
    both = torch.randn(2, 4, 8, 8, generator=dice)
    return both[0].double(), both[1].double(), int(torch.randint(1000, (), generator=dice))


def signal():
    """The share of the signal at each timestep: ᾱ of betas whose roots are evenly spaced."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_what_the_unet_gets_is_the_formula(kind, pipe, captioned, tmp_path):
    import shutil

    folder = shutil.copytree(pipe, tmp_path / "pipe")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": kind}))
    train = splits_of(folder, captioned).train
    made = train.noised(data.collate([train[place] for place in (2, 0, 3)]), 5, 7)
    for place, number in enumerate((2, 0, 3)):
        of_posterior, noise, timestep = draws(5, 7, number)
        mean, spread = train[number]["posterior"].double().chunk(2)
        latents = 0.18215 * (mean + (spread / 2).exp() * of_posterior)
        root, rest = signal()[timestep] ** 0.5, (1 - signal()[timestep]) ** 0.5
        target = {"epsilon": noise, "v_prediction": root * noise - rest * latents, "sample": latents}[kind]
        assert int(made["timestep"][place]) == timestep
        assert (made["sample"][place] - (root * latents + rest * noise)).abs().max() < 1e-5
        assert (made["labels"][place] - target).abs().max() < 1e-5
        assert torch.equal(made["encoder_hidden_states"][place], train[number]["prompt"])


def test_noise_is_of_seed_step_and_row_alone(splits):
    def sample(rows, seed=0, step=0):
        return splits.train.noised(data.collate([splits.train[row] for row in rows]), seed, step)["labels"]

    torch.manual_seed(1)
    whole = sample([0, 1, 2, 3])
    torch.manual_seed(2)
    assert torch.equal(whole[[3, 1]], sample([3, 1]))
    others = [whole[1], sample([0], seed=1)[0], sample([0], step=1)[0]]
    assert all(not torch.equal(whole[0], other) for other in others)


def test_the_validation_loss_is_by_hand(pipe, splits):
    """Every row at the middles of eight stretches of time, with the posterior's mean, one forward pass each."""
    from diffusers import UNet2DConditionModel

    from weft.algebra.random import generator
    from weft.run.evaluate import evaluate

    unet = UNet2DConditionModel.from_pretrained(pipe, subfolder="unet")
    errors = []
    for number in range(4):
        row, own = splits.validation[number], []
        latents = 0.18215 * row["posterior"][:4].double()
        for rung, timestep in enumerate((62, 187, 312, 437, 562, 687, 812, 937)):
            noise = torch.randn(4, 8, 8, generator=generator("validation", number, rung))
            mixed = signal()[timestep] ** 0.5 * latents + (1 - signal()[timestep]) ** 0.5 * noise.double()
            with torch.no_grad():
                made = unet(mixed[None].float(), torch.tensor([timestep]), row["prompt"][None]).sample[0]
            own.append(float((made.double() - noise.double()).square().mean()))
        errors.append(sum(own) / 8)
    model = models.load_base(str(pipe), TASK).model
    for batch_size in (1, 3):
        found = evaluate(model, splits.validation, TASK, batch_size)
        assert abs(found["loss"] - sum(errors) / 4) < 1e-6 and found["rows"] == 4
        assert max(abs(each - want) for (each, _), want in zip(found["per_document"], errors, strict=True)) < 1e-6


# --- the model and the method -----------------------------------------------------------------------------------------


def trained(pipe, splits, method, options=None, **settings):
    from weft.run.train import TrainSettings, train

    base = models.load_base(str(pipe), TASK)
    basic = {"max_steps": 4, "batch_size": 4, "save_steps": 0, "eval_steps": 0, "learning_rate": 0.01}
    chosen = methods.resolve(method, options)
    return train(base, splits, chosen, TrainSettings(**{**basic, **settings}), None, progress=False)


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters() if p.requires_grad])


def test_attention_is_adapted_by_itself_and_what_is_named_else(pipe):
    skeleton = models.load_base(str(pipe), TASK, weights=False).model
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    found = methods.matched_modules(methods.resolve("sora"), skeleton)
    assert len(found) == 32 and all(name.split(".attn", 1)[1][2:] in ATTENTION for name in found)
    named = methods.resolve("sora", {"target_modules": ["conv1", "proj_in"], "r": 2})
    found = methods.check_fits(named, skeleton)
    assert {name.rsplit(".", 1)[1] for name in found} == {"conv1", "proj_in"}
    with pytest.raises(UsageError, match="match nothing in UNet2DConditionModel: there are .*to_q"):
        methods.check_fits(methods.resolve("sora", {"target_modules": ["q_proj"]}), skeleton)



@pytest.mark.slow
def test_four_images_are_learnt_by_heart(pipe, splits):
    """Far below 1, the error of a UNet that says nothing but zero."""
    shapes = {"r": 4, "target_modules": ["conv1", "conv2", "conv_in", "conv_out"]}
    assert trained(pipe, splits, "base").validation["loss"] > 1
    for method, options, rate in (("full", {}, 0.005), ("sora", {**shapes, "sparse_lambda": 0.0}, 0.02)):
        result = trained(pipe, splits, method, options, max_steps=20, learning_rate=rate)
        assert result.validation["loss"] < 0.5, method


def test_micro_batches_are_one_batch(pipe, splits):
    whole = trained(pipe, splits, "peft:lora", {"r": 2})
    parts = trained(pipe, splits, "peft:lora", {"r": 2}, batch_size=1, gradient_accumulation=4)
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-4, rtol=1e-3)


def test_recomputed_activations_change_nothing(pipe, splits):
    whole = trained(pipe, splits, "peft:lora", {"r": 2}, max_steps=2)
    again = trained(pipe, splits, "peft:lora", {"r": 2}, max_steps=2, gradient_checkpointing=True)
    torch.testing.assert_close(weights(whole), weights(again), atol=1e-6, rtol=1e-5)


def test_a_method_that_looks_at_gradients_gets_a_loss(pipe, splits):
    result = trained(pipe, splits, "lora_sb", {"r": 2}, max_steps=1)
    assert np.isfinite(result.validation["loss"]) and result.trainable == 32 * 4


def test_bfloat16_is_near(pipe, splits):
    low = trained(pipe, splits, "peft:lora", {"r": 2}, bf16=True).validation["loss"]
    assert abs(low - trained(pipe, splits, "peft:lora", {"r": 2}).validation["loss"]) < 0.02


def test_what_is_no_such_pipeline_is_refused(pipe, tmp_path, monkeypatch):
    import shutil

    def refused(spec, *says):
        with pytest.raises((UsageError, WeftError)) as caught:
            models.load_base(str(spec), TASK)
        assert all(part in str(caught.value) for part in says), caught.value
        assert "\n" not in str(caught.value)

    refused(tmp_path, "without model_index.json", "no pipeline")
    refused("builtin:vit", "'builtin:vit' is no pipeline of diffusers")
    other = shutil.copytree(pipe, tmp_path / "flux")
    index = json.loads((other / "model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    index.pop("unet")
    (other / "model_index.json").write_text(json.dumps(index))
    refused(other, "FluxPipeline with a FluxTransformer2DModel", "UNet2DConditionModel")
    flow = shutil.copytree(pipe, tmp_path / "flow")
    config = json.loads((flow / "scheduler" / "scheduler_config.json").read_text())
    (flow / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "flow"}))
    refused(flow, "prediction_type is 'flow'", "epsilon, v_prediction, sample")
    cut = shutil.copytree(pipe, tmp_path / "cut")
    (weights,) = (cut / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(cut, "truncated or damaged")
    with pytest.raises(UsageError, match="has no output head, so method 'head'"):
        methods.attach(methods.resolve("head"), models.load_base(str(pipe), TASK).model)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(pipe, 'pip install "weft[diffusers]"')
