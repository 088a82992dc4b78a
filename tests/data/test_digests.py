"""Shards are compared with their digests once, before they are used; what was computed is remembered."""

import os
import shutil
import threading
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from thread_peers import together

from saevlm_fast.data import digests
from saevlm_fast.data.digests import CheckedFiles, matrix_digest, remembered
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import ActivationError
from saevlm_fast.files import CACHE_VARIABLE, sha256_file
from stores import DTYPES, rows_of, save_matrix, write_store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    digests._known.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read for their digest, and how long each takes."""
    read = []

    def slowly(file):
        read.append(file)
        time.sleep(0.02)
        return sha256_file(file)

    monkeypatch.setattr(digests, "sha256_file", slowly)
    return read


def test_threads_that_ask_at_once_read_each_file_once(tmp_path, hashed):
    store = write_store(tmp_path / "s", rows_of(80))
    files = sorted(store.glob("shard-*"))
    checked = CheckedFiles(files, [sha256_file(file) for file in files])
    threads = [threading.Thread(target=checked.check, args=(range(8),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hashed) == files
    checked.check_all()
    assert len(hashed) == 8


def test_processes_share_the_files_that_they_all_see(tmp_path, hashed):
    """Two of three see the same files, the third a copy, as on another machine's disk."""
    store = write_store(tmp_path / "s", rows_of(80))
    shutil.copytree(store, tmp_path / "copy")

    def work(peers):
        activations = open_activations(store if peers.rank < 2 else tmp_path / "copy")
        activations.check_whole_shared(peers.rank, peers.collect)
        before = len(hashed)
        activations.rows(torch.arange(80))
        return len(hashed) - before

    assert together(3, work)[0] == [0, 0, 0], "compared again"
    files = sorted([*store.glob("shard-*"), *(tmp_path / "copy").glob("shard-*")])
    assert sorted(hashed) == [file for file in files if file.suffix == ".safetensors"]


def test_a_file_that_another_process_compares_may_not_be_altered(tmp_path):
    store = write_store(tmp_path / "s", rows_of(80))
    damaged = sorted(store.glob("shard-*.safetensors"))[3]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ActivationError, match=f"{damaged.name}: altered"):
        together(3, lambda peers: open_activations(store).check_whole_shared(peers.rank, peers.collect))


def test_what_is_open_can_be_copied_and_is_compared_anew(tmp_path, hashed):
    store = open_activations(write_store(tmp_path / "s", rows_of(20)))
    store.check_whole()
    assert torch.equal(deepcopy(store).rows(torch.arange(20)), rows_of(20))
    assert len(hashed) == 4


def test_only_shards_that_are_read_are_compared(tmp_path, hashed):
    store = open_activations(write_store(tmp_path / "s", rows_of(80)))
    store.rows(torch.tensor([31, 5]))
    assert sorted(file.name for file in hashed) == ["shard-00000.safetensors", "shard-00003.safetensors"]
    store.rows(torch.tensor([33, 6]))
    assert len(hashed) == 2
    store.check_whole()
    assert len(hashed) == 8


def test_the_first_row_of_an_altered_shard_is_an_error_in_every_way_of_reading(tmp_path):
    x = rows_of(40)
    path = write_store(tmp_path / "s", x)
    save_file({"activations": x[10:20] + 1}, path / "shard-00001.safetensors")
    for read in (
        lambda store: store.rows(torch.tensor([12, 3])),
        lambda store: list(store.chunks(7)),
        lambda store: store.check_whole(),
    ):
        with pytest.raises(ActivationError, match=r"shard-00001\.safetensors: altered, its SHA-256 is not the one"):
            read(open_activations(path))
    assert len(open_activations(path).rows(torch.tensor([3, 25]))) == 2, "the others are sound"


def test_altered_items_are_an_error(tmp_path):
    path = write_store(tmp_path / "s", rows_of(40))
    (path / "items-00001.parquet").write_bytes((path / "items-00002.parquet").read_bytes())
    with pytest.raises(ActivationError, match=r"items-00001\.parquet: altered"):
        open_activations(path).items()


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, hashed, monkeypatch, cache):
    monkeypatch.setattr(digests, "_WORTH_REMEMBERING", 1)
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    store = write_store(tmp_path / "s", rows_of(20))
    open_activations(store).check_whole()
    assert len(hashed) == 2
    open_activations(store).check_whole()
    digests._known.cache_clear()  # another process
    open_activations(store).check_whole()
    assert len(hashed) == 2
    file = store / "shard-00001.safetensors"
    altered = bytearray(file.read_bytes())
    altered[-1] ^= 1
    file.write_bytes(altered)
    with pytest.raises(ActivationError, match="altered"):
        open_activations(store).check_whole()
    (notes,) = (cache / "digests").iterdir()
    notes.write_text(notes.read_text() + "half a li")
    digests._known.cache_clear()
    open_activations(store).rows(torch.arange(10))
    assert len(hashed) == 3
    monkeypatch.setattr(digests, "_WEEK", -1.0)
    digests._known.cache_clear()
    open_activations(store).rows(torch.arange(10))
    assert len(hashed) == 4


def test_a_file_whose_time_was_set_back_is_not_the_one_that_was_remembered(tmp_path, monkeypatch):
    """As `dd conv=notrunc` and `touch -r` leave it: the same path, size, inode and mtime."""
    monkeypatch.setattr(digests, "_WORTH_REMEMBERING", 1)
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    file = tmp_path / "x"
    file.write_text("x")
    before = file.stat()
    assert remembered(file, "", lambda: "of x") == "of x"
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # a file system's clock is coarse
        with open(file, "r+") as opened:
            opened.write("y")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (before.st_size, before.st_ino, before.st_mtime_ns)
    assert remembered(file, "", lambda: "of y") == "of y"


def test_what_has_just_changed_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_WORTH_REMEMBERING", 1)
    monkeypatch.setattr(digests, "_SETTLED", 600.0)  # 2 s may pass on a busy machine
    file, made = tmp_path / "x", []
    file.write_text("x")
    for _ in range(2):
        assert remembered(file, "", lambda: made.append(1) or "digest") == "digest"
    assert len(made) == 2


def test_no_place_for_a_cache_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_WORTH_REMEMBERING", 1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert remembered(tmp_path / "file", "", lambda: "digest") == "digest"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_of_a_matrix_is_that_of_its_rows_wherever_they_are(tmp_path, dtype, monkeypatch):
    x = rows_of(53, 7, dtype)
    expected = matrix_digest(x)
    for name in ("x.pt", "x.safetensors", *(["x.npy"] if dtype != torch.bfloat16 else [])):
        assert open_activations(save_matrix(tmp_path / name, x)).digest() == expected
    assert Activations.from_tensor(x).digest() == expected
    assert Activations.from_tensor(x.T.contiguous().T).digest() == expected
    for row in (0, 26, 52):
        other = x.clone()
        other[row, 3] += 1
        assert matrix_digest(other) != expected
    assert matrix_digest(x[:-1]) != expected
    assert matrix_digest(x.view(7, 53)) != expected
    monkeypatch.setattr(digests, "_PIECE", 100)  # the pieces are part of what it is
    assert matrix_digest(x) == matrix_digest(x.clone())


def test_the_digest_of_a_store_is_that_of_its_shards(tmp_path):
    x = rows_of(40)
    store = open_activations(write_store(tmp_path / "a", x)).digest()
    assert open_activations(write_store(tmp_path / "b", x)).digest() == store
    x[39] += 1
    assert open_activations(write_store(tmp_path / "c", x)).digest() != store


def test_a_lazy_negative_is_resolved_or_refused_and_never_read_wrongly(tmp_path):
    x = torch.randn(30, 16, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    torch.save(x, tmp_path / "x.pt")
    with pytest.raises(ActivationError, match=r"x\.pt: the tensor is a lazy negative"):
        open_activations(tmp_path / "x.pt")
    held = Activations.from_tensor(x)
    assert torch.equal(held.rows(torch.arange(30)), x.resolve_neg())
    assert held.digest() == matrix_digest(x.resolve_neg())
    store = open_activations(write_store(tmp_path / "s", x))
    assert torch.equal(store.rows(torch.arange(30)), x.resolve_neg())
    np.testing.assert_array_equal(held.rows(torch.arange(30)).numpy(), x.resolve_neg().numpy())
