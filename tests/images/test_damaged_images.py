"""Images cut off, changed, too large or no images: refused in one line, never half decoded."""

import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import RGB_HW3, SMALL_FILES, assert_pixels, encoded, exif, png, png_chunk
from PIL import Image, ImageFile

from saevlm_fast.errors import ImageError
from saevlm_fast.images.decode import MAX_PIXELS, decode


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
