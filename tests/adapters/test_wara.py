"""WaRA against the band-by-band procedure of the paper and against dense wavelet matrices, in float64."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weft
from weft.adapters.wara import WaraConfig, WaraDelta
from weft.algebra.transforms import dwt


def attach(in_: int, out: int, move: bool = True, **options: object) -> tuple[nn.Module, WaraDelta]:
    """A float64 model of one adapted layer with random factors: (model, its delta)."""
    torch.manual_seed(1)
    config = WaraConfig(target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(in_, out, bias=False)), config).double()
    (delta,) = (d for d in model.modules() if isinstance(d, WaraDelta))
    if move:
        nn.init.normal_(delta.B)
    return model, delta


def haar(n: int, levels: int = 1) -> Tensor:
    """The n × n Haar matrix, low-pass rows first, from means and differences of neighbours."""
    s = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n // 2):
        s[i, 2 * i] = s[i, 2 * i + 1] = s[n // 2 + i, 2 * i] = 0.5**0.5
        s[n // 2 + i, 2 * i + 1] = -(0.5**0.5)
    if levels > 1:
        s[: n // 2] = haar(n // 2, levels - 1) @ s[: n // 2]
    return s


def widths(n: int, levels: int) -> list[int]:
    padded = -(-n // 2**levels) * 2**levels
    return [padded // 2**levels] + [padded // 2**level for level in range(levels, 0, -1)]


def blocks(d: WaraDelta) -> Tensor:
    """The blocks B·A of coefficients (padded × padded), one pair after the other, from the layout of A and B."""
    levels, r = d.config.levels, d.r
    rows, columns = widths(d.out, levels), widths(d.in_, levels)
    if d.bands == "shared":
        a, b = d.A.split(columns[1:], dim=1), d.B.split(rows[1:], dim=0)
        return torch.block_diag(b[0] @ a[0], *[y @ x for y, x in zip(b, a)])
    if d.bands == "per_feature_band":
        a, b = d.A.split(columns, dim=1), d.B.split(rows, dim=0)
        return torch.block_diag(*[y @ x for y, x in zip(b, a)])
    a, b = d.A.split(columns, dim=2), d.B.split(rows, dim=1)
    assert a[0].shape == (levels + 1, r, columns[0]) and b[0].shape == (levels + 1, rows[0], r)
    return torch.cat([torch.cat([b[i][j] @ a[j][i] for j in range(levels + 1)], 1) for i in range(levels + 1)])


def expected_delta(d: WaraDelta) -> Tensor:
    out, in_ = (sum(widths(n, d.config.levels)) for n in (d.out, d.in_))
    whole = haar(out, d.config.levels).T @ blocks(d) @ haar(in_, d.config.levels)
    return d.config.lora_alpha / d.r * whole[: d.out, : d.in_]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    in_=st.integers(2, 19),
    out=st.integers(2, 19),
    r=st.integers(1, 3),
    levels=st.integers(1, 3),
    bands=st.sampled_from(["shared", "per_feature_band", "weight"]),
)
def test_delta_and_gradients_are_those_of_dense_haar_matrices(in_, out, r, levels, bands) -> None:
    if min(in_, out) < max(r, 2**levels):
        return
    model, d = attach(in_, out, r=r, lora_alpha=3.0, levels=levels, bands=bands)
    expected = expected_delta(d)
    torch.testing.assert_close(d.delta(), expected, rtol=1e-10, atol=1e-12)
    x = torch.randn(5, in_, dtype=torch.float64)
    g = torch.randn(5, out, dtype=torch.float64)
    wanted = torch.autograd.grad((x @ expected.T * g).sum(), [d.A, d.B])
    found = torch.autograd.grad((model(x) * g).sum(), [d.A, d.B])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    assert d.count() == d.A.numel() + d.B.numel()
    rank = {"shared": levels + 1, "per_feature_band": levels + 1, "weight": (levels + 1) ** 2}[bands] * r
    assert d.factors()[0].shape == (out, rank) and d.factors()[1].shape == (rank, in_)


@pytest.mark.parametrize("tokens", [6, 12])
def test_it_is_the_papers_procedure_on_four_bands(tokens: int) -> None:
    """A 2-D transform of X (features × tokens), B·A on every band, and back: what is done along the tokens cancels."""
    model, d = attach(8, 10, r=2, lora_alpha=1.0)
    x = torch.randn(8, tokens, dtype=torch.float64)
    along = haar(tokens)
    coefficients = haar(8) @ x @ along.T
    (ll, lh), (hl, hh) = (half.chunk(2, dim=1) for half in coefficients.chunk(2))
    pair = 0.5 * d.B @ d.A
    moved = torch.cat([torch.cat([pair @ ll, pair @ lh], 1), torch.cat([pair @ hl, pair @ hh], 1)])
    expected = haar(10).T @ moved @ along
    torch.testing.assert_close(d.delta() @ x, expected, rtol=1e-10, atol=1e-12)
    base = model.base_model.model[0].base_layer
    torch.testing.assert_close(model(x.T), base(x.T) + expected.T, rtol=1e-10, atol=1e-12)
    one = model(x.T[:1])  # a single token, which has no transform of its own
    torch.testing.assert_close(one, base(x.T[:1]) + expected.T[:1], rtol=1e-10, atol=1e-12)


def test_an_odd_side_is_padded_with_a_zero() -> None:
    model, d = attach(7, 9, r=3)
    assert d.A.shape == (3, 4) and d.B.shape == (5, 3)
    x = torch.randn(4, 7, dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(4, 1, dtype=x.dtype)], dim=1)
    low, high = (padded @ haar(8).T).chunk(2, dim=1)
    y = torch.cat([low @ d.A.T @ d.B.T, high @ d.A.T @ d.B.T], dim=1) @ haar(10)
    torch.testing.assert_close(d(x), 8 / 3 * y[:, :9], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("bands", "rank", "count"), [("shared", 6, 60), ("per_feature_band", 6, 120), ("weight", 12, 240)]
)
def test_ranks_and_parameters(bands: str, rank: int, count: int) -> None:
    _, d = attach(18, 22, r=3, bands=bands)
    assert torch.linalg.matrix_rank(d.delta()) == rank
    assert d.count() == count  # r·(in + out) is 120


def test_one_global_product_of_coefficients_is_lora() -> None:
    """Why the bands are the method: without them the transform changes nothing that a rank sees."""
    b, a = (torch.randn(shape, dtype=torch.float64) for shape in ((12, 3), (3, 16)))
    delta = haar(12).T @ b @ a @ haar(16)
    assert torch.linalg.matrix_rank(delta) == 3
    torch.testing.assert_close(delta, (haar(12).T @ b) @ (a @ haar(16)))
    _, d = attach(16, 12, r=3)
    assert torch.linalg.matrix_rank(d.delta()) == 6


@pytest.mark.parametrize("wavelet", ["db2", "sym4"])
def test_another_wavelet(wavelet: str) -> None:
    _, d = attach(12, 16, r=2, lora_alpha=2.0, wavelet=wavelet)
    s_in, s_out = (dwt(n, wavelet).forward(torch.eye(n, dtype=torch.float64)).T for n in (12, 16))
    torch.testing.assert_close(s_in @ s_in.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(d.delta(), s_out.T @ blocks(d) @ s_in, rtol=1e-10, atol=1e-12)
    _, plain = attach(12, 16, r=2, lora_alpha=2.0)
    assert not torch.allclose(plain.delta(), d.delta())


@pytest.mark.parametrize("bands", ["shared", "per_feature_band", "weight"])
def test_the_start_is_zero_and_uniform_within_each_band(bands: str) -> None:
    model, d = attach(64, 32, move=False, r=8, bands=bands, levels=2)
    x = torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(model(x), model.base_model.model[0].base_layer(x))
    sizes = [16, 16, 32][bands == "shared" :]
    for band, size in zip(d.A.detach().split(sizes, dim=-1), sizes):
        assert 0.9 * size**-0.5 < float(band.abs().max()) <= size**-0.5


def test_a_copied_or_pickled_layer_is_the_same() -> None:
    model, _ = attach(8, 6, r=2)
    layer = model.base_model.model
    x = torch.randn(3, 8, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def nearest(bands: str, target: Tensor, r: int) -> Tensor:
    """ΔW of the pairs that approximate the target's coefficients best, set into a delta by truncated SVDs."""
    n = len(target)
    _, d = attach(n, n, r=r, lora_alpha=float(r), bands=bands)
    coefficients = haar(n) @ target @ haar(n).T
    low, high = coefficients[: n // 2, : n // 2], coefficients[n // 2 :, n // 2 :]
    with torch.no_grad():
        parts = [(low + high) / 2] if bands == "shared" else [low, high]
        factors = [torch.linalg.svd(part) for part in parts]
        d.B.copy_(torch.cat([u[:, :r] * s[:r] for u, s, _ in factors]))
        d.A.copy_(torch.cat([vh[:r] for _, _, vh in factors], dim=1))
        return d.delta()


def test_at_equal_parameters_a_pair_a_band_suits_updates_of_several_scales() -> None:
    """The best approximations, so that no training speaks along. A shared pair is no better than LoRA on either."""
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)

        def normal(*shape: int, source: torch.Generator = source) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        scales = torch.kron(normal(8, 8), torch.ones(8, 8))  # constant in blocks, and a few sharp details
        for i, j in torch.randint(0, 32, (12, 2), generator=source).tolist():
            scales[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += 4 * normal() * torch.tensor([[1, -1], [-1, 1]])
        for target, bands_win in ((scales, True), (normal(64, 4) @ normal(4, 64), False)):
            u, s, vh = torch.linalg.svd(target)
            lora = (u[:, :4] * s[:4]) @ vh[:4]
            found = [lora, nearest("per_feature_band", target, 4), nearest("shared", target, 8)]
            plain, own, shared = (float((made - target).norm() / target.norm()) for made in found)
            assert (own < 0.9 * plain) is bands_win and shared > plain


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bands": "all"}, "bands='all'"),
        ({"levels": 0}, "levels=0 must be at least 1"),
        ({"wavelet": "bior2.2"}, "wavelet='bior2.2'.*not orthogonal"),
        ({"wavelet": "haarr"}, "wavelet='haarr'.*haar, db2 or sym4"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(weft.UsageError, match=sentence):
        WaraConfig(**options)


def test_bands_of_less_than_one_feature_are_refused() -> None:
    with pytest.raises(weft.UsageError, match="levels=3 would split 0.*6 × 9; use levels ≤ 2"):
        attach(9, 6, r=2, levels=3)
    attach(9, 6, r=2, levels=2)
