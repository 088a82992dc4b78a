"""What a report shows and from what, without torch: the command line shows its help from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.errors import require
from saevlm_fast.settings import Settings, setting, texts

UNTRAINED = "untrained"  # a control SAE that is made
MOST_IN_ONE_FILE, LARGEST_FILE = 2000, 100 << 20  # latents, bytes


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Pages about one or several SAEs on the images of a store.

    Lists go with the SAEs in their order: one of each, or none. What is not given is computed where it can be.
    """

    title: ClassVar = "The report"
    sae: tuple[str, ...] = setting(
        help="SAE directory; several: --sae A --sae B, shown side by side.",
        parse=texts,
        repeats=True,
        place="path",
    )
    output: Path = setting(help="Directory of the report; with --single-file FILE.html.")
    activations: Path | None = setting(
        None, help="Store of activations of all SAEs; patches give heat maps.", remote=True
    )
    codes: tuple[str, ...] = setting(
        (),
        help="Store of each SAE's codes, instead of encoding anew.",
        parse=texts,
        repeats=True,
        place="path",
    )
    embeddings: Path | None = setting(None, help="Image embeddings, row i of image i: for MS and names.", remote=True)
    control_sae: Path | None = setting(
        None,
        help="SAE that cannot have learned: numbers are held against its latents'. untrained: made here, random "
        "directions with the first SAE's L0 (where no directory is called so).",
    )
    scores: tuple[str, ...] = setting(
        (),
        help="Table of each SAE: every number in it is a measure.",
        parse=texts,
        repeats=True,
        place="path",
    )
    names: tuple[str, ...] = setting(
        (), help="Table of each SAE, of `saevlm-fast name`.", parse=texts, repeats=True, place="path"
    )
    steering: tuple[str, ...] = setting(
        (),
        help="Table of each SAE, of `saevlm-fast steering-score`.",
        parse=texts,
        repeats=True,
        place="path",
    )
    text_model: str | None = setting(None, help="Names by this CLIP's text tower, without --names.", place="model")
    labels: Path | None = setting(
        None,
        help="Class of each image: FILE.csv or FILE.parquet as for evaluate, its first column of one label an image.",
        shown="those of the store",
        remote=True,
    )
    taxonomy: Path | None = setting(
        None, help="Path of every class from the root, FILE.json or FILE.csv as for evaluate: for the depth."
    )
    images: str | None = setting(
        None,
        help="Where the images are, if not where the store says; none: do not show them.",
        shown="as stored",
        place="images",
    )
    pool: Literal["max", "mean"] = setting(
        "max", help="Of an image with several rows (patches): that of its largest row, or the mean of its rows."
    )
    n: int = setting(16, help="Top images of a latent.", paper="16", at_least=1, at_most=64)
    per_band: int = setting(5, help="Images of each tenth of its range.", at_least=0, at_most=32)
    thumbnail: int = setting(128, help="Side of a picture, pixels.", at_least=16, at_most=512)
    single_file: bool = setting(False, help="One HTML file: up to 2,000 latents and 100 MB.")
    batch_size: int = setting(4096, help="Rows read and encoded at a time.", at_least=1)
    device: str = setting("auto", help=DEVICE_HELP)
    force: bool = setting(False, help="Replace --output once the new report is whole.", recorded=False)

    def check(self) -> None:
        super().check()
        require(len(self.sae) >= 1, "sae: at least one is needed")
        require(self.activations is not None or bool(self.codes), "activations: give --activations, --codes or both")
        for name in ("codes", "scores", "names", "steering"):
            n = len(getattr(self, name))
            require(n in (0, len(self.sae)), f"{name}: {n} given for {len(self.sae)} SAEs; one each, or none")
        controlled = self.control_sae is None or self.activations is not None
        require(controlled, "activations: needed with --control-sae, whose codes are made from them")
        as_file = self.output.suffix == ".html"
        name = repr(str(self.output))
        require(as_file or not self.single_file, f"output: with --single-file it ends in .html: {name} does not")
        require(self.single_file or not as_file, f"output: {name} ends in .html: without --single-file it is a folder")
        require(
            self.text_model is None or self.embeddings is not None,
            "embeddings: needed with --text-model, for names are near images",
        )
