"""PETALface against its formula written out image by image in float64, and how scores reach the layers."""

from __future__ import annotations

import math
import sys
import types

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.checkpoint import checkpoint

import weft
from weft.adapters import petalface
from weft.adapters.petalface import PetalfaceConfig, PetalfaceDelta, score_by, scores

SIDE, OUT, R = 7, 5, 2


class Windows(nn.Module):
    """Images of eight tokens, cut into windows of two, a linear layer on the windows, and put together again."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(SIDE, OUT)
        self.reentrant = checkpointing

    def forward(self, pixels: Tensor) -> Tensor:
        windows = pixels.reshape(-1, 2, SIDE)  # images · 4 × 2 × side, those of an image in a row
        if self.reentrant is None:
            y = self.proj(windows)
        else:
            y = checkpoint(self.proj, windows, use_reentrant=self.reentrant)
        return y.reshape(len(pixels), -1, OUT)


def sharpness(pixels: Tensor) -> Tensor:
    """How much neighbours differ, as a share of how much tokens vary."""
    return (pixels.diff(dim=1).square().mean((1, 2)) / pixels.square().mean((1, 2)) / 4).clamp(0, 1)


def attach(base: nn.Module, quality: object = 0.5, **options: object) -> tuple[nn.Module, PetalfaceDelta]:
    torch.manual_seed(1)
    config = PetalfaceConfig(**{"r": R, "target_modules": ["proj"], **options})
    model = peft.get_peft_model(base, weft.prepare(base, config, quality=quality)).double().eval()
    (delta,) = (d for d in model.modules() if isinstance(d, PetalfaceDelta))
    nn.init.normal_(delta.B1)
    nn.init.normal_(delta.B2)
    return model, delta


def images(n: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, 8, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(base: nn.Linear, d: PetalfaceDelta, x: Tensor, a: list[float], s: float = 1.0) -> Tensor:
    """y of every image, with the weight where the paper has it: on the input."""
    rows = []
    for image, weight in zip(x, a, strict=True):
        y = image @ base.weight.T + base.bias
        y = y + s * (((1 - weight) * image) @ d.A1.T) @ d.B1.T + s * ((weight * image) @ d.A2.T) @ d.B2.T
        rows.append(y)
    return torch.stack(rows)


def layer(model: nn.Module) -> nn.Module:
    return model.base_model.model.proj


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- the mathematics --------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=25)
@given(q=st.lists(st.floats(-1, 3), min_size=1, max_size=5), tau=st.floats(0, 1), s=st.floats(0.1, 4))
def test_every_image_has_its_own_weight_in_all_its_windows(q: list[float], tau: float, s: float) -> None:
    model, d = attach(Windows(), tau=tau, scale=s)
    x = images(len(q))
    with scores(model, torch.tensor(q, dtype=torch.float64)):
        close(model(x), written_out(layer(model).base_layer, d, x, [0.5 + one - tau for one in q], s))


def test_it_starts_at_the_base_whatever_the_quality() -> None:
    base = Windows().double()
    x, expected = images(), base(images())
    config = weft.prepare(base, PetalfaceConfig(r=R), quality=lambda pixels: torch.tensor([-4.0, 0.3, 9.0]))
    model = peft.get_peft_model(base, config).double()
    assert torch.equal(model.train()(x), expected) and torch.equal(model.eval()(x), expected)


def test_the_down_projections_are_normal_with_deviation_one_over_r() -> None:
    torch.manual_seed(2)
    config = PetalfaceConfig(r=4, target_modules=["0"], quality=0.5)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4000, 9)), config)
    (d,) = (d for d in model.modules() if isinstance(d, PetalfaceDelta))
    for a in (d.A1, d.A2):
        assert abs(float(a.std()) * 4 - 1) < 0.03 and abs(float(a.mean())) < 0.01
        assert 0.5 < float((a.abs() < 0.25).float().mean()) < 0.75  # 68 % within a deviation; a uniform draw has 58 %
        assert float(a.abs().max()) > 0.25 * math.sqrt(3)  # beyond where a uniform one ends
    assert not d.B1.any() and not d.B2.any() and d.count() == 2 * 4 * (4000 + 9)


def test_one_branch_at_each_end_and_half_of_both_at_the_threshold() -> None:
    model, d = attach(Windows(), tau=0.4)
    x, base = images(1), layer(model).base_layer

    def update(q: float) -> Tensor:
        with scores(model, torch.tensor([q])):
            return layer(model)(x) - base(x)

    bad, good = x @ d.A1.T @ d.B1.T, x @ d.A2.T @ d.B2.T
    torch.testing.assert_close(update(-0.1), bad, rtol=1e-6, atol=1e-6)  # the score is in float32
    torch.testing.assert_close(update(0.9), good, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(update(0.4), 0.5 * (bad + good), rtol=1e-6, atol=1e-6)


def test_the_result_is_affine_in_the_weight() -> None:
    model, _ = attach(Windows())
    x = images(1)
    with scores(model, torch.tensor([0.0, 1.0, 0.3, 2.5], dtype=torch.float64)):
        zero, one, some, beyond = model(x.expand(4, -1, -1))
    close(some, 0.7 * zero + 0.3 * one)
    close(beyond, -1.5 * zero + 2.5 * one)


def test_alike_branches_do_not_care() -> None:
    model, d = attach(Windows())
    with torch.no_grad():
        d.A2.copy_(d.A1)
        d.B2.copy_(d.B1)
    x = images()
    with scores(model, torch.tensor([-3.0, 0.2, 5.0])):
        close(model(x), layer(model).base_layer(x) + x @ d.A1.T @ d.B1.T)


def test_permuted_images_with_their_scores_are_permuted_results() -> None:
    model, _ = attach(Windows())
    x, q, order = images(4), torch.rand(4), torch.tensor([2, 0, 3, 1])
    with scores(model, q):
        y = model(x)
    with scores(model, q[order]):
        close(model(x[order]), y[order])
    with scores(model, q):
        assert not torch.allclose(model(x[order]), y[order])


def test_gradients_are_the_formulas_and_the_quality_has_none() -> None:
    model, d = attach(Windows())
    x, q = images(), torch.rand(3, dtype=torch.float64, requires_grad=True)
    with scores(model, q):
        model(x).square().sum().backward()
    found = [p.grad.clone() for p in (d.A1, d.A2, d.B1, d.B2)]
    y = written_out(layer(model).base_layer, d, x, q.tolist())
    for got, expected in zip(found, torch.autograd.grad(y.square().sum(), [d.A1, d.A2, d.B1, d.B2]), strict=True):
        close(got, expected)
    assert q.grad is None


def test_dropout_acts_on_the_output_of_each_branch() -> None:
    model, d = attach(Windows(), dropout=0.5)
    x = images()
    with torch.no_grad():
        d.B1.fill_(1.0)
        d.B2.fill_(100.0)
        d.A1.copy_(torch.eye(SIDE)[:R])
        d.A2.copy_(torch.eye(SIDE)[:R])
    torch.manual_seed(3)
    with scores(model, torch.tensor([0.25, 0.25, 0.25])):
        update = layer(model.train())(x) - layer(model).base_layer(x)
    one = x[..., :R].sum(-1, keepdim=True)
    share = update / (2 * one)  # each branch is doubled or dropped: 0.75 of one, 25 of the other
    found = {round(value, 6) for value in share.flatten().tolist()}
    assert found == {0.0, 0.75, 25.0, 25.75}  # whole outputs: dropped hidden features would leave parts
    assert len({tuple(row) for row in share.view(-1, OUT).round(decimals=6).tolist()}) > 10  # and not whole rows


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 1e-12])  # the second takes the branches apart, and drops nothing
def test_convolutions(groups: int, dropout: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("proj", nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=groups))
    model, d = attach(base, dropout=dropout)
    x, q = torch.randn(4, 6, 8, 5, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    with scores(model, q):
        y = model.train()(x)
    inner = layer(model).base_layer
    for image, a, got in zip(x, q, y, strict=True):
        w = inner.weight + ((1 - a) * d.B1 @ d.A1 + a * d.B2 @ d.A2).view_as(inner.weight)
        close(got[None], conv2d(image[None], w, inner.bias, 2, 1, groups=groups))


def test_scores_are_brought_to_their_range() -> None:
    falls = PetalfaceConfig(best=0.0, worst=100.0, tau=0.3, quality=1.0)  # as BRISQUE does
    a = falls.weights(torch.tensor([0.0, 70.0, 100.0, 130.0], dtype=torch.float64))
    close(a, torch.tensor([1.2, 0.5, 0.2, -0.1], dtype=torch.float64))
    clamped = PetalfaceConfig(best=0.0, worst=100.0, tau=0.3, quality=1.0, clamp=True)
    expected = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    close(clamped.weights(torch.tensor([0.0, 70.0, 130.0], dtype=torch.float64)), expected)
    assert PetalfaceConfig().weights(torch.tensor([3], dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(weft.UsageError, match="best=1.0 and worst=1.0: the scores of the two must differ"):
        PetalfaceConfig(worst=1.0)


# --- how the scores reach the layers ----------------------------------------------------------------------------------


def test_a_function_judges_every_batch() -> None:
    model, d = attach(Windows(), sharpness)
    for seed in (1, 2):
        x = images(seed=seed)
        close(model(pixels=x), written_out(layer(model).base_layer, d, x, sharpness(x).tolist()))
        close(model(x), model(pixels=x))
    a = sharpness(images())
    assert float(a.max() - a.min()) > 0.02


def test_an_input_of_the_batch_holds_the_scores() -> None:
    model, d = attach(Windows(), "quality")
    x, q = images(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    close(model(pixels=x, quality=q), written_out(layer(model).base_layer, d, x, q.tolist()))
    with pytest.raises(weft.UsageError, match=r"the batch has no 'quality'.*it has \['pixels'\]"):
        model(pixels=x)
    with scores(model, q):  # given by hand: the batch need not have them, and the model does not see them
        close(model(pixels=x), model(pixels=x, quality=1 - q))


def test_a_number_is_the_score_of_all_images_and_is_kept(tmp_path) -> None:
    model, d = attach(Windows(), 0.8, tau=0.6)
    x = images()
    expected = written_out(layer(model).base_layer, d, x, [0.7] * 3)
    close(model(x), expected)
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(Windows(), str(tmp_path)).double()
    assert again.peft_config["default"].quality == 0.8
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)  # the file is in float32


def test_a_loaded_adapter_is_scored_again(tmp_path) -> None:
    model, _ = attach(Windows(), sharpness)
    x = images()
    expected = model(x)
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(Windows(), str(tmp_path)).double()
    for mode in (True, False):
        with pytest.raises(weft.UsageError, match="nothing says how good these images are.*score_by"):
            again.train(mode)(x)
    hooked = score_by(again, sharpness)
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)  # the file is in float32
    score_by(again, lambda pixels: torch.ones(len(pixels)))  # replaces it
    assert not torch.allclose(again(x), expected)
    hooked.remove()
    score_by(again, sharpness).remove()
    with pytest.raises(weft.UsageError, match="nothing says"):
        again(x)


def test_scores_end_with_the_forward_pass() -> None:
    model, _ = attach(Windows(), sharpness)
    x = images()
    model(x)
    with pytest.raises(weft.UsageError, match="nothing says"):
        layer(model)(x)
    with pytest.raises(RuntimeError):
        model(x[..., :3])
    with pytest.raises(weft.UsageError, match="nothing says"):
        layer(model)(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_meets_the_scores_of_its_own_batch(reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        model, d = attach(Windows(mode), sharpness)
        model.train()
        for seed in (0, 1):  # two micro-batches of a step, and a look at other images in between
            x = images(seed=seed).requires_grad_()
            loss = model(x).square().sum()
            with torch.no_grad():
                model.eval()(images(seed=9))
                model.train()
            loss.backward()
        found.append([p.grad for p in (d.A1, d.A2, d.B1, d.B2)])
    for plain, again in zip(*found, strict=True):
        close(again, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forward_passes_before_a_checkpointed_backward_pass_are_refused(reentrant: bool) -> None:
    model, d = attach(Windows(reentrant), sharpness)
    losses = [model.train()(images(seed=seed).requires_grad_()).square().sum() for seed in (0, 1)]
    with pytest.raises(weft.WeftError, match="2 forward passes came before this backward pass"):
        sum(losses).backward()
    d.zero_grad()
    model(images(seed=0).requires_grad_()).square().sum().backward()  # and then as if nothing had been
    assert d.A1.grad.any()


def test_without_checkpointing_any_number_of_passes_may_wait() -> None:
    model, d = attach(Windows(), sharpness)
    sum(model.train()(images(seed=seed)).square().sum() for seed in (0, 1)).backward()
    got = d.A1.grad.clone()
    y = [written_out(layer(model).base_layer, d, x, sharpness(x).tolist()) for x in (images(seed=0), images(seed=1))]
    (expected,) = torch.autograd.grad(sum(one.square().sum() for one in y), d.A1)
    close(got, expected)


def test_trainer_scores_every_batch_from_pixels_or_a_column(tmp_path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    class Task(Windows):
        def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"loss": (super().forward(pixels).mean((1, 2)) - labels).square().mean()}

    x = images(8)
    rows = {"pixels": x.tolist(), "labels": x.mean((1, 2)).tolist(), "quality": sharpness(x).tolist()}
    found = []
    for quality in (lambda pixels, labels: sharpness(pixels), "quality"):
        model, d = attach(Task(), quality)
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, report_to="none",
            use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        kept = rows if quality == "quality" else {k: v for k, v in rows.items() if k != "quality"}
        before = d.A1.detach().clone()
        Trainer(model, args, train_dataset=Dataset.from_dict(kept).with_format("torch", dtype=torch.float64)).train()
        assert not torch.equal(d.A1, before)
        found.append(d.A1.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("quality", "sentence"),
    [
        (lambda pixels: torch.ones(3, 1), r"quality \[3, 1\] is not one score an image"),
        (lambda pixels: 0.5, r"quality 0.5 is not one score an image"),
        (lambda pixels: torch.ones(5), "proj got 12 rows and scores of 5 images"),
    ],
)
def test_bad_scores(quality: object, sentence: str) -> None:
    model, _ = attach(Windows(), quality)
    with pytest.raises(weft.UsageError, match=sentence):
        model(images())


def test_a_layer_without_a_batch_has_no_images() -> None:
    model, _ = attach(Windows())
    with scores(model, torch.rand(2)), pytest.raises(weft.UsageError, match="proj got an input without a batch"):
        layer(model)(torch.ones(SIDE, dtype=torch.float64))


def test_other_refusals() -> None:
    with pytest.raises(weft.UsageError, match=r"quality=\[1\]: give a function, the name of an input"):
        weft.prepare(Windows(), PetalfaceConfig(), quality=[1])
    with pytest.raises(weft.UsageError, match="this Windows has no petalface adapter"):
        score_by(Windows(), sharpness)
    model, _ = attach(Windows(), sharpness)
    model._is_replica = True  # as torch marks the copies of DataParallel
    score_by(model, sharpness)
    with pytest.raises(weft.UsageError, match="DataParallel"):
        model(images())


def test_a_compiled_model_is_scored(tmp_path) -> None:
    model, _ = attach(Windows(), sharpness)
    compiled = torch.compile(model, backend="eager")
    for seed in (0, 1):
        close(compiled(images(seed=seed)), model(images(seed=seed)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_swin_transformer_treats_every_image_as_if_it_came_alone(checkpointing: bool) -> None:
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    settings = {"image_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [2], "num_heads": [2]}
    base = SwinForImageClassification(SwinConfig(**settings, num_labels=3, drop_path_rate=0.0)).double()

    def contrast(pixel_values: Tensor, **_: Tensor) -> Tensor:
        return pixel_values.flatten(1).std(1)

    config = PetalfaceConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, weft.prepare(base, config, quality=contrast)).double()
    deltas = [d for d in model.modules() if isinstance(d, PetalfaceDelta)]
    for d in deltas:
        nn.init.normal_(d.B1)
        nn.init.normal_(d.B2)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64) * torch.tensor([0.2, 0.9, 0.5]).view(3, 1, 1, 1)

    def step(batches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        logits = []
        for batch in batches:
            logits.append(model.train()(pixel_values=batch).logits)
            logits[-1].square().sum().backward()
        return torch.cat(logits), [d.B1.grad for d in deltas]

    (together, one), (alone, other) = step([x]), step([*x.split(1)])
    close(together, alone)
    for a, b in zip(one, other, strict=True):
        close(a, b)


# --- what needs one weight --------------------------------------------------------------------------------------------


def test_a_varying_weight_is_neither_merged_nor_exported(tmp_path) -> None:
    model, _ = attach(Windows(), sharpness)
    for act in (model.merge_adapter, lambda: weft.export(model, tmp_path / "lora", "lora")):
        with pytest.raises(weft.UsageError, match="weighs proj by the quality of each image, and a merged or exported"):
            act()
    assert not (tmp_path / "lora").exists()


def test_a_fixed_weight_is_a_lora_of_twice_the_rank(tmp_path) -> None:
    model, d = attach(Windows(), sharpness, scale=3.0)
    model.peft_config["default"].quality = 0.2
    x = images()
    with scores(model, torch.tensor([0.2, 0.2, 0.2])):
        expected = model(x)
    weft.export(model, tmp_path / "lora", "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.proj.lora_{name}.weight"] for name in "AB")
    assert torch.equal(a, torch.cat([d.A1, d.A2]).float())
    torch.testing.assert_close(b, torch.cat([3.0 * 0.8 * d.B1, 3.0 * 0.2 * d.B2], 1).float())
    plain = peft.PeftModel.from_pretrained(Windows(), str(tmp_path / "lora")).double()
    assert plain.peft_config["default"].r == 2 * R == plain.peft_config["default"].lora_alpha
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


# --- a judge from a library -------------------------------------------------------------------------------------------


def test_brisque_gets_images_in_their_own_range(monkeypatch) -> None:
    seen = []

    def judge(x: Tensor, data_range: float, reduction: str) -> Tensor:
        assert data_range == 1.0 and reduction == "none"
        seen.append(x)
        return x.mean((1, 2, 3))[:, None]  # piq's own shape

    monkeypatch.setitem(sys.modules, "piq", types.SimpleNamespace(brisque=judge))
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(petalface.brisque(pixel_values=2 * x - 1, labels=None), x.mean((1, 2, 3)))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    petalface.brisque((x - mean.view(3, 1, 1)) / std.view(3, 1, 1), mean=mean.tolist(), std=std.tolist())
    petalface.brisque(torch.full((1, 1, 2, 2), 1.5))
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], x)
    assert torch.equal(seen[2], torch.ones(1, 1, 2, 2))
    monkeypatch.setitem(sys.modules, "piq", None)
    with pytest.raises(weft.WeftError, match=r"weft\[quality\]"):
        petalface.brisque(x)


# --- judges by name ---------------------------------------------------------------------------------------------------


def test_sharpness_is_the_share_of_detail_in_decibels_pixel_by_pixel() -> None:
    x = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    x[1] = x[1, :, :1, :1] + torch.linspace(0, 1, 30).view(6, 5)  # a smooth one
    want = []
    for image in x.double():
        detail = whole = 0.0
        for colour in image:
            mean = float(colour.mean())
            for i in range(6):
                for j in range(5):
                    near = colour[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                    detail += float(colour[i, j] - near.mean()) ** 2
                    whole += (float(colour[i, j]) - mean) ** 2
        want.append(10 * math.log10(detail / whole))
    got = petalface.sharpness(pixel_values=x, labels=None)
    torch.testing.assert_close(got.double(), torch.tensor(want).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(petalface.sharpness((x - 0.4) / 0.2), got, rtol=1e-3, atol=1e-3)
    assert got[0] > got[1] + 3
    assert petalface.sharpness(torch.ones(1, 3, 4, 4)).tolist() == [-60.0]


def test_a_judge_goes_by_its_name_in_the_config() -> None:
    assert petalface.judge("sharpness", 0.3, 0.1) is petalface.sharpness
    told = petalface.judge("brisque", [0.1, 0.2, 0.3], 0.25)
    assert told.func is petalface.brisque and told.keywords == {"mean": [0.1, 0.2, 0.3], "std": 0.25}
    with pytest.raises(weft.UsageError, match="quality='beauty': use sharpness, brisque, or a number"):
        PetalfaceConfig(quality="beauty")
    model, _ = attach(Windows(), quality=sharpness)
    model.peft_config["default"].quality = "sharpness"
    with pytest.raises(weft.UsageError, match="set quality to a number in its config"):
        model.merge_and_unload()
