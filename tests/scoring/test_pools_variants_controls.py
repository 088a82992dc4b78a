"""Rows of an image pooled, the other scores by slow direct definitions, untrained SAEs at matched firing counts."""

import math
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from true_scores import close

from command import run_json
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.kernels import reference
from saevlm_fast.measures.codes import dense_codes
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.controls import Match, compare_with_untrained, untrained_like
from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, score
from saevlm_fast.scoring.patch_score import patch_score
from saevlm_fast.scoring.source import ScoredImages
from saevlm_fast.scoring.sums import STATUSES
from saevlm_fast.scoring.trust import trusted_score
from saevlm_fast.scoring.variants import tms_score, visaebench_score

N_IMAGES, D_IN, D_SAE, D_EMB = 40, 8, 24, 6


def write(path, rows, images, tokens):
    with ActivationWriter(path, rows.shape[1], torch.float32, {}, rows_per_shard=17) as writer:
        writer.append(rows, {"image": list(images), "token": list(tokens)})
    return open_activations(path)


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """A store with 1 to 4 rows an image, patch embeddings, embeddings of images in another order, and an SAE."""
    path, generator = tmp_path_factory.mktemp("patches"), torch.Generator().manual_seed(0)
    counts = torch.randint(1, 5, (N_IMAGES,), generator=generator)
    image_of_row = torch.repeat_interleave(counts)
    tokens = torch.cat([torch.arange(int(n)) for n in counts]).tolist()
    names = [f"{i}.jpg" for i in image_of_row.tolist()]
    x_BD = torch.randn(len(image_of_row), D_IN, generator=generator)
    patch_BE = torch.randn(len(image_of_row), D_EMB, generator=generator) + 0.2
    emb_NE = torch.randn(N_IMAGES, D_EMB, generator=generator) + 0.2
    order = torch.randperm(N_IMAGES, generator=generator)
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, 3, "topk")).eval()
    with torch.no_grad():
        codes = sae.encode(x_BD)
    with CodesWriter(path / "codes", D_SAE, torch.float32, {}) as writer:
        writer.write_shard(0, codes, {"image": names, "token": tokens})
    stores = {
        "x": write(path / "x", x_BD, names, tokens),
        "patch": write(path / "patch", patch_BE, names, tokens),
        "emb": write(path / "emb", emb_NE[order], [f"{i}.jpg" for i in order.tolist()], [0] * N_IMAGES),
    }
    dense_BS = codes.dense().double()
    sae.save_pretrained(path / "sae")
    known = {"path": path, "sae": sae, "image_of_row": image_of_row, "dense": dense_BS, "x_BD": x_BD}
    return {**known, "patch_BE": patch_BE.double(), "emb_NE": emb_NE.double(), **stores}


def pooled(rows_BS, image_of_row, pool):
    parts = [rows_BS[image_of_row == i] for i in range(N_IMAGES)]
    return torch.stack([part.amax(0) if pool == "max" else part.mean(0) for part in parts])


# Pooling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [2, 7, 1000])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_rows_of_an_image_are_pooled(patches, pool, batch_rows):
    expected = reference.monosemanticity(pooled(patches["dense"], patches["image_of_row"], pool), patches["emb_NE"])
    codes = open_codes(patches["path"] / "codes")
    options = {"pool": pool, "batch_rows": batch_rows}
    for rows, sae in ((patches["x"], patches["sae"]), (codes, None)):
        found = score(rows, patches["emb"], sae, **options)
        close(found.ms, expected, 1e-6)  # means are rounded to float32
        assert found.n_images == N_IMAGES
        close(trusted_score(rows, patches["emb"], sae, null=False, **options).ms, found.ms, 1e-12)
        by_order = score(rows, patches["emb_NE"], sae, **options)  # without ids, images in the order they appear
        close(by_order.ms, found.ms, 1e-6)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_raw_neurons_are_pooled(patches, pool):
    acts_NK = pooled(patches["x_BD"].double(), patches["image_of_row"], pool)
    found = score(patches["x"], patches["emb"], pool=pool, batch_rows=9)
    close(found.ms, reference.monosemanticity(acts_NK, patches["emb_NE"]), 1e-5)


def test_what_a_pool_refuses(patches, tmp_path):
    x = patches["x"]
    few = write(tmp_path / "few", patches["emb_NE"][:3].float(), ["0.jpg", "1.jpg", "2.jpg"], [0, 0, 0])
    with pytest.raises(ValueError, match=r"few has no row of image '3\.jpg'"):
        score(x, few, pool="max")
    with pytest.raises(ValueError, match="patch has several rows of an image"):
        score(x, patches["patch"], pool="max")
    with pytest.raises(ValueError, match=r"39 rows .*fewer than images"):
        score(x, patches["emb_NE"][:-1], pool="max")
    with pytest.raises(ValueError, match=r"41 rows .*but 40 images"):
        score(x, torch.cat([patches["emb_NE"], patches["emb_NE"][:1]]), pool="max")
    with pytest.raises(ValueError, match="has no image ids"):
        score(patches["x_BD"], patches["emb_NE"], pool="max")
    with pytest.raises(ValueError, match="pool: 'sum' is not one of max, mean"):
        score(x, patches["emb"], pool="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the score needs one row per image"):
        score(x, patches["patch"])


@pytest.mark.parametrize("kept_bytes", [0, 300, 1 << 30])
def test_codes_that_do_not_fit_are_encoded_again(patches, kept_bytes):
    options = {"batch_rows": 8, "kept_bytes": kept_bytes}
    images = ScoredImages(patches["x_BD"], {"": patches["patch_BE"]}, patches["sae"], **options)
    for _ in range(2):
        read = [codes.dense() for _, codes, _ in images.chunks()]
        assert torch.equal(torch.cat(read).double(), patches["dense"])


# Variants ------------------------------------------------------------------------------------------------------------


def slow_visaebench(acts_NS, emb_NE, n_top):
    scores = []
    for a_N in acts_NS.T:
        chosen = a_N.sort(descending=True, stable=True).indices[:n_top]
        r_n = (a_N - a_N.min())[chosen] / (a_N.max() - a_N.min())
        unit_nE = torch.nn.functional.normalize(emb_NE[chosen], dim=1)
        pairs_nn = (r_n[:, None] * r_n).triu(1)
        scores.append((pairs_nn * (unit_nE @ unit_nE.T)).sum() / pairs_nn.sum())
    return torch.stack(scores)


@pytest.mark.parametrize("n_top", [3, 16])
def test_visaebench_is_of_the_top_images(patches, n_top):
    acts_NS = pooled(patches["dense"], patches["image_of_row"], "max")
    found = visaebench_score(patches["x"], patches["emb"], patches["sae"], pool="max", n_top=n_top, batch_rows=11)
    assert found.variant == "visaebench"
    close(found.ms, slow_visaebench(acts_NS, patches["emb_NE"], n_top), 1e-6)
    assert torch.equal(found.n_active, (acts_NS > 0).sum(0))
    raw = visaebench_score(patches["x_BD"], patches["patch_BE"], n_top=n_top, batch_rows=11)
    close(raw.ms, slow_visaebench(patches["x_BD"].double(), patches["patch_BE"], n_top), 1e-6)


def slow_tms(acts_NS):
    on_NS = acts_NS > acts_NS.mean(0)
    scores = []
    for s in range(acts_NS.shape[1]):
        members = on_NS[on_NS[:, s]]
        pairs = [
            int((members[i] & members[j]).sum()) / int((members[i] | members[j]).sum())
            for i in range(len(members))
            for j in range(i)
        ]
        scores.append(np.mean(pairs) if pairs else math.nan)
    return torch.tensor(scores, dtype=torch.float64)


def test_tms_is_the_mean_jaccard_index(patches):
    found = tms_score(patches["x_BD"], patches["sae"], batch_rows=13)
    close(found.ms, slow_tms(patches["dense"]))
    assert found.similarity == "jaccard"
    some = tms_score(patches["x_BD"], patches["sae"], n_pairs=200)
    assert float((some.ms - found.ms).abs().nan_to_num(0).max()) < 5 * 0.5 / math.sqrt(200)  # a share in [0, 1]
    with pytest.raises(ValueError, match="raw neurons have no sets"):
        tms_score(patches["x_BD"])


def slow_patches(dense_BS, patch_BE, image_of_row):
    unit_BE = torch.nn.functional.normalize(patch_BE, dim=1)
    apart_BB = (image_of_row[:, None] != image_of_row).double()
    num_S = (dense_BS * ((unit_BE @ unit_BE.T * apart_BB) @ dense_BS)).sum(0)
    return num_S / (dense_BS * (apart_BB @ dense_BS)).sum(0)


@pytest.mark.parametrize("batch_rows", [2, 6, 1000])
def test_patches_of_one_image_are_no_pair(patches, batch_rows, monkeypatch):
    monkeypatch.setattr("saevlm_fast.scoring.patch_score._PATCH_ELEMENTS", 20 * D_EMB)
    found = patch_score(patches["x"], patches["patch"], patches["sae"], batch_rows=batch_rows)
    expected = slow_patches(patches["dense"], patches["patch_BE"], patches["image_of_row"])
    close(found.ms, expected, 1e-6)  # of other batches the SAE's last bits differ
    assert torch.equal(found.n_active, (pooled(patches["dense"], patches["image_of_row"], "max") > 0).sum(0))
    codes = open_codes(patches["path"] / "codes")
    again = patch_score(codes, patches["patch"], batch_rows=batch_rows)
    close(again.ms, expected)
    images, dense = patches["image_of_row"], patches["dense"]
    n, active_S = int(images.max()) + 1, again.n_active
    without_NS = torch.stack(
        [slow_patches(dense[images != i], patches["patch_BE"][images != i], images[images != i]) for i in range(n)]
    )
    changes_NS = without_NS - expected
    expected_S = ((n - 1) / n * (changes_NS.square().sum(0) - changes_NS.sum(0).square() / n)).sqrt()
    assert int((active_S > 2).sum()) > 3
    close(again.se, expected_S.masked_fill(active_S < 3, math.nan))
    mean_N = without_NS.nanmean(1) - expected.nanmean()
    error = ((n - 1) / n * (mean_N.square().sum() - mean_N.sum().square() / n)).sqrt()
    assert again.mean_interval[1] - float(expected.nanmean()) == pytest.approx(1.959964 * float(error), rel=1e-5)
    assert again.table().column_names[-3:] == ["se", "ms_low", "ms_high"]
    alone = patch_score(codes, patches["patch"], batch_rows=batch_rows, intervals=False)
    assert alone.se is None
    assert math.isnan(alone.mean_interval.low)


def test_what_patches_refuse(patches, tmp_path):
    x, sae = patches["x"], patches["sae"]
    with pytest.raises(ValueError, match="row i of both must be the same patch"):
        patch_score(x, patches["emb"], sae)
    with pytest.raises(ValueError, match="patch takes codes"):
        patch_score(x, patches["patch"])
    names = x.items()["image"].to_pylist()
    other = write(tmp_path / "o", patches["patch_BE"].float(), names, [99] * len(names))
    with pytest.raises(ValueError, match="row 0 is not the same token"):
        patch_score(x, other, sae)


SCORES = {"visaebench": visaebench_score, "patch": patch_score}


@pytest.mark.parametrize("variant", ["visaebench", "tms", "patch"])
def test_statuses_of_variants(variant, tmp_path):
    """dead, on one image, on two; and d_sae 1 below."""
    acts_NS = torch.zeros(5, 3)
    acts_NS[1, 1], acts_NS[1, 2], acts_NS[3, 2] = 1.0, 2.0, 1.0
    emb_NE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for columns in (slice(None), slice(2, 3)):
        codes = dense_codes(acts_NS[:, columns])
        with CodesWriter(tmp_path / f"c{columns.start}", codes.d_sae, torch.float32, {}) as writer:
            writer.write_shard(0, codes, {"image": list("abcde"), "token": [0] * 5})
        rows = open_codes(tmp_path / f"c{columns.start}")
        found = tms_score(rows) if variant == "tms" else SCORES[variant](rows, emb_NE)
        names = [STATUSES[code] for code in found.status]
        assert names == ["dead", "single", "defined"][columns]
        assert torch.equal(found.ms.isnan(), found.status != 0)
        assert found.max_activation.tolist() == [0.0, 1.0, 2.0][columns]


# Controls ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """3,000 rows with structure, and an SAE that is no untrained one."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(3000, D_IN, generator=generator) * torch.linspace(0.3, 2, D_IN) + 1
    emb_NE = torch.cat([x_ND[:, :3], torch.randn(3000, 3, generator=generator)], 1)
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, 3, "topk"))
    sae.reset_parameters(77)
    return x_ND, emb_NE, sae.eval()


def test_untrained_has_the_same_l0(trained):
    x_ND, _, sae = trained
    untrained, l0 = untrained_like(sae, x_ND, seed=4)
    assert l0 == 3.0
    assert untrained.config.architecture == "topk"
    assert (untrained.encode(x_ND).l0() == 3).all(), "every row of a TopK SAE has k latents, and of its control too"
    again, _ = untrained_like(sae, x_ND, seed=4)
    assert torch.equal(again.W_enc, untrained.W_enc)
    assert not torch.equal(untrained_like(sae, x_ND, seed=5)[0].W_enc, untrained.W_enc)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5, 3.0])
def test_untrained_of_topk_has_at_most_k_and_the_l0(trained, shift):
    """However few of its latents are positive: nothing leaps where rows begin to have fewer than k."""
    x_ND, _, given = trained
    sae = deepcopy(given)
    sae.b_enc.data -= shift
    counts_N = (sae.encode(x_ND).dense() > 0).sum(1)
    untrained, l0 = untrained_like(sae, x_ND, seed=4)
    assert l0 == pytest.approx(float(counts_N.double().mean()))
    found_N = (untrained.encode(x_ND).dense() > 0).sum(1)
    assert int(found_N.max()) <= 3
    assert float(found_N.double().mean()) == pytest.approx(l0, abs=1e-9)


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka", "jumprelu", "relu"])
def test_untrained_of_a_threshold_has_the_same_l0_on_average(trained, architecture):
    x_ND, _, _ = trained
    sae = SparseAutoencoder(
        SAEConfig(D_IN, D_SAE, 3, architecture, (8, D_SAE - 8) if architecture == "matryoshka" else ())
    )
    sae.reset_parameters(77)
    if sae.config.architecture != "relu":
        sae.threshold.data.fill_(0.5)
    l0_of_sae = float((sae.eval().encode(x_ND).dense() > 0).double().sum(1).mean())
    untrained, l0 = untrained_like(sae, x_ND, seed=4)
    assert l0 == pytest.approx(l0_of_sae)
    assert float(untrained.encode(x_ND).l0().double().mean()) == pytest.approx(l0, abs=1e-9)  # all rows were drawn


@pytest.mark.parametrize("n_controls", [1, 2])
def test_a_control_is_not_where_the_sae_began(n_controls, monkeypatch):
    """Training takes small seeds; an SAE that was made of seed 1 must not stand beside its own beginning."""
    from saevlm_fast.scoring import controls

    seeds, x_ND = [], torch.randn(60, D_IN, generator=torch.Generator().manual_seed(0))
    made = controls.untrained_like
    monkeypatch.setattr(controls, "untrained_like", lambda *given: seeds.append(given[2]) or made(*given))
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, 3, "topk")).eval()
    compare_with_untrained(x_ND, {"a": x_ND}, sae, n_controls=n_controls)
    assert len(set(seeds)) == n_controls
    assert min(seeds) > 10_000


def test_matched_means_by_the_rule(trained):
    x_ND, emb_NE, sae = trained
    seen = []
    found = compare_with_untrained(x_ND, {"a": emb_NE, "b": emb_NE[:, :4]}, sae, n_controls=2, on_rows=seen.append)
    assert seen[-1] == 6 * 3000
    comparison = found["a"]
    bins = [(4 * s.n_active.double().log2()).floor() for s in (comparison.trained, *comparison.controls)]
    control_bins = torch.cat(bins[1:])
    control_ms = torch.cat([s.ms for s in comparison.controls])
    total, parts = 0, []
    for b in sorted(set(bins[0].tolist()) & set(control_bins.tolist())):
        if b < 4 * math.log2(10) - 1:
            continue
        n = int((bins[0] == b).sum())
        total += n
        parts.append((n, comparison.trained.ms[bins[0] == b].mean(), control_ms[control_bins == b].mean()))
    matched = comparison.matched
    assert matched.n_trained == total
    assert matched.trained == pytest.approx(float(sum(n * a for n, a, _ in parts) / total))
    assert matched.control == pytest.approx(float(sum(n * c for n, _, c in parts) / total))
    assert matched.difference == pytest.approx(matched.trained - matched.control)
    assert matched.difference_interval.low < matched.difference < matched.difference_interval.high
    assert sum(each.n_trained for each in comparison.strata) == total
    assert len(comparison.by_seed) == 2
    assert found["b"].matched.n_trained == total


def test_an_sae_beside_itself_differs_by_nothing():
    """The interval of the difference takes off what an image does to both."""
    ms = torch.tensor([0.2, 0.5, 0.4], dtype=torch.float64)
    scores = MonosemanticityScores(ms, torch.zeros(3, dtype=torch.int8), torch.tensor([12, 40, 9]), ms, 100, "cosine")
    match = Match(scores, [scores])
    trained_SW, control_SW = match.weights()
    assert torch.equal(trained_SW, control_SW)
    assert trained_SW[:, 0].tolist() == [0.5, 0.5, 0.0]  # the third is on too few images
    none = Match(scores, [MonosemanticityScores(ms, torch.ones(3, dtype=torch.int8), ms.long(), ms, 100, "cosine")])
    assert not none.weights()[0].any()


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command(patches, tmp_path):
    path = patches["path"]
    rows = ["--activations", path / "x", "--sae", path / "sae", "--device", "cpu"]
    emb = ["--embeddings", path / "emb", "--pool", "max"]
    plain = run_json("ms-score", *rows, *emb, "--one-pass", "--output", tmp_path / "one.json")
    assert "mean_interval" not in plain
    shutil.copytree(path / "emb", tmp_path / "other" / "emb")
    both = ["--embeddings", path / "emb", "--embeddings", tmp_path / "other" / "emb", "--pool", "max"]
    found = run_json("ms-score", *rows, *both, "--controls", "1", "--output", tmp_path / "two.parquet")
    assert found["mean"] == pytest.approx(plain["mean"])
    assert found["rank_agreement"][0]["spearman"] == pytest.approx(1.0)
    assert list(found["controls"]) == ["emb_1", "emb_2"]
    columns = open_table(tmp_path / "two.parquet").column_names
    assert columns[:5] == ["latent", "ms", "status", "n_active", "max_activation"]
    assert {"se", "p", "above_null", "ms_emb_2", "p_emb_2"} <= set(columns)
    again = run_json(
        "ms-score", "--config", tmp_path / "two.parquet.settings.toml", "--output", tmp_path / "three.parquet"
    )
    assert again["controls"] == found["controls"]
    for variant, more in (("tms", []), ("patch", ["--embeddings", path / "patch"]), ("visaebench", emb)):
        pool = ["--pool", "mean"] if variant == "tms" else []
        out = tmp_path / f"{variant}.json"
        assert run_json("ms-score", *rows, *more, *pool, "--variant", variant, "--output", out)["counts"]["defined"] > 0


def open_table(path):
    import pyarrow.parquet as pq

    return pq.read_table(path)
