"""Image sources and decoding, against pixels made by numpy and files written byte by byte."""

import io
import json
import multiprocessing
import os
import pickle
import struct
import sys
import tarfile
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from saevlm_fast.errors import ImageError, printable
from saevlm_fast.images.decode import MAX_PIXELS, decode
from saevlm_fast.images.open import open_images
from saevlm_fast.images.sources import ImageSource

AVIF = ".avif" in Image.registered_extensions()
RGB_HW3 = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
GRAY_HW = RGB_HW3[..., 0]


# --- Files, written by hand where Pillow is what is tested -----------------------------------------------------------


def encoded(image: Image.Image | np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """rows: packed pixels of all rows. colour: 0 gray, 2 RGB, 3 palette, 4 gray + alpha, 6 RGBA."""
    stride = max(1, len(rows) // height)
    filtered = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    idat = png_chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(extra) + idat + png_chunk(b"IEND", b"")


def tiff(pixels: bytes, width: int, height: int, **tags: tuple[int, ...]) -> bytes:
    """Little-endian, uncompressed, one strip."""
    numbers = {"bits": 258, "photometric": 262, "samples": 277, "extra": 338, "sample_format": 339, "orientation": 274}
    entries = {256: (width,), 257: (height,), 259: (1,), 273: (8,), 278: (height,), 279: (len(pixels),)}
    entries |= {numbers[name]: value for name, value in tags.items()}
    directory_at = 8 + len(pixels) + len(pixels) % 2
    overflow_at, overflow, directory = directory_at + 2 + 12 * len(entries) + 4, b"", b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            packed, overflow = struct.pack("<I", overflow_at + len(overflow)), overflow + packed
        directory += struct.pack("<HHI", tag, 4, len(values)) + packed
    start = struct.pack("<2sHI", b"II", 42, directory_at) + pixels + b"\0" * (len(pixels) % 2)
    return start + struct.pack("<H", len(entries)) + directory + struct.pack("<I", 0) + overflow


def exif(orientation: int, name: bytes = b"") -> bytes:
    return name + struct.pack(">2sHIH HHIHH I", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def gray3(gray_HW: np.ndarray) -> np.ndarray:
    return np.repeat(gray_HW[..., None], 3, axis=2).astype(np.uint8)


def on_white(colour_HW3: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    alpha_HW1 = alpha_HW[..., None] / 255.0
    return np.round(colour_HW3 * alpha_HW1 + 255 * (1 - alpha_HW1))


def assert_pixels(data: bytes, expected_HW3: np.ndarray, tolerance: int = 0) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    actual = np.asarray(image).astype(int)
    assert actual.shape == expected_HW3.shape
    assert np.abs(actual - expected_HW3.astype(int)).max() <= tolerance


# --- Decoding: every kind --------------------------------------------------------------------------------------------

LOSSLESS = [
    {"format": "PNG"},
    {"format": "BMP"},
    {"format": "PPM"},
    {"format": "TIFF"},
    {"format": "TIFF", "compression": "tiff_lzw"},
    {"format": "WEBP", "lossless": True},
    {"format": "JPEG2000"},
]


@pytest.mark.parametrize("options", LOSSLESS, ids=lambda options: "-".join(map(str, options.values())))
def test_rgb_is_exact(options: dict[str, object]) -> None:
    assert_pixels(encoded(RGB_HW3, **options), RGB_HW3)


def test_jpeg_is_what_the_library_decodes() -> None:
    data = encoded(RGB_HW3, format="JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert_pixels(data, np.asarray(image))


@pytest.mark.skipif(not AVIF, reason="this Pillow has no AVIF")
def test_avif() -> None:
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert_pixels(encoded(smooth, format="AVIF", quality=100, subsampling="4:4:4"), smooth, tolerance=3)


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "TIFF"}, {"format": "PPM"}, {"format": "GIF"}])
def test_grayscale(options: dict[str, object]) -> None:
    assert_pixels(encoded(GRAY_HW, **options), gray3(GRAY_HW))


def test_gray_jpeg() -> None:
    assert_pixels(encoded(np.full((16, 16), 77, np.uint8), format="JPEG"), np.full((16, 16, 3), 77), tolerance=1)


def test_one_bit() -> None:
    bits_HW = np.random.default_rng(1).integers(0, 2, (5, 16), dtype=np.uint8)
    data = png(16, 5, 1, 0, np.packbits(bits_HW, axis=1).tobytes())
    assert_pixels(data, gray3(bits_HW * 255))
    assert_pixels(b"P4\n16 5\n" + np.packbits(1 - bits_HW, axis=1).tobytes(), gray3(bits_HW * 255))  # P4: 1 is black
    assert_pixels(encoded(Image.fromarray(bits_HW * 255).convert("1"), format="TIFF"), gray3(bits_HW * 255))


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff white is zero", "tiff big-endian", "pgm", "jpeg2000"])
def test_16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    gray_HW = np.linspace(0, 65535, 20 * 24).astype(np.uint16).reshape(20, 24)
    big, little = gray_HW.astype(">u2").tobytes(), gray_HW.astype("<u2").tobytes()
    data = {
        "png": png(24, 20, 16, 0, big),
        "tiff": tiff(little, 24, 20, bits=(16,), photometric=(1,), samples=(1,)),
        "tiff white is zero": tiff(
            (65535 - gray_HW).astype("<u2").tobytes(), 24, 20, bits=(16,), photometric=(0,), samples=(1,)
        ),
        "tiff big-endian": encoded(Image.frombytes("I;16B", (24, 20), big), format="TIFF"),
        "pgm": b"P5 24 20 65535\n" + big,
        "jpeg2000": encoded(gray_HW, format="JPEG2000"),
    }[kind]
    assert_pixels(data, gray3(gray_HW >> 8))


def test_12_bit_tiff_uses_its_own_range() -> None:
    gray_HW = np.array([[0, 1, 2048, 4095]], np.uint16)
    packed = bytes([0x00, 0x00, 0x01, 0x80, 0x0F, 0xFF])
    assert_pixels(tiff(packed, 4, 1, bits=(12,), photometric=(1,), samples=(1,)), gray3(gray_HW >> 4))


def test_16_bit_rgb_png() -> None:
    rgb_HW3 = np.random.default_rng(2).integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    assert_pixels(png(5, 6, 16, 2, rgb_HW3.astype(">u2").tobytes()), rgb_HW3 >> 8)


def test_alpha_is_laid_on_white() -> None:
    alpha_HW = GRAY_HW.T.reshape(GRAY_HW.shape)
    rgba = np.dstack([RGB_HW3, alpha_HW])
    expected = on_white(RGB_HW3, alpha_HW)
    assert_pixels(png(24, 20, 8, 6, rgba.tobytes()), expected, tolerance=1)
    assert_pixels(encoded(rgba, format="WEBP", lossless=True, exact=True), expected, tolerance=1)
    assert_pixels(encoded(rgba, format="TIFF"), expected, tolerance=1)
    gray_alpha = np.dstack([GRAY_HW, alpha_HW])
    assert_pixels(png(24, 20, 8, 4, gray_alpha.tobytes()), on_white(gray3(GRAY_HW), alpha_HW), tolerance=1)


def test_palettes_with_every_kind_of_transparency() -> None:
    colours = RGB_HW3[0, :4]
    palette = png_chunk(b"PLTE", colours.tobytes())
    indices = bytes([0, 1, 2, 3])
    assert_pixels(png(4, 1, 8, 3, indices, palette), colours[None])
    assert_pixels(png(4, 1, 2, 3, bytes([0b00011011]), palette), colours[None])
    alpha = np.array([[0, 128, 255, 255]])
    with_alpha = png(4, 1, 8, 3, indices, palette, png_chunk(b"tRNS", bytes([0, 128])))
    assert_pixels(with_alpha, on_white(colours[None], alpha), tolerance=1)
    one_colour = png(4, 1, 8, 3, indices, palette, png_chunk(b"tRNS", bytes([255, 0])))
    assert_pixels(one_colour, on_white(colours[None], np.array([[255, 0, 255, 255]])))
    gif = Image.fromarray(np.frombuffer(indices, np.uint8).reshape(1, 4))
    gif.putpalette(colours.tobytes())
    assert_pixels(encoded(gif, format="GIF", transparency=2), on_white(colours[None], np.array([[255, 255, 0, 255]])))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_gray_of_every_depth(depth: int) -> None:
    top = 2**depth - 1
    gray_W = np.arange(8) % 2 * top if depth == 1 else np.linspace(0, top, 8).astype(int)
    bits = "".join(f"{gray:0{depth}b}" for gray in gray_W)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    key = int(gray_W[1])
    expected = np.where(gray_W == key, 255, gray_W >> 8 if depth == 16 else gray_W * 255 // top)
    assert_pixels(png(8, 1, depth, 0, data, png_chunk(b"tRNS", struct.pack(">H", key))), gray3(expected[None]))


def test_transparent_rgb() -> None:
    key = png_chunk(b"tRNS", struct.pack(">3H", *RGB_HW3[0, 0]))
    expected = RGB_HW3.copy()
    expected[0, 0] = 255
    assert_pixels(png(24, 20, 8, 2, RGB_HW3.tobytes(), key), expected)
    with pytest.raises(ImageError, match="16-bit RGB PNG with a transparent colour"):
        decode(png(1, 1, 16, 2, bytes(6), key))


def test_cmyk_jpeg_and_tiff() -> None:
    cyan_red_gray = [(255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 128)]
    expected = np.repeat(np.array([[[0, 255, 255], [255, 0, 0], [127, 127, 127]]]), 16, axis=1).repeat(16, axis=0)
    cmyk_HW4 = np.repeat(np.array([cyan_red_gray], np.uint8), 16, axis=1).repeat(16, axis=0)
    jpeg = encoded(Image.frombytes("CMYK", (48, 16), cmyk_HW4.tobytes()), format="JPEG", quality=100)
    assert b"Adobe" in jpeg
    assert_pixels(jpeg, expected, tolerance=3)
    assert_pixels(tiff(cmyk_HW4.tobytes(), 48, 16, bits=(8,) * 4, photometric=(5,), samples=(4,)), expected)


def test_ycbcr_tiff() -> None:
    ycc = RGB_HW3.astype(float)
    y, cb, cr = ycc[..., 0], ycc[..., 1] - 128, ycc[..., 2] - 128
    rgb = np.dstack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])  # JFIF 1.02, section 7
    stored = Image.frombytes("YCbCr", (24, 20), RGB_HW3.tobytes())
    for compression in ("tiff_lzw", "packbits"):
        assert_pixels(encoded(stored, format="TIFF", compression=compression), rgb.round().clip(0, 255), tolerance=1)
    with pytest.raises(ImageError, match=r"^uncompressed YCbCr TIFF"):  # Pillow takes four bytes a pixel, if it can
        decode(encoded(stored, format="TIFF") + bytes(2000))


def test_lab_tiff() -> None:
    lab = np.array([[[255, 0, 0], [128, 0, 0], [0, 0, 0]]], np.uint8)  # L of 100 %, 50.2 %, 0 % without colour
    data = tiff(lab.tobytes(), 3, 1, bits=(8,) * 3, photometric=(8,), samples=(3,))
    assert_pixels(data, np.array([[[255] * 3, [119.5] * 3, [0] * 3]]), tolerance=2)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    stored = {  # the upright picture as it is stored, by where row 0 and column 0 lie (Exif 2.32, Orientation)
        1: RGB_HW3,
        2: RGB_HW3[:, ::-1],
        3: RGB_HW3[::-1, ::-1],
        4: RGB_HW3[::-1],
        5: RGB_HW3.swapaxes(0, 1),
        6: np.rot90(RGB_HW3),
        7: RGB_HW3[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB_HW3, -1),
    }[orientation]
    stored = np.ascontiguousarray(stored)
    height, width = stored.shape[:2]
    data = {
        "PNG": png(width, height, 8, 2, stored.tobytes(), png_chunk(b"eXIf", exif(orientation))),
        "WEBP": encoded(stored, format="WEBP", lossless=True, exif=exif(orientation)),
        "TIFF": tiff(
            stored.tobytes(),
            width,
            height,
            bits=(8, 8, 8),
            photometric=(2,),
            samples=(3,),
            orientation=(orientation,),
        ),
    }[kind]
    assert_pixels(data, RGB_HW3)


def test_exif_orientation_of_a_gray_jpeg_with_alpha_like_metadata() -> None:
    half = np.zeros((16, 32), np.uint8)
    half[:, 16:] = 255
    turned = encoded(np.rot90(half), format="JPEG", exif=exif(6, b"Exif\0\0"))
    assert_pixels(turned, gray3(half), tolerance=2)


@pytest.mark.parametrize("damage", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense", exif(77)])
def test_unreadable_exif_counts_as_none(damage: bytes) -> None:
    plain = encoded(RGB_HW3, format="JPEG", quality=95)
    segment = b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage
    assert_pixels(plain[:2] + segment + plain[2:], np.asarray(decode(plain)))


@pytest.mark.parametrize("options", [{"format": "GIF"}, {"format": "WEBP", "lossless": True}, {"format": "PNG"}])
def test_first_frame_of_an_animation(options: dict[str, object]) -> None:
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (10, 200, 90)]
    rest = [Image.fromarray(frame) for frame in frames[1:]]
    assert_pixels(encoded(frames[0], save_all=True, append_images=rest, **options), frames[0])


def test_float_signed_and_32_bit_samples_are_refused() -> None:
    for data in (
        encoded(Image.new("F", (4, 4)), format="TIFF"),
        encoded(Image.new("I", (4, 4)), format="TIFF"),
        tiff(bytes(64), 4, 4, bits=(32,), photometric=(1,), samples=(1,)),
        tiff(bytes(32), 4, 4, bits=(16,), photometric=(1,), samples=(1,), sample_format=(2,)),
        tiff(bytes(16), 4, 4, bits=(8,), photometric=(1,), samples=(1,), sample_format=(2,)),
        b"Pf 2 2 -1.0\n" + bytes(16),
    ):
        with pytest.raises(ImageError, match=r"8- or 16-bit unsigned ones are needed$"):
            decode(data)


# --- Decoding: what must be refused ----------------------------------------------------------------------------------


def small_files() -> dict[str, bytes]:
    palette = Image.fromarray(RGB_HW3).quantize(16)
    files = {
        "jpeg": encoded(RGB_HW3, format="JPEG", exif=exif(6, b"Exif\0\0")),
        "progressive": encoded(RGB_HW3, format="JPEG", progressive=True),
        "png": encoded(RGB_HW3, format="PNG"),
        "palette": encoded(palette, format="PNG", transparency=bytes(range(0, 256, 16))),
        "apng": encoded(RGB_HW3, format="PNG", save_all=True, append_images=[Image.fromarray(255 - RGB_HW3)]),
        "gif": encoded(palette, format="GIF"),
        "webp": encoded(RGB_HW3, format="WEBP"),
        "lossless webp": encoded(RGB_HW3, format="WEBP", lossless=True),
        "bmp": encoded(RGB_HW3, format="BMP"),
        "tiff": encoded(RGB_HW3, format="TIFF"),
        "tiff 16": tiff(bytes(range(240)) * 4, 24, 20, bits=(16,), photometric=(0,), samples=(1,)),
        "lzw tiff": encoded(RGB_HW3, format="TIFF", compression="tiff_lzw"),
        "ppm": encoded(RGB_HW3, format="PPM"),
        "jp2": encoded(RGB_HW3, format="JPEG2000"),
        "j2k": encoded(RGB_HW3, format="JPEG2000", no_jp2=True),
    }
    return files | ({"avif": encoded(RGB_HW3, format="AVIF")} if AVIF else {})


SMALL_FILES = small_files()


@pytest.mark.parametrize("kind", SMALL_FILES)
def test_truncated_files_are_refused_never_half_decoded(kind: str) -> None:
    data = SMALL_FILES[kind]
    whole = np.asarray(decode(data))
    for end in range(len(data)):
        try:
            image = decode(data[:end])
        except ImageError:
            continue
        assert np.array_equal(image, whole), end  # all that is missing is the end mark, metadata or later frames
        assert end > len(data) * (0.4 if kind == "apng" else 0.9)


PNGS = {
    "rgb": png(3, 2, 8, 2, bytes(range(40, 58))),
    "palette": png(3, 1, 8, 3, bytes([0, 1, 2]), png_chunk(b"PLTE", bytes(range(9))), png_chunk(b"tRNS", b"\x00\x80")),
    "turned": png(3, 2, 8, 0, bytes(range(6)), png_chunk(b"eXIf", exif(6))),
    "two frames": encoded(RGB_HW3[:2, :2], format="PNG", save_all=True, append_images=[Image.new("RGB", (2, 2))]),
}


@pytest.mark.parametrize("kind", PNGS)
def test_every_changed_byte_of_a_png_is_refused(kind: str) -> None:
    """One changed byte is within what a CRC always finds."""
    data = PNGS[kind]
    decode(data)
    for position in range(len(data)):
        for change in {1, 0x20, 0x80, 1 + position % 255}:
            broken = data[:position] + bytes([data[position] ^ change]) + data[position + 1 :]
            with pytest.raises(ImageError, match=r"(?i)damaged|broken|truncated"):
                decode(broken)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_png_is_refused_or_the_same(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["png", "palette", "apng"]))
    whole = SMALL_FILES[kind]
    start = data.draw(st.integers(0, len(whole) - 1))
    broken = whole[:start] + data.draw(st.binary(max_size=4)) + whole[start + data.draw(st.integers(0, 4)) :]
    try:
        image = decode(broken)
    except ImageError:
        return
    assert np.array_equal(image, decode(whole))


def test_what_follows_a_pngs_end_is_no_part_of_it() -> None:
    data = png(24, 20, 8, 2, RGB_HW3.tobytes())
    assert_pixels(data + b"trailing bytes of a camera", RGB_HW3)
    assert_pixels(data[:-12], RGB_HW3)  # the end mark alone is missing


def outcome(data: bytes) -> tuple[str, str]:
    """The decoded image's mode, and why there is none."""
    try:
        return decode(data).mode, ""
    except ImageError as error:
        return "", str(error)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(SMALL_FILES)),
    changes=st.lists(st.tuples(st.integers(0, 2**14), st.integers(0, 255)), max_size=6),
    header_changes=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=2),
    cut=st.integers(0, 2**15),
    tail=st.binary(max_size=8),
)
def test_any_bytes_give_an_image_or_one_line(
    kind: str, changes: list[tuple[int, int]], header_changes: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    data = bytearray(SMALL_FILES[kind])
    for position, value in changes + header_changes:
        data[position % len(data)] = value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mode, reason = outcome(bytes(data[:cut]) + tail)
    assert mode == "RGB" or len(reason.splitlines()) == 1
    assert not caught


@settings(max_examples=50)
@given(st.binary(max_size=64))
def test_noise_is_no_image(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


def test_reasons_are_stable_lines() -> None:
    for data, reason in (
        (b"", r"^empty file$"),
        (b"<html>not found</html>", r"^not an image, or damaged in its header \(known: JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"^not an image"),
        (SMALL_FILES["jpeg"][:-200], r"^image file is truncated"),
    ):
        with pytest.raises(ImageError, match=reason):
            decode(data)


@pytest.mark.parametrize("size", [(9460, 9460), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    """No pixel is there: whoever tries to decode these meets another error."""
    assert size[0] * size[1] > MAX_PIXELS
    with pytest.raises(ImageError, match=r"ecompression bomb"):
        decode(png(*size, 8, 0, b""))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_metadata_bombs(kind: bytes) -> None:
    packed = zlib.compress(bytes(80 << 20), 9)
    chunk = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind] + packed
    data = png(24, 20, 8, 2, RGB_HW3.tobytes(), png_chunk(kind, chunk))
    mode, reason = outcome(data)
    assert "too large" in reason.lower() or (kind == b"iCCP" and mode == "RGB")  # Pillow drops an oversized profile


def test_memory_errors_are_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    with pytest.raises(MemoryError):
        decode(SMALL_FILES["bmp"])


def test_pillow_is_left_alone_and_its_warnings_are_not_heard() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(Image.MIME))
    no_frames = png(24, 20, 8, 2, RGB_HW3.tobytes(), png_chunk(b"acTL", bytes(8)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(no_frames)) as image:
            image.load()
        assert caught, "this file must make Pillow warn"
        caught.clear()
        assert_pixels(no_frames, RGB_HW3)
        assert not caught
    assert before[:2] == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_decode_in_threads() -> None:
    expected = {kind: decode(data).tobytes() for kind, data in SMALL_FILES.items()}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(kind for kind, data in SMALL_FILES.items() if decode(data).tobytes() != expected[kind])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- Sources ---------------------------------------------------------------------------------------------------------

PHOTOS = {  # relative path -> content, in the order that every source must give
    "a-b/x.JPG": b"1",
    "a/x.jpg": b"2",
    "a/y.png": b"3",
    "root.webp": b"4",
    "train/n01/é.jpeg": b"5",
    "train/n02/z.tif": b"6",
}
LABELS = ["a-b", "a", "a", None, "train/n01", "train/n02"]


def write_photos(folder: Path, photos: dict[str, bytes] = PHOTOS) -> Path:
    for name, data in reversed(photos.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def contents(source: ImageSource) -> list[tuple[str, str | None, bytes]]:
    return [(source.image_id(i), source.label(i), source.read(i)) for i in range(len(source))]


def check_in_other_processes(source: ImageSource) -> None:
    """Open file handles included: the source has been read here before it is forked and pickled."""
    expected = contents(source)
    restored = pickle.loads(pickle.dumps(source))
    assert contents(restored) == expected
    assert restored.fingerprint() == source.fingerprint()
    del restored  # had it taken this process's file descriptor with it, it would close it now
    assert contents(source) == expected
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(contents(source)))
    child.start()
    assert results.get() == expected
    child.join()
    assert contents(source) == expected


def test_folder(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, PHOTOS | {"notes.md": b"x", "a/Thumbs.db": b"x", "a/._x.jpg": b"x"})
    source = open_images(folder)
    assert contents(source) == [(name, label, data) for (name, data), label in zip(PHOTOS.items(), LABELS)]
    assert source.n_ignored == 3
    check_in_other_processes(source)


def test_folder_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_images(write_photos(tmp_path)).fingerprint()
    real = os.scandir

    class Reversed:
        def __init__(self, path: str):
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert open_images(tmp_path).fingerprint() == expected


def test_relative_folder_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    source = open_images("photos")
    monkeypatch.chdir("/")
    assert source.read(0) == b"1"


def test_symbolic_links(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", {"a/x.jpg": b"1"})
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    write_photos(tmp_path / "elsewhere", {"y.jpg": b"2"})
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    source = open_images(folder)
    assert [source.image_id(i) for i in range(len(source))] == ["a/x.jpg", "b/y.jpg", "gone.jpg", "self.jpg"]
    assert source.read(1) == b"2"
    for i in (2, 3):
        with pytest.raises(ImageError, match=r"^no such file$"):
            source.read(i)


def test_unusable_files_are_errors_of_reading(tmp_path: Path) -> None:
    write_photos(tmp_path, {"a.jpg": b"", "b.jpg": b"1"})
    os.mkfifo(tmp_path / "c.jpg")
    source = open_images(tmp_path)
    (tmp_path / "b.jpg").unlink()
    for i, reason in enumerate(("empty file", "no such file", "a named pipe, not a regular file")):
        with pytest.raises(ImageError, match=f"^{reason}$"):
            source.read(i)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    broken = os.fsdecode(b"\xff.jpg")
    try:
        (tmp_path / broken).write_bytes(b"1")
    except OSError:
        pytest.skip("this file system refuses such names")
    (tmp_path / "é.jpg").write_bytes(b"2")
    expected = [("é.jpg", None, b"2"), ("\\xff.jpg", None, b"1")]
    source = open_images(tmp_path)
    assert contents(source) == expected
    check_in_other_processes(source)
    write_tar(tmp_path / "x" / "x.tar", [("é.jpg", b"2"), (broken, b"1")])
    assert contents(open_images(tmp_path / "x" / "x.tar")) == expected
    (tmp_path / "\\xff.jpg").write_bytes(b"3")
    with pytest.raises(ValueError, match=r"comes more than once"):
        open_images(tmp_path)


HOSTILE = [
    "a\x1b[31mred.png",
    "new\nline.png",
    "colon:1.png",
    ":train:.png",
    "[bold]x.png",
    "\u202egnp.png",
    "tab\t.png",
]


def test_names_that_a_terminal_would_obey_survive(tmp_path: Path) -> None:
    photos = {name: bytes([i + 1]) for i, name in enumerate(sorted(HOSTILE))}
    folder = write_photos(tmp_path / "a:b\nc", photos)
    expected = [(name, None, data) for name, data in photos.items()]
    assert contents(open_images(folder)) == expected
    assert contents(open_images(write_tar(tmp_path / "x:y.tar", list(photos.items())))) == expected
    write_parquet(folder / "p:q.parquet", list(photos.values()), [-1] * len(photos), list(photos))
    assert contents(open_images(folder / "p:q.parquet")) == expected
    assert all(printable(name).isprintable() for name in HOSTILE)
    write_parquet(tmp_path / "x" / "x.parquet", [b"1"], [-1]).parent.rename(tmp_path / os.fsdecode(b"\xff:"))
    assert contents(open_images(tmp_path / os.fsdecode(b"\xff:"))) == [("x.parquet/0", None, b"1")]


def test_folder_without_images_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    for path, reason in (
        (tmp_path / "empty", r"no image among its 0 files; looked for \.jpg \.jpeg"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "notes.md", "not a folder, a list"),
        (tmp_path / "*.tar", "no such file or folder"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            open_images(path)
        assert len(str(error.value).splitlines()) == 1


def test_list(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    outside = write_photos(tmp_path / "outside", {"o.jpg": b"7"}) / "o.jpg"
    text = f"\ufeff# photos\r\na/y.png\tcat with spaces\r\n\r\na/x.jpg\r\nmissing.jpg\tdog\r\n{outside}\t\r\n  \r\n"
    (folder / "list.txt").write_bytes(text.encode())
    source = open_images(folder / "list.txt")
    ids = ["a/y.png", "a/x.jpg", "missing.jpg", str(outside)]
    assert [source.image_id(i) for i in range(4)] == ids
    assert [source.label(i) for i in range(len(source))] == ["cat with spaces", None, "dog", None]
    assert [source.read(i) for i in (0, 1, 3)] == [b"3", b"2", b"7"]
    with pytest.raises(ImageError, match="no such file"):
        source.read(2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"", "no images in it"), (b"a.jpg\nb.jpg\na.jpg\n", "'a.jpg' comes more than once"), (b"\xff\n", "not UTF-8")],
)
def test_lists_that_are_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        open_images(tmp_path / "list.txt")


def test_tar_of_a_folder_gives_what_the_folder_gives(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", [(f"./{name}", data) for name, data in PHOTOS.items()] + [("notes.md", b"x")])
    source = open_images(file)
    assert contents(source) == [(name, label, data) for (name, data), label in zip(PHOTOS.items(), LABELS)]
    assert source.n_ignored == 1
    check_in_other_processes(source)


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(3):
        members = []
        for sample in range(4):
            key = f"d/{shard}{sample}"
            members += [(f"{key}.cls", b"%d\n" % sample), (f"{key}.json", b"{}")]
            members += [(f"{key}.jpg", b"%d%d" % (shard, sample)), (f"{key}.seg.png", b"mask")]
        write_tar(tmp_path / f"s-{shard:03}.tar", members)
    expected = [
        (f"s-{shard:03}.tar/d/{shard}{sample}.jpg", str(sample), b"%d%d" % (shard, sample))
        for shard in range(3)
        for sample in range(4)
    ]
    for path in (tmp_path, tmp_path / "*.tar", tmp_path / "s-{000..002}.tar"):
        source = open_images(path)
        assert contents(source) == expected
        assert source.n_ignored == 2 * 12
    assert contents(open_images(tmp_path / "s-{001..001}.tar"))[0] == ("d/10.jpg", "0", b"10")
    check_in_other_processes(source)
    with pytest.raises(ValueError, match=r"s-003.tar: no such file"):
        open_images(tmp_path / "s-{000..003}.tar")
    with pytest.raises(ValueError, match="has no splits"):
        open_images(f"{tmp_path}::validation")


def test_long_names_and_links_in_tars(tmp_path: Path) -> None:
    long = "d" * 150 + "/" + "n" * 200 + ".jpg"
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=form) as archive:
            for member_name, kind in ((long, tarfile.REGTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", b"1")):
                member = tarfile.TarInfo(member_name)
                member.type, member.linkname = kind, "" if kind == tarfile.REGTYPE else long
                member.size = 3 if kind == tarfile.REGTYPE else 0
                archive.addfile(member, io.BytesIO(b"abc"))
        source = open_images(tmp_path / f"{name}.tar")
        assert contents(source) == [(long, "d" * 150, b"abc")]
        assert source.n_ignored == 2


def test_damaged_tars_are_refused_at_any_cut(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes([i]) * 700) for i in range(3)]).read_bytes()
    end = whole.rindex(bytes([2]) * 700) + 1024
    cut = tmp_path / "cut.tar"
    for length in range(0, end + 512, 128):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.tar: damaged or truncated tar archive"):
            open_images(cut)
    broken_header = bytearray(whole)
    broken_header[1536 + 148] ^= 1  # checksum of the second member
    cut.write_bytes(broken_header)
    with pytest.raises(ValueError, match=r"cut.tar: damaged or truncated tar archive"):
        open_images(cut)


@pytest.mark.parametrize("method", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path: Path, method: str) -> None:
    with tarfile.open(tmp_path / f"x.tar.{method}", f"w:{method}"):
        pass
    for path in (tmp_path / f"x.tar.{method}", (tmp_path / f"x.tar.{method}").rename(tmp_path / "x.tar")):
        if path.exists():
            with pytest.raises(ValueError, match="uncompress it first"):
                open_images(path)


def test_a_name_twice_in_a_tar_is_one_sample_and_in_two_shards_two(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.jpg", b"2")])
    write_tar(tmp_path / "b.tar", [("x.jpg", b"3")])
    source = open_images(tmp_path)
    assert contents(source) == [("a.tar/x.jpg", None, b"1"), ("b.tar/x.jpg", None, b"3")]
    assert source.n_ignored == 1


FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def write_parquet(
    file: Path, data: list[bytes | None], labels: list[int], paths: list[str] | None = None, group: int = 2
) -> Path:
    rows = [{"bytes": d, "path": paths[i] if paths else None} for i, d in enumerate(data)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=group)
    return file


def test_parquet_snapshot(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/validation-00000-of-00002.parquet", [b"0", b"1", b"2"], [0, 1, -1])
    write_parquet(tmp_path / "data/validation-00001-of-00002.parquet", [b"3", None, b""], [1, 1, 0])
    (tmp_path / "README.md").write_text("x")
    source = open_images(tmp_path)
    names = [f"validation-0000{file}-of-00002.parquet/{row}" for file in range(2) for row in range(3)]
    assert [source.image_id(i) for i in range(6)] == names
    assert [source.label(i) for i in range(len(source))] == ["cat", "dog", None, "dog", "dog", "cat"]
    assert [source.read(i) for i in (3, 0, 2, 1)] == [b"3", b"0", b"2", b"1"]
    for i, reason in ((4, "neither bytes nor a path is stored"), (5, "empty file")):
        with pytest.raises(ImageError, match=reason):
            source.read(i)
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [b"9"], [0])
    with pytest.raises(ValueError, match="several splits; add ::SPLIT, one of: train, validation"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'"):
        open_images(f"{tmp_path}::test")
    assert open_images(f"{tmp_path}::validation").fingerprint() == source.fingerprint()
    assert open_images(tmp_path / "data/validation-*.parquet").fingerprint() == source.fingerprint()
    check_in_other_processes(open_images(f"{tmp_path}::train"))


def test_parquet_reads_a_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "x.parquet", [b"%d" % i for i in range(10)], [0] * 10, group=5)
    source = open_images(file)
    pickled_bytes = len(pickle.dumps(source))
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        read.append(group)
        return real(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [source.read(i) for i in range(10)] == [b"%d" % i for i in range(10)]
    assert read == [0, 1]
    assert len(pickle.dumps(source)) == pickled_bytes  # a loaded row group does not travel


def test_stored_paths_are_ids_only_if_all_differ(tmp_path: Path) -> None:
    own = open_images(write_parquet(tmp_path / "own.parquet", [b"0", b"1"], [0, 0], ["n1/a.jpg", "n1/b.jpg"]))
    assert [own.image_id(i) for i in range(2)] == ["n1/a.jpg", "n1/b.jpg"]
    same = open_images(write_parquet(tmp_path / "same.parquet", [b"0", b"1"], [0, 0], ["a.jpg", "a.jpg"]))
    assert [same.image_id(i) for i in range(2)] == ["same.parquet/0", "same.parquet/1"]


def test_parquet_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"left": [b"x"], "right": [b"y"]}), tmp_path / "two.parquet")
    for name, reason in (
        ("broken", "damaged parquet file"),
        ("text", "no image column among text"),
        ("two", r"several image columns \(left, right\)"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.parquet: {reason}") as error:
            open_images(tmp_path / f"{name}.parquet")
        assert len(str(error.value).splitlines()) == 1


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features_ = datasets.Features({"photo": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    photo = SMALL_FILES["png"]
    rows = {"photo": [{"bytes": photo + bytes([i]), "path": None} for i in range(5)], "label": [0, 1, -1, 1, 0]}
    validation = datasets.Dataset.from_dict(rows, features=features_)
    validation.save_to_disk(str(tmp_path / "one"))
    source = open_images(tmp_path / "one")
    expected = [(str(i), label, photo + bytes([i])) for i, label in enumerate(["cat", "dog", None, "dog", "cat"])]
    assert contents(source) == expected
    check_in_other_processes(source)
    both = datasets.DatasetDict({"train": validation.select([4, 2]), "validation": validation})
    both.save_to_disk(str(tmp_path / "dict"))
    assert contents(open_images(f"{tmp_path / 'dict'}::validation")) == expected
    assert contents(open_images(tmp_path / "dict" / "validation")) == expected
    assert [data for *_, data in contents(open_images(f"{tmp_path / 'dict'}::train"))] == [
        photo + bytes([4]),
        photo + bytes([2]),
    ]
    for path, reason in (
        (tmp_path / "dict", "a dataset with splits; add ::SPLIT, one of: train, validation"),
        (f"{tmp_path / 'dict'}::test", "no split 'test'"),
        (f"{tmp_path / 'one'}::test", "has no splits"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_images(path)


def test_saved_dataset_of_files_and_text_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    photos = {f"{name}.png": encoded(np.full((2, 2), i, np.uint8), format="PNG") for i, name in enumerate("abc")}
    paths = [str(write_photos(tmp_path, photos) / name) for name in photos]
    features_ = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("string"), "n": datasets.Value("int8")}
    )
    rows = {"image": paths, "label": ["x", "y", None], "n": [1, 2, 3]}
    datasets.Dataset.from_dict(rows, features=features_).save_to_disk(str(tmp_path / "saved"))
    source = open_images(tmp_path / "saved")
    assert [(label, data) for _, label, data in contents(source)] == list(zip(["x", "y", None], photos.values()))
    assert [os.path.basename(source.image_id(i)) for i in range(3)] == list(photos)
    check_in_other_processes(source)


def test_saved_dataset_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'saevlm-fast\[datasets\]'"):
        open_images(tmp_path)


def test_damaged_saved_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="images: ") as error:
        open_images(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_fingerprint_sees_ids_labels_and_order(tmp_path: Path) -> None:
    texts = ["a.jpg\tx\nb.jpg\ty\n", "b.jpg\ty\na.jpg\tx\n", "a.jpg\tx\nb.jpg\tz\n", "a.jpg\tx\nb.jpg\n", "a.jpg\tx\n"]
    texts += ["a.jpgb\tx\n.jpg\ty\n"]
    prints = []
    for text in texts:
        (tmp_path / "list.txt").write_text(text)
        prints.append(open_images(tmp_path / "list.txt").fingerprint())
        assert prints[-1] == open_images(tmp_path / "list.txt").fingerprint()
    assert len(set(prints)) == len(texts)
    assert all(len(value) == 64 for value in prints)
