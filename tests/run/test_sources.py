"""Rows from files: every kind, plain and compressed; splits by name and held out."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from weft.errors import UsageError
from weft.run import sources

ROWS = [{"text": f"the weft {number}", "label": "up" if number % 2 else "down"} for number in range(40)]


def write(path, kind: str):
    if kind == "jsonl":
        tiny.write_jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_kind_of_file_gives_the_same_rows(kind, compressed, tmp_path):
    path = tmp_path / f"rows.{kind}"
    write(path, kind)
    if compressed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name(path.name + ".gz")
    assert sources.read_file(path) == ROWS


def test_a_text_file_is_one_text_cut_at_a_line(tmp_path):
    lines = [f"line {number} of the text" for number in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    rows = sources.read(str(tmp_path / "a.txt"), validation_fraction=0.2, test_fraction=0.1)
    (train,), (validation,), (test,) = rows.train, rows.validation, rows.test
    assert train["text"] + validation["text"] + test["text"] == "\n".join(lines)
    assert train["text"].endswith("\n") and validation["text"].endswith("\n")
    assert 0.05 < len(test["text"]) / len("\n".join(lines)) < 0.15
    assert rows.kind == "text" and rows.task == "causal-lm"


def test_a_folder_has_its_splits_in_names(tmp_path):
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("dev", 4), ("my_test", 1)):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(count)])
    rows = sources.read(str(tmp_path))
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (5, 4, 1)
    assert not rows.held_out


def test_a_word_inside_a_word_is_no_split(tmp_path):
    for name in ("contest", "trained"):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(20)])
    rows = sources.read(str(tmp_path))
    assert len(rows.train) + len(rows.validation) == 40 and not rows.test


def test_held_out_rows_are_a_partition_and_depend_on_the_seed(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)

    def texts(seed):
        rows = sources.read(str(path), test_fraction=0.1, validation_fraction=0.1, seed=seed)
        return [[row["text"] for row in split] for split in (rows.train, rows.validation, rows.test)]

    first = texts(0)
    assert sorted(sum(first, [])) == sorted(row["text"] for row in ROWS)
    assert [len(split) for split in first] == [32, 4, 4]
    assert texts(0) == first != texts(1)


def test_labels_become_numbers_in_order_of_name(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    rows = sources.read(str(path))
    assert rows.task == "classification" and rows.labels == ["down", "up"]
    assert {row["label"] for row in rows.train} == {0, 1}
    numbers = [{"text": "x", "label": number % 11} for number in range(44)]
    rows = sources.read(str(tiny.write_jsonl(tmp_path / "b.jsonl", numbers)))
    assert rows.labels == [str(number) for number in range(11)]  # as numbers: 10 comes last


def test_the_task_may_be_said(tmp_path):
    path = str(tiny.write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert sources.read(path, "causal-lm").kind == "text"
    with pytest.raises(UsageError, match="text1 and text2"):
        sources.read(str(tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}] * 5)), "classification")


def test_columns_by_other_names(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)]
    path = str(tiny.write_jsonl(tmp_path / "a.jsonl", rows))
    read = sources.read(path, columns={"prompt": "question", "completion": "answer"})
    assert read.kind == "completion" and set(read.train[0]) == {"prompt", "completion"}


def test_a_split_from_elsewhere(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    other = tiny.write_jsonl(tmp_path / "b.jsonl", ROWS[:6])
    rows = sources.read(str(path), validation=str(other))
    assert len(rows.train) == 40 and len(rows.validation) == 6


def test_a_label_unseen_in_training_is_refused(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    other = tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": "sideways"}])
    with pytest.raises(UsageError, match="'sideways' of validation never occurs in train"):
        sources.read(str(path), validation=str(other))


@pytest.mark.parametrize("name", ["stdlib", "pydocs"])
def test_built_in_texts(name):
    rows = sources.read(f"builtin:{name}")
    assert rows.train and rows.validation and rows.test and not rows.held_out


def test_rows_to_answer(tmp_path):
    path = str(tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}]))
    assert [row["text"] for row in sources.read_unlabelled(path, "test")] == ["a", "b"]
    with pytest.raises(UsageError, match="did you mean 'test'"):
        sources.read_unlabelled(path, "tests")
