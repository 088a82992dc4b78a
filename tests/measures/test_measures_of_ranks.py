"""Measures by several ranks, which are threads here: the numbers of one process, parts by rank 0 alone."""

import math

import numpy as np
import pytest
import torch
from thread_peers import together

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import LabelSet
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.measures.inputs import Inputs
from saevlm_fast.measures.measure import evaluate_subjects, subjects_of, weights_digest
from saevlm_fast.measures.parts import Parts
from saevlm_fast.measures.taxonomy import Taxonomy
from saevlm_fast.sae import SparseAutoencoder

N, PATCHES, D = 60, 4, 6
LABELS = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A store of 4 patches an image, embeddings, labels, a taxonomy, masks."""
    path, generator = tmp_path_factory.mktemp("inputs") / "store", torch.Generator().manual_seed(0)
    x_RD = torch.randn(N * PATCHES, D, generator=generator)
    names = [f"{i}.jpg" for i in range(N) for _ in range(PATCHES)]
    with ActivationWriter(path, D, torch.float32, {}, rows_per_shard=50) as writer:
        writer.append(x_RD, {"image": names, "token": list(range(PATCHES)) * N})
    labels = LabelSet.of([LABELS[i % 3] for i in range(N)], "kind")
    masks = LabelSet.of([LABELS[i % 3] if i % 7 else None for i in range(N * PATCHES)], "mask")
    taxonomy = Taxonomy.of({"ant": ["animal", "insect"], "bee": ["animal", "insect"], "cat": ["animal", "mammal"]})
    emb = Activations.from_tensor(torch.randn(N, 5, generator=generator) + 0.3)
    return Inputs(open_activations(path), {"emb": emb}, (labels,), taxonomy, batch_rows=22, patch_labels=masks)


def subjects():
    saes = {}
    for seed, name in enumerate(("a", "b")):
        sae = SparseAutoencoder(SAEConfig(D, 16, 3, "topk"))
        sae.reset_parameters(seed)
        saes[name] = sae, weights_digest(sae)
    return subjects_of(saes)


def numbers(value, where=""):
    """Every number of nested figures with its place, in order."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, f"{where}/{key}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from numbers(each, f"{where}/{i}")
    else:
        yield where, value


def check_same(found, expected):
    for (place, mine), (also, its) in zip(numbers(found), numbers(expected), strict=True):
        assert place == also
        if isinstance(its, float) and math.isfinite(its):
            assert mine == pytest.approx(its, rel=1e-5, abs=1e-6), place
        else:
            assert mine == its or (mine != mine and its != its), place


@pytest.mark.distributed
def test_the_evaluation_of_one_process(inputs, tmp_path):
    what = ("untrained", "raw", "kmeans"), True
    expected = evaluate_subjects(subjects(), inputs, *what)
    said = []

    def work(peers):
        parts = Parts(tmp_path / f"rank {peers.rank}")
        counted = (lambda *told: said.append(told)) if peers.rank == 0 else (lambda *told: None)
        return evaluate_subjects(subjects(), inputs, *what, parts=parts, counted=counted, peers=peers)

    by_ranks, _ = together(3, work)
    for found in by_ranks:
        check_same(found.as_json(), expected.as_json())
        for mine, its in zip(found.results, expected.results, strict=True):
            assert mine.latents.keys() == its.latents.keys()
            for name, column in its.latents.items():
                if column.dtype.kind == "f":
                    np.testing.assert_allclose(mine.latents[name], column, rtol=1e-5, atol=1e-6, err_msg=name)
                else:
                    assert np.array_equal(mine.latents[name], column), name
    assert [path.name for path in tmp_path.iterdir()] == ["rank 0"]
    assert {done for name, done, total in said if done == total} == {N * PATCHES}

    def again(peers):  # rank 0 alone has the parts; nothing is encoded
        def counted(*told):
            raise AssertionError(told)

        parts = Parts(tmp_path / "rank 0" if peers.rank == 0 else None)
        return evaluate_subjects(subjects(), inputs, *what, parts=parts, counted=counted, peers=peers)

    for found in together(2, again)[0]:
        check_same(found.as_json(), expected.as_json())


def test_more_ranks_than_rows():
    x = torch.rand(3, D, generator=torch.Generator().manual_seed(1))
    few = Inputs(Activations.from_tensor(x), {"emb": Activations.from_tensor(x + 0.1)}, batch_rows=1)
    expected = evaluate_subjects(subjects()[:1], few)
    for found in together(5, lambda peers: evaluate_subjects(subjects()[:1], few, peers=peers))[0]:
        check_same(found.as_json(), expected.as_json())
