"""Members of archives become images and labels: the rule of images/samples.py, against webdataset's own pattern."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import write_tar

from saevlm_fast.images.open import open_images
from saevlm_fast.images.samples import Member, Sample, Samples, split_name
from saevlm_fast.images.sources import IMAGE_SUFFIXES

# webdataset's base_plus_ext: (key, extension) of a member's name.
WEBDATASET = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

letters = st.text("ab0_-é ", min_size=1, max_size=3)
directories = st.sampled_from(["", "a/", "a.b/", "a/b.c/", "./"])
extensions = st.sampled_from(
    ["jpg", "JPG", "png", "webp", "depth.png", "seg.PNG", "00.png", "01.png", "00.cls", "cls", "json", "txt", "npy", ""]
)


def members_of(names: list[str]) -> list[Member]:
    return [Member(name, i, 1) for i, name in enumerate(names)]


def resolved(names: list[str], contents: dict[str, bytes] | None = None) -> tuple[list[Sample], Samples]:
    samples = Samples()
    for member in members_of(names):
        samples.add(member)
    return list(samples.resolve(lambda member: (contents or {}).get(member.name, b"x"))), samples


def images_of(names: list[str]) -> list[str]:
    return [sample.image.name for sample in resolved(names)[0]]


def labels_of(contents: dict[str, bytes]) -> list[str | None]:
    return [sample.label for sample in resolved(list(contents), contents)[0]]


@settings(max_examples=500)
@given(st.text("ab./é", max_size=12))
def test_keys_are_webdatasets(name: str) -> None:
    match = WEBDATASET.match(name)
    if match is None or name.rpartition("/")[2].startswith("."):  # hidden files are no members here
        assert split_name(name) is None
    else:
        assert split_name(name) == (match[1], match[2].lower())


@settings(max_examples=500)
@given(st.lists(st.tuples(directories, letters, extensions), max_size=12))
def test_nothing_is_lost(parts: list[tuple[str, str, str]]) -> None:
    names = [f"{directory}{stem}.{extension}" for directory, stem, extension in parts]
    found, samples = resolved(names)
    images = [sample.image.name for sample in found]
    assert len(images) == len(set(images)) <= len(set(names))
    keys = {name: split_name(name)[0] for name in names}
    plain = {keys[name] for name in names if "." + split_name(name)[1] in IMAGE_SUFFIXES}
    of_key = {key: [name for name in images if keys[name] == key] for key in keys.values()}
    assert all(len(of_key[key]) == 1 for key in plain)
    # A key without a plain image keeps every image whose extension is no view of a plain one elsewhere.
    views = {split_name(name)[1] for name in names if keys[name] in plain} - {"jpg", "png", "webp"}
    for name in names:
        extension = split_name(name)[1]
        if keys[name] not in plain and extension.endswith("png") and extension not in views:
            assert any(other.lower() == name.lower() for other in of_key[keys[name]])
    # Every member is an image, gave a label, or is counted.
    used_labels = {(keys[s.image.name], s.used) for s in found if s.used}
    assert len(names) >= len(images) + samples.unused.total() >= len(names) - len(used_labels) - len(images)


@pytest.mark.parametrize(
    ("names", "images"),
    [
        (["0.depth.png", "0.jpg", "0.seg.png"], ["0.jpg"]),
        (["0.png", "0.webp", "0.jpg"], ["0.jpg"]),
        ([f"22.{i:02}.png" for i in range(5)], [f"22.{i:02}.png" for i in range(5)]),
        (["val/ILSVRC2012.val.1.JPEG", "val/ILSVRC2012.val.2.JPEG"], [f"val/ILSVRC2012.val.{i}.JPEG" for i in (1, 2)]),
        (["1.input.jpg", "1.decoded.jpg"], ["1.input.jpg", "1.decoded.jpg"]),
        (["0.jpg", "0.seg.png", "7.seg.png"], ["0.jpg"]),
        (["0.img.png", "0.cls.txt"], ["0.img.png"]),
        (["v1.2/0.jpg", "v1.2/1.jpg"], ["v1.2/0.jpg", "v1.2/1.jpg"]),
        (["0.jpg", "0.JPG"], ["0.jpg"]),
        ([".0.jpg", "jpg", "0"], []),
    ],
)
def test_which_members_are_images(names: list[str], images: list[str]) -> None:
    assert images_of(names) == images
    assert sorted(images_of(names[::-1])) == sorted(images if "0.JPG" not in names else ["0.JPG"])


@pytest.mark.parametrize(
    ("contents", "labels"),
    [
        ({"0.jpg": b"", "0.cls": b"3\n"}, ["3"]),
        ({"0.jpg": b"", "0.cls.txt": b"3"}, ["3"]),
        ({"0.JPG": b"", "0.CLS": b"3"}, ["3"]),
        ({"0.jpg": b"", "0.json": b'{"label": 3}'}, ["3"]),
        ({"0.jpg": b"", "0.json": b'{"caption": "x", "class_name": "cat", "target": 9}'}, ["cat"]),
        ({"0.jpg": b"", "0.json": b'{"label": null, "class": true}'}, ["True"]),
        ({"0.jpg": b"", "0.json": b'{"label": 3.0}'}, ["3"]),
        ({"0.jpg": b"", "0.json": b'{"label": [1, 2]}', "0.txt": b"a cat"}, ["a cat"]),
        ({"0.jpg": b"", "0.cls.json": b"3"}, ["3"]),
        ({"0.jpg": b"", "0.json": b"3"}, [None]),
        ({"0.jpg": b"", "0.json": b"[" * 100_000}, [None]),
        ({"0.jpg": b"", "0.json": b'{"label": 1}', "0.cls": b"2", "0.label": b"3"}, ["2"]),
        ({"n01/0.jpg": b"", "n01/0.json": b"{}"}, ["n01"]),
        ({"n01/0.jpg": b"", "n01/0.cls": b""}, [None]),
        ({"22.0.png": b"", "22.1.png": b"", "22.1.cls": b"b", "22.cls": b"a"}, ["a", "b"]),
        ({"0.img.png": b"", "0.cls.txt": b"7"}, ["7"]),
    ],
)
def test_where_labels_come_from(contents: dict[str, bytes], labels: list[str | None]) -> None:
    assert labels_of(contents) == labels
    assert sorted(map(str, labels_of(dict(reversed(contents.items()))))) == sorted(map(str, labels))


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    members = {f"{i}.{e}": b"x" for i in range(3) for e in ("jpg", "depth.png", "npy")}
    source = open_images(write_tar(tmp_path / "a.tar", members | {"0.json": json.dumps({"label": 1}).encode()}))
    labels, missing, unused = source.notes
    assert labels == "labels come from .json (1)"
    assert missing.startswith("2 of 3 images have no label (looked for .cls, .label, ")
    assert unused == "not used: .depth.png (3), .npy (3)"
    assert source.n_ignored == 6
    said = {"0.json": b'{"caption": "a red square"}', "1.caption": b"a blue circle", "2.json": b'{"width": 3}'}
    source = open_images(write_tar(tmp_path / "b.tar", {f"{i}.jpg": b"x" for i in range(3)} | said))
    assert [source.caption(i) for i in range(3)] == ["a red square", "a blue circle", None]
    assert source.notes[-1] == "not used: .json (1)"
    plain = open_images(write_tar(tmp_path / "b.tar", {"0.jpg": b"x", "0.cls": b"1", "c/1.jpg": b"x"}))
    assert plain.notes == ()


def test_archives_of_one_class_each(tmp_path: Path) -> None:
    for name in ("n02", "n01"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}_{i}.JPEG": b"x" for i in range(2)})
    source = open_images(tmp_path)
    assert [source.label(i) for i in range(4)] == ["n01", "n01", "n02", "n02"]
    assert source.notes == ("labels come from the archives' names, as images are named after them (4)",)
    for names in (("00000", "00001"), ("cats", "dogs")):
        folder = tmp_path / names[0]
        folder.mkdir()
        write_tar(folder / f"{names[0]}.tar", {"00000_1.jpg": b"x", "cats_0.jpg": b"x"})
        write_tar(folder / f"{names[1]}.tar", {"00001_1.jpg": b"x"})
        source = open_images(folder)
        assert [source.label(i) for i in range(3)] == [None] * 3
        assert "3 of 3 images have no label" in source.notes[0]


def test_archives_of_archives_are_refused_with_what_works(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "n01.tar", {"n01_0.JPEG": b"x"}).read_bytes()
    outer = write_tar(tmp_path / "train.tar", {"n01.tar": inner, "n02.tar.gz": b"x"})
    with pytest.raises(ValueError, match=r"train.tar: no image, but 2 archives inside the archive; unpack it first"):
        open_images(outer)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"1 are compressed archives \(a.tar.gz, ...\): unpack them"):
        open_images(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"compressed \(gzip\); uncompress it first \(gunzip a.tar.gz\)"):
        open_images(tmp_path / "packed" / "a.tar.gz")
    write_tar(tmp_path / "packed" / "b.tar", {"0.jpg": b"x", "0.cls": b"1"})
    (note,) = open_images(tmp_path / "packed").notes
    assert note == f"beside the tars in {tmp_path / 'packed'}, not used: compressed archives (1)"
