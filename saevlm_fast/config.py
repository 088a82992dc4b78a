"""Frozen, validated settings: what an SAE is (SAEConfig) and how it is trained (TrainConfig)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral
from typing import Any

from saevlm_fast.errors import did_you_mean, require

LARGEST = (1 << 31) - 1  # width of activations, number of latents: int32 indices hold them
ARCHITECTURES = ("topk", "batch_topk", "matryoshka")
DTYPES = ("float32", "tf32", "bfloat16")
EXPANSION = 8.0  # the paper tries 1 to 64
MATRYOSHKA_FRACTIONS = (0.0625, 0.125, 0.25, 0.5625)  # paper, section 4; recipe.md section 1


def _is_whole(value: Any) -> bool:
    """Of whatever library; true and false are not numbers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def group_sizes_from_fractions(fractions: tuple[float, ...], d_sae: int) -> tuple[int, ...]:
    """Group sizes from fractions that sum to 1: rounded down, the remainder to the last group (as upstream).

    Raises:
        ValueError: fractions that are not positive, do not sum to 1 (within 1e-6), or leave a group empty.
    """
    require(len(fractions) > 0, "groups: at least one fraction is needed")
    require(all(f > 0 for f in fractions), f"groups: {list(fractions)} must all be positive")
    require(
        math.isclose(sum(fractions), 1.0, abs_tol=1e-6),
        f"groups: {list(fractions)} sum to {sum(fractions):g}, not to 1",
    )
    sizes = [int(f * d_sae) for f in fractions[:-1]]
    sizes.append(d_sae - sum(sizes))
    require(min(sizes) >= 1, f"groups: {list(fractions)} leave a group of d_sae = {d_sae} latents empty: {sizes}")
    return tuple(sizes)


@dataclass(frozen=True)
class SAEConfig:
    """What a sparse autoencoder is.

    Attributes:
        d_in: width of the activations, d.
        d_sae: number of latents, F.
        k: latents kept per row: exactly at most k for `topk`, k on average over a batch for the other two.
        architecture: `topk`, `batch_topk`, or `matryoshka` (BatchTopK selection, nested groups of latents).
        group_sizes: sizes of the Matryoshka groups, first group first; they sum to d_sae. One group otherwise.
        metadata: anything JSON: where the activations came from, norm factor, seed. Kept by save and load.
    """

    d_in: int
    d_sae: int
    k: int = 20
    architecture: str = "batch_topk"
    group_sizes: tuple[int, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            value = getattr(self, name)
            require(_is_whole(value), f"{name}: {value!r} must be a whole number")
            require(1 <= value <= LARGEST, f"{name}: {value} must be at least 1 and below 2^31")
        require(1 <= self.k <= self.d_sae, f"k: {self.k} must be between 1 and d_sae = {self.d_sae}")
        require(
            self.architecture in ARCHITECTURES,
            f"architecture: {self.architecture!r} is not one of {', '.join(ARCHITECTURES)}",
        )
        if not self.group_sizes:
            require(self.architecture != "matryoshka", "group_sizes: a matryoshka SAE needs its group sizes")
            object.__setattr__(self, "group_sizes", (self.d_sae,))
        for size in self.group_sizes:
            require(_is_whole(size), f"group_sizes: {size!r} must be a whole number")
        object.__setattr__(self, "group_sizes", tuple(int(size) for size in self.group_sizes))
        require(min(self.group_sizes) >= 1, f"group_sizes: {self.group_sizes} must all be at least 1")
        require(
            sum(self.group_sizes) == self.d_sae,
            f"group_sizes: {self.group_sizes} sum to {sum(self.group_sizes)}, not to d_sae = {self.d_sae}",
        )
        require(
            len(self.group_sizes) == 1 or self.architecture == "matryoshka",
            f"group_sizes: only a matryoshka SAE has more than one group, not {self.architecture}",
        )

    @classmethod
    def sized(
        cls,
        d_in: int,
        *,
        expansion: float | None = None,
        d_sae: int | None = None,
        k: int = 20,
        architecture: str = "batch_topk",
        groups: Sequence[float] = MATRYOSHKA_FRACTIONS,
    ) -> "SAEConfig":
        """The SAE of activations of width d_in: the one place where the rules of sizing live.

        Args:
            d_in: width of the activations, d.
            expansion: d_sae = expansion * d_in, rounded; 8 if neither it nor d_sae is given (the paper tries 1 to 64).
            d_sae: number of latents, instead of expansion.
            k: latents kept per row (paper: 20).
            architecture: one of ARCHITECTURES.
            groups: sizes of the Matryoshka groups as fractions of d_sae (paper, section 4); used for `matryoshka` only.

        Raises:
            ValueError: both sizes given, an expansion that is not in (0, 1e6), groups that do not sum to 1, k > d_sae.
        """
        require(d_sae is None or expansion is None, "d_sae: give either d_sae or expansion, not both")
        if d_sae is None:
            expansion = EXPANSION if expansion is None else expansion
            require(0 < expansion < 1e6, f"expansion: {expansion:g} must be positive and below 1e6")
            d_sae = round(expansion * d_in)
        require(1 <= d_sae <= LARGEST, f"d_sae: {d_sae} must be at least 1 and below 2^31")
        sizes = group_sizes_from_fractions(tuple(groups), d_sae) if architecture == "matryoshka" else ()
        return cls(d_in, d_sae, k, architecture, sizes)

    @property
    def group_ends(self) -> list[int]:
        """Where each nested prefix of latents ends; the last is d_sae."""
        return [sum(self.group_sizes[: i + 1]) for i in range(len(self.group_sizes))]


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained: the paper's recipe (recipe.md section 2) is the default.

    Attributes:
        steps: optimiser steps.
        batch_size: rows per step, B.
        lr: peak learning rate; None is the paper's rule 2e-4 / sqrt(d_sae / 2^14).
        warmup_steps: linear warm-up, lr * step / warmup_steps; None is min(1000, steps // 10).
        auxk_alpha: weight of the auxiliary loss on dead latents; 0 turns it off.
        dead_after: rows without firing after which a latent counts as dead.
        threshold_start: first step (0-based, exclusive) from which the inference threshold follows the smallest kept
            activation.
        threshold_beta: decay of that moving average.
        clip_norm: limit on the gradient's global norm.
        betas, eps: Adam.
        norm_batches: batches from which norm_factor = sqrt(mean ||x||^2) is estimated.
        seed: of the initial weights and of the order of the rows.
        dtype: of the encoder GEMM; weights, optimiser and losses stay float32.
    """

    steps: int = 110_000
    batch_size: int = 4096
    lr: float | None = None
    warmup_steps: int | None = None
    auxk_alpha: float = 0.03
    dead_after: int = 10_000_000
    threshold_start: int = 1000
    threshold_beta: float = 0.999
    clip_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    norm_batches: int = 100
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dead_after", "norm_batches", "seed", "threshold_start", "warmup_steps"):
            value = getattr(self, name)
            require(value is None or value < 2**62, f"{name}: {value} must be below 2^62")
        for name in ("steps", "batch_size", "dead_after", "norm_batches"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("seed", "threshold_start", "auxk_alpha"):
            require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)} must not be negative")
        require(self.lr is None or 0 < self.lr < math.inf, f"lr: {self.lr} must be a positive number, or auto")
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps: {self.warmup_steps} must not be negative",
        )
        require(self.clip_norm > 0, f"clip_norm: {self.clip_norm} must be positive")
        require(0 <= self.threshold_beta < 1, f"threshold_beta: {self.threshold_beta} must be in [0, 1)")
        require(math.isfinite(self.auxk_alpha), f"auxk_alpha: {self.auxk_alpha} must be finite")
        require(self.dtype in DTYPES, f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def peak_lr(self, d_sae: int) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)

    def lr_at(self, step: int, d_sae: int) -> float:
        """The learning rate of 0-based step: linear from 0 at step 0, constant after warm-up; no decay."""
        warmup = min(1000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        return self.peak_lr(d_sae) * (step / warmup if step < warmup else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return asdict(self)


def keyword_settings(who: str, given: Mapping[str, Any], *kinds: Any) -> list[dict[str, Any]]:
    """Settings given by name, one dict for each of the dataclasses whose fields they are.

    Raises:
        ValueError: a name that is a field of none of them, with the nearest that is; `who` takes the settings.
    """
    known = [{each.name for each in fields(kind)} for kind in kinds]
    for name in given:
        every = sorted(set().union(*known))
        require(name in every, f"{name}: no setting of {who}{did_you_mean(name, every)}")
    return [{name: value for name, value in given.items() if name in names} for names in known]
