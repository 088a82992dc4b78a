"""The webdataset convention: the names of an archive's members become images and their labels.

A member's key is its path up to the first dot of its base name; its extension is the rest, in lower case (webdataset's
base_plus_ext). Members of one key are one sample, wherever they stand in the archive.

Images. A plain image extension (0.jpg) makes the image of its sample; of several the first in IMAGE_SUFFIXES, so jpg
before png before webp. A compound one (0.depth.png, 0.seg.png) is another view of it, and is not used. In a sample
without a plain one, every compound one is an image of its own (22.00.png, 22.01.png; ILSVRC2012.val.00000001.JPEG),
unless its extension stands beside a plain image elsewhere in the archive: a lone 7.seg.png stays a mask.

Labels, first that is there: NAME, NAME.txt or NAME.json for the names of LABEL_NAMES (0.cls, 0.cls.txt, 0.label); the
field of such a name in json; txt; the directory. An image with a compound extension looks for its own first
(22.00.cls, then 22.cls). An empty text says that there is none.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from saevlm_fast.images.captions import caption_of_file
from saevlm_fast.images.sources import IMAGE_SUFFIXES, LABEL_NAMES, directory_of

MAX_LABEL_BYTES = 1 << 20  # of a member with a label: img2dataset's JSON has some thousand
_PLAIN = {suffix[1:]: rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}
LABEL_EXTENSIONS = (
    *(f"{name}{kind}" for name in LABEL_NAMES for kind in ("", ".txt", ".json")),
    *("json", "txt"),
)  # in the order in which they are looked for
CAPTION_EXTENSIONS = ("txt", "caption", "json")  # likewise


class Member(NamedTuple):
    """A file in an archive: its name there, where its bytes begin, how many there are."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """An image and its label. used: extension of the member that gave the label, if one did.

    caption: the member that holds the caption, or may (JSON), if there is one: it is read when it is asked for.
    """

    image: Member
    label: str | None
    used: str | None
    caption: Member | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member; None for hidden files and for names without a dot."""
    directory, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (directory + slash + stem, extension.lower()) if stem and dot else None


class Samples:
    """The members of one archive, added in its order, and what becomes of them.

    Attributes:
        unused: extension -> members that became neither an image nor a label ("" for links, hidden files and so on).
    """

    def __init__(self) -> None:
        self._members: dict[str, dict[str, Member]] = {}
        self.unused: Counter[str] = Counter()

    def add(self, member: Member) -> None:
        """A regular file of the archive."""
        split = split_name(member.name)
        if split is None:
            self.unused[""] += 1
            return
        key, extension = split
        if self._members.setdefault(key, {}).setdefault(extension, member) is not member:
            self.unused[extension] += 1  # the same name again, or in capitals

    def resolve(self, read: Callable[[Member], bytes]) -> Iterator[Sample]:
        """Every image with its label, in the archive's order of keys. Ends with `unused` complete.

        read: the bytes of a member; called for those with a label that count, of MAX_LABEL_BYTES at most.
        """
        views = self._views()
        for members in self._members.values():
            plain = min((e for e in members if e in _PLAIN), key=_PLAIN.__getitem__, default=None)
            compound = [e for e in members if "." in e and _is_image(e) and e not in views]
            images = compound if plain is None else [plain]
            used = set(images)
            for extension in images:
                label, found = _label(members, extension, read)
                if found is None:
                    label = directory_of(members[extension].name)
                else:
                    used.add(found)
                kind, caption = None if found is None else _kind(found), _caption(members, extension)
                used.update(e for e, member in members.items() if member is caption and _says(e, member, read))
                yield Sample(members[extension], label, kind, caption)
            self.unused.update(e for e in members if e not in used)

    def _views(self) -> set[str]:
        """Compound image extensions that stand beside a plain image."""
        with_image = (members for members in self._members.values() if not _PLAIN.keys().isdisjoint(members))
        return {e for members in with_image for e in members if "." in e and _is_image(e)}


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _PLAIN


def _kind(extension: str) -> str:
    """The label's extension without what is the image's own: cls of 00.cls."""
    return next(known for known in LABEL_EXTENSIONS if extension == known or extension.endswith(f".{known}"))


def _label(members: Mapping[str, Member], image: str, read: Callable[[Member], bytes]) -> tuple[str | None, str | None]:
    """(label, extension it came from) of the image with this extension; (None, None) where no member says."""
    if len(members) == 1:
        return None, None
    own = image.rpartition(".")[0]
    for known in LABEL_EXTENSIONS:
        for extension in (f"{own}.{known}", known) if own else (known,):
            member = members.get(extension)
            if member is None or member.size > MAX_LABEL_BYTES:
                continue
            text = read(member).decode(errors="backslashreplace").strip()
            if not known.endswith("json"):
                return text or None, extension
            if (label := _json_label(text, bare=known != "json")) is not None:
                return label, extension
    return None, None


def _caption(members: Mapping[str, Member], image: str) -> Member | None:
    """The member with the caption of the image with this extension: its own first (00.txt), then the sample's."""
    own = image.rpartition(".")[0]
    for known in CAPTION_EXTENSIONS:
        for extension in (f"{own}.{known}", known) if own else (known,):
            if extension in members:
                return members[extension]
    return None


def _says(extension: str, member: Member, read: Callable[[Member], bytes]) -> bool:
    """Whether the member that would hold a caption does; JSON may hold something else, and is not read if large."""
    if not extension.endswith("json"):
        return True
    return member.size <= MAX_LABEL_BYTES and caption_of_file(read(member), is_json=True) is not None


def _json_label(text: str, bare: bool) -> str | None:
    """The first field of LABEL_NAMES that holds text, a whole number or a truth value; if bare, JSON that is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    candidates = [value.get(name) for name in LABEL_NAMES] if isinstance(value, dict) else [value] if bare else []
    return next((label for candidate in candidates if (label := label_text(candidate)) is not None), None)


def label_text(value: Any) -> str | None:
    """A label of any container as text: text, whole numbers, truth values; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, (str, int)) and value != "" else None
