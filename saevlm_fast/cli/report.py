"""saevlm-fast report: pages about SAEs that open offline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.looking import timed
from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, disk_figures, memory_figures
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.terminal import Bar, say, warn
from saevlm_fast.errors import goes_on
from saevlm_fast.look.settings import ReportSettings

if TYPE_CHECKING:
    from saevlm_fast.look.report import Made

_THUMBNAIL_BYTES, _LATENT_BYTES = 4000, 3000  # on the disk, about


@dataclass(frozen=True, kw_only=True)
class ReportArguments(ReportSettings, WorkOptions):
    """Options of `saevlm-fast report`."""


class BarWatcher:
    """A bar for every step."""

    @contextmanager
    def step(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        with Bar(what, total) as bar:
            yield bar.update

    def warn(self, text: str) -> None:
        warn(text)


def plan(options: ReportArguments) -> Plan:
    """What would be shown; the time of encoding from the second batch of rows."""
    from saevlm_fast.look.report import check_report_output, open_inputs
    from saevlm_fast.scoring.image_rows import image_chunks

    check_writable(options.output)
    check_report_output(options.part(ReportSettings))
    inputs = open_inputs(options.part(ReportSettings), warn)
    subject = inputs.subjects[0]
    n_latents = sum(each.sae.config.d_sae for each in inputs.subjects)
    n_images, pictures = subject.table.n_images, options.n + 10 * options.per_band

    def encode(on: Callable[[int], None]) -> None:
        chunks = image_chunks(subject.rows, subject.encoder, subject.table, options.pool, options.batch_size)
        for chunk in chunks:
            on(chunk.first + chunk.codes.n_rows)

    n_shown = min(n_images, n_latents * pictures)
    return Plan(
        f"a report of {n_latents:,} latents of {', '.join(options.sae)}",
        {
            "images": n_images,
            "rows_per_image": subject.table.rows_per_image,
            "latents": n_latents,
            **memory_figures(subject.sae.b_dec.device, subject.sae.config.d_sae * (800 + 60 * pictures)),
            **disk_figures(options.output, _THUMBNAIL_BYTES * n_shown + _LATENT_BYTES * n_latents),
            "encoding_seconds": timed(encode, n_images) * len(inputs.subjects),
        },
    )


@command("report", plan=plan)
def report(options: ReportArguments) -> dict[str, Any]:
    """Pages about what latents see, that open offline: pictures, heat maps, measures, names. Interrupted, the same
    command goes on."""
    from saevlm_fast.look.report import make_report
    from saevlm_fast.outputs import output_lock

    with output_lock(options.output, directory=not options.single_file):
        with goes_on():
            made = make_report(options.part(ReportSettings), BarWatcher())
        Record("report", options, options.output, latents=made.n_latents, images=made.n_images).write()
    return _told(made, options)


def _told(made: "Made", options: ReportArguments) -> dict[str, Any]:
    if made.n_missing:
        missing = f"{made.n_missing:,} of the {made.n_shown:,} images are missing, shown as placeholders"
        warn(f"{missing}; --images re-roots them")
    for name, why in made.left_out.items():
        say(f"left out: {name}: {why}")
    page = options.output if options.single_file else options.output / "index.html"
    shown = f"{made.n_shown:,} of {made.n_images:,} images shown"
    say(f"{made.n_latents:,} latents, {shown}, {made.n_bytes / 1e6:.1f} MB; open {page}")
    return {
        "output": str(options.output),
        "page": str(page),
        "latents": made.n_latents,
        "images": made.n_images,
        "images_shown": made.n_shown,
        "missing": made.n_missing,
        "bytes": made.n_bytes,
        "left_out": made.left_out,
    }
