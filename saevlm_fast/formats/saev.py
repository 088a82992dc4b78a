"""OSU-NLP-Group/saev: one file, a line of JSON and a state dict behind it; the head of March 2026 and all before it."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saevlm_fast import __version__
from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write
from saevlm_fast.formats.pickles import state_dict
from saevlm_fast.formats.plain import Activation, PlainSAE
from saevlm_fast.formats.single_file import NEGATIVES
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import RECORD, TEXT, Fields, check_record, object_of, optional, parse_json, whole

NAME, FILES = "saev", "sae.pt that begins with a line of JSON"
WEIGHTS = "sae.pt"
SCHEMA = 5  # that is written
_LONGEST = 1 << 20  # bytes of the line
_SIZE = whole(1, (1 << 31) - 1)
_HEADER = Fields({}, {"schema": whole(1), "cls": TEXT, "cfg": RECORD})
_CFG = Fields({}, {name: _SIZE for name in ("d_vit", "d_model", "exp_factor", "d_sae", "top_k")})
_CFG_ACTIVATION = Fields({"cls": TEXT}, {"params": Fields({}, {"top_k": optional(_SIZE)})})
_DEFAULT_K = 32
_ACTIVATIONS: dict[str, Activation] = {"Relu": "relu", "TopK": "topk", "BatchTopK": "batch_topk"}


def detect(source: Source) -> bool:
    """A .pt file whose first byte is {: one of torch is a zip or a pickle."""
    name = _file(source)
    return name is not None and source.start(name, 1) == b"{"


def _file(source: Source) -> str | None:
    return WEIGHTS if source.file is None and source.has(WEIGHTS) else source.only(".pt")


def read(source: Source) -> PlainSAE:
    """The SAE of a file of any schema.

    Raises:
        ValueError: a damaged file, an activation that no SAE of ours has.
    """
    name = _file(source) or WEIGHTS
    path = source.at(name)
    header, size = _header(path)
    source.opened.add(name)
    check_record(header, _HEADER, path, ValueError)
    schema = header.get("schema", 0)
    require(schema <= SCHEMA, f"{path}: saev: schema {schema} is newer than {SCHEMA}, the last one known")
    cfg = header.get("cfg", {}) if schema else header
    check_record(cfg, _CFG, f"{path}: cfg", ValueError)
    activation, k = _activation(header, cfg, schema, path)
    state = state_dict(source.load(name, skip=size), path)
    tensors = floats(state, path, W_enc=("d_in", "d_sae"), b_enc=("d_sae",), W_dec=("d_sae", "d_in"), b_dec=("d_in",))
    said = cfg.get("d_model", cfg.get("d_vit"))
    d_in = len(tensors["b_dec"])
    require(said in (None, d_in), f"{path}: W_enc has d_in = {d_in}, but its first line says {said}")
    threshold: Tensor | None = None
    if activation == "batch_topk" and "activation.threshold" in state:
        threshold = floats(state, path, **{"activation.threshold": ()})["activation.threshold"].clamp(min=0)
    if activation == "batch_topk" and threshold is None:  # until November 2025 it took the k largest of a row
        activation = "topk"
    pre_bias = schema == 0 or (schema == 1 and header.get("cls") in _ACTIVATIONS)
    plain = PlainSAE(
        **tensors,  # type: ignore[arg-type]
        activation=activation,
        k=k,
        threshold=threshold,
        metadata=_metadata(source, header, schema),
        doubts=_doubts(source, header, schema, path, activation),
    )
    return plain if pre_bias else plain.without_pre_bias()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The first line, and its length."""
    with open(path, "rb") as file:
        line = file.readline(_LONGEST + 1)
    message = f"{path}: saev: its first line does not end within {_LONGEST} bytes"
    require(line.endswith(b"\n") and len(line) <= _LONGEST, message)
    header = parse_json(line, path)
    require(isinstance(header, dict), f"{path}: saev: its first line is no JSON object")
    return header, len(line)


def _activation(header: dict[str, Any], cfg: dict[str, Any], schema: int, path: Path) -> tuple[Activation, int | None]:
    named, k = "Relu", cfg.get("top_k")
    if schema == 1 and header.get("cls", "SparseAutoencoderConfig") != "SparseAutoencoderConfig":
        named = header["cls"]
    elif schema >= 1:
        stored: dict[str, Any] = cfg.get("activation") or {}
        check_record(stored, _CFG_ACTIVATION, f"{path}: cfg.activation", ValueError)
        named, k = stored["cls"], stored.get("params", {}).get("top_k")
    known = ", ".join(_ACTIVATIONS)
    require(named in _ACTIVATIONS, f"{path}: saev: activation {named!r} is not one of {known}, which this engine has")
    activation = _ACTIVATIONS[named]
    return activation, None if activation == "relu" else k or _DEFAULT_K


def _doubts(source: Source, header: dict[str, Any], schema: int, path: Path, activation: Activation) -> tuple[str, ...]:
    config, data = _training(source)
    doubts = []
    if schema == 2 and "atryoshka" in json.dumps([header, config]):
        doubts.append("Matryoshka SAEs of schema 2 were trained with a pre-bias and evaluated without; this is without")
    scaled = [name for name in ("scale_mean", "scale_norm") if data.get(name, schema == 0)]
    if scaled and schema <= 2 and not source.says("input_mean", "input_std"):
        doubts.append(
            f"it was trained on (x - mean) / s ({', '.join(scaled)}), and its files do not have mean and s: raw inputs "
            "are assumed; s is the mean of |x - mean| / sqrt(d_in), give both by assume: input_mean, input_std"
        )
    told = tuple(f"{path}: {doubt}" for doubt in doubts)
    return (*told, NEGATIVES) if activation == "topk" else told


def _training(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says of the training run, and of its data."""
    config = source.json("config.json") or {}
    return config, object_of(config.get("data"))


def _metadata(source: Source, header: dict[str, Any], schema: int) -> dict[str, Any]:
    data = _training(source)[1]
    found = {"layer": data.get("layer"), "tokens": data.get("patches")}
    kept = {name: value for name, value in found.items() if isinstance(value, int | str)}
    small = {name: value for name, value in header.items() if isinstance(value, int | float | str)}
    return kept | {"source_format": NAME, "source_config": small | {"schema": schema}}


# Writing --------------------------------------------------------------------------------------------------------------


def lost(plain: PlainSAE) -> list[str]:
    """What its own reader does not get from the file. ValueError: an SAE that the library cannot have."""
    require(plain.input_norm == "none", f"saev: has no input_norm, and the SAE's is {plain.input_norm}")
    require(plain.activation != "jumprelu", "saev: has no thresholds for single latents, as a jumprelu SAE has")
    message = "threshold: not calibrated; saev takes that for relu"
    require(plain.activation != "batch_topk" or plain.threshold is not None, message)
    found = []
    if plain.W_enc.dtype == torch.float64:
        found.append("float64 weights are rounded to float32")
    if plain.activation == "topk":
        found.append(f"relu: where fewer than {plain.k} latents of a row are positive, saev keeps negative ones")
    if plain.activation == "batch_topk" and plain.k is None:
        found.append("k is not known, which the library needs; 1 is written, and the threshold says what fires")
    if len(plain.group_sizes) > 1:
        found.append("sizes of groups")
    if plain.metadata or plain.doubts:
        found.append("metadata")
    return found


def write(plain: PlainSAE, directory: Path) -> None:
    """Writes sae.pt of schema 5, float32, atomically."""
    named = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == plain.activation)
    activation = {"cls": named, "params": {} if named == "Relu" else {"top_k": plain.k or 1}}
    cfg = {
        "d_model": plain.d_in,
        "d_sae": plain.d_sae,
        "activation": activation,
        "reinit_blend": 0.8,
        "reinit_enc_dec_tranpose": True,
        "remove_parallel_grads": True,
        "normalize_w_dec": False,  # it would be done when the library makes the module, before it loads
    }
    header = {"schema": SCHEMA, "cfg": cfg, "commit": "unknown", "lib": f"saevlm-fast {__version__}"}
    state = {
        "W_enc": plain.W_enc,
        "b_enc": plain.encoder_bias_without_pre_bias(),
        "W_dec": plain.W_dec,
        "b_dec": plain.b_dec,
    }
    if plain.threshold is not None:
        state["activation.threshold"] = plain.threshold
    buffer = io.BytesIO()
    torch.save({name: tensor.float().contiguous() for name, tensor in state.items()}, buffer)
    with atomic_write(directory / WEIGHTS) as temporary:
        temporary.write_bytes(json.dumps(header, allow_nan=False).encode() + b"\n" + buffer.getbuffer())
