"""The cache of harvested scenes: used when it is sound, made again when it is not, by one process at a time."""

import functools
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from saevlm_fast.config import SAEConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.demo import scene_stores
from saevlm_fast.demo.scene_stores import SceneStores, harvest_scenes, scenes_of_sae
from saevlm_fast.files import CACHE_VARIABLE, cache_directory
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.sae import SparseAutoencoder, with_metadata
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tower import HookPoint

N = 40
load_tower_once = functools.cache(load_tower)  # the box's is the same every time


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(scene_stores, "load_tower", load_tower_once)
    return tmp_path / "cache"


class Told:
    """What harvest_scenes said and did."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.n_images = 0

    def __call__(self, **options: object) -> SceneStores:
        self.messages, self.n_images = [], 0
        return harvest_scenes("test", N, on_message=self.messages.append, on_images=self._count, **options)  # type: ignore[arg-type]

    def _count(self, done: int, total: int, skipped: int) -> None:
        self.n_images = done


def test_stores_hold_what_the_tower_says_of_the_scenes(cache: Path) -> None:
    stores = Told()()
    acts, images = open_activations(stores.activations), open_activations(stores.embeddings)
    source, tower = open_images(f"scenes:test:{N}"), load_tower("hf:tiny-clip")
    assert acts.items()["image"].to_pylist() == [source.image_id(i) for i in range(N)]
    pixels = tower.preprocess([decode(source.read(i)) for i in range(N)])
    points = HookPoint("residual", scene_stores.LAYER), HookPoint("projection")
    with tower.hooked(points) as run:
        found = run(pixels)
    torch.testing.assert_close(acts.rows(torch.arange(N)), found[points[0]][:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images.rows(torch.arange(N)), found[points[1]], rtol=1e-4, atol=1e-4)


def test_a_sound_cache_is_used_and_a_damaged_one_is_not(cache: Path) -> None:
    told = Told()
    stores = told()
    rows = open_activations(stores.activations).rows(torch.arange(N)).clone()
    assert told.n_images == N
    assert told() == stores
    assert (told.messages, told.n_images) == ([], 0)
    shard = next(stores.activations.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert told() == stores
    assert told.n_images == N
    assert told.messages[0].startswith("damaged cache, harvesting again:")
    torch.testing.assert_close(open_activations(stores.activations).rows(torch.arange(N)), rows, rtol=0, atol=0)


@pytest.mark.parametrize("file", ["harvest.json", "projection/index.json"])
def test_half_a_record_is_damage(cache: Path, file: str) -> None:
    told = Told()
    directory = told().directory
    whole = (directory / file).read_text()
    (directory / file).write_text(whole[: len(whole) // 2])
    told()
    assert told.n_images == N
    assert len(told.messages) == 1
    assert json.loads((directory / file).read_text()) == json.loads(whole)


@pytest.mark.parametrize("record", ["{}", "[]", '{"model": {}, "images": {}, "harvest": {}}'])
def test_a_record_of_something_else_is_damage(cache: Path, record: str) -> None:
    told = Told()
    file = told().directory / "harvest.json"
    whole = file.read_text()
    file.write_text(record)
    told()
    assert (told.n_images, len(told.messages)) == (N, 1)
    assert json.loads(file.read_text()) == json.loads(whole)


def test_a_file_in_the_place_of_a_cache_is_damage(cache: Path) -> None:
    told = Told()
    directory = told().directory
    shutil.rmtree(directory)
    directory.write_text("no directory")
    told()
    assert (told.n_images, len(told.messages)) == (N, 1)


def test_a_missing_store_is_harvested(cache: Path) -> None:
    told = Told()
    directory = told().directory
    (directory / "projection" / "index.json").unlink()
    told()
    assert told.n_images == N


def test_other_layers_tokens_and_models_are_other_entries(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    directories = {told().directory, told(layer=2).directory, told(tokens="mean").directory}
    tower = load_tower("hf:tiny-clip")
    with torch.no_grad():
        next(tower.model.parameters()).add_(1)
    monkeypatch.setattr(scene_stores, "load_tower", lambda spec, device: tower)
    directories.add(told().directory)
    assert len(directories) == 4


def test_two_processes_make_one_harvest(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    together, batches = context.Barrier(2), context.SimpleQueue()

    def work() -> None:
        told = Told()
        together.wait(60)
        told()
        batches.put((told.n_images, told.messages))

    running = [context.Process(target=work) for _ in range(2)]
    for process in running:
        process.start()
    done = sorted(batches.get() for _ in running)
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert [n_images for n_images, _ in done] == [0, N]
    assert [len(messages) for _, messages in done] in ([1, 0], [0, 0])  # who came late may have had nothing to wait for
    assert all("another process is harvesting it, waiting" in text for _, messages in done for text in messages)


def test_the_cache_directory_can_be_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == cache
    assert cache.is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"^SAEVLM_FAST_CACHE: .*file cannot be made"):
        cache_directory()
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "saevlm-fast"


SOURCE = {"model": {"spec": "hf:tiny-clip"}, "point": "residual", "layer": 2, "tokens": "mean"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "was not trained on the box's scenes"),
        ("somewhere", "was not trained on the box's scenes"),
        ({"model": "clip"}, "was not trained on the box's scenes"),
        (SOURCE | {"point": "mlp"}, "was not trained on the box's scenes"),
        (SOURCE | {"tokens": "random2"}, "was trained on random2 tokens"),
    ],
)
def test_scenes_of_other_saes_are_unknown(tmp_path: Path, source: object, message: str) -> None:
    save_sae(tmp_path, source)
    with pytest.raises(ValueError, match=message):
        scenes_of_sae(tmp_path)


def test_scenes_of_an_sae(tmp_path: Path) -> None:
    save_sae(tmp_path, SOURCE)
    assert scenes_of_sae(tmp_path) == (2, "mean")


def save_sae(directory: Path, source: object) -> None:
    sae = SparseAutoencoder(SAEConfig(8, 16, 2, "topk"))
    with_metadata(sae, source=source).save_pretrained(directory)
