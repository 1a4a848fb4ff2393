"""NOLA against explicit sums over its random matrices in float64."""

import copy
import gc
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import weft
from weft.adapters import _bases
from weft.adapters._delta import leaves
from weft.adapters.nola import NolaDelta, draw


class Net(nn.Module):
    """Three linear layers, two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(7, 13)
        self.second = nn.Linear(13, 7, bias=False)
        self.third = nn.Linear(7, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def attach(net: nn.Module | None = None, **options) -> tuple[PeftModel, list[NolaDelta]]:
    options = {"num_basis": 10, "r": 3, "lora_alpha": 6.0, **options}
    model = get_peft_model(net or Net(), weft.NolaConfig(**options))
    return model, [d for m in model.modules() if hasattr(m, "deltas") for d in leaves(m.deltas["default"])]


def inputs(n: int = 5) -> Tensor:
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(2))


def move(deltas: list[NolaDelta]) -> None:
    generator = torch.Generator().manual_seed(3)
    for d in deltas:
        for p in (d.a, d.b):
            p.data += torch.randn(p.shape, generator=generator)


def matrices(d: NolaDelta) -> tuple[Tensor, Tensor]:
    """P (k × r × in) and Q (k × out × r), drawn here, float64."""
    k = d.config.num_basis
    return draw(d.p.key, d.r, d.in_, 0, k).double(), draw(d.q.key, d.out, d.r, 0, k).double()


def test_only_b_learns_in_the_first_step():
    model, deltas = attach()
    assert torch.equal(model(inputs()), Net()(inputs()))
    model(inputs()).square().sum().backward()
    for d in deltas:
        assert not d.delta().any() and not d.a.grad.any() and d.b.grad.all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(["zero", "mean"]), st.booleans())
def test_delta_and_gradients_are_those_of_the_explicit_sum(k, r, init, stored):
    basis = "stored" if stored else "regenerate"
    model, (d, *_) = attach(num_basis=k, r=r, init=init, basis=basis, chunk=4, target_modules=["first"])
    move([d])
    x = inputs()
    model.base_model.model.first(x).square().sum().backward()
    p, q = matrices(d)
    a, b = (t.detach().double().requires_grad_() for t in (d.a, d.b))
    big_a = d.A0.double() + torch.einsum("k,kri->ri", a, p) / math.sqrt(k)
    big_b = torch.einsum("k,kor->or", b, q) / math.sqrt(k)
    delta = 6.0 / r * big_b @ big_a
    torch.testing.assert_close(d.delta().double(), delta, rtol=1e-5, atol=1e-5)
    assert torch.linalg.matrix_rank(d.delta(), rtol=1e-5) <= r
    base = Net().first.double()
    (base(x.double()) + x.double() @ delta.mT).square().sum().backward()
    torch.testing.assert_close(d.a.grad.double(), a.grad, rtol=1e-4, atol=1e-4 * float(a.grad.norm()))
    torch.testing.assert_close(d.b.grad.double(), b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.norm()))
    assert d.count() == 2 * k == sum(t.numel() for t in d.parameters())


@pytest.mark.parametrize("chunk", [1, 3, 10])
@pytest.mark.parametrize("share", [True, False])
def test_stored_and_regenerated_bases_agree_to_the_last_bit(chunk, share):
    found = []
    for basis in ("stored", "regenerate"):
        model, deltas = attach(basis=basis, chunk=chunk, share_basis=share)
        move(deltas)
        y = model(inputs())
        y.square().sum().backward()
        found.append([y.detach(), *(g for d in deltas for g in (d.a.grad, d.b.grad))])
        assert (sum(d.p.stored_bytes() for d in deltas) > 0) == (basis == "stored")
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_size_of_a_chunk_does_not_matter():
    deltas = []
    for chunk in (1, 3, 10):
        _, (d, *_) = attach(basis="regenerate", chunk=chunk)
        move([d])
        deltas.append(d.delta())
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(deltas[0], deltas[2], rtol=1e-6, atol=1e-6)
    pieces = [draw("k", 3, 7, i, i + 2) for i in range(0, 10, 2)]
    assert torch.equal(torch.cat(pieces), draw("k", 3, 7, 0, 10))


def test_the_global_stream_is_not_disturbed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    net = Net()
    torch.manual_seed(5)
    model, _ = attach(net, basis="regenerate")
    model(inputs()).sum().backward()
    assert torch.equal(torch.rand(3), expected)


def test_the_random_numbers_have_the_distributions_of_the_code():
    drawn = draw("0//P", 30, 40, 0, 20)
    assert drawn.abs().max() < 1 and abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.var()) - 1 / 3) < 0.01
    _, (first, _, third) = attach()
    assert first.A0.abs().max() <= 1 / math.sqrt(7) and first.A0.std() > 0.5 / math.sqrt(3 * 7)
    assert not torch.equal(first.A0, third.A0)


def test_layers_of_one_shape_share_their_bases_and_free_them():
    def held() -> int:
        gc.collect()
        return sum(key[0].startswith("77/") for _, key in _bases._known)

    first, second, third = attach(seed=77)[1]
    assert first.p.pieces[0] is third.p.pieces[0] and first.p.pieces[0] is not second.p.pieces[0]
    assert held() == 4
    first, second, third = attach(seed=77, share_basis=False)[1]
    assert not torch.equal(*(d.p.pieces[0].tensor(torch.device("cpu")) for d in (first, third)))
    assert held() == 6
    del first, second, third
    assert held() == 0


def test_copies_and_pickles_share_the_bases():
    model, (d, *_) = attach()
    move([d])
    twin = copy.deepcopy(d)
    assert twin.p.pieces[0] is d.p.pieces[0] and torch.equal(twin.delta(), d.delta())
    read = pickle.loads(pickle.dumps(d.p))
    assert read.pieces[0] is d.p.pieces[0] and torch.equal(read(d.a), d.p(d.a))


@pytest.mark.parametrize("basis", ["stored", "regenerate"])
def test_a_file_holds_the_coefficients_alone(tmp_path, basis):
    model, deltas = attach(basis=basis, num_basis=100)
    move(deltas)
    model.save_pretrained(tmp_path)
    trained = sum(p.numel() for d in deltas for p in d.parameters())
    assert trained == 3 * 200 and (tmp_path / "adapter_model.safetensors").stat().st_size < 1.1 * 4 * trained + 6 * 256
    torch.manual_seed(99)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(again(inputs()), model(inputs()))


def test_other_random_numbers_are_found_out(tmp_path, monkeypatch):
    attach()[0].save_pretrained(tmp_path)
    monkeypatch.setattr("weft.adapters.nola.generator", lambda *key: torch.Generator().manual_seed(1))
    with pytest.raises(weft.UsageError, match="seeded numbers drawn for first"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_mean_starts_from_the_averages_of_the_bases():
    _, (d, *_) = attach(init="mean")
    p, q = matrices(d)
    expected = 2.0 * (q.mean(0) / math.sqrt(10)) @ (p.mean(0) / math.sqrt(10))
    torch.testing.assert_close(d.delta().double(), expected, rtol=1e-5, atol=1e-7)
    assert not d.A0.any()


def test_a_skeleton_is_counted_without_drawing(monkeypatch):
    monkeypatch.setattr("weft.adapters.nola.draw", lambda *a: pytest.fail("drawn"))
    with torch.device("meta"):
        net = Net()
    _, deltas = attach(net)
    assert [d.count() for d in deltas] == [20] * 3


def test_decay_on_coefficients_is_refused():
    model, deltas = attach()
    model(inputs()).sum().backward()
    with pytest.raises(weft.UsageError, match="weight_decay=0"):
        torch.optim.AdamW([p for d in deltas for p in (d.a, d.b)], weight_decay=0.1).step()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"num_basis": 0}, "num_basis=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"init": "ones"}, "init='ones'"),
        ({"basis": "disk"}, "basis='disk'"),
        ({"r": 0}, "r=0"),
    ],
)
def test_values_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(weft.UsageError, match=sentence):
        weft.NolaConfig(**options)
