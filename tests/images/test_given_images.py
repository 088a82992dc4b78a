"""Lists of images in Python: PIL's modes beside its own conversions, arrays, bytes, paths, what is refused."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import saevlm_fast as sf
from saevlm_fast.errors import ImageError
from saevlm_fast.images.decode import decode
from saevlm_fast.images.given import GivenImages
from saevlm_fast.images.open import open_held_out

PIXELS_HW3 = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS_HW3)


def decoded(*given):
    source = sf.open_images(list(given))
    return [np.asarray(decode(source.read(i))) for i in range(len(source))]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_pixels_are_those_of_pil(mode):
    picture = Image.new("LAB", (9, 7), (120, 10, 200)) if mode == "LAB" else PICTURE.convert(mode)
    (found,) = decoded(picture)
    np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparency_is_laid_on_white(mode):
    (found,) = decoded(Image.new(mode, (4, 4)))
    assert (found == 255).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_gray_keeps_its_high_byte(mode):
    gray_HW = np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16)
    data = gray_HW.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    (found,) = decoded(Image.frombytes(mode, (3, 1), data))
    np.testing.assert_array_equal(found[..., 0], gray_HW >> 8)


def test_arrays_bytes_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a.png")
    (tmp_path / "photos").mkdir()
    PICTURE.save("photos/b.png")
    encoded = (tmp_path / "a.png").read_bytes()
    gray_HW = PIXELS_HW3[..., 0]
    for found in decoded(PIXELS_HW3, encoded, "a.png", tmp_path / "photos" / "b.png", PIXELS_HW3[::-1][::-1]):
        np.testing.assert_array_equal(found, PIXELS_HW3)
    np.testing.assert_array_equal(decoded(gray_HW)[0][..., 1], gray_HW)
    source = sf.open_images((PICTURE, "photos/b.png", "none.png"))
    assert [source.image_id(i) for i in (1, 2)] == ["photos/b.png", "none.png"]
    assert source.image_id(0).startswith("0-")
    assert source.label(1) is None
    with pytest.raises(ImageError, match="no such file"):
        source.read(2)


def test_a_picture_is_not_turned_and_what_is_open_may_be_closed(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    PICTURE.save(tmp_path / "turned.png", exif=turned)
    with Image.open(tmp_path / "turned.png") as picture:
        source = sf.open_images([picture, str(tmp_path / "turned.png")])
    np.testing.assert_array_equal(np.asarray(decode(source.read(0))), PIXELS_HW3)
    assert decode(source.read(1)).size == (7, 9), "of a file, as of every folder"


def test_a_source_can_be_pickled_and_opened_again():
    source = pickle.loads(pickle.dumps(sf.open_images([PICTURE, PIXELS_HW3])))
    assert sf.open_images(source) is source
    assert decode(source.read(0)).size == (9, 7)
    assert source.fingerprint() == sf.open_images([PICTURE.copy(), PIXELS_HW3.copy()]).fingerprint()


def test_lists_of_other_pictures_are_other_images():
    """Though as long: rows of one are not taken for those of the other."""
    changed_HW3 = PIXELS_HW3.copy()
    changed_HW3[3, 3, 0] += 1
    grey = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)
    other, clear, keyed = grey.copy(), grey.copy(), PICTURE.copy()
    other.putpalette(bytes(768))
    clear.info["transparency"], keyed.info["transparency"] = 1, (0, 0, 0)
    lists = [
        *([PICTURE, PICTURE], [PICTURE, PICTURE.rotate(180)], [PICTURE.rotate(180), PICTURE], [PICTURE, grey]),
        *([PICTURE, other], [PICTURE, PIXELS_HW3], [PICTURE, changed_HW3], [PICTURE, PIXELS_HW3.swapaxes(0, 1)]),
        *([PICTURE, b"1"], [PICTURE, b"2"], [PICTURE, clear], [PICTURE, keyed]),
    ]
    assert len({sf.open_images(given).fingerprint() for given in lists}) == len(lists)


def test_what_cannot_be_used_is_told_when_it_is_read(tmp_path):
    half = io.BytesIO()
    PICTURE.resize((90, 70)).save(half, "PNG")
    lazy = Image.open(io.BytesIO(half.getvalue()[:200]))
    source = sf.open_images([Image.new("F", (2, 2)), Image.new("I", (2, 2)), Image.new("RGB", (0, 3)), b"", lazy])
    for each in (source, pickle.loads(pickle.dumps(source))):  # as workers get it that are not forked
        for i, reason in enumerate(["mode F", "mode I: 8- or 16-bit", "no pixels", "empty", "truncated|broken|PNG"]):
            with pytest.raises(ImageError, match=reason):
                each.read(i)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no images in it"),
        ([PICTURE, 3], "images: 3 at place 1 is not a PIL image"),
        ([PIXELS_HW3.astype(np.float32)], "at place 0 is not a PIL image"),
        ([PIXELS_HW3[None]], "at place 0 is not"),
        ([PIXELS_HW3[:, :, :2]], "at place 0 is not"),
        (["a.png", "a.png"], "'a.png' comes more than once"),
        (PICTURE, "is not a path, a list of images"),
        ({"a.png"}, "is not a path, a list of images"),
    ],
)
def test_what_is_no_list_of_images_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        sf.open_images(given)


def test_a_harvest_of_pictures_is_that_of_their_files(tmp_path):
    scenes, pictures = sf.open_images("scenes:test:6"), []
    for i in range(6):
        pictures.append(decode(scenes.read(i)))
        pictures[-1].save(tmp_path / f"{i}.png")
    ours = sf.harvest("hf:tiny-clip", pictures, layer=3, workers=2)
    theirs = sf.harvest("hf:tiny-clip", tmp_path, layer=3)
    some = torch.tensor([0, 3, 5])
    assert torch.equal(ours.rows(some), theirs.rows(some))
    assert ours.source["images"]["path"] == ""
    sae = sf.SparseAutoencoder(sf.SAEConfig.sized(ours.d, expansion=2, k=4, architecture="topk"))
    latent = int(sae.encode(ours.rows(some)).top_indices.flatten()[0])
    assert "missing" not in sf.show(latent, ours, sae, n=1, images=pictures).note
    assert "1 images are missing, the first: " in sf.show(latent, ours, sae, n=1).note
    assert "missing" not in sf.show(latent, ours, sae, n=1, images="none").note
    with pytest.raises(ValueError, match="is not a path, a list of images"):
        sf.show(latent, ours, sae, images=PIXELS_HW3)


def test_sources_of_lists_say_so():
    assert isinstance(sf.open_images([PICTURE]), GivenImages)
    assert sf.open_images([PICTURE]).n_ignored == 0


def test_a_list_has_no_place_to_be_held_out_from():
    with pytest.raises(ValueError, match="validation_images: : no such file"):
        open_held_out("", "")
    assert open_held_out(None, "") is None
