"""Outputs: their lock, which keeps processes apart (the other one is a child of this), and their replacement."""

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from saevlm_fast.outputs import (
    LOCK_FILE,
    REPLACEMENT,
    _held,
    begin_replacement,
    begin_writing,
    check_absent,
    check_several_absent,
    output_lock,
    publish,
    settle,
    workplace,
)
from saevlm_fast.records import is_name


@pytest.mark.parametrize("name", ["..", ".", "", "/etc", "a/b", "a/", "../a", "a/..", "a\0b", None, 3, ["a"]])
def test_what_is_no_name(name):
    assert not is_name(name)


@pytest.mark.parametrize("name", ["a", "residual-3-cls", "...", ".a", "a b", "a:b", "a\\b", "caf\u00e9"])
def test_what_is_a_name(name):
    assert is_name(name)


def hold(output, share, seconds, held):
    with output_lock(output, directory=True) as lock:
        if share:
            lock.share()
        held.set()
        time.sleep(seconds)


@contextmanager
def held_by_another(output, share=False, seconds=600.0):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(output, share, seconds, held))
    other.start()
    assert held.wait(120)
    try:
        yield other
    finally:
        other.kill()
        other.join()


@pytest.mark.parametrize(("share", "exclusive"), [(False, True), (False, False), (True, True)])
def test_a_lock_is_refused_while_another_process_holds_it_and_names_it(tmp_path, share, exclusive):
    output, waits = tmp_path / "out", []
    with held_by_another(output, share) as other:
        start = time.monotonic()
        ours = output_lock(output, directory=True, exclusive=exclusive, patience=0.2, on_wait=lambda: waits.append(1))
        message = rf"^output: .*/out is in use: process {other.pid} on \S+ writes to it since 20\S+ \(\S.*\)$"
        with pytest.raises(ValueError, match=message), ours:
            pytest.fail("two work on it")
        assert time.monotonic() - start >= 0.2
    assert waits == [1]
    with output_lock(output, directory=True, exclusive=exclusive, patience=5.0):
        pass  # gone with the process that was killed
    assert os.listdir(output) == []


def test_a_share_is_for_those_that_share(tmp_path):
    share = {"directory": True, "exclusive": False, "patience": 0.0}
    with held_by_another(tmp_path, share=True), output_lock(tmp_path, **share):
        pass
    assert (tmp_path / LOCK_FILE).exists()  # the other one was killed
    with output_lock(tmp_path, **share):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_is_waited_for_though_its_file_is_removed(tmp_path):
    waits = []
    ours = output_lock(tmp_path / "out", directory=True, patience=30.0, on_wait=lambda: waits.append(1))
    with held_by_another(tmp_path / "out", seconds=0.3), ours:
        assert waits == [1]
        holder = json.loads((tmp_path / "out" / LOCK_FILE).read_text())
        assert holder["pid"] == os.getpid()


def test_a_lock_is_had_once_by_a_process(tmp_path):
    with output_lock(tmp_path, directory=True) as lock:
        with output_lock(tmp_path, directory=True) as again:
            assert again is lock
        assert (tmp_path / LOCK_FILE).exists()
    assert os.listdir(tmp_path) == []


def test_a_lock_is_refused_while_another_thread_holds_it(tmp_path):
    output = tmp_path / "new" / "out"
    with ThreadPoolExecutor(1) as other, output_lock(output, directory=True):
        held = other.submit(lambda: output_lock(output, directory=True, patience=0.05).__enter__())
        with pytest.raises(ValueError, match=f"output: {output} is in use by another thread of this process"):
            held.result(60)
        with output_lock(output, directory=True):
            assert (output / LOCK_FILE).exists()
    assert not output.parent.exists()


def test_threads_that_wait_for_a_lock_have_it_one_after_the_other(tmp_path):
    inside, seen, waited = [], [], []

    def work(number):
        with output_lock(tmp_path / "out", directory=True, patience=60, on_wait=lambda: waited.append(number)):
            inside.append(number)
            time.sleep(0.01)
            seen.append(list(inside))
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert sorted(seen) == [[number] for number in range(16)]
    assert waited
    assert not (tmp_path / "out").exists()


def test_a_lock_is_given_back_from_another_thread(tmp_path):
    with ThreadPoolExecutor(1) as other:
        lock = output_lock(tmp_path / "out", directory=True)
        lock.__enter__()
        other.submit(lock.__exit__, None, None, None).result(60)
        other.submit(lambda: output_lock(tmp_path / "out", directory=True, patience=0).__enter__()).result(60)
    gc.collect()
    assert not (tmp_path / "out").exists()


def test_what_fails_before_the_lock_leaves_none(tmp_path):
    for _ in range(2):
        with pytest.raises((ValueError, OSError)), output_lock(tmp_path / ("x" * 300), directory=True):
            pass
    assert not _held


def test_threads_that_begin_at_once_share_a_lock(tmp_path):
    inside = threading.Barrier(3)

    def work(_):
        with output_lock(tmp_path / "a" / "b", directory=True, exclusive=False, patience=60):
            inside.wait(60)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert not (tmp_path / "a").exists()


def test_who_waits_keeps_nobody_else_waiting(tmp_path):
    """And says so once, though it waits for a thread and then for a process."""
    told, let_go = [], threading.Event()

    def on_wait():
        told.append(1)
        with output_lock(tmp_path / "another", directory=True, patience=0):
            let_go.set()

    def wait():
        with output_lock(tmp_path / "out", directory=True, patience=60, on_wait=on_wait):
            pass

    with ThreadPoolExecutor(1) as other:
        with output_lock(tmp_path / "out", directory=True):
            waiting = other.submit(wait)
            assert let_go.wait(60)
            time.sleep(0.2)
        waiting.result(60)
    assert told == [1]


def test_threads_that_share_a_lock_keep_it_until_the_last_has_gone(tmp_path):
    with ThreadPoolExecutor(1) as other:
        first = output_lock(tmp_path, directory=True, exclusive=False)
        second = output_lock(tmp_path, directory=True, exclusive=False)
        first.__enter__()
        other.submit(second.__enter__).result(60)
        first.__exit__(None, None, None)
        with pytest.raises(ValueError, match="another thread"), output_lock(tmp_path, directory=True, patience=0.05):
            pass
        assert (tmp_path / LOCK_FILE).exists()
        other.submit(second.__exit__, None, None, None).result(60)
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_damaged_lock_file_is_some_process(tmp_path):
    with held_by_another(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(b"\xff{")
        with (
            pytest.raises(ValueError, match=r"is in use: another process writes to it$"),
            output_lock(tmp_path, directory=True, patience=0.0),
        ):
            pytest.fail("two work on it")


@pytest.mark.parametrize("there", ["link", "text", "dangling", "fifo", "directory"])
def test_what_lies_where_a_lock_goes_is_left_alone(tmp_path, there):
    other, lock = tmp_path / "other", tmp_path / ".s.json.lock"
    other.write_text("precious")
    if there == "text":
        lock.write_text("precious")
    elif there == "fifo":
        os.mkfifo(lock)
    elif there == "directory":
        lock.mkdir()
    else:
        lock.symlink_to("other" if there == "link" else "nowhere")
    with (
        pytest.raises(ValueError, match=r"^output: .* cannot be written: .*\.s\.json\.lock\)$"),
        output_lock(tmp_path / "s.json", directory=False),
    ):
        pytest.fail("it cannot be locked")
    assert sorted(os.listdir(tmp_path)) == [".s.json.lock", "other"]
    assert other.read_text() == "precious"
    assert there != "text" or lock.read_text() == "precious"


@pytest.mark.parametrize("left", [b"", bytes(100), b'{"pid": 1, "ho'])
def test_what_a_crash_left_of_a_lock_is_no_obstacle(tmp_path, left):
    (tmp_path / LOCK_FILE).write_bytes(left)
    (tmp_path / f".writing-0123abcd-{LOCK_FILE}").touch()  # of the probe
    with output_lock(tmp_path, directory=True):
        assert os.listdir(tmp_path) == [LOCK_FILE]
    assert os.listdir(tmp_path) == []


def test_of_what_cannot_be_written_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", tmp_path / "file", "/proc/none"):
        with (
            pytest.raises(ValueError, match=r"^output: .* cannot be written: .*\(.*\)$"),
            output_lock(output, directory=True),
        ):
            pytest.fail("it cannot be written")
    monkeypatch.setattr(Path, "write_bytes", no_space)  # the lock can be had, and nothing else written
    with (
        pytest.raises(ValueError, match=r"^output: .*/a/b cannot be written: No space left on device"),
        output_lock(tmp_path / "a" / "b", directory=True),
    ):
        pytest.fail("it cannot be written")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("fails", ["pwrite", "ftruncate", "lockf"])
@pytest.mark.parametrize("directory", [True, False])
def test_of_a_lock_that_cannot_be_taken_nothing_is_left(tmp_path, monkeypatch, fails, directory):
    """A full disk, on which a name fits and no byte; a file system that has no locks."""
    reason = errno.ENOLCK if fails == "lockf" else errno.ENOSPC

    def failing(*arguments):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl if fails == "lockf" else os, fails, failing)
    for output in (tmp_path / "out", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with (
            pytest.raises(ValueError, match=rf"cannot be written: {os.strerror(reason)} \(.*\.lock\)$"),
            output_lock(output, directory=directory),
        ):
            pytest.fail("it cannot be locked")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("there", ["before", "meanwhile"])
def test_where_locks_fail_the_file_of_another_stays(tmp_path, monkeypatch, there):
    """Which has made it and is about to lock it: without the file a third one would lock another."""
    lock = tmp_path / ".s.json.lock"
    if there == "before":
        lock.touch()

    def failing(*arguments):
        if there == "meanwhile":
            lock.unlink()
            lock.touch()
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", failing)
    with (
        pytest.raises(ValueError, match=r"cannot be written: .*\.lock\)$"),
        output_lock(lock.parent / "s.json", directory=False),
    ):
        pytest.fail("it cannot be locked")
    assert lock.exists()


def no_space(path, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_file_is_locked_beside_it(tmp_path):
    with output_lock(tmp_path / "s.json", directory=False):
        assert os.listdir(tmp_path) == [".s.json.lock"]
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    check_absent([tmp_path / "a"], force=False)
    check_absent([tmp_path / "link"], force=True)
    with pytest.raises(ValueError, match=r"^output: .*/link already exists; --force replaces it$"):
        check_absent([tmp_path / "a", tmp_path / "link"], force=False)


OLD = {"a.txt": "old", "only-old": "old", "sub/x": "old", "sub/mine": "mine", "mine": "mine"}
NEW = {"a.txt": "new", "sub/x": "new", "sub/y": "new", "new/z": "new"}
AFTER = NEW | {"sub/mine": "mine", "mine": "mine"}


def contents(directory):
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def write(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def remove_old(output):
    for name, text in OLD.items():
        if text == "old":
            (output / name).unlink(missing_ok=True)


def test_a_replacement_takes_the_place_of_the_old_wherever_the_swap_is_cut(tmp_path, monkeypatch):
    """Every rename and removal is the last one in turn."""
    for last in range(100):
        output = tmp_path / str(last)
        write(output, OLD)
        begin_replacement(output).joinpath("given-up").touch()
        write(begin_replacement(output), NEW)
        assert {name: text for name, text in contents(output).items() if not name.startswith(REPLACEMENT)} == OLD
        assert workplace(output) == output / REPLACEMENT
        left = iter(range(last))
        with monkeypatch.context() as patch:
            for function in ("replace", "unlink", "rmdir"):
                patch.setattr(os, function, counted(getattr(os, function), left))
            try:
                publish(output, remove_old)
            except KeyboardInterrupt:
                cut = True
            else:
                cut = False
        if cut and (output / REPLACEMENT).is_dir():
            publish(output, remove_old)
        settle(output, remove_old)
        assert contents(output) == AFTER
        assert workplace(output) == output
        shutil.rmtree(output)
        if not cut:
            break
    assert last > 8


def counted(function, left):
    def call(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


def test_of_several_outputs_those_alone_go_on_that_a_killed_process_began(tmp_path):
    table, more, last = (tmp_path / name for name in ("a.csv", "a.more.csv", "a.csv.settings.toml"))
    progress = tmp_path / "a.csv.progress"
    begin_writing([table, last], progress, force=False)
    table.touch()  # and killed
    leftover, another = tmp_path / ".writing-01234567-a.csv", tmp_path / ".writing-01234567-a.more.csv"
    for path in (more, leftover, another):
        path.touch()
    check_several_absent([table, last], progress, force=False)
    for refused in (check_several_absent, begin_writing):
        with pytest.raises(ValueError, match=r"a\.more\.csv already exists"):
            refused([table, more, last], progress, force=False)
    begin_writing([table, last], progress, force=False)
    assert not leftover.exists()
    assert another.exists(), "it is not known whose that is"
    begin_writing([table, more, last], progress, force=True)
    last.touch()
    with pytest.raises(ValueError, match=r"a\.csv already exists"):
        check_several_absent([table, last], progress, force=False)


@pytest.mark.parametrize("said", [None, "", "0", "{}", '["..", 3, null]', "[" * 10**6])
def test_outputs_that_nothing_names_are_not_replaced(tmp_path, said):
    table, progress = tmp_path / "a.csv", tmp_path / "a.csv.progress"
    table.touch()
    if said is not None:
        progress.mkdir()
        (progress / "writing").write_text(said)
    with pytest.raises(ValueError, match=r"a\.csv already exists"):
        begin_writing([table, tmp_path / "last"], progress, force=False)
