"""Towers of open_clip: its own vision transformers, and those it takes from timm."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saevlm_fast.errors import require
from saevlm_fast.towers.from_timm import itself, timm_anatomy
from saevlm_fast.towers.hub import WEIGHT_FILES, announce_download, cached_file
from saevlm_fast.towers.preprocess import compose_preprocess, described
from saevlm_fast.towers.tower import Anatomy, Tower


def load_open_clip(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Tower:
    return wrap_open_clip(open_clip_model(name, spec, on_message).visual, spec, device)


def open_clip_model(name: str, spec: str, on_message: Callable[[str], None]) -> Any:
    """The whole model, image and text side, of the NAME in open_clip:NAME, with every weight from its file."""
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
        pretrained, preprocess = _released(arch, pretrained, spec, on_message)
    else:
        require(
            Path(pretrained).is_file() and Path(pretrained).suffix in WEIGHT_FILES,
            f"{spec}: {pretrained!r} is neither a file ({', '.join(WEIGHT_FILES)}) nor one of open_clip's weights for "
            f"{arch}: {', '.join(tags) or 'none'}",
        )
        preprocess = preprocess_of_file(arch, tags, Path(pretrained), spec)
    return open_clip.create_model(arch, pretrained, force_preprocess_cfg=preprocess, **options)


def _released(arch: str, tag: str, spec: str, on_message: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Released weights: their file if it is in the cache, else their tag, which open_clip downloads."""
    import open_clip

    config = open_clip.get_pretrained_cfg(arch, tag)
    repo, _, file = config.get("hf_hub", "").rpartition("/")
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = cached_file(repo, names) if repo else None
    if cached is None:
        announce_download(spec, on_message)
    return cached or tag, _preprocess_settings(config)


def preprocess_of_file(arch: str, tags: Sequence[str], file: Path, spec: str) -> dict[str, Any]:
    """How a weights file's images are prepared, which it does not say itself.

    As open_clip_config.json beside it says; else as all released weights of the architecture agree; an architecture
    without any has open_clip's own default.
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
    require(isinstance(visual, VisionTransformer), f"{spec}: {kind} is not a vision transformer")
    image_points = {"projection": projection}
    if visual.attn_pool is None:
        pooled = itself if visual.final_ln_after_pool else lambda output: visual._global_pool(output)[0]
        image_points["pooled"] = visual.ln_post, pooled
    return Anatomy(
        blocks=list(visual.transformer.resblocks),
        n_prefix=1,
        has_cls=True,
        image_points=image_points,
        absent={"pooled": "its attention pool has no such output; take the projection"},
        width=visual.transformer.width,
        patch_size=tuple(visual.patch_size),
        batch_first=getattr(visual.transformer, "batch_first", True),
    )
