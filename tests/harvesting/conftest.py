"""What the tests of this folder share."""

import pytest
from PIL import Image
from small_harvests import N_IMAGES, run_harvest, small_units

from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.towers.load import load_tower
from tiny_tower import WIDTH, save_clip, save_photos


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), N_IMAGES)


@pytest.fixture(scope="module")
def tower(model):
    return load_tower(f"hf:{model}")


@pytest.fixture(scope="module")
def whole(tower, photos, tmp_path_factory):
    """The harvest of small units, uninterrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_harvest(tower, photos, output, small_units())
    return output


@pytest.fixture
def spoiled_photos(tmp_path):
    """Of 22 photos, three cannot be used: truncated, empty, and 3,000 times as wide as high."""
    photos = save_photos(tmp_path / "spoiled", N_IMAGES)
    files = sorted(photos.rglob("*.png"))
    files[2].write_bytes(files[2].read_bytes()[:200])
    files[9].write_bytes(b"")
    Image.new("RGB", (3000, 1)).save(files[21])
    return photos, [files[i].relative_to(photos).as_posix() for i in (2, 9, 21)]


@pytest.fixture(scope="module")
def sae_directory(tmp_path_factory):
    """An SAE of the tower's width, with random weights."""
    directory = tmp_path_factory.mktemp("sae")
    sae = SparseAutoencoder(SAEConfig(WIDTH, 64, k=5))
    sae.reset_parameters(3)
    sae.threshold.fill_(0.3)
    sae.save_pretrained(directory)
    return directory
