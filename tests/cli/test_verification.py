"""Verification on the command line: adapted, asked, exported; and what is refused."""

import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import answers


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Folders an identity in three splits, and known images of the last ones beside."""
    folder = tmp_path_factory.mktemp("data")
    for split, first, last in (("train", 0, 5), ("val", 5, 8), ("test", 8, 12)):
        for person in range(first, last):
            own = np.random.default_rng(1000 + person).integers(40, 215, (10, 10, 3))
            draw = np.random.default_rng(person)
            for place in range(4):
                known = folder / "known" / f"p{person}"
                path = known if split == "test" and place == 0 else folder / "people" / split / f"p{person}"
                path.mkdir(parents=True, exist_ok=True)
                picture = np.clip(own + draw.integers(-30, 30, own.shape), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(path / f"{place}.png")
    return folder / "people"


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return tiny.save_resnet(tmp_path_factory.mktemp("models") / "resnet")


@pytest.fixture
def words(resnet, people):
    def call(output, *more, method="sora", steps=4):
        basic = ["adapt", "--model", resnet, "--data", people, "--task", "verification", "--method", method]
        quick = ["--max-steps", steps, "--batch-size", 5, "--learning-rate", 0.01, "--margin-scale", 8]
        return [*basic, *quick, "--output", output, *more]

    return call


def test_an_adapter_says_whose_images_are_and_is_exported(weft, refuse, words, people, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--r", 2, "--mirror"))
    assert code == 0, err
    assert "test: 4 identities, 0 of them trained on" in out and "auc" in out.splitlines()[-3]
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "After 4 steps: AUC 0." in report and "Images a second" in report
    adapter = ("--adapter", tmp_path / "out", "--data", people)
    code, out, err = weft("predict", *adapter, "--gallery", people.parent / "known")
    assert code == 0, err
    told = answers(out)
    assert len(told) == 12 and all(-1 <= row["cosine"] <= 1 for row in told)
    assert sum(row["identity"] == row["expected"] for row in told) > 6

    assert weft("predict", *adapter, "--output", tmp_path / "own.npz")[0] == 0
    for form in ("lora", "merged"):
        assert weft("export", tmp_path / "out", tmp_path / form, "--to", form)[0] == 0
    run = (tmp_path / "out" / "run.yaml").read_text().replace("mirror: true", "mirror: false")
    shutil.copytree(tmp_path / "out", tmp_path / "plain")
    (tmp_path / "plain" / "run.yaml").write_text(run)  # exported models do not know of mirror images
    for name in ("lora", "merged", "plain"):
        asked = ("predict", "--adapter", tmp_path / name, "--data", people, "--output", tmp_path / f"{name}.npz")
        code, _, err = weft(*asked)
        assert code == 0, err
    found = {name: np.load(tmp_path / f"{name}.npz") for name in ("own", "lora", "merged", "plain")}
    assert found["own"]["embeddings"].shape == (12, 16) and found["own"]["embeddings"].dtype == np.float32
    assert np.abs(np.linalg.norm(found["own"]["embeddings"], axis=1) - 1).max() < 1e-6
    assert sorted(set(found["own"]["labels"])) == ["p10", "p11", "p8", "p9"]
    assert all(name.endswith(".png") for name in found["own"]["images"])
    for form in ("lora", "merged"):
        assert np.abs(found[form]["embeddings"] - found["plain"]["embeddings"]).max() < 1e-5
    assert np.abs(found["own"]["embeddings"] - found["plain"]["embeddings"]).max() > 1e-3
    refuse(2, "evaluate", "--model", tmp_path / "merged", "--data", people, says=("no classes", "weft predict"))
    refuse(2, "predict", *adapter, says=("--gallery", "--output FILE.npz"))
    both = ("--gallery", people.parent / "known", "--output", tmp_path / "x.npz")
    refuse(2, "predict", *adapter, *both, says=("--gallery",))
    nobody = people.parent / "known" / "p8"
    refuse(2, "predict", *adapter, "--gallery", nobody, says=("does not say whose", "a folder"))
    refuse(2, "predict", "--adapter", tmp_path / "out", "--prompt", "x", says=("--prompt is for text",))


def test_a_dry_run_shows_what_is_adapted_and_writes_nothing(weft, words, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--r", 2, "--dry-run"))
    assert code == 0, err
    assert "stages.1.layers.0.layer.0.convolution" in out and "classifier" not in out
    assert not (tmp_path / "out").exists()


def test_petalface_of_a_classifier_is_judged_by_sharpness(weft, resnet, tmp_path):
    folder = tiny.save_images(tmp_path / "d", 12, ("train", "validation"))
    basic = ["adapt", "--model", resnet, "--data", folder, "--method", "petalface", "--quality", "sharpness"]
    code, _, err = weft(*basic, "--r", 2, "--max-steps", 3, "--batch-size", 4, "--output", tmp_path / "out")
    assert code == 0, err
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["quality"] == "sharpness" and saved["worst"] < saved["best"]
    code, out, err = weft("predict", "--adapter", tmp_path / "out", "--data", folder, "--split", "validation")
    assert code == 0, err
    told = answers(out)
    right = sum(row["label"] == row["expected"] for row in told) / len(told)
    assert abs(right - tiny.result(tmp_path / "out")["validation"]["accuracy"]) < 1e-9


def test_what_does_not_go_together_is_one_sentence(weft, refuse, words, resnet, people, llama, corpus, tmp_path):
    output = tmp_path / "out"
    refuse(2, *words(output, method="head"), says=("centres alone", "use base"))
    refuse(2, *words(output, "--margin-loss", "softmax"), says=("cosface or arcface",))
    refuse(2, *words(output, method="petalface"), says=("how good each image is", "sharpness"))
    refuse(2, *words(output, "--quality", "beauty", method="petalface"), says=("sharpness, brisque, or a number",))
    text = ["adapt", "--model", llama, "--data", corpus, "--method", "petalface", "--output", output]
    refuse(2, *text, "--quality", "sharpness", says=("judges images", "LlamaForCausalLM"))
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("tasks:\n" + "".join(f"- {{name: {name}, data: {people}}}\n" for name in "ab"))
    stream = ["adapt", "--model", resnet, "--task", "verification", "--method", "sora", "--output", output]
    refuse(2, *stream, "--stream", tasks, says=("task 'a' is verification",))
    study = ["compare", "--model", resnet, "--data", people, "--task", "verification", "--methods", "sora,peft:lora"]
    refuse(2, *study, "--output", output, says=("weft compare ranks", "use weft adapt"))
    assert not output.exists()
