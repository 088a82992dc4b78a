"""What a store takes on the disk beside its rows: item tables, whose names of images may be long, and the index."""

import io
import json

import pyarrow.parquet as pq
import torch

from saevlm_fast.data.store import Shard
from saevlm_fast.data.writing import ITEM_COMPRESSION
from saevlm_fast.harvesting.plan import HarvestPlan, PlannedStore


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
