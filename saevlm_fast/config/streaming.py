"""From images to SAEs in one pass: the tower, the images, the shuffle buffer between them and the steps."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saevlm_fast.config.common import ComputeDtype
from saevlm_fast.config.harvesting import HarvestOptions, HarvestSettings
from saevlm_fast.errors import require
from saevlm_fast.settings import Settings, integers, same_as, setting, texts

_SIZES = {"MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class StreamSettings(Settings):
    """What goes through the tower, and how its rows are mixed before they are trained on."""

    title = "From images, in one pass"
    layer: tuple[int, ...] = setting((), help="Block, from 0; several: 5,8,11.", parse=integers)
    point: tuple[str, ...] = setting(
        ("residual",), help="residual, mlp, attention, projection, pooled; several: a,b.", parse=texts
    )
    tokens: tuple[str, ...] = setting(
        ("cls",), help="cls, patches, all, mean, random:K, random:K:all; several: a,b.", parse=texts
    )
    limit: int | None = same_as(HarvestSettings, "limit")
    image_batch: int = setting(64, help="Images of a forward pass.", at_least=1)
    tower_dtype: ComputeDtype = same_as(HarvestSettings, "dtype")
    buffer: str = setting(
        "64 batches",
        help="Rows that wait to be mixed, of every point: 200000, 512MiB, 4GiB, or so many steps' rows: 64 batches.",
    )
    buffer_on: Literal["device", "host"] = setting("device", help="Whose memory the buffers are in.")
    validation_images: str | None = setting(
        None,
        help="Held-out images, as --images, for the evaluation.",
        shown="the last rows that were trained on",
        place="images",
    )
    keep_store: Path | None = setting(None, help="Also write the first epoch's rows here, as a harvest does.")
    workers: int | None = same_as(HarvestOptions, "workers")
    max_skipped: float = same_as(HarvestOptions, "max_skipped", help="Share of unusable images above which it fails.")

    def check(self) -> None:
        if type(self.buffer) is int:  # of rows
            object.__setattr__(self, "buffer", str(self.buffer))
        super().check()
        self._parsed_buffer()

    def _parsed_buffer(self) -> tuple[int, str]:
        match = re.fullmatch(r"([0-9]{1,12})\s*(|MiB|GiB|batches|rows)", self.buffer.strip())
        require(
            match is not None,
            f"buffer: {self.buffer!r:.60} is not a number of rows, of MiB or GiB, or of batches, as 200000, 4GiB",
        )
        assert match is not None
        return int(match[1]), match[2]

    def buffer_rows(self, batch_size: int, row_bytes: int, n_rows: int) -> int:
        """Capacity in rows: at most all n_rows that a run takes.

        Raises:
            ValueError: fewer than a batch.
        """
        number, unit = self._parsed_buffer()
        rows = number * batch_size if unit == "batches" else number
        rows = number * _SIZES[unit] // row_bytes if unit in _SIZES else rows
        require(
            rows >= batch_size,
            f"buffer: {self.buffer} are {rows:,} rows, which must be at least batch_size = {batch_size:,}",
        )
        return min(rows, n_rows)
