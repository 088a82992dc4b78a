"""Images of every format, broken in every way, and decoded: refused, as they were, or otherwise."""

import io
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, features

from saevlm_fast.errors import ImageError
from saevlm_fast.images.decode import FORMATS, decode

SECONDS = 20.0  # what takes longer hangs
CHECKSUMMED = ("PNG",)  # the others have no checksum over their pixels: other ones are no fault there
MODES = {"JPEG": ("L", "RGB", "CMYK"), "PPM": ("L", "RGB"), "WEBP": ("RGB", "RGBA"), "JPEG2000": ("L", "RGB", "RGBA")}
MODES |= {"BMP": ("1", "L", "P", "RGB"), "GIF": ("L", "P"), "AVIF": ("RGB", "RGBA"), "DIB": ("L", "RGB")}
MODES |= {name: ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") for name in ("PNG", "TIFF")}
WITHOUT = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # what Pillow may be built without


def images() -> Iterator[tuple[str, bytes]]:
    """(format, file) of small pictures."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (24, 31, 4), dtype=np.uint8))
    for name in FORMATS:
        for mode in MODES[name] if name not in WITHOUT or features.check(WITHOUT[name]) else ():
            file = io.BytesIO()
            picture = noise.convert("L").convert(mode) if mode == "I;16" else noise.convert("RGB").convert(mode)
            picture.save(file, name)
            yield name, file.getvalue()


def broken(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """The file with a bit flipped, cut short, a stretch zeroed, moved, doubled, left out, or another's in its place."""
    way, start = draw.randrange(8), draw.randrange(len(data))
    stop = min(len(data), start + draw.randrange(1, 40))
    if way < 3:
        return data[:start] + bytes([data[start] ^ 1 << draw.randrange(8)]) + data[start + 1 :]
    if way == 3:
        return data[:start]
    middle = {4: bytes(stop - start), 5: 2 * data[start:stop], 6: b"", 7: other[start:stop]}[way]
    return data[:start] + middle + data[stop:]


def break_images(n: int, seed: int = 0, tell: Callable[[str], None] = print) -> dict[str, Counter[str]]:
    """n broken files of each format: how often which outcome. What must not be is told."""
    made = list(images())
    counts: dict[str, Counter[str]] = {}
    for name in dict.fromkeys(name for name, _ in made):
        draw, files = random.Random(f"{seed} {name}"), [data for each, data in made if each == name]
        counts[name] = Counter()
        for number in range(n):
            whole = draw.choice(files)
            data = broken(draw, whole, draw.choice(made)[1])
            kind, said = _outcome(name, whole, data)
            counts[name][kind] += 1
            if kind in ("silent", "traceback", "hang"):
                tell(f"{kind}: {name}, number {number}: {said}")
    return counts


def _outcome(name: str, whole: bytes, data: bytes) -> tuple[str, str]:
    start = time.monotonic()
    try:
        found = decode(data)
    except ImageError as error:
        said = str(error)
        kind = "refused" if said.strip() and "\n" not in said else "traceback"
    except Exception as error:
        kind, said = "traceback", f"{type(error).__name__}: {error}"
    else:
        expected, said = decode(whole), ""
        same = found.size == expected.size and found.tobytes() == expected.tobytes()
        kind = "as it was" if same else "silent" if name in CHECKSUMMED else "other pixels"
    return ("hang" if time.monotonic() - start > SECONDS else kind), said
