"""A report: SAEs and a store become a folder of pages, or one file, that opens offline.

The work goes on in OUTPUT/.replacement, beside what an earlier report left, and takes its place when it is whole. What
took longest, the codes, stays there when the work is interrupted: the same call goes on from them.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from saevlm_fast.data.codes import StoredCodes, open_codes
from saevlm_fast.data.label_sets import read_labels
from saevlm_fast.data.rows import Activations, open_activations
from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write, remove_leftovers
from saevlm_fast.look.geometry import covered
from saevlm_fast.look.image_rows import ImageTable, image_table
from saevlm_fast.look.looked import Looked, Subject, checked_sizes, look_at
from saevlm_fast.look.measured import measures_of, names_of
from saevlm_fast.look.names import check_same_images, known_words, name_latents, point, vocabulary
from saevlm_fast.look.page import Panel, data_scripts, index_of, one_file, write_folder
from saevlm_fast.look.settings import LARGEST_FILE, MOST_IN_ONE_FILE, ReportSettings
from saevlm_fast.look.spill import Spill
from saevlm_fast.look.sprites import Tiles, write_sheets
from saevlm_fast.look.store_images import StoreImages
from saevlm_fast.look.tables import read_latents_table
from saevlm_fast.outputs import REPLACEMENT, begin_replacement, output_lock, publish, settle
from saevlm_fast.provenance import check_rows_of, check_same_sae
from saevlm_fast.records import TEXT, Fields, Kind, read_record, write_record
from saevlm_fast.runtime import resolve_device
from saevlm_fast.sae import SparseAutoencoder, sae_digest
from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.towers.text import load_text_encoder

REPORT_FILE, FORMAT = "report.json", "saevlm-fast report"
PARTS = ("app", "data", "sprites")
_REPORT = Fields({"format": Kind(f"{FORMAT!r}", lambda value: value == FORMAT), "title": TEXT})


class Watcher(Protocol):
    """Who watches the work."""

    def step(self, what: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """A step begins; what is given is told how much is done."""
        ...

    def warn(self, text: str) -> None:
        """Something is not as it may have been meant."""
        ...


class Inputs(NamedTuple):
    """Opened and checked: the SAEs with their rows; embeddings; tables of scores and names."""

    subjects: list[Subject]
    embeddings: Activations | None
    scores: list[pa.Table | None]
    names: list[pa.Table | None]


class Made(NamedTuple):
    """What a report shows: its files' bytes, images shown and missing, latents."""

    output: Path
    n_bytes: int
    n_images: int
    n_missing: int
    n_latents: int
    problem: str | None


def open_inputs(settings: ReportSettings, warn: Callable[[str], None]) -> Inputs:
    """Everything that is read. ValueError: what is damaged, not there, or does not belong together."""
    device, shared = resolve_device(settings.device), None
    if settings.activations is not None:
        shared = open_activations(settings.activations)
    subjects: list[Subject] = []
    tables: dict[str, Any] = {}
    for i, path in enumerate(settings.sae):
        sae = SparseAutoencoder.from_pretrained(path, device=device)
        rows: Activations | StoredCodes | None = open_codes(settings.codes[i]) if settings.codes else shared
        assert rows is not None  # the settings have seen to it
        if isinstance(rows, StoredCodes):
            check_same_sae(rows, Path(path), sae)
        if (doubt := check_rows_of(sae, rows)) is not None:
            warn(f"{doubt}; its codes of {rows.path} may mean little")
        key = str(rows.path)
        tables[key] = tables.get(key) or image_table(rows)
        labels = _labels(settings.labels, tables[key])
        encoder = None if isinstance(rows, StoredCodes) else sae
        subjects.append(Subject(_name_of(settings.sae, i), str(path), sae, rows, encoder, tables[key], labels))
        checked_sizes(subjects[-1])
    _check_same_pictures(subjects, settings.images, warn)
    n_latents = sum(each.sae.config.d_sae for each in subjects)
    small = n_latents <= MOST_IN_ONE_FILE or not settings.single_file
    require(small, f"single_file: {n_latents:,} latents, at most {MOST_IN_ONE_FILE:,}; give a directory for a folder")
    embeddings = None if settings.embeddings is None else open_activations(settings.embeddings)
    if embeddings is not None:
        for subject in subjects:
            check_same_images(subject.table, embeddings, str(subject.rows.path))
    return Inputs(subjects, embeddings, _tables(settings.scores, subjects), _tables(settings.names, subjects))


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
    if not paths:
        return [None] * len(subjects)
    return [read_latents_table(Path(path), each.sae.config.d_sae) for path, each in zip(paths, subjects)]


def check_report_output(settings: ReportSettings) -> None:
    """ValueError: a report, or something else, is where this one would go. Nothing is touched."""
    output = settings.output
    if settings.single_file:
        there = output.is_symlink() or output.exists()
        require(not there or settings.force, f"output: {output} already exists; --force replaces it")
        return
    require(output.is_dir() or not output.exists(), f"output: {output} is not a directory")
    is_report = (output / REPORT_FILE).exists()
    require(not is_report or settings.force, f"output: {output} already holds a report; --force replaces it")
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    others = [name for name in names if not name.startswith(".")]
    require(is_report or not others, f"output: {output} is not empty and holds no report")
    if is_report:
        read_record(output / REPORT_FILE, _REPORT)


def make_report(settings: ReportSettings, watcher: Watcher, title: str | None = None) -> Made:
    """All of it.

    Raises:
        ValueError: inputs that cannot be used, an output that is there.
        Interrupted: the same call goes on where it stopped.
    """
    if settings.single_file:
        return _single(settings, watcher, title)
    with output_lock(settings.output, directory=True):
        settle(settings.output, _remove_report)
        check_report_output(settings)
        remove_leftovers(settings.output)
        inputs = open_inputs(settings, watcher.warn)
        place = _workplace(settings.output, settings, inputs)
        made = _make(settings, inputs, place, watcher, title)
        shutil.rmtree(place / "work")
        publish(settings.output, _remove_report)
        return made._replace(output=settings.output)


def _single(settings: ReportSettings, watcher: Watcher, title: str | None) -> Made:
    output = settings.output
    folder = output.with_name(f".{output.stem}.making")
    with output_lock(output, directory=False):
        check_report_output(settings)
        inputs = open_inputs(settings, watcher.warn)
        folder.mkdir(exist_ok=True)
        made = _make(settings, inputs, _workplace(folder, settings, inputs), watcher, title)
        shutil.rmtree(folder)
        return made._replace(output=output, n_bytes=output.stat().st_size)


def _workplace(output: Path, settings: ReportSettings, inputs: Inputs) -> Path:
    """Where the new report is made: what an interrupted call of the same kind left, or an empty place."""
    place = output / REPLACEMENT
    made_of = {
        "saes": [sae_digest(Path(subject.path)) for subject in inputs.subjects],
        "rows": [str(subject.rows.path.absolute()) for subject in inputs.subjects],
        "digests": [_digest(subject.rows) for subject in inputs.subjects],
        "pool": settings.pool,
    }
    record = place / "work" / "settings.json"
    try:
        same = read_record(record, Fields()) == made_of
    except (ValueError, OSError):
        same = False
    if not same:
        begin_replacement(output)
        record.parent.mkdir()
        write_record(record, made_of)
    remove_leftovers(place)
    return place


def _digest(rows: Activations | StoredCodes) -> str:
    """Of what the rows are: a store's index names the digest of every shard; a matrix has its own."""
    if rows.index_file.is_file():
        return sha256(rows.index_file.read_bytes()).hexdigest()
    assert isinstance(rows, Activations)  # codes always have an index
    return rows.digest()


def _make(settings: ReportSettings, inputs: Inputs, place: Path, watcher: Watcher, title: str | None) -> Made:
    title = title or f"Latents of {', '.join(subject.name for subject in inputs.subjects)}"
    tiles, panels = Tiles(), []
    for i, subject in enumerate(inputs.subjects):
        panels.append(_panel(settings, inputs, i, place / "work" / f"s{i}", tiles, watcher))
        _place_tiles(panels[-1].looked, subject, tiles)
    images = StoreImages(inputs.subjects[0].rows.source, settings.images)
    if images.problem is not None and images.wanted:
        watcher.warn(f"{images.problem}; pictures are placeholders")
    with watcher.step("pictures", len(tiles)) as tell:
        region = partial(covered, inputs.subjects[0].rows.source)
        write_sheets(tiles, images, place / "sprites", settings.thumbnail, region, tell)
    notes = {"wanted": images.wanted, "problem": images.problem, "path": images.path}
    index = index_of(title, panels, tiles, settings.thumbnail, notes)
    n_latents = sum(panel.looked.size for panel in panels)
    with watcher.step("pages", None) as tell:
        if settings.single_file:
            _write_one(settings.output, title, panels, index, tiles, place)
        else:
            write_folder(place, title, data_scripts(index, panels, tiles))
            record = {"format": FORMAT, "title": title, "latents": n_latents, "images": len(tiles)}
            write_record(place / REPORT_FILE, record)
        tell(1)
    n_bytes = sum(file.stat().st_size for name in PARTS for file in (place / name).rglob("*") if file.is_file())
    missing = len(images.missing) if images.wanted else 0
    return Made(place, n_bytes, len(tiles), missing, n_latents, images.problem if images.wanted else None)


def _write_one(path: Path, title: str, panels: list[Panel], index: dict[str, Any], tiles: Tiles, place: Path) -> None:
    with atomic_write(path) as temporary:
        text = "".join(one_file(title, data_scripts(index, panels, tiles), place / "sprites", tiles))
        n_bytes = len(text.encode())
        fits = n_bytes <= LARGEST_FILE
        require(fits, f"single_file: {n_bytes:,} bytes, at most {LARGEST_FILE:,}; give a directory for a folder")
        temporary.write_text(text, encoding="utf-8")


def _panel(settings: ReportSettings, inputs: Inputs, i: int, work: Path, tiles: Tiles, watcher: Watcher) -> Panel:
    subject, bars = inputs.subjects[i], _Bars(watcher, inputs.subjects[i])
    try:
        looked, codes = look_at(
            subject, work, settings.pool, settings.n, settings.per_band, settings.batch_size, bars.begin
        )
        ms_S, names = _ms(inputs, i, codes, bars), inputs.names[i]
        if names is None and settings.text_model is not None and inputs.embeddings is not None:
            names = _names(settings, inputs, subject, bars)
    finally:
        bars.close()
    own, words = names_of(names, looked.size)
    place = lambda number: tiles.place(subject.table.name(number), number, _label(subject, number))  # noqa: E731
    return Panel(looked, measures_of(looked, ms_S, inputs.scores[i], names), own, words, place)


def _label(subject: Subject, number: int) -> str | None:
    return None if subject.labels is None else subject.labels[number].as_py()


def _place_tiles(looked: Looked, subject: Subject, tiles: Tiles) -> None:
    """Latent by latent: what a latent needs lies together."""
    for latent in range(looked.size):
        pairs = [looked.shown.tops[latent], *reversed(looked.shown.bands[latent])]
        numbers = [*looked.shown.images_W[np.concatenate(pairs)].tolist()]
        if numbers:
            numbers += looked.stats.silent[latent]
        for number in numbers:
            tiles.place(subject.table.name(number), number, _label(subject, number))


def _ms(inputs: Inputs, i: int, codes: Spill, bars: "_Bars") -> np.ndarray | None:
    """The score of every latent, unless a table has it or there are no embeddings."""
    scores = inputs.scores[i]
    if inputs.embeddings is None or (scores is not None and "ms" in scores.column_names):
        return None
    tell, sums = bars.begin("score"), StreamedScore(codes.d_sae)
    chunks = zip(codes.chunks(4096), inputs.embeddings.chunks(4096))
    for (start, chunk), (_, emb_nE) in chunks:
        sums.update(chunk, emb_nE)
        tell(start + chunk.n_rows)
    return sums.result().ms.numpy()


def _names(settings: ReportSettings, inputs: Inputs, subject: Subject, bars: "_Bars") -> pa.Table:
    assert settings.text_model is not None
    assert inputs.embeddings is not None
    encoder = load_text_encoder(settings.text_model, resolve_device(settings.device))
    words, _ = known_words(vocabulary(None, "a photo of {}"), encoder)
    rows = (subject.rows, subject.encoder, inputs.embeddings, settings.pool)
    pointed = point(*rows, batch_rows=settings.batch_size, on_images=bars.begin("name"))
    return name_latents(pointed, encoder, words, 5).table(5)


class _Bars:
    """One bar after the other: the next ends the one before."""

    def __init__(self, watcher: Watcher, subject: Subject):
        self.watcher, self.subject = watcher, subject
        self._open: AbstractContextManager[Callable[[int], None]] | None = None

    def begin(self, what: str) -> Callable[[int], None]:
        self.close()
        total = self.subject.sae.config.d_sae if "neighbours" in what else self.subject.table.n_images
        self._open = self.watcher.step(f"{self.subject.name}: {what}", 2 * total if what == "count" else total)
        return self._open.__enter__()

    def close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None


def _remove_report(output: Path) -> None:
    """Deletes what a report wrote, and nothing else."""
    for name in PARTS:
        part = output / name
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
    for name in ("index.html", REPORT_FILE, "settings.toml"):
        (output / name).unlink(missing_ok=True)
