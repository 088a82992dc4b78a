"""EleutherAI's sparsify: RUN/HOOKPOINT/{cfg.json, sae.safetensors}."""

from typing import Any

from saevlm_fast.errors import require
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import FLAG, NUMBER, TEXT, Fields, check_record, whole

NAME, FILES = "sparsify", "cfg.json and sae.safetensors"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
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
    check_record(cfg, _CONFIG, where, ValueError)
    for key, why in (
        ("transcode", "a transcoder, whose output is another site than its input"),
        ("skip_connection", "a transcoder with a skip connection"),
        ("signed", "a top k by absolute value without relu, whose latents are negative too"),
    ):
        require(not cfg.get(key, False), f"{where}: sparsify: {key} is true: {why}; it is not an SAE this engine has")
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
        metadata={"source_format": "sparsify", "hook": source.folder.resolve().name, "source_config": cfg},
    )
