"""weft adapt from its words to its files."""

import json

import pytest
import tiny
import yaml
from tiny import result

from weft import registry


def test_every_method_shows_its_options(weft):
    for name in [*registry.cards("adapters"), "peft:lora"]:
        code, out, err = weft("adapt", "--method", name, "--help")
        assert code == 0 and err == ""
        assert f"Options of {name}" in out
    assert "--lora-dropout" in out


def test_help_without_method_says_where_they_are(weft):
    code, out, _ = weft("adapt", "--help")
    assert code == 0 and "--method NAME --help" in " ".join(out.split()) and "--lora-dropout" not in out


def test_options_that_a_run_has_too_get_the_methods_name(weft):
    _, out, _ = weft("adapt", "--method", "nola", "--help")
    assert "--nola-seed" in out and "--seed" in out


def test_a_dry_run_loads_no_weights_and_writes_nothing(weft, adapt_words, llama, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "model.safetensors").unlink()
    words = adapt_words(tmp_path / "out", "--dry-run", "--r", 4, "--target-modules", "q_proj,v_proj")
    words[words.index("--model") + 1] = str(bare)
    code, out, err = weft(*words)
    assert code == 0, err
    assert "model.layers.1.self_attn.v_proj" in out and "k_proj" not in out
    expected = 2 * 4 * ((32 + 32) + (32 + 16))  # two layers, r = 4, q: 32 x 32, v: 16 x 32
    assert f"{expected:,} trainable parameters" in out
    assert "estimated memory" in out and "base weights" in out
    assert not (tmp_path / "out").exists()


def test_the_run_file_repeats_the_run(weft, adapt_words, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["--r", 4, "--target-modules", "q_proj,v_proj", "--lora-dropout", 0.1, "--seed", 5]
    assert weft(*adapt_words(first, *words))[0] == 0
    file = yaml.safe_load((first / "run.yaml").read_text())
    assert file["r"] == 4 and file["target_modules"] == ["q_proj", "v_proj"] and file["learning_rate"] == 0.01
    assert file["weight_decay"] == 0.0 and file["lr_scheduler_type"] == "linear"  # what the recipe settled
    code, _, err = weft("adapt", "--config", first / "run.yaml", "--output", second)
    assert code == 0, err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    other = yaml.safe_load((second / "run.yaml").read_text())
    assert {**other, "output": None} == {**file, "output": None}


@pytest.mark.parametrize("method", sorted(registry.cards("adapters")))
def test_every_methods_run_file_is_accepted(method, tmp_path):
    """What a run writes of itself is what a run takes, whatever the method."""
    from weft.run import adapt

    given = {"model": "m", "data": "d", "method": method, "output": "o"}
    request = adapt.request(given)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(request.resolved()))
    again = adapt.request({k: v for k, v in adapt.read_run_file(tmp_path / "run.yaml").items() if v is not None})
    assert again.resolved() == request.resolved()


def test_flags_override_the_run_file(weft, adapt_words, llama, corpus, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": str(llama), "data": str(corpus), "method": "peft:lora", "r": 4}))
    code, out, _ = weft("adapt", "--config", file, "--r", 2, "--dry-run")
    assert code == 0 and '"r": 2' in out
    code, out, _ = weft("adapt", "--config", file, "--dry-run")
    assert code == 0 and '"r": 4' in out


def test_peft_loads_what_was_saved(weft, adapt_words, llama, tmp_path):
    """The folder is an ordinary PEFT adapter and gives the validation loss that was printed."""
    from peft import PeftModel

    from weft.run import data, sources
    from weft.run.evaluate import evaluate
    from weft.run.models import load_base

    output = tmp_path / "out"
    words = adapt_words(output)
    assert weft(*words)[0] == 0
    base = load_base(str(llama), "causal-lm")
    rows = sources.read(words[words.index("--data") + 1])
    splits = data.load_splits("rows", "auto", base.tokenizer, max_length=32, rows=rows)
    model = PeftModel.from_pretrained(base.model, output)
    again = evaluate(model, splits.validation, "causal-lm", 2)
    assert again["loss"] == result(output)["validation"]["loss"]


def test_prompts_and_completions(weft, adapt_words, llama, tmp_path):
    rows = [{"question": "the weft goes", "answer": " over" if n % 2 else " under"} for n in range(20)]
    path = tiny.write_jsonl(tmp_path / "qa.jsonl", rows)
    words = adapt_words(tmp_path / "out", "--columns", "prompt=question,completion=answer")
    words[words.index("--data") + 1] = str(path)
    assert weft(*words)[0] == 0
    report = result(tmp_path / "out")["data"]
    assert report["kind"] == "completion" and report["train"]["loss_tokens"] < report["train"]["tokens"]


def test_chat(weft, adapt_words, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "over"}]}
        for text in tiny.sentences(20)
    ]
    words = adapt_words(tmp_path / "out", "--max-length", 64)
    words[words.index("--data") + 1] = str(tiny.write_jsonl(tmp_path / "chat.jsonl", rows))
    assert weft(*words)[0] == 0
    train = result(tmp_path / "out")["data"]["train"]
    assert 0 < train["loss_tokens"] < train["tokens"] / 2
    code, out, _ = weft("predict", "--adapter", tmp_path / "out", "--data", tmp_path / "chat.jsonl", "--limit", 2)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 2
    assert answers[0]["prompt"].endswith("<assistant>") and answers[0]["expected"] == "over"


@pytest.mark.parametrize("method", ["peft:lora", "sora"])
def test_classification_there_and_back(method, weft, adapt_words, tmp_path):
    rows = [
        {"sentence": f"the {'weft' if n % 2 else 'warp'} {n}", "kind": "thin" if n % 2 else "thick"} for n in range(60)
    ]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = ["--columns", "text=sentence,label=kind"]
    words = adapt_words(tmp_path / "out", *columns, "--batch-size", 8, method=method, steps=40)
    words[words.index("--data") + 1] = str(path)
    code, out, err = weft(*words)
    assert code == 0, err
    assert "accuracy" in out and "matthews" in out
    assert result(tmp_path / "out")["validation"]["accuracy"] > 0.9
    answer = ["predict", "--adapter", tmp_path / "out"]
    code, out, err = weft(*answer, "--data", path, *columns)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 60 and set(answers[0]["probabilities"]) == {"thin", "thick"}
    assert sum(a["label"] == a["expected"] for a in answers) > 54
    assert all(abs(sum(a["probabilities"].values()) - 1) < 1e-4 for a in answers)


def test_long_windows_are_said(weft, adapt_words, tmp_path):
    code, out, _ = weft(*adapt_words(tmp_path / "out", "--max-length", 4096))
    assert code == 0 and "max_length is 128, which is all that the model can see" in out


@pytest.mark.parametrize("method", ["head", "full"])
def test_references_save_a_whole_model(method, weft, adapt_words, tmp_path):
    output = tmp_path / "out"
    assert weft(*adapt_words(output, method=method))[0] == 0
    code, out, err = weft("predict", "--adapter", output, "--prompt", "the weft", "--max-new-tokens", 3)
    assert code == 0, err
    assert json.loads(out)["prompt"] == "the weft"


def test_tensorboard_needs_its_package_or_works(weft, adapt_words, tmp_path):
    from transformers.integrations import is_tensorboard_available

    code, _, err = weft(*adapt_words(tmp_path / "out", "--report-to", "tensorboard"))
    if is_tensorboard_available():
        assert code == 0
        assert list((tmp_path / "out").rglob("events.out.tfevents.*"))
    else:
        assert code == 2 and "pip install tensorboard" in err


@pytest.mark.parametrize(
    "optimizer, options",
    [
        ("galore", ["--update-proj-gap", 2, "--scale", 1]),
        ("owlore", ["--activated-layers", 1, "--sampling-interval", 1]),
    ],
)
def test_full_training_with_an_optimiser_of_weft_stops_and_goes_on(optimizer, options, weft, adapt_words, tmp_path):
    """What a run that was cut short ends with is what one that went through ends with, bit for bit."""
    words = ["--optimizer", optimizer, "--rank", 4, *options, "--save-steps", 3]
    words += ["--lr-scheduler-type", "constant", "--warmup-ratio", 0]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert weft(*adapt_words(whole, *words, method="full"))[0] == 0
    assert weft(*adapt_words(cut, *words, method="full"))[0] == 0
    (cut / "result.json").unlink()
    (cut / "checkpoint-6" / "complete.json").unlink()  # as if it had been killed while the last one was written
    code, _, err = weft(*adapt_words(cut, *words, method="full"))
    assert code == 0, err
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    file = yaml.safe_load((whole / "run.yaml").read_text())
    assert file["method"] == "full" and file["optimizer"] == optimizer and file["rank"] == 4


@pytest.mark.parametrize(
    "method, words, said",
    [
        ("full", ["--optimizer", "galor"], "did you mean 'galore'"),
        ("full", ["--optimizer", "galore", "--rnk", 4], "did you mean --rank"),
        ("full", ["--optimizer", "galore", "--rank", "four"], "rank must be int, not 'four'"),
        ("full", ["--optimizer", "galore", "--rank", 0], "rank=0 must be a whole number of at least 1"),
        ("full", ["--optimizer", "galore", "--rank", 999], "have a side of at most rank=999"),
        ("full", ["--optimizer", "owlore", "--rank", 4], "activated_layers=5 is above the number"),
        ("full", ["--rank", 4], "unknown option --rank"),
        ("full", ["--optimizer", "hf:adafacto"], "did you mean 'hf:adafactor'"),
        ("full", ["--optimizer", "hf:lomo"], "hf:lomo: You need to install `lomo_optim`"),
        ("full@galore", ["--optimizer", "galore"], "method 'full@galore' names an optimiser"),
        ("full", ["--optimizer", "lora_pro"], "lora_pro needs a two-factor adapter"),
        ("sora", ["--optimizer", "galore"], "does not go with method sora"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused_before_any_work(method, words, said, weft, adapt_words, tmp_path):
    code, _, err = weft(*adapt_words(tmp_path / "out", *words, method=method))
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_auto_takes_what_measured_best_and_says_why(weft, adapt_words, tmp_path):
    from weft.run.evidence import candidates

    best = candidates("causal-lm")[0].name
    words = adapt_words(tmp_path / "out")
    words[words.index("--method") + 1] = "auto"
    code, out, err = weft(*words)
    assert code == 0, err
    assert f"auto: {best}: " in out and f"{best} on " in out
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["method"] == best.partition("@")[0]
    code, _, err = weft(*words)
    assert code == 2 and "holds this run, finished" in err
    code, out, _ = weft("adapt", "--method", "auto", "--help")
    assert code == 0 and "--method NAME --help" in " ".join(out.split())
