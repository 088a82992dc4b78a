"""An SAE with latents planted by hand, on scenes whose objects have a known place."""

import shutil
from pathlib import Path

import torch
from PIL import Image

from saevlm_fast.box.scenes import COLOURS, Scenes
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.sae import SparseAutoencoder

N, GRID, PIXELS = 90, 8, 48
COLOUR = "red"
HOSTILE = "<img src=x onerror=alert(1)>&\"'.png"  # a file's name, and a label


def plant(root: Path) -> None:
    """photos, store, embeddings, sae: latent 3 fires where patches are of red objects, latent 5 at random places.

    The activations are made by hand: feature 0 of a patch is the share of it that a red object covers, feature 1 is
    noise, the others are of other colours. So the heat map of latent 3 must lie on the objects.
    """
    batch = Scenes(0, "test").batch(0, N)
    (root / "photos" / "a").mkdir(parents=True)
    ids = [f"a/{i:04d}.png" for i in range(N - 1)] + [f"a/{HOSTILE}"]
    for image_id, pixels in zip(ids, batch.images):
        Image.fromarray(pixels).save(root / "photos" / image_id)
    share = patch_shares(batch)
    random = torch.Generator().manual_seed(0)
    x = torch.zeros(N, GRID * GRID, 12)
    x[..., 0] = share[..., COLOURS.index(COLOUR)] * 4
    x[..., 1] = (torch.rand(N, GRID * GRID, generator=random) > 0.9) * 2.0
    x[..., 2:] = share
    items = {
        "image": [name for name in ids for _ in range(GRID * GRID)],
        "token": list(range(1, GRID * GRID + 1)) * N,
        "label": [label for i in range(N) for label in [("<b>odd</b>", "even")[i % 2]] * GRID * GRID],
    }
    layout = {"n_tokens": GRID * GRID + 1, "n_prefix": 1, "has_cls": True, "grid": [GRID, GRID]}
    source = {"layer": 1, "point": "residual", "layout": layout, "images": {"path": str(root / "photos")}}
    with ActivationWriter(root / "store", 12, torch.float32, source, 1000) as writer:
        writer.append(x.view(-1, 12), items)
    once = {name: column[:: GRID * GRID] for name, column in items.items()} | {"token": [-1] * N}
    with ActivationWriter(root / "embeddings", 12, torch.float32, {"point": "projection"}, 1000) as writer:
        writer.append(x.mean(1) + 0.01, once)
    planted_sae(root / "sae")


def planted_sae(path: Path) -> None:
    """12 -> 16, k = 3: latent 3 reads feature 0, latent 5 feature 1, 6 .. 15 the colours; 0 .. 2 and 4 are dead."""
    sae = SparseAutoencoder(SAEConfig(12, 16, 3, "topk", metadata={"source": {"layer": 1, "point": "residual"}}))
    weights = torch.zeros(16, 12)
    weights[3, 0], weights[5, 1] = 1, 1
    for colour in range(10):
        weights[6 + colour, 2 + colour] = 0.5
    with torch.no_grad():
        sae.W_dec.copy_(weights + 1e-4)
        sae.W_enc.copy_(weights.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.save_pretrained(path)


def patch_shares(batch) -> torch.Tensor:
    """[N, patches, colours]: share of each patch's pixels that an object of the colour covers."""
    masks = torch.from_numpy(batch.masks).float()
    side = PIXELS // GRID
    shares = masks.view(N, 3, GRID, side, GRID, side).mean((3, 5)).flatten(2)
    found = torch.zeros(N, GRID * GRID, len(COLOURS))
    for i in range(N):
        for slot in range(3):
            colour = int(batch.objects[i, slot, 1])
            if colour >= 0:
                found[i, :, colour] += shares[i, slot]
    return found


def browser_path() -> str | None:
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
