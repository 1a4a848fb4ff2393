"""Who gets how much: a size for every layer, so that all together keep a given share of the stored bits.

A layer comes with a menu: what each size costs in bits and, where the method knows it, the error that it leaves. An
allocator chooses from the menus and knows nothing of the method; every allocator therefore serves every method.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from weft.errors import UsageError, nearest


@dataclass(frozen=True)
class Menu:
    """What one layer can become. Size i is the i-th entry of `bits`; the layer as it is costs `dense` bits.

    Attributes:
        bits: stored bits of each size, strictly increasing.
        sizes: the sizes as the method counts them: ranks, where they are ranks.
        dense: stored bits of the untouched layer.
        errors: the share of the layer's objective that each size leaves, 1 for nothing kept; None if not known.
        values: the singular values behind the sizes, descending, of the untouched weight; None if not known.
        influence: how much the layer's block changes what passes through it; None if not known.
        type: what layers in the same place of every block have in common.
        losses: how much the model's loss rises where all layers of the type keep a share of TRIED; None if not known.
    """

    bits: Sequence[int]
    sizes: Sequence[int]
    dense: int
    errors: Tensor | None = None
    values: Tensor | None = None
    influence: float | None = None
    type: str = ""
    losses: Tensor | None = None


Menus = Mapping[str, Menu]
Sizes = dict[str, int | None]  # layer → size; None: the layer stays as it is
Rule = Callable[[Menus, float], Sizes]  # of the given share


def allocate(how: str | Rule, menus: Menus, keep: float, *, guard: bool = True) -> Sizes:
    """A size for every layer: at most `keep` of all dense bits, and no further step of any layer would fit.

    Args:
        how: a name in ALLOCATORS, or a rule like those.
        guard: leave a layer as it is where no smaller form of it saves bits. Without it every layer is replaced, and
            full sizes may cost more than the dense layer.

    Raises:
        UsageError: there is no such allocator, it needs what the menus lack, or `keep` is below the smallest sizes.
    """
    if isinstance(how, str) and how not in ALLOCATORS:
        raise UsageError(f"unknown allocation {how!r}: {nearest(how, ALLOCATORS)}")
    budget = int(keep * sum(menu.dense for menu in menus.values()) + 1e-6)
    options = {name: _affordable(menu) for name, menu in menus.items()} if guard else dict(menus)
    least = sum(min(menu.bits[0] if menu.bits else menu.dense, menu.dense) for menu in options.values())
    if least > budget:
        raise UsageError(
            f"keep={keep:g} is below the smallest form of this method, which stores "
            f"{least / sum(menu.dense for menu in menus.values()):.3g} of the bits"
        )
    rule = ALLOCATORS[how] if isinstance(how, str) else how
    return _filled(options, rule(options, keep), budget, guard)


def _affordable(menu: Menu) -> Menu:
    """The menu without what costs as much as the dense layer: the break-even guard."""
    count = sum(cost < menu.dense for cost in menu.bits)
    errors = None if menu.errors is None else menu.errors[:count]
    return replace(menu, bits=menu.bits[:count], sizes=menu.sizes[:count], errors=errors)


def cost(menu: Menu, size: int | None) -> int:
    """Bits of one choice."""
    return menu.dense if size is None else menu.bits[size]


def total(menus: Menus, sizes: Sizes) -> int:
    """Bits of all choices."""
    return sum(cost(menus[name], size) for name, size in sizes.items())


def _filled(menus: Menus, sizes: Sizes, budget: int, guard: bool) -> Sizes:
    """Trimmed to the budget where a rule overshot it, then grown, the smallest share first, until nothing fits."""
    sizes = dict(sizes)
    spent = total(menus, sizes)
    while spent > budget:  # a rule that cannot be met exactly: the largest share gives way
        shrinkable = [name for name, size in sizes.items() if size != 0 and menus[name].bits]
        name = max(shrinkable, key=lambda n: cost(menus[n], sizes[n]) / menus[n].dense)
        size = sizes[name]
        smaller = len(menus[name].bits) - 1 if size is None else size - 1
        spent += menus[name].bits[smaller] - cost(menus[name], size)
        sizes[name] = smaller
    queue = [(cost(menus[name], size) / menus[name].dense, name) for name, size in sizes.items() if size is not None]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        menu, size = menus[name], sizes[name]
        assert size is not None
        larger: int | None = size + 1
        if size + 1 == len(menu.bits):
            if not guard:
                continue
            larger = None
        step = cost(menu, larger) - menu.bits[size]
        if spent + step > budget:
            continue
        spent += step
        sizes[name] = larger
        if larger is not None:
            heapq.heappush(queue, (menu.bits[larger] / menu.dense, name))
    return sizes


def _largest(menu: Menu, bits: float) -> int | None:
    """The largest size of at most so many bits; the smallest there is where none is; None (dense) where that fits."""
    if bits >= menu.dense or not menu.bits:
        return None
    return max(sum(each <= bits for each in menu.bits) - 1, 0)


def uniform(menus: Menus, keep: float) -> Sizes:
    """The same share of every layer's bits."""
    return {name: _largest(menu, keep * menu.dense) for name, menu in menus.items()}


def energy(menus: Menus, keep: float) -> Sizes:
    """The same share of every layer's objective is explained: as large a share as the bits allow."""
    curves = {name: _needed(menu.errors, "energy") for name, menu in menus.items()}
    thresholds = torch.cat(list(curves.values())).unique()

    def at(most: Tensor) -> Sizes:
        return {name: _first(curve <= most) for name, curve in curves.items()}

    return _tightest(at, thresholds, menus, keep)


def water(menus: Menus, keep: float) -> Sizes:
    """The least sum of what all layers leave: bits go where the next one buys most (at one price for all layers)."""
    curves = {name: _needed(menu.errors, "water").double() for name, menu in menus.items()}
    bits = {name: torch.tensor([*menu.bits, menu.dense], dtype=torch.float64) for name, menu in menus.items()}
    whole = {name: torch.cat([curve, curve.new_zeros(1)]) for name, curve in curves.items()}

    def at(price: float) -> Sizes:
        picked = {name: int((whole[name] + price * bits[name]).argmin()) for name in menus}
        return {name: None if i == len(menus[name].bits) else i for name, i in picked.items()}

    budget = keep * sum(menu.dense for menu in menus.values())
    low, high = 0.0, max(float(w[0] / b[0].clamp(min=1)) for w, b in zip(whole.values(), bits.values())) + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if total(menus, at(middle)) <= budget else (middle, high)
    return at(high)


def threshold(menus: Menus, keep: float) -> Sizes:
    """WeLore's rule: singular values below one threshold go, measured from each weight's smallest to its largest.

    Ajay Jaiswal et al., "From GaLore to WeLore", arXiv 2407.11239.
    """
    relative = {name: normalised(_needed(menu.values, "threshold")) for name, menu in menus.items()}
    thresholds = torch.cat(list(relative.values())).unique()

    def at(cut: Tensor) -> Sizes:
        kept = {name: int((z >= cut).sum()) for name, z in relative.items()}
        return {name: _reaching(menus[name], k) for name, k in kept.items()}

    return _tightest(at, thresholds, menus, keep)


def normalised(values: Tensor) -> Tensor:
    """Singular values, descending, moved to [0, 1]: the largest to 1, the smallest to 0; 1 where all are equal."""
    span = values[0] - values[-1]
    return (values - values[-1]) / span if span > 0 else torch.ones_like(values)


def block_influence(menus: Menus, keep: float, *, smoothing: float = 0.15, most: float = 0.8) -> Sizes:
    """MoDeGPT's rule: a block's sparsity is L·φ·softmax(−s/ε) of its influence s = E[1 − cos(x, x')], at most `most`.

    What a clamped block cannot give is asked of the others, in the same proportions. Layers outside of the blocks, as
    embeddings, keep the average share. Chi-Heng Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model
    Compression", arXiv 2408.09632.
    """
    inside = {name: menu for name, menu in menus.items() if menu.influence is not None}
    if 0 < len(inside) < len(menus):
        outside = {name: menu for name, menu in menus.items() if name not in inside}
        return {**block_influence(inside, keep, smoothing=smoothing, most=most), **uniform(outside, keep)}
    s = torch.tensor([_known(menu.influence, "block_influence") for menu in menus.values()], dtype=torch.float64)
    dense = torch.tensor([menu.dense for menu in menus.values()], dtype=torch.float64)
    wanted = (1 - keep) * dense.sum()
    weights = torch.softmax(-s / smoothing, 0)
    free = torch.ones_like(s, dtype=torch.bool)
    sparsity = torch.zeros_like(s)
    for _ in range(len(s)):
        rest = wanted - (sparsity * dense)[~free].sum()
        sparsity[free] = rest * weights[free] / (weights * dense)[free].sum()
        over = free & (sparsity > most)
        if not over.any() or bool((free == over).all()):
            break
        sparsity[over], free = most, free & ~over
    return {
        name: _largest(menu, float(1 - share) * menu.dense)
        for (name, menu), share in zip(menus.items(), sparsity.clamp(max=1))
    }


TRIED = (0.2, 0.4, 0.6, 0.8)


def sweep(menus: Menus, keep: float) -> Sizes:
    """LoRD's sweep over types of layers: those whose cut raises the model's loss least are cut hardest.

    Each type alone keeps a share of its bits, in all blocks, for the shares of TRIED; between those the loss is taken
    to rise linearly, and never to fall as less is kept. The types' shares are those of the least sum of rises.
    Ayush Kaushal et al., "LORD", arXiv 2309.14021, who do not say how the sweep becomes ranks.
    """
    types: dict[str, list[Menu]] = {}
    for menu in menus.values():
        types.setdefault(menu.type, []).append(menu)
    shares = np.linspace(0.01, 0.99, 99)
    merged = {}
    for name, members in types.items():
        rises = np.maximum.accumulate([0.0, *_needed(members[0].losses, "sweep").tolist()[::-1]])[::-1]
        nothing = 2 * rises[0] - rises[1]  # as from the second share to the first
        curve = np.interp(shares, [0, *TRIED, 1], [nothing, *rises])
        dense = sum(menu.dense for menu in members)
        merged[name] = Menu([int(x * dense) for x in shares], range(99), dense, errors=torch.from_numpy(curve))
    picked = water(merged, keep)

    def share(menu: Menu) -> float:
        place = picked[menu.type]
        return 1.0 if place is None else float(shares[place])

    return {name: _largest(menu, share(menu) * menu.dense) for name, menu in menus.items()}


def tried(menu: Menu, share: float) -> int | None:
    """The size that a sweep tries for a share of the bits; None: none is smaller than the layer as it is."""
    return _largest(_affordable(menu), share * menu.dense)


ALLOCATORS: dict[str, Rule] = {
    "uniform": uniform,
    "energy": energy,
    "water": water,
    "threshold": threshold,
    "block_influence": block_influence,
    "sweep": sweep,
}
# what an allocator reads from the menus, beside bits
READS = {
    "energy": "errors",
    "water": "errors",
    "threshold": "values",
    "block_influence": "influence",
    "sweep": "losses",
}


def _needed(found: Tensor | None, how: str) -> Tensor:
    if found is None:
        raise UsageError(f"allocation {how!r} needs {READS[how]} of every size, which this method does not have")
    return found


def _known(found: float | None, how: str) -> float:
    if found is None:
        raise UsageError(f"allocation {how!r} needs calibration data and a model made of blocks")
    return found


def _reaching(menu: Menu, rank: int) -> int | None:
    """The first size of at least so many, None (dense) where there is none."""
    return next((i for i, size in enumerate(menu.sizes) if size >= rank), None)


def _first(good: Tensor) -> int | None:
    """The first size that is good enough, None where only the dense layer is."""
    return int(good.int().argmax()) if bool(good.any()) else None


def _tightest(at: Callable[[Tensor], Sizes], thresholds: Tensor, menus: Menus, keep: float) -> Sizes:
    """The choice of most bits within the budget, along thresholds (ascending) of which more means fewer bits."""
    budget = keep * sum(menu.dense for menu in menus.values())
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(menus, at(thresholds[middle])) <= budget else (middle + 1, high)
    return at(thresholds[high])
