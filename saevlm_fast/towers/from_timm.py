"""Towers of timm: plain vision transformers, Swin, ResNets, ConvNeXts and EfficientNets, without their classifier."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saevlm_fast.errors import require
from saevlm_fast.towers.forms import Cells
from saevlm_fast.towers.hub import OFFLINE, WEIGHT_FILES, announce_download, cached_file
from saevlm_fast.towers.preprocess import compose_preprocess, described
from saevlm_fast.towers.tower import Anatomy, Tower

# Where XCiT and CaiT add their class token: in blocks of its own, behind those of the patches.
_CLASS_BLOCKS = ("cls_attn_blocks", "blocks_token_only")


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
        return wrap_timm(_from_file(architecture, file, spec, on_message), spec, device)
    if architecture.startswith("hf-hub:"):
        announce_download(spec, on_message)
    elif not architecture.startswith("local-dir:"):
        return wrap_timm(_released(architecture, spec, on_message), spec, device)
    model = timm.create_model(architecture, pretrained=True, num_classes=0)
    record: Any = model.pretrained_cfg
    options = released_options(architecture, record)
    if options:  # what is known of a repository only after its record has been read
        model = timm.create_model(architecture, pretrained=True, num_classes=0, **options)
    return wrap_timm(model, spec, device)


def released_options(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of released weights says beside preprocessing, as options of timm.create_model.

    timm leaves to the user the activation that its records have a note of: nn.GELU is faster, but not what CLIPs of
    OpenAI, MetaCLIP and DFN were trained with. A repository's own record may lack the note that timm's has.

    Args:
        name: NAME.TAG, or hf-hub:OWNER/NAME.TAG. record: of the weights, as timm.get_pretrained_cfg(NAME).to_dict().
    """
    import timm

    known = timm.get_pretrained_cfg(name.rpartition("/")[2])
    notes = [*(record.get("notes") or ()), *((known and known.notes) or ())]
    return {"act_layer": "quick_gelu"} if any("quickgelu" in note.lower() for note in notes) else {}


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
    options = released_options(architecture, config.to_dict())
    if cached is not None:
        options["pretrained_cfg_overlay"] = {"file": cached}
    return timm.create_model(architecture, pretrained=True, num_classes=0, **options)


def _from_file(architecture: str, file: str, spec: str, on_message: Callable[[str], None]) -> nn.Module:
    """All weights but those of a classifier must be there, and come from the file."""
    import timm
    from timm.models import load_checkpoint

    require(timm.is_model(architecture), f"{spec}: timm has no model {architecture}")
    options: dict[str, Any] = {}
    if "." in architecture:  # the file is said to be of these weights, so that their record holds for it
        options = released_options(architecture, timm.get_pretrained_cfg(architecture).to_dict())  # type: ignore[union-attr]
    elif (doubt := _doubt_of_file(architecture)) is not None:
        on_message(f"{spec}: {Path(file).name} does not say {doubt}; timm:{architecture}.TAG:FILE takes those of a TAG")
    model = timm.create_model(architecture, pretrained=False, num_classes=0, **options)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    keys = load_checkpoint(model, file, strict=False, filter_fn=filter_fn, weights_only=True)
    missing = keys.missing_keys
    require(not missing, f"{spec}: {len(missing)} weights of {architecture} are missing, as {(missing or [''])[0]}")
    return model


def _doubt_of_file(architecture: str) -> str | None:
    """What a file of unknown origin does not say and the architecture's released weights do not agree on, and what is
    taken instead."""
    import timm

    records = [
        timm.get_pretrained_cfg(name).to_dict()  # type: ignore[union-attr]
        for name in timm.list_pretrained(f"{architecture}.*")
    ]
    if not records:
        return None
    taken: dict[str, Any] = timm.get_pretrained_cfg(architecture).to_dict()  # type: ignore[union-attr]
    doubts = [
        f"{name} ({taken[name]})"
        for name in ("mean", "std", "interpolation", "crop_pct")
        if any(record[name] != taken[name] for record in records)
    ]
    own = {"act_layer": "quick_gelu"} if "_quickgelu_" in architecture else {}
    if any(released_options(architecture, record) != own for record in records):
        doubts.insert(0, f"its activation ({'QuickGELU' if own else 'GELU'})")
    return f"{', '.join(doubts)}: taken as in brackets" if doubts else None


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
    stages, last = map_stages(model)
    if stages:
        return Anatomy(
            blocks=stages,
            n_prefix=0,
            has_cls=False,
            image_points={"pooled": (model, itself)},
            absent={"projection": "timm's models have no projection; pooled is their image vector"},
            form=Cells(last),
        )
    cls_later = any(hasattr(model, name) for name in _CLASS_BLOCKS)
    require(
        isinstance(blocks, (nn.ModuleList, nn.Sequential)) and (cls_later or hasattr(model, "num_prefix_tokens")),
        f"{spec}: {kind} is not a plain vision transformer, Swin, ResNet, ConvNeXt or EfficientNet",
    )
    return Anatomy(
        blocks=list(blocks),
        n_prefix=0 if cls_later else model.num_prefix_tokens,
        has_cls=not cls_later and getattr(model, "cls_token", None) is not None,
        image_points={"pooled": (model, itself)},
        absent={"projection": "timm's models have no projection; pooled is their image vector"},
        width=getattr(model, "embed_dim", None),
        n_patches=getattr(getattr(model, "patch_embed", None), "num_patches", None),
    )


def map_stages(model: Any) -> tuple[list[nn.Module], bool]:
    """Modules of a hierarchical model of timm or open_clip that give a feature map each, [] of any other; and whether
    channels are last. A Swin's blocks have put their windows back in raster order by the end of a stage."""
    kind, named = type(model).__name__, {"ConvNeXt": "stages", "EfficientNet": "blocks"}
    if kind in ("SwinTransformer", "SwinTransformerV2"):
        return list(model.layers), True
    if kind in named:
        return list(getattr(model, named[kind])), False
    layers = [getattr(model, f"layer{n}", None) for n in range(1, 5)]
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]
    return (modules if len(modules) == len(layers) else []), False


def itself(output: Tensor) -> Tensor:
    return output
