"""Images that the Monosemanticity Score refuses, by name."""

from torch import Tensor

from saevlm_fast.scoring.sums import Embeddings


def refuse_embeddings(images: Embeddings, similarity: str, first_image: int, zero: bool, unfit: bool) -> None:
    """intake.check_embeddings, by somebody who knows whether there are zero ones, and any that are not finite."""
    if unfit:
        bad_n = ~images.sqnorm_n.isfinite()
        refuse_images(bad_n, first_image, "embedding is NaN, infinite or too large to square")
    if zero and similarity == "cosine":
        refuse_images(images.sqnorm_n == 0, first_image, "embedding is zero, where cosine is undefined")


def refuse_images(bad_n: Tensor, first_image: int, message: str, argument: str = "embeddings") -> None:
    """ValueError naming the first of the bad images, if there is one."""
    if bool(bad_n.any()):
        raise ValueError(f"{argument}: image {first_image + int(bad_n.nonzero()[0])}: {message}")


def refuse_activations(acts_nK: Tensor, first_image: int) -> None:
    """ValueError naming the first image with an activation that is not finite, if there is one."""
    refuse_images(~acts_nK.isfinite().all(1), first_image, "acts_nK holds NaN or infinity", "activations")
