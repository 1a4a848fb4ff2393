"""Verification: identities held out whole, margins, embeddings, and what they are worth, by sums written out."""

import importlib.util
import json
import math

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from torch import nn

from weft.errors import UsageError, WeftError
from weft.run import adapt, images, methods, models, predict, sources, verification
from weft.run.verification import Bare, Embedder, MarginHead, margin_loss, with_margin


def people(first: int, last: int, each: int = 4):
    """Pictures of 10 × 10, and whose they are: a pattern of each person's own under noise."""
    draw = np.random.default_rng(first)
    made, labels = [], []
    for person in range(first, last):
        own = np.random.default_rng(1000 + person).integers(40, 215, (10, 10, 3))
        made += [np.clip(own + draw.integers(-40, 40, own.shape), 0, 255).astype(np.uint8) for _ in range(each)]
        labels += [f"p{person}"] * each
    return np.stack(made), np.array(labels)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """People 0 to 5 to train on; 6 to 8, and 9 to 12, in validation and test."""
    arrays = {}
    for split, first, last in (("train", 0, 6), ("val", 6, 9), ("test", 9, 13)):
        arrays[f"x_{split}"], arrays[f"y_{split}"] = people(first, last)
    path = tmp_path_factory.mktemp("data") / "people.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return tiny.save_resnet(tmp_path_factory.mktemp("models") / "resnet")


def run(resnet, npz, output, method="peft:lora", **more):
    given = {"model": str(resnet), "data": str(npz), "method": method, "task": "verification", "output": str(output)}
    given |= {"max_steps": 6, "batch_size": 8, "learning_rate": 0.02, "save_steps": 2, "margin_scale": 8.0, **more}
    asked = adapt.request(given)
    rows = adapt.read_rows(asked.options)
    adapt.outline(asked, rows)
    return adapt.run_adapt(asked, rows, adapt.settle_output(asked, None), lambda text: None, progress=False)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_identities_is_held_out_by_identity(tmp_path):
    for picture, name in zip(*people(0, 10, 3), strict=True):
        folder = tmp_path / "d" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{len(list(folder.iterdir()))}.png")
    (tmp_path / "d" / "p0" / "1.png").unlink()
    (tmp_path / "d" / "p0" / "2.png").unlink()  # of one image: never held out

    def read(seed):
        rows = sources.read(
            str(tmp_path / "d"), "verification", validation_fraction=0.2, test_fraction=0.3, seed=seed
        )
        names = [{row["image"].parent.name for row in part} for part in (rows.train, rows.validation, rows.test)]
        assert [len(each) for each in names] == [5, 2, 3] and len(set.union(*names)) == 10 and "p0" in names[0]
        assert len(rows.validation) == 6 and len(rows.test) == 9
        assert rows.task == "verification" and {*rows.labels} == names[0]
        assert {row["label"] for row in rows.train} == set(range(5))
        assert {row["label"] for row in rows.validation + rows.test} == set(range(5, 10))
        return names

    assert read(0) == read(0) != read(1)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"y": ["a", "a", "b", "b", "c", "c"]}, "too few to hold out 2 for validation"),
        ({"y": ["a"] * 6, "y_val": ["b", "b", "c", "c", "c", "c"]}, "only the identity 'a' in train"),
        ({"y": ["a", "b"] * 3, "y_val": ["c"] * 6}, "6 images of 1 identities in validation"),
        ({"y": ["a", "b"] * 3, "y_val": list("cdefgh")}, "6 images of 6 identities in validation"),
    ],
)
def test_too_few_identities_are_refused(labels, says, tmp_path):
    arrays = {key: np.array(values) for key, values in labels.items()}
    arrays |= {key.replace("y", "x"): people(0, 6, 1)[0] for key in labels}
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=says):
        sources.read(str(tmp_path / "d.npz"), "verification")


def test_identities_that_are_new_to_a_classifier_point_to_the_task(npz):
    with pytest.raises(UsageError, match="'p6' of validation never occurs in train; identities .* --task verification"):
        sources.read(str(npz))


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cosface", "arcface"])
@pytest.mark.parametrize("margin", [0.0, 0.35, 1.2])
def test_margins_are_the_papers_formulas(loss, margin):
    torch.manual_seed(0)
    head = MarginHead(3, 5).double().train()
    head.loss, head.margin, head.scale = loss, margin, 8.0
    x, labels = torch.randn(20, 3).double(), torch.arange(20) % 5
    x[0], x[1] = head.centres.detach()[0], -head.centres.detach()[1]  # angles of 0 and of π
    total = 0.0
    for image, own in zip(x.numpy(), labels.tolist(), strict=True):
        cosines = [
            float(image @ centre) / np.linalg.norm(image) / np.linalg.norm(centre)
            for centre in head.centres.detach().numpy()
        ]
        if loss == "cosface":
            cosines[own] -= margin
        else:
            angle = math.acos(min(1.0, max(-1.0, cosines[own])))
            past = cosines[own] - margin * math.sin(margin)  # where cos(θ + m) would rise again
            cosines[own] = math.cos(angle + margin) if angle + margin < math.pi else past
        total += math.log(sum(math.exp(8 * each) for each in cosines)) - 8 * cosines[own]
    outputs = {"logits": head(x)}
    assert abs(float(margin_loss(head, outputs, labels)) - total / 20) < 1e-4  # cosines are float32
    assert abs(float(margin_loss(head, outputs, labels, 80)) - total / 80) < 1e-4
    plain = with_margin(head, outputs["logits"], labels)
    others = ~nn.functional.one_hot(labels, 5).bool()
    assert torch.equal(plain[others], outputs["logits"][others])
    margin_loss(head, outputs, labels).backward()
    assert head.centres.grad.isfinite().all()


def test_the_head_reads_float32_in_bfloat16_and_hands_on_features_in_evaluation():
    torch.manual_seed(0)
    head = MarginHead(64, 9).train()
    x = torch.randn(4, 64)
    want = 64 * torch.cosine_similarity(x[:, None].double(), head.centres[None].double(), dim=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (head(x) - want).abs().max() < 1e-4
        assert head.eval()(x) is x


def test_a_classifier_gives_way_to_centres_and_nothing_else_is_drawn(resnet):
    plain = models.load_base(str(resnet), "image-classification").model
    bases = [models.load_base(str(resnet), "verification", labels=list("abc"), seed=seed) for seed in (0, 0, 1)]
    heads = [verification.head_of(base.model) for base in bases]
    assert torch.equal(heads[0].centres, heads[1].centres) and not torch.equal(heads[0].centres, heads[2].centres)
    assert heads[0].centres.shape == (3, 16) and bases[0].task == "verification"
    for name, tensor in bases[0].model.state_dict().items():
        assert "centres" in name or torch.equal(tensor, plain.state_dict()[name])
    pixels = torch.randn(2, 3, 16, 16)
    pooled = plain.resnet(pixels).pooler_output.flatten(1)
    assert torch.equal(bases[0].model.eval()(pixels).logits, pooled)
    verification.without_head(bases[0].model)
    assert torch.equal(bases[0].model(pixels).logits, pooled) and heads[0] not in list(bases[0].model.modules())
    assert all("classifier" not in name for name, _ in bases[0].model.named_parameters())


def test_centres_are_trained_beside_the_adapter_and_not_saved_with_it(resnet, tmp_path):
    model = models.load_base(str(resnet), "verification", labels=list("abc")).model
    method = methods.resolve("peft:lora", {"r": 2})
    counted = methods.count_trainable(method, model)
    made = methods.attach(method, model)
    head = verification.head_of(made)
    assert head.centres.requires_grad and methods.trainable(made) == counted
    made.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "adapter_model.safetensors") and not [
        name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in name
    ]


# --- what embeddings are worth ----------------------------------------------------------------------------------------


def drawn(seed=0, sizes=(4, 1, 3, 5, 2)):
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    e = draw.normal(size=(len(sizes), 6))[labels] + 1.2 * draw.normal(size=(len(labels), 6))
    order = draw.permutation(len(labels))
    return (e / np.linalg.norm(e, axis=1, keepdims=True))[order].astype(np.float32), labels[order]


def test_pairs_rates_and_rank_one_by_loops(monkeypatch):
    e, labels = drawn(sizes=(4, 1, 3, 5, 2, 6))
    monkeypatch.setattr(verification, "_BLOCK", 4)
    scores, genuine = verification.pairs(e, labels)
    n = len(labels)
    want = [(float(e[i] @ e[j]), bool(labels[i] == labels[j])) for i in range(n) for j in range(i + 1, n)]
    own, others = [s for s, g in want if g], [s for s, g in want if not g]
    for got, wanted in ((scores[genuine], own), (scores[~genuine], others)):
        assert np.abs(np.sort(got) - np.sort(wanted)).max() < 1e-6
    found = verification.rates(scores, genuine)
    area = sum((a > b) + 0.5 * (a == b) for a in own for b in others) / len(own) / len(others)
    assert abs(found["auc"] - area) < 1e-6
    tar = max(
        sum(a >= t for a in own) / len(own) for t in own + others if sum(b >= t for b in others) <= 0.1 * len(others)
    )
    assert abs(found["tar_at_far_0.1"] - tar) < 1e-6
    assert "tar_at_far_0.01" not in found  # one impostor in a hundred, of fewer than a thousand
    errors = [(sum(b >= t for b in others) / len(others), sum(a < t for a in own) / len(own)) for t in own + others]
    assert min(max(pair) for pair in errors) >= found["eer"] >= max(min(pair) for pair in errors) - 1e-9
    first = {person: min(np.flatnonzero(labels == person)) for person in set(labels.tolist())}
    right = [
        labels[i] == max(first, key=lambda person: e[i] @ e[first[person]])
        for i in range(n)
        if i not in first.values()
    ]
    assert verification.rank_one(e, labels).tolist() == right


def test_of_many_impostors_every_so_manieth_counts(monkeypatch):
    e, labels = drawn(sizes=(3,) * 12)
    monkeypatch.setattr(verification, "_BLOCK", 5)
    scores, genuine = verification.pairs(e, labels)
    monkeypatch.setattr(verification, "_IMPOSTORS", 150)
    fewer, mine = verification.pairs(e, labels)
    stride = -(-int((~genuine).sum()) // 150)
    assert mine.sum() == genuine.sum() and stride == 4
    assert np.array_equal(fewer[~mine], scores[~genuine][::stride])


def test_the_loss_is_that_of_the_best_logistic_judge_of_a_pair():
    e, labels = drawn(sizes=(6,) * 8)
    scores, genuine = verification.pairs(e, labels)
    s = scores.astype(np.float64)

    def nats(factor, threshold):
        odds = factor * (s - threshold)
        return np.logaddexp(0, -odds[genuine]).mean() / 2 + np.logaddexp(0, odds[~genuine]).mean() / 2

    tried = [(factor, place) for factor in np.linspace(0, 8, 41) for place in np.linspace(-0.3, 0.6, 46)]
    best = min(nats(*each) for each in tried)
    got = verification.rates(scores, genuine)["loss"]
    assert best - 2e-3 < got < best + 1e-4 and got < math.log(2) - 0.05
    assert abs(verification.rates(0.1 * scores + 3, genuine)["loss"] - got) < 1e-5
    turned = np.random.default_rng(0).permutation(genuine)
    assert abs(verification.rates(scores, turned)["loss"] - math.log(2)) < 5e-3


def test_an_embedding_has_length_one_and_may_be_averaged_with_its_mirror_image(resnet):
    model = models.load_base(str(resnet), "verification", labels=["a", "b"]).model.eval()
    pixels = torch.randn(3, 3, 16, 16)

    def unit(x):
        return x.double() / x.double().norm(dim=1, keepdim=True)

    own, mirrored = (unit(model(each).logits) for each in (pixels, pixels.flip(3)))
    assert (Embedder(model)(pixels).logits - own).abs().max() < 1e-6
    verification.head_of(model).mirror = True
    assert (Embedder(model)(pixels).logits - unit(own + mirrored)).abs().max() < 1e-6
    verification.without_head(model)
    assert isinstance(verification.head_of(model), Bare) and verification.head_of(model).mirror


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["peft:lora", "sora", "full", "base"])
def test_a_run_knows_unseen_identities(method, resnet, npz, tmp_path):
    facts = run(resnet, npz, tmp_path / "out", method, mirror=True)
    test = facts["test"]
    assert test["identities"] == 4 and test["images"] == 16
    assert (test["genuine_pairs"], test["impostor_pairs"]) == (24, 96) and "tar_at_far_0.1" not in test
    assert 0.5 < test["auc"] <= 1 and 0 <= test["eer"] <= 0.5 and 0 < test["loss"] < math.log(2)
    assert facts["validation"]["identities"] == 3
    if method == "base":
        return
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == []
    rows = sources.read_unlabelled(str(npz), "test")
    base = predict.load_adapted(None, tmp_path / "out")
    assert base.task == "verification"
    found = verification.embed(base, rows, 5)
    names = np.array([row["label"] for row in rows])
    again = verification.rates(*verification.pairs(found, names))
    assert abs(again["auc"] - test["auc"]) < 1e-3 and abs(again["eer"] - test["eer"]) < 0.03
    told = list(verification.answers(base, rows, rows[::4], 5))
    assert [row["identity"] == row["expected"] for row in told if row["image"] % 4] == verification.rank_one(
        found, np.array(sorted(names, key=lambda name: int(name[1:])))
    ).tolist()


def test_stopped_and_gone_on_is_uninterrupted(resnet, npz, tmp_path, monkeypatch):
    from weft.run import checkpoints

    method = {"method": "petalface", "quality": "sharpness", "r": 2}
    whole = run(resnet, npz, tmp_path / "whole", **method)
    saved, real = [], checkpoints.save

    def dying(*given):
        saved.append(real(*given))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(resnet, npz, tmp_path / "out", **method)
    monkeypatch.undo()
    out = run(resnet, npz, tmp_path / "out", **method)
    assert out["validation"] == whole["validation"] and out["test"] == whole["test"]
    for name in ("checkpoint-6/training_state.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_judged_the_images_judges_them_when_the_adapter_answers(resnet, npz, tmp_path):
    from weft.adapters.petalface import PetalfaceController, sharpness
    from weft.steps import controllers

    facts = run(resnet, npz, tmp_path / "out", "petalface", quality="sharpness", r=2)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["quality"] == "sharpness" and -60 <= saved["worst"] < saved["best"] <= 0
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["quality"] == "sharpness"
    rows = sources.read_unlabelled(str(npz), "test")
    base = predict.load_adapted(None, tmp_path / "out")
    (held,) = (each for each in controllers(base.model) if isinstance(each, PetalfaceController))
    met, meet = [], held.meet
    held.meet = lambda score: (met.append(score), meet(score))
    found = verification.embed(base, rows, 16)
    pixels = torch.stack([images.preparer(base.tokenizer)(row["image"]) for row in rows])
    assert torch.equal(met[0], sharpness(pixels))
    again = verification.rates(*verification.pairs(found, np.array([row["label"] for row in rows])))
    assert abs(again["auc"] - facts["test"]["auc"]) < 1e-3
    assert (held.config.weights(met[0]) > 0.5).any() and (held.config.weights(met[0]) < 0.5).any()


def test_best_and_worst_that_are_given_stay(resnet, npz, tmp_path):
    run(resnet, npz, tmp_path / "out", "petalface", quality="sharpness", r=2, best=-2.0, worst=-50.0, max_steps=2)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["best"], saved["worst"]) == (-2.0, -50.0)


def test_an_embedding_model_is_stock_and_can_be_adapted_further(resnet, npz, tmp_path):
    from transformers import AutoModelForImageClassification

    run(resnet, npz, tmp_path / "out", "full", max_steps=2)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert stock.config.num_labels == 0 and stock(torch.randn(2, 3, 16, 16)).logits.shape == (2, 16)
    assert run(tmp_path / "out", npz, tmp_path / "further", "sora", r=2, max_steps=1)["trainable"] > 0


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"margin": 1.0}, "margin=1.0 must be at least 0 and below 1 for cosface"),
        ({"margin": 2.0, "margin_loss": "arcface"}, "below 1.57 for arcface"),
        ({"margin_loss": "softmax"}, "use cosface or arcface"),
        ({"margin_scale": 0.0}, "margin_scale must be above 0"),
        ({"method": "head"}, "use base"),
        ({"task": "image-classification", "margin": 0.3}, "margin=0.3 is for --task verification"),
        ({"task": "auto", "mirror": True}, "mirror=True is for --task verification"),
        ({"method": "petalface", "quality": "beauty"}, "quality='beauty': use sharpness, brisque, or a number"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_work(given, says):
    with pytest.raises(UsageError, match=says):
        adapt.request({"model": "m", "data": "d", "method": "sora", "task": "verification", **given})


def test_petalface_wants_to_know_what_to_judge_by(resnet, npz):
    wanted = [({}, "--quality sharpness, brisque, or one number")]
    wanted += [({"quality": "brisque"}, "piq")] * (importlib.util.find_spec("piq") is None)
    for given, says in wanted:
        words = {"model": str(resnet), "data": str(npz), "method": "petalface", "task": "verification", **given}
        asked = adapt.request(words)
        with pytest.raises(WeftError, match=says):
            adapt.outline(asked, adapt.read_rows(asked.options))
