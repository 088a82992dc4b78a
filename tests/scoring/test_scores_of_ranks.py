"""Scores by several ranks, which are threads here: the numbers of one process, whatever the number of ranks."""

from dataclasses import fields

import pytest
import torch
from thread_peers import together

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter, open_codes
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.errors import ActivationError
from saevlm_fast.peers import in_step, laid_end_to_end
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring import merging
from saevlm_fast.scoring.controls import compare_with_untrained
from saevlm_fast.scoring.monosemanticity import stream
from saevlm_fast.scoring.patch_score import patch_score
from saevlm_fast.scoring.source import ScoredImages
from saevlm_fast.scoring.trust import trusted_scores
from saevlm_fast.scoring.variants import tms_score, visaebench_score
from saevlm_fast.sparse_codes import SparseCodes

N, D_IN, D_SAE, D_EMB = 90, 8, 21, 6
# Sums of float64 in another order. What the second pass makes of float32 vectors (se, null, p) is as sure as these.
SUMS, SINGLE = 1e-12, 1e-5
OF_SUMS = {"ms", "half_ms_2S", "n_eff", "max_activation", "mean_cosine"}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Sums S x E go around in several blocks, the last not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_BLOCK_ELEMENTS", 70)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store with 1 to 3 rows an image, the same of one row an image, embeddings in another order, an SAE, codes."""
    path, generator = tmp_path_factory.mktemp("world"), torch.Generator().manual_seed(0)
    counts = torch.randint(1, 4, (N,), generator=generator)
    image_of_row = torch.repeat_interleave(counts)
    names, tokens = [f"{i}.jpg" for i in image_of_row.tolist()], list(range(len(image_of_row)))
    x_BD, x_ND = (torch.randn(n, D_IN, generator=generator) for n in (len(image_of_row), N))
    order = torch.randperm(N, generator=generator)
    emb_NE = torch.randn(N, D_EMB, generator=generator) + 0.3
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, 4, "topk")).eval()

    def written(name, rows, images, tokens):
        with ActivationWriter(path / name, rows.shape[1], torch.float32, {}, rows_per_shard=31) as writer:
            writer.append(rows, {"image": list(images), "token": list(tokens)})
        return open_activations(path / name)

    ids = [f"{i}.jpg" for i in range(N)]
    with CodesWriter(path / "codes", D_SAE, torch.float32, {}) as writer:
        writer.write_shard(0, edge_codes(generator), {"image": ids, "token": [0] * N})
    return {
        "sae": sae,
        "codes": open_codes(path / "codes"),
        "rows": written("rows", x_BD, names, tokens),
        "patches": written("patches", torch.randn(len(x_BD), D_EMB, generator=generator) + 0.3, names, tokens),
        "images": written("images", x_ND, ids, [0] * N),
        "emb": written("emb", emb_NE, ids, [0] * N),
        "shuffled": written("shuffled", emb_NE[order], [ids[i] for i in order.tolist()], [0] * N),
        "other": Activations.from_tensor(emb_NE.square() + 0.1),
    }


def edge_codes(generator):
    """Latents: dead, single, constant, on all images, on all of the first 50, on two; and random ones."""
    dense_NS = torch.rand(N, D_SAE, generator=generator) * (torch.rand(N, D_SAE, generator=generator) < 0.2)
    dense_NS[:, :6] = 0
    dense_NS[3, 1] = 0.5
    dense_NS[:, 2] = 0.75
    dense_NS[:, 3] = torch.rand(N, generator=generator) + 0.5
    dense_NS[:50, 4] = torch.rand(50, generator=generator) + 0.5
    dense_NS[[1, 80], 5] = 0.3
    rows, latents = dense_NS.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense_NS > 0).sum(1).cumsum(0)])
    return SparseCodes.from_flat(dense_NS[rows, latents], latents, offsets, D_SAE)


def check_same(found, expected, sums=SUMS):
    assert type(found) is type(expected)
    for field in fields(expected):
        mine, its = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(its, torch.Tensor | float | tuple):
            tolerance = sums if field.name in OF_SUMS else SINGLE
            mine, its = torch.as_tensor(mine), torch.as_tensor(its)
            torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert mine == its, field.name


def by_ranks(n_ranks, work):
    """What every rank has, of which all have the same."""
    found, _ = together(n_ranks, work)
    return found


CASES = {
    "codes": lambda w, peers: trusted_scores(w["codes"], {"a": w["emb"], "b": w["other"]}, batch_rows=13, peers=peers),
    "sae": lambda w, peers: trusted_scores(w["images"], {"": w["emb"]}, w["sae"], batch_rows=7, peers=peers),
    "raw": lambda w, peers: trusted_scores(w["images"], {"": w["emb"]}, batch_rows=13, similarity="dot", peers=peers),
    "pool": lambda w, peers: trusted_scores(
        w["rows"], {"by id": w["shuffled"], "in order": w["other"]}, w["sae"], pool="mean", batch_rows=5, peers=peers
    ),
    "one pass, rbf of codes": lambda w, peers: one_pass(w["codes"], w["emb"], "rbf", peers),
    "one pass, rbf of neurons": lambda w, peers: one_pass(w["images"], w["emb"], "rbf", peers),
    "one pass": lambda w, peers: one_pass(w["codes"], w["emb"], "cosine", peers),
    "visaebench": lambda w, peers: {"": visaebench_score(w["codes"], w["emb"], batch_rows=11, n_top=5, peers=peers)},
    "visaebench, raw": lambda w, peers: {"": visaebench_score(w["images"], w["emb"], batch_rows=9, peers=peers)},
    "tms": lambda w, peers: {"": tms_score(w["rows"], w["sae"], pool="max", n_pairs=20, batch_rows=11, peers=peers)},
    "patch": lambda w, peers: {"": patch_score(w["rows"], w["patches"], w["sae"], batch_rows=11, peers=peers)},
}


def one_pass(rows, embeddings, similarity, peers):
    images = ScoredImages(rows, {"": embeddings}, batch_rows=11, kept_bytes=0, peers=peers)
    return {name: each.result() for name, each in stream(images, similarity).items()}


@pytest.mark.parametrize("case", CASES)
def test_the_scores_of_one_process(world, case):
    expected = CASES[case](world, None)  # shares of whole images are other batches, encoded in float32
    for n_ranks in (2, 3) if case in ("codes", "raw") else (3,):
        for found in by_ranks(n_ranks, lambda peers: CASES[case](world, peers)):
            assert found.keys() == expected.keys()
            for name, each in expected.items():
                check_same(found[name], each, SINGLE if case in ("pool", "patch") else SUMS)


@pytest.mark.parametrize("kind", ["codes", "neurons", "rbf", "visaebench"])
def test_more_ranks_than_images(kind):
    """Ranks without an image know neither codes nor embeddings, and have the same scores."""
    generator = torch.Generator().manual_seed(1)
    x, emb = torch.rand(3, 4, generator=generator), torch.randn(3, 5, generator=generator)
    sae = SparseAutoencoder(SAEConfig(4, 6, 2, "topk")).eval()

    def work(peers):
        if kind == "rbf":
            images = ScoredImages(x, {"": emb}, sae, batch_rows=1, peers=peers)
            return stream(images, "rbf")[""].result()
        if kind == "visaebench":
            return visaebench_score(x, emb, sae, batch_rows=1, peers=peers)
        return trusted_scores(x, {"": emb}, sae if kind == "codes" else None, batch_rows=1, peers=peers)[""]

    expected = work(None)
    for found in by_ranks(5, work):
        check_same(found, expected)


def test_an_image_of_many_rows_is_one_rank_s(tmp_path):
    """Whole images: of 3 ranks one has none, since the first image has most of the rows."""
    generator = torch.Generator().manual_seed(2)
    names = ["a"] * 20 + ["b"] * 3 + ["c"] * 2
    rows, patches = torch.rand(25, 4, generator=generator), torch.randn(25, 5, generator=generator)
    for name, each in {"x": rows, "patch": patches}.items():
        with ActivationWriter(tmp_path / name, each.shape[1], torch.float32, {}, rows_per_shard=9) as writer:
            writer.append(each, {"image": names, "token": list(range(25))})
    sae = SparseAutoencoder(SAEConfig(4, 6, 2, "topk")).eval()
    x, patch = open_activations(tmp_path / "x"), open_activations(tmp_path / "patch")
    shares = by_ranks(3, lambda peers: ScoredImages(x, {}, sae, pool="max", batch_rows=4, peers=peers))
    assert [(each.rows, each.first_image, each.n_own) for each in shares] == [
        (range(20), 0, 1),
        (range(20, 20), 1, 0),
        (range(20, 25), 1, 2),
    ]

    def work(peers):
        emb = {"": patches[:3]}
        pooled = trusted_scores(x, emb, sae, pool="max", batch_rows=4, peers=peers)[""]
        return pooled, patch_score(x, patch, sae, batch_rows=4, peers=peers)

    expected = work(None)
    for found in by_ranks(3, work):
        for mine, its in zip(found, expected):
            check_same(mine, its, SINGLE)


def test_controls_are_those_of_one_process(world):
    def work(peers):
        more = {"n_controls": 2, "batch_rows": 16, "peers": peers}
        return compare_with_untrained(world["images"], {"": world["emb"]}, world["sae"], **more)[""]

    expected = work(None)
    for found in by_ranks(2, work):
        for mine, its in zip((found.trained, *found.controls), (expected.trained, *expected.controls)):
            check_same(mine, its)
        assert found.matched.n_trained == expected.matched.n_trained
        assert found.matched.difference == pytest.approx(expected.matched.difference, abs=SINGLE)


def test_progress_is_that_of_all(world):
    done = []

    def work(peers):
        tell = done.append if peers.rank == 0 else lambda n: None
        trusted_scores(world["images"], {"": world["emb"]}, batch_rows=10, on_rows=tell, peers=peers)

    together(3, work)
    assert done == [30, 60, 90, 120, 150, 180]


@pytest.mark.parametrize("what", ["activations", "embeddings"])
def test_a_row_that_is_not_finite_is_told_by_its_number(what):
    x, emb = torch.rand(50, 4), torch.rand(50, 4)
    (x if what == "activations" else emb)[45, 1] = torch.nan
    with pytest.raises(ActivationError, match="row 45"):
        together(2, lambda peers: trusted_scores(x, {"": emb}, batch_rows=20, peers=peers))


def test_two_rows_of_an_image_on_two_ranks_are_refused(tmp_path):
    """Where a share begins the row before is looked at too."""
    x = torch.rand(10, 4)
    with ActivationWriter(tmp_path / "x", 4, torch.float32, {}) as writer:
        images = [f"{i // 2 if i in (4, 5) else i + 10}" for i in range(10)]
        writer.append(x, {"image": images, "token": list(range(10))})
    rows = open_activations(tmp_path / "x")
    with pytest.raises(ValueError, match=r"rows of image '2' \(from row 4\)"):
        together(2, lambda peers: trusted_scores(rows, {"": torch.rand(10, 3)}, batch_rows=5, peers=peers))


def test_ranks_wait_for_each_other():
    """Of uneven shares every rank asks as often; chunks beyond what was said are a mistake."""
    found, _ = together(2, lambda peers: list(in_step(peers, iter(range(40 * peers.rank)), 40)))
    assert found == [[], list(range(40))]
    with pytest.raises(AssertionError):
        together(2, lambda peers: list(in_step(peers, iter(range(41)), 16)))


def test_rows_are_laid_end_to_end():
    found, _ = together(3, lambda peers: laid_end_to_end(peers, torch.full((peers.rank, 2), peers.rank).half()))
    assert found[1].dtype == torch.float16
    assert found[1].tolist() == [[1, 1], [2, 2], [2, 2]]
    (nothing, _), _ = together(2, lambda peers: laid_end_to_end(peers, torch.zeros(3, 0)))
    assert nothing.shape == (6, 0)
