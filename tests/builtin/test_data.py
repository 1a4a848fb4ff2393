"""Texts and images that come with weft: splits that leak nothing, the same everywhere, and errors that help."""

import os
import re
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from weft import builtin
from weft.builtin import _corpus

TEXTS = ("stdlib", "pydocs")
IMAGES = ("digits", "digits-shifted")
PARAGRAPH = 100  # characters: long enough not to occur twice by chance


def paragraphs(rows):
    """Long paragraphs of some rows, with every run of white space as one space."""
    pieces = (" ".join(piece.split()) for row in rows for piece in re.split(r"\n\s*\n", row["text"]))
    return {piece for piece in pieces if len(piece) >= PARAGRAPH}


def fresh_python(code, **environment):
    run = [sys.executable, "-c", code]
    return subprocess.run(run, env={**os.environ, **environment}, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", TEXTS)
def test_text_splits_are_disjoint_and_complete(name):
    splits = [builtin.texts(name, split) for split in _corpus.SPLITS]
    assert all(row["text"].strip() and set(row) == {"text", "name"} for rows in splits for row in rows)
    assert all(len(rows) >= 5 for rows in splits)
    for some, others in combinations(splits, 2):
        assert {row["name"] for row in some}.isdisjoint(row["name"] for row in others)
        assert paragraphs(some).isdisjoint(paragraphs(others))
    assert max(splits, key=lambda rows: sum(len(row["text"]) for row in rows)) is splits[0]


def test_every_topic_of_pydoc_but_the_manual_of_pdb_is_in_one_split():
    from pydoc_data.topics import topics

    names = [row["name"] for split in _corpus.SPLITS for row in builtin.texts("pydocs", split)]
    assert sorted(topics) == sorted([*names, "debugger"])


def test_topics_that_repeat_one_another_stay_together():
    chapter, section = "a" * 70, "b" * 70
    topics = {"x": section, "book": f"{chapter}\n\n{section}", "a": chapter, "other": "c" * 70, "tiny": "b"}
    assert _corpus.topic_groups(topics) == {"x": "a", "book": "a", "a": "a", "other": "other", "tiny": "tiny"}


def test_pycode_never_saw_the_held_out_modules_nor_the_topics():
    rows = _corpus.training_rows()
    names = {row["name"] for row in rows}
    held_out = [row for split in _corpus.SPLITS for row in builtin.texts("stdlib", split)]
    assert len(rows) > 300 and names.isdisjoint(f"{row['name']}.py" for row in held_out)
    assert not any({"test", "site-packages", "pydoc_data", "idlelib"}.intersection(name.split("/")) for name in names)
    seen = " ".join(" ".join(row["text"].split()) for row in rows)
    topics = paragraphs(row for split in _corpus.SPLITS for row in builtin.texts("pydocs", split))
    assert len(topics) > 300 and not [paragraph for paragraph in topics if paragraph in seen]


def test_splits_are_the_same_in_every_process():
    code = """if True:
        from hashlib import sha256
        from weft import builtin
        texts = [builtin.texts(n, s) for n in ("stdlib", "pydocs") for s in ("train", "validation", "test")]
        scans = [x.tobytes() for s in ("train", "test") for x in builtin.images("digits-shifted", s)]
        print(sha256(repr((texts, scans)).encode()).hexdigest())
    """
    assert fresh_python(code, PYTHONHASHSEED="1") == fresh_python(code, PYTHONHASHSEED="2")


def test_import_is_light():
    code = "import sys, weft.builtin; print(sorted({'torch', 'transformers', 'sklearn', 'numpy'} & set(sys.modules)))"
    assert fresh_python(code).strip() == "[]"


@pytest.mark.parametrize("name", IMAGES)
def test_images_have_the_promised_shapes_and_units(name):
    counts = []
    for split in _corpus.SPLITS:
        pixels, labels = builtin.images(name, split)
        assert pixels.dtype == np.float32 and pixels.shape == (len(labels), 1, 8, 8) and labels.dtype == np.int64
        assert pixels.min() == -1 and pixels.max() == 1 and set(labels) == set(range(10))
        counts.append(len(labels))
    assert sum(counts) == 1797 and counts[0] > 1100 and min(counts) > 200


def test_image_splits_hold_each_scan_once():
    from sklearn.datasets import load_digits

    ours = np.concatenate([builtin.images("digits", split)[0] for split in _corpus.SPLITS]).reshape(1797, 64)
    theirs = load_digits().data / 8 - 1
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs.astype(np.float32)))


def test_shifted_scans_are_the_clean_ones_turned_and_inverted():
    (clean, labels), (shifted, shifted_labels) = (builtin.images(name, "test") for name in IMAGES)
    assert (labels == shifted_labels).all()
    assert (-np.rot90(shifted, -1, axes=(2, 3)) == clean).all()


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"no model 'builtin:pycod'; did you mean 'pycode'\? There are: pycode, vit"):
        builtin.model_path("builtin:pycod")
    with pytest.raises(ValueError, match="no text 'pydoc'; did you mean 'pydocs'"):
        builtin.texts("pydoc", "train")
    with pytest.raises(ValueError, match="no split 'valid'; did you mean 'validation'"):
        builtin.texts("stdlib", "valid")
    with pytest.raises(ValueError, match="no image set 'stdlib'.* There are: digits, digits-shifted"):
        builtin.images("stdlib", "train")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Exception, match=r"scikit-learn.*weft\[vision\]"):
        builtin.images("digits", "train")


def test_prefix_is_optional_and_every_name_answers():
    assert builtin.model_path("builtin:vit") == builtin.model_path("vit")
    assert builtin.texts("builtin:stdlib", "test") == builtin.texts("stdlib", "test")
    assert all((builtin.model_path(name) / "config.json").is_file() for name in builtin.MODELS)
    assert set(builtin.DATASETS) == {*TEXTS, *IMAGES}
