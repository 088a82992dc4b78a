"""One rule whether an SAE and rows belong together, and the commands that follow it."""

import pytest
import torch
from safetensors.torch import save_file

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.provenance import check_rows_of, check_sae_of, misfit
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.monosemanticity import score
from tests.helpers.command import run

TOWER = {"class": "CLIPVisionModel", "transformers": "5.24.0", "weights_sha256": "a", "spec": "hf:clip"}
HERE = {"point": "residual", "layer": 3, "tokens": "random2", "model": TOWER}


@pytest.mark.parametrize(
    "rows",
    [
        {"layer": 4},
        {"point": "mlp"},
        {"point": "projection", "layer": None},
        {"layer": 4, "model": None, "tokens": None},
    ],
)
def test_another_place_is_refused(rows):
    with pytest.raises(ValueError, match=r"^rows x, but the SAE was trained on residual of layer 3$"):
        misfit(HERE, HERE | rows, "the SAE", "rows x")


@pytest.mark.parametrize(
    ("rows", "warned"),
    [
        ({"tokens": "cls"}, True),
        ({"tokens": "mean"}, True),
        ({"tokens": "patches"}, False),
        ({"tokens": "random16"}, False),
        ({"tokens": "all"}, False),
        ({"tokens": "random2-all"}, False),
        ({"tokens": "of my own"}, False),
        ({"model": TOWER | {"weights_sha256": "b"}}, True),
        ({"model": TOWER | {"class": "Dinov2Model"}}, True),
        ({"model": TOWER | {"class": "CLIPVisionModelWithProjection", "weights_sha256": "b"}}, False),
        ({"model": {"class": "VisionTransformer", "open_clip": "3.3.0", "weights_sha256": "b"}}, False),
        ({"model": "clip"}, False),
    ],
)
def test_what_may_be_meant_is_warned_of(rows, warned):
    said = misfit(HERE, HERE | rows, "the SAE", "rows x")
    assert (said is not None) == warned
    if warned:
        assert said.startswith("the SAE was trained on residual of layer 3, tokens random2")
        assert said.endswith("of another model") == ("model" in rows)


def test_a_class_token_is_not_what_patches_are():
    assert misfit(HERE | {"tokens": "cls"}, HERE | {"tokens": "all"}, "it", "x") is not None
    assert misfit(HERE | {"tokens": "all"}, HERE | {"tokens": "cls"}, "it", "x") is None


@pytest.mark.parametrize("record", [None, "somewhere", {}, {"path": "rows.npy"}, {"layer": None}])
def test_nothing_is_said_where_nothing_is_known(record):
    assert misfit(record, HERE, "it", "x") is None
    assert misfit(HERE, record, "it", "x") is None


def sae_of(source, d_in=4):
    return SparseAutoencoder(SAEConfig(d_in, 8, 2, "topk", metadata={"source": source}))


def rows_of(source, n=6):
    rows = Activations.from_tensor(torch.randn(n, 4))
    rows.source = source
    return rows


def test_steering_and_scoring_follow_the_rule():
    elsewhere = HERE | {"layer": 1}
    with pytest.raises(ValueError, match=r"^layer: 3, but the SAE was trained on residual of layer 1$"):
        check_sae_of(sae_of(elsewhere), 3)
    assert check_sae_of(sae_of(HERE), 3, "patches") is None
    assert check_sae_of(sae_of(HERE), 3, "cls") is not None
    with pytest.raises(
        ValueError, match=r"^activations: .* are of residual of layer 3, but the SAE was trained on res"
    ):
        score(rows_of(HERE), rows_of(None), sae_of(elsewhere))
    assert check_rows_of(sae_of(HERE), rows_of(HERE | {"tokens": "cls"})) is not None
    score(rows_of(HERE | {"tokens": "cls"}), rows_of(None), sae_of(HERE))


def test_ms_score_refuses_and_warns(tmp_path):
    """From stores, as a user has them."""
    images = ["--images", "scenes:test:6", "--model", "hf:tiny-clip"]
    run("harvest", *images, "--output", tmp_path / "rows", "--layer", 1, "--tokens", "cls")
    save_file({"rows": torch.randn(6, 5)}, tmp_path / "embeddings.safetensors")
    from saevlm_fast.data.rows import open_activations

    source = open_activations(tmp_path / "rows").source
    arguments = ["--activations", tmp_path / "rows", "--embeddings", tmp_path / "embeddings.safetensors"]
    for name, record in (("same", {}), ("layer", {"layer": 3}), ("tokens", {"tokens": "patches"})):
        sae_of(source | record, source and 128).save_pretrained(tmp_path / name)
    same = run("ms-score", *arguments, "--sae", tmp_path / "same")
    assert "trained on" not in same
    tokens = run("ms-score", *arguments, "--sae", tmp_path / "tokens")
    assert "warning: the SAE was trained on residual of layer 1, tokens patches" in tokens
    layer = run("ms-score", *arguments, "--sae", tmp_path / "layer", code=2)
    assert "are of residual of layer 1, but the SAE was trained on residual of layer 3" in layer
    harvested = run("harvest", *images, "--output", tmp_path / "codes", "--layer", 1, "--tokens", "cls", "--sae",
                    tmp_path / "layer", code=2)  # fmt: skip
    assert "point: residual-1, but" in harvested
