"""Image files, written by hand where Pillow is what is tested."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from saevlm_fast.images.decode import decode

AVIF = ".avif" in Image.registered_extensions()
RGB_HW3 = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
GRAY_HW = RGB_HW3[..., 0]


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


def assert_pixels(data: bytes, expected_HW3: np.ndarray, tolerance: int = 0) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    actual = np.asarray(image).astype(int)
    assert actual.shape == expected_HW3.shape
    assert np.abs(actual - expected_HW3.astype(int)).max() <= tolerance


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
