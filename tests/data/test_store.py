"""Stores: written, read, killed while they are written, damaged."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from damage import edit_record, flip
from saevlm_fast.data.parquet import read_small_table
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index, read_items, verify
from saevlm_fast.data.writing import ActivationWriter, merge_parts
from saevlm_fast.errors import ActivationError
from saevlm_fast.files import TEMPORARY_PREFIX
from stores import DTYPES, SOURCE, gathered, items_of, rows_of, write_store

# Store ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
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
    read, original = [], read_small_table
    monkeypatch.setattr("saevlm_fast.data.store.read_small_table", lambda f, *o: read.append(f) or original(f, *o))
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
    with pytest.raises(ValueError, match="batch_rows: 0 must be at least 1"):
        store.chunks(0)


def test_the_index_is_as_documented(tmp_path):
    write_store(tmp_path / "s", rows_of(25, 4, torch.bfloat16))
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    shards, seal = index.pop("shards"), index.pop("sha256")
    text = (tmp_path / "s" / "index.json").read_text()
    assert hashlib.sha256(text.replace(seal, "0" * 64).encode()).hexdigest() == seal
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


def test_an_occupied_directory_is_refused_unless_forced(tmp_path):
    write_store(tmp_path / "s", rows_of(30))
    for name in ("notes.txt", "shard-00001-of-00005.safetensors"):
        (tmp_path / "s" / name).write_text("mine")
    with pytest.raises(ActivationError, match="not empty"):
        write_store(tmp_path / "s", rows_of(3))
    assert open_activations(tmp_path / "s").n_rows == 30
    write_store(tmp_path / "s", rows_of(3), force=True)
    assert open_activations(tmp_path / "s").n_rows == 3
    assert sorted(os.listdir(tmp_path / "s")) == [
        "index.json",
        "items-00000.parquet",
        "notes.txt",
        "shard-00000.safetensors",
        "shard-00001-of-00005.safetensors",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(ActivationError, match="not a directory"):
        write_store(tmp_path / "file", rows_of(3))


def test_a_store_keeps_no_file_open(tmp_path):
    store = open_activations(write_store(tmp_path / "s", rows_of(40), rows_per_shard=1))
    descriptors = [
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").exists()
    ]
    assert not [name for name in descriptors if str(tmp_path) in name]
    assert torch.equal(store.rows(torch.arange(39, -1, -1)), rows_of(40).flip(0))


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


# Interrupted writing --------------------------------------------------------------------------------------------------


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
    (store / f"{TEMPORARY_PREFIX}00000000-shard-00009.safetensors").write_bytes(
        b"half"
    )  # as a kill in a write leaves it
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


# Damage ---------------------------------------------------------------------------------------------------------------


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
        ({"shape": [30]}, r"shape is \[30\]; \[rows, d_in\] is needed"),
        ({"shape": [30, 5.0]}, r"shape\[1\] is 5.0; a whole number"),
        ({"shards": [{"number": 0}]}, r"shards\[0\].rows is missing"),
        ({"source": None}, "source is None; an object is needed"),
        ({"complete": 1}, "complete is 1; true or false is needed"),
        ({"more": 1}, "'more' is not an entry"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, change, message):
    file = write_store(tmp_path / "s", rows_of(30)) / "index.json"
    sealed = file.read_text()
    file.write_text(sealed.replace("30", "31", 1))
    with pytest.raises(ActivationError, match=r"index\.json: altered, its sha256"):
        open_activations(tmp_path / "s")
    file.write_text(sealed)
    edit_record(file)
    good = json.loads(file.read_text())
    assert torch.equal(gathered(open_activations(tmp_path / "s")), rows_of(30)), "one without a seal opens"
    file.write_text(json.dumps(good | change))
    with pytest.raises(ActivationError, match=message) as caught:
        open_activations(tmp_path / "s")
    assert str(file) in str(caught.value)
    file.write_text(json.dumps(good)[:-20])
    with pytest.raises(ActivationError, match="not valid JSON"):
        open_activations(tmp_path / "s")
    good["shards"][1]["file"] = "../other.safetensors"
    file.write_text(json.dumps(good))
    with pytest.raises(ActivationError, match="the name of a file in the same directory"):
        open_activations(tmp_path / "s")


def test_an_item_table_that_is_huge_in_memory_is_refused_before_it_is(tmp_path):
    """Text that repeats takes next to nothing on disk: 300 kB here would be 9 GB."""
    path = write_store(tmp_path / "s", rows_of(30), rows_per_shard=30)
    rows, file = 30_000, path / "items-00000.parquet"
    columns = {"image": ["x" * 300_000] * rows, "token": range(rows), "label": [None] * rows}
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(columns["image"][:1]))
    pq.write_table(
        pa.table(
            {"image": dictionary, "token": pa.array(range(rows), pa.int32()), "label": pa.nulls(rows, pa.string())}
        ),
        file,
    )
    assert file.stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ActivationError, match=r"items-00000\.parquet: image unpacks to 9000000000 bytes"):
        read_items(file, rows)
    with pytest.raises(ActivationError, match=r"items-00000\.parquet: 30000 rows; the store's index says 30"):
        read_items(file, 30)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"


def test_many_tokens_an_image_are_more_rows_than_the_item_table_has_bits(tmp_path):
    """392 images of 196 patches, one label: run lengths and dictionaries leave few bytes."""
    n = 192 * 392
    items = {"image": [f"{i // 196:04d}.jpg" for i in range(n)], "token": [0] * n, "label": ["a"] * n}
    with ActivationWriter(tmp_path / "s", 1, torch.float16, {}, n) as writer:
        writer.append(torch.ones(n, 1), items)
    (file,) = (tmp_path / "s").glob("items-*")
    assert 8 * file.stat().st_size < n
    assert open_activations(tmp_path / "s").items()["image"][n - 1].as_py() == items["image"][-1]
