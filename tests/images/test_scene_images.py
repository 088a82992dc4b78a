"""Scenes where photos could stand: the same pixels, captions and truth as the generator's."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saevlm_fast.box.scenes import Scenes
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.images.scenes import scene_labels


@pytest.mark.parametrize("order", [range(300), [299, 0, 128, 127, 129, 5, 4, 3]])
def test_pixels_are_the_generators_in_any_order(order: range | list[int]) -> None:
    source = open_images("scenes:test:300:3")
    images = Scenes(3, "test").batch(0, 300).images
    for i in order:
        np.testing.assert_array_equal(np.asarray(decode(source.read(i))), images[i])


def test_label_is_the_caption_and_the_id_leads_to_the_truth() -> None:
    source, scenes = open_images("scenes:novel:40"), Scenes(0, "novel").batch(0, 40)
    assert [source.label(i) for i in range(40)] == scenes.captions()
    chosen = [7, 3, 39, 7]
    objects, setting = scene_labels([source.image_id(i) for i in chosen])
    np.testing.assert_array_equal(objects, scenes.objects[chosen])
    np.testing.assert_array_equal(setting, scenes.setting[chosen])


@settings(max_examples=20)
@given(start=st.integers(0, 500), n=st.integers(1, 200), seed=st.integers(0, 2**40))
def test_labels_without_drawing_are_those_of_the_drawn(start: int, n: int, seed: int) -> None:
    objects, setting = Scenes(seed, "train").labels(start, n)
    scenes = Scenes(seed, "train").batch(start, min(n, 5))
    np.testing.assert_array_equal(objects[:5], scenes.objects)
    np.testing.assert_array_equal(setting[:5], scenes.setting)
    assert len(objects) == len(setting) == n


def test_workers_get_the_same() -> None:
    source = open_images("scenes:train:50")
    source.read(3)
    again = pickle.loads(pickle.dumps(source))
    assert again.read(17) == source.read(17)
    assert again.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scenes:train", "is not scenes:SPLIT:N"),
        ("scenes:train:many", "is not scenes:SPLIT:N"),
        ("scenes:train:5:0:1", "is not scenes:SPLIT:N"),
        ("scenes:train:-5", "is not scenes:SPLIT:N"),
        ("scenes:other:5", "split 'other' is not one of train, test, novel"),
        ("scenes:train:0", "0 scenes, must be 1 to 100000000"),
        ("scenes:train:9999999999", "must be 1 to"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_images(spec)
    assert "\n" not in str(error.value)


def test_ids_of_other_images_have_no_truth() -> None:
    with pytest.raises(ValueError, match=r"'cat\.jpg' is not the id of a scene"):
        scene_labels(["test-0-0000001", "cat.jpg"])
    with pytest.raises(ValueError, match="scenes of 2 splits or seeds"):
        scene_labels(["test-0-0000001", "train-0-0000001"])
