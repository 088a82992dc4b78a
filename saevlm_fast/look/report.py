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

from saevlm_fast.data.codes import StoredCodes
from saevlm_fast.data.rows import Activations
from saevlm_fast.errors import require
from saevlm_fast.files import atomic_write, remove, remove_leftovers
from saevlm_fast.formats.sae_header import sae_digest
from saevlm_fast.look.inputs import Inputs, open_inputs
from saevlm_fast.look.looked import Looked, Subject, look_at
from saevlm_fast.look.measured import measures_of, names_of, steered_of, texts_of
from saevlm_fast.look.names import known_words, name_latents, point, vocabulary
from saevlm_fast.look.page import Panel, data_scripts, index_of, one_file, write_folder
from saevlm_fast.look.scored import encoder_of, image_scores
from saevlm_fast.look.settings import LARGEST_FILE, ReportSettings
from saevlm_fast.look.sprites import Tiles, write_sheets
from saevlm_fast.outputs import REPLACEMENT, begin_replacement, output_lock, publish, settle
from saevlm_fast.records import TEXT, Fields, Kind, read_record, write_record
from saevlm_fast.runtime import resolve_device
from saevlm_fast.scoring.geometry import covered
from saevlm_fast.towers.text import load_text_encoder

_TWICE = ("count", "score")  # passes over the images
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


class Made(NamedTuple):
    """What a report shows: its files' bytes, images, those shown, the missing among these, latents. left_out: of
    what it lacks, why."""

    output: Path
    n_bytes: int
    n_images: int
    n_shown: int
    n_missing: int
    n_latents: int
    problem: str | None
    left_out: dict[str, str]


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
        "saes": [each.path if each.is_made else sae_digest(Path(each.path)) for each in inputs.subjects],
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
    _remove_report(place)  # pages and pictures of an interrupted call may be more than this one's: with --images none
    remove_leftovers(place)
    return place


def _digest(rows: Activations | StoredCodes) -> str:
    """Of what the rows are: a store's index names the digest of every shard; a matrix has its own."""
    if rows.index_file.is_file():
        return sha256(rows.index_file.read_bytes()).hexdigest()
    assert isinstance(rows, Activations)  # codes always have an index
    return rows.digest()


def _make(settings: ReportSettings, inputs: Inputs, place: Path, watcher: Watcher, title: str | None) -> Made:
    title = title or f"Latents of {', '.join(subject.name for subject in inputs.subjects[: len(settings.sae)])}"
    tiles, panels = Tiles(), []
    for i in range(len(inputs.subjects)):
        panels.append(_panel(settings, inputs, i, place / "work" / f"s{i}", tiles, watcher))
    images = inputs.images
    if images.problem is not None and images.wanted:
        watcher.warn(f"{images.problem}; pictures are placeholders")
    with watcher.step("pictures", len(tiles)) as tell:
        region = partial(covered, inputs.subjects[0].rows.source)
        write_sheets(tiles, images, place / "sprites", settings.thumbnail, region, tell)
    notes = {"wanted": images.wanted, "problem": images.problem, "path": images.path}
    encoder = None if inputs.embeddings is None else encoder_of(inputs.embeddings)
    more = {"control": inputs.control, "encoder": encoder, "pool": settings.pool}
    index = index_of(title, panels, tiles, settings.thumbnail, notes) | more
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
    problem = images.problem if images.wanted else None
    n_images = inputs.subjects[0].table.n_images
    return Made(place, n_bytes, n_images, len(tiles), missing, n_latents, problem, _left_out(settings, inputs, panels))


def _left_out(settings: ReportSettings, inputs: Inputs, panels: list[Panel]) -> dict[str, str]:
    found, own = dict[str, str](), range(len(settings.sae))
    why = {panel.looked.grid: None for panel in panels if isinstance(panel.looked.grid, str)}
    if why:
        found["heat maps"] = "; ".join(map(str, why))
    if inputs.embeddings is None and any(not _scored(inputs.scores[i]) for i in own):
        found["MS"] = "no --embeddings"
    if settings.text_model is None and any(inputs.names[i] is None for i in own):
        found["names"] = "no --text-model (with --embeddings) and no --names"
    return found


def _scored(scores: pa.Table | None) -> bool:
    return scores is not None and "ms" in scores.column_names


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
        work_on = partial(look_at, subject, work, settings, inputs.taxonomy)
        looked, codes = work_on(bars.begin)
        scores, names = inputs.scores[i], inputs.names[i]
        if not _scored(scores):
            found = {} if inputs.embeddings is None else image_scores(codes, inputs.embeddings, bars.begin("score"))
        else:
            found = {}
        named = settings.text_model is not None and inputs.embeddings is not None and i != inputs.control
        if names is None and named:
            names = _names(settings, inputs, subject, bars)
    finally:
        bars.close()
    own, words = names_of(names, looked.size)
    tile_of_N = _place_tiles(looked, subject, tiles)
    measures = measures_of(looked, found, scores, names, inputs.steering[i])
    return Panel(looked, measures, own, words, texts_of(scores), steered_of(inputs.steering[i]), tile_of_N)


def _label(subject: Subject, number: int) -> str | None:
    return None if subject.labels is None else subject.labels[number].as_py()


def _place_tiles(looked: Looked, subject: Subject, tiles: Tiles) -> np.ndarray:
    """The tile of every image, -1 for none. They lie latent by latent: what a latent needs lies together."""
    numbers: list[np.ndarray] = [np.empty(0, np.int64)]
    for latent in range(looked.size):
        own = looked.shown.images_W[looked.shown.all_of(latent)]
        silent = looked.stats.silent[latent] if len(own) else []
        numbers.append(np.concatenate([own, np.array([*looked.missed(latent)[0], *silent], np.int64)]))
    found, first = np.unique(np.concatenate(numbers), return_index=True)
    tile_of_N = np.full(subject.table.n_images, -1)
    for number in found[first.argsort()].tolist():
        tile_of_N[number] = tiles.place(subject.table.name(number), number, _label(subject, number))
    return tile_of_N


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
        self._open = self.watcher.step(f"{self.subject.name}: {what}", 2 * total if what in _TWICE else total)
        return self._open.__enter__()

    def close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None


def _remove_report(output: Path) -> None:
    """Deletes what a report wrote, and nothing else."""
    for name in PARTS:
        remove(output / name)
    for name in ("index.html", REPORT_FILE, "settings.toml"):
        (output / name).unlink(missing_ok=True)
