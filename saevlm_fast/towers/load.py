"""Vision towers of transformers, open_clip and timm: `load_tower`.

Each library loads its own model and brings its own preprocessing; what is added here is where the blocks are, which
tokens come before the patches, and what `pooled` and `projection` are:

    family                      pooled                                    projection
    transformers CLIP           post-layernorm of CLS                     get_image_features
    transformers SigLIP(2)      attention-pool head = get_image_features  the same
    transformers DINOv2, 3      layernorm of CLS                          -
    transformers ViT            pooler if the checkpoint has one, else    -
                                layernorm of CLS
    vision tower in a LLaVA     as its family; SigLIP mostly headless     - (SigLIP with a head: the same as pooled)
    open_clip VisionTransformer CLS or mean after ln_post                 encode_image, not normalised
    open_clip timm towers       the trunk's output                        encode_image, not normalised
    timm                        pre-logits                                -

A LLaVA-NeXT or OneVision processor cuts an image into tiles; the tower is given the first, the whole image.
"""

import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from saevlm_fast.box import models as box
from saevlm_fast.errors import first_line, require
from saevlm_fast.towers.preprocess import compose_preprocess, transformers_preprocess
from saevlm_fast.towers.tokens import Selected, TokenLayout, Tokens, select_tokens
from saevlm_fast.towers.tower import Anatomy, HookedTower, HookPoint, Tower

__all__ = [
    "HookPoint",
    "HookedTower",
    "Selected",
    "TokenLayout",
    "Tokens",
    "Tower",
    "find_anatomy",
    "load_tower",
    "select_tokens",
    "wrap_open_clip",
    "wrap_timm",
    "wrap_transformers",
]

SPECS = "hf:NAME_OR_DIR (tiny-clip, tiny-llava: in the box), open_clip:ARCH/PRETRAINED_OR_FILE, timm:NAME[:FILE]"
OFFLINE = {
    "hf": "hf:DIR, a directory with config.json, model.safetensors and preprocessor_config.json",
    "open_clip": "open_clip:ARCH/FILE.safetensors, or open_clip:local-dir:DIR, a directory with open_clip_config.json "
    "and open_clip_model.safetensors",
    "timm": "timm:NAME:FILE.safetensors",
}
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
_CONNECT_SECONDS = 5
Loaded = TypeVar("Loaded")


def load_tower(spec: str, device: torch.device | str = "cpu", on_message: Callable[[str], None] = print) -> Tower:
    """Loads a tower (see the module's docstring) in float32.

    Args:
        spec: hf:NAME_OR_DIR, open_clip:ARCH/PRETRAINED_OR_FILE or timm:NAME[:FILE]. FILE: .safetensors, or .pt, .pth
            and .bin, read with weights_only.
        on_message: told, in one line, before anything is downloaded.

    Raises:
        ValueError: in one line: an unknown model, weights that are missing from the file, no preprocessing, no network
            (with the layout of files that works without), a model that is no plain vision transformer.
    """
    prefix, _, name = spec.partition(":")
    loaders = {"hf": _load_transformers, "open_clip": _load_open_clip, "timm": _load_timm}
    require(prefix in loaders and name != "", f"model: {spec!r} is not one of {SPECS}")
    with one_line_errors(spec):
        return loaders[prefix](name, spec, torch.device(device), on_message)


@contextmanager
def one_line_errors(spec: str) -> Iterator[None]:
    """The libraries' own errors, which are of many kinds and several lines, as ValueErrors of one line."""
    try:
        yield
    except ValueError as error:
        message = first_line(error)
        raise ValueError(message if spec in message else f"{spec}: {message}") from error
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # torch puts the reason second
        raise ValueError(f"{spec}: {' '.join(lines[:2])[:300] or type(error).__name__}") from error


def find_anatomy(model: nn.Module) -> Anatomy:
    """Of a model already loaded: the vision tower in a LLaVA, CLIP or SigLIP of transformers, or of open_clip; or it.

    Raises:
        ValueError: a model of another library, or one whose vision part is no plain vision transformer.
    """
    kind = type(model).__name__
    libraries = {ancestor.__module__.partition(".")[0] for ancestor in type(model).__mro__}
    if "open_clip" in libraries:
        return _open_clip_anatomy(getattr(model, "visual", model), kind)
    if "timm" in libraries:
        return _timm_anatomy(model, kind)
    require("transformers" in libraries, f"model: {kind} is not a model of transformers, open_clip or timm")
    return _transformers_anatomy(vision_part(model), kind)


def vision_part(model: Any) -> nn.Module:
    """The outermost module whose configuration is the model's vision_config; the model itself if it has none."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return model
    for module in model.modules():
        if type(getattr(module, "config", None)) is type(vision):
            return module
    raise ValueError(f"model: {type(model).__name__} has no part for its {type(vision).__name__}")


# --- the hub ---


def announce_download(spec: str, on_message: Callable[[str], None]) -> None:
    """Says that a download begins; ValueError at once if the hub does not answer (the libraries retry for minutes)."""
    from huggingface_hub import constants, get_session

    on_message(f"{spec}: not on this machine, downloading from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}")
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except Exception as error:  # which HTTP library, with exceptions of its own, depends on the hub's version
        layout = OFFLINE[spec.partition(":")[0]]
        raise ValueError(
            f"{spec}: not on this machine, and {constants.ENDPOINT} does not answer ({first_line(error)}); offline, "
            f"give {layout}"
        ) from error


def _cached_file(repo: str, names: Sequence[str]) -> str | None:
    """The first of these files of a hub repository that is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(repo, name) for name in names)
    return next((path for path in paths if isinstance(path, str)), None)


# --- transformers ---


def _load_transformers(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Tower:
    return local_or_hub(name, spec, lambda source, local: _from_pretrained(source, spec, device, local), on_message)


def local_or_hub(
    name: str, spec: str, load: Callable[[str, bool], Loaded], on_message: Callable[[str], None]
) -> Loaded:
    """load(NAME_OR_DIR, whether from local files alone): a model of the box, a directory, the hub's cache, the hub.

    The box first: a directory that happens to be called tiny-clip is ./tiny-clip.
    """
    if name in box.MODELS:
        return load(str(box.model_directory(name)), True)
    if Path(name).is_dir():
        require((Path(name) / "config.json").is_file(), f"{spec}: {Path(name) / 'config.json'} is missing")
        return load(name, True)
    require(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None, f"{spec}: no directory {name}")
    try:
        return load(name, True)
    except OSError:  # something is not in the cache
        announce_download(spec, on_message)
    return load(name, False)


def _from_pretrained(name: str, spec: str, device: torch.device, local: bool) -> Tower:
    from transformers import AutoConfig, AutoImageProcessor

    config = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not Path(name).is_dir():
            raise
        raise ValueError(f"{spec}: {Path(name) / 'preprocessor_config.json'} is missing or unusable") from error
    return wrap_transformers(_vision_model(name, spec, config, local), processor, spec, device)


def _vision_model(name: str, spec: str, config: Any, local: bool) -> nn.Module:
    """The vision part of a checkpoint, every weight of it from the file; a head the checkpoint lacks is left off."""
    import transformers

    vision = getattr(config, "vision_config", config)
    require(type(vision) in transformers.MODEL_MAPPING, f"{spec}: {type(vision).__name__} belongs to no vision model")
    plain: Any = transformers.MODEL_MAPPING[type(vision)]
    options: dict[str, bool] = {}
    projecting = getattr(transformers, type(vision).__name__.removesuffix("Config") + "ModelWithProjection", None)
    model_class = plain
    if projecting is not None and hasattr(config, "projection_dim"):
        model_class, vision.projection_dim = projecting, config.projection_dim
    while True:
        with without_load_report():
            model, info = model_class.from_pretrained(
                name, config=vision, local_files_only=local, dtype=torch.float32, weights_only=True,
                key_mapping={r"^(?:model\.)?vision_tower\.": ""}, output_loading_info=True, **options,
            )  # fmt: skip
        missing = sorted(info["missing_keys"])
        if not missing:
            return model
        head = {key.split(".")[0] for key in missing}
        if "visual_projection" in head:
            model_class = plain  # if more is missing, it is missing there too
        elif head == {"pooler"} and not options:
            options = {"add_pooling_layer": False}
        elif head == {"head"} and getattr(vision, "vision_use_head", False):
            vision.vision_use_head = False
        else:
            raise ValueError(f"{spec}: {len(missing)} weights of {model_class.__name__} are missing, as {missing[0]}")


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without transformers' progress bar, and its table of weights missing (checked here) or left over (normal)."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def wrap_transformers(model: nn.Module, processor: Any, spec: str, device: torch.device | str = "cpu") -> Tower:
    """A tower of a transformers vision model (with or without projection) and its image processor."""
    import transformers

    preprocess, normalisation = transformers_preprocess(processor, spec)
    anatomy = _transformers_anatomy(model, spec)
    anatomy.description = _described(
        "transformers", transformers.__version__, type(processor).__name__, processor.to_dict()
    )
    return Tower(spec, model, anatomy, preprocess, normalisation, device)


def _transformers_anatomy(model: Any, spec: str) -> Anatomy:
    config = model.config
    n_registers = getattr(config, "num_register_tokens", 0)
    has_cls = any(name.split(".")[-1] in ("cls_token", "class_embedding") for name, _ in model.named_parameters())
    patch = getattr(config, "patch_size", None)
    return Anatomy(
        blocks=_transformers_blocks(model, spec),
        n_prefix=has_cls + n_registers,
        has_cls=has_cls,
        image_points=_transformers_image_points(model, has_cls),
        absent={
            "projection": f"{type(model).__name__} has no projection",
            "pooled": "its checkpoint has no pooling head, and there is no CLS token",
        },
        width=getattr(config, "hidden_size", None),
        patch_size=(patch, patch) if isinstance(patch, int) else patch,
        call=lambda model, inputs: model(**inputs),
    )


def _transformers_blocks(model: Any, spec: str) -> Sequence[nn.Module]:
    """The list as long as the configuration says; convolutional models have stages, but no single number of heads."""
    n_blocks = getattr(model.config, "num_hidden_layers", 0)
    if isinstance(getattr(model.config, "num_attention_heads", None), int):
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_blocks > 0:
                return list(module)
    raise ValueError(f"{spec}: {type(model).__name__} is not a vision transformer with a list of equal blocks")


def _transformers_image_points(model: Any, has_cls: bool) -> dict[str, tuple[nn.Module, Callable[[Any], Tensor]]]:
    """Taken from the models' own outputs, which every family names alike."""
    points: dict[str, tuple[nn.Module, Callable[[Any], Tensor]]] = {}
    if hasattr(model, "visual_projection"):
        points["projection"] = model, lambda output: output.image_embeds
        points["pooled"] = model.vision_model, lambda output: output.pooler_output
    elif hasattr(model, "head"):  # SigLIP: the pooling head's output is the shared space
        points["projection"] = points["pooled"] = model, lambda output: output.pooler_output
    elif getattr(model, "pooler", model) is None:  # ViT without pooler
        points["pooled"] = model, lambda output: output.last_hidden_state[:, 0]
    elif has_cls:
        points["pooled"] = model, lambda output: output.pooler_output
    return points


def _described(library: str, version: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {library: version, "preprocess": {"name": name, **json.loads(json.dumps(settings, default=str))}}


# --- open_clip ---


def _load_open_clip(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Tower:
    return wrap_open_clip(open_clip_model(name, spec, on_message).visual, spec, device)


def open_clip_model(name: str, spec: str, on_message: Callable[[str], None]) -> Any:
    """The whole model, image and text side, of the NAME in open_clip:NAME, with every weight from its file."""
    import open_clip

    options: dict[str, Any] = {"require_pretrained": True, "weights_only": True}
    if name.startswith("hf-hub:"):
        files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        if _cached_file(name.removeprefix("hf-hub:"), files) is None:
            announce_download(spec, on_message)
        return open_clip.create_model(name, **options)
    if name.startswith("local-dir:"):
        return open_clip.create_model(name, **options)
    arch, _, pretrained = name.partition("/")
    require(arch in open_clip.list_models(), f"{spec}: open_clip has no architecture {arch}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if pretrained in tags:
        pretrained, preprocess = _open_clip_tag(arch, pretrained, spec, on_message)
    else:
        require(
            Path(pretrained).is_file() and Path(pretrained).suffix in _WEIGHT_FILES,
            f"{spec}: {pretrained!r} is neither a file ({', '.join(_WEIGHT_FILES)}) nor one of open_clip's weights for "
            f"{arch}: {', '.join(tags) or 'none'}",
        )
        preprocess = _open_clip_file_preprocess(arch, tags, Path(pretrained), spec)
    return open_clip.create_model(arch, pretrained, force_preprocess_cfg=preprocess, **options)


def _open_clip_tag(arch: str, tag: str, spec: str, on_message: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Released weights: their file if it is in the cache, else their tag, which open_clip downloads."""
    import open_clip

    config = open_clip.get_pretrained_cfg(arch, tag)
    repo, _, file = config.get("hf_hub", "").rpartition("/")
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = _cached_file(repo, names) if repo else None
    if cached is None:
        announce_download(spec, on_message)
    return cached or tag, _preprocess_settings(config)


def _open_clip_file_preprocess(arch: str, tags: Sequence[str], file: Path, spec: str) -> dict[str, Any]:
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
    anatomy = _open_clip_anatomy(visual, spec)
    anatomy.description = _described("open_clip", open_clip.__version__, "image_transform_v2", asdict(settings))
    return Tower(spec, visual, anatomy, preprocess, normalisation, device)


def _open_clip_anatomy(visual: Any, spec: str) -> Anatomy:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    projection = visual, lambda output: output[0] if isinstance(output, tuple) else output
    if isinstance(visual, TimmModel):
        anatomy = _timm_anatomy(visual.trunk, spec)
        anatomy.image_points = {"projection": projection, "pooled": (visual.trunk, _itself)}
        return anatomy
    kind = type(visual).__name__
    require(isinstance(visual, VisionTransformer), f"{spec}: {kind} is not a vision transformer")
    image_points = {"projection": projection}
    if visual.attn_pool is None:
        pooled = _itself if visual.final_ln_after_pool else lambda output: visual._global_pool(output)[0]
        image_points["pooled"] = visual.ln_post, pooled
    return Anatomy(
        blocks=list(visual.transformer.resblocks), n_prefix=1, has_cls=True, image_points=image_points,
        absent={"pooled": "its attention pool has no such output; take the projection"}, width=visual.transformer.width,
        patch_size=tuple(visual.patch_size), batch_first=getattr(visual.transformer, "batch_first", True),
    )  # fmt: skip


def _itself(output: Tensor) -> Tensor:
    return output


# --- timm ---


def _load_timm(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Tower:
    import timm

    match = re.fullmatch(r"((?:hf-hub:|local-dir:)?[^:]+)(?::(.+))?", name)
    require(match is not None, f"{spec}: not of the form timm:NAME[:FILE]")
    architecture, file = match.groups()  # type: ignore[union-attr]
    if file is not None:
        require(
            Path(file).is_file() and Path(file).suffix in _WEIGHT_FILES,
            f"{spec}: no such weights file ({', '.join(_WEIGHT_FILES)}): {file}",
        )
        return wrap_timm(_timm_from_file(architecture, file, spec), spec, device)
    if architecture.startswith("hf-hub:"):
        announce_download(spec, on_message)
    elif not architecture.startswith("local-dir:"):
        return wrap_timm(_timm_released(architecture, spec, on_message), spec, device)
    return wrap_timm(timm.create_model(architecture, pretrained=True, num_classes=0), spec, device)


def _timm_released(architecture: str, spec: str, on_message: Callable[[str], None]) -> nn.Module:
    """With timm's own weights: their file if it is in the cache, else downloaded."""
    import timm

    require(timm.is_model(architecture), f"{spec}: timm has no model {architecture}")
    config: Any = timm.get_pretrained_cfg(architecture)
    require(config.has_weights, f"{spec}: timm has no weights for {architecture}; give {OFFLINE['timm']}")
    repo = config.hf_hub_id or ""
    cached = _cached_file(repo, ["model.safetensors", "pytorch_model.bin"]) if repo else None
    if cached is None:
        announce_download(spec, on_message)
    overlay = None if cached is None else {"file": cached}
    return timm.create_model(architecture, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)


def _timm_from_file(architecture: str, file: str, spec: str) -> nn.Module:
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
    from timm.data import create_transform, resolve_model_data_config

    anatomy = _timm_anatomy(model, spec)
    settings = resolve_model_data_config(model)
    preprocess, normalisation = compose_preprocess(create_transform(**settings, is_training=False), spec)
    anatomy.description = _described("timm", timm.__version__, "create_transform", settings)
    return Tower(spec, model, anatomy, preprocess, normalisation, device)


def _timm_anatomy(model: Any, spec: str) -> Anatomy:
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
        image_points={"pooled": (model, _itself)},
        absent={"projection": "timm's models have no projection; pooled is their image vector"},
        width=getattr(model, "embed_dim", None),
    )
