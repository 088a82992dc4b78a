"""Steerability of many latents together beside one forward with the hook for every image and latent, on tiny-clip."""

from dataclasses import dataclass

import pytest
import torch

from saevlm_fast.box.models import model_directory
from saevlm_fast.box.scenes import value_prompts
from saevlm_fast.clip_steering.steerability import Steering
from saevlm_fast.clip_steering.stream import Vocabulary, opened_stream
from saevlm_fast.clip_steering.units import Latents
from saevlm_fast.config import SAEConfig
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.edits import clamp, steer
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import load_text_encoder

LAYER, TARGET = 1, 3.0
MOVES = 4  # of a latent: as it is, reversed, along one random direction, without the SAE's error


@dataclass(frozen=True)
class Pairs:
    """Every latent is moved on every image."""

    n_images: int
    n_latents: int


PAIRS = {"smoke": Pairs(2, 2), "tiny-clip": Pairs(16, 8)}


@pytest.fixture(params=PAIRS)
def case(request):
    return PAIRS[request.param]


@pytest.fixture
def setting(case, device):
    """Tower, an SAE x4 with random weights, words, images, latents."""
    torch.manual_seed(0)
    name = f"hf:{model_directory('tiny-clip')}"
    tower, encoder = load_tower(name, device), load_text_encoder(name, device)
    sae = SparseAutoencoder(SAEConfig(128, 512, 10, "topk")).to(device).eval()
    words = value_prompts("shape")
    vocabulary = Vocabulary(tuple(words), encoder.embed(words), encoder.logit_scale)
    return tower, sae, vocabulary, open_images(f"scenes:test:{case.n_images}"), range(case.n_latents)


def batched(tower, sae, vocabulary, images, latents):
    """S of each latent; reading the images is included."""
    with opened_stream(tower, LAYER, "patches", 256) as stream:
        steering = Steering(stream, list(stream.batches(images, range(len(images)))), Latents(sae), vocabulary)
        return torch.from_numpy(steering.changes(torch.tensor(latents), torch.full((len(latents),), TARGET)).s)


def hooked(tower, sae, vocabulary, images, latents, at_once):
    """As many moved images: the hook on `at_once` images for each latent, MOVES times."""
    pictures = [decode(images.read(i)) for i in range(len(images))]
    inputs = [tower.inputs_of(pictures[i : i + at_once]) for i in range(0, len(pictures), at_once)]

    @torch.inference_mode()
    def probabilities():
        return torch.cat([vocabulary.probabilities(tower.forward(each).image_embeds) for each in inputs])

    before_NC, found = probabilities(), []
    for latent in latents:
        with steer(tower.model, sae, LAYER, [clamp(latent, TARGET)], tokens="patches", error="keep"):
            after = [probabilities() for _ in range(MOVES)]
        found.append((after[0] - before_NC).pow(2).sum(1).mean())
    return torch.stack(found).cpu()


def one_at_a_time(*setting):
    return hooked(*setting, at_once=1)


def images_at_once(*setting):
    return hooked(*setting, at_once=len(setting[3]))


@pytest.mark.parametrize("reference", ["one_at_a_time", "images_at_once"])
@pytest.mark.parametrize("impl", ["batched"])
def test_steerability(measure, setting, case, impl, reference):
    n_moved = case.n_images * case.n_latents * MOVES
    chosen = (batched, {"one_at_a_time": one_at_a_time, "images_at_once": images_at_once}[reference])
    ways = {way.__name__: (lambda way=way: way(*setting), {"images/s": n_moved}) for way in chosen}

    def check():
        torch.testing.assert_close(batched(*setting), chosen[1](*setting), rtol=1e-3, atol=1e-9)

    shape = {"images": case.n_images, "latents": case.n_latents}
    operation = f"steerability beside {reference}"
    measure(operation, impl, ways, check=check, shape=shape, dtype="float32", reference=reference)
