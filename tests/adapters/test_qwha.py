"""QWHA against its start written out with dense matrices in float64: eigenvectors, Walsh vectors, least squares."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.adapters import qwha
from weft.adapters.qwha import QwhaConfig, QwhaDelta, allocated
from weft.algebra import hadamard

IN, OUT, TOP = 24, 18, 7  # 24 = 12·2, 18 = 9·2: a Hadamard matrix, and cosines


class Net(nn.Module):
    """Two layers over tokens, the second without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, TOP, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.second(torch.tanh(self.first(x))))


def rounded(w: Tensor, bits: int = 2, group: int = 6) -> Tensor:
    """Round to nearest, each group of inputs with a step and an offset of its own."""
    parts = w.detach().unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((parts - low) / step).round() * step + low).flatten(-2)


def pair(bits: int = 2) -> tuple[Net, Net]:
    """A float64 model and its quantised copy."""
    full = Net().double().eval()
    quantised = copy.deepcopy(full)
    for layer in (quantised.first, quantised.second):
        layer.weight.data = rounded(layer.weight, bits)
    return full, quantised


def batches(count: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Inputs whose directions differ in size by a factor of a hundred."""
    source = torch.Generator().manual_seed(seed)
    mixed = torch.randn(IN, IN, generator=source, dtype=torch.float64) * torch.logspace(-2, 0, IN)[:, None]
    return [{"x": torch.randn(3, 15, IN, generator=source, dtype=torch.float64) @ mixed} for _ in range(count)]


def attached(full: nn.Module, quantised: nn.Module, given: object = None, **options: object) -> tuple[nn.Module, list]:
    """A copy of the quantised model with the adapter on it, and its deltas."""
    config = QwhaConfig(**{"r": 2, "target_modules": ["first", "second"], **options})
    weft.prepare(quantised, config, original_weights=full, batches=batches() if given is None else given)
    model = peft.get_peft_model(copy.deepcopy(quantised), config).double().eval()
    return model, [d for d in model.modules() if isinstance(d, QwhaDelta)]


def received(full: Net, name: str) -> Tensor:
    """What a layer of the full-precision model receives, in rows."""
    x = torch.cat([batch["x"] for batch in batches()]).flatten(0, 1)
    return (x if name == "first" else torch.tanh(full.first(x))).detach()


def root(x: Tensor, damping: float = 1e-4) -> Tensor:
    """R with R·Rᵀ = G, by eigenvectors as the paper has it."""
    g = x.mT @ x
    s, u = torch.linalg.eigh(g + damping * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype))
    return u * s.sqrt()


def walsh(n: int) -> Tensor:
    """H (n × n) with orthonormal rows: a ±1 matrix or the cosines of the odd factor, times Sylvester's."""
    k, bits = hadamard.split(n)
    if k == 1 or k % 2 == 0:
        core = hadamard.matrix(k).double()
        assert set(core.unique().tolist()) <= {-1.0, 1.0}
        assert torch.equal(core @ core.T, k * torch.eye(k, dtype=torch.float64))
    else:
        i, j = torch.arange(k, dtype=torch.float64)[:, None], torch.arange(k, dtype=torch.float64)
        core = 2**0.5 * torch.cos((2 * j + 1) * i * torch.pi / (2 * k))
        core[0] = 1.0
    return torch.kron(core, torch.from_numpy(sylvester(1 << bits)).double()) / n**0.5


def dense_f(d: QwhaDelta) -> Tensor:
    """F, entry by entry."""
    f = torch.zeros(d.out, d.in_, dtype=torch.float64)
    for value, row, column in zip(d.c.tolist(), *(t.tolist() for t in d.cells())):
        assert f[row, column] == 0
        f[row, column] = value
    return f


def layers(net: nn.Module) -> list[nn.Linear]:
    return [net.first, net.second]


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate_by", ["activation", "weight"])
@pytest.mark.parametrize("choose_by", ["activation", "weight"])
@pytest.mark.parametrize("refine", [True, False])
def test_the_start_is_that_of_the_paper_written_out(allocate_by: str, choose_by: str, refine: bool) -> None:
    full, quantised = pair()
    options = {"allocate_by": allocate_by, "choose_by": choose_by, "refine": refine, "temperature": 2.0}
    _, deltas = attached(full, quantised, **options)
    for name, d, w0, wq in zip(("first", "second"), deltas, layers(full), layers(quantised)):
        e = (w0.weight - wq.weight).detach()
        r, h = root(received(full, name)), walsh(d.in_)
        basis, target, x = h @ r, e @ r, e @ h.T
        torch.testing.assert_close(x @ basis, target)  # R cancels in the dense solution
        q = (target if allocate_by == "activation" else e).norm(dim=1) ** 2.0
        counts = [int(n) for n in d.places[: d.out]]
        spare = d.p - (d.p * q / q.sum()).floor().clamp(max=d.in_)
        assert sum(counts) == d.p == 2 * (d.in_ + d.out) and max(counts) <= d.in_
        assert counts == allocated(q.sqrt(), d.p, d.in_, 2.0).tolist() and spare.min() >= 0
        score = x.abs() * (basis.norm(dim=1) if choose_by == "activation" else 1.0)
        f = torch.zeros_like(e)
        for i, count in enumerate(counts):
            chosen = score[i].argsort(descending=True)[:count]
            f[i, chosen] = x[i, chosen]
            if refine and 0 < count < d.in_:
                f[i, chosen] = torch.linalg.lstsq(basis[chosen].T, target[i, :, None]).solution[:, 0]
        torch.testing.assert_close(dense_f(d), f, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(d.delta(), f @ h, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("allocation", ["adaalloc", "magnitude", "random"])
def test_the_output_error_falls_and_what_is_left_has_nothing_of_the_chosen_rows(bits: int, allocation: str) -> None:
    full, quantised = pair(bits)
    _, deltas = attached(full, quantised, allocation=allocation)
    _, raw = attached(full, quantised, allocation=allocation, refine=False)
    for name, d, plain, w0, wq in zip(("first", "second"), deltas, raw, layers(full), layers(quantised)):
        e, r = (w0.weight - wq.weight).detach(), root(received(full, name))
        assert torch.equal(d.places, plain.places)
        left = (e - d.delta().detach()) @ r
        assert left.norm() <= (e @ r).norm() and left.norm() <= ((e - plain.delta().detach()) @ r).norm()
        basis = walsh(d.in_) @ r
        along = left @ basis.T
        rows, columns = d.cells()
        bound = left.norm(dim=1)[rows] * basis.norm(dim=1)[columns]
        assert (along[rows, columns].abs() <= 1e-4 * bound).all()


@pytest.mark.parametrize("allocation", ["adaalloc", "magnitude"])
def test_more_coefficients_leave_less_and_all_of_them_nothing(allocation: str) -> None:
    full, quantised = pair()
    found: list[list[float]] = []
    for r in range(1, 8):
        _, deltas = attached(full, quantised, r=r, allocation=allocation)
        es = [(a.weight - b.weight).detach() for a, b in zip(layers(full), layers(quantised))]
        found.append(
            [
                float(((e - d.delta().detach()) @ root(received(full, name))).norm() / e.norm())
                for name, d, e in zip(("first", "second"), deltas, es)
            ]
        )
    for per_layer in zip(*found):
        assert all(more <= less * (1 + 1e-9) + 1e-6 for less, more in zip(per_layer, per_layer[1:]))
    # 7·(18 + 7) is more than 18·7: the clamp leaves a place for every number, and ΔW is E
    assert deltas[1].p == TOP * OUT and deltas[1].count() == deltas[1].c.numel()
    torch.testing.assert_close(deltas[1].delta().detach(), es[1], rtol=1e-4, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), out=st.integers(1, 30), most=st.integers(1, 20), t=st.sampled_from([0.0, 0.5, 1.0, 4.0]))
def test_every_coefficient_is_allotted(data: st.DataObject, out: int, most: int, t: float) -> None:
    p = data.draw(st.integers(1, out * most))
    sizes = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
    q = torch.tensor(data.draw(st.lists(sizes, min_size=out, max_size=out)), dtype=torch.float64)
    counts = allocated(q, p, most, t)
    assert int(counts.sum()) == p and int(counts.min()) >= 0 and int(counts.max()) <= most
    order = q.argsort()
    if t > 0:
        assert (counts[order].diff() >= -1).all()  # a channel of larger error has no fewer, but for the last leftovers


def test_channels_without_coefficients_or_with_all_of_them() -> None:
    full, quantised = pair()
    with torch.no_grad():
        quantised.first.weight[1:] = full.first.weight[1:] + 1e-9 * torch.randn(OUT - 1, IN, dtype=torch.float64)
    _, (d, _) = attached(full, quantised, r=1, allocation="magnitude")
    counts = d.places[:OUT].tolist()
    assert counts[0] == IN and min(counts) == 0
    e = (full.first.weight - quantised.first.weight).detach()
    torch.testing.assert_close(d.delta()[0], e[0], rtol=1e-4, atol=1e-6)


def test_inputs_that_span_little_are_no_trouble() -> None:
    """Fifteen tokens for twenty-four inputs, and one that is always zero."""
    full, quantised = pair()
    few = [{"x": batches(1)[0]["x"][:1] * (torch.arange(IN) > 0)}]
    _, deltas = attached(full, quantised, few, r=6)
    x = few[0]["x"].flatten(0, 1)
    e = (full.first.weight - quantised.first.weight).detach()
    assert (x @ (e - deltas[0].delta().detach()).T).norm() < 0.05 * (x @ e.T).norm()
    with pytest.raises(weft.UsageError, match="damping=1e-30 leaves the fit"):
        attached(full, quantised, few, r=6, damping=1e-30)


def test_padding_and_layers_that_are_not_reached() -> None:
    full, quantised = pair()
    given = batches()
    for batch in given:
        batch["attention_mask"] = torch.ones(3, 15, dtype=torch.long)
    _, plain = attached(full, quantised, given)
    for batch in given:
        noise = torch.full((3, 4, IN), 1e3, dtype=torch.float64)
        batch["x"] = torch.cat([batch["x"], noise], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(3, 4, dtype=torch.long)], dim=1)
    _, padded = attached(full, quantised, given)
    for a, b in zip(plain, padded):
        assert torch.equal(a.places, b.places)
        torch.testing.assert_close(a.c, b.c)

    class Lazy(Net):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
            return SimpleNamespace(logits=self.first(x))

    full.__class__ = quantised.__class__ = Lazy
    _, (_, d) = attached(full, quantised)
    e = (full.second.weight - quantised.second.weight).detach()
    kept = (e @ walsh(OUT).T)[d.cells()]
    torch.testing.assert_close(d.c.detach(), kept, rtol=1e-5, atol=1e-7)  # its own error is what is known


def test_another_scale_starts_from_the_same_weight() -> None:
    full, quantised = pair()
    _, one = attached(full, quantised)
    model, other = attached(full, quantised, scale=4.0)
    for a, b in zip(one, other):
        torch.testing.assert_close(a.delta(), b.delta())
        torch.testing.assert_close(a.c, 4 * b.c)
    (other[0].delta() * e_like(other[0])).sum().backward()
    (one[0].delta() * e_like(one[0])).sum().backward()
    torch.testing.assert_close(other[0].c.grad, 4 * one[0].c.grad)


def e_like(d: QwhaDelta) -> Tensor:
    return torch.linspace(-1, 1, d.out * d.in_, dtype=torch.float64).view(d.out, d.in_)


def test_where_nothing_is_lost_places_are_drawn_and_no_batch_is_run() -> None:
    full = Net().double()

    def never() -> object:
        raise AssertionError("a batch was asked for")
        yield

    for original in (full, copy.deepcopy(full)):
        model, deltas = attached(original, full, never())
        for d in deltas:
            rows, columns = d.cells()
            assert not d.c.any() and len(set(zip(rows.tolist(), columns.tolist()))) == d.p
            counts = d.places[: d.out]
            assert int(counts.max() - counts.min()) <= 1 and int(counts.sum()) == d.p
        x = batches(1)[0]["x"]
        assert torch.equal(model(x).logits, full(x).logits)
    again = attached(full, full, never())[1]
    assert all(torch.equal(a.places, b.places) for a, b in zip(deltas, again))
    others = attached(full, full, never(), seed=1)[1]
    assert not torch.equal(others[0].places, deltas[0].places)
    mixed = copy.deepcopy(full)
    mixed.first.weight.data = rounded(mixed.first.weight)
    _, (first, second) = attached(full, mixed)
    assert first.c.any() and not second.c.any()  # a layer that is not quantised


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 12), in_=st.integers(1, 40), data=st.data())
def test_drawn_places_are_spread_evenly(out: int, in_: int, data: st.DataObject) -> None:
    p = data.draw(st.integers(1, out * in_))
    site = SimpleNamespace(out=out, in_=in_, name="a.b")
    start = qwha.drawn(p, site, seed=3)
    assert len(start.values) == len(start.columns) == int(start.counts.sum()) == p
    assert int(start.counts.max() - start.counts.min()) <= 1
    for row in start.columns.split(start.counts.tolist()):
        assert (row.diff() > 0).all() and all(0 <= place < in_ for place in row.tolist())


def test_random_places_need_no_preparing_and_with_it_are_fitted() -> None:
    full, quantised = pair()
    config = QwhaConfig(r=2, target_modules=["first", "second"], allocation="random")
    bare = peft.get_peft_model(copy.deepcopy(quantised), config)
    x = batches(1)[0]["x"]
    plain = [d for d in bare.modules() if isinstance(d, QwhaDelta)]
    assert torch.equal(bare.double().eval()(x).logits, quantised(x).logits)
    model, fitted = attached(full, quantised, allocation="random")
    assert all(torch.equal(a.places, b.places) and b.c.any() for a, b in zip(plain, fitted))
    wanted = full(x).logits
    assert (model(x).logits - wanted).norm() < (quantised(x).logits - wanted).norm()


def test_magnitude_concentrates_where_adaalloc_spreads() -> None:
    """Two channels whose error is twenty times as large: all coefficients, or in proportion."""
    full, quantised = pair()
    with torch.no_grad():
        error = 0.01 * torch.randn(OUT, IN, dtype=torch.float64)
        error[:2] *= 20
        quantised.first.weight.copy_(full.first.weight - error)
    ranks = []
    for allocation in ("magnitude", "adaalloc"):
        _, (d, _) = attached(full, quantised, allocation=allocation, r=1, choose_by="weight", allocate_by="weight")
        ranks.append(int(torch.linalg.matrix_rank(d.delta())))
    assert ranks[0] < ranks[1]


# --- the layer --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 20),
    in_=st.integers(1, 30),
    tokens=st.sampled_from([1, 3, 300]),
    bias=st.booleans(),
    scale=st.sampled_from([0.5, 1.0]),
)
def test_every_form_of_the_product_is_the_definition(out: int, in_: int, tokens: int, bias: bool, scale: float) -> None:
    base = nn.Sequential(nn.Linear(in_, out, bias=bias)).double()
    config = QwhaConfig(r=1, target_modules=["0"], allocation="random", scale=scale)
    model = peft.get_peft_model(base, config).double().train()
    (d,) = (m for m in model.modules() if isinstance(m, QwhaDelta))
    nn.init.normal_(d.c)
    x = torch.randn(tokens, in_, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(tokens, out, dtype=torch.float64)
    layer, h = model.base_model.model[0].base_layer, walsh(in_)
    f = dense_f(d).requires_grad_()
    y = nn.functional.linear(x, layer.weight + scale * f @ h, layer.bias)
    wanted_x, wanted_f = torch.autograd.grad((y * goal).sum(), [x, f])
    torch.testing.assert_close(d.delta(), scale * (f @ h), rtol=1e-10, atol=1e-12)
    for few, sampling in ((False, False), (False, True), (True, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(d, "_few", lambda _, few=few: few)
            patch.setattr(qwha, "sampling_is_cheaper", lambda *_, sampling=sampling: sampling)
            for made in (model(x), layer(x) + d(x)):
                found_x, found_c = torch.autograd.grad((made * goal).sum(), [x, d.c])
                torch.testing.assert_close(made, y, rtol=1e-10, atol=1e-11)
                torch.testing.assert_close(found_x, wanted_x, rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(found_c, wanted_f[d.cells()], rtol=1e-9, atol=1e-10)


def test_a_base_that_trains_as_well_has_its_gradients() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(9, 5)).double(), QwhaConfig(r=2, target_modules=["0"], allocation="random")
    ).double()
    model.requires_grad_(True)
    layer = model.base_model.model[0]
    x, goal = torch.randn(40, 9, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    (model(x) * goal).sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, goal.T @ x)
    torch.testing.assert_close(layer.base_layer.bias.grad, goal.sum(0))


def test_autocast_and_narrow_weights() -> None:
    full, quantised = pair()
    model, _ = attached(full, quantised)
    x = batches(1)[0]["x"].float()
    wanted = model(x.double()).logits
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x).logits
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and (y.double() - wanted).norm() < 0.02 * wanted.norm()
    y = model.bfloat16()(x.bfloat16()).logits
    assert y.dtype == torch.bfloat16 and (y.double() - wanted).norm() < 0.03 * wanted.norm()
    assert not any(d.c.dtype == torch.bfloat16 for d in model.modules() if isinstance(d, QwhaDelta))


def test_fused_projections_and_experts_each_meet_their_own_error() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.c_attn, self.experts = Conv1D(15, 8), nn.Module()
            self.experts.weights = nn.Parameter(torch.randn(2, 4, 8))

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.c_attn(x).sum() + (x @ self.experts.weights.mT).sum())

    full = Attention().double()
    quantised = copy.deepcopy(full)
    quantised.c_attn.weight.data = rounded(full.c_attn.weight.T, group=4).T.contiguous()
    quantised.experts.weights.data = rounded(full.experts.weights, group=4)
    targets = {"target_modules": ["c_attn"], "target_parameters": ["experts.weights"], "split_qkv": True}
    x = torch.randn(30, 8, dtype=torch.float64) * torch.logspace(-1, 0, 8)
    _, deltas = attached(full, quantised, [{"x": x}], **targets, r=1)
    found = {d.name: d for d in deltas}
    errors = {f"c_attn#{i}": e for i, e in enumerate((full.c_attn.weight - quantised.c_attn.weight).T.split(5))}
    errors |= {f"experts.weights#{i}": e for i, e in enumerate(full.experts.weights - quantised.experts.weights)}
    assert set(found) == set(errors)
    for name, e in errors.items():
        d, r = found[name], root(x) if name.startswith("c_attn") else torch.eye(8, dtype=torch.float64)
        before, after = (e @ r).norm(), ((e - d.delta()) @ r).norm()
        assert after < 0.9 * before and d.p == 8 + d.out


# --- what surrounds it ------------------------------------------------------------------------------------------------


def test_batches_are_run_again_where_memory_is_full(monkeypatch) -> None:
    full, quantised = pair()
    _, whole = attached(full, quantised)
    runs = []
    monkeypatch.setattr(qwha, "CALIBRATED_BYTES", 8 * IN**2)
    full.register_forward_hook(lambda *_: runs.append(1))
    _, parts = attached(full, quantised, iter(batches()))
    assert len(runs) == 4 and all(torch.equal(a.places, b.places) for a, b in zip(whole, parts))


def test_preparing_changes_neither_model() -> None:
    full, quantised = pair()
    full.train()
    full.first.bias.requires_grad_(False)
    state = [copy.deepcopy(m.state_dict()) for m in (full, quantised)]
    config = QwhaConfig(r=2, target_modules=["first", "second"])
    weft.prepare(quantised, config, original_weights=full, batches=batches())
    for before, m in zip(state, (full, quantised)):
        assert all(torch.equal(v, m.state_dict()[k]) for k, v in before.items())
        assert isinstance(m.first, nn.Linear) and m.second.weight.requires_grad and not m.first._forward_pre_hooks
    assert full.training and full.first.training and not quantised.training
    assert not full.first.bias.requires_grad and quantised.first.bias.requires_grad
    peft.get_peft_model(quantised, config)
    assert not config.prepared  # handed over


def test_a_saved_adapter_holds_places_and_values_and_needs_nothing(tmp_path) -> None:
    full, quantised = pair()
    model, deltas = attached(full, quantised)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(quantised), tmp_path).double().eval()
    x = batches(1)[0]["x"]
    assert torch.equal(again(x).logits, model(x).logits)
    numbers = sum(d.c.numel() for d in deltas)
    assert deltas[0].places.dtype == torch.uint8
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 9 * numbers + OUT + TOP + 1024


@pytest.mark.parametrize(("in_", "dtype"), [(200, torch.uint8), (300, torch.int16), (40_000, torch.int32)])
def test_places_take_the_smallest_integers_that_fit(in_: int, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(in_, 2))
    model = peft.get_peft_model(base, QwhaConfig(r=1, target_modules=["0"], allocation="random"))
    (d,) = (m for m in model.modules() if isinstance(m, QwhaDelta))
    assert d.places.dtype == dtype and int(d.cells()[1].max()) < in_


def test_attaching_without_or_with_another_start_is_refused() -> None:
    full, quantised = pair()
    config = QwhaConfig(r=2, target_modules=["first", "second"])
    with pytest.raises(
        weft.UsageError, match=r"qwha starts first .* weft.prepare.*original_weights.*allocation='random'"
    ):
        peft.get_peft_model(copy.deepcopy(quantised), config)
    with pytest.raises(weft.UsageError, match="needs original_weights"):
        weft.prepare(quantised, config, batches=batches())
    weft.prepare(quantised, config, original_weights=full, batches=batches())
    config.r = 3
    with pytest.raises(weft.UsageError, match="first was prepared for another r"):
        peft.get_peft_model(copy.deepcopy(quantised), config)


def test_originals_and_batches_that_tell_nothing_are_refused() -> None:
    full, quantised = pair()
    config = QwhaConfig(r=2, target_modules=["first", "second"])
    other = Net().double()
    other.first = nn.Linear(IN, OUT + 1).double()
    with pytest.raises(weft.UsageError, match=f"original_weights has no first of {OUT} × {IN}"):
        weft.prepare(quantised, config, original_weights=other, batches=batches())
    with pytest.raises(weft.UsageError, match="batches holds none"):
        weft.prepare(quantised, config, original_weights=full, batches=[])
    broken = batches(1)
    broken[0]["x"][0, 0, 0] = float("nan")
    with pytest.raises(weft.WeftError, match="what first receives .* not finite"):
        weft.prepare(quantised, config, original_weights=full, batches=broken)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"allocation": "all"}, "allocation='all': use adaalloc, magnitude or random"),
        ({"allocate_by": "x"}, "allocate_by='x': use activation or weight"),
        ({"choose_by": "x"}, "choose_by='x'"),
        ({"scale": 0.0}, "scale=0.0 must be above 0"),
        ({"damping": 0.0}, "damping=0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be below 0"),
    ],
)
def test_values_that_cannot_work_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        QwhaConfig(**options)
