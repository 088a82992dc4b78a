"""Whether an SAE, stores and models belong together, by what their files record. What is not recorded is not judged."""

from pathlib import Path
from typing import Any

from torch import nn

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.files import weights_sha256
from saevlm_fast.sae import SparseAutoencoder, read_sae_header, sae_digest
from saevlm_fast.towers.from_transformers import vision_part
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import IMAGE_POINTS, HookPoint, Tower


def check_sae_of(sae: SparseAutoencoder, layer: int) -> None:
    """ValueError: the SAE was trained on another layer, or on something else than the residual stream."""
    trained_on = _residual_elsewhere(sae.config.metadata.get("source"), layer)
    require(trained_on is None, f"layer: {layer}, but the SAE was trained on {trained_on}")


def sae_mismatch(sae_directory: Path, tower: Tower, point: HookPoint, tokens: Tokens | None) -> str | None:
    """What an SAE was trained on, where its record of that differs from what it is to encode: None if nothing does."""
    source = read_sae_header(sae_directory)[0].metadata.get("source")
    if not isinstance(source, dict):  # free-form in SAEs and stores of other makers
        return None
    now = {"point": point.point, "layer": point.layer, "tokens": None if tokens is None else tokens.name}
    before = {name: source.get(name, value) for name, value in now.items()}
    model = source.get("model")
    weights = model.get("weights_sha256") if isinstance(model, dict) else None
    other_model = weights is not None and weights != tower.description()["weights_sha256"]
    if before == now and not other_model:
        return None
    where = f"{before['point']} of layer {before['layer']}, tokens {before['tokens']}"
    return f"{sae_directory} was trained on {where}{' of another model' if other_model else ''}"


def other_tower(sae: SparseAutoencoder, model: nn.Module) -> str | None:
    """What the SAE was trained on, if that is known to be another vision tower than the model's, for a warning.

    Known where the SAE is of a tower of the same class (loaded as `load_tower` does): one of a CLIP with its projection
    says nothing of the same tower inside a LLaVA. The model's weights must be as the checkpoint has them.
    """
    trained_on = _dict(_dict(sae.config.metadata.get("source")).get("model"))
    tower, digest = vision_part(model), trained_on.get("weights_sha256")
    if digest is None or trained_on.get("class") != type(tower).__name__:
        return None
    return None if digest == weights_sha256(tower, as_float32=True) else str(trained_on.get("spec"))


def check_codes_of(codes: StoredCodes, sae_directory: Path, layer: int) -> None:
    """ValueError: codes of another SAE, or of another layer."""
    made_by = _dict(_dict(codes.source).get("sae"))
    same = made_by.get("sha256") in (None, sae_digest(sae_directory))
    require(same, f"codes: {codes.path} are of another SAE ({made_by.get('path')}) than {sae_directory}")
    harvested_at = _residual_elsewhere(codes.source, layer)
    require(harvested_at is None, f"codes: {codes.path} are of {harvested_at}, not of layer {layer}")


def other_text_model(embeddings: Activations, text_model: str) -> str | None:
    """What speaks against comparing these embeddings with that model's texts; None if nothing does.

    A name is not an identity (a model of the hub may lie in a directory as well), so that this is for a warning.

    Raises:
        ValueError: they are not image embeddings at all.
    """
    source = _dict(embeddings.source)
    point = source.get("point", "projection")
    require(
        point in IMAGE_POINTS,
        f"embeddings: {embeddings.path} are {point} of layer {source.get('layer')}; harvest --point projection",
    )
    spec = _dict(source.get("model")).get("spec", text_model)
    if _identity(spec) == _identity(text_model):
        return None
    return f"embeddings: {embeddings.path} are of {spec}, and the texts' are of {text_model}"


def _residual_elsewhere(source: Any, layer: int) -> str | None:
    """Where a store's or SAE's rows are from, unless that is the residual stream after block `layer`."""
    source = _dict(source)
    point, of_layer = source.get("point", "residual"), source.get("layer", layer)
    if (point, of_layer) == ("residual", layer):
        return None
    return str(point) if of_layer is None else f"{point} of layer {of_layer}"


def _identity(spec: str) -> str:
    prefix, _, name = spec.partition(":")
    return f"{prefix}:{Path(name).resolve() if Path(name).exists() else name}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}  # free-form in SAEs and stores of other makers
