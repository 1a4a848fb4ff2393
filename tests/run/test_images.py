"""Images from folders and arrays to pixels, and through the same training as text."""

import gzip
import importlib.util
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from PIL import Image
from tiny import CLASSES, pictures

from weft.errors import UsageError, WeftError
from weft.run import data, images, models, sources


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def resnet(tmp_path):
    return tiny.save_resnet(tmp_path / "resnet")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_folder_a_class_gives_rows_by_name(tmp_path):
    rows = sources.read(str(tiny.save_images(tmp_path / "d")), validation_fraction=0.25)
    assert (rows.kind, rows.task, rows.labels) == ("image", "image-classification", list(CLASSES))
    assert len(rows.train) == 9 and len(rows.validation) == 3 and not rows.test
    for row in rows.train + rows.validation:
        assert row["image"].parent.name == CLASSES[row["label"]]


def test_split_folders_are_told_by_their_names_and_a_class_called_train_is_a_class(tmp_path):
    rows = sources.read(str(tiny.save_images(tmp_path / "d", 6, splits=("train", "val", "test"))))
    assert [len(rows.train), len(rows.validation), len(rows.test)] == [6, 6, 6] and not rows.held_out
    assert {row["image"].parents[1].name for row in rows.validation} == {"val"}
    vehicles = tmp_path / "vehicles"
    for name in ("car", "train"):
        (vehicles / name).mkdir(parents=True)
        for place in range(2):
            Image.fromarray(pictures(1)[0][0]).save(vehicles / name / f"{place}.png")
    assert sources.read(str(vehicles), validation_fraction=0).labels == ["car", "train"]


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"),
        ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
    ],
)
def test_arrays_by_either_order_of_words(keys, tmp_path):
    parts = [pictures(6, seed=0), pictures(3, seed=1), pictures(3, seed=2)]
    arrays = {key: part for keys2, pair in zip(zip(*[iter(keys)] * 2), parts) for key, part in zip(keys2, pair)}
    arrays[keys[1]] = arrays[keys[1]][:, None]  # labels N × 1 are labels N
    rows = sources.read(str(write_npz(tmp_path / "d.npz", **arrays, classes=np.array(CLASSES), shot=np.arange(6))))
    assert rows.labels == list(CLASSES)
    for split, (want, labels) in zip(("train", "validation", "test"), parts, strict=True):
        got = getattr(rows, split)
        assert [row["label"] for row in got] == labels.tolist()
        assert all((row["image"] == each).all() for row, each in zip(got, want, strict=True))


def test_arrays_without_splits_and_names(tmp_path):
    grey, labels = pictures(8)[0][..., 0], np.arange(8) % 2
    rows = sources.read(str(write_npz(tmp_path / "d.npz", x=grey[..., None], y=labels)), validation_fraction=0)
    assert rows.labels == ["0", "1"] and rows.train[3]["image"].shape == (10, 10)


def test_tables_may_hold_the_bytes_of_images(tmp_path):
    made = []
    for picture, label in zip(*pictures(4), strict=True):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "png")
        made.append({"img": {"bytes": file.getvalue(), "path": None}, "label": int(label)})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), tmp_path / "d.parquet")
    rows = sources.read(str(tmp_path / "d.parquet"), columns={"image": "img"}, validation_fraction=0)
    assert rows.kind == "image"
    for row, picture in zip(rows.train, pictures(4)[0], strict=True):
        assert (np.asarray(images.opened(row["image"], grey=False)) == picture).all()


def test_the_models_order_of_the_same_classes_is_kept(tmp_path):
    folder = str(tiny.save_images(tmp_path / "d", 6))
    order = ["square", "circle", "line"]
    rows = sources.read(folder, classes=order, validation_fraction=0)
    assert rows.labels == order and all(order[row["label"]] == row["image"].parent.name for row in rows.train)
    assert sources.read(folder, classes=["square", "dog", "line"], validation_fraction=0).labels == list(CLASSES)


def test_shots_are_drawn_by_seed_from_the_training_split(tmp_path):
    folder = str(tiny.save_images(tmp_path / "d", 30))

    def drawn(seed, shots=2):
        rows = sources.read(folder, "few-shot", shots=shots, seed=seed, validation_fraction=0.2)
        assert len(rows.validation) == 6
        assert not {row["image"] for row in rows.train} & {row["image"] for row in rows.validation}
        assert sorted(row["label"] for row in rows.train) == [0] * shots + [1] * shots + [2] * shots
        return [row["image"].name for row in rows.train]

    assert drawn(0) == drawn(0) != drawn(1)
    with pytest.raises(UsageError, match="shots=20"):
        drawn(0, 20)


def break_(folder, name):
    """One way in which a folder of images is no data set."""
    first = folder / "circle" / "000.png"
    if name == "empty class":
        (folder / "dot").mkdir()
    elif name == "no image":
        (folder / "line" / "notes.txt").write_text("x")
    elif name == "text as image":
        first.write_text("this is no picture")
    elif name == "truncated":
        first.write_bytes(first.read_bytes()[:60])
    elif name == "loose":
        first.rename(folder / "000.png")
    elif name == "nested":
        (folder / "line" / "thin").mkdir()
    return first


@pytest.mark.parametrize(
    "name, says",
    [
        ("empty class", ("dot", "empty")),
        ("no image", ("notes.txt", "no image", ".png")),
        ("text as image", ("000.png", "no image")),
        ("truncated", ("000.png", "cannot be read")),
        ("loose", ("000.png", "beside the folders")),
        ("nested", ("thin", "a folder")),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_by_name(name, says, tmp_path):
    break_(tiny.save_images(tmp_path / "d"), name)
    with pytest.raises(UsageError) as caught:
        sources.read(str(tmp_path / "d"))
    assert all(part in str(caught.value) for part in says), caught.value
    assert "\n" not in str(caught.value)


X, Y = pictures(6)


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"x_train": X, "y_train": Y[:5]}, ("x_train has 6 images", "y_train 5 labels")),
        ({"x": X.astype(np.float32) / 255, "y": Y}, ("x must be uint8", "float32")),
        ({"x": X.transpose(0, 3, 1, 2), "y": Y}, ("x must be images x height x width", "6 x 3 x 10 x 10")),
        ({"x": X, "y": Y.astype(np.float64)}, ("y must be one whole number", "float64")),
        ({"x": X, "y": Y, "classes": np.array(["a", "b"])}, ("from 0 to 2", "2 classes")),
        ({"x_packed": X, "kind": Y}, ("no images", "x_packed, kind", "x_train")),
        ({"y": Y}, ("y without images",)),
        ({"x": X}, ("no label",)),
        ({"x": X, "images": X, "y": Y}, ("two arrays", "x, images")),
        ({"x": X, "y": np.array([object()] * 6)}, ("is not readable as .npz",)),
        ({"x": X, "y": Y * 0}, ("only the label '0'",)),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(arrays, says, tmp_path):
    with pytest.raises(UsageError) as caught:
        sources.read(str(write_npz(tmp_path / "d.npz", **arrays)))
    assert all(part in str(caught.value) for part in says), caught.value
    assert "\n" not in str(caught.value)


def test_what_is_no_npz_is_refused(tmp_path):
    for name, content in (("a.npz", b"PK\x03\x04 broken"), ("b.npz", gzip.compress(b"x")), ("c.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            sources.read(str(tmp_path / name))
    with pytest.raises(UsageError, match="does not exist"):
        sources.read("missing.npz")


def test_images_are_no_text_and_text_no_images(corpus, tmp_path):
    folder = str(tiny.save_images(tmp_path / "d"))
    with pytest.raises(UsageError, match="holds images, which --task causal-lm cannot use"):
        sources.read(folder, "causal-lm")
    with pytest.raises(UsageError, match="has no image to learn from: it has text"):
        sources.read(str(corpus), "image-classification")


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_pixels_of_an_array_of_the_models_size_by_hand():
    """builtin:vit has no processor: grey levels go from 0..255 to -1..1, one channel, in float32."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    split = images.images([{"image": grey, "label": 1}], images.load_processor("builtin:vit"))
    want = grey.astype(np.float64)[None] / 127.5 - 1
    row = split[0]
    assert row["labels"] == 1 and row["document"] == 0
    assert row["pixel_values"].shape == (1, 8, 8) and row["pixel_values"].dtype == torch.float32
    assert np.abs(row["pixel_values"].double().numpy() - want).max() < 1e-6


def test_builtin_digits_are_the_models_own_pixels():
    from weft.builtin import images as scans

    want, labels = scans("digits-shifted", "test")
    rows = sources.read("builtin:digits-shifted")
    split = images.images(rows.test, images.load_processor("builtin:vit"))
    got = torch.stack([split[place]["pixel_values"] for place in range(20)]).numpy()
    assert np.abs(got - want[:20]).max() <= 0.5 / 127.5 + 1e-6  # a grey level's rounding
    assert [split[place]["labels"] for place in range(20)] == labels[:20].tolist()


def test_a_models_own_processor_is_followed(tmp_path):
    """Twice as large an image, shrunk by a constant block, then ImageNet's means: written out."""
    from transformers import ViTImageProcessorPil

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=mean, image_std=std, resample=0).save_pretrained(
        tmp_path
    )
    small = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small.repeat(3, 0).repeat(3, 1)).save(tmp_path / "a.png")
    got = images.preparer(images.load_processor(str(tmp_path)))(tmp_path / "a.png").double().numpy()
    want = (small.astype(np.float64) / 255 - mean) / std
    assert np.abs(got - want.transpose(2, 0, 1)).max() < 1e-5


def test_a_default_processor_takes_its_size_from_the_config_the_arrays_or_imagenet(resnet):
    def size(spec, given=None):
        found = images.load_processor(spec, given).size
        return found["height"], found["width"]

    assert size("builtin:vit", (5, 7)) == (8, 8)
    assert size("config:builtin:vit?image_size=16") == (16, 16)
    assert size(str(resnet), (5, 7)) == (5, 7)
    assert size(str(resnet)) == (224, 224)


def test_files_are_turned_upright_and_brought_to_the_models_colours(tmp_path):
    picture = pictures(1)[0][0]
    turned = Image.fromarray(picture).transpose(Image.Transpose.ROTATE_90)
    marks = Image.Exif()
    marks[0x0112] = 6  # to be turned by 270 degrees when it is shown
    turned.save(tmp_path / "a.png", exif=marks)
    assert (np.asarray(images.opened(tmp_path / "a.png", grey=False)) == picture).all()
    Image.fromarray(picture).convert("RGBA").save(tmp_path / "b.png")
    assert images.opened(tmp_path / "b.png", grey=True).mode == "L"
    assert images.opened(picture[..., 0], grey=False).mode == "RGB"
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(WeftError, match=r"c\.png.*more than 8 bits"):
        images.opened(tmp_path / "c.png", grey=True)


def test_a_file_that_is_damaged_behind_its_beginning_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-800])
    images.checked(path)
    with pytest.raises(WeftError, match=r"a\.jpg.*damaged"):
        images.opened(path, grey=False)


# --- the model and the method -----------------------------------------------------------------------------------------


def test_a_head_for_other_classes_is_drawn_by_seed_and_nothing_else(resnet):
    task, labels = "image-classification", list(CLASSES)
    first, again, other = (
        models.load_base(str(resnet), task, labels=labels, seed=seed).model for seed in (0, 0, 1)
    )
    kept = models.load_base(str(resnet), "image-classification").model
    assert first.config.id2label == dict(enumerate(CLASSES))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        if not name.startswith("classifier"):
            assert torch.equal(tensor, kept.state_dict()[name]), name
    assert not torch.equal(first.classifier[1].weight, other.classifier[1].weight)


def test_weights_of_another_shape_are_no_new_head(resnet):
    config = json.loads((resnet / "config.json").read_text())
    (resnet / "config.json").write_text(json.dumps(config | {"embedding_size": 12}))
    with pytest.raises(WeftError, match=r"resnet\.embedder"):
        models.load_base(str(resnet), "image-classification")


@pytest.mark.parametrize("name", ["sora", "peft:lora"])
def test_the_backbone_is_adapted_and_the_classifier_trained_beside(name, resnet):
    from weft.run import methods

    model = models.load_base(str(resnet), "image-classification").model
    convolutions = [each for each, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    method = methods.resolve(name, {"r": 4})
    assert methods.matched_modules(method, model) == convolutions[1:]  # the first one reads the pixels
    counted = methods.count_trainable(method, model)
    adapted = methods.attach(method, model)
    trained = {each for each, p in adapted.named_parameters() if p.requires_grad}
    head = {each for each in trained if "classifier" in each}
    assert len(head) == 2 and all("modules_to_save" in each for each in head)
    assert counted == methods.trainable(adapted)
    with pytest.raises(UsageError, match="match nothing"):
        methods.check_fits(methods.resolve("peft:vera"), models.load_base(str(resnet), "image-classification").model)


def test_linear_layers_of_the_backbone_are_adapted_and_patches_left_alone():
    from weft.run import methods

    model = models.load_base("builtin:vit", "image-classification").model
    linear = [each for each, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert methods.matched_modules(methods.resolve("sora"), model) == [each for each in linear if each != "classifier"]


@pytest.mark.parametrize("method, moves", [("peft:lora", False), ("head", False), ("full", True)])
def test_batch_norms_count_on_only_where_they_are_trained(method, moves, resnet):
    from weft.run import methods

    model = models.load_base(str(resnet), "image-classification").model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    made = methods.attach(methods.resolve(method), model).train()
    made(pixel_values=torch.randn(4, 3, 16, 16))
    after = dict(model.named_buffers())
    assert any(not torch.equal(after[name], buffer) for name, buffer in before.items()) == moves


def test_a_step_of_two_micro_batches_is_a_step_of_their_rows(resnet, tmp_path):
    from weft.run.methods import resolve
    from weft.run.settings import TrainSettings
    from weft.run.train import train

    x, y = pictures(4, 16)
    rows = sources.read(str(write_npz(tmp_path / "d.npz", x=x, y=y, x_val=x, y_val=y)))
    found = []
    for size, micro in ((4, 1), (2, 2)):
        processor = data.load_reader(str(resnet), rows)
        splits = data.load_splits("", rows.task, processor, rows=rows)
        base = models.load_base(str(resnet), rows.task, labels=rows.labels, tokenizer=processor)
        settings = TrainSettings(max_steps=2, batch_size=size, gradient_accumulation=micro, learning_rate=0.1)
        result = train(base, splits, resolve("head"), settings, None, progress=False)
        found.append((result.curve[-1]["loss"], base.model.classifier[1].weight.detach().double()))
    assert abs(found[0][0] - found[1][0]) < 1e-5
    assert (found[0][1] - found[1][1]).abs().max() < 1e-4


def test_what_is_prepared_elsewhere_or_was_before_is_the_same(resnet, tmp_path, monkeypatch):
    from weft.run.methods import resolve
    from weft.run.settings import TrainSettings
    from weft.run.train import train

    x, y = pictures(4, 16)
    rows = sources.read(str(write_npz(tmp_path / "d.npz", x=x, y=y, x_val=x, y_val=y)))
    processor = data.load_reader(str(resnet), rows)
    heads = []
    for workers, room in ((0, 2**28), (0, 0), (1, 2**28)):
        monkeypatch.setattr(images, "_KEPT", room)
        splits = data.load_splits("", rows.task, processor, rows=rows)
        base = models.load_base(str(resnet), rows.task, labels=rows.labels, tokenizer=processor)
        settings = TrainSettings(max_steps=4, batch_size=2, learning_rate=0.1, loader_workers=workers)
        train(base, splits, resolve("head"), settings, None, progress=False)
        heads.append(base.model.classifier[1].weight.detach().clone())
        assert len(splits.validation.kept) == (len(x) if room else 0)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


def test_what_is_kept_of_a_split_has_a_limit_and_stays_with_its_rows(monkeypatch):
    x, _ = pictures(6, 16)
    split = images.Images([{"image": each} for each in x], torch.from_numpy, range(6))
    monkeypatch.setattr(images, "_KEPT", 3 * x[0].nbytes)
    for _ in range(2):
        assert all(torch.equal(split[place]["pixel_values"], torch.from_numpy(x[place])) for place in range(6))
    assert sorted(split.kept) == [0, 1, 2]
    chosen = split.select([5, 0])
    assert torch.equal(chosen[0]["pixel_values"], torch.from_numpy(x[5])) and 1 not in chosen.kept


def test_an_image_that_another_process_finds_damaged_is_named_in_one_sentence(resnet, tmp_path):
    from weft.run.methods import resolve
    from weft.run.settings import TrainSettings
    from weft.run.train import train

    rows = sources.read(str(tiny.save_images(tmp_path / "d")), validation_fraction=0.25)
    processor = data.load_reader(str(resnet), rows)
    splits = data.load_splits("", rows.task, processor, rows=rows)
    base = models.load_base(str(resnet), rows.task, labels=rows.labels, tokenizer=processor)
    for row in rows.train:
        row["image"].write_bytes(b"nothing")
    splits.train.kept.clear()
    settings = TrainSettings(max_steps=2, batch_size=2, loader_workers=1)
    with pytest.raises(WeftError, match=r"^image '[^\n]*' is damaged: [^\n]*$"):
        train(base, splits, resolve("head"), settings, None, progress=False)


def test_what_a_model_keeps_of_an_image_is_counted_from_shapes(resnet):
    from weft.run.adapt import _kept_of_image

    model = models.load_base(str(resnet), "image-classification").model
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.zeros(1, 3, 16, 16))
    skeleton = models.load_base(str(resnet), "image-classification", weights=False).model
    statistics = sum(buffer.numel() for buffer in model.buffers())  # which batch norms save once more on meta
    assert out.logits.shape == (1, 5)
    assert 0 <= _kept_of_image("m", skeleton, (3, 16, 16)) - sum(kept.values()) <= 2 * statistics
    with pytest.raises(UsageError, match="does not take images of 1 x 16 x 16"):
        _kept_of_image("m", skeleton, (1, 16, 16))


def test_evaluation_is_the_models_own_answers(tmp_path):
    """Loss and accuracy of builtin:vit on ten digits, by a softmax in float64."""
    from weft.run.evaluate import evaluate

    rows = sources.read("builtin:digits")
    split = images.images(rows.test[:10], images.load_processor("builtin:vit"))
    model = models.load_base("builtin:vit", rows.task).model
    found = evaluate(model, split, rows.task, 4)
    pixels = torch.stack([split[place]["pixel_values"] for place in range(10)])
    labels = [row["label"] for row in rows.test[:10]]
    with torch.no_grad():
        logits = model(pixels).logits.double().numpy()
    nats = [np.log(np.exp(each).sum()) - each[label] for each, label in zip(logits, labels, strict=True)]
    assert abs(found["loss"] - np.mean(nats)) < 1e-5
    assert found["accuracy"] == np.mean(logits.argmax(1) == labels) and found["rows"] == 10


def test_a_folder_is_of_what_it_holds_more_of_unless_the_task_says_it(tmp_path):
    folder = tiny.save_images(tmp_path / "d", 6)
    rows = [{"text": "the weft", "label": "a"}, {"text": "a loom", "label": "b"}] * 9
    tiny.write_jsonl(folder / "train.jsonl", rows)
    tasks = ("auto", "image-classification", "classification")
    kinds = [sources.read(str(folder), task, validation_fraction=0).kind for task in tasks]
    assert kinds == ["image", "image", "classification"]
    for number in range(6):
        tiny.write_jsonl(folder / f"train-{number}.jsonl", rows)
    assert sources.read(str(folder)).kind == "classification"


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is there")
def test_a_model_of_timm_asks_for_timm_by_name(tmp_path):
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeftError, match=r"one of timm; install it with pip install \"weft\[timm\]\""):
        models.load_base(str(tmp_path), "image-classification", labels=list(CLASSES))


def test_a_model_of_timm_gets_a_head_for_the_classes_and_keeps_its_processor(tmp_path):
    timm = pytest.importorskip("timm")
    from timm.models._hub import save_for_hf

    from weft.run import methods

    sizes = {"img_size": 16, "patch_size": 8, "depth": 1}
    made = timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes)
    save_for_hf(made, str(tmp_path), model_args=sizes, safe_serialization=True)
    model = models.load_base(str(tmp_path), "image-classification", labels=list(CLASSES)).model
    assert models.classifier_name(model) == "timm_model.head" and model.timm_model.head.out_features == 3
    assert torch.equal(model.timm_model.patch_embed.proj.weight, made.patch_embed.proj.weight)
    assert len(methods.matched_modules(methods.resolve("sora"), model)) == 4
    pixels = images.preparer(images.load_processor(str(tmp_path)))(np.zeros((20, 20, 3), dtype=np.uint8))
    assert model(pixels[None]).logits.shape == (1, 3)
