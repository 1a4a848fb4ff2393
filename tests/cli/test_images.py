"""Images on the command line: adapted, resumed, asked, exported, evaluated, compared; and what is refused."""

import json
import shutil

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image
from tiny import answers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of three splits, and its arrays as a .npz."""
    folder = tiny.save_images(tmp_path_factory.mktemp("data") / "pictures", 12, ("train", "validation", "test"))
    arrays = {}
    for number, split in enumerate(("train", "val", "test")):
        arrays[f"x_{split}"], arrays[f"y_{split}"] = tiny.pictures(12, seed=number)
    np.savez(folder.with_suffix(".npz"), **arrays, classes=np.array(tiny.CLASSES))
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A ResNet whose processor leaves images as large as the arrays are, so that folder and arrays are one thing."""
    from transformers import ViTImageProcessorPil

    folder = tiny.save_resnet(tmp_path_factory.mktemp("models") / "resnet")
    halves = [0.5] * 3
    ViTImageProcessorPil(size={"height": 10, "width": 10}, image_mean=halves, image_std=halves).save_pretrained(folder)
    return folder


@pytest.fixture
def words(resnet, pictures):
    def call(output, *more, method="peft:lora", model=resnet, data=pictures, steps=6):
        basic = ["adapt", "--model", model, "--data", data, "--method", method, "--output", output]
        return [*basic, "--max-steps", steps, "--batch-size", 4, "--learning-rate", 0.02, "--save-steps", 2, *more]

    return call


def test_an_adapter_from_a_folder_answers_and_is_exported(weft, words, pictures, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--r", 4, steps=30))
    assert code == 0, err
    assert "train: 12 images" in out and "images reach the model as 3 x 10 x 10 numbers" in out
    result = tiny.result(tmp_path / "out")
    assert result["test"]["accuracy"] > 0.9 and result["test"]["rows"] == 12
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["task"] == "auto"
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("images_per_second" in row for row in rows) and not any("tokens_per_second" in row for row in rows)
    assert "Images a second" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    _, labelled, _ = weft("predict", "--adapter", tmp_path / "out", "--data", pictures)
    told = answers(labelled)
    assert len(told) == 12 and {row["expected"] for row in told} == set(tiny.CLASSES)
    assert sum(row["label"] == row["expected"] for row in told) / 12 == result["test"]["accuracy"]
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-4 for row in told)
    flat = tmp_path / "flat"
    flat.mkdir()
    for row in told[:3]:
        shutil.copy(row["image"], flat)
    _, unlabelled, _ = weft("predict", "--adapter", tmp_path / "out", "--data", flat)
    assert [row["probabilities"] for row in answers(unlabelled)] == [row["probabilities"] for row in told[:3]]
    assert "expected" not in answers(unlabelled)[0]

    for form in ("lora", "merged") if result["method"] != "peft:lora" else ("merged",):
        code, _, err = weft("export", tmp_path / "out", tmp_path / form, "--to", form)
        assert code == 0, err
        _, exported, _ = weft("predict", "--adapter", tmp_path / form, "--data", pictures)
        for row, other in zip(told, answers(exported), strict=True):
            assert row["label"] == other["label"]
            assert max(abs(row["probabilities"][name] - other["probabilities"][name]) for name in tiny.CLASSES) < 1e-5


def test_an_exported_lora_of_weft_is_one_of_images(weft, words, pictures, tmp_path):
    assert weft(*words(tmp_path / "out", "--r", 4, method="sora"))[0] == 0
    assert weft("export", tmp_path / "out", tmp_path / "lora", "--to", "lora")[0] == 0
    own, plain = (weft("predict", "--adapter", tmp_path / name, "--data", pictures)[1] for name in ("out", "lora"))
    for row, other in zip(answers(own), answers(plain), strict=True):
        assert max(abs(row["probabilities"][name] - other["probabilities"][name]) for name in tiny.CLASSES) < 1e-5


def test_arrays_and_files_are_one_run(weft, words, pictures, tmp_path):
    outputs = [tmp_path / "files", tmp_path / "arrays"]
    for output, data in zip(outputs, (pictures, pictures.with_suffix(".npz")), strict=True):
        assert weft(*words(output, "--r", 2, data=data, steps=2))[0] == 0
    # rows come in another order, so the steps differ; what the data is does not
    counts = [tiny.result(output)["data"]["train"]["rows"] for output in outputs]
    labels = [json.loads((output / "labels.json").read_text()) for output in outputs]
    assert counts == [12, 12] and labels == [list(tiny.CLASSES)] * 2


@pytest.mark.parametrize("method", ["full", "head", "peft:lora", "sora"])
def test_stopped_and_gone_on_is_uninterrupted(method, words, gone_on):
    """Bit for bit, the statistics of batch norms under full training included."""
    whole, other = gone_on(lambda output: words(output, method=method))
    state = "checkpoint-6/training_state.safetensors"
    assert (other / state).read_bytes() == (whole / state).read_bytes()


@pytest.mark.parametrize("method", ["head", "full"])
def test_a_whole_model_is_saved_with_its_processor(method, weft, words, pictures, tmp_path):
    assert weft(*words(tmp_path / "out", method=method, steps=2))[0] == 0
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 10, "width": 10}
    code, out, err = weft("evaluate", "--model", tmp_path / "out", "--data", pictures, "--json")
    assert code == 0, err
    (corpus,) = json.loads(out)["corpora"]
    test = tiny.result(tmp_path / "out")["test"]
    assert corpus["model"]["accuracy"] == test["accuracy"] and abs(corpus["model"]["loss"] - test["loss"]) < 1e-6
    assert any("memory and speed" in note for note in corpus["notes"])


def test_the_adapter_of_builtin_vit_knows_how_its_images_were_prepared(weft, tmp_path, words):
    pytest.importorskip("sklearn")
    made = words(tmp_path / "out", "--r", 2, method="sora", model="builtin:vit", data="builtin:digits-shifted")
    assert weft(*made)[0] == 0
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 8, "width": 8} and saved["image_mean"] == [0.5]
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    code, out, _ = weft("predict", "--adapter", tmp_path / "out", "--data", tmp_path / "a.png")
    assert code == 0 and set(answers(out)[0]["probabilities"]) == set("0123456789")


def test_few_shot_trains_on_k_images_a_class(weft, words, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--task", "few-shot", "--shots", 2, "--r", 2, steps=2))
    assert code == 0, err
    assert "train: 6 images" in out and "few-shot: 2 of each of 3 classes to train on, drawn with seed 0" in out
    assert "test: 12 images" in out


def test_random_weights_from_a_config_of_images(weft, words, resnet, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", method="full", model=f"config:{resnet}", steps=2))
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["2"] == "square"


def test_a_dry_run_shows_modules_and_memory_and_writes_nothing(weft, words, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--r", 4, "--dry-run"))
    assert code == 0, err
    assert "stages.1.layers.0.layer.0.convolution" in out and "classifier" not in out
    assert "activations" in out and "logits" not in out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_methods_are_compared_on_images(weft, resnet, pictures, tmp_path):
    words = ["compare", "--model", resnet, "--data", pictures, "--methods", "sora,peft:lora", "--set", "sora.r=2"]
    quick = ["--budget", "steps=3", "--seeds", 1, "--grid-points", 1, "--measure-repeats", 0, "--batch-size", 4]
    more = ["--set", "peft:lora.r=2", "--references", "base", "--workers", 1, "--output", tmp_path / "study"]
    code, out, err = weft(*words, *quick, *more)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    tested = {row["method"]: row["test"]["accuracy"] for row in rows if row.get("test")}
    assert set(tested) == {"base", "sora", "peft:lora"} and all(0 <= each <= 1 for each in tested.values())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_before_any_work(refuse, words, llama, corpus, pictures, tmp_path):
    output = tmp_path / "out"
    r = ("--r", 2)
    refuse(2, *words(output, "--rr", 2), says=("--rr", "--r"))
    refuse(2, *words(output, *r, data=tmp_path / "missing.npz"), says=("missing.npz", "does not exist"))
    refuse(2, *words(output, *r, "--task", "image-clasification"), says=("did you mean 'image-classification'",))
    refuse(2, *words(output, *r, model=llama), says=("llama model", "no image-classification class"))
    refuse(2, *words(output, *r, data=corpus), says=("resnet model", "no causal-lm class"))
    refuse(2, *words(output, *r, "--task", "classification"), says=("holds images", "it is for text"))
    refuse(2, *words(output, *r, "--shots", 3), says=("shots must be at least 1, with --task few-shot",))
    refuse(2, *words(output, "--r", 30), says=("r=30", "convolution"))
    refuse(2, *words(output, *r, "--gradient-checkpointing"), says=("gradient_checkpointing", "ResNet"))
    refuse(2, *words(output, "--columns", "image=img", *r), says=("no column 'img'",))
    assert not output.exists()


def test_a_corrupt_file_is_named(refuse, words, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "d")
    (tmp_path / "d" / "validation" / "line" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    says = ("validation/line/001.png", "cannot be read")
    refuse(2, *words(tmp_path / "out", "--r", 2, data=tmp_path / "d"), says=says)
    assert not (tmp_path / "out").exists()


def test_predict_and_compress_refuse_what_is_not_theirs(weft, refuse, words, corpus, pictures, resnet, tmp_path):
    assert weft(*words(tmp_path / "out", "--r", 2, steps=1))[0] == 0
    adapter = ("--adapter", tmp_path / "out")
    refuse(2, "predict", *adapter, "--prompt", "x", says=("--prompt is for text", "give --data"))
    refuse(2, "predict", *adapter, "--data", corpus, says=("answers images", "has text"))
    refuse(2, "predict", *adapter, "--data", pictures, "--score", says=("--score is for text",))
    made = ("--data", pictures, "--output", tmp_path / "small")
    refuse(2, "compress", "--model", "builtin:vit", "--method", "svd_llm", *made, says=("classifies images", "svd"))
    refuse(2, "evaluate", "--model", resnet, "--data", pictures, "--tasks", "arc_easy", says=("for language models",))
