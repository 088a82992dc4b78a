"""Towers of timm: plain vision transformers, without their classifier."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saevlm_fast.errors import require
from saevlm_fast.towers.hub import OFFLINE, WEIGHT_FILES, announce_download, cached_file
from saevlm_fast.towers.preprocess import compose_preprocess, described
from saevlm_fast.towers.tower import Anatomy, Tower


def load_timm(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Tower:
    import timm

    match = re.fullmatch(r"((?:hf-hub:|local-dir:)?[^:]+)(?::(.+))?", name)
    require(match is not None, f"{spec}: not of the form timm:NAME[:FILE]")
    architecture, file = match.groups()  # type: ignore[union-attr]
    if file is not None:
        require(
            Path(file).is_file() and Path(file).suffix in WEIGHT_FILES,
            f"{spec}: no such weights file ({', '.join(WEIGHT_FILES)}): {file}",
        )
        return wrap_timm(_from_file(architecture, file, spec), spec, device)
    if architecture.startswith("hf-hub:"):
        announce_download(spec, on_message)
    elif not architecture.startswith("local-dir:"):
        return wrap_timm(_released(architecture, spec, on_message), spec, device)
    return wrap_timm(timm.create_model(architecture, pretrained=True, num_classes=0), spec, device)


def _released(architecture: str, spec: str, on_message: Callable[[str], None]) -> nn.Module:
    """With timm's own weights: their file if it is in the cache, else downloaded."""
    import timm

    require(timm.is_model(architecture), f"{spec}: timm has no model {architecture}")
    config: Any = timm.get_pretrained_cfg(architecture)
    require(config.has_weights, f"{spec}: timm has no weights for {architecture}; give {OFFLINE['timm']}")
    repo = config.hf_hub_id or ""
    cached = cached_file(repo, ["model.safetensors", "pytorch_model.bin"]) if repo else None
    if cached is None:
        announce_download(spec, on_message)
    overlay = None if cached is None else {"file": cached}
    return timm.create_model(architecture, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)


def _from_file(architecture: str, file: str, spec: str) -> nn.Module:
    """All weights but those of a classifier must be there, and come from the file."""
    import timm
    from timm.models import load_checkpoint

    model = timm.create_model(architecture, pretrained=False, num_classes=0)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    keys = load_checkpoint(model, file, strict=False, filter_fn=filter_fn, weights_only=True)
    missing = keys.missing_keys
    require(not missing, f"{spec}: {len(missing)} weights of {architecture} are missing, as {(missing or [''])[0]}")
    return model


def wrap_timm(model: nn.Module, spec: str, device: torch.device | str = "cpu") -> Tower:
    """A tower of a timm model made with num_classes=0."""
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    anatomy = timm_anatomy(model, spec)
    settings = resolve_model_data_config(model)
    preprocess, normalisation = compose_preprocess(create_transform(**settings, is_training=False), spec)
    anatomy.description = described("timm", timm.__version__, "create_transform", settings)
    return Tower(spec, model, anatomy, preprocess, normalisation, device)


def timm_anatomy(model: Any, spec: str) -> Anatomy:
    blocks: Any = getattr(model, "blocks", None)
    kind = type(model).__name__
    require(
        isinstance(blocks, (nn.ModuleList, nn.Sequential)) and hasattr(model, "num_prefix_tokens"),
        f"{spec}: {kind} is not a plain vision transformer",
    )
    return Anatomy(
        blocks=list(blocks),
        n_prefix=model.num_prefix_tokens,
        has_cls=getattr(model, "cls_token", None) is not None,
        image_points={"pooled": (model, itself)},
        absent={"projection": "timm's models have no projection; pooled is their image vector"},
        width=getattr(model, "embed_dim", None),
    )


def itself(output: Tensor) -> Tensor:
    return output
