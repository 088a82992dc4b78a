"""saevlm-fast ms-score: how monosemantic every latent is."""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import Enough, Stopwatch, check_writable, disk_figures, memory_figures
from saevlm_fast.cli.record import Record, settings_path
from saevlm_fast.cli.scenes import latest_run, scene_widths, scenes, scenes_of
from saevlm_fast.cli.terminal import Bar, print_table, say, warn
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.errors import require
from saevlm_fast.formats.hub import SAE_HELP, is_remote
from saevlm_fast.settings import setting

if TYPE_CHECKING:
    import torch

    from saevlm_fast.data.codes import StoredCodes
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.scoring.monosemanticity import MonosemanticityScores, ScoreSummary

_ROW_BYTES = 40  # of a scores table, at most
_SCENES = Path("the box's scenes")  # where a dry run does not harvest them


@dataclass(frozen=True, kw_only=True)
class ScoreArguments(WorkOptions):
    """Options of `saevlm-fast ms-score`."""

    embeddings: Path | None = setting(
        None, help="Image embeddings, row i of image i: store or matrix file.", shown="the box's test scenes"
    )
    output: Path | None = setting(None, help="Scores: FILE.parquet, FILE.csv or FILE.json.", shown="SAE/scores.parquet")
    activations: Path | None = setting(
        None, help="Activations, row i of image i: store or matrix file; with --sae or --raw.", instead_of=("codes",)
    )
    sae: Path | None = setting(
        None,
        help=SAE_HELP,
        shown="the latest run below runs/",
        instead_of=("raw", "codes"),
    )
    raw: bool = setting(
        False, help="Score the activations' own neurons instead of an SAE.", instead_of=("sae", "codes")
    )
    codes: Path | None = setting(
        None,
        help="Store of an SAE's codes, instead of --sae and --activations.",
        instead_of=("sae", "raw", "activations"),
    )
    similarity: Literal["cosine", "dot", "rbf"] = setting("cosine", help="Of two embeddings.", paper="cosine")
    gamma: float | None = setting(None, help="Of rbf, exp(-gamma |e_i - e_j|^2).", shown="1 / E")
    batch_size: int = setting(4096, help="Rows read and encoded at a time.", at_least=1)
    force: bool = setting(False, help="Replace --output once the new table is whole.", recorded=False)
    device: str = setting("auto", help=DEVICE_HELP)

    def check(self) -> None:
        super().check()
        require(
            (self.sae is not None) + self.raw + (self.codes is not None) <= 1,
            "sae: give either --sae DIR or --raw, with --activations, or --codes alone",
        )
        require(self.activations is None or self.codes is None, "activations: excluded by --codes")
        own = self.activations is not None or self.codes is not None
        require(
            own == (self.embeddings is not None),
            "embeddings: needed with --activations or --codes, and only with these",
        )
        require(
            self.activations is None or self.sae is not None or self.raw,
            "sae: give either --sae DIR or --raw with --activations",
        )
        require(
            self.gamma is None or self.similarity == "rbf",
            f"gamma: {self.gamma} is of rbf; the similarity is {self.similarity}",
        )
        elsewhere = self.sae is not None and is_remote(self.sae)
        must = self.output is not None or not (self.raw or self.codes is not None or elsewhere)
        require(must, "output: needed with --raw, --codes and an SAE of the Hub")


@dataclass(frozen=True)
class Sources:
    """What is scored, and where the scores go, once nothing is left open.

    Attributes:
        rows: activations, or codes if `coded`. embeddings: of the same images.
        sae: that encodes the rows; None for raw neurons and for codes.
    """

    rows: Path
    embeddings: Path
    sae: Path | None
    coded: bool
    output: Path

    @classmethod
    def of(cls, options: ScoreArguments, sae: Path | None, output: Path) -> "Sources":
        """The user's own rows, or the box's test scenes. sae, output: of where_to()."""
        rows = options.codes or options.activations
        if rows is not None and options.embeddings is not None:
            return cls(rows, options.embeddings, sae, options.codes is not None, output)
        if options.dry_run:  # which does not harvest
            scenes_of(sae)
            return cls(_SCENES, _SCENES, sae, False, output)
        there = scenes("test", sae, options.device)
        return cls(there.activations, there.embeddings, sae, False, output)

    @property
    def name(self) -> str:
        """Of what is scored."""
        if self.coded:
            return f"latents of {self.rows}"
        return "raw neurons" if self.sae is None else f"latents of {self.sae}"

    @property
    def metadata(self) -> dict[str, str]:
        """For the table."""
        rows = {"codes": str(self.rows)} if self.coded else {"activations": str(self.rows)}
        sae = {} if self.coded else {"sae": str(self.sae or "raw neurons")}
        return sae | rows | {"embeddings": str(self.embeddings)}


def where_to(options: ScoreArguments) -> tuple[Path | None, Path]:
    """The SAE, which may be that of the latest run, and where the scores go. ValueError: they cannot go there."""
    from saevlm_fast.scoring.tables import check_scores_path

    on_scenes = options.codes is None and options.activations is None and not options.raw
    sae = options.sae or (latest_run() if on_scenes else None)
    output = options.output or (None if sae is None else sae / "scores.parquet")
    assert output is not None  # the options have seen to it
    return sae, check_scores_path(output)


@dataclass(frozen=True)
class Opened:
    """The sources, opened on a device."""

    rows: "Activations | StoredCodes"
    embeddings: "Activations"
    sae: "SparseAutoencoder | None"
    device: "torch.device"

    @classmethod
    def of(cls, sources: Sources, device: str) -> "Opened":
        """ValueError: what is damaged, or not there."""
        from saevlm_fast.data.codes import open_codes
        from saevlm_fast.data.rows import open_activations
        from saevlm_fast.provenance import check_rows_of
        from saevlm_fast.runtime import resolve_device
        from saevlm_fast.sae import SparseAutoencoder

        target = resolve_device(device)
        rows = open_codes(sources.rows) if sources.coded else open_activations(sources.rows)
        sae = None if sources.sae is None else SparseAutoencoder.from_pretrained(sources.sae, device=target)
        if sae is not None and (doubt := check_rows_of(sae, rows)) is not None:
            warn(f"{doubt}; its codes of {sources.rows} may mean little")
        return cls(rows, open_activations(sources.embeddings), sae, target)

    @property
    def n_latents(self) -> int:
        """Of the SAE or the codes; neurons of the activations without either."""
        if self.sae is not None:
            return self.sae.config.d_sae
        return getattr(self.rows, "d_sae", 0) or getattr(self.rows, "d", 0)

    def score(self, options: ScoreArguments, on_rows: Any) -> "MonosemanticityScores":
        """One pass over the rows."""
        from saevlm_fast.scoring.monosemanticity import score

        return score(
            self.rows,
            self.embeddings,
            self.sae,
            similarity=options.similarity,
            gamma=options.gamma,
            batch_rows=options.batch_size,
            device=self.device,
            on_rows=on_rows,
        )


def plan(options: ScoreArguments) -> Plan:
    """What would be scored; the time from the second batch of rows."""
    from saevlm_fast.outputs import check_absent

    sae, output = where_to(options)
    check_writable(output)
    check_absent([output, settings_path(output)], options.force)
    sources = Sources.of(options, sae, output)
    if sources.rows == _SCENES:
        return _plan_of_scenes(options, sources)
    opened = Opened.of(sources, options.device)
    n, n_latents, width = opened.rows.n_rows, opened.n_latents, opened.embeddings.d
    stopwatch, start = Stopwatch(), time.perf_counter()
    with suppress(Enough):
        opened.score(options, stopwatch)
    a_row = stopwatch.seconds_each
    seconds = time.perf_counter() - start if a_row is None else a_row * n
    rbf = options.similarity == "rbf"  # gathers first; what follows, over pairs of images, is not timed
    sums = 4 * n * width if rbf else 8 * n_latents * width
    return Plan(
        f"Monosemanticity Score ({options.similarity}) of {n_latents:,} {sources.name}",
        {
            "rows": n,
            "latents": n_latents,
            "embedding_width": width,
            **memory_figures(opened.device, sums),
            **disk_figures(sources.output, _ROW_BYTES * n_latents),
            "gathering_seconds" if rbf else "time_seconds": seconds,
        },
    )


def _plan_of_scenes(options: ScoreArguments, sources: Sources) -> Plan:
    """Of scenes that may not be harvested yet, so nothing is timed."""
    from saevlm_fast.demo.scene_stores import N_SCENES
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import read_sae_header

    width, projected = scene_widths()
    n_latents = width if sources.sae is None else read_sae_header(sources.sae)[0].d_sae
    return Plan(
        f"Monosemanticity Score ({options.similarity}) of {n_latents:,} {sources.name}, on the box's test scenes",
        {
            "rows": N_SCENES["test"],
            "latents": n_latents,
            "embedding_width": projected,
            **memory_figures(resolve_device(options.device), 8 * n_latents * projected),
            **disk_figures(sources.output, _ROW_BYTES * n_latents),
            "time": "not estimated: the scenes may have to be harvested",
        },
    )


@command("ms-score", plan=plan)
def ms_score(options: ScoreArguments) -> dict[str, Any]:
    """Monosemanticity Score of every latent (or raw neuron), in one pass over the images.

    Without arguments: of the latest run below runs/, on scenes of the box that it was not trained on.
    """
    from saevlm_fast.outputs import check_absent, output_lock

    sae, output = where_to(options)
    with output_lock(output, directory=False):
        check_absent([output, settings_path(output)], options.force)
        return _ms_score(options, Sources.of(options, sae, output))


def _ms_score(options: ScoreArguments, sources: Sources) -> dict[str, Any]:
    from saevlm_fast.scoring.tables import write_scores

    opened = Opened.of(sources, options.device)
    with Bar("score", opened.rows.n_rows, "images") as bar:
        scores = opened.score(options, bar.update)
    write_scores(scores, sources.output, sources.metadata)
    as_done = replace(options, sae=sources.sae, output=sources.output)
    Record("ms-score", as_done, sources.output, **sources.metadata, rows=opened.rows.n_rows).write()
    summary = scores.summary()
    _print_summary(summary, sources.name)
    say(f"wrote {sources.output}")
    return {"output": str(sources.output), **sources.metadata, **_as_json(summary)}


def _as_json(summary: "ScoreSummary") -> dict[str, Any]:
    figures = asdict(summary)
    for name in ("best_latents", "worst_latents"):
        figures[name] = [{"latent": latent, "ms": ms} for latent, ms in figures[name]]
    return figures


def _print_summary(summary: "ScoreSummary", what: str) -> None:
    say(f"Monosemanticity Score ({summary.similarity}, {summary.n_images:,} images) of {what}")
    rows = [("mean +- std", f"{summary.mean:.4f} +- {summary.std:.4f}"), ("best", f"{summary.best:.4f}")]
    rows += [(f"quantile {q:g}", f"{value:.4f}") for q, value in summary.quantiles.items()]
    rows += [(status, f"{count:,}") for status, count in summary.counts.items()]
    print_table(("measure", "value"), rows)
    if not summary.best_latents:
        say(f"no latent has a defined score ({summary.n_images:,} images)")
        return
    for label, extremes in (("best", summary.best_latents), ("worst", summary.worst_latents)):
        listed = "  ".join(f"{latent}: {value:.3f}" for latent, value in extremes)
        say(f"{label} latents  {listed}")
