"""overcomplete: state dicts of its SAEs (it has no function that saves); also under "model_state_dict".

    z = act(batch_norm(x W_enc + b_enc))        x_hat = z D exp(multiplier)

D is _weights with rows divided by |row| + 1e-8, or, of the relaxed archetypal kind, row-stochastic(relu(W)) C + Relax
with rows of Relax of at most delta. What a state dict does not hold, the user says: k of a TopK SAE, the threshold of a
BatchTopK SAE (a plain attribute there), `activation` relu where neither is.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.errors import require
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.single_file import HOW, loaded, refuse, tensors_of, weights, wide
from saevlm_fast.formats.source import Source

NAME = "overcomplete"
FILES = "one .pt or .pth with dictionary._weights, or dictionary.C, W and Relax"
Shapes = dict[str, tuple[int | str, ...]]
_LINEAR, _TIEABLE = "encoder.final_block.0.weight", "encoder.weight"
_NORM, _BATCH_NORM = "encoder.final_block.1.weight", "encoder.final_block.1.running_mean"
_ARCHETYPAL: Shapes = {
    "dictionary.C": ("n", "d_in"),
    "dictionary.W": ("d_sae", "n"),
    "dictionary.Relax": ("d_sae", "d_in"),
}
_DELTA, _BATCH_NORM_EPS = 1.0, 1e-5  # constructor's defaults, which no file holds
_SAID = (
    "a state dict does not say its activation: say k (TopK), threshold (BatchTopK: running_threshold) or "
    f"activation=relu (SAE) {HOW}"
)


def detect(source: Source) -> bool:
    """From the names of its tensors."""
    found = tensors_of(loaded(source))
    return "dictionary._weights" in found or "dictionary.C" in found


def read(source: Source) -> PlainSAE:
    """Linear encoders (batch norm folded, tied or not) with relu, topk, a batch top-k's threshold, or jumps.

    Raises:
        ValueError: damaged files; other encoders, quantised codes; an activation that nothing tells.
    """
    where = source.at(weights(source) or "")
    value = loaded(source)
    found = tensors_of(value)
    refuse("Q" in found, where, NAME, "a quantised SAE, whose latents are steps")
    W_dec, doubts = dictionary(found, where)
    plain = _encoder(found, W_dec, source)
    activation, k, threshold, said = _activation(found, source)
    plain = replace(
        plain,
        activation=activation,
        k=k,
        threshold=threshold,
        metadata={"source_format": NAME},
        doubts=(*doubts, *said),
    )
    return plain if threshold is None else plain.with_inclusive_threshold()


def _encoder(found: Mapping[str, Any], W_dec: Tensor, source: Source) -> PlainSAE:
    """The linear part, as a relu SAE without b_dec."""
    where = source.at(weights(source) or "")
    others = [name for name in found if name.startswith("encoder.")]
    deep = next((name for name in others if "mlp_blocks" in name or "attention" in name or "resnet" in name), None)
    refuse(deep is not None, where, NAME, f"{deep}: the encoder is a network of several layers, not one matrix")
    refuse(
        _NORM in found and _BATCH_NORM not in found,
        where,
        NAME,
        "a layer norm over the latents behind the encoder (mlp_ln_1), which no change of weights is",
    )
    name = _LINEAR if _LINEAR in found else _TIEABLE
    bias = name.replace("weight", "bias")
    if name not in found:
        refuse(not others, where, NAME, "no encoder: tied to its dictionary, or matching pursuit; nothing tells which")
        W_enc = W_dec.T
        b_enc = wide(found, where, **{"encoder.bias": (len(W_dec),)})["encoder.bias"]
    else:
        W_enc = wide(found, where, **{name: tuple(W_dec.shape)})[name].T
        has_bias = bias in found
        b_enc = wide(found, where, **{bias: (len(W_dec),)})[bias] if has_bias else torch.zeros_like(W_enc[0])
    dtype = torch.promote_types(W_enc.dtype, W_dec.dtype)
    plain = PlainSAE(
        W_enc=W_enc.to(dtype),
        b_enc=b_enc.to(dtype),
        W_dec=W_dec.to(dtype),
        b_dec=torch.zeros(W_dec.shape[1], dtype=dtype),
        activation="relu",
    )
    if _BATCH_NORM not in found:
        return plain
    parts = [f"encoder.final_block.1.{each}" for each in ("weight", "bias", "running_mean", "running_var")]
    norm = wide(found, where, **{part: (len(W_dec),) for part in parts})
    negative = bool((norm[parts[3]] < 0).any())
    require(not negative, f"{where}: {parts[3]} holds a negative variance")
    weight_S, bias_S, mean_S, var_S = (norm[part] for part in parts)
    return plain.after_batch_norm(weight_S, bias_S, mean_S, var_S, eps=_BATCH_NORM_EPS)


def _activation(found: Mapping[str, Any], source: Source) -> tuple[Any, int | None, Tensor | None, tuple[str, ...]]:
    """(activation, k, threshold, doubts): thresholds of the file are logarithms."""
    where = source.at(weights(source) or "")
    if "thresholds" in found:
        log_S = wide(found, where, thresholds=("d_sae",))["thresholds"]
        threshold_S = log_S.exp()
        return "jumprelu", None, threshold_S, ()
    threshold, k = source.assumed_number("threshold"), source.assumed_k()
    activation = source.assumed("activation")
    if threshold is not None:
        refuse(activation not in (None, "batch_topk"), where, NAME, f"a threshold has no place beside {activation}")
        return "batch_topk", k, torch.tensor(threshold), ()
    if k is not None and activation in (None, "topk"):
        return "topk", k, None, ()
    refuse(activation != "relu", where, NAME, _SAID)
    return "relu", None, None, ()


def dictionary(found: Mapping[str, Any], where: Path) -> tuple[Tensor, tuple[str, ...]]:
    """(W_dec [d_sae, d_in], doubts), as the library makes it when it goes over to evaluation."""
    multiplier = wide(found, where, **{"dictionary.multiplier": ()})["dictionary.multiplier"].double().exp()
    if "dictionary.C" in found:
        return _archetypal(found, where, multiplier)
    weights_SD = wide(found, where, **{"dictionary._weights": ("d_sae", "d_in")})["dictionary._weights"]
    norm_S = weights_SD.double().norm(dim=1, keepdim=True)
    W_dec = weights_SD.double() / (norm_S + 1e-8) * multiplier
    is_unit = bool(((norm_S - 1).abs() < 1e-4).all())
    doubt = (
        f"rows of dictionary._weights have norms of {norm_S.min():.3g} to {norm_S.max():.3g}, and are normalised as "
        "by default (l2): the file does not say whether its SAE did otherwise"
    )
    return W_dec.to(weights_SD.dtype), () if is_unit else (doubt,)


def _archetypal(found: Mapping[str, Any], where: Path, multiplier: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    parts = wide(found, where, **_ARCHETYPAL)
    dtype = parts["dictionary.W"].dtype
    C, W, relax = (parts[name].double() for name in _ARCHETYPAL)
    W = W.relu()
    W = W / (W.sum(dim=1, keepdim=True) + 1e-8)
    norm_S = relax.norm(dim=1, keepdim=True)
    W_dec = (W @ C + relax * (_DELTA / norm_S).clamp(max=1)) * multiplier
    doubt = (
        f"Relax has rows of norm {norm_S.max():.3g}, cut to the default delta of {_DELTA:g}: the file does not say it"
    )
    return W_dec.to(dtype), (doubt,) if bool((norm_S > _DELTA + 1e-4).any()) else ()
