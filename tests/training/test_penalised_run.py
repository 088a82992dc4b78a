"""Whole runs of relu and jumprelu SAEs: quality, files, resuming, the command line, and what uses the result."""

import json

import numpy as np
import pytest
import torch
from small_runs import Stopped, stop_at

from command import run as run_command
from command import run_json
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.evaluate import evaluate
from saevlm_fast.training.run import train
from tiny_tower import WIDTH, save_clip, save_photos

D_IN, D_SAE = 24, 64
RECIPES = {"relu": {"l1": 0.02}, "jumprelu": {"target_l0": 8.0, "bandwidth": 0.01}}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, PlantedConcepts(D_IN, 12, 40, seed=3).sample(1500)[0])
    return path


def run(matrix, output, architecture, *, on_step=lambda step: None, resume=False, **changed):
    recipe = {"steps": 120, "batch_size": 128, "lr": 5e-3, "seed": 1, **RECIPES[architecture], **changed}
    options = RunOptions(output, "cpu", log_every=40, checkpoint_every=40, resume=resume)
    sae = SAEConfig(D_IN, D_SAE, None, architecture)
    return train(open_activations(matrix), sae, TrainConfig(**recipe), options, on_step=on_step)


@pytest.mark.parametrize("architecture", RECIPES)
def test_a_run_is_good_and_one_that_was_killed_goes_on_to_the_same_bits(matrix, tmp_path, architecture):
    sae, metrics = run(matrix, tmp_path / "run", architecture)
    assert metrics["explained_variance"] > 0.7
    assert 2 < metrics["l0"] < 40
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "run")
    x_BD = open_activations(matrix).rows(torch.arange(50))
    assert torch.equal(loaded(x_BD), sae(x_BD))
    assert loaded.config == sae.config
    assert loaded.config.k is None
    assert set(RECIPES[architecture]) <= set(loaded.config.metadata["training"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"relu": "losses/l1_loss", "jumprelu": "losses/l0_loss"}[architecture] in lines[0]
    checkpoint = SparseAutoencoder.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000120")
    assert evaluate(checkpoint, open_activations(matrix)) == metrics
    if architecture == "jumprelu":
        assert sae.threshold.shape == (D_SAE,)
        assert float(sae.threshold.std()) > 0
        assert metrics["l0"] == pytest.approx(8, rel=0.4), "the target"

    with pytest.raises(Stopped):
        run(matrix, tmp_path / "again", architecture, on_step=stop_at(60))
    begun: list[int] = []
    again, same = run(matrix, tmp_path / "again", architecture, resume=True, on_step=begun.append)
    assert begun[0] == 41
    assert same == metrics
    for name, parameter in sae.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
    assert torch.equal(again.threshold, sae.threshold)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    save_clip(root / "clip")
    save_photos(root / "photos", 6)
    return root


@pytest.mark.parametrize("architecture", RECIPES)
def test_on_the_command_line(pictures, tmp_path, architecture):
    """Harvest, train, inspect, score, and codes, whose size a dry run measures."""
    images = "--model", f"hf:{pictures / 'clip'}", "--images", pictures / "photos", "--layer", 1, "--device", "cpu"
    run_command("harvest", *images, "--output", tmp_path / "x", "--tokens", "patches")
    recipe = ("--l1", 0.01) if architecture == "relu" else ("--target-l0", 5, "--bandwidth", 0.01)
    words = "--activations", tmp_path / "x", "--d-sae", 40, "--architecture", architecture, "--batch-size", 16
    figures = run_json("train", *words, *recipe, "--steps", 30, "--output", tmp_path / "sae", "--dry-run")
    assert figures["d_sae"] == 40
    text = run_command("train", *words, *recipe, "--steps", 30, "--sparsity-warmup", 4, "--output", tmp_path / "sae")
    assert f"{architecture} SAE {WIDTH} -> 40, on" in text
    assert run_json("inspect", tmp_path / "sae")["sae"]["architecture"] == architecture
    codes = "--sae", tmp_path / "sae", "--output", tmp_path / "codes", "--tokens", "patches"
    planned = run_json("harvest", *images, *codes, "--dry-run")["disk_bytes"]
    run_command("harvest", *images, *codes)
    shard, items = (next((tmp_path / "codes").glob(f"{name}-*")).stat().st_size for name in ("shard", "items"))
    header, line = 200, 260  # of the shard; of the index, for that one
    assert planned == pytest.approx(shard - header + items + line, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--architecture", "relu", "--k", 4), "k: 4 is of topk, batch_topk, matryoshka; a relu SAE has none"),
        (("--architecture", "topk", "--l1", 0.1), "l1: 0.1 is of relu, not of topk"),
        (("--architecture", "relu", "--bandwidth", 0.1), "bandwidth: 0.1 is of jumprelu, not of relu"),
        (("--architecture", "jumprelu", "--target-l0", 0), "target_l0: 0.0 must be finite and positive"),
    ],
)
def test_settings_of_another_recipe_are_refused(matrix, tmp_path, words, message):
    command = "train", "--activations", matrix, "--output", tmp_path / "run", "--d-sae", 64, *words
    for more in ((), ("--dry-run",)):
        assert message in run_command(*command, *more, code=2)
    assert not (tmp_path / "run").exists()
