"""One batch of images through the tower: the rows of every store of a plan, where the forward left them."""

import torch
from torch import Tensor

from saevlm_fast.data.codes import mean_pool_codes
from saevlm_fast.harvesting.plan import HarvestPlan, PlannedStore
from saevlm_fast.harvesting.stores import BatchRows
from saevlm_fast.images.batches import Batch
from saevlm_fast.sae import inferred
from saevlm_fast.sparse_codes import SparseCodes
from saevlm_fast.towers.tokens import POOLED


def forward_rows(plan: HarvestPlan, batch: Batch) -> list[BatchRows]:
    """The chosen tokens of a batch for every store, or their codes, on the tower's device; none of unusable images.

    Activations are in the dtype of the stores. The device is waited for only where the number of rows is its own doing:
    codes above a threshold, and pooling.
    """
    if batch.inputs is None:
        return []
    inputs = {name: tensor.to(plan.tower.device, non_blocking=True) for name, tensor in batch.inputs.items()}
    ids = [plan.source.image_id(i) for i in batch.images]
    acts = plan.run(inputs)
    return [_rows(plan, store, acts[store.point], batch, ids) for store in plan.stores]


def _rows(plan: HarvestPlan, store: PlannedStore, acts: Tensor, batch: Batch, ids: list[str]) -> BatchRows:
    config, sae = plan.config, plan.sae
    chosen = plan.run.select(acts, store.tokens, ids, config.seed, batch.inputs)
    image_of_row, positions, details = chosen.image_of_row, chosen.positions, chosen.details
    values: Tensor | SparseCodes
    if sae is None:
        values = chosen.rows_MD.to(config.torch_store_dtype)
    else:
        values = inferred(sae, chosen.rows_MD)
        if config.pool == "mean":
            values = mean_pool_codes(values, chosen.image_of_row, len(batch.images))
            image_of_row, positions = torch.arange(len(batch.images)), torch.full((len(batch.images),), POOLED)
            details = None
    return BatchRows(values, torch.tensor(batch.images)[image_of_row], positions, details)


def on_host(rows: BatchRows) -> BatchRows:
    """A copy on the host (a view would keep all tokens alive); from a GPU without waiting for it."""
    values = rows.values
    return rows._replace(values=_to_host(values) if isinstance(values, Tensor) else values.map(_to_host))


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)
