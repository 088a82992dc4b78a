"""Towers of transformers that are not called, or do not hold their tokens, as a plain ViT: what is special about each.

Qwen2-VL, 2.5, 3    patches of all images in one sequence, squares to be merged (and windows) side by side; grid_thw
Pixtral             patches of all images in one sequence, row by row
Idefics3, SmolVLM   a mask of patches; a processor that takes a list of images for one sample
Mllama              two stacks of blocks, one behind the other; tiles; a sequence padded to a multiple of 8
ViT-MAE             shuffles and drops patches, unless told not to
Llama 4             its class token comes last
RADIO, Pixio        several class tokens
SAM                 a map of patches between its blocks, windows only inside them
ResNet, ConvNeXt    stages instead of blocks, cells of the feature map instead of patches
Swin                the same; a stage ends before its cells are merged, as in timm
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saevlm_fast.errors import require
from saevlm_fast.towers.forms import Cells, ClsLast, Form, Grid, ListedCells, Packed, Tiles, merged_order
from saevlm_fast.towers.from_timm import timm_anatomy

# transformers maps most vision configurations to their model; these it does not know, or by another name.
_CLASSES = {
    "qwen2_vl_vision": "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
    "mllama_vision_model": "mllama.modeling_mllama.MllamaVisionModel",
}


# Towers whose patches come in squares that are merged later, as Qwen2-VL's.
_MERGED = ("qwen", "glm4v", "glm_ocr", "exaone4_5", "cohere_compass")


def vision_class(config: Any) -> Any:
    """The class of the vision model of that configuration; None if transformers has none."""
    import transformers

    known = transformers.MODEL_MAPPING.get(type(config), None)
    if known is not None:
        return known
    if config.model_type in _CLASSES:
        module, _, name = _CLASSES[config.model_type].rpartition(".")
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    plain = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    return plain or _unlisted_class(config)


def _unlisted_class(config: Any) -> Any:
    """The first model of that configuration in the file that defines the whole model, with a forward of its own."""
    from transformers import PreTrainedModel

    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    for found in vars(module).values():
        if not (inspect.isclass(found) and issubclass(found, PreTrainedModel) and found.__module__ == name):
            continue
        if found.config_class is type(config) and "forward" in vars(found):
            return found
    return None


def tower_prefix(config: Any) -> str:
    """What the tower is called in a checkpoint of the whole model; a pattern."""
    inner = config.model_type in ("idefics3_vision", "smolvlm_vision", "mllama_vision_model")
    return "vision_model" if inner else "vision_tower|visual"


_PACKED = "it packs patches in an order that is not known here"
# Whole checkpoints whose own processor and tower fit together in a way that no other family's do.
_NOT_READ = {
    "florence_vision": "it is a DaViT, whose stages are not known here",
    "idefics2_vision": "its processor gives the images of a sample together, padded",
    "kimi_k25_vision": _PACKED,
    "paddleocr_vl_vision": _PACKED,
    "phi4_multimodal_vision": "its processor cuts images into crops and gives no pixel_values",
    "video_llama_3_vision": _PACKED,
}


def check_read(config: Any, spec: str) -> None:
    """ValueError: the tower of that configuration is known not to be read with its own processor."""
    why = _NOT_READ.get(str(config.model_type))
    require(why is None, f"{spec}: the tower of {type(config).__name__} is not read: {why}")


# Of videos, of which an image is none.
_VIDEOS = ("vjepa2", "xclip_vision_model", "timesformer", "videomae", "vivit", "videoprism_vision_model")


def check_called(model: Any, given: Sequence[str], spec: str) -> None:
    """ValueError: a tower of videos; or one that is called with more than is known here what it means."""
    kind, family = type(model).__name__, str(model.config.model_type)
    require(family not in _VIDEOS, f"{spec}: {kind} is a tower of videos, not of images")
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    more = [name for name in named if name not in ("pixel_values", *given)]
    require(
        not more,
        f"{spec}: {kind} is called with {', '.join(more)} beside pixels, in a way that is not known of its family, "
        f"{family}",
    )


def special(model: Any) -> dict[str, Any]:
    """Fields of the Anatomy that are not as a plain ViT's; {} of one."""
    family = str(model.config.model_type)
    merging = hasattr(model, "blocks") and hasattr(model.config, "spatial_merge_size")
    if merging and family.startswith(_MERGED):
        return _qwen(model)
    makers: Mapping[str, Callable[[Any], dict[str, Any]]] = {
        "pixtral": _pixtral,
        "idefics3_vision": _patch_mask,
        "smolvlm_vision": _patch_mask,
        "mllama_vision_model": _mllama,
        "vit_mae": _mae,
        "timm_wrapper": _of_timm,
        "resnet": _stages,
        "convnext": _stages,
        "convnextv2": _stages,
        "dinov3_convnext": _stages,
        "swin": _merging_stages,
        "swinv2": _merging_stages,
        "donut-swin": _merging_stages,
        "llama4_vision_model": _llama4,
        "sam_vision_model": _map_of_patches,
        "sam_hq_vision_model": _map_of_patches,
        "got_ocr2_vision": _map_of_patches,
        "ovis2_vision": _no_image_points,
        "radio": lambda model: {"n_prefix": model.config.num_cls_tokens + model.config.num_registers, "has_cls": True},
        "pixio": lambda model: {"n_prefix": model.config.n_cls_tokens, "has_cls": True},
    }
    return makers[family](model) if family in makers else {}


def _no_image_points(model: Any) -> dict[str, Any]:
    absent = dict.fromkeys(("projection", "pooled"), "every patch goes to the language model")
    return {"image_points": {}, "absent": absent}


def _qwen(model: Any) -> dict[str, Any]:
    config = model.config
    window = None
    if hasattr(config, "fullatt_block_indexes"):
        window = config.window_size // config.spatial_merge_size // config.patch_size

    def grids_of(inputs: Mapping[str, Any]) -> list[Grid]:
        grids = inputs["image_grid_thw"] if "image_grid_thw" in inputs else inputs["grid_thw"]
        return [(rows, columns) for times, rows, columns in grids.tolist() for _ in range(times)]

    return {
        "blocks": list(model.blocks),
        "form": Packed(model, ("hidden_states", "grid_thw"), grids_of, merged_order(config.spatial_merge_size, window)),
        **_no_image_points(model),
        "width": getattr(config, "embed_dim", config.hidden_size),
        "patch_size": None,
        "beside": ("image_grid_thw",),
        "call": lambda model, inputs: model(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]),
    }


def _pixtral(model: Any) -> dict[str, Any]:
    patch = model.config.patch_size

    def grids_of(inputs: Mapping[str, Any]) -> list[Grid]:
        sizes = inputs.get("image_sizes")
        if sizes is None:
            pixels = inputs["pixel_values"]
            sizes = [tuple(pixels.shape[2:])] * len(pixels)
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]

    return {
        "form": Packed(model, ("pixel_values", "image_sizes"), grids_of),
        **_no_image_points(model),
    }


class PatchMask(Form):
    """The mask of pixels that the processor gives is one of patches to the model: those with any pixel of the image."""

    def __init__(self, patch: int):
        self.patch = patch

    def of(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """bool [B, rows, columns]."""
        squares = inputs["pixel_attention_mask"].unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        return squares.sum((-1, -2)) > 0

    def mask(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        return self.of(inputs).flatten(1) if "pixel_attention_mask" in inputs else None


def _patch_mask(model: Any) -> dict[str, Any]:
    form = PatchMask(model.config.patch_size)

    def call(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        mask = form.of(inputs) if "pixel_attention_mask" in inputs else None
        return model(pixel_values=inputs["pixel_values"], patch_attention_mask=mask)

    return {"form": form, "beside": ("pixel_attention_mask",), "call": call}


def _mllama(model: Any) -> dict[str, Any]:
    patches, n_tiles = (model.config.image_size // model.config.patch_size) ** 2, model.config.max_num_tiles

    def call(model: Any, inputs: dict[str, Tensor]) -> Any:
        """An image in its first tile; the model wants all that it has been made for."""
        pixels, mask = inputs["pixel_values"], inputs["aspect_ratio_mask"]
        free = n_tiles - pixels.shape[2]
        pixels = nn.functional.pad(pixels, (0, 0) * 3 + (0, free))
        mask = nn.functional.pad(mask, (0, free))
        return model(pixel_values=pixels, aspect_ratio_ids=inputs["aspect_ratio_ids"], aspect_ratio_mask=mask)

    return {
        "blocks": [*model.transformer.layers, *model.global_transformer.layers],
        "n_prefix": 1,
        "has_cls": True,
        "form": Tiles(model, 1 + patches, 8),
        "image_points": {},
        "absent": dict.fromkeys(("projection", "pooled"), "every token goes to the language model"),
        "call": call,
    }


def _of_timm(model: Any) -> dict[str, Any]:
    """A model of timm inside one of transformers, as the Perception Encoder in a PerceptionLM."""
    anatomy = timm_anatomy(model.timm_model, type(model).__name__)
    fields = ("blocks", "n_prefix", "has_cls", "absent", "width", "n_patches", "form")
    # What timm pools, as the wrapper gives it; a trunk that is made without a pool has none.
    pooled = model, lambda output: getattr(output, "pooler_output", None)
    return {name: getattr(anatomy, name) for name in fields} | {"image_points": {"pooled": pooled}, "patch_size": None}


def _mae(model: Any) -> dict[str, Any]:
    """All patches, in order: masking is for training, and `noise` is what the order is drawn by."""
    model.config.mask_ratio = 0.0

    def call(model: Any, inputs: dict[str, Tensor]) -> Any:
        pixels = inputs["pixel_values"]
        n = model.embeddings.patch_embeddings.num_patches
        noise = torch.arange(n, dtype=torch.float32, device=pixels.device).expand(len(pixels), n)
        return model(pixel_values=pixels, noise=noise)

    return {"call": call}


def _stages(model: Any) -> dict[str, Any]:
    inner = getattr(model, "encoder", None) or model.model
    return {
        "blocks": list(inner.stages),
        "form": Cells(),
        "image_points": {"pooled": (model, lambda output: output.pooler_output.flatten(1))},
        "width": None,
        "patch_size": None,
    }


def _merging_stages(model: Any) -> dict[str, Any]:
    """A stage of a Swin merges its cells at its end, unless it is the last: what its last block gives is before that,
    where timm's stages end too, and where `output_hidden_states_before_downsampling` of transformers is."""
    blocks = [stage.blocks[-1] for stage in model.encoder.layers]
    return {
        "blocks": blocks,
        "form": ListedCells(),
        "image_points": {"pooled": (model, lambda output: output.pooler_output)},
        "width": None,
        "patch_size": None,
    }


def _llama4(model: Any) -> dict[str, Any]:
    return {
        "n_prefix": 1,
        "has_cls": True,
        "form": ClsLast(),
        **_no_image_points(model),
    }


def _map_of_patches(model: Any) -> dict[str, Any]:
    encoder = getattr(model, "vision_encoder", model)
    return {
        "blocks": list(encoder.layers),
        "form": Cells(last=True),
        "image_points": {},
        "absent": dict.fromkeys(("projection", "pooled"), "a SAM gives a map, no vector of the whole image"),
        "patch_size": None,
    }


def most_tokens(model: Any, processor: Any) -> int | None:
    """Patches of the largest image that the processor lets through, where images have grids of their own."""
    longest = (getattr(processor, "size", None) or {}).get("longest_edge")
    family, patch = str(model.config.model_type), getattr(model.config, "patch_size", None)
    if longest is None or not isinstance(patch, int):
        return None
    if family.startswith(_MERGED):
        return longest // patch**2  # their longest_edge is a number of pixels
    return (longest // patch) ** 2 if family == "pixtral" else None
