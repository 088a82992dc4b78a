"""What cross-modal measures."""

from dataclasses import dataclass
from typing import Literal

from saevlm_fast.settings import Settings, setting


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
    keep: float = setting(0.5, help="Share of the pairs that is kept.", paper="0.5", at_least=0, at_most=1)
    keep_patches: float = setting(
        0.75, help="Share of each image's tokens that is marked as kept.", at_least=0, at_most=1
    )
    seed: int = setting(0, help="Seed of the controls: random scores, shuffled omegas, bootstrap.", at_least=0)
