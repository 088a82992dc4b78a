"""dictionary_learning, and sae-for-vlm, made of it: trainer_<i>/{config.json, ae.pt}, checkpoints/ae_<n>.pt."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saevlm_fast.errors import did_you_mean, require
from saevlm_fast.files import atomic_write
from saevlm_fast.formats.pickles import state_dict
from saevlm_fast.formats.plain import Activation, PlainSAE, float32_at_least, gated
from saevlm_fast.formats.single_file import HOW
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import RECORD, TEXT, Each, Fields, Kind, check_record, optional, whole

NAME = "dictionary_learning"
FILES = "config.json with trainer.dict_class, and ae.pt (or checkpoints/ae_<n>.pt below config.json)"
CONFIG, WEIGHTS = "config.json", "ae.pt"
_SIZE = whole(1, (1 << 31) - 1)
_LAYER = Kind("a whole number, a string or null", lambda value: value is None or isinstance(value, int | str))
_CONFIG = Fields({"trainer": RECORD}, {"metadata": optional(RECORD), "doubts": Each(TEXT)})
_TRAINER = Fields(
    {"dict_class": TEXT},
    {
        "activation_dim": optional(_SIZE),
        "dict_size": optional(_SIZE),
        "k": optional(_SIZE),
        "lm_name": optional(TEXT),
        "submodule_name": optional(TEXT),
        "layer": _LAYER,
    },
)
Shapes = dict[str, tuple[int | str, ...]]
_LINEAR: Shapes = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "decoder.weight": ("d_in", "d_sae"),
}
_MATRICES: Shapes = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}


class _Class(NamedTuple):
    """One of their classes: its tensors, which of them is b_dec, and its activation."""

    tensors: Shapes
    b_dec: str
    activation: Activation
    pre_bias: bool = True


_GATED: Shapes = {
    "encoder.weight": ("d_sae", "d_in"),
    "decoder.weight": ("d_in", "d_sae"),
    "decoder_bias": ("d_in",),
    **{name: ("d_sae",) for name in ("r_mag", "gate_bias", "mag_bias")},
}
_CLASSES = {
    "AutoEncoder": _Class(_LINEAR | {"bias": ("d_in",)}, "bias", "relu"),
    "AutoEncoderNew": _Class(_LINEAR | {"decoder.bias": ("d_in",)}, "decoder.bias", "relu", pre_bias=False),
    "GatedAutoEncoder": _Class(_GATED, "decoder_bias", "jumprelu"),
    "JumpReluAutoEncoder": _Class(_MATRICES | {"threshold": ("d_sae",)}, "b_dec", "jumprelu", pre_bias=False),
    "AutoEncoderTopK": _Class(_LINEAR | {"b_dec": ("d_in",)}, "b_dec", "topk"),
    "BatchTopKSAE": _Class(_LINEAR | {"b_dec": ("d_in",)}, "b_dec", "batch_topk"),
    "MatryoshkaBatchTopKSAE": _Class(_MATRICES, "b_dec", "batch_topk"),
}
_CLASSES["MatroyshkaBatchTopKSAE"] = _CLASSES["MatryoshkaBatchTopKSAE"]  # sae-for-vlm's spelling
# sae-for-vlm writes model and layer into names of folders alone:
# imagenet_train_activations_<model>_<layer>_<point>_<sae model>_<k>_x<expansion>/trainer_0
_FOLDER = re.compile(
    r"(?:.*_)?activations_(?P<model>.+)_(?P<layer>-?\d+)_(?P<point>post_projection|post_mlp_residual)_.*_x[\d.]+"
)


def detect(source: Source) -> bool:
    """config.json, here or a folder up, with trainer.dict_class; and a .pt file."""
    config = _config(source)
    trainer = None if config is None else config.get("trainer")
    return isinstance(trainer, dict) and "dict_class" in trainer and any(n.endswith(".pt") for n in source.names)


def has_tensors(names: set[str]) -> bool:
    """Whether a state dict without config.json has the names of one of their classes that its names tell."""
    telling = {"group_sizes", "threshold"} & names or "encoder.weight" in names
    return bool(telling) and any(known.tensors.keys() <= names for known in _CLASSES.values())


def _config(source: Source) -> dict[str, Any] | None:
    own = source.json(CONFIG)
    if own is not None:
        return own
    above = f"../{CONFIG}"
    try:
        config = source.json(above)
    except ValueError:  # the folder's above, which may be any program's
        return None
    if config is not None and "trainer" not in config:
        source.opened.discard(above)
        return None
    return config


def read(source: Source) -> PlainSAE:
    """The SAE of any of their classes, in raw units: factors that normalised inputs are folded when they save.

    Raises:
        ValueError: damaged files; a class that is none of an SAE; BatchTopK without threshold, where k is not known.
    """
    weights = _weights(source)
    path = source.at(weights)
    state = state_dict(source.load(weights), path)
    config = _config(source) or {"trainer": {"dict_class": _class_of(state, path, source)}}
    where = source.at(CONFIG if source.json(CONFIG) is not None else f"../{CONFIG}")
    check_record(config, _CONFIG, where, ValueError)
    trainer = config["trainer"]
    check_record(trainer, _TRAINER, f"{where}: trainer", ValueError)
    name = trainer["dict_class"]
    require(
        name in _CLASSES,
        f"{where}: dictionary_learning: dict_class {name!r} is not an SAE this engine has; it has "
        f"{', '.join(_CLASSES)}{did_you_mean(name, _CLASSES)}",
    )
    if "decoder" in state and "decoder.weight" not in state and isinstance(state["decoder"], Tensor):
        state["decoder.weight"] = state.pop("decoder").T  # the Triton TopK of July 2024 kept it [d_sae, d_in]
    known = _CLASSES[name]
    tensors = floats(state, path, **known.tensors)
    plain = _plain(known, tensors, _rest(known, state, tensors[known.b_dec], trainer, config, source, path))
    for key, size in (("activation_dim", plain.d_in), ("dict_size", plain.d_sae)):
        said = trainer.get(key)
        require(said in (None, size), f"{path}: {key} is {size}, but {where} says {said}")
    return plain if known.pre_bias else plain.without_pre_bias()


def _weights(source: Source) -> str:
    """The file of weights: the one that was named, or ae.pt, or the only one."""
    name = WEIGHTS if source.file is None and source.has(WEIGHTS) else source.only(".pt")
    found = ", ".join(each for each in source.names if each.endswith(".pt"))
    require(
        name is not None, f"{source.folder}: dictionary_learning: which of {found or 'no .pt files'}? Name the file"
    )
    assert name is not None
    return name


def _class_of(state: dict[str, Any], path: Path, source: Source) -> str:
    """Of a state dict without config.json."""
    names = set(state)
    telling = {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew", "r_mag": "GatedAutoEncoder"}
    telling |= {"group_sizes": "MatryoshkaBatchTopKSAE"}
    found = next((name for tensor, name in telling.items() if tensor in names), None)
    if found is None and {"W_enc", "threshold"} <= names:
        found = "JumpReluAutoEncoder"
    if found is None and "encoder.weight" in names:
        said = source.assumed("activation")
        message = f"{path}: dictionary_learning: without {CONFIG} it is not known whether its k is of a row or a batch"
        require(said in ("topk", "batch_topk"), f"{message}: say activation, topk or batch_topk {HOW}")
        found = "AutoEncoderTopK" if said == "topk" else "BatchTopKSAE"
    message = f"{path}: dictionary_learning: no class of it has these tensors: {', '.join(sorted(map(str, names)))}"
    require(found is not None, message)
    return str(found)


def _rest(
    known: _Class,
    state: dict[str, Any],
    like: Tensor,
    trainer: dict[str, Any],
    config: dict[str, Any],
    source: Source,
    path: Path,
) -> dict[str, Any]:
    """Fields of PlainSAE but for weights."""
    rest: dict[str, Any] = {
        "activation": known.activation,
        "metadata": dict(config.get("metadata") or _metadata(trainer, source)),
        "doubts": tuple(config.get("doubts") or ()),
    }
    if known.activation not in ("topk", "batch_topk"):
        return rest
    k = _number(state, "k", path)
    rest["k"] = trainer.get("k") if k is None else int(k)
    groups = state.get("group_sizes")
    if isinstance(groups, Tensor):
        whole = not groups.is_floating_point() and groups.dim() == 1 and len(groups) <= len(state["b_enc"])
        require(whole, f"{path}: group_sizes of shape {tuple(groups.shape)} and {groups.dtype} are not sizes of groups")
        rest["group_sizes"] = tuple(int(size) for size in groups)
        fits = min(rest["group_sizes"], default=0) >= 1 and sum(rest["group_sizes"]) == len(state["b_enc"])
        require(fits, f"{path}: group_sizes {rest['group_sizes']} do not sum to d_sae = {len(state['b_enc'])}")
    if known.activation == "topk":
        rest["k"] = source.assumed_k() if rest["k"] is None else rest["k"]
        require(rest["k"] is not None, f"{path}: dictionary_learning: neither it nor {CONFIG} says k: say k {HOW}")
        return rest
    threshold = _number(state, "threshold", path)
    if threshold is None or threshold < 0:
        return rest | _uncalibrated(rest, like, source, path)
    return rest | {"threshold": torch.tensor(threshold, dtype=float32_at_least(like.dtype))}


def _uncalibrated(rest: dict[str, Any], like: Tensor, source: Source, path: Path) -> dict[str, Any]:
    """A BatchTopK SAE of a checkpoint before thresholds were kept, or before one was measured (-1)."""
    said = source.assumed_number("threshold")
    if said is not None:
        require(said >= 0, f"assume: threshold is {said:g}; it must not be negative")
        return {"threshold": torch.tensor(said, dtype=float32_at_least(like.dtype))}
    k = source.assumed_k() if rest["k"] is None else rest["k"]
    message = f"{path}: dictionary_learning: no threshold was measured, and k is not known: say k {HOW}"
    require(k is not None, message)
    doubt = f"no threshold was measured in training; the {k} largest of each row are kept instead of those above one"
    return {"activation": "topk", "k": k, "doubts": (*rest["doubts"], f"{path}: {doubt}")}


def _number(state: dict[str, Any], name: str, path: Path) -> float | None:
    value = state.get(name)
    if value is None:
        return None
    require(isinstance(value, Tensor | int | float), f"{path}: {name} is a {type(value).__name__}, no number")
    require(not isinstance(value, Tensor) or value.numel() == 1, f"{path}: {name} has more than one number")
    number = float(value)
    require(number == number and abs(number) != float("inf"), f"{path}: {name} is {number}")
    require(name != "k" or (number >= 1 and number == int(number)), f"{path}: k is {number:g}; it must be at least 1")
    return number


def _plain(known: _Class, tensors: dict[str, Tensor], rest: dict[str, Any]) -> PlainSAE:
    by_linear = "encoder.weight" in tensors
    W_enc = tensors["encoder.weight"].T if by_linear else tensors["W_enc"]
    W_dec = tensors["decoder.weight"].T if by_linear else tensors["W_dec"]
    if "r_mag" in tensors:
        W_enc, b_enc, rest["threshold"] = gated(W_enc, tensors["gate_bias"], tensors["mag_bias"], tensors["r_mag"])
    else:
        b_enc = tensors["encoder.bias" if by_linear else "b_enc"]
    if "threshold" in tensors:
        rest["threshold"] = tensors["threshold"].clamp(min=0)
    return PlainSAE(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=tensors[known.b_dec], **rest)


def _metadata(trainer: dict[str, Any], source: Source) -> dict[str, Any]:
    found = {"model": trainer.get("lm_name"), "layer": trainer.get("layer"), "hook": trainer.get("submodule_name")}
    names = [each.name for each in (source.folder.resolve(), *source.folder.resolve().parents[:3])]
    place = next((match for name in names if (match := _FOLDER.fullmatch(name)) is not None), None)
    if place is not None:
        found |= {"model": place["model"], "layer": int(place["layer"]), "hook": place["point"]}
    kept = {name: value for name, value in found.items() if value not in (None, "")}
    small = ("trainer_class", "dict_class", "lr", "steps", "seed", "l1_penalty", "target_l0", "auxk_alpha", "k")
    config = {name: trainer[name] for name in small if isinstance(trainer.get(name), int | float | str)}
    return kept | {"source_format": NAME, "source_config": config}


# Writing --------------------------------------------------------------------------------------------------------------

_WRITTEN = {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}


def lost(plain: PlainSAE) -> list[str]:
    """What its own reader does not get from the files. ValueError: an SAE that the library cannot have."""
    none = f"dictionary_learning: has no input_norm, and the SAE's is {plain.input_norm}"
    require(plain.input_norm == "none", none)
    found = []
    if plain.W_enc.dtype == torch.float64:
        found.append("float64 weights are rounded to float32")
    if plain.activation == "batch_topk" and plain.k is None:
        found.append("k is not known, which the library needs; 1 is written, and the threshold says what fires")
    norm_S = plain.W_dec.double().norm(dim=1)
    if plain.activation == "relu" and not torch.allclose(norm_S, torch.ones_like(norm_S), atol=1e-5):
        found.append("norms of decoder rows, and with them the scale of latents: the library makes them 1 as it reads")
    if plain.activation in ("relu", "topk", "jumprelu") and len(plain.group_sizes) > 1:
        found.append(f"group sizes of a {plain.activation} SAE")
    return found


def write(plain: PlainSAE, directory: Path) -> None:
    """Writes config.json and ae.pt, float32, each atomically; what the library drops stands under "metadata"."""
    nested = plain.activation == "batch_topk" and len(plain.group_sizes) > 1
    flat = "MatryoshkaBatchTopKSAE" if nested else "BatchTopKSAE"
    name = _WRITTEN.get(plain.activation, flat)
    with atomic_write(directory / WEIGHTS) as temporary:
        torch.save(_state(plain, name), temporary)
    metadata = plain.metadata
    trainer = {
        "trainer_class": "saevlm_fast",
        "dict_class": name,
        "activation_dim": plain.d_in,
        "dict_size": plain.d_sae,
        "k": plain.k or (1 if plain.activation == "batch_topk" else None),
        "layer": metadata.get("layer"),
        "lm_name": str(metadata.get("model") or ""),
        "submodule_name": str(metadata.get("hook") or ""),
        **({"group_sizes": list(plain.group_sizes)} if nested else {}),
    }
    document = {"trainer": trainer, "buffer": {}, "metadata": dict(metadata), "doubts": list(plain.doubts)}
    with atomic_write(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _state(plain: PlainSAE, name: str) -> dict[str, Tensor]:
    def as_float32(tensor: Tensor) -> Tensor:
        return tensor.float().contiguous()

    b_enc = plain.b_enc if _CLASSES[name].pre_bias else plain.encoder_bias_without_pre_bias()
    if "encoder.weight" in _CLASSES[name].tensors:
        state = {
            "encoder.weight": as_float32(plain.W_enc.T),
            "encoder.bias": as_float32(b_enc),
            "decoder.weight": as_float32(plain.W_dec.T),
            _CLASSES[name].b_dec: as_float32(plain.b_dec),
        }
    else:
        weights = {"W_enc": plain.W_enc, "b_enc": b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
        state = {key: as_float32(tensor) for key, tensor in weights.items()}
    if plain.activation == "jumprelu":
        assert plain.threshold is not None
        return state | {"threshold": as_float32(plain.threshold)}
    if plain.activation != "relu":
        threshold = torch.tensor(-1.0) if plain.threshold is None else plain.threshold.float()
        state |= {"k": torch.tensor(plain.k or 1, dtype=torch.int32), "threshold": threshold.clone()}
    if name == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor(plain.group_sizes)
    return state
