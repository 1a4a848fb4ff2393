"""Maestro against its steps written out in float64, and what is proved of it on linear models."""

from __future__ import annotations

import copy
import itertools
import shutil
from typing import Any

import pytest
import torch
import transformers
from resuming import cut
from torch import Tensor, nn
from torch.nn.functional import conv2d

import weft
from weft.errors import UsageError
from weft.linear.low_rank import LowRank
from weft.linear.low_rank_conv import LowRankConv
from weft.pretrain.maestro import MaestroConfig, draw, importance, recalibrate, shrink, truncate
from weft.run import data, methods
from weft.run.models import load_base
from weft.run.settings import TrainSettings
from weft.run.train import train
from weft.steps import controllers

LR = 0.05


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    made = [nn.Linear(7, 6, dtype=dtype), nn.Linear(6, 5, dtype=dtype)]
    return nn.Sequential(nn.Sequential(made[0], nn.Tanh()), nn.Sequential(made[1]))


def network() -> nn.Sequential:
    """Convolutions of odd geometry, one of two groups, batch norms, a linear layer."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(6, 4, (3, 1), dilation=(2, 1), bias=False), nn.Conv2d(4, 4, 3, groups=2))
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(4 * 4, 5)).double()


def images(seed: int = 0, count: int = 4) -> Tensor:
    return randn(count, 3, 16, 8, seed=seed)


def maestro(model: nn.Module, **options: Any) -> Any:
    return weft.reparametrise(model, "maestro", **options).train()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRank | LowRankConv)}


def controller(model: nn.Module) -> Any:
    (found,) = {c for layer in layers(model).values() for c in layer.controllers.values()}
    return found


def matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """U (out × m) and V (m × in)."""
    return layer.up.weight.detach().flatten(1), layer.down.weight.detach().flatten(1)


def hold(layer: Any, b: int) -> None:
    """The layer's next training forwards have its first b components."""
    layer.up.open.copy_((torch.arange(layer.rank) < b).view_as(layer.up.open))


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x, y = randn(12, 7, seed=step), randn(12, 5, seed=1000 + step)
    (model(x.to(next(model.parameters()).dtype)) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# --- the form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "x"), [(chain, randn(9, 7)), (network, images())])
def test_at_the_start_the_model_is_as_it_was(build: Any, x: Tensor) -> None:
    model = maestro(build())
    torch.testing.assert_close(model.eval()(x), build().eval()(x), rtol=1e-10, atol=1e-12)
    for name, layer in layers(model).items():
        weight = build().get_submodule(name).weight.flatten(1)
        u, v = matrices(layer)
        assert layer.rank == min(weight.shape) == u.shape[1]
        torch.testing.assert_close(u.square().sum(0), v.square().sum(1))  # the roots of S in both
        torch.testing.assert_close(u @ v, weight.detach(), rtol=1e-10, atol=1e-12)


def test_of_width_b_a_layer_is_the_best_of_rank_b() -> None:
    model = maestro(chain())
    for name, layer in layers(model).items():
        weight = chain().get_submodule(name).weight.detach()
        left, s, right = torch.linalg.svd(weight, full_matrices=False)
        x = randn(5, weight.shape[1])
        for b in range(layer.rank + 1):
            hold(layer, b)
            best = (left[:, :b] * s[:b]) @ right[:b]
            torch.testing.assert_close(layer(x), x @ best.T + layer.bias, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(layer.eval()(x), x @ weight.T + layer.bias)  # nothing is drawn in evaluation


def test_of_width_b_a_convolution_is_that_of_its_first_b_components() -> None:
    layer = maestro(network()).get_submodule("1.0")
    u, v = matrices(layer)
    x = randn(2, 6, 9, 5)
    for b in (1, 3):
        hold(layer, b)
        weight = (u[:, :b] @ v[:b]).view(4, 6, 3, 1)
        torch.testing.assert_close(layer(x), conv2d(x, weight, dilation=(2, 1)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("build", "x"), [(chain, randn(9, 7)), (network, images())])
def test_the_loss_has_no_gradient_of_what_is_left_out(build: Any, x: Tensor) -> None:
    model = maestro(build(), gp_lambda=0)
    for layer in layers(model).values():
        hold(layer, 2)
    model(x).square().sum().backward()
    for layer in layers(model).values():
        v, u = layer.down.weight.grad, layer.up.weight.grad
        assert v[:2].all() and u[:, :2].any() and not v[2:].any() and not u[:, 2:].any()


def test_a_weight_of_zero_can_learn() -> None:
    model = chain()
    nn.init.zeros_(model[1][0].weight)
    start = maestro(model)
    (start(randn(9, 7)) - 1).square().sum().backward()
    assert start.get_submodule("1.0").up.weight.grad.any()
    assert torch.equal(start.eval()(randn(9, 7)), model(randn(9, 7)))


# --- which layers -----------------------------------------------------------------------------------------------------


def test_convolutions_are_served_where_a_method_says_so() -> None:
    assert {n: type(m) for n, m in layers(maestro(network())).items()} == {
        "0.0": LowRankConv, "1.0": LowRankConv, "3": LowRank
    }  # fmt: skip
    assert list(layers(maestro(network(), ignore_first=1, ignore_last=True))) == ["1.0"]
    assert layers(maestro(network(), rank=2, target_modules=["0.0"]))["0.0"].rank == 2
    with pytest.raises(UsageError, match=r"maestro: 1.1: a Conv2d with groups=2 has no low_rank_conv form"):
        maestro(network(), target_modules=["1.1"])
    with pytest.raises(UsageError, match="match nothing to factorise"):
        weft.reparametrise(network()[:3], "lowrank", rank=1)  # without the linear layer
    model = nn.Module()
    model.body, model.head = nn.Conv2d(3, 2, 3), nn.Linear(4, 3)
    assert list(layers(maestro(model))) == ["body", "head"]  # a model without blocks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gp_lambda": -1}, "gp_lambda=-1 must be at least 0"),
        ({"importance_threshold": float("nan")}, "importance_threshold=nan must be at least 0"),
        ({"shrink_steps": 0}, "shrink_steps=0 must be at least 1"),
        ({"sampler": "some"}, "sampler='some' must be per_layer or uniform"),
        ({"ignore_first": 1, "ignore_last": True}, "ignore_first=1 and ignore_last=True leave none of 2 layers"),
        ({"rank": 6}, "maestro: 1.0: rank=6: a matrix of 5 × 6 has"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        maestro(chain(), **options)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_each_pass_takes_every_pair_once() -> None:
    config, names, widths = MaestroConfig(seed=3), ["a", "b", "c"], [3, 0, 2]
    passes = []
    for first in (7, 12):
        taken = [draw(config, names, widths, step, since=7) for step in range(first, first + 5)]
        assert sorted(taken) == [[1, 0, 2], [2, 0, 2], [3, 0, 1], [3, 0, 2], [3, 0, 2]]
        passes.append(taken)
    others = [[draw(MaestroConfig(seed=seed), names, widths, 7 + i, since=7) for i in range(5)] for seed in range(3)]
    assert any(taken != passes[0] for taken in others)
    orders = {tuple(map(tuple, (draw(config, names, [4, 4], s) for s in range(8 * n, 8 * n + 8)))) for n in range(4)}
    assert len(orders) == 4
    assert draw(config, names, [0, 0, 0], 5) == [0, 0, 0]


def test_uniform_draws_each_layer_by_itself() -> None:
    config = MaestroConfig(sampler="uniform")
    taken = torch.tensor([draw(config, ["a", "b"], [3, 3], step) for step in range(900)])
    pairs = torch.zeros(3, 3)
    for a, b in (taken - 1).tolist():
        pairs[a, b] += 1
    assert (pairs > 70).all() and pairs.sum() == 900  # 100 of each are expected
    assert draw(config, ["a"], [9], 5) == [draw(config, ["b", "a"], [4, 9], 5)[1]]


# --- the lasso and the steps ------------------------------------------------------------------------------------------


def test_the_penalty_of_a_toy() -> None:
    """Squared norms of 9, 16 and 0 in V, and U zero: suffixes of 5, 4 and 0."""
    model = maestro(nn.Sequential(nn.Sequential(nn.Linear(3, 4))).double(), gp_lambda=1)
    (layer,) = layers(model).values()
    with torch.no_grad():
        layer.up.weight.zero_()
        layer.down.weight.copy_(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
    assert abs(float(controller(model).penalty()) - 9) < 1e-6
    (0 * model(randn(2, 3))).sum().backward()  # what remains is the penalty's
    assert torch.isfinite(layer.down.weight.grad).all() and torch.isfinite(layer.up.weight.grad).all()
    controller(model).config.hierarchical = False
    assert abs(float(controller(model).penalty()) - 7) < 1e-6


def lasso(u: Tensor, v: Tensor, kept: list[int], hierarchical: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The group lasso and its gradients of U and V, entry by entry of its sums."""
    value, of_u, of_v = torch.zeros((), dtype=torch.float64), torch.zeros_like(u), torch.zeros_like(v)
    for b in kept:
        places = [k for k in kept if k >= b] if hierarchical else [b]
        value += v[places].norm() + u[:, places].norm()
        of_v[places] += v[places] / v[places].norm()
        of_u[:, places] += u[:, places] / u[:, places].norm()
    return value, of_u, of_v


@pytest.mark.parametrize("hierarchical", [True, False])
@pytest.mark.parametrize("build", [chain, network])
def test_the_penalty_and_its_gradient_are_those_written_out(build: Any, hierarchical: bool) -> None:
    model = maestro(build(), gp_lambda=0.3, hierarchical=hierarchical)
    value = controller(model).penalty()
    (0 * model(randn(9, 7) if build is chain else images())).sum().backward()  # what remains is the penalty's
    total = 0.0
    for layer in layers(model).values():
        each, of_u, of_v = lasso(*matrices(layer), list(range(layer.rank)), hierarchical)
        total += 0.3 * float(each)
        torch.testing.assert_close(layer.up.weight.grad.flatten(1), 0.3 * of_u, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.down.weight.grad.flatten(1), 0.3 * of_v, rtol=1e-7, atol=1e-9)
    assert abs(float(value) - total) < 1e-9 * total


@pytest.mark.parametrize("hierarchical", [True, False])
def test_importance_is_that_written_out(hierarchical: bool) -> None:
    for layer in layers(maestro(network())).values():
        with torch.no_grad():
            layer.down.weight.copy_(randn(*layer.down.weight.shape, seed=3))
        u, v = matrices(layer)
        ends = [slice(b, None if hierarchical else b + 1) for b in range(layer.rank)]
        expected = torch.stack([v[end].norm() * u[:, end].norm() for end in ends])
        torch.testing.assert_close(importance(layer, hierarchical), expected)
        assert not hierarchical or (expected.diff() <= 0).all()


@pytest.mark.parametrize("hierarchical", [True, False])
def test_steps_with_drops_are_those_written_out(hierarchical: bool) -> None:
    """SGD with momentum and decay, three events that drop something: factors, biases and momenta at every step."""
    rate, momentum, decay, strength = LR, 0.9, 0.01, 0.02
    threshold = 0.45 if hierarchical else 0.2
    options = {"gp_lambda": strength, "shrink_steps": 4, "importance_threshold": threshold, "seed": 2}
    model = maestro(chain(), hierarchical=hierarchical, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    names = list(layers(model))
    if not hierarchical:  # the first components are the least
        for layer in layers(model).values():
            layer.down.weight.data, layer.up.weight.data = layer.down.weight.data.flip(0), layer.up.weight.data.flip(1)
    p = {n: [*matrices(layer), layer.bias.detach().clone()] for n, layer in layers(model).items()}
    p = {n: [t.clone() for t in tensors] for n, tensors in p.items()}
    held = {n: [torch.zeros_like(t) for t in tensors] for n, tensors in p.items()}
    kept = {n: list(range(tensors[0].shape[1])) for n, tensors in p.items()}
    since, counts = 0, []
    for step in range(13):
        widths = draw(MaestroConfig(seed=2), names, [len(kept[n]) for n in names], step, since)
        used = {n: kept[n][:b] for n, b in zip(names, widths)}
        free = [t.requires_grad_() for n in names for t in p[n]]
        x, y = randn(12, 7, seed=step), randn(12, 5, seed=1000 + step)
        for n in names:
            x = x @ (p[n][0][:, used[n]] @ p[n][1][used[n]]).T + p[n][2]
            x = x.tanh() if n == names[0] else x
        gradients = list(torch.autograd.grad((x - y).square().mean(), free))
        for n in names:
            mine, gradients = gradients[:3], gradients[3:]
            p[n] = [t.detach() for t in p[n]]
            _, *extra = lasso(p[n][0], p[n][1], kept[n], hierarchical)
            here = torch.tensor([k in kept[n] for k in range(p[n][0].shape[1])])
            for i, mask in enumerate((here, here[:, None], torch.tensor(True))):
                g = mine[i] + (strength * extra[i] if i < 2 else 0) + decay * p[n][i]
                new = momentum * held[n][i] + g if step else g
                held[n][i] = torch.where(mask, new, held[n][i])
                p[n][i] = torch.where(mask, p[n][i] - rate * held[n][i], torch.zeros_like(g))
            if step % 4 == 3:
                u, v = p[n][:2]
                ends = {b: [k for k in kept[n] if k >= b] if hierarchical else [b] for b in kept[n]}
                left = [b for b in kept[n] if v[ends[b]].norm() * u[:, ends[b]].norm() >= threshold]
                if left != kept[n]:
                    kept[n], since = left, step + 1
                gone = [k for k in range(u.shape[1]) if k not in left]
                u[:, gone] = 0
                v[gone] = 0
        take(model, optimizer, step)
        for n, layer in layers(model).items():
            found = [layer.up.weight, layer.down.weight, layer.bias]
            state = [optimizer.state[t]["momentum_buffer"] for t in found]
            for one, other in zip(found + state, p[n] + held[n], strict=True):
                torch.testing.assert_close(one.detach(), other, rtol=1e-8, atol=1e-9)
            assert layer.up.kept.nonzero().flatten().tolist() == kept[n]
        counts.append(sum(map(len, kept.values())))
    assert counts[-1] > 0 and len(set(counts)) >= 3
    if not hierarchical:
        assert any(ks != list(range(len(ks))) for ks in kept.values())  # no prefix


def dropping(dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return maestro(chain(dtype), **{"gp_lambda": 0.01, "shrink_steps": 3, "importance_threshold": 0.35, **more})


def test_what_is_dropped_stays_and_nothing_changes_its_form() -> None:
    model = dropping(torch.float64)
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    for step in range(10):
        take(model, optimizer, step)
        if step == 2:
            gone = {layer: ~layer.up.kept for layer in layers(model).values()}
            moments = {p: copy.deepcopy(optimizer.state[p]) for layer in gone for p in layer.parameters()}
    assert any(mask.any() for mask in gone.values())
    for layer, mask in gone.items():
        for p, places in ((layer.down.weight, mask[:, None]), (layer.up.weight, mask)):
            assert not p.detach().masked_select(places).any()
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(*(s[key].masked_select(places) for s in (optimizer.state[p], moments[p])))
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("sampler", ["per_layer", "uniform"])
@pytest.mark.parametrize("at", [1, 3, 5, 6, 8])
def test_resumed_is_uninterrupted(at: int, sampler: str) -> None:
    def build() -> tuple[Any, torch.optim.Optimizer]:
        model = dropping(sampler=sampler)
        args = transformers.TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, learning_rate=LR)
        return model, weft.optimizer_and_scheduler(model, args)[0]

    (model, _), (again, _) = cut(build, take, 11, at)
    mine, its = controller(model), controller(again)
    assert mine.widths == its.widths != [6, 5] and (mine.since, mine.step) == (its.since, its.step)


def test_a_step_outside_of_torch_leaves_what_was_dropped_at_zero() -> None:
    model = dropping(torch.float64)
    moved = {p: torch.zeros_like(p) for p in model.parameters()}
    for step in range(8):
        (model(randn(12, 7, seed=step)) - randn(12, 5, seed=1000 + step)).square().mean().backward()
        with torch.no_grad():
            for p, m in moved.items():
                p -= LR * m.mul_(0.9).add_(p.grad)
        weft.step(model)
        model.zero_grad()
    lost = [layer for layer in layers(model).values() if not layer.up.kept.all()]
    assert lost
    for layer in lost:
        assert not matrices(layer)[0][:, ~layer.up.kept].any() and not matrices(layer)[1][~layer.up.kept].any()


# --- afterwards -------------------------------------------------------------------------------------------------------


def cut_by_hand(model: nn.Module, widths: dict[str, int]) -> nn.Module:
    with torch.no_grad():
        for name, layer in layers(model).items():
            layer.up.weight[:, widths[name] :] = 0
            layer.down.weight[widths[name] :] = 0
    return model.eval()


def test_shrinking_leaves_the_outputs_and_has_the_smaller_form() -> None:
    model = cut_by_hand(maestro(network()), {"0.0": 4, "1.0": 2, "3": 5})
    x, wanted = images(), model(images())
    assert shrink(model) is model
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-12)
    assert {n: (type(m), m.rank) for n, m in layers(model).items()} == {
        "0.0": (LowRankConv, 4),  # 4·(6 + 27) < 6·27
        "1.0": (LowRankConv, 2),
    }
    assert type(model[3]) is nn.Linear  # 5·(5 + 16) ≥ 5·16
    assert not any(hasattr(layer, "controllers") for layer in layers(model).values())
    folded = shrink(maestro(network())).eval()
    assert not layers(folded) and type(folded[0][0]) is nn.Conv2d and folded[0][0].stride == (2, 2)
    torch.testing.assert_close(folded(x), network().eval()(x), rtol=1e-10, atol=1e-12)


def test_components_below_the_threshold_are_not_missed() -> None:
    """‖U[:, b:]·V[b:]·x‖ ≤ ‖U[:, b:]‖·‖V[b:]‖·‖x‖, and of the first that is dropped this is below the threshold."""
    model = maestro(chain(), importance_threshold=0.3).eval()
    for layer in layers(model).values():
        x = randn(20, layer.in_features)
        before = layer(x)
        with torch.no_grad():
            controller(model).drop()
            controller(model).after_step()
        lost = ~layer.up.kept
        assert lost.any()
        assert ((layer(x) - before).norm(dim=1) <= 0.3 * x.norm(dim=1)).all()


def test_of_width_zero_the_bias_is_left() -> None:
    narrow = randn(2, 6, 9, 5)
    for build, name, x in ((chain, "1.0", randn(4, 6)), (network, "0.0", images()), (network, "1.0", narrow)):
        model = shrink(maestro(build()), {name: 0})
        layer = model.get_submodule(name)
        bias = build().get_submodule(name).bias
        y = layer(x)
        expected = torch.zeros_like(y) if bias is None else bias.detach().view(-1, *[1] * (y.dim() - 2)).expand_as(y)
        assert torch.equal(y, expected) and sum(p.numel() for p in layer.down.parameters()) <= x[0].numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_a_shrunk_transformer_is_saved_and_loaded(family: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    if family == "resnet":
        config: Any = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
        )
        model: Any = transformers.ResNetForImageClassification(config)
        given = {"pixel_values": randn(2, 3, 16, 16).float()}
    else:
        sizes = {"n_embd": 12, "n_layer": 1, "n_head": 2}
        if family == "llama":
            sizes = {"hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.AutoConfig.for_model(family, vocab_size=31, bos_token_id=1, eos_token_id=2, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        given = {"input_ids": torch.arange(14).view(2, 7)}
    kind = type(model)
    maestro(model)
    names = list(layers(model))
    cut_by_hand(model, {n: 1 + i % 2 * layer.rank for i, (n, layer) in enumerate(layers(model).items())})

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            return of.eval()(**given).logits

    def saved(of: Any, name: str) -> Any:
        """The model, written and read: the same to the bit, in its weights and in its logits."""
        of.save_pretrained(tmp_path / name)
        found = kind.from_pretrained(tmp_path / name)
        weights = found.state_dict()
        assert list(weights) == list(of.state_dict())
        assert all(torch.equal(t, weights[name]) for name, t in of.state_dict().items())
        # those of a file may begin anywhere, which on some processors moves the last bits of a product
        assert torch.equal(logits(copy.deepcopy(found)), logits(copy.deepcopy(of)))
        return found

    wanted = logits(model)
    loaded = saved(model, "whole")  # what was not shrunk yet can be after loading
    for each in (model, loaded):
        shrink(each)
        assert list(layers(each)) == names[::2] and all(layer.rank == 1 for layer in layers(each).values())
        torch.testing.assert_close(logits(each), wanted, rtol=1e-4, atol=1e-5)
    saved(model, "shrunk")
    dense = shrink(maestro(kind(copy.deepcopy(kind.config_class(**config.to_dict())))))
    assert not layers(dense) and getattr(dense.config, "quantization_config", None) is None
    saved(dense, "dense")


def test_truncation_takes_the_cut_that_costs_least_each_time() -> None:
    x, y = images(count=8), randn(8, 5, seed=9)
    model = maestro(network())
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def evaluate(of: nn.Module) -> float:
        assert not of.training
        return float((of(x) - y).square().mean())

    cuts = truncate(model, 0.3, evaluate, step=0.1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and model.training
    sizes = {"0.0": (6, 27, 8 * 8 * 4), "1.0": (4, 18, 8 * 4 * 4), "3": (5, 16, 8)}  # out, in, positions
    dense = sum(o * i * n for o, i, n in sizes.values())

    def macs(widths: dict[str, int]) -> float:
        return sum(n * min(o * i, (o + i) * widths[name]) for name, (o, i, n) in sizes.items()) / dense

    assert cuts[0].widths == {"0.0": 6, "1.0": 4, "3": 5} and cuts[0].macs == 1
    for one, two in itertools.pairwise(cuts):
        saved, candidates = min(0.1, one.macs - 0.3), []
        for name in sizes:
            least = 0 if name == "3" else 1
            fitting = [w for w in range(one.widths[name]) if macs({**one.widths, name: w}) <= one.macs - saved + 1e-12]
            if one.widths[name] > least:
                widths = {**one.widths, name: max(least, max(fitting, default=least))}
                candidates.append((evaluate(cut_by_hand(copy.deepcopy(model), widths)), widths))
        loss, widths = min(candidates, key=lambda c: c[0])
        assert two.widths == widths and abs(two.loss - loss) < 1e-12 and abs(two.macs - macs(widths)) < 1e-12
        assert all(two.widths[n] <= one.widths[n] for n in sizes)  # nested
    assert cuts[-1].macs <= 0.3 < cuts[-2].macs
    small = shrink(model, cuts[-1].widths).eval()
    assert abs(evaluate(small) - cuts[-1].loss) < 1e-12
    with pytest.raises(UsageError, match=r"budget=0 cannot be met: the least is 0\.\d+"):
        truncate(maestro(network()), 0, evaluate, step=0.5)


def test_lazy_truncation_tries_fewer_cuts_and_takes_the_same() -> None:
    """Where each layer's loss is its own and grows faster the narrower it is, as a convex function does."""
    x, price = images(count=2), {"0.0": 3.0, "1.0": 1.0, "3": 0.2}
    found, counts = [], []
    for lazy in (False, True):
        model, looks = maestro(network()), []

        def evaluate(of: nn.Module, looks: list[float] = looks) -> float:
            of(x)
            widths = {name: of.get_submodule(name).up.weight.shape[1] for name in price}
            looks.append(sum(weight / (1 + widths[name]) for name, weight in price.items()))
            return looks[-1]

        found.append(truncate(model, 0.3, evaluate, step=0.01, lazy=lazy))
        counts.append(len(looks))
    assert found[0] == found[1]
    assert counts[1] < counts[0]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="no low-rank layers"):
        shrink(chain())
    model = maestro(chain())
    with pytest.raises(UsageError, match=r"widths: 1.0 cannot have width 6: 0 to 5"):
        shrink(model, {"0.0": 1, "1.0": 6})
    with pytest.raises(UsageError, match="widths: 2 cannot have width 1: no such"):
        shrink(model, {"2": 1})
    with pytest.raises(UsageError, match=r"budget=2 and step=0.05 must be shares"):
        truncate(model, 2, lambda of: 0.0)
    with pytest.raises(UsageError, match="runs none"):
        truncate(model, 0.5, lambda of: 0.0)
    with pytest.raises(weft.WeftError, match="the whole model is not finite"):
        truncate(model, 0.5, lambda of: float(of(randn(2, 7)).sum()) * float("nan"))
    assert [layer.rank for layer in layers(model).values()] == [6, 5]


def test_batch_norms_are_computed_anew_of_whole_layers() -> None:
    model = maestro(network())
    for layer in layers(model).values():
        hold(layer, 1)
    model[0][1].running_mean.fill_(7)
    model[0][1].num_batches_tracked.fill_(9)
    batches = [images(seed, count=5) for seed in range(3)]
    with torch.no_grad():
        inside = [network()[0][0](x).transpose(0, 1).flatten(1) for x in batches]
    assert recalibrate(model, (batch if i else (batch,) for i, batch in enumerate(batches))) is model
    norm = model[0][1]
    torch.testing.assert_close(norm.running_mean, torch.stack([t.mean(1) for t in inside]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([t.var(1) for t in inside]).mean(0))
    assert norm.momentum == 0.1 and norm.training and model.training
    with pytest.raises(UsageError, match="batches is empty"):
        recalibrate(model, [])
    with pytest.raises(UsageError, match="no batch norms"):
        recalibrate(maestro(chain()), batches)


def run(llama: Any, corpus: Any, output: Any, resume: bool = False, **options: Any) -> Any:
    base = load_base(str(llama), "causal-lm")
    splits = data.load_splits(str(corpus), "causal-lm", base.tokenizer, max_length=32)
    options = {"gp_lambda": 1e-3, "importance_threshold": 0.3, "shrink_steps": 3, **options}
    chosen = methods.resolve("maestro", options)
    settings = TrainSettings(max_steps=8, batch_size=4, learning_rate=0.01, eval_steps=0, logging_steps=4, save_steps=4)
    return train(base, splits, chosen, settings, output, resume=resume, progress=False)


def test_a_killed_run_goes_on_where_it_was(llama: Any, corpus: Any, tmp_path: Any) -> None:
    whole = run(llama, corpus, tmp_path / "whole", shrink=False)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    again = run(llama, corpus, tmp_path / "killed", resume=True, shrink=False)
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.model.state_dict().items())
    widths = controller(again.model).widths
    assert widths == controller(whole.model).widths and sum(widths) < sum(m.rank for m in layers(again.model).values())
    assert whole.curve[0]["loss"] < 20  # without the penalty
    small = run(llama, corpus, None)
    sizes = {n: (m.out_features, m.in_features) for n, m in layers(whole.model).items()}
    pays = {n: w for (n, (out, in_)), w in zip(sizes.items(), widths) if w * (out + in_) < out * in_}
    assert small.ranks == pays != {} and not any(controllers(small.model))
    assert small.file_bytes < whole.file_bytes
    assert abs(small.validation["loss"] - whole.validation["loss"]) < 1e-5


# --- what is proved ---------------------------------------------------------------------------------------------------


def learned(target: Tensor, x: Tensor, steps: int, **options: Any) -> Any:
    """One linear layer from random weights, trained to map the columns of x as the target does."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Sequential(nn.Linear(target.shape[1], len(target), bias=False))).double()
    maestro(model, **{"gp_lambda": 0, "importance_threshold": 0, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.07, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x.T) - (target @ x).T).square().sum() / 2).backward()
        optimizer.step()
        schedule.step()
    (layer,) = layers(model).values()
    return layer


@pytest.mark.parametrize("sampler", ["per_layer", "uniform"])
def test_a_map_of_rank_5_in_20_dimensions_is_found_in_order(sampler: str) -> None:
    """Whitened inputs: the first b components are the SVD's, five entries of importance dominate, and five are kept."""
    left, right = (torch.linalg.qr(randn(20, 20, seed=s)).Q[:, :5] for s in (1, 2))
    s = torch.tensor([2.5, 2.0, 1.5, 1.0, 0.6], dtype=torch.float64)
    noise = 3e-4 * randn(20, 20, seed=4)
    options = {"gp_lambda": 4e-4, "importance_threshold": 0.02, "shrink_steps": 200, "sampler": sampler}
    layer = learned((left * s) @ right.T + noise, torch.eye(20, dtype=torch.float64), 1600, **options)
    u, v = matrices(layer)
    for b in range(1, 6):
        best = (left[:, :b] * s[:b]) @ right[:, :b].T
        assert (u[:, :b] @ v[:b] - best).norm() < 0.02, b
    assert int(layer.up.kept.sum()) == 5 and importance(layer)[4] > 0.5 and not importance(layer)[5:].any()


@pytest.mark.parametrize("sampler", ["per_layer", "uniform"])
def test_a_linear_autoencoder_is_pca_in_order(sampler: str) -> None:
    axes = torch.linalg.qr(randn(6, 6, seed=3)).Q
    x = axes * torch.linspace(1.6, 0.6, 6, dtype=torch.float64)
    layer = learned(torch.eye(6, dtype=torch.float64), x, 2000, sampler=sampler)
    u, v = matrices(layer)
    for b in range(1, 7):
        projection = axes[:, :b] @ axes[:, :b].T
        assert (u[:, :b] @ v[:b] - projection).norm() < 0.02, b
