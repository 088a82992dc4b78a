"""Releases of language models' SAEs, each of one kind of file: Goodfire, Qwen-Scope, DeepSeek-R1 l19.

None subtracts b_dec from inputs. Goodfire and DeepSeek: relu. Qwen-Scope: topk, with k only in the repository's name.
"""

import re
from typing import Any, Literal

from torch import Tensor

from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.single_file import HOW, loaded, refuse, tensors_of, weights, wide
from saevlm_fast.formats.source import Source

GOODFIRE_FILES = "one .pt or .pth with encoder_linear.weight and decoder_linear.weight"
QWEN_FILES = "layerN.sae.pt with W_enc [d_sae, d_in] and W_dec [d_in, d_sae]"
DEEPSEEK_FILES = "one .pt with encoder.weight, encoder.bias, decoder.weight, decoder.bias"
_QWEN_NAME = re.compile(r"layer(\d+)\.sae\.pt")
_QWEN_REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+)-W\d+K-L0_(?P<k>\d+)")
_DEEPSEEK_NAME = re.compile(r"-l(\d+)\.")


def detect_goodfire(source: Source) -> bool:
    """From the names of its tensors."""
    return {"encoder_linear.weight", "decoder_linear.weight"} <= tensors_of(loaded(source)).keys()


def read_goodfire(source: Source) -> PlainSAE:
    """relu.

    Raises:
        ValueError: damaged files.
    """
    return _linear(source, "encoder_linear", "decoder_linear", {"source_format": "goodfire"})


def detect_deepseek(source: Source) -> bool:
    """From the names of its tensors, all of them: other libraries have more."""
    names = {f"{layer}.{kind}" for layer in ("encoder", "decoder") for kind in ("weight", "bias")}
    return set(tensors_of(loaded(source))) == names


def read_deepseek(source: Source) -> PlainSAE:
    """relu.

    Raises:
        ValueError: damaged files; a decoder whose orientation cannot be told.
    """
    name = weights(source) or ""
    found = tensors_of(loaded(source))
    weight = found.get("decoder.weight")
    square = isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == weight.shape[1]
    why = (
        "decoder.weight is square: whether its rows are inputs (torch.nn.Linear) or latents (VISAEBench) cannot be told"
    )
    refuse(square and source.assumed("format") is None, source.at(name), "DeepSeek-R1", why)
    layer = _DEEPSEEK_NAME.search(name)
    metadata = {"source_format": "deepseek", **({"layer": int(layer[1])} if layer else {})}
    plain = _linear(source, "encoder", "decoder", metadata)
    return plain.assumed(
        "tensors alone, without settings: taken as a relu SAE without pre-bias, as DeepSeek-R1's l19 is"
    )


def _linear(source: Source, encoder: str, decoder: str, metadata: dict[str, Any]) -> PlainSAE:
    """Two torch.nn.Linear with relu between."""
    shapes: dict[str, tuple[int | str, ...]] = {
        f"{encoder}.weight": ("d_sae", "d_in"),
        f"{encoder}.bias": ("d_sae",),
        f"{decoder}.weight": ("d_in", "d_sae"),
        f"{decoder}.bias": ("d_in",),
    }
    found = tensors_of(loaded(source))
    W_enc, b_enc, W_dec, b_dec = wide(found, source.at(weights(source) or ""), **shapes).values()
    plain = PlainSAE(W_enc=W_enc.T, b_enc=b_enc, W_dec=W_dec.T, b_dec=b_dec, activation="relu", metadata=metadata)
    return plain.without_pre_bias()


def detect_qwen(source: Source) -> bool:
    """From the file's name, as the names of its tensors are those of SAELens, turned."""
    name = weights(source)
    return name is not None and _QWEN_NAME.fullmatch(name) is not None and "W_enc" in loaded(source)


def read_qwen(source: Source) -> PlainSAE:
    """topk; k as the user says, or as a folder of the repository's name does.

    Raises:
        ValueError: damaged files; no k.
    """
    name = weights(source) or ""
    where = source.at(name)
    repository = next((m for part in where.resolve().parts if (m := _QWEN_REPOSITORY.search(part))), None)
    k = source.assumed_k() or (int(repository["k"]) if repository else None)
    refuse(k is None, where, "Qwen-Scope", f"its k stands only in the repository's name (L0_50): say k {HOW}")
    names: dict[str, tuple[int | str, ...]] = {
        "W_enc": ("d_sae", "d_in"),
        "b_enc": ("d_sae",),
        "W_dec": ("d_in", "d_sae"),
        "b_dec": ("d_in",),
    }
    W_enc, b_enc, W_dec, b_dec = wide(tensors_of(loaded(source)), where, **names).values()
    layer = _QWEN_NAME.fullmatch(name)
    activation: Literal["topk"] = "topk"
    plain = PlainSAE(
        W_enc=W_enc.T,
        b_enc=b_enc,
        W_dec=W_dec.T,
        b_dec=b_dec,
        activation=activation,
        k=k,
        metadata={
            "source_format": "qwen_scope",
            **({"model": f"Qwen/{repository['model']}"} if repository else {}),
            **({"layer": int(layer[1])} if layer else {}),
        },
    )
    return plain.without_pre_bias()
