"""`weft pretrain`: a model from a config, stepped by an optimiser that is named."""

import json

import pytest
import yaml


@pytest.fixture
def words(llama, corpus):
    def made(output, *more, steps=6):
        basic = ["pretrain", "--config", llama, "--data", corpus, "--output", output]
        return [str(word) for word in [*basic, "--max-steps", steps, "--batch-size", 2, "--max-length", 32, *more]]

    return made


GALORE = ("--optimizer", "galore", "--rank", 4, "--update-proj-gap", 2)


def test_a_model_from_a_config_learns_and_loads(weft, words, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    more = ["--config-options", "num_hidden_layers=1", "--learning-rate", "0.02", "--test-fraction", "0.1"]
    code, said, err = weft(*words(out, *GALORE, *more, steps=40))
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(model.model.layers) == 1 and len(AutoTokenizer.from_pretrained(out)) <= model.config.vocab_size
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in curve if "loss" in row]
    assert losses[-1] < losses[0] - 0.5 and set(result["test"]) == {"loss", "perplexity", "tokens"}
    # two moments of r × the longer side and a basis of r × the shorter one; both moments of the rest
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "proj" in n]
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in matrices)
    wanted = 4 * (sum(2 * 4 * max(p.shape) + 4 * min(p.shape) for p in matrices) + 2 * rest)
    assert abs(result["optimizer_bytes"] - wanted) < 0.02 * wanted
    report = (out / "report.html").read_text()
    assert "After 40 steps: loss" in report and f"weft pretrain --run-file {out}/run.yaml" in report
    assert f"report: {out / 'report.html'}" in said


def test_the_recipe_is_the_optimisers_own_for_random_weights(weft, words, tmp_path):
    assert weft(*words(tmp_path / "galore", *GALORE))[0] == 0
    assert weft(*words(tmp_path / "adamw"))[0] == 0
    galore, adamw = (yaml.safe_load((tmp_path / name / "run.yaml").read_text()) for name in ("galore", "adamw"))
    assert (galore["learning_rate"], adamw["learning_rate"]) == (0.01, 0.001)
    assert galore["lr_scheduler_type"] == adamw["lr_scheduler_type"] == "cosine"
    assert galore["rank"] == 4 and galore["optimizer"] == "galore" and adamw["optimizer"] is None


def test_a_run_that_was_refused_gives_its_folder_to_another(weft, refuse, words, tmp_path):
    out, relora = tmp_path / "out", ("--method", "relora", "--rank", 4)
    galore = ("--optimizer", "galore", "--galore-rank", 2)  # whose moments are not of the factors' shape
    refuse(2, *words(out, *relora, *galore), says=("relora cannot reset", "of Galore"))
    assert [path.name for path in out.iterdir()] == ["run.yaml"]
    code, _, err = weft(*words(out, *relora))
    assert code == 0, err


def test_a_run_that_was_cut_short_goes_on_to_the_same_bits_by_its_run_file(weft, words, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = [*GALORE, "--save-steps", 3]
    assert weft(*words(whole, *more))[0] == 0
    assert weft(*words(cut, *more))[0] == 0
    (cut / "result.json").unlink()
    (cut / "checkpoint-6" / "complete.json").unlink()  # as if it had been killed while the last one was written
    code, _, err = weft("pretrain", "--run-file", cut / "run.yaml", "--resume")
    assert code == 0, err
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [[], ["--optimizer", "galore", "--galore-rank", 2, "--update-proj-gap", 2]])
def test_factorised_weights_are_trained_saved_and_go_on_to_the_same_bits(more, weft, words, tmp_path):
    from transformers import AutoModelForCausalLM

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--method", "sltrain", "--rank", 4, "--lora-alpha", 4, "--save-steps", 3, *more]
    code, _, err = weft(*words(whole, *more))
    assert code == 0, err
    assert weft(*words(cut, *more))[0] == 0
    (cut / "result.json").unlink()
    (cut / "checkpoint-6" / "complete.json").unlink()
    assert weft("pretrain", "--run-file", cut / "run.yaml", "--resume")[0] == 0
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "LowRankPlusScattered"
    result = json.loads((whole / "result.json").read_text())
    assert result["trainable"] == sum(p.numel() for p in model.parameters())
    file = yaml.safe_load((whole / "run.yaml").read_text())
    assert (file["rank"], file["sp_ratio"]) == (4, 0.03)
    assert file["learning_rate"] == (0.01 if "galore" in more else 3e-3)
    code, _, err = weft("export", whole, tmp_path / "dense", "--to", "dense")
    assert code == 0, err


@pytest.mark.parametrize(
    "method, more, unlike",
    [
        ("trp", ["--energy", 0.5, "--period", 2, "--final-energy", 0.5], "--no-decompose"),
        ("maestro", ["--importance-threshold", 0.5, "--shrink-steps", 3], "--no-shrink"),
    ],
)
def test_what_a_method_does_in_the_end_is_done_before_the_model_is_saved(method, more, unlike, weft, words, tmp_path):
    from transformers import AutoModelForCausalLM

    code, said, err = weft(*words(tmp_path / "small", "--method", method, *more))
    assert code == 0, err
    assert weft(*words(tmp_path / "whole", "--method", method, *more, unlike))[0] == 0
    small, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("small", "whole"))
    result, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("small", "whole"))
    ranks = {name: m.rank for name, m in small.named_modules() if type(m).__name__ == "LowRank"}
    assert result["ranks"] == ranks != {} == other["ranks"]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    assert result["file_bytes"] < other["file_bytes"] and result["trainable"] == other["trainable"]
    assert f"validation: loss {result['validation']['loss']:.4f}" in said
    report = (tmp_path / "small" / "report.html").read_text()
    assert f"{result['validation']['perplexity']:.4g}" in report
    code, _, err = weft("export", tmp_path / "small", tmp_path / "dense", "--to", "dense")
    assert code == 0, err


def test_an_optimiser_of_trainer_takes_trainers_words(weft, words, tmp_path):
    from transformers import AutoModelForCausalLM

    code, _, err = weft(*words(tmp_path / "out", "--optimizer", "hf:adafactor"))
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert 0 < result["optimizer_bytes"] < parameters  # a row and a column each, where AdamW has 8 bytes a parameter


def test_a_dry_run_writes_nothing(weft, words, tmp_path):
    code, said, _ = weft(*words(tmp_path / "out", *GALORE, "--dry-run"))
    assert code == 0 and "full@galore on config:" in said and '"rank": 4' in said and "state of galore: " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--config", "./nowhere"], "neither a folder with a saved model nor the name of one"),
        (["--config-options", "hiden_size=8"], "did you mean 'hidden_size'"),
        (["--optimizer", "adam"], "unknown"),
        ([*GALORE[:2], "--rank", 999], "have a side of at most rank=999"),
        (["--method", "sltrin"], "trains no model from random weights: did you mean 'sltrain'"),
        (["--method", "sora"], "'sora' trains no model from random weights"),
        (["--method", "sltrain", "--rank", 999], "rank=999: a matrix of"),
        (["--run-file", "nowhere.yaml"], "run file 'nowhere.yaml' cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(more, said, refuse, words, tmp_path):
    refuse(2, *words(tmp_path / "out", *more), says=(said,))
    assert not (tmp_path / "out").exists()


def test_an_optimiser_whose_library_is_missing_is_refused_in_trainers_words(refuse, words, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_apollo_torch_available", lambda: False)
    said = "You need to install `apollo_torch`"
    refuse(2, *words(tmp_path / "out", "--optimizer", "hf:apollo_adamw"), says=(said,))
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(refuse, corpus, tmp_path):
    refuse(2, "pretrain", "--data", corpus, "--output", tmp_path / "out", says=("--config is missing",))
    refuse(2, "pretrain", "--data", corpus, "--tokenizer", "gpt2", says=("--tokenizer is given without --config",))


def test_the_help_has_the_options_of_the_optimiser(weft):
    code, said, _ = weft("pretrain", "--optimizer", "galore", "--help")
    assert code == 0 and "--update-proj-gap" in said and "--config-options" in said
    assert "--update-proj-gap" not in weft("pretrain", "--help")[1]
