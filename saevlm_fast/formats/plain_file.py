"""The plain form in one safetensors file: tensors by their names here, the rest as JSON in the file's metadata."""

import json
from pathlib import Path
from typing import Any

from saevlm_fast.errors import require
from saevlm_fast.files import save_safetensors_atomic
from saevlm_fast.formats.plain import PARAMETERS, PlainSAE
from saevlm_fast.formats.source import Source, floats
from saevlm_fast.records import NUMBER, RECORD, TEXT, Each, Fields, Kind, check_record, optional, parse_json, whole

NAME, FILES = "safetensors", "sae.safetensors as `convert --to safetensors` writes it"
WEIGHTS, KEY = "sae.safetensors", "saevlm_fast_plain"
_SIZE = whole(1, (1 << 31) - 1)


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: value in names)


_REST = Fields(
    {"activation": _one_of("relu", "topk", "jumprelu", "batch_topk")},
    {
        "k": optional(_SIZE),
        "input_norm": _one_of("none", "layer_norm", "token_norm"),
        "eps": NUMBER,
        "group_sizes": Each(_SIZE),
        "metadata": RECORD,
        "doubts": Each(TEXT),
    },
    others=False,
)


def detect(source: Source) -> bool:
    """From the metadata in the header of the only safetensors file."""
    name = source.only(".safetensors")
    return name is not None and KEY in source.header_metadata(name)


def read(source: Source) -> PlainSAE:
    """As it was written. ValueError: a damaged file."""
    name = source.only(".safetensors") or WEIGHTS
    path = source.at(name)
    text = source.header_metadata(name).get(KEY)
    require(text is not None, f"{path}: safetensors: its header has no entry {KEY}, which `convert` writes")
    assert text is not None
    rest: dict[str, Any] = parse_json(text.encode(), path)
    check_record(rest, _REST, path, ValueError)
    shapes: dict[str, tuple[int | str, ...]] = {
        "W_enc": ("d_in", "d_sae"),
        "b_enc": ("d_sae",),
        "W_dec": ("d_sae", "d_in"),
        "b_dec": ("d_in",),
    }
    tensors = source.load(name)
    if "threshold" in tensors:
        shapes["threshold"] = ("d_sae",) if rest["activation"] == "jumprelu" else ()
    rest |= {key: tuple(rest[key]) for key in ("group_sizes", "doubts") if key in rest}
    groups = sum(rest.get("group_sizes", ()))
    weights: dict[str, Any] = floats(tensors, path, **shapes)
    plain = PlainSAE(**weights, **rest)
    require(groups in (0, plain.d_sae), f"{path}: group_sizes sum to {groups}, not to d_sae = {plain.d_sae}")
    return plain


def lost(plain: PlainSAE) -> list[str]:
    """Nothing."""
    return []


def write(plain: PlainSAE, directory: Path) -> None:
    """Writes sae.safetensors, atomically."""
    names = [name for name in (*PARAMETERS, "threshold") if getattr(plain, name) is not None]
    tensors = {name: getattr(plain, name).contiguous() for name in names}
    rest = {
        "activation": plain.activation,
        "k": plain.k,
        "input_norm": plain.input_norm,
        "eps": plain.eps,
        "group_sizes": list(plain.group_sizes),
        "metadata": dict(plain.metadata),
        "doubts": list(plain.doubts),
    }
    save_safetensors_atomic(directory / WEIGHTS, tensors, {KEY: json.dumps(rest, allow_nan=False)})
