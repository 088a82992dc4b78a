"""What a sparse autoencoder is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saevlm_fast.config.common import (
    CONTROLS,
    EXPANSION,
    LARGEST,
    MATRYOSHKA_FRACTIONS,
    SELECTING,
    Architecture,
    Control,
    InputNorm,
    K,
    is_whole,
)
from saevlm_fast.errors import check_kind, require, shown
from saevlm_fast.settings import Settings, numbers, same_as, setting


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
class SAESize(Settings):
    """What a sparse autoencoder is to be, before the width of its activations is known; see `SAEConfig.sized`."""

    title = "The SAE"
    architecture: Architecture = setting(
        "batch_topk",
        help="batch_topk and topk are flat; matryoshka has nested groups of latents and selects as batch_topk does; "
        "relu is trained with an L1 penalty, jumprelu with a threshold per latent and a target L0.",
        paper="batch_topk, matryoshka",
        swept=True,
    )
    expansion: float | None = setting(
        None,
        help="d_sae = expansion * d_in.",
        shown="8",
        paper="1 to 64",
        above=0,
        below=1e6,
        must="positive and below 1e6",
        spec="g",
        swept=True,
        instead_of=("d_sae",),
    )
    d_sae: int | None = setting(
        None, help="Number of latents, instead of the expansion.", at_least=1, swept=True, instead_of=("expansion",)
    )
    k: int | None = setting(
        None,
        help="Latents kept per row (on average for batch_topk and matryoshka); relu and jumprelu have none.",
        shown="20",
        paper="20",
        at_least=1,
        swept=True,
    )
    groups: tuple[float, ...] = setting(
        MATRYOSHKA_FRACTIONS,
        help="Matryoshka group sizes as fractions of d_sae, the first group first.",
        paper="0.0625,0.125,0.25,0.5625",
        parse=numbers,
        repeats=True,
    )

    def check(self) -> None:
        super().check()
        require(self.d_sae is None or self.expansion is None, "d_sae: give either d_sae or expansion, not both")
        used = self.architecture == "matryoshka" or tuple(self.groups) == MATRYOSHKA_FRACTIONS
        require(used, f"groups: {list(self.groups)} are of matryoshka; the architecture is {self.architecture}")
        by_k = self.architecture in SELECTING
        require(self.k is None or by_k, f"k: {self.k} is of {', '.join(SELECTING)}; a {self.architecture} SAE has none")

    def config(self, d_in: int) -> "SAEConfig":
        """The SAE of activations of width d_in. ValueError: as `SAEConfig.sized`."""
        require(is_whole(d_in), f"d_in: {shown(d_in)} must be a whole number")
        d_sae = self.d_sae
        if d_sae is None:
            expansion = EXPANSION if self.expansion is None else self.expansion
            d_sae = round(expansion * d_in)
            require(d_sae >= 1, f"expansion: {expansion:g} times d_in = {d_in} leaves no latent")
        matryoshka = self.architecture == "matryoshka"
        sizes = group_sizes_from_fractions(tuple(self.groups), d_sae) if matryoshka else ()
        k = K if self.k is None and self.architecture in SELECTING else self.k
        return SAEConfig(d_in, d_sae, k, self.architecture, sizes)


@dataclass(frozen=True)
class SAEConfig(Settings):
    """What a sparse autoencoder is.

    k is None where a threshold decides and nothing is known of it: always allowed but for topk. Where it is known of
    relu, jumprelu and thresholded BatchTopK, it says how they were trained.

    Raises:
        ValueError: a size below 1, k > d_sae, a topk without k, group sizes that do not sum to d_sae or do not fit the
            architecture.
    """

    title = "The SAE"
    d_in: int = setting(help="Width of the activations, d.", at_least=1)
    d_sae: int = setting(help="Number of latents, F.", at_least=1)
    k: int | None = same_as(SAESize, "k", at_least=None, shown=None, swept=False)
    architecture: Architecture = same_as(SAESize, "architecture", swept=False)
    group_sizes: tuple[int, ...] = setting(
        (),
        help="Sizes of the Matryoshka groups, first group first; they sum to d_sae. One group otherwise.",
        repeats=True,
    )
    metadata: dict[str, Any] = setting(
        factory=dict,
        help="Anything JSON: where the activations came from, norm factor, seed. Kept by save and load.",
    )
    input_norm: InputNorm = setting(
        "none",
        help="What becomes of every row before it is encoded, and is undone after it is decoded: nothing, "
        "layer_norm (x - mean) / (std + eps), or token_norm x sqrt(d_in) / |x|. SAEs of other libraries have it.",
    )
    eps: float = setting(1e-5, help="Of layer_norm.", at_least=0, below=math.inf, must="finite and not negative")

    def check(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            value = getattr(self, name)
            if name == "k" and value is None:
                continue
            require(is_whole(value), f"{name}: {shown(value)} must be a whole number")
            require(value <= LARGEST, f"{name}: {value} must be below 2^31")
        super().check()
        check_kind("metadata", self.metadata, Mapping, "a mapping")
        require(self.k is not None or self.architecture != "topk", "k: is None; a topk SAE needs it")
        fits = self.k is None or 1 <= self.k <= self.d_sae
        require(fits, f"k: {self.k} must be between 1 and d_sae = {self.d_sae}")
        if not self.group_sizes:
            require(self.architecture != "matryoshka", "group_sizes: a matryoshka SAE needs its group sizes")
            object.__setattr__(self, "group_sizes", (self.d_sae,))
        several = self.input_norm != "layer_norm" or self.d_in > 1
        require(several, "input_norm: layer_norm of one number, which has no standard deviation")
        for size in self.group_sizes:
            require(is_whole(size), f"group_sizes: {shown(size)} must be a whole number")
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
        expansion: float | None = SAESize.expansion,
        d_sae: int | None = SAESize.d_sae,
        k: int | None = SAESize.k,
        architecture: Architecture = SAESize.architecture,
        groups: Sequence[float] = SAESize.groups,
    ) -> "SAEConfig":
        """The SAE of activations of width d_in; the arguments are the settings of SAESize, where the rules are.

        Args:
            d_in: width of the activations, d.
            expansion: d_sae = expansion * d_in, rounded; 8 if neither it nor d_sae is given (the paper tries 1 to 64).
            d_sae: number of latents, instead of expansion.
            k: latents kept per row; 20 if it is not given, as in the paper. relu and jumprelu have none.
            architecture: topk, batch_topk, matryoshka, relu or jumprelu.
            groups: sizes of the Matryoshka groups as fractions of d_sae (paper, section 4).

        Raises:
            ValueError: both sizes given, an expansion that is not in (0, 1e6), groups that do not sum to 1 or are
                given to another architecture, k > d_sae, or k given to an architecture without.
        """
        return SAESize(architecture, expansion, d_sae, k, groups).config(d_in)  # type: ignore[arg-type]

    @property
    def known_k(self) -> int:
        """k. ValueError: it is not known, where a threshold decides."""
        require(self.k is not None, f"k: not known of this {self.architecture} SAE, whose threshold decides")
        return int(self.k or 0)

    @property
    def control(self) -> Control | None:
        """Which control it was trained as, as its record says; None of all others."""
        training = self.metadata.get("training")
        found = training.get("control") if isinstance(training, dict) else None
        return next((control for control in CONTROLS if control == found), None)

    @property
    def group_ends(self) -> list[int]:
        """Where each nested prefix of latents ends; the last is d_sae."""
        return [sum(self.group_sizes[: i + 1]) for i in range(len(self.group_sizes))]
