"""hf://: files of repositories on the Hub, at one commit, compared with their checksums; a Hub of this machine."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import saevlm_fast as sf
from file_server import FileServer
from hub_server import TOKEN, hub_server
from saevlm_fast.errors import ImageError
from saevlm_fast.remote import cache, reading
from saevlm_fast.remote.answers import NotThere, RemoteError
from saevlm_fast.remote.cache import fetched, release
from saevlm_fast.remote.reading import listed, read_whole
from tiny_tower import save_photos

X = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
PHOTOS = "hf://datasets/user/photos"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reading, "TRIES", 3)
    monkeypatch.setattr(cache, "PIECE", 2000)
    cache._users.forget()
    with hub_server(tmp_path / "hub") as made:
        yield made


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos, a list, two tars, two parquet shards of a split and one of another."""
    root = tmp_path_factory.mktemp("files")
    photos = sorted(save_photos(root / "photos", 6).rglob("*.png"))
    (root / "list.txt").write_text("".join(f"{photo.relative_to(root)}\t{photo.parent.name}\n" for photo in photos))
    for number in range(2):
        with tarfile.open(root / f"{number}.tar", "w") as archive:
            for photo in photos[number * 3 :][:3]:
                archive.add(photo, photo.name)
        rows = [{"image": {"bytes": photo.read_bytes(), "path": photo.name}} for photo in photos[number * 3 :][:3]]
        (root / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "data" / f"train-0000{number}-of-00002.parquet")
        pq.write_table(pa.Table.from_pylist(rows), root / "data" / "test-00000-of-00001.parquet")
    return root


def test_images_are_those_of_a_clone(hub, files):
    hub.add("datasets/user/photos", contents(files))
    pairs = {"photos": "photos", "{0..1}.tar": "{0..1}.tar", "*.tar": "*.tar", "list.txt": "list.txt"}
    pairs |= {"data/train-*": "data/train-*", "data::train": "data::train", "@main/0.tar": "0.tar"}
    for there, here in pairs.items():
        source = sf.open_images(f"{PHOTOS}{'' if there.startswith('@') else '/'}{there}")
        other = sf.open_images(files / here)
        assert source.fingerprint() == other.fingerprint(), there
        assert [source.read(i) for i in range(len(source))] == [other.read(i) for i in range(len(other))]


def test_a_store_in_the_repository_of_a_model(hub, tmp_path):
    with sf.ActivationWriter(tmp_path / "store", 8, torch.float16, {}, rows_per_shard=20) as writer:
        writer.append(X, {"image": [f"{i}" for i in range(60)], "token": [0] * 60})
    hub.add("user/model", {f"a/store/{path}": data for path, data in contents(tmp_path / "store").items()})
    rows = sf.open_activations("hf://user/model/a/store")
    assert torch.equal(torch.cat([x_BD for _, x_BD in rows.chunks(32)]), X.half().float())
    assert rows.items([59]).to_pylist()[0]["image"] == "59"


def test_a_source_stays_at_the_commit_at_which_it_was_opened(hub, files):
    old = contents(files)
    hub.add("datasets/user/photos", old)
    source = sf.open_images(f"{PHOTOS}/photos")
    pinned = f"{PHOTOS}@{hub.repos['datasets/user/photos'].sha('main')}/0.tar"
    hub.add(
        "datasets/user/photos", {path: data for path, data in old.items() if "photos/" not in path} | {"0.tar": b""}
    )
    assert source.read(0) == (files / "photos" / source.image_id(0)).read_bytes()
    assert fetched(pinned).path.read_bytes() == old["0.tar"]
    assert fetched(f"{PHOTOS}/0.tar").path.read_bytes() == b""
    with pytest.raises(NotThere, match="nothing is there"):
        sf.open_images(f"{PHOTOS}/photos")


def test_what_a_later_commit_still_has_is_not_fetched_again(hub):
    hub.add("datasets/user/photos", {"0.tar": b"a" * 5000, "small.txt": b"one"})
    first = [fetched(f"{PHOTOS}/{name}").path for name in ("0.tar", "small.txt")]
    hub.add("datasets/user/photos", {"0.tar": b"a" * 5000, "small.txt": b"two", "README.md": b"new"})
    before = hub.count("GET", "/resolve/")
    assert fetched(f"{PHOTOS}/0.tar").path == first[0]
    assert hub.count("GET", "/resolve/") == before
    assert fetched(f"{PHOTOS}/small.txt").path.read_bytes() == b"two"


def test_a_folder_is_listed_once(hub):
    hub.add("datasets/user/photos", {f"{i}.png": bytes([i]) * 9 for i in range(30)})
    source = sf.open_images(PHOTOS)
    for i in range(30):
        source.read(i)
    assert len(hub.log) == 1 + 1 + 30, "the commit, the listing, one request an image"


@pytest.mark.parametrize("name", ["0.tar", "small.txt"])
def test_wrong_bytes_are_refused_by_their_checksum(hub, name):
    hub.add("datasets/user/photos", {name: b"a" * 5000})
    hub.corrupt.add(name)
    with pytest.raises(RemoteError, match=r"altered, its (SHA-256|checksum) is not the one"):
        fetched(f"{PHOTOS}/{name}")
    with pytest.raises(RemoteError, match="altered on its way, its checksum"):
        read_whole(f"{PHOTOS}/{name}", 9000)
    hub.corrupt.clear()
    assert fetched(f"{PHOTOS}/{name}").path.read_bytes() == b"a" * 5000


def test_what_passes_is_tried_again_and_the_rest_is_one_line(hub):
    hub.add("datasets/user/photos", {"0.tar": b"a" * 5000})
    hub.cut_downloads, hub.statuses = 2, [503, 429]
    assert fetched(f"{PHOTOS}/0.tar").path.read_bytes() == b"a" * 5000
    hub.ranges = False
    release(fetched(f"{PHOTOS}/0.tar").key)
    hub.add("datasets/user/photos", {"0.tar": b"b" * 5000})
    with pytest.raises(RemoteError, match=r"0.tar: status 200 where a range was asked for, 3 times"):
        fetched(f"{PHOTOS}/0.tar")
    hub.down = True
    with pytest.raises(RemoteError, match=r"0.tar: status 503, 3 times"):
        fetched(f"{PHOTOS}/0.tar")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/user/none/0.tar", "nothing is there, or it needs a login"),
        (f"{PHOTOS}@v9/0.tar", "no such revision"),
        (f"{PHOTOS}/9.tar", "nothing is there"),
        ("hf://datasets/user", "hf://USER/NAME/... or hf://datasets/USER/NAME/... is needed"),
        ("hf://datasets/user/gated/0.tar", "its owners have to allow you to read it"),
        (f"{PHOTOS}/sub", "a folder, where a file is needed"),
    ],
)
def test_what_is_not_there_is_said_at_once(hub, url, message):
    hub.add("datasets/user/photos", {"0.tar": b"a", "sub/1.txt": b""})
    hub.add("datasets/user/gated", {"0.tar": b"a"}, gated=True)
    with pytest.raises(NotThere, match=message) as error:
        fetched(url)
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)


def test_private_repositories_and_other_revisions(hub, monkeypatch):
    hub.add("datasets/user/photos", {"0.tar": b"a"}, private=True)
    hub.repos["datasets/user/photos"].commit({"default/train/0000.parquet": b"converted"}, "refs/convert/parquet")
    assert read_whole(f"{PHOTOS}/0.tar", 9) == b"a"
    for revision in ("~parquet", "refs/convert/parquet", "refs%2Fconvert%2Fparquet"):
        assert read_whole(f"{PHOTOS}@{revision}/default/train/0000.parquet", 9) == b"converted"
    (found,) = listed(f"{PHOTOS}@~parquet/*/train/*.parquet")
    assert found.endswith("/default/train/0000.parquet")
    assert not any(TOKEN.encode() in path.read_bytes() for path in cache.remote_cache().rglob("*") if path.is_file())
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotThere, match="it needs a login"):
        read_whole(f"{PHOTOS}/0.tar", 9)


def test_a_command_in_a_process_of_its_own(hub, tmp_path):
    """The environment is all it has of this Hub."""
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    code = "import sys; from saevlm_fast.remote.cache import fetched; print(fetched(sys.argv[1]).path)"
    data = (tmp_path / "x.parquet").read_bytes()
    hub.add("datasets/user/photos", {"x.parquet": data}, private=True)
    call = [sys.executable, "-c", code, f"{PHOTOS}/x.parquet"]
    done = subprocess.run(call, env=os.environ | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, timeout=120)
    assert Path(done.stdout.strip()).read_bytes() == data, done.stderr


def test_large_files_come_from_another_server_which_does_not_see_the_token(hub, tmp_path):
    (tmp_path / "cdn").mkdir()
    (tmp_path / "cdn" / "0.tar").write_bytes(b"a" * 5000)
    hub.add("datasets/user/photos", {"0.tar": b"a" * 5000}, private=True)
    with FileServer(tmp_path / "cdn") as other:
        hub.large_files_at = other.url
        assert fetched(f"{PHOTOS}/0.tar").path.read_bytes() == b"a" * 5000
        assert (other.asked["0.tar"], other.logins) == (3, set())
    assert hub.tokens == {TOKEN}


def test_an_image_that_is_gone_is_skipped(hub, files):
    hub.add("datasets/user/photos", {"list.txt": b"a.png\nb.png\n", "a.png": b"a"})
    source = sf.open_images(f"{PHOTOS}/list.txt")
    assert source.read(0) == b"a"
    with pytest.raises(ImageError, match="nothing is there"):
        source.read(1)
