"""Towers of every kind of model, with random weights and narrow, and how they are run and compared."""

import json

import numpy as np
import torch
from PIL import Image

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


def tower_pixels(tower):
    seen = {}
    call, tower.anatomy.call = tower.anatomy.call, lambda model, inputs: seen.update(inputs)
    tower.forward(tower.preprocess(noise()))
    tower.anatomy.call = call
    return seen["pixel_values"]
