"""Files at URLs in the cache: whole or absent, fetched once, bounded, whatever the network does."""

import errno
import hashlib
import multiprocessing
import os
import sys
import threading
import time
import urllib.request
from base64 import b64encode

import fsspec.registry  # noqa: F401  # known by its name below
import pytest

from file_server import FileServer, put_anew
from saevlm_fast.data.label_sets import read_labels
from saevlm_fast.data.rows import open_activations
from saevlm_fast.images.open import open_images
from saevlm_fast.remote import cache, reading
from saevlm_fast.remote.answers import NotThere, RemoteError
from saevlm_fast.remote.cache import fetched, release
from saevlm_fast.remote.files import RemoteFiles
from saevlm_fast.remote.reading import read_whole
from saevlm_fast.urls import redacted


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAEVLM_FAST_CACHE_GIB", "0.001")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reading, "TRIES", 3)
    monkeypatch.setattr(cache, "PIECE", 1000)
    cache._users.forget()
    (tmp_path / "files").mkdir()
    with FileServer(tmp_path / "files") as made:
        yield made


def put(server, name, size=3500, seed=0):
    data = (hashlib.sha256(bytes([seed])).digest() * (size // 32 + 1))[:size]
    put_anew(server.folder / name, data)
    return data


def fetched_in_turn(server, names):
    """Each used later than the one before, and released; the clock of a file system is too coarse to tell."""
    for number, name in enumerate(names):
        cached = fetched(f"{server.url}/{name}.bin")
        os.utime(cached.path.with_name("info.json"), (time.time() + number, time.time() + number))
        release(cached.key)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_fetched_once_in_pieces_and_again_when_it_changes(server):
    data = put(server, "a.bin")
    got = fetched(f"{server.url}/a.bin")
    assert got.path.name == "a.bin"
    assert got.path.read_bytes() == data
    assert server.asked["a.bin"] == 1 + 4
    assert fetched(f"{server.url}/a.bin").path == got.path
    assert server.asked["a.bin"] == 6, "whether it has changed"
    newer = put(server, "a.bin", seed=1)
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == newer


def test_what_is_known_by_its_digest_is_not_asked_about_again(server):
    data = put(server, "a.bin")
    fetched(f"{server.url}/a.bin", sha256(data))
    before = server.asked.total()
    assert fetched(f"{server.url}/a.bin", sha256(data)).path.read_bytes() == data
    assert server.asked.total() == before


def test_a_file_that_is_not_what_it_must_be_is_refused_and_not_kept(server):
    put(server, "a.bin")
    with pytest.raises(RemoteError, match=r"a.bin: altered, its SHA-256 is not the one"):
        fetched(f"{server.url}/a.bin", sha256(b"another"))
    assert not list(cache.remote_cache().rglob("a.bin*"))


@pytest.mark.parametrize("failure", [503, 429, 500, "cut", "hang"])
@pytest.mark.parametrize("ranges", [True, False])
def test_what_passes_is_tried_again(server, failure, ranges, monkeypatch):
    monkeypatch.setattr(reading, "TIMEOUT", 2.0 if failure == "hang" else reading.TIMEOUT)
    server.ranges = ranges
    data = put(server, "a.bin")
    server.fails["a.bin"] = [failure] if ranges else [None, failure]
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == data


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (404, r"a.bin: nothing is there \(status 404\)"),
        (403, r"a.bin: you may not read it, or the signature of the URL is no longer good \(status 403\)"),
        ("wrong", "it answers with another range than was asked for"),
    ],
)
def test_what_does_not_pass_is_said_at_once(server, failure, message):
    put(server, "a.bin")
    server.fails["a.bin"] = [None, failure] if failure == "wrong" else [failure]
    with pytest.raises(RemoteError, match=message):
        fetched(f"{server.url}/a.bin")
    assert not server.fails["a.bin"], "no second try"


@pytest.mark.parametrize(
    ("failure", "message"), [(503, "status 503, 3 times"), ("cut", "bytes came of"), ("hang", "no answer")]
)
def test_what_never_passes_ends(server, failure, message, monkeypatch):
    monkeypatch.setattr(reading, "TIMEOUT", 2.0 if failure == "hang" else reading.TIMEOUT)
    put(server, "a.bin")
    server.fails["*"] = [*([None] if failure == "cut" else []), *[failure] * 3]
    with pytest.raises(RemoteError, match=message) as error:
        fetched(f"{server.url}/a.bin")
    assert "\n" not in str(error.value)
    while server.fails["*"]:  # who was not waited for comes to the server nevertheless
        time.sleep(0.01)


def test_a_server_that_dies_midway_and_a_later_process_that_goes_on(server):
    data = put(server, "a.bin")
    server.fails["a.bin"] = [None, None, None, 503, 503, 503]
    with pytest.raises(RemoteError, match="status 503"):
        fetched(f"{server.url}/a.bin")
    assert not list(cache.remote_cache().rglob("a.bin"))
    before = server.asked["a.bin"]
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == data
    assert server.asked["a.bin"] - before == 1 + 2, "two of four pieces were there"


def test_a_part_of_another_version_is_not_gone_on_with(server):
    put(server, "a.bin")
    server.fails["a.bin"] = [None, None, None, 503, 503, 503]
    with pytest.raises(RemoteError, match="status 503"):
        fetched(f"{server.url}/a.bin")
    newer = put(server, "a.bin", seed=1)
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == newer


def test_a_file_that_is_replaced_while_it_is_read_is_refused(server, monkeypatch):
    put(server, "a.bin")
    read = reading._web_range

    def replaced_then_read(url, start, *more):
        if start == 2000:
            put(server, "a.bin", seed=1)
        return read(url, start, *more)

    monkeypatch.setattr(reading, "_web_range", replaced_then_read)
    with pytest.raises(RemoteError, match="it was replaced while it was read"):
        fetched(f"{server.url}/a.bin")


def test_no_server_at_all(server):
    server.stop()
    with pytest.raises(RemoteError, match=r"a.bin: no answer \(.*refused\), 3 times"):
        fetched(f"{server.url}/a.bin")


def kib(n):
    return n << 10


def used_bytes():
    return sum(path.stat().st_size for path in cache.remote_cache().rglob("*.bin"))


def test_the_cache_is_bounded_and_what_is_in_use_stays(server, monkeypatch):
    """1 MiB for files of 300 KiB: three fit."""
    monkeypatch.setattr(cache, "PIECE", kib(200))
    for name in "abcde":
        put(server, f"{name}.bin", kib(300))
    cached = {}
    for name in "ab":
        cached[name] = fetched(f"{server.url}/{name}.bin")
    release(cached["b"].key)
    for name in "cd":
        cached[name] = fetched(f"{server.url}/{name}.bin")
        assert used_bytes() <= 1 << 20
    assert cached["a"].path.exists(), "used longest ago, but in use"
    assert not cached["b"].path.exists()
    with pytest.raises(RemoteError, match=r"do not fit into the cache: .* of files in use.*--cache-gib"):
        fetched(f"{server.url}/e.bin")
    release(cached["c"].key)
    assert fetched(f"{server.url}/e.bin").path.exists()
    put(server, "large.bin", kib(1100))
    with pytest.raises(RemoteError, match=r"large.bin: 1126400 bytes; the cache may have 1073741"):
        fetched(f"{server.url}/large.bin")


def hold(url, ready, done):
    fetched(url)
    ready.set()
    done.wait(60)


def test_what_another_process_uses_stays_until_it_ends(server, monkeypatch):
    monkeypatch.setattr(cache, "PIECE", kib(200))
    for name in "abcd":
        put(server, f"{name}.bin", kib(300))
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(f"{server.url}/a.bin", ready, done))
    process.start()
    assert ready.wait(60)
    fetched_in_turn(server, "bcd")
    assert list(cache.remote_cache().rglob("a.bin"))
    done.set()
    process.join()
    release(fetched(f"{server.url}/b.bin").key)
    assert not list(cache.remote_cache().rglob("a.bin"))


def test_what_somebody_begins_to_use_while_room_is_made_stays(server, monkeypatch):
    """Another process opens a file that nobody used when room began to be made, just before its turn to be removed."""
    monkeypatch.setattr(cache, "PIECE", kib(200))
    for name in "abcd":
        put(server, f"{name}.bin", kib(300))
    fetched_in_turn(server, "abc")
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(f"{server.url}/a.bin", ready, done))
    removed = cache._removed

    def late(folder):
        if not ready.is_set():
            process.start()
            assert ready.wait(60)
        return removed(folder)

    monkeypatch.setattr(cache, "_removed", late)
    fetched(f"{server.url}/d.bin")
    assert list(cache.remote_cache().rglob("a.bin"))
    assert not list(cache.remote_cache().rglob("b.bin"))
    done.set()
    process.join()


def fetch_and_read(url, results):
    results.put(len(fetched(url).path.read_bytes()))


def test_processes_and_threads_that_ask_at_once_fetch_once(server):
    put(server, "a.bin", 20_000)
    server.latency = 0.01
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=fetch_and_read, args=(f"{server.url}/a.bin", results)) for _ in range(3)]
    threads = [threading.Thread(target=fetch_and_read, args=(f"{server.url}/a.bin", results)) for _ in range(3)]
    for each in processes + threads:
        each.start()
    assert [results.get(timeout=60) for _ in range(6)] == [20_000] * 6
    for each in processes + threads:
        each.join()
    assert server.asked["a.bin"] == 6 + 20, "each asks whether it has changed; one fetches"


def test_a_killed_fetch_leaves_nothing_that_looks_whole(server):
    data = put(server, "a.bin", 50_000)
    server.fails["a.bin"] = [*[None] * 20, "hang"]
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=fetch_and_read, args=(f"{server.url}/a.bin", fork.Queue()))
    process.start()
    while not list(cache.remote_cache().rglob("part.json")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not list(cache.remote_cache().rglob("a.bin"))
    server.fails.clear()
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == data


def test_files_are_fetched_ahead_and_let_go(server, monkeypatch):
    """Of 1 MiB a third is held: two files of 150 KiB."""
    monkeypatch.setattr(cache, "PIECE", kib(200))
    datas = [put(server, f"{i}.bin", kib(150), i) for i in range(9)]
    urls = [f"{server.url}/{i}.bin" for i in range(9)]
    files = RemoteFiles(urls, [sha256(data) for data in datas], lambda path, i: path.read_bytes())
    files.ahead([0, 1])
    deadline = time.monotonic() + 30
    while len(files._held) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    before = server.asked.total()
    assert files[0] == datas[0]
    assert server.asked.total() == before, "it was here"
    assert list(files) == datas
    assert len(cache._users._counts) <= 3
    assert used_bytes() <= 1 << 20
    server.fails["*"] = [404]
    files.ahead([2])
    while 2 in files._coming:
        time.sleep(0.005)
    assert files[2] == datas[2], "what failed ahead is tried again when it is asked for"


def test_a_login_is_sent_and_shown_nowhere(server, tmp_path):
    data = put(server, "a.bin")
    server.password = b64encode(b"me:se cret").decode()
    url = f"{server.url.replace('://', '://me:se%20cret@')}/a.bin?X-Amz-Signature=hidden"
    assert fetched(url).path.read_bytes() == data
    assert fetched(url.replace("hidden", "other")).path == fetched(url).path, "another signature, the same file"
    wrong = url.replace("cret@", "crat@")
    with pytest.raises(NotThere, match="it asks for a login") as error:
        fetched(wrong)
    assert str(error.value).startswith(f"{server.url.replace('://', '://***@')}/a.bin?***: ")
    for path in (tmp_path / "cache").rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        assert b"cret" not in text
        assert b"hidden" not in text


def test_small_files_are_read_without_the_cache(server):
    data = put(server, "a.bin")
    for server.ranges in (True, False):
        assert read_whole(f"{server.url}/a.bin", 4000) == data
        with pytest.raises(RemoteError, match="at most"):
            read_whole(f"{server.url}/a.bin", 3000)


def test_limits_are_checked(monkeypatch):
    for text in ("0", "-1", "x", "nan"):
        monkeypatch.setenv("SAEVLM_FAST_CACHE_GIB", text)
        with pytest.raises(ValueError, match=f"SAEVLM_FAST_CACHE_GIB: '{text}' is not a positive number"):
            cache.limit_bytes()


def test_a_driver_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    advice = r"s3://bucket/x: s3:// needs the package s3fs .*pip install 'saevlm-fast\[remote\]'"
    with pytest.raises(NotThere, match=advice):
        read_whole("s3://bucket/x", 10)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.csv", "x.npy", "x.safetensors", "store/index.json"])
def test_what_is_wrong_with_a_fetched_file_is_said_of_its_url(server, name):
    (server.folder / "store").mkdir()
    (server.folder / name).write_text("<html>log in first</html>")
    url = f"{server.url}/{name}?token=secret"
    read = {
        "csv": lambda: read_labels(url, ["a"]),
        "tar": lambda: open_images(url),
        "parquet": lambda: open_images(url),
    }
    store = url.replace("/index.json", "")
    with pytest.raises(ValueError, match=name.partition(".")[0]) as error:
        read.get(name.partition(".")[2], lambda: open_activations(store))()
    assert f"{server.url}/{name}" in str(error.value)
    assert "/cache/" not in str(error.value)
    assert "secret" not in str(error.value)


def test_an_empty_file(server):
    put(server, "a.bin", 0)
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == b""


class Objects:
    """A store of one object, which is replaced after so many ranges."""

    def __init__(self, replaced_after):
        self.data, self.left = b"a" * 3000, replaced_after

    def invalidate_cache(self):
        pass

    def info(self, path):
        return {"size": len(self.data), "ETag": self.data[:1].decode(), "type": "file"}

    def cat_file(self, path, start, end):
        if not self.left:
            self.data = b"b" * 3000
        self.left -= 1
        return self.data[start:end]


def test_an_object_that_is_replaced_while_it_is_read_is_refused(server, monkeypatch):
    objects = Objects(replaced_after=2)
    monkeypatch.setattr(reading, "_file_system", lambda url: (objects, "bucket/x"))
    with pytest.raises(RemoteError, match=r"s3://bucket/x: it was replaced while it was read"):
        fetched("s3://bucket/x")
    assert fetched("s3://bucket/x").path.read_bytes() == b"b" * 3000


def test_who_has_opened_one_version_keeps_it(server):
    data = put(server, "a.bin")
    old = fetched(f"{server.url}/a.bin")
    newer = put(server, "a.bin", seed=1)
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == newer
    assert old.path.read_bytes() == data


def test_without_a_cache_what_is_wrong_with_a_file_here_is_said_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path / "file"))
    (tmp_path / "labels.csv").write_text("image,a\nx\n")
    with pytest.raises(ValueError, match=r"labels\.csv: line 2: 1 cells"):
        read_labels(tmp_path / "labels.csv", ["x", "y"])


def test_a_full_disk_is_one_line(server, monkeypatch):
    data = put(server, "a.bin")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(RemoteError, match=r"a.bin: cannot be written to the cache \(.*\): No space left on device"):
            fetched(f"{server.url}/a.bin")
    assert fetched(f"{server.url}/a.bin").path.read_bytes() == data


def test_a_proxy_is_gone_through_and_its_password_is_shown_nowhere(server, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)  # which has read the environment
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", server.url.replace("://", "://me:pass-word@"))
    (server.folder / "http:" / "host.example").mkdir(parents=True)
    data = put(server, "http:/host.example/a.bin")
    assert read_whole("http://host.example/a.bin", 9000) == data
    server.fails["*"] = [502] * 3
    with pytest.raises(RemoteError, match=r"^http://host.example/a.bin: status 502, 3 times$"):
        read_whole("http://host.example/a.bin", 9000)
    server.stop()
    with pytest.raises(RemoteError, match=r"^http://host.example/a.bin: no answer") as error:
        read_whole("http://host.example/a.bin", 9000)
    assert "pass-word" not in str(error.value)


def test_an_account_of_azure_is_no_secret_and_stays_in_what_is_listed(monkeypatch):
    class Files:
        def find(self, path):
            return ["box/a/2.tar", "box/a/1.tar"]

    url = "abfs://box@account.dfs.core.windows.net/a"
    monkeypatch.setattr(reading, "_file_system", lambda url: (Files(), "box/a"))
    assert redacted(url) == url
    assert redacted("s3://key:word@bucket/a") == "s3://***@bucket/a"
    assert reading.listed(url) == [f"{url}/1.tar", f"{url}/2.tar"]
