"""Whether an SAE, stores and models belong together, by what their files record. What is not recorded is not judged."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.files import weights_sha256
from saevlm_fast.formats.sae_header import read_sae_header, sae_digest
from saevlm_fast.records import object_of
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.towers.from_transformers import vision_part
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import IMAGE_POINTS, HookPoint, Tower


def check_sae_of(
    sae: SparseAutoencoder,
    layer: int,
    tokens: str | None = None,
    point: str = "residual",
    tower: Tower | None = None,
    name: str = "the SAE",
) -> str | None:
    """What speaks against steering block `layer` with this SAE, for a warning; ValueError as of `misfit`.

    tokens: all, patches or cls, those that are steered; of point language all, text, image or last. tower: None where
    it is not loaded yet, or does not matter. name: of the SAE in messages.
    """
    trained_on = sae.config.metadata.get("source")
    where = {"point": point, "layer": layer, "tokens": tokens, "model": _described(tower, trained_on)}
    return misfit(trained_on, where, name, f"layer: {layer}")


def _described(tower: Tower | None, trained_on: Any) -> dict[str, Any] | None:
    """The tower, if what was trained on says by a hash over all weights which one it was."""
    known = object_of(object_of(trained_on).get("model")).get("weights_sha256") is not None
    return tower.description() if known and tower is not None else None


def sae_mismatch(sae_directory: Path, tower: Tower, point: HookPoint, tokens: Tokens | None) -> str | None:
    """What speaks against encoding a tower's activations with this SAE, for a warning; ValueError as of `misfit`."""
    trained_on = object_of(read_sae_header(sae_directory)[0].metadata.get("source"))
    where = {
        "point": point.point,
        "layer": point.layer,
        "tokens": None if tokens is None else tokens.name,
        "model": _described(tower, trained_on),
    }
    return misfit(trained_on, where, str(sae_directory), f"point: {point.name}")


def check_rows_of(sae: SparseAutoencoder, rows: Activations | StoredCodes) -> str | None:
    """What speaks against encoding these rows with this SAE, for a warning; ValueError as of `misfit`."""
    what = f"activations: {rows.path} are of {place_of(rows.source)}"
    return misfit(sae.config.metadata.get("source"), rows.source, "the SAE", what)


def misfit(trained_on: Any, rows: Any, sae: str, what: str) -> str | None:
    """The one rule for rows that an SAE is to encode, by the records of both; what one does not say is not judged.

    Another hook point or layer is another space: refused. Another model, or a kind of token that the SAE has not seen,
    may be meant: what differs is returned, for a warning. All tokens of an image are mostly patches.

    Args:
        trained_on, rows: as the index of a store has them: point, layer, tokens, model. Free-form in those of other
            makers.
        sae, what: names for messages; what begins with the argument at fault.

    Raises:
        ValueError: the rows are of another hook point or layer.
    """
    trained_on, rows = object_of(trained_on), object_of(rows)
    place = _elsewhere(trained_on, rows)
    require(place is None, f"{what}, but {sae} was trained on {place}")
    tokens, other_model = trained_on.get("tokens"), _differ(trained_on.get("model"), rows.get("model"))
    seen, shown = _TOKENS_SEEN.get(_kind(tokens)), _TOKENS_SEEN.get(_kind(rows.get("tokens")))
    unseen = seen is not None and shown is not None and shown[-1] not in seen
    if not (unseen or other_model):
        return None
    at = f"{trained_on.get('point')} of layer {trained_on.get('layer')}, tokens {tokens}"
    return f"{sae} was trained on {at}{' of another model' if other_model else ''}"


# Kinds of token in a choice of tokens, the most frequent one last.
_TOKENS_SEEN = {
    "cls": ("cls",),
    "mean": ("mean",),
    "patches": ("patch",),
    "random": ("patch",),
    "all": ("cls", "last", "text", "image", "patch"),
    "text": ("text",),
    "image": ("image",),
    "last": ("last",),
    "random-all": ("cls", "patch"),
}


def _kind(tokens: Any) -> str:
    """Of a name of tokens.Tokens: random2-all is random-all."""
    return re.sub(r"[0-9]+", "", tokens) if isinstance(tokens, str) else ""


def _elsewhere(trained_on: Mapping[str, Any], rows: Mapping[str, Any]) -> str | None:
    """Where an SAE's training rows are from, if that is known to be another hook point or layer than these rows'."""
    known = [name for name in ("point", "layer") if None not in (trained_on.get(name), rows.get(name))]
    return place_of(trained_on) if any(trained_on[name] != rows[name] for name in known) else None


def place_of(source: Any) -> str:
    """Hook point and layer of rows, by the record that the index of their store has, as messages name them."""
    record = object_of(source)
    point, layer = record.get("point", "rows"), record.get("layer")
    return str(point) if layer is None else f"{point} of layer {layer}"


def _differ(trained_on: Any, now: Any) -> bool:
    """Whether two towers are known to be different models.

    The same weights may be loaded as one class with its projection and another without; between libraries, classes say
    nothing.
    """
    trained_on, now = object_of(trained_on), object_of(now)
    classes = [str(tower.get("class") or "") for tower in (trained_on, now)]
    if classes[0] != classes[1] and all(classes):
        libraries = [{"transformers", "open_clip", "timm"} & set(tower) for tower in (trained_on, now)]
        bare = {name.removesuffix("WithProjection") for name in classes}
        return libraries[0] == libraries[1] and len(bare) == 2
    digests = [tower.get("weights_sha256") for tower in (trained_on, now)]
    return None not in digests and digests[0] != digests[1]


def other_tower(sae: SparseAutoencoder, model: nn.Module, vision: bool = True) -> str | None:
    """What the SAE was trained on, if that is known to be another vision tower than the model's, for a warning; with
    vision=False another model, of whose language blocks it is.

    Known where the SAE is of a tower of the same class (loaded as `load_tower` does): one of a CLIP with its projection
    says nothing of the same tower inside a LLaVA. The model's weights must be as the checkpoint has them.
    """
    trained_on = object_of(object_of(sae.config.metadata.get("source")).get("model"))
    tower = vision_part(model) if vision else model
    now: dict[str, Any] = {"class": type(tower).__name__, "transformers": None}
    if trained_on.get("weights_sha256") is not None and trained_on.get("class") == now["class"]:
        now["weights_sha256"] = weights_sha256(tower, as_float32=True)
    return str(trained_on.get("spec")) if _differ(trained_on, now) else None


def check_codes_of(codes: StoredCodes, sae_directory: Path, layer: int) -> None:
    """ValueError: codes of another SAE, or of another layer."""
    _check_made_by(codes, sae_directory)
    harvested_at = _elsewhere(object_of(codes.source), {"point": "residual", "layer": layer})
    require(harvested_at is None, f"codes: {codes.path} are of {harvested_at}, not of layer {layer}")


def check_same_sae(codes: StoredCodes, path: Path, sae: SparseAutoencoder) -> None:
    """ValueError: codes of another width, or known to be of another SAE."""
    d_sae = sae.config.d_sae
    require(codes.d_sae == d_sae, f"codes: {codes.path} are of {codes.d_sae} latents, {path} has {d_sae}")
    _check_made_by(codes, path)


def _check_made_by(codes: StoredCodes, sae: Path) -> None:
    made_by = object_of(object_of(codes.source).get("sae"))
    same = made_by.get("sha256") in (None, sae_digest(sae))
    require(same, f"codes: {codes.path} are of another SAE ({made_by.get('path')}) than {sae}")


def other_text_model(embeddings: Activations, text_model: str) -> str | None:
    """What speaks against comparing these embeddings with that model's texts; None if nothing does.

    A name is not an identity (a model of the hub may lie in a directory as well), so that this is for a warning.

    Raises:
        ValueError: they are not image embeddings at all.
    """
    source = object_of(embeddings.source)
    point = source.get("point", "projection")
    require(
        point in IMAGE_POINTS,
        f"embeddings: {embeddings.path} are {point} of layer {source.get('layer')}; harvest --point projection",
    )
    spec = object_of(source.get("model")).get("spec", text_model)
    if _identity(spec) == _identity(text_model):
        return None
    return f"embeddings: {embeddings.path} are of {spec}, and the texts' are of {text_model}"


def _identity(spec: str) -> str:
    prefix, _, name = spec.partition(":")
    return f"{prefix}:{Path(name).resolve() if Path(name).exists() else name}"
