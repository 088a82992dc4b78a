"""saevlm-fast ms-score: how monosemantic every latent is."""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import Enough, Stopwatch, check_writable, disk_figures, memory_figures
from saevlm_fast.cli.ranks import device_of_rank, first_rank_first, joined_ranks, leads, n_processes
from saevlm_fast.cli.record import Record, settings_path
from saevlm_fast.cli.same_call import check_same_call, check_same_data, digest_of
from saevlm_fast.cli.scenes import latest_run, scene_widths, scenes, scenes_of
from saevlm_fast.cli.terminal import Bar, say, warn
from saevlm_fast.config import DEVICE_HELP, RunOptions
from saevlm_fast.errors import require
from saevlm_fast.formats.places import SAE_HELP, is_remote
from saevlm_fast.settings import paths, same_as, setting

if TYPE_CHECKING:
    import torch

    from saevlm_fast.data.codes import StoredCodes
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.peers import Peers
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.scoring.controls import Comparison
    from saevlm_fast.scoring.monosemanticity import MonosemanticityScores

_ROW_BYTES = 160  # of a scores table, at most
_BESIDE_SUMS = "the program, the SAE and the rows at hand"
_SCENES = Path("the box's scenes")  # where a dry run does not harvest them


@dataclass(frozen=True, kw_only=True)
class ScoreArguments(WorkOptions):
    """Options of `saevlm-fast ms-score`."""

    embeddings: tuple[Path, ...] = setting(
        (),
        help="Image embeddings, row i of image i: store or matrix file; several encoders: A,B, or the option again.",
        shown="the box's test scenes",
        parse=paths,
        remote=True,
    )
    output: Path | None = setting(None, help="Scores: FILE.parquet, FILE.csv or FILE.json.", shown="SAE/scores.parquet")
    activations: Path | None = setting(
        None,
        help="Activations, row i of image i: store or matrix file; with --sae or --raw.",
        instead_of=("codes",),
        remote=True,
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
        remote=True,
    )
    similarity: Literal["cosine", "dot", "rbf"] = setting("cosine", help="Of two embeddings.", paper="cosine")
    gamma: float | None = setting(None, help="Of rbf, exp(-gamma |e_i - e_j|^2).", shown="1 / E")
    variant: Literal["paper", "visaebench", "tms", "patch"] = setting(
        "paper",
        help="The paper's score; visaebench, of each latent's 16 most active images; tms, without an encoder; patch, "
        "of rows that are patches. Only the paper's has a null; it and patch have intervals.",
        paper="paper",
    )
    pool: Literal["none", "max", "mean"] = setting(
        "none", help="Rows of one image in a store are pooled; none: there is one row an image."
    )
    one_pass: bool = setting(
        False,
        help="Scores alone: no intervals, no null, half the memory. The sums take a third of the time, the whole "
        "command .7 to .9 of it (docs/how-to/score.md).",
    )
    controls: int = setting(
        0,
        help="Untrained SAEs of the same L0, each of another seed, scored beside it and compared at the same number of "
        "images a latent.",
        at_least=0,
        at_most=64,
    )
    seed: int = setting(0, help="Of what is drawn: images of the null, pairs of tms, untrained SAEs.", at_least=0)
    batch_size: int = setting(4096, help="Rows read and encoded at a time.", at_least=1)
    force: bool = setting(False, help="Replace --output once the new table is whole.", recorded=False)
    device: str = setting("auto", help=DEVICE_HELP)
    collective_timeout: float = same_as(RunOptions, "collective_timeout", recorded=False)

    def check(self) -> None:
        super().check()
        require(
            (self.sae is not None) + self.raw + (self.codes is not None) <= 1,
            "sae: give either --sae DIR or --raw, with --activations, or --codes alone",
        )
        require(self.activations is None or self.codes is None, "activations: excluded by --codes")
        own = self.activations is not None or self.codes is not None
        require(
            own == bool(self.embeddings) or (own and self.variant == "tms"),
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
        self._check_variant()
        elsewhere = self.sae is not None and is_remote(self.sae)
        must = self.output is not None or not (self.raw or self.codes is not None or elsewhere)
        require(must, "output: needed with --raw, --codes or an SAE of the Hub")

    def _check_variant(self) -> None:
        if self.variant != "paper":
            require(self.similarity == "cosine", f"similarity: {self.similarity}; variant {self.variant} has its own")
            most = {"visaebench": 1, "patch": 1, "tms": 0}[self.variant]
            given = len(self.embeddings)
            require(given <= max(most, 1), f"embeddings: {given} encoders; variant {self.variant} takes {most}")
            require(self.variant == "visaebench" or not self.raw, f"raw: variant {self.variant} is of codes")
        if self.controls:
            require(
                self.variant == "paper" and self.similarity != "rbf" and not self.one_pass,
                "controls: go with the paper's score in two passes, by cosine or dot",
            )
            require(not self.raw and self.codes is None, "controls: an untrained SAE stands beside an SAE, --sae")
        require(self.variant != "patch" or self.pool == "none", "pool: variant patch takes the patches themselves")
        require(self.similarity != "rbf" or len(self.embeddings) < 2, "embeddings: one encoder at a time with rbf")

    @property
    def in_two_passes(self) -> bool:
        """With intervals and null: rbf is no inner product, and the other variants have none."""
        return not self.one_pass and self.similarity != "rbf" and self.variant == "paper"

    @property
    def second_pass(self) -> float:
        """How long a second pass takes, in first ones: with intervals and null twice as long (docs/how-to/score.md)."""
        again = self.variant == "visaebench" or (self.variant == "patch" and not self.one_pass)
        return 2.0 if self.in_two_passes else float(again)


@dataclass(frozen=True)
class Sources:
    """What is scored, and where the scores go, once nothing is left open.

    Attributes:
        rows: activations, or codes if `coded`. embeddings: of the same images, by each encoder.
        sae: that encodes the rows; None for raw neurons and for codes.
    """

    rows: Path
    embeddings: tuple[Path, ...]
    sae: Path | None
    coded: bool
    output: Path

    @classmethod
    def of(cls, options: ScoreArguments, sae: Path | None, output: Path) -> "Sources":
        """The user's own rows, or the box's test scenes. sae, output: of where_to()."""
        rows = options.codes or options.activations
        if rows is not None:
            return cls(rows, options.embeddings, sae, options.codes is not None, output)
        if options.dry_run:  # which does not harvest
            scenes_of(sae)
            return cls(_SCENES, (_SCENES,), sae, False, output)
        there = scenes("test", sae, options.device)
        return cls(there.activations, (there.embeddings,), sae, False, output)

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
        return sae | rows | {"embeddings": ", ".join(str(path) for path in self.embeddings)}

    @property
    def encoders(self) -> list[str]:
        """A name for each of the embeddings: that of its file, numbered where two have the same."""
        stems = [path.stem for path in self.embeddings]
        return [stem if stems.count(stem) == 1 else f"{stem}_{i + 1}" for i, stem in enumerate(stems)]


def where_to(options: ScoreArguments) -> tuple[Path | None, Path]:
    """The SAE, which may be that of the latest run, and where the scores go. ValueError: they cannot go there."""
    from saevlm_fast.scoring.tables import check_scores_path

    on_scenes = options.codes is None and options.activations is None and not options.raw
    sae = options.sae or (latest_run() if on_scenes else None)
    if options.output is None and sae is not None:
        require(sae.exists(), f"sae: {sae}: no such file or folder")
        require(sae.is_dir(), f"output: needed with an SAE that is a file, {sae}")
    output = options.output or (None if sae is None else sae / "scores.parquet")
    assert output is not None  # the options have seen to it
    return sae, check_scores_path(output)


@dataclass(frozen=True)
class Opened:
    """The sources, opened on a device."""

    rows: "Activations | StoredCodes"
    embeddings: "dict[str, Activations]"
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
        embeddings = {name: open_activations(path) for name, path in zip(sources.encoders, sources.embeddings)}
        return cls(rows, embeddings, sae, target)

    @property
    def n_latents(self) -> int:
        """Of the SAE or the codes; neurons of the activations without either."""
        if self.sae is not None:
            return self.sae.config.d_sae
        return getattr(self.rows, "d_sae", 0) or getattr(self.rows, "d", 0)

    def n_images(self, options: ScoreArguments) -> int:
        """How many images a pass counts: its rows, or the images that neighbouring rows are of."""
        from saevlm_fast.scoring.source import count_images

        several = (options.pool != "none" or options.variant == "patch") and self.rows.has_items
        return count_images(self.rows, range(self.rows.n_rows)) if several else self.rows.n_rows

    @property
    def digests(self) -> dict[str, Any]:
        """Of all that is read."""
        from saevlm_fast.measures.measure import weights_digest

        return {
            "activations": digest_of(self.rows),
            "embeddings": [digest_of(each) for each in self.embeddings.values()],
            "sae": None if self.sae is None else weights_digest(self.sae),
        }

    def score(self, options: ScoreArguments, on_rows: Callable[[int], None], peers: "Peers | None" = None) -> "Scored":
        """One pass over the rows, or two; two for each control too. peers: the ranks that share the images."""
        pool = None if options.pool == "none" else options.pool
        common: dict[str, Any] = {"batch_rows": options.batch_size, "device": self.device, "on_rows": on_rows}
        common["peers"] = peers
        if options.controls:
            from saevlm_fast.scoring.controls import compare_with_untrained

            rows, sae, n = cast("Activations", self.rows), cast("SparseAutoencoder", self.sae), options.controls
            more = common | {"pool": pool, "similarity": options.similarity, "seed": options.seed}
            comparisons = compare_with_untrained(rows, self.embeddings, sae, n_controls=n, **more)
            return Scored({name: each.trained for name, each in comparisons.items()}, comparisons)
        if options.in_two_passes:
            from saevlm_fast.scoring.trust import trusted_scores

            more = common | {"pool": pool, "similarity": options.similarity, "seed": options.seed}
            return Scored(dict(trusted_scores(self.rows, self.embeddings, self.sae, **more)))
        return Scored(self._one_pass(options, pool, common))

    def _one_pass(
        self, options: ScoreArguments, pool: Any, common: dict[str, Any]
    ) -> "dict[str, MonosemanticityScores]":
        from saevlm_fast.scoring.monosemanticity import stream
        from saevlm_fast.scoring.patch_score import patch_score
        from saevlm_fast.scoring.source import ScoredImages
        from saevlm_fast.scoring.variants import tms_score, visaebench_score

        if options.variant == "tms":
            common.pop("device")
            return {"": tms_score(self.rows, self.sae, pool=pool, seed=options.seed, **common)}
        if options.variant == "paper":
            more: dict[str, Any] = {"batch_rows": common.pop("batch_rows"), "peers": common.pop("peers")}
            images = ScoredImages(self.rows, self.embeddings, self.sae, pool=pool, kept_bytes=0, **more)
            sums = stream(images, options.similarity, options.gamma, **common)
            return {name: each.result() for name, each in sums.items()}
        (name, embeddings), *_ = self.embeddings.items()
        if options.variant == "patch":
            return {name: patch_score(self.rows, embeddings, self.sae, intervals=not options.one_pass, **common)}
        return {name: visaebench_score(self.rows, embeddings, self.sae, pool=pool, **common)}


@dataclass(frozen=True)
class Scored:
    """Scores by each encoder, the first of which the table and the summary are about; with controls, comparisons."""

    scores: "dict[str, MonosemanticityScores]"
    comparisons: "dict[str, Comparison]" = field(default_factory=dict)

    @property
    def main(self) -> "MonosemanticityScores":
        """By the first encoder."""
        return next(iter(self.scores.values()))


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
    n, n_latents, width = opened.rows.n_rows, opened.n_latents, sum(each.d for each in opened.embeddings.values())
    stopwatch, start = Stopwatch(), time.perf_counter()
    with suppress(Enough):
        opened.score(options, stopwatch)
    an_image, tried = stopwatch.seconds_each, time.perf_counter() - start
    # What is stopped within the first pass cannot say how long the second takes.
    as_first_ones = (1 + options.second_pass) * (1 + options.controls)
    n_images = opened.n_images(options)
    seconds = as_first_ones * (tried if an_image is None else an_image * n_images) / n_processes()
    rbf = options.similarity == "rbf"  # gathers first; what follows, over pairs of images, is not timed
    n_sums = 2 * (1 + options.controls) if options.in_two_passes else 1
    sums = 4 * n_images * width if rbf else 8 * n_latents * width * n_sums
    return Plan(
        f"Monosemanticity Score ({options.similarity}) of {n_latents:,} {sources.name}",
        {
            "rows": n,
            "latents": n_latents,
            "embedding_width": width,
            **memory_figures(opened.device, sums, without=_BESIDE_SUMS),
            **disk_figures(sources.output, _ROW_BYTES * n_latents),
            "gathering_seconds" if rbf else "time_seconds": seconds,
        },
    )


def _plan_of_scenes(options: ScoreArguments, sources: Sources) -> Plan:
    """Of scenes that may not be harvested yet, so nothing is timed."""
    from saevlm_fast.demo.scene_stores import N_SCENES
    from saevlm_fast.formats.sae_header import read_sae_header
    from saevlm_fast.runtime import resolve_device

    width, projected = scene_widths()
    n_latents = width if sources.sae is None else read_sae_header(sources.sae)[0].d_sae
    return Plan(
        f"Monosemanticity Score ({options.similarity}) of {n_latents:,} {sources.name}, on the box's test scenes",
        {
            "rows": N_SCENES["test"],
            "latents": n_latents,
            "embedding_width": projected,
            **memory_figures(resolve_device(options.device), 8 * n_latents * projected, without=_BESIDE_SUMS),
            **disk_figures(sources.output, _ROW_BYTES * n_latents),
            "time": "not estimated: the scenes may have to be harvested",
        },
    )


@command("ms-score", plan=plan, shared=True)
def ms_score(options: ScoreArguments) -> dict[str, Any] | None:
    """Monosemanticity Score of every latent (or raw neuron), with its interval and chance, in two passes.

    Without arguments: of the latest run below runs/, on scenes of the box that it was not trained on. Under torchrun,
    ranks share the images.
    """
    from saevlm_fast.outputs import check_absent, output_lock

    with joined_ranks(options.device, options.collective_timeout) as peers, ExitStack() as locks:
        check_same_call(peers, options)
        sae, output = where_to(options)
        if leads(peers):
            locks.enter_context(output_lock(output, directory=False))
            check_absent([output, settings_path(output)], options.force)
        sources = first_rank_first(peers, lambda: Sources.of(options, sae, output))
        return _ms_score(options, sources, peers)


def _ms_score(options: ScoreArguments, sources: Sources, peers: "Peers | None") -> dict[str, Any] | None:
    from saevlm_fast.cli.score_report import figures_of, print_scores
    from saevlm_fast.scoring.tables import scores_table, write_table

    opened = Opened.of(sources, device_of_rank(options.device, peers))
    if peers is not None:
        check_same_data(peers, opened.digests)
    passes = (1 + options.controls) * (2 if options.second_pass else 1)
    total = passes * opened.n_images(options) if leads(peers) else None
    with Bar("score", total, "images") as bar:
        scored = opened.score(options, bar.update, peers)
    if not leads(peers):
        return None
    write_table(scores_table(scored.scores, sources.metadata), sources.output)
    as_done = replace(options, sae=sources.sae, output=sources.output)
    Record("ms-score", as_done, sources.output, **sources.metadata, rows=opened.rows.n_rows).write()
    print_scores(scored.scores, scored.comparisons, sources.name)
    say(f"wrote {sources.output}")
    return {
        "output": str(sources.output),
        **sources.metadata,
        **figures_of(scored.scores, scored.comparisons),
    }
