"""Towers of open_clip: its own vision transformers and ResNets, and those it takes from timm."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saevlm_fast.errors import require
from saevlm_fast.towers.forms import Cells, Form, SequenceFirst
from saevlm_fast.towers.from_timm import itself, map_stages, timm_anatomy
from saevlm_fast.towers.hub import WEIGHT_FILES, announce_download, cached_file
from saevlm_fast.towers.preprocess import compose_preprocess, described
from saevlm_fast.towers.tower import Anatomy, Tower


def load_open_clip(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Tower:
    return wrap_open_clip(open_clip_model(name, spec, on_message).visual, spec, device)


def open_clip_model(name: str, spec: str, on_message: Callable[[str], None]) -> Any:
    """The whole model, image and text side, of the NAME in open_clip:NAME, with every weight from its file.

    Raises:
        ValueError: an unknown architecture, or no such weights of it.
    """
    import open_clip

    options: dict[str, Any] = {"require_pretrained": True, "weights_only": True}
    if name.startswith("hf-hub:"):
        files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        if cached_file(name.removeprefix("hf-hub:"), files) is None:
            announce_download(spec, on_message)
        return open_clip.create_model(name, **options)
    if name.startswith("local-dir:"):
        return open_clip.create_model(name, **options)
    arch, _, pretrained = name.partition("/")
    require(arch in open_clip.list_models(), f"{spec}: open_clip has no architecture {arch}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if pretrained in tags:
        settings = released_settings(arch, pretrained, spec, on_message)
        pretrained = _released_file(arch, pretrained, spec, on_message)
    else:
        require(
            Path(pretrained).is_file() and Path(pretrained).suffix in WEIGHT_FILES,
            f"{spec}: {pretrained!r} is neither a file ({', '.join(WEIGHT_FILES)}) nor one of open_clip's weights for "
            f"{arch}: {', '.join(tags) or 'none'}",
        )
        settings = {
            "force_preprocess_cfg": preprocess_of_file(arch, tags, Path(pretrained), spec),
            "force_quick_gelu": _quick_gelu_of_file(arch, Path(pretrained), spec, on_message),
        }
    return open_clip.create_model(arch, pretrained, **settings, **options)


def released_settings(arch: str, tag: str, spec: str, on_message: Callable[[str], None]) -> dict[str, Any]:
    """What the record of released weights says of how they run, as options of open_clip.create_model.

    open_clip itself applies a record only where it downloads by the tag, and never its activation. A record that says
    nothing of the activation leaves the architecture's own.

    Raises:
        ValueError: the record says what this architecture cannot be made to do.
    """
    import open_clip

    record = open_clip.get_pretrained_cfg(arch, tag)
    config = _architecture(arch)
    size = config["vision_cfg"].get("image_size", 224)
    require(
        record.get("size", size) == size,
        f"{spec}: the record of {tag} says images of {record.get('size')}, and {arch} takes {size}",
    )
    quick_gelu = _checked_quick_gelu(arch, record.get("quick_gelu"), f"the record of {tag}", spec)
    if quick_gelu and "quick_gelu" not in record:
        on_message(f"{spec}: the record of {tag} says nothing of the activation; QuickGELU, as {arch} has it")
    return {"force_preprocess_cfg": _preprocess_settings(record), "force_quick_gelu": quick_gelu}


def _checked_quick_gelu(arch: str, said: bool | None, by: str, spec: str) -> bool:
    """Whether the model runs with QuickGELU: as it is said, which may not be possible; else as the architecture."""
    config = _architecture(arch)
    own = bool(config.get("quick_gelu", False))
    if said is None:
        return own
    require(said or not own, f"{spec}: {by} says GELU, and {arch} is made with QuickGELU")
    timm_tower = said and config["vision_cfg"].get("timm_model_name")
    require(not timm_tower, f"{spec}: {by} says QuickGELU, and open_clip runs towers of timm ({timm_tower}) with GELU")
    return said


def _architecture(arch: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_model_config(arch) or {}


def _released_file(arch: str, tag: str, spec: str, on_message: Callable[[str], None]) -> str:
    """The file of released weights if it is in the cache, else their tag, which open_clip downloads."""
    import open_clip

    repo, _, file = open_clip.get_pretrained_cfg(arch, tag).get("hf_hub", "").rpartition("/")
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = cached_file(repo, names) if repo else None
    if cached is None:
        announce_download(spec, on_message)
    return cached or tag


def preprocess_of_file(arch: str, tags: Sequence[str], file: Path, spec: str) -> dict[str, Any]:
    """How a weights file's images are prepared, which it does not say itself.

    As open_clip_config.json beside it says; else as all released weights of the architecture agree; an architecture
    without any has open_clip's own default. ValueError: they do not agree.
    """
    import open_clip

    beside = file.parent / "open_clip_config.json"
    if beside.is_file():
        return _preprocess_settings(json.loads(beside.read_text()).get("preprocess_cfg", {}))
    released = [_preprocess_settings(open_clip.get_pretrained_cfg(arch, tag)) for tag in tags] or [{}]
    require(
        all(settings == released[0] for settings in released),
        f"{spec}: the released weights of {arch} differ in preprocessing, so {beside} must say it",
    )
    return released[0]


def _quick_gelu_of_file(arch: str, file: Path, spec: str, on_message: Callable[[str], None]) -> bool:
    """A weights file does not say its activation: as open_clip_config.json beside it, else the architecture's, told."""
    import open_clip

    beside = file.parent / "open_clip_config.json"
    model = json.loads(beside.read_text()).get("model_cfg") if beside.is_file() else None
    if isinstance(model, dict):
        return _checked_quick_gelu(arch, bool(model.get("quick_gelu", False)), str(beside), spec)
    own, other = bool(_architecture(arch).get("quick_gelu", False)), f"{arch}-quickgelu"
    if not own and other in open_clip.list_models():
        on_message(
            f"{spec}: {file.name} does not say its activation; GELU, as {arch} has it. Weights that were trained with "
            f"QuickGELU (OpenAI's, MetaCLIP's, DFN's) need open_clip:{other}/FILE"
        )
    return own


def _preprocess_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}


def wrap_open_clip(visual: Any, spec: str, device: torch.device | str = "cpu") -> Tower:
    """A tower of an open_clip model's `visual` (VisionTransformer or TimmModel), which knows its preprocessing."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(**visual.preprocess_cfg)
    preprocess, normalisation = compose_preprocess(image_transform_v2(settings, is_train=False), spec)
    anatomy = open_clip_anatomy(visual, spec)
    anatomy.description = described("open_clip", open_clip.__version__, "image_transform_v2", asdict(settings))
    return Tower(spec, visual, anatomy, preprocess, normalisation, device)


def open_clip_anatomy(visual: Any, spec: str) -> Anatomy:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    projection = visual, lambda output: output[0] if isinstance(output, tuple) else output
    if isinstance(visual, TimmModel):
        anatomy = timm_anatomy(visual.trunk, spec)
        anatomy.image_points = {"projection": projection, "pooled": (visual.trunk, itself)}
        return anatomy
    kind = type(visual).__name__
    pools = {"pooled": "its attention pool has no such output; take the projection"}
    stages, _ = map_stages(visual)
    if stages:
        return Anatomy(stages, 0, False, {"projection": projection}, pools, form=Cells())
    require(isinstance(visual, VisionTransformer), f"{spec}: {kind} is neither a vision transformer nor a ResNet")
    image_points = {"projection": projection}
    if visual.attn_pool is None:
        pooled = itself if visual.final_ln_after_pool else lambda output: visual._global_pool(output)[0]
        image_points["pooled"] = visual.ln_post, pooled
    return Anatomy(
        blocks=list(visual.transformer.resblocks),
        n_prefix=1,
        has_cls=True,
        image_points=image_points,
        absent=pools,
        width=visual.transformer.width,
        patch_size=tuple(visual.patch_size),
        form=Form() if getattr(visual.transformer, "batch_first", True) else SequenceFirst(),
    )
