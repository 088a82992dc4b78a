"""EleutherAI's sparsify: RUN/HOOKPOINT/{cfg.json, sae.safetensors}."""

import json
import re
from pathlib import Path
from typing import Any

from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write, save_safetensors_atomic
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import FLAG, NUMBER, RECORD, TEXT, Each, Fields, check_record, whole

NAME, FILES = "sparsify", "cfg.json and sae.safetensors"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_RUN = "../config.json"
_SIZE = whole(0, (1 << 31) - 1)
_CONFIG = Fields(
    {"d_in": _SIZE},
    {
        "activation": TEXT,
        "expansion_factor": NUMBER,
        "num_latents": _SIZE,
        "k": _SIZE,
        "skip_connection": FLAG,
        "transcode": FLAG,
        "signed": FLAG,
        "multi_topk": FLAG,
        "metadata": RECORD,
        "doubts": Each(TEXT),
    },
)


def detect(source: Source) -> bool:
    """From the names of its files."""
    return source.has(CONFIG, WEIGHTS)


def read(source: Source) -> PlainSAE:
    """TopK: relu, then the k largest of a row, of an encoder with pre-bias.

    Raises:
        ValueError: damaged files; a transcoder, signed or groupmax SAE.
    """
    cfg: dict[str, Any] = source.json(CONFIG) or {}
    where = source.at(CONFIG)
    require(source.has(CONFIG, WEIGHTS), f"{where}: sparsify: it, or {WEIGHTS} beside it, is not there")
    check_record(cfg, _CONFIG, where, ValueError)
    for key, why in (
        ("transcode", "a transcoder, whose output is another site than its input"),
        ("skip_connection", "a transcoder with a skip connection"),
        ("signed", "a top k by absolute value without relu, whose latents are negative too"),
    ):
        require(not cfg.get(key, False), f"{where}: sparsify: {key} is true: {why}; it is not an SAE this engine has")
    _refuse_old_transcoder(source, cfg)
    activation = cfg.get("activation", "topk")
    require(activation == "topk", f"{where}: sparsify: activation {activation!r} is not supported, only 'topk'")
    # Shapes against the header, before the weights are read.
    d_in, d_sae = cfg["d_in"], cfg.get("num_latents", 0) or int(cfg["d_in"] * cfg.get("expansion_factor", 32))
    shapes = source.shapes(WEIGHTS)
    require("W_skip" not in shapes, f"{source.at(WEIGHTS)}: sparsify: holds W_skip: a transcoder, not an SAE")
    expected: dict[str, tuple[int | str, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    for name, shape in expected.items():
        found = shapes.get(name, shape)
        require(found == shape, f"{source.at(WEIGHTS)}: {name} has shape {found}, expected {shape}")
    tensors = floats(source.load(WEIGHTS), source.at(WEIGHTS), **expected)
    return PlainSAE(
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation="topk",
        k=cfg.get("k", 32),
        metadata=cfg["metadata"] if "metadata" in cfg else _metadata(source, cfg),
        doubts=tuple(cfg.get("doubts", ())),
    )


def _refuse_old_transcoder(source: Source, cfg: dict[str, Any]) -> None:
    """Before February 2025 the run's config.json alone said so, under its root or under "sae"."""
    run = _run(source)
    inner = run.get("sae")
    inside = inner.get("transcode") if isinstance(inner, dict) else None
    old = "transcode" not in cfg and True in (run.get("transcode"), inside)
    why = "transcode is true: a transcoder, whose output is another site than its input"
    require(not old, f"{source.at(_RUN)}: sparsify: {why}; it is not an SAE this engine has")


def _run(source: Source) -> dict[str, Any]:
    """config.json of the run, a folder up; {} where there is none, or another program's."""
    try:
        run = source.json(_RUN) or {}
    except ValueError:
        return {}
    source.opened.discard(_RUN)  # it says nothing of the weights
    return run


def _metadata(source: Source, cfg: dict[str, Any]) -> dict[str, Any]:
    hook = source.folder.resolve().name
    layer = re.search(r"(?:layers?|blocks?|h)[._](\d+)", hook)
    known = {} if layer is None else {"layer": int(layer[1])}
    run = _run(source)
    known |= {"model": run["model"]} if isinstance(run.get("model"), str) else {}
    small = {name: value for name, value in cfg.items() if isinstance(value, int | float | str)}
    return known | {"source_format": NAME, "hook": hook, "source_config": small}


# Writing --------------------------------------------------------------------------------------------------------------


def lost(plain: PlainSAE) -> list[str]:
    """What its own reader does not get from the files. ValueError: an SAE that the library cannot have."""
    require(plain.input_norm == "none", f"sparsify: has no input_norm, and the SAE's is {plain.input_norm}")
    has = plain.activation in ("topk", "batch_topk")
    require(has, f"sparsify: its only activation is topk, and the SAE is a {plain.activation} one")
    require(plain.k is not None, "k: not known, which a topk SAE needs")
    found = []
    if plain.activation == "batch_topk":
        found.append(f"the threshold: the {plain.k} largest of each row are kept instead of those above it")
    if len(plain.group_sizes) > 1:
        found.append("sizes of groups")
    return found


def write(plain: PlainSAE, directory: Path) -> None:
    """Writes cfg.json and sae.safetensors, each atomically, the weights first."""
    tensors = {
        "encoder.weight": plain.W_enc.T.contiguous(),
        "encoder.bias": plain.b_enc.contiguous(),
        "W_dec": plain.W_dec.contiguous(),
        "b_dec": plain.b_dec.contiguous(),
    }
    save_safetensors_atomic(directory / WEIGHTS, tensors)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, plain.d_sae // plain.d_in),
        "normalize_decoder": False,
        "num_latents": plain.d_sae,
        "k": plain.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": plain.d_in,
        "metadata": dict(plain.metadata),
        "doubts": list(plain.doubts),
    }
    with atomic_write(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(cfg, indent=2, allow_nan=False) + "\n", encoding="utf-8")
