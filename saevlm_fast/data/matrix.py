"""Matrices [N, d_in]: one in a .npy, .safetensors or .pt file, mapped read-only and never unpickled, or one in memory.

Accepted dtypes are float16, bfloat16, float32 and float64, little-endian. Of several tensors in a .safetensors or .pt
file the only 2-D one is taken, or the one named by FILE::NAME. A map is read-only and shared, so a file may be larger
than memory (Linux refuses private writable maps of that size, and those are what torch.load and safetensors make).
"""

import ctypes
import math
import mmap
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.errors import ActivationError, check_dense, first_line, require
from saevlm_fast.records import TEXT, Each, Fields, check_record, parse_json, whole

MATRIX_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ACCEPTED = "float16, bfloat16, float32 or float64"
SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_TENSOR = Fields({"dtype": TEXT, "shape": Each(whole()), "data_offsets": Each(whole())})
NUMPY_DTYPES = {torch.float16: "<f2", torch.bfloat16: "<i2", torch.float32: "<f4", torch.float64: "<f8"}


def check_finite(batch_BD: Tensor, row_numbers: Sequence[int] | Tensor, path: str | os.PathLike[str]) -> None:
    """Raises ActivationError naming the first row (row_numbers[i] for row i of the batch) that holds NaN or infinity.

    One pass when all is well: a sum is finite only if every term is (one that overflows only costs the second look).
    Half precision, of which torch makes a float32 copy first, has its extremes looked at instead.
    """
    if batch_BD.dtype in (torch.float16, torch.bfloat16):
        if not batch_BD.numel():
            return
        low, high = batch_BD.aminmax()
        if bool(low.isfinite() & high.isfinite()):
            return
    elif math.isfinite(batch_BD.sum(dtype=torch.float32)):
        return
    bad_BD = ~torch.isfinite(batch_BD)
    if not bad_BD.any():
        return
    row = int(bad_BD.any(dim=1).nonzero()[0])
    column = int(bad_BD[row].nonzero()[0])
    value = float(batch_BD[row, column])
    read_as = "" if math.isnan(value) else f" in {dtype_names([batch_BD.dtype])}"  # in a wider file it may be a number
    where = f"row {int(row_numbers[row])}, column {column}"
    raise ActivationError(f"{path}: {where} is {value}{read_as}; it must be finite")


def map_matrix(path: Path, key: str = "") -> Tensor:
    """The matrix [N, d_in] in a file, mapped in its own dtype (read-only: writing to it would crash).

    key names a tensor in the file; "" takes the only 2-D one. Raises ActivationError for every unusable file.
    """
    if not path.is_file():
        raise ActivationError(f"{path}: no such file or directory")
    if path.stat().st_size == 0:
        raise ActivationError(f"{path}: the file is empty")
    if path.suffix not in SUFFIXES:
        known = f"a matrix file is one of {', '.join(SUFFIXES)}, a store a directory"
        raise ActivationError(f"{path}: unknown suffix {path.suffix!r}; {known}")
    return _MAPPERS[path.suffix](path, key)


def host_matrix(x: Tensor | np.ndarray, name: str = "x") -> Tensor:
    """x as a tensor [N, d_in] on the host, in its own dtype, not copied where it is there already. name: for messages.

    Raises:
        ActivationError: not a tensor or an array, another dtype than MATRIX_DTYPES, not 2-D, no rows or no columns.
    """
    if isinstance(x, np.ma.MaskedArray):
        lost = "a masked array, whose mask would be lost; drop its rows first, as x[~x.mask.any(1)]"
        raise ActivationError(f"{name}: {lost}")
    if isinstance(x, np.ndarray):
        _check_npy_dtype(x, name)
        # torch knows no negative strides.
        x_ND = _read_only_tensor(x if all(stride >= 0 for stride in x.strides) else x.copy())
    elif isinstance(x, Tensor):
        check_dense(name, x, ActivationError)
        require(not x.is_meta, f"{name}: on the meta device, which holds no numbers", ActivationError)
        met = dtype_names([x.dtype])
        require(x.dtype in MATRIX_DTYPES, f"{name}: dtype {met}; accepted: {_ACCEPTED}", ActivationError)
        x_ND = x.detach().cpu().resolve_neg()  # a lazy negative bit is nothing that is seen in memory
    else:
        raise ActivationError(f"{name}: {type(x).__name__}; a torch tensor or a NumPy array [rows, d_in] is needed")
    return _checked_matrix(x_ND, name)


def _map_npy(path: Path, key: str) -> Tensor:
    if key:
        raise ActivationError(f"{path}::{key}: a .npy file has no named tensors")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses object arrays: nothing is ever unpickled
    except Exception as error:  # a damaged header raises many kinds of them
        raise ActivationError(f"{path}: not a readable .npy matrix: {first_line(error)}") from error
    _check_npy_dtype(array, path)
    return _checked_matrix(_read_only_tensor(array), path)


def _check_npy_dtype(array: np.ndarray, where: str | Path) -> None:
    accepted = f"accepted: {_ACCEPTED}, little-endian; NumPy has no bfloat16: save that as .safetensors or .pt"
    fits = array.dtype.str in ("<f2", "<f4", "<f8")
    require(fits, f"{where}: dtype is {array.dtype}; {accepted}", ActivationError)


def _map_safetensors(path: Path, key: str) -> Tensor:
    entries, data_start = safetensors_header(path)
    name = _choose(path, key, {name: entry["shape"] for name, entry in entries.items()})
    dtype, begin = entries[name]["dtype"], entries[name]["data_offsets"][0]
    if dtype not in SAFETENSORS_DTYPES:
        raise ActivationError(f"{path}: tensor {name!r} has dtype {dtype}; accepted: {_ACCEPTED}")
    shape = tuple(entries[name]["shape"])
    _check_not_empty(shape, path)
    return _checked_matrix(_map_read_only(path, data_start + begin, SAFETENSORS_DTYPES[dtype], shape), path)


def _map_pt(path: Path, key: str) -> Tensor:
    """Maps the tensor's bytes read-only where the archive holds them.

    torch.load(mmap=True) maps the whole file privately and writable, which Linux refuses for a file larger than memory.
    Loaded to the meta device the file gives shapes, strides and the offsets of the storages in it instead.
    Fake tensors have the same; but nnsight, which dictionary_learning imports, breaks them for the whole process.
    """
    if not zipfile.is_zipfile(path):
        raise ActivationError(f"{path}: not a torch.save archive, or truncated (bare pickles are refused)")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its records are compressed")
        value = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of them
        reason = "it is damaged or holds more than plain tensors" if "eights only" in str(error) else first_line(error)
        raise ActivationError(f"{path}: refused, {reason}") from error
    named = value if isinstance(value, dict) else {"": value}
    tensors = {str(name): t for name, t in named.items() if isinstance(t, Tensor)}
    meta = tensors[_choose(path, key, {name: t.shape for name, t in tensors.items()})]
    if meta.dtype not in MATRIX_DTYPES or meta.layout != torch.strided:
        met = f"dtype {dtype_names([meta.dtype])}, layout {meta.layout}"
        raise ActivationError(f"{path}: {met}; accepted: dense {_ACCEPTED}")
    bits = meta.is_neg() or meta.is_conj()  # torch.save keeps them, and the bytes in the file know nothing of them
    require(
        not bits,
        f"{path}: the tensor is a lazy negative or conjugate of what is stored; save x.resolve_neg().resolve_conj()",
        ActivationError,
    )
    _check_not_empty(meta.shape, path)
    storage = meta.untyped_storage()
    offset = storage._checkpoint_offset
    if offset is None:
        raise ActivationError(f"{path}: torch.load found no place in the archive for the tensor")
    try:
        n_values = storage.nbytes() // meta.dtype.itemsize
        flat = _map_read_only(path, offset, meta.dtype, (n_values,))
        matrix_ND = flat.as_strided(meta.shape, meta.stride(), meta.storage_offset())
    except (RuntimeError, ValueError, TypeError) as error:
        raise ActivationError(f"{path}: damaged archive: {first_line(error)}") from error
    return _checked_matrix(matrix_ND, path)


_MAPPERS: dict[str, Callable[[Path, str], Tensor]] = {
    ".npy": _map_npy,
    ".safetensors": _map_safetensors,
    ".pt": _map_pt,
}
SUFFIXES = tuple(_MAPPERS)


def _choose(path: Path, key: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """The tensor named by FILE::key, else the file's only 2-D tensor."""
    listing = ", ".join(f"{name!r} {list(shape)}" for name, shape in list(shapes.items())[:8]) or "none"
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if key and key not in shapes:
        raise ActivationError(f"{path}::{key}: no such tensor; there are: {listing}")
    if not key and not matrices:
        there = f"there are: {listing}" if shapes else "a matrix, or a dict of tensors by name, is read"
        raise ActivationError(f"{path}: no 2-D tensor in it; {there}")
    if not key and len(matrices) != 1:
        raise ActivationError(f"{path}: {len(matrices)} 2-D tensors; name one as FILE::NAME; there are: {listing}")
    return key or matrices[0]


def _checked_matrix(matrix: Tensor, where: str | Path) -> Tensor:
    shape = list(matrix.shape)
    require(len(shape) == 2, f"{where}: shape is {shape}; a matrix [rows, d_in] is needed", ActivationError)
    _check_not_empty(shape, where)
    return matrix


def _check_not_empty(shape: Sequence[int], where: str | Path) -> None:
    require(0 not in shape, f"{where}: shape is {list(shape)}; at least 1 row and 1 column are needed", ActivationError)


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """(name -> {dtype, shape, data_offsets}, where the data starts), after comparing it with the size of the file.

    Raises:
        ActivationError: a truncated file, or one that is no safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, 100_000_000):
            raise ActivationError(
                f"{path}: {size} bytes, but its first 8 announce a header of {header_bytes}: "
                "truncated, or not a safetensors file"
            )
        header = file.read(header_bytes)
    try:
        entries = _header_entries(header)
        promised = 8 + header_bytes + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except ValueError as error:
        raise ActivationError(f"{path}: damaged safetensors header: {first_line(error)}") from None
    if size != promised:
        raise ActivationError(f"{path}: {size} bytes, but its header promises {promised}: truncated or altered")
    return entries, 8 + header_bytes


def _header_entries(header: bytes) -> dict[str, dict[str, Any]]:
    entries = parse_json(header, "header")
    require(isinstance(entries, dict), "it is no object")
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        check_record(entry, _TENSOR, f"tensor {name!r}", ValueError)
        begin, end = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (1, 0)
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        fits = begin <= end and (dtype is None or end - begin == math.prod(entry["shape"]) * dtype.itemsize)
        require(fits, f"shape {entry['shape']} and bytes {entry['data_offsets']} of tensor {name!r} disagree")
    return entries


def _map_read_only(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    array = np.memmap(path, dtype=NUMPY_DTYPES[dtype], mode="r", offset=offset, shape=shape)
    return _read_only_tensor(array).view(dtype)


def _read_only_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # torch warns that writing would be undefined; nobody here writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def read_randomly(mapped_ND: Tensor) -> None:
    """No read-ahead around a page fault: it is up to megabytes a row, by the disk's settings. A hint, for Linux."""
    if sys.platform == "linux":
        _advise(mapped_ND, mmap.MADV_RANDOM)


def will_need(mapped_ND: Tensor) -> None:
    """Have these rows read from the disk in the background, in large pieces. A hint, for Linux."""
    if sys.platform == "linux":
        _advise(mapped_ND, mmap.MADV_WILLNEED)


def _advise(mapped_ND: Tensor, advice: int) -> None:
    if not mapped_ND.is_contiguous():  # a Fortran-ordered matrix
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    into_page = mapped_ND.data_ptr() % mmap.PAGESIZE
    madvise(mapped_ND.data_ptr() - into_page, mapped_ND.nbytes + into_page, advice)


def dtype_names(dtypes: Iterable[torch.dtype], separator: str = ", ") -> str:
    """float16, bfloat16 ..., as messages have them."""
    return separator.join(str(dtype).removeprefix("torch.") for dtype in dtypes)
