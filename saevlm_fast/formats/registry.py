"""All formats, in the order in which they are tried, and the one way in: detect(path), read(path)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.errors import did_you_mean, require
from saevlm_fast.formats import (
    gemma_scope,
    llamascopium,
    openai,
    overcomplete,
    prisma,
    releases,
    sparsify,
    visaebench,
    vision_releases,
)
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.source import Source


class Format(NamedTuple):
    """A format: its name, whether files are of it, how they are read, and what its files are, in words."""

    name: str
    detect: Callable[[Source], bool]
    read: Callable[[Source], PlainSAE]
    files: str


# The first that fits. A name is that of a module of this room where the module has one format.
FORMATS: tuple[Format, ...] = (
    Format("sparsify", sparsify.detect, sparsify.read, sparsify.FILES),
    Format("llamascopium", llamascopium.detect, llamascopium.read, llamascopium.FILES),
    Format("lm_saes", llamascopium.detect_old, llamascopium.read_old, llamascopium.OLD_FILES),
    Format("prisma", prisma.detect, prisma.read, prisma.FILES),
    Format("gemma_scope", gemma_scope.detect, gemma_scope.read, gemma_scope.FILES),
    Format("visaebench", visaebench.detect, visaebench.read, visaebench.FILES),
    Format(
        "clip_topk_sae",
        vision_releases.detect_clip_topk,
        vision_releases.read_clip_topk,
        vision_releases.CLIP_TOPK_FILES,
    ),
    Format("openai", openai.detect, openai.read, openai.FILES),
    Format("overcomplete", overcomplete.detect, overcomplete.read, overcomplete.FILES),
    Format(
        "clip_scope",
        vision_releases.detect_clip_scope,
        vision_releases.read_clip_scope,
        vision_releases.CLIP_SCOPE_FILES,
    ),
    Format("msae", vision_releases.detect_msae, vision_releases.read_msae, vision_releases.MSAE_FILES),
    Format(
        "batch_topk_reference",
        vision_releases.detect_reference,
        vision_releases.read_reference,
        vision_releases.REFERENCE_FILES,
    ),
    Format("goodfire", releases.detect_goodfire, releases.read_goodfire, releases.GOODFIRE_FILES),
    Format("qwen_scope", releases.detect_qwen, releases.read_qwen, releases.QWEN_FILES),
    Format("deepseek", releases.detect_deepseek, releases.read_deepseek, releases.DEEPSEEK_FILES),
)


def detect(source: Source) -> Format:
    """The format of files: what the user says (`assume`), or what the names of files and tensors tell.

    Raises:
        ValueError: files of none; it lists what was found, and what formats are made of.
    """
    named = source.assumed("format")
    if named is not None:
        names = [each.name for each in FORMATS]
        near = did_you_mean(str(named), names)
        require(named in names, f"assume: format {named!r} is not one of {', '.join(names)}{near}")
        return next(each for each in FORMATS if each.name == named)
    for each in FORMATS:
        if each.detect(source):
            return each
    raise ValueError(_nothing_matches(source))


def read(
    path: str | Path | Source,
    *,
    trust_pickle: bool | Sequence[str] = False,
    assume: Mapping[str, Any] | None = None,
) -> PlainSAE:
    """The SAE in files of any format, on the CPU, in the dtype of the file.

    Args:
        path: a folder, or a file.
        trust_pickle: names of classes that pickles may hold (pickles.py). assume: by keys of source.ASSUMPTIONS.

    Raises:
        ValueError: files of no format, damaged ones, and those of a kind that no SAE of ours is: with the file's name,
            the format's and the reason. OSError: they cannot be read.
    """
    source = path if isinstance(path, Source) else Source(path, trust_pickle, assume)
    found = detect(source)
    plain = _of_raw_input(found.read(source), source)
    unused = source.unused()
    use = f"{found.name} files say it themselves, or have no use for it"
    require(not unused, f"assume: {', '.join(unused)}: {source.path}: {use}")
    return plain


def _of_raw_input(plain: PlainSAE, source: Source) -> PlainSAE:
    """Where the user says how inputs were moved and scaled before the SAE saw them."""
    mean, std = source.assumed("input_mean"), source.assumed_number("input_std")
    if mean is None and std is None:
        return plain
    require(std is None or std > 0, f"assume: input_std is {std}, it must be positive")
    return plain.of_raw_input(0.0 if mean is None else _mean(mean, plain.d_in), 1.0 if std is None else 1 / std)


def _mean(value: Any, d_in: int) -> Tensor | float:
    """input_mean: a number, a tensor or array [d_in], or a file that holds one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    path = Path(value) if isinstance(value, str | Path) else None
    if path is not None:
        require(path.is_file(), f"assume: input_mean: {path} is neither a number nor a file")
        if path.suffix == ".npy":
            value = np.load(path, allow_pickle=False)
        else:
            source = Source(path)
            value = source.load(path.name)
        if isinstance(value, dict):
            require(len(value) == 1, f"assume: input_mean: {path} holds {len(value)} tensors; one is needed")
            value = next(iter(value.values()))
    mean_D = torch.as_tensor(value).double().flatten()
    require(mean_D.shape == (d_in,), f"assume: input_mean has {len(mean_D)} numbers; the SAE's d_in is {d_in}")
    require(bool(mean_D.isfinite().all()), "assume: input_mean holds NaN or inf")
    return mean_D


def _nothing_matches(source: Source) -> str:
    found = ", ".join(source.names[:20]) or "no files"
    more = f" and {len(source.names) - 20} more" if len(source.names) > 20 else ""
    known = "; ".join(f"{each.name}: {each.files}" for each in FORMATS)
    return f"{source.path}: no SAE of a known format; found {found}{more}; known are {known}"
