"""Sparse codes: written to a store, read from one, averaged over the tokens of an image.

A store of codes is a store (data/store.py) whose shards hold rows in CSR form: row b owns entries
row_offsets[b]:row_offsets[b + 1] of acts (finite, above 0) and latents (ascending within a row, each at most once).
ImageNet's 1.28 M CLS tokens with k = 20 take 20 * (2 + 2) + 4 bytes a row in float16 with d_sae <= 65536: 108 MB, and
their item ids about a tenth of that. Shape suffixes: N rows or images, M entries, S d_sae.
"""

import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.data.rows import StoredRows, check_chunk, open_index
from saevlm_fast.data.store import CODES, StoreIndex, map_shard
from saevlm_fast.data.writing import StoreWriter
from saevlm_fast.errors import ActivationError
from saevlm_fast.kernels.grouping import entry_rows
from saevlm_fast.sae import SparseCodes

__all__ = ["CodeRows", "Codes", "CodesWriter", "codes_of_rows", "join_codes", "mean_pool_codes", "open_codes"]


class CodeRows(NamedTuple):
    """Codes of N rows in CSR form, as the kernels take them.

    acts: floats [M]. latents: int64 [M]. row_offsets: int64 [N + 1]; entries from row_offsets[N] on are padding.
    """

    acts: Tensor
    latents: Tensor
    row_offsets: Tensor

    @property
    def n_rows(self) -> int:
        return len(self.row_offsets) - 1


def codes_of_rows(codes: SparseCodes | tuple[Tensor, Tensor, Tensor | None]) -> CodeRows:
    """Codes of an SAE, or a triple (acts, latents, row_offsets or None for [B, K]), leading dimensions flattened.

    Nothing is copied and no device is waited for. ValueError: shapes that are no sparse codes.
    """
    acts, latents, row_offsets = codes.flat() if isinstance(codes, SparseCodes) else codes
    n_dims = 2 if row_offsets is None else 1
    if acts.shape != latents.shape or acts.ndim != n_dims or not acts.is_floating_point():
        raise ValueError(
            f"codes: acts {acts.dtype} {list(acts.shape)} and latents {list(latents.shape)} are not sparse codes"
        )
    if row_offsets is None:
        n_rows, k = latents.shape
        row_offsets = torch.arange(n_rows + 1, device=latents.device) * k
    if row_offsets.ndim != 1 or len(row_offsets) == 0:
        raise ValueError(f"codes: row_offsets {list(row_offsets.shape)} is not [N + 1]")
    return CodeRows(acts.flatten(), latents.flatten(), row_offsets)


def join_codes(pieces: Sequence[CodeRows]) -> CodeRows:
    """The rows of all pieces in order, on the device of the first; no pieces are no rows."""
    if not pieces:
        return CodeRows(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    ends = [int(piece.row_offsets[-1]) for piece in pieces]
    acts_M = torch.cat([piece.acts[:end] for piece, end in zip(pieces, ends)])
    latents_M = torch.cat([piece.latents[:end] for piece, end in zip(pieces, ends)])
    starts = torch.tensor([0, *ends]).cumsum(0).tolist()
    offsets = [piece.row_offsets[:-1] + start for piece, start in zip(pieces, starts)]
    return CodeRows(acts_M, latents_M, torch.cat([*offsets, pieces[-1].row_offsets[-1:] + starts[-2]]))


# Averages ------------------------------------------------------------------------------------------------------------


def mean_pool_codes(codes: CodeRows, image_of_row: Tensor, n_images: int) -> CodeRows:
    """The mean over every image's tokens of the dense codes, as codes: recipe.md section 2, what picks the top images.

    Args:
        codes: one row a token, on any device.
        image_of_row: int64 [N tokens], the image of every row, in any order, each image any number of times.
        n_images: rows of the result; an image without tokens has none that fire.

    Sums are float64, rounded once to the dtype of acts; a latent that fires on a token stays above 0.
    """
    _check_images(image_of_row, codes.n_rows, n_images)  # where it is: from the host it costs no wait for a device
    image_of_row = image_of_row.to(codes.latents.device, non_blocking=True)
    rows_M = entry_rows(codes.latents, codes.row_offsets)
    inside_M = (rows_M < codes.n_rows) & (codes.acts != 0)
    images_M, latents_M = image_of_row[rows_M[inside_M]], codes.latents[inside_M].long()
    if len(latents_M) == 0:
        return CodeRows(codes.acts[:0], latents_M, torch.zeros(n_images + 1, dtype=torch.int64, device=rows_M.device))
    width = int(latents_M.max()) + 1
    keys_M, order_M = (images_M * width + latents_M).sort(stable=True)
    keys_P, counts_P = torch.unique_consecutive(keys_M, return_counts=True)  # P pairs of image and latent
    sums_P = torch.segment_reduce(codes.acts[inside_M][order_M].double(), "sum", lengths=counts_P)
    images_P = keys_P // width
    means_P = sums_P / torch.bincount(image_of_row, minlength=n_images)[images_P]
    row_offsets = pad(torch.bincount(images_P, minlength=n_images).cumsum(0), (1, 0))
    return CodeRows(_rounded(means_P, codes.acts.dtype), keys_P % width, row_offsets)


def _check_images(image_of_row: Tensor, n_rows: int, n_images: int) -> None:
    if image_of_row.shape != (n_rows,) or image_of_row.dtype != torch.int64:
        raise ValueError(
            f"image_of_row: {image_of_row.dtype} {list(image_of_row.shape)}; int64 [{n_rows}] is needed, one a row"
        )
    if n_rows and not 0 <= int(image_of_row.min()) <= int(image_of_row.max()) < n_images:
        raise ValueError(
            f"image_of_row: {int(image_of_row.min())} to {int(image_of_row.max())} is not within 0 to {n_images - 1}"
        )


def _rounded(acts_M: Tensor, dtype: torch.dtype) -> Tensor:
    """To dtype. What is above 0 stays so, as the smallest positive number: a latent that fires must not become dead."""
    rounded_M = acts_M.to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    smallest = torch.ones(1, dtype=bits, device=acts_M.device).view(dtype)
    return torch.where((rounded_M == 0) & (acts_M > 0), smallest, rounded_M)


# Writing -------------------------------------------------------------------------------------------------------------


class CodesWriter(StoreWriter):
    """Writes a store of codes, shard by shard; `width` is d_sae:

        with CodesWriter(path, d_sae, torch.float16, {"model": ..., "sae": ...}) as writer:
            writer.write_shard(0, sae.encode(x_BD), {"image": [...], "token": [...], "label": [...]})

    Takes SparseCodes, CodeRows or a triple. Zeros and padding are dropped. An act too small for the store's dtype
    becomes its smallest positive number, since a latent that fires must not become dead.
    """

    FORMAT = CODES

    def _shard_tensors(self, rows: Any, where: str) -> tuple[int, dict[str, Tensor]]:
        codes = _on_host(codes_of_rows(rows))
        _check_offsets(codes, where, exact=False)
        codes = _without_zeros(codes)
        _check_entries(codes, self._index.width, where)
        acts_M = _rounded(codes.acts, self._index.dtype)
        _check_overflow(acts_M, codes, where)
        n_entries = len(acts_M)
        (latents_dtype,), _ = self._index.layout(codes.n_rows, n_entries)["latents"]
        offsets_dtype = torch.int32 if n_entries < 1 << 31 else torch.int64
        return codes.n_rows, {
            "acts": acts_M,
            "latents": codes.latents.to(latents_dtype),
            "row_offsets": codes.row_offsets.to(offsets_dtype),
        }


def _on_host(codes: CodeRows) -> CodeRows:
    acts, latents, row_offsets = (tensor.detach().cpu() for tensor in codes)
    return CodeRows(acts, latents.long(), row_offsets.long())


def _without_zeros(codes: CodeRows) -> CodeRows:
    """Without padding, too. NaN is no zero: it stays, to be refused."""
    end = int(codes.row_offsets[-1])
    acts_M, latents_M = codes.acts[:end], codes.latents[:end]
    kept_M = acts_M != 0
    if bool(kept_M.all()):
        return CodeRows(acts_M, latents_M, codes.row_offsets)
    offsets = pad(kept_M.cumsum(0), (1, 0))[codes.row_offsets]
    return CodeRows(acts_M[kept_M], latents_M[kept_M], offsets)


def _check_overflow(stored_M: Tensor, codes: CodeRows, where: str) -> None:
    over_M = stored_M.isinf()
    if bool(over_M.any()):
        entry, largest = int(over_M.nonzero()[0]), torch.finfo(stored_M.dtype).max
        wider = "; use bfloat16 or float32" if stored_M.dtype == torch.float16 else ""
        row, latent, act = _row_of(codes, entry), int(codes.latents[entry]), float(codes.acts[entry])
        raise ActivationError(f"{where}: row {row}, latent {latent} is {act:g}; the largest is {largest:g}{wider}")


# Checks, of what is written and of what is read ----------------------------------------------------------------------


def _check_offsets(codes: CodeRows, where: str, first_row: int = 0, exact: bool = True) -> None:
    """row_offsets ascend from 0 and end at the number of entries, or, unless exact, within it."""
    offsets, n_entries = codes.row_offsets, len(codes.acts)
    if int(offsets[0]) != 0:
        raise ActivationError(f"{where}: row_offsets start at {int(offsets[0])}, not at 0")
    falls = offsets.diff() < 0
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        raise ActivationError(
            f"{where}: row {first_row + row} ends at entry {int(offsets[row + 1])}, before it begins at "
            f"{int(offsets[row])}; row_offsets must not descend"
        )
    end = int(offsets[-1])
    if end > n_entries or (exact and end < n_entries):
        raise ActivationError(f"{where}: row_offsets end at {end}, but there are {n_entries} entries")


def _check_entries(codes: CodeRows, d_sae: int, where: str, first_row: int = 0) -> None:
    """acts are above 0 and finite, latents within 0 .. d_sae - 1, ascending within a row. Needs sound offsets."""
    acts_M, latents_M, offsets = codes

    def refuse(bad_M: Tensor, value_M: Tensor, rule: str) -> None:
        if bool(bad_M.any()):
            entry = int(bad_M.nonzero()[0])
            raise ActivationError(
                f"{where}: row {first_row + _row_of(codes, entry)}, latent {int(latents_M[entry])}: "
                f"{value_M[entry].item():g} {rule}"
            )

    refuse(~((acts_M > 0) & (acts_M < float("inf"))), acts_M, "is not a finite activation above 0")
    refuse((latents_M < 0) | (latents_M >= d_sae), latents_M, f"is not a latent within 0 to {d_sae - 1}")
    begins_M = torch.zeros(len(acts_M) + 1, dtype=torch.bool)
    begins_M[offsets] = True
    ascends_M = pad(latents_M.diff() > 0, (1, 0), value=True)[: len(acts_M)]
    refuse(~(ascends_M | begins_M[:-1]), latents_M, "comes after a latent that is not below it in its row")


def _row_of(codes: CodeRows, entry: int) -> int:
    return int(torch.searchsorted(codes.row_offsets, torch.tensor(entry), right=True)) - 1


# Reading -------------------------------------------------------------------------------------------------------------


class Codes(StoredRows):
    """The rows of a store of codes. Made by `open_codes`.

    Attributes: those of StoredRows; d_sae; n_entries, latents that fire, summed over the rows.
    """

    def __init__(self, path: Path, index: StoreIndex, shards: list[dict[str, Tensor]]):
        items, rows = [path / shard.items for shard in index.shards], [shard.rows for shard in index.shards]
        super().__init__(path, rows, index.dtype, index.source, items)
        self.d_sae = index.width
        self.n_entries = sum(len(shard["acts"]) for shard in shards)
        self._shards, self._files = shards, [path / shard.file for shard in index.shards]

    def chunks(self, n: int) -> Generator[tuple[int, Tensor, Tensor, Tensor], None, None]:
        """Every row once, in order, <= n rows at a time, read ahead in the background.

        Yields (number of the first row, acts float32 [M], latents int64 [M], row_offsets int64 [<= n + 1]).
        ActivationError: a damaged shard, naming its file and the row.
        """
        check_chunk(n)
        return prefetch(
            lambda start: (start, *self._slice(start, min(start + n, self.n_rows))), range(0, self.n_rows, n)
        )

    def _slice(self, start: int, stop: int) -> CodeRows:
        return join_codes([self._read(*piece) for piece in self._pieces(start, stop)])

    def _read(self, shard: int, low: int, high: int) -> CodeRows:
        """Rows low .. high - 1 of a shard, checked."""
        tensors, where, first_row = self._shards[shard], str(self._files[shard]), int(self._starts[shard]) + low
        offsets, n_entries = tensors["row_offsets"], len(tensors["acts"])
        begin, end = int(offsets[low]), int(offsets[high])
        at_start, at_end = low > 0 or begin == 0, high < len(offsets) - 1 or end == n_entries
        if not (0 <= begin <= end <= n_entries and at_start and at_end):
            raise ActivationError(
                f"{where}: row_offsets of rows {first_row} to {first_row + high - low - 1} go from {begin} to {end}, "
                f"which does not fit the file's {n_entries} entries"
            )
        acts_M, latents_M = tensors["acts"][begin:end].float(), tensors["latents"][begin:end].long()
        codes = CodeRows(acts_M, latents_M, offsets[low : high + 1].long() - begin)
        _check_offsets(codes, where, first_row)
        _check_entries(codes, self.d_sae, where, first_row)
        return codes


def open_codes(path: str | os.PathLike[str]) -> Codes:
    """Opens a store of codes: headers only, the rest is memory-mapped. ActivationError: anything that is not usable."""
    index = open_index(Path(path), CODES)
    return Codes(Path(path), index, [map_shard(Path(path), shard, index) for shard in index.shards])
