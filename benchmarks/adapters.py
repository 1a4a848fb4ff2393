"""Training-step time and peak memory of weft's adapters beside PEFT's, in one run.

    python benchmarks/adapters.py                     the table below, and benchmarks/results/adapters.json
    python benchmarks/adapters.py --only sora,nola    some methods; the file keeps the others
    python benchmarks/adapters.py --device cuda --width 2048 --tokens 8192 --dtype bfloat16

Machines are noisy, so only ratios count: a method and its opponent take turns, step by step, and the medians are
divided. "block" is a chain of four linear layers of the given width, all adapted; "model" is a two-layer Llama. A step
is forward, backward and AdamW. Memory is the peak of live tensor bytes during a step, as torch reports it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.adapters._config import AdapterConfig
from weft.adapters._training import parameter_groups
from weft.adapters.qwha import QwhaDelta
from weft.algebra.transforms import Transform, wht

RESULTS = Path(__file__).parent / "results" / "adapters.json"
LAYERS = 4
R = 8


class Block(nn.Module):
    """Four linear layers in a row, nothing else: what an adapter costs where it sits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def block(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    x = torch.randn(args.tokens, args.width, device=args.device, dtype=args.dtype) * 0.1
    # the gradient must reach the input of every layer, as inside a model
    return Block(args.width).to(args.device, args.dtype), lambda m: m(x.detach().requires_grad_()).square().mean()


def whole_model(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    config = LlamaConfig(
        hidden_size=args.width // 2,
        intermediate_size=args.width * 11 // 8,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
    )
    ids = torch.randint(0, 2048, (max(1, args.tokens // 512), 256), device=args.device)
    return LlamaForCausalLM(config).to(args.device, args.dtype), lambda m: m(input_ids=ids, labels=ids).loss


def attach(build: Any, config: Any, args: argparse.Namespace) -> tuple[nn.Module, Callable[[], None]]:
    """A seeded model with the adapter, and one training step on it."""
    torch.manual_seed(0)
    model, loss = build(args)
    if isinstance(model, Block):
        config.target_modules = [str(i) for i in range(LAYERS)]
    else:
        config.target_modules = "all-linear"
    if isinstance(config, AdapterConfig):
        needs = weft.card(config.slug()).needs
        # the base is not quantised: its weights are the original ones
        served = {need: Batches(model, loss) for need in needs} | {"original_weights": model, "quality": 0.5}
        weft.prepare(model, config, **served)
    model = peft.get_peft_model(model, config)
    getattr(config, "once_attached", lambda model: None)(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4, weight_decay=0.0))

    def step() -> None:
        loss(model.base_model.model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


class Batches(list):  # type: ignore[type-arg]
    """One sample batch for methods that look at gradients before they attach."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> None:
        forward = type(model).forward

        class Probe(type(model)):  # type: ignore[misc]
            """The model, called with an empty batch, returns its loss."""

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return forward(self, *args, **kwargs) if args or kwargs else LossOnly(loss(self))

        model.__class__ = Probe
        super().__init__([{}])


class LossOnly:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most bytes that tensors of one step held at once, beyond what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compared(times: tuple[list[float], list[float]]) -> dict[str, Any]:
    """The medians of two, and their ratio."""
    seconds = [statistics.median(t) for t in times]
    return {"seconds": seconds, "time_ratio": seconds[0] / seconds[1]}


def race(ours: Any, theirs: Any, build: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved steps of two configs on the same model; median times, their ratio, and the ratio of peaks."""
    (mine, a), (other, b) = attach(build, ours(), args), attach(build, theirs(), args)
    for step in (a, b):
        for _ in range(2):
            step()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(args.repeats):
        for k in ((0, 1), (1, 0))[i % 2]:
            times[k].append(timed((a, b)[k], args.device))
    memory = peak_bytes(a, args.device), peak_bytes(b, args.device)
    return {
        **compared(times),
        "time_ratio_paired": statistics.median(x / y for x, y in zip(*times)),
        "peak_bytes": list(memory),
        "memory_ratio": memory[0] / max(memory[1], 1),
        "trainable": [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (mine, other)],
    }


def attach_cost(ours: Any, theirs: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved `get_peft_model` calls on fresh blocks."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.repeats):
        for k, make in enumerate((ours, theirs)):
            torch.manual_seed(0)
            model, config = Block(args.width).to(args.device, args.dtype), make()
            config.target_modules = [str(i) for i in range(LAYERS)]
            times[k].append(timed(lambda m=model, c=config: peft.get_peft_model(m, c), args.device))  # type: ignore[misc]
    return compared(times)


def gradient_pass(args: argparse.Namespace) -> dict[str, Any]:
    """LoRA-SB's pass over its samples, beside a bare forward and backward of the same samples."""
    from weft.adapters import lora_sb

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.repeats):
        torch.manual_seed(0)
        model, loss = block(args)
        weights, batches = dict(model.named_parameters()), Batches(model, loss)
        times[0].append(timed(lambda m=model, w=weights, b=batches: lora_sb._gradient_sums(m, w, b), args.device))  # type: ignore[misc]
        times[1].append(timed(lambda m=model, f=loss: f(m).backward(), args.device))  # type: ignore[misc]
    return compared(times)


def whole(transform: Transform, device: str | torch.device) -> Transform:
    """The same, by products with its matrix."""
    h = transform.inverse(torch.eye(transform.n, device=device))
    return Transform("dense", transform.n, lambda x: x @ h.mT, lambda x: x @ h)


def transform_cost(args: argparse.Namespace) -> dict[str, Any]:
    """F·H, which makes ΔW of F, by the fast transform and by a product with the whole H, in turns."""
    fast = wht(args.width)
    ways = fast, whole(fast, args.device)
    f = torch.randn(args.width, args.width, device=args.device)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.repeats):
        for k, way in enumerate(ways):
            times[k].append(timed(lambda t=way: t.inverse(f), args.device))  # type: ignore[misc]
    return compared(times)


def dense_qwha() -> Any:
    """QWHA with products by the whole Hadamard matrix in place of the fast transform."""

    def replace(model: nn.Module) -> None:
        for delta in (m for m in model.modules() if isinstance(m, QwhaDelta)):
            delta.transform = whole(delta.transform, delta.c.device)

    config = weft.QwhaConfig(r=R)
    config.once_attached = replace
    return config


def lora() -> Any:
    return peft.LoraConfig(r=R, lora_alpha=16)


def cases(args: argparse.Namespace) -> dict[str, tuple[Any, Any, float, str]]:
    """name -> (ours, opponent, wanted ratio of times, who the opponent is)."""
    d = args.width
    scoring = {"init_warmup": 0, "incre_interval": 10**6, "target_rank": 4}
    reached = {"init_warmup": 10**6, "r": R, "target_rank": R}
    return {
        "sora": (lambda: weft.SoraConfig(r=R), lora, 1.15, "PEFT LoRA"),
        "dylora": (lambda: weft.DyloraConfig(r=R), lora, 1.15, "PEFT LoRA"),
        "allora": (lambda: weft.AlloraConfig(r=R), lora, 1.15, "PEFT LoRA"),
        "lora_sb": (lambda: weft.LoraSbConfig(r=R), lora, 1.15, "PEFT LoRA"),
        "svfit r=8": (lambda: weft.SvfitConfig(r=R), lora, 1.15, "PEFT LoRA"),
        "svfit r=d/8": (lambda: weft.SvfitConfig(r=d // 8), lambda: peft.LoraConfig(r=d // 8), 1.15, "PEFT LoRA r=d/8"),
        "svfit full r": (lambda: weft.SvfitConfig(energy=1.0), lora, 1.9, "PEFT LoRA"),
        "increlora target reached": (lambda: weft.IncreloraConfig(**reached), lora, 1.15, "PEFT LoRA"),
        "increlora scoring": (lambda: weft.IncreloraConfig(**scoring), lora, 1.6, "PEFT LoRA"),
        "randlora": (lambda: weft.RandloraConfig(r=32), lambda: peft.RandLoraConfig(r=32), 1 / 1.5, "PEFT RandLoRA"),
        "nola stored": (
            lambda: weft.NolaConfig(r=R),
            lambda: weft.NolaConfig(r=R, basis="regenerate"),
            1 / 1.5,
            "regenerated bases",
        ),
        "nola": (lambda: weft.NolaConfig(r=R), lora, float("inf"), "PEFT LoRA"),
        "loca": (
            lambda: weft.LocaConfig(n_frequency=1000, learn_location_iter=0),
            lambda: peft.FourierFTConfig(n_frequency=1000),
            1 / 1.5,
            "PEFT FourierFT",
        ),
        "loca beside LoRA": (lambda: weft.LocaConfig(learn_location_iter=0), lora, 1.1, "PEFT LoRA"),
        "wara": (
            lambda: weft.WaraConfig(r=R),
            lambda: peft.WaveFTConfig(n_frequency=R * d),
            1 / 1.5,
            "PEFT WaveFT",
        ),
        "wara beside LoRA": (lambda: weft.WaraConfig(r=R), lora, 1.1, "PEFT LoRA"),
        "qwha": (lambda: weft.QwhaConfig(r=R), dense_qwha, 1 / 1.3, "dense Hadamard products"),
        "qwha beside LoRA": (lambda: weft.QwhaConfig(r=R), lora, 1.3, "PEFT LoRA"),
        "diffora search over": (lambda: weft.DifforaConfig(r=R, rho=1.0), lora, 1.3, "PEFT LoRA"),
        **{
            slug: (lambda s=slug: weft.config_class(s)(), lora, 1.3, "PEFT LoRA")
            for slug in ("bayesian_lora", "block_lora", "hydra", "loldu", "salt", "snella", "tlora")
        },
    }


def attach_cases(args: argparse.Namespace) -> dict[str, tuple[Any, Any, float, str]]:
    random_init = {slug: (lambda s=slug: weft.config_class(s)(r=R)) for slug in ("sora", "dylora", "allora")}
    return {
        **{f"{s} attach": (make, lora, 1.1, "PEFT LoRA") for s, make in random_init.items()},
        "svfit full r attach": (
            lambda: weft.SvfitConfig(energy=1.0),
            lambda: peft.LoraConfig(r=R, init_lora_weights="pissa"),
            1.0,
            "PEFT pissa",
        ),
        "svfit sketch r=16 attach": (
            lambda: weft.SvfitConfig(r=16, svd="sketch"),
            lambda: peft.LoraConfig(r=16, init_lora_weights="pissa_niter_4"),
            1.0,
            "PEFT pissa_niter_4",
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated beginnings of case names")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    only = tuple(filter(None, args.only.split(",")))
    rows: dict[str, Any] = {}

    def report(name: str, wanted: float, opponent: str, **measured: Any) -> None:
        rows[name] = {"opponent": opponent, "wanted_ratio": wanted, **measured}
        ratios = "  ".join(
            f"{kind} {m['time_ratio']:5.2f}x" + (f" (memory {m['memory_ratio']:.3f}x)" if "memory_ratio" in m else "")
            for kind, m in measured.items()
        )
        print(f"{name:26s} {ratios}   wanted ≤ {wanted:.2f}x of {opponent}", flush=True)

    for name, (ours, theirs, wanted, opponent) in cases(args).items():
        if not only or name.startswith(only):
            runs = {"block": race(ours, theirs, block, args), "model": race(ours, theirs, whole_model, args)}
            report(name, wanted, opponent, **runs)
    for name, (ours, theirs, wanted, opponent) in attach_cases(args).items():
        if not only or name.startswith(only):
            report(name, wanted, opponent, attach=attach_cost(ours, theirs, args))
    if not only or "lora_sb gradient pass".startswith(only):
        report("lora_sb gradient pass", 1.3, "forward and backward", run=gradient_pass(args))
    if not only or "qwha transform".startswith(only):
        report("qwha transform", 0.5, "the product with H", run=transform_cost(args))

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": {"width": args.width, "tokens": args.tokens, "repeats": args.repeats, "dtype": str(args.dtype)},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "weft": weft.__version__},
        "commit": commit,
        "rows": rows,
    }
    if only and args.out.exists():  # the other cases stay as they were measured, under the same conditions
        before = json.loads(args.out.read_text())
        if all(before[key] == document[key] for key in ("settings", "device", "threads", "versions")):
            document |= {"command": before["command"], "rows": before["rows"] | rows}
    args.out.write_text(json.dumps(document, indent=1))


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"


if __name__ == "__main__":
    main()
