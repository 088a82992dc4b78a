"""The contact sheet that a training run shows at its end: its strongest latents, where their images are known."""

from typing import TYPE_CHECKING

import torch

from saevlm_fast.data.rows import Activations
from saevlm_fast.look.chosen import chosen_latents
from saevlm_fast.look.store_images import StoreImages
from saevlm_fast.look.tops import Captions, LatentTops, latent_tops, tops_sheet
from saevlm_fast.sae import SparseAutoencoder

if TYPE_CHECKING:
    from PIL.Image import Image

LATENTS_SHOWN, IMAGES_SHOWN = 24, 8


def run_picture(rows: Activations, sae: SparseAutoencoder, title: str) -> "Image | None":
    """The latents of largest activation with their top images; None where no images are known. One pass over the rows.

    Raises:
        ValueError: rows of one image that lie apart.
    """
    images = StoreImages(rows.source)
    if images.problem is not None:
        return None
    return strongest_sheet(latent_tops(rows, sae, IMAGES_SHOWN), images, title, str(rows.path))


def strongest_sheet(found: LatentTops, images: StoreImages, title: str, of: str) -> "Image":
    """The same of what was found before. of: what images they are."""
    ranks_S = found.max_S.masked_fill(found.n_active_S == 0, -torch.inf)
    latents = chosen_latents(f"top:{LATENTS_SHOWN}", ranks_S)
    caption = f"{found.table.n_images:,} images of {of}, the most active first."
    return tops_sheet(found, latents, images, Captions(title, caption, {}, {}), IMAGES_SHOWN)
