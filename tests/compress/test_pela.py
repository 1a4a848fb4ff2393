"""PELA: its start, its loss written out, and the loop that it shares with all methods that learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy

import weft
from weft.compress._distil import objective
from weft.compress.pela import PelaConfig
from weft.linear.low_rank import LowRank


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.0}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, use_cache=False)).double()


def pair(keep: float = 0.5) -> tuple[Any, Any]:
    """A compressed model, and the one from before."""
    teacher = llama()
    student = copy.deepcopy(teacher)
    weft.compress(student, "pela", keep=keep)
    return student.train(), teacher


def rows(count: int, length: int = 9) -> list[dict[str, list[int]]]:
    """Sequences of unlike length, the prompts of which have no labels."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(1, 40, (length - i % 3,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (1 + i % 2) + ids[1 + i % 2 :]})
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    most = max(len(row["input_ids"]) for row in batch)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (most - len(row[key])) for row in batch])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": ids.ne(0).long()}


def layers(student: nn.Module) -> dict[str, LowRank]:
    return {name: m for name, m in student.named_modules() if isinstance(m, LowRank)}


def states(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What each block passes on, by transformers' own account; the last one is before the final norm."""
    model.model.norm, norm = nn.Identity(), model.model.norm
    asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = model.model(**asked, output_hidden_states=True).hidden_states[1:]
    model.model.norm = norm
    return list(found)


def loss_of(student: Any, teacher: Any, batch: dict[str, torch.Tensor], config: PelaConfig) -> torch.Tensor:
    """The paper's, over the tokens that predict a label."""
    mask = batch["labels"][:, 1:] != -100
    asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits, taught = student(**asked).logits[:, :-1], teacher(**asked).logits[:, :-1].detach()
    total = cross_entropy(logits[mask].float(), batch["labels"][:, 1:][mask])  # in float32, as transformers' own is
    pairs = zip(states(student, batch), states(teacher, batch))
    features = [(a[:, :-1][mask] - b[:, :-1][mask].detach()).square().mean() for a, b in pairs]
    total = total + config.alpha * torch.stack(features).mean()
    total = total + config.beta * (logits[mask] - taught[mask]).square().mean()
    changes = []
    for name, layer in layers(student).items():
        w = teacher.get_submodule(name).weight.detach()
        changes.append(((layer.up.weight @ layer.down.weight - w).abs().max() - config.eps) ** 2)
    return total + config.gamma * torch.stack(changes).mean()


def trainer(student: Any, teacher: Any, tmp_path: Any, *, options: dict[str, Any] | None = None, **how: Any) -> Any:
    shared = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0}
    shared |= {"save_strategy": "no", "logging_strategy": "no", "train_sampling_strategy": "sequential"}
    args = hf.TrainingArguments(**{**shared, "learning_rate": 1e-2, "max_grad_norm": 0.0, **how})
    return weft.distiller(
        student, teacher, "pela", options=options, args=args, train_dataset=rows(8), data_collator=collate
    )


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "in_", "c", "rank"), [(768, 3072, 3, 204), (3072, 768, 3, 204), (768, 768, 2, 192)])
def test_the_rank_of_a_compression_ratio(out: int, in_: int, c: int, rank: int) -> None:
    with torch.device("meta"):
        model = nn.ModuleList([nn.Sequential(nn.Linear(in_, out))])
    from weft.compress._engine import plan

    (row,) = plan(model, "pela", keep=1 / c)
    assert row.size == rank == in_ * out // (c * (in_ + out))


def test_the_start_is_the_nearest_of_its_rank_shared_evenly() -> None:
    student, teacher = pair()
    for name, layer in layers(student).items():
        u, s, vh = torch.linalg.svd(teacher.get_submodule(name).weight)
        torch.testing.assert_close(layer.dense(), u[:, : layer.rank] * s[: layer.rank] @ vh[: layer.rank])
        for norms in (layer.up.weight.norm(dim=0), layer.down.weight.norm(dim=1)):
            torch.testing.assert_close(norms, s[: layer.rank].sqrt())


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.1, "beta": 0.7, "gamma": 3.0, "eps": 0.05}, {"alpha": 0.0, "gamma": 0.0}], ids=str
)
def test_the_loss_and_its_gradients_are_those_written_out(options: dict[str, Any], tmp_path: Any) -> None:
    student, teacher = pair()
    batch = collate(rows(4))
    mine = trainer(student, teacher, tmp_path, options=options).compute_loss(student, dict(batch))
    expected = loss_of(student, teacher, batch, PelaConfig(**options))
    torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-7, check_dtype=False)
    ours, theirs = (torch.autograd.grad(loss, list(student.parameters())) for loss in (mine, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_of_full_rank_nothing_is_left_to_learn_but_eps() -> None:
    teacher = llama()
    student = copy.deepcopy(teacher)
    for name, module in teacher.named_modules():
        if name.endswith("proj"):
            whole = LowRank.from_dense(module.weight.detach(), rank=min(module.weight.shape))
            student.set_submodule(name, whole)
    made = objective("pela", PelaConfig(eps=0.03), student, teacher)
    batch = {key: t for key, t in collate(rows(2)).items() if key != "labels"}
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(made.penalty(), torch.tensor(0.03**2, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_largest_change_pulls_at_one_row_and_one_column() -> None:
    student, teacher = pair()
    objective("pela", PelaConfig(), student, teacher).penalty().backward()
    for layer in layers(student).values():
        assert layer.up.weight.grad.any(1).sum() == layer.down.weight.grad.any(0).sum() == 1


def test_the_teacher_is_frozen_and_the_rest_learns(tmp_path: Any) -> None:
    student, teacher = pair()
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    trainer(student, teacher, tmp_path, max_steps=2, per_device_train_batch_size=4).train()
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, _ in student.named_parameters()}


def test_micro_batches_are_one_batch(tmp_path: Any) -> None:
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        student, teacher = pair()
        how = {"max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer(student, teacher, tmp_path, options={"beta": 0.5}, **how).train()
        found.append(student.state_dict())
    for name, t in found[0].items():
        torch.testing.assert_close(found[1][name], t, rtol=1e-7, atol=1e-9, msg=name)


def test_rows_with_one_label_teach_all_that_is_no_padding(tmp_path: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher = hf.BertForSequenceClassification(hf.BertConfig(**sizes, vocab_size=40, num_labels=3)).double().eval()
    student = copy.deepcopy(teacher)
    weft.compress(student, "pela", keep=0.5)
    batch = collate(rows(4))
    batch["labels"] = torch.tensor([0, 2, 1, 1])
    made = trainer(student, teacher, tmp_path, options={"gamma": 0.0, "beta": 2.0})
    student.train()
    for module in student.modules():
        module.training = module is student  # dropout off
    asked = {key: t for key, t in batch.items() if key != "labels"}
    own, other = (m(**asked, output_hidden_states=True) for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    each = [(a[mask] - b[mask]).square().mean() for a, b in zip(own.hidden_states[1:], other.hidden_states[1:])]
    expected = cross_entropy(own.logits, batch["labels"]) + sum(each) / len(each)
    expected = expected + 2.0 * (own.logits - other.logits).square().mean()
    torch.testing.assert_close(made.compute_loss(student, dict(batch)), expected, rtol=1e-10, atol=1e-12)


def test_what_cannot_teach_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(weft.UsageError, match="the teacher is the student itself"):
        weft.distiller(student, student, "pela")
    shallow = copy.deepcopy(teacher)
    del shallow.model.layers[1]
    with pytest.raises(weft.UsageError, match="the teacher has 1 blocks and the student 2"):
        weft.distiller(student, shallow, "pela")
    with pytest.raises(weft.UsageError, match="pela has no option 'alfa'"):
        weft.distiller(student, teacher, "pela", options={"alfa": 1})
    with pytest.raises(weft.UsageError, match="gamma=-1 must be a number of at least 0"):
        PelaConfig(gamma=-1)
