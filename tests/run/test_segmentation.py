"""Masks from folders, arrays and tables to classes; loss and figures; heads of models that segment; the U-Net."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from PIL import Image

from weft.errors import UsageError
from weft.run import data, images, methods, models, segmentation, sources
from weft.run.evaluate import evaluate


def noise(*shape, classes=256, seed=0):
    return np.random.default_rng(seed).integers(0, classes, shape, dtype=np.uint8)


def save(path, pixels, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


@pytest.fixture
def folder(tmp_path):
    """Six images of 4 × 6 whose masks hold classes 0 to 2, and 255 in one pixel."""
    for place in range(6):
        mask = noise(4, 6, classes=3, seed=place)
        mask[0, 0] = 255
        save(tmp_path / "d" / "images" / f"{place}.png", noise(4, 6, 3, seed=place))
        save(tmp_path / "d" / "masks" / f"{place}.png", mask)
    return tmp_path / "d"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_and_masks_is_pairs_of_equal_names(folder):
    rows = sources.read(str(folder), validation_fraction=0.3)
    assert (rows.kind, rows.task, rows.labels) == ("mask", "segmentation", ["0", "1", "2"])
    assert len(rows.train) == 4 and len(rows.validation) == 2 and "validation" in rows.held_out[0]
    for row in rows.train + rows.validation:
        want = noise(4, 6, classes=3, seed=int(row["image"].stem)).astype(np.int64)
        want[0, 0] = -100
        assert (segmentation.class_numbers(row) == want).all() and row["size"] == (4, 6)


def test_splits_are_folders_and_classes_have_names(folder, tmp_path):
    (tmp_path / "s").mkdir()
    folder.rename(tmp_path / "s" / "train")
    save(tmp_path / "s" / "val" / "images" / "a.png", noise(4, 6))
    save(tmp_path / "s" / "val" / "masks" / "a.png", noise(4, 6, classes=2))
    (tmp_path / "s" / "classes.txt").write_text("sky\nhouse\ntree\nriver\n")
    rows = sources.read(str(tmp_path / "s"), test_fraction=0)
    assert len(rows.train) == 6 and len(rows.validation) == 1 and not rows.held_out
    assert rows.labels == ["sky", "house", "tree", "river"]
    (tmp_path / "s" / "classes.txt").write_text("sky\nhouse\n")
    with pytest.raises(UsageError, match="masks hold class 2, and 2 classes have names"):
        sources.read(str(tmp_path / "s"))


@pytest.mark.parametrize("levels, mode", [((0, 255), "L"), ((3, 90), "L"), ((0, 1), "L"), ((0, 1), "P"), ((0, 1), "1")])
def test_two_levels_are_two_classes(levels, mode, tmp_path):
    want = noise(4, 6, classes=2)
    for place, mask in enumerate((want, np.zeros_like(want))):
        save(tmp_path / "images" / f"{place}.png", noise(4, 6))
        made = Image.fromarray((np.array(levels, np.uint8)[mask] if mode != "1" else mask * 255).astype(np.uint8))
        if mode == "P":
            made.putpalette([0, 0, 0, 200, 0, 0])
        (tmp_path / "masks").mkdir(exist_ok=True)
        (made.convert("1") if mode == "1" else made).save(tmp_path / "masks" / f"{place}.png")
    rows = sources.read(str(tmp_path), validation_fraction=0)
    assert rows.labels == ["0", "1"]
    found = [segmentation.class_numbers(row) for row in rows.train]
    assert (found[0] == want).all() and not found[1].any()


def test_arrays_and_tables_hold_masks(tmp_path):
    x, y = noise(5, 4, 6), noise(5, 4, 6, classes=3)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y[..., None], x_test=x, y_test=y, classes=np.array(["a", "b", "c"]))
    rows = sources.read(str(tmp_path / "d.npz"), validation_fraction=0)
    assert (rows.task, rows.labels, len(rows.test)) == ("segmentation", ["a", "b", "c"], 5)
    assert all((segmentation.class_numbers(row) == mask).all() for row, mask in zip(rows.train, y, strict=True))

    def stored(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    made = [{"image": stored(image), "annotation": stored(mask)} for image, mask in zip(x, y, strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), tmp_path / "d.parquet")
    rows = sources.read(str(tmp_path / "d.parquet"), columns={"mask": "annotation"}, validation_fraction=0)
    assert rows.task == "segmentation" and (segmentation.class_numbers(rows.train[2]) == y[2]).all()
    made[1]["image"]["bytes"] = b"no picture"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), tmp_path / "d.parquet")
    with pytest.raises(UsageError, match="train row 2: the image cannot be read"):
        sources.read(str(tmp_path / "d.parquet"), columns={"mask": "annotation"}, validation_fraction=0)


def test_the_models_names_are_taken_where_it_has_as_many_classes(folder):
    def named(*classes):
        return sources.read(str(folder), classes=classes, validation_fraction=0).labels

    assert named("cell", "wall", "dirt") == ["cell", "wall", "dirt"]
    assert named("cell", "wall") == named("LABEL_0", "LABEL_1", "LABEL_2") == ["0", "1", "2"]


def break_(folder, name):
    """One way in which a folder is no data set of masks."""
    image, mask = folder / "images" / "3.png", folder / "masks" / "3.png"
    if name == "no mask":
        mask.unlink()
    elif name == "no image":
        image.unlink()
    elif name == "size":
        save(mask, noise(6, 4, classes=3))
    elif name == "colours":
        save(mask, noise(4, 6, 3, classes=3))
    elif name == "jpeg":
        save(mask.with_suffix(".jpg"), noise(4, 6, classes=3))
        mask.unlink()
    elif name == "no class":
        save(mask, np.full((4, 6), 255, np.uint8))
    elif name == "damaged":
        mask.write_bytes(b"\x89PNG cut")
    elif name == "twice":
        save(image.with_suffix(".bmp"), noise(4, 6))
    elif name == "stray":
        (folder / "masks" / "notes.txt").write_text("x")
    elif name == "one class":
        for path in (folder / "masks").iterdir():
            save(path, np.zeros((4, 6), np.uint8))
    elif name == "beyond":
        save(folder / "val" / "images" / "a.png", noise(4, 6))
        save(folder / "val" / "masks" / "a.png", noise(4, 6, classes=9))
        for part in ("images", "masks"):
            (folder / "train").mkdir(exist_ok=True)
            (folder / part).rename(folder / "train" / part)


@pytest.mark.parametrize(
    "name, says",
    [
        ("no mask", ("images/3.png", "has no mask")),
        ("no image", ("masks/3.png", "has no image")),
        ("size", ("masks/3.png", "6 x 4", "4 x 6")),
        ("colours", ("masks/3.png", "RGB", "grey or a palette")),
        ("jpeg", ("masks/3.jpg", "JPEG", "PNG")),
        ("no class", ("masks/3.png", "255", "every pixel")),
        ("damaged", ("masks/3.png", "cannot be read")),
        ("twice", ("3.bmp", "3.png", "one name")),
        ("stray", ("notes.txt", "no image")),
        ("one class", ("one class alone",)),
        ("beyond", ("of validation never occurs in train",)),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name(name, says, folder):
    break_(folder, name)
    with pytest.raises(UsageError) as caught:
        sources.read(str(folder))
    assert all(part in str(caught.value) for part in says), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"x": noise(3, 4, 6), "y": noise(2, 4, 6, classes=2)}, ("y has 2 x 4 x 6 masks", "3 x 4 x 6")),
        ({"x": noise(3, 4, 6), "y": noise(3, 4, 6, classes=2) * 1.0}, ("class numbers", "float64")),
        ({"x": noise(3, 4, 6), "y": noise(3, 4, 6) - np.int64(300)}, ("class numbers from 0 to 255", "int64")),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(arrays, says, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError) as caught:
        sources.read(str(tmp_path / "d.npz"))
    assert all(part in str(caught.value) for part in says), caught.value


def test_a_photograph_is_as_large_as_it_stands_upright(tmp_path):
    marks = Image.Exif()
    marks[0x0112] = 6
    save(tmp_path / "images" / "a.jpg", noise(6, 4, 3), exif=marks)
    save(tmp_path / "masks" / "a.png", noise(4, 6, classes=2))
    assert sources.read(str(tmp_path), validation_fraction=0).train[0]["size"] == (4, 6)


# --- loss and figures -------------------------------------------------------------------------------------------------


def bilinear(scores, height, width):
    """Scores, classes × h × w, at another size: pixels' centres are matched, in float64."""
    classes, h, w = scores.shape
    made = np.empty((classes, height, width))
    for i in range(height):
        y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
        for j in range(width):
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            top, left, a, b = int(y), int(x), y - int(y), x - int(x)
            low, right = min(top + 1, h - 1), min(left + 1, w - 1)
            made[:, i, j] = (1 - a) * ((1 - b) * scores[:, top, left] + b * scores[:, top, right]) + a * (
                (1 - b) * scores[:, low, left] + b * scores[:, low, right]
            )
    return made


def figures(scores, masks, classes):
    """Loss, Dice, IoU, accuracy by their definitions, pixel by pixel."""
    nats, each, joint, either, right, pixels = 0.0, [], np.zeros(classes), np.zeros(classes), 0, 0
    for score, mask in zip(scores, masks, strict=True):
        large = bilinear(score.astype(np.float64), *mask.shape)
        answer, known = large.argmax(0), mask >= 0
        nats += sum(
            np.log(np.exp(large[:, i, j]).sum()) - large[mask[i, j], i, j] for i, j in np.argwhere(known).tolist()
        )
        right, pixels = right + ((answer == mask) & known).sum(), pixels + known.sum()
        found = []
        for label in range(classes):
            a, b = (answer == label) & known, (mask == label) & known
            joint[label] += (a & b).sum()
            either[label] += (a | b).sum()
            if a.any() or b.any():
                found.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        each.append(np.mean(found))
    seen = either > 0
    iou = float(np.mean(joint[seen] / either[seen]))
    return {"loss": nats / pixels, "dice": np.mean(each), "iou": iou, "accuracy": right / pixels}, each


def test_figures_are_by_their_definitions_whatever_the_masks_sizes():
    """Three images whose masks differ in size go through one padded batch; class 3 is nowhere."""
    draw = np.random.default_rng(0)
    masks = [draw.integers(0, 3, size) for size in ((8, 12), (5, 9), (6, 6))]
    masks[1][:2] = -100
    masks[2][:] = 1
    scores = draw.normal(size=(3, 4, 4, 6)).astype(np.float32)
    scores[:, 3] -= 50
    batch = segmentation.stack([torch.from_numpy(mask) for mask in masks])
    assert batch.shape == (3, 8, 12)
    found = segmentation.summarise(segmentation.measure([0, 1, 2], [0, 1, 2], batch, torch.from_numpy(scores)))
    want, each = figures(scores, masks, 4)
    assert found["rows"] == 3 and all(abs(found[name] - value) < 1e-6 for name, value in want.items()), (found, want)
    assert np.allclose(found["per_document"], [[1 - one, 1] for one in each])


def test_evaluation_of_files_is_at_the_masks_own_size(folder, tmp_path):
    """The model sees 8 × 8; its answers are held against 4 × 6."""
    rows = sources.read(str(folder), validation_fraction=0.5)
    spec = f"config:{tiny.save_segformer(tmp_path / 'm')}"
    processor = images.load_processor(str(tmp_path / "m"), (8, 8))
    splits = segmentation.splits(rows, processor)
    assert splits["train"][0]["labels"].shape == (8, 8) and splits["validation"][0]["labels"].shape == (4, 6)
    model = models.load_base(spec, rows.task, labels=rows.labels).model.eval()
    found = evaluate(model, splits["validation"], rows.task, 2)
    with torch.no_grad():
        pixels = torch.stack([splits["validation"][place]["pixel_values"] for place in range(3)])
        scores = model(pixels).logits.numpy()
    want, _ = figures(scores, [segmentation.class_numbers(row) for row in rows.validation], 3)
    assert all(abs(found[name] - value) < 1e-5 for name, value in want.items())


def test_a_step_of_two_micro_batches_is_a_step_of_their_rows(folder, tmp_path):
    """Each has another number of pixels without a class."""
    from weft.run.settings import TrainSettings
    from weft.run.train import train

    for place in range(4):
        mask = noise(4, 6, classes=3, seed=place)
        mask[: place % 4] = 255
        save(folder / "masks" / f"{place}.png", mask)
    rows = sources.read(str(folder), validation_fraction=0.1)
    rows.train = rows.train[:4]
    found = []
    for size, micro in ((4, 1), (2, 2)):
        processor = data.load_reader(str(tiny.save_unet(tmp_path / "m")), rows)
        splits = data.load_splits("", rows.task, processor, rows=rows)
        base = models.load_base(str(tmp_path / "m"), rows.task, labels=rows.labels, tokenizer=processor)
        settings = TrainSettings(max_steps=2, batch_size=size, gradient_accumulation=micro, learning_rate=0.01)
        result = train(base, splits, methods.resolve("head"), settings, None, progress=False)
        found.append((result.curve[-1]["loss"], base.model.classifier.weight.detach().double()))
    assert abs(found[0][0] - found[1][0]) < 1e-5
    assert (found[0][1] - found[1][1]).abs().max() < 1e-5


# --- models -----------------------------------------------------------------------------------------------------------


def test_processors_bring_whole_images_to_one_size(tmp_path):
    from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil

    tiny.save_segformer(tmp_path / "m")
    MobileViTImageProcessorPil(size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8}).save_pretrained(
        tmp_path / "m"
    )
    prepare = images.preparer(segmentation.load_processor(str(tmp_path / "m")))
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 20:] = 255
    pixels = prepare(wide)
    assert pixels.shape == (3, 8, 8)
    assert (pixels[:, :, :5] < 0.01).all() and (pixels[:, :, 6:] > 0.99).all()  # a cut would have lost either


def test_the_commonest_size_is_taken_where_no_model_says_one(tmp_path):
    rows = [{"size": (4, 6)}, {"size": (8, 8)}, {"size": (4, 6)}]
    found = segmentation.load_processor(str(tiny.save_unet(tmp_path / "m")), rows)
    assert (found.size["height"], found.size["width"], len(found.image_mean)) == (4, 6, 1)


SMALL = {
    "beit": {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
             "image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2],
             "use_relative_position_bias": True},
    "dpt": {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": 32, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4, 4, 4, 4],
            "fusion_hidden_size": 8},
    "mobilevit": {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "num_attention_heads": 2,
                  "aspp_out_channels": 8, "atrous_rates": [1, 2, 3]},
    "upernet": {"hidden_size": 8, "pool_scales": [1, 2], "backbone_config": {
        "model_type": "convnext", "hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}},
}  # fmt: skip
# what transformers' own models build and do not ask, or ask only for other layers than the first
QUIET = {"beit": "beit.layers.3.", "dpt": "neck.fusion_stage.layers.0.residual_layer1."}


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_backbones_are_adapted_and_all_beyond_them_is_trained_and_saved(kind, tmp_path):
    """Whatever is asked gets a gradient; the adapter's file has the head."""
    from peft import PeftModel
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **SMALL[kind]).to_dict() | {"model_type": kind}
    (tmp_path / "c.json").write_text(json.dumps(config))
    spec = f"config:{tmp_path / 'c.json'}"

    def load():
        return models.load_base(spec, "segmentation", labels=["a", "b", "c"]).model

    model = methods.attach(methods.resolve("peft:lora", {"r": 2}), load()).train()
    pixels, masks = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    segmentation.pixel_loss({"logits": model(pixel_values=pixels).logits}, masks).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    quiet = f"base_model.model.{QUIET.get(kind, '-')}"
    assert all(name.startswith(quiet) for name, grad in trained.items() if grad is None)
    heads = models.head_names(load())
    assert heads and not any(name.startswith(kind) or name.startswith("backbone") for name in heads)
    assert {name.partition(".modules_to_save.")[0].removeprefix("base_model.model.") for name in trained
            if "modules_to_save" in name} == set(heads)  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(load(), tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(pixel_values=pixels).logits, again(pixel_values=pixels).logits)


def test_a_head_for_other_classes_is_drawn_by_seed_and_nothing_else(tmp_path):
    spec = str(tiny.save_segformer(tmp_path / "m", classes=3))
    first, again, other = (
        models.load_base(spec, "segmentation", labels=["a", "b"], seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    kept = models.load_base(spec, "segmentation").model.state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if not name.startswith("decode_head.classifier"):
            assert torch.equal(tensor, kept[name]), name
    assert not torch.equal(first["decode_head.classifier.weight"], other["decode_head.classifier.weight"])


@pytest.mark.parametrize("method", ["peft:lora", "head", "full"])
def test_batch_norms_count_on_only_where_they_are_trained(method, tmp_path):
    config = {"model_type": "mobilevit", **SMALL["mobilevit"]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    model = models.load_base(f"config:{tmp_path / 'c.json'}", "segmentation", labels=["a", "b"]).model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    made = methods.attach(methods.resolve(method, {"r": 2} if method == "peft:lora" else {}), model).train()
    made(pixel_values=torch.randn(4, 3, 32, 32))
    short = {}
    for name, buffer in made.named_buffers():
        if ".original_module." not in name:
            short[name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")] = buffer
    moved = {name.startswith("segmentation_head") for name, old in before.items()
             if not torch.equal(short[name.replace(".base_layer", "")], old)}  # fmt: skip
    assert moved == ({False, True} if method == "full" else {True})  # whether it is of the head


# --- the U-Net --------------------------------------------------------------------------------------------------------


def diffusers_unet(folder, **changed):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    fields = {"in_channels": 3, "out_channels": 2, "sample_size": 16, "block_out_channels": (8, 16)}
    fields |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    made = UNet2DModel(**{**fields, "norm_num_groups": 4, "layers_per_block": 1, **changed}).eval()
    made.save_pretrained(folder)
    return made


def test_a_unet_of_diffusers_is_one_at_time_step_zero(tmp_path):
    pytest.importorskip("diffusers")
    theirs = diffusers_unet(tmp_path / "u")
    model = models.load_base(str(tmp_path / "u"), "segmentation", labels=["a", "b"]).model.eval()
    assert models.head_names(model) == ["classifier"] and model.config.image_size == 16
    with torch.no_grad():
        model.classifier.weight.copy_(theirs.conv_out.weight)
        model.classifier.bias.copy_(theirs.conv_out.bias)
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(model(x).logits, theirs(x, 0).sample)
        odd = model(x[..., :15, :13]).logits
        whole = torch.nn.functional.pad(x[..., :15, :13], (0, 1, 0, 1), mode="replicate")
        assert torch.equal(odd, theirs(whole, 0).sample[..., :15, :13])
    model.save_pretrained(tmp_path / "again")
    again = models.load_base(str(tmp_path / "again"), "segmentation").model.eval()
    assert torch.equal(again(x).logits, model(x).logits) and again.config.id2label == {0: "a", 1: "b"}


def test_unets_without_an_answer_are_refused(tmp_path):
    pytest.importorskip("diffusers")
    diffusers_unet(tmp_path / "u", time_embedding_type="fourier")
    with pytest.raises(UsageError, match="Fourier"):
        models.load_base(str(tmp_path / "u"), "segmentation", weights=False)
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "weft_unet", "block_out_channels": [6, 12]}))
    with pytest.raises(UsageError, match="num_groups"):
        models.load_base(f"config:{tmp_path / 'c.json'}", "segmentation")


def test_random_weights_are_drawn_as_torch_draws_them(tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "weft_unet", "in_channels": 1}))
    spec = f"config:{tmp_path / 'c.json'}?block_out_channels=[8,16]&norm_num_groups=4"
    model = models.load_base(spec, "segmentation", labels=["a", "b", "c"]).model
    assert model.classifier.out_channels == 3 and len(model.unet.down_blocks) == 2
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            limit = 1 / np.sqrt(module.weight[0].numel())
            assert module.weight.abs().max() <= limit and module.weight.std() > 0.45 * limit
