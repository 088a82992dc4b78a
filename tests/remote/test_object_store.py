"""The real drivers: emulators of S3, Google's and Azure's stores in processes of their own, through fsspec."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode

import pytest
import torch
from image_sources import write_tar

import saevlm_fast as sf
from command import run
from saevlm_fast.errors import ImageError
from saevlm_fast.remote import cache, reading
from saevlm_fast.remote.answers import NotThere, RemoteError
from tiny_tower import save_photos

pytestmark = pytest.mark.interop
SECRET = b64encode(b"secret-of-a-test").decode()
X = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))


class Server:
    """An emulator of a store of objects; `start` again brings an empty one back on the same port."""

    def __init__(self, *command):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.command = [word.replace("PORT", str(self.port)) for word in command]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=2).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None
                time.sleep(0.1)

    def stop(self):
        self.process.kill()
        self.process.wait()


def start_s3(patch):
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = Server(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "PORT")
    patch.setenv("AWS_ENDPOINT_URL", server.url)
    patch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return server


def start_gs(patch):
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # looks for a login for every file; read when imported
    patch.setenv("NO_GCE_CHECK", "true")
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    start = (sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", "--host", "127.0.0.1", "--port", "PORT")
    server = Server(*start, "--in-memory")
    patch.setenv("STORAGE_EMULATOR_HOST", server.url)
    return server


def start_az(patch):
    """azurite comes from npm: on the PATH, or where AZURITE says."""
    pytest.importorskip("adlfs")
    program = os.environ.get("AZURITE") or shutil.which("azurite-blob")
    if program is None:
        pytest.skip("no azurite-blob on the PATH (npm install azurite)")
    patch.setenv("AZURITE_ACCOUNTS", f"devstoreaccount1:{SECRET}")
    quiet = ("--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry")
    server = Server(program, "--blobHost", "127.0.0.1", "--blobPort", "PORT", *quiet)
    account = {"DefaultEndpointsProtocol": "http", "AccountName": "devstoreaccount1", "AccountKey": SECRET}
    account["BlobEndpoint"] = f"{server.url}/devstoreaccount1"
    patch.setenv("AZURE_STORAGE_CONNECTION_STRING", "".join(f"{name}={word};" for name, word in account.items()))
    return server


STARTS = {"s3": start_s3, "gs": start_gs, "az": start_az}


@pytest.fixture(scope="module", params=STARTS)
def objects(request):
    """(protocol, server), with a bucket called bucket."""
    fsspec = pytest.importorskip("fsspec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        server = STARTS[request.param](patch)
        fsspec.filesystem(request.param).mkdir("bucket")
        yield request.param, server
        server.stop()


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reading, "TRIES", 2)
    cache._users.forget()


def upload(protocol, folder, place):
    import fsspec

    files = fsspec.filesystem(protocol)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe_file(f"{place}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def store(objects, tmp_path):
    with sf.ActivationWriter(tmp_path / "store", 16, torch.float16, {}, rows_per_shard=50) as writer:
        items = {"image": [f"{i}" for i in range(300)], "token": [0] * 300}
        writer.append(X, items)
    upload(objects[0], tmp_path / "store", "bucket/a/store")
    return f"{objects[0]}://bucket/a/store"


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
    assert f'activations = "{store}"' in text
    assert SECRET not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


def test_images_in_a_folder_tars_and_patterns(objects, tmp_path):
    protocol = objects[0]
    photos = save_photos(tmp_path / "photos", 6)
    upload(protocol, photos, "bucket/photos")
    there, here = sf.open_images(f"{protocol}://bucket/photos"), sf.open_images(photos)
    assert there.fingerprint() == here.fingerprint()
    assert [there.read(i) for i in range(6)] == [here.read(i) for i in range(6)]
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number}.tar", {"x.png": here.read(number)})
    upload(protocol, tmp_path / "tars", "bucket/tars")
    for place in ("bucket/tars", "bucket/tars/*.tar", "bucket/tars/{0..2}.tar"):
        source = sf.open_images(f"{protocol}://{place}")
        assert source.fingerprint() == sf.open_images(tmp_path / "tars").fingerprint()
        assert source.read(2) == here.read(2)
    harvest = ("harvest", "--model", "hf:tiny-clip", "--layer", "1", "--workers", "2", "--device", "cpu")
    run(*harvest, "--images", f"{protocol}://bucket/photos", "--output", tmp_path / "out")
    assert sf.open_activations(tmp_path / "out").n_rows == 6
    upload(protocol, tmp_path / "tars", "bucket/gone")
    source = sf.open_images(f"{protocol}://bucket/photos")
    source._url = f"{protocol}://bucket/elsewhere"
    with pytest.raises(ImageError, match="nothing is there"):
        source.read(0)


def test_what_is_not_there(objects):
    protocol = objects[0]
    with pytest.raises(ValueError, match=rf"{protocol}://bucket/none/index.json: nothing is there"):
        sf.open_activations(f"{protocol}://bucket/none")
    with pytest.raises(NotThere, match=rf"{protocol}://no-bucket/x.npy: nothing is there"):
        sf.open_activations(f"{protocol}://no-bucket/x.npy")
    with pytest.raises((ValueError, RemoteError), match="bucket/nothing"):
        sf.open_images(f"{protocol}://bucket/nothing/*.tar")


def test_a_server_that_is_killed_while_a_command_reads(objects, store, tmp_path):
    """In a process of its own: its words and its exit code are what users get."""
    code = """
import os, signal
from saevlm_fast.data import rows
from saevlm_fast.remote import reading
reading.TRIES = 1  # the drivers try again themselves
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
    environment = os.environ | {"COLUMNS": "300", "TO_BE_KILLED": str(objects[1].process.pid)}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert objects[1].process.wait(30) == -signal.SIGKILL
    objects[1].start()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(f"error: activations: {store}/shard-")]
    assert len(errors) == 1, done.stderr
