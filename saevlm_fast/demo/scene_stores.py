"""Activations of scenes by tiny-clip, harvested once and kept in a cache.

A cached harvest is named by everything it is made of, and its checksums are compared before it is used: what is damaged
is harvested again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.store import verify
from saevlm_fast.errors import goes_on, require
from saevlm_fast.files import cache_directory
from saevlm_fast.formats.sae_header import read_sae_header
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.run import HarvestSummary, harvest
from saevlm_fast.harvesting.stores import HARVEST_FILE
from saevlm_fast.images.scenes import PREFIX, open_scenes
from saevlm_fast.outputs import LOCK_FILE, output_lock
from saevlm_fast.records import RECORD, Fields, object_of, read_record
from saevlm_fast.runtime import resolve_device
from saevlm_fast.towers.load import load_tower
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint

TOWER = "tiny-clip"
LAYER = 3  # the last but one block: what tiny-llava reads, as the paper's block 22 of CLIP-L's 24
N_SCENES = {"train": 10_000, "test": 5_000}
# Of SAEs on them: in place of the paper's 110,000 steps of 4096 rows of a million images.
RECIPE = {"k": 10, "expansion": 4, "steps": 1200, "batch_size": 512, "dead_after": 100_000}
_PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class SceneStores:
    """Stores of the same scenes in the same order: the activations of one layer, and the projected embeddings."""

    directory: Path
    activations: Path
    embeddings: Path


def harvest_scenes(
    split: str,
    n: int,
    layer: int = LAYER,
    tokens: str = "cls",
    *,
    device: str = "auto",
    on_message: Callable[[str], None] = print,
    on_images: Callable[[int, int, int], None] = lambda done, total, skipped: None,
) -> SceneStores:
    """Scenes 0 .. n - 1 of a split through tiny-clip, from the cache if they are there and sound.

    Safe under several processes: one harvests, the others wait for it. Interrupted, it goes on the next time.

    Args:
        layer: of the residual stream, from 0. tokens: one token (cls, mean) or several (random:K, patches) per image.
        on_message: told of a damaged cache and of waiting. on_images: as in harvest.harvest.

    Raises:
        ValueError: what harvest refuses; a cache that cannot be written. Interrupted: SIGINT or SIGTERM.
    """
    scenes = f"{PREFIX}{split}:{n}"
    source, choice = open_scenes(scenes), Tokens.parse(tokens)
    points = (HookPoint("residual", layer), HookPoint("projection"))
    config = HarvestConfig(points, (choice,), store_dtype="float32", batch_size=128)
    tower = load_tower(f"hf:{TOWER}", resolve_device(device))
    made_of = json.dumps([tower.description(), source.fingerprint(), asdict(config)], sort_keys=True, default=str)
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]  # another model or version is another directory
    output = cache_directory() / f"{split}-{n}-residual-{layer}-{choice.name}-{key}"
    waiting = lambda: on_message(f"{output}: another process is harvesting it, waiting")  # noqa: E731
    # Beside the output, as a damaged one is deleted.
    with output_lock(output, directory=False, patience=_PATIENCE_SECONDS, on_wait=waiting):
        options = HarvestOptions(output, scenes, resume=True)
        go_on = lambda: harvest(source, tower, config, options, on_images=on_images)  # noqa: E731
        with goes_on():
            summary = _go_on_or_begin_again(go_on, output, on_message)
    return SceneStores(output, *summary.stores)


def scenes_of_sae(sae_directory: Path) -> tuple[int, str]:
    """(layer, tokens) of the scenes that an SAE was trained on, as `harvest_scenes` takes them.

    Raises:
        ValueError: it was trained on something else, or does not say on what; on several rows of an image.
    """
    source = object_of(read_sae_header(sae_directory).config.metadata.get("source"))
    spec = object_of(source.get("model")).get("spec")
    require(
        spec == f"hf:{TOWER}" and source.get("point") == "residual",
        f"activations: {sae_directory} was not trained on the box's scenes; give --activations and --embeddings of the "
        "images it is to be scored on",
    )
    layer, tokens = source["layer"], source["tokens"]
    require(
        tokens in ("cls", "mean"),
        f"activations: {sae_directory} was trained on {tokens} tokens, and the score needs one row per image; give "
        "--activations and --embeddings",
    )
    return int(layer), str(tokens)


def _go_on_or_begin_again(
    go_on: Callable[[], HarvestSummary], output: Path, on_message: Callable[[str], None]
) -> HarvestSummary:
    """What is there is used if it is sound and harvest can go on with it."""
    damage = _damage(output)
    if damage is None:
        was_there = output.exists()
        try:
            return go_on()
        except ValueError as error:  # settings that are not those of the directory's name
            if not was_there:
                raise
            damage = str(error)
    on_message(f"damaged cache, harvesting again: {damage}")
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return go_on()


def _damage(output: Path) -> str | None:
    """What is wrong with a harvest, finished or not; None if nothing is, or nothing is there."""
    if output.exists() and not output.is_dir():
        return f"{output} is not a directory"
    try:
        if output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir()):
            read_record(output / HARVEST_FILE, Fields({"harvest": RECORD}))
        for index in output.glob("*/index.json"):
            verify(index.parent)
    except (ValueError, OSError) as error:
        return str(error)
    return None
