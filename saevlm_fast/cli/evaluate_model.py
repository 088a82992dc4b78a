"""saevlm-fast evaluate --model: the tower that SAEs are spliced into, and its images."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.terminal import print_table, say, tell, warn
from saevlm_fast.errors import first_line, require
from saevlm_fast.settings import Settings, setting

if TYPE_CHECKING:
    from saevlm_fast.data.label_sets import LabelSet
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.measures.behaviour import Behaviour
    from saevlm_fast.measures.evaluation import Evaluation
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.text import TextEncoder
    from saevlm_fast.towers.tower import HookPoint

TEMPLATE = "a photo of a {}"  # of measures/behaviour.py, which imports torch
_ROWS = ("sae", "sae_and_error", "noise", "zero", "mean", "shuffled")
_SAID = {"sae_and_error": "sae + error"}


@dataclass(frozen=True, kw_only=True)
class SplicedArguments(Settings):
    """Options of `saevlm-fast evaluate` about behaviour."""

    title = "The model with the SAE in it"
    model: str | None = setting(
        None,
        help="Tower that the SAEs are spliced into, as of harvest: what is left of its behaviour. Needs --images.",
        place="model",
    )
    images: str | None = setting(None, help="Images that it is shown, as of harvest.", place="images")
    class_prompts: str = setting(
        TEMPLATE, help="Text of a class, with {} for the label, or FILE.json of label: text.", place="table"
    )
    captions: str = setting(
        "none",
        help="Texts of the images, to be found again: none, images (their labels), FILE.csv (image, text).",
        place="table",
    )
    image_limit: int = setting(5000, help="Images shown at most, evenly spaced.", at_least=2)
    image_batch_size: int = setting(32, help="Images of a forward.", at_least=2)

    def check(self) -> None:
        super().check()
        require((self.model is None) == (self.images is None), "model, images: one of them needs the other")


def open_behaviour(
    options: SplicedArguments,
    labels: str,
    device: str,
    activations: "Activations",
    saes: "Mapping[str, SparseAutoencoder]",
) -> "Behaviour":
    """Model, images, their labels and texts. labels: as --labels has it.

    Raises:
        ValueError: no record of where the SAEs belong, or nothing fits there.
    """
    from saevlm_fast.images.open import open_images
    from saevlm_fast.measures.behaviour import Behaviour, BehaviourOptions, chosen_images, read_prompts
    from saevlm_fast.provenance import misfit
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.towers.load import load_tower

    assert options.model is not None
    assert options.images is not None
    prompts = read_prompts(options.class_prompts)
    records = [activations.source, *(sae.config.metadata.get("source") for sae in saes.values())]
    point, tokens = _place(records)
    source = open_images(options.images)
    for note in source.notes:
        tell(f"images: {note}")
    chosen = chosen_images(source, options.image_limit)
    ids = [source.image_id(i) for i in chosen]
    captions = _captions(options.captions, source, chosen, ids)
    label_sets = _label_sets(labels, options.captions, source, chosen, ids)
    tower = load_tower(options.model, resolve_device(device), on_message=tell)
    here = {"point": point.point, "layer": point.layer, "tokens": tokens, "model": tower.description()}
    for name, sae in saes.items():
        if (doubt := misfit(sae.config.metadata.get("source"), here, name, f"model: {point.name}")) is not None:
            warn(f"{doubt}; what is left of {options.model}'s behaviour may mean little")
    encoder, why = _text_side(options.model, device, captions is not None, bool(label_sets))
    known = BehaviourOptions(label_sets, captions, prompts, options.image_batch_size, None, why)
    return Behaviour(tower, source, chosen, point, tokens, encoder, known)


def _place(records: list[Any]) -> "tuple[HookPoint, str | None]":
    """Where the rows are from, and which tokens the SAEs were trained on, by the first record that says so."""
    from saevlm_fast.towers.tower import HookPoint

    known = [each for each in records if isinstance(each, dict) and each.get("point") is not None]
    require(
        len(known) > 0,
        "model: neither the activations nor an SAE record the point and layer of the tower that they are of, so that "
        "nothing is spliced; harvest writes stores that do",
    )
    tokens = next((each["tokens"] for each in reversed(known) if isinstance(each.get("tokens"), str)), None)
    return HookPoint(known[0]["point"], known[0].get("layer")), tokens


def _label_sets(
    given: str, captions: str, source: "ImageSource", chosen: list[int], ids: list[str]
) -> "tuple[LabelSet, ...]":
    """Of the images that are shown, as --labels says."""
    from saevlm_fast.data.label_sets import LabelSet, read_labels

    if given == "none":
        return ()
    if given != "store":
        return tuple(read_labels(given, ids))
    labels = [source.label(i) for i in chosen]
    different = len({label for label in labels if label is not None})
    if captions == "images" or different > len(labels) // 2:
        if different:
            say(f"labels: {different:,} different ones of {len(labels):,} images are no classes; give --labels FILE")
        return ()
    return (LabelSet.of(labels),) if different else ()


def _captions(captions: str, source: "ImageSource", chosen: list[int], ids: list[str]) -> list[str] | None:
    """A text of each image."""
    if captions == "none":
        return None
    if captions == "images":
        texts = [source.label(i) for i in chosen]
    else:
        require(captions.endswith(".csv"), f"captions: {captions!r} is not none, images or FILE.csv")
        found = _read_captions(Path(captions))
        texts = [found.get(each) for each in ids]
    missing = next((identity for identity, text in zip(ids, texts) if not text), None)
    require(missing is None, f"captions: none of {missing!r}")
    return [text for text in texts if text is not None]


def _read_captions(path: Path) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"captions: {path}: {first_line(error)}") from None
    for number, line in enumerate(lines, 1):
        require(len(line) == 2, f"captions: {path}: line {number} has {len(line)} cells, not an image and its text")
    return {identity.strip(): text.strip() for identity, text in lines}


def _text_side(model: str, device: str, needed: bool, wanted: bool) -> "tuple[TextEncoder | None, str | None]":
    """The model's text encoder; or none, and why."""
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.towers.text import load_text_encoder

    if not (needed or wanted):
        return None, None
    try:
        return load_text_encoder(model, resolve_device(device), on_message=tell), None
    except ValueError as error:
        if needed:
            raise
        say(f"no zero-shot classes: {error}")
        return None, str(error)


def print_behaviour(evaluation: "Evaluation") -> None:
    """One table an SAE: token choices and what stands in their place."""
    for each in evaluation.results:
        figures = each.figures.get("behaviour")
        if figures is None or each.subject.kind != "sae":
            continue
        sets = list(figures["sets"])
        name = next((s for s in sets if "ce" in figures["original"]["sets"].get(s, {})), None)
        lines: list[tuple[str, ...]] = [("original", *_cells(figures["original"], name), "", "", "")]
        for tokens, splice in figures["splices"].items():
            for variant in _ROWS:
                recovered = splice["recovered"].get(variant, {}).get(name, {}).get("ce", {})
                shown = (_recovered(recovered.get(ablation)) for ablation in _ROWS[3:])
                lines.append(
                    (f"{tokens}: {_SAID.get(variant, variant)}", *_cells(splice["variants"][variant], name), *shown)
                )
        about = "" if name is None else f", classes of {name}"
        say(
            f"{each.subject.name} in {figures['model']} at {figures['point']}, {figures['n']:,} images{about}. Last: "
            "cross-entropy recovered against each ablation, withheld (-) where that changes too little"
        )
        print_table(("in place", "cosine", "kNN", "top-1", "CE", "KL", *_ROWS[3:]), lines)


def _cells(row: dict[str, Any], name: str | None) -> tuple[str, ...]:
    about = row["sets"].get(name, {}) if name is not None else {}
    found = [row["cosine"], row["overlap"], *(about.get(key) for key in ("top1", "ce", "kl"))]
    return tuple("-" if each is None else f"{each['value']:.3f}" for each in found)


def _recovered(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['value']:.1%}" if ratio["status"] == "defined" else "-"
