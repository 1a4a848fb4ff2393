"""INT2.1: its start, its bits, and what its training moves and by what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from models import batches
from models import llama as odd_llama
from reference import One, rank_one_sums, rows_of
from torch import nn

import weft
from weft.compress._distil import apart, objective
from weft.compress._engine import compress, plan
from weft.compress.int21 import Int21Config
from weft.linear.quantised_plus_low_rank import QuantisedPlusLowRank


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.0}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, use_cache=False)).double()


def pair(**options: Any) -> tuple[Any, Any]:
    """A compressed model, and the one from before."""
    teacher = llama()
    student = copy.deepcopy(teacher)
    compress(student, "int21", keep=0.9, quantiser="nearest", **{"rank": 2, "group_size": 8, **options})
    return student.train(), teacher.eval()


def layers(student: nn.Module) -> dict[str, QuantisedPlusLowRank]:
    return {name: m for name, m in student.named_modules() if isinstance(m, QuantisedPlusLowRank)}


def batch(labels: bool = False) -> dict[str, torch.Tensor]:
    """Sequences of unlike length; with labels, the prompts have none."""
    ids = torch.randint(1, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    made = {"input_ids": ids * mask, "attention_mask": mask}
    if labels:
        made["labels"] = ids.masked_fill(mask == 0, -100)
        made["labels"][:, :3] = -100
    return made


def trainer(student: Any, teacher: Any, tmp_path: Any, rows: Any = None, **how: Any) -> Any:
    shared = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0}
    shared |= {"save_strategy": "no", "logging_strategy": "no", "train_sampling_strategy": "sequential"}
    options = how.pop("options", {})
    args = hf.TrainingArguments(**{**shared, "learning_rate": 1e-2, "max_grad_norm": 0.0, **how})
    return weft.distiller(student, teacher, "int21", options=options, args=args, train_dataset=rows)


# --- what is stored ---------------------------------------------------------------------------------------------------


def seven_billion() -> nn.Module:
    """The linear layers of LLaMA-7B's blocks, in 16 bits and without values."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    with torch.device("meta"):
        blocks = [nn.ModuleList(nn.Linear(in_, out, bias=False) for out, in_ in shapes) for _ in range(32)]
        return nn.ModuleList(blocks).to(torch.float16)


def test_the_bits_of_the_papers_name_are_those_of_the_factors_and_the_groups_come_on_top() -> None:
    model, rank = seven_billion(), 16

    def stored(**options: Any) -> int:
        return sum(row.bits for row in plan(model, "int21", **options))

    matrices = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in matrices)
    factors = sum(rank * (m.in_features + m.out_features) for m in matrices)
    assert (len(matrices), weights, factors) == (224, 6_476_005_376, 39_976_960)
    assert f"{16 * factors / weights:.4f}" == "0.0988" and f"{(2 + 16 * factors / weights) / 2:.3f}" == "1.049"
    for group in (32, 64, 128):
        groups = (16 + 2) * weights // group  # a step and a zero each
        if group == 128:  # of which 11008 inputs have 86, whose zeros take 21.5 bytes of 22
            groups += 4 * 4096 * 32
        assert stored(group_size=group) == 2 * weights + 16 * factors + groups
        assert stored(group_size=group, rank=0) == 2 * weights + groups
    assert stored(group_size=64) / weights == pytest.approx(2.0988 + 18 / 64, abs=1e-4)
    assert stored(group_size=64, bits=4) / weights == pytest.approx(4.0988 + 20 / 64, abs=1e-4)


def test_keep_is_a_bound_that_makes_ranks_smaller() -> None:
    for keep, expected in ((0.9, {8}), (0.5, set(range(1, 8)))):
        report = compress(odd_llama(torch.float32), "int21", keep=keep, rank=8, quantiser="nearest")
        assert {row.size for row in report.rows} <= expected and report.keep <= keep
    with pytest.raises(weft.UsageError, match="keep=0.05 is below the smallest form of this method, which stores 0"):
        compress(odd_llama(torch.float32), "int21", keep=0.05, quantiser="nearest")


# --- the start --------------------------------------------------------------------------------------------------------


def test_the_start_is_the_quantised_model_bit_for_bit() -> None:
    asked = batch()
    codes, _ = pair(rank=0)
    for seed in (0, 1):
        student, teacher = pair(seed=seed)
        assert torch.equal(student(**asked).logits, codes(**asked).logits)
        for name, layer in layers(student).items():
            bound = layer.in_features**-0.5
            a = layer.down.weight
            assert not layer.up.weight.any() and a.abs().max() <= bound and a.abs().max() > 0.7 * bound, name
            spread = (teacher.get_submodule(name).weight - layer.dense()).abs().view(layer.out_features, -1, 8)
            assert (spread.amax(-1) <= layer.steps.view(torch.float16).double() / 2 + 1e-12).all()
    assert not torch.equal(a, layers(pair(seed=0)[0])[name].down.weight), "A is drawn by the seed"


def test_the_start_by_svd_is_the_nearest_to_what_was_lost() -> None:
    student, teacher = pair(start="svd", scale=0.5, bits=3)
    for name, layer in layers(student).items():
        wq = layer.quantised(torch.float64)
        best = wq + rank_one_sums(teacher.get_submodule(name).weight - wq, layer.rank)
        torch.testing.assert_close(layer.dense(), best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", ["zero", "svd"])
@pytest.mark.parametrize("quantiser", ["gptq", "nearest"])
def test_the_error_is_what_is_left_of_the_outputs(quantiser: str, start: str) -> None:
    model = One(20, 24)
    w, x = model.layer.weight.detach().clone(), rows_of(model.layer)
    x = x if quantiser == "gptq" else torch.eye(20, dtype=torch.float64)
    options = {"rank": 5, "group_size": 6, "start": start, "quantiser": quantiser, "keep": 0.6}
    (row,) = compress(model, "int21", data=[x], **options).rows
    left = ((w - model.layer.dense()) @ x.mT).square().sum() / (w @ x.mT).square().sum()
    assert row.size == 5 and row.error == pytest.approx(float(left), rel=1e-9)


def test_calibration_loses_less_of_the_outputs() -> None:
    found = {}
    for quantiser in ("gptq", "nearest"):
        model = One(20, 24)
        w, x = model.layer.weight.detach().clone(), rows_of(model.layer)
        compress(model, "int21", data=[x], quantiser=quantiser, bits=3, group_size=10)
        found[quantiser] = float(((w - model.layer.dense()) @ x.mT).square().sum())
    assert found["gptq"] < 0.5 * found["nearest"]


# --- what it learns by ------------------------------------------------------------------------------------------------


def by_hand(own: torch.Tensor, other: torch.Tensor, loss: str) -> torch.Tensor:
    """Of one token."""
    q, p = own.exp() / own.exp().sum(), other.exp() / other.exp().sum()
    found = {"kl": (p * (p / q).log()).sum(), "cross_entropy": -(p * q.log()).sum()}
    return (own - other).square().mean() if loss == "mse" else found[loss]


@pytest.mark.parametrize("loss", ["kl", "cross_entropy", "mse"])
@pytest.mark.parametrize("labels", [True, False])
def test_the_loss_is_a_mean_over_tokens_and_no_label_is_read(loss: str, labels: bool, tmp_path: Any) -> None:
    student, teacher = pair()
    asked = batch(labels)
    ids = {name: t for name, t in asked.items() if name != "labels"}
    own, other = student(**ids).logits, teacher(**ids).logits.detach()
    if labels:  # tokens that predict one
        count = [(i, t) for i in range(4) for t in range(8) if asked["labels"][i, t + 1] != -100]
    else:  # all but padding
        count = [(i, t) for i in range(4) for t in range(9) if asked["attention_mask"][i, t]]
    expected = torch.stack([by_hand(own[i, t], other[i, t], loss) for i, t in count]).mean()
    made = trainer(student, teacher, tmp_path, options={"loss": loss})
    found = made.compute_loss(student, dict(asked))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if labels:  # which ones they are is all one
        other_labels = asked["labels"].where(asked["labels"] == -100, 7)
        assert torch.equal(found, made.compute_loss(student, {**asked, "labels": other_labels}))
    trained = [p for p in student.parameters() if p.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained)):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


def test_divergence_is_0_of_itself_and_above_0_of_all_else() -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = (3 * torch.randn(50, 11, generator=draw, dtype=torch.float64) for _ in range(2))
    assert (apart(own, own, "kl").abs() < 1e-12).all() and (apart(own, other, "kl") > 0).all()
    own.requires_grad_()
    grads = [torch.autograd.grad(apart(own, other, loss).sum(), own)[0] for loss in ("kl", "cross_entropy")]
    torch.testing.assert_close(*grads)
    narrow = apart(own.detach().bfloat16(), other.bfloat16(), "kl")
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, apart(own.bfloat16().float(), other.bfloat16().float(), "kl"))


def test_nothing_is_left_to_learn_where_nothing_was_lost(tmp_path: Any) -> None:
    """Weights that lie on their grids, and B = 0."""
    student, teacher = pair()
    for name, layer in layers(student).items():
        teacher.get_submodule(name).weight.data = layer.dense().detach()
    loss = trainer(student, teacher, tmp_path).compute_loss(student, batch())
    assert abs(float(loss)) < 1e-12


def test_training_moves_the_factors_and_nothing_else(tmp_path: Any) -> None:
    student, teacher = pair()
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    rows = [{name: t[i] for name, t in batch().items()} for i in range(4)]
    made = trainer(student, teacher, tmp_path, rows, max_steps=30, per_device_train_batch_size=4)
    first = float(made.compute_loss(student, batch()))
    made.train()
    assert float(made.compute_loss(student.train(), batch())) < 0.5 * first
    moved = {name for name, t in student.state_dict().items() if not torch.equal(t, start[name])}
    assert moved == {f"{name}.{part}.weight" for name in layers(student) for part in ("up", "down")}
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert {name for name, p in student.named_parameters() if p.requires_grad} == moved
    count = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers(student).values())
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == count


def test_micro_batches_are_one_batch(tmp_path: Any) -> None:
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        student, teacher = pair()
        rows = [{name: t[i] for name, t in batch(True).items()} for i in range(4)]
        how = {"max_steps": 3, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer(student, teacher, tmp_path, rows, **how).train()
        found.append(student.state_dict())
    for name, t in found[0].items():
        torch.testing.assert_close(found[1][name], t, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"bits": 1}, "bits=1: codes have 2, 3, 4 or 8 bits"),
        ({"group_size": 2.5}, "group_size=2.5"),
        ({"rank": -1}, "rank=-1"),
        ({"scale": 0}, "scale=0"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"quantiser": "awq"}, "quantiser='awq': one of gptq, nearest"),
        ({"start": "one"}, "start='one': one of zero, svd"),
        ({"loss": "jsd"}, "loss='jsd': one of kl, cross_entropy, mse"),
        ({"allocate": "water"}, "allocate='water' needs"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(weft.UsageError, match=said):
        Int21Config(**options)


def test_what_cannot_be_done_is_refused() -> None:
    student, teacher = pair(rank=0)
    with pytest.raises(weft.UsageError, match="int21 trains factors beside codes, and the student has none"):
        objective("int21", Int21Config(), student, teacher)
    model = One(8, 4)
    model.layer.weight.data[0, 0] = 1e9
    with pytest.raises(weft.UsageError, match="layer: weights up to 1e\\+09 cannot be quantised: steps are float16"):
        compress(model, "int21", quantiser="nearest", rank=1)


def test_the_calibrated_start_needs_data_and_the_other_none() -> None:
    with pytest.raises(weft.UsageError, match="needs calibration data"):
        compress(odd_llama(), "int21")
    assert compress(odd_llama(), "int21", data=batches(odd_llama())).replaced
