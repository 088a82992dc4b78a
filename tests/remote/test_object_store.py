"""The real drivers: an S3-compatible server in a process of its own, through fsspec and s3fs."""

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request

import pytest
import torch

import saevlm_fast as sf
from command import run
from saevlm_fast.errors import ImageError
from saevlm_fast.remote import cache, reading
from saevlm_fast.remote.answers import NotThere, RemoteError
from tiny_tower import save_photos

pytestmark = pytest.mark.interop
X = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))


class S3:
    """moto's server; `start` again brings an empty one back on the same port."""

    def __init__(self):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        call = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=2).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None
                time.sleep(0.1)

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto.server")
    fsspec, _ = pytest.importorskip("fsspec"), pytest.importorskip("s3fs")
    server = S3()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("no_proxy", "127.0.0.1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield server
    server.stop()


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reading, "TRIES", 2)
    cache._users.forget()


def upload(folder, place):
    import fsspec

    fsspec.filesystem("s3").put(f"{folder}/", place, recursive=True)


@pytest.fixture
def store(s3, tmp_path):
    with sf.ActivationWriter(tmp_path / "store", 16, torch.float16, {}, rows_per_shard=50) as writer:
        items = {"image": [f"{i}" for i in range(300)], "token": [0] * 300}
        writer.append(X, items)
    upload(tmp_path / "store", "bucket/a/store")
    return "s3://bucket/a/store"


def test_a_store(store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PIECE", 700)
    rows = sf.open_activations(store)
    assert torch.equal(torch.cat([x_BD for _, x_BD in rows.chunks(70)]), X.half().float())
    assert rows.items([299]).to_pylist()[0]["image"] == "299"
    train = (
        "train",
        "--activations",
        store,
        "--d-sae",
        32,
        "--k",
        3,
        "--steps",
        4,
        "--batch-size",
        32,
        "--device",
        "cpu",
    )
    run(*train, "--output", tmp_path / "run")
    text = (tmp_path / "run" / "settings.toml").read_text()
    assert 'activations = "s3://bucket/a/store"' in text
    assert "secret-of-a-test" not in "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )


def test_images_in_a_folder_tars_and_patterns(s3, tmp_path):
    photos = save_photos(tmp_path / "photos", 6)
    upload(photos, "bucket/photos")
    there, here = sf.open_images("s3://bucket/photos"), sf.open_images(photos)
    assert there.fingerprint() == here.fingerprint()
    assert [there.read(i) for i in range(6)] == [here.read(i) for i in range(6)]
    (tmp_path / "tars").mkdir()
    for number in range(3):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as archive:
            member, data = tarfile.TarInfo("x.png"), here.read(number)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    upload(tmp_path / "tars", "bucket/tars")
    for place in ("bucket/tars", "bucket/tars/*.tar", "bucket/tars/{0..2}.tar"):
        source = sf.open_images(f"s3://{place}")
        assert source.fingerprint() == sf.open_images(tmp_path / "tars").fingerprint()
        assert source.read(2) == here.read(2)
    run("harvest", "--model", "hf:tiny-clip", "--layer", "1", "--images", "s3://bucket/photos", "--workers", "2",
        "--device", "cpu", "--output", tmp_path / "out")  # fmt: skip
    assert sf.open_activations(tmp_path / "out").n_rows == 6
    upload(tmp_path / "tars", "bucket/gone")
    source = sf.open_images("s3://bucket/photos")
    source._url = "s3://bucket/elsewhere"
    with pytest.raises(ImageError, match="nothing is there"):
        source.read(0)


def test_what_is_not_there(s3):
    with pytest.raises(ValueError, match=r"s3://bucket/none/index.json: nothing is there"):
        sf.open_activations("s3://bucket/none")
    with pytest.raises(NotThere, match=r"s3://no-bucket/x.npy: nothing is there"):
        sf.open_activations("s3://no-bucket/x.npy")
    with pytest.raises((ValueError, RemoteError), match="bucket/nothing"):
        sf.open_images("s3://bucket/nothing/*.tar")


def test_a_server_that_is_killed_while_a_command_reads(s3, store, tmp_path):
    """In a process of its own: its words and its exit code are what users get."""
    code = """
import os, signal
from saevlm_fast.data import rows
from saevlm_fast.remote import reading
reading.TRIES = 2
opened = rows._open_remote
def open_then_kill(*arguments):
    found = opened(*arguments)
    os.kill(int(os.environ["TO_BE_KILLED"]), signal.SIGKILL)
    return found
rows._open_remote = open_then_kill
from saevlm_fast.cli import main
main()
"""
    words = ["train", "--activations", store, "--d-sae", "32", "--k", "3", "--steps", "4", "--device", "cpu"]
    call = [sys.executable, "-c", code, *words, "--output", str(tmp_path / "run")]
    environment = os.environ | {"COLUMNS": "300", "TO_BE_KILLED": str(s3.process.pid)}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert s3.process.wait(30) == -signal.SIGKILL
    s3.start()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: s3://bucket/a/store/shard-")]
    assert len(errors) == 1, done.stderr
