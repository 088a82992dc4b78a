"""Where the time of a whole harvest goes: `python -m bench.harvesting.whole_harvest --output FILE.json`.

A CLIP vision tower with random weights and JPEG photos of noise and structure, both made here. It times the bare
forward on ready batches, decoding and preprocessing in one process and in many, and `harvest` itself, once for every
number in --workers: a short one and a long one, whose difference is the rate of long runs, free of start and end. What
is only slow the first time is done before them. The forward goes on and on as a harvest's does, and is timed before the
harvests and after them: a GPU at its limit of power has no one speed.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.helpers import machine
from bench.helpers.arguments import directory, new_file, not_negative, positive
from bench.helpers.clocks import clocks, seconds_of
from saevlm_fast.config import HarvestOptions
from saevlm_fast.files import write_json_atomic
from saevlm_fast.harvesting import run as run_module
from saevlm_fast.harvesting.config import COMPUTE_DTYPES, HarvestConfig
from saevlm_fast.harvesting.stores import HarvestStores
from saevlm_fast.images.decode import decode
from saevlm_fast.images.open import open_images
from saevlm_fast.runtime import one_thread
from saevlm_fast.towers.from_transformers import wrap_transformers
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookedTower, HookPoint, Tower

# hidden, mlp, heads, blocks, projection, pixels, patch
TOWERS = {"large": (1024, 4096, 16, 24, 768, 336, 14), "tiny": (32, 64, 2, 2, 16, 32, 8)}
PHOTO_SIZE, N_DISTINCT = (500, 375), 512  # ImageNet's most frequent size; more photos are links to these
# What a harvest does, by the function that does it.
PARTS = {
    "set-up of the tower": (HookedTower, "_probe"),
    "loop": (run_module._Loop, "units"),
    "forwards, as far as the host waits": (run_module._Loop, "_forward"),
    "beside it, beginning the stores": (HarvestStores, "begin"),
    "of that, hashing weights": (Tower, "description"),
    "beside it, writing": (HarvestStores, "write_unit"),
    "finish": (HarvestStores, "finish"),
}


def make_photo(i: int) -> bytes:
    """A JPEG of about 50 kB: blobs at three scales, and grain."""
    noise, (width, height) = np.random.default_rng(i), PHOTO_SIZE
    pixels_HWC = 128 + noise.normal(0, 3, (height, width, 1)).astype(np.float32)
    for scale, strength in ((8, 45), (32, 35), (125, 30)):
        shape = (height // scale + 2, width // scale + 2)
        blobs = [
            Image.fromarray(noise.normal(0, strength, shape).astype(np.float32)).resize(
                PHOTO_SIZE, Image.Resampling.BICUBIC
            )
            for _ in range(3)
        ]
        pixels_HWC = pixels_HWC + np.stack([np.asarray(blob) for blob in blobs], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def write_photo(folder: Path, n_photos: int, i: int) -> None:
    first = folder / f"{i:06d}.jpg"
    first.write_bytes(make_photo(i))
    for copy in range(i + N_DISTINCT, n_photos, N_DISTINCT):
        os.link(first, folder / f"{copy:06d}.jpg")


def make_tower(name: str, device: torch.device) -> Tower:
    """Random weights of the true size, made on the device."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    hidden, mlp, heads, blocks, projection, side, patch = TOWERS[name]
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_hidden_layers=blocks,
        projection_dim=projection,
        image_size=side,
        patch_size=patch,
    )
    torch.manual_seed(0)
    with device:
        model = CLIPVisionModelWithProjection(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the library's own gives nearly the same row for every image
            torch.nn.init.normal_(parameter, std=0.04)
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return wrap_transformers(model, processor, f"random CLIP ({name})", device)


# --- parts -----------------------------------------------------------------------------------------------------------


def ready_batches(tower: Tower, paths: list[Path], batch_size: int, n_batches: int) -> list[dict[str, Tensor]]:
    """Preprocessed, page-locked beside a GPU."""
    batches = []
    for j in range(n_batches):
        chosen = [paths[i % len(paths)] for i in range(j * batch_size, (j + 1) * batch_size)]
        inputs = tower.preprocess([decode(path.read_bytes()) for path in chosen])
        on_gpu = tower.device.type == "cuda"
        batches.append({name: tensor.pin_memory() if on_gpu else tensor for name, tensor in inputs.items()})
    return batches


def forward_rates(tower: Tower, config: HarvestConfig, batches: list[dict[str, Tensor]], seconds: float) -> dict:
    """Images a second of the forward alone, and seconds that the host needs to queue the first batch of it."""
    with tower.hooked(config.points, autocast=COMPUTE_DTYPES[config.dtype]) as run:
        on_device = [{name: tensor.to(tower.device) for name, tensor in inputs.items()} for inputs in batches]

        def copied(inputs: dict[str, Tensor]) -> None:
            run({name: tensor.to(tower.device, non_blocking=True) for name, tensor in inputs.items()})

        rates = {
            "forward on batches in the device's memory": images_per_second(run, on_device, tower.device, seconds),
            "forward on ready batches in the host's memory": images_per_second(copied, batches, tower.device, seconds),
        }
        start = time.perf_counter()
        run(on_device[0])
        queued = time.perf_counter() - start
        finish(tower.device)
    return {"images_per_second": rates, "seconds_to_queue_a_batch": queued}


def images_per_second(
    run: Callable[[dict[str, Tensor]], object], batches: list[dict[str, Tensor]], device: torch.device, seconds: float
) -> float:
    """Of forwards one after the other, which nobody waits for in between."""
    start, n_images = time.perf_counter(), 0
    for turn in range(2):  # the first one warms up
        finish(device)
        start, n_images = time.perf_counter(), 0
        while time.perf_counter() - start < (seconds if turn else seconds / 4):
            for inputs in batches:
                run(inputs)
                n_images += len(inputs["pixel_values"])
    finish(device)
    return n_images / (time.perf_counter() - start)


def mean_forward(several: list[dict]) -> dict:
    """forward_rates at several times as one, with what each was."""
    rates = [each["images_per_second"] for each in several]
    mean = {name: sum(each[name] for each in rates) / len(rates) for name in rates[0]}
    return several[0] | {"images_per_second": mean, "before_and_after": rates}


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def photo_rate(preprocess: Callable[..., Any] | None, paths: list[Path], batch: int, seconds: float) -> float:
    """Photos a second of one process on one thread: decoded, and preprocessed in batches if `preprocess` is given."""
    with one_thread(True):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            pictures = [decode(paths[(done + i) % len(paths)].read_bytes()) for i in range(batch)]
            if preprocess is not None:
                preprocess(pictures)
            done += batch
        return done / (time.perf_counter() - start)


def photo_rates(tower: Tower, paths: list[Path], batch: int, processes: int, seconds: float) -> dict[str, float]:
    rates = {}
    for name, preprocess in (("decode", None), ("decode and preprocess", tower.preprocess)):
        rates[f"{name}, 1 process"] = photo_rate(preprocess, paths, batch, seconds)
        with ProcessPoolExecutor(processes) as pool:
            jobs = [pool.submit(photo_rate, preprocess, paths, batch, seconds) for _ in range(processes)]
            rates[f"{name}, {processes} processes"] = sum(job.result() for job in jobs)
    return rates


# --- whole -----------------------------------------------------------------------------------------------------------


def timed_harvest(tower: Tower, photos: Path, config: HarvestConfig, output: Path, workers: int) -> dict[str, Any]:
    """One harvest: its seconds in all, by part, and those in which the tower had no batch."""
    source = open_images(str(photos))
    with clocks(PARTS) as spans:
        start = time.perf_counter()
        summary = run_module.harvest(source, tower, config, HarvestOptions(output, workers=workers))
        end = time.perf_counter()
    loop_start = min(begin for name, begin, _ in spans if name == "loop")
    first_batch = min(begin for name, begin, _ in spans if name == "forwards, as far as the host waits") - loop_start
    return {
        "images": summary.n_images,
        "seconds": end - start,
        "waiting_for_the_first_batch": first_batch,
        "waiting_for_the_others": max(0.0, summary.waiting - first_batch),
        "parts": seconds_of(spans),
    }


def harvest_rates(tower: Tower, photos: Path, folder: Path, options: argparse.Namespace, workers: int) -> dict:
    """The short harvest and the long one; images a second between them."""
    runs = []
    for n_images in (options.images // 3, options.images):
        config = config_of(tower, options, limit=n_images)
        runs.append(timed_harvest(tower, photos, config, folder / f"store-{workers}-{n_images}", workers))
    short, long = runs
    return {
        "workers": workers,
        "images_per_second": {
            "long run": (long["images"] - short["images"]) / (long["seconds"] - short["seconds"]),
            f"whole, {long['images']} images": long["images"] / long["seconds"],
            "loop alone": long["images"] / long["parts"]["loop"],
        },
        "runs": runs,
    }


def config_of(tower: Tower, options: argparse.Namespace, **settings: Any) -> HarvestConfig:
    points = HookPoint("residual", tower.n_blocks - 2), HookPoint("projection")
    return HarvestConfig(points, (Tokens.parse("cls"),), batch_size=options.batch_size, dtype=options.dtype, **settings)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    photos = folder / "photos"
    photos.mkdir()
    with ProcessPoolExecutor(options.processes) as pool:
        list(pool.map(partial(write_photo, photos, options.images), range(min(N_DISTINCT, options.images))))
    paths = sorted(photos.iterdir())[:N_DISTINCT]
    begin = time.perf_counter()
    tower = make_tower(options.tower, device)
    measured: dict[str, Any] = {
        **machine.describe(device),
        "cores": len(os.sched_getaffinity(0)),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "photo_kB": float(np.mean([path.stat().st_size for path in paths])) / 1e3,
        "seconds_to_make_the_tower": time.perf_counter() - begin,
    }
    measured["photos_per_second"] = photo_rates(tower, paths, options.batch_size, options.processes, options.seconds)
    show(measured, "photos_per_second", "photo_kB", "cores", "device", "cpu", "seconds_to_make_the_tower")
    ready = ready_batches(tower, paths, options.batch_size, options.ready_batches)
    measured["harvests"] = []
    forward = partial(forward_rates, tower, config_of(tower, options), ready, 2 * options.seconds)
    forwards = [forward()]
    first = config_of(tower, options, limit=2 * options.batch_size)
    timed_harvest(tower, photos, first, folder / "store-first", options.workers[0])
    for workers in options.workers:
        measured["harvests"].append(harvest_rates(tower, photos, folder, options, workers))
        show(measured["harvests"][-1], "workers", "images_per_second", "runs")
    forwards.append(forward())
    measured["forward"] = mean_forward(forwards)
    show(measured, "forward")
    return measured


def show(measured: dict[str, Any], *keys: str) -> None:
    for key in keys:
        _show(key, measured[key], "")


def _show(key: str, value: Any, indent: str) -> None:
    if isinstance(value, dict):
        print(f"{indent}{key}:", flush=True)
        for name, inner in value.items():
            _show(name, inner, indent + "  ")
    elif isinstance(value, list):
        for one in value:
            _show(key, one, indent)
    else:
        print(f"{indent}{key}: {value:.4g}" if isinstance(value, float) else f"{indent}{key}: {value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file, required=True)
    parser.add_argument("--directory", type=directory, help="where photos and stores go for the time being")
    parser.add_argument("--tower", choices=TOWERS, default="large", help="CLIP ViT-L/14-336, or a small one")
    parser.add_argument("--images", type=positive, default=6144)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="bfloat16")
    parser.add_argument("--workers", type=not_negative, nargs="+", default=[8])
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="that decode at the same time")
    parser.add_argument("--ready-batches", type=positive, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each part")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        measured = measure(options, Path(folder))
    write_json_atomic(options.output, measured)


if __name__ == "__main__":
    main()
