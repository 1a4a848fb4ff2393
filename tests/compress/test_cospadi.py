"""CoSpaDi: what is learned in weighted coordinates is what the layer's output loses."""

import copy
import json

import peft
import pytest
import torch
from reference import One, rank_one_sums, rows_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import weft
from weft.compress._calibration import Corpus, calibrate
from weft.compress._engine import compress, plan
from weft.compress._factoriser import factoriser
from weft.compress._layers import targets
from weft.compress.cospadi import CospadiFactoriser
from weft.errors import UsageError, WeftError
from weft.linear._structured import stored_bits
from weft.linear._transformers import to_dense
from weft.linear.dictionary import Dictionary


def learned(in_=23, out=61, x=None, **options):
    """The compressed layer and what became of it, the matrix before, and the calibration data."""
    model = One(in_, out)
    w = model.layer.weight.detach().clone()
    x = rows_of(model.layer) if x is None else x
    (row,) = compress(model, "cospadi", **{"keep": 0.6, "data": list(x.split(50)), **options}).rows
    return model.layer, row, w, x


def lost(x, w, new):
    """The share of the output that a matrix loses, in float64."""
    return float((x @ (new - w).mT).square().sum() / (x @ w.mT).square().sum())


def upper(x):
    """L, with LᵀL = E[xxᵀ], by another way than the code's."""
    r = torch.linalg.qr(x / len(x) ** 0.5).R
    return r * r.diagonal().sign()[:, None]


@pytest.mark.parametrize("in_, out", [(23, 61), (61, 23)])
@pytest.mark.parametrize("start", ["svd", "data", "random"])
def test_the_error_is_that_of_the_output(in_, out, start):
    layer, row, w, x = learned(in_, out, start=start)
    assert row.kind == "dictionary" and 0 < row.error < 1
    assert row.error == pytest.approx(lost(x, w, layer.dense()), rel=1e-8)
    l, atoms = upper(x), layer.atoms.weight.detach()
    codes = torch.zeros(out, row.size, dtype=w.dtype).scatter(1, layer.places.long(), layer.values.detach())
    left = (l @ w.mT - l @ atoms.mT @ codes.mT).square().sum() / (l @ w.mT).square().sum()  # ‖Y − D_L·S‖²
    assert row.error == pytest.approx(float(left), rel=1e-8)
    torch.testing.assert_close((l @ atoms.mT).norm(dim=0), torch.ones(row.size, dtype=w.dtype), rtol=1e-8, atol=0)
    assert int((codes != 0).sum(1).max()) <= row.size // 2


def test_it_comes_nearer_than_low_rank_of_the_same_bits_and_than_without_data():
    layer, row, w, x = learned()
    rank = row.bits // (64 * (23 + 61))
    svd_llm = rank_one_sums(x @ w.mT, rank)
    error = float((svd_llm - x @ w.mT).square().sum() / (x @ w.mT).square().sum())
    blind = learned(shrink=1.0)[0]  # L = I
    assert row.error < 0.8 * error < error < 0.8 * lost(x, w, blind.dense())


def test_with_one_subspace_for_all_outputs_it_becomes_svd_llm():
    for start, slack in (("svd", 1e-9), ("data", 1e-3)):
        layer, row, w, x = learned(rho=1, start=start, iterations=400, tolerance=0)
        assert layer.nonzeros == row.size
        best = rank_one_sums(x @ w.mT, row.size)
        error = float((best - x @ w.mT).square().sum() / (x @ w.mT).square().sum())
        assert error * (1 - 1e-9) <= row.error < error * (1 + slack)


def test_more_rounds_come_nearer():
    errors = [learned(start="data", iterations=n, tolerance=0)[1].error for n in (0, 1, 5, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * errors[0]


def test_the_seed_draws_the_start():
    one, same, other = (learned(start="data", seed=seed)[0].dense() for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(learned(seed=0)[0].dense(), learned(seed=1)[0].dense())  # singular vectors are not drawn


def test_an_input_that_is_never_seen_does_no_harm():
    x = rows_of(torch.nn.Linear(23, 61))
    x[:, 5] = 0
    layer, row, w, x = learned(x=x)
    assert torch.isfinite(layer.dense()).all()
    alive = torch.arange(23) != 5
    assert row.error == pytest.approx(lost(x, w, layer.dense()), rel=1e-5)
    assert lost(x[:, alive], w[:, alive], layer.dense()[:, alive]) < 0.5


@pytest.mark.parametrize("rho, support", [(2, 1 / 16), (1.5, 1 / 16), (40, 1 / 80)])  # a bit each, or a byte each taken
def test_all_that_is_stored_counts(rho, support):
    model = One(160, 320).bfloat16()
    data = [rows_of(model.layer).bfloat16()]
    (row,) = compress(model, "cospadi", keep=0.5, rho=rho, iterations=0, data=data).rows
    assert stored_bits(model.layer) == row.bits
    k = 0.5 * 160 * 320 / (160 + 320 / rho + 320 * support)  # in numbers of sixteen bits
    assert abs(row.size - k) <= 8 and model.layer.nonzeros == int(row.size / rho)


@pytest.mark.parametrize("rho", [1, 1.15, 1.7, 2, 3.3])
def test_the_full_setting_takes_as_many_atoms_as_there_are_dimensions(rho):
    for in_, out in ((23, 31), (31, 23), (20, 20)):
        (layer,) = targets(One(in_, out), None, None)
        maker = factoriser("cospadi", weft.config_class("cospadi")(rho=rho, guard=False))
        counts = [maker.nonzeros(k) for k in maker.sizes(layer)]
        assert counts[-1] == max(counts) == min(in_, out)
        bits = [maker.bits(layer, k) for k in maker.sizes(layer)]
        assert bits == sorted(set(bits))
        guarded = factoriser("cospadi", weft.config_class("cospadi")(rho=rho))
        assert {k for k, cost in zip(maker.sizes(layer), bits) if cost < layer.bits} <= set(guarded.sizes(layer))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rho": 0.5}, "rho=0.5"),
        ({"rho": float("inf")}, "rho=inf"),
        ({"iterations": -1}, "iterations=-1"),
        ({"iterations": True}, "iterations=True"),
        ({"tolerance": 1}, "tolerance=1"),
        ({"start": "columns"}, "start='columns': svd, data or random"),
        ({"allocate": "water"}, "allocate='water' needs the error of every size"),
        ({"shrink": 2}, "shrink=2"),
        ({"group_size": 0}, "group_size=0 must be a whole number"),
        ({"group_size": True}, "group_size=True must be a whole number"),
        ({"group_size": 2, "sequential": True}, "sequential calibrates one block after the other, and group_size=2"),
    ],
)
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        compress(One(5, 7), "cospadi", data=[torch.randn(9, 5)], **options)


# --- groups -----------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """x + down(tanh(up(x))), several times."""

    def __init__(self, *outs: int, in_: int = 13) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(in_, out), "down": nn.Linear(out, in_)}) for out in outs
        ).double()

    def inputs(self, x):
        """What each block receives."""
        seen = []
        for block in self.layers:
            seen.append(x)
            x = x + block["down"](torch.tanh(block["up"](x)))
        return [*seen, x]

    def forward(self, x):
        return self.inputs(x)[-1]


def grouped(model, x, include="up", **options):
    """Rows of a compression of `model`, in place, with groups of three."""
    given = {"keep": 0.6, "group_size": 3, "include": include, "data": list(x.split(50)), **options}
    return compress(model, "cospadi", **given).rows


def test_a_group_loses_what_its_layers_lose_on_the_inputs_of_all():
    model, x = Blocks(29, 29, 29), rows_of(nn.Linear(13, 29))
    dense = copy.deepcopy(model)
    (row,) = grouped(model, x)
    before = [block["up"].weight.detach() for block in dense.layers]
    layers = [block["up"] for block in model.layers]
    assert row.parts == tuple(f"layers.{i}.up" for i in range(3)) and row.shape == (87, 13)
    assert all(layer.dictionary is layers[0].atoms for layer in layers)
    with torch.no_grad():
        seen = dense.inputs(x)[:3]
    left = sum((z @ (layer.dense() - w).mT).square().sum() for z in seen for layer, w in zip(layers, before))
    whole = sum((z @ w.mT).square().sum() for z in seen for w in before)
    assert row.error == pytest.approx(float(left / whole), rel=1e-8) and 0 < row.error < 1
    l = upper(torch.cat(seen) * 3**0.5)  # of the sum of three means
    atoms = layers[0].atoms.weight.detach()
    torch.testing.assert_close((l @ atoms.mT).norm(dim=0), torch.ones(row.size, dtype=x.dtype), rtol=1e-8, atol=0)


def test_a_shared_dictionary_counts_once_and_is_read_by_each():
    model, x = Blocks(29, 29, 29), rows_of(nn.Linear(13, 29))
    (row,) = grouped(model, x, keep=0.5)

    def cost(k):
        return 64 * (k * 13 + k // 2 * 87) + 87 * 8 * -(-k // 8)

    assert row.bits == cost(row.size) == sum(stored_bits(block["up"]) for block in model.layers)
    assert row.bits <= 0.5 * row.dense < cost(row.size + 1) and row.dense == 64 * 87 * 13
    assert row.reads == row.bits + 2 * 64 * row.size * 13


@pytest.mark.parametrize("out", [29, 4])  # 3·4 outputs, of less rank than the inputs
def test_with_every_value_taken_the_group_reproduces_all_layers(out):
    model, x = Blocks(out, out, out), rows_of(nn.Linear(13, out))
    dense = copy.deepcopy(model)
    maker = factoriser("cospadi", weft.config_class("cospadi")(rho=1, guard=False, group_size=3, include="up"))
    (group,) = maker.units(model)
    statistics = calibrate(model, [Corpus([x])], group.parts, {part.name: ("input",) for part in group.parts})
    k = maker.sizes(group)[-1]
    assert k == maker.nonzeros(k) == min(13, 3 * out)
    maker.replace(model, group, maker.decompose(group, statistics, k), k)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)
    assert all(type(block["up"]) is Dictionary for block in model.layers)


def test_layers_of_one_dictionary_are_recovered_better_together():
    class Beside(nn.Module):
        """Layers that receive the same."""

        def __init__(self):
            super().__init__()
            draw = torch.Generator().manual_seed(6)
            atoms = torch.randn(24, 16, generator=draw, dtype=torch.float64)
            self.layers = nn.ModuleList(nn.Linear(16, 40, bias=False, dtype=torch.float64) for _ in range(3))
            for layer in self.layers:
                places = torch.rand(40, 24, generator=draw).argsort(1)[:, :3]
                values = torch.randn(40, 3, generator=draw, dtype=torch.float64)
                layer.weight.data = torch.zeros(40, 24, dtype=torch.float64).scatter(1, places, values) @ atoms

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    left = {}
    for size in (1, 3):
        model = Beside()
        before = [layer.weight.detach().clone() for layer in model.layers]
        # 24·16 + 3·120 numbers, and 24 bits for each of 120 outputs, are 0.41 of 3·16·40 numbers
        rows = grouped(model, x, include=None, rho=8, keep=0.415, tolerance=0, group_size=size)
        assert len(rows) == 3 // size and sum(row.bits for row in rows) <= 0.415 * 64 * 3 * 16 * 40
        left[size] = sum(lost(x, w, layer.dense()) for w, layer in zip(before, model.layers)) / 3
    assert left[3] < 0.25 * left[1]


def test_unlike_layers_do_not_share_and_the_last_group_is_smaller():
    model = Blocks(29, 29, 23, 29, 29, 29)
    model.layers[4].to(torch.float32)
    rows = plan(model, "cospadi", keep=0.6, group_size=2)
    assert [row.name for row in rows] == [
        *("layers.0.up+1", "layers.0.down+1", "layers.2.up", "layers.2.down"),
        *("layers.3.up+1", "layers.3.down+1", "layers.4.up", "layers.4.down"),
    ]
    assert rows[4].parts == ("layers.3.up", "layers.5.up") and rows[2].parts == ("layers.2.up",)
    beside = plan(Blocks(29, 29, 29, 29, 29), "cospadi", keep=0.6, group_size=3, include="up", exclude=r"layers\.1\..*")
    assert [row.parts[-1] for row in beside] == ["layers.3.up", "layers.4.up"]


@pytest.mark.parametrize("allocate", ["threshold", "block_influence"])
def test_groups_get_their_share_by_every_rule_that_the_method_has(allocate):
    model = Blocks(29, 29, 29, 29)
    rows = grouped(model, rows_of(nn.Linear(13, 29)), include=None, group_size=2, allocate=allocate, iterations=0)
    assert len(rows) == 4 and 0.5 < sum(row.bits for row in rows) / sum(row.dense for row in rows) <= 0.6


def test_an_interrupted_call_goes_on_with_the_next_group(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    x = rows_of(nn.Linear(13, 29))
    whole = Blocks(*[29] * 5)
    grouped(whole, x, include=None, iterations=1)
    done = []
    decompose = CospadiFactoriser.decompose

    def counted(self, layer, statistics, size):
        if len(done) == 1 and not resumed:
            raise Killed
        done.append(layer.name)
        return decompose(self, layer, statistics, size)

    resumed = False
    monkeypatch.setattr(CospadiFactoriser, "decompose", counted)
    with pytest.raises(Killed):
        grouped(Blocks(*[29] * 5), x, include=None, iterations=1, work=tmp_path)
    resumed, model = True, Blocks(*[29] * 5)
    grouped(model, x, include=None, iterations=1, work=tmp_path)
    assert sorted(done) == ["layers.0.down+2", "layers.0.up+2", "layers.3.down+1", "layers.3.up+1"]
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in model.state_dict().items())
    with pytest.raises(UsageError, match="unfinished work"):
        grouped(Blocks(*[29] * 5), x, include=None, iterations=1, work=tmp_path, group_size=2)


IDS = torch.arange(14).reshape(2, 7) * 5 % 31


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.fixture(scope="module")
def small():
    """Eleven blocks in groups of three, so that "layers.10" has the leader "layers.9", which is sorted behind it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 11}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    grouped(model, IDS, include=["up_proj", "o_proj"], keep=0.8, iterations=1)
    return model


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups") / "model"
    small.save_pretrained(folder)
    return folder


def shared(model):
    """Names of all layers by that of the one whose atoms they take."""
    names = {id(module): name for name, module in model.named_modules()}
    led = {}
    for name, module in model.named_modules():
        if isinstance(module, Dictionary):
            led.setdefault(names[id(module.leader or module)], []).append(name)
    return led


def test_groups_are_saved_once_and_come_back_as_groups(small, saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    assert sum(name.endswith("atoms.weight") for name in tensors) == 8 == len(shared(small))
    modules = json.loads((saved / "config.json").read_text())["quantization_config"]["modules"]
    assert modules["layers.10.mlp.up_proj"]["leader"] == "layers.9.mlp.up_proj" and len(modules) == 22
    for loader in (AutoModel, AutoModelForCausalLM, LlamaForCausalLM):
        model = loader.from_pretrained(saved)
        expected = small.model if loader is AutoModel else small
        assert torch.equal(logits(model), logits(expected)) and shared(model) == shared(expected)
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(small)) and shared(again) == shared(small)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"] == modules
    assert {key: t.tolist() for key, t in again.state_dict().items() if key in tensors} == {
        key: t.tolist() for key, t in tensors.items()
    }


def test_copies_casts_and_dense_models_keep_what_is_shared(small, saved):
    model = copy.deepcopy(small)
    assert torch.equal(logits(model), logits(small)) and shared(model) == shared(small)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in small.parameters()}
    model.to(torch.bfloat16)
    narrow = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16} and shared(narrow) == shared(small)
    assert torch.equal(logits(narrow), logits(model))
    dense = to_dense(copy.deepcopy(small))
    assert type(dense.model.layers[10].mlp.up_proj) is nn.Linear and not shared(dense)
    torch.testing.assert_close(logits(dense), logits(small), rtol=1e-5, atol=1e-5)


def test_a_damaged_group_is_an_error(saved, tmp_path):
    tensors, config = load_file(saved / "model.safetensors"), json.loads((saved / "config.json").read_text())
    spec = config["quantization_config"]["modules"]["layers.10.mlp.up_proj"]

    def loaded(without=None, leader="layers.9.mlp.up_proj"):
        spec["leader"] = leader
        (tmp_path / "config.json").write_text(json.dumps(config))
        kept = {name: t for name, t in tensors.items() if name != without}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    name = "model.layers.9.mlp.up_proj.atoms.weight"
    with pytest.raises(WeftError, match=f"the checkpoint misses {name}"):
        loaded(without=name)
    for leader in ("layers.9.mlp.gate_proj", "layers.11.mlp.up_proj"):
        with pytest.raises(UsageError, match=rf"layers\.10\.mlp\.up_proj: its leader {leader} is no structured layer"):
            loaded(leader=leader)
    with pytest.raises(UsageError, match=r"layers\.10\.mlp\.up_proj: its leader has no dictionary of its own"):
        loaded(leader="layers.1.mlp.up_proj")
    model = loaded()
    model.model.layers = model.model.layers[10:]
    with pytest.raises(UsageError, match="uses what another layer stores, which is no longer in the model"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("which", ["lora", "sora"])
@pytest.mark.parametrize("on", ["up_proj", "atoms"])
def test_adapters_on_layers_of_a_group_and_on_their_dictionary(saved, which, on, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved)
    before = {name: m.dense() for name, m in base.named_modules() if isinstance(m, Dictionary)}
    plain = logits(base)
    config = {"lora": peft.LoraConfig, "sora": weft.SoraConfig}[which](r=2, target_modules=[on])
    model = peft.get_peft_model(base, config)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=draw)) if p.requires_grad else None
    found = logits(model.eval())
    assert (found - plain).norm() > 1e-2 * plain.norm()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), tmp_path).eval()
    assert torch.equal(logits(again), found)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    if on == "up_proj":
        assert len(model.targeted_module_names) == 11
        return
    assert len(model.targeted_module_names) == 8  # each dictionary once, and all of its layers with it
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-4)
    assert not any(torch.equal(merged.get_submodule(name).dense(), w) for name, w in before.items())


def test_layers_of_a_group_may_lie_on_disk(small, saved, tmp_path):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 3 == 0 else "cpu" for i in range(11)}
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(small))
