"""Answers to the prompts of a test split and their scores, beside what they are by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from weft.cli.main import run
from weft.errors import UsageError
from weft.run import generate, methods
from weft.run.budget import parse_budget
from weft.run.compare import compare
from weft.run.generate import exam_of, examine, merge_if_same, score
from weft.run.models import load_base, load_tokenizer
from weft.run.planning import plan_study
from weft.run.predict import prompt_ids
from weft.run.single import context_of, run_task
from weft.run.study import Study, Task, open_results, request_of

# --- by hand ----------------------------------------------------------------------------------------------------------


def _grams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def _bleu(answers: list[str], references: list[list[str]]) -> float:
    """Papineni's BLEU of order 4 on words between spaces: matches clipped by the reference that has most of a gram, the
    length by the nearest one (the shorter of two); an order without a match counts 1/2, 1/4, ... matches."""
    found, total, length, wanted, halved = [0] * 4, [0] * 4, 0, 0, 1
    for answer, own in zip(answers, references, strict=True):
        words, others = answer.split(), [reference.split() for reference in own]
        length += len(words)
        wanted += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, 5):
            grams = _grams(words, n)
            found[n - 1] += sum(min(count, max(_grams(o, n)[gram] for o in others)) for gram, count in grams.items())
            total[n - 1] += sum(grams.values())
    if not any(found) or not all(total):
        return 0.0
    precisions = []
    for matches, count in zip(found, total, strict=True):
        halved *= 1 if matches else 2
        precisions.append((matches or 1 / halved) / count)
    short = min(1.0, math.exp(1 - wanted / length))
    return 100 * short * math.exp(math.fsum(math.log(each) for each in precisions) / 4)


def _common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    if not a or not b:
        return 0
    return _common(a[1:], b[1:]) + 1 if a[0] == b[0] else max(_common(a[1:], b), _common(a, b[1:]))


def _rouge_l(answers: list[str], references: list[list[str]]) -> float:
    """The mean over answers of 2·LCS / (words of the answer + words of the reference), by the best reference."""
    best = [
        max(2 * _common(a.split(), r.split()) / ((len(a.split()) + len(r.split())) or 1) for r in own)
        for a, own in zip(answers, references, strict=True)
    ]
    return 100 * math.fsum(best) / len(best)


_texts = st.lists(st.sampled_from(["the", "weft", "goes", "over"]), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_texts, st.lists(_texts, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_scores_are_those_of_their_definitions(pairs):
    answers, references = [answer for answer, _ in pairs], [own for _, own in pairs]
    found = score(answers, references)
    assert found["bleu"] == pytest.approx(_bleu(answers, references), abs=1e-9)
    assert found["rouge_l"] == pytest.approx(_rouge_l(answers, references), abs=1e-9)


def test_scores_worked_out_on_paper():
    """Two answers of 6 and 4 words: 9 of 10 words, 6 of 8 pairs, 4 of 6 triples, 2 of 4 quadruples, none too short."""
    answers = ["the weft goes over the warp", "the loom beats time"]
    references = [["a thread", "the weft goes under the warp"], ["the loom beats time"]]
    pairs, triples, quadruples = (3 + 3) / (5 + 3), (1 + 2) / (4 + 2), (0 + 1) / (3 + 1)
    by_hand = 100 * ((5 + 4) / 10 * pairs * triples * quadruples) ** 0.25
    assert score(answers, references) == {
        "bleu": pytest.approx(by_hand, abs=1e-9),
        "rouge_l": pytest.approx(100 * (10 / 12 + 1) / 2, abs=1e-9),
    }
    assert score([""], [["the weft"]]) == {"bleu": 0, "rouge_l": 0}


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def test_rows_that_share_a_prompt_are_references_of_one_another(words):
    pairs = [("a", " over"), ("b", " under"), ("a", " holds"), ("c", "  "), ("b", " over"), ("d", " the warp beats")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    exam = exam_of(rows, words)
    assert exam.prompts == ("a", "b", "d")
    assert exam.references == (("over", "holds"), ("under", "over"), ("the warp beats",))
    longest = len(words("the warp beats")["input_ids"])
    assert exam.max_new_tokens == longest + 1 and exam.too_long == 0
    first = exam_of(rows, words, limit=1)
    assert first.prompts == ("a",) and first.references == (("over", "holds"),)
    assert first.max_new_tokens == longest + 1  # of all rows: the number of prompts does not change an answer


def test_a_prompt_that_leaves_no_room_is_left_out_and_counted(words):
    rows = [{"prompt": "the weft " * count, "completion": "over and under"} for count in (1, 30, 2)]
    length = len(words("over and under")["input_ids"]) + 1
    room = len(words("the weft " * 2)["input_ids"])
    exam = exam_of(rows, words, positions=room + length)
    assert exam.prompts == (rows[0]["prompt"], rows[2]["prompt"]) and exam.too_long == 1
    assert exam.sentence().endswith("; left out, as they leave no room for an answer: 1")
    assert exam_of(rows, words, longest_prompt=room).prompts == exam.prompts
    assert exam_of(rows, words, positions=4).max_new_tokens == 2 and not exam_of(rows, words, positions=4).prompts


def test_a_chat_is_asked_up_to_its_last_answer(words):
    turns = [{"role": "user", "content": "weft?"}, {"role": "assistant", "content": "over"}]
    asked = [*turns, {"role": "user", "content": "warp?"}]
    exam = exam_of([{"messages": turns}, {"messages": asked}], words)
    assert exam.prompts == ("<user>weft?</s><assistant>",) and exam.references == (("over",),) and exam.templated


def test_special_tokens_are_written_once():
    """The tokenizer puts <s> before a prompt, and leaves a conversation to its template."""
    words = tiny.tokenizer()
    start = words.bos_token_id
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    assert prompt_ids(words, "weft")[:2] == [start, *prompt_ids(words, "weft", templated=True)[:1]]
    assert prompt_ids(words, "<s>weft", templated=True).count(start) == 1
    assert prompt_ids(words, "", templated=True) == [start]


# --- what is answered -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder of prompts, two completions each; seven prompts in the test split."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, first, count in (("train", 0, 24), ("valid", 24, 4), ("test", 28, 7)):
        prompts = [f"{text} :" for text in tiny.sentences(40)[first : first + count]]
        rows = [{"prompt": p, "completion": f" {p.split()[side]} holds"} for p in prompts for side in (0, 1)]
        tiny.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def _study(llama: Path, data: Path, **changes) -> Study:
    quick = {"budget": parse_budget("steps=3"), "seeds": 1, "batch_size": 2, "max_length": 64, "grid_points": 1}
    quick |= {"measure_repeats": 0, "evaluations": 0, "forget_data": "none", "generate": 5}
    return Study(str(llama), str(data), **{"methods": ("peft:lora",), "references": ("base",), **quick, **changes})


def _greedy(model, tokenizer, prompt: str, most: int) -> str:
    """One token after the other, each from the whole text so far."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + most:
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def _shake(parameters, size: float) -> None:
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.data += size * torch.randn_like(parameter)


@pytest.mark.parametrize("name", ["base", "head", "full", "peft:lora", "peft:ia3", "sora", "randlora", "hydra"])
def test_answers_are_greedy_whatever_is_attached(llama, pairs, name):
    """In batches with padding, from a cache, merged or not: the same text as one prompt alone without any of these."""
    tokenizer = load_tokenizer(str(llama))
    base = load_base(str(llama), "causal-lm", tokenizer=tokenizer).model
    _shake(base.parameters(), 0.3)  # the tiny model as it is repeats its last token
    model = methods.attach(methods.resolve(name, {"r": 4} if name == "randlora" else {}), base).eval()
    _shake((parameter for parameter in model.parameters() if parameter.requires_grad), 0.1)
    rows = [json.loads(line) for line in (pairs / "test.jsonl").read_text().splitlines()]
    exam = exam_of(rows, tokenizer)
    expected = [_greedy(model, tokenizer, prompt, exam.max_new_tokens) for prompt in exam.prompts]
    found = examine(model, tokenizer, exam, 1)
    assert [example["answer"] for example in found["examples"]] == expected[:3]
    assert found["prompts"] == 7 and len(set(expected)) == 7
    assert {key: found[key] for key in ("bleu", "rouge_l")} == score(expected, exam.references)
    assert found["examples"][0]["reference"] == exam.references[0][0]


def test_a_merge_that_would_change_the_answers_is_taken_back(llama, monkeypatch, caplog):
    tokenizer = load_tokenizer(str(llama))

    def attached(name):
        return methods.attach(methods.resolve(name), load_base(str(llama), "causal-lm", tokenizer=tokenizer).model)

    assert merge_if_same(attached("peft:lora"), tokenizer, "the weft")
    assert merge_if_same(attached("sora"), tokenizer, "the weft")
    assert not [record for record in caplog.records if record.name.startswith("weft")]
    assert not merge_if_same(attached("base"), tokenizer, "the weft")
    assert not merge_if_same(attached("peft:lora").bfloat16(), tokenizer, "the weft")
    wrong = attached("peft:lora")
    before = {name: tensor.clone() for name, tensor in wrong.state_dict().items()}
    merge = wrong.base_model.merge_adapter

    def merge_wrongly():
        merge()
        wrong.get_input_embeddings().weight.data += 1

    monkeypatch.setattr(wrong.base_model, "merge_adapter", merge_wrongly)
    assert not merge_if_same(wrong, tokenizer, "the weft")
    layers = {name: tensor for name, tensor in wrong.state_dict().items() if "base_layer" in name}
    assert layers and all(torch.allclose(tensor, before[name], atol=1e-6) for name, tensor in layers.items())


# --- in a comparison --------------------------------------------------------------------------------------------------


def test_final_runs_and_the_base_model_generate(llama, pairs):
    plan = plan_study(_study(llama, pairs))
    assert any("Generation: 5 prompts with 10 references" in note for note in plan.notes)
    context = context_of(plan)
    final = asdict(Task("final", "peft:lora", 1, 1e-2, plan.steps))
    row = run_task(context, final)
    base = run_task(context, asdict(Task("reference", "base", 0, None, 0)))
    for each in (row, base):
        assert each["status"] == "ok", each["error"]
        found = each["generation"]
        assert found["prompts"] == 5 and len(found["examples"]) == 3 and 0 <= found["bleu"] <= found["rouge_l"] + 50
        assert set(found["examples"][0]) == {"prompt", "answer", "reference"}
    assert run_task(context, final) == row
    grid = run_task(context, {**final, "phase": "grid"})
    assert grid["status"] == "ok" and grid["generation"] is None
    silent = context_of(plan_study(_study(llama, pairs, generate=None)))
    quiet = run_task(silent, final)
    assert quiet["generation"] is None and {**row, "generation": None} == quiet  # all else is as without


def test_a_study_goes_on_only_with_as_many_prompts(tmp_path):
    asked = request_of(Study("model", "data", ("sora",), generate=5), {})
    results = open_results(tmp_path, asked)
    results.append({"kind": "study", "request": asked})
    results.close()
    open_results(tmp_path, asked).close()
    with pytest.raises(UsageError, match="holds a study with generate 5, and this command has null"):
        open_results(tmp_path, request_of(Study("model", "data", ("sora",)), {}))


def test_a_study_from_before_there_was_generation_goes_on(tmp_path):
    asked = request_of(Study("model", "data", ("sora",)), {})
    results = open_results(tmp_path, asked)
    results.append({"kind": "study", "request": {name: value for name, value in asked.items() if name != "generate"}})
    results.close()
    open_results(tmp_path, asked).close()


def test_what_cannot_generate_is_refused_before_any_run(llama, pairs, corpus, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"--generate needs data with prompts and completions, .* holds plain text"):
        plan_study(_study(llama, corpus))
    labelled = [{"text": text, "label": number % 2} for number, text in enumerate(tiny.sentences(30))]
    with pytest.raises(UsageError, match="holds texts with labels"):
        plan_study(_study(llama, tiny.write_jsonl(tmp_path / "labelled.jsonl", labelled)))
    with pytest.raises(UsageError, match="no test row of data .* has a prompt of fewer than 4 tokens"):
        plan_study(_study(llama, pairs, max_length=4))
    with pytest.raises(UsageError, match="--generate must be at least 1, not 0"):
        _study(llama, pairs, generate=0)
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: None)
    for attempt in (
        lambda: plan_study(_study("nowhere", "nothing")),
        lambda: compare(_study("nowhere", "nothing"), tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match=r"--generate needs the extra `weft\[generation\]`"):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compare_with_generation_from_the_command_line(llama, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["compare", "--model", llama, "--data", pairs, "--methods", "peft:lora", "--output", tmp_path]
    words += ["--budget", "steps=3", "--seeds", 2, "--references", "base", "--grid-points", 1, "--measure-repeats", 0]
    words += ["--forget-data", "none", "--batch-size", 2, "--max-length", 64, "--workers", 1, "--generate", 4]
    assert run([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    assert "bleu" in shown and "rouge-l" in shown and ", BLEU " in shown
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[0]["request"]["generate"] == 4 and {"sacrebleu", "rouge-score"} <= set(rows[0]["versions"])
    assert [row["generation"]["prompts"] for row in rows[1:]] == [4, 4, 4]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ROUGE-L" in page and rows[1]["generation"]["examples"][0]["prompt"] in page
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run([str(word) for word in words]) == 0  # nothing is left to do
    assert (tmp_path / "results.jsonl").read_bytes() == before
    words[-1] = 3
    assert run([str(word) for word in words]) == 2
    assert "holds a study with generate 4, and this command has 3" in capsys.readouterr().err
