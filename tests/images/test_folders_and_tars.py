"""Folders, lists and tars of images: order, names, labels, what is refused."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from image_sources import LABELS, PHOTOS, check_in_other_processes, contents, write_parquet, write_photos, write_tar

from saevlm_fast.errors import ImageError, printable
from saevlm_fast.images.open import open_images


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
