"""Which SAEs are seeds of one another, and by which names they and their files go."""

import pytest
import torch

from saevlm_fast.cli.evaluate_print import _d_prime, _mark, _matched_cells
from saevlm_fast.cli.score_report import _verdict
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.label_sets import read_labels
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.measures.groups import groups_of
from saevlm_fast.measures.inputs import Inputs
from saevlm_fast.measures.masks import read_names
from saevlm_fast.measures.measure import evaluate_subjects, subjects_of
from saevlm_fast.measures.parts import file_name
from saevlm_fast.measures.taxonomy import read_taxonomy
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.controls import Stratum

D, N = 6, 60


def sae(seed=0, steps=None, sizes=(), **training):
    known = {"training": {"seed": seed, **training}} if training else {}
    known |= {} if steps is None else {"steps": steps}
    architecture = "matryoshka" if sizes else "batch_topk"
    made = SparseAutoencoder(SAEConfig(D, 12, 2, architecture, sizes, known))
    made.reset_parameters(seed)
    with torch.no_grad():
        made.threshold.fill_(0.5)
    return made


def test_seeds_are_a_group_and_whatever_else_differs_is_not():
    groups = groups_of({"a": sae(0, lr=1e-3), "b": sae(1, lr=1e-3, mono_weight=None)})
    assert groups == dict.fromkeys("ab", "batch_topk 6 -> 12, k 2")
    groups = groups_of({"a": sae(0, lr=1e-3), "b": sae(1, lr=1e-3), "c": sae(0, lr=1e-3, mono_weight=0.1)})
    assert groups["a"] == groups["b"] == "batch_topk 6 -> 12, k 2; no mono_weight"
    assert groups["c"] == "batch_topk 6 -> 12, k 2; mono_weight 0.1"
    groups = groups_of({"half": sae(0, 50, lr=1e-3), "whole": sae(0, 100, lr=1e-3), "no record": sae(3)})
    assert len(set(groups.values())) == 3
    assert groups["no record"].endswith("training not recorded")
    groups = groups_of({"a": sae(0, sizes=(2, 10)), "b": sae(1, sizes=(4, 8))})
    assert groups["a"].endswith("group_sizes [2, 10]")


def test_a_trained_control_stands_in_the_group_that_was_trained_as_it_was():
    saes = {"plain": sae(0, lr=1e-3), "mono": sae(0, lr=1e-3, mono_weight=0.1)}
    saes["control"] = sae(1, 0, lr=1e-3, mono_weight=0.1, control="soft-frozen")
    saes["other"] = sae(1, 0, lr=1, control="untrained")
    groups = groups_of(saes)
    assert groups["control"] == groups["mono"] != groups["plain"]
    assert groups["other"] == groups["plain"]


def rows():
    return Activations.from_tensor(torch.randn(N, D, generator=torch.Generator().manual_seed(0)))


def test_a_control_that_is_made_gives_way_to_one_that_was_trained():
    trained = sae(1, 0, lr=1, control="untrained")
    subjects = subjects_of({"run": (sae(0, lr=1), "1"), "untrained": (trained, "2")})
    found = evaluate_subjects(subjects, Inputs(rows()), ("untrained",))
    assert [each.subject.name for each in found.results] == ["run", "untrained", "untrained of run"]


def test_names_whose_files_would_be_one():
    assert file_name("a/b 1") == "a-b-1"
    assert len({file_name("日"), file_name("中"), file_name("unnamed")}) == 3
    subjects = subjects_of({"a b": (sae(0), "1"), "a-b": (sae(1), "2")})
    with pytest.raises(ValueError, match=r"'a b', 'a-b'.* files of one name"):
        evaluate_subjects(subjects, Inputs(rows()))


def test_embeddings_with_several_rows_of_an_image_are_refused(tmp_path):
    """As many rows as there are images, and the same first images: rows that are not image by image all the same."""
    with ActivationWriter(tmp_path / "rows", D, torch.float32, {}, 100) as writer:
        writer.append(torch.randn(6, D), {"image": list("abcdef"), "token": [0] * 6, "label": [None] * 6})
    with ActivationWriter(tmp_path / "emb", D, torch.float32, {}, 100) as writer:
        writer.append(torch.randn(6, D), {"image": list("abcabc"), "token": [0, 0, 0, 1, 1, 1], "label": [None] * 6})
    inputs = Inputs(open_activations(tmp_path / "rows"), {"e": open_activations(tmp_path / "emb")})
    with pytest.raises(ValueError, match="embeddings: e has 6 rows of 3 images"):
        inputs.check()


def test_tables_that_begin_with_a_mark_of_byte_order(tmp_path):
    for name, text in {"tax": "cat,animal\n", "names": "0,sky\n1,sea\n", "labels": "image,kind\n0,cat\n"}.items():
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8-sig")
    assert list(read_taxonomy(tmp_path / "tax.csv").paths) == ["cat"]
    assert read_names(tmp_path / "names.csv") == {0: "sky", 1: "sea"}
    assert read_labels(tmp_path / "labels.csv", ["0"])[0].names == ("cat",)


# What is printed ------------------------------------------------------------------------------------------------------


def row(**verdicts):
    verdicts = {name.replace("_", "-"): verdict for name, verdict in verdicts.items()}
    return {"against": [{"group": "g", "control": name, "verdict": each} for name, each in verdicts.items()]}


def test_a_measure_that_does_not_separate_says_so_wherever_it_is_printed():
    no, yes = "does not separate", "separates"
    assert _mark(row(untrained=no, pca=yes), "g") == _mark(row(untrained=yes, soft_frozen=no), "g") != ""
    assert _mark(row(untrained=yes, pca=no), "g") == _mark(row(untrained=no), "another") == _mark(row(), "g") == ""
    assert _mark(row(pca=no), "g") != "" == _mark(row(pca="not judged"), "g")
    printed = {1.94: "d' 1.9", 1.96: "d' 1.96", 1.999: "d' 1.99", 2.0: "d' 2.0", -3.0: "d' -3.0"}
    assert {value: _d_prime(value) for value in printed} == printed
    assert [_matched_cells({"sae": 0.2, "control": 0.1}, way)[2] for way in (1, -1, 0)] == ["", "NO", ""]


def test_a_score_that_is_not_told_from_an_untrained_one_says_so():
    def stratum(difference, low, high):
        return Stratum(10, 20, 5, 5, 0.5, 0.5 - difference, difference, (low, high))

    assert _verdict(stratum(0.1, -0.01, 0.2)).startswith("NO: ")
    assert _verdict(stratum(-0.1, -0.2, -0.01)).startswith("NO: ")
    assert _verdict(stratum(0.1, 0.05, 0.15)).startswith("above untrained")
    assert _verdict(stratum(*[float("nan")] * 3)).startswith("not compared")
