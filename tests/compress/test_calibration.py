"""Statistics against what hooks and autograd say when everything is kept and summed in float64."""

import pytest
import torch
from models import MODELS, Plain, batches, gpt2, llama, tokens
from torch import nn

from weft.anatomy import blocks
from weft.compress._calibration import Corpus, calibrate, influences
from weft.compress._layers import targets
from weft.errors import UsageError


def collected(model, data, layers):
    """Every row that each layer receives and gives, padding left out."""
    rows = {layer.name: ([], []) for layer in layers}

    def keep(name, mask):
        def hook(module, args, y):
            x = args[0].reshape(-1, args[0].shape[-1])
            y = y.reshape(-1, y.shape[-1])
            chosen = slice(None) if mask is None else mask.reshape(-1).bool()
            rows[name][0].append(x[chosen])
            rows[name][1].append(y[chosen])

        return hook

    for batch in data:
        mask = batch.get("attention_mask")
        handles = [layer.module.register_forward_hook(keep(layer.name, mask)) for layer in layers]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {name: (torch.cat(x).double(), torch.cat(y).double()) for name, (x, y) in rows.items()}


@pytest.mark.parametrize("name", MODELS)
def test_moments_of_inputs_and_outputs(name):
    model = MODELS[name]()
    layers, data = targets(model, None, None), batches(model)
    found = calibrate(model, [Corpus(data)], layers, {layer.name: ("input", "output") for layer in layers})
    for layer, (x, y) in zip(layers, collected(model, data, layers).values()):
        for moments, rows in ((found[layer.name].input, x), (found[layer.name].output, y)):
            assert moments.n == len(rows)
            torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(moments.second_moment, rows.mT @ rows / len(rows), rtol=1e-10, atol=1e-12)


def test_any_split_of_the_batches_agrees():
    model = llama()
    layers = targets(model, None, None)
    needs = {layer.name: ("input",) for layer in layers}
    one, two = (
        calibrate(model, [Corpus(batches(model, size))], layers, needs)["model.layers.1.mlp.down_proj"].input
        for size in (24, 5)
    )
    torch.testing.assert_close(one.covariance, two.covariance, rtol=1e-10, atol=1e-14)


def test_layers_that_receive_one_tensor_share_one_sum():
    model = llama()
    layers = targets(model, None, None)
    found = calibrate(model, [Corpus(batches(model))], layers, {layer.name: ("input",) for layer in layers})
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert found[f"{attention}.q_proj"].input is found[f"{attention}.v_proj"].input
    assert found[f"{mlp}.gate_proj"].input is found[f"{mlp}.up_proj"].input
    assert found[f"{attention}.q_proj"].input is not found[f"{attention}.o_proj"].input


@pytest.mark.parametrize("size", [24, 7])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fisher_is_a_mean_of_squares_whatever_the_batch(name, size):
    model = MODELS[name]()
    layers, ids = targets(model, None, None), tokens(rows=6)
    data = [{"input_ids": part} for part in ids.split(size)]
    found = calibrate(model, [Corpus(data)], layers, {layer.name: ("fisher",) for layer in layers})
    for layer in (layers[0], layers[-1]):
        weight, squares = layer.module.weight, 0.0
        for row in ids:
            loss = model(input_ids=row[None], labels=row[None]).loss
            squares = squares + torch.autograd.grad(loss, weight)[0].square()
        squares = squares.mT if name == "gpt2" else squares
        torch.testing.assert_close(found[layer.name].fisher[0], squares.sum(0), rtol=1e-10, atol=0)
        torch.testing.assert_close(found[layer.name].fisher[1], squares.sum(1), rtol=1e-10, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_corpora_count_by_their_weights_and_not_by_their_lengths():
    model = Plain()
    layers = targets(model, None, None)
    needs = {layer.name: ("input",) for layer in layers}
    short, long = batches(model)[:2], batches(model)[2:]
    mixed = calibrate(model, [Corpus(short, 3.0), Corpus(long, 1.0)], layers, needs)["layers.1"].input
    parts = [collected(model, data, layers)["layers.1"][0] for data in (short, long)]
    expected = 0.75 * parts[0].mT @ parts[0] / len(parts[0]) + 0.25 * parts[1].mT @ parts[1] / len(parts[1])
    torch.testing.assert_close(mixed.second_moment, expected, rtol=1e-10, atol=1e-12)


def test_influence_is_the_angle_that_a_block_turns():
    model, ids = llama(), tokens()
    found = influences(model, [Corpus([{"input_ids": part} for part in ids.split(7)])], blocks(model))
    seen = {}
    handles = [
        block.register_forward_hook(lambda m, args, out, n=name: seen.update({n: (args[0], out)}))
        for name, block in blocks(model).items()
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert list(found) == ["model.layers.0", "model.layers.1"]
    for name, (before, after) in seen.items():
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert found[name] == pytest.approx(float((1 - cosine).mean()), rel=1e-9)


def test_dropout_is_off_while_a_model_is_looked_at():
    found = []
    for training in (False, True):
        model = gpt2().train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        layers, data = targets(model, None, None), [Corpus(batches(model))]
        moments = calibrate(model, data, layers, {layer.name: ("input",) for layer in layers})[layers[-1].name].input
        found.append((moments.mean, influences(model, data, blocks(model))))
        assert model.training == training
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_is_not_finite_names_its_layer():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    layers = targets(model, None, None)
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.o_proj receives numbers that are not finite"):
        calibrate(model, [Corpus(batches(model))], layers, {layer.name: ("input",) for layer in layers})


def test_a_layer_out_of_reach_is_named():
    class Forgetful(Plain):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 4).double()

    model = Forgetful()
    layers = targets(model, None, None)
    with pytest.raises(UsageError, match="never reaches unused"):
        calibrate(model, [Corpus(batches(model))], layers, {layer.name: ("input",) for layer in layers})
