"""What readers of one file of tensors share: the file, the dict of tensors in it, and settings beside it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.formats.plain import float32_at_least
from saevlm_fast.formats.source import Source, floats

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_INSIDE = ("model_state_dict", "state_dict", "model", "sae")
HOW = "(assume= in Python; saevlm-fast convert SOURCE OUTPUT --assume KEY=VALUE)"  # to say what files do not
NEGATIVES = (
    "the library keeps negative values among the k largest, here they are 0: rows differ that have fewer than k above 0"
)


def weights(source: Source, *suffixes: str) -> str | None:
    """The name of the one file of tensors (of torch.save or safetensors, or with these suffixes); None without one."""
    return source.only(*(suffixes or (*PICKLES, ".safetensors")))


def loaded(source: Source, *suffixes: str) -> dict[str, Any]:
    """What that file holds; {} if there is no such file, or it holds no dict.

    Raises:
        ValueError: it cannot be read as data alone.
    """
    name = weights(source, *suffixes)
    value = None if name is None else source.load(name)
    return value if isinstance(value, dict) else {}


def tensors_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """The dict of tensors in a checkpoint: under one of the usual keys, or itself."""
    if any(isinstance(each, Tensor) for each in value.values()):
        inner = next((value[key] for key in _INSIDE if _has_tensors(value.get(key))), None)
        return dict(value if inner is None else inner)
    return dict(next((value[key] for key in _INSIDE if isinstance(value.get(key), Mapping)), value))


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def wide(tensors: Mapping[str, Any], where: Path, **shapes: tuple[int | str, ...]) -> dict[str, Tensor]:
    """As source.floats, in float32 at least: for readers that change weights, which are then rounded once, to that."""
    found = floats(tensors, where, **shapes)
    return {name: tensor.to(float32_at_least(tensor.dtype)) for name, tensor in found.items()}


def json_only(settings: Mapping[str, Any], depth: int = 2) -> dict[str, Any]:
    """The part of settings that is JSON: numbers, texts, flags, short lists, dicts of them, `depth` deep at most."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and depth > 1:
            kept[str(key)] = json_only(value, depth - 1)
        elif value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            kept[str(key)] = value
        elif isinstance(value, list | tuple) and len(value) <= 100 and all(isinstance(v, str | int) for v in value):
            kept[str(key)] = list(value)
    return kept


def refuse(condition: bool, where: Path, name: str, why: str) -> None:
    """ValueError(file: format: why) if the condition holds."""
    require(not condition, f"{where}: {name}: {why}")
