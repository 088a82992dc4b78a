"""Data sets of the Hugging Face Hub, by the name that datasets.load_dataset has for them:

    hf-dataset:USER/NAME[@REVISION][:CONFIG][::SPLIT][#COLUMN]

The package datasets says which files of the repository are those of a config and a split (its README, the names of the
files); they are read as files there are (images/remote.py): in the order of datasets' streaming mode, and every row has
its number, by which a harvest is resumed and shared between processes. A data set of files that are not read here (CSV,
ZIP, Arrow ...) is read as the Hub itself has converted it to parquet, where it has.
"""

import re
from typing import Any, NamedTuple

from saevlm_fast.errors import require
from saevlm_fast.images.remote import open_files, unpinned_note
from saevlm_fast.images.sources import ImageSource, is_image
from saevlm_fast.remote.answers import NotThere
from saevlm_fast.remote.reading import at_commit, listed
from saevlm_fast.urls import redacted_text

PREFIX = "hf-dataset:"
_FORM = "hf-dataset:USER/NAME[@REVISION][:CONFIG][::SPLIT][#COLUMN]"
_SPEC = re.compile(r"([^/@:#]+/[^/@:#]+)(?:@([^:#]+))?(?::(?!:)([^:#]+))?(?:::([^:#]+))?(?:#(.+))?")


class _Wanted(NamedTuple):
    """What the text asks for; "" for what it leaves open."""

    repo: str
    revision: str
    config: str
    split: str
    column: str


def open_hub_dataset(text: str) -> ImageSource:
    """The images of a split, without reading any.

    Raises:
        ValueError: not of this form, the package datasets is missing, no such config, split or column, files of another
            kind. RemoteError: it cannot be read.
    """
    match = _SPEC.fullmatch(text.removeprefix(PREFIX))
    require(match is not None, f"images: {text}: not of the form {_FORM}")
    assert match is not None
    wanted = _Wanted(*match.groups(default=""))
    root = f"hf://datasets/{wanted.repo}"
    pinned = at_commit(f"{root}@{wanted.revision}" if wanted.revision else root)
    config, files_of_split = _files(text, wanted, pinned.rpartition("@")[2])
    split = wanted.split or next(iter(files_of_split))
    several = not wanted.split and len(files_of_split) > 1
    known = split in files_of_split and not several
    what = "holds several splits" if several else f"no split {split!r}"
    require(known, f"images: {text}: {what}; add ::SPLIT, one of: {', '.join(files_of_split)}")
    urls, note = _readable(text, wanted, config, split, files_of_split[split])
    source = open_files(urls, text, wanted.column)
    source.notes += tuple(filter(None, (note, unpinned_note(f"{PREFIX}{wanted.repo}", wanted.revision, pinned))))
    return source


def _files(text: str, wanted: _Wanted, commit: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the config, and the URLs of every split's files."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"images: {text}: needs the package datasets: pip install 'saevlm-fast[datasets]'; "
            f"or name the files: hf://datasets/{wanted.repo}/..."
        ) from error
    try:
        builder: Any = datasets.load_dataset_builder(wanted.repo, wanted.config or None, revision=commit)
        files = {
            str(split): [str(file) for file in found] for split, found in (builder.config.data_files or {}).items()
        }
    except Exception as error:  # of datasets, huggingface_hub, the network: of any kind
        raise ValueError(
            f"images: {text}: datasets says: {redacted_text(' '.join(str(error).split()))[:400]}"
        ) from None
    require(len(files) > 0, f"images: {text}: datasets finds no files of data in it")
    return str(builder.config.name), files


def _readable(text: str, wanted: _Wanted, config: str, split: str, files: list[str]) -> tuple[list[str], str]:
    """Files of one kind that is read here, and what to say of it: the data set's own, else the Hub's conversion."""
    for belongs in (_ending(".parquet"), _ending(".tar"), is_image):
        found = [file for file in files if belongs(file)]
        others = sorted({_suffix(file) for file in files if not belongs(file)})
        beside = "" if not others else f"beside the images, not used: {', '.join(others)}"
        if found and (not others or (belongs is is_image and ".zip" not in others)):
            return found, beside
    kinds = ", ".join(sorted({_suffix(file) for file in files}))
    require(
        not wanted.revision,
        f"images: {text}: its files ({kinds}) are not read; leave @{wanted.revision} away for "
        "what the Hub has converted",
    )
    try:
        found = listed(f"hf://datasets/{wanted.repo}@~parquet/{config}/{split}/*.parquet")
    except NotThere:
        found = []
    needed = f"its files ({kinds}) are not read, and the Hub has not converted the whole split to parquet"
    require(len(found) > 0, f"images: {text}: {needed}")
    return found, f"read as the Hub has converted it to parquet; its own files are {kinds}"


def _ending(suffix: str) -> Any:
    return lambda file: file.lower().endswith(suffix)


def _suffix(file: str) -> str:
    name = file.rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else "no extension"
