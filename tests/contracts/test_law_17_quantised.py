"""Law 17, quantised bases: every adapter on weights that torchao or bitsandbytes keeps, through PEFT's backends."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import tempfile

import harness
import peft
import pytest
import specimens
import torch
from peft.utils import quantization_utils
from torch import nn
from transformers import LlamaForCausalLM

import weft

TARGET = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def _torchao(bits: int) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    how = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    with tempfile.TemporaryDirectory() as folder:
        _plain().save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(how), dtype=torch.float32)


def _bitsandbytes(bits: int) -> nn.Module:
    import bitsandbytes

    model = _plain()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            if bits == 8:
                made = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, False, False)
            else:
                made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, False, torch.float32)
            made.load_state_dict(layer.state_dict())
            model.set_submodule(name, made.to("cpu"))
            if bits == 4:
                made.weight = made.weight.to("cpu")  # which quantises it
                made.support_avx512bf16_for_cpu = False  # evaluation would pack it in a form without a gradient
    return model.requires_grad_(False)


def _plain() -> nn.Module:
    cell = specimens.Cell(
        "to quantise", "Linear", functools.partial(specimens.llama, hidden_size=64, intermediate_size=128)
    )
    return specimens.base(cell)


BASES = {
    "torchao int8": functools.partial(_torchao, 8),
    "torchao int4": functools.partial(_torchao, 4),
    "bitsandbytes int8": functools.partial(_bitsandbytes, 8),
    "bitsandbytes nf4": functools.partial(_bitsandbytes, 4),
}


@functools.cache
def _made(name: str) -> nn.Module:
    return BASES[name]().eval()


@pytest.fixture(params=BASES)
def name(request) -> str:
    library = request.param.partition(" ")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return request.param


@pytest.fixture
def base(name) -> nn.Module:
    with torch.random.fork_rng():
        return copy.deepcopy(_made(name))


def attach(slug: str, base: nn.Module, adapter: str = "default") -> nn.Module:
    torch.manual_seed(0)
    cell = specimens.Cell("quantised", "quantised Linear", lambda: base, TARGET)
    return peft.get_peft_model(base, harness.configure(slug, base, cell), adapter).eval()


def dense(layer) -> torch.Tensor:
    """The wrapped weight as its library gives it back; found here and not by the engine."""
    inner = layer.get_base_layer()
    backend = quantization_utils.resolve_quantization_backend(inner, get_apply_tensor_subclass=lambda: None)
    return backend.get_base_weight(inner).detach().clone()


@torch.no_grad()
def update(layer) -> torch.Tensor:
    """ΔW, out × in."""
    return layer.deltas["default"].delta()


def plain_copy(base: nn.Module) -> nn.Module:
    """A model in float32 whose weights are what the quantised ones stand for."""
    model = _plain()
    for name, layer in model.named_modules():
        kept = base.get_submodule(name) if isinstance(layer, nn.Linear) else None
        if (
            kept is not None
            and kept.weight.shape != layer.weight.shape
            or type(getattr(kept, "weight", None))
            not in (
                nn.Parameter,
                type(None),
            )
        ):
            backend = quantization_utils.resolve_quantization_backend(kept, get_apply_tensor_subclass=lambda: None)
            layer.weight.data = backend.get_base_weight(kept).detach().clone()
    return model


def test_forward_and_gradient_are_those_of_the_dense_weight(slug, base, name):
    tolerance = 1e-4 if "torchao" in name else 2e-2  # bitsandbytes quantises activations, or computes in bfloat16
    data = specimens.batch(5)
    losses, gradients, logits = [], [], []
    for model in (plain_copy(base), base):
        adapted = harness.randomise(attach(slug, model))
        logits.append(harness.outputs(adapted))
        loss = adapted(**data).loss
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: p.grad for name, p in harness.trainable(adapted).items()})
    assert harness.relative(logits[1], logits[0]) <= tolerance
    for key, expected in gradients[0].items():
        found = gradients[1][key]
        assert (found is None) == (expected is None), key
        if expected is not None and expected.norm() > 1e-6 * abs(losses[0]):
            assert harness.relative(found, expected) <= 10 * tolerance, key


def test_no_dense_copy_waits_for_the_backward_pass(slug, base):
    model = harness.randomise(attach(slug, base)).train()
    forms = {}
    for name, layer in harness.layers(model):
        w = dense(layer)
        forms[name] = [w, w + update(layer)]
    kept: list[torch.Tensor] = []

    def remember(t: torch.Tensor) -> torch.Tensor:
        if type(t) is torch.Tensor and t.is_floating_point():
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        model(**specimens.batch(6))
    for name, tensors in forms.items():
        for w in tensors:
            for t in kept:
                same = t.shape in (w.shape, w.T.shape) and any(
                    torch.allclose(t.float(), s, rtol=1e-3, atol=1e-4) for s in (w, w.T) if s.shape == t.shape
                )
                assert not same, f"{name}: a dense copy of the weight is kept"


def test_merging_quantises_anew_and_unmerging_gives_the_bits_back(slug, base, caplog):
    model = harness.randomise(attach(slug, base))
    before = harness.outputs(model)
    packed = [state(layer) for _, layer in harness.layers(model)]
    expected = {name: dense(layer) + update(layer) for name, layer in harness.layers(model)}
    with caplog.at_level(logging.INFO, "weft"):
        if not harness.merges(model):
            return
    worst = 0.0
    for name, layer in harness.layers(model):
        worst = max(worst, harness.relative(dense(layer), expected[name]))
        assert harness.relative(dense(layer), expected[name]) < 0.2, name
        assert type(layer.get_base_layer().weight) is not nn.Parameter, "the weight is quantised as before"
    assert f"{worst:.1e}" in caplog.text and "quantised anew" in caplog.text
    model.unmerge_adapter()
    assert torch.equal(harness.outputs(model), before)
    for (_, layer), then in zip(harness.layers(model), packed, strict=True):
        assert all(torch.equal(value, then[key]) for key, value in state(layer).items())


def state(layer) -> dict[str, torch.Tensor]:
    """What the wrapped module holds, bit by bit; of torchao's tensors their codes and scales."""
    found = {}
    for key, value in layer.get_base_layer().state_dict().items():
        if type(value).__module__.startswith("torchao"):
            inner, _ = value.__tensor_flatten__()
            found |= {f"{key}.{part}": getattr(value, part).clone() for part in inner}
        else:
            found[key] = value.clone()
    return found


def test_it_is_saved_and_loaded_again(slug, base, tmp_path):
    untouched = copy.deepcopy(base)
    model = harness.randomise(attach(slug, base))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(untouched, tmp_path).eval()
    assert torch.equal(harness.outputs(again), harness.outputs(model))


def test_trained_on_a_quantised_base_it_meets_the_full_one_and_no_other(slug, tmp_path):
    pytest.importorskip("torchao")
    model = harness.randomise(attach(slug, copy.deepcopy(_made("torchao int4"))))
    model.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(_plain(), tmp_path)
    other = _plain()
    for p in other.parameters():
        p.data = torch.randn_like(p) * p.std()
    with pytest.raises(weft.UsageError, match="another base model"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_it_learns(slug, base, tmp_path):
    model = attach(slug, base)
    optimizer, _ = harness.optimizer_for(model, tmp_path, lr=weft.card(slug).recipe.get("learning_rate", 1e-3) * 3)
    data = specimens.batch(3, 8)
    losses = []
    for _ in range(15):
        loss = model.train()(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    with torch.no_grad():
        assert float(model.eval()(**data).loss) < losses[0]


def test_a_weight_that_was_packed_for_evaluation_can_be_merged():
    pytest.importorskip("bitsandbytes")
    model = attach("sora", copy.deepcopy(_made("bitsandbytes nf4")))
    for _, layer in harness.layers(harness.randomise(model)):
        layer.get_base_layer().support_avx512bf16_for_cpu = True  # where the processor has it, the first forward packs
    expected = {name: dense(layer) + update(layer) for name, layer in harness.layers(model)}
    harness.outputs(model)
    model.merge_adapter()
    for name, layer in harness.layers(model):
        assert harness.relative(dense(layer), expected[name]) < 0.2, name


def test_qwha_starts_by_cancelling_the_error_of_a_quantised_base(caplog):
    pytest.importorskip("torchao")
    base, whole = copy.deepcopy(_made("torchao int4")), _plain()
    config = weft.QwhaConfig(r=8, **TARGET)
    weft.prepare(base, config, original_weights=whole, batches=[specimens.batch(1, 16), specimens.batch(2, 16)])
    assert "random places" not in caplog.text
    wanted, lossy = harness.outputs(whole), harness.outputs(base)
    model = peft.get_peft_model(base, config)
    for name, layer in harness.layers(model):
        error = whole.get_submodule(layer.module_name).weight - dense(layer)
        assert (error - update(layer)).norm() < 0.8 * error.norm(), name
    assert harness.relative(harness.outputs(model), wanted) < 0.8 * harness.relative(lossy, wanted)
    weft.prepare(base, weft.QwhaConfig(r=8, **TARGET), original_weights=base, batches=[])
    assert "random places" in caplog.text


# --- what cannot be served says so, once for all methods --------------------------------------------------------------


def _by_hand() -> nn.Module:
    """Quantised without a config that says how."""
    torchao = pytest.importorskip("torchao.quantization")
    model = _plain()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def test_merging_is_refused_where_nothing_says_how_to_quantise():
    model = harness.randomise(attach("sora", _by_hand()))
    before = harness.outputs(model)
    with pytest.raises(weft.UsageError, match=r"q_proj is quantised.*TorchAoConfig"):
        model.merge_adapter()
    assert torch.equal(harness.outputs(model), before)


class Packed(nn.Module):
    """A linear layer whose library computes with its weight and never gives it back."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.register_buffer("codes", layer.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes, self.bias)


@pytest.fixture
def packed(monkeypatch) -> nn.Module:
    inner = quantization_utils.resolve_quantization_backend
    monkeypatch.setattr(
        "weft.adapters._quantised.resolve_quantization_backend",
        lambda layer, **kwargs: (
            quantization_utils.ForwardOnlyQuantizationBackend("packed")
            if isinstance(layer, Packed)
            else inner(layer, **kwargs)
        ),
    )
    model = specimens.base(specimens.SMALL)
    model.first = Packed(model.first)
    return model


def test_a_library_that_hides_its_weight_serves_what_needs_none(packed, tmp_path):
    config = weft.SoraConfig(r=4, target_modules=["first", "second"])
    model = harness.randomise(peft.get_peft_model(copy.deepcopy(packed), config)).eval()
    assert harness.relative(harness.outputs(model), harness.outputs(packed)) > 1e-3
    with pytest.raises(weft.UsageError, match="first is quantised and packed cannot take a new weight"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed, tmp_path).eval()
    assert torch.equal(harness.outputs(again), harness.outputs(model))


def test_a_library_that_hides_its_weight_is_refused_by_what_reads_it(packed):
    with pytest.raises(weft.UsageError, match="first is quantised by packed, which does not give"):
        peft.get_peft_model(packed, weft.SvfitConfig(target_modules=["first"]))


def test_quantised_experts_are_refused_by_name():
    cell = specimens.BY_NAME["3-D expert"]
    model = specimens.base(cell)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.mul(40).to(torch.int8), requires_grad=False)
    with pytest.raises(weft.UsageError, match=r"down_proj is quantised"):
        peft.get_peft_model(model, weft.SoraConfig(target_parameters=["mlp.experts.down_proj"]))


def test_nothing_is_imported_for_a_plain_base():
    import subprocess
    import sys

    code = (
        "import sys, torch, peft, weft; from torch import nn\n"
        "before = set(sys.modules)\n"
        "peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), weft.SoraConfig(r=2, target_modules=['0']))\n"
        "print([m for m in set(sys.modules) - before if m.partition('.')[0] in ('torchao', 'bitsandbytes')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
