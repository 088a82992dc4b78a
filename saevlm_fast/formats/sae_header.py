"""What the files of an SAE say of it without their weights being read: its configuration, and what they are."""

from pathlib import Path
from typing import NamedTuple

from saevlm_fast.config import SAEConfig
from saevlm_fast.formats import registry
from saevlm_fast.formats.header import Header
from saevlm_fast.formats.hub import resolve
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.source import Source


class SAEHeader(NamedTuple):
    """What the files of an SAE say without its weights being read, where their format allows that.

    Attributes:
        config: as of the SAE. dtype: of W_enc, "float32".
        threshold: one for all latents, or (lowest, highest); None where there is none.
        weights_sha256: what cfg.json says of the weights' file, if it says it.
        format: name of the format. files: that make the SAE what it is.
    """

    config: SAEConfig
    dtype: str
    threshold: float | tuple[float, float] | None
    weights_sha256: str | None
    format: str
    files: tuple[Path, ...]


def read_sae_header(path: str | Path) -> SAEHeader:
    """The header of an SAE that from_pretrained opens. ValueError: files that are missing, damaged or inconsistent."""
    local = resolve(path)
    source = Source(local.path, assume=local.assume)
    found = registry.detect(source)
    header = registry.read_header(source)
    low, high = header.thresholds or (None, None)
    threshold = low if low is None or high is None or low == high else (low, high)
    files = tuple(source.folder / name for name in sorted(source.opened))
    return SAEHeader(config_of(header), header.dtype, threshold, header.weights_sha256, found.name, files)


def sae_digest(path: str | Path) -> str:
    """SHA-256 of the files that make an SAE, as stores of its codes record it. ValueError: as `read_sae_header`."""
    return registry.digest(Source(resolve(path).path))


def config_of(described: PlainSAE | Header) -> SAEConfig:
    """What was assumed is in metadata["doubts"], sizes of groups of what is no Matryoshka SAE in another entry."""
    groups = described.group_sizes
    nested = described.activation == "batch_topk" and bool(groups)
    metadata = dict(described.metadata) | ({"doubts": list(described.doubts)} if described.doubts else {})
    if len(groups) > 1 and not nested:  # of training alone: all latents are used at once
        metadata["trained_group_sizes"] = list(groups)
    return SAEConfig(
        described.d_in,
        described.d_sae,
        described.k,
        "matryoshka" if nested else described.activation,
        groups if nested else (),
        metadata,
        described.input_norm,
        described.eps if described.input_norm == "layer_norm" else SAEConfig.eps,
    )
