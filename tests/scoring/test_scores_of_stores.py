"""Scores from stores: of codes as of encoding on the fly, of rows that do not belong together, and the command."""

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from true_scores import assert_scores

import saevlm_fast as sf
from command import run
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.kernels import reference
from saevlm_fast.kernels.common import SIMILARITIES
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import score as score_stores
from saevlm_fast.scoring.sums import STATUSES


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """300 images: activations, their codes by a BatchTopK SAE in every dtype, and embeddings, all with image ids."""
    path, generator = tmp_path_factory.mktemp("stores"), torch.Generator().manual_seed(0)
    x_ND, emb_NE = (torch.randn(300, width, generator=generator) for width in (16, 9))
    items = {"image": [f"{i}.jpg" for i in range(300)], "token": [0] * 300}
    for name, rows in (("x", x_ND), ("e", emb_NE)):
        with ActivationWriter(path / name, rows.shape[1], torch.float32, {}, rows_per_shard=80) as writer:
            writer.append(rows, items)
    sae = SparseAutoencoder(SAEConfig(16, 64, 6, "batch_topk")).eval()
    sae.threshold.fill_(0.6)
    with torch.no_grad():
        codes = sae.encode(x_ND)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with CodesWriter(path / str(dtype).removeprefix("torch."), 64, dtype, {}) as writer:
            writer.write_shard(0, codes, items)
    np.save(path / "e.npy", emb_NE.numpy())
    return SimpleNamespace(path=path, sae=sae, dense_NS=codes.dense(), emb_NE=emb_NE)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("embeddings", ["e", "e.npy"])
def test_scores_of_float32_codes_are_those_of_encoding_on_the_fly(stores, similarity, embeddings):
    x, e = open_activations(stores.path / "x"), open_activations(stores.path / embeddings)
    options = {"similarity": similarity, "batch_rows": 64}
    encoded = score_stores(x, e, stores.sae, **options)
    from_codes = score_stores(open_codes(stores.path / "float32"), e, **options)
    for name in ("ms", "status", "n_active", "max_activation"):
        assert torch.equal(getattr(from_codes, name).nan_to_num(9.0), getattr(encoded, name).nan_to_num(9.0))
    truth_S = reference.monosemanticity(stores.dense_NS.double(), stores.emb_NE.double(), similarity)
    assert_scores(from_codes, truth_S, 1e-11)
    assert (from_codes.status == STATUSES.index("defined")).sum() > 40


@pytest.mark.parametrize(("dtype", "eps"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_rounded_codes_move_a_score_by_little(stores, dtype, eps):
    """Weights r_i r_j within (1 +- eps)^2 move their mean of similarities in [-1, 1] by about 4 eps at most."""
    e = open_activations(stores.path / "e")
    exact = score_stores(open_codes(stores.path / "float32"), e)
    rounded = score_stores(open_codes(stores.path / dtype), e)
    assert torch.equal(rounded.n_active, exact.n_active)
    assert torch.equal(rounded.status, exact.status)
    error_S = (rounded.ms - exact.ms).nan_to_num(0.0).abs()
    assert 0 < float(error_S.max()) < 4.1 * eps


def test_scores_of_activations_in_memory(stores):
    """The three lines of a notebook: nothing is written."""
    x, e = open_activations(stores.path / "x"), open_activations(stores.path / "e")
    x_ND = torch.cat([x_BD for _, x_BD in x.chunks(100)])
    activations, embeddings = Activations.from_tensor(x_ND), Activations.from_tensor(stores.emb_NE.numpy())
    table = score_stores(activations, embeddings, stores.sae).table()
    assert table.equals(score_stores(x, e, stores.sae).table())
    assert table.column_names == ["latent", "ms", "status", "n_active", "max_activation"]
    raw = score_stores(activations, embeddings).table()
    assert (raw.num_rows, set(raw["status"].to_pylist())) == (16, {"defined"})
    with pytest.raises(ValueError, match=r"embeddings: 10 rows \(tensor \[10, 9\]\), but 300 activations"):
        score_stores(activations, Activations.from_tensor(stores.emb_NE[:10]))


def write_ids(path, images, tokens=None, rows_per_shard=3):
    tokens = [0] * len(images) if tokens is None else tokens
    x = torch.randn(len(images), 4, generator=torch.Generator().manual_seed(0))
    with ActivationWriter(path, 4, torch.float32, {}, rows_per_shard) as writer:
        writer.append(x, {"image": images, "token": tokens})
    return open_activations(path)


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
@pytest.mark.parametrize("wrong", [0, 4, 6])
def test_images_that_differ_are_named(tmp_path, batch_rows, wrong):
    images = [f"{i}.jpg" for i in range(7)]
    acts = write_ids(tmp_path / "x", images)
    embeddings = write_ids(tmp_path / "e", [*images[:wrong], *(f"o{i}.jpg" for i in range(wrong, 7))], rows_per_shard=2)
    message = rf"embeddings: row {wrong} is image 'o{wrong}.jpg' \(.*/e\), but '{wrong}.jpg' in .*/x"
    with pytest.raises(ValueError, match=message):
        score_stores(acts, embeddings, batch_rows=batch_rows)
    assert score_stores(acts, acts, batch_rows=batch_rows).n_images == 7


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
@pytest.mark.parametrize("side", ["activations", "embeddings"])
def test_several_rows_of_an_image_are_refused(tmp_path, batch_rows, side):
    images = ["a", "b", "c", "c", "c", "d"]
    several = write_ids(tmp_path / "several", images, [5, 5, 1, 2, 3, 5])
    matrix = open_activations(save_matrix(tmp_path / "e.npy", 6))
    pair = (several, matrix) if side == "activations" else (matrix, several)
    message = "several: 3 rows of image 'c' \\(from row 2\\); the score needs one row per image: harvest with --tokens"
    with pytest.raises(ValueError, match=message):
        score_stores(*pair, batch_rows=batch_rows)
    with pytest.raises(ValueError, match=message):  # the likely reason for different numbers of rows
        score_stores(several, write_ids(tmp_path / "one", ["a", "b", "c", "d"]))


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
@pytest.mark.parametrize("ids", ["aab", "aba", "cbac", "bacdba", "ab-a"])
def test_an_image_listed_twice_is_refused(ids, batch_rows, tmp_path):
    """Beside a matrix, which has no ids, and pooled too unless its rows lie together."""
    x = write_ids(tmp_path / "x", [None if each == "-" else each for each in ids])
    e = torch.randn(len(ids), 4)
    for sides in (x, e), (e, x):
        with pytest.raises(
            ValueError, match=r"x: (\d images come twice, such as '.'|image 'a' is listed twice, in row 0)"
        ):
            score_stores(*sides, batch_rows=batch_rows)
    with pytest.raises(ValueError, match="twice"):
        sf.top_images(x, [0], 2, batch_rows=batch_rows)
    if ids != "aab":
        with pytest.raises(ValueError, match="images come twice"):
            score_stores(x, e, pool="max", batch_rows=batch_rows)
        with pytest.raises(ValueError, match="images come twice"):
            sf.trusted_score(x, e, pool="mean", batch_rows=batch_rows)


def test_different_numbers_of_rows(tmp_path):
    few, many = write_ids(tmp_path / "few", ["a", "b"]), write_ids(tmp_path / "many", ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"embeddings: 2 rows \(.*few\), but 3 activations .* image i"):
        score_stores(many, few)


def test_codes_take_no_sae(stores):
    codes, e = open_codes(stores.path / "float32"), open_activations(stores.path / "e")
    with pytest.raises(ValueError, match="sae: codes are encoded already"):
        score_stores(codes, e, stores.sae)


def save_matrix(path, n_rows):
    np.save(path, np.random.default_rng(0).normal(size=(n_rows, 3)).astype(np.float32))
    return path


def test_the_command_takes_codes(stores, tmp_path):
    common = ["--embeddings", stores.path / "e", "--output"]
    stores.sae.save_pretrained(tmp_path / "sae")
    text = run("ms-score", "--codes", stores.path / "float32", *common, tmp_path / "codes.parquet")
    assert f"latents of {stores.path / 'float32'}" in text
    run("ms-score", "--sae", tmp_path / "sae", "--activations", stores.path / "x", *common, tmp_path / "sae.parquet")
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("codes", "sae")]
    assert tables[0].equals(tables[1])
    found = {k.decode(): v.decode() for k, v in tables[0].schema.metadata.items()}
    chance = found.pop("mean_cosine")
    assert -1 < float(chance) < 1
    assert found == {
        "similarity": "cosine",
        "n_images": "300",
        "codes": str(stores.path / "float32"),
        "embeddings": str(stores.path / "e"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codes", "c", "--raw"], "sae: give either --sae DIR or --raw, with --activations, or --codes alone"),
        (["--codes", "c", "--sae", "s"], "sae: give either"),
        (["--activations", "x"], "sae: give either"),
        (["--codes", "c", "--activations", "x"], "activations: excluded by --codes"),
        (["--raw"], "embeddings: needed with --activations or --codes, and only with these"),
        (["--codes", "{path}/x"], "a store of activations; needed is one of codes"),
        (["--raw", "--activations", "{path}/float32"], "a store of codes; needed is one of activations"),
    ],
)
def test_the_command_refuses_other_combinations(stores, tmp_path, arguments, message):
    arguments = [argument.format(path=stores.path) for argument in arguments]
    text = run("ms-score", *arguments, "--embeddings", stores.path / "e", "--output", tmp_path / "s.csv", code=2)
    assert message in text
