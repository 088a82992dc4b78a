"""Image-text pairs: any source of images that has captions (images/captions.py), and some of them made wrong."""

import hashlib
from typing import Any

import numpy as np

from saevlm_fast.errors import ImageError, require
from saevlm_fast.images.captions import CAPTION_NAMES
from saevlm_fast.images.sources import ImageSource

_LOOKED_AT = 64  # images, the first ones: a set without captions is refused before a model is loaded


def caption(source: ImageSource, i: int) -> str:
    """The caption of image i. ImageError: it has none."""
    text = _captioned(source).caption(i)
    if text is None:
        raise ImageError("no caption")
    return text


def check_captions(source: ImageSource, named: str) -> None:
    """ValueError: a source that knows no captions, or that has none among its first images."""
    known = hasattr(source, "caption")
    some = known and any(_captioned(source).caption(i) is not None for i in range(min(len(source), _LOOKED_AT)))
    looked = f"looked for {', '.join(CAPTION_NAMES[:3])} and so on in columns and JSON, .txt beside images"
    what = f"none of the first {min(len(source), _LOOKED_AT)} images has a caption" if known else "has no captions"
    require(some, f"images: {named or source}: {what}; a language layer reads image-text pairs ({looked})")


def _captioned(source: ImageSource) -> Any:
    """The source, which has a method `caption` that not every ImageSource needs."""
    return source


class WrongCaptions:
    """About a share of the images with the caption of another one: what a ranking of image-text pairs should find.

    Which ones depends on their ids and the seed; each gets the caption of the next of them that says something else. An
    ImageSource with captions.

    Attributes:
        wrong: bool [N], which images have a wrong caption.
    """

    def __init__(self, source: ImageSource, share: float, seed: int):
        self._source, self.share, self.seed = _captioned(source), share, seed
        self.n_ignored = source.n_ignored
        self.notes = (*source.notes, f"about {share:.0%} of the captions are wrong (seed {seed})")
        ids = (source.image_id(i) for i in range(len(source)))
        self.wrong = np.array([is_wrong(name, share, seed) for name in ids], bool)
        self._chosen = np.flatnonzero(self.wrong)
        require(len(self._chosen) != 1, f"wrong_captions: {share} of {len(source)} images is one, which has no other")

    def __len__(self) -> int:
        return len(self._source)

    def image_id(self, i: int) -> str:
        return self._source.image_id(i)

    def label(self, i: int) -> str | None:
        return self._source.label(i)

    def read(self, i: int) -> bytes:
        return self._source.read(i)

    def caption(self, i: int) -> str | None:
        """Another image's, if this one was drawn: the next of those drawn, so that shards are read in order."""
        own = self._source.caption(i)
        if own is None or not self.wrong[i]:
            return own
        place = int(np.searchsorted(self._chosen, i))
        for step in range(1, len(self._chosen)):
            other = int(self._chosen[(place + step) % len(self._chosen)])
            text = self._source.caption(other)
            if text not in (None, own):
                return text
        return None

    def fingerprint(self) -> str:
        told = f"{self._source.fingerprint()} wrong captions {self.share!r} {self.seed}"
        return hashlib.sha256(told.encode()).hexdigest()


def is_wrong(image_id: str, share: float, seed: int) -> bool:
    """Whether a WrongCaptions of this share and seed gives the image another's caption: by its id alone."""
    digest = hashlib.sha256(f"wrong caption {seed} {image_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") < share * 2.0**64
