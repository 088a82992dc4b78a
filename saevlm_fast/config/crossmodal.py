"""What cross-modal measures."""

from dataclasses import dataclass
from typing import Literal

from saevlm_fast.errors import require
from saevlm_fast.settings import Settings, numbers, setting


@dataclass(frozen=True, kw_only=True)
class CrossModalSettings(Settings):
    """SAE-V's measures of latents and of image-text pairs (arXiv 2502.17514 section 3, docs/how-to/cross-modal.md)."""

    title = "The measures"
    top: int = setting(5, help="Tokens of each modality behind an omega, K.", paper="5", at_least=1, at_most=1000)
    threshold: float = setting(1.0, help="Activation above which a latent counts in a pair.", paper="1", at_least=0)
    template: bool = setting(
        False, help="The chat template's tokens count as text, as in the paper's code; else only the caption's."
    )
    by: Literal["cosine", "co_occurrence", "count"] = setting("cosine", help="By which pairs are kept.", paper="cosine")
    keep: float = setting(
        0.5, help="Share of the pairs that is kept.", paper="0.5", above=0, at_most=1, must="above 0, at most 1"
    )
    patches_by: Literal["cosine", "co_occurrence", "count", "activation", "random"] = setting(
        "cosine", help="By which an image's tokens are kept.", paper="cosine"
    )
    keep_patches: float = setting(
        0.75, help="Share of each image's tokens that is marked as kept.", above=0, at_most=1, must="above 0, at most 1"
    )
    seed: int = setting(0, help="Seed of the controls: random scores, shuffled omegas, bootstrap.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class PatchTestSettings(Settings):
    """On what the filters of patches are tested with the model (docs/how-to/cross-modal.md)."""

    title = "Test of the patch filters"
    patch_pairs: int = setting(
        0, help="Pairs on which patch filters are tested with the store's model; 0 loads none.", at_least=0
    )
    patch_shares: tuple[float, ...] = setting(
        (0.1, 0.25, 0.5, 0.75), help="Kept shares of an image's tokens that are tested.", parse=numbers
    )

    def check(self) -> None:
        super().check()
        require(len(self.patch_shares) > 0, "patch_shares: at least one is needed")
        for share in self.patch_shares:
            require(0 < share < 1, f"patch_shares: {share:g} must be above 0 and below 1")
