"""Atomic feature mimicking: what layers give, against eigenvectors of all that they gave, written out in float64."""

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Shop, batches
from reference import One, rank_one_sums, rows_of
from torch import nn

import weft
from weft.compress._calibration import Corpus, calibrate
from weft.compress._engine import compress, plan
from weft.compress._factoriser import factoriser
from weft.compress.atomic_feature_mimicking import UNSEEN, fold
from weft.errors import UsageError
from weft.linear._structured import Structured
from weft.linear.factored_embedding import FactoredEmbedding
from weft.linear.low_rank_conv import LowRankConv

METHOD = "atomic_feature_mimicking"
few = st.integers(1, 3)


class Lone(nn.Module):
    """A model of one layer of any type."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer):
    """The layer in float64 with numbers of its own."""
    for i, p in enumerate(layer.double().parameters()):
        p.data = drawn(*p.shape, seed=i + 5)
    return layer


def made(model, data, size, **options):
    """The layer's replacement at one size."""
    maker = factoriser(METHOD, weft.config_class(METHOD)(guard=False, **options))
    (layer,) = maker.units(model)
    seen = calibrate(model, [Corpus(data)], [layer], {layer.name: maker.needs(layer)})[layer.name]
    return maker.build(layer, maker.decompose(layer, seen, size), size)


def components(rows):
    """Mean, eigenvalues and eigenvectors, descending, of the covariance."""
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean) / len(rows))
    return mean, values.flip(0), vectors.flip(1)


def zipf(count, ids, seed=0):
    """Look-ups of which the first ids get most, and every id one."""
    share = 1 / torch.arange(1, ids + 1, dtype=torch.float64)
    found = torch.multinomial(share, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    return torch.cat([found, torch.arange(ids)])


# --- invariants 1 to 3: exact at full size, the error is what was dropped, the mean stays ----------------------------


@settings(max_examples=25, deadline=None)
@given(
    sides=st.tuples(st.integers(2, 8), st.integers(1, 4)),
    kernel=st.tuples(few, few),
    stride=st.tuples(few, few),
    padding=st.one_of(st.just("same"), st.tuples(few, few)),
    dilation=st.tuples(few, few),
    bias=st.booleans(),
    data=st.data(),
)
def test_convolutions(sides, kernel, stride, padding, dilation, bias, data):
    (out, in_), stride = sides, (1, 1) if padding == "same" else stride
    size = data.draw(st.integers(1, min(out, in_ * kernel[0] * kernel[1])))
    model = Lone(filled(nn.Conv2d(in_, out, kernel, stride, padding, dilation, bias=bias)))
    x = drawn(10, in_, 11, 9) + 0.5
    y = model(x).detach()
    small = made(model, list(x.split(4)), size)
    rows, new = (t.movedim(1, -1).flatten(0, 2) for t in (y, small(x)))
    mean, values, _ = components(rows)
    assert isinstance(small, LowRankConv) and small(x).shape == y.shape
    scale = float(values.sum())
    error = (new - rows).square().sum(1).mean()
    torch.testing.assert_close(error, values[size:].sum(), rtol=1e-8, atol=1e-11 * scale)
    torch.testing.assert_close(new.mean(0), mean, rtol=1e-9, atol=1e-9)
    if size == min(out, in_ * kernel[0] * kernel[1]):
        torch.testing.assert_close(new, rows, rtol=1e-7, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(ids=st.integers(2, 30), d=st.integers(1, 9), data=st.data())
def test_embeddings(ids, d, data):
    size = data.draw(st.integers(1, min(ids, d)))
    model = Lone(filled(nn.Embedding(ids, d)))
    seen = zipf(60, ids)
    rows = model(seen).detach()
    small = made(model, list(seen.split(17)), size)
    mean, values, vectors = components(rows)
    assert isinstance(small, FactoredEmbedding) and small.table.weight.shape == (ids, size)
    error = (small(seen) - rows).square().sum(1).mean()
    torch.testing.assert_close(error, values[size:].sum(), rtol=1e-6, atol=1e-9 * float(values.sum()))
    torch.testing.assert_close(small(seen).mean(0), mean, rtol=1e-9, atol=1e-10)
    if size == min(ids, d):
        torch.testing.assert_close(small.dense(), model.layer.weight.detach(), rtol=1e-8, atol=1e-8)
    if size < min(ids - 1, d):  # no tie at the cut
        u = vectors[:, :size]
        expected = (model.layer.weight.detach() - mean) @ u @ u.mT + mean
        torch.testing.assert_close(small.dense(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_, out", [(23, 31), (31, 23)])
def test_linear_layers_are_those_of_lord(in_, out):
    ours, lord = One(in_, out), One(in_, out)
    x = rows_of(ours.layer)
    y = ours(x).detach()
    (row,) = compress(ours, METHOD, keep=0.5, data=[x]).rows
    compress(lord, "lord", keep=0.5, data=[x])
    assert all(torch.equal(t, lord.state_dict()[name]) for name, t in ours.state_dict().items())
    mean, values, vectors = components(y)
    torch.testing.assert_close((ours(x) - y).square().sum(1).mean(), values[row.size :].sum(), rtol=1e-8, atol=0)
    u = vectors[:, : row.size]
    torch.testing.assert_close(ours(x), (y - mean) @ u @ u.mT + mean, rtol=1e-7, atol=1e-8)


# --- 4: folding -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.tuples(st.integers(2, 9), st.integers(1, 6), st.booleans()), min_size=1, max_size=4),
    bias=st.booleans(),
    basis=st.sampled_from(["features", "weights"]),
)
def test_a_folded_projector_computes_the_same(widths, bias, basis):
    linear = filled(nn.Linear(sum(d for _, d, _ in widths), 5, bias=bias))
    embeddings, looked_up = [], []
    for i, (ids, d, dense) in enumerate(widths):
        model, seen = Lone(filled(nn.Embedding(ids, d))), zipf(20, ids, seed=i)
        size = max(min(ids, d) // 2, 1)
        embeddings.append(model.layer if dense else made(model, [seen], size, basis=basis))
        looked_up.append(seen[torch.arange(12) % len(seen)])
    expected = linear(torch.cat([e(x) for e, x in zip(embeddings, looked_up)], dim=1))
    tables, folded = fold(embeddings, linear)
    assert [t.embedding_dim for t in tables] == [getattr(e, "rank", e.embedding_dim) for e in embeddings]
    found = folded(torch.cat([t(x) for t, x in zip(tables, looked_up)], dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_folded_is_refused():
    for linear in (nn.Linear(5, 2), nn.Bilinear(4, 4, 2)):
        with pytest.raises(UsageError, match="embeddings of 4 numbers are folded"):
            fold([nn.Embedding(3, 4)], linear)


# --- 5: features beside singular values -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 6])
def test_features_are_nearer_on_what_is_looked_up(size):
    model, seen = Lone(filled(nn.Embedding(30, 8))), zipf(400, 30)
    table, rows = model.layer.weight.detach().clone(), model(seen).detach()
    ours, svd = (made(model, [seen], size, basis=basis) for basis in ("features", "weights"))
    torch.testing.assert_close(svd.dense(), rank_one_sums(table, size), rtol=1e-9, atol=1e-9)
    assert (ours(seen) - rows).norm() < 0.95 * (svd(seen) - rows).norm()
    assert svd.mean is None

    model.layer.weight.data = table - table.mean(0)
    every = torch.arange(30)
    ours, svd = (made(model, [every], size, basis=basis) for basis in ("features", "weights"))
    torch.testing.assert_close(ours.dense(), svd.dense(), rtol=1e-7, atol=1e-7)


def test_weights_need_no_data_and_are_the_nearest():
    for layer in (nn.Conv2d(4, 9, 3), nn.Linear(12, 9), nn.Embedding(50, 9)):
        model = Lone(filled(layer))
        w = layer.weight.detach().clone().flatten(1)
        (row,) = compress(model, METHOD, keep=0.6, basis="weights").rows
        torch.testing.assert_close(model.layer.dense().flatten(1), rank_one_sums(w, row.size), rtol=1e-9, atol=1e-9)
        kept = torch.linalg.svdvals(w).square()
        assert row.error == pytest.approx(float(kept[row.size :].sum() / kept.sum()), rel=1e-8)


# --- embeddings: frequencies, rows that nobody looked up, padding, masks ----------------------------------------------


def test_rows_that_were_never_looked_up_order_what_is_left():
    model = Lone(filled(nn.Embedding(40, 6)))
    table, seen = model.layer.weight.detach().clone(), torch.tensor([3, 7, 7, 11])
    small = made(model, [seen], 4)
    mean, _, vectors = components(table[seen])
    used = vectors[:, :2]  # three rows span two directions about their mean
    free = (table - mean) - (table - mean) @ used @ used.mT
    _, _, vh = torch.linalg.svd(free)
    basis = torch.cat([used, vh[:2].mT], dim=1)
    torch.testing.assert_close(small.dense(), (table - mean) @ basis @ basis.mT + mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made(model, [seen], 6).dense(), table, rtol=1e-9, atol=1e-9)
    assert UNSEEN < 1e-6


def test_the_row_of_padding_is_a_row_and_is_not_trained():
    model = Lone(filled(nn.Embedding(30, 8, padding_idx=2)))
    model.layer.weight.data[2] = 0
    seen = zipf(100, 30)
    small = made(model, [seen], 3)
    mean, _, vectors = components(model(seen).detach())
    u = vectors[:, :3]
    assert small.padding_idx == 2
    torch.testing.assert_close(small(torch.tensor([2]))[0], mean - u @ (u.mT @ mean), rtol=1e-6, atol=1e-6)
    small(torch.tensor([2, 5])).square().sum().backward()
    gradient = small.table.weight.grad
    assert not gradient[2].any() and gradient[5].any()


def bert(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=97, num_labels=3, **sizes, **options)).eval()


def sentences():
    ids = zipf(103, 97)[torch.randperm(200, generator=torch.Generator().manual_seed(3))].view(20, 10)
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(5), mask.split(5))]


def test_masked_ids_do_not_count():
    model, name = bert(), "bert.embeddings.word_embeddings"
    table = model.get_submodule(name).weight.detach().clone()
    compress(model, METHOD, keep=0.5, include="word_embeddings", data=sentences())
    counted = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in sentences()])
    mean, _, vectors = components(table[counted].double())
    small = model.get_submodule(name)
    u = vectors[:, : small.rank]
    expected = (table.double() - mean) @ u @ u.mT + mean
    torch.testing.assert_close(small.dense().double(), expected, rtol=1e-4, atol=1e-5)


# --- whole models -----------------------------------------------------------------------------------------------------


def resnet():
    torch.manual_seed(0)
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5, hidden_act="relu"
    )
    model = hf.ResNetForImageClassification(config)
    model(torch.randn(8, 3, 32, 32))  # statistics for the batch norms
    return model.eval()


def pictures():
    return [{"pixel_values": drawn(4, 3, 32, 32, seed=i).float()} for i in range(2)]


@pytest.mark.parametrize("build, data, kind", [(resnet, pictures, LowRankConv), (bert, sentences, FactoredEmbedding)])
def test_a_saved_model_gives_the_same_bits(build, data, kind, tmp_path):
    model = build()
    report = compress(model, METHOD, keep=0.6, data=data())
    assert any(isinstance(m, kind) for m in model.modules()) and report.keep <= 0.6
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**data()[0]).logits, model(**data()[0]).logits)
    assert {n for n, m in again.named_modules() if isinstance(m, Structured)} == {
        n for n, m in model.named_modules() if isinstance(m, Structured)
    }


def test_a_plan_names_the_kinds_and_keeping_all_keeps_all():
    model = Shop()
    planned = plan(model, METHOD, keep=0.6)
    report = compress(model, METHOD, keep=0.6, data=batches(model))
    kinds = {row.name: row.kind for row in report.rows}
    assert kinds == {row.name: row.kind for row in planned}
    assert kinds["words"] == "factored_embedding" and kinds["picture"] == "low_rank_conv"
    assert compress(Shop(), METHOD, keep=1, data=batches(Shop())).replaced == 0


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    whole, done = Shop(), []
    compress(whole, METHOD, keep=0.6, data=batches(whole))
    maker = type(factoriser(METHOD, weft.config_class(METHOD)()))
    decompose = maker.decompose

    def counted(self, layer, statistics, size):
        if len(done) == 2:
            raise Killed
        done.append(layer.name)
        return decompose(self, layer, statistics, size)

    monkeypatch.setattr(maker, "decompose", counted)
    with pytest.raises(Killed):
        compress(Shop(), METHOD, keep=0.6, data=batches(Shop()), work=tmp_path / "work")
    monkeypatch.setattr(maker, "decompose", lambda *args: done.append(args[1].name) or decompose(*args))
    model = Shop()
    compress(model, METHOD, keep=0.6, data=batches(model), work=tmp_path / "work")
    assert sorted(done) == ["layers.0", "layers.1", "picture", "words"]
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in model.state_dict().items())


class Odd(nn.Module):
    """What stays: groups, tables of one number, tables that renormalise, tied ones."""

    def __init__(self):
        super().__init__()
        self.wide, self.renormed = nn.Embedding(30, 1), nn.Embedding(30, 8, max_norm=1.0)
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
        self.double()

    def forward(self, ids):
        z = self.table(ids) + self.renormed(ids) + self.wide(ids)
        picture = self.pointwise(self.depthwise(z.mT[..., None] * z.mean(1)[:, :, None, None].expand(-1, -1, 4, 4)))
        return self.head(z) + picture.mean()


def test_what_has_no_smaller_form_stays():
    model = Odd()
    data = [torch.arange(30).view(6, 5)[:, :4]]
    report = compress(model, METHOD, keep=0.7, data=data)
    assert {row.name: row.kind for row in report.rows} == {"wide": "dense", "pointwise": "low_rank_conv"}
    assert model.head.weight is model.table.weight
    with pytest.raises(UsageError, match="there are: pointwise, wide"):
        compress(Odd(), METHOD, include="renormed", data=data)
    with pytest.raises(UsageError, match="ReLU has no layer to compress"):
        compress(nn.ReLU(), METHOD, data=data)


def test_an_unknown_basis_is_refused():
    with pytest.raises(UsageError, match="basis='svd' is neither"):
        weft.config_class(METHOD)(basis="svd")
