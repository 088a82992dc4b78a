"""Every kind of tower, with random weights and narrow, from files: hook points against the libraries' own outputs."""

import functools
import json
import pickle
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from saevlm_fast.towers.from_open_clip import open_clip_anatomy, wrap_open_clip
from saevlm_fast.towers.from_timm import wrap_timm
from saevlm_fast.towers.from_transformers import wrap_transformers
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

N_BLOCKS, WIDTH, SIZE, PATCH = 3, 16, 32, 8
N_PATCHES = (SIZE // PATCH) ** 2
NARROW = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": N_BLOCKS,
    "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 50,
    "max_position_embeddings": 16,
}  # fmt: skip
ALL_POINTS = [HookPoint(point, layer) for layer in range(N_BLOCKS) for point in ("attention", "mlp", "residual")]


def randomised(model):
    """Weights large enough that every token and image is another vector; LayerScale too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def noise(n=3, size=(40, 56)):
    generator = np.random.default_rng(1)
    shapes = [(size[0] + 4 * i, size[1], 3) for i in range(n)]
    return [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


# --- models -----------------------------------------------------------------------------------------------------------


def square(processor_class, **settings):
    return processor_class(size={"height": SIZE, "width": SIZE}, **settings)


def clip_processor(transformers, name="CLIPImageProcessor", **settings):
    crop = {"height": SIZE, "width": SIZE}
    return getattr(transformers, name)(size={"shortest_edge": SIZE}, crop_size=crop, **settings)


def clip(t):
    config = t.CLIPConfig(vision_config=NARROW, text_config=TEXT, projection_dim=12)
    return t.CLIPModel(config), clip_processor(t)


def clip_vision(t):
    return t.CLIPVisionModel(t.CLIPVisionConfig(**NARROW)), clip_processor(t)


def siglip(t):
    config = t.SiglipConfig(vision_config=NARROW, text_config=TEXT)
    return t.SiglipModel(config), square(t.SiglipImageProcessor)


def naflex(t):
    config = t.Siglip2Config(vision_config=NARROW | {"num_patches": 16}, text_config=TEXT)
    return t.Siglip2Model(config), t.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=20)


def vit(t):
    return t.ViTModel(t.ViTConfig(**NARROW)), square(t.ViTImageProcessor)


def vit_classifier(t):
    return t.ViTForImageClassification(t.ViTConfig(**NARROW)), square(t.ViTImageProcessor)


def dinov2(t):
    processor = t.BitImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return t.Dinov2Model(t.Dinov2Config(**NARROW, mlp_ratio=2)), processor


def dinov2_registers(t):
    model = t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**NARROW, mlp_ratio=2, num_register_tokens=4))
    return model, dinov2(t)[1]


def dinov3(t):
    return t.DINOv3ViTModel(t.DINOv3ViTConfig(**NARROW, num_register_tokens=4)), dinov2(t)[1]


def language(t, family):
    config = getattr(t, f"{family}Config")
    return config(**{**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2})


def llava(t):
    config = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**NARROW), text_config=language(t, "Llama"))
    return t.LlavaForConditionalGeneration(config), clip_processor(t)


def llava_next(t):
    config = t.LlavaNextConfig(vision_config=t.CLIPVisionConfig(**NARROW), text_config=language(t, "Llama"))
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, 2 * SIZE]]
    return t.LlavaNextForConditionalGeneration(config), clip_processor(
        t, "LlavaNextImageProcessor", image_grid_pinpoints=grid
    )


def llava_onevision(t):
    vision = t.SiglipVisionConfig(**NARROW, vision_use_head=False)
    model = t.LlavaOnevisionForConditionalGeneration(
        t.LlavaOnevisionConfig(vision_config=vision, text_config=language(t, "Qwen2"))
    )
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, 2 * SIZE]]
    return model, square(t.LlavaOnevisionImageProcessor, image_grid_pinpoints=grid)


def vision_part(model):
    """The library's own vision model inside `model`."""
    inner = getattr(model, "model", model)
    for name in ("vision_tower", "vision_model", "vit"):
        inner = getattr(inner, name, inner)
    return inner if hasattr(inner, "embeddings") else model


PREFIX = {"clip": 1, "clip_vision": 1, "siglip": 0, "naflex": 0, "vit": 1, "vit_classifier": 1, "dinov2": 1,
          "dinov2_registers": 5, "dinov3": 5, "llava": 1, "llava_next": 1, "llava_onevision": 0}  # fmt: skip
PLAIN_BLOCKS = [name for name in PREFIX if not name.startswith("dino")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (directory, the model it was saved from, its processor); each is made once."""
    import transformers

    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model, processor = globals()[name](transformers)
            directory = tmp_path_factory.mktemp(name)
            randomised(model).save_pretrained(directory)
            processor.save_pretrained(directory)
            made[name] = directory, model, processor
        return made[name]

    return make


def processed(processor, pictures):
    """The library's own full preprocessing, all of it in float32; of tiles the first."""
    features = processor(images=pictures, return_tensors="pt")
    pixels = features["pixel_values"]
    inputs = {"pixel_values": pixels[:, 0] if pixels.ndim == 5 else pixels}
    return inputs | {k: features[k] for k in ("pixel_attention_mask", "spatial_shapes") if k in features}


def run_all(tower, pictures, points=ALL_POINTS, **options):
    with tower.hooked(points, **options) as run:
        return run(tower.preprocess(pictures))


def assert_same(found, expected):
    """One computation in two model objects. The last bits depend on the processor and on where the weights lie."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFIX)
def test_residual_is_the_librarys_hidden_state(saved, name):
    directory, model, processor = saved(name)
    tower = load_tower(f"hf:{directory}")
    assert tower.n_blocks == N_BLOCKS
    pictures = noise()
    acts = run_all(tower, pictures)
    with torch.inference_mode():
        states = vision_part(model)(**processed(processor, pictures), output_hidden_states=True).hidden_states
    for layer in range(N_BLOCKS - 1):  # some families put the final norm into the last one
        assert_same(acts[HookPoint("residual", layer)], states[layer + 1])
    n_tokens = 20 if name == "naflex" else PREFIX[name] + N_PATCHES
    assert acts[HookPoint("mlp", 0)].shape == (3, n_tokens, WIDTH)


@pytest.mark.parametrize("name", PREFIX)
def test_attention_and_mlp_add_up_to_the_residual(saved, name):
    tower = load_tower(f"hf:{saved(name)[0]}")
    acts = run_all(tower, noise())
    for layer in range(1, N_BLOCKS):
        attention, mlp = acts[HookPoint("attention", layer)], acts[HookPoint("mlp", layer)]
        if name not in PLAIN_BLOCKS:
            block = tower.anatomy.blocks[layer]
            attention = attention * block.layer_scale1.lambda1
            mlp = mlp * block.layer_scale2.lambda1
        total = acts[HookPoint("residual", layer - 1)] + attention + mlp
        torch.testing.assert_close(acts[HookPoint("residual", layer)], total, atol=1e-4, rtol=1e-5)


def test_clip_projection_is_get_image_features(saved):
    directory, model, processor = saved("clip")
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled"), HookPoint("projection")])
    with torch.inference_mode():
        pixels = processed(processor, noise())
        features = model.get_image_features(**pixels)
        pooled = model.vision_model(**pixels).pooler_output
    assert_same(acts[HookPoint("projection")], getattr(features, "pooler_output", features))
    assert_same(acts[HookPoint("pooled")], pooled)


@pytest.mark.parametrize("name", ["siglip", "naflex"])
def test_siglip_pooled_is_get_image_features(saved, name):
    directory, model, processor = saved(name)
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled"), HookPoint("projection")])
    with torch.inference_mode():
        features = model.get_image_features(**processed(processor, noise()))
    for tensor in acts.values():
        assert_same(tensor, getattr(features, "pooler_output", features))


@pytest.mark.parametrize("name", ["clip_vision", "vit", "dinov2", "dinov2_registers", "dinov3", "llava"])
def test_pooled_is_the_librarys_pooler_output(saved, name):
    directory, model, processor = saved(name)
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled")])
    with torch.inference_mode():
        expected = vision_part(model)(**processed(processor, noise())).pooler_output
    assert_same(acts[HookPoint("pooled")], expected)


def test_pooled_of_a_vit_without_pooler_is_the_normed_cls_token(saved):
    directory, model, processor = saved("vit_classifier")
    acts = run_all(load_tower(f"hf:{directory}"), noise(), [HookPoint("pooled")])
    with torch.inference_mode():
        expected = model.vit(**processed(processor, noise())).last_hidden_state[:, 0]
    assert_same(acts[HookPoint("pooled")], expected)


def test_only_the_tower_of_a_llava_is_loaded_and_all_of_it(saved):
    directory, model, _ = saved("llava")
    tower = load_tower(f"hf:{directory}")
    expected = {name: tensor for name, tensor in model.model.vision_tower.state_dict().items()}
    assert tower.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tower.model.state_dict().items())


@pytest.mark.parametrize("name", ["llava", "vit", "clip"])
def test_missing_weights_are_refused(saved, tmp_path, name):
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(saved(name)[0], tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    vision = [key for key in weights if "text" not in key and "language" not in key]
    lost = next(key for key in vision if "mlp.fc1.weight" in key or "intermediate.dense.weight" in key)
    shape = list(weights[lost].shape)
    cut = [shape[0] - 1, shape[1]]
    save_file(weights | {lost: weights[lost][:-1]}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"fc1.weight is {re.escape(f'{cut} in the weights file, but {shape} by')}"):
        load_tower(f"hf:{directory}")
    del weights[lost]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of \w+ are missing, as .*fc1"):
        load_tower(f"hf:{directory}")
    (directory / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"model: its weights file is cut off, damaged or no safetensors file"):
        load_tower(f"hf:{directory}")


@pytest.mark.parametrize("name", PREFIX)
def test_preprocessing_is_the_librarys_bit_by_bit(saved, name):
    directory, _, processor = saved(name)
    tower = load_tower(f"hf:{directory}")
    inputs = pickle.loads(pickle.dumps(tower.preprocess))(noise())
    assert inputs["pixel_values"].dtype == (torch.float32 if name == "naflex" else torch.uint8)
    seen = {}
    tower.anatomy.call = lambda model, given: seen.update(given)
    tower.forward(inputs)
    expected = processed(processor, noise())
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[key], expected[key]) for key in expected)


def test_padding_of_naflex_is_never_chosen(saved):
    tower = load_tower(f"hf:{saved('naflex')[0]}")
    pictures = noise(2, (30, 90))
    inputs = tower.preprocess(pictures)
    mask = tower.token_mask(inputs)
    assert mask.dtype == torch.bool
    assert not mask.all()
    point = HookPoint("residual", 1)
    with tower.hooked([point]) as run:
        acts = run(inputs)[point]
        alone = run(tower.preprocess(pictures[:1]))[point]
        patches = run.select(acts, Tokens("patches"), ["a", "b"], inputs=inputs)
        mean = run.select(acts, Tokens("mean"), ["a", "b"], inputs=inputs)
        drawn = run.select(acts, Tokens.parse("random:9"), ["a", "b"], inputs=inputs)
        with pytest.raises(ValueError, match="random ones of 'a', which has"):
            run.select(acts, Tokens.parse("random:20"), ["a", "b"], inputs=inputs)
    assert torch.equal(patches.rows_MD, acts[mask])
    expected = torch.stack([acts[i][mask[i]].mean(0) for i in range(2)])
    torch.testing.assert_close(mean.rows_MD, expected, atol=1e-6, rtol=1e-5)
    assert all(mask[image, position] for image, position in zip(drawn.image_of_row, drawn.positions))
    torch.testing.assert_close(alone[0][mask[0]], acts[0][mask[0]], atol=1e-5, rtol=1e-5)


# --- open_clip --------------------------------------------------------------------------------------------------------


OPEN_CLIP = {
    "plain": {"layers": N_BLOCKS, "width": WIDTH, "head_width": 8, "patch_size": PATCH, "image_size": SIZE},
    "layer_scale": {"layers": N_BLOCKS, "width": WIDTH, "head_width": 8, "patch_size": PATCH, "image_size": SIZE,
                    "ls_init_value": 0.1, "pool_type": "avg", "final_ln_after_pool": True},
    "timm": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
             "image_size": 160},
}  # fmt: skip


def save_open_clip(directory, name, coca=False):
    """A directory in open_clip's hub layout; returns the whole model."""
    import open_clip
    from safetensors.torch import save_file

    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": dict(OPEN_CLIP[name]), "text_cfg": text}
    if coca:
        config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
        config |= {"multimodal_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}}
        model = open_clip.CoCa(**config)
        config["custom_text"] = True
    else:
        model = open_clip.CLIP(**json.loads(json.dumps(config)))
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    directory.mkdir(exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(randomised(model).state_dict(), directory / "open_clip_model.safetensors")
    return model


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


# --- timm -------------------------------------------------------------------------------------------------------------


RESIZED = {"img_size": SIZE, "patch_size": PATCH, "pretrained_cfg_overlay": {"input_size": (3, SIZE, SIZE)}}
SMALL = RESIZED | {"embed_dim": WIDTH, "depth": 3, "num_heads": 2}
TIMM = {  # name -> options, tokens before the patches
    "test_vit": (RESIZED, 1),
    "test_vit3": ({}, 1),
    "vit_base_patch16_reg4_gap_256": (SMALL, 4),
    "vit_small_patch14_reg4_dinov2": (SMALL, 5),
    "vit_base_patch16_siglip_224": (SMALL, 0),
    "eva02_tiny_patch14_224": (SMALL, 1),
}


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


def tower_pixels(tower):
    seen = {}
    call, tower.anatomy.call = tower.anatomy.call, lambda model, inputs: seen.update(inputs)
    tower.forward(tower.preprocess(noise()))
    tower.anatomy.call = call
    return seen["pixel_values"]


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(saved):
    return load_tower(f"hf:{saved('clip')[0]}")


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_forward_stops_after_the_last_point(tower):
    inputs, called = tower.preprocess(noise()), []
    with tower.hooked([HookPoint("residual", 1), HookPoint("mlp", 0)]) as run:
        handles = [
            block.register_forward_pre_hook(lambda *args, n=n: called.append(n))
            for n, block in enumerate(tower.anatomy.blocks)
        ]
        handles.append(tower.anatomy.blocks[1].mlp.register_forward_hook(lambda *args: called.append("mlp 1")))
        acts = run(inputs)
        assert called == [0, 1, "mlp 1"]
        assert set(acts) == {HookPoint("residual", 1), HookPoint("mlp", 0)}
    with tower.hooked([HookPoint("attention", 1)]) as run:
        called.clear()
        run(inputs)
        assert called == [0, 1]
    for handle in handles:
        handle.remove()


def test_the_model_is_left_as_it_was(tower):
    inputs = tower.preprocess(noise())
    with torch.inference_mode():
        before = tower.forward(inputs).image_embeds
    attributes = [set(vars(module)) for module in tower.model.modules()]
    with pytest.raises(ZeroDivisionError), tower.hooked(ALL_POINTS) as run:
        print(len(run(inputs)) / 0)
    with pytest.raises(Exception, match="Input image size"), tower.hooked(ALL_POINTS) as run:
        run({"pixel_values": torch.zeros(1, 3, 5, 5, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="layer"), tower.hooked([HookPoint("mlp", 0), HookPoint("mlp", 9)]):
        pass
    assert hooks(tower.model) == 0
    assert [set(vars(module)) for module in tower.model.modules()] == attributes
    assert not tower.model.training
    assert not any(parameter.requires_grad for parameter in tower.model.parameters())
    with torch.inference_mode():
        assert torch.equal(tower.forward(inputs).image_embeds, before)


def test_batches_leave_nothing_for_each_other(tower):
    points = [HookPoint("residual", 0), HookPoint("residual", 2)]
    with tower.hooked(points) as run:
        first = run(tower.preprocess(noise()))
        kept = {point: acts.clone() for point, acts in first.items()}
        run(tower.preprocess(noise(2)))
        handle = tower.anatomy.blocks[1].register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tower.preprocess(noise(2)))
        handle.remove()
        assert all(torch.equal(first[point], kept[point]) for point in points)
        again = run(tower.preprocess(noise()))
        assert all(torch.equal(again[point], kept[point]) for point in points)


def test_several_points_in_one_pass_equal_single_ones(tower):
    points = [*ALL_POINTS, HookPoint("pooled"), HookPoint("projection")]
    together = run_all(tower, noise(), points)
    with tower.hooked(points) as run:
        assert run.shapes == {
            point: (17, WIDTH) if point.layer is not None else (None, {"pooled": WIDTH}.get(point.point, 12))
            for point in points
        }
    for point in points:
        assert torch.equal(run_all(tower, noise(), [point])[point], together[point])
    for point, acts in together.items():
        assert not acts.requires_grad, point


def test_autocast(tower):
    point = HookPoint("mlp", 2)
    exact = run_all(tower, noise(), [point])[point]
    half = run_all(tower, noise(), [point], autocast=torch.bfloat16)[point]
    assert half.dtype == torch.bfloat16
    assert 0 < (half - exact).abs().max() / exact.abs().max() < 0.05


def test_compiled_blocks_share_their_code_and_agree(tower, monkeypatch):
    """Without code generation, which takes a C++ compiler most of a minute; the test on a GPU has it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    points = [HookPoint("residual", 0), HookPoint("residual", 2), HookPoint("projection")]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    exact, compiled = run_all(tower, noise(), points), run_all(tower, noise(), points, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for point in points:
        torch.testing.assert_close(compiled[point], exact[point], atol=1e-4, rtol=1e-4)
    assert hooks(tower.model) == 0
    assert not any("forward" in vars(module) for module in tower.model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(saved, compile):
    """The same values as on the CPU, and no step that waits for the device."""
    points = [HookPoint("mlp", 1), HookPoint("residual", 2), HookPoint("projection")]
    on_cpu = load_tower(f"hf:{saved('clip')[0]}")
    expected = run_all(on_cpu, noise(), points)
    tower = load_tower(f"hf:{saved('clip')[0]}", "cuda")
    inputs = {name: tensor.cuda() for name, tensor in tower.preprocess(noise()).items()}
    with tower.hooked(points, compile=compile) as run:
        run(inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            acts = run(inputs)
            for tokens in ("cls", "patches", "mean", "random:2", "random:2:all"):
                run.select(acts[points[1]], Tokens.parse(tokens), ["a", "b", "c"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for point in points:
        torch.testing.assert_close(acts[point].cpu(), expected[point], atol=1e-3, rtol=1e-3)


def test_compiled_sublayers_leave_hooks_inside_a_block_eager(tower):
    """Without a compiler: what is compiled, and that it is restored."""
    points = [HookPoint("mlp", 1), HookPoint("residual", 2)]
    with tower.hooked(points, compile=True):
        block = tower.anatomy.blocks[1]
        compiled = {module for module in tower.model.modules() if "forward" in vars(module)}
        assert compiled == {tower.anatomy.blocks[0], block.self_attn, block.mlp, tower.anatomy.blocks[2]}
    assert not any("forward" in vars(module) for module in tower.model.modules())


# --- refusals ---------------------------------------------------------------------------------------------------------


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
    messages, start = [], time.monotonic()
    with pytest.raises(ValueError, match=f"does not answer.*offline, give .*{layout}") as error:
        load_tower(spec, on_message=messages.append)
    assert "\n" not in str(error.value)
    assert len(messages) == 1
    assert messages[0].startswith(f"{spec}: not on this machine, downloading from http://127.0.0.1:9 to ")
    assert time.monotonic() - start < 10


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_description_is_json_and_knows_the_weights(saved):
    first = load_tower(f"hf:{saved('clip')[0]}")
    description = json.loads(json.dumps(first.description()))
    assert description["class"] == "CLIPVisionModelWithProjection"
    assert description["preprocess"]["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert description == load_tower(f"hf:{saved('clip')[0]}").description()
    with torch.no_grad():
        first.model.visual_projection.weight[0, 0] += 1
    assert first.description()["weights_sha256"] != description["weights_sha256"]


def test_clip_large_336_in_its_true_depth_and_width(monkeypatch):
    """The paper's tower and layers, one image. The MLPs' inner width, which no point shows, is a sixteenth; that images
    are alone what they are together is tried on small towers."""
    monkeypatch.setattr("saevlm_fast.towers.tower.check_own_rows", lambda *arguments: None)
    import transformers as t

    vision = t.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=256, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    with torch.device("meta"):
        model = t.CLIPVisionModelWithProjection(vision)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=generator) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():  # random numbers repeated: to draw them all takes longer than the forward
            parameter.copy_(block.repeat(-(-parameter.numel() // len(block)))[: parameter.numel()].view_as(parameter))
        model.vision_model.embeddings.position_ids.copy_(torch.arange(577)[None])
    processor = t.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    tower = wrap_transformers(model, processor, "hf:openai/clip-vit-large-patch14-336")
    points = [HookPoint("residual", layer) for layer in (11, 17, 22, 23)] + [HookPoint("projection")]
    with tower.hooked(points) as run:
        assert run.shapes == dict.fromkeys(points[:4], (577, 1024)) | {points[4]: (None, 768)}
        assert [run.rows_per_image(points[0], Tokens(kind)) for kind in ("cls", "patches", "all")] == [1, 576, 577]
        assert all(acts.isfinite().all() for acts in run(tower.preprocess(noise(1))).values())
