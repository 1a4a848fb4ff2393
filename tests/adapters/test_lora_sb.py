"""LoRA-SB against its specification, with gradients found here by autograd in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.adapters._delta import leaves
from weft.adapters.lora_sb import LoraSbDelta, first_step


class Net(nn.Module):
    """Odd sides, running statistics, and dropout where asked for; the loss is a mean."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(7, 13)
        self.norm = nn.BatchNorm1d(13)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(13, 5, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        y = self.second(self.drop(torch.tanh(self.norm(self.first(x)))))
        loss = None if labels is None else nn.functional.mse_loss(y, labels)
        return SimpleNamespace(loss=loss, logits=y)


def batches(count: int = 2, rows: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"x": torch.randn(rows, 7, generator=generator), "labels": torch.randn(rows, 5, generator=generator)}
        for _ in range(count)
    ]


def config(**options) -> weft.LoraSbConfig:
    return weft.LoraSbConfig(**{"r": 3, "eta": 1e-3, "target_modules": ["first", "second"], **options})


def attach(net: nn.Module, given=None, **options) -> tuple[PeftModel, list[LoraSbDelta]]:
    made = weft.prepare(net, config(**options), batches=given or batches())
    model = get_peft_model(net, made)
    return model, [d for m in model.modules() if hasattr(m, "deltas") for d in leaves(m.deltas["default"])]


def gradients(net: nn.Module, given: list[dict[str, Tensor]]) -> list[Tensor]:
    """Sums of the two weights' gradients, each batch's loss alike, in float64 and training mode."""
    plain = copy.deepcopy(net).double().train()
    for batch in given:
        plain(**{k: v.double() for k, v in batch.items()}).loss.backward()
    return [plain.first.weight.grad, plain.second.weight.grad]


@pytest.mark.parametrize("r", [1, 3, 5])
def test_the_start_is_the_best_approximation_of_the_first_step(r):
    net = Net()
    sums = gradients(net, batches())
    _, deltas = attach(net, r=r)
    for d, g in zip(deltas, sums, strict=True):
        step = -1e-3 * torch.sign(g)
        s = torch.linalg.svdvals(step)
        error = (d.delta().detach().double() - step).square().sum()
        torch.testing.assert_close(error, s[r:].square().sum(), rtol=1e-4, atol=1e-12)
        one = torch.eye(r)
        torch.testing.assert_close(d.B.mT @ d.B, one, rtol=0, atol=1e-5)
        torch.testing.assert_close(d.A @ d.A.mT, one, rtol=0, atol=1e-5)
        core = d.R.detach()
        assert torch.equal(core, torch.diag(core.diagonal())) and (core.diagonal() >= 0).all()
        assert (core.diagonal().diff() <= 0).all() and d.count() == core.numel() == r * r


def test_a_rank_one_gradient_gives_the_whole_first_step():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(7, 5)

        def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=nn.functional.mse_loss(self.first(x), labels))

    one, batch = One(), batches(1, rows=1)[0]
    one(**batch).loss.backward()
    sign = torch.sign(one.first.weight.grad)
    one.zero_grad()
    assert sign.all()
    _, (d,) = attach(one, [batch], r=1, target_modules=["first"])
    torch.testing.assert_close(d.delta().detach(), -1e-3 * sign, rtol=1e-5, atol=0)


def test_a_step_on_the_core_is_the_projected_full_step():
    net = Net()
    model, deltas = attach(net)
    model.eval()
    batch = batches(1)[0]
    plain = Net().double().eval()
    for name, d in zip(("first", "second"), deltas, strict=True):
        getattr(plain, name).weight.data += d.delta().detach().double()
    plain(**{k: v.double() for k, v in batch.items()}).loss.backward()
    before = [d.delta().detach() for d in deltas]
    model(**batch).loss.backward()
    torch.optim.SGD([d.R for d in deltas], lr=0.5).step()
    for name, d, w in zip(("first", "second"), deltas, before, strict=True):
        g, u, v = getattr(plain, name).weight.grad, d.B.double(), d.A.double()
        moved = (d.delta().detach() - w).double()
        torch.testing.assert_close(moved, -0.5 * u @ u.mT @ g @ v.mT @ v, rtol=1e-4, atol=1e-7)


def test_preparing_leaves_the_model_as_it_was():
    net = Net(dropout=0.5)
    net.second.weight.requires_grad_(False)
    net.first.weight.grad = torch.ones(13, 7)
    net.drop.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    made = weft.prepare(net, config(), batches=batches())
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert torch.equal(net.first.weight.grad, torch.ones(13, 7)) and net.second.weight.grad is None
    assert net.first.weight.requires_grad and not net.second.weight.requires_grad and net.first.bias.requires_grad
    assert net.training and not net.drop.training
    again = weft.prepare(net, config(), batches=batches())
    assert all(
        torch.equal(a, b) for n in made.prepared for a, b in zip(made.prepared[n], again.prepared[n], strict=True)
    )
    model = get_peft_model(net, made)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"R"}
    assert torch.equal(model.base_model.model.first.base_layer.weight, state["first.weight"])


def test_gradients_are_freed_as_soon_as_they_are_summed():
    net, held = Net(), []
    net.first.weight.register_hook(lambda g: held.append(net.second.weight.grad))  # the last of the backward pass
    weft.prepare(net, config(), batches=batches(3))
    assert held == [None] * 3 and net.first.weight.grad is None


def test_the_loss_on_the_samples_falls():
    given = batches(1, rows=40)
    net = Net().train()
    before = float(net(**given[0]).loss)
    model, _ = attach(net, given, eta=1e-3)
    assert float(model.train()(**given[0]).loss) < before


def test_a_sketch_is_close_to_the_exact_factors():
    g = torch.randn(60, 4, generator=torch.Generator().manual_seed(3)) @ torch.randn(4, 50)
    exact, sketch = (b @ r @ a for b, r, a in (first_step(g, 1.0, 4), first_step(g, 1.0, 4, "sketch")))
    assert float((exact - sketch).norm() / exact.norm()) < 0.05
    assert not torch.equal(exact, sketch)


def test_blocks_and_experts_have_factors_of_their_own():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(2, 4, 6))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.c_attn, self.experts = Conv1D(15, 6), Experts()

        def forward(self, x: Tensor) -> SimpleNamespace:
            experts = x @ self.experts.weights.mT
            return SimpleNamespace(loss=self.c_attn(x).square().sum() + experts.square().sum())

    net, x = Attention(), torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    net(x).loss.backward()
    fused, experts = net.c_attn.weight.grad.T, net.experts.weights.grad
    net.zero_grad()
    options = {"target_modules": ["c_attn"], "target_parameters": ["experts.weights"], "split_qkv": True}
    made = weft.prepare(net, config(r=2, **options), batches=[{"x": x}])
    wanted = {f"c_attn#{i}": g for i, g in enumerate(fused.split(5))}
    wanted |= {f"experts.weights#{i}": g for i, g in enumerate(experts)}
    assert set(made.prepared) == set(wanted)
    for name, g in wanted.items():
        b, r, a = made.prepared[name]
        u, s, vh = torch.linalg.svd(-1e-3 * torch.sign(g))
        torch.testing.assert_close(b @ r @ a, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-8)
    model = get_peft_model(net, made)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5 * 4
    assert not made.prepared  # handed over


def test_a_saved_adapter_needs_no_data(tmp_path):
    model, deltas = attach(Net().eval())
    deltas[0].R.data += 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net().eval(), tmp_path).eval()
    x = batches(1)[0]["x"]
    assert torch.equal(again(x).logits, model.eval()(x).logits)
    floats = sum(t.numel() for d in deltas for t in (d.A, d.B, d.R))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * floats + 6 * 256


def test_the_first_step_is_that_of_the_warm_up():
    assert weft.LoraSbConfig(learning_rate=2e-3, warmup_ratio=0.1, total_steps=400).step_size() == 2e-3 / 40
    assert weft.LoraSbConfig(learning_rate=2e-3, warmup_ratio=0.0).step_size() == 2e-3
    assert weft.LoraSbConfig(eta=5e-4).step_size() == 5e-4


def test_attaching_without_or_with_other_data_is_refused():
    with pytest.raises(weft.UsageError, match="batches"):
        weft.prepare(Net(), config())
    with pytest.raises(weft.UsageError, match="weft.prepare"):
        get_peft_model(Net(), config())
    made = weft.prepare(Net(), config(r=2), batches=batches())
    made.r = 3
    with pytest.raises(weft.UsageError, match="prepared for another r"):
        get_peft_model(Net(), made)


def test_samples_that_give_no_first_step_are_refused():
    with pytest.raises(weft.UsageError, match="labels"):
        weft.prepare(Net(), config(), batches=[{"x": torch.ones(4, 7)}])
    broken = batches(1)
    broken[0]["labels"][0, 0] = float("nan")
    with pytest.raises(weft.WeftError, match="gradient of first .* not finite"):
        weft.prepare(Net(), config(), batches=broken)
    net = Net()
    net.third = nn.Linear(5, 5)
    with pytest.raises(weft.UsageError, match="no gradient reached third"):
        weft.prepare(net, config(target_modules="all-linear"), batches=batches())
    assert net.first.weight.grad is None and net.first.bias.requires_grad  # put back though it failed


@pytest.mark.parametrize(
    "options, sentence",
    [({"eta": 0.0}, "eta"), ({"warmup_ratio": 2.0}, "warmup_ratio"), ({"svd": "fast"}, "svd"), ({"r": 0}, "r=0")],
)
def test_values_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(weft.UsageError, match=sentence):
        config(**options)


def test_a_skeleton_is_counted_without_data():
    with torch.device("meta"):
        net = Net()
    model = get_peft_model(net, config(r=4))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * 4
