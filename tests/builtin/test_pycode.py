"""The built-in language model: an ordinary Hugging Face folder, and better than counting."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft import builtin
from weft.builtin import train_pycode

FOLDER = builtin.model_path("pycode")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def figures():
    return train_pycode.evaluate(FOLDER)


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert "tokenizer_config.json" in files and sum(files.values()) <= 5_000_000


def test_model_loads_as_any_other(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert 1_000_000 < model.num_parameters() < 3_000_000
    assert f"{model.num_parameters():,}" in (FOLDER / "README.md").read_text()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 256
    assert next(model.parameters()).dtype == torch.bfloat16
    for ids in (model.config, model.generation_config, tokenizer):
        assert ids.eos_token_id == train_pycode.EOS_ID and ids.pad_token_id == train_pycode.PAD_ID
    assert all(getattr(model.generation_config, key) == value for key, value in train_pycode.GENERATION.items())


CODE = "def f(x):\n\n\treturn x  # naïve ☃ 織\r\n"
BLANKS = "\n\n    \n  a_b=1e-5;  "
STRANGE = "<|x|>\x00\U0001f9f5ſ\u0301\u200b"


@pytest.mark.parametrize("text", [CODE, BLANKS, STRANGE, " ", ""])
def test_tokenizer_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_gives_back_whole_modules_and_packs_them(tokenizer):
    for row in builtin.texts("stdlib", "test"):
        ids = tokenizer(row["text"]).input_ids
        assert tokenizer.decode(ids) == row["text"] and len(row["text"]) > 2.5 * len(ids)


def test_definitions_are_found_at_any_depth_with_their_decorators():
    text = "import os\n\nclass A:\n    @property\n    def b(self):\n        return 1\n\nx = 2\n"
    method = "@property\ndef b(self):\n    return 1\n"
    assert train_pycode.definitions(text) == [text[11:-7], method]


def test_epochs_show_every_token_once_and_differ():
    whole = [np.full(900 + i, i + 2) for i in range(10)]
    cut = [[document[:400], document[400:]] for document in whole]
    first, again, second = (train_pycode.epoch_windows(whole, cut, 0, epoch) for epoch in (0, 0, 1))
    assert (first == again).all() and (first.shape != second.shape or (first != second).any())
    shown = np.bincount(first[:, 1:].ravel(), minlength=12)[2:]
    assert (shown <= [len(document) for document in whole]).all()
    assert shown.sum() > sum(map(len, whole)) - 2 * train_pycode.CONTEXT


def test_batches_go_on_where_they_were_left():
    whole = [np.arange(6000) + i for i in range(3)]
    cut = [[document] for document in whole]
    steady, resumed = (train_pycode.batches(whole, cut, cut, 0, start) for start in (0, 5))
    for _ in range(5):
        next(steady)
    assert all((next(steady) == next(resumed)).all() for _ in range(6))


def test_resumed_training_ends_where_steady_training_ends(tmp_path):
    windows = torch.randint(2, 2048, (6, 2, 33), generator=torch.Generator().manual_seed(0))

    def start():
        model = train_pycode.new_model(seed=0).train()
        train_pycode.add_dropout(model)
        return model, train_pycode.new_optimiser(model)

    def go(model, optimiser, first, last):
        return [train_pycode.take_step(model, optimiser, windows[i], i, 6, seed=0) for i in range(first, last)]

    steady, optimiser = start()
    expected = go(steady, optimiser, 0, 6)
    model, optimiser = start()
    go(model, optimiser, 0, 3)
    train_pycode.save_checkpoint(tmp_path / "c.safetensors", model, optimiser, 3, seed=0)
    resumed, optimiser = start()
    assert train_pycode.load_checkpoint(tmp_path / "c.safetensors", resumed, optimiser, seed=0) == 3
    assert go(resumed, optimiser, 3, 6) == expected[3:]
    assert all(torch.equal(a, b) for a, b in zip(steady.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="was written with --seed 0"):
        train_pycode.load_checkpoint(tmp_path / "c.safetensors", resumed, optimiser, seed=9)


def test_nats_agree_with_the_loss_of_the_model_and_cover_every_token(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    document = train_pycode.encode_document(tokenizer, builtin.texts("stdlib", "test")[0]["text"])[:700]
    nats = train_pycode.token_nats(model, document)
    ids = torch.tensor([[train_pycode.EOS_ID, *document[:255]]])
    with torch.no_grad():
        assert nats[:255].mean() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)
        last = torch.from_numpy(document[511:])[None]  # the window of the last token starts four strides in
        expected = -model(last[:, :-1]).logits[0, -1].log_softmax(-1)[last[0, -1]].item()
    assert nats.shape == (700,) and nats[-1] == pytest.approx(expected, rel=1e-4)


def test_parsing_counts_neither_empty_texts_nor_comments_and_forgives_the_last_line():
    assert train_pycode.parses("import os\n") and train_pycode.parses("x = 1\ndef f(")
    assert not any(map(train_pycode.parses, ["", "\n\n", "# only this\n", "def f(", "def f(:\n    pass\n", "x\0\n"]))


@pytest.mark.slow
def test_beats_a_five_gram_on_held_out_modules(figures):
    assert figures["nats_per_token"] < figures["five_gram_nats_per_token"] - 0.3
    for split in ("train", "validation", "test"):
        assert figures[f"nats_per_token_{split}"] < figures[f"five_gram_nats_per_token_{split}"]


@pytest.mark.slow
def test_most_samples_parse(figures):
    assert figures["samples"] == 100 and figures["samples_that_parse"] >= 60


@pytest.mark.slow
def test_model_card_shows_the_measured_figures(figures):
    card = (FOLDER / "README.md").read_text()
    written = json.loads(card[card.index("{") : card.rindex("}") + 1])
    assert written["parameters"] == figures["parameters"]
    assert written["nats_per_token"] == pytest.approx(figures["nats_per_token"], abs=0.1)
    assert written["five_gram_nats_per_token"] == pytest.approx(figures["five_gram_nats_per_token"], abs=0.2)
