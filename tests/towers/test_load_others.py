"""Towers of open_clip and timm, from files: hook points against the libraries' own outputs."""

import json

import pytest
import torch
from narrow_towers import (
    N_BLOCKS,
    N_PATCHES,
    OPEN_CLIP,
    PATCH,
    SIZE,
    TIMM,
    WIDTH,
    assert_same,
    noise,
    randomised,
    run_all,
    save_open_clip,
    tower_pixels,
)

from saevlm_fast.towers.from_open_clip import wrap_open_clip
from saevlm_fast.towers.from_timm import wrap_timm
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint


def open_clip_pixels(size):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    transform = image_transform_v2(settings, is_train=False)
    return torch.stack([transform(picture) for picture in noise()])


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(tmp_path, name):
    model = save_open_clip(tmp_path, name)
    tower = load_tower(f"open_clip:local-dir:{tmp_path}")
    points = [HookPoint(p, n) for n in range(tower.n_blocks) for p in ("attention", "mlp", "residual")]
    acts = run_all(tower, noise(), [*points, HookPoint("pooled"), HookPoint("projection")])
    pixels = open_clip_pixels(OPEN_CLIP[name]["image_size"])
    with torch.inference_mode():
        features = model.encode_image(pixels)
        states = model.visual.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
    assert_same(acts[HookPoint("projection")], features)
    pooled = acts[HookPoint("pooled")]
    with torch.inference_mode():
        projected = model.visual.head(pooled) if name == "timm" else pooled @ model.visual.proj
    torch.testing.assert_close(projected, features)
    for n in range(tower.n_blocks):
        prefix, patches = states["image_intermediates_prefix"][n], states["image_intermediates"][n]
        assert_same(acts[HookPoint("residual", n)], torch.cat([prefix, patches], 1))
    block = tower.anatomy.blocks[1]
    scales = (block.ls_1, block.ls_2) if name == "layer_scale" else (torch.nn.Identity(), torch.nn.Identity())
    with torch.inference_mode():
        total = acts[points[2]] + scales[0](acts[points[3]]) + scales[1](acts[points[4]])
    torch.testing.assert_close(acts[points[5]], total, atol=1e-4, rtol=1e-5)


def test_open_clip_coca_and_blocks_with_tokens_first(tmp_path):
    import open_clip

    save_open_clip(tmp_path, "plain", coca=True)
    tower = load_tower(f"open_clip:local-dir:{tmp_path}")
    projection = run_all(tower, noise(), [HookPoint("projection")])[HookPoint("projection")]
    with torch.inference_mode():
        pixels = open_clip_pixels(SIZE)
        assert_same(projection, tower.model(pixels)[0])
    with (
        pytest.raises(ValueError, match=r"pooled of open_clip.*take the projection"),
        tower.hooked([HookPoint("pooled")]),
    ):
        pass

    visual = randomised(open_clip.transformer.VisionTransformer(SIZE, PATCH, WIDTH, N_BLOCKS, 2, 2.0, output_dim=12))
    visual.preprocess_cfg = {"size": SIZE}
    batch_first = run_all(wrap_open_clip(visual, "first"), noise())
    visual.transformer = open_clip.transformer.Transformer(WIDTH, N_BLOCKS, 2, 2.0, batch_first=False)
    visual.load_state_dict(randomised(visual).state_dict())
    tokens_first = run_all(wrap_open_clip(visual, "second"), noise())
    for point, acts in batch_first.items():
        torch.testing.assert_close(tokens_first[point], acts, atol=1e-5, rtol=1e-5)


def test_open_clip_weights_file_takes_the_preprocessing_of_its_architecture(tmp_path):
    from saevlm_fast.towers.from_open_clip import preprocess_of_file as settings

    file = tmp_path / "weights.safetensors"
    assert settings("ViT-B-16-SigLIP", ["webli"], file, "s")["mean"] == (0.5, 0.5, 0.5)
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model("ViT-L-14")
    with pytest.raises(
        ValueError, match=r"released weights of ViT-L-14 differ in preprocessing, so .*config.json must"
    ):
        settings("ViT-L-14", tags, file, "s")
    (tmp_path / "open_clip_config.json").write_text('{"preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}')
    assert settings("ViT-L-14", tags, file, "s") == {"mean": [0.1, 0.2, 0.3]}


def test_open_clip_arch_and_file(tmp_path, monkeypatch):
    """A small architecture of our own, registered as a user of open_clip would."""
    import open_clip

    model = save_open_clip(tmp_path, "plain")
    config = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "Tiny-8.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_config.json").unlink()
    open_clip.add_model_config(tmp_path / "configs")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    point = HookPoint("projection")
    for file in ("open_clip_model.safetensors", "weights.pt"):
        tower = load_tower(f"open_clip:Tiny-8/{tmp_path / file}")
        with tower.hooked([point]) as run, torch.inference_mode():
            inputs = tower.preprocess(noise())
            pixels = inputs["pixel_values"] / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
            pixels = pixels / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
            torch.testing.assert_close(run(inputs)[point], model.encode_image(pixels), atol=1e-5, rtol=1e-5)
    torch.save({"state_dict": model.state_dict(), "code": Exploit()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: "):
        load_tower(f"open_clip:Tiny-8/{tmp_path / 'weights.pt'}")
    with pytest.raises(ValueError, match=r"neither a file .* nor one of open_clip's weights for ViT-B-32: openai"):
        load_tower("open_clip:ViT-B-32/no/such.pt")
    with pytest.raises(ValueError, match="open_clip has no architecture ViT-Z"):
        load_tower("open_clip:ViT-Z/openai")


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("a checkpoint was unpickled",)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    import timm

    options, n_prefix = TIMM[name]
    model = randomised(timm.create_model(name, num_classes=0, **options))
    tower = wrap_timm(model, f"timm:{name}")
    points = [HookPoint(p, n) for n in range(tower.n_blocks) for p in ("attention", "mlp", "residual")]
    acts = run_all(tower, noise(), [*points, HookPoint("pooled")])
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)
    pixels = torch.stack([transform(picture) for picture in noise()])
    with torch.inference_mode():
        assert_same(acts[HookPoint("pooled")], model(pixels))
        states = model.forward_intermediates(
            pixels, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True, norm=False
        )
    for n, state in enumerate(states):
        patches, prefix = state if isinstance(state, (tuple, list)) else (state, state[:, :0])
        assert prefix.shape[1] == n_prefix
        assert_same(acts[HookPoint("residual", n)], torch.cat([prefix, patches], 1))
    block = tower.anatomy.blocks[1]
    scale = getattr(block, "ls1", torch.nn.Identity()), getattr(block, "ls2", torch.nn.Identity())
    with torch.inference_mode():
        total = acts[points[2]] + scale[0](acts[points[3]]) + scale[1](acts[points[4]])
    torch.testing.assert_close(acts[points[5]], total, atol=1e-4, rtol=1e-5)


def test_timm_registers_and_class_tokens():
    import timm

    options = TIMM["vit_base_patch16_reg4_gap_256"][0]
    tower = wrap_timm(timm.create_model("vit_base_patch16_reg4_gap_256", num_classes=0, **options), "timm:gap")
    with tower.hooked([HookPoint("residual", 1)]) as run:
        assert (run.layout.n_prefix, run.layout.has_cls, run.layout.n_tokens) == (4, False, 4 + N_PATCHES)
        with pytest.raises(ValueError, match=r"no CLS token; use mean or patches.*pooled \(timm:gap\)"):
            run.rows_per_image(HookPoint("residual", 1), Tokens("cls"))


def test_timm_weights_file(tmp_path):
    """With a classifier, under a name or in a checkpoint: what is not the classifier must all be there."""
    import timm
    from safetensors.torch import save_file

    model = randomised(timm.create_model("test_vit", num_classes=7))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    for file in ("weights.safetensors", "weights.pt"):
        tower = load_tower(f"timm:test_vit:{tmp_path / file}")
        acts = run_all(tower, noise(), [HookPoint("pooled")])
        with torch.inference_mode():
            expected = model.forward_head(model.forward_features(tower_pixels(tower)), pre_logits=True)
        torch.testing.assert_close(acts[HookPoint("pooled")], expected)
    weights = model.state_dict()
    del weights["blocks.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"1 weights of test_vit are missing, as blocks\.1\.mlp\.fc1\.weight"):
        load_tower(f"timm:test_vit:{tmp_path / 'weights.safetensors'}")
    torch.save({"state_dict": weights, "code": Exploit()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt: its weights file pickles more than tensors"):
        load_tower(f"timm:test_vit:{tmp_path / 'weights.pt'}")
    with pytest.raises(ValueError, match="no such weights file"):
        load_tower("timm:test_vit:/no/such.safetensors")
