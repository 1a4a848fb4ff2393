"""Images by words on the command line: adapted, killed and gone on with, drawn, exported; and what is refused."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import forked
import pytest
import tiny
import tiny_pipeline
import torch
from PIL import Image

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe(once):
    return once("pipeline", tiny_pipeline.save_pipeline)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return tiny_pipeline.save_captioned(tmp_path_factory.mktemp("data") / "d", 12, table=True)


@pytest.fixture
def words(pipe, captioned):
    def call(output, *more, method="sora", model=pipe, data=captioned, steps=4):
        basic = ["adapt", "--model", model, "--data", data, "--method", method, "--output", output]
        return [*basic, "--max-steps", steps, "--batch-size", 2, "--learning-rate", 0.05, "--save-steps", 2, *more]

    return call


def unet_says(unet):
    """What a UNet makes of some noise."""
    dice = torch.Generator().manual_seed(0)
    sample, states = torch.randn(3, 4, 8, 8, generator=dice), torch.randn(3, 12, 16, generator=dice)
    with torch.no_grad():
        return unet.eval()(sample, torch.tensor([1, 400, 999]), states)["sample"]


def loaded(folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def difference(one, other):
    return float((one - other).abs().max())


@pytest.mark.slow
def test_an_adapter_draws_and_is_exported(weft, words, pipe, tmp_path):
    """In its own form, as a LoRA of diffusers, and in a whole pipeline, the UNet says the same."""
    from weft.run.text_to_image import load_pipeline

    code, out, err = weft(*words(tmp_path / "out", "--r", 4))
    assert code == 0, err
    assert "train: 11 images" in out and "images reach the VAE as 3 x 16 x 16 numbers" in out
    result = tiny.result(tmp_path / "out")
    assert result["data"]["kind"] == "captioned" and result["validation"]["rows"] == 1
    assert "mean square on the validation split" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    adapter = ("predict", "--adapter", tmp_path / "out", "--steps", 2)
    some = ("--prompt", "a red ball", "--prompt", "a blue cube")
    code, told, err = weft(*adapter, *some, "--output", tmp_path / "drawn")
    assert code == 0, err
    rows = [json.loads(line) for line in told.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("a red ball", 0), ("a blue cube", 1)]
    assert all(Image.open(row["image"]).size == (16, 16) for row in rows)
    listed = [json.loads(line) for line in (tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in listed] == ["a red ball", "a blue cube"]  # a data set of its own
    assert weft(*adapter, "--prompt", "a blue cube", "--seed", 1, "--output", tmp_path / "again")[0] == 0
    assert pixels(tmp_path / "again")["0000.png"] == pixels(tmp_path / "drawn")["0001.png"]
    code, _, err = weft(*adapter, "--data", tmp_path / "drawn", "--limit", 1, "--output", tmp_path / "third")
    assert code == 0, err

    own = unet_says(load_pipeline(None, tmp_path / "out").unet)
    assert difference(own, unet_says(loaded(pipe).unet)) > 1e-4
    for form in ("lora", "merged"):
        code, _, err = weft("export", tmp_path / "out", tmp_path / form, "--to", form)
        assert code == 0, err
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    plain = loaded(pipe)
    plain.load_lora_weights(tmp_path / "lora")
    assert difference(own, unet_says(plain.unet)) < 1e-5
    assert difference(own, unet_says(loaded(tmp_path / "merged").unet)) < 1e-5
    code, _, err = weft("predict", "--adapter", tmp_path / "merged", "--steps", 2, *some, "--output", tmp_path / "m")
    assert code == 0, err


def test_a_lora_of_pefts_own_on_convolutions_is_one_of_diffusers(weft, words, pipe, tmp_path):
    from weft.run.text_to_image import load_pipeline

    options = ("--r", 4, "--lora-alpha", 2, "--target-modules", "conv1,to_q", "--rank-pattern", '{"to_q": 2}')
    code, _, err = weft(*words(tmp_path / "out", *options, method="peft:lora"))
    assert code == 0, err
    own = unet_says(load_pipeline(None, tmp_path / "out").unet)
    assert weft("export", tmp_path / "out", tmp_path / "lora", "--to", "lora")[0] == 0
    plain = loaded(pipe)
    plain.load_lora_weights(tmp_path / "lora")
    assert difference(own, unet_says(plain.unet)) < 1e-5 < difference(own, unet_says(loaded(pipe).unet))


def test_ranks_of_their_own_are_exported_with_them(weft, words, pipe, tmp_path):
    from weft.run.text_to_image import load_pipeline

    assert weft(*words(tmp_path / "out", "--r", 4))[0] == 0
    assert weft("export", tmp_path / "out", tmp_path / "lora", "--to", "lora", "--compact")[0] == 0
    plain = loaded(pipe)
    plain.load_lora_weights(tmp_path / "lora")
    assert difference(unet_says(load_pipeline(None, tmp_path / "out").unet), unet_says(plain.unet)) < 1e-5


def test_full_training_leaves_a_pipeline(weft, words, pipe, tmp_path):
    code, _, err = weft(*words(tmp_path / "out", method="full", steps=2))
    assert code == 0, err
    assert difference(unet_says(loaded(tmp_path / "out").unet), unet_says(loaded(pipe).unet)) > 1e-4
    command = ("predict", "--adapter", tmp_path / "out", "--prompt", "a ball", "--steps", 1, "--output", tmp_path / "d")
    code, _, err = weft(*command)
    assert code == 0, err


def die_after_two_checkpoints(command):
    """Run a command line in this process, which is killed as soon as its second checkpoint is complete."""
    from weft.cli.main import run
    from weft.run import checkpoints

    saved, real = [], checkpoints.save

    def dying(*given):
        saved.append(real(*given))
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return saved[-1]

    checkpoints.save = dying
    run(command)


@pytest.mark.slow
def test_killed_and_gone_on_is_uninterrupted(weft, words, tmp_path):
    """Bit for bit, dropout included."""
    more = ("--dropout", 0.2, "--r", 4)
    assert weft(*words(tmp_path / "whole", *more, steps=6))[0] == 0
    command = [str(word) for word in words(tmp_path / "out", *more, steps=6)]
    assert forked.run([__file__, json.dumps(command)], libraries=forked.WEFT, env=tiny.environment()).returncode == -9
    assert (tmp_path / "out" / "checkpoint-4").exists() and not (tmp_path / "out" / "result.json").exists()
    code, _, err = weft(*words(tmp_path / "out", *more, steps=6))
    assert code == 0, err
    state = "checkpoint-6/training_state.safetensors"
    assert (tmp_path / "out" / state).read_bytes() == (tmp_path / "whole" / state).read_bytes()
    results = [tiny.result(tmp_path / name) for name in ("whole", "out")]
    assert results[0]["validation"] == results[1]["validation"]


def test_a_dry_run_shows_modules_and_memory_and_writes_nothing(weft, words, tmp_path):
    code, out, err = weft(*words(tmp_path / "out", "--r", 4, "--dry-run"))
    assert code == 0, err
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0" in out and "conv1" not in out
    assert "activations" in out and "logits" not in out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_methods_are_compared(weft, pipe, captioned, tmp_path):
    words = ["compare", "--model", pipe, "--data", captioned, "--methods", "sora,peft:lora", "--set", "sora.r=2"]
    quick = ["--budget", "steps=2", "--seeds", 1, "--grid-points", 1, "--measure-repeats", 0, "--batch-size", 4]
    more = ["--set", "peft:lora.r=2", "--references", "base", "--workers", 1, "--output", tmp_path / "study"]
    code, out, err = weft(*words, *quick, *more)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows if row.get("test")} == {"base", "sora", "peft:lora"}
    assert "test error" in out


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_before_any_work(refuse, words, llama, corpus, captioned, pipe, tmp_path):
    output = tmp_path / "out"
    r = ("--r", 2)
    refuse(2, *words(output, "--rr", 2), says=("--rr", "--r"))
    refuse(2, *words(output, *r, "--task", "text-to-images"), says=("did you mean 'text-to-image'",))
    refuse(2, *words(output, *r, data=tmp_path / "missing"), says=("missing", "does not exist"))
    refuse(2, *words(output, *r, data=corpus), says=("without config.json",))
    refuse(2, *words(output, *r, "--task", "text-to-image", data=corpus), says=("has no image to learn from",))
    refuse(2, *words(output, *r, model=llama), says=("without model_index.json", "no pipeline of diffusers"))
    refuse(2, *words(output, *r, model="builtin:vit"), says=("no pipeline of diffusers",))
    refuse(2, *words(output, "--r", 30), says=("r=30", "to_k"))
    refuse(2, *words(output, method="head"), says=("no output head",))
    refuse(2, *words(output, *r, "--columns", "text=caption"), says=("no column 'caption'",))
    broken = shutil.copytree(captioned, tmp_path / "d")
    (broken / "03.png").unlink()
    refuse(2, *words(output, *r, data=broken), says=("metadata.jsonl", "row 4", "03.png"))
    assert not output.exists()
    stream = tmp_path / "tasks.yaml"
    stream.write_text("".join(["tasks:\n", *(f"- {{name: {each}, data: {captioned}}}\n" for each in "ab")]))
    with_stream = ["adapt", "--model", pipe, "--method", "sora", "--stream", stream, "--output", output]
    refuse(2, *with_stream, says=("task 'a' is text-to-image", "stream"))
    refuse(2, "evaluate", "--model", pipe, "--data", captioned, says=("without config.json",))


def test_what_predict_and_export_do_not_take_is_refused(weft, refuse, words, adapt_words, corpus, tmp_path):
    assert weft(*words(tmp_path / "out", "--r", 2, steps=1, method="peft:pissa"))[0] == 0
    adapter, prompt = ("predict", "--adapter", tmp_path / "out"), ("--prompt", "a ball")
    drawn = ("--output", tmp_path / "drawn")
    refuse(2, *adapter, *prompt, says=("--output is missing",))
    refuse(2, *adapter, *prompt, *drawn, "--steps", 0, says=("steps must be at least 1, not 0",))
    refuse(2, *adapter, *prompt, *drawn, "--guidance", -1, says=("guidance must not be below 0",))
    refuse(2, *adapter, *prompt, "--output", tmp_path / "out", says=("exists already",))
    refuse(2, *adapter, "--data", corpus, "--score", *drawn, says=("--score is for text",))
    refuse(2, *adapter, "--model", tmp_path / "out", *prompt, *drawn, says=("without model_index.json",))
    refuse(2, "export", tmp_path / "out", tmp_path / "lora", "--to", "lora", says=("'pissa'", "export to merged"))
    assert not (tmp_path / "drawn").exists() and not (tmp_path / "lora").exists()
    assert weft(*adapt_words(tmp_path / "text", "--r", 2, steps=1))[0] == 0
    text = ("predict", "--adapter", tmp_path / "text", "--prompt", "x")
    refuse(2, *text, "--steps", 3, says=("--steps is for text-to-image",))


if __name__ == "__main__":
    die_after_two_checkpoints(json.loads(sys.argv[1]))
