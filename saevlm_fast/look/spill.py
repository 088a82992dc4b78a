"""Codes on the disk for the length of one piece of work: written once, read in order as often as needed.

A spill is three raw files beside each other (activations float32, latents uint16 or int32, row ends int64) and, once it
is whole, a record of its shape. Nothing of it outlives the work, so it has no checksums; what a killed writer left has
no record, and is written anew. Memory: one chunk of rows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saevlm_fast.errors import while_writing
from saevlm_fast.files import write_json_atomic
from saevlm_fast.sparse_codes import SparseCodes

_ROWS_AT_ONCE = 1 << 14


class Spill:
    """Codes of N rows in a directory: `append` each chunk, `finish`, then `chunks`.

    Attributes:
        d_sae: latents. n_rows, n_entries: of a finished one.
    """

    def __init__(self, path: Path, d_sae: int):
        self.path, self.d_sae, self.n_rows, self.n_entries = path, d_sae, 0, 0
        self._kinds = {"acts": np.float32, "latents": np.uint16 if d_sae <= 1 << 16 else np.int32, "ends": np.int64}
        self._files: dict[str, Any] = {}

    @property
    def is_finished(self) -> bool:
        """Whether all of it is there; its shape is then known."""
        try:
            record = json.loads((self.path / "spill.json").read_text(encoding="utf-8"))
            self.n_rows, self.n_entries = record["rows"], record["entries"]
            return record["d_sae"] == self.d_sae
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def append(self, codes: SparseCodes) -> None:
        """Rows after those that are there; padding and zeros are dropped."""
        if not self._files:
            self.path.mkdir(parents=True, exist_ok=True)
            self._files = {name: (self.path / name).open("wb") for name in self._kinds}
        acts_M, latents_M, offsets = codes.compact().csr()
        with while_writing("codes", path=self.path):
            self._files["acts"].write(acts_M.numpy().astype(np.float32, copy=False).tobytes())
            self._files["latents"].write(latents_M.numpy().astype(self._kinds["latents"]).tobytes())
            self._files["ends"].write((offsets[1:].numpy() + self.n_entries).tobytes())
        self.n_rows, self.n_entries = self.n_rows + codes.n_rows, self.n_entries + len(acts_M)

    def finish(self) -> None:
        """From now on it can be read."""
        with while_writing("codes", path=self.path):
            for file in self._files.values():
                file.close()
        self._files = {}
        write_json_atomic(
            self.path / "spill.json", {"rows": self.n_rows, "entries": self.n_entries, "d_sae": self.d_sae}
        )

    def chunks(self, n: int = _ROWS_AT_ONCE) -> Iterator[tuple[int, SparseCodes]]:
        """(number of the first row, codes of <= n rows), in order."""
        ends = self._map("ends")
        for start in range(0, self.n_rows, n):
            stop = min(start + n, self.n_rows)
            begin, end = (0 if start == 0 else int(ends[start - 1])), int(ends[stop - 1])
            offsets = torch.from_numpy(np.concatenate([[begin], ends[start:stop]]) - begin)
            acts_M = torch.from_numpy(np.array(self._map("acts")[begin:end]))
            latents_M = torch.from_numpy(self._map("latents")[begin:end].astype(np.int64))
            yield start, SparseCodes.from_flat(acts_M, latents_M, offsets, self.d_sae)

    def _map(self, name: str) -> np.ndarray:
        file = self.path / name
        if file.stat().st_size == 0:
            return np.empty(0, self._kinds[name])
        return np.memmap(file, self._kinds[name], "r")
