"""The plain form written as files of a library, and what such files cannot hold."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from saevlm_fast.errors import did_you_mean, require
from saevlm_fast.formats import dictionary_learning, plain_file, sae_lens, saev, sparsify
from saevlm_fast.formats.plain import PlainSAE


class Writer(NamedTuple):
    """What a format loses of an SAE (ValueError: it cannot have it at all), and how it is written to a directory."""

    lost: Callable[[PlainSAE], list[str]]
    write: Callable[[PlainSAE, Path], None]


_ALWAYS_FLOAT32 = (dictionary_learning.NAME, saev.NAME)
WRITERS = {
    each.NAME: Writer(each.lost, each.write) for each in (sae_lens, sparsify, dictionary_learning, saev, plain_file)
}
# All that they write.
FILES = sorted(
    {
        *(sae_lens.CONFIG_FILE, sae_lens.WEIGHTS_FILE, sparsify.CONFIG, sparsify.WEIGHTS, dictionary_learning.CONFIG),
        *(dictionary_learning.WEIGHTS, saev.WEIGHTS, plain_file.WEIGHTS),
    }
)


def check(plain: PlainSAE, to: str, lossy: bool = False) -> list[str]:
    """What is lost of an SAE as files of that format.

    Raises:
        ValueError: an unknown format, one that cannot have such an SAE, or one that loses something if not `lossy`.
    """
    require(to in WRITERS, f"to: {to!r} is not one of {', '.join(WRITERS)}{did_you_mean(to, WRITERS)}")
    lost = WRITERS[to].lost(plain)
    require(lossy or not lost, f"to: {to} loses {'; '.join(lost)}; --lossy (lossy=True) writes it nevertheless")
    return lost


def written_dtype(plain: PlainSAE, to: str) -> torch.dtype:
    """Of the weights in files of that format."""
    return torch.float32 if to in _ALWAYS_FLOAT32 else plain.W_enc.dtype


def write(plain: PlainSAE, directory: str | Path, to: str = sae_lens.NAME, lossy: bool = False) -> list[str]:
    """Writes an SAE as files of a library, each atomically; returns what is lost.

    Args:
        plain: of any format (registry.read). directory: an existing one.
        to: saelens, sparsify, dictionary_learning, saev or safetensors (the plain form itself).

    Raises:
        ValueError: as `check`. OSError: it cannot be written.
    """
    lost = check(plain, to, lossy)
    WRITERS[to].write(plain, Path(directory))
    return lost
