"""Files of labels and taxonomies: every kind is read, and what is wrong with one is said in one line."""

import re
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


def test_a_column_without_a_label_is_left_out(tmp_path):
    """Forty attributes are not refused for one; NaN stands in CSV files too."""
    import pyarrow as pa

    from saevlm_fast.data.label_sets import read_labels

    nothing = pa.array([np.nan, np.nan, np.nan])
    columns = {"image": ["x", "y", "z"], "young": nothing, "smiles": [0, 1, 1], "hat": nothing}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text("image,young,smiles,hat\nx,nan,0,\ny,NaN,1,\nz,,1,\n")
    for name in ("l.parquet", "l.csv"):
        told = f"{name}: left out, as no image has a label in it: young, hat"
        with pytest.warns(Doubt, match=told) as warned:
            (smiles,) = read_labels(tmp_path / name, ["x", "y", "z"])
        assert (smiles.name, smiles.names, smiles.labels_M.tolist()) == ("smiles", ("0", "1"), [0, 1, 1])
        assert warned[0].filename == __file__, "the user's line, not a decorator's"
    (tmp_path / "l.csv").write_text("image,young,hat\nx,nan,\ny,nan,\n")
    with pytest.raises(ValueError, match=r"l\.csv: no image has a label in young, hat"):
        read_labels(tmp_path / "l.csv", ["x", "y"])
    (tmp_path / "l.csv").write_text("image,name\nx,nan\ny,ann\n")
    assert read_labels(tmp_path / "l.csv", ["x", "y"])[0].names == ("ann", "nan"), "among texts it is one"


@pytest.mark.parametrize(
    "labels",
    [
        [-1, 0, 3, -1],
        np.array([-1, 0, 3, -1]),
        torch.tensor([-1, 0, 3, -1]),
        ["-1", "0", "-1"],
        [[-1, 0], 3, -1],
    ],
)
def test_a_mark_of_what_is_not_labelled_is_no_class(labels):
    told = "labels: kind: -1 on 2 images is below 0, .* None where nothing is known of an image .* a class a name"
    with pytest.raises(ValueError, match=told):
        LabelSet.of(labels, "kind")
    with pytest.raises(ValueError, match="-100 on 1 images"):
        LabelSet.of([-100, 0, 1])


@pytest.mark.parametrize("mark", ["-1.0", "-1.00", "-1.", "-1e0", "-100.000", "-0.5", " -1 "])
def test_a_number_below_0_is_a_mark_however_it_is_written(mark):
    with pytest.raises(ValueError, match=rf"labels: kind: {re.escape(mark)} on 1 images is below 0"):
        LabelSet.of([mark, "0", "3"], "kind")


def test_an_attribute_may_be_minus_one():
    """As CelebA's list has them."""
    assert LabelSet.of([-1, 1, 1]).names == ("-1", "1")
    assert LabelSet.of(["-1.0", "1.0", None]).names == ("-1.0", "1.0")
    assert LabelSet.of(["-1.00", "1.00"]).names == ("-1.00", "1.00")
    assert LabelSet.of(["-inf", "a", "-0"]).names == ("-0", "-inf", "a")
    assert LabelSet.of(["-1 degrees", "left-1"]).names == ("-1 degrees", "left-1")


def test_a_mark_in_a_file_is_told_with_its_column(tmp_path):
    from saevlm_fast.data.label_sets import read_labels

    (tmp_path / "l.csv").write_text("image,smiles,kind\nx,-1,-1\ny,1,0\nz,1,\n")
    with pytest.warns(Doubt, match=r"l\.csv: left out, as it has numbers below 0, .* marked: kind$"):
        (found,) = read_labels(tmp_path / "l.csv", ["x", "y", "z"])
    assert (found.name, found.names) == ("smiles", ("-1", "1"))
    (tmp_path / "l.csv").write_text("image,kind\nx,-1\ny,0\nz,\n")
    with pytest.raises(ValueError, match=r"labels: .*l\.csv: kind: -1 on 1 images .*an empty cell"):
        read_labels(tmp_path / "l.csv", ["x", "y", "z"])


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
