import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from weft.algebra import matmul
from weft.linear.low_rank import LowRank

needs_onednn = pytest.mark.skipif(matmul.ONEDNN is None, reason="this torch has no oneDNN")


def ask_always(patch: pytest.MonkeyPatch) -> None:
    """oneDNN, on any processor and for matrices of any size."""
    for name, value in {"FASTER": True, "LARGE": 0, "LARGE_FOR_ONE": 0}.items():
        patch.setattr(matmul, name, value)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of x that oneDNN was asked with."""
    seen, own = [], matmul.ONEDNN
    ask_always(monkeypatch)
    monkeypatch.setattr(matmul, "ONEDNN", lambda x, *rest: seen.append(tuple(x.shape)) or own(x, *rest))
    return seen


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@needs_onednn
@settings(deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    out=st.integers(1, 40),
    in_=st.integers(1, 40),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_it_is_the_product(rows, out, in_, bias, turned):
    x, b = random(*rows, in_ + 1)[..., 1:], random(out) if bias else None
    w = random(in_, out).mT if turned else random(out, in_)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        ask_always(patch)
        y = matmul.times(x, w, b)
    exact = x.double() @ w.double().mT + (0 if b is None else b.double())
    assert y.shape == (*rows, out) and y.dtype == torch.float32 and y.is_contiguous()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * in_**0.5)


@needs_onednn
def test_a_weight_is_large_enough_later_for_one_row(calls, monkeypatch):
    monkeypatch.setattr(matmul, "LARGE", 63)
    monkeypatch.setattr(matmul, "LARGE_FOR_ONE", 64)
    with torch.no_grad():
        for rows, w in ((2, random(8, 8)), (1, random(8, 8)), (1, random(8, 9)), (2, random(7, 9)), (0, random(8, 9))):
            matmul.times(random(rows, w.shape[1]), w)
    assert calls == [(2, 8), (1, 9)]


@needs_onednn
def test_whoever_looks_on_sees_the_stock_product(calls):
    class Own(torch.Tensor):
        pass

    x, plain = random(4, 6), random(5, 6)
    w, exact = torch.nn.Parameter(plain), x @ plain.mT
    matmul.times(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(5, 6))
    with torch.no_grad():
        assert matmul.times(x.double(), w.double()).dtype == torch.float64
        with torch.autocast("cpu"):
            assert matmul.times(x, w).dtype == torch.bfloat16
        assert type(matmul.times(x, plain.as_subclass(Own))) is Own
        layer = LowRank(6, 5, rank=3)
        targets = [n.target for n in torch.export.export(layer, (x,)).graph.nodes if n.op == "call_function"]
        assert targets == [torch.ops.aten.linear.default] * 2
        traced = torch.jit.trace(lambda x: matmul.times(x, plain), x, check_trace=False)
        assert "aten::linear" in str(traced.graph) and "mkldnn" not in str(traced.graph)
        assert calls == []
        torch.testing.assert_close(matmul.times(x, w), exact)
        assert calls == [(4, 6)]


@needs_onednn
def test_its_operations_are_counted(calls):
    layer = LowRank.from_factors(random(40, 3), random(3, 30))
    counts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            layer(random(2, 7, 30))
        counts.append(counter.get_total_flops())
    assert counts == [2 * 14 * 3 * (30 + 40)] * 2 and calls == [(2, 7, 30), (2, 7, 3)]


def test_other_processors_keep_the_stock_product(calls, monkeypatch):
    monkeypatch.setattr(matmul, "FASTER", False)
    x, w = random(3, 8), random(5, 8)
    with torch.no_grad():
        assert torch.equal(matmul.times(x, w), torch.nn.functional.linear(x, w)) and calls == []


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("linux", [True, False])
def test_which_processors_it_is_for(monkeypatch, tmp_path, vendor, capability, linux):
    about = tmp_path / "cpuinfo"
    if linux:
        about.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n" * 100)
    monkeypatch.setattr(matmul, "Path", lambda _: about)
    monkeypatch.setattr(matmul.platform, "processor", lambda: "x86_64" if linux else f"AMD64 Family 25, {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "ONEDNN", len)
    assert matmul._is_faster() == (vendor == "AuthenticAMD" and capability == "AVX512")
    monkeypatch.setattr(matmul, "ONEDNN", None)
    assert not matmul._is_faster()
