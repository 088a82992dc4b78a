"""The options of `saevlm-fast erase`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saevlm_fast.cli.options import WorkOptions
from saevlm_fast.cli.record import settings_path
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.errors import require
from saevlm_fast.settings import integers, paths, setting, texts

WORDS = "words"


def _ks(name: str, text: str) -> tuple[int, ...]:
    found = integers(name, text)
    require(min(found) >= 1, f"{name}: {text!r}: each must be at least 1")
    return tuple(sorted(found))


@dataclass(frozen=True, kw_only=True)
class EraseArguments(WorkOptions):
    """Options of `saevlm-fast erase`."""

    title = "Model and SAEs"
    model: str = setting(help="Tower with a text side, as of harvest.", place="model")
    sae: tuple[Path, ...] = setting(help="SAEs of several layers or seeds, separated by commas.", parse=paths)
    layer: tuple[int, ...] = setting(
        help="Block of the tower of each SAE, separated by commas.", parse=integers, repeats=True
    )
    images: str = setting(help="Images, as of harvest. Half of them choose latents.", place="images")
    test_images: str | None = setting(
        None, help="Images that are asked about.", shown="the other half of --images", place="images"
    )
    labels: str = setting(
        "images",
        help="What is told: images (their labels), FILE.csv:COLUMN, or scene:FACTOR of scenes.",
        place="table",
    )
    what: str = setting(
        WORDS, help="What is erased: words (drawn on the images), or a label, as --labels has it.", place="table"
    )
    class_prompts: str = setting(
        "a photo of a {}",
        help="Text of a class, with {} for the label. Scenes have texts of their own.",
        place="table",
    )
    also: tuple[str, ...] = setting(
        (),
        help="Labels that are told besides, of the clean images, separated by commas.",
        parse=texts,
        shown="none",
        place="table",
    )
    class_words: Path | None = setting(
        None,
        help="FILE.csv: for each label of --labels its text, its word for choosing, its test_word.",
        shown="the labels themselves",
    )
    select: Literal["difference", "auroc"] = setting(
        "difference", help="What latents are chosen by: the difference of means, or AUROC."
    )
    groups: str | None = setting(
        None, help="Label by which the worst group is found beside the class.", shown="none", place="table"
    )
    k: tuple[int, ...] = setting((1, 5, 20), help="Latents that are taken out, separated by commas.", parse=_ks)
    limit: int = setting(500, help="Images for choosing, and images asked about, drawn at most.", at_least=10)
    fonts: tuple[str, ...] = setting(
        (),
        help="Font files of the words for choosing.",
        parse=texts,
        shown="Pillow's bitmap font",
        place="path",
    )
    test_fonts: tuple[str, ...] = setting(
        (),
        help="Font files of the words asked about.",
        parse=texts,
        shown="Pillow's outline font",
        place="path",
    )
    tokens: Literal["all", "patches", "cls"] = setting("all", help="Tokens from which latents are taken.")
    seed: int = setting(0, help="Of the images drawn, the words, their places, and the random latents.", at_least=0)
    output: Path = setting(help="Accuracies: FILE.json; a table, .csv, and a picture, .svg, beside it.")
    batch_size: int = setting(64, help="Images of a forward.", at_least=1)
    force: bool = setting(False, help="Replace an output that is there.", recorded=False)
    device: str = setting("auto", help=DEVICE_HELP)

    def check(self) -> None:
        super().check()
        require(self.output.suffix == ".json", f"output: {self.output} does not end in .json")
        require(
            len(self.sae) == len(self.layer) > 0,
            f"layer: {len(self.layer)} layers for {len(self.sae)} SAEs; each SAE has one",
        )
        require(self.what != self.labels or self.what == WORDS, f"what: {self.what} is what --labels asks to be told")
        twice = [each for each in self.also if each in (self.what, self.labels)]
        require(not twice, f"also: {', '.join(twice)} is asked already")

    @property
    def files(self) -> list[Path]:
        """What must not be there without --force; the last is written last."""
        return [self.output, self.output.with_suffix(".csv"), self.picture, settings_path(self.output)]

    @property
    def picture(self) -> Path:
        """Beside the accuracies."""
        return self.output.with_suffix(".svg")
