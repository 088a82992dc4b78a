"""What the commands that look at latents have in common: which rows, of which SAE, and where their pictures are."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saevlm_fast.cli.options import WorkOptions
from saevlm_fast.cli.planning import Enough, Stopwatch
from saevlm_fast.cli.terminal import warn
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.errors import require
from saevlm_fast.settings import setting

if TYPE_CHECKING:
    from saevlm_fast.data.codes import StoredCodes
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.sae import SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class LookArguments(WorkOptions):
    """Latents of an SAE on the rows of a store; of several rows an image, the image has its largest (or their mean)."""

    title = "What is looked at"
    sae: Path = setting(help="SAE directory (cfg.json, sae_weights.safetensors).")
    activations: Path | None = setting(
        None,
        help="Store of activations, of one or several rows an image; or a matrix file.",
        instead_of=("codes",),
        remote=True,
    )
    codes: Path | None = setting(
        None, help="Store of the SAE's codes, instead of --activations.", instead_of=("activations",), remote=True
    )
    pool: Literal["max", "mean"] = setting(
        "max", help="Of an image with several rows (patches): that of its largest row, or the mean of its rows."
    )
    batch_size: int = setting(4096, help="Rows read and encoded at a time.", at_least=1)
    device: str = setting("auto", help=DEVICE_HELP)
    force: bool = setting(False, help="Replace --output once the new one is whole.", recorded=False)

    def check(self) -> None:
        super().check()
        given = (self.activations is not None) + (self.codes is not None)
        require(given == 1, "activations: give either --activations STORE or --codes STORE")


@dataclass(frozen=True)
class Looked:
    """Opened: rows, and the SAE that encodes them, None of codes; sae is always there."""

    rows: "Activations | StoredCodes"
    encoder: "SparseAutoencoder | None"
    sae: "SparseAutoencoder"

    @classmethod
    def of(cls, options: LookArguments) -> "Looked":
        """ValueError: what is damaged or not there; codes of another SAE."""
        from saevlm_fast.data.codes import open_codes
        from saevlm_fast.data.rows import open_activations
        from saevlm_fast.provenance import check_rows_of, check_same_sae
        from saevlm_fast.runtime import resolve_device
        from saevlm_fast.sae import SparseAutoencoder

        sae = SparseAutoencoder.from_pretrained(options.sae, device=resolve_device(options.device))
        if options.codes is not None:
            codes = open_codes(options.codes)
            check_same_sae(codes, options.sae, sae)
            return cls(codes, None, sae)
        assert options.activations is not None  # the options have seen to it
        rows = open_activations(options.activations)
        if (doubt := check_rows_of(sae, rows)) is not None:
            warn(f"{doubt}; its codes of {options.activations} may mean little")
        return cls(rows, sae, sae)


def timed(work: Callable[[Any], Any], n: int) -> float:
    """Seconds of all n images, from the second batch of a pass."""
    stopwatch, start = Stopwatch(), time.perf_counter()
    with suppress(Enough):
        work(stopwatch)
    a_row = stopwatch.seconds_each
    return time.perf_counter() - start if a_row is None else a_row * n
