"""Which rows a harvest has, and how it is done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saevlm_fast.config.common import ComputeDtype, StoreDtype
from saevlm_fast.errors import require
from saevlm_fast.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class HarvestSettings(Settings):
    """What decides the rows of a harvest, beside hook points and tokens: `harvesting.config.HarvestConfig` has all."""

    title = "Rows"
    seed: int = setting(0, help="Seed of the random tokens.", at_least=0)
    only: Path | None = setting(
        None, help="Text file of image ids, one a line (kept.txt of cross-modal): these images alone.", shown="all"
    )
    limit: int | None = setting(None, help="Only the first so many images.", shown="all", at_least=1)
    batch_size: int = setting(64, help="Images of a forward pass.", at_least=1)
    square: int | None = setting(
        None,
        help="First resize each image to so many pixels on a side: one grid of patches for all, in towers that take "
        "images at their own aspect (Qwen-VL, Pixtral, NaFlex).",
        shown="no",
        at_least=1,
        at_most=8192,  # 67 million pixels; no more than 89 million are decoded either
    )
    dtype: ComputeDtype = setting(
        "float32",
        help="Of the forward: float32, tf32 (matrix products on a GPU), or bfloat16 or float16 (autocast).",
    )
    store_dtype: StoreDtype | None = setting(None, help="On disk.", shown="the forward's; codes float16")
    images_per_shard: int | None = setting(
        None,
        help="Unit of work, of resuming, rounded up to whole batches: an interrupt costs the one at hand.",
        shown="1024, fewer where a shard would have more than 65,536 rows",
        at_least=1,
    )
    sae: Path | None = setting(None, help="Write this SAE's sparse codes instead of activations.")
    pool: Literal["none", "mean"] = setting(
        "none", help="Codes of every token (none) or averaged over an image's tokens (mean)."
    )

    prompt: str | None = setting(
        None,
        help="With --point language: what the user asks, the caption being the answer.",
        shown="the caption is what the user says",
    )
    wrong_captions: float = setting(
        0.0,
        help="With --point language: share of the images that get another one's caption, to see whether a ranking of "
        "pairs finds them.",
        at_least=0,
        at_most=1,
    )

    def check(self) -> None:
        super().check()
        require(self.prompt is None or self.prompt.strip() != "", "prompt: is empty")
        require(self.pool == "none" or self.sae is not None, "pool: only codes are pooled, give --sae")


@dataclass(frozen=True)
class HarvestOptions(Settings):
    """How a harvest is done: nothing here changes which rows there are (compile changes their last bits)."""

    title = "The run"
    output: Path = setting(help="Store; with several points or tokens, a directory of stores.")
    images: str = setting(
        "",
        help="Folder, list (.txt, .csv, .jsonl), tar shards (glob or {000..012}), Hugging Face dataset on disk, "
        "hf-dataset:USER/NAME:CONFIG::SPLIT, scenes:SPLIT:N, or a URL.",
        place="images",
    )
    workers: int | None = setting(
        None,
        help="Processes that decode and preprocess images, per rank.",
        shown="1 beside a CPU on Linux, else 0; up to 8 beside a GPU",
        at_least=0,
    )
    max_skipped: float = setting(
        0.01, help="Share of unusable images above which the harvest fails.", at_least=0, at_most=1
    )
    compile: bool = setting(False, help="torch.compile the tower's blocks.")
    resume: bool = setting(False, help="Continue the harvest in --output.", recorded=False, instead_of=("force",))
    force: bool = setting(
        False,
        help="Replace the harvest in --output, which stays until the new one is complete.",
        recorded=False,
        instead_of=("resume",),
    )

    def check(self) -> None:
        super().check()
        require(not (self.resume and self.force), "resume and force exclude each other")
