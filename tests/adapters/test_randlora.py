"""RandLoRA against PEFT's, and against sums written out in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import Tensor, nn

import weft
from weft.adapters._delta import leaves
from weft.adapters.randlora import RandloraDelta, ScaledA, draw


class Net(nn.Module):
    """A wide, a tall and a square linear layer; d of the largest is 13 although no layer's smaller side is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(7, 13)
        self.second = nn.Linear(13, 11, bias=False)
        self.third = nn.Linear(11, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


NAMES = ("first", "second", "third")


def attach(net: nn.Module | None = None, **options) -> tuple[PeftModel, list[RandloraDelta]]:
    model = get_peft_model(net or Net(), weft.RandloraConfig(**{"r": 4, **options}))
    return model, [d for m in model.modules() if hasattr(m, "deltas") for d in leaves(m.deltas["default"])]


def inputs(n: int = 5) -> Tensor:
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(2))


def move(deltas: list[RandloraDelta]) -> None:
    generator = torch.Generator().manual_seed(3)
    for d in deltas:
        for p in (d.lam, d.gamma):
            p.data += 0.1 * torch.randn(p.shape, generator=generator)


def bases(d: RandloraDelta) -> tuple[Tensor, Tensor]:
    """A (r × d) and B (n × D × r) of one layer, float64."""
    cpu = torch.device("cpu")
    a, b = d.basis_a.tensor(cpu).double(), d.basis_b.tensor(cpu).double()
    return a[:, : d.small], b.unflatten(1, (-1, d.r))[: d.large, : d.n].permute(1, 0, 2)


def expected(d: RandloraDelta, lam: Tensor, gamma: Tensor, scale: float, paper: bool) -> Tensor:
    """ΔW, one entry of the sum at a time."""
    a, b = bases(d)
    m = torch.zeros(d.large, d.small, dtype=torch.float64)
    for q in range(d.n * d.r):
        column, k = divmod(q, d.r)  # column q of the stacked B belongs to base q div r
        row_k, j = (k, column) if paper else divmod(q, d.n)  # row q of the stacked A
        m = m + torch.outer(b[column, :, k], lam[row_k, j] * a[row_k] * gamma[j])
    return scale * (m if d.small == d.in_ else m.mT)


@pytest.mark.parametrize("entries", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("r", [1, 3, 7])
def test_it_is_peft_s_to_rounding(entries, r):
    model, deltas = attach(r=r, entries=entries, lora_alpha=10.0, seed=6)
    oracle = get_peft_model(
        Net(),
        RandLoraConfig(
            r=r,
            randlora_alpha=10,
            projection_prng_key=6,
            target_modules=list(NAMES),
            sparse=entries == "sparse",
            very_sparse=entries == "very_sparse",
        ),
    )
    cpu = torch.device("cpu")
    their_a = oracle.base_model.randlora_A["default"].float().squeeze(1)
    assert torch.equal(deltas[0].basis_a.tensor(cpu), their_a)
    assert torch.equal(deltas[0].basis_b.tensor(cpu), oracle.base_model.randlora_B["default"].float().flatten(1))
    for name, d in zip(NAMES, deltas, strict=True):
        layer = getattr(oracle.base_model.model, name)
        torch.testing.assert_close(d.gamma, layer.randlora_gamma["default"])
        assert torch.equal(d.lam, layer.randlora_lambda["default"])
        assert d.count() == sum(p.numel() for n, p in layer.named_parameters() if "randlora" in n)
    move(deltas)
    for name, d in zip(NAMES, deltas, strict=True):
        layer = getattr(oracle.base_model.model, name)
        layer.randlora_lambda["default"].data.copy_(d.lam)
        layer.randlora_gamma["default"].data.copy_(d.gamma)
    torch.testing.assert_close(model(inputs()), oracle(inputs()), rtol=1e-4, atol=1e-4)
    assert float((oracle(inputs()) - Net()(inputs())).norm()) > 0.1
    model(inputs()).square().sum().backward()
    oracle(inputs()).square().sum().backward()
    for name, d in zip(NAMES, deltas, strict=True):
        layer = getattr(oracle.base_model.model, name)
        for mine, theirs in ((d.lam, layer.randlora_lambda["default"]), (d.gamma, layer.randlora_gamma["default"])):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.norm()))


@pytest.mark.parametrize("pairing", ["peft", "paper"])
@pytest.mark.parametrize("scale", ["peft", "authors"])
def test_delta_is_the_sum_written_out(pairing, scale):
    _, deltas = attach(pairing=pairing, scale=scale, lora_alpha=8.0)
    move(deltas)
    for d in deltas:
        s = 8.0 / 4 / (d.n**0.5 if scale == "authors" else 1)
        wanted = expected(d, d.lam.detach().double(), d.gamma.detach().double(), s, pairing == "paper")
        torch.testing.assert_close(d.delta().double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.linalg.matrix_rank(d.delta(), rtol=1e-5) == min(d.out, d.in_)  # full, though 4 divides none


def test_a_tall_layer_is_the_transpose_of_the_wide_one():
    for pairing in ("peft", "paper"):
        net = nn.ModuleDict({"tall": nn.Linear(10, 15), "wide": nn.Linear(15, 10)})
        _, (tall, wide) = attach(net, pairing=pairing)
        move([tall])
        wide.load_state_dict(tall.state_dict())
        torch.testing.assert_close(tall.delta(), wide.delta().mT)
        assert torch.linalg.matrix_rank(tall.delta(), rtol=1e-5) == 10


def test_only_lambda_learns_in_the_first_step():
    model, deltas = attach()
    assert torch.equal(model(inputs()), Net()(inputs()))
    model(inputs()).square().sum().backward()
    for d in deltas:
        assert not d.delta().any() and not d.gamma.grad.any() and d.lam.grad.all()
        assert float(d.gamma[0, 0]) == pytest.approx(1 / max(d.n, d.small))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.booleans())
def test_the_written_backward_is_autograd_s(r, n, d, paper):
    generator = torch.Generator().manual_seed(r * 100 + n * 10 + d)
    a, lam, gamma = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((r, d), (r, n), (n, d)))
    lam.requires_grad_()
    gamma.requires_grad_()
    made = ScaledA.apply(a, lam, gamma, paper)
    plain = torch.einsum("kj,ki,ji->jki" if paper else "kj,ki,ji->kji", lam, a, gamma)
    torch.testing.assert_close(made, plain, rtol=1e-12, atol=1e-12)
    g = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    for one, two in zip(
        torch.autograd.grad(made, (lam, gamma), g), torch.autograd.grad(plain, (lam, gamma), g), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 400])
def test_folded_dense_and_thin_products_agree(n):
    model, deltas = attach()
    move(deltas)
    x = inputs(n)
    layer, d = model.base_model.model.first, deltas[0]
    b, a = d.factors()
    thin = layer.base_layer(x) + x @ a.mT @ b.mT
    assert d.folds(x) is (n > 1)
    torch.testing.assert_close(layer(x), thin, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.base_layer(x) + d(x), thin, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.add(layer.base_layer(x), x), thin, rtol=1e-5, atol=1e-5)


def test_all_layers_share_one_pair_of_bases():
    model, deltas = attach()
    assert len({id(d.basis_a) for d in deltas}) == len({id(d.basis_b) for d in deltas}) == 1
    assert deltas[0].basis_a.key[2:5] == (4, 13, 13)  # of the largest out and in, not of the largest smaller side
    twin = copy.deepcopy(model)
    assert next(d for d in twin.modules() if isinstance(d, RandloraDelta)).basis_b is deltas[0].basis_b


def test_attaching_and_counting_draw_nothing(monkeypatch):
    monkeypatch.setattr("weft.adapters.randlora.draw", lambda *a: pytest.fail("drawn"))
    attach(seed=41)
    with torch.device("meta"):
        net = Net()
    _, deltas = attach(net, seed=41)
    assert [d.count() for d in deltas] == [2 * (4 + 7), 3 * (4 + 11), 3 * (4 + 11)]


def test_drawing_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for entries in ("dense", "sparse"):
        assert draw("B", 1, 2, 5, 9, entries).shape == (9, 6)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("options", [{}, {"pairing": "paper", "scale": "authors", "entries": "sparse"}])
def test_a_file_holds_what_is_trained_alone(tmp_path, options):
    model, deltas = attach(**options)
    move(deltas)
    model.save_pretrained(tmp_path)
    trained = sum(d.count() for d in deltas)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * trained + 6 * 256
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(again(inputs()), model(inputs()))


def test_other_bases_are_found_out(tmp_path, monkeypatch):
    attach(seed=42)[0].save_pretrained(tmp_path)
    monkeypatch.setattr("weft.adapters.randlora.draw", lambda *a: draw(*a) + 1e-3)
    with pytest.raises(weft.UsageError, match="not those that the adapter was trained with"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_the_scale_follows_the_rank_unless_given():
    assert [attach(r=r)[1][0].scale for r in (2, 4)] == [20.0, 20.0]
    assert attach(r=2, lora_alpha=6.0)[1][0].scale == 3.0


@pytest.mark.parametrize(
    "options, sentence",
    [({"scale": "big"}, "scale='big'"), ({"pairing": "x"}, "pairing='x'"), ({"entries": "few"}, "entries='few'")],
)
def test_values_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(weft.UsageError, match=sentence):
        weft.RandloraConfig(**options)


def test_a_rank_above_a_side_is_refused():
    with pytest.raises(weft.UsageError, match="r=8.*first"):
        attach(r=8)
