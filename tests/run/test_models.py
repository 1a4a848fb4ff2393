"""Models by name: here those that start from random weights."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import UsageError, WeftError
from weft.run import models


def test_a_config_gives_a_model_of_its_shapes_with_weights_that_the_seed_draws(llama):
    trained = models.load_base(str(llama), "causal-lm").model.state_dict()
    spec = f"config:{llama}"
    first, again, other = (models.load_base(spec, "causal-lm", seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in trained.items()}
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[weight], other[weight]) and not torch.equal(first[weight], trained[weight])
    assert models.from_scratch(spec) and not models.from_scratch(str(llama))


def test_fields_of_the_config_change_the_model_and_what_follows_from_them(llama):
    config = json.loads((llama / "config.json").read_text())
    heads = config["num_attention_heads"]
    spec = models.scratch_spec(str(llama), None, {"hidden_size": str(16 * heads), "num_hidden_layers": "3"})
    for weights in (True, False):
        model = models.load_base(spec, "causal-lm", weights=weights).model
        assert len(model.model.layers) == 3
        assert model.model.layers[2].self_attn.q_proj.weight.shape == (16 * heads, 16 * heads)  # head_dim followed


def test_how_a_config_says_that_attention_is_computed_holds_from_random_weights_too(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    spec = f"config:{tmp_path}?tokenizer={llama}&num_hidden_layers=1"
    assert models.load_base(spec, "causal-lm").model.config._attn_implementation == "eager"


def test_another_tokenizer_brings_its_vocabulary_and_its_special_tokens(llama):
    base = models.load_base(f"config:{llama}/config.json?tokenizer=builtin:pycode", "causal-lm")
    assert base.model.get_input_embeddings().num_embeddings == len(base.tokenizer) == 2048
    assert base.model.config.eos_token_id == base.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "spec, said",
    [
        ("config:{llama}?hiden_size=3", "has no field 'hiden_size': did you mean 'hidden_size'"),
        ("config:{llama}?hidden_size=big", "hidden_size"),
        ("config:{llama}?wide", "'wide' must be tokenizer=NAME and FIELD=VALUE between &"),
        ("config:{llama}?vocab_size=3", "vocab_size=3 is smaller than the tokenizer's"),
        ("config:{llama}/config.json", "--tokenizer is missing"),
        ("config:{llama}?tokenizer=./nowhere", "cannot load the tokenizer"),
        ("config:./nowhere", "neither a folder with a saved model nor the name of one"),
    ],
)
def test_what_no_model_can_be_made_of_is_said_in_one_sentence(spec, said, llama):
    with pytest.raises(WeftError, match=said) as raised:
        models.load_base(spec.format(llama=llama), "causal-lm")
    assert "\n" not in str(raised.value)


def test_a_compressed_config_has_no_random_weights_and_random_weights_are_not_compressed(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "weft", "modules": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="compressed or quantised"):
        models.load_base(f"config:{tmp_path}?tokenizer={llama}", "causal-lm")
    with pytest.raises(UsageError, match="random weights"):
        models.load_as_saved(f"config:{llama}")


@given(
    st.dictionaries(
        st.sampled_from(["hidden_size", "rope_parameters", "layer_types"]),
        st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1),
    ),
    st.sampled_from([None, "gpt2", "builtin:pycode", "a folder/of mine"]),
)
def test_a_name_says_again_what_it_was_made_of(fields, tokenizer):
    spec = models.scratch_spec("org/some.json", tokenizer, fields)
    assert models._scratch(spec) == ("org/some.json", tokenizer, fields)
    assert spec.startswith("config:org/some.json")
