"""Files that are whole or absent: atomic writes, atomic directories, checksums; the cache.

Everything is written under a temporary name beside its destination, flushed to the disk and renamed, so a reader, a
crash, a full disk or Ctrl-C never meets half a file. What a `kill -9` leaves behind starts with TEMPORARY_PREFIX.
"""

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from saevlm_fast.errors import DiskFull, full_disk

TEMPORARY_PREFIX = ".writing-"
CACHE_VARIABLE = "SAEVLM_FAST_CACHE"
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # NumPy's, without errno
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors'
# Of a write, or of a checkpoint that was being removed.
_LEFTOVER = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}([0-9a-f]{{8}}-.+|step_\d{{8}})", re.DOTALL)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same directory; what the body writes there becomes `path` when it ends well.

    The file has the permissions of any new file there, as the umask says, whoever writes it (safetensors makes its own
    with 600). On any error, Ctrl-C included, the temporary file is removed and an existing `path` is left as it was. An
    OSError of the write itself (missing directory) is raised again with `path` in its message, that of a full disk as
    DiskFull.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        with open(temporary, "xb") as empty:
            mode = stat.S_IMODE(os.fstat(empty.fileno()).st_mode)
        yield temporary
        _fsync_file(temporary)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        named: BaseException = error
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            named = full_disk(OSError(*_reason(error), str(path)))  # while what it has written is there
        temporary.unlink(missing_ok=True)
        if named is error:
            raise
        raise named from error
    _fsync_directory(path.parent)


def _reason(error: OSError) -> tuple[int, str]:
    """errno and its words, also of libraries that leave the number in a sentence, or out."""
    said = error.strerror or str(error)
    if error.errno is not None:
        return error.errno, os.strerror(error.errno)
    if number := _OS_ERROR.search(said):
        return int(number[1]), os.strerror(int(number[1]))
    if _SHORT_WRITE.fullmatch(said):
        said = f"only a part was written, is the disk full? ({said})"
    return errno.EIO, said


@contextmanager
def atomic_directory(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Yields a temporary empty directory beside `path`; it is published as `path` when the body ends well.

    A non-empty `path` is refused with FileExistsError before anything is written, unless `replace`: then the old
    directory is moved aside at the last moment and deleted after the new one stands (the two renames are not one
    atomic act: a crash exactly between them leaves the old directory under a temporary name).
    """
    path = Path(path)
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not replace:
        raise FileExistsError(errno.EEXIST, "already exists and is not empty", str(path))
    temporary, old = _temporary_sibling(path), _temporary_sibling(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync_directory(file) if file.is_dir() else _fsync_file(file)
        _fsync_directory(temporary)
        if occupied:
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        if isinstance(error, DiskFull):
            error.filename = error.filename.replace(str(temporary), str(path))
        raise
    _fsync_directory(path.parent)
    remove(old)


def save_safetensors_atomic(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """safetensors' save_file, atomically. A failed write is an OSError (safetensors raises its own kind)."""
    with atomic_write(path) as temporary:
        try:
            save_file({name: _plain(t) for name, t in tensors.items()}, temporary, dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, and without the lazy negative or conjugate bit, which whoever reads the memory would not see."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Writes strict JSON (no NaN: ValueError), indented, ending in a newline."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def human_bytes(n_bytes: int) -> str:
    """1234567 -> 1.2 MB; decimal units."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while n_bytes := file.readinto(buffer):
            digest.update(buffer[:n_bytes])
    return digest.hexdigest()


def weights_sha256(model: nn.Module, as_float32: bool = False) -> str:
    """Of all weights, with their names, dtypes and shapes; takes a second per gigabyte.

    as_float32: floating-point weights as `load_tower` would hold them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.float() if as_float32 and tensor.is_floating_point() else tensor
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_directory() -> Path:
    """SAEVLM_FAST_CACHE, or the user's cache directory for this program.

    Raises:
        ValueError: it cannot be made, or is no directory.
    """
    path = Path(os.environ.get(CACHE_VARIABLE) or _users_cache())
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise ValueError(f"{CACHE_VARIABLE}: {path} cannot be made: {error}") from error
    return path


def _users_cache() -> Path:
    try:
        from platformdirs import user_cache_path
    except ModuleNotFoundError as error:
        what = (
            f"{CACHE_VARIABLE}: not set, and the package platformdirs, which knows where caches lie, is not installed"
        )
        raise ValueError(what) from error
    return user_cache_path("saevlm-fast", appauthor=False)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it is there. Of a link the link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Deletes the temporary files that killed writers left in a directory, and no others whose names only begin alike.

    Call it only while nobody else writes.
    """
    for file in Path(directory).glob(f"{TEMPORARY_PREFIX}*"):
        if _LEFTOVER.fullmatch(file.name) is not None:
            remove(file)


def remove_leftovers_of(path: str | os.PathLike[str]) -> None:
    """Deletes what killed writers of this one file left beside it; the same warning."""
    for file in Path(path).parent.glob(f"{TEMPORARY_PREFIX}{'[0-9a-f]' * 8}-{glob.escape(Path(path).name)}"):
        remove(file)


def _temporary_sibling(path: Path) -> Path:
    # The destination's name comes last: some writers (np.save) choose the format by the suffix, or append theirs.
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}")


def _fsync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _fsync_directory(path: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
