"""Segmentation on the command line: adapted, resumed, asked, exported, compared; and what is refused."""

import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import answers

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Images and masks of 0 and 255 in three splits."""
    return tiny.save_masks(tmp_path_factory.mktemp("data") / "scans", 6, ("train", "validation", "test"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return tiny.save_unet(tmp_path_factory.mktemp("models") / "unet")


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    return tiny.save_segformer(tmp_path_factory.mktemp("models") / "segformer")


@pytest.fixture
def words(unet, scans):
    def call(output, *more, method="salt", model=unet, data=scans, steps=6):
        basic = ["adapt", "--model", model, "--data", data, "--method", method, "--output", output]
        return [*basic, "--max-steps", steps, "--batch-size", 3, "--learning-rate", 0.02, "--save-steps", 2, *more]

    return call


def pixels(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_a_unet_is_adapted_answers_with_masks_and_is_exported(weft, words, scans, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", steps=25))
    assert code == 0, err
    assert "train: 6 images" in out and "images reach the model as 1 x 12 x 12 numbers" in out
    assert "each pixel is one of 2 classes: 0, 1" in out and "dice" in out
    test = tiny.result(tmp_path / "out")["test"]
    assert test["dice"] > 0.9 and test["rows"] == 6 and test["iou"] < test["dice"]
    assert "Dice" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    code, out, err = weft("predict", "--adapter", tmp_path / "out", "--data", scans, "--masks", tmp_path / "masks")
    assert code == 0, err
    told, masks = answers(out), pixels(tmp_path / "masks")
    assert [row["mask"] for row in told] == list(masks) == [f"{n:03}.png" for n in range(6)]
    for row in told:
        truth = np.asarray(Image.open(scans / "test" / "masks" / row["mask"])) > 0
        mask = masks[row["mask"]]
        assert abs(row["shares"]["1"] - (mask == 1).mean()) < 1e-6
        for label, wanted in (("0", ~truth), ("1", truth)):
            mine = mask == int(label)
            assert abs(row["dice"][label] - 2 * (mine & wanted).sum() / (mine.sum() + wanted.sum())) < 1e-6
    assert abs(np.mean([np.mean(list(row["dice"].values())) for row in told]) - test["dice"]) < 1e-5

    for form in ("lora", "merged"):
        code, _, err = weft("export", tmp_path / "out", tmp_path / form, "--to", form)
        assert code == 0, err
        flat = scans / "test" / "images"  # images alone
        made = tmp_path / f"masks of {form}"
        code, out, err = weft("predict", "--adapter", tmp_path / form, "--data", flat, "--masks", made)
        assert code == 0 and "dice" not in answers(out)[0], err
        assert all((pixels(made)[name] == mask).all() for name, mask in masks.items())


@pytest.mark.parametrize("method, model", [("full", "segformer"), ("peft:lora", "segformer"), ("salt", "unet")])
def test_stopped_and_gone_on_is_uninterrupted(method, model, words, gone_on, request):
    """Bit for bit, the statistics of the head's batch norm included."""
    gone_on(lambda output: words(output, method=method, model=request.getfixturevalue(model)))


def test_a_model_of_other_classes_gets_a_head_and_is_saved_whole(weft, words, segformer, scans, tmp_path):
    code, _, err = weft(*words(tmp_path / "out", method="full", model=segformer, steps=2))
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"] == {
        "height": 12,
        "width": 12,
    }
    code, out, err = weft("predict", "--adapter", tmp_path / "out", "--data", scans, "--limit", 2)
    assert code == 0 and len(answers(out)) == 2, err


def test_random_weights_and_the_data_as_arrays(weft, words, scans, tmp_path):
    arrays = {}
    for split in ("train", "test"):
        for key, part in (("x", "images"), ("y", "masks")):
            arrays[f"{key}_{split}"] = np.stack(list(pixels(scans / split / part).values()))
    np.savez(tmp_path / "d.npz", **arrays, classes=np.array(["dark", "bright"]))
    (tmp_path / "unet.json").write_text(json.dumps({"model_type": "weft_unet", "in_channels": 1}))
    spec = f"config:{tmp_path / 'unet.json'}?block_out_channels=[8,16]&norm_num_groups=4"
    more = {"method": "full", "model": spec, "data": tmp_path / "d.npz", "steps": 2}
    code, _, err = weft(*words(tmp_path / "out", **more))
    assert code == 0, err
    _, out, _ = weft("predict", "--adapter", tmp_path / "out", "--data", tmp_path / "d.npz")
    assert [row["image"] for row in answers(out)] == list(range(6)) and set(answers(out)[0]["shares"]) == {
        "dark",
        "bright",
    }


def test_a_dry_run_shows_modules_and_memory_and_writes_nothing(weft, words, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--dry-run"))
    assert code == 0, err
    assert "unet.mid_block.resnets.0.conv1" in out and "classifier" not in out and "conv_in" not in out
    assert "activations" in out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_methods_are_compared_by_dice(weft, unet, scans, tmp_path):
    words = ["compare", "--model", unet, "--data", scans, "--methods", "salt,peft:lora", "--set", "peft:lora.r=2"]
    quick = ["--budget", "steps=3", "--seeds", 1, "--grid-points", 1, "--measure-repeats", 0, "--batch-size", 3]
    code, out, err = weft(*words, *quick, "--references", "base", "--workers", 1, "--output", tmp_path / "study")
    assert code == 0, err
    assert "Test Dice" in (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    tested = {row["method"]: row["test"] for row in rows if row.get("test")}
    assert set(tested) == {"base", "salt", "peft:lora"}
    for each in tested.values():
        assert abs(1 - np.mean([error for error, _ in each["per_document"]]) - each["dice"]) < 1e-9


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_before_any_work(refuse, words, llama, corpus, scans, tmp_path):
    output = tmp_path / "out"
    refuse(2, *words(output, model=llama), says=("llama model", "no segmentation class"))
    refuse(2, *words(output, "--task", "segmentation", data=corpus), says=("has no image to learn from",))
    refuse(2, *words(output, "--task", "causal-lm"), says=("holds images", "it is for text"))
    shutil.copytree(scans, tmp_path / "d")
    (tmp_path / "d" / "train" / "masks" / "002.png").unlink()
    refuse(2, *words(output, data=tmp_path / "d"), says=("images/002.png", "has no mask"))
    refuse(2, *words(output, "--task", "segmentation", data=tmp_path / "d" / "train" / "images"), says=("masks/",))
    assert not output.exists()


def test_other_verbs_and_predict_refuse_what_is_not_theirs(weft, refuse, words, unet, scans, tmp_path):
    assert weft(*words(tmp_path / "out", steps=1))[0] == 0
    asked = ("predict", "--adapter", tmp_path / "out", "--data", scans)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    refuse(2, *asked, "--masks", tmp_path / "full", says=("exists already",))
    refuse(2, *asked[:3], "--prompt", "x", says=("--prompt is for text",))
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 4, 4), np.uint8), y=np.arange(32, dtype=np.uint8).reshape(2, 4, 4))
    says = ("row 1: the mask", "class 15", "the model has 2")
    refuse(2, *asked[:4], tmp_path / "d.npz", "--masks", tmp_path / "m", says=says)
    refuse(2, "evaluate", "--model", unet, "--data", scans, says=("segments images", "weft predict"))
    (tmp_path / "tasks.yaml").write_text(f"tasks: [{{name: a, data: {scans}}}, {{name: b, data: {scans}}}]")
    stream = ("adapt", "--model", unet, "--method", "salt", "--stream", tmp_path / "tasks.yaml", "--output")
    refuse(2, *stream, tmp_path / "s", says=("task 'a' is segmentation",))
    refuse(2, *asked[:3], "--data", scans / "test" / "images" / "000.png", "--score", says=("--score is for text",))
    assert not (tmp_path / "m").exists()
