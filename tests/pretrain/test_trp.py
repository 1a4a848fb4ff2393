"""TRP against its steps and its cuts written out in float64."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from typing import Any

import pytest
import torch
import transformers
from resuming import cut as cut_run
from torch import Tensor, nn
from torch.nn.functional import conv2d
from transformers.pytorch_utils import Conv1D

import weft
from weft.errors import UsageError, WeftError
from weft.linear._structured import Structured
from weft.linear.decoupled_conv import DecoupledConv
from weft.linear.low_rank import LowRank
from weft.linear.low_rank_conv import LowRankConv
from weft.linear.vertical_horizontal_conv import VerticalHorizontalConv
from weft.pretrain.trp import TrpConfig, decompose, rank_for
from weft.run import data, methods
from weft.run.models import load_base
from weft.run.settings import TrainSettings
from weft.run.train import train
from weft.steps import controllers

FORMS = {"nc": LowRankConv, "vh": VerticalHorizontalConv, "nd": DecoupledConv}
LR = 0.05


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Sequential:
    """Convolutions of odd geometry, one of 1 × 1, one strided, one of two groups; a linear layer and a Conv1D."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(6, 8, 3, padding=(1, 0)), nn.Tanh(), nn.Conv2d(8, 8, 1))
    third = nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False), nn.Conv2d(6, 6, 3, groups=2))
    return nn.Sequential(first, second, third, nn.Flatten(), nn.Linear(6 * 3 * 2, 7), Conv1D(5, 7)).double()


def images(seed: int = 0, count: int = 6) -> Tensor:
    return randn(count, 3, 9, 9, seed=seed)


def trp(model: nn.Module, **options: Any) -> Any:
    return weft.reparametrise(model, "trp", **options).train()


def controller(model: nn.Module) -> Any:
    (found,) = controllers(model)
    return found


def parts(model: nn.Module) -> list[str]:
    return [layer.name for layer in controller(model).parts]


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(images(step).to(dtype)) - randn(6, 5, seed=1000 + step).to(dtype)).square().mean()


# --- written out ------------------------------------------------------------------------------------------------------


def seen(weight: Tensor, form: str) -> list[Tensor]:
    """The matrices of a weight, entry by entry where it is a convolution's."""
    if weight.dim() == 2:
        return [weight]
    out, in_, kh, kw = weight.shape
    if form == "vh":
        places = itertools.product(range(in_), range(kh))
        return [torch.stack([torch.cat([weight[o, c, y] for o in range(out)]) for c, y in places])]
    if form == "nc":
        return [torch.stack([torch.cat([weight[o, c].flatten() for c in range(in_)]) for o in range(out)])]
    return [torch.stack([weight[o, c].flatten() for c in range(in_)]) for o in range(out)]


def back(found: list[Tensor], weight: Tensor, form: str) -> Tensor:
    """The weight whose matrices these are: the one place of `weight` whose number stands at each of theirs."""
    numbers = seen(torch.arange(weight.numel(), dtype=torch.float64).view(weight.shape), form)
    flat = torch.empty(weight.numel(), dtype=torch.float64)
    for matrix, places in zip(found, numbers, strict=True):
        flat[places.flatten().long()] = matrix.flatten()
    return flat.view(weight.shape)


def needed(s: Tensor, energy: float) -> int:
    """The least number of values that hold the energy."""
    return next(k for k in range(1, len(s) + 1) if s[:k].square().sum() >= energy * s.square().sum())


def pruned(weight: Tensor, form: str, energy: float, whole: bool = False) -> tuple[Tensor, Tensor, int]:
    """The weight after a cut, its sub-gradient (of all vectors, where `whole`), and k."""
    triplets = [torch.linalg.svd(m, full_matrices=False) for m in seen(weight, form)]
    k = max(needed(s, energy) for _, s, _ in triplets)
    best = [(u[:, :k] * s[:k]) @ vh[:k] for u, s, vh in triplets]
    z = [u @ vh if whole else u[:, :k] @ vh[:k] for u, _, vh in triplets]
    return back(best, weight, form), back(z, weight, form), k


def stored(layer: Any) -> Tensor:
    """A layer's weight, out × in …"""
    weight = layer.weight.detach()
    return (weight.mT if isinstance(layer, Conv1D) else weight).clone()


# --- how many are kept ------------------------------------------------------------------------------------------------


def test_the_rules_on_3_2_1() -> None:
    s = torch.tensor([[3.0, 2.0, 1.0]])
    assert [rank_for(s, energy=e) for e in (0.6, 0.9, 0.93, 1.0)] == [1, 2, 3, 3]
    assert [rank_for(s, threshold=t) for t in (0.5, 1.0, 1.5, 9.0)] == [3, 3, 2, 1]
    assert rank_for(s, energy=0.93, cap=2) == 2
    both = torch.tensor([[3.0, 2.0, 1.0], [5.0, 0.1, 0.1]])
    assert (rank_for(both[1:], energy=0.9), rank_for(both, energy=0.9), rank_for(both, threshold=0.5)) == (1, 2, 3)


# --- which layers -----------------------------------------------------------------------------------------------------


def test_convolutions_larger_than_1_but_the_first_and_linear_layers_take_part() -> None:
    assert parts(trp(network())) == ["1.0", "2.0", "4", "5"]
    assert parts(trp(network(), target_modules=["0.0", "1.2", "4"])) == ["0.0", "1.2", "4"]  # who is named is served
    assert not layers(trp(network()))
    with pytest.raises(UsageError, match=r"trp: 2.1: a Conv2d with groups=2 has no decoupled_conv form"):
        trp(network(), target_modules=["2.1"], form="nd")
    with pytest.raises(UsageError, match=r"trp: 1.0: rank=9: a matrix of 8 × 54 has 1 to 8"):
        trp(network(), rank=9)
    with pytest.raises(UsageError, match=r"trp: 1.0: rank=7: a matrix of 6 × 9 has 1 to 6"):
        trp(network(), rank=7, form="nd")
    model = trp(network())
    for method in ("trp", "maestro"):
        with pytest.raises(UsageError, match=f"{method}: 1.0: it is trained as trp already"):
            weft.reparametrise(model, method, target_modules=["1.0"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "hv"}, "form='hv' must be nc, vh or nd"),
        ({"period": 0}, "period=0 must be at least 1"),
        ({"energy": 0}, "energy=0 must be a share above 0"),
        ({"final_energy": 2}, "final_energy=2 must be a share"),
        ({"nuclear_lambda": float("nan")}, "nuclear_lambda=nan must be at least 0"),
        ({"threshold": 0.1, "final_energy": 0.9}, "say both what is left"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trp(network(), **options)


# --- a cut ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9])
def test_a_cut_is_the_nearest_of_the_rank_that_holds_the_energy(form: str, energy: float) -> None:
    model = trp(network(), form=form, energy=energy)
    model(images())
    for name in parts(model):
        before, after = stored(network().get_submodule(name)), stored(model.get_submodule(name))
        expected, _, k = pruned(before, form, energy)
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-11)
        spectra = [torch.linalg.svdvals(m) for m in seen(before, form)]
        left_out = math.sqrt(sum(float(s[k:].square().sum()) for s in spectra))
        assert abs(float((before - after).norm()) - left_out) < 1e-10
        assert (before - after).square().sum() <= (1 - energy) * before.square().sum() + 1e-12
        assert max(int(torch.linalg.matrix_rank(m)) for m in seen(after, form)) == k
    # at that rank, another cut changes nothing
    again = trp(copy_of(model), form=form, energy=1.0, rank=1)
    again(images())
    once = {name: stored(again.get_submodule(name)) for name in parts(again)}
    twice = trp(copy_of(again), form=form, energy=1.0, rank=1)
    twice(images())
    for name, weight in once.items():
        torch.testing.assert_close(stored(twice.get_submodule(name)), weight, rtol=1e-12, atol=1e-13)


def test_without_training_cuts_add_up_to_fewer_than_the_energy_lets_alone() -> None:
    model = trp(network(), period=1, energy=0.8, nuclear_lambda=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    for step in range(12):
        take(model, optimizer, step)
    for name in parts(model):
        shares = torch.linalg.svdvals(stored(model.get_submodule(name)).flatten(1)).square()
        shares = shares[shares > 1e-20] / shares.sum()
        assert shares[-1] > 0.2 and len(shares) < 5


def copy_of(model: nn.Module) -> nn.Module:
    """The network with these weights, on which nothing acts."""
    other = network()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [False, True])
def test_the_sub_gradient_has_norm_1_and_gives_the_sum_of_what_is_kept(form: str, whole: bool) -> None:
    model = trp(network(), form=form, nuclear_lambda=1.0, full_gradient=whole)
    (0 * model(images())).sum().backward()  # what remains is the penalty's
    total = 0.0
    for name in parts(model):
        layer = model.get_submodule(name)
        weight, z = stored(layer), layer.weight.grad.mT if isinstance(layer, Conv1D) else layer.weight.grad
        _, expected, k = pruned(stored(network().get_submodule(name)), form, 0.9, whole)
        torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-10)
        kept = sum(float(torch.linalg.svdvals(m)[:k].sum()) for m in seen(weight, form))
        assert abs(float((z * weight).sum()) - kept) < 1e-9
        for matrix in seen(z, form):
            values = torch.linalg.svdvals(matrix)
            assert abs(float(values[0]) - 1) < 1e-10 and (whole or int((values > 0.5).sum()) == k)
        total += kept
        assert layer.bias is None or not layer.bias.grad.any()
    assert abs(float(controller(model).last_penalty) - total) < 1e-9


def test_what_has_no_singular_value_is_not_pulled() -> None:
    model = network()
    nn.init.zeros_(model[4].weight)
    trp(model, nuclear_lambda=1.0)
    (0 * model(images())).sum().backward()
    assert not model[4].weight.grad.any() and not model[4].weight.any()


def test_under_bfloat16_the_cut_is_of_float32() -> None:
    model = trp(network().bfloat16(), energy=0.8)
    model(images().bfloat16())
    for name in parts(model):
        before = stored(network().bfloat16().get_submodule(name))
        expected = pruned(before.double(), "nc", 0.8)[0]
        assert torch.equal(stored(model.get_submodule(name)), expected.bfloat16())


# --- when -------------------------------------------------------------------------------------------------------------


def test_it_is_cut_in_the_first_training_forward_of_its_step_and_not_otherwise() -> None:
    model = trp(network(), period=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    states = [copy.deepcopy(model.state_dict())]

    def moved() -> bool:
        states.append(copy.deepcopy(model.state_dict()))
        return any(not torch.equal(states[-1][name], t) for name, t in states[-2].items())

    for step in range(4):
        model.eval()(images())
        assert not moved()  # an evaluation sees what the optimiser left
        model.train()(images(step)).square().mean().backward()
        assert moved() == (step % 2 == 0)
        model(images(step)).square().mean().backward()
        assert not moved()  # another micro-batch of the step
        optimizer.step()
        assert moved()
        optimizer.zero_grad()


def test_weights_that_are_loaded_or_rest_or_are_not_numbers() -> None:
    model = trp(network(), energy=0.5)
    model(images())
    model.load_state_dict(network().state_dict())  # not cut yet
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model(images())
    for name in parts(model):
        before = stored(network().get_submodule(name))
        assert torch.equal(stored(model.get_submodule(name)), before) == (name in ("1.0", "4"))
    nn.init.constant_(model[5].weight, float("nan"))
    weft.step(model)
    controller(model).step = 20
    with pytest.raises(WeftError, match="trp: 5 has weights that are not finite"):
        model(images())


@pytest.mark.parametrize("options", [{}, {"full_gradient": True}, {"truncation": False}])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_written_out(form: str, options: dict[str, Any]) -> None:
    """SGD with momentum and decay, over three cuts: every parameter at every step, in two micro-batches, clipped."""
    strength, energy, momentum, decay, most = 0.01, 0.8, 0.9, 0.01, 0.5
    model = trp(network(), form=form, energy=energy, period=3, nuclear_lambda=strength, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=decay)
    plain, held, clipped = network().train(), {}, []
    for step in range(8):
        z = {}
        for name in parts(model) if step % 3 == 0 else ():
            layer = plain.get_submodule(name)
            best, found, _ = pruned(stored(layer), form, energy, options.get("full_gradient", False))
            if options.get("truncation", True):
                layer.weight.data.copy_(best.mT if isinstance(layer, Conv1D) else best)
            z[f"{name}.weight"] = found.mT if isinstance(layer, Conv1D) else found
        plain.zero_grad()
        loss_of(plain, step).backward()
        gradients = {n: p.grad + strength * z.get(n, 0 * p.grad) for n, p in plain.named_parameters()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        clipped.append(bool(norm > most))
        for name, p in plain.named_parameters():
            g = gradients[name] * min(1.0, most / (float(norm) + 1e-6)) + decay * p.detach()
            held[name] = momentum * held[name] + g if step else g
            p.data -= LR * held[name]
        optimizer.zero_grad()
        x, y = images(step), randn(6, 5, seed=1000 + step)
        for rows in (slice(0, 3), slice(3, 6)):
            ((model(x[rows]) - y[rows]).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
        for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=f"step {step}: {name}")
    assert any(clipped) or form != "nc"


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"energy": 1 - 1e-9}, {"truncation": False}])
def test_without_cuts_and_nuclear_norm_it_is_ordinary_training_bit_for_bit(options: dict[str, Any]) -> None:
    runs = [trp(network().float(), nuclear_lambda=0, period=1, **options), network().float().train()]
    for model in runs:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(4):
            take(model, optimizer, step)
    assert all(torch.equal(p, q) for p, q in zip(runs[0].parameters(), runs[1].parameters(), strict=True))


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resumed_is_uninterrupted(at: int) -> None:
    def build() -> tuple[Any, torch.optim.Optimizer]:
        model = trp(network().float(), period=2, form="vh", nuclear_lambda=0.01)
        args = transformers.TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, learning_rate=LR)
        return model, weft.optimizer_and_scheduler(model, args)[0]

    (model, _), (again, _) = cut_run(build, take, 7, at)
    assert controller(model).step == controller(again).step == 7


def test_a_compiled_model_is_cut_too() -> None:
    eager, compiled = trp(network(), period=2, energy=0.5), trp(network(), period=2, energy=0.5)
    runs = [(eager, eager), (compiled, torch.compile(compiled, backend="eager"))]
    for model, called in runs:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for step in range(3):
            take(called, optimizer, step)
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert torch.linalg.matrix_rank(network()[1][0].weight.flatten(1)) > 5


# --- afterwards -------------------------------------------------------------------------------------------------------


def low(rank: int, form: str, tail: float = 0.01) -> nn.Module:
    """The network with weights that come near to a rank: their other singular values are `tail`."""
    model = network().eval()
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear | Conv1D) or getattr(layer, "groups", 1) > 1:
            continue
        weight = stored(layer)
        found = []
        for matrix in seen(weight, form):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            found.append((u * torch.where(torch.arange(len(s)) < rank, 1 + s, tail)) @ vh)
        changed = back(found, weight, form)
        layer.weight.data.copy_(changed.mT if isinstance(layer, Conv1D) else changed)
    return model


def reference(model: nn.Module, form: str, names: list[str], rank: int) -> nn.Module:
    """The same model, dense, with the weights of those layers cut to a rank."""
    model = copy.deepcopy(model)
    for name in names:
        layer = model.get_submodule(name)
        weight = stored(layer)
        triplets = [torch.linalg.svd(m, full_matrices=False) for m in seen(weight, form)]
        best = back([(u[:, :rank] * s[:rank]) @ vh[:rank] for u, s, vh in triplets], weight, form)
        layer.weight.data.copy_(best.mT if isinstance(layer, Conv1D) else best)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", [{"threshold": 0.05}, {"final_energy": 0.95}, {}])
def test_the_decomposed_model_is_the_one_with_cut_weights(form: str, rule: dict[str, Any]) -> None:
    rank, names = (1, ["1.0", "2.0", "4", "5"]) if form == "nd" else (2, ["1.0", "4", "5"])  # 2.0 is strided
    model = low(rank, form)
    expected = reference(model, form, names, rank)
    small = copy.deepcopy(model)
    assert decompose(small, form, **rule) is small
    assert {name: m.rank for name, m in layers(small).items()} == dict.fromkeys(names, rank)
    assert {type(m) for m in layers(small).values()} == {FORMS[form], LowRank}
    torch.testing.assert_close(small(images()), expected(images()), rtol=1e-9, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Structured)}


def test_by_itself_a_value_of_0_05_is_kept_but_with_nd_what_holds_085_of_the_energy() -> None:
    assert [list(layers(decompose(low(1, form, tail=0.051), form))) for form in FORMS] == [[], [], ["1.0", "2.0"]]
    model = low(2, "nd")  # one value is less than 0.85 of any
    assert decompose(model, "nd", target_modules=["1.0"])[1][0].rank == 2


def test_numbers_and_kernels_are_those_of_the_paper() -> None:
    for form, count in (("nc", 2 * (6 * 9 + 8)), ("vh", 2 * (6 * 3 + 8 * 3)), ("nd", 2 * 8 * (6 + 9))):
        model = low(2, form)
        layer = decompose(copy.deepcopy(model), form, threshold=0.05, target_modules=["1.0"])[1][0]
        assert layer.down.weight.numel() + layer.up.weight.numel() == count < 6 * 8 * 9
        w = reference(model, form, ["1.0"], 2)[1][0].weight
        x = randn(2, 6, 5, 7)
        torch.testing.assert_close(layer(x), conv2d(x, w, model[1][0].bias, padding=(1, 0)), rtol=1e-9, atol=1e-10)
    assert layer.bias is not None and torch.equal(layer.bias, model[1][0].bias)


def test_no_layer_grows() -> None:
    """Just below and at the break-even rank of each form; with a stride decoupling runs at every place of its input."""
    sizes = {"nc": (8 * 54, 54 + 8), "vh": (8 * 54, 6 * 3 + 8 * 3), "nd": (8 * 54, 8 * (6 + 9))}
    for form, (dense, each) in sizes.items():
        for k in (dense // each, dense // each + 1):
            model = decompose(network(), form, threshold=0.0, rank=k, target_modules=["1.0"])
            assert ("1.0" in layers(model)) == (k * each < dense)
    for k, pays in ((1, True), (2, False)):  # 6·8·9 dense; k·6·(4·8 + 9)
        assert ("2.0" in layers(decompose(network(), "nd", threshold=0.0, rank=k))) == pays
    whole = decompose(network(), threshold=0.0)
    assert not layers(whole) and torch.equal(whole(images()), network()(images()))


def test_after_training_nothing_acts_on_it_any_more() -> None:
    model = trp(network(), period=1, nuclear_lambda=1.0, energy=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    take(model, optimizer, 0)
    x = images()
    model.zero_grad()
    decompose(model, rank=2, threshold=0.0, target_modules=["1.0"])
    assert list(layers(model)) == ["1.0"] and not any(controllers(model))
    before, wanted = copy.deepcopy(model.state_dict()), model(x)  # a training forward
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    wanted.sum().backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain.eval()(x).sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for step in range(2):
        take(model, optimizer, step)


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"2.1: a Conv2d with groups=2 has no low_rank_conv form"):
        decompose(network(), target_modules=["1.0", "2.1"])
    with pytest.raises(UsageError, match=r"4: rank=8: a matrix of 7 × 36 has 1 to 7"):
        decompose(network(), rank=8, target_modules=["4"])
    with pytest.raises(UsageError, match="say both what is left"):
        decompose(network(), threshold=1, final_energy=1)
    with pytest.raises(UsageError, match="already"):
        decompose(decompose(low(1, "nc")))
    model = network()
    nn.init.constant_(model[4].weight, float("inf"))
    with pytest.raises(WeftError, match="4 has weights that are not finite"):
        decompose(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
@pytest.mark.parametrize("form", FORMS)
def test_a_decomposed_transformer_is_saved_and_loaded(family: str, form: str, tmp_path: Any) -> None:
    if form != "nc" and family != "resnet":
        pytest.skip("it has no convolutions")
    torch.manual_seed(0)
    if family == "resnet":
        sizes: dict[str, Any] = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [2, 2], "layer_type": "basic"}
        model: Any = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))
        given = {"pixel_values": randn(2, 3, 16, 16).float()}
    else:
        sizes = {"n_embd": 12, "n_layer": 1, "n_head": 2}
        if family == "llama":
            sizes = {"hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.AutoConfig.for_model(family, vocab_size=31, bos_token_id=1, eos_token_id=2, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        given = {"input_ids": torch.arange(14).view(2, 7)}

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            return of.eval()(**given).logits

    trp(model, form=form, energy=0.3)
    model(**given)
    model.save_pretrained(tmp_path / "dense")  # a stock model, as long as it trains
    stock = type(model).from_pretrained(tmp_path / "dense")
    assert not layers(stock) and torch.equal(logits(stock), logits(model))
    wanted = logits(model)
    for each in (model, stock):
        decompose(each, form, final_energy=1 - 1e-5)
        assert layers(each) and not any(controllers(each))
        torch.testing.assert_close(logits(each), wanted, rtol=1e-2, atol=1e-3)
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert {type(m) for m in layers(again).values()} == {type(m) for m in layers(model).values()}
    assert torch.equal(logits(again), logits(model))


# --- runs -------------------------------------------------------------------------------------------------------------


def run(llama: Any, corpus: Any, output: Any, resume: bool = False, **options: Any) -> Any:
    base = load_base(str(llama), "causal-lm")
    splits = data.load_splits(str(corpus), "causal-lm", base.tokenizer, max_length=32)
    chosen = methods.resolve("trp", {"period": 3, "energy": 0.6, "final_energy": 0.7, **options})
    settings = TrainSettings(max_steps=8, batch_size=4, learning_rate=0.01, eval_steps=8, logging_steps=4, save_steps=4)
    return train(base, splits, chosen, settings, output, resume=resume, progress=False)


def test_a_killed_run_goes_on_and_ends_decomposed(llama: Any, corpus: Any, tmp_path: Any) -> None:
    whole = run(llama, corpus, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    again = run(llama, corpus, tmp_path / "killed", resume=True)
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.model.state_dict().items())
    assert whole.ranks == {name: m.rank for name, m in layers(whole.model).items()} != {}
    dense = run(llama, corpus, tmp_path / "dense", decompose=False)
    assert not layers(dense.model) and dense.ranks == {}
    before, after = whole.curve[-1]["eval_loss"], whole.validation["loss"]
    assert before == dense.validation["loss"] == dense.curve[-1]["eval_loss"] != after  # of what is saved
    assert whole.file_bytes < dense.file_bytes


def test_of_the_run_a_short_one_is_warned(caplog: Any) -> None:
    model = trp(network(), period=20)
    controller(model).total_steps = 20
    with caplog.at_level("WARNING"):
        take(model, torch.optim.SGD(model.parameters(), lr=LR), 0)
    assert "period=20 in a run of 20 steps" in caplog.text


def test_its_defaults_are_the_papers() -> None:
    config = TrpConfig()
    assert (config.energy, config.nuclear_lambda, config.form) == (0.9, 3e-4, "nc")
    assert methods.resolve("trp").knob is None  # no option changes how many numbers it trains
