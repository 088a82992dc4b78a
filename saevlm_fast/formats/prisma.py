"""ViT-Prisma: config.json and a state dict; and pickles of settings and a state dict: its own, PatchSAE's and kin's.

    h = (n(x) - b_dec) W_enc + b_enc        z = relu(h), of the k largest where it is a topk

n is layer_norm where the settings of a Prisma SAE do not name one (the default of its class), and nothing where they
say null, and in PatchSAE. Folder names contradict settings in published files: the settings hold.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.formats.pickles import Stub
from saevlm_fast.formats.plain import InputNorm, PlainSAE, gated
from saevlm_fast.formats.single_file import json_only, loaded, refuse, tensors_of, weights, wide
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import FLAG, RECORD, TEXT, Fields, check_record, optional, whole

FILES = "config.json (activation_fn_str, hook_point_layer) and one .pt; or a pickle {cfg, state_dict}"
CONFIG = "config.json"
_SUFFIXES = (".pt", ".pth", ".pkl")
_SIZE = whole(1, (1 << 31) - 1)
_CONFIG = Fields(
    {},
    {
        "architecture": TEXT,
        "activation_fn_str": TEXT,
        "activation_fn_kwargs": optional(RECORD),
        "normalize_activations": optional(TEXT),
        "d_in": _SIZE,
        "is_transcoder": FLAG,
        "gated_sae": FLAG,
    },
)
_NORMS: dict[str | None, InputNorm] = {
    None: "none",
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "token_norm",
}
_WEIGHTS = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}


def detect(source: Source) -> bool:
    """From the keys of config.json, or what the one pickle holds."""
    if weights(source, ".pkl.gz") is not None:
        return True
    config = source.json(CONFIG) or {}
    if "activation_fn_str" in config and "hook_point_layer" in config:
        return weights(source, *_SUFFIXES) is not None
    value = loaded(source, *_SUFFIXES)
    return _settings(value) is not None and _state(value) is not None


def read(source: Source) -> PlainSAE:
    """relu, topk and gated SAEs.

    Raises:
        ValueError: damaged files; transcoders, other activations and architectures, compressed pickles.
    """
    name = weights(source, *_SUFFIXES) or weights(source, ".pkl.gz") or ""
    where = source.at(name)
    refuse(name.endswith(".gz"), where, "Prisma, PatchSAE", "a compressed pickle; unpack it, and save it as a .pt file")
    value = loaded(source, *_SUFFIXES)
    settings, state = _settings(value), _state(value)
    if settings is None:
        settings = source.json(CONFIG)
        where = source.at(CONFIG)
    require(settings is not None, f"{where}: Prisma: no settings, neither {CONFIG} nor in the pickle")
    assert settings is not None
    found = tensors_of(value) if state is None else dict(state)
    if _is_patch_sae(settings):
        return _patch_sae(settings, found, source)
    return _prisma(settings, found, source)


def _prisma(settings: Mapping[str, Any], found: Mapping[str, Any], source: Source) -> PlainSAE:
    where, name = source.at(_file(source)), "Prisma"
    check_record(dict(settings), _CONFIG, where, ValueError)
    is_transcoder = bool(settings.get("is_transcoder")) or "b_dec_out" in found
    refuse(is_transcoder, where, name, "a transcoder, whose output is another site than its input")
    architecture = settings.get("architecture", "standard")
    known = architecture in ("standard", "gated")
    refuse(not known, where, name, f"architecture {architecture!r} is neither 'standard' nor 'gated'")
    activation = settings.get("activation_fn_str", "relu")
    is_exact = activation == "relu" or (activation == "topk" and architecture == "standard")
    refuse(not is_exact, where, name, f"activation_fn_str {activation!r} of a {architecture} SAE is not supported")
    norm = settings.get("normalize_activations", "layer_norm")
    refuse(
        norm not in _NORMS, where, name, f"normalize_activations {norm!r} is not one of {', '.join(map(str, _NORMS))}"
    )
    k = (settings.get("activation_fn_kwargs") or {}).get("k")
    is_k = activation != "topk" or (type(k) is int and k > 0)
    refuse(not is_k, where, name, f"activation_fn_kwargs.k is {k!r}; topk needs a whole number above 0")
    shared: dict[str, Any] = {
        "k": k if activation == "topk" else None,
        "input_norm": _NORMS[norm],
        "metadata": _metadata("prisma", settings),
    }
    d_in = settings.get("d_in", "d_in")
    if architecture == "gated":
        return _gated(found, source, d_in, shared)
    tensors: dict[str, Any] = floats(found, where, **_shapes(d_in))
    return PlainSAE(**tensors, activation=activation, **shared)


def _gated(found: Mapping[str, Any], source: Source, d_in: int | str, shared: dict[str, Any]) -> PlainSAE:
    """The unused b_enc of the file is left out."""
    shapes = {name: shape for name, shape in _shapes(d_in).items() if name != "b_enc"}
    gate: dict[str, tuple[int | str, ...]] = {name: ("d_sae",) for name in ("b_gate", "b_mag", "r_mag")}
    tensors = wide(found, source.at(_file(source)), **shapes, **gate)
    W_enc, b_enc, threshold = gated(tensors["W_enc"], tensors["b_gate"], tensors["b_mag"], tensors["r_mag"])
    return PlainSAE(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation="jumprelu",
        threshold=threshold,
        **shared,
    )


def _patch_sae(settings: Mapping[str, Any], found: Mapping[str, Any], source: Source) -> PlainSAE:
    where = source.at(_file(source))
    refuse(bool(settings.get("gated_sae")), where, "PatchSAE", "gated_sae is declared there, and was never made")
    tensors: dict[str, Any] = floats(found, where, **_shapes("d_in"))
    return PlainSAE(**tensors, activation="relu", metadata=_metadata("patch_sae", settings))


def _shapes(d_in: int | str) -> dict[str, tuple[int | str, ...]]:
    return {name: tuple(d_in if size == "d_in" else size for size in shape) for name, shape in _WEIGHTS.items()}


def _file(source: Source) -> str:
    return weights(source, *_SUFFIXES) or ""


def _metadata(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    layer = settings.get("hook_point_layer", settings.get("block_layer"))
    site = settings.get("layer_subtype", settings.get("module_name"))
    is_cls = settings.get("cls_token_only", settings.get("class_token"))
    tokens = "cls" if is_cls else "patches" if settings.get("use_patches_only") else "all"
    said = {"model": settings.get("model_name"), "layer": layer, "hook": site, "tokens": tokens}
    kept = json_only({key: value for key, value in said.items() if value is not None})
    return {"source_format": name, **kept, "source_config": json_only(settings)}


def _settings(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings in a pickle: the attributes of an object (a stub of ours), or a dict."""
    for key in ("cfg", "config"):
        found = value.get(key)
        if isinstance(found, Stub):
            return {**vars(found), "class of settings": type(found).__name__}
        if isinstance(found, Mapping):
            return dict(found)
    return None


def _state(value: Mapping[str, Any]) -> dict[str, Tensor] | None:
    inner = value.get("autoencoder")
    state = value.get("state_dict", inner.get("state_dict") if isinstance(inner, Mapping) else None)
    return dict(state) if isinstance(state, Mapping) else None


def _is_patch_sae(settings: Mapping[str, Any]) -> bool:
    return settings.get("class of settings") == "ViTSAERunnerConfig" or "block_layer" in settings
