"""DiffoRA's search and choice against gradients, Adam and LoRA written out in float64."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import SixLayers, llama
from torch import Tensor, nn
from transformers import TrainingArguments

import weft
from weft.adapters.diffora import OWN, SEARCHED, SHARED, UNUSED, DifforaController, DifforaDelta, kept, place


class Net(nn.Module):
    """Two layers of two modules each, with running statistics and dropout where asked for."""

    def __init__(self, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(7, 9), "down": nn.Linear(9, 7)}) for _ in "ab")
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        for layer in self.layers:
            x = x + self.drop(layer["down"](torch.tanh(layer["up"](x))))
        x = self.norm(x)
        return SimpleNamespace(logits=x, loss=None if labels is None else (x - labels).pow(2).mean())


def batch(seed: int, rows: int = 6) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {k: torch.randn(rows, 7, generator=source, dtype=torch.float64) for k in ("x", "labels")}


HELD_OUT = [batch(100), batch(101), batch(102)]


def attach(base: nn.Module | None = None, **options: object) -> tuple[nn.Module, DifforaController, list[DifforaDelta]]:
    """A float64 model in training mode, its controller and its deltas."""
    base = base or Net()
    torch.manual_seed(1)
    options = {"r": 3, "search_steps": 3, "target_modules": ["up", "down"], **options}
    config = weft.prepare(base, weft.DifforaConfig(**options), held_out=HELD_OUT)
    model = peft.get_peft_model(base, config).double().train()
    deltas = [d for d in model.modules() if isinstance(d, DifforaDelta)]
    return model, deltas[0].controller, deltas  # type: ignore[return-value]


def randomise(deltas: list[DifforaDelta]) -> None:
    for d in deltas:
        nn.init.normal_(d.B, std=0.3)


def optimizer_of(model: nn.Module, steps: int = 20, **options: object) -> torch.optim.Optimizer:
    args = TrainingArguments(
        "unused", max_steps=steps, report_to="none", use_cpu=True,
        **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", **options},
    )  # fmt: skip
    return weft.optimizer_and_scheduler(model, args)[0]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(**batch(seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def uses(deltas: list[DifforaDelta]) -> list[int]:
    return [int(d.use) for d in deltas]


# --- the layer ----------------------------------------------------------------------------------------------------


def test_no_gate_moves_the_start_and_none_has_a_gradient_there() -> None:
    model, controller, deltas = attach()
    expected = Net().double()(**batch(0)).logits
    for value in (0.5, 0.1, 1.0):
        for d in deltas:
            d.settle(SEARCHED, value)
        assert torch.equal(model(**batch(0)).logits, expected)
    with torch.enable_grad():
        assert not controller._gradient(torch.full((4,), 0.5, dtype=torch.float64)).any()


def test_gates_of_one_are_lora_and_of_zero_the_base() -> None:
    model, _, deltas = attach(Net(), lora_alpha=5.0)
    randomise(deltas)
    x = batch(0)["x"]
    base = Net().double()
    for gate in (1.0, 0.3, 0.0):
        for d in deltas:
            d.settle(SEARCHED, gate)
        y = x
        for i, layer in enumerate(base.layers):
            up, down = deltas[2 * i : 2 * i + 2]
            h = torch.tanh(layer["up"](y) + gate * 5 / 3 * y @ up.A.T @ up.B.T)
            y = y + layer["down"](h) + gate * 5 / 3 * h @ down.A.T @ down.B.T
        torch.testing.assert_close(model(x).logits, y, rtol=1e-10, atol=1e-12)


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax_row"])
def test_the_gradient_of_a_is_that_of_the_held_out_loss(relaxation) -> None:
    """Against central differences of the held-out loss in a."""
    model, controller, deltas = attach(relaxation=relaxation, arch_weight_decay=0.0)
    randomise(deltas)
    controller.a = torch.tensor([0.3, -0.2, 0.1, 0.7], dtype=torch.float64)
    controller.step = 1  # the second batch

    def loss(a: Tensor) -> float:
        gates = torch.sigmoid(a) if relaxation == "sigmoid" else torch.softmax(a.view(2, 2), 1).flatten()
        for d, gate in zip(deltas, gates.tolist()):
            d.settle(SEARCHED, gate)
        return float(model(**HELD_OUT[1]).loss)

    expected = torch.zeros(4, dtype=torch.float64)
    for i, e in enumerate(1e-5 * torch.eye(4, dtype=torch.float64)):
        expected[i] = (loss(controller.a + e) - loss(controller.a - e)) / 2e-5
    loss(controller.a)
    with torch.no_grad():
        controller.after_step()
    torch.testing.assert_close(controller.m, 0.5 * expected, rtol=1e-6, atol=1e-10)  # (1 − β₁)·gradient
    assert expected.abs().min() > 0


def test_a_is_stepped_by_adam_with_decay_in_its_gradient(monkeypatch) -> None:
    _, controller, _ = attach(search_steps=9, arch_lr=0.03, arch_weight_decay=0.1)
    given = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([reference], lr=0.03, betas=(0.5, 0.999), weight_decay=0.1)
    for g in given:
        monkeypatch.setattr(controller, "_gradient", lambda gates, g=g: g)
        gate = torch.sigmoid(reference.detach())
        reference.grad = g * gate * (1 - gate)
        adam.step()
        controller.finished(None)
        torch.testing.assert_close(controller.a, reference.detach(), rtol=1e-12, atol=1e-14)
        for d, f in zip(controller.deltas, torch.sigmoid(controller.a).tolist()):
            assert float(d.gate) == f


def test_the_validation_step_changes_a_only() -> None:
    model, controller, deltas = attach(Net(norm=True, dropout=0.4))
    randomise(deltas)
    model(**batch(0)).loss.backward()
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("gate")}
    grads = [d.B.grad.clone() for d in deltas]
    stream = torch.random.get_rng_state()
    with torch.no_grad():
        controller.after_step()
    assert controller.a.abs().min() > 0
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())  # running statistics as well
    assert all(torch.equal(d.B.grad, g) for d, g in zip(deltas, grads))
    assert torch.equal(torch.random.get_rng_state(), stream)


def test_the_training_step_changes_the_pairs_only(monkeypatch) -> None:
    model, controller, deltas = attach(arch_weight_decay=0.0)
    monkeypatch.setattr(controller, "_gradient", lambda gates: torch.zeros_like(gates))
    optimizer = optimizer_of(model)
    controller.a = torch.tensor([0.3, -0.2, 0.1, 0.7], dtype=torch.float64)
    before, pairs = controller.a.clone(), [d.B.detach().clone() for d in deltas]
    step(model, optimizer, 0)
    assert torch.equal(controller.a, before)
    assert all(not torch.equal(d.B, b) for d, b in zip(deltas, pairs))


def test_the_search_is_a_tenth_of_the_run_but_ten_and_never_more_than_half() -> None:
    _, controller, _ = attach(search_steps=None)
    found = {}
    for controller.total_steps in (None, 3, 16, 60, 1000):
        found[controller.total_steps] = controller.search_length()
    assert found == {None: 100, 3: 1, 16: 8, 60: 10, 1000: 100}
    assert attach(search_steps=7)[1].search_length() == 7


def test_a_search_as_long_as_the_run_is_told(caplog) -> None:
    model, _, _ = attach(search_steps=5)
    step(model, optimizer_of(model, steps=5), 0)
    assert "searches for 5 steps of 5" in caplog.text


# --- the choice ---------------------------------------------------------------------------------------------------


def test_layers_and_types_are_told_by_the_first_number() -> None:
    assert place("model.layers.3.mlp.up_proj") == ("model.layers.3", "model.layers.*.mlp.up_proj")
    assert place("h.0.attn.c_attn#2") == ("h.0", "h.*.attn.c_attn#2")
    assert place("layers.1.experts.4.up") == ("layers.1", "layers.*.experts.4.up")
    assert place("first") == ("", "first") and place("conv2d.w1") == ("", "conv2d.w1")
    assert place("12") == ("12", "*")


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 40), tenths=st.integers(1, 10))
def test_the_share_is_rounded_up_exactly(count, tenths) -> None:
    assert kept(tenths / 10, count) == -(-tenths * count // 10)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(a=st.lists(st.integers(-2, 2), min_size=4, max_size=4), rho=st.sampled_from([0.25, 0.5, 0.75]))
def test_the_largest_of_each_row_are_chosen_and_ties_go_to_the_first(a, rho) -> None:
    for selection, rows in (("row", [[0, 1], [2, 3]]), ("global", [[0, 1, 2, 3]])):
        _, controller, deltas = attach(rho=rho, selection=selection)
        if not controller.searching:
            assert selection == "row" and rho == 0.75  # both of every two
            continue
        controller.a = torch.tensor(a, dtype=torch.float64)
        with torch.no_grad():
            controller._choose()
        chosen = {i for i, use in enumerate(uses(deltas)) if use == OWN}
        for row in rows:
            order = sorted(row, key=lambda i: -a[i])  # Python's sort keeps ties in order
            assert chosen & set(row) == set(order[: math.ceil(rho * len(row))])


def test_a_share_of_one_is_lora() -> None:
    model, controller, deltas = attach(rho=1.0, lora_alpha=6.0)
    assert not controller.searching and all(float(d.gate) == 1 and not d.owner for d in deltas)
    lora = peft.get_peft_model(
        Net(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"])
    ).double().train()  # fmt: skip
    theirs = [m for m in lora.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for m, d in zip(theirs, deltas):
        m.lora_A["default"].weight.data.copy_(d.A)
    optimizers = optimizer_of(model), torch.optim.AdamW(
        [p for p in lora.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )  # fmt: skip
    for i in range(6):
        for one, optimizer in zip((model, lora), optimizers):
            step(one, optimizer, i)
    for m, d in zip(theirs, deltas):
        torch.testing.assert_close(d.B, m.lora_B["default"].weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(d.A, m.lora_A["default"].weight, rtol=1e-9, atol=1e-12)


def test_where_nothing_can_be_left_out_it_is_said(caplog) -> None:
    attach(SixLayersWithLoss(), target_modules=SixLayers.names)
    assert "keeps every module" in caplog.text and "selection=global" in caplog.text


def chosen(restart: bool = True, steps: int = 3, **options: object):
    """Past the choice: a layer keeps "up", the other "down"."""
    model, controller, deltas = attach(restart=restart, **options)
    controller.a = torch.tensor([9.0, 1.0, 1.0, 9.0], dtype=torch.float64)
    optimizer = optimizer_of(model)
    for i in range(steps):
        step(model, optimizer, i)
    return model, controller, deltas, optimizer


def test_the_chosen_start_anew_and_the_others_share() -> None:
    model, controller, deltas, optimizer = chosen()
    assert uses(deltas) == [OWN, SHARED, SHARED, OWN] and controller.held is None
    for d in (deltas[0], deltas[3]):
        assert not d.B.any() and d.A.abs().max() <= 1 / math.sqrt(d.in_) and d.A.std() > 0.4 / math.sqrt(d.in_)
    before = [(d.A.detach().clone(), d.B.detach().clone()) for d in deltas]
    model(**batch(7)).loss.backward()
    grads = {p: p.grad.clone() for d in deltas for p in d.parameters() if p.grad is not None}
    step(model, optimizer, 7)
    for i in (1, 2):  # closed: no gradient, decay or momentum
        assert not grads[deltas[i].A].any() and not grads[deltas[i].B].any()
        assert torch.equal(deltas[i].A, before[i][0]) and torch.equal(deltas[i].B, before[i][1])
    for p in (deltas[0].B, deltas[3].B, deltas[0].B_s, deltas[1].B_s):  # as the first step of a fresh Adam
        twice = 2 * grads[p]  # of the batch before, and once more in `step`
        torch.testing.assert_close(p.detach(), -1e-2 * twice / (twice.abs() + 1e-8), rtol=1e-6, atol=1e-10)
        assert optimizer.state[p]["step"] == 1


def test_kept_pairs_do_not_jump() -> None:
    model, controller, deltas, optimizer = chosen(restart=False, steps=2, weight_sharing="none")
    optimizer.param_groups[0]["lr"] = 0.0
    layer, x = model.base_model.model.layers[0]["up"], batch(3)["x"]
    before, gate = layer(x), float(deltas[0].gate)
    step(model, optimizer, 2)
    assert uses(deltas) == [OWN, UNUSED, UNUSED, OWN] and 0 < gate < 1 == float(deltas[0].gate)
    # the gate was trained once more before it was folded in
    trained = layer.base_layer(x) + torch.sigmoid(controller.a[0]) / gate * (before - layer.base_layer(x))
    torch.testing.assert_close(layer(x), trained, rtol=1e-10, atol=1e-12)


def test_without_sharing_the_others_are_the_base() -> None:
    model, _, deltas, _ = chosen(weight_sharing="none")
    assert not any(d.owner or hasattr(d, "A_s") for d in deltas)
    model.eval()
    assert deltas[1].factors()[0].shape == (7, 0)
    x = torch.randn(3, 9, dtype=torch.float64)
    layer = model.base_model.model.layers[0]["down"]
    assert torch.equal(layer(x), layer.base_layer(x))


# --- shared pairs -------------------------------------------------------------------------------------------------


def test_a_shared_pair_is_one_parameter(tmp_path) -> None:
    base = llama()
    torch.manual_seed(3)
    ids = torch.arange(12).reshape(2, 6)
    held_out = [{"input_ids": ids, "labels": ids}]
    config = weft.DifforaConfig(r=3, search_steps=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, weft.prepare(base, config, held_out=held_out)).train()
    deltas = [d for d in model.modules() if isinstance(d, DifforaDelta)]
    pair = [deltas[0].A_s, deltas[0].B_s]
    assert deltas[2].owner[0] is deltas[0] and not hasattr(deltas[2], "A_s")
    per_module = [3 * (32 + 32), 3 * (32 + 16)] * 2
    total = sum(per_module) + 3 * (32 + 32) + 3 * (32 + 16)
    assert model.get_nb_trainable_parameters()[0] == sum(d.count() for d in deltas) == total
    assert sum(d.spare() for d in deltas) == total - sum(per_module)
    optimizer = optimizer_of(model)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert [held.count(id(p)) for p in pair] == [1, 1] and len(held) == len(set(held)) == 12

    deltas[0].controller.a = torch.tensor([0.0, 1, 0, 1], dtype=torch.float64)  # v_proj is chosen, q_proj shares
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert uses(deltas) == [SHARED, OWN, SHARED, OWN] and deltas[0].A_s is pair[0] and pair[1].any()
    model.eval()
    q, again = (d.delta().detach() for d in (deltas[0], deltas[2]))
    assert torch.equal(q, again) and torch.equal(q, 16 / 3 * pair[1].detach() @ pair[0].detach())
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    large = {k.partition("layers.")[2]: t.shape for k, t in tensors.items() if t.numel() > 1}
    assert sum(shape.numel() for shape in large.values()) == sum(per_module[1::2]) + 3 * (32 + 32) * 1 + 3 * (32 + 16)
    assert sum(k.endswith("q_proj.weft_diffora_delta.A_s") for k in large) == 1
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    twin = copy.deepcopy(model)
    copied = [d for d in twin.modules() if isinstance(d, DifforaDelta)]
    assert copied[2].owner[0] is copied[0] is not deltas[0]

    weft.export(model, tmp_path / "lora", to="lora")  # written out once a module
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_type_that_occurs_once_shares_with_nobody() -> None:
    _, _, deltas = attach(target_modules=["layers.0.up", "layers.0.down", "layers.1.up"], selection="global")
    assert [bool(d.owner) for d in deltas] == [True, False, True] and not hasattr(deltas[1], "A_s")


# --- what is refused ----------------------------------------------------------------------------------------------


def test_it_must_be_prepared_on_the_model_that_it_adapts() -> None:
    config = weft.DifforaConfig(r=3, target_modules=["up", "down"])
    with pytest.raises(weft.UsageError, match=r"layers.0.up.*weft.prepare.*held_out"):
        peft.get_peft_model(Net(), config)
    with pytest.raises(weft.UsageError, match="holds no batch"):
        weft.prepare(Net(), config, held_out=[])
    model = peft.get_peft_model(Net(), weft.prepare(Net().double(), config, held_out=HELD_OUT)).double().train()
    with pytest.raises(weft.UsageError, match="another model"):
        step(model, optimizer_of(model), 0)


def test_held_out_batches_need_labels() -> None:
    base = Net()
    config = weft.prepare(
        base, weft.DifforaConfig(r=3, target_modules=["up", "down"]), held_out={"x": HELD_OUT[0]["x"]}
    )
    model = peft.get_peft_model(base, config).double().train()
    with pytest.raises(weft.UsageError, match="must carry labels"):
        step(model, optimizer_of(model), 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rho": 0.0}, "rho=0.0: the share"),
        ({"rho": 1.5}, "rho=1.5: the share"),
        ({"search_steps": 0}, "search_steps=0"),
        ({"arch_lr": 0.0}, "arch_lr=0.0"),
        ({"arch_weight_decay": -1.0}, "arch_weight_decay=-1.0"),
        ({"relaxation": "hard"}, "use sigmoid or softmax_row"),
        ({"selection": "layer"}, "use row or global"),
        ({"weight_sharing": "all"}, "use shared_pair or none"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        weft.DifforaConfig(**options)


# --- the claim ----------------------------------------------------------------------------------------------------


class SixLayersWithLoss(SixLayers):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        y = super().forward(x)
        return SimpleNamespace(logits=y, loss=None if labels is None else (y - labels).pow(2).mean())


def fit(seed: int, forced: tuple[int, int] | None = None, steps: int = 400) -> tuple[set[int], float]:
    """Two of six modules must move by an update of rank 4; which were kept, and the loss on new rows."""
    torch.manual_seed(seed)
    base, wanted = SixLayersWithLoss(), SixLayersWithLoss()
    with torch.no_grad():
        for i, (moved, layer) in enumerate(zip(wanted.layers, base.layers)):
            u, v = torch.linalg.qr(torch.randn(12, 4)).Q, torch.linalg.qr(torch.randn(16, 4)).Q
            moved.weight.copy_(layer.weight + (u @ v.T if i in (1, 4) else 0))

        def rows(count: int, noise: float) -> dict[str, Tensor]:
            x = torch.randn(count, 16)
            return {"x": x, "labels": wanted(x).logits + noise * torch.randn(6, count, 12)}

        train, held_out, test = rows(64, 0.1), rows(64, 0.1), rows(512, 0.0)
    config = weft.DifforaConfig(r=4, rho=1 / 3, selection="global", target_modules=SixLayers.names)
    model = peft.get_peft_model(base, weft.prepare(base, config, held_out=[held_out])).train()
    deltas = [d for d in model.modules() if isinstance(d, DifforaDelta)]
    optimizer = optimizer_of(model, steps, learning_rate=5e-3, lr_scheduler_type="linear")
    for i in range(steps):
        if forced and i == 39:  # the last step of the search
            deltas[0].controller.a = torch.tensor([float(k in forced) for k in range(6)], dtype=torch.float64)
        optimizer.zero_grad()
        model(**train).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return {i for i, use in enumerate(uses(deltas)) if use == OWN}, float(model(**test).loss)


@pytest.mark.slow
def test_it_selects_the_modules_that_must_move_and_beats_a_random_choice() -> None:
    right = 0
    for seed in range(5):
        found, loss = fit(seed)
        right += found == {1, 4}
        other, random_loss = fit(seed, forced=[(0, 3), (1, 2), (4, 5), (2, 3), (0, 1)][seed])
        assert other != found and loss < 0.2 * random_loss
    assert right >= 4
