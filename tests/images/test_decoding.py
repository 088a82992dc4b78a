"""Decoding of every kind of image, against pixels made by numpy and files written byte by byte."""

import io
import struct
import threading
import warnings

import numpy as np
import pytest
from image_files import AVIF, GRAY_HW, RGB_HW3, SMALL_FILES, assert_pixels, encoded, exif, gray3, png, png_chunk, tiff
from PIL import Image, ImageFile

from saevlm_fast.errors import ImageError, Interrupted
from saevlm_fast.images.decode import decode


def on_white(colour_HW3: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    alpha_HW1 = alpha_HW[..., None] / 255.0
    return np.round(colour_HW3 * alpha_HW1 + 255 * (1 - alpha_HW1))


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


def test_ctrl_c_is_no_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("interrupted")

    monkeypatch.setattr(Image, "open", stopped)
    with pytest.raises(Interrupted):
        decode(encoded(RGB_HW3, format="PNG"))


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
