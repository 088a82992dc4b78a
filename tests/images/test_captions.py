"""Captions of every source, and wrong ones mixed in."""

import csv
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sources import write_tar
from PIL import Image

from saevlm_fast.errors import ImageError
from saevlm_fast.images.open import open_images
from saevlm_fast.images.pairs import WrongCaptions, caption, check_captions, is_wrong


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def captions(source):
    return [source.caption(i) for i in range(len(source))]


def test_tar_shards(tmp_path):
    told = {"caption": "of json", "cls": 3}
    members = {
        "a.png": png(),
        "a.txt": b"a cat\n",
        "b.png": png(1),
        "b.json": json.dumps(told).encode(),
        "c.png": png(2),
        "d.png": png(3),
        "d.json": b"[1",
        "e.png": png(4),
        "e.txt": b"",
        "f.png": png(5),
        "f.json": b'{"TEXT": "in capitals"}',
    }
    source = open_images(write_tar(tmp_path / "0.tar", members))
    assert captions(source) == ["a cat", "of json", None, None, None, "in capitals"]
    assert captions(pickle.loads(pickle.dumps(source))) == captions(source)
    with pytest.raises(ImageError, match="no caption"):
        caption(source, 2)


def test_parquet_columns_also_lists_and_several_row_groups(tmp_path):
    images = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(5)])
    texts = [["one", "uno"], [], ["three"], None, ["five"]]
    table = pa.table({"image": images, "caption": pa.array(texts, pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=2)
    assert captions(open_images(tmp_path / "0.parquet")) == ["one", None, "three", None, "five"]
    pq.write_table(table.drop_columns(["caption"]), tmp_path / "1.parquet")
    assert captions(open_images(tmp_path / "1.parquet")) == [None] * 5


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "text": ["x", " y "]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    assert captions(open_images(tmp_path / "set")) == ["x", "y"]


def test_folders_and_lists(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.json").write_text('{"caption": "a dog"}')
    assert captions(open_images(tmp_path)) == ["a cat", "a dog", None]
    (tmp_path / "list.txt").write_text("a.png\ta cat\nb.png\n")
    assert captions(open_images(tmp_path / "list.txt")) == ["a cat", None]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "caption", "label"], ["a.png", 'says "x",\ny', "7"], ["b.png", "", ""]]
        )
    source = open_images(tmp_path / "list.csv")
    assert captions(source) == ['says "x",\ny', None]
    assert [source.label(i) for i in range(2)] == ["7", None]
    assert source.read(0) == png()
    (tmp_path / "list.jsonl").write_text('{"image": "b.png", "caption": "a dog"}\n\n{"path": "a.png"}\n')
    assert captions(open_images(tmp_path / "list.jsonl")) == ["a dog", None]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "x,y\n1,2\n", "line 2: no path in a field file_name"),
        ("a.csv", "", "no images in it"),
        ("a.jsonl", "{", "line 1: no JSON"),
        ("a.jsonl", "[1]", "line 1: no JSON object"),
        ("a.jsonl", '{"image": 3}', "line 1: no path"),
    ],
)
def test_lists_that_are_none(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        open_images(tmp_path / name)


def test_a_source_without_captions_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"images: photos: none of the first 1 images has a caption; .*looked for"):
        check_captions(open_images(tmp_path), "photos")
    check_captions(open_images("scenes:test:2"), "")


def test_wrong_captions_are_of_other_images_and_the_share_is_kept():
    source = open_images("scenes:test:40")
    wrong = WrongCaptions(source, 0.25, 3)
    changed = [i for i in range(40) if wrong.caption(i) != source.caption(i)]
    assert changed == [i for i in range(40) if is_wrong(source.image_id(i), 0.25, 3)]
    assert changed == np.flatnonzero(wrong.wrong).tolist()
    assert 4 <= len(changed) <= 16
    theirs = {source.caption(i) for i in changed}
    assert {wrong.caption(i) for i in changed} <= theirs
    assert wrong.read(1) == source.read(1)
    assert wrong.fingerprint() not in (source.fingerprint(), WrongCaptions(source, 0.25, 4).fingerprint())
    one = next(seed for seed in range(99) if sum(is_wrong(source.image_id(i), 0.02, seed) for i in range(40)) == 1)
    with pytest.raises(ValueError, match="which has no other"):
        WrongCaptions(source, 0.02, one)
