"""Harvest beside the bare forward loop over the same batches: what reading, decoding and writing add to the tower."""

import numpy as np
import pytest
import torch
from PIL import Image

from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.rows import open_activations
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.run import harvest
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.runtime import tf32_products
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

# timm architectures with random weights: pixels of the JPEGs, images, batch.
TOWERS = {
    "smoke": ("test_vit", (64, 64), 8, 4),
    # The shapes of Tiny ImageNet.
    "vit-tiny, 64 px": ("vit_tiny_patch16_224", (64, 64), 512 if torch.cuda.is_available() else 128, 64),
    "vit-base, 500 px": ("vit_base_patch16_224", (500, 375), 64, 16),  # those of ImageNet
}


@pytest.fixture(params=TOWERS)
def case(request):
    return request.param


@pytest.fixture
def setting(case, tmp_path, device):
    """A tower with random weights, JPEG photos of noise smoothed as photos are, and the batch size."""
    import timm
    from safetensors.torch import save_file

    architecture, size, n_images, batch = TOWERS[case]
    torch.manual_seed(0)
    save_file(timm.create_model(architecture, num_classes=0).state_dict(), tmp_path / "tower.safetensors")
    tower = load_tower(f"timm:{architecture}:{tmp_path / 'tower.safetensors'}", device)
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(n_images):
        coarse = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
            tmp_path / "photos" / f"{i:04d}.jpg", quality=90
        )
    return tower, open_images(str(tmp_path / "photos")), batch


@pytest.mark.parametrize("impl", ["forward", "harvest"])
def test_harvest(measure, setting, case, tmp_path, impl):
    """CLS, two random patches of the last block, pooled output; forward is the model alone on ready batches."""
    tower, source, batch = setting
    points = HookPoint("residual", tower.n_blocks - 1), HookPoint("pooled")
    config = HarvestConfig(points, (Tokens.parse("cls"), Tokens.parse("random:2")), batch_size=batch)

    def whole():
        harvest(source, tower, config, HarvestOptions(tmp_path / "out", force=(tmp_path / "out").exists()))

    ready = [
        tower.preprocess([decode(source.read(i)) for i in range(start, min(start + batch, len(source)))])
        for start in range(0, len(source), batch)
    ]

    def forward():
        # As the harvest has it: torch's convolutions default to TF32.
        with torch.inference_mode(), tf32_products(False):
            for inputs in ready:
                tower.forward({name: tensor.to(tower.device) for name, tensor in inputs.items()})

    def check():
        whole()
        store = open_activations(tmp_path / "out" / "pooled")
        with torch.inference_mode(), tf32_products(False):
            expected = tower.forward({name: tensor.to(tower.device) for name, tensor in ready[0].items()})
        torch.testing.assert_close(store.rows(torch.arange(len(expected))), expected.cpu(), atol=1e-4, rtol=1e-4)

    work = {"images/s": len(source)}
    measure("harvest", impl, {"forward": (forward, work), "harvest": (whole, work)}, check=check,
            shape={"images": len(source), "batch": batch}, dtype="float32", reference="forward")  # fmt: skip
