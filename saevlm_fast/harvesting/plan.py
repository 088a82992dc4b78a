"""What a harvest will write, known before its first image: stores, units of work, and the settings resume compares."""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saevlm_fast import __version__
from saevlm_fast.config import HarvestOptions
from saevlm_fast.errors import ImageError, require
from saevlm_fast.formats.sae_header import sae_digest
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.images.pairs import caption
from saevlm_fast.images.sources import ImageSource, Names
from saevlm_fast.provenance import misfit
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookedTower, HookPoint, Tower
from saevlm_fast.urls import redacted_text

_ROWS_PER_SHARD = 65536


class PlannedStore(NamedTuple):
    """One store: the rows of one hook point and one choice of tokens. rows_per_image: at most."""

    path: Path
    point: HookPoint
    tokens: Tokens | None
    width: int
    rows_per_image: int


class HarvestPlan:
    """Everything that is decided by the settings, the tower and the images' names; nothing is touched on the disk.

    Attributes:
        output: the directory. n_images: to harvest. sae: the encoder of codes, if there is one.
        stores: what will be written. images_per_unit, n_units: units of work.
        settings: JSON, what harvest.json says. Made when first asked for: all weights are hashed.

    Raises:
        ValueError: settings that fit neither tower nor SAE.
    """

    def __init__(
        self, source: ImageSource, tower: Tower, run: HookedTower, config: HarvestConfig, options: HarvestOptions
    ):
        self.source, self.tower, self.run, self.config, self.options = source, tower, run, config, options
        self.output = Path(options.output)
        self.n_images = min(len(source), config.limit or len(source))
        self.sae = self._open_sae()
        self.stores = self._plan_stores()
        self.images_per_unit = self._images_per_unit()
        self.n_units = -(-self.n_images // self.images_per_unit)

    def batches_of(self, unit: int) -> list[range]:
        """The images of a unit's batches; batches never cross units."""
        first, batch = unit * self.images_per_unit, self.config.batch_size
        last = min(first + self.images_per_unit, self.n_images)
        return [range(start, min(start + batch, last)) for start in range(first, last, batch)]

    def items_of(self, unit: int, images: Tensor, positions: Tensor) -> pa.Table:
        """Items of rows of a unit. Ids and labels are asked for once an image: an image may have hundreds of rows."""
        numbers = [i for batch in self.batches_of(unit) for i in batch]
        places = pa.array((images - numbers[0]).numpy())
        ids = pa.array([self.source.image_id(i) for i in numbers], pa.string())
        labels = pa.array([self.source.label(i) for i in numbers], pa.string())
        tokens = pa.array(positions.numpy().astype(np.int32))
        return pa.table({"image": ids.take(places), "token": tokens, "label": labels.take(places)})

    def source_of(self, store: PlannedStore) -> dict[str, Any]:
        """What a store's index says of where its rows come from."""
        settings, config = self.settings, self.config
        return {
            "model": settings["model"],
            "point": store.point.point,
            "layer": store.point.layer,
            "tokens": None if store.tokens is None else store.tokens.name,
            "layout": self._layout_of(store.point),
            "seed": config.seed,
            "dtype": config.dtype,
            "images": settings["images"],
            "sae": None if config.sae is None else {"path": str(config.sae), "sha256": sae_digest(config.sae)},
            "pool": config.pool,
            "versions": settings["versions"],
        }

    def _layout_of(self, point: HookPoint) -> dict[str, Any] | None:
        return None if self.run.shapes[point][0] is None else self.run.layouts[point].description()

    def _open_sae(self) -> SparseAutoencoder | None:
        if self.config.sae is None:
            return None
        sae = SparseAutoencoder.from_pretrained(self.config.sae, device=self.tower.device)
        ((point, _),) = self.config.stores
        width = self.run.shapes[point][1]
        require(
            sae.config.d_in == width,
            f"sae: d_in of {self.config.sae} is {sae.config.d_in}, but {point.name} of {self.tower.spec} has {width}",
        )
        where = {"point": point.point, "layer": point.layer}
        misfit(sae.config.metadata.get("source"), where, str(self.config.sae), f"point: {point.name}")
        return sae

    def _plan_stores(self) -> list[PlannedStore]:
        single = len(self.config.stores) == 1
        stores = []
        for name, (point, tokens) in zip(self.config.store_names, self.config.stores):
            width = self.run.shapes[point][1] if self.sae is None else self.sae.config.d_sae
            rows = self.run.rows_per_image(point, tokens)  # refuses tokens that the tower does not have
            rows = 1 if self.config.pool == "mean" else rows
            stores.append(PlannedStore(self.output if single else self.output / name, point, tokens, width, rows))
        return stores

    def _images_per_unit(self) -> int:
        """Whole batches: a ragged batch in every unit would cost time (and compile anew)."""
        batch = self.config.batch_size
        wanted = self.config.images_per_shard
        if wanted is None:
            wanted = min(1024, _ROWS_PER_SHARD // max(store.rows_per_image for store in self.stores))
        return max(1, -(-wanted // batch)) * batch

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        config = self.config
        wrong = {"wrong_captions": config.wrong_captions} if config.is_language else {}
        return {
            "model": self.tower.description(),
            "images": {
                **wrong,
                "path": redacted_text(self.options.images),
                "images": self.n_images,
                "fingerprint": self.source.fingerprint(),
                "content": sampled_digest(self.source, self.n_images, config.is_language),
            },
            "harvest": {
                "stores": [store.path.relative_to(self.output).as_posix() for store in self.stores],
                "points": [point.name for point, _ in config.stores],
                "tokens": [None if tokens is None else tokens.name for _, tokens in config.stores],
                "seed": config.seed,
                "batch_size": config.batch_size,
                "dtype": config.dtype,
                "store_dtype": str(config.torch_store_dtype).removeprefix("torch."),
                "images_per_shard": self.images_per_unit,
                "pool": config.pool,
                "sae": None if config.sae is None else sae_digest(config.sae),
            },
            "versions": {"saevlm_fast": __version__, "torch": torch.__version__},
        }


def sampled_digest(source: ImageSource, n_images: int, captions: bool = False) -> str:
    """Fingerprint of what is in the images: hash of 64 of them, evenly spread; with their captions if asked for.

    Of archives elsewhere, each of which would have to be fetched for that, the versions that their server tells.
    """
    if isinstance(source, Names) and (told := source.content()):
        return told
    digest = hashlib.sha256()
    for i in torch.linspace(0, n_images - 1, min(n_images, 64), dtype=torch.float64).round().long().tolist():
        try:
            digest.update(hashlib.sha256(source.read(i)).digest())
            if captions:
                digest.update(caption(source, i).encode("utf-8", "surrogatepass"))
        except ImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]
