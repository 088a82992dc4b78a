"""What files of Prisma and PatchSAE do not say, or say twice: told, assumed or refused."""

import gzip
import sys
import types

import pytest
import torch
from foreign_traps import made, refused

from foreign_files import D, S, assert_same, save
from foreign_vision import prisma_config
from saevlm_fast.formats.registry import read


def test_prisma_normalises_where_its_settings_are_silent(tmp_path):
    silent, null = made("prisma-relu-missing"), made("prisma-relu-None")
    assert "normalize_activations" not in silent.files["config.json"]
    assert silent.read(tmp_path / "silent").input_norm == "layer_norm"
    assert null.read(tmp_path / "null").input_norm == "none"


def test_prisma_settings_hold_against_folders_and_stale_entries(tmp_path):
    one = made("prisma-topk-layer_norm")
    one.files["config.json"]["activation_fn_kwargs"] = {"k": 8}
    plain = one.read(tmp_path / "sae-top_k-64-cls_only-layer_11-hook_resid_post")
    assert plain.k == 8
    assert plain.d_sae == S != one.files["config.json"]["d_sae"]
    said = {key: plain.metadata[key] for key in ("layer", "hook", "tokens")}
    assert said == {"layer": 4, "hook": "hook_resid_post", "tokens": "cls"}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str 'tanh-relu' of a standard SAE is not supported"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, r"activation_fn_kwargs\.k is None"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": None}, r"activation_fn_kwargs\.k is None"),
        ({"architecture": "jumprelu"}, "architecture 'jumprelu' is neither 'standard' nor 'gated'"),
        ({"architecture": "gated", "activation_fn_str": "topk"}, "'topk' of a gated SAE"),
        ({"is_transcoder": True}, "a transcoder, whose output is another site"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations 'batch_norm' is not one of"),
        ({"d_in": 768}, r"W_enc has shape \(6, 20\), expected \(768, d_sae\)"),
    ],
)
def test_prisma_refuses(tmp_path, more, why):
    one = made("prisma-relu-none")
    one.files["config.json"] |= more
    refused(one, tmp_path, why)


def test_a_prisma_transcoder_that_does_not_say_so(tmp_path):
    one = made("prisma-relu-none")
    one.files[one.tensor_file]["b_dec_out"] = torch.zeros(D)
    refused(one, tmp_path, "Prisma: a transcoder")


def test_the_unused_bias_of_a_gated_prisma_may_be_anything(tmp_path):
    one = made("prisma_gated-layer_norm")
    one.files[one.tensor_file]["b_enc"] = torch.full((S,), torch.nan)
    assert_same(one.read(tmp_path), one, torch.float32)


def test_two_checkpoints_in_a_folder_are_named_one_by_one(tmp_path):
    one = made("prisma-relu-none")
    one.files["n_images_100.pt"] = {**one.files[one.tensor_file], "b_enc": torch.ones(S)}
    with pytest.raises(ValueError, match=r"found config\.json, n_images_100\.pt, n_images_2600058\.pt"):
        one.read(tmp_path)
    one.open = "n_images_2600058.pt"
    assert_same(one.read(tmp_path), one, torch.float32)


@pytest.fixture
def settings_object(monkeypatch):
    """An object of a class that no loader here can import, as a library's training pickles it."""

    def make(name, settings):
        module, _, short = name.rpartition(".")
        cls = type(short, (), {"__module__": module, "__qualname__": short})
        parents = module.split(".")
        for n in range(len(parents)):
            monkeypatch.setitem(sys.modules, ".".join(parents[: n + 1]), types.ModuleType(".".join(parents[: n + 1])))
        setattr(sys.modules[module], short, cls)
        thing = cls()
        vars(thing).update(settings)
        return thing

    return make


PRISMA_CLASS = "vit_prisma.sae.config.VisionModelSAERunnerConfig"


@pytest.mark.parametrize("norm", [None, "missing", "layer_norm"])
@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_pickled_settings_of_prisma(tmp_path, settings_object, norm, suffix):
    one = made(f"prisma-relu-{norm}")
    settings = prisma_config("relu", norm, device=torch.device("cpu"), dtype=torch.float32)
    state = one.files[one.tensor_file]
    one.files = {f"sae{suffix}": {"cfg": settings_object(PRISMA_CLASS, settings), "state_dict": state}}
    plain = one.read(tmp_path)
    assert_same(plain, one, torch.float32)
    assert plain.metadata["source_config"]["hook_point_layer"] == 4


@pytest.mark.parametrize(
    "name", ["src.sae_training.config.ViTSAERunnerConfig", "sae_training.config.ViTSAERunnerConfig"]
)
def test_pickled_settings_of_patch_sae_do_not_normalise(tmp_path, settings_object, name):
    one = made("patch_sae")
    value = one.files["clip.pt"]
    value["cfg"] = settings_object(name, {**value["cfg"], "hook_point_layer": -2, "activation_fn_str": "relu"})
    plain = one.read(tmp_path)
    assert_same(plain, one, torch.float32)
    assert plain.metadata["source_format"] == "patch_sae"


def test_pickled_settings_of_another_class_are_named(tmp_path, settings_object):
    one = made("prisma-relu-layer_norm")
    settings = settings_object("somebody.elses.Config", prisma_config("relu", "layer_norm"))
    one.files = {"sae.pt": {"cfg": settings, "state_dict": one.files[one.tensor_file]}}
    refused(one, tmp_path, r"needs somebody\.elses\.Config")
    plain = read(tmp_path / "sae.pt", trust_pickle=("somebody.elses.Config",))
    assert_same(plain, one, torch.float32)


def test_the_layout_of_sae_lens_2(tmp_path):
    one = made("prisma-relu-layer_norm")
    state = one.files[one.tensor_file]
    one.files = {"sae.pt": {"config": prisma_config("relu", "layer_norm"), "autoencoder": {"state_dict": state}}}
    assert_same(one.read(tmp_path), one, torch.float32)


def test_compressed_pickles_and_gates_that_were_never_made(tmp_path):
    one = made("patch_sae")
    one.files["clip.pt"]["cfg"]["gated_sae"] = True
    refused(one, tmp_path / "gated", "PatchSAE: gated_sae is declared there, and was never made")
    save(tmp_path / "gz" / "sae.pkl.gz", gzip.compress(b"anything"))
    with pytest.raises(ValueError, match="a compressed pickle; unpack it"):
        read(tmp_path / "gz")
