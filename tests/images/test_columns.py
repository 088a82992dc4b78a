"""Images and labels in columns: the same rows give the same images, whatever the container."""

import io
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from saevlm_fast.errors import ImageError
from saevlm_fast.images import tables
from saevlm_fast.images.open import open_images
from saevlm_fast.images.sources import ImageSource

BOTH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def photo(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(file, "PNG")
    return file.getvalue()


def in_parquet(folder: Path, table: pa.Table) -> ImageSource:
    pq.write_table(table, folder / "x.parquet", row_group_size=2)
    return open_images(folder / "x.parquet")


def saved(folder: Path, table: pa.Table) -> ImageSource:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(table).save_to_disk(str(folder))  # into the folder itself, beside the photos
    return open_images(folder)


CONTAINERS = pytest.mark.parametrize("container", [in_parquet, saved])


def cells(kind: str, folder: Path) -> pa.Array:
    """Four photos, an empty cell and one that leads nowhere."""
    for i in range(4):
        (folder / f"{i}.png").write_bytes(photo(i))
    full, near = [str(folder / f"{i}.png") for i in range(4)], [f"{i}.png" for i in range(4)]
    data = [photo(i) for i in range(4)]
    rest = [{"bytes": None, "path": x} for x in near[1:]]
    rows: dict[str, tuple[list[Any], pa.DataType]] = {
        "bytes": ([{"bytes": x, "path": None} for x in data] + [None, {"bytes": None, "path": None}], BOTH),
        "path": ([{"bytes": None, "path": x} for x in full] + [None, {"bytes": None, "path": "no.png"}], BOTH),
        "mixed": ([{"bytes": data[0], "path": "gone.png"}, *rest, None, None], BOTH),
        "binary": ([*data, None, b""], pa.binary()),
        "large binary": ([*data, None, b""], pa.large_binary()),
        "paths": ([*full, None, "no.png"], pa.string()),
        "paths from the table": ([*near, None, "no.png"], pa.large_string()),
    }
    return pa.array(*rows[kind])


@CONTAINERS
@pytest.mark.parametrize("kind", ["bytes", "path", "mixed", "binary", "large binary", "paths", "paths from the table"])
def test_the_same_verdict_everywhere(container: Any, kind: str, tmp_path: Path) -> None:
    source = container(tmp_path, pa.table({"n": list(range(6)), "img": cells(kind, tmp_path)}))
    assert [source.read(i) for i in (3, 0, 1, 2)] == [photo(i) for i in (3, 0, 1, 2)]
    for i in (4, 5):
        with pytest.raises(ImageError, match=r"^(neither bytes nor a path|empty file|no bytes .* but a path: no such)"):
            source.read(i)


@CONTAINERS
def test_a_path_to_what_is_no_file(container: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.png"))
        paths = ["s.png", "/dev/zero", "https://example.org/a.png", str(tmp_path)]
        source = container(tmp_path, pa.table({"image": paths}))
    for i, reason in enumerate(("a socket, not", "a device, not", "an address, not a file; download", "a folder, not")):
        with pytest.raises(ImageError, match=reason):
            source.read(i)


@CONTAINERS
@pytest.mark.parametrize(
    ("columns", "labels", "note"),
    [
        ({"label": [1, 2]}, ["1", "2"], None),
        ({"cls": [1, 2]}, ["1", "2"], "labels come from column cls"),
        ({"labels": ["a", ""]}, ["a", None], "labels come from column labels"),
        ({"label": [True, False]}, ["True", "False"], None),
        ({"label": [[1], [2]]}, [None, None], "no labels: .*label: not text, numbers or truth values"),
        ({"caption": ["a", "b"]}, [None, None], "no labels: looked for a column cls, label, .*no ClassLabel"),
        ({"label": [[1], [2]], "class": [3, 4]}, ["3", "4"], "labels come from column class; not used: label"),
    ],
)
def test_label_columns(
    container: Any, columns: dict[str, list[Any]], labels: list[Any], note: str | None, tmp_path: Path
) -> None:
    source = container(tmp_path, pa.table({"image": [photo(0), photo(1)], **columns}))
    assert [source.label(i) for i in range(2)] == labels
    (told,) = source.notes or (None,)
    assert told is None if note is None else re.match(note, told)


@CONTAINERS
def test_of_several_class_labels_the_finest(container: Any, tmp_path: Path) -> None:
    features = {
        "img": {"_type": "Image"},
        "coarse_label": {"names": ["c"], "_type": "ClassLabel"},
        "fine_label": {"names": ["a", "b"], "_type": "ClassLabel"},
    }
    table = pa.table(
        {"img": pa.array([{"bytes": photo(0), "path": None}] * 2, BOTH), "coarse_label": [0, 0], "fine_label": [1, -1]}
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    source = container(tmp_path, table)
    assert [source.label(i) for i in range(2)] == ["b", None]
    assert source.notes == ("labels come from column fine_label; not used: coarse_label",)


def test_a_large_row_group_passes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [bytes([i]) * 1000 for i in range(50)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet", compression="none")
    monkeypatch.setattr(tables, "GROUP_BYTES", 5000)
    source = open_images(tmp_path / "x.parquet")
    assert [source.read(i) for i in range(50)] == rows
    assert [source.read(i) for i in (49, 3, 4, 30, 2)] == [rows[i] for i in (49, 3, 4, 30, 2)]


def test_many_threads_read_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [bytes([i]) * 1000 for i in range(100)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet", row_group_size=20, compression="none")
    monkeypatch.setattr(tables, "GROUP_BYTES", 5000)
    source = open_images(tmp_path / "x.parquet")
    order = np.random.default_rng(0).integers(0, 100, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [rows[i] for i in order]
