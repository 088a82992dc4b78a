"""Other releases of vision SAEs: CLIP-Scope, MSAE, clip-topk-sae, BatchTopK's reference code and its kin (MonoLoss).

The topk of the first three has no relu, except where its name says so.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.single_file import HOW, NEGATIVES, json_only, loaded, refuse, tensors_of, weights, wide
from saevlm_fast.formats.source import Source
from saevlm_fast.records import FLAG, TEXT, Fields, check_record, whole

CLIP_SCOPE_FILES = "one .pt with k and model_state_dict of pre_b, enc, dec"
MSAE_FILES = "F_d_ACTIVATION[_k][_UW|RW]_TIED_NORMALIZE_CAP_*.pt with model, mean_center, scaling_factor"
CLIP_TOPK_FILES = "config.json with input_dim, hidden_dim, k, and model.safetensors"
REFERENCE_FILES = "one .pt with model_state_dict and config of the BatchTopK reference code"
Shapes = dict[str, tuple[int | str, ...]]
_SAE: Shapes = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}
_SIZE = whole(1, (1 << 31) - 1)


# CLIP-Scope -----------------------------------------------------------------------------------------------------------


def detect_clip_scope(source: Source) -> bool:
    """From the names of its tensors."""
    return {"pre_b", "enc", "dec"} <= tensors_of(loaded(source)).keys()


def read_clip_scope(source: Source) -> PlainSAE:
    """topk of an encoder with pre-bias and no bias of its own.

    Raises:
        ValueError: damaged files; no k.
    """
    value, where = loaded(source), source.at(weights(source) or "")
    shapes: Shapes = {"pre_b": ("d_in",), "enc": ("d_in", "d_sae"), "dec": ("d_sae", "d_in")}
    tensors = wide(tensors_of(value), where, **shapes)
    k = source.assumed_k() or value.get("k")
    is_k = type(k) is int and k > 0
    refuse(not is_k, where, "CLIP-Scope", f"k is {k!r}; a whole number above 0 is needed")
    layer = re.fullmatch(r"(\d+)_resid", where.resolve().parent.name)
    return PlainSAE(
        W_enc=tensors["enc"],
        b_enc=torch.zeros_like(tensors["enc"][0]),
        W_dec=tensors["dec"],
        b_dec=tensors["pre_b"],
        activation="topk",
        k=k,
        metadata={"source_format": "clip_scope", **({"layer": int(layer[1]), "hook": "resid"} if layer else {})},
        doubts=(NEGATIVES,),
    )


# MSAE -----------------------------------------------------------------------------------------------------------------


def detect_msae(source: Source) -> bool:
    """From the names of its tensors."""
    return {"encoder", "pre_bias", "latent_bias"} <= tensors_of(loaded(source)).keys()


def read_msae(source: Source) -> PlainSAE:
    """ReLU, JumpReLU, TopK and TopKReLU without soft cap; inputs moved and scaled by the statistics of the file.

    Raises:
        ValueError: damaged files; soft caps, absolute and batch top-k; a file's name without its options.
    """
    value, where, name = loaded(source), source.at(weights(source) or ""), "MSAE"
    activation, k, tied, normalize, cap = _msae_options(source)
    refuse(cap > 0, where, name, f"latents are capped, {cap:g} tanh(z / {cap:g}), which no activation here does")
    found = tensors_of(value)
    shapes: Shapes = {"encoder": ("d_in", "d_sae"), "latent_bias": ("d_sae",), "pre_bias": ("d_in",)}
    tensors = wide(found, where, **shapes, **({} if tied else {"decoder": ("d_sae", "d_in")}))
    known = activation in ("ReLU", "JumpReLU", "TopK", "TopKReLU")
    refuse(not known, where, name, f"activation {activation!r} is none of ReLU, JumpReLU, TopK, TopKReLU")
    log = "activation.log_threshold"
    threshold = wide(found, where, **{log: ("d_sae",)})[log].exp() if activation == "JumpReLU" else None
    kind: Literal["topk", "relu", "jumprelu"] = (
        "topk" if "TopK" in activation else "jumprelu" if threshold is not None else "relu"
    )
    plain = PlainSAE(
        W_enc=tensors["encoder"],
        b_enc=tensors["latent_bias"],
        W_dec=tensors["encoder"].T.clone() if tied else tensors["decoder"],
        b_dec=tensors["pre_bias"],
        activation=kind,
        k=k,
        threshold=threshold,
        input_norm="layer_norm" if normalize else "none",
        metadata={"source_format": "msae", "source_config": {"name": where.name}},
        doubts=(NEGATIVES,) if activation == "TopK" else (),
    )
    return _of_centred_input(plain, value, source)


def _of_centred_input(plain: PlainSAE, value: Mapping[str, Any], source: Source) -> PlainSAE:
    """Undoes (x - mean_center) scaling_factor of the file."""
    where = source.at(weights(source) or "")
    mean, scale = (_numbers(value.get(key, default), key, where) for key, default in _MSAE_DEFAULTS.items())
    require(bool(scale.numel() == 1 and scale > 0), f"{where}: MSAE: scaling_factor must be one number above 0")
    require(
        mean.numel() in (1, plain.d_in), f"{where}: MSAE: mean_center has {mean.numel()} numbers, d_in is {plain.d_in}"
    )
    if plain.input_norm == "none":
        return plain.of_raw_input(mean.expand(plain.d_in) if mean.numel() == 1 else mean, scale.item())
    uniform = bool((mean == mean.flatten()[0]).all())
    refuse(not uniform, where, "MSAE", "a mean is subtracted before the layer norm, and no change of weights does that")
    # A layer norm takes no notice of a shift of all, nor of a scale, but for eps.
    return replace(plain, eps=plain.eps / scale.item())


_MSAE_DEFAULTS: dict[str, float] = {"mean_center": 0.0, "scaling_factor": 1.0}


def _numbers(value: Any, key: str, where: Path) -> Tensor:
    is_number = isinstance(value, int | float | Tensor)
    require(is_number, f"{where}: MSAE: {key} is a {type(value).__name__}, no number or tensor")
    numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
    require(bool(numbers.numel() and numbers.isfinite().all()), f"{where}: MSAE: {key} holds NaN, inf or nothing")
    return numbers


def _msae_options(source: Source) -> tuple[str, int | None, bool, bool, float]:
    """(activation, k, tied, normalize, cap) of the file's name, read as the library does."""
    where = source.at(weights(source) or "")
    parts = where.name.split(".pt")[0].split("_")[2:]
    try:
        activation = parts.pop(0)
        k = int(parts.pop(0)) if "TopK" in activation else None
        if activation == "ReLU":
            parts.pop(0)
        if "UW" in parts[0] or "RW" in parts[0]:
            parts.pop(0)
        tied, normalize, cap = parts[:3]
        return activation, k, tied != "False", normalize != "False", float(cap)
    except (IndexError, ValueError):
        options = "F_d_ACTIVATION[_k][_UW|RW]_TIED_NORMALIZE_CAP"
        raise ValueError(f"{where}: MSAE: the file's name holds its options, {options}; this one does not") from None


# clip-topk-sae --------------------------------------------------------------------------------------------------------

_CLIP_TOPK = Fields(
    {"input_dim": _SIZE, "hidden_dim": _SIZE, "k": _SIZE}, {"normalize_decoder": FLAG, "activation": TEXT}
)


def detect_clip_topk(source: Source) -> bool:
    """From the keys of its settings, and the names of its tensors."""
    config = source.json("config.json") or {}
    if not {"input_dim", "hidden_dim", "k"} <= config.keys() or not source.has("model.safetensors"):
        return False
    return _SAE.keys() <= source.shapes("model.safetensors").keys()


def read_clip_topk(source: Source) -> PlainSAE:
    """topk without pre-bias, rows of the decoder normalised where the settings say so (or nothing).

    Raises:
        ValueError: damaged files.
    """
    config = source.json("config.json") or {}
    check_record(config, _CLIP_TOPK, source.at("config.json"), ValueError)
    d_in, d_sae = config["input_dim"], config["hidden_dim"]
    sizes = {"d_in": d_in, "d_sae": d_sae}
    shapes: Shapes = {name: tuple(sizes[str(size)] for size in shape) for name, shape in _SAE.items()}
    where = source.at("model.safetensors")
    tensors: dict[str, Any] = wide(source.load("model.safetensors"), where, **shapes)
    if config.get("normalize_decoder", True):
        W_dec = tensors["W_dec"].double()
        tensors["W_dec"] = (W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)).to(tensors["W_dec"].dtype)
    plain = PlainSAE(
        **tensors,
        activation="topk",
        k=config["k"],
        metadata={"source_format": "clip_topk_sae", "source_config": json_only(config)},
        doubts=(NEGATIVES, "inputs are embeddings of unit norm, as of CLIP: nothing here normalises them"),
    )
    return plain.without_pre_bias()


# BatchTopK's reference code -------------------------------------------------------------------------------------------


def detect_reference(source: Source) -> bool:
    """A checkpoint {model_state_dict, config}, or a state dict beside config.json, with SAELens' names of tensors."""
    value = loaded(source)
    return {"W_enc", "W_dec", "b_dec"} <= tensors_of(value).keys() and _reference_config(value, source) is not None


def read_reference(source: Source) -> PlainSAE:
    """vanilla (relu), topk, jumprelu, and batch top-k with a threshold from the user.

    Raises:
        ValueError: damaged files; other kinds; a batch top-k without threshold.
    """
    value, where = loaded(source), source.at(weights(source) or "")
    config = _reference_config(value, source) or {}
    kind = _reference_kind(config, where)
    found = tensors_of(value)
    tensors = wide(found, where, **{key: shape for key, shape in _SAE.items() if key in found or key != "b_enc"})
    # The file holds b_enc whatever its kind, and these two do not add it, unless a later version says so.
    is_added = kind not in ("topk", "batch_topk") or config.get("use_encoder_bias") is True
    zero_S = torch.zeros_like(tensors["W_enc"][0])
    log = "jumprelu.log_threshold"
    threshold = wide(found, where, **{log: ("d_sae",)})[log].exp() if kind == "jumprelu" else None
    k = config.get("top_k") if kind in ("topk", "batch_topk") else None
    refuse(k is not None and not (type(k) is int and k > 0), where, _REFERENCE, f"top_k is {k!r}, no number above 0")
    if kind == "batch_topk":
        given = source.assumed_number("threshold")
        why = f"the k largest of a batch are kept, and no threshold is stored: say threshold, as calibrated {HOW}"
        refuse(given is None, where, _REFERENCE, why)
        threshold = torch.tensor(given, dtype=tensors["W_enc"].dtype)
    plain = PlainSAE(
        W_enc=tensors["W_enc"],
        b_enc=tensors.get("b_enc", zero_S) if is_added else zero_S,
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=kind,
        k=k,
        threshold=threshold,
        input_norm="layer_norm" if config.get("input_unit_norm") else "none",
        metadata=_reference_metadata(config),
    )
    # Its jumprelu subtracts b_dec only where a caller asks for it.
    return plain.without_pre_bias().assumed(_NO_PRE_BIAS) if kind == "jumprelu" else plain


_REFERENCE = "BatchTopK reference"
_NO_PRE_BIAS = "b_dec is not subtracted from inputs, which is the default of the code and nothing that the file says"
_REFERENCE_KINDS: dict[str, Any] = {
    "vanilla": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
}


def _reference_config(value: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """The settings: in the checkpoint, or beside it."""
    inside = value.get("config")
    config = dict(inside) if isinstance(inside, Mapping) else source.json("config.json") or {}
    is_ours = {"model_state_dict", "config"} <= value.keys() or {"act_size", "dict_size"} <= config.keys()
    return config if is_ours and isinstance(config.get("sae_type"), str) else None


def _reference_kind(config: Mapping[str, Any], where: Path) -> Any:
    said = str(config.get("sae_type")).lower()
    known = ", ".join(_REFERENCE_KINDS)
    refuse(said not in _REFERENCE_KINDS, where, _REFERENCE, f"sae_type {said!r} is none of {known}")
    activation = config.get("activation", "relu")
    refuse(activation != "relu", where, _REFERENCE, f"activation {activation!r} before the top k is not 'relu'")
    refuse(bool(config.get("tied_weights")), where, _REFERENCE, "tied_weights, which its published code does not have")
    return _REFERENCE_KINDS[said]


def _reference_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"model": "model_name", "layer": "layer", "hook": "hook_point"}
    said = {ours: config[theirs] for ours, theirs in keys.items() if isinstance(config.get(theirs), str | int)}
    return {"source_format": "batch_topk_reference", **said, "source_config": json_only(config)}
