"""torchrun of the commands that ranks share, each rank with a GPU of its own, beside one process on a CPU."""

import pytest
import torch
from result_numbers import numbers_in
from torchrun import Torchrun

from command import run
from saevlm_fast.data.rows import open_activations
from saevlm_fast.sae import SparseAutoencoder
from small_world import LAYER, build_world, words

pytestmark = [pytest.mark.gpu, pytest.mark.skipif("torch.cuda.device_count() < 2", reason="fewer than two GPUs")]
RECIPE = ("--d-sae", 17, "--steps", 4, "--batch-size", 16, "--lr", 3e-3, "--dead-after", 32)
STORE = ("--activations", "tokens")
IMAGES = ("--model", "hf:tiny-clip", "--images", "photos", "--layer", LAYER, "--tokens", "all", "--workers", 0)
RUNS = {
    "topk": (*STORE, "--architecture", "topk", "--k", 3),
    "batch_topk": (*STORE, "--architecture", "batch_topk", "--k", 3),
    "matryoshka": (*STORE, "--architecture", "matryoshka", "--k", 3, "--groups", "0.5,0.5"),
    "jumprelu": (*STORE, "--architecture", "jumprelu", "--target-l0", 4),
    "relu": (*STORE, "--architecture", "relu"),
    "rows on the host": (*STORE, "--architecture", "batch_topk", "--k", 3, "--data-on", "host"),
    "several": (*STORE, "--architecture", "topk", "--k", "2,3"),
    "from images": (*IMAGES, "--k", 3),
    "several from images": (*IMAGES, "--k", "2,3"),
}
REPLICAS = ("topk", "several", "from images")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("gpus") / "world")


def by_ranks(log, *call):
    with Torchrun(call, 2, log) as ranks:
        code, said = ranks.end(570)
    assert code == 0, said


@pytest.mark.parametrize(
    ("kind", "more"), [(kind, ()) for kind in RUNS] + [(kind, ("--data-parallel", 2)) for kind in REPLICAS]
)
def test_ranks_train_what_one_process_trains(kind, more, world, tmp_path, monkeypatch):
    """Rounding differs, and Adam makes more of it; a step or a row too many would be a part of the rate, 3e-3."""
    monkeypatch.chdir(world)
    call = ("train", *RUNS[kind], *RECIPE)
    run(*call, "--device", "cpu", "--output", tmp_path / "alone")
    by_ranks(tmp_path / "log", *call, *more, "--device", "cuda", "--output", tmp_path / "ranks")
    saes = [path.parent.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("cfg.json")]
    saes = [sae for sae in saes if "checkpoints" not in sae.parts]
    assert len(saes) == (2 if "several" in kind else 1)
    for sae in saes:
        found, expected = (SparseAutoencoder.from_pretrained(tmp_path / who / sae) for who in ("ranks", "alone"))
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_ranks_harvest_what_one_process_harvests(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    call = ("harvest", *IMAGES)
    run(*call, "--device", "cpu", "--output", tmp_path / "alone")
    by_ranks(tmp_path / "log", *call, "--device", "cuda", "--output", tmp_path / "ranks")
    found, expected = (open_activations(tmp_path / who) for who in ("ranks", "alone"))
    assert found.items().equals(expected.items())
    all_N = torch.arange(expected.n_rows)
    torch.testing.assert_close(found.rows(all_N), expected.rows(all_N), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["ms-score", "evaluate"])
def test_ranks_measure_what_one_process_measures(name, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    output = "out.parquet" if name == "ms-score" else "out"
    (tmp_path / "alone").mkdir()
    (tmp_path / "ranks").mkdir()
    run(*words(name, output=str(tmp_path / "alone" / output)))
    by_ranks(tmp_path / "log", *words(name, output=str(tmp_path / "ranks" / output), device="cuda"))
    expected = numbers_in(tmp_path / "alone" / output)
    assert expected
    assert numbers_in(tmp_path / "ranks" / output) == pytest.approx(expected, rel=1e-2, abs=1e-3, nan_ok=True)
