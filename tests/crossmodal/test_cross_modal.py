"""SAE-V's measures against their definitions, pair by pair and latent by latent, in float64."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from command import run, run_json
from saevlm_fast import cross_modal
from saevlm_fast.config import SAEConfig
from saevlm_fast.crossmodal.omega import TopTokens
from saevlm_fast.crossmodal.patch_test import first_pairs
from saevlm_fast.crossmodal.patches import PATCH_SCORES, Patches, kept_patches
from saevlm_fast.crossmodal.samples import auroc, auroc_interval, kept_pairs
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import TOKEN_SCHEMA
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.images.pairs import is_wrong
from saevlm_fast.sae import SparseAutoencoder

D, S, K = 12, 40, 3
LENGTHS = [(4, 5, 3), (0, 6, 2), (7, 1, 3), (2, 9, 3), (5, 5, 2), (3, 4, 0), (6, 8, 3), (1, 1, 1)]


def write_pairs(path, source=None, shard=17):
    """A store of ragged pairs in shards that cut them: template, image, text."""
    rng = np.random.default_rng(0)
    items = {"image": [], "token": [], "modality": [], "token_id": [], "text": []}
    for i, (n_text, n_image, n_template) in enumerate(LENGTHS):
        kinds = ["template"] * n_template + ["image"] * n_image + ["text"] * n_text
        items["image"] += [f"pair-{i}"] * len(kinds)
        items["token"] += range(len(kinds))
        items["modality"] += kinds
        items["token_id"] += range(len(kinds))
        items["text"] += [f"{kind}{j}" for j, kind in enumerate(kinds)]
    x = torch.from_numpy(rng.normal(size=(len(items["image"]), D)).astype(np.float32))
    source = {"point": "language", "layer": 0, "tokens": "all", "seed": 5} | (source or {})
    with ActivationWriter(path, D, torch.float32, source, rows_per_shard=shard) as writer:
        writer.append(x, items)
    return x, items


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    x, items = write_pairs(path / "store", {"images": {"wrong_captions": 0.5}})
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(D, S, 6, "topk"))
    sae.reset_parameters(0)
    sae.save_pretrained(path / "sae")
    return path, x, items, sae


def brute_force(x, items, sae, k, threshold, template):
    """Every definition as it is written, one latent and one pair at a time."""
    z = sae.encode(x).dense().double().detach().numpy()
    x = x.double().numpy()
    modality, image = np.array(items["modality"]), np.array(items["image"])
    is_text = np.isin(modality, ["text", "template"] if template else ["text"])
    is_image = modality == "image"
    omega = np.full(S, np.nan)
    for latent in range(S):
        tops = []
        for rows in (np.flatnonzero(is_text), np.flatnonzero(is_image)):
            firing = [r for r in rows if z[r, latent] > 0]
            tops.append(sorted(firing, key=lambda r: (-z[r, latent], r))[:k])
        if min(map(len, tops)) == k:
            cosines = [x[a] @ x[b] / np.linalg.norm(x[a]) / np.linalg.norm(x[b]) for a in tops[0] for b in tops[1]]
            omega[latent] = np.mean(cosines)
    found = {"cosine": [], "co_occurrence": [], "count": [], "n_text": [], "n_image": []}
    patches = {"cosine": [], "co_occurrence": [], "count": [], "activation": []}
    for name in dict.fromkeys(items["image"]):
        mine = image == name
        text = (z[mine & is_text] > threshold).any(0)
        seen = (z[mine & is_image] > threshold).any(0)
        found["cosine"].append(np.nansum(omega[text & seen]))
        found["co_occurrence"].append((text & seen).sum())
        found["count"].append((text | seen).sum())
        found["n_text"].append((mine & is_text).sum())
        found["n_image"].append((mine & is_image).sum())
        for row in np.flatnonzero(mine & is_image):
            scores = dict.fromkeys(patches, 0.0)
            for latent in np.flatnonzero(z[row] > threshold):
                scores["count"] += 1
                scores["activation"] += z[row, latent]
                if text[latent]:
                    scores["co_occurrence"] += 1
                    scores["cosine"] += np.nan_to_num(omega[latent])
            for score, value in scores.items():
                patches[score].append(value)
    return omega, found, patches


@pytest.mark.parametrize(
    ("batch_rows", "threshold", "template"), [(1, 0.4, False), (5, 0.0, False), (23, 0.4, True), (1000, 0.4, False)]
)
def test_omegas_and_scores_are_their_definitions(pairs, batch_rows, threshold, template):
    path, x, items, sae = pairs
    omega, expected, expected_patches = brute_force(x, items, sae, K, threshold, template)
    parts = []
    store = open_activations(path / "store")
    settings = {"top": K, "threshold": threshold, "template": template}
    found = cross_modal(store, sae, batch_rows=batch_rows, on_patches=parts.append, **settings)
    assert 3 <= int((~np.isnan(omega)).sum()) < S
    np.testing.assert_allclose(found.omega_S, omega, rtol=0, atol=1e-6)
    assert found.ids == list(dict.fromkeys(items["image"]))
    patches = Patches(*map(np.concatenate, zip(*(part.columns.values() for part in parts))))
    for scores, values in ((found.columns, expected), (patches.columns, expected_patches)):
        for name, each in values.items():
            np.testing.assert_allclose(scores[name], each, rtol=0, atol=1e-6)
    assert np.abs(expected["cosine"]).max() > 0.05
    assert patches.row.tolist() == np.flatnonzero(np.array(items["modality"]) == "image").tolist()
    assert patches.patch.tolist() == [i for _, n, _ in LENGTHS for i in range(n)]
    whole = []  # the random column does not depend on how rows come
    cross_modal(store, sae, on_patches=whole.append, **settings)
    assert np.array_equal(np.concatenate([each.random for each in whole]), patches.random)


def test_top_tokens_however_rows_come_and_ties_go_to_the_earlier():
    rng = np.random.default_rng(0)
    act = rng.integers(1, 5, 300).astype(float)
    latent, row = rng.integers(0, 7, 300), np.arange(300)
    tops = TopTokens(8, 4)
    for part in np.array_split(np.arange(300), [1, 30, 31, 200]):
        tops.add(act[part], latent[part], row[part])
    for each in range(8):
        mine = np.flatnonzero(latent == each)
        expected = mine[np.lexsort((mine, -act[mine]))][:4]
        assert tops.row_SK[each].tolist() == [*expected, *[-1] * (4 - len(expected))]
    assert tops.full_S.tolist() == [True] * 7 + [False]


def test_controls_and_what_is_kept(pairs):
    path, _, _, sae = pairs
    store = open_activations(path / "store")
    found = cross_modal(store, sae, top=K, threshold=0.1, keep=0.25, by="co_occurrence", seed=3)
    assert int(found.columns["kept"].sum()) == 2
    kept, left = found.columns["co_occurrence"][found.columns["kept"]], found.columns["co_occurrence"]
    assert kept.min() >= np.sort(left)[-2]
    same = cross_modal(store, sae, top=K, threshold=0.1, seed=3)
    assert np.array_equal(same.columns["random"], found.columns["random"])
    assert not np.array_equal(same.columns["random"], cross_modal(store, sae, top=K, seed=4).columns["random"])
    assert not np.allclose(found.columns["shuffled"], found.columns["cosine"])
    wrong = [is_wrong(name, 0.5, 5) for name in found.ids]
    assert found.wrong_P.tolist() == wrong
    assert set(found.detection()) == {"cosine", "co_occurrence", "count", "random", "shuffled", "n_text"}
    for alike in (np.zeros(len(wrong), bool), np.ones(len(wrong), bool), None):
        assert replace(found, wrong_P=alike).detection() == {}


def test_auroc_with_ties_and_its_interval():
    rng = np.random.default_rng(0)
    scores, wrong = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.4
    right = scores[~wrong][:, None]
    expected = ((right > scores[wrong]) + 0.5 * (right == scores[wrong])).mean()
    assert auroc(scores, wrong) == pytest.approx(expected, abs=1e-12)
    low, high = auroc_interval(scores, wrong, 0)
    assert low < expected < high
    assert np.isnan(auroc(scores, np.zeros(80, bool)))


def test_shares_that_are_kept():
    random = np.random.default_rng(0).random(40)
    assert kept_pairs(np.array([1.0, 3.0, 3.0, 2.0]), 0.5, random[:4]).tolist() == [False, True, True, False]
    assert kept_pairs(np.array([1.0, 1.0, 1.0]), 1 / 3, np.array([0.2, 0.1, 0.9])).tolist() == [False, False, True]
    assert kept_pairs(np.array([1.0]), 0.5, np.array([0.2])).tolist() == [True]  # one at least
    scores = np.repeat([0.0, 5.0, 1.0, 5.0], 10)  # of the twenty best, equal ones, ten are kept
    kept = kept_pairs(scores, 0.25, random)
    best = np.flatnonzero(scores == 5)
    assert np.flatnonzero(kept).tolist() == sorted(best[np.argsort(-random[best])[:10]])
    assert kept[10:20].any()
    assert kept[30:].any()


def test_patches_that_are_kept_image_by_image():
    rng = np.random.default_rng(0)
    sample = np.repeat([0, 2, 5], [7, 1, 10])
    columns = {name: rng.integers(0, 3, 18).astype(float) for name in PATCH_SCORES} | {"random": rng.random(18)}
    patches = Patches(sample, np.arange(18), np.arange(18), **columns)
    for by, share, least in (
        ("cosine", 0.5, False),
        ("activation", 0.3, True),
        ("random", 0.25, False),
        ("count", 1, False),
    ):
        kept = kept_patches(patches, share, by, least)
        for image in (0, 2, 5):
            mine = np.flatnonzero(sample == image).tolist()
            value = getattr(patches, by) * (1 if least else -1)
            best = sorted(mine, key=lambda i: (value[i], -patches.random[i]))[: round(share * len(mine))]
            assert sorted(best) == [i for i in mine if kept[i]]


def test_the_command(pairs, tmp_path):
    path, x, items, sae = pairs
    call = ("cross-modal", "--activations", path / "store", "--sae", path / "sae", "--top", K, "--threshold", 0.4)
    call += ("--device", "cpu", "--output", tmp_path / "out")
    planned = run_json(*call, "--dry-run")
    assert planned["rows"] == len(x)
    assert not (tmp_path / "out").exists()
    told = run_json(*call)
    omega, expected, _ = brute_force(x, items, sae, K, 0.4, False)
    latents = pq.read_table(tmp_path / "out" / "latents.parquet").to_pydict()
    assert [value is None for value in latents["omega"]] == np.isnan(omega).tolist()
    samples = pq.read_table(tmp_path / "out" / "samples.parquet").to_pydict()
    np.testing.assert_allclose(samples["cosine"], expected["cosine"], atol=1e-6)
    kept = (tmp_path / "out" / "kept.txt").read_text().split()
    assert kept == [name for name, keep in zip(samples["image"], samples["kept"]) if keep]
    assert len(kept) == told["kept"] == 4
    summary = json.loads((tmp_path / "out" / "cross_modal.json").read_text())
    assert summary["latent_kinds"]["scored"] == int((~np.isnan(omega)).sum())
    assert summary["settings"]["top"] == K
    patches = pq.read_table(tmp_path / "out" / "patches.parquet")
    assert len(patches) == sum(n for _, n, _ in LENGTHS)
    shares = {n: round(0.75 * n) for _, n, _ in LENGTHS}
    kept_rows = patches.group_by("sample").aggregate([("kept", "sum")]).to_pydict()
    assert [kept_rows["kept_sum"][i] for i in np.argsort(kept_rows["sample"])] == [shares[n] for _, n, _ in LENGTHS]
    scored = int(np.flatnonzero(~np.isnan(omega))[0])
    assert all(word.startswith("text") for word in latents["text"][scored])
    assert len(latents["image_tokens"][scored]) == K
    before = (tmp_path / "out" / "kept.txt").read_bytes()
    assert "already holds results; --force replaces them" in run(*call, code=2)
    run(*call, "--force", "--keep", 0.25)
    assert len((tmp_path / "out" / "kept.txt").read_text().split()) == 2
    assert (tmp_path / "out" / "kept.txt").read_bytes() != before


def test_pairs_that_a_dry_run_looks_at(tmp_path):
    write_pairs(tmp_path / "whole", shard=1000)
    write_pairs(tmp_path / "cut", shard=30)  # the third pair is cut
    for name, expected in (("whole", [0, 2, 3]), ("cut", [0])):
        ids, patches, n_pairs = first_pairs(open_activations(tmp_path / name), 0)
        assert np.unique(patches.sample).tolist() == expected  # the second has no text
        assert len(patches.row) == sum(LENGTHS[i][1] for i in expected)
        assert ids[0] == "pair-0"
        assert n_pairs == len(LENGTHS)


def test_clip_is_a_control_on_the_box(box, tmp_path):
    call = (*box, "--clip", "hf:tiny-clip")
    told = run_json(*call, "--output", tmp_path / "out")
    assert told["detection"]["clip"]["auroc"] > 0.8  # the box's CLIP knows its scenes
    assert 4 <= told["wrong"] <= 20
    said = "error: clip: 'timm:x' is not hf:NAME_OR_DIR"
    assert said in run(*box, "--clip", "timm:x", "--output", tmp_path / "no", code=2)
    call = (*call, "--output", tmp_path / "no", "--images")
    assert "images: " in run(*call, tmp_path / "nowhere", code=2)
    few = (*box, "--clip", "hf:tiny-clip", "--images", "scenes:test:20", "--output", tmp_path / "few")
    assert "images: 4 of 24 pairs are not there or not usable, and have no cosine of --clip" in run(*few)
    assert not (tmp_path / "no" / "cross_modal.json").exists()


def test_what_is_kept_is_harvested_and_trained_on(box, pairs_of_the_box, tmp_path):
    run(*box, "--keep", 0.25, "--output", tmp_path / "out")
    kept = (tmp_path / "out" / "kept.txt").read_text().split("\n")[:-1]
    assert len(kept) == 6
    run(*pairs_of_the_box, "--only", tmp_path / "out" / "kept.txt", "--output", tmp_path / "kept")
    before, after = (
        open_activations(path).items(schema=TOKEN_SCHEMA).to_pandas() for path in (box[2], tmp_path / "kept")
    )
    assert list(dict.fromkeys(after["image"])) == kept
    columns = ["image", "token", "modality", "token_id"]  # the captions too, the wrong ones among them
    same = before[before["image"].isin(kept)][columns].reset_index(drop=True)
    assert same.equals(after[columns])
    train = ("train", "--activations", tmp_path / "kept", "--d-sae", 32, "--k", 4, "--steps", 2, "--batch-size", 32)
    run(*train, "--device", "cpu", "--output", tmp_path / "sae")
    call = ("cross-modal", "--activations", tmp_path / "kept", "--sae", tmp_path / "sae", "--device", "cpu")
    told = run_json(*call, "--clip", "hf:tiny-clip", "--output", tmp_path / "again")
    assert told["pairs"] == 6
    missing = tmp_path / "missing.txt"
    missing.write_text("nobody\n")
    assert "only: " in run(*pairs_of_the_box, "--only", missing, "--output", tmp_path / "no", code=2)


def test_bad_input(pairs, tmp_path):
    path, x, _, _ = pairs
    plain = {"image": [str(i) for i in range(len(x))], "token": [0] * len(x)}
    with ActivationWriter(tmp_path / "vision", D, torch.float32, {"point": "residual"}) as writer:
        writer.append(x, plain)
    write_pairs(tmp_path / "text", {"tokens": "text"})
    np.save(tmp_path / "matrix.npy", x.numpy())
    wide = SparseAutoencoder(SAEConfig(D + 1, S, 6, "topk"))
    wide.save_pretrained(tmp_path / "wide")
    call = {"--activations": path / "store", "--sae": path / "sae", "--device": "cpu", "--output": tmp_path / "out"}
    for changes, said in (
        ({"--activations": tmp_path / "vision"}, "its rows have no modality (point residual)"),
        ({"--activations": tmp_path / "text"}, "holds tokens text, one modality alone"),
        ({"--activations": tmp_path / "matrix.npy"}, "a matrix has no modality"),
        ({"--sae": tmp_path / "wide"}, "sae: d_in is 13"),
        ({"--top": 0}, "top"),
        ({"--keep": 1.5}, "keep"),
        ({"--keep": 0}, "keep: 0.0 must be above 0, at most 1"),
        ({"--by": "x"}, "by"),
        ({"--top": 40}, "top: 40: no latent fires on 40 text and 40 image tokens, "),
        ({"--threshold": 1000}, "threshold: 1000 is above every activation"),
        ({"--clip": "hf:tiny-clip"}, "does not say where its pairs are; give --images"),
    ):
        words = [str(word) for pair in (call | changes).items() for word in pair]
        assert said in run("cross-modal", *words, code=2)
    with pytest.raises(ValueError, match="topp: no setting of cross_modal; did you mean 'top'"):
        cross_modal(open_activations(path / "store"), wide, topp=3)
