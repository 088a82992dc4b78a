"""The contact sheet that a training run shows at its end: its strongest latents, where their images are known."""

from typing import TYPE_CHECKING

import torch

from saevlm_fast.data.rows import Activations
from saevlm_fast.look.chosen import chosen_latents
from saevlm_fast.look.store_images import StoreImages
from saevlm_fast.look.tops import Captions, latent_tops, tops_sheet
from saevlm_fast.sae import SparseAutoencoder

if TYPE_CHECKING:
    from PIL.Image import Image


def run_picture(
    rows: Activations, sae: SparseAutoencoder, title: str, n_latents: int = 24, n_images: int = 8
) -> "Image | None":
    """The latents of largest activation with their top images; None where no images are known. One pass over the rows.

    Raises:
        ValueError: rows of one image that lie apart.
    """
    images = StoreImages(rows.source)
    if images.problem is not None:
        return None
    found = latent_tops(rows, sae, n_images)
    ranks_S = found.max_S.masked_fill(found.n_active_S == 0, -torch.inf)
    latents = chosen_latents(f"top:{n_latents}", ranks_S)
    caption = f"{found.table.n_images:,} images of {rows.path}, the most active first."
    return tops_sheet(found, latents, images, Captions(title, caption, {}, {}), n_images)
