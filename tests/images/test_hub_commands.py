"""A data set on the Hub and the commands, each in a process of its own: workers, ranks, resuming, and where secrets are
not. The Hub is of this machine."""

import json
import os
import subprocess
import sys

import pytest

from hub_server import TOKEN, hub_server
from tiny_tower import save_photos

pytestmark = pytest.mark.distributed
HARVEST = ("harvest", "--model", "hf:tiny-clip", "--layer", "1", "--device", "cpu", "--batch-size", "4")


def command(*words, launcher=()):
    call = [sys.executable, "-m", *launcher, "saevlm_fast.cli", *map(str, words)]
    return subprocess.run(call, env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    save_photos(root / "photos" / "train", 12)
    with hub_server(root / "hub") as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEVLM_FAST_CACHE", str(root / "cache"))
        patch.setenv("HF_TOKEN", TOKEN)
        files = {str(path.relative_to(root / "photos")): path.read_bytes() for path in (root / "photos").rglob("*.png")}
        made.add("datasets/user/photos", files, private=True)
        made.root = root
        done = command(*HARVEST, "--images", root / "photos" / "train", "--output", root / "here")
        assert done.returncode == 0, done.stderr
        yield made


def shards(folder):
    return [each["sha256"] for each in json.loads((folder / "index.json").read_text())["shards"]]


def test_a_harvest_is_that_of_the_files_here(hub, tmp_path):
    images = "hf-dataset:user/photos::train"
    done = command(*HARVEST, "--images", images, "--workers", 2, "--output", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "there") == shards(hub.root / "here")
    assert "is read as it is now; to read the same later, write" in done.stderr + done.stdout
    for path in [*tmp_path.rglob("*"), *(hub.root / "cache").rglob("*")]:
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in done.stderr + done.stdout


def test_two_ranks_share_the_images(hub, tmp_path):
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
    done = command(*HARVEST, "--images", "hf-dataset:user/photos", "--output", tmp_path / "there", launcher=launcher)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "there" / "index.json").read_text())
    assert sum(each["rows"] for each in index["shards"]) == 12


def test_what_is_missing_is_one_line_and_code_2(hub, tmp_path):
    done = command(*HARVEST, "--images", "hf-dataset:user/nothing", "--output", tmp_path / "there")
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "hf://datasets/user/nothing: nothing is there, or it needs a login" in line
    assert "Traceback" not in done.stderr
