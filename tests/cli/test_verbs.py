"""The verbs: found by their files, helped without weight, and the small ones at work."""

import json
import subprocess
import sys

import pytest
import tiny
from tiny import environment

from weft import registry

HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "numpy")


def loaded_after(*words: str) -> tuple[set[str], str]:
    """The heavy modules that a command line loads, in a process of its own."""
    code = (
        "import sys; from weft.cli.main import run; code = run(sys.argv[1:]);"
        f"print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    out, _, loaded = done.stdout.rpartition("LOADED")
    return set(loaded.split()), out


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["methods"], ["adapt", "--help"], ["predict", "--help"]])
def test_help_loads_nothing_heavy(words):
    loaded, out = loaded_after(*words)
    assert loaded == set()
    assert out.strip()


def test_every_verb_is_listed_with_a_line(weft):
    from weft.cli.main import _help_line, verbs

    code, out, _ = weft("--help")
    assert code == 0
    assert {"adapt", "predict", "methods", "export"} <= set(verbs())
    for verb in verbs():
        assert verb in out and _help_line(verb)


def test_a_verb_is_a_file(weft, tmp_path, monkeypatch):
    """A new file in the folder is a new verb; nothing else is edited."""
    import weft.cli as package

    (tmp_path / "knit.py").write_text('"""Knit a row."""\ndef command(rows: int = 1) -> None:\n    print("k" * rows)\n')
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "Knit a row." in weft("--help")[1]
    assert weft("knit", "--rows", "3") == (0, "kkk\n", "")


def test_methods_as_json(weft):
    code, out, _ = weft("methods", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["slug"] for row in rows] == list(registry.cards())
    for row in rows:
        assert {"slug", "pillar", "title", "arxiv", "year", "summary"} <= row.keys()
    code, out, _ = weft("methods", "--pillar", "adapters")
    assert code == 0 and all(slug in out for slug in registry.cards("adapters"))


def test_an_unknown_pillar_suggests(refuse):
    refuse(2, "methods", "--pillar", "adaptors", says=("'adaptors'", "did you mean 'adapters'"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A short run of SoRA on a tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    model = tiny.save_llama(folder / "model")
    data = tiny.write_jsonl(folder / "data.jsonl", [{"text": text} for text in tiny.sentences(40)])
    from weft.cli.main import run

    words = ["adapt", "--model", model, "--data", data, "--method", "sora", "--output", folder / "out"]
    assert run([str(word) for word in [*words, "--max-steps", 4, "--max-length", 32, "--learning-rate", 0.05]]) == 0
    return folder / "out"


def test_predict_is_repeatable_and_greedy_by_default(weft, adapter):
    words = ["predict", "--adapter", adapter, "--prompt", "the weft", "--prompt", "warp", "--max-new-tokens", 8]
    first, second = weft(*words), weft(*words)
    assert first == second and first[0] == 0 and first[2] == ""
    assert [json.loads(line)["prompt"] for line in first[1].splitlines()] == ["the weft", "warp"]
    drawn = [*words, "--temperature", 2, "--seed", 1]
    assert weft(*drawn) == weft(*drawn) != first
    assert weft(*drawn) != weft(*drawn[:-1], 2)


def test_predict_does_not_depend_on_the_neighbours(weft, adapter):
    """Prompts of different length in one batch: padding changes no answer."""
    words = ["predict", "--adapter", adapter, "--max-new-tokens", 6]
    prompts = ["the", "the weft goes over and under the warp", "loom beats"]
    together = weft(*words, *[word for prompt in prompts for word in ("--prompt", prompt)])[1].splitlines()
    alone = [weft(*words, "--prompt", prompt)[1].strip() for prompt in prompts]
    assert together == alone


def test_predict_writes_a_file(weft, adapter, tmp_path):
    path = tiny.write_jsonl(tmp_path / "in.jsonl", [{"prompt": "the"}, {"prompt": "warp"}])
    words = ["predict", "--adapter", adapter, "--data", path, "--max-new-tokens", 2]
    code, out, _ = weft(*words, "--output", tmp_path / "out.jsonl")
    assert code == 0 and out == ""
    assert (tmp_path / "out.jsonl").read_text() == weft(*words)[1]


def test_predict_scores_against_all_references_of_a_prompt(weft, adapter, tmp_path):
    """A prompt of several rows is answered once; an answer that is one of its references word for word is perfect."""
    prompts = ["the weft goes over", "warp holds", "loom beats time"]
    words = ["predict", "--adapter", adapter, "--max-new-tokens", 24]
    own = [json.loads(weft(*words, "--prompt", prompt)[1])["completion"] for prompt in prompts]
    rows = [{"prompt": prompt, "completion": other} for prompt in prompts for other in ("nothing like it", "thread")]
    rows += [{"prompt": prompt, "completion": made} for prompt, made in zip(prompts, own, strict=True)]
    path = tiny.write_jsonl(tmp_path / "in.jsonl", rows)
    code, out, err = weft(*words, "--data", path, "--score", "--output", tmp_path / "out.jsonl")
    assert code == 0 and out == "", err
    assert "3 prompts with 9 references, answers of at most 24 tokens" in err and "BLEU 100.00, ROUGE-L 100.00" in err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines.pop() == {"bleu": pytest.approx(100), "rouge_l": pytest.approx(100), "prompts": 3}
    assert [line["prompt"] for line in lines] == prompts
    assert [line["completion"] for line in lines] == [made.strip() for made in own]
    assert lines[0]["references"] == ["nothing like it", "thread", own[0].strip()]
    code, out, err = weft("predict", "--adapter", adapter, "--data", path, "--score", "--limit", 2)
    assert code == 0 and json.loads(out.splitlines()[-1])["prompts"] == 2  # of all references of two prompts
    assert len(json.loads(out.splitlines()[0])["references"]) == 3


def test_predict_refuses_to_score_without_references(refuse, adapter, tmp_path, monkeypatch):
    words = ["predict", "--adapter", adapter, "--score"]
    rows = [{"prompt": "the", "completion": " weft"}, {"prompt": "warp"}]
    path = tiny.write_jsonl(tmp_path / "in.jsonl", rows)
    refuse(2, *words, "--data", path, says=("needs a completion", "1 of 2 rows", "in.jsonl"))
    refuse(2, *words, "--prompt", "the", says=("--score needs --data with prompts and completions",))
    texts = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in tiny.sentences(3)])
    refuse(2, *words, "--data", texts, says=("needs a completion", "3 of 3 rows"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse(2, *words, "--data", path, says=("--score needs the extra `weft[generation]`",))


def test_an_exported_lora_answers_the_same_without_weft(weft, adapter, tmp_path):
    code, out, err = weft("export", adapter, tmp_path / "lora", "--to", "lora")
    assert code == 0, err
    assert "error" in out  # what the conversion cost is printed
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    words = ["--prompt", "the weft", "--max-new-tokens", 8]
    plain = weft("predict", "--adapter", tmp_path / "lora", "--model", adapter.parent / "model", *words)
    assert plain == weft("predict", "--adapter", adapter, *words)


def test_a_merged_export_is_a_model(weft, adapter, tmp_path):
    assert weft("export", adapter, tmp_path / "merged", "--to", "merged")[0] == 0
    words = ["--prompt", "the weft", "--max-new-tokens", 8]
    assert weft("predict", "--adapter", tmp_path / "merged", *words)[0] == 0


def test_export_refuses(refuse, adapter, tmp_path):
    refuse(2, "export", tmp_path / "none", tmp_path / "out", "--to", "lora", says=("not a folder",))
    refuse(2, "export", adapter, adapter, "--to", "lora", says=("new folder",))
    refuse(2, "export", adapter, tmp_path / "out", "--to", "gguf", says=("gguf", "lora"))
    refuse(2, "export", adapter, tmp_path / "out", says=("--to",))
