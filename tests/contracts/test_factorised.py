"""The laws of factorised training, over every parametrisation of the registry."""

from __future__ import annotations

import copy
from pathlib import Path

import forked
import pytest
import tiny
import torch
from factorised_specimens import DRAWN, METHODS, PLAIN, gpt2, llama, made, tokens, train
from safetensors.torch import load_file
from torch import nn

import weft
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.steps import controllers


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


def structured(model: nn.Module) -> dict[str, Structured]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Structured)}


def dense(method: str) -> bool:
    """Whether weights stay dense while they are trained, which the card argues for."""
    return "dense" in weft.card(method).reasons


def formed(method: str, model: nn.Module) -> set[str]:
    """The names of what has the method's form, or of the dense layers on which it acts."""
    if not dense(method):
        return set(structured(model))
    assert not structured(model)
    return {layer.name for controller in controllers(model) for layer in controller.parts}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens(99)).logits


@pytest.mark.parametrize("stock", [llama, gpt2])
def test_every_linear_layer_of_the_blocks_and_nothing_else_takes_the_form(method, stock):
    model = made(method, stock())
    names = formed(method, model)
    kinds = {type(m).__name__ for n, m in stock().named_modules() if n in names}
    assert kinds <= {"Linear", "Conv1D"} and not any("lm_head" in name for name in names)
    assert len(names) == (14 if stock is llama else 4)
    assert torch.isfinite(logits(model)).all()


def test_it_learns_and_every_parameter_moves(method):
    model = made(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [train(model, range(1)) for _ in range(30)]  # the same rows again and again
    assert losses[-1] < losses[0] - 1
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_it_is_saved_and_loaded_as_any_model(method, tmp_path):
    from transformers import AutoModelForCausalLM

    model = made(method)
    train(model, range(2))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    if any(controllers(model)):
        return  # in a model that was loaded nothing acts in time
    train(model, range(2, 4))
    train(again, range(2, 4))
    assert torch.equal(logits(again), logits(model))  # what is trained further is the same too


def test_a_linear_form_has_a_dense_one(method):
    model = made(method, llama().double())
    train(model, range(3))
    model.eval()  # where nothing is drawn
    layers = structured(model)
    if dense(method):
        assert not layers and weft.to_dense(model) is model
        return
    if not all(layer.linear for layer in layers.values()):
        with pytest.raises(UsageError, match="no dense form"):
            weft.to_dense(model)
        return
    for layer in layers.values():
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        expected = x @ layer.dense().mT + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)
    whole = logits(model)
    torch.testing.assert_close(logits(weft.to_dense(model)), whole, rtol=1e-9, atol=1e-10)


def test_gradients_of_a_linear_form_are_those_of_its_dense_weight(method):
    """Against autograd through y = x·Wᵀ + b with the W of `dense`, in float64, for x of two and three dimensions."""
    assert (method in PLAIN) == ("gradients" in weft.card(method).reasons)
    if dense(method):
        pytest.skip("its layers are stock ones, and torch has their gradients")
    model = made(method, llama().double(), **PLAIN.get(method, {}))
    train(model, range(2))
    layer = copy.deepcopy(next(iter(structured(model).values()))).eval()  # to a copy no penalty adds its gradient
    if not layer.linear:
        pytest.skip("no linear map")
    for shape in ((7,), (2, 5)):
        x = torch.randn(*shape, layer.in_features, dtype=torch.float64, requires_grad=True)
        weigh = torch.randn(*shape, layer.out_features, dtype=torch.float64)
        inputs = [x, *layer.parameters()]
        ours = torch.autograd.grad((layer(x) * weigh).sum(), inputs)
        theirs = torch.autograd.grad((x @ layer.dense().mT * weigh).sum(), inputs)
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


def test_four_micro_batches_are_one_batch(method):
    whole, parts = (made(method, llama().double()) for _ in range(2))
    train(whole, range(4))
    train(parts, range(4), micro=4)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


def test_two_processes_take_the_step_of_one(method, once):
    def make(folder: Path) -> None:
        worker = Path(__file__).with_name("factorised_ddp_worker.py")
        environment = tiny.environment(GLOO_SOCKET_IFNAME="lo")
        forked.together([[worker, rank, 2, folder] for rank in range(2)], 240, env=environment)

    folder = once("factorised-ddp", make)
    first, second = (load_file(folder / f"{method}.{rank}.safetensors") for rank in range(2))
    model = made(method, llama().double())
    train(model, range(4))
    stored = model.state_dict()
    for name, t in first.items():
        assert torch.equal(t, second[name]), name
        torch.testing.assert_close(t, stored[name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_same_seed_gives_the_same_start_and_another_another(method):
    first, again, other = (made(method, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (method in DRAWN) != all(torch.equal(first[name], other[name]) for name in first)


def test_bfloat16_and_checkpointing_and_copies(method):
    model = made(method, llama().bfloat16())
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    losses = [train(each, range(2)) for each in (model, twin)]
    assert losses[0] == losses[1] and torch.isfinite(torch.tensor(losses)).all()
    assert torch.equal(logits(model), logits(twin))


def test_a_model_without_weights_has_the_same_shapes(method):
    with torch.device("meta"):
        skeleton = llama()
    shapes = {name: t.shape for name, t in made(method, skeleton).state_dict().items()}
    assert shapes == {name: t.shape for name, t in made(method).state_dict().items()}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 99}, "rank=99: a matrix of 12 × 12 has"),
        ({"rnk": 2}, "did you mean 'rank'"),
        ({"target_modules": ["q_prj"]}, "match nothing to factorise: there are down_proj, gate_proj"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_the_model_alone(method, options, said):
    model = llama()
    with pytest.raises(UsageError, match=said):
        made(method, model, **options)
    assert not structured(model) and getattr(model, "hf_quantizer", None) is None


def test_a_form_on_a_form_is_refused(method):
    with pytest.raises(UsageError, match="already"):
        made(method, made(method))
