"""What is known of an SAE without its weights: PlainSAE less its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from saevlm_fast.formats.plain import Activation, InputNorm, PlainSAE


@dataclass(frozen=True, kw_only=True)
class Header:
    """As PlainSAE has it, and more.

    Attributes:
        dtype: of W_enc, "float32". thresholds: (lowest, highest), equal where there is one for all latents.
        weights_sha256: what the files say of the weights' file, if they say it.
    """

    d_in: int
    d_sae: int
    activation: Activation
    k: int | None = None
    input_norm: InputNorm = "none"
    eps: float = 1e-5
    group_sizes: tuple[int, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    dtype: str = "float32"
    thresholds: tuple[float, float] | None = None
    weights_sha256: str | None = None

    @classmethod
    def of(cls, plain: PlainSAE) -> "Header":
        """That of an SAE whose weights were read."""
        names = ("d_in", "d_sae", "activation", "k", "input_norm", "eps", "group_sizes", "metadata", "doubts")
        return cls(
            **{name: getattr(plain, name) for name in names},
            dtype=str(plain.W_enc.dtype).removeprefix("torch."),
            thresholds=range_of(plain.threshold),
        )


def range_of(threshold: Tensor | None) -> tuple[float, float] | None:
    """Its lowest and highest."""
    return None if threshold is None else (float(threshold.min()), float(threshold.max()))
