"""Purity, concepts and common depth against plain loops over images, latents and labels."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saevlm_fast.box.scenes import TAXONOMY, VALUES, Scenes
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import Activations
from saevlm_fast.demo.ground_truth import (
    CONCEPTS,
    FACTORS,
    LatentConcepts,
    best_concepts,
    best_factor_depth,
    chance_depth,
    common_depth,
    concept_presence,
    latent_concepts,
    scene_words,
    shared_value,
)
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import score
from saevlm_fast.scoring.ranks import spearman
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.top_images import TopImages, top_images

N_IMAGES = 600
DRAWN = Scenes(5, "test").batch(0, N_IMAGES)
OBJECTS, SETTING = DRAWN.objects, DRAWN.setting


def concept(name: str, factor: str) -> int:
    return next(c for c, concept in enumerate(CONCEPTS) if (concept.factor, concept.name) == (factor, name))


def shown_paths(i: int, factor: str) -> list[tuple[str, ...]]:
    """(group, value) of every object of scene i, by the scene's own words."""
    group_of = {value: group for group, values in TAXONOMY[factor].items() for value in values}
    return [(group_of[value], value) for value in DRAWN.labels(i)[factor]]


def stored(acts_NS: torch.Tensor) -> Activations:
    return Activations.from_tensor(acts_NS.float())


def truth(acts_NS: torch.Tensor) -> torch.Tensor:
    """Shares [S, C] by the definition, NaN where nothing varies or one image alone is above the minimum."""
    present_NC = concept_presence(OBJECTS[: len(acts_NS)], SETTING[: len(acts_NS)])
    shares = np.full((acts_NS.shape[1], len(CONCEPTS)), math.nan)
    for s, a_N in enumerate(acts_NS.double().numpy().T):
        low, high = a_N.min(), a_N.max()
        if (a_N > low).sum() >= 2:
            r_N = (a_N - low) / (high - low)
            shares[s] = [r_N[shown_N].sum() / r_N.sum() for shown_N in present_NC.T]
    return torch.from_numpy(shares)


def test_concepts_are_the_nodes_of_the_taxonomy_each_once():
    values = [c for c in CONCEPTS if c.depth == 2]
    assert [(c.factor, c.name) for c in values] == [(f, value) for f in VALUES for value in VALUES[f]]
    groups = {(c.factor, c.name) for c in CONCEPTS if c.depth == 1}
    assert groups == {(f, g) for f in TAXONOMY for g in TAXONOMY[f] if len(TAXONOMY[f][g]) > 1}
    present_NC = concept_presence(OBJECTS, SETTING)
    assert len(np.unique(present_NC, axis=1).T) == len(CONCEPTS)  # no two are the same images


def test_presence_is_what_the_scenes_say():
    present_NC = concept_presence(OBJECTS[:60], SETTING[:60])
    assert present_NC.dtype == bool
    for i in range(60):
        for c, (factor, name, depth) in enumerate(CONCEPTS):
            assert present_NC[i, c] == any(path[depth - 1] == name for path in shown_paths(i, factor))


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, LatentConcepts]:
    present_NC = torch.from_numpy(concept_presence(OBJECTS, SETTING)).float()
    generator = torch.Generator().manual_seed(0)
    acts_NS = 3.0 * present_NC  # latent c fires exactly on the images of concept c
    noise_NS = torch.rand(N_IMAGES, 6, generator=generator)
    noise_NS[:, 0], noise_NS[:, 1] = 0.0, 5.0  # dead, constant
    noise_NS[1:, 2] = 0.0  # single
    acts_NS = torch.cat([acts_NS, noise_NS], 1)
    return acts_NS, latent_concepts(stored(acts_NS), OBJECTS, SETTING)


def test_a_latent_that_equals_a_concept_is_found_pure(planted):
    _, found = planted
    exact = slice(0, len(CONCEPTS))
    assert found.concept_S[exact].tolist() == list(range(len(CONCEPTS)))
    assert found.depth_S[exact].tolist() == [concept.depth for concept in CONCEPTS]
    red, warm = concept("red", "colour"), concept("warm", "colour")
    for c, (_, _, depth) in enumerate(CONCEPTS):
        if depth == 2:
            assert found.value_S[c] == c
            assert found.purity_S[c] == pytest.approx(1 - float(found.base_C[c]))
    assert found.share_SC[red, warm] == 1.0
    assert CONCEPTS[int(found.value_S[warm])].factor == "colour"
    assert 0 < found.purity_S[warm] < found.purity_S[red]


def test_what_the_score_leaves_undefined_has_no_concept(planted):
    acts_NS, found = planted
    status_S = score(stored(acts_NS), stored(torch.randn(N_IMAGES, 3))).status
    undefined_S = status_S != STATUSES.index("defined")
    assert undefined_S.sum() == 3
    for values in (found.purity_S, found.depth_S, found.share_SC[:, 0]):
        assert torch.equal(values.isnan(), undefined_S)
    for indices in (found.value_S, found.concept_S):
        assert torch.equal(indices == -1, undefined_S)


@pytest.mark.parametrize("batch_rows", [7, 250, 4096])
@pytest.mark.parametrize("offset", [0.0, -40.0, 1000.0])
def test_dense_shares_against_loops(planted, offset, batch_rows):
    acts_NS = torch.cat([planted[0], torch.randn(N_IMAGES, 2)], 1) + offset
    found = latent_concepts(stored(acts_NS), OBJECTS, SETTING, batch_rows=batch_rows)
    torch.testing.assert_close(found.share_SC, truth(acts_NS.float()), rtol=1e-9, atol=1e-12, equal_nan=True)
    assert_best(found)


def assert_best(found: LatentConcepts) -> None:
    """Purity and depth by loops over the shares."""
    for s, share_C in enumerate(found.share_SC.tolist()):
        if math.isnan(share_C[0]):
            continue
        above = {c: share - base for c, (share, base) in enumerate(zip(share_C, found.base_C.tolist()))}
        values = [above[c] for c in above if CONCEPTS[c].depth == 2]
        assert float(found.purity_S[s]) == max(values) == above[int(found.value_S[s])]
        spread = {c: math.sqrt(base * (1 - base)) for c, base in enumerate(found.base_C.tolist()) if 0 < base < 1}
        best = max(spread, key=lambda c: above[c] / spread[c])
        assert found.depth_S[s] == CONCEPTS[best].depth == CONCEPTS[int(found.concept_S[s])].depth


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.integers(2, 80), st.integers(1, 90), st.sampled_from(["topk", "batch_topk"]))
def test_sparse_codes_and_the_sae_agree_with_the_dense_codes(tmp_path_factory, seed, n, batch_rows, architecture):
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(SAEConfig(d_in=8, d_sae=24, k=3, architecture=architecture)).eval()
    sae.threshold.fill_(0.3 + 2 * float(torch.rand(1, generator=generator)))
    x_ND = torch.randn(n, 8, generator=generator)
    labels = OBJECTS[:n], SETTING[:n]
    with torch.no_grad():
        codes = sae.encode(x_ND)
    path = tmp_path_factory.mktemp("codes") / "codes"
    with CodesWriter(path, 24, torch.float32, {}) as writer:
        ids = [str(i) for i in range(n)]
        writer.write_shard(0, codes, {"image": ids, "token": [0] * n, "label": ids})
    expected_SC = truth(codes.dense())
    for found in (
        latent_concepts(stored(x_ND), *labels, sae),
        latent_concepts(open_codes(path), *labels, batch_rows=batch_rows),
    ):
        torch.testing.assert_close(found.share_SC, expected_SC, rtol=1e-9, atol=1e-12, equal_nan=True)
        assert_best(found)


def test_concepts_that_say_nothing_are_never_the_best():
    base_C = torch.full((len(CONCEPTS),), 0.5, dtype=torch.float64)
    base_C[3], base_C[7] = 1.0, 0.0
    share_SC = base_C.repeat(1, 1)
    share_SC[0, 11] = 0.6
    assert best_concepts(share_SC, base_C).concept_S.tolist() == [11]


def test_labels_of_other_images_are_refused():
    with pytest.raises(ValueError, match="599 rows"):
        latent_concepts(stored(torch.rand(N_IMAGES, 2)), OBJECTS[1:], SETTING[1:])


def test_common_depth_against_loops():
    generator = np.random.default_rng(0)
    images_SK = generator.integers(0, N_IMAGES, (5, 6))
    images_SK[1, 4:], images_SK[2, 2:], images_SK[3, 1:], images_SK[4] = -1, -1, -1, -1
    rows = [torch.tensor([i for i in images if i >= 0]) for images in images_SK.tolist()]
    found_SF = common_depth([TopImages(images, images) for images in rows], OBJECTS, SETTING)
    for s, images in enumerate(images_SK.tolist()):
        for f, factor in enumerate(FACTORS):
            paths = [shown_paths(i, factor) for i in images if i >= 0]
            depths = [max(meeting_depth(p, q) for p in a for q in b) for a, b in combinations(paths, 2)]
            expected = sum(depths) / len(depths) if depths else math.nan
            assert float(found_SF[s, f]) == pytest.approx(expected, nan_ok=True)


def meeting_depth(p: tuple[str, ...], q: tuple[str, ...]) -> int:
    if p == q:
        return 2
    # The root is everyone's; a group of one value is that value.
    return 1 if p[0] == q[0] else 0


def test_the_images_of_a_value_meet_deeper_than_those_of_its_group(planted):
    acts_NS, _ = planted
    depth_SF = common_depth(top_images(stored(acts_NS[:, : len(CONCEPTS)]), range(len(CONCEPTS)), 16), OBJECTS, SETTING)
    chance_F = chance_depth(OBJECTS, SETTING)
    best_S = best_factor_depth(depth_SF, chance_F)
    for factor, value, group in (
        ("colour", "red", "warm"),
        ("background", "navy", "dark"),
        ("shape", "ring", "curved"),
    ):
        f, v, g = FACTORS.index(factor), concept(value, factor), concept(group, factor)
        assert depth_SF[v, f] == best_S[v] == 2
        assert chance_F[f] < depth_SF[g, f] < 2


def test_spearman_of_known_numbers():
    a = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert math.isnan(spearman(a, torch.ones(5)))
    # By hand: ranks 3 1.5 4 1.5 5 and 1 2 3 4 5.
    assert spearman(a, torch.arange(5)) == pytest.approx(4 / math.sqrt(9.5 * 10))
    for bad in (torch.ones(4), torch.tensor([1.0, 2, 3, 4, math.nan])):
        with pytest.raises(ValueError, match=r"^a, b: "):
            spearman(a, bad)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_spearman_is_pearson_of_average_ranks(pairs):
    a, b = torch.tensor(pairs).unbind(1)
    ranks = [[sum(y < x for y in v) + (sum(y == x for y in v) + 1) / 2 for x in v] for v in (a.tolist(), b.tolist())]
    if min(np.ptp(rank) for rank in ranks) == 0:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_shared_value_is_the_rarest_that_all_images_show():
    objects, setting = Scenes(3, "test").labels(0, 3000)
    present = concept_presence(objects, setting)
    place = {(concept.factor, concept.name): c for c, concept in enumerate(CONCEPTS)}
    stars, teal = present[:, place["shape", "star"]], present[:, place["background", "teal"]]
    both = np.flatnonzero(stars & teal)  # teal scenes are rarer than scenes with a star
    nothing = [int(np.flatnonzero(teal)[0]), *np.flatnonzero(present[:, place["background", "navy"]])]
    groups = [both, np.flatnonzero(stars), nothing, []]
    tops = [TopImages(torch.tensor(group, dtype=torch.int64), torch.ones(len(group))) for group in groups]
    found = shared_value(tops, objects, setting)
    assert [value and value.name for value in found] == ["teal", "star", None, None]
    assert {value.depth for value in found if value} == {2}


def test_scene_words_cover_every_value_of_every_factor_once():
    words = scene_words()
    assert len(words.words) == len(words.texts) == len(set(words.words)) == len(set(words.texts)) == 47
    pairs = dict(zip(words.words, words.texts))
    assert pairs["star"] == "a star"
    assert pairs["red"] == "a red thing"
    assert pairs["teal"] == "a scene on teal"
