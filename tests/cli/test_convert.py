"""saevlm-fast convert, and SAEs of other libraries where the commands take one of ours."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import foreign_trainers
from command import files_below, run, run_json
from foreign_trainers import DICTIONARY_LEARNING, SAE_LENS, SAEV
from saevlm_fast.formats.export import FILES, WRITERS
from saevlm_fast.formats.registry import read


@pytest.fixture
def ae(tmp_path):
    """What somebody has who trained with dictionary_learning."""
    return DICTIONARY_LEARNING["BatchTopKSAE"](torch.float32).write(tmp_path)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(ae, tmp_path):
    before = files_below(tmp_path)
    text = run("convert", ae, tmp_path / "out", "--to", "sparsify", "--lossy", "--dry-run")
    for part in (
        "dry run: ",
        "(dictionary_learning) as files of sparsify",
        "lost",
        "the threshold",
        "6 -> 20",
        "free disk",
    ):
        assert part in text
    assert run_json("convert", ae, tmp_path / "out", "--dry-run")["dry_run"] is True
    assert files_below(tmp_path) == before
    assert "loses the threshold" in run("convert", ae, tmp_path / "out", "--to", "sparsify", "--dry-run", code=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cfg.json").write_text("mine")
    assert "cfg.json already exists" in run("convert", ae, tmp_path / "out", "--dry-run", code=2)


@pytest.mark.parametrize("to", WRITERS)
def test_to_every_format_and_back(ae, tmp_path, to):
    found = run_json("convert", ae, tmp_path / "out", "--to", to, "--lossy")
    assert (found["format"], found["to"], found["d_sae"], found["k"]) == ("dictionary_learning", to, 20, 5)
    assert {path.rpartition("/")[2] for path in found["files"]} <= set(FILES)
    assert run_json("inspect", tmp_path / "out")["format"] == to
    run("inspect", tmp_path / "out", "--verify")
    assert f"read as  {' ' * 7}{to}" in run("convert", tmp_path / "out", tmp_path / "back", "--force")
    assert (tmp_path / "back" / "settings.toml").is_file()
    assert torch.equal(read(tmp_path / "back").W_enc, read(ae).W_enc)


@pytest.mark.parametrize("to", WRITERS)
def test_the_dtype_that_is_said_is_the_one_that_is_written(ae, tmp_path, to):
    run("convert", ae, tmp_path / "float32", "--to", "safetensors", "--lossy")
    tensors = load_file(tmp_path / "float32" / "sae.safetensors")
    with safe_open(tmp_path / "float32" / "sae.safetensors", "pt") as file:
        metadata = file.metadata()
    half = {name: each.bfloat16() if each.is_floating_point() else each for name, each in tensors.items()}
    save_file(half, tmp_path / "half.safetensors", metadata)
    found = run_json("convert", tmp_path / "half.safetensors", tmp_path / "out", "--to", to, "--lossy")
    assert read(tmp_path / "out").W_enc.dtype == getattr(torch, found["dtype"])
    said = run("convert", tmp_path / "half.safetensors", tmp_path / "out", "--to", to, "--lossy", "--force")
    assert ("bfloat16, written as float32" in said) == (found["dtype"] == "float32")
    assert torch.equal(read(tmp_path / "out").W_enc.bfloat16(), half["W_enc"])


def test_an_output_is_replaced_when_asked_and_once_the_new_is_whole(ae, tmp_path):
    out = tmp_path / "out"
    run("convert", ae, out, "--to", "sparsify", "--lossy")
    (out / "notes.txt").write_text("mine")
    before = files_below(out)
    assert "cfg.json already exists; --force replaces it" in run("convert", ae, out, code=2)
    bad = ae.parent / "bad"
    bad.mkdir()
    (bad / "config.json").write_bytes((ae / "config.json").read_bytes())
    (bad / "ae.pt").write_bytes((ae / "ae.pt").read_bytes()[:-50])
    assert "ae.pt: not a complete file of torch.save" in run("convert", bad, out, "--force", code=2)
    assert files_below(out) == before
    run("convert", ae, out, "--force")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["cfg.json", "notes.txt", "sae_weights.safetensors", "settings.toml"]


def test_it_is_repeated_from_its_settings(tmp_path):
    saev = SAEV["no schema"](torch.float32).write(tmp_path)
    run("convert", saev / "sae.pt", tmp_path / "one", "--assume", "input_mean=0.5,input_std=2")
    run("convert", saev / "sae.pt", tmp_path / "two", "--config", tmp_path / "one" / "settings.toml")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_doubts_and_losses_are_said_once(ae, tmp_path):
    state = torch.load(ae / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, ae / "ae.pt")
    text = run("convert", ae, tmp_path / "out")
    assert text.count("warning: ") == text.count("no threshold was measured") == 1
    assert "no threshold was measured" in " ".join(
        run("inspect", tmp_path / "out").split()
    )  # the lines of a table wrap
    assert run_json("inspect", ae)["doubts"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--assume", "k"), "assume: 'k' is not KEY=VALUE"),
        (("--assume", "kk=3"), "assume: 'kk' is not one of format, k,"),
        (("--assume", "k=3"), "assume: k: .*files say it themselves"),
        (("--assume", "format=saelens"), "cfg.json: no such file"),
        (("--assume", "format=x"), "assume: format 'x' is not one of saelens,"),
        (("--assume", "input_std=0"), "assume: input_std is 0.0, it must be positive"),
        (("--assume", "input_mean=none.npy"), "assume: input_mean: none.npy is neither a number nor a file"),
        (("--to", "json"), "to: 'json' is not one of saelens"),
    ],
)
def test_what_is_refused_is_one_line(ae, tmp_path, more, message):
    text = run("convert", ae, tmp_path / "out", *more, code=2)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert re.search(message, text)
    assert not (tmp_path / "out").exists()


def test_an_sae_is_not_converted_into_its_own_folder(ae):
    assert "is SOURCE as well; what is read cannot be replaced" in run("convert", ae, ae, "--force", code=2)
    assert "its files would be mixed" in run("convert", ae / "ae.pt", ae, "--force", code=2)


def test_pickles_of_objects_are_named(tmp_path):
    from foreign_trainers import dictionary

    path = dictionary(torch.float32, where="{}").write(tmp_path)
    torch.save({"encoder.weight": torch.Size([2]), "object": pytest.approx(1)}, path / "ae.pt")
    text = run("convert", path, tmp_path / "out", code=2)
    assert "a pickle that needs " in text
    assert "--trust-pickle " in text


def wide(name, monkeypatch, folder):
    """A file of that configuration for rows of width 32."""
    import foreign_files

    for module in (foreign_files, foreign_trainers):
        monkeypatch.setattr(module, "D", 32)
    return {**DICTIONARY_LEARNING, **SAE_LENS}[name](torch.float32).write(folder)


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "GatedAutoEncoder", "standard, layer_norm, pre-bias"])
def test_scores_of_an_sae_of_another_library(data, tmp_path, monkeypatch, name):
    """As it is, and converted: the same scores."""
    path = wide(name, monkeypatch, tmp_path / "theirs")
    run("convert", path, tmp_path / "ours")
    words = "ms-score", "--activations", data / "activations.npy", "--embeddings", data / "embeddings.npy"
    found = [
        run_json(*words, "--sae", sae, "--output", tmp_path / f"{sae.name}.json") for sae in (path, tmp_path / "ours")
    ]
    assert found[0]["counts"]["defined"] > 0
    assert found[0]["mean"] == found[1]["mean"]
    assert json.loads((tmp_path / f"{path.name}.json").read_text())
