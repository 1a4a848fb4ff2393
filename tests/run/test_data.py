"""Token rows: nothing lost unseen, loss where it belongs."""

import math

import pytest
import tiny
import torch

from weft.errors import UsageError
from weft.run import data, sources
from weft.run.evaluate import evaluate, matthews


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def splits(rows, words, kind, **options):
    made = sources.Rows(rows, [], [], kind)
    return data.load_splits("rows", "auto", words, rows=made, **options)


def test_long_texts_are_cut_into_windows_that_predict_each_token_once(words):
    text = " ".join(tiny.sentences(30))
    ids = words(text)["input_ids"] + [words.eos_token_id]
    made = splits([{"text": text}], words, "text", max_length=16).train
    predicted = [token for row in made for token in row["labels"][1:]]
    assert predicted == ids[1:]
    assert all(len(row["input_ids"]) <= 16 for row in made)
    assert set(made["document"]) == {0}


def test_text_loses_nothing_and_says_so(words):
    made = splits([{"text": " ".join(tiny.sentences(30))}], words, "text", max_length=16)
    assert made.report["train"]["lost_tokens"] == 0
    assert not [line for line in made.lines() if "lost" in line]


def test_the_loss_is_on_the_completion_only(words):
    row = {"prompt": "the weft goes", "completion": " over the warp"}
    (made,) = splits([row], words, "completion").train
    prompt = words(row["prompt"])["input_ids"]
    assert made["labels"][: len(prompt)] == [data.IGNORED] * len(prompt)
    assert words.decode(made["labels"][len(prompt) :]) == " over the warp</s>"
    assert made["input_ids"][: len(prompt)] == prompt


def test_truncation_is_counted(words):
    rows = [{"prompt": "the weft", "completion": " goes over" * count} for count in (1, 30)]
    lengths = [len(words(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    made = splits(rows, words, "completion", max_length=16)
    assert lengths[0] <= 16 < lengths[1]
    assert made.report["train"]["truncated_rows"] == 1
    assert made.report["train"]["lost_tokens"] == lengths[1] - 16
    assert f"1 rows longer than 16 tokens were cut, {lengths[1] - 16} tokens lost" in made.lines()[0]


def test_rows_whose_completion_was_cut_away_are_left_out(words):
    rows = [{"prompt": "the weft goes over " * 20, "completion": "x"}, {"prompt": "the", "completion": " weft"}]
    made = splits(rows, words, "completion", max_length=16)
    assert len(made.train) == 1 and made.report["train"]["dropped_rows"] == 1


CHAT = [
    {"role": "user", "content": "the weft"},
    {"role": "assistant", "content": "over"},
    {"role": "user", "content": "the warp"},
    {"role": "assistant", "content": "under"},
]


def carried(words, row):
    return words.decode([token for token in row["labels"] if token != data.IGNORED])


def test_chat_loss_is_on_the_assistants_turns(words):
    (made,) = splits([{"messages": CHAT}], words, "chat").train
    assert words.decode(made["input_ids"]).startswith("<user>the weft</s><assistant>over</s>")
    assert carried(words, made) == "over</s>under</s>"


def test_chat_with_a_template_that_marks_generation(words):
    marked = tiny.tokenizer()
    marked.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    )
    (made,) = splits([{"messages": CHAT}], marked, "chat").train
    assert carried(marked, made) == "overunder"


def test_chat_with_a_template_that_rewrites_the_past_is_said(words):
    forgetful = tiny.tokenizer()
    forgetful.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made = splits([{"messages": CHAT}], forgetful, "chat")
    assert "the loss is on whole conversations" in " ".join(made.lines())
    assert data.IGNORED not in made.train[0]["labels"]


def test_chat_needs_a_template(words):
    plain = tiny.tokenizer()
    plain.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        splits([{"messages": CHAT}], plain, "chat")


def test_pairs_carry_token_types(bert):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(bert)
    rows = [{"text1": "the weft", "text2": "the warp holds", "label": 1}]
    (made,) = splits(rows, words, "classification").train
    assert made["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert made["labels"] == 1


def test_batches_are_padded_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = data.collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_evaluation_is_the_mean_over_tokens_whatever_the_batch(llama):
    from weft.run.models import load_base

    base = load_base(str(llama), "causal-lm")
    rows = [{"text": text} for text in tiny.sentences(9)]
    dataset = splits(rows, base.tokenizer, "text", max_length=12).train
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in dataset:
            logits = base.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            targets = torch.tensor(row["labels"][1:])
            total -= logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum().item()
            tokens += len(targets)
    for batch_size in (1, 4):
        metrics = evaluate(base.model, dataset, "causal-lm", batch_size)
        assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert metrics["tokens"] == tokens
        assert metrics["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
        assert len(metrics["per_document"]) == 9
        assert sum(count for _, count in metrics["per_document"]) == tokens


def test_matthews_of_more_than_two_classes():
    assert matthews([(0, 0), (1, 1), (2, 2), (2, 1)]) == pytest.approx(
        (3 * 4 - 5) / 10
    )  # (correct · rows - Σ predicted · true) / spread
    assert matthews([(0, 0), (0, 1)]) == 0.0
    assert matthews([(1, 0), (0, 1)]) == -1.0
