"""FactorLLM: its split against the dense model, its loss written out, and routed models as ordinary models."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
import transformers as hf
from families import every_family, family_model, padded
from models import VOCABULARY, batches, gpt2, llama
from torch.nn.functional import cross_entropy, silu
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import weft
from weft.compress._distil import objective
from weft.compress._engine import plan
from weft.compress.factorllm import FactorllmConfig, label, learnt
from weft.errors import UsageError
from weft.linear._transformers import save_compressed, to_dense
from weft.linear.routed_mlp import RoutedMlp


def routed(model: Any) -> dict[str, RoutedMlp]:
    return {name: m for name, m in model.named_modules() if isinstance(m, RoutedMlp)}


def pair(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A model in experts, and the one from before."""
    teacher = family_model(family, dtype)
    student = copy.deepcopy(teacher)
    weft.compress(student, "factorllm", **options)
    return student, teacher


# --- the split --------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("partition", ["contiguous", "random", "kmeans"])
def test_all_experts_are_the_dense_model(family: str, partition: str) -> None:
    student, teacher = pair(family, target_sparsity=0, guard=False, partition=partition)
    assert len(routed(student)) == 2 and all(m.inner.scale == 1 for m in routed(student).values())
    dense = to_dense(copy.deepcopy(student))
    assert not routed(dense)
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (dense, teacher)]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        expected = teacher(**padded()).logits
        for model in (student, dense):
            assert float((model(**padded()).logits - expected).norm() / expected.norm()) < 1e-10


def units_of(model: Any, name: str) -> torch.Tensor:
    """Every unit's weights in a stock MLP, rows."""
    mlp = model.get_submodule(name)
    return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], dim=1).detach()


def experts_of(model: Any, name: str) -> list[torch.Tensor]:
    found = model.get_submodule(name).inner.experts
    return [
        torch.cat([e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight.T], dim=1).detach() for e in found
    ]


def test_units_go_whole_and_each_once() -> None:
    for partition in ("contiguous", "random", "kmeans"):
        student, teacher = pair(partition=partition)
        for name in routed(student):
            whole, parts = units_of(teacher, name), experts_of(student, name)
            assert [len(part) for part in parts] == [10, 9, 9, 9]
            places = [[(whole == unit).all(1).nonzero().item() for unit in part] for part in parts]
            assert sorted(itertools.chain(*places)) == list(range(37)), partition
            assert all(each == sorted(each) for each in places) or partition == "random"
            assert (list(itertools.chain(*places)) == list(range(37))) == (partition == "contiguous")


def test_alike_units_are_together() -> None:
    """Copies of four units, each in another length, which k-means does not see."""
    model = llama()
    for mlp in (layer.mlp for layer in model.model.layers):
        with torch.no_grad():
            for i in range(36):
                size = 1 + i / 9
                mlp.gate_proj.weight[i] = size * mlp.gate_proj.weight[i % 4]
                mlp.up_proj.weight[i] = size * mlp.up_proj.weight[i % 4]
                mlp.down_proj.weight[:, i] = size * mlp.down_proj.weight[:, i % 4]
    teacher = copy.deepcopy(model)
    weft.compress(model, "factorllm", partition="kmeans")
    for name in routed(model):
        whole = units_of(teacher, name)[:36]
        for part in experts_of(model, name):
            places = [(whole == unit).all(1).nonzero() for unit in part]
            assert len({int(place) % 4 for place in places if len(place)}) == 1


def test_what_is_read_and_what_is_stored() -> None:
    student, _ = pair(dtype=torch.float32)
    report = weft.compress(family_model("llama", torch.float32), "factorllm", active=1)
    dense, router = 3 * 37 * 32 * 32, 4 * 33 * 32
    assert [(r.kind, r.size, r.dense, r.bits) for r in report.rows] == [("routed_mlp", 1, dense, dense + router)] * 2
    assert [row.reads for row in report.rows] == [3 * 10 * 32 * 32 + router] * 2  # of the largest expert
    assert report.keep == pytest.approx(1 + router / dense)
    for module in routed(student).values():
        bound = 32**-0.5
        draws = torch.cat([p.detach().flatten() for p in module.inner.router.parameters()])
        assert float(draws.abs().max()) <= bound and float(draws.std()) == pytest.approx(bound / 3**0.5, rel=0.2)
    first, second = (module.inner.router.weight for module in routed(student).values())
    assert not torch.equal(first, second)
    other, _ = pair(dtype=torch.float32, seed=1)
    assert not torch.equal(first, next(iter(routed(other).values())).inner.router.weight)


@pytest.mark.parametrize(
    ("options", "k"),
    [
        ({}, 2),
        ({"experts": 5}, 2),
        ({"active": 3}, 3),
        ({"target_sparsity": 0.7}, 1),
        ({"target_sparsity": 0.99}, 1),
        ({"target_sparsity": 0.25}, 3),
        ({"experts": 10, "target_sparsity": 0.7}, 3),
        ({"active": 1, "target_sparsity": 0.75}, 1),
    ],
    ids=str,
)
def test_how_many_a_token_meets(options: dict[str, Any], k: int) -> None:
    config = FactorllmConfig(**options)
    assert config.k == k and FactorllmConfig(**vars(config)).k == k
    rows = plan(llama(), "factorllm", **options)
    assert rows is not None and [row.size for row in rows] == [k, k]


def test_include_names_the_mlps() -> None:
    student, _ = pair("opt", include=r"model\.decoder\.layers\.1\.mlp")
    assert list(routed(student)) == ["model.decoder.layers.1"]
    with pytest.raises(UsageError, match=r"include='fc1', exclude=None leave nothing; there are: mlp"):
        pair("opt", include="fc1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.5}, "keep=0.5 does not apply: factorllm stores all weights"),
        ({"experts": 1}, "experts=1 must be a whole number of at least 2"),
        ({"experts": 38}, "experts=38: model.layers.0.mlp has 37 units"),
        ({"active": 5}, "active=5: of 4 experts a token meets 1 to 4"),
        ({"active": 0}, "active=0: of 4 experts a token meets 1 to 4"),
        ({"active": 1, "target_sparsity": 0.5}, "target_sparsity=0.5 and active=1 say different things: 1 of 4 is 0.7"),
        ({"target_sparsity": 1}, "target_sparsity=1: a share of the units"),
        ({"partition": "means"}, "partition='means' must be one of contiguous, random, kmeans"),
        ({"prior_input": "dense"}, "prior_input='dense' must be one of teacher, student, chain"),
        ({"route_weight": -1}, "route_weight=-1 must be a number of at least 0"),
        ({"balance_weight": math.inf}, "balance_weight=inf must be a number of at least 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        weft.compress(llama(), "factorllm", **options)


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="Llama, Qwen2, Qwen3 and OPT, and GPT2LMHeadModel has GPT2MLP"):
        weft.compress(gpt2(), "factorllm")


# --- the loss ---------------------------------------------------------------------------------------------------------


def rows(count: int, length: int = 9) -> list[dict[str, list[int]]]:
    """Sequences of unlike length, the prompts of which have no labels."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(1, VOCABULARY, (length - i % 3,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (1 + i % 2) + ids[1 + i % 2 :]})
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    most = max(len(row["input_ids"]) for row in batch)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (most - len(row[key])) for row in batch])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": ids.ne(0).long()}


def trainer(student: Any, teacher: Any, folder: Any, *, options: dict[str, Any] | None = None, **how: Any) -> Any:
    shared = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0}
    shared |= {"save_strategy": "no", "logging_strategy": "no", "train_sampling_strategy": "sequential"}
    args = hf.TrainingArguments(**{**shared, "learning_rate": 1e-2, "max_grad_norm": 0.0, **how})
    return weft.distiller(
        student, teacher, "factorllm", options=options, args=args, train_dataset=rows(8), data_collator=collate
    )


def inputs_of(model: Any, batch: dict[str, torch.Tensor], names: list[str]) -> list[torch.Tensor]:
    """What each MLP receives, tokens × d."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:
        found = model.get_submodule(name)
        at = found.inner if isinstance(found, RoutedMlp) else getattr(found, "gate_proj", None) or found.fc1

        def note(module: Any, inputs: Any, name: str = name) -> None:
            seen[name] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

        handles.append(at.register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


def dense_mlp(teacher: Any, name: str, t: torch.Tensor) -> torch.Tensor:
    """T(t) without its last bias, of the weights."""
    mlp = teacher.get_submodule(name)
    if hasattr(mlp, "fc1"):
        return torch.relu(t @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T
    return (silu(t @ mlp.gate_proj.weight.T) * (t @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def expert(module: RoutedMlp, j: int, t: torch.Tensor) -> torch.Tensor:
    """E_j(t), of the weights."""
    own = module.inner.experts[j]
    if hasattr(own, "fc1"):
        return torch.relu(t @ own.fc1.weight.T + own.fc1.bias) @ own.fc2.weight.T
    return (silu(t @ own.gate_proj.weight.T) * (t @ own.up_proj.weight.T)) @ own.down_proj.weight.T


def added(student: Any, teacher: Any, batch: dict[str, torch.Tensor], config: FactorllmConfig) -> torch.Tensor:
    """0.05·Σ L_PA + 0.01·Σ L_bal, token by token and expert by expert."""
    names = list(routed(student))
    source = teacher if config.prior_input == "teacher" else student
    given = inputs_of(source, batch, names)
    counts = (batch["labels"][:, 1:] != -100)
    n, k = config.experts, config.k
    total, chained = torch.zeros((), dtype=torch.float64), given[0]
    for name, t in zip(names, given):
        module = student.get_submodule(name)
        t = chained if config.prior_input == "chain" else t
        bias = getattr(module.inner, "bias", None)
        y = dense_mlp(teacher, name, t).detach()
        chained = y if bias is None else y + teacher.get_submodule(name).fc2.bias.detach()
        whole = y if bias is None else chained - bias.detach()
        route, balance = [], []
        for i in range(len(t)):
            errors = [float((expert(module, j, t[i]) - whole[i] / (n // k)).square().mean()) for j in range(n)]
            best = sorted(range(n), key=errors.__getitem__)[:k]
            wanted = torch.tensor([1.0 if j in best else 0.0 for j in range(n)], dtype=torch.float64).softmax(0)
            scores = module.inner.router.weight @ t[i] + module.inner.router.bias
            own = scores.softmax(0)
            route.append((own * (own / wanted).log()).sum())
            top = sorted(range(n), key=lambda j: -float(scores[j]))[:k]
            balance.append(sum(own[j] for j in top) / n)
        per = [torch.stack(each).view(len(batch["labels"]), -1)[:, :-1][counts].mean() for each in (route, balance)]
        total = total + config.route_weight * per[0] + config.balance_weight * per[1]
    return total


CASES = [
    ("llama", {}),
    ("llama", {"prior_input": "student", "active": 1}),
    ("llama", {"prior_input": "chain", "active": 3, "partition": "random"}),
    ("opt", {"prior_input": "teacher", "route_weight": 2.0}),
    ("opt", {"prior_input": "student", "balance_weight": 3.0}),
    ("opt", {"prior_input": "chain", "experts": 5}),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_the_loss_and_its_gradients_are_those_written_out(family: str, options: dict[str, Any], tmp_path: Any) -> None:
    """Routers learn of the prior alone, and experts of the task alone."""
    start = {key: value for key, value in options.items() if key in ("experts", "active", "partition")}
    student, teacher = pair(family, **start)
    with torch.no_grad():  # as if they had learnt for a while
        for module in routed(student).values():
            for p in module.inner.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(p))
    student.train()
    batch = collate(rows(4))
    config = FactorllmConfig(**options)
    mine = trainer(student, teacher, tmp_path, options=options).compute_loss(student, dict(batch))
    mask = batch["labels"][:, 1:] != -100
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    task = cross_entropy(logits[mask].float(), batch["labels"][:, 1:][mask])
    beside = added(student, teacher, batch, config)
    assert float(beside.detach()) > 1e-3
    torch.testing.assert_close(mine, (task + beside).to(mine.dtype), rtol=1e-6, atol=1e-6)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == {id(p) for m in routed(student).values() for p in m.inner.parameters()}
    routers = {name: p for name, p in trained.items() if ".router." in name}
    experts = {name: p for name, p in trained.items() if ".router." not in name}
    assert len(routers) == 4 and experts
    ours = dict(zip(trained, torch.autograd.grad(mine, list(trained.values()))))
    for loss, of in ((beside, routers), (task, experts)):
        for name, g in zip(of, torch.autograd.grad(loss, list(of.values()))):
            torch.testing.assert_close(ours[name], g, rtol=1e-5, atol=1e-7, msg=name)
            assert g.any() or ".experts." in name, name  # which no token may have chosen


def test_the_label_has_the_k_least_errors_and_a_router_that_says_it_has_nothing_to_learn() -> None:
    student, teacher = pair(active=3, experts=5)
    module = next(iter(routed(student).values()))
    t = torch.randn(40, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = dense_mlp(teacher, "model.layers.0.mlp", t)
    found = label(module.inner, t, y)
    errors = torch.stack([(expert(module, j, t) - y).square().mean(1) for j in range(5)], 1)
    assert torch.equal(found.sum(1), torch.full((40,), 3.0, dtype=torch.float64))
    for mask, row in zip(found, errors):
        assert row[mask == 1].max() < row[mask == 0].min()

    class Told(torch.nn.Module):
        weight = module.inner.router.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return found + 7.5

    module.inner.router = Told()
    route, balance = learnt(module.inner, t, y)
    assert float(route.abs().max()) < 1e-12
    share = math.e / (3 * math.e + 2)
    torch.testing.assert_close(balance, torch.full((40,), 3 * share / 5, dtype=torch.float64))


def test_a_label_is_soft() -> None:
    soft = torch.tensor([1.0, 1.0, 0.0, 0.0]).softmax(0)
    assert soft.tolist() == pytest.approx([0.3655, 0.3655, 0.1345, 0.1345], abs=1e-4)


def test_in_low_precision_the_divergence_is_taken_in_float32() -> None:
    student, _ = pair(dtype=torch.bfloat16)
    inner = next(iter(routed(student).values())).inner
    t = torch.randn(9, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    route, balance = learnt(inner, t, t)
    assert route.dtype == balance.dtype == torch.float32
    own = inner.router(t).float().softmax(-1)
    wanted = label(inner, t, t).softmax(-1)
    torch.testing.assert_close(route, (own * (own.log() - wanted.log())).sum(-1), rtol=1e-5, atol=1e-6)


def test_experts_and_routers_train_and_nothing_else(tmp_path: Any) -> None:
    student, teacher = pair()
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    trainer(student, teacher, tmp_path, max_steps=2, per_device_train_batch_size=4).train()
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, _ in student.named_parameters() if ".mlp." in name}


def test_without_a_prior_routers_stay_and_the_teacher_is_not_run(tmp_path: Any, monkeypatch: Any) -> None:
    student, teacher = pair()
    start = copy.deepcopy(student.state_dict())
    monkeypatch.setattr(teacher, "forward", None)
    options = {"route_weight": 0.0, "balance_weight": 0.0}
    trainer(student, teacher, tmp_path, options=options, max_steps=2, per_device_train_batch_size=4).train()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, _ in student.named_parameters() if ".experts." in name}


def test_routers_learn_the_labels(tmp_path: Any) -> None:
    student, teacher = pair()
    batch = collate(rows(8))
    config = FactorllmConfig(balance_weight=0.0, route_weight=1.0)
    before = float(added(student, teacher, batch, config).detach())
    options = {"route_weight": 1.0, "balance_weight": 0.0}
    trainer(student, teacher, tmp_path, options=options, max_steps=30, learning_rate=3e-2).train()
    assert float(added(student, teacher, batch, config).detach()) < 0.5 * before


def test_micro_batches_are_one_batch(tmp_path: Any) -> None:
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        student, teacher = pair()
        how = {"max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer(student, teacher, tmp_path, **how).train()
        found.append(student.state_dict())
    for name, t in found[0].items():
        torch.testing.assert_close(found[1][name], t, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("prior", ["teacher", "student", "chain"])
def test_gradient_checkpointing_changes_nothing(prior: str, tmp_path: Any) -> None:
    grads = []
    for checkpointing in (False, True):
        student, teacher = pair()
        made = trainer(student, teacher, tmp_path, options={"prior_input": prior})
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        made.compute_loss(student.train(), collate(rows(4))).backward()
        grads.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g, rtol=1e-6, atol=1e-9, msg=name)


def test_what_has_no_experts_is_refused() -> None:
    with pytest.raises(UsageError, match="factorllm trains experts, and the student has none"):
        objective("factorllm", FactorllmConfig(), llama(), llama())


# --- a routed model is an ordinary model ------------------------------------------------------------------------------


@every_family
def test_it_loads_with_weft_and_not_without(family: str, tmp_path: Any, monkeypatch: Any) -> None:
    model, _ = pair(family, torch.float32)
    save_compressed(model, tmp_path / "out")
    batch = padded()
    loaders = [hf.AutoModelForCausalLM, type(model), hf.AutoModel]
    with torch.no_grad():
        expected = model(**batch).logits
        for loader in loaders[:2]:
            again = loader.from_pretrained(tmp_path / "out")
            assert torch.equal(again(**batch).logits, expected) and len(routed(again)) == 2
        hidden = model.base_model(**batch).last_hidden_state
        assert torch.equal(loaders[2].from_pretrained(tmp_path / "out")(**batch).last_hidden_state, hidden)
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")(**batch).logits, expected)
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert told[0] == told[1]
    specs = told[0]["quantization_config"]["modules"].values()
    assert [(spec["kind"], spec["experts"], spec["active"]) for spec in specs] == [("routed_mlp", 4, 2)] * 2
    narrow = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, "weft")
    for folder, loader in itertools.product(("out", "again"), loaders):
        with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
            loader.from_pretrained(tmp_path / folder)


def test_a_missing_tensor_is_an_error(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_compressed(pair(dtype=torch.float32)[0], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.router.bias"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(weft.WeftError, match=r"misses model\.layers\.1\.mlp\.down_proj\.router\.bias"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@every_family
def test_it_generates_in_a_batch_what_it_does_alone(family: str) -> None:
    """Left padding; each row alone is dispatched token by token, and goes another way through the code."""
    model, _ = pair(family)
    batch = padded()
    wanted = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    together = model.generate(**batch, **wanted)
    for row in range(0, 16, 3):
        real = batch["attention_mask"][row].bool()
        alone = model.generate(input_ids=batch["input_ids"][row][real][None], **wanted)
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_k_of_n_have_no_dense_form(tmp_path: Any) -> None:
    from weft.run import compress as verb

    model, _ = pair(dtype=torch.float32)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp has no dense form: a token meets 2 of 4 experts"):
        to_dense(model)
    assert len(routed(model)) == 2
    given = {"model": "builtin:pycode", "method": "factorllm", "output": "o", "data": "builtin:stdlib", "dense": True}
    with pytest.raises(UsageError, match="factorllm makes layers that are no linear maps"):
        verb.outline(verb.request(given), llama())
    assert verb.outline(verb.request(given | {"active": 4, "guard": False}), llama()).rows


def test_its_layers_can_be_compressed_again_adapted_and_trained(tmp_path: Any) -> None:
    import peft

    model, _ = pair(dtype=torch.float32, active=4, guard=False)
    report = weft.compress(model, "svd", keep=0.5, include=["gate_proj", "q_proj"])
    assert report.replaced == 10
    save_compressed(model, tmp_path / "out")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = padded()
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(again(**batch).logits, expected)
        dense = to_dense(copy.deepcopy(again))
        assert torch.allclose(dense(**batch).logits, expected, atol=1e-3)
    model, _ = pair(dtype=torch.float32)
    before = model(**batch).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    names = adapted.targeted_module_names
    assert len(names) == 2 * (4 + 3 * 4) and not any("router" in name for name in names)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name and ".experts.0." in name:
                p.fill_(0.1)
    assert not torch.allclose(adapted(**batch).logits, before, atol=1e-3)
    with pytest.raises(UsageError, match="has an adapter on it|has no dense form"):
        to_dense(adapted.base_model.model)


def test_a_second_call_finds_nothing_left() -> None:
    model, _ = pair(dtype=torch.float32)
    with pytest.raises(UsageError, match="factorllm knows the MLPs"):
        weft.compress(model, "factorllm")


def test_other_methods_find_their_layers_in_the_models_it_leaves() -> None:
    model, _ = pair(dtype=torch.float32)
    report = weft.compress(model, "modegpt", keep=0.8, data=batches(model))
    assert {row.name.rpartition(".")[2] for row in report.rows} == {"qk", "vo"}
