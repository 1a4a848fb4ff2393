"""Law 15. torch.compile: equal to eager, at most two graphs a layer shape over fifty steps with draws and events."""

from __future__ import annotations

import shutil
from collections import Counter

import harness
import pytest
import specimens
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

STEPS = 50


class Stack(nn.Module):
    """Four linears of two shapes, so that layers of one shape must share a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(specimens.VOCAB, 19)
        self.up = nn.ModuleList([nn.Linear(19, 23), nn.Linear(19, 23, bias=True)])
        self.down = nn.ModuleList([nn.Linear(23, 19), nn.Linear(23, 19)])

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> specimens.SequenceClassifierOutput:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        loss = None if labels is None else nn.functional.cross_entropy(x[:, -1], labels[:, -1] % 19)
        return specimens.SequenceClassifierOutput(loss=loss, logits=x)


STACK = specimens.Cell("Stack", "Linear", Stack, {"target_modules": ["0", "1"]})


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def shape_of(layer) -> tuple[int, ...]:
    return tuple(getattr(layer.get_base_layer(), harness.parameter_name(layer)).shape)


def counting(graphs: Counter, key):
    """A backend that counts the forward graphs it is given and runs them as they are."""

    def forward(graph, inputs):
        graphs[key] += 1
        return graph.forward

    return aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, inputs: graph.forward)


@pytest.mark.parametrize("cell", [STACK, specimens.BY_NAME["Conv1D"]], ids=lambda c: c.name)
def test_two_graphs_a_layer_shape_over_fifty_steps(slug, cell, tmp_path):
    """Each layer is compiled by itself."""
    graphs: Counter = Counter()
    model = harness.attach(slug, cell, short=True)
    eager = harness.attach(slug, cell, short=True)
    backends = {shape_of(layer): counting(graphs, shape_of(layer)) for _, layer in harness.layers(model)}
    for _, layer in harness.layers(model):  # layers of a shape share what was compiled for the first
        layer.compile(backend=backends[shape_of(layer)], fullgraph=True)
    pair = []
    for one in (model, eager):
        for module in one.modules():
            if isinstance(module, nn.Embedding):  # inputs that require gradients, as from layers below that train
                module.register_forward_hook(lambda module, args, output: output.requires_grad_())
        optimizer, scheduler = harness.optimizer_for(
            one, tmp_path, steps=STEPS, lr_scheduler_type="linear", warmup_steps=5
        )
        pair.append((one, optimizer, scheduler))
    for i in range(STEPS):
        for one, optimizer, scheduler in pair:
            harness.train(one, optimizer, 1, first=i, rows=4)
            scheduler.step()
    assert graphs and all(count <= 2 for count in graphs.values()), graphs
    for (name, a), b in zip(harness.trainable(model).items(), harness.trainable(eager).values(), strict=True):
        assert harness.relative(a, b) <= 1e-4, name
    assert [c.step for c in harness.controllers(model)] == [STEPS]


def test_the_whole_model_is_one_graph(slug, tmp_path):
    """No break inside an adapted layer, and no recompilation beyond a second graph."""
    graphs: Counter = Counter()
    model = harness.attach(slug, STACK, short=True)
    compiled = torch.compile(model, backend=counting(graphs, "model"), fullgraph=True)
    optimizer, _ = harness.optimizer_for(model, tmp_path, steps=STEPS)
    for i in range(12):
        model.train()
        compiled(**specimens.batch(i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 1 <= graphs["model"] <= 2, graphs


@pytest.mark.parametrize(
    "cell", [STACK, specimens.BY_NAME["Embedding"], specimens.BY_NAME["grouped Conv2d"]], ids=lambda c: c.name
)
def test_compiled_evaluation_equals_eager(slug, cell):
    import weft

    if cell.kind in weft.card(slug).refuses:
        return
    model = harness.randomise(harness.attach(slug, cell))
    expected = harness.outputs(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert harness.relative(compiled(**specimens.batch(50)).logits, expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_equals_eager(slug, tmp_path):
    results = []
    for compiled in (True, False):
        model = harness.attach(slug, STACK, short=True)
        if compiled:
            for _, layer in list(harness.layers(model))[:1]:
                layer.compile(fullgraph=True)
        optimizer, _ = harness.optimizer_for(model, tmp_path)
        harness.train(model, optimizer, 4)
        results.append({n: p.detach() for n, p in harness.trainable(model).items()})
    for name, t in results[1].items():
        assert harness.relative(results[0][name], t) <= 1e-4, name
