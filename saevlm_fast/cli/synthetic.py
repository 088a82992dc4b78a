"""saevlm-fast synthetic: data with planted concepts, to try everything on."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, disk_figures
from saevlm_fast.cli.record import Record
from saevlm_fast.cli.terminal import say
from saevlm_fast.settings import setting


@dataclass(frozen=True, kw_only=True)
class SyntheticArguments(WorkOptions):
    """Options of `saevlm-fast synthetic`."""

    output: Path = setting(help="Directory for activations.npy and embeddings.npy.", positional=True)
    rows: int = setting(20_000, help="Images, N.", at_least=1)
    d_in: int = setting(128, help="Width of the activations.", at_least=1)
    d_embedding: int = setting(64, help="Width of the image embeddings.", at_least=1)
    concepts: int = setting(400, help="Planted concepts.", at_least=1)
    seed: int = setting(0, help="Seed of the concepts and the images.", at_least=0)

    def source(self) -> Any:
        """The planted concepts."""
        from saevlm_fast.data.synthetic import PlantedConcepts

        return PlantedConcepts(d_in=self.d_in, d_embedding=self.d_embedding, n_concepts=self.concepts, seed=self.seed)


def plan(options: SyntheticArguments) -> Plan:
    """What would be written, the time from a block of images."""
    check_writable(options.output)
    source, n_block = options.source(), min(options.rows, 1024)
    source.block(0, n_block)  # warms up
    start = time.perf_counter()
    source.block(0, n_block)
    seconds = (time.perf_counter() - start) * options.rows / n_block
    n_bytes = 4 * options.rows * (options.d_in + options.d_embedding)
    return Plan(
        f"{options.rows:,} images with {options.concepts:,} planted concepts",
        {
            "activations": f"{options.rows:,} x {options.d_in:,} float32",
            "embeddings": f"{options.rows:,} x {options.d_embedding:,} float32",
            "memory_bytes": 2 * n_bytes,
            **disk_figures(options.output, n_bytes),
            "time_seconds": seconds,
        },
    )


@command("synthetic", plan=plan)
def synthetic(options: SyntheticArguments) -> dict[str, Any]:
    """Write activations with planted concepts and matching image embeddings: data to try everything on, no download."""
    from saevlm_fast.data.synthetic import write_synthetic

    paths = write_synthetic(options.output, options.rows, options.source())
    for path in paths:
        say(f"wrote {path}")
    Record("synthetic", options, options.output).write()
    return {"output": str(options.output), "files": [str(path) for path in paths], "rows": options.rows}
