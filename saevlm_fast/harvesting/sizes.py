"""What a store takes on the disk: its rows, item tables, whose names of images may be long, and the index."""

import io
import json

import pyarrow.parquet as pq
import torch

from saevlm_fast.config import SELECTING
from saevlm_fast.data.store import CODES, Shard, StoreIndex
from saevlm_fast.data.writing import ITEM_COMPRESSION
from saevlm_fast.harvesting.plan import HarvestPlan, PlannedStore

_OFFSET_BYTES = 4  # where a row of codes begins


def rows_are_known(plan: HarvestPlan, store: PlannedStore) -> bool:
    """Whether its rows and their sizes are certain before they are made: not those of patches where images have grids
    of their own, of prompts, or of codes, since a latent that is 0 is not stored."""
    layout = plan.run.layouts.get(store.point)
    counted = store.rows_per_image == 1 or (layout is not None and layout.grid is not None)
    return counted and plan.sae is None


def known_l0(plan: HarvestPlan) -> int | None:
    """Latents that fire on a row, by the SAE's k; None where it does not say."""
    assert plan.sae is not None
    return plan.sae.config.k if plan.sae.config.architecture in SELECTING else None


def row_bytes(plan: HarvestPlan, store: PlannedStore, l0: float) -> int:
    """Of a row of activations, or of codes with that many latents: a value and a number for each."""
    dtype = plan.config.torch_store_dtype
    if plan.sae is None:
        return store.width * dtype.itemsize
    latent = StoreIndex(CODES, store.width, dtype, {}).latents_dtype
    return round((dtype.itemsize + latent.itemsize) * l0) + _OFFSET_BYTES


def beside_rows(plan: HarvestPlan, store: PlannedStore) -> int:
    """Bytes. Item tables of three units are made in memory, of as many rows as there may be; others are like them."""
    units = sorted({0, plan.n_units // 2, plan.n_units - 1})
    n_images = sum(len(images) for unit in units for images in plan.batches_of(unit))
    n_bytes = sum(_table_bytes(plan, store, unit) for unit in units)
    return n_bytes * plan.n_images // n_images + plan.n_units * _line_bytes(plan, store)


def _table_bytes(plan: HarvestPlan, store: PlannedStore, unit: int) -> int:
    images = torch.tensor([i for batch in plan.batches_of(unit) for i in batch])
    positions = torch.arange(store.rows_per_image).repeat(len(images))
    file = io.BytesIO()
    table = plan.items_of(unit, images.repeat_interleave(store.rows_per_image), positions)
    pq.write_table(table, file, compression=ITEM_COMPRESSION)
    return file.tell()


def _line_bytes(plan: HarvestPlan, store: PlannedStore) -> int:
    """Of a shard in the index."""
    n, digest = plan.n_units, "0" * 64
    rows = plan.images_per_unit * store.rows_per_image
    shard = Shard(n, rows, f"shard-{n:05d}.safetensors", digest, f"items-{n:05d}.parquet", digest)
    return len(json.dumps(vars(shard))) + 2
