"""Small photos in folders, tars and tables, and what every source of them must give, also in other processes."""

import io
import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saevlm_fast.images.sources import ImageSource

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


def write_tar(file: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
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
