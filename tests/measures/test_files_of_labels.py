"""Files of labels and taxonomies: every kind is read, and what is wrong with one is said in one line."""

import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.errors import Doubt


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", "[1]", "no object of labels"),
        ("t.json", '{"a": []}', "is not a path of nodes"),
        ("t.json", '{"a": [1]}', "is not a text"),
        ("t.json", '{"a": {"paths": 3}}', "is not a path"),
        ("t.json", "{}", "no label in it"),
        ("t.csv", "a\n", "line 1: a label and at least one node"),
        ("t.csv", "a,b\na,c\n", "line 2: 'a' had another path"),
        ("t.txt", "", "does not end in .json or .csv"),
    ],
)
def test_broken_taxonomies(name, text, message, tmp_path):
    from saevlm_fast.measures.taxonomy import read_taxonomy

    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_taxonomy(tmp_path / name)
    assert name in str(raised.value)


def test_taxonomies_of_both_kinds(tmp_path):
    from saevlm_fast.measures.taxonomy import read_taxonomy

    (tmp_path / "t.csv").write_text("cat,animal,cat\n\noak,plant,tree,oak\n")
    assert read_taxonomy(tmp_path / "t.csv").paths["oak"] == (("plant", "tree", "oak"),)
    (tmp_path / "t.json").write_text('{"cat": [["n1", "animal"], ["n2", "cat"]], "x": {"paths": [["a"], ["b", "c"]]}}')
    found = read_taxonomy(tmp_path / "t.json")
    assert found.paths["cat"] == (("n1", "n2"),)
    assert not found.is_tree


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "", "an id and at least one column"),
        ("l.csv", "image,a\nx\n", "line 2: 1 cells"),
        ("l.csv", "image,a,a\nx,1,2\n", "a column stands twice"),
        ("l.csv", "x,cat\ny,dog\n", "the first line is of image 'x'; a header is needed"),
        ("l.csv", "image,a\nz,1\n", "no line of any of the 2 images, such as 'x'"),
        ("l.csv", "image,a\nx,\n", "no image has a label"),
        ("l.parquet", "PAR1", "l.parquet: "),
    ],
)
def test_broken_labels(name, text, message, tmp_path):
    from saevlm_fast.data.label_sets import read_labels

    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / name, ["x", "y"])


def test_labels_of_a_parquet_file(tmp_path):
    import pyarrow as pa

    from saevlm_fast.data.label_sets import read_labels

    pq.write_table(
        pa.table({"image": ["x", "y", "x"], "kind": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "l.parquet"
    )
    kind, number = read_labels(tmp_path / "l.parquet", ["x", "y", "z"])
    assert (kind.names, kind.labels_M.tolist(), kind.known_N.tolist()) == (("a", "b"), [0, 1], [True, True, False])
    assert number.names == ("1", "2", "3")


def test_a_number_that_is_none_is_no_label(tmp_path):
    import pyarrow as pa

    from saevlm_fast.data.label_sets import read_labels

    columns = {"image": ["x", "y", "z"], "n": pa.array([np.nan, 0.0, 1.0]), "text": ["nan", "a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    number, text = read_labels(tmp_path / "l.parquet", ["x", "y", "z"])
    assert (number.names, number.labels_M.tolist(), number.known_N.all()) == (("0.0", "1.0"), [0, 1], True)
    assert text.names == ("a", "b", "nan")


def test_an_empty_label_is_none():
    found = LabelSet.of(["", "a", ["", "b"], None])
    assert (found.names, found.known_N.tolist()) == (("a", "b"), [True, True, True, False])
    assert np.diff(found.offsets_N1).tolist() == [0, 1, 1, 0]


def test_ids_that_match_only_in_part_are_told(tmp_path):
    from saevlm_fast.data.label_sets import read_labels

    (tmp_path / "l.csv").write_text("image,a\nx,1\n/data/y,2\n/data/z,2\n")
    with pytest.warns(Doubt, match="1 of 3 images are in it, and 2 of its lines are of none, such as '/data/y'"):
        read_labels(tmp_path / "l.csv", ["x", "y", "z"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_labels(tmp_path / "l.csv", ["x"])  # a part of the images that are labelled
        (tmp_path / "l.csv").write_text("image,a\nx,1\n")
        read_labels(tmp_path / "l.csv", ["x", "y", "z"])  # labels of a part


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2, 0],
        np.array([0, 1, 2, 0]),
        torch.tensor([0, 1, 2, 0]),
        [[0], [np.int64(1)], [2], [0]],
        ["0", "1", "2", "0"],
    ],
)
def test_whole_numbers_are_labels(labels):
    found = LabelSet.of(labels)
    assert found.names == ("0", "1", "2")
    assert found.labels_M.tolist() == [0, 1, 2, 0]
    matrices = np.zeros((2, 2)), np.eye(2, dtype=int), torch.eye(2, dtype=torch.int64), [[["a"]]]
    for wrong in ([0.5, 1.0], torch.tensor([0.5, 1.0]), [b"x"], [True, False], *matrices):
        with pytest.raises(ValueError, match=r"labels: .* is no text or whole number, or several"):
            LabelSet.of(wrong)
