"""k-means with clusters of given sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balanced_kmeans(x: Tensor, sizes: Sequence[int], generator: torch.Generator, steps: int = 30) -> Tensor:
    """The cluster of each row of x (n × d), of which cluster j has exactly sizes[j]; the sizes sum to n.

    Lloyd's steps from rows that are drawn far apart (k-means++), as long as they gain: each row to its nearest mean
    that has room (`assigned`), then means anew. An integer vector (n) on x's device.

    Raises ValueError where the sizes do not sum to n.
    """
    if sum(sizes) != len(x):
        raise ValueError(f"clusters of {sum(sizes)} rows in all were asked of {len(x)}")
    means = _far_apart(x, len(sizes), generator)
    labels, least = x.new_zeros(len(x), dtype=torch.long), float("inf")
    for _ in range(steps):
        distances = _squared(x, means)
        found = assigned(distances, sizes)
        left = float(distances.gather(1, found[:, None]).sum())
        if left >= least:
            break
        labels, least = found, left
        members = torch.nn.functional.one_hot(labels, len(sizes)).to(x.dtype)
        means = members.mT @ x / members.sum(0).clamp(min=1)[:, None]
    return labels


def assigned(distances: Tensor, sizes: Sequence[int]) -> Tensor:
    """A cluster for each row of distances (n × N), cheap in all, of which cluster j gets exactly sizes[j].

    Every row asks for its nearest cluster with room. Where more ask than fit, those stay whose next best is worst; the
    others ask again. So a round fills a cluster or is the last, and with two clusters nothing is cheaper.
    """
    room = torch.tensor(sizes, device=distances.device)
    labels = torch.full((len(distances),), -1, device=distances.device)
    while len(free := (labels < 0).nonzero()[:, 0]):
        costs = distances[free].masked_fill(room == 0, torch.inf)
        best = costs.topk(min(2, costs.shape[1]), largest=False)
        wanted, regret = best.indices[:, 0], best.values[:, -1] - best.values[:, 0]
        order = regret.argsort(descending=True, stable=True)
        asks = torch.nn.functional.one_hot(wanted[order], len(sizes)).cumsum(0)  # how many want the same, up to each
        stays = order[asks.gather(1, wanted[order][:, None])[:, 0] <= room[wanted[order]]]
        labels[free[stays]] = wanted[stays]
        room = room - torch.bincount(wanted[stays], minlength=len(sizes))
    return labels


def _squared(x: Tensor, means: Tensor) -> Tensor:
    """‖x_i − m_j‖² (n × N)."""
    return (x.square().sum(1)[:, None] - 2 * x @ means.mT + means.square().sum(1)).clamp(min=0)


def _far_apart(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of x, each drawn in proportion to its squared distance from those before; any, where all are met."""
    rows = [int(torch.randint(len(x), (1,), generator=generator))]
    nearest = _squared(x, x[rows])[:, 0]
    for _ in range(count - 1):
        weights = nearest.double().cpu()
        weights = weights if float(weights.sum()) > 0 else torch.ones_like(weights)
        rows.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, _squared(x, x[rows[-1:]])[:, 0])
    return x[rows]
