"""What a report is made from: opened, checked, belonging together."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from saevlm_fast.data.codes import StoredCodes, open_codes
from saevlm_fast.data.label_sets import read_labels
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import require
from saevlm_fast.look.looked import Subject, checked_sizes
from saevlm_fast.look.names import check_same_images
from saevlm_fast.look.settings import MOST_IN_ONE_FILE, UNTRAINED, ReportSettings
from saevlm_fast.look.store_images import StoreImages
from saevlm_fast.look.tables import read_latents_table
from saevlm_fast.measures.taxonomy import Taxonomy, read_taxonomy
from saevlm_fast.provenance import check_rows_of, check_same_sae
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.controls import untrained_like
from saevlm_fast.scoring.image_rows import ImageTable, image_table


class Inputs(NamedTuple):
    """Opened and checked.

    Attributes:
        subjects: the SAEs with their rows; a control SAE is the last. control: its place; None without one.
        images: the pictures of all rows.
        embeddings: one row an image. taxonomy: of the classes.
        scores, names, steering: of each subject its table, or None.
    """

    subjects: list[Subject]
    images: StoreImages
    control: int | None
    embeddings: Activations | None
    taxonomy: Taxonomy | None
    scores: list[pa.Table | None]
    names: list[pa.Table | None]
    steering: list[pa.Table | None]


def open_inputs(settings: ReportSettings, warn: Callable[[str], None]) -> Inputs:
    """Everything that is read. ValueError: what is damaged, not there, or does not belong together."""
    shared = None if settings.activations is None else open_activations(settings.activations)
    subjects = _subjects(settings, shared, warn)
    _check_same_pictures(subjects, settings.images, warn)
    images = StoreImages(subjects[0].rows.source, settings.images)
    n_latents = sum(each.sae.config.d_sae for each in subjects)
    small = n_latents <= MOST_IN_ONE_FILE or not settings.single_file
    require(small, f"single_file: {n_latents:,} latents, at most {MOST_IN_ONE_FILE:,}; give a directory for a folder")
    embeddings = None if settings.embeddings is None else open_activations(settings.embeddings)
    if embeddings is not None:
        for subject in subjects:
            check_same_images(subject.table, embeddings, str(subject.rows.path))
    taxonomy = None if settings.taxonomy is None else read_taxonomy(settings.taxonomy)
    if taxonomy is not None:
        _check_taxonomy(taxonomy, subjects)
    control = None if settings.control_sae is None else len(subjects) - 1
    tables = [_tables(each, subjects) for each in (settings.scores, settings.names, settings.steering)]
    return Inputs(subjects, images, control, embeddings, taxonomy, *tables)


def _check_taxonomy(taxonomy: Taxonomy, subjects: list[Subject]) -> None:
    """ValueError: it has none of the classes, or there are none."""
    found = {name for each in subjects if each.labels is not None for name in each.labels.unique().to_pylist()}
    classes = sorted(name for name in found if name is not None)
    require(bool(classes), "taxonomy: it is about classes, and no image has one; give --labels")
    known = any(name in taxonomy.paths for name in classes)
    require(known, f"taxonomy: {taxonomy.origin} has none of the classes, as {classes[0]!r}")


def _subjects(settings: ReportSettings, shared: Activations | None, warn: Callable[[str], None]) -> list[Subject]:
    """The SAEs, and a control SAE after them: that of a path, or one that is made."""
    device, found = resolve_device(settings.device), list[Subject]()
    tables: dict[str, ImageTable] = {}
    made = settings.control_sae == Path(UNTRAINED) and not Path(UNTRAINED).is_dir()
    paths = settings.sae if settings.control_sae is None or made else (*settings.sae, str(settings.control_sae))
    for i, path in enumerate(paths):
        sae = SparseAutoencoder.from_pretrained(path, device=device)
        own = open_codes(settings.codes[i]) if i < len(settings.codes) else None
        rows: Activations | StoredCodes | None = own or shared
        assert rows is not None  # the settings have seen to it
        if isinstance(rows, StoredCodes):
            check_same_sae(rows, Path(path), sae)
        if (doubt := check_rows_of(sae, rows)) is not None:
            warn(f"{doubt}; its codes of {rows.path} may mean little")
        key = str(rows.path)
        tables[key] = tables.get(key) or image_table(rows)
        labels = _labels(settings.labels, tables[key])
        encoder = None if isinstance(rows, StoredCodes) else sae
        name, again = _name_of(paths, i), None if own is None else shared
        found.append(Subject(name, str(path), sae, rows, encoder, tables[key], labels, _encodable(again, tables, key)))
        checked_sizes(found[-1])
    if made:
        assert shared is not None  # the settings have seen to it
        found.append(_untrained(found[0].sae, shared, settings.labels, tables))
    return found


def _untrained(
    like: SparseAutoencoder, rows: Activations, labels: Path | None, tables: dict[str, ImageTable]
) -> Subject:
    """A control made here: random directions, the L0 of `like`; the same with every call."""
    sae, _ = untrained_like(like, rows)
    table = tables.get(str(rows.path)) or image_table(rows)
    return Subject("untrained control", UNTRAINED, sae, rows, sae, table, _labels(labels, table), is_made=True)


def _encodable(
    activations: Activations | None, tables: dict[str, ImageTable], key: str
) -> tuple[Activations, ImageTable] | None:
    """Activations beside codes, if they are of the same images in the same order: then the SAE can be asked again."""
    if activations is None:
        return None
    path, codes = str(activations.path), tables[key]
    tables[path] = tables.get(path) or image_table(activations)
    same, ids = tables[path].n_images == codes.n_images, tables[path].ids
    if same and ids is not None and codes.ids is not None:
        same = ids.equals(codes.ids)
    require(same, f"codes: {key} are not of the images of {path}, in their order")
    return activations, tables[path]


def _check_same_pictures(subjects: list[Subject], images: str | None, warn: Callable[[str], None]) -> None:
    """A page has one picture of an id, and of each picture the part that the first SAE's tower sees.

    ValueError: SAEs whose rows are of images of different places.
    """
    sources = [each.rows.source or {} for each in subjects]
    places = [place.get("path") if isinstance(place := source.get("images"), dict) else None for source in sources]
    crops = [model.get("preprocess") if isinstance(model := source.get("model"), dict) else None for source in sources]
    for subject, place, crop in zip(subjects[1:], places[1:], crops[1:]):
        same = images is not None or place is None or places[0] is None or place == places[0]
        what = f"codes: {subject.rows.path} are of images in {place}, {subjects[0].rows.path} of {places[0]}"
        require(same, f"{what}; make a report of each, or name the one place with --images")
        if crop is not None and crops[0] is not None and crop != crops[0]:
            warn(f"{subject.name}: its tower crops pictures in another way; its heat maps lie as {subjects[0].name}'s")


def _name_of(paths: tuple[str, ...], i: int) -> str:
    """The last component of the path, or as much of it as tells it from the others."""
    for n in range(1, 8):
        names = ["/".join(Path(path).absolute().parts[-n:]) for path in paths]
        if len(set(names)) == len(names):
            return names[i]
    return f"{Path(paths[i]).name} ({i + 1})"


def _labels(path: Path | None, table: ImageTable) -> pa.Array | None:
    """The class of each image: of the file's first column that has one label an image at most."""
    if path is None:
        return table.labels
    ids = [str(i) for i in range(table.n_images)] if table.ids is None else table.ids.to_pylist()
    sets = [each for each in read_labels(path, ids) if np.diff(each.offsets_N1).max() <= 1]
    require(len(sets) > 0, f"labels: {path}: an image has several in every column; a report shows one each")
    names, label_N = sets[0].names, sets[0].single()
    return pa.array([None if label < 0 else names[label] for label in label_N.tolist()], pa.string())


def _tables(paths: tuple[str, ...], subjects: list[Subject]) -> list[pa.Table | None]:
    """Of each subject, in order; a control SAE, and all where no paths are given, have none."""
    found: list[pa.Table | None] = [None] * len(subjects)
    for i, path in enumerate(paths):
        found[i] = read_latents_table(Path(path), subjects[i].sae.config.d_sae)
    return found
