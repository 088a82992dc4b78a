"""What one pass saves: images to an SAE without a store beside harvest and train, and six SAEs beside six runs.

    python -m bench.training.one_pass          # CPU seconds of one thread; docs/how-to/one-pass.md

Scenes of the box as PNG files, the patches of block 3 of tiny-clip. Bits and metrics of the six are compared.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import saevlm_fast as sf
from saevlm_fast.harvesting.api import harvest
from saevlm_fast.images.open import open_images

N_SCENES, N_HELD_OUT = 2000, 300
RECIPE: dict[str, Any] = {"steps": 70, "batch_size": 1024, "lr": 1e-3, "device": "cpu"}
PLACE: dict[str, Any] = {"layer": 3, "tokens": "patches", "workers": 0}
GRID = {f"{a}-k{k}": sf.SAESize(k=k, d_sae=512, architecture=a) for a in ("topk", "matryoshka") for k in (5, 10, 20)}
T = TypeVar("T")


def timed(what: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of this process, and what came of it."""
    start = time.process_time()
    found = what()
    return time.process_time() - start, found


def saved(split: str, n: int, folder: Path) -> Path:
    """Scenes as PNG files."""
    source = open_images(f"scenes:{split}:{n}")
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:05d}.png").write_bytes(source.read(i))
    return folder


def disk(folder: Path) -> float:
    """MB below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def line(what: str, seconds: str, mb: float, metrics: dict[str, float]) -> None:
    print(
        f"{what:32} {seconds:>14} {mb:7.1f} MB  ev {metrics['explained_variance']:.3f}  l0 {metrics['l0']:.2f}  "
        f"dead {metrics['dead_fraction']:.1%}",
        flush=True,
    )


def store_or_not(tower: Any, photos: Path, held_out: Path, root: Path) -> None:
    """Harvest and train, and one pass with buffers of several sizes."""
    test = harvest(tower, held_out, output=root / "test", **PLACE)
    size = sf.SAESize(k=10, d_sae=512)
    for_harvest, store = timed(lambda: harvest(tower, photos, output=root / "store", **PLACE))
    config = size.config(store.d)
    for_training, (_, metrics) = timed(
        lambda: sf.train(store, config, validation=test, output=root / "stored", **RECIPE)
    )
    both = disk(root / "store") + disk(root / "stored")
    line("harvest, then train", f"{for_harvest:.1f} + {for_training:.1f} s", both, metrics)
    for buffer in ("65536", "16384", "1024"):
        output = root / f"pass {buffer}"
        train = partial(sf.train_from_images, tower, photos, {"": size}, buffer=buffer, output=output)
        seconds, trained = timed(partial(train, **RECIPE, **PLACE))
        metrics = sf.evaluate(trained[""].sae, test)
        line(f"one pass, buffer {buffer}", f"{seconds:.1f} s", disk(output), metrics)


def six(tower: Any, photos: Path, root: Path) -> None:
    """Six SAEs at once and one by one, from images and from the store."""
    store = sf.open_activations(root / "store")
    known = {**RECIPE, **PLACE, "buffer": "16384"}
    ways: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "from images": (
            lambda: sf.train_from_images(tower, photos, GRID, **known),
            lambda name: sf.train_from_images(tower, photos, {"": GRID[name]}, **known)[""],
        ),
        "from a store": (
            lambda: sf.train_many(store, {name: size.config(store.d) for name, size in GRID.items()}, **RECIPE),
            lambda name: sf.train(store, GRID[name].config(store.d), **RECIPE),
        ),
    }
    for way, (together, alone) in ways.items():
        at_once, trained = timed(together)
        one_by_one = 0.0
        for name, (sae, metrics) in trained.items():
            seconds, (other, others) = timed(partial(alone, name))
            one_by_one += seconds
            states = sae.state_dict(), other.state_dict()
            assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items()), name
            assert metrics == others, name
        print(f"six SAEs {way}: at once {at_once:.1f} s, one by one {one_by_one:.1f} s, the same bits", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photos, held_out = saved("train", N_SCENES, root / "photos"), saved("test", N_HELD_OUT, root / "held out")
        tower = sf.load_tower("hf:tiny-clip", torch.device("cpu"))
        store_or_not(tower, photos, held_out, root)
        six(tower, photos, root)


if __name__ == "__main__":
    main()
