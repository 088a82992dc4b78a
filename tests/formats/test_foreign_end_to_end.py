"""SAEs of the box's tower in VISAEBench's and Prisma's layouts, through the commands and back.

What is trained here is written in those layouts by their formulas turned round (neither library trains one in a
second), and comes back as what it was.
"""

import json

import numpy as np
import pytest
import torch

from command import run, run_json
from foreign_files import save
from saevlm_fast.data.rows import open_activations
from saevlm_fast.sae import SparseAutoencoder
from tiny_tower import save_photos

LAYER = 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """photos, and stores of the tower's CLS tokens, all tokens and embeddings."""
    root = tmp_path_factory.mktemp("foreign")
    save_photos(root / "photos", 12)
    harvest = ("harvest", "--images", root / "photos", "--workers", 0, "--device", "cpu", "--model", "hf:tiny-clip")
    run(
        *harvest, "--layer", LAYER, "--point", "residual,projection", "--tokens", "cls,all", "--output", root / "stores"
    )
    return root


def trained(root, name, x_ND, architecture, **more):
    np.save(root / f"{name}.npy", x_ND.float().numpy())
    options = [word for key, value in more.items() for word in (f"--{key}", value)]
    train = ("train", "--activations", root / f"{name}.npy", "--architecture", architecture, "--d-sae", 24)
    run(*train, "--steps", 30, "--batch-size", 64, "--device", "cpu", "--output", root / name, *options)
    return SparseAutoencoder.from_pretrained(root / name)


def tokens(root):
    store = open_activations(root / "stores" / f"residual-{LAYER}-all")
    return store.rows(torch.arange(store.n_rows)).double()


def scores(root, path):
    """Of every latent; None of a dead one."""
    output, stores = path.parent / f"{path.name}.json", root / "stores"
    given = ("--activations", stores / f"residual-{LAYER}-cls", "--embeddings", stores / "projection", "--sae", path)
    run("ms-score", *given, "--device", "cpu", "--output", output)
    return [row["ms"] for row in json.loads(output.read_text())["latents"]]


def answers(root, path):
    image = root / "photos" / "class_0" / "photo_000.png"
    steer = ("steer", "--model", "hf:tiny-llava", "--layer", LAYER, "--image", image, "--prompt", "What is it?")
    given = ("--sae", path, "--latent", 3, "--alpha", 5, "--max-new-tokens", 2, "--device", "cpu")
    return run_json(*steer, *given)["steered"]


def test_visaebench(world, tmp_path):
    x_ND = tokens(world)
    ours = trained(world, "standard", x_ND, "batch_topk", k=4)
    mean_D, std = x_ND.mean(0), float(x_ND.std())
    # b of the encoder on (x - mean) / std, no pre-bias; a threshold that is kept itself.
    W_enc, W_dec, b_dec = ours.W_enc.double(), ours.W_dec.double(), ours.b_dec.double()
    state = {
        "encoder.weight": (W_enc * std).T,
        "encoder.bias": ours.b_enc.double() + (mean_D - b_dec) @ W_enc,
        "decoder.weight": W_dec / std,
        "decoder.bias": (b_dec - mean_D) / std,
    }
    threshold = float(ours.threshold.nextafter(torch.tensor(torch.inf)))
    config = {"architecture": "batchtopk", "backbone": "hf:tiny-clip", "k": 4, "threshold": threshold}
    folder = tmp_path / "batchtopk_4x_k4"
    save(folder / "config.json", {**config, "d_model": ours.config.d_in, "dict_size": 24})
    save(folder / "sae.pt", {name: tensor.detach().float().contiguous() for name, tensor in state.items()})
    np.save(tmp_path / "mean.npy", mean_D.numpy())
    text = run("inspect", folder, code=2)
    assert "input_mean" in text
    assume = f"input_mean={tmp_path / 'mean.npy'},input_std={std!r}"
    run("convert", folder, tmp_path / "back", "--assume", assume)
    same(SparseAutoencoder.from_pretrained(tmp_path / "back"), ours, x_ND)
    assert "visaebench" in run("inspect", tmp_path / "back")
    ours_S, theirs_S = scores(world, world / "standard"), scores(world, tmp_path / "back")
    assert [ms for ms in theirs_S if ms is not None] == pytest.approx([ms for ms in ours_S if ms is not None], abs=1e-4)
    assert answers(world, tmp_path / "back")


def test_prisma(world, tmp_path):
    x_ND = tokens(world)
    mean_N, std_N = x_ND.mean(1, keepdim=True), x_ND.std(1, keepdim=True)
    ours = trained(world, "normalised", (x_ND - mean_N) / (std_N + 1e-5), "topk", k=4)
    state = {name: getattr(ours, name).detach().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    config = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    config |= {"hook_point_layer": LAYER, "layer_subtype": "hook_resid_post", "model_name": "tiny-clip"}
    config |= {"d_in": ours.config.d_in, "normalize_activations": "layer_norm"}
    folder = tmp_path / "sae-top_k-64-cls_only-layer_11-hook_resid_post"
    save(folder / "config.json", config)
    save(folder / "n_images_12.pt", state)
    theirs = SparseAutoencoder.from_pretrained(folder)
    normalised = ((x_ND - mean_N) / (std_N + 1e-5)).float()
    with torch.no_grad():
        x_hat_ND = ours(normalised).double() * std_N + mean_N
    assert theirs(x_ND.float()).double().allclose(x_hat_ND, atol=1e-4 * float(x_hat_ND.abs().max()))
    run("convert", folder, tmp_path / "back")
    same(SparseAutoencoder.from_pretrained(tmp_path / "back"), theirs, x_ND)
    assert "layer_norm" in run("inspect", folder)
    assert scores(world, folder) == scores(world, tmp_path / "back")
    assert answers(world, folder)


def same(sae, other, x_ND):
    x = x_ND.float()
    with torch.no_grad():
        codes, others = sae.encode(x).dense(), other.encode(x).dense()
        assert torch.equal(codes > 0, others > 0)
        assert codes.allclose(others, rtol=1e-4, atol=1e-4)
        assert sae(x).allclose(other(x), rtol=1e-4, atol=1e-4)
