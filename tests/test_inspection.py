"""`saevlm-fast inspect`: every kind of thing it knows, damage, and what it prints."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command import run
from damage import edit_record, flip
from saevlm_fast import cli
from saevlm_fast.cli.inspect_table import short_values
from saevlm_fast.config import SAEConfig
from saevlm_fast.data.codes import CodesWriter
from saevlm_fast.data.writing import ActivationWriter
from saevlm_fast.files import human_bytes
from saevlm_fast.inspection import inspect, verify_inspected
from saevlm_fast.sae import SparseAutoencoder, with_metadata
from saevlm_fast.sparse_codes import SparseCodes
from sparse_codes import random_sparse_codes

SOURCE = {
    "model": {"spec": "hf:openai/clip", "class": "CLIPModel"}, "point": "residual", "layer": 11, "tokens": "random2",
    "images": {"path": "photos.tar", "images": 12}, "sae": None,
}  # fmt: skip


def items_of(n_rows, per_image=2):
    return {
        "image": [f"{row // per_image}.jpg" for row in range(n_rows)],
        "token": list(range(n_rows)),
        "label": [None if row == 3 else f"class {row % 3}" for row in range(n_rows)],
    }


@pytest.fixture
def folder(tmp_path):
    """A store of activations, an incomplete one of codes, two SAEs and a matrix."""
    with ActivationWriter(tmp_path / "acts", 16, torch.float16, SOURCE, rows_per_shard=10) as writer:
        writer.append(torch.randn(24, 16), items_of(24))
    codes = CodesWriter(tmp_path / "codes", 50, torch.float32, SOURCE | {"sae": {"path": "sae22", "pool": "mean"}})
    codes.write_shard(0, random_sparse_codes(6, 4, 50, "fixed", torch.float32), items_of(6, per_image=1))
    alike = SparseCodes(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), None, (2, 50))
    part = CodesWriter.resume(tmp_path / "codes", part=0)
    part.write_shard(1, alike, {"image": ["a", "b"], "token": [0, 0]})
    for name, config in (
        ("topk", SAEConfig(16, 64, 5, "topk")),
        ("matryoshka", SAEConfig(16, 64, 5, "matryoshka", (16, 48), {"steps": 7, "norm_factor": 1.23456789})),
    ):
        sae = SparseAutoencoder(config)
        sae.threshold.fill_(0.125)
        sae.save_pretrained(tmp_path / name)
    np.save(tmp_path / "x.npy", np.ones((5, 3), dtype=np.float32))
    return tmp_path


def test_a_store_of_activations(folder):
    found = inspect(folder / "acts")
    sizes = [os.path.getsize(folder / "acts" / name) for name in os.listdir(folder / "acts")]
    assert found == {
        "path": str(folder / "acts"), "kind": "activations", "bytes": sum(sizes), "rows": 24, "d_in": 16,
        "dtype": "float16", "shards": 3, "complete": True, "images": 12, "rows_per_image": [2, 2], "labels": 3,
        "rows_without_label": 1, "source": SOURCE,
    }  # fmt: skip
    seen = []
    assert verify_inspected(found, seen.append) == "every shard is whole"
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= found["bytes"]


def test_an_image_over_two_shards_counts_once_and_ragged_images_are_a_range(tmp_path):
    with ActivationWriter(tmp_path / "s", 4, torch.float32, {}, rows_per_shard=2) as writer:
        writer.append(torch.ones(5, 4), {"image": ["a", "b", "b", "b", "c"], "token": range(5)})
    assert inspect(tmp_path / "s")["rows_per_image"] == [1, 3]
    assert inspect(tmp_path / "s")["images"] == 3
    assert "3, rows of each: 1 to 3" in run("inspect", tmp_path / "s")
    assert "none" in run("inspect", tmp_path / "s")


def test_an_incomplete_store_of_codes_with_an_unmerged_part(folder):
    before = sorted(os.listdir(folder / "codes"))
    found = inspect(folder / "codes")
    expected = {"kind": "codes", "rows": 8, "d_sae": 50, "dtype": "float32", "shards": 2, "complete": False,
                "entries": 26, "images": 8, "rows_per_image": [1, 1]}  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    text = run("inspect", folder / "codes", "--verify")
    for word in ("store of sparse codes", "8 x 50", "3.25 on average", "INCOMPLETE", "every shard is whole", "sae22"):
        assert word in text
    assert sorted(os.listdir(folder / "codes")) == before, "nothing was merged"
    empty = CodesWriter(folder / "empty", 5, torch.float32, {})
    assert not empty.complete
    assert inspect(folder / "empty")["rows_per_image"] is None
    assert "0 x 5" in run("inspect", folder / "empty", "--verify")


def test_saes(folder):
    found = inspect(folder / "matryoshka")
    expected = {"kind": "sae", "architecture": "matryoshka", "d_in": 16, "d_sae": 64, "k": 5, "group_sizes": [16, 48],
                "threshold": 0.125, "dtype": "float32"}  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["metadata"] == {"steps": 7, "norm_factor": 1.23456789}
    assert inspect(folder / "topk")["threshold"] is None
    text = run("inspect", folder / "matryoshka", "--verify")
    for word in ("matryoshka", "16 -> 64", "16, 48", "0.125", "metadata: norm_factor", "1.23457", "finite"):
        assert word in text
    half = with_metadata(SparseAutoencoder(SAEConfig(16, 64, 5, "topk"), dtype=torch.bfloat16), layer=3)
    half.save_pretrained(folder / "half")
    assert inspect(folder / "half")["dtype"] == "bfloat16"
    assert inspect(folder / "half")["metadata"] == {"layer": 3}


def test_a_run_with_and_without_its_sae(folder):
    matrix = folder / "train.npy"
    np.save(matrix, np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32))
    steps = ("--steps", 4, "--batch-size", 500, "--checkpoint-every", 2)
    run("train", "--activations", matrix, "--output", folder / "run", "--d-sae", 32, "--k", 3, *steps)
    found = inspect(folder / "run")
    assert (found["kind"], found["complete"], found["steps"], found["checkpoints"]) == ("run", True, 4, [2, 4])
    assert found["sae"]["d_sae"] == found["settings"]["sae"]["d_sae"] == 32
    text = run("inspect", folder / "run", "--verify")
    for word in (
        "training run",
        "16 -> 32",
        "batch_topk",
        "train.npy",
        "complete",
        "2, 4",
        "weights complete",
        "4 of 200 rows",
    ):
        assert word in text or word in re.sub(r"\s", "", text)  # a long path is broken
    assert inspect(folder / "run" / "checkpoints" / "step_00000002")["kind"] == "sae"
    for name in ("cfg.json", "sae_weights.safetensors"):
        os.unlink(folder / "run" / name)
    assert inspect(folder / "run")["complete"] is False
    assert "INCOMPLETE" in run("inspect", folder / "run", "--verify")
    (folder / "run" / "run.json").write_text("{}")
    assert "run.json: sae is missing" in run("inspect", folder / "run", code=2)


def test_a_matrix_file(folder):
    assert inspect(folder / "x.npy") == {
        "path": str(folder / "x.npy"), "kind": "matrix", "bytes": os.path.getsize(folder / "x.npy"), "rows": 5,
        "d_in": 3, "dtype": "float32",
    }  # fmt: skip
    assert "every row is finite" in run("inspect", folder / "x.npy", "--verify")
    np.save(folder / "x.npy", np.full((5, 3), np.nan, dtype=np.float32))
    assert "row 0, column 0 is nan" in run("inspect", folder / "x.npy", "--verify", code=2)
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(4, 3)}, folder / "two.pt")
    assert inspect(f"{folder / 'two.pt'}::b")["rows"] == 4


def test_a_folder_lists_what_is_in_it(folder):
    found = inspect(folder)
    assert [(item["path"].rsplit("/")[-1], item["kind"]) for item in found["contents"]] == [
        ("acts", "activations"), ("codes", "codes"), ("matryoshka", "sae"), ("topk", "sae"),
    ]  # fmt: skip
    assert found["bytes"] == sum(item["bytes"] for item in found["contents"])
    text = run("inspect", folder, "--verify")
    for word in ("acts", "24 x 16", "codes", "8 x 50", "16 -> 64", "NO", "hf:openai/clip", "everything is whole"):
        assert word in text
    assert "sae22" not in text  # only what all stores share


def test_json_is_one_object(folder):
    found = json.loads(run("inspect", folder, "--verify", "--json"))
    assert found["verified"] == "everything is whole"
    assert [item["verified"] for item in found["contents"]][:2] == ["every shard is whole"] * 2
    assert found["contents"][0] == inspect(folder / "acts") | {"verified": "every shard is whole"}


@pytest.mark.parametrize("name", ["", "acts", "codes", "matryoshka", "x.npy"])
def test_tables_fit_80_columns(folder, name, monkeypatch):
    (folder / "acts").rename(folder / "residual-22-random2-all")
    monkeypatch.setattr(cli.out, "_width", 80)  # run() asks for 200
    path = folder / name.replace("acts", "residual-22-random2-all")
    lines = run("inspect", path).splitlines()
    assert max(len(line) for line in lines if str(folder) not in line) <= 80
    if not name:
        assert re.search(r"residual-22-random2-all +activations", "\n".join(lines))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "acts" / "shard-00001.safetensors", -1), "shard-00001.safetensors: altered"),
        (lambda f: flip(f / "codes" / "shard-00001.safetensors", -1), "shard-00001.safetensors: altered"),
        (lambda f: os.truncate(f / "codes" / "shard-00000.safetensors", 90), "shard-00000.safetensors"),
        (lambda f: os.unlink(f / "acts" / "items-00002.parquet"), "items-00002.parquet: missing"),
        (lambda f: os.truncate(f / "topk" / "sae_weights.safetensors", 900), "not a complete safetensors"),
        (lambda f: poison(f / "topk"), "W_dec holds NaN"),
        (lambda f: (f / "topk" / "cfg.json").write_text("["), "not valid JSON"),
        (lambda f: (f / "acts" / "index.json").write_text("{}"), "index.json: format is missing"),
        (lambda f: flip(f / "topk" / "sae_weights.safetensors", -1), "sae_weights.safetensors: altered"),
        (lambda f: flip(f / "topk" / "cfg.json", 30), "cfg.json"),
    ],
)
def test_damage_is_one_line_and_exit_code_2(folder, damage, message):
    damage(folder)
    text = run("inspect", folder, "--verify", code=2)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def poison(directory):
    tensors = load_file(directory / "sae_weights.safetensors")
    tensors["W_dec"][3, 4] = torch.nan
    save_file(tensors, directory / "sae_weights.safetensors")
    edit_record(directory / "cfg.json")


def test_what_is_unknown(tmp_path):
    assert "nothing to inspect in it; known are a store (index.json), an SAE" in run("inspect", tmp_path, code=2)
    assert "no such file or directory" in run("inspect", tmp_path / "none", code=2)
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt: neither store, SAE, run, matrix nor result of a command; known are" in run(
        "inspect", tmp_path / "notes.txt", code=2
    )


def test_a_text_beside_others_is_told_from_them(folder):
    (folder / "words.json").write_text('["red", "blue"]')
    (folder / "topk" / "words.json").write_text('{"a": "red"}')
    for path in (folder / "words.json", folder / "topk" / "words.json"):
        text = run("inspect", path, code=2)
        assert "words.json: neither store, SAE, run, matrix nor result of a command" in text
        assert "matryoshka" not in text
    assert inspect(folder / "topk" / "cfg.json")["kind"] == "sae"
    assert inspect(folder / "acts" / "index.json")["kind"] == "activations"


def cut_runs(folder):
    """Two runs, one of which has a checkpoint of step 2 of 4, and no SAE; the other diverged in step 3."""
    np.save(folder / "train.npy", np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32))
    for name in ("cut", "diverged"):
        steps = ("--steps", 4, "--batch-size", 50, "--checkpoint-every", 2, "--d-sae", 32, "--k", 3, "--device", "cpu")
        run("train", "--activations", folder / "train.npy", "--output", folder / "runs" / name, *steps)
        for file in ("cfg.json", "sae_weights.safetensors"):
            os.unlink(folder / "runs" / name / file)
        shutil.rmtree(folder / "runs" / name / "checkpoints" / "step_00000004")
    log = folder / "runs" / "diverged" / "metrics.jsonl"
    log.write_text(log.read_text().splitlines()[0] + '\n{"step": 3, "losses/overall_loss": null}\n')
    return folder / "runs"


def test_cut_runs_say_how_far_they_came_and_how_they_go_on(folder):
    runs = cut_runs(folder)
    found = {Path(item["path"]).name: item for item in inspect(runs)["contents"]}
    assert {name: (item["complete"], item["steps_taken"], item["diverged_at"]) for name, item in found.items()} == {
        "cut": (False, 2, None), "diverged": (False, 2, 3)
    }  # fmt: skip
    again = f"saevlm-fast train --config {runs / 'cut' / 'settings.toml'} --resume"
    assert found["cut"]["way_on"] == again
    shutil.copytree(runs / "cut", folder / "a copy")  # whose settings name the first one
    assert inspect(folder / "a copy")["way_on"].endswith(f"--output '{folder}/a copy' --resume")
    for path in (runs, runs / "cut"):
        text = " ".join(run("inspect", path).split())
        assert "INCOMPLETE, step 2 of 4; continue with saevlm-fast train --config" in text
        assert again.replace(" ", "") in text.replace(" ", "")
    for path in (runs, runs / "diverged"):
        assert "DIVERGED at step 3 of 4; begin anew with a smaller lr, and --force" in " ".join(
            run("inspect", path).split()
        )
    run(*again.split()[1:])
    assert inspect(runs / "cut")["complete"]


def test_a_run_that_is_to_be_replaced_names_the_unfinished_one(folder):
    runs = cut_runs(folder)
    steps = ("--steps", 4, "--batch-size", 50, "--d-sae", 32, "--k", 3, "--device", "cpu")
    run("train", "--activations", folder / "train.npy", "--output", folder / "whole", *steps)
    shutil.copytree(runs / "cut", folder / "whole" / ".replacement")
    found = inspect(folder / "whole")
    assert (found["complete"], found["replacement"]["complete"], found["replacement"]["steps_taken"]) == (
        True,
        False,
        2,
    )
    text = " ".join(run("inspect", folder / "whole").split())
    assert "state complete its replacement INCOMPLETE, step 2 of 4; continue with saevlm-fast train" in text


def test_a_grid_is_listed_with_its_summary_and_runs_of_places_below_it(folder):
    np.save(folder / "train.npy", np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32))
    steps = ("--steps", 2, "--batch-size", 50, "--d-sae", 32, "--k", "2,3", "--device", "cpu")
    run("train", "--activations", folder / "train.npy", "--output", folder / "grid", *steps)
    (folder / "grid" / "layer-1").mkdir()
    shutil.move(folder / "grid" / "k2", folder / "grid" / "layer-1" / "k2")  # as `train --layer` has them
    (folder / "grid" / "notes").mkdir()
    found = inspect(folder / "grid")
    kinds = {str(Path(item["path"]).relative_to(folder / "grid")): item["kind"] for item in found["contents"]}
    assert kinds == {"grid.json": "result", "grid.parquet": "result", "k3": "run", "layer-1/k2": "run"}
    text = run("inspect", folder / "grid")
    assert "layer-1/k2" in text
    assert f"{found['others']} other files and folders" in text


def test_runs_that_one_command_began_go_on_together(folder):
    runs = cut_runs(folder)
    settings = (runs / "cut" / "settings.toml").read_text()
    (runs / "settings.toml").write_text(settings.replace(str(runs / "cut"), str(runs)))
    assert "way_on" not in inspect(runs), "one has diverged, and would again"
    assert run("inspect", runs).count("--resume") == 1
    shutil.rmtree(runs / "diverged")
    shutil.copytree(runs / "cut", runs / "other")
    assert inspect(runs)["way_on"] == f"saevlm-fast train --config {runs / 'settings.toml'} --resume"
    assert run("inspect", runs).count("--resume") == 1, "of both together"


def test_what_is_nearly_an_sae(tmp_path):
    """Half of one, a damaged one, several further below, and tensors without settings."""
    state = {"encoder.weight": torch.ones(8, 4), "encoder.bias": torch.zeros(8)}
    state |= {"decoder.weight": torch.ones(4, 8), "bias": torch.zeros(4)}
    folders = {name: tmp_path / name for name in ("half", "damaged", "lone", "saes/a/trainer_0", "saes/b/trainer_0")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    save_file({"W_dec": torch.ones(8, 4)}, folders["half"] / "sae_weights.safetensors")
    for name in ("damaged", "lone", "saes/a/trainer_0", "saes/b/trainer_0"):
        torch.save(state, folders[name] / "ae.pt")
    (folders["damaged"] / "config.json").write_text("{")
    for name in ("saes/a/trainer_0", "saes/b/trainer_0"):
        (folders[name] / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    assert "cfg.json: no such file; an SAE directory holds" in run("inspect", folders["half"], code=2)
    assert "config.json: not valid JSON" in run("inspect", folders["damaged"], code=2)
    assert "name one: a/trainer_0, b/trainer_0" in run("inspect", tmp_path / "saes", code=2)
    for path in (folders["lone"], folders["lone"] / "ae.pt"):
        assert "assume format=dictionary_learning" in run("inspect", path, code=2)


def test_words_and_numbers():
    sizes = [human_bytes(n) for n in (0, 999, 1000, 1_234_567, 999_949_000_000, 5 * 10**15)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "1.2 MB", "1.0 TB", "5000.0 TB"]
    assert short_values({"a": {"x": 1}, "b": None, "c": 0.1 + 0.2, "d": [1], "e": {"spec": "s"}, "f": 0}) == [
        ("c", "0.3"), ("e", "s"), ("f", "0")
    ]  # fmt: skip


def test_a_damaged_one_among_several_is_named_and_the_others_are_shown(folder):
    (folder / "codes" / "index.json").write_text("{")
    found = inspect(folder)
    assert {Path(item["path"]).name: item["kind"] for item in found["contents"]} == {
        "acts": "activations", "codes": "damaged", "matryoshka": "sae", "topk": "sae"
    }  # fmt: skip
    assert found["others"] == 1  # x.npy
    text = run("inspect", folder)
    for word in ("DAMAGED: codes", "not valid JSON", "24 x 16", "1 other files"):
        assert word in text
    assert "not valid JSON" in run("inspect", folder, "--verify", code=2)


def test_what_is_nobodys_result_is_told_in_a_line(folder):
    os.mkfifo(folder / "pipe.csv")
    (folder / "foreign.json").write_text('{"metadata": {}, "latents": ["a"]}')
    (folder / "layers.json").write_text('{"what": "a model", "layers": [{"type": "Dense"}]}')
    for name in ("pipe.csv", "foreign.json", "layers.json"):
        with pytest.raises(ValueError, match=name):
            inspect(folder / name)
