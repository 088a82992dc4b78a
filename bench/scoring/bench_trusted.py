"""What intervals and null cost: both passes of the trusted score beside the one pass of the score alone, interleaved.

    OMP_NUM_THREADS=1 python -m bench.scoring.bench_trusted [--width E] [--rounds R] [--profile]

Synthetic codes in memory, so only the score is timed: each latent's rate follows a square law, embeddings share a
mean. CPU seconds are of the process, which a shared machine disturbs less than the clock; both are printed.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from saevlm_fast.scoring.monosemanticity import StreamedScore
from saevlm_fast.scoring.second_pass import SecondPass
from saevlm_fast.sparse_codes import SparseCodes


def made(n_images: int, n_latents: int, width: int, l0: int) -> tuple[SparseCodes, torch.Tensor]:
    """Codes and embeddings."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(n_images, l0, generator=generator).square() * (n_latents - l0)
    latents = rates.long().sort(1).values + torch.arange(l0)
    acts = torch.rand(n_images, l0, generator=generator) + 0.1
    return SparseCodes.from_flat(acts, latents, None, n_latents), torch.randn(
        n_images, width, generator=generator
    ) + 0.5


def clocked(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what it gives, wall seconds, CPU seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    given = work()
    return given, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 50_000), ("latents", 65_536), ("width", 768), ("l0", 20), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    codes, emb = made(options.images, options.latents, options.width, options.l0)

    def first(halves: bool) -> StreamedScore:
        score = StreamedScore(options.latents, halves=halves)
        score.update(codes, emb)
        score.result()
        return score

    def second(taken: StreamedScore) -> Any:
        found = SecondPass(taken)
        found.update(codes, emb)
        return found.result()

    first(False)  # warm
    for _ in range(options.rounds):
        _, one_wall, one_cpu = clocked(lambda: first(False))
        kept, first_wall, first_cpu = clocked(lambda: first(True))
        _, second_wall, second_cpu = clocked(lambda: second(kept))  # noqa: B023
        del kept
        print(
            f"wall: one pass {one_wall:.2f}, two {first_wall:.2f} + {second_wall:.2f} s, "
            f"ratio {(first_wall + second_wall) / one_wall:.2f}; "
            f"CPU: {one_cpu:.2f}, {first_cpu:.2f} + {second_cpu:.2f} s, ratio {(first_cpu + second_cpu) / one_cpu:.2f}",
            flush=True,
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, the data in it")
    if options.profile:
        kept = first(True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            second(kept)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))


if __name__ == "__main__":
    main()
