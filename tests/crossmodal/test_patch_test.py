"""What a model says of captions with some patches alone, against a forward without the tokens of the others."""

import copy
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_vlms import FAMILIES, tiny_vlm

from command import run, run_json
from saevlm_fast import open_activations
from saevlm_fast.crossmodal.output import read_patches
from saevlm_fast.crossmodal.patch_test import (
    FILTERS,
    PartlySeen,
    PatchTest,
    pairs_to_test,
    patch_test,
)
from saevlm_fast.images.open import open_images
from saevlm_fast.towers.language import LanguageTower, load_language

PROMPT = "Describe the image."
SHARES = (0.25, 0.6)


@pytest.fixture(scope="module")
def tested(box, tmp_path_factory):
    """Directory of results, what was called, and what it said of a test of patch filters on three pairs."""
    path = tmp_path_factory.mktemp("tested")
    call = (*box, "--threshold", 0.2, "--patch-pairs", 3, "--patch-shares", "0.25,0.6")
    return path, call, run_json(*call, "--output", path / "out")


@pytest.fixture(scope="module")
def llava():
    return load_language("hf:tiny-llava", prompt=PROMPT)


def without_dropped(model, piece, kept):
    """log_prob and right of a caption in float64, of a sequence that never had the dropped tokens."""
    ids, modality = piece["input_ids"][0], piece["modality"][0].tolist()
    caught = []
    catch = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    pixels = piece["pixel_values"].double()
    model(input_ids=ids[None], pixel_values=pixels, attention_mask=torch.ones_like(ids)[None])
    catch.remove()
    image = [t for t, kind in enumerate(modality) if kind == 2]
    gone = {t for t, keep in zip(image, kept) if not keep}
    left = [t for t in range(len(ids)) if t not in gone]
    places = torch.tensor([left])
    states = model.model.language_model(inputs_embeds=caught[0][:, left], position_ids=places).last_hidden_state[0]
    log_p = model.lm_head(states).log_softmax(-1)
    said, right = [], []
    for t, kind in enumerate(modality):
        if kind == 1:
            before = left.index(t) - 1
            said.append(float(log_p[before, ids[t]]))
            right.append(int(log_p[before].argmax()) == int(ids[t]))
    return np.mean(said), np.mean(right)


def test_what_is_said_is_what_a_shorter_prompt_says(tested, llava):
    path, _, told = tested
    tests = pq.read_table(path / "out" / "patch_test.parquet").to_pylist()
    ids = pq.read_table(path / "out" / "samples.parquet")["image"].to_pylist()
    patches = pq.read_table(path / "out" / "patches.parquet").to_pylist()
    source, model = open_images("scenes:test:24"), copy.deepcopy(llava.model).double()
    numbers = {source.image_id(i): i for i in range(24)}
    used = list(dict.fromkeys(row["image"] for row in tests))
    assert len(used) == 3 == told["patch_test"]["pairs"]
    assert len(tests) == 3 * (len(FILTERS) * len(SHARES) + 2)
    seen = {}
    for row in tests:
        i = numbers[row["image"]]
        mine = [each for each in patches if each["sample"] == ids.index(row["image"])]
        score, least = FILTERS.get(row["filter"], ("random", False))
        order = sorted(mine, key=lambda each: (each[score] if least else -each[score], -each["random"]))
        kept = {each["patch"] for each in order[: round(row["share"] * len(mine))]}
        picture = Image.open(io.BytesIO(source.read(i))).convert("RGB")
        piece = llava.preprocess([(picture, source.caption(i))])
        key = row["image"], *sorted(kept)
        if key not in seen:
            seen[key] = without_dropped(model, piece, [j in kept for j in range(len(mine))])
        assert row["log_prob"] == pytest.approx(seen[key][0], abs=1e-4)
        assert row["right"] == pytest.approx(seen[key][1], abs=1e-9)
    assert len({round(said, 3) for said, _ in seen.values()}) > 20  # what is kept matters


def test_summary_is_of_the_table(tested):
    path, _, told = tested
    table = pq.read_table(path / "out" / "patch_test.parquet").to_pandas()
    mean = table.groupby(["filter", "share"])[["log_prob", "right"]].mean()
    full, blind = mean.loc[("all", 1.0)], mean.loc[("none", 0.0)]
    assert told["patch_test"]["all"] == pytest.approx(dict(full))
    assert told["patch_test"]["none"] == pytest.approx(dict(blind))
    assert full["log_prob"] > blind["log_prob"]
    assert len(told["patch_test"]["filters"]) == len(FILTERS) * len(SHARES)
    for row in told["patch_test"]["filters"]:
        log_prob, right = mean.loc[(row["filter"], row["share"])]
        others = mean.loc[("random", row["share"])]["log_prob"]
        recovered = (log_prob - blind["log_prob"]) / (full["log_prob"] - blind["log_prob"])
        for name, value in {
            "log_prob": log_prob,
            "right": right,
            "over_random": log_prob - others,
            "recovered": recovered,
        }.items():
            assert row[name][0] == pytest.approx(value, abs=1e-9)
            assert row[name][1] <= row[name][0] + 1e-9
            assert row[name][0] <= row[name][2] + 1e-9
        assert row["filter"] != "random" or row["over_random"] == [0.0, 0.0, 0.0]


def test_intervals_are_over_pairs():
    rng = np.random.default_rng(0)
    log_prob = rng.normal(-1, 0.5, (len(FILTERS), 1, 400))
    ends = np.stack([np.zeros(400), np.full(400, -2.0)])
    test = PatchTest([str(i) for i in range(400)], (0.5,), log_prob, log_prob, ends, ends)
    for f, row in enumerate(test.summary()["filters"]):
        mean, low, high = row["log_prob"]
        half = 1.96 * log_prob[f].std() / 20
        assert low == pytest.approx(mean - half, abs=0.02)
        assert high == pytest.approx(mean + half, abs=0.02)
        assert row["recovered"][0] == pytest.approx((mean + 2) / 2)
    blind = PatchTest(test.ids, (0.5,), log_prob, log_prob, ends[[1, 1]], ends)
    assert {row["recovered"] for row in blind.summary()["filters"]} == {None}


def test_which_pairs_are_tested():
    columns = {"n_image": np.array([2, 2, 0, 2, 2]), "n_text": np.array([1, 1, 1, 0, 1])}
    wrong = np.array([False, True, False, False, False])
    assert pairs_to_test(columns, wrong, 9, 0).tolist() == [0, 4]
    assert pairs_to_test(columns, None, 9, 0).tolist() == [0, 1, 4]
    assert len(pairs_to_test(columns, None, 2, 0)) == 2
    with pytest.raises(ValueError, match="patch_pairs: no pair has an image and a caption"):
        pairs_to_test(columns, np.ones(5, bool), 9, 0)


def test_models_whose_image_tokens_cannot_be_hidden_are_refused():
    model, processor = tiny_vlm("blip2")
    with pytest.raises(ValueError, match=r"blip2: Blip2For.* hidden tokens change the places of others"):
        PartlySeen(LanguageTower("blip2", model, processor, None))
    model, processor = tiny_vlm("llava")
    tower = LanguageTower("llava", model, processor, None)
    PartlySeen(tower)
    tower.anatomy.blocks[0].register_forward_hook(lambda module, args, x: x + x.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="its pixels come in by other ways too"):
        PartlySeen(tower)


# One that is given its mask behind what finds the places of tokens and one that makes its own, always; all of them by
# `pytest -m families`.
ALWAYS = ("qwen2_vl", "gemma3")


@pytest.mark.parametrize(
    "family",
    [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.families) for n in FAMILIES if n != "blip2"],
)
def test_every_family_hides_patches(family, request):
    if family not in ALWAYS and "families" not in request.config.getoption("markexpr"):
        pytest.skip("takes longer: pytest -m families")
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs it")
    tower = LanguageTower(family, *tiny_vlm(family), "describe the image .")
    model = PartlySeen(tower)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    piece = tower.preprocess([(picture, "a red square")])
    n = int((piece["modality"] == 2).sum())
    log_prob, _ = model.said(piece, torch.eye(n, dtype=torch.bool)[:3])
    assert np.isfinite(log_prob).all()
    assert len(set(log_prob.round(9))) == min(3, n)


@pytest.mark.parametrize("family", ["qwen2_vl", pytest.param("qwen3_vl", marks=pytest.mark.families)])
@torch.no_grad()
def test_places_in_three_dimensions_stay(family, request):
    """Against a forward in float64 without the dropped tokens, whose places are those of the whole prompt; Qwen3-VL
    adds pixels behind its first blocks too."""
    if family != "qwen2_vl" and "families" not in request.config.getoption("markexpr"):
        pytest.skip("takes longer: pytest -m families")
    tower = LanguageTower(family, *tiny_vlm(family), "describe the image .")
    seen = PartlySeen(tower)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    piece = tower.preprocess([(picture, "a red square")])
    ids, modality, caught = piece["input_ids"][0], piece["modality"][0], []
    image = (modality == 2).nonzero().flatten()
    kept = torch.arange(len(image)) % 2 == 0
    found, _ = seen.said(piece, kept[None])
    model = copy.deepcopy(tower.model).double()
    reader = model.model.language_model
    catch = reader.register_forward_pre_hook(lambda module, args, given: caught.append(given), with_kwargs=True)
    model(**{name: x.double() if x.is_floating_point() else x for name, x in piece.items() if name != "modality"})
    catch.remove()
    (given,) = caught
    left = [t for t in range(len(ids)) if t not in image[~kept].tolist()]
    deep = {}
    if (places := given.get("visual_pos_masks")) is not None:
        deep = {"visual_pos_masks": places[:, left]}
        deep["deepstack_visual_embeds"] = [each[kept] for each in given["deepstack_visual_embeds"]]
    assert given["position_ids"].ndim == 3
    states = reader(
        inputs_embeds=given["inputs_embeds"][:, left], position_ids=given["position_ids"][..., left], **deep
    ).last_hidden_state[0]
    log_p = model.lm_head(states).log_softmax(-1)
    text = [t for t in range(1, len(ids)) if modality[t] == 1 and modality[t - 1] != 2]
    expected = np.mean([float(log_p[left.index(t) - 1, ids[t]]) for t in text])
    assert found[0] == pytest.approx(expected, abs=1e-6)
    assert found[0] != pytest.approx(float(seen.said(piece, torch.ones_like(kept)[None])[0][0]), abs=1e-5)


def test_a_dry_run_has_the_time_of_all_parts(tested, tmp_path, monkeypatch):
    from saevlm_fast.cli import looking

    _, call, _ = tested

    class Steady(looking.Stopwatch):
        def __call__(self, done):
            self.seconds_each = 0.001
            raise looking.Enough

    monkeypatch.setattr(looking, "Stopwatch", Steady)
    for more, n_pairs in ((("--patch-pairs", 0), 0), ((), 3), (("--clip", "hf:tiny-clip", "--patch-pairs", 100), 48)):
        told = run_json(*call, *more, "--output", tmp_path / "out", "--dry-run")
        assert told["time_seconds"] == pytest.approx(0.001 * (2 * told["rows"] + n_pairs))


def test_bad_input(tested, llava, tmp_path):
    path, call, _ = tested
    for words, said in (
        (("--patch-shares", "0.5,1"), "patch_shares: "),
        (("--patch-shares", "0.5,0.5"), "patch_shares: "),
        (("--patch-shares", "x"), "patch_shares"),
        (("--patch-pairs", -1), "patch_pairs: -1"),
        (("--patches-by", "x"), "patches_by"),
        (("--model", "hf:tiny-clip"), "hf:tiny-clip"),
        (("--images", "scenes:train:24"), "images: scenes:train:24: none of the pairs of"),
    ):
        assert said in run(*call, *words, "--output", tmp_path / "out", code=2)
        assert not (tmp_path / "out" / "cross_modal.json").exists()
    other = load_language("hf:tiny-llava")  # without the prompt that the store had
    store, samples = open_activations(call[2]), np.array([0])
    patches = read_patches(path / "out", samples)
    ids = pq.read_table(path / "out" / "samples.parquet")["image"].to_pylist()
    with pytest.raises(ValueError, match="the prompt has other tokens"):
        patch_test(store, patches, ids, open_images("scenes:test:24"), PartlySeen(other), SHARES)
