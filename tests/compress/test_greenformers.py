"""Greenformers: its factors written out, its ranks by the thesis's table, and what it must leave alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rank_one_sums
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.compress._engine import compress, plan
from weft.compress._factoriser import factoriser
from weft.linear._structured import Structured, bare, stored_bits
from weft.linear.low_rank import LowRank
from weft.linear.low_rank_conv import LowRankConv

METHOD = "greenformers"
SOLVERS = ["svd", "snmf", "nmf", "random"]
few = st.integers(1, 3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer: Any, *, positive: bool = False) -> Any:
    """The layer in float64 with numbers of its own, as one of a model."""
    for i, p in enumerate(layer.double().parameters()):
        p.data = drawn(*p.shape, seed=i + 5).abs() if positive else drawn(*p.shape, seed=i + 5)
    return layer


def made(layer: Any, size: int, **options: Any) -> Any:
    """The replacement of a model's one layer at one size."""
    maker = factoriser(METHOD, weft.config_class(METHOD)(guard=False, **options))
    (unit,) = maker.units(nn.Sequential(layer))
    return maker.build(unit, maker.decompose(unit, None, None if maker.nested else size), size)


def bare_model(*layers: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*layers)


# --- invariant 2: ranks -----------------------------------------------------------------------------------------------


def limit(in_: int, out: int) -> int:
    """The thesis's: a rank must be below it."""
    return in_ * out // (in_ + out)


@pytest.mark.parametrize(("in_", "out", "share", "rank"), [(40, 24, 0.5, 7), (768, 3072, 0.25, 153)])
def test_the_rank_of_a_share(in_, out, share, rank):
    (row,) = plan(bare_model(bare(nn.Linear, in_, out)), METHOD, keep=share)
    assert row.size == rank == int(limit(in_, out) * share)


@pytest.mark.parametrize(("in_", "out", "serves", "skips"), [(40, 24, 14, 15), (64, 64, 31, 32), (10, 4, 2, 3)])
def test_no_rank_is_served_that_saves_nothing(in_, out, serves, skips):
    maker = factoriser(METHOD, weft.config_class(METHOD)())
    (layer,) = maker.units(nn.Sequential(nn.Linear(in_, out)))
    assert list(maker.sizes(layer)) == list(range(1, serves + 1)) and skips == serves + 1
    assert maker.bits(layer, serves) < layer.bits <= maker.bits(layer, skips)


def test_a_share_below_one_rank_is_refused_and_what_is_left_over_is_given_away():
    with pytest.raises(weft.UsageError, match=r"keep=0\.3 is below the smallest form .*, which stores 0\.35"):
        compress(nn.Sequential(nn.Linear(10, 4)), METHOD, keep=0.3)
    rows = plan(bare_model(*(bare(nn.Linear, 40, 24) for _ in range(4))), METHOD, keep=0.5)
    assert [row.size for row in rows] == [8, 8, 7, 7]  # 7.5 each


@given(few, few, st.integers(1, 12), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_a_convolution_s_share_counts_its_kernel(kh, kw, in_, out):
    layer = nn.Conv2d(in_, out, (kh, kw))
    maker = factoriser(METHOD, weft.config_class(METHOD)())
    (unit,) = maker.units(nn.Sequential(layer))
    for rank in maker.sizes(unit):
        small = made(layer, rank)
        assert maker.bits(unit, rank) == stored_bits(small) == 32 * rank * (in_ * kh * kw + out)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in layer.parameters())  # invariant 6


# --- invariant 1: SVD -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["first", "even"])
@pytest.mark.parametrize("layer", [nn.Linear(11, 7), nn.Linear(7, 11, bias=False), Conv1D(7, 11), nn.Conv2d(3, 8, 2)])
def test_svd_is_the_nearest_and_its_values_are_where_they_should_be(layer, split):
    layer = filled(copy.deepcopy(layer))
    w = layer.weight.detach().mT if isinstance(layer, Conv1D) else layer.weight.detach().flatten(1)
    s = torch.linalg.svdvals(w)
    for rank in (1, 4, min(w.shape)):
        small = made(layer, rank, split=split)
        torch.testing.assert_close(small.dense().flatten(1), rank_one_sums(w, rank), rtol=1e-9, atol=1e-9)
        d, e = (part.weight.detach().flatten(1) for part in (small.up, small.down))
        lengths = (torch.ones(rank).double(), s[:rank]) if split == "first" else (s[:rank].sqrt(), s[:rank].sqrt())
        torch.testing.assert_close(d.mT @ d, torch.diag(lengths[0] ** 2), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(e @ e.mT, torch.diag(lengths[1] ** 2), rtol=1e-9, atol=1e-9)
        assert (small.bias is None) == (layer.bias is None)
        assert small.bias is None or torch.equal(small.bias, layer.bias)


# --- invariant 4: convolutions ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    kernel=st.tuples(few, few),
    stride=st.tuples(few, few),
    padding=st.one_of(st.just("same"), st.tuples(few, few)),
    dilation=st.tuples(few, few),
    bias=st.booleans(),
    solver=st.sampled_from(SOLVERS),
    data=st.data(),
)
def test_a_convolution_and_its_kernels_put_together_are_one(
    sides, kernel, stride, padding, dilation, bias, solver, data
):
    (out, in_), stride = sides, (1, 1) if padding == "same" else stride
    size = data.draw(st.integers(1, min(out, in_ * kernel[0] * kernel[1])))
    layer = filled(nn.Conv2d(in_, out, kernel, stride, padding, dilation, bias=bias), positive=solver == "nmf")
    small = made(layer, size, solver=solver)
    x = drawn(2, in_, 11, 9)
    assert type(small) is LowRankConv and small(x).shape == layer(x).shape
    assert small.down.weight.shape == (size, in_, *kernel) and small.up.weight.shape == (out, size, 1, 1)
    whole = copy.deepcopy(layer)
    whole.weight.data = torch.einsum("or,riyx->oiyx", small.up.weight[:, :, 0, 0], small.down.weight)
    torch.testing.assert_close(small(x), whole(x), rtol=1e-10, atol=1e-10)
    if solver == "svd" and size == min(out, in_ * kernel[0] * kernel[1]):
        torch.testing.assert_close(small(x), layer(x), rtol=1e-9, atol=1e-9)


# --- the other solvers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["first", "even"])
@pytest.mark.parametrize("solver", ["snmf", "nmf"])
def test_factors_without_negative_entries(solver, split):
    layer = filled(nn.Linear(13, 17), positive=solver == "nmf")
    model, w = nn.Sequential(layer), layer.weight.detach().clone()
    (row,) = compress(model, METHOD, solver=solver, split=split, keep=0.5, num_iter=40).rows
    d, e = model[0].up.weight.detach(), model[0].down.weight.detach()
    assert bool((d >= 0).all()) and (solver == "snmf") == bool((e < 0).any())
    assert row.error == pytest.approx(float((w - d @ e).square().sum() / w.square().sum()), rel=1e-9)
    left = torch.linalg.svdvals(w).square()
    assert row.error >= float(left[row.size :].sum() / left.sum())
    if solver == "snmf":
        assert row.error <= float(left[row.size - 1 :].sum() / left.sum())
        torch.testing.assert_close(e, torch.linalg.lstsq(d, w).solution, rtol=1e-6, atol=1e-8)
    lengths = d.norm(dim=0)
    torch.testing.assert_close(lengths, e.norm(dim=1) if split == "even" else torch.ones_like(lengths))


def test_more_updates_come_nearer():
    errors = {}
    for num_iter in (0, 10, 100):
        model = nn.Sequential(filled(nn.Linear(13, 17), positive=True))
        errors[num_iter] = compress(model, METHOD, solver="nmf", keep=0.5, num_iter=num_iter).rows[0].error
    assert errors[0] > errors[10] > errors[100]


def test_nmf_is_refused_by_name_where_a_weight_is_negative():
    model = nn.Sequential(filled(nn.Linear(13, 17), positive=True), nn.ReLU(), nn.Linear(17, 9).double())
    model[2].weight.data.abs_()
    model[2].weight.data[3, 2] = -1e-3
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(weft.UsageError, match="solver='nmf' needs weights of at least 0, and 2 has others: use snmf"):
        compress(model, METHOD, solver="nmf")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert compress(model, METHOD, solver="nmf", include=["0"]).replaced == 1


@pytest.mark.parametrize("layer", [nn.Linear(200, 120), nn.Conv2d(40, 120, (5, 1))])
def test_random_factors_are_those_of_two_new_layers_whatever_stood_there(layer):
    found = []
    for seed, shift in ((0, 0.0), (0, 1.0), (1, 0.0)):
        model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(layer))
        for each in model:
            each.weight.data += shift
            each.bias.data += 1
        rows = compress(model, METHOD, solver="random", keep=0.5, seed=seed).rows
        assert [row.error for row in rows] == [None, None]
        assert torch.equal(model[0].bias, layer.bias + 1)
        found += [model[0], model[1]]
    for small in found:
        for part, inputs in ((small.down, 200), (small.up, small.rank)):
            w = part.weight.detach()
            assert float(w.abs().max()) <= inputs**-0.5
            assert float(w.std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.1)  # of a uniform draw
            assert abs(float(w.mean())) < 0.1 * float(w.std())
    same, other_name, again, _, other_seed, _ = (small.down.weight for small in found)
    assert torch.equal(same, again) and not torch.equal(same, other_name) and not torch.equal(same, other_seed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "qr"}, "solver='qr': svd, snmf, nmf or random"),
        ({"split": "last"}, "split='last': first or even"),
        ({"num_iter": -1}, "num_iter=-1 must be a whole number"),
        ({"num_iter": True}, "num_iter=True must be a whole number"),
        ({"solver": "snmf", "allocate": "water"}, "allocate='water' needs the error of every size.*solver='snmf'"),
        ({"rank": 4}, "greenformers has no option 'rank'"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(weft.UsageError, match=said):
        compress(nn.Sequential(nn.Linear(9, 9)), METHOD, **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_keeps_its_promise_and_gives_the_same_bits_again(solver, tmp_path):
    found = []
    for work in (None, tmp_path / "work", tmp_path / "work"):  # the last finds all done
        torch.manual_seed(0)
        model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, max_position_embeddings=16))
        for p in model.parameters():
            p.data.abs_()
        planned = plan(model, METHOD, solver=solver, keep=0.4)
        report = compress(model, METHOD, solver=solver, keep=0.4, work=work)
        assert 0.38 < report.keep <= 0.4 and report.replaced == 13  # six in each layer, and the pooler
        assert [(row.size, row.bits) for row in report.rows] == [(row.size, row.bits) for row in planned]
        found.append((report.rows, model.state_dict()))
    for rows, state in found[1:]:
        assert rows == found[0][0] and all(torch.equal(t, found[0][1][name]) for name, t in state.items())


# --- invariant 3, and what is left alone ------------------------------------------------------------------------------

SIZES = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def test_a_copy_leaves_the_model_alone_and_without_one_it_is_changed_in_place():
    model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 9)))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 12)
    expected = model(x)
    small = copy.deepcopy(model)
    assert compress(small, METHOD, keep=0.5).replaced == 2
    assert torch.equal(model(x), expected) and not torch.equal(small(x), expected)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    compress(model, METHOD, keep=0.5)
    assert torch.equal(model(x), small(x)) and isinstance(model[0], LowRank)


def test_layers_right_under_the_model_are_factorised():
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.Sequential(nn.Linear(9, 8)))
    assert [row.kind for row in compress(model, METHOD, keep=0.5).rows] == ["low_rank"] * 3
    with pytest.raises(weft.UsageError, match="there are: 0, 2"):
        compress(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9)), METHOD, include=["1"])


def test_factors_are_not_factorised_again():
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv2d(8, 8, 3))
    assert compress(model, METHOD, keep=0.5).replaced == 2
    with pytest.raises(weft.UsageError, match="Sequential has no layer to compress"):
        compress(model, METHOD, keep=0.5)


class Own(nn.Linear):
    """Somebody else's layer."""


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.whole = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.own, self.plain = Own(16, 16), nn.Linear(16, 16)
        self.table, self.tied = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
        self.tied.weight = self.table.weight
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.whole(self.plain(self.own(self.attention(x, x, x)[0])))
        return self.tied(self.depthwise(x.mT[..., None])[..., 0].mT)


def test_what_reads_weights_itself_or_is_another_s_stays():
    model = Odd().eval()
    kept = {name: module for name, module in model.named_modules() if name not in ("", "plain")}
    (row,) = compress(model, METHOD, keep=0.5).rows
    assert row.name == "plain" and all(model.get_submodule(name) is module for name, module in kept.items())
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # in one call of torch's own for a whole layer
        fast = model(x)
    torch.testing.assert_close(model(x), fast, rtol=1e-4, atol=1e-5)
    with pytest.raises(weft.UsageError, match="leave no layer; there are: plain"):
        compress(Odd(), METHOD, include=["linear1"])


def test_inputs_that_are_not_contiguous_are_served():
    layer = filled(nn.Linear(7, 5))
    x = drawn(3, 7, 4).mT
    assert not x.is_contiguous()
    torch.testing.assert_close(made(layer, 5)(x), layer(x), rtol=1e-9, atol=1e-9)


def test_every_matrix_of_a_low_rank_transformer_is_two():
    model = hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
    )  # fmt: skip
    before = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_modules()}
    names = [row.name for row in compress(model, METHOD, keep=0.25, solver="random").rows]
    assert sum(".encoder." in name for name in names) == 6 and sum(".decoder." in name for name in names) == 10
    assert all(sum(p.numel() for p in model.get_submodule(name).parameters()) < before[name] for name in names)
    x = torch.arange(8).view(2, 4)
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for name in names for p in
               model.get_submodule(name).parameters() if p.dim() == 2)  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------


def test_it_learns_by_the_task_alone(tmp_path):
    teacher = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, max_position_embeddings=16)).eval()
    student = copy.deepcopy(teacher)
    compress(student, METHOD, keep=0.5)
    args = hf.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True, learning_rate=1e-2,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [i % 30, 3, 4], "labels": i % 2} for i in range(12)]
    trainer = weft.distiller(student, teacher, METHOD, args=args, train_dataset=rows)
    batch = {"input_ids": torch.tensor([[1, 3, 4], [2, 3, 4]]), "labels": torch.tensor([1, 0])}
    assert torch.equal(trainer.compute_loss(student.eval(), dict(batch)), student(**batch).loss)
    student.train()
    torch.manual_seed(3)
    expected = student(**batch).loss
    torch.manual_seed(3)
    assert torch.equal(trainer.compute_loss(student, dict(batch)), expected)
    before = copy.deepcopy(student.state_dict())
    trainer.train()
    factors = [name for name, m in student.named_modules() if isinstance(m, Structured)]
    assert len(factors) == 13
    for name in factors:
        for part in ("up", "down"):
            assert not torch.equal(student.state_dict()[f"{name}.{part}.weight"], before[f"{name}.{part}.weight"])
    assert math.isfinite(float(student.eval()(**batch).loss))
