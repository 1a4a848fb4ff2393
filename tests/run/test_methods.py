"""Methods by name: what resolves, what is refused, what is counted."""

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

from weft import registry
from weft.errors import UsageError
from weft.run import methods
from weft.run.models import load_base


@pytest.fixture(scope="module")
def skeleton(llama):
    return load_base(str(llama), "causal-lm", weights=False).model


SMALL = {  # what a matrix of 16 x 32 needs of methods whose defaults are made for larger ones
    "loca": {"n_frequency": 16},
    "lora_sb": {"r": 8},
    "petalface": {"quality": 0.5},
    "randlora": {"r": 8},
    "svfit": {"r": 8},  # by default the singular values decide, which no skeleton has
    "peft:fourierft": {"n_frequency": 16},
    "peft:waveft": {"n_frequency": 16},
    "peft:vera": {"r": 8},
}


@pytest.mark.parametrize("name", [*registry.cards("adapters"), "peft:lora", "peft:dora", "peft:vera", "peft:fourierft"])
def test_the_count_without_weights_is_the_count_with(name, skeleton, llama):
    method = methods.resolve(name, SMALL.get(name, {}))
    before = {key: (value.shape, value.device) for key, value in skeleton.state_dict().items()}
    counted = methods.count_trainable(method, skeleton)
    assert {key: (value.shape, value.device) for key, value in skeleton.state_dict().items()} == before

    model = load_base(str(llama), "causal-lm").model
    import torch

    ids = torch.arange(3, 19)[None]
    from_data = [need for need in methods.needs(method) if need not in ("original_weights", "quality")]
    served = {need: [{"input_ids": ids, "labels": ids}] for need in from_data}
    attached = methods.attach(method, model, **served)
    assert counted == methods.trainable(attached) > 0
    adapted = {
        n.removeprefix("base_model.model.") for n, m in attached.named_modules() if isinstance(m, BaseTunerLayer)
    }
    assert adapted == set(methods.check_fits(method, skeleton))


def test_references(llama):
    import torch

    def trained(name):
        base = load_base(str(llama), "causal-lm").model
        ids = torch.arange(3, 19)[None]
        before = base(input_ids=ids).logits
        model = methods.attach(methods.resolve(name), base)
        assert torch.equal(model(input_ids=ids).logits, before)
        return {key for key, parameter in model.named_parameters() if parameter.requires_grad}, model

    assert trained("base")[0] == set()
    names, model = trained("head")
    assert names == {"lm_head.weight"}  # the input embedding, tied before, stays frozen
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert len(trained("full")[0]) == len(list(model.named_parameters())) - 1


def test_recipes_and_knobs():
    for name, card in registry.cards("adapters").items():
        method = methods.resolve(name)
        assert method.recipe.items() >= card.recipe.items() and method.knob == card.knob
        assert "learning_rate" in method.recipe
    assert methods.resolve("peft:lora").knob == "r"
    assert methods.resolve("peft:fourierft").knob == "n_frequency"
    assert methods.resolve("peft:ia3").knob is None
    assert methods.resolve("base").knob is None


def test_variants_of_pefts_lora():
    assert methods.resolve("peft:dora").config.use_dora
    assert methods.resolve("peft:pissa").config.init_lora_weights == "pissa"
    assert methods.resolve("peft:rslora", {"r": 4}).config.use_rslora
    with pytest.raises(UsageError, match="no option 'use_dora'"):
        methods.resolve("peft:dora", {"use_dora": False})


def test_every_name_has_options():
    for name in methods.names():
        options = methods.method_options(name)
        assert bool(options) == (name not in methods.REFERENCES)
        assert len({option.name for option in options}) == len(options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sorra", {}, "did you mean 'sora'"),
        ("peft:", {}, "unknown PEFT method"),
        ("peft:prefix_tuning", {}, "unknown PEFT method"),
        ("sora", {"rr": 3}, "'rr'"),
        ("base", {"r": 3}, "base has no option 'r'"),
        ("peft:lora", {"lora_dropout": "high"}, "lora_dropout must be float"),
        ("peft:lora", {"bias": "some"}, "bias must be one of: none, all, lora_only"),
        ("peft:lora", {"r": -1}, "r"),
        ("peft:lora", {"layers_pattern": "h", "target_modules": "all-linear"}, "layers_pattern"),
    ],
)
def test_refused_before_anything_is_loaded(name, options, words):
    with pytest.raises(UsageError, match=words):
        methods.resolve(name, options)


def test_a_rank_pattern_counts_too(skeleton):
    with pytest.raises(UsageError, match=r"r=17 is larger than the shorter side 16 of model.layers.0.self_attn.k_proj"):
        methods.check_fits(methods.resolve("peft:lora", {"r": 4, "rank_pattern": {"k_proj": 17}}), skeleton)


def test_what_speaks_of_the_run_follows_it():
    run = {"learning_rate": 0.5, "warmup_ratio": 0.25, "total_steps": 40, "seed": 7}
    followed = methods.following(methods.resolve("lora_sb", {"warmup_ratio": 0.1}), run).config
    assert (followed.learning_rate, followed.warmup_ratio, followed.total_steps) == (0.5, 0.1, 40)
    assert methods.following(methods.resolve("nola"), run).config.seed == 7
    plain = methods.resolve("peft:lora")
    assert methods.following(plain, run) is plain


def test_the_classification_head_is_not_a_target(bert):
    skeleton = load_base(str(bert), "classification", num_labels=2, weights=False).model
    matched = methods.check_fits(methods.resolve("peft:lora"), skeleton)
    assert matched and not [name for name in matched if "classifier" in name]


# --- methods that name their optimiser --------------------------------------------------------------------------------


def test_an_optimiser_is_named_after_an_at_and_its_options_stand_beside_the_methods():
    method = methods.resolve("full@galore", {"rank": "8", "betas": "0.9,0.95"})
    assert method.trains == "full" and method.optimizer == ("galore", {"rank": 8, "betas": (0.9, 0.95)})
    assert [option.name for option in methods.method_options("full@galore")] == list(methods.optimizer_values(method))
    assert methods.optimizer_values(method)["rank"] == 8 and methods.optimizer_values(method)["scale"] == 0.25
    assert methods.resolve("full").optimizer is None


def test_options_that_both_have_go_to_the_one_that_is_named():
    own = {option.name for option in methods.method_options("peft:lora")}
    shared = {option.name for option in methods.optimizer_options("galore")} & own
    assert "target_modules" in shared
    given = {"target_modules": "q_proj", "galore_target_modules": "v_proj", "r": 4, "rank": 2}
    method = methods.resolve("peft:lora@galore", given)
    assert method.optimizer == ("galore", {"target_modules": ["v_proj"], "rank": 2})
    assert method.config.r == 4 and method.config.target_modules == {"q_proj"}


@pytest.mark.parametrize("optimizer", registry.cards("optim"))
def test_a_recipe_for_pretraining_or_for_fine_tuning_is_carried_over_by_adamws_own(optimizer):
    card = registry.card(optimizer)
    adamw = {True: methods.resolve("full", from_scratch=True).recipe, False: methods.resolve("full").recipe}
    assert (adamw[True]["learning_rate"], adamw[False]["learning_rate"]) == (1e-3, 2e-5)
    recipes = {scratch: methods.resolve(f"full@{optimizer}", from_scratch=scratch).recipe for scratch in adamw}
    assert recipes[card.pretraining]["learning_rate"] == card.recipe["learning_rate"]
    ratio = {scratch: recipes[scratch]["learning_rate"] / adamw[scratch]["learning_rate"] for scratch in adamw}
    assert ratio[True] == pytest.approx(ratio[False], rel=0.01)
    assert recipes[not card.pretraining]["lr_scheduler_type"] == adamw[not card.pretraining]["lr_scheduler_type"]


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("full@galor", {}, "did you mean 'galore'"),
        ("full@sora", {}, "unknown method 'sora'"),
        ("full@hf:adafacto", {}, "did you mean 'hf:adafactor'"),
        ("full@galore", {"rnk": 3}, "did you mean 'rank'"),
        ("full@galore", {"update_proj_gap": 0}, "update_proj_gap=0"),
        ("sora@galore", {}, "does not go with method sora"),
        ("head@galore", {}, "does not go with method head"),
    ],
)
def test_optimisers_that_cannot_be_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        methods.resolve(name, options)


def test_an_optimiser_is_tried_on_a_model_without_weights(skeleton):
    small = {"galore": {"rank": 4}, "dct_projection": {"rank": 4}, "owlore": {"rank": 4, "activated_layers": 1}}
    for optimizer in registry.cards("optim").keys() - {"lora_pro"}:  # which needs a LoRA
        options = small.get(optimizer, {})
        methods.check_fits(methods.resolve(f"full@{optimizer}", options), skeleton)
    with pytest.raises(UsageError, match="rank=99"):
        methods.check_fits(methods.resolve("full@galore", {"rank": 99}), skeleton)
