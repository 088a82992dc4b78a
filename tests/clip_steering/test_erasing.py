"""What is taken out of the stream, against the steering hook and algebra; drawn words; the two ways of erasing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from saevlm_fast.box.models import model_directory
from saevlm_fast.box.scenes import value_prompts
from saevlm_fast.clip_steering.attacks import BITMAP, OUTLINE, TEST, TRAIN, AttackedSource, Style, wrong_words
from saevlm_fast.clip_steering.erasing import (
    Choice,
    Question,
    Told,
    Writing,
    _accuracy,
    _check_classes,
    erase_factor,
    erase_words,
)
from saevlm_fast.clip_steering.removal import (
    Features,
    Removal,
    features,
    gains,
    most_gained,
    of_same_density,
    predictions,
    principal_directions,
    probe_directions,
)
from saevlm_fast.clip_steering.stream import Vocabulary, opened_stream
from saevlm_fast.clip_steering.units import Latents
from saevlm_fast.config import SAEConfig
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.measures.codes import KeptCodes
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
        found = predictions(stream, source, range(8), units, [Removal("latents", 3, taken)], [classes])[0]
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
    assert np.allclose(found.codes.matrix().toarray().T, dense.mean(1), atol=1e-5)
    assert torch.allclose(found.stream_ND, x.mean(1), atol=1e-5)
    assert np.allclose(found.mean_S(np.arange(7) < 3), dense[:3].mean((0, 1)), atol=1e-5)
    assert np.allclose(found.density_S, (dense > 0).double().mean((0, 1)))
    both = Features.join([found, Features(found.codes, found.stream_ND + 1, 0.5 * found.density_S)])
    assert np.allclose(both.density_S, 0.75 * found.density_S)
    assert np.allclose(both.mean_S(np.arange(14) >= 7), found.mean_S())


def test_features_of_one_token(tower, source, units):
    """The mean is over the tokens from which latents are taken, not over all."""
    with opened_stream(tower, LAYER, "cls", 4) as stream:
        found = features(stream, source, range(4), units)
        [batch] = stream.batches(source, range(4))
    assert torch.equal(found.stream_ND, batch.x_BTD[:, 0])
    dense = units.read(batch.x_BTD[:, 0]).values(torch.arange(64))
    assert np.allclose(found.codes.matrix().toarray().T, dense, atol=1e-5)


def test_tokens_that_nothing_reads_are_named(tower, source):
    """Of a CLIP's last block the class token alone is read, so that patches may be whatever they like."""
    last = tower.n_blocks - 1
    with (
        opened_stream(tower, last, "patches", 4) as stream,
        pytest.raises(
            ValueError, match=f"layer: {last} of hf:.*: its projection does not depend on the tokens patches"
        ),
    ):
        next(stream.batches(source, range(4)))
    for layer, tokens in ((last, "all"), (last, "cls"), (last - 1, "patches")):
        with opened_stream(tower, layer, tokens, 4) as stream:
            assert len(next(stream.batches(source, range(4)))) == 4


def planted():
    """Images 40 to 79 are of the other kind: latents 7 and 12 fire more there, 12 by a little and always."""
    generator = torch.Generator().manual_seed(0)
    less = torch.rand(40, 64, generator=generator) * (torch.rand(40, 64, generator=generator) < 0.5)
    more = less.clone()
    more[:20, 7] += 9
    more[:, 12] += 2
    codes = KeptCodes.of_dense(torch.cat([less, more]).numpy())
    return Features(codes, torch.zeros(80, 128), codes.counts_S / 80), np.repeat([0, 1], 40)


def test_the_choice_of_latents_and_its_controls(units):
    seen, kind = planted()
    gain = gains(seen, kind, [1], units, "difference")
    assert most_gained(gain, 2).tolist() == [7, 12]
    length = units.W_SD.double().norm(dim=1).numpy()
    assert gain[[7, 12]] == pytest.approx(np.array([4.5, 2.0]) * length[[7, 12]], rel=1e-5)
    with pytest.raises(ValueError, match="k: 3 latents are asked for, but only 2 fire more"):
        most_gained(gain, 3)
    chosen = torch.tensor([7, 12])
    other = of_same_density(chosen, seen.density_S)
    assert len(set(other.tolist()) | {7, 12}) == 4
    assert np.abs(seen.density_S[other] - seen.density_S[chosen]).max() < 0.3
    with pytest.raises(ValueError, match="k: 40 others that fire are needed as a control, 24 do"):
        of_same_density(torch.arange(40), seen.density_S)


def test_latents_chosen_by_auroc(units):
    """One that always fires tells more than one that fires a lot on half of the images."""
    seen, kind = planted()
    gain = gains(seen, kind, [1], units, "auroc")
    assert most_gained(gain, 2).tolist() == [12, 7]
    acts = seen.codes.matrix().toarray()
    for latent in (7, 12, 30):
        assert gain[latent] == pytest.approx(auroc(acts[latent, 40:], acts[latent, :40]) - 0.5)
    quarter = np.arange(80) // 20
    of_any = gains(seen, quarter, [0, 2], units, "auroc")
    assert of_any[7] == pytest.approx(auroc(acts[7, quarter == 2], acts[7, quarter != 2]) - 0.5)


def auroc(positive, negative):
    """By all pairs."""
    return np.mean([(p > negative) + 0.5 * (p == negative) for p in positive])


def test_directions_of_words():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 10, generator=generator)
    x[200:, 3] += 2
    assert abs(float(probe_directions(x, np.repeat([0, 1], 200))[0, 3])) > 0.9
    axis = principal_directions(torch.randn(50, 1, generator=generator) * torch.eye(10)[3:4], 1)
    assert abs(float(axis[0, 3])) == pytest.approx(1, abs=1e-5)
    assert principal_directions(torch.ones(5, 1) * torch.eye(10)[:1], 2).shape == (1, 10)
    assert principal_directions(torch.zeros(5, 10), 2).shape == (0, 10)


def test_directions_of_several_values():
    """They span what sklearn's discriminant reads, whatever directions the values' means are apart in."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    generator = torch.Generator().manual_seed(0)
    y = np.arange(600) % 4
    x = torch.randn(600, 10, generator=generator) * torch.logspace(-1, 0.5, 10)
    x += 0.5 * torch.randn(4, 10, generator=generator)[y]
    directions = probe_directions(x, y)
    assert directions.shape == (3, 10)
    assert torch.allclose(directions @ directions.T, torch.eye(3), atol=1e-5)
    read = LinearDiscriminantAnalysis(solver="eigen").fit(x.double().numpy(), y).scalings_[:, :3]
    read /= np.linalg.norm(read, axis=0)
    inside = np.linalg.norm(directions.double().numpy() @ read, axis=0)
    assert inside.min() > 0.97  # they are a little rounder
    same = probe_directions(torch.ones(6, 10), np.array([0, 1] * 3))
    assert same.shape == (0, 10)


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
    assert max(TRAIN.heights) < min(TEST.heights)
    with pytest.raises(ValueError, match=r"fonts: /none\.ttf cannot be used"):
        AttackedSource(source, ["a"] * N, Style("own", ("/none.ttf",), TEST.places, TEST.heights))
    for font in (BITMAP, OUTLINE):
        long = AttackedSource(
            source,
            ["a very long word that is wider than the image"] * N,
            Style("own", (font,), TEST.places, TEST.heights),
        )
        assert decode(long.read(0)).size == decode(source.read(0)).size


def test_nonsense_is_never_the_word(monkeypatch):
    """A permutation leaves a word of three letters as it is one time in six."""
    drawn = []
    monkeypatch.setattr(
        "saevlm_fast.clip_steering.attacks._written", lambda image, letters, *how: drawn.append(letters) or image
    )
    scenes = open_images("scenes:test:60")
    nonsense = AttackedSource(scenes, ["red"] * 59 + ["oo"], TEST, nonsense=True)
    for i in range(60):
        nonsense.read(i)
    assert len(drawn) == 60
    assert {"".join(sorted(each)) for each in drawn[:-1]} == {"der"}
    assert "red" not in drawn
    assert len(set(drawn[:-1])) == 5
    assert drawn[-1] == "oo"


def test_letters_that_a_font_does_not_have_are_named(source):
    """They would be drawn as boxes, all alike."""
    for style, word, letters in ((TRAIN, "rot \u0440\u043e\u0442", "\u043e\u0440\u0442"), (TEST, "\u7ea2", "\u7ea2")):
        with pytest.raises(ValueError, match=f"has no '{letters}'"):
            AttackedSource(source, [word] * N, style)
    for style, word in ((TRAIN, "gr\u00fcn"), (TEST, "blue-ish & 7")):
        AttackedSource(source, [word] * N, style)


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
    colours = Vocabulary(("red", "blue"), classes.texts_CE[:2], classes.logit_scale)
    with opened_stream(tower, LAYER, "all", 8) as stream:
        train, test = told(source, range(12)), told(source, range(12, N), 1)
        some = Told(source, test.numbers, np.where(test.y_N == 2, -1, test.y_N), ("red", "blue"), test.y_N)
        found = erase_words(
            stream,
            units,
            train,
            Question(test, classes),
            Choice((1, 3)),
            Writing(),
            {"colour": Question(some, colours)},
        )
        rows = {(row["removal"], row["k"]): row for row in found["table"]}
        expected = predictions(stream, source, range(12, N), units, [], [classes, colours])
    names = {"latents", "random", "magnitude", "pca"}
    assert set(rows) == {("nothing", 0), ("probe", 1)} | {(name, k) for name in names for k in (1, 3)}
    clean, colour = rows["nothing", 0]["clean"], rows["nothing", 0]["colour"]
    assert clean["value"] == pytest.approx((expected[0][0] == test.y_N).mean())
    known = some.y_N >= 0
    assert colour["value"] == pytest.approx((expected[1][0] == some.y_N)[known].mean())
    assert colour["n"] == known.sum()
    low, high = clean["interval"]
    assert low <= clean["value"] <= high
    assert len(found["chosen_latents"]) == 3
    assert (found["images_for_choosing"], found["images_asked_about"]) == (12, 12)
    assert list(rows["nothing", 0]) == ["removal", "k", "clean", "colour", "attacked", "nonsense", "reads"]


def test_words_of_another_language_are_drawn_where_it_is_asked(tower, classes, source, units):
    writing = Writing(words=("one", "two", "three"), test_words=("eins", "zwei", "drei"))
    drawn = []

    class Seen(AttackedSource):
        def __init__(self, source, words, *more, **options):
            drawn.append({word for word in words if word is not None})
            super().__init__(source, words, *more, **options)

    with opened_stream(tower, LAYER, "all", 8) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr("saevlm_fast.clip_steering.erasing.AttackedSource", Seen)
        train, test = told(source, range(12)), told(source, range(12, N), 1)
        found = erase_words(stream, units, train, Question(test, classes), Choice((1,)), writing, {})
    assert drawn[0] <= set(writing.words)
    assert drawn[1] == drawn[2] <= set(writing.test_words)
    assert len(found["table"]) == 6


@pytest.mark.parametrize("select", ["difference", "auroc"])
def test_a_factor_erased(tower, classes, source, units, select):
    """The latents that are taken out are those of the largest gain; the probe has a direction less than values."""
    with opened_stream(tower, LAYER, "all", 8) as stream:
        train = told(source, range(12))
        seen = features(stream, source, range(12), units)
        gain = gains(seen, train.y_N, [0, 1, 2], units, select)
        questions = {"shape": Question(told(source, range(12, N), 1), classes)}
        found = erase_factor(stream, units, train, questions, Choice((2,), select))
    assert found["chosen_latents"] == most_gained(gain, 2).tolist()
    names = [(row["removal"], row["k"]) for row in found["table"]]
    assert names == [(name, 2 if name != "nothing" else 0) for name in NAMES]
    assert value_prompts("shape")[0] == "a circle"


NAMES = ("nothing", "latents", "random", "magnitude", "pca", "probe")


def test_an_image_without_an_answer_is_wrong(source):
    """Of a model as it is: left out. After a removal: a mistake."""
    asked = Told(source, [0, 1, 2, 3], np.array([0, 0, 1, -1]), SHAPES, np.array([0, 0, 1, -1]))
    answers = np.array([[0, 0, -1, 1], [-1, 0, 1, 1]])
    assert _accuracy(answers, 0, asked)["value"] == 1
    assert _accuracy(answers, 1, asked)["value"] == 0.5
    assert _accuracy(answers, 1, asked)["n"] == 2


def test_a_class_without_any_answer_is_refused(source, classes):
    """Images that decode and that the preprocessing does not take, or of which the attacked form is not usable."""
    asked = Question(Told(source, [0, 1, 2, 3], np.array([0, 1, 1, -1]), SHAPES, np.array([0, 1, 1, -1])), classes)
    _check_classes("attacked", asked, np.array([True, False, True, False]), {1: "is too wide"})
    said = rf"none of the 2 images of the class 'star' is usable \(attacked\); .* {source.image_id(1)}: is too wide"
    with pytest.raises(ValueError, match=f"test_images: {said}"):
        _check_classes("attacked", asked, np.array([True, False, False, False]), {1: "is too wide"})


def test_the_worst_group_is_the_lowest_of_those_with_enough_images(source):
    """By counting: groups of 4 images are too small, images without an answer or a class count nowhere."""
    random = np.random.default_rng(0)
    y, group = random.integers(-1, 3, 200), random.integers(0, 4, 200)
    group[group == 3] = np.where(np.arange((group == 3).sum()) < 4, 3, -1)
    answers = np.where(random.random((2, 200)) < 0.6, y, random.integers(-1, 3, (2, 200)))
    answers[1, group == 3] = -1  # all wrong, and left out for there are four
    names = ("a", "b", "c", "d")
    found = _accuracy(answers, 1, Told(source, list(range(200)), y, names, group))
    shares, right, n = {}, 0, 0
    for i in range(200):
        if y[i] >= 0 and answers[0, i] >= 0:
            n, right = n + 1, right + (answers[1, i] == y[i])
            if group[i] >= 0:
                shares.setdefault(names[group[i]], []).append(answers[1, i] == y[i])
    assert (found["n"], found["value"]) == (n, pytest.approx(right / n))
    assert len(shares.pop("d")) <= 4
    lowest = min(shares, key=lambda name: np.mean(shares[name]))
    assert found["worst"]["group"] == lowest
    assert found["worst"]["value"] == pytest.approx(np.mean(shares[lowest]))
    assert found["worst"]["n"] == len(shares[lowest])
