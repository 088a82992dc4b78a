"""The options of `saevlm-fast evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from saevlm_fast.cli.evaluate_masks import MaskArguments
from saevlm_fast.cli.evaluate_model import SplicedArguments
from saevlm_fast.cli.options import WorkOptions
from saevlm_fast.config import DEVICE_HELP, RunOptions
from saevlm_fast.errors import require
from saevlm_fast.settings import path_of, same_as, setting, texts

CONTROLS = ("untrained", "rotation", "raw", "pca", "kmeans")  # those of measures/controls.py, which imports torch
NO_LABELS, FROM_STORE = "none", "store"


def _controls(name: str, text: str) -> tuple[str, ...]:
    """all, none, or a list."""
    if text in ("all", "none"):
        return CONTROLS if text == "all" else ()
    named = texts(name, text)
    for each in named:
        require(each not in ("all", "none"), f"{name}: {each!r} stands alone, without others")
        require(each in CONTROLS, f"{name}: {each!r} is not one of all, none, {', '.join(CONTROLS)}")
    return named


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(SplicedArguments, MaskArguments, WorkOptions):
    """Options of `saevlm-fast evaluate`."""

    title = "What is measured"
    resume_adds: ClassVar[bool] = True
    sae: tuple[str, ...] = setting(
        help="SAE directories, separated by commas, or the option given again; those that differ by their seed alone "
        "make a group.",
        parse=texts,
        place="path",
    )
    activations: Path = setting(help="Activation store, or a matrix [N, d]: .npy, .safetensors, .pt.", remote=True)
    output: Path = setting(help="Directory for evaluation.json, a table of latents for every SAE, and finished parts.")
    embeddings: tuple[str, ...] = setting(
        (),
        help="Image embeddings for the Monosemanticity Score, row i of image i; several, as --sae.",
        parse=texts,
        place="path",
    )
    labels: str = setting(
        FROM_STORE,
        help="Labels of images: FILE.csv or FILE.parquet (image, then a column a label set), store (its own), none.",
        place="table",
    )
    taxonomy: Path | None = setting(None, help="Path of every label from the root: FILE.json or FILE.csv.")
    controls: tuple[str, ...] = setting(
        (),
        help=f"Measured beside, at the same L0 (of kmeans one cluster fires): all, or of {', '.join(CONTROLS)}.",
        parse=_controls,
        shown="none",
    )
    random_activations: Path | None = setting(
        None,
        help="Of the same images through the tower of random weights (harvest --random-weights), for the SAEs among "
        "--sae that were trained on such: a control.",
        remote=True,
    )
    compat: Literal["none", "visaebench"] = setting("none", help="Numbers as another benchmark computes them, as well.")
    compare: bool = setting(False, help="Match the first SAE's latents with those of each other.")
    pool: Literal["max", "mean"] = setting("max", help="Of the rows of an image, where there are several.")
    batch_size: int = setting(4096, help="Rows read and encoded at a time.", at_least=1)
    resume: bool = setting(
        False, help="Keep what is finished in --output and add to it.", recorded=False, instead_of=("force",)
    )
    force: bool = setting(False, help="Replace the evaluation in --output.", recorded=False, instead_of=("resume",))
    device: str = setting("auto", help=DEVICE_HELP)
    collective_timeout: float = same_as(RunOptions, "collective_timeout", 3600.0, recorded=False)

    def check(self) -> None:
        super().check()
        require(not (self.resume and self.force), "resume and force exclude each other")
        for each in (*self.sae, *self.embeddings):
            require(bool(each) and "\0" not in each, f"sae, embeddings: {each!r} is not a path")
        require(len(self.sae) > 0, "sae: none was given")
        require(not self.compare or len(self.sae) > 1, "compare: needs at least two SAEs; give --sae again")
        needs_labels = self.taxonomy is None or self.labels != NO_LABELS
        require(needs_labels, "taxonomy: it is about labels, and --labels none leaves them out")
        require(self.compat == "none" or self.pool == "max", "compat: visaebench pools by the maximum; give --pool max")
        path = path_of("labels", self.labels)
        known = self.labels in (FROM_STORE, NO_LABELS) or path.suffix in (".csv", ".parquet")
        require(known, f"labels: {self.labels!r} is not store, none, FILE.csv or FILE.parquet")
