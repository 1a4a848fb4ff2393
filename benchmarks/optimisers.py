"""Optimisers side by side with what a user would pick, in one process: ratios, at the matrix shapes of real models.

    pip install --no-deps galore-torch bitsandbytes
    python benchmarks/optimisers.py                   a block of a 60M and of a 1B Llama, beside galore-torch and AdamW
    python benchmarks/optimisers.py --training-step   forward, backward and step of a 1B block, beside AdamW's
    python benchmarks/optimisers.py --eight-bit       the kernels that make bytes of moments
    python benchmarks/optimisers.py --curve           the same losses as galore-torch's
    python benchmarks/optimisers.py --selection       DCT's choice of frequencies beside our refresh of an SVD's basis
    python benchmarks/optimisers.py --lora-pro        LoRA-Pro's step on a 1B block beside AdamW's on the whole weights
    python benchmarks/optimisers.py --memory          peak memory of updates in the backward pass, and theirs
    python benchmarks/optimisers.py --widths          blocks from 256 to 4096 wide, and docs/assets/optimisers.svg
    python benchmarks/optimisers.py --draw            that picture alone, from the file (`pip install weft[plots]`)

Results go to benchmarks/results/optimisers/*.json. What is compared takes turns, and medians are divided. A refresh is
a step that fits a basis, less one that does not: each shape of the block's matrices alone (a transposed one is none of
its own), times their number.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import weft.optim

SHAPES = {"60M": (512, 1376, 128), "1B": (2048, 5632, 512)}  # hidden, intermediate, rank
WIDTHS = (256, 512, 1024, 2048, 4096)
RESULTS = Path(__file__).parent / "results" / "optimisers"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "optimisers.svg"
GAP = 200


def shapes(hidden: int, intermediate: int) -> list[tuple[int, int]]:
    """Those of the seven matrices of a Llama block."""
    return [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]


def matrices(wanted: Iterable[tuple[int, int]], seed: int = 0) -> list[nn.Parameter]:
    """Matrices of these shapes, each with a gradient."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for shape in wanted:
        p = nn.Parameter(torch.randn(shape, generator=draw) * 0.02)
        k = min(shape) // 4  # a spectrum that falls, as gradients' do
        left = torch.randn(shape[0], k, generator=draw) * torch.logspace(0, -2, k)
        p.grad = left @ torch.randn(k, shape[1], generator=draw) + 0.01 * torch.randn(shape, generator=draw)
        made.append(p)
    return made


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median of `repeats` calls of each, which take turns; of one thread its own time, whatever else runs."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            found[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def second(call: Callable[[], Any], repeats: int = 1) -> float:
    return seconds({"": call}, repeats)[""]


def optimiser(name: str, parameters: list[nn.Parameter], rank: int) -> Any:
    from galore_torch import GaLoreAdamW

    group = {"params": parameters, "rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    if name == "galore":
        return weft.optim.Galore([group], lr=1e-3)
    if name == "galore-torch":
        return GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True)
    return torch.optim.AdamW(parameters, lr=1e-3, fused=name == "fused adamw")


def refit(optimizer: Any) -> None:
    """Let the next step begin with a fit, warm as every one but the first is."""
    for state in optimizer.state.values():
        if "next_fit" in state:
            state["next_fit"] = state["step"]
        else:
            state["step"] = GAP  # galore-torch fits at its multiples


def refreshes(name: str, of: Counter[tuple[int, int]], rank: int, repeats: int) -> dict[str, float]:
    """Seconds of the first refresh of matrices of these shapes, and of a later one."""
    first = later = 0.0
    for shape, count in of.items():
        (p,) = matrices([shape])
        optimizer = optimiser(name, [p], rank)
        began = second(optimizer.step)
        step = second(optimizer.step, repeats)
        # each gradient is another, of which the basis in force holds nine tenths, as it does in training
        others = [p.grad + 0.3 * matrices([shape], seed)[0].grad for seed in range(1, repeats + 1)]

        def refresh(p: nn.Parameter = p, optimizer: Any = optimizer, others: list[Tensor] = others) -> None:
            p.grad = others.pop()
            refit(optimizer)
            optimizer.step()

        first += count * (began - step)
        later += count * (second(refresh, repeats) - step)
    return {"first_refresh_seconds": first, "refresh_seconds": later}


def steps(hidden: int, intermediate: int, rank: int, repeats: int) -> dict[str, Any]:
    """Refresh and step of one block: ours, galore-torch's, AdamW's and fused AdamW's."""
    of = shapes(hidden, intermediate)
    found: dict[str, Any] = {}
    for name in ("galore", "galore-torch"):
        kinds = Counter((max(shape), min(shape)) for shape in of)
        found[name] = refreshes(name, kinds, rank, max(8192 // hidden, 3) if hidden < 4096 else 1)
    made = {name: optimiser(name, matrices(of), rank) for name in ("galore", "galore-torch", "adamw", "fused adamw")}
    for optimizer in (made["galore"], made["adamw"], made["fused adamw"]):
        optimizer.step()
    theirs = made["galore-torch"]
    with no_svd():
        theirs.step()
    for name, step in seconds({name: optimizer.step for name, optimizer in made.items()}, repeats).items():
        row = found.setdefault(name, {})
        row["step_seconds"] = step
        row["averaged_seconds"] = step + row.get("refresh_seconds", 0.0) / GAP
        print(f"{hidden}, {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    ours, theirs, adamw = found["galore"], found["galore-torch"], found["adamw"]
    ours["state_bytes"] = sum(t.numel() * t.element_size() for t in tensors(made["galore"].state))
    formula = sum(4 * rank * (min(shape) + 2 * max(shape)) for shape in of)
    found["ratios"] = {
        "refresh, theirs / ours": theirs["refresh_seconds"] / ours["refresh_seconds"],
        "first refresh, theirs / ours": theirs["first_refresh_seconds"] / ours["first_refresh_seconds"],
        "averaged step, ours / theirs": ours["averaged_seconds"] / theirs["averaged_seconds"],
        "step, ours / AdamW": ours["step_seconds"] / adamw["step_seconds"],
        "step, theirs / AdamW": theirs["step_seconds"] / adamw["step_seconds"],
        "step, ours / fused AdamW": ours["step_seconds"] / found["fused adamw"]["step_seconds"],
        "state, ours / formula": ours["state_bytes"] / formula,
    }
    return found


@contextlib.contextmanager
def no_svd() -> Iterator[None]:
    """galore-torch's basis by a QR: its steps, which are measured without the fit, take the same time on any."""
    from galore_torch.galore_projector import GaLoreProjector

    def quick(self: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        q = torch.linalg.qr((weights.mT if type == "right" else weights)[:, :rank]).Q.contiguous()
        return q.mT.contiguous() if type == "right" else q

    with mock.patch.object(GaLoreProjector, "get_orthogonal_matrix", quick):
        yield


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
        usual = second(step, repeats)
        if name == "galore":
            refit(optimizer)
            refresh = second(step) - usual
        found[name] = {"step_seconds": usual, "refresh_seconds": refresh, "averaged_seconds": usual + refresh / GAP}
        print(f"training step, {name}: {found[name]}", flush=True)
    found["ratios"] = {
        f"whole step, ours / {other}": found["galore"]["averaged_seconds"] / found[other]["averaged_seconds"]
        for other in ("adamw", "fused adamw")
    }
    return found


def eight_bit(repeats: int) -> dict[str, Any]:
    """Bytes from numbers, 512 × 5632 of them: look-ups, bitsandbytes' kernel, torchao's, compiled too, bucketize."""
    from bitsandbytes.functional import quantize_blockwise
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    from weft.optim._rules import _map, _nearest_codes

    unit = torch.rand(512 * 5632 // 256, 256) * 2 - 1
    code = _map(True, unit.device)
    compiled = torch.compile(quantize_8bit_with_qmap, dynamic=False)
    compiled(unit, code)
    middles = (code[1:] + code[:-1]) / 2
    calls = {
        "look-ups": lambda: _nearest_codes(unit, True),
        "bitsandbytes": lambda: quantize_blockwise(unit, code=code, blocksize=256),
        "torchao": lambda: quantize_8bit_with_qmap(unit, code),
        "torchao, compiled": lambda: compiled(unit, code),
        "torch.bucketize": lambda: torch.bucketize(unit, middles, out_int32=True).to(torch.uint8),
    }
    found = {name: {"seconds": taken} for name, taken in seconds(calls, repeats).items()}
    ours = found["look-ups"]["seconds"]
    return {**found, "ratios": {f"{name} / look-ups": row["seconds"] / ours for name, row in found.items()}}


def curve() -> dict[str, Any]:
    """A small Llama on one stream: the losses of galore-torch, with our signs too, and of ours, exact and warm."""
    from galore_torch import GaLoreAdamW
    from transformers import LlamaConfig, LlamaForCausalLM

    from weft import builtin

    text = "\n".join(row["text"] for row in builtin.texts("stdlib", "train"))
    data = torch.tensor(list(text[:400_000].encode()), dtype=torch.long)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4
    )
    found: dict[str, Any] = {}
    for name in ("galore-torch", "galore-torch, canonical signs", "exact", "warm"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        groups = weft.optim.param_groups(model, rank=32, update_proj_gap=20, scale=0.25, proj_type="std")
        signs: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if name.startswith("galore-torch"):
            plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
            if "signs" in name:
                signs = mock.patch.object(torch.linalg, "svd", canonical_svd(torch.linalg.svd))
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
            with signs:
                optimizer.step()
            losses.append(loss.item())
        found[name] = {"losses": losses[::10], "last_20": statistics.fmean(losses[-20:])}
        print(f"curve, {name}: last 20 losses {found[name]['last_20']:.4f}", flush=True)
    last = {name: row["last_20"] for name, row in found.items()}
    found["ratios"] = {f"last losses, {name} / galore-torch": last[name] / last["galore-torch"] for name in last}
    return found


def canonical_svd(svd: Callable[..., Any]) -> Callable[..., Any]:
    """The same decomposition with the signs that ours have."""
    from weft.algebra.svd import canonical_signs

    def signed(m: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = svd(m, full_matrices=full_matrices)
        u, vh = canonical_signs(u, vh)
        return u, s, vh

    return signed


def selection(repeats: int) -> dict[str, Any]:
    """A new choice of 512 directions for a gradient of 2048 × 2048: by FFT, by a product, by warm power steps."""
    from weft.algebra.random import generator
    from weft.algebra.svd import leading_vectors
    from weft.algebra.transforms import dct
    from weft.optim.dct_projection import basis, strongest

    n, rank = 2048, 512
    g = matrices([(n, n)])[0].grad
    assert g is not None
    c, transform = basis(n, g.dtype, g.device), dct(n)
    start = leading_vectors(g, rank, generator=generator(0))
    calls = {
        "fft": lambda: strongest(transform.forward(g), rank, 1),
        "matmul": lambda: strongest(g @ c.mT, rank, 1),
        "warm refresh": lambda: leading_vectors(g, rank, start=start, generator=generator(1)),
    }
    found: dict[str, Any] = {name: {"seconds": taken} for name, taken in seconds(calls, repeats).items()}
    refresh = found["warm refresh"]["seconds"]
    found["ratios"] = {f"warm refresh / {name}": refresh / found[name]["seconds"] for name in ("fft", "matmul")}
    return found


def lora_pro(repeats: int) -> dict[str, Any]:
    """LoRA-Pro on rank 8 of every matrix of a 1B block, beside AdamW on the matrices themselves."""
    hidden, intermediate, _ = SHAPES["1B"]
    whole = matrices(shapes(hidden, intermediate))
    adamw = torch.optim.AdamW(whole, lr=1e-4)
    factors: list[nn.Parameter] = []
    for p in whole:
        a, b = nn.Parameter(torch.randn(8, p.shape[1]) * 0.02), nn.Parameter(torch.randn(p.shape[0], 8) * 0.02)
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        factors += [a, b]
    calls = {"adamw": adamw.step}
    for variant in ("full", "efficient"):
        calls[variant] = weft.optim.LoraPro([{"params": factors, "scaling": 2.0}], lr=1e-4, variant=variant).step
    for call in calls.values():
        call()
    found: dict[str, Any] = {name: {"step_seconds": taken} for name, taken in seconds(calls, repeats).items()}
    least = found["adamw"]["step_seconds"]
    found["ratios"] = {f"{name} / AdamW on the weights": found[name]["step_seconds"] / least for name in found}
    return found


MEMORY = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
WAYS = ("galore, in backward", "galore-torch, in backward", "galore", "galore-torch", "adamw")


def memory() -> dict[str, Any]:
    """Peak memory of three steps of a stack of Llama blocks, each way in a process of its own."""
    found: dict[str, Any] = {"config": MEMORY, "rank": MEMORY["hidden_size"] // 4}
    for way in WAYS:
        command = [sys.executable, __file__, "--memory-of", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = {"peak_bytes": int(done.stdout.split()[-1])}
        print(f"{way}: {found[way]['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    peak = {way: found[way]["peak_bytes"] for way in WAYS}
    found["ratios"] = {
        "in backward, ours / theirs": peak[WAYS[0]] / peak[WAYS[1]],
        "ours, in backward / step()": peak[WAYS[0]] / peak["galore"],
        "theirs, in backward / step()": peak[WAYS[1]] / peak["galore-torch"],
        "ours in backward / AdamW": peak[WAYS[0]] / peak["adamw"],
    }
    return found


def memory_of(way: str) -> int:
    """Bytes at the peak above those before there was a model."""
    from galore_torch import GaLoreAdamW
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=32, **MEMORY)
    with torch.device("meta"):
        LlamaModel(config)  # which loads what it needs
    before = resident("VmRSS")
    torch.manual_seed(0)
    model = LlamaModel(config)
    rank = MEMORY["hidden_size"] // 4
    name, _, inside = way.partition(", ")
    groups = weft.optim.param_groups(model, rank=rank, update_proj_gap=GAP, scale=0.25, proj_type="std")
    plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    optimizer: Any = None
    if name == "galore":
        optimizer = weft.optim.Galore(groups, lr=1e-3)
        if inside:
            weft.optim.update_in_backward(optimizer)
    elif not inside:
        optimizer = (
            GaLoreAdamW(plain, lr=1e-3, no_deprecation_warning=True)
            if name == "galore-torch"
            else torch.optim.AdamW(model.parameters(), lr=1e-3)
        )
    else:  # as the authors' training script does: an optimiser for each parameter, stepped by its hook
        own = {
            p: GaLoreAdamW([{**group, "params": [p]}], lr=1e-3, no_deprecation_warning=True)
            for group in plain
            for p in group["params"]
        }

        def hook(p: nn.Parameter) -> None:
            own[p].step()
            own[p].zero_grad()

        for p in own:
            p.register_post_accumulate_grad_hook(hook)
    for step in range(3):
        ids = torch.randint(32, (1, 64), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        if not inside:
            optimizer.step()
            optimizer.zero_grad()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def widths(repeats: int, widest: int) -> dict[str, Any]:
    """Blocks of several widths, 11/4 of that in between, rank a quarter."""
    found = {str(n): steps(n, 11 * n // 4, n // 4, repeats if n < 4096 else 3) for n in WIDTHS if n <= widest}
    ratios = {f"{what}, {n}": ratio for n, rows in found.items() for what, ratio in rows.pop("ratios").items()}
    return {"rows": found, "ratios": {what: ratio for what, ratio in ratios.items() if "theirs" in what}}


def draw(rows: dict[str, Any], out: Path) -> None:
    """Seconds by width: of a step, its share of a refresh included, and of a refresh."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "weft", "font.family": "sans-serif", "font.size": 9}
    from matplotlib import pyplot as plt

    colours = {"galore": "#2a5db0", "galore-torch": "#c4622d", "adamw": "#888"}
    labels = {"galore": "weft", "galore-torch": "galore-torch", "adamw": "AdamW"}
    figure, cells = plt.subplots(1, 2, figsize=(9, 3.6))
    for cell, key, title in zip(cells, ("averaged", "refresh"), ("step, averaged over a refresh period", "refresh")):
        for name, colour in colours.items():
            if f"{key}_seconds" in next(iter(rows.values()))[name]:
                times = [row[name][f"{key}_seconds"] for row in rows.values()]
                cell.plot([int(n) for n in rows], times, "o-", color=colour, linewidth=1.5, markersize=4)
                cell.annotate(
                    labels[name], (int(list(rows)[-1]), times[-1]), (6, 0), textcoords="offset points", color=colour,
                    fontsize=8, va="center",
                )  # fmt: skip
        cell.set_title(title, fontsize=9, loc="left")
        cell.set_xscale("log", base=2)
        cell.set_yscale("log")
        cell.minorticks_off()
        cell.set_xticks([int(n) for n in rows], list(rows), fontsize=7)
        cell.tick_params(axis="y", labelsize=7)
        cell.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("width of the block", fontsize=9)
    figure.supylabel("seconds", fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("training-step", "eight-bit", "curve", "selection", "lora-pro", "memory", "widths", "draw")
    for part in parts:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SHAPES, help="one size alone")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--widest", type=int, default=WIDTHS[-1], help="of --widths: none above")
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args.memory_of))
        return
    if args.draw:
        draw(json.loads((RESULTS / "widths.json").read_text())["rows"], PICTURE)
        return
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
    if args.memory:
        found["memory"] = memory()
    if args.widths:
        found["widths"] = widths(args.repeats, args.widest)
        draw(found["widths"]["rows"], PICTURE)
    if not found:
        sizes = [args.size] if args.size else SHAPES
        found = {f"steps_{size}": steps(*SHAPES[size], args.repeats) for size in sizes}
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
