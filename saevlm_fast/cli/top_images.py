"""saevlm-fast top-images: the images on which latents are most active, as a table and as a picture."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.looking import LookArguments, Looked, timed
from saevlm_fast.cli.options import Plan, command
from saevlm_fast.cli.planning import check_writable, disk_figures, memory_figures
from saevlm_fast.cli.record import Record, settings_path
from saevlm_fast.cli.terminal import Bar, say, warn
from saevlm_fast.errors import require
from saevlm_fast.look.chosen import check_latents, chosen_latents
from saevlm_fast.settings import setting

if TYPE_CHECKING:
    from saevlm_fast.look.tops import Captions, LatentTops

_TABLES = (".parquet", ".csv", ".json")
TABLE, SHEET = "top_images.parquet", "latents-{:04d}.png"


@dataclass(frozen=True, kw_only=True)
class TopImagesArguments(LookArguments):
    """Options of `saevlm-fast top-images`."""

    title = "Which latents"
    output: Path = setting(
        help="Directory for the table and contact sheets of 50 latents; or FILE.png, FILE.parquet, FILE.csv, FILE.json."
    )
    latents: str = setting(
        "top:50", help="0:100, 3,17,40, or top:50 (by --scores, else by largest activation).", parse=check_latents
    )
    n: int = setting(16, help="Images of each.", paper="16", at_least=1, at_most=256)
    scores: Path | None = setting(None, help="Table of ms-score, shown and used by top:N.")
    images: str | None = setting(
        None,
        help="Where the images are, if not where the store says; none: do not show them.",
        shown="as stored",
        place="images",
    )

    @property
    def is_directory(self) -> bool:
        return self.output.suffix.lower() not in (".png", *_TABLES)

    @property
    def files(self) -> list[Path]:
        """What must not be there without --force."""
        return [self.output / TABLE if self.is_directory else self.output, settings_path(self.output)]


def check(options: TopImagesArguments) -> None:
    """ValueError: the output may not be written, or is there."""
    from saevlm_fast.outputs import check_absent

    check_writable(options.output)
    parent = options.output.absolute().parent
    require(options.is_directory or parent.is_dir(), f"output: {str(parent)!r} is not a directory")
    check_absent(options.files, options.force)
    if options.is_directory and options.output.is_dir():
        ours = (options.output / TABLE).exists()
        empty = all(path.name.startswith(".") for path in options.output.iterdir())
        require(ours or empty, f"output: {options.output} is not empty and holds no {TABLE}")


def plan(options: TopImagesArguments) -> Plan:
    """What would be shown; the time from the second batch of rows."""
    from saevlm_fast.look.store_images import StoreImages
    from saevlm_fast.look.tops import latent_tops

    check(options)
    looked = Looked.of(options)
    if options.images is not None:
        StoreImages(looked.rows.source, options.images)  # a place that is none is refused
    d_sae, n_rows = looked.sae.config.d_sae, looked.rows.n_rows
    run = lambda on: latent_tops(  # noqa: E731
        looked.rows, looked.encoder, options.n, options.pool, batch_rows=options.batch_size, on_images=on
    )
    return Plan(
        f"the {options.n} top images of latents {options.latents} of {options.sae}",
        {
            "rows": n_rows,
            "latents": d_sae,
            **memory_figures(looked.sae.b_dec.device, 24 * options.n * d_sae),
            **disk_figures(options.output, 40 * options.n * d_sae),
            "time_seconds": timed(run, n_rows),
        },
    )


@command("top-images", plan=plan)
def top_images(options: TopImagesArguments) -> dict[str, Any]:
    """The images on which latents are most active: a contact sheet and a table."""
    from saevlm_fast.outputs import output_lock, settle

    with output_lock(options.output, directory=options.is_directory):
        if options.is_directory:
            settle(options.output, _remove_old)
        check(options)
        return _top_images(options)


def _top_images(options: TopImagesArguments) -> dict[str, Any]:
    from saevlm_fast.look.store_images import StoreImages
    from saevlm_fast.look.tops import latent_tops

    looked = Looked.of(options)
    images = StoreImages(looked.rows.source, options.images)
    scores = {} if options.scores is None else _scores(options.scores, looked.sae.config.d_sae)
    with Bar("look", unit="images") as bar:
        found = latent_tops(
            looked.rows,
            looked.encoder,
            options.n,
            options.pool,
            batch_rows=options.batch_size,
            on_images=bar.update,
        )
    latents = chosen_latents(options.latents, _ranks(found, scores))
    written = _write(options, found, latents, images, _captions(options, found, scores))
    if images.missing and images.wanted:
        first, why = next(iter(images.missing.items()))
        warn(f"{len(images.missing):,} images are missing, shown as grey squares; the first: {first}: {why}")
    Record("top-images", options, options.output, images=found.table.n_images, latents=len(latents)).write()
    say(f"{len(latents):,} latents, {found.table.n_images:,} images; wrote {', '.join(map(str, written))}")
    return {
        "output": str(options.output),
        "files": [str(path) for path in written],
        "latents": len(latents),
        "chosen_latents": latents,
        "images": found.table.n_images,
        "missing": len(images.missing),
    }


def _write(
    options: TopImagesArguments, found: "LatentTops", latents: list[int], images: Any, captions: "Captions"
) -> list[Path]:
    from saevlm_fast.look.contact_sheet import save_sheet
    from saevlm_fast.look.tops import ROWS_OF_A_SHEET, tops_sheet, tops_table
    from saevlm_fast.outputs import begin_replacement, publish
    from saevlm_fast.scoring.tables import write_table

    output = options.output
    metadata = {"sae": str(options.sae), "rows": str(options.codes or options.activations)}
    draw = partial(tops_sheet, found, images=images, captions=captions, n=options.n)
    if not options.is_directory and output.suffix.lower() == ".png":
        most = 4 * ROWS_OF_A_SHEET
        require(len(latents) <= most, f"latents: {len(latents)} do not fit one picture of {most}; give a directory")
        save_sheet(draw(latents), output)
        return [output]
    table = tops_table(found, latents).replace_schema_metadata(metadata)
    if not options.is_directory:
        write_table(table, output)
        return [output]
    place = begin_replacement(output)  # what was there stays until all of the new is whole
    parts = [latents[start : start + ROWS_OF_A_SHEET] for start in range(0, len(latents), ROWS_OF_A_SHEET)]
    for number, part in enumerate(parts):
        save_sheet(draw(part), place / SHEET.format(number))
    write_table(table, place / TABLE)
    publish(output, _remove_old)
    return [*(output / SHEET.format(number) for number in range(len(parts))), output / TABLE]


def _remove_old(output: Path) -> None:
    """Deletes what this command wrote into a directory, and nothing else."""
    for old in (*output.glob("latents-[0-9][0-9][0-9][0-9].png"), output / TABLE, settings_path(output)):
        old.unlink(missing_ok=True)


def _scores(path: Path, d_sae: int) -> dict[int, float]:
    """latent -> ms. ValueError: no such table, or one of another SAE."""
    from saevlm_fast.look.tables import read_latents_table

    table = read_latents_table(path, d_sae)
    require("ms" in table.column_names, f"scores: {path} has no column ms")
    return {int(k): float(v) for k, v in zip(table["latent"].to_pylist(), table["ms"].to_pylist()) if v is not None}


def _ranks(found: "LatentTops", scores: dict[int, float]) -> Any:
    """[S]: by score where there are any, else by largest activation; what never fires comes never."""
    import math

    import torch

    ranks_S = found.max_S.clone()
    if scores:
        ranks_S.fill_(-torch.inf)
        for latent, ms in scores.items():
            ranks_S[latent] = -torch.inf if math.isnan(ms) else ms
    return ranks_S.masked_fill_(found.n_active_S == 0, -torch.inf)


def _captions(options: TopImagesArguments, found: "LatentTops", scores: dict[int, float]) -> "Captions":
    from saevlm_fast.look.tops import Captions

    rows = options.codes or options.activations
    several = "" if found.table.rows_per_image == 1 else f"; of an image's rows the {options.pool}"
    caption = f"{options.sae} on {rows}: {found.table.n_images:,} images, the most active first{several}."
    return Captions(f"Latents {options.latents}", caption, scores, {})
