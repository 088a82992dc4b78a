"""What is harvested, and how it is done: the settings of a harvest."""

from dataclasses import dataclass
from pathlib import Path

import torch

from saevlm_fast.data.store import STORE_DTYPES
from saevlm_fast.errors import require
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

COMPUTE_DTYPES = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested: everything that decides the rows. `--resume` refuses other settings.

    Attributes:
        points: where in the tower. tokens: which tokens of points that have them. A store for every pair.
        seed: of random tokens. limit: only the first so many images.
        batch_size: images of a forward pass. dtype: of the forward, float32, tf32 (matrix products on a GPU), or
            bfloat16 or float16 (autocast). store_dtype: of what is on disk; None is the forward's, float16 for codes
            (ImageNet's CLS codes are 116 MB so).
        images_per_shard: images of a unit of work (an interrupt costs the one at hand, a kill also those being written,
            two at most); rounded up to whole batches. None is 1024, fewer where a shard would have more than about
            65,536 rows.
        sae: SAE directory; codes are written instead of activations, of one point and one choice of tokens.
        pool: none (codes per token) or mean (over an image's tokens), with an SAE.
    """

    points: tuple[HookPoint, ...]
    tokens: tuple[Tokens, ...] = (Tokens.parse("cls"),)
    seed: int = 0
    limit: int | None = None
    batch_size: int = 64
    dtype: str = "float32"
    store_dtype: str | None = None
    images_per_shard: int | None = None
    sae: Path | None = None
    pool: str = "none"

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit", "images_per_shard"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} must be at least 1")
        require(self.seed >= 0, f"seed: {self.seed} must not be negative")
        require(self.dtype in COMPUTE_DTYPES, f"dtype: {self.dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
        require(
            self.store_dtype is None or self.store_dtype in STORE_DTYPES,
            f"store_dtype: {self.store_dtype!r} is not one of {', '.join(STORE_DTYPES)}",
        )
        require(len(self.points) > 0, "point: at least one hook point is needed")
        require(len(set(self.points)) == len(self.points), "point, layer: the same hook point is asked for twice")
        require(len(set(self.tokens)) == len(self.tokens), "tokens: the same choice is asked for twice")
        require(self.pool in ("none", "mean"), f"pool: {self.pool!r} is not one of none, mean")
        require(self.pool == "none" or self.sae is not None, "pool: only codes are pooled, give --sae")
        require(
            self.sae is None or len(self.stores) == 1,
            f"sae: an SAE reads one point and one choice of tokens, but {len(self.stores)} are asked for",
        )

    @property
    def stores(self) -> tuple[tuple[HookPoint, Tokens | None], ...]:
        """The stores in order: (point, tokens); points without tokens, such as the projection, have None."""
        return tuple(
            (point, tokens) for point in self.points for tokens in (self.tokens if point.layer is not None else (None,))
        )

    @property
    def store_names(self) -> tuple[str, ...]:
        """What each of `stores` is called: residual-11-cls, projection."""
        return tuple(point.name if tokens is None else f"{point.name}-{tokens.name}" for point, tokens in self.stores)

    @property
    def torch_store_dtype(self) -> torch.dtype:
        default = "float16" if self.sae is not None else self.dtype.replace("tf32", "float32")
        return STORE_DTYPES[self.store_dtype or default]


@dataclass(frozen=True)
class HarvestOptions:
    """How it is done: nothing here changes which rows there are (compile changes their last bits).

    Attributes:
        output: directory of the stores. images: what the user called the images, for the record.
        workers: processes that decode and preprocess, per rank; None is 1 beside a CPU tower, else up to 8.
        max_skipped: share of images that may be unusable before the harvest fails.
        compile: torch.compile the tower's blocks. resume: go on with the harvest in `output`. force: replace it.
    """

    output: Path
    images: str = ""
    workers: int | None = None
    max_skipped: float = 0.01
    compile: bool = False
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 0, f"workers: {self.workers} must not be negative")
        require(0 <= self.max_skipped <= 1, f"max_skipped: {self.max_skipped} must be between 0 and 1")
        require(not (self.resume and self.force), "resume and force exclude each other")
