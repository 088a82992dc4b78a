"""One small model of every family of towers, with random weights, and what its own library gives at every point.

`FAMILIES` says of each how it is made and what is expected; tests/towers/test_families.py harvests it at every point,
and tests/helpers/tower_table.py writes the table of docs/how-to/harvest.md from what was found.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tower_basics import (
    PATCH,
    RATIOS,
    SIZE,
    SIZES,
    SMALL,
    WIDTH,
    as_read,
    each_alone,
    hf,
    hidden_states,
    pictures,
    plain,
    pooler_output,
    prepared,
    randomised,
    rows_of_cells,
    square,
    unmerged,
)

from saevlm_fast.towers.from_open_clip import wrap_open_clip
from saevlm_fast.towers.from_timm import wrap_timm
from saevlm_fast.towers.tower import HookPoint, Tower


@dataclass(frozen=True)
class Family:
    """A family of towers.

    Attributes:
        name: as the table shows it. library. make: -> Tower.
        states: (tower, inputs) -> of every layer what the library gives there, [B, T, D], or a list of [T, D] where
            images differ in their number of tokens.
        prefix: tokens before the patches. cls: whether one is CLS. grid: of a square picture; None where images have
            grids of their own. checked_by: for the table.
        stages: whether layers are stages. adds_up: whether a block adds what its attention and its MLP give, unscaled.
        kinds: points of a layer. marked: whether only `pytest -m families` looks at it; it needs no code of its own.
    """

    name: str
    library: str
    make: Callable[[], Tower]
    states: Callable[[Tower, Any], list[Any]]
    prefix: int = 0
    cls: bool = False
    grid: tuple[int, int] | None = (4, 4)
    checked_by: str = "`output_hidden_states`"
    stages: bool = False
    adds_up: bool = True
    kinds: tuple[str, ...] = ("residual", "attention", "mlp")
    marked: bool = False

    def pooled(self, tower: Tower, inputs: Any) -> tuple[Any, Any]:
        """(projection, pooled) as the library gives them."""
        return (pooler_output if self.library == "transformers" else of_the_model)(tower, inputs)


# --- transformers -----------------------------------------------------------------------------------------------------


def qwen2_vl() -> Tower:
    import transformers as t
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=2, embed_dim=WIDTH, hidden_size=48, num_heads=2, mlp_ratio=2, patch_size=PATCH)
    return hf(Qwen2VisionTransformerPretrainedModel(config), qwen_processor(t))


def qwen_processor(t: Any) -> Any:
    size = {"shortest_edge": 16 * 64, "longest_edge": 40 * 64}
    return t.Qwen2VLImageProcessor(patch_size=PATCH, merge_size=2, size=size)


def qwen2_5_vl() -> Tower:
    import transformers as t
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=WIDTH, out_hidden_size=48, num_heads=2, intermediate_size=48, patch_size=PATCH,
        window_size=32, fullatt_block_indexes=[1],
    )  # fmt: skip
    return hf(Qwen2_5_VisionTransformerPretrainedModel(config), qwen_processor(t))


def qwen3_vl() -> Tower:
    import transformers as t
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(
        depth=2, hidden_size=WIDTH, out_hidden_size=48, num_heads=2, intermediate_size=48, patch_size=PATCH,
        deepstack_visual_indexes=[0], num_position_embeddings=16,
    )  # fmt: skip
    return hf(Qwen3VLVisionModel(config), qwen_processor(t))


def pixtral() -> Tower:
    import transformers as t

    config = t.PixtralVisionConfig(**SIZES, image_size=64, patch_size=PATCH)
    patch = {"height": PATCH, "width": PATCH}
    return hf(t.PixtralVisionModel(config), t.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=patch))


def idefics3() -> Tower:
    import transformers as t
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    edge = {"longest_edge": SIZE}
    processor = t.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size=edge)
    return hf(Idefics3VisionTransformer(Idefics3VisionConfig(**SMALL)), processor)


def smolvlm() -> Tower:
    import transformers as t
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    edge = {"longest_edge": SIZE}
    processor = t.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size=edge)
    return hf(SmolVLMVisionTransformer(SmolVLMVisionConfig(**SMALL)), processor)


def mllama() -> Tower:
    import transformers as t
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

    config = MllamaVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
        image_size=SIZE, patch_size=PATCH, max_num_tiles=4, intermediate_layers_indices=[0, 1],
        vision_output_dim=3 * WIDTH, supported_aspect_ratios=RATIOS,
    )  # fmt: skip
    return hf(t.MllamaVisionModel(config), square(t, "MllamaImageProcessor", max_image_tiles=4))


def mllama_states(tower: Tower, inputs: Any) -> list[Any]:
    """Its one output: the last block's and, beside it, those of blocks 0 and 1."""
    last = tower.anatomy.call(tower.model, dict(inputs)).last_hidden_state[:, 0, 0]
    return [*last[..., WIDTH:].unflatten(-1, (WIDTH, 2)).unbind(-1), last[..., :WIDTH]]


def glm4v() -> Tower:
    import transformers as t
    from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
    from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel

    config = Glm4vVisionConfig(
        depth=2, hidden_size=WIDTH, out_hidden_size=48, num_heads=2, intermediate_size=48, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    size = {"shortest_edge": 40 * 64, "longest_edge": 100 * 64}
    return hf(Glm4vVisionModel(config), t.Glm4vImageProcessor(patch_size=PATCH, merge_size=2, size=size))


def glm4v_states(tower: Tower, inputs: Any) -> list[Any]:
    """Of every image by itself; its states have merged squares in the place of the last block's, so those are read
    where they are about to be merged."""
    layers: list[list[torch.Tensor]] = [[], []]
    last: list[torch.Tensor] = []
    hook = tower.model.post_layernorm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    grids = tower.anatomy.form.grids(inputs) or []
    for picture, grid in zip(pictures(len(grids)), grids):
        first = hidden_states(tower, prepared(tower, [picture]))[0]
        for layer, x in zip(layers, (first, last[-1]), strict=True):
            layer.append(unmerged(tower, x, grid))
    hook.remove()
    return list(layers)


def llama4() -> Tower:
    import transformers as t
    from transformers.models.llama4.configuration_llama4 import Llama4VisionConfig
    from transformers.models.llama4.modeling_llama4 import Llama4VisionModel

    config = Llama4VisionConfig(**SMALL, vision_output_dim=48, projector_input_dim=48, projector_output_dim=48)
    config.intermediate_size = 4 * WIDTH  # four patches that become one token
    return hf(Llama4VisionModel(config), square(t, "Llama4ImageProcessor"))


def cls_first(tower: Tower, inputs: Any) -> list[Any]:
    """Llama 4's class token is the last."""
    return [torch.cat([x[:, -1:], x[:, :-1]], 1) for x in hidden_states(tower, inputs)]


def sam() -> Tower:
    import transformers as t

    config = t.SamVisionConfig(**SMALL, mlp_dim=48, output_channels=4, window_size=2, global_attn_indexes=[1])
    edges = {"size": {"longest_edge": SIZE}, "pad_size": {"height": SIZE, "width": SIZE}}
    return hf(t.SamVisionModel(config), t.SamImageProcessor(**edges))


def swin(kind: str) -> Callable[[], Tower]:
    def make() -> Tower:
        import transformers as t

        small = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
        return hf(getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**small, window_size=4)), square(t))

    return make


def before_merging(tower: Tower, inputs: Any) -> list[Any]:
    """As transformers' own backbones read them."""
    options = {"output_hidden_states": True, "output_hidden_states_before_downsampling": True}
    found = tower.model.encoder(*tower.model.embeddings(inputs["pixel_values"]), **options)
    return [x.flatten(2).transpose(1, 2) for x in found.reshaped_hidden_states[1:]]


def naflex() -> Tower:
    import transformers as t

    config = t.Siglip2VisionConfig(**SIZES, patch_size=PATCH, num_patches=16)
    return hf(t.Siglip2VisionModel(config), t.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=20))


def naflex_states(tower: Tower, inputs: Any) -> list[Any]:
    mask = inputs["pixel_attention_mask"].bool()
    return [[x[i][mask[i]] for i in range(len(x))] for x in hidden_states(tower, inputs)]


def gemma3() -> Tower:
    import transformers as t

    config = t.SiglipVisionConfig(**SMALL, vision_use_head=False)
    return hf(t.SiglipVisionModel(config), square(t, "Gemma3ImageProcessor", do_pan_and_scan=True))


def internvl() -> Tower:
    import transformers as t

    config = t.InternVLVisionConfig(**SIZES, image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH])
    return hf(t.InternVLVisionModel(config), square(t, "GotOcr2ImageProcessor", crop_to_patches=True))


def convolutional(kind: str, **settings: Any) -> Callable[[], Tower]:
    def make() -> Tower:
        import transformers as t

        model = getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**settings))
        return hf(model, square(t))

    return make


def cells(tower: Tower, inputs: Any) -> list[Any]:
    """Feature maps of the library, with or without what comes before the first stage, cell by cell."""
    maps = tower.model(**inputs, output_hidden_states=True).hidden_states[-tower.n_blocks :]
    return [x.flatten(2).transpose(1, 2) for x in maps]


def of_the_model(tower: Tower, inputs: Any) -> tuple[Any, Any]:
    """(projection, pooled) of timm and open_clip."""
    visual, pixels = tower.model, inputs["pixel_values"]
    found = visual(pixels)
    if hasattr(visual, "trunk"):
        return found, visual.trunk(pixels)
    if hasattr(visual, "transformer"):  # of open_clip: a projection of what it has pooled
        states = visual.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
        return found, visual.ln_post(states["image_intermediates_prefix"][-1][:, 0])
    return found, found


# --- timm and open_clip -----------------------------------------------------------------------------------------------


def of_timm(name: str, **settings: Any) -> Callable[[], Tower]:
    def make() -> Tower:
        import timm

        model = timm.create_model(name, num_classes=0, **settings)
        if "img_size" in settings:
            model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, SIZE, SIZE), "fixed_input_size": False}
        return wrap_timm(randomised(model), f"timm:{name}")

    return make


def intermediates(tower: Tower, inputs: Any) -> list[Any]:
    """timm's own forward_intermediates: of transformers all tokens, of others feature maps."""
    model, pixels = tower.model, inputs["pixel_values"]
    options = {"norm": False, "intermediates_only": True}
    if hasattr(model, "num_prefix_tokens"):
        states = model.forward_intermediates(pixels, return_prefix_tokens=True, output_fmt="NLC", **options)
        return [torch.cat([x[1], x[0]], 1) if isinstance(x, (tuple, list)) else x for x in states]
    return [x.flatten(2).transpose(1, 2) for x in model.forward_intermediates(pixels, **options)[-tower.n_blocks :]]


def of_open_clip(kind: str) -> Callable[[], Tower]:
    def make() -> Tower:
        import open_clip

        if kind == "resnet":
            visual: Any = open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 12, 8, 64, width=8)
        elif kind == "plain":
            visual = open_clip.transformer.VisionTransformer(SIZE, PATCH, WIDTH, 2, 2, 2.0, output_dim=12)
        else:
            visual = open_clip.timm_model.TimmModel(kind, 12, pool="avg", proj="linear", image_size=160)
        visual.preprocess_cfg = {"size": {"resnet": 64, "plain": SIZE}.get(kind, 160)}
        return wrap_open_clip(randomised(visual), f"open_clip:{kind}")

    return make


def in_open_clip(tower: Tower, inputs: Any) -> list[Any]:
    """Its own forward_intermediates; of a trunk of timm that of timm."""
    visual, pixels = tower.model, inputs["pixel_values"]
    if hasattr(visual, "trunk"):
        found = visual.trunk.forward_intermediates(pixels, norm=False, intermediates_only=True)
        return [x.flatten(2).transpose(1, 2) for x in found[-tower.n_blocks :]]
    if hasattr(visual, "layer1"):
        found = visual.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
        return [x.flatten(2).transpose(1, 2) for x in found[-tower.n_blocks :]]
    found = visual.forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
    pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"])
    return [torch.cat(pair, 1) for pair in pairs]


FORWARD, ALONE = "`forward_intermediates`", "every image by itself, and `output_hidden_states`"
TIMM = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": SIZE, "patch_size": PATCH}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "img_size": SIZE, "patch_size": 4}


def family(name: str, make: Callable[[], Tower], prefix: int = 0, cls: bool = False, **fields: Any) -> Family:
    return Family(name, "transformers", make, fields.pop("states", hidden_states), prefix, cls, **fields)


def marked(name: str, kind: str, prefix: int = 0, cls: bool = False, **fields: Any) -> Family:
    own = {field: fields.pop(field) for field in ("adds_up", "kinds") if field in fields}
    return family(name, plain(kind, **fields), prefix, cls, marked=True, **own)


def timm_family(name: str, make: Callable[[], Tower], prefix: int = 0, cls: bool = False, **fields: Any) -> Family:
    return Family(name, "timm", make, intermediates, prefix, cls, checked_by=FORWARD, **fields)


FAMILIES = [
    family("CLIP", plain("CLIPVision"), 1, True),
    family("SigLIP", plain("SiglipVision")),
    family("SigLIP 2 NaFlex", naflex, grid=None, states=naflex_states),
    family("ViT", plain("ViT"), 1, True),
    family("DeiT, distilled", plain("DeiT"), 2, True),
    family("ViT-MAE", plain("ViTMAE"), 1, True),
    family("DINOv2", plain("Dinov2", mlp_ratio=2), 1, True, adds_up=False),
    family("DINOv3", plain("DINOv3ViT", num_register_tokens=4), 5, True, adds_up=False),
    family("AIMv2", plain("Aimv2Vision")),
    family("Gemma 3, PaliGemma", gemma3, states=hidden_states),
    family("InternVL", internvl, 1, True, adds_up=False),
    family("Idefics3", idefics3),
    family("SmolVLM", smolvlm),
    family("Mllama", mllama, 1, True, states=mllama_states, adds_up=False, checked_by="its output, which holds them"),
    family("Qwen2-VL", qwen2_vl, grid=None, states=each_alone(unmerged), checked_by=ALONE),
    family("Qwen2.5-VL", qwen2_5_vl, grid=None, states=each_alone(unmerged), checked_by=ALONE),
    family("Qwen3-VL", qwen3_vl, grid=None, states=each_alone(unmerged), checked_by=ALONE),
    family("Pixtral, Mistral3", pixtral, grid=None, states=each_alone(as_read), checked_by=ALONE),
    family("ResNet", convolutional("ResNet", embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1]), stages=True,
           states=cells, grid=(4, 4)),
    family("ConvNeXt", convolutional("ConvNext", hidden_sizes=[8, 12], depths=[1, 1], num_stages=2), stages=True,
           states=cells),
    family("DINOv3 ConvNeXt", convolutional("DINOv3ConvNext", hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1]),
           stages=True, states=cells, grid=(1, 1)),
    family("Swin", swin("Swin"), stages=True, states=before_merging,
           checked_by="`output_hidden_states_before_downsampling`"),
    family("Swin V2", swin("Swinv2"), stages=True, states=before_merging,
           checked_by="`output_hidden_states_before_downsampling`"),
    family("SAM", sam, states=rows_of_cells, adds_up=False, kinds=("residual", "mlp")),
    family("Llama 4", llama4, 1, True, states=cls_first),
    family("GLM-4V", glm4v, grid=None, states=glm4v_states, checked_by=ALONE),
    family("RADIO", plain("Radio", max_img_size=64), 10, True, adds_up=False),
    marked("MetaCLIP 2", "MetaClip2Vision", 1, True),
    marked("Chinese CLIP", "ChineseCLIPVision", 1, True),
    marked("CLIPSeg", "CLIPSegVision", 1, True),
    marked("OWL-ViT", "OwlViTVision", 1, True),
    marked("OWLv2", "Owlv2Vision", 1, True),
    marked("MLCD", "MLCDVision", 1, True),
    marked("GIT", "GitVision", 1, True),
    marked("BLIP", "BlipVision", 1, True),
    marked("BLIP-2", "Blip2Vision", 1, True),
    marked("InstructBLIP", "InstructBlipVision", 1, True),
    marked("Kosmos-2", "Kosmos2Vision", 1, True, model="Transformer"),
    marked("Janus", "JanusVision"),
    marked("Ovis 2", "Ovis2Vision", hidden_stride=1),
    marked("BEiT", "Beit", 1, True, adds_up=False),
    marked("Data2Vec", "Data2VecVision", 1, True, kinds=("residual", "attention")),
    marked("ViT-MSN", "ViTMSN", 1, True),
    marked("I-JEPA", "IJepa"),
    marked("DINOv2 with registers", "Dinov2WithRegisters", 5, True, adds_up=False, mlp_ratio=2),
    marked("Pixio", "Pixio", 8, True, mlp_ratio=2),
    timm_family("ViT", of_timm("vit_tiny_patch16_224", **TIMM), 1, True),
    timm_family("DeiT, distilled", of_timm("deit_tiny_distilled_patch16_224", **TIMM), 2, True),
    timm_family("EVA-02", of_timm("eva02_tiny_patch14_224", **TIMM), 1, True),
    timm_family("DINOv3", of_timm("vit_small_patch16_dinov3", **TIMM), 5, True, adds_up=False),
    timm_family("Perception Encoder", of_timm("vit_pe_core_tiny_patch16_384", **TIMM), 1, True),
    timm_family("SigLIP", of_timm("vit_base_patch16_siglip_224", **TIMM)),
    timm_family("ResNet", of_timm("test_resnet"), grid=(5, 5), stages=True),
    timm_family("ConvNeXt", of_timm("test_convnext"), grid=(5, 5), stages=True),
    timm_family("EfficientNet", of_timm("test_efficientnet"), grid=(5, 5), stages=True),
    timm_family("Swin", of_timm("swin_tiny_patch4_window7_224", **SWIN), stages=True),
    timm_family("Swin V2", of_timm("swinv2_tiny_window8_256", **SWIN), stages=True),
    Family("ViT", "open_clip", of_open_clip("plain"), in_open_clip, 1, True, checked_by=FORWARD),
    Family("ResNet", "open_clip", of_open_clip("resnet"), in_open_clip, grid=(2, 2), stages=True, checked_by=FORWARD),
    Family("ConvNeXt", "open_clip", of_open_clip("test_convnext"), in_open_clip, grid=(5, 5), stages=True,
           checked_by=FORWARD),
]  # fmt: skip


@functools.cache
def harvested(number: int) -> tuple[Any, ...]:
    """(family, tower, its points, run's shapes and layouts, activations of three pictures, mask of padding)."""
    family = FAMILIES[number]
    tower = family.make()
    kinds = ("residual",) if family.stages else family.kinds
    points = [HookPoint(kind, layer) for layer in range(tower.n_blocks) for kind in kinds]
    points += [HookPoint(name) for name in tower.anatomy.image_points if _given(family, tower, name)]
    with tower.hooked(points) as run:
        inputs = tower.preprocess(pictures())
        return family, tower, points, run, run(inputs), tower.token_mask(inputs)


def _given(family: Family, tower: Tower, name: str) -> bool:
    """Whether the library gives the point: some outputs of transformers have no pooler_output."""
    if family.library != "transformers":
        return True
    with torch.inference_mode():
        return pooler_output(tower, prepared(tower, pictures(1)))[0] is not None
