"""saevlm-fast evaluate."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluations import CLASSES, PATHS, D, N, make_inputs, words

from command import files_below, run, run_json
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.measures.results import MEASURES
from saevlm_fast.sae import SparseAutoencoder
from tiny_tower import save_photos


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def whole(there, tmp_path_factory):
    """An evaluation of everything, and what it printed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    more = "--embeddings", there / "emb.npy", "--taxonomy", there / "paths.json", "--controls", "all", "--compare"
    return output, run(*words(there, output, *more, saes=3))


def test_everything_that_the_inputs_allow(whole):
    output, text = whole
    found = json.loads((output / "evaluation.json").read_text())
    assert found["left_out"] == [
        {"measure": "patches", "why": "no masks were given"},
        {"measure": "behaviour", "why": "no model and images were given"},
    ]
    subjects = {each["name"]: each for each in found["subjects"]}
    assert [*subjects][:3] == ["sae0", "sae1", "sae2"]
    assert {each["control"] for each in found["subjects"]} == {None, "untrained", "rotation", "raw", "pca", "kmeans"}
    assert sum(each["control"] == "untrained" for each in found["subjects"]) == 3
    for name, each in subjects.items():
        left_out = ("patches", "behaviour", "visaebench")
        assert [*each["measures"]] == [measure for measure in MEASURES if measure not in left_out]
        table = pq.read_table(output / found["files"][name]["latents"])
        assert len(table) == each["latents"]
        assert {"latent", "status", "n_active", "ms:emb.npy", "lca_depth", "purity_excess:labels"} <= {
            *table.column_names
        }
        assert {"kind", "latent", "rank", "other", "value", "support"} == {
            *pq.read_table(output / found["files"][name]["pairs"]).column_names
        }
    l0 = np.mean([subjects[f"sae{seed}"]["measures"]["reconstruction"]["l0"] for seed in range(3)])
    for seed in range(1, 4):
        untrained = subjects[f"untrained {seed}"]["measures"]["reconstruction"]
        assert untrained["l0"] == pytest.approx(l0, abs=0.02)
    trained = subjects["sae0"]["measures"]
    assert trained["labels"]["labels"]["selection"]["ap"] > 0.9
    assert "d'" in text
    ms = trained["monosemanticity"]["emb.npy"]["ms_10"]["interval"]
    assert f"{ms[0]:.3f} to {ms[1]:.3f}" in text
    beside = {line.split("│")[1].strip().removesuffix("  NO"): line.split("│")[2].strip() for line in lines_of(text)}
    assert beside["MS, emb.npy"] == f"{trained['monosemanticity']['emb.npy']['mean_cosine']:.3f}"
    assert beside["AP of labels, labels"] == f"{trained['labels']['labels']['selection']['null']['ap']:.3f}"
    assert (beside["probe of 1, labels"], beside["L0"]) == ("0.500", "-")
    assert rows_of(found)["MS, emb.npy"]["intervals"]["sae0"] == ms
    assert "mutual nearest" in text
    assert [(each["first"], each["other"]) for each in found["compared"]] == [("sae0", "sae1"), ("sae0", "sae2")]
    assert (output / "settings.toml").is_file()
    assert (output / "evaluation.png").is_file()


def lines_of(text):
    """Of the first table that is printed."""
    table = text[text.index("┃ measure") :]
    return [line for line in table[: table.index("└")].splitlines() if line.startswith("│")]


def rows_of(found):
    return {row["measure"]: row for row in found["table"]}


def test_the_table_says_what_separates(whole):
    table = json.loads((whole[0] / "evaluation.json").read_text())["table"]
    rows = {row["measure"]: row for row in table}
    verdicts = {(name, each["control"]): each["verdict"] for name, row in rows.items() for each in row["against"]}
    at_matched = "does not separate: not better at matched counts"
    assert set(verdicts.values()) <= {"separates", "does not separate", at_matched, "not judged", "not measured"}
    assert verdicts["L0", "raw"] == "not judged"
    for name, row in rows.items():
        for each in row["against"]:
            if each["d_prime"] is not None and each["verdict"] != at_matched:
                assert (each["d_prime"] >= 2) == (verdicts[name, each["control"]] == "separates")
            if (matched := each.get("matched")) and matched["covered"] >= 0.5:
                worse = row["better"] * (matched["sae"] - matched["control"]) <= 0
                assert (each["verdict"] == at_matched) == (worse and row["better"] != 0)
    assert "matched" in next(each for each in rows["MS, emb.npy"]["against"] if each["control"] == "untrained")


def test_the_same_numbers_as_the_training_evaluation(whole, there):
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.training.evaluate import evaluate

    sae = SparseAutoencoder.from_pretrained(there / "sae0")
    expected = evaluate(sae, open_activations(there / "store"))
    found = json.loads((whole[0] / "evaluation.json").read_text())["subjects"][0]["measures"]["reconstruction"]
    assert found["explained_variance"] == pytest.approx(expected["explained_variance"], abs=1e-7)
    assert (found["l0"], found["dead_fraction"]) == (expected["l0"], expected["dead_fraction"])
    assert [each["latents"] for each in found["prefixes"]] == [4, 16]


def test_chunks_and_threads_do_not_matter(whole, there, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(*words(there, tmp_path / "out", "--embeddings", there / "emb.npy", "--batch-size", 7))
    finally:
        torch.set_num_threads(threads)
    first, again = (pq.read_table(path / "latents" / "sae0.parquet") for path in (whole[0], tmp_path / "out"))
    for name in again.column_names:
        values = [table[name].to_numpy() for table in (first, again)]
        if values[0].dtype == object:
            assert (values[0] == values[1]).all(), name
        else:
            np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-9, err_msg=name)


def test_one_sae_says_that_seeds_are_missing_and_what_is_left_out(there, tmp_path):
    text = run(*words(there, tmp_path / "out", "--labels", "none", "--controls", "untrained,raw"))
    assert "better?: d' needs three SAEs" in text or "better" not in text
    for name in ("monosemanticity", "hierarchy", "labels", "probing"):
        assert f"left out: {name}: " in text
    assert "NO: does not separate" in text


def test_gaps_of_a_taxonomy_are_told(there, tmp_path):
    (tmp_path / "gaps.json").write_text(json.dumps({name: PATHS[name] for name in ("cat", "oak")}))
    text = run(*words(there, tmp_path / "out", "--taxonomy", tmp_path / "gaps.json"))
    assert "taxonomy: 1 of 3 labels of labels are not in" in text
    assert "such as 'dog': depths are of the other images" in text


def test_captions_are_no_labels(there, tmp_path):
    """A label of its own for every image, as scenes have in their store, measures nothing."""
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["image", "caption"], *([f"{CLASSES[i % 3]}/{i}.jpg", f"no {i}"] for i in range(N))]
        )
    text = run(*words(there, tmp_path / "out", "--labels", tmp_path / "captions.csv"))
    for name in ("labels", "probing", "hierarchy"):
        assert f"left out: {name}: no label is on two images" in text


def test_tables_fit_into_the_terminal(there, tmp_path, monkeypatch):
    """Of two shapes with controls: a table a shape, seeds of controls as one, no number cut."""
    other = SparseAutoencoder(SAEConfig(D, 12, 2, "topk"))
    other.reset_parameters(5)
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setenv("COLUMNS", "60")
    given = "--embeddings", there / "emb.npy", "--labels", "none"
    more = "--sae", tmp_path / "other", "--controls", "untrained,rotation,raw", *given
    text = run(*words(there, tmp_path / "out", *more, saes=2))
    assert "…" not in text
    assert text.count("SAEs of one shape: ") == 2
    assert "means of 2 seeds: untrained, rotation" in text
    assert "at matched firing counts" in text


def test_label_sets_of_a_file(there, tmp_path):
    found = run_json(*words(there, tmp_path / "out", "--labels", there / "labels.csv"))
    assert [each["name"] for each in found["inputs"]["label_sets"]] == ["kind", "parity"] if "inputs" in found else True
    labels = found["subjects"][0]["measures"]["labels"]
    assert labels["kind"]["labels"] == 4, "pet is a second label of the first image"
    assert labels["parity"]["selection"]["coverage"] <= 1
    assert abs(labels["parity"]["excess"]["mean"]) < 0.1
    assert labels["kind"]["excess"]["mean"] > 0.1


def test_a_dry_run_writes_nothing(there, tmp_path):
    before = files_below(tmp_path)
    figures = run_json(*words(there, tmp_path / "out", "--dry-run"))
    assert figures["images"] == figures["rows"] == N
    assert figures["latents"] == 16
    assert figures["label_sets"] == ["labels"]
    assert len(figures["left_out"]) == 4
    assert files_below(tmp_path) == before


def test_a_dry_run_says_what_its_time_leaves_out(there, tmp_path):
    """Every measure that is then made, but that which encoding gives; controls and comparisons where they are asked."""
    given = words(there, tmp_path / "out", "--controls", "pca,rotation")
    measures, controls = run_json(*given, "--dry-run")["time_leaves_out"]
    made = run_json(*given)["subjects"][0]["measures"].keys() - {"reconstruction"}
    assert measures == f"{', '.join(sorted(made, key=MEASURES.index))} of every SAE and control"
    assert controls == "the making of controls: pca, rotation"
    text = " ".join(run(*given, "--force", "--dry-run").split())
    assert "encoding alone" in text
    assert "time leaves out" in text


def test_several_rows_of_an_image_are_pooled(there, tmp_path):
    """Twice the rows, each image's second one is zero: the maximum is that of the first, the mean half of it."""
    x_ND = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
    rows = torch.stack([x_ND, torch.zeros_like(x_ND)], 1).reshape(80, D)
    with ActivationWriter(tmp_path / "store", D, torch.float32, {}, 33) as writer:
        writer.append(rows, {"image": [f"{i // 2}" for i in range(80)], "token": [0, 1] * 40, "label": [None] * 80})
    sae = SparseAutoencoder.from_pretrained(there / "sae0")
    with torch.no_grad():
        dense = sae.encode(rows).dense().view(40, 2, 16)
    for pool, expected in (("max", dense.amax(1)), ("mean", dense.mean(1))):
        given = "--activations", tmp_path / "store", "--pool", pool, "--batch-size", 7
        found = run_json(*words(there, tmp_path / pool, *given))
        reconstruction = found["subjects"][0]["measures"]["reconstruction"]
        assert reconstruction["rows"] == 80
        table = pq.read_table(tmp_path / pool / "latents" / "sae0.parquet")
        np.testing.assert_allclose(table["max_activation"].to_numpy(), expected.amax(0).numpy(), rtol=1e-6)
        assert table["n_active"].to_pylist() == (expected > 0).sum(0).tolist()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--controls", "random"), "controls: 'random' is not one of all, none, untrained"),
        (("--compare",), "compare: needs at least two SAEs"),
        (("--taxonomy", "paths.json", "--labels", "none"), "taxonomy: it is about labels"),
        (("--taxonomy", "none.json"), "none.json is not a file"),
        (("--labels", "labels"), "labels: 'labels' is not store, none, FILE.csv or FILE.parquet"),
        (("--labels", "none.csv"), "none.csv is not a file"),
        (("--embeddings", "wide.npy"), "embeddings: wide.npy has 3 rows; there are 240 images"),
        (("--activations", "wide.npy"), "sae: d_in of sae0 is 8, but the activations have width 5"),
        (("--sae", "sae0", "--sae", "copy"), "is the same SAE as"),
        (("--sae", "sae0", "--sae", "sae0"), "sae: sae0 is listed twice"),
        (("--mask-names", "labels.csv"), "mask_names: it is about --masks"),
        (("--masks", "none"), "masks: none is not a directory"),
        (("--masks", "mine"), "has one row an image"),
        (("--random-activations", "wide.npy"), "no SAE among --sae was trained on a tower of random weights"),
        (("--resume", "--force"), "resume and force exclude each other"),
        (("--output", "wide.npy"), "output: wide.npy "),
        (("--output", "mine"), "mine holds no evaluation; choose another directory"),
        (("--output", "mine", "--force"), "mine holds no evaluation; choose another directory"),
    ],
)
def test_what_is_refused(more, message, there, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    for name in ("sae0", "sae1"):
        shutil.copytree(there / name, tmp_path / name)
    shutil.copytree(there / "sae0", tmp_path / "copy")
    shutil.copy(there / "paths.json", tmp_path)
    np.save("wide.npy", np.ones((3, 5), np.float32))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.toml").touch()
    given = {"--sae": "sae0", "--activations": there / "store", "--output": "out"}
    given = {key: value for key, value in given.items() if key not in more}
    assert message in run("evaluate", *(word for pair in given.items() for word in pair), *more, code=2)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_measure_from_python(there):
    import saevlm_fast as sf

    activations, sae = sf.open_activations(there / "store"), sf.SparseAutoencoder.from_pretrained(there / "sae0")
    found = sf.measure({"mine": sae}, activations, taxonomy=PATHS, controls=("pca",))
    assert found.left_out == {
        "monosemanticity": "no embeddings were given",
        "patches": "no masks were given",
        "behaviour": "no model and images were given",
    }
    (first, second) = found.results
    assert (first.subject.name, second.subject.control) == ("mine", "pca")
    assert len(first.latents["lca_depth"]) == 16
    assert any(row["measure"] == "LCA depth" for row in found.table())
    with pytest.raises(ValueError, match="controls: "):
        sf.measure(sae, activations, controls=("none",))
    with pytest.raises(ValueError, match=r"saes: \['pca'\] is the name of a control too"):
        sf.measure({"pca": sae}, activations, controls=("pca",))
    with pytest.raises(ValueError, match="behaviour: 'all' is not a Behaviour"):
        sf.measure(sae, activations, behaviour="all")
    with pytest.raises(ValueError, match="labels has 2 images"):
        sf.measure(sae, activations, labels=["a", "b"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Photos, a store of tiny-clip's tokens of them, and an SAE of it."""
    root = tmp_path_factory.mktemp("clip")
    save_photos(root / "photos", 24)
    harvest = ("harvest", "--model", "hf:tiny-clip", "--images", root / "photos", "--workers", 0, "--device", "cpu")
    run(*harvest, "--layer", 1, "--tokens", "patches", "--output", root / "store")
    source = json.loads((root / "store" / "index.json").read_text())["source"]
    sae = SparseAutoencoder(SAEConfig(128, 64, 4, "topk", metadata={"source": source}))
    sae.reset_parameters(0)
    sae.save_pretrained(root / "sae")
    ids = [f"class_{i % 3}/photo_{i:03d}.png" for i in range(24)]
    with open(root / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([[each, "a red circle" if i % 2 else "a blue star"] for i, each in enumerate(ids)])
    (root / "prompts.json").write_text(json.dumps({"class_0": "red", "class_1": ["blue", "navy"], "class_2": "green"}))
    return root


def test_behaviour_of_the_model_with_the_sae_in_it(clip, tmp_path):
    given = ("evaluate", "--sae", clip / "sae", "--activations", clip / "store", "--output", tmp_path / "out")
    given += ("--model", "hf:tiny-clip", "--images", clip / "photos", "--device", "cpu", "--compat", "visaebench")
    given += ("--class-prompts", clip / "prompts.json", "--captions", clip / "captions.csv")
    assert run_json(*given, "--dry-run")["images_shown"] == 24
    text = run(*given)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["inputs"]["model"], found["inputs"]["images_shown"]) == ("hf:tiny-clip", 24)
    behaviour = found["subjects"][0]["measures"]["behaviour"]
    assert (behaviour["point"], behaviour["trained_tokens"]) == ("residual-1", "patches")
    assert [*behaviour["splices"]] == ["all", "patches", "cls"]
    assert behaviour["main"]["tokens"] == "patches"
    assert behaviour["sets"]["labels"]["zero_shot"] == "defined"
    assert behaviour["splices"]["cls"]["variants"]["sae"]["retrieval"]["image_to_text"]["1"]["n"] == 24
    assert "residual-1, 24 images, classes of labels" in text
    assert any(row["measure"] == "spliced: neighbours kept" for row in found["table"])
    visaebench = found["subjects"][0]["measures"]["visaebench"]
    assert visaebench["M2"]["status"] == "defined"
    assert visaebench["M6"]["status"] == "EuroSAT and DTD are not here"
    again = run(*given, "--resume")
    assert "sae: behaviour" not in again


def test_behaviour_refused_in_one_line(clip, there, tmp_path):
    given = ("evaluate", "--sae", clip / "sae", "--activations", clip / "store", "--output", tmp_path / "out")
    model = ("--model", "hf:tiny-clip", "--images", clip / "photos", "--device", "cpu")
    for more, message in (
        (model[:2], "model, images: one of them needs the other"),
        ((*model, "--class-prompts", "cats"), "class_prompts: 'cats'"),
        ((*model, "--class-prompts", "a xylophone {}"), "has a word that hf:tiny-clip does not know"),
        ((*model, "--captions", "all"), "captions: 'all' is not none, images or FILE.csv"),
        ((*model, "--captions", there / "labels.csv"), "captions: "),
        (("--compat", "visaebench", "--pool", "mean"), "compat: "),
    ):
        text = run(*given, *more, code=2)
        assert message in text
        assert text.count("error: ") == 1
    np.save(tmp_path / "x.npy", np.zeros((9, 128), np.float32))
    bare = SparseAutoencoder(SAEConfig(128, 64, 4, "topk"))
    bare.save_pretrained(tmp_path / "sae")
    words = ("evaluate", "--sae", tmp_path / "sae", "--activations", tmp_path / "x.npy", "--output", tmp_path / "o")
    assert "record the point and layer" in run(*words, *model, code=2)


def test_rows_that_an_sae_was_trained_on_are_told(there, tmp_path):
    run(
        "train",
        "--activations",
        there / "store",
        "--output",
        tmp_path / "sae",
        "--steps",
        3,
        "--batch-size",
        64,
        "--k",
        2,
    )
    told = f"{tmp_path / 'sae'} was trained on the rows of {there / 'store'}"
    given = ["--sae", tmp_path / "sae", "--controls", "none"]
    assert told in "".join(
        run("evaluate", *given, "--activations", there / "store", "--output", tmp_path / "a").split("\n")
    )
    np.save(tmp_path / "others.npy", np.ones((20, D), np.float32) + np.eye(20, D, dtype=np.float32))
    assert "was trained on the rows" not in run(
        "evaluate", *given, "--activations", tmp_path / "others.npy", "--output", tmp_path / "b"
    )
