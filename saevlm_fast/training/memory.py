"""What training takes in memory and on the disk, which is arithmetic, and whether there is room."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from saevlm_fast.config import PENALISED
from saevlm_fast.errors import doubt, require, size_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from saevlm_fast.config import DataOn, SAEConfig, TrainConfig
    from saevlm_fast.data.rows import Activations

KEPT_CHECKPOINTS = 2  # of a run, when no other is being written


class Written(Enum):
    """How checkpoints of SAEs that are trained together are written."""

    IN_TURN = "in turn"
    BESIDE_STEPS = "beside the steps"  # those of all SAEs may be being written at once
    BY_RANKS = "by ranks"  # in turn, each rank its part; the SAE as such is not in them

    @staticmethod
    def by(device: "torch.device", n_ranks: int = 1) -> "Written":
        """As one process, or ranks, with such a device write them."""
        if n_ranks > 1:
            return Written.BY_RANKS
        return Written.BESIDE_STEPS if device.type == "cuda" else Written.IN_TURN


def training_memory(sae: "SAEConfig", batch_size: int, accumulate: int = 1, control: str | None = None) -> int:
    """Weights, two moments and gradients in float32, the batch with its reconstruction, and the pre-activations of one
    of `accumulate` micro-batches.

    Half of the latents of a relu or jumprelu SAE fire at first: some 64 bytes for each of these entries (measured). A
    GPU's matrix products (gpu_dense.py) have each weight in three halves, and a gradient before it is added.
    A soft-frozen control keeps the decoder that it began with. What dead latents take comes to it: auxiliary_memory.
    """
    penalised = sae.architecture in PENALISED
    entries = 8 * sae.d_sae if penalised else 0
    products = 5 * sae.d_in * sae.d_sae if penalised else 0
    first = sae.d_in * sae.d_sae if control == "soft-frozen" else 0
    micro = -(-batch_size // accumulate) * (sae.d_sae + entries)
    return 4 * (first + products + 4 * sae_numbers(sae) + 4 * batch_size * sae.d_in + micro)


def memory_of(sae: "SAEConfig", config: "TrainConfig", n_rows: int) -> int:
    """training_memory of such a run on n_rows rows."""
    return training_memory(sae, min(config.batch_size, n_rows), config.accumulate, config.control)


def auxiliary_memory(
    sae: "SAEConfig", config: "TrainConfig", n_rows: int, device: "torch.device", n_ranks: int = 1
) -> int:
    """What the auxiliary loss takes beside training_memory at worst, when all latents are dead; 0 if none can be.

    Six rows of d_in for a dead latent, eight for a row of the batch, and some blocks [rows, dead latents], whose sizes
    are limited (dead_latents.py, kernels/auxiliary_triton.py, sharded_dead.py). One process on a GPU has parts of its
    sums besides (parts_of). Whether latents die is the data's doing: no run is refused for it. n_ranks: that share the
    latents; sae is then one's part.
    """
    batch_size, gpu = min(config.batch_size, n_rows), device.type == "cuda"
    none = sae.architecture == "relu" or config.auxk_alpha == 0
    if none or config.n_steps * batch_size < config.dead_after:
        return 0
    dead, blocks, most, parts = sae.d_sae * sae.d_in, 4, 1 << 23, 0
    if gpu and n_ranks == 1:
        blocks, most, parts = 2, 1 << 26, min(2 * (batch_size // 256) * dead, 84 << 20)
    elif gpu:
        most = 1 << 27
    return 4 * (6 * dead + 8 * batch_size * sae.d_in + blocks * min(batch_size * sae.d_sae, most) + parts)


def most_memory_of(
    sae: "SAEConfig", config: "TrainConfig", n_rows: int, device: "torch.device", n_ranks: int = 1
) -> int:
    """memory_of with the auxiliary loss, for people who plan."""
    return memory_of(sae, config, n_rows) + auxiliary_memory(sae, config, n_rows, device, n_ranks)


def sae_numbers(sae: "SAEConfig") -> int:
    """Weights and biases of an SAE."""
    return 2 * sae.d_in * sae.d_sae + sae.d_in + sae.d_sae


def training_disk(*saes: "SAEConfig", written: Written, n_checkpoints: int = KEPT_CHECKPOINTS + 1) -> int:
    """What runs of SAEs that are trained together hold at once, that write so many checkpoints: two each, and those
    that are being written, or the finished SAEs. A checkpoint is training weights, two moments and, unless ranks write
    it, the SAE."""
    sizes, copies = [4 * sae_numbers(sae) for sae in saes], 3 if written is Written.BY_RANKS else 4
    kept = copies * sum(sizes) * min(n_checkpoints, KEPT_CHECKPOINTS)
    at_once = sum(sizes) if written is Written.BESIDE_STEPS else max(sizes)
    return kept + max(sum(sizes), copies * at_once if n_checkpoints > KEPT_CHECKPOINTS else 0)


def check_disk(
    output: Path,
    saes: "Iterable[SAEConfig]",
    n_steps: int,
    checkpoint_every: int | None,
    written: Written,
    doubts: bool = True,
) -> None:
    """That there is room for the SAEs with the checkpoints that are there at once, before anything is computed.

    How many a run writes by the clock is not known: one is certain, and a Doubt tells where more would not fit, unless
    that was told of all together (`doubts`).

    Raises:
        ValueError: there is not, with what is needed and what is free.
    """
    from saevlm_fast.outputs import check_room, lacking_room

    together, there = list(saes), _unfinished_bytes(output)
    certain = 1 if checkpoint_every is None else -(-n_steps // checkpoint_every)
    what, needed = _with_checkpoints(together, certain, written)
    check_room(output, needed - there, what)
    if checkpoint_every is None and doubts:
        what, needed = _with_checkpoints(together, n_steps, written)
        if lacking := lacking_room(output, needed - there):
            doubt(f"output: {what} {size_text(needed - there)}, as a run of minutes has them at once, {lacking}")


def _with_checkpoints(saes: "Sequence[SAEConfig]", n_written: int, written: Written) -> tuple[str, int]:
    """What takes room, with its verb, and how much."""
    n = max(1, min(n_written, KEPT_CHECKPOINTS + 1))
    checkpoints = "a checkpoint" if n == 1 else f"{n} checkpoints"
    whose = f"the SAE with {checkpoints} takes" if len(saes) == 1 else f"{len(saes)} SAEs with {checkpoints} each take"
    return whose, training_disk(*saes, written=written, n_checkpoints=n)


def _unfinished_bytes(output: Path) -> int:
    """Of a replacement that was cut short, which the next one removes."""
    from saevlm_fast.outputs import REPLACEMENT

    return sum(path.stat().st_size for path in (output / REPLACEMENT).rglob("*") if path.is_file())


def free_memory(device: "torch.device") -> int | None:
    """Bytes that are free on the device, or in the host's memory; None if the system does not say."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def check_memory(device: "torch.device", needed: "Mapping[str, int]") -> None:
    """That what is named fits together into the memory that is free: training_memory of SAEs, buffers of rows.

    Raises:
        ValueError: it does not, with the sum, what is free, and the largest part.
    """
    total, free = sum(needed.values()), free_memory(device)
    largest = max(needed, key=lambda name: needed[name])
    require(
        free is None or total <= free,
        f"memory: {len(needed)} together take {size_text(total)}, and {size_text(free or 0)} are free on {device}; "
        f"the largest is {largest}, {size_text(needed[largest])}",
    )


def rows_go_to_device(
    activations: "Activations",
    sae: "SAEConfig",
    config: "TrainConfig",
    device: "torch.device",
    data_on: "DataOn",
    others: int = 0,
    n_ranks: int = 1,
) -> bool:
    """Whether all rows are kept where the steps are taken: a GPU's memory, or beside a CPU the host's.

    auto: on a GPU if they fit; beside a CPU never, where files are mapped and what fits stays in the page cache. They
    fit if the memory that is free holds them and, once more, all that training takes; auto leaves room for the
    auxiliary loss too. others: bytes that SAEs take which are trained beside this one. n_ranks: that share the rows;
    sae is then one's part.

    Raises:
        ValueError: data_on is device, and they do not fit.
    """
    if data_on == "host" or (data_on == "auto" and device.type == "cpu"):
        return False
    rows = -(-activations.n_rows // n_ranks) * activations.d * activations.kept_dtype.itemsize
    training, free = memory_of(sae, config, activations.n_rows) + others, free_memory(device)
    spare = auxiliary_memory(sae, config, activations.n_rows, device, n_ranks) if data_on == "auto" else 0
    fits = free is None or rows + training + spare <= free
    require(
        fits or data_on == "auto",
        f"data_on: device, but the rows take {size_text(rows)} there and training {size_text(training)}, "
        f"and {size_text(free or 0)} are free on {device}; host reads them from where they are",
    )
    return fits
