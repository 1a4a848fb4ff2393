"""Training: it learns, it counts, it repeats itself."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from weft.errors import UsageError, WeftError
from weft.run import data, loop, methods
from weft.run.measure import expected_state_bytes
from weft.run.models import load_base
from weft.run.settings import TrainSettings
from weft.run.train import hold_out, total_steps, train, training_arguments


def run(model, corpus, method="peft:lora", options=None, output=None, task="causal-lm", resume=False, **settings):
    tokenizer = load_base(str(model), task, num_labels=2, weights=False).tokenizer
    splits = data.load_splits(str(corpus), task, tokenizer, max_length=32)
    base = load_base(str(model), task, labels=splits.labels, tokenizer=tokenizer)
    basic = {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "eval_steps": 3, "logging_steps": 2}
    chosen = methods.resolve(method, options or {})
    return train(base, splits, chosen, TrainSettings(**{**basic, **settings}), output, resume=resume, progress=False)


def losses(result):
    return [row["loss"] for row in result.curve if "loss" in row]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two classes that one word tells apart."""
    rows = [
        {"text": f"the {'weft' if number % 2 else 'warp'} {text}", "label": "weft" if number % 2 else "warp"}
        for number, text in enumerate(tiny.sentences(80, seed=5))
    ]
    for row in rows:
        other = "warp" if row["label"] == "weft" else "weft"
        row["text"] = row["text"].replace(other, "loom")
    return tiny.write_jsonl(tmp_path_factory.mktemp("labelled") / "rows.jsonl", rows)


def test_it_learns_and_reports(llama, corpus, tmp_path):
    result = run(llama, corpus, output=tmp_path, max_steps=20, learning_rate=0.02)
    assert losses(result)[-1] < losses(result)[0] - 0.1
    assert [row["step"] for row in result.curve if "loss" in row] == list(range(2, 21, 2))
    assert result.steps == 20
    assert result.validation["loss"] == pytest.approx(result.curve[-1]["eval_loss"])
    assert set(result.ranks.values()) == {8} and len(result.ranks) == 14
    assert result.trainable == sum(8 * (m.in_features + m.out_features) for m in lora_layers(result.model))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 21, 2))


def lora_layers(model):
    return [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]


def test_the_file_size_is_the_files(llama, corpus, tmp_path):
    result = run(llama, corpus, max_steps=1)
    result.model.save_pretrained(tmp_path)
    assert result.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_equal_seeds_are_equal_and_others_are_not(llama, corpus):
    options = {"lora_dropout": 0.2}
    first, again, other = (run(llama, corpus, options=options, seed=seed) for seed in (1, 1, 2))
    assert first.curve == again.curve
    for one, two in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert first.curve != other.curve


def test_evaluating_and_saving_change_nothing(llama, corpus, tmp_path):
    options = {"lora_dropout": 0.2}
    plain = run(llama, corpus, options=options, eval_steps=0)
    watched = run(llama, corpus, options=options, eval_steps=1, save_steps=1, output=tmp_path)
    assert losses(plain) == losses(watched)


def test_accumulated_is_a_large_batch(llama, corpus):
    """Equal weight for every token, whichever micro-batch it is in."""
    large = run(llama, corpus, batch_size=8, gradient_accumulation=1)
    small = run(llama, corpus, batch_size=2, gradient_accumulation=4)
    assert losses(large) == pytest.approx(losses(small), rel=1e-4)
    assert large.validation["loss"] == pytest.approx(small.validation["loss"], rel=1e-4)


def test_accumulated_is_a_large_batch_of_labelled_rows(llama, labelled):
    """Though a classifier's own loss in transformers knows its micro-batch alone."""
    large = run(llama, labelled, task="classification", batch_size=8, gradient_accumulation=1)
    small = run(llama, labelled, task="classification", batch_size=2, gradient_accumulation=4)
    assert losses(large) == pytest.approx(losses(small), rel=1e-4)
    assert large.validation["loss"] == pytest.approx(small.validation["loss"], rel=1e-4)


def test_classification_learns_to_tell_two_words_apart(llama, labelled):
    result = run(llama, labelled, task="classification", max_steps=60, batch_size=8, learning_rate=0.02)
    assert result.validation["accuracy"] > 0.9
    assert result.validation["matthews"] > 0.7
    assert len(result.validation["per_document"]) == 8
    wrong = sum(error for error, _ in result.validation["per_document"])
    assert result.validation["accuracy"] == 1 - wrong / 8


def test_classification_with_an_encoder_trains_the_head_too(bert, labelled):
    result = run(bert, labelled, task="classification", max_steps=2)
    names = [name for name, parameter in result.model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in names) and any("lora_A" in name for name in names)


@pytest.mark.parametrize("name", ["base", "head", "full"])
def test_references_run(name, llama, corpus):
    result = run(llama, corpus, name)
    assert result.steps == (0 if name == "base" else 6)
    assert (result.trainable == 0) == (name == "base")
    assert result.validation["loss"] > 0


def test_bfloat16_keeps_the_adapter_in_float32(llama, corpus):
    splits = data.load_splits(str(corpus), "auto", load_base(str(llama), "causal-lm", weights=False).tokenizer)
    base = load_base(str(llama), "causal-lm", dtype=torch.bfloat16)
    settings = TrainSettings(max_steps=3, batch_size=2, learning_rate=0.01, bf16=True)
    result = train(base, splits, methods.resolve("peft:lora"), settings, None, progress=False)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in result.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert losses(result) and torch.tensor(losses(result)).isfinite().all()


def test_gradient_checkpointing_changes_nothing(llama, corpus):
    options = {"lora_dropout": 0.2}
    plain = run(llama, corpus, options=options)
    recomputed = run(llama, corpus, options=options, gradient_checkpointing=True)
    assert losses(plain) == pytest.approx(losses(recomputed), rel=1e-5)


def test_steps_are_counted_as_trainer_does(llama, corpus):
    splits = data.load_splits(str(corpus), "auto", load_base(str(llama), "causal-lm", weights=False).tokenizer)
    for batch_size, accumulation, epochs in ((4, 1, 1), (4, 4, 2), (7, 3, 1.5), (100, 1, 3)):
        settings = TrainSettings(
            epochs=epochs, batch_size=batch_size, gradient_accumulation=accumulation, learning_rate=0.01, eval_steps=0
        )
        method = methods.resolve("peft:lora")
        expected = total_steps(splits, training_arguments(settings.with_recipe(method), None, method))
        base = load_base(str(llama), "causal-lm")
        assert train(base, splits, method, settings, None, progress=False).steps == expected


def test_a_penalty_is_told_apart_from_the_loss(llama, corpus):
    result = run(llama, corpus, "increlora", {"init_warmup": 1, "incre_interval": 1}, max_steps=26)
    told = [row["penalty"] for row in result.curve if "loss" in row]
    assert told and all(value > 0 for value in told)
    plain = run(llama, corpus, "peft:lora")
    assert not [row for row in plain.curve if "penalty" in row]


def test_adalora_needs_steps_between_its_phases(llama, corpus):
    with pytest.raises(UsageError, match=r"tinit \+ tfinal = 9 must be below the 6 steps"):
        run(llama, corpus, "peft:adalora", {"tinit": 5, "tfinal": 4})


def test_a_gradient_that_is_no_number_stops_too(llama, corpus, tmp_path):
    """A finite loss whose gradient overflows would spoil the weights unseen."""
    from weft.run import loop

    class Broken(loop.StepTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = float("inf")
            return loss

    import weft.run.train as module

    original = module.StepTrainer
    module.StepTrainer = Broken
    try:
        with pytest.raises(WeftError, match=r"gradient's norm became .* at step 4, .*checkpoint-3"):
            run(llama, corpus, output=tmp_path, save_steps=1)
    finally:
        module.StepTrainer = original


def test_rows_that_are_held_out_are_not_trained_on(llama, corpus):
    tokenizer = load_base(str(llama), "causal-lm", weights=False).tokenizer
    splits = data.load_splits(str(corpus), "causal-lm", tokenizer, max_length=32)
    rest, held_out = hold_out(splits, methods.resolve("diffora"), seed=3)
    whole, parts = list(splits.train["input_ids"]), [*rest.train["input_ids"], *held_out["input_ids"]]
    assert len(held_out) == len(whole) // 10 > 0 and sorted(parts) == sorted(whole)
    assert rest.validation is splits.validation
    again = hold_out(splits, methods.resolve("diffora"), seed=3)[1]
    assert list(again["input_ids"]) == list(held_out["input_ids"])
    assert hold_out(splits, methods.resolve("sora"), seed=3) == (splits, [])
    few = dataclasses.replace(splits, train=splits.train.select(range(9)))
    with pytest.raises(UsageError, match="diffora holds one in 10 training rows out of training, and there are 9"):
        hold_out(few, methods.resolve("diffora"), seed=3)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_method_that_learns_on_held_out_rows_runs(llama, corpus, recompute):
    result = run(llama, corpus, "diffora", {"r": 4, "search_steps": 4}, gradient_checkpointing=recompute)
    assert sorted(result.ranks.values()) == [0] * 6 + [4] * 8  # four of each layer's seven modules are chosen


@pytest.mark.parametrize(
    "name, options",
    [
        ("full@galore", {"rank": 4}),
        ("full@galore", {"rank": 4, "inner": "adafactor"}),
        ("full@dct_projection", {"rank": 4, "form": "trion"}),
        ("full@owlore", {"rank": 4}),
    ],
    ids=str,
)
def test_what_an_optimiser_will_keep_is_known_without_weights(name, options, llama, corpus):
    skeleton = load_base(str(llama), "causal-lm", weights=False).model
    slug, settled = methods.resolve(name, options).optimizer
    expected = expected_state_bytes(slug, skeleton, **settled)
    if slug == "owlore":  # which keeps state of the layers that it draws
        assert expected is None
        return
    kept = run(llama, corpus, name, options, max_steps=1).optimizer_bytes
    assert kept == expected > 0


# --- rows by length ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 3))
def test_rows_by_length_are_all_rows_in_batches_of_one_length_as_far_as_there_are_any(lengths, batch, seed):
    sampler = loop.ByLength(lengths, batch, seed)
    drawn = list(sampler)
    assert sorted(drawn) == list(range(len(lengths))) and len(sampler) == len(lengths) and drawn == list(sampler)
    full = len(lengths) // batch * batch
    batches = [[lengths[row] for row in drawn[start : start + batch]] for start in range(0, full, batch)]
    ordered = sorted(batches, key=lambda each: (each[0], each[-1]))  # one pool: shuffled batches of a sorted list
    assert [length for each in ordered for length in each] == sorted(lengths[row] for row in drawn[:full])


def test_rows_by_length_come_in_another_order_in_each_epoch_and_with_each_seed():
    sampler, other = loop.ByLength([3] * 200, 4, 0), loop.ByLength([3] * 200, 4, 1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert len({tuple(first), tuple(sampler), tuple(other)}) == 3


def test_batches_by_length_hold_less_padding_and_the_run_goes_on_where_it_stopped(llama, tmp_path, monkeypatch):
    rows = [{"text": " ".join(["weft"] * (1 + n % 20))} for n in range(80)]
    corpus = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    padding = {}

    def count(watch, batch):
        found = padding.setdefault(watch.settings.group_by_length, [])
        found.append(int((batch["attention_mask"] == 0).sum()))

    monkeypatch.setattr(loop.Watch, "count", count)
    options = {"max_steps": 36, "save_steps": 24, "gradient_accumulation": 1, "batch_size": 4}
    for grouped in (False, True):  # two epochs; the checkpoint is in the second
        run(llama, corpus, output=tmp_path / str(grouped), group_by_length=grouped, **options)
    assert len(padding[True]) == len(padding[False]) == 36 and 3 * sum(padding[True]) < sum(padding[False])
    state = "checkpoint-36/training_state.safetensors"
    whole = load_file(tmp_path / "True" / state)
    shutil.rmtree(tmp_path / "True" / "checkpoint-36")
    run(llama, corpus, output=tmp_path / "True", group_by_length=True, resume=True, **options)
    again = load_file(tmp_path / "True" / state)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
