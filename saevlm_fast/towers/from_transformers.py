"""Towers of transformers: CLIP, SigLIP(2), DINOv2 and 3, ViT, and the vision part of a LLaVA."""

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saevlm_fast.errors import require
from saevlm_fast.towers.families import check_called, check_read, most_tokens, special, tower_prefix, vision_class
from saevlm_fast.towers.hub import local_or_hub, weight_names
from saevlm_fast.towers.preprocess import described, transformers_preprocess
from saevlm_fast.towers.tower import Anatomy, Tower

# What processors say of images beside their pixels; a model is given what its forward has an argument for.
_BESIDE = (
    *("pixel_attention_mask", "spatial_shapes", "image_sizes", "image_grid_thw"),
    *("aspect_ratio_ids", "aspect_ratio_mask"),
)


def load_transformers(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Tower:
    return local_or_hub(name, spec, lambda source, local: _from_pretrained(source, spec, device, local), on_message)


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
    where = "local-dir" if Path(name).is_dir() else "hf-hub"
    require(config.model_type != "timm_wrapper", f"{spec}: a checkpoint of timm; give timm:{where}:{name}")
    check_read(vision, spec)
    name_of_class = type(vision).__name__.removesuffix("Config") + "Model"
    plain = vision_class(vision)
    require(plain is not None, f"{spec}: transformers has no vision model by itself for {type(vision).__name__}")
    prefix = rf"(?:model\.)?(?:{tower_prefix(vision)})\."
    tried, options = set[str](), dict[str, bool]()
    projecting = getattr(transformers, name_of_class + "WithProjection", None)
    model_class = plain
    if projecting is not None and hasattr(config, "projection_dim"):
        model_class, vision.projection_dim = projecting, config.projection_dim
    while True:
        with without_load_report():
            model, info = model_class.from_pretrained(
                name,
                config=vision,
                local_files_only=local,
                dtype=torch.float32,
                weights_only=True,
                key_mapping={f"^{prefix}": ""},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused here, by name
                **options,
            )
        check_sizes(info, spec)
        missing, unused = sorted(info["missing_keys"]), info["unexpected_keys"]
        names = {name for name, _ in model.named_parameters()}
        if not missing:
            check_unused(names, unused, spec)
            check_once(names, weight_names(name), prefix, spec)
            return model
        if (found := prefix_in_file(names, missing, unused, spec)) and found not in tried:
            tried.add(prefix := found)
            continue
        head = {key.split(".")[0] for key in missing}
        if "visual_projection" in head:
            model_class = plain  # if more is missing, it is missing there too
        elif head == {"pooler"} and not options:
            options = {"add_pooling_layer": False}
        elif head == {"head"} and getattr(vision, "vision_use_head", False):
            vision.vision_use_head = False
        else:
            near = difflib.get_close_matches(missing[0], unused, n=1, cutoff=0.9)
            instead = f", in whose place the file has {near[0]}" if near else ""
            raise ValueError(
                f"{spec}: {len(missing)} weights of {model_class.__name__} are missing, as {missing[0]}{instead}"
            )


def prefix_in_file(names: Collection[str], missing: Collection[str], unused: Collection[str], spec: str) -> str | None:
    """What the model's weights are called in front of their names in the file; a pattern, None if nothing.

    Most of the model's must be called so, and more than have been found without: a tower that lacks a pooler is not the
    text tower that has one.

    Args:
        names: of the model's weights. missing: those not found yet. unused: in the file, and none of the model's.

    Raises:
        ValueError: the file holds two towers of the same kind, or other weights of the same names.
    """
    found = Counter[str]()
    for name in unused:
        parts = name.split(".")
        found.update(".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[n:]) in names)
    ranked = found.most_common(2)
    loaded = set(names) - set(missing)
    if not ranked or ranked[0][1] <= max(len(loaded), len(names) / 2):
        return None
    several = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    require(not several, f"{spec}: the file holds two towers of this kind, {' and '.join(name for name, _ in ranked)}")
    prefix = ranked[0][0] + "."
    # Of two weights that come to one name transformers takes the other's, in silence.
    twice = sorted(name for name in loaded if prefix + name in unused)
    for name in twice:
        raise ValueError(f"{spec}: the file holds {len(twice)} weights twice, as {name} and {prefix}{name}")
    return re.escape(prefix)


def check_once(names: Collection[str], in_files: Collection[str], prefix: str, spec: str) -> None:
    """ValueError: the files hold a weight of the model behind the prefix, a pattern, and without it: transformers takes
    one of them, in silence."""
    bare = {re.sub(f"^{prefix}", "", name): name for name in in_files if re.match(prefix, name)}
    found = set(in_files) & bare.keys()
    twice = sorted(each for each in found if any(each == name or each.endswith(f".{name}") for name in names))
    for name in twice:
        raise ValueError(f"{spec}: the file holds {len(twice)} weights twice, as {name} and {bare[name]}")


def check_unused(names: Collection[str], unused: Iterable[str], spec: str) -> None:
    """ValueError: the file has more of a layer than the model: weights of LoRA that are not merged, scales of
    quantised weights, a bias that the configuration does not know."""
    for name in sorted(unused):
        parts = name.split(".")
        more = any(".".join([*parts[:n], "weight"]) in names for n in range(1, len(parts)))
        require(not more, f"{spec}: {name} of the weights file belongs to a layer that has no such weight here")


def check_sizes(info: Any, spec: str) -> None:
    """Of a loading that ignores them. ValueError: weights of another shape than the configuration says."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{spec}: {name} is {list(found)} in the weights file, but {list(expected)} by config.json"
            f" ({len(info['mismatched_keys'])} of another shape)"
        )


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

    anatomy = transformers_anatomy(model, spec)
    anatomy.most_tokens = most_tokens(model, processor)
    preprocess, normalisation = transformers_preprocess(processor, spec, anatomy.beside)
    anatomy.description = described(
        "transformers", transformers.__version__, type(processor).__name__, processor.to_dict()
    )
    return Tower(spec, model, anatomy, preprocess, normalisation, device)


def transformers_anatomy(model: Any, spec: str) -> Anatomy:
    config = model.config
    # A token of a pooling head (AIMv2's) bears the same name.
    added = {name.split(".")[-1] for name, _ in model.named_parameters() if "embeddings" in name.split(".")}
    has_cls = bool(added & {"cls_token", "class_embedding"})
    patch = getattr(config, "patch_size", None)
    fields: dict[str, Any] = {
        "n_prefix": has_cls + ("distillation_token" in added) + getattr(config, "num_register_tokens", 0),
        "has_cls": has_cls,
        "image_points": _image_points(model, has_cls),
        "absent": {
            "projection": f"{type(model).__name__} has no projection",
            "pooled": "its checkpoint has no pooling head, and there is no CLS token",
        },
        "width": getattr(config, "hidden_size", None),
        "patch_size": (patch, patch) if isinstance(patch, int) else patch,
        "beside": [name for name in _BESIDE if name in inspect.signature(model.forward).parameters],
        "call": lambda model, inputs: model(**inputs),
    }
    fields |= (own := special(model))
    if "call" not in own:
        check_called(model, fields["beside"], spec)
    return Anatomy(**{"blocks": () if "blocks" in fields else _blocks(model, spec), **fields})


def _blocks(model: Any, spec: str) -> Sequence[nn.Module]:
    """The list as long as the configuration says; convolutional models have stages, but no single number of heads."""
    n_blocks = getattr(model.config, "num_hidden_layers", 0)
    if isinstance(getattr(model.config, "num_attention_heads", None), int):
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_blocks > 0:
                return list(module)
    raise ValueError(f"{spec}: {type(model).__name__} is not a vision transformer with a list of equal blocks")


def _image_points(model: Any, has_cls: bool) -> dict[str, tuple[nn.Module, Callable[[Any], Any]]]:
    """What the library itself calls the pooled output, which some models lack: set-up refuses it there.

    Two families say it otherwise. A ViT or DeiT without a pooler gives its classifier the normed CLS token. The pooling
    head of a SigLIP gives the space shared with text.
    """
    points: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {}
    family = model.config.model_type
    if hasattr(model, "visual_projection"):
        points["projection"] = model, lambda output: output.image_embeds
        points["pooled"] = model.vision_model, _pooler_output
    elif family in ("siglip_vision_model", "siglip2_vision_model"):
        if hasattr(model, "head"):
            points["projection"] = points["pooled"] = model, _pooler_output
    elif family in ("vit", "deit") and has_cls and getattr(model, "pooler", None) is None:
        points["pooled"] = model, lambda output: output.last_hidden_state[:, 0]
    else:
        points["pooled"] = model, _pooler_output
    return points


def _pooler_output(output: Any) -> Any:
    return getattr(output, "pooler_output", None)


def vision_part(model: Any) -> nn.Module:
    """The outermost module whose configuration is the model's vision_config; the model itself if it has none.

    Raises:
        ValueError: a vision_config of which no part is.
    """
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return model
    for module in model.modules():
        if type(getattr(module, "config", None)) is type(vision):
            return module
    raise ValueError(f"model: {type(model).__name__} has no part for its {type(vision).__name__}")
