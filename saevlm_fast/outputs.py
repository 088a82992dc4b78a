"""An output: one process works on it, nothing in it is replaced unasked, and the old stays until the new is whole.

    with output_lock(options.output, directory=True):
        ...

Every command that writes takes the lock first, before it checks or opens anything; taking it also shows whether the
output can be written at all.

A directory that is replaced (`--force`) keeps what it holds while the new is made in OUTPUT/.replacement, on the same
disk. `publish` swaps them: the new is renamed to .replacement-whole, the old is removed, the new is renamed to
.replacement-moving, and its files move up. A swap that is cut short at any point is finished by `settle`, which every
command that writes calls first. A file is replaced in one rename (files.atomic_write).
"""

import errno
import json
import os
import secrets
import shlex
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saevlm_fast.errors import printable, require, size_text
from saevlm_fast.files import TEMPORARY_PREFIX, remove_leftovers_of, write_json_atomic
from saevlm_fast.records import is_name
from saevlm_fast.urls import redacted_text

LOCK_FILE = ".lock"  # of an output that is a directory: it lies in it
REPLACEMENT = ".replacement"
_WHOLE, _MOVING = f"{REPLACEMENT}-whole", f"{REPLACEMENT}-moving"
_WRITING = "writing"
LOCK_SECONDS = 3.0  # a process that was just killed may need a moment to be gone
_POLL_SECONDS = 0.05
_LONGEST_COMMAND = 160

_held: dict[tuple[int, str], "_Held"] = {}  # by process: a fork inherits the dictionary, not the locks
_of_held = threading.Lock()
_thread = threading.local()


def _renew() -> None:
    """In a forked process, where the thread that holds it is not."""
    global _of_held
    _of_held = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def check_room(output: Path, needed: int, what: str) -> None:
    """ValueError: so many bytes are not free where it goes. what: takes them, with its verb."""
    lacking = lacking_room(output, needed)
    require(not lacking, f"output: {what} {size_text(needed)}, {lacking}")


def lacking_room(output: Path, needed: int) -> str:
    """That so many bytes are not free where it goes, as messages end; nothing if they are."""
    there = next(each for each in (output.absolute(), *output.absolute().parents) if each.exists())
    total, _, free = shutil.disk_usage(there)
    if needed <= free or total == 0:  # some file systems over a network know no size
        return ""
    return f"and {size_text(free)} are free on the disk of {output}"


def check_absent(paths: Iterable[str | os.PathLike[str]], force: bool) -> None:
    """ValueError: one of the paths exists (be it a link that leads nowhere), and force does not say to replace it."""
    for path in paths:
        there = os.path.lexists(path) and not force
        require(not there, f"output: {os.fspath(path)} already exists; --force replaces it")


def check_several_absent(outputs: Sequence[Path], progress: Path, force: bool) -> None:
    """check_absent of outputs in one folder, but for those that a killed process began to write and did not finish.

    progress: the folder of finished parts, in which that process has named them. The last of the outputs is written
    last: where it is, the others are whole.
    """
    begun = [] if os.path.lexists(outputs[-1]) else _begun(progress)
    check_absent([path for path in outputs if path.name not in begun], force)


def begin_writing(outputs: Sequence[Path], progress: Path, force: bool) -> None:
    """They are written one after the other from here on; the folder of finished parts goes last.

    Raises:
        ValueError: as check_several_absent, of what has come meanwhile.
    """
    check_several_absent(outputs, progress, force)
    for name in _begun(progress):
        remove_leftovers_of(progress.with_name(name))  # of what was killed at this
    progress.mkdir(parents=True, exist_ok=True)
    write_json_atomic(progress / _WRITING, [path.name for path in outputs])


def _begun(progress: Path) -> list[str]:
    """Names of outputs. An older version named none, and of those that it left nothing is known."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        named = json.loads((progress / _WRITING).read_bytes())
        return [name for name in named if is_name(name)]
    return []


# The lock -------------------------------------------------------------------------------------------------------------


class Lock:
    """An output that is this process's own, or that of several processes that share it."""

    def __init__(self, file: Path, descriptor: int | None, shared: bool):
        self.file, self.shared, self._descriptor = file, shared, descriptor

    def share(self) -> None:
        """From now on with others that ask for a share; nobody comes in between."""
        if self._descriptor is not None:
            _lock(self._descriptor, exclusive=False)
        self.shared = True

    def release(self) -> None:
        """The last one to leave removes the file."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # others hold a share of it; a directory that was made unwritable
            if self.shared:
                _lock(self._descriptor, exclusive=True)
            self.file.unlink(missing_ok=True)
        os.close(self._descriptor)


@contextmanager
def output_lock(
    output: str | os.PathLike[str],
    *,
    directory: bool,
    exclusive: bool = True,
    patience: float | None = None,
    on_wait: Callable[[], None] = lambda: None,
    parents: bool = False,
) -> Iterator[Lock]:
    """One thread of one process at a time works on an output, or several that share it. Gone with the process, however
    it ends.

    A record lock (POSIX lockf) of this process alone: unlike flock, worker processes that outlive a killed one do not
    inherit it. It does not keep threads of one process apart, which `_held` does. A call within another of the same
    thread has that one's lock, be it a share. The lock file says who holds it; it is removed in the end, and a
    directory that was made for it, if nothing else has come into it. Beside a file, what killed writers of it left is
    removed first. On Windows there is no lock between processes.

    Args:
        output: the file or directory that is written.
        directory: the lock lies in it, and it is made if it is not there; otherwise beside it, in a directory that is.
        exclusive: False shares it with others that share it.
        patience: seconds to wait for others; LOCK_SECONDS if None.
        on_wait: called once, before the waiting begins.
        parents: a lock beside the output makes the directory that it lies in, too.

    Raises:
        ValueError: the output cannot be written, or others still hold the lock; who and since when.
    """
    output = Path(output)
    folder = output if directory else output.parent
    file = folder / LOCK_FILE if directory else output.with_name(f".{output.name}.lock")
    waiting = _Waiting(time.monotonic() + (LOCK_SECONDS if patience is None else patience), on_wait)
    key, me, mine = (os.getpid(), os.path.realpath(file)), _this_thread(), list[_Held]()
    try:
        held = _claimed(key, me, mine, output, exclusive, waiting)
        if held.lock is None:
            makes = directory or parents
            held.made = [path for path in (folder, *folder.parents) if not path.exists()] if makes else []
            held.lock = _taken(output, file, makes, exclusive, waiting)
            if not directory and exclusive:
                remove_leftovers_of(output)
        yield held.lock
    finally:
        for held in mine:
            _let_go(key, me, held)


@dataclass
class _Waiting:
    """Until when an output is waited for; who waits says so once."""

    deadline: float
    on_wait: Callable[[], None]
    is_told: bool = False

    def once_more(self) -> bool:
        """After a moment; False once the time is up."""
        if time.monotonic() >= self.deadline:
            return False
        if not self.is_told:
            self.is_told = True
            self.on_wait()
        time.sleep(_POLL_SECONDS)
        return True


@dataclass(eq=False)
class _Held:
    """An output that threads of this process have, each once for every call: its lock, once it is taken, and the
    directories that were made for it."""

    threads: list[object] = field(default_factory=list)
    lock: Lock | None = None
    made: list[Path] = field(default_factory=list)


def _this_thread() -> object:
    """Which is no other thread's; numbers of threads are used again."""
    if not hasattr(_thread, "itself"):
        _thread.itself = object()
    return _thread.itself


def _claimed(
    key: tuple[int, str], me: object, mine: list[_Held], output: Path, exclusive: bool, waiting: _Waiting
) -> _Held:
    """This thread's claim, or its share of others', also put into `mine`. ValueError: another thread has the output."""
    while True:
        with _of_held:
            held = _held.get(key, _Held())
            shared = not exclusive and held.lock is not None and held.lock.shared
            if not held.threads or me in held.threads or shared:
                mine.append(held)
                held.threads.append(me)
                _held[key] = held
                return held
        if not waiting.once_more():
            raise ValueError(f"output: {output} is in use by another thread of this process")


def _let_go(key: tuple[int, str], me: object, held: _Held) -> None:
    """The last one releases the lock, before another thread may open its file: closing any ends a process's lock."""
    with _of_held:
        if me in held.threads:
            held.threads.remove(me)
        if held.threads:
            return
        try:
            if held.lock is not None:
                held.lock.release()
        finally:
            _held.pop(key, None)
            with suppress(OSError):  # what is not empty stays
                for path in held.made:
                    path.rmdir()


def _taken(output: Path, file: Path, makes: bool, exclusive: bool, waiting: _Waiting) -> Lock:
    while True:
        try:
            if makes:
                file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = None if os.name == "nt" else _try(file, exclusive)
            if descriptor is not None or os.name == "nt":
                return _probed(Lock(file, descriptor, not exclusive))
        except BlockingIOError as held:
            if not waiting.once_more():
                raise ValueError(f"output: {output} is in use: {held.strerror}") from None
        except OSError as error:
            where = "" if error.filename is None else f" ({error.filename})"
            raise ValueError(f"output: {output} cannot be written: {error.strerror}{where}") from error


def _try(file: Path, exclusive: bool) -> int | None:
    """The locked file; None if it was removed meanwhile. BlockingIOError: who holds it."""
    descriptor, is_new = _opened(file)
    try:
        with _removed_if_unusable(file, descriptor, is_new):
            _lock(descriptor, exclusive)
        if not _is_lock(descriptor):
            raise FileExistsError(errno.EEXIST, "it is in the way, and holds no lock of ours", str(file))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                if exclusive:
                    with _removed_if_unusable(file, descriptor, is_ours=True):
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
                return descriptor
    except BlockingIOError as error:
        holder = _holder(os.pread(descriptor, 1 << 12, 0))
        os.close(descriptor)
        raise BlockingIOError(error.errno, holder) from None
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _opened(file: Path) -> tuple[int, bool]:
    """A lock's file, and whether this call has made it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    with suppress(FileExistsError):
        return os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    return os.open(file, flags | os.O_CREAT, 0o666), False


@contextmanager
def _removed_if_unusable(file: Path, descriptor: int, is_ours: bool) -> Iterator[None]:
    """A lock file that holds nothing goes where it cannot be locked (by anyone: a file system without locks), or where
    who has locked it cannot write into it. OSError: why, with the file's name.

    is_ours: this call has made it, or locked it. Another's stays: who has just made it is about to lock it.
    """
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        status = os.fstat(descriptor)
        if is_ours and stat.S_ISREG(status.st_mode) and status.st_size == 0:
            with suppress(OSError):
                if os.path.samestat(status, os.lstat(file)):
                    file.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error


def _is_lock(descriptor: int) -> bool:
    """Whether a file holds what we write into a lock, or what a crash leaves of that: nothing, or zeros."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    data = os.pread(descriptor, 1 << 12, 0)
    return data.startswith(b'{"pid": ') or not data.strip(b"\0")


def _lock(descriptor: int, exclusive: bool) -> None:
    import fcntl

    fcntl.lockf(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def _this_process() -> dict[str, Any]:
    interpreter, *words = sys.orig_argv or ["python"]
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(interpreter).name, *map(redacted_text, words)])[:_LONGEST_COMMAND],
    }


def _holder(data: bytes) -> str:
    try:
        said = {name: str(value) for name, value in json.loads(data).items()}
        text = f"process {said['pid']} on {said['host']} writes to it since {said['since']} ({said['command']})"
    except (ValueError, KeyError, AttributeError, RecursionError):
        return "another process writes to it"
    return printable(text)


def _probed(lock: Lock) -> Lock:
    """OSError: no file can be made, written or removed beside the lock."""
    file = lock.file.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{lock.file.name}")
    try:
        remove_leftovers_of(lock.file)  # of one that was killed at this
        file.write_bytes(bytes(1))
        file.unlink(missing_ok=True)  # who shares the lock may take it for a leftover
    except BaseException:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
        raise
    return lock


# Replacing a directory ------------------------------------------------------------------------------------------------


def workplace(output: Path) -> Path:
    """Where the work on an output directory goes on: in its unfinished replacement, if there is one."""
    replacement = output / REPLACEMENT
    return replacement if replacement.is_dir() and not replacement.is_symlink() else output


def is_being_swapped(output: Path) -> bool:
    """Whether a swap was cut short."""
    return (output / _WHOLE).is_dir() or (output / _MOVING).is_dir()


def begin_replacement(output: Path) -> Path:
    """An empty directory for what will replace the contents of `output`; an unfinished replacement is given up."""
    replacement = output / REPLACEMENT
    if replacement.is_symlink():
        replacement.unlink()  # never what it leads to
    elif replacement.is_dir():
        shutil.rmtree(replacement)
    replacement.mkdir()
    return replacement


def publish(output: Path, remove_old: Callable[[Path], None]) -> None:
    """Puts a whole replacement in the place of the old.

    remove_old: removes from `output` what an earlier run of ours wrote and nothing else; called again after a crash.
    """
    os.replace(output / REPLACEMENT, output / _WHOLE)
    settle(output, remove_old)


def settle(output: Path, remove_old: Callable[[Path], None]) -> None:
    """Finishes a swap that was cut short."""
    if (output / _WHOLE).is_dir():
        remove_old(output)
        os.replace(output / _WHOLE, output / _MOVING)
    if (output / _MOVING).is_dir():
        _move_up(output / _MOVING, output)


def _move_up(source: Path, target: Path) -> None:
    """Files take the place of files, directories are joined."""
    for path in source.iterdir():
        there = target / path.name
        if path.is_dir() and there.is_symlink():
            there.unlink()  # a directory cannot take the place of a link
        if path.is_dir() and there.is_dir() and not there.is_symlink():
            _move_up(path, there)
        else:
            os.replace(path, there)
    source.rmdir()
