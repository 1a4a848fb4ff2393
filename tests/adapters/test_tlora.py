"""TLoRA against W·T + Δ with every entry of both written out in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import weft
from weft.adapters._delta import leaves
from weft.adapters.tlora import TloraDelta


def attach(out: int = 13, in_: int = 37, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, TloraDelta]:
    """One linear layer without a bias, by default with prime sides, and its delta."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(in_, out, bias=False)).to(dtype)
    model = get_peft_model(net, weft.TloraConfig(target_modules=["0"], **options))
    model = model.double() if dtype == torch.float64 else model
    (delta,) = leaves(model.base_model.model[0].deltas["default"])
    return model, delta


def move(delta: TloraDelta, scale: float = 0.2, seed: int = 5) -> None:
    source = torch.Generator().manual_seed(seed)
    for p in delta.parameters():
        p.data += scale * torch.randn(p.shape, generator=source).to(p.dtype)


def digits(index: int, sizes: tuple[int, ...]) -> list[int]:
    found = []
    for size in sizes:
        index, digit = divmod(index, size)
        found.append(digit)
    return found


@torch.no_grad()
def transform(d: TloraDelta) -> Tensor:
    """T (in × in), one trace an entry; it is the corner of a larger one where in was padded."""
    r, sizes = d.ring, d.sizes
    cores = [torch.eye(len(e), dtype=torch.float64)[:, :, None, None] / r + e.double() for e in d.cores("E")]
    t = torch.empty(d.in_, d.in_, dtype=torch.float64)
    for i in range(d.in_):
        for j in range(d.in_):
            product = torch.eye(r, dtype=torch.float64)
            for core, a, b in zip(cores, digits(i, sizes), digits(j, sizes), strict=True):
                product = product @ core[a, b]
            t[i, j] = product.trace()
    return t


@torch.no_grad()
def addition(d: TloraDelta) -> Tensor:
    """Δ (out × in), one trace an entry."""
    if d.config.addition_part == "lora":
        return d.B.double() @ d.A.double()
    made = torch.empty(d.out, d.in_, dtype=torch.float64)
    for o in range(d.out):
        for i in range(d.in_):
            product = torch.eye(d.r, dtype=torch.float64)
            for side, digit in (("B", digits(o, d.out_sizes)), ("C", digits(i, d.sizes))):
                for core, k in zip(d.cores(side), digit, strict=True):
                    product = product @ core[k].double()
            made[o, i] = product.trace()
    return made


def written_out(model: nn.Module, d: TloraDelta) -> Tensor:
    """W·T + Δ."""
    w = model.base_model.model[0].base_layer.weight.detach().double()
    return w @ transform(d) + addition(d)


def inputs(d: TloraDelta, n: int = 6) -> Tensor:
    return torch.randn(n, d.in_, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 12),
    in_=st.integers(1, 14),
    ring=st.integers(1, 3),
    modes=st.integers(1, 3),
    part=st.sampled_from(["lora", "tr"]),
)
def test_the_layer_is_the_sum_written_out(out: int, in_: int, ring: int, modes: int, part: str) -> None:
    model, d = attach(out, in_, transform_rank=ring, modes=modes, addition_part=part)
    move(d)
    x, moved = inputs(d), written_out(model, d)
    w = model.base_model.model[0].base_layer.weight.detach()
    torch.testing.assert_close(d.delta(), moved - w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x), x @ moved.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d(x), x @ (moved - w).mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d.add(x @ w.mT, x), x @ moved.mT, rtol=1e-10, atol=1e-10)
    assert d.count() == sum(p.numel() for p in d.parameters())


@pytest.mark.parametrize("part", ["lora", "tr"])
@pytest.mark.parametrize("modes", [2, 3])
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_it_starts_at_the_identity(ring: int, modes: int, part: str) -> None:
    for spread in (0.0, 1.0):
        model, d = attach(transform_rank=ring, modes=modes, addition_part=part, spread=spread, dtype=torch.float32)
        x = inputs(d).float()
        base = x @ model.base_model.model[0].base_layer.weight.mT
        torch.testing.assert_close(transform(d), torch.eye(37, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(model(x), base, rtol=1e-5, atol=1e-6)
        if ring == 1 or spread == 0:
            assert torch.equal(model(x), base) and not d.delta().any()
        assert not addition(d).any()


def test_the_transform_acts_on_the_input_and_the_first_short_index_is_the_fastest() -> None:
    model, d = attach(out=4, in_=6)
    with torch.no_grad():
        d.E1.normal_()
        d.E2.normal_()
    assert d.sizes == (2, 3)
    kron = torch.kron(torch.eye(3) + d.E2[:, :, 0, 0], torch.eye(2) + d.E1[:, :, 0, 0])
    w = model.base_model.model[0].base_layer.weight
    torch.testing.assert_close(model(torch.eye(6, dtype=torch.float64)).mT, w @ kron)


@pytest.mark.parametrize("part", ["lora", "tr"])
def test_only_the_transform_and_what_is_zero_move_first(part: str) -> None:
    model, d = attach(addition_part=part, r=2)
    model(inputs(d)).square().sum().backward()
    zero = "B" if part == "lora" else "B1"
    for name, p in d.named_parameters():
        assert bool(p.grad.any()) == (name[0] == "E" or name == zero), name


def trained(ring: int, spread: float) -> TloraDelta:
    model, d = attach(12, 12, transform_rank=ring, spread=spread)
    x, y = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return d


def kronecker_rank(d: TloraDelta) -> int:
    """Of T as a sum of A^2 ⊗ A^1."""
    rows, cols = d.sizes
    blocks = transform(d).reshape(cols, rows, cols, rows).permute(0, 2, 1, 3).reshape(cols**2, rows**2)
    return int(torch.linalg.matrix_rank(blocks, rtol=1e-6))


def test_a_ring_whose_slices_start_equal_stays_of_rank_one() -> None:
    plain, equal, apart = trained(1, 1.0), trained(2, 0.0), trained(2, 1.0)
    for e in equal.cores("E"):
        torch.testing.assert_close(e, e[:, :, :1, :1].expand_as(e), rtol=1e-9, atol=1e-12)
    assert kronecker_rank(plain) == kronecker_rank(equal) == 1
    assert kronecker_rank(apart) == 4


def test_ranks() -> None:
    _, d = attach(20, 30, addition_part="tr", r=2, transform_rank=2)
    move(d, 0.5)
    assert torch.linalg.matrix_rank(transform(d)) == 30
    assert torch.linalg.matrix_rank(addition(d)) == 4  # r²


@pytest.mark.parametrize(("ring", "spread"), [(1, 1.0), (2, 0.0), (2, 1.0)])
def test_the_penalties(ring: int, spread: float) -> None:
    options = {"transform_rank": ring, "spread": spread, "identity_weight": 0.3, "orthogonal_weight": 0.7}
    _, d = attach(5, 6, **options)
    assert (d.penalty() < 1e-12) == (spread == 0 or ring == 1)
    move(d)
    identity = orthogonal = 0.0
    for e in d.cores("E"):
        eye = torch.eye(len(e), dtype=torch.float64)
        a = eye[:, :, None, None] / ring + e.detach()
        for r in range(ring):
            for s in range(ring):
                identity += (a[:, :, r, s] - eye / ring).norm().item()
                for p in range(ring):
                    for q in range(ring):  # entry (rp, sq) of the sum of A[i, l] ⊗ A[j, l]
                        c = a[:, :, r, s] @ a[:, :, p, q].mT
                        orthogonal += (c - eye / ring**2).norm().item()
    assert d.penalty().item() == pytest.approx(0.3 * identity + 0.7 * orthogonal, rel=1e-10)
    assert attach()[1].penalty() is None


def test_the_paths_agree_and_the_cheaper_one_is_taken() -> None:
    """Turning x for a small ring; making ΔW once for a large ring and many vectors."""
    for ring, n, dense in ((1, 200, False), (4, 8, False), (4, 200, True)):
        model, d = attach(64, 64, transform_rank=ring)
        move(d, 0.05)
        layer, x = model.base_model.model[0], inputs(d, n)
        assert d.folds(x) and d._dense_is_cheaper(x, dense=1, turned=0) is dense
        expected = x @ written_out(model, d).mT
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.base_layer(x) + d(x), expected, rtol=1e-10, atol=1e-10)


def flops(model: nn.Module, x: Tensor) -> int:
    """Multiplications and additions of a training step's two passes, with a gradient for x."""
    with FlopCounterMode(display=False) as counter:
        model(x.requires_grad_()).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_costs_what_the_page_says(dtype: torch.dtype) -> None:
    """Beside LoRA's, at width 1024; in bfloat16 too there is one product with W and not two."""
    x = torch.ones(512, 1024, dtype=dtype)
    plain = nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(dtype)
    lora = flops(get_peft_model(plain, LoraConfig(r=8, target_modules=["0"])), x.clone())
    for ring, factor in ((1, 1.1), (2, 1.4)):
        model, _ = attach(1024, 1024, dtype, transform_rank=ring)
        assert flops(model, x.clone()) == pytest.approx(factor * lora, rel=0.04)


def test_bfloat16_keeps_small_turns_that_rounding_the_weight_would_lose() -> None:
    model, d = attach(16, 16, torch.bfloat16)
    with torch.no_grad():
        d.E1 += 1e-4
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    turned = d(x).float()
    w = model.base_model.model[0].base_layer.weight.float()
    torch.testing.assert_close(turned, x.float() @ (w @ transform(d).float() - w).mT, rtol=0.02, atol=1e-6)


def test_a_copy_reads_its_own_weight() -> None:
    model, d = attach()
    move(d)
    twin = copy.deepcopy(model)
    (other,) = leaves(twin.base_model.model[0].deltas["default"])
    before = d.delta()
    with torch.no_grad():
        twin.base_model.model[0].base_layer.weight.mul_(2)
    assert torch.equal(d.delta(), before)
    torch.testing.assert_close(other.delta() - addition(other), 2 * (before - addition(d)))


def test_every_adapter_turns_the_original_weight() -> None:
    model, first = attach()
    model.add_adapter("second", weft.TloraConfig(target_modules=["0"], transform_rank=2, addition_part="tr"))
    model.double()
    (second,) = leaves(model.base_model.model[0].deltas["second"])
    move(first)
    move(second, 0.1, seed=6)
    w = model.base_model.model[0].base_layer.weight.detach().clone()
    total = written_out(model, first) + written_out(model, second) - w
    model.base_model.set_adapter(["default", "second"])
    x = inputs(first)
    torch.testing.assert_close(model(x), x @ total.mT, rtol=1e-10, atol=1e-10)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    torch.testing.assert_close(model.base_model.model[0].base_layer.weight, total, rtol=1e-10, atol=1e-10)


def test_decay_pulls_to_the_base_model() -> None:
    model, d = attach(transform_rank=2)
    move(d)
    optimizer = torch.optim.SGD(d.parameters(), lr=1.0, weight_decay=1.0)
    for p in d.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    x = inputs(d)
    torch.testing.assert_close(model(x), x @ model.base_model.model[0].base_layer.weight.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"transform_rank": 0}, "transform_rank=0 must be at least 1"),
        ({"modes": 9}, "modes=9 is not within 1..8"),
        ({"addition_part": "tt"}, "addition_part='tt': use lora or tr"),
        ({"spread": -1.0}, "spread=-1.0"),
        ({"identity_weight": math.inf}, "identity_weight=inf"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        weft.TloraConfig(**options)
