"""Thumbnails of images, a sheet of many at a time: each distinct image once, at its own aspect, never enlarged.

Sheets are WebP of TILES tiles, numbered in the order in which latents need them first, so that a latent's images lie on
few sheets. Memory: two sheets.
"""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from saevlm_fast.files import atomic_write
from saevlm_fast.look.store_images import StoreImages
from saevlm_fast.scoring.geometry import WHOLE, Region

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 8  # tiles along a side of a sheet
TILES = SIDE * SIDE
QUALITY = 82


@dataclass
class Tiles:
    """The distinct images that are shown, in the order of their tiles.

    Attributes:
        names: ids. labels: None where there is none. numbers: in the store. sizes: of the thumbnails, (0, 0) for a
            missing one. regions: what of each picture the tower saw.
    """

    names: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_sheets(self) -> int:
        return -(-len(self) // TILES)

    def place(self, name: str, number: int, label: str | None) -> int:
        """The tile of an image, a new one if it has none."""
        if name not in self._places:
            self._places[name] = len(self.names)
            self.names.append(name)
            self.numbers.append(number)
            self.labels.append(label)
        return self._places[name]


def write_sheets(
    tiles: Tiles,
    images: StoreImages,
    folder: Path,
    side: int,
    covered: Callable[[int, int], Region],
    on_images: Callable[[int], None] = lambda done: None,
) -> None:
    """Draws every tile, at most side x side pixels, and learns sizes and regions; no sheets where no images are wanted.

    Args:
        covered: (width, height) of a picture -> what of it the tower saw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:  # encodes a sheet while the next is drawn; Pillow lets both go on at once
        waiting: Future[None] | None = None
        for sheet in range(tiles.n_sheets):
            page = _drawn(tiles, sheet, images, side, covered)
            if waiting is not None:
                waiting.result()
            waiting = None if page is None else pool.submit(_save, page, folder / sheet_name(sheet))
            on_images(min((sheet + 1) * TILES, len(tiles)))
        if waiting is not None:
            waiting.result()


def _drawn(
    tiles: Tiles, sheet: int, images: StoreImages, side: int, covered: Callable[[int, int], Region]
) -> "Image | None":
    """One sheet; None if all of its pictures are missing."""
    from PIL import Image

    page, any_there = Image.new("RGB", (SIDE * side, SIDE * side), "#808080"), False
    for tile in range(sheet * TILES, min((sheet + 1) * TILES, len(tiles))):
        picture = images.read(tiles.names[tile], tiles.numbers[tile], side)
        if picture is None:
            tiles.sizes.append((0, 0))
            tiles.regions.append(WHOLE)
            continue
        tiles.regions.append(covered(*picture.size))
        small = thumbnail(picture, side)
        tiles.sizes.append(small.size)
        row, column = divmod(tile % TILES, SIDE)
        page.paste(small, (column * side, row * side))
        any_there = True
    return page if any_there else None


def _save(page: "Image", path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded(page))


def thumbnail(picture: "Image", side: int) -> "Image":
    """At its own aspect, no side above `side`; a smaller picture stays as it is."""
    from PIL import Image

    scale = min(1.0, side / max(picture.size))
    size = tuple(max(1, round(each * scale)) for each in picture.size)
    return picture if scale == 1.0 else picture.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=2.0)


def encoded(page: "Image") -> bytes:
    buffer = io.BytesIO()
    page.save(buffer, format="WEBP", quality=QUALITY, method=2)
    return buffer.getvalue()


def sheet_name(sheet: int) -> str:
    return f"sheet-{sheet:05d}.webp"
