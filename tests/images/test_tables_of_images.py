"""Parquet snapshots and saved datasets of images: rows, labels, what is refused."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import SMALL_FILES, encoded
from image_sources import check_in_other_processes, contents, write_parquet, write_photos

from saevlm_fast.errors import ImageError
from saevlm_fast.images.open import open_images


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
