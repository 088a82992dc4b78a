"""What the steering score measures, and where it is written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saevlm_fast.config.common import FLOAT32_MAX, PROMPT, WHITE
from saevlm_fast.errors import require
from saevlm_fast.settings import Settings, integer, setting


def _images_asked(name: str, text: str) -> int:
    return 0 if text == WHITE else integer(name, text)


@dataclass(frozen=True)
class ScoreConfig(Settings):
    """What the steering score measures (docs/recipe.md section 4)."""

    title = "The score"
    latents: tuple[int, ...] = setting((), help="Latents that are scored.", shown="all")
    alpha: float = setting(100.0, help="Value that a latent is clamped at, in raw activation units.", paper="100")
    ask: int = setting(
        10,
        help="Number of random images asked about, the same for every latent, or white: one white image (as is 0).",
        paper="white, and images of ImageNet",
        at_least=0,
        parse=_images_asked,
    )
    prompt: str = setting(PROMPT, help="The question.", shown="the paper's", paper=PROMPT)
    n_reference: int = setting(
        256, help="Random images behind the difference of means.", at_least=1, on_command_line=False
    )
    seed: int = setting(0, help="Seed of the images asked about and the random latents.", at_least=0)

    def check(self) -> None:
        super().check()
        fits = math.isfinite(self.alpha) and abs(self.alpha) <= FLOAT32_MAX
        require(fits, f"alpha: {self.alpha} is not finite in float32")
        require(self.prompt.strip() != "", "prompt: is empty")


@dataclass(frozen=True)
class ScoreRun(Settings):
    """Where the steering score is written and how far it has come."""

    title = "The run"
    output: Path = setting(help="Table: FILE.parquet, FILE.csv or FILE.json.")
    sources: dict[str, str] = setting(help="Paths and names that must be the same when a run is resumed.")
    resume: bool = setting(
        False, help="Continue the unfinished run of --output.", recorded=False, instead_of=("force",)
    )
    force: bool = setting(
        False, help="Replace --output once the new table is whole.", recorded=False, instead_of=("resume",)
    )
    latents_per_block: int = setting(
        16, help="Latents that are scored and saved together.", at_least=1, on_command_line=False
    )

    def check(self) -> None:
        super().check()
        require(not (self.resume and self.force), "resume: does not go with force, which starts anew")

    @property
    def progress(self) -> Path:
        """A folder with the settings and a file for every finished block; gone when the output is written."""
        return self.output.with_name(self.output.name + ".progress")


@dataclass(frozen=True)
class SteerabilityConfig(Settings):
    """What is asked of units; docs/papers/steering-clip.md."""

    title = "What is asked"
    alpha: float = setting(
        1.0, help="Value that a unit is moved to, in 99th percentiles of its positive values.", above=0
    )
    tokens: Literal["patches", "all", "cls"] = setting("patches", help="Tokens on which it is moved.")
    ask: int = setting(64, help="Images asked about, evenly spaced.", at_least=1)
    n_reference: int = setting(512, help="Images behind the percentiles, evenly spaced.", at_least=1)
    controls: int = setting(1, help="Random directions a unit; 99 in all tell who is steerable.", at_least=1)
    screen: int | None = setting(
        None, help="Ask only about so many, the largest by one linear step.", shown="all", at_least=1
    )
    seed: int = setting(0, help="Of the random directions and the screening.", at_least=0)
