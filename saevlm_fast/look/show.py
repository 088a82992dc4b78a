"""A latent in a notebook: its top images with heat maps, drawn inline, and the maps as tensors."""

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.data.codes import Rows, StoredCodes, as_rows
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require, whole_number
from saevlm_fast.images.open import Images
from saevlm_fast.look.sprites import thumbnail
from saevlm_fast.look.store_images import StoreImages, placeholder
from saevlm_fast.runtime import exact_defaults
from saevlm_fast.sae import SparseAutoencoder, check_sae
from saevlm_fast.scoring.encoding import n_latents
from saevlm_fast.scoring.geometry import PatchGrid, covered, patch_grid
from saevlm_fast.scoring.image_rows import ImageTable, image_chunks, image_table
from saevlm_fast.scoring.source import Pool, check_pool
from saevlm_fast.scoring.top_images import BestImages
from saevlm_fast.sparse_codes import SparseCodes

if TYPE_CHECKING:
    from PIL.Image import Image

_VIRIDIS = np.frombuffer(  # red, green, blue of ten colours, as the pages have them
    bytes.fromhex("440154482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"), np.uint8
).reshape(10, 3)


@dataclass(frozen=True, eq=False)
class ShownLatent:
    """One latent's top images; a notebook draws it, and `image` is the same as a picture.

    Attributes:
        latent: its number. ids: of the images, the most active first. acts: float32 [n].
        heat: activations over the patches, float32 [n, rows, columns]; None where the rows are not all patches.
        pictures: with the heat maps over them if they are wanted.
        note: why there are no heat maps, or what is missing.
    """

    latent: int
    ids: list[str]
    acts: Tensor
    heat: Tensor | None
    pictures: "list[Image]"
    note: str

    def _repr_html_(self) -> str:
        """What a notebook draws: names are escaped, pictures lie in it."""
        figures = "".join(self._figure(i) for i in range(len(self.ids)))
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        row = '<div style="display:flex;flex-wrap:wrap;gap:6px">'
        return f"<div><b>Latent {self.latent}</b>{note}{row}{figures}</div></div>"

    def _figure(self, i: int) -> str:
        buffer = io.BytesIO()
        self.pictures[i].save(buffer, format="PNG")
        data, name = base64.b64encode(buffer.getvalue()).decode("ascii"), html.escape(self.ids[i], quote=True)
        act = f"{float(self.acts[i]):.3g}"
        picture = f'<img src="data:image/png;base64,{data}" alt="{name}, activation {act}" title="{name}">'
        return f'<figure style="margin:0;text-align:center">{picture}<figcaption>{act}</figcaption></figure>'

    @property
    def image(self) -> "Image":
        """All pictures in a row."""
        from PIL import Image

        width = sum(picture.width + 4 for picture in self.pictures)
        sheet = Image.new("RGB", (max(width, 1), max((p.height for p in self.pictures), default=1)), "white")
        x = 0
        for picture in self.pictures:
            sheet.paste(picture, (x, 0))
            x += picture.width + 4
        return sheet


@exact_defaults()
def show(
    latent: int,
    rows: Rows,
    sae: SparseAutoencoder | None = None,
    *,
    n: int = 16,
    pool: Pool = "max",
    images: Images | None = None,
    side: int = 128,
    heat: bool = True,
    batch_rows: int = 4096,
    on_images: Callable[[int], None] = lambda done: None,
) -> ShownLatent:
    """The top images of a latent, with the activations of their own patches laid over them.

    One pass over the rows. In a notebook the result draws itself; `.heat` has the maps for plots of one's own.

    Args:
        latent: its number.
        rows: activations with the SAE that encodes them, or codes, or a path of either; of all patches of each image
            for heat maps.
        n: images. pool: of an image with several rows, its largest or their mean.
        images: where the pictures are, or a list of them, if not where the store says.
        side: of a picture, pixels; smaller ones are enlarged. heat: whether maps are drawn.

    Raises:
        ValueError: a latent that is not there, n or side below 1, rows that do not fit the SAE, images that are no
            place with images.
    """
    rows = as_rows(rows, "rows")
    if sae is not None:
        check_sae(sae)
    check_pool(pool)
    latent, n, side = whole_number("latent", latent, 0), whole_number("n", n), whole_number("side", side)
    batch_rows, size = whole_number("batch_rows", batch_rows), n_latents(rows, sae)
    require(latent < size, f"latent: {latent} is not within 0 to {size - 1}")
    require(side <= 4096, f"side: {side} must be at most 4096")
    table, source = image_table(rows), StoreImages(rows.source, images)
    grid = patch_grid(rows.source, table)
    numbers, acts, maps = _best(latent, rows, sae, table, grid, n, pool, batch_rows, on_images)
    ids = [table.name(i) for i in numbers]
    found = [source.read(image_id, number) for image_id, number in zip(ids, numbers)]
    largest = float(acts.max()) if len(acts) else 1.0
    pictures = [
        _drawn(picture, side, maps[i] / largest if heat and maps is not None else None, rows.source)
        for i, picture in enumerate(found)
    ]
    notes = [f"no heat maps: {grid}"] if isinstance(grid, str) else []
    if source.missing and source.wanted:
        first, why = next(iter(source.missing.items()))
        notes.append(f"{len(source.missing)} images are missing, the first: {first}: {why}")
    return ShownLatent(latent, ids, acts, maps, pictures, "; ".join(notes))


def _best(
    latent: int,
    rows: Activations | StoredCodes,
    sae: SparseAutoencoder | None,
    table: ImageTable,
    grid: PatchGrid | str,
    n: int,
    pool: Pool,
    batch_rows: int,
    on_images: Callable[[int], None],
) -> tuple[list[int], Tensor, Tensor | None]:
    """Numbers and activations of the top images; and their maps, kept along the way."""
    best = BestImages(1, n)
    kept: dict[int, Any] = {}
    for chunk in image_chunks(rows, sae, table, pool, batch_rows):
        acts_M, latents_M, _ = chunk.codes.csr()
        mine_M = latents_M == latent
        images_M = chunk.codes.entry_rows()[mine_M] + chunk.first
        best.add(acts_M[mine_M], torch.zeros(len(images_M), dtype=torch.int64), images_M)
        if isinstance(grid, PatchGrid):
            kept |= {i: _map(chunk.row_codes, chunk.first_row, table, grid, i, latent) for i in images_M.tolist()}
            wanted = set(best.images_M.tolist())
            kept = {i: each for i, each in kept.items() if i in wanted}
        on_images(chunk.first + chunk.codes.n_rows)
    (top,) = best.result()
    numbers = top.images.tolist()
    maps = torch.stack([kept[i] for i in numbers]) if kept else None
    return numbers, top.acts, maps


def _map(codes: SparseCodes, first_row: int, table: ImageTable, grid: PatchGrid, image: int, latent: int) -> Tensor:
    """[rows, columns]: the latent on the patches of an image."""
    acts_M, latents_M, offsets = codes.csr()
    low, high = (int(each) - first_row for each in table.offsets_N1[image : image + 2])
    mine = slice(int(offsets[low]), int(offsets[high]))
    chosen_M = latents_M[mine] == latent
    rows_M = torch.searchsorted(offsets, torch.arange(mine.start, mine.stop), right=True)[chosen_M] - 1
    assert table.tokens_R is not None  # patch_grid has seen to it
    patches = table.tokens_R[first_row + rows_M.numpy()] - grid.n_prefix
    found = torch.zeros(grid.n_patches)
    inside = (patches >= 0) & (patches < grid.n_patches)
    found[torch.from_numpy(patches[inside]).long()] = acts_M[mine][chosen_M][torch.from_numpy(inside)]
    return found.view(grid.rows, grid.columns)


def _drawn(picture: "Image | None", side: int, share: Tensor | None, source: dict[str, Any] | None) -> "Image":
    """A picture at its own aspect, its longer side `side`, with a map over the part that the tower saw."""
    from PIL import Image

    if picture is None:
        return placeholder(side)
    region = covered(source, *picture.size)
    small = thumbnail(picture, side)
    scale = side / max(small.size)
    small = small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))
    if share is None:
        return small
    values = share.clamp(0, 1).numpy()
    places = values * (len(_VIRIDIS) - 1)
    low = np.minimum(places.astype(int), len(_VIRIDIS) - 2)
    colours = _VIRIDIS[low] + (_VIRIDIS[low + 1].astype(np.float64) - _VIRIDIS[low]) * (places - low)[..., None]
    alpha = 255 * 0.75 * np.sqrt(values)
    heat = Image.fromarray(np.concatenate([colours, alpha[..., None]], -1).round().astype(np.uint8), "RGBA")
    x0, y0, x1, y1 = (round(each * length) for each, length in zip(region, (*small.size, *small.size)))
    layer = Image.new("RGBA", small.size)
    layer.paste(heat.resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.NEAREST), (x0, y0))
    return Image.alpha_composite(small.convert("RGBA"), layer).convert("RGB")
