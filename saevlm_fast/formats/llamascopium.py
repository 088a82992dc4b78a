"""Llamascopium (config.json, sae_weights.*) and what it was before, lm-saes and Llama Scope (hyperparams.json).

    h = (x s) W_E + b_E        z = act(h m) / m        x_hat = (z W_D + b_D) / s

m is the norm of a latent's row of W_D (1 without sparsity_include_decoder_norm), s = sqrt(d_in) / the norm of inputs in
the data (dataset-wise), / |x| (token-wise), or 1 (inference). Latents are brought to units of x: z / s. The library's
own fold of s forgets the thresholds, so files that went through it and jump are marked.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.formats.plain import InputNorm, PlainSAE
from saevlm_fast.formats.single_file import HOW, json_only, refuse, tensors_of, wide
from saevlm_fast.formats.source import Source
from saevlm_fast.records import FLAG, NUMBER, RECORD, TEXT, Fields, check_record, optional, whole

NAME, OLD_NAME = "Llamascopium", "lm-saes"
FILES = "config.json with sae_type, and sae_weights.safetensors or sae_weights.pt"
OLD_FILES = "hyperparams.json, and checkpoints/final.safetensors or sae_weights.safetensors"
CONFIG, OLD_CONFIG = "config.json", "hyperparams.json"
Shapes = dict[str, tuple[int | str, ...]]
_WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt")
_OLD_WEIGHTS = (
    *_WEIGHTS,
    "checkpoints/pruned.safetensors",
    "checkpoints/pruned.pt",
    "checkpoints/final.safetensors",
    "checkpoints/final.pt",
)
_SHARDED = ("sae_weights.dcp", "checkpoints/pruned.dcp", "checkpoints/final.dcp")
_SIZE = whole(1, (1 << 31) - 1)
_CONFIG = Fields(
    {"d_model": _SIZE},
    {
        "sae_type": TEXT,
        "expansion_factor": NUMBER,
        "use_decoder_bias": FLAG,
        "act_fn": TEXT,
        "norm_activation": optional(TEXT),
        "sparsity_include_decoder_norm": FLAG,
        "top_k": optional(_SIZE),
        "use_glu_encoder": FLAG,
        "hook_point_in": optional(TEXT),
        "hook_point_out": optional(TEXT),
        "jump_relu_threshold": optional(NUMBER),
        "apply_decoder_bias_to_pre_encoder": FLAG,
        "dataset_average_activation_norm": optional(RECORD),
    },
)
_NORM_KEY, _LOG = "dataset_average_activation_norm.", "log_jumprelu_threshold"
_SMALLEST_NORM = 1e-6  # norms that were never measured are stored as whatever was in memory, 1e-35 or so
_WAS_FOLDED = (
    "norm_activation is inference: if the library folded a dataset's norm into it, it left thresholds as they were"
)


def detect(source: Source) -> bool:
    """Settings with sae_type, beside sae_weights.* without the older names of tensors."""
    config = source.json(CONFIG) or {}
    if "sae_type" not in config:
        return False
    name = _file(source, _WEIGHTS)
    return (name is not None and "encoder.weight" not in _tensors(source, name)) or _sharded(source) is not None


def detect_old(source: Source) -> bool:
    """hyperparams.json beside weights; or config.json beside weights with the old names of tensors."""
    if (source.json(OLD_CONFIG) or {}).get("d_model") is not None:
        return _file(source, _OLD_WEIGHTS) is not None or _sharded(source) is not None
    config = source.json(CONFIG) or {}
    name = _file(source, _WEIGHTS) if "d_model" in config else None
    return name is not None and "encoder.weight" in _tensors(source, name)


def read(source: Source) -> PlainSAE:
    """relu, jumprelu and topk SAEs of every kind of norm but per batch; a batch top-k with a threshold from the user.

    Raises:
        ValueError: damaged files; transcoders, GLU encoders, sharded files, norms that were never measured.
    """
    config = source.json(CONFIG) or {}
    where = _checked(config, source, NAME, CONFIG)
    kind = config.get("sae_type", "sae")
    refuse(kind != "sae", where, NAME, f"sae_type {kind!r} is not 'sae'")
    name = _file(source, _WEIGHTS)
    refuse(name is None, where, NAME, f"none of {', '.join(_WEIGHTS)} is beside it")
    assert name is not None
    found, where = _tensors(source, name), source.at(name)
    refuse("W_E_glu" in found, where, NAME, "a GLU encoder, whose latents are products of two")
    d_in = config["d_model"]
    shapes: Shapes = {"W_E": (d_in, "d_sae"), "b_E": ("d_sae",), "W_D": ("d_sae", d_in)}
    has_bias = config.get("use_decoder_bias", True)
    tensors = wide(found, where, **shapes, **({"b_D": (d_in,)} if has_bias else {}))
    log = f"activation_function.{_LOG}"
    threshold = wide(found, where, **{log: ("d_sae",)})[log].exp() if config.get("act_fn") == "jumprelu" else None
    linear = PlainSAE(
        W_enc=tensors["W_E"],
        b_enc=tensors["b_E"],
        W_dec=tensors["W_D"],
        b_dec=tensors["b_D"] if has_bias else torch.zeros_like(tensors["W_D"][0]),
        activation="relu",
        metadata=_metadata(config, "llamascopium"),
    )
    return _read(linear, threshold, found, config, source)


def _read(
    linear: PlainSAE, threshold: Tensor | None, found: Mapping[str, Any], config: Mapping[str, Any], source: Source
) -> PlainSAE:
    """The SAE of weights as stored, whose thresholds are in units of normalised inputs."""
    where, norm = source.at(CONFIG), config.get("norm_activation") or "dataset-wise"
    linear = replace(linear, input_norm=_input_norm(norm, where)).without_pre_bias()
    plain = _activated(linear, threshold, config, source)
    if norm == "dataset-wise":
        measured = _norm(found, config, "in", where)
        return plain.of_raw_input(0.0, _scale(measured, linear.d_in, where), keep_latents=False)
    return plain.assumed(_WAS_FOLDED) if norm == "inference" and threshold is not None else plain


def _activated(linear: PlainSAE, threshold: Tensor | None, config: Mapping[str, Any], source: Source) -> PlainSAE:
    """The linear part with its activation, on latents times the norms of their rows if the settings say so."""
    where, activation = source.at(CONFIG), str(config.get("act_fn", "relu"))
    norms = config.get("sparsity_include_decoder_norm", True)
    known = activation in ("relu", "jumprelu", "topk", "batchtopk")
    refuse(not known, where, NAME, f"act_fn {activation!r} is none of relu, jumprelu, topk, batchtopk")
    silent = int((linear.W_dec.norm(dim=1) == 0).sum()) if norms and activation != "relu" else 0
    refuse(silent > 0, where, NAME, f"{silent} rows of W_D are zero, and latents are compared in units of their norms")
    if activation == "relu":
        return linear
    k = config.get("top_k") or 50
    if activation == "topk":
        plain = replace(linear, activation="topk", k=k)
        return plain.scaled_by_decoder_norms() if norms else plain
    if activation == "batchtopk":
        given = source.assumed_number("threshold")
        why = (
            "act_fn batchtopk keeps the k largest of a batch, and no threshold is stored: say threshold, as calibrated "
            f"there (of normalised inputs, times the norms of rows) {HOW}"
        )
        refuse(given is None, where, NAME, why)
        plain = replace(linear, activation="batch_topk", k=k, threshold=torch.tensor(given, dtype=linear.W_enc.dtype))
        return plain.scaled_by_decoder_norms() if norms else plain
    plain = replace(linear, activation="jumprelu", threshold=threshold)
    return plain.threshold_on_scaled_latents() if norms else plain


def read_old(source: Source) -> PlainSAE:
    """lm-saes of 2024 and 2025, Llama Scope: relu, topk, and jumprelu of one threshold, or of one a latent.

    Raises:
        ValueError: as `read`.
    """
    settings = OLD_CONFIG if source.at(OLD_CONFIG).is_file() else CONFIG
    config = source.json(settings) or {}
    where = _checked(config, source, OLD_NAME, settings)
    name = _file(source, _OLD_WEIGHTS)
    refuse(name is None, where, OLD_NAME, f"none of {', '.join(_OLD_WEIGHTS)} is beside it")
    assert name is not None
    found, where, d_in = _tensors(source, name), source.at(name), config["d_model"]
    glu = any("glu" in key for key in found)
    refuse(glu, where, OLD_NAME, "a GLU encoder, whose latents are products of two")
    linear = _old_linear(found, where, config)
    linear = replace(linear, metadata=_metadata(config, "lm_saes"))
    if _LOG in found:
        return _read(linear, wide(found, where, **{_LOG: ("d_sae",)})[_LOG].exp(), found, config, source)
    norm = config.get("norm_activation") or "inference"
    s_in = s_out = 1.0
    if norm == "dataset-wise":
        s_in, s_out = (_scale(_norm(found, config, end, where), d_in, where) for end in ("in", "out"))
    plain = replace(
        linear,
        b_enc=(linear.b_enc.double() / s_in).to(linear.b_enc.dtype),
        W_dec=(linear.W_dec.double() * (s_in / s_out)).to(linear.W_dec.dtype),
        b_dec=(linear.b_dec.double() / s_out).to(linear.b_dec.dtype),
        input_norm=_input_norm(norm, where),
    )
    if config.get("sparsity_include_decoder_norm", True):
        plain = plain.scaled_by_decoder_norms()
    if not config.get("apply_decoder_bias_to_pre_encoder", False):
        plain = plain.without_pre_bias()
    return _old_activated(plain, config, where)


def _old_activated(plain: PlainSAE, config: Mapping[str, Any], where: Path) -> PlainSAE:
    """One threshold for all latents, in units of x already."""
    activation, threshold = str(config.get("act_fn", "relu")), float(config.get("jump_relu_threshold") or 0.0)
    if activation == "jumprelu" or (activation == "topk" and threshold > 0):
        by_token = plain.input_norm != "none"
        refuse(by_token, where, OLD_NAME, "a threshold in units of x beside inputs that are normalised one by one")
        threshold_S = torch.full_like(plain.b_enc, threshold)
        return replace(plain, activation="jumprelu", threshold=threshold_S)
    if activation == "topk":
        return replace(plain, activation="topk", k=config.get("top_k") or 50)
    refuse(activation != "relu", where, OLD_NAME, f"act_fn {activation!r} is none of relu, jumprelu, topk")
    return plain


def _old_linear(found: Mapping[str, Any], where: Path, config: Mapping[str, Any]) -> PlainSAE:
    """W, b as stored, with relu; masks and scales of latents (until 2024) folded, masked ones silenced."""
    d_in, has_bias = config["d_model"], config.get("use_decoder_bias", True)
    is_bare = "encoder" in found
    encoder: Shapes = (
        {"encoder": (d_in, "d_sae"), "encoder_bias": ("d_sae",)}
        if is_bare
        else {"encoder.weight": ("d_sae", d_in), "encoder.bias": ("d_sae",)}
    )
    decoder: Shapes = {"decoder": ("d_sae", d_in)} if is_bare else {"decoder.weight": (d_in, "d_sae")}
    bias: Shapes = {"decoder_bias" if is_bare else "decoder.bias": (d_in,)} if has_bias else {}
    extra: Shapes = {key: ("d_sae",) for key in ("feature_act_mask", "feature_act_scale") if key in found}
    W_enc, b_enc, W_dec, *rest = wide(found, where, **encoder, **decoder, **bias, **extra).values()
    W_enc, W_dec = (W_enc, W_dec) if is_bare else (W_enc.T, W_dec.T)
    b_dec = rest.pop(0) if has_bias else torch.zeros_like(W_dec[0])
    plain = PlainSAE(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation="relu")
    if not rest:
        return plain
    factor_S = torch.stack(rest).double().prod(0)
    dead_S = factor_S == 0
    silenced = replace(plain, W_enc=plain.W_enc.masked_fill(dead_S, 0.0), b_enc=plain.b_enc.masked_fill(dead_S, -1.0))
    return silenced.with_scaled_latents(factor_S.masked_fill(dead_S, 1.0))


def _checked(config: Mapping[str, Any], source: Source, name: str, settings: str) -> Path:
    """The settings' path, after checks of what both kinds refuse."""
    where = source.at(settings)
    refuse(not source.has(settings), where, name, "no such file")
    check_record(dict(config), _CONFIG, where, ValueError)
    sharded = _sharded(source)
    only = sharded is not None and _file(source, _OLD_WEIGHTS) is None
    refuse(only, where, name, f"{sharded} is sharded over machines: save it as sae_weights.safetensors")
    ends = config.get("hook_point_in"), config.get("hook_point_out")
    is_transcoder = ends[0] != ends[1] and None not in ends
    refuse(is_transcoder, where, name, f"a transcoder from {ends[0]} to {ends[1]}, not an SAE")
    refuse(bool(config.get("use_glu_encoder")), where, name, "a GLU encoder, whose latents are products of two")
    return where


def _input_norm(norm: str, where: Path) -> InputNorm:
    known = norm in ("dataset-wise", "token-wise", "inference")
    refuse(not known, where, NAME, f"norm_activation {norm!r} is none of dataset-wise, token-wise, inference")
    return "token_norm" if norm == "token-wise" else "none"


def _scale(norm: float, d_in: int, where: Path) -> float:
    measured = math.isfinite(norm) and norm > _SMALLEST_NORM
    refuse(not measured, where, NAME, f"the norm of inputs in the data is {norm:.3g}: it was never measured")
    return math.sqrt(d_in) / norm


def _norm(found: Mapping[str, Any], config: Mapping[str, Any], end: str, where: Path) -> float:
    """The norm of inputs ("in") or outputs: a tensor named after the hook, or, in older files, in the settings."""
    hook = config.get(f"hook_point_{end}")
    key = f"{_NORM_KEY}{hook}"
    if key in found:
        return wide(found, where, **{key: ()})[key].item()
    norms = config.get("dataset_average_activation_norm") or {}
    value = norms.get(end, norms.get(hook))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    refuse(not is_number, where, NAME, f"no {_NORM_KEY}{hook}, and inputs were divided by it")
    return float(value or 0)


def _tensors(source: Source, name: str) -> dict[str, Any]:
    value = source.load(name)
    require(isinstance(value, dict), f"{source.at(name)}: holds a {type(value).__name__}, no dict of tensors")
    return tensors_of(value)


def _file(source: Source, names: tuple[str, ...]) -> str | None:
    if source.file is not None:
        return source.file
    return next((name for name in names if source.at(name).is_file()), None)


def _sharded(source: Source) -> str | None:
    return next((name for name in _SHARDED if source.at(name).exists()), None)


def _metadata(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    hook = {"hook": config["hook_point_in"]} if isinstance(config.get("hook_point_in"), str) else {}
    return {"source_format": name, **hook, "source_config": json_only(config)}
