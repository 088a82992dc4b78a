"""Writers of a store: what they refuse, and that two of them lose nothing of each other's."""

import contextlib
import gc
import linecache
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index, verify
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.errors import ActivationError, Doubt
from stores import SOURCE, items_of, rows_of


@pytest.mark.parametrize(
    ("batch", "items", "message"),
    [
        (rows_of(2, 4), items_of(0, 2), r"rows are .*\[2, 4\]; floats \[rows, 5\]"),
        (torch.ones(2, 5, dtype=torch.int32), items_of(0, 2), "int32"),
        (rows_of(2).to_sparse(), items_of(0, 2), "rows: a tensor of layout sparse_coo, must be dense"),
        (rows_of(2).to("meta"), items_of(0, 2), "rows: on the meta device"),
        (rows_of(2), items_of(0, 3), "lengths .*3.*; the batch has 2 rows"),
        (rows_of(2), {"image": ["a", "b"]}, r"columns \['image'\]; needed: image, token"),
        (rows_of(2), {"image": ["a", "b"], "token": ["x", "y"]}, "items do not fit"),
        (rows_of(2), {"image": ["a", "\udcff"], "token": [0, 0]}, "items do not fit"),
        (rows_of(2), {"image": ["a", "b"], "token": [0.0, 1.2]}, "items do not fit.*1.2"),
        (rows_of(2), {"image": ["a", "b"], "token": torch.tensor([0.7, 1.0])}, "items do not fit"),
        (rows_of(2) * torch.inf, items_of(0, 2), "row 0, column 0 is"),
        (rows_of(2) * 1e6, items_of(0, 2), "shard-00000.safetensors as float16: row 0, column 0 is -?inf"),
    ],
)
def test_the_writer_refuses_what_does_not_fit(tmp_path, batch, items, message):
    writer = ActivationWriter(tmp_path / "s", 5, torch.float16, {})

    def write():
        writer.append(batch, items)
        writer.close()

    with pytest.raises(ValueError, match=message):
        write()
    assert read_index(tmp_path / "s").n_rows == 0


@pytest.mark.parametrize(
    "numbers", [[1, 2], np.array([1, 2]), torch.tensor([1, 2]), pa.array([1, 2]), [1, "2"], [np.int64(1), "2"]]
)
def test_names_and_labels_may_be_whole_numbers(tmp_path, numbers):
    items = {"image": numbers, "token": np.array([0, 0]), "label": numbers}
    with ActivationWriter(tmp_path / "s", 5, torch.float32, {}) as writer:
        writer.append(rows_of(2), items)
    found = open_activations(tmp_path / "s").items()
    assert found["image"].to_pylist() == found["label"].to_pylist() == ["1", "2"]


@pytest.mark.parametrize("wrong", [[1.5, 2.5], [True, False], [("a",), ("b",)]])
def test_a_store_whose_first_rows_are_refused_is_not_left_behind(tmp_path, wrong):
    """It would be in the way of the next try."""
    (tmp_path / "s").mkdir()
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="items do not fit"),
            ActivationWriter(tmp_path / "s", 5, torch.float32, {}) as writer,
        ):
            writer.append(rows_of(2), {"image": wrong, "token": [0, 0]})
        assert not list((tmp_path / "s").iterdir())


@contextlib.contextmanager
def nothing_said():
    """Not by writers that are dropped meanwhile, either: what they raise nobody hears."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert not said, [str(each.message) for each in said]


def test_rows_of_a_writer_that_nobody_closes_are_told_of(tmp_path):
    def drop(name, n_rows, **how):
        writer = ActivationWriter(tmp_path / name, 5, torch.float32, {}, 4, **how)
        writer.append(rows_of(n_rows), items_of(0, n_rows))

    told = r"{}: its writer was never closed: the last {} rows that were appended to it are not on the disk"
    with pytest.warns(Doubt, match=told.format("empty", 3)) as warned:
        drop("empty", 3)
    assert "ActivationWriter(" in linecache.getline(warned[0].filename, warned[0].lineno)
    with pytest.warns(Doubt, match=told.format("empty", 3)):
        drop("empty", 3, force=True)  # its store stays
    with pytest.warns(Doubt, match=told.format("begun", 2)):
        drop("begun", 6)
    assert read_index(tmp_path / "begun").n_rows == 4
    with nothing_said():
        drop("whole", 4)
        ActivationWriter(tmp_path / "of-ranks", 5, torch.float32, {})
    assert read_index(tmp_path / "whole").n_rows == 4
    assert read_index(tmp_path / "of-ranks").n_rows == 0, "other ranks will resume it"


@pytest.mark.parametrize(
    ("labels", "mark"),
    [
        ([-1, 0, 3, -1], "-1"),
        (["cat", None, None, "-100.0"], "-100.0"),
        ([-1, -1, -1, None], "-1"),
        ([1, -1, -1, 2], "-1"),
        ([1, -1, -1, 1], ""),
        (["-1.00", None, "1", "1"], ""),
        ([None, None, "", "-1 degrees"], ""),
    ],
)
def test_labels_that_evaluate_refuses_are_told_of_when_they_are_written(tmp_path, labels, mark):
    """In shards of two rows, of which each may look like attributes of -1 and 1."""

    def write():
        with ActivationWriter(tmp_path / "s", 5, torch.float32, {}, 2) as writer:
            writer.append(rows_of(4), items_of(0, 4) | {"label": labels})

    if mark:
        with pytest.warns(Doubt, match=f"^items: label {mark} is below 0, .* evaluate refuses such labels") as warned:
            write()
        assert len(warned) == 1, "once"
        with pytest.raises(ValueError, match=f"labels: {mark} on . images is below 0"):
            LabelSet.of(open_activations(tmp_path / "s").items()["label"].to_pylist())
        return
    with warnings.catch_warnings(action="error"):
        write()
    LabelSet.of(open_activations(tmp_path / "s").items()["label"].to_pylist())


def refused(path):
    with ActivationWriter(path, 5, torch.float32, {}) as writer:
        writer.append(rows_of(2)[:, :3], items_of(0, 2))


def closed(path):
    ActivationWriter(path, 5, torch.float32, {}).close()


def left(path):
    with ActivationWriter(path, 5, torch.float32, {}):
        pass


def failed(path):
    with ActivationWriter(path, 5, torch.float32, {}) as writer:
        writer.append(rows_of(2), items_of(0, 2))
        raise KeyError("of the user's")


@pytest.mark.parametrize("write", [refused, closed, left, failed])
def test_an_empty_store_is_not_left_behind(tmp_path, write):
    """A second try is as the first."""
    for _ in range(2):
        with nothing_said(), pytest.raises((ActivationError, ValueError, KeyError)):
            write(tmp_path / "s")
        assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("write", [refused, closed, left, failed])
def test_a_store_of_several_ranks_stays_for_those_that_come_later(tmp_path, monkeypatch, write):
    """Or they would say that there is none, beside the reason of rank 0."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises((ActivationError, ValueError, KeyError)):
        write(tmp_path / "s")
    gc.collect()
    late = ActivationWriter.resume(tmp_path / "s", part=1)
    late.write_shard(1, rows_of(2), items_of(0, 2))
    assert late.n_rows == 2


def test_a_forked_process_leaves_the_store_of_its_parent_alone(tmp_path):
    writer = ActivationWriter(tmp_path / "s", 5, torch.float32, {}, 4)
    writer.append(rows_of(3), items_of(0, 3))
    child = os.fork()
    if child == 0:
        writer._unwritten.dropped()
        os._exit(0)
    os.waitpid(child, 0)
    writer.close()
    assert open_activations(tmp_path / "s").n_rows == 3


def test_a_process_that_ends_without_closing_says_so(tmp_path):
    """Of a writer that a name of a module holds to the end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from saevlm_fast import ActivationWriter\n"
        "writer = ActivationWriter(sys.argv[1], 5, torch.float32, {})\n"
        "writer.append(torch.ones(3, 5), {'image': ['a'] * 3, 'token': [0] * 3})\n"
    )
    done = subprocess.run([sys.executable, script, tmp_path / "s"], capture_output=True, text=True, check=True)
    assert f"{script}:3: Doubt: {tmp_path / 's'}: its writer was never closed: the last 3 rows" in done.stderr


def writer_with(n_rows, path, **how):
    writer = ActivationWriter(path, 5, torch.float32, {}, 4, **how)
    writer.append(rows_of(n_rows), items_of(0, n_rows))
    return writer


def test_a_writer_that_is_dropped_leaves_the_store_of_another_alone(tmp_path, monkeypatch):
    """Made in its place; resumed beside it; and the one of the same name in another directory."""
    for name in ("d1", "d2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "d1")
    writers = [writer_with(3, "s"), writer_with(3, "s", force=True)]
    other = ActivationWriter.resume("s")
    monkeypatch.chdir(tmp_path / "d2")
    there = ActivationWriter("s", 5, torch.float32, {}, 4)
    with pytest.warns(Doubt, match="never closed") as warned:
        writers.clear()
    assert len(warned) == 2
    monkeypatch.chdir(tmp_path / "d1")
    for each in (other, there):
        each.append(rows_of(2), items_of(0, 2))
    other.close()
    monkeypatch.chdir(tmp_path / "d2")
    there.close()
    assert open_activations(tmp_path / "d1" / "s").n_rows == open_activations(tmp_path / "d2" / "s").n_rows == 2


def test_what_close_says_is_not_said_again(tmp_path):
    """Of a store that another writer has closed meanwhile, or that is gone."""
    for name, meanwhile, told in (
        ("closed", lambda path: writer_with(2, path).close(), "another process or thread has written to it"),
        ("gone", lambda path: None, "its index.json is gone, without which there is no store to add to"),
    ):
        writer = writer_with(3, tmp_path / name)
        (tmp_path / name / "index.json").unlink()
        meanwhile(tmp_path / name)
        with nothing_said():
            with pytest.raises(ValueError, match=told):
                writer.close()
            del writer


def test_a_writer_that_raised_takes_no_more_rows(tmp_path):
    """Those that it dropped would be missing before them."""
    writer = ActivationWriter(tmp_path / "s", 5, torch.float32, {}, 2)
    with contextlib.suppress(KeyboardInterrupt), writer:
        writer.append(rows_of(3), items_of(0, 3))
        raise KeyboardInterrupt
    for again in (lambda: writer.append(rows_of(1), items_of(3, 4)), writer.close):
        with nothing_said(), pytest.raises(ValueError, match="ended with an exception; resume the store to go on"):
            again()
    with ActivationWriter.resume(tmp_path / "s", 2) as resumed:
        resumed.append(rows_of(1), items_of(2, 3))
    assert open_activations(tmp_path / "s").n_rows == 3


@pytest.mark.parametrize("close", [True, False])
def test_rows_that_cannot_be_written_are_told_of_once(tmp_path, close):
    def write(n_rows):
        with ActivationWriter(tmp_path / "s", 5, torch.float16, {}, 4) as writer:
            writer.append(rows_of(n_rows) * 1e6, items_of(0, n_rows))

    with nothing_said(), pytest.raises(ActivationError, match=r"row 0, column 0 is -?inf"):
        write(3 if close else 4)


def test_a_store_with_rows_or_with_other_writers_stays(tmp_path):
    def fail(path, *befores):
        with ActivationWriter(path, 5, torch.float32, {}, 2) as writer:
            for before in befores:
                before(writer)
            raise ValueError("mine")

    def part(writer):
        ActivationWriter.resume(writer.path, part=1).write_shard(0, rows_of(2), items_of(0, 2))

    def other(writer):
        ActivationWriter.resume(writer.path, 2).append(rows_of(2), items_of(0, 2))

    for name, before, n_rows in (
        ("rows", lambda writer: writer.append(rows_of(3), items_of(0, 3)), 2),
        ("part", part, 0),
        ("other", other, 2),
    ):
        with pytest.raises(ValueError, match="mine"):
            fail(tmp_path / name, before)
        assert read_index(tmp_path / name).n_rows == n_rows


def test_two_writers_of_one_store_do_not_overwrite_each_other(tmp_path):
    writer = ActivationWriter(tmp_path / "s", 5, torch.float32, SOURCE, 4)
    writer.append(rows_of(4), items_of(0, 4))
    late, other = (ActivationWriter.resume(tmp_path / "s", 4) for _ in range(2))
    other.append(rows_of(4), items_of(4, 8))
    with pytest.raises(ValueError, match="another process or thread has written to it; resume the store to go on"):
        late.append(rows_of(4), items_of(8, 12))
    other.close()
    for behind in (late, writer):
        with pytest.raises(ValueError, match="another process or thread has written to it"):
            behind.close()
    assert open_activations(tmp_path / "s").items()["image"].to_pylist() == items_of(0, 8)["image"]
    assert verify(tmp_path / "s").n_rows == 8


def test_two_writers_at_the_same_time_lose_no_rows(tmp_path):
    """Each writes its shard between the other's look and the other's index, or is told."""
    ActivationWriter(tmp_path / "s", 5, torch.float32, SOURCE, 4)
    writers = [ActivationWriter.resume(tmp_path / "s", 4) for _ in range(4)]
    together = threading.Barrier(4)

    def write(number):
        together.wait(60)
        try:
            writers[number].append(rows_of(4), items_of(4 * number, 4 * number + 4))
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(write, range(4)))
    (winner,) = (number for number, error in enumerate(errors) if error is None)
    assert all("has written to it" in error for error in errors if error is not None)
    writers[winner].close()
    assert verify(tmp_path / "s").n_rows == 4
    assert (
        open_activations(tmp_path / "s").items()["image"].to_pylist() == items_of(4 * winner, 4 * winner + 4)["image"]
    )


def test_a_source_is_as_json_has_it(tmp_path):
    source = {"crop": (224, 224), "by_layer": {3: [1, 2]}}
    with ActivationWriter(tmp_path / "s", 5, torch.float32, source, 4) as writer:
        source["by_layer"][3].append(4)
        writer.append(rows_of(6), items_of(0, 6))
    assert open_activations(tmp_path / "s").source == {"crop": [224, 224], "by_layer": {"3": [1, 2]}}


def test_the_writer_refuses_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="d_in: 0 must be at least 1"):
        ActivationWriter(tmp_path / "s", 0, torch.float16, SOURCE)
    with pytest.raises(ActivationError, match=r"dtype is torch\.float64; a store holds float16, bfloat16, float32"):
        ActivationWriter(tmp_path / "s", 4, torch.float64, SOURCE)
    with pytest.raises(ValueError, match="rows_per_shard: 0 must be at least 1"):
        ActivationWriter(tmp_path / "s", 4, torch.float16, SOURCE, 0)
    with pytest.raises(ActivationError, match="no rows were written"):
        ActivationWriter(tmp_path / "t", 4, torch.float16, SOURCE).close()
