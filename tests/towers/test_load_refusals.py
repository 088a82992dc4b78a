"""Points, tokens, models and files that a tower does not have, refused in one line."""

import shutil
import time

import pytest
import torch
from narrow_towers import ALL_POINTS, NARROW, SIZE, clip_processor, noise, square

from saevlm_fast.towers.from_open_clip import open_clip_anatomy
from saevlm_fast.towers.from_timm import wrap_timm
from saevlm_fast.towers.from_transformers import wrap_transformers
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint


@pytest.mark.parametrize(
    ("name", "point", "message"),
    [
        ("clip", ("residual", 3), "layer: 3 of hf:.*, whose blocks are 0 to 2"),
        ("llava", ("projection",), "projection of hf:.*: CLIPVisionModel has no projection"),
        ("dinov2", ("projection",), "Dinov2Model has no projection"),
        ("llava_onevision", ("pooled",), "no pooling head, and there is no CLS token"),
    ],
)
def test_points_a_tower_does_not_have(saved, name, point, message):
    tower = load_tower(f"hf:{saved(name)[0]}")
    with pytest.raises(ValueError, match=message), tower.hooked([HookPoint(*point)]):
        pass


def test_tokens_a_tower_does_not_have(saved):
    point = HookPoint("residual", 0)
    with load_tower(f"hf:{saved('siglip')[0]}").hooked([point, HookPoint("pooled")]) as run:
        with pytest.raises(ValueError, match="no CLS token; use mean or patches, or the point pooled"):
            run.rows_per_image(point, Tokens("cls"))
        with pytest.raises(ValueError, match="17 random ones without replacement, but there are 16 to draw from"):
            run.rows_per_image(point, Tokens.parse("random:17"))
        assert run.rows_per_image(point, Tokens.parse("random:16")) == 16
        assert run.rows_per_image(HookPoint("pooled"), None) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("residual",), "residual needs a layer"),
        (("mlp", -1), "layer: -1 must not be negative"),
        (("projection", 2), "projection is one for the whole tower, not of layer 2"),
        (("logits", 2), "'logits' is not one of residual, mlp, attention, projection, pooled"),
    ],
)
def test_hook_points_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        HookPoint(*arguments)


def test_hook_points_of_a_command_line():
    points = HookPoint.all_of(["residual", "projection"], [2, 5])
    assert [point.name for point in points] == ["residual-2", "residual-5", "projection"]
    with pytest.raises(ValueError, match="layer: pooled has no layers"):
        HookPoint.all_of(["pooled"], [1])
    with pytest.raises(ValueError, match="mlp needs a layer"):
        HookPoint.all_of(["mlp"], [])


def test_models_that_are_no_plain_vision_transformer(tmp_path):
    import open_clip
    import timm
    import transformers as t

    processor = square(t.ViTImageProcessor)
    pooling = t.PoolFormerModel(t.PoolFormerConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(ValueError, match="hf:s: PoolFormerModel is not a vision transformer"):
        wrap_transformers(pooling, processor, "hf:s")
    stages = wrap_timm(timm.create_model("test_vit", num_classes=0), "timm:t")
    stages.anatomy.blocks[1].register_forward_hook(lambda module, args, output: output[:, ::2])
    with (
        pytest.raises(ValueError, match="timm:t: not a plain vision transformer"),
        stages.hooked([HookPoint("mlp", 0)]),
    ):
        pass
    kinds = "plain vision transformer, Swin, ResNet, ConvNeXt or EfficientNet"
    with pytest.raises(ValueError, match=rf"timm:n: NormFreeNet is not a {kinds}"):
        wrap_timm(timm.create_model("test_nfnet", num_classes=0), "timm:n")
    text = open_clip.transformer.TextTransformer(8, 50, 16, 2, 1)
    with pytest.raises(ValueError, match="open_clip:r: TextTransformer is neither a vision transformer nor a ResNet"):
        open_clip_anatomy(text, "open_clip:r")


def test_specs_and_directories_that_do_not_work(saved, tmp_path):
    with pytest.raises(ValueError, match=r"model: 'clip:x' is not one of hf:NAME_OR_DIR .*, open_clip:.*, timm:NAME"):
        load_tower("clip:x")
    with pytest.raises(ValueError, match="no directory /no/such/dir"):
        load_tower("hf:/no/such/dir")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_tower(f"hf:{tmp_path}")
    directory = shutil.copytree(saved("vit")[0], tmp_path / "model")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"model/preprocessor_config\.json is missing"):
        load_tower(f"hf:{directory}")
    with pytest.raises(ValueError, match="timm has no model vit_nothing"):
        load_tower("timm:vit_nothing")
    with pytest.raises(ValueError, match=r"no weights for vit_base_patch16_xp_224; give timm:NAME:FILE"):
        load_tower("timm:vit_base_patch16_xp_224")


def test_preprocessing_that_does_not_fit(tmp_path):
    import transformers as t

    model = t.CLIPVisionModel(t.CLIPVisionConfig(**NARROW))
    processor = t.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    tower = wrap_transformers(model, processor, "hf:x")
    with (
        pytest.raises(ValueError, match="hf:x: model and preprocessing do not fit: Input image size"),
        tower.hooked(ALL_POINTS),
    ):
        pass
    processor = t.CLIPImageProcessor(size={"shortest_edge": SIZE}, do_center_crop=False)
    with pytest.raises(ValueError, match="hf:x: its preprocessing does not give images of one size"):
        wrap_transformers(model, processor, "hf:x")
    processor = clip_processor(t, do_rescale=False)  # not the usual way: all of it is left to the library
    assert wrap_transformers(model, processor, "hf:x").preprocess(noise())["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        ("hf:openai/clip-vit-base-patch32", "config.json, model.safetensors and preprocessor_config.json"),
        ("open_clip:ViT-B-32/openai", r"open_clip:ARCH/FILE\.safetensors"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", r"timm:NAME:FILE\.safetensors"),
    ],
)
def test_without_a_network_the_error_names_the_files_that_work(spec, layout, monkeypatch):
    """The hub is an address where nobody answers: no waiting for the libraries' retries."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    messages, waits = [], []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ValueError, match=f"does not answer.*offline, give .*{layout}") as error:
        load_tower(spec, on_message=messages.append)
    assert "\n" not in str(error.value)
    assert len(messages) == 1
    assert messages[0].startswith(f"{spec}: not on this machine, downloading from http://127.0.0.1:9 to ")
    assert sum(waits) < 10
