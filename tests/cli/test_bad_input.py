"""What a user can get wrong: one sentence each on standard error, 2 for usage and 1 for failure."""

import gzip
import json
import shutil

import pytest
import tiny


@pytest.fixture
def bad(refuse, llama, corpus, tmp_path):
    """Run weft adapt with some words replaced; it must refuse with exit code 2 and write nothing."""

    def call(*more, says, code=2, model=llama, data=corpus, method="peft:lora"):
        output = tmp_path / "out"
        words = ["adapt", "--model", model, "--data", data, "--method", method, "--output", output, "--max-steps", 1]
        err = refuse(code, *words, *more, says=says)
        assert not output.exists()
        return err

    return call


def test_unknown_verb_suggests(refuse):
    refuse(2, "adpt", says=("'adpt'", "did you mean 'adapt'"))


def test_unknown_flag_suggests(bad):
    bad("--max-stps", "3", says=("--max-stps", "--max-steps"))


def test_missing_value_names_what_is_needed(refuse):
    refuse(2, "adapt", "--model", "x", "--method", "peft:lora", says=("--data is missing",))
    refuse(2, "adapt", says=("--model is missing",))


def test_unknown_method_suggests_the_nearest(bad):
    bad(method="sorra", says=("unknown method 'sorra'", "did you mean 'sora'"))
    bad(method="peft:lorra", says=("peft:lorra", "did you mean 'lora'"))


def test_rank_zero(bad):
    bad("--r", "0", says=("peft:lora", "r"))
    bad("--r", "0", method="sora", says=("r=0",))


def test_rank_above_the_matrix_names_it(bad):
    err = bad("--r", "40", says=("r=40", "32"))
    assert "layers.0" in err
    bad("--r", "40", method="sora", says=("40", "layers.0"))


def test_targets_that_match_nothing_list_what_there_is(bad):
    for method in ("peft:lora", "sora"):
        bad("--target-modules", "q_prj", method=method, says=("q_prj", "match nothing", "q_proj", "down_proj"))


def test_wrong_type_names_field_and_value(bad):
    bad("--r", "many", says=("r must be int", "'many'"))
    bad("--batch-size", "2.5", says=("batch_size", "2.5"))


def test_values_out_of_range(bad):
    bad("--batch-size", "0", says=("batch_size", "0"))
    bad("--warmup-ratio", "1.5", says=("warmup_ratio", "1.5"))
    bad("--validation-fraction", "1", says=("validation_fraction",))
    bad("--test-fraction", "-0.1", says=("test_fraction",))
    bad("--lr-scheduler-type", "linaer", says=("linaer", "did you mean 'linear'"))
    bad("--task", "regression", says=("unknown task 'regression'",))
    bad("--report-to", "tensorbord", says=("tensorbord", "did you mean 'tensorboard'"))


def test_unknown_config_keys(refuse, bad, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batchsize: 3\n")
    bad("--config", file, says=("'batchsize'", "did you mean 'batch_size'"))
    file.write_text("rank: 3\n")
    bad("--config", file, says=("'rank'", "peft:lora"))


def test_run_files_that_are_none(bad, tmp_path):
    bad("--config", tmp_path / "none.yaml", says=("none.yaml", "cannot be read"))
    file = tmp_path / "run.yaml"
    file.write_text("a: [1\nb: 2")
    bad("--config", file, says=("run.yaml", "is not YAML"))
    file.write_text("- a\n")
    bad("--config", file, says=("must be a mapping",))


def test_models_that_are_none(bad, tmp_path):
    bad(model=tmp_path / "nowhere", says=("nowhere", "neither a folder"))
    (tmp_path / "empty").mkdir()
    bad(model=tmp_path / "empty", says=("config.json",))
    bad(model="nobody/nothing", says=("nobody/nothing", "hub"))
    bad(model="builtin:pycod", says=("pycod", "pycode"))


def test_data_that_is_missing_or_of_no_known_kind(bad, tmp_path):
    bad(data=tmp_path / "none.jsonl", says=("none.jsonl", "does not exist"))
    (tmp_path / "a.docx").write_text("x")
    bad(data=tmp_path / "a.docx", says=("a.docx", ".jsonl"))
    (tmp_path / "folder").mkdir()
    bad(data=tmp_path / "folder", says=("holds no data file",))


def test_a_data_set_that_the_hub_does_not_give(bad):
    bad(data="nobody/nothing", says=("nobody/nothing", "cannot be had from the hub"))


def test_empty_data(bad, tmp_path):
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_text("  \n")
        bad(data=tmp_path / name, says=(name, "is empty"))
    (tmp_path / "header.csv").write_text("text\n")
    bad(data=tmp_path / "header.csv", says=("holds no rows",))
    tiny.write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}])
    bad(data=tmp_path / "blank.jsonl", says=("only empty texts",))


def test_binary_and_unreadable_data(bad, tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 8)
    bad(data=tmp_path / "a.txt", says=("a.txt", "binary"))
    (tmp_path / "latin.txt").write_bytes("Ångström".encode("latin-1"))
    bad(data=tmp_path / "latin.txt", says=("latin.txt", "UTF-8"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"hello " * 99)[:20])
    bad(data=tmp_path / "b.txt.gz", says=("b.txt.gz", "cannot be read"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really PAR1")
    bad(data=tmp_path / "c.parquet", says=("c.parquet", "parquet"))


def test_bad_rows_are_named(bad, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    bad(data=path, says=("line 2", "is not JSON"))
    tiny.write_jsonl(path, [{"text": "a"}, {"text": 3}])
    bad(data=path, says=("row 2", "text must be text", "3"))
    tiny.write_jsonl(path, [{"sentence": "a"}])
    bad(data=path, says=("sentence", "--columns"))
    bad("--columns", "text=sentense", data=path, says=("sentense", "did you mean 'sentence'"))
    tiny.write_jsonl(path, [{"messages": [{"role": "user"}]}])
    bad(data=path, says=("row 1", "content"))
    (tmp_path / "t.csv").write_text("text,label\nhello,1\nworld\n")
    bad(data=tmp_path / "t.csv", says=("line 3", "2 columns"))


def test_labels_that_cannot_be_learnt(bad, tmp_path):
    path = tiny.write_jsonl(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}] * 9)
    bad(data=path, says=("only the label 'x'",))


def test_a_truncated_model_file_is_named(bad, llama, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused = tmp_path / "out"
    err = bad_after_start(bad, broken)
    assert "model.safetensors" in err and "truncated" in err
    assert not (refused / "adapter_model.safetensors").exists()


def bad_after_start(bad, model):
    return bad(model=model, code=1, says=("truncated or damaged",))


def test_output_that_holds_something_else(refuse, adapt_words, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(2, *adapt_words(tmp_path / "file"), says=("is a file",))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    refuse(2, *adapt_words(tmp_path / "thesis"), says=("holds other files",))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_debug_shows_the_traceback(weft):
    code, _, err = weft("adapt", "--model", "x", "--data", "y", "--method", "sorra", "--debug")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize("method", ["peft:lora", "sora"])
def test_an_adapter_of_another_base_model(method, weft, refuse, adapt_words, llama, tmp_path):
    output = tmp_path / "out"
    assert weft(*adapt_words(output, method=method, steps=1))[0] == 0
    wider = tiny.save_llama(tmp_path / "wider", hidden=48)
    err = refuse(2, "predict", "--adapter", output, "--model", wider, "--prompt", "the", says=("another base model",))
    assert "proj" in err
    weights = output / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    refuse(1, "predict", "--adapter", output, "--prompt", "the", says=("adapter_model.safetensors", "truncated"))


def test_same_shapes_but_other_weights(weft, refuse, adapt_words, tmp_path):
    """weft's own adapters carry a sketch of the weights that they were trained on."""
    output = tmp_path / "out"
    assert weft(*adapt_words(output, method="sora", steps=1))[0] == 0
    other = tiny.save_llama(tmp_path / "other", seed=1)
    refuse(2, "predict", "--adapter", output, "--model", other, "--prompt", "the", says=("another base model",))


def test_predict_refuses(refuse, llama, tmp_path):
    refuse(2, "predict", "--adapter", tmp_path, says=("--prompt or --data",))
    refuse(2, "predict", "--adapter", tmp_path, "--prompt", "a", says=("adapter_config.json",))
    refuse(2, "predict", "--adapter", tmp_path / "none", "--prompt", "a", says=("not a folder",))
    refuse(2, "predict", "--adapter", tmp_path, "--prompt", "a", "--max-new-tokens", 0, says=("max_new_tokens",))


def test_nan_loss_stops_before_the_step(weft, refuse, adapt_words, llama, tmp_path):
    """An infinite weight makes the loss NaN at once: step 1 is named and nothing was saved."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "nan"
    shutil.copytree(llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = adapt_words(tmp_path / "out")
    words[words.index("--model") + 1] = str(broken)
    refuse(1, *words, says=("loss became nan at step 1", "no checkpoint yet"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_nan_later_keeps_the_last_good_checkpoint(refuse, adapt_words, tmp_path):
    output = tmp_path / "out"
    words = adapt_words(output, "--save-steps", 2, "--max-grad-norm", 0, "--learning-rate", "1e30", steps=40)
    err = refuse(1, *words, says=("at step", "last good checkpoint is"))
    kept = output / err.split("last good checkpoint is ")[1].split(";")[0].rsplit("/", 1)[1]
    step = int(err.split("at step ")[1].split(",")[0])
    assert json.loads((kept / "complete.json").read_text())["step"] < step
