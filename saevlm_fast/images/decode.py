"""Decoding: an image's bytes become upright 8-bit RGB pixels, right or refused."""

import functools
import io
import re
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from saevlm_fast.errors import ImageError, first_line, require
from saevlm_fast.images.sources import not_empty

# Formats that run no interpreter and load no plug-in of a third party (Pillow's EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
# Pillow's default, above which it warns and above twice of which it refuses; here the first limit refuses.
MAX_PIXELS = 89_478_485
# What turns the stored picture upright, by the value of EXIF's tag Orientation (CIPA DC-008, section 4.6.4).
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SAMPLE_FORMAT_TAG, PHOTOMETRIC_TAG, BITS_PER_SAMPLE_TAG = 339, 262, 258  # TIFF 6.0


def decode(data: bytes, at_least: int | None = None) -> Image.Image:
    """An encoded image as an upright 8-bit RGB image. Right, or refused: ImageError with the reason in one line.

    The content decides the format, never a name. Transparency, of whatever kind, is laid on white. 16-bit gray keeps
    its high byte (as Pillow itself does with 16-bit RGB), animations give their first frame, EXIF (or XMP) orientation
    is applied; unreadable EXIF counts as none, as in every viewer. Colour profiles are not applied. Refused: no pixels
    or more than MAX_PIXELS (by the header, before decoding), truncated files, samples without a fixed range (floating
    point, signed, 32-bit).

    A PNG's chunks, up to its end mark, must fit their checksums. PNG alone has any over its pixels: JPEG, WebP, TIFF,
    GIF, BMP, PPM, AVIF and JPEG 2000 have none, so a flipped bit in their coded data goes through as the decoder shows
    it, where the decoder does not stumble.

    With at_least, for thumbnails: a JPEG may come halved, once or more, as its decoder does it, no side below at_least.

    Safe in threads and processes. Pillow's warnings about a file's metadata are turned off for the process.
    """
    _silence_pillow()
    try:
        return _decoded(not_empty(data), at_least)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image, or damaged in its header (known: {', '.join(_formats())})") from None
    except Exception as error:  # Pillow raises some fifteen kinds for damaged files, and no list of them is complete
        raise ImageError(first_line(error)) from error


def _silence_pillow() -> None:
    """catch_warnings is not thread-safe; one permanent filter is. Whoever resets the filters gets it again."""
    ours = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if not warnings.filters or warnings.filters[0] != ours:
        warnings.filterwarnings("ignore", module=r"PIL\.")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decoded(data: bytes, at_least: int | None) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
    width, height = image.size
    bomb = f"decompression bomb? {width} x {height} pixels; at most {MAX_PIXELS} are decoded"
    require(width * height <= MAX_PIXELS, bomb, ImageError)
    # A JPEG 2000 file cut off right after its header is decoded without a complaint; only the end mark tells.
    require(image.format != "JPEG2000" or b"\xff\xd9" in data, "image file is truncated", ImageError)
    if image.format == "PNG":
        _check_png_chunks(data)
    if image.format == "TIFF":
        _refuse_what_pillow_misreads(image)
    if at_least is not None and image.format == "JPEG":
        image.draft(None, (at_least, at_least))
    image.load()
    turn = UPRIGHT.get(_orientation(image))
    rgb = _rgb(image, data)
    return rgb if turn is None else rgb.transpose(turn)


def _check_png_chunks(data: bytes) -> None:
    """Every chunk's CRC (PNG specification, section 5.3); Pillow looks at none from the pixels on.

    Ancillary chunks too: transparency, orientation and which frame is first hang on them. What is missing behind the
    last whole chunk is left to the decoder, and what follows the end mark is no part of the picture.
    """
    position, view = 8, memoryview(data)
    while position < len(data):
        length = int.from_bytes(view[position : position + 4], "big")
        end = position + 8 + length
        require(end + 4 <= len(data), "image file is truncated, or the length of a PNG chunk is damaged", ImageError)
        kind = bytes(view[position + 4 : position + 8])
        fits = zlib.crc32(view[position + 4 : end]) == int.from_bytes(view[end : end + 4], "big")
        require(fits, f"damaged: the checksum of PNG chunk {kind!r} does not fit", ImageError)
        if kind == b"IEND":
            return
        position = end + 4


def _refuse_what_pillow_misreads(image: Any) -> None:
    """Of an opened TIFF: signed samples, taken for unsigned, and uncompressed YCbCr, taken for RGB + padding."""
    formats = image.tag_v2.get(SAMPLE_FORMAT_TAG, (1,))
    unsigned = all(kind in (1, 4) for kind in (formats if isinstance(formats, tuple) else (formats,)))
    signed = "TIFF with signed or floating-point samples; 8- or 16-bit unsigned ones are needed"
    require(unsigned, signed, ImageError)
    plain = image.tag_v2.get(PHOTOMETRIC_TAG) != 6 or image.tile[0][0] == "libtiff"
    require(plain, "uncompressed YCbCr TIFF is not supported", ImageError)


def _orientation(image: Image.Image) -> int:
    """Of a loaded image: Pillow turns TIFFs upright while it loads them, and then says 1."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF, see decode
        return 1


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    fixed = image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM"))
    endless = f"samples of mode {image.mode} have no fixed range; 8- or 16-bit unsigned ones are needed"
    require(fixed, endless, ImageError)
    if image.mode.startswith("I"):
        return _high_byte(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.format == "PNG":
        _mend_colour_key(image, bit_depth=data[24])
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _high_byte(image: Any) -> Image.Image:
    """8-bit gray, as RGB, of 16-bit (or, TIFF, 12-bit) gray. Gray that a PNG declares transparent becomes white."""
    gray_HW = np.asarray(image).astype(np.uint16)
    bits = image.tag_v2.get(BITS_PER_SAMPLE_TAG, (16,))[0] if image.format == "TIFF" else 16
    high_HW = (gray_HW >> (bits - 8)).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_TAG) == 0:  # white is zero; Pillow does not look
        high_HW = 255 - high_HW
    if "transparency" in image.info:
        high_HW[gray_HW == image.info["transparency"]] = 255
    return Image.fromarray(high_HW).convert("RGB")


def _mend_colour_key(image: Image.Image, bit_depth: int) -> None:
    """Pillow compares a PNG's transparent colour, in the file's bit depth, with pixels stretched to 8 bits."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and bit_depth < 8:
        image.info["transparency"] = key * 255 // (2**bit_depth - 1)
    lost = "16-bit RGB PNG with a transparent colour: its pixels cannot be told apart in 8 bits"
    require(image.mode != "RGB" or bit_depth != 16, lost, ImageError)
