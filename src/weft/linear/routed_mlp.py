"""Routed MLP: the units of a stock MLP in N experts, of which a token meets the k that its router ranks first.

    E_j(x) = Wd_j·(act(Wg_j·x) ∘ (Wu_j·x))        m = the k largest of r(x) = Wr·x + br, as ones and zeros
    y = (N // k)·Σ_j m_j·E_j(x) + b                Wg_j, Wu_j: f_j × d, Wd_j: d × f_j, Wr: N × d; OPT has no Wg

An expert is some of the units with their weights and biases; b is the bias of the layer that closes the MLP. Experts
have the same number of units, or the first of them one more where N does not divide it. All of them together are the
stock MLP, in another order; no stock MLP does what k of them do.

Llama's, Qwen2's and Qwen3's MLPs, and OPT's decoder layers, which hold their fc1 and fc2 themselves. The experts lie
where the layer that closes the MLP was. Each is made of plain nn.Linear under the stock names, so that adapters,
quantisation and a second compression find them; the router is none, as it learns nothing of the task.

Out of training each expert is given its own tokens and no others, so that less is computed. In training, and where it
is compiled, all experts meet all tokens, and a mask chooses: shapes are fixed then, and every expert has a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import UsageError
from weft.linear._narrow import Narrow, filled, resized
from weft.linear._structured import Structured
from weft.linear.narrow_mlp import NarrowMlp

ACTIVATIONS = {"down_proj": "act_fn", "fc2": "activation_fn"}  # beside the layer that closes the MLP


def shares(units: int, experts: int) -> list[int]:
    """How many units each expert has."""
    return [units // experts + (j < units % experts) for j in range(experts)]


class Expert(nn.Module):
    """An MLP of some units: the layers that give them, an activation, and the layer that takes them."""

    def __init__(self, into: Mapping[str, nn.Module], act: nn.Module, out: tuple[str, nn.Module]) -> None:
        super().__init__()
        self.into, self.out, self.act = tuple(into), out[0], act
        for name, layer in (*into.items(), out):
            self.add_module(name, layer)

    @classmethod
    def whole(cls, module: nn.Module) -> Expert:
        """A stock MLP, or the one in a stock decoder layer, with its own layers."""
        into, out = NarrowMlp.stocks[type(module).__name__]
        layers = {name: getattr(module, name) for name in into}
        return cls(layers, getattr(module, ACTIVATIONS[out]), (out, getattr(module, out)))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (getattr(self, name) for name in self.into)
        units = self.act(first(x))
        for layer in others:
            units = units * layer(x)
        return getattr(self, self.out)(units)


class Router(nn.Module):
    """r(x): … × N. No nn.Linear, so that no adapter, quantiser or compression takes it for one."""

    def __init__(self, width: int, experts: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """N experts and the router before them; `weight` has no elements, so that no stock layer takes it for its own."""

    weight: Tensor
    bias: nn.Parameter | None
    experts: nn.ModuleList

    def __init__(self, whole: Expert, count: int, active: int) -> None:
        """Without values, in place of all units."""
        super().__init__()
        last: Any = getattr(whole, whole.out)
        like = last.weight
        self.active = active
        self.router = Router(last.out_features, count, like.device, like.dtype)
        self.experts = nn.ModuleList()
        for size in shares(last.in_features, count):
            into = {name: resized(getattr(whole, name), out=size) for name in whole.into}
            self.experts.append(Expert(into, whole.act, (whole.out, resized(last, in_=size, bias=False))))
        bias = None if last.bias is None else nn.Parameter(torch.empty_like(last.bias))
        self.register_parameter("bias", bias)
        self.register_buffer("weight", like.new_empty(0))
        self.train(last.training)

    @property
    def scale(self) -> int:
        """N // k, which keeps the size of the output."""
        return len(self.experts) // self.active

    def chosen(self, logits: Tensor) -> Tensor:
        """The k experts (… × k) of some tokens, by what their router says of them (… × N)."""
        return logits.topk(self.active, dim=-1).indices

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.active == len(self.experts):
            y = sum(expert(flat) for expert in self.experts)
        elif self.training or torch.compiler.is_compiling() or not len(flat):
            y = self.scale * self.masked(flat)
        else:
            y = self.scale * self.dispatched(flat)
        return (y if self.bias is None else y + self.bias).view(x.shape)

    def masked(self, x: Tensor) -> Tensor:
        """Σ_j m_j·E_j(x) for the tokens of x (n × d), from all experts on all tokens."""
        mask = x.new_zeros(len(x), len(self.experts)).scatter(1, self.chosen(self.router(x)), 1.0)
        return sum(m[:, None] * expert(x) for m, expert in zip(mask.unbind(1), self.experts))  # type: ignore[return-value]

    def dispatched(self, x: Tensor) -> Tensor:
        """The same from each expert on its own tokens, of which there is one at least."""
        chosen = self.chosen(self.router(x))
        if len(x) == 1:
            return sum(self.experts[j](x) for j in chosen[0].tolist())  # type: ignore[return-value]
        order = chosen.flatten().argsort(stable=True)  # places in n × k, by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = x[order // self.active].split(counts)
        found = torch.cat([expert(part) for expert, part in zip(self.experts, parts) if len(part)])
        return found[order.argsort()].view(len(x), self.active, -1).sum(1)


class RoutedMlp(Narrow):
    """A stock MLP in experts."""

    stocks = NarrowMlp.stocks
    linear = False  # of the kind; with k = N it is the stock MLP

    @classmethod
    def of(cls, module: Any, *, experts: int, active: int) -> Self:
        """A stock MLP's form of so many experts, k of them active, without values."""
        made = cls.like(module)
        into, out = cls.stocks[made.stock.__name__]
        units = getattr(module, out).in_features
        if not 1 <= experts <= units:
            raise UsageError(f"experts={experts}: an MLP of {units} units has 1 to {units}")
        if not 1 <= active <= experts:
            raise UsageError(f"active={active}: of {experts} experts 1 to {experts} are active")
        setattr(made, out, Experts(Expert.whole(module), experts, active))
        for name in (*into, ACTIVATIONS[out]):
            if made.alone:
                delattr(made, name)
            else:
                setattr(made, name, nn.Identity())
        return made

    @property
    def alone(self) -> bool:
        """Whether it is an MLP and nothing else; else its own forward passes x through to the experts."""
        return self.stock.__name__ != "OPTDecoderLayer"

    @property
    def inner(self) -> Experts:
        """The experts and their router."""
        return getattr(self, self.stocks[self.stock.__name__][1])

    @torch.no_grad()
    def fill(self, module: nn.Module, order: Tensor, router: Tensor, bias: Tensor) -> Self:
        """Take the stock module's values, its units in the order of the experts, and the router's (N × d and N)."""
        into, out = self.stocks[self.stock.__name__]
        last: Any = getattr(module, out)
        places = order.split(shares(len(order), len(self.inner.experts)))
        for expert, units in zip(self.inner.experts, places):
            for name in into:
                old: Any = getattr(module, name)
                filled(getattr(expert, name), old.weight[units], None if old.bias is None else old.bias[units])
            filled(getattr(expert, out), last.weight[:, units])
        if self.inner.bias is not None:
            self.inner.bias.copy_(last.bias)
        self.inner.router.weight.copy_(router)
        self.inner.router.bias.copy_(bias)
        return self

    def options(self) -> dict[str, Any]:
        return {"experts": len(self.inner.experts), "active": self.inner.active}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) if self.alone else super().forward(*args, **kwargs)

    def check_dense(self, place: nn.Module) -> None:
        count, inner = len(self.inner.experts), self.inner
        if inner.active < count:
            raise UsageError(f"a token meets {inner.active} of {count} experts, and no stock MLP routes")
        into, out = self.stocks[self.stock.__name__]
        for expert, name in itertools.product(inner.experts, (*into, out)):
            layer = getattr(expert, name)
            if not (type(layer) is nn.Linear or isinstance(layer, Structured)):
                raise UsageError(f"{name} inside is a {type(layer).__module__}.{type(layer).__name__}")

    def restored(self, place: nn.Module) -> nn.Module:
        made, inner = self.as_stock(), self.inner
        into, out = self.stocks[self.stock.__name__]
        each = {name: [getattr(expert, name) for expert in inner.experts] for name in (*into, out)}
        for name in into:
            weight, old = torch.cat([layer.weight for layer in each[name]]), each[name][0]
            bias = None if old.bias is None else torch.cat([layer.bias for layer in each[name]])
            setattr(made, name, filled(resized(old, out=len(weight)), weight, bias))
        weight = torch.cat([layer.weight for layer in each[out]], dim=1)
        last = resized(each[out][0], in_=weight.shape[1], bias=inner.bias is not None)
        setattr(made, out, filled(last, weight, inner.bias))
        setattr(made, ACTIVATIONS[out], inner.experts[0].act)
        return made
