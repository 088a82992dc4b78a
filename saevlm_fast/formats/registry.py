"""All formats, in the order in which they are tried, and the one way in: detect(path), read(path)."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saevlm_fast.errors import did_you_mean, require
from saevlm_fast.files import sha256_file
from saevlm_fast.formats import (
    dictionary_learning,
    gemma_scope,
    llamascopium,
    openai,
    overcomplete,
    plain_file,
    prisma,
    releases,
    sae_lens,
    saev,
    sparsify,
    visaebench,
)
from saevlm_fast.formats import vision_releases as vision
from saevlm_fast.formats.header import Header
from saevlm_fast.formats.plain import PlainSAE
from saevlm_fast.formats.source import Source


class Format(NamedTuple):
    """A format: its name, whether files are of it, how they are read, and what its files are, in words.

    header: what is known without the weights, where that is less work than to read them.
    """

    name: str
    detect: Callable[[Source], bool]
    read: Callable[[Source], PlainSAE]
    files: str
    header: Callable[[Source], Header] | None = None


_MOST_FOLDERS = 200  # in which SAEs are looked for, to name them
# The first that fits. A name is that of a module of this room where the module has one format.
FORMATS: tuple[Format, ...] = (
    Format(sae_lens.NAME, sae_lens.detect, sae_lens.read, sae_lens.FILES, sae_lens.header),
    Format(sparsify.NAME, sparsify.detect, sparsify.read, sparsify.FILES),
    Format(plain_file.NAME, plain_file.detect, plain_file.read, plain_file.FILES),
    Format(dictionary_learning.NAME, dictionary_learning.detect, dictionary_learning.read, dictionary_learning.FILES),
    Format(saev.NAME, saev.detect, saev.read, saev.FILES),
    # By names of files and settings.
    Format("llamascopium", llamascopium.detect, llamascopium.read, llamascopium.FILES),
    Format("lm_saes", llamascopium.detect_old, llamascopium.read_old, llamascopium.OLD_FILES),
    Format("prisma", prisma.detect, prisma.read, prisma.FILES),
    Format("gemma_scope", gemma_scope.detect, gemma_scope.read, gemma_scope.FILES),
    Format("visaebench", visaebench.detect, visaebench.read, visaebench.FILES),
    Format("clip_topk_sae", vision.detect_clip_topk, vision.read_clip_topk, vision.CLIP_TOPK_FILES),
    Format("qwen_scope", releases.detect_qwen, releases.read_qwen, releases.QWEN_FILES),
    # By names of tensors in one file.
    Format("openai", openai.detect, openai.read, openai.FILES),
    Format("overcomplete", overcomplete.detect, overcomplete.read, overcomplete.FILES),
    Format("msae", vision.detect_msae, vision.read_msae, vision.MSAE_FILES),
    Format("clip_scope", vision.detect_clip_scope, vision.read_clip_scope, vision.CLIP_SCOPE_FILES),
    Format("batch_topk_reference", vision.detect_reference, vision.read_reference, vision.REFERENCE_FILES),
    Format("goodfire", releases.detect_goodfire, releases.read_goodfire, releases.GOODFIRE_FILES),
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
        require(bool(source.names), f"{source.path}: there are no files in it")
        return next(each for each in FORMATS if each.name == named)
    found = find(source)
    if found is not None:
        return found
    if _half_of_sae_lens(source):  # its reader says what is missing
        return FORMATS[0]
    raise ValueError(_nothing_matches(source))


def find(source: Source) -> Format | None:
    """The first format that files are of; None if there is none. ValueError: a damaged file."""
    return next((each for each in FORMATS if each.detect(source)), None)


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
    found = _begun(source)
    plain = _of_raw_input(found.read(source), source)
    unused = source.unused()
    use = f"{found.name} files say it themselves, or have no use for it"
    require(not unused, f"assume: {', '.join(unused)}: {source.path}: {use}")
    fits = plain.k is None or 1 <= plain.k <= plain.d_sae
    require(fits, f"{source.path}: {found.name}: k is {plain.k}; it must be between 1 and d_sae = {plain.d_sae}")
    return plain


def read_header(source: Source) -> Header:
    """What is known of the SAE in files, without its weights where the format allows that. ValueError: as `read`."""
    found = _begun(source)
    return Header.of(read(source)) if found.header is None or source.assume else found.header(source)


def _begun(source: Source) -> Format:
    """The format, with none of the files that were looked into to tell it among those that make the SAE."""
    found = detect(source)
    source.opened.clear()
    return found


def digest(source: Source) -> str:
    """SHA-256 of the files that make the SAE what it is. ValueError: as `read`."""
    read_header(source)
    digests = [sha256_file(source.folder / name) for name in sorted(source.opened)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


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
        number = float(value)
    except (TypeError, ValueError):
        pass
    else:
        require(math.isfinite(number), f"assume: input_mean is {value}, not a finite number")
        return number
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


def nearly(source: Source) -> str:
    """What speaks for an SAE where no format fits: half of one, damage, SAEs below, names of tensors; "" if nothing."""
    try:
        if find(source) is not None:
            return ""
        if _half_of_sae_lens(source):
            sae_lens.header(source)
    except (ValueError, OSError) as error:
        return str(error)
    below = _saes_below(source)
    return f"there are SAEs in it; name one: {', '.join(below)}" if below else _named_alike(source)


def _half_of_sae_lens(source: Source) -> bool:
    return bool({sae_lens.CONFIG_FILE, sae_lens.WEIGHTS_FILE} & set(source.names))


def _named_alike(source: Source) -> str:
    """Advice for a state dict without settings, which names of tensors alone do not tell from others'."""
    name = source.only(".pt", ".pth", ".safetensors")
    try:
        alike = name is not None and dictionary_learning.has_tensors(set(source.shapes(name)))
    except (ValueError, OSError):
        return ""
    named = f"{name} has tensors of the names that {dictionary_learning.NAME} gives them; if it is of it"
    command = f"saevlm-fast convert {source.path} OUTPUT --assume format={dictionary_learning.NAME}"
    return f"{named}: {command} (assume= in Python)" if alike else ""


def _nothing_matches(source: Source) -> str:
    below = _saes_below(source)
    if below:
        return f"{source.path}: no SAE itself, but there are some in it; name one: {', '.join(below)}"
    alike = _named_alike(source)
    if alike:
        return f"{source.path}: no SAE of a known format; {alike}"
    found = ", ".join(source.names[:20]) or "no files"
    more = f" and {len(source.names) - 20} more" if len(source.names) > 20 else ""
    advice = "where names of files and tensors do not tell it, assume format=NAME (convert --assume format=NAME)"
    known = "; ".join(f"{each.name}: {each.files}" for each in FORMATS)
    return f"{source.path}: no SAE of a known format; found {found}{more}; {advice}; known are {known}"


def _saes_below(source: Source) -> list[str]:
    """Places of SAEs in folders of a folder, two deep, as far as names and small files tell."""
    if source.file is not None:
        return []
    found: list[str] = []
    folders = [*source.folder.glob("*/"), *source.folder.glob("*/*/")]
    for folder in sorted(folders)[:_MOST_FOLDERS]:
        try:
            if find(Source(folder)) is not None:
                found.append(str(folder.relative_to(source.folder)))
        except (ValueError, OSError):
            continue
        if len(found) == 10:
            return [*found, "..."]
    return found
