"""A CPU's training step over its encoder's float32 GEMM, by how far two cores are from each other:

    GOMP_SPINCOUNT=1000 THP_MEM_ALLOC_ENABLE=1 python -m bench.training.near_and_far --output FILE.json

A host of virtual machines moves their cores, and what one core writes for the other costs by the distance: medians over
both kinds of minutes tell of the host. The GEMM is over panels of 2,048 latents in one buffer, with no other work; GEMM
and step take turns. The distance is measured before and after every turn; turns during which it changed count for
neither. The environment above is what `saevlm-fast` sets. It needs Linux and two cores; of more, `taskset -c 0,1` takes
two.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from bench.helpers import machine
from bench.helpers.arguments import new_file, positive
from bench.helpers.cores import seconds_between_cores, where
from bench.helpers.planted import planted_rows
from saevlm_fast.config import SELECTING, SAEConfig, TrainConfig
from saevlm_fast.files import write_json_atomic
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.training.step import Stepper

ENVIRONMENT = ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
SIZES = {6144: (768, 1024), 16384: (1024, 1024), 65536: (1024, 512)}  # d_sae -> d_in, rows
N_BATCHES, PANEL = 24, 2048


def gemm_of(x_BD: Tensor, W_enc_DS: Tensor) -> Callable[[], None]:
    """The encoder's product alone."""
    buffer = torch.empty(len(x_BD) * PANEL)
    panels = [(W_DP, buffer[: len(x_BD) * W_DP.shape[1]].view(len(x_BD), -1)) for W_DP in W_enc_DS.split(PANEL, dim=1)]

    def gemm() -> None:
        for W_DP, out_BP in panels:
            torch.mm(x_BD, W_DP, out=out_BP)

    return gemm


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turns(architecture: str, d_sae: int, k: int, warm_up: int, n_turns: int) -> list[dict]:
    """Of each: gemm and step, seconds; cores, near or far or between, or None where that has changed."""
    d_in, rows = SIZES[d_sae]
    torch.manual_seed(0)
    x_ND = planted_rows(N_BATCHES * rows, d_in, "cpu")
    x_ND -= x_ND.mean(0)
    batches = (x_ND / x_ND.square().sum(1).mean().sqrt()).split(rows)
    given = cycle(batches)
    sae = SparseAutoencoder(SAEConfig.sized(d_in, d_sae=d_sae, k=k, architecture=architecture))
    stepper = Stepper(sae, TrainConfig(warmup_steps=0, threshold_start=0))
    for _ in range(warm_up):
        stepper.step(next(given))
    gemm, found = gemm_of(batches[0], sae.W_enc.detach()), []
    gemm()
    before = where(seconds_between_cores())
    for _ in range(n_turns):
        seconds = {"gemm": seconds_of(gemm), "step": seconds_of(lambda: stepper.step(next(given)))}
        after = where(seconds_between_cores())
        found.append({**seconds, "cores": before if before == after else None})
        before = after
    return found


def results(architecture: str, d_sae: int, k: int, found: list[dict]) -> list[dict]:
    """A line of the JSON for each distance of which there were turns."""
    d_in, rows = SIZES[d_sae]
    lines = []
    for cores in ("near", "between", "far"):
        of_these = [turn for turn in found if turn["cores"] == cores]
        if not of_these:
            continue
        steps, gemms = [turn["step"] for turn in of_these], [turn["gemm"] for turn in of_these]
        about = {
            "operation": f"{architecture} training step", "case": f"d_sae {d_sae}, k {k}, {cores}",
            "impl": "saevlm-fast", "dtype": "float32", "cores": cores,
            "shape": {"B": rows, "d_in": d_in, "d_sae": d_sae, "k": k}, "gemm_data": gemms,
            "gemm_median": statistics.median(gemms),
            "this_over_encoder_gemm": statistics.median(step / gemm for step, gemm in zip(steps, gemms)),
        }  # fmt: skip
        lines.append(
            {
                "name": f"{architecture} training step[d_sae {d_sae}, k {k}, {cores}]",
                "stats": {"median": statistics.median(steps), "rounds": len(steps), "data": steps},
                "extra_info": about | machine.describe("cpu") | {name: os.environ.get(name) for name in ENVIRONMENT},
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file, required=True, help="JSON file, rewritten after every case")
    parser.add_argument("--d-sae", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--architectures", nargs="+", choices=SELECTING, default=list(SELECTING))
    parser.add_argument("--warm-up", type=positive, default=20, help="steps before; weights are no longer random then")
    parser.add_argument("--turns", type=positive, default=15)
    parser.add_argument("--k", type=positive, default=20)
    options, lines = parser.parse_args(), list[dict]()
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if (n_cores, torch.get_num_threads()) != (2, 2):
        parser.error(f"{n_cores} cores and {torch.get_num_threads()} threads: two of each are needed")
    for d_sae in options.d_sae:
        for architecture in options.architectures:
            timed = turns(architecture, d_sae, options.k, options.warm_up, options.turns)
            lines += (found := results(architecture, d_sae, options.k, timed))
            for line in found:
                ratio, n = line["extra_info"]["this_over_encoder_gemm"], line["stats"]["rounds"]
                seconds = line["stats"]["median"], line["extra_info"]["gemm_median"]
                times = f"{seconds[0] * 1e3:.0f} and {seconds[1] * 1e3:.0f} ms"
                print(f"{line['name']}: {ratio:.2f} of the GEMM, {times}, {n} turns")
            write_json_atomic(options.output, {"benchmarks": lines})


if __name__ == "__main__":
    main()
