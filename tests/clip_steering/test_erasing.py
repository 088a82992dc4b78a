"""What is taken out of the stream, against the steering hook and algebra; drawn words; the two ways of erasing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from saevlm_fast.box.models import model_directory
from saevlm_fast.box.scenes import value_prompts
from saevlm_fast.clip_steering.attacks import BITMAP, OUTLINE, TEST, TRAIN, AttackedSource, Style, wrong_words
from saevlm_fast.clip_steering.erasing import Told, erase_factor, erase_words
from saevlm_fast.clip_steering.removal import (
    Features,
    Removal,
    features,
    largest_differences,
    of_same_density,
    predictions,
    principal_directions,
    probe_direction,
)
from saevlm_fast.clip_steering.stream import Vocabulary, opened_stream
from saevlm_fast.clip_steering.units import Latents
from saevlm_fast.config import SAEConfig
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.steering.edits import steer, zero
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.text import load_text_encoder

LAYER, N = 2, 24
SHAPES = ("circle", "star", "square")


@pytest.fixture(scope="module")
def tower():
    return load_tower(f"hf:{model_directory('tiny-clip')}", "cpu")


@pytest.fixture(scope="module")
def classes():
    encoder = load_text_encoder(f"hf:{model_directory('tiny-clip')}", "cpu")
    return Vocabulary(SHAPES, encoder.embed([f"a {shape}" for shape in SHAPES]), encoder.logit_scale)


@pytest.fixture(scope="module")
def source():
    return open_images(f"scenes:test:{N}")


@pytest.fixture(scope="module")
def units():
    return Latents(SparseAutoencoder(SAEConfig(128, 64, 8, "topk")).eval())


def test_zeroed_latents_are_the_hooks(tower, classes, source, units):
    taken = torch.tensor([4, 9, 33])
    with opened_stream(tower, LAYER, "all", 8) as stream:
        found = predictions(stream, source, range(8), units, [Removal("latents", 3, taken)], classes)
        batch = next(iter(stream.batches(source, range(8))))
        tokens = units.read(batch.x_BTD.flatten(0, 1))
        removal = Removal("latents", 3, taken)
        with torch.no_grad():
            x_ND = removal.apply(units, batch.x_BTD.flatten(0, 1), tokens.values, None)
            out_BE = stream.output(batch, x_ND.view_as(batch.x_BTD))
    with torch.no_grad(), steer(tower.model, units.sae, LAYER, [zero(int(k)) for k in taken], error="keep"):
        expected = tower.forward(tower.inputs_of([decode(source.read(i)) for i in range(8)])).image_embeds
    assert torch.allclose(out_BE, expected, atol=1e-4)
    assert (found[1] == classes.probabilities(expected).argmax(1).numpy()).all()
    assert (found[0] >= 0).all()


def test_directions_are_gone_and_nothing_else():
    x_ND = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q.T
    mean = x_ND.mean(0)
    found = Removal("pca", 3, None, directions, mean).apply(None, x_ND, None, None)
    assert torch.allclose((found - mean) @ directions.T, torch.zeros(30, 3, dtype=torch.float64), atol=1e-12)
    rest = torch.linalg.svd(directions).Vh[3:]
    assert torch.allclose(found @ rest.T, x_ND @ rest.T)


def test_features_are_means_over_tokens(tower, source, units):
    with opened_stream(tower, LAYER, "all", 5) as stream:
        found = features(stream, source, range(7), units)
        batches = list(stream.batches(source, range(7)))
    x = torch.cat([batch.x_BTD for batch in batches])
    dense = units.read(x.flatten(0, 1)).values(torch.arange(64)).view(7, -1, 64)
    assert torch.allclose(found.latents_NS, dense.mean(1), atol=1e-5)
    assert torch.allclose(found.stream_ND, x.mean(1), atol=1e-5)


def test_the_choice_of_latents_and_its_controls(units):
    generator = torch.Generator().manual_seed(0)
    less = torch.rand(40, 64, generator=generator) * (torch.rand(40, 64, generator=generator) < 0.5)
    more = less.clone()
    more[:, 7] += 3
    more[:, 12] += 2
    seen = Features(more, torch.zeros(40, 128)), Features(less, torch.zeros(40, 128))
    assert largest_differences(*seen, units, 2).tolist() == [7, 12]
    with pytest.raises(ValueError, match="k: 3 latents are asked for, but only 2 fire more"):
        largest_differences(*seen, units, 3)
    other = of_same_density(torch.tensor([7, 12]), seen[1])
    assert len(set(other.tolist()) | {7, 12}) == 4
    density = (less > 0).float().mean(0)
    assert (density[other] - density[[7, 12]]).abs().max() < 0.2


def test_directions_of_words():
    generator = torch.Generator().manual_seed(0)
    less = torch.randn(200, 10, generator=generator)
    more = torch.randn(200, 10, generator=generator)
    more[:, 3] += 2
    assert probe_direction(more, less)[0, 3] > 0.9
    axis = principal_directions(torch.randn(50, 1, generator=generator) * torch.eye(10)[3:4], 1)
    assert abs(float(axis[0, 3])) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="k: 2 directions are asked for"):
        principal_directions(torch.ones(5, 1) * torch.eye(10)[:1], 2)


def test_words_are_drawn_the_same_each_time(source):
    words = ["star"] * N
    attacked = AttackedSource(source, words, TEST, seed=1)
    assert attacked.read(3) == AttackedSource(source, words, TEST, seed=1).read(3)
    assert attacked.read(3) != AttackedSource(source, words, TEST, seed=2).read(3)
    clean, drawn = (np.asarray(Image.open(io.BytesIO(each.read(3)))).astype(int) for each in (source, attacked))
    changed = (np.abs(clean - drawn).sum(2) > 0).mean()
    assert 0.02 < changed < 0.6
    nonsense = AttackedSource(source, words, TEST, seed=1, nonsense=True)
    assert nonsense.read(3) != attacked.read(3)
    none = AttackedSource(source, [None] * N, TEST)
    assert np.array_equal(np.asarray(decode(none.read(3))), np.asarray(decode(source.read(3))))
    assert attacked.fingerprint() != nonsense.fingerprint()
    assert attacked.image_id(3) == source.image_id(3)


def test_fonts_and_places_of_the_test_are_held_out(source):
    assert not set(TRAIN.fonts) & set(TEST.fonts)
    assert not set(TRAIN.places) & set(TEST.places)
    with pytest.raises(ValueError, match=r"fonts: /none\.ttf cannot be used"):
        AttackedSource(source, ["a"] * N, Style("own", ("/none.ttf",), TEST.places))
    for font in (BITMAP, OUTLINE):
        long = AttackedSource(
            source, ["a very long word that is wider than the image"] * N, Style("own", (font,), TEST.places)
        )
        assert decode(long.read(0)).size == decode(source.read(0)).size


def test_a_wrong_word_is_never_the_right_one():
    y = np.array([0, 1, 2, -1, 2, 1])
    found = wrong_words(("a", "b", "c"), y, [str(i) for i in range(6)])
    assert found[3] == -1
    assert (found[y >= 0] != y[y >= 0]).all()
    assert set(found[y >= 0]) <= {0, 1, 2}
    with pytest.raises(ValueError, match="labels: 1 class"):
        wrong_words(("a",), np.array([0]), ["x"])


def told(source, numbers, seed=0):
    y = np.random.default_rng(seed).integers(0, 3, len(numbers))
    return Told(source, list(numbers), y, SHAPES, y)


def test_words_erased(tower, classes, source, units):
    with opened_stream(tower, LAYER, "all", 8) as stream:
        train, test = told(source, range(12)), told(source, range(12, N), 1)
        found = erase_words(stream, units, train, test, classes, (1, 3), (TRAIN, TEST))
        rows = {(row["removal"], row["k"]): row for row in found["rows"]}
        expected = predictions(stream, source, range(12, N), units, [], classes)[0]
    names = {"latents", "random", "magnitude", "pca"}
    assert set(rows) == {("nothing", 0), ("probe", 1)} | {(name, k) for name in names for k in (1, 3)}
    clean = rows["nothing", 0]["clean"]
    assert clean["value"] == pytest.approx((expected == test.y_N).mean())
    low, high = clean["interval"]
    assert low <= clean["value"] <= high
    assert len(found["latents"]) == 3
    assert found["images"] == {"train": 12, "test": 12}


def test_a_factor_erased(tower, classes, source, units):
    """A latent that is planted to fire on one class alone is the one that is chosen."""
    with opened_stream(tower, LAYER, "all", 8) as stream:
        train = told(source, range(12))
        seen = features(stream, source, range(12), units)
        gain = torch.stack(
            [seen.latents_NS[train.y_N == v].mean(0) - seen.latents_NS[train.y_N != v].mean(0) for v in range(3)]
        ).amax(0) * units.W_SD.norm(dim=1)
        tests = {"shape": (told(source, range(12, N), 1), classes)}
        found = erase_factor(stream, units, train, tests, (2,))
    assert found["latents"] == gain.argsort(descending=True, stable=True)[:2].tolist()
    assert [row["removal"] for row in found["rows"]] == ["nothing", "latents", "random", "magnitude", "pca"]
    assert value_prompts("shape")[0] == "a circle"
