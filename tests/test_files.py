"""Atomic files and directories: whole or absent, whatever goes wrong."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from saevlm_fast.errors import DiskFull, full_disk, while_writing
from saevlm_fast.files import (
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_write,
    remove_leftovers,
    remove_leftovers_of,
    save_safetensors_atomic,
    sha256_file,
    write_json_atomic,
)


@contextmanager
def disk_full_after(n_bytes):
    """The nearest thing to a full disk that needs no root: no file of this process may grow beyond n_bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_appears_whole_with_usual_permissions(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("hello")
        assert not path.exists()
        assert temporary.parent == tmp_path
    assert path.read_text() == "hello"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "plain"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0, 0o666)])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, umask, mode):
    """safetensors writes 600 whatever it says; a colleague is to read them."""
    before = os.umask(umask)
    try:
        save_safetensors_atomic(tmp_path / "a.safetensors", {"x": torch.ones(3)})
        write_json_atomic(tmp_path / "b.json", {})
        with atomic_directory(tmp_path / "d") as directory:
            save_safetensors_atomic(directory / "c.safetensors", {"x": torch.ones(3)})
    finally:
        os.umask(before)
    for name in ("a.safetensors", "b.json", "d/c.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_lazy_negative_is_saved_as_what_it_is(tmp_path):
    x = torch.randn(4, 3, dtype=torch.cfloat).conj().imag
    save_safetensors_atomic(tmp_path / "a.safetensors", {"x": x})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], x.resolve_neg())


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_oserror_that_names_the_destination(tmp_path):
    def write(path):
        with atomic_write(path) as temporary:
            temporary.write_bytes(bytes(10_000))

    with disk_full_after(1000), pytest.raises(OSError, match=r"File too large.*a\.safetensors"):
        save_safetensors_atomic(tmp_path / "a.safetensors", {"x": torch.zeros(10_000)})
    with disk_full_after(1000), pytest.raises(OSError, match=r"'.*/b\.bin'") as caught:
        write(tmp_path / "b.bin")
    assert caught.value.errno == errno.EFBIG
    assert TEMPORARY_PREFIX not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/a.json'$"):
        write_json_atomic(tmp_path / "no" / "a.json", {})


def test_json_is_strict_and_round_trips(tmp_path):
    value = {
        "a": [1, 2.5, None],
        "name": "caf\u00e9 \udcff",
    }  # a lone surrogate: how Python spells a non-UTF-8 file name
    write_json_atomic(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    with pytest.raises(ValueError, match="nan"):
        write_json_atomic(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == value


def test_safetensors_with_metadata_and_views(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save_safetensors_atomic(tmp_path / "a.safetensors", {"x": x, "t": x.t().requires_grad_()}, {"k": "20"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["x"], x)
    assert torch.equal(loaded["t"], x.t())


@pytest.mark.parametrize("n_bytes", [0, 5, (1 << 20) + 3])
def test_sha256(tmp_path, n_bytes):
    data = os.urandom(n_bytes)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_directory_appears_whole(tmp_path):
    path = tmp_path / "run"
    with atomic_directory(path) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "a").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "a").read_text() == "1"
    with pytest.raises(FileExistsError, match="run"), atomic_directory(path):
        pytest.fail("the body must not run")
    with atomic_directory(path, replace=True) as directory:
        (directory / "b").write_text("2")
    assert os.listdir(path) == ["b"]
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_directory(tmp_path, error):
    path = tmp_path / "run"
    path.mkdir()
    (path / "a").write_text("old")

    def write():
        with atomic_directory(path, replace=True) as directory:
            (directory / "a").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_a_failed_publication_puts_the_old_directory_back(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir()
    (path / "a").write_text("old")
    replace, calls = os.replace, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "injected")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="injected"), atomic_directory(path, replace=True) as directory:
        (directory / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_leftovers_of_killed_writers_go(tmp_path):
    (tmp_path / f"{TEMPORARY_PREFIX}12345678-a").write_text("half")
    (tmp_path / f"{TEMPORARY_PREFIX}12345678-dir").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}step_00000007").mkdir()
    kept = ["keep", f"{TEMPORARY_PREFIX}notes.txt", f"{TEMPORARY_PREFIX}12-a", "elsewhere"]
    for name in kept[:-1]:
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / f"{TEMPORARY_PREFIX}12345678-link").symlink_to("elsewhere")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    assert (tmp_path / "elsewhere" / "file").exists()


def test_what_a_killed_writer_left_beside_one_file_is_removed_and_nothing_else(tmp_path):
    of_others = [".writing-0a0a0a0a-b[1].json", ".writing-0a0a0a0a-x-a[1].json", "a.json", "a[1].json"]
    for name in (*of_others, ".writing-0a0a0a0a-a[1].json"):
        (tmp_path / name).touch()
    remove_leftovers_of(tmp_path / "a[1].json")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(of_others)


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("mine")
    (tmp_path / "run").symlink_to(tmp_path / "kept")
    with atomic_directory(tmp_path / "run", replace=True) as directory:
        (directory / "b").write_text("new")
    assert os.listdir(tmp_path / "run") == ["b"]
    assert os.listdir(tmp_path / "kept") == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["kept", "run"]


def test_numpys_short_write_is_told_as_what_it_is(tmp_path):
    """Its OSError has neither errno nor file."""
    short = "16000 requested and 468 written"
    with (
        pytest.raises(OSError, match=rf"only a part was written, is the disk full\? \({short}\): '.*/a\.npy'"),
        atomic_write(tmp_path / "a.npy"),
    ):
        raise OSError(short)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_full_disk_has_its_number(tmp_path):
    """Its OSError has errno in a sentence alone."""
    with (
        pytest.raises(DiskFull, match=r"/a: No space left on device, while this file was written; .* free") as error,
        atomic_write(tmp_path / "a"),
    ):
        raise OSError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert error.value.errno == errno.ENOSPC


def test_a_full_disk_says_file_work_room_and_what_is_kept(tmp_path, monkeypatch):
    """Of every writer the same: who is nearer to the file says it first."""
    monkeypatch.setattr("saevlm_fast.errors.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 9e9, 12_300))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(DiskFull) as error,
        while_writing("all of it", "nothing"),
        while_writing("a part", "the part before it is kept"),
        atomic_directory(tmp_path / "parts") as directory,
        atomic_write(directory / "a"),
    ):
        raise full
    where, room = tmp_path / "parts" / "a", "12.3 kB are free on its disk"
    told = f"{where}: No space left on device, while a part was written; {room}; the part before it is kept"
    assert str(error.value) == str(pickle.loads(pickle.dumps(error.value))) == told
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(DiskFull, match=f"^{tmp_path}/log: .* while the log was written; .* is as it was$"),
        while_writing("the log", path=tmp_path / "log"),
    ):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_other_errors_of_writing_are_as_they_are(tmp_path):
    missing = OSError(errno.ENOENT, "No such file", "x")
    with pytest.raises(OSError, match="No such file") as error, while_writing("a part", "nothing"):
        raise missing
    assert error.value is missing
    assert not isinstance(error.value, DiskFull)
    with pytest.raises(OSError, match=r"^rank 0: full$"), while_writing("a part"):
        raise OSError("rank 0: full")
    assert full_disk(OSError(errno.ENOSPC, "full")).filename is None, "of no file nothing can be told"


def test_what_is_read_while_a_file_is_written_is_not_told_as_a_full_disk(tmp_path):
    """As rows that are elsewhere: their OSError has neither errno nor file as well."""
    with (
        pytest.raises(OSError, match=r"https://a\.b/c: status 503, 3 times: '.*/a'$") as error,
        atomic_write(tmp_path / "a"),
    ):
        raise OSError("https://a.b/c: status 503, 3 times")
    assert "disk" not in str(error.value)
