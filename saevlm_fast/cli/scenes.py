"""The box's scenes and the runs below runs/: what commands work on where nothing else is named."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from saevlm_fast.cli.terminal import HarvestBar, say, tell
from saevlm_fast.errors import require

if TYPE_CHECKING:
    from saevlm_fast.demo.scene_stores import SceneStores

RUNS = Path("runs")


def new_run_directory() -> Path:
    """runs/DATE-TIME."""
    return RUNS / time.strftime("%Y-%m-%d-%H%M%S")


def latest_run() -> Path:
    """The directory below runs/ whose SAE was finished last. ValueError: there is none."""
    from saevlm_fast.sae import WEIGHTS_FILE

    finished = sorted(RUNS.glob(f"*/{WEIGHTS_FILE}"), key=lambda file: file.stat().st_mtime)
    require(
        len(finished) > 0,
        f"sae: no finished run below {RUNS.absolute()}; train one, or give --sae DIR (of the demo: demo/batch_topk)",
    )
    say(f"latest run: {finished[-1].parent}")
    return finished[-1].parent


def scene_widths() -> tuple[int, int]:
    """Of the activations and of the embeddings of scenes."""
    from saevlm_fast.box.models import model_directory
    from saevlm_fast.demo.scene_stores import TOWER

    tower = json.loads((model_directory(TOWER) / "config.json").read_text(encoding="utf-8"))
    return int(tower["vision_config"]["hidden_size"]), int(tower["projection_dim"])


def scenes_of(sae: Path | None) -> tuple[int, str]:
    """Layer and tokens that an SAE was trained on. ValueError: on something else than the box's scenes."""
    from saevlm_fast.demo.scene_stores import LAYER, scenes_of_sae

    return scenes_of_sae(sae) if sae is not None else (LAYER, "cls")


def scenes(split: str, sae: Path | None = None, device: str = "auto") -> "SceneStores":
    """Activations (of the layer an SAE was trained on) and embeddings of the box's scenes, cached or harvested."""
    from saevlm_fast.demo.scene_stores import N_SCENES, harvest_scenes

    layer, tokens = scenes_of(sae)
    with HarvestBar() as bar:
        count = N_SCENES[split]
        return harvest_scenes(split, count, layer, tokens, device=device, on_message=tell, on_images=bar.on_images)
