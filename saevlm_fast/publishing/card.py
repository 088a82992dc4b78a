"""The model card of an SAE, README.md: generated from its records, and never written over what people wrote.

A generated card ends in a comment with the SHA-256 of all before it. A README.md whose comment fits is ours and is
replaced; any other is a person's, and stays. Names in a card are other people's text: they are escaped, and a name of
a model can neither end a table nor become a link.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saevlm_fast import __version__
from saevlm_fast.config import CONTROL_WORDS
from saevlm_fast.errors import printable
from saevlm_fast.files import atomic_write, remove_leftovers_of
from saevlm_fast.formats.hub import CARD_FILE
from saevlm_fast.publishing.facts import Facts, compact

TAGS = ("sparse-autoencoder", "sae", "mechanistic-interpretability", "vision", "saevlm-fast")
PIPELINE = "image-feature-extraction"
PAPER = "https://arxiv.org/abs/2504.02821"
_SEAL = re.compile(r"<!-- saevlm-fast card ([0-9a-f]{64}) -->\n\Z")
_SPECIAL = re.compile(r"([\\`*_{}\[\]#!|<>&~$@:])")
_MEASURES = {
    "explained_variance": "explained variance",
    "l0": "L0 (latents that fire on a row, mean)",
    "l2": "squared error of a row, mean",
    "dead_fraction": "share of latents that fire on no row",
    "rows": "rows",
}


def write_card(directory: str | os.PathLike[str]) -> bool:
    """Writes README.md beside an SAE, atomically; False: one is there that a person wrote or changed, and it stays.

    Args:
        directory: an SAE directory, a run's or another.

    Raises:
        ValueError: no SAE is there, or one of its records is damaged. OSError: it cannot be written.
    """
    path = Path(directory) / CARD_FILE
    if os.path.lexists(path) and not is_ours(path):
        return False
    text = card(Facts.of(directory))
    remove_leftovers_of(path)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True


def is_ours(path: Path) -> bool:
    """Whether a README.md is a generated card that nobody has changed."""
    try:
        text = "" if path.is_symlink() else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return is_sealed(text)


def is_sealed(text: str) -> bool:
    """Whether a text is a card of ours as it was written."""
    found = _SEAL.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found[1]


def sealed(text: str) -> str:
    """A card with the comment that says that nobody has changed it."""
    return f"{text}<!-- saevlm-fast card {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def card(
    facts: Facts,
    *,
    repo: str | None = None,
    sae_id: str | None = None,
    licence: str | None = None,
    more: Iterable[str] = (),
) -> str:
    """The card's Markdown.

    Args:
        facts: of the SAE.
        repo, sae_id: where it lies on the Hub, of letters, digits and ._-/ alone; None of one on a disk.
        licence: the Hub's name of one, as apache-2.0.
        more: sections that follow.
    """
    sections = [
        _opening(facts, sae_id),
        _trained_on(facts),
        _recipe(facts),
        _measured(facts),
        _loading(facts, repo, sae_id),
    ]
    sections += [_limits(facts), _licence(licence), *more]
    return sealed(front_matter(front(facts, licence)) + "\n\n".join(filter(None, sections)) + "\n")


# The front matter -----------------------------------------------------------------------------------------------------


def front(facts: Facts, licence: str | None = None) -> dict[str, Any]:
    """What the Hub reads of a card."""
    base = facts.base_model
    backbone = [_tag(base or facts.model or "")] if base or facts.model else []
    values: dict[str, Any] = {
        "library_name": "saelens",  # the Hub's "use this model" is then SAELens' call
        "tags": [*TAGS, *backbone, _tag(facts.header.config.architecture)],
        "pipeline_tag": PIPELINE,
    }
    return values | ({"base_model": base} if base else {}) | ({"license": licence} if licence else {})


def front_matter(values: Mapping[str, Any]) -> str:
    """The block of YAML at the top of a card."""
    import yaml

    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=False, width=1 << 20)}---\n"


def _tag(name: str) -> str:
    """hf:openai/clip-vit-large-patch14 -> clip-vit-large-patch14."""
    return re.sub(r"[^a-z0-9.]+", "-", name.rpartition("/")[2].rpartition(":")[2].lower()).strip("-.")[:60] or "unnamed"


# The sections ---------------------------------------------------------------------------------------------------------


def plain(text: Any) -> str:
    """Other people's text in Markdown: one line, and nothing in it means anything."""
    return _SPECIAL.sub(r"\\\1", printable(str(text)))


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Of Markdown; the cells are other people's text."""
    lines = [head, *rows]
    drawn = [f"| {' | '.join(plain(cell) for cell in line)} |" for line in lines]
    return "\n".join([drawn[0], "|" + " --- |" * len(head), *drawn[1:]])


def _opening(facts: Facts, sae_id: str | None) -> str:
    config = facts.header.config

    where = f" at {plain(facts.place)}" if facts.place else ""
    of = f"the activations of {plain(facts.model)}{where}" if facts.model else "a matrix of activations"
    k = "" if config.k is None else f", k = {config.k}"
    text = (
        f"# {plain(sae_id or facts.directory.absolute().name)}\n\n"
        f"A sparse autoencoder of {of}: {plain(config.architecture)}, {config.d_in:,} -> {config.d_sae:,}{k}.\n"
        f"It was made with saevlm-fast {__version__}, after [arXiv 2504.02821]({PAPER})."
    )
    if config.control is not None:
        text += (
            f"\n\n**It is a control ({config.control}): {CONTROL_WORDS[config.control]}. It is there to be compared "
            "with, not to be used.**"
        )
    shown = "" if facts.picture is None else f"\n\n![Latents and the images they fire on most]({facts.picture.name})"
    return text + shown


def _trained_on(facts: Facts) -> str:
    source, model = facts.source, facts.source.get("model")
    images = source.get("images")
    rows = [("model", facts.model), ("where", facts.place), ("width", facts.header.config.d_in)]
    if isinstance(model, dict):
        rows += [("class", model.get("class")), ("SHA-256 of its weights", model.get("weights_sha256"))]
    if isinstance(images, dict):
        rows += [("images", images.get("path")), ("number of images", images.get("images"))]
    rows += [("rows", facts.data.get("rows")), ("activations", facts.data.get("path"))]
    rows += [("SHA-256 of them", facts.data.get("digest of the activations"))]
    known = [(name, compact(value)) for name, value in rows if value is not None]
    return "## What it was trained on\n\n" + table(("", ""), known)


def _recipe(facts: Facts) -> str:
    metadata = facts.header.config.metadata
    rows = [(name, compact(value)) for name, value in facts.recipe.items() if value is not None]
    if isinstance(metadata.get("norm_factor"), int | float):
        rows.append(("activations were divided by", compact(metadata["norm_factor"])))
    if isinstance(metadata.get("mean_norm"), int | float):
        rows.append(("norm of the mean that was subtracted", compact(metadata["mean_norm"])))
    if not rows:
        return ""
    note = (
        "The weights are in raw activation units: what the activations were divided by, and a mean that was "
        "subtracted, are folded into them."
    )
    return f"## Recipe\n\n{table(('setting', 'value'), rows)}\n\n{note}"


def _measured(facts: Facts) -> str:
    names = {None: "", True: " (held out)", False: " (of what it was trained on)"}
    rows = [
        (_MEASURES.get(name, name) + (names[facts.held_out] if name == "rows" else ""), compact(value))
        for name, value in facts.evaluation.items()
    ]
    scores = facts.scores
    if scores:
        rows.append(("Monosemanticity Score, mean", f"{scores['mean']:.4f} of {scores['defined']:,} latents"))
        rows.append(("Monosemanticity Score, best", f"{scores['best']:.4f}"))
    if not rows:
        return "## Measured\n\nNothing is recorded."
    return "## Measured\n\n" + table(("measure", "value"), rows)


def _loading(facts: Facts, repo: str | None, sae_id: str | None) -> str:
    ours = "path/to/this/directory" if repo is None else f"hf:{repo}/{sae_id}"
    call = 'SAE.load_from_disk("path/to/this/directory")'
    if repo is not None:
        call = f"SAE.from_pretrained({json.dumps(repo)}, {json.dumps(sae_id)})"
    return (
        "## Load it\n\nWith saevlm-fast:\n\n```python\nfrom saevlm_fast import SparseAutoencoder\n\n"
        f"sae = SparseAutoencoder.from_pretrained({json.dumps(ours)})\ncodes = sae.encode(x)  # x: [..., "
        f"{facts.header.config.d_in}]\n```\n\nWith SAELens:\n\n```python\nfrom sae_lens import SAE\n\nsae = {call}\n```"
    )


def _limits(facts: Facts) -> str:
    lines = [
        "It reconstructs the activations that it was trained on: of another layer, token or model it says nothing."
    ]
    if facts.evaluation and not facts.held_out:
        lines.append("What is measured above may be of the rows that it was trained on.")
    lines.append(
        "A latent is a direction; that it fires on images of one thing does not make it the cause of anything."
    )
    lines.append("It shows what its model and its images hold, their biases included.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(licence: str | None) -> str:
    said = "None was chosen: ask its makers." if licence is None else f"{plain(licence)}, of these weights."
    return f"## Licence\n\n{said} The model and the images that it was trained on have licences of their own."
