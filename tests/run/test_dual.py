"""Dual encoders: classes by their names, as transformers compares them; what is trained, kept, saved and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent))

from streaming import write_tasks

from weft.errors import UsageError, WeftError
from weft.run import adapt, dual, images, methods, models, stream

TASK, LABELS = "image-classification", list(tiny.CLASSES)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("models") / "siglip", kind="siglip")


def load(spec: Path, **more):
    return models.load_base(str(spec), TASK, **{"labels": LABELS, **more}).model.eval()


def pixels(count: int = 6) -> torch.Tensor:
    return torch.from_numpy(tiny.pictures(count, 16)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1


def run(options):
    asked = adapt.request(options)
    rows = adapt.read_rows(asked.options)
    adapt.outline(asked, rows)
    return adapt.run_adapt(asked, rows, False, lambda text: None, progress=False)


QUICK = {"max_steps": 4, "batch_size": 6, "learning_rate": 0.01, "eval_steps": 0, "save_steps": 0}


def test_the_table_is_transformers_own():
    known = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    assert all(known[kind] == name for kind, name in models.DUAL_ENCODERS.items())


# --- the classifier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_are_the_models_own(kind, request):
    """By the whole model of transformers, which is given the texts together with the images."""
    folder = request.getfixturevalue(kind)
    own = hf.AutoModelForZeroShotImageClassification.from_pretrained(folder).eval()
    padding = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {"padding": True}
    texts = [f"a photo of a {name}." for name in LABELS]
    words = hf.AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", **padding)
    model = load(folder)
    with torch.no_grad():
        want = own(**words, pixel_values=pixels()).logits_per_image
        got = model(pixels()).logits
    assert want.std() > 1e-3 and (got - want).abs().max() < 1e-5
    assert type(model).__name__ == type(own).__name__ and list(model.state_dict()) == list(own.state_dict())


def test_templates_are_averaged_on_the_sphere(clip):
    """Directions of "a photo of a ." and "a drawing of ", their mean and cosines, in float64."""
    templates = ["a photo of a {}.", "a drawing of {}"]
    own = hf.CLIPModel.from_pretrained(clip).eval()
    words = hf.AutoTokenizer.from_pretrained(clip)

    def direction(found):
        vectors = found.pooler_output.double().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    with torch.no_grad():
        seen = direction(own.get_image_features(pixels()))
        read = [direction(own.get_text_features(**words([t.format(name) for t in templates], return_tensors="pt",
                                                         padding=True))) for name in LABELS]  # fmt: skip
        got = load(clip, prompts=templates)(pixels()).logits.double().numpy()
    means = np.stack([each.mean(0) / np.linalg.norm(each.mean(0)) for each in read])
    assert np.abs(got - np.exp(float(own.logit_scale)) * seen @ means.T).max() < 1e-4
    with torch.no_grad():
        assert np.abs(got - load(clip)(pixels()).logits.numpy()).max() > 1e-3


def test_classes_are_in_the_order_of_their_labels_and_read_without_underscores(clip):
    turned = load(clip, labels=LABELS[::-1])
    with torch.no_grad():
        want, got = load(clip)(pixels()).logits, turned(pixels()).logits
        names = load(clip, labels=["weft_thread", "warp"], prompts=["{}"])
    assert torch.allclose(got, want.flip(1), atol=1e-6)
    known = hf.AutoTokenizer.from_pretrained(clip)
    assert known.decode(names.class_input_ids[0]) == "<s> weft thread </s>"
    assert names.config.id2label == {0: "weft_thread", 1: "warp"}


def counted(model, monkeypatch) -> list[bool]:
    """Whether each reading of the texts, from now on, was in the graph."""
    calls, real = [], model.get_text_features

    def reading(**inputs):
        found = real(**inputs)
        calls.append(found.pooler_output.requires_grad)
        return found

    monkeypatch.setattr(model, "get_text_features", reading)
    return calls


def test_texts_are_read_in_the_graph_where_their_side_is_adapted_else_once(clip, monkeypatch):
    for targets, want in ((r".*text_model.*q_proj", [True] * 3), (r".*vision_model.*q_proj", [False])):
        model = load(clip)
        adapted = methods.attach(methods.resolve("sora", {"r": 2, "target_modules": targets}), model).train()
        calls = counted(model, monkeypatch)
        for _ in range(3):
            adapted.train()  # as Trainer does before every step
            adapted(pixel_values=pixels(), labels=torch.arange(6) % 3).loss.backward()
        assert calls == want
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        calls.clear()
        for _ in range(2):  # two evaluations of two batches
            adapted.eval()
            with torch.inference_mode():
                [adapted(pixel_values=pixels()) for _ in range(2)]
            adapted.train()
        assert calls == [False] * 2
        adapted(pixel_values=pixels(), labels=torch.arange(6) % 3).loss.backward()  # nothing of inference is left


def test_linear_layers_of_both_sides_are_adapted_and_torchs_own_attention_is_not(clip, siglip):
    for folder in (clip, siglip):
        model = load(folder)
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        inside = [name for name in linear if "head.attention" in name]
        want = [name for name in linear if name not in inside]
        assert methods.matched_modules(methods.resolve("sora"), model) == want
        assert len(inside) == (folder == siglip)


def test_what_texts_keep_for_the_backward_pass_is_counted_from_shapes(clip):
    model = load(clip)
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model.class_embeddings()
    skeleton = load(clip, weights=False)
    assert held.requires_grad and 0.8 < adapt._kept(skeleton, skeleton.class_embeddings) / sum(kept.values()) < 1.2


# --- trained, saved, loaded -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_images(tmp_path_factory.mktemp("data") / "pictures", 12, ("train", "validation", "test"))


@pytest.mark.parametrize("method", ["block_lora", "peft:lora"])
def test_only_the_adapter_moves_and_its_folder_fits_the_plain_model(method, clip, folder, tmp_path):
    options = {"model": str(clip), "data": str(folder), "method": method, "output": str(tmp_path / "out")}
    found = run({**options, "r": 4, **QUICK})
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    marker = "weft_block_lora_delta" if method == "block_lora" else "lora_"
    assert len(saved) == 2 * 26 and all(marker in name for name in saved)
    assert found["trainable"] == sum(tensor.numel() for tensor in saved.values())
    assert json.loads((tmp_path / "out" / "prompts.json").read_text()) == ["a photo of a {}."]

    plain = PeftModel.from_pretrained(hf.CLIPModel.from_pretrained(clip), str(tmp_path / "out")).eval()
    texts = [f"a photo of a {name}." for name in LABELS]
    words = hf.AutoTokenizer.from_pretrained(clip)(texts, return_tensors="pt", padding=True)
    prepare = images.preparer(images.load_processor(str(clip)))
    files = sorted((folder / "test").rglob("*.png"))
    with torch.no_grad():
        seen = torch.stack([prepare(file) for file in files])
        logits = plain(**words, pixel_values=seen).logits_per_image.double().numpy()
    labels = [LABELS.index(file.parent.name) for file in files]
    nats = [np.log(np.exp(each).sum()) - each[label] for each, label in zip(logits, labels, strict=True)]
    assert abs(np.mean(nats) - found["test"]["loss"]) < 1e-5
    assert np.mean(logits.argmax(1) == labels) == pytest.approx(found["test"]["accuracy"])


def test_a_head_on_the_vision_side_where_no_template_is_wanted(clip, folder, tmp_path):
    options = {"model": str(clip), "data": str(folder), "method": "head", "output": str(tmp_path / "out"), **QUICK}
    found = run({**options, "prompt_template": ""})
    assert found["trainable"] == 16 * 3 + 3 and not (tmp_path / "out" / "prompts.json").exists()
    assert type(models.load_base(str(tmp_path / "out"), TASK).model) is hf.CLIPForImageClassification
    with pytest.raises(UsageError, match="--prompt-template '' puts a head"):
        run(options)


def test_tasks_of_other_classes_follow_one_another_without_heads(clip, tmp_path):
    """The score before any training is zero-shot, and a task's names are its classifier for ever."""
    for name, shown in (("shapes", LABELS), ("threads", ["weft", "warp", "thread"])):
        arrays = {}
        for number, split in enumerate(("train", "validation", "test")):
            x, arrays[f"y_{split}"] = tiny.pictures(12, seed=number)
            arrays[f"x_{split}"] = x if name == "shapes" else 255 - x
        np.savez(tmp_path / f"{name}.npz", **arrays, classes=np.array(shown))
    tasks = [
        {"name": "shapes", "data": str(tmp_path / "shapes.npz"), "prompt_template": "a drawing of {}"},
        {"name": "threads", "data": str(tmp_path / "threads.npz")},
    ]
    options = {"model": str(clip), "method": "codyra", "r": 4, "output": str(tmp_path / "out"), **QUICK}
    asked = stream.request({**options, "max_steps": 12, "learning_rate": 0.02}, write_tasks(tmp_path / "t.yaml", tasks))
    stream.settle_output(asked, None)
    found = stream.run_stream(asked, lambda text: None)

    def scores(spec, name, prompts):
        base = models.load_base(str(spec), TASK, labels=asked.tasks[name].rows.labels, prompts=prompts).model.eval()
        split = images.images(asked.tasks[name].rows.test, images.load_processor(str(clip)))
        with torch.no_grad():
            said = base(torch.stack([split[place]["pixel_values"] for place in range(12)])).logits.argmax(1)
        return sum(said[place] == split[place]["labels"] for place in range(12)).item() / 12

    merged = tmp_path / "out" / "tasks" / "2-threads" / "merged"
    for row, spec in ((0, clip), (2, merged)):
        want = [scores(spec, 0, ["a drawing of {}"]), scores(spec, 1, ["a photo of a {}."])]
        assert found["matrix"][row] == pytest.approx(want)
    assert found["matrix"][1][0] > found["matrix"][0][0]
    assert not list((tmp_path / "out").rglob("head.safetensors"))
    base = stream.load_model(tmp_path / "out", "shapes")
    assert base.model.config.weft_prompts == ["a drawing of {}"] and list(base.model.config.id2label.values()) == LABELS


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_go_by_names_is_refused_in_a_sentence(clip, llama, tmp_path):
    def refused(says, spec=clip, error=UsageError, **more):
        with pytest.raises(error) as caught:
            load(spec, **more)
        assert says in str(caught.value) and "\n" not in str(caught.value)

    refused("tells classes apart by their names, and there are none", labels=None)
    refused("the classes are numbers (0, 1, 2, ...)", labels=["0", "1", "2", "3"])
    load(clip, labels=["0", "1"], prompts=["a photo of the number {}."])
    refused("longer than the 12 tokens", labels=["weft " * 12, "warp"])
    refused("prompt_template is for dual encoders (altclip, blip", spec="builtin:vit", prompts=["{}"])
    config = hf.AltCLIPConfig(text_config={"vocab_size": 20}, projection_dim=8)
    config.save_pretrained(tmp_path / "altclip")
    refused("puts no head", spec=tmp_path / "altclip", prompts=[])
    with pytest.raises(UsageError, match="names of classes of images, and .* is asked for causal-lm"):
        models.load_base(str(llama), "causal-lm", prompts=["{}"])
    assert dual.prompts_of("a, b {} | c {}") == ["a, b {}", "c {}"]
    with pytest.raises(UsageError, match="has no {} for the name of a class"):
        dual.prompts_of("a photo of a {}.|a cat")


def test_weights_without_a_text_side_are_named(clip, tmp_path):
    headed = hf.CLIPForImageClassification.from_pretrained(clip)
    headed.save_pretrained(tmp_path / "headed")
    assert type(load(tmp_path / "headed")) is hf.CLIPForImageClassification  # as which it was saved
    hf.AutoTokenizer.from_pretrained(clip).save_pretrained(tmp_path / "headed")
    with pytest.raises(WeftError, match="lack logit_scale"):
        load(tmp_path / "headed", prompts=["{}"])
