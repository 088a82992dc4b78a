"""VISAEBench: CONFIG/{sae.pt, config.json or config.yaml}; of standardised inputs, (x - mean) / std.

    z = act(relu(x W_enc + b_enc))        x_hat = z W_dec (+ b_dec)

Statistics of inputs are not in the files: the benchmark measures them on its own data. The user says them, as
input_mean and input_std, and they are folded; 0 and 1 say that inputs are standardised before this SAE sees them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from saevlm_fast.errors import first_line, require
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.single_file import HOW, json_only, refuse, tensors_of
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import NUMBER, TEXT, Fields, check_record, optional, whole

NAME = "VISAEBench"
FILES = "config.json or config.yaml with k or threshold, and sae.pt"
_CONFIGS, _WEIGHTS = ("config.json", "config.yaml", "config.yml"), ("sae.pt", "model.safetensors", "model.pt")
_SIMPLE, _LIBRARY = "encoder.weight", "encoder.final_block.0.weight"
_SIZE = whole(1, (1 << 31) - 1)
_CONFIG = Fields(
    {},
    {
        "activation": TEXT,
        "sae_type": TEXT,
        "architecture": TEXT,
        "k": optional(_SIZE),
        "threshold": optional(NUMBER),
        "input_dim": _SIZE,
        "d_model": _SIZE,
        "hidden_dim": _SIZE,
        "dict_size": _SIZE,
    },
)
_MOST_YAML = 1 << 20  # bytes of a config.yaml
_STATISTICS = (
    "inputs were standardised, (x - mean) / std, and the files do not hold mean and std: say input_mean (a file, or a "
    "number) and input_std (a number), as measured on the model's activations, or 0 and 1 if yours are "
    f"standardised {HOW}"
)
Activation = Literal["topk", "batch_topk", "jumprelu"]


def detect(source: Source) -> bool:
    """From the keys of its settings, and the names of its tensors."""
    name = _weights(source)
    config = None if name is None else _config(source)
    if name is None or config is None or not {"k", "threshold"} & config.keys():
        return False
    shapes = source.shapes(name)
    return bool({_SIMPLE, _LIBRARY} & shapes.keys())


def read(source: Source) -> PlainSAE:
    """topk, batch top-k with its threshold, jumprelu.

    Raises:
        ValueError: damaged files; another activation; a decoder of d_sae = d_in; statistics of inputs that are missing.
    """
    config, name = _config(source) or {}, _weights(source) or "sae.pt"
    where = source.at(name)
    check_record(config, _CONFIG, source.folder / "config", ValueError)
    needs = source.assumed("input_mean") is None and source.assumed("input_std") is None
    refuse(needs, where, NAME, _STATISTICS)
    value = source.load(name)
    require(isinstance(value, dict), f"{where}: holds a {type(value).__name__}, no dict of tensors")
    found = tensors_of(value)
    d_in = config.get("input_dim", config.get("d_model", "d_in"))
    d_sae = config.get("hidden_dim", config.get("dict_size", "d_sae"))
    shapes: dict[str, tuple[int | str, ...]] = {"weight": (d_sae, d_in), "bias": (d_sae,)}
    of_library = _SIMPLE not in found
    prefix = "encoder.final_block.0." if of_library else "encoder."
    tensors = floats(found, where, **{prefix + key: shape for key, shape in shapes.items()})
    W_enc, b_enc = tensors[f"{prefix}weight"].float().T, tensors[f"{prefix}bias"].float()
    W_dec, b_dec, doubts = _decoder(found, source, tuple(W_enc.T.shape), of_library)
    activation, k, threshold, more = _activation(found, config, source, len(b_enc))
    plain = PlainSAE(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=activation,
        k=k,
        threshold=threshold,
        metadata=_metadata(config),
        doubts=(*doubts, *more),
    ).without_pre_bias()
    return plain.with_inclusive_threshold() if activation == "batch_topk" else plain


def _decoder(
    found: Mapping[str, Any], source: Source, shape: tuple[int, ...], of_library: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """(W_dec, b_dec, doubts); decoder.weight is [d_sae, d_in] here, as no other library has it."""
    where, (d_sae, d_in) = source.at(_weights(source) or ""), shape
    if of_library:
        # No row is normalised here, as the library that trained it would.
        names: dict[str, tuple[int | str, ...]] = {"dictionary._weights": (d_sae, d_in)}
        multiplier = "dictionary.multiplier"
        tensors = floats(found, where, **names, **({multiplier: ()} if multiplier in found else {}))
        factor = tensors[multiplier].exp() if multiplier in tensors else 1.0
        return (tensors["dictionary._weights"] * factor).float(), torch.zeros(d_in), ()
    square = f"decoder.weight is {d_sae} by {d_in}: whether rows are latents (VISAEBench) or inputs (torch.nn.Linear)"
    refuse(d_sae == d_in, where, NAME, f"{square} cannot be told")
    given = found.get("decoder.weight")
    turned = isinstance(given, Tensor) and tuple(given.shape) == (d_in, d_sae)
    W_dec = floats(found, where, **{"decoder.weight": (d_in, d_sae) if turned else (d_sae, d_in)})["decoder.weight"]
    bias = "decoder.bias"
    b_dec = floats(found, where, **{bias: (d_in,)})[bias].float() if bias in found else torch.zeros(d_in)
    doubt = "decoder.weight is [d_in, d_sae], as of torch.nn.Linear, and is turned; VISAEBench itself cannot use it"
    return (W_dec.T if turned else W_dec).float(), b_dec, (doubt,) if turned else ()


def _activation(
    found: Mapping[str, Any], config: Mapping[str, Any], source: Source, d_sae: int
) -> tuple[Activation, int | None, Tensor | None, tuple[str, ...]]:
    """(activation, k, threshold, doubts)."""
    where = source.at(_weights(source) or "")
    named = str(config.get("activation", config.get("sae_type", config.get("architecture", "topk")))).lower()
    k = config.get("k")
    if named == "topk":
        refuse(k is None, where, NAME, "settings hold no k, which topk needs")
        return "topk", k, None, ()
    if named == "batchtopk":
        threshold = config.get("threshold")
        if threshold is None and "_running_threshold" in found:
            threshold = float(floats(found, where, _running_threshold=())["_running_threshold"])
        missing = "no threshold in the files: taken as 0, as VISAEBench does, which is a relu"
        return "batch_topk", k, torch.tensor(float(threshold or 0.0)), () if threshold is not None else (missing,)
    refuse(named != "jumprelu", where, NAME, f"activation {named!r} is none of topk, batchtopk, jumprelu")
    key = next((key for key in ("jump_thresholds", "thresholds") if key in found), None)
    if key is None:
        constant = torch.full((d_sae,), 0.01)
        return "jumprelu", k, constant, ("no thresholds in the file: 0.01 everywhere, as VISAEBench takes it",)
    threshold_S = floats(found, where, **{key: (d_sae,)})[key].float()
    is_log = bool((threshold_S < 0).any())
    doubt = f"{key} holds negative values: overcomplete saves logarithms, and VISAEBench takes them as they are"
    return "jumprelu", k, threshold_S, (doubt,) if is_log else ()


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    model = {"model": config["backbone"]} if isinstance(config.get("backbone"), str) else {}
    return {"source_format": "visaebench", **model, "source_config": json_only(config)}


def _weights(source: Source) -> str | None:
    if source.file is not None:
        return source.file if source.file.endswith((".pt", ".safetensors")) else None
    return next((name for name in _WEIGHTS if source.has(name)), None)


def _config(source: Source) -> dict[str, Any] | None:
    """The settings beside the weights, JSON or YAML; None without them, or where they are no flat object."""
    name = next((name for name in _CONFIGS if source.has(name)), None)
    if name is None or name.endswith(".json"):
        return None if name is None else source.json(name)
    path = source.at(name)
    require(path.stat().st_size <= _MOST_YAML, f"{path}: larger than {_MOST_YAML} bytes")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML ({first_line(error)})") from None
    source.opened.add(name)
    return value if isinstance(value, dict) else None
