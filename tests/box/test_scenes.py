"""The scenes' labels are the truth of every later check: independent of each other, and what the pixels show."""

import hashlib
from itertools import combinations

import numpy as np
import pytest

from saevlm_fast.box.scenes import (
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    OBJECT_FACTORS,
    PLACES,
    SCENE_FACTORS,
    SHAPES,
    SIZES,
    SPLITS,
    TAXONOMY,
    TEXTURES,
    VALUES,
    SceneBatch,
    Scenes,
    describe,
)

HASHES = {
    "train": "47e9ba7b59a60fdcb1f8b202a5ce778940397fe498a3b26d9fba8c98df45dfcd",
    "test": "f6926c376351e54229698838a507665709a23de6ca568731a850fd44b6cdbbcb",
    "novel": "3847e35b880beae3e3ce5945ee0429164883cb660716dd3e52676d8f25c03e6f",
}


@pytest.fixture(scope="module")
def train() -> SceneBatch:
    return Scenes(0).batch(0, 6000)


@pytest.mark.parametrize("split", SPLITS)
def test_the_bytes_are_the_same_on_every_machine(split: str) -> None:
    batch = Scenes(7, split).batch(1000, 300)
    digest = hashlib.sha256()
    for array in (batch.images, batch.masks, batch.objects.astype("<i8"), batch.setting.astype("<i8")):
        digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest() == HASHES[split]


def test_a_scene_depends_on_seed_split_and_number_alone() -> None:
    whole = Scenes(3).batch(100, 300)
    for start, n in ((0, 1), (27, 1), (120, 150), (299, 1)):
        part = Scenes(3).batch(100 + start, n)
        for name in ("images", "masks", "objects", "setting"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[start : start + n])
    assert not np.array_equal(Scenes(4).batch(100, 1).images, whole.images[:1])
    assert not np.array_equal(Scenes(3, "test").batch(100, 1).images, whole.images[:1])


def test_far_scenes_are_scenes_too() -> None:
    assert Scenes(0).batch(10**12, 2).images.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)


def _assert_even(observed: np.ndarray, expected: np.ndarray) -> None:
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = observed.size - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom), f"chi-square {chi_square:.1f} with {freedom} degrees"


def test_every_value_is_as_frequent_as_every_other(train: SceneBatch) -> None:
    present = train.objects[train.objects[:, :, 0] >= 0]
    columns = dict(zip(OBJECT_FACTORS, present.T)) | dict(zip(SCENE_FACTORS, train.setting.T))
    for factor, column in columns.items():
        counts = np.bincount(column, minlength=len(VALUES[factor]))
        _assert_even(counts, np.full(len(VALUES[factor]), len(column) / len(VALUES[factor])))


def test_factors_are_independent(train: SceneBatch) -> None:
    """Of one object per scene, drawn at random, and its scene; shape and colour among the pairs that are allowed."""
    slot = np.random.default_rng(0).integers(0, 2**30, len(train)) % (train.setting[:, 2] + 1)
    labels = np.concatenate([train.objects[np.arange(len(train)), slot], train.setting], axis=1)
    factors = [*OBJECT_FACTORS, *SCENE_FACTORS]
    for a, b in combinations(range(len(factors)), 2):
        table = np.zeros((len(VALUES[factors[a]]), len(VALUES[factors[b]])))
        np.add.at(table, (labels[:, a], labels[:, b]), 1)
        if (factors[a], factors[b]) == ("shape", "colour"):
            allowed = np.array([[HELD_OUT[shape] != colour for colour in COLOURS] for shape in SHAPES])
            assert table[~allowed].sum() == 0
            table = table[allowed]
        _assert_even(table, np.full(table.shape, len(train) / table.size))


def test_novel_scenes_show_held_out_pairs_only() -> None:
    novel = Scenes(0, "novel").batch(0, 400)
    for i in range(len(novel)):
        labels = novel.labels(i)
        assert [HELD_OUT[shape] for shape in labels["shape"]] == labels["colour"]
    assert sorted(HELD_OUT) == sorted(SHAPES)
    assert sorted(HELD_OUT.values()) == sorted(COLOURS)


def test_captions_say_the_labels(train: SceneBatch) -> None:
    """Read back, word by word, from the text alone."""
    for i, caption in enumerate(train.captions()[:500]):
        phrases, ground = caption.rsplit(" on ", 1)
        backdrop, background = ground.split()
        objects = [phrase.split() for phrase in phrases.split(" and ")]
        labels = train.labels(i)
        assert labels["background"] == [background]
        assert labels["backdrop"] == [backdrop]
        assert labels["count"] == [("one", "two", "three")[len(objects) - 1]]
        for words, *values in zip(objects, *(labels[factor] for factor in OBJECT_FACTORS), strict=True):
            shape, colour, texture, size, place = values
            assert words == ["a", size, colour, texture, shape, "at", "the", *place.split()]


def test_what_is_left_out_is_not_said() -> None:
    nothing = np.full((1, 5), -1)
    setting = np.full(3, -1)
    orange = np.array([[-1, COLOURS.index("orange"), -1, -1, -1]])
    assert describe(nothing, setting) == "a scene"
    assert describe(orange, setting) == "an orange thing"
    assert describe(nothing, np.array([0, -1, 1])) == "two things on teal"
    assert describe(orange, np.array([-1, 2, -1])) == "an orange thing on tiled background"


def test_objects_come_in_reading_order_each_in_its_quadrant(train: SceneBatch) -> None:
    half = IMAGE_SIZE // 2
    for objects, masks in zip(train.objects[:500], train.masks[:500]):
        places = [place for place in objects[:, OBJECT_FACTORS.index("place")] if place >= 0]
        assert places == sorted(set(places))
        for slot, place in enumerate(places):
            vertical, horizontal = PLACES[place].split()
            inside = masks[slot][half * (vertical == "bottom") :][:half, half * (horizontal == "right") :][:, :half]
            assert inside.sum() == masks[slot].sum() > 20
        assert not masks[len(places) :].any()


def test_masks_are_where_the_pixels_differ_from_the_background() -> None:
    """A plain object on an even background: two colours, and the nearer one of the two says the mask."""
    batch = Scenes(1).batch(0, 3000)
    plain = batch.objects[:, 0, OBJECT_FACTORS.index("texture")] == TEXTURES.index("plain")
    chosen = np.flatnonzero(plain & (batch.setting[:, 2] == 0) & (batch.setting[:, 1] == 0))
    agreement = []
    for image, mask in zip(batch.images[chosen].astype(float), batch.masks[chosen, 0]):
        inside, outside = np.median(image[mask], axis=0), np.median(image[~mask], axis=0)
        nearer = ((image - inside) ** 2).sum(-1) < ((image - outside) ** 2).sum(-1)
        agreement.append((nearer == mask).mean())
    assert len(chosen) > 30
    assert np.median(agreement) > 0.99
    assert np.mean(np.array(agreement) > 0.95) > 0.9


def test_masks_have_the_shape_and_the_size_they_are_labelled_with(train: SceneBatch) -> None:
    fill, hole, side = {name: [] for name in SHAPES}, {name: [] for name in SHAPES}, {name: [] for name in SIZES}
    scene, slot = np.nonzero(train.objects[:1500, :, 0] >= 0)
    for labels, mask in zip(train.objects[scene, slot], train.masks[scene, slot]):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        fill[SHAPES[labels[0]]].append(box.mean())
        hole[SHAPES[labels[0]]].append(not box[box.shape[0] // 2, box.shape[1] // 2])
        side[SIZES[labels[OBJECT_FACTORS.index("size")]]].append(max(box.shape))
    assert all(hole["ring"])
    assert not any(any(hole[name]) for name in ("circle", "square", "heart", "diamond", "star", "cross"))
    assert np.mean(fill["square"]) > np.mean(fill["circle"]) > np.mean(fill["triangle"]) > np.mean(fill["star"])
    assert np.mean(side["small"]) + 3 < np.mean(side["medium"]) < np.mean(side["big"]) - 3


def test_every_value_has_one_group() -> None:
    for factor, groups in TAXONOMY.items():
        assert sorted(value for values in groups.values() for value in values) == sorted(VALUES[factor])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scenes(-1), "seed: -1 must not be negative"),
        (lambda: Scenes(0, "val"), "split: 'val' is not one of train, test, novel"),
        (lambda: Scenes(0).batch(-1, 1), "start: -1 must not be negative"),
        (lambda: Scenes(0).batch(0, 0), "n: 0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_thousands_a_second_is_vectorised_work() -> None:
    """No timing: a batch is drawn in blocks, and no scene costs a Python call of its own."""
    calls = []
    import sys

    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        Scenes(0).batch(0, 512)
    finally:
        sys.setprofile(None)
    assert len(calls) < 5 * 512
