"""Dual encoders on the command line: adapted, resumed, asked, exported, evaluated; and what is refused."""

import json

import numpy as np
import pytest
import tiny
from tiny import answers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.save_images(tmp_path_factory.mktemp("data") / "pictures", 12, ("train", "validation", "test"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def words(clip, pictures):
    def call(output, *more, method="block_lora", model=clip, data=pictures, steps=6):
        basic = ["adapt", "--model", model, "--data", data, "--method", method, "--output", output]
        return [*basic, "--max-steps", steps, "--batch-size", 4, "--learning-rate", 0.02, "--save-steps", 2, *more]

    return call


@pytest.fixture(scope="module")
def trained(pictures, clip, tmp_path_factory):
    """An adapter with two templates."""
    from weft.cli.main import run

    output = tmp_path_factory.mktemp("runs") / "out"
    words = ["adapt", "--model", clip, "--data", pictures, "--method", "block_lora", "--output", output]
    quick = ["--task", "few-shot", "--shots", 3, "--max-steps", 20, "--batch-size", 6, "--learning-rate", 0.02]
    template = ["--prompt-template", "a photo of a {}.|a drawing of {}"]
    assert run([str(word) for word in [*words, *quick, *template, "--eval-steps", 0]]) == 0
    return output


def test_an_adapter_answers_by_names_and_is_exported(trained, weft, pictures, clip, tmp_path):
    found = tiny.result(trained)
    assert found["data"]["train"]["rows"] == 9 and found["test"]["accuracy"] > 0.9
    assert json.loads((trained / "prompts.json").read_text()) == ["a photo of a {}.", "a drawing of {}"]
    _, out, _ = weft("predict", "--adapter", trained, "--data", pictures)
    told = answers(out)
    assert sum(row["label"] == row["expected"] for row in told) / 12 == pytest.approx(found["test"]["accuracy"])
    for form in ("lora", "merged"):
        code, _, err = weft("export", trained, tmp_path / form, "--to", form)
        assert code == 0, err
        for row, other in zip(told, answers(weft("predict", "--adapter", tmp_path / form, "--data", pictures)[1])):
            assert max(abs(row["probabilities"][name] - other["probabilities"][name]) for name in tiny.CLASSES) < 1e-5
    code, out, err = weft(
        "evaluate", "--model", tmp_path / "merged", "--against", clip, "--data", pictures, "--no-speed", "--json"
    )
    assert code == 0, err
    (corpus,) = json.loads(out)["corpora"]
    assert corpus["model"]["loss"] == pytest.approx(found["test"]["loss"], abs=1e-5)
    assert corpus["against"]["loss"] > corpus["model"]["loss"]
    assert not any("tokens" in note for note in corpus["notes"])


def test_the_base_is_what_evaluation_holds_it_against(trained, weft, words, tmp_path):
    """`base` is zero-shot: it trains nothing, and an adapter without a step is the same."""
    template = ("--prompt-template", "a photo of a {}.|a drawing of {}")
    for method, steps in (("base", 1), ("block_lora", 1)):
        more = ("--learning-rate", 1e-12) if method != "base" else ()
        code, out, err = weft(*words(tmp_path / method, *template, *more, method=method, steps=steps))
        assert code == 0, err
        assert "the first one as 'a photo of a circle.', in the mean of 2 templates" in out
    scores = [tiny.result(tmp_path / method)["test"] for method in ("base", "block_lora")]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-5)


@pytest.mark.parametrize("method", ["codyra", "full"])
def test_stopped_and_gone_on_is_uninterrupted(method, words, gone_on):
    gone_on(lambda output: words(output, method=method))


def test_a_whole_model_is_saved_with_its_tokenizer_and_its_classes(weft, words, pictures, tmp_path):
    assert weft(*words(tmp_path / "out", method="full", steps=2))[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"] and config["weft_prompts"] == ["a photo of a {}."]
    code, out, err = weft("evaluate", "--model", tmp_path / "out", "--data", pictures, "--no-speed", "--json")
    assert code == 0, err
    found = json.loads(out)["corpora"][0]["model"]
    assert found["loss"] == pytest.approx(tiny.result(tmp_path / "out")["test"]["loss"], abs=1e-6)


def test_a_dry_run_shows_both_sides(weft, words, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--dry-run"))
    assert code == 0, err
    assert "text_model.encoder.layers.1.mlp.fc2" in out and "vision_model.encoder.layers.1.mlp.fc2" in out
    assert "activations of the classes' texts" in out and not (tmp_path / "out").exists()
    code, out, _ = weft(*words(tmp_path / "out", "--target-modules", "vision_model.*_proj", "--dry-run"))
    assert code == 0 and "classes' texts" not in out


def test_bad_input_is_one_sentence_before_any_work(refuse, words, llama, corpus, clip, pictures, tmp_path):
    output = tmp_path / "out"
    x, y = tiny.pictures(12)
    np.savez(tmp_path / "numbers.npz", x=x, y=y)
    numbers = words(output, data=tmp_path / "numbers.npz")
    refuse(2, *numbers, says=("the classes are numbers (0, 1, 2", "`classes` in the .npz", "prompt_template"))
    refuse(2, *words(output, "--prompt-template", "a photo"), says=("'a photo' has no {}",))
    refuse(2, *words(output, method="head"), says=("no head", "--prompt-template ''"))
    refuse(2, *words(output, "--prompt-template", "{}", model="builtin:vit"), says=("is for dual encoders",))
    refuse(2, *words(output, "--prompt-template", "{}", model=llama, data=corpus), says=("asked for causal-lm",))
    refuse(2, *words(output, "--prompt-template", "weft " * 12 + "{}"), says=("longer than the 12 tokens",))
    refuse(2, "evaluate", "--model", clip, "--data", pictures, says=("without classes", "--method base"))
    assert not output.exists()
