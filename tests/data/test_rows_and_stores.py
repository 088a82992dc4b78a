"""Activation store, matrix files, row order, reading ahead."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saevlm_fast.data import order as order_module
from saevlm_fast.data import rows as rows_module
from saevlm_fast.data.matrix import check_finite
from saevlm_fast.data.order import ShuffledRows, batches
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index, verify
from saevlm_fast.data.writing import ActivationWriter, merge_parts
from saevlm_fast.errors import ActivationError
from saevlm_fast.files import TEMPORARY_PREFIX

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SOURCE = {"model": "hf:openai/clip", "layer": 11, "point": "residual", "tokens": "cls"}


def rows_of(n, d=5, dtype=torch.float32, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def items_of(start, stop):
    return {
        "image": [f"cat/{i}.jpg" for i in range(start, stop)],
        "token": list(range(start, stop)),
        "label": [None if i % 3 == 0 else f"class {i % 3}" for i in range(start, stop)],
    }


def write_store(path, x, rows_per_shard=10, batch=7, **options):
    with ActivationWriter(path, x.shape[1], x.dtype, SOURCE, rows_per_shard, **options) as writer:
        for start in range(0, len(x), batch):
            writer.append(x[start : start + batch], items_of(start, min(start + batch, len(x))))
    return path


def gathered(activations):
    return torch.cat([x for _, x in activations.chunks(4)])


# Store -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    rows_per_shard=st.integers(1, 45),
    batch=st.integers(1, 45),
    seed=st.integers(0, 9),
)
def test_a_store_returns_what_was_written(tmp_path_factory, n, d, dtype, rows_per_shard, batch, seed):
    x = rows_of(n, d, dtype, seed)
    store = open_activations(write_store(tmp_path_factory.mktemp("s") / "store", x, rows_per_shard, batch))
    assert (store.n_rows, store.d, store.dtype, store.source) == (n, d, dtype, SOURCE)
    assert torch.equal(gathered(store), x.float())
    picks = torch.randint(n, (17,), generator=torch.Generator().manual_seed(seed))  # unordered, with repeats
    assert torch.equal(store.rows(picks), x.float()[picks])
    assert store.items().to_pydict() == items_of(0, n)
    every = items_of(0, n)
    assert store.items(picks).to_pydict() == {name: [column[i] for i in picks] for name, column in every.items()}
    assert len(store.rows(picks[:0])) == len(store.items([])) == 0
    in_chunks = list(store.item_chunks(batch))
    assert [len(table) for table in in_chunks] == [len(x) for _, x in store.chunks(batch)]
    assert pa.concat_tables(in_chunks).to_pydict() == every


def test_items_of_some_rows_read_their_shards_only(tmp_path, monkeypatch):
    store = open_activations(write_store(tmp_path / "s", rows_of(45)))
    read, original = [], pq.read_table
    monkeypatch.setattr("saevlm_fast.data.store.pq.read_table", lambda f, **o: read.append(f) or original(f, **o))
    assert store.items(range(12)).to_pydict() == items_of(0, 12)
    assert [file.name for file in read] == ["items-00000.parquet", "items-00001.parquet"]


def test_rows_into_a_buffer_and_bad_indices(tmp_path):
    x = rows_of(20, 4, torch.float16)
    store = open_activations(write_store(tmp_path / "s", x))
    out = torch.full((3, 4), torch.nan)
    assert store.rows(torch.tensor([19, 0, 11]), out=out) is out
    assert torch.equal(out, x.float()[[19, 0, 11]])
    for bad, message in [([20], "row 20 asked for; there are rows 0 to 19"), ([3, -1], "row -1")]:
        with pytest.raises(ValueError, match=message):
            store.rows(torch.tensor(bad))
    with pytest.raises(ValueError, match="int64"):
        store.rows(torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"out is \[2, 4\]"):
        store.rows(torch.tensor([1]), out=torch.empty(2, 4))
    with pytest.raises(ValueError, match="chunk size is 0"):
        store.chunks(0)


def test_the_index_is_as_documented(tmp_path):
    write_store(tmp_path / "s", rows_of(25, 4, torch.bfloat16))
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    shards = index.pop("shards")
    assert index == {
        "format": "saevlm-fast activations",
        "version": 1,
        "complete": True,
        "shape": [25, 4],
        "dtype": "bfloat16",
        "source": SOURCE,
    }
    assert [shard["rows"] for shard in shards] == [10, 10, 5]
    assert set(shards[0]) == {"number", "rows", "file", "sha256", "items", "items_sha256"}
    assert sorted(os.listdir(tmp_path / "s")) == sorted(
        ["index.json", *(s["file"] for s in shards), *(s["items"] for s in shards)]
    )
    assert verify(tmp_path / "s").n_rows == 25


def test_items_may_come_as_a_table_without_labels(tmp_path):
    with ActivationWriter(tmp_path / "s", 5, torch.float32, {}) as writer:
        writer.append(rows_of(2), pa.table({"image": ["a", "b"], "token": [0, 1]}))
        writer.append(rows_of(1), {"image": ["c"], "token": torch.tensor([7])})
    assert open_activations(tmp_path / "s").items([2, 0]).to_pydict() == {
        "image": ["c", "a"],
        "token": [7, 0],
        "label": [None, None],
    }


@pytest.mark.parametrize(
    ("batch", "items", "message"),
    [
        (rows_of(2, 4), items_of(0, 2), r"rows are .*\[2, 4\]; floats \[rows, 5\]"),
        (torch.ones(2, 5, dtype=torch.int32), items_of(0, 2), "int32"),
        (rows_of(2), items_of(0, 3), "lengths .*3.*; the batch has 2 rows"),
        (rows_of(2), {"image": ["a", "b"]}, r"columns \['image'\]; needed: image, token"),
        (rows_of(2), {"image": ["a", "b"], "token": ["x", "y"]}, "items do not fit"),
        (rows_of(2), {"image": ["a", "\udcff"], "token": [0, 0]}, "items do not fit"),
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


def test_the_writer_refuses_bad_arguments(tmp_path):
    for arguments, message in [
        ((0, torch.float16), "d_in is 0"),
        ((4, torch.float64), "dtype is torch.float64; a store holds float16, bfloat16, float32"),
    ]:
        with pytest.raises(ActivationError, match=message):
            ActivationWriter(tmp_path / "s", *arguments, SOURCE)
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        ActivationWriter(tmp_path / "s", 4, torch.float16, SOURCE, 0)
    with pytest.raises(ActivationError, match="no rows were written"):
        ActivationWriter(tmp_path / "t", 4, torch.float16, SOURCE).close()


def test_an_occupied_directory_is_refused_unless_forced(tmp_path):
    write_store(tmp_path / "s", rows_of(30))
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(ActivationError, match="not empty"):
        write_store(tmp_path / "s", rows_of(3))
    assert open_activations(tmp_path / "s").n_rows == 30
    write_store(tmp_path / "s", rows_of(3), force=True)
    assert open_activations(tmp_path / "s").n_rows == 3
    assert sorted(os.listdir(tmp_path / "s")) == [
        "index.json", "items-00000.parquet", "notes.txt", "shard-00000.safetensors"
    ]  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(ActivationError, match="not a directory"):
        write_store(tmp_path / "file", rows_of(3))


# Interrupted writing -----------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("survived", range(10))
def test_a_crash_at_any_publication_leaves_a_store_to_resume(tmp_path, monkeypatch, survived):
    """A store of 25 rows is published in 1 + 3 * 3 + 1 renames; dies before each of the first ten."""
    x, replace, calls = rows_of(25), os.replace, []

    def counted(source, target):
        if len(calls) == survived:
            raise Crash
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        with pytest.raises(Crash):
            write_store(tmp_path / "s", x)
    if survived == 0:
        with pytest.raises(ActivationError, match="no index"):
            read_index(tmp_path / "s")
        return
    with pytest.raises(
        ActivationError, match=rf"incomplete store.*: {(survived - 1) // 3 * 10 if survived < 10 else 25} rows"
    ):
        open_activations(tmp_path / "s")
    verify(tmp_path / "s")
    with ActivationWriter.resume(tmp_path / "s", rows_per_shard=10) as writer:
        done = writer.n_rows
        assert done == min(25, (survived - 1) // 3 * 10)
        writer.append(x[done:], items_of(done, 25))
    assert torch.equal(gathered(open_activations(tmp_path / "s")), x)
    assert verify(tmp_path / "s").complete


def test_an_error_in_the_with_block_drops_only_what_is_not_durable(tmp_path):
    def interrupted():
        with ActivationWriter(tmp_path / "s", 5, torch.float32, SOURCE, rows_per_shard=10) as writer:
            writer.append(rows_of(19), items_of(0, 19))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    resumed = ActivationWriter.resume(tmp_path / "s")
    assert (resumed.n_rows, resumed.done, resumed.complete) == (10, {0}, False)
    resumed.close()
    again = ActivationWriter.resume(tmp_path / "s")
    assert again.complete
    with pytest.raises(ValueError, match="complete"):
        again.append(rows_of(1), items_of(0, 1))


WRITE_FOREVER = """
import sys, torch
from saevlm_fast.data.writing import ActivationWriter
writer = ActivationWriter(sys.argv[1], 64, torch.float16, {}, rows_per_shard=512)
row = 0
while True:
    numbers = torch.arange(row, row + 100)
    x = (numbers % 2048.0)[:, None].expand(100, 64)
    writer.append(x, {"image": [str(i) for i in numbers.tolist()], "token": numbers})
    row += 100
"""


def test_kill_9_while_writing(tmp_path):
    store = tmp_path / "s"
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(store)])
    try:
        deadline = time.monotonic() + 120
        while not (store / "shard-00004.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises(ActivationError, match="incomplete store"):
        open_activations(store)
    (store / f"{TEMPORARY_PREFIX}00-shard-00009.safetensors").write_bytes(b"half")  # as a kill in a write leaves it
    with ActivationWriter.resume(store) as writer:
        done = writer.n_rows
        assert done >= 4 * 512
        assert done % 512 == 0
        writer.append(torch.zeros(1, 64), {"image": ["last"], "token": [0]})
    assert not list(store.glob(f"{TEMPORARY_PREFIX}*"))
    verify(store)
    read = open_activations(store)
    expected = torch.arange(done) % 2048.0
    assert torch.equal(gathered(read)[:-1], expected[:, None].expand(done, 64))
    assert read.items()["token"].to_pylist()[:-1] == list(range(done))


def test_ranks_write_numbered_shards_and_rank_0_merges(tmp_path):
    """Five units of work over two ranks, killed, resumed on three: the same rows in the same order."""
    x, store = rows_of(23), tmp_path / "s"
    bounds = [0, 5, 5, 12, 20, 23]  # unit 1 is empty: all of its images were skipped

    def write(rank, unit):
        begin, end = bounds[unit], bounds[unit + 1]
        ranks[rank].write_shard(unit, x[begin:end], items_of(begin, end))

    ActivationWriter(store, 5, torch.float32, SOURCE)
    ranks = [ActivationWriter.resume(store, part=rank) for rank in range(2)]
    write(0, 2)
    write(1, 1)
    write(1, 3)
    assert ranks[1].done == {1, 3}
    with pytest.raises(ValueError, match="number is 3"):
        write(1, 3)
    with pytest.raises(ActivationError, match="shard 0 is not written yet"):
        merge_parts(store, complete=True)
    assert merge_parts(store).n_rows == 15
    ranks = [ActivationWriter.resume(store, part=rank) for rank in range(3)]
    assert ranks[2].done == {1, 2, 3}
    with pytest.raises(ValueError, match="ranks use write_shard"):
        ranks[2].append(x[:1], items_of(0, 1))
    write(2, 0)
    write(0, 4)
    for writer in ranks:
        writer.close()
    merge_parts(store, complete=True)
    merge_parts(store, complete=True)
    read = open_activations(store)
    assert torch.equal(gathered(read), x)
    assert torch.equal(read.rows(torch.arange(23)), x)
    assert read.items().to_pydict() == items_of(0, 23)
    assert not list(store.glob("index.part-*"))


# Damage ------------------------------------------------------------------------------------------


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_every_kind_of_damage_is_found_and_named(tmp_path):
    def fresh(name):
        return write_store(tmp_path / name, rows_of(30, 4))

    def broken(store, match, opens=False):
        with pytest.raises(ActivationError, match=match):
            verify(store)
        if opens:
            open_activations(store)
        else:
            with pytest.raises(ActivationError, match=match):
                open_activations(store)

    flip((store := fresh("altered")) / "shard-00001.safetensors", -1)
    broken(store, "shard-00001.safetensors: altered", opens=True)
    flip((store := fresh("items")) / "items-00002.parquet", 10)
    broken(store, "items-00002.parquet: altered", opens=True)
    os.truncate((store := fresh("truncated")) / "shard-00002.safetensors", 100)
    broken(store, "shard-00002.safetensors: 100 bytes.*truncated")
    os.unlink((store := fresh("missing")) / "shard-00000.safetensors")
    broken(store, "shard-00000.safetensors: missing")
    os.unlink((store := fresh("missing items")) / "items-00000.parquet")
    broken(store, "items-00000.parquet: missing")
    save_file({"activations": rows_of(10, 3)}, (store := fresh("width")) / "shard-00001.safetensors")
    broken(store, r"shard-00001.*holds activations F32 \[10, 3\]; the store's index says activations float32 \[10, 4\]")
    save_file({"other": rows_of(10, 4)}, (store := fresh("name")) / "shard-00001.safetensors")
    broken(store, "shard-00001.*holds other F32")


def test_several_damaged_files_are_listed(tmp_path):
    write_store(tmp_path / "s", rows_of(80, 4))
    for number in range(7):
        os.unlink(tmp_path / "s" / f"shard-{number:05d}.safetensors")
    with pytest.raises(ActivationError, match=r"shard-00000.*shard-00004.*and 2 more") as caught:
        verify(tmp_path / "s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "x"}, "format 'x'"),
        ({"dtype": "int8"}, "int8"),
        ({"shape": [31, 5]}, "shape says 31 rows, the shards 30"),
        ({"shape": [30]}, "damaged index"),
        ({"shards": [{"number": 0}]}, "damaged index"),
        ({"source": None}, "damaged index"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, change, message):
    file = write_store(tmp_path / "s", rows_of(30)) / "index.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | change))
    with pytest.raises(ActivationError, match=message) as caught:
        open_activations(tmp_path / "s")
    assert str(file) in str(caught.value)
    file.write_text(json.dumps(good)[:-20])
    with pytest.raises(ActivationError, match="damaged index"):
        open_activations(tmp_path / "s")
    good["shards"][1]["file"] = "../other.safetensors"
    file.write_text(json.dumps(good))
    with pytest.raises(ActivationError, match="outside the store"):
        open_activations(tmp_path / "s")


# Matrix files ------------------------------------------------------------------------------------


def save_matrix(path, x):
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".pt":
        torch.save(x, path)
    else:
        save_file({"x": x, "bias": torch.zeros(3)}, path)
    return path


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
def test_matrix_files(tmp_path, suffix, dtype):
    if suffix == ".npy" and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    x = rows_of(23, 6, dtype)
    matrix = open_activations(save_matrix(tmp_path / f"x{suffix}", x))
    assert (matrix.n_rows, matrix.d, matrix.dtype, matrix.source, matrix.has_items) == (23, 6, dtype, None, False)
    assert torch.equal(gathered(matrix), x.float())
    picks = torch.tensor([22, 0, 5, 5])
    assert matrix.rows(picks).dtype == torch.float32
    assert torch.equal(matrix.rows(picks), x.float()[picks])
    with pytest.raises(ActivationError, match="no item ids"):
        matrix.items()


def test_strided_matrices(tmp_path):
    x = rows_of(9, 4)
    np.save(tmp_path / "f.npy", np.asfortranarray(x.numpy()))
    torch.save({"x": x.t(), "step": 3, "bias": torch.zeros(2)}, tmp_path / "t.pt")
    torch.save(torch.nn.Parameter(x)[2:7, 1:], tmp_path / "slice.pt")
    for name, expected in [("f.npy", x), ("t.pt", x.t()), ("slice.pt", x[2:7, 1:])]:
        matrix = open_activations(tmp_path / name)
        assert torch.equal(gathered(matrix), expected)
        assert torch.equal(matrix.rows(torch.tensor([2, 0])), expected[[2, 0]])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_one_of_several_matrices_by_name(tmp_path, suffix):
    tensors = {"a": rows_of(3), "b": rows_of(4), "c": torch.zeros(2)}
    path = tmp_path / f"x{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert torch.equal(gathered(open_activations(f"{path}::b")), tensors["b"])
    for key, message in [
        ("", r"2 2-D tensors; name one as FILE::NAME; there are: 'a' \[3, 5\]"),
        ("::z", "::z: no such"),
    ]:
        with pytest.raises(ActivationError, match=message):
            open_activations(f"{path}{key}")
    with pytest.raises(ActivationError, match=r"shape is \[2\]; a matrix"):
        open_activations(f"{path}::c")


def test_an_existing_file_comes_before_a_named_tensor(tmp_path):
    np.save(tmp_path / "a::b.npy", rows_of(3).numpy())
    assert torch.equal(gathered(open_activations(tmp_path / "a::b.npy")), rows_of(3))
    write_store(tmp_path / "c::d", rows_of(4))
    assert torch.equal(gathered(open_activations(tmp_path / "c::d")), rows_of(4))
    save_file({"a": rows_of(3), "b": rows_of(4)}, tmp_path / "e::f.safetensors")
    assert torch.equal(gathered(open_activations(tmp_path / "e::f.safetensors::b")), rows_of(4))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["bare pickle", "torch.save", "legacy torch.save", "object array"])
def test_disguised_pickles_are_refused_and_never_run(tmp_path, suffix, kind):
    path, target = tmp_path / f"x{suffix}", tmp_path / "executed"
    with open(path, "wb") as file:
        if kind == "bare pickle":
            pickle.dump(Bomb(target), file)
        elif kind == "object array":
            np.save(file, np.array([[Bomb(target)]], dtype=object), allow_pickle=True)
        else:
            torch.save({"x": rows_of(3), "b": Bomb(target)}, file, _use_new_zipfile_serialization=kind == "torch.save")
    with pytest.raises(ActivationError) as caught:
        open_activations(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def refused(path, message):
    with pytest.raises(ActivationError, match=message) as caught:
        open_activations(path)
    assert str(path).partition("::")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_activations(tmp_path):
    refused(tmp_path / "none.npy", "no such file or directory")
    refused(tmp_path, "no index.json in it: not a store")
    (tmp_path / "x.csv").write_text("1,2")
    refused(tmp_path / "x.csv", r"unknown suffix '.csv'; a matrix file is one of .npy, .safetensors, .pt")
    for suffix in (".npy", ".safetensors", ".pt"):
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        refused(tmp_path / f"empty{suffix}", "the file is empty")
    np.savez(tmp_path / "z.npz", x=np.zeros((2, 2)))
    os.rename(tmp_path / "z.npz", tmp_path / "z.npy")
    refused(tmp_path / "z.npy", "not a readable .npy")
    np.save(tmp_path / "ok.npy", np.zeros((2, 2)))
    refused(f"{tmp_path / 'ok.npy'}::key", "no named tensors")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 4), r"\[0, 4\]"),
        (torch.zeros(4, 0), r"\[4, 0\]"),
        (torch.zeros(4), r"\[4\]"),
        (torch.zeros(2, 3, 4), r"\[2, 3, 4\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64|I64"),
        (torch.zeros(2, 3, dtype=torch.complex64), "complex64|C64"),
        (torch.zeros(2, 3, dtype=torch.bool), "bool|BOOL"),
    ],
)
def test_matrices_of_the_wrong_shape_or_dtype(tmp_path, suffix, x, message):
    if x.is_complex() and suffix == ".safetensors":
        pytest.skip("old safetensors cannot write it")
    refused(save_matrix(tmp_path / f"x{suffix}", x), message)


def test_other_unusable_matrices(tmp_path):
    np.save(tmp_path / "big.npy", np.zeros((2, 2), dtype=">f4"))
    refused(tmp_path / "big.npy", "little-endian")
    np.save(tmp_path / "long.npy", np.zeros((2, 2), dtype=np.longdouble))
    refused(tmp_path / "long.npy", "dtype is float128|dtype is longdouble")
    torch.save(torch.eye(3).to_sparse(), tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", "accepted: dense|refused")
    torch.save([rows_of(3)], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "0 2-D tensors")
    torch.save(rows_of(30), tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as old,
        zipfile.ZipFile(tmp_path / "zip.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    refused(tmp_path / "zip.pt", "compressed")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_truncated_and_altered_headers_never_escape(tmp_path_factory, suffix, data):
    """Whatever the bytes, opening gives a matrix or an ActivationError."""
    path = save_matrix(tmp_path_factory.mktemp("m") / f"x{suffix}", rows_of(3, 4))
    content = bytearray(path.read_bytes())
    truncated = data.draw(st.booleans())
    if truncated:
        content = content[: data.draw(st.integers(1, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    if truncated:
        with pytest.raises(ActivationError):
            open_activations(path)
        return
    try:
        matrix = open_activations(path)
        for _ in matrix.chunks(2):
            pass
    except ActivationError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_reading_a_matrix_larger_than_memory(tmp_path):
    """Half again as large as this machine's memory, as a sparse file: mapping it privately would be refused."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    d = 1024
    n = total * 3 // 2 // (4 * d)
    header = json.dumps({"x": {"dtype": "F32", "shape": [n, d], "data_offsets": [0, n * d * 4]}}).encode()
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n * d * 4)
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(3).tobytes())
    matrix = open_activations(path)
    assert matrix.rows(torch.tensor([n - 1, 0]))[0, -1] == 3
    assert not ShuffledRows(matrix, 4096)._exact or n * d * 4 <= 8 << 30


# Finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named(tmp_path, value):
    x = rows_of(30)
    x[21, 3] = value
    matrix = open_activations(save_matrix(tmp_path / "x.npy", x))
    message = rf"x.npy: row 21, column 3 is {value}"
    with pytest.raises(ActivationError, match=message):
        gathered(matrix)
    with pytest.raises(ActivationError, match=message):
        matrix.rows(torch.tensor([0, 21, 22]))
    with pytest.raises(ActivationError, match=message):
        list(batches(matrix, ShuffledRows(matrix, 4), 0, 7 * 2))
    matrix.rows(torch.tensor([20, 22]))


def test_finite_values_whose_sum_overflows_are_fine():
    check_finite(torch.full((3, 4), 3e38), range(3), "x")
    check_finite(torch.empty(0, 4), range(0), "x")
    check_finite(torch.full((100, 4), 60000.0, dtype=torch.float16), range(100), "x")
    with pytest.raises(ActivationError, match="row 12, column 0 is inf"):
        check_finite(
            torch.tensor([[3e38, 3e38], [3e38, 3e38], [torch.inf, -torch.inf]]), torch.tensor([10, 11, 12]), "x"
        )


# Order -------------------------------------------------------------------------------------------


def order_of(n, batch_size, seed=0, windowed=False):
    sizes = {"exact_bytes": 0, "window_bytes": 512 * 20, "block_bytes": 512 * 4} if windowed else {}
    return ShuffledRows(SimpleNamespace(n_rows=n, row_bytes=512), batch_size, seed, **sizes)


def epoch_rows(order, epoch):
    first = epoch * order.batches_per_epoch
    return [order.batch(first + b).tolist() for b in range(order.batches_per_epoch)]


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 150), batch_size=st.integers(1, 60), epoch=st.integers(0, 2))
def test_blocks_begin_once_an_epoch_and_before_their_rows(n, batch_size, epoch):
    order = order_of(n, batch_size, windowed=True)
    first, announced = epoch * order.batches_per_epoch, []
    for step in range(first, first + order.batches_per_epoch):
        rows = set(order.batch(step).tolist())
        announced += [row for start, stop in order.blocks_begun(step) for row in range(start, stop)]
        assert rows <= set(announced)
        anew = [row for start, stop in order.blocks_begun(step, anew=True) for row in range(start, stop)]
        assert rows <= set(anew), "a resumed run has announced nothing before"
    assert len(announced) == len(set(announced))


@pytest.fixture
def announced(monkeypatch):
    """Rows that were announced to the kernel, as they are read by those who announce them."""
    rows = []
    monkeypatch.setattr(rows_module, "will_need", lambda mapped_ND: rows.extend(mapped_ND.float().tolist()))
    return rows


def test_what_is_read_in_order_is_announced(tmp_path, announced):
    x = rows_of(50)
    activations = open_activations(write_store(tmp_path / "store", x, 20))
    for start, x_BD in activations.chunks(15):
        assert x_BD.tolist() == x[start : start + 15].tolist()
    assert sorted(announced) == sorted(x.tolist())


@pytest.mark.parametrize("announce", [True, False])
def test_a_window_is_announced_wherever_in_it_batches_start(tmp_path, announced, announce):
    x = rows_of(64)
    activations = open_activations(write_store(tmp_path / "store", x, 20))
    order = ShuffledRows(activations, 4, exact_bytes=0, window_bytes=512 * 16, block_bytes=512 * 2)
    ((rows, x_BD),) = batches(activations, order, 1, 1, announce=announce)  # the second of the window's four
    assert torch.equal(x_BD, x[rows])
    assert len(announced) == (16 if announce else 0)
    assert not announce or all(row in announced for row in x_BD.tolist())


def test_threads_that_ask_for_one_permutation_make_it_once():
    made, all_ask = [], threading.Barrier(4)

    @order_module._made_once
    def slow(n):
        made.append(n)
        time.sleep(0.05)
        return np.arange(n)

    def ask(_):
        all_ask.wait()
        return len(slow(3))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [3] * 4
    assert made == [3]


def test_an_exact_permutation_announces_no_blocks():
    assert order_of(100, 10).blocks_begun(0, anew=True) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["store", "npy"])
def test_rows_are_mapped_for_random_reading(tmp_path, kind):
    """Without it every fault may read megabytes around a row."""
    x = rows_of(5000)
    np.save(tmp_path / "x.npy", x.numpy())
    path = tmp_path / "x.npy" if kind == "npy" else write_store(tmp_path / "store", x, 5000, 5000)
    activations = open_activations(path)
    assert torch.equal(activations.rows(torch.arange(50)), x[:50])
    mapped = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    assert mapped
    for mapping in mapped:
        flags = next(line.split() for line in mapping.splitlines() if line.startswith("VmFlags:"))
        assert "rr" in flags


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 150),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    windowed=st.booleans(),
)
def test_every_row_at_most_once_an_epoch(n, batch_size, seed, epoch, windowed):
    order = order_of(n, batch_size, seed, windowed)
    got = epoch_rows(order, epoch)
    flat = [row for batch in got for row in batch]
    assert len(set(flat)) == len(flat) == max(n // batch_size * batch_size, min(n, batch_size))
    assert set(flat) <= set(range(n))
    assert all(batch == sorted(batch) and len(batch) == min(batch_size, n) for batch in got)
    step = epoch * order.batches_per_epoch + len(got) - 1
    assert order_of(n, batch_size, seed, windowed).batch(step).tolist() == got[-1]  # no state: resumable anywhere


@pytest.mark.parametrize("windowed", [False, True])
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 150), a=st.integers(1, 20), times=st.integers(1, 5), seed=st.integers(0, 9))
def test_the_order_does_not_depend_on_the_batch_size(windowed, n, a, times, seed):
    small, large = order_of(n, a, seed, windowed), order_of(n, a * times, seed, windowed)
    if n < a * times:
        return
    union = [row for b in range(times) for row in small.batch(small.batches_per_epoch + b).tolist()]
    assert sorted(union) == large.batch(large.batches_per_epoch).tolist()


@pytest.mark.parametrize("windowed", [False, True])
def test_epochs_and_seeds_differ_and_every_row_has_its_turn(windowed):
    order = order_of(100, 30, 1, windowed)
    assert epoch_rows(order, 0) != epoch_rows(order, 1)
    assert epoch_rows(order, 0) != epoch_rows(order_of(100, 30, 2, windowed), 0)
    seen = {row for epoch in range(20) for batch in epoch_rows(order, epoch) for row in batch}
    assert seen == set(range(100))  # the ten dropped rows are others in every epoch


def test_the_permutation_is_the_same_on_every_machine():
    assert [order_of(12, 4, 5).batch(b).tolist() for b in range(3)] == [[3, 6, 10, 11], [2, 4, 5, 7], [0, 1, 8, 9]]
    assert order_of(97, 10, 5, windowed=True).batch(3).tolist() == [13, 24, 25, 26, 27, 40, 43, 44, 45, 46]


def test_the_permutation_is_uniform():
    """Over many epochs every row comes in the first batch equally often (6 standard deviations)."""
    counts = np.zeros(20)
    for epoch in range(4000):
        counts[order_of(20, 5).batch(epoch * 4).numpy()] += 1
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(4000 * 0.25 * 0.75)


def test_windows_keep_a_batch_within_few_blocks_and_mix_them():
    order = order_of(10_000, 20, 0, windowed=True)  # blocks of 4 rows, windows of 5 blocks = one batch
    blocks = [np.unique(order.batch(b).numpy() // 4) for b in range(100)]
    assert all(len(b) == 5 for b in blocks)
    assert np.median([np.ptp(b) for b in blocks]) > 1000


@pytest.mark.parametrize(("arguments", "message"), [((10, 0), "batch_size is 0"), ((10, 5, -1), "seed is -1")])
def test_order_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        order_of(*arguments)


# Reading ahead -----------------------------------------------------------------------------------


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("activations")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_resume_at_any_step(tmp_path, dtype):
    x = rows_of(50, 4, dtype)
    store = open_activations(write_store(tmp_path / "s", x))
    order = ShuffledRows(store, 8, seed=3)
    whole = list(batches(store, order, 0, 20))
    assert len(whole) == 20
    for rows, batch in whole:
        assert torch.equal(batch, x.float()[rows])
    for (rows, batch), (rows_again, batch_again) in zip(whole[13:], batches(store, order, 13, 7)):
        assert torch.equal(rows, rows_again)
        assert torch.equal(batch, batch_again)
    assert len({batch.data_ptr() for _, batch in whole}) == 20  # a consumer may keep its batches
    assert list(batches(store, order, 5, 0)) == []
    with pytest.raises(ValueError, match=r"order is over 7 rows; .* has 50"):
        batches(store, order_of(7, 2), 0, 1)
    assert not loader_threads()


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(threads)


def test_prefetch_stays_in_order_raises_in_the_consumer_and_closes(three_threads):
    started = []

    def load(job):
        started.append(job)
        if job == 3:
            raise ValueError("job 3")
        return job, torch.get_num_threads()

    stream = prefetch(load, range(10))
    assert [next(stream) for _ in range(3)] == [(0, 1), (1, 1), (2, 1)]
    with pytest.raises(ValueError, match="job 3"):
        next(stream)
    assert not loader_threads()
    started.clear()
    stream = prefetch(load, range(4, 1000))
    next(stream)
    assert loader_threads()
    stream.close()
    assert not loader_threads()
    assert len(started) < 20
    assert torch.get_num_threads() == three_threads
    probe = []
    thread = threading.Thread(target=lambda: probe.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert probe == [three_threads]


def test_a_store_keeps_no_file_open(tmp_path):
    store = open_activations(write_store(tmp_path / "s", rows_of(40), rows_per_shard=1))
    descriptors = [
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").exists()
    ]
    assert not [name for name in descriptors if str(tmp_path) in name]
    assert torch.equal(store.rows(torch.arange(39, -1, -1)), rows_of(40).flip(0))
