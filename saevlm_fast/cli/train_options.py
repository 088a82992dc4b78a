"""The options of `saevlm-fast train`, and the run that they make of activations."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from saevlm_fast.cli.options import WorkOptions
from saevlm_fast.cli.scenes import new_run_directory
from saevlm_fast.cli.sweep import expanded, named, names_of, one_of
from saevlm_fast.config import (
    EXPANSION,
    SELECTING,
    HarvestOptions,
    K,
    RunOptions,
    SAEConfig,
    SAESize,
    StreamSettings,
    TrainConfig,
)
from saevlm_fast.errors import require
from saevlm_fast.settings import same_as, setting, settings_of


@dataclass(frozen=True, kw_only=True)
class TrainArguments(SAESize, TrainConfig, StreamSettings, RunOptions, WorkOptions):
    """Options of `saevlm-fast train`."""

    title = "Data"
    resume_adds: ClassVar[bool] = True  # SAEs, to those of a list
    made_from: ClassVar = {
        "d_in": ("activations", "model"),
        "d_sae": ("d_sae", "expansion"),
        "group_sizes": ("groups",),
        "data": ("activations", "images"),
        "tower": ("model",),
        "weights of the tower": ("model",),
        "point": ("point", "layer"),
        "digest of the MonoLoss embeddings": ("mono_embeddings",),
    }

    activations: Path | None = setting(
        None,
        help="Activation store, or a matrix [N, d]: .npy, .safetensors, .pt.",
        shown="the box's scenes",
        remote=True,
    )
    model: str | None = setting(
        None,
        help="Train on this tower's activations of --images, in one pass and without a store: hf:NAME_OR_DIR, "
        "open_clip:ARCH/PRETRAINED_OR_FILE or timm:NAME[:FILE].",
        place="model",
    )
    images: str | None = same_as(HarvestOptions, "images", None)
    validation: Path | None = setting(
        None,
        help="Held-out activations for the final evaluation.",
        shown="none; on the box its test scenes",
        remote=True,
    )
    embeddings: Path | None = setting(
        None,
        help="For MS in the summary of several SAEs, or of a run from images: embeddings of the images that are "
        "evaluated; of --images where none are held out.",
        shown="none; from images the tower's own projection or pooled output, on the box its scenes'",
        remote=True,
    )
    scored_images: int = setting(
        2048,
        help="From images, and without --validation-images: how many of those trained on MS and contact sheets are of; "
        "0: there is neither.",
        at_least=0,
    )
    sweep: tuple[Any, ...] = setting(
        (),
        help="[[sweep]] tables of settings, each an SAE; all see the same batches in one pass, as those of lists do.",
        on_command_line=False,
        tables=True,
    )
    mono_embeddings: Path | None = setting(
        None,
        help="Embeddings by which MonoLoss scores, row i of row i: a store or a matrix.",
        shown="the rows themselves",
        remote=True,
    )
    output: Path = same_as(RunOptions, "output", shown="runs/DATE-TIME")
    expansion: float | None = same_as(SAESize, "expansion", shown="8; on the box 4")
    k: int | None = same_as(SAESize, "k", shown="20; on the box 10")
    steps: int = same_as(TrainConfig, "steps", shown="110,000, as the paper; on the box 1,200")
    batch_size: int = same_as(TrainConfig, "batch_size", shown="4096; on the box 512")
    dead_after: int = same_as(TrainConfig, "dead_after", shown="10,000,000; on the box 100,000")
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of several SAEs, once for all

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Without activations, what was not given is as the box's scenes need it. With several SAEs, the first."""
        base, tables = expanded(given)
        several = bool(tables) or "model" in base
        require(not several or "mono_embeddings" not in base, "mono_embeddings: of one SAE, trained from a store")
        if tables:
            names = names_of(tables)  # no two in one directory
            with named(names[0], tables[0]):
                first = cls.of(one_of(_of_one(base), tables[0]))
            given = base | {"output": first.output}
            return replace(first, sweep=tables, given=given, embeddings=base.get("embeddings"))
        check_one_pass(base, StreamSettings())
        require(
            "embeddings" not in base or "model" in base,
            "embeddings: of several SAEs, or of a run from images; of one SAE ms-score makes the score",
        )
        require("output" in given or not given.get("resume"), "output: --resume needs the directory of the run")
        defaults: dict[str, Any] = {"output": new_run_directory(), "expansion": EXPANSION, "k": K}
        if "activations" not in given and "model" not in given:
            from saevlm_fast.demo.scene_stores import RECIPE

            defaults |= RECIPE
        if given.get("architecture", SAESize.architecture) not in SELECTING:
            del defaults["k"]
        if "d_sae" in given:
            del defaults["expansion"]
        return cls(**defaults | dict(given))

    def members(self) -> dict[str, Self]:
        """The options of each of several SAEs, by name: those of a command that trains it alone."""
        found = {}
        for name, table in zip(names_of(self.sweep), self.sweep):
            with named(name, table):
                found[name] = self.of(one_of(_of_one(self.given), table) | {"output": self.output / name})
        return found

    def said(self, name: str) -> Any:
        """For settings.toml: what [[sweep]] says is not said twice, and nothing of a stream where there is none."""
        if any(name in table for table in self.sweep):
            return self.given.get(name)
        stream: Any = StreamSettings
        value = super().said(name)
        streamed = name in settings_of(stream) or name == "scored_images"
        return None if streamed and (self.model is None or value == ()) else value


@dataclass(frozen=True)
class Run:
    """What is trained on what: the SAE that fits activations [n_rows, d]."""

    n_rows: int
    path: Path
    sae: SAEConfig
    config: TrainConfig

    @classmethod
    def of(cls, options: TrainArguments, n_rows: int, d: int, path: Path) -> "Run":
        """ValueError: the SAE's settings do not fit the width."""
        sae, config = options.part(SAESize).config(d), options.part(TrainConfig)
        config.check_fits(sae)
        return cls(n_rows, path, sae, config)

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return min(self.config.batch_size, self.n_rows)

    @property
    def sentence(self) -> str:
        """For people."""
        sae, config = self.sae, self.config
        k = "" if sae.k is None else f", k = {sae.k}"
        control = "" if config.control is None else f"control {config.control}: "
        return (
            f"{control}{sae.architecture} SAE {sae.d_in} -> {sae.d_sae}{k}, on {self.n_rows:,} rows; "
            f"{config.n_steps:,} steps of {self.batch_size:,}, lr {config.peak_lr(sae.d_sae):.3g}, {self.path}"
        )


def _of_one(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given for all of several SAEs, as a command that trains one alone takes it."""
    return {name: value for name, value in given.items() if name != "embeddings" or "model" in given}


def check_one_pass(given: dict[str, Any], defaults: StreamSettings) -> None:
    """Whether what was given is of one pass, or of a run from a store, and not of both.

    Raises:
        ValueError: it is of both, or of one pass without its model or images.
    """
    one_pass = [name for name in ("model", "images") if name in given]
    if not one_pass:
        cls: Any = StreamSettings
        stray = [name for name in settings_of(cls) if name in given and given[name] != getattr(defaults, name)]
        stray += ["scored_images"] if "scored_images" in given else []
        require(not stray, f"{', '.join(stray)}: of a run from images; give --model and --images")
        return
    for name in ("model", "images"):
        require(name in given, f"{name}: needed with {one_pass[0]}")
    for name in ("activations", "validation"):
        advice = "give --validation-images" if name == "validation" else "a run from images has none"
        require(name not in given, f"{name}: does not go with model; {advice}")
    path = given.get("keep_store")
    require(path is None or not Path(path).is_file(), f"keep_store: {path} is a file")
