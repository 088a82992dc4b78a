"""Gemma Scope 1 (params.npz) and 2 (safetensors): jumprelu without pre-bias."""

import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np
import torch

from saevlm_fast.errors import first_line, require
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.single_file import json_only, refuse, wide
from saevlm_fast.formats.source import Source

FILES = "params.npz; or safetensors with w_enc and threshold"
NPZ, CONFIG = "params.npz", "config.json"
_SHAPES: dict[str, tuple[int | str, ...]] = {
    "w_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "w_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
    "threshold": ("d_sae",),
}
_NOT_NPZ = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    SyntaxError,
)
_MOST = 100  # times, that compressed weights, which hardly shrink, are larger than in the file
_EMBEDDING = "in a folder `embedding`: taken as trained on x / sqrt(d_in), as SAELens does (b_dec stays as it is)"


def detect(source: Source) -> bool:
    """From the file's name, or those of its tensors."""
    if source.only(".npz") is not None:
        return source.file is not None or source.has(NPZ)
    name = source.only(".safetensors")
    return name is not None and {"w_enc", "threshold"} <= source.shapes(name).keys()


def read(source: Source) -> PlainSAE:
    """jumprelu, thresholds one a latent.

    Raises:
        ValueError: damaged files, arrays that need pickle; transcoders.
    """
    name = source.only(".npz") or source.only(".safetensors") or ""
    where = source.at(name)
    arrays = _arrays(source, name) if name.endswith(".npz") else source.load(name)
    config = (source.json(CONFIG) or {}) if source.has(CONFIG) else {}
    named = {str(key).lower(): value for key, value in arrays.items()}
    ends = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    is_skip = bool(config.get("affine_connection")) or "affine_skip_connection" in named
    is_transcoder = is_skip or (None not in ends and ends[0] != ends[1])
    refuse(is_transcoder, where, "Gemma Scope", "a transcoder, whose output is another site than its input")
    architecture = config.get("architecture", "jump_relu")
    refuse(architecture != "jump_relu", where, "Gemma Scope", f"architecture {architecture!r} is not 'jump_relu'")
    tensors = wide(named, where, **_SHAPES)
    is_embedding = "embedding" in where.resolve().parts
    if is_embedding:
        root = tensors["b_dec"].shape[0] ** 0.5
        tensors["w_enc"], tensors["w_dec"] = tensors["w_enc"] / root, tensors["w_dec"] * root
    plain = PlainSAE(
        W_enc=tensors["w_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["w_dec"],
        b_dec=tensors["b_dec"],
        activation="jumprelu",
        threshold=tensors["threshold"],
        metadata={"source_format": "gemma_scope", **_said(source, config)},
        doubts=(_EMBEDDING,) if is_embedding else (),
    )
    return plain.without_pre_bias()


def _arrays(source: Source, name: str) -> dict[str, torch.Tensor]:
    """The arrays of the file, none of which may be a pickle, nor much larger than the file."""
    try:
        with zipfile.ZipFile(source.at(name)) as archive:
            swollen = [
                each.filename for each in archive.infolist() if each.file_size > _MOST * each.compress_size + 4096
            ]
        require(not swollen, f"{', '.join(swollen)} would be more than {_MOST} times as large as in the file")
        with np.load(source.at(name), allow_pickle=False) as file:
            arrays: dict[str, Any] = {key: file[key] for key in file.files}
            source.opened.add(name)
    except _NOT_NPZ as error:
        raise ValueError(f"{source.at(name)}: not a complete npz file of plain arrays ({first_line(error)})") from None
    numeric = all(array.dtype.kind == "f" for array in arrays.values())
    require(numeric, f"{source.at(name)}: Gemma Scope: arrays must be floating point")
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}


def _said(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    hook = {"hook": config["hf_hook_point_in"]} if isinstance(config.get("hf_hook_point_in"), str) else {}
    model = {"model": config["model_name"]} if isinstance(config.get("model_name"), str) else {}
    parts = source.folder.resolve().parts[-3:]
    layer = next((part.split("_")[1] for part in parts if part.startswith("layer_")), "")
    number = {"layer": int(layer)} if layer.isdecimal() else {}
    return {**model, **number, **hook, "source_config": json_only(config)}
