"""Dictionary against sums written out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weft import UsageError, WeftError
from weft.linear import _codes
from weft.linear._structured import empty, stored_bits
from weft.linear.dictionary import Dictionary

sides = st.integers(1, 23)


def codes(out: int, k: int, s: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places (out × s), ascending, and values there."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.rand(out, k, generator=draw).argsort(1)[:, :s].sort(1).values
    return places, torch.randn(out, s, generator=draw, dtype=torch.float64)


def made(out: int, in_: int, k: int, s: int, *, bias: bool = False, dtype: torch.dtype = torch.float64) -> Dictionary:
    draw = torch.Generator().manual_seed(1)
    atoms = torch.randn(k, in_, generator=draw, dtype=torch.float64)
    b = torch.randn(out, generator=draw, dtype=torch.float64) if bias else None
    return Dictionary.from_codes(atoms, *codes(out, k, s), b, dtype)


def written_out(atoms: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """W (out × in), an output after the other."""
    return torch.stack([sum(v * atoms[i] for i, v in zip(*row)) for row in zip(places.tolist(), values)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sides, sides, st.integers(1, 30), st.booleans(), st.data())
def test_forward_is_the_sum_of_the_atoms_taken(out, in_, k, bias, data):
    s = data.draw(st.integers(1, k))
    places, values = codes(out, k, s)
    layer = made(out, in_, k, s, bias=bias)
    x = torch.randn(2, 3, in_, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = written_out(layer.atoms.weight, places, values)
    expected = torch.einsum("bsi,oi->bso", x, w) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # where few rows go another way
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1], rtol=1e-10, atol=1e-10)
        assert layer(x[:0]).shape == (0, 3, out)
    torch.testing.assert_close(layer.dense(), w, rtol=1e-10, atol=1e-10)
    assert torch.equal(layer.places.long(), places)
    assert layer(x[0, 0]).shape == (out,)
    assert layer.spec() == {"kind": "dictionary", "version": 1, "atoms": k, "nonzeros": s, "bias": bias}


@pytest.mark.parametrize(
    "k, s, bits",
    [
        (20, 10, 3 * 8),  # a bit an atom
        (96, 12, 12 * 8),  # as many either way
        (96, 11, 11 * 8),  # whole numbers of eight bits
        (256, 3, 3 * 8),
        (257, 3, 3 * 16),
        (300, 150, 38 * 8),
        (40000, 2, 2 * 32),
    ],
)
def test_places_are_stored_in_what_is_shorter(k, s, bits):
    layer = made(7, 5, k, s)
    assert stored_bits(layer) == 64 * (5 * k + 7 * s) + 7 * bits
    assert layer.support.numel() * layer.support.element_size() * 8 == 7 * bits
    again = empty(layer.spec(), torch.nn.Linear(5, 7, dtype=torch.float64))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.places.long(), codes(7, k, s)[0])


@pytest.mark.parametrize("k, s", [(20, 10), (40, 3)])
def test_gradients_are_those_of_the_dense_formula(k, s, monkeypatch):
    monkeypatch.setattr(_codes, "TILE", 5)  # several tiles, the last one narrower
    layer = made(12, 7, k, s, bias=True)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    inputs = (x, layer.atoms.weight, layer.values, layer.shift)
    wanted = torch.randn(4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * wanted).sum(), inputs)
    w = torch.zeros(12, k, dtype=torch.float64).scatter(1, layer.places.long(), layer.values) @ layer.atoms.weight
    expected = torch.autograd.grad(((x @ w.mT + layer.shift) * wanted).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_frozen_parts_get_no_gradient():
    layer = made(12, 7, 20, 10, bias=True).requires_grad_(False)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(4, 7))
    layer.values.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.values.grad is not None and layer.atoms.weight.grad is None


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in (made if isinstance(made, tuple | list) else [made]) if isinstance(t, Tensor)]
        self.seen += [t.numel() for t in tensors if t.layout == torch.strided]
        return made


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_both_ways_round_as_a_dense_layer_does(rows):
    layer = made(40, 30, 20, 10, bias=True, dtype=torch.bfloat16)
    x = torch.randn(rows, 30, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes = torch.zeros(40, 20, dtype=torch.float64).scatter(1, layer.places.long(), layer.values.double())
    w = layer.atoms.weight.double().mT @ codes.mT
    expected = x.double() @ w + layer.bias
    dense = torch.nn.functional.linear(x, w.mT.bfloat16(), layer.bias)
    with torch.no_grad():
        found = layer(x)
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    assert (found.double() - expected).norm() <= 2 * (dense.double() - expected).norm()


def test_no_product_writes_out_a_whole_matrix():
    out, in_, k, s = 2048, 512, 128, 64
    layer = Dictionary(in_, out, atoms=k, nonzeros=s)
    torch.nn.init.zeros_(layer.atoms.weight), torch.nn.init.zeros_(layer.values)
    x = torch.zeros(3, in_, requires_grad=True)
    kept = []
    with Sizes() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert max(made.seen) < out * s and max(kept) == out * s < out * k < out * in_
    with Sizes() as made:
        y.sum().backward()
    assert max(made.seen) <= out * s
    with torch.no_grad(), Sizes() as made:
        layer(x)
    assert max(made.seen) <= out * s


def test_autocast_multiplies_in_half_the_bits():
    layer = made(12, 7, 20, 10, bias=True, dtype=torch.float32)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.values.grad.dtype == layer.atoms.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_from_dense_learns_what_is_there():
    """A matrix whose rows are sparse in some dictionary comes nearer than its best low rank of the same size."""
    layer = made(200, 16, 24, 3)
    w = layer.dense()
    found = Dictionary.from_dense(w, atoms=24, nonzeros=3)
    rank = (24 * 16 + 3 * 200) // (16 + 200)
    low = torch.linalg.svdvals(w)[rank:].square().sum().sqrt()
    assert float((found.dense() - w).norm()) < 0.8 * float(low)


def test_it_shares_nothing_with_what_it_was_made_from():
    atoms, (places, values), b = torch.ones(4, 3), codes(5, 4, 2), torch.ones(5)
    layer = Dictionary.from_codes(atoms, places, values.float(), b)
    with torch.no_grad():
        for p in [*layer.parameters(), layer.places, layer.support]:
            p.zero_()
    assert atoms.sum() == 12 and b.sum() == 5 and int(places.max()) > 0 and bool(values.any())


@pytest.mark.parametrize("k, s", [(4, 0), (4, 5), (0, 0)])
def test_counts_that_cannot_be_are_refused(k, s):
    with pytest.raises(UsageError, match=f"nonzeros={s}, atoms={k}: an output takes from 1 to all"):
        Dictionary(3, 7, atoms=k, nonzeros=s)


def test_a_damaged_support_is_an_error():
    layer = made(12, 7, 20, 10)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    state["support"][3, 0] ^= 1
    with pytest.raises(WeftError, match="each output of this layer takes 10 of 20"):
        layer.load_state_dict(state)


def test_at_half_the_atoms_a_bit_each_is_as_short_as_places_can_be():
    """What tells one choice of s among k from another: log2 of their number."""
    k, s = 200, 100
    assert 0.97 * _codes.support_bits(k, s) < math.log2(math.comb(k, s))


# --- a dictionary that layers share -----------------------------------------------------------------------------------


def led(leader: Dictionary, out: int, *, s: int = 3, bias: bool = False) -> Dictionary:
    k, b = leader.atoms.out_features, torch.linspace(-1, 1, out, dtype=torch.float64) if bias else None
    return Dictionary.from_codes(leader.atoms.weight, *codes(out, k, s, seed=5), b, leader=leader)


def test_a_led_layer_multiplies_by_its_leaders_atoms_and_stores_none():
    leader = made(12, 7, 20, 10)
    layer = led(leader, 9, bias=True)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = written_out(leader.atoms.weight, *codes(9, 20, 3, seed=5))
    torch.testing.assert_close(layer(x), x @ w.mT + layer.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.dense(), w, rtol=1e-12, atol=1e-12)
    assert layer.dictionary is leader.atoms is leader.dictionary
    assert set(layer.state_dict()) == {"weight", "values", "support", "shift"} and not list(layer.children())
    assert stored_bits(layer) == 64 * 9 * 3 + 9 * 3 * 8
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)


def test_what_all_lose_trains_the_one_dictionary():
    leader = made(12, 7, 20, 10)
    layer = led(leader, 9)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (leader(x).square().sum() + layer(x).square().sum()).backward()
    both = 0
    for one in (leader, layer):
        s = torch.zeros(one.out_features, 20, dtype=torch.float64).scatter(1, one.places.long(), one.values.detach())
        both = both + s.mT @ (2 * x @ one.dense().detach().mT).mT @ x  # of ‖x·Dᵀ·Sᵀ‖², D being k × in
    torch.testing.assert_close(leader.atoms.weight.grad, both, rtol=1e-11, atol=1e-11)


def test_copies_share_among_themselves_and_casts_reach_all():
    model = torch.nn.ModuleList([made(12, 7, 20, 10)])
    model.append(led(model[0], 9))
    assert [name for name, _ in model.named_parameters()] == ["0.values", "0.atoms.weight", "1.values"]
    other = copy.deepcopy(model)
    assert other[1].leader is other[0] is not model[0]
    model.bfloat16()
    assert model[1].dictionary.weight.dtype == torch.bfloat16 and other[1].dictionary.weight.dtype == torch.float64
    assert model[1](torch.ones(2, 7).bfloat16()).dtype == torch.bfloat16


def test_only_a_layer_with_a_leader_is_of_the_second_version(monkeypatch):
    leader = made(12, 7, 20, 10)
    spec = led(leader, 9).spec() | {"leader": "first"}
    assert (spec["version"], leader.spec()["version"]) == (2, 1)
    stock = torch.nn.Linear(7, 9, dtype=torch.float64)
    assert empty(spec, stock, leader).leader is leader
    for wrong in (led(leader, 9), torch.nn.Linear(7, 20)):
        with pytest.raises(UsageError, match="its leader has no dictionary of its own"):
            empty(spec, stock, wrong)
    with pytest.raises(UsageError, match="it takes 20 atoms of 7 inputs, and its leader has 19 of 7"):
        empty(spec, stock, made(12, 7, 19, 10))
    monkeypatch.setattr(Dictionary, "version", 1)  # an older weft
    with pytest.raises(UsageError, match="version 2 here, and this weft reads up to 1: upgrade"):
        empty(spec, stock, leader)
