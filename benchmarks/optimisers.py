"""Optimisers side by side with what a user would pick, in one process: ratios, at the matrix shapes of real models.

    pip install --no-deps galore-torch bitsandbytes
    python benchmarks/optimisers.py                   a block of a 60M and of a 1B Llama, beside galore-torch and AdamW
    python benchmarks/optimisers.py --training-step   forward, backward and step of a 1B block, beside AdamW's
    python benchmarks/optimisers.py --eight-bit       the kernels that make bytes of moments
    python benchmarks/optimisers.py --curve           the same losses as galore-torch's
    python benchmarks/optimisers.py --selection       DCT's choice of frequencies beside our refresh of an SVD's basis
    python benchmarks/optimisers.py --lora-pro        LoRA-Pro's step on a 1B block beside AdamW's on the whole weights

Results go to benchmarks/results/optimisers/*.json. A refresh is a step that fits the bases, less one that does not.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft.optim

SHAPES = {"60M": (512, 1376, 128), "1B": (2048, 5632, 512)}  # hidden, intermediate, rank
RESULTS = Path(__file__).parent / "results" / "optimisers"
GAP = 200


def block(hidden: int, intermediate: int) -> list[nn.Parameter]:
    """The seven matrices of one Llama block, each with a gradient."""
    shapes = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    draw = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=draw) * 0.02)
        # a spectrum that falls, as gradients' do
        left = torch.randn(shape[0], hidden // 4, generator=draw) * torch.logspace(0, -2, hidden // 4)
        p.grad = left @ torch.randn(hidden // 4, shape[1], generator=draw) + 0.01 * torch.randn(shape, generator=draw)
        made.append(p)
    return made


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def steps(size: str, repeats: int) -> dict[str, Any]:
    """Refresh and step of one block: ours, galore-torch's, AdamW's and fused AdamW's."""
    from galore_torch import GaLoreAdamW

    hidden, intermediate, rank = SHAPES[size]
    found: dict[str, Any] = {}
    for name in ("galore", "galore-torch", "adamw", "fused adamw"):
        ours = block(hidden, intermediate)
        group = {"params": ours, "rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
        if name == "galore":
            optimizer: Any = weft.optim.Galore([group], lr=1e-3)
        elif name == "galore-torch":
            optimizer = GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True)
        else:
            optimizer = torch.optim.AdamW(ours, lr=1e-3, fused=name == "fused adamw")
        first = seconds(optimizer.step, 1)
        step = seconds(optimizer.step, repeats)
        row = {"step_seconds": step}
        if name.startswith("galore"):
            if name == "galore":
                for state in optimizer.state.values():
                    state["next_fit"] = state["step"]  # a warm refresh, which every one but the first is
                row["cold_refresh_seconds"] = first - step
                first = seconds(optimizer.step, 1)
            row["refresh_seconds"] = first - step
            row["averaged_seconds"] = step + row["refresh_seconds"] / GAP
            row["state_bytes"] = sum(t.numel() * t.element_size() for t in tensors(optimizer.state))
        found[name] = row
        print(f"{size} {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    ours, theirs, adamw = found["galore"], found["galore-torch"], found["adamw"]
    formula = sum(4 * rank * (min(p.shape) + 2 * max(p.shape)) for p in block(hidden, intermediate))
    found["ratios"] = {
        "refresh, theirs / ours": theirs["refresh_seconds"] / ours["refresh_seconds"],
        "first refresh, theirs / ours": theirs["refresh_seconds"] / ours["cold_refresh_seconds"],
        "averaged step, ours / theirs": ours["averaged_seconds"] / theirs["averaged_seconds"],
        "step, ours / AdamW": ours["step_seconds"] / adamw["step_seconds"],
        "step, theirs / AdamW": theirs["step_seconds"] / adamw["step_seconds"],
        "step, ours / fused AdamW": ours["step_seconds"] / found["fused adamw"]["step_seconds"],
        "state, ours / formula": ours["state_bytes"] / formula,
    }
    return found


def tensors(state: Any) -> list[Tensor]:
    return [t for each in state.values() for t in each.values() if isinstance(t, Tensor)]


def training_step(repeats: int) -> dict[str, Any]:
    """A block of a 1B Llama on 4096 tokens: forward, backward and step, a refresh's share included."""
    from transformers import LlamaConfig, LlamaModel

    hidden, intermediate, rank = SHAPES["1B"]
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=16
    )
    ids = torch.randint(32, (4, 1024))
    found: dict[str, Any] = {}
    for name in ("galore", "adamw", "fused adamw"):
        torch.manual_seed(0)
        model = LlamaModel(config)
        if name == "galore":
            optimizer = weft.optim.optimizer("galore", model, rank=rank, update_proj_gap=GAP, lr=1e-3)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=name == "fused adamw")

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            model(input_ids=ids).last_hidden_state.square().mean().backward()
            optimizer.step()

        refresh = 0.0
        step()
        usual = seconds(step, repeats)
        if name == "galore":
            for state in optimizer.state.values():
                state["next_fit"] = state["step"]
            refresh = seconds(step, 1) - usual
        found[name] = {"step_seconds": usual, "refresh_seconds": refresh, "averaged_seconds": usual + refresh / GAP}
        print(f"training step, {name}: {found[name]}", flush=True)
    found["ratios"] = {
        f"whole step, ours / {other}": found["galore"]["averaged_seconds"] / found[other]["averaged_seconds"]
        for other in ("adamw", "fused adamw")
    }
    return found


def eight_bit(repeats: int) -> dict[str, Any]:
    """Bytes from numbers, 512 × 5632 of them: bitsandbytes' kernel, torchao's, plain and compiled, and bucketize."""
    from bitsandbytes.functional import quantize_blockwise
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    from weft.optim._rules import _map

    unit = torch.rand(512 * 5632 // 256, 256) * 2 - 1
    code = _map(True, unit.device)
    compiled = torch.compile(quantize_8bit_with_qmap, dynamic=False)
    compiled(unit, code)
    middles = (code[1:] + code[:-1]) / 2
    calls = {
        "bitsandbytes": lambda: quantize_blockwise(unit, code=code, blocksize=256),
        "torchao": lambda: quantize_8bit_with_qmap(unit, code),
        "torchao, compiled": lambda: compiled(unit, code),
        "torch.bucketize": lambda: torch.bucketize(unit, middles, out_int32=True).to(torch.uint8),
    }
    found = {name: {"seconds": seconds(call, repeats)} for name, call in calls.items()}
    least = found["bitsandbytes"]["seconds"]
    return {**found, "ratios": {f"{name} / bitsandbytes": row["seconds"] / least for name, row in found.items()}}


def curve() -> dict[str, Any]:
    """A small Llama on one stream of tokens: the losses of galore-torch and ours, exact and warm."""
    from galore_torch import GaLoreAdamW
    from transformers import LlamaConfig, LlamaForCausalLM

    from weft import builtin

    text = "\n".join(row["text"] for row in builtin.texts("stdlib", "train"))
    data = torch.tensor(list(text[:400_000].encode()), dtype=torch.long)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4
    )
    found: dict[str, Any] = {}
    for name in ("galore-torch", "exact", "warm"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        groups = weft.optim.param_groups(model, rank=32, update_proj_gap=20, scale=0.25, proj_type="std")
        if name == "galore-torch":
            plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
            optimizer: Any = GaLoreAdamW(plain, lr=0.01, no_deprecation_warning=True)
        else:
            optimizer = weft.optim.Galore(groups, lr=0.01, svd=name)
        losses = []
        for step in range(200):
            draw = torch.Generator().manual_seed(step)
            starts = torch.randint(len(data) - 129, (8,), generator=draw)
            ids = torch.stack([data[start : start + 128] for start in starts.tolist()])
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found[name] = {"losses": losses[::10], "last_20": statistics.fmean(losses[-20:])}
        print(f"curve, {name}: last 20 losses {found[name]['last_20']:.4f}", flush=True)
    last = {name: row["last_20"] for name, row in found.items()}
    found["ratios"] = {f"last losses, {name} / galore-torch": last[name] / last["galore-torch"] for name in last}
    return found


def selection(repeats: int) -> dict[str, Any]:
    """A new choice of 512 directions for a gradient of 2048 × 2048: by FFT, by a product, by warm power steps."""
    from weft.algebra.random import generator
    from weft.algebra.svd import leading_vectors
    from weft.algebra.transforms import dct
    from weft.optim.dct_projection import basis, strongest

    n, rank = 2048, 512
    g = block(n, n)[0].grad
    assert g is not None
    c, transform = basis(n, g.dtype, g.device), dct(n)
    start = leading_vectors(g, rank, power=2, generator=generator(0))
    calls = {
        "fft": lambda: strongest(transform.forward(g), rank, 1),
        "matmul": lambda: strongest(g @ c.mT, rank, 1),
        "warm refresh": lambda: leading_vectors(g, rank, start=start, power=1, generator=generator(1)),
    }
    found: dict[str, Any] = {name: {"seconds": seconds(call, repeats)} for name, call in calls.items()}
    refresh = found["warm refresh"]["seconds"]
    found["ratios"] = {f"warm refresh / {name}": refresh / found[name]["seconds"] for name in ("fft", "matmul")}
    return found


def lora_pro(repeats: int) -> dict[str, Any]:
    """LoRA-Pro on rank 8 of every matrix of a 1B block, beside AdamW on the matrices themselves."""
    hidden, intermediate, _ = SHAPES["1B"]
    whole = block(hidden, intermediate)
    adamw = torch.optim.AdamW(whole, lr=1e-4)
    factors: list[nn.Parameter] = []
    for p in whole:
        a, b = nn.Parameter(torch.randn(8, p.shape[1]) * 0.02), nn.Parameter(torch.randn(p.shape[0], 8) * 0.02)
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        factors += [a, b]
    found: dict[str, Any] = {}
    for variant in ("full", "efficient"):
        pro = weft.optim.LoraPro([{"params": factors, "scaling": 2.0}], lr=1e-4, variant=variant)
        pro.step()
        found[variant] = {"step_seconds": seconds(pro.step, repeats)}
    adamw.step()
    found["adamw"] = {"step_seconds": seconds(adamw.step, repeats)}
    least = found["adamw"]["step_seconds"]
    found["ratios"] = {f"{name} / AdamW on the weights": found[name]["step_seconds"] / least for name in found}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("training-step", "eight-bit", "curve", "selection", "lora-pro")
    for part in parts:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--size", choices=SHAPES, help="one size alone")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.training_step:
        found["training_step"] = training_step(args.repeats)
    if args.eight_bit:
        found["eight_bit"] = eight_bit(args.repeats)
    if args.curve:
        found["curve"] = curve()
    if args.selection:
        found["selection"] = selection(args.repeats)
    if args.lora_pro:
        found["lora_pro"] = lora_pro(args.repeats)
    if not found:
        found = {f"steps_{size}": steps(size, args.repeats) for size in ([args.size] if args.size else SHAPES)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "galore-torch")},
    }
    for name, rows in found.items():
        for what, ratio in rows["ratios"].items():
            print(f"{name}: {what} {ratio:.3f}")
        (RESULTS / f"{name}.json").write_text(json.dumps({**about, **rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
