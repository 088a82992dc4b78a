"""Images by URL: the same ids, labels and bytes as here, and what goes wrong in one line; secrets are nowhere."""

import json
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sources import write_tar

import saevlm_fast as sf
from command import run, run_json
from file_server import FileServer, put_anew
from saevlm_fast.data.label_sets import read_labels
from saevlm_fast.errors import ImageError
from saevlm_fast.harvesting.plan import sampled_digest
from saevlm_fast.images import remote
from saevlm_fast.remote import cache, reading
from saevlm_fast.remote.answers import RemoteError
from tiny_tower import save_photos


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos in a folder, two tars, two parquet shards, a list; a store of them."""
    root = tmp_path_factory.mktemp("files")
    save_photos(root / "photos", 12)
    photos = sorted((root / "photos").rglob("*.png"))
    for number in range(2):
        members = {}
        for i, photo in enumerate(photos[number * 6 :][:6]):
            members |= {f"{i}.png": photo.read_bytes(), f"{i}.cls": photo.parent.name.encode()}
        write_tar(root / f"shard-{number:03d}.tar", members)
        rows = [{"image": {"bytes": photo.read_bytes(), "path": None}, "label": photo.parent.name} for photo in photos]
        table = pa.Table.from_pylist(rows[number * 6 :][:6])
        pq.write_table(table, root / f"train-0000{number}-of-00002.parquet", row_group_size=4)
    lines = [f"{photo.relative_to(root)}\t{photo.parent.name}" for photo in photos]
    (root / "list.txt").write_text("\n".join(lines))
    (root / "bad.txt").write_text("\n".join([*lines[:11], "photos/missing.png\tclass_0"]))
    return root


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reading, "TRIES", 3)
    cache._users.forget()
    with FileServer(files) as made:
        yield made


@pytest.mark.parametrize(
    "name", ["shard-{000..001}.tar", "shard-001.tar", "train-0000{0..1}-of-00002.parquet", "list.txt"]
)
def test_a_source_elsewhere_is_that_of_this_machine(server, name):
    here, there = sf.open_images(server.folder / name), sf.open_images(f"{server.url}/{name}")
    assert there.fingerprint() == here.fingerprint()
    assert len(there) in (6, 12)
    assert there.n_ignored == here.n_ignored
    assert [there.read(i) for i in range(len(there))] == [here.read(i) for i in range(len(here))]
    assert there.read(0) == here.read(0), "backwards"


def test_labels_elsewhere(server, tmp_path):
    (server.folder / "labels.csv").write_text("image,kind\na,cat\nb,dog\n")
    (found,) = read_labels(f"{server.url}/labels.csv?sig=x", ["a", "b"])
    assert found.names == ("cat", "dog")


def test_archives_are_let_go_and_fetched_again(server, monkeypatch):
    largest = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    monkeypatch.setenv("SAEVLM_FAST_CACHE_GIB", str(3.2 * largest / (1 << 30)))
    there = sf.open_images(f"{server.url}/shard-{{000..001}}.tar")
    assert len([there.read(i) for i in (0, 11, 1, 10)]) == 4
    kept = [path.stat().st_size for path in cache.remote_cache().rglob("*.tar")]
    assert sum(kept) <= 3.2 * largest


def test_a_list_here_of_urls(server, tmp_path):
    url, folder = f"{server.url}/photos", server.folder / "photos"
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("\n".join(f"{url}/{name}?sig=secret-{i}" for i, name in enumerate(names)))
    source = sf.open_images(tmp_path / "list.txt")
    assert source.read(3) == (folder / names[3]).read_bytes()
    assert source.image_id(3) == f"{url}/{names[3]}?***"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.tar", r"nowhere.tar: nothing is there \(status 404\)"),
        ("shard-{001..002}.tar", r"shard-002.tar: nothing is there"),
        ("photos", r"photos: a web server has no list of files"),
        ("list.txt::train", "has no splits, but 'train' was asked for"),
        ("{0..1}.jpg", r"not lists \(.txt\), .tar or .parquet files, nor one folder"),
    ],
)
def test_what_is_no_source_is_one_line(server, name, message):
    with pytest.raises((RemoteError, ValueError), match=message) as error:
        sf.open_images(f"{server.url}/{name}")
    assert "\n" not in str(error.value)


def test_an_image_that_is_missing_is_skipped_and_a_lost_network_is_not(server):
    source = sf.open_images(f"{server.url}/bad.txt")
    with pytest.raises(ImageError, match="nothing is there"):
        source.read(11)
    server.fails["*"] = [503] * 3
    with pytest.raises(RemoteError, match="status 503, 3 times"):
        source.read(0)


@pytest.fixture
def large(server, monkeypatch):
    """A parquet file of 12 images of 50 kB, which is indexed by ranges."""
    monkeypatch.setattr(remote, "SMALL", 0)
    rows = [
        {"image": {"bytes": bytes([i]) * 10 + random.Random(i).randbytes(50_000), "path": None}, "label": f"{i % 3}"}
        for i in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), server.folder / "large.parquet", row_group_size=4)
    return f"{server.url}/large.parquet"


def test_a_parquet_file_is_opened_without_its_images(server, large):
    there, here = sf.open_images(large), sf.open_images(server.folder / "large.parquet")
    size = (server.folder / "large.parquet").stat().st_size
    assert server.bytes_sent < 6 * (64 << 10) < 0.7 * size, "the end and two columns"
    assert there.fingerprint() == here.fingerprint()
    assert not list(cache.remote_cache().rglob("*.parquet"))
    assert [there.read(i) for i in (11, 0, 5)] == [here.read(i) for i in (11, 0, 5)]


def test_whether_the_images_are_the_same_is_known_without_fetching_them(server, large):
    told = sampled_digest(sf.open_images(large), 12)
    assert told == sampled_digest(sf.open_images(large), 12)
    assert not list(cache.remote_cache().rglob("*.parquet"))
    put_anew(server.folder / "large.parquet", (server.folder / "large.parquet").read_bytes())
    assert told != sampled_digest(sf.open_images(large), 12)
    server.etags = False
    here = sampled_digest(sf.open_images(server.folder / "large.parquet"), 12)
    assert here == sampled_digest(sf.open_images(large), 12), "without versions the images are read"


def test_a_file_that_is_replaced_after_it_was_opened_is_refused(server, large):
    source, data = sf.open_images(large), bytearray((server.folder / "large.parquet").read_bytes())
    put_anew(server.folder / "large.parquet", data)
    with pytest.raises(RemoteError, match=r"large.parquet: it was replaced since it was opened"):
        pickle.loads(pickle.dumps(source)).read(3)


def test_a_lost_network_is_not_taken_for_a_damaged_image(server, large):
    source = sf.open_images(large)
    server.fails["*"] = [503] * 3
    with pytest.raises(RemoteError, match="status 503, 3 times"):
        source.read(0)


def test_names_of_any_language(server, tmp_path):
    name = "ein Bild & m\u00e4r #1.png"
    (server.folder / name).write_bytes(b"data")
    (server.folder / "names.txt").write_text(f"{name.replace('#', '%23')}\n", encoding="utf-8")
    assert sf.open_images(f"{server.url}/names.txt").read(0) == b"data"


HARVEST = ("harvest", "--model", "hf:tiny-clip", "--layer", "1", "--workers", "1", "--device", "cpu")


def test_commands_take_urls_and_secrets_are_nowhere(server, tmp_path):
    secret = "?X-Amz-Signature=se-cret"
    clip = (*HARVEST, "--images", f"{server.url}/shard-{{000..001}}.tar{secret}")
    text = run(*clip, "--output", tmp_path / "store")
    run(*HARVEST, "--images", server.folder / "shard-{000..001}.tar", "--output", tmp_path / "here")
    digests = [json.loads((tmp_path / name / "index.json").read_text())["shards"] for name in ("store", "here")]
    assert digests[0] == digests[1]
    server.folder = tmp_path  # now serves the store
    url = server.url.replace("://", "://me:pass-word@") + "/store" + secret
    train = ("train", "--activations", url, "--d-sae", 32, "--k", 3, "--steps", 4, "--batch-size", 8, "--device", "cpu")
    text += run(*train, "--output", tmp_path / "run", "--cache-gib", "1")
    text += run(*train, "--output", tmp_path / "run", "--dry-run", "--force")
    rows = ("--sae", tmp_path / "run", "--activations", url, "--device", "cpu", "--output")
    text += run("top-images", *rows, tmp_path / "top", "--latents", "0:4", "--images", "none")
    text += run("ms-score", *rows, tmp_path / "ms.parquet", "--embeddings", url)
    text += run("report", *rows, tmp_path / "report", "--images", "none")
    said = run_json("inspect", tmp_path / "run")
    assert "cret" not in text + json.dumps(said)
    assert "pass-word" not in text
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"se-cret" not in data, path
            assert b"pass-word" not in data, path
    assert "?***" in (tmp_path / "run" / "settings.toml").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--activations", "URL/nowhere"),
        ("train", "--activations", "URL/x.npy"),
        ("train", "--activations", "s3://bucket/x", "--output", "s3://bucket/out"),
        ("top-images", "--sae", "https://host/sae", "--activations", "x.npy", "--output", "out"),
        ("top-images", "--sae", "sae", "--activations", "x.npy", "--output", "https://host/out"),
        ("ms-score", "--raw", "--activations", "URL/nowhere", "--embeddings", "URL/nowhere", "--output", "out.csv"),
        ("harvest", "--model", "hf:tiny-clip", "--images", "URL/nowhere.tar", "--layer", "1", "--output", "out"),
        ("inspect", "URL/nowhere"),
        ("report", "--sae", "https://host/sae", "--activations", "URL/nowhere", "--output", "out"),
        ("human-agreement", "--benchmark", "https://host/x", "--output", "out"),
    ],
)
def test_what_cannot_be_had_ends_with_code_2_and_one_line(server, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    text = run(*(word.replace("URL", server.url) for word in arguments), code=2)
    error = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, text
    assert "status 404" in error[0] or "is elsewhere; a path on this machine is needed" in error[0], text
    assert not (tmp_path / "s3:").exists()
    assert not (tmp_path / "out").exists()
