"""Nothing waits, nothing fills the memory: pipes, sockets, devices, sparse files, tables that unpack to gigabytes."""

import os
import resource
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saevlm_fast.data.parquet import read_small_table
from saevlm_fast.data.store import ITEM_SCHEMA, read_items
from saevlm_fast.errors import ActivationError, ImageError
from saevlm_fast.images import arrow_files, tables
from saevlm_fast.images.open import open_images
from saevlm_fast.images.sources import MAX_IMAGE_BYTES, MAX_LINE

pytestmark = pytest.mark.timeout(300)  # what hangs does so for ever
LARGE = 6 << 30


@pytest.fixture
def lean() -> Iterator[None]:
    """Fails where the test took more than 300 MiB above what the process had used before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.mark.parametrize("name", ["list.txt", "x.tar", "x.parquet", "x", "x.tar.gz"])
def test_pipes_are_refused_before_they_are_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: a named pipe; a regular file is needed"):
        open_images(tmp_path / name)
    if name in ("x.tar", "x.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: a named pipe"):
            open_images(tmp_path)
    with pytest.raises(ValueError, match="/dev/null: a device; a regular file is needed"):
        open_images("/dev/null")


def test_pipes_in_a_saved_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    os.mkfifo(tmp_path / "data-00000-of-00001.arrow")
    with pytest.raises(ValueError, match="arrow: a named pipe"):
        open_images(tmp_path)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_arrow_files_that_unpack_far_beyond_their_size(
    tmp_path: Path, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": bytes(100_000), "path": None}] * 20, "label": ["x"] * 20}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path))
    (path,) = tmp_path.glob("*.arrow")
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    assert len(open_images(tmp_path)) == 20
    monkeypatch.setattr(arrow_files, "MAX_UNPACKED_BYTES", 1_000_000)
    if compression is None:  # mapped, not unpacked
        assert len(open_images(tmp_path)) == 20
    else:
        assert path.stat().st_size < 100_000
        with pytest.raises(ValueError, match=r"compressed buffers unpack to 20\d+ in memory; at most 1000000 are"):
            open_images(tmp_path)


def test_arrow_files_of_more_rows_than_bits(tmp_path: Path) -> None:
    nothing = pa.Array.from_buffers(pa.null(), 2**31 - 1, [None])
    batch = pa.record_batch([nothing], ["x"])
    with pa.ipc.new_stream(tmp_path / "x.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match=r"x\.arrow: 2147483647 rows in \d+ bytes"):
        arrow_files.check_arrow_file(tmp_path / "x.arrow")


def refusal(path: Path) -> str:
    try:
        arrow_files.check_arrow_file(path)
    except ValueError as error:
        return str(error)
    return ""


def test_every_altered_byte_of_an_arrow_file_is_one_line_or_read(tmp_path: Path) -> None:
    path, batch = tmp_path / "x.arrow", pa.record_batch([pa.array(["a", "b"]).dictionary_encode()], ["x"])
    with pa.ipc.new_stream(path, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    whole, refused = path.read_bytes(), 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        said = refusal(path)
        refused += said != ""
        assert said == "" or (said.startswith(f"{path}: ") and "\n" not in said)
    assert refused > 50


def test_a_data_set_whose_files_lie_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "x.arrow")
    (tmp_path / "in" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(ValueError, match=r"names '\.\./x\.arrow', which is not a file in it"):
        open_images(tmp_path / "in")


def test_pipes_and_devices_among_images_are_skipped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n/dev/tty\n.\nc\0.jpg\n")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a.jpg", "a.jpg")
        archive.addfile(tarfile.TarInfo("c.jpg"))
    reasons = ["a named pipe", "a device", "a device", "a folder", "no such file"]
    for path in (tmp_path, tmp_path / "list.txt"):
        source = open_images(path)
        for i in range(len(source)):
            with pytest.raises(ImageError, match=rf"^{reasons[i]}"):
                source.read(i)
    archived = open_images(tmp_path / "x.tar")
    assert (archived.image_id(0), len(archived), archived.n_ignored) == ("c.jpg", 1, 1)


def test_sparse_files(tmp_path: Path, lean: None) -> None:
    (tmp_path / "a.jpg").touch()
    os.truncate(tmp_path / "a.jpg", LARGE)
    with pytest.raises(ImageError, match=rf"^{LARGE} bytes; an image may have {MAX_IMAGE_BYTES} \(512 MiB\) at most$"):
        open_images(tmp_path).read(0)
    member = tarfile.TarInfo("a.jpg")
    member.size = LARGE
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(header)
    os.truncate(tmp_path / "x.tar", len(header) + LARGE + 1024)
    with pytest.raises(ImageError, match=f"^{LARGE} bytes"):
        open_images(tmp_path / "x.tar").read(0)
    (tmp_path / "list.txt").touch()
    os.truncate(tmp_path / "list.txt", LARGE)
    with pytest.raises(ValueError, match=rf"list.txt: line 1 is no path: {MAX_LINE} characters or more"):
        open_images(tmp_path / "list.txt")


def repeated(file: Path) -> Path:
    """One image of 1 MB, 4,600 times: 4.6 GB in 1 MB."""
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 4600, pa.int32()), pa.array([os.urandom(1 << 20)]))
    pq.write_table(
        pa.table({"image": images}).cast(pa.schema([("image", pa.dictionary(pa.int32(), pa.binary()))])), file
    )
    return file


def zeros(file: Path) -> Path:
    """300 MB of zeros in 13 kB."""
    pq.write_table(pa.table({"image": [bytes(1 << 20)] * 300}), file, compression="zstd", use_dictionary=False)
    return file


def test_an_image_that_repeats_is_in_memory_once(tmp_path: Path, lean: None) -> None:
    source = open_images(repeated(tmp_path / "x.parquet"))
    assert len(source) == 4600
    assert len(source.read(0)) == len(source.read(4599)) == 1 << 20


def test_row_groups_that_unpack_far_beyond_their_size(tmp_path: Path) -> None:
    file = zeros(tmp_path / "x.parquet")
    assert file.stat().st_size < 40_000
    with pytest.raises(ValueError, match=r"x.parquet: row group 0 unpacks from \d+ bytes to 3145\d+, more than 100"):
        open_images(file)


def test_names_that_unpack_to_gigabytes(tmp_path: Path, lean: None) -> None:
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 4600, pa.int32()), pa.array(["x" * (1 << 20)]))
    pq.write_table(pa.table({"image": [b"x"] * 4600, "label": long}), tmp_path / "label.parquet")
    with pytest.raises(ValueError, match=r"label.parquet: label unpacks to 48\d+ bytes; names and .* 1073741824"):
        open_images(tmp_path / "label.parquet")


def test_more_rows_than_bits(tmp_path: Path) -> None:
    rows = 50_000_000
    pq.write_table(pa.table({"image": pa.nulls(rows, pa.binary())}), tmp_path / "x.parquet")
    size = (tmp_path / "x.parquet").stat().st_size
    with pytest.raises(ValueError, match=rf"x.parquet: {rows} rows in {size} bytes"):
        open_images(tmp_path / "x.parquet")


def test_an_item_table_that_unpacks_to_gigabytes(tmp_path: Path, lean: None) -> None:
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 9200, pa.int32()), pa.array(["x" * (1 << 20)]))
    table = pa.table({"image": long, "token": pa.array([0] * 9200, pa.int32()), "label": pa.nulls(9200, pa.string())})
    pq.write_table(table, tmp_path / "items.parquet")
    with pytest.raises(ActivationError, match=r"items.parquet: image unpacks to 96\d+ bytes; .* may take 1073741824"):
        read_items(tmp_path / "items.parquet", 9200)


def test_item_tables_in_their_own_types(tmp_path: Path) -> None:
    table = pa.table({"image": ["a", "a", "é"], "token": [0, 1, 2], "label": ["x", None, "x"]}, schema=ITEM_SCHEMA)
    pq.write_table(table, tmp_path / "a:items.parquet", row_group_size=2)
    assert read_small_table(tmp_path / "a:items.parquet", ITEM_SCHEMA, 3).equals(table)
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    assert read_small_table(tmp_path / "none.parquet", ITEM_SCHEMA, 0).equals(table.slice(0, 0))


def test_a_hundred_million_scenes_start_at_once(lean: None) -> None:
    start = time.process_time()  # what others do does not count
    source = open_images("scenes:train:100000000")
    assert source.image_id(99_999_999) == "train-0-99999999"
    assert isinstance(source.label(99_999_999), str)
    assert len(source.read(99_999_999)) > 6000
    assert len(source.fingerprint()) == 64
    assert time.process_time() - start < 10
    prints = {open_images(f"scenes:{spec}").fingerprint() for spec in ("train:9", "train:8", "test:9", "train:9:1")}
    assert len(prints) == 4
    with pytest.raises(IndexError):
        source.image_id(10**8)


@pytest.mark.parametrize("make", [repeated, zeros])
def test_bounds_are_those_of_the_module(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """What the tests above rely on: both are above, or below, the bound for the reason that they name."""
    metadata = pq.read_metadata(make(tmp_path / "x.parquet")).row_group(0).column(0)
    large = metadata.total_uncompressed_size > tables.GROUP_BYTES
    assert large == (make is zeros)
