"""No command replaces anything unasked, nor works beside another; what is old stays until the new is whole."""

import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest

from command import files_below, run, run_json
from saevlm_fast import outputs
from saevlm_fast.cli.names import COMMANDS, flag_of
from saevlm_fast.outputs import output_lock
from saevlm_fast.settings import kinds_of, settings_of


def rows(data):
    return "--activations", data / "activations.npy", "--embeddings", data / "embeddings.npy"


def train_words(data, output, *more):
    return (
        "train", "--activations", data / "activations.npy", "--output", output, "--d-sae", 64, "--k", 4, "--steps", 5,
        "--batch-size", 64, "--device", "cpu", *more,
    )  # fmt: skip


EVERY_PATH = [
    (name, field)
    for name, command in COMMANDS.items()
    for field, kind in kinds_of(command.options).items()
    if kind.__name__ == "Path" and settings_of(command.options)[field].on_command_line
]


@pytest.mark.parametrize(("name", "field"), EVERY_PATH)
def test_an_empty_path_is_not_the_working_directory(name, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = settings_of(COMMANDS[name].options)[field]
    positional = [each for each, about in settings_of(COMMANDS[name].options).items() if about.positional]
    words = ["x"] * positional.index(field) + [""] if known.positional else [flag_of(field, known), ""]
    assert f"error: {field}: is empty" in run(name, *words, code=2)
    if known.in_file:
        (tmp_path / "s.toml").write_text(f"{field} = ''\n")
        assert f"s.toml: {field}: is empty" in run(name, "--config", "s.toml", code=2)


def test_there_are_paths_to_be_empty():
    assert len(EVERY_PATH) > 15


def test_scores_are_replaced_when_asked_and_once_the_new_are_whole(data, sae, tmp_path):
    output = tmp_path / "s.json"
    words = "ms-score", *rows(data), "--output", output
    run(*words, "--sae", sae)
    before = files_below(tmp_path)
    for more in ((), ("--dry-run",)):
        assert f"output: {output} already exists; --force replaces it" in run(*words, "--raw", *more, code=2)
    assert files_below(tmp_path) == before
    bad = np.load(data / "embeddings.npy")
    bad[2000, 3] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    assert "row 2000" in run(*words, "--raw", "--force", "--embeddings", tmp_path / "bad.npy", code=2)
    assert files_below(tmp_path) == before | {tmp_path / "bad.npy": (tmp_path / "bad.npy").read_bytes()}
    assert run_json(*words, "--raw", "--force")["sae"] == "raw neurons"
    output.unlink()
    assert "s.json.settings.toml already exists; --force replaces it" in run(*words, "--raw", code=2)
    output.symlink_to(tmp_path / "nowhere.json")
    assert "s.json already exists; --force replaces it" in run(*words, "--raw", code=2)
    assert not (tmp_path / "nowhere.json").exists()


@pytest.mark.parametrize("name", ["activations.npy", "embeddings.npy", "settings.toml"])
def test_synthetic_data_replaces_nothing_unasked(name, tmp_path):
    (tmp_path / name).symlink_to("of-mine")
    for more in ((), ("--dry-run",)):
        assert f"{name} already exists; --force replaces it" in run("synthetic", tmp_path, "--rows", 9, *more, code=2)
    assert os.listdir(tmp_path) == [name]
    run("synthetic", tmp_path, "--rows", 9, "--force")
    assert not (tmp_path / name).is_symlink()


def test_no_run_is_written_over_what_is_of_none(data, tmp_path):
    output = tmp_path / "run"
    stores = "index.json", "harvest.json"
    for name in ("sae_weights.safetensors", "checkpoints/mine.txt", "cfg.json", "run.json", *stores):
        (output / name).parent.mkdir(parents=True)
        (output / name).write_text("{}")
        before = files_below(output)
        for more in ((), ("--force",), ("--resume",), ("--dry-run", "--force")):
            text = run(*train_words(data, output, *more), code=2)
            assert f"output: {output} holds {name.split('/')[0]}, but no run" in text
        assert files_below(output) == before
        (output / name).unlink()
        for path in (output / "checkpoints", output):
            path.is_dir() and path.rmdir()
    output.mkdir()
    (output / "settings.toml").write_text("mine = 1\n")
    assert "settings.toml already exists; --force replaces it" in run(*train_words(data, output), code=2)


def test_a_demo_is_not_written_over_files_of_its_names(tmp_path):
    (tmp_path / "scores-mine.parquet").touch()
    for more in ((), ("--dry-run",)):
        text = run("demo", "--output", tmp_path, *more, code=2)
        assert "scores-mine.parquet already exists; --force replaces it" in text


def hold(output, directory, held):
    with output_lock(output, directory=directory):
        held.set()
        time.sleep(600)


WRITERS = [
    "synthetic",
    "train",
    "ms-score",
    "evaluate",
    "harvest",
    "demo",
    "steering-score",
    "top-images",
    "name",
    "report",
    "human-agreement",
    "cross-modal",
    "steerability",
    "erase",
]


@pytest.mark.parametrize("name", WRITERS)
def test_no_command_works_on_an_output_in_use(name, data, tmp_path, monkeypatch):
    """It is refused before anything is opened: the models and the images are not there."""
    is_file = name.endswith("score") or name in ("name", "human-agreement", "steerability", "erase")
    output = tmp_path / ("out.json" if is_file else "out")
    none = ("--model", "none", "--output", output, "--images", "none")
    words = {
        "synthetic": (output,),
        "train": train_words(data, output, "--resume")[1:],
        "ms-score": ("--raw", *rows(data), "--output", output),
        "evaluate": ("--sae", "none", "--activations", "none", "--output", output),
        "harvest": none,
        "demo": ("--output", output),
        "top-images": ("--sae", "none", "--activations", "none", "--output", output),
        "cross-modal": ("--sae", "none", "--activations", "none", "--output", output),
        "name": ("--sae", "n", "--codes", "n", "--embeddings", "n", "--text-model", "n", "--output", output),
        "human-agreement": ("--benchmark", "none", "--output", output),
        "report": ("--sae", "none", "--activations", "none", "--output", output),
        "steerability": (*none, "--sae", "n", "--layer", 1),
        "erase": (*none, "--sae", "n", "--layer", 1),
        "steering-score": (*none, "--sae", "n", "--layer", 1, "--codes", "n", "--embeddings", "n", "--text-model", "n"),
    }[name]
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(output, not is_file, held))
    other.start()
    assert held.wait(120)
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    before = files_below(tmp_path)
    text = run(name, *words, code=2)
    assert f"error: output: {output} is in use: process {other.pid} on " in text
    assert text.count("\n") == 1
    assert files_below(tmp_path) == before
    other.kill()
    other.join()


@pytest.mark.parametrize("name", ["synthetic", "train", "ms-score", "evaluate", "harvest"])
def test_an_output_that_cannot_be_written_is_refused_first(name, data, sae):
    words = {
        "synthetic": ("/proc/none",),
        "train": train_words(data, "/proc/none")[1:],
        "ms-score": ("--raw", *rows(data), "--output", "/proc/s.json"),
        "evaluate": ("--sae", "none", "--activations", "none", "--output", "/proc/none"),
        "harvest": ("--model", "none", "--images", "none", "--output", "/proc/none"),
    }[name]
    assert "cannot be written: " in run(name, *words, code=2)


def test_a_colon_in_a_relative_output(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--model", "hf:tiny-clip", "--images", "scenes:train:8", "--layer", 1, "--device", "cpu"
    run("harvest", *words, "--output", "a:b", "--point", "residual,projection")
    assert run_json("inspect", "a:b", "--verify")["verified"]
    run("ms-score", "--raw", "--activations", "a:b/residual-1-cls", "--embeddings", "a:b/projection",
        "--output", "c:d.parquet")  # fmt: skip
    for suffix in ("csv", "json"):
        run("ms-score", "--raw", *rows(data), "--output", f"c:d.{suffix}")
    run("synthetic", "x:y", "--rows", 9)


@pytest.mark.parametrize("as_other_path", [False, True])
def test_what_is_read_is_never_replaced(data, sae, tmp_path, as_other_path):
    """With --force a table of scores was the output that replaced it."""
    scores = tmp_path / "scores.parquet"
    run("ms-score", *rows(data), "--sae", sae, "--output", scores)
    before = scores.read_bytes()
    output = scores
    if as_other_path:
        output = tmp_path / "other.parquet"
        output.hardlink_to(scores)
    words = ("--sae", sae, "--activations", data / "activations.npy", "--latents", "top:5", "--scores", scores)
    for more in ((), ("--force",), ("--force", "--dry-run")):
        text = run("top-images", *words, "--output", output, *more, code=2)
        assert f"output: {output} is --scores as well; what is read cannot be replaced" in text
    assert scores.read_bytes() == before
    text = run("convert", sae, sae, "--to", "sparsify", "--force", code=2)
    assert f"output: {sae} is SOURCE as well" in text


def test_the_record_of_a_store_or_an_sae_is_no_output(data, sae, tmp_path):
    """--force wrote scores in place of an SAE's cfg.json, in the folder that was read."""
    copy = tmp_path / "sae"
    shutil.copytree(sae, copy)
    before = files_below(copy)
    text = run("ms-score", *rows(data), "--sae", copy, "--output", copy / "cfg.json", "--force", code=2)
    assert f"output: {copy / 'cfg.json'} is the record of a store, a run or an SAE; give another name" in text
    assert files_below(copy) == before
    scores = "ms-score", *rows(data), "--sae", copy, "--output", copy / "scores.json"
    run(*scores)
    run(*scores, "--force")  # beside the SAE they may lie


def test_a_folder_may_be_called_as_a_setting_is(data, tmp_path, monkeypatch):
    """topk is no path that is read, nor is a text that no file can be called."""
    monkeypatch.chdir(tmp_path)
    words = ("train", "--activations", data / "activations.npy", "--architecture", "topk", "--d-sae", 64, "--k", 4)
    more = ("--steps", 5, "--batch-size", 64, "--device", "cpu")
    for output in ("topk", "cpu"):
        run(*words, *more, "--output", output)
        assert "all steps are done" in run(*words, *more, "--output", output, "--resume")
    (tmp_path / "sheet.png").write_bytes(b"")
    listed = ",".join(map(str, range(64))) * 4
    text = run("top-images", "--sae", "topk", "--activations", data / "activations.npy", "--latents", listed,
               "--output", "sheet.png", code=2)  # fmt: skip
    assert "too long" not in text
