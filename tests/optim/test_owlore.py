"""OwLore against its own equations in float64: outliers, draws, and what is trained when."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import weft.optim
from weft.errors import UsageError
from weft.optim import _outliers, owlore
from weft.optim.galore import Galore
from weft.optim.owlore import Owlore, draw, probabilities

B1, B2, EPS, LR = 0.9, 0.999, 1e-6, 0.01
EVERY = 3  # steps between draws


def matrix(out: int, in_: int, seed: int) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), Conv1D(6, 10), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Tower(nn.Module):
    """An embedding, blocks and a head."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(6, 12)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def tower(blocks: int = 4, dtype: torch.dtype = torch.float64) -> Tower:
    torch.manual_seed(0)
    return Tower(blocks).to(dtype)


def made(model: Tower, **options: object) -> Owlore:
    chosen = {"rank": 3, "update_proj_gap": 2, "activated_layers": 2, "sampling_interval": EVERY, "lr": LR}
    return weft.optim.optimizer("owlore", model, **{**chosen, "sampling": "increase", **options})


def backward(model: nn.Module, step: int, parts: int = 1) -> None:
    ids = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(step))
    for part in ids.chunk(parts):
        (nn.functional.cross_entropy(model(part).flatten(0, 1), part.flatten().roll(1)) / parts).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, clear: bool = True, parts: int = 1) -> None:
    for step in steps:
        if clear:
            optimizer.zero_grad()
        backward(model, step, parts)
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def active(model: Tower) -> list[int]:
    """The blocks whose parameters want gradients, after a look that none is half frozen."""
    found = [{p.requires_grad for p in layer.parameters()} for layer in model.layers]
    assert all(len(each) == 1 for each in found)
    return [place for place, each in enumerate(found) if each == {True}]


# --- outliers ---------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """One linear layer a block, each of which receives x itself."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
        for layer, w in zip(self.layers, weights):
            layer.weight = nn.Parameter(w)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def test_a_hundred_and_ninety_nine_ones_are_one_percent_of_outliers():
    """Mean 1.99, threshold 25.87; and no scale of the weights or of the data changes that."""
    ones = torch.ones(10, 10, dtype=torch.float64)
    ones[3, 4] = 100.0
    found = weft.optim.outlier_ratios(Stack(ones, 7e3 * ones, 3e-9 * ones), [{"x": 5 * torch.ones(2, 10).double()}])
    assert found == [1.0, 1.0, 1.0]
    assert weft.optim.outlier_ratios(Stack(ones), [{"x": torch.ones(1, 10).double()}], 50.3) == [0.0]


@pytest.mark.parametrize("multiple", [1.5, 2.5])
def test_outliers_are_counted_over_all_layers_of_a_block_and_all_tokens_that_count(multiple):
    model = tower()
    model.layers[1].up.weight.data[2] *= 9
    batches = [
        {"ids": torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(seed))} for seed in range(2)
    ]
    batches[1]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 1, 1, 1, 1]])
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            keep = batch.get("attention_mask", torch.ones(3, 5)).bool()
            x = model.embed(batch["ids"])
            for place, layer in enumerate(model.layers):
                inside = torch.tanh(x @ layer.up.weight.T + layer.up.bias)
                for name, given in ((f"{place}.up", x), (f"{place}.down", inside)):
                    sums[name] = sums.get(name, 0) + given[keep].square().sum(0)
                x = layer.norm(x + inside @ layer.down.weight + layer.down.bias)
    wanted = []
    for place, layer in enumerate(model.layers):
        up = layer.up.weight.abs() * sums[f"{place}.up"].sqrt()
        down = layer.down.weight.T.abs() * sums[f"{place}.down"].sqrt()
        scores = torch.cat([up.flatten(), down.flatten()])
        wanted.append(100 * (scores > multiple * scores.mean()).double().mean().item())
    model.train()
    assert weft.optim.outlier_ratios(model, batches, multiple) == pytest.approx(wanted)
    assert model.training and len(set(wanted)) > 2
    made_of = made(model, sampling="owl", batches=batches, outlier_multiple=multiple)
    assert made_of.param_groups[0]["probabilities"] == pytest.approx([each / sum(wanted) for each in wanted])


def test_data_that_tells_nothing_is_refused():
    model = tower()
    with pytest.raises(UsageError, match="reach no linear layer of block layers.0"):
        weft.optim.outlier_ratios(model, [])
    model.embed.weight.data[3, 2] = math.nan
    with pytest.raises(UsageError, match="numbers that are not finite on the calibration"):
        weft.optim.outlier_ratios(model, [{"ids": torch.full((1, 2), 3)}])
    assert not any(layer._forward_pre_hooks for layer in _outliers.linear_layers(model)) and model.training


# --- draws ------------------------------------------------------------------------------------------------------------


def test_every_way_of_sampling_has_its_probabilities():
    scores = [3.0, 1.0, 4.0, 2.0]
    assert probabilities("owl", scores) == probabilities("norm", scores) == pytest.approx([0.3, 0.1, 0.4, 0.2])
    assert probabilities("owl_reverse", scores) == pytest.approx([1 / 6, 3 / 6, 0, 2 / 6])
    assert probabilities("owl_reverse", scores)[2] == 0  # the most outliers
    assert probabilities("uniform", scores) == [0.25] * 4
    assert probabilities("increase", scores) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert probabilities("decrease", scores) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    for sampling in owlore.SAMPLINGS:
        assert math.fsum(probabilities(sampling, scores)) == pytest.approx(1, abs=1e-15)
    for alike in ([2.5] * 4, [0.0] * 4):
        assert probabilities("owl", alike) == probabilities("owl_reverse", alike) == [0.25] * 4


def test_norms_are_those_of_all_linear_layers_of_a_block():
    model = tower()
    norms = [math.sqrt(float((b.up.weight**2).sum() + (b.down.weight**2).sum())) for b in model.layers]
    found = made(model, sampling="norm").param_groups[0]["probabilities"]
    assert found == pytest.approx([each / sum(norms) for each in norms], rel=1e-12)


def test_draws_come_as_often_as_sequential_renormalised_sampling_says():
    p, count, times = [0.4, 0.0, 0.3, 0.2, 0.1], 2, 6000
    wanted = [0.0] * 5
    for first, second in itertools.permutations(range(5), count):
        both = p[first] * p[second] / (1 - p[first])
        wanted[first] += both
        wanted[second] += both
    draws = [draw(p, count, 0, number) for number in range(times)]
    assert all(len(set(each)) == count and each == sorted(each) for each in draws)
    found = [sum(place in each for each in draws) / times for place in range(5)]
    assert found[1] == 0
    assert all(abs(a - b) < 4 * math.sqrt(b * (1 - b) / times) + 1e-12 for a, b in zip(found, wanted))
    assert found[4] < found[3] < found[2] < found[0] < 2 * p[0]
    assert draws == [draw(p, count, 0, number) for number in range(times)]
    assert draws[:50] != [draw(p, count, 1, number) for number in range(50)]


# --- what is trained --------------------------------------------------------------------------------------------------


def test_blocks_that_are_not_drawn_rest_bit_for_bit_and_the_others_move():
    model = tower()
    optimizer = made(model, sampling="uniform", weight_decay=0.1)
    seen = set()
    for cycle in range(8):
        chosen = active(model)
        assert chosen == optimizer.drawn == draw([0.25] * 4, 2, 0, cycle)
        before = values(model)
        train(model, optimizer, range(EVERY * cycle, EVERY * (cycle + 1)))
        for name, p in values(model).items():
            outside = not name.startswith("layers.")
            assert torch.equal(p, before[name]) != (outside or int(name.split(".")[1]) in chosen), name
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        seen.update(chosen)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("keep", [False, True])
def test_state_is_of_what_is_trained_unless_it_is_kept(keep):
    model = tower()
    optimizer = made(model, keep_states=keep)
    seen: set[int] = set()
    for cycle in range(4):
        seen.update(active(model))
        train(model, optimizer, range(EVERY * cycle, EVERY * (cycle + 1) - 1))  # up to the step before the draw
        of = seen if keep else set(active(model))
        wanted = {p for place in of for p in model.layers[place].parameters()}
        wanted |= {model.embed.weight, *model.lm_head.parameters()}
        assert set(optimizer.state) == wanted
        numbers = sum(t.numel() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        a_block = 2 * (2 * 3 * 10 + 3 * 6) + 2 * (10 + 6 + 2 * 6)  # 2·r·max + r·min of two matrices, moments of vectors
        assert numbers == len(of) * a_block + 2 * (12 * 6 + 12 * 6 + 12)
        train(model, optimizer, range(EVERY * (cycle + 1) - 1, EVERY * (cycle + 1)))


def reference(weights: list[Tensor], gradients: list[list[Tensor]], p: list[float], keep: bool, decay: float):
    """One matrix a block: the loop written out, with an exact SVD every 2 of a block's own steps."""
    weights, states = [w.clone() for w in weights], [{} for _ in weights]
    for step, given in enumerate(gradients):
        chosen = draw(p, 2, 0, step // EVERY)
        for place, (w, g) in enumerate(zip(weights, given)):
            if place not in chosen:
                states[place] = states[place] if keep else {}
                continue
            own = states[place]
            k = own.get("k", 0)
            if k % 2 == 0:
                own["P"] = torch.linalg.svd(g, full_matrices=False)[2][:3]
                row = own["P"].gather(1, own["P"].abs().argmax(1, keepdim=True))
                own["P"] = own["P"] * row.sign()
            r = g @ own["P"].T
            own["m"] = B1 * own.get("m", 0) + (1 - B1) * r
            own["v"] = B2 * own.get("v", 0) + (1 - B2) * r**2
            own["k"] = k = k + 1
            rate = LR * math.sqrt(1 - B2**k) / (1 - B1**k)
            w -= rate * 0.7 * own["m"] / (own["v"].sqrt() + EPS) @ own["P"]
            w *= 1 - LR * decay
    return weights


@pytest.mark.parametrize("keep", [False, True])
def test_steps_are_those_of_the_written_out_loop(keep):
    blocks = [nn.Linear(5, 8, bias=False) for _ in range(4)]
    start = [matrix(8, 5, place) for place in range(4)]
    for block, w in zip(blocks, start):
        block.weight = nn.Parameter(w.clone())
    gradients = [[matrix(8, 5, 100 + 4 * step + place) for place in range(4)] for step in range(8 * EVERY + 1)]
    groups = [{"params": [block.weight for block in blocks], "rank": 3}]
    options = {"update_proj_gap": 2, "scale": 0.7, "svd": "exact", "activated_layers": 2, "sampling_interval": EVERY}
    weights = [1.0, 2.0, 3.0, 0.0]
    optimizer = Owlore(
        groups, LR, weight_decay=0.1, blocks=blocks, probabilities=weights, keep_states=keep, **options
    )
    for given in gradients:
        for block, g in zip(blocks, given):
            block.weight.grad = g.clone() if block.weight.requires_grad else None
        optimizer.step()
    wanted = reference(start, gradients, [1 / 6, 2 / 6, 3 / 6, 0.0], keep, 0.1)
    for block, w in zip(blocks, wanted):
        torch.testing.assert_close(block.weight.detach(), w, rtol=1e-9, atol=1e-9)
    assert torch.equal(blocks[3].weight, start[3])


def test_with_all_blocks_at_full_rank_it_is_galore_on_everything():
    ours, theirs = tower(), tower()

    def groups(model: Tower) -> list[dict]:
        inside = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not model.lm_head]
        rest = [p for p in model.parameters() if not any(p is w for w in inside)]
        return [{"params": inside, "rank": 6, "weight_decay": 0.1}, {"params": rest}]

    options = {"lr": LR, "update_proj_gap": 2, "scale": 1.0}
    all_four = {"blocks": ours.layers, "activated_layers": 4, "sampling_interval": EVERY}
    train(ours, Owlore(groups(ours), **all_four, **options), range(8))
    train(theirs, Galore(groups(theirs), **options), range(8))
    assert same(values(ours), values(theirs))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stop", range(1, 2 * EVERY + 1))
def test_a_resumed_run_is_the_uninterrupted_one_at_every_phase_of_a_draw(stop, keep, tmp_path):
    """bfloat16 weights; the resumed run knows neither the outliers nor which blocks were trained."""
    model = tower(dtype=torch.bfloat16)
    optimizer = made(model, sampling="owl", outliers=[5.0, 1.0, 0.5, 2.0], keep_states=keep)
    train(model, optimizer, range(stop))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    kept, blocks = values(model), active(model)
    again = tower(dtype=torch.bfloat16)
    other = made(again, sampling="uniform", keep_states=keep)
    again.load_state_dict(kept)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert active(again) == blocks == other.drawn
    for each, by in ((model, optimizer), (again, other)):
        train(each, by, range(stop, stop + 3 * EVERY))
    assert same(values(model), values(again)) and active(model) == active(again)


def test_a_parameter_that_blocks_share_is_trained_with_either_of_them():
    blocks = [nn.Linear(5, 5) for _ in range(3)]
    blocks[2].weight = blocks[0].weight
    parameters = [*blocks[0].parameters(), *blocks[1].parameters(), blocks[2].bias]
    optimizer = Owlore(parameters, blocks=blocks, activated_layers=1, sampling_interval=1)
    seen = set()
    for _ in range(12):
        (place,) = optimizer.drawn
        assert [p.requires_grad for block in blocks for p in block.parameters()] == [
            place in (0, 2), place == 0, place == 1, place == 1, place in (0, 2), place == 2
        ]  # fmt: skip
        seen.add(place)
        for p in parameters:
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    assert seen == {0, 1, 2}


def test_a_step_that_is_not_taken_draws_nothing():
    model = tower()
    optimizer = made(model)
    train(model, optimizer, range(EVERY - 1))
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all
    blocks, state = active(model), {p: dict(each) for p, each in optimizer.state.items()}
    backward(model, EVERY)
    model.embed.weight.grad[0, 0] = math.nan
    with pytest.warns(UserWarning, match="is not finite"):
        optimizer.step()
    assert active(model) == blocks and optimizer.param_groups[-1]["taken"] == EVERY - 1
    assert {p: dict(each) for p, each in optimizer.state.items()} == state
    train(model, optimizer, range(EVERY, EVERY + 1))
    assert optimizer.param_groups[-1]["taken"] == EVERY and active(model) == draw([0.1, 0.2, 0.3, 0.4], 2, 0, 1)


@pytest.mark.parametrize("parts", [1, 2])
def test_updates_in_the_backward_pass_reach_blocks_that_were_frozen_when_they_began(parts):
    ordinary, inside = tower(), tower()
    train(ordinary, made(ordinary), range(5 * EVERY), parts=parts)
    optimizer = made(inside)
    first = active(inside)
    weft.optim.update_in_backward(optimizer, accumulation=parts)
    assert active(inside) == first
    train(inside, optimizer, range(5 * EVERY), clear=False, parts=parts)
    assert all(p.grad is None for p in inside.parameters())
    for (name, a), b in zip(ordinary.named_parameters(), inside.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_steps(reentrant):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double().train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = weft.optim.optimizer(
            "owlore", model, sampling="increase", rank=2, activated_layers=1, sampling_interval=1, lr=LR
        )
        for step in range(4):
            ids = torch.randint(12, (2, 5), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
            optimizer.step()
        found.append(values(model))
    for name, p in found[0].items():
        torch.testing.assert_close(found[1][name], p, rtol=1e-9, atol=1e-11, msg=name)


def test_with_several_processes_the_first_draw_waits_for_a_forward_pass_in_training(monkeypatch):
    """DistributedDataParallel counts on the parameters that want gradients when it wraps the model."""
    monkeypatch.setattr(owlore, "_alone", lambda: False)
    monkeypatch.setattr(owlore.dist, "broadcast_object_list", lambda box: box.__setitem__(0, [0.0, 0.5, 0.5, 0.0]))
    model = tower()
    optimizer = made(model)
    assert active(model) == [0, 1, 2, 3] and optimizer.drawn == [1, 2]  # by what the first process said
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    model.eval()(torch.zeros(1, 1, dtype=torch.int64))
    with torch.no_grad():
        model.train()(torch.zeros(1, 1, dtype=torch.int64))
    assert active(model) == [0, 1, 2, 3]
    train(model, optimizer, range(1))
    assert active(model) == [1, 2] and not any(layer._forward_pre_hooks for layer in model.layers)


# --- for a model ------------------------------------------------------------------------------------------------------


def test_outliers_are_asked_for_only_where_they_count(caplog):
    batches = [{"ids": torch.arange(12)[None]}]
    with pytest.raises(UsageError, match="sampling='owl' counts outliers on calibration data: give batches="):
        made(tower(), sampling="owl")
    with pytest.raises(UsageError, match="galore looks at no batches"):
        weft.optim.optimizer("galore", tower(), rank=3, batches=batches)
    with caplog.at_level(logging.WARNING):
        optimizer = made(tower(), sampling="owl", batches=batches, outlier_multiple=1e3)
    assert optimizer.param_groups[0]["probabilities"] == [0.25] * 4
    (record,) = [each for each in caplog.records if each.name.startswith("weft")]
    assert "above 1000 times the mean, so blocks are drawn uniformly: outlier_multiple=5" in record.message
    given = made(tower(), sampling="owl_reverse", outliers=[1.0, 2.0, 3.0, 4.0])
    assert given.param_groups[0]["probabilities"] == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0])
    with torch.device("meta"):
        skeleton = Tower()
    assert len(made(skeleton, sampling="owl").drawn) == 2
    with pytest.raises(UsageError, match="activated_layers=5 is above the number of blocks, 4"):
        made(skeleton, sampling="owl", activated_layers=5)


def test_what_cannot_work_is_refused_in_one_sentence():
    for options, said in (
        ({"sampling": "owll"}, "unknown sampling 'owll': did you mean 'owl'"),
        ({"outlier_multiple": 0}, "outlier_multiple=0 must be above 0"),
        ({"outliers": [1.0] * 4}, "sampling='increase' does not go by outliers"),
        ({"sampling": "owl", "outliers": [1.0] * 3}, "must be one number for each of 4 blocks"),
        ({"sampling": "owl", "outliers": [1.0, -1.0, 1.0, 1.0]}, "must not be below 0"),
        ({"sampling": "owl", "outliers": [1.0, 0.0, 0.0, 0.0]}, "cannot be drawn where 1 of 4 blocks have"),
        ({"sampling": "owl_reverse", "outliers": [1.0] * 3 + [2.0], "activated_layers": 4}, "where 3 of 4 blocks"),
        ({"activated_layers": 0}, "activated_layers=0 must be a whole number"),
        ({"sampling_interval": 2.5}, "sampling_interval=2.5 must be a whole number"),
        ({"proj_type": "lft"}, "unknown proj_type 'lft': did you mean 'left'"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
    ):
        model = tower()
        with pytest.raises(UsageError, match=said):
            made(model, **options)
        assert all(p.requires_grad for p in model.parameters())
    model = tower()
    first = made(model)
    with pytest.raises(UsageError, match=r"has no parameter that is trained: call model.requires_grad_\(True\) first"):
        made(model)
    with pytest.raises(UsageError, match="is of 0 blocks, not 4"):
        first.load_state_dict(torch.optim.AdamW(tower().parameters()).state_dict())
    with pytest.raises(UsageError, match="3 probabilities do not fit 4 blocks"):
        Owlore(model.parameters(), blocks=model.layers, probabilities=[1.0] * 3)
    with pytest.raises(UsageError, match="activated_layers=5 is above the number of blocks, 0"):
        Owlore(model.parameters(), blocks=[])
    with pytest.raises(UsageError, match="Linear has no list of modules: use galore"):
        made(nn.Linear(6, 8))


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        block = nn.Linear(4, 4, bias=False)
        block.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(UsageError, match=r"shape \(4, 4\) is a DTensor"):
            Owlore(block.parameters(), blocks=[block], activated_layers=1)
    finally:
        dist.destroy_process_group()
