"""SaRA: what is below the threshold is trained, as the paper says, and nothing else changes by a bit."""

from __future__ import annotations

import math
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft.optim
from weft.algebra.random import generator
from weft.errors import UsageError
from weft.linear._codes import smallest_int
from weft.optim.sara import (
    Sara,
    apply_delta,
    default_lr,
    delta,
    nuclear_gradient,
    save_delta,
    sparse_gradients,
    threshold_at,
)

TAU = 0.03


class Unet(nn.Module):
    """Down, through attention-like linear layers, up, with a skip: convolutions, norms, biases, linears, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 80, 3, stride=2, padding=1)
        self.q = nn.Linear(80, 72)
        self.o = nn.Linear(72, 80)
        self.scale = nn.Parameter(torch.tensor(0.01))
        self.up = nn.ConvTranspose2d(80, 8, 2, stride=2)
        self.leave = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.nn.functional.silu(self.norm(self.enter(x)))
        deep = self.down(first)
        tokens = deep.flatten(2).mT
        deep = deep + (1 + self.scale) * self.o(torch.tanh(self.q(tokens))).mT.unflatten(2, deep.shape[2:])
        return self.leave(first + self.up(torch.nn.functional.silu(deep)))


def unet(dtype: torch.dtype = torch.float64) -> Unet:
    torch.manual_seed(0)
    return Unet().to(dtype)


def images(step: int, dtype: torch.dtype, rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def backward(model: nn.Module, step: int, parts: int = 1) -> None:
    x = images(step, next(model.parameters()).dtype)
    for piece in x.chunk(parts):
        ((model(piece) - piece.flip(-1)).square().mean() / parts).backward()


def train(model: nn.Module, optimizer: Sara, steps: range, parts: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, parts)
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(t: Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def sara(model: nn.Module, **options: object) -> Sara:
    return Sara(model.named_parameters(), **{"lr": 0.01, "threshold": TAU, "lambda_rank": 0.0, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_below_the_threshold_keeps_its_bits(dtype):
    model = unet(dtype)
    start = values(model)
    optimizer = sara(model, weight_decay=0.1, lambda_rank=5e-4, progressive_iter=4)
    assert same(values(model), start)  # the sign of what is trained included
    train(model, optimizer, range(8))
    for name, p in values(model).items():
        mask = start[name].double().abs() < TAU
        assert bits(p[~mask]) == bits(start[name][~mask]), name
        assert not mask.any() or (p != start[name])[mask].float().mean() > 0.9, name
    trained = {name: int((p.double().abs() < TAU).sum()) for name, p in start.items()}
    assert trained["norm.weight"] == 0 and trained["scale"] == 1 and trained["norm.bias"] == 8
    assert {n: optimizer.state[p]["entries"] for n, p in model.named_parameters()} == trained


def test_an_infinite_threshold_is_adamw():
    model, other = unet(torch.float32), unet(torch.float32)
    ours = sara(model, threshold=math.inf, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    theirs = torch.optim.AdamW(
        other.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, foreach=False
    )
    train(model, ours, range(6))
    train(other, theirs, range(6))
    assert same(values(model), values(other))


def reference(model: nn.Module, steps: int, lr: float, decay: float, penalty: float, switch: int) -> dict[str, Tensor]:
    """The masked variant as the paper has it: a dense AdamW whose result is kept within the mask only."""
    names = dict(model.named_parameters())
    mask = {n: p.detach().abs() < TAU for n, p in names.items()}
    m = {n: torch.zeros_like(p) for n, p in names.items()}
    v = {n: torch.zeros_like(p) for n, p in names.items()}
    for step in range(steps):
        if step == switch:
            mask = {n: mask[n] & (p.detach().abs() < TAU) for n, p in names.items()}
        model.zero_grad()
        backward(model, step)
        grads = {n: p.grad.clone() for n, p in names.items()}
        able = [n for n in ("q.weight", "o.weight") if mask[n].sum() > 100]
        if penalty and able:
            n = able[int(torch.randint(len(able), (), generator=generator(0, step)))]
            x = (names[n].detach() * mask[n]).requires_grad_()
            torch.linalg.svdvals(x).sum().backward()
            grads[n] += penalty * x.grad
        with torch.no_grad():
            for n, p in names.items():
                m[n] = 0.9 * m[n] + 0.1 * grads[n]
                v[n] = 0.999 * v[n] + 0.001 * grads[n] ** 2
                hat_m, hat_v = m[n] / (1 - 0.9 ** (step + 1)), v[n] / (1 - 0.999 ** (step + 1))
                new = p * (1 - lr * decay) - lr * hat_m / (hat_v.sqrt() + 1e-8)
                p.copy_(torch.where(mask[n], new, p))
    return values(model)


@pytest.mark.parametrize(("penalty", "switch"), [(0.0, -1), (0.05, -1), (0.05, 3)])
def test_steps_are_those_of_a_written_out_reference(penalty, switch):
    expected = reference(unet(), 7, 0.01, 0.1, penalty, switch)
    model = unet()
    optimizer = sara(model, weight_decay=0.1, lambda_rank=penalty, progressive_iter=switch)
    train(model, optimizer, range(7))
    for name, p in values(model).items():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-11, msg=name)
    plain = reference(unet(), 7, 0.01, 0.1, 0.0, -1)
    moved = max((expected[n] - plain[n]).abs().max().item() for n in expected)
    assert (moved > 1e-4) == (penalty > 0)  # the terms are no rounding


def test_what_outgrew_the_threshold_is_frozen_where_it_is_and_the_rest_keeps_its_moments():
    model = unet()
    optimizer = sara(model, progressive_iter=3)
    train(model, optimizer, range(2))
    twin = unet()
    other = sara(twin)
    train(twin, other, range(2))
    train(model, optimizer, range(2, 3))
    train(twin, other, range(2, 3))
    before = values(model)
    assert same(before, values(twin))
    live = {}
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters()):
        first, now = other.index(q), optimizer.index(p)
        kept = before[name].flatten()[first].abs() < TAU
        assert torch.equal(now, first[kept])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], other.state[q][key][kept])
        live[name] = torch.zeros(p.numel(), dtype=torch.bool).index_fill_(0, now, True).view(p.shape)
    assert 0 < live["q.weight"].sum() < other.state[twin.q.weight]["entries"]
    train(model, optimizer, range(3, 6))
    for name, p in values(model).items():
        assert torch.equal(p[~live[name]], before[name][~live[name]])
        assert not live[name].any() or not torch.equal(p, before[name])


def test_one_matrix_a_step_is_pulled_and_only_those_that_qualify():
    shapes = {"a": (65, 90), "b": (90, 65), "narrow": (64, 200), "few": (80, 80), "kernel": (70, 70, 3, 3)}
    torch.manual_seed(0)
    names = {n: nn.Parameter(0.01 * torch.randn(shape, dtype=torch.float64)) for n, shape in shapes.items()}
    with torch.no_grad():
        names["few"].view(-1)[100:] = 1.0  # a hundred entries below, no more
    optimizer = Sara(names.items(), lr=0.0, threshold=0.5, lambda_rank=1.0)
    seen = []
    for _ in range(12):
        before = {n: optimizer.state[p]["exp_avg"].clone() for n, p in names.items()}
        for p in names.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        decayed = {n: not torch.allclose(optimizer.state[p]["exp_avg"], 0.9 * before[n]) for n, p in names.items()}
        seen.append([n for n, pulled in decayed.items() if pulled])
    assert all(len(pulled) == 1 for pulled in seen)
    assert {n for pulled in seen for n in pulled} == {"a", "b"}
    again = Sara(names.items(), lr=0.0, threshold=0.5, lambda_rank=1.0, seed=1)
    drawn = [again._draw(list(names.values()), step) for step in range(12)]
    assert [n for (n,) in seen] != ["a" if p is names["a"] else "b" for p in drawn]


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_the_nuclear_gradient_is_that_of_the_sum_of_singular_values(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape) < 0.7
    index = mask.flatten().nonzero()[:, 0]

    def norm(theta: Tensor) -> float:
        full = np.zeros(x.numel())
        full[index.numpy()] = theta.numpy()
        return np.linalg.svd(full.reshape(shape), compute_uv=False).sum()

    theta, h = x[mask], 1e-6
    steps = torch.eye(len(theta), dtype=torch.float64) * h
    slopes = torch.tensor([(norm(theta + e) - norm(theta - e)) / (2 * h) for e in steps])
    torch.testing.assert_close(nuclear_gradient(theta, index, x.shape), slopes, rtol=1e-6, atol=1e-7)


def test_the_nuclear_gradient_leaves_out_directions_without_a_singular_value():
    u = torch.nn.functional.normalize(torch.arange(1.0, 7.0, dtype=torch.float64), dim=0)
    v = torch.nn.functional.normalize(torch.ones(4, dtype=torch.float64), dim=0)
    x = 3 * torch.outer(u, v)
    found = nuclear_gradient(x.flatten(), torch.arange(24), x.shape)
    torch.testing.assert_close(found.view(6, 4), torch.outer(u, v))
    zero = nuclear_gradient(torch.zeros(24), torch.arange(24), x.shape)
    assert not zero.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_take_the_same_steps_and_keep_what_is_trained_only(dtype):
    options = {"lambda_rank": 0.01, "progressive_iter": 2}
    plain, model = unet(dtype), unet(dtype)
    dense, optimizer = sara(plain, **options), sara(model, **options)
    handles = sparse_gradients(optimizer)
    for step in range(5):
        for each in (dense, optimizer):
            each.zero_grad()
        backward(plain, step, parts=4)
        backward(model, step, parts=4)
        assert all(p.grad is None for p in model.parameters())
        for p, q in zip(model.parameters(), plain.parameters()):
            kept = optimizer._gathered[p][0]
            assert bits(kept) == bits(q.grad.flatten()[dense.index(q)])
            assert kept.numel() == len(optimizer.state[p]["exp_avg"])
        dense.step()
        optimizer.step()
        assert same(values(model), values(plain))
    assert optimizer.state[model.q.weight]["entries"] > len(optimizer.state[model.q.weight]["exp_avg"])
    for handle in handles:
        handle.remove()
    backward(model, 5)
    assert all(p.grad is not None for p in model.parameters())


def test_gathered_gradients_are_used_once_and_forgotten_by_zero_grad():
    model = unet()
    optimizer = sara(model)
    sparse_gradients(optimizer)
    backward(model, 0)
    optimizer.zero_grad()
    start = values(model)
    optimizer.step()
    assert same(values(model), start)
    backward(model, 0)
    optimizer.step()  # and no zero_grad: Trainer calls the model's
    after = values(model)
    optimizer.step()
    assert same(values(model), after) and not same(after, start)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_that_is_not_finite_skips_the_step_even_where_nothing_is_trained(sparse):
    model = unet()
    optimizer = sara(model)
    if sparse:
        sparse_gradients(optimizer)
    train(model, optimizer, range(2))
    kept = values(model)
    state = {name: t.clone() for p, s in optimizer.state.items() for name, t in s.items() if isinstance(t, Tensor)}
    steps = [s["step"] for s in optimizer.state.values()]
    place = int((model.q.weight.abs() >= TAU).flatten().nonzero()[0])  # frozen

    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[place] = math.nan
        return grad

    hook = model.q.weight.register_hook(spoil)
    optimizer.zero_grad()
    backward(model, 2)
    hook.remove()
    backward(model, 3)
    with pytest.warns(UserWarning, match="q.weight is not finite: this step is skipped, the 1st"):
        optimizer.step()
    assert optimizer.skipped == 1 and same(values(model), kept)
    again = {name: t for p, s in optimizer.state.items() for name, t in s.items() if isinstance(t, Tensor)}
    assert same(again, state) and [s["step"] for s in optimizer.state.values()] == steps
    train(model, optimizer, range(2, 4))
    assert optimizer.skipped == 1 and not same(values(model), kept)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one_around_the_switch(stop, tmp_path):
    options = {"threshold": None, "share": 0.3, "lambda_rank": 0.01, "progressive_iter": 3}
    model = unet(torch.bfloat16)
    optimizer = sara(model, **options)
    train(model, optimizer, range(stop))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    kept = values(model)
    again = unet(torch.bfloat16)
    again.load_state_dict(kept)
    other = sara(again, **options)  # whose masks are the trained model's, until it is told
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for p, q in zip(model.parameters(), again.parameters()):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            there = other.state[q][key]
            assert torch.equal(value, there) and value.dtype == there.dtype if isinstance(value, Tensor) else (
                value == there
            )
    train(model, optimizer, range(stop, 7))
    train(again, other, range(stop, 7))
    assert same(values(again), values(model))


def test_four_micro_batches_are_one_batch():
    one, four = unet(), unet()
    train(one, sara(one, lambda_rank=0.01, progressive_iter=3), range(5))
    train(four, sara(four, lambda_rank=0.01, progressive_iter=3), range(5), parts=4)
    for name, p in values(four).items():
        torch.testing.assert_close(p, values(one)[name], rtol=1e-8, atol=1e-8, msg=name)


def test_places_are_bits_or_numbers_whichever_is_shorter():
    torch.manual_seed(0)
    sizes = {"thick": (1000, 100), "thin": (1000, 1), "middle": (100, 4), "none": (10, 0), "large": (70000, 9)}
    tensors = {}
    for name, (n, below) in sizes.items():
        t = torch.ones(n)
        t[torch.randperm(n)[:below]] = 1e-4
        tensors[name] = nn.Parameter(t)
    optimizer = Sara(tensors.items())
    found = {n: optimizer.state[p]["places"] for n, p in tensors.items()}
    assert {n: (t.dtype, t.numel()) for n, t in found.items()} == {
        "thick": (torch.uint8, 125),  # bits: 125 bytes and not 200
        "thin": (torch.int16, 1),
        "middle": (torch.uint8, 4),  # numbers: 4 bytes and not 13
        "none": (torch.uint8, 0),
        "large": (torch.int32, 9),
    }
    for n, p in tensors.items():
        assert torch.equal(optimizer.index(p), (p < 0.5).nonzero()[:, 0])
        assert len(optimizer.state[p]["exp_avg"]) == sizes[n][1]
    assert smallest_int(2**31) == torch.int32 and smallest_int(2**31 + 1) == torch.int64


def test_a_convolution_in_another_memory_format_is_trained_alike():
    plain, last = unet(), unet().to(memory_format=torch.channels_last)
    assert not last.down.weight.is_contiguous()
    train(plain, sara(plain), range(3))
    train(last, sara(last), range(3))
    assert not last.down.weight.is_contiguous()
    for name, p in values(last).items():
        torch.testing.assert_close(p, values(plain)[name], rtol=1e-9, atol=1e-11, msg=name)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    share=st.floats(0.01, 1.0),
    scale=st.sampled_from([1e-30, 1e-3, 1.0]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_share_is_the_largest_threshold_below_which_no_more_lies(sizes, share, scale, ties, seed):
    random = np.random.default_rng(seed)
    parts = [(random.standard_normal(n) * scale).astype(np.float32) for n in sizes]
    parts = [np.round(part / scale, 1) * np.float32(scale) for part in parts] if ties else parts
    tau = threshold_at([torch.from_numpy(part) for part in parts], share)
    ordered = np.sort(np.abs(np.concatenate(parts)))
    rank = math.floor(share * len(ordered))
    assert tau == (ordered[rank] if rank < len(ordered) else math.inf)


def test_a_share_is_of_all_entries_together_but_those_of_groups_with_their_own_threshold():
    model = unet(torch.float32)
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("q.")]
    own = {"params": list(model.q.named_parameters()), "threshold": 0.01}
    optimizer = Sara([{"params": iter(rest)}, own], share=0.15)
    tau = optimizer.param_groups[0]["threshold"]
    every = torch.cat([p.detach().flatten() for _, p in rest]).abs()
    assert int((every < tau).sum()) == math.floor(0.15 * len(every))
    assert sum(optimizer.state[p]["entries"] for _, p in rest) == math.floor(0.15 * len(every))
    assert optimizer.state[model.q.weight]["entries"] == int((model.q.weight.abs() < 0.01).sum())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * math.exp(-350 * tau), rel=1e-12)


def test_the_learning_rate_that_is_not_given():
    assert default_lr(2e-3) == pytest.approx(4.9659e-4, abs=5e-9)
    model = unet()
    for made in (Sara(model.parameters()), weft.optim.optimizer("sara", model)):
        assert {group["lr"] for group in made.param_groups} == {default_lr(2e-3)}
    assert {g["lr"] for g in weft.optim.optimizer("sara", model, lr=0.1).param_groups} == {0.1}
    with pytest.raises(UsageError, match="give a learning rate"):
        Sara(model.parameters(), threshold=math.inf)


def test_groups_of_a_model():
    model = unet()
    model.enter.requires_grad_(False)
    kind, arguments = weft.optim.for_trainer("sara", model, share=0.2, weight_decay=0.3)
    assert kind is Sara and arguments["share"] == 0.2 and arguments["threshold"] is None
    names = [[name for name, _ in group["params"]] for group in arguments["params"]]
    assert names == [
        ["down.weight", "q.weight", "o.weight", "up.weight", "leave.weight"],
        ["scale", "norm.weight", "norm.bias", "down.bias", "q.bias", "o.bias", "up.bias", "leave.bias"],
    ]
    assert [group["weight_decay"] for group in arguments["params"]] == [0.3, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_delta_makes_of_the_original_what_was_tuned(dtype, tmp_path):
    model = unet(dtype)
    start = values(model)
    optimizer = sara(model, progressive_iter=3)
    train(model, optimizer, range(6))
    found = delta(optimizer)
    for name in start:
        mask = start[name].double().abs() < TAU
        if mask.any():
            assert torch.equal(found[f"{name}.values"], values(model)[name][mask])  # the first mask, not the second
    assert "norm.weight.values" not in found
    path = tmp_path / "delta.safetensors"
    save_delta(optimizer, path)
    assert [file.name for file in tmp_path.iterdir()] == ["delta.safetensors"]
    assert same(load_file(path), found)
    below = sum(int((p.double().abs() < TAU).sum()) for p in start.values())
    assert path.stat().st_size < below * dtype.itemsize + sum(p.numel() for p in start.values()) / 8 + 6000
    fresh = unet(dtype)
    apply_delta(fresh, path)
    assert same(values(fresh), values(model))
    apply_delta(fresh, path)
    assert same(values(fresh), values(model))


def test_a_diffusion_unet_from_a_config_learns_by_its_small_weights_alone(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 80),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }

    def made() -> nn.Module:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel.from_config(config)

    model = made()
    start = values(model)
    optimizer = weft.optim.optimizer("sara", model, share=0.2, lambda_rank=5e-4, lr=5e-3)
    draw = generator("latents")
    noise, caption = torch.randn(4, 4, 8, 8, generator=draw), torch.randn(4, 5, 16, generator=draw)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(noise, torch.arange(4), caption).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    small = {name: optimizer.state[p]["entries"] for name, p in model.named_parameters()}
    assert 0.19 < sum(small.values()) / sum(p.numel() for p in start.values()) <= 0.2
    for name, p in values(model).items():
        assert int((p != start[name]).sum()) <= small[name], name
    save_delta(optimizer, tmp_path / "delta.safetensors")
    fresh = made()
    apply_delta(fresh, tmp_path / "delta.safetensors")
    assert same(values(fresh), values(model))


def test_a_delta_is_refused_by_a_model_that_is_not_the_original(tmp_path):
    model = unet(torch.float32)
    optimizer = sara(model)
    train(model, optimizer, range(2))
    path = tmp_path / "delta.safetensors"
    save_delta(optimizer, path)
    other = unet(torch.float32)
    with torch.no_grad():
        place = (other.leave.weight.abs() >= TAU).flatten().nonzero()[0]
        other.leave.weight.view(-1)[place] += 1e-6
    kept = values(other)
    with pytest.raises(UsageError, match="leave.weight differs from the original"):
        apply_delta(other, path)
    assert same(values(other), kept)
    with pytest.raises(UsageError, match="float32 parameter .* the model has .*float64"):
        apply_delta(unet(), path)
    with pytest.raises(UsageError, match="parameter scale; the model has none"):
        apply_delta(nn.Linear(3, 3), path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="other.safetensors is no file of"):
        apply_delta(model, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="goes by names"):
        save_delta(Sara(model.parameters()), path)


def test_what_cannot_work_is_refused_in_one_sentence():
    model = unet()
    for options, words in [
        ({"threshold": 0.1, "share": 0.1}, "threshold=0.1 and share=0.1 say the same thing"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0"),
        ({"share": 1.5}, "share=1.5 must be above 0 and at most 1"),
        ({"progressive_iter": 0}, "progressive_iter=0 must be at least 1 step"),
        ({"lambda_rank": -1.0}, "lambda_rank=-1.0"),
        ({"thresold": 1.0}, "sara has no option 'thresold'"),
    ]:
        with pytest.raises(UsageError, match=words):
            weft.optim.optimizer("sara", model, lr=0.1, **options)
    spare = nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match="none of 3 entries is below threshold=0.002"):
        Sara([nn.Parameter(torch.ones(3))])
    optimizer = sara(model)
    with pytest.raises(UsageError, match="unknown key 'treshold' in a parameter group: did you mean 'threshold'"):
        optimizer.add_param_group({"params": [("spare", spare)], "treshold": 0.1})
    with pytest.raises(UsageError, match="threshold=None must be above 0"):
        optimizer.add_param_group({"params": [("spare", spare)], "threshold": None})
    assert len(optimizer.param_groups) == 1
    other = torch.optim.AdamW(model.parameters())
    backward(model, 0)
    other.step()
    for found in (other.state_dict(), torch.optim.AdamW(model.parameters()).state_dict()):
        with pytest.raises(UsageError, match="has masks for 0 of 15 parameters"):
            optimizer.load_state_dict(found)


def test_sharded_parameters_and_several_processes_are_refused(tmp_path, monkeypatch):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        p = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
        for options in ({}, {"share": 0.1}):
            with pytest.raises(UsageError, match=r"shape \(4, 4\) is a DTensor"):
                Sara([("w", p)], **options)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.raises(UsageError, match="one process's gradients only"):
            sparse_gradients(sara(unet()))
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


@pytest.mark.parametrize("sparse", [False, True])
def test_trainer(sparse):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    start = values(model)
    rows = torch.randint(40, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    made = weft.optim.for_trainer("sara", model, share=0.2, lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0,
            use_cpu=True, report_to="none", disable_tqdm=True, save_steps=2, lr_scheduler_type="constant",
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})

        def trainer(model: nn.Module) -> Trainer:
            made = weft.optim.for_trainer("sara", model, share=0.2, lr=0.01)
            found = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=made)
            if sparse:
                sparse_gradients(found.create_optimizer())
            return found

        trainer(model).train()
        torch.manual_seed(0)
        again = LlamaForCausalLM(config)
        trainer(again).train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    tau = made[0](made[1].pop("params"), **made[1]).param_groups[0]["threshold"]
    assert same(values(again), values(model))
    every = torch.cat([p.flatten() for p in start.values()])
    trained = sum(int((p != start[name]).sum()) for name, p in values(model).items())
    assert 0.15 * len(every) < trained <= 0.2 * len(every) and tau > 0
