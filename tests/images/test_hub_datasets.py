"""hf-dataset:USER/NAME: the rows are those of datasets' own streaming mode, in its order; a Hub of this machine."""

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import saevlm_fast as sf
from hub_server import hub_server
from saevlm_fast.remote import cache, reading

README = b"""---
configs:
- config_name: small
  default: true
  data_files:
  - split: train
    path: [rows/part-*.parquet, more/x.parquet]
  - split: test
    path: rows/test.parquet
- config_name: large
  data_files: big/*.parquet
---
"""


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (number, 0, 0)).save(file, "png")
    return file.getvalue()


def parquet(numbers, **more):
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 2} for i in numbers]
    names = {"names": ["even", "odd"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": names}
    table = pa.Table.from_pylist([row | {name: row["image"] for name in more} for row in rows])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features | more}})})
    pq.write_table(table, file := io.BytesIO(), row_group_size=2)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    with hub_server(tmp_path_factory.mktemp("hub")) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEVLM_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(datasets.config, "HF_ENDPOINT", made.url)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr(reading, "FIRST_PAUSE", 0.01)
        cache._users.forget()
        files = {f"rows/part-{i}.parquet": parquet(range(3 * i, 3 * i + 3)) for i in range(2)}
        files |= {"more/x.parquet": parquet([6]), "rows/test.parquet": parquet([7]), "README.md": README}
        made.add("datasets/user/rows", files | {"big/0.parquet": parquet([8, 9])})
        photos = {
            f"data/{split}/{kind}/{i}.png": png(i)
            for split in ("train", "test")
            for i in range(4)
            for kind in ("cat", "dog")
        }
        made.add("datasets/user/photos", photos)
        made.add("datasets/user/table", {"data.csv": b"x\n1\n"})
        made.repos["datasets/user/table"].commit({"default/train/0000.parquet": parquet([1])}, "refs/convert/parquet")
        made.add("datasets/user/csv", {"data.csv": b"x\n1\n"})
        made.add(
            "datasets/user/two", {"0.parquet": parquet(range(2), left={"_type": "Image"}, right={"_type": "Image"})}
        )
        yield made


def streamed(name, config, split):
    """(number of the image, label) of every row, as datasets streams them."""
    import datasets

    rows = datasets.load_dataset(f"user/{name}", config, split=split, streaming=True)
    names = rows.features["label"].names
    return [(number(row["image"]), names[row["label"]]) for row in rows]


def read(source):
    return [(number({"bytes": source.read(i)}), source.label(i)) for i in range(len(source))]


def number(image):
    image = Image.open(io.BytesIO(image["bytes"])) if isinstance(image, dict) else image
    return image.getpixel((0, 0))[0]


@pytest.mark.parametrize(
    ("text", "name", "config", "split"),
    [
        ("rows::train", "rows", None, "train"),
        ("rows:small::test", "rows", "small", "test"),
        ("rows:large", "rows", "large", "train"),
        ("rows@main:small::train", "rows", "small", "train"),
        ("photos::test", "photos", None, "test"),
    ],
)
def test_rows_are_those_of_datasets_streaming_mode(hub, text, name, config, split):
    source = sf.open_images(f"hf-dataset:user/{text}")
    assert read(source) == streamed(name, config, split)
    commit = hub.repos[f"datasets/user/{name}"].sha("main")
    (note,) = (line for line in source.notes if "as it is now" in line)
    assert note.endswith(f"write hf-dataset:user/{name}@{commit[:10]}")


def test_ids_are_those_of_the_files(hub):
    assert sf.open_images("hf-dataset:user/photos::train").image_id(0) == "cat/0.png"
    assert sf.open_images("hf-dataset:user/rows:small::train").image_id(6) == "more/x.parquet/0"


def test_what_is_not_read_here_is_read_as_the_hub_has_converted_it(hub):
    source = sf.open_images("hf-dataset:user/table::train")
    assert source.read(0) == png(1)
    assert any("as the Hub has converted it to parquet; its own files are .csv" in note for note in source.notes)


def test_the_column_is_named_where_there_are_several(hub):
    assert sf.open_images("hf-dataset:user/two::train#left").read(1) == png(1)
    assert sf.open_images("hf-dataset:user/two").read(1) == png(1), "one is called image"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows", "holds several splits; add ::SPLIT, one of: train, test"),
        ("rows::validation", "no split 'validation'; add ::SPLIT, one of: train, test"),
        ("rows:huge::train", "datasets says: BuilderConfig 'huge' not found"),
        ("none", "nothing is there"),
        ("csv", r"its files \(.csv\) are not read, and the Hub has not converted the whole split"),
        ("two::train#middle", "no column 'middle' among image, label, left, right"),
        ("photos::train#image", "has no columns, but 'image' was asked for"),
        ("rows:a:b", r"not of the form hf-dataset:USER/NAME\[@REVISION\]"),
        ("rows/", "not of the form"),
    ],
)
def test_what_is_refused_is_one_line(hub, text, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        sf.open_images(f"hf-dataset:user/{text}")
    assert "\n" not in str(error.value)


def test_without_the_package(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'saevlm-fast\[datasets\]'; or name"):
        sf.open_images("hf-dataset:user/rows::train")
