"""A store on disk, of activations or of sparse codes: its files, its index, its checks. data/writing.py writes it.

A store is a directory:

    index.json               {"format", "version", "complete", "shape": [N, width], "dtype", "source": {...}, "shards",
                             "sha256": the seal (records.py), which older indices lack}
                             one record a shard: {"number", "rows", "file", "sha256", "items", "items_sha256"}
    shard-00000.safetensors  of activations (width is d_in): "activations" [rows, d_in]
                             of codes (width is d_sae), CSR: "acts" [M], "latents" [M], uint16 up to d_sae 65536, then
                             int32, and "row_offsets" [rows + 1], int32 unless M needs int64
    items-00000.parquet      image (string), token (int32), label (string or null) of every row of the shard; of rows of
                             a language model also modality (string), token_id (int32), text (string)

Activations and acts are float16, bfloat16 or float32. Row i of the store is row i of its shards laid end to end in the
order of their numbers. Every file is written atomically, and the index after every shard, so a writer killed at any
moment leaves a store that can be resumed, and that readers refuse until it is ("complete": false). Numbers belong to
the work, not to the process: several ranks may each write some of the numbers, keep their records in
index.part-RANK.json, and `merge_parts` joins them. Codes are written and checked in data/codes.py.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast.data.digests import check_digest
from saevlm_fast.data.matrix import SAFETENSORS_DTYPES, dtype_names, safetensors_header
from saevlm_fast.data.parquet import read_small_table
from saevlm_fast.errors import ActivationError, first_line, printable, require
from saevlm_fast.files import atomic_write, sha256_file
from saevlm_fast.records import (
    DIGEST,
    FILE_NAME,
    FLAG,
    RECORD,
    TEXT,
    Each,
    Fields,
    read_record,
    sealed,
    whole,
)
from saevlm_fast.settings import path_of
from saevlm_fast.urls import is_url

ACTIVATIONS, CODES, VERSION = "saevlm-fast activations", "saevlm-fast codes", 1
WIDTH_NAMES = {ACTIVATIONS: "d_in", CODES: "d_sae"}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
STORE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ITEM_SCHEMA = pa.schema([("image", pa.string()), ("token", pa.int32()), ("label", pa.string())])
# What rows of a language model have beside that: text, image or template; the token's number, and what it says.
TOKEN_FIELDS = [("modality", pa.string()), ("token_id", pa.int32()), ("text", pa.string())]
TOKEN_SCHEMA = pa.schema([*ITEM_SCHEMA, *map(pa.field, *zip(*TOKEN_FIELDS))])

_TENSOR_DTYPES = SAFETENSORS_DTYPES | {"U16": torch.uint16, "I32": torch.int32, "I64": torch.int64}
_SHARD = Fields(
    {
        "number": whole(),
        "rows": whole(),
        "file": FILE_NAME,
        "sha256": DIGEST,
        "items": FILE_NAME,
        "items_sha256": DIGEST,
    },
    others=False,
)
_INDEX = Fields(
    {
        "format": TEXT,
        "version": whole(),
        "complete": FLAG,
        "shape": Each(whole()),
        "dtype": TEXT,
        "source": RECORD,
        "shards": Each(_SHARD),
    },
    others=False,
)


@dataclass(frozen=True)
class Shard:
    """One record of the index: the shard's number in the order of rows, its rows, its two files and their SHA-256."""

    number: int
    rows: int
    file: str
    sha256: str
    items: str
    items_sha256: str


@dataclass(frozen=True)
class StoreIndex:
    """What index.json says. `source` is free-form: model, layer, point, tokens ...; width is d_in, of codes d_sae."""

    format: str
    width: int
    dtype: torch.dtype
    source: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        name, dtypes = WIDTH_NAMES[self.format], STORE_DTYPES.values()
        require(1 <= self.width < 1 << 31, f"{name} is {self.width}; 1 to 2^31 - 1 is needed", ActivationError)
        require(self.dtype in dtypes, f"dtype is {self.dtype}; a store holds {dtype_names(dtypes)}", ActivationError)

    @property
    def n_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of codes on disk: the smallest that holds every latent."""
        return torch.uint16 if self.width <= 1 << 16 else torch.int32

    def layout(self, rows: int, n_entries: int) -> dict[str, tuple[tuple[torch.dtype, ...], list[int]]]:
        """What a shard's file holds: name -> (dtypes allowed, shape); n_entries is M of codes."""
        if self.format == ACTIVATIONS:
            return {"activations": ((self.dtype,), [rows, self.width])}
        return {
            "acts": ((self.dtype,), [n_entries]),
            "latents": ((self.latents_dtype,), [n_entries]),
            "row_offsets": ((torch.int32, torch.int64), [rows + 1]),
        }


def read_index(path: str | os.PathLike[str]) -> StoreIndex:
    """The index of the store at `path`, complete or not.

    Raises:
        ActivationError: there is none, or it is damaged.
    """
    folder = Path(path)
    if not (folder / "index.json").is_file():
        raise ActivationError(f"{path}: no index.json in it: not a store of activations or codes{_hint(folder)}")
    return read_index_file(folder / "index.json")


def _hint(folder: Path) -> str:
    """What may be meant by a folder that is no store itself: what is in it, or images."""
    try:
        inside = sorted(folder.iterdir())
        deeper = [each for sub in inside if sub.is_dir() for each in islice(sub.iterdir(), 20)]
    except OSError:
        return ""
    images = any(each.suffix.lower() in _IMAGES for each in (*inside, *deeper))
    return meant_in(inside) or ("; images are in it, of which `harvest` makes a store" if images else "")


def meant_in(inside: Sequence[Path]) -> str:
    """What may be meant by a folder that `harvest` or `synthetic` has left, or that has matrices in it."""
    matrices = (".npy", ".pt", ".safetensors")
    meant = [each for each in inside if (each / "index.json").is_file() or each.suffix in matrices]
    if not meant:
        return ""
    listed = ", ".join(printable(each.name) for each in meant[:4])
    several = "; sf.ActivationWriter makes one store of several matrices" if len(meant) > 2 else ""
    return f"; name what is meant of {listed} in it{several}"


def read_index_file(file: Path) -> StoreIndex:
    """ActivationError: an index that is damaged, or of another format or version."""
    raw = read_record(file, _INDEX, ActivationError)
    try:
        format, version, known = raw["format"], raw["version"], " or ".join(map(repr, WIDTH_NAMES))
        readable = format in WIDTH_NAMES and version == VERSION
        require(readable, f"format {format!r} version {version!r}; needed {known} version {VERSION}")
        require(len(raw["shape"]) == 2, f"shape is {raw['shape']}; [rows, {WIDTH_NAMES[format]}] is needed")
        dtypes = ", ".join(STORE_DTYPES)
        require(raw["dtype"] in STORE_DTYPES, f"dtype is {raw['dtype']!r}; one of {dtypes} is needed")
        shards = tuple(Shard(**record) for record in raw["shards"])
        n_rows, width = raw["shape"]
        index = StoreIndex(format, width, STORE_DTYPES[raw["dtype"]], raw["source"], shards, raw["complete"])
        require(index.n_rows == n_rows, f"shape says {n_rows} rows, the shards {index.n_rows}")
        require(n_rows < 1 << 62, f"shape says {n_rows} rows; fewer than 2^62 are needed")
        numbers = [shard.number for shard in shards]
        require(numbers == sorted(set(numbers)), "shard numbers do not ascend")
    except ValueError as error:
        raise ActivationError(f"{file}: damaged index: {first_line(error)}") from None
    return index


def write_index_file(file: Path, index: StoreIndex) -> None:
    value = {
        "format": index.format,
        "version": VERSION,
        "complete": index.complete,
        "shape": [index.n_rows, index.width],
        "dtype": str(index.dtype).removeprefix("torch."),
        "source": index.source,
    }
    # A line for each shard: the file is written after every one of maybe ten thousand, and json's indentation is slow.
    lines = ",\n".join(json.dumps(vars(shard)) for shard in index.shards)
    head = json.dumps(value, indent=2, allow_nan=False).removesuffix("\n}")
    text = sealed(f'{head},\n  "shards": [\n{lines}\n  ]\n}}')
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_format(path: str | os.PathLike[str], index: StoreIndex, format: str) -> None:
    """ActivationError: a store of the other format, activations instead of codes or codes instead of activations."""
    held, needed = index.format.split()[1], format.split()[1]
    require(index.format == format, f"{path}: a store of {held}; needed is one of {needed}", ActivationError)


def open_index(path: Path, format: str) -> StoreIndex:
    """The index of a store of that format that can be read: complete, with at least 1 row. Else ActivationError."""
    index = read_index(path)
    check_usable(path, index, format)
    return index


def check_usable(path: Path, index: StoreIndex, format: str) -> None:
    """ActivationError: a store that cannot be read: see open_index."""
    check_format(path, index, format)
    require(
        index.complete,
        f"{path}: incomplete store, its writing was interrupted: {index.n_rows} rows in {len(index.shards)} shards are "
        "there; resume it first",
        ActivationError,
    )
    require(index.n_rows > 0, f"{path}: shape is [0, {index.width}]; at least 1 row is needed", ActivationError)


def joined_index(path: str | os.PathLike[str]) -> StoreIndex:
    """The index together with what ranks have written and nobody has merged yet. Nothing on the disk changes."""
    index = read_index(path)
    shards = {shard.number: shard for part in part_files(Path(path)) for shard in read_index_file(part).shards}
    shards |= {shard.number: shard for shard in index.shards}
    return replace(index, shards=tuple(shards[number] for number in sorted(shards)))


def map_shard(path: Path, shard: Shard, index: StoreIndex) -> dict[str, Tensor]:
    """The shard's tensors by name, after the cheap checks: files, shapes and dtypes, not what is in them.

    Unlike np.memmap, from_file keeps no file open: thousands fit.

    Raises:
        ActivationError: a file that is missing, or is not what the index says.
    """
    for file in (path / shard.file, path / shard.items):
        require(file.is_file(), f"{file}: missing, but the store's index lists it", ActivationError)
    return map_shard_file(path / shard.file, shard, index)


def map_shard_file(file: Path, shard: Shard, index: StoreIndex) -> dict[str, Tensor]:
    """The same of its file, wherever that is."""
    entries, data_start = safetensors_header(file)
    _check_layout(file, entries, shard, index)
    raw = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    return {name: _tensor_at(file, name, raw[data_start:], entry) for name, entry in entries.items()}


def _check_layout(file: Path, entries: Mapping[str, Mapping[str, Any]], shard: Shard, index: StoreIndex) -> None:
    acts_shape = entries.get("acts", {"shape": []})["shape"]
    expected = index.layout(shard.rows, math.prod(acts_shape))
    found = {name: (_TENSOR_DTYPES.get(entry["dtype"]), entry["shape"]) for name, entry in entries.items()}
    fits = set(found) == set(expected) and all(
        found[name][0] in dtypes and found[name][1] == shape for name, (dtypes, shape) in expected.items()
    )
    if not fits:
        holds = ", ".join(f"{name} {entry['dtype']} {entry['shape']}" for name, entry in list(entries.items())[:4])
        needed = ", ".join(
            f"{name} {dtype_names(dtypes, ' or ')} {shape}" for name, (dtypes, shape) in expected.items()
        )
        raise ActivationError(f"{file}: holds {holds or 'nothing'}; the store's index says {needed}")


def _tensor_at(file: Path, name: str, data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype, (begin, end) = _TENSOR_DTYPES[entry["dtype"]], entry["data_offsets"]
    offset = data.storage_offset() + begin
    fits = end - begin == math.prod(entry["shape"]) * dtype.itemsize and offset % dtype.itemsize == 0
    require(fits, f"{file}: damaged safetensors header: {name} lies at {begin} to {end}", ActivationError)
    return data[begin:end].view(dtype).view(entry["shape"])


def read_items(file: Path, rows: int, digest: str | None = None, schema: pa.Schema = ITEM_SCHEMA) -> pa.Table:
    """The item table of a shard of so many rows; with `digest`, its SHA-256, once it is known to be as written.

    schema: the columns wanted, TOKEN_SCHEMA for all; what a file lacks is null.

    Raises:
        ActivationError: damaged, altered, of other rows, or more than it can be.
    """
    if digest is not None:
        check_digest(file, sha256_file(file), digest)
    try:
        table = read_small_table(file, schema, rows)
        table.validate(full=True)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise ActivationError(f"{file}: damaged item table: {first_line(error)}") from error
    except ValueError as error:
        raise ActivationError(f"{file}: {error}") from error
    return table


def verify(path: str | os.PathLike[str], on_bytes: Callable[[int], None] = lambda done: None) -> StoreIndex:
    """Reads the whole store (complete or not) and compares it with its index: sizes, shapes, dtypes, every SHA-256.

    on_bytes: called after every shard with the bytes read so far.

    Returns:
        The index of a sound store (joined_index).

    Raises:
        ActivationError: naming each missing, truncated or altered file, up to five of them.
    """
    path = path_of("path", path)
    require(not is_url(path), f"path: {path} is elsewhere; a path on this machine is needed", ActivationError)
    index = joined_index(path)
    damage, done = [], 0
    for shard in index.shards:
        problem = _shard_damage(path, shard, index)
        if problem:
            damage.append(problem)
        else:
            done += (path / shard.file).stat().st_size + (path / shard.items).stat().st_size
        on_bytes(done)
    if damage:
        more = f"; and {len(damage) - 5} more" if len(damage) > 5 else ""
        raise ActivationError("; ".join(damage[:5]) + more)
    return index


def _shard_damage(path: Path, shard: Shard, index: StoreIndex) -> str | None:
    try:
        map_shard(path, shard, index)
        check_digest(path / shard.file, sha256_file(path / shard.file), shard.sha256)
        read_items(path / shard.items, shard.rows, shard.items_sha256)
    except ActivationError as error:
        return str(error)
    return None


def part_name(part: int | str) -> str:
    """The file in which rank `part` keeps its records until merge_parts joins them."""
    return f"index.part-{part}.json"


def part_files(path: Path) -> list[Path]:
    """Those of all ranks that nobody has joined yet."""
    return sorted(path.glob(part_name("*")))
