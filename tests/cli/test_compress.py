"""weft compress from its words to its files, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from weft import registry

SHAPES = [
    *[(f"self_attn.{name}_proj", side, 32) for name, side in (("q", 32), ("k", 16), ("v", 16), ("o", 32))],
    *[("mlp.gate_proj", 64, 32), ("mlp.up_proj", 64, 32), ("mlp.down_proj", 32, 64)],
]  # of each block of the small Llama: out × in


@pytest.fixture
def words(llama, corpus, tmp_path):
    """The words of a small, quick compression."""

    def make(*more: object, method: str = "svd_llm", output: str = "out", model=llama, source=corpus) -> list[str]:
        basic = ["compress", "--model", model, "--method", method, "--output", tmp_path / output]
        quick = ["--data", source, "--samples", 8, "--max-length", 32] if source else []
        return [str(word) for word in [*basic, *quick, *more]]

    return make


def report(folder) -> dict:
    return json.loads((folder / "compression.json").read_text(encoding="utf-8"))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 15)[None]).logits


# --- what it shows ----------------------------------------------------------------------------------------------------


def test_every_method_shows_its_options(weft):
    for name in registry.cards("compress"):
        code, out, err = weft("compress", "--method", name, "--help")
        assert code == 0 and err == ""
        assert f"Options of {name}" in out and "--keep" in out and "--allocate" in out
    code, out, _ = weft("compress", "--help")
    assert code == 0 and "--method NAME --help" in " ".join(out.split()) and "--allocate" not in out


def test_a_plan_loads_no_weights_and_writes_nothing(weft, words, llama, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "model.safetensors").unlink()
    code, out, err = weft(*words("--plan", "--keep", 0.5, model=bare))
    assert code == 0, err
    stored = 0
    for name, side, other in SHAPES:
        least = math.floor(0.5 * side * other / (side + other))  # a rank more where the others leave the bits for it
        for block in (0, 1):
            line = next(line for line in out.splitlines() if f"model.layers.{block}.{name}" in line).split()
            assert line[1:5] == [str(side), "×", str(other), "low_rank"] and int(line[5]) in (least, least + 1)
            stored += int(line[5]) * (side + other)
            assert line[-1] == f"{int(line[5]) * (side + other) / (side * other):.3f}"
    dense = 2 * sum(side * other for _, side, other in SHAPES)
    assert dense / 2 - 48 < stored <= dense / 2  # short by less than the smallest step
    assert "14 matrices" in out and "expected: at least" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare"]


def test_a_plan_says_where_sizes_are_not_known_yet(weft, words):
    code, out, err = weft(*words("--plan", "--allocate", "water"))
    assert code == 0, err
    assert "allocate=water" in out and "model.layers.1.mlp.down_proj" in out and "low_rank" not in out


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_the_folder_is_a_model(weft, words, llama, tmp_path):
    import transformers as hf

    code, out, err = weft(*words("--keep", 0.6))
    assert code == 0, err
    folder = tmp_path / "out"
    assert "saved to" in out and "layer 14/14" in out and "largest errors" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    told = report(folder)
    stored = load_file(folder / "model.safetensors")
    targeted = [key for key in load_file(llama / "model.safetensors") if "_proj" in key]
    before = sum(load_file(llama / "model.safetensors")[key].numel() for key in targeted)
    after = sum(t.numel() for key, t in stored.items() if "_proj" in key)
    assert len(targeted) == 14 == len(told["layers"])
    assert told["bits"] == {"before": 32 * before, "after": 32 * after}
    assert told["keep"]["measured"] == after / before <= 0.6 < told["keep"]["measured"] + 0.02
    for where, path in (("before", llama), ("after", folder)):
        assert told["file_bytes"][where] == (path / "model.safetensors").stat().st_size
    assert all(0 < layer["error"] < 1 and layer["kind"] == "low_rank" for layer in told["layers"])
    assert told["left"] == {"model.embed_tokens.weight": [len(tiny.tokenizer()), 32]}
    assert told["calibration"] and told["versions"]["torch"] == torch.__version__
    readme = (folder / "README.md").read_text()
    assert "import weft" in readme and told["command"] in readme and f"{before * 4:,}" in readme
    assert "2403.07378" in readme
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.isfinite(logits(model)).all() and model.generation_config.eos_token_id == 2
    assert hf.AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHAT
    code, out, err = weft("predict", "--adapter", folder, "--prompt", "the weft", "--max-new-tokens", 2)
    assert code == 0 and json.loads(out)["prompt"] == "the weft", err


def test_the_run_file_and_the_command_repeat_the_run(weft, words, tmp_path):
    import shlex

    assert weft(*words("--keep", 0.6, "--include", "q_proj,mlp.up_proj", "--threads", 1))[0] == 0
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    file = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert file["include"] == ["q_proj", "mlp.up_proj"] and file["shrink"] == 0.3
    code, _, err = weft("compress", "--config", tmp_path / "out" / "run.yaml", "--output", tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    again = shlex.split(report(tmp_path / "again")["command"])[1:]
    again[again.index("--output") + 1] = str(tmp_path / "third")
    assert weft(*again)[0] == 0
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("method, data", [("svd", False), ("svd_llm", True)])
def test_keep_1_is_a_plain_copy(method, data, weft, words, llama, corpus, tmp_path):
    code, out, err = weft(*words("--keep", 1, method=method, source=corpus if data else None))
    assert code == 0 and "nothing replaced" in out, err
    before, after = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((llama / "config.json").read_text())
    assert "import weft" not in (tmp_path / "out" / "README.md").read_text()


def test_a_model_keeps_the_dtype_that_it_has(weft, words, llama, tmp_path):
    import transformers as hf

    low = tmp_path / "low"
    hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16).save_pretrained(low)
    tiny.tokenizer().save_pretrained(low)
    assert weft(*words(method="svd", model=low, source=None))[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert weft(*words("--bf16", method="svd", source=None, output="other"))[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "other" / "model.safetensors").values()} == {torch.bfloat16}


def test_dense_needs_no_weft(weft, words, refuse, tmp_path):
    import transformers as hf

    for name, more in (("factors", ()), ("out", ("--dense",))):
        assert weft(*words("--keep", 0.5, "--no-center", *more, method="lord", output=name))[0] == 0
    assert weft("export", tmp_path / "factors", tmp_path / "later", "--to", "dense")[0] == 0
    refuse(2, "export", tmp_path / "later", tmp_path / "again", "--to", "dense", says=("stock model already",))
    refuse(2, "export", tmp_path / "factors", tmp_path / "again", "--to", "merged", says=("whole model", "--to dense"))
    names = ("factors", "out", "later")
    plain = {name: logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in names}
    torch.testing.assert_close(plain["out"], plain["factors"], rtol=1e-4, atol=1e-5)
    assert torch.equal(plain["out"], plain["later"])
    assert (tmp_path / "later" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and report(tmp_path / "out")["dense"]
    assert "import weft" not in (tmp_path / "out" / "README.md").read_text()
    says = ("--dense", "lord", "q_proj", "no place", "--no-center")
    refuse(2, *words("--dense", method="lord", output="refused"), says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["factors", "later", "out"]


def test_several_corpora(weft, words, tmp_path):
    more = tiny.write_jsonl(tmp_path / "more.jsonl", [{"text": "over and under " * 20}] * 4)
    assert weft(*words("--mix", f"{more}=0.5"))[0] == 0
    told = report(tmp_path / "out")["calibration"]
    assert [each["weight"] for each in told.values()] == [1.0, 0.5] and list(told)[1] == str(more)
    assert weft(*words(output="alone"))[0] == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone")]
    key = "model.layers.0.mlp.up_proj.down.weight"
    assert not torch.equal(weights[0][key], weights[1][key])


def test_a_classifier_and_its_labels(weft, words, refuse, llama, tmp_path):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.AutoConfig.from_pretrained(llama, id2label={0: "thin", 1: "thick"}, label2id={"thin": 0, "thick": 1})
    model = tmp_path / "classifier"
    hf.LlamaForSequenceClassification(config).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    rows = [{"text": text, "label": ("thin", "thick")[n % 2]} for n, text in enumerate(tiny.sentences(20))]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    code, _, err = weft(*words(method="fwsvd", model=model, source=source))
    assert code == 0, err
    code, out, err = weft("predict", "--adapter", tmp_path / "out", "--data", source, "--limit", 1)
    assert code == 0 and set(json.loads(out)["probabilities"]) == {"thin", "thick"}, err
    text = tiny.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in tiny.sentences(20)])
    refuse(2, *words(method="fwsvd", model=model, source=text, output="none"), says=("fwsvd", "label"))
    assert weft(*words(model=model, source=text, output="text"))[0] == 0


RECOVERY = ("--then", "adapt:sora,max_steps=3,r=2,learning_rate=0.05")


def test_recovered_by_an_adapter(weft, words, tmp_path):
    """As small as the compressed model, its factors moved and nothing else."""
    import transformers as hf

    assert weft(*words("--keep", 0.6, output="alone"))[0] == 0
    assert weft(*words("--keep", 0.6, *RECOVERY))[0] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    moved = {name for name, t in before.items() if not torch.equal(t, after[name])}
    factors = {name for name in before if name.endswith((".up.weight", ".down.weight"))}
    assert moved and moved <= factors
    for name, t in before.items():
        assert torch.linalg.matrix_rank(after[name] - t) <= 2 if name in moved else True
    told = report(tmp_path / "out")["recovery"]
    assert told["method"] == "sora" and told["steps"] == 3 and math.isfinite(told["validation"]["loss"])
    assert logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]
    assert weft(*words("--keep", 0.6, *RECOVERY, "--dense", output="dense"))[0] == 0
    dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    both = [logits(m) for m in (dense, hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_an_interrupted_recovery_goes_on_where_it_was(weft, refuse, words, tmp_path, monkeypatch):
    from weft.compress import _engine
    from weft.run import adapt

    assert weft(*words("--keep", 0.6, *RECOVERY, output="whole"))[0] == 0

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapt, "run_adapt", interrupted)
        refuse(1, *words("--keep", 0.6, *RECOVERY), says=("interrupted", "compressed model is kept", "--config"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(_engine, "calibrate", interrupted)  # which nothing asks for again
    assert weft(*words("--keep", 0.6, *RECOVERY))[0] == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(t, two[name]) for name, t in one.items()) and not (tmp_path / "out.work").exists()


TRAINING = ("--train", "steps=3,learning_rate=0.01", "--keep", 0.6)


def test_a_method_that_learns_is_trained(weft, words, tmp_path):
    """Its form is that of the start, all of it moved, and its folder says how."""
    import transformers as hf

    for name, train in (("start", ("--train", "steps=0", "--keep", 0.6)), ("out", TRAINING)):
        assert weft(*words(*train, method="pela", output=name))[0] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert all(not torch.equal(t, after[name]) for name, t in before.items() if t.numel())
    told = report(tmp_path / "out")["training"]
    assert told["steps"] == 3 and math.isfinite(told["validation"]["loss"])
    assert "training" not in report(tmp_path / "start")
    assert "trained for 3 steps of `pela`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).isfinite().all()
    code, out, err = weft(*words(*TRAINING, "--dense", method="svd", output="plain"))  # fine-tuned, and written out
    assert code == 0 and "trained for 3 steps, validation loss" in " ".join(out.split()), err
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "start"]


def test_a_method_may_train_a_part(weft, words, tmp_path):
    """INT2.1 trains its factors; the report counts those alone, and all else is as it was at the start."""
    options = ("--keep", 0.9, "--rank", 2, "--group-size", 16)
    for name, train in (("start", "steps=0"), ("out", "steps=3,learning_rate=0.01")):
        assert weft(*words("--train", train, *options, method="int21", output=name))[0] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    moved = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert moved == {name for name in before if name.endswith((".up.weight", ".down.weight"))}
    assert report(tmp_path / "out")["training"]["trainable"] == sum(before[name].numel() for name in moved)


def test_what_a_method_does_not_train_stays_and_is_not_counted(weft, words, tmp_path):
    """Experts and routers of a Llama move, and as many numbers are told to have been trained."""
    for name, train in (("start", "steps=0"), ("out", "steps=3,learning_rate=0.01")):
        assert weft(*words("--active", 1, "--train", train, method="factorllm", output=name))[0] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    moved = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert moved == {name for name, t in before.items() if ".mlp." in name and t.numel()}
    assert report(tmp_path / "out")["training"]["trainable"] == sum(before[name].numel() for name in moved)
    told = report(tmp_path / "out")
    assert told["reads"] < 0.5 and told["keep"]["measured"] > 1


def test_a_plan_of_a_method_that_learns_needs_no_output(weft, llama):
    code, out, err = weft("compress", "--model", llama, "--method", "pela", "--data", "builtin:stdlib", "--plan")
    assert code == 0 and "low_rank" in out and "changes nothing" not in out + err


def test_trained_and_then_recovered(weft, words, tmp_path):
    assert weft(*words(*TRAINING, *RECOVERY, method="pela"))[0] == 0
    told = report(tmp_path / "out")
    assert told["training"]["steps"] == told["recovery"]["steps"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_attention_stays_as_the_config_of_the_model_says(weft, words, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    saved = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**saved, "attn_implementation": "eager"}))
    assert weft(*words("--keep", 0.6, output="made", model=model))[0] == 0
    assert weft(*words(*TRAINING, *RECOVERY, method="pela", output="trained", model=model))[0] == 0
    assert weft("export", tmp_path / "made", tmp_path / "dense", "--to", "dense")[0] == 0
    for name in ("made", "trained", "dense"):
        assert json.loads((tmp_path / name / "config.json").read_text())["attn_implementation"] == "eager"


@pytest.mark.parametrize(
    "method, own",
    [("pela", ()), ("dsformer", ("--block-size", 4, "--refresh", 2, "--stf", 1))],
    ids=["pela", "dsformer"],
)
def test_interrupted_training_goes_on_where_it_was(method, own, weft, refuse, words, tmp_path, monkeypatch):
    from weft.compress import _engine
    from weft.run import loop

    saving = ("--train", "steps=4,learning_rate=0.01,save_steps=1", "--keep", 0.6, *own)
    assert weft(*words(*saving, method=method, output="whole"))[0] == 0
    log = loop.Watch._log

    def interrupted(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Watch, "_log", lambda self, step: interrupted(self, step) if step == 4 else log(self, step))
        refuse(1, *words(*saving, method=method), says=("interrupted", "compressed model is kept", "--config"))
    assert (tmp_path / "out.work" / "trained" / "checkpoint-3").exists() and not (tmp_path / "out").exists()
    refuse(2, *words(*saving, "--keep", 0.5, method=method), says=("keep=0.6, not 0.5", "--no-resume"))
    monkeypatch.setattr(_engine, "compress", interrupted)  # which nothing asks for again
    assert weft(*words(*saving, method=method))[0] == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(t, two[name]) for name, t in one.items()) and not (tmp_path / "out.work").exists()


def test_minutes_become_steps_before_the_run(weft, words, tmp_path, monkeypatch):
    from weft.run import distil

    asked = []

    def steps(budget, seconds):
        asked.append((budget.minutes, seconds))
        return 2

    monkeypatch.setattr(distil, "steps_of", steps)
    assert weft(*words("--train", "minutes=0.5,learning_rate=0.01", method="pela"))[0] == 0
    ((minutes, seconds),) = asked
    assert minutes == 0.5 and seconds > 0 and report(tmp_path / "out")["training"]["steps"] == 2


def test_layers_without_factors_stay_as_they_were_compressed(refuse, words, tmp_path):
    quick = ("--keep", 0.95, "--iterations", 1, "--include", "mlp.up_proj,mlp.gate_proj,mlp.down_proj")
    refuse(1, *words(*quick, *RECOVERY, method="armor"), says=("armor makes layers without dense", "weft adapt"))
    assert any(layer["size"] for layer in report(tmp_path / "out")["layers"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(weft, refuse, words, tmp_path, monkeypatch):
    import shlex

    from weft.compress._store import Store

    assert weft(*words(output="whole"))[0] == 0
    put, seen = Store.put, []

    def interrupted(self, layer, tensors):
        if len(seen) == 9:
            raise KeyboardInterrupt
        seen.append(layer)
        put(self, layer, tensors)

    monkeypatch.setattr(Store, "put", interrupted)
    err = refuse(1, *words(), says=("interrupted with 9 of 14 layers finished", "go on with: weft compress --config"))
    assert not (tmp_path / "out").exists()
    refuse(2, *words("--samples", 7), says=("samples=8, not 7", "--no-resume"))
    monkeypatch.setattr(Store, "put", lambda self, layer, tensors: (seen.append(layer), put(self, layer, tensors)))
    code, _, said = weft(*shlex.split(err.split("go on with: ")[1])[1:])
    assert code == 0, said
    assert len(seen) == len(set(seen)) == 14
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two and not (tmp_path / "out.work").exists()


def test_nothing_is_left_of_what_never_began(weft, refuse, words, tmp_path, monkeypatch):
    from weft.compress._store import Store

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", interrupted)
    refuse(1, *words(), says=("interrupted before the first layer", "same command"))
    assert not list(tmp_path.iterdir())


def test_starting_over(weft, refuse, words, tmp_path, monkeypatch):
    from weft.compress._store import Store

    put, seen = Store.put, []

    def breaks_once(self, layer, tensors):
        seen.append(layer)
        if len(seen) == 5:
            raise RuntimeError("a fault")
        put(self, layer, tensors)

    monkeypatch.setattr(Store, "put", breaks_once)
    refuse(2, *words("--resume"), says=("no unfinished work", "out.work"))
    assert weft(*words())[0] == 1
    assert weft(*words("--no-resume", "--samples", 7))[0] == 0
    assert len(seen) == 5 + 14 and report(tmp_path / "out")["layers_found_finished"] == 0
    refuse(2, *words("--samples", 7), says=("compressed model already",))


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(refuse, words, tmp_path):
    """Run weft compress with some words replaced; it must refuse and write nothing."""

    def call(*more, says, code=2, **changes):
        before = sorted(tmp_path.iterdir())
        err = refuse(code, *words(*more, **changes), says=says)
        assert sorted(tmp_path.iterdir()) == before
        return err

    return call


def test_words_that_cannot_work(bad, refuse):
    for keep in ("0", "1.1", "-0.5"):
        bad("--keep", keep, says=("keep=", "above 0 and at most 1"))
    bad("--keep", "most", says=("keep must be float", "'most'"))
    bad("--keep", "0.01", says=("keep=0.01 is below",))
    bad(method="svdlm", says=("unknown method 'svdlm'", "did you mean 'svd_llm'"))
    bad(method="sora", says=("sora", "adapters", "svd_llm"))
    bad("--kep", "1", says=("--kep", "--keep"))
    bad("--alocate", "water", says=("--alocate", "--allocate"))
    bad("--allocate", "watr", says=("allocate", "water"))
    bad("--samples", "0", says=("samples", "0"))
    bad("--max-length", "1", says=("max_length", "1"))
    bad("--mix", "a=0", says=("mix", "a", "0"))
    bad("--mix", "a", says=("mix", "'a'"))
    bad("--shrink", "2", says=("shrink=2",))
    bad("--then", "adapt", says=("then='adapt'", "adapt:METHOD"))
    bad("--then", "export:lora", says=("then='export:lora'", "adapt:METHOD"))
    bad("--then", "adapt:sorra", says=("'sorra'", "did you mean 'sora'"))
    bad("--then", "adapt:sora,max_stepz=3", says=("'max_stepz'", "did you mean 'max_steps'"))
    bad("--then", "adapt:sora,max_steps", says=("name=value",))
    bad("--then", "adapt:sora,output=o", says=("output is the compression's own",))
    bad("--then", "adapt:full", says=("full has nothing to merge",))
    bad("--train", "steps", says=("train='steps'", "name=value"))
    bad("--train", "steps=3,steps=4", says=("'steps=4' is given twice",))
    bad("--train", "stepz=3", says=("train='stepz=3'", "did you mean 'steps'"))
    bad("--train", "minuts=3", says=("'minuts'", "did you mean 'minutes'"))
    bad("--train", "minutes=soon", says=("minutes=soon is no positive number",))
    bad("--train", "minutes=1,epochs=2", says=("minutes or epochs",))
    bad("--train", "output=o", says=("output is the compression's own",))
    bad("--train", "learning_rate=fast", says=("learning_rate", "fast"))
    bad(method="pela", source=None, says=("--data is missing", "training"))
    bad("--then", "adapt:sora", method="svd", source=None, says=("--data is missing", "recovery"))
    refuse(2, "compress", says=("--model is missing",))
    refuse(2, "compress", "--model", "m", says=("--method is missing",))
    refuse(2, "compress", "--model", "m", "--method", "svd", says=("--output is missing",))
    bad(source=None, says=("--data is missing", "svd_llm"))
    bad("--allocate", "block_influence", method="svd", source=None, says=("--data is missing", "block_influence"))


def test_run_files_with_unknown_keys(bad, tmp_path):
    (tmp_path / "run.yaml").write_text("sample: 3\n")
    bad("--config", tmp_path / "run.yaml", says=("'sample'", "did you mean 'samples'"))


def test_models_that_cannot_be_compressed(bad, weft, words, llama, tmp_path):
    bad(model=tmp_path / "nowhere", says=("nowhere", "neither a folder"))
    bad("--include", "nothing", says=("nothing", "q_proj", "down_proj"))
    odd = tmp_path / "odd"
    shutil.copytree(llama, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForEverything"]}))
    bad(model=odd, says=("LlamaForEverything", "no class"))
    (odd / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 0}))
    bad(model=odd, says=("LlamaForCausalLM has no linear layer",))
    (odd / "config.json").write_text(json.dumps(config))
    whole = (odd / "model.safetensors").read_bytes()
    (odd / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    bad(model=odd, code=1, says=("model.safetensors", "truncated"))
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    bad(model=odd, code=1, says=("lacks the tensor model.layers.1.mlp.up_proj.weight",))
    (odd / "adapter_config.json").write_text("{}")
    bad(model=odd, says=("is an adapter", "weft export"))
    assert weft(*words(method="svd", source=None))[0] == 0
    bad(model=tmp_path / "out", output="twice", says=("compressed by weft already",))


def test_numbers_that_are_not_finite_name_the_layer(bad, llama, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(llama, odd)
    for tensor, layer in (("self_attn.v_proj", "self_attn.v_proj"), ("post_attention_layernorm", "mlp.gate_proj")):
        tensors = load_file(llama / "model.safetensors")
        tensors[f"model.layers.0.{tensor}.weight"].view(-1)[0] = float("nan")
        save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
        bad(model=odd, says=(f"model.layers.0.{layer}", "not finite"))


def test_calibration_data_that_is_too_little(bad, tmp_path):
    short = tiny.write_jsonl(tmp_path / "short.jsonl", [{"text": "the weft"}] * 3)
    bad(source=short, says=("short.jsonl", "less than one sequence of 32"))
    bad(source=tmp_path / "none.txt", says=("none.txt", "does not exist"))


def test_folders_that_hold_something_else(bad, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    bad(says=("holds other files",))
    (tmp_path / "file").write_text("mine")
    bad(output="file", says=("is a file",))
    (tmp_path / "new.work").mkdir()
    (tmp_path / "new.work" / "notes.txt").write_text("mine")
    bad(output="new", says=("new.work", "other files"))
