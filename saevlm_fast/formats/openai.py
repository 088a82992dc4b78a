"""openai/sparse_autoencoder: LAYER.pt, a state dict that holds strings too.

    h = (n(x) - pre_bias) W_enc + latent_bias        TopK: n is layer_norm; ReLU: n is nothing

That TopK normalises is in the library's code, not in its files.
"""

from collections.abc import Mapping
from typing import Any

from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.single_file import NEGATIVES, loaded, refuse, weights
from saevlm_fast.formats.source import Source, floats

FILES = "one .pt with pre_bias, latent_bias, encoder.weight"
_NAMES = ("pre_bias", "latent_bias", "encoder.weight")
_ENCODER: dict[str, tuple[int | str, ...]] = {
    "pre_bias": ("d_in",),
    "latent_bias": ("d_sae",),
    "encoder.weight": ("d_sae", "d_in"),
}


def detect(source: Source) -> bool:
    """From the names of its tensors."""
    return all(name in loaded(source) for name in _NAMES)


def read(source: Source) -> PlainSAE:
    """relu, and topk of normalised inputs; tied or not.

    Raises:
        ValueError: damaged files; other activations.
    """
    found, name = loaded(source), "openai"
    where = source.at(weights(source) or "")
    activation = found.get("activation", "ReLU")
    is_known = activation in ("ReLU", "TopK")
    refuse(not is_known, where, name, f"activation {activation!r} is neither 'ReLU' nor 'TopK'")
    is_tied = "decoder.weight" not in found
    decoder: dict[str, tuple[int | str, ...]] = (
        {"decoder.linear.weight": ("d_sae", "d_in")} if is_tied else {"decoder.weight": ("d_in", "d_sae")}
    )
    tensors = floats(found, where, **_ENCODER, **decoder)
    k, doubts = _top_k(found, source, activation)
    return PlainSAE(
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["latent_bias"],
        W_dec=tensors["decoder.linear.weight"] if is_tied else tensors["decoder.weight"].T,
        b_dec=tensors["pre_bias"],
        activation="relu" if activation == "ReLU" else "topk",
        k=k,
        input_norm="none" if activation == "ReLU" else "layer_norm",
        metadata={"source_format": name, "source_config": {"activation": activation, "tied": is_tied}},
        doubts=doubts,
    )


def _top_k(found: Mapping[str, Any], source: Source, activation: str) -> tuple[int | None, tuple[str, ...]]:
    """(k, doubts). Files saved again repeat k and postact_fn as `activation.k`: its own loader refuses these."""
    if activation == "ReLU":
        return None, ()
    where, inner = source.at(weights(source) or ""), found.get("activation_state_dict")
    inner = inner if isinstance(inner, Mapping) else {}
    k = inner.get("k", found.get("activation.k"))
    is_whole = type(k) is int and k > 0
    refuse(not is_whole, where, "openai", f"activation_state_dict.k is {k!r}; TopK needs a whole number above 0")
    after = inner.get("postact_fn", found.get("activation.postact_fn", "ReLU"))
    is_known = after in ("ReLU", "Identity")
    refuse(not is_known, where, "openai", f"postact_fn {after!r} is neither 'ReLU' nor 'Identity'")
    return k, (NEGATIVES,) if after == "Identity" else ()
