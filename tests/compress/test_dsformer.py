"""DSFormer: its start, the straight-through factoriser written out, and its two phases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from models import batches
from models import llama as odd_llama
from reference import One, rank_one_sums
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import weft
from weft.compress._distil import objective
from weft.compress._engine import compress
from weft.compress.dsformer import DsformerConfig, StraightThrough
from weft.errors import UsageError
from weft.linear._structured import stored_bits
from weft.linear.small_dense_semi_sparse import SmallDenseSemiSparse

SIZES = {"block_size": 4, "keep": 0.8}


def pair(**options: Any) -> tuple[Any, Any]:
    """A compressed model, and the one from before."""
    teacher = odd_llama(torch.float64)
    student = copy.deepcopy(teacher)
    compress(student, "dsformer", **{**SIZES, **options})
    return student.train(), teacher.eval()


def learning(**options: Any) -> tuple[Any, Any]:
    """A student in training, and what it learns by."""
    student, teacher = pair()
    return student, objective("dsformer", DsformerConfig(**{**SIZES, **options}), student, teacher)


def layers(student: nn.Module, kind: type = SmallDenseSemiSparse) -> dict[str, Any]:
    return {name: m for name, m in student.named_modules() if isinstance(m, kind)}


def loss_of(model: Any) -> Tensor:
    batch = batches(model)[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels).loss


def written_out(layer: SmallDenseSemiSparse) -> tuple[Tensor, list[Tensor]]:
    """Ŵ or its transpose, and S_b (rows × k) of each block, an entry after the other."""
    m, k, s = layer.block_size, len(layer.atoms), layer.nonzeros
    found, codes = [], []
    for start in range(0, layer.atoms.shape[1], m):
        block = torch.zeros(len(layer.values), k, dtype=torch.float64)
        first = start // m
        for row, (places, values) in enumerate(zip(layer.places.tolist(), layer.values.tolist())):
            for place, value in list(zip(places, values))[first * s : (first + 1) * s]:
                block[row, place - first * k] = value
        codes.append(block)
        found.append(block @ layer.atoms.detach()[:, start : start + m])
    return torch.cat(found, 1), codes


def pursuit(rows: Tensor, d: Tensor, s: int) -> Tensor:
    """Ŵ_b of W_b (rows × m): one row at a time, by least squares after each choice."""
    made = torch.zeros_like(rows)
    unit = d / d.norm(dim=1, keepdim=True)
    for i, row in enumerate(rows):
        chosen: list[int] = []
        for _ in range(s):
            scores = (unit @ (row - made[i])).abs()
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            basis = unit[chosen].mT
            made[i] = basis @ torch.linalg.lstsq(basis, row[:, None]).solution[:, 0]
    return made


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["in", "out"])
def test_every_row_has_as_many_entries_in_every_block_and_all_of_it_counts(axis):
    model = One(60, 90)  # the last block is narrower
    w = model.layer.weight.detach().clone()
    (row,) = compress(model, "dsformer", keep=0.6, block_size=8, axis=axis).rows
    layer = model.layer
    v, codes = written_out(layer)
    made = v if axis == "in" else v.mT
    torch.testing.assert_close(layer.dense(), made)
    *whole, last = [block.ne(0).sum(1) for block in codes]
    assert all(entries.eq(row.size).all() for entries in whole)
    assert int(last.max()) <= min(row.size, v.shape[1] % 8)  # fewer where nothing is left
    assert row.error == pytest.approx(float((made - w).square().sum() / w.square().sum()))
    side, rows, m, k = (60, 90, 8, 8) if axis == "in" else (90, 60, 8, 7)
    blocks = -(-side // m)
    assert layer.block_size == m and len(codes) == blocks and len(layer.atoms) == k
    places = rows * min(-(-k * blocks // 8), row.size * blocks) * 8  # a bit an atom or a byte an entry
    assert stored_bits(model.layer) == row.bits == 64 * (k * side + rows * blocks * row.size) + places


def test_weights_in_clusters_are_nearer_than_low_rank_of_the_same_bits():
    draw = torch.Generator().manual_seed(0)
    model = One(64, 256)
    with torch.no_grad():  # of each eight inputs, every output goes along one of eight directions
        axes = torch.randn(8, 8, 8, generator=draw, dtype=torch.float64)
        taken = torch.randint(0, 8, (8, 256), generator=draw)
        sizes = torch.randn(8, 256, 1, generator=draw, dtype=torch.float64)
        model.layer.weight.copy_(torch.cat([sizes[b] * axes[b, taken[b]] for b in range(8)], 1))
    w = model.layer.weight.detach().clone()
    (row,) = compress(model, "dsformer", keep=0.3, block_size=8).rows
    rank = row.bits // (64 * (64 + 256))
    best = rank_one_sums(w, rank)
    assert row.error < 0.1 * float((best - w).square().sum() / w.square().sum())


def test_more_rounds_come_nearer():
    def error(rounds):
        return compress(One(60, 90), "dsformer", keep=0.6, block_size=8, rounds=rounds).rows[0].error

    errors = [error(rounds) for rounds in (0, 1, 5, 40)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


# --- the straight-through factoriser ----------------------------------------------------------------------------------


def test_a_step_finds_the_pursuit_of_the_whole_weight_in_the_basis():
    student, made = learning()
    with torch.no_grad():
        for layer in layers(student, StraightThrough).values():
            layer.layer.atoms.mul_(1.7)  # whatever the lengths of its rows
            layer.whole.add_(0.01 * torch.randn(layer.whole.shape, generator=torch.Generator().manual_seed(1)))
    made.on_step(0, 10)
    for layer in layers(student, StraightThrough).values():
        d, m = layer.layer.atoms.detach(), layer.layer.block_size
        blocks = zip(layer.whole.detach().split(m, 1), d.split(m, 1), strict=True)
        expected = torch.cat([pursuit(w, each, layer.layer.nonzeros) for w, each in blocks], 1)
        torch.testing.assert_close(layer.layer.dense(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_the_gradients_of_the_whole_weight_and_of_the_basis(axis):
    """G = ∂loss/∂Ŵ by autograd through a dense layer of Ŵ; S_bᵀ·G_b by hand."""
    teacher = odd_llama(torch.float64)
    student = copy.deepcopy(teacher).train()
    compress(student, "dsformer", **SIZES, axis=axis)
    made = objective("dsformer", DsformerConfig(**SIZES), student, teacher)
    made.on_step(0, 10)
    loss = loss_of(student)
    loss.backward()
    dense = copy.deepcopy(teacher)
    for name, layer in layers(student, StraightThrough).items():
        dense.get_submodule(name).weight.data.copy_(layer.layer.dense())
    assert float(loss) == pytest.approx(float(loss_of(dense)), rel=1e-6)  # the loss of transformers is in float32
    loss_of(dense).backward()
    for name, layer in layers(student, StraightThrough).items():
        g = dense.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.whole.grad, g, rtol=1e-5, atol=1e-8)
        assert layer.layer.values.grad is None
        _, codes = written_out(layer.layer)
        blocks = (g if axis == "in" else g.mT).split(layer.layer.block_size, 1)
        by_hand = torch.cat([s.mT @ each for s, each in zip(codes, blocks, strict=True)], 1)
        torch.testing.assert_close(layer.layer.atoms.grad, by_hand, rtol=1e-5, atol=1e-8)


def test_the_teacher_keeps_its_weights():
    student, teacher = pair()
    before = copy.deepcopy(teacher.state_dict())
    made = objective("dsformer", DsformerConfig(**SIZES), student, teacher)
    with torch.no_grad():
        for layer in made.layers.values():
            layer.whole.zero_()
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())


def test_without_a_step_nothing_changes_from_one_to_the_next():
    student, made = learning(refresh=2, stf=1)
    made.on_step(0, 10)
    first = {name: layer.layer.dense() for name, layer in layers(student, StraightThrough).items()}
    for step in range(1, 5):
        made.on_step(step, 10)
    for name, layer in layers(student, StraightThrough).items():
        torch.testing.assert_close(layer.layer.dense(), first[name], rtol=1e-9, atol=1e-11)


def test_between_pursuits_places_stay_and_entries_fit():
    student, made = learning(refresh=3)
    made.on_step(0, 10)
    moved = torch.Generator().manual_seed(2)
    found = layers(student, StraightThrough)
    before = {name: layer.layer.places.clone() for name, layer in found.items()}
    with torch.no_grad():
        for layer in found.values():
            layer.whole.add_(0.3 * torch.randn(layer.whole.shape, generator=moved) * layer.whole.std())
    made.on_step(1, 10)
    for name, layer in found.items():
        assert torch.equal(layer.layer.places, before[name])
        _, codes = written_out(layer.layer)
        m = layer.layer.block_size
        blocks = zip(layer.whole.split(m, 1), layer.layer.atoms.split(m, 1), codes, strict=True)
        for w, d, s in blocks:  # what is left has nothing along the rows of D that are taken
            left = ((w - s @ d) @ d.mT).masked_select(s != 0)
            assert float(left.abs().max()) < 1e-8
    made.on_step(3, 10)
    assert any(not torch.equal(layer.layer.places, before[name]) for name, layer in found.items())


def test_a_direction_that_no_output_takes_is_given_to_the_worst():
    student, made = learning()
    name, layer = next(iter(layers(student, StraightThrough).items()))
    with torch.no_grad():  # the last is the first again, and so never chosen
        layer.layer.atoms[-1] = layer.layer.atoms[0]
    made.on_step(0, 10)
    d = layer.layer.atoms
    for w, each in zip(layer.whole.split(4, 1), d.split(4, 1), strict=True):
        left = (w - pursuit(w, torch.cat([each[:-1], each[:1]]), layer.layer.nonzeros)).square().sum(1)
        worst = w[left.argmax()]
        torch.testing.assert_close(each[-1], worst / worst.norm())


def test_at_last_places_are_fixed_and_entries_and_basis_train():
    student, made = learning(stf=0.5, refresh=100)
    for step in (0, 4, 5):
        made.on_step(step, 10)
    student.zero_grad()
    loss_of(student).backward()
    for layer in layers(student, StraightThrough).values():
        assert layer.whole.grad is None and layer.fixed
        assert layer.layer.values.grad is not None and layer.layer.atoms.grad is not None
    before = {name: layer.layer.dense() for name, layer in layers(student, StraightThrough).items()}
    with torch.no_grad():
        for layer in layers(student, StraightThrough).values():
            layer.whole.zero_()
    made.on_step(6, 10)
    made.finish()
    for name, layer in layers(student).items():
        assert torch.equal(layer.dense(), before[name])
    assert not layers(student, StraightThrough)


def test_an_evaluation_sees_the_whole_weight_as_it_is_and_changes_no_places():
    student, made = learning()
    made.on_step(0, 10)
    with torch.no_grad():
        for layer in layers(student, StraightThrough).values():
            layer.whole.mul_(2)
    places = {name: layer.layer.places.clone() for name, layer in layers(student, StraightThrough).items()}
    doubled = {name: 2 * layer.layer.dense() for name, layer in layers(student, StraightThrough).items()}
    with torch.no_grad():
        student.eval()(**batches(student)[0])
    for name, layer in layers(student, StraightThrough).items():
        torch.testing.assert_close(layer.layer.dense(), doubled[name], rtol=1e-8, atol=1e-10)
        assert torch.equal(layer.layer.places, places[name])


def test_what_else_it_learns_by():
    student, made = learning(mu=0.3, beta=0.7)
    made.on_step(0, 10)
    pulled = sum((layer.whole - layer.layer.dense()).square().sum() for layer in made.layers.values())
    torch.testing.assert_close(made.penalty(), 0.3 * pulled)
    (gradient, *_) = torch.autograd.grad(made.penalty(), [layer.whole for layer in made.layers.values()])
    first = next(iter(made.layers.values()))
    torch.testing.assert_close(gradient, 0.6 * (first.whole - first.layer.dense()))
    logits, taught = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(3))
    seen = [type("Seen", (), {"logits": each}) for each in (logits, taught)]
    (term,) = made.terms(*seen)
    p = taught.softmax(-1)
    expected = cross_entropy(logits.flatten(0, 1), p.flatten(0, 1), reduction="none") + (p * p.log()).sum(-1).flatten()
    torch.testing.assert_close(term.flatten(), 0.7 * expected)


@pytest.mark.parametrize("refresh", [1, 2])
def test_training_goes_on_where_it_was(refresh, tmp_path):
    """From HF's own checkpoints, of either phase."""

    def run(folder, resume=None):
        student, teacher = pair()
        shared = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "seed": 0}
        shared |= {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
        ids = batches(student)[0]["input_ids"]
        rows = [{"input_ids": row, "labels": row} for row in ids] * 4
        options = {**SIZES, "refresh": refresh, "stf": 0.5}
        args = hf.TrainingArguments(str(folder), **shared)
        made = weft.distiller(student, teacher, "dsformer", options=options, args=args, train_dataset=rows)
        made.train(resume_from_checkpoint=resume)
        return student.state_dict()

    whole = run(tmp_path / "a")
    for step in (2, 4):
        again = run(tmp_path / "b", resume=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert whole.keys() == again.keys() and all(torch.equal(t, whole[name]) for name, t in again.items())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"block_size": 0}, "block_size=0 must be a whole number of at least 1"),
        ({"refresh": 0}, "refresh=0 must be a whole number of at least 1"),
        ({"rounds": 1.5}, "rounds=1.5 must be a whole number"),
        ({"atoms": 0}, "atoms=0: rows of the basis"),
        ({"axis": "rows"}, "axis='rows': in or out"),
        ({"stf": 1.2}, "stf=1.2: a share of the steps"),
        ({"mu": -1}, "mu=-1 must be a number"),
        ({"allocate": "water"}, "allocate='water' needs the error of every size"),
    ],
)
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        compress(One(5, 7), "dsformer", **options)


def test_a_student_without_such_layers_is_refused():
    teacher = odd_llama()
    with pytest.raises(UsageError, match="dsformer trains layers of its own, and the student has none"):
        objective("dsformer", DsformerConfig(), copy.deepcopy(teacher), teacher)
